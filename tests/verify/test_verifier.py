"""Enrol, verify, identify: the scores are those of the lists, in one thread or many."""

import os
import shutil
import threading
import warnings
from dataclasses import replace

import numpy as np
import pytest
from verify.stub import DIGEST, Stub

from speechbrain_qmargin.embeddings import Embeddings, cosine_scores
from speechbrain_qmargin.extraction import Inputs
from speechbrain_qmargin.scoring.calibration import Calibration
from speechbrain_qmargin.scoring.metrics import eer, operating_points
from speechbrain_qmargin.scoring.normalisation import normalize
from speechbrain_qmargin.scoring.pairing import every_model, every_pair
from speechbrain_qmargin.scoring.separation import name_digest
from speechbrain_qmargin.scoring.uncertainty import rate_interval
from speechbrain_qmargin.trials import Trials, speaker_in
from speechbrain_qmargin.verify import threshold
from speechbrain_qmargin.verify import verifier as verifier_module
from speechbrain_qmargin.verify.people import NotEnrolled, People
from speechbrain_qmargin.verify.readers import Unfit
from speechbrain_qmargin.verify.system import Histogram, NoThreshold, System, cohort_digest
from speechbrain_qmargin.verify.threshold import cohort_of, measure_threshold
from speechbrain_qmargin.verify.verifier import Verifier, people_file, place_of

READER = Stub()
PEOPLE = [f"person{n}" for n in range(24)]
OTHERS = [f"other{n}" for n in range(20)]
CORPUS = Embeddings(*READER.embeddings(PEOPLE, 3))
COHORT = Embeddings(*READER.embeddings(OTHERS, 2))


def system_of(method="", **options):
    cohort = cohort_of(COHORT, method, 6) if method else None
    return measure_threshold(CORPUS, DIGEST, 0.05, cohort=cohort, **options).system


@pytest.fixture
def verifier(tmp_path):
    return Verifier(READER, People(tmp_path / "people.sqlite"), system_of("as"))


def said(person, *takes):
    return [f"{person} {take}".encode() for take in takes]


@pytest.mark.parametrize("method", ["", "as", "s", "z", "t"])
def test_scores_are_those_of_lists(tmp_path, method):
    """A person's template of three against two recordings, as models of a trial list."""
    system = system_of(method)
    verifier = Verifier(READER, People(tmp_path / "people.sqlite"), system)
    verifier.enrol("Ann", said("ann", 1, 2, 3))
    rows = {f"{who} {n}": READER.vector(f"{who} {n}") for who in ("ann", "bob") for n in range(5)}
    trials = Trials(["Ann", "ann 4", "bob 0"], np.array([0, 0]), np.array([1, 2]))
    trials = trials.with_models({"Ann": ("ann 1", "ann 2", "ann 3")})
    if method:
        cohort = system.cohort
        expected = normalize(rows, trials, cohort.entries, method=method, top_n=6, mean=cohort.mean)
    else:
        expected = cosine_scores(rows, trials)
    found = [verifier.verify("Ann", said(*one)[0]) for one in (("ann", 4), ("bob", 0))]
    np.testing.assert_allclose([one.score for one in found], expected, rtol=1e-5, atol=1e-6)
    assert [one.accept for one in found] == [True, False]
    assert found[0].accept == (found[0].score >= found[0].threshold)
    assert found[0].kind == (f"{method}-norm" if method else "cosine")
    weights = system.calibration
    assert found[0].llr == pytest.approx(weights.weights[0] * found[0].score + weights.offset)


def test_the_system_is_the_same_after_a_file(tmp_path):
    for method in ("as", ""):
        system = system_of(method)
        system.save(tmp_path)
        loaded = System.load(tmp_path, DIGEST)
        assert loaded.point == system.point
        assert loaded.calibration == system.calibration
        assert loaded.histogram == system.histogram
        assert cohort_digest(loaded.cohort) == cohort_digest(system.cohort)
    assert not (tmp_path / "cohort.npz").exists()  # of the system before


