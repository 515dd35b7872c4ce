"""What a loss and a classifier say to each other.

A classifier shows a loss one batch as :class:`Scores`: the dense classifier's cosines
(SpeechBrain's ``Classifier``; wrapped by :func:`~speechbrain_qmargin.loss.dense.scores_of`), the
sparse head's training output, or its shard's. The loss answers with an :class:`Objective`, which
can be evaluated without all cosines in one place, and gets :class:`Rows` back. The losses
themselves derive from :class:`~speechbrain_qmargin.loss.base.Loss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from speechbrain_qmargin.loss.device import host_decides
from speechbrain_qmargin.loss.generators import Generator
from speechbrain_qmargin.loss.solver import check_alpha, row_dtype

__all__ = [
    "BinaryObjective",
    "Objective",
    "QMarginStats",
    "Rows",
    "Scores",
    "attach",
    "check_found",
    "check_rows",
    "completed",
    "flat",
    "label_outside",
    "learns_another",
    "log_q_of_targets",
    "prior_slope",
    "refuse_no_tensor",
    "refuse_second_derivatives",
    "slope_of",
]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_OF_OTHERS = (
    "move_target: a sample's new cosine depends on the cosines of other samples, whose gradients a "
    "sparse head cannot form: take them .detach()ed, or train it with --head dense"
)


@dataclass(frozen=True)
class Objective:
    r"""One batch's loss as a classifier evaluates it.

    It opens the formula of :func:`~speechbrain_qmargin.loss.functional.q_margin_loss`.

    Logits are ``scale`` times the cosines, where those of the targets and of the others may have
    moved first; the loss is the Fenchel-Young loss of the alpha-divergence with reference measure q
    on them, at alpha = 1 a cross-entropy.

    Attributes
    ----------
    scale : float, > 0
        A number: where it is to be learnt, override
        :meth:`~speechbrain_qmargin.loss.base.Loss.rows` and ask for all cosines.
    alpha : float, >= 1
    target_log_q : Tensor, [B], float64, or None
        log q of the samples' targets, the class's own included. None: that of `log_q`, where it is
        given, else q = 1. It may require a gradient.
    log_q : Tensor, [C], or None
        log q of the classes where they are not the target. None: q = 1.
    spread : float, optional
        log(q_max / q_min) over both, where the loss knows it. None: it is looked up, for which the
        host waits for a GPU.
    move_target : callable, optional
        ``moved = move_target(cosines)``: new cosines of this batch's targets, [B] float64 both,
        element by element, by differentiable operations. Other tensors that it uses ([B] norms, a
        parameter) may require gradients too.
    move_others : callable, optional
        ``moved = move_others(cosines, target)`` of cosines [B, K] of any K classes that are not the
        targets, and the targets' moved cosines [B, 1], which count as constants; element by
        element, by differentiable operations. It sees finite cosines only. At alpha = 1. On a
        sparse head other tensors that it uses may not require gradients.
    generator : Generator, optional
        Another divergence than the alpha-divergences, with a finite f(0), in float64. It goes with
        `scale` and a `target_log_q` without a gradient, and with nothing else.

    Both functions give the same for the same cosines: what is random is drawn before.

    Raises
    ------
    ValueError, TypeError
        Numbers outside the family, or tensors whose gradient would be lost.

    Examples
    --------
    Two classes at the same cosine: log 2 with the softmax (alpha = 1), 1/4 with sparsemax.

    >>> from speechbrain_qmargin.loss.dense import DenseScores
    >>> scores, target = DenseScores(torch.ones(1, 2)), torch.tensor([0])
    >>> scores.evaluate(target, Objective(scale=1.0)).loss
    tensor([0.6931])
    >>> scores.evaluate(target, Objective(scale=1.0, alpha=2.0)).loss
    tensor([0.2500])
    """

    scale: float
    alpha: float = 1.0
    target_log_q: Tensor | None = None
    log_q: Tensor | None = None
    spread: float | None = None
    move_target: Callable[[Tensor], Tensor] | None = None
    move_others: Callable[[Tensor, Tensor], Tensor] | None = None
    generator: Generator | None = None

    def __post_init__(self) -> None:
        _check_number("scale", self.scale)
        if not self.scale > 0:
            raise ValueError(f"scale must be a finite number > 0, got {self.scale}")
        check_alpha(self.alpha)
        refuse_no_tensor(target_log_q=self.target_log_q, log_q=self.log_q)
        prior = self.target_log_q
        if prior is not None and prior.ndim != 1:
            raise ValueError(f"target_log_q must be [B], got {list(prior.shape)}")
        if self.generator is not None and prior is not None and prior.requires_grad:
            raise ValueError("with a generator target_log_q has no gradient: pass .detach()")
        others = (self.log_q, self.move_target, self.move_others)
        if self.generator is not None and (self.alpha != 1 or any(x is not None for x in others)):
            raise ValueError("an Objective with a generator takes scale and target_log_q alone")


@dataclass(frozen=True)
class BinaryObjective:
    r"""One batch's loss as a decision for each class on its own: is the sample of it, or not?

    With logits a and b by which a class is the sample's,

    .. math:: L = w_y \log(1 + e^{-a(\cos_y)}) + w_o \sum_{j \ne y} \log(1 + e^{b(\cos_j)}).

    Attributes
    ----------
    target, others : callable
        a, of cosines [B] float64, and b, of [B, K] of any K classes: element by element, by
        differentiable operations, the same for the same cosines.
    target_weight, others_weight : float
        w_y and w_o.
    parameters : tuple of Tensor
        What both use and has a gradient: parameters of the loss, the same in all processes.

    Examples
    --------
    >>> from speechbrain_qmargin.loss.dense import DenseScores
    >>> def logits(cosines):
    ...     return 10 * cosines
    >>> objective = BinaryObjective(target=logits, others=logits, others_weight=0.5)
    >>> scores = DenseScores(torch.zeros(1, 3))
    >>> scores.evaluate(torch.tensor([0]), objective).loss      # (1 + 0.5 + 0.5) log 2
    tensor([1.3863])
    """

    target: Callable[[Tensor], Tensor]
    others: Callable[[Tensor], Tensor]
    target_weight: float = 1.0
    others_weight: float = 1.0
    parameters: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        _check_number("target_weight", self.target_weight)
        _check_number("others_weight", self.others_weight)


def _check_number(name: str, value: float) -> None:
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(
            f"{name} is a number here: as a tensor it would not be learnt. Override rows() and ask "
            "for scores.cosines(), or pass float(...)"
        )
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {value}")


class Rows(NamedTuple):
    """What :meth:`Scores.evaluate` gives of every sample of this process; only losses have a graph.

    Attributes
    ----------
    loss : Tensor, [B], float32 (float64 for float64 cosines)
    target_posterior : Tensor, [B]
    support : Tensor, [B], or None where nobody asked
        Classes with a positive posterior, the target included.

    Examples
    --------
    >>> from speechbrain_qmargin.loss.dense import DenseScores
    >>> scores, sparsemax = DenseScores(torch.tensor([[1.0, 0.0]])), Objective(scale=2.0, alpha=2.0)
    >>> rows = scores.evaluate(torch.tensor([0]), sparsemax, statistics=True)
    >>> rows.loss, rows.target_posterior, rows.support
    (tensor([0.]), tensor([1.]), tensor([1]))
    """

    loss: Tensor
    target_posterior: Tensor
    support: Tensor | None


class QMarginStats(NamedTuple):
    """What a trainer may want to log of one batch; zero-dimensional tensors, left on the device.

    Attributes
    ----------
    support_mean, support_max : Tensor
        Active classes per sample (those with a positive posterior).
    zero_loss : Tensor
        Share of samples whose target alone is active, in [0, 1]: they have passed the hard margin,
        and their loss is exactly zero, but for what a loss may add to it. 0 at alpha = 1, where
        that is rounding.
    target_posterior : Tensor
        Mean posterior of the target class, in [0, 1].

    Examples
    --------
    >>> from speechbrain_qmargin import SparsemaxLoss
    >>> cosines = torch.tensor([[1.0, 0.0], [1.0, 1.0]])        # far ahead; a tie
    >>> loss, stats = SparsemaxLoss(scale=2.0).with_stats(cosines, torch.tensor([0, 0]))
    >>> float(stats.support_mean), float(stats.zero_loss), float(stats.target_posterior)
    (1.5, 0.5, 0.75)
    """

    support_mean: Tensor
    support_max: Tensor
    zero_loss: Tensor
    target_posterior: Tensor

    @classmethod
    def of(cls, rows: Rows, alpha: float) -> QMarginStats:
        """Of evaluated rows that were asked for their support.

        Raises
        ------
        TypeError
            They were not.
        """
        if rows.support is None:
            raise TypeError(
                "rows(..., statistics=True) gave no support: of a loss's own, [B] numbers"
            )
        loss, count = rows.loss.detach(), rows.support.to(rows.loss.dtype)
        zero = loss.new_zeros(())
        if alpha > 1:
            alone = (rows.support == 1) & (rows.target_posterior > 0) & (loss == loss)
            zero = alone.to(loss.dtype).mean()
        return cls(count.mean(), count.max(), zero, rows.target_posterior.mean())


@runtime_checkable
class Scores(Protocol):
    """A batch against the classes. Implemented by the dense classifier, the head and its shards.

    What an implementation owes its losses:

    * :meth:`evaluate` is exact for every objective, or raises TypeError and names what it lacks
      (say, a parameter in `move_others`, whose gradient a sparse head does not form).
    * Targets are checked: integers [B] in [0, num_classes).
    * `move_target` is called with the cosines of this process's targets alone, float64, in the
      order of the batch; in shards, what it returns is gathered, not what it takes. Slopes come
      from autograd: :func:`slope_of`.
    * Gradients reach embeddings and prototypes, `target_log_q`, the tensors that `move_target`
      uses, and a BinaryObjective's `parameters`, in shards that of the processes' mean loss. Where
      the loss comes from a function of one's own, :func:`attach` adds those of `target_log_q` and
      `move_target`.

    Examples
    --------
    >>> from speechbrain_qmargin.loss.dense import DenseScores
    >>> isinstance(DenseScores(torch.eye(2)), Scores), isinstance(torch.eye(2), Scores)
    (True, False)
    """

    @property
    def num_classes(self) -> int:
        """Over all shards."""
        ...

    @property
    def embeddings(self) -> Tensor | None:
        """[B, D] as the encoder gave them, in the graph. None where only cosines are known."""
        ...

    def evaluate(
        self,
        targets: Tensor,
        objective: Objective | BinaryObjective,
        *,
        statistics: bool = False,
    ) -> Rows:
        """Losses of this process's samples; targets [B]. With `statistics`, supports as well."""
        ...

    def cosines(self) -> Tensor:
        """All of them, [B, C], in the graph: for a loss that is no :class:`Objective`.

        Raises TypeError where they do not exist in one place.
        """
        ...


