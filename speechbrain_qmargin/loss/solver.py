r"""The normaliser tau of the alpha-softargmax, and the loss from it, for every kind of classifier.

Dense classifiers, the sparse head and its shards differ in where the classes' logits are; what is
computed of them is here. With :math:`k = 1/(\alpha - 1)`, a positive reference measure q and
:math:`u_j(\tau) = [1 + (\alpha - 1)(\theta_j - \tau)]_+`, the posterior is :math:`p_j = q_j u_j^k`
and tau is the root of the mass :math:`S(\tau) = \sum_j p_j = 1`. A class is active exactly when
:math:`\theta_j > \tau - k`, whatever its q.

Levels
------
tau is carried as a *level*, one number a row: :math:`\tau - k`, the edge of the support, where
:math:`k \le 8`, and tau itself above. Where a large q or many classes leave u of 1e-18, a number
near the edge still holds it with all its digits and a number near 1 does not; as
:math:`\alpha \to 1` the edge runs away and :math:`u^k` is taken by ``log1p``. :func:`edge` and
:func:`tau_of` translate. Levels and logits are relative to the same origin, which may be any
number a row.

Newton's method
---------------
The root is sought on :math:`S^{1/k}`, a weighted k-norm of u: convex and decreasing for
:math:`\alpha \le 2`, a straight line where one class holds all the mass, and
:math:`1 + \log(S)/k` to first order as :math:`\alpha \to 1`. Newton's method started from a lower
bound therefore converges monotonically, mostly in 3 to 8 steps. Such a bound is tau on any subset
of the classes, and so the largest :func:`single_class_level`. For :math:`\alpha > 2` the same
steps are safeguarded by bisection.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from speechbrain_qmargin.loss.device import (
    STEPS_VARIABLE,
    all_steps,
    assert_on_device,
    host_decides,
)

__all__ = [
    "FEW_STEPS",
    "FLOAT32_LOG_RANGE",
    "Block",
    "Measure",
    "Solution",
    "check_alpha",
    "compute_dtype",
    "edge",
    "fenchel_young",
    "in_logs",
    "jacobian",
    "newton",
    "newton_steps",
    "row_dtype",
    "single_class_level",
    "solve",
    "spread_of",
    "tau_of",
]

# Above this k = 1/(alpha - 1), powers are taken as exp(k log1p(.)), which stays accurate as
# alpha -> 1, and a level is tau; below, it is the edge tau - k
_LOG_DOMAIN_POWER = 8.0
_MAX_STEPS_SAFEGUARDED = 128
FLOAT32_LOG_RANGE = 80.0  # of q^(alpha-1): beyond, a Block is to be of float64
# Enough from a good start: 6 were the most from the largest 64 of up to 17,982 logits at the
# published settings, at scales down to 0.5 too, and 5 from a level of float32 less its rounding
FEW_STEPS = 8


class Measure(NamedTuple):
    r"""Order alpha and reference measure q of the rows of a batch.

    Attributes
    ----------
    alpha : float, >= 1
    target : Tensor, [B], float64 (float32 where the device has no float64)
        log q of each row's target: ``-scale * margin``, plus the class's own log q if any.
    classes : Tensor, [C], or None
        log q of the classes where they are not the target. None: q = 1.

    Examples
    --------
    >>> measure = Measure(alpha=2.0, target=torch.tensor([-1.0, -2.0]))
    >>> measure.rows(slice(1, 2)).target
    tensor([-2.])
    >>> level = torch.tensor(0.5)                       # the edge: k = 1
    >>> measure.edge(level), measure.tau(level)
    (tensor(0.5000), tensor(1.5000))
    """

    alpha: float
    target: Tensor
    classes: Tensor | None = None

    def edge(self, level: Tensor) -> Tensor:
        """See :func:`edge`."""
        return edge(level, self.alpha)

    def tau(self, level: Tensor) -> Tensor:
        """See :func:`tau_of`."""
        return tau_of(level, self.alpha)

    def of(self, classes: Tensor | slice) -> Tensor | None:
        """log q of some classes, in the shape of `classes`; None: q = 1."""
        return None if self.classes is None else self.classes[classes]

    def rows(self, samples: Tensor | slice) -> Measure:
        """The same measure for some rows of the batch."""
        return Measure(self.alpha, self.target[samples], self.classes)


class Solution(NamedTuple):
    """What :func:`fenchel_young` makes of a level; all [B], in the dtype of the levels.

    Attributes
    ----------
    loss : Tensor
    target_posterior : Tensor
        p_y.
    residual : Tensor
        p_y - 1, without the rounding of that difference: the target's gradient by its logit.
    inverse_total : Tensor
        What the other posteriors are multiplied by, so that all sum to one.
    """

    loss: Tensor
    target_posterior: Tensor
    residual: Tensor
    inverse_total: Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64 input, else float32, whatever autocast says.

    Examples
    --------
    >>> compute_dtype(torch.ones(1, dtype=torch.bfloat16)), compute_dtype(torch.ones(1).double())
    (torch.float32, torch.float64)
    """
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def row_dtype(tensor: Tensor) -> torch.dtype:
    """Of what is kept once a row: there u nearly cancels. float64 where the device has it.

    Examples
    --------
    >>> row_dtype(torch.ones(1))
    torch.float64
    """
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def check_alpha(alpha: float) -> None:
    """Refuse an order outside the family.

    Raises
    ------
    TypeError
        A tensor: its gradient would be lost.
    ValueError
        alpha < 1, or not finite.

    Examples
    --------
    >>> check_alpha(1.5)
    >>> check_alpha(0.5)
    Traceback (most recent call last):
    ValueError: alpha must be a finite number >= 1, got 0.5
    """
    if isinstance(alpha, Tensor):
        raise TypeError(
            "alpha must be a number here: a tensor, one for each row or one that is learnt, is "
            "taken by alpha_softargmax alone; pass float(alpha)"
        )
    if not (1 <= alpha < math.inf):
        raise ValueError(f"alpha must be a finite number >= 1, got {alpha}")


