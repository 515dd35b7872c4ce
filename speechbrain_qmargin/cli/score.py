"""The ``qmargin`` command: cosine, normalize, calibrate, apply, report."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from speechbrain_qmargin.embeddings import Embeddings, cosine_scores, load_embeddings
from speechbrain_qmargin.scoring.score_files import read_scores, write_scores
from speechbrain_qmargin.trials import Trials, read_map, read_trials, speaker_in

__all__ = ["configure"]


def _trials(args) -> Trials:
    trials = read_trials(args.trials)
    return trials.with_speakers(read_map(args.utt2spk)) if args.utt2spk else trials


def _mean(args) -> np.ndarray | None:
    return load_embeddings(args.mean).matrix.mean(axis=0) if args.mean else None


def _done(path, trials) -> None:
    print(f"{path}: {len(trials):,} scores of {trials.source}")


def _cosine(args) -> None:
    trials = _trials(args)
    write_scores(
        args.output, trials, cosine_scores(load_embeddings(args.embeddings), trials, _mean(args))
    )
    _done(args.output, trials)


def _normalize(args) -> None:
    from speechbrain_qmargin.scoring.normalisation import (
        make_cohort,
        normalize,
        refuse_shared_speakers,
    )

    trials = _trials(args)
    raw = load_embeddings(args.cohort)
    speakers = read_map(args.cohort_utt2spk) if args.cohort_utt2spk else None
    if speakers is None and all("/" in name for name in raw.ids):
        speakers = {name: speaker_in(name) for name in raw.ids}
    refuse_shared_speakers(
        (speakers or {name: name for name in raw.ids}).values(), trials.speaker_names()
    )
    mean = raw.matrix.mean(axis=0) if args.subtract_mean else None
    cohort = make_cohort(raw, None if args.utterances else speakers, mean=mean)
    print(
        f"cohort: {len(cohort):,} {'speakers' if speakers and not args.utterances else 'entries'}"
    )
    with tqdm(total=None, unit=" recordings", disable=args.quiet) as bar:
        scores = normalize(
            load_embeddings(args.embeddings),
            trials,
            cohort,
            method=args.method,
            top_n=args.top_n,
            mean=mean,
            progress=bar.update,
        )
    write_scores(args.output, trials, scores)
    _done(args.output, trials)


def _qualities(given: list[str], embeddings: str | None) -> dict[str, dict[str, float]]:
    """``name=file`` of ``id value`` lines; durations enter as logarithms."""
    qualities = {}
    for item in given:
        name, _, path = item.partition("=")
        if not path:
            raise ValueError(f"--quality {item!r}: expected NAME=FILE")
        values = read_map(path, float)
        if name == "duration":
            bad = [key for key, value in values.items() if value <= 0]
            if bad:
                raise ValueError(f"{path}: the duration of {bad[0]} is not positive")
            values = {key: math.log(value) for key, value in values.items()}
        qualities[name] = values
    if embeddings:
        loaded: Embeddings = load_embeddings(embeddings)
        norms = np.linalg.norm(loaded.matrix, axis=1)
        qualities["norm"] = dict(zip(loaded.ids, norms.tolist(), strict=True))
    return qualities


def _scored(path: str, args) -> tuple[Trials, np.ndarray]:
    trials = read_trials(args.trials) if args.trials else None
    trials, scores = read_scores(path, trials, args.columns)
    return (trials.with_speakers(read_map(args.utt2spk)) if args.utt2spk else trials), scores


def _calibrate(args) -> None:
    from speechbrain_qmargin.scoring.calibration import fit_calibration

    trials, scores = _scored(args.scores, args)
    qualities = _qualities(args.quality, args.norm_of)
    calibration = fit_calibration(scores, trials, qualities, p_target=args.p_target)
    calibration.save(args.output)
    terms = zip(calibration.features, calibration.weights, strict=True)
    print(" ".join(f"{weight:+.4g} {name}" for name, weight in terms), f"{calibration.offset:+.4g}")


def _apply(args) -> None:
    from speechbrain_qmargin.scoring.calibration import Calibration

    trials, scores = _scored(args.scores, args)
    qualities = _qualities(args.quality, args.norm_of)
    llrs = Calibration.load(args.calibration).apply(scores, trials, qualities)
    write_scores(args.output, trials, llrs)
    _done(args.output, trials)


def _import(place: str) -> None:
    """Run the user's own module, by its name or its file, so that it registers its figures."""
    if not place.endswith(".py"):
        importlib.import_module(place)
        return
    path = Path(place)
    if not path.is_file():
        raise FileNotFoundError(f"--figures_from: {path} does not exist")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)


