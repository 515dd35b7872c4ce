"""IJB-B and IJB-C, 1:1: TAR at FARs with intervals over subjects."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from speechbrain_qmargin.faces.ijb.images import ImageEmbeddings
from speechbrain_qmargin.faces.ijb.protocol import IJB
from speechbrain_qmargin.faces.ijb.templates import IJBOptions, pair_cosines, template_embeddings
from speechbrain_qmargin.files import replacing, write_text
from speechbrain_qmargin.scoring.figures import TarAtFar
from speechbrain_qmargin.scoring.metrics import operating_points
from speechbrain_qmargin.scoring.report import Report, evaluate
from speechbrain_qmargin.scoring.uncertainty import FEWEST_ERRORS, mark_of

__all__ = ["IJB_FARS", "IJBResult", "evaluate_ijb", "sweep_table"]

IJB_FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


@dataclass(frozen=True)
class IJBResult:
    """A report with what it rests on.

    Attributes
    ----------
    target : str
    options : IJBOptions
    scores : float32 array [N]
        Of every pair, unrounded, in the order of the pair list.
    report : Report
    subjects : str
        What is known of the people behind the templates.
    size : str
        Images, media and templates.

    Examples
    --------
    >>> from speechbrain_qmargin.trials import LabelledTrials
    >>> pairs = LabelledTrials(["4", "9", "12"], np.array([0, 0]), np.array([1, 2]),
    ...                        np.array([True, False]))
    >>> each = np.arange(3)  # every template is of one image
    >>> ijb = IJB("IJBC", ["1.jpg", "2.jpg", "3.jpg"], np.zeros((3, 5, 2)), np.ones(3), each, each,
    ...           each, pairs)
    >>> images = ImageEmbeddings(np.array([[1, 0], [0.8, 0.6], [0, 1]]))
    >>> result = evaluate_ijb(ijb, images, IJBOptions(flip="none"))
    >>> print(result.size)
    3 images, 3 media of 3 templates, 2 pairs
    >>> print(result.table().splitlines()[0])
    IJBC 1:1, N1 D1 F0: embeddings keep their norm, weighted by the detector's score, no flip
    """

    target: str
    options: IJBOptions
    scores: np.ndarray
    report: Report
    subjects: str
    size: str

    def table(self) -> str:
        """For people; the options are in it."""
        return "\n".join(
            [
                f"{self.target} 1:1, {self.options}",
                "",
                self.report.table(),
                self.size,
                f"The intervals are over subjects: {self.subjects}",
            ]
        )

    def to_dict(self) -> dict:
        """Plain numbers, for JSON."""
        return {
            "target": self.target,
            "options": asdict(self.options) | {"code": self.options.code},
            "subjects": self.subjects,
            "size": self.size,
        } | self.report.to_dict()

    def save(self, folder: str | Path) -> None:
        """Write report.txt, report.json, scores.npy (float32), roc.png and det.png."""
        from speechbrain_qmargin.scoring.plots import det_figure, save_figure

        folder = Path(folder)
        title = f"{self.target} 1:1, {self.options.code}"
        with replacing(folder / "scores.npy") as partial:
            np.save(partial, self.scores)
        write_text(folder / "report.txt", self.table() + "\n")
        write_text(folder / "report.json", json.dumps(self.to_dict(), indent=2) + "\n")
        curve = {self.options.code: (self.report.points, self.report.spread)}
        save_figure(det_figure(curve, title), folder / "det.png")
        save_figure(_roc_figure(self.report, title), folder / "roc.png")


def evaluate_ijb(
    ijb: IJB,
    images: ImageEmbeddings,
    options: IJBOptions | None = None,
    *,
    fars: Sequence[float] = IJB_FARS,
) -> IJBResult:
    """Templates, the cosine of every pair, TAR at FARs with 95 % intervals.

    The intervals are over subjects, as far as they are known (:meth:`IJB.subjects`).

    Parameters
    ----------
    ijb : IJB
    images : ImageEmbeddings
    options : IJBOptions, optional
    fars : sequence of float

    Raises
    ------
    ValueError
        As :func:`template_embeddings` and
        :func:`~speechbrain_qmargin.scoring.report.evaluate`.

    Examples
    --------
    >>> from speechbrain_qmargin.trials import LabelledTrials
    >>> pairs = LabelledTrials(["4", "9", "12"], np.array([0, 0]), np.array([1, 2]),
    ...                        np.array([True, False]))
    >>> each = np.arange(3)  # every template is of one image
    >>> ijb = IJB("IJBC", ["1.jpg", "2.jpg", "3.jpg"], np.zeros((3, 5, 2)), np.ones(3), each, each,
    ...           each, pairs)
    >>> images = ImageEmbeddings(np.array([[1, 0], [0.8, 0.6], [0, 1]]))
    >>> result = evaluate_ijb(ijb, images, IJBOptions(flip="none"))
    >>> result.scores, result.report["tar_at_far", 0.1].shown
    (array([0.8, 0. ], dtype=float32), '100.00 % (unsupported)')
    """
    options = options or IJBOptions()
    unit = template_embeddings(ijb, images, options)
    scores = pair_cosines(ijb, unit)
    report = evaluate(scores, ijb.trials, fars=fars, units="subjects")
    media = int(ijb.template_media.max()) + 1
    size = (
        f"{len(ijb.names):,} images, {media:,} media of {ijb.num_templates:,} templates, "
        f"{len(ijb.trials):,} pairs"
    )
    return IJBResult(ijb.target, options, scores, report, ijb.subjects(), size)


def sweep_table(
    ijb: IJB,
    images: ImageEmbeddings,
    every: Iterable[IJBOptions],
    fars: Sequence[float] = IJB_FARS,
) -> str:
    """TAR at FARs for several options, as a table: how far they move the result.

    Values alone, for comparison; :func:`evaluate_ijb` has the intervals. Those that rest on fewer
    than three errors are left out.

    Parameters
    ----------
    ijb : IJB
    images : ImageEmbeddings
    every : iterable of IJBOptions
    fars : sequence of float

    Raises
    ------
    ValueError
        As :func:`~speechbrain_qmargin.faces.ijb.templates.template_embeddings` and
        :func:`~speechbrain_qmargin.scoring.metrics.tar_at_far`.

    Examples
    --------
    >>> from speechbrain_qmargin.trials import LabelledTrials
    >>> each, angle = np.arange(37), np.linspace(0, 3, 37)  # every template is of one image
    >>> same = np.isin(each[1:], [1, 2, 3, 34, 35, 36])  # three score highest, three lowest
    >>> ids = [f"{number}" for number in each]
    >>> pairs = LabelledTrials(ids, np.zeros(36, int), each[1:], same)
    >>> ijb = IJB("IJBC", pairs.ids, np.zeros((37, 5, 2)), np.ones(37), each, each, each, pairs)
    >>> images = ImageEmbeddings(np.column_stack([np.cos(angle), np.sin(angle)]))
    >>> print(sweep_table(ijb, images, [IJBOptions(flip="none")], fars=[0.1, 0.01]))
    options        FAR 0.1   FAR 0.01
    N1 D1 F0         50.00          -
    """
    rows = ["options    " + "".join(f"{f'FAR {far:g}':>11}" for far in fars)]
    for options in every:
        scores = pair_cosines(ijb, template_embeddings(ijb, images, options))
        points = operating_points(scores, ijb.trials.is_target)
        row = f"{options.code:11}"
        for far in fars:
            found = TarAtFar(far).find(points)
            shown = mark_of(found.errors or 0) != "unsupported"
            row += f"{100 * found.value:11.2f}" if shown else f"{'-':>11}"
        rows.append(row)
    return "\n".join(rows)


def _roc_figure(report: Report, title: str):
    """TAR over FAR on a logarithmic axis, with its band; grey where fewer than 30 are accepted."""
    from speechbrain_qmargin.scoring.plots import canvas

    points, spread = report.points, report.spread
    figure, axes = canvas(6.6, 4.4)
    lowest = 1 / points.num_impostors
    far, tar = np.maximum(points.far[:-1], lowest / 2), 1 - points.frr[:-1]
    (line,) = axes.step(far, tar, where="pre", linewidth=1.5)  # TAR falls, and then FAR
    grid = np.geomspace(lowest, 0.1, 60)
    band = spread.band(grid.tolist())
    bottom = float(tar.min())
    if band is not None:
        low, high = 1 - band[1], 1 - band[0]
        bottom = float(low.min())
        axes.fill_between(grid, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    for rate in report.figures:
        if rate.kind == "tar_at_far" and rate.mark != "unsupported":
            assert isinstance(rate.parameter, float)
            at = rate.parameter, rate.value
            axes.plot(*at, "o", color=line.get_color(), markersize=4)
            axes.annotate(f"{100 * rate.value:.2f}", at, fontsize=8,
                          xytext=(4, -11), textcoords="offset points")  # fmt: skip
    axes.axvspan(lowest / 2, FEWEST_ERRORS / points.num_impostors, color="0.93", zorder=0)
    axes.set_xscale("log")
    axes.set_xlim(max(lowest / 2, 1e-7), 1)
    axes.set_ylim(max(0.0, bottom - 0.05), 1.01)
    axes.set_xlabel(f"False accept rate (grey: fewer than {FEWEST_ERRORS} false accepts)")
    axes.set_ylabel("True accept rate")
    axes.set_title(title, fontsize=10)
    axes.grid(color="0.88", linewidth=0.6)
    return figure