def slope_of(
    move: Callable[[Tensor], Tensor], cosines: Tensor, *, asked: bool = False
) -> tuple[Tensor, Tensor]:
    """(moved, slopes) of a function that works element by element, both without a graph.

    Parameters
    ----------
    move : callable
    cosines : Tensor
    asked : bool
        Whether it is known to work element by element.

    Raises
    ------
    ValueError
        A result of another shape.
    TypeError
        On a CPU, where that is found out: a result whose gradient is not of its own element alone.

    Examples
    --------
    >>> slope_of(torch.square, torch.tensor([0.5, 1.0]))
    (tensor([0.2500, 1.0000]), tensor([1., 2.]))
    >>> slope_of(lambda cosines: cosines - cosines.mean(), torch.tensor([0.5, 1.0]))
    Traceback (most recent call last):
    TypeError: move_target: a sample's new cosine depends on the cosines of other samples, ...
    """
    with torch.enable_grad():
        at = cosines.detach().requires_grad_()
        moved = move(at.clone())  # it may write there
        check_rows("move_target", moved, at)
        looks = not asked and at.numel() > 1 and host_decides(at.device)
        slopes = _slopes(moved, at, torch.ones_like(moved), again=looks)
        if looks:
            weights = torch.linspace(1, 2, at.numel(), dtype=at.dtype, device=at.device).view_as(at)
            crossed = _slopes(moved, at, weights.to(moved.dtype)) - slopes * weights
            if bool((crossed.abs() > 1e-4 * (1 + slopes.abs())).any()):
                raise TypeError(_OF_OTHERS)
    return moved.detach(), slopes


