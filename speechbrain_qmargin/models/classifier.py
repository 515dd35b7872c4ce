"""SpeechBrain's cosine classifier with sub-centres: several prototypes of each class."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from speechbrain.lobes.models.ECAPA_TDNN import Classifier
from torch import Tensor, nn

__all__ = ["CosineClassifier", "prototypes_per_class"]


@runtime_checkable
class _Subcentred(Protocol):
    """A classifier that may have several prototypes of each class."""

    subcentres: int


def prototypes_per_class(classifier: nn.Module) -> int:
    """How many a class has; one, as in SpeechBrain's ``Classifier``, if nothing is said.

    >>> prototypes_per_class(Classifier(4, out_neurons=10))
    1
    """
    return classifier.subcentres if isinstance(classifier, _Subcentred) else 1


class CosineClassifier(Classifier):
    """SpeechBrain's ``Classifier``, whose classes may have several prototypes each.

    The cosine of a class is that of its nearest prototype: the sub-centres of Deng et al., ECCV
    2020, for any loss on cosines. With one prototype it is SpeechBrain's, weights and numbers
    included; :class:`~speechbrain_qmargin.head.QMarginHead` has the same option. Under autocast it
    stays in float32, as that head and arcface_torch do: a scale of 64 makes 0.1 in the logit of
    what bf16 rounds off a cosine.

    Parameters
    ----------
    input_size : int
        D of the embeddings.
    out_neurons : int
        Classes, C.
    subcentres : int
        Prototypes of each; they are neighbours in `weight` [C * subcentres, D].
    prototype_std : float, optional
        Standard deviation of their coordinates at the start, which are normal; see
        :class:`~speechbrain_qmargin.head.QMarginHead`. None: SpeechBrain's, uniform by Xavier's
        rule, sqrt(2 / (C * subcentres + D)).

    Raises
    ------
    ValueError
        `subcentres` below 1 or not whole, a `prototype_std` that is not positive.

    Examples
    --------
    >>> classifier = CosineClassifier(input_size=4, out_neurons=10, subcentres=3)
    >>> print(classifier.extra_repr())
    4, 10, subcentres=3
    >>> classifier.weight.shape, classifier(torch.randn(2, 1, 4)).shape
    (torch.Size([30, 4]), torch.Size([2, 1, 10]))
    """

    def __init__(
        self,
        input_size: int,
        out_neurons: int,
        subcentres: int = 1,
        prototype_std: float | None = None,
    ) -> None:
        if int(subcentres) != subcentres or subcentres < 1:
            raise ValueError(f"subcentres must be a whole number >= 1, got {subcentres}")
        super().__init__(input_size, out_neurons=out_neurons * int(subcentres))
        self.subcentres = int(subcentres)
        if prototype_std is not None:
            if not 0 < prototype_std < math.inf:
                raise ValueError(f"prototype_std must be a finite number > 0, got {prototype_std}")
            torch.nn.init.normal_(self.weight, std=float(prototype_std))

    def extra_repr(self) -> str:
        rows, dim = self.weight.shape
        return f"{dim}, {rows // self.subcentres}, subcentres={self.subcentres}"

    def forward(self, x: Tensor) -> Tensor:
        """Cosines [B, 1, C] of embeddings [B, 1, D]; ValueError for another D."""
        if x.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"the classifier takes embeddings of {self.weight.shape[1]} dimensions, got "
                f"{list(x.shape)}: set embedding_dim to what embedding_model gives"
            )
        with torch.autocast(x.device.type, enabled=False):
            cosines = super().forward(x.to(self.weight.dtype))
        if self.subcentres == 1:
            return cosines
        return cosines.unflatten(2, (-1, self.subcentres)).max(3).values
