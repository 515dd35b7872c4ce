"""Recordings, and folders of them."""

import contextlib
import io
import os
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import numpy as np
import soundfile
import torch

from malformed.kinds import Kind, NotRight, content, cut, error, flip, listed, value
from speechbrain_qmargin.data.audio import read_audio
from speechbrain_qmargin.data.convert import convert_to_flac
from speechbrain_qmargin.data.durations import durations, durations_file
from speechbrain_qmargin.data.folders import audio_files
from speechbrain_qmargin.data.speech import prepare_speech
from speechbrain_qmargin.export.encoder import SpeakerEncoder
from speechbrain_qmargin.export.recordings import extract_recordings, find_recordings

RATE = 16000
MOST_MEMORY = 600_000  # KiB that a small file may take


def voice(seconds: float = 1.0, rate: int = RATE) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    return 0.1 * np.sin(2 * np.pi * 220 * time) * (1 + 0.5 * np.sin(2 * np.pi * 3 * time))


def sound(path: Path, samples: np.ndarray | None = None, rate: int = RATE, **kwargs) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, voice() if samples is None else samples, rate, **kwargs)
    return path


def odd_sample(number: float, where: slice = slice(9000, 9001)) -> np.ndarray:
    samples = voice()
    samples[where] = number
    return samples


def recordings(folder: Path) -> Iterator[Kind]:
    def read(path: Path, *args) -> np.ndarray:
        return read_audio(path, RATE, *args).numpy()

    def bounded(path: Path) -> np.ndarray:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = read(path)[100 : RATE - 100]
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if grown > MOST_MEMORY:
            raise NotRight(f"{grown / 1e6:.1f} GB for a second")
        return found

    whole = slice(None)
    for name, samples in {
        "one NaN": odd_sample(np.nan),
        "one infinity": odd_sample(np.inf),
        "one negative infinity": odd_sample(-np.inf),
        "all NaN": odd_sample(np.nan, whole),
    }.items():
        path = sound(folder / f"{name.replace(' ', '_')}.wav", samples, subtype="FLOAT")
        yield error(name, lambda path=path: read(path), path.name, "not finite")
    path = sound(folder / "loud.wav", 1000 * voice(), subtype="FLOAT")
    quiet = voice() / np.abs(voice()).max()
    yield value("float samples up to 150", lambda: read(path), quiet, 1e-6, "scaled to 1")
    for rate in (15999, 44099, 47999, 22049):
        odd = sound(folder / f"{rate}.wav", voice(1.0, rate), rate)
        wanted = voice()[100 : RATE - 100]
        yield value(f"{rate:,} Hz", lambda odd=odd: bounded(odd), wanted, 2e-3)
    for rate in (1, 999, 4_000_000):
        odd = sound(folder / f"{rate}.wav", voice(), rate)
        yield error(f"{rate:,} Hz", lambda odd=odd: read(odd), odd.name, "samples a second")
    for suffix in ("wav", "flac", "mp3", "ogg"):
        for share in (0.3, 0.9):
            path_ = cut(sound(folder / f"cut{share}.{suffix}", voice(3.0)), share)
            yield error(f"{suffix}, {share:.0%} of it", lambda path=path_: read(path), path_.name)
    for name, data in {
        "empty": b"",
        "text": b"no sound at all",
        "20 bytes of a header": None,
    }.items():
        data = sound(folder / "whole.wav").read_bytes()[:20] if data is None else data
        path_ = content(folder / f"{name.replace(' ', '_')}.wav", data)
        yield error(f"wav, {name}", lambda path=path_: read(path), path_.name)
    data = bytearray((folder / "whole.wav").read_bytes())
    for name, size in (("of 2 GB by its header", 2_000_000_000), ("of a stream", 0xFFFFFFFF)):
        data[40:44] = struct.pack("<I", size)
        path_ = content(folder / f"size{size}.wav", bytes(data))
        if size == 0xFFFFFFFF:
            yield value(f"wav {name}", lambda path=path_: len(read(path)), RATE)
        else:
            yield error(f"wav {name}", lambda path=path_: read(path), path_.name, "truncated")
    none = sound(folder / "none.wav", np.zeros(0))
    yield error("no samples", lambda: read(none), "none.wav", "empty")
    (folder / "folder.wav").mkdir(exist_ok=True)
    yield error("a folder called .wav", lambda: read(folder / "folder.wav"), "folder.wav")
    yield error("a missing file", lambda: read(folder / "gone.wav"), "gone.wav")
    for subtype in ("PCM_U8", "PCM_24", "PCM_32", "DOUBLE"):
        path_ = sound(folder / f"{subtype}.wav", subtype=subtype)
        yield value(f"samples of {subtype}", lambda path=path_: read(path), voice(), 0.01)
    stereo = sound(folder / "stereo.wav", np.stack([voice(), np.zeros(RATE)], 1))
    yield value("two channels", lambda: read(stereo), voice() / 2, 1e-4)


class Stub:
    """Stands for an encoder: the sum and the peak of a recording."""

    sample_rate, device = RATE, "cpu"

    def digest(self) -> str:
        return "stub"

    def __call__(self, waveforms: torch.Tensor) -> torch.Tensor:
        return torch.stack([waveforms.sum(1), waveforms.abs().amax(1)], 1)


