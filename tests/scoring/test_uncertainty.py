"""Intervals over speakers: their sums by brute force, what must not change them, their coverage."""

import math
from dataclasses import replace

import numpy as np
import pytest
from examples import some
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from scipy.stats import t as student

from speechbrain_qmargin.scoring import metrics
from speechbrain_qmargin.scoring.figures import ActDCF, EqualErrorRate, MinDCF, TarAtFar
from speechbrain_qmargin.scoring.influence import TrialStructure
from speechbrain_qmargin.scoring.report import compare, evaluate
from speechbrain_qmargin.scoring.uncertainty import (
    Spread,
    mark_of,
    rate_interval,
)
from speechbrain_qmargin.trials import LabelledTrials, index_pairs


def all_pairs(num_speakers, per_speaker):
    speaker = np.repeat(np.arange(num_speakers), per_speaker)
    left, right = np.triu_indices(len(speaker), 1)
    ids = [f"s{i:03}/u{j}" for j, i in enumerate(speaker)]
    return LabelledTrials(ids, left, right, speaker[left] == speaker[right])


def random_list(rng, num_speakers, per_speaker=3, share=0.5):
    """Part of all pairs, so that speakers have unequal numbers of trials."""
    trials = all_pairs(num_speakers, per_speaker)
    kept = rng.random(len(trials)) < share
    kept[np.flatnonzero(trials.is_target)[:2]] = True
    return LabelledTrials(
        trials.ids, trials.enrolment[kept], trials.test[kept], trials.is_target[kept]
    )


def scored(trials, rng, effect=0.4, distance=2.5):
    speakers = trials.speakers()
    of = effect * rng.normal(size=speakers.max() + 1)
    one, two = speakers[trials.enrolment], speakers[trials.test]
    return of[one] + of[two] + rng.normal(size=len(one)) + distance * trials.is_target


def spread_of(scores, trials):
    return Spread(scores, trials, metrics.operating_points(scores, trials.is_target))


def every_pair_of_trials(trials, contributions):
    """The variance by its definition: a loop over all ordered pairs of trials."""
    speakers = trials.speakers()
    sides = [
        {int(speakers[e]), int(speakers[t])}
        for e, t in zip(trials.enrolment, trials.test, strict=True)
    ]
    kinds = {}
    for i, target_i in enumerate(trials.is_target):
        for j, target_j in enumerate(trials.is_target):
            kind = bool(target_i), bool(target_j)
            total, apart, number = kinds.get(kind, (0.0, 0, 0))
            together = bool(sides[i] & sides[j])
            total += contributions[i] * contributions[j] * together
            kinds[kind] = total, apart + (not together), number + 1
    return kinds


def mean_contributions(trials, errors):
    """Of every trial to the rate of its class."""
    out = np.zeros(len(errors))
    for label in (True, False):
        of = trials.is_target == label
        out[of] = (errors[of] - errors[of].mean()) / of.sum()
    return out


@settings(max_examples=some(25), deadline=None)
@given(st.integers(0, 10**6), st.integers(5, 8), st.booleans())
def test_the_variance_is_the_sum_over_all_pairs_of_trials(seed, num_speakers, ties):
    rng = np.random.default_rng(seed)
    trials = random_list(rng, num_speakers)
    scores = scored(trials, rng)
    scores = scores.round(0) if ties else scores
    threshold = float(rng.choice(scores))
    spread = spread_of(scores, trials)
    influence = 0.7 * spread.frr(threshold) - 1.9 * spread.far(threshold)
    errors = np.where(trials.is_target, scores < threshold, scores >= threshold).astype(float)
    contributions = mean_contributions(trials, errors) * np.where(trials.is_target, 0.7, -1.9)
    kinds = every_pair_of_trials(trials, contributions)
    shares = [kinds[kind][1] / kinds[kind][2] for kind in ((1, 1), (1, 0), (0, 0))]
    np.testing.assert_allclose(spread.structure.apart, shares, atol=1e-12)
    wanted = sum(total * number / apart for total, apart, number in kinds.values())
    whole = sum(total / kinds[kind][1] * kinds[kind][2] for kind, (total, *_) in kinds.items())
    assert wanted == pytest.approx(whole)
    assert influence.variance >= 0
    if influence.variance > 1e-15 and wanted > 0:
        # it may be held up by its floor, never below the sum
        assert influence.variance >= wanted * (1 - 1e-9) - 1e-13
    pairs = {}
    for n, (e, t) in enumerate(zip(trials.enrolment, trials.test, strict=True)):
        if not trials.is_target[n]:
            key = frozenset((trials.speakers()[e], trials.speakers()[t]))
            pairs[key] = pairs.get(key, 0.0) + contributions[n]
    unsubtracted = wanted + sum(value**2 for value in pairs.values()) / shares[2]
    assert influence.variance == pytest.approx(max(wanted, unsubtracted / 2), rel=1e-9, abs=1e-13)


