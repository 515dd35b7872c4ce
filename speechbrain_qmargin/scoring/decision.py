"""The threshold that a service applies, with what it is of and what is known of it."""

from __future__ import annotations

import math
import numbers
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from speechbrain_qmargin.files import load_record, save_record
from speechbrain_qmargin.scoring.figures import TarAtFar
from speechbrain_qmargin.scoring.metrics import (
    OperatingPoints,
    allowed_false_accepts,
    tar_at_far,
)
from speechbrain_qmargin.scoring.separation import ORIGIN, Origin, refuse_other_scores
from speechbrain_qmargin.scoring.uncertainty import (
    Spread,
    mark_of,
    rate_interval,
    scarcer,
    widened,
)
from speechbrain_qmargin.trials import Trials

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "OperatingPoint",
    "choose_operating_point",
    "clear_threshold",
    "recordings_enrolled",
]


@dataclass(frozen=True)
class OperatingPoint:
    """Accept a trial when ``score >= threshold``.

    Attributes
    ----------
    system : str
    threshold : float
        Finite.
    far_target : float
        The FAR that was asked for; on the scores the threshold was chosen on, it is not exceeded.
    far, tar : float
        Measured at the threshold, on the trials of `measured_on`.
    false_accepts, misses, num_impostors, num_targets : int
    mark : str
        "measured", "indicative" or "unsupported", of the weaker of both rates: by the scarcer of
        their errors, and the speakers.
    optimistic : bool
        The threshold was chosen on the very scores that `far` and `tar` are measured on, or it is
        not known that the speakers of the two are apart.
    chosen_on, measured_on : str
        The trial lists, with their SHA-256.
    kind, encoder, cohort, mean, enrolment, backend : str
        What the scores are, and of what (:class:`~speechbrain_qmargin.scoring.separation.Origin`);
        empty if not known.
    embeddings : str
        What they were computed from: the file by name and SHA-256; empty if not known.
    scores : str
        The score file that the threshold was chosen on, by name and SHA-256.
    enrolled_from : int
        Recordings of an enrolment in the trials (their median); 0 if not known.
    far_interval, tar_interval : (low, high) or None
        What `far` and `tar` may be for other people of the same kind; None where the trials do not
        tell: too few speakers, or a threshold chosen on the scores that it is measured on.
    confidence : float
        Of the intervals.

    Raises
    ------
    ValueError
        A threshold that is no finite number, rates or counts that are no numbers, a text that is
        none.

    Examples
    --------
    >>> from speechbrain_qmargin.scoring.metrics import operating_points
    >>> points = operating_points(np.array([0.2, 0.4, 0.7, 0.9]), np.array([0, 0, 1, 1], bool))
    >>> point = choose_operating_point("mine", points, 0.5, kind="cosine")
    >>> round(point.threshold, 3), point.far, point.tar
    (0.3, 0.5, 1.0)
    >>> file = getfixture("tmp_path") / "operating_point.json"
    >>> point.save(file)
    >>> OperatingPoint.load(file).accepts(0.35, kind="cosine")
    True
    """

    system: str
    threshold: float
    far_target: float
    far: float
    tar: float
    false_accepts: int
    misses: int
    num_impostors: int
    num_targets: int
    mark: str
    optimistic: bool
    chosen_on: str
    measured_on: str
    kind: str = ""
    embeddings: str = ""
    scores: str = ""
    encoder: str = ""
    cohort: str = ""
    enrolled_from: int = 0
    mean: str = ""
    enrolment: str = ""
    backend: str = ""
    far_interval: tuple[float, float] | None = None
    tar_interval: tuple[float, float] | None = None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        for name in ("threshold", "far_target", "far", "tar", "confidence"):
            value = getattr(self, name)
            if not _is_number(value) or not math.isfinite(value):
                raise ValueError(f"the {name} is {value!r}, not a finite number")
        counts = ("false_accepts", "misses", "num_impostors", "num_targets", "enrolled_from")
        for name in counts:
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} is {value!r}, not a count")
        for name in ("far_interval", "tar_interval"):
            value = getattr(self, name)
            if value is not None:
                if len(value) != 2 or not all(map(_is_number, value)) or not value[0] <= value[1]:
                    raise ValueError(f"the {name} is {value!r}, not two numbers in order")
                object.__setattr__(self, name, tuple(value))  # a list in JSON
        for name in (*ORIGIN, "embeddings", "scores"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"the {name} is {getattr(self, name)!r}, not a text")

    def refuse_other(self, **origin: Unpack[Origin]) -> None:
        """Refuse what this threshold is not of.

        Raises
        ------
        ValueError
            Scores of another origin; what is not known on either side is not compared.
        """
        refuse_other_scores(origin, vars(self), "the threshold")

    @property
    def doubt(self) -> str:
        """Why its rates are optimistic, in words; empty where they are not.

        Examples
        --------
        >>> point = OperatingPoint("a", 0.4, 0.01, 0.012, 0.9, 12, 10, 1000, 100, "indicative",
        ...     True, chosen_on="dev.txt sha256:5e11", measured_on="test.txt sha256:ac1d")
        >>> point.doubt
        'chosen on dev.txt, whose speakers may be those that it is measured on'
        """
        if not self.optimistic:
            return ""
        if self.chosen_on == self.measured_on:
            return "chosen on the very scores that it is measured on"
        name = self.chosen_on.split(" sha256:", 1)[0] or "other trials"
        return f"chosen on {name}, whose speakers may be those that it is measured on"

    @property
    def highest_far(self) -> float:
        """The most that its FAR may be for other people, as far as the trials tell.

        The upper end of its interval; where there is none, of Clopper-Pearson's, which takes the
        trials for independent.

        Examples
        --------
        >>> OperatingPoint("a", 0.4, 0.01, 0.0, 0.9, 0, 10, 300, 100, "unsupported", True,
        ...     "", "").highest_far  # no false accept of 300
        0.0122...
        """
        if self.far_interval is not None:
            return self.far_interval[1]
        if not 0 <= self.false_accepts <= self.num_impostors or not self.num_impostors:
            return 1.0
        return rate_interval(self.false_accepts, self.num_impostors, self.confidence)[1]

    def promise(self) -> str:
        """What is known of its errors, in a sentence or two.

        Examples
        --------
        >>> OperatingPoint("a", 0.4, 0.01, 0.012, 0.9, 12, 10, 1000, 100, "indicative", False,
        ...     "", "", far_interval=(0.004, 0.03), tar_interval=(0.8, 0.95)).promise()
        'accepts 1.20 % of impostor trials (95 % interval 0.40 to 3.00 %; asked for: 1 %) and
        90.0 % of target trials (80.0 to 95.0 %); these rates are indicative'
        """
        sure = f"{100 * self.confidence:g} % interval"
        far = f"{100 * self.far:.2f} % of impostor trials"
        asked = f"asked for: {100 * self.far_target:g} %"
        if self.far_interval:
            low, high = (100 * x for x in self.far_interval)
            far += f" ({sure} {low:.2f} to {high:.2f} %; {asked})"
        else:
            far += f" (no interval; {asked})"
        tar = f"{100 * self.tar:.1f} % of target trials"
        if self.tar_interval:
            low, high = (100 * x for x in self.tar_interval)
            tar += f" ({low:.1f} to {high:.1f} %)"
        note = f", optimistic: {self.doubt}" if self.optimistic else ""
        return f"accepts {far} and {tar}; these rates are {self.mark}{note}"

    def accepts(self, score: float, **origin: Unpack[Origin]) -> bool:
        """Whether to accept.

        Parameters
        ----------
        score : float
        **origin
            What the score is, and of what: ``kind="cosine"``, the digest of its ``encoder``, ...
            (:class:`~speechbrain_qmargin.scoring.separation.Origin`).

        Raises
        ------
        ValueError
            A score that is not a finite number, or of another origin than the threshold's: neither
            accepted nor rejected in silence.
        """
        self.refuse_other(**origin)
        if not _is_number(score) or not math.isfinite(score):
            raise ValueError(f"the score is {score!r}; no decision can rest on it")
        return bool(score >= self.threshold)

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        save_record(path, "operating point", asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> OperatingPoint:
        """Read a file of :meth:`save`.

        Raises
        ------
        ValueError
            Another file, or a threshold that is not a finite number; with the file.
        """
        return load_record(path, "operating point", cls)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)


