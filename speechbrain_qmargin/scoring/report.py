"""Scores to figures with honest intervals, as a table for people and JSON for programs.

Every interval is of a bootstrap over speakers. Where a figure rests on fewer than 30 errors the
bootstrap is too narrow (at no errors it has no width), so the wider of it and Clopper-Pearson is
given and the figure is marked: measured (30 errors or more), indicative (3 to 29), unsupported
(fewer than 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from speechbrain_qmargin.scoring.metrics import (
    EER_METHODS,
    OperatingPoints,
    act_dcf,
    allowed_false_accepts,
    bayes_threshold,
    cllr,
    eer,
    eer_point,
    min_cllr,
    min_dcf,
    operating_points,
    tar_at_far,
)
from speechbrain_qmargin.scoring.plots import plot_det
from speechbrain_qmargin.scoring.uncertainty import (
    Resampled,
    badge,
    rate_interval,
    resample_speakers,
)
from speechbrain_qmargin.trials import Trials

__all__ = ["FARS", "Difference", "Figure", "Report", "badge", "compare", "evaluate", "plot_det"]

FARS = (1e-1, 1e-2, 1e-3)


@dataclass(frozen=True)
class Figure:
    """One number of a report.

    Attributes
    ----------
    name : str
    value, low, high : float
        The estimate and its 95 % interval; None where there is no interval.
    threshold : float or None
        The score at and above which trials are accepted.
    errors : int or None
        The scarcer of the errors it rests on; `support` is their badge.
    misses, false_accepts : int or None
        At that threshold.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    threshold: float | None = None
    errors: int | None = None
    misses: int | None = None
    false_accepts: int | None = None

    @property
    def support(self) -> str:
        return "" if self.errors is None else badge(self.errors)

    def show(self, value: float | None) -> str:
        """A value as text: rates in per cent, costs and bits as they are."""
        if value is None:
            return ""
        plain = self.name.startswith(("minDCF", "actDCF", "Cllr", "minCllr"))
        return f"{value:.3f}" if plain else f"{100 * value:.2f} %"

    @property
    def shown(self) -> str:
        """The value as text; an unsupported one is never bare."""
        return self.show(self.value) + (" (unsupported)" if self.support == "unsupported" else "")

    @property
    def interval(self) -> str:
        return "" if self.low is None else f"{self.show(self.low)} to {self.show(self.high)}"


