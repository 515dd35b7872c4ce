"""Where over alpha, scale and margin Q-Margin is best, and whether the number of classes moves it.

    python benchmarks/plane.py run OUT [--margins 0.1 0.2 0.3] [--seeds 1] -- \
        --data_folder=DIR --verification_file=DIR/trials_test.txt
    python benchmarks/plane.py classes OUT OUT10 OUT90 --picture classes.png

``run`` trains ``recipes/voxceleb/train.py --size small`` at every point (options after ``--`` go to
it; finished points are kept, started again it continues) and draws EER and TAR@FAR=1e-2 over the
plane, the hard margin exp((alpha - 1) s m) / ((alpha - 1) s) in every cell. ``classes`` sets
finished planes beside each other, by their number of classes.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from recipe_runs import markdown, recipe_options, spread, train_all

from speechbrain_qmargin import hard_margin
from speechbrain_qmargin.files import write_text
from speechbrain_qmargin.scoring.figures import EqualErrorRate, Measure, TarAtFar

ALPHAS, SCALES = [1.25, 1.5, 1.75, 2.0], [5, 10, 20, 32]
FIGURES = {"EER, %": EqualErrorRate(), "TAR@FAR=1e-2, %": TarAtFar(1e-2)}


def run(args, options: list[str]) -> None:
    points = list(itertools.product(ALPHAS, SCALES, args.margins))
    runs = {}
    for seed, (alpha, scale, margin) in itertools.product(range(args.seeds), points):
        point = [f"--alpha={alpha}", f"--scale={scale}", f"--margin={margin}"]
        runs[alpha, scale, margin, seed] = (
            [f"--model={args.model}", "--loss=qmargin", f"--seed={seed}", *point],
            args.output / f"{alpha}_{scale}_{margin}_{seed}",
        )
    train_all("speech", runs, options, args.jobs)
    planes, _ = read_plane(args.output)
    lines = []
    for point in points:
        cells = [f"{value:g}" for value in point] + [f"{hard_margin(*point):.2f}"]
        lines.append([*cells, *(spread(planes[figure][point]) for figure in FIGURES.values())])
    text = markdown(["alpha", "s", "m", "hard margin", *FIGURES], lines)
    text += "\n" + by_hard_margin(planes)
    write_text(args.output / "plane.md", text)
    print(text, end="")
    draw_plane(planes, args.margins, args.output / "plane.png")


def read_plane(folder: Path) -> tuple[dict, int]:
    """{figure: {(alpha, s, m): values of the seeds}} and the number of classes."""
    planes: dict = {figure: {} for figure in FIGURES.values()}
    classes = set()
    for file in sorted(folder.glob("*/results.json")):
        results = json.loads(file.read_text())
        settings = results["settings"]
        point = tuple(settings[key] for key in ("alpha", "scale", "margin"))
        classes.add(settings["out_n_neurons"])
        for figure, values in planes.items():
            values.setdefault(point, []).append(results["figures"][figure.name]["value"])
    if len(classes) != 1:
        raise SystemExit(f"{folder}: finished runs of one number of classes wanted, got {classes}")
    return planes, classes.pop()


def by_hard_margin(planes: dict) -> str:
    """The points by their hard margin: mean and standard error of each range."""
    lines = []
    for low, high in itertools.pairwise([0, 0.4, 1, 2, np.inf]):
        points = [p for p in next(iter(planes.values())) if low <= hard_margin(*p) < high]
        cells = [f"{low:g} to {high:g}", str(len(points))]
        for figure in FIGURES.values():
            values = [100 * np.mean(planes[figure][point]) for point in points]
            if len(values) > 1:
                error = np.std(values, ddof=1) / len(values) ** 0.5
                cells.append(f"{np.mean(values):.2f} ± {error:.2f}")
            else:
                cells.append("")
        lines.append(cells)
    return markdown(["hard margin", "points", *FIGURES], lines)


def best_of(figure: Measure, values) -> float:
    return max(values) if figure.higher_is_better else min(values)


def draw_plane(planes: dict, margins: list[float], file: Path) -> None:
    """A heat map of every figure and margin over alpha and scale, hard margins in the cells."""
    figure = Figure(figsize=(3.4 * len(margins), 3.2 * len(FIGURES)), layout="constrained")
    axes = figure.subplots(len(FIGURES), len(margins), sharex=True, sharey=True, squeeze=False)
    for row, (title, measure) in zip(axes, FIGURES.items(), strict=True):
        means = {point: 100 * np.mean(values) for point, values in planes[measure].items()}
        best = best_of(measure, means.values())
        for axis, margin in zip(row, margins, strict=True):
            grid = np.array([[means[a, s, margin] for a in ALPHAS] for s in SCALES])
            image = axis.imshow(
                grid,
                origin="lower",
                cmap="viridis" if measure.higher_is_better else "viridis_r",
                vmin=min(means.values()),
                vmax=max(means.values()),
                aspect="auto",
            )
            for (i, s), (j, a) in itertools.product(enumerate(SCALES), enumerate(ALPHAS)):
                axis.text(
                    j,
                    i,
                    f"{grid[i, j]:.1f}\nh {hard_margin(a, s, margin):.2f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white",
                    weight="bold" if grid[i, j] == best else "normal",
                    bbox={"facecolor": "black", "alpha": 0.35, "linewidth": 0, "pad": 1},
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


def classes(args) -> None:
    """Mean over the scales and the best scale at every alpha for every number of classes."""
    found = sorted((read_plane(folder) for folder in args.planes), key=lambda plane: plane[1])
    # at the points that all have
    shared = set.intersection(*({*next(iter(plane.values()))} for plane, _ in found))
    figure = Figure(figsize=(4.2 * len(FIGURES), 3.4), layout="constrained")
    axes = figure.subplots(1, len(FIGURES))
    heads = ["figure", "classes", *(f"alpha {alpha:g}" for alpha in ALPHAS)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for axis, (title, measure) in zip(axes, FIGURES.items(), strict=True):
        for plane, number in found:
            cells, line = [title, str(number)], []
            for alpha in ALPHAS:
                means = {p: 100 * np.mean(plane[measure][p]) for p in shared if p[0] == alpha}
                best = best_of(measure, means.values())
                at = next(point for point, value in means.items() if value == best)
                mean = np.mean(list(means.values()))
                cells.append(f"{mean:.1f}; {best:.1f} (s {at[1]:g}, h {hard_margin(*at):.2f})")
                line.append(mean)
            lines.append("| " + " | ".join(cells) + " |")
            (drawn,) = axis.plot(ALPHAS, line, "o-", label=f"{number} classes")
            at = line.index(best_of(measure, line))
            axis.plot(ALPHAS[at], line[at], "*", markersize=15, color=drawn.get_color())
        axis.set(title=f"{title}, mean over the scales", xlabel="alpha", xticks=ALPHAS)
    axes[0].legend()
    figure.savefig(args.picture, dpi=150)
    print("\n".join(lines))


def main() -> None:
    argv, options = recipe_options()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("output", type=Path)
    runs.add_argument("--model", default="ecapa")
    runs.add_argument("--margins", nargs="+", type=float, default=[0.1, 0.2, 0.3])
    runs.add_argument("--seeds", type=int, default=1)
    runs.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    beside = commands.add_parser("classes")
    beside.add_argument("planes", type=Path, nargs="+")
    beside.add_argument("--picture", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.command == "run":
        run(args, options)
    else:
        classes(args)


if __name__ == "__main__":
    main()
