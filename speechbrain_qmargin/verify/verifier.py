"""Enrol people, verify who somebody claims to be, find who somebody is."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from speechbrain_qmargin.export.encoder import SpeakerEncoder
from speechbrain_qmargin.export.loading import is_exported, load_any_encoder
from speechbrain_qmargin.export.probe import TOLERANCE
from speechbrain_qmargin.files import is_lack
from speechbrain_qmargin.published import split_format
from speechbrain_qmargin.training.layout import INFERENCE, is_run
from speechbrain_qmargin.verify.people import People, checked_name
from speechbrain_qmargin.verify.readers import (
    FaceReader,
    Quality,
    Reader,
    Sample,
    Source,
    SpeechReader,
    Unfit,
)
from speechbrain_qmargin.verify.system import NoThreshold, System, Vectors, when_written

__all__ = [
    "Candidate",
    "Decision",
    "Enrolment",
    "Found",
    "Verifier",
    "load_reader",
    "people_file",
    "place_of",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Decision:
    """Whether two are taken to be one person.

    Attributes
    ----------
    score : float
        Of the system's kind.
    llr : float or None
        Its natural log-likelihood ratio; None without a calibration.
    accept : bool
        ``score >= threshold``.
    threshold : float
    quality : SpeechQuality or FaceQuality
        Of the recording that was verified.
    kind : str
        What the score is.
    notes : tuple of str
        What makes the promise of the threshold doubtful here.

    Examples
    --------
    >>> from speechbrain_qmargin.verify.speech_quality import measure_speech
    >>> quality = measure_speech(np.zeros(8000), 16000)
    >>> decision = Decision(0.31, None, False, threshold=0.42, quality=quality, kind="cosine")
    >>> decision.accept, decision.quality.seconds
    (False, 0.5)
    """

    score: float
    llr: float | None
    accept: bool
    threshold: float
    quality: Quality
    kind: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """Somebody who is enrolled, with the score of a recording.

    Attributes
    ----------
    name : str
    score : float
        Of the system's kind.
    llr : float or None
        Its natural log-likelihood ratio; None without a calibration.
    accept : bool
        Whether it reaches the threshold.

    Examples
    --------
    >>> Candidate("Ann", 0.71, None, accept=True).name
    'Ann'
    """

    name: str
    score: float
    llr: float | None
    accept: bool


@dataclass(frozen=True)
class Found:
    """Who somebody may be.

    Attributes
    ----------
    candidates : list of Candidate
        The nearest, best first.
    name : str or None
        The first, if accepted.
    searched : int
        People who were compared with.
    left_out : int
        People enrolled with another encoder.
    false_alarm : float
        The chance that a stranger finds somebody is at most this: the most that the threshold's
        false-accept rate may be times the people searched (Boole's inequality), see
        :attr:`~speechbrain_qmargin.scoring.decision.OperatingPoint.highest_far`.
    threshold : float
    quality : SpeechQuality or FaceQuality
    kind : str

    Examples
    --------
    >>> from speechbrain_qmargin.verify.speech_quality import measure_speech
    >>> quality = measure_speech(np.zeros(8000), 16000)
    >>> ann = Candidate("Ann", 0.71, None, accept=True)
    >>> found = Found([ann], "Ann", searched=50, left_out=0, false_alarm=50 * 0.001,
    ...               threshold=0.42, quality=quality, kind="cosine")
    >>> found.name, found.false_alarm
    ('Ann', 0.05)
    """

    candidates: list[Candidate]
    name: str | None
    searched: int
    left_out: int
    false_alarm: float
    threshold: float
    quality: Quality
    kind: str


class Enrolment(NamedTuple):
    """What was enrolled.

    Examples
    --------
    >>> Enrolment(recordings=3, added=[]).recordings
    3
    """

    recordings: int
    """Of the person, with those that were there."""
    added: list[Quality]
    """What was measured on each that was given."""


@dataclass
class _Held:
    """Templates in memory, of one state of the file of enrolments and one system."""

    version: tuple[int, ...]
    system: System | None = None
    templates: dict[str, tuple[Vectors, int]] = field(default_factory=dict)
    gallery: tuple[list[str], Vectors] | None = None


class Verifier:
    """An encoder with its threshold and the people who are enrolled. Safe in several threads.

    Parameters
    ----------
    reader : Reader
    people : People
    system : System or callable
        Callable: gives it, or raises what is to be said, when a decision is asked for; people can
        be enrolled before.
    at_once : int
        Files that are decoded and checked at once, by all threads together: a compressed file
        takes many times its size in memory.
    changed : callable, optional
        Gives what is another once a callable `system` would give another; asked before every
        decision. If that is none for this encoder, the one before stays, and the log says so.

    Raises
    ------
    ValueError
        `at_once` below 1.

    Examples
    --------
    >>> from speechbrain_qmargin.scoring.decision import choose_operating_point
    >>> from speechbrain_qmargin.scoring.metrics import operating_points
    >>> class Written:      # a reader of embeddings as text
    ...     modality, digest, rules = "speech", "encoder 1", ""
    ...
    ...     def read(self, source):
    ...         return Sample([torch.tensor([float(number) for number in source.split()])], None)
    ...
    ...     def embed(self, samples):
    ...         return np.stack([sample.inputs[0].numpy() for sample in samples])
    >>> points = operating_points(np.array([0.0, 0.25, 0.75]), np.array([False, False, True]))
    >>> system = System(choose_operating_point("demo", points, 0.01, kind="cosine"))
    >>> people = People(getfixture("tmp_path") / "people.sqlite")
    >>> verifier = Verifier(Written(), people, system)
    >>> _ = verifier.enrol("Ann", b"1 0")
    >>> decision = verifier.verify("Ann", b"3 4")
    >>> round(decision.score, 4), decision.threshold, decision.accept
    (0.6, 0.5, True)
    >>> found = verifier.identify(b"0 1")           # at right angles to Ann
    >>> [one.name for one in found.candidates], found.name
    (['Ann'], None)
    >>> verifier.erase("Ann")
    1
    >>> people.close()
    """

    def __init__(
        self,
        reader: Reader,
        people: People,
        system: System | Callable[[], System],
        at_once: int = 4,
        changed: Callable[[], object] = tuple,
    ) -> None:
        if at_once < 1:
            raise ValueError(f"at_once is {at_once}; one file at least")
        self.reader, self.people = reader, people
        self._at_once, self._reading = at_once, threading.BoundedSemaphore(at_once)
        self._system = system if isinstance(system, System) else None
        self._find_system, self._changed, self._seen = system, changed, changed()
        self._lock = threading.Lock()
        self._held = _Held(())

    @classmethod
    def load(
        cls,
        folder: str | Path,
        people: str | Path | None = None,
        *,
        device: str | torch.device = "cpu",
        trust: bool | Collection[str] = False,
        **options: Any,
    ) -> Verifier:
        """The verifier of an encoder's folder.

        Parameters
        ----------
        folder : path
            A run's output folder, an inference folder or a published model.
        people : path, optional
            The file of enrolments; by default ``<inference folder>.people.sqlite`` beside the
            folder, so that neither a copy nor a new export of the encoder touches it.
        device : str or torch.device
        trust : bool or collection of str
            As in :func:`~speechbrain_qmargin.export.encoder.load_encoder`.
        **options
            Of the reader: ``limits``, ``checked``, of speech ``window``.

        Raises
        ------
        FileNotFoundError, ValueError, OSError
            As :func:`~speechbrain_qmargin.export.encoder.load_encoder` and
            :class:`~speechbrain_qmargin.verify.people.People`. A threshold that is missing or not
            of this encoder is an error when a decision is asked for. Enrolments within the folder,
            which an export replaces.
        """
        place = place_of(folder)
        file = people_file(folder) if people is None else Path(people)
        if is_exported(place) and place.resolve() in file.resolve().parents:
            raise ValueError(
                f"{file}: within the encoder's folder, which `qmargin export` replaces with all in "
                f"it; keep enrolments elsewhere, as in {people_file(folder)}"
            )
        reader = load_reader(folder, device, trust, **options)
        return cls(
            reader,
            People(file),
            lambda: System.load(place, reader.digest),
            changed=lambda: when_written(place),
        )

    @property
    def system(self) -> System:
        """How scores are made and decided; raises if no threshold was measured."""
        with self._lock:
            seen = self._changed()
            if self._system is None or seen != self._seen:
                assert not isinstance(self._find_system, System)
                try:
                    self._system = self._find_system()
                except NoThreshold as error:
                    if self._system is None:
                        raise
                    logger.warning(f"decisions go on with the threshold of before: {error}")
                self._seen = seen
            return self._system

    # ---------------------------------------------------------------- reading

    def _samples(self, sources: Sequence[Source]) -> list[Sample | Exception]:
        """Read in threads; what cannot be read or is not fit stands in its place."""

        def read(source: Source) -> Sample | Exception:
            try:
                with self._reading:
                    return self.reader.read(source)
            except (OSError, Unfit) as error:
                if is_lack(error):
                    raise
                return error

        if len(sources) == 1:
            return [read(sources[0])]
        with ThreadPoolExecutor(min(self._at_once, len(sources) or 1)) as pool:
            return list(pool.map(read, sources))

    def _tests(self, samples: Sequence[Sample], system: System) -> list[Vectors]:
        """One by one, so that no score rounds otherwise for what else is in a batch."""
        return [system.vectors([row[None]]) for row in self.reader.embed(samples)]

    # ---------------------------------------------------------------- enrolment

    def enrol(
        self, name: str, recordings: Source | Iterable[Source], replace: bool = False
    ) -> Enrolment:
        """Enrol somebody, or add recordings to those enrolled: all of them or none.

        Parameters
        ----------
        name : str
        recordings : path, bytes, or several
            Files, or the contents of files.
        replace : bool
            In the place of what was enrolled, whatever encoder that was of.

        Returns
        -------
        Enrolment
            How many recordings of the person there are now, and the SpeechQuality or FaceQuality
            of each that was added.

        Raises
        ------
        Unfit
            A recording that is too short, too quiet, clipped, no speech, ...; every one that is, by
            name, in one error. One that is enrolled already, or given twice: it would count as two.
        OSError, ValueError
            One that cannot be decoded; a name that is none; templates of another encoder.
        """
        checked_name(name)
        given = [recordings] if isinstance(recordings, str | Path | bytes) else list(recordings)
        if not given:
            raise ValueError(f"no recordings to enrol {name!r} from")
        found = self._samples(given)
        bad = [one for one in found if isinstance(one, Exception)]
        if len(bad) > 1:
            number = f"{len(bad)} of {len(given)} recordings"
            raise Unfit(f"{number} cannot be enrolled", [str(one) for one in bad])
        if bad:
            raise bad[0]
        samples = [one for one in found if isinstance(one, Sample)]
        qualities = [one.quality for one in samples]
        embeddings = self.reader.embed(samples)

        def refuse_repeated(held: np.ndarray) -> None:
            for n, row in enumerate(embeddings):
                apart = np.linalg.norm(np.concatenate((held, embeddings[:n])) - row, axis=1)
                if (apart <= TOLERANCE * np.linalg.norm(row)).any():
                    twice = apart.argmin() >= len(held)
                    how = "it is given twice" if twice else "it is enrolled already"
                    raise Unfit(given[n], [how], qualities[n])

        encoder = self.reader.digest
        count = self.people.enrol(name, embeddings, encoder, qualities, replace, refuse_repeated)
        return Enrolment(count, qualities)

    def erase(self, name: str) -> int:
        """Erase a person from the file and from memory; the number of recordings there were.

        Raises
        ------
        NotEnrolled
            Nobody of that name.
        """
        count = self.people.delete(name)
        self._now()
        return count

    def _now(self, system: System | None = None) -> _Held:
        """What is held in memory of the file as it is; what was of it before is let go."""
        version = self.people.version()
        with self._lock:
            if self._held.version != version or self._held.system is not system:
                self._held = _Held(version, system)
            return self._held

    def _template(self, name: str, system: System) -> tuple[Vectors, int]:
        """A person's, as of now, and from how many recordings."""
        held = self._now(system).templates
        found = held.get(name)
        if found is None:
            embeddings = self.people.embeddings(name, self.reader.digest)
            found = system.vectors([embeddings]), len(embeddings)
            if len(held) > 10_000:
                held.clear()
            held[name] = found
        return found

    def _everybody(self, system: System) -> tuple[list[str], Vectors | None]:
        held = self._now(system)
        if held.gallery is None:
            found = self.people.everybody(self.reader.digest)
            if not found:
                return [], None
            held.gallery = list(found), system.vectors(list(found.values()))
        return held.gallery

    # ---------------------------------------------------------------- decisions

    def verify(self, name: str, recording: Source) -> Decision:
        """Whether a recording is of the person that is enrolled as `name`.

        Raises
        ------
        NotEnrolled
            Nobody is enrolled as `name`.
        Unfit, OSError
            The recording is not fit, or cannot be decoded.
        NoThreshold, OtherEncoder
            No threshold, or one of another encoder or score; templates of another encoder.
        """
        system = self.system
        template = self._template(name, system)
        return _or_raise(self._decide_all([template], self._samples([recording]), system)[0])

    def verify_many(
        self, claims: Sequence[tuple[str, Source]]
    ) -> list[Decision | OSError | ValueError]:
        """Decisions on many claims, in their order; what cannot be decided is the error itself."""
        system = self.system  # without a threshold nothing is read
        templates: list[Any] = []
        for name, _ in claims:
            try:
                templates.append(self._template(name, system))
            except ValueError as error:
                templates.append(error)
        results: list[Any] = []
        for start in range(0, len(claims), 64):  # what is held in memory at once
            part = slice(start, start + 64)
            samples = self._samples([source for _, source in claims[part]])
            results += self._decide_all(templates[part], samples, system)
        return results

    def compare(self, one: Source, other: Source) -> Decision:
        """Whether two recordings are of one person, whoever that is; `quality` is the second's.

        Raises
        ------
        Unfit, OSError, NoThreshold
            As :meth:`verify`.
        """
        system = self.system
        first, second = (_or_raise(sample) for sample in self._samples([one, other]))
        (template,) = self._tests([first], system)
        return _or_raise(self._decide_all([(template, 1)], [second], system)[0])

    def _decide_all(
        self, templates: Sequence[Any], samples: Sequence[Any], system: System
    ) -> list[Any]:
        """A decision for each, or the error that stands for its template or its sample."""
        results = [
            first if isinstance(first, Exception) else second
            for first, second in zip(templates, samples, strict=True)
        ]
        open_ = [n for n, one in enumerate(results) if isinstance(one, Sample)]
        if not open_:
            return results
        tests = self._tests([samples[n] for n in open_], system)
        for test, n in zip(tests, open_, strict=True):
            template, count = templates[n]
            score = float(system.scores(template, test)[0, 0])
            results[n] = Decision(
                score=score,
                llr=system.llr(score),
                accept=system.accepts(score),
                threshold=system.point.threshold,
                quality=samples[n].quality,
                kind=system.kind,
                notes=_notes(system, count),
            )
        return results

    def identify(self, recording: Source, max_candidates: int = 5) -> Found:
        """Who of those enrolled with this encoder a recording may be of.

        Parameters
        ----------
        recording : path or bytes
        max_candidates : int
            Candidates to be named.

        Raises
        ------
        Unfit, OSError, NoThreshold, ValueError
            As :meth:`verify`; nobody is enrolled.
        """
        nobody = f"{self.people.path}: nobody is enrolled with this encoder"
        if not len(self.people):
            raise ValueError(nobody)
        system = self.system
        names, gallery = self._everybody(system)
        if gallery is None:
            raise ValueError(nobody)
        sample = _or_raise(self._samples([recording])[0])
        scores = system.scores(gallery, self._tests([sample], system)[0])[:, 0]
        best = np.argsort(-scores, kind="stable")[: max(1, max_candidates)]
        candidates = [
            Candidate(names[n], score, system.llr(score), system.accepts(score))
            for n, score in zip(best.tolist(), scores[best].tolist(), strict=True)
        ]
        return Found(
            candidates=candidates,
            name=candidates[0].name if candidates[0].accept else None,
            searched=len(names),
            left_out=max(0, len(self.people) - len(names)),  # somebody may be erased meanwhile
            false_alarm=min(1.0, len(names) * system.point.highest_far),
            threshold=system.point.threshold,
            quality=sample.quality,
            kind=system.kind,
        )


def _or_raise(found: T | Exception) -> T:
    if isinstance(found, Exception):
        raise found
    return found


def _notes(system: System, count: int) -> tuple[str, ...]:
    notes, point = [], system.point
    if point.enrolled_from and point.enrolled_from != count:
        many = "1 recording" if point.enrolled_from == 1 else f"{point.enrolled_from} recordings"
        notes.append(f"the threshold was measured with {many} an enrolment; this has {count}")
    if point.optimistic:
        notes.append(f"the threshold is {point.doubt}")
    if point.mark == "unsupported":
        notes.append("the threshold's error rates rest on too few people or errors")
    return tuple(notes)


def place_of(encoder: str | Path) -> Path:
    """Where an encoder's threshold lies.

    A run's ``inference/``, or the inference folder itself; of a published model, which is left as
    it is, ``<file or folder>.verifier`` beside it, whether or not its format is named before it.

    Examples
    --------
    >>> place_of("models/voices.onnx").name
    'voices.onnx.verifier'
    >>> run = getfixture("tmp_path")
    >>> (run / "save").mkdir()
    >>> place_of(run).name
    'inference'
    """
    path = split_format(encoder)[1]
    if path.name in ("", ".."):
        path = path.resolve()
    if is_run(path):
        return path / INFERENCE
    return path if is_exported(path) else path.with_name(f"{path.name}.verifier")


def people_file(encoder: str | Path) -> Path:
    """The file of enrolments that belongs to an encoder: beside where its threshold is.

    Examples
    --------
    >>> people_file("models/voices.onnx").name
    'voices.onnx.verifier.people.sqlite'
    """
    place = place_of(encoder)
    return place.with_name(f"{place.name}.people.sqlite")


def load_reader(
    encoder: str | Path,
    device: str | torch.device = "cpu",
    trust: bool | Collection[str] = False,
    **options: Any,
) -> Reader:
    """The reader of an encoder, of speech or of faces.

    Parameters
    ----------
    encoder : path
        A run's output folder, an inference folder, or a published model
        (:func:`~speechbrain_qmargin.published.load_published`).
    device : str or torch.device
    trust : bool or collection of str
        As in :func:`~speechbrain_qmargin.export.encoder.load_encoder`.
    **options
        Of the reader.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "hyperparams.yaml").write_text(
    ...     "image_size: 32\\nmodules: {embedding_model: "
    ...     "!new:torch.nn.Conv2d {in_channels: 3, out_channels: 8, kernel_size: 32}}"
    ... )
    >>> torch.save(torch.nn.Conv2d(3, 8, 32).state_dict(), folder / "embedding_model.ckpt")
    >>> load_reader(folder, batch=4).modality
    'faces'
    """
    loaded = load_any_encoder(encoder, device, trust)
    if isinstance(loaded, SpeakerEncoder):
        return SpeechReader(loaded, **options)
    return FaceReader(loaded, **options)
