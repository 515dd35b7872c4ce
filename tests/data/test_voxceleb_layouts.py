"""VoxCeleb's real layouts, m4a, several lists: on a generated tree of its names."""

import logging
import os

import numpy as np
import pytest
import soundfile
import torch

pytest.importorskip("av", reason="m4a needs the extra voxceleb (PyAV)")

from voxceleb_tree import build_dry_run_tree, write_m4a

from speechbrain_qmargin.data import voxceleb
from speechbrain_qmargin.data.audio import inspect_audio, read_audio
from speechbrain_qmargin.data.convert import convert_to_flac
from speechbrain_qmargin.data.speech import prepare_speech
from speechbrain_qmargin.data.speech_dataset import SpeechDataset
from speechbrain_qmargin.data.voxceleb import audio_roots, training_roots
from speechbrain_qmargin.trials import read_trials

RATE = 16000


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return build_dry_run_tree(tmp_path_factory.mktemp("vox"), train_speakers=3, test_speakers=4)


def prepare(tree, save, **kwargs):
    kwargs = {"trials_folder": tree.voxceleb1, "verification_file": tree.lists, **kwargs}
    return prepare_speech(tree.voxceleb2, save, progress=False, **kwargs)


def same(one, other):
    """Whether trials are the same, of the same file."""
    arrays = ("enrolment", "test", "is_target")
    return (one.ids, one.source) == (other.ids, other.source) and all(
        np.array_equal(getattr(one, key), getattr(other, key)) for key in arrays
    )


def test_train_from_voxceleb2_and_test_on_voxceleb1(tree, tmp_path):
    found = prepare(tree, tmp_path)
    assert found.speakers == ["id00012", "id00015", "id00018"]
    assert len(found.train) == 12
    assert all(item.file.endswith(".m4a") for item in found.train)
    assert list(found.test_trials) == ["O", "E", "H"]
    assert {name[:7] for name in found.test.ids} == {"id10001", "id10002", "id10270", "id10271"}
    assert same(found.test_trials["O"], read_trials(tree.lists["O"]))
    for item in found.train:
        samples = read_audio(item.file, RATE)
        assert len(samples) == pytest.approx(RATE * item.duration, abs=1), item.id


def test_folders_in_one_list_exclude_by_the_lists_alone(tree, tmp_path):
    only_o = {"O": tree.lists["O"]}
    both = [tree.voxceleb2, tree.voxceleb1]
    found = prepare_speech(both, tmp_path / "o", verification_file=only_o, progress=False)
    assert {"id10001", "id10002", "id00012"} <= set(found.speakers)
    assert not {"id10270", "id10271"} & set(found.speakers)
    found = prepare(tree, tmp_path / "e", verification_file=next(iter(tree.lists.values())))
    assert found.speakers == ["id00012", "id00015", "id00018"]
    assert list(found.test_trials) == ["veri_test2"]


def test_what_is_missing_is_counted_by_list(tree, tmp_path, caplog):
    extra = "1 id10270/gone/00001.wav id10270/gone/00002.wav\n"
    lists = {}
    for name, path in tree.lists.items():
        lists[name] = tmp_path / path.name
        lists[name].write_text(path.read_text() + (extra if name != "O" else ""))
    with pytest.raises(FileNotFoundError, match=r"list_test_all2.txt: .*2 are not found") as error:
        prepare(tree, tmp_path / "save", verification_file=lists)
    assert "list_test_hard2.txt" in str(error.value)
    assert "veri_test2.txt" not in str(error.value)
    rows = [line.split("\t") for line in (tmp_path / "save/missing.txt").open()]
    assert [row[0] for row in rows] == ["E", "E", "H", "H"]
    assert rows[0][1] == "id10270/gone/00001.wav"
    with caplog.at_level(logging.WARNING):
        found = prepare(tree, tmp_path / "save", verification_file=lists, allow_missing=True)
    assert "reduced lists" in caplog.text
    assert len(found.test_trials["E"]) == len(read_trials(tree.lists["E"]))
    assert not any("gone" in name for name in found.test.ids)
    prepare(tree, tmp_path / "save")
    assert not (tmp_path / "save/missing.txt").exists()


def test_a_list_without_targets_left_is_refused(tree, tmp_path):
    only = tmp_path / "only.txt"
    a, b = sorted(path.name for path in (tree.voxceleb1 / "vox1_test_wav/wav/id10270").iterdir())
    only.write_text(
        f"0 id10270/{a}/00001.wav id10271/none/00001.wav\n"
        f"1 id10270/{a}/00001.wav id10270/{b}/00001.wav\n"
    )
    with pytest.raises(ValueError, match="no target or no impostor"):
        prepare(tree, tmp_path / "save", verification_file=only, allow_missing=True)


