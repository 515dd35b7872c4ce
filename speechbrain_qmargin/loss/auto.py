"""Q-Margin whose parameters follow from the number of classes."""

from __future__ import annotations

from speechbrain_qmargin.loss.parameters import suggest_parameters
from speechbrain_qmargin.loss.qmargin import QMarginLoss

__all__ = ["QMarginAutoLoss"]


class QMarginAutoLoss(QMarginLoss):
    """Q-Margin with alpha, scale and margin of :func:`~speechbrain_qmargin.suggest_parameters`.

    ``--loss qmargin_auto`` in the recipes, which know the arguments.

    Parameters
    ----------
    num_classes : int
    embedding_dim : int
    samples : int, optional
        Training samples over all epochs.
    alpha, scale, margin : float, optional
        Given values are kept; scale and margin are found for the given alpha.

    Attributes
    ----------
    suggestion : Suggestion
        The suggestion with its reasons, which are also logged.

    Raises
    ------
    ValueError
        As :func:`~speechbrain_qmargin.suggest_parameters`.

    Examples
    --------
    >>> QMarginAutoLoss(num_classes=438, samples=28_000)
    QMarginAutoLoss(alpha=1.25, scale=20.0, margin=0.2, hard_margin_cos=0.544)
    """

    sized_by_task = True

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int = 192,
        samples: int | None = None,
        alpha: float | None = None,
        scale: float | None = None,
        margin: float | None = None,
    ) -> None:
        found = suggest_parameters(
            num_classes, embedding_dim=embedding_dim, samples=samples, alpha=alpha
        )
        super().__init__(
            found.alpha,
            found.scale if scale is None else scale,
            found.margin if margin is None else margin,
        )
        self.suggestion = found

    def describe(self) -> str:
        return f"{self!r}\nsuggested: {self.suggestion}"
