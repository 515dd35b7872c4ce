"""Q-Margin with a prior of the classes in its reference measure, for long-tailed corpora."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from speechbrain_qmargin.loss.functional import q_margin_objective
from speechbrain_qmargin.loss.interface import Objective, Scores
from speechbrain_qmargin.loss.qmargin import QMarginLoss

__all__ = ["PriorQMarginLoss"]


class PriorQMarginLoss(QMarginLoss):
    r"""Q-Margin with a prior of the classes in its reference measure, for long-tailed corpora.

    :math:`\log q_j = t (\log n_j - \overline{\log n})` with the number n_j of training items of
    class j, and -s m added for the target: a frequent class is expected, so a rare one must be the
    clearer to be told from it. At alpha = 1 and t = 1 it is the logit adjustment of Menon et al.
    (ICLR 2021). Exact on the sparse head and in shards, as every reference measure is.

    Parameters
    ----------
    counts : sequence of numbers > 0, or Tensor, [C], optional
        The recipes give those of their training data.
    alpha, scale, margin : float
    temperature : float
        t, how strong the prior is: 0 is plain Q-Margin, at 1 q is in proportion to the counts.

    Raises
    ------
    ValueError
        A setting outside its range; counts that are not above 0; when it is called, no counts, or
        other classes than there are counts.

    Notes
    -----
    As a target a class has the margin :math:`m - t (\log n_y - \overline{\log n}) / s`, as a wrong
    class its q. The geometric mean of all q is 1, and not their sum: above alpha = 1 a factor that
    all q have in common is a change of scale and margin, which keep their meaning so.

    Examples
    --------
    >>> loss = PriorQMarginLoss(counts=[100, 10, 1], temperature=1.0)
    >>> loss.log_q
    tensor([ 2.3026,  0.0000, -2.3026])
    >>> loss = PriorQMarginLoss(counts=[3, 1], alpha=1.0, scale=1.0, margin=0.0, temperature=1.0)
    >>> loss(torch.ones(1, 2), torch.tensor([1]))       # a tie: the rare class has p = 1 / 4
    tensor(1.3863)
    """

    settings = ("alpha", "scale", "margin", "temperature")
    needs_counts = True
    temperature: float
    log_counts: Tensor | None

    def __init__(
        self,
        counts: Sequence[float] | Tensor | None = None,
        alpha: float = 1.5,
        scale: float = 10.0,
        margin: float = 0.2,
        temperature: float = 0.5,
    ) -> None:
        super(QMarginLoss, self).__init__(
            alpha=alpha, scale=scale, margin=margin, temperature=temperature
        )
        self.register_buffer("log_counts", None, persistent=False)
        if counts is not None:
            self.count_classes(counts)
            self.needs_counts = False

    def count_classes(
        self, counts: Sequence[float] | Tensor, embedding_dim: int | None = None
    ) -> None:
        found = torch.as_tensor(counts, dtype=torch.float64)
        if found.ndim != 1 or not bool((found > 0).all()):
            raise ValueError("counts must be one number > 0 for each class")
        logs = found.log()
        self.log_counts = (logs - logs.mean()).float()

    def check(self, **values: float) -> None:
        values.pop("temperature")
        super().check(**values)

    @property
    def log_q(self) -> Tensor:
        """[C]."""
        if self.log_counts is None:
            raise ValueError(
                "PriorQMarginLoss: counts: the number of items of each class is not known; give "
                "it, or train in the recipes, which count"
            )
        return self.temperature * self.log_counts

    def objective(self, scores: Scores, targets: Tensor) -> Objective:
        log_q = self.log_q.to(targets.device)
        return q_margin_objective(targets, self.alpha, self.scale, self.margin, log_q)
