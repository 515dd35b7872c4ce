"""Identification against loops over probes, subsets and left-out identities."""

import itertools

import numpy as np
import pytest

from speechbrain_qmargin.scoring import identification
from speechbrain_qmargin.scoring.identification import identify


def simulated(seed=0, people=9, strangers=7, each=3, templates=2, dim=6, levels=None):
    """Gallery, its names, probes, theirs; with `levels` the scores tie."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(people + strangers, dim))
    names = [f"p{i}" for i in range(people + strangers)]
    of_gallery = np.repeat(np.arange(people), templates)
    of_probe = np.repeat(np.arange(people + strangers), each)
    gallery = centres[of_gallery] + rng.normal(size=(len(of_gallery), dim))
    probes = centres[of_probe] + rng.normal(size=(len(of_probe), dim))
    if levels:
        gallery, probes = np.sign(np.round(gallery)), np.sign(np.round(probes))
    return gallery, [names[i] for i in of_gallery], probes, [names[i] for i in of_probe]


def naive_scores(gallery, owners, probes, combine):
    people = list(dict.fromkeys(owners))
    table = probes.astype(np.float32) @ gallery.astype(np.float32).T
    pick = {"max": np.max, "mean": np.mean}[combine]
    return people, np.stack(
        [pick(table[:, [o == name for o in owners]], axis=1) for name in people], axis=1
    )


def is_found(row, own, threshold, rank):
    place = 1 + sum(score >= row[own] for k, score in enumerate(row) if k != own)
    return row[own] >= threshold and place <= rank


def naive_rates(scores, people, names, threshold, rank):
    """Share of mated probes found, share of others that raise an alarm."""
    found, alarms = [], []
    for row, name in zip(scores, names, strict=True):
        if name in people:
            found.append(is_found(row, people.index(name), threshold, rank))
        else:
            alarms.append(max(row) >= threshold)
    return np.mean(found), np.mean(alarms)


@pytest.mark.parametrize("combine", ["max", "mean"])
@pytest.mark.parametrize("levels", [None, 3])
def test_rates_of_the_whole_list_are_those_of_a_loop(combine, levels):
    gallery, owners, probes, names = simulated(levels=levels)
    people, scores = naive_scores(gallery, owners, probes, combine)
    found = identify(gallery, owners, probes, names, ranks=(1, 2, 5), fpirs=(0.3, 0.1),
                     rank_limit=2, combine=combine)  # fmt: skip
    for rank, share in found.cmc.items():
        assert share.value == pytest.approx(
            naive_rates(scores, people, names, -np.inf, rank)[0], abs=1e-12
        )
        assert np.mean(found.ranks <= rank) == pytest.approx(share.value)
    for row in found.open_set:
        hit, alarm = naive_rates(scores, people, names, np.float32(row.threshold), 2)
        assert row.fnir.value == pytest.approx(1 - hit)
        assert row.fpir.value == pytest.approx(alarm)
        assert row.fpir.value <= row.target
        for share in (row.fpir, row.fnir):
            assert share.low <= share.value <= share.high


@pytest.mark.parametrize("rank_limit", [1, 2])
def test_smaller_lists_are_the_mean_over_all_subsets(rank_limit):
    gallery, owners, probes, names = simulated(people=6, strangers=5)
    people, scores = naive_scores(gallery, owners, probes, "max")
    found = identify(gallery, owners, probes, names, fpirs=(0.4, 0.2), sizes=(2, 4),
                     rank_limit=rank_limit)  # fmt: skip
    assert [row.size for row in found.open_set] == [2, 2, 4, 4, 6, 6]
    for row in found.open_set:
        hits, alarms = [], []
        for kept in itertools.combinations(range(6), row.size):
            part = [people[k] for k in kept]
            for line, name in zip(scores[:, kept], names, strict=True):
                if name in people and name not in part:
                    continue
                if name in part:
                    own = line[part.index(name)]
                    place = np.count_nonzero(line >= own)
                    hits.append(own >= np.float32(row.threshold) and place <= rank_limit)
                else:
                    alarms.append(line.max() >= np.float32(row.threshold))
        assert row.fnir.value == pytest.approx(1 - np.mean(hits))
        assert row.fpir.value == pytest.approx(np.mean(alarms))
        assert row.fpir.value <= row.target


def shares_of(monkeypatch):
    """What `identify` gives to `share` and gets from it, as it goes on."""
    seen, share = [], identification.share

    def keep(rate, variance, *others):
        seen.append((rate, variance, share(rate, variance, *others)))
        return seen[-1][-1]

    monkeypatch.setattr(identification, "share", keep)
    return seen


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize(("count", "rank_limit"), [(8, 1), (8, 2), (3, 3), (2, 1), (2, 2)])
def test_the_jackknife_leaves_out_each_identity(count, rank_limit, levels, monkeypatch):
    """The variances that intervals are made of, by searching everything without each identity."""
    gallery, owners, probes, names = simulated(3, count, 6, each=4, dim=3, levels=levels)
    seen = shares_of(monkeypatch)
    found = identify(gallery, owners, probes, names, ranks=(1,), fpirs=(0.6,),
                     rank_limit=rank_limit)  # fmt: skip
    people, scores = naive_scores(gallery, owners, probes, "max")
    threshold = np.float32(found.open_set[0].threshold)
    mated = [(row, people.index(name)) for row, name in zip(scores, names, strict=True)
             if name in people]  # fmt: skip
    factor = (count - 1) / count * count  # times the population variance
    for (rate, variance, _), cell in zip(seen, [(-np.inf, 1), (threshold, rank_limit)],
                                         strict=False):  # fmt: skip
        hits = [is_found(row, own, *cell) for row, own in mated]
        assert rate == pytest.approx(np.mean(hits))
        changes = []
        for out in range(count):
            # one's own probes are gone: what they add to the rate, to first order
            without = [is_found(np.delete(row, out), own - (own > out), *cell) - float(hit)
                       if own != out else rate - hit
                       for (row, own), hit in zip(mated, hits, strict=True)]  # fmt: skip
            changes.append(sum(without) / len(mated))
        assert variance == pytest.approx(factor * np.var(changes))
    others = scores[[name not in people for name in names]]
    alarms = [(np.delete(others, out, 1).max(axis=1) >= threshold).mean() for out in range(count)]
    by_person = (others.max(axis=1) >= threshold).reshape(6, 4)
    own = by_person.mean(axis=1).var(ddof=1) / 6
    assert seen[-1][:2] == pytest.approx((by_person.mean(), factor * np.var(alarms) + own))


@pytest.mark.parametrize(
    ("strangers", "rate", "dim", "mark"),
    [(60, 0.2, 6, "indicative"), (7, 0.06, 6, "unsupported"), (1, 0.5, 30, "unsupported")],
)
def test_the_interval_of_misses_counts_that_the_threshold_moves(
    strangers, rate, dim, mark, monkeypatch
):
    """By as much as FPIR is uncertain, up to a threshold beyond all scores or below them."""
    seen = shares_of(monkeypatch)
    data = simulated(4, people=12, strangers=strangers, dim=dim)
    found = identify(*data, ranks=(), fpirs=(rate,))
    (row,), missed = found.open_set, seen[0][-1].complement
    number, falling = 3 * strangers, np.sort(found.highest)[::-1]

    def misses(fpir):
        allowed = int(fpir * number + 1e-9)
        above = falling[allowed] if allowed < number else -np.inf
        return 1 - np.mean((found.mate_scores > above) & (found.ranks == 1))

    assert row.fnir.value == missed.value == misses(rate)
    strict = misses(row.fpir.low) if row.fpir.low * number >= 1 else 1.0
    low = missed.value - np.hypot(missed.value - missed.low, missed.value - misses(row.fpir.high))
    high = missed.value + np.hypot(missed.high - missed.value, strict - missed.value)
    assert (row.fnir.low, row.fnir.high) == pytest.approx((max(low, 0), min(high, 1)))
    assert row.fnir.errors == pytest.approx(min(rate * number, missed.errors))
    assert (row.fnir.people, row.fnir.mark) == (min(12, strangers), mark)


def test_a_probe_at_the_threshold_is_found():
    least = np.nextafter(np.float32(0.5), np.float32(1))
    probes = np.array([[least, 0], [0, 1], [0.5, 0]], np.float32)
    found = identify(np.eye(2), ["a", "b"], probes, ["a", "b", "stranger"], ranks=(), fpirs=(0.3,))
    assert found.open_set[0].threshold == least
    assert found.open_set[0].fnir.value == 0


def test_blocks_change_nothing(monkeypatch):
    data = simulated(seed=5, people=20, strangers=20)
    whole = identify(*data, sizes=(5,))
    monkeypatch.setattr(identification, "_CELLS", 100)
    done = []
    parts = identify(*data, sizes=(5,), progress=done.append)
    assert sum(done) == 2 * 60 + 3 * 60
    assert whole.cmc.keys() == parts.cmc.keys()
    for one, two in zip(whole.open_set, parts.open_set, strict=True):
        assert one.fpir.value == pytest.approx(two.fpir.value)
        assert one.fnir.high == pytest.approx(two.fnir.high)
    assert "identities" in whole.table()
    assert whole.to_dict()["open_set"][0]["size"] == 5


def test_few_identities_and_few_errors_are_said():
    data = simulated(people=4, strangers=3, each=40, dim=2)
    found = identify(*data, ranks=(1,), fpirs=(0.3, 0.001))
    assert found.cmc[1].errors >= 30
    assert found.cmc[1].mark == "indicative"  # four identities
    assert found.open_set[1].fpir.mark == "unsupported"
    assert found.open_set[1].fnir.high == 1


@pytest.mark.parametrize("who", ["p0", "p20"])  # of the list, a stranger
def test_one_person_with_most_probes_is_not_many_people(who):
    gallery, owners, probes, names = simulated(people=20, strangers=20, each=15, dim=3)
    even = identify(gallery, owners, probes, names, fpirs=(0.5,)).open_set[0].fnir
    assert even.mark == "measured"
    rng = np.random.default_rng(1)
    more = probes[names.index(who)] + rng.normal(size=(2000, 3))
    found = identify(gallery, owners, np.concatenate((probes, more)), names + [who] * 2000,
                     fpirs=(0.5,)).open_set[0].fnir  # fmt: skip
    assert found.people == 20
    assert found.errors >= 30
    assert found.mark == "unsupported"


def test_bad_input_is_named():
    gallery, owners, probes, names = simulated()
    with pytest.raises(ValueError, match="no probe is of an identity in the gallery"):
        identify(gallery, owners, probes, ["x"] * len(probes))
    with pytest.raises(ValueError, match="1 identities in the gallery"):
        identify(gallery, ["a"] * len(gallery), probes, names)
    with pytest.raises(ValueError, match=r"a watch list of 99 of 9 identities"):
        identify(gallery, owners, probes, names, sizes=(99,))
    with pytest.raises(ValueError, match="an FPIR must be in"):
        identify(gallery, owners, probes, names, fpirs=(0.0,))
    with pytest.raises(ValueError, match="want one each"):
        identify(gallery, owners[:-1], probes, names)
    probes[4, 1] = np.nan
    with pytest.raises(ValueError, match="probe 4 is not finite"):
        identify(gallery, owners, probes, names)


def test_without_strangers_there_is_no_open_set():
    gallery, owners, probes, names = simulated(strangers=0)
    assert identify(gallery, owners, probes, names).open_set == []


@pytest.mark.slow
def test_intervals_hold_the_truth():
    """Coverage over 200 worlds of 60 identities in the list and 60 others, three probes each."""
    kept = {"rank 1": [], "FNIR": []}
    truth = None
    for seed in range(-1, 200):
        large = seed < 0
        rng = np.random.default_rng([seed + 1, 9])
        worlds = 100 if large else 1
        values = []
        for _ in range(worlds):
            centres = rng.normal(size=(120, 8))
            spread = np.exp(0.3 * rng.normal(size=(120, 1)))  # some people are harder

            def take(of, centres=centres, spread=spread, rng=rng):
                rows = centres[of] + spread[of] * rng.normal(size=(len(of), 8))
                return rows / np.linalg.norm(rows, axis=1, keepdims=True)

            members, everybody = np.arange(60), np.repeat(np.arange(120), 3)
            found = identify(take(members), members, take(everybody), everybody, ranks=(1,),
                             fpirs=(0.1,))  # fmt: skip
            values.append((found.cmc[1].value, found.open_set[0].fnir.value))
        if large:
            truth = np.mean(values, axis=0)
            continue
        row = found.open_set[0]
        for name, share, true in (("rank 1", found.cmc[1], truth[0]), ("FNIR", row.fnir, truth[1])):
            kept[name].append(share.low <= true <= share.high)
    assert 0.92 <= np.mean(kept["rank 1"]) <= 1
    assert 0.92 <= np.mean(kept["FNIR"]) <= 1
