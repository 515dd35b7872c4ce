"""Scores to figures with honest intervals, as a table for people and JSON for programs.

Every interval is over speakers (:mod:`~speechbrain_qmargin.scoring.uncertainty`). Where a figure
rests on fewer than 30 errors that is too narrow (at no errors it has no width), so the wider of it
and Clopper-Pearson is given and the figure is marked: measured (30 errors or more of 8 speakers or
more), indicative, unsupported (fewer than 3 errors or 4 speakers). Errors are counted over
distinct unordered pairs of recordings.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import numpy as np

from speechbrain_qmargin.scoring.figures import (
    Figure,
    Measure,
    figure_of,
    registered,
    show,
    standard_figures,
)
from speechbrain_qmargin.scoring.influence import Influence, TrialStructure
from speechbrain_qmargin.scoring.metrics import OperatingPoints, eer, operating_points
from speechbrain_qmargin.scoring.uncertainty import Spread, mark_of, widened
from speechbrain_qmargin.trials import LabelledTrials, Lost

__all__ = ["FARS", "Difference", "Report", "compare", "evaluate"]

FARS = (1e-1, 1e-2, 1e-3)


@dataclass(frozen=True)
class Report:
    """The figures of one system on one trial list.

    ``report["eer"]`` is the :class:`~speechbrain_qmargin.scoring.figures.Figure` of a kind,
    ``report["tar_at_far", 0.01]`` that of a kind and parameter; where there is none it is a
    KeyError that names those there are. `influences` holds what every speaker contributes to each
    figure, None where a figure has no interval.

    Attributes
    ----------
    num_targets, num_impostors, num_speakers : int
        Of distinct pairs. Where the speakers are not known (`speakers_known`), `num_speakers` and
        `units` are of the groups of recordings that target trials link.
    confidence : float
        Of the intervals.
    notes : tuple of str
        What the reader must know: scores that seem inverted, speakers that are not known.
    lost : Lost or None
        Failures to acquire and to enrol.

    Examples
    --------
    >>> ids = ["a/1", "a/2", "b/1", "b/2", "c/1", "c/2", "d/1", "d/2"]
    >>> left, right = np.triu_indices(8, 1)  # 4 target and 24 impostor trials
    >>> trials = LabelledTrials(ids, left, right, left // 2 == right // 2)
    >>> report = evaluate(trials.is_target.astype(float), trials)
    >>> report["eer"].value, report["tar_at_far", 0.01].shown
    (0.0, '100.00 % (unsupported)')
    """

    figures: list[Figure]
    num_targets: int
    num_impostors: int
    num_speakers: int
    points: OperatingPoints = field(repr=False)
    spread: Spread = field(repr=False)
    influences: list[Influence | None] = field(repr=False)
    source: str = ""
    units: str = "speakers"
    speakers_known: bool = True
    confidence: float = 0.95
    notes: tuple[str, ...] = ()
    lost: Lost | None = None

    def __getitem__(self, key: str | tuple[str, float | str | None]) -> Figure:
        kind, parameter = (key, None) if isinstance(key, str) else key
        for figure in self.figures:
            if figure.kind == kind and (isinstance(key, str) or figure.parameter == parameter):
                return figure
        there = ", ".join(f"{figure.kind} {figure.parameter}" for figure in self.figures)
        raise KeyError(f"no figure of {key!r}; there are {there}")

    def to_dict(self) -> dict:
        """Plain numbers, for JSON."""
        return {
            "trials": {
                "targets": self.num_targets,
                "impostors": self.num_impostors,
                self.units: self.num_speakers,
                "source": self.source,
                "lost": None if self.lost is None else asdict(self.lost),
            },
            "confidence": self.confidence,
            "notes": list(self.notes),
            "figures": {figure.name: figure.to_dict() for figure in self.figures},
        }

    def table(self) -> str:
        """A table for people."""
        rows = [("", "value", f"{100 * self.confidence:g} % interval", "threshold", "rests on")]
        for figure in self.figures:
            rows.append(
                (
                    figure.name,
                    figure.shown,
                    figure.interval,
                    "" if figure.threshold is None else f"{figure.threshold:.4f}",
                    "" if figure.errors is None else f"{figure.errors} errors: {figure.mark}",
                )
            )
        lines = _columns(rows)
        keys = {figure.key for figure in self.figures}
        how = {
            "step": "at the nearest threshold, as SpeechBrain",
            "nist": "by the ROC, as most papers",
        }
        how = "; ".join(f"{name}: {said}" for name, said in how.items() if ("eer", name) in keys)
        lines.append(
            f"{self.num_targets:,} target and {self.num_impostors:,} impostor trials of "
            f"{self.num_speakers} {self.units}; EER by the ROC's convex hull"
            + (f" ({how})" if how else "")
            + ", DCF over the better of accepting and rejecting all"
        )
        if self.source:
            lines.append(f"trials: {self.source}")
        lines += self.failures() + [f"note: {note}" for note in self.notes]
        return "\n".join(line.rstrip() for line in lines)

    def failures(self) -> list[str]:
        """Failures to acquire and to enrol in words, and TAR with what they lost as rejected."""
        if self.lost is None:
            return []
        with_lost = [
            f"{figure.name} {show(1 - self.lost.rejected(figure.misses, self.num_targets))}"
            for figure in self.figures
            if figure.kind == "tar_at_far" and figure.misses is not None
        ]
        counted = f"; counted as rejections: {', '.join(with_lost)}" if with_lost else ""
        return [f"{self.lost}{counted}"]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    return lines


def evaluate(
    scores: np.ndarray,
    trials: LabelledTrials,
    *,
    fars: Sequence[float] = FARS,
    p_target: float | Sequence[float] = 0.01,
    c_miss: float = 1.0,
    c_fa: float = 1.0,
    all_eers: bool = False,
    eers: Sequence[str] = ("rocch",),
    llr: bool = False,
    figures: Sequence[Measure] | None = None,
    structure: TrialStructure | None = None,
    confidence: float = 0.95,
    units: str = "speakers",
) -> Report:
    """EER, minDCF and TAR at FARs of scored trials, with 95 % intervals.

    Parameters
    ----------
    scores : float array [N]
        Higher is more alike.
    trials : LabelledTrials
    fars : sequence of float
    p_target : float or sequence of float
        Priors of minDCF.
    c_miss, c_fa : float
        Costs of minDCF.
    all_eers : bool
        Also the ``step`` and ``nist`` variants of the EER, and minCllr.
    eers : sequence of str
        The variants of the EER, unless it is all of them; papers print ``nist``.
    llr : bool
        The scores are log-likelihood ratios: report actDCF and Cllr too.
    figures : sequence of Measure, optional
        What to measure, instead of
        :func:`~speechbrain_qmargin.scoring.figures.standard_figures` of the arguments above and
        what was :func:`~speechbrain_qmargin.scoring.figures.register`-ed.
    structure : TrialStructure, optional
        Of the distinct trials, computed once where several systems share it.
    confidence : float
        Of the intervals.
    units : str
        What the report calls the speakers: speakers, identities, subjects.

    Returns
    -------
    Report

    Raises
    ------
    ValueError
        As :func:`operating_points` and :class:`~speechbrain_qmargin.scoring.uncertainty.Spread`.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> ids = [f"{speaker}/{take}" for speaker in range(20) for take in range(4)]
    >>> left, right = np.triu_indices(80, 1)
    >>> trials = LabelledTrials(ids, left, right, left // 4 == right // 4)
    >>> report = evaluate(rng.normal(size=len(trials)) + 2 * trials.is_target, trials)
    >>> report["eer"].low < report["eer"].value < report["eer"].high
    True
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    distinct = trials.distinct
    if distinct.group is not None:
        structure = None
    scores, trials = distinct.scores(np.asarray(scores)), distinct.trials
    points = operating_points(scores, trials.is_target)
    spread = Spread(scores, trials, points, structure)
    if figures is None:
        figures = standard_figures(
            fars, p_target, c_miss=c_miss, c_fa=c_fa, all_eers=all_eers, eers=eers, llr=llr
        )
        figures += registered()
    influences = [measure.influence(spread) for measure in figures]
    return Report(
        [
            _measured(one, spread, moved, confidence)
            for one, moved in zip(figures, influences, strict=True)
        ],
        points.num_targets,
        points.num_impostors,
        len(np.unique(trials.speakers())),
        points,
        spread,
        influences,
        trials.source,
        units if trials.speakers_known else f"linked groups ({units} not known)",
        trials.speakers_known,
        confidence,
        _notes(points, trials, units),
        trials.lost,
    )


def _notes(points: OperatingPoints, trials: LabelledTrials, units: str) -> tuple[str, ...]:
    notes = []
    crossing = eer(points, "nist")
    if crossing > 0.5:
        notes.append(
            f"the EER of {100 * crossing:.1f} % is above 50 %: the scores seem inverted (negate "
            "distances), or no better than chance"
        )
        warnings.warn(notes[-1], stacklevel=3)
    if not trials.speakers_known:
        notes.append(
            f"the {units} are not known: recordings that target trials link count as one, two such "
            "groups may be one person, and nothing is called measured"
            + (". Give them (utt2spk)" if units == "speakers" else "")
        )
    return tuple(notes)


def _measured(
    measure: Measure, spread: Spread, influence: Influence | None, confidence: float
) -> Figure:
    """The figure of a measure with its mark and its interval."""
    figure = figure_of(measure, spread.points)
    interval = None if influence is None else influence.interval(figure.value, confidence)
    errors = figure.errors
    if errors is not None:
        figure = replace(figure, mark=mark_of(errors, spread.structure.contributing))
        if interval is not None:
            few = partial(measure.few_errors, figure, spread.points, confidence)
            interval = widened(interval, errors, few)
    if interval is None:
        return figure
    low, high = min(interval[0], figure.value), max(interval[1], figure.value)
    return replace(figure, low=float(low), high=float(high))


@dataclass(frozen=True)
class Difference:
    """``value`` is the second system minus the first; the interval is paired over speakers.

    `mark` is the weaker one of both figures'.

    Examples
    --------
    >>> difference = Difference("eer", "rocch", "EER", -0.01, -0.018, -0.002, mark="measured")
    >>> difference.show(difference.value), difference.significant
    ('-1.00 %', True)
    """

    kind: str
    parameter: float | str | None
    name: str
    value: float
    low: float
    high: float
    unit: str = "rate"
    higher_is_better: bool = False
    mark: str = ""

    def show(self, value: float | None) -> str:
        """A value of this figure's unit as text."""
        return show(value, self.unit)

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out zero; never of an unsupported figure."""
        return self.mark != "unsupported" and (self.low > 0 or self.high < 0)


def compare(first: Report, second: Report) -> list[Difference]:
    """Paired differences of two systems on the same trials.

    Raises
    ------
    ValueError
        Reports on other trials.

    Examples
    --------
    >>> from speechbrain_qmargin.scoring.figures import TarAtFar
    >>> ids = ["a/1", "a/2", "b/1", "b/2", "c/1", "c/2", "d/1", "d/2"]
    >>> left, right = np.triu_indices(8, 1)  # 4 target and 24 impostor trials
    >>> trials = LabelledTrials(ids, left, right, left // 2 == right // 2)
    >>> good = trials.is_target.astype(float)
    >>> bad = np.where((left == 0) & (right == 1), -1.0, good)  # misses the target trial of a
    >>> reports = [evaluate(scores, trials, figures=[TarAtFar(0.1)]) for scores in (bad, good)]
    >>> [(difference.name, difference.value) for difference in compare(*reports)]
    [('TAR@FAR=0.1', 0.25)]
    """
    same = (first.num_targets, first.num_impostors, first.num_speakers, first.source) == (
        second.num_targets,
        second.num_impostors,
        second.num_speakers,
        second.source,
    )
    if not same or not first.spread.structure.same_as(second.spread.structure):
        raise ValueError(
            "the two systems were not evaluated on the same trials, so their differences cannot be "
            "paired"
        )
    others = {figure.key: n for n, figure in enumerate(second.figures)}
    differences = []
    for figure, influence in zip(first.figures, first.influences, strict=True):
        at = others.get(figure.key)
        other = None if at is None else second.influences[at]
        if at is None or influence is None or other is None:
            continue
        value = second.figures[at].value - figure.value
        interval = (other - influence).interval(value, first.confidence)
        if interval is None:
            continue
        low, high = interval
        differences.append(
            Difference(
                figure.kind,
                figure.parameter,
                figure.name,
                value,
                float(min(low, value)),
                float(max(high, value)),
                figure.unit,
                figure.higher_is_better,
                _weaker(figure.mark, second.figures[at].mark),
            )
        )
    return differences


def _weaker(one: str, two: str) -> str:
    return max(one, two, key=("", "measured", "indicative", "unsupported").index)
