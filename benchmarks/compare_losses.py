"""Compare the losses on real data: one recipe, several seeds, tables and pictures.

    python benchmarks/compare_losses.py speech --models ecapa resnet34 --output OUT -- \
        --data_folder=DIR --verification_file=DIR/trials_test.txt \
        --train_speakers=DIR/train_speakers.txt

Every run is the recipe with ``--size small`` (options after ``--`` go to it) and another model,
loss or seed; nothing else changes. Finished runs are kept: started again, it continues.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from speechbrain_qmargin.files import write_text
from speechbrain_qmargin.scoring.plots import plot_det
from speechbrain_qmargin.scoring.report import evaluate
from speechbrain_qmargin.scoring.trials import read_scores

ROOT = Path(__file__).resolve().parent.parent
RECIPES = {
    "speech": ("recipes/voxceleb/train.py", "hparams/qmargin.yaml"),
    "face": ("recipes/face/train.py", "hparams/face_qmargin.yaml"),
}
LOSSES = ["arcface", "cosface", "entmax", "sparsemax", "qmargin"]
FIGURES = {"EER": "EER", "TAR@1e-2": "TAR@FAR=0.01", "TAR@1e-3": "TAR@FAR=0.001"}


def train(recipe: str, options: list[str], folder: Path) -> dict:
    """One run in a process of its own, one thread, unless it is already done; its results."""
    if not (folder / "results.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        script, hparams = (str(ROOT / path) for path in RECIPES[recipe])
        command = [sys.executable, script, hparams, "--size=small", "--noprogressbar", *options]
        with (folder / "output.log").open("ab") as log:
            subprocess.run(
                [*command, f"--output_folder={folder}"],
                check=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
            )
    return json.loads((folder / "results.json").read_text())


def train_all(recipe: str, runs: dict, given: list[str], jobs: int) -> dict:
    """Results by key of {key: (options, folder)}; `given` are options of every run."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = {
            key: pool.submit(train, recipe, [*options, *given], folder)
            for key, (options, folder) in runs.items()
        }
        return {key: future.result() for key, future in tqdm(futures.items(), "runs")}


def systems_of(result: dict) -> dict:
    """The reports of the run's only list, by system."""
    (systems,) = result["lists"].values()
    return systems


def spread(values) -> str:
    values = 100 * np.asarray(values)
    return f"{values.mean():.2f}" + (f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else "")


def table(args, results: dict) -> str:
    """A row for every model, loss and treatment of the scores."""
    systems = list(systems_of(next(iter(results.values()))))
    heads = ["model", "loss", "scores", *(f"{name}, %" for name in FIGURES)]
    heads += ["support", "at zero loss, %", "minutes"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for model, loss, system in itertools.product(args.models, LOSSES, systems):
        runs = [results[model, loss, seed] for seed in range(args.seeds)]
        found = [systems_of(run)[system]["figures"] for run in runs]
        cells = [model, loss, system]
        cells += [spread([f[figure]["value"] for f in found]) for figure in FIGURES.values()]
        last = [run["last_epoch"] for run in runs]
        sparse = "support_mean" in last[0]
        cells.append(f"{np.mean([e['support_mean'] for e in last]):.1f}" if sparse else "all")
        cells.append(f"{100 * np.mean([e['zero_loss'] for e in last]):.0f}" if sparse else "0")
        cells.append(f"{np.mean([run['seconds'] for run in runs]) / 60:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def scores_file(folder: Path, system: str) -> Path:
    (found,) = (folder / "scores").glob(f"*/{system}.tsv")
    return found


def differences(args, runs: dict, system: str) -> str:
    """Q-Margin minus each baseline: the seeds' mean, bootstrapped over speakers in pairs.

    All systems see the same draws of speakers, so the interval is of the speakers' sampling; the
    seeds' own spread stands beside it.
    """
    heads = ["model", "baseline", *(f"{name}, points" for name in FIGURES)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for model in args.models:
        values, replicates = {}, {}
        for loss, seed in itertools.product(LOSSES, range(args.seeds)):
            trials, scores = read_scores(scores_file(runs[model, loss, seed][1], system))
            report = evaluate(scores, trials, fars=(1e-2, 1e-3))
            names = [figure.name for figure in report.figures]
            at = [names.index(figure) for figure in FIGURES.values()]
            values[loss, seed] = np.array([report.figures[i].value for i in at])
            replicates[loss, seed] = report.replicates[at]
        for baseline in LOSSES[:-1]:
            cells = [model, baseline]
            value, spread_of_seeds, draws = (
                of(
                    [each["qmargin", seed] - each[baseline, seed] for seed in range(args.seeds)],
                    axis=0,
                )
                for of, each in ((np.mean, values), (np.std, values), (np.mean, replicates))
            )
            low, high = np.percentile(draws, [2.5, 97.5], axis=1)
            for i in range(len(FIGURES)):
                cells.append(
                    f"{100 * value[i]:+.2f} ({100 * low[i]:+.2f} to {100 * high[i]:+.2f}; "
                    f"seeds ± {100 * spread_of_seeds[i]:.2f})"
                )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def compare(args) -> None:
    runs = {}
    for seed, model, loss in itertools.product(range(args.seeds), args.models, LOSSES):
        options = [f"--model={model}", f"--loss={loss}", f"--seed={seed}"]
        runs[model, loss, seed] = (options, args.output / f"{model}_{loss}_{seed}")
    results = train_all(args.recipe, runs, args.options, args.jobs)
    systems = list(systems_of(next(iter(results.values()))))
    text = table(args, results)
    for system in systems:
        text += f"\nQ-Margin minus the baseline, {system}:\n\n" + differences(args, runs, system)
    write_text(args.output / "table.md", text)
    print(text)
    for model in args.models:
        drawn = {}
        for loss in LOSSES:
            trials, scores = read_scores(scores_file(runs[model, loss, 0][1], "cosine"))
            drawn[loss] = (scores, trials.is_target)
        plot_det(drawn, args.output / f"det_{model}.png", f"{model}, seed 0")


def recipe_options() -> tuple[list[str], list[str]]:
    """The command line before and after ``--``."""
    argv = sys.argv[1:]
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def main() -> None:
    argv, options = recipe_options()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args(argv)
    args.options = options
    compare(args)


if __name__ == "__main__":
    main()
