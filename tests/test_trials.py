"""Trials: lists in every published form, models, speakers, distinct pairs, ids that differ."""

import hashlib
import warnings
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from examples import some
from hypothesis import given, settings
from hypothesis import strategies as st

from speechbrain_qmargin.data.classes import training_classes
from speechbrain_qmargin.data.manifest import Item, Manifest
from speechbrain_qmargin.data.people import read_people
from speechbrain_qmargin.scoring.breakdown import trial_groups
from speechbrain_qmargin.scoring.normalisation import refuse_shared_speakers
from speechbrain_qmargin.tables import read_map, read_models
from speechbrain_qmargin.trials import (
    LabelledTrials,
    Lost,
    Trials,
    index_pairs,
    match_ids,
    read_trials,
    read_unlabelled,
    speaker_in,
    write_trials,
)

IDS = [f"id1000{s}/v{k}/0000{n}" for s in range(3) for k in range(2) for n in range(2)]
PAIRS = [(p, q, p[:7] == q[:7]) for p, q in combinations(IDS, 2)]


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def lines(form, head=""):
    return head + "".join(form(p, q, same) + "\n" for p, q, same in PAIRS)


def word(same, yes="target", no="nontarget"):
    return yes if same else no


VOXCELEB = lines(lambda p, q, y: f"{y:d} {p} {q}")
FORMS = {
    "voxceleb": VOXCELEB,
    "kaldi": lines(lambda p, q, y: f"{p} {q} {word(y)}"),
    "cnceleb": lines(lambda p, q, y: f"{p} {q} {y:d}"),
    "voices": lines(lambda p, q, y: f"{p} {q} {word(y, 'tgt', 'imp')}"),
    "label first, words": lines(lambda p, q, y: f"{word(y)} {p} {q}"),
    "tabs": lines(lambda p, q, y: f"{p}\t{q}\t{y:d}"),
    "header": lines(lambda p, q, y: f"{y:d} {p} {q}", "label enrol test\n"),
    "strange header": lines(lambda p, q, y: f"{p} {q} {y:d}", "first_file second_file label\n"),
    "sre": lines(
        lambda p, q, y: f"{p}\t{q}\ta\t{word(y)}", "modelid\tsegmentid\tside\ttargettype\n"
    ),
    "csv": lines(lambda p, q, y: f"{p},{q},{y:d}", "enrol,test,label\n"),
    "csv, other order": lines(lambda p, q, y: f'{y:d},"{q}",{p}', "label,test,enrollment\n"),
    "bom": b"\xef\xbb\xbf" + VOXCELEB.encode(),
    "Excel's Unicode text": VOXCELEB.replace("\n", "\r\n").encode("utf-16"),
    "carriage returns": VOXCELEB.replace("\n", "\r\n"),
    "blank lines": VOXCELEB.replace("\n", "\n\n") + "\n  \n",
}


@pytest.mark.parametrize("form", FORMS)
def test_published_forms_are_one_list(tmp_path, form):
    path = write(tmp_path / "trials.txt", FORMS[form])
    trials = read_trials(path)
    found = [trials.pair(n) for n in range(len(trials))]
    assert found == [f"{p} {q}" for p, q, _ in PAIRS]
    assert trials.is_target.tolist() == [same for *_, same in PAIRS]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert trials.source == f"trials.txt sha256:{digest}"


def test_ids_with_spaces_between_tabs(tmp_path):
    text = "1\tspeaker 01/s 1/utt 1.wav\tspeaker 01/s 1/utt 2.wav\n"
    text += "0\tspeaker 01/s 1/utt 1.wav\tspeaker 02/s 1/utt 1.wav\n"
    trials = read_trials(write(tmp_path / "trials", text))
    assert trials.ids[0] == "speaker 01/s 1/utt 1.wav"
    assert trials.speakers().tolist() == [0, 0, 1]
    write_trials(tmp_path / "again", trials)
    assert (tmp_path / "again").read_text() == text


