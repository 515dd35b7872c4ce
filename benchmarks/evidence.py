"""All runs of docs/evidence_plan.md behind docs/comparison.md; started again, it goes on.

    python benchmarks/evidence.py DATA OUT [--stage tune speech ...] [--systems arcface qmargin ...]
    python benchmarks/evidence.py DATA OUT --tables [--stage second ...]

DATA holds ``voices``, ``speech`` (VoxCeleb's layout with lists of speakers and trials) and ``lfw``.
A run is one of the recipes with ``--size small`` in a process of its own; finished runs are kept,
and what is cut off goes on from its last checkpoint; tunings that evidence_record.json has are not
trained again. After each stage, and with ``--tables`` without training, the tables and pictures of
what is finished are written to OUT. Options after ``--`` go to every run (``-- --device=cuda``).
"""

import argparse
import csv
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from evidence_runs import (
    BY_FIGURES,
    COUNTS,
    FACE_SYSTEMS,
    PRIMARY,
    RISING,
    STAGES,
    SYSTEMS,
    TUNINGS,
    candidates,
    chosen,
    criterion,
    finished,
    name_in_record,
    record,
    recorded,
    results_of,
    value,
    words,
    write_face_lists,
    write_speech_lists,
)
from recipe_runs import (
    FIGURES,
    difference,
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

from speechbrain_qmargin.embeddings import Embeddings, load_embeddings
from speechbrain_qmargin.export.encoder import load_encoder
from speechbrain_qmargin.export.recordings import extract_recordings
from speechbrain_qmargin.export.sources import write_embeddings
from speechbrain_qmargin.extraction import Inputs
from speechbrain_qmargin.files import write_text
from speechbrain_qmargin.scoring.figures import Measure, TarAtFar
from speechbrain_qmargin.scoring.lists import Cohort
from speechbrain_qmargin.scoring.metrics import min_cllr, operating_points
from speechbrain_qmargin.scoring.pairing import session_in
from speechbrain_qmargin.scoring.plots import pooled_det_figure, save_figure
from speechbrain_qmargin.scoring.report import evaluate
from speechbrain_qmargin.scoring.score_files import write_scores
from speechbrain_qmargin.scoring.uncertainty import Spread
from speechbrain_qmargin.scoring.worst import worst_trials
from speechbrain_qmargin.trials import LabelledTrials, speaker_in

Measured = tuple  # what figures_of gives: values and influences
FACE_FIGURES = FIGURES | {"TAR@1e-4": TarAtFar(1e-4)}
FIRST_LISTS = {"trials_cv": "cv", "trials_gsc": "gsc", "trials_test": "acted"}
SECOND_LISTS = {"second_cv": "second cv", "second_gsc": "second gsc"}
THIRD_LISTS = {"third_cv": "third cv", "third_gsc": "third gsc"}
LISTS = FIRST_LISTS | SECOND_LISTS | THIRD_LISTS | {"faces_test": "all pairs"}
TREATMENTS = ("cosine", "centred", "as-norm", "as-norm of strangers")
WORST = 100


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def history_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


# -- tuning -------------------------------------------------------------------


def tuning_table(out: Path, stage: str, systems: Sequence[str]) -> str:
    lines, lists = [], []
    for system in systems:
        best = chosen(out, stage, system)
        for setting, folder in candidates(out, stage, system):
            results = results_of(folder)
            if results is None:
                continue
            lists = [name.removeprefix("tune_") for name in results["lists"]]
            cells = [
                percent(value(results, name, figure))
                for name in results["lists"]
                for figure in ("EER", "TAR@FAR=0.01")
            ]
            mean = percent(criterion(results))
            last = results["last_epoch"]
            support = f"{last['support_mean']:.1f}" if "support_mean" in last else ""
            rest = f"{100 * last['zero_loss']:.0f}" if "zero_loss" in last else ""
            shown = ", ".join(f"{key} {value:g}" for key, value in setting.items())
            mean = f"**{mean}**" if setting == best else mean
            lines.append([system, shown, *cells, mean, support, rest])
    heads = [f"{name} {list_}, %" for list_ in lists for name in ("EER", "TAR@1e-2")]
    return markdown(
        ["system", "setting", *heads, "criterion, %", "support", "at zero loss, %"], lines
    )


# -- comparisons --------------------------------------------------------------


def score_file(folder: Path, trials: str, treatment: str) -> Path:
    return folder / "scores" / trials / f"{treatment.replace(' ', '_')}.tsv"


def measured(
    folders: Mapping[tuple, Path],
    trials: str,
    treatment: str,
    figures: Mapping[str, Measure] = FIGURES,
) -> dict[tuple, Measured]:
    """:func:`figures_of` of the runs that have such scores."""
    files = {key: score_file(folder, trials, treatment) for key, folder in folders.items()}
    there = {key: file for key, file in files.items() if file.is_file()}
    named = f"{trials} {treatment}"
    named_files = tqdm(there.items(), named, leave=False)
    return {key: figures_of(file, figures) for key, file in named_files}


def comparison(
    found: Mapping[tuple, Measured],
    baseline: str = PRIMARY,
    figures: Mapping[str, Measure] = FIGURES,
) -> str:
    """Of {(system, seed): figures}: a row a system, then the first one minus each other."""
    lines, differences = [], []
    seeds_of: dict[str, list] = {}
    for system, seed in found:
        seeds_of.setdefault(system, []).append(seed)
    for system, seeds in seeds_of.items():
        cells = figure_cells([found[system, seed] for seed in seeds])
        lines.append([system, str(len(seeds)), *cells])
        both = [seed for seed in seeds if (baseline, seed) in found]
        if system != baseline and both:
            pairs = [(found[baseline, seed], found[system, seed]) for seed in both]
            differences.append([system, str(len(both)), *difference_cells(pairs)])
    text = markdown(["system", "seeds", *(f"{figure}, %" for figure in figures)], lines)
    if differences:
        heads = ["system", "seeds", *(f"{figure}, points" for figure in figures)]
        text += f"\n{baseline} minus the system:\n\n" + markdown(heads, differences)
    return text


def speech_tables(folders: Mapping[tuple, Path], baseline: str = PRIMARY) -> str:
    """For every list and treatment of the scores."""
    lists = sorted({path.name for folder in folders.values() for path in folder.glob("scores/*")})
    text = ""
    for trials, treatment in itertools.product(lists, TREATMENTS):
        found = measured(folders, trials, treatment)
        if found:
            text += f"\n### {LISTS.get(trials, trials)}, {treatment}\n\n"
            text += comparison(found, baseline)
    return text


def decision_table(
    folders: Mapping[tuple, Path],
    lists: Sequence[str],
    rates: Sequence[str] = ("TAR@1e-2",),
    figures: Mapping[str, Measure] = FIGURES,
) -> str:
    """The test that the plan fixed: each list and rate, both baselines, Holm's correction."""
    from scipy.special import stdtr

    rows = []
    measured_on = {trials: measured(folders, trials, "cosine", figures) for trials in lists}
    for trials, rate, system in itertools.product(lists, rates, ("arcface", "cosface")):
        found = measured_on[trials]
        seeds = [seed for name, seed in found if name == system and (PRIMARY, seed) in found]
        if not seeds:
            return ""
        at = list(figures).index(rate)
        pairs = [(found[PRIMARY, seed], found[system, seed]) for seed in seeds]
        values, moved = difference(pairs, at)
        value = float(values.mean())
        reach = abs(value - moved.bias) / math.sqrt(moved.variance)
        chance = 2 * float(stdtr(moved.degrees_of_freedom, -reach))
        where = LISTS[trials] if len(rates) == 1 else f"{LISTS[trials]}, {rate}"
        rows.append((chance, where, system, value, moved, len(seeds)))
    rows.sort(key=lambda row: row[0])
    lines, so_far = [], 0.0
    for rank, (chance, where, system, value, moved, seeds) in enumerate(rows):
        left = len(rows) - rank
        so_far = min(max(so_far, left * chance), 1.0)
        low, high = moved.interval(value, 1 - 0.05 / left)
        interval = f"{100 * low:+.2f} to {100 * high:+.2f}"
        cells = [f"{100 * value:+.2f}", interval, f"{chance:.3f}", f"{so_far:.3f}"]
        lines.append([where, system, str(seeds), *cells])
    points = f"{rates[0]}, points" if len(rates) == 1 else "points"
    heads = ["list", "baseline", "seeds", points, "corrected interval", "p", "p, Holm"]
    return markdown(heads, lines)


# -- what else the runs say ---------------------------------------------------


def score_with_strangers(data: Path, folders: Mapping[tuple, Path]) -> None:
    """AS-norm with 251 speakers of another corpus, one utterance each, where it is missing."""
    root = data / "voices/wav"
    people = words(data / "voices/cohort_speakers.txt")
    recordings = {
        str(file.relative_to(root)): file for who in people for file in (root / who).rglob("*.flac")
    }
    for folder in tqdm(folders.values(), "cohort of strangers", leave=False):
        lists = [path.name for path in (folder / "scores").iterdir() if path.is_dir()]
        missing = [name for name in lists if not score_file(folder, name, TREATMENTS[-1]).is_file()]
        if not missing:
            continue
        kept = folder / "strangers.npz"
        if not kept.is_file():
            encoder = load_encoder(folder / "inference")
            parts = folder / "strangers.parts"
            inputs = Inputs(recordings)
            found, faults = extract_recordings(encoder, inputs, parts, str(root), 0, int)
            if faults:
                raise OSError(f"{len(faults)} of the cohort cannot be read: {next(iter(faults))}")
            write_embeddings(kept, found, encoder.digest())
        cohort = load_embeddings(kept)
        embeddings = load_embeddings(folder / "embeddings.npz")
        names = {name: speaker_in(name) for name in cohort.ids}
        strangers = Cohort.of(cohort, names, top_n=20, mean=cohort.matrix.mean(axis=0))
        for name in missing:
            trials, _ = scored(score_file(folder, name, "cosine"))
            scores = strangers.scores(embeddings, trials, quiet=True)
            file = score_file(folder, name, TREATMENTS[-1])
            write_scores(file, trials, scores, {"kind": "as-norm"})


def breakdown_table(data: Path, folders: Mapping[tuple, Path]) -> str:
    """cv by what makes it easy: targets of one sitting, impostors of another language."""
    with (data / "voices/speakers.tsv").open() as lines:
        language = {
            row["speaker"]: row["language"] for row in csv.DictReader(lines, delimiter="\t")
        }
    text = ""
    parts: dict[str, Callable[[LabelledTrials], np.ndarray]] = {
        "target trials of two sittings": lambda trials: ~trials.is_target | ~same_sitting(trials),
        "impostors of the same language": lambda trials: (
            trials.is_target | same(trials, lambda name: language.get(speaker_in(name), ""))
        ),
    }
    for part, kept in parts.items():
        found = {}
        for key, folder in folders.items():
            file = score_file(folder, "trials_cv", "cosine")
            if file.is_file():
                trials, scores = scored(file)
                rows = kept(trials)
                report = evaluate(scores[rows], trials.rows(rows), figures=list(FIGURES.values()))
                values = np.array([figure.value for figure in report.figures])
                found[key] = values, report.influences
        if found:
            text += f"\n### cv, {part}, cosine\n\n" + comparison(found)
    return text


def same(trials: LabelledTrials, of: Callable[[str], str]) -> np.ndarray:
    known = np.array([of(name) for name in trials.ids])
    return known[trials.enrolment] == known[trials.test]


def same_sitting(trials: LabelledTrials) -> np.ndarray:
    return same(trials, lambda name: f"{speaker_in(name)}/{session_in(name)}")


def hubness(embeddings: Embeddings, names: Sequence[str], nearest: int = 10) -> float:
    """Skewness of how often a recording is among the `nearest` of other speakers' recordings."""
    unit = embeddings.unit(names)
    speakers = np.array([speaker_in(name) for name in names])
    scores = unit @ unit.T
    scores[speakers[:, None] == speakers] = -np.inf
    order = np.argpartition(-scores, nearest, axis=1)[:, :nearest]
    counts = np.bincount(order.ravel(), minlength=len(names))
    return float(((counts - counts.mean()) ** 3).mean() / counts.std() ** 3)


def posterior_table(folders: Mapping[tuple, Path], lists: Sequence[str] = ("trials_cv",)) -> str:
    """What the losses do to training and to embeddings: one row a system, means over its seeds."""
    lines, worst = [], {}
    by_system: dict[str, list[Path]] = {}
    for (system, *_), folder in folders.items():
        by_system.setdefault(system, []).append(folder)
    for system, runs in by_system.items():
        told = [history_of(folder) for folder in runs]
        epochs = sorted({1, len(told[0]) // 4, len(told[0]) // 2, len(told[0])})
        cells = [
            f"{np.mean([history[epoch - 1]['support_mean'] for history in told]):.1f}"
            for epoch in epochs
        ]
        cells.append(f"{100 * np.mean([history[-1]['zero_loss'] for history in told]):.0f}")
        for name in lists:
            hubs, costs, errors = [], [], []
            for folder in runs:
                trials, scores = scored(score_file(folder, name, "cosine"))
                hubs.append(hubness(load_embeddings(folder / "embeddings.npz"), trials.ids))
                costs.append(min_cllr(operating_points(scores, trials.is_target)))
                found = worst_trials(scores, trials, WORST)["impostors"]
                errors.append({(one["enrolment"], one["test"]) for one in found})
            cells += [f"{np.mean(hubs):.2f}", f"{np.mean(costs):.3f}"]
            worst[system] = errors
        lines.append([system, *cells])
    heads = ["system", *(f"support, epoch {epoch}" for epoch in epochs), "at zero loss, %"]
    for name in lists:
        heads += [f"{what}, {LISTS.get(name, name)}" for what in ("hubness", "minCllr")]
    text = markdown(heads, lines)
    names = list(worst)
    shared = [
        [name, *(percent(overlap(worst[name], worst[other])) for other in names)] for name in names
    ]
    text += f"\nShared among the {WORST} worst impostor trials of two runs, %:\n\n"
    return text + markdown(["", *names], shared)


def overlap(ours: Sequence[set], theirs: Sequence[set]) -> float:
    """The mean share of what two runs have in common, a run and itself left out."""
    pairs = [
        len(a & b) / WORST
        for a, b in itertools.product(ours, theirs)
        if ours is not theirs or a is not b
    ]
    return float(np.mean(pairs)) if pairs else 1.0


def draw(
    folders: Mapping[tuple, Path], trials: str, systems: Sequence[str], file: Path, title: str
) -> None:
    """The DET of some systems, their seeds pooled."""
    drawn: dict[str, list] = {}
    for (system, *_), folder in folders.items():
        path = score_file(folder, trials, "cosine")
        if system in systems and path.is_file():
            listed, scores = scored(path)
            found = operating_points(scores, listed.is_target)
            drawn.setdefault(system, []).append((found, Spread(scores, listed, found)))
    if drawn:
        save_figure(pooled_det_figure(drawn, title), file)


def classes_table(folders: Mapping[tuple, Path]) -> str:
    """Of {(number of speakers, alpha and r, seed): folder}."""
    found: dict[tuple, list] = {}
    for (count, point, _), folder in folders.items():
        results = results_of(folder)
        if results is not None:
            values = [
                [value(results, trials, figure) for figure in ("EER", "TAR@FAR=0.01")]
                for trials in results["lists"]
            ]
            found.setdefault((count, point), []).append(values)
    points = list(dict.fromkeys(point for _, point, _ in folders))
    lines = []
    for at, name in enumerate(("cv", "gsc")):
        for figure, what in enumerate(("EER, %", "TAR@1e-2, %")):
            for count in COUNTS:
                cells = [
                    spread([values[at][figure] for values in found[count, point]])
                    if (count, point) in found
                    else ""
                    for point in points
                ]
                if any(cells):
                    lines.append([name, what, str(count), *cells])
    return markdown(["list", "figure", "speakers", *(f"alpha {point}" for point in points)], lines)


def face_tables(data: Path, out: Path, folders: Mapping[tuple, Path]) -> str:
    """For every network and cut of the tail: all pairs of the test identities, and the official.

    Their pictures are beside OUT's tables.
    """
    text = ""
    for part in dict.fromkeys(key[0] for key in folders):
        some = {key[1:]: folder for key, folder in folders.items() if key[0] == part}
        found = measured(some, "faces_test", "cosine", FACE_FIGURES)
        text += f"\n### {part}\n\n" + comparison(found, figures=FACE_FIGURES)
        text += f"\n### {part}, official pairs\n\n" + official_table(data, some)
        file = out / f"det_{'_'.join(re.findall(r'[a-z0-9]+', part))}.png"
        draw(some, "faces_test", ("arcface", "cosface", PRIMARY), file, f"all pairs, {part}")
    return text


def official_table(data: Path, folders: Mapping[tuple, Path]) -> str:
    """Accuracy of fold 8's own pairs, without those that the errata take out."""
    listed = [line.split() for line in (data / "lfw/pairs_fold8.txt").read_text().splitlines()]
    found: dict[str, list] = {}
    for (system, _), folder in folders.items():
        embeddings = load_embeddings(folder / "embeddings.npz")
        known = set(embeddings.ids)
        pairs = [pair for pair in listed if known.issuperset(pair[1:])]
        labels, left, right = zip(*pairs, strict=True)
        scores = (embeddings.unit(left) * embeddings.unit(right)).sum(1)
        accuracy = folded_accuracy(scores, np.array(labels) == "1")
        found.setdefault(system, []).append((len(pairs), accuracy))
    lines = [
        [system, str(len(runs)), str(runs[0][0]), spread([accuracy for _, accuracy in runs])]
        for system, runs in found.items()
    ]
    return markdown(["system", "seeds", "pairs", "accuracy, %"], lines)


def schedule_tables(data: Path, out: Path, folders: Mapping[tuple, Path]) -> str:
    """Each way beside the fixed settings; then the rising margin of all losses."""
    fixed = finished(STAGES["speech"].runs(data, out, ["arcface", "cosface", PRIMARY]))
    fixed = {key: folder for key, folder in fixed.items() if key[1] in range(3)}
    rising = {key: folder for key, folder in folders.items() if key[0].endswith(RISING)}
    first = f"{PRIMARY}, {RISING}"
    rising = dict(sorted(rising.items(), key=lambda run: run[0][0] == first))
    ways = {key: folder for key, folder in folders.items() if key[0].startswith(PRIMARY)}
    own = {key: folder for key, folder in fixed.items() if key[0] == PRIMARY}
    text = speech_tables({**own, **ways})
    for trials, name in FIRST_LISTS.items():
        found = measured(rising, trials, "cosine")
        text += f"\n### {name}, {RISING}, cosine\n\n" + comparison(found, first)
        for system in ("arcface", "cosface"):
            pair = {key: folder for key, folder in fixed.items() if key[0] == system}
            pair |= {key: folder for key, folder in rising.items() if key[0].startswith(system)}
            text += f"\n### {name}, {system}, {RISING}, cosine\n\n"
            text += comparison(measured(pair, trials, "cosine"), system)
    return text


def tables(stage: str, data: Path, out: Path) -> str:
    """What is finished of a stage; pictures beside it."""
    if stage in TUNINGS:
        systems = FACE_SYSTEMS if stage == "faces_tune" else list(SYSTEMS)
        return tuning_table(out, stage, systems)
    runs = STAGES[stage].runs(data, out, list(SYSTEMS))
    if stage in BY_FIGURES:  # the others of them: by the number of classes
        return classes_table({key: folder for key, (_, folder) in runs.items()})
    folders = finished(runs)
    if not folders:
        return ""
    if stage == "third_faces":
        both = {key[1:]: folder for key, folder in folders.items()}
        decided = decision_table(both, ["faces_test"], ["TAR@1e-3", "TAR@1e-4"], FACE_FIGURES)
        return "The test that decides:\n\n" + decided + face_tables(data, out, folders)
    if STAGES[stage].recipe == "face":
        return face_tables(data, out, folders)
    if stage == "finetune":
        return speech_tables(folders, baseline="arcface, then arcface")
    if stage == "schedules":
        return schedule_tables(data, out, folders)
    if stage in ("others", "third_others", "third_alpha", "resnet_own"):
        shown = posterior_table(folders, ["trials_cv" if stage == "others" else "third_cv"])
        return speech_tables(folders) + "\n### What the losses do\n\n" + shown
    score_with_strangers(data, folders)
    looks = {"second": SECOND_LISTS, "second_long": SECOND_LISTS, "third": THIRD_LISTS}
    looks["resnet_norm"] = THIRD_LISTS
    lists = looks.get(stage, FIRST_LISTS)
    text = "The test that decides:\n\n" + decision_table(folders, list(lists)[:2])
    text += speech_tables(folders)
    if stage in ("speech", "second", "third"):
        if stage == "speech":
            text += breakdown_table(data, folders)
        text += "\n### What the losses do\n\n" + posterior_table(folders, list(lists)[:1])
        for trials, name in lists.items():
            file = out / f"det_{name.replace(' ', '_')}.png"
            draw(folders, trials, ("arcface", "cosface", PRIMARY), file, name)
    return text


def main() -> None:
    argv, given = recipe_options()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stage", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument(
        "--runs",
        default="*",
        help="only runs whose folder in OUT is called so, as in */*_1/qmargin_*",
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--tables", action="store_true", help="of what is finished; no training")
    parser.add_argument(
        "--record",
        action="store_true",
        help="keep the figures of tunings and of the number of classes in evidence_record.json",
    )
    args = parser.parse_args(argv)
    data, out = args.data.resolve(), args.out.resolve()
    write_speech_lists(data, out)
    if not args.tables and any(STAGES[stage].recipe == "face" for stage in args.stage):
        write_face_lists(data, out)
    for stage in args.stage:
        if not args.tables:
            recipe, planned = STAGES[stage]
            runs = planned(data, out, args.systems)
            some = {
                key: run
                for key, run in runs.items()
                if fnmatch(str(run[1].relative_to(out)), args.runs)
            }
            if stage in BY_FIGURES:
                kept = recorded()
                some = {k: run for k, run in some.items() if name_in_record(run[1]) not in kept}
            train_all(recipe, some, given, args.jobs)
        if args.record and stage in BY_FIGURES:
            everyone = STAGES[stage].runs(data, out, list(SYSTEMS))
            record(folder for _, folder in everyone.values())
        text = tables(stage, data, out)
        write_text(out / f"{stage}.md", text)
        print(text)


if __name__ == "__main__":
    main()
