"""Compare the losses on real speech: one recipe, several seeds, one table, one DET picture.

    python benchmarks/speech_losses.py --data_folder DIR --verification_file DIR/trials_test.txt \
        --train_speakers DIR/train_speakers.txt --output results/speech_losses

Every run is ``recipes/voxceleb/train.py hparams/qmargin.yaml --size small`` with another loss or
seed and nothing else changed. Finished runs are kept: started again, it continues.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from speechbrain_qmargin import hard_margin, make_loss
from speechbrain_qmargin.scoring.report import plot_det
from speechbrain_qmargin.scoring.trials import read_scores

ROOT = Path(__file__).resolve().parent.parent
LOSSES = ["arcface", "cosface", "entmax", "sparsemax", "qmargin"]
# alpha, scale of Q-Margin around the paper's settings for speech; its margin, 0.2, throughout
SWEEP = [(1.25, 32), (1.75, 5), (2.0, 5)]
FIGURES = {"EER": "EER", "TAR@1e-2": "TAR@FAR=0.01", "TAR@1e-3": "TAR@FAR=0.001"}


def train(options: list[str], folder: Path, threads: int) -> dict:
    """One run in a process of its own, unless it is already done; returns its results."""
    if not (folder / "results.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(ROOT / "recipes/voxceleb/train.py")]
        command += [str(ROOT / "hparams/qmargin.yaml"), *options, f"--output_folder={folder}"]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        with (folder / "output.log").open("ab") as log:
            subprocess.run(command, check=True, env=environment, stdout=log, stderr=log)
    return json.loads((folder / "results.json").read_text())


def row(name: str, runs: list[dict]) -> str:
    cells = [name]
    for figure in FIGURES.values():
        values = 100 * np.array([run["figures"][figure]["value"] for run in runs])
        spread = f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else ""
        cells.append(f"{values.mean():.2f}{spread}")
    last = [run["last_epoch"] for run in runs]
    if "support_mean" in last[0]:
        cells.append(f"{np.mean([epoch['support_mean'] for epoch in last]):.1f}")
        cells.append(f"{100 * np.mean([epoch['zero_loss'] for epoch in last]):.0f}")
    else:
        cells += ["all", "0"]
    cells.append(f"{np.mean([run['seconds'] for run in runs]) / 60:.1f}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data_folder", required=True)
    parser.add_argument("--verification_file", required=True)
    parser.add_argument("--train_speakers")
    parser.add_argument("--output", type=Path, default=Path("results/speech_losses"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--no_sweep", action="store_true")
    args = parser.parse_args()

    common = ["--size=small", f"--data_folder={args.data_folder}", "--num_valid_speakers=0"]
    common += [f"--verification_file={args.verification_file}", "--noprogressbar"]
    if args.train_speakers:
        common.append(f"--train_speakers={args.train_speakers}")
    runs: dict[tuple, tuple[list[str], Path]] = {}
    for seed in range(args.seeds):
        for loss in LOSSES:
            options = [*common, f"--loss={loss}", f"--seed={seed}"]
            runs[loss, seed] = (options, args.output / f"{loss}_{seed}")
    for alpha, scale in [] if args.no_sweep else SWEEP:
        options = [*common, "--loss=qmargin", f"--alpha={alpha}", f"--scale={scale}", "--seed=0"]
        runs[alpha, scale] = (options, args.output / f"qmargin_{alpha}_{scale}")
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {key: pool.submit(train, *run, 1) for key, run in runs.items()}
        results = {key: future.result() for key, future in tqdm(futures.items(), "runs")}

    heads = ["", *(f"{name}, %" for name in FIGURES), "support", "at zero loss, %", "minutes"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += [row(loss, [results[loss, seed] for seed in range(args.seeds)]) for loss in LOSSES]
    for alpha, scale in [] if args.no_sweep else SWEEP:
        margin = make_loss("qmargin").margin
        name = f"alpha {alpha:g}, s {scale:g}: hard margin {hard_margin(alpha, scale, margin):.2f}"
        lines.append(row(name, [results[alpha, scale]]))
    table = "\n".join(lines) + "\n"
    (args.output / "table.md").write_text(table)
    print(table)

    systems = {}
    for loss in LOSSES:
        trials, scores = read_scores(runs[loss, 0][1] / "scores/trials_test/cosine.tsv")
        systems[loss] = (scores, trials.is_target)
    plot_det(systems, args.output / "det.png", "seed 0")


if __name__ == "__main__":
    main()