def test_the_variance_is_unbiased_for_all_pairs_of_few_speakers():
    """Means of dyadic data with known variance: speaker effects and pair noise."""
    rng = np.random.default_rng(0)
    trials = all_pairs(6, 1)  # impostors only: one recording each
    speakers, n = trials.speakers(), len(trials)
    one, two = speakers[trials.enrolment], speakers[trials.test]
    structure = TrialStructure(
        np.ones(6), np.full(6, 5.0), one.astype(np.int64) * 6 + two, np.ones(n)
    )
    assert structure.apart[2] == pytest.approx(4 * 3 / (6 * 5))
    found, means = [], []
    for _ in range(4000):
        effect = rng.normal(size=6)
        values = effect[one] + effect[two] + 0.7 * rng.normal(size=n)
        centred = (values - values.mean()) / n
        rows = np.bincount(one, centred, 6) + np.bincount(two, centred, 6)
        found.append((rows @ rows - centred @ centred) / structure.apart[2])
        means.append(values.mean())
    truth = 4 / 6 + 0.49 / n
    assert np.mean(found) == pytest.approx(truth, rel=0.05)
    assert np.var(means) == pytest.approx(truth, rel=0.07)


@pytest.mark.parametrize("ties", [False, True])
def test_nothing_depends_on_the_order_of_trials_or_of_their_sides(ties):
    rng = np.random.default_rng(1)
    trials = random_list(rng, 12)
    scores = scored(trials, rng)
    scores = scores.round(1) if ties else scores
    order, turned = rng.permutation(len(scores)), rng.random(len(scores)) < 0.5
    sides = np.where(turned, trials.test, trials.enrolment)
    others = np.where(turned, trials.enrolment, trials.test)
    again = LabelledTrials(trials.ids, sides[order], others[order], trials.is_target[order])
    first = evaluate(scores, trials, all_eers=True, llr=True)
    second = evaluate(scores[order], again, all_eers=True, llr=True)
    for one, two in zip(first.figures, second.figures, strict=True):
        assert (one.low, one.high) == pytest.approx((two.low, two.high), rel=1e-9)
        assert one.mark == two.mark


def test_reversed_trials_add_nothing():
    rng = np.random.default_rng(2)
    trials = random_list(rng, 20)
    scores = scored(trials, rng, distance=4.0)
    both = LabelledTrials(
        trials.ids,
        np.append(trials.enrolment, trials.test),
        np.append(trials.test, trials.enrolment),
        np.append(trials.is_target, trials.is_target),
    )
    once = evaluate(scores, trials)
    with pytest.warns(UserWarning, match="in reverse order"):
        twice = evaluate(np.append(scores, scores), both)
    for one, two in zip(once.figures, twice.figures, strict=True):
        assert (one.errors, one.mark) == (two.errors, two.mark)
        assert two.value == pytest.approx(one.value, abs=1e-12)
        assert (two.low, two.high) == pytest.approx((one.low, one.high), rel=1e-9)
    threshold = float(np.median(scores[trials.is_target]) - 2)
    one, two = (report.spread.rates_at(threshold) for report in (once, twice))
    assert (one.false_accepts, one.misses) == (two.false_accepts, two.misses)
    assert one.far_interval == pytest.approx(two.far_interval, rel=1e-9)


