"""SpeechBrain's x-vector, with a batch normalisation of the embedding if that is wanted."""

from __future__ import annotations

from typing import Any

from speechbrain.lobes.models.Xvector import Xvector as Network
from speechbrain.nnet.normalization import BatchNorm1d

__all__ = ["Xvector"]


class Xvector(Network):
    """SpeechBrain's x-vector; its embedding, a linear layer, all of one sign at first, normalised.

    Without `embedding_norm` it is SpeechBrain's, with the same names of parameters.

    Parameters
    ----------
    in_channels : int
        Bands of the features.
    lin_neurons : int
        Size of the embedding.
    embedding_norm : bool
        Batch normalisation of the embedding, the last of the ``blocks``.
    **others
        As ``speechbrain.lobes.models.Xvector.Xvector``.

    Examples
    --------
    >>> import torch
    >>> network = Xvector(in_channels=24, lin_neurons=8, embedding_norm=True)
    >>> embeddings = network(torch.randn(4, 50, 24)).squeeze(1)
    >>> embeddings.mean(0).abs().max() < 1e-5
    tensor(True)
    """

    def __init__(
        self,
        in_channels: int = 40,
        lin_neurons: int = 512,
        embedding_norm: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(in_channels=in_channels, lin_neurons=lin_neurons, **others)
        if embedding_norm:
            self.blocks.append(BatchNorm1d(input_size=lin_neurons))
