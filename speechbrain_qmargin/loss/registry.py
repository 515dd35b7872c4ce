"""The losses as modules, in the form SpeechBrain calls them.

One class, :class:`QMarginLoss`, is the whole family; its subclasses only carry other defaults, so
that ``!new:speechbrain_qmargin.CosFaceLoss`` is a right choice without arguments (SpeechBrain's
command line cannot pass any). :func:`make_loss` selects one by name.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from torch import Tensor, nn

from speechbrain_qmargin.loss.functional import (
    QMarginStats,
    check_loss_parameters,
    hard_margin,
    margin_for,
    q_margin_loss,
)

__all__ = [
    "LOSSES",
    "CosFaceLoss",
    "EntmaxLoss",
    "QMarginFaceLoss",
    "QMarginLoss",
    "SparsemaxLoss",
    "loss_parameter",
    "make_loss",
    "set_loss_parameters",
]


logger = logging.getLogger(__name__)

# Of large-margin fine-tuning. Q-Margin's is the lead in cosine beyond which a sample rests: 0.5 as
# a margin m would ask for more than two cosines can differ by
_LARGE_MARGIN, _LARGE_LEAD = 0.5, 0.9


class QMarginLoss(nn.Module):
    r"""Q-Margin (arXiv 2606.31664) on the cosines of a classifier: SpeechBrain's ``compute_cost``.

    The defaults are the ones for VoxCeleb's 5,994 speakers; with millions of faces see
    :class:`QMarginFaceLoss`. Fewer classes want a larger alpha, a larger alpha a smaller scale:
    the printed `hard_margin_cos`, the cosine lead at which a sample stops training, should stay
    near 0.5 to 0.6. The module has no parameters and no state; it need not be in `modules` or in
    the checkpointer.

    Under ``torch.compile`` loss and gradient stay the same and the checks of values are skipped.
    CUDA tensors, and alpha = 1, give one whole graph; on the CPU it breaks where the solver asks
    whether it has converged, and nothing is gained.

    Parameters
    ----------
    alpha : float, >= 1
        Order of the divergence. 1 is CosFace's cross-entropy.
    scale : float, > 0
        Scale s of the cosines.
    margin : float, >= 0
        Margin m, in cosine: the target's reference measure is ``exp(-s m)``.

    Raises
    ------
    ValueError
        Parameters outside their range, or so large that the loss overflows float32.

    Examples
    --------
    >>> import torch
    >>> loss_fn = QMarginLoss()
    >>> loss_fn
    QMarginLoss(alpha=1.5, scale=10.0, margin=0.2, hard_margin_cos=0.544)
    >>> outputs = torch.tensor([[[0.6, 0.1, 0.0]], [[0.2, 0.5, 0.4]]])      # [B, 1, C]
    >>> targets = torch.tensor([[0], [1]])                                  # [B, 1]
    >>> loss_fn(outputs, targets)
    tensor(0.7801)

    In a SpeechBrain recipe::

        compute_cost: !new:speechbrain_qmargin.QMarginLoss
            alpha: 1.5
            scale: 10
            margin: 0.2
    """

    def __init__(self, alpha: float = 1.5, scale: float = 10.0, margin: float = 0.2) -> None:
        super().__init__()
        check_loss_parameters(alpha, scale, margin)
        exponent = (alpha - 1) * scale * margin
        if exponent > 80:
            raise ValueError(
                f"(alpha - 1) * scale * margin = {exponent:.3g} > 80: the loss overflows float32, "
                f"and its hard margin, {hard_margin(alpha, scale, margin):.3g}, is beyond any "
                "cosine. Lower alpha, scale or margin"
            )
        self.alpha, self.scale, self.margin = float(alpha), float(scale), float(margin)

    def forward(self, outputs: Tensor, targets: Tensor, length: Tensor | None = None) -> Tensor:
        """Mean loss of a batch.

        Parameters
        ----------
        outputs : Tensor, [B, C] or [B, 1, C]
            Cosines; or the training output of a sparse head, which is evaluated without logits.
        targets : Tensor, [B] or [B, 1], integer
            Labels in [0, C).
        length : ignored
            SpeechBrain passes relative lengths to every loss; one embedding has none.

        Returns
        -------
        Tensor
            Scalar, float32 (float64 for float64 input).
        """
        return self._evaluate(outputs, targets, return_stats=False)

    def with_stats(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, QMarginStats]:
        """:meth:`forward` and the batch's :class:`QMarginStats`."""
        return self._evaluate(outputs, targets, return_stats=True)

    def _evaluate(self, outputs, targets, return_stats):
        if targets.ndim == 2 and targets.shape[1] == 1:
            targets = targets.squeeze(1)
        parameters = (self.alpha, self.scale, self.margin)
        if isinstance(outputs, Tensor):
            if outputs.ndim == 3 and outputs.shape[1] == 1:
                outputs = outputs.squeeze(1)
            return q_margin_loss(outputs, targets, *parameters, return_stats=return_stats)
        if hasattr(outputs, "q_margin_loss"):
            return outputs.q_margin_loss(targets, *parameters, return_stats=return_stats)
        raise TypeError(
            f"{type(self).__name__} takes cosines [B, 1, C] or a sparse head's training output, "
            f"got {type(outputs).__name__}"
        )

    def extra_repr(self) -> str:
        reach = hard_margin(self.alpha, self.scale, self.margin)
        return (
            f"alpha={self.alpha:g}, scale={self.scale}, margin={self.margin:.3g}, "
            f"hard_margin_cos={reach:.3g}"
        )