def test_two_reversed_errors_are_one_error():
    trials = all_pairs(12, 4)
    scores = np.where(trials.is_target, 1.0, 0.0)
    wrong = np.flatnonzero(~trials.is_target)[[0, 100]]
    scores[wrong] = 2.0
    both = LabelledTrials(
        trials.ids,
        np.append(trials.enrolment, trials.test[wrong]),
        np.append(trials.test, trials.enrolment[wrong]),
        np.append(trials.is_target, trials.is_target[wrong]),
    )
    with pytest.warns(UserWarning, match="in reverse order"):
        report = evaluate(np.append(scores, scores[wrong]), both)
    rates = report.spread.rates_at(1.5)
    assert (rates.false_accepts, rates.far_mark) == (2, "unsupported")


@pytest.mark.parametrize("num_speakers", [2, 3])
def test_two_or_three_speakers_get_no_interval(num_speakers):
    rng = np.random.default_rng(3)
    trials = all_pairs(num_speakers, 40)
    report = evaluate(scored(trials, rng, distance=1.5), trials)
    for figure in report.figures:
        assert figure.low is None
        assert figure.high is None
        assert figure.mark == "unsupported"
    rates = report.spread.rates_at(0.5)
    assert rates.far_interval is None
    assert rates.far_mark == "unsupported"
    assert report.spread.band([0.1]) is None
    assert not compare(report, report)


def test_four_speakers_get_a_wide_interval_and_eight_can_be_measured():
    rng = np.random.default_rng(4)
    widths = []
    for number, mark in ((4, "indicative"), (7, "indicative"), (8, "measured")):
        trials = all_pairs(number, 20)
        figure = evaluate(scored(trials, rng, effect=0.1, distance=1.5), trials)["eer"]
        assert figure.errors >= 30
        assert figure.mark == mark
        widths.append(figure.high - figure.low)
    assert widths[0] > widths[2] > 0.01


def test_badges_count_errors_and_speakers():
    assert mark_of(30) == mark_of(30, 8) == mark_of(30, 7.6) == "measured"
    assert mark_of(30, 7) == mark_of(29, 100) == mark_of(3, 4) == "indicative"
    assert mark_of(30, 3) == mark_of(2, 100) == "unsupported"


def test_one_speaker_with_most_trials_is_not_many_speakers():
    structure = TrialStructure(
        np.array([1000.0] + [1.0] * 50), np.full(51, 50.0), np.arange(51), np.ones(51)
    )
    assert structure.contributing < 1.2
    even = TrialStructure(np.full(9, 4.0), np.full(9, 8.0), np.arange(9), np.ones(9))
    assert even.contributing == pytest.approx(9)
    assert replace(even, speakers_known=False).contributing == 7  # never enough to be measured


def test_an_interval_stays_where_its_figure_can_be():
    rng = np.random.default_rng(15)
    trials = all_pairs(10, 4)
    moved = spread_of(scored(trials, rng), trials).frr(1.0)
    reach = moved.on("plain").interval(0.0)[1]
    assert moved.on("plain").interval(0.0) == (-reach, reach)
    assert moved.on("log").interval(0.0) == moved.on("logit").interval(0.0) == (0, reach)
    assert moved.on("logit").interval(1.0) == (1 - reach, 1)


def test_a_structure_of_other_trials_is_refused():
    rng = np.random.default_rng(12)
    one, two = random_list(rng, 10), random_list(rng, 10)
    with pytest.raises(ValueError, match="not of these trials"):
        evaluate(scored(one, rng), one, structure=TrialStructure.of(two))
    other = replace(one, ids=[f"t{name}" for name in one.ids])  # one shape, other people
    with pytest.raises(ValueError, match="not of these trials"):
        evaluate(scored(one, rng), one, structure=TrialStructure.of(other))


