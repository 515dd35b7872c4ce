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


def naive_rates(scores, people, names, threshold, rank):
    """Share of mated probes found, share of others that raise an alarm."""
    found, alarms = [], []
    for row, name in zip(scores, names, strict=True):
        if name in people:
            own = row[people.index(name)]
            place = 1 + sum(s >= own for k, s in enumerate(row) if people[k] != name)
            found.append(own >= threshold and place <= rank)
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


def test_the_jackknife_leaves_out_each_identity(monkeypatch):
    """The variances that intervals are made of, by running everything without each identity."""
    gallery, owners, probes, names = simulated(seed=3, people=8, strangers=6, each=4, dim=3)
    seen = []

    def keep(rate, variance, *others):
        seen.append((rate, variance))
        return share(rate, variance, *others)

    share = identification.share
    monkeypatch.setattr(identification, "share", keep)
    found = identify(gallery, owners, probes, names, ranks=(1, 3), fpirs=(0.25,))
    people, scores = naive_scores(gallery, owners, probes, "max")
    threshold = np.float32(found.open_set[0].threshold)
    rates = {cell: naive_rates(scores, people, names, *cell)
             for cell in ((-np.inf, 1), (-np.inf, 3), (threshold, 1))}  # fmt: skip
    values = {cell: [] for cell in rates}
    for out in range(len(people)):
        kept = [k for k in range(len(people)) if k != out]
        left = [n for n, name in enumerate(names) if name != people[out]]
        for cell in rates:
            values[cell].append(
                naive_rates(scores[np.ix_(left, kept)], [people[k] for k in kept],
                            [names[n] for n in left], *cell)
            )  # fmt: skip
    count = len(people)
    factor = (count - 1) / count * count  # times the population variance
    for (rate, variance), cell in zip(seen, rates, strict=False):
        hits = np.array([v[0] for v in values[cell]])
        assert rate == pytest.approx(rates[cell][0])
        # the probes' part is linearised: equal numbers of probes make it n / (n - 1) apart
        assert variance == pytest.approx(factor * hits.var(), rel=0.35)
    alarms = np.array([v[1] for v in values[threshold, 1]])
    by_person = scores.max(axis=1)[[name not in people for name in names]].reshape(6, 4)
    own = (by_person >= threshold).mean(axis=1).var(ddof=1) / 6
    assert seen[-1] == pytest.approx((rates[threshold, 1][1], factor * alarms.var() + own))


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
