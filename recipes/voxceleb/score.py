"""Score trial lists from one set of embeddings, with intervals over speakers.

    python recipes/voxceleb/score.py hparams/score.yaml --embeddings FILE --trials "[O, E, H]"

Per list: cosine; normalised against a cohort, if there is one; calibrated on a development list, if
there is one. Scores (unrounded), figures and DET plots go to the output folder. ``qmargin score``
does the same without a YAML.
"""

import sys

from speechbrain_qmargin.cli import status_of
from speechbrain_qmargin.cli.recipe import end_early
from speechbrain_qmargin.scoring.lists import score_files
from speechbrain_qmargin.training.config import load_experiment


def main(argv):
    settings = load_experiment(argv).settings
    for key in ("embeddings", "trials"):
        if not settings[key]:
            raise ValueError(f"{key}: give it, as --{key}=... or in {argv[0]}")
    score_files(**settings)


if __name__ == "__main__":
    end_early(__doc__, sys.argv[1:])
    sys.exit(status_of("score.py", lambda: main(sys.argv[1:])))