def test_one_speaker_is_refused():
    trials = LabelledTrials(["a/1", "a/2"], np.array([0]), np.array([1]), np.array([True]))
    with pytest.raises(ValueError, match="one speaker only"):
        TrialStructure.of(trials)


def test_a_rate_at_a_fixed_threshold_by_hand():
    rng = np.random.default_rng(5)
    trials = all_pairs(10, 4)
    scores = scored(trials, rng, distance=1.0)
    rates = spread_of(scores, trials).rates_at(1.0)
    speakers = trials.speakers()
    of = speakers[trials.enrolment[trials.is_target]]
    missed = scores[trials.is_target] < 1.0
    rate = missed.mean()
    sums = np.bincount(of, missed - rate, 10) / len(missed)
    error = math.sqrt(sums @ sums / (1 - 1 / 10)) / (rate * (1 - rate))
    reach = student.ppf(0.975, 10 / 3) * error
    middle = math.log(rate / (1 - rate))
    wanted = [1 / (1 + math.exp(-x)) for x in (middle - reach, middle + reach)]
    assert rates.frr == rate
    assert missed.sum() >= 30
    assert rates.frr_interval == pytest.approx(wanted, rel=1e-12)
    assert rates.misses == missed.sum()


def test_below_30_errors_the_wider_of_both_is_given():
    rng = np.random.default_rng(6)
    trials = all_pairs(30, 3)
    scores = scored(trials, rng, effect=0.0, distance=4.0)
    spread = spread_of(scores, trials)
    threshold = float(np.sort(scores[~trials.is_target])[-4])
    rates = spread.rates_at(threshold)
    low, high = rate_interval(4, int((~trials.is_target).sum()))
    assert rates.false_accepts == 4
    assert rates.far_interval[0] <= low
    assert rates.far_interval[1] >= high
    beyond = spread.rates_at(float(scores.max()) + 1)
    assert beyond.far == 0
    assert beyond.far_interval == rate_interval(0, int((~trials.is_target).sum()))


def test_few_errors_put_a_figure_where_the_intervals_of_its_rates_put_it():
    rng = np.random.default_rng(16)
    targets, impostors = rng.normal(2.5, 1, 40), rng.normal(0, 1, 200)
    points = metrics.operating_points(np.append(targets, impostors), np.arange(240) < 40)

    def intervals(found):
        assert found.errors == min(found.misses, found.false_accepts)
        return rate_interval(found.misses, 40), rate_interval(found.false_accepts, 200)

    frr, far = intervals(found := EqualErrorRate().find(points))
    wanted = min(frr[0], far[0]), max(frr[1], far[1])
    assert EqualErrorRate().few_errors(found, points) == wanted
    for measure, most in ((MinDCF(0.1, 2.0, 3.0), 1.0), (ActDCF(0.1, 2.0, 3.0), math.inf)):
        ends = zip(*intervals(found := measure.find(points)), strict=True)
        low, high = (miss + 13.5 * accept for miss, accept in ends)  # 0.2 and 2.7, over 0.2
        assert measure.few_errors(found, points) == pytest.approx((low, min(high, most)))
    falling = np.sort(impostors)[::-1]
    for accepts in (1, 4, 60):  # an interval of FAR from less than one trial, and from more
        measure = TarAtFar(accepts / 200)
        least, most = (int(200 * end) for end in rate_interval(accepts, 200))
        hits = [int((targets > falling[n]).sum()) for n in (least, most, accepts)]
        fewest = hits[0] if least else 0
        wanted = rate_interval(fewest, 40)[0], rate_interval(hits[1], 40)[1]
        found = measure.find(points)
        assert measure.few_errors(found, points) == pytest.approx(wanted)
        assert found.errors == min(accepts, hits[2], 40 - hits[2])


