"""Kaldi's filterbanks on the device, in batches: the features of WeSpeaker's recipes.

They differ from SpeechBrain's ``Fbank``: natural logarithm without a floor relative to the crop's
maximum, pre-emphasis, the mean of each frame removed, frames that lie in the signal alone, and an
FFT of the next power of two.
"""

from __future__ import annotations

import torch
from speechbrain.utils.autocast import fwd_default_precision
from torch import Tensor, nn
from torchaudio.compliance.kaldi import get_mel_banks

__all__ = ["KaldiFbank"]

_WINDOWS = {
    "hamming": lambda length: torch.hamming_window(length, periodic=False),
    "povey": lambda length: torch.hann_window(length, periodic=False).pow(0.85),
}
_LOWEST = 20.0  # Hz
_PRE_EMPHASIS = 0.97


class KaldiFbank(nn.Module):
    """``torchaudio.compliance.kaldi.fbank`` of a batch of waveforms.

    Parameters
    ----------
    sample_rate : int
        Hz.
    n_mels : int
    frame_length, frame_shift : float
        Milliseconds.
    dither : float
        Standard deviation of the noise on every sample of every frame in training mode, on the
        scale of `full_scale`; none in evaluation mode.
    window : str
        ``hamming``, as WeSpeaker; ``povey``, Kaldi's own and 3D-Speaker's.
    full_scale : float
        What a sample of 1 becomes: Kaldi's and WeSpeaker's are 16-bit integers, 3D-Speaker's stay
        in [-1, 1].

    Raises
    ------
    ValueError
        Another window.

    Examples
    --------
    >>> KaldiFbank()(torch.randn(2, 32000)).shape
    torch.Size([2, 198, 80])
    """

    def __init__(
        self,
        sample_rate: int = 16000,
        n_mels: int = 80,
        frame_length: float = 25.0,
        frame_shift: float = 10.0,
        dither: float = 1.0,
        window: str = "hamming",
        full_scale: float = 2.0**15,
    ) -> None:
        super().__init__()
        if window not in _WINDOWS:
            raise ValueError(f"window: {window!r}; choose {', '.join(_WINDOWS)}")
        self.sample_rate, self.dither = sample_rate, dither
        self.window_name, self.full_scale = window, full_scale
        self.length = int(sample_rate * frame_length / 1000)
        self.shift = int(sample_rate * frame_shift / 1000)
        self.n_fft = 1 << (self.length - 1).bit_length()
        banks, _ = get_mel_banks(n_mels, self.n_fft, sample_rate, _LOWEST, 0.0, 100.0, -500.0, 1.0)
        banks = nn.functional.pad(banks, (0, 1)).T.contiguous()  # the Nyquist bin is in none
        # made of the arguments alone: nothing for a checkpoint
        self.window: Tensor
        self.banks: Tensor
        self.register_buffer("window", _WINDOWS[window](self.length), persistent=False)
        self.register_buffer("banks", banks, persistent=False)

    def extra_repr(self) -> str:
        return (
            f"{self.sample_rate} Hz, {self.banks.shape[1]} bins, {self.length} / {self.shift} "
            f"samples, {self.window_name} window, full scale {self.full_scale:g}, dither "
            f"{self.dither:g}"
        )

    @fwd_default_precision(cast_inputs=torch.float32)
    def forward(self, waveforms: Tensor) -> Tensor:
        """Features [B, frames, n_mels], float32, of waveforms [B, time] in [-1, 1].

        There are ``1 + (time - length) // shift`` frames: each lies wholly in the waveform.

        Raises
        ------
        ValueError
            The waveforms are shorter than a frame.
        """
        if waveforms.shape[-1] < self.length:
            raise ValueError(
                f"waveforms: {waveforms.shape[-1]} samples are shorter than a frame of "
                f"{self.length} (at {self.sample_rate} Hz); leave such recordings out"
            )
        frames = (waveforms * self.full_scale).unfold(-1, self.length, self.shift)
        if self.training and self.dither:
            frames = torch.randn_like(frames).mul_(self.dither).add_(frames)
        frames = frames - frames.mean(dim=-1, keepdim=True)
        before = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
        # in place: on a CPU the time is that of new memory
        frames = torch.add(frames, before, alpha=-_PRE_EMPHASIS).mul_(self.window)
        spectrum = torch.fft.rfft(frames, self.n_fft)
        power = spectrum.real.square() + spectrum.imag.square()
        return (power @ self.banks).clamp_min(torch.finfo(torch.float32).eps).log()
