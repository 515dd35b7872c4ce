"""All runs of docs/evidence_plan.md behind docs/comparison.md; started again, it goes on.

    python benchmarks/evidence.py DATA OUT [--stage tune speech ...] [--systems arcface qmargin ...]

DATA holds ``voices``, ``speech`` (VoxCeleb's layout with lists of speakers and trials) and ``lfw``.
A run is one of the recipes with ``--size small`` in a process of its own; finished runs are kept,
and what is cut off goes on from its last checkpoint. After each stage, and with ``--stage tables``,
the tables of what is finished are written to OUT. Options after ``--`` go to every run
(``-- --device=cuda``).
"""

import argparse
import itertools
import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from compare_losses import (
    FIGURES,
    difference_cells,
    figure_cells,
    figures_of,
    markdown,
    recipe_options,
    spread,
    train_all,
)
from tqdm import tqdm

from speechbrain_qmargin.files import write_text

Run = tuple[list[str], Path]
SMALL = ["--channels=64", "--attention_channels=32", "--n_mels=40", "--embedding_dim=128"]
SMALL += ["--sentence_len=1.5", "--number_of_epochs=12", "--num_valid_speakers=0"]
SEEDS, TUNING_SEED, TREATMENTS = range(5), 1000, ("cosine", "centred", "as-norm")


def grid(**values: Sequence) -> list[dict]:
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def points(*triples: tuple[float, float, float]) -> list[dict]:
    return [dict(zip(("alpha", "scale", "margin"), triple, strict=True)) for triple in triples]


QMARGIN = points(
    (1.1, 32, 0.2),
    (1.25, 10, 0.2),
    (1.25, 20, 0.2),
    (1.25, 32, 0.1),
    (1.5, 10, 0.1),
    (1.5, 10, 0.2),
)
COSINES = grid(scale=[16, 32], margin=[0.1, 0.2, 0.35])

# The systems in the order of the plan: the recipe's options and the settings that are tried with
# them; one setting is not tuned.
SYSTEMS: dict[str, tuple[list[str], list[dict]]] = {
    "arcface": (["--loss=arcface"], COSINES),
    "cosface": (["--loss=cosface"], COSINES),
    "qmargin": (["--loss=qmargin"], QMARGIN),
    "published": (["--loss=qmargin"], points((1.5, 10, 0.2))),
    "auto": (["--loss=qmargin_auto"], [{}]),
    "adaface": (["--loss=adaface"], grid(scale=[16, 32], margin=[0.2, 0.4, 0.6])),
    "subcenter": (["--loss=arcface", "--subcentres=3"], COSINES),
    "qmargin_norm": (["--loss=qmargin_norm"], QMARGIN),
    "entmax": (["--loss=entmax"], grid(alpha=[1.1, 1.25, 1.5], scale=[10, 20])),
    "sparsemax": (["--loss=sparsemax"], grid(scale=[2.5, 5, 10, 15, 20, 32])),
    "a3m": (["--loss=a3m"], QMARGIN),
}
PRIMARY = "qmargin"


def options(system: str, setting: dict) -> list[str]:
    return [*SYSTEMS[system][0], *(f"--{key}={value}" for key, value in setting.items())]


# -- the lists ---------------------------------------------------------------


def words(file: Path) -> list[str]:
    return file.read_text().split()


def utterances(data: Path, speaker: str) -> list[str]:
    folder = data / "voices" / "wav"
    return sorted(str(file.relative_to(folder)) for file in (folder / speaker).rglob("*.flac"))


def held_out(data: Path, seed: int, without: Iterable[str] = ()) -> dict[str, list[str]]:
    """60 of the training speakers, 43 of Common Voice with four utterances or more, 17 of gsc."""
    rng, barred = random.Random(seed), set(without)
    found = {}
    for corpus, prefix, count in (("cv", "cv", 43), ("gsc", "gs", 17)):
        able = [
            speaker
            for speaker in words(data / "voices" / "train_speakers.txt")
            if speaker.startswith(prefix)
            and speaker not in barred
            and len(utterances(data, speaker)) >= (4 if corpus == "cv" else 2)
        ]
        found[corpus] = sorted(rng.sample(able, count))
    return found


def all_pairs(data: Path, speakers: list[str]) -> str:
    """Every pair of the speakers' utterances as lines ``label enrol test``."""
    names = [name for speaker in speakers for name in utterances(data, speaker)]
    pairs = itertools.combinations(names, 2)
    return "".join(f"{int(a.split('/')[0] == b.split('/')[0])} {a} {b}\n" for a, b in pairs)


