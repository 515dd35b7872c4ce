"""Whether the 95 % intervals hold: simulated scores on dense lists and on VoxCeleb's own trials.

    python benchmarks/intervals.py --output OUT --quick                 a few minutes
    python benchmarks/intervals.py --output OUT --voxceleb DIR          the tables of the docs
    python benchmarks/intervals.py --output OUT --only dense-40 --model heavy

DIR holds VoxCeleb1's lists (verif_original, verif_exhaustive, verif_hard; .txt or .txt.gz); only
who meets whom is read from them, the scores are simulated. Every simulation is kept in OUT as it is
done: started again, it continues, and what is finished is printed. Beside the package's intervals
stands a two-way bootstrap over speakers, which draws speakers and weighs an impostor trial by the
product of its two speakers' counts.

A score is a sum of effects, drawn anew in every simulation: of both speakers, of the pair of
speakers, of both sessions and both recordings, and noise; a target trial has the speaker's own
difficulty besides ("goats", skewed), and a bonus within one session. Two systems share 70 % of
every effect's variance and are equally good, so that any difference called significant is a false
alarm. The truth is that of 10 million trials with speakers of their own.
"""

import argparse
import functools
import gzip
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from speechbrain_qmargin.scoring.figures import EqualErrorRate, MinDCF, TarAtFar
from speechbrain_qmargin.scoring.influence import TrialStructure
from speechbrain_qmargin.scoring.metrics import operating_points
from speechbrain_qmargin.scoring.report import compare, evaluate
from speechbrain_qmargin.trials import LabelledTrials

COMMON = 0.7  # of the variance, between the two systems
PRIORS, FARS = (0.05, 0.01), (1e-1, 1e-2, 1e-3, 1e-4)
FEWEST = 10  # expected false accepts, for a FAR to be in the table
AT = 0.01  # FAR of the fixed threshold
VOXCELEB = {"original": "VoxCeleb1-O", "exhaustive": "VoxCeleb1-E", "hard": "VoxCeleb1-H"}


@dataclass(frozen=True)
class Model:
    """Standard deviations of the effects; `tails` are the degrees of freedom of the speakers'."""

    distance: float
    speaker: float
    tails: float
    pair: float
    session: float
    recording: float
    noise: float
    goats: float
    shape: float  # of the gamma distribution of the goats: skewness 2 / sqrt(shape)
    same_session: float


MODELS = {
    "usual": Model(3.8, 0.25, 8, 0.2, 0.2, 0.2, 0.85, 0.4, 6, 0.6),
    "gauss": Model(3.5, 0.25, math.inf, 0, 0, 0, 0.9, 0.4, math.inf, 0),
    "heavy": Model(4.2, 0.3, 5, 0.3, 0.2, 0.2, 0.8, 0.6, 2, 0.8),
}


# ------------------------------------------------------------------ lists


@dataclass
class List:
    """A trial list with the sessions of its recordings."""

    name: str
    trials: LabelledTrials
    session: np.ndarray
    simulations: int
    bootstraps: int  # of them with the bootstrap beside

    def __post_init__(self):
        self.trials = self.trials.distinct.trials
        trials, label = self.trials, self.trials.is_target
        self.speaker = trials.speakers()
        one, two = self.speaker[trials.enrolment], self.speaker[trials.test]
        size = int(self.speaker.max()) + 1
        keys = np.minimum(one, two)[~label] * size + np.maximum(one, two)[~label]
        self.pair = np.unique(keys, return_inverse=True)[1]
        self.of_target = one[label]
        sessions = self.session[trials.enrolment], self.session[trials.test]
        self.same_session = (sessions[0] == sessions[1])[label]
        self.structure = TrialStructure.of(trials)

    @property
    def fars(self) -> list[float]:
        return [far for far in FARS if far * self.structure.num_impostors >= FEWEST]


