"""Groups of trials and their rates against loops; the interval of a share by simulation."""

from dataclasses import replace

import numpy as np
import pytest

from speechbrain_qmargin.scoring.breakdown import breakdown, read_metadata, trial_groups
from speechbrain_qmargin.scoring.shares import share_of_trials
from speechbrain_qmargin.trials import LabelledTrials


def simulated(seed=0, speakers=24, takes=4, effect=0.3):
    rng = np.random.default_rng(seed)
    of = np.repeat(np.arange(speakers), takes)
    left, right = np.triu_indices(len(of), 1)
    same = of[left] == of[right]
    person = effect * rng.normal(size=speakers)
    scores = person[of[left]] + person[of[right]] + rng.normal(size=len(left)) + 2 * same
    ids = [f"s{i}/{j}" for j, i in enumerate(of)]
    return scores, LabelledTrials(ids, left, right, same)


def test_rates_are_those_of_a_loop():
    scores, trials = simulated()
    scores = scores.round(1)  # some at the threshold itself
    gender = {f"s{i}": "fm"[i % 2] for i in range(24)}
    del gender["s5"]
    gender["s4/16"] = "m"  # a recording's own value comes first
    found = breakdown(scores, trials, 1.0, gender, column="gender")
    counts = {}
    for e, t, same, score in zip(
        trials.enrolment, trials.test, trials.is_target, scores, strict=True
    ):
        sides = [gender.get(trials.ids[n], gender.get(trials.ids[n].split("/")[0]))
                 for n in (e, t)]  # fmt: skip
        name = "not in the table"
        if None not in sides:
            name = " × ".join(sorted(set(sides)))
        wrong, number = counts.setdefault((name, bool(same)), [0, 0])
        counts[name, bool(same)] = [wrong + ((score >= 1.0) != same), number + 1]
    seen = {}
    for row in found.groups:
        for same, share in ((False, row.fmr), (True, row.fnmr)):
            if share:
                seen[row.group, same] = [round(share.value * share.trials), share.trials]
    assert seen == counts
    assert found.overall.fmr.trials == np.count_nonzero(~trials.is_target)
    assert "f × m" in found.table()
    assert found.to_dict()["groups"][0]["fmr"]["trials"] == counts["f", False][1]


def test_bins_and_same_session():
    trials = LabelledTrials(["a/1", "a/2", "b/1"], np.array([0, 0, 1]), np.array([1, 2, 2]),
                    np.array([True, False, False]))  # fmt: skip
    group, names = trial_groups(trials, {"a/1": "1.5", "a/2": "2", "b/1": "9"}, edges=[2, 5])
    assert [names[n] for n in group] == [
        "below 2 × 2 to 5", "below 2 × 5 and more", "2 to 5 × 5 and more"]  # fmt: skip
    group, names = trial_groups(trials, {"a/1": "x", "a/2": "y", "b/1": "x"}, relation="same")
    assert [names[n] for n in group] == ["other", "same", "other"]
    group, _ = trial_groups(trials, {"a/1": "x", "a/2": "y"})
    assert group.tolist()[1:] == [-1, -1]
    with pytest.raises(ValueError, match="names none of the trials' recordings"):
        trial_groups(trials, {"c": "1"})
    with pytest.raises(ValueError, match="'x' is not a number"):
        trial_groups(trials, {"a": "x"}, edges=[1])
    for edges in ([2, 1], [2, 2], [float("nan")], []):
        with pytest.raises(ValueError, match="must be finite and rise"):
            trial_groups(trials, {"a": "1"}, edges=edges)


def test_a_speakers_name_is_found_however_it_is_composed():
    trials = LabelledTrials(["andre\u0301/1", "b/1"], np.array([0]), np.array([1]),
                            np.array([False]))  # fmt: skip
    for name in ("andre\u0301", "andr\u00e9"):
        assert trial_groups(trials, {name: "x", "b": "y"})[1] == ["x × y"]


@pytest.mark.parametrize("given", [{"a": "f"}, {"a": "f", "b": "m"}])
def test_trials_both_of_whose_sides_have_no_value_are_in_no_group(given):
    ids = ["a/1", "a/2", "b/1", "c/1", "c/2"]
    trials = LabelledTrials(ids, np.array([0, 3, 0, 2]), np.array([1, 4, 3, 3]),
                    np.array([True, True, False, False]))  # fmt: skip
    group, names = trial_groups(trials, given)
    assert group.tolist() == [0, -1, -1, -1]
    assert names[0] == "f"


