r"""Alpha, scale and margin for a number of classes, with the reasons and what is to be expected.

The model
---------
A sample's wrong cosines are normal, :math:`c_j \sim N(\mu, v^2)`. Before training
:math:`\mu = 0, v^2 = 1/D` in D dimensions, whatever the encoder does, because the prototypes are
random. Afterwards a sample whose target's cosine is c is :math:`c w_y` plus a random rest, and
prototypes are as far apart as the dimension lets them (the Welch bound on their mean square
cosine):

.. math:: v^2 = c^2 g + (1 - c^2) / D, \quad g = \max(0, \tfrac{C - D}{D (C - 1)}), \quad
          \mu = -c / (C - 1) \text{ if } C \le D + 1, \text{ else } 0 .

The support is the mean over samples drawn from this model, on which the loss itself is computed. A
sample rests, at zero loss, with probability :math:`P(c_j < c - h)^{C-1}`, h being the hard margin.
Real voices and faces resemble each other more than that, so supports come out larger and resting
samples fewer.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache

import torch

from speechbrain_qmargin.loss.dense import DenseScores
from speechbrain_qmargin.loss.functional import hard_margin, margin_for, q_margin_objective

__all__ = ["ClassStatistics", "Expected", "Suggestion", "expected", "suggest_parameters"]

# The paper's two corpora (arXiv 2606.31664): classes, alpha, (alpha - 1) scale. 17,982 are the
# 5,994 speakers of VoxCeleb2 at three speeds
_SPEECH, _FACES = (17_982, 1.5, 5.0), (2_060_000, 1.25, 8.0)
_MARGIN = 0.2
_LEAST_ALPHA, _ALPHA_STEP = 1.25, 0.05
# How often other classes' samples should push a prototype away in a training; docs/parameters.md
_ENOUGH_PUSHES = 4000
_REACHED = 0.85  # the target's cosine that training is trusted to reach, for some samples
_TRAINED = 0.7  # an ordinary sample's after training
_MOST_DIMENSIONS = 1 << 20
_DRAWN, _NEAREST = 512, 1024  # samples, and the wrong classes of each that are drawn at first


@dataclass(frozen=True)
class ClassStatistics:
    """Mean and deviation of a sample's cosines with the wrong classes.

    Examples
    --------
    >>> wrong = ClassStatistics(mean=0.1, deviation=0.05)
    >>> round(wrong.largest(2), 4)                      # the median of one wrong cosine
    0.1
    >>> wrong.largest(1000) > wrong.largest(10)
    True
    """

    mean: float
    deviation: float

    @classmethod
    def untrained(cls, embedding_dim: int) -> ClassStatistics:
        """Of random prototypes.

        Examples
        --------
        >>> ClassStatistics.untrained(100)
        ClassStatistics(mean=0.0, deviation=0.1)
        """
        return cls(0.0, embedding_dim**-0.5)

    @classmethod
    def trained(cls, num_classes: int, embedding_dim: int, target_cosine: float) -> ClassStatistics:
        """Of prototypes as far apart as the dimension allows, see the module's text.

        Examples
        --------
        >>> ClassStatistics.trained(3, 100, 1.0)        # a triangle
        ClassStatistics(mean=-0.5, deviation=0.0)
        """
        c, dim = target_cosine, embedding_dim
        between = max(0.0, (num_classes - dim) / (dim * max(1, num_classes - 1)))
        variance = c * c * between + (1 - c * c) / dim
        simplex = 1 < num_classes <= dim + 1
        return cls(-c / (num_classes - 1) if simplex else 0.0, math.sqrt(variance))

    def largest(self, num_classes: int) -> float:
        """Median of the largest wrong cosine."""
        if num_classes < 2:
            return -1.0
        rate = math.log(2) / (num_classes - 1)  # 1 - 2^(-1/(C-1)), without cancellation
        upper = torch.tensor(-math.expm1(-rate), dtype=torch.float64, device="cpu")
        return self.mean - self.deviation * float(torch.special.ndtri(upper))


@dataclass(frozen=True)
class Expected:
    """What a sample is expected to meet.

    Attributes
    ----------
    support : float
        Active classes, the target included where it is.
    zero_loss : float
        Probability that it rests.

    Examples
    --------
    >>> wrong = ClassStatistics(mean=0.0, deviation=0.05)
    >>> expected(1000, 1.0, 32.0, 0.2, 0.9, wrong)      # alpha = 1: all are active, none rests
    Expected(support=1000.0, zero_loss=0.0)
    """

    support: float
    zero_loss: float


@lru_cache(maxsize=256)
def expected(
    num_classes: int,
    alpha: float,
    scale: float,
    margin: float,
    target_cosine: float,
    wrong: ClassStatistics,
) -> Expected:
    """Support and resting of a sample under the module's model.

    Parameters
    ----------
    num_classes : int
    alpha, scale, margin : float
        Of Q-Margin.
    target_cosine : float
    wrong : ClassStatistics
        Of the wrong classes' cosines.

    Examples
    --------
    >>> before = ClassStatistics.untrained(192)
    >>> round(expected(5994, 1.5, 10.0, 0.2, 0.0, before).support)
    41
    """
    others = num_classes - 1
    if others == 0:
        return Expected(1.0, 1.0 if alpha > 1 else 0.0)
    if alpha == 1:
        return Expected(float(num_classes), 0.0)
    mean, deviation = wrong.mean, max(wrong.deviation, 1e-9)
    lead = hard_margin(alpha, scale, margin)
    rests = _normal((target_cosine - lead - mean) / deviation) ** others
    nearest = min(others, _NEAREST)
    labels = torch.zeros(_DRAWN, dtype=torch.long, device="cpu")
    while True:
        cosines = mean + deviation * _largest_normals(others, nearest)
        own = cosines.new_full((_DRAWN, 1), target_cosine)
        cosines = torch.cat((own, cosines), 1).clamp(-1, 1)
        objective = q_margin_objective(labels, alpha, scale, margin)
        support = DenseScores(cosines).evaluate(labels, objective, statistics=True).support
        assert support is not None
        # classes that were not drawn are behind those that were
        if nearest == others or int(support.max()) < nearest:
            return Expected(float(support.double().mean()), rests)
        nearest = min(others, 4 * nearest)


def _largest_normals(number: int, largest: int) -> torch.Tensor:
    """The largest of independent normal numbers, in falling order, [_DRAWN, largest]; exact."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(_DRAWN, largest, generator=generator, dtype=torch.float64, device="cpu")
    # -log of the largest of n uniform numbers is exponential with rate n, and so on down
    rates = number - torch.arange(largest, dtype=torch.float64, device="cpu")
    tails = -torch.expm1((-(-drawn).log1p() / rates).cumsum(1).neg())
    return -torch.special.ndtri(tails)


