"""What a loss and a classifier say to each other.

A classifier shows a loss one batch as :class:`Scores`: the dense classifier's cosines
(SpeechBrain's ``Classifier``; wrapped by :func:`~speechbrain_qmargin.loss.dense.scores_of`), the
sparse head's training output, or its shard's. The loss answers with an :class:`Objective`, which
can be evaluated without all cosines in one place, and gets :class:`Rows` back. The losses
themselves derive from :class:`~speechbrain_qmargin.loss.base.Loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from speechbrain_qmargin.loss.generators import Generator

__all__ = [
    "BinaryObjective",
    "Objective",
    "QMarginStats",
    "Rows",
    "Scores",
    "attach",
    "flat",
    "prior_slope",
    "slope_of",
]


@dataclass(frozen=True)
class Objective:
    r"""One batch's loss as a classifier evaluates it.

    It opens the formula of :func:`~speechbrain_qmargin.loss.functional.q_margin_loss`.

    Logits are ``scale`` times the cosines, where those of the targets and of the others may have
    moved first; the loss is the Fenchel-Young loss of the alpha-divergence with reference measure q
    on them, at alpha = 1 a cross-entropy.

    Attributes
    ----------
    scale : float
    alpha : float, >= 1
    target_log_q : Tensor, [B], float64, or None
        log q of the samples' targets, the class's own included. None: q = 1. It may require a
        gradient.
    log_q : Tensor, [C], or None
        log q of the classes where they are not the target. None: q = 1.
    spread : float, optional
        log(q_max / q_min) over both, where the loss knows it. None: it is looked up, for which the
        host waits for a GPU.
    move_target : callable, optional
        ``moved = move_target(cosines)``: new cosines of this batch's targets, [B] float64 both, by
        differentiable operations. Other tensors that it uses ([B] norms) may require gradients too.
    move_others : callable, optional
        ``moved = move_others(cosines, target)`` of cosines [B, K] of any K classes that are not the
        targets, and the targets' moved cosines [B, 1], which count as constants; element by
        element, by differentiable operations. It sees finite cosines only. At alpha = 1.
    generator : Generator, optional
        Another divergence than the alpha-divergences, with a finite f(0), in float64. It goes with
        `scale` and a `target_log_q` without a gradient, and with nothing else.

    Both functions give the same for the same cosines: what is random is drawn before.
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
    """

    target: Callable[[Tensor], Tensor]
    others: Callable[[Tensor], Tensor]
    target_weight: float = 1.0
    others_weight: float = 1.0
    parameters: tuple[Tensor, ...] = ()


class Rows(NamedTuple):
    """What :meth:`Scores.evaluate` gives of every sample of this process; only losses have a graph.

    Attributes
    ----------
    loss : Tensor, [B], float32 (float64 for float64 cosines)
    target_posterior : Tensor, [B]
    support : Tensor, [B], or None where nobody asked
        Classes with a positive posterior, the target included.
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
        Share of samples at exactly zero loss, in [0, 1]: they have passed the hard margin. 0 at
        alpha = 1, whose loss vanishes by rounding at most.
    target_posterior : Tensor
        Mean posterior of the target class, in [0, 1].
    """

    support_mean: Tensor
    support_max: Tensor
    zero_loss: Tensor
    target_posterior: Tensor

    @classmethod
    def of(cls, rows: Rows, alpha: float) -> QMarginStats:
        """Of evaluated rows that were asked for their support."""
        assert rows.support is not None
        loss, count = rows.loss.detach(), rows.support.to(rows.loss.dtype)
        zero = (loss == 0).to(loss.dtype).mean() if alpha > 1 else loss.new_zeros(())
        return cls(count.mean(), count.max(), zero, rows.target_posterior.mean())


@runtime_checkable
class Scores(Protocol):
    """A batch against the classes. Implemented by the dense classifier, the head and its shards.

    What an implementation owes its losses:

    * :meth:`evaluate` is exact for every objective, or raises TypeError and names what it lacks
      (say, `move_others` where classes are searched).
    * Targets are checked: integers [B] in [0, num_classes).
    * `move_target` is called with the cosines of this process's targets alone, float64, in the
      order of the batch; in shards, what it returns is gathered, not what it takes. Slopes come
      from autograd: :func:`slope_of`.
    * Gradients reach embeddings and prototypes, `target_log_q`, the tensors that `move_target`
      uses, and a BinaryObjective's `parameters`, in shards that of the processes' mean loss. Where
      the loss comes from a function of one's own, :func:`attach` adds those of `target_log_q` and
      `move_target`.
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


def slope_of(move: Callable[[Tensor], Tensor], cosines: Tensor) -> tuple[Tensor, Tensor]:
    """(moved, slopes) of a function that works element by element, both without a graph.

    Examples
    --------
    >>> slope_of(torch.square, torch.tensor([0.5, 1.0]))
    (tensor([0.2500, 1.0000]), tensor([1., 2.]))
    """
    with torch.enable_grad():
        at = cosines.detach().requires_grad_()
        moved = move(at)
        (slopes,) = torch.autograd.grad(moved.sum(), at)
    return moved.detach(), slopes


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
    """
    loss, residual = rows.loss, residual.detach().double()
    if objective.move_target is not None and torch.is_grad_enabled():
        moved = objective.move_target(target_cosines.detach())
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
    """Targets [B] of [B] or [B, 1]."""
    return targets.squeeze(1) if targets.ndim == 2 and targets.shape[1] == 1 else targets
