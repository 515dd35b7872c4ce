"""One utterance of one synthetic voice: espeak-ng, a room, noise, a microphone.

espeak-ng is GPL-3: it is only used through the optional package ``espeakng-loader`` of the extra
``demo``, imported when there is something to build.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speechbrain_qmargin.synthetic.sentences import SENTENCES
from speechbrain_qmargin.synthetic.speakers import Speaker

__all__ = ["SAMPLE_RATE", "Synthesiser", "babble_voices", "resample", "utterance_samples"]

SAMPLE_RATE = 16_000

# What makes the task hard or easy. Spreads are standard deviations between speakers (VOICE_*) and
# between sessions of one speaker (SESSION_*). As they are, an ECAPA-TDNN of half a million
# parameters ends at a test EER of 7 % (360 steps of 64 crops of 2 s, CosFace), untrained at 25 %.
VOICE_TRACT = 5.0  # per cent, all formants together (vocal tract length)
VOICE_FORMANT = 6.0  # per cent, each formant frequency on its own
VOICE_HEIGHT = 22.0  # per cent, each formant's height and width
VOICE_PITCH = 3.0  # semitones, base pitch within a register
VOICE_RATE = 18.0  # words per minute
SESSION_TRACT = 0.7
SESSION_FORMANT = 0.7
SESSION_HEIGHT = 4.0
SESSION_PITCH = 1.2
SESSION_RATE = 12.0
SNR = (8.0, 24.0)  # dB, uniform over sessions
REVERBERATION = (0.12, 0.5)  # s, RT60
DIRECT_TO_REVERBERANT = (4.0, 14.0)  # dB
LEVEL = (-40.0, -24.0)  # dB full scale, RMS
DURATION = (2.0, 5.0)  # s


class Synthesiser:
    """espeak-ng through ctypes, with voice descriptions of our own.

    espeak looks variants up in its data folder, so a temporary folder mirrors that by links. Its
    state (oscillator phase, flutter, noise) outlives even espeak_Terminate; a copy of the library
    loaded under another name starts from the beginning, which takes about a millisecond.
    """

    _RATE, _PITCH, _RANGE = 1, 3, 4  # espeak_PARAMETER
    _SYNCHRONOUS, _DONT_EXIT, _UTF8 = 2, 0x8000, 1
    _CALLBACK = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
    )

    def __enter__(self) -> Synthesiser:
        import espeakng_loader

        self._library = Path(espeakng_loader.get_library_path())
        source = Path(espeakng_loader.get_data_path())
        self._temporary = tempfile.TemporaryDirectory(prefix="espeak", ignore_cleanup_errors=True)
        self._home = Path(self._temporary.name)
        for item in source.iterdir():
            if item.name == "voices":
                continue
            try:
                (self._home / item.name).symlink_to(item, target_is_directory=item.is_dir())
            except OSError:  # no right to make links
                copy = shutil.copytree if item.is_dir() else shutil.copyfile
                copy(item, self._home / item.name)
        self._variant = self._home / "voices" / "!v" / "speaker"
        self._variant.parent.mkdir(parents=True)
        self._count = 0
        return self

    def __exit__(self, *_) -> None:
        self._temporary.cleanup()

    def __call__(
        self, text: str, voice: _Voice, language: str, seed: int
    ) -> tuple[np.ndarray, int]:
        """Samples (int16) and their rate."""
        self._variant.write_text(voice.description, encoding="ascii")
        with self._fresh_library() as (library, rate):
            library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
            chunks = []

            def receive(samples, count, _events):
                if samples and count:
                    chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
                return 0

            callback = self._CALLBACK(receive)  # kept alive until espeak is done
            library.espeak_SetSynthCallback(callback)
            if library.espeak_SetVoiceByName(f"{language}+speaker".encode()) != 0:
                raise RuntimeError(f"espeak-ng has no voice for the language {language!r}")
            for parameter, value in (
                (self._RATE, voice.rate),
                (self._PITCH, voice.pitch),
                (self._RANGE, 50),
            ):
                library.espeak_SetParameter(parameter, value, 0)
            content = text.encode() + b"\0"
            library.espeak_Synth(
                content, ctypes.c_size_t(len(content)), 0, 0, 0, self._UTF8, None, None
            )
            library.espeak_Synchronize()
        if not chunks:
            raise RuntimeError(f"espeak-ng gave no samples for {text!r} ({language})")
        return np.concatenate(chunks), rate

    @contextlib.contextmanager
    def _fresh_library(self) -> Iterator[tuple[ctypes.CDLL, int]]:
        """The library in its initial state, and the sample rate of its output."""
        self._count += 1
        copy = self._home / f"{self._count}-{self._library.name}"
        shutil.copyfile(self._library, copy)
        library = ctypes.CDLL(str(copy))
        try:
            rate = library.espeak_Initialize(
                self._SYNCHRONOUS, 0, str(self._home).encode(), self._DONT_EXIT
            )
            if rate <= 0:
                raise RuntimeError(f"espeak-ng cannot read its data below {self._home}")
            yield library, rate
        finally:
            import _ctypes

            library.espeak_Terminate()
            unload = "dlclose" if hasattr(_ctypes, "dlclose") else "FreeLibrary"  # of Windows
            getattr(_ctypes, unload)(library._handle)
            copy.unlink()


@dataclass(frozen=True)
class _Voice:
    description: str  # espeak's voice variant file
    pitch: int  # espeak's pitch parameter, 0 to 99
    rate: int  # words per minute


def _voice(speaker: Speaker, session: int, rng: np.random.Generator) -> _Voice:
    """The speaker's voice in this session; `rng` moves pitch and rate of the utterance."""
    own = np.random.default_rng((*speaker.key, 0))
    now = np.random.default_rng((*speaker.key, session, 0))
    high = speaker.register == "high"

    tract = own.normal(112 if high else 98, VOICE_TRACT) + now.normal(0, SESSION_TRACT)
    frequency = tract + own.normal(0, VOICE_FORMANT, 9) + now.normal(0, SESSION_FORMANT, 9)
    shape = own.normal(100, VOICE_HEIGHT, (2, 9)) + now.normal(0, SESSION_HEIGHT, (2, 9))
    shape = np.clip(shape, 50, 160)
    semitones = own.normal(0, VOICE_PITCH) + now.normal(0, SESSION_PITCH)
    base = (180 if high else 100) * 2 ** (semitones / 12)
    top = base * own.uniform(1.25, 1.6)
    words = own.normal(165, VOICE_RATE) + now.normal(0, SESSION_RATE)
    lines = [
        "language variant",
        "name speaker",
        f"gender {'female' if high else 'male'}",
        f"pitch {base:.0f} {top:.0f}",
        f"flutter {own.integers(0, 12)}",
        f"roughness {own.integers(0, 5)}",
        f"voicing {own.integers(75, 121)}",
        "breath 0 " + " ".join(str(own.integers(0, 8)) for _ in range(7)),
        *(f"formant {i} {frequency[i]:.0f} {shape[0, i]:.0f} {shape[1, i]:.0f}" for i in range(9)),
    ]
    return _Voice(
        "\n".join(lines) + "\n",
        pitch=int(np.clip(rng.normal(50, 4), 30, 70)),
        rate=int(np.clip(words + rng.normal(0, 5), 110, 240)),
    )