def test_what_is_not_of_one_another_is_refused(tmp_path):
    system = system_of("as")
    system.save(tmp_path)
    with pytest.raises(ValueError, match=r"operating_point\.json: the threshold is of the encoder "
                       r"abab.* this is 0000.* qmargin threshold"):  # fmt: skip
        System.load(tmp_path, "0" * 64)
    with pytest.raises(NoThreshold, match=r"no threshold in it .*qmargin threshold"):
        System.load(tmp_path / "elsewhere", DIGEST)
    replace(system.point, encoder="").save(tmp_path / "operating_point.json")
    with pytest.raises(ValueError, match="does not say of which encoder"):
        System.load(tmp_path, DIGEST)
    shutil.copy(tmp_path / "calibration.json", tmp_path / "kept")
    cohort, calibration, histogram = system.cohort, system.calibration, system.histogram
    for fault, change in (
        ("is of the cohort", {"cohort": replace(cohort, top_n=5)}),
        ("is for as-norm, the cohort z-norm", {"cohort": replace(cohort, method="z")}),
        ("is for as-norm scores, and there is no cohort", {"cohort": None}),
        ("is for unknown scores", {"point": replace(system.point, kind="")}),
        ("is for plda scores", {"point": replace(system.point, kind="plda")}),
        ("calibration is of other scores", {"calibration": replace(calibration, kind="z")}),
        ("calibration is of other scores", {"calibration": replace(calibration, cohort="c")}),
        ("is of the encoder", {"calibration": replace(calibration, encoder="0" * 64)}),
        (
            "wants quality measures",
            {"calibration": replace(calibration, qualities=["d"], weights=[1.0, 0, 0])},
        ),
        ("histogram is of other scores", {"histogram": replace(histogram, kind="cosine")}),
        ("is of the encoder", {"histogram": replace(histogram, encoder="0" * 64)}),
    ):
        with pytest.raises(ValueError, match=fault):
            replace(system, **change)
    (tmp_path / "cohort.npz").write_bytes(b"PK\x03\x04 damaged")
    system.point.save(tmp_path / "operating_point.json")
    with pytest.raises(ValueError, match=r"cohort\.npz: damaged"):
        System.load(tmp_path, DIGEST)
    (tmp_path / "operating_point.json").write_text("{")
    with pytest.raises(NoThreshold, match=r"operating_point\.json: not an .*; measure one"):
        System.load(tmp_path, DIGEST)


