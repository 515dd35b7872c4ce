"""How much of the classes is looked at at a time, by the kind of processor."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from speechbrain_qmargin.loss.device import kernels_run

__all__ = ["Sizes", "constants"]


@dataclass(frozen=True)
class Sizes:
    """What the head's step takes in one piece, and from where on it goes which way.

    Results do not depend on them beyond rounding. On a CPU a piece is to stay in the cache; on a
    GPU every piece costs launches, so it is as large as `at_once` allows.

    Attributes
    ----------
    screen_from : int
        Below this many classes ``search`` scores all in float32.
    screen : torch.dtype or None
        bf16, int8 or float32, in which classes are screened. None: what the processor multiplies
        fast, see :func:`~speechbrain_qmargin.head.prototypes.screen_dtype`.
    output_bytes : int
        Of a screening product.
    at_once : int or None
        Bytes that one piece of anything else may take. None: the numbers of rows below.
    chunk, block, exact, rows : int
        Rows scored where all are; surviving rows scored in float32; pairs computed again in
        float64; rows of derived values and gradients.
    parts : tuple of float, or int
        Shares of the classes after which the floors rise; or how many times the classes seen so far
        may grow in each part, from the sample on. What is found in a part is at most about so many
        times the support of what was seen: where a sample's classes have a room of fixed size, it
        is not to grow with the classes.
    sample, sample_top : int
        Classes the first floors come from, and how many of them count.
    most : float
        Share of the classes above which none is skipped.
    max_candidates : int
        Padded candidates of a batch.
    fused : bool
        Whether the step is that of ``fused``: a few kernels, written in Triton.
    screened, kept : int
        Room for a sample's classes there: above a floor of the screening pass, and near the
        support. It grows where it was too small.

    Examples
    --------
    >>> from speechbrain_qmargin.head import QMarginHead
    >>> head = QMarginHead(4, 10, sizes=Sizes(screen_from=1))   # it searches however few there are
    >>> Sizes(parts=1)
    Traceback (most recent call last):
    ValueError: parts: the classes seen have to grow, got 1
    """

    screen_from: int = 32768
    screen: torch.dtype | None = None
    output_bytes: int = 2**20
    at_once: int | None = None
    chunk: int = 8192
    block: int = 32768
    exact: int = 4096
    rows: int = 8192
    parts: tuple[float, ...] | int = (1 / 16, 3 / 16, 7 / 16)
    sample: int = 16384
    sample_top: int = 64
    most: float = 0.1
    max_candidates: int = 4_000_000
    fused: bool = False
    screened: int = 4096
    kept: int = 2048

    def __post_init__(self) -> None:
        if isinstance(self.parts, int) and self.parts < 2:
            raise ValueError(f"parts: the classes seen have to grow, got {self.parts}")

    def parts_of(self, classes: int) -> list[slice]:
        """All classes in a few parts, the first ones smaller: what is found raises the floor.

        Examples
        --------
        >>> Sizes(parts=(0.25,)).parts_of(100)
        [slice(0, 25, None), slice(25, 100, None)]
        >>> [part.stop for part in Sizes(parts=8, sample=10).parts_of(1000)]
        [80, 640, 1000]
        """
        if isinstance(self.parts, int):
            ends, seen = [0], self.parts * self.sample
            while seen < classes:
                ends.append(seen)
                seen *= self.parts
        else:
            ends = [0, *(int(classes * share) for share in self.parts)]
        return [slice(*both) for both in itertools.pairwise([*ends, classes])]

    def rows_of_product(self, batch: int, bytes_each: int, least: int) -> int:
        """Rows whose products with a batch fit `output_bytes`, and `least` in any case.

        Examples
        --------
        >>> constants(torch.device("cuda")).rows_of_product(1024, bytes_each=2, least=64)
        120832
        """
        return max(least, self.output_bytes // (batch * bytes_each))

    def rows_of_products(self, batch: int) -> int:
        """The same for ``fused``, beside the room for the batch's classes, grown fourfold.

        It is the batch's size alone that decides, not what earlier batches needed: a resumed run is
        to have the same products.

        Examples
        --------
        >>> sizes = constants(torch.device("cuda"))
        >>> sizes.rows_of_products(128), sizes.rows_of_products(1024)
        (917504, 74716)
        """
        grown = min(4 * self.screened, max(self.screened, self.max_candidates // batch))
        room = 8 * batch * (grown - self.screened)
        return max(1024, (self.output_bytes - room) // (2 * batch))

    def fit(self, rows: int, bytes_each: int) -> int:
        """`rows`, one of the numbers above, or as many of `bytes_each` as `at_once` holds.

        Examples
        --------
        >>> constants(torch.device("cpu")).fit(8192, 512), Sizes(at_once=2**20).fit(8192, 512)
        (8192, 2048)
        """
        return rows if self.at_once is None else max(256, self.at_once // bytes_each)


def constants(device: torch.device) -> Sizes:
    """The sizes for a device.

    Examples
    --------
    >>> constants(torch.device("cpu")).output_bytes, constants(torch.device("cuda")).output_bytes
    (1048576, 247463936)
    """
    if device.type == "cpu":
        return Sizes()
    return Sizes(
        output_bytes=236 * 2**20,  # for 868,928 classes, a part of 1,000,000, at B = 128
        at_once=64 * 2**20,
        parts=8,
        max_candidates=16_000_000,
        fused=kernels_run(device),
    )
