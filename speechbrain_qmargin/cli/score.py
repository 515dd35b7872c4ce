"""Subcommands that score trials: cosine, normalize, calibrate, apply, score, report."""

from __future__ import annotations

import importlib
import importlib.util
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from speechbrain_qmargin.cli.inputs import (
    add_cohort,
    add_cohort_utt2spk,
    add_dev_scores,
    add_overwrite,
    add_scored,
    add_tables,
    both_classes,
    columns_of,
    files_of,
    read_development,
    read_scored,
    read_systems,
    several,
    share,
)
from speechbrain_qmargin.embeddings import (
    ENROLMENT_RULES,
    Embeddings,
    cosine_scores,
    load_embeddings,
    load_mean,
)
from speechbrain_qmargin.files import refuse_overwriting
from speechbrain_qmargin.scoring.html import FARS, PRIORS
from speechbrain_qmargin.scoring.normalisation import METHODS, top_of
from speechbrain_qmargin.scoring.score_files import write_scores
from speechbrain_qmargin.tables import file_source, read_map
from speechbrain_qmargin.trials import Trials, read_unlabelled

__all__ = ["configure"]

COSINE = """
    qmargin cosine embeddings.npz veri_test2.txt cosine.tsv
"""
NORMALIZE = """
    qmargin normalize embeddings.npz veri_test2.txt asnorm.tsv cohort.npz --top_n 300

The cohort are speakers who are in no trial, usually those that the encoder was trained on.
"""
CALIBRATE = """
    qmargin calibrate dev_cosine.tsv calibration.json
    qmargin apply calibration.json test_cosine.tsv test_llr.tsv

Logistic regression turns scores into natural log-likelihood ratios.
"""
APPLY = """
    qmargin apply calibration.json test_cosine.tsv test_llr.tsv

Refused for scores of another kind than the calibration was fitted on, and for its own speakers.
"""
SCORE = """
    qmargin score embeddings.npz veri_test2.txt list_test_hard2.txt --cohort cohort.npz

Does what cosine, normalize, calibrate and apply do, for several lists at once. OUTPUT gets the
scores, figures and DET plot of each list.
"""
REPORT = """
    qmargin report cosine=test.tsv --dev_scores cosine=dev.tsv --far 0.01 --output report

The folder gets report.html, plots, report.json and operating_point.json, whose threshold is chosen
on the development scores, or else on the scores themselves, which is optimistic. Score files of
SpeechBrain, WeSpeaker, 3D-Speaker, NIST and others are read as they are.
"""


def _trials(args, embeddings: Embeddings) -> Trials:
    """The list with its tables, without the recordings that failed, where that is allowed."""
    from speechbrain_qmargin.scoring.lists import with_tables

    trials = with_tables(read_unlabelled(args.trials), args.utt2spk, args.models)
    if args.missing == "leave_out":
        lost = embeddings.missing(trials.recordings)
        if lost:
            trials = trials.without(lost)
            print(trials.lost)
            if not len(trials):
                raise ValueError(f"{trials.name}: no trial has both its embeddings")
    return trials


def _done(path: str, trials: Trials) -> None:
    print(f"{path}: {len(trials):,} scores of {trials.source}")


def _cosine(args) -> None:
    inputs = [args.embeddings, args.trials, args.utt2spk, args.models, args.mean]
    refuse_overwriting([args.output], inputs, args.overwrite)
    embeddings = load_embeddings(args.embeddings)
    trials = _trials(args, embeddings)
    mean = load_mean(args.mean, embeddings) if args.mean else None
    scores = cosine_scores(embeddings, trials, mean, args.enrolment)
    about = {"kind": "cosine", "embeddings": embeddings.source, "encoder": embeddings.encoder}
    if args.mean:
        about |= {"kind": "centred cosine", "mean": file_source(args.mean)}
    write_scores(args.output, trials, scores, _enrolled(about, args, trials))
    _done(args.output, trials)


def _enrolled(about: dict[str, str], args, trials: Trials) -> dict[str, str]:
    """What a score file says, with the enrolment where there are models."""
    return {key: value for key, value in about.items() if value} | (
        {"enrolment": args.enrolment} if trials.models else {}
    )


