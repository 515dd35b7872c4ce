"""Trials: which recordings are compared, which of them are one speaker's, and who speaks.

The objects go from a list that was read (:func:`~speechbrain_qmargin.trials.lists.read_trials`) to
the last figure. A list may name enrolment models, each of several recordings
(:meth:`Trials.with_models`).
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from speechbrain_qmargin.tables import composed_name, some
from speechbrain_qmargin.trials.ids import speaker_in

__all__ = ["Distinct", "LabelledTrials", "Lost", "Trials", "as_labels", "index_pairs"]

AnyTrials = TypeVar("AnyTrials", bound="Trials")


def as_labels(labels: ArrayLike, name: str = "labels") -> np.ndarray:
    """Labels as bool: as an index, or behind "not", 1 and 0 are something else.

    Raises
    ------
    ValueError
        What is neither True nor False, 1 nor 0: to numpy -1, NaN and "nontarget" are all true.

    Examples
    --------
    >>> as_labels([1, 0, 1])
    array([ True, False,  True])
    >>> as_labels([1, -1])
    Traceback (most recent call last):
    ValueError: labels: a label is neither True nor False, 1 nor 0: -1
    """
    found = np.asarray(labels)
    if found.dtype == bool:
        return found
    known = found.dtype.kind not in "US" and np.isin(found, (0, 1))
    if not np.all(known):
        first = found[~np.broadcast_to(known, found.shape)].flat[0]
        raise ValueError(f"{name}: a label is neither True nor False, 1 nor 0: {first}")
    return found.astype(bool)


@dataclass(frozen=True)
class Lost:
    """What could not be scored: failures to acquire and to enrol (ISO/IEC 19795-1).

    Attributes
    ----------
    recordings, tried : int
        Recordings that failed, of how many that the trials need.
    models, tried_models : int
        Enrolment models without a recording left, of how many.
    targets, impostors : int
        Trials that went with them; a pair counts once, whatever its order, as in figures.

    Raises
    ------
    ValueError
        A number below 0, or none; named.

    Examples
    --------
    >>> print(Lost(recordings=1, tried=10, targets=20, impostors=40))
    failure to acquire 1 of 10 recordings (10.00 %): 20 target and 40 impostor trials are lost
    """

    recordings: int
    tried: int
    targets: int
    impostors: int
    models: int = 0
    tried_models: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, numbers.Integral) or value < 0:
                raise ValueError(f"{name} is {value!r}, not a count")

    def __str__(self) -> str:
        rate = 100 * self.recordings / self.tried if self.tried else 0.0
        text = f"failure to acquire {self.recordings:,} of {self.tried:,} recordings ({rate:.2f} %)"
        if self.tried_models:
            rate = 100 * self.models / self.tried_models
            text += (
                f", failure to enrol {self.models:,} of {self.tried_models:,} models ({rate:.2f} %)"
            )
        return f"{text}: {self.targets:,} target and {self.impostors:,} impostor trials are lost"

    def rejected(self, misses: int, targets: int) -> float:
        """The share of target trials rejected at a threshold, lost ones among them.

        Examples
        --------
        >>> Lost(1, 10, 20, 40).rejected(10, 80)
        0.3
        """
        return (misses + self.targets) / (targets + self.targets)


@dataclass(frozen=True)
class Trials:
    """Pairs of recordings, or of enrolment models and recordings, by index into their ids.

    Attributes
    ----------
    ids : list of str
        Every model and recording of the trials once.
    enrolment, test : int arrays [N]
        Indices into `ids`.
    is_target : bool array [N] or None
        Given as 1 and 0 it is made such. None where nobody has said: such trials can be scored, not
        evaluated. Of :class:`LabelledTrials` it is always there.
    source : str
        The user's file by name and SHA-256, empty for trials made in memory.
    speaker_of : sequence of str, optional
        The speaker of every id, where the ids themselves do not tell.
    models : mapping from id to tuple of str
        The recordings of every id that is a model; empty where recordings are enrolled.
    lost : Lost, optional
        What :meth:`without` left out.

    Raises
    ------
    ValueError
        Sides or labels of other lengths, sides that are no indices of ids, labels that are neither
        true nor false.

    Examples
    --------
    >>> trials = Trials(["a/1", "a/2", "b/1"], np.array([0, 0]), np.array([1, 2]))
    >>> len(trials), trials.pair(1), trials.speaker_names()
    (2, 'a/1 b/1', ['a', 'a', 'b'])
    >>> left = trials.without(["a/2"])
    >>> len(left), left.lost.recordings
    (1, 1)
    """

    ids: list[str]
    enrolment: np.ndarray
    test: np.ndarray
    is_target: np.ndarray | None = None
    source: str = ""
    speaker_of: Sequence[str] | None = None
    models: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    lost: Lost | None = None

    def __post_init__(self) -> None:
        sides = np.asarray(self.enrolment), np.asarray(self.test)
        for name, side in zip(("enrolment", "test"), sides, strict=True):
            if side.ndim != 1 or (len(side) and side.dtype.kind not in "iu"):
                raise ValueError(f"{name}: {side.dtype} {side.shape}, not the indices [N] of ids")
            if len(side) and not 0 <= (low := side.min()) <= (high := side.max()) < len(self.ids):
                raise ValueError(f"{name}: {low} to {high}, not indices of {len(self.ids)} ids")
            if side.dtype.kind != "i":  # unsigned ones mix with others as floats
                side = side.astype(np.int64)
            object.__setattr__(self, name, side)
        if len(sides[0]) != len(sides[1]):
            raise ValueError(f"{len(sides[0])} enrolments and {len(sides[1])} tests")
        if self.is_target is None:
            return
        labels = as_labels(self.is_target, self.name)
        if len(labels) != len(self):
            raise ValueError(f"{len(self)} trials and {len(labels)} labels")
        object.__setattr__(self, "is_target", labels)

    def __len__(self) -> int:
        return len(self.enrolment)

    @property
    def name(self) -> str:
        """What messages call the list."""
        return self.source.split(" sha256:", 1)[0] or "trials"

    @cached_property
    def recordings(self) -> list[str]:
        """Every recording that an embedding is needed of: those of the models, not their names."""
        names = dict.fromkeys(name for name in self.ids if name not in self.models)
        return list(names | dict.fromkeys(one for many in self.models.values() for one in many))

    def pair(self, index: int) -> str:
        """A trial for a message."""
        return f"{self.ids[self.enrolment[index]]} {self.ids[self.test[index]]}"

    def labelled(self) -> LabelledTrials:
        """The same trials, known to have labels.

        Raises
        ------
        ValueError
            They have none.
        """
        if self.is_target is None:
            raise ValueError(
                f"{self.name}: it does not say which trials are targets; give the trial list that "
                "does (--trials)"
            )
        if isinstance(self, LabelledTrials):
            return self
        return LabelledTrials(
            self.ids,
            self.enrolment,
            self.test,
            self.is_target,
            self.source,
            self.speaker_of,
            self.models,
            self.lost,
        )

    def with_speakers(self: AnyTrials, speakers: Mapping[str, str]) -> AnyTrials:
        """The same trials, with the speaker of every id (Kaldi's utt2spk).

        :func:`~speechbrain_qmargin.tables.read_map` reads such a mapping.
        A model that the mapping does not name has its recordings' speaker.

        Raises
        ------
        ValueError
            An id without a speaker, a model of several speakers; named.
        """
        found, missing = [], []
        for name in self.ids:
            own = [name, *self.models.get(name, ())]
            known = sorted({composed_name(speakers[one]) for one in own if one in speakers})
            if len(known) > 1:
                raise self._of_several(name, known)
            found.append(known[0] if known else "")
            missing += [] if known else [name]
        if missing:
            raise ValueError(f"{len(missing)} recordings have no speaker: {some(missing)}")
        return replace(self, speaker_of=found)

    def _of_several(self, model: str, speakers: Sequence[str]) -> ValueError:
        return ValueError(
            f"{self.name}: the model {model} is of several speakers: {some(speakers)}"
        )

    def with_models(self: AnyTrials, models: Mapping[str, Sequence[str]]) -> AnyTrials:
        """The same trials, whose enrolment ids name models of several recordings.

        Parameters
        ----------
        models : mapping from model to its recordings
            From :func:`~speechbrain_qmargin.tables.read_models`; those that no trial names are
            left out.

        Raises
        ------
        ValueError
            An enrolment id that is no model, or a model that is also a test recording; named.
        """
        named = [self.ids[n] for n in np.unique(self.enrolment).tolist()]
        missing = [name for name in named if not models.get(name)]
        if missing:
            known = next(iter(models), "none")
            raise ValueError(
                f"{self.name}: {len(missing)} enrolment models have no recordings: {some(missing)} "
                f"(there is {known})"
            )
        tested = {self.ids[n] for n in np.unique(self.test).tolist()}
        both = [name for name in named if name in tested]
        if both:
            raise ValueError(
                f"{self.name}: {len(both)} names are a model and a test recording: {some(both)}"
            )
        return replace(self, models={name: tuple(models[name]) for name in named})

    def renamed(self: AnyTrials, names: Mapping[str, str]) -> AnyTrials:
        """The same trials with other ids, of recordings and of models' recordings."""
        models = {
            model: tuple(names.get(one, one) for one in recordings)
            for model, recordings in self.models.items()
        }
        ids = [name if name in models else names.get(name, name) for name in self.ids]
        return replace(self, ids=ids, models=models)

    def mean_over_recordings(self, score: Callable[[Trials], np.ndarray]) -> np.ndarray:
        """The mean of the scores of each trial's model's recordings: float64 [N].

        Parameters
        ----------
        score : callable
            Gets a trial for every recording of every trial's model, without labels: Trials of M,
            and gives their scores, float array [M].

        Examples
        --------
        >>> trials = Trials(["anna", "x"], np.array([0]), np.array([1]),
        ...                 models={"anna": ("a/1", "a/2")})
        >>> known = {"a/1 x": 0.5, "a/2 x": 0.75}
        >>> trials.mean_over_recordings(
        ...     lambda apart: np.array([known[apart.pair(n)] for n in range(len(apart))]))
        array([0.625])
        """
        place = {name: n for n, name in enumerate(self.recordings)}
        rows = [[place[one] for one in self.models.get(name, (name,))] for name in self.ids]
        counts = np.array([len(row) for row in rows])
        owner = np.repeat(np.arange(len(self)), counts[self.enrolment])
        enrolment = np.concatenate([rows[n] for n in self.enrolment.tolist()])
        tests = np.array([row[0] for row in rows])[self.test]
        each = score(Trials(self.recordings, enrolment.astype(np.int64), tests[owner]))
        return np.bincount(owner, each, len(self)) / np.bincount(owner, minlength=len(self))

    def without(self: AnyTrials, lost: Iterable[str]) -> AnyTrials:
        """Only the trials that need none of the recordings in `lost`.

        A model goes on with its other recordings, and goes when it has none.
        """
        lost = set(lost)
        models = {
            model: tuple(one for one in recordings if one not in lost)
            for model, recordings in self.models.items()
        }
        gone = np.array(
            [not models[name] if name in models else name in lost for name in self.ids], dtype=bool
        )
        kept = ~(gone[self.enrolment] | gone[self.test])
        left = {model: recordings for model, recordings in models.items() if recordings}
        failed = len(lost & set(self.recordings))
        keys, itself = self._pairs()
        gone_pairs = np.flatnonzero(~kept & ~itself)
        gone_pairs = gone_pairs[np.unique(keys[gone_pairs], return_index=True)[1]]
        targets = 0 if self.is_target is None else int(self.is_target[gone_pairs].sum())
        now = Lost(
            failed,
            len(self.recordings),
            targets,
            len(gone_pairs) - targets,
            len(models) - len(left),
            len(models),
        )
        if self.lost is not None:
            now = Lost(
                now.recordings + self.lost.recordings,
                self.lost.tried,
                now.targets + self.lost.targets,
                now.impostors + self.lost.impostors,
                now.models + self.lost.models,
                self.lost.tried_models,
            )
        if not now.recordings:
            return self
        return replace(self.rows(kept), models=left, lost=now)._used()

    def _pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """A number for every trial's unordered pair, and whether it is a recording with itself."""
        low, high = (f(self.enrolment, self.test) for f in (np.minimum, np.maximum))
        itself = low == high
        if self.models:
            place = {name: n for n, name in enumerate(self.ids)}
            inside = {
                (place[model], place[one])
                for model, recordings in self.models.items()
                for one in recordings
                if model in place and one in place
            }
            pairs = zip(self.enrolment.tolist(), self.test.tolist(), strict=True)
            itself |= np.fromiter((pair in inside for pair in pairs), bool, len(self))
        if low.dtype != np.int64 and len(self.ids) ** 2 > np.iinfo(low.dtype).max:
            low = low.astype(np.int64)
        return low * len(self.ids) + high, itself

    def _used(self: AnyTrials) -> AnyTrials:
        """Without the ids that no trial names."""
        used = np.unique(np.concatenate((self.enrolment, self.test)))
        place = np.full(len(self.ids), -1, dtype=np.int64)
        place[used] = np.arange(len(used))
        ids = [self.ids[n] for n in used.tolist()]
        held = set(ids)
        return replace(
            self,
            ids=ids,
            enrolment=place[self.enrolment],
            test=place[self.test],
            speaker_of=self.speaker_of and [self.speaker_of[n] for n in used.tolist()],
            models={name: many for name, many in self.models.items() if name in held},
        )

    def rows(self: AnyTrials, chosen: np.ndarray) -> AnyTrials:
        """Some of the trials: an index or a bool array; the ids stay."""
        return replace(
            self,
            enrolment=self.enrolment[chosen],
            test=self.test[chosen],
            is_target=None if self.is_target is None else self.is_target[chosen],
        )

    @property
    def speakers_known(self) -> bool:
        """Whether `speaker_of` or the ids (by their slashes) tell the speakers."""
        return self.speaker_of is not None or any("/" in name for name in self.recordings)

    def speaker_names(self) -> Sequence[str]:
        """Speaker of every id by name: `speaker_of`, else what the ids (a model's: its first
        recording's) name.
        """
        if self.speaker_of is not None:
            return self.speaker_of
        return [speaker_in(self.models.get(name, (name,))[0]) for name in self.ids]


class Distinct(NamedTuple):
    """The trials that figures count.

    Attributes
    ----------
    trials : LabelledTrials
        Every unordered pair once, none of a recording with itself.
    group : int64 array [N] or None
        For every trial before, its place among them, -1 for a recording with itself; None where
        nothing was left out.

    Examples
    --------
    >>> trials = LabelledTrials(["a/1", "a/2"], np.array([0, 1]), np.array([1, 0]),
    ...                         np.array([True, True]))
    >>> distinct = Distinct(trials.rows([0]), np.array([0, 0]))  # as trials.distinct, which warns
    >>> distinct.scores(np.array([0.5, 0.7]))
    array([0.6])
    """

    trials: LabelledTrials
    group: np.ndarray | None

    def scores(self, scores: np.ndarray) -> np.ndarray:
        """The scores of `trials`: of a pair that was scored more than once, the mean.

        Raises
        ------
        ValueError
            Another number of scores than of trials before.
        """
        wanted = len(self.trials if self.group is None else self.group)
        if scores.shape != (wanted,):
            raise ValueError(f"{wanted} trials and scores {scores.shape}")
        if self.group is None:
            return scores
        kept = self.group >= 0
        group = self.group[kept]
        given, count = scores[kept].astype(float), len(self.trials)
        one = np.empty(count)
        one[group] = given
        # from one of them on: equal scores have exactly their value as mean, and tie with others
        apart = np.bincount(group, given - one[group], minlength=count)
        mean = one + apart / np.bincount(group, minlength=count)
        return mean.astype(scores.dtype) if np.issubdtype(scores.dtype, np.floating) else mean


@dataclass(frozen=True)
class LabelledTrials(Trials):
    """Trials of which each is known to be a target or an impostor trial.

    Attributes
    ----------
    label_noise : bool
        Impostor trials within a group that target trials link are kept, as in an official list
        whose labels are what they are (IJB's); otherwise they are an error.

    Examples
    --------
    >>> trials = LabelledTrials(["a/1", "a/2", "b/1"], np.array([0, 0]), np.array([1, 2]),
    ...                         np.array([True, False]))
    >>> trials.speakers().tolist()
    [0, 0, 1]
    """

    is_target: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    label_noise: bool = False

    def speakers(self) -> np.ndarray:
        """Speaker of every id as an int array [len(ids)].

        From `speaker_of`; else the part of an id before its first slash; else, where no id has
        one, recordings linked by target trials are one group. Groups are not speakers: two of them
        may be the same person (see `speakers_known`).

        Raises
        ------
        ValueError
            A target trial of two speakers, an impostor trial of one or within a linked group, a
            model of two speakers; named.
        """
        return self._numbered[1]

    @property
    def people(self) -> np.ndarray:
        """Who each number of :meth:`speakers` is, ascending; of a linked group, its first id.

        The numbers do not depend on the order of the trials: two lists with one `people` number
        their speakers alike.
        """
        return self._numbered[0]

    @cached_property
    def _numbered(self) -> tuple[np.ndarray, np.ndarray]:
        if self.speakers_known:
            people, speakers = np.unique(self.speaker_names(), return_inverse=True)
            if self.speaker_of is None:
                for model, recordings in self.models.items():
                    voices = sorted({speaker_in(one) for one in recordings})
                    if len(voices) > 1:
                        raise self._of_several(model, voices)
        else:
            people, speakers = self._linked()
        same = speakers[self.enrolment] == speakers[self.test]
        wrong = same != self.is_target
        if wrong.any() and not (self.label_noise and not self.speakers_known):
            at = int(np.argmax(wrong))
            if not self.speakers_known:
                raise ValueError(
                    f"{self.name}: {self.pair(at)} is an impostor trial of one speaker: target "
                    "trials link the two recordings. Correct the label, or give the speakers "
                    "(utt2spk)"
                )
            kind = ("an impostor trial of one speaker", "a target trial of two speakers")
            how = (
                "if the speaker is the id's part before its first slash"
                if self.speaker_of is None
                else "by the speakers given"
            )
            raise ValueError(
                f"{self.name}: {self.pair(at)} is {kind[int(self.is_target[at])]} {how}. Correct "
                "the label, or give the speakers (utt2spk)"
            )
        return people, speakers

    def _linked(self) -> tuple[np.ndarray, np.ndarray]:
        """Groups that target trials and models link: their first ids, and int [len(ids)]."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        at = {name: n for n, name in enumerate(self.ids)}
        enrolled = [
            (at[model], at.setdefault(recording, len(at)))
            for model, recordings in self.models.items()
            if model in at
            for recording in recordings
        ]
        more = np.array(enrolled, dtype=np.int64).reshape(-1, 2)
        left = np.concatenate((self.enrolment[self.is_target], more[:, 0]))
        right = np.concatenate((self.test[self.is_target], more[:, 1]))
        links = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(len(at), len(at)))
        groups = connected_components(links, directed=False)[1][: len(self.ids)]
        ids = np.asarray(self.ids)
        order = np.argsort(ids, kind="stable")
        _, first, at = np.unique(groups[order], return_index=True, return_inverse=True)
        number = np.empty(len(first), dtype=np.int64)  # by the first id, whatever the order of ids
        number[np.argsort(first)] = np.arange(len(first))
        speakers = np.empty(len(ids), dtype=np.int64)
        speakers[order] = number[at]
        return ids[order[np.sort(first)]], speakers

    @cached_property
    def distinct(self) -> Distinct:
        """The trials that figures count; what is left out is warned of, once.

        A trial and its reverse say the same: every unordered pair counts once. A recording
        compared with itself, or with a model that was enrolled with it, does not count.

        Raises
        ------
        ValueError
            A pair with both labels, named; nothing left.
        """
        keys, itself = self._pairs()
        ordered = np.sort(keys)
        if not itself.any() and not (ordered[1:] == ordered[:-1]).any():
            return Distinct(self, None)
        _, first, place = np.unique(keys, return_index=True, return_inverse=True)
        against = self.is_target != self.is_target[first[place]]
        if against.any():
            at = int(np.argmax(against))
            raise ValueError(f"{self.name}: {self.pair(at)} is a target and an impostor trial")
        chosen = np.sort(first[~itself[first]])
        if not len(chosen):
            raise ValueError(f"{self.name}: every trial compares a recording with itself")
        rank = np.full(len(self), -1, dtype=np.int64)
        rank[chosen] = np.arange(len(chosen))
        own = np.count_nonzero(itself)
        double = len(self) - own - len(chosen)
        said = [
            f"{double:,} trials are the same pair as another, in the same or in reverse order"
            if double
            else "",
            f"{own:,} compare a recording with itself" if own else "",
        ]
        warnings.warn(
            f"{self.name}: of {len(self):,} trials {' and '.join(filter(None, said))}; figures "
            f"count the {len(chosen):,} distinct pairs",
            stacklevel=3,
        )
        return Distinct(self.rows(chosen), rank[first[place]])

    @cached_property
    def impostor_pairs(self) -> Any:
        """How many impostor trials each pair of speakers has: sparse float32 [S, S], upper half."""
        from scipy.sparse import coo_array, csr_array

        speakers = self.speakers().astype(np.int32)
        count = int(speakers.max()) + 1
        dense = count <= 4096
        total: Any = np.zeros(count * count, np.float32) if dense else csr_array((count, count))
        for start in range(0, len(self), 2**21):
            block = slice(start, start + 2**21)
            kept = np.flatnonzero(~self.is_target[block])
            one, two = (speakers[side[block][kept]] for side in (self.enrolment, self.test))
            one, two = np.minimum(one, two), np.maximum(one, two)
            if dense:
                total += np.bincount(one * count + two, minlength=count * count)
            elif len(kept):
                ones = np.ones(len(kept), dtype=np.float32)
                total = total + coo_array((ones, (one, two)), (count, count)).tocsr()
        return csr_array(total.reshape(count, count)) if dense else total


def index_pairs(
    enrolment: Sequence[str], test: Sequence[str], labels: np.ndarray | None, source: str
) -> Trials:
    """Trials of the ids of both sides, in their order.

    Parameters
    ----------
    enrolment, test : sequence of str [N]
    labels : bool array [N] or None
        Whether each is a target trial; without it the trials are unlabelled.
    source : str
        The list's file by name and SHA-256; empty for trials made in memory.

    Returns
    -------
    Trials
        With labels LabelledTrials. An id stands where it is met first.

    Raises
    ------
    ValueError
        Sides, or labels, of other lengths.

    Examples
    --------
    >>> trials = index_pairs(["a/1", "a/1"], ["a/2", "b/1"], np.array([True, False]), "mine.txt")
    >>> trials.ids, trials.enrolment, trials.test
    (['a/1', 'a/2', 'b/1'], array([0, 0]), array([1, 2]))
    """
    names = dict.fromkeys(chain.from_iterable(zip(enrolment, test, strict=True)))
    place = {name: n for n, name in enumerate(names)}
    one, two = (
        np.fromiter(map(place.__getitem__, side), np.int64, len(side)) for side in (enrolment, test)
    )
    made = Trials(list(place), one, two, labels, source)
    return made if labels is None else made.labelled()