def test_many_values_are_binned_or_refused():
    ids = [f"s{i}/{i}" for i in range(20)]
    trials = LabelledTrials(ids, np.arange(19), np.arange(1, 20), np.zeros(19, dtype=bool))
    _, names = trial_groups(trials, {name: str(i) for i, name in enumerate(ids)})
    assert names == ["below 4.75", "below 4.75 × 4.75 to 9.5", "4.75 to 9.5",
                     "4.75 to 9.5 × 9.5 to 14.25", "9.5 to 14.25", "9.5 to 14.25 × 14.25 and more",
                     "14.25 and more"]  # fmt: skip
    words = {name: f"w{i}" for i, name in enumerate(ids)}
    with pytest.raises(ValueError, match="20 different values are too many groups"):
        trial_groups(trials, words)
    assert trial_groups(trials, words, relation="same")[1] == ["same", "other"]


def test_twelve_values_are_groups_and_numbers_among_them_in_order():
    ids = [f"s{i}/{i}" for i in range(12)]
    trials = LabelledTrials(ids, np.arange(11), np.arange(1, 12), np.zeros(11, dtype=bool))
    _, names = trial_groups(trials, {name: str(i) for i, name in enumerate(ids)})
    assert names == [f"{i} × {i + 1}" for i in range(11)]


def test_quartiles_that_are_one_number_are_one_edge():
    ids = [f"s{i}/{i}" for i in range(20)]
    trials = LabelledTrials(ids, np.arange(19), np.arange(1, 20), np.zeros(19, dtype=bool))
    values = [0, 1, 2, *[5] * 8, *range(6, 15)]
    _, names = trial_groups(trials, {name: str(v) for name, v in zip(ids, values, strict=True)})
    assert [name for name in names if "×" not in name] == ["below 5", "5 to 9.25", "9.25 and more"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a header"),
        ("id\na\n", "expected a header"),
        ("id,x,x\n", ":1: the column x is there twice"),
        ("id,x\n", "no lines"),
        ("id,x\na,1\na,2\n", ":3: a is listed in line 2 already"),
        ("id\tx\na\t1\t2\n", ":2: 3 cells, the header has 2"),
    ],
)
def test_a_bad_table_is_named(tmp_path, text, message):
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_metadata(path)
    assert "table.csv" in str(caught.value)


@pytest.mark.parametrize("text", ["ann,f\nbob,m\n", "ann/1,f\nann/2,f\nbob/1,m\n"])
def test_a_table_of_the_trials_people_or_recordings_without_a_header_is_named(tmp_path, text):
    trials = LabelledTrials(["ann/1", "ann/2", "bob/1"], np.array([0, 0]), np.array([1, 2]),
                            np.array([True, False]))  # fmt: skip
    (tmp_path / "people.csv").write_text(text)
    with pytest.raises(ValueError, match=r"people\.csv:1: expected a header .*; got 'ann(/1)?,f'"):
        read_metadata(tmp_path / "people.csv", trials=trials)
    (tmp_path / "people.csv").write_text("who,gender\n" + text)
    assert read_metadata(tmp_path / "people.csv", trials=trials)["gender"].popitem()[1] == "m"


def test_no_rate_is_given_at_a_threshold_that_is_none():
    trials = LabelledTrials(["a/1", "b/1"], np.array([0]), np.array([1]), np.array([False]))
    with pytest.raises(ValueError, match="the threshold is NaN"):
        breakdown(np.array([0.5]), trials, float("nan"), {"a": "f", "b": "m"})


def test_what_is_no_table_is_named(tmp_path):
    file = tmp_path / "people.csv"
    file.write_text("id,x\na,1\n" + "y" * 200_000 + ",1\n")
    with pytest.raises(ValueError, match=r"people\.csv:3: not a table \(field larger"):
        read_metadata(file)


def test_a_table_is_read(tmp_path):
    path = tmp_path / "table.tsv"
    path.write_bytes('\ufeffid\tlanguage\tyears\na b/1\t"de"\t\nb\tfr\t3\n'.encode())
    assert read_metadata(path) == {"language": {"a b/1": "de", "b": "fr"}, "years": {"b": "3"}}
    path.write_bytes("\n \nid\tcity\nann\tKöln\n".encode("utf-16"))  # Excel's Unicode text
    assert read_metadata(path) == {"city": {"ann": "Köln"}}
    path.write_bytes(b"id,x\n\xff,1\n")
    with pytest.raises(ValueError, match="not a UTF-8 text file"):
        read_metadata(path)


