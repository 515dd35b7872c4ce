"""How an encoder's scores become decisions: what is kept in its folder, and how it is applied.

The files lie beside the encoder and are bound to it and to each other by digests:

* ``operating_point.json``, the threshold with what it promises;
* ``cohort.npz``, where scores are normalised or centred;
* ``calibration.json``, from scores to log-likelihood ratios;
* ``score_histogram.json``, what the scores of the measured trials were.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from speechbrain_qmargin.embeddings import Embeddings
from speechbrain_qmargin.export.inference import DECISION_FILES, set_plain_threshold
from speechbrain_qmargin.files import load_arrays, load_record, replacing, save_record
from speechbrain_qmargin.scoring.calibration import Calibration
from speechbrain_qmargin.scoring.decision import OperatingPoint
from speechbrain_qmargin.scoring.lists import Cohort
from speechbrain_qmargin.scoring.normalisation import (
    PER_RECORDING,
    cohort_statistics,
    kind_of,
    over_sides,
    sides_of,
    top_of,
)
from speechbrain_qmargin.training.layout import INFERENCE

__all__ = ["Histogram", "NoThreshold", "System", "Vectors", "cohort_digest", "when_written"]

_POINT, _CALIBRATION, _COHORT, _HISTOGRAM = DECISION_FILES
_COUNTS = "score histogram"


class NoThreshold(ValueError):
    """No threshold was measured for an encoder, or the one that is there is not of it.

    Examples
    --------
    >>> System.load(getfixture("tmp_path"), "encoder 1")
    Traceback (most recent call last):
    speechbrain_qmargin.verify.system.NoThreshold: ...: no threshold in it (no operating_point...
    """


class Vectors(NamedTuple):
    """What scores are made of: unit embeddings, and their scores against the cohort.

    Examples
    --------
    >>> plain = Vectors(np.eye(2, dtype="f"), centre=np.zeros(2), spread=np.ones(2))
    >>> plain.unit @ plain.unit[0]
    array([1., 0.], dtype=float32)
    """

    unit: np.ndarray
    """float32 [N, D]"""
    centre: np.ndarray
    """float64 [N]; zeros without a normalisation."""
    spread: np.ndarray
    """float64 [N]; ones without."""


@dataclass(frozen=True)
class Histogram:
    """Scores of target and impostor trials, counted.

    Attributes
    ----------
    edges : list of float
        One more than there are counts.
    targets, impostors : list of int
    kind, encoder : str
        Of the scores.

    Raises
    ------
    ValueError
        Edges and counts that disagree.

    Examples
    --------
    >>> Histogram([0.0, 0.5, 1.0], targets=[0, 2], impostors=[1], kind="cosine", encoder="5e11")
    Traceback (most recent call last):
    ValueError: its edges and counts disagree
    """

    edges: list[float]
    targets: list[int]
    impostors: list[int]
    kind: str
    encoder: str

    def __post_init__(self) -> None:
        if not len(self.edges) - 1 == len(self.targets) == len(self.impostors):
            raise ValueError("its edges and counts disagree")

    @classmethod
    def of(
        cls, scores: np.ndarray, is_target: np.ndarray, kind: str, encoder: str, bins: int = 60
    ) -> Histogram:
        """Count scores in bins of one width.

        Examples
        --------
        >>> found = Histogram.of(np.array([0.0, 1, 1]), np.array([False, True, True]), "", "", 2)
        >>> found.edges, found.targets, found.impostors
        ([0.0, 0.5, 1.0], [0, 2], [1, 0])
        """
        edges = np.histogram_bin_edges(scores, bins)
        counts = [np.histogram(scores[chosen], edges)[0] for chosen in (is_target, ~is_target)]
        return cls(edges.tolist(), counts[0].tolist(), counts[1].tolist(), kind, encoder)


def cohort_digest(cohort: Cohort | None) -> str:
    """SHA-256 of all that a cohort does to scores; empty for none.

    Examples
    --------
    >>> cohort_digest(None)
    ''
    >>> entries = Embeddings(["ann", "bob"], np.eye(2))
    >>> of_two, of_three = (cohort_digest(Cohort(entries, None, top_n=n)) for n in (2, 3))
    >>> of_two == of_three
    False
    """
    if cohort is None:
        return ""
    digest = hashlib.sha256(
        f"{cohort.method} {cohort.top_n} {cohort.entries.matrix.shape}".encode()
    )
    for array in (cohort.entries.matrix, cohort.mean):
        if array is not None:
            digest.update(np.ascontiguousarray(array, dtype="<f4").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class System:
    """An encoder's scores and decisions.

    Attributes
    ----------
    point : OperatingPoint
        Its kind, ``cosine``, ``centred cosine`` or ``<method>-norm``, says how scores are made;
        ``llr`` that the decision is on the calibrated ones.
    cohort : Cohort or None
    calibration : Calibration or None
    histogram : Histogram or None

    Raises
    ------
    ValueError
        Parts that are of different encoders, cohorts or scores; a kind that is not known.

    Examples
    --------
    >>> from speechbrain_qmargin.scoring.decision import choose_operating_point
    >>> from speechbrain_qmargin.scoring.metrics import operating_points
    >>> points = operating_points(np.array([0.0, 0.25, 0.75]), np.array([False, False, True]))
    >>> system = System(choose_operating_point("demo", points, 0.01, kind="cosine"))
    >>> system.point.threshold                      # between the impostors and the target
    0.5
    >>> ann = system.vectors([np.array([[2.0, 0.0]])])
    >>> test = system.vectors([np.array([[3.0, 4.0]])])
    >>> score = float(system.scores(ann, test)[0, 0])
    >>> round(score, 4), system.accepts(score)
    (0.6, True)
    """

    point: OperatingPoint
    cohort: Cohort | None = None
    calibration: Calibration | None = None
    histogram: Histogram | None = None

    def __post_init__(self) -> None:
        normalised = [kind_of(method) for method in PER_RECORDING]
        if self.kind not in ("cosine", "centred cosine", *normalised):
            raise ValueError(
                f"the threshold is for {self.kind or 'unknown'} scores; a verifier decides on "
                f"cosine, centred cosine, {', '.join(normalised)}"
            )
        if self.kind != "cosine" and self.cohort is None:
            raise ValueError(f"the threshold is for {self.kind} scores, and there is no cohort")
        if self.kind in normalised:
            assert self.cohort is not None
            if self.cohort.kind != self.kind:
                raise ValueError(f"the threshold is for {self.kind}, the cohort {self.cohort.kind}")
        if self.cohort is not None:
            self.point.refuse_other(cohort=cohort_digest(self.cohort))
        if self.calibration is not None:
            if self.calibration.qualities:
                raise ValueError("the calibration wants quality measures; fit one without")
            if self.calibration.kind != self.kind or self.calibration.cohort != self.point.cohort:
                raise ValueError("the calibration is of other scores than the threshold")
            self.point.refuse_other(encoder=self.calibration.encoder)
            if self.point.kind == "llr":
                self.point.refuse_other(backend=self.calibration.digest)
        if self.histogram is not None:
            if self.histogram.kind != self.kind:
                raise ValueError("the histogram is of other scores than the threshold")
            self.point.refuse_other(encoder=self.histogram.encoder)

    @property
    def kind(self) -> str:
        """What the scores are, before they are calibrated."""
        if self.point.kind == "llr":
            return self.calibration.kind if self.calibration else ""
        return self.point.kind

    @property
    def _normalising(self) -> Cohort | None:
        """The cohort that the scores are normalised with; None where at most its mean is taken."""
        return self.cohort if self.cohort is not None and self.cohort.kind == self.kind else None

    # ---------------------------------------------------------------- scores

    def vectors(self, people: Sequence[np.ndarray]) -> Vectors:
        """What stands for each person's, or each recording's, embeddings [n, D].

        As in scoring: the mean of the embeddings of unit length, itself of unit length.

        Raises
        ------
        ValueError
            An embedding that is zero or not finite.
        """
        mean = self.cohort.mean if self.cohort is not None and self.kind != "cosine" else None
        unit = np.empty((len(people), people[0].shape[1]), dtype=np.float32)
        for row, embeddings in enumerate(people):
            ids = [str(n) for n in range(len(embeddings))]
            each = Embeddings(ids, embeddings).unit(ids, mean)
            unit[row] = Embeddings(["0"], each.mean(axis=0, keepdims=True)).unit(["0"])[0]
        if (cohort := self._normalising) is None:
            return Vectors(unit, np.zeros(len(unit)), np.ones(len(unit)))
        top = top_of(cohort.method, cohort.top_n)
        return Vectors(unit, *cohort_statistics(unit, cohort.entries.matrix, top))

    def scores(self, enrolled: Vectors, tests: Vectors) -> np.ndarray:
        """Every enrolment's score with every test: float64 [N, M]."""
        raw = (enrolled.unit @ tests.unit.T).astype(np.float64)
        if (cohort := self._normalising) is None:
            return raw
        statistics = {
            "enrolment": (enrolled.centre[:, None], enrolled.spread[:, None]),
            "test": (tests.centre, tests.spread),
        }
        return over_sides(raw, [statistics[side] for side in sides_of(cohort.method)])

    def llr(self, score: float) -> float | None:
        """The natural log-likelihood ratio of a score; None without a calibration."""
        if self.calibration is None:
            return None
        return float(self.calibration.weights[0] * score + self.calibration.offset)

    def accepts(self, score: float) -> bool:
        """The decision on a score."""
        if self.point.kind == "llr":
            decided = self.llr(score)
            assert decided is not None  # there is a calibration, or the kind were not known
            return self.point.accepts(decided, kind="llr")
        return self.point.accepts(score, kind=self.kind)

    # ---------------------------------------------------------------- files

    def save(self, folder: str | Path) -> None:
        """Write the files into an encoder's folder; if one cannot be written, those there stay.

        All are written before the first takes its place, and the threshold takes its own last:
        whoever reads meanwhile has the one before. Then what only the system before had is removed.
        """
        folder = Path(folder)
        writes: dict[str, Callable[[Path], None]] = {_POINT: self.point.save}
        if (cohort := self.cohort) is not None:
            writes[_COHORT] = lambda path: _save_cohort(path, cohort)
        if self.calibration is not None:
            writes[_CALIBRATION] = self.calibration.save
        if (histogram := self.histogram) is not None:
            writes[_HISTOGRAM] = lambda path: save_record(path, _COUNTS, asdict(histogram))
        with ExitStack() as files:  # which take their places in the reverse order
            for name, write in writes.items():
                write(files.enter_context(replacing(folder / name)))
        for name in set(DECISION_FILES) - set(writes):
            (folder / name).unlink(missing_ok=True)

    def install(self, folder: str | Path) -> None:
        """As :meth:`save`; SpeechBrain's ``threshold`` in the folder is set, or taken out.

        Its classes give plain cosines, so only a threshold for these is theirs.
        """
        self.save(folder)
        set_plain_threshold(folder, self.point.threshold if self.point.kind == "cosine" else None)

    @classmethod
    def load(cls, folder: str | Path, encoder: str) -> System:
        """The system of an encoder's folder.

        Parameters
        ----------
        folder : path
        encoder : str
            The digest of the encoder that is there.

        Raises
        ------
        NoThreshold
            No file; damaged files, of another encoder, or not of each other; with what to do.
        """
        folder = Path(folder)
        shown = folder.parent if folder.name == INFERENCE else folder
        shown = str(shown).removesuffix(".verifier")
        remedy = f"measure one on your own people: qmargin threshold {shown} SOURCE"
        if not (folder / _POINT).is_file():
            raise NoThreshold(f"{folder}: no threshold in it (no {_POINT}); {remedy}")
        try:
            point = OperatingPoint.load(folder / _POINT)
            if not point.encoder:
                raise ValueError("the threshold does not say of which encoder it is")
            point.refuse_other(encoder=encoder)
            cohort = _load_cohort(folder / _COHORT) if (folder / _COHORT).is_file() else None
            loaded: list[Any] = [
                make(folder / name) if (folder / name).is_file() else None
                for name, make in ((_CALIBRATION, Calibration.load), (_HISTOGRAM, _load_histogram))
            ]
            return cls(point, cohort, *loaded)
        except ValueError as error:
            where = "" if str(error).startswith(str(folder)) else f"{folder / _POINT}: "
            raise NoThreshold(f"{where}{error}; {remedy}") from None


def when_written(folder: str | Path) -> tuple[int, ...]:
    """What is another whenever the threshold of an encoder's folder was written; empty without one.

    Examples
    --------
    >>> when_written(getfixture("tmp_path"))
    ()
    """
    try:
        found = (Path(folder) / _POINT).stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_ino, found.st_size


def _load_histogram(path: Path) -> Histogram:
    return load_record(path, _COUNTS, Histogram)


def _save_cohort(path: Path, cohort: Cohort) -> None:
    arrays: dict[str, Any] = {
        "embeddings": cohort.entries.matrix.astype(np.float32),
        "settings": np.asarray([cohort.method, str(cohort.top_n)], dtype=np.str_),
    }
    if cohort.mean is not None:
        arrays["mean"] = np.asarray(cohort.mean, dtype=np.float32)
    with replacing(path) as partial, partial.open("wb") as stream:
        np.savez(stream, **arrays)


def _load_cohort(path: Path) -> Cohort:
    found = load_arrays(path, "a cohort", ("embeddings", "settings", "mean"))
    try:
        if not isinstance(found, dict):
            raise KeyError("embeddings")
        matrix, mean = found["embeddings"], found.get("mean")
        method, top_n = found["settings"].tolist()
        if matrix.dtype != np.float32 or not np.isfinite(matrix).all():
            raise ValueError("its embeddings are not finite float32")
        if mean is not None and mean.shape != matrix.shape[1:]:
            raise ValueError("its mean is not of its embeddings")
        entries = Embeddings([str(n) for n in range(len(matrix))], matrix)  # nobody is named
        return Cohort(entries, mean, method, int(top_n))
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: damaged, or not a cohort ({error})") from None