def _report(args) -> None:
    from speechbrain_qmargin.scoring.html import write_report

    for place in args.figures_from:
        _import(place)

    systems, trials, development = {}, None, {}
    for given in args.systems:
        name, _, path = given.rpartition("=")
        name = name or Path(path).stem
        if name in systems:
            raise ValueError(f"two systems are called {name}: write NAME=FILE")
        if trials is None:
            trials, systems[name] = _scored(path, args)
        else:
            _, systems[name] = read_scores(path, trials, args.columns)
    for given in args.development:
        name, _, path = given.rpartition("=")
        name = name or next(iter(systems))
        if name not in systems:
            raise ValueError(f"--development {given!r}: no system is called {name}")
        dev_trials, dev_scores = read_scores(
            path, read_trials(args.development_trials) if args.development_trials else None,
            args.columns,
        )  # fmt: skip
        development[name] = dev_scores, dev_trials
    with tqdm(total=len(systems), unit=" systems", disable=args.quiet) as bar:
        reports = write_report(
            args.output,
            systems,
            trials,
            title=args.title,
            far=args.far,
            llr=args.llr,
            development=development,
            progress=bar.update,
        )
    for name, report in reports.items():
        print(f"\n{name}\n{report.table()}")
    print(f"\n{args.output}: report.html, report.json, pictures, operating_point*.json")


def configure(add) -> None:
    """The subcommands that score trials; see :mod:`speechbrain_qmargin.cli`."""

    def embedded(sub):
        sub.add_argument("embeddings", help="npz, npy, ark or scp")
        sub.add_argument("trials", help="VoxCeleb or Kaldi trial list")
        sub.add_argument("output", help="score file to write")
        sub.add_argument("--utt2spk", help="speakers of the recordings, where ids do not tell")

    def scored(sub):
        sub.add_argument("--trials", help="trial list, for scores without labels")
        sub.add_argument("--columns", help="order of columns without a header, as 'enrolment "
                         "test label score' (SpeechBrain)")  # fmt: skip
        sub.add_argument("--utt2spk", help="speakers of the recordings, where ids do not tell")

    def measured(sub):
        sub.add_argument("--quality", action="append", default=[], metavar="NAME=FILE",
                         help="a quality measure, 'id value' lines; 'duration' enters as a "
                         "logarithm")  # fmt: skip
        sub.add_argument("--norm_of", metavar="EMBEDDINGS", help="embedding norm as a measure")

    sub = add("cosine", _cosine)
    embedded(sub)
    sub.add_argument("--mean", metavar="EMBEDDINGS", help="subtract the mean of these")

    sub = add("normalize", _normalize)
    embedded(sub)
    sub.add_argument("cohort", help="embeddings of training utterances")
    sub.add_argument("--cohort_utt2spk", help="by default the part of an id before its slash")
    sub.add_argument("--utterances", action="store_true", help="not speaker means")
    sub.add_argument("--method", default="as", choices=("as", "as-cross", "s", "z", "t"))
    sub.add_argument("--top_n", type=int, default=300)
    sub.add_argument("--subtract_mean", action="store_true", help="the cohort's, from everything")

    sub = add("calibrate", _calibrate)
    sub.add_argument("scores")
    sub.add_argument("output", help="calibration JSON to write")
    scored(sub)
    measured(sub)
    sub.add_argument("--p_target", type=float, default=0.01)

    sub = add("apply", _apply)
    sub.add_argument("calibration")
    sub.add_argument("scores")
    sub.add_argument("output")
    scored(sub)
    measured(sub)

    sub = add("report", _report)
    sub.add_argument("systems", nargs="+", metavar="[NAME=]SCORES")
    sub.add_argument("--output", default="report", help="folder to write")
    scored(sub)
    sub.add_argument("--title", default="Verification report")
    sub.add_argument("--far", type=float, default=1e-2, help="of the operating point")
    sub.add_argument("--llr", action="store_true", help="scores are log-likelihood ratios")
    sub.add_argument("--development", action="append", default=[], metavar="[NAME=]SCORES",
                     help="choose the threshold on these")  # fmt: skip
    sub.add_argument("--development_trials")
    sub.add_argument("--figures_from", action="append", default=[], metavar="MODULE",
                     help="your Python module or file that registers figures")  # fmt: skip
