"""What IJB-C costs at its full size, beside the plain way, and whether its intervals hold.

    python benchmarks/ijb.py              some minutes; writes 2.2 GB to a temporary folder
    python benchmarks/ijb.py coverage     the intervals' coverage, by simulation
    python benchmarks/ijb.py search       1:N at IJB-C's size, beside the whole table of scores
    python benchmarks/ijb.py search_coverage    its intervals' coverage, by simulation

The protocol is simulated at its size, in the official text format: 469,375 images of 23,124
templates (a gallery template of each of 3,531 subjects, 19,593 probes), 15,658,489 pairs of which
19,557 are genuine. Both ways run in a process of their own: seconds and the most memory of every
step (VmHWM, of Linux: everything, with the 1.9 GB of the embeddings' file while it is mapped).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SUBJECTS, TEMPLATES, IMAGES = 3_531, 23_124, 469_375
GENUINE, PAIRS, DIM = 19_557, 15_658_489, 512
FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


# ------------------------------------------------------------------ data


def write_protocol(folder: Path) -> None:
    """Meta files, and image embeddings as npy [M, 2, D]; 40 dimensions carry the identity."""
    rng = np.random.default_rng(0)
    meta = folder / "meta"
    meta.mkdir()
    probes = TEMPLATES - SUBJECTS
    subject = np.append(np.arange(SUBJECTS), rng.integers(SUBJECTS, size=probes))
    number = rng.permutation(200_000)[:TEMPLATES]  # the templates' numbers

    linked = SUBJECTS + rng.permutation(probes)[:GENUINE]
    codes = np.unique(rng.integers(SUBJECTS * probes, size=int(1.2 * PAIRS)))
    codes = codes[codes // probes != subject[SUBJECTS + codes % probes]]
    codes = rng.permutation(codes)[: PAIRS - GENUINE]
    left = np.append(subject[linked], codes // probes)
    right = np.append(linked, SUBJECTS + codes % probes)
    same = np.arange(PAIRS) < GENUINE
    order = np.argsort(left, kind="stable")
    left, right, same = number[left[order]], number[right[order]], same[order]
    with (meta / "ijbc_template_pair_label.txt").open("w") as stream:
        for start in range(0, PAIRS, 10**6):
            part = slice(start, start + 10**6)
            columns = (x[part].tolist() for x in (left, right, same))
            stream.writelines(f"{a} {b} {c:d}\n" for a, b, c in zip(*columns, strict=True))

    template = np.append(
        np.arange(TEMPLATES), rng.choice(TEMPLATES, IMAGES - TEMPLATES, p=_shares(rng))
    )
    template.sort()
    media = template * 10 + rng.integers(4, size=IMAGES)
    points = rng.uniform(30, 90, size=(IMAGES, 10)).round(3)
    score = rng.beta(20, 1, size=IMAGES)
    with (meta / "ijbc_face_tid_mid.txt").open("w") as stream:
        stream.writelines(f"{i + 1}.jpg {number[t]} {media[i]}\n" for i, t in enumerate(template))
    with (meta / "ijbc_name_5pts_score.txt").open("w") as stream:
        stream.writelines(
            f"{i + 1}.jpg {' '.join(map(str, row))} {score[i]:.3f}\n"
            for i, row in enumerate(points.tolist())
        )

    people = rng.standard_normal((SUBJECTS, 40), dtype=np.float32)
    hardness = rng.lognormal(0.35, 0.5, size=TEMPLATES).astype(np.float32)
    directions = np.linalg.qr(rng.standard_normal((DIM, 40)))[0].T.astype(np.float32)
    shape = (IMAGES, 2, DIM)
    array = np.lib.format.open_memmap(folder / "embeddings.npy", "w+", np.float32, shape)
    shift = hardness[:, None] * rng.standard_normal((TEMPLATES, 40), dtype=np.float32)
    for start in range(0, IMAGES, 2**14):
        of = template[start : start + 2**14]
        noise = rng.standard_normal((2, len(of), 40), dtype=np.float32)
        pose = people[subject[of]] + 0.35 * shift[of] + 0.5 * noise[0]
        array[start : start + 2**14, 0] = pose @ directions
        array[start : start + 2**14, 1] = (pose + 0.3 * noise[1]) @ directions


def _shares(rng) -> np.ndarray:
    """Most templates are a still, some are videos of hundreds of frames."""
    size = rng.pareto(1.2, size=TEMPLATES)
    return size / size.sum()


# ------------------------------------------------------------------ contenders
# Each yields the name of a step that it has just done.


def ours(folder: Path):
    from speechbrain_qmargin.faces.ijb import (
        ImageEmbeddings,
        pair_cosines,
        read_ijb,
        template_embeddings,
    )
    from speechbrain_qmargin.scoring.report import evaluate

    yield "imports"
    protocol = read_ijb(folder)
    yield "meta files"
    both = np.load(folder / "embeddings.npy", mmap_mode="r")
    unit = template_embeddings(protocol, ImageEmbeddings(both[:, 0], both[:, 1]))
    del both  # the mapped file
    yield "templates"
    scores = pair_cosines(protocol, unit)
    yield "pairs"
    report = evaluate(scores, protocol.trials, fars=FARS)
    yield "figures and intervals"
    for figure in report.figures:
        print(f"  {figure.name} {figure.shown} [{figure.interval}] {figure.mark}")


def plain(folder: Path):
    """The plain way of the usual script, without its faults: loops, float64, roc_curve."""
    from sklearn.metrics import roc_curve

    yield "imports"
    faces = [x.split() for x in (folder / "meta/ijbc_face_tid_mid.txt").open()]
    template, media = np.array([x[1:] for x in faces], dtype=int).T
    score = [x.split()[-1] for x in (folder / "meta/ijbc_name_5pts_score.txt").open()]
    pairs = np.loadtxt(folder / "meta/ijbc_template_pair_label.txt", dtype=int)
    yield "meta files"
    both = np.load(folder / "embeddings.npy")
    fused = (both[:, 0] + both[:, 1]) * np.asarray(score, dtype=np.float32)[:, None]
    numbers = np.unique(template)
    rows = np.zeros((len(numbers), DIM))
    for index, number in enumerate(numbers):
        (of,) = np.where(template == number)
        for medium in np.unique(media[of]):
            rows[index] += fused[of][media[of] == medium].mean(axis=0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    yield "templates"
    place = np.zeros(numbers.max() + 1, dtype=int)
    place[numbers] = np.arange(len(numbers))
    scores = np.zeros(len(pairs))
    for start in range(0, len(pairs), 100_000):
        part = pairs[start : start + 100_000]
        scores[start : start + 100_000] = (rows[place[part[:, 0]]] * rows[place[part[:, 1]]]).sum(1)
    yield "pairs"
    far, tar, _ = roc_curve(pairs[:, 2], scores)
    at = [int(np.flatnonzero(far <= rate)[-1]) for rate in FARS]
    yield "figures, no intervals"
    print("  " + ", ".join(f"{100 * tar[i]:.2f} %" for i in at))


# ------------------------------------------------------------------ measuring


def most_memory() -> float:
    """The most memory of this process in MB, since the last call."""
    lines = Path("/proc/self/status").read_text().splitlines()
    most = next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return most


def worker(name: str, folder: Path) -> None:
    start, steps = time.perf_counter(), {}
    for step in globals()[name](folder):
        steps[step] = time.perf_counter() - start, most_memory()
        start = time.perf_counter()
    del steps["imports"]
    print(json.dumps(steps))


def cost() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_protocol(Path(folder))
        print("| | step | seconds | most memory |\n|---|---|---|---|")
        for name in ("ours", "plain"):
            command = [sys.executable, __file__, "--worker", name, folder]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            *figures, last = output.splitlines()
            steps = json.loads(last)
            seconds, most = zip(*steps.values(), strict=True)
            steps["all"] = sum(seconds), max(most)
            for step, (seconds, most) in steps.items():
                print(f"| {name} | {step} | {seconds:.1f} | {most:,.0f} MB |")
            print("\n".join(figures), flush=True)


# ------------------------------------------------------------------ coverage


def coverage(simulations: int = 200) -> None:
    """How often the 95 % intervals hold the truth, which is known: Gaussian scores.

    A gallery template and 5 probes a subject, a fifth of all pairs, as in IJB-C. A pair's score is
    the sum of both subjects' effects, the probe's effect and noise; all but the noise are shared
    between pairs. Beside it: genuine pairs alone (Clopper-Pearson of the TAR, as usually meant).
    """
    from scipy.stats import norm
    from tqdm import tqdm

    from speechbrain_qmargin.scoring.report import evaluate
    from speechbrain_qmargin.scoring.uncertainty import rate_interval
    from speechbrain_qmargin.trials import LabelledTrials

    print("| subjects | effects | figure | covered | pairs alone | median width: ours, alone |")
    print("|---|---|---|---|---|---|")
    probes = 5
    for subjects in (100, 400):
        of_probe = np.repeat(np.arange(subjects), probes)
        ids = [str(i) for i in range(subjects + len(of_probe))]
        for effect in (0.0, 0.3):
            fars = (1e-2, 1e-3)
            rows = {far: [] for far in fars}
            for seed in tqdm(range(simulations), f"{subjects}, {effect}", leave=False):
                rng = np.random.default_rng([seed, subjects, int(10 * effect)])
                keep = rng.random((subjects, len(of_probe))) < 0.2
                keep[of_probe, np.arange(len(of_probe))] = True
                gallery, probe = np.nonzero(keep)
                same = gallery == of_probe[probe]
                person, image = rng.normal(size=subjects), rng.normal(size=len(of_probe))
                shared = person[gallery] + person[of_probe[probe]] + image[probe]
                scores = effect * shared + rng.normal(size=len(same)) + 3 * same
                trials = LabelledTrials(ids, gallery, subjects + probe, same)
                report = evaluate(scores, trials, fars=fars)
                # the same person twice in a genuine pair, so its variance is larger
                wide, wider = np.sqrt([1 + 3 * effect**2, 1 + 5 * effect**2])
                for far in fars:
                    truth = norm.sf((wide * norm.isf(far) - 3) / wider)
                    figure = report["tar_at_far", far]
                    assert figure.misses is not None
                    assert figure.low is not None
                    assert figure.high is not None
                    genuine = int(same.sum())
                    low, high = rate_interval(genuine - figure.misses, genuine)
                    rows[far].append(
                        (
                            figure.low <= truth <= figure.high,
                            low <= truth <= high,
                            figure.high - figure.low,
                            high - low,
                        )
                    )
            for far, values in rows.items():
                held, alone, width, narrow = np.asarray(values, dtype=float).T
                print(
                    f"| {subjects} | {effect} | TAR@FAR={far:g} | {100 * held.mean():.1f} % | "
                    f"{100 * alone.mean():.1f} % | {100 * np.median(width):.1f} % and "
                    f"{100 * np.median(narrow):.1f} % |",
                    flush=True,
                )


# ------------------------------------------------------------------ 1:N


def search() -> None:
    """19,593 probes in a gallery of 1,772 of 3,531 subjects, 512-d, as in IJB-C."""
    from speechbrain_qmargin.scoring.identification import identify

    rng = np.random.default_rng(0)
    people = rng.standard_normal((SUBJECTS, DIM), dtype=np.float32)

    def unit(of: np.ndarray) -> np.ndarray:
        rows = people[of] + 2.2 * rng.standard_normal((len(of), DIM), dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    of_gallery, of_probe = np.arange(1_772), rng.integers(SUBJECTS, size=TEMPLATES - SUBJECTS)
    gallery, probes = unit(of_gallery), unit(of_probe)
    print("| 1:N | seconds | most memory |\n|---|---|---|")
    for name, sizes in (
        ("the whole list", ()),
        ("and lists of 10, 100 and 1,000", (10, 100, 1000)),
    ):
        most_memory()
        start = time.perf_counter()
        found = identify(gallery, of_gallery, probes, of_probe, sizes=sizes)
        print(f"| {name} | {time.perf_counter() - start:.1f} | {most_memory():,.0f} MB |")
    print(found.table())
    most_memory()
    start = time.perf_counter()
    scores = probes @ gallery.T  # the plain way: ranks alone, no intervals
    mated = np.flatnonzero(of_probe < len(gallery))
    order = np.argsort(-scores[mated], axis=1)
    at_one = (order[:, 0] == of_probe[mated]).mean()
    print(f"| plain: a sort of all scores | {time.perf_counter() - start:.1f} | "
          f"{most_memory():,.0f} MB |\nrank 1 by it: {100 * at_one:.2f} %")  # fmt: skip


def search_coverage(simulations: int = 200) -> None:
    """How often the intervals hold the mean over 100 other worlds of the same kind.

    Every world has its own people, some of them harder than others; three probes of each, half of
    the people in the list.
    """
    from tqdm import tqdm

    from speechbrain_qmargin.scoring.identification import identify

    def world(seed: int, people: int):
        rng = np.random.default_rng([seed, people])
        centres = rng.normal(size=(people, 12))
        spread = np.exp(0.3 * rng.normal(size=(people, 1)))

        def take(of: np.ndarray) -> np.ndarray:
            rows = centres[of] + 0.9 * spread[of] * rng.normal(size=(len(of), 12))
            return rows / np.linalg.norm(rows, axis=1, keepdims=True)

        members, everybody = np.arange(people // 2), np.repeat(np.arange(people), 3)
        sizes = (people // 4,)
        found = identify(take(members), members, take(everybody), everybody, ranks=(1, 5),
                         fpirs=(0.1,), sizes=sizes)  # fmt: skip
        half, whole = found.open_set
        return {
            "rank 1": found.cmc[1],
            "rank 5": found.cmc[5],
            "FNIR at FPIR 0.1, half the list": half.fnir,
            "FNIR at FPIR 0.1": whole.fnir,
        }

    print("| people | figure | covered | median width |\n|---|---|---|---|")
    for people in (40, 120, 400):
        others = [world(1000 + seed, people) for seed in range(100)]
        truth = {name: np.mean([x[name].value for x in others]) for name in others[0]}
        rows = [world(seed, people) for seed in tqdm(range(simulations), str(people), leave=False)]
        for name, true in truth.items():
            held = np.mean([x[name].low <= true <= x[name].high for x in rows])
            width = np.median([x[name].high - x[name].low for x in rows])
            print(f"| {people} | {name} | {100 * held:.1f} % | {100 * width:.1f} % |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "part", nargs="?", default="cost", choices=("cost", "coverage", "search", "search_coverage")
    )
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker[0], Path(arguments.worker[1]))
    else:
        globals()[arguments.part]()
