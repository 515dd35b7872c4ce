"""What a published model is, once it is loaded: its network and all that belongs to it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from speechbrain_qmargin.models.digest import digest_of_modules

__all__ = ["FaceInput", "Published", "SpeechInput", "as_option", "as_options"]


@dataclass(frozen=True)
class SpeechInput:
    """From waveforms to what a speaker network takes.

    Attributes
    ----------
    compute_features : Module
        Waveforms [B, samples] in [-1, 1] to features [B, T, F].
    mean_var_norm : Module
        Their normalisation, SpeechBrain's ``InputNormalization``.
    sample_rate : int
        Hz.
    about : str
        The features in words.

    Examples
    --------
    >>> SpeechInput(nn.Identity(), nn.Identity(), 8000, "the samples themselves").summary
    'the samples themselves; 8000 Hz'
    """

    compute_features: nn.Module
    mean_var_norm: nn.Module
    sample_rate: int
    about: str

    @property
    def summary(self) -> str:
        """One line."""
        return f"{self.about}; {self.sample_rate} Hz"


@dataclass(frozen=True)
class FaceInput:
    """From aligned photographs to what a face network takes.

    The encoder itself always takes RGB in [-1, 1], ``(value - 127.5) / 127.5``: the first
    convolution of a network that was trained on BGR has its channels exchanged when it is loaded.

    Attributes
    ----------
    image_size : int
        Height and width of the crop, aligned to ArcFace's five points.
    channels : str
        ``RGB`` or ``BGR``: what it was trained on, and what its own toolkit gives it.
    flip : str
        What its toolkit embeds in a test: ``sum`` of the image and its mirror image.

    Examples
    --------
    >>> FaceInput().summary
    "aligned 112 x 112, RGB in [-1, 1]; tests add the mirror image's"
    """

    image_size: int = 112
    channels: str = "RGB"
    flip: str = "sum"

    @property
    def summary(self) -> str:
        """One line."""
        size = f"{self.image_size} x {self.image_size}"
        turned = " (exchanged on loading: the encoder takes RGB)" if self.channels == "BGR" else ""
        return f"aligned {size}, {self.channels} in [-1, 1]{turned}; tests add the mirror image's"


@dataclass(frozen=True)
class Published:
    """A published encoder with its input.

    Attributes
    ----------
    encoder : Module
        In evaluation mode. Speech: an :class:`~speechbrain_qmargin.models.Encoder`. Faces: an
        :class:`~speechbrain_qmargin.models.ImageEncoder`.
    input : SpeechInput or FaceInput
    embedding_dim : int
    format, network : str
        Such as ``WeSpeaker`` and ``ResNet34``.
    path : Path
        The file of weights.
    settings : dict
        The options of a recipe that build this network and its features.
    notes : tuple of str
        What a user should know: what was left out, what the toolkit does otherwise.
    embedding_mean : Tensor [D] or None
        The mean of training embeddings that was published beside the network (SpeechBrain's
        ``mean_var_norm_emb``). It is not subtracted; neither does SpeechBrain when it verifies.

    Examples
    --------
    >>> network = nn.Conv2d(3, 8, kernel_size=32)
    >>> face = Published(network, FaceInput(32), 8, "no toolkit", "one convolution", Path("net.pt"))
    >>> face.faces().image_size, list(face.modules)
    (32, ['embedding_model'])
    >>> face.speech()
    Traceback (most recent call last):
    ValueError: net.pt: no toolkit's one convolution is of faces, not speech
    """

    encoder: nn.Module
    input: SpeechInput | FaceInput
    embedding_dim: int
    format: str
    network: str
    path: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    embedding_mean: Tensor | None = None

    @property
    def is_speech(self) -> bool:
        """Speech; else faces."""
        return isinstance(self.input, SpeechInput)

    def speech(self) -> SpeechInput:
        """The input of a speaker network.

        Raises
        ------
        ValueError
            It is a face network.
        """
        if not isinstance(self.input, SpeechInput):
            raise ValueError(f"{self.path}: {self.format}'s {self.network} is of faces, not speech")
        return self.input

    def faces(self) -> FaceInput:
        """The input of a face network.

        Raises
        ------
        ValueError
            It is a speaker network.
        """
        if not isinstance(self.input, FaceInput):
            raise ValueError(f"{self.path}: {self.format}'s {self.network} is of speech, not faces")
        return self.input

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The encoder and what comes before it, by the names that a Brain gives them."""
        modules = {"embedding_model": self.encoder}
        if isinstance(self.input, SpeechInput):
            modules["compute_features"] = self.input.compute_features
            modules["mean_var_norm"] = self.input.mean_var_norm
        return modules

    @property
    def digest(self) -> str:
        """SHA-256 of the weights and of what the input is; the same wherever the file lies.

        It is a speaker encoder's in embeddings, thresholds and enrolments; a face encoder's says
        beside it how mirror images are joined.
        """
        return digest_of_modules(self.definition, self.modules)

    @property
    def definition(self) -> str:
        """Network and input in words, for the digest."""
        return f"{self.network}: {self.input.summary}"

    @property
    def options(self) -> list[str]:
        """The settings as a recipe's command line, quoted for a shell."""
        return as_options(self.settings)

    def summary(self) -> str:
        """What was loaded, for people: some lines."""
        count = sum(p.numel() for p in self.encoder.parameters())
        lines = [
            f"{self.path}: {self.format}, {self.network}, {count / 1e6:.2f} M parameters, "
            f"{self.embedding_dim} dimensions",
            f"  input: {self.input.summary}",
            f"  digest: {self.digest[:16]}",
        ]
        if self.settings:
            lines.append(f"  in a recipe: {' '.join(self.options)}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def as_option(value: Any) -> str:
    """A value as YAML on one line, as a command line has it.

    Examples
    --------
    >>> as_option("resnet34"), as_option([1, 2]), as_option(None)
    ('resnet34', '[1, 2]', 'null')
    """
    return value if isinstance(value, str) and value.isidentifier() else json.dumps(value)


def as_options(settings: Mapping[str, Any]) -> list[str]:
    """Settings as a recipe's command line, quoted for a shell.

    Examples
    --------
    >>> print(*as_options({"model": "campplus", "layers": [12, 24, 16]}))
    --model=campplus --layers='[12, 24, 16]'
    """
    return [f"--{key}={shlex.quote(as_option(value))}" for key, value in settings.items()]