def test_lists_of_one_name_and_missing_lists(tree, tmp_path):
    (tmp_path / "veri_test2.txt").write_text("")
    with pytest.raises(ValueError, match="have the same name"):
        prepare(tree, tmp_path, verification_file=[tree.lists["O"], tmp_path / "veri_test2.txt"])
    with pytest.raises(FileNotFoundError, match=r"gone\.txt"):
        prepare(tree, tmp_path, verification_file={"O": tmp_path / "gone.txt"})


def layout(folder, *parts):
    """Empty folders ``root/speaker``; the paths of the roots, in their order."""
    roots = {}
    for part in parts:
        (folder / part).mkdir(parents=True)
        roots[(folder / part).parent] = None
    return list(roots)


def test_layouts(tmp_path):
    with pytest.raises(FileNotFoundError, match="dev/aac"):
        audio_roots(tmp_path)
    roots = layout(tmp_path, "wav/aac", "vox1_test_wav/wav/id10270", "vox2/dev/aac/id00012")
    assert audio_roots(tmp_path) == roots  # wav/aac is a speaker
    layout(tmp_path, "other/deeper/wav/id00012")
    assert audio_roots(tmp_path) == roots


@pytest.mark.parametrize(
    ("dev", "test"),
    [
        ("dev/aac", "test/aac"),
        ("dev/aac", "aac"),  # both archives unzipped in one folder
        ("vox2_dev_aac/dev/aac", "vox2_test_aac/aac"),
        ("vox2_dev_aac/aac", "vox2_test_aac/aac"),
        ("dev/wav", "test/wav"),  # converted
        ("train/wav", "test/wav"),
        ("wav", "test/wav"),
        ("aac", "vox2_test_aac/aac"),
    ],
)
def test_the_test_part_of_voxceleb2_is_not_trained_on(tmp_path, caplog, dev, test):
    layout(tmp_path, f"{dev}/id00012", f"{dev}/id09272", f"{test}/id00017")
    assert training_roots(tmp_path) == [tmp_path / dev]
    assert f"its test part, {tmp_path / test}, is not trained on" in caplog.text
    assert set(audio_roots(tmp_path)) == {tmp_path / dev, tmp_path / test}


def test_everything_else_is_trained_on(tmp_path, caplog):
    one = layout(tmp_path / "1", "vox1_dev_wav/wav/id10001", "vox1_test_wav/wav/id10270")
    assert training_roots(tmp_path / "1") == one
    both = layout(tmp_path / "2", "wav/id10270", "dev/aac/id00012", "test/wav/id10271")
    assert set(training_roots(tmp_path / "2")) == set(both)
    copy = layout(tmp_path / "3", "wav/id00012", "dev/aac/id00012")
    assert training_roots(tmp_path / "3") == copy
    alone = layout(tmp_path / "4", "test/aac/id00017")
    assert training_roots(tmp_path / "4") == alone
    own = layout(tmp_path / "5", "dev/wav/ann", "test/wav/bob")
    assert training_roots(tmp_path / "5") == own
    assert not caplog.text


def test_the_test_part_of_voxceleb2_can_be_tested_on(tree, tmp_path):
    folder = tmp_path / "vox2"
    for part, speakers in (("dev", ("id00012", "id00015", "id00021")), ("test", ("id00018",))):
        for speaker in speakers:
            there = folder / part / "aac" / speaker
            there.parent.mkdir(parents=True, exist_ok=True)
            source = "id00015" if speaker == "id00021" else speaker
            there.symlink_to(tree.voxceleb2 / "dev/aac" / source)
    names = sorted(path.relative_to(folder / "test/aac").as_posix()
                   for path in (folder / "test/aac/id00018").rglob("*.m4a"))  # fmt: skip
    trials = tmp_path / "trials.txt"
    other = next((folder / "dev/aac/id00012").rglob("*.m4a")).relative_to(folder / "dev/aac")
    trials.write_text(f"1 {names[0]} {names[1]}\n0 {names[0]} {other.as_posix()}\n")
    found = prepare_speech(
        folder, tmp_path, trials_folder=folder, verification_file=trials, progress=False
    )
    assert found.speakers == ["id00015", "id00021"]
    assert set(found.test.ids) == {*names[:2], other.as_posix()}


def test_the_roots_are_logged_and_too_many_speakers_warned_of(tree, tmp_path, caplog, monkeypatch):
    with caplog.at_level(logging.INFO):
        prepare(tree, tmp_path)
    voxceleb1 = tree.voxceleb1 / "vox1_test_wav/wav"
    assert f"{tree.voxceleb2 / 'dev/aac'}: 12 recordings of 3 speakers, to train" in caplog.text
    assert f"{voxceleb1}: 8 recordings of 2 speakers, for trials alone" in caplog.text
    assert "development part" not in caplog.text
    monkeypatch.setattr(voxceleb, "_VOXCELEB2_TRAINING_SPEAKERS", 2)
    prepare(tree, tmp_path)
    assert "3 training speakers are VoxCeleb2's by their ids" in caplog.text