def _text(language: str, rng: np.random.Generator, parts: int) -> str:
    """`parts` different sentences, then a number or four digits."""
    sentences = [SENTENCES[language][i] for i in rng.permutation(len(SENTENCES[language]))[:parts]]
    if rng.random() < 0.5:
        sentences.append(f"{rng.integers(20, 10_000)}.")
    else:
        sentences.append(" ".join(str(d) for d in rng.integers(0, 10, 4)) + ".")
    return " ".join(sentences)


def utterance_samples(
    synthesiser: Synthesiser,
    speaker: Speaker,
    session: int,
    utterance: int,
    babble: np.ndarray,
) -> np.ndarray:
    """Samples (float64, below 1) of one utterance as the microphone has it.

    Parameters
    ----------
    synthesiser : Synthesiser
    speaker : Speaker
    session, utterance : int
        Of the speaker and of the session, from 1.
    babble : float array [8, samples]
        Of :func:`babble_voices`.

    Raises
    ------
    RuntimeError
        espeak-ng said nothing, or too little.
    """
    rng = np.random.default_rng((*speaker.key, session, utterance))
    voice = _voice(speaker, session, rng)
    text_seed = int(rng.integers(2**31))
    shortest, longest = (int(seconds * SAMPLE_RATE) for seconds in DURATION)
    for parts in range(1, 8):
        text = _text(speaker.language, np.random.default_rng(text_seed), parts)
        raw, rate = synthesiser(text, voice, speaker.language, text_seed)
        if len(raw) * SAMPLE_RATE >= shortest * rate:
            break
    speech = resample(np.divide(raw, 32768), rate)[: int(rng.uniform(0.5, 1) * longest)]
    if len(speech) < shortest:
        raise RuntimeError(f"espeak-ng spoke for less than {DURATION[0]} s: {text!r}")
    speech[-160:] *= np.linspace(1, 0, 160)

    place = np.random.default_rng((*speaker.key, session, 0, 1))
    speech = _convolve(speech, _room(place))
    kind = place.choice(["white", "pink", "babble"])
    snr = place.uniform(*SNR) + rng.normal(0, 1)
    noise = _noise(kind, len(speech), babble, rng)
    mixed = speech + noise * _rms(speech) / _rms(noise) * 10 ** (-snr / 20)
    mixed = _microphone(mixed, place)
    level = place.uniform(*LEVEL) + rng.normal(0, 1)
    mixed *= 10 ** (level / 20) / _rms(mixed)
    return mixed * min(1, 0.99 / np.abs(mixed).max())


