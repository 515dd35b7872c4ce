"""The softargmax and the loss of an f-divergence, from its generator.

tau is solved in float64 by each class's depth, see :mod:`~speechbrain_qmargin.loss.generators`:
for logits in one place, and for classes in pieces or in other processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from speechbrain_qmargin.loss.generators import Generator, generator_named
from speechbrain_qmargin.loss.interface import refuse_no_tensor, refuse_second_derivatives
from speechbrain_qmargin.loss.solver import Solution

__all__ = [
    "GeneratorMeasure",
    "Moments",
    "f_margin_loss",
    "f_softargmax",
    "masses",
    "root",
]

_STEPS = 200  # of bisection at worst; float64 has 64 bits, and the bracket may be wide
_ROUNDING, _DIGIT = 4e-15, 2.0**-52  # of a sum of a million terms; of a level
_LARGEST_LOG = 600.0  # of 1 / q in float64

# --------------------------------------------------------------------------- tau


def masses(f: Generator, depth: Tensor, log_q: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """p and -dp/dtau at depths, in float64, both 0 beyond the edge, and NaN where the depth is.

    Examples
    --------
    >>> masses(generator_named("le_cam"), torch.tensor([1.0, 4.0]).double())
    (tensor([1., 0.], dtype=torch.float64), tensor([1., 0.], dtype=torch.float64))
    """
    log_q = torch.as_tensor(log_q, dtype=depth.dtype, device=depth.device)
    active = ~(depth >= f.edge)
    inside = torch.where(active, depth, min(1.0, f.edge / 2))
    p = torch.exp(log_q + f.log_ratio(inside))
    h = torch.exp(log_q) * f.slope(inside)
    return torch.where(active, p, 0), torch.where(active, h, 0)


@torch.no_grad()
def root(
    mass: Callable[[Tensor], tuple[Tensor, Tensor]],
    low: Tensor,
    high: Tensor,
    settled: Callable[[Tensor], bool] | None = None,
) -> Tensor:
    """The levels at which the mass is 1.

    The mass is convex and falling in the level, so that Newton's steps from the left stay there.
    One that leaves the bracket, or is more than half of the step before, gives way to the bracket's
    middle. A row is done where its mass is 1 up to the rounding of a long sum, or where the next
    step is below the level's last digit; and where the mass is NaN.

    Parameters
    ----------
    mass : callable
        Of levels: the mass, and how fast it falls.
    low, high : Tensor, float64
        Bounds of the level.
    settled : callable, optional
        Whether to stop, from which rows are done: for processes that must stop together.

    Examples
    --------
    >>> logits = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    >>> def mass(level):                            # of sparsemax: 1 - level + 0.5 - level
    ...     above = (logits - level).clamp(min=0)
    ...     return above.sum(1, keepdim=True), (above > 0).double().sum(1, keepdim=True)
    >>> root(mass, logits[:, :1] - 1, logits[:, :1])
    tensor([[0.2500]], dtype=torch.float64)
    """
    high = torch.maximum(high, low)
    level, previous = low, high - low
    for _ in range(_STEPS):
        total, slope = mass(level)
        low = torch.where(total >= 1, level, low)
        high = torch.where(total >= 1, high, level)
        step = (total - 1) / slope
        done = ((total - 1).abs() <= _ROUNDING) | (step.abs() <= _DIGIT * level.abs())
        done |= (high - low <= _DIGIT * high.abs()) | total.isnan()
        if bool(done.all()) if settled is None else settled(done):
            break
        # where the bracket spans decades above zero, halve the decades
        wide = (low > 0) & (high > 4 * low)
        middle = torch.where(wide, (low * high).sqrt(), low + (high - low) / 2)
        newton = level + step
        quick = (newton >= low) & (newton <= high) & (step.abs() <= previous / 2)
        moved = torch.where(quick, newton, middle)
        previous = (moved - level).abs()
        level = torch.where(done, level, moved)
    return level


@torch.no_grad()
def _solved(f: Generator, logits: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Depths and posteriors [..., C] of float64 logits and log q.

    tau lies between that of the class that alone reaches highest, and that of all the measure at
    the largest logit.
    """
    gaps = logits.amax(-1, keepdim=True) - logits  # inf: an absent class

    def mass(level: Tensor) -> tuple[Tensor, Tensor]:
        p, h = masses(f, level + gaps, log_q)
        return p.sum(-1, keepdim=True), h.sum(-1, keepdim=True)

    low = (f.depth(-log_q) - gaps).amax(-1, keepdim=True)
    depth = root(mass, low, f.depth(-torch.logsumexp(log_q, -1, keepdim=True))) + gaps
    p, _ = masses(f, depth, log_q)
    return depth, p / p.sum(-1, keepdim=True)


