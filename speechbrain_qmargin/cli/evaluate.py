"""Subcommands that evaluate further: breakdown, fuse, watchlist, bayes, quality, plda."""

from __future__ import annotations

import json
import warnings

import numpy as np
from tqdm import tqdm

from speechbrain_qmargin.cli.inputs import (
    add_cohort,
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
from speechbrain_qmargin.embeddings import load_embeddings, load_mean
from speechbrain_qmargin.files import refuse_overwriting, replacing, write_text
from speechbrain_qmargin.scoring.score_files import write_scores
from speechbrain_qmargin.tables import read_map, read_table
from speechbrain_qmargin.trials import Trials, read_unlabelled, speaker_in

__all__ = ["configure"]

BREAKDOWN = """
    qmargin breakdown scores.tsv --metadata people.csv --by gender --operating_point point.json

All groups are measured at one threshold: the false match rate within and between groups and the
false non-match rate of each, with 95 % intervals over speakers.
"""
FUSE = """
    qmargin fuse a=a.tsv b=b.tsv --dev_scores a=dev_a.tsv --dev_scores b=dev_b.tsv --output ab.tsv

Logistic regression on development scores of other speakers gives each system a weight.
"""
WATCHLIST = """
    qmargin watchlist embeddings.npz gallery.txt probes.txt --sizes 10,100,1000

The recordings in PROBES are searched among the identities in GALLERY. Probes of identities that are
not there make the search open-set: they give the false-positive identification rate (FPIR).
"""
BAYES = """
    qmargin bayes fused=fused.tsv a=calibrated_a.tsv --output bayes_error.png

For every prior, the cost of Bayes decisions relative to deciding without scores, and the minimum
that a perfect calibration would reach. Above 1 the scores do harm.
"""
QUALITY = """
    qmargin quality dev.npz cohort.npz dev_quality.txt

The measure of a recording is the mean of its scores with the nearest cohort entries; give the file
to `qmargin calibrate` and `apply` as --quality cohort=FILE.
"""
PLDA = """
    qmargin plda test.npz trials.txt plda.tsv --train train.npz --rank 100

The scores are log-likelihood ratios. Encoders trained with a margin are made for the cosine, which
PLDA seldom beats.
"""


# ------------------------------------------------------------------ breakdown


def _breakdown(args) -> None:
    from speechbrain_qmargin.scoring.breakdown import breakdown, read_metadata
    from speechbrain_qmargin.scoring.decision import OperatingPoint
    from speechbrain_qmargin.scoring.metrics import operating_points, tar_at_far

    inputs = [args.scores, args.metadata, args.trials, args.operating_point]
    refuse_overwriting([args.output], [*inputs, args.utt2spk, args.models], args.overwrite)
    found = read_scored(args.scores, args, columns_of(args.columns))
    trials = both_classes(found.trials)
    table = read_metadata(args.metadata, args.by, trials)
    if args.operating_point:
        point = OperatingPoint.load(args.operating_point)
        point.refuse_other(**found.origin)
        threshold = point.threshold
    elif args.threshold is not None:
        threshold = args.threshold
    else:
        distinct = trials.distinct
        points = operating_points(distinct.scores(found.scores), distinct.trials.is_target)
        threshold = tar_at_far(points, args.far).threshold
        print(f"threshold {threshold:.6g}, for a FAR of {args.far:g} on these very scores")
    tables = [
        breakdown(
            found.scores,
            trials,
            threshold,
            values,
            column=column,
            relation=args.relation,
            edges=args.edges,
        )
        for column, values in table.items()
    ]
    print("\n\n".join(each.table() for each in tables))
    if args.output:
        content = {
            "trials": trials.source,
            "scores": found.source,
            "columns": [each.to_dict() for each in tables],
        }
        write_text(args.output, json.dumps(content, indent=2) + "\n")


# ------------------------------------------------------------------ fusion


def _fuse(args) -> None:
    from speechbrain_qmargin.scoring.fusion import Fusion, fit_fusion

    inputs = files_of([*args.systems, *args.dev_scores])
    inputs += [args.trials, args.utt2spk, args.models, args.fusion]
    inputs += [args.dev_trials, args.dev_utt2spk, args.dev_models]
    refuse_overwriting([args.output, args.save], inputs, args.overwrite)
    trials, files = read_systems(args.systems, args, labelled=False)
    if args.fusion:
        if args.dev_scores:
            raise ValueError("--fusion is fitted already: leave out --dev_scores, or --fusion")
        fusion = Fusion.load(args.fusion)
    else:
        if not args.dev_scores:
            raise ValueError("give --dev_scores to fit the fusion on, or a --fusion file")
        dev_trials, development = read_development(args, files)
        fusion = fit_fusion(
            {name: read.scores for name, read in development.items()},
            dev_trials,
            p_target=args.p_target,
            origins={name: read.origin for name, read in development.items()},
        )
    origins = {name: read.origin for name, read in files.items()}
    scores = {name: read.scores for name, read in files.items()}
    llrs = fusion.apply(scores, trials, origins=origins)
    if args.save:
        fusion.save(args.save)
    about = {"kind": "llr", "fused": ", ".join(files), "backend": fusion.digest}
    write_scores(args.output, trials, llrs, about)
    print(f"{fusion}\n{args.output}: {len(trials):,} log-likelihood ratios of {trials.source}")


# ------------------------------------------------------------------ identification


def _people(path: str) -> dict[str, str]:
    """``recording`` or ``recording identity`` lines, as a mapping."""
    names, *identities = read_table(path, fewest=1).columns
    if identities:
        return read_map(path)
    if not all("/" in name for name in names):
        raise ValueError(
            f"{path}: ids without a slash do not tell the identity: write 'recording identity'"
        )
    return {name: speaker_in(name) for name in names}


def _watchlist(args) -> None:
    from speechbrain_qmargin.scoring.identification import identify

    inputs = [args.embeddings, args.gallery, args.probes, args.mean]
    refuse_overwriting([args.output], inputs, args.overwrite)
    embeddings = load_embeddings(args.embeddings)
    gallery, probes = _people(args.gallery), _people(args.probes)
    # the embeddings' own ids: one recording may be written with its suffix here, without it there
    enrolled, searched = (
        [embeddings.ids[row] for row in embeddings.rows(list(people), f"recordings of {path}")]
        for people, path in ((gallery, args.gallery), (probes, args.probes))
    )
    both = sorted(set(enrolled) & set(searched))
    if both:
        raise ValueError(
            f"{len(both)} recordings are in the gallery and among the probes, such as {both[0]}: "
            "a probe that finds itself measures nothing"
        )
    mean = load_mean(args.mean, embeddings) if args.mean else None
    with tqdm(unit=" probes", disable=args.quiet) as bar:
        found = identify(
            embeddings.unit(enrolled, mean),
            list(gallery.values()),
            embeddings.unit(searched, mean),
            list(probes.values()),
            ranks=args.ranks,
            fpirs=args.fpirs,
            rank_limit=args.rank_limit,
            sizes=args.sizes,
            combine=args.combine,
            progress=bar.update,
        )
    print(found.table())
    if args.output:
        write_text(args.output, json.dumps(found.to_dict(), indent=2) + "\n")


# ------------------------------------------------------------------ Bayes error, qualities


def _bayes(args) -> None:
    from speechbrain_qmargin.scoring.bayes import bayes_error
    from speechbrain_qmargin.scoring.metrics import operating_points
    from speechbrain_qmargin.scoring.plots import bayes_error_figure, check_picture, save_figure

    inputs = [*files_of(args.systems), args.trials, args.utt2spk, args.models]
    refuse_overwriting([args.output], inputs, args.overwrite)
    check_picture(args.output)
    found, files = read_systems(args.systems, args)
    distinct = both_classes(found).distinct
    is_target = distinct.trials.is_target
    points = {
        name: operating_points(distinct.scores(read.scores), is_target)
        for name, read in files.items()
    }
    wanted = np.log(args.p_target) - np.log1p(-np.asarray(args.p_target))
    print("normalised Bayes error (minimum) at priors of a target trial")
    for name, each in points.items():
        error = bayes_error(each, wanted)
        cells = [
            f"{prior:g}: {actual:.3f} ({least:.3f})"
            for prior, actual, least in zip(args.p_target, error.actual, error.minimum, strict=True)
        ]
        print(f"{name}  {'  '.join(cells)}")
    save_figure(bayes_error_figure(points), args.output)
    print(args.output)


def _quality(args) -> None:
    from speechbrain_qmargin.scoring.lists import Cohort, speakers_in_cohort, with_tables
    from speechbrain_qmargin.scoring.normalisation import cohort_mean_quality

    inputs = [args.embeddings, args.cohort, args.utt2spk, args.cohort_utt2spk]
    refuse_overwriting([args.output], inputs, args.overwrite)
    embeddings, raw = load_embeddings(args.embeddings), load_embeddings(args.cohort)
    embeddings.refuse_other(raw, args.cohort)
    cohort = Cohort.of(
        raw,
        speakers_in_cohort(raw.ids, args.cohort_utt2spk),
        centre=args.subtract_mean,
        all_utterances=args.all_utterances,
    )
    no_pairs = np.empty(0, dtype=np.int64)
    measured = with_tables(Trials(embeddings.ids, no_pairs, no_pairs), args.utt2spk)
    cohort.refuse_speakers_of([measured])
    unit = embeddings.unit(embeddings.ids, cohort.mean)
    values = cohort_mean_quality(unit, cohort.entries.matrix, embeddings.ids, args.top_n)
    with replacing(args.output) as partial, partial.open("w", encoding="utf-8") as stream:
        stream.writelines(f"{name}\t{value!r}\n" for name, value in values.items())
    print(
        f"{args.output}: the mean of the {args.top_n} nearest of {len(cohort.entries):,} cohort "
        f"entries, for {len(values):,} recordings"
    )


def _plda(args) -> None:
    from speechbrain_qmargin.scoring.lists import speakers_in_cohort, with_tables
    from speechbrain_qmargin.scoring.plda import PLDA, fit_plda
    from speechbrain_qmargin.scoring.separation import name_digest, refuse_shared

    inputs = [args.embeddings, args.train, args.trials, args.plda, args.train_utt2spk]
    inputs += [args.utt2spk, args.models]
    refuse_overwriting([args.output, args.save], inputs, args.overwrite)
    trials = with_tables(read_unlabelled(args.trials), args.utt2spk, args.models)
    embeddings = load_embeddings(args.embeddings)
    if args.plda:
        plda = PLDA.load(args.plda)
        note = refuse_shared(trials, plda.speakers, args.plda)
    else:
        if not args.train:
            raise ValueError("give --train embeddings to fit on, or a --plda file")
        train = load_embeddings(args.train)
        embeddings.refuse_other(train, args.train)
        if not args.train_utt2spk and not all("/" in name for name in train.ids):
            raise ValueError(f"{args.train}: its ids do not tell the speakers: --train_utt2spk")
        speakers = speakers_in_cohort(train.ids, args.train_utt2spk)
        note = refuse_shared(trials, map(name_digest, speakers.values()), args.train)
        plda = fit_plda(train, speakers, rank=args.rank, iterations=args.iterations)
    if note:
        warnings.warn(note, stacklevel=2)
    scores = plda.scores(embeddings, trials)
    if args.save:
        plda.save(args.save)
    about = {"kind": "plda", "embeddings": embeddings.source, "encoder": embeddings.encoder,
             "backend": plda.digest}  # fmt: skip
    write_scores(args.output, trials, scores, {k: value for k, value in about.items() if value})
    print(f"{args.output}: {len(trials):,} scores of {trials.source}")


def configure(add) -> None:
    """The subcommands that evaluate further; see :mod:`speechbrain_qmargin.cli`."""

    sub = add("breakdown", _breakdown, BREAKDOWN)
    sub.add_argument("scores", metavar="SCORES", help="a score file")
    sub.add_argument("--metadata", required=True, metavar="FILE", help="table with a header; its "
                     "first column names recordings or speakers")  # fmt: skip
    sub.add_argument("--by", action="append", default=[], metavar="COLUMN", help="a column of the "
                     "metadata; repeatable (default: all)")  # fmt: skip
    sub.add_argument("--relation", default="both", choices=("both", "same"),
                     help="group trials by the values of both sides, or by whether the two are the "
                     "same")  # fmt: skip
    sub.add_argument(
        "--edges", **several(float), help="bin a column of numbers at these, such as 2,5,10"
    )
    at = sub.add_mutually_exclusive_group()
    at.add_argument("--operating_point", metavar="FILE", help="take the threshold from this "
                     "file of `qmargin report`")  # fmt: skip
    at.add_argument("--threshold", type=float, help="the threshold itself")
    at.add_argument("--far", type=share, default=1e-2, help="take the threshold that has this "
                     "false-accept rate on these very scores")  # fmt: skip
    sub.add_argument("--output", help="JSON to write")
    add_overwrite(sub)
    add_scored(sub)

    sub = add("fuse", _fuse, FUSE)
    sub.add_argument("systems", nargs="+", metavar="[NAME=]SCORES", help="a score file of each "
                     "system")  # fmt: skip
    sub.add_argument("--output", required=True, help="score file to write")
    add_overwrite(sub)
    add_dev_scores(sub, "fit on these scores, of other speakers; one for each system")
    sub.add_argument("--fusion", metavar="FILE", help="apply this fusion instead of fitting one")
    sub.add_argument("--save", metavar="FILE", help="JSON to write the fusion to")
    sub.add_argument("--p_target", type=share, default=0.01, help="prior of a target trial that "
                     "weights the fit")  # fmt: skip
    add_scored(sub)

    sub = add("watchlist", _watchlist, WATCHLIST)
    sub.add_argument("embeddings", metavar="EMBEDDINGS", help="npz, npy, ark or scp")
    sub.add_argument("gallery", metavar="GALLERY", help="file of 'recording identity' lines; an "
                     "identity may have several recordings")  # fmt: skip
    sub.add_argument("probes", metavar="PROBES", help="file of 'recording identity' lines")
    sub.add_argument("--mean", metavar="FILE", help="subtract this mean vector, or the mean of "
                     "these embeddings")  # fmt: skip
    sub.add_argument("--ranks", **several(int), default=[1, 5, 10, 20], help="ranks of the rank "
                     "curve")  # fmt: skip
    sub.add_argument("--fpirs", **several(share), default=[0.1, 0.01, 0.001], help="false-positive "
                     "identification rates at which FNIR is given")  # fmt: skip
    sub.add_argument("--rank_limit", type=int, default=1, help="a probe counts as found if its "
                     "identity is among so many of the best")  # fmt: skip
    sub.add_argument("--sizes", **several(int), default=[], help="sizes of smaller watch lists, "
                     "for which the figures are given too")  # fmt: skip
    sub.add_argument("--combine", default="max", choices=("max", "mean"), help="how the scores of "
                     "an identity's recordings become one")  # fmt: skip
    sub.add_argument("--output", help="JSON to write")
    add_overwrite(sub)

    sub = add("bayes", _bayes, BAYES)
    sub.add_argument("systems", nargs="+", metavar="[NAME=]SCORES", help="a score file of each "
                     "system, of log-likelihood ratios")  # fmt: skip
    sub.add_argument("--output", default="bayes_error.png", help="picture to write")
    add_overwrite(sub)
    sub.add_argument("--p_target", **several(share), default=[0.5, 0.05, 0.01, 0.001], 
                     help="priors of a target trial in the printed table")  # fmt: skip
    add_scored(sub)

    sub = add("quality", _quality, QUALITY)
    sub.add_argument("embeddings", metavar="EMBEDDINGS", help="npz, npy, ark or scp")
    sub.add_argument("cohort", metavar="COHORT", help="embeddings of training utterances")
    sub.add_argument(
        "output", metavar="OUTPUT", help="'id value' lines, for calibrate --quality NAME=FILE"
    )
    add_overwrite(sub)
    sub.add_argument("--top_n", type=int, default=300, help="nearest cohort entries that are "
                     "averaged")  # fmt: skip
    sub.add_argument("--utt2spk", metavar="FILE", help="the speaker of each recording, where it is "
                     "not the part of the id before the first slash")  # fmt: skip
    add_cohort(sub)

    sub = add("plda", _plda, PLDA)
    sub.add_argument("embeddings", metavar="EMBEDDINGS", help="npz, npy, ark or scp")
    sub.add_argument("trials", metavar="TRIALS", help="trial list, in any published form")
    sub.add_argument("output", metavar="OUTPUT", help="score file to write")
    add_overwrite(sub)
    add_tables(sub)
    sub.add_argument("--train", metavar="EMBEDDINGS", help="fit on these, of other speakers")
    sub.add_argument("--train_utt2spk", metavar="FILE", help="their speakers (default: the part "
                     "of the id before the first slash)")  # fmt: skip
    sub.add_argument("--rank", type=int, help="rank of the speaker subspace (default: the largest)")
    sub.add_argument(
        "--iterations", type=int, default=10, help="iterations of expectation-maximisation"
    )
    sub.add_argument("--plda", metavar="FILE", help="apply this PLDA instead of fitting one")
    sub.add_argument("--save", metavar="FILE", help="npz to write the fitted PLDA to")