def test_ids_that_look_like_labels(tmp_path):
    trials = read_trials(write(tmp_path / "t", "0 1 target\n0 2 nontarget\n"))
    assert trials.ids == ["0", "1", "2"]
    with pytest.raises(ValueError, match="t: 2 columns hold labels; name them"):
        read_trials(write(tmp_path / "t", "0 a 1\n1 b 0\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 a b\n1 a\n", r":2: expected 3 columns as in the first line, got '1 a'"),
        ("1 a b\n2 a c\n", r":2: '2 a c': expected 'label enrolment test', and '2' is none of"),
        ("\n", "there is nothing in it"),
        ("label enrol test\n", "a header and nothing below it"),
        ("a b target\na c nontarget\n1 a d\n", r":3: '1 a d': expected 'enrolment test label'"),
        ("a b\nc d\n", r":1: 'a b': expected 'label enrolment test' or"),
        ("a b c\n", r":1: 'a b c': .*no column holds labels"),
        ("a b x 1\n", r":1: .*4 columns; a first line must name them"),
        ("1\ta\t\n", r":1: .*an id is empty"),
        (b"1 a \xff\n", "not a UTF-8 text file .*; save it as UTF-8"),
        ("1 a b\n".encode("utf-16")[:-1], "not a UTF-8 text file .*; save it as UTF-8"),
    ],
)
def test_bad_lists_are_named_with_their_line(tmp_path, text, message):
    path = write(tmp_path / "trials.txt", text)
    with pytest.raises(ValueError, match=str(path) + ".*" + message):
        read_trials(path)


def test_lists_without_labels(tmp_path):
    trials = read_unlabelled(write(tmp_path / "t", "a b\nc d\n"))
    assert trials.is_target is None
    assert trials.pair(1) == "c d"
    with pytest.raises(ValueError, match="t: it does not say which trials are targets"):
        trials.labelled()
    for text in ("1 a b\n0 c d\n", "enrol,test,label\na,b,1\nc,d,0\n"):  # labels are kept
        trials = read_unlabelled(write(tmp_path / "t", text))
        assert (trials.pair(1), trials.labelled().is_target.tolist()) == ("c d", [True, False])


def test_a_kaldi_list_with_its_speakers(tmp_path):
    trials = read_trials(write(tmp_path / "trials", "b-1 b-2 target\nb-1 e-1 nontarget\n"))
    assert not trials.speakers_known
    utt2spk = write(tmp_path / "utt2spk", "b-1 bob\nb-2 bob\ne-1 eve\n")
    known = trials.with_speakers(read_map(utt2spk))
    assert known.speakers_known
    assert known.speakers().tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="1 recordings have no speaker: e-1"):
        trials.with_speakers({"b-1": "bob", "b-2": "bob"})
    with pytest.raises(ValueError, match="b-1 e-1 is an impostor trial of one speaker by the"):
        trials.with_speakers(dict.fromkeys(trials.ids, "bob")).speakers()
    with pytest.raises(ValueError, match=r"utt2spk:2: b-1 is listed twice"):
        read_map(write(utt2spk, "b-1 bob\nb-1 eve\n"))
    with pytest.raises(ValueError, match=r"utt2spk:1: expected an id and one str"):
        read_map(write(utt2spk, "b-1\n"))
    assert read_map(write(utt2spk, "b 1\tbob\nb 2\tbob\n")) == {"b 1": "bob", "b 2": "bob"}
    unicode_text = "b 1\tJörg\r\nb 2\tbob\r\n".encode("utf-16")  # of Excel
    assert read_map(write(utt2spk, unicode_text)) == {"b 1": "Jörg", "b 2": "bob"}


def test_an_impostor_trial_within_a_linked_group_is_named(tmp_path):
    text = "a b target\nb c target\nd e target\na d nontarget\n"
    assert read_trials(write(tmp_path / "t", text)).speakers().tolist() == [0, 0, 0, 1, 1]
    trials = read_trials(write(tmp_path / "t", text + "c a nontarget\n"))
    with pytest.raises(ValueError, match="t: c a is an impostor trial of one speaker: target tri"):
        trials.speakers()


