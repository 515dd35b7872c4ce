"""The search of ``search`` by kernels, for a GPU: all sizes are fixed beforehand.

A sample's classes have rooms of fixed size in two buffers; where they do not fit, the room grows,
and where it cannot, the batch is taken in parts. What is found of a sample does not depend on
either.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from speechbrain_qmargin.head.prototypes import Prototypes
from speechbrain_qmargin.head.sizes import Sizes

if TYPE_CHECKING:  # it needs Triton
    from speechbrain_qmargin.head.kernels import Batch

__all__ = [
    "MOST_HALVINGS",
    "Asked",
    "Room",
    "halvings_for",
    "near_support",
    "parts",
    "say_too_small",
    "takes",
]

logger = logging.getLogger(__name__)

MOST_HALVINGS = 3


@dataclass
class Room:
    """What earlier batches needed: how many classes a sample may have in the two buffers, at least
    what the sizes say, and how often a batch was halved for them to fit.

    Results do not depend on it; that none was enough is logged once.
    """

    screened: int = 0
    kept: int = 0
    halvings: int = 0
    was_too_small: bool = False

    def of(self, samples: int, sizes: Sizes) -> Asked:
        """For so many samples at a time; no more than they may have."""
        most = Asked.most(samples, sizes)
        return Asked(
            max(sizes.screened, min(self.screened, most.screened)),
            max(sizes.kept, min(self.kept, most.kept)),
        )

    def grow(self, asked: Asked) -> None:
        """To a quarter more than was asked for, rounded up to a power of two."""
        self.screened = max(self.screened, _power_of_2_above(asked.screened))
        self.kept = max(self.kept, _power_of_2_above(asked.kept))


class Asked(NamedTuple):
    """The most classes that a sample had at a time, and near its support."""

    screened: int
    kept: int

    @staticmethod
    def most(samples: int, sizes: Sizes) -> Asked:
        """What each of so many samples may have."""
        each = sizes.max_candidates // samples
        return Asked(max(sizes.screened, each), max(sizes.kept, each // 4))

    def fits(self, room: Asked) -> bool:
        return self.screened <= room.screened and self.kept <= room.kept


def _power_of_2_above(size: int) -> int:
    return 1 << (size * 5 // 4).bit_length()


def parts(samples: int, halvings: int) -> list[slice]:
    """A batch, so often halved.

    Examples
    --------
    >>> parts(5, 1)
    [slice(0, 3, None), slice(3, 5, None)]
    """
    each = -(-samples // 2**halvings)
    return [slice(start, min(start + each, samples)) for start in range(0, samples, each)]


def halvings_for(asked: Asked, samples: int, sizes: Sizes) -> int:
    """How many are enough; more than there may be if none."""
    for halvings in range(MOST_HALVINGS + 1):
        if asked.fits(Asked.most(-(-samples // 2**halvings), sizes)):
            return halvings
    return MOST_HALVINGS + 1


def say_too_small(room: Room, asked: Asked, samples: int, sizes: Sizes) -> None:
    """Log, once for a head, that a batch fits no room."""
    if room.was_too_small:
        return
    room.was_too_small = True
    most = Asked.most(-(-samples // 2**MOST_HALVINGS), sizes)
    first = asked.screened > most.screened
    needed, there = (asked.screened, most.screened) if first else (asked.kept, most.kept)
    logger.warning(
        f"{needed} classes of a sample may be active, and an eighth of a batch of {samples} has "
        f"room for {there} each on this device: such a step is exact too, but many times slower. "
        "Fewer samples a step, a larger alpha or scale leave room"
    )


def takes(prototypes: Prototypes, alpha: float) -> bool:
    """Whether this way is open: alpha > 1, prototypes with a screen in bf16, and kernels."""
    screen = prototypes.screen
    return (
        prototypes.sizes.fused
        and alpha > 1
        and screen is not None
        and screen.rows.dtype == torch.bfloat16
        and prototypes.weight.is_contiguous()
    )


def near_support(batch: Batch, prototypes: Prototypes, room: Asked) -> tuple[Tensor, Tensor]:
    """(classes [B, kept] int32, in order, cosines [B, kept] float64) of what may be active.

    The batch's `counts` and `peaks` say whether the room was enough, its `levels` are lower bounds.
    """
    from speechbrain_qmargin.head import kernels

    sizes, classes, samples = prototypes.sizes, len(prototypes.weight), len(batch.raw)
    device = batch.raw.device
    stride = -(-classes // sizes.sample)  # rounded up: `sample` classes at most
    kernels.sample_floors(batch, kernels.sample_scores(batch, prototypes, stride), stride)
    found = torch.empty(samples, room.screened, dtype=torch.int64, device=device)
    kept = torch.empty(samples, room.kept, dtype=torch.int32, device=device)
    pieces = sizes.parts_of(classes)
    for piece in pieces:
        kernels.screen(batch, prototypes, piece, found)
        kernels.raise_floors(batch, found, kept if piece is pieces[-1] else None)
    del found
    kept = kept.sort(1).values
    return kept, kernels.exact_cosines(batch, prototypes, kept)