# --------------------------------------------------------------------------- levels


def in_logs(alpha: float) -> bool:
    """Whether levels are tau and powers exp(k log1p(.)): where k > 8.

    Examples
    --------
    >>> in_logs(1.1), in_logs(1.5)                      # k = 10, k = 2
    (True, False)
    """
    return (alpha - 1) * _LOG_DOMAIN_POWER < 1


def edge(level: Tensor, alpha: float) -> Tensor:
    """tau - k of a level: classes whose logit is above it are active. alpha > 1.

    Examples
    --------
    >>> edge(torch.tensor(0.5), 1.05), edge(torch.tensor(0.5), 2.0)     # a tau, an edge
    (tensor(-19.5000), tensor(0.5000))
    """
    return level - 1 / (alpha - 1) if in_logs(alpha) else level


def tau_of(level: Tensor, alpha: float) -> Tensor:
    """tau of a level.

    Examples
    --------
    >>> tau_of(torch.tensor(0.5), 1.05), tau_of(torch.tensor(0.5), 2.0)
    (tensor(0.5000), tensor(1.5000))
    """
    return level if in_logs(alpha) else level + 1 / (alpha - 1)


def single_class_level(logits: Tensor, alpha: float, log_q: Tensor | None = None) -> Tensor:
    """The level at which each class alone would hold mass 1: a lower bound of the true level.

    Parameters
    ----------
    logits : Tensor, any shape
    alpha : float
    log_q : Tensor broadcastable to `logits`, or None for q = 1

    Examples
    --------
    >>> single_class_level(torch.tensor([1.0, 0.0]), 2.0)       # sparsemax: 1 is logit - edge
    tensor([ 0., -1.])
    """
    if in_logs(alpha):
        if log_q is None:
            return logits
        if alpha == 1:
            return logits + log_q
        return logits - torch.expm1(log_q * (1 - alpha)) / (alpha - 1)
    if log_q is None:
        return logits - 1 / (alpha - 1)
    return logits - torch.exp(log_q * (1 - alpha)) / (alpha - 1)


