r"""Optimisers that touch only the prototypes with a gradient, and give what dense ones give.

Without a gradient a step of SGD, or of AdamW, changes every row of a matrix and its moments by the
same few numbers. So an idle row need not be touched: what the steps since its last visit amount to
is kept once for each possible last visit, and applied when the row is next needed.

SGD with momentum mu, weight decay d and learning rate l is linear in a row w and its momentum b:

    b' = mu b + d w,      w' = w - l b'      (nesterov: w' = w - l (d w + mu b')),

so it is a product of 2 x 2 matrices. AdamW's moments only fade, m' = b1 m and v' = b2 v, its decay
is a factor, and its movement is m / sqrt(v) times a number that is the same for all rows.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from speechbrain_qmargin.communicator import named_classes
from speechbrain_qmargin.head.prototypes import Mark, mark
from speechbrain_qmargin.head.refusals import named_shard
from speechbrain_qmargin.head.sizes import constants
from speechbrain_qmargin.loss.device import kernels_run, sent

__all__ = ["RowOwner", "RowSparse", "RowSparseAdam", "RowSparseSGD"]

_ROWS_AT_ONCE = 8192
# Steps after which every row is caught up, so that the table of idle steps stays small
_MAX_IDLE = 4096


class RowOwner(Protocol):
    """What an optimiser of rows asks of a head: see :class:`~.QMarginHead`.

    Only the rows' directions count for its loss, not their lengths.
    """

    weight: nn.Parameter

    @property
    def shard(self) -> tuple[int, int, int]:
        """Which classes its rows are, start and stop, and of how many."""
        ...

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on the gradient of `weight` may be row-sparse: `optimizer` takes it."""

    def is_bound_to(self, optimizer: torch.optim.Optimizer) -> bool: ...

    def in_order(self, rows: Tensor) -> bool:
        """Whether a gradient's `rows` [R] are known to rise, each once, without a look at them."""
        ...

    def rows_changed(self, rows: Tensor, before: Mark) -> None:
        """`rows` of the weight were changed, by one who found it at `before`."""