@pytest.mark.filterwarnings("ignore:the EER of")
def test_a_rate_near_one_rests_on_its_few_exceptions():
    """No target of 60 is accepted: nothing is measured, and the rate is not known to be 100 %."""
    trials = all_pairs(20, 3)
    scores = np.random.default_rng(8).normal(size=len(trials))
    scores[trials.is_target] -= 20
    targets = np.flatnonzero(trials.is_target)
    count = len(targets)
    for hits, mark in ((0, "unsupported"), (5, "indicative")):
        scores[targets[:hits]] = 9
        report = evaluate(scores, trials, fars=[0.1])
        figure = report["tar_at_far", 0.1]
        assert (figure.value, figure.errors) == (pytest.approx(hits / count), hits)
        assert figure.mark == mark
        low, high = rate_interval(hits, count)
        assert figure.low <= low + 1e-12
        assert figure.high >= high - 1e-12
        rates = report.spread.rates_at(figure.threshold)
        assert rates.frr_mark == mark
        assert rates.frr_interval[0] <= 1 - high + 1e-12
    rates = report.spread.rates_at(float(scores.min()))  # all are accepted
    assert (rates.far, rates.far_mark) == (1, "unsupported")
    assert rates.far_interval == rate_interval(report.num_impostors, report.num_impostors)


def test_a_threshold_that_moves_with_far_moves_the_tar():
    """Impostors of one speaker score higher: TAR at a FAR hangs on that speaker."""
    rng = np.random.default_rng(7)
    trials = all_pairs(20, 5)
    scores = scored(trials, rng, effect=0.0)
    scores += (trials.speakers()[trials.test] == 19) * ~trials.is_target
    spread = spread_of(scores, trials)
    threshold = metrics.tar_at_far(spread.points, 0.05).threshold
    fixed = spread.frr(threshold)
    assert spread.tar_at_far(0.05).variance > 1.5 * fixed.variance
    fars = np.array([0.03, 0.05, 0.08])
    low, high = spread.band(fars)
    for at, far in enumerate(fars):
        tar = metrics.tar_at_far(spread.points, far).tar
        ends = spread.tar_at_far(far).interval(tar)
        assert (1 - high[at], 1 - low[at]) == pytest.approx(ends)


@pytest.mark.parametrize(
    ("accepts", "effect"),
    [
        (12, 0.0),  # the few errors decide how wide the secant is
        (400, 0.7),  # the speakers do
        (1, 0.7),  # the widest that there is
        (1060, 0.7),  # up to all impostors
    ],
)
def test_slopes_are_secants_over_the_thresholds_own_uncertainty(accepts, effect):
    rng = np.random.default_rng(13)
    trials = all_pairs(16, 3)
    scores = scored(trials, rng, effect, distance=1.0)
    spread = spread_of(scores, trials)
    targets = scores[trials.is_target]
    impostors = np.sort(scores[~trials.is_target])[::-1]
    far = accepts / len(impostors)
    moved = spread.far(impostors[accepts - 1])
    reach = min(max(math.sqrt(3 / accepts), math.sqrt(moved.variance) / far), 1.2)
    misses, rates = [], []
    for number in (accepts * math.exp(reach), accepts * math.exp(-reach)):
        number = min(round(number), len(impostors))
        misses.append((targets <= impostors[number]).mean() if number < len(impostors) else 0.0)
        rates.append(number / len(impostors))
    slope = (misses[1] - misses[0]) / (rates[0] - rates[1])
    found = spread.tar_at_far(far).impostors
    np.testing.assert_allclose(found, -slope * moved.impostors, atol=1e-15)


def test_the_eer_moves_with_both_rates_by_the_densities_of_the_other_class():
    rng = np.random.default_rng(14)
    trials = all_pairs(60, 10)
    scores = rng.normal(size=len(trials))
    scores[trials.is_target] = 3 * scores[trials.is_target] + 3  # at 0.75, a third as dense
    spread = spread_of(scores, trials)
    threshold = metrics.eer_point(spread.points)[0]
    share = spread.eer().targets / spread.frr(threshold).targets
    np.testing.assert_allclose(share, 0.75, atol=0.03)
    rest = spread.eer().impostors / spread.far(threshold).impostors
    np.testing.assert_allclose(rest, 1 - share[0], rtol=1e-9)