def _target_powers(logit: Tensor, level: Tensor, measure: Measure) -> tuple[Tensor, Tensor]:
    """(p, q u^(k-1)) of the targets at a level, all [B]; both zero outside the support. alpha > 1.

    Parameters
    ----------
    logit, level : Tensor, [B]
    """
    alpha = measure.alpha
    k = 1 / (alpha - 1)
    lead = (logit - level).mul_(alpha - 1)
    log_u = lead.clamp_(min=-1).log1p_() if in_logs(alpha) else lead.clamp_(min=0).log_()
    if k > 1:  # exp(-inf) is 0
        p = (log_u * k).add_(measure.target).exp_()
        return p, log_u.mul_(k - 1).add_(measure.target).exp_()
    inactive = log_u == -math.inf
    log_u.masked_fill_(inactive, 0)
    h = torch.exp(log_u * (k - 1) + measure.target).masked_fill_(inactive, 0)
    p = torch.exp(log_u * k + measure.target).masked_fill_(inactive, 0)
    return p, h


def jacobian(
    p: Tensor, gradient: Tensor, alpha: float | Tensor, log_q: Tensor | None
) -> tuple[Tensor, Tensor]:
    r"""h and the centred gradient of a posterior [..., C]: :math:`J g = h \circ centred`.

    The Jacobian of the alpha-softargmax by the logits is :math:`diag(h) - h h^T / \sum h` with
    :math:`h = q^{\alpha-1} p^{2-\alpha}` on the support; by log q it is
    :math:`diag(p) - p h^T / \sum h`, whose product with g is :math:`p \circ centred` too. Made of
    differentiable operations.

    Examples
    --------
    >>> p, g = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([1.0, 0.0, 7.0])
    >>> h, centred = jacobian(p, g, 2.0, None)          # sparsemax: g less its mean on the support
    >>> h * centred
    tensor([ 0.5000, -0.5000,  0.0000])
    """
    active = p > 0
    h = torch.where(active, p, 1).pow(2 - alpha)
    if log_q is not None:
        h = h * torch.exp(log_q.to(h.dtype) * (alpha - 1))
    h = torch.where(active, h, 0)
    centred = gradient - (h * gradient).sum(-1, keepdim=True) / h.sum(-1, keepdim=True)
    return h, centred


def spread_of(*log_q: Tensor | None) -> float:
    """log(q_max / q_min) over several tensors of log q, None being q = 1; the host waits for it.

    Examples
    --------
    >>> spread_of(torch.tensor([-3.0, -1.0]), None)
    3.0
    """
    low, high = [], []
    for part in log_q:
        if part is None:
            low.append(0.0)
            high.append(0.0)
        elif part.numel():
            there = torch.isfinite(part)  # -inf: a class that is absent
            low.append(float(torch.where(there, part, math.inf).amin()))
            high.append(float(torch.where(there, part, -math.inf).amax()))
    return max(0.0, max(high, default=0.0) - min(low, default=0.0))


