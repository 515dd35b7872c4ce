"""KappaFace (Oinar et al. 2023): scattered and rare classes get the larger margin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from speechbrain_qmargin.communicator import Communicator
from speechbrain_qmargin.loss.arcface import angular_margin, check_angle
from speechbrain_qmargin.loss.base import Loss
from speechbrain_qmargin.loss.device import add_rows
from speechbrain_qmargin.loss.interface import Objective, Scores, flat
from speechbrain_qmargin.loss.norms import embeddings_of

__all__ = ["KappaFaceLoss", "concentration"]


def concentration(lengths: Tensor, dim: int) -> Tensor:
    r"""kappa of a von Mises-Fisher distribution from the length r of its samples' mean.

    :math:`r (d - r^2) / (1 - r^2)` (Banerjee et al., JMLR 2005); where that is infinite, as of one
    sample, or r within rounding of 1, the largest of the others.

    Examples
    --------
    >>> concentration(torch.tensor([0.0, 0.5, 1.0]), 512)
    tensor([  0.0000, 341.1667, 341.1667])
    """
    kappa = lengths * (dim - lengths.square()) / (1 - lengths.square())
    finite = lengths < 1 - 1e-6
    most = torch.where(finite, kappa, 0).amax()
    return torch.where(finite, kappa, most)


def _ask_anew(loss: KappaFaceLoss, _: Any) -> None:
    loss._passed = None


class KappaFaceLoss(Loss):
    r"""KappaFace (Oinar, Le and Woo, IEEE Access 2023; arXiv 2201.07394).

    ArcFace with a margin :math:`m \psi_y` for each class:

    .. math:: \psi_c = \gamma (1 - \sigma(T \tilde\kappa_c))
        + (1 - \gamma) \tfrac12 (1 + \cos(\pi n_c / (1.05\, n_{max})))

    with the class's number of items n_c and its concentration :math:`\kappa_c`, standardised over
    the classes, from the mean of its unit embeddings (:func:`concentration`). It is estimated anew
    whenever as many samples have passed as there are items; until the first time
    :math:`\psi = 1`.

    Parameters
    ----------
    counts : sequence of numbers > 0, optional
        n_c. The recipes give those of their training data.
    embedding_dim : int, optional
        d, given by the recipes too.
    scale, margin : float
        64 and, in radians, 0.8, as in the authors' settings.
    temperature, gamma : float
        T and gamma: 0.4 and 0.7, as there.

    Attributes
    ----------
    psi, seen, sums : Tensor, [C], [C] and [C, d]
        The margins' factors; samples since they were found, and the sums of their embeddings:
        buffers, which the recipes save, the same in all processes. The sums take as much memory as
        the prototypes.

    Raises
    ------
    ValueError
        A setting outside its range; `counts` without `embedding_dim`, or not above 0; when it is
        called, no counts, or other classes than there are counts.
    TypeError
        When it is called on cosines alone: it looks at embeddings.

    Notes
    -----
    The authors take the embeddings from a memory of all items or from a second, slowly moving
    encoder; here they are those of the training itself, as they pass. n_c in the mean is the number
    of samples seen, so that its length is never above 1. The formula is that of the authors' code
    (github.com/Leminhbinh0209/KappaFace).

    Examples
    --------
    >>> KappaFaceLoss(counts=[5, 20], embedding_dim=8)
    KappaFaceLoss(scale=64, margin=0.8, temperature=0.4, gamma=0.7)

    Before the first estimate it is ArcFace.

    >>> import torch
    >>> from speechbrain_qmargin import ArcFaceLoss
    >>> from speechbrain_qmargin.loss.dense import scores_of
    >>> loss = KappaFaceLoss(counts=[5, 20], embedding_dim=2)
    >>> cosines, targets = torch.tensor([[0.6, 0.5]]), torch.tensor([0])
    >>> scores = scores_of(cosines, embeddings=torch.tensor([[3.0, 4.0]]))
    >>> loss.psi.tolist()
    [1.0, 1.0]
    >>> torch.isclose(loss(scores, targets), ArcFaceLoss(64.0, 0.8)(cosines, targets))
    tensor(True)
    """

    settings = ("scale", "margin", "temperature", "gamma")
    needs_embeddings = True
    needs_counts = True
    temperature: float
    gamma: float
    counts: Tensor
    psi: Tensor
    seen: Tensor
    sums: Tensor

    def __init__(
        self,
        counts: Sequence[float] | Tensor | None = None,
        embedding_dim: int | None = None,
        scale: float = 64.0,
        margin: float = 0.8,
        temperature: float = 0.4,
        gamma: float = 0.7,
    ) -> None:
        super().__init__(scale=scale, margin=margin, temperature=temperature, gamma=gamma)
        self._known = False
        if counts is not None:
            if embedding_dim is None:
                raise ValueError("embedding_dim: KappaFaceLoss wants it beside counts")
            self.count_classes(counts, embedding_dim)
            self.needs_counts = False

    def check(self, **values: float) -> None:
        super().check(**values)
        check_angle(values["margin"])
        if not 0 <= values["gamma"] <= 1:
            raise ValueError(f"gamma must be in [0, 1], got {values['gamma']}")

    def large_margin(self) -> float:
        """The published margin: there is none for fine-tuning."""
        return 0.8

    def count_classes(self, counts: Sequence[float] | Tensor, embedding_dim: int) -> None:
        found = torch.as_tensor(counts, dtype=torch.float64)
        if found.ndim != 1 or not bool((found > 0).all()):
            raise ValueError("counts must be one number > 0 for each class")
        self.register_buffer("counts", found, persistent=False)
        self.register_buffer("psi", torch.ones_like(found))
        self.register_buffer("seen", torch.zeros_like(found))
        self.register_buffer("sums", torch.zeros(len(found), embedding_dim, dtype=torch.float32))
        self._items, self._known = float(found.sum()), True
        self._passed: float | None = None  # samples since the margins were found
        self.register_load_state_dict_post_hook(_ask_anew)

    def factors(self) -> Tensor:
        """psi [C] from what was seen."""
        lengths = torch.linalg.vector_norm(self.sums.double(), dim=1) / self.seen.clamp(min=1)
        kappa = concentration(lengths, self.sums.shape[1])
        spread = (kappa - kappa.mean()) / kappa.std()
        scattered = 1 - torch.sigmoid(self.temperature * torch.nan_to_num(spread))
        rare = (1 + torch.cos(math.pi * self.counts / (1.05 * self.counts.max()))) / 2
        return self.gamma * scattered + (1 - self.gamma) * rare

    @torch.no_grad()
    def _observe(self, embeddings: Tensor, targets: Tensor) -> None:
        """Take in a batch; one that diverged, or whose labels are wrong, is no measure."""
        unit = F.normalize(embeddings.detach().float(), dim=1)
        unit, targets = Communicator().gather_all(unit, targets)
        if self._passed is None:  # a run begins, or goes on: the host waits for a GPU this once
            self._passed = float(self.seen.sum())
        known = (targets >= 0) & (targets < len(self.counts))
        kept = torch.isfinite(unit).all() & known.all()
        targets = targets.clamp(0, len(self.counts) - 1)
        add_rows(self.sums, targets, torch.where(kept, unit, 0))
        add_rows(self.seen, targets, kept.to(self.seen.dtype).expand(len(unit)))
        self._passed += len(unit)  # at most
        if self._passed < self._items:
            return
        self._passed = float(self.seen.sum())
        if self._passed >= self._items:
            self.psi = self.factors()
            self.seen.zero_()
            self.sums.zero_()
            self._passed = 0.0

    def objective(self, scores: Scores, targets: Tensor) -> Objective:
        embeddings, targets = embeddings_of(self, scores), flat(targets)
        if not self._known:
            raise ValueError(
                "KappaFaceLoss: counts: the number of items of each class is not known; give "
                "counts and embedding_dim, or train in the recipes, which count"
            )
        if len(self.counts) != scores.num_classes:
            raise ValueError(
                f"KappaFaceLoss: counts of {len(self.counts)} classes for {scores.num_classes}"
            )
        self.to(targets.device)
        margins = self.margin * self.psi[targets.clamp(0, scores.num_classes - 1)]
        if self.training:
            self._observe(embeddings, targets)
        return Objective(
            scale=self.scale, move_target=lambda cosines: angular_margin(cosines, margins)
        )
