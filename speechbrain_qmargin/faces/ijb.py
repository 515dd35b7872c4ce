"""IJB-B and IJB-C, 1:1: from the official meta files and image embeddings to TAR@FAR.

The protocol (Whitelam et al. 2017, Maze et al. 2018) compares templates, which are sets of images
and video frames of one person. As the field evaluates it: an embedding an image, of the image and
its mirror image; the mean over each media of a template (a video's frames are one media); the sum
over its media; the cosine of the two templates of each pair. What moves the result is an option
(:class:`IJBOptions`), and every report prints it.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from speechbrain_qmargin.embeddings import pair_products
from speechbrain_qmargin.faces.pair_sets import FLIPS, flip_fusion
from speechbrain_qmargin.files import replacing, write_text
from speechbrain_qmargin.scoring.metrics import (
    allowed_false_accepts,
    operating_points,
    tar_at_far,
)
from speechbrain_qmargin.scoring.report import Report, evaluate
from speechbrain_qmargin.scoring.uncertainty import badge
from speechbrain_qmargin.trials import Trials

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "IJB",
    "IJB_FARS",
    "IJBOptions",
    "IJBResult",
    "ImageEmbeddings",
    "evaluate_ijb",
    "extract_ijb",
    "load_image_embeddings",
    "pair_cosines",
    "read_ijb",
    "read_template_pairs",
    "save_image_embeddings",
    "sweep_table",
    "template_embeddings",
]

IJB_FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
_IMAGES = 2**14  # image embeddings aggregated at once
_GALLERY = 256  # gallery templates scored at once
_SPARSE = 8  # cosines computed a pair, up to which whole blocks of them are worth it


# ------------------------------------------------------------------ the protocol


@dataclass(frozen=True)
class IJB:
    """The 1:1 protocol of IJB-B or IJB-C.

    Attributes
    ----------
    target : str
        "IJBB" or "IJBC".
    names : list of str
        The images [M], of ``*_name_5pts_score.txt``.
    landmarks : float32 array [M, 5, 2]
        In pixels of the loose crop: eyes, nose, corners of the mouth; x, y.
    detector_scores : float32 array [M]
    image, template, media : int arrays [F]
        The faces of ``*_face_tid_mid.txt``: index into `names`, index into the templates, and the
        media's own number.
    trials : Trials
        The pairs of ``*_template_pair_label.txt``, int32; its ids are the templates' numbers,
        ascending; its speakers are the subjects, where the 1:N lists name them.
    unnamed : str
        Why the subjects are not known by name; empty where they are.
    """

    target: str
    names: list[str]
    landmarks: np.ndarray
    detector_scores: np.ndarray
    image: np.ndarray
    template: np.ndarray
    media: np.ndarray
    trials: Trials
    unnamed: str = ""

    @property
    def num_templates(self) -> int:
        return len(self.trials.ids)

    @cached_property
    def template_media(self) -> np.ndarray:
        """The media of every face, counted anew in every template: int array [F]."""
        numbers = np.unique(self.media, return_inverse=True)[1].astype(np.int64)
        keys = self.template * (numbers.max() + 1) + numbers
        return np.unique(keys, return_inverse=True)[1]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the image names and landmarks, in order: what embeddings depend on."""
        digest = hashlib.sha256("\n".join(self.names).encode())
        digest.update(np.ascontiguousarray(self.landmarks, dtype="<f4").tobytes())
        return digest.hexdigest()

    def subjects(self) -> str:
        """What is known of the people behind the templates, in words.

        The 1:N lists name the subject of every template. Without them a genuine pair still says
        that two templates are one person, so those that genuine pairs link are taken for one
        subject; and an impostor pair says that two subjects differ.
        """
        units, labels = self.trials.speakers(), self.trials.is_target
        size = np.bincount(units)
        if not self.unnamed:
            return f"{len(size):,} subjects of {self.num_templates:,} templates, by the 1:N lists"
        text = (
            f"subjects are not known by name ({self.unnamed}): the templates that genuine pairs "
            f"link are taken for one, which makes {len(size):,} of {self.num_templates:,} "
            f"templates ({np.count_nonzero(size == 1):,} templates stay alone)"
        )
        met = self.trials.impostor_pairs
        met = met + met.T
        met.setdiag(0)
        apart, pairs = met.count_nonzero() // 2, len(size) * (len(size) - 1) // 2
        if apart < pairs:
            text += (
                f"; no impostor pair tells {100 * (1 - apart / pairs):.1f} % of the pairs of these "
                "subjects apart: if some are one person, the intervals are too narrow"
            )
        wrong = np.flatnonzero((units[self.trials.enrolment] == units[self.trials.test]) & ~labels)
        if len(wrong):
            text += (
                f"; labels contradict each other: {len(wrong):,} impostor pairs are of one subject "
                f"by the genuine pairs, the first is line {wrong[0] + 1}"
            )
        return text