def test_differences_of_a_system_and_itself_have_no_width():
    rng = np.random.default_rng(8)
    trials = random_list(rng, 15)
    scores = scored(trials, rng)
    one, two = evaluate(scores, trials), evaluate(np.exp(scores), trials)
    for difference in compare(one, two):
        assert (difference.low, difference.high) == pytest.approx((0, 0), abs=1e-9)
    spread = one.spread
    double = spread.eer() + spread.eer()
    assert double.variance == pytest.approx(4 * spread.eer().variance)
    assert (spread.eer() - 0.25 * double).variance == pytest.approx(spread.eer().variance / 4)


def test_systems_are_paired_by_who_speaks():
    """Whatever the order of the two lists; lists of one shape and other people are two lists."""
    rng = np.random.default_rng(10)
    trials = all_pairs(10, 3)
    scores = scored(trials, rng)
    order = rng.permutation(len(trials))
    for known in (True, False):
        names = trials.ids if known else [name.replace("/", "-") for name in trials.ids]
        lists = [
            index_pairs(
                [names[n] for n in trials.enrolment[rows]],
                [names[n] for n in trials.test[rows]],
                trials.is_target[rows],
                "",
            ).labelled()
            for rows in (np.arange(len(trials)), order)
        ]
        reports = [evaluate(scores, lists[0]), evaluate(scores[order], lists[1])]
        for difference in compare(*reports):
            assert abs(difference.low) + abs(difference.high) < 1e-6, difference
        others = replace(lists[0], ids=[f"t{name}" for name in lists[0].ids])
        with pytest.raises(ValueError, match="not evaluated on the same trials"):
            compare(reports[0], evaluate(scores, others))


def test_influences_on_other_trials_do_not_combine():
    rng = np.random.default_rng(9)
    one, two = random_list(rng, 10), random_list(rng, 10)
    with pytest.raises(ValueError, match="different trials"):
        spread_of(scored(one, rng), one).eer() - spread_of(scored(two, rng), two).eer()


def test_cllr_is_a_mean_over_trials():
    rng = np.random.default_rng(10)
    trials = random_list(rng, 10)
    scores = scored(trials, rng) - 1
    spread = spread_of(scores, trials)
    cost = np.logaddexp(0, np.where(trials.is_target, -scores, scores)) / (2 * math.log(2))
    speakers = trials.speakers()
    contributions = mean_contributions(trials, cost)
    sides = np.stack([speakers[trials.enrolment], speakers[trials.test]])
    targets = np.bincount(sides[0], contributions * trials.is_target, 10)
    rows = sum(np.bincount(side, contributions * ~trials.is_target, 10) for side in sides)
    np.testing.assert_allclose(spread.cllr().targets, targets, atol=1e-15)
    np.testing.assert_allclose(spread.cllr().impostors, rows, atol=1e-15)
    low, high = spread.min_cllr().interval(metrics.min_cllr(spread.points))
    assert low < metrics.min_cllr(spread.points) < high


def test_the_optimism_of_the_minimum_cost_moves_the_interval_up():
    rng = np.random.default_rng(11)
    trials = all_pairs(12, 5)
    spread = spread_of(scored(trials, rng), trials)
    influence = spread.min_dcf(0.05)
    assert influence.bias < 0
    value = metrics.min_dcf(spread.points, 0.05)
    low, high = influence.interval(value)
    assert low < value < high <= 1
    still = replace(influence, bias=0.0).interval(value)
    assert low > still[0]
    assert high > still[1]
    spread = spread_of(scored(trials, rng, effect=0.0, distance=5.0), trials)
    best = MinDCF(0.001).find(spread.points)
    assert best.false_accepts == 0  # no error yet: the threshold was free all the same
    assert spread.min_dcf(0.001).bias < -0.1 * best.value