class Block:
    r"""Some classes' logits, and their mass and posterior at any level. alpha > 1.

    Parameters
    ----------
    v : Tensor, [..., K], float32 or float64
        (alpha - 1) times the logits; -inf stands for an absent class. Not changed.
    alpha : float
    log_q : Tensor broadcastable to `v`, or None for q = 1

    Examples
    --------
    >>> block = Block(torch.tensor([[0.0, -0.5]]), alpha=2.0)
    >>> block.posterior(torch.tensor([-0.75]))
    tensor([[0.7500, 0.2500]])
    >>> block.sums(torch.tensor([-0.75]))
    (tensor([1.]), tensor([2.]))
    """

    def __init__(self, v: Tensor, alpha: float, log_q: Tensor | None = None) -> None:
        self.v, self.alpha = v, alpha
        self.log_q = log_q
        self._u, self._h = torch.empty_like(v), torch.empty_like(v)

    @property
    def log_q(self) -> Tensor | None:
        """Like `v`, it may be set anew for other classes of the same shape: the buffers stay."""
        return self._log_q

    @log_q.setter
    def log_q(self, log_q: Tensor | None) -> None:
        self._log_q = None if log_q is None else log_q.to(self.v.device)
        self._factor: Tensor | None = None
        if log_q is not None:
            # q u^k = (q^(1/k) u)^k: neither factor is far from 1 where q and u^k are
            factor = log_q if in_logs(self.alpha) else torch.exp(log_q * (self.alpha - 1))
            self._factor = factor.to(self.v).expand_as(self.v)

    def sums(self, level: Tensor) -> tuple[Tensor, Tensor]:
        r"""S = sum_j p_j and H = sum_j q_j u_j^(k-1) = -dS/dtau at levels [...], both [...]."""
        h = self._powers(level)
        s = torch.linalg.vecdot(h, self._u)
        if self._factor is None or in_logs(self.alpha):
            return s, h.sum(-1)
        return s, torch.linalg.vecdot(h, self._factor)

    def posterior(self, level: Tensor) -> Tensor:
        """p [..., K] at levels [...], in a buffer that the next call overwrites."""
        h = self._powers(level)
        return h.square_() if h is self._u else h.mul_(self._u)

    def _powers(self, level: Tensor) -> Tensor:
        """Two factors of p in the buffers; returns the second, which is the first where k = 2.

        In logs u and q u^(k-1), otherwise w = q^(1/k) u and w^(k-1).
        """
        alpha, u, h = self.alpha, self._u, self._h
        k = 1 / (alpha - 1)
        torch.sub(self.v, ((alpha - 1) * level).to(self.v.dtype).unsqueeze(-1), out=u)
        if in_logs(alpha):
            torch.log1p(u.clamp_(min=-1), out=h).mul_(k - 1)
            if self._factor is not None:
                h.add_(self._factor)
            u.add_(1)
            return h.exp_()
        u.clamp_(min=0)
        if self._factor is not None:
            u.mul_(self._factor)
        if k == 2:
            return u
        if k == 1:
            return torch.sign(u, out=h)
        torch.pow(u, k - 1, out=h)
        return h if k > 1 else h.masked_fill_(u == 0, 0)


# --------------------------------------------------------------------------- the root


def newton_steps(alpha: float, classes: int, spread: float, dtype: torch.dtype) -> int:
    """Steps after which S^(1/k) - 1 is proved to be below eps, for 1 < alpha <= 2.

    g = S^(1/k) - 1 is convex and decreasing, so from the left g+ / g + g'+ / g' <= 1 for one step:
    the product ``g |g'|`` falls at least fourfold. It begins at most at (C^2 q_max)^(1/k) and the
    slope never falls below q_min^(1/k), both in units of alpha - 1.

    Parameters
    ----------
    classes : int
        How many there are.
    spread : float
        log(q_max / q_min).
    dtype : torch.dtype
        Whose eps is to be reached.

    Examples
    --------
    >>> newton_steps(2.0, 2, 0.0, torch.float32)        # 1 + (2 log2(2) + 23 bits) / 2, rounded up
    14
    """
    bits = (alpha - 1) * (2 * math.log2(classes) + spread / math.log(2))
    return 1 + math.ceil((bits - math.log2(torch.finfo(dtype).eps)) / 2)


