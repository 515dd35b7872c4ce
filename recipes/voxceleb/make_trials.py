"""Trial lists from a folder of recordings, to choose a threshold on and to measure it.

    python recipes/voxceleb/make_trials.py DATA_FOLDER OUT_FOLDER

DATA_FOLDER has wav/<speaker>/<session>/<utterance>. Its speakers are drawn into three parts that
share none: those of dev.txt, on which to validate and to choose a threshold; those of test.txt, on
which to measure it; and the others, to train on or for a cohort. Every pair of the chosen
recordings is a trial, but two of one speaker only if they are of different sessions, wherever the
speaker has several. For extract.py, trial_recordings.txt lists the recordings of the trials, and
train_recordings.txt those of the others.
"""

import argparse
import sys
from collections import defaultdict
from glob import glob
from pathlib import Path

import numpy as np

from speechbrain_qmargin.cli import status_of
from speechbrain_qmargin.data.audio import AUDIO_SUFFIXES
from speechbrain_qmargin.files import write_text
from speechbrain_qmargin.scoring.pairing import every_pair, spread_over_sessions
from speechbrain_qmargin.trials import speaker_in, write_trials


def recordings_by_speaker(data_folder: Path) -> dict[str, list[str]]:
    root = data_folder / "wav"
    if not root.is_dir():
        raise FileNotFoundError(f"{root} does not exist; it holds <speaker>/<session>/<utterance>")
    found = defaultdict(list)
    for file in sorted(glob("**/*", root_dir=root, recursive=True)):  # links are followed
        name = Path(file).as_posix()
        if not name.lower().endswith(AUDIO_SUFFIXES):
            continue
        if any(letter in name for letter in "\t\n\r"):
            raise ValueError(f"{root / name!r}: rename it; a list cannot hold tabs and line breaks")
        if "/" not in name:
            raise ValueError(
                f"{root / name} is in no speaker's folder: {root}/<speaker>/<session>/..."
            )
        found[speaker_in(name)].append(name)
    return found


def make_trials(data_folder, out_folder, dev_speakers, test_speakers, utterances=10, seed=0):
    """Write the two trial lists and the two lists of recordings; print what is in them."""
    data_folder, out_folder = Path(data_folder), Path(out_folder)
    found = recordings_by_speaker(data_folder)
    # with a single recording a speaker has no target trial, but can be trained on
    able = sorted(speaker for speaker, names in found.items() if len(names) > 1)
    if min(dev_speakers, test_speakers) < 2 or dev_speakers + test_speakers > len(able):
        raise ValueError(
            f"{data_folder}: {len(able)} speakers have two recordings or more; dev_speakers "
            f"{dev_speakers} and test_speakers {test_speakers} must be 2 at least, and no more "
            "than that together"
        )
    drawn = [able[i] for i in np.random.default_rng(seed).permutation(len(able))]
    recordings = {"trial": [], "train": []}
    for part, speakers in (
        ("dev", drawn[:dev_speakers]),
        ("test", drawn[dev_speakers:][:test_speakers]),
    ):
        chosen = {
            name: spread_over_sessions(found.pop(name), utterances) for name in sorted(speakers)
        }
        recordings["trial"] += [name for names in chosen.values() for name in names]
        trials = every_pair(chosen)
        targets = int(np.count_nonzero(trials.is_target))
        write_trials(out_folder / f"{part}.txt", trials)
        print(
            f"{out_folder / part}.txt: {len(speakers)} speakers, {targets:,} target and "
            f"{len(trials) - targets:,} impostor trials"
        )
    recordings["train"] = [name for names in found.values() for name in names]
    for part, names in recordings.items():
        file = out_folder / f"{part}_recordings.txt"
        write_text(file, "".join(f"{name}\t{data_folder / 'wav' / name}\n" for name in names))
        print(
            f"{file}: {len(names):,} recordings of {len({speaker_in(n) for n in names})} speakers"
        )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data_folder")
    parser.add_argument("out_folder")
    parser.add_argument("--dev_speakers", type=int, default=20)
    parser.add_argument("--test_speakers", type=int, default=20)
    parser.add_argument("--utterances", type=int, default=10, help="of a speaker, at most")
    parser.add_argument("--seed", type=int, default=0)
    args = vars(parser.parse_args(argv))
    return status_of("make_trials.py", lambda: make_trials(**args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