class QMarginFaceLoss(QMarginLoss):
    """Q-Margin for 1e5 to 1e7 face identities (arXiv 2606.31664, section 4: WebFace42M).

    Examples
    --------
    >>> QMarginFaceLoss()
    QMarginFaceLoss(alpha=1.25, scale=32.0, margin=0.2, hard_margin_cos=0.619)
    """

    def __init__(self, alpha: float = 1.25, scale: float = 32.0, margin: float = 0.2) -> None:
        super().__init__(alpha, scale, margin)


class CosFaceLoss(QMarginLoss):
    """CosFace (AM-softmax): the alpha = 1 member, a cross-entropy with the margin in the target.

    Examples
    --------
    >>> CosFaceLoss()
    CosFaceLoss(alpha=1, scale=32.0, margin=0.2, hard_margin_cos=inf)
    """

    def __init__(self, alpha: float = 1.0, scale: float = 32.0, margin: float = 0.2) -> None:
        super().__init__(alpha, scale, margin)


class EntmaxLoss(QMarginLoss):
    """The alpha-entmax loss (Peters et al. 2019): Q-Margin without a margin.

    Examples
    --------
    >>> EntmaxLoss()
    EntmaxLoss(alpha=1.5, scale=10.0, margin=0, hard_margin_cos=0.2)
    """

    def __init__(self, alpha: float = 1.5, scale: float = 10.0, margin: float = 0.0) -> None:
        super().__init__(alpha, scale, margin)


class SparsemaxLoss(QMarginLoss):
    """The sparsemax loss (Martins & Astudillo 2016): alpha = 2 without a margin.

    Examples
    --------
    >>> SparsemaxLoss()
    SparsemaxLoss(alpha=2, scale=5.0, margin=0, hard_margin_cos=0.2)
    """

    def __init__(self, alpha: float = 2.0, scale: float = 5.0, margin: float = 0.0) -> None:
        super().__init__(alpha, scale, margin)


def _arcface(**given: float) -> nn.Module:
    from speechbrain_qmargin.loss.arcface import (
        ArcFaceLoss,  # SpeechBrain's, not wanted by the others
    )

    return ArcFaceLoss(**given)


LOSSES: dict[str, Callable[..., nn.Module]] = {
    "qmargin": QMarginLoss,
    "qmargin_face": QMarginFaceLoss,
    "cosface": CosFaceLoss,
    "entmax": EntmaxLoss,
    "sparsemax": SparsemaxLoss,
    "arcface": _arcface,
}

# What makes a named member of the family that member
_FIXED = {"cosface": {"alpha": 1}, "entmax": {"margin": 0}, "sparsemax": {"alpha": 2, "margin": 0}}