def test_a_system_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    old = system_of("as")
    old.save(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for place, name in ((np, "savez"), (Calibration, "save"), (type(old.point), "save")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full)
            with pytest.raises(OSError, match="No space left"):
                system_of("s").save(tmp_path)
        assert System.load(tmp_path, DIGEST).point == old.point
        assert len(list(tmp_path.iterdir())) == 4


def test_a_threshold_that_cannot_take_its_place_leaves_the_cohort(tmp_path, monkeypatch):
    old = system_of("as")
    old.save(tmp_path)

    def full(source, target, replace=os.replace):
        if target == tmp_path / "operating_point.json":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("speechbrain_qmargin.files.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        System(system_of().point).save(tmp_path)
    loaded = System.load(tmp_path, DIGEST)
    assert loaded.point == old.point
    assert loaded.calibration == old.calibration
    assert cohort_digest(loaded.cohort) == cohort_digest(old.cohort)


def test_a_calibrated_threshold_decides_on_ratios(tmp_path):
    system = system_of()
    point = replace(system.point, kind="llr", threshold=0.0)
    calibration = Calibration([], [10.0], -4.0, 0.01, "", 9, "cosine", [], DIGEST)
    system = System(point, None, calibration)
    assert system.kind == "cosine"
    assert [system.accepts(score) for score in (0.41, 0.39)] == [True, False]
    with pytest.raises(ValueError, match="the score is nan"):
        system.accepts(float("nan"))
    System(replace(point, backend=calibration.digest), None, calibration)
    with pytest.raises(ValueError, match="the threshold is of the backend"):
        System(replace(point, backend=calibration.digest), None, replace(calibration, offset=-3.0))


def test_identification_names_the_nearest_and_what_a_search_costs(verifier):
    for name in ("ann", "bob", "cyd"):
        verifier.enrol(name, said(name, 1, 2))
    found = verifier.identify(said("bob", 7)[0], max_candidates=2)
    assert found.name == "bob"
    assert found.candidates[0].name == "bob"
    assert len(found.candidates) == 2
    assert found.candidates[0].score == pytest.approx(verifier.verify("bob", b"bob 7").score)
    far = verifier.system.point.far_interval[1]
    assert found.false_alarm == pytest.approx(min(1, 3 * far))
    # no false accept was seen, and no interval is known: that is not a chance of none
    point = replace(verifier.system.point, far_interval=None, far=0.0, false_accepts=0)
    quiet = Verifier(READER, verifier.people, replace(verifier.system, point=point))
    high = rate_interval(0, point.num_impostors)[1]
    assert quiet.identify(said("bob", 7)[0]).false_alarm == pytest.approx(3 * high)
    assert high > 0
    loose = replace(point, far_interval=(0.2, 0.6))  # a chance is one at most
    quiet = Verifier(READER, verifier.people, replace(verifier.system, point=loose))
    assert quiet.identify(said("bob", 7)[0]).false_alarm == 1
    assert verifier.identify(b"stranger 1").name is None
    verifier.people.enrol("old", np.eye(1, 32, dtype="f"), "another encoder")
    found = verifier.identify(b"bob 7")
    assert (found.searched, found.left_out) == (3, 1)
    verifier.people.delete("bob")
    assert verifier.identify(b"bob 7").name is None


def test_one_that_is_not_fit_spoils_an_enrolment_and_no_batch(verifier):
    with pytest.raises(Unfit, match="the content: no speech"):
        verifier.enrol("ann", [b"ann 1", b"noise"])
    with pytest.raises(
        Unfit, match=r"2 of 3 recordings cannot be enrolled: .*; the content cannot"
    ):
        verifier.enrol("ann", [b"noise", b"broken", b"ann 1"])
    with pytest.raises(ValueError, match="no recordings to enrol 'ann' from"):
        verifier.enrol("ann", [])
    assert verifier.people.list() == []
    verifier.enrol("ann", b"ann 1")
    with pytest.raises(Unfit, match="the content: it is enrolled already"):
        verifier.enrol("ann", [b"ann 2", b"ann 1"])  # the command, typed twice
    with pytest.raises(Unfit, match="the content: it is given twice"):
        verifier.enrol("ann", [b"ann 2", b"ann 2"], replace=True)
    assert verifier.people.list()[0].recordings == 1
    claims = [("ann", b"ann 2"), ("ann", b"noise"), ("bob", b"bob 1"), ("ann", b"broken")]
    results = verifier.verify_many([*claims, ("ann", b"cyd 1")] * 20)
    kinds = [type(one).__name__ for one in results[-5:]]
    assert kinds == ["Decision", "Unfit", "NotEnrolled", "OSError", "Decision"]
    assert results[-5] == results[0] == verifier.verify("ann", b"ann 2")
    assert [one.accept for one in (results[0], results[4])] == [True, False]
    with pytest.raises(NotEnrolled, match="nobody is enrolled as 'bob'"):
        verifier.verify("bob", b"bob 1")
    with pytest.raises(Unfit):
        verifier.compare(b"ann 1", b"noise")
    assert verifier.compare(b"ann 1", b"ann 2").score == pytest.approx(results[0].score)


def test_one_recording_sent_twice_at_once_is_enrolled_once(tmp_path):
    """A client that asks again because no answer came: the second is done while the first waits."""
    file = tmp_path / "people.sqlite"

    class Waits(People):
        def enrol(self, *given):
            Verifier(READER, People(file), system_of).enrol("ann", b"ann 1")
            super().enrol(*given)

    with pytest.raises(Unfit, match="the content: it is enrolled already"):
        Verifier(READER, Waits(file), system_of).enrol("ann", b"ann 1")
    assert [one.recordings for one in People(file).list()] == [1]


def test_one_recording_is_known_again_though_its_embedding_is_rounded_otherwise(tmp_path):
    class Rounded(Stub):
        def embed(self, samples):
            rows = super().embed(samples)
            return rows + 3e-6 * np.random.default_rng(len(rows)).normal(size=rows.shape)

    verifier = Verifier(Rounded(), People(tmp_path / "p.sqlite"), system_of())
    verifier.enrol("ann", b"ann 1")
    with pytest.raises(Unfit, match="the content: it is enrolled already"):
        verifier.enrol("ann", [b"ann 2", b"ann 1"])
    verifier.enrol("ann", [b"ann 2", b"ann 3"])


def test_a_decision_says_where_the_threshold_was_not_measured_like_this(verifier):
    verifier.enrol("ann", said("ann", 1, 2, 3))
    assert verifier.verify("ann", b"ann 4").notes == (
        "the threshold was measured with 1 recording an enrolment; this has 3",
    )
    verifier.enrol("ann", said("ann", 1), replace=True)
    assert verifier.verify("ann", b"ann 4").notes == ()


def test_without_a_threshold_people_can_be_enrolled_and_nothing_is_decided(tmp_path):
    verifier = Verifier(
        READER, People(tmp_path / "p.sqlite"), lambda: System.load(tmp_path, DIGEST)
    )
    verifier.enrol("ann", b"ann 1")
    with pytest.raises(NoThreshold, match="no threshold"):
        verifier.verify("ann", b"ann 2")
    system_of().save(tmp_path)  # measured meanwhile
    assert verifier.verify("ann", b"ann 2").accept


def test_a_threshold_that_is_measured_anew_is_taken_up(tmp_path, monkeypatch, caplog):
    """By a service that runs; the templates it holds are of the scores from before."""
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "hyperparams.yaml").write_text("sample_rate: 16000")
    monkeypatch.setattr(verifier_module, "load_reader", lambda *_: READER)
    system_of("as").save(folder)
    verifier = Verifier.load(folder)
    verifier.enrol("ann", said("ann", 1, 2))
    for system in (system_of("as"), system_of(), system_of("s")):
        system.save(folder)
        fresh = Verifier.load(folder)
        for ask in (
            lambda one: one.verify("ann", b"ann 3"),
            lambda one: one.verify_many([("ann", b"ann 3")]),
            lambda one: one.identify(b"ann 3"),
            lambda one: one.compare(b"ann 1", b"ann 3"),
        ):
            assert ask(verifier) == ask(fresh)
        assert verifier.verify("ann", b"ann 3").threshold == system.point.threshold
    before = verifier.verify("ann", b"ann 3")
    replace(system.point, encoder="0" * 64).save(folder / "operating_point.json")
    with pytest.raises(NoThreshold, match="is of the encoder 0000"):
        Verifier.load(folder).verify("ann", b"ann 3")
    assert verifier.verify("ann", b"ann 3") == verifier.verify("ann", b"ann 3") == before
    assert caplog.text.count("decisions go on with the threshold of before") == 1


def test_templates_of_another_encoder_are_refused(tmp_path):
    people = People(tmp_path / "p.sqlite")
    Verifier(Stub(digest="cd" * 32), people, system_of()).enrol("ann", b"ann 1")
    verifier = Verifier(READER, people, system_of())
    for use in (lambda: verifier.verify("ann", b"ann 2"), lambda: verifier.enrol("ann", b"ann 2")):
        with pytest.raises(ValueError, match=r"enrolled with the encoder cdcd.*, and this is abab"):
            use()
    with pytest.raises(ValueError, match="nobody is enrolled with this encoder"):
        verifier.identify(b"ann 2")


def test_threads_get_what_one_thread_gets(verifier):
    for name in PEOPLE[:6]:
        verifier.enrol(name, said(name, 8, 9))
    claims = [(name, f"{other} 11".encode()) for name in PEOPLE[:6] for other in PEOPLE[:8]]
    expected, found = [verifier.verify(*claim) for claim in claims], {}

    def work(own):
        for n in range(own, len(claims), 8):
            found[n] = verifier.verify(*claims[n])
            verifier.identify(claims[n][1])
            if n == 9:
                verifier.enrol("more", f"more {n}".encode())  # templates are looked up anew

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(len(claims))] == expected