def test_labels_of_ones_and_zeros_are_the_labels():
    ids, sides = ["a/1", "a/2", "b/1"], ([0, 0, 1], [1, 2, 2])
    for labels in ([True, False, False], [1, 0, 0], np.array([1, 0, 0]), np.array([1.0, 0, 0])):
        for kind in (Trials, LabelledTrials):
            trials = kind(ids, *map(np.array, sides), labels)
            assert trials.is_target.dtype == bool
            assert (~trials.is_target).tolist() == [False, True, True]
            assert trials.labelled().impostor_pairs.toarray().tolist() == [[0, 2], [0, 0]]
    for labels, message in (
        ([1, 2, 2], "a label is neither True nor False, 1 nor 0"),
        (["target", "nontarget", "nontarget"], "a label is neither"),
        ([1, 0], "3 trials and 2 labels"),
    ):
        with pytest.raises(ValueError, match=message):
            Trials(ids, *map(np.array, sides), np.array(labels))
    with pytest.raises(ValueError, match="2 enrolments and 1 tests"):
        Trials(ids, np.array([0, 1]), np.array([2]))
    with pytest.raises(ValueError, match=r"enrolment: <U3 \(1,\), not the indices \[N\] of ids"):
        Trials(ids, np.array(["a/1"]), np.array([2]))
    for bad in (-1, 3):
        with pytest.raises(ValueError, match=f"test: {min(bad, 1)} to {max(bad, 1)}, not indices"):
            Trials(ids, np.array([0, 1]), np.array([1, bad]))


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int16, np.uint64, np.int64])
def test_indices_of_any_width_name_the_same_pairs(kind):
    """The number of a pair goes up to the square of the ids, beyond what narrow indices hold."""
    left, right = np.triu_indices(120, 1)
    ids = [f"s{n // 4}/{n}" for n in range(120)]
    for one, two in ((left.astype(kind), right.astype(kind)), (left.astype(kind), right)):
        trials = LabelledTrials(ids, one, two, left // 4 == right // 4)
        assert trials.distinct.trials is trials


def test_labels_that_contradict_the_speakers_are_named(tmp_path):
    trials = read_trials(write(tmp_path / "t", "1 a/1 a/2\n1 a/1 b/1\n"))
    with pytest.raises(ValueError, match="t: a/1 b/1 is a target trial of two speakers"):
        trials.speakers()


def both_orders():
    plain = index_pairs(*zip(*[(p, q) for p, q, _ in PAIRS], strict=True), None, "")
    labels = np.array([same for *_, same in PAIRS])
    plain = LabelledTrials(plain.ids, plain.enrolment, plain.test, labels)
    sides = np.stack([plain.enrolment, plain.test]), np.stack([plain.test, plain.enrolment])
    one, two = np.stack(sides, axis=2).reshape(2, -1)
    return plain, LabelledTrials(plain.ids, one, two, np.repeat(labels, 2), "both sha256:0")


def test_a_pair_counts_once_whatever_its_order():
    plain, both = both_orders()
    assert plain.distinct.trials is plain
    with pytest.warns(UserWarning, match="both: of 132 trials 66 trials are the same pair as"):
        distinct = both.distinct
    assert np.array_equal(distinct.trials.enrolment, plain.enrolment)
    assert np.array_equal(distinct.trials.is_target, plain.is_target)
    scores = np.random.default_rng(0).normal(size=len(both)).astype(np.float32)
    wanted = scores.astype(float).reshape(-1, 2).mean(axis=1).astype(np.float32)
    assert np.array_equal(distinct.scores(scores), wanted)
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        _ = both.distinct


def test_recordings_compared_with_themselves_do_not_count():
    trials = LabelledTrials(
        ["a/1", "a/2", "b/1"],
        np.array([0, 0, 0, 2]),
        np.array([0, 1, 2, 2]),
        np.array([True, True, False, True]),
    )
    with pytest.warns(UserWarning, match="of 4 trials 2 compare a recording with itself; figures"):
        distinct = trials.distinct
    assert [distinct.trials.pair(n) for n in range(2)] == ["a/1 a/2", "a/1 b/1"]
    assert distinct.scores(np.arange(4.0)).tolist() == [1, 2]
    against = LabelledTrials(
        ["a", "b"], np.array([0, 1]), np.array([1, 0]), np.array([True, False])
    )
    with pytest.raises(ValueError, match="b a is a target and an impostor trial"):
        _ = against.distinct


MODELS = {
    "spk2utt": "m0 a/1 a/2\nm1 b/1\n",
    "a recording a line": "m0 a/1\nm1 b/1\nm0 a/2\n",
    "sre": "modelid\tsegmentid\tside\nm0\ta/1\ta\nm1\tb/1\ta\nm0\ta/2\ta\n",
    "csv": "model,segment\nm0,a/1\nm1,b/1\nm0,a/2\n",
}


@pytest.mark.parametrize("form", MODELS)
def test_models_of_several_recordings(tmp_path, form):
    models = read_models(write(tmp_path / "models", MODELS[form]))
    assert models == {"m0": ("a/1", "a/2"), "m1": ("b/1",)}
    text = "m0 a/3 target\nm0 b/2 nontarget\nm1 b/2 target\n"
    trials = read_trials(write(tmp_path / "t", text)).with_models(models)
    assert trials.recordings == ["a/3", "b/2", "a/1", "a/2", "b/1"]
    assert trials.speaker_names() == ["a", "a", "b", "b"]
    assert trials.speakers().tolist() == [0, 0, 1, 1]
    less = trials.without(["a/2"])
    assert less.models["m0"] == ("a/1",)
    assert [less.without(["b/1"]).pair(n) for n in range(2)] == ["m0 a/3", "m0 b/2"]
    assert trials.renamed({"a/1": "x", "a/3": "y"}).recordings[:3] == ["y", "b/2", "x"]
    gone = trials.without(["a/1", "a/2"]).without(["b/1"])
    assert (gone.lost.models, gone.lost.tried_models) == (2, 2)
    assert (gone.lost.recordings, gone.lost.tried) == (3, 5)


def test_one_recording_in_a_folder_makes_the_ids_of_all_tell_speakers():
    trials = Trials(["a/1", "b"], np.array([0]), np.array([1]))
    assert trials.speakers_known
    assert trials.speaker_names() == ["a", "b"]


def test_speakers_stay_with_their_recordings_when_others_are_lost():
    ids = ["u1", "u2", "u3", "u4"]
    trials = LabelledTrials(ids, np.array([0, 1, 2]), np.array([1, 2, 3]),
                            np.array([False, True, False]), speaker_of=list("abbc"))  # fmt: skip
    left = trials.without(["u1"])
    assert (left.ids, left.speaker_names()) == (["u2", "u3", "u4"], ["b", "b", "c"])


def test_models_that_do_not_fit_are_named(tmp_path):
    trials = read_trials(write(tmp_path / "t", "m0 a/3 target\nm9 b/2 nontarget\n"))
    with pytest.raises(ValueError, match=r"t: 1 enrolment models have no recordings: m9 \(there"):
        trials.with_models({"m0": ["a/1"]})
    with pytest.raises(ValueError, match="1 names are a model and a test recording: m0"):
        read_trials(write(tmp_path / "t", "m0 m0 target\n")).with_models({"m0": ["a/1"]})
    mixed = trials.with_models({"m0": ["a/1", "b/1"], "m9": ["c/1"]})
    with pytest.raises(ValueError, match="the model m0 is of several speakers: a, b"):
        mixed.speakers()
    speakers = {"a/1": "anna", "b/1": "bert", "c/1": "cleo", "a/3": "anna", "b/2": "bert"}
    with pytest.raises(ValueError, match="the model m0 is of several speakers: anna, bert"):
        mixed.with_speakers(speakers)
    with pytest.raises(ValueError, match="the model m9 is of several speakers: anna, cleo"):
        mixed.with_speakers(speakers | {"b/1": "anna", "m9": "anna"})
    with pytest.raises(ValueError, match=r"models:2: a/1 is in the model m0 twice"):
        read_models(write(tmp_path / "models", "m0 a/1\nm0 a/1\n"))
    inside = trials.with_models({"m0": ["a/3", "a/1"], "m9": ["c/1"]})
    with pytest.warns(UserWarning, match="1 compare a recording with itself"):
        assert len(inside.distinct.trials) == 1


def test_models_without_slashes_are_linked_with_their_recordings(tmp_path):
    trials = read_trials(write(tmp_path / "t", "m0 a3 target\nm1 a3 nontarget\nm1 b1 target\n"))
    trials = trials.with_models({"m0": ["a1"], "m1": ["b2", "b3"]})
    assert trials.speakers().tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="m1 a3 is an impostor trial of one speaker"):
        trials.with_models({"m0": ["a1"], "m1": ["b2", "a1"]}).speakers()


