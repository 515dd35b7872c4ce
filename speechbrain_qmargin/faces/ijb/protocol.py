"""The meta files of IJB-B and IJB-C: images, templates, pairs, subjects."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from speechbrain_qmargin.trials import LabelledTrials

__all__ = ["IJB", "read_ijb", "read_template_pairs"]


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
    trials : LabelledTrials
        The pairs of ``*_template_pair_label.txt``, int32; its ids are the templates' numbers,
        ascending; its speakers are the subjects, where the 1:N lists name them.
    unnamed : str
        Why the subjects are not known by name; empty where they are.
    lists : mapping from list to mapping from template to subject
        Those lists of the 1:N protocol that are there: "G1" and "G2" (IJB-B: "S1" and "S2") are
        galleries, "mixed" are the probes.

    Examples
    --------
    >>> pair = LabelledTrials(["4", "9"], np.array([0]), np.array([1]), np.array([True]))
    >>> ijb = IJB("IJBC", ["1.jpg", "2.jpg", "3.jpg"], np.zeros((3, 5, 2)), np.ones(3),
    ...           image=np.array([0, 1, 2, 2]), template=np.array([0, 0, 0, 1]),
    ...           media=np.array([7, 7, 8, 8]), trials=pair)
    >>> ijb.num_templates, ijb.template_media  # a video of two frames and a still; the still again
    (2, array([0, 0, 1, 2]))
    """

    target: str
    names: list[str]
    landmarks: np.ndarray
    detector_scores: np.ndarray
    image: np.ndarray
    template: np.ndarray
    media: np.ndarray
    trials: LabelledTrials
    unnamed: str = ""
    lists: Mapping[str, Mapping[str, str]] = field(default_factory=dict, repr=False)

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

    Examples
    --------
    >>> meta = getfixture("tmp_path") / "meta"
    >>> meta.mkdir()
    >>> points = "30 50 80 50 56 70 40 90 75 90 0.99"  # five landmarks and the detector's score
    >>> for name, text in (("name_5pts_score", f"1.jpg {points}\\n2.jpg {points}\\n"),
    ...                    ("face_tid_mid", "1.jpg 4 7\\n2.jpg 9 8\\n"),
    ...                    ("template_pair_label", "4 9 1\\n")):
    ...     _ = (meta / f"ijbc_{name}.txt").write_text(text)
    >>> ijb = read_ijb(meta.parent)
    >>> ijb.trials.ids, ijb.landmarks.shape
    (['4', '9'], (2, 5, 2))
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
    one, two = (_rows_of(ids, side, meta / names[2], meta / names[1]) for side in (left, right))
    trials = LabelledTrials(
        [str(x) for x in ids.tolist()], one, two, same, source, label_noise=True
    )
    lists, missing = _read_lists(meta, target)
    trials, unnamed = _with_subjects(trials, lists, missing)
    template = template.astype(np.int32)
    return IJB(target, images, points, scores, image, template, media, trials, unnamed, lists)


def _read_lists(meta: Path, target: str) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The 1:N lists that are there, and the names of the files that are not."""
    parts = "GS"[target == "IJBB"]
    lists: dict[str, dict[str, str]] = {}
    missing: list[str] = []
    subject_of: dict[str, str] = {}
    for part in (f"gallery_{parts}1", f"gallery_{parts}2", "probe_mixed"):
        path = meta / f"{target.lower()}_1N_{part}.csv"
        if not path.is_file():
            missing.append(path.name)
            continue
        listed = lists[part.rpartition("_")[2]] = {}
        with path.open(encoding="utf-8", errors="replace") as stream:
            next(stream, None)
            for number, line in enumerate(stream, 2):  # TEMPLATE_ID,SUBJECT_ID, and much more
                template, _, rest = line.partition(",")
                subject = rest.partition(",")[0].strip()
                if not template.strip().isdigit() or not subject.isdigit():
                    raise ValueError(
                        f"{path}:{number}: expected 'template,subject,...', got {line.rstrip()!r}"
                    )
                name = str(int(template))
                known = subject_of.setdefault(name, subject)
                if known != subject:
                    raise ValueError(
                        f"{path}:{number}: template {template} is of subject {subject}, and "
                        f"of {known} before"
                    )
                listed[name] = subject
    return lists, missing


def _with_subjects(
    trials: LabelledTrials, lists: Mapping[str, Mapping[str, str]], missing: list[str]
) -> tuple[LabelledTrials, str]:
    """The trials with the subjects of the 1:N lists; or as they are, and why."""
    if missing:
        return trials, f"{', '.join(missing)} not in meta/"
    subject_of = {name: subject for listed in lists.values() for name, subject in listed.items()}
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