class RowSparse(torch.optim.Optimizer):
    """What the optimisers share: their heads, the table of idle steps, state that can be saved.

    State of a head's weight: the moments, `idle_since` [C], int32, which numbers a line of `idle`
    [n, 4 or 5], float64: what the idle steps since that line's step amount to; and `shard`, which
    classes they are of. All is part of ``state_dict``, as it is: saving changes nothing, and a
    resumed run goes on the same.

    Examples
    --------
    >>> from speechbrain_qmargin.head import QMarginHead
    >>> head = QMarginHead(embedding_dim=2, num_classes=5, alpha=2.0, scale=1.0, margin=0.0)
    >>> optimizer = RowSparseSGD(head.parameters(), lr=0.1, weight_decay=0.5, head=head)
    >>> _ = head.load_state_dict({"weight": torch.tensor([[1.0, 0.0]] + 4 * [[-1.0, 0.0]])})
    >>> head(torch.tensor([[1.0, 0.0]]), torch.tensor([0])).backward()      # the others are behind
    >>> optimizer.step()
    >>> head.weight.detach()[1]         # as it was: nobody has needed it since
    tensor([-1.,  0.])
    >>> optimizer.catch_up()
    >>> head.weight.detach()[1]         # times 1 - 0.1 * 0.5
    tensor([-0.9500,  0.0000])
    """

    _heads: tuple[RowOwner, ...]
    _marks: dict[Tensor, Mark]  # of the weights, as this optimiser left them

    # ------------------------------------------------------------ what an optimiser says of itself

    def _begin(self, p: Tensor, group: dict, state: dict) -> None:
        """Make the moments where there are none; count a step."""
        raise NotImplementedError

    def _pending(self, group: dict) -> bool:
        """Whether an idle step changes anything."""
        raise NotImplementedError

    def _idle_step(self, table: Tensor, group: dict, state: dict) -> Tensor:
        """The table [n, 4 or 5] after one more idle step."""
        raise NotImplementedError

    def _glide(self, w: Tensor, moments: list[Tensor], lines: Tensor, group: dict) -> Tensor | None:
        """Rows and their moments at the end of their idle steps, in place; lines [rows, n, 1].

        Gives what a gradient of the rows before is to be multiplied by [rows, 1]; None: nothing.
        """
        raise NotImplementedError

    def _fade(self, moments: list[Tensor], lines: Tensor) -> None:
        """The moments alone, where the rows were overwritten in the meantime."""
        raise NotImplementedError

    def _visit(self, w: Tensor, d: Tensor, moments: list[Tensor], group: dict, state: dict) -> None:
        """A step of rows w with gradient d, in place."""
        raise NotImplementedError

    def _visit_in_one_launch(
        self, p: Tensor, rows: Tensor, values: Tensor, group: dict, state: dict, present: int | None
    ) -> None:
        """As :meth:`_visit_in_parts`, by a kernel of ``row_kernels``."""
        raise NotImplementedError

    def _fresh(self, group: dict, state: dict) -> tuple[float, ...]:
        """The line of a row that was visited at this step."""
        raise NotImplementedError

    _moments: tuple[str, ...]
    _only: dict[str, Any]  # of a group's settings, what the rows can follow

    # ------------------------------------------------------------ heads

    def bind(self, head: RowOwner) -> None:
        """Take over the prototypes of one more head, whose weight is in the parameter groups.

        A head in DistributedDataParallel is the head.

        Raises
        ------
        ValueError
            It is not.
        """
        head = getattr(head, "module", head)
        if all(head.weight is not p for group in self.param_groups for p in group["params"]):
            raise ValueError(
                f"{type(self).__name__}: the weight of its head is not among the parameters it was "
                "given; add head.parameters()"
            )
        self._heads = (*self._heads, head)
        head.bind(self)

    def _bind_all(self, heads: RowOwner | Iterable[RowOwner]) -> None:
        self._heads, self._marks = (), {}
        for head in heads if isinstance(heads, Iterable) else (heads,):
            self.bind(head)

    def _weights(self, *, loading: bool = False) -> dict[Tensor, RowOwner]:
        found = {}
        parameters = {p for group in self.param_groups for p in group["params"]}
        for head in self._heads:
            if head.weight not in parameters or not head.is_bound_to(self):
                raise RuntimeError(
                    f"{type(self).__name__}: its head is bound to another optimiser, or has "
                    "another weight than the one given here, as after load_state_dict("
                    "assign=True). Make the optimiser anew from the head"
                )
            found[head.weight] = head
            if not loading:
                self._check_state(head)
        for group in self.param_groups:
            if any(p in found for p in group["params"]):
                self._refuse(group)
        return found

    def _check_state(self, head: RowOwner) -> None:
        """Refuse the state of other rows: where there are as many or more, nothing else would."""
        state, own = self.state.get(head.weight, {}), head.shard
        said = tuple(state.get("shard", own))
        names = [n for n in (*self._moments, "idle_since") if state.get(n) is not None]
        sizes = {len(state[name]) for name in names}
        if said == own and sizes <= {len(head.weight)}:
            return
        raise ValueError(
            f"{type(self).__name__}: its state of the prototypes is of the classes "
            f"{named_classes(*said)}, {', '.join(map(str, sorted(sizes)))} rows, and the head has "
            f"{named_classes(*own)}, "
            f"{len(head.weight)} rows. For another number of classes make the optimiser anew; in "
            "shards call load_shards after load_state_dict, or save one state_dict on each rank"
        )

    def _refuse(self, group: dict) -> None:
        """Settings of a group that the rows would not follow, as of a dense optimiser's state."""
        for name, value in self._only.items():
            if group.get(name, value) != value:
                raise ValueError(
                    f"{type(self).__name__}: {name}={group[name]} of the group with the "
                    f"prototypes, where it can be {value} alone; other parameters may have a "
                    "group of their own"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_heads": self._heads}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_heads" in state:  # a copy: of its own heads, which it owns
            self._marks = {p: mark(p) for p, known in self.state.items() if "idle" in known}
            for head in self._heads:
                head.bind(self)

    # ------------------------------------------------------------ steps

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None):  # pyright: ignore
        """One step; `closure` as in ``torch.optim``.

        Raises
        ------
        RuntimeError
            A row-sparse gradient of a parameter that belongs to no bound head, or a head whose
            weight is no longer the parameter given here.
        ValueError
            A setting of the prototypes' group that they cannot follow, as ``maximize``; a state
            that was loaded and is of other classes.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        weights = self._weights()
        mine = [
            (p, group) for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        for p, _ in mine:
            if p.grad.is_sparse and p not in weights:
                raise RuntimeError(
                    f"{type(self).__name__} got a row-sparse gradient of a parameter "
                    f"{tuple(p.shape)} that belongs to no head bound to it: give head=..., or call "
                    "optimizer.bind(head)"
                )
        mine = [(p, group) for p, group in mine if p in weights]
        grads = [p.grad for p, _ in mine]
        others = super().step.__func__  # pyright: ignore[reportFunctionMemberAccess]
        if getattr(others, "hooked", False):  # torch's own may be wrapped: hooks run once a step
            others = others.__wrapped__
        try:
            for p, _ in mine:
                p.grad = None
            others(self)
        finally:
            for (p, _), grad in zip(mine, grads, strict=True):
                p.grad = grad
        for p, group in mine:
            self._row_step(p, group, weights[p])
        return loss

    def _row_step(self, p: Tensor, group: dict, head: RowOwner) -> None:
        state, before = self.state[p], mark(p)
        if self._marks.get(p, before) != before:
            self._drop(p, group)
        self._begin(p, group, state)
        if "idle" not in state:
            state["idle"], state["shard"] = self._line(group, state), head.shard
            state["idle_since"] = torch.zeros(p.shape[0], dtype=torch.int32, device=p.device)
        assert p.grad is not None
        rows, values = _rows_and_values(p.grad, head)
        counted = self._pending(group) or len(state["idle"]) > 1
        present = len(state["idle"]) if counted else None
        if kernels_run(p.device) and p.dtype == torch.float32 and p.is_contiguous():
            self._visit_in_one_launch(p, rows, values.contiguous(), group, state, present)
            torch.autograd.graph.increment_version(p)
        else:
            self._visit_in_parts(p, rows, values, group, state, present)
        if counted:
            table = self._idle_step(state["idle"], group, state)
            state["idle"] = torch.cat([table, self._line(group, state)])
        head.rows_changed(rows, before)
        self._marks[p] = mark(p)
        if len(state["idle"]) > _MAX_IDLE:
            self.catch_up()

    def _visit_in_parts(
        self, p: Tensor, rows: Tensor, values: Tensor, group: dict, state: dict, present: int | None
    ) -> None:
        """A step of `rows` of a weight; `present` is their line from now on, None: as before."""
        at_once = _at_once(p)
        for start in range(0, rows.numel(), at_once):
            part = rows[start : start + at_once]
            w, moments, factor = self._caught_up(p, state, group, part)
            d = values[start : start + at_once]
            self._visit(w, d if factor is None else d * factor, moments, group, state)
            p.index_copy_(0, part, w)
            for name, moment in zip(self._moments, moments, strict=False):
                state[name].index_copy_(0, part, moment)
        if present is not None:
            state["idle_since"][rows] = present

    def _caught_up(
        self, p: Tensor, state: dict, group: dict, rows: Tensor
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        w, factor = p.index_select(0, rows), None
        moments = [state[name].index_select(0, rows) for name in self._moments if name in state]
        if len(state["idle"]) > 1:
            factor = self._glide(w, moments, self._lines(p, state, rows), group)
        return w, moments, factor

    @staticmethod
    def _lines(p: Tensor, state: dict, rows: Tensor) -> Tensor:
        """[rows, n, 1]"""
        since = state["idle_since"].index_select(0, rows).long()
        return state["idle"].to(p.device)[since].to(p.dtype).unsqueeze(2)

    @torch.no_grad()
    def catch_up(self) -> None:
        """Bring every idle row to the present step: the positions are then the dense optimiser's.

        Without it a prototype stays where it was last visited, in training, evaluation and in a
        checkpoint alike, until it is visited again.
        """
        weights = self._weights()
        for group in self.param_groups:
            for p in group["params"]:
                if p not in weights or "idle" not in self.state[p]:
                    continue
                state, before = self.state[p], mark(p)
                if self._marks.get(p, before) != before:
                    self._drop(p, group)
                elif len(state["idle"]) > 1:
                    everything = torch.arange(p.shape[0], device=p.device)
                    for part in everything.split(_at_once(p)):
                        w, moments, _ = self._caught_up(p, state, group, part)
                        p.index_copy_(0, part, w)
                        for name, moment in zip(self._moments, moments, strict=False):
                            state[name].index_copy_(0, part, moment)
                    weights[p].rows_changed(everything, before)
                self._forget(group, state)
                self._marks[p] = mark(p)

    def _line(self, group: dict, state: dict) -> Tensor:
        return torch.tensor([self._fresh(group, state)], dtype=torch.float64, device="cpu")

    def _forget(self, group: dict, state: dict) -> None:
        state["idle"] = self._line(group, state)
        state["idle_since"].zero_()

    def _drop(self, p: Tensor, group: dict) -> None:
        """The weight was written by another: what its idle rows had before them is void.

        Their moments fade as they would have.
        """
        state = self.state[p]
        if len(state["idle"]) > 1:
            for part in torch.arange(p.shape[0], device=p.device).split(_at_once(p)):
                moments = [state[n].index_select(0, part) for n in self._moments if n in state]
                self._fade(moments, self._lines(p, state, part))
                for name, moment in zip(self._moments, moments, strict=False):
                    state[name].index_copy_(0, part, moment)
        self._forget(group, state)

    # ------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim``; a table of idle steps goes on in NaN up to its largest size.

        ``torch.distributed.checkpoint`` loads tensors into those of equal size.
        """
        found = super().state_dict()
        for number, _ in self._numbered(found):
            state = found["state"].get(number, {})
            if "idle" in state:
                more = max(0, _MAX_IDLE - len(state["idle"]))
                idle = nn.functional.pad(state["idle"], (0, 0, 0, more), value=math.nan)
                said = {"idle": idle, "shard": named_shard(*state["shard"])}
                found["state"][number] = {**state, **said}
        return found

    def _numbered(self, state_dict: dict[str, Any]) -> Iterable[tuple[Any, Tensor]]:
        """The parameters, and by what a state names them."""
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        return zip(numbers, parameters, strict=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``torch.optim``; the state of the dense optimiser loads too.

        Raises
        ------
        ValueError
            The state of another kind of optimiser.
        """
        own = self.defaults.keys() & inspect.signature(type(self)).parameters.keys()
        for group in state_dict["param_groups"]:
            if missing := sorted(own - group.keys()):
                raise ValueError(
                    f"{type(self).__name__}: the state is of another kind of optimiser, without "
                    f"{', '.join(missing)}. Load it into that one, or begin with a new state"
                )
        super().load_state_dict(state_dict)
        # torch casts all state to the parameter's type
        for number, p in self._numbered(state_dict):
            stored, state = state_dict["state"].get(number, {}), self.state[p]
            if "idle" in stored:
                idle = stored["idle"].cpu().double()
                state["idle"] = idle[~idle[:, 0].isnan()]
                state["idle_since"] = stored["idle_since"].to(p.device, torch.int32)
            if "shard" in stored:
                state["shard"] = tuple(map(int, stored["shard"]))
        self._marks = {}  # the weights may be loaded before or after

    def rows_state(self, weight: Tensor) -> dict[str, Tensor]:
        """The state of a head's weight, for a checkpoint in shards."""
        self._weights()
        names = (*self._moments, "idle_since", "idle", "step")
        state = self.state.get(weight, {})
        return {name: state[name] for name in names if state.get(name) is not None}

    def load_rows_state(self, weight: Tensor, parts: list[tuple[slice, dict]]) -> None:
        """What :meth:`rows_state` gave, of the rows of any number of shards."""
        state: dict[str, Any] = {"shard": self._weights(loading=True)[weight].shard}
        for rows, stored in parts:
            for name in self._moments:
                if name in stored:
                    whole = state.setdefault(name, torch.zeros_like(weight))
                    whole[rows] = stored[name].to(weight)
            if "step" in stored:
                state["step"] = stored["step"].clone()
            if "idle" in stored:
                table = stored["idle"].double()
                if "idle" not in state:
                    state["idle"] = table.clone()
                    state["idle_since"] = torch.zeros(
                        len(weight), dtype=torch.int32, device=weight.device
                    )
                first = len(state["idle"]) - len(table)
                if first < 0 or not torch.equal(state["idle"][first:], table):
                    first = len(state["idle"])
                    state["idle"] = torch.cat([state["idle"], table])
                since = stored["idle_since"].to(weight.device) + first
                state["idle_since"][rows] = since.to(torch.int32)
        self.state[weight] = state
        self._marks.pop(weight, None)


class RowSparseSGD(RowSparse, torch.optim.SGD):
    """``torch.optim.SGD`` for a head: only prototypes (rows) that have a gradient cost anything.

    The other parameters are left to ``torch.optim.SGD``. A row with a gradient ends where dense SGD
    would have put it, with momentum, nesterov and weight decay of its idle steps and every change
    of the learning rate.

    One thing differs, on purpose: until it next has a gradient, a row stays where its last update
    left it, in training, evaluation and checkpoints alike. Without momentum that is the direction
    that dense SGD gives it, for weight decay changes only its length, which a head does not see;
    its next gradient, in proportion to 1 / length, is taken for that of the length after the decay,
    so that a training is dense SGD's. With momentum the pending movement of an idle row is applied
    when it is next active, before its next gradient is added, or at :meth:`catch_up`; every row is
    then where dense SGD puts it for the given gradients.

    Momentum may be set to 0 during a training, and back: as in ``torch.optim.SGD`` the momentum
    buffers stay as they are meanwhile.

    If something else writes the prototypes (``load_state_dict``, an assignment), the pending
    movement is dropped, and the momentum decays as it would have.

    Parameters
    ----------
    params : iterable of parameters or groups
        Those of the head among them.
    lr, momentum, weight_decay : float
    nesterov : bool
    head : QMarginHead or several
        Their gradients become row-sparse. See :meth:`bind`.

    Raises
    ------
    ValueError
        A head whose weight is not among the parameters.

    Notes
    -----
    State of a head's weight: a momentum buffer of its size (none without momentum), one integer a
    row, and 32 bytes a step, at most 4,096 of them. ``state_dict`` holds all of it, as it is, with
    room for as many steps. It loads that of a ``torch.optim.SGD``; for the way back call
    :meth:`catch_up` first.

    Examples
    --------
    >>> from speechbrain_qmargin.head import QMarginHead
    >>> head = QMarginHead(embedding_dim=4, num_classes=1000)
    >>> optimizer = RowSparseSGD(head.parameters(), lr=0.1, momentum=0.9, head=head)
    >>> head(torch.randn(8, 4), torch.arange(8)).backward()
    >>> optimizer.step()

    In a SpeechBrain recipe::

        opt_class: !name:speechbrain_qmargin.head.RowSparseSGD
            lr: 0.1
            momentum: 0.9
            head: !ref <classifier>
    """

    _moments = ("momentum_buffer",)
    _only = {"dampening": 0, "maximize": False}  # noqa: RUF012

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        head: RowOwner | Iterable[RowOwner],
    ) -> None:
        torch.optim.SGD.__init__(
            self, params, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov
        )
        self._bind_all(head)

    def _begin(self, p: Tensor, group: dict, state: dict) -> None:
        if group["momentum"] and state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(p)

    def _fresh(self, group: dict, state: dict) -> tuple[float, ...]:
        return 1.0, 0.0, 0.0, 1.0  # w from w and b, b from w and b

    def _pending(self, group: dict) -> bool:
        return bool(group["momentum"] or group["weight_decay"])

    def _idle_step(self, table: Tensor, group: dict, state: dict) -> Tensor:
        lr, mu, decay = float(group["lr"]), group["momentum"], group["weight_decay"]
        seen, glide = (1 + mu, mu * mu) if group["nesterov"] else (1.0, mu)
        kept = [decay, mu] if mu else [0.0, 1.0]  # torch's SGD without momentum leaves it as it is
        step = [[1 - lr * decay * seen, -lr * glide], kept]
        step = torch.tensor(step, dtype=torch.float64, device="cpu")
        return (step @ table.view(-1, 2, 2)).view(-1, 4)

    def _glide(self, w: Tensor, moments: list[Tensor], lines: Tensor, group: dict) -> Tensor | None:
        ww, wb, bw, bb = lines.unbind(1)
        old = w.clone() if moments else w
        w.mul_(ww)
        for b in moments:
            w.addcmul_(b, wb)
            b.mul_(bb).addcmul_(old, bw)
        return torch.where(wb == 0, 1 / ww, 1)  # the length alone: 1 / length is the gradient's

    def _fade(self, moments: list[Tensor], lines: Tensor) -> None:
        for b in moments:
            b.mul_(lines[:, 3])

    def _visit(self, w: Tensor, d: Tensor, moments: list[Tensor], group: dict, state: dict) -> None:
        mu, decay = group["momentum"], group["weight_decay"]
        d = torch.add(d, w, alpha=decay) if decay else d
        if mu:
            (b,) = moments
            b.mul_(mu).add_(d)
            d = torch.add(d, b, alpha=mu) if group["nesterov"] else b
        w.sub_(d, alpha=float(group["lr"]))

    def _visit_in_one_launch(
        self, p: Tensor, rows: Tensor, values: Tensor, group: dict, state: dict, present: int | None
    ) -> None:
        from speechbrain_qmargin.head.row_kernels import sgd_rows

        sgd_rows(
            p, state.get("momentum_buffer"), rows, values, state["idle_since"],
            _sent(state["idle"], p.device), present, lr=float(group["lr"]),
            mu=group["momentum"], decay=group["weight_decay"], nesterov=group["nesterov"],
        )  # fmt: skip