def test_the_mean_of_equal_scores_is_that_score():
    """0.1 + 0.1 + 0.1 is not 3 x 0.1 in floating point, and a tie with others would be lost."""
    trials = LabelledTrials(["a", "b", "c"], np.zeros(8, int), np.array([1, 1, 1, 2, 2, 2, 2, 2]),
                            np.array([True] * 3 + [False] * 5))  # fmt: skip
    with pytest.warns(UserWarning, match="2 distinct pairs"):
        distinct = trials.distinct
    for value in [*np.random.default_rng(0).normal(size=50).tolist(), 0.1, 1e300, 5e-324]:
        assert distinct.scores(np.full(8, value)).tolist() == [value, value]
    given = np.arange(8.0)
    assert distinct.scores(given).tolist() == [1, 5]
    assert distinct.scores(given.astype(np.float32)).dtype == np.float32


@pytest.mark.parametrize("column", ["side", "Channel"])
def test_two_sides_of_a_call_under_one_id_are_refused(tmp_path, column):
    """They were merged into one trial, or called a contradiction."""
    file = tmp_path / "sre.tsv"
    head = f"modelid\tsegmentid\t{column}\ttargettype\n"
    file.write_text(head + "m\ts1\ta\ttarget\nm\ts2\tb\tnontarget\nn\ts2\tb\tnontarget\n")
    assert read_trials(file).is_target.tolist() == [True, False, False]
    file.write_text(head + "m\ts1\ta\ttarget\nm\ts2\tb\tnontarget\nm\ts2\ta\tnontarget\n")
    said = rf"sre.tsv:4: .*s2 is there with the {column.lower()}s b and a, .* two recordings"
    for read in (read_trials, read_unlabelled):
        with pytest.raises(ValueError, match=said):
            read(file)


