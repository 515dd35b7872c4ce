"""Files of embeddings."""

import io
import pickle
import shutil
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import kaldiio
import numpy as np

from malformed.kinds import Kind, Touch, content, cut, error, flip, listed, value
from malformed.lists import IDS
from speechbrain_qmargin.embeddings import cosine_scores, load_embeddings, save_embeddings
from speechbrain_qmargin.extraction import EmbeddingParts
from speechbrain_qmargin.trials import Trials


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
    path = folder / "bomb.npz"
    np.savez_compressed(path, ids=np.array(IDS[:1]), embeddings=np.zeros((1, 2**24), np.float32))
    yield error("65 kB that unpack to 67 MB", lambda p=path: loaded(p), "bomb.npz", "unpack to")
    path = content(folder / "members.npz", b"")
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("ids", "embeddings"):
            archive.writestr(name, b"a")
    yield error("an npz of what is no array", lambda p=path: loaded(p), "members.npz")
    renamed = saved("renamed.npz", np.array(IDS), matrix).read_bytes()
    at = renamed.rindex(b"ids.npy")
    path = content(folder / "renamed.npz", renamed[:at] + b"idt" + renamed[at + 3 :])
    yield error("an npz whose directory has another name", lambda p=path: loaded(p), "renamed.npz")
    form = saved("form.npz", np.array(["Jos\u00e9/1", "b"]), matrix[:2])
    other = Trials(["Jose\u0301/1", "b"], np.array([0]), np.array([1]))
    yield value(
        "an id in another of Unicode's normal forms",
        lambda: cosine_scores(load_embeddings(form), other),
        [unit[0] @ unit[1]],
        1e-6,
        "Unicode's normal form C",
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
        "of one word": b"x" * 100_000,
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
