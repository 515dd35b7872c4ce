"""The search of ``search`` by the kernels of ``fused``, for a GPU: all sizes are fixed beforehand.

A sample's classes have rooms of fixed size in two buffers; where they do not fit, the room grows,
and where it cannot, the batch is taken in parts. What is found of a sample does not depend on
either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from speechbrain_qmargin.head.prototypes import Prototypes
from speechbrain_qmargin.head.search import Candidates, Query
from speechbrain_qmargin.head.sizes import Sizes

if TYPE_CHECKING:  # it needs Triton
    from speechbrain_qmargin.head.kernels import Batch

__all__ = [
    "MOST_HALVINGS",
    "Asked",
    "Room",
    "candidates",
    "halvings_for",
    "near_support",
    "parts",
    "takes",
]

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


def candidates(
    raw: Tensor, query: Query, prototypes: Prototypes, room: Room
) -> tuple[Candidates, Tensor] | None:
    """What may be active of a shard, in float64, and lower bounds of the levels, [B].

    None where no room is enough, or a prototype is no number. The bounds are those of the targets
    and this shard's classes.

    Parameters
    ----------
    raw : Tensor, [B, D], float32
        The query's embeddings as they were, finite.
    query : Query
        Of an alpha-divergence, and one row a class.
    prototypes : Prototypes
        See :func:`takes`.
    room : Room
    """
    samples, sizes = len(raw), prototypes.sizes
    for halvings in range(room.halvings, MOST_HALVINGS + 1):
        found, most = [], Asked(0, 0)
        for part in parts(samples, halvings):
            each = _of_part(raw[part], query.rows(part), prototypes, room)
            if each is None:
                break
            found.append(each)
            most = Asked(*map(max, most, each.asked))
        else:
            room.halvings = halvings_for(most, samples, sizes)
            width = max(each.rows.shape[1] for each in found)
            rows = [F.pad(each.rows, (0, width - each.rows.shape[1])) for each in found]
            cosines = [
                F.pad(each.cosines, (0, width - each.cosines.shape[1]), value=-math.inf)
                for each in found
            ]
            levels = torch.cat([each.levels for each in found])
            return Candidates(torch.cat(cosines), torch.cat(rows)), levels
    return None


class _Found(NamedTuple):
    cosines: Tensor
    rows: Tensor
    levels: Tensor
    asked: Asked


def _of_part(raw: Tensor, query: Query, prototypes: Prototypes, room: Room) -> _Found | None:
    from speechbrain_qmargin.head import kernels

    measure, sizes = query.of_alpha, prototypes.sizes
    while True:
        # labels of other shards are no classes of this one; their cosines are known nevertheless
        batch = kernels.prepare(
            raw, query.labels, measure.target, measure.classes, measure.alpha, query.scale,
            prototypes,
        )._replace(cosine=query.target / query.scale)  # fmt: skip
        here = room.of(len(raw), sizes)
        rows, cosines = near_support(batch, prototypes, here)
        absent = rows == kernels.ABSENT
        cosines.masked_fill_(absent, -math.inf)
        unsound = cosines.isnan().any()
        # the host waits
        *asked, unsound = torch.stack((batch.peaks.max(), batch.counts.max(), unsound)).tolist()
        asked = Asked(*asked)
        if asked.fits(here):
            if unsound:
                return None
            width = max(asked.kept, 1)
            rows = rows.masked_fill_(absent, 0)[:, :width].long()
            return _Found(cosines[:, :width], rows, batch.levels, asked)
        if not asked.fits(Asked.most(len(raw), sizes)):
            return None
        room.grow(asked)