@pytest.mark.filterwarnings("ignore:both. of")
def test_lost_pairs_count_once_as_those_that_are_left():
    plain, both = both_orders()
    itself = [np.append(side, 0) for side in (both.enrolment, both.test)]
    both = replace(both, enrolment=itself[0], test=itself[1],
                   is_target=np.append(both.is_target, True))  # fmt: skip
    for lost in ([plain.ids[0]], plain.ids[:3]):
        one, two = plain.without(lost), both.without(lost)
        assert one.lost == two.lost
        assert one.lost.targets + one.lost.impostors == len(plain) - len(one)
        assert len(two.distinct.trials) == len(one)
    again = both.without(plain.ids[:1]).without(plain.ids[1:3])
    assert again.lost == plain.without(plain.ids[:3]).lost


def test_numbers_of_speakers_do_not_depend_on_the_order_of_trials(tmp_path):
    lines = ["d e target", "a b target", "b c target", "e a nontarget"]
    for order in (lines, lines[::-1]):
        trials = read_trials(write(tmp_path / "t", "\n".join(order)))
        assert trials.people.tolist() == ["a", "d"]
        who = dict(zip(trials.ids, trials.speakers().tolist(), strict=True))
        assert who == {"a": 0, "b": 0, "c": 0, "d": 1, "e": 1}
    trials = index_pairs(["b/1"], ["a/1"], np.array([False]), "").labelled()
    assert (trials.people.tolist(), trials.speakers().tolist()) == (["a", "b"], [1, 0])


def test_failures_are_counts():
    with pytest.raises(ValueError, match="tried is '7', not a count"):
        Lost(1, "7", 0, 0)
    with pytest.raises(ValueError, match="targets is -1, not a count"):
        Lost(1, 7, -1, 0)


def test_ids_match_by_the_strictest_rule():
    assert match_ids(["Zo\u00eb/1.wav", "b"], ["b", "Zoe\u0308/1.wav"])[0].tolist() == [1, 0]
    assert match_ids(["Zo\u00eb"], ["Zoe\u0308"])[1] == "in Unicode's normal form C"
    both = ["Zo\u00eb", "Zoe\u0308"]  # two ids that the rule would make one
    assert match_ids(both, both[::-1])[0].tolist() == [1, 0]
    held = ["a/1", "a/2", "b.x/1"]
    assert match_ids(held[::-1], held)[0].tolist() == [2, 1, 0]
    assert match_ids(held, held)[1] == ""
    places, how = match_ids(["a/2.wav", "b.x/1.flac"], held)
    assert (places.tolist(), how) == ([1, 2], "without their suffix")
    places, how = match_ids(["a/1.seg3.wav", "c/9.wav"], held)
    assert (places.tolist(), how) == ([0, -1], "up to their first dot")
    places, how = match_ids(["a/1", "c"], held)  # no rule finds more than the ids themselves
    assert (places.tolist(), how) == ([0, -1], "")


@pytest.mark.parametrize(
    ("wanted", "held"),
    [
        (["a/1"], ["b/1.wav", "b/1.flac", "a/1.wav", "a/1.flac"]),
        (["b/1"], ["a/1.wav", "b/1.wav", "a/1.flac"]),  # by its suffix, which two others have not
        (["a/1.wav", "a/1.flac", "b/1"], ["b/1.wav"]),
    ],
)
def test_two_recordings_that_one_stem_names_are_named_and_not_confused(wanted, held):
    said = "two recordings, a/1.wav and a/1.flac, are a/1 without their suffix; write ids in full"
    with pytest.raises(ValueError, match=said):
        match_ids(wanted, held)