def recordings_enrolled(trials: Trials) -> int:
    """Recordings of an enrolment: the models' median, 1 without models.

    Examples
    --------
    >>> trials = Trials(["anna", "anna/3"], np.array([0]), np.array([1]),
    ...                 models={"anna": ("anna/1", "anna/2")})
    >>> recordings_enrolled(trials)
    2
    """
    sizes = [len(trials.models.get(trials.ids[n], "1")) for n in np.unique(trials.enrolment)]
    return int(np.median(sizes)) if sizes else 0


def clear_threshold(points: OperatingPoints, threshold: float) -> float:
    """A threshold that decides the same trials, whatever way their scores were rounded.

    A service may compute in float32 what a file holds as the text of a float32: the same score is
    0.100000001 here and 0.1 there. Midway between the highest score that is rejected and the
    lowest that is accepted, both fall on their side; where the two are one in float32, on the side
    that rejects.

    Parameters
    ----------
    points : OperatingPoints
    threshold : float

    Examples
    --------
    >>> from speechbrain_qmargin.scoring.metrics import operating_points
    >>> points = operating_points(np.array([0.1, 0.3, 0.9]), np.array([False, True, True]))
    >>> round(clear_threshold(points, 0.25), 3)
    0.2
    """
    rejected, accepted = [], []
    for scores in (points.targets, points.impostors):
        at = int(np.searchsorted(scores, threshold, side="left"))
        rejected += scores[at - 1 : at].tolist() if at else []
        accepted += scores[at : at + 1].tolist()
    if not rejected:
        return float(min(accepted))
    low = max(max(score, float(np.float32(score))) for score in rejected)
    if not accepted:
        return float(np.nextafter(np.float32(low), np.float32(np.inf), dtype=np.float32))
    high = min(min(score, float(np.float32(score))) for score in accepted)
    if high <= low:  # one score in float32
        return float(np.nextafter(np.float32(low), np.float32(np.inf), dtype=np.float32))
    middle = low + (high - low) / 2
    return middle if low < middle < high else high


