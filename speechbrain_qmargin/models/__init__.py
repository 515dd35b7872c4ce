"""Encoders: what one must be, and those that SpeechBrain does not have.

An encoder is any ``torch.nn.Module`` that is called as :class:`Encoder` (speech) or
:class:`ImageEncoder` (faces) says. Nothing is inherited and nothing registered: a recipe takes it
from its YAML, SpeechBrain's own and anybody's alike::

    extends: hparams/qmargin.yaml               # the path from this file
    output_folder: results/xvector
    embedding_dim: 512                          # D, for the classifier
    embedding_model: !new:speechbrain.lobes.models.Xvector.Xvector
        in_channels: !ref <n_mels>
        lin_neurons: !ref <embedding_dim>

As a file in ``hparams/speech/models/`` or ``hparams/face/models/``, without `extends` and
`output_folder`, it is chosen by name: ``--model xvector``. Plain keys of such a file, ``channels:
1024`` beside ``channels: !ref <channels>``, become settings; a size (``hparams/*/sizes/``) may set
those, ``embedding_dim`` included, and leaves alone what the chosen model does not have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Encoder", "ImageEncoder", "check_embeddings"]


class Encoder(Protocol):
    """Features to embeddings.

    Examples
    --------
    >>> import torch
    >>> class Mean(torch.nn.Module):        # of the frames that count
    ...     def forward(self, features, lengths=None):
    ...         whole = torch.ones(len(features)) if lengths is None else lengths
    ...         counts = (whole * features.shape[1]).round().int().tolist()
    ...         means = [item[:count].mean(0) for item, count in zip(features, counts, strict=True)]
    ...         return torch.stack(means).unsqueeze(1)
    >>> features = torch.tensor([[[1.0], [3.0], [0.0]], [[1.0], [3.0], [5.0]]])
    >>> Mean()(features, torch.tensor([2 / 3, 1.0])).tolist()
    [[[2.0]], [[3.0]]]
    """

    def __call__(self, features: Tensor, lengths: Tensor | None = None, /) -> Tensor:
        """Embed a batch.

        Parameters
        ----------
        features : Tensor, [B, T, F]
            As ``compute_features`` and ``mean_var_norm`` give them, float32 (or what autocast
            makes of it): F is `n_mels`, T the longest item's frames.
        lengths : Tensor, [B], optional
            Relative lengths in (0, 1] where items are padded; None where all have length T.
            Frames beyond an item's length must not move its embedding in evaluation mode.

        Returns
        -------
        Tensor, [B, 1, D]
            Not normalised; D is ``embedding_dim``.
        """
        ...


class ImageEncoder(Protocol):
    """Aligned images to embeddings.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> convolution = nn.Conv2d(3, 8, kernel_size=32)       # as large as the image
    >>> network = nn.Sequential(convolution, nn.Flatten(), nn.Unflatten(1, (1, 8)))
    >>> check_embeddings(network(torch.zeros(2, 3, 32, 32)), 2).shape
    torch.Size([2, 1, 8])
    """

    def __call__(self, images: Tensor, /) -> Tensor:
        """Embeddings [B, 1, D] of images [B, 3, image_size, image_size], RGB in [-1, 1]."""
        ...


def check_embeddings(embeddings: Tensor, count: int) -> Tensor:
    """The embeddings of a batch of `count` items, or what is wrong with their shape.

    Raises
    ------
    ValueError
        No tensor [count, 1, D].

    Examples
    --------
    >>> import torch
    >>> check_embeddings(torch.zeros(2, 1, 8), 2).shape
    torch.Size([2, 1, 8])
    >>> check_embeddings(torch.zeros(2, 8), 2)
    Traceback (most recent call last):
    ValueError: embedding_model gave [2, 8] for 2 items; an encoder gives [B, 1, D]
    """
    shape = getattr(embeddings, "shape", None)  # of a tuple, as some toolkits' encoders give, none
    if shape is None or len(shape) != 3 or tuple(shape[:2]) != (count, 1):
        gave = type(embeddings).__name__ if shape is None else list(shape)
        raise ValueError(
            f"embedding_model gave {gave} for {count} items; an encoder gives [B, 1, D]"
        )
    return embeddings
