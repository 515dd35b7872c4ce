"""Prototypes that training left behind are set to the mean of their samples' embeddings.

With a sparse posterior a class may be active for none of its own samples during a whole epoch: the
collapse that the A3M preprint (arXiv 2511.13621) meets by re-initialising prototypes in the middle
of training. Its abstract says no more, and public summaries that the prototypes are brought in
line with the embeddings. What is done here:

which
    ``collapsed``: the classes that had samples in the epoch and a posterior of 0 for all of them.
    ``all``: every class that had samples.
when
    After the epochs that are named, before validation and that epoch's checkpoint.
what they become
    The mean of the unit embeddings of their samples in that epoch, as they were trained on, in the
    length that the prototype had. The optimiser's moments of these rows become zero.

The sums are kept in the checkpoints, so that an interrupted epoch goes on with them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PrototypeReset"]


class PrototypeReset(nn.Module):
    """Watches the epochs that are named, and resets prototypes at their ends.

    Parameters
    ----------
    weight_shape : (C, D)
        Of the prototypes.
    after_epochs : list of int
        Counted from 1.
    which : {"collapsed", "all"}

    Examples
    --------
    >>> reset = PrototypeReset((3, 2), after_epochs=[1])
    >>> x = torch.tensor([[0.0, 5.0], [3.0, 0.0]])
    >>> reset.observe(x, torch.tensor([0, 1]), target_posterior=torch.tensor([0.0, 0.4]))
    >>> weight = nn.Parameter(torch.tensor([[-2.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
    >>> reset.apply_to(weight), weight.data
    (1, tensor([[0., 2.],
            [0., 1.],
            [1., 0.]]))
    """

    sums: Tensor
    seen: Tensor
    active: Tensor

    def __init__(
        self, weight_shape: tuple[int, int], after_epochs: list[int], which: str = "collapsed"
    ) -> None:
        super().__init__()
        if which not in ("collapsed", "all"):
            raise ValueError(f"reset_prototypes: {which!r}; choose collapsed or all")
        if not all(isinstance(epoch, int) and epoch >= 1 for epoch in after_epochs):
            raise ValueError(f"reset_after_epochs: epochs from 1 on wanted, got {after_epochs}")
        self.after_epochs, self.which = frozenset(after_epochs), which
        classes = weight_shape[0]
        self.register_buffer("sums", torch.zeros(weight_shape))
        self.register_buffer("seen", torch.zeros(classes, dtype=torch.bool))
        self.register_buffer("active", torch.zeros(classes, dtype=torch.bool))

    def begin(self) -> None:
        """Forget what was seen: an epoch begins."""
        for buffer in (self.sums, self.seen, self.active):
            buffer.zero_()

    @torch.no_grad()
    def observe(self, embeddings: Tensor, targets: Tensor, target_posterior: Tensor) -> None:
        """Take in a batch: embeddings [B, D], targets [B], their posteriors [B].

        Embeddings that are not finite are left out.
        """
        unit = F.normalize(embeddings.detach().float(), dim=1)
        fine = unit.isfinite().all(1)
        targets, unit = targets.long()[fine], unit[fine]
        self.sums.index_add_(0, targets, unit)
        self.seen[targets] = True
        self.active[targets[target_posterior[fine] > 0]] = True

    @torch.no_grad()
    def apply_to(self, weight: Tensor, optimizer: torch.optim.Optimizer | None = None) -> int:
        """Set the prototypes [C, D]; how many it was.

        Parameters
        ----------
        weight : Tensor
        optimizer : Optimizer, optional
            Whose moments of these rows become zero.
        """
        chosen = self.seen if self.which == "all" else self.seen & ~self.active
        chosen = chosen & (self.sums.norm(dim=1) > 0)
        rows = chosen.nonzero().squeeze(1)
        if not len(rows):
            return 0
        if optimizer is not None:
            catch_up = getattr(optimizer, "catch_up", None)  # idle rows of a row-sparse optimiser
            if catch_up is not None:
                catch_up()
            for moment in optimizer.state.get(weight, {}).values():
                if isinstance(moment, Tensor) and moment.shape == weight.shape:
                    moment[rows] = 0
        lengths = weight[rows].norm(dim=1, keepdim=True)
        weight[rows] = (F.normalize(self.sums[rows], dim=1) * lengths).to(weight.dtype)
        return len(rows)