def _slopes(moved: Tensor, at: Tensor, weights: Tensor, again: bool = False) -> Tensor:
    """Gradient by `at` of the sum of moved times weights; zero where it does not depend on it."""
    if not moved.requires_grad:
        return torch.zeros_like(at)
    (found,) = torch.autograd.grad(moved, at, weights, retain_graph=again, allow_unused=True)
    return torch.zeros_like(at) if found is None else found


def check_rows(name: str, values: Tensor, like: Tensor) -> None:
    """Refuse what is not one number for each of `like`: it would broadcast to something else.

    Examples
    --------
    >>> check_rows("target_log_q", torch.zeros(2, 1), torch.zeros(2))
    Traceback (most recent call last):
    ValueError: target_log_q must be [2], got [2, 1]
    """
    if values.shape != like.shape:
        raise ValueError(f"{name} must be {list(like.shape)}, got {list(values.shape)}")


def check_found(name: str, rows: object, targets: Tensor) -> Rows:
    """What a loss's :meth:`~speechbrain_qmargin.loss.base.Loss.rows` gave, if it is that.

    A mean would be the mean of itself, and a row for each class be divided by their number.

    Parameters
    ----------
    name : str
        The loss's.
    rows : Rows
    targets : Tensor, [B]

    Raises
    ------
    TypeError, ValueError
        No Rows, or not one number for each sample.

    Examples
    --------
    >>> check_found("MyLoss", torch.tensor(0.5), torch.tensor([0, 1]))
    Traceback (most recent call last):
    TypeError: MyLoss.rows gave Tensor; it gives Rows(loss, target_posterior, support), ...
    """
    if not isinstance(rows, Rows):
        raise TypeError(
            f"{name}.rows gave {type(rows).__name__}; it gives Rows(loss, target_posterior, "
            "support), each [B], of speechbrain_qmargin.loss.interface"
        )
    for field, values in zip(Rows._fields, rows, strict=True):
        if values is None and field == "support":
            continue
        if not isinstance(values, Tensor) or values.shape != targets.shape:
            found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"{name}.rows: {field} must be {list(targets.shape)}, got {found}")
    return rows