def choose_operating_point(
    system: str,
    points: OperatingPoints,
    far: float,
    *,
    development: OperatingPoints | None = None,
    measured_on: str = "",
    chosen_on: str = "",
    speakers: float | None = None,
    embeddings: str = "",
    scores: str = "",
    enrolled_from: int = 0,
    apart: bool = True,
    spread: Spread | None = None,
    confidence: float = 0.95,
    **origin: Unpack[Origin],
) -> OperatingPoint:
    """The threshold for a FAR, chosen on development scores if given.

    It lies clear of the scores on both its sides, see :func:`clear_threshold`. That development
    and test are apart is for the caller to see to
    (:func:`~speechbrain_qmargin.scoring.separation.refuse_shared`).

    Parameters
    ----------
    system : str
    points : OperatingPoints
        Of the scores it is measured on.
    far : float
    development : OperatingPoints, optional
        Of the scores the threshold is chosen on; without it the result is marked optimistic.
    measured_on, chosen_on : str
        The sources of the trial lists.
    speakers : float, optional
        That contribute to the trials it is measured on, for the mark.
    embeddings, scores, enrolled_from
        Of :class:`OperatingPoint`.
    apart : bool
        Whether development and test are known to share no speaker; otherwise it is optimistic.
    spread : Spread, optional
        Of the scores it is measured on, for the intervals.
    confidence : float
    **origin
        What the scores are, and of what.

    Raises
    ------
    ValueError
        As :func:`~speechbrain_qmargin.scoring.metrics.tar_at_far`.

    Examples
    --------
    >>> from speechbrain_qmargin.scoring.metrics import operating_points
    >>> points = operating_points(np.arange(100.0), np.arange(100) >= 90)
    >>> point = choose_operating_point("a", points, 0.1)
    >>> point.accepts(81.0), point.accepts(80.0), point.false_accepts, point.mark
    (True, False, 9, 'unsupported')
    """
    chosen = development or points
    threshold = clear_threshold(chosen, tar_at_far(chosen, far).threshold)
    allowed = allowed_false_accepts(far, chosen.num_impostors)
    misses, false_accepts = points.errors_at(threshold)
    errors = min(allowed, scarcer(misses, points.num_targets))
    if development is not None:
        errors = min(errors, scarcer(false_accepts, points.num_impostors))
    far_interval = tar_interval = None
    if spread is not None and development is not None:
        rates = spread.rates_at(threshold, confidence)
        far_interval = rates.far_interval
        if rates.frr_interval:
            tar_interval = 1 - rates.frr_interval[1], 1 - rates.frr_interval[0]
    elif spread is not None:  # its FAR is what was asked for, whatever other people's may be
        tar_interval = spread.tar_at_far(far).interval(1 - misses / points.num_targets, confidence)
        if tar_interval is not None:
            measure = TarAtFar(far)
            few = partial(measure.few_errors, measure.find(points), points, confidence)
            tar_interval = widened(tar_interval, errors, few)
    return OperatingPoint(
        system=system,
        threshold=threshold,
        far_target=float(far),
        far=false_accepts / points.num_impostors,
        tar=1 - misses / points.num_targets,
        false_accepts=false_accepts,
        misses=misses,
        num_impostors=points.num_impostors,
        num_targets=points.num_targets,
        mark=mark_of(errors, speakers),
        optimistic=development is None or not apart,
        chosen_on=chosen_on if development else measured_on,
        measured_on=measured_on,
        embeddings=embeddings,
        scores=scores,
        enrolled_from=enrolled_from,
        far_interval=far_interval,
        tar_interval=tar_interval,
        confidence=confidence,
        **origin,
    )
