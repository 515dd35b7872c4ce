"""The report's page: what was compared, what can be said and what cannot, then everything.

One HTML file without network or scripts: readable on a phone, in the dark and on paper.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from speechbrain_qmargin.scoring.breakdown import Breakdown
from speechbrain_qmargin.scoring.decision import OperatingPoint
from speechbrain_qmargin.scoring.figures import Figure
from speechbrain_qmargin.scoring.report import Difference, Report
from speechbrain_qmargin.scoring.shares import Share
from speechbrain_qmargin.scoring.uncertainty import FEWEST_SPEAKERS

__all__ = ["Page", "Provenance", "in_points", "merged_figures", "render"]

T = TypeVar("T", Difference, list[Figure])

_STYLE = """
:root { color-scheme: light dark; --ink: #1d1f21; --dim: #555b61; --line: #d8dbde; --paper: #fff;
  --good: #17643a; --fair: #7a5200; --poor: #a1161d; --card: #f5f6f7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6e8; --dim: #a4abb2; --line: #3a4046; --paper: #16181b; --good: #6fcf97;
    --fair: #e5b454; --poor: #ff8f8a; --card: #202327; }
  img { filter: invert(1) hue-rotate(180deg); }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 70rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; margin-bottom: .2rem; }
table { border-collapse: collapse; margin: .6rem 0 1.2rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 1.2rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; overflow-wrap: normal; }
tbody th { font-weight: 400; white-space: nowrap; } b { font-weight: 700; }
td.n { text-align: right; white-space: nowrap; }
.v, .i, .badge, .t { display: block; white-space: nowrap; } .v { font-size: 1.05em; }
.i, .t, .note, figcaption, dt { color: var(--dim); } .t, .badge { font-size: .86em; }
.note { max-width: 46rem; } figure { margin: 1rem 0; } figcaption { font-size: .9em; }
img { width: 45rem; max-width: 100%; height: auto; }
.summary { background: var(--card); border-radius: .5rem; padding: .2rem 1.2rem .6rem; }
.summary h2 { margin-top: 1rem; } ul { padding-left: 1.2rem; } li { margin: .25rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .6rem 0; }
dd { margin: 0; } code { font-size: .9em; }
.measured { color: var(--good); } .indicative { color: var(--fair); }
.unsupported { color: var(--poor); }
@media (max-width: 44rem) {
  body { margin: 1rem auto; }
  thead { display: none; } table, tbody, tr, th, td { display: block; width: 100%; }
  tr { border-bottom: 1px solid var(--line); padding: .4rem 0; }
  th, td, td.n { border: 0; padding: .1rem 0; text-align: left; white-space: normal; }
  tbody th { white-space: normal; }
  td[data-of]::before { content: attr(data-of) ": "; color: var(--dim); font-size: .86em; }
  td[data-of] .v, td[data-of] .i { display: inline; white-space: normal; margin-right: .5em; }
  dl { grid-template-columns: 1fr; } dt { margin-top: .3rem; }
}
@media print {
  :root { color-scheme: light; --ink: #000; --dim: #444; --line: #bbb; --paper: #fff;
    --good: #17643a; --fair: #7a5200; --poor: #a1161d; --card: #fff; }
  @page { margin: 1.6cm; }
  body { font-size: 10pt; max-width: none; margin: 0; padding: 0; }
  th, td { padding-right: .6rem; } th, td, td.n, tbody th, .v, .i, .badge, .t
    { white-space: normal; }
  img { filter: none; max-height: 20cm; width: auto; }
  h2, h3 { break-after: avoid; } tr, figure, li { break-inside: avoid; }
  .summary { border: 1px solid var(--line); }
}
"""


@dataclass(frozen=True)
class Provenance:
    """Where a report comes from.

    Attributes
    ----------
    date, version, command : str
        When it was made, with which version of the package, by which command line.
    files : mapping from system to str
        The name of its score file with its SHA-256.
    about : mapping from system to mapping from str to str
        What else is known of it: the encoder, the kind of score.
    notes : sequence of str
        What the reader of the trials warned of.

    Examples
    --------
    >>> made = Provenance(command="qmargin report mine.tsv", about={"mine": {"kind": "cosine"}})
    >>> made.about["mine"]["kind"], made.files
    ('cosine', {})
    """

    date: str = ""
    version: str = ""
    command: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Page:
    """All that the page shows.

    Attributes
    ----------
    title : str
    reports : mapping from system to Report
        Of one trial list.
    decisions : mapping from system to OperatingPoint
    differences : mapping from two systems to sequence of Difference
    worst : mapping from system to {"trials", "speakers"}
        Of :mod:`~speechbrain_qmargin.scoring.worst`.
    folder : path
        Where the pictures are.
    pictures : sequence of str
        The names of its PNG files, without their suffix.
    llr : bool
        The scores are log-likelihood ratios.
    breakdowns : mapping from system to sequence of Breakdown
    provenance : Provenance

    Examples
    --------
    >>> page = Page("Mine", {}, {}, {}, {}, Path("report"), ["det", "calibration"])
    >>> page.llr, page.provenance == Provenance()
    (False, True)
    """

    title: str
    reports: Mapping[str, Report]
    decisions: Mapping[str, OperatingPoint]
    differences: Mapping[tuple[str, str], Sequence[Difference]]
    worst: Mapping[str, Mapping]
    folder: Path
    pictures: Sequence[str]
    llr: bool = False
    breakdowns: Mapping[str, Sequence[Breakdown]] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)


# ------------------------------------------------------------------ figures as text


def in_points(difference: Difference) -> str:
    """A difference with its sign: of rates in percentage points.

    Examples
    --------
    >>> in_points(Difference("eer", None, "EER", -0.0123, -0.02, -0.004))
    '-1.23 points (-2.00 to -0.40)'
    """
    values = difference.value, difference.low, difference.high
    if difference.unit == "rate":
        value, low, high = (f"{100 * x:+.2f}" for x in values)
        return f"{value} points ({low} to {high})"
    value, low, high = (f"{x:+.3f}" for x in values)
    return f"{value} ({low} to {high})"


def _distance(difference: Difference) -> str:
    """The same without its sign, where it leaves out zero."""
    ends = sorted((abs(difference.low), abs(difference.high)))
    rate = difference.unit == "rate"
    value, low, high = (
        f"{100 * x:.2f}" if rate else f"{x:.3f}" for x in (abs(difference.value), *ends)
    )
    return f"{value}{' points' if rate else ''} ({low} to {high})"


def merged_figures(reports: Mapping[str, Report]) -> list[tuple[str, list[Figure]]]:
    """The rows of the table, a figure of every system each; the same ones in a row are one.

    Below the data's limit TAR at smaller and smaller FARs is the same figure: no false accept.

    Examples
    --------
    >>> import numpy as np
    >>> from speechbrain_qmargin.scoring.report import evaluate
    >>> from speechbrain_qmargin.trials import LabelledTrials
    >>> ids = ["a/1", "a/2", "b/1", "b/2", "c/1", "c/2", "d/1", "d/2"]
    >>> left, right = np.triu_indices(8, 1)  # 24 impostor trials: a FAR of 0.1 allows 2, 0.01 none
    >>> trials = LabelledTrials(ids, left, right, left // 2 == right // 2)
    >>> scores = np.where(trials.is_target, 0.5, np.linspace(0, 1, 28))
    >>> report = evaluate(scores, trials, fars=[0.1, 0.01, 0.001])
    >>> [name for name, _ in merged_figures({"mine": report})]
    ['EER', 'minDCF(p=0.01)', 'TAR@FAR=0.1', 'TAR@FAR=0.01 to 0.001']
    """
    rows = [
        [report[figure.key] for report in reports.values()]
        for figure in next(iter(reports.values())).figures
    ]

    def content(row: list[Figure]) -> list[tuple]:
        return [(x.value, x.low, x.high, x.threshold, x.misses, x.false_accepts) for x in row]

    return [(_merged_name([row[0] for row in group]), group[0]) for group in _alike(rows, content)]


def _alike(rows: Sequence[T], content: Callable[[T], object]) -> list[list[T]]:
    """Runs of rows of TAR at a FAR that show the same."""
    groups: list[list[T]] = []
    for row in rows:
        first = row[0] if isinstance(row, list) else row
        same = first.kind == "tar_at_far" and groups and content(groups[-1][-1]) == content(row)
        if same:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _merged_name(same: Sequence[Figure | Difference]) -> str:
    more = f" to {same[-1].parameter:g}" if len(same) > 1 else ""
    return same[0].name + more


def _merged_differences(values: Sequence[Difference]) -> list[tuple[str, Difference]]:
    groups = _alike(values, lambda x: (x.value, x.low, x.high))
    return [(_merged_name(group), group[0]) for group in groups]


# ------------------------------------------------------------------ the summary


def _weak(page: Page, pair: tuple[str, str], difference: Difference) -> bool:
    key = difference.kind, difference.parameter
    return any(page.reports[name][key].mark == "unsupported" for name in pair)


def _better(pair: tuple[str, str], difference: Difference) -> str:
    """Which of two is better, by the value."""
    if difference.value == 0:
        return "the same"
    return pair[(difference.value > 0) == difference.higher_is_better] + " better"


def _can_say(page: Page) -> list[str]:
    lines = []
    for name, report in page.reports.items():
        shown = [
            f"{figure.name} {figure.shown}"
            + (f" ({figure.interval})" if figure.interval else "")
            + (", indicative" if figure.mark == "indicative" else "")
            for figure in report.figures
            if figure.mark in ("measured", "indicative")
            and figure.kind in ("eer", "tar_at_far")
            and figure.parameter not in ("step", "nist")
        ]
        if shown:
            lines.append(f"{html.escape(name)}: {html.escape('; '.join(shown))}.")
    for pair, values in page.differences.items():
        for side in pair:
            sure = [
                value
                for value in values
                if value.significant
                and not _weak(page, pair, value)
                and _better(pair, value) == f"{side} better"
                and value.parameter not in ("step", "nist")
            ]
            if sure:
                other = pair[0] if side == pair[1] else pair[1]
                text = "; ".join(f"{value.name} by {_distance(value)}" for value in sure)
                lines.append(
                    f"{html.escape(side)} is better than {html.escape(other)}: {html.escape(text)}."
                )
    return lines or ["Nothing: no figure rests on enough errors of enough speakers."]


def _cannot_say(page: Page) -> list[str]:
    lines = [html.escape(note) for note in page.provenance.notes]
    for name, report in page.reports.items():
        said = [*report.notes, *report.failures()]
        lines += [html.escape(f"{name}: {note}") for note in said if note not in lines]
    first = next(iter(page.reports.values()))
    if first.num_speakers < FEWEST_SPEAKERS:
        lines.append(
            f"The trials are of {first.num_speakers} {first.units}; with fewer than "
            f"{FEWEST_SPEAKERS} nothing is called measured."
        )
    unsure = [
        name
        for name, figures in merged_figures(page.reports)
        if any(figure.mark == "unsupported" for figure in figures)
    ]
    if unsure:
        lines.append(
            f"{html.escape(', '.join(unsure))}: too few errors or too few {first.units} carry "
            'them; marked <span class="unsupported">unsupported</span>.'
        )
    for pair, values in page.differences.items():
        open_ = [
            name
            for name, value in _merged_differences(values)
            if not (value.significant and not _weak(page, pair, value))
            and value.parameter not in ("step", "nist")
        ]
        if open_:
            lines.append(
                f"Whether {html.escape(pair[0])} and {html.escape(pair[1])} differ in "
                f"{html.escape(', '.join(open_))}."
            )
    doubts: dict[str, list[str]] = {}
    for name, point in page.decisions.items():
        if point.optimistic:
            doubts.setdefault(point.doubt, []).append(name)
    for doubt, names in doubts.items():
        lines.append(
            f"How well the threshold of {html.escape(', '.join(names))} would do on other trials: "
            f"it is {html.escape(doubt)}, and the rates at it are optimistic."
        )
    lines.append(
        f"Anything of other {first.units}, channels or languages than those of these trials, or "
        "of another training run of the same encoder."
    )
    return lines


def _summary(page: Page) -> str:
    first, from_ = next(iter(page.reports.values())), page.provenance
    compared = [
        ("trial list", _source(first.source) or "not named"),
        (
            "trials",
            f"{first.num_targets:,} target and {first.num_impostors:,} impostor trials of "
            f"{first.num_speakers:,} {first.units}",
        ),
    ]
    for name in page.reports:
        known = dict(from_.about.get(name, {}))
        known.pop("lost", None)  # which is said in words
        parts = [_source(from_.files.get(name, ""))]
        parts += [f"{html.escape(key)}: {html.escape(str(value))}" for key, value in known.items()]
        compared.append((name, "; ".join(filter(None, parts)) or "scores made in memory"))
    made = [
        ("date", html.escape(from_.date)),
        ("version", html.escape(from_.version)),
        ("command", f"<code>{html.escape(from_.command)}</code>" if from_.command else ""),
    ]
    return "\n".join(
        [
            '<div class="summary">',
            "<h2>What was compared</h2>",
            _terms(compared + [row for row in made if row[1]]),
            "<h2>What can be said</h2>",
            _list(_can_say(page)),
            "<h2>What cannot</h2>",
            _list(_cannot_say(page)),
            "</div>",
        ]
    )


def _unbroken(text: str) -> str:
    """No line ends before a per cent sign."""
    return text.replace(" %", "&nbsp;%")


def _source(source: str) -> str:
    """A file's name, and its hash in small."""
    name, _, digest = source.partition(" sha256:")
    return html.escape(name) + (f" <code>sha256:{html.escape(digest)}</code>" if digest else "")


# ------------------------------------------------------------------ the sections


def _figures(page: Page) -> str:
    rows = []
    for name, figures in merged_figures(page.reports):
        cells = []
        for figure in figures:
            text = [f'<span class="v">{html.escape(figure.shown)}</span>']
            if figure.interval:
                text.append(f'<span class="i">{html.escape(figure.interval)}</span>')
            if figure.errors is not None:
                text.append(
                    f'<span class="badge {figure.mark}">{figure.mark}: {figure.errors:,} '
                    f"error{'' if figure.errors == 1 else 's'}</span>"
                )
            if figure.threshold is not None:
                text.append(f'<span class="t">from score {figure.threshold:.5g}</span>')
            cells.append(_unbroken("\n".join(text)))
        rows.append([html.escape(name), *cells])
    return _table(["", *map(html.escape, page.reports)], rows)


def _differences(page: Page) -> list[str]:
    parts = []
    for pair, values in page.differences.items():
        rows = []
        for name, value in _merged_differences(values):
            weak = _weak(page, pair, value)
            sure = value.significant and not weak
            text = html.escape(in_points(value))
            verdict = html.escape(_better(pair, value))
            if weak:
                verdict = '<span class="unsupported">unsupported</span>'
            elif not sure:
                verdict = "not told apart"
            mark = "<b>{}</b>" if sure else "{}"
            rows.append([html.escape(name), mark.format(text), mark.format(verdict)])
        parts.append(f"<h3>{html.escape(pair[1])} minus {html.escape(pair[0])}</h3>")
        parts.append(
            _table(["", f"difference ({_confidence(page)} interval)", "which is better"], rows)
        )
    return parts


def _confidence(page: Page) -> str:
    return f"{100 * next(iter(page.reports.values())).confidence:g} %"


def _decision(page: Page, name: str, point: OperatingPoint) -> str:
    far_range = "too few people for an interval"
    if point.far_interval is not None:
        far_range = "{:.3g} to {:.3g} %".format(*(100 * end for end in point.far_interval))
    elif point.optimistic:
        far_range = "as asked for, so without an interval"
    tar_range = ""
    if point.tar_interval is not None:
        tar_range = " ({:.2f} to {:.2f} %)".format(*(100 * end for end in point.tar_interval))
    chosen = (
        '<span class="unsupported">Optimistic</span>: the threshold is '
        f"{html.escape(point.doubt)}. Give development scores of other people to choose it on."
        if point.optimistic
        else f"Chosen on {_source(point.chosen_on)}."
    )
    return (
        f"<p>{html.escape(name)}: accept at {point.threshold:.6g} and above, for a FAR of "
        f"{100 * point.far_target:g} %. Here FAR {100 * point.far:.3g} % ({far_range}), TAR "
        f'{100 * point.tar:.2f} %{tar_range}, <span class="{point.mark}">{point.mark}</span>.'
        f" {chosen}</p>"
    )


def _breakdowns(page: Page) -> list[str]:
    parts = []
    for name, tables in page.breakdowns.items():
        for found in tables:
            rows = [
                [html.escape(row.group), _share(row.fmr), _share(row.fnmr)] for row in found.rows()
            ]
            parts.append(f"<h3>{html.escape(name)}, by {html.escape(found.column)}</h3>")
            parts.append(_table(["", "false matches (FMR)", "false non-matches (FNMR)"], rows))
    return parts


def _share(share: Share | None) -> str:
    if share is None:
        return "no such trials"
    return _unbroken(
        f'<span class="v">{100 * share.value:.3g} %</span>\n'
        f'<span class="i">{100 * share.low:.3g} to {100 * share.high:.3g} %</span>\n'
        f'<span class="badge {share.mark}">{share.mark}: {share.errors:,.0f} errors in '
        f"{share.trials:,} trials</span>"
    )


def _worst(page: Page) -> list[str]:
    parts = []
    for name, worst in page.worst.items():
        parts.append(f"<h3>{html.escape(name)}</h3>")
        for kind, label in (
            ("impostors", "Impostors with the highest scores"),
            ("targets", "Targets with the lowest scores"),
        ):
            rows = [
                [f"{row['score']:.4f}", html.escape(row["enrolment"]), html.escape(row["test"])]
                for row in worst["trials"][kind]
            ]
            parts.append(f"<p>{label}</p>")
            parts.append(_table(["score", "enrolment", "test"], rows))
        rows = [
            [
                html.escape(row["speaker"]),
                f"{row['misses']:,} of {row['targets']:,}",
                f"{row['false_accepts']:,} of {row['impostors']:,}",
            ]
            for row in worst["speakers"]
        ]
        parts.append("<p>Those with the largest share of the errors at the decision's threshold")
        parts.append("</p>" + _table(["speaker", "misses", "false accepts"], rows))
    return parts


def render(page: Page) -> str:
    """The page as one HTML document, its pictures inside.

    Raises
    ------
    FileNotFoundError
        A picture that is not in the folder.

    See Also
    --------
    speechbrain_qmargin.scoring.html.write_report : Makes a page, with its pictures.

    Examples
    --------
    >>> import numpy as np
    >>> from speechbrain_qmargin.scoring.decision import choose_operating_point
    >>> from speechbrain_qmargin.scoring.report import evaluate
    >>> from speechbrain_qmargin.trials import LabelledTrials
    >>> ids = ["a/1", "a/2", "b/1", "b/2", "c/1", "c/2", "d/1", "d/2"]
    >>> left, right = np.triu_indices(8, 1)
    >>> trials = LabelledTrials(ids, left, right, left // 2 == right // 2)
    >>> report = evaluate(trials.is_target.astype(float), trials)
    >>> folder, pictures = getfixture("tmp_path"), ["det", "histogram_1", "calibration"]
    >>> for name in pictures:  # as write_report draws them
    ...     _ = (folder / f"{name}.png").write_bytes(b"")
    >>> worst = {"mine": {"trials": {"impostors": [], "targets": []}, "speakers": []}}
    >>> decisions = {"mine": choose_operating_point("mine", report.points, 0.1)}
    >>> page = Page("A & B", {"mine": report}, decisions, {}, worst, folder, pictures)
    >>> "<title>A &amp; B</title>" in render(page)
    True
    """
    title = html.escape(page.title)
    parts = [
        f"<h1>{title}</h1>",
        _summary(page),
        "<h2>Figures</h2>",
        _figures(page),
        f'<p class="note">Intervals are {_confidence(page)}, over people; where fewer than 30 '
        "errors carry a figure, the wider of that and the exact binomial interval. A trial and its "
        "reverse are "
        'one. <span class="measured">measured</span>: 30 errors or more, of 8 people or more; '
        '<span class="indicative">indicative</span>: fewer; <span class="unsupported">unsupported'
        "</span>: fewer than 3 errors or 4 people, the data cannot tell. A trial is accepted when "
        "its score is at or above the threshold. EER by the convex hull of the ROC (<i>step</i>: "
        "at the nearest threshold; <i>nist</i>: linear between thresholds). DCF with its costs, "
        "over the better of accepting and rejecting all. TAR at the largest FAR that does not "
        "exceed the target; targets that no more impostor trials would tell apart are one row.</p>",
    ]
    if page.differences:
        parts += [
            "<h2>Differences</h2>",
            '<p class="note">Paired over people; rates in percentage points. Bold: the interval '
            "leaves out zero and both figures are supported.</p>",
            *_differences(page),
        ]
    parts += [
        "<h2>Detection error trade-off</h2>",
        _picture(page, "det", f"Bands are {_confidence(page)} intervals over people, with each "
                 "system's own hatching. In the shaded region there are fewer than 30 false "
                 "accepts, dashed parts rest on fewer than 30 errors of either kind."),
        "<h2>Decision</h2>",
        *(_decision(page, name, point) for name, point in page.decisions.items()),
    ]  # fmt: skip
    if page.breakdowns:
        parts += [
            "<h2>Groups</h2>",
            f'<p class="note">All groups at the decision\'s threshold, with {_confidence(page)} '
            "intervals over people. A group's rate does not say why: groups differ in their "
            "recordings too.</p>",
            *_breakdowns(page),
        ]
    parts.append("<h2>Scores</h2>")
    for number, name in enumerate(page.reports, 1):
        parts.append(_picture(page, f"histogram_{number}", f"Scores of {name}"))
    parts.append("<h2>Calibration</h2>")
    parts.append(
        _picture(page, "calibration", "What each score is worth as a log-likelihood ratio, by "
                 "pooling adjacent violators"
                 + ("; calibrated scores lie on the dotted line." if page.llr else
                    ". Straight: a linear calibration will do."))
    )  # fmt: skip
    if "bayes_error" in page.pictures:
        parts.append(
            _picture(page, "bayes_error", "What deciding by these log-likelihood ratios costs, "
                     "over deciding without them, at every prior. Above 1 they do harm.")
        )  # fmt: skip
    parts += ["<h2>Worst trials and speakers</h2>", *_worst(page)]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


# ------------------------------------------------------------------ elements; text is escaped


def _picture(page: Page, name: str, caption: str) -> str:
    data = base64.b64encode((page.folder / f"{name}.png").read_bytes()).decode()
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _terms(rows: Sequence[tuple[str, str]]) -> str:
    """Names are text, values are HTML."""
    inside = "\n".join(f"<dt>{html.escape(name)}</dt><dd>{value}</dd>" for name, value in rows)
    return f"<dl>{inside}</dl>"


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "\n".join(f"<li>{line}</li>" for line in lines) + "</ul>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML; the first of a row is its head. On a phone a cell says what it is of."""
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    body = "\n".join(
        f'<tr><th scope="row">{first}</th>'
        + "".join(
            f'<td data-of="{of}">{cell}</td>' for of, cell in zip(heads[1:], cells, strict=True)
        )
        + "</tr>"
        for first, *cells in rows
    )
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
