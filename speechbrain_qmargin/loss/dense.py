"""A dense classifier's cosines as :class:`~speechbrain_qmargin.loss.interface.Scores`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from speechbrain_qmargin.loss.binary import binary_rows
from speechbrain_qmargin.loss.device import (
    all_steps,
    assert_on_device,
    host_decides,
    kernels_run,
)
from speechbrain_qmargin.loss.f_operators import f_margin_loss
from speechbrain_qmargin.loss.interface import (
    BinaryObjective,
    Objective,
    Rows,
    Scores,
    check_rows,
    completed,
    flat,
    label_outside,
    prior_slope,
)
from speechbrain_qmargin.loss.solver import (
    FEW_STEPS,
    FLOAT32_LOG_RANGE,
    Block,
    Measure,
    compute_dtype,
    fenchel_young,
    jacobian,
    row_dtype,
    single_class_level,
    solve,
    spread_of,
)

__all__ = ["DenseScores", "check_labels", "scores_of"]

# tau on a subset of the classes is a lower bound of tau. With many classes the steps start from its
# value on the largest logits, which is mostly the answer and saves most of the full passes.
_WARM_START_CLASSES, _WARM_START_SUBSET = 2048, 64
_BEYOND = (
    "log_q times alpha - 1 goes beyond what float32 holds (80); on a GPU, where looking would make "
    "the host wait, such a measure takes float64 cosines"
)


class DenseScores:
    """Cosines of a batch and all classes.

    Parameters
    ----------
    cosines : Tensor, [B, C] or [B, 1, C], floating point
        bf16 and fp16 are computed in float32.
    embeddings : Tensor, [B, D] or [B, 1, D], optional
        What the classifier was given.

    Raises
    ------
    TypeError, ValueError
        Other shapes and types, and outputs that are not cosines; on a GPU the check of values is an
        asynchronous device-side assertion.

    Notes
    -----
    A sample with a NaN among its cosines, as of an embedding that is not finite, has a loss of NaN
    and a gradient of NaN, on every device: whoever takes the step decides what becomes of it.

    Examples
    --------
    >>> scores = DenseScores(torch.tensor([[[0.9, 0.1, 0.0]]]))
    >>> scores.num_classes
    3
    >>> scores.evaluate(torch.tensor([0]), Objective(scale=10.0)).loss
    tensor([0.0005])
    """

    def __init__(self, cosines: Tensor, embeddings: Tensor | None = None) -> None:
        if cosines.ndim == 3 and cosines.shape[1] == 1:
            cosines = cosines.squeeze(1)
        if cosines.ndim != 2:
            raise ValueError(
                f"a loss takes cosines [B, C] or [B, 1, C], got {tuple(cosines.shape)}"
            )
        if not cosines.is_floating_point():
            raise TypeError(f"cosines must be floating point, got {cosines.dtype}")
        if cosines.numel() == 0:
            raise ValueError(f"an empty batch: cosines have shape {tuple(cosines.shape)}")
        if embeddings is not None:
            if embeddings.ndim == 3 and embeddings.shape[1] == 1:
                embeddings = embeddings.squeeze(1)
            if embeddings.ndim != 2 or len(embeddings) != len(cosines):
                raise ValueError(
                    "embeddings must be [B, D] or [B, 1, D], one for each sample, got "
                    f"{tuple(embeddings.shape)} for cosines {tuple(cosines.shape)}"
                )
        self._cosines, self._embeddings = cosines, embeddings
        self._checked = False
        if not kernels_run(cosines.device):  # which look at every value anyhow
            self._check()

    def _check(self) -> None:
        if not self._checked:
            _check_cosines(self._cosines)
        self._checked = True

    @property
    def num_classes(self) -> int:
        return self._cosines.shape[1]

    @property
    def embeddings(self) -> Tensor | None:
        return self._embeddings

    def cosines(self) -> Tensor:
        """[B, C], as they came."""
        self._check()
        return self._cosines

    def evaluate(
        self,
        targets: Tensor,
        objective: Objective | BinaryObjective,
        *,
        statistics: bool = False,
    ) -> Rows:
        """See :meth:`~speechbrain_qmargin.loss.interface.Scores.evaluate`.

        Differentiable as often as `move_target` is.

        Raises
        ------
        TypeError, ValueError
            Targets that are not integers [B] in [0, num_classes); an objective whose tensors have
            other shapes, or with `move_others` and alpha > 1.
        """
        cosines = self._cosines
        if targets.ndim != 1 or targets.shape[0] != cosines.shape[0]:
            raise ValueError(
                "the loss takes cosines [B, C] and targets [B], got "
                f"{tuple(cosines.shape)} and {tuple(targets.shape)}"
            )
        targets = flat(targets)
        check_labels(targets, cosines.shape[1])
        objective = completed(objective, targets, cosines.shape[1])
        if isinstance(objective, BinaryObjective):
            self._check()
            return binary_rows(cosines, targets, objective)
        if objective.generator is not None:
            return self._of_generator(targets, objective)
        log_q, moved = objective.log_q, None
        with torch.autocast(cosines.device.type, enabled=False):
            if objective.move_target is not None:
                own = cosines.gather(1, targets.unsqueeze(1)).squeeze(1)
                moved = objective.move_target(own.to(row_dtype(cosines)))
                check_rows("move_target", moved, targets)
            if objective.move_others is not None:
                self._check()
                if moved is None:
                    moved = cosines.gather(1, targets.unsqueeze(1)).squeeze(1)
                    moved = moved.to(row_dtype(cosines))
                dtype = compute_dtype(cosines)
                # the targets are not among the others, whose slope may be infinite at a cosine of 1
                others = cosines.to(dtype).scatter(1, targets.unsqueeze(1), 0.0)
                cosines = objective.move_others(others, moved.detach().to(dtype).unsqueeze(1))
                check_rows("move_others", cosines, others)
            tensors = cosines, moved, objective.target_log_q, log_q, targets
            numbers = objective.alpha, float(objective.scale), statistics
            if kernels_run(cosines.device):
                loss, posterior, support = _OneLaunch.apply(*tensors, *numbers, not self._checked)
                self._checked = True
            else:
                loss, posterior, support, _ = _FenchelYoung.apply(
                    *tensors, *numbers, objective.spread
                )
        return Rows(loss, posterior, support)

    def _of_generator(self, targets: Tensor, objective: Objective) -> Rows:
        cosines, index = self.cosines(), targets.unsqueeze(1)
        assert objective.generator is not None
        with torch.autocast(cosines.device.type, enabled=False):
            log_q = torch.zeros_like(cosines, dtype=torch.float64)
            if objective.target_log_q is not None:
                log_q = log_q.scatter(1, index, objective.target_log_q.double().unsqueeze(1))
            logits = cosines.to(compute_dtype(cosines)) * objective.scale
            return Rows(*f_margin_loss(logits, targets, objective.generator, log_q))


def scores_of(outputs: Tensor | Scores, embeddings: Tensor | None = None) -> Scores:
    """A classifier's output as :class:`Scores`.

    Parameters
    ----------
    outputs : Tensor, [B, C] or [B, 1, C], or Scores
        Cosines; Scores, as the sparse head's training output, are returned as they are.
    embeddings : Tensor, [B, D] or [B, 1, D], optional
        What a dense classifier was given, for the losses that look at norms.

    Raises
    ------
    TypeError
        Neither cosines nor Scores.

    Examples
    --------
    >>> scores = scores_of(torch.tensor([[[1.0, 0.0]]]))    # [B, 1, C], as SpeechBrain's classifier
    >>> scores.cosines()
    tensor([[1., 0.]])
    >>> scores_of(scores) is scores
    True
    """
    if isinstance(outputs, Tensor):
        return DenseScores(outputs, embeddings)
    if isinstance(outputs, Scores):
        return outputs
    raise TypeError(
        "a loss takes cosines [B, 1, C] or a sparse head's training output, got "
        f"{type(outputs).__name__}"
    )


class _FenchelYoung(torch.autograd.Function):
    @staticmethod
    def forward(
        cosines: Tensor,
        moved: Tensor | None,
        target_log_q: Tensor | None,
        log_q: Tensor | None,
        targets: Tensor,
        alpha: float,
        scale: float,
        count_support: bool,
        spread: float | None,
    ):
        """Loss, target posterior and support size, all [B], and p - e_y [B, C].

        `moved` takes the place of the targets' cosines. Three B x C buffers at most live at once
        (logits and two of powers); one of them becomes p - e_y, the only one kept.
        """
        index = targets.unsqueeze(1)
        dtype, exact = compute_dtype(cosines), row_dtype(cosines)
        cos_y = cosines.gather(1, index).squeeze(1) if moved is None else moved
        cos_y = cos_y.to(exact)
        prior = torch.zeros_like(cos_y) if target_log_q is None else target_log_q.to(exact)
        looks = host_decides(cosines.device)
        if spread is None and alpha > 1 and (looks or all_steps()):
            spread = spread_of(target_log_q, log_q)
        if log_q is not None and dtype != exact and not _float32_holds(log_q, alpha):
            dtype = exact
        # Differences to one wrong cosine, taken before scaling: nearly exact where it matters. The
        # target leaves the matrix, so that its tiny prior meets no rounding.
        z = cosines.to(dtype, copy=True).scatter_(1, index, -math.inf)
        if log_q is None:
            origin, lower = z.amax(1), None
        else:
            # the class that alone reaches highest: where q is large, u is tiny beside the logits
            alone = single_class_level(torch.zeros_like(log_q, dtype=exact), alpha, log_q.to(exact))
            place = torch.add(alone.to(dtype), z, alpha=scale).argmax(1, keepdim=True)
            origin, lower = z.gather(1, place).squeeze(1), alone[place.squeeze(1)]
        if cosines.shape[1] == 1:  # no wrong class
            origin, lower = cos_y.to(dtype), torch.full_like(cos_y, -math.inf)
        z = z.sub_(origin.unsqueeze(1))
        z_y = (cos_y - origin) * scale
        measure = Measure(alpha, prior, log_q)
        if alpha == 1:
            z = z.mul_(scale) if log_q is None else z.mul_(scale).add_(log_q.to(dtype))
            alone = single_class_level(z_y, alpha, prior)
            level = torch.logaddexp(torch.logsumexp(z, 1).to(exact), alone)
            p = z.sub_(level.to(dtype).unsqueeze(1)).exp_()
            others, gap = p.sum(1), 0.0
        else:
            v = z.mul_(scale * (alpha - 1))
            peak = v.amax(1) / (alpha - 1)
            if lower is None:
                lower = single_class_level(peak.to(exact), alpha)
            few = None
            # the safeguarded steps above alpha = 2 are as many from any start, if nobody looks
            if v.shape[1] >= _WARM_START_CLASSES if looks else alpha <= 2:
                values, place = v.topk(min(_WARM_START_SUBSET, v.shape[1]), 1, sorted=False)
                top, few = Block(values, alpha, measure.of(place)), FEW_STEPS
                rest = z_y, measure, lower, peak, v.shape[1], spread
                lower = solve(top.sums, *rest, few=few, exact=False)
            block = Block(v, alpha, log_q)
            level = solve(block.sums, z_y, measure, lower, peak, v.shape[1], spread, few=few)
            p = block.posterior(level)
            others = p.sum(1)
            gap = torch.linalg.vecdot(p, v.scatter_(1, index, 0)) / (alpha - 1)
            gap = gap - others * z_y
        solution = fenchel_young(measure, z_y, level, others, gap)
        out = compute_dtype(cosines)
        loss, p_y = solution.loss.to(out), solution.target_posterior.to(out)
        p = p.mul_(solution.inverse_total.to(dtype).unsqueeze(1))
        support = torch.count_nonzero(p, dim=1) + (p_y > 0) if count_support else None
        excess = p.scatter_(1, index, solution.residual.to(dtype).unsqueeze(1)).to(out)
        return loss, p_y, support, excess

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        cosines, moved, target_log_q, log_q, targets, ctx.alpha, ctx.scale, *_ = inputs
        _, *constants, excess = output
        ctx.save_for_backward(excess, targets.unsqueeze(1), target_log_q, log_q)
        ctx.in_dtype, ctx.moved_dtype = cosines.dtype, None if moved is None else moved.dtype
        ctx.mark_non_differentiable(*(one for one in constants if one is not None))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None):
        grad_loss, _, _, grad_excess = gradients
        excess, index, target_log_q, log_q = ctx.saved_tensors
        alpha, scale = ctx.alpha, ctx.scale
        by_cosine = by_moved = by_prior = by_log_q = None
        own = excess.gather(1, index).squeeze(1)
        if grad_loss is not None:
            by_cosine = excess * (grad_loss * scale).unsqueeze(1)
            if ctx.needs_input_grad[2]:
                by_prior = prior_slope(target_log_q.to(own.dtype), own, alpha) * grad_loss
            if ctx.needs_input_grad[3]:
                by_log_q = _measure_slope(excess.scatter(1, index, 0), log_q, alpha, grad_loss)
        if grad_excess is not None:  # of the gradient itself
            p = excess.scatter_add(1, index, torch.ones_like(index, dtype=excess.dtype))
            full = torch.zeros_like(p) if log_q is None else log_q.to(p.dtype).expand_as(p)
            prior = torch.zeros_like(own) if target_log_q is None else target_log_q.to(p.dtype)
            full = full.scatter(1, index, prior.unsqueeze(1))
            h, centred = jacobian(p, grad_excess, alpha, full)
            more = scale * h * centred
            by_cosine = more if by_cosine is None else by_cosine + more
            if ctx.needs_input_grad[2]:
                more = (p * centred).gather(1, index).squeeze(1)
                by_prior = more if by_prior is None else by_prior + more
            if ctx.needs_input_grad[3]:
                more = (p * centred).scatter(1, index, 0)
                by_log_q = more if by_log_q is None else by_log_q + more
        if ctx.moved_dtype is not None and by_cosine is not None:
            by_moved = by_cosine.gather(1, index).squeeze(1).to(ctx.moved_dtype)
            by_cosine = by_cosine.scatter(1, index, 0)
        if by_cosine is not None:
            by_cosine = by_cosine.to(ctx.in_dtype)
        if by_prior is not None and target_log_q is not None:
            by_prior = by_prior.to(target_log_q.dtype)
        if by_log_q is not None and log_q is not None:
            by_log_q = by_log_q.sum(0).to(log_q.dtype)
        return by_cosine, by_moved, by_prior, by_log_q, *[None] * 5


class _OneLaunch(torch.autograd.Function):
    """What :class:`_FenchelYoung` gives, by Triton's kernels: one launch each way.

    The row is read again in the backward pass, so that nothing of size B x C is kept but the
    cosines.
    """

    @staticmethod
    def forward(
        ctx: Any,
        cosines: Tensor,
        moved: Tensor | None,
        target_log_q: Tensor | None,
        log_q: Tensor | None,
        targets: Tensor,
        alpha: float,
        scale: float,
        count_support: bool,
        check: bool,
    ):
        from speechbrain_qmargin.loss.kernels import solve_rows  # needs Triton

        if cosines.stride(1) != 1:
            cosines = cosines.contiguous()
        if log_q is not None and compute_dtype(cosines) == torch.float32:
            _float32_holds(log_q, alpha)
        solved = solve_rows(
            cosines,
            targets,
            alpha,
            scale,
            moved=moved,
            prior=target_log_q,
            log_q=log_q,
            limit=1 + _tolerance(cosines.dtype) if check else None,
            support=count_support,
        )
        if check:
            assert_on_device((solved.counts[1] == 0).all(), _beyond_one(cosines.shape[1]))
        ctx.save_for_backward(cosines, targets, solved.kept, moved, target_log_q, log_q)
        ctx.alpha, ctx.scale = alpha, scale
        support = solved.counts[0] if count_support else None
        ctx.mark_non_differentiable(solved.posterior, *([] if support is None else [support]))
        ctx.set_materialize_grads(False)
        return solved.loss, solved.posterior, support

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None):
        from speechbrain_qmargin.loss.kernels import gradient

        grad_loss = gradients[0]
        if grad_loss is None:
            return (None,) * 9
        cosines, targets, kept, moved, target_log_q, log_q = ctx.saved_tensors
        alpha, scale = ctx.alpha, ctx.scale
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # second derivatives
            inputs = cosines, moved, target_log_q, log_q
            loss, *_ = _FenchelYoung.apply(*inputs, targets, alpha, scale, False, None)
            wanted = [x for x, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
            found = iter(torch.autograd.grad(loss, wanted, grad_loss, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:4]), *(
                [None] * 5
            )
        by_cosine = by_moved = by_prior = by_log_q = None
        same = {"moved": moved is not None, "log_q": log_q}
        if ctx.needs_input_grad[0]:
            by_cosine = gradient(cosines, targets, kept, grad_loss * scale, alpha, scale, **same)
        if moved is not None and ctx.needs_input_grad[1]:
            by_moved = (kept[0] * (grad_loss * scale)).to(moved.dtype)
        if target_log_q is not None and ctx.needs_input_grad[2]:
            by_prior = prior_slope(target_log_q, kept[0], alpha) * grad_loss
            by_prior = by_prior.to(target_log_q.dtype)
        if log_q is not None and ctx.needs_input_grad[3]:
            same |= {"moved": True, "dtype": grad_loss.dtype}
            p = gradient(cosines, targets, kept, torch.ones_like(grad_loss), alpha, scale, **same)
            by_log_q = _measure_slope(p, log_q, alpha, grad_loss).sum(0).to(log_q.dtype)
        return by_cosine, by_moved, by_prior, by_log_q, *[None] * 5


def _measure_slope(others: Tensor, log_q: Tensor, alpha: float, grad_loss: Tensor) -> Tensor:
    """Gradient by log q of the other classes, p_j u_j / alpha, from their posteriors [B, C]."""
    there = others > 0
    log_p = torch.where(there, others, 1).log()
    tilted = torch.exp(alpha * log_p + (1 - alpha) * log_q.to(log_p.dtype))
    return torch.where(there, tilted, 0) * (grad_loss / alpha).unsqueeze(1)


def _float32_holds(log_q: Tensor, alpha: float) -> bool:
    """Whether factors q^(alpha-1) are far from float32's ends; on a GPU it is asserted."""
    beyond = (alpha - 1) * log_q.abs().amax() > FLOAT32_LOG_RANGE
    if host_decides(log_q.device):
        return not bool(beyond)
    assert_on_device(~beyond, _BEYOND)
    return True