def read_ijb(folder: str | Path, target: str = "IJBC") -> IJB:
    """Read the meta files of a 1:1 protocol.

    The subjects are named by the lists of the 1:N protocol, whose galleries and probes are the same
    templates: ``ijbc_1N_gallery_G1.csv``, ``_G2.csv`` (IJB-B: ``S1``, ``S2``) and
    ``ijbc_1N_probe_mixed.csv``, if they are there; see :meth:`IJB.subjects`.

    Parameters
    ----------
    folder : path
        Holds ``meta/ijbc_face_tid_mid.txt`` and so on, or ``IJBC/meta/``.
    target : {"IJBB", "IJBC"}

    Raises
    ------
    ValueError
        Another target; a malformed line, an image listed twice or without landmarks, a pair of an
        unknown template: with file and line.
    FileNotFoundError
        A meta file is missing; named.
    """
    if target not in ("IJBB", "IJBC"):
        raise ValueError(f"target must be IJBB or IJBC, got {target!r}")
    folder = Path(folder)
    places = folder / "meta", folder / target / "meta", folder
    names = [f"{target.lower()}_{part}.txt" for part in
             ("name_5pts_score", "face_tid_mid", "template_pair_label")]  # fmt: skip
    meta = next((place for place in places if (place / names[0]).is_file()), places[0])
    for name in names:
        if not (meta / name).is_file():
            raise FileNotFoundError(
                f"{meta / name}: not found. --ijb wants the folder of {target} that holds meta/ "
                "and loose_crop/"
            )
    images, points, scores = _read_images(meta / names[0])
    row = {name: index for index, name in enumerate(images)}
    image, template, media = _read_faces(meta / names[1], row)
    ids, template = np.unique(template, return_inverse=True)
    left, right, same, source = read_template_pairs(meta / names[2])
    sides = [_rows_of(ids, side, meta / names[2], meta / names[1]) for side in (left, right)]
    trials = Trials([str(x) for x in ids.tolist()], *sides, same, source)
    trials, unnamed = _with_subjects(trials, meta, target)
    template = template.astype(np.int32)
    return IJB(target, images, points, scores, image, template, media, trials, unnamed)


def _with_subjects(trials: Trials, meta: Path, target: str) -> tuple[Trials, str]:
    """The trials with the subjects of the 1:N lists; or as they are, and why."""
    parts = "GS"[target == "IJBB"]
    names = [f"{target.lower()}_1N_{part}.csv" for part in
             (f"gallery_{parts}1", f"gallery_{parts}2", "probe_mixed")]  # fmt: skip
    missing = [name for name in names if not (meta / name).is_file()]
    if missing:
        return trials, f"{', '.join(missing)} not in meta/"
    subject_of: dict[str, str] = {}
    for name in names:
        with (meta / name).open(encoding="utf-8", errors="replace") as stream:
            next(stream, None)
            for number, line in enumerate(stream, 2):  # TEMPLATE_ID,SUBJECT_ID, and much more
                template, _, rest = line.partition(",")
                subject = rest.partition(",")[0].strip()
                if not template.strip().isdigit() or not subject.isdigit():
                    raise ValueError(
                        f"{meta / name}:{number}: expected 'template,subject,...', got "
                        f"{line.rstrip()!r}"
                    )
                known = subject_of.setdefault(str(int(template)), subject)
                if known != subject:
                    raise ValueError(
                        f"{meta / name}:{number}: template {template} is of subject {subject}, and "
                        f"of {known} before"
                    )
    without = [name for name in trials.ids if name not in subject_of]
    if without:
        return trials, f"the 1:N lists lack {len(without):,} templates, as {without[0]}"
    subjects = [subject_of[name] for name in trials.ids]
    numbers = np.unique(subjects, return_inverse=True)[1]
    wrong = (numbers[trials.enrolment] == numbers[trials.test]) != trials.is_target
    if wrong.any():
        return trials, (
            f"by the 1:N lists {np.count_nonzero(wrong):,} labels are wrong, the first in line "
            f"{int(np.argmax(wrong)) + 1}"
        )
    return replace(trials, speaker_of=subjects), ""


