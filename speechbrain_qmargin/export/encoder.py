"""A trained speaker encoder as one module, from waveforms to embeddings.

A run's ``hyperparams.yaml`` says what its modules are, whatever the model. :func:`load_encoder`
builds them with the weights of a run or of an inference folder.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from speechbrain_qmargin.export.definitions import build, canonical, hyperparams_tree
from speechbrain_qmargin.models.digest import digest_of_modules
from speechbrain_qmargin.published import Published
from speechbrain_qmargin.training.checkpoints import (
    AtomicCheckpointer,
    bare,
    load_average,
    load_weights,
)
from speechbrain_qmargin.training.internals import has_statistics
from speechbrain_qmargin.training.layout import SAVE, encoder_folder, is_run

__all__ = ["PARTS", "SpeakerEncoder", "load_encoder", "load_run"]

logger = logging.getLogger(__name__)

PARTS = ("compute_features", "mean_var_norm", "embedding_model")


class SpeakerEncoder(nn.Module):
    """Waveforms to embeddings, as a Brain evaluates them: features, normalisation, network.

    Parameters
    ----------
    modules : mapping of str to Module
        ``compute_features``, ``mean_var_norm`` and ``embedding_model``; others are ignored, and
        what wraps a module for several processes is taken off.
    sample_rate : int
        Hz, of the waveforms.
    definition : str
        What the modules are, for the digest; what they print of themselves by default, which
        changes with the versions of their packages.

    Raises
    ------
    ValueError
        One of the three is missing.

    Examples
    --------
    >>> from speechbrain.lobes.features import Fbank
    >>> from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
    >>> from speechbrain.processing.features import InputNormalization
    >>> encoder = SpeakerEncoder({
    ...     "compute_features": Fbank(n_mels=20),
    ...     "mean_var_norm": InputNormalization(norm_type="sentence", std_norm=False),
    ...     "embedding_model": ECAPA_TDNN(20, channels=[8] * 4 + [24], lin_neurons=16),
    ... })
    >>> encoder(torch.randn(2, 16000)).shape
    torch.Size([2, 16])
    """

    compute_features: Any
    mean_var_norm: Any
    embedding_model: Any

    def __init__(
        self, modules: Mapping[str, nn.Module], sample_rate: int = 16000, definition: str = ""
    ) -> None:
        super().__init__()
        missing = [name for name in PARTS if name not in modules]
        if missing:
            raise ValueError(f"modules: {', '.join(missing)} wanted for a speaker encoder")
        for name in PARTS:
            self.add_module(name, bare(modules[name]))
        self.sample_rate, self.definition = sample_rate, definition
        self.eval()

    @classmethod
    def of(cls, published: Published) -> SpeakerEncoder:
        """A published network with its features as an encoder.

        Raises
        ------
        ValueError
            A network of faces.
        """
        return cls(published.modules, published.speech().sample_rate, published.definition)

    def forward(self, waveforms: Tensor) -> Tensor:
        """Embeddings [B, D] of waveforms [B, samples] of one length: nothing is padded."""
        return self.embed(self.compute_features(waveforms))

    def embed(self, features: Tensor) -> Tensor:
        """Embeddings [B, D] of features [B, T, n_mels] as ``compute_features`` gives them."""
        return self.embedding_model(self.mean_var_norm(features)).flatten(1)

    def _apply(self, *args: Any, **kwargs: Any) -> SpeakerEncoder:
        """Of `to`, `cuda` and others: what features are normalised with are no buffers."""
        super()._apply(*args, **kwargs)
        if has_statistics(self.mean_var_norm):
            self.mean_var_norm.to(self.device)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.embedding_model.parameters()).device

    def digest(self) -> str:
        """SHA-256 of weights, statistics and the modules' definition.

        Of a run and of its inference folder it is the same. It names the encoder in embeddings,
        thresholds and enrolments.
        """
        return digest_of_modules(self.definition or repr(self), dict(self.named_children()))


def load_encoder(
    folder: str | Path, device: str | torch.device = "cpu", trust: bool | Collection[str] = False
) -> SpeakerEncoder:
    """The encoder of a run's output folder, or of an inference folder.

    A run that has no ``inference/`` yet, one that is still training for instance, is read from its
    checkpoints: the average of the last epochs, as at its end.

    A folder executes nothing: its YAML may name networks, features and the like alone
    (:mod:`~speechbrain_qmargin.training.trust`), and its weights are tensors alone. With `trust`
    the YAML may name any object, or those given by name beside the list's.

    Raises
    ------
    FileNotFoundError
        Neither kind of folder; a run without a finished epoch.
    ValueError
        The YAML would run code, or the weights are not of the modules that it describes.
    OSError
        Damaged weights; with the file.

    Examples
    --------
    One layer for a network, of half a second at 16 kHz.

    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "hyperparams.yaml").write_text(
    ...     "{sample_rate: 16000, modules: {compute_features: !new:torch.nn.Identity {}, "
    ...     "mean_var_norm: !new:torch.nn.Identity {}, "
    ...     "embedding_model: !new:torch.nn.Linear {in_features: 8000, out_features: 4}}}"
    ... )
    >>> torch.save(nn.Linear(8000, 4).state_dict(), folder / "embedding_model.ckpt")
    >>> load_encoder(folder)(torch.zeros(1, 8000)).shape
    torch.Size([1, 4])
    """
    folder = encoder_folder(folder)
    if is_run(folder):
        modules, tree = load_run(folder, PARTS, trust)
        logger.info(f"{folder} has no inference/; the average of its last epochs is taken")
        definition = canonical(tree, PARTS)
        return SpeakerEncoder(modules, tree["sample_rate"], definition).to(device)
    tree = hyperparams_tree(folder / "hyperparams.yaml", trust=trust)
    modules = build(tree, PARTS)
    missing = [name for name in PARTS if name not in modules]
    if missing:
        raise ValueError(f"{folder / 'hyperparams.yaml'}: no {' and no '.join(missing)} in modules")
    if not (folder / "embedding_model.ckpt").is_file():
        raise FileNotFoundError(
            f"{folder}: neither a run (no save/) nor an inference folder (no embedding_model.ckpt)"
        )
    for name in PARTS:
        file = folder / f"{name}.ckpt"
        if file.is_file():
            load_weights(modules[name], file)
    return SpeakerEncoder(modules, tree["sample_rate"], canonical(tree, PARTS)).to(device)


def load_run(
    folder: str | Path, names: Iterable[str], trust: bool | Collection[str] = False
) -> tuple[dict[str, nn.Module], Mapping[str, Any]]:
    """Modules of a run, by name, with the average of its last epochs; the settings it ran with.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "hyperparams.yaml").write_text(
    ...     "{average_checkpoints: 2, modules: {"
    ...     "embedding_model: !new:torch.nn.Linear {in_features: 1, out_features: 1}}}"
    ... )
    >>> network = nn.Linear(1, 1, bias=True)
    >>> checkpointer = AtomicCheckpointer(folder / "save", {"embedding_model": network})
    >>> for weight in (1.0, 3.0):
    ...     _ = nn.init.constant_(network.weight, weight)
    ...     _ = checkpointer.save_checkpoint()
    >>> modules, settings = load_run(folder, ["embedding_model"])
    >>> modules["embedding_model"].weight.item()
    2.0
    """
    folder = Path(folder)
    tree = hyperparams_tree(folder / "hyperparams.yaml", ("modules",), trust)
    checkpointer = AtomicCheckpointer(folder / SAVE)
    modules = build(tree, names)
    load_average(modules, checkpointer, tree.get("average_checkpoints", 1))
    return modules, tree