def babble_voices(synthesiser: Synthesiser, seed: int) -> np.ndarray:
    """Bystanders [8, samples], speakers of no split, one per language; background chatter."""
    tracks = []
    for i, language in enumerate(SENTENCES):
        bystander = Speaker("", "", language, ("high", "low")[i % 2], (seed, 98, i))
        rng = np.random.default_rng(bystander.key)
        text = _text(language, rng, 6)
        samples, rate = synthesiser(text, _voice(bystander, 1, rng), language, seed)
        track = resample(samples / 32768, rate)
        tracks.append(np.resize(track / _rms(track), 10 * SAMPLE_RATE))
    return np.stack(tracks)


def _noise(kind: str, length: int, babble: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if kind == "babble":
        chosen = rng.permutation(len(babble))[:5]
        shifts = rng.integers(0, babble.shape[1], len(chosen))
        talk = np.zeros(length)
        for i, shift in zip(chosen, shifts, strict=True):
            talk += np.roll(babble[i], shift)[:length]
        return talk
    white = rng.standard_normal(length)
    if kind == "white":
        return white
    spectrum = np.fft.rfft(white)
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    spectrum[0] = 0
    return np.fft.irfft(spectrum, length)


def _room(rng: np.random.Generator) -> np.ndarray:
    """Impulse response: the direct path, then noise that decays by 60 dB in the room's RT60."""
    rt60 = rng.uniform(*REVERBERATION)
    ratio = rng.uniform(*DIRECT_TO_REVERBERANT)
    time = np.arange(int(rt60 * SAMPLE_RATE)) / SAMPLE_RATE
    tail = rng.standard_normal(len(time)) * 10 ** (-3 * time / rt60)
    gap = int(rng.uniform(0.001, 0.01) * SAMPLE_RATE)  # to the first reflection
    tail[:gap] = 0
    tail *= 10 ** (-ratio / 20) / np.sqrt(np.sum(tail**2))
    tail[0] = 1
    return tail


def _microphone(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A mild channel: spectral tilt, one broad resonance, and soft band edges."""
    frequency = np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE)
    octaves = np.log2(np.maximum(frequency, 20) / 1000)
    gain = rng.normal(0, 1.0) * octaves  # dB
    gain = gain + rng.normal(0, 3) * np.exp(-(((octaves - rng.uniform(-2, 2)) / 0.7) ** 2))
    low, high = rng.uniform(50, 250), rng.uniform(3800, 7800)
    response = 10 ** (gain / 20)
    response /= np.sqrt(1 + (low / np.maximum(frequency, 1)) ** 4)
    response /= np.sqrt(1 + (frequency / high) ** 8)
    return np.fft.irfft(np.fft.rfft(samples) * response, len(samples))


def _convolve(samples: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Convolution cut to the length of `samples`."""
    length = _even_length(len(samples) + len(response), 1024)
    product = np.fft.rfft(samples, length) * np.fft.rfft(response, length)
    return np.fft.irfft(product, length)[: len(samples)]


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """To SAMPLE_RATE by cutting the spectrum; the end is padded, so that nothing wraps around.

    Parameters
    ----------
    samples : float array [N]
    rate : int
        Of `samples`, in Hz.

    Returns
    -------
    float64 array [N * SAMPLE_RATE // rate]

    Examples
    --------
    >>> tone = np.sin(2 * np.pi * 100 * np.arange(8000) / 8000)  # a second of 100 Hz
    >>> twice = resample(tone, 8000)
    >>> len(twice), np.allclose(twice[::2], tone)
    (16000, True)
    """
    common = np.gcd(rate, SAMPLE_RATE)
    up, down = SAMPLE_RATE // common, rate // common
    before = _even_length(len(samples) + rate // 10, 2 * down)
    after = before // down * up
    spectrum = np.fft.rfft(samples, before)
    bins = after // 2 + 1
    spectrum = np.pad(spectrum[:bins], (0, max(0, bins - len(spectrum))))
    return np.fft.irfft(spectrum, after)[: len(samples) * up // down] * (after / before)


def _even_length(least: int, multiple: int) -> int:
    return -(-least // multiple) * multiple


def _rms(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(samples**2))) or 1.0