def _normalize(args) -> None:
    from speechbrain_qmargin.scoring.lists import Cohort, speakers_in_cohort

    inputs = [args.embeddings, args.trials, args.utt2spk, args.models, args.mean, args.cohort]
    refuse_overwriting([args.output], [*inputs, args.cohort_utt2spk], args.overwrite)
    embeddings, raw = load_embeddings(args.embeddings), load_embeddings(args.cohort)
    embeddings.refuse_other(raw, args.cohort)
    trials = _trials(args, embeddings)
    cohort = Cohort.of(
        raw,
        speakers_in_cohort(raw.ids, args.cohort_utt2spk),
        args.score_norm,
        args.top_n,
        centre=args.subtract_mean or bool(args.mean),
        mean=load_mean(args.mean, embeddings) if args.mean else None,
        all_utterances=args.all_utterances,
    )
    of = "utterances" if args.all_utterances else "speakers"
    print(f"cohort: {len(cohort.entries):,} {of}")
    scores = cohort.scores(embeddings, trials, args.enrolment, quiet=args.quiet)
    about = {"kind": cohort.kind, "embeddings": embeddings.source, "cohort": cohort.source}
    about |= {"cohort_file": raw.source, "encoder": embeddings.encoder}
    if args.mean:
        about["mean"] = file_source(args.mean)
    if top := top_of(args.score_norm, args.top_n):
        about["top_n"] = str(top)
    write_scores(args.output, trials, scores, _enrolled(about, args, trials))
    _done(args.output, trials)


def _quality_files(args) -> list[str | None]:
    return [args.norm_of, *(item.partition("=")[2] for item in args.quality)]


def _qualities(given: Sequence[str], embeddings: str | None) -> dict[str, dict[str, float]]:
    """``name=file`` of ``id value`` lines; durations enter as logarithms."""
    qualities = {}
    for item in given:
        name, _, path = item.partition("=")
        if not name or not path:
            raise ValueError(f"--quality {item!r}: expected NAME=FILE")
        if name in qualities or (name == "norm" and embeddings):
            raise ValueError(f"--quality {item!r}: there is another quality of the name {name}")
        values = read_map(path, float)
        if name == "duration":
            bad = [key for key, value in values.items() if value <= 0]
            if bad:
                raise ValueError(f"{path}: the duration of {bad[0]} is not positive")
            values = {key: math.log(value) for key, value in values.items()}
        qualities[name] = values
    if embeddings:
        loaded = load_embeddings(embeddings)
        norms = np.linalg.norm(loaded.matrix, axis=1)
        qualities["norm"] = dict(zip(loaded.ids, norms.tolist(), strict=True))
    return qualities


def _calibrate(args) -> None:
    from speechbrain_qmargin.scoring.calibration import fit_calibration

    inputs = [args.scores, args.trials, args.utt2spk, args.models, *_quality_files(args)]
    refuse_overwriting([args.output], inputs, args.overwrite)
    read = read_scored(args.scores, args, columns_of(args.columns))
    qualities = _qualities(args.quality, args.norm_of)
    trials = both_classes(read.trials)
    calibration = fit_calibration(
        read.scores, trials, qualities, p_target=args.p_target, **read.origin
    )
    calibration.save(args.output)
    print(f"{args.output}: {calibration}")


def _apply(args) -> None:
    from speechbrain_qmargin.scoring.calibration import Calibration

    inputs = [args.calibration, args.scores, args.trials, args.utt2spk, args.models]
    refuse_overwriting([args.output], [*inputs, *_quality_files(args)], args.overwrite)
    read = read_scored(args.scores, args, columns_of(args.columns))
    qualities = _qualities(args.quality, args.norm_of)
    calibration = Calibration.load(args.calibration)
    llrs = calibration.apply(read.scores, read.trials, qualities, **read.origin)
    about = dict(read.about) | {"kind": "llr", "calibration": file_source(args.calibration)}
    about |= {"backend": calibration.digest} | ({"of": read.kind} if read.kind else {})
    write_scores(args.output, read.trials, llrs, about)
    _done(args.output, read.trials)


