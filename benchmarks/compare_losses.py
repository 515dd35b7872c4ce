"""Compare the losses on real data: one recipe, several seeds, tables and pictures.

    python benchmarks/compare_losses.py speech --models ecapa resnet34 --output OUT -- \
        --data_folder=DIR --verification_file=DIR/trials_test.txt \
        --train_speakers=DIR/train_speakers.txt
    python benchmarks/compare_losses.py speech --models ecapa --plane --output OUT -- ...

Every run is the recipe with ``--size small`` (options after ``--`` go to it) and another model,
loss or seed; nothing else changes. Finished runs are kept: started again, it continues.
``--plane`` trains Q-Margin over alpha, scale and margin instead, and draws EER and TAR@FAR=1e-2
over the plane with the hard margin in every cell.
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

from speechbrain_qmargin import hard_margin
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
ALPHAS, SCALES = [1.25, 1.5, 1.75, 2.0], [5, 10, 20, 32]
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


def train_all(args, runs: dict) -> dict:
    """Results by key of {key: (options, folder)}."""
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {
            key: pool.submit(train, args.recipe, [*options, *args.options], folder)
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
    results = train_all(args, runs)
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


def plane(args) -> None:
    """One seed at every point of alpha x scale x margin; the mean over seeds where there are."""
    (model,) = args.models
    points = list(itertools.product(ALPHAS, SCALES, args.margins))
    runs = {}
    for seed, (alpha, scale, margin) in itertools.product(range(args.seeds), points):
        options = [f"--model={model}", "--loss=qmargin", f"--seed={seed}"]
        options += [f"--alpha={alpha}", f"--scale={scale}", f"--margin={margin}"]
        runs[alpha, scale, margin, seed] = (
            options,
            args.output / f"{alpha}_{scale}_{margin}_{seed}",
        )
    results = train_all(args, runs)
    figures = {"EER, %": "EER", "TAR@FAR=1e-2, %": "TAR@FAR=0.01"}
    heads = ["alpha", "s", "m", "hard margin", *figures]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    values = {}
    for point in points:
        found = [results[(*point, seed)]["figures"] for seed in range(args.seeds)]
        cells = [f"{value:g}" for value in point] + [f"{hard_margin(*point):.2f}"]
        for figure in figures.values():
            values[(*point, figure)] = 100 * np.mean([f[figure]["value"] for f in found])
            cells.append(spread([f[figure]["value"] for f in found]))
        lines.append("| " + " | ".join(cells) + " |")
    write_text(args.output / "plane.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    draw_plane(values, figures, args.margins, args.output / "plane.png")


def draw_plane(values: dict, figures: dict, margins: list[float], file: Path) -> None:
    """A heat map of every figure and margin over alpha and scale, hard margins in the cells."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(margins), 3.2 * len(figures)), layout="constrained")
    axes = figure.subplots(len(figures), len(margins), sharex=True, sharey=True, squeeze=False)
    for row, (title, name) in zip(axes, figures.items(), strict=True):
        every = [values[(a, s, m, name)] for a in ALPHAS for s in SCALES for m in margins]
        best = min(every) if name == "EER" else max(every)
        for axis, margin in zip(row, margins, strict=True):
            grid = np.array([[values[(a, s, margin, name)] for a in ALPHAS] for s in SCALES])
            colours = "viridis_r" if name == "EER" else "viridis"
            image = axis.imshow(
                grid, origin="lower", cmap=colours, vmin=min(every), vmax=max(every), aspect="auto"
            )
            for (i, s), (j, a) in itertools.product(enumerate(SCALES), enumerate(ALPHAS)):
                value = grid[i, j]
                weight = "bold" if value == best else "normal"
                text = f"{value:.1f}\nh {hard_margin(a, s, margin):.2f}"
                axis.text(
                    j, i, text, ha="center", va="center", fontsize=7, color="white", weight=weight
                )
            axis.set_xticks(range(len(ALPHAS)), [f"{a:g}" for a in ALPHAS])
            axis.set_yticks(range(len(SCALES)), [f"{s:g}" for s in SCALES])
            axis.set_title(f"{title}, m = {margin:g}", fontsize=9)
        row[0].set_ylabel("scale s")
        figure.colorbar(image, ax=list(row))
    for axis in axes[-1]:
        axis.set_xlabel("alpha")
    figure.suptitle("h: hard margin in cosine; bold: best", fontsize=9)
    figure.savefig(file, dpi=150)


def main() -> None:
    argv = sys.argv[1:]
    options = argv[argv.index("--") + 1 :] if "--" in argv else []
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=None, help="5; 1 with --plane")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--plane", action="store_true", help="alpha x scale x margin instead")
    parser.add_argument("--margins", nargs="+", type=float, default=[0.1, 0.2, 0.3])
    args = parser.parse_args(argv[: argv.index("--")] if "--" in argv else argv)
    args.options, args.seeds = options, args.seeds or (1 if args.plane else 5)
    (plane if args.plane else compare)(args)


if __name__ == "__main__":
    main()