def write_lists(data: Path, out: Path) -> None:
    """The lists of the tuning and the nested subsets of speakers; the same at every start."""
    everyone = words(data / "voices/train_speakers.txt")
    both = everyone + words(data / "speech/train_speakers.txt")
    tuning = held_out(data, seed=0)
    aside = {speaker for speakers in tuning.values() for speaker in speakers}
    write_text(out / "lists/train.txt", "\n".join(both) + "\n")
    write_text(out / "lists/tune_train.txt", "\n".join(s for s in both if s not in aside) + "\n")
    for corpus, speakers in tuning.items():
        write_text(out / f"lists/tune_{corpus}.txt", all_pairs(data, speakers))
    shuffled = random.Random(0).sample(everyone, len(everyone))
    for count in COUNTS:
        write_text(out / f"lists/train_{count}.txt", "\n".join(shuffled[:count]) + "\n")


def speech(data: Path, train: Path, *trials: Path) -> list[str]:
    folders = f"--data_folder=[{data / 'voices'}, {data / 'speech'}]"
    files = ", ".join(map(str, trials))
    return [*SMALL, folders, f"--verification_file=[{files}]", f"--train_speakers={train}"]


# -- the stages: {key: run} ---------------------------------------------------


def tune(data: Path, out: Path, systems: list[str]) -> dict[tuple, Run]:
    lists = out / "lists"
    base = speech(data, lists / "tune_train.txt", lists / "tune_cv.txt", lists / "tune_gsc.txt")
    base += [f"--seed={TUNING_SEED}", "--cohort_utterances=0"]
    return {
        (system, number): (
            [*base, *options(system, setting)],
            out / "tune" / f"{system}_{number}",
        )
        for system in systems
        for number, setting in enumerate(SYSTEMS[system][1])
        if len(SYSTEMS[system][1]) > 1
    }


def criterion(folder: Path) -> float:
    """The mean TAR@1e-2 of a tuning run's two lists, cosine."""
    lists = json.loads((folder / "results.json").read_text())["lists"]
    return float(
        np.mean([found["cosine"]["figures"]["TAR@FAR=0.01"]["value"] for found in lists.values()])
    )


def chosen(out: Path, system: str) -> dict | None:
    """The best of a system's settings; None while one of them is not finished."""
    settings = SYSTEMS[system][1]
    if len(settings) == 1:
        return settings[0]
    folders = [out / "tune" / f"{system}_{number}" for number in range(len(settings))]
    if not all((folder / "results.json").is_file() for folder in folders):
        return None
    return settings[int(np.argmax([criterion(folder) for folder in folders]))]


def compared(data: Path, out: Path, systems: list[str]) -> dict[tuple, Run]:
    lists = [data / "voices/trials_cv.txt", data / "voices/trials_gsc.txt"]
    base = speech(data, out / "lists/train.txt", *lists, data / "speech/trials_test.txt")
    runs = {}
    for seed, system in itertools.product(SEEDS, systems):
        setting = chosen(out, system)
        if setting is None:
            print(f"{system}: its tuning is not finished, so it is left out")
            continue
        folder = out / "speech" / f"{system}_{seed}"
        runs[system, seed] = ([*base, f"--seed={seed}", *options(system, setting)], folder)
    return runs


COUNTS, ALPHAS = (30, 100, 300, 438), (1, 1.25, 1.5, 1.75, 2)
STEPS = 800


