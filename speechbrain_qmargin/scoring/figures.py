"""The figures of a report: what a figure is, how each kind is measured, and how to add one.

A :class:`Figure` is one number with its kind and parameter, its interval and what it rests on. A
:class:`Measure` says how a kind is found in operating points and how its speakers move it.
To add one, write a class with the members of :class:`Measure` and :func:`register` it, or give it
to :func:`~speechbrain_qmargin.scoring.report.evaluate`; tables, JSON, differences and pages take
it from there. Nothing reads a figure's printed name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from speechbrain_qmargin.scoring import metrics
from speechbrain_qmargin.scoring.influence import Influence
from speechbrain_qmargin.scoring.metrics import OperatingPoints
from speechbrain_qmargin.scoring.uncertainty import Spread, rate_interval, scarcer

__all__ = [
    "UNITS",
    "ActDCF",
    "Cllr",
    "EqualErrorRate",
    "Figure",
    "Found",
    "Measure",
    "MinCllr",
    "MinDCF",
    "TarAtFar",
    "figure_of",
    "register",
    "registered",
    "show",
    "standard_figures",
]

UNITS = ("rate", "cost", "bits")
Parameter = float | str | None
Key = tuple[str, Parameter]


def show(value: float | None, unit: str = "rate") -> str:
    """A value as text: rates in per cent, costs and bits as they are; None is empty.

    Examples
    --------
    >>> show(0.0123), show(0.0123, "cost"), show(None)
    ('1.23 %', '0.012', '')
    """
    if value is None:
        return ""
    return f"{100 * value:.2f} %" if unit == "rate" else f"{value:.3f}"


@dataclass(frozen=True)
class Figure:
    """One number of a report.

    Attributes
    ----------
    kind : str
        "eer", "min_dcf", "act_dcf", "tar_at_far", "cllr", "min_cllr", or another measure's.
    parameter : float, str or None
        Of the kind: the FAR of a TAR, the effective prior of a cost, the method of an EER.
    name : str
        As it is printed; nothing else is read from it.
    value : float
    unit : {"rate", "cost", "bits"}
    higher_is_better : bool
    low, high : float or None
        The interval; None where there is none.
    threshold : float or None
        The score at and above which trials are accepted.
    errors : int or None
        What it rests on: the scarcer of its errors; of a TAR near 0, of the targets accepted.
    misses, false_accepts : int or None
        At that threshold.
    mark : str
        "measured", "indicative", "unsupported", or "" where the figure rests on no count.

    Examples
    --------
    >>> figure = Figure("eer", "rocch", "EER", 0.0123, low=0.01, high=0.015)
    >>> figure.key, figure.shown, figure.interval
    (('eer', 'rocch'), '1.23 %', '1.00 % to 1.50 %')
    """

    kind: str
    parameter: Parameter
    name: str
    value: float
    unit: str = "rate"
    higher_is_better: bool = False
    low: float | None = None
    high: float | None = None
    threshold: float | None = None
    errors: int | None = None
    misses: int | None = None
    false_accepts: int | None = None
    mark: str = ""

    @property
    def key(self) -> Key:
        """Kind and parameter, by which figures of two reports are matched."""
        return self.kind, self.parameter

    def show(self, value: float | None) -> str:
        """A value of this figure's unit as text."""
        return show(value, self.unit)

    @property
    def shown(self) -> str:
        """The value as text; an unsupported one is never bare."""
        return self.show(self.value) + (" (unsupported)" if self.mark == "unsupported" else "")

    @property
    def interval(self) -> str:
        """The interval as text, empty where there is none."""
        return "" if self.low is None else f"{self.show(self.low)} to {self.show(self.high)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class Found(NamedTuple):
    """What a :class:`Measure` finds in the operating points of one system.

    Attributes
    ----------
    value : float
    threshold : float or None
        The score at and above which trials are accepted; None where there is none.
    errors : int or None
        The scarcer of the errors that the value rests on, which decides whether the figure is
        called measured; None where it rests on no count.
    misses, false_accepts : int or None
        At the threshold.

    Examples
    --------
    >>> scores, labels = np.array([0.9, 0.4, 0.6, 0.1]), np.array([1, 1, 0, 0], bool)
    >>> points = metrics.operating_points(scores, labels)
    >>> found = TarAtFar(0.5).find(points)  # one of the two impostors may be accepted
    >>> found.value, found.false_accepts, found.misses
    (1.0, 1, 0)
    """

    value: float
    threshold: float | None = None
    errors: int | None = None
    misses: int | None = None
    false_accepts: int | None = None


