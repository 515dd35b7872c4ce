"""Feed small malformed inputs to what would meet them, and say what happened.

    python benchmarks/attacks.py OUT

Every input is made here. What is right is one of three: an error (ValueError or OSError) whose
message has the file and the words given, the right value, or a list that names it while the rest
goes on. OUT gets the inputs, ``attacks.json`` and ``attacks.md``, the table of docs/robustness.md.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import pickle
import re
import resource
import shutil
import struct
import sys
import tarfile
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import kaldiio
import numpy as np
import soundfile
import torch
from PIL import Image

from speechbrain_qmargin.data.audio import read_audio
from speechbrain_qmargin.data.convert import convert_to_flac
from speechbrain_qmargin.data.durations import durations, durations_file
from speechbrain_qmargin.data.folders import audio_files
from speechbrain_qmargin.data.images import check_images, read_pixels
from speechbrain_qmargin.data.pickled import read_bin
from speechbrain_qmargin.data.recordio import write_records
from speechbrain_qmargin.data.records import FaceRecords
from speechbrain_qmargin.data.shards import FaceShards
from speechbrain_qmargin.data.speech import prepare_speech
from speechbrain_qmargin.embeddings import cosine_scores, load_embeddings, save_embeddings
from speechbrain_qmargin.export.recordings import extract_recordings, find_recordings
from speechbrain_qmargin.extraction import EmbeddingParts
from speechbrain_qmargin.files import load_record, write_text
from speechbrain_qmargin.scoring.report import evaluate
from speechbrain_qmargin.scoring.score_files import read_score_file
from speechbrain_qmargin.trials import Trials, read_models, read_trials

RATE = 16000
MOST_MEMORY = 600_000  # KiB that a small file may take
ERROR, VALUE, LISTED = "an error with its name", "the right value", "listed, the rest goes on"


class Kind(NamedTuple):
    """A kind of input; `feed` returns what happened, and raises where that is not right."""

    name: str
    expected: str
    feed: Callable[[], str]


class NotRight(Exception):
    """What happened is not what is right."""


def error(name: str, call: Callable, *words: str, unless: Path | None = None) -> Kind:
    """An error that has all the words; the file `unless` must not appear."""

    def feed() -> str:
        try:
            found = call()
        except (ValueError, OSError) as refusal:
            said = str(refusal)
        else:
            raise NotRight(f"accepted: {found!r:.80}")
        if unless is not None and unless.exists():
            unless.unlink()
            raise NotRight(f"code ran, then: {said}")
        if missing := [word for word in words if word not in said]:
            raise NotRight(f"an error without {missing}: {said}")
        return said

    return Kind(name, ERROR, feed)


def value(name: str, call: Callable, wanted, close: float = 0.0, says: str = "") -> Kind:
    """The call's result, to within `close`; `says` must be in the log or the warnings."""

    def feed() -> str:
        with heard() as lines:
            found = np.asarray(call())
        right = np.asarray(wanted)
        same = found.shape == right.shape and (
            np.abs(found.astype(float) - right.astype(float)).max(initial=0) <= close
            if close
            else bool((found == right).all())
        )
        if not same:
            raise NotRight(f"another value: {found!r:.60}, wanted {right!r:.60}")
        return heard_of(lines, says) or "right"

    return Kind(name, VALUE, feed)


def listed(name: str, call: Callable, *words: str) -> Kind:
    """The call ends well, and what it returns, logs or warns has all the words."""

    def feed() -> str:
        with heard() as lines:
            lines += str(call()).splitlines()
        said = [heard_of(lines, word) for word in words]
        return said[0]

    return Kind(name, LISTED, feed)


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """What is logged, warned and printed meanwhile."""
    lines: list[str] = []
    handler, printed = logging.Handler(), io.StringIO()
    handler.emit = lambda record: lines.append(record.getMessage())
    # SpeechBrain keeps its loggers from the root
    loggers = [logging.getLogger(name) for name in (None, "speechbrain_qmargin")]
    for one in loggers:
        one.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(printed):
            warnings.simplefilter("always")
            yield lines
    finally:
        for one in loggers:
            one.removeHandler(handler)
        lines += [str(one.message) for one in caught] + printed.getvalue().splitlines()


def heard_of(lines: list[str], word: str) -> str:
    if not word:
        return ""
    for line in lines:
        if word in line:
            return line
    raise NotRight(f"not said: {word!r}; but {lines!r:.200}")


# ------------------------------------------------------------------------------- recordings


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


def content(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def cut(path: Path, share: float) -> Path:
    return content(path, path.read_bytes()[: round(share * path.stat().st_size)])


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
        found, faults = extract_recordings(Stub(), find_recordings(mixed), folder / "parts")
        return f"{len(found)} embedded; {faults}"

    names = ("nan.wav", "cut.flac", "short.wav", "silent.wav")
    yield listed("NaN, cut, 5 ms and silence, embedded", extracted, "8 embedded", *names)
    marker = folder / "MARKER"
    pipe = content(folder / "list.scp", f"a touch {marker} |\n")
    yield error("a command in a list", lambda: find_recordings(pipe), "list.scp:1", unless=marker)
    cached = corpus("cache")
    files = [str(one.path) for one in audio_files(cached / "wav")]
    for name, harm in (("cut off", lambda at: cut(at, 0.5)), ("flipped", flip)):

        def again(harm=harm) -> list[float]:
            durations(cached, files, progress=False)
            harm(durations_file(cached))
            return durations(cached, files, progress=False)[0]

        yield value(f"the cache of durations, {name}", again, [0.5] * 8)


def flip(path: Path, at: float = 0.5) -> Path:
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 0xFF
    return content(path, bytes(data))


# ------------------------------------------------------------------------------- images

GREY = np.kron(np.random.default_rng(0).integers(10, 240, (6, 5)), np.ones((8, 8))).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **kwargs) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **kwargs)
    return stream.getvalue()