def classes(data: Path, out: Path, _: list[str]) -> dict[tuple, Run]:
    lists = [data / "voices/trials_cv.txt", data / "voices/trials_gsc.txt"]
    runs = {}
    for seed, count, alpha in itertools.product(range(2), COUNTS, ALPHAS):
        train = out / f"lists/train_{count}.txt"
        size = sum(len(utterances(data, speaker)) for speaker in words(train))
        epochs = round(STEPS / max(size // 64, 1))
        setting = {"scale": 20 if alpha == 1 else 5 / (alpha - 1), "margin": 0.2}
        loss = ["--loss=cosface"] if alpha == 1 else ["--loss=qmargin", f"--alpha={alpha}"]
        loss += [f"--{key}={value:.4g}" for key, value in setting.items()]
        given = [*speech(data, train, *lists), f"--number_of_epochs={epochs}"]
        given += [f"--warmup_epochs={max(round(0.15 * epochs), 1)}", "--cohort_utterances=0"]
        folder = out / "classes" / f"{count}_{alpha:g}_{seed}"
        runs[count, alpha, seed] = ([*given, f"--seed={seed}", *loss], folder)
    return runs


# -- the tables ----------------------------------------------------------------


def finished(runs: dict[tuple, Run]) -> dict[tuple, Path]:
    return {key: folder for key, (_, folder) in runs.items() if (folder / "results.json").is_file()}


def tuning_table(data: Path, out: Path) -> str:
    lines = []
    folders = finished(tune(data, out, list(SYSTEMS)))
    for system, (_, settings) in SYSTEMS.items():
        done = [number for number in range(len(settings)) if (system, number) in folders]
        best = chosen(out, system) if done else None
        for number in done:
            results = json.loads((folders[system, number] / "results.json").read_text())
            shown = ", ".join(f"{key} {value:g}" for key, value in settings[number].items())
            cells = [
                f"{100 * found['cosine']['figures'][name]['value']:.1f}"
                for found in results["lists"].values()
                for name in ("EER", "TAR@FAR=0.01")
            ]
            value = f"{100 * criterion(folders[system, number]):.1f}"
            value = f"**{value}**" if settings[number] == best else value
            last = results["last_epoch"]
            support = f"{last['support_mean']:.1f}" if "support_mean" in last else "all"
            rest = f"{100 * last['zero_loss']:.0f}" if "zero_loss" in last else "0"
            lines.append([system, shown, *cells, value, support, rest])
    lists = [f"{name} {list_}" for list_ in ("cv", "gsc") for name in ("EER", "TAR@1e-2")]
    heads = ["system", "setting", *lists, "criterion", "support", "at zero loss, %"]
    return markdown(heads, lines)


def comparison_tables(data: Path, out: Path) -> str:
    """For every list and treatment: the systems, then the first one minus each other."""
    folders = finished(compared(data, out, list(SYSTEMS)))
    text = ""
    for name, treatment in itertools.product(
        ("trials_cv", "trials_gsc", "trials_test"), TREATMENTS
    ):
        files = {
            key: folder / "scores" / name / f"{treatment}.tsv" for key, folder in folders.items()
        }
        there = {key: file for key, file in files.items() if file.is_file()}
        found = {key: figures_of(file) for key, file in tqdm(there.items(), f"{name} {treatment}")}
        lines, differences = [], []
        for system in SYSTEMS:
            seeds = [seed for seed in SEEDS if (system, seed) in found]
            if not seeds:
                continue
            cells = figure_cells([found[system, seed] for seed in seeds])
            lines.append([system, str(len(seeds)), *cells])
            both = [seed for seed in seeds if (PRIMARY, seed) in found]
            if system != PRIMARY and both:
                pairs = [(found[PRIMARY, seed], found[system, seed]) for seed in both]
                differences.append([system, str(len(both)), *difference_cells(pairs)])
        if lines:
            text += f"\n## {name}, {treatment}\n\n"
            text += markdown(["system", "seeds", *(f"{figure}, %" for figure in FIGURES)], lines)
        if differences:
            heads = ["system", "seeds", *(f"{figure}, points" for figure in FIGURES)]
            text += f"\n{PRIMARY} minus the system:\n\n" + markdown(heads, differences)
    return text


def classes_table(data: Path, out: Path) -> str:
    folders = finished(classes(data, out, []))
    found: dict[tuple, list] = {}
    for (count, alpha, _), folder in folders.items():
        results = json.loads((folder / "results.json").read_text())
        values = [
            [of["cosine"]["figures"][name]["value"] for name in ("EER", "TAR@FAR=0.01")]
            for of in results["lists"].values()
        ]
        found.setdefault((count, alpha), []).append(values)
    lines = []
    for at, name in enumerate(("cv", "gsc")):
        for figure, what in enumerate(("EER, %", "TAR@1e-2, %")):
            for count in COUNTS:
                cells = [
                    spread([values[at][figure] for values in found[count, alpha]])
                    if (count, alpha) in found
                    else ""
                    for alpha in ALPHAS
                ]
                if any(cells):
                    lines.append([name, what, str(count), *cells])
    return markdown(
        ["list", "figure", "speakers", *(f"alpha {alpha:g}" for alpha in ALPHAS)], lines
    )


STAGES: dict[str, Callable[[Path, Path, list[str]], dict[tuple, Run]]] = {
    "tune": tune,
    "speech": compared,
    "classes": classes,
}
TABLES = {"tune": tuning_table, "speech": comparison_tables, "classes": classes_table}


def main() -> None:
    argv, given = recipe_options()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stage", nargs="+", choices=[*STAGES, "tables"], default=list(STAGES))
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args(argv)
    data, out = args.data.resolve(), args.out.resolve()
    (out / "lists").mkdir(parents=True, exist_ok=True)
    write_lists(data, out)
    for stage in args.stage:
        if stage != "tables":
            train_all("speech", STAGES[stage](data, out, args.systems), given, args.jobs)
        for name in TABLES if stage == "tables" else [stage]:
            text = TABLES[name](data, out)
            write_text(out / f"{name}.md", text)
            print(text)


if __name__ == "__main__":
    main()