class Measure(Protocol):
    """A kind of figure with its parameter: the contract of everything that a report can hold.

    Examples
    --------
    >>> class MissRate:
    ...     kind, unit, higher_is_better = "frr_at", "rate", False
    ...     def __init__(self, threshold):
    ...         self.parameter, self.name = threshold, f"FRR at {threshold:g}"
    ...     def find(self, points):
    ...         misses, accepts = points.errors_at(self.parameter)
    ...         return Found(misses / points.num_targets, self.parameter, misses, misses, accepts)
    ...     def influence(self, spread):
    ...         return spread.frr(self.parameter)
    ...     def few_errors(self, found, points, confidence=0.95):
    ...         return rate_interval(found.misses, points.num_targets, confidence)
    >>> scores, labels = np.array([0.9, 0.4, 0.6, 0.1]), np.array([1, 1, 0, 0], bool)
    >>> points = metrics.operating_points(scores, labels)
    >>> figure_of(MissRate(0.5), points).shown
    '50.00 %'
    """

    @property
    def kind(self) -> str: ...

    @property
    def parameter(self) -> Parameter: ...

    @property
    def name(self) -> str:
        """As it is printed."""
        ...

    @property
    def unit(self) -> str:
        """One of :data:`UNITS`."""
        ...

    @property
    def higher_is_better(self) -> bool: ...

    def find(self, points: OperatingPoints) -> Found:
        """The figure of one system, exact."""
        ...

    def influence(self, spread: Spread) -> Influence | None:
        """What every speaker contributes to the figure's error; None where it has no interval."""
        ...

    def few_errors(
        self, found: Found | Figure, points: OperatingPoints, confidence: float = 0.95
    ) -> tuple[float, float] | None:
        """The interval of a figure whose errors are so few that their number is luck.

        With FAR and FRR anywhere in their Clopper-Pearson intervals. None for a figure that rests
        on no count.
        """
        ...


def figure_of(measure: Measure, points: OperatingPoints) -> Figure:
    """The figure of a measure, without interval and mark.

    Raises
    ------
    ValueError
        A unit that is none of :data:`UNITS`.

    Examples
    --------
    >>> scores, labels = np.array([0.9, 0.4, 0.6, 0.1]), np.array([1, 1, 0, 0], bool)
    >>> points = metrics.operating_points(scores, labels)
    >>> figure = figure_of(TarAtFar(0.1), points)
    >>> figure.name, figure.shown, figure.misses
    ('TAR@FAR=0.1', '50.00 %', 1)
    """
    if measure.unit not in UNITS:
        raise ValueError(f"{measure.name}: its unit is {measure.unit!r}, not {', '.join(UNITS)}")
    found = measure.find(points)
    return Figure(
        kind=measure.kind,
        parameter=measure.parameter,
        name=measure.name,
        unit=measure.unit,
        higher_is_better=measure.higher_is_better,
        **found._asdict(),
    )


def _at(points: OperatingPoints, value: float, threshold: float) -> Found:
    """What is found where a threshold decides both rates; rejecting all has no finite one."""
    misses, accepts = points.errors_at(threshold)
    finite = threshold if math.isfinite(threshold) else None
    return Found(value, finite, min(misses, accepts), misses, accepts)


