"""Face pair sets (LFW, CFP-FP, AgeDB-30, CALFW, CPLFW): accuracy and TAR@FAR over ten folds.

The pairs come in contiguous folds. A fold is judged with the threshold that is best on the other
folds, so no pair has a say in its own threshold (Huang et al. 2007, Labeled Faces in the Wild,
View 2). The common scripts search that threshold on a grid (0.01 of squared distance between unit
embeddings, 0.005 of cosine); here it is exact.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from speechbrain_qmargin.embeddings import pair_products
from speechbrain_qmargin.scoring.figures import TarAtFar
from speechbrain_qmargin.scoring.metrics import (
    allowed_false_accepts,
    operating_points,
    tar_at_far,
)
from speechbrain_qmargin.scoring.plots import det_figure, save_figure
from speechbrain_qmargin.scoring.score_files import write_scores
from speechbrain_qmargin.scoring.uncertainty import mark_of, rate_interval, scarcer, widened
from speechbrain_qmargin.trials import LabelledTrials
from speechbrain_qmargin.trials.pairs import as_labels

__all__ = [
    "FLIPS",
    "FoldFigure",
    "check_folds",
    "flip_fusion",
    "pair_ids",
    "pair_scores",
    "pair_set_figures",
    "ten_fold_accuracy",
    "ten_fold_tar",
]

FLIPS = ("none", "concat", "sum")


@dataclass(frozen=True)
class FoldFigure:
    """A rate measured fold by fold.

    Attributes
    ----------
    kind : str
        "fold_accuracy" or "fold_tar_at_far".
    parameter : float or None
        The FAR.
    name : str
        As it is printed.
    mean, std : float
        Over the folds; `std` is the population's, as the field prints it.
    low, high : float
        95 % interval of the mean: Student's t over the folds, which takes the folds for
        independent. LFW and CFP split people between folds; where people recur in several folds
        the interval is too narrow. Below 30 errors, the wider of it and Clopper-Pearson (of a
        TAR: of its threshold's FAR too).
    errors, pairs : int
        Wrong decisions (of a TAR: missed pairs), and the pairs they are of.
    rests_on : int
        The scarcer of the errors it rests on: of a TAR perhaps the false accepts that its FAR
        allows among the other folds, of one near 0 the pairs accepted. `mark` says what that is
        worth.
    values, thresholds : float arrays [folds]
        Of every fold; pairs are called the same where ``score >= threshold``.
    far : float array [folds] or None
        The FAR that a fold realised at its threshold, of :func:`ten_fold_tar`.

    Examples
    --------
    >>> is_same = np.tile([True, False], 30)
    >>> scores = np.where(is_same, 0.8, 0.1)
    >>> scores[0] = 0  # one pair of the six of the first fold
    >>> figure = ten_fold_accuracy(scores, is_same)
    >>> figure.values[:2].round(3), round(figure.mean, 4), figure.mark
    (array([0.833, 1.   ]), 0.9833, 'unsupported')
    """

    kind: str
    parameter: float | None
    name: str
    mean: float
    std: float
    low: float
    high: float
    errors: int
    pairs: int
    rests_on: int
    values: np.ndarray
    thresholds: np.ndarray
    far: np.ndarray | None = None

    @property
    def mark(self) -> str:
        return mark_of(self.rests_on)

    def __str__(self) -> str:
        text = (
            f"{self.name}: {100 * self.mean:.3f} % (std over folds {100 * self.std:.3f} %, 95 % "
            f"interval {100 * self.low:.3f} to {100 * self.high:.3f} %), {self.errors} errors in "
            f"{self.pairs:,} pairs"
        )
        if self.far is not None:
            text += f", FAR realised {100 * self.far.mean():.3g} %"
        return f"{text}; rests on {self.rests_on} errors: {self.mark}"


def ten_fold_accuracy(scores: np.ndarray, is_same: np.ndarray, folds: int = 10) -> FoldFigure:
    """Accuracy of every fold at the threshold that is best on the others.

    Of the thresholds that are best on the other folds the strictest is taken, as the field's
    argmax does, halfway between the two scores that it lies between.

    Parameters
    ----------
    scores : float array [N]
        Higher is more alike, in the set's own order: the folds are contiguous.
    is_same : bool array [N]
    folds : int
        Of sizes that differ by one at most, the larger ones first.

    Raises
    ------
    ValueError
        Shapes that disagree, scores that are not finite, fewer pairs than folds, or fewer than
        two folds; other folds without a genuine or without an impostor pair.

    Examples
    --------
    >>> is_same = np.tile([True, False], 30)
    >>> figure = ten_fold_accuracy(np.where(is_same, 0.8, 0.1), is_same)
    >>> figure.mean, float(figure.thresholds[0])
    (1.0, 0.45)
    """
    scores, is_same = _checked(scores, is_same, folds)
    values, thresholds, wrong = [], [], 0
    for held in _folds(len(scores), folds):
        threshold = _best_threshold(*_others(scores, is_same, held))
        errors = int(np.count_nonzero((scores[held] >= threshold) != is_same[held]))
        values.append(1 - errors / (held.stop - held.start))
        thresholds.append(threshold)
        wrong += errors
    name, count = f"accuracy over {folds} folds", len(scores)
    few = partial(rate_interval, count - wrong, count)
    kind = "fold_accuracy", None
    return _figure(kind, name, values, wrong, count, wrong, few, thresholds)


def ten_fold_tar(
    scores: np.ndarray, is_same: np.ndarray, far: float = 1e-3, folds: int = 10
) -> FoldFigure:
    """True accept rate of every fold at the threshold whose FAR on the others is at most `far`.

    The field interpolates that threshold between two points of a grid; here it is the exact one
    of :func:`~speechbrain_qmargin.scoring.metrics.tar_at_far`.

    Parameters
    ----------
    scores, is_same, folds
        As :func:`ten_fold_accuracy`.
    far : float

    Raises
    ------
    ValueError
        As :func:`ten_fold_accuracy`; a fold without a genuine or without an impostor pair.

    Examples
    --------
    >>> is_same = np.tile([True, False], 30)
    >>> ten_fold_tar(np.where(is_same, 0.8, 0.1), is_same, 0.1).mean
    1.0
    """
    scores, is_same = _checked(scores, is_same, folds)
    check_folds(is_same, folds)
    values, thresholds, fars, missed = [], [], [], 0
    for held in _folds(len(scores), folds):
        same = is_same[held]
        threshold = tar_at_far(operating_points(*_others(scores, is_same, held)), far).threshold
        accepted = scores[held] >= threshold
        values.append(float(accepted[same].mean()))
        fars.append(float(accepted[~same].mean()))
        thresholds.append(threshold)
        missed += int(np.count_nonzero(~accepted & same))
    measure, genuine = TarAtFar(far), int(np.count_nonzero(is_same))
    everything = operating_points(scores, is_same)
    few = partial(measure.few_errors, measure.find(everything), everything)
    rests_on = min(scarcer(missed, genuine), allowed_false_accepts(far, len(is_same) - genuine))
    name = f"{measure.name} over {folds} folds"
    kind = "fold_tar_at_far", far
    return _figure(kind, name, values, missed, genuine, rests_on, few, thresholds, np.asarray(fars))


def check_folds(is_same: np.ndarray, folds: int = 10) -> None:
    """Whether the pairs allow :func:`ten_fold_accuracy` and :func:`ten_fold_tar`, before scores.

    Parameters
    ----------
    is_same, folds
        As :func:`ten_fold_accuracy`.

    Raises
    ------
    ValueError
        Fewer pairs than folds, fewer than two folds, a fold without a genuine or without an
        impostor pair.

    Examples
    --------
    >>> check_folds(np.tile([True, False], 30))
    """
    _, is_same = _checked(np.zeros(len(is_same)), is_same, folds)
    for held in _folds(len(is_same), folds):
        same = is_same[held]
        if same.all() or not same.any():
            raise ValueError(
                f"pairs {held.start} to {held.stop - 1} are a fold of one kind only: no rate"
            )


def flip_fusion(
    embeddings: np.ndarray, mirrored: np.ndarray | None = None, how: str = "sum"
) -> np.ndarray:
    """One embedding of an image and its mirror image.

    Parameters
    ----------
    embeddings, mirrored : float arrays [N, D]
        As the network gives them, of the images and of the mirrored images.
    how : {"sum", "concat", "none"}
        ``sum`` (the field's F2) and ``concat`` (F1) move the result: the cosine of sums weighs
        how an image compares with the other's mirror image, that of concatenations does not.
        ``none`` (F0) leaves the mirror images out.

    Returns
    -------
    float array [N, D], or [N, 2 D] of ``concat``

    Raises
    ------
    ValueError
        Another `how`, mirror images wanted and not given, or of another shape.

    Examples
    --------
    >>> flip_fusion(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]))
    array([[1., 1.]])
    """
    if how not in FLIPS:
        raise ValueError(f"flip must be one of {', '.join(FLIPS)}, got {how!r}")
    if how == "none":
        return embeddings
    if mirrored is None:
        raise ValueError(f"flip={how!r} needs the mirrored images' embeddings; or flip='none'")
    if mirrored.shape != embeddings.shape:
        raise ValueError(f"embeddings {embeddings.shape}, those mirrored {mirrored.shape}")
    return embeddings + mirrored if how == "sum" else np.concatenate((embeddings, mirrored), axis=1)


def pair_scores(
    embeddings: np.ndarray, mirrored: np.ndarray | None = None, flip: str = "sum"
) -> np.ndarray:
    """Cosines of a pair set's images, which lie one after the other.

    Parameters
    ----------
    embeddings, mirrored, flip
        As :func:`flip_fusion`; rows 2 n and 2 n + 1 are pair n.

    Returns
    -------
    float32 array [N / 2]

    Raises
    ------
    ValueError
        As :func:`flip_fusion`; an odd number of rows, an embedding that is zero or not finite.

    Examples
    --------
    >>> pair_scores(np.array([[1.0, 0.0], [0.0, 2.0]]), flip="none")
    array([0.], dtype=float32)
    """
    if len(embeddings) % 2:
        raise ValueError(f"{len(embeddings)} embeddings do not make pairs")
    fused = np.asarray(flip_fusion(embeddings, mirrored, flip), dtype=np.float32)
    norms = np.sqrt(np.einsum("nd,nd->n", fused, fused))
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if len(bad):
        raise ValueError(f"{len(bad)} embeddings are zero or not finite, the first is row {bad[0]}")
    rows = np.arange(len(fused))
    return pair_products(fused / norms[:, None], rows[0::2], rows[1::2])


def pair_ids(name: str, count: int) -> list[str]:
    """The ids of a pair set's images, two a pair.

    Examples
    --------
    >>> pair_ids("lfw", 1)
    ['lfw/000000', 'lfw/000001']
    """
    return [f"{name}/{number:06d}" for number in range(2 * count)]


def pair_set_figures(
    folder: str | Path,
    name: str,
    ids: Sequence[str],
    embeddings: np.ndarray,
    same: np.ndarray,
    note: str = "",
) -> tuple[FoldFigure, FoldFigure]:
    """Accuracy and TAR@FAR=1e-3 over ten folds; ``cosine.tsv`` and ``det.png`` go into a folder.

    Parameters
    ----------
    folder : path
    name : str
        Of the set.
    ids : sequence of str [2 N]
    embeddings : float array [2 N, D]
        With their mirror images' added, where they are to be; rows 2 n and 2 n + 1 are pair n.
    same : bool array [N]
    note : str
        Said in the picture's title.

    Raises
    ------
    ValueError
        As :func:`pair_scores` and :func:`ten_fold_tar`.

    See Also
    --------
    pair_scores : The cosines.
    ten_fold_accuracy : The first figure.
    ten_fold_tar : The second.

    Examples
    --------
    >>> same = np.tile([True, False], 10)
    >>> rows = np.eye(2)[[0, 0, 0, 1] * 10]  # pairs of one vector, and of two at a right angle
    >>> folder = getfixture("tmp_path")
    >>> accuracy, tar = pair_set_figures(folder, "mine", pair_ids("mine", 20), rows, same)
    >>> accuracy.mean, tar.mean, (folder / "cosine.tsv").is_file()
    (1.0, 1.0, True)
    """
    folder = Path(folder)
    scores = pair_scores(embeddings, flip="none")
    place = {one: row for row, one in enumerate(dict.fromkeys(ids))}
    rows = np.array([place[one] for one in ids])
    trials = LabelledTrials([*place], rows[0::2], rows[1::2], same)
    write_scores(folder / "cosine.tsv", trials, scores, {"kind": "cosine"})
    curve = operating_points(scores, trials.is_target), None
    title = f"{name}. {note}" if note else name
    save_figure(det_figure({"cosine": curve}, title), folder / "det.png")
    return ten_fold_accuracy(scores, same), ten_fold_tar(scores, same)


def _checked(scores, is_same, folds: int) -> tuple[np.ndarray, np.ndarray]:
    scores, is_same = np.asarray(scores), as_labels(is_same)
    if scores.shape != is_same.shape or scores.ndim != 1:
        raise ValueError(f"scores {scores.shape} and labels {is_same.shape} must be equal, [N]")
    if not np.isfinite(scores).all():
        at = int(np.argmin(np.isfinite(scores)))
        raise ValueError(f"the score of pair {at} is {scores[at]}")
    if not 2 <= folds <= len(scores):
        raise ValueError(f"{folds} folds of {len(scores)} pairs; want 2 folds to as many as pairs")
    return scores, is_same


def _folds(count: int, folds: int) -> list[slice]:
    sizes = np.full(folds, count // folds)
    sizes[: count % folds] += 1
    edges = np.append(0, np.cumsum(sizes)).tolist()
    return [slice(*edge) for edge in itertools.pairwise(edges)]


def _others(scores: np.ndarray, is_same: np.ndarray, held: slice):
    parts = slice(0, held.start), slice(held.stop, None)
    return tuple(np.concatenate([array[part] for part in parts]) for array in (scores, is_same))


def _best_threshold(scores: np.ndarray, is_same: np.ndarray) -> float:
    """The strictest of the thresholds of fewest errors, halfway to the score below."""
    points = operating_points(scores, is_same)
    errors = points.misses + points.false_accepts
    at = len(errors) - 1 - int(np.argmin(errors[::-1]))
    threshold = float(points.thresholds[at])
    if math.isinf(threshold):  # reject all
        return threshold
    below = [s[: np.searchsorted(s, threshold)][-1:] for s in (points.targets, points.impostors)]
    below = np.concatenate(below)
    if not len(below):  # accept all
        return -math.inf
    middle = (float(below.max()) + threshold) / 2
    return middle if middle > below.max() else threshold


def _figure(
    kind: tuple[str, float | None], name, values, errors, pairs, rests_on, few, thresholds, far=None
) -> FoldFigure:
    """`few` gives the interval for few errors (``widened``)."""
    from scipy.stats import t

    values = np.asarray(values)
    mean = float(values.mean())
    reach = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    low, high = mean - reach, mean + reach
    low, high = np.clip(widened((low, high), rests_on, few), 0, 1).tolist()
    std = float(values.std())
    thresholds = np.asarray(thresholds)
    return FoldFigure(
        *kind, name, mean, std, low, high, errors, pairs, rests_on, values, thresholds, far
    )