class RowSparseAdam(RowSparse, torch.optim.AdamW):
    r"""``torch.optim.AdamW`` (Adam without weight decay) at the cost of the gradient's rows.

    The other parameters are left to ``torch.optim.AdamW``. With m and v the moments of a prototype
    w, l, b1, b2, eps and d the learning rate, betas, epsilon and decay of a step, c1 and c2 its
    bias corrections, a visited row takes exactly AdamW's step. An idle row's steps are taken when
    it is next visited, or at :meth:`catch_up`: its moments have faded by :math:`b_1^n` and
    :math:`b_2^n`, its decay is the product of the :math:`1 - l d`, and its movement the sum of

    .. math:: - l \, \frac{b_1^i m / c_1}{\sqrt{b_2^i v / c_2}} \cdot
              \frac{\sqrt{v}}{\sqrt{v} + \epsilon \sqrt{c_2^{(0)}}}

    each carried on by the later decay, with :math:`c_2^{(0)}` of its last visit. So epsilon counts
    in idle steps as it did at the last visit, where dense AdamW's weighs more as v fades. That
    is the only difference, none at epsilon = 0 and small wherever a gradient is well above
    epsilon; :math:`i` counts from the last visit.

    As in :class:`RowSparseSGD`, a row is seen as of its last visit until the next; where the
    prototypes are written by another, what was pending is dropped and the moments fade on.

    Parameters
    ----------
    params : iterable of parameters or groups
        Those of the head among them.
    lr : float
    betas : pair of float
        :math:`b_1^2 < b_2`.
    eps, weight_decay : float
        The decay is AdamW's, decoupled from the gradient. (Adam's own, added to the gradient, moves
        idle rows by amounts that differ from row to row: it is not offered.)
    head : QMarginHead or several

    Raises
    ------
    ValueError
        A head whose weight is not among the parameters, or betas outside their range.

    Examples
    --------
    >>> from speechbrain_qmargin.head import QMarginHead
    >>> head = QMarginHead(embedding_dim=4, num_classes=1000)
    >>> optimizer = RowSparseAdam(head.parameters(), lr=0.001, head=head)
    >>> head(torch.randn(8, 4), torch.arange(8)).backward()
    >>> optimizer.step()
    """

    _moments = ("exp_avg", "exp_avg_sq")
    _only = {"amsgrad": False, "maximize": False, "decoupled_weight_decay": True}  # noqa: RUF012

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        head: RowOwner | Iterable[RowOwner],
    ) -> None:
        if not betas[0] ** 2 < betas[1]:
            raise ValueError(f"betas: idle rows would drift ever faster with {betas}; b1^2 < b2")
        torch.optim.AdamW.__init__(
            self, params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
        )
        self._bind_all(head)

    def _begin(self, p: Tensor, group: dict, state: dict) -> None:
        if "exp_avg" not in state:
            state["step"] = torch.tensor(0.0, device="cpu")
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1

    def _fresh(self, group: dict, state: dict) -> tuple[float, ...]:
        # of w, m and v; movement in units of m / (sqrt(v) + eps r); r, the root of c2
        return 1.0, 1.0, 1.0, 0.0, math.sqrt(_corrections(group, state)[1])

    def _pending(self, group: dict) -> bool:
        return True

    def _idle_step(self, table: Tensor, group: dict, state: dict) -> Tensor:
        lr, (b1, b2) = float(group["lr"]), group["betas"]
        c1, c2 = _corrections(group, state)
        ww, m, v, moved, root = table.unbind(1)
        kept, m, v = 1 - lr * group["weight_decay"], m * b1, v * b2
        moved = kept * moved + lr * math.sqrt(c2) / c1 * m / v.sqrt()
        return torch.stack((ww * kept, m, v, moved, root), 1)

    def _glide(self, w: Tensor, moments: list[Tensor], lines: Tensor, group: dict) -> Tensor | None:
        (m, v), (ww, fade_m, fade_v, moved, root) = moments, lines.unbind(1)
        unit = m / v.sqrt().addcmul_(root, torch.full_like(root, group["eps"]))
        w.mul_(ww).addcmul_(unit.masked_fill_(m == 0, 0), moved, value=-1)
        m.mul_(fade_m)
        v.mul_(fade_v)

    def _fade(self, moments: list[Tensor], lines: Tensor) -> None:
        for index, moment in enumerate(moments):
            moment.mul_(lines[:, 1 + index])

    def _visit(self, w: Tensor, d: Tensor, moments: list[Tensor], group: dict, state: dict) -> None:
        (m, v), lr, (b1, b2) = moments, float(group["lr"]), group["betas"]
        c1, c2 = _corrections(group, state)
        w.mul_(1 - lr * group["weight_decay"])
        m.lerp_(d, 1 - b1)
        v.mul_(b2).addcmul_(d, d, value=1 - b2)
        w.addcdiv_(m, v.sqrt().div_(math.sqrt(c2)).add_(group["eps"]), value=-lr / c1)

    def _visit_in_one_launch(
        self, p: Tensor, rows: Tensor, values: Tensor, group: dict, state: dict, present: int | None
    ) -> None:
        from speechbrain_qmargin.head.row_kernels import adam_rows

        c1, c2 = _corrections(group, state)
        adam_rows(
            p, state["exp_avg"], state["exp_avg_sq"], rows, values, state["idle_since"],
            _sent(state["idle"], p.device), present, lr=float(group["lr"]),
            betas=group["betas"], eps=group["eps"], decay=group["weight_decay"], c1=c1,
            root_c2=math.sqrt(c2),
        )  # fmt: skip


def _sent(idle: Tensor, device: torch.device) -> Tensor | None:
    """Where the rows are; None where all of them are up to date and nobody asks for it."""
    return sent(idle, device) if len(idle) > 1 else None


def _at_once(p: Tensor) -> int:
    return constants(p.device).fit(_ROWS_AT_ONCE, 8 * p.shape[1])


def _corrections(group: dict, state: dict) -> tuple[float, float]:
    steps, (b1, b2) = float(state["step"]), group["betas"]
    return 1 - b1**steps, 1 - b2**steps


def _rows_and_values(grad: Tensor, head: RowOwner) -> tuple[Tensor, Tensor]:
    if not grad.is_sparse:
        return torch.arange(grad.shape[0], device=grad.device), grad
    # Autograd forgets that the rows are sorted and unique. The head knows its own; to look at
    # others, as after an accumulation, is to wait for the device, and to sort them costs a copy
    rows = grad._indices()[0]
    if grad.is_coalesced() or head.in_order(rows) or bool((rows[1:] > rows[:-1]).all()):
        return rows, grad._values()
    grad = grad.coalesce()
    return grad.indices()[0], grad.values()