# ---------------------------------------------------------------- thresholds


def test_a_threshold_is_chosen_on_one_half_and_measured_on_the_other():
    found = measure_threshold(CORPUS, DIGEST, 0.05, source="mine")
    point = found.system.point
    assert found.people == (12, 12)
    assert (point.kind, point.encoder, point.enrolled_from) == ("cosine", DIGEST, 1)
    assert point.num_targets == 12 * 9  # across sessions alone
    assert point.num_impostors == 12 * 11 // 2 * 36
    assert point.far_interval[0] <= point.far <= point.far_interval[1]
    assert point.tar_interval[0] <= point.tar <= point.tar_interval[1]
    assert not point.optimistic
    assert point.chosen_on.startswith("chosen: 12 people of mine, sha256:")
    calibration = found.system.calibration
    assert point.chosen_on.endswith(f"sha256:{calibration.fitted_on[:16]}")
    assert calibration.p_target == 0.01
    measured = sorted(PEOPLE, key=name_digest)[1::2]
    own = {who: [name for name in CORPUS.ids if speaker_in(name) == who] for who in measured}
    trials = every_pair(own)
    assert found.eer == eer(operating_points(cosine_scores(CORPUS, trials), trials.is_target))
    again = measure_threshold(CORPUS, DIGEST, 0.05, p_target=0.3).system
    assert (again.point.threshold, again.calibration.p_target) == (point.threshold, 0.3)
    assert "person1" not in point.chosen_on + point.measured_on
    counts = found.system.histogram
    assert (sum(counts.targets), sum(counts.impostors)) == (point.num_targets, point.num_impostors)