def _score(args) -> None:
    from speechbrain_qmargin.scoring.lists import score_files

    given = vars(args)
    names = [action for action in given if action not in ("command", "run")]
    score_files(**{name: given[name] for name in names})


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
    from tqdm import tqdm

    from speechbrain_qmargin.scoring.breakdown import read_metadata
    from speechbrain_qmargin.scoring.html import report_files, write_report
    from speechbrain_qmargin.scoring.page import Provenance
    from speechbrain_qmargin.scoring.plots import check_picture

    inputs = files_of([*args.systems, *args.dev_scores])
    inputs += [args.trials, args.utt2spk, args.models, args.dev_trials]
    inputs += [args.dev_utt2spk, args.dev_models, args.metadata]
    outputs = [Path(args.output) / name for name in report_files(len(args.systems))]
    refuse_overwriting(outputs, inputs, args.overwrite)
    check_picture(outputs[0].with_name("det.png"))
    for place in args.figures_from:
        _import(place)
    found, systems = read_systems(args.systems, args)
    trials = both_classes(found)
    metadata = read_metadata(args.metadata, args.by, trials) if args.metadata else None
    kinds = {name: read.kind for name, read in systems.items()}
    for name, kind in kinds.items():
        if args.llr and kind not in ("", "llr"):
            raise ValueError(f"--llr: the scores of {name} are {kind} scores; calibrate them first")
    llr = args.llr or all(kind == "llr" for kind in kinds.values())
    development = {}
    if args.dev_scores:
        dev_trials, dev_files = read_development(args, systems)
        development = {name: (read.scores, dev_trials) for name, read in dev_files.items()}
    provenance = Provenance(
        command=shlex.join(["qmargin", *sys.argv[1:]]),
        files={name: read.source for name, read in systems.items()},
        about={name: dict(read.about) for name, read in systems.items()},
    )
    with tqdm(total=len(systems), unit=" systems", disable=args.quiet) as bar:
        reports = write_report(
            args.output,
            {name: read.scores for name, read in systems.items()},
            trials,
            title=args.title,
            fars=args.fars,
            p_target=args.p_target,
            far=args.far,
            c_miss=args.c_miss,
            c_fa=args.c_fa,
            confidence=args.confidence,
            llr=llr,
            development=development,
            metadata=metadata,
            provenance=provenance,
            lost={name: read.lost for name, read in systems.items()},
            progress=bar.update,
        )
    for name, report in reports.items():
        print(f"\n{name}\n{report.table()}")
    print(f"\n{args.output}: report.html, report.json, pictures, operating_point*.json")


