"""Templates: one embedding of many images, and the cosines of pairs of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from speechbrain_qmargin.embeddings import pair_products
from speechbrain_qmargin.faces.ijb.images import ImageEmbeddings
from speechbrain_qmargin.faces.ijb.protocol import IJB
from speechbrain_qmargin.faces.pair_sets import FLIPS

__all__ = ["IJBOptions", "pair_cosines", "template_embeddings"]

_IMAGES = 2**14  # image embeddings aggregated at once
_GALLERY = 256  # gallery templates scored at once
_SPARSE = 8  # cosines computed a pair, up to which whole blocks of them are worth it


@dataclass(frozen=True)
class IJBOptions:
    """What moves the result; the defaults are those of InsightFace's evaluation.

    Attributes
    ----------
    flip : {"sum", "concat", "none"}
        How an image's embedding and its mirror image's become one: added (F2), concatenated (F1),
        or the image's alone (F0).
    use_norm_score : bool
        N1: the length of an embedding is its weight in its template. N0: every embedding is of
        unit length first.
    use_detector_score : bool
        D1: the detector's score weighs the embedding.

    Raises
    ------
    ValueError
        Another `flip`.

    Examples
    --------
    >>> print(IJBOptions(flip="none"))
    N1 D1 F0: embeddings keep their norm, weighted by the detector's score, no flip
    """

    flip: str = "sum"
    use_norm_score: bool = True
    use_detector_score: bool = True

    def __post_init__(self):
        if self.flip not in FLIPS:
            raise ValueError(f"flip must be one of {', '.join(FLIPS)}, got {self.flip!r}")

    @property
    def code(self) -> str:
        """As the field abbreviates them, "N1 D1 F2"."""
        return f"N{self.use_norm_score:d} D{self.use_detector_score:d} F{FLIPS.index(self.flip)}"

    def __str__(self) -> str:
        norm = "embeddings keep their norm" if self.use_norm_score else "embeddings of unit norm"
        weight = "weighted by the detector's score" if self.use_detector_score else "unweighted"
        flip = "no flip" if self.flip == "none" else f"image and mirror image by {self.flip}"
        return f"{self.code}: {norm}, {weight}, {flip}"


def template_embeddings(
    ijb: IJB, images: ImageEmbeddings, options: IJBOptions | None = None
) -> np.ndarray:
    """Unit embeddings of the templates, in the order of ``ijb.trials.ids``.

    The mean over each media of a template, summed over its media; accumulated in float64, in
    blocks of images.

    Parameters
    ----------
    ijb : IJB
    images : ImageEmbeddings
    options : IJBOptions, optional

    Returns
    -------
    float32 array [T, D] (2 D where flips are concatenated)

    Raises
    ------
    ValueError
        An image whose embedding is not finite, or zero where it is to be normalised; a template
        whose embedding is zero; named. Mirror images wanted that `images` lacks.

    Examples
    --------
    A video of two frames and a still are one template; the still is another:

    >>> from speechbrain_qmargin.trials import LabelledTrials
    >>> pair = LabelledTrials(["4", "9"], np.array([0]), np.array([1]), np.array([True]))
    >>> ijb = IJB("IJBC", ["1.jpg", "2.jpg", "3.jpg"], np.zeros((3, 5, 2)), np.ones(3),
    ...           image=np.array([0, 1, 2, 2]), template=np.array([0, 0, 0, 1]),
    ...           media=np.array([7, 7, 8, 8]), trials=pair)
    >>> images = ImageEmbeddings(np.array([[2.0, 0.0], [6.0, 0.0], [0.0, 3.0]]))
    >>> unit = template_embeddings(ijb, images, IJBOptions(flip="none"))
    >>> unit
    array([[0.8, 0.6], [0. , 1. ]], dtype=float32)
    >>> pair_cosines(ijb, unit)
    array([0.6], dtype=float32)
    """
    from scipy.sparse import coo_array

    options = options or IJBOptions()
    weight = 1 / np.bincount(ijb.template_media)[ijb.template_media]
    if options.use_detector_score:
        weight = weight * ijb.detector_scores[ijb.image]
    order = np.argsort(ijb.image, kind="stable")
    image, template, weight = ijb.image[order], ijb.template[order], weight[order]
    edges = np.searchsorted(image, np.arange(0, len(ijb.names) + _IMAGES, _IMAGES))

    total = None
    for start, first, last in zip(
        range(0, len(ijb.names), _IMAGES), edges[:-1], edges[1:], strict=False
    ):
        fused = images.fused(slice(start, start + _IMAGES), options.flip)
        norms = np.sqrt(np.einsum("nd,nd->n", fused, fused))
        bad = ~np.isfinite(norms) if options.use_norm_score else ~(np.isfinite(norms) & (norms > 0))
        if bad.any():
            at = int(np.argmax(bad))
            raise ValueError(
                f"the embedding of image {ijb.names[start + at]} has the norm {norms[at]}"
            )
        if not options.use_norm_score:
            fused = fused / norms[:, None]
        if total is None:
            total = np.zeros((ijb.num_templates, fused.shape[1]))
        held, row = np.unique(template[first:last], return_inverse=True)
        entries = (weight[first:last], (row, image[first:last] - start))
        total[held] += coo_array(entries, (len(held), len(fused))).tocsr() @ fused
    assert total is not None  # a protocol has images
    norms = np.linalg.norm(total, axis=1)
    if not norms.min() > 0:
        raise ValueError(
            f"template {ijb.trials.ids[int(np.argmin(norms))]} has an embedding of zero: all its "
            "images have a detector score of 0, or cancel"
        )
    total /= norms[:, None]
    return total.astype(np.float32)


def pair_cosines(ijb: IJB, unit: np.ndarray) -> np.ndarray:
    """The cosine of every pair, in the order of the pair list.

    Parameters
    ----------
    ijb : IJB
    unit : float32 array [T, D]
        Of :func:`template_embeddings`.

    Returns
    -------
    float32 array [N]

    Notes
    -----
    A few thousand gallery templates meet each other template hundreds of times, so a block of them
    against all is one matrix product, from which the pairs are picked: six times as fast at
    IJB-C's size as gathering both rows of every pair.

    Examples
    --------
    >>> from speechbrain_qmargin.trials import LabelledTrials
    >>> pairs = LabelledTrials(["4", "9", "12"], np.array([0, 0]), np.array([1, 2]),
    ...                        np.array([True, False]))
    >>> ijb = IJB("IJBC", [], np.zeros((0, 5, 2)), np.zeros(0), *np.zeros((3, 0), int), pairs)
    >>> pair_cosines(ijb, np.array([[1, 0], [0.6, 0.8], [0, 1]], dtype=np.float32))
    array([0.6, 0. ], dtype=float32)
    """
    left, right = ijb.trials.enrolment, ijb.trials.test
    counts = [np.bincount(side, minlength=len(unit)) for side in (left, right)]
    if np.count_nonzero(counts[1]) < np.count_nonzero(counts[0]):
        left, right, counts = right, left, counts[::-1]
    rows = np.flatnonzero(counts[0])
    if len(rows) * len(unit) > _SPARSE * len(left):
        return pair_products(unit, left, right)
    order = np.argsort(left, kind="stable").astype(np.int32)
    edges = np.append(0, np.cumsum(counts[0][rows]))
    place = np.zeros(len(unit), dtype=np.int32)
    scores = np.empty(len(left), dtype=np.float32)
    for start in range(0, len(rows), _GALLERY):
        block = rows[start : start + _GALLERY]
        pairs = order[edges[start] : edges[start + len(block)]]
        place[block] = np.arange(len(block))
        scores[pairs] = (unit[block] @ unit.T)[place[left[pairs]], right[pairs]]
    return scores
