r"""Identification, 1:N: who in a watch list is it, and is it anybody there at all?

Closed set: the cumulative match curve, the share of mated probes whose identity is among the k
best. Open set (ISO/IEC 19795-1, as NIST's FRTE 1:N prints it): at a threshold the false positive
identification rate FPIR, of probes of nobody in the watch list that still find someone, and the
false negative identification rate FNIR, of probes of somebody in it whose identity is not found
among the first R at or above the threshold. FPIR grows with the watch list (Peri et al. 2023,
VoxWatch), so every figure says its size; smaller watch lists are the exact mean over all subsets
of the given one, by the hypergeometric distribution, not a draw of some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from speechbrain_qmargin.scoring.influence import effective_number
from speechbrain_qmargin.scoring.metrics import allowed_false_accepts
from speechbrain_qmargin.scoring.shares import Share, share
from speechbrain_qmargin.scoring.uncertainty import mark_of

__all__ = ["COMBINE", "Identification", "OpenSet", "identify"]

COMBINE = ("max", "mean")
_CELLS = 2**23  # products held at once, in float32
_STEPS = 2048  # thresholds among which that of a smaller watch list is looked for


@dataclass(frozen=True)
class OpenSet:
    """FPIR and FNIR at one threshold for one size of watch list.

    Attributes
    ----------
    size : int
        Identities in the watch list.
    target : float
        The FPIR that was asked for; not exceeded.
    threshold : float
        Found are identities whose score is at or above it.
    fpir : Share
        At this very threshold.
    fnir : Share
        Its interval also knows that the threshold was found on these probes.

    Examples
    --------
    >>> probes = np.array([[1, 0.1, 0], [0, 0.9, 0.2], [0, 0, 0.5], [0.3, 0.2, 0.1]])
    >>> found = identify(np.eye(3), "abc", probes, "abde", fpirs=[0.5])
    >>> (row,) = found.open_set  # of d and e, who are not in the list, one may be found
    >>> row.size, row.fpir.value, row.fnir.value, 0.3 < row.threshold < 0.5
    (3, 0.5, 0.0, True)
    """

    size: int
    target: float
    threshold: float
    fpir: Share
    fnir: Share


@dataclass(frozen=True)
class Identification:
    """What :func:`identify` found.

    Attributes
    ----------
    identities, templates : int
        Of the watch list.
    rank_limit : int
        R, of the FNIR.
    cmc : dict from rank to Share
        The share of mated probes whose identity is among the `rank` best of the whole list.
    open_set : list of OpenSet
        By size and target; empty where no probe is of somebody else.
    ranks : int array [mated probes]
        1 where no other identity scores as high as the probe's own; ties count against it.
    mate_scores : float32 array [mated probes]
    highest : float32 array [other probes]
        The highest score of an identity of the whole list.
    confidence : float
        Of the intervals.

    Examples
    --------
    >>> probes = np.array([[1, 0.1, 0], [0, 1, 0.2], [0.6, 0.7, 0], [0.5, 0.5, 0.4]])
    >>> found = identify(np.eye(3), "abc", probes, "abac", ranks=[1, 2], fpirs=[])
    >>> found.ranks.tolist(), found.cmc[2].value
    ([1, 1, 2, 3], 0.75)
    """

    identities: int
    templates: int
    rank_limit: int
    cmc: dict[int, Share]
    open_set: list[OpenSet]
    ranks: np.ndarray = field(repr=False)
    mate_scores: np.ndarray = field(repr=False)
    highest: np.ndarray = field(repr=False)
    confidence: float = 0.95

    def table(self) -> str:
        """For people."""
        lines = [
            f"{self.identities:,} identities of {self.templates:,} templates; "
            f"{len(self.ranks):,} mated probes, {len(self.highest):,} of others",
            "",
            f"rank   found ({100 * self.confidence:g} % interval over identities)",
        ]
        lines += [f"{rank:<6} {found}" for rank, found in self.cmc.items()]
        if self.open_set:
            among = "first" if self.rank_limit == 1 else f"among the first {self.rank_limit}"
            lines += [
                "",
                "identities  FPIR wanted  threshold  "
                f"{'FPIR':38}  FNIR ({among}, at the threshold or above)",
            ]
        for row in self.open_set:
            lines.append(
                f"{row.size:<10,}  {row.target:<11g}  {row.threshold:<9.5g}  "
                f"{row.fpir!s:38}  {row.fnir}"
            )
        if any(row.size < self.identities for row in self.open_set):
            lines.append("Smaller watch lists: the exact mean over all subsets of the given one.")
        return "\n".join(lines)

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return {
            "identities": self.identities,
            "templates": self.templates,
            "mated_probes": len(self.ranks),
            "other_probes": len(self.highest),
            "rank_limit": self.rank_limit,
            "confidence": self.confidence,
            "cmc": {str(rank): asdict(found) for rank, found in self.cmc.items()},
            "open_set": [asdict(row) for row in self.open_set],
        }


def identify(
    gallery: np.ndarray,
    gallery_identity: Sequence[Hashable] | np.ndarray,
    probes: np.ndarray,
    probe_identity: Sequence[Hashable] | np.ndarray,
    *,
    ranks: Sequence[int] = (1, 5, 10, 20),
    fpirs: Sequence[float] = (0.1, 0.01, 0.001),
    rank_limit: int = 1,
    sizes: Sequence[int] = (),
    combine: str = "max",
    confidence: float = 0.95,
    progress: Callable[[int], object] | None = None,
) -> Identification:
    """Search every probe in a watch list, in blocks.

    A probe is mated if its identity is in the gallery. Products are computed in blocks of 32 MiB,
    two or three times over, so memory stays bounded whatever the sizes.

    Parameters
    ----------
    gallery : float array [T, D]
        Templates, of unit length if the score is to be the cosine; several an identity.
    gallery_identity : sequence [T]
        Names or numbers.
    probes : float array [P, D]
    probe_identity : sequence [P]
    ranks : sequence of int
        Of the closed set; those above the number of identities are left out.
    fpirs : sequence of float
    rank_limit : int
        R: the identity must be among the first R to be found.
    sizes : sequence of int
        Smaller watch lists; the whole gallery is always there.
    combine : {"max", "mean"}
        The score of an identity from those of its templates.
    confidence : float
    progress : callable, optional
        Called with the number of probes just searched; each is searched twice, those that are not
        mated a third time where there are `sizes`.

    Returns
    -------
    Identification

    Raises
    ------
    ValueError
        Shapes that disagree, embeddings that are not finite, fewer than two identities, no mated
        probe, a rank, size or FPIR out of range.

    Notes
    -----
    The interval is Student's t on the logit scale, with the variance of a jackknife that leaves
    out one identity at a time: its probes, and its templates from everybody's search. Where fewer
    than 30 errors carry a rate, the wider of that and Clopper-Pearson. The interval of FNIR at an
    FPIR joins that of FNIR at its threshold with the FNIRs at the thresholds that the interval of
    FPIR allows (Woodruff 1952; joined as Zou and Donner 2008 do).

    Examples
    --------
    >>> gallery = np.eye(3)
    >>> probes = np.array([[1, 0.1, 0], [0, 1, 0.2], [0.6, 0.7, 0], [0.5, 0.5, 0.5]])
    >>> found = identify(gallery, "abc", probes, "abac", fpirs=[])
    >>> found.ranks.tolist(), found.cmc[1].value
    ([1, 1, 2, 3], 0.5)
    """
    from scipy.stats import hypergeom

    if combine not in COMBINE:
        raise ValueError(f"combine must be one of {', '.join(COMBINE)}, got {combine!r}")
    table = _Table(gallery, gallery_identity, probes, probe_identity, combine)
    count = table.count
    ranked = not ranks or 1 <= min(ranks) <= count  # larger ones are passed over
    if not ranked or not 1 <= rank_limit <= count:
        raise ValueError(f"ranks must be from 1 to the {count:,} identities of the gallery")
    bad = [size for size in sizes if not 2 <= size <= count]
    if bad:
        raise ValueError(f"a watch list of {bad[0]:,} of {count:,} identities: want 2 to {count:,}")
    bad = [rate for rate in fpirs if not 0 < rate < 1]
    if bad:
        raise ValueError(f"an FPIR must be in (0, 1), got {bad[0]}")

    def search(rows: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        for part, scores in table.blocks(rows):
            yield part, scores
            if progress:
                progress(len(scores))

    # first search: ranks, and the highest scores of those who are not in the list
    mate_scores = np.empty(len(table.mated), np.float32)
    above = np.empty(len(table.mated), np.int64)
    for part, scores in search(table.mated):
        own = table.identity[table.mated[part]]
        mate = scores[np.arange(len(scores)), own]
        mate_scores[part] = mate
        above[part] = np.count_nonzero(scores >= mate[:, None], axis=1) - 1
    highest, lowest = np.empty(len(table.others), np.float32), np.inf
    for part, scores in search(table.others):
        highest[part] = scores.max(axis=1)
        lowest = min(lowest, float(scores.min()))

    # thresholds
    targets = list(fpirs) if len(table.others) else []
    sizes = sorted({*sizes, count})
    smaller = [size for size in sizes if size < count] if targets else []
    grid, curves = _fpir_curves(search, table, smaller, lowest, highest) if smaller else ({}, {})
    ordered = np.sort(highest)

    def threshold_of(size: int, rate: float) -> float:
        """The lowest threshold whose FPIR is not above `rate`; +inf where there is none."""
        if size < count:
            at = int(np.argmax(curves[size] <= rate * (1 + 1e-12)))
            return float(grid[at]) if curves[size][at] <= rate * (1 + 1e-12) else np.inf
        allowed = allowed_false_accepts(rate, len(ordered))
        if allowed >= len(ordered):
            return -np.inf
        return float(np.nextafter(ordered[len(ordered) - allowed - 1], np.float32(np.inf)))

    def found_at(size: int, threshold: float, rank: int) -> np.ndarray:
        """The probability that each mated probe is found."""
        chance = hypergeom.cdf(rank - 1, count - 1, np.arange(count), size - 1)
        return np.where(mate_scores >= threshold, chance[above], 0.0)

    closed = [(count, -np.inf, rank) for rank in ranks if rank <= count]
    open_cells = [
        (size, threshold_of(size, rate), rank_limit) for size in sizes for rate in targets
    ]
    wanted = [rate for _ in sizes for rate in targets]
    hits = [found_at(*cell) for cell in closed + open_cells]

    # second search: how much each identity of the list sways them
    swayed = np.zeros((len(hits), count))
    losses = [_change(count, size, rank, hypergeom) for size, _, rank in closed + open_cells]
    reached = [mate_scores >= threshold for _, threshold, _ in closed + open_cells]
    for part, scores in search(table.mated):
        own = table.identity[table.mated[part]]
        mate = scores[np.arange(len(scores)), own]
        outranks = scores >= mate[:, None]
        outranks[np.arange(len(scores)), own] = False
        weights = np.stack([loss[above[part]] * ok[part]
                            for loss, ok in zip(losses, reached, strict=True)])  # fmt: skip
        swayed += weights @ outranks
    alarms = [np.empty(len(table.others)) for _ in open_cells]
    alarmed = np.zeros((len(open_cells), count))
    tables = [_alarm_tables(count, size) for size, _, _ in open_cells]
    for part, scores in search(table.others) if open_cells else ():
        for cell, (_, threshold, _) in enumerate(open_cells):
            over = scores >= threshold
            number = np.count_nonzero(over, axis=1)
            chance, change = tables[cell]
            alarms[cell][part] = chance[number]
            alarmed[cell] += change[number] @ over

    of_mated, of_others = table.identity[table.mated], table.identity[table.others]
    effective = min(effective_number(np.unique(of, return_counts=True)[1])
                    for of in (of_mated, of_others) if len(of))  # fmt: skip
    shares = [_found_share(hit, of_mated, sway, confidence)
              for hit, sway in zip(hits, swayed, strict=True)]  # fmt: skip
    cmc = {rank: shares[n] for n, (_, _, rank) in enumerate(closed)}
    open_set = []
    for cell, (size, threshold, rank) in enumerate(open_cells):
        fpir = _alarm_share(alarms[cell], of_others, alarmed[cell], confidence)
        missed = shares[len(closed) + cell].complement
        lenient = 1 - found_at(size, threshold_of(size, fpir.high), rank).mean()
        strict = 1.0  # a FPIR of less than one probe: the threshold may be beyond all scores
        if fpir.low * len(highest) >= 1:
            strict = 1 - found_at(size, threshold_of(size, fpir.low), rank).mean()
        allowed = wanted[cell] * len(highest)
        fnir = _with_threshold(missed, float(lenient), float(strict), min(allowed, missed.errors),
                               min(missed.people, fpir.people), effective)  # fmt: skip
        open_set.append(OpenSet(size, wanted[cell], threshold, fpir, fnir))
    return Identification(count, len(table.gallery), rank_limit, cmc, open_set, above + 1,
                          mate_scores, highest, confidence)  # fmt: skip


class _Table:
    """Scores of probes with identities, block by block.

    `identity` numbers the identity of every probe; those below `count` are the gallery's.
    """

    def __init__(self, gallery, gallery_identity, probes, probe_identity, combine: str):
        self.gallery, self.probes = (np.asarray(x, dtype=np.float32) for x in (gallery, probes))
        names, other = list(gallery_identity), list(probe_identity)
        if self.gallery.ndim != 2 or self.gallery.shape[1:] != self.probes.shape[1:]:
            raise ValueError(
                f"gallery {self.gallery.shape} and probes {self.probes.shape}: want [T, D], [P, D]"
            )
        if len(names) != len(self.gallery) or len(other) != len(self.probes):
            raise ValueError(
                f"{len(self.gallery)} templates of {len(names)} identities named, "
                f"{len(self.probes)} probes of {len(other)}: want one each"
            )
        for what, rows in (("template", self.gallery), ("probe", self.probes)):
            finite = np.isfinite(rows).all(axis=1)
            if not finite.all():
                raise ValueError(f"{what} {int(np.argmin(finite))} is not finite")
        number: dict = {}
        own = np.array([number.setdefault(name, len(number)) for name in names], dtype=np.int64)
        self.count = len(number)
        if self.count < 2:
            raise ValueError(f"{self.count} identities in the gallery: want two or more")
        self.identity = np.array(
            [number.setdefault(name, len(number)) for name in other], dtype=np.int64
        )
        self.mated = np.flatnonzero(self.identity < self.count)
        self.others = np.flatnonzero(self.identity >= self.count)
        if not len(self.mated):
            raise ValueError("no probe is of an identity in the gallery: are the names the same?")
        order = np.argsort(own, kind="stable")
        self.gallery, own = self.gallery[order], own[order]
        self.first = np.searchsorted(own, np.arange(self.count))
        self.each = np.diff(np.append(self.first, len(own))).astype(np.float32)
        self.combine = combine

    def blocks(self, rows: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Parts of `rows`, and their scores float32 [B, count] with every identity."""
        height = max(1, _CELLS // len(self.gallery))
        for start in range(0, len(rows), height):
            part = slice(start, start + height)
            scores = self.probes[rows[part]] @ self.gallery.T
            if self.count < len(self.gallery):
                if self.combine == "max":
                    scores = np.maximum.reduceat(scores, self.first, axis=1)
                else:
                    scores = np.add.reduceat(scores, self.first, axis=1) / self.each
            yield part, scores


# ------------------------------------------------------------------ smaller watch lists


def _alarm_chance(count: int, size: int) -> np.ndarray:
    """Whether `size` of `count` identities hold one of m, for m = 0 to `count`: [count + 1]."""
    drawn = np.arange(count)
    return 1 - np.append(1.0, np.cumprod(np.maximum(count - size - drawn, 0) / (count - drawn)))


def _alarm_tables(count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The chance of an alarm by the number m that would raise one, and its change without one."""
    less = np.append(_alarm_chance(count - 1, size), 1.0)  # m is at most count - 1
    return _alarm_chance(count, size), np.append(0.0, less[:-1] - less[1:])


def _change(count: int, size: int, rank: int, hypergeom) -> np.ndarray:
    """How the chance of being found, by the number that outrank, changes without one of them."""
    if count == 2:
        return np.array([0.0, 1.0 if rank == 1 else 0.0])
    chance = hypergeom.cdf(rank - 1, count - 2, np.arange(count - 1), min(size, count - 1) - 1)
    chance = np.append(chance, 1.0 if rank >= count else 0.0)
    return np.append(0.0, chance[:-1] - chance[1:])


def _fpir_curves(search, table: _Table, sizes: Sequence[int], lowest: float, highest: np.ndarray):
    """FPIR of every size at thresholds from the lowest score to just above the highest."""
    top = np.nextafter(highest.max(), np.float32(np.inf))
    grid = np.linspace(lowest, top, _STEPS).astype(np.float32)
    chances = [_alarm_chance(table.count, size) for size in sizes]
    sums = np.zeros((len(sizes), len(grid)))
    for _, scores in search(table.others):
        at = (
            np.searchsorted(grid, scores, side="right")
            + (len(grid) + 1) * np.arange(len(scores))[:, None]
        )
        counts = np.bincount(at.ravel(), minlength=len(scores) * (len(grid) + 1))
        counts = counts.reshape(len(scores), -1)[:, ::-1].cumsum(axis=1)[:, ::-1]
        over = counts[:, 1:]  # at or above each threshold
        for row, chance in zip(sums, chances, strict=True):
            row += chance[over].sum(axis=0)
    return grid, {size: row / len(table.others) for size, row in zip(sizes, sums, strict=True)}


# ------------------------------------------------------------------ intervals


def _sums(values: np.ndarray, identity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of every identity that has any."""
    number = np.unique(identity, return_inverse=True)[1]
    return np.bincount(number, values), np.bincount(number)


def _found_share(found: np.ndarray, identity: np.ndarray, swayed: np.ndarray, confidence: float):
    """The share of mated probes that are found; identities of the gallery are left out in turn."""
    rate = min(max(float(found.mean()), 0.0), 1.0)
    count = len(swayed)
    own = np.bincount(identity, found - rate, minlength=count)
    left_out = (swayed - own) / len(found)
    variance = (count - 1) / count * np.sum((left_out - left_out.mean()) ** 2)
    number = np.unique(identity, return_counts=True)[1]
    return share(
        rate, float(variance), len(found), len(number), confidence, effective_number(number)
    )


def _alarm_share(alarm: np.ndarray, identity: np.ndarray, swayed: np.ndarray, confidence: float):
    """The share of other probes that raise an alarm; two kinds of identities, so two variances."""
    rate = min(max(float(alarm.mean()), 0.0), 1.0)
    total, number = _sums(alarm, identity)
    people, count = len(total), len(swayed)
    left_out = swayed / len(alarm)
    variance = (count - 1) / count * np.sum((left_out - left_out.mean()) ** 2)
    if people > 1:
        variance += people / (people - 1) * np.sum((total - rate * number) ** 2) / len(alarm) ** 2
    return share(rate, float(variance), len(alarm), people, confidence, effective_number(number))


def _with_threshold(
    missed: Share, lenient: float, strict: float, errors: float, people: int, effective: float
) -> Share:
    """Joined with the rates at the ends of the threshold's interval."""
    value = missed.value
    low = value - np.hypot(value - missed.low, value - lenient)
    high = value + np.hypot(missed.high - value, strict - value)
    return replace(
        missed,
        low=float(max(low, 0)),
        high=float(min(high, 1)),
        errors=float(errors),
        people=people,
        mark=mark_of(errors, effective),
    )
