"""The prototypes as a module: exact Q-Margin without logits in training, cosines in evaluation."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from speechbrain_qmargin.head.search import (
    Prototypes,
    candidate_level,
    chunked_cosines,
    dense_level,
    exact_cosines,
    posterior,
    refined,
    search,
    uniform_measure,
)
from speechbrain_qmargin.loss.functional import (
    QMarginStats,
    check_labels,
    check_loss_parameters,
)
from speechbrain_qmargin.loss.solver import fenchel_young

__all__ = ["HeadOutput", "QMarginHead"]

# Below this many classes a float32 product costs less than finding out what to skip
_SCREEN_FROM = 32768
_ROWS_AT_ONCE = 8192


class QMarginHead(nn.Module):
    r"""Class prototypes with an exact Q-Margin step whose cost beyond one bf16 pass is the support.

    The loss and its gradients are those of :func:`~speechbrain_qmargin.q_margin_loss` on the
    cosines of embeddings and prototypes, to float32 rounding; nothing is sampled. Logits of size
    batch x classes are not formed, and the gradient of `weight` is sparse: only the rows of active
    classes and targets (see :class:`~speechbrain_qmargin.head.RowSparseSGD`). At alpha = 1, or
    when nearly everything is active, it is computed in chunks and is dense.

    Parameters
    ----------
    embedding_dim, num_classes : int
    alpha, scale, margin : float
        Of ``head(embeddings, labels)``. Where SpeechBrain's ``compute_cost`` evaluates the training
        output, its own parameters count instead.

    Attributes
    ----------
    weight : Parameter, [num_classes, embedding_dim], float32
        Prototypes; their length does not enter the loss.

    Notes
    -----
    Beside `weight` live its rows' inverse norms and, from 32,768 classes on, a bf16 copy of the
    unit rows. Both follow `weight`: rows are refreshed by ``RowSparseSGD``; any other change is
    noticed and everything is rebuilt. Neither is in the checkpoint.

    Examples
    --------
    >>> head = QMarginHead(embedding_dim=4, num_classes=1000, alpha=1.5, scale=10, margin=0.2)
    >>> embeddings = torch.randn(8, 4, requires_grad=True)
    >>> loss = head(embeddings, torch.arange(8))
    >>> loss.backward()
    >>> head.weight.grad.is_sparse
    True
    >>> head.eval()(embeddings.unsqueeze(1)).shape      # cosines, as SpeechBrain's Classifier
    torch.Size([8, 1, 1000])

    In a SpeechBrain recipe::

        classifier: !new:speechbrain_qmargin.head.QMarginHead
            embedding_dim: 192
            num_classes: !ref <out_n_neurons>
        compute_cost: !new:speechbrain_qmargin.QMarginLoss
    """

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        alpha: float = 1.5,
        scale: float = 10.0,
        margin: float = 0.2,
    ) -> None:
        super().__init__()
        for name, value in (("embedding_dim", embedding_dim), ("num_classes", num_classes)):
            if int(value) != value or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value}")
        check_loss_parameters(alpha, scale, margin)
        self.alpha, self.scale, self.margin = float(alpha), float(scale), float(margin)
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_dim))
        self.weight.qmargin_rows_changed = self._rows_changed
        self._cache: Prototypes | None = None
        self._cache_of: tuple | None = None
        self.register_state_dict_pre_hook(lambda module, *_: module._catch_up())
        self.reset_parameters()

    def _catch_up(self) -> None:
        """Idle rows glide on: ask the optimiser that owns them, if it is a RowSparseSGD."""
        getattr(self.weight, "qmargin_catch_up", lambda: None)()

    def reset_parameters(self) -> None:
        """Directions uniform on the sphere, unit length."""
        with torch.no_grad():
            for rows in self.weight.split(_ROWS_AT_ONCE):
                rows.copy_(F.normalize(torch.randn_like(rows), dim=1))

    def extra_repr(self) -> str:
        classes, dim = self.weight.shape
        return (
            f"{dim}, {classes}, alpha={self.alpha:g}, scale={self.scale:g}, margin={self.margin:g}"
        )

    # ---------------------------------------------------------------- prototypes

    def prototypes(self) -> Prototypes:
        """The rows with what is derived from them, up to date."""
        weight = self.weight.detach()
        if weight.dtype != torch.float32:
            raise TypeError(
                f"QMarginHead keeps float32 prototypes, found {weight.dtype}: use autocast instead "
                "of converting the module"
            )
        if self._cache_of != self._key():
            screened = weight.shape[0] >= _SCREEN_FROM
            screen = torch.empty_like(weight, dtype=torch.bfloat16) if screened else None
            self._cache = Prototypes(
                weight, weight.new_empty(weight.shape[0]), screen, weight.new_zeros(())
            )
            for start in range(0, weight.shape[0], _ROWS_AT_ONCE):
                self._derive(slice(start, start + _ROWS_AT_ONCE))
            self._cache_of = self._key()
        return self._cache

    def _key(self) -> tuple:
        return self.weight.data_ptr(), self.weight.device, self.weight._version

    def _derive(self, rows: slice | Tensor) -> None:
        weight, inverse_norm, screen, residual = self._cache
        values = weight[rows]
        inverse = values.norm(dim=1).clamp_(min=1e-12).reciprocal_()
        inverse_norm[rows] = inverse
        if screen is not None:
            unit = values * inverse.unsqueeze(1)
            rounded = unit.bfloat16()
            screen[rows] = rounded
            error = (unit - rounded.float()).norm(dim=1).amax() * (1 + 2**-20)
            torch.maximum(residual, error, out=residual)

    def _rows_changed(self, rows: Tensor, version_before: int) -> None:
        """`rows` of the weight were just changed, by whoever read `version_before` first."""
        pointer, device, version = self._key()
        if self._cache_of == (pointer, device, version_before):
            for part in rows.split(_ROWS_AT_ONCE):
                self._derive(part)
            self._cache_of = (pointer, device, version)

    # ---------------------------------------------------------------- forward

    def forward(self, embeddings: Tensor, labels: Tensor | None = None) -> Tensor | HeadOutput:
        """Loss with labels; without, what ``compute_cost`` takes in training, cosines otherwise.

        Parameters
        ----------
        embeddings : Tensor, [B, D] or [B, 1, D]
            Any length and floating dtype; computed in float32.
        labels : Tensor, [B] or [B, 1], integer, optional

        Returns
        -------
        Tensor or HeadOutput
            Mean loss, a float32 scalar; without labels, in evaluation, cosines [B, 1, C].

        Raises
        ------
        ValueError, TypeError
            Shapes that disagree, labels outside [0, num_classes), embeddings that are not finite.
        """
        if embeddings.ndim == 3 and embeddings.shape[1] == 1:
            embeddings = embeddings.squeeze(1)
        if embeddings.ndim != 2 or embeddings.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"QMarginHead takes embeddings [B, {self.weight.shape[1]}] or "
                f"[B, 1, {self.weight.shape[1]}], got {tuple(embeddings.shape)}"
            )
        if embeddings.shape[0] == 0:
            raise ValueError("an empty batch of embeddings")
        if labels is None and not self.training:
            self._catch_up()
            with torch.autocast(embeddings.device.type, enabled=False):
                unit = F.normalize(embeddings.float(), dim=1)
                return F.linear(unit, F.normalize(self.weight, dim=1)).unsqueeze(1)
        output = HeadOutput(self, embeddings)
        if labels is None:
            return output
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels.squeeze(1)
        return output.q_margin_loss(labels, self.alpha, self.scale, self.margin)


class HeadOutput:
    """A batch's training output: what :class:`~speechbrain_qmargin.QMarginLoss` evaluates."""

    def __init__(self, head: QMarginHead, embeddings: Tensor) -> None:
        self.head, self.embeddings = head, embeddings

    def q_margin_loss(
        self,
        targets: Tensor,
        alpha: float,
        scale: float,
        margin: float,
        *,
        reduction: str = "mean",
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, QMarginStats]:
        """As :func:`speechbrain_qmargin.q_margin_loss`, for targets [B]."""
        embeddings = self.embeddings
        check_loss_parameters(alpha, scale, margin)
        if targets.shape != embeddings.shape[:1]:
            raise ValueError(
                f"targets must be [B] = [{embeddings.shape[0]}], got {tuple(targets.shape)}"
            )
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
        with torch.autocast(embeddings.device.type, enabled=False):
            unit = F.normalize(embeddings.float(), dim=1)
            parameters = (float(alpha), float(scale), float(margin))
            loss, p_y, support = self._losses(unit, targets.long(), parameters)
        stats = None
        if return_stats:
            count = support.to(loss.dtype)
            zero = (loss == 0).to(loss.dtype).mean()
            stats = QMarginStats(count.mean(), count.max(), zero, p_y.mean())
        if reduction != "none":
            loss = loss.mean() if reduction == "mean" else loss.sum()
        return (loss, stats) if return_stats else loss

    def arcface_loss(self, targets: Tensor, scale: float, margin: float) -> Tensor:
        """Mean cross-entropy with an angular margin (radians) at the targets [B]."""
        from speechbrain_qmargin.loss.arcface import angular_margin

        check_loss_parameters(1.0, scale, margin)
        with torch.autocast(self.embeddings.device.type, enabled=False):
            unit = F.normalize(self.embeddings.float(), dim=1)
            moved = partial(angular_margin, margin=margin)
            loss, _, _ = self._losses(unit, targets.long(), (1.0, float(scale), 0.0), moved)
        return loss.mean()

    def _losses(
        self, unit: Tensor, targets: Tensor, parameters: tuple, moved=None
    ) -> tuple[Tensor, ...]:
        """Loss, target posterior, support [B]; `moved`: new cosines and slopes of the targets."""
        head = self.head
        check_labels(targets, head.weight.shape[0])
        _check_finite(unit)
        exact = F.normalize(self.embeddings.detach().double(), dim=1)
        return _HeadLoss.apply(
            unit, head.weight, targets, exact, head.prototypes(), parameters, moved
        )


