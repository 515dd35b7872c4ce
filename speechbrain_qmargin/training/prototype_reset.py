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
    The mean of the unit embeddings of their samples in that epoch, as they were trained on, with
    the length that the prototype had. The optimiser's moments of these rows become zero.

The sums are kept in the checkpoints, so that an interrupted epoch goes on with them. In several
processes they are of all processes' samples: each process keeps the sums of the prototypes that it
holds, a shard or all of them, and prototypes that are on all processes become the same on all.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechbrain_qmargin.communicator import Communicator
from speechbrain_qmargin.head.optim import RowSparse
from speechbrain_qmargin.head.shards import load_shards, save_shards
from speechbrain_qmargin.loss.device import add_rows

__all__ = ["PrototypeReset"]

_SEEN, _ACTIVE = -2, -1  # columns


class PrototypeReset(nn.Module):
    """Watches the epochs that are named, and resets prototypes at the end of each.

    Parameters
    ----------
    num_classes, dim : int
        C over all processes, and D.
    after_epochs : list of int
        Counted from 1.
    which : {"collapsed", "all"}
    comm : Communicator, optional
        The processes whose samples count. None: this one.
    in_shards : bool
        Whether each process holds a shard of the prototypes; otherwise it holds all.

    Raises
    ------
    ValueError
        Another `which`; epochs below 1.

    Examples
    --------
    >>> reset = PrototypeReset(3, 2, after_epochs=[1])
    >>> x = torch.tensor([[0.0, 5.0], [3.0, 0.0]])
    >>> reset.observe(x, torch.tensor([0, 1]), target_posterior=torch.tensor([0.0, 0.4]))
    >>> weight = nn.Parameter(torch.tensor([[-2.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
    >>> reset.apply_to(weight), weight.data
    (1, tensor([[0., 2.],
            [0., 1.],
            [1., 0.]]))
    """

    table: Tensor

    def __init__(
        self,
        num_classes: int,
        dim: int,
        after_epochs: list[int],
        which: str = "collapsed",
        comm: Communicator | None = None,
        in_shards: bool = False,
    ) -> None:
        super().__init__()
        if which not in ("collapsed", "all"):
            raise ValueError(f"reset_prototypes: {which!r}; choose collapsed or all")
        if not all(isinstance(epoch, int) and epoch >= 1 for epoch in after_epochs):
            raise ValueError(f"reset_after_epochs: epochs from 1 on wanted, got {after_epochs}")
        self.after_epochs, self.which = frozenset(after_epochs), which
        self.comm, self.in_shards = comm or Communicator.alone(), in_shards
        self.num_classes = num_classes
        self.start, self.stop = self.comm.shard_of(num_classes) if in_shards else (0, num_classes)
        # of each prototype: the sum of its samples' unit embeddings, whether there were any, and
        # whether it was active for one of them
        self.register_buffer("table", torch.zeros(self.stop - self.start, dim + 2))

    def begin(self) -> None:
        """Forget what was seen: an epoch begins."""
        self.table.zero_()

    @torch.no_grad()
    def observe(self, embeddings: Tensor, targets: Tensor, target_posterior: Tensor) -> None:
        """Take in a batch: embeddings [B, D], targets [B], their posteriors [B].

        Every process calls it, with its own batch of any size. Embeddings that are not finite are
        left out.
        """
        unit = F.normalize(embeddings.detach().float(), dim=1)
        names = torch.stack((targets.long(), (target_posterior > 0).long()), 1)
        unit, names = self.comm.gather_all(unit, names)
        targets, active = names.unbind(1)
        mine = unit.isfinite().all(1) & (targets >= self.start) & (targets < self.stop)
        rows = targets[mine] - self.start
        add_rows(self.table[:, :_SEEN], rows, unit[mine])
        self.table[rows, _SEEN] = 1
        self.table[rows[active[mine] > 0], _ACTIVE] = 1

    @torch.no_grad()
    def apply_to(self, weight: Tensor, optimizer: torch.optim.Optimizer | None = None) -> int:
        """Set the prototypes [stop - start, D] of this process; how many it was in all of them.

        Parameters
        ----------
        weight : Tensor
        optimizer : Optimizer, optional
            Whose moments of these rows become zero.
        """
        sums = self.table[:, :_SEEN]
        chosen = self.table[:, _SEEN] > 0
        if self.which == "collapsed":
            chosen = chosen & (self.table[:, _ACTIVE] == 0)
        rows = (chosen & (sums.norm(dim=1) > 0)).nonzero().squeeze(1)
        if len(rows):
            self._set(weight, rows, sums[rows], optimizer)
        if not self.in_shards:
            return len(rows)
        return int(self.comm.sum(torch.tensor([len(rows)], device=weight.device)))

    @staticmethod
    def _set(
        weight: Tensor, rows: Tensor, sums: Tensor, optimizer: torch.optim.Optimizer | None
    ) -> None:
        if optimizer is not None:
            if isinstance(optimizer, RowSparse):
                optimizer.catch_up()  # idle rows
            for moment in optimizer.state.get(weight, {}).values():
                if isinstance(moment, Tensor) and moment.shape == weight.shape:
                    moment[rows] = 0
        lengths = weight[rows].norm(dim=1, keepdim=True)
        weight[rows] = (F.normalize(sums, dim=1) * lengths).to(weight.dtype)

    def save(self, path: str | Path) -> None:
        """Where the prototypes are in shards: write what was seen; every process calls it."""
        save_shards(path, self.table, self.num_classes, self.comm)

    def load(self, path: str | Path) -> None:
        """Read what any number of processes wrote by :meth:`save`."""
        load_shards(path, self.table, self.num_classes, self.comm)
