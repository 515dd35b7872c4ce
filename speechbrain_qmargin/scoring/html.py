"""A report as one HTML page without network, with its pictures as PNG and SVG and its JSON.

:func:`write_report` is the whole of it: DET curves, histograms, operating points, differences
between systems, worst trials and speakers, calibration.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from speechbrain_qmargin.files import replacing, write_text
from speechbrain_qmargin.scoring.decision import choose_operating_point
from speechbrain_qmargin.scoring.metrics import operating_points
from speechbrain_qmargin.scoring.plots import (
    calibration_figure,
    det_figure,
    histogram_figure,
    save_figure,
)
from speechbrain_qmargin.scoring.report import Report, compare, evaluate
from speechbrain_qmargin.scoring.uncertainty import TrialStructure, rate_interval
from speechbrain_qmargin.trials import LabelledTrials

__all__ = ["worst_speakers", "worst_trials", "write_report"]

FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
PRIORS = (0.05, 0.01, 0.001)

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: .6rem 0 1.2rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid #ddd;
  vertical-align: top; white-space: nowrap; }
td.n { text-align: right; } th { font-weight: 600; }
img { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; } .note { color: #555; max-width: 46rem; }
.measured { color: #1b6e3c; } .indicative { color: #8a5a00; } .unsupported { color: #a11; }
"""


def worst_trials(
    scores: np.ndarray, trials: LabelledTrials, count: int = 10
) -> dict[str, list[dict]]:
    """The impostor trials with the highest scores and the target trials with the lowest.

    Returns
    -------
    dict with "impostors" and "targets": lists of {"score", "enrolment", "test"}
    """
    worst = {}
    for kind, sign, chosen in (
        ("impostors", -1, np.flatnonzero(~trials.is_target)),
        ("targets", 1, np.flatnonzero(trials.is_target)),
    ):
        order = chosen[np.argsort(sign * np.asarray(scores)[chosen], kind="stable")[:count]]
        worst[kind] = [
            {
                "score": float(scores[n]),
                "enrolment": trials.ids[trials.enrolment[n]],
                "test": trials.ids[trials.test[n]],
            }
            for n in order.tolist()
        ]
    return worst


def worst_speakers(
    scores: np.ndarray, trials: LabelledTrials, threshold: float, count: int = 10
) -> list[dict]:
    """The speakers with the most errors at a threshold: Doddington's goats and lambs.

    Returns
    -------
    list of {"speaker", "misses", "targets", "false_accepts", "impostors"}
        A false accept counts for both its speakers.
    """
    speakers = trials.speakers()
    size = int(speakers.max()) + 1
    accepted = np.asarray(scores) >= threshold
    target, sides = trials.is_target, (speakers[trials.enrolment], speakers[trials.test])
    targets = np.bincount(sides[0][target], minlength=size)
    misses = np.bincount(sides[0][target & ~accepted], minlength=size)
    impostors = sum(np.bincount(side[~target], minlength=size) for side in sides)
    accepts = sum(np.bincount(side[~target & accepted], minlength=size) for side in sides)
    name = {}
    for speaker, known in zip(speakers.tolist(), trials.speaker_names(), strict=True):
        name.setdefault(speaker, known)  # linked by target trials: the first recording's
    share = misses / max(misses.sum(), 1) + accepts / max(accepts.sum(), 1)
    order = np.argsort(-share, kind="stable")[:count]
    return [
        {
            "speaker": name[speaker],
            "misses": int(misses[speaker]),
            "targets": int(targets[speaker]),
            "false_accepts": int(accepts[speaker]),
            "impostors": int(impostors[speaker]),
        }
        for speaker in order.tolist()
        if share[speaker] > 0
    ]


