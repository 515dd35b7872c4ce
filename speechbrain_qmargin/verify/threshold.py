"""A threshold on one's own people: from folders of their recordings or images to a system.

The people are divided into two halves by their names' digests. The threshold is chosen on the pairs
of one half, and what it promises is measured on the other.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from speechbrain_qmargin.embeddings import Embeddings, cosine_scores
from speechbrain_qmargin.extraction import Inputs, extract_items, folder_of_model
from speechbrain_qmargin.scoring.calibration import Calibration, digest, fit_calibration
from speechbrain_qmargin.scoring.decision import choose_operating_point
from speechbrain_qmargin.scoring.influence import TrialStructure
from speechbrain_qmargin.scoring.lists import Cohort
from speechbrain_qmargin.scoring.metrics import OperatingPoints, eer, operating_points
from speechbrain_qmargin.scoring.pairing import every_model, every_pair, spread_over_sessions
from speechbrain_qmargin.scoring.separation import name_digest
from speechbrain_qmargin.scoring.uncertainty import FEWEST_ERRORS, Spread
from speechbrain_qmargin.trials import LabelledTrials, speaker_in
from speechbrain_qmargin.verify.readers import Reader
from speechbrain_qmargin.verify.system import Histogram, System, cohort_digest

__all__ = ["Measured", "cohort_of", "embed_files", "measure_threshold"]

FEWEST_PEOPLE = 8  # of both halves together; with fewer there is one half
_MOST = 4000  # recordings of a half: 8 million pairs
_AT_ONCE = 16  # embedded together; twice as many are read ahead


@dataclass(frozen=True)
class Measured:
    """What :func:`measure_threshold` found.

    Attributes
    ----------
    system : System
    eer : float
        Of the half that it was measured on.
    people : (int, int)
        On which it was chosen and measured.
    notes : tuple of str
        What makes it doubtful: few people, no calibration.

    Examples
    --------
    >>> voices = np.repeat(np.eye(4), 2, 0) + 0.1 * np.random.default_rng(0).normal(size=(8, 4))
    >>> ids = [f"{person}/{take}" for person in "abcd" for take in "12"]
    >>> found = measure_threshold(Embeddings(ids, voices.astype("f")), "encoder 1", 0.1)
    >>> found.people, found.eer, found.system.point.optimistic  # too few for two halves
    ((4, 4), 0.0, True)
    >>> found.notes[0]
    'it is chosen on 24 impostor trials of 4 people; a false-accept rate of 0.1 wants 300 ...'
    """

    system: System
    eer: float
    people: tuple[int, int]
    notes: tuple[str, ...]


def embed_files(
    reader: Reader,
    inputs: Inputs,
    folder: str | Path,
    progress: Callable[[int], object] | None = None,
) -> tuple[Embeddings, dict[str, str]]:
    """Embed what is fit, as :class:`~speechbrain_qmargin.verify.verifier.Verifier` would.

    Parameters
    ----------
    reader : Reader
    inputs : Inputs
    folder : path
        Where embeddings are kept on their way; interrupted, it goes on there. Those of another
        encoder or of other rules go.
    progress : callable, optional
        Called with how many were done since the last call.

    Returns
    -------
    Embeddings, and what is wrong with the others by id.

    Raises
    ------
    ValueError
        None is fit.

    Examples
    --------
    >>> import torch
    >>> from speechbrain_qmargin.verify.readers import Sample
    >>> class Written:      # a reader of embeddings as text
    ...     modality, digest, rules = "speech", "encoder 1", ""
    ...
    ...     def read(self, source):
    ...         if not source:
    ...             raise OSError("the content is empty")
    ...         return Sample([torch.tensor([float(number) for number in source.split()])], None)
    ...
    ...     def embed(self, samples):
    ...         return np.stack([sample.inputs[0].numpy() for sample in samples])
    >>> files = Inputs({"ann/1": b"1 0", "bob/1": b"0 1", "bob/2": b""}, bytes)
    >>> found, faults = embed_files(Written(), files, getfixture("tmp_path") / "parts")
    >>> list(found), faults
    (['ann/1', 'bob/1'], {'bob/2': 'the content is empty'})
    """
    model = f"{reader.digest} verified {reader.rules}"
    merged, faults = extract_items(
        folder_of_model(folder, model),
        model,
        inputs,
        reader.read,
        reader.embed,
        batch_size=_AT_ONCE,
        progress=progress,
    )
    if not merged:
        raise ValueError(f"none of {len(faults)} files is fit: {next(iter(faults.values()), '')}")
    return Embeddings.of(merged), faults


def cohort_of(
    embeddings: Embeddings, method: str = "as", top_n: int | None = None, centre: bool = True
) -> Cohort:
    """The cohort of other people's embeddings, whose ids begin with the person and a slash.

    Parameters
    ----------
    embeddings : Embeddings
    method : {"as", "s", "z", "t"}
    top_n : int, optional
        By default a third of the people, from 2 to 300.
    centre : bool
        Whether their mean is subtracted from everything.

    Examples
    --------
    >>> raw = Embeddings(["ann/1", "ann/2", "bob/1"], np.array([[1, 0], [1, 0.2], [0, 1]]))
    >>> cohort = cohort_of(raw)
    >>> cohort.kind, cohort.speakers, cohort.top_n
    ('as-norm', ('ann', 'bob'), 2)
    >>> cohort_of(Embeddings(["ann/1"], np.eye(1)))
    Traceback (most recent call last):
    ValueError: the cohort has 1 people; dozens at least are wanted
    """
    people = {name: speaker_in(name) for name in embeddings.ids}
    count = len(set(people.values()))
    if count < 2:
        raise ValueError(f"the cohort has {count} people; dozens at least are wanted")
    top = min(300, max(2, count // 3)) if top_n is None else top_n
    if not 2 <= top <= count:
        raise ValueError(f"top_n is {top}; from 2 to the cohort's {count} people")
    # embedded here, each is of a recording, also where a person has but one; in a file, who knows
    mean = embeddings.mean() if centre and not embeddings.source else None
    return Cohort.of(embeddings, people, method, top, centre=centre, mean=mean)


def measure_threshold(
    embeddings: Embeddings,
    encoder: str,
    far: float = 0.01,
    *,
    cohort: Cohort | None = None,
    enrol_with: int = 1,
    max_per_person: int = 10,
    source: str = "people",
    p_target: float = 0.01,
) -> Measured:
    """Choose a threshold on one half of the people, and measure it on the other.

    Parameters
    ----------
    embeddings : Embeddings
        Ids are ``<person>/...``; folders between the person and the file are sessions.
    encoder : str
        The digest of the encoder that made them.
    far : float
        The share of impostors that may be accepted.
    cohort : Cohort, optional
        Of other people; scores are then normalised.
    enrol_with : int
        Recordings of an enrolment.
    max_per_person : int
        Recordings of a person, at most; more than `enrol_with`, so that some are left to be tried.
        Of many people fewer are taken, and of very many people some are drawn, by their names'
        digests: a half has 4,000 recordings, 8 million pairs, at most.
    source : str
        What the people are called.
    p_target : float
        Of the calibration.

    Raises
    ------
    ValueError
        Fewer than 2 people with enough recordings; people of the cohort among them; a
        `max_per_person` that leaves none to be tried.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> ids = [f"{person}/{take}" for person in range(40) for take in range(4)]
    >>> voices = np.repeat(rng.normal(size=(40, 8)), 4, 0) + 0.7 * rng.normal(size=(160, 8))
    >>> found = measure_threshold(Embeddings(ids, voices.astype("f")), "encoder 1", 0.05)
    >>> found.people, found.system.point.kind, found.system.point.optimistic
    ((20, 20), 'cosine', False)
    """
    if enrol_with < 1:
        raise ValueError(f"enrol_with is {enrol_with}; a recording at least")
    if max_per_person <= enrol_with:
        raise ValueError(
            f"max_per_person is {max_per_person}: enrolments of {enrol_with} leave none to be "
            f"tried; {enrol_with + 1} at least"
        )
    recordings = defaultdict(list)
    for name in embeddings.ids:
        if "/" not in name:
            raise ValueError(
                f"{name}: its id names no person; files lie in a folder of each person"
            )
        recordings[speaker_in(name)].append(name)
    able = sorted(
        (one for one, names in recordings.items() if len(names) > enrol_with), key=name_digest
    )
    if len(able) < 2:
        raise ValueError(
            f"{source}: {len(able)} people have more than {enrol_with} usable recordings; 2 at "
            "least, dozens for a threshold to rely on"
        )
    if cohort is not None:
        cohort.refuse_speakers_of([every_pair({one: recordings[one][:1] for one in able})])
    apart = len(able) >= FEWEST_PEOPLE
    fitting = max(FEWEST_PEOPLE, _MOST // (enrol_with + 1))  # people of a half
    drawn = able[: 2 * fitting if apart else fitting]
    halves = (drawn[::2], drawn[1::2]) if apart else (drawn, drawn)
    most = max(enrol_with + 1, min(max_per_person, _MOST // len(halves[0])))
    lists = []
    for names, part in zip(halves, ("chosen", "measured"), strict=True):
        chosen = {one: sorted(spread_over_sessions(recordings[one], most)) for one in sorted(names)}
        trials = every_pair(chosen) if enrol_with == 1 else every_model(chosen, enrol_with)
        if not trials.is_target.any() or trials.is_target.all():
            raise ValueError(f"{source}: no pairs of one person, or none of two")
        about = f"{part}: {len(names)} people of {source}, sha256:{digest(trials)[:16]}"
        lists.append(replace(trials, source=about))
    kind = "cosine" if cohort is None else cohort.kind
    held = cohort_digest(cohort)
    scores = [_scores(embeddings, trials, cohort) for trials in lists]
    points = [operating_points(s, t.is_target) for s, t in zip(scores, lists, strict=True)]
    structure = TrialStructure.of(lists[1])
    point = choose_operating_point(
        "verifier",
        points[1],
        far,
        development=points[0] if apart else None,
        measured_on=lists[1].source,
        chosen_on=lists[0].source,
        speakers=structure.contributing,
        kind=kind,
        scores=f"sha256:{hashlib.sha256(scores[0].tobytes()).hexdigest()}",
        encoder=encoder,
        cohort=held,
        enrolled_from=enrol_with,
        spread=Spread(scores[1], lists[1], points[1], structure),
    )
    notes = _asked(far, points[0], len(halves[0]))
    if len(drawn) < len(able):
        notes.append(f"of {len(able):,} people {len(drawn):,} were drawn, by their names' digests")
    calibration: Calibration | None = None
    try:
        calibration = fit_calibration(
            scores[0], lists[0], p_target=p_target, kind=kind, encoder=encoder, cohort=held
        )
    except (ValueError, ImportError) as error:
        notes.append(f"no calibration, hence no likelihood ratios: {error}")
    histogram = Histogram.of(scores[1], lists[1].is_target, kind, encoder)
    system = System(point, cohort, calibration, histogram)
    return Measured(system, eer(points[1]), (len(halves[0]), len(halves[1])), tuple(notes))


def _asked(far: float, points: OperatingPoints, people: int) -> list[str]:
    wanted = FEWEST_ERRORS / far
    if points.num_impostors >= wanted:
        return []
    return [
        f"it is chosen on {points.num_impostors:,} impostor trials of {people} people; a "
        f"false-accept rate of {far:g} wants {wanted:,.0f} ({FEWEST_ERRORS} errors)"
    ]


def _scores(embeddings: Embeddings, trials: LabelledTrials, cohort: Cohort | None) -> np.ndarray:
    if cohort is None:
        return cosine_scores(embeddings, trials).astype(np.float64)
    return cohort.scores(embeddings, trials, quiet=True)