def images(folder: Path) -> Iterator[Kind]:
    grey = Image.fromarray(GREY)
    wide, rgb = GREY.astype(np.uint16), np.stack([GREY] * 3, 2)
    head = b"P5 %d %d " % (GREY.shape[1], GREY.shape[0])
    clear = grey.convert("RGBA")
    clear.putalpha(255)
    right = {
        "16 bits, PNG": encoded(Image.fromarray(wide * 257)),
        "16 bits, PGM": head + b"65535\n" + (wide * 257).astype(">u2").tobytes(),
        "12 bits, PGM": head + b"4095\n" + np.rint(GREY / 255 * 4095).astype(">u2").tobytes(),
        "a palette": encoded(grey.convert("P")),
        "grey with transparency": encoded(clear.convert("LA")),
        "colour with transparency": encoded(clear),
        "CMYK": encoded(grey.convert("RGB").convert("CMYK"), "TIFF"),
        "WebP without loss": encoded(grey.convert("RGB"), "WEBP", lossless=True),
    }
    for name, data in right.items():
        yield value(name, lambda data=data: read_pixels(data), rgb, 1.0)
    turns = (None, None, "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE",
             "ROTATE_90", "TRANSVERSE", "ROTATE_270")  # fmt: skip
    for number, turn in enumerate(turns[1:], 1):
        exif = Image.Exif()
        exif[0x0112] = number
        turned = grey.transpose(Image.Transpose[turn]) if turn else grey
        data = encoded(turned, exif=exif)
        yield value(f"EXIF orientation {number}", lambda data=data: read_pixels(data), rgb)
    png, jpeg = encoded(grey), bytearray(encoded(grey, "JPEG"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", 60000, 60000)
    wrong = {
        "floating_point.tiff": encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
        "32_bits.tiff": encoded(Image.fromarray(GREY.astype(np.int32)), "TIFF"),
        "half.png": png[: len(png) // 2],
        "half.jpg": encoded(grey, "JPEG")[:300],
        "3.6_gigapixels.jpg": bytes(jpeg),
        "empty.png": b"",
        "text.png": b"no image",
        "flipped.png": png[:60] + bytes([png[60] ^ 255]) + png[61:],
    }
    for name, data in wrong.items():
        path = content(folder / name, data)
        yield error(name.replace("_", " "), lambda path=path: read_pixels(path), name)
    one = content(folder / "one_colour.png", encoded(Image.new("L", (40, 48), 255)))
    yield error("one colour", lambda: check_images({"pair 1": one}), "one_colour.png", "equal")


# ------------------------------------------------------------------------------- lists and scores

IDS = [f"id1000{s}/v{k}/{n}" for s in range(4) for k in range(2) for n in range(2)]
PAIRS = [(p, q, p[:7] == q[:7]) for row, p in enumerate(IDS) for q in IDS[row + 1 :]]


def rows(form: str, head: str = "", **words: str) -> str:
    yes, no = words.get("yes", "target"), words.get("no", "nontarget")
    return head + "".join(
        form.format(p=p, q=q, n=int(same), w=yes if same else no, m=p.replace("/", "-"),
                    o=q.replace("/", "-"), s=score) + "\n"
        for (p, q, same), score in zip(PAIRS, SCORES, strict=True)
    )  # fmt: skip


SCORES = (np.random.default_rng(1).normal(size=len(PAIRS)) + [2 * y for *_, y in PAIRS]).tolist()


def lists(folder: Path) -> Iterator[Kind]:
    voxceleb = rows("{n} {p} {q}")
    forms = {
        "VoxCeleb": voxceleb,
        "Kaldi": rows("{p} {q} {w}"),
        "CN-Celeb": rows("{p} {q} {n}"),
        "VOiCES": rows("{p} {q} {w}", yes="tgt", no="imp"),
        "SRE": rows("{p}\t{q}\ta\t{w}", "modelid\tsegmentid\tside\ttargettype\n"),
        "CSV": rows("{p},{q},{n}", "enrol,test,label\n"),
        "CSV in another order": rows("{n},{q},{p}", "label,test,enrol\n"),
        "byte order mark": "\ufeff" + voxceleb,
        "carriage returns": voxceleb.replace("\n", "\r\n"),
        "blank lines": voxceleb.replace("\n", "\n\n"),
    }

    def read(path: Path) -> list[str]:
        trials = read_trials(path)
        labels = trials.labelled().is_target
        return [f"{trials.pair(n)} {labels[n]:d}" for n in range(len(trials))]

    wanted = [f"{p} {q} {int(same)}" for p, q, same in PAIRS]
    for name, text in forms.items():
        path = content(folder / f"{name}.txt", text)
        yield value(f"list as {name}", lambda path=path: read(path), wanted)
    wrong: dict[str, bytes | str] = {
        "an empty list": "",
        "a header alone": "label enrol test\n",
        "a label of 2": "1 a b\n2 a c\n",
        "a row of two columns": "1 a b\n1 a\n",
        "no labels": "a b\nc d\n",
        "two columns of labels": "0 a 1\n1 b 0\n",
        "an empty id": "1\ta\t\n",
        "bytes that are not UTF-8": b"1 a \xff\n",
        "UTF-16": voxceleb.encode("utf-16"),
        "four columns, no header": "a b x 1\n",
    }
    for name, data in wrong.items():
        path = content(folder / f"{name}.txt", data)
        yield error(name, lambda path=path: read(path), path.name)

    def told(path: Path):
        found = read_trials(path).distinct.trials
        return [found.pair(n) for n in range(len(found))], found.speakers()

    both = content(folder / "both_orders.txt", rows("{n} {p} {q}\n{n} {q} {p}"))
    pairs = [f"{p} {q}" for p, q, _ in PAIRS]
    yield value("every pair in both orders", lambda: told(both)[0], pairs, says="the same pair as")
    self_ = content(folder / "self.txt", f"1 {IDS[0]} {IDS[0]}\n{voxceleb}")
    yield value("a recording against itself", lambda: told(self_)[0], pairs, says="with itself")
    against = {
        "contradiction, ids with slashes": ("1 a/1 a/2\n1 a/1 b/1\n", "a/1 b/1"),
        "contradiction, ids without": ("a b target\nb c target\nc a nontarget\n", "c a"),
        "one pair with both labels": ("1 a b\n0 b a\n1 c d\n", "b a"),
    }
    for name, (text, pair) in against.items():
        path = content(folder / f"{name}.txt", text)
        yield error(name, lambda path=path: told(path), path.name, pair)
    for name, text in {
        "a line a model": "m a/1 a/2\n",
        "a line a recording": "m a/1\nm a/2\n",
    }.items():
        path = content(folder / f"{name}.models", text)
        yield value(f"models, {name}", lambda path=path: read_models(path)["m"], ["a/1", "a/2"])
    twice = content(folder / "twice.models", "m a/1\nm a/1\n")
    yield error("a recording twice in a model", lambda: read_models(twice), "twice.models:2", "a/1")
    models = content(folder / "strange.txt", "m0 a/3 target\nm9 b/2 nontarget\n")
    unknown = read_trials(models)
    yield error("a model without recordings", lambda: unknown.with_models({"m0": ["a/1"]}), "m9")


def scores(folder: Path) -> Iterator[Kind]:
    listing = read_trials(content(folder / "trials.txt", rows("{n} {p}.wav {q}.wav")))
    head, bare = "enrolment\ttest\tscore\tlabel\n", "enrolment\ttest\tscore\na\tb\t1\n"
    forms = {
        "ours": rows("{p}.wav\t{q}.wav\t{s!r}\t{n}", head),
        "WeSpeaker": rows("{p}.wav {q}.wav {s!r} {w}"),
        "WeSpeaker with AS-norm, 8 columns": rows("{p}.wav {q}.wav {s!r} {w} 1 2 3 4"),
        "3D-Speaker": rows("{p} {q} {s!r}"),
        "SpeechBrain, 4 columns": rows("{p} {q} {n} {s!r}"),
        "label first, 4 columns": rows("{n} {p} {q} {s!r}"),
        "CSV": rows("{q},{p},{s!r}", "test,enrol,score\n"),
        "byte order mark": "\ufeff" + rows("{p} {q} {s!r}"),
    }
    for name, text in forms.items():
        path = content(folder / f"{name}.score", text)
        yield value(
            f"scores of {name}", lambda path=path: read_score_file(path, listing).scores, SCORES
        )
    wrong = {
        "NaN": ("a b 0.5\na c nan\n", ":2"),
        "infinity": ("a b inf\n", ":1"),
        "a word for a score": ("a b 0.5\na c much\n", ":2"),
        "two scores of a trial": ("a b 0.5\na b 0.6\n", ":2"),
        "label or score, 4 columns": ("a b 1 0\nc d 0 0\n", ":1"),
        "three numbers, 5 columns": ("a b 0.1 0.5 0.6\n", ":1"),
        "a list without scores": ("a b target\nc d nontarget\n", ":1"),
        "an empty file": ("", ""),
        "a broken comment": (f"# speechbrain_qmargin scores {{\n{bare}", ":1"),
        "failures that are none": (
            f'# speechbrain_qmargin scores {{"lost": "7"}}\n{bare}', ":1"),
    }  # fmt: skip
    for name, (text, line) in wrong.items():
        path = content(folder / f"{name}.score", text)
        yield error(
            f"scores with {name}", lambda path=path: read_score_file(path), path.name + line
        )
    few = content(folder / "few.score", "x y 0.5\n")
    yield error(
        "no score of the list", lambda: read_score_file(few, listing), "few.score", "no score"
    )
    other = content(folder / "other.score", rows("{p}.wav {q}.wav {s} {w}", yes="imp", no="tgt"))
    yield error(
        "other labels than the list's", lambda: read_score_file(other, listing), "other.score"
    )

    def figures(path: Path) -> str:
        read = read_score_file(path)
        report = evaluate(read.scores, read.trials.labelled(), fars=(0.1,))
        if any(one.support == "measured" for one in report.figures):
            raise NotRight(f"measured, of {report.num_speakers} speakers")
        return report.table()

    distances = content(
        folder / "distances.tsv", rows("{p}\t{q}\t-{s}\t{n}", head).replace("--", "")
    )
    yield listed("distances", lambda: figures(distances), "the scores seem inverted")
    draw, names = np.random.default_rng(2), [f"s{k}/{n}" for k in range(2) for n in range(30)]
    two = "".join(
        f"{p}\t{q}\t{draw.normal() + 1.4 * (p[:2] == q[:2])}\t{int(p[:2] == q[:2])}\n"
        for row, p in enumerate(names)
        for q in names[row + 1 :]
    )
    path = content(folder / "two_speakers.tsv", head + two)
    yield listed("two speakers: nothing is measured", lambda: figures(path), "unsupported")
    point = content(folder / "point.json", '{"format": "other"}')
    for name, text in {"another": '{"format": "x"}', "cut off": '{"form', "a list": "[]"}.items():
        content(point, text)
        record = error(
            f"threshold file, {name}", lambda: load_record(point, "threshold", dict), "point"
        )
        yield record


# ------------------------------------------------------------------------------- embeddings


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def embeddings(folder: Path) -> Iterator[Kind]:
    matrix = np.random.default_rng(3).normal(size=(len(IDS), 16)).astype(np.float32)
    marker = folder / "MARKER"

    def saved(name: str, ids, rows) -> Path:
        np.savez(folder / name, ids=ids, embeddings=rows)
        return folder / name

    def loaded(path: Path) -> np.ndarray:
        return load_embeddings(path)[IDS[3]]

    whole = saved("whole.npz", np.array(IDS), matrix)
    for name, at in (("half", 0.5), ("nine tenths", 0.9)):
        path = cut(Path(shutil.copy(whole, folder / f"cut_{name}.npz")), at)
        yield error(f"{name} of an npz", lambda path=path: loaded(path), path.name)
    for at in (0.0, 0.05, 0.3, 0.5, 0.7, 0.9):
        path = flip(Path(shutil.copy(whole, folder / f"flip_{at}.npz")), at)
        yield error(f"an npz flipped at {at:.0%}", lambda path=path: loaded(path), path.name)
    bytes_ = saved("bytes.npz", np.array(IDS, "S"), matrix)
    yield value("ids of bytes", lambda: loaded(bytes_), matrix[3])
    long = saved("half.npz", np.array(IDS), (matrix * 100).astype(np.float16))
    unit = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    trials = Trials(IDS, np.array([0]), np.array([3]))
    yield value("float16 of norm 400", lambda: cosine_scores(load_embeddings(long), trials),
                [unit[0] @ unit[3]], 1e-3)  # fmt: skip
    bad = matrix.copy()
    bad[3] = np.nan
    zero = matrix.copy()
    zero[3] = 0
    shapes = {
        "one dimension": (np.array(IDS), matrix[0]),
        "three dimensions": (np.array(IDS), matrix[None]),
        "fewer ids": (np.array(IDS[1:]), matrix),
        "an id twice": (np.array([IDS[0], *IDS[:-1]]), matrix),
        "embeddings of text": (np.array(IDS), matrix.astype(str)),
        "complex numbers": (np.array(IDS), matrix.astype(complex)),
        "ids that are not UTF-8": (np.array([b"\xff"] * len(IDS)), matrix),
        "objects": (np.array([Touch(marker)], object), matrix[:1]),
    }
    for name, (ids, values) in shapes.items():
        path = saved(f"{name.replace(' ', '_')}.npz", ids, values)
        yield error(name, lambda path=path: loaded(path), path.name, unless=marker)
    for name, values in {"NaN": bad, "zero": zero}.items():
        path = saved(f"{name}.npz", np.array(IDS), values)
        scored = lambda path=path: cosine_scores(load_embeddings(path), trials)  # noqa: E731
        yield error(f"an embedding of {name}", scored, IDS[3])
    for name, data in {
        "text": b"no",
        "empty": b"",
        "a pickle": pickle.dumps(Touch(marker)),
    }.items():
        for suffix in ("npz", "npy"):
            path = content(folder / f"{name.replace(' ', '_')}.{suffix}", data)
            yield error(
                f"{name}, .{suffix}", lambda path=path: loaded(path), path.name, unless=marker
            )
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": "<f4", "fortran_order": False, "shape": (10**12, 16)}
    )
    path = content(folder / "claims.npy", stream.getvalue())
    yield error("a npy of 64 TB by its header", lambda: loaded(path), "claims.npy")
    ark = folder / "e.ark"
    kaldiio.save_ark(str(ark), {"a": matrix[0]})
    data = ark.read_bytes()
    arks = {
        "cut off": data[:-4],
        "of 8 GB by its header": data.replace(struct.pack("<i", 16), struct.pack("<i", 2**31 - 1)),
        "of a negative size": data.replace(struct.pack("<i", 16), struct.pack("<i", -1)),
        "of another type": data.replace(b"FV ", b"XV "),
        "with a name that is not UTF-8": b"\xff" + data,
        "text": b"no embeddings",
        "empty": b"",
        "a pickle": b"a PKL" + pickle.dumps(Touch(marker)),
    }
    for name, bytes_of in arks.items():
        path = content(folder / f"{name.replace(' ', '_')}.ark", bytes_of)
        yield error(
            f"Kaldi's ark {name}", lambda path=path: load_embeddings(path), path.name, unless=marker
        )
    for name, line in {"a command": f"a touch {marker} |\n", "no offset": "a e.ark\n",
                       "a missing ark": "a gone.ark:2\n"}.items():  # fmt: skip
        path = content(folder / f"{name.replace(' ', '_')}.scp", line)
        word = "gone.ark" if "missing" in name else path.name
        yield error(
            f"Kaldi's scp with {name}", lambda path=path: load_embeddings(path), word, unless=marker
        )

    def gone_on() -> str:
        shutil.rmtree(folder / "parts", ignore_errors=True)
        parts = EmbeddingParts(folder / "parts", "model")
        for name, row in zip(IDS, matrix, strict=True):
            parts.add(name, row)
        parts.flush()
        cut(next((folder / "parts").glob("*.npz")), 0.5)
        return f"{len(EmbeddingParts(folder / 'parts', 'model').done)} done"

    yield listed("a part of an extraction, cut off", gone_on, "0 done", "damaged")
    save_embeddings(folder / "ours.npz", dict(zip(IDS, matrix, strict=True)))
    yield value("ours, whole", lambda: loaded(folder / "ours.npz"), matrix[3])


# ------------------------------------------------------------------------------- stored faces


def pickles(folder: Path) -> Iterator[Kind]:
    marker = folder / "MARKER"

    def crafted(kind: bytes, state: bytes = b"") -> bytes:
        made = b"cnumpy\ndtype\n(X" + struct.pack("<I", len(kind)) + kind + b"\x89\x88tR" + state
        flag = b"cnumpy.core.multiarray\nscalar\n(" + made + b"U\x08" + b"A" * 8 + b"tR"
        return b"\x80\x02](C\x01aC\x01be](" + flag + b"e\x86."

    pair = [b"one", b"two"]
    wrong = {
        "os.system": pickle.dumps(([Touch(marker)], [True])),
        "os.system, protocol 0": b"cos\nsystem\n(Vtouch '" + bytes(marker) + b"'\ntR.",
        "builtins.eval": b"cbuiltins\neval\n(V1\ntR.",
        "a dtype of objects": crafted(b"O8"),
        "a dtype of objects without its flag": crafted(
            b"V8", b"(K\x03X\x01\0\0\0|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
        ),
        "a dtype of dates": crafted(b"M8[s]"),
        "memory that nobody wrote": (
            b"\x80\x02(]cnumpy\nndarray\n(K\x10\x85X\x02\0\0\0u1tRae]\x88a\x86."
        ),
        "a memo of gigabytes": b"\x80\x02]r\xff\xff\xff\x7f]\x86.",
        "bytes of gigabytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"]\x86.",
        "an object from elsewhere": b"\x80\x02Pid\n.",
        "an extension": b"\x80\x02\x82\x01.",
        "a list in itself": b"\x80\x02]q\x00h\x00a.",
        "cut off": pickle.dumps((pair, [True]))[:-4],
        "empty": b"",
        "text": b"no pickle",
        "three images for a pair": pickle.dumps(([*pair, b"three"], [True])),
        "a flag of 7": pickle.dumps((pair, [7])),
        "images of text": pickle.dumps((["one", "two"], [True])),
    }
    for name, data in wrong.items():
        path = content(folder / f"{name.replace(' ', '_')}.bin", data)
        yield error(name, lambda path=path: read_bin(path), path.name, unless=marker)
    arrays = ([np.frombuffer(one, np.uint8) for one in pair], np.array([True]))
    for protocol in range(6):
        path = content(folder / f"{protocol}.bin", pickle.dumps(arrays, protocol))
        yield value(f"arrays, protocol {protocol}", lambda path=path: read_bin(path)[0], pair)


def stored(folder: Path) -> Iterator[Kind]:
    faces = [encoded(Image.fromarray(np.roll(GREY, n, 0)).convert("RGB")) for n in range(4)]
    labels = [0, 0, 1, 1]

    def records(name: str, harm: Callable[[bytearray, list[int]], object]) -> Path:
        path = folder / f"{name.replace(' ', '_')}.rec"
        write_records(path, faces, labels)
        places = [int(line.split("\t")[1]) for line in path.with_suffix(".idx").open()]
        data = bytearray(path.read_bytes())
        harm(data, places)
        return content(path, bytes(data))

    def read(path: Path) -> str:
        data = FaceRecords(path, 16, progress=False)
        found = [int(data[row]["identity_encoded"]) for row in range(len(data))]
        return f"labels {found} of {data.num_classes} classes"

    def put(place: int, form: str, number: float) -> Callable:
        def harm(data: bytearray, places: list[int]) -> None:
            data[places[2] + place : places[2] + place + 4] = struct.pack(form, number)

        return harm

    for label in (2e9, -1.0, 1.5, np.nan, np.inf):
        path = records(f"label {label:g}", put(12, "<f", label))
        yield listed(
            f"a .rec, label {label:g}", lambda path=path: read(path), "record 2", "of 2 classes"
        )
    path = records(
        "no image", lambda data, at: data.__setitem__(slice(at[2] + 32, at[2] + 40), bytes(8))
    )
    yield listed("a .rec with a broken image", lambda: read(path), "record 2", "of 2 classes")
    claims = records("claims", lambda data, at: data.__setitem__(
        slice(32, 40), struct.pack("<2f", 5, 2**23)))  # fmt: skip
    yield error("a .rec of 8,388,603 identities by its header", lambda: read(claims), "claims.rec")
    alone = records("alone", lambda data, at: None)
    alone.with_suffix(".idx").unlink()
    yield error("a .rec without its .idx", lambda: read(alone), "alone.idx")
    strange = records("strange", lambda data, at: None)
    content(strange.with_suffix(".idx"), "words\n")
    yield error("an .idx of words", lambda: read(strange), "strange.idx")
    elsewhere = records("elsewhere", lambda data, at: None)
    content(elsewhere.with_suffix(".idx"), "".join(f"{n}\t{40 * n + 4}\n" for n in range(5)))
    yield error("an .idx of another file", lambda: read(elsewhere), "elsewhere.rec")

    kept = records("kept", lambda data, at: None)
    read(kept)
    index = Path(f"{kept}.index.npz")
    for at in (0.0, 0.1, 0.3, 0.5, 0.7, 0.99):
        whole = index.read_bytes()

        def damaged(at: float = at, whole: bytes = whole) -> str:
            flip(content(index, whole), at)
            return read(kept)

        right = "labels [0, 0, 1, 1] of 2 classes"
        yield listed(f"the index of a .rec, flipped at {at:.0%}", damaged, right)

    def shard(name: str, members: list[tuple[str, bytes | str]], mode: str = "w") -> Path:
        place = folder / name.replace(" ", "_")
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        with tarfile.open(place / "0.tar", mode) as tar:
            for member_name, data in members:
                member = tarfile.TarInfo(member_name)
                if isinstance(data, str):
                    member.type, member.linkname = data.encode(), "a.png"
                    tar.addfile(member)
                else:
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        return place

    def opened(place: Path) -> str:
        data = FaceShards(place, 16, progress=False)
        found = [int(data[row]["identity_encoded"]) for row in range(len(data))]
        return f"labels {found} of {data.num_classes} classes"

    two: list[tuple[str, bytes | str]]
    two = [("a.png", faces[0]), ("a.cls", b"0"), ("b.png", faces[1]), ("b.cls", b"1")]
    others = {"symbolic link": "2", "hard link": "1", "folder": "5", "device": "3", "pipe": "6"}
    for name, kind in others.items():
        place = shard(name, [*two, ("c.png", kind), ("d.cls", kind)])
        yield listed(
            f"a tar entry, {name}", lambda place=place: opened(place), "0.tar: c.png", "of 2"
        )
    upwards = shard("upwards", [*two, ("../../c.png", faces[0]), ("../../c.cls", b"1")])
    yield listed(
        "a tar entry above the folder: only read", lambda: opened(upwards), "labels [0, 1, 1]"
    )
    for name, text in {"2e9": b"2000000000", "-1": b"-1", "of a word": b"ann", "of 4,000 digits":
                       b"1" * 4000, "2^40": b"%d" % 2**40, "empty": b""}.items():  # fmt: skip
        place = shard(f"label {name}", [*two[:3], ("b.cls", text)])
        yield error(f"a .cls, label {name}", lambda place=place: opened(place), place.name)
    yield error("an image without its .cls", lambda: opened(shard("bare", two[:3])), "0.tar", "b")
    yield error("a compressed tar", lambda: opened(shard("gz", two, "w:gz")), "0.tar")
    half = shard("half", two)
    cut(half / "0.tar", 0.1)
    yield error("a tar cut off", lambda: opened(half), "0.tar")


# ------------------------------------------------------------------------------- runs

NETWORK = """
sample_rate: 16000
compute_features: !new:speechbrain.lobes.features.Fbank
    n_mels: {bands}
mean_var_norm: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
embedding_model: !new:torch.nn.Linear [20, 4]
modules: {{compute_features: !ref <compute_features>, mean_var_norm: !ref <mean_var_norm>,
    embedding_model: !ref <embedding_model>}}
output_folder: {folder}
"""


def runs(folder: Path) -> Iterator[Kind]:
    from speechbrain_qmargin.cli import main
    from speechbrain_qmargin.export.encoder import load_encoder, load_run
    from speechbrain_qmargin.export.inference import export_run
    from speechbrain_qmargin.training.checkpoints import AtomicCheckpointer
    from speechbrain_qmargin.training.config import load_experiment
    from speechbrain_qmargin.training.run_folder import RunFolder
    from speechbrain_qmargin.training.trust import load_checked

    marker = folder / "MARKER"
    shell = f"['touch {marker}']"
    documents = {
        "!apply": f"x: !apply:subprocess.getoutput {shell}",
        "!new": f"x: !new:subprocess.Popen [['touch', '{marker}']]",
        "!name": "x: !name:os.system",
        "!module": "x: !module:os",
        "!include": "x: !include:other.yaml",
        "!applyref": f"x: !applyref:os.system {shell}",
        "a tag within": f"x: {{y: [1, {{z: !apply:os.system {shell}}}]}}",
        "a tag in a key": f"? !apply:os.system {shell}\n: 1",
        "Python's tag": f"x: !!python/object/apply:os.system {shell}",
        "Python's tag in full": f"x: !<tag:yaml.org,2002:python/object/apply:os.system> {shell}",
        "a directive": "%TAG !e! tag:yaml.org,2002:python/object/\n---\nx: !e!apply:os.system "
        + shell,
        "a tuple": f"x: (!!python/object/apply:os.system {shell})",
        "a tuple in quotes": f"x: '(!!python/object/apply:os.system [\"touch {marker}\"])'",
        "a tuple by reference": (
            f"a: '!!python/object/apply:os.system [touch {marker}]'\nx: !ref (<a>)"
        ),
        "an attribute": "a: !new:torch.nn.Identity\nx: !ref <a.__init__>",
        "getattr": "a: !new:torch.nn.Identity\nx: !apply:getattr [!ref <a>, __init__]",
        "os through a module of ours": f"x: !apply:speechbrain_qmargin.files.os.system {shell}",
        "our writer of files": f"x: !apply:speechbrain_qmargin.files.write_text ['{marker}', '']",
        "torch's download": "x: !apply:torch.hub.download_url_to_file [a, b]",
        "SpeechBrain's download": "x: !apply:speechbrain.utils.fetching.fetch [a, b]",
        "SpeechBrain's shell": f"x: !apply:speechbrain.utils.superpowers.run_shell {shell}",
        "a pickle": "x: !apply:torch.load [a]",
        "a loss of its own": "loss: antigravity.fly",
        "a reader of its own": "reader: subprocess.getoutput",
        "no YAML": "x: [1",
    }
    for name, text in documents.items():
        call = lambda text=text: load_checked(text, "run/hyperparams.yaml")  # noqa: E731
        yield error(f"hyperparams.yaml with {name}", call, "run/hyperparams.yaml", unless=marker)

    model = torch.nn.Linear(20, 4)
    run = folder / "run"
    AtomicCheckpointer(run / "save", {"embedding_model": model}).save_checkpoint()
    bands = f"!apply:builtins.eval [\"__import__('pathlib').Path('{marker}').touch() or 20\"]"
    for name in ("hyperparams.yaml", "experiment.yaml"):
        write_text(run / name, NETWORK.format(bands=bands, folder=run))
    inference = folder / "inference"
    inference.mkdir(exist_ok=True)
    shutil.copy(run / "hyperparams.yaml", inference)
    torch.save(model.state_dict(), inference / "embedding_model.ckpt")
    own = folder / "own.yaml"
    write_text(own, "start: !PLACEHOLDER\nextends: <start>/experiment.yaml\n")
    sounds = folder / "list.txt"
    write_text(sounds, f"a {sound(folder / 'a.wav')}\n")
    hparams = Path(__file__).resolve().parent.parent / "hparams"

    def command(*words: object) -> None:
        with contextlib.redirect_stderr(io.StringIO()) as told, heard() as lines:
            code = main([str(word) for word in words])
        if code:
            raise ValueError(told.getvalue() + " ".join(lines))

    doors = {
        "load_encoder": lambda: load_encoder(run),
        "load_encoder, inference folder": lambda: load_encoder(inference),
        "load_run": lambda: load_run(run, ["compute_features"]),
        "export_run": lambda: export_run(run),
        "qmargin export": lambda: command("export", run),
        "qmargin extract": lambda: command("extract", run, sounds, folder / "out.npz"),
        "extends": lambda: load_experiment([str(own), f"--start={run}"]).load(),
        "--pretrained": lambda: load_experiment(
            [str(hparams / "qmargin_lm.yaml"), f"--pretrained={run}"]
        ).load(),
    }
    for name, door in doors.items():
        yield error(f"a run with code, by {name}", door, "would run code", unless=marker)

    def finished():
        experiment = load_experiment([str(hparams / "qmargin.yaml"), f"--output_folder={done}"])
        return RunFolder(experiment).announce_finished()

    done = folder / "done"
    for name, text in {"cut off": '{"settings', "a list": "[]", "empty": ""}.items():
        content(done / "results.json", text)
        experiment = load_experiment([str(hparams / "qmargin.yaml"), f"--output_folder={done}"])
        content(done / "experiment.yaml", experiment.text)
        write_text(done / "results.json", text)
        yield error(f"results.json, {name}", finished, "results.json")
    content(done / "results.json", "{}")
    content(done / "experiment.yaml", "x: [1")
    yield error("experiment.yaml, cut off", finished, "experiment.yaml")


def checkpoints(folder: Path) -> Iterator[Kind]:
    from speechbrain.utils.epoch_loop import EpochCounter

    from speechbrain_qmargin.training.brain import VerificationBrain
    from speechbrain_qmargin.training.checkpoints import AtomicCheckpointer, load_average

    marker = folder / "MARKER"
    payload = torch.nn.Linear(64, 8), EpochCounter(9)
    harms: dict[str, tuple[str, Callable[[Path], object]]] = {
        "weights cut off": ("layer.ckpt", lambda file: cut(file, 0.8)),
        "weights flipped": ("layer.ckpt", flip),
        "weights empty": ("layer.ckpt", lambda file: content(file, b"")),
        "weights of text": ("layer.ckpt", lambda file: content(file, "weights")),
        "weights that run code": ("layer.ckpt", lambda at: torch.save({"w": Touch(marker)}, at)),
        "no weights": ("layer.ckpt", lambda file: file.unlink()),
        "counter empty": ("counter.ckpt", lambda file: content(file, b"")),
        "counter of bytes": ("counter.ckpt", lambda file: content(file, b"\xff\xfe")),
        "CKPT.yaml empty": ("CKPT.yaml", lambda file: content(file, b"")),
        "CKPT.yaml cut off": ("CKPT.yaml", lambda file: content(file, "epoch: [1\n")),
        "CKPT.yaml of bytes": ("CKPT.yaml", lambda file: content(file, b"\0\xff\0")),
        "CKPT.yaml without its time": ("CKPT.yaml", lambda file: content(file, "epoch: 3\n")),
        "CKPT.yaml that runs code": ("CKPT.yaml", lambda file: content(
            file, f"x: !!python/object/apply:os.system ['touch {marker}']\n")),
        "no CKPT.yaml": ("CKPT.yaml", lambda file: file.unlink()),
    }  # fmt: skip
    for name, (file, harm) in harms.items():

        def recovered(
            file: str = file, harm: Callable = harm, place: Path = folder / "newest"
        ) -> str:
            shutil.rmtree(place, ignore_errors=True)
            layer, counter = payload
            saver = AtomicCheckpointer(place, {"layer": layer, "counter": counter})
            for epoch in (1, 2):
                torch.nn.init.constant_(layer.weight, epoch)
                saver.save_checkpoint(meta={"epoch": epoch, "unixtime": epoch})
            harm(sorted(place.glob("CKPT*"))[-1] / file)
            again = AtomicCheckpointer(place, {"layer": layer, "counter": counter})
            found = again.recover_if_possible()
            if marker.exists():
                raise NotRight("code ran")
            return f"epoch {found.meta['epoch'] if found else None} is taken"

        yield listed(
            f"the newest checkpoint, {name}",
            recovered,
            f"{file}",
            "the checkpoint before it is taken",
            "epoch 1 is taken",
        )

    def all_damaged(call: Callable[[AtomicCheckpointer], object]) -> None:
        shutil.rmtree(folder / "all", ignore_errors=True)
        saver = AtomicCheckpointer(folder / "all", {"layer": payload[0]})
        saver.save_checkpoint(meta={"epoch": 1})
        content(next((folder / "all").glob("CKPT*/layer.ckpt")), b"")
        call(saver)

    said = "no checkpoint is whole"
    resume = lambda: all_damaged(lambda saver: saver.recover_if_possible())  # noqa: E731
    yield error("every checkpoint damaged", resume, said, "layer.ckpt")
    average = lambda: all_damaged(lambda saver: load_average({"layer": layer}, saver, 2))  # noqa: E731
    layer = payload[0]
    yield error("every checkpoint damaged, the average", average, said)

    def another_model() -> None:
        shutil.rmtree(folder / "another", ignore_errors=True)
        AtomicCheckpointer(folder / "another", {"layer": payload[0]}).save_checkpoint()
        small = AtomicCheckpointer(folder / "another", {"layer": torch.nn.Linear(2, 2)})
        small.recover_if_possible()

    yield error("a checkpoint of another model", another_model, "layer.ckpt", "size mismatch")
    brain = VerificationBrain.__new__(VerificationBrain)
    brain.hparams = types.SimpleNamespace(output_folder=folder)
    good = ['{"epoch": 1, "seconds": 1}', '{"epoch": 3, "seconds": 1}']
    for name, line in {"an empty line": "", "half a line": '{"epoch": 2, "sec', "a list": "[]",
                       "nothing in it": "{}", "bytes": "\udcff\udcfe"}.items():  # fmt: skip

        def epochs(line: str = line) -> str:
            text = "\n".join([good[0], line, good[1]]).encode("utf-8", "surrogateescape")
            content(folder / "history.jsonl", text)
            return f"epochs {[record['epoch'] for record in brain.history()]}"

        yield listed(f"history.jsonl, {name}", epochs, "history.jsonl:2", "epochs [1, 3]")


# ------------------------------------------------------------------------------- the table

GROUPS: dict[str, Callable[[Path], Iterator[Kind]]] = {
    "recordings": recordings,
    "corpora": corpora,
    "images": images,
    "lists": lists,
    "scores": scores,
    "embeddings": embeddings,
    "pickled verification sets": pickles,
    "stored faces": stored,
    "runs": runs,
    "checkpoints": checkpoints,
}


def attack(out: Path, groups: list[str]) -> list[dict]:
    """What every kind gave: group, kind, expected, happened, ok."""
    kept = os.environ.get("SPEECHBRAIN_QMARGIN_CACHE")
    os.environ["SPEECHBRAIN_QMARGIN_CACHE"] = str(out / "cache")
    results = []
    try:
        for group in groups:
            folder = out / group.replace(" ", "_")
            folder.mkdir(parents=True, exist_ok=True)
            for kind in GROUPS[group](folder):
                try:
                    with heard():
                        happened, ok = kind.feed(), True
                except NotRight as wrong:
                    happened, ok = str(wrong), False
                except Exception as raised:  # a traceback is what must not be
                    happened, ok = f"{type(raised).__name__}: {raised}", False
                happened = " ".join(
                    happened.replace(f"{folder}/", "").replace(f"{out}/", "").split()
                )
                happened = re.sub(r"CKPT\+\S+?(?=/|:| )", "CKPT", happened)
                results.append({"group": group, "kind": kind.name, "expected": kind.expected,
                                "happened": happened, "ok": ok})  # fmt: skip
    finally:
        if kept is None:
            del os.environ["SPEECHBRAIN_QMARGIN_CACHE"]
        else:
            os.environ["SPEECHBRAIN_QMARGIN_CACHE"] = kept
    return results


def table(results: list[dict]) -> str:
    """Markdown: a row a kind."""

    def cell(text: str) -> str:
        text = "".join(c if c.isprintable() else "?" for c in text)
        text = text.replace("`", "'").replace("|", "\\|")
        return f"`{text if len(text) <= 110 else text[:107] + '...'}`"

    lines = []
    for group in dict.fromkeys(one["group"] for one in results):
        lines += [f"### {group.capitalize()}", "", "| input | right is | what happened | |"]
        lines.append("|---|---|---|---|")
        for one in results:
            if one["group"] == group:
                ok = "ok" if one["ok"] else "**NOT OK**"
                name = one["kind"].replace("|", "\\|")
                happened = one["happened"] if one["happened"] == "right" else cell(one["happened"])
                lines.append(f"| {name} | {one['expected']} | {happened} | {ok} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--group", action="append", choices=GROUPS, help="this alone; repeatable")
    args = parser.parse_args()
    results = attack(args.out.resolve(), args.group or list(GROUPS))
    write_text(args.out / "attacks.json", json.dumps(results, indent=1) + "\n")
    write_text(args.out / "attacks.md", table(results))
    bad = [one for one in results if not one["ok"]]
    for one in bad:
        print(f"NOT OK: {one['group']}: {one['kind']}: {one['happened']}")
    print(f"{len(results)} kinds of input, {len(bad)} NOT OK; {args.out / 'attacks.md'}")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
