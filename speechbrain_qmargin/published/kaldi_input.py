"""Kaldi's filterbanks as published networks take them."""

from __future__ import annotations

from typing import Any

from speechbrain.processing.features import InputNormalization

from speechbrain_qmargin.features import KaldiFbank
from speechbrain_qmargin.published.model import SpeechInput

__all__ = ["kaldi_input"]


def kaldi_input(
    n_mels: int,
    sample_rate: int = 16000,
    window: str = "hamming",
    full_scale: float = 2.0**15,
    dither: float = 1.0,
) -> tuple[SpeechInput, dict[str, Any]]:
    """Filterbanks without their recording's mean; a recipe's settings for them.

    Parameters
    ----------
    n_mels, sample_rate, window, full_scale, dither
        As in :class:`~speechbrain_qmargin.features.KaldiFbank`.

    Examples
    --------
    >>> speech, settings = kaldi_input(80)
    >>> print(speech.summary)
    80 Kaldi filterbanks of 16-bit samples, hamming window, mean of each recording removed; 16000 Hz
    >>> settings
    {'features': 'kaldi', 'n_mels': 80, 'sample_rate': 16000}
    """
    fbank = KaldiFbank(
        sample_rate, n_mels, dither=dither, window=window, full_scale=full_scale
    ).eval()
    norm = InputNormalization(norm_type="sentence", std_norm=False)
    scale = "16-bit" if full_scale == 2.0**15 else "[-1, 1]"
    about = (
        f"{n_mels} Kaldi filterbanks of {scale} samples, {window} window, mean of each recording "
        "removed"
    )
    settings: dict[str, Any] = {"features": "kaldi", "n_mels": n_mels, "sample_rate": sample_rate}
    given = {"fbank_window": window, "fbank_full_scale": full_scale, "fbank_dither": dither}
    usual = {"fbank_window": "hamming", "fbank_full_scale": 2.0**15, "fbank_dither": 1.0}
    settings |= {key: value for key, value in given.items() if value != usual[key]}
    return SpeechInput(fbank, norm.eval(), sample_rate, about), settings