def write_report(
    folder: str | Path,
    systems: Mapping[str, np.ndarray],
    trials: LabelledTrials,
    *,
    title: str = "Verification report",
    fars: Sequence[float] = FARS,
    priors: Sequence[float] = PRIORS,
    far: float = 1e-2,
    llr: bool = False,
    development: Mapping[str, tuple[np.ndarray, LabelledTrials]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Report]:
    """Evaluate systems on one trial list and write everything there is to see.

    In the folder: ``report.html`` (self-contained), ``report.json``, ``det.png`` and ``.svg``,
    ``histogram_<n>.png``, ``calibration.png``, and an operating point to load in a service:
    ``operating_point.json`` for one system, ``operating_point_<n>.json`` for several.

    Parameters
    ----------
    folder : path
    systems : mapping from name to scores [N]
    trials : LabelledTrials
    title : str
    fars, priors : sequence of float
        Of the table.
    far : float
        Of the operating points.
    llr : bool
        The scores are log-likelihood ratios.
    development : mapping from name to (scores, LabelledTrials), optional
        Where the thresholds of the operating points are chosen; without it they are marked
        optimistic.
    progress : callable, optional
        Called with 1 for every system just evaluated.

    Returns
    -------
    dict from name to Report
    """
    folder = Path(folder)
    reports, decisions, pictures = {}, {}, {}
    structure = TrialStructure.of(trials)
    for name, scores in systems.items():
        reports[name] = evaluate(
            scores,
            trials,
            fars=fars,
            p_target=priors,
            all_eers=True,
            llr=llr,
            structure=structure,
        )
        if progress is not None:
            progress(1)
        held_out = None
        if development and name in development:
            dev_scores, dev_trials = development[name]
            held_out = operating_points(dev_scores, dev_trials.is_target)
        decisions[name] = choose_operating_point(
            name,
            reports[name].points,
            far,
            development=held_out,
            measured_on=trials.source,
            chosen_on=development[name][1].source if held_out else "",
        )
    figure = det_figure({n: (r.points, r.spread) for n, r in reports.items()}, title)
    pictures["det"] = figure
    save_figure(figure, folder / "det.svg")
    for number, (name, report) in enumerate(reports.items(), 1):
        lines = {"EER": report["eer"].threshold, f"FAR {far:g}": decisions[name].threshold}
        pictures[f"histogram_{number}"] = histogram_figure(name, report.points, lines)
    pictures["calibration"] = calibration_figure({n: r.points for n, r in reports.items()}, llr)
    for name, figure in pictures.items():
        save_figure(figure, folder / f"{name}.png")
    for number, decision in enumerate(decisions.values(), 1):
        suffix = "" if len(decisions) == 1 else f"_{number}"
        decision.save(folder / f"operating_point{suffix}.json")

    names = list(reports)
    differences = {
        (first, second): compare(reports[first], reports[second])
        for index, first in enumerate(names)
        for second in names[index + 1 :]
    }
    zoo = {
        name: {
            "trials": worst_trials(scores, trials),
            "speakers": worst_speakers(scores, trials, decisions[name].threshold),
        }
        for name, scores in systems.items()
    }
    content = {
        "title": title,
        "systems": {name: report.to_dict() for name, report in reports.items()},
        "operating_points": {name: asdict(decision) for name, decision in decisions.items()},
        "differences": [
            {"first": first, "second": second, "figures": [asdict(d) for d in values]}
            for (first, second), values in differences.items()
        ],
        "worst": zoo,
    }
    write_text(folder / "report.json", json.dumps(content, indent=2) + "\n")
    page = _page(title, reports, decisions, differences, zoo, folder, trials, llr)
    with replacing(folder / "report.html") as partial:
        partial.write_text(page, encoding="utf-8")
    return reports


def _page(title, reports, decisions, differences, zoo, folder, trials, llr) -> str:
    first = next(iter(reports.values()))
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{first.num_targets:,} target and {first.num_impostors:,} impostor trials of "
        f"{first.num_speakers:,} speakers. {html.escape(trials.source)}</p>",
        '<p class="note">A trial is accepted when its score is at or above the threshold. '
        "Intervals are 95 %, over speakers; where fewer than 30 errors carry a figure, the wider "
        "of that and the exact binomial interval. A trial and its reverse are one. "
        '<b class="measured">measured</b>: 30 errors or more, of 8 speakers or more; '
        '<b class="indicative">indicative</b>: fewer; <b class="unsupported">unsupported</b>: '
        "fewer than 3 errors or 4 speakers, the data cannot tell.</p>",
        "<h2>Detection error trade-off</h2>",
        '<p class="note">Bands are 95 % intervals over speakers. The shaded region has fewer than '
        "30 false accepts, dashed parts fewer than 30 errors of either kind.</p>",
        _picture(folder / "det.png", "DET curves"),
        "<h2>Operating points</h2>",
        '<p class="note">EER by the convex hull of the ROC (<i>step</i>: at the nearest threshold; '
        "<i>nist</i>: linear between thresholds). DCF with costs of 1, over the better of accepting"
        " and rejecting all. TAR at the largest FAR that does not exceed the target.</p>",
    ]
    for name, report in reports.items():
        rows = []
        for figure in report.figures:
            support = figure.support
            shown = "" if figure.errors is None else f"{support}: {figure.errors:,} errors"
            rows.append(
                [
                    figure.name,
                    f"!{figure.shown}",
                    figure.interval,
                    "!" if figure.threshold is None else f"!{figure.threshold:.5g}",
                    (support, shown),
                    _trial_level(figure, report),
                ]
            )
        heads = [
            "",
            "value",
            "95 % interval",
            "threshold",
            "rests on",
            "trials alone",
        ]
        parts += [f"<h3>{html.escape(name)}</h3>", _table(heads, rows)]
    parts.append(
        '<p class="note">The last column is the exact binomial interval of the rate at its fixed '
        "threshold, as usually printed. It takes trials that share speakers for independent and the"
        " threshold for known, and is too narrow.</p>"
    )
    if differences:
        parts.append("<h2>Differences between systems</h2>")
        parts.append(
            '<p class="note">The second minus the first, paired over speakers. '
            "Bold: the interval leaves out zero.</p>"
        )
        for (one, two), values in differences.items():
            shown = reports[one]
            rows = []
            for value in values:
                text = [value.show(v) for v in (value.value, value.low, value.high)]
                key = value.kind, value.parameter
                weak = "unsupported" in (shown[key].support, reports[two][key].support)
                mark = "unsupported" if weak else "measured" if value.significant else ""
                cell = f"{text[0]} ({text[1]} to {text[2]})" + (" unsupported" if weak else "")
                rows.append([value.name, (mark, cell)])
            parts.append(f"<h3>{html.escape(two)} minus {html.escape(one)}</h3>")
            parts.append(_table(["", "difference, 95 % interval"], rows))
    parts.append("<h2>Decision</h2>")
    for name, point in decisions.items():
        rates = reports[name].spread.rates_at(point.threshold)
        far_range, tar_range = "too few speakers for an interval", ""
        if rates.far_interval is not None and rates.frr_interval is not None:
            far_range = "{:.2g} to {:.2g} over speakers".format(*rates.far_interval)
            ends = (100 - 100 * end for end in reversed(rates.frr_interval))
            tar_range = " ({:.2f} to {:.2f})".format(*ends)
        warning = (
            "<b>Optimistic</b>: the threshold was chosen on these very scores; give development "
            "scores to choose it on."
            if point.optimistic
            else f"Chosen on {html.escape(point.chosen_on)}."
        )
        parts.append(
            f"<p><b>{html.escape(name)}</b>: accept at {point.threshold:.6g} and above, for a FAR "
            f"of {point.far_target:g}. Here FAR {point.far:.3g} ({far_range}), TAR "
            f"{100 * point.tar:.2f} %{tar_range}, "
            f'<span class="{point.support}">{point.support}</span>. {warning}</p>'
        )
    parts.append("<h2>Scores</h2>")
    for number, name in enumerate(reports, 1):
        parts.append(_picture(folder / f"histogram_{number}.png", f"Scores of {name}"))
    parts.append("<h2>Calibration</h2>")
    parts.append(
        '<p class="note">What each score is worth as a log-likelihood ratio, by pooling adjacent '
        "violators"
        + ("; calibrated scores lie on the dotted line.</p>" if llr else ". Straight: a linear "
           "calibration will do.</p>")
    )  # fmt: skip
    parts.append(_picture(folder / "calibration.png", "Calibration"))
    parts.append("<h2>Worst trials and speakers</h2>")
    for name, worst in zoo.items():
        parts.append(f"<h3>{html.escape(name)}</h3>")
        for kind, label in (
            ("impostors", "Impostors with the highest scores"),
            ("targets", "Targets with the lowest scores"),
        ):
            rows = [
                [f"!{row['score']:.4f}", row["enrolment"], row["test"]]
                for row in worst["trials"][kind]
            ]
            parts.append(f"<p>{label}</p>" + _table(["score", "enrolment", "test"], rows))
        rows = [
            [
                row["speaker"],
                f"!{row['misses']:,} of {row['targets']:,}",
                f"!{row['false_accepts']:,} of {row['impostors']:,}",
            ]
            for row in worst["speakers"]
        ]
        parts.append("<p>Speakers with the largest share of the errors at the decision's threshold")
        parts.append("</p>" + _table(["speaker", "misses", "false accepts"], rows))
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _trial_level(figure, report: Report) -> str:
    if figure.kind != "tar_at_far":
        return ""
    low, high = rate_interval(figure.misses, report.num_targets)
    return f"{figure.show(1 - high)} to {figure.show(1 - low)}"


def _picture(path: Path, text: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{html.escape(text)}" src="data:image/png;base64,{data}" width="720"></p>'


def _table(heads: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Cells are text, "!" before a number to align right, or (class, text) for a badge."""

    def cell(value) -> str:
        if isinstance(value, tuple):
            mark, text = value
            shown = html.escape(text)
            return f'<td><b class="{mark}">{shown}</b></td>' if mark else f"<td>{shown}</td>"
        if value.startswith("!"):
            return f'<td class="n">{html.escape(value[1:])}</td>'
        return f"<td>{html.escape(value)}</td>"

    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "\n".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>\n{body}</table></div>'
