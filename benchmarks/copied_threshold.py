"""What a threshold of other people's recordings does to one's own.

    python benchmarks/copied_threshold.py ENCODER NAME=SOURCE [NAME=SOURCE ...] [--far 0.01]

On each set of people a threshold is measured as `qmargin threshold` does. Then every threshold, and
SpeechBrain's 0.25, decides on all pairs of every set: the share of target trials
rejected and of impostor trials accepted.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from speechbrain_qmargin.embeddings import cosine_scores
from speechbrain_qmargin.export.recordings import find_recordings
from speechbrain_qmargin.scoring.metrics import operating_points
from speechbrain_qmargin.scoring.pairing import every_pair
from speechbrain_qmargin.trials import speaker_in
from speechbrain_qmargin.verify.threshold import embed_files, measure_threshold
from speechbrain_qmargin.verify.verifier import load_reader


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("encoder")
    parser.add_argument("people", nargs="+", metavar="NAME=SOURCE")
    parser.add_argument("--far", type=float, default=0.01)
    args = parser.parse_args()
    reader = load_reader(args.encoder)
    thresholds, sets = {"SpeechBrain's": 0.25}, {}
    with tempfile.TemporaryDirectory() as folder:
        for given in args.people:
            name, _, place = given.partition("=")
            files = find_recordings(place)
            embeddings, faults = embed_files(reader, files, Path(folder) / name)
            found = measure_threshold(embeddings, reader.digest, args.far, source=name)
            print(f"{name}: {len(embeddings)} files and {len(faults)} refused; threshold "
                  f"{found.system.point.threshold:.4f} {found.system.point.promise()}")  # fmt: skip
            thresholds[f"of {name}"] = found.system.point.threshold
            people: dict[str, list[str]] = {}
            for one in embeddings.ids:
                people.setdefault(speaker_in(one), []).append(one)
            trials = every_pair({who: ids for who, ids in people.items() if len(ids) > 1})
            sets[name] = operating_points(
                cosine_scores(embeddings, trials).astype(np.float64), trials.is_target
            )
    print("\nthreshold | people | target trials rejected | impostor trials accepted")
    for source, threshold in thresholds.items():
        for name, points in sets.items():
            misses, accepts = points.errors_at(threshold)
            rejected, accepted = misses / points.num_targets, accepts / points.num_impostors
            row = f"{source} {threshold:.4f} | {name} | {100 * rejected:.1f} %"
            print(f"{row} | {100 * accepted:.2f} %")


if __name__ == "__main__":
    main()
