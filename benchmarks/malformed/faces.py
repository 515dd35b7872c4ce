"""Faces in pickles, records and shards."""

import io
import pickle
import shutil
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from malformed.images import GREY, encoded
from malformed.kinds import Kind, Touch, content, cut, error, flip, listed, value
from speechbrain_qmargin.data.face_dataset import StoredDataset
from speechbrain_qmargin.data.pickled import read_bin
from speechbrain_qmargin.data.recordio import write_records
from speechbrain_qmargin.data.records import FaceRecords
from speechbrain_qmargin.data.shards import FaceShards
from speechbrain_qmargin.data.stored import StoredFaces


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


def labels_of(stored: StoredFaces) -> str:
    """What is trained on, and what is said of the rest."""
    data = StoredDataset(stored, 16)
    found = [int(data[row]["identity_encoded"]) for row in range(len(data))]
    return f"labels {found} of {stored.num_classes} classes\n{data.skipped.warning()}"


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
        return labels_of(FaceRecords(path, progress=False))

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

    def shard(
        name: str, members: list[tuple[str, bytes | str]], mode: Literal["w", "w:gz"] = "w"
    ) -> Path:
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
        return labels_of(FaceShards(place, progress=False))

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