def _loss(f: Generator, value: Tensor, mass: Tensor, log_q: Tensor, p_y: Tensor) -> Tensor:
    """Losses [B], from the sums of :class:`Moments` and the targets' log q and posteriors."""
    own = torch.where(p_y == 0, 0, f.drop(p_y * torch.exp(-log_q))) - f.drop(torch.exp(-log_q))
    return torch.where(mass == 0, 0, (value + log_q.exp() * own).clamp(min=0))


class Moments(NamedTuple):
    """Of the classes that are not the target, all [B], float64.

    Attributes
    ----------
    mass : Tensor
        Sum of p.
    value : Tensor
        Sum of f(0) - f(p) + p times (logit - target's logit).
    support : Tensor
        How many are active.

    Examples
    --------
    >>> measure = GeneratorMeasure(generator_named("chi_square"), torch.zeros(1).double())
    >>> leads = torch.tensor([[0.0, -9.0]]).double()    # of a class as near as the target; far away
    >>> half = torch.tensor([0.5]).double()             # the depth at which each of two has p = 0.5
    >>> moments = measure.moments([leads], half)
    >>> float(moments.mass), float(moments.support)
    (0.5, 1.0)
    """

    mass: Tensor
    value: Tensor
    support: Tensor


class GeneratorMeasure(NamedTuple):
    r"""A generator, and log q of a batch's targets; of all other classes q = 1.

    For classifiers that have the classes in pieces, or in other processes. A row is solved by the
    depth of its target: of the others u is at most 1, and their depth no small number, so that
    their leads, logits less the target's, tell it with all digits.

    Where the posterior is sparse its *level* is the edge of the support,
    :math:`\tau + f'(0)`, with the logits' origin. Solved on some of the classes it is a lower bound
    of the level, as S is then smaller at every tau.

    Attributes
    ----------
    generator : Generator
    target : Tensor, [B], float64
        log q of the targets.

    Examples
    --------
    A class as near as the target, with q = 1 for both: each has half of the mass, and the loss of
    ``chi_square``, which is alpha = 2, is (1 - 0.5^2 - 0.5^2) / 2.

    >>> measure = GeneratorMeasure(generator_named("chi_square"), torch.zeros(1).double())
    >>> leads = [torch.zeros(1, 1).double()]
    >>> depth = measure.depth(lambda: leads, torch.zeros(1).double(), classes=2)
    >>> solution = measure.solution(depth, measure.moments(leads, depth))
    >>> float(solution.target_posterior), float(solution.loss)
    (0.5, 0.25)
    """

    generator: Generator
    target: Tensor

    def of(self, _classes: Tensor | slice) -> None:
        """log q of classes: q = 1."""
        return None

    def rows(self, samples: Tensor | slice) -> GeneratorMeasure:
        """The same for some rows of the batch."""
        return self._replace(target=self.target[samples])

    def edge(self, level: Tensor) -> Tensor:
        """Classes whose logit is above it are active."""
        return level

    def tau(self, level: Tensor) -> Tensor:
        """tau of a level."""
        return level + (self.generator.edge - self.generator.pole)

    def level(self, depth: Tensor, target: Tensor) -> Tensor:
        """The level [B] of the depths and logits of targets, [B]."""
        return target + (depth - self.generator.edge)

    def depth_at(self, level: Tensor, target: Tensor) -> Tensor:
        """The targets' depths [B] where that is the level."""
        return level - target + self.generator.edge

    def depth(
        self,
        leads: Callable[[], Iterable[Tensor]],
        most: Tensor,
        classes: int,
        *,
        lower: Tensor | None = None,
        total: Callable[[Tensor], Tensor] = lambda sums: sums,
        settled: Callable[[Tensor], bool] | None = None,
    ) -> Tensor:
        """The targets' depths [B], float64.

        Parameters
        ----------
        leads : callable
            Leads [B, K] of the other classes, float64, piece by piece; -inf: absent.
        most : Tensor, [B]
            The largest of them all.
        classes : int
            At least as many as there are, targets included.
        lower : Tensor, [B], optional
            A lower bound.
        total : callable
            Sums over processes of sums [2, B].
        settled : callable, optional
            See :func:`root`.
        """
        f = self.generator
        low = torch.maximum(f.depth(-self.target), f.depth(torch.zeros_like(most)) + most)
        if lower is not None:
            low = torch.maximum(low, lower)
        # all the measure at the largest logit
        high = f.depth(-torch.logaddexp(self.target, torch.full_like(most, math.log(classes))))

        def mass(depth: Tensor) -> tuple[Tensor, Tensor]:
            sums = torch.zeros(2, *depth.shape, dtype=depth.dtype, device=depth.device)
            for lead in leads():
                p, h = masses(f, depth.unsqueeze(1) - lead)
                sums += torch.stack((p.sum(1), h.sum(1)))
            own = torch.stack(masses(f, depth, self.target))
            s, h = total(sums) + own
            return s, h

        return root(mass, low, high + most.clamp(min=0), settled)

    def moments(self, leads: Iterable[Tensor], depth: Tensor) -> Moments:
        """Of classes with these leads, at depths [B] of the targets."""
        found = [torch.zeros_like(depth) for _ in range(3)]
        for lead in leads:
            p, _ = masses(self.generator, depth.unsqueeze(1) - lead)
            value = self.generator.drop(p) + p * torch.where(p > 0, lead, 0)
            for so_far, more in zip(found, (p, value, p > 0), strict=True):
                so_far += more.sum(1)
        return Moments(*found)

    def solution(self, depth: Tensor, others: Moments) -> Solution:
        """The losses of :func:`f_margin_loss`, from the targets' depths and the other classes."""
        f, log_q = self.generator, self.target
        p_y, _ = masses(f, depth, log_q)
        inverse_total = 1 / (others.mass + p_y)
        p_y = p_y * inverse_total
        loss = _loss(f, others.value, others.mass, log_q, p_y)
        return Solution(loss, p_y, 0 - others.mass * inverse_total, inverse_total)


