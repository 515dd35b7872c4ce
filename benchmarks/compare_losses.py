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
import functools
import itertools
import json
import operator
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from ruamel.yaml import YAML
from tqdm import tqdm

from speechbrain_qmargin.faces.pair_sets import ten_fold_accuracy
from speechbrain_qmargin.files import write_text
from speechbrain_qmargin.loss.registry import loss_class
from speechbrain_qmargin.scoring.figures import EqualErrorRate, Measure, TarAtFar
from speechbrain_qmargin.scoring.influence import Influence
from speechbrain_qmargin.scoring.metrics import operating_points
from speechbrain_qmargin.scoring.plots import pooled_det_figure, save_figure
from speechbrain_qmargin.scoring.report import evaluate
from speechbrain_qmargin.scoring.score_files import read_scores
from speechbrain_qmargin.scoring.uncertainty import Spread
from speechbrain_qmargin.trials import LabelledTrials

ROOT = Path(__file__).resolve().parent.parent
RECIPES = {
    "speech": ("recipes/voxceleb/train.py", "hparams/qmargin.yaml"),
    "face": ("recipes/face/train.py", "hparams/face_qmargin.yaml"),
}
COMPARED = ["arcface", "cosface", "entmax", "sparsemax", "qmargin"]
ACCURACY = "accuracy of balanced pairs"
FIGURES = {"EER": EqualErrorRate(), "TAR@1e-2": TarAtFar(1e-2), "TAR@1e-3": TarAtFar(1e-3)}


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


def last_of_each(options: Sequence[str]) -> list[str]:
    """Options of which a later one replaces an earlier one; the recipes take each once.

    >>> last_of_each(["--lr=0.1", "--seed", "1", "--lr=0.01", "--noprogressbar"])
    ['--lr=0.01', '--seed', '1', '--noprogressbar']
    """
    given: dict[str, list[str]] = {}
    name = ""
    for word in options:
        if word.startswith("--"):
            name = word.partition("=")[0]
            given[name] = []
        given.setdefault(name, []).append(word)
    return [word for words in given.values() for word in words]


def other_settings(options: Sequence[str], results: Mapping) -> list[str]:
    """Options that are not those of finished results; paths, which may be moved, are not compared.

    >>> done = {"settings": {"lr": 0.1, "speeds": [1.0], "train_speakers": "a/b.txt"}}
    >>> other_settings(["--lr=0.10", "--speeds", "[1.0", "]", "--train_speakers=c/b.txt"], done)
    []
    >>> other_settings(["--lr=0.2", "--speeds=[1.0, 0.9]", "--noprogressbar"], done)
    ['--lr=0.2 (0.1 there)', '--speeds=[1.0, 0.9] ([1.0] there)']
    """
    settings, words, found = results["settings"], [*options, "--"], []
    begins = [at for at, word in enumerate(words) if word.startswith("--")]
    for at, end in itertools.pairwise(begins):
        name, given, text = words[at].removeprefix("--").partition("=")
        if name not in settings:
            continue
        text = text if given else " ".join(words[at + 1 : end])
        there = settings[name]
        same = [there, *there] if isinstance(there, list) and len(there) == 1 else [there]
        if os.sep not in text and YAML(typ="safe").load(text) not in same:
            found.append(f"--{name}={text} ({there} there)")
    return found


def train(recipe: str, options: list[str], folder: Path) -> dict:
    """One run in a process of its own, one thread, unless it is already done; its results.

    Raises
    ------
    ValueError
        It is done, with other options.
    """
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
    results = json.loads((folder / "results.json").read_text())
    if differing := other_settings(options, results):
        raise ValueError(
            f"{folder} was trained otherwise: {', '.join(differing)}; another --output"
        )
    return results