@dataclass(frozen=True)
class Report:
    """The figures of one system on one trial list.

    ``report["EER"]`` is a :class:`Figure` by name. `replicates` holds the bootstrap's values of
    every figure, [figures, R], NaN where a figure is not resampled.
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

    def __getitem__(self, name: str) -> Figure:
        for figure in self.figures:
            if figure.name == name:
                return figure
        raise KeyError(f"{name}; there are {', '.join(figure.name for figure in self.figures)}")

    def to_dict(self) -> dict:
        """Plain numbers, for JSON."""
        figures = {
            figure.name: {k: v for k, v in asdict(figure).items() if k != "name"}
            | {"support": figure.support}
            for figure in self.figures
        }
        return {
            "trials": {
                "targets": self.num_targets,
                "impostors": self.num_impostors,
                self.units: self.num_speakers,
                "source": self.source,
            },
            "figures": figures,
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
    >>> report["EER"].low < report["EER"].value < report["EER"].high
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
    figures, values = [], []

    def add(figure: Figure, replicate: np.ndarray | None) -> None:
        figures.append(_with_interval(figure, replicate, points))
        values.append(
            np.full(len(resampled.num_targets), np.nan) if replicate is None else replicate
        )

    threshold, misses, accepts = eer_point(points)
    rests = {"threshold": threshold, "errors": min(misses, accepts)}
    rests |= {"misses": misses, "false_accepts": accepts}
    drawn_eer = resampled.eer()
    for method in EER_METHODS if all_eers else EER_METHODS[:1]:
        value = eer(points, method)
        name = "EER" if method == "rocch" else f"EER({method})"
        # the replicates are linear between thresholds, as `nist`; the variants differ by a constant
        shifted = np.clip(drawn_eer + value - eer(points, "nist"), 0, 1)
        add(Figure(name, value, **rests), shifted)
    for prior in np.atleast_1d(p_target).tolist():
        add(_min_dcf_figure(points, prior), resampled.min_dcf(prior))
        if llr:
            add(_act_dcf_figure(points, prior), resampled.act_dcf(prior))
    for far in fars:
        tar, threshold, accepts, misses = tar_at_far(points, far)
        allowed = allowed_false_accepts(far, points.num_impostors)
        figure = Figure(f"TAR@FAR={far:g}", tar, threshold=threshold, errors=min(allowed, misses),
                        misses=misses, false_accepts=accepts)  # fmt: skip
        add(figure, resampled.tar_at_far(far))
    if all_eers or llr:
        add(Figure("minCllr", min_cllr(points)), resampled.min_cllr())
    if llr:
        add(Figure("Cllr", cllr(points)), resampled.cllr)
    return Report(
        figures,
        points.num_targets,
        points.num_impostors,
        len(np.unique(trials.speakers())),
        points,
        resampled,
        np.stack(values),
        trials.source,
        units,
    )


def _min_dcf_figure(points: OperatingPoints, prior: float) -> Figure:
    cost = prior * points.frr + (1 - prior) * points.far
    at = int(np.argmin(cost))
    misses, accepts = int(points.misses[at]), int(points.false_accepts[at])
    threshold = float(points.thresholds[at])
    return Figure(
        f"minDCF(p={prior:g})",
        min_dcf(points, prior),
        threshold=threshold if np.isfinite(threshold) else None,
        errors=min(misses, accepts),
        misses=misses,
        false_accepts=accepts,
    )


def _act_dcf_figure(points: OperatingPoints, prior: float) -> Figure:
    threshold = bayes_threshold(prior)
    misses, accepts = points.errors_at(threshold)
    return Figure(
        f"actDCF(p={prior:g})",
        act_dcf(points, prior, force=True),
        threshold=threshold,
        errors=min(misses, accepts),
        misses=misses,
        false_accepts=accepts,
    )


def _with_interval(
    figure: Figure, replicates: np.ndarray | None, points: OperatingPoints
) -> Figure:
    if replicates is None:
        return figure
    low, high = np.percentile(replicates, [2.5, 97.5])
    if figure.errors is not None and figure.errors < 30:
        widest = _few_errors(figure, points)
        low, high = min(low, widest[0]), max(high, widest[1])
    low, high = float(min(low, figure.value)), float(max(high, figure.value))
    return Figure(**asdict(figure) | {"low": low, "high": high})


def _few_errors(figure: Figure, points: OperatingPoints) -> tuple[float, float]:
    """The interval of a figure whose errors are so few that their number is luck.

    With FAR and FRR anywhere in their Clopper-Pearson intervals. For a TAR at a FAR, the
    threshold's true FAR may be anywhere in the interval of its count; the TARs at its ends, each
    with its own interval, bracket the TAR.
    """
    n_t, n_n = points.num_targets, points.num_impostors
    if not figure.name.startswith("TAR"):
        frr = rate_interval(figure.misses, n_t)
        far = rate_interval(figure.false_accepts, n_n)
        if figure.name.startswith("EER"):
            return min(frr[0], far[0]), max(frr[1], far[1])
        prior = float(figure.name.partition("=")[2].rstrip(")"))
        least = min(prior, 1 - prior)
        costs = [(prior * f + (1 - prior) * a) / least for f, a in zip(frr, far, strict=True)]
        return costs[0], costs[1] if figure.name.startswith("act") else min(1.0, costs[1])
    least, most = rate_interval(
        allowed_false_accepts(float(figure.name.partition("=")[2]), n_n), n_n
    )
    fewest = 1 - tar_at_far(points, least).misses / n_t if least * n_n >= 1 else 0.0
    largest = tar_at_far(points, most).tar
    return (
        rate_interval(round(fewest * n_t), n_t)[0],
        rate_interval(round(largest * n_t), n_t)[1],
    )


@dataclass(frozen=True)
class Difference:
    """``value`` is the second system minus the first; the interval is paired over speakers."""

    name: str
    value: float
    low: float
    high: float

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
    names = [figure.name for figure in second.figures]
    differences = []
    for figure, values in zip(first.figures, first.replicates, strict=True):
        if figure.name not in names:
            continue
        other = second.replicates[names.index(figure.name)]
        value = second[figure.name].value - figure.value
        if np.isnan(values - other).any():
            continue
        low, high = np.percentile(other - values, [2.5, 97.5])
        differences.append(
            Difference(figure.name, value, float(min(low, value)), float(max(high, value)))
        )
    return differences
