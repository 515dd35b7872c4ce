"""The encoder at a path, whatever it is of."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from speechbrain_qmargin.export.definitions import hyperparams_tree
from speechbrain_qmargin.export.encoder import SpeakerEncoder, load_encoder
from speechbrain_qmargin.export.face_encoder import FaceEncoder, has_faces, load_face_encoder
from speechbrain_qmargin.loss.device import usable_device
from speechbrain_qmargin.published import load_published
from speechbrain_qmargin.training.layout import is_run

__all__ = ["is_exported", "load_any_encoder"]


def load_any_encoder(
    place: str | Path,
    device: str | torch.device = "cpu",
    trust: bool | Collection[str] = False,
    flip: str | None = None,
    say: Callable[[str], Any] | None = None,
) -> SpeakerEncoder | FaceEncoder:
    """The encoder of a run's output folder, of an inference folder or of a published model.

    Parameters
    ----------
    place : path
        What is none of ours is taken for published, see
        :func:`~speechbrain_qmargin.published.load_published`.
    device : str or torch.device
    trust : bool or collection of str
        Of our folders, see :func:`~speechbrain_qmargin.export.encoder.load_encoder`.
    flip : str, optional
        Of :class:`~speechbrain_qmargin.export.face_encoder.FaceEncoder`.
    say : callable, optional
        Gets the summary of a published model.

    Raises
    ------
    FileNotFoundError, ValueError, OSError
        As those functions; a `flip` for speech; a device that is not here.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "hyperparams.yaml").write_text(
    ...     "image_size: 32\\nmodules: {embedding_model: "
    ...     "!new:torch.nn.Conv2d {in_channels: 3, out_channels: 8, kernel_size: 32}}"
    ... )
    >>> torch.save(torch.nn.Conv2d(3, 8, 32).state_dict(), folder / "embedding_model.ckpt")
    >>> encoder = load_any_encoder(folder, flip="concat")
    >>> type(encoder).__name__, encoder(torch.zeros(1, 3, 32, 32)).shape
    ('FaceEncoder', torch.Size([1, 16]))
    """
    folder, device = Path(place), usable_device(device)
    if is_exported(folder):
        tree = hyperparams_tree(folder / "hyperparams.yaml", ("modules",), trust)
        if has_faces(tree):
            return load_face_encoder(folder, device, trust, flip)
        encoder = load_encoder(folder, device, trust)
    else:
        published = load_published(place)
        if say is not None:
            say(published.summary())
        if not published.is_speech:
            return FaceEncoder.of(published, flip).to(device)
        encoder = SpeakerEncoder.of(published).to(device)
    if flip is not None:
        raise ValueError(f"flip: {place} is an encoder of speech, which has no mirror image")
    return encoder


def is_exported(folder: str | Path) -> bool:
    """Whether a folder is a run of ours or an inference folder, and not somebody's publication.

    An inference folder says what it takes, as those that SpeechBrain publishes do not.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "hyperparams.yaml").write_text("pretrained_path: somebody/published-this")
    >>> is_exported(folder)
    False
    >>> _ = (folder / "hyperparams.yaml").write_text("sample_rate: 16000")
    >>> is_exported(folder)
    True
    """
    folder = Path(folder)
    file = folder / "hyperparams.yaml"
    if is_run(folder):
        return True
    if not file.is_file():
        return folder.is_dir() and not any(folder.iterdir())  # it is said what is missing
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return any(line.startswith(("sample_rate:", "image_size:")) for line in lines)
