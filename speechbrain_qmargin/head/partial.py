"""Partial FC: a head that looks at some classes in each step. An approximation, to compare with."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from speechbrain_qmargin.head.classifier import LookedAt, QMarginHead
from speechbrain_qmargin.head.prototypes import Prototypes, are_finite
from speechbrain_qmargin.head.step import Shard

__all__ = ["PartialHead"]


class PartialHead(QMarginHead):
    """Partial FC (An et al., ICCV workshops 2021): the batch's classes, and others at random.

    Each rank draws `sample_rate` of its classes in each step, the targets of all ranks among them;
    any loss is computed exactly as if there were no others. Its value is below the whole loss's,
    and a wrong class is met in one step of 1 / `sample_rate`. :class:`QMarginHead` leaves nothing
    out.

    Classes are drawn from torch's generator, which the recipes seed by seed, step and rank: a
    resumed run draws the same. In evaluation all classes are compared with.

    Parameters
    ----------
    embedding_dim, num_classes : int
    sample_rate : float, in (0, 1]
        0.1 as published.
    **options
        Of :class:`QMarginHead`: alpha, scale, margin, subcentres, sparse_grad, group, seed,
        prototype_std, sizes.

    Raises
    ------
    ValueError
        A rate outside (0, 1]; as :class:`QMarginHead`.
    TypeError
        When it is called: a loss that asks for all cosines.

    Notes
    -----
    With :class:`~speechbrain_qmargin.head.RowSparseSGD` the classes that are not drawn move as by a
    zero gradient (momentum and weight decay go on); in the authors' code they stand still.

    Examples
    --------
    >>> head = PartialHead(embedding_dim=4, num_classes=1000, sample_rate=0.1)
    >>> classes = head.sample(torch.tensor([3, 999]))
    >>> len(classes), 3 in classes, 999 in classes
    (100, True, True)
    >>> head(torch.randn(2, 4), torch.tensor([3, 999])) >= 0
    tensor(True)
    """

    def __init__(
        self, embedding_dim: int, num_classes: int, sample_rate: float = 0.1, **options: Any
    ) -> None:
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate must be in (0, 1], got {sample_rate}")
        super().__init__(embedding_dim, num_classes, **options)
        self.sample_rate = float(sample_rate)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sample_rate={self.sample_rate:g}"

    @property
    def may_use_kernels(self) -> bool:
        return False

    def sample(self, targets: Tensor) -> Tensor:
        """Classes of this rank, counted from its first, sorted; its `targets` are among them."""
        here = targets[(targets >= self.start) & (targets < self.stop)] - self.start
        classes = self.stop - self.start
        draw = torch.rand(classes, device=self.weight.device)
        draw[here] = 2.0
        count = max(round(self.sample_rate * classes), int((draw > 1).sum()), 1)
        return draw.topk(count, sorted=False).indices.sort().values

    def looked_at(self, targets: Tensor, sizes: list[int]) -> LookedAt:
        """What a step on targets [b] of this rank looks at: a sample of the classes."""
        self.in_use()
        comm = self.comm
        everyone = comm.gather(targets, sizes)
        sampled = self.sample(everyone)
        centres = torch.arange(self.subcentres, device=sampled.device)
        rows = (sampled.unsqueeze(1) * self.subcentres + centres).flatten()
        known = self.rows_in_order
        if known is not None:
            known.remember(rows)  # the gradient's are these, not a copy
        weight = F.embedding(rows, self.weight, sparse=known is not None)
        values = weight.detach()
        inverse_norm = values.norm(dim=1).clamp_(min=1e-12).reciprocal_()
        finite = are_finite(inverse_norm)
        counts = [len(sampled)]
        if comm.world > 1:
            facts = torch.tensor([len(sampled), int(finite)], device=comm.device())
            counts, all_finite = torch.stack(comm.gather_rows(facts)).T.tolist()
            finite = torch.tensor(all(all_finite), device=values.device)
        drawn = comm.own(counts)
        own = (everyone >= self.start) & (everyone < self.stop)
        place = torch.searchsorted(sampled, (everyone - self.start).clamp(min=0))
        place = comm.sum(torch.where(own, place + drawn.start, 0))
        shard = Shard(
            Prototypes(values, inverse_norm, None, self._derived.sizes_on(values.device)),
            drawn.start,
            drawn.stop,
            sum(counts),
            comm,
            None,
            self.subcentres,
        )
        return LookedAt(shard, weight, place[comm.own(sizes)], sampled + self.start, finite)

    def rows_are_finite(self) -> Tensor:
        """Those that are drawn are asked for when they are."""
        return torch.ones((), dtype=torch.bool, device=self.weight.device)

    def training_cosines(self, embeddings: Tensor) -> Tensor:
        """There are none."""
        raise TypeError(
            "this loss needs all cosines of a batch, and Partial FC looks at some classes only: "
            "train it with --head dense"
        )