def test_an_interrupted_threshold_goes_on_with_its_own_people_alone(tmp_path):
    """Two folders whose people and files have the same names; other rules, another encoder."""
    sources = {}
    for source in ("one", "other"):
        sources[source] = {name: tmp_path / source / name for name in ("p1/1", "p1/2", "p2/1")}
        for name, file in sources[source].items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{source} {name}")
    for source, files in sources.items():
        found, _ = threshold.embed_files(READER, Inputs(files), tmp_path / "parts")
        for name in files:
            np.testing.assert_array_equal(found[name], READER.vector(f"{source} {name}"))

    class Unchecked(Stub):
        rules = "unchecked"

        def vector(self, text):
            return -super().vector(text)

    for reader in (Unchecked(), Stub(digest="cd" * 32)):  # what others left is not in the way
        found, _ = threshold.embed_files(reader, Inputs(sources["one"]), tmp_path / "parts")
        np.testing.assert_array_equal(found["p1/1"], reader.vector("one p1/1"))
        assert len(list((tmp_path / "parts").iterdir())) == 1


def test_a_threshold_takes_no_embedding_of_another_file_of_records(tmp_path):
    """Whose rows have the same numbers and names; what it could not take was known beforehand."""
    inputs = [Inputs({"1/0": 0}, lambda row: b"one", {"2/1": "its label is broken"}, state="one")]
    inputs.append(replace(inputs[0], content=lambda row: b"other", state="other"))
    for one in inputs:
        found, faults = threshold.embed_files(READER, one, tmp_path / "parts")
        np.testing.assert_array_equal(found["1/0"], READER.vector(one.state))
        assert faults == {"2/1": "its label is broken"}


def test_few_people_are_marked():
    few = Embeddings(*READER.embeddings(PEOPLE[:5], 3))
    found = measure_threshold(few, DIGEST, 0.05)
    assert found.system.point.optimistic
    assert found.people == (5, 5)
    assert any("wants 600" in note for note in found.notes)
    for number, halves in ((7, (7, 7)), (8, (4, 4))):
        found = measure_threshold(Embeddings(*READER.embeddings(PEOPLE[:number], 3)), DIGEST, 0.05)
        assert found.people == halves
        assert found.system.point.optimistic == (number == 7)
    with pytest.raises(ValueError, match="1 people have more than 1 usable recordings"):
        measure_threshold(Embeddings(*READER.embeddings(["x"], 3)), DIGEST)
    with pytest.raises(ValueError, match="its id names no person"):
        measure_threshold(Embeddings(["a", "b"], np.eye(2)), DIGEST)


def test_people_of_the_cohort_are_refused():
    with pytest.raises(ValueError, match="24 speakers are in the cohort and in the trials"):
        measure_threshold(CORPUS, DIGEST, cohort=cohort_of(CORPUS))


def test_enrolments_of_several_recordings_are_measured_as_they_are_used():
    found = measure_threshold(CORPUS, DIGEST, 0.05, enrol_with=3)
    point = found.system.point
    assert point.enrolled_from == 3
    assert point.num_targets == 12 * 2 * 3  # two enrolments, three recordings of the other session
    assert point.num_impostors == 12 * 2 * 11 * 6