def dense(speakers: int, takes: int) -> tuple[LabelledTrials, np.ndarray]:
    """All pairs; three recordings a session."""
    speaker = np.repeat(np.arange(speakers), takes)
    left, right = np.triu_indices(len(speaker), 1)
    session = speaker * takes + np.tile(np.arange(takes) // 3, speakers)
    ids = [f"{i}/{take}" for i in range(speakers) for take in range(takes)]
    return LabelledTrials(ids, left, right, speaker[left] == speaker[right]), session


def sparse(speakers: int, targets: int, impostors: int) -> tuple[LabelledTrials, np.ndarray]:
    """So many target and impostor trials for every speaker, of eight recordings of two sessions."""
    rng, takes = np.random.default_rng(5), 8
    left, right = np.triu_indices(takes, 1)
    chosen = np.array([rng.permutation(len(left))[:targets] for _ in range(speakers)])
    base = takes * np.repeat(np.arange(speakers), targets)
    own = base + left[chosen].ravel(), base + right[chosen].ravel()
    one = np.repeat(np.arange(speakers), impostors // 2)
    two = (one + rng.integers(1, speakers, size=len(one))) % speakers
    other = (takes * side + rng.integers(takes, size=len(one)) for side in (one, two))
    sides = [np.concatenate(both) for both in zip(own, other, strict=True)]
    ids = [f"{i}/{take}" for i in range(speakers) for take in range(takes)]
    label = np.arange(len(sides[0])) < len(own[0])
    return LabelledTrials(ids, sides[0], sides[1], label), np.arange(len(ids)) // 4


def voxceleb(folder: Path, name: str) -> tuple[LabelledTrials, np.ndarray]:
    (path,) = [path for path in folder.glob(f"verif_{name}.txt*")]
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    lines = [line.split() for line in content.decode().splitlines()]
    ids: dict[str, int] = {}
    sides = [np.array([ids.setdefault(line[n], len(ids)) for line in lines]) for n in (1, 2)]
    session = np.unique([name.rpartition("/")[0] for name in ids], return_inverse=True)[1]
    label = np.array([line[0] == "1" for line in lines])
    return LabelledTrials(list(ids), sides[0], sides[1], label, path.name), session


def lists(args):
    """Makers of every list, with how often it is simulated and how often with the bootstrap."""
    makers = {
        f"dense-{s}": (lambda s=s, t=t: dense(s, t), n, b)
        for s, t, n, b in (
            (4, 30, 600, 100), (8, 20, 600, 100), (14, 15, 600, 100), (40, 10, 300, 60),
            (100, 8, 150, 10), (300, 4, 100, 5),
        )
    }  # fmt: skip
    makers |= {
        f"sparse-{s}": (lambda s=s: sparse(s, 20, 40), n, b)
        for s, n, b in ((100, 400, 60), (1000, 200, 20), (5000, 150, 5))
    }
    if args.voxceleb:
        makers |= {
            name: (lambda name=name: voxceleb(args.voxceleb, name), n, b)
            for name, n, b in (("original", 300, 40), ("hard", 150, 5), ("exhaustive", 150, 5))
        }
    for name, (maker, simulations, bootstraps) in makers.items():
        if args.only and name not in args.only:
            continue
        if args.quick:
            if name in ("dense-300", "dense-100", "hard", "exhaustive", "sparse-5000"):
                continue
            simulations, bootstraps = 60, 20
        if args.simulations is not None:
            simulations = min(simulations, args.simulations)
        yield List(name, *maker(), simulations, bootstraps)


# ------------------------------------------------------------------ scores


def _tailed(rng, size: int, tails: float) -> np.ndarray:
    if math.isinf(tails):
        return rng.normal(size=size)
    return rng.standard_t(tails, size=size) * math.sqrt((tails - 2) / tails)


def _goats(rng, size: int, shape: float) -> np.ndarray:
    if math.isinf(shape):
        return rng.normal(size=size)
    return (shape - rng.gamma(shape, size=size)) / math.sqrt(shape)


def _two_of(draw) -> np.ndarray:
    """An effect in both systems [2, ...], with its common part."""
    common = draw()
    return np.stack([math.sqrt(COMMON) * common + math.sqrt(1 - COMMON) * draw() for _ in "ab"])


def simulate(case: List, model: Model, rng) -> np.ndarray:
    """Scores of two equal systems [2, N]."""
    size, trials = int(case.speaker.max()) + 1, case.trials
    label = trials.is_target
    assert label is not None
    speaker = model.speaker * _two_of(lambda: _tailed(rng, size, model.tails))
    goats = model.goats * _two_of(lambda: _goats(rng, size, model.shape))
    pair = model.pair * _two_of(lambda: rng.normal(size=case.pair.max() + 1))
    session = model.session * _two_of(lambda: rng.normal(size=case.session.max() + 1))
    recording = model.recording * _two_of(lambda: rng.normal(size=len(trials.ids)))
    scores = model.noise * _two_of(lambda: rng.normal(size=len(trials)))
    recording += session[:, case.session]
    scores += recording[:, trials.enrolment] + recording[:, trials.test]
    sides = speaker[:, case.speaker]
    impostors = np.flatnonzero(~label)
    scores[:, impostors] += sides[:, trials.enrolment[impostors]] + sides[:, trials.test[impostors]]
    scores[:, impostors] += pair[:, case.pair]
    scores[:, label] += (goats + speaker)[:, case.of_target] + model.distance
    scores[:, label] += model.same_session * case.same_session
    return scores


@functools.cache
def _fresh(model: Model, size: int) -> list[np.ndarray]:
    """Of fresh speakers: impostor scores, ascending; target scores but for sessions; noise."""
    rng = np.random.default_rng(99)

    def one_of(draw):
        return math.sqrt(COMMON) * draw() + math.sqrt(1 - COMMON) * draw()

    recordings = 2 * model.recording**2 + model.noise**2
    deviation = math.sqrt(recordings + model.pair**2 + 2 * model.session**2)
    impostors = deviation * rng.normal(size=size)
    for _ in "ab":
        impostors += model.speaker * one_of(lambda: _tailed(rng, size, model.tails))
    targets = model.distance + math.sqrt(recordings) * rng.normal(size=size)
    targets += model.goats * one_of(lambda: _goats(rng, size, model.shape))
    targets += model.speaker * one_of(lambda: _tailed(rng, size, model.tails))
    impostors.sort()
    return [impostors, targets, rng.normal(size=size)]


def truth(case: List, model: Model, size: int = 10_000_000) -> dict[str, float]:
    """The figures of fresh speakers in every trial, and the threshold of FAR `AT`."""
    impostors, targets, noise = _fresh(model, size)
    same = np.arange(size) < case.same_session.mean() * size
    targets = targets + model.same_session * same
    targets += model.session * np.where(same, 2, math.sqrt(2)) * noise
    targets.sort()
    grid = np.linspace(-1, 8, 20_000)
    frr = np.searchsorted(targets, grid) / size
    far = 1 - np.searchsorted(impostors, grid) / size
    at = int(np.argmin(abs(frr - far)))
    found = {"EER": (frr[at] + far[at]) / 2}
    for p in PRIORS:
        found[f"minDCF(p={p:g})"] = (p * frr + (1 - p) * far).min() / p
    for rate in FARS:
        threshold = impostors[size - round(rate * size)]
        found[f"TAR@FAR={rate:g}"] = 1 - np.searchsorted(targets, threshold) / size
        if rate == AT:
            found |= {"threshold": threshold, "FRR@t": 1 - found[f"TAR@FAR={rate:g}"], "FAR@t": AT}
    return {name: float(value) for name, value in found.items()}


# ------------------------------------------------------------------ the bootstrap beside


def two_way_bootstrap(case: List, scores: np.ndarray, replicates: int, seed: int) -> dict:
    """Percentile intervals and replicates {figure: [R]} of product weights over speakers."""
    label = case.trials.is_target
    assert label is not None
    size = int(case.speaker.max()) + 1
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(size, np.full(size, 1 / size), size=replicates)
    drawn = drawn.T.astype(np.float32)
    impostors, targets = scores[~label], scores[label]
    count = len(impostors)
    ranks = np.unique(np.append(np.arange(min(100, count)),
                                np.geomspace(1, count - 1, 700).astype(int)))  # fmt: skip
    ordered = np.sort(impostors)
    thresholds = np.unique(np.nextafter(ordered[count - 1 - ranks], np.inf))
    one = case.speaker[case.trials.enrolment[~label]]
    two = case.speaker[case.trials.test[~label]]
    bins = np.searchsorted(thresholds, impostors, side="right")
    order = np.argsort(bins, kind="stable")
    one, two = one[order], two[order]
    edges = np.searchsorted(bins[order], np.arange(len(thresholds) + 2))
    inside = np.zeros((len(thresholds) + 1, replicates))
    for index in range(len(inside)):
        for start in range(edges[index], edges[index + 1], 4096):
            part = slice(start, min(start + 4096, edges[index + 1]))
            inside[index] += np.einsum("tr,tr->r", drawn[one[part]], drawn[two[part]])
    accepted = np.cumsum(inside[::-1], axis=0)[::-1]
    below = np.searchsorted(thresholds, targets, side="right")
    held = np.zeros((len(thresholds) + 1, size), np.float32)
    np.add.at(held, (below, case.of_target), 1)
    missed = np.cumsum(held @ drawn, axis=0, dtype=float)
    with np.errstate(invalid="ignore", divide="ignore"):
        far, frr = accepted[1:] / accepted[0], missed[:-1] / missed[-1]
    fine = (accepted[0] > 0) & (missed[-1] > 0)
    far, frr = far[:, fine], frr[:, fine]
    each = np.arange(far.shape[1])
    after = np.argmax(frr >= far, axis=0)
    found = {"EER": (frr[after, each] + far[after, each]) / 2}
    for p in PRIORS:
        found[f"minDCF(p={p:g})"] = np.minimum((p * frr + (1 - p) * far).min(axis=0) / p, 1)
    for rate in case.fars:
        at = np.argmax(far <= rate * (1 + 1e-6), axis=0)
        found[f"TAR@FAR={rate:g}"] = 1 - frr[at, each]
    return found


# ------------------------------------------------------------------ simulations


def simulation(case: List, model: Model, seed: int, true: dict, replicates: int) -> dict:
    """What is kept of one: value and interval of every figure, and of every difference."""
    label = case.trials.is_target
    assert label is not None
    scores = simulate(case, model, np.random.default_rng([seed, 7]))
    figures = [EqualErrorRate(), *map(MinDCF, PRIORS), *map(TarAtFar, case.fars)]
    start = time.process_time()
    reports = [evaluate(x, case.trials, figures=figures, structure=case.structure) for x in scores]
    differences = compare(*reports)
    seconds = {"ours": time.process_time() - start}
    ours = {f.name: [f.value, f.low, f.high, f.errors] for f in reports[0].figures}
    rates = reports[0].spread.rates_at(true["threshold"])
    for name, value, ends, errors in (
        ("FAR@t", rates.far, rates.far_interval, rates.false_accepts),
        ("FRR@t", rates.frr, rates.frr_interval, rates.misses),
    ):
        ours[name] = [value, *(ends or (None, None)), errors]
    start = time.process_time()
    for each in scores:
        points = operating_points(each, label)
        for figure in figures:
            figure.find(points)
    seconds["plain"] = time.process_time() - start
    kept = {"seed": seed, "ours": ours,
            "differences": {d.name: [d.value, d.low, d.high, d.significant] for d in differences},
            "moved": {figure.name: [moved.variance, moved.degrees_of_freedom, moved.bias]
                      for figure, moved in zip(reports[0].figures, reports[0].influences,
                                               strict=True) if moved}}  # fmt: skip
    if seed < case.bootstraps:
        start = time.process_time()
        drawn = [two_way_bootstrap(case, x, replicates, seed) for x in scores]
        seconds["bootstrap"] = time.process_time() - start
        kept["bootstrap"], kept["bootstrap differences"] = {}, {}
        for name, values in drawn[0].items():
            kept["bootstrap"][name] = np.percentile(values, [2.5, 97.5]).tolist()
            ends = np.percentile(drawn[1][name] - values, [2.5, 97.5])
            kept["bootstrap differences"][name] = ends.tolist()
    return kept | {"seconds": seconds}


def table(case_name: str, contributing: float, true: dict, rows: list[dict]) -> list[str]:
    """A line for every figure."""
    lines = []
    beside = [row for row in rows if "bootstrap" in row]
    for name in rows[0]["ours"]:
        value, low, high, errors = (
            np.array([np.nan if row["ours"][name][n] is None else row["ours"][name][n]
                      for row in rows], float) for n in range(4)
        )  # fmt: skip
        spread = value.std()
        full = 2 * 1.96 * spread
        held = (low <= true[name]) & (true[name] <= high)
        worse_high = name.startswith("TAR")  # the truth is worse than the interval says
        flattered = (low > true[name]) if worse_high else (high < true[name])
        harsh = ~held & ~flattered
        cells = [case_name, f"{contributing:.0f}", f"{len(rows)}, {len(beside)}"]
        cells += [name, f"{np.median(errors):,.0f}"]
        if np.isnan(low).all():
            continue
        theirs = [row for row in beside if name in row["bootstrap"]]
        if theirs:
            ends = np.array([row["bootstrap"][name] for row in theirs])
            within = (ends[:, 0] <= true[name]) & (true[name] <= ends[:, 1])
            alarms = np.array([row["bootstrap differences"][name] for row in theirs])
            false = (alarms[:, 0] > 0) | (alarms[:, 1] < 0)
            cells += [f"{100 * within.mean():.1f}",
                      f"{np.median(ends[:, 1] - ends[:, 0]) / full:.2f}",
                      f"{100 * false.mean():.1f}"]  # fmt: skip
        else:
            cells += ["", "", ""]
        cells += [f"**{100 * held.mean():.1f}**", f"{np.median(high - low) / full:.2f}",
                  f"{100 * flattered.mean():.1f} / {100 * harsh.mean():.1f}"]  # fmt: skip
        if name in rows[0]["differences"]:
            moved = np.array([row["differences"][name] for row in rows], float)
            width = np.median(moved[:, 2] - moved[:, 1]) / (2 * 1.96 * moved[:, 0].std())
            cells += [f"{100 * moved[:, 3].mean():.1f}", f"{width:.2f}"]
        else:
            cells += ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


HEAD = (
    "| list | speakers | n: ours, bootstrap | figure | errors "
    "| bootstrap: covered, % | width | false alarms, % "
    "| ours: covered, % | width | truth worse / better, % | false alarms, % "
    "| width of difference |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder, kept between runs")
    parser.add_argument("--voxceleb", type=Path, help="folder with VoxCeleb1's three lists")
    parser.add_argument("--model", choices=MODELS, default="usual", help="of the scores")
    parser.add_argument("--only", nargs="+", help="lists, by name")
    parser.add_argument("--replicates", type=int, default=300, help="of the bootstrap")
    parser.add_argument(
        "--simulations", type=int, help="at most so many of a list; 0 prints what is there"
    )
    parser.add_argument("--quick", action="store_true", help="small lists, 60 simulations")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    model, lines, times = MODELS[args.model], [HEAD], []
    for case in lists(args):
        stem = args.output / f"{args.model}_{case.name}"
        path = stem.with_suffix(".truth.json")
        if not path.is_file():
            path.write_text(json.dumps(truth(case, model)))
        true = json.loads(path.read_text())
        kept = stem.with_suffix(".jsonl")
        rows = [json.loads(line) for line in kept.open()] if kept.is_file() else []
        with kept.open("a") as stream:
            for seed in tqdm(
                range(len(rows), case.simulations), case.name, leave=False, disable=None
            ):
                rows.append(simulation(case, model, seed, true, args.replicates))
                stream.write(json.dumps(rows[-1]) + "\n")
                stream.flush()
        if not rows:
            continue
        name = VOXCELEB.get(case.name, case.name)
        new = table(name, case.structure.contributing, true, rows)
        print("\n".join(new), flush=True)
        lines += new
        seconds = {
            key: np.median([row["seconds"][key] for row in rows if key in row["seconds"]])
            for key in ("plain", "ours", "bootstrap")
        }
        times.append(f"| {name} | {len(case.trials):,} | {len(rows)} | {seconds['plain']:.3f} | "
                     f"{seconds['ours']:.3f} ({seconds['ours'] / seconds['plain']:.1f} x) | "
                     f"{seconds['bootstrap']:.2f} |")  # fmt: skip
    head = (
        "| list | trials | simulations | plain figures of two systems, CPU s | with intervals and "
        f"differences, s | bootstrap of {args.replicates}, s |\n|---|---|---|---|---|---|"
    )
    text = "\n".join([*lines, "", head, *times]) + "\n"
    (args.output / f"{args.model}.md").write_text(text)
    print(f"\n{text}")


if __name__ == "__main__":
    main()