def _check_finite(unit: Tensor) -> None:
    finite = unit.detach().isfinite().all()
    message = (
        "embeddings are not finite (NaN or inf). Look for a diverged model, a silent or empty "
        "recording, or fp16 overflow"
    )
    if unit.device.type != "cpu":
        torch._assert_async(finite, message)
    elif not bool(finite):
        raise ValueError(message)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, unit, weight, labels, exact, prototypes, parameters, moved):
        """Loss [B], target posterior [B], support [B] of unit embeddings [B, D]; exact: float64."""
        alpha, scale, margin = parameters
        everyone = torch.arange(labels.numel(), device=labels.device)
        cos_y = exact_cosines(exact, everyone, labels, prototypes)
        cos_y, slope = (cos_y, 1.0) if moved is None else moved(cos_y)
        found = None
        if alpha > 1:
            found = search(unit, labels, cos_y.float(), prototypes, *parameters)
        scored = exact if alpha > 1 else unit
        z_y = cos_y * scale
        if found is not None:
            candidates = refined(exact, *found, prototypes, alpha, scale)
            logits = candidates.cosines * scale
            level = candidate_level(logits, z_y, alpha, -scale * margin)
            p = posterior(logits, level, alpha)
            active = p > 0
            support = active.sum(1)
            total = p.sum(1)
            gap = (p * (candidates.cosines - cos_y.unsqueeze(1)).masked_fill_(~active, 0)).sum(1)
        else:
            level = dense_level(scored, labels, cos_y, prototypes, *parameters)
            total, gap = torch.zeros_like(level), torch.zeros_like(level)
            support = torch.zeros_like(labels)
            for _, cosines in chunked_cosines(scored, labels, prototypes):
                p = posterior(cosines * scale, level, alpha)
                total, support = total + p.sum(1), support + (p > 0).sum(1)
                gap = gap + (p * (cosines - cos_y.unsqueeze(1)).clamp_(min=-3)).sum(1)
        measure = uniform_measure(z_y, alpha, -scale * margin)
        solution = fenchel_young(measure, z_y, level, total, gap * scale)
        loss, p_y = solution.loss.float(), solution.target_posterior.float()
        inverse_total = solution.inverse_total
        g_y = (solution.residual * slope).float()
        support = support + (p_y > 0)
        if found is not None:
            samples, place = active.nonzero(as_tuple=True)
            flat = samples * active.shape[1] + place
            p = (p.view(-1)[flat] * inverse_total[samples]).float()
            rows = candidates.classes.view(-1)[flat]
            # the target is an entry like the others
            ctx.entries = (
                torch.cat([samples, everyone]),
                torch.cat([rows, labels]),
                torch.cat([p, g_y]),
            )
        else:
            ctx.entries = None
        ctx.save_for_backward(unit, scored, labels, level, inverse_total, g_y)
        ctx.prototypes, ctx.parameters = prototypes, parameters
        ctx.key = weight._version
        ctx.weight = weight
        ctx.mark_non_differentiable(p_y, support)
        return loss, p_y, support

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        if ctx.weight._version != ctx.key:
            raise RuntimeError(
                "the prototypes were changed between the forward and the backward of QMarginHead"
            )
        unit = ctx.saved_tensors[0]
        with torch.autocast(unit.device.type, enabled=False):
            grads = (_sparse_backward if ctx.entries is not None else _dense_backward)(
                ctx, grad_loss * ctx.parameters[1]
            )
        return *grads, None, None, None, None, None