# ------------------------------------------------------------------ coverage


def coverage(trials, replicates, far=0.02, effect=0.3, distance=2.5):
    """Share of 95 % intervals that hold the true TAR and EER; and of differences without zero."""
    wide, wider = math.sqrt(1.25 + 2 * effect**2), math.sqrt(1.25 + 4 * effect**2)
    tar = norm.sf((wide * norm.isf(far) - distance) / wider)
    eer = norm.sf(distance / (wide + wider))
    held, alarms = [], []
    for seed in range(replicates):
        rng = np.random.default_rng([seed, 17])
        scores = scored(trials, rng, effect, distance)
        scores, other = (scores + 0.5 * rng.normal(size=len(scores)) for _ in range(2))
        figures = [EqualErrorRate(), TarAtFar(far)]
        one, two = (evaluate(x, trials, figures=figures) for x in (scores, other))
        alarms.append([difference.significant for difference in compare(one, two)])
        held.append([f.low <= x <= f.high for f, x in zip(one.figures, (eer, tar), strict=True)])
    return np.mean(held, axis=0), np.mean(alarms, axis=0)


@pytest.mark.slow
@pytest.mark.parametrize(("speakers", "takes"), [(8, 8), (14, 6), (40, 4)])
def test_all_pairs_are_covered(speakers, takes):
    held, alarms = coverage(all_pairs(speakers, takes), 200)
    assert (held >= 0.90).all()  # 95 % less three standard errors of 200
    assert (alarms <= 0.10).all()


@pytest.mark.slow
def test_sparse_lists_are_covered():
    rng = np.random.default_rng(0)
    trials = random_list(rng, 150, per_speaker=4, share=0.02)
    targets = all_pairs(150, 4)
    chosen = targets.is_target
    trials = LabelledTrials(
        trials.ids,
        np.append(trials.enrolment[~trials.is_target], targets.enrolment[chosen]),
        np.append(trials.test[~trials.is_target], targets.test[chosen]),
        np.append(np.zeros((~trials.is_target).sum(), bool), np.ones(chosen.sum(), bool)),
    )
    held, alarms = coverage(trials, 200)
    assert (held >= 0.90).all()
    assert (held <= 0.995).all()
    assert (alarms <= 0.10).all()


def test_the_interval_of_min_cllr_ends_at_one_bit():
    rng = np.random.default_rng(3)
    ids = [f"s{n // 4}/{n}" for n in range(48)]
    sides = np.array([(i, j) for i in range(48) for j in range(i)])
    same = sides[:, 0] // 4 == sides[:, 1] // 4
    trials = LabelledTrials(ids, sides[:, 0], sides[:, 1], same)
    scores = 0.3 * same + rng.normal(size=12)[sides[:, 0] // 4] + rng.normal(size=len(same))
    figure = evaluate(scores, trials, all_eers=True)["min_cllr"]
    assert 0 <= figure.low < figure.value < figure.high <= 1


@pytest.mark.parametrize("seed", range(12))
def test_lists_of_a_handful_of_trials_are_evaluated(seed):
    rng = np.random.default_rng(seed)
    ids = [f"s{n % 3}/{n}" for n in range(6)]
    sides = np.array([(i, j) for i in range(6) for j in range(i)])
    same = sides[:, 0] % 3 == sides[:, 1] % 3
    impostors = rng.choice(np.flatnonzero(~same), 1 + seed % 2, replace=False)
    kept = np.concatenate([np.flatnonzero(same)[: 1 + seed % 3], impostors])
    trials = LabelledTrials(ids, sides[kept, 0], sides[kept, 1], same[kept])
    report = evaluate(rng.normal(size=len(kept)).astype(np.float32), trials)
    assert {figure.mark for figure in report.figures} == {"unsupported"}