def corpora(folder: Path) -> Iterator[Kind]:
    def corpus(name: str) -> Path:
        root = folder / name
        shutil.rmtree(root, ignore_errors=True)
        for speaker in "abcd":
            for number in range(2):
                sound(root / f"wav/{speaker}/s/{number}.wav", voice(0.5) * (1 + number))
        content(root / "trials.txt", "1 c/s/0.wav c/s/1.wav\n0 c/s/0.wav d/s/0.wav\n")
        return root

    def prepared(root: Path):
        found = prepare_speech(
            root, root / "save", verification_file=root / "trials.txt", progress=False
        )
        skipped = root / "save/skipped_audio.txt"
        lines = skipped.read_text() if skipped.is_file() else ""
        return f"{len(found.train)} to train on; {lines}".strip()

    def with_file(name: str, make: Callable[[Path], object]) -> Path:
        root = corpus(name)
        make(root / "wav/a/s")
        return root

    def named(at: Path, name: bytes) -> None:
        Path(os.fsdecode(os.fsencode(at) + b"/" + name)).write_bytes((at / "0.wav").read_bytes())

    def odd(name: str, make: Callable[[Path], object], *words: str) -> Kind:
        root = with_file(name.replace(" ", "_"), make)
        return listed(f"training folder with {name}", lambda: prepared(root), *words, "4 to train")

    yield odd(
        "a dangling link", lambda at: (at / "x.wav").symlink_to("no.wav"), "a link to nothing"
    )
    yield odd("a loop of links", lambda at: (at / "loop").symlink_to(at.parents[1]))
    yield odd("a name that is not UTF-8", lambda at: named(at, b"caf\xe9.wav"), "not UTF-8")
    yield odd("a tab in a name", lambda at: named(at, b"a\tb.wav"), "a tab or a line break")
    yield odd("5 ms of speech", lambda at: sound(at / "x.wav", voice(0.005)), "x.wav")
    yield odd("an empty file", lambda at: content(at / "x.wav", b""), "x.wav")
    yield odd("a truncated file", lambda at: cut(sound(at / "x.flac", voice(2)), 0.3), "x.flac")
    spaced = with_file("spaces", lambda at: None)
    for who in ("speaker 01", "speaker 02"):
        for number in range(2):
            sound(spaced / f"wav/{who}/s 1/u {number}.wav", voice(0.5))
    yield listed("names with spaces", lambda: prepared(spaced), "8 to train")
    yield value(
        "links that lead back", lambda: len(list(audio_files(folder / "a_loop_of_links"))), 8
    )
    nan = corpus("nan_in_test")
    sound(nan / "wav/d/s/0.wav", odd_sample(np.nan), subtype="FLOAT")
    yield error("NaN in a test recording", lambda: prepared(nan), "d/s/0.wav", "not finite")
    for name, line in {
        "targets": "1 c/s/0.wav c/s/1.wav\n",
        "impostors": "0 c/s/0.wav d/s/0.wav\n",
    }.items():
        one = corpus(f"only_{name}")
        content(one / "trials.txt", line)
        yield error(f"a list of {name} alone", lambda one=one: prepared(one), "trials.txt")
    absent = corpus("absent")
    content(absent / "trials.txt", "1 c/s/0.wav c/s/9.wav\n0 c/s/0.wav d/s/0.wav\n")
    yield error("a list with a recording that is not there", lambda: prepared(absent), "c/s/9.wav")

    mixed = corpus("mixed")
    sound(mixed / "wav/a/s/nan.wav", odd_sample(np.nan), subtype="FLOAT")
    cut(sound(mixed / "wav/a/s/cut.flac", voice(2)), 0.3)
    sound(mixed / "wav/a/s/short.wav", voice(0.005))
    sound(mixed / "wav/a/s/silent.wav", np.zeros(RATE))

    def converted() -> str:
        with contextlib.redirect_stderr(io.StringIO()):
            counts = convert_to_flac(mixed, folder / "flac", jobs=1, progress=False)
        return f"{counts} {(folder / 'flac/not_converted.txt').read_text()}"

    yield listed("NaN and a cut file, to FLAC", converted, "a/s/nan.wav", "a/s/cut.flac")

    def extracted() -> str:
        shutil.rmtree(folder / "parts", ignore_errors=True)
        encoder = cast(SpeakerEncoder, Stub())
        found, faults = extract_recordings(encoder, find_recordings(mixed), folder / "parts")
        return f"{len(found)} embedded; {faults}"

    names = ("nan.wav", "cut.flac", "short.wav", "silent.wav")
    yield listed("NaN, cut, 5 ms and silence, embedded", extracted, "8 embedded", *names)
    marker = folder / "MARKER"
    pipe = content(folder / "list.scp", f"a touch {marker} |\n")
    yield error("a command in a list", lambda: find_recordings(pipe), "list.scp:1", unless=marker)
    cached = corpus("cache")
    files = [str(one.path) for one in audio_files(cached / "wav")]
    for name, harm in (("cut off", lambda at: cut(at, 0.5)), ("flipped", flip)):

        def again(harm=harm) -> np.ndarray:
            durations(cached, files, progress=False)
            harm(durations_file(cached))
            return durations(cached, files, progress=False)[0]

        yield value(f"the cache of durations, {name}", again, [0.5] * 8)