def _read_images(path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """``name x1 y1 ... x5 y5 score``."""
    names: dict[str, int] = {}
    values: list[float] = []
    for number, fields in _rows(path, 12, "'name', ten landmark coordinates and a score"):
        before = names.setdefault(fields[0], number)
        if before != number:
            raise ValueError(f"{path}:{number}: the image {fields[0]} of line {before} again")
        try:
            values.extend(map(float, fields[1:]))
        except ValueError:
            raise ValueError(f"{path}:{number}: not a number in {' '.join(fields)!r}") from None
    table = np.asarray(values, dtype=np.float32).reshape(-1, 11)
    bad = ~np.isfinite(table).all(axis=1) | (table[:, 10] < 0)
    if bad.any():
        number = list(names.values())[int(np.argmax(bad))]
        raise ValueError(f"{path}:{number}: a value is not finite, or the score is negative")
    return list(names), table[:, :10].reshape(-1, 5, 2), table[:, 10].copy()


def _read_faces(path: Path, row: dict[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``name template media``."""
    image, numbers = [], []
    for number, (name, *ids) in _rows(path, 3, "'name template media'"):
        if name not in row:
            raise ValueError(f"{path}:{number}: the image {name} has no line of landmarks")
        try:
            numbers.extend(map(int, ids))
        except ValueError:
            raise ValueError(f"{path}:{number}: template and media must be numbers") from None
        image.append(row[name])
    template, media = np.asarray(numbers, dtype=np.int64).reshape(-1, 2).T
    return np.asarray(image, dtype=np.int32), template, media


def _rows(path: Path, width: int, wanted: str):
    """Numbered lines of `width` fields; at least one."""
    number = 0
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            fields = line.split()
            if len(fields) != width:
                raise ValueError(f"{path}:{number}: expected {wanted}, got {line.rstrip()!r}")
            yield number, fields
    if not number:
        raise ValueError(f"{path}: empty")


def _rows_of(ids: np.ndarray, wanted: np.ndarray, path: Path, listed: Path) -> np.ndarray:
    """Index into the ascending `ids` of every template of a pair list."""
    rows = np.empty(len(wanted), dtype=np.int32)
    for start in range(0, len(wanted), 2**20):
        block = slice(start, start + 2**20)
        rows[block] = np.searchsorted(ids, wanted[block])
        unknown = ids[np.minimum(rows[block], len(ids) - 1)] != wanted[block]
        if unknown.any():
            at = start + int(np.argmax(unknown))
            raise ValueError(f"{path}:{at + 1}: template {wanted[at]} is not in {listed.name}")
    return rows


def read_template_pairs(path: str | Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Read ``template template label`` lines: millions a second, in bounded memory.

    Parameters
    ----------
    path : path

    Returns
    -------
    (left, right, is_same, source)
        Template numbers, int32 [N]; bool [N]; the file's name with its SHA-256. Line n + 1 is
        pair n.

    Raises
    ------
    ValueError
        A line that is not two numbers and 0 or 1 (blank lines too), or no lines: with file and
        line.

    Examples
    --------
    >>> path = getfixture("tmp_path") / "pairs.txt"
    >>> _ = path.write_text("1 11065 1\\n1 20 0\\n")
    >>> left, right, is_same, source = read_template_pairs(path)
    >>> left.tolist(), right.tolist(), is_same.tolist()
    ([1, 1], [11065, 20], [True, False])
    """
    path, digest, lines, end = Path(path), hashlib.sha256(), 0, b"\n"
    with path.open("rb") as stream:
        while chunk := stream.read(2**20):
            digest.update(chunk)
            lines, end = lines + chunk.count(b"\n"), chunk[-1:]
    lines += end != b"\n"
    if not lines:
        raise ValueError(f"{path}: empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # numbers with a fraction
            table = np.loadtxt(path, dtype=np.int32, comments=None, encoding="utf-8", ndmin=2)
        good = table.shape == (lines, 3) and table.min() >= 0 and table[:, 2].max() <= 1
    except (ValueError, Warning):
        good = False
    if not good:
        _name_bad_pair(path)
    left, right, same = table.T
    return left.copy(), right.copy(), same != 0, f"{path.name} sha256:{digest.hexdigest()}"


def _name_bad_pair(path: Path) -> None:
    """Find the line that the fast reader refused; it tells no line numbers."""
    with path.open(encoding="utf-8", errors="replace", newline="\n") as stream:
        for number, line in enumerate(stream, 1):
            fields = line.split()
            plain = len(fields) == 3 and all(x.isascii() and x.isdigit() for x in fields)
            if not plain or max(map(int, fields)) >= 2**31 or int(fields[2]) > 1:
                raise ValueError(
                    f"{path}:{number}: expected 'template template 0|1', got {line.rstrip()!r}"
                )
    raise ValueError(f"{path}: not lines of 'template template 0|1'")


# ------------------------------------------------------------------ image embeddings


@dataclass(frozen=True)
class ImageEmbeddings:
    """Embeddings of a protocol's images, and of their mirror images.

    Attributes
    ----------
    plain, mirrored : float arrays [N, D]
        As the network gives them, not normalised; `mirrored` may be None.
    rows : int array [M] or None
        The row of every image of the protocol; None where they are in its order.
    """

    plain: np.ndarray
    mirrored: np.ndarray | None = None
    rows: np.ndarray | None = None

    def fused(self, block: slice, flip: str) -> np.ndarray:
        """Float32 embeddings of some images of the protocol."""
        rows = block if self.rows is None else self.rows[block]
        plain = np.asarray(self.plain[rows], dtype=np.float32)
        if flip == "none" or self.mirrored is None:
            return flip_fusion(plain, None, flip)
        return flip_fusion(plain, np.asarray(self.mirrored[rows], dtype=np.float32), flip)


def save_image_embeddings(
    path: str | Path, names: Sequence[str], plain: np.ndarray, mirrored: np.ndarray | None = None
) -> None:
    """Write ``ids`` [N], ``embeddings`` and perhaps ``mirrored`` float32 [N, D] as npz."""
    arrays = {"ids": np.asarray(names, dtype=np.str_), "embeddings": np.asarray(plain, np.float32)}
    if mirrored is not None:
        arrays["mirrored"] = np.asarray(mirrored, np.float32)
    with replacing(path) as partial, partial.open("wb") as stream:
        np.savez(stream, **arrays)


def load_image_embeddings(path: str | Path, ijb: IJB) -> ImageEmbeddings:
    """Read embeddings of a protocol's images; never executes code.

    Parameters
    ----------
    path : path
        The cache folder of :func:`extract_ijb` (mapped into memory, not read), or npz of
        :func:`save_image_embeddings`: names in any order, others than the protocol's are left.
    ijb : IJB

    Raises
    ------
    ValueError
        An unfinished cache or one of other images; arrays missing or of shapes that disagree, a
        name twice, images without an embedding: with the file.
    """
    path = Path(path)
    if path.is_dir():
        state = _cache_state(path, ijb)
        if state is None or state["done"] < len(ijb.names):
            done = 0 if state is None else state["done"]
            raise ValueError(
                f"{path}: {done:,} of {len(ijb.names):,} images are extracted; go on with the "
                "extraction first"
            )
        both = np.load(path / "embeddings.npy", mmap_mode="r", allow_pickle=False)
        return ImageEmbeddings(both[:, 0], both[:, 1])
    try:
        with np.load(path, allow_pickle=False) as loaded:
            names, plain = loaded["ids"].tolist(), loaded["embeddings"]
            mirrored = loaded.get("mirrored")
    except KeyError as error:
        raise ValueError(f"{path}: {error}; wanted arrays 'ids' and 'embeddings'") from None
    except FileNotFoundError:
        raise
    except (ValueError, OSError, EOFError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: not an npz of embeddings ({error})") from None
    if plain.ndim != 2 or len(names) != len(plain):
        raise ValueError(f"{path}: {len(names)} ids and embeddings {plain.shape}; want [N, D]")
    if mirrored is not None and mirrored.shape != plain.shape:
        raise ValueError(f"{path}: embeddings {plain.shape}, those mirrored {mirrored.shape}")
    if names == ijb.names:
        return ImageEmbeddings(plain, mirrored)
    row = {name: index for index, name in enumerate(names)}
    if len(row) < len(names):
        twice = next(name for index, name in enumerate(names) if row[name] != index)
        raise ValueError(f"{path}: {twice} is listed twice")
    rows = np.fromiter((row.get(name, -1) for name in ijb.names), np.int64, len(ijb.names))
    if rows.min() < 0:
        raise ValueError(
            f"{path}: {np.count_nonzero(rows < 0):,} of {len(rows):,} images have no embedding, "
            f"the first is {ijb.names[int(np.argmin(rows))]}"
        )
    return ImageEmbeddings(plain, mirrored, rows)


def _cache_state(folder: Path, ijb: IJB, model: str | None = None) -> dict | None:
    """What a cache holds; None if it holds nothing yet."""
    path = folder / "cache.json"
    if not path.is_file():
        return None
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; delete it to extract anew") from None
    if state.get("images") != ijb.fingerprint:
        raise ValueError(
            f"{path}: of other images or landmarks; give another cache folder (--output_folder)"
        )
    if model is not None and state.get("model") != model:
        raise ValueError(
            f"{path}: of the model {state.get('model')!r}, not {model!r}; give another cache "
            "folder (--output_folder), or delete this one"
        )
    return state


def extract_ijb(
    embed: Callable[[Tensor], Tensor],
    images_folder: str | Path,
    ijb: IJB,
    cache: str | Path,
    batch_size: int = 128,
    *,
    model: str = "",
    image_size: int = 112,
    workers: int = 4,
) -> ImageEmbeddings:
    """Embed every image of a protocol and its mirror image; interrupted, it goes on.

    The images are aligned by their five landmarks, RGB in [-1, 1].

    Parameters
    ----------
    embed : callable
        From float32 [2 B, 3, image_size, image_size] on the CPU, images and then their mirror
        images, to [2 B, D]. In evaluation mode: no statistics of a batch.
    images_folder : path
        ``loose_crop``.
    ijb : IJB
    cache : path
        A folder: ``embeddings.npy`` float32 [M, 2, D], and ``cache.json`` with how many are done.
        Progress is on disk at least every 50 batches.
    batch_size : int
        Images at once.
    model : str
        What tells the model from others, such as its checkpoint's SHA-256: a cache of another is
        refused.
    image_size : int
        What the model takes; ArcFace's template is scaled to it.
    workers : int
        Threads that decode and align.

    Returns
    -------
    ImageEmbeddings
        Mapped into memory.

    Raises
    ------
    FileNotFoundError
        Images that are missing, before anything is computed; counted, the first named.
    OSError
        An image that cannot be decoded: with the file. What was computed is kept.
    ValueError
        A cache of other images or of another model, an embedding that is not finite: with the
        file. Embeddings of another shape. What was computed is kept.
    """
    import torch
    from tqdm import tqdm

    cache, images_folder = Path(cache), Path(images_folder)
    state = _cache_state(cache, ijb, model) or {
        "images": ijb.fingerprint, "model": model, "done": 0
    }  # fmt: skip
    total, done = len(ijb.names), state["done"]
    if done == total:
        return load_image_embeddings(cache, ijb)
    _refuse_missing(images_folder, ijb.names[done:])
    path = cache / "embeddings.npy"
    array = np.load(path, mmap_mode="r+", allow_pickle=False) if done else None

    def faces(start: int) -> list:
        rows = range(start, min(start + batch_size, total))
        places = ((images_folder / ijb.names[i], ijb.landmarks[i]) for i in rows)
        return [pool.submit(_aligned, *place, image_size) for place in places]

    def keep() -> None:
        if array is not None:
            array.flush()
            write_text(cache / "cache.json", json.dumps(state | {"done": done}, indent=2) + "\n")

    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=total, initial=done, desc=f"{ijb.target} images", unit="image") as progress,
    ):
        coming = faces(done)
        try:
            for number, start in enumerate(range(done, total, batch_size)):
                batch = np.stack([face.result() for face in coming])
                stop = start + len(batch)
                coming = faces(stop)
                images = torch.from_numpy(batch).permute(0, 3, 1, 2).float().sub_(127.5).div_(127.5)
                with torch.inference_mode():
                    found = embed(torch.cat([images, images.flip(3)])).float().cpu().numpy()
                if not np.isfinite(found).all():
                    bad = int(np.argmin(np.isfinite(found).all(axis=1))) % len(batch)
                    raise ValueError(f"{images_folder / ijb.names[start + bad]}: its embedding "
                                     "is not finite")  # fmt: skip
                wanted = (2 * len(batch), found.shape[-1] if array is None else array.shape[2])
                if found.shape != wanted:
                    raise ValueError(f"embed gave {found.shape} where {wanted} was wanted")
                if array is None:
                    cache.mkdir(parents=True, exist_ok=True)
                    array = np.lib.format.open_memmap(
                        path, "w+", np.float32, (total, 2, found.shape[1])
                    )
                array[start:stop, 0], array[start:stop, 1] = (
                    found[: len(batch)],
                    found[len(batch) :],
                )
                done = stop
                progress.update(len(batch))
                if number % 50 == 49:
                    keep()
        finally:
            keep()
            for face in coming:
                face.cancel()
    return load_image_embeddings(cache, ijb)


def _refuse_missing(folder: Path, names: Sequence[str]) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder}: {len(missing):,} images of the protocol are missing, the first is "
            f"{missing[0]}"
        )


def _aligned(path: Path, landmarks: np.ndarray, size: int) -> np.ndarray:
    """An image, aligned: uint8 [size, size, 3], RGB."""
    from speechbrain_qmargin.data.faces import read_pixels
    from speechbrain_qmargin.data.records import align_face

    return np.asarray(align_face(read_pixels(path), landmarks, size))


# ------------------------------------------------------------------ templates


@dataclass(frozen=True)
class IJBOptions:
    """What moves the result; the defaults are those of InsightFace's evaluation.

    Attributes
    ----------
    flip : {"sum", "concat", "none"}
        How an image's embedding and its mirror image's become one: added (F2), concatenated (F1),
        or the image's alone (F0).
    use_norm_score : bool
        N1: the length of an embedding is its weight in its template. N0: every embedding is of
        unit length first.
    use_detector_score : bool
        D1: the detector's score weighs the embedding.

    Raises
    ------
    ValueError
        Another `flip`.

    Examples
    --------
    >>> print(IJBOptions(flip="none"))
    N1 D1 F0: embeddings keep their norm, weighted by the detector's score, no flip
    """

    flip: str = "sum"
    use_norm_score: bool = True
    use_detector_score: bool = True

    def __post_init__(self):
        if self.flip not in FLIPS:
            raise ValueError(f"flip must be one of {', '.join(FLIPS)}, got {self.flip!r}")

    @property
    def code(self) -> str:
        """As the field abbreviates them, "N1 D1 F2"."""
        return f"N{self.use_norm_score:d} D{self.use_detector_score:d} F{FLIPS.index(self.flip)}"

    def __str__(self) -> str:
        norm = "embeddings keep their norm" if self.use_norm_score else "embeddings of unit norm"
        weight = "weighted by the detector's score" if self.use_detector_score else "unweighted"
        flip = "no flip" if self.flip == "none" else f"image and mirror image by {self.flip}"
        return f"{self.code}: {norm}, {weight}, {flip}"


def template_embeddings(
    ijb: IJB, images: ImageEmbeddings, options: IJBOptions | None = None
) -> np.ndarray:
    """Unit embeddings of the templates, in the order of ``ijb.trials.ids``.

    The mean over each media of a template, summed over its media; accumulated in float64, in
    blocks of images.

    Parameters
    ----------
    ijb : IJB
    images : ImageEmbeddings
    options : IJBOptions, optional

    Returns
    -------
    float32 array [T, D] (2 D where flips are concatenated)

    Raises
    ------
    ValueError
        An image whose embedding is not finite, or zero where it is to be normalised; a template
        whose embedding is zero; named. Mirror images wanted that `images` lacks.

    Examples
    --------
    A video of two frames and a still are one template; the still is another:

    >>> pair = Trials(["4", "9"], np.array([0]), np.array([1]), np.array([True]))
    >>> ijb = IJB("IJBC", ["1.jpg", "2.jpg", "3.jpg"], np.zeros((3, 5, 2)), np.ones(3),
    ...           image=np.array([0, 1, 2, 2]), template=np.array([0, 0, 0, 1]),
    ...           media=np.array([7, 7, 8, 8]), trials=pair)
    >>> images = ImageEmbeddings(np.array([[2.0, 0.0], [6.0, 0.0], [0.0, 3.0]]))
    >>> unit = template_embeddings(ijb, images, IJBOptions(flip="none"))
    >>> unit
    array([[0.8, 0.6], [0. , 1. ]], dtype=float32)
    >>> pair_cosines(ijb, unit)
    array([0.6], dtype=float32)
    """
    from scipy.sparse import coo_array

    options = options or IJBOptions()
    weight = 1 / np.bincount(ijb.template_media)[ijb.template_media]
    if options.use_detector_score:
        weight = weight * ijb.detector_scores[ijb.image]
    order = np.argsort(ijb.image, kind="stable")
    image, template, weight = ijb.image[order], ijb.template[order], weight[order]
    edges = np.searchsorted(image, np.arange(0, len(ijb.names) + _IMAGES, _IMAGES))

    total = None
    for start, first, last in zip(
        range(0, len(ijb.names), _IMAGES), edges[:-1], edges[1:], strict=False
    ):
        fused = images.fused(slice(start, start + _IMAGES), options.flip)
        norms = np.sqrt(np.einsum("nd,nd->n", fused, fused))
        bad = ~np.isfinite(norms) if options.use_norm_score else ~(np.isfinite(norms) & (norms > 0))
        if bad.any():
            at = int(np.argmax(bad))
            raise ValueError(
                f"the embedding of image {ijb.names[start + at]} has the norm {norms[at]}"
            )
        if not options.use_norm_score:
            fused = fused / norms[:, None]
        if total is None:
            total = np.zeros((ijb.num_templates, fused.shape[1]))
        held, row = np.unique(template[first:last], return_inverse=True)
        entries = (weight[first:last], (row, image[first:last] - start))
        total[held] += coo_array(entries, (len(held), len(fused))).tocsr() @ fused
    norms = np.linalg.norm(total, axis=1)
    if not norms.min() > 0:
        raise ValueError(
            f"template {ijb.trials.ids[int(np.argmin(norms))]} has an embedding of zero: all its "
            "images have a detector score of 0, or cancel"
        )
    total /= norms[:, None]
    return total.astype(np.float32)


# ------------------------------------------------------------------ the evaluation


@dataclass(frozen=True)
class IJBResult:
    """A report with what it rests on.

    Attributes
    ----------
    target : str
    options : IJBOptions
    scores : float32 array [N]
        Of every pair, unrounded, in the order of the pair list.
    report : Report
    subjects : str
        What is known of the people behind the templates.
    size : str
        Images, media and templates.
    """

    target: str
    options: IJBOptions
    scores: np.ndarray
    report: Report
    subjects: str
    size: str

    def table(self) -> str:
        """For people; the options are in it."""
        return "\n".join(
            [
                f"{self.target} 1:1, {self.options}",
                "",
                self.report.table(),
                self.size,
                f"The intervals are over subjects: {self.subjects}",
            ]
        )

    def to_dict(self) -> dict:
        """Plain numbers, for JSON."""
        return {
            "target": self.target,
            "options": asdict(self.options) | {"code": self.options.code},
            "subjects": self.subjects,
            "size": self.size,
        } | self.report.to_dict()

    def save(self, folder: str | Path) -> None:
        """Write report.txt, report.json, scores.npy (float32), roc.png and det.png."""
        from speechbrain_qmargin.scoring.plots import det_figure, save_figure

        folder = Path(folder)
        title = f"{self.target} 1:1, {self.options.code}"
        with replacing(folder / "scores.npy") as partial:
            np.save(partial, self.scores)
        write_text(folder / "report.txt", self.table() + "\n")
        write_text(folder / "report.json", json.dumps(self.to_dict(), indent=2) + "\n")
        curve = {self.options.code: (self.report.points, self.report.spread)}
        save_figure(det_figure(curve, title), folder / "det.png")
        save_figure(_roc_figure(self.report, title), folder / "roc.png")


def evaluate_ijb(
    ijb: IJB,
    images: ImageEmbeddings,
    options: IJBOptions | None = None,
    *,
    fars: Sequence[float] = IJB_FARS,
) -> IJBResult:
    """Templates, the cosine of every pair, TAR at FARs with 95 % intervals.

    The intervals are over subjects, as far as they are known (:meth:`IJB.subjects`).

    Parameters
    ----------
    ijb : IJB
    images : ImageEmbeddings
    options : IJBOptions, optional
    fars : sequence of float

    Raises
    ------
    ValueError
        As :func:`template_embeddings` and
        :func:`~speechbrain_qmargin.scoring.report.evaluate`.
    """
    options = options or IJBOptions()
    unit = template_embeddings(ijb, images, options)
    scores = pair_cosines(ijb, unit)
    report = evaluate(scores, ijb.trials, fars=fars, units="subjects")
    media = int(ijb.template_media.max()) + 1
    size = (
        f"{len(ijb.names):,} images, {media:,} media of {ijb.num_templates:,} templates, "
        f"{len(ijb.trials):,} pairs"
    )
    return IJBResult(ijb.target, options, scores, report, ijb.subjects(), size)


def sweep_table(
    ijb: IJB,
    images: ImageEmbeddings,
    every: Iterable[IJBOptions],
    fars: Sequence[float] = IJB_FARS,
) -> str:
    """TAR at FARs for several options, as a table: how far they move the result.

    Values alone, for comparison; :func:`evaluate_ijb` has the intervals. Those that rest on fewer
    than three errors are left out.

    Parameters
    ----------
    ijb : IJB
    images : ImageEmbeddings
    every : iterable of IJBOptions
    fars : sequence of float
    """
    rows = ["options    " + "".join(f"{f'FAR {far:g}':>11}" for far in fars)]
    for options in every:
        scores = pair_cosines(ijb, template_embeddings(ijb, images, options))
        points = operating_points(scores, ijb.trials.is_target)
        row = f"{options.code:11}"
        for far in fars:
            found = tar_at_far(points, far)
            errors = min(allowed_false_accepts(far, points.num_impostors), found.misses)
            row += f"{100 * found.tar:11.2f}" if badge(errors) != "unsupported" else f"{'-':>11}"
        rows.append(row)
    return "\n".join(rows)


def pair_cosines(ijb: IJB, unit: np.ndarray) -> np.ndarray:
    """The cosine of every pair, in the order of the pair list.

    Parameters
    ----------
    ijb : IJB
    unit : float32 array [T, D]
        Of :func:`template_embeddings`.

    Returns
    -------
    float32 array [N]

    Notes
    -----
    A few thousand gallery templates meet each other template hundreds of times, so a block of them
    against all is one matrix product, from which the pairs are picked: six times as fast at
    IJB-C's size as gathering both rows of every pair.
    """
    left, right = ijb.trials.enrolment, ijb.trials.test
    counts = [np.bincount(side, minlength=len(unit)) for side in (left, right)]
    if np.count_nonzero(counts[1]) < np.count_nonzero(counts[0]):
        left, right, counts = right, left, counts[::-1]
    rows = np.flatnonzero(counts[0])
    if len(rows) * len(unit) > _SPARSE * len(left):
        return pair_products(unit, left, right)
    order = np.argsort(left, kind="stable").astype(np.int32)
    edges = np.append(0, np.cumsum(counts[0][rows]))
    place = np.zeros(len(unit), dtype=np.int32)
    scores = np.empty(len(left), dtype=np.float32)
    for start in range(0, len(rows), _GALLERY):
        block = rows[start : start + _GALLERY]
        pairs = order[edges[start] : edges[start + len(block)]]
        place[block] = np.arange(len(block))
        scores[pairs] = (unit[block] @ unit.T)[place[left[pairs]], right[pairs]]
    return scores


def _roc_figure(report: Report, title: str):
    """TAR over FAR on a logarithmic axis, with its band; grey where fewer than 30 are accepted."""
    from speechbrain_qmargin.scoring.plots import canvas

    points, spread = report.points, report.spread
    figure, axes = canvas(6.6, 4.4)
    lowest = 1 / points.num_impostors
    far, tar = np.maximum(points.far[:-1], lowest / 2), 1 - points.frr[:-1]
    (line,) = axes.step(far, tar, where="pre", linewidth=1.5)  # TAR falls, and then FAR
    grid = np.geomspace(lowest, 0.1, 60)
    band = spread.band(grid)
    bottom = tar.min()
    if band is not None:
        low, high = 1 - band[1], 1 - band[0]
        bottom = low.min()
        axes.fill_between(grid, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    for rate in report.figures:
        if rate.kind == "tar_at_far" and rate.support != "unsupported":
            at = rate.parameter, rate.value
            axes.plot(*at, "o", color=line.get_color(), markersize=4)
            axes.annotate(f"{100 * rate.value:.2f}", at, fontsize=8,
                          xytext=(4, -11), textcoords="offset points")  # fmt: skip
    axes.axvspan(lowest / 2, 30 / points.num_impostors, color="0.93", zorder=0)
    axes.set_xscale("log")
    axes.set_xlim(max(lowest / 2, 1e-7), 1)
    axes.set_ylim(max(0.0, bottom - 0.05), 1.01)
    axes.set_xlabel("False accept rate (grey: fewer than 30 false accepts)")
    axes.set_ylabel("True accept rate")
    axes.set_title(title, fontsize=10)
    axes.grid(color="0.88", linewidth=0.6)
    return figure