def test_the_variance_is_that_of_the_formula():
    rng = np.random.default_rng(1)
    one, two = rng.integers(0, 9, size=(2, 400))
    outcome = rng.random(400) < 0.3
    found = share_of_trials(outcome, one, two)
    apart = outcome - outcome.mean()
    people = sum(
        (apart[mine].sum() / np.count_nonzero(~mine)) ** 2
        for mine in ((one == s) | (two == s) for s in range(9))
    )
    pairs = {}
    for a, b, d in zip(one, two, apart, strict=True):
        pairs[frozenset((a, b))] = pairs.get(frozenset((a, b)), 0) + d / 400
    total = 8 / 9 * people - sum(v**2 for k, v in pairs.items() if len(k) == 2)
    variance = max(total, sum(v**2 for v in pairs.values()))
    from scipy.stats import t

    rate = outcome.mean()
    each = [np.count_nonzero((one == s) | (two == s)) for s in range(9)]
    freedom = sum(each) ** 2 / sum(n * n for n in each) - 1
    reach = t.ppf(0.975, freedom) * np.sqrt(variance) / (rate * (1 - rate))
    assert found.high == pytest.approx(1 / (1 + (1 - rate) / rate * np.exp(-reach)))


def test_a_trial_and_its_reverse_are_one():
    scores, trials = simulated()
    both = replace(
        trials,
        enrolment=np.concatenate((trials.enrolment, trials.test)),
        test=np.concatenate((trials.test, trials.enrolment)),
        is_target=np.tile(trials.is_target, 2),
    )
    column = dict.fromkeys(trials.ids, "x")
    once = breakdown(scores, trials, 1.0, column)
    with pytest.warns(UserWarning, match="distinct pairs"):
        twice = breakdown(np.tile(scores, 2), both, 1.0, column)
    assert twice.groups == once.groups


@pytest.mark.slow
@pytest.mark.parametrize("speakers", [8, 40])
def test_intervals_hold_the_truth(speakers):
    from scipy.stats import norm

    kept = {"fmr": [], "fnmr": []}
    truth = {"fmr": norm.sf(1.0, scale=np.sqrt(1.18)),
             "fnmr": norm.cdf(-1.0, scale=np.sqrt(1.36))}  # fmt: skip
    for seed in range(300):
        scores, trials = simulated(seed, speakers)
        found = breakdown(scores, trials, 1.0, {i: "x" for i in trials.ids}).groups[0]
        for name, true in truth.items():
            share = getattr(found, name)
            kept[name].append(share.low <= true <= share.high)
    for name, held in kept.items():
        assert 0.90 <= np.mean(held) <= 0.99, (name, np.mean(held))


def test_one_person_and_no_errors_claim_nothing():
    one = np.zeros(50, dtype=int)
    assert share_of_trials(np.arange(50) < 20, one, one).mark == "unsupported"
    many = share_of_trials(np.arange(200) % 2, np.tile(one, 4), np.tile(one, 4))
    assert (many.low, many.high, many.mark) == (0, 1, "unsupported")
    found = share_of_trials(np.zeros(300, bool), np.arange(300), np.arange(300) + 1)
    assert found.mark == "unsupported"
    assert found.low == 0
    assert found.high == pytest.approx(0.0122, abs=1e-4)


def test_people_of_few_trials_do_not_make_a_rate_measured():
    """One person has 400 of 495 trials: the rate is that person's, with one degree of freedom."""
    from scipy.stats import t

    who = np.repeat(np.arange(20), [400] + 19 * [5])
    missed = np.random.default_rng(0).random(len(who)) < 0.1
    found = share_of_trials(missed, who, who)
    assert (found.people, found.mark) == (20, "unsupported")
    each = np.bincount(who)
    apart = missed - missed.mean()
    variance = 19 / 20 * np.sum((np.bincount(who, apart) / (len(who) - each)) ** 2)
    variance = max(variance, np.sum((np.bincount(who, apart) / len(who)) ** 2))
    rate = missed.mean()
    reach = t.ppf(0.975, 1) * np.sqrt(variance) / (rate * (1 - rate))
    assert found.high == pytest.approx(1 / (1 + (1 - rate) / rate * np.exp(-reach)))
    equal = share_of_trials(missed, np.arange(495) % 20, np.arange(495) % 20)
    assert equal.mark == "measured"


def test_where_people_are_not_known_nothing_is_measured_and_the_table_says_it():
    scores, trials = simulated()
    flat = replace(trials, ids=[name.replace("/", "-") for name in trials.ids], speaker_of=None)
    sex = {name: "fm"[n % 2] for n, name in enumerate(flat.ids)}
    found = breakdown(scores, flat, 0.5, sex, confidence=0.9)
    marks = {share.mark for row in found.rows() for share in (row.fmr, row.fnmr) if share}
    assert "measured" not in marks
    assert "90 % intervals over linked groups (speakers not known)" in found.table()
    known = breakdown(scores, trials, 0.5, {str(name): "x" for name in trials.ids})
    assert known.overall.fmr.mark == "measured"
    assert "95 % intervals over speakers" in known.table()