def test_a_recording_that_is_lost_is_not_taken_for_an_ambiguous_one():
    takes = [f"a/call.{take}" for take in "123"]
    assert match_ids(takes, takes[:2])[0].tolist() == [0, 1, -1]
    assert match_ids([*takes, "b"], takes[:2])[0].tolist() == [0, 1, -1, -1]


NAMES = st.text(
    st.characters(blacklist_categories=("Cs", "Cc", "Zl", "Zp"), blacklist_characters="\x85"),
    min_size=1,
    max_size=8,
).filter(lambda name: name == name.strip() and name)


@settings(max_examples=some(200), deadline=None)
@given(st.lists(st.tuples(NAMES, NAMES, st.booleans()), min_size=1, max_size=12))
def test_whatever_is_written_is_read_again(tmp_path_factory, rows):
    one, two, labels = zip(*rows, strict=True)
    trials = index_pairs(one, two, np.array(labels), "").labelled()
    path = tmp_path_factory.mktemp("lists") / "list"
    write_trials(path, trials)
    again = read_trials(path)
    assert [again.pair(n) for n in range(len(rows))] == [trials.pair(n) for n in range(len(rows))]
    assert again.is_target.tolist() == list(labels)


@settings(max_examples=some(200), deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30),
    st.integers(0, 2**32 - 1),
)
@pytest.mark.filterwarnings("ignore:trials. of")
def test_distinct_pairs_are_those_of_a_set(pairs, seed):
    one, two = np.array(pairs).T
    people = np.array([0, 0, 1, 1, 2])  # of five recordings
    trials = LabelledTrials([f"s{p}/{n}" for n, p in enumerate(people)], one, two,
                            people[one] == people[two])  # fmt: skip
    scores = np.random.default_rng(seed).normal(size=len(one))
    wanted = {}
    for pair, score in zip(pairs, scores, strict=True):
        if pair[0] != pair[1]:
            wanted.setdefault(frozenset(pair), []).append(score)
    if not wanted:
        with pytest.raises(ValueError, match="every trial compares a recording with itself"):
            _ = trials.distinct
        return
    found = trials.distinct.trials
    kept = [frozenset(x) for x in zip(found.enrolment.tolist(), found.test.tolist(), strict=True)]
    assert kept == list(wanted)
    means = [np.mean(values) for values in wanted.values()]
    assert trials.distinct.scores(scores) == pytest.approx(means)


def test_a_name_in_two_normal_forms_is_one_persons(tmp_path):
    """Files on disk are in either form, and stay so; people are counted and compared in one."""
    one, two = "José", "Jose\u0301"
    assert one != two
    path = tmp_path / "trials.txt"
    path.write_text(f"1 {one}/1 {two}/2\n0 {two}/2 ann/1\n0 {one}/1 ann/1\n", encoding="utf-8")
    trials = read_trials(path)
    assert trials.ids == [f"{one}/1", f"{two}/2", "ann/1"]
    assert trials.speaker_names() == [one, one, "ann"]
    trials.distinct.trials.speakers()  # no target trial of two speakers
    mapped = trials.with_speakers({f"{one}/1": "a", f"{two}/2": two, "ann/1": one})
    assert mapped.speaker_names() == ["a", one, one]
    (tmp_path / "utt2spk").write_text(f"u1 {two}\n", encoding="utf-8")
    assert read_map(tmp_path / "utt2spk") == {"u1": one}
    cohort, test = [one, "bob"], [speaker_in(f"{two}/1")]
    with pytest.raises(ValueError, match="1 speakers are in the cohort and in the trials"):
        refuse_shared_speakers(cohort, test)
    manifest = Manifest.of([Item("u1", f"/d/{one}/1.wav", one), Item("u2", f"/d/{two}/2.wav", two)])
    assert list(manifest.classes) == [one]
    assert [item.file for item in manifest] == [f"/d/{one}/1.wav", f"/d/{two}/2.wav"]
    listed = tmp_path / "listed"
    listed.write_text(two, encoding="utf-8")
    assert training_classes({one: [1, 2]}, set(), listed=listed) == [one]
    for name in (one, two):
        for number in (1, 2):
            file = tmp_path / "people" / name / f"{number}.wav"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    people = read_people(tmp_path / "people")
    assert sorted(people.ids) == [one]
    assert len(people.ids[one]) == 4
    assert all(file.is_file() for file in people.files.values())
    groups, names = trial_groups(trials, {two: "m", "ann": "f"})
    assert [names[n] for n in groups] == ["m", "f × m", "f × m"]
