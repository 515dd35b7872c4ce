"""Compare the losses on real data: one recipe, several seeds, tables and pictures.

    python benchmarks/compare_losses.py speech --models ecapa resnet34 --output OUT -- \
        --data_folder=DIR --verification_file=DIR/trials_test.txt \
        --train_speakers=DIR/train_speakers.txt

Every run is the recipe with ``--size small`` (options after ``--`` go to it) and another model,
loss or seed; nothing else changes. Finished runs are kept: started again, it continues. With other
options it is refused: they belong to another comparison, in a folder of its own.

A loss is a name of docs/losses.md or module:Class, with what the recipe is to be told beside it:

    --losses qmargin adaface 'arcface --subcentres=3' \
        'cosface --head=partial --class_sample_rate=0.3' \
        "elasticface --loss_options='{kind: cos}'"
"""

import argparse
import itertools
import re
import shlex
from pathlib import Path

import numpy as np
from recipe_runs import (
    FIGURES,
    RECIPES,
    difference_cells,
    figure_cells,
    figures_of,
    folded_accuracy,
    markdown,
    recipe_options,
    scored,
    spread,
    train_all,
)
from tqdm import tqdm

from speechbrain_qmargin.files import write_text
from speechbrain_qmargin.loss.registry import loss_class
from speechbrain_qmargin.scoring.metrics import operating_points
from speechbrain_qmargin.scoring.plots import pooled_det_figure, save_figure
from speechbrain_qmargin.scoring.uncertainty import Spread

COMPARED = ["arcface", "cosface", "entmax", "sparsemax", "qmargin"]
ACCURACY = "accuracy of balanced pairs"


def loss_options(system: str) -> list[str]:
    """The recipe's options for a loss as it is given on the command line.

    >>> loss_options("arcface --subcentres=3")
    ['--loss=arcface', '--subcentres=3']
    """
    name, *options = shlex.split(system)
    return [f"--loss={name}", *options]


def checked_loss(system: str) -> str:
    """`system` itself, once its loss is found."""
    try:
        loss_class(shlex.split(system)[0])
    except (ValueError, IndexError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return system


def folder_name(system: str) -> str:
    """Of its runs.

    >>> folder_name("arcface --subcentres=3"), folder_name("qmargin")
    ('arcface_subcentres=3', 'qmargin')
    """
    return re.sub(r"[^\w.=-]+-*", "_", system).strip("_")


def systems_of(result: dict) -> dict:
    """The reports of the run's only list, by system."""
    (systems,) = result["lists"].values()
    return systems


def scores_file(folder: Path, system: str) -> Path:
    (found,) = (folder / "scores").glob(f"*/{system}.tsv")
    return found


def balanced_accuracy(file: Path) -> float:
    """As of the field's pair sets: all target pairs and as many impostor pairs, in ten folds.

    The impostor pairs and the folds are drawn at random, the same for every run.
    """
    trials, scores = scored(file)
    return folded_accuracy(scores, trials.is_target)


def measured(args, folders: dict, system: str) -> dict:
    """:func:`figures_of` every (model, loss, seed)."""
    keys = itertools.product(args.models, args.losses, range(args.seeds))
    return {key: figures_of(scores_file(folders[key], system)) for key in tqdm([*keys], system)}


def table(args, results: dict, folders: dict, found: dict) -> str:
    """A row for every model, loss and treatment of the scores."""
    heads = ["model", "loss", "scores", *(f"{name}, %" for name in FIGURES)]
    heads += [f"{ACCURACY}, %"] if args.recipe == "face" else []
    heads += ["support", "at zero loss, %", "minutes"]
    lines = []
    for model, loss, system in itertools.product(args.models, args.losses, found):
        keys = [(model, loss, seed) for seed in range(args.seeds)]
        cells = [model, loss, system, *figure_cells([found[system][key] for key in keys])]
        if args.recipe == "face":
            files = [scores_file(folders[key], system) for key in keys]
            cells.append(spread([balanced_accuracy(file) for file in files]))
        last = [results[key]["last_epoch"] for key in keys]
        sparse = "support_mean" in last[0]
        cells.append(f"{np.mean([e['support_mean'] for e in last]):.1f}" if sparse else "all")
        cells.append(f"{100 * np.mean([e['zero_loss'] for e in last]):.0f}" if sparse else "0")
        cells.append(f"{np.mean([results[key]['seconds'] for key in keys]) / 60:.1f}")
        lines.append(cells)
    return markdown(heads, lines)


def differences(args, found: dict) -> str:
    """Q-Margin minus each baseline."""
    heads = ["model", "baseline", *(f"{name}, points" for name in FIGURES)]
    baselines = [loss for loss in args.losses if loss != "qmargin"]
    lines = []
    for model, baseline in itertools.product(args.models, baselines):
        pairs = [
            (found[model, "qmargin", seed], found[model, baseline, seed])
            for seed in range(args.seeds)
        ]
        lines.append([model, baseline, *difference_cells(pairs)])
    return markdown(heads, lines)


def compare(args) -> None:
    runs = {}
    for seed in range(args.seeds):
        for model, loss in itertools.product(args.models, args.losses):
            options = [f"--model={model}", *loss_options(loss), f"--seed={seed}"]
            folder = args.output / f"{model}_{folder_name(loss)}_{seed}"
            runs[model, loss, seed] = options, folder
    results = train_all(args.recipe, runs, args.options, args.jobs)
    folders = {key: folder for key, (_, folder) in runs.items()}
    systems = list(systems_of(next(iter(results.values()))))
    found = {system: measured(args, folders, system) for system in systems}
    text = table(args, results, folders, found)
    for system in systems if len(args.losses) > 1 and "qmargin" in args.losses else ():
        text += f"\nQ-Margin minus the baseline, {system}:\n\n" + differences(args, found[system])
    write_text(args.output / "table.md", text)
    print(text)
    for model in args.models:
        drawn = {}
        for loss in args.losses:
            drawn[loss] = []
            for seed in range(args.seeds):
                trials, scores = scored(scores_file(folders[model, loss, seed], "cosine"))
                points = operating_points(scores, trials.is_target)
                drawn[loss].append((points, Spread(scores, trials, points)))
        title = f"{model}, mean of {args.seeds} seeds"
        save_figure(pooled_det_figure(drawn, title), args.output / f"det_{model}.png")


def main() -> None:
    argv, options = recipe_options()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--losses", nargs="+", type=checked_loss, default=COMPARED)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args(argv)
    args.options = options
    compare(args)


if __name__ == "__main__":
    main()