def _rate_intervals(found: Found | Figure, points: OperatingPoints, confidence: float):
    """Clopper-Pearson of FRR and of FAR at the threshold that was found."""
    assert found.misses is not None
    assert found.false_accepts is not None
    return (
        rate_interval(found.misses, points.num_targets, confidence),
        rate_interval(found.false_accepts, points.num_impostors, confidence),
    )


@dataclass(frozen=True)
class EqualErrorRate:
    """EER by one of :data:`~speechbrain_qmargin.scoring.metrics.EER_METHODS`.

    Examples
    --------
    >>> scores, labels = np.array([0.9, 0.4, 0.6, 0.1]), np.array([1, 1, 0, 0], bool)
    >>> points = metrics.operating_points(scores, labels)
    >>> for measure in (EqualErrorRate(), EqualErrorRate("nist")):
    ...     print(measure.name, round(measure.find(points).value, 3))
    EER 0.25
    EER(nist) 0.5
    """

    method: str = "rocch"

    kind = "eer"
    unit = "rate"
    higher_is_better = False

    @property
    def parameter(self) -> str:
        return self.method

    @property
    def name(self) -> str:
        return "EER" if self.method == "rocch" else f"EER({self.method})"

    def find(self, points: OperatingPoints) -> Found:
        threshold, misses, accepts = metrics.eer_point(points)
        value = metrics.eer(points, self.method)
        return Found(value, threshold, min(misses, accepts), misses, accepts)

    def influence(self, spread: Spread) -> Influence:
        return spread.eer()

    def few_errors(
        self, found: Found | Figure, points: OperatingPoints, confidence: float = 0.95
    ) -> tuple[float, float]:
        frr, far = _rate_intervals(found, points, confidence)
        return min(frr[0], far[0]), max(frr[1], far[1])


def _effective_prior(p_target: float, c_miss: float, c_fa: float) -> float:
    """The prior that costs of 1 would need to give the same normalised cost."""
    if c_miss == c_fa:
        return p_target
    return c_miss * p_target / (c_miss * p_target + c_fa * (1 - p_target))


@dataclass(frozen=True)
class _DCF:
    p_target: float = 0.01
    c_miss: float = 1.0
    c_fa: float = 1.0

    def __post_init__(self) -> None:
        metrics.bayes_threshold(self.p_target, self.c_miss, self.c_fa)  # raises ValueError

    unit = "cost"
    higher_is_better = False

    @property
    def parameter(self) -> float:
        return _effective_prior(self.p_target, self.c_miss, self.c_fa)

    @property
    def _costs(self) -> tuple[float, float, float]:
        return self.p_target, self.c_miss, self.c_fa

    @property
    def _weights(self) -> tuple[float, float]:
        """Of FRR and of FAR, over the lesser."""
        miss, accept = self.c_miss * self.p_target, self.c_fa * (1 - self.p_target)
        return miss / min(miss, accept), accept / min(miss, accept)

    @property
    def _suffix(self) -> str:
        unequal = f", c_miss={self.c_miss:g}, c_fa={self.c_fa:g}"
        return f"(p={self.p_target:g}{unequal if self.c_miss != self.c_fa else ''})"

    def few_errors(
        self, found: Found | Figure, points: OperatingPoints, confidence: float = 0.95
    ) -> tuple[float, float]:
        miss, accept = self._weights
        pairs = zip(*_rate_intervals(found, points, confidence), strict=True)
        low, high = (miss * f + accept * a for f, a in pairs)
        return low, high