def _normal(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


@dataclass(frozen=True)
class Suggestion:
    """Parameters with their reasons; printed, it says them.

    Attributes
    ----------
    num_classes, embedding_dim : int
    samples : int or None
        Training samples over all epochs.
    alpha, scale, margin : float
    reasons : tuple of str
        One sentence for each decision.

    Examples
    --------
    >>> found = suggest_parameters(5994)
    >>> round(found.hard_margin, 2), found.remedy is None
    (0.54, True)
    >>> found.pushes is None                            # how long the training is was not said
    True
    """

    num_classes: int
    embedding_dim: int
    samples: int | None
    alpha: float
    scale: float
    margin: float
    reasons: tuple[str, ...]

    @property
    def hard_margin(self) -> float:
        """The lead in cosine at which a sample rests."""
        return hard_margin(self.alpha, self.scale, self.margin)

    @property
    def untrained(self) -> Expected:
        """Of the first batch."""
        wrong = ClassStatistics.untrained(self.embedding_dim)
        return expected(self.num_classes, self.alpha, self.scale, self.margin, 0.0, wrong)

    def trained(self, target_cosine: float = _TRAINED) -> Expected:
        """Of a sample whose target's cosine training has brought to this."""
        wrong = ClassStatistics.trained(self.num_classes, self.embedding_dim, target_cosine)
        numbers = self.alpha, self.scale, self.margin
        return expected(self.num_classes, *numbers, target_cosine, wrong)

    @property
    def resting_cosine(self) -> float:
        """The target's cosine at which half of the samples rest; above 1: none ever does."""
        return self.hard_margin + _largest(self.num_classes, self.embedding_dim)

    @property
    def remedy(self) -> str | None:
        """What would bring a margin within reach, for a sentence; None where 0 is already.

        The least embedding and the most classes at this alpha and scale; and the scale, where twice
        as large a one is enough: beyond that nothing was tried.
        """
        rate = (self.alpha - 1) * self.scale
        room, classes = _REACHED - 1 / rate, self.num_classes
        if _largest(classes, self.embedding_dim) <= room:
            return None
        usual = _REACHED - hard_margin(self.alpha, self.scale, _MARGIN)
        ways = [f"an embedding of at least {_least_dim(classes, room)} dimensions"]
        if usual > 0:
            ways[0] += f" ({_least_dim(classes, usual)} for the usual margin of {_MARGIN:g})"
        ways.append(f"at most {_most_classes(classes, self.embedding_dim, room)} classes")
        reach = _REACHED - _largest(classes, self.embedding_dim)
        if 2 * rate * reach >= 1:
            ways.append(f"a scale of at least {math.ceil(1 / ((self.alpha - 1) * reach))}")
        return f"take {', '.join(ways[:-1])}, or {ways[-1]}"

    @property
    def pushes(self) -> float | None:
        """How often each prototype is an active wrong class in the training; None: not known."""
        if self.samples is None:
            return None
        return self.samples * self.untrained.support / self.num_classes

    def __str__(self) -> str:
        before, after = self.untrained, self.trained()
        lines = [
            f"alpha {self.alpha:g}, scale {self.scale:g}, margin {self.margin:.3g} for "
            f"{self.num_classes} classes in {self.embedding_dim} dimensions",
            *(f"- {reason}" for reason in self.reasons),
            f"- hard margin {self.hard_margin:.2f} in cosine; half of the samples rest where the "
            f"target's cosine is {self.resting_cosine:.2f}",
            f"- support: {before.support:.0f} classes before training; "
            f"{after.support:.0f} for a trained sample whose target's cosine is {_TRAINED:g}, "
            f"{100 * after.zero_loss:.0f} % of which rest",
        ]
        if self.pushes is not None:
            lines.append(
                f"- each prototype is pushed away by some {self.pushes:.0f} samples of other "
                f"classes in {self.samples} training samples"
            )
        return "\n".join(lines)


def _largest(num_classes: int, embedding_dim: int) -> float:
    return ClassStatistics.trained(num_classes, embedding_dim, _TRAINED).largest(num_classes)


def _least_dim(num_classes: int, most: float) -> int:
    """Dimensions from which on the largest wrong cosine is at most this, > 0."""
    enough = range(1, _MOST_DIMENSIONS)
    return enough[bisect_left(enough, True, key=lambda dim: _largest(num_classes, dim) <= most)]


def _most_classes(num_classes: int, embedding_dim: int, most: float) -> int:
    """Classes, fewer than so many, up to which the largest wrong cosine is at most this."""
    fewer = range(1, num_classes)
    found = bisect_left(fewer, True, key=lambda classes: _largest(classes, embedding_dim) > most)
    return fewer[found - 1]


def suggest_parameters(
    num_classes: int,
    *,
    embedding_dim: int = 192,
    samples: int | None = None,
    alpha: float | None = None,
) -> Suggestion:
    """Alpha, scale and margin of Q-Margin for a number of classes.

    1. The paper's settings hold at its two sizes, (1.5, 10, 0.2) up to VoxCeleb2 and (1.25, 32,
       0.2) at WebFace42M; between them alpha and (alpha - 1) scale go with the logarithm of the
       number of classes.
    2. Where `samples` are so few that a prototype would be pushed away by fewer than 4,000 samples
       of other classes, alpha falls at the same hard margin, down to 1.25: more classes are active.
    3. Where the hard margin asks for a target's cosine above 0.85, the margin is lowered. Where
       even a margin of 0 asks for more, it is 0, and the reasons say what would be enough.

    Parameters
    ----------
    num_classes : int
        As the classifier has them: a speaker at another speed is another class.
    embedding_dim : int
    samples : int, optional
        How many training samples there are, counted once an epoch. None: a long training.
    alpha : float, > 1, optional
        Kept, and scale and margin are found for it.

    Returns
    -------
    Suggestion

    Raises
    ------
    ValueError
        Numbers below 1; an alpha of 1 or below, which has no hard margin.

    Notes
    -----
    What it is backed by, and what not: docs/parameters.md.

    Examples
    --------
    >>> print(suggest_parameters(438, samples=12 * 2341))
    alpha 1.25, scale 20, margin 0.2 for 438 classes in 192 dimensions
    - (alpha - 1) scale = 5: the paper's setting for speakers
    - alpha 1.25 instead of 1.5: 28092 samples are few, and more classes must be active
    - hard margin 0.54 in cosine; half of the samples rest where the target's cosine is 0.73
    - support: 73 classes before training; 4 for a trained sample whose target's cosine is 0.7, \
4 % of which rest
    - each prototype is pushed away by some 4665 samples of other classes in 28092 training samples
    >>> found = suggest_parameters(5994)
    >>> found.alpha, found.scale, round(found.margin, 3)
    (1.5, 10.0, 0.2)
    """
    numbers = {"num_classes": num_classes, "embedding_dim": embedding_dim}
    for name, value in numbers.items() | ({} if samples is None else {"samples": samples}).items():
        if int(value) != value or value < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {value}")
    if alpha is not None and not 1 < alpha < math.inf:
        raise ValueError(
            f"alpha must be a finite number > 1, got {alpha}; at 1 there is no hard margin: use "
            "cosface"
        )
    share = _between(num_classes)
    where = {0.0: "the paper's setting for speakers", 1.0: "the paper's setting for faces"}
    between = "between the paper's settings for speakers and faces, by the number of classes"
    most = _on_grid(_SPEECH[1] + share * (_FACES[1] - _SPEECH[1])) if alpha is None else alpha
    rate = _SPEECH[2] + share * (_FACES[2] - _SPEECH[2])
    reasons = [f"(alpha - 1) scale = {rate:.3g}: {where.get(share, between)}"]
    if alpha is not None:
        reasons.append(f"alpha {alpha:g}: given")

    def at(order: float, margin: float = _MARGIN) -> Suggestion:
        scale = round(rate / (order - 1), 3)
        margin = float(margin)
        return Suggestion(num_classes, embedding_dim, samples, order, scale, margin, tuple(reasons))

    order, least = most, _LEAST_ALPHA if alpha is None else most
    while order > least and (at(order).pushes or math.inf) < _ENOUGH_PUSHES:
        order = _on_grid(order - _ALPHA_STEP)
    if order < most:
        reasons.append(
            f"alpha {order:g} instead of {most:g}: {samples} samples are few, and more classes "
            "must be active"
        )
    pushes = at(order).pushes
    if pushes is not None and pushes < _ENOUGH_PUSHES:
        reasons.append(
            f"the training is short: {_ENOUGH_PUSHES / pushes:.1f} times as many epochs would be "
            f"enough at alpha {order:g}"
        )
    largest = _largest(num_classes, embedding_dim)
    usual = at(order)
    lead = usual.hard_margin
    if lead + largest <= _REACHED:
        return usual
    wrong = f"with wrong cosines up to {largest:.2f} in {embedding_dim} dimensions"
    without = at(order, 0.0)
    if without.resting_cosine > _REACHED:
        reasons.append(
            f"margin 0: {wrong}, even the hard margin of {without.hard_margin:.2f} that is there "
            f"without one asks for a target's cosine of {without.resting_cosine:.2f}; for one "
            f"within reach {without.remedy}"
        )
        return at(order, 0.0)
    margin = margin_for(order, usual.scale, _REACHED - largest)
    reasons.append(
        f"margin {margin:.3g} instead of {_MARGIN:g}: {wrong}, the usual hard margin of "
        f"{lead:.2f} would ask for a target's cosine of {lead + largest:.2f}"
    )
    return at(order, margin)


def _between(num_classes: int) -> float:
    """0 up to the speakers, 1 from the faces on, in the logarithm between them."""
    low, high = math.log(_SPEECH[0]), math.log(_FACES[0])
    return min(1.0, max(0.0, (math.log(num_classes) - low) / (high - low)))


def _on_grid(alpha: float) -> float:
    return round(round(alpha / _ALPHA_STEP) * _ALPHA_STEP, 2)