def _sparse_backward(ctx, scale: Tensor) -> tuple[Tensor | None, Tensor | None]:
    unit = ctx.saved_tensors[0]
    samples, classes, g = ctx.entries
    weight, inverse_norm = ctx.prototypes.weight, ctx.prototypes.inverse_norm
    g = g * scale[samples]
    keep = (g != 0).nonzero().squeeze(1)
    samples, classes, g = samples[keep], classes[keep], g[keep]
    grad_unit = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_unit = torch.zeros_like(unit)
        for part in torch.arange(keep.numel(), device=unit.device).split(_ROWS_AT_ONCE):
            rows = weight.index_select(0, classes[part])
            rows.mul_((g[part] * inverse_norm[classes[part]]).unsqueeze(1))
            grad_unit.index_add_(0, samples[part], rows)
    if ctx.needs_input_grad[1]:
        rows, slot = torch.unique(classes, return_inverse=True)
        values = unit.new_zeros(rows.numel(), unit.shape[1])
        for part in torch.arange(keep.numel(), device=unit.device).split(_ROWS_AT_ONCE):
            values.index_add_(0, slot[part], unit[samples[part]] * g[part].unsqueeze(1))
        for start in range(0, rows.numel(), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            _project(values[part], ctx.prototypes.unit(rows[part]), inverse_norm[rows[part]])
        grad_weight = torch.sparse_coo_tensor(
            rows.unsqueeze(0), values, weight.shape, is_coalesced=True, check_invariants=False
        )
    return grad_unit, grad_weight


def _project(grad: Tensor, unit: Tensor, inverse_norm: Tensor) -> None:
    """Gradient by the unit rows to gradient by the rows, in place."""
    radial = torch.linalg.vecdot(grad, unit).unsqueeze(1)
    grad.sub_(unit.mul_(radial)).mul_(inverse_norm.unsqueeze(1))


def _dense_backward(ctx, scale: Tensor) -> tuple[Tensor | None, Tensor | None]:
    unit, scored, labels, level, inverse_total, g_y = ctx.saved_tensors
    alpha, logit_scale, _ = ctx.parameters
    prototypes = ctx.prototypes
    grad_unit = torch.zeros_like(unit) if ctx.needs_input_grad[0] else None
    grad_weight = torch.empty_like(prototypes.weight) if ctx.needs_input_grad[1] else None
    everyone = torch.arange(labels.numel(), device=labels.device)
    for rows, cosines in chunked_cosines(scored, labels, prototypes):
        g = posterior(cosines * logit_scale, level, alpha)
        g = (g * inverse_total.unsqueeze(1)).float()
        inside = (labels >= rows.start) & (labels < rows.stop)
        place = (labels - rows.start).clamp(0, g.shape[1] - 1)
        g[everyone, place] += torch.where(inside, g_y, 0)
        g *= scale.unsqueeze(1)
        directions = prototypes.unit(rows)
        if grad_unit is not None:
            grad_unit.addmm_(g, directions)
        if grad_weight is not None:
            chunk = torch.mm(g.T, unit, out=grad_weight[rows])
            _project(chunk, directions, prototypes.inverse_norm[rows])
    return grad_unit, grad_weight
