"""What the scripts that compare losses share: runs of the recipes, their scores, and tables."""

import functools
import itertools
import json
import operator
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from ruamel.yaml import YAML
from tqdm import tqdm

from speechbrain_qmargin.faces.pair_sets import ten_fold_accuracy
from speechbrain_qmargin.scoring.figures import EqualErrorRate, Measure, TarAtFar
from speechbrain_qmargin.scoring.influence import Influence
from speechbrain_qmargin.scoring.report import evaluate
from speechbrain_qmargin.scoring.score_files import read_scores
from speechbrain_qmargin.trials import LabelledTrials

ROOT = Path(__file__).resolve().parent.parent
RECIPES = {
    "speech": ("recipes/voxceleb/train.py", "hparams/qmargin.yaml"),
    "face": ("recipes/face/train.py", "hparams/face_qmargin.yaml"),
}
FIGURES = {"EER": EqualErrorRate(), "TAR@1e-2": TarAtFar(1e-2), "TAR@1e-3": TarAtFar(1e-3)}


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


def recipe_options() -> tuple[list[str], list[str]]:
    """The command line before and after ``--``."""
    argv = sys.argv[1:]
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def spread(values) -> str:
    values = 100 * np.asarray(values)
    return f"{values.mean():.2f}" + (f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else "")


def scored(file: Path) -> tuple[LabelledTrials, np.ndarray]:
    trials, scores = read_scores(file)
    return trials.labelled(), scores


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
