"""What scoring costs beside the usual tools; whether its intervals hold is benchmarks/intervals.py.

    python benchmarks/scoring.py                    everything, some minutes
    python benchmarks/scoring.py metrics ijbc       some parts

Every contender runs in a process of its own: median seconds of its repetitions, and its peak memory
beyond the data it is given. The baselines are other libraries, or, where named "style", the plain
way that a widely used script goes, written here.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import scipy.optimize  # noqa: F401 (imported later by what is measured, without this)

from speechbrain_qmargin.scoring import metrics as our

TRIALS, SMALL = 10_000_000, 37_611  # the latter is VoxCeleb1-O's size
FARS = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6]
PRIORS = [0.1, 0.05, 0.01]
RECORDINGS, COHORT, DIM, TOP = 150_000, 6_000, 192, 300
H_RECORDINGS, H_TRIALS = 137_924, 550_000  # VoxCeleb1-H's size
IMAGES, TEMPLATES, PAIRS, FACE_DIM = 469_375, 23_000, 15_658_489, 512  # IJB-C's size


# ------------------------------------------------------------------ data


def scores_of(count: int, seed: int = 0, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Scores of which 1 % are targets."""
    rng = np.random.default_rng(seed)
    is_target = np.zeros(count, dtype=bool)
    is_target[: count // 100] = True
    scores = rng.normal(size=count)
    scores[is_target] += 3
    order = rng.permutation(count)
    scores, is_target = scores[order], is_target[order]
    return (scores.round(1) if ties else scores), is_target


def unit_rows(count: int, dim: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dim), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def trials_of(count: int, speakers: int):
    """Trials of random speakers, two recordings each; 1 % targets."""
    from speechbrain_qmargin.trials import LabelledTrials

    rng = np.random.default_rng(1)
    is_target = np.arange(count) % 100 == 0
    first = rng.integers(speakers, size=count)
    second = (first + rng.integers(1, speakers, size=count) * ~is_target) % speakers
    ids = [f"s{i // 2:04}/{i % 2}" for i in range(2 * speakers)]
    return LabelledTrials(ids, 2 * first, 2 * second + 1, is_target)


# ------------------------------------------------------------------ contenders
# Each makes its data and returns what is to be timed.


def all_metrics(scores, is_target):
    points = our.operating_points(scores, is_target)
    return (
        [our.eer(points, method) for method in our.EER_METHODS]
        + [our.min_dcf(points, prior) for prior in PRIORS]
        + [our.tar_at_far(points, far).tar for far in FARS]
        + [our.min_cllr(points)]
    )


def metrics_ours(count=TRIALS):
    data = scores_of(count)
    return lambda: all_metrics(*data)


def metrics_30m():
    return metrics_ours(3 * TRIALS)


def metrics_scikit():
    from sklearn.metrics import roc_curve

    scores, is_target = scores_of(TRIALS)
    return lambda: roc_curve(is_target, scores)


def small_ours():
    return metrics_ours(SMALL)


def small_speechbrain(count=SMALL):
    import torch
    from speechbrain.utils.metric_stats import EER, minDCF

    scores, is_target = scores_of(count)
    positive = torch.tensor(scores[is_target], dtype=torch.float32)
    negative = torch.tensor(scores[~is_target], dtype=torch.float32)
    return lambda: (EER(positive, negative), minDCF(positive, negative))


def small_speechbrain_third():
    return small_speechbrain(SMALL // 3)


def norm_ours():
    import torch  # noqa: F401

    from speechbrain_qmargin.scoring.normalisation import cohort_statistics

    rows, cohort = unit_rows(RECORDINGS, DIM, 0), unit_rows(COHORT, DIM, 1)
    return lambda: cohort_statistics(rows, cohort, TOP)


def norm_full_sort():
    rows, cohort = unit_rows(RECORDINGS, DIM, 0), unit_rows(COHORT, DIM, 1)

    def full_sort():
        top = np.sort(rows @ cohort.T, axis=1)[:, -TOP:]
        return top.mean(1), top.std(1)

    return full_sort


def _h_sized():
    from speechbrain_qmargin.embeddings import Embeddings
    from speechbrain_qmargin.trials import LabelledTrials

    rows, cohort = unit_rows(H_RECORDINGS, DIM, 0), unit_rows(5_994, DIM, 1)
    left, right = np.random.default_rng(2).integers(H_RECORDINGS, size=(2, H_TRIALS))
    ids = [f"s{i % 1251}/{i}" for i in range(H_RECORDINGS)]
    trials = LabelledTrials(ids, left, right, np.zeros(H_TRIALS, bool))
    return Embeddings(ids, rows), trials, Embeddings(map(str, range(len(cohort))), cohort)


def asnorm_ours():
    import torch  # noqa: F401  # its import is not what is measured

    from speechbrain_qmargin.scoring.normalisation import normalize

    data = _h_sized()
    return lambda: normalize(*data, top_n=TOP)


def asnorm_script(share=20):
    """As WeSpeaker's scripts go: a cosine a trial, a full sort for each side, a loop over lines.

    On 1/20 of the trials and of the recordings, scaled.
    """
    from sklearn.metrics.pairwise import cosine_similarity

    embeddings, trials, cohort = _h_sized()
    sides = trials.enrolment[::share], trials.test[::share]
    used = [np.unique(side)[::share] for side in (trials.enrolment, trials.test)]

    def script():
        start = time.perf_counter()
        statistics = []
        for recordings in used:
            table = np.sort(embeddings.matrix[recordings] @ cohort.matrix.T, axis=1)[:, ::-1]
            statistics.append((table[:, :TOP].mean(1), table[:, :TOP].std(1)))
        lines = []
        for trial, (e, t) in enumerate(zip(*sides, strict=True)):
            a, b = embeddings.matrix[e], embeddings.matrix[t]
            cosine = cosine_similarity(a.reshape(1, -1), b.reshape(1, -1))[0][0]
            score = 0.0
            for mean, std in statistics:
                score += 0.5 * (cosine - mean[trial % len(mean)]) / std[trial % len(std)]
            norms = np.linalg.norm(a), np.linalg.norm(b)
            name = f"{trials.ids[e]} {trials.ids[t]}"
            lines.append(f"{name} {score:.5f} {norms[0]:.4f} {norms[1]:.4f}\n")
        return share * (time.perf_counter() - start)

    return script


def asnorm_speechbrain_style(count=60):
    """The cohort's scores anew for both sides of every trial; on 60 trials, scaled."""
    import torch

    embeddings, trials, cohort = _h_sized()
    rows, entries = torch.from_numpy(embeddings.matrix), torch.from_numpy(cohort.matrix)
    similarity = torch.nn.CosineSimilarity(dim=-1)

    def loop():
        start = time.perf_counter()
        for e, t in zip(trials.enrolment[:count], trials.test[:count], strict=True):
            score = similarity(rows[e], rows[t])
            parts = []
            for side in (rows[e], rows[t]):
                against = similarity(side.repeat(len(entries), 1), entries)
                top = torch.topk(against, TOP).values
                parts.append((score - top.mean()) / top.std())
            (parts[0] + parts[1]).item()
        return (time.perf_counter() - start) * H_TRIALS / count

    return loop


def _three_systems(speakers=1_251):
    trials = trials_of(TRIALS, speakers)
    rng = np.random.default_rng(3)
    effect = 0.2 * rng.normal(size=len(trials.ids))
    common = effect[trials.enrolment] + effect[trials.test] + 3 * trials.is_target
    systems = [(common + rng.normal(size=TRIALS)).astype(np.float32) for _ in range(3)]
    return systems, trials


def three_plain():
    systems, trials = _three_systems()
    return lambda: [all_metrics(scores, trials.is_target) for scores in systems]


def three_intervals():
    from speechbrain_qmargin.scoring.influence import TrialStructure
    from speechbrain_qmargin.scoring.uncertainty import Spread

    systems, trials = _three_systems()
    points = [our.operating_points(scores, trials.is_target) for scores in systems]

    def intervals():
        structure = TrialStructure.of(trials)
        moved = []
        for scores, each in zip(systems, points, strict=True):
            spread = Spread(scores, trials, each, structure)
            moved.append(
                [spread.eer(), *map(spread.min_dcf, PRIORS), *map(spread.tar_at_far, FARS)]
            )
        own = [[one.interval(0.1) for one in system] for system in moved]
        paired = [
            [(two - one).interval(0.1) for one, two in zip(moved[0], other, strict=True)]
            for other in moved[1:]
        ]
        return own, paired

    return intervals


def ijbc_ours():
    from speechbrain_qmargin.embeddings import pair_products
    from speechbrain_qmargin.scoring.normalisation import class_means

    rng = np.random.default_rng(0)
    images = rng.standard_normal((IMAGES, FACE_DIM), dtype=np.float32)
    template = np.concatenate(
        [np.arange(TEMPLATES), rng.integers(TEMPLATES, size=IMAGES - TEMPLATES)]
    )
    left, right = rng.integers(TEMPLATES, size=(2, PAIRS))
    is_target = rng.random(PAIRS) < 0.001

    def templates_to_metrics():
        means = class_means(images, template, TEMPLATES)
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        return all_metrics(pair_products(means, left, right), is_target)

    return templates_to_metrics


# ------------------------------------------------------------------ measuring


def memory(key: str) -> float:
    """VmRSS (now) or VmHWM (the most) of this process, in MB; of Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(key))


def worker(name: str, repetitions: int) -> None:
    run = globals()[name]()
    given = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the most, from here on
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        result = run()
        taken = time.perf_counter() - start
        # a contender that measured a share of its work returns the seconds of the whole
        seconds.append(result if isinstance(result, float) else taken)
    print(json.dumps([statistics.median(seconds), memory("VmHWM") - given, memory("VmHWM")]))


def measured(name: str, repetitions: int = 3) -> tuple[float, float]:
    command = [sys.executable, __file__, "--worker", name, str(repetitions)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, extra, whole = json.loads(output.splitlines()[-1])
    print(f"| {name} | {seconds:.3g} s | {extra:,.0f} MB | {whole:,.0f} MB |", flush=True)
    return seconds, extra


def bar(text: str, met: bool) -> None:
    print(f"| -> {text}: {'met' if met else 'NOT MET'} | | | |", flush=True)


def metrics() -> None:
    ours, ours_mb = measured("metrics_ours", 5)
    theirs, theirs_mb = measured("metrics_scikit")
    large, large_mb = measured("metrics_30m")
    bar(f"{theirs / ours:.1f} x faster than roc_curve (bar 5)", theirs / ours >= 5)
    bar(f"{ours_mb / theirs_mb:.2f} of its memory (bar 0.25)", ours_mb / theirs_mb <= 0.25)
    bar(f"30 M: {large / ours:.2f} x the time (bar 4)", large / ours <= 4)
    bar(f"30 M: {large_mb:,.0f} MB beyond the scores (bar 500)", large_mb <= 500)


def speechbrain() -> None:
    ours, _ = measured("small_ours", 15)
    third, _ = measured("small_speechbrain_third", 1)
    bar(f"{third / ours:,.0f} x faster than SpeechBrain on a third of the trials", third > ours)
    free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) / 1e6
    if free < 20:
        print(f"| small_speechbrain wants 18 GB, {free:.0f} GB are free: x 9 of the third | | | |")
        theirs = 9 * third
    else:
        theirs, _ = measured("small_speechbrain", 1)
    bar(f"{theirs / ours:,.0f} x faster (bar 1,000)", theirs / ours >= 1000)

    import torch
    from speechbrain.utils.metric_stats import EER, minDCF

    scores, is_target = scores_of(2_000)
    scores = scores.astype(np.float32)
    positive, negative = (torch.tensor(scores[mask]) for mask in (is_target, ~is_target))
    points = our.operating_points(scores, is_target)
    found = {"EER": EER(positive, negative)[0], "minDCF": minDCF(positive, negative)[0]}
    wanted = {"EER": our.eer(points, "step"), "minDCF": 0.01 * our.min_dcf(points)}
    for name, theirs in found.items():
        print(
            f"| {name} of 2,000 trials: SpeechBrain {theirs:.6f}, ours {wanted[name]:.6f} | | | |"
        )


def agreement() -> None:
    """The largest differences from scikit-learn and llreval (pip install llreval)."""
    from llreval.cllr import cllr as their_cllr  # pyright: ignore[reportMissingImports]
    from llreval.cllr import min_cllr as their_min_cllr  # pyright: ignore[reportMissingImports]
    from llreval.pav_rocch import PAV, ROCCH  # pyright: ignore[reportMissingImports]
    from sklearn.metrics import roc_curve

    for ties in (False, True):
        gaps = {"roc_curve": 0.0, "llreval": 0.0}
        for seed in range(5):
            scores, is_target = scores_of(100_000, seed, ties)
            points = our.operating_points(scores, is_target)
            far, tar, _ = roc_curve(is_target, scores, drop_intermediate=False)
            found = [our.tar_at_far(points, rate).tar for rate in FARS]
            found += [our.min_dcf(points, prior) for prior in PRIORS]
            wanted = [tar[far <= rate + 1e-12].max() for rate in FARS]
            wanted += [(p * (1 - tar) + (1 - p) * far).min() / min(p, 1 - p) for p in PRIORS]
            gap = np.abs(np.subtract(found, wanted)).max()
            gaps["roc_curve"] = max(gaps["roc_curve"], gap)
            targets, impostors = scores[is_target], scores[~is_target]
            found = [our.eer(points), our.cllr(points), our.min_cllr(points)]
            pav = PAV(scores, is_target.astype(int))
            wanted = [ROCCH(pav).EER(), their_cllr(targets, impostors), their_min_cllr(pav)]
            gaps["llreval"] = max(gaps["llreval"], np.abs(np.subtract(found, wanted)).max())
        for name, gap in gaps.items():
            kind = "with ties" if ties else "without ties"
            bar(f"{name}, {kind}: differs by {gap:.1e} (bar 1e-9)", gap <= 1e-9)


def statistics_of_cohort() -> None:
    ours, ours_mb = measured("norm_ours")
    theirs, _ = measured("norm_full_sort", 2)
    bar(f"{theirs / ours:.1f} x faster than a full sort (bar 4)", theirs / ours >= 4)
    bar(f"{ours_mb:,.0f} MB beyond the embeddings (bar 300)", ours_mb <= 300)


def asnorm() -> None:
    ours, _ = measured("asnorm_ours")
    script, _ = measured("asnorm_script", 1)
    loop, _ = measured("asnorm_speechbrain_style", 1)
    bar(f"{script / ours:.1f} x faster than a WeSpeaker-style script (bar 10)", script / ours >= 10)
    bar(f"{loop / ours:,.0f} x faster than a cohort per trial (bar 100)", loop / ours >= 100)


def intervals() -> None:
    plain, _ = measured("three_plain")
    ours, _ = measured("three_intervals")
    bar(f"{ours / plain:.1f} x the plain metrics of the three (bar 15)", ours / plain <= 15)


def ijbc() -> None:
    run = [sys.executable, __file__, "--worker", "ijbc_ours", "1"]
    output = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    seconds, extra, whole = json.loads(output.splitlines()[-1])
    print(f"| ijbc_ours | {seconds:.3g} s | {extra:,.0f} MB | {whole:,.0f} MB |")
    bar(f"{seconds:.0f} s (bar 60)", seconds <= 60)
    bar(f"{whole:,.0f} MB with the embeddings (bar 3,000)", whole <= 3000)


PARTS = {
    "metrics": metrics,
    "speechbrain": speechbrain,
    "agreement": agreement,
    "cohort": statistics_of_cohort,
    "asnorm": asnorm,
    "intervals": intervals,
    "ijbc": ijbc,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--worker", nargs=2, metavar=("CONTENDER", "REPETITIONS"))
    args = parser.parse_args()
    if args.worker:
        worker(args.worker[0], int(args.worker[1]))
        return
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    for name in args.parts or PARTS:
        print(f"\n{name}\n\n| | seconds | beyond its data | peak |\n|---|---|---|---|", flush=True)
        PARTS[name]()


if __name__ == "__main__":
    main()