def test_m4a_stretches_are_those_of_the_whole(tmp_path):
    rng = np.random.default_rng(0)
    time = np.arange(int(4.321 * RATE)) / RATE
    signal = 0.3 * np.sin(2 * np.pi * (200 + 40 * time) * time) + 0.05 * rng.standard_normal(
        len(time)
    )
    path = tmp_path / "a.m4a"
    write_m4a(path, signal)
    whole = read_audio(path, RATE)
    assert len(whole) == pytest.approx(len(signal), abs=1)
    assert np.corrcoef(whole[: len(signal)], signal[: len(whole)])[0, 1] > 0.95
    for start in (4.33, 9.0):
        with pytest.raises(OSError, match=rf"a\.m4a: no samples at {start:.2f} s"):
            read_audio(path, RATE, start, 1.5)
    for start in (0.0, 0.01, 0.2, 1.2345, 3.9):
        first = round(start * RATE)
        part = read_audio(path, RATE, start, 1.5)
        assert torch.equal(part, whole[first : first + round(1.5 * RATE)])
    assert read_audio(path, RATE // 2).shape[0] == pytest.approx(len(whole) / 2, abs=1)
    assert inspect_audio(path) == (pytest.approx(4.321, abs=1e-3), "")


def test_broken_m4a_is_named(tmp_path):
    path = tmp_path / "a.m4a"
    write_m4a(path, np.zeros(RATE))
    content = path.read_bytes()
    for bad in (b"", b"no audio", content[: len(content) // 2]):
        path.write_bytes(bad)
        assert "cannot be decoded" in inspect_audio(path)[1]
        with pytest.raises(OSError, match=r"a\.m4a: cannot be decoded"):
            read_audio(path, RATE)


@pytest.mark.slow
def test_conversion_resumes_and_lists_what_fails(tree, tmp_path, monkeypatch):
    flac = tmp_path / "flac"
    assert convert_to_flac(tree.voxceleb2, flac, jobs=2, progress=False) == {
        "converted": 12,
        "kept": 0,
        "failed": 0,
    }
    found = prepare_speech(
        flac,
        tmp_path / "save",
        trials_folder=tree.voxceleb1,
        verification_file=tree.lists,
        progress=False,
    )
    direct = prepare(tree, tmp_path / "save2")
    assert {name.split(".")[0] for name in found.train.ids} == {
        name.split(".")[0] for name in direct.train.ids
    }
    decoded, written = (read_audio(one.train.files[0], RATE) for one in (direct, found))
    assert torch.allclose(decoded, written, atol=2**-15)

    files = sorted(flac.rglob("*.flac"))
    files[0].unlink()
    os.utime(files[1], (0, 0))
    assert convert_to_flac(tree.voxceleb2, flac, jobs=1, progress=False)["converted"] == 2

    broken = tmp_path / "vox2/dev/aac/id1/v"
    broken.mkdir(parents=True)
    (broken / "00001.m4a").write_bytes(b"none")
    assert convert_to_flac(tmp_path / "vox2", flac, jobs=1, progress=False)["failed"] == 1
    assert "id1/v/00001.m4a" in (flac / "not_converted.txt").read_text()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    files[0].unlink()
    monkeypatch.setattr(soundfile, "write", full)
    with pytest.raises(OSError, match="make room and start again"):
        convert_to_flac(tree.voxceleb2, flac, jobs=1, progress=False)
    assert not list(flac.rglob("*.partial*"))
    assert audio_roots(flac) == [flac / "wav"]


def test_recordings_that_are_there_twice_are_used_once(tree, tmp_path, caplog):
    both = tmp_path / "both"
    convert_to_flac(tree.voxceleb2, both, jobs=1, progress=False)
    (both / "dev").symlink_to(tree.voxceleb2 / "dev")
    found = prepare_speech(both, tmp_path / "save", progress=False)
    assert len(found.train) == 12
    assert all(file.endswith(".flac") for file in found.train.files)
    assert "12 recordings are there twice" in caplog.text


def test_crops_of_m4a(tree, tmp_path):
    found = prepare(tree, tmp_path)
    data = SpeechDataset(found.train, RATE, crop=2.0)
    assert {data[i]["sig"].shape for i in range(len(data))} == {torch.Size([32000])}


def test_the_tree_is_left_alone_when_complete(tree):
    before = {path: path.stat().st_mtime_ns for path in tree.folder.rglob("*")}
    build_dry_run_tree(tree.folder, train_speakers=3, test_speakers=4)
    assert before == {path: path.stat().st_mtime_ns for path in tree.folder.rglob("*")}