def completed(
    objective: Objective | BinaryObjective, targets: Tensor, num_classes: int
) -> Objective | BinaryObjective:
    """A loss's objective for targets [B], once it fits them and the classes.

    Where it has a log q of the classes and none of the targets, theirs is that of their classes.

    Raises
    ------
    TypeError, ValueError
        No objective; tensors of another shape; `move_others` with alpha > 1.

    Examples
    --------
    >>> prior = Objective(scale=10.0, log_q=torch.tensor([-1.0, 0.0, 1.0]))
    >>> completed(prior, torch.tensor([2, 0]), num_classes=3).target_log_q
    tensor([ 1., -1.], dtype=torch.float64)
    """
    if isinstance(objective, BinaryObjective):
        return objective
    if not isinstance(objective, Objective):
        raise TypeError(
            f"a loss's objective is an Objective or a BinaryObjective, got "
            f"{type(objective).__name__}; a loss that computes its own values overrides rows"
        )
    log_q, own = objective.log_q, objective.target_log_q
    if own is not None:
        check_rows("target_log_q", own, targets)
    if log_q is not None and log_q.shape != (num_classes,):
        raise ValueError(
            f"log_q must be one for each of {num_classes} classes, got {list(log_q.shape)}"
        )
    if objective.move_others is not None and objective.alpha != 1:
        raise ValueError("move_others is for cross-entropies: alpha = 1")
    if log_q is not None and own is None:
        return replace(objective, target_log_q=log_q_of_targets(log_q, targets))
    return objective


def log_q_of_targets(log_q: Tensor, targets: Tensor) -> Tensor:
    """log q [B], float64, of targets [B] from that of the classes [C].

    Examples
    --------
    >>> log_q_of_targets(torch.tensor([-1.0, 0.0]), torch.tensor([1, 0, 1]))
    tensor([ 0., -1.,  0.], dtype=torch.float64)
    """
    log_q = log_q.to(targets.device)
    # a label beyond is refused where the number of classes is known
    return log_q.to(row_dtype(log_q))[targets.long().clamp(0, len(log_q) - 1)]


def learns_another(result: Tensor, listed: Sequence[Tensor]) -> bool:
    """Whether a result's graph ends at a leaf that is neither listed nor behind a listed tensor.

    Examples
    --------
    >>> b, c = torch.zeros(2, requires_grad=True)[0], torch.ones((), requires_grad=True)
    >>> learns_another(2 * b, [b]), learns_another(b * c, [b])
    (False, True)
    """
    ends = [tensor.grad_fn for tensor in listed if tensor.grad_fn is not None]
    ahead, seen = [result.grad_fn], set()
    while ahead:
        node = ahead.pop()
        if node is None or node in seen or any(node is end for end in ends):
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and all(leaf is not tensor for tensor in listed):
            return True
        ahead.extend(after for after, _ in node.next_functions)
    return False


