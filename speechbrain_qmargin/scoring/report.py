"""Scores to figures with honest intervals, as a table for people and JSON for programs.

Every interval is of a bootstrap over speakers. Where a figure rests on fewer than 30 errors the
bootstrap is too narrow (at no errors it has no width), so the wider of it and Clopper-Pearson is
given and the figure is marked: measured (30 errors or more), indicative (3 to 29), unsupported
(fewer than 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from speechbrain_qmargin.scoring.figures import (
    Figure,
    Measure,
    figure_of,
    registered,
    show,
    standard_figures,
)
from speechbrain_qmargin.scoring.metrics import OperatingPoints, operating_points
from speechbrain_qmargin.scoring.uncertainty import Resampled, badge, resample_speakers
from speechbrain_qmargin.trials import Trials

__all__ = ["FARS", "Difference", "Report", "compare", "evaluate"]

FARS = (1e-1, 1e-2, 1e-3)


@dataclass(frozen=True)
class Report:
    """The figures of one system on one trial list.

    ``report["eer"]`` is the :class:`~speechbrain_qmargin.scoring.figures.Figure` of a kind,
    ``report["tar_at_far", 0.01]`` that of a kind and parameter. `replicates` holds the bootstrap's
    values of every figure, [figures, R], NaN where a figure is not resampled.
    """

    figures: list[Figure]
    num_targets: int
    num_impostors: int
    num_speakers: int
    points: OperatingPoints = field(repr=False)
    resampled: Resampled = field(repr=False)
    replicates: np.ndarray = field(repr=False)
    source: str = ""
    units: str = "speakers"

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
            },
            "figures": {figure.name: figure.to_dict() for figure in self.figures},
        }

    def table(self) -> str:
        """A table for people."""
        rows = [("", "value", "95 % interval", "threshold", "rests on")]
        for figure in self.figures:
            rows.append(
                (
                    figure.name,
                    figure.shown,
                    figure.interval,
                    "" if figure.threshold is None else f"{figure.threshold:.4f}",
                    "" if figure.errors is None else f"{figure.errors} errors: {figure.support}",
                )
            )
        lines = _columns(rows)
        lines.append(
            f"{self.num_targets:,} target and {self.num_impostors:,} impostor trials of "
            f"{self.num_speakers} {self.units}; EER by the ROC's convex hull, costs of 1, DCF over "
            "the better of accepting and rejecting all"
        )
        if self.source:
            lines.append(f"trials: {self.source}")
        return "\n".join(line.rstrip() for line in lines)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    return lines


def evaluate(
    scores: np.ndarray,
    trials: Trials,
    *,
    fars: Sequence[float] = FARS,
    p_target: float | Sequence[float] = 0.01,
    all_eers: bool = False,
    llr: bool = False,
    figures: Sequence[Measure] | None = None,
    replicates: int = 1000,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    units: str = "speakers",
) -> Report:
    """EER, minDCF and TAR at FARs of scored trials, with 95 % intervals.

    Parameters
    ----------
    scores : float array [N]
        Higher is more alike.
    trials : Trials
    fars : sequence of float
    p_target : float or sequence of float
        Priors of minDCF; costs are 1.
    all_eers : bool
        Also the ``step`` and ``nist`` variants of the EER, and minCllr.
    llr : bool
        The scores are log-likelihood ratios: report actDCF and Cllr too.
    figures : sequence of Measure, optional
        What to measure, instead of
        :func:`~speechbrain_qmargin.scoring.figures.standard_figures` of the arguments above and
        what was :func:`~speechbrain_qmargin.scoring.figures.register`-ed.
    replicates, seed : int
        Of the speaker bootstrap. The same seed on the same trials pairs systems: :func:`compare`.
    progress : callable, optional
        Called with the number of replicates just done.
    units : str
        What the report calls those who are resampled: speakers, identities, subjects.

    Returns
    -------
    Report

    Raises
    ------
    ValueError
        As :func:`operating_points` and :func:`resample_speakers`.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> ids = [f"{speaker}/{take}" for speaker in range(20) for take in range(4)]
    >>> left, right = np.triu_indices(80, 1)
    >>> trials = Trials(ids, left, right, left // 4 == right // 4)
    >>> report = evaluate(rng.normal(size=len(trials)) + 2 * trials.is_target, trials)
    >>> report["eer"].low < report["eer"].value < report["eer"].high
    True
    """
    points = operating_points(scores, trials.is_target)
    resampled = resample_speakers(
        scores,
        trials,
        points,
        max_far=max(fars, default=0.1),
        replicates=replicates,
        seed=seed,
        llr=llr,
        progress=progress,
    )
    if figures is None:
        figures = standard_figures(fars, p_target, all_eers=all_eers, llr=llr) + registered()
    drawn = [measure.resample(resampled, points) for measure in figures]
    nothing = np.full(len(resampled.num_targets), np.nan)
    return Report(
        [_measured(one, points, values) for one, values in zip(figures, drawn, strict=True)],
        points.num_targets,
        points.num_impostors,
        len(np.unique(trials.speakers())),
        points,
        resampled,
        np.stack([nothing if values is None else values for values in drawn]),
        trials.source,
        units,
    )


def _measured(measure: Measure, points: OperatingPoints, replicates: np.ndarray | None) -> Figure:
    """The figure of a measure with its badge and its interval."""
    figure = figure_of(measure, points)
    if figure.errors is not None:
        figure = replace(figure, support=badge(figure.errors))
    if replicates is None:
        return figure
    low, high = np.percentile(replicates, [2.5, 97.5])
    if figure.errors is not None and figure.errors < 30:
        widest = measure.few_errors(figure, points)
        if widest is not None:
            low, high = min(low, widest[0]), max(high, widest[1])
    low, high = min(low, figure.value), max(high, figure.value)
    return replace(figure, low=float(low), high=float(high))


@dataclass(frozen=True)
class Difference:
    """``value`` is the second system minus the first; the interval is paired over speakers."""

    kind: str
    parameter: float | str | None
    name: str
    value: float
    low: float
    high: float
    unit: str = "rate"
    higher_is_better: bool = False

    def show(self, value: float | None) -> str:
        """A value of this figure's unit as text."""
        return show(value, self.unit)

    @property
    def significant(self) -> bool:
        """Whether the 95 % interval leaves out zero."""
        return self.low > 0 or self.high < 0


def compare(first: Report, second: Report) -> list[Difference]:
    """Paired differences of two systems on the same trials.

    Raises
    ------
    ValueError
        Reports on other trials, or with another seed or number of replicates.
    """
    same = (first.num_targets, first.num_impostors, first.num_speakers, first.source) == (
        second.num_targets,
        second.num_impostors,
        second.num_speakers,
        second.source,
    )
    if not same or not np.array_equal(
        first.resampled.num_impostors, second.resampled.num_impostors
    ):
        raise ValueError(
            "the two systems were not evaluated on the same trials with the same seed and number "
            "of replicates, so their differences cannot be paired"
        )
    others = {figure.key: n for n, figure in enumerate(second.figures)}
    differences = []
    for figure, values in zip(first.figures, first.replicates, strict=True):
        at = others.get(figure.key)
        if at is None or np.isnan(values - second.replicates[at]).any():
            continue
        value = second.figures[at].value - figure.value
        low, high = np.percentile(second.replicates[at] - values, [2.5, 97.5])
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
            )
        )
    return differences