@dataclass(frozen=True)
class MinDCF(_DCF):
    """Normalised minimum detection cost; the parameter is the effective prior.

    Raises
    ------
    ValueError
        A prior outside (0, 1), a cost that is not positive.

    Examples
    --------
    >>> scores, labels = np.array([0.9, 0.4, 0.6, 0.1]), np.array([1, 1, 0, 0], bool)
    >>> points = metrics.operating_points(scores, labels)
    >>> MinDCF(0.5).find(points).value  # (0.5 * 0 misses + 0.5 * 1/2 false accepts) / 0.5
    0.5
    >>> round(MinDCF(0.01, c_miss=10).parameter, 4)  # 10 * 0.01 / (10 * 0.01 + 0.99)
    0.0917
    """

    kind = "min_dcf"

    @property
    def name(self) -> str:
        return f"minDCF{self._suffix}"

    def find(self, points: OperatingPoints) -> Found:
        miss, accept = self._weights
        cost = miss * points.frr + accept * points.far
        threshold = float(points.thresholds[int(np.argmin(cost))])
        return _at(points, metrics.min_dcf(points, *self._costs), threshold)

    def influence(self, spread: Spread) -> Influence:
        return spread.min_dcf(*self._costs)

    def few_errors(
        self, found: Found | Figure, points: OperatingPoints, confidence: float = 0.95
    ) -> tuple[float, float]:
        low, high = super().few_errors(found, points, confidence)
        return low, min(1.0, high)


@dataclass(frozen=True)
class ActDCF(_DCF):
    """Normalised cost of log-likelihood ratios at the Bayes threshold.

    Raises
    ------
    ValueError
        As :class:`MinDCF`.

    Examples
    --------
    >>> ratios, labels = np.array([3.0, -0.5, 0.5, -3]), np.array([1, 1, 0, 0], bool)
    >>> points = metrics.operating_points(ratios, labels)
    >>> found = ActDCF(0.5).find(points)
    >>> found.value, found.threshold, found.misses, found.false_accepts
    (1.0, 0.0, 1, 1)
    """

    kind = "act_dcf"

    @property
    def name(self) -> str:
        return f"actDCF{self._suffix}"

    def find(self, points: OperatingPoints) -> Found:
        value = metrics.act_dcf(points, *self._costs, force=True)
        return _at(points, value, metrics.bayes_threshold(*self._costs))

    def influence(self, spread: Spread) -> Influence:
        return spread.act_dcf(*self._costs)


@dataclass(frozen=True)
class TarAtFar:
    """True accept rate at the largest FAR that does not exceed `far`.

    Examples
    --------
    >>> scores, labels = np.array([0.9, 0.4, 0.6, 0.1]), np.array([1, 1, 0, 0], bool)
    >>> points = metrics.operating_points(scores, labels)
    >>> TarAtFar(0.1).find(points).value, TarAtFar(0.5).find(points).value
    (0.5, 1.0)
    """

    far: float

    kind = "tar_at_far"
    unit = "rate"
    higher_is_better = True

    @property
    def parameter(self) -> float:
        return self.far

    @property
    def name(self) -> str:
        return f"TAR@FAR={self.far:g}"

    def find(self, points: OperatingPoints) -> Found:
        tar, threshold, accepts, misses = metrics.tar_at_far(points, self.far)
        allowed = metrics.allowed_false_accepts(self.far, points.num_impostors)
        rests_on = min(allowed, scarcer(misses, points.num_targets))
        return Found(tar, threshold, rests_on, misses, accepts)

    def influence(self, spread: Spread) -> Influence:
        return spread.tar_at_far(self.far)

    def few_errors(
        self, found: Found | Figure, points: OperatingPoints, confidence: float = 0.95
    ) -> tuple[float, float]:
        """The threshold's true FAR may be anywhere in the interval of its count.

        The TARs at its ends, each with its own interval, bracket the TAR.
        """
        n_t, n_n = points.num_targets, points.num_impostors
        allowed = metrics.allowed_false_accepts(self.far, n_n)
        least, most = rate_interval(allowed, n_n, confidence)
        fewest = n_t - metrics.tar_at_far(points, least).misses if least * n_n >= 1 else 0
        largest = n_t - metrics.tar_at_far(points, most).misses
        return (
            rate_interval(fewest, n_t, confidence)[0],
            rate_interval(largest, n_t, confidence)[1],
        )