def make_loss(
    name: str,
    alpha: float | None = None,
    scale: float | None = None,
    margin: float | str | None = None,
) -> nn.Module:
    """A loss of the comparison by name; None keeps that loss's own default.

    ``arcface`` is SpeechBrain's own ``LogSoftmaxWrapper(AdditiveAngularMargin)``, the others are
    :class:`QMarginLoss` at their place in the family.

    A margin of ``"large"`` is for fine-tuning: 0.5 for ArcFace and CosFace, as WeSpeaker; for
    Q-Margin the one whose hard margin is 0.9 in cosine; none for the members without a margin.

    Raises
    ------
    ValueError
        A name not in :data:`LOSSES`, an alpha given to ArcFace, or a value that would make the
        loss another member of the family than its name says.

    Examples
    --------
    >>> make_loss("qmargin", alpha=1.75, scale=5)
    QMarginLoss(alpha=1.75, scale=5.0, margin=0.2, hard_margin_cos=0.565)
    >>> make_loss("qmargin", margin="large")
    QMarginLoss(alpha=1.5, scale=10.0, margin=0.301, hard_margin_cos=0.9)
    """
    if name not in LOSSES:
        raise ValueError(f"loss: unknown name {name!r}; choose one of {', '.join(sorted(LOSSES))}")
    given = {"alpha": alpha, "scale": scale, "margin": margin}
    given = {key: value for key, value in given.items() if value is not None}
    if name == "arcface" and "alpha" in given:
        raise ValueError("loss: arcface has no alpha; leave it out")
    if margin == "large":
        given["margin"] = _large_margin(name, given)
    elif isinstance(margin, str):
        raise ValueError(f"margin: {margin!r}; give a number or large")
    for key, value in _FIXED.get(name, {}).items():
        if given.get(key, value) != value:
            raise ValueError(
                f"loss: {name} is {key} = {value:g}, got {given[key]}; use qmargin for others"
            )
    loss = LOSSES[name](**given)
    if isinstance(loss, QMarginLoss) and loss.alpha > 1:
        lead = hard_margin(loss.alpha, loss.scale, loss.margin)
        if lead > 2:
            logger.warning(
                f"the hard margin of alpha {loss.alpha:g}, scale {loss.scale:g}, margin "
                f"{loss.margin:g} is {lead:.3g}, more than two cosines can differ by: no sample "
                "will be at zero loss"
            )
    return loss


def _large_margin(name: str, given: dict) -> float:
    if "margin" in _FIXED.get(name, {}):
        return _FIXED[name]["margin"]
    own = LOSSES[name](**{key: value for key, value in given.items() if key != "margin"})
    if getattr(own, "alpha", 1) > 1:
        return max(own.margin, margin_for(own.alpha, own.scale, _LARGE_LEAD))
    return _LARGE_MARGIN


def loss_parameter(loss: nn.Module, name: str) -> float:
    """alpha, scale or margin of a loss that :func:`make_loss` made.

    Examples
    --------
    >>> loss_parameter(make_loss("arcface"), "margin")
    0.2
    """
    holder = getattr(loss, "loss_fn", loss)
    if not hasattr(holder, name):
        raise ValueError(f"loss_schedule: {type(holder).__name__} has no {name}")
    return getattr(holder, name)


def set_loss_parameters(loss: nn.Module, **values: float) -> None:
    """Change alpha, scale or margin of a loss that :func:`make_loss` made, between two steps.

    Examples
    --------
    >>> loss = make_loss("qmargin")
    >>> set_loss_parameters(loss, margin=0.1)
    >>> loss
    QMarginLoss(alpha=1.5, scale=10.0, margin=0.1, hard_margin_cos=0.33)
    """
    holder = getattr(loss, "loss_fn", loss)
    current = {name: loss_parameter(loss, name) for name in ("scale", "margin")}
    if isinstance(holder, QMarginLoss):
        check_loss_parameters(**{"alpha": holder.alpha, **current, **values})
    for name, value in values.items():
        setattr(holder, name, value)
    if hasattr(holder, "cos_m"):  # SpeechBrain's ArcFace derives these once, from the margin
        m = holder.margin
        holder.cos_m, holder.sin_m = math.cos(m), math.sin(m)
        holder.th, holder.mm = math.cos(math.pi - m), math.sin(math.pi - m) * m