def configure(add) -> None:
    """The subcommands that score trials; see :mod:`speechbrain_qmargin.cli`."""

    def enrolled(sub):
        sub.add_argument("--enrolment", choices=ENROLMENT_RULES, default="embedding",
                         help="score a model by the mean of its recordings' unit embeddings, or by "
                         "the mean of their scores")  # fmt: skip

    def embedded(sub):
        sub.add_argument("embeddings", metavar="EMBEDDINGS", help="npz, npy, ark or scp")
        sub.add_argument("trials", metavar="TRIALS", help="trial list, in any published form")
        sub.add_argument("output", metavar="OUTPUT", help="score file to write")
        add_tables(sub)
        add_overwrite(sub)
        enrolled(sub)
        sub.add_argument("--missing", choices=("error", "leave_out"), default="error",
                         help="recordings without an embedding are an error, or their trials are "
                         "left out and reported as failures to acquire")  # fmt: skip

    def measured(sub):
        sub.add_argument("--quality", action="append", default=[], metavar="NAME=FILE",
                         help="file of 'id value' lines with a quality measure; repeatable. The "
                         "measure named duration enters as its logarithm")  # fmt: skip
        sub.add_argument("--norm_of", metavar="EMBEDDINGS", help="use the norm of these embeddings "
                         "as a quality measure")  # fmt: skip

    def costs(sub, fars, priors):
        sub.add_argument("--fars", **several(share), default=fars, help="false-accept rates of "
                         "TAR@FAR")  # fmt: skip
        sub.add_argument("--p_target", **several(share), default=priors, help="priors of a target "
                         "trial, for minDCF and actDCF")  # fmt: skip
        sub.add_argument("--c_miss", type=float, default=1.0, help="cost of a miss")
        sub.add_argument("--c_fa", type=float, default=1.0, help="cost of a false accept")
        sub.add_argument("--confidence", type=share, default=0.95, help="confidence of the "
                         "intervals")  # fmt: skip

    sub = add("cosine", _cosine, COSINE)
    embedded(sub)
    sub.add_argument("--mean", metavar="FILE", help="subtract this mean vector, or the mean of "
                     "these embeddings")  # fmt: skip

    sub = add("normalize", _normalize, NORMALIZE)
    embedded(sub)
    sub.add_argument(
        "cohort", metavar="COHORT", help="embeddings of training utterances, or of speakers"
    )
    add_cohort(sub)
    sub.add_argument("--score_norm", default="as", choices=METHODS, help="kind of normalisation")
    sub.add_argument("--top_n", type=int, default=300, help="nearest cohort entries, for the "
                     "adaptive methods")  # fmt: skip
    sub.add_argument(
        "--mean",
        metavar="FILE",
        help="subtract this mean vector, or the mean of these embeddings, instead of the cohort's",
    )

    sub = add("calibrate", _calibrate, CALIBRATE)
    sub.add_argument(
        "scores", metavar="SCORES", help="development scores, of other speakers than the test's"
    )
    sub.add_argument("output", metavar="OUTPUT", help="calibration JSON to write")
    add_overwrite(sub)
    add_scored(sub)
    measured(sub)
    sub.add_argument("--p_target", type=share, default=0.01, help="prior of a target trial that "
                     "weights the fit")  # fmt: skip

    sub = add("apply", _apply, APPLY)
    sub.add_argument("calibration", metavar="CALIBRATION", help="what `qmargin calibrate` wrote")
    sub.add_argument("scores", metavar="SCORES", help="scores of the same kind")
    sub.add_argument(
        "output", metavar="OUTPUT", help="score file to write, of log-likelihood ratios"
    )
    add_overwrite(sub)
    add_scored(sub)
    measured(sub)

    sub = add("score", _score, SCORE)
    sub.add_argument("embeddings", metavar="EMBEDDINGS", help="npz, npy, ark or scp")
    sub.add_argument(
        "trials", metavar="TRIALS", nargs="+", help="trial lists; each gets its own table"
    )
    sub.add_argument(
        "--output", metavar="OUTPUT", dest="output_folder", default="scores", help="folder to write"
    )
    add_overwrite(sub)
    add_tables(sub)
    enrolled(sub)
    sub.add_argument("--cohort", metavar="EMBEDDINGS", help="normalise scores against these")
    add_cohort_utt2spk(sub)
    sub.add_argument("--score_norm", default="as", choices=METHODS, help="kind of normalisation")
    sub.add_argument("--top_n", type=int, default=300, help="nearest speakers of the cohort, for "
                     "the adaptive methods")  # fmt: skip
    sub.add_argument("--dev_trials", metavar="FILE", help="calibrate on this list, of other "
                     "speakers")  # fmt: skip
    sub.add_argument("--dev_embeddings", metavar="EMBEDDINGS", help="embeddings of its recordings, "
                     "if they are not in EMBEDDINGS")  # fmt: skip
    sub.add_argument("--dev_utt2spk", metavar="FILE", help="its speakers (default: those of "
                     "--utt2spk)")  # fmt: skip
    sub.add_argument("--dev_models", metavar="FILE", help="its models (default: those of "
                     "--models)")  # fmt: skip
    costs(sub, FARS[:4], PRIORS[:2])

    sub = add("report", _report, REPORT)
    sub.add_argument("systems", nargs="+", metavar="[NAME=]SCORES", help="a score file of each "
                     "system")  # fmt: skip
    sub.add_argument("--output", default="report", help="folder to write")
    add_overwrite(sub)
    add_scored(sub)
    sub.add_argument("--title", default="Verification report", help="heading of the page")
    sub.add_argument("--far", type=share, default=1e-2, help="false-accept rate at which the "
                     "operating point's threshold is chosen")  # fmt: skip
    costs(sub, FARS, PRIORS)
    sub.add_argument("--llr", action="store_true", help="the scores are log-likelihood ratios")
    add_dev_scores(sub, "choose the system's threshold on these scores, of other speakers")
    sub.add_argument("--metadata", metavar="FILE", help="table with a header: error rates by the "
                     "groups in its columns")  # fmt: skip
    sub.add_argument("--by", action="append", default=[], metavar="COLUMN",
                     help="a column of the metadata; repeatable (default: all)")  # fmt: skip
    sub.add_argument("--figures_from", action="append", default=[], metavar="MODULE",
                     help="your Python module or file that registers figures")  # fmt: skip