@dataclass(frozen=True)
class Cllr:
    """Cost of log-likelihood ratios in bits.

    Examples
    --------
    >>> scores = np.log([3, 1 / 3])  # odds of 3 to 1, both right: log2(1 + 1/3) bits
    >>> points = metrics.operating_points(scores, np.array([True, False]))
    >>> round(Cllr().find(points).value, 3)
    0.415
    """

    kind = "cllr"
    parameter = None
    name = "Cllr"
    unit = "bits"
    higher_is_better = False

    def find(self, points: OperatingPoints) -> Found:
        return Found(metrics.cllr(points))

    def influence(self, spread: Spread) -> Influence:
        return spread.cllr()

    def few_errors(
        self, found: Found | Figure, points: OperatingPoints, confidence: float = 0.95
    ) -> None:
        return None


@dataclass(frozen=True)
class MinCllr:
    """Cllr after the best monotone calibration of these very scores.

    Examples
    --------
    >>> scores, labels = np.array([0.9, 0.4, 0.6, 0.1]), np.array([1, 1, 0, 0], bool)
    >>> points = metrics.operating_points(scores, labels)
    >>> round(MinCllr().find(points).value, 3)  # two of four are certain, two are worth one bit
    0.5
    """

    kind = "min_cllr"
    parameter = None
    name = "minCllr"
    unit = "bits"
    higher_is_better = False

    def find(self, points: OperatingPoints) -> Found:
        return Found(metrics.min_cllr(points))

    def influence(self, spread: Spread) -> Influence:
        return spread.min_cllr()

    def few_errors(
        self, found: Found | Figure, points: OperatingPoints, confidence: float = 0.95
    ) -> None:
        return None


def standard_figures(
    fars: Sequence[float],
    p_target: float | Sequence[float] = 0.01,
    *,
    c_miss: float = 1.0,
    c_fa: float = 1.0,
    all_eers: bool = False,
    llr: bool = False,
    eers: Sequence[str] = metrics.EER_METHODS[:1],
) -> list[Measure]:
    """What a report holds unless told otherwise, in its order.

    Parameters
    ----------
    fars : sequence of float
    p_target : float or sequence of float
    c_miss, c_fa : float
        Costs of the DCFs.
    all_eers : bool
        Also the ``step`` and ``nist`` variants of the EER, and minCllr.
    llr : bool
        The scores are log-likelihood ratios: actDCF and Cllr too.
    eers : sequence of str
        The variants of the EER, unless it is all of them.

    Examples
    --------
    >>> [measure.name for measure in standard_figures([0.01])]
    ['EER', 'minDCF(p=0.01)', 'TAR@FAR=0.01']
    """
    methods = metrics.EER_METHODS if all_eers else eers
    measures: list[Measure] = [EqualErrorRate(method) for method in methods]
    for prior in np.atleast_1d(p_target).tolist():
        measures.append(MinDCF(prior, c_miss, c_fa))
        if llr:
            measures.append(ActDCF(prior, c_miss, c_fa))
    measures += [TarAtFar(far) for far in fars]
    if all_eers or llr:
        measures.append(MinCllr())
    if llr:
        measures.append(Cllr())
    return measures


_registered: dict[Key, Measure] = {}


def register(measure: Measure) -> Measure:
    """Add a figure to every report from now on.

    A module that registers figures is named to ``qmargin report`` by ``--figures_from``.

    Raises
    ------
    ValueError
        A second measure of one kind and parameter.

    Examples
    --------
    >>> from speechbrain_qmargin.scoring import figures
    >>> getfixture("monkeypatch").setattr(figures, "_registered", {})  # in this example alone
    >>> _ = register(TarAtFar(1e-5))
    >>> [measure.name for measure in registered()]
    ['TAR@FAR=1e-05']
    """
    key = measure.kind, measure.parameter
    if _registered.get(key, measure) != measure:
        raise ValueError(f"a figure of kind {key[0]!r}, parameter {key[1]!r} is registered already")
    _registered[key] = measure
    return measure


def registered() -> list[Measure]:
    """The figures that :func:`register` added.

    Examples
    --------
    >>> registered()  # nothing, until a module has registered one
    []
    """
    return list(_registered.values())
