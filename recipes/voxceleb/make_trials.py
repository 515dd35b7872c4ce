"""Trial lists from a folder of recordings, to choose a threshold on and to measure it.

    python recipes/voxceleb/make_trials.py SOURCE OUTPUT

SOURCE has wav/<speaker>/<session>/<utterance>. Its speakers are divided at random into three
groups: those of dev.txt, to validate and to choose a threshold on; those of test.txt, to measure it
on; and the others, to train on or for a cohort. Every pair of the chosen recordings is a trial,
except two of one session of a speaker who has several sessions. For `qmargin extract`,
trial_recordings.txt lists the recordings of the trials, and train_recordings.txt those of the
others, whom train_speakers.txt names. Existing lists with other contents are replaced only with
--overwrite.
"""

import argparse
import sys
from pathlib import Path

from speechbrain_qmargin.cli import HelpFormatter, status_of
from speechbrain_qmargin.cli.inputs import add_overwrite
from speechbrain_qmargin.cli.trials import divided_trials


def make_trials(source, output, dev, test, max_per_person=10, seed=0, overwrite=False):
    """Write the two trial lists and the two lists of recordings; print what is in them."""
    root = Path(source) / "wav"
    if not root.parent.is_dir():
        raise FileNotFoundError(f"{source}: no such folder")
    if not root.is_dir():
        raise FileNotFoundError(
            f"{source}: it must hold wav/<speaker>/<session>/<utterance>, and has no wav/"
        )
    counts = {"dev": dev, "test": test}
    names = ("speakers", "recordings")
    divided_trials(root, output, counts, max_per_person, seed, names, overwrite)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="folder with wav/")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write the lists to")
    parser.add_argument("--dev", type=int, default=20, help="number of speakers in dev.txt")
    parser.add_argument("--test", type=int, default=20, help="number of speakers in test.txt")
    parser.add_argument("--max_per_person", type=int, default=10, help="recordings taken of a "
                        "speaker, at most")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of the division")
    add_overwrite(parser)
    args = vars(parser.parse_args(argv))
    return status_of("make_trials.py", lambda: make_trials(**args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