def train_all(recipe: str, runs: dict, given: list[str], jobs: int) -> dict:
    """Results by key of {key: (options, folder)}; `given` are options of every run."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = {
            key: pool.submit(train, recipe, last_of_each([*options, *given]), folder)
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


def scores_file(folder: Path, system: str) -> Path:
    (found,) = (folder / "scores").glob(f"*/{system}.tsv")
    return found


def scored(file: Path) -> tuple[LabelledTrials, np.ndarray]:
    trials, scores = read_scores(file)
    return trials.labelled(), scores


def balanced_accuracy(file: Path) -> float:
    """As of the field's pair sets: all target pairs and as many impostor pairs, in ten folds.

    The impostor pairs and the folds are drawn at random, the same for every run.
    """
    trials, scores = scored(file)
    return folded_accuracy(scores, trials.is_target)


def folded_accuracy(scores: np.ndarray, is_target: np.ndarray) -> float:
    """In ten folds that are drawn at random, with as many impostor as target pairs."""
    rng = np.random.default_rng(0)
    targets, impostors = (rng.permutation(np.flatnonzero(is_target == x)) for x in (1, 0))
    pairs = np.stack([targets, impostors[: len(targets)]], axis=1).reshape(-1)
    return ten_fold_accuracy(scores[pairs], is_target[pairs]).mean


def figures_of(
    file: Path, figures: Mapping[str, Measure] = FIGURES
) -> tuple[np.ndarray, Sequence[Influence | None]]:
    """Values [F] of the figures of a file of scores; influences [F] of speakers or identities."""
    trials, scores = scored(file)
    report = evaluate(scores, trials, figures=list(figures.values()))
    return np.array([figure.value for figure in report.figures]), report.influences


def measured(args, folders: dict, system: str) -> dict:
    """:func:`figures_of` every (model, loss, seed)."""
    keys = itertools.product(args.models, args.losses, range(args.seeds))
    return {key: figures_of(scores_file(folders[key], system)) for key in tqdm([*keys], system)}


def mean(influences: Sequence[Influence]) -> Influence:
    return functools.reduce(operator.add, influences) * (1 / len(influences))


def interval(influence: Influence, value: float, sign: str = "") -> str:
    found = influence.interval(value)
    if found is None:
        return "too few speakers"
    return f"{100 * found[0]:{sign}.2f} to {100 * found[1]:{sign}.2f}"


def figure_cells(found: Sequence[tuple]) -> list[str]:
    """Of some seeds' :func:`figures_of`: mean, deviation and the speakers' interval of each."""
    values, influences = zip(*found, strict=True)
    return [
        f"{spread(value)} ({interval(mean(moved).on('logit'), value.mean())})"
        for value, moved in zip(np.array(values).T, zip(*influences, strict=True), strict=True)
    ]


def difference(pairs: Sequence[tuple], at: int) -> tuple[np.ndarray, Influence]:
    """First minus second of some seeds' two :func:`figures_of`, in one of the figures.

    The values [S], and what the speakers contribute to their mean.
    """
    values = np.array([ours[0][at] - theirs[0][at] for ours, theirs in pairs])
    return values, mean([ours[1][at] - theirs[1][at] for ours, theirs in pairs])


def difference_cells(pairs: Sequence[tuple]) -> list[str]:
    """Of some seeds' two :func:`figures_of`: the mean of first minus second, paired over speakers.

    The interval is of the speakers' sampling; the seeds' own spread stands beside it.
    """
    cells = []
    for at in range(len(pairs[0][0][0])):
        value, moved = difference(pairs, at)
        seeds = f"; seeds ± {100 * value.std(ddof=1):.2f}" if len(value) > 1 else ""
        cells.append(f"{100 * value.mean():+.2f} ({interval(moved, value.mean(), '+')}{seeds})")
    return cells


def markdown(heads: list[str], lines: Iterable[list[str]]) -> str:
    """A table."""
    made = ["| " + " | ".join(cells) + " |" for cells in (heads, *lines)]
    return "\n".join([made[0], "|" + "---|" * len(heads), *made[1:]]) + "\n"


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
    parser.add_argument("--losses", nargs="+", type=checked_loss, default=COMPARED)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args(argv)
    args.options = options
    compare(args)


if __name__ == "__main__":
    main()
