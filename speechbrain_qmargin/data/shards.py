"""Images in webdataset's shards; and whether a path holds such, records, or neither."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from speechbrain_qmargin.data.images import IMAGE_SUFFIXES
from speechbrain_qmargin.data.records import FaceRecords
from speechbrain_qmargin.data.stored import StoredFaces, kept_beside

__all__ = ["FaceShards", "stored_faces"]


def stored_faces(path: str | Path, *, progress: bool = True) -> FaceRecords | FaceShards | None:
    """The images at a path that keeps them inside large files.

    Parameters
    ----------
    path : path
    progress : bool
        Show a bar where labels have to be read.

    Returns
    -------
    FaceRecords of a ``.rec``, or of the one in a folder (``train.rec`` where there are several);
    FaceShards of a folder of ``.tar`` files; None for anything else, such as a folder of images.

    Raises
    ------
    ValueError
        Several ``.rec`` files, none of which is ``train.rec``.

    Examples
    --------
    >>> from speechbrain_qmargin.data.recordio import write_records
    >>> folder = getfixture("tmp_path")
    >>> write_records(folder / "train.rec", [b"P5 2 1 255 " + bytes([0, 255])], [0])
    >>> type(stored_faces(folder)).__name__, stored_faces(folder / "images")
    ('FaceRecords', None)
    """
    path = Path(path)
    if path.suffix == ".rec":
        return FaceRecords(path, progress=progress)
    records = sorted(path.glob("*.rec"))
    if len(records) > 1:
        records = [one for one in records if one.name == "train.rec"]
        if not records:
            raise ValueError(f"{path}: several .rec files are there; name the one to train on")
    if records:
        return FaceRecords(records[0], progress=progress)
    return FaceShards(path, progress=progress) if any(path.glob("*.tar")) else None


class FaceShards(StoredFaces):
    """The images of webdataset shards: ``.tar`` files of ``<key>.jpg`` and ``<key>.cls``.

    Plain tar files are read at random by offset, so training shuffles over all shards. Their
    headers are read once; what was found, 20 bytes an image, is held in memory and kept as
    ``shards.index.npz``. 64 shards or more are read by spawned processes, so the script that opens
    them needs its ``if __name__ == "__main__":``.

    Parameters
    ----------
    folder : path
    progress : bool
        Show a bar while the headers are read. Attributes are those of
        :class:`~speechbrain_qmargin.data.records.FaceRecords`.

    Raises
    ------
    FileNotFoundError, ValueError
        No shards; a shard that is cut off, compressed, or has an image without its ``.cls`` or two
        of one key: named.

    Examples
    --------
    >>> import io
    >>> folder, image = getfixture("tmp_path"), b"P5 2 1 255 " + bytes([0, 255])
    >>> with tarfile.open(folder / "0.tar", "w") as tar:
    ...     for name, content in (("a.pgm", image), ("a.cls", b"7")):
    ...         member = tarfile.TarInfo(name)
    ...         member.size = len(content)
    ...         tar.addfile(member, io.BytesIO(content))
    >>> stored = FaceShards(folder, progress=False)
    >>> len(stored), stored.image(0) == (image, 7)
    (1, True)
    """

    def __init__(self, folder: str | Path, *, progress: bool = True) -> None:
        super().__init__()
        self.files = sorted(Path(folder).glob("*.tar"))
        if not self.files:
            raise FileNotFoundError(f"{folder}: no .tar shards there")
        index = kept_beside(
            Path(folder) / "shards.index.npz",
            self.files,
            lambda: _index_of_shards(self.files, progress),
        )
        self._index = {key: index[key] for key in ("shard", "offset", "size", "label")}
        self.num_classes = int(self._index["label"].max()) + 1
        self._check_labels(str(folder))
        for at, fault in zip(index["broken"], index["fault"], strict=True):
            self.broken[f"{self.files[int(at)].name}: {fault[0]}"] = str(fault[1])

    def __len__(self) -> int:
        return len(self._index["label"])

    def name(self, row: int) -> str:
        shard = self.files[int(self._index["shard"][row])].name
        return f"{shard}: the image at byte {self._index['offset'][row]}"

    def labels(self) -> np.ndarray:
        return self._index["label"]

    def places(self) -> tuple[np.ndarray, ...]:
        return tuple(self._index.values())

    def image(self, row: int) -> tuple[bytes, int]:
        at = {key: int(column[row]) for key, column in self._index.items()}
        stream = self.stream(self.files[at["shard"]])
        stream.seek(at["offset"])
        return stream.read(at["size"]), at["label"]


def _index_of_shards(shards: Sequence[Path], progress: bool) -> dict[str, np.ndarray]:
    """shard int32, offset int64, size int32, label int32, [N] each; many by several processes.

    Beside them the shards of ``broken`` members and, in ``fault`` [B, 2], their names and faults.
    """
    with ExitStack() as stack:
        run = map
        if len(shards) >= 64 and (os.cpu_count() or 1) > 1:  # a process takes seconds to start
            jobs = min(8, os.cpu_count() or 1)
            pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
            run = stack.enter_context(pool).map
        bar = tqdm(total=len(shards), desc="reading shards", disable=not progress, leave=False)
        stack.enter_context(bar)
        parts, broken = [], []
        for number, (part, faults) in enumerate(run(_members, shards)):
            parts.append({"shard": np.full(len(part["label"]), number, dtype=np.int32), **part})
            broken += [(number, *fault) for fault in faults]
            bar.update()
    found = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    found["broken"] = np.array([number for number, *_ in broken], np.int32)
    found["fault"] = np.array([fault for _, *fault in broken], np.str_).reshape(-1, 2)
    if not len(found["label"]):
        raise ValueError(f"{shards[0].parent}: the .tar shards there hold no images")
    return found


def _members(shard: Path) -> tuple[dict[str, np.ndarray], list[tuple[str, str]]]:
    """offset, size and label of the images of a tar file, in its order; (member, fault) of others.

    Links and folders are not images, whatever they are called: they are faults.
    """
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    faults: list[tuple[str, str]] = []
    try:
        with tarfile.open(shard, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] it keeps all
                key, _, suffix = member.name.rpartition(".")
                image = f".{suffix.lower()}" in IMAGE_SUFFIXES
                if not (image or suffix == "cls"):
                    continue
                stream = tar.extractfile(member) if member.isreg() else None
                if stream is None:
                    name = member.name.encode("utf-8", "backslashreplace").decode()
                    faults.append((name, "a link or a folder, not a file"))
                elif key in (images if image else labels):  # of which all but one would be lost
                    raise ValueError(
                        f"{member.name}: there is another {'image' if image else '.cls'} of this "
                        "key; give each image a key of its own"
                    )
                elif image:
                    images[key] = (member.offset_data, member.size)
                elif member.size > 20:  # no number of an identity is that long
                    raise ValueError(f"{member.name}: {member.size} bytes are not a label")
                else:
                    labels[key] = int(stream.read())
        lost = {name.rpartition(".")[0] for name, _ in faults}
        images = {key: place for key, place in images.items() if key not in lost}
        missing = [key for key in images if key not in labels]
        if missing:
            raise ValueError(f"{len(missing)} images have no .cls, the first is {missing[0]}")
        offsets, sizes = np.array(list(images.values()), dtype=np.int64).reshape(-1, 2).T
        if sizes.max(initial=0) >= 2**31:
            raise ValueError("an image of more than 2 GB")
        numbers = np.array([labels[key] for key in images], dtype=np.int32)
        if numbers.min(initial=0) < 0:
            raise ValueError(f"the label {numbers.min()}")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise ValueError(f"{shard}: not a plain tar file of images and labels ({error})") from None
    return {"offset": offsets, "size": sizes.astype(np.int32), "label": numbers}, faults
