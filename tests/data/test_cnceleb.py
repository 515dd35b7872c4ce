"""CN-Celeb as published: on a generated tree of its names."""

import numpy as np
import pytest
import soundfile

from speechbrain_qmargin.data.readers import read_corpus
from speechbrain_qmargin.data.speech import prepare_speech

RATE = 16000
TEST = ("id00800", "id00801", "id00802")


def write(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.random.default_rng(seed).standard_normal(RATE // 2), RATE)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """CN-Celeb_flac with three training speakers, and CN-Celeb2_flac with two."""
    folder = tmp_path_factory.mktemp("cnceleb")
    first, second = folder / "CN-Celeb_flac", folder / "CN-Celeb2_flac"
    for number in range(3):
        for genre in ("singing-01-001", "vlog-02-001", "vlog-02-002"):
            write(first / f"data/id{number:05d}/{genre}.flac", number)
    for number in range(2):
        for genre in ("interview-01-001", "speech-01-001"):
            write(second / f"data/id{10000 + number}/{genre}.flac", 10 + number)
    (first / "dev").mkdir()
    (first / "dev/dev.lst").write_text("id00000\nid00001\nid00002\n")
    (second / "spk.lst").write_text("id10000\nid10001\n")
    trials, single, several = [], [], []
    for number, speaker in enumerate(TEST):
        for take in (1, 2):
            write(first / f"data/{speaker}/interview-01-00{take}.flac", 20 + number)
        write(first / f"eval/enroll/{speaker}-enroll.flac", 30 + number)
        for take in (1, 2):
            write(first / f"eval/test/{speaker}-singing-01-00{take}.flac", 40 + number)
        single.append(f"{speaker}-enroll enroll/{speaker}-enroll.wav\n")
        recordings = " ".join(f"{speaker}/interview-01-00{take}.wav" for take in (1, 2))
        several.append(f"{speaker}-enroll {recordings}\n")
        for other in TEST:
            for take in (1, 2):
                test = f"test/{other}-singing-01-00{take}.wav"
                trials.append(f"{speaker}-enroll {test} {int(speaker == other)}\n")
    lists = first / "eval/lists"
    lists.mkdir()
    for name, lines in (("trials.lst", trials), ("enroll.lst", single), ("enroll.map", several)):
        (lists / name).write_text("".join(lines))
    return folder


def prepare(tree, save, **kwargs):
    first = tree / "CN-Celeb_flac"
    return prepare_speech(
        [first, tree / "CN-Celeb2_flac"],
        save,
        trials_folder=first,
        verification_file=first / "eval/lists/trials.lst",
        progress=False,
        **kwargs,
    )


def test_the_speakers_of_the_training_lists_are_trained_on(tree, tmp_path, caplog):
    found = prepare(tree, tmp_path)
    assert found.speakers == ["id00000", "id00001", "id00002", "id10000", "id10001"]
    assert "id00000/singing-01-001.flac" in found.train.ids
    assert "VoxCeleb2" not in caplog.text
    assert "there twice" not in caplog.text


def test_an_enrolment_id_is_the_recording_in_one_piece(tree, tmp_path):
    trials = prepare(tree, tmp_path).test_trials["trials"]
    assert (len(trials), int(trials.is_target.sum()), trials.models) == (18, 6, {})
    assert trials.ids[trials.enrolment[0]] == "enroll/id00800-enroll.flac"
    assert trials.ids[trials.test[0]] == "test/id00800-singing-01-001.flac"
    assert set(trials.speaker_names()) == set(TEST)
    assert trials.source.startswith("trials.lst sha256:")


@pytest.mark.parametrize(("table", "count"), [("enroll.lst", 1), ("enroll.map", 2)])
def test_a_table_makes_models_of_recordings(tree, tmp_path, table, count):
    file = tree / "CN-Celeb_flac/eval/lists" / table
    found = prepare(tree, tmp_path, enrolment_file=file)
    trials = found.test_trials["trials"]
    assert set(trials.models) == {f"{speaker}-enroll" for speaker in TEST}
    assert {len(recordings) for recordings in trials.models.values()} == {count}
    wanted = {one for recordings in trials.models.values() for one in recordings}
    assert wanted <= set(found.test.ids)
    assert len(found.test) == 6 + 3 * count
    assert found.speakers == ["id00000", "id00001", "id00002", "id10000", "id10001"]


def test_a_table_of_other_models_is_refused(tree, tmp_path):
    (tmp_path / "other.map").write_text("nobody enroll/id00800-enroll.wav\n")
    with pytest.raises(ValueError, match=r"other\.map: no trial list enrols any of its models"):
        prepare(tree, tmp_path, enrolment_file=tmp_path / "other.map")


def test_without_a_list_whoever_is_not_tested_is_trained_on(tree, tmp_path):
    for name in ("data", "eval"):
        (tmp_path / name).symlink_to(tree / "CN-Celeb_flac" / name)
    assert list(read_corpus(tmp_path).classes) == ["id00000", "id00001", "id00002"]
    everything = read_corpus(tmp_path, True)
    assert list(everything.classes) == ["id00000", "id00001", "id00002", *TEST]
    assert len(everything) == 9 + 6 + 9


def test_its_speakers_are_not_voxcelebs_of_the_same_names(tree, tmp_path, caplog):
    first, other = tree / "CN-Celeb_flac", tmp_path / "VoxCeleb2"
    for speaker in ("id00001", "id00012", "id00800"):
        for take in (1, 2):
            write(other / f"dev/aac/{speaker}/video/0000{take}.wav", take)
    found = prepare_speech(
        [other, first],
        tmp_path / "save",
        trials_folder=first,
        verification_file=first / "eval/lists/trials.lst",
        progress=False,
    )
    theirs = [f"cnceleb-id0000{number}" for number in range(3)]
    assert found.speakers == [*theirs, "id00001", "id00012", "id00800"]
    assert len(found.train) == 9 + 6
    assert set(found.test_trials["trials"].speaker_names()) == {f"cnceleb-{one}" for one in TEST}
    assert "2 of CN-Celeb's speakers have the names of others (id00001, id00800)" in caplog.text
    assert "another source" not in caplog.text
