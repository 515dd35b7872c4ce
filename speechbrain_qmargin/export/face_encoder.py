"""A trained face encoder as one module, from aligned images to embeddings."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from speechbrain_qmargin.export.definitions import build, canonical, hyperparams_tree
from speechbrain_qmargin.export.encoder import load_run
from speechbrain_qmargin.faces.pair_sets import FLIPS
from speechbrain_qmargin.models.digest import digest_of_modules
from speechbrain_qmargin.published import Published
from speechbrain_qmargin.training.checkpoints import bare, load_weights
from speechbrain_qmargin.training.layout import encoder_folder, is_run

__all__ = ["FaceEncoder", "has_faces", "load_face_encoder"]

logger = logging.getLogger(__name__)


class FaceEncoder(nn.Module):
    """Aligned images to embeddings, as a Brain evaluates them: an image with its mirror image.

    Parameters
    ----------
    embedding_model : Module
        An :class:`~speechbrain_qmargin.models.ImageEncoder`, or one that gives [B, D]; what wraps
        it for several processes is taken off.
    image_size : int
        Height and width.
    flip : {"sum", "concat", "none"}
        How an image's embedding and its mirror image's become one, see
        :func:`~speechbrain_qmargin.faces.pair_sets.flip_fusion`.
    definition : str
        What the network is, for the digest; what it prints of itself by default.

    Raises
    ------
    ValueError
        Another `flip`.

    Examples
    --------
    >>> from speechbrain_qmargin.models.mobilefacenet import MobileFaceNet
    >>> encoder = FaceEncoder(MobileFaceNet(8, image_size=32), 32)
    >>> encoder(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 8])
    """

    embedding_model: Any

    def __init__(
        self,
        embedding_model: nn.Module,
        image_size: int,
        flip: str = "sum",
        definition: str = "",
    ) -> None:
        super().__init__()
        if flip not in FLIPS:
            raise ValueError(f"flip must be one of {', '.join(FLIPS)}, got {flip!r}")
        self.embedding_model = bare(embedding_model)
        self.image_size, self.flip, self.definition = image_size, flip, definition
        self.eval()

    @classmethod
    def of(cls, published: Published, flip: str | None = None) -> FaceEncoder:
        """A published network as an encoder; `flip` as its toolkit has it, unless given.

        Raises
        ------
        ValueError
            A network of speech.
        """
        given = published.faces()
        return cls(published.encoder, given.image_size, flip or given.flip, published.digest)

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings [B, D] of images [B, 3, image_size, image_size], RGB in [-1, 1]."""
        plain = self.embed(images)
        if self.flip == "none":
            return plain
        mirrored = self.embed(images.flip(-1))
        return plain + mirrored if self.flip == "sum" else torch.cat((plain, mirrored), 1)

    def embed(self, images: Tensor) -> Tensor:
        """As :meth:`forward`, of the images alone, without their mirror images."""
        return self.embedding_model(images).flatten(1)

    @property
    def device(self) -> torch.device:
        return next(self.embedding_model.parameters()).device

    def digest(self) -> str:
        """SHA-256 of weights, the network's definition, `image_size` and `flip`.

        Of a run and of its inference folder it is the same.
        """
        network = self.definition or repr(self.embedding_model)
        definition = f"{network} image_size {self.image_size} flip {self.flip}"
        return digest_of_modules(definition, {"embedding_model": self.embedding_model})


def has_faces(tree: Any) -> bool:
    """Whether a YAML's modules, as :func:`~speechbrain_qmargin.export.definitions.hyperparams_tree`
    reads it, take images.

    Examples
    --------
    >>> has_faces({"image_size": 112, "modules": {"embedding_model": None}})
    True
    >>> has_faces({"sample_rate": 16000, "modules": {"compute_features": None}})
    False
    """
    return "image_size" in tree and "compute_features" not in tree["modules"]


def load_face_encoder(
    folder: str | Path,
    device: str | torch.device = "cpu",
    trust: bool | Collection[str] = False,
    flip: str | None = None,
) -> FaceEncoder:
    """The encoder of a run of ``recipes/face/train.py``, or of its inference folder.

    Parameters
    ----------
    folder : path
        As in :func:`~speechbrain_qmargin.export.encoder.load_encoder`, and so is `trust`.
    flip : str, optional
        Another one than that of the run (its ``test_flip``).

    Raises
    ------
    FileNotFoundError, ValueError, OSError
        As :func:`~speechbrain_qmargin.export.encoder.load_encoder`; a run of speech.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "hyperparams.yaml").write_text(
    ...     "{image_size: 32, modules: {embedding_model: "
    ...     "!new:torch.nn.Conv2d {in_channels: 3, out_channels: 8, kernel_size: 32}}}"
    ... )
    >>> torch.save(nn.Conv2d(3, 8, 32).state_dict(), folder / "embedding_model.ckpt")
    >>> load_face_encoder(folder)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 8])
    """
    folder = encoder_folder(folder)
    file = folder / "hyperparams.yaml"
    tree = hyperparams_tree(file, ("modules",), trust)
    if not has_faces(tree):
        raise ValueError(f"{file}: no encoder of faces (no image_size in it)")
    if "embedding_model" not in tree["modules"]:
        raise ValueError(f"{file}: no embedding_model in modules")
    if is_run(folder):
        model = load_run(folder, ["embedding_model"], trust)[0]["embedding_model"]
        logger.info(f"{folder} has no inference/; the average of its last epochs is taken")
    else:
        weights = folder / "embedding_model.ckpt"
        if not weights.is_file():
            raise FileNotFoundError(
                f"{folder}: neither a run (no save/) nor an inference folder (no {weights.name})"
            )
        model = build(tree, ["embedding_model"])["embedding_model"]
        load_weights(model, weights)
    own = "sum" if tree.get("test_flip", False) else "none"
    definition = canonical(tree, ["embedding_model"])
    return FaceEncoder(model, tree["image_size"], flip or own, definition).to(device)