def newton(
    mass: Callable[[Tensor], tuple[Tensor, Tensor]],
    lower: Tensor,
    upper: Tensor,
    alpha: float,
    steps: int,
    settled: Callable[[Tensor], bool] | None = None,
    *,
    few: int | None = None,
    exact: bool = True,
) -> Tensor:
    """The levels at which the mass is 1.

    Where the host may look at values (:func:`~speechbrain_qmargin.loss.device.host_decides`) it
    stops as soon as every row has converged. Elsewhere it would have to wait for the device, so a
    number of steps is taken that is known before, and where fewer than proved are, that all rows
    have converged is asserted on the device.

    Parameters
    ----------
    mass : callable
        ``S, H = mass(level)``, H = -dS/dtau, in any dtype.
    lower, upper : Tensor
        Bounds of the level; their dtype, which may be finer than the mass's, is the result's.
        `upper` is used above alpha = 2 only.
    alpha : float, > 1
    steps : int
        At most so many where alpha <= 2, see :func:`newton_steps`.
    settled : callable, optional
        Whether to stop, from which rows have converged: for processes that must stop together.
    few : int, optional
        So many, from a good start, where the host does not look at values and alpha <= 2; mostly
        :data:`FEW_STEPS`. None: all `steps`.
    exact : bool
        False: a lower bound of the level will do, and nothing is asserted.

    Raises
    ------
    RuntimeError
        On a GPU, and asynchronously: rows that have not converged after `few` steps.

    Examples
    --------
    >>> block = Block(torch.tensor([[0.0, -0.5]]), alpha=2.0)
    >>> newton(block.sums, torch.tensor([-1.0]), torch.tensor([0.0]), 2.0, steps=14)
    tensor([-0.7500])
    >>> block.posterior(torch.tensor([-0.75]))
    tensor([[0.7500, 0.2500]])
    """
    safeguarded = alpha > 2
    level = lower
    eps = torch.finfo(level.dtype).eps
    looks = settled is not None or host_decides(level.device)
    limit = _MAX_STEPS_SAFEGUARDED if safeguarded else steps
    shortened = not (looks or safeguarded or all_steps()) and few is not None and few <= limit
    if shortened:
        assert few is not None
        limit = few
    done = torch.zeros_like(lower, dtype=torch.bool)
    for step in range(limit):
        s, h = mass(level)
        eps_mass, s, h = torch.finfo(s.dtype).eps, s.to(level.dtype), h.to(level.dtype)
        # Newton on S^(1/k) - 1, written so that it becomes log(S) S / H as alpha -> 1.
        log_s = s.log()
        gain = torch.expm1(log_s * (alpha - 1)) / (alpha - 1)
        delta = gain * torch.exp(log_s * (2 - alpha)) / h
        noise = 4 * eps * level.abs()  # what rounding of the level leaves of a step
        if safeguarded:
            lower = torch.where(s >= 1, level, lower)
            upper = torch.where(s >= 1, upper, level)
            done = done | (upper - lower <= noise) | ((s - 1).abs() <= 4 * eps_mass)
            proposed = level + delta
            usable = (proposed > lower) & (proposed < upper) & (step % 3 != 2)
            proposed = torch.where(usable, proposed, lower + 0.5 * (upper - lower))
        else:
            # From the left every true step is forward; a step back is rounding, of S too. A row
            # that is done stays where it is, and so is found done again.
            done = ~(delta > torch.addcdiv(noise, s, h, value=4 * eps_mass))
            proposed = level + delta
        level = torch.where(done, level, proposed)
        if looks and (bool(done.all()) if settled is None else settled(done)):
            break
    if shortened and exact:
        assert_on_device(
            done.all(),
            f"the normaliser has not converged in {limit} steps, which these logits would be the "
            f"first to need; {STEPS_VARIABLE}=all takes the proved number",
        )
    return level


