r"""SGD that touches only the prototypes with a gradient, and gives what dense SGD gives.

Without a gradient, a step of SGD with momentum mu, weight decay d and learning rate l is linear in
a row w and its momentum b, the same for every row:

    b' = mu b + d w,      w' = w - l b'      (nesterov: w' = w - l (d w + mu b')).

So an idle row need not be touched: the product of these 2 x 2 matrices since its last step, kept
for each possible last step, catches it up exactly when it is next needed.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

__all__ = ["RowSparseSGD"]

_ROWS_AT_ONCE = 8192
# Steps after which every row is caught up, so that the table of products stays small
_MAX_IDLE = 4096


class RowSparseSGD(torch.optim.SGD):
    """``torch.optim.SGD`` whose row-sparse parameters cost what their gradient's rows cost.

    Parameters with ordinary gradients are left to ``torch.optim.SGD``. A row of a sparse gradient
    is updated as dense SGD would have, momentum, nesterov and weight decay of its idle steps and
    every change of the learning rate included.

    What differs, on purpose: between its visits a row is *seen* as of its last one. Without
    momentum that is no difference to :class:`~speechbrain_qmargin.head.QMarginHead`: an idle
    row changes its length by weight decay, which cosines do not see, so training equals dense
    SGD's. With momentum the remaining
    glide of an idle row shows up when it is next active, before its next gradient is added, or at
    :meth:`catch_up`; every row's position is then dense SGD's for the gradients that were given.

    Parameters
    ----------
    params : iterable of parameters or groups
    lr, momentum, weight_decay : float
    nesterov : bool

    Notes
    -----
    State of a row-sparse parameter: a momentum buffer of its size (none without momentum) and one
    integer a row. ``state_dict`` catches up first and is the one of ``torch.optim.SGD``;
    ``QMarginHead`` catches up before it is saved or evaluated.

    Examples
    --------
    >>> from speechbrain_qmargin.head import QMarginHead
    >>> head = QMarginHead(embedding_dim=4, num_classes=1000)
    >>> optimizer = RowSparseSGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    >>> head(torch.randn(8, 4), torch.arange(8)).backward()
    >>> optimizer.step()

    In a SpeechBrain recipe::

        opt_class: !name:speechbrain_qmargin.head.RowSparseSGD
            lr: 0.1
            momentum: 0.9
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        self._idle: dict[Tensor, _IdleRows] = {}
        super().__init__(
            params, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov
        )
        # One row-sparse parameter at a time has an owner that wants to catch it up
        this = weakref.ref(self)
        for group in self.param_groups:
            for p in group["params"]:
                if hasattr(p, "qmargin_rows_changed"):
                    p.qmargin_catch_up = lambda this=this: this() and this().catch_up()

    @torch.no_grad()
    def step(self, closure=None):
        """One step; `closure` as in ``torch.optim.SGD``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        sparse = [
            (p, group)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None and (p.grad.is_sparse or p in self._idle)
        ]
        grads = [p.grad for p, _ in sparse]
        try:
            for p, _ in sparse:
                p.grad = None
            super().step()
        finally:
            for (p, _), grad in zip(sparse, grads, strict=True):
                p.grad = grad
        for p, group in sparse:
            self._row_step(p, group)
        return loss

    def _row_step(self, p: Tensor, group: dict) -> None:
        lr, mu, decay = float(group["lr"]), group["momentum"], group["weight_decay"]
        if mu and self.state[p].get("momentum_buffer") is None:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffer = self.state[p].get("momentum_buffer")
        idle = self._idle.setdefault(p, _IdleRows(p))
        rows, values = _rows_and_values(p.grad)
        before = p._version
        for start in range(0, rows.numel(), _ROWS_AT_ONCE):
            part = rows[start : start + _ROWS_AT_ONCE]
            w, b = idle.caught_up(p, buffer, part)
            d = values[start : start + _ROWS_AT_ONCE]
            d = torch.add(d, w, alpha=decay) if decay else d
            if b is not None:
                b.mul_(mu).add_(d)
                buffer.index_copy_(0, part, b)
                d = torch.add(d, b, alpha=mu) if group["nesterov"] else b
            p.index_copy_(0, part, w.sub_(d, alpha=lr))
        idle.advance(rows, lr, mu, decay, group["nesterov"])
        if hasattr(p, "qmargin_rows_changed"):
            p.qmargin_rows_changed(rows, before)
        if idle.full:
            self.catch_up()

    @torch.no_grad()
    def catch_up(self) -> None:
        """Bring every idle row of the row-sparse parameters to the present step."""
        for p, idle in self._idle.items():
            if not idle.pending:
                continue
            buffer = self.state[p].get("momentum_buffer")
            everything = torch.arange(p.shape[0], device=p.device)
            for part in everything.split(_ROWS_AT_ONCE):
                w, b = idle.caught_up(p, buffer, part)
                p.index_copy_(0, part, w)
                if b is not None:
                    buffer.index_copy_(0, part, b)
            idle.reset()

    def state_dict(self):
        """That of ``torch.optim.SGD``, with every row caught up."""
        self.catch_up()
        return super().state_dict()

    def load_state_dict(self, state_dict):
        """Also loads the state of a ``torch.optim.SGD``."""
        super().load_state_dict(state_dict)
        for idle in self._idle.values():
            idle.reset()


class _IdleRows:
    """Since when each row of a parameter has been idle, and what the idle steps amount to."""

    def __init__(self, p: Tensor) -> None:
        self.last = torch.zeros(p.shape[0], dtype=torch.int32, device=p.device)
        self.reset()

    def reset(self) -> None:
        self.last.zero_()
        self.steps = 0
        # products[i]: all steps since step i, in float64
        self.products = torch.eye(2, dtype=torch.float64).unsqueeze(0)
        self.pending = False

    @property
    def full(self) -> bool:
        return self.steps >= _MAX_IDLE

    def advance(self, rows: Tensor, lr: float, mu: float, decay: float, nesterov: bool) -> None:
        if not mu and not decay:
            return
        self.pending = True
        self.steps += 1
        self.last[rows] = self.steps
        seen = 1 + mu if nesterov else 1.0
        glide = mu * mu if nesterov else mu
        step = torch.tensor(
            [[1 - lr * decay * seen, -lr * glide], [decay, mu]], dtype=torch.float64
        )
        self.products = torch.cat([step @ self.products, torch.eye(2, dtype=torch.float64)[None]])

    def caught_up(
        self, p: Tensor, buffer: Tensor | None, rows: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        w = p.index_select(0, rows)
        b = None if buffer is None else buffer.index_select(0, rows)
        if not self.pending:
            return w, b
        since = self.last.index_select(0, rows).long()
        product = self.products.to(p.device)[since].to(p.dtype)
        ww, wb, bw, bb = (product[:, i, j].unsqueeze(1) for i in (0, 1) for j in (0, 1))
        if b is None:
            return w.mul_(ww), None
        new_b = torch.addcmul(b * bb, w, bw)
        return w.mul_(ww).addcmul_(b, wb), new_b


def _rows_and_values(grad: Tensor) -> tuple[Tensor, Tensor]:
    if not grad.is_sparse:
        return torch.arange(grad.shape[0], device=grad.device), grad
    # Autograd forgets that the rows are sorted and unique; sorting them again costs a copy
    rows = grad._indices()[0]
    if grad.is_coalesced() or bool((rows[1:] > rows[:-1]).all()):
        return rows, grad._values()
    grad = grad.coalesce()
    return grad.indices()[0], grad.values()