@pytest.mark.parametrize("enrol_with", [1, 2])
def test_however_many_people_there_are_pairs_are_bounded(monkeypatch, enrol_with):
    """Of a person as many recordings stay as an enrolment and a test need, and fewer people."""
    monkeypatch.setattr(threshold, "_MOST", 27)  # recordings of a half
    found = measure_threshold(CORPUS, DIGEST, 0.05, enrol_with=enrol_with)
    people = {1: 12, 2: 9}[enrol_with]
    assert found.people == (people, people)
    drawn = [note for note in found.notes if "were drawn" in note]
    assert drawn == ["of 24 people 18 were drawn, by their names' digests"] * (enrol_with == 2)
    each = {1: 2, 2: 3}[enrol_with]  # recordings
    trials = {1: people * (people - 1) // 2 * each**2, 2: people * (people - 1) * each}
    assert found.system.point.num_impostors == trials[enrol_with]
    with pytest.raises(ValueError, match="enrolments of 10 leave none to be tried; 11 at least"):
        measure_threshold(CORPUS, DIGEST, enrol_with=10)


def test_every_model_naively():
    chosen = {"x": [f"x/{s}/{n}" for s in "ab" for n in range(3)], "y": ["y/a/0", "y/a/1", "y/a/2"]}
    trials = every_model(chosen, 2)
    seen = set()
    for n in range(len(trials)):
        model, test = (trials.ids[side[n]] for side in (trials.enrolment, trials.test))
        own = trials.models[model]
        assert test not in own
        assert trials.is_target[n] == (own[0][0] == test[0])
        if trials.is_target[n] and test.startswith("x") and model != "x#2":  # x#2 has both sessions
            assert test.split("/")[1] not in {one.split("/")[1] for one in own}
        seen.add((model, test))
    assert len(seen) == len(trials)
    assert {one for model in trials.models.values() for one in model} >= set(chosen["x"])


def test_scores_that_separate_have_no_calibration():
    clear = Stub(spread=0.01)
    found = measure_threshold(Embeddings(*clear.embeddings(PEOPLE, 2)), DIGEST, 0.05)
    assert found.system.calibration is None
    assert any("no calibration" in note for note in found.notes)
    assert found.system.llr(0.5) is None


def test_histograms_count_everything():
    scores = np.array([-1.0, -1, 0, 2, 2, 2])
    found = Histogram.of(scores, scores > 1, "cosine", "e", 3)
    assert (found.targets, found.impostors) == ([0, 0, 3], [2, 1, 0])
    with pytest.raises(ValueError, match="edges and counts disagree"):
        replace(found, edges=[0.0])


def test_nobody_who_was_erased_is_left_in_memory(verifier):
    verifier.enrol("Ann", said("ann", 1, 2))
    verifier.verify("Ann", said("ann", 3)[0])
    verifier.identify(said("ann", 3)[0])
    assert verifier._held.templates
    assert verifier._held.gallery
    assert verifier.erase("Ann") == 2
    assert not verifier._held.templates
    assert verifier._held.gallery is None
    with pytest.raises(NotEnrolled):
        verifier.verify("Ann", said("ann", 3)[0])


def test_a_bad_name_is_known_before_anything_is_read(verifier):
    with pytest.raises(ValueError, match="1 to 200 characters"):
        verifier.enrol(" ", "nowhere.wav")


def test_what_belongs_to_an_encoder_lies_beside_it(tmp_path, monkeypatch):
    weights = tmp_path / "mine" / "avg_model.pt"
    weights.parent.mkdir()
    weights.touch()
    assert place_of(weights) == weights.with_name("avg_model.pt.verifier")
    assert place_of(f"wespeaker:{weights}") == place_of(weights)
    monkeypatch.chdir(weights.parent)
    assert place_of(".") == tmp_path / "mine.verifier"
    assert people_file(".") == tmp_path / "mine.verifier.people.sqlite"


def test_enrolments_are_not_where_an_export_replaces_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(verifier_module, "load_reader", lambda *_: READER)
    folder = tmp_path / "run" / "inference"
    folder.mkdir(parents=True)
    (folder / "hyperparams.yaml").write_text("sample_rate: 16000")
    (folder.parent / "save").mkdir()
    for encoder in (folder.parent, folder):
        for file in (folder / "people.sqlite", folder / ".." / "inference" / "mine" / "p.sqlite"):
            with pytest.raises(ValueError, match=r"sqlite: within the encoder's folder, which .* "
                               r"elsewhere, as in .*run/inference\.people\.sqlite"):  # fmt: skip
                Verifier.load(encoder, file)
    assert [path.name for path in folder.iterdir()] == ["hyperparams.yaml"]
    Verifier.load(folder.parent, folder.parent / "people.sqlite").people.close()


def test_a_cohort_of_one_recording_a_person_is_no_cohort_of_means():
    ids, matrix = READER.embeddings(OTHERS, 1)
    rows = Embeddings(ids[::2], matrix[::2])  # of two sessions the first
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cohort_of(rows)
    rows.source = "means.npz"
    with pytest.warns(UserWarning, match="one embedding a speaker"):
        cohort_of(rows)