def check_labels(targets: Tensor, num_classes: int) -> None:
    """Refuse labels outside [0, num_classes). On CUDA the check is asynchronous: no host wait.

    Parameters
    ----------
    targets : Tensor, int64
    num_classes : int

    Raises
    ------
    ValueError
        A label outside. On CUDA a device-side assertion; nothing while torch compiles.

    Examples
    --------
    >>> check_labels(torch.tensor([0, 2]), 3)
    >>> check_labels(torch.tensor([1, 3]), 3)       # labels that count from 1
    Traceback (most recent call last):
    ValueError: target label 3 is outside [0, 3): the outputs have 3 classes. ...
    """
    if torch.compiler.is_compiling():
        return
    valid = (targets >= 0) & (targets < num_classes)
    if not host_decides(targets.device):
        assert_on_device(
            valid.all(),
            f"a target label is outside [0, {num_classes}): the outputs have {num_classes} "
            "classes. Set out_n_neurons (the classifier's number of classes) to the size of the "
            "label encoder; no label is ignored",
        )
    elif not bool(valid.all()):
        raise ValueError(label_outside(int(targets[~valid][0]), num_classes))


def _tolerance(dtype: torch.dtype) -> float:
    """Half-precision products of half-precision unit vectors overshoot 1 by a few of their eps."""
    return max(1e-3, 4 * torch.finfo(dtype).eps)