def attach(rows: Rows, objective: Objective, target_cosines: Tensor, residual: Tensor) -> Rows:
    r"""Gradients of the loss by what an objective's tensors depend on, for functions of one's own.

    Adds zero to the loss, with the gradient by the tensors that `move_target` uses, through
    :math:`\partial L / \partial \theta_y = p_y - 1`, and by `target_log_q`, through
    :math:`\partial L / \partial \log q_y = -q_y^{1-\alpha} (1 - p_y^\alpha) / \alpha`.

    Parameters
    ----------
    rows : Rows
        Whose loss has the gradients by the cosines already.
    objective : Objective
    target_cosines : Tensor, [B], float64
        Of the targets, not moved.
    residual : Tensor, [B]
        p_y - 1, without the rounding of that difference.

    Examples
    --------
    >>> log_q = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    >>> rows = Rows(torch.ones(1), torch.zeros(1), None)        # one sample, with p_y = 0
    >>> objective = Objective(scale=10.0, target_log_q=log_q)
    >>> attached = attach(rows, objective, torch.zeros(1).double(), residual=-torch.ones(1))
    >>> attached.loss.sum().backward()
    >>> log_q.grad
    tensor([-1.], dtype=torch.float64)
    """
    loss, residual = rows.loss, residual.detach().double()
    if objective.move_target is not None and torch.is_grad_enabled():
        moved = objective.move_target(target_cosines.detach().clone())
        if moved.requires_grad:
            zero = objective.scale * residual * (moved - moved.detach())
            loss = loss + zero.to(loss.dtype)
    log_q = objective.target_log_q
    if log_q is not None and log_q.requires_grad and torch.is_grad_enabled():
        slope = prior_slope(log_q.detach().double(), residual, objective.alpha)
        loss = loss + (slope * (log_q - log_q.detach())).to(loss.dtype)
    return rows._replace(loss=loss)


def prior_slope(log_q: Tensor, residual: Tensor, alpha: float) -> Tensor:
    r"""The slope of the loss by log q_y from p_y - 1, see :func:`attach`.

    Examples
    --------
    >>> prior_slope(torch.tensor(-1.0), torch.tensor(-1.0), 1.0)    # p_y = 0: the margin itself
    tensor(-1.)
    """
    there = residual > -1
    power = torch.expm1(alpha * torch.log1p(torch.where(there, residual, 0)))
    return torch.where(there, power, -1) * torch.exp(log_q * (1 - alpha)) / alpha


def flat(targets: Tensor) -> Tensor:
    """Targets [B], int64, of integers [B] or [B, 1].

    Raises
    ------
    TypeError
        No tensor of integers: uint8 and bool would select, and half a label is none.
    ValueError
        Another shape, such as the one-hot rows that SpeechBrain's ``LogSoftmaxWrapper`` makes.

    Examples
    --------
    >>> flat(torch.tensor([[3], [1]]))
    tensor([3, 1])
    """
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets must be a tensor of class labels, got {type(targets).__name__}")
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets.squeeze(1)
    if targets.ndim != 1:
        raise ValueError(
            f"targets must be one class label a sample, [B] or [B, 1], got {tuple(targets.shape)}. "
            "If they are one-hot: SpeechBrain's LogSoftmaxWrapper makes them so, and the loss "
            "takes its place, compute_cost: !new:speechbrain_qmargin.QMarginLoss, instead of its "
            "loss_fn's"
        )
    if targets.dtype not in _INTEGERS:
        raise TypeError(f"targets must be integer class labels, got {targets.dtype}")
    return targets.long()


def refuse_no_tensor(**given: object) -> None:
    """Refuse arguments that are no tensors, by their names; None is left out.

    Raises
    ------
    TypeError

    Examples
    --------
    >>> refuse_no_tensor(cosines=[0.9, 0.1], log_q=None)
    Traceback (most recent call last):
    TypeError: cosines must be a tensor, got list
    """
    for name, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def refuse_second_derivatives(what: str, instead: str) -> None:
    """Called in a backward pass that is not differentiable: refuse ``create_graph=True``.

    torch's ``once_differentiable`` does so only where the gradient from above requires one too.

    Raises
    ------
    RuntimeError

    Examples
    --------
    >>> with torch.enable_grad():           # as in a backward pass that makes a graph
    ...     refuse_second_derivatives("f_softargmax", "alpha_softargmax has them")
    Traceback (most recent call last):
    RuntimeError: f_softargmax has no second derivatives (create_graph=True): alpha_softargmax ...
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{what} has no second derivatives (create_graph=True): {instead}")


def label_outside(label: int, num_classes: int) -> str:
    """What is wrong with a label that is not in [0, num_classes).

    Examples
    --------
    >>> label_outside(-100, 5)
    'target label -100 is outside [0, 5): no label is ignored here; ...'
    """
    if label < 0:
        return (
            f"target label {label} is outside [0, {num_classes}): no label is ignored here; leave "
            "such samples out of the batch"
        )
    return (
        f"target label {label} is outside [0, {num_classes}): the outputs have {num_classes} "
        "classes. Set out_n_neurons (the classifier's number of classes) to the size of the label "
        "encoder"
    )
