"""Pictures of scores: detection error trade-off, histograms, calibration."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from speechbrain_qmargin.extras import require
from speechbrain_qmargin.files import replacing
from speechbrain_qmargin.scoring.bayes import LOG_ODDS, bayes_error
from speechbrain_qmargin.scoring.metrics import (
    OperatingPoints,
    eer,
    log_likelihood_ratios,
    tar_at_far,
)
from speechbrain_qmargin.scoring.uncertainty import FEWEST_ERRORS, Spread

__all__ = [
    "bayes_error_figure",
    "calibration_figure",
    "canvas",
    "check_picture",
    "det_figure",
    "histogram_figure",
    "plain",
    "pooled_det_figure",
    "save_figure",
]

_TICKS = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99,
          0.999)  # fmt: skip
_HATCHES = ("////", "\\\\\\\\", "....", "||||", "----", "xxxx", "++++")


def plain(text: str, width: int = 0) -> str:
    r"""Text that matplotlib draws as it is: no formulas between dollar signs, nothing hidden.

    Examples
    --------
    >>> print(plain("$x$ and $y$"))
    \$x\$ and \$y\$
    """
    text = textwrap.fill(text, width) if width else text
    text = text.replace("$", r"\$")
    return "\u200b" + text if text.startswith("_") else text  # a legend leaves such labels out


def canvas(width: float, height: float):
    """An empty matplotlib figure of `width` by `height` inches, and its axes; no display is needed.

    Raises
    ------
    ImportError
        No matplotlib.

    Examples
    --------
    >>> figure, axes = canvas(4, 3)
    >>> figure.get_size_inches()
    array([4., 3.])
    """
    require("matplotlib", why="plots", extra="report")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def check_picture(path: str | Path) -> None:
    """Refuse, before anything is computed, a picture that could not be written.

    Raises
    ------
    ImportError
        No matplotlib.
    ValueError
        A suffix that is no format of pictures; with the path.

    Examples
    --------
    >>> check_picture("bayes_error.svg")
    >>> check_picture("bayes_error")
    Traceback (most recent call last):
    ValueError: bayes_error: a picture's suffix is its format, such as .png, .svg or .pdf
    """
    require("matplotlib", why="plots", extra="report")
    from matplotlib.backend_bases import FigureCanvasBase

    if Path(path).suffix.lower()[1:] not in FigureCanvasBase.get_supported_filetypes():
        raise ValueError(f"{path}: a picture's suffix is its format, such as .png, .svg or .pdf")


def _probit(rate: float) -> float:
    from scipy.stats import norm

    return float(norm.ppf(rate))


def save_figure(figure, path: str | Path) -> None:
    """Write a matplotlib figure whole or not at all; the suffix is the format, with 150 dpi.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "line.png"
    >>> figure, axes = canvas(2, 2)
    >>> _ = axes.plot([0, 1], [0, 1])
    >>> save_figure(figure, file)
    >>> file.read_bytes()[1:4]
    b'PNG'
    """
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150)


def det_figure(
    systems: Mapping[str, tuple[OperatingPoints, Spread | None]],
    title: str = "",
    confidence: float = 0.95,
):
    """Detection error trade-offs on normal-deviate axes, as a matplotlib figure.

    Each curve ends at the lowest FAR its impostors can show; the region below 30 false accepts is
    shaded, the curve in it (and below 30 misses, or 30 targets accepted) dashed.

    Parameters
    ----------
    systems : mapping from name to (OperatingPoints, Spread or None)
        With a spread there is a band: the interval over speakers of FRR at every FAR.
    title : str
    confidence : float
        Of the bands.

    Examples
    --------
    >>> from speechbrain_qmargin.scoring.metrics import operating_points
    >>> points = operating_points(np.array([0.9, 0.4, 0.6, 0.1]), np.array([1, 1, 0, 0], bool))
    >>> figure = det_figure({"mine": (points, None)}, title="VoxCeleb1-O")
    >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    ['mine (EER 25.00 %)']
    """
    from scipy.stats import norm

    figure, axes = canvas(6.6, 6.2)
    lowest, supported, least_frr, most_frr = 0.5, 0.0, 0.2, 0.5
    hatches = itertools.cycle(_HATCHES)
    for name, (points, spread) in systems.items():
        equal = eer(points)
        far, frr = _staircase(points)
        rarer = np.minimum(frr, 1 - frr) * points.num_targets
        sure = np.minimum(far * points.num_impostors, rarer) >= FEWEST_ERRORS
        x, y = norm.ppf(far), norm.ppf(frr)
        label = plain(f"{name} (EER {100 * equal:.2f} %)")
        (line,) = axes.plot(x, y, linewidth=0.9, linestyle=(0, (3, 2)))
        color = line.get_color()
        axes.plot(np.where(sure, x, np.nan), np.where(sure, y, np.nan), color=color, linewidth=1.7)
        axes.plot([], [], color=color, linewidth=1.7, label=label)
        if 0 < equal < 1:
            axes.plot(_probit(equal), _probit(equal), "o", color=color, markersize=4)
        lowest = min(lowest, 1 / points.num_impostors)
        supported = max(supported, FEWEST_ERRORS / points.num_impostors)
        if len(frr):
            least_frr, most_frr = min(least_frr, frr.min()), max(most_frr, frr.max())
        if spread is not None:
            grid = np.geomspace(1 / points.num_impostors, 0.5, 60)
            band = spread.band(grid.tolist(), confidence)
            if band is not None:
                low, high = norm.ppf(np.clip(band, 0.2 / points.num_targets, 1 - 1e-6))
                hatch = next(hatches) if len(systems) > 1 else ""
                _band(axes, norm.ppf(grid), low, high, color, hatch)
    _det_axes(axes, title, lowest, supported, least_frr, most_frr)
    return figure


def _det_axes(axes, title: str, lowest: float, supported: float, least_frr: float, most_frr: float):
    """Normal-deviate axes from the lowest FAR up to 0.5; grey up to the supported one."""
    from scipy.stats import norm

    low = max(lowest, 1e-7)
    bottom = max(least_frr, 1e-5) / 1.5
    top = min(max(most_frr, 0.6), 0.995)
    labels = [f"{100 * tick:g}" for tick in _TICKS]
    axes.set_xticks(norm.ppf(_TICKS), labels, fontsize=8)
    axes.set_yticks(norm.ppf(_TICKS), labels, fontsize=8)
    axes.set_xlim(_probit(low * 0.8), _probit(0.5))
    axes.set_ylim(_probit(bottom), _probit(top))
    if supported > low:
        axes.axvspan(_probit(low * 0.8), _probit(min(supported, 0.5)), color="0.93", zorder=0)
        axes.annotate(
            f"fewer than {FEWEST_ERRORS}\nfalse accepts",
            (_probit(low * 0.8), _probit(bottom)),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=8,
            color="0.35",
        )
    axes.axline((0, 0), slope=1, color="0.7", linewidth=0.8, linestyle=":")
    axes.set_xlabel("False accept rate, %")
    axes.set_ylabel("False reject rate, %")
    axes.set_title(plain(title, 80), fontsize=10)
    axes.grid(color="0.88", linewidth=0.6)
    axes.legend(loc="upper right", fontsize=9)


def pooled_det_figure(
    systems: Mapping[str, Sequence[tuple[OperatingPoints, Spread]]], title: str = ""
):
    """Detection error trade-offs of systems that were trained several times, with several seeds.

    Thick: the mean of the seeds' FRR at every FAR. Thin: each seed. Band: the 95 % interval over
    speakers of the mean; how far other seeds would move it is seen by the thin lines.

    Parameters
    ----------
    systems : mapping from name to (OperatingPoints, Spread) of every seed
        On one trial list.
    title : str

    Raises
    ------
    ValueError
        A system without seeds, or seeds on other trials.

    Examples
    --------
    >>> from speechbrain_qmargin.scoring.metrics import operating_points
    >>> from speechbrain_qmargin.trials import LabelledTrials
    >>> ids = ["a/1", "a/2", "b/1", "b/2", "c/1", "c/2", "d/1", "d/2"]
    >>> left, right = np.triu_indices(8, 1)
    >>> trials = LabelledTrials(ids, left, right, left // 2 == right // 2)
    >>> scores = trials.is_target.astype(float)
    >>> points = operating_points(scores, trials.is_target)
    >>> figure = pooled_det_figure({"mine": [(points, Spread(scores, trials, points))] * 2})
    >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    ['mine (EER 0.00 %, 2 seeds)']
    """
    from scipy.stats import norm

    figure, axes = canvas(6.6, 6.2)
    lowest, supported, least_frr, most_frr = 0.5, 0.0, 0.2, 0.5
    hatches = itertools.cycle(_HATCHES)
    for name, seeds in systems.items():
        if not seeds:
            raise ValueError(f"{name}: there are no seeds to pool")
        count = seeds[0][0].num_impostors
        grid = np.geomspace(1 / count, 0.5, 60)
        x, least = norm.ppf(grid), 0.2 / seeds[0][0].num_targets
        rates = np.array([[1 - tar_at_far(points, far).tar for far in grid] for points, _ in seeds])
        mean = rates.mean(axis=0)
        low, high = np.array(
            [_mean_interval([spread for _, spread in seeds], far, frr)
             for far, frr in zip(grid, mean, strict=True)]
        ).T  # fmt: skip
        equal = np.mean([eer(points) for points, _ in seeds])
        label = plain(f"{name} (EER {100 * equal:.2f} %, {len(seeds)} seeds)")
        shown = norm.ppf(np.clip(mean, least, 1 - 1e-6))
        (line,) = axes.plot(x, shown, linewidth=1.8, label=label)
        for each in norm.ppf(np.clip(rates, least, 1 - 1e-6)):
            axes.plot(x, each, color=line.get_color(), linewidth=0.6, alpha=0.6)
        low, high = norm.ppf(np.clip([low, high], least, 1 - 1e-6))
        _band(axes, x, low, high, line.get_color(), next(hatches) if len(systems) > 1 else "")
        lowest, supported = min(lowest, 1 / count), max(supported, FEWEST_ERRORS / count)
        least_frr = min(least_frr, max(float(mean.min()), least))
        most_frr = max(most_frr, float(mean.max()))
    _det_axes(axes, title, lowest, supported, least_frr, most_frr)
    return figure


def _mean_interval(spreads: Sequence[Spread], far: float, frr: float) -> tuple[float, float]:
    """The interval over speakers of the mean FRR of several systems at a FAR; NaN if unknown."""
    moved = spreads[0].tar_at_far(far)
    for spread in spreads[1:]:
        moved = moved + spread.tar_at_far(far)
    found = ((1 / len(spreads)) * moved).on("logit").interval(1 - frr)
    return (np.nan, np.nan) if found is None else (1 - found[1], 1 - found[0])


def _band(axes, x, low, high, color, hatch: str) -> None:
    """A band that can be told from others above or below it: its own hatching, and its edges."""
    axes.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
    if hatch:
        axes.fill_between(x, low, high, facecolor="none", edgecolor=color, alpha=0.35, hatch=hatch,
                          linewidth=0)  # fmt: skip
    for edge in (low, high):
        axes.plot(x, edge, color=color, linewidth=0.6, alpha=0.6)


def _staircase(points: OperatingPoints) -> tuple[np.ndarray, np.ndarray]:
    """FAR and FRR along the curve, with its steps, thinned to what a picture shows."""
    from scipy.stats import norm

    far = np.column_stack([points.far[:-1], points.above / points.num_impostors]).ravel()
    frr = np.column_stack([points.frr[:-1], points.frr[1:]]).ravel()
    inside = (far > 0) & (far < 1) & (frr > 0) & (frr < 1)
    far, frr = far[inside], frr[inside]
    if len(far) > 4000:
        cell = np.round(300 * norm.ppf(far)) + 1j * np.round(300 * norm.ppf(frr))
        kept = np.append(True, cell[1:] != cell[:-1])
        far, frr = far[kept], frr[kept]
    return far, frr


def histogram_figure(name: str, points: OperatingPoints, thresholds: Mapping[str, float]):
    """Densities of target and impostor scores, with thresholds as lines.

    Examples
    --------
    >>> from speechbrain_qmargin.scoring.metrics import operating_points
    >>> points = operating_points(np.array([0.9, 0.4, 0.6, 0.1]), np.array([1, 1, 0, 0], bool))
    >>> axes = histogram_figure("mine", points, {"decision": 0.5}).axes[0]
    >>> [text.get_text() for text in axes.get_legend().get_texts()]
    ['impostors', 'targets']
    """
    figure, axes = canvas(6.6, 3.0)
    low = min(points.targets[0], points.impostors[0])
    high = max(points.targets[-1], points.impostors[-1])
    edges = np.linspace(low, high if high > low else low + 1, 101)
    for scores, label in ((points.impostors, "impostors"), (points.targets, "targets")):
        counts, _ = np.histogram(scores, edges)
        axes.stairs(
            counts / counts.sum() / np.diff(edges), edges, fill=True, alpha=0.5, label=label
        )
    for index, (label, threshold) in enumerate(thresholds.items()):
        axes.axvline(threshold, color="0.25", linewidth=0.8, linestyle="--")
        axes.annotate(
            plain(label),
            (threshold, 0.97 - 0.1 * (index % 4)),
            xycoords=("data", "axes fraction"),
            fontsize=7,
            xytext=(2, 0),
            textcoords="offset points",
            va="top",
        )
    axes.set_xlabel("score")
    axes.set_ylabel("density")
    axes.set_title(plain(name, 80), fontsize=10)
    axes.legend(loc="upper left", fontsize=8)
    return figure


def calibration_figure(systems: Mapping[str, OperatingPoints], llr: bool):
    """The log-likelihood ratio that each score is worth, by pooling adjacent violators.

    Calibrated scores lie on the diagonal, which is drawn if they claim to be (`llr`).

    Examples
    --------
    >>> from speechbrain_qmargin.scoring.metrics import operating_points
    >>> points = operating_points(np.array([3.0, -0.5, 0.5, -3]), np.array([1, 1, 0, 0], bool))
    >>> axes = calibration_figure({"mine": points}, llr=True).axes[0]
    >>> axes.get_xlabel(), axes.get_ylabel()
    ('log-likelihood ratio given', 'log-likelihood ratio found')
    """
    figure, axes = canvas(6.6, 3.6)
    for name, points in systems.items():
        scores, odds = log_likelihood_ratios(points)
        axes.step(scores, np.clip(odds, -12, 12), where="post", label=plain(name), linewidth=1.3)
    if llr:
        axes.axline((0, 0), slope=1, color="0.5", linewidth=0.8, linestyle=":", label="calibrated")
    axes.set_ylim(-12.5, 12.5)
    axes.set_xlabel("log-likelihood ratio given" if llr else "score")
    axes.set_ylabel("log-likelihood ratio found")
    axes.grid(color="0.9", linewidth=0.6)
    axes.legend(fontsize=8)
    return figure


def bayes_error_figure(systems: Mapping[str, OperatingPoints], log_odds: np.ndarray = LOG_ODDS):
    """Normalised Bayes error rates of log-likelihood ratios over priors, as a matplotlib figure.

    Solid: at the threshold that each prior asks for. Dashed: the minimum. Thin where fewer than 30
    misses or fewer than 30 false accepts carry it.

    Examples
    --------
    >>> from speechbrain_qmargin.scoring.metrics import operating_points
    >>> points = operating_points(np.array([3.0, -0.5, 0.5, -3]), np.array([1, 1, 0, 0], bool))
    >>> axes = bayes_error_figure({"mine": points}).axes[0]
    >>> [text.get_text() for text in axes.get_legend().get_texts()]
    ['mine']
    """
    figure, axes = canvas(6.6, 4.2)
    highest = 1.0
    for name, points in systems.items():
        found = bayes_error(points, log_odds, force=True)
        sure = np.minimum(found.misses, found.false_accepts) >= FEWEST_ERRORS
        (line,) = axes.plot(found.log_odds, found.actual, linewidth=0.8)
        color = line.get_color()
        bold = np.where(sure, found.actual, np.nan)
        axes.plot(found.log_odds, bold, color=color, linewidth=1.8)
        axes.plot([], [], color=color, linewidth=1.8, label=plain(name))
        axes.plot(found.log_odds, found.minimum, color=color, linewidth=1, linestyle=(0, (3, 2)))
        highest = max(highest, float(found.actual.max()))
    axes.axhline(1, color="0.5", linewidth=0.8, linestyle=":")
    axes.annotate("deciding without scores", (log_odds[0], 1), xytext=(3, 3),
                  textcoords="offset points", fontsize=7, color="0.4")  # fmt: skip
    axes.set_xlim(log_odds[0], log_odds[-1])
    axes.set_ylim(0, min(1.25 * highest, 2.5))
    axes.set_xlabel(
        f"log odds of the prior (dashed: the minimum; thin: fewer than {FEWEST_ERRORS} errors)"
    )
    axes.set_ylabel("normalised Bayes error rate")
    axes.grid(color="0.9", linewidth=0.6)
    axes.legend(loc="upper right", fontsize=8)
    return figure