def solve(
    sums: Callable[[Tensor], tuple[Tensor, Tensor]],
    target: Tensor,
    measure: Measure,
    lower: Tensor,
    peak: Tensor,
    classes: int,
    spread: float | None,
    settled: Callable[[Tensor], bool] | None = None,
    *,
    few: int | None = None,
    exact: bool = True,
) -> Tensor:
    """The level [B] of targets and the other classes together, for alpha > 1.

    Parameters
    ----------
    sums : callable
        ``S, H = sums(level)`` of the other classes: :meth:`Block.sums`, or its sum over chunks or
        processes.
    target : Tensor, [B]
        The targets' logits. Their dtype is the result's.
    measure : Measure
    lower : Tensor, [B]
        A lower bound from the other classes, as the largest :func:`single_class_level`.
    peak : Tensor, [B]
        The largest of the other classes' logits.
    classes : int
        How many there are in all.
    spread : float, optional
        log(q_max / q_min) over classes and targets. None where it is not known without waiting:
        then `few` is given.
    settled : callable, optional
    few : int, optional
    exact : bool
        As for :func:`newton`.

    Raises
    ------
    ValueError
        Neither `spread` nor `few`.

    Examples
    --------
    >>> others, target = Block(torch.tensor([[-0.5]]), alpha=2.0), torch.tensor([0.0])
    >>> solve(
    ...     others.sums,
    ...     target,
    ...     Measure(2.0, torch.zeros(1)),
    ...     lower=torch.tensor([-1.5]),
    ...     peak=torch.tensor([-0.5]),
    ...     classes=2,
    ...     spread=0.0,
    ... )
    tensor([-0.7500])
    """

    def mass(level: Tensor) -> tuple[Tensor, Tensor]:
        s, h = sums(level)
        p_y, h_y = _target_powers(target, level, measure)
        return s + p_y.to(s.dtype), h + h_y.to(h.dtype)

    alpha = measure.alpha
    lower = torch.maximum(lower, single_class_level(target, alpha, measure.target))
    upper = torch.maximum(peak, target)
    if in_logs(alpha):
        upper = upper + 1 / (alpha - 1)
    if spread is None:
        if few is None:
            raise ValueError("the solver needs the spread of log q, or a number of steps")
        steps = few
    else:
        steps = newton_steps(alpha, classes, spread, peak.dtype)
    return newton(
        mass,
        lower.to(target.dtype),
        upper.to(target.dtype),
        alpha,
        steps,
        settled,
        few=few,
        exact=exact,
    )


# --------------------------------------------------------------------------- the loss


def fenchel_young(
    measure: Measure, target: Tensor, level: Tensor, others: Tensor, gap: Tensor | float
) -> Solution:
    r"""The loss from tau and two moments of the other classes' posteriors.

    After :math:`(p/q)^{\alpha-1} = 1 + (\alpha-1)(\theta - \tau)` on the support, the definition is

    .. math:: L = (1 - 1/\alpha) \sum_{j \ne y} p_j (\theta_j - \theta_y)
                  + (\tau - \tau_y) / \alpha

    with :math:`\tau_y` of the target alone: nothing is divided by a vanishing alpha - 1, and both
    terms vanish where the loss does. Where the mass S at the level given differs from 1 by
    rounding, :math:`(1 - 1/\alpha)(S - 1)(\theta_y - \tau) + (S - 1)/\alpha` is added: the dual
    objective, whose error is of second order in tau's.

    Parameters
    ----------
    measure : Measure
    target, level : Tensor, [B]
        The targets' logits, and the level of all classes.
    others : Tensor, [B]
        Sum of the other classes' posteriors.
    gap : Tensor, [B], or 0 at alpha = 1
        Sum of posterior times (logit - target's logit) over the other classes.

    Examples
    --------
    Sparsemax of the logits 0 (the target's) and -0.5: p = (0.75, 0.25), and the loss is
    0.25 (-0.5) - 0 + (1 - 0.75^2 - 0.25^2) / 2.

    >>> measure, target, level = Measure(2.0, torch.zeros(1)), torch.zeros(1), torch.tensor([-0.75])
    >>> others = torch.tensor([0.25])
    >>> solution = fenchel_young(measure, target, level, others, gap=-0.5 * others)
    >>> solution.loss, solution.residual
    (tensor([0.0625]), tensor([-0.2500]))
    """
    alpha = measure.alpha
    alone = single_class_level(target, alpha, measure.target)
    if alpha == 1:
        p_y = torch.exp(alone - level)
        # -log p_y, which near p_y = 1 would be all rounding
        loss = torch.where(p_y > 0.5, torch.log1p(others / p_y), level - alone)
        inverse_total = 1 / (others + p_y)
    else:
        p_y, _ = _target_powers(target, level, measure)
        excess = others + p_y - 1
        inverse_total = 1 / (1 + excess)
        gap = gap + excess * (target - tau_of(level, alpha))
        loss = (1 - 1 / alpha) * gap + (level - alone + excess) / alpha
        loss = torch.where(others == 0, 0.0, loss.clamp(min=0))
    return Solution(loss, p_y * inverse_total, 0 - others * inverse_total, inverse_total)