def _checked(logits: Tensor, log_q: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both in float64 and of one shape."""
    refuse_no_tensor(logits=logits, log_q=log_q)
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    exact = logits.detach().double()
    if log_q is None:
        return exact, torch.zeros_like(exact)
    measure = torch.broadcast_to(log_q.detach().double(), exact.shape)
    if not float(measure.abs().amax()) <= _LARGEST_LOG:
        raise ValueError(
            f"log_q must be within +-{_LARGEST_LOG:g}, so that q is positive in float64"
        )
    return exact, measure


# --------------------------------------------------------------------------- the operators


class _Softargmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, log_q: Tensor | None, f: Generator) -> Tensor:
        exact, measure = _checked(logits, log_q)
        depth, p = _solved(f, exact, measure)
        _, h = masses(f, depth, measure)
        ctx.save_for_backward(p, h)
        ctx.shape = None if log_q is None else log_q.shape
        return p.to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        refuse_second_derivatives("f_softargmax", "alpha_softargmax has them")
        p, h = ctx.saved_tensors
        (g,) = gradients
        exact = g.double()
        centred = exact - (h * exact).sum(-1, keepdim=True) / h.sum(-1, keepdim=True)
        by_log_q = None
        if ctx.shape is not None and ctx.needs_input_grad[1]:
            by_log_q = (p * centred).sum_to_size(ctx.shape).to(g.dtype)
        return (h * centred).to(g.dtype), by_log_q, None


def f_softargmax(
    logits: Tensor, divergence: str | Generator, log_q: Tensor | None = None
) -> Tensor:
    r"""Posterior :math:`\arg\max_p \langle p, \theta\rangle - D_f(p, q)` for another f-divergence.

    It is over the last dimension, and sums to one. For the alpha-divergences see
    :func:`~speechbrain_qmargin.alpha_softargmax`.

    Parameters
    ----------
    logits : Tensor, [..., C]
        Computed in float64. -inf stands for an absent class.
    divergence : str or Generator
    log_q : Tensor broadcastable to `logits`, optional
        Logarithm of the reference measure, within +-600. None: all ones.

    Returns
    -------
    Tensor
        Of the shape and dtype of `logits`; once differentiable, in `logits` and `log_q`: with
        ``create_graph=True`` the backward pass raises RuntimeError.

    Examples
    --------
    >>> f_softargmax(torch.tensor([2.0, 1.6, 0.0]), "chi_square")
    tensor([0.7000, 0.3000, 0.0000])
    >>> f_softargmax(torch.tensor([2.0, 1.6, 0.0]), "jensen_shannon") > 0
    tensor([True, True, True])
    """
    f = generator_named(divergence) if isinstance(divergence, str) else divergence
    return _Softargmax.apply(logits, log_q, f)


class _MarginLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, log_q: Tensor, targets: Tensor, f: Generator):
        """Losses, target posteriors and supports, all [B]."""
        exact, measure = _checked(logits, log_q)
        index = targets.unsqueeze(1)
        _, p = _solved(f, exact, measure)
        u = torch.exp(torch.where(p > 0, p, 1).log() - measure)
        moved = exact - exact.gather(1, index)
        each = torch.where(p > 0, measure.exp() * f.drop(u) + p * moved, 0).scatter(1, index, 0)
        others = p.scatter(1, index, 0).sum(1)
        log_y, p_y = (one.gather(1, index).squeeze(1) for one in (measure, p))
        loss = _loss(f, each.sum(1), others, log_y, p_y)
        residual = p.scatter(1, index, -others.unsqueeze(1))
        ctx.save_for_backward(residual)
        support = (p > 0).sum(1)
        loss, p_y = loss.to(logits.dtype), p_y.to(logits.dtype)
        ctx.mark_non_differentiable(p_y, support)
        return loss, p_y, support

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        refuse_second_derivatives("FDivergenceLoss", "the other losses have them")
        (residual,) = ctx.saved_tensors
        g = gradients[0]
        return (residual * g.double().unsqueeze(1)).to(g.dtype), None, None, None


def f_margin_loss(
    logits: Tensor, targets: Tensor, divergence: str | Generator, log_q: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Losses, target posteriors and support sizes, all [B].

    .. math:: L = \sum_{j \ne y} [q_j (f(0) - f(p_j / q_j)) + p_j (\theta_j - \theta_y)]
                  + q_y (f(1 / q_y) - f(p_y / q_y)), \qquad
              \partial L / \partial \theta = p - e_y ,

    the Fenchel-Young loss with what cancels left out: inactive classes add nothing.

    Parameters
    ----------
    logits : Tensor, [B, C]
    targets : Tensor, [B], int64
    divergence : str or Generator
    log_q : Tensor, [B, C]
        Its own gradient is not computed.

    Raises
    ------
    ValueError
        f(0) is infinite: then the loss is.

    Examples
    --------
    >>> prior = torch.tensor([[-2.0, 0.0, 0.0]])
    >>> f_margin_loss(torch.tensor([[1.0, 0.9, -9.0]]), torch.tensor([0]), "le_cam", prior)
    (tensor([1.5624]), tensor([0.1296]), tensor([2]))
    """
    f = generator_named(divergence) if isinstance(divergence, str) else divergence
    if not math.isfinite(f.at_zero):
        raise ValueError(
            f"divergence: {f.name} has no loss: f(0) is infinite, and so is the divergence of a "
            "label from any measure; it has a softargmax"
        )
    return _MarginLoss.apply(logits, log_q, targets, f)
