"""Scores to report: a table of operating points with honest intervals, and the DET plot.

Trials that share a speaker are not independent, so intervals resample speakers: a two-way
bootstrap draws speakers with replacement and weighs an impostor trial by the product of its two
speakers' counts, a target trial by its one speaker's. Where a rate rests on fewer than 30 errors
the bootstrap is too narrow (at no errors it has no width), so the wider of it and Clopper-Pearson
is given and the figure is marked: measured (30 errors or more), indicative (3 to 29), unsupported
(fewer than 3).
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from speechbrain_qmargin.scoring.metrics import (
    OperatingPoints,
    eer,
    min_dcf,
    operating_points,
    tar_at_far,
)
from speechbrain_qmargin.scoring.trials import Trials

__all__ = ["Figure", "Report", "badge", "evaluate", "plot_det"]

FARS = (1e-1, 1e-2, 1e-3)


def badge(errors: float) -> str:
    """Doddington's rule of 30 for a rate that rests on so many errors.

    Examples
    --------
    >>> badge(100), badge(12), badge(0)
    ('measured', 'indicative', 'unsupported')
    """
    return "measured" if errors >= 30 else "indicative" if errors >= 3 else "unsupported"


@dataclass(frozen=True)
class Figure:
    """One number of a report.

    Attributes
    ----------
    name : str
    value, low, high : float
        The estimate and its 95 % interval.
    threshold : float or None
        The score at which the rate holds.
    errors : int or None
        The scarcer of the errors it rests on; `support` is their badge.
    """

    name: str
    value: float
    low: float
    high: float
    threshold: float | None = None
    errors: int | None = None

    @property
    def support(self) -> str:
        return "" if self.errors is None else badge(self.errors)


@dataclass(frozen=True)
class Report:
    """The figures of one system on one trial list."""

    figures: list[Figure]
    num_targets: int
    num_impostors: int
    num_speakers: int

    def __getitem__(self, name: str) -> Figure:
        return next(figure for figure in self.figures if figure.name == name)

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
                "speakers": self.num_speakers,
            },
            "figures": figures,
        }

    def table(self) -> str:
        """A table for people."""
        rows = [("", "value", "95 % interval", "threshold", "rests on")]
        for figure in self.figures:
            percent = not figure.name.startswith("minDCF")
            show = (lambda x: f"{100 * x:.2f} %") if percent else (lambda x: f"{x:.3f}")
            rows.append(
                (
                    figure.name,
                    show(figure.value),
                    f"{show(figure.low)} to {show(figure.high)}",
                    "" if figure.threshold is None else f"{figure.threshold:.4f}",
                    "" if figure.errors is None else f"{figure.errors} errors: {figure.support}",
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        lines.insert(1, "-" * len(lines[0]))
        lines.append(
            f"{self.num_targets:,} target and {self.num_impostors:,} impostor trials of "
            f"{self.num_speakers} speakers"
        )
        return "\n".join(line.rstrip() for line in lines)


def evaluate(
    scores: np.ndarray,
    trials: Trials,
    *,
    fars: Sequence[float] = FARS,
    p_target: float = 0.01,
    replicates: int = 1000,
    seed: int = 0,
) -> Report:
    """EER, minDCF and TAR at FARs of scored trials, with 95 % intervals.

    Parameters
    ----------
    scores : float array [N]
        Higher is more alike.
    trials : Trials
    fars : sequence of float
    p_target : float
        Prior of minDCF; costs are 1.
    replicates : int
        Of the speaker bootstrap.
    seed : int

    Returns
    -------
    Report
    """
    points = operating_points(scores, trials.is_target)
    resampled = _bootstrap(scores, trials, points, fars, p_target, replicates, seed)
    low, high = np.nanpercentile(resampled, [2.5, 97.5], axis=0)

    equal = eer(points)
    at = int(np.argmin(np.abs(points.far - points.frr)))
    names = ["EER", f"minDCF(p={p_target:g})"] + [f"TAR@FAR={far:g}" for far in fars]
    errors = int(min(points.misses[at], points.false_accepts[at]))
    figures = [
        Figure(names[0], equal, low[0], high[0], float(points.thresholds[at]), errors),
        Figure(names[1], min_dcf(points, p_target), low[1], high[1]),
    ]
    for index, far in enumerate(fars, 2):
        tar, threshold, _ = tar_at_far(points, far)
        allowed = math.floor(far * points.num_impostors * (1 + 1e-12))
        bounds = low[index], high[index]
        if allowed < 30:
            bounds = _widened(bounds, tar, points, allowed)
        figures.append(Figure(names[index], tar, *bounds, threshold, allowed))
    figures = [
        Figure(f.name, f.value, float(min(f.low, f.value)), float(max(f.high, f.value)),
               f.threshold, f.errors)
        for f in figures
    ]  # fmt: skip
    speakers = trials.speakers()
    return Report(figures, points.num_targets, points.num_impostors, int(speakers.max()) + 1)


def _widened(bounds, tar: float, points: OperatingPoints, allowed: int) -> tuple[float, float]:
    """The interval of a TAR where so few false accepts are allowed that their number is luck.

    The threshold's true FAR may be anywhere in the Clopper-Pearson interval of its count; the TARs
    at the ends of that interval, each with its own Clopper-Pearson bound, bracket the TAR.
    """
    from scipy.stats import beta

    impostors = points.num_impostors
    least = beta.ppf(0.025, allowed, impostors - allowed + 1) if allowed else 0.0
    most = beta.ppf(0.975, allowed + 1, max(impostors - allowed, 1))
    fewest = tar_at_far(points, least)[0] if least > 0 else 0.0
    rates = fewest, tar_at_far(points, min(most, 1.0))[0]
    hits = [round(rate * points.num_targets) for rate in (*rates, tar)]
    targets = points.num_targets
    low = beta.ppf(0.025, hits[0], targets - hits[0] + 1) if hits[0] else 0.0
    high = beta.ppf(0.975, hits[1] + 1, targets - hits[1]) if hits[1] < targets else 1.0
    return min(bounds[0], low), max(bounds[1], high)


def _bootstrap(scores, trials, points, fars, p_target, replicates, seed) -> np.ndarray:
    """Metrics [replicates, 2 + len(fars)] under resampled speakers; NaN where a class vanished."""
    speakers = trials.speakers()
    first, second = speakers[trials.enrolment], speakers[trials.test]
    num_speakers = int(speakers.max()) + 1
    is_target = trials.is_target
    target_order = np.argsort(scores[is_target], kind="stable")
    impostor_order = np.argsort(scores[~is_target], kind="stable")
    target_speaker = first[is_target][target_order]
    pair = np.stack([first[~is_target], second[~is_target]])[:, impostor_order]
    below = np.searchsorted(points.impostors, points.thresholds, side="left")
    upto = np.searchsorted(points.impostors, points.thresholds, side="right")

    rng = np.random.default_rng(seed)
    result = np.full((replicates, 2 + len(fars)), np.nan)
    for row in result:
        counts = np.bincount(rng.integers(num_speakers, size=num_speakers), minlength=num_speakers)
        missed = np.append(0, np.cumsum(counts[target_speaker]))
        passed = np.append(0, np.cumsum(counts[pair[0]] * counts[pair[1]]))
        if not missed[-1] or not passed[-1]:
            continue
        drawn = OperatingPoints(
            points.thresholds,
            missed[points.misses],
            passed[-1] - passed[below],
            passed[-1] - passed[upto],
            missed[-1],
            passed[-1],
            points.impostors,
        )
        row[:2] = eer(drawn, "nist"), min_dcf(drawn, p_target)
        row[2:] = [tar_at_far(drawn, far)[0] for far in fars]
    # the spread of the EER of the ROC itself, cheap, around the estimate by its hull
    result[:, 0] += eer(points) - eer(points, "nist")
    return result


def plot_det(
    systems: Mapping[str, tuple[np.ndarray, np.ndarray]], path: str | Path, title: str = ""
) -> None:
    """Draw detection error trade-offs on normal-deviate axes and write them as PNG, SVG or PDF.

    Parameters
    ----------
    systems : mapping from name to (scores [N], is_target [N])
    path : path
        Its suffix is the format.
    title : str
    """
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise ImportError(
            "the DET plot needs matplotlib: pip install 'speechbrain_qmargin[report]'"
        ) from error
    from scipy.stats import norm

    canvas = Canvas(figsize=(6.4, 6.0), layout="constrained")
    axes = canvas.subplots()
    lowest, fewest = 0.5, 0
    for name, (scores, is_target) in systems.items():
        points = operating_points(scores, is_target)
        inside = (points.far > 0) & (points.frr > 0) & (points.far < 1) & (points.frr < 1)
        equal = eer(points)
        (line,) = axes.plot(
            norm.ppf(points.far[inside]),
            norm.ppf(points.frr[inside]),
            drawstyle="steps-pre",
            label=f"{name} (EER {100 * equal:.1f} %)",
            linewidth=1.4,
        )
        axes.plot(norm.ppf(equal), norm.ppf(equal), "o", color=line.get_color(), markersize=4)
        lowest = min(lowest, 0.5 / points.num_impostors)
        fewest = max(fewest, 30 / points.num_impostors)
    ticks = [1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99]
    labels = [f"{100 * tick:g}" for tick in ticks]
    low = max(lowest, 1e-6)
    axes.set_xticks(norm.ppf(ticks), labels)
    axes.set_yticks(norm.ppf(ticks), labels)
    axes.set_xlim(norm.ppf(low), norm.ppf(0.6))
    axes.set_ylim(norm.ppf(0.005), norm.ppf(0.995))
    if fewest > low:
        axes.axvspan(norm.ppf(low), norm.ppf(min(fewest, 0.5)), color="0.93", zorder=0)
        axes.annotate(
            "fewer than 30\nfalse accepts",
            (norm.ppf(low), norm.ppf(0.006)),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=8,
            color="0.35",
        )
    axes.axline((0, 0), slope=1, color="0.7", linewidth=0.8, linestyle=":")
    axes.set_xlabel("False accept rate, %")
    axes.set_ylabel("False reject rate, %")
    axes.set_title(textwrap.fill(title, 72), fontsize=10, loc="left")
    axes.grid(color="0.88", linewidth=0.6)
    axes.legend(loc="upper right")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name("partial_" + path.name)
    canvas.savefig(partial, dpi=150)
    partial.replace(path)