def _advice(classes: int) -> str:
    return (
        "the loss takes cosines (unit embeddings times unit prototypes), not logits, and has the "
        "scale in itself. SpeechBrain's ECAPA recipes give cosines; for train_x_vectors add "
        "--classifier='!new:speechbrain.lobes.models.ECAPA_TDNN.Classifier "
        f"[512, cpu, 0, 192, {classes}]', where 512 is the size of its embeddings"
    )


def _beyond_one(classes: int) -> str:
    """What a device has room for of :func:`_advice`."""
    return (
        "outputs beyond 1: these are logits. The loss takes cosines, not logits, and has the scale "
        "in itself; for train_x_vectors give --classifier "
        f"an ECAPA_TDNN.Classifier of {classes} classes (on a CPU this says how)"
    )


def _check_cosines(cosines: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    low, high = torch.aminmax(cosines.detach())
    largest = torch.maximum(-low, high)  # NaN propagates, and is not beyond
    tolerance, classes = _tolerance(cosines.dtype), cosines.shape[1]
    if not host_decides(cosines.device):
        assert_on_device(~(largest > 1 + tolerance), _beyond_one(classes))
        return
    if float(largest) > 1 + tolerance:
        raise ValueError(f"outputs reach |{float(largest):.4g}| > 1: {_advice(classes)}")
    # a softmax's rows; cosines that are all positive and sum to 1 in every row do not happen
    if float(low) > 0 and len(cosines) > 1 and classes > 2:
        sums = cosines.detach().sum(1, dtype=torch.float64)
        if bool(((sums - 1).abs() <= tolerance).all()):
            raise ValueError(
                f"outputs are probabilities, positive and 1 in sum: {_advice(classes)}. Leave the "
                "softmax out"
            )
