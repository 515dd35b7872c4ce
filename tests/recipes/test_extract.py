"""Embeddings of folders and lists, interruptions and broken audio included; trial lists."""

import numpy as np
import pytest
import soundfile
import torch
from random_runs import speech_run
from scripts import load

from speechbrain_qmargin.cli import main
from speechbrain_qmargin.data.audio import read_audio
from speechbrain_qmargin.embeddings import load_embeddings
from speechbrain_qmargin.export import recordings as module
from speechbrain_qmargin.export.encoder import load_encoder
from speechbrain_qmargin.export.recordings import find_recordings
from speechbrain_qmargin.scoring.decision import choose_operating_point
from speechbrain_qmargin.scoring.metrics import operating_points
from speechbrain_qmargin.trials import read_trials


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return speech_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture
def audio(tmp_path):
    """Six recordings of three speakers in VoxCeleb's layout."""
    rng = np.random.default_rng(0)
    for speaker in ("ann", "bob", "cyd"):
        for number in range(2):
            path = tmp_path / "corpus" / "wav" / speaker / "s1" / f"{number}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, 0.1 * rng.standard_normal(4000 + 100 * number), 16000)
    return tmp_path / "corpus"


def extract(*arguments):
    return main(["--quiet", "extract", *map(str, arguments), "--device=cpu"])


def expected(run, path):
    with torch.no_grad():
        return load_encoder(run)(read_audio(path, 16000)[None])[0].numpy()


def test_a_folder_is_embedded_whole_utterance_by_utterance(run, audio, tmp_path, capsys):
    assert extract(run, audio, tmp_path / "out.npz") == 0
    found = load_embeddings(tmp_path / "out.npz")
    assert found.ids == [f"{who}/s1/{n}.wav" for who in ("ann", "bob", "cyd") for n in (0, 1)]
    for name in found.ids:
        np.testing.assert_allclose(found[name], expected(run, audio / "wav" / name), rtol=1e-5)
    assert "6 embeddings of 16 values" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "out.npz"]


def test_ids_are_those_of_trial_lists_where_the_layout_is_voxcelebs(tmp_path, capsys):
    def ids(folder, *paths):
        for path in paths:
            (tmp_path / folder / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / path).touch()
        found = find_recordings(tmp_path / folder)
        assert all(path.is_file() for path in found.items.values())
        return list(found.items), found.named

    one, two = "vox1_dev_wav/wav/id10001/v/1.wav", "vox1_test_wav/wav/id10270/v/1.wav"
    roots = "vox1_dev_wav/wav/, vox1_test_wav/wav/"
    assert ids("1", one, two, "x.wav") == (
        ["id10001/v/1.wav", "id10270/v/1.wav"],
        f"from their speaker on, below {roots}; 1 elsewhere are not embedded",
    )
    parts = ["dev/aac/id00012/v/1.m4a", "test/aac/id00017/v/1.m4a"]
    assert ids("2", *parts)[0] == ["id00012/v/1.m4a", "id00017/v/1.m4a"]
    for folder, paths in {
        "plain": ["ann/1.wav", "bob/1.wav"],
        "flat": ["ann/wav/1.wav", "bob/wav/2.wav"],  # speakers with a folder of that name
        "equal": ["ann/wav/s1/1.wav", "bob/wav/s1/1.wav"],
    }.items():
        assert ids(folder, *paths) == (paths, "by their path below it")
    assert not capsys.readouterr().out  # what is said is the command's to say


@pytest.mark.parametrize("suffix", [".ark", ".scp"])
def test_a_list_becomes_kaldis_files(run, audio, tmp_path, suffix):
    spaced = audio / "wav" / "ann" / "s1" / "with a space.wav"
    (audio / "wav" / "ann" / "s1" / "0.wav").rename(spaced)
    other = audio / "wav" / "bob" / "s1" / "0.wav"
    (tmp_path / "list.txt").write_text(f"one {spaced}\ntwo\t{other}\n\n{other}\n")
    assert extract(run, tmp_path / "list.txt", tmp_path / f"out{suffix}") == 0
    for name in ("out.ark", "out.scp"):
        found = load_embeddings(tmp_path / name)
        assert found.ids == ["one", "two", str(other)]
        np.testing.assert_allclose(found["one"], expected(run, spaced), rtol=1e-5)


def test_broken_audio_is_listed_and_the_rest_embedded(run, audio, tmp_path, capsys):
    wav = audio / "wav"
    (wav / "ann" / "s1" / "0.wav").write_bytes(b"not audio")
    (wav / "ann" / "s1" / "2\n3.wav").touch()
    soundfile.write(wav / "bob" / "s1" / "0.wav", np.zeros(16000), 16000)
    soundfile.write(wav / "cyd" / "s1" / "0.wav", np.ones(100), 16000)
    assert extract(run, audio, tmp_path / "out.npz") == 0
    found = load_embeddings(tmp_path / "out.npz")
    assert found.ids == ["ann/s1/1.wav", "bob/s1/1.wav", "cyd/s1/1.wav"]
    lines = (tmp_path / "out.npz.skipped.tsv").read_text().splitlines()
    for line, why in zip(lines, ("line break", "decoded", "silent", "shorter"), strict=True):
        assert why in line
    assert "4 recordings skipped" in capsys.readouterr().out
    for path in wav.rglob("1.wav"):
        path.unlink()
    assert extract(run, audio, tmp_path / "none.npz") == 1
    assert "no recording could be embedded" in capsys.readouterr().err


def test_an_interrupted_extraction_goes_on_where_it_was(run, audio, tmp_path, monkeypatch, capsys):
    out, read = tmp_path / "out.npz", []

    def dies(path, rate):
        if len(read) == 4:
            raise KeyboardInterrupt
        read.append(path)
        return read_audio(path, rate)

    monkeypatch.setattr(module, "read_audio", dies)
    assert extract(run, audio, out, "--num_workers=1") == 130
    told = capsys.readouterr().err
    assert told.endswith("extract: interrupted; the same command goes on where it was\n")
    assert not out.exists()
    assert list((tmp_path / "out.npz.parts").glob("part*.npz"))

    other = speech_run(tmp_path / "other", seed=1)
    assert extract(other, audio, out) == 1
    assert "another model" in capsys.readouterr().err

    again = []
    monkeypatch.setattr(
        module, "read_audio", lambda path, rate: again.append(path) or read_audio(path, rate)
    )
    assert extract(run, audio, out, "--num_workers=1") == 0
    assert sorted(read + again) == sorted(audio.rglob("*.wav"))
    assert len(load_embeddings(out).ids) == 6
    assert not (tmp_path / "out.npz.parts").exists()


def test_what_is_not_finite_or_unreadable_is_listed(run, audio, tmp_path, monkeypatch):
    def odd(path, rate):
        signal = read_audio(path, rate)
        return signal * float("inf") if path.parts[-3] == "bob" else signal

    monkeypatch.setattr(module, "read_audio", odd)
    assert extract(run, audio, tmp_path / "out.npz") == 0
    assert {name[:3] for name in load_embeddings(tmp_path / "out.npz").ids} == {"ann", "cyd"}
    lines = (tmp_path / "out.npz.skipped.tsv").read_text().splitlines()
    assert lines == [f"bob/s1/{n}.wav\tits embedding is not finite" for n in (0, 1)]


def test_an_output_is_none_of_the_inputs(run, audio, tmp_path, capsys):
    run_copy = speech_run(tmp_path / "copy")
    (tmp_path / "list.npz").write_text(f"{audio / 'wav/ann/s1/0.wav'}\n")
    assert extract(run, tmp_path / "list.npz", tmp_path / "list.npz") == 1
    assert "the output is an input too" in capsys.readouterr().err
    point = tmp_path / "point.json"
    point.write_text("{}")
    assert main(["export", str(run_copy), f"--operating_point={point}", f"--onnx={point}"]) == 1
    assert "the output is an input too" in capsys.readouterr().err
    assert point.read_text() == "{}"


def test_what_is_there_is_not_exported_over(run, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    for option, path in (("onnx", "file"), ("arcface_torch", "file"), ("wespeaker", "there")):
        assert main(["export", str(run), f"--{option}={tmp_path / path}"]) == 1
        assert f"{path} is there already" in capsys.readouterr().err


def test_bad_input_is_named(run, audio, tmp_path, capsys):
    def error(*arguments):
        assert extract(*arguments) == 1
        return capsys.readouterr().err

    (tmp_path / "empty").mkdir()
    assert "no .wav" in error(run, tmp_path / "empty", tmp_path / "out.npz")
    assert "out.txt" in error(run, audio, tmp_path / "out.txt")
    assert "nowhere" in error(run, tmp_path / "nowhere", tmp_path / "out.npz")
    assert "of no known format" in error(tmp_path, audio, tmp_path / "out.npz")
    (tmp_path / "there.npz").touch()
    (tmp_path / "pair.scp").touch()  # Kaldi's other half
    for out in ("there.npz", "pair.ark"):
        said = error(run, audio, tmp_path / out)
        assert "is there already; give another name, or say --overwrite" in said
    (tmp_path / "list.txt").write_text("a x.wav\na y.wav\n")
    assert "list.txt:2: a is there twice" in error(run, tmp_path / "list.txt", tmp_path / "o.npz")
    (tmp_path / "list.txt").write_text("a sox x.wav -t wav - |\n")
    assert "list.txt:1" in error(run, tmp_path / "list.txt", tmp_path / "o.npz")
    spaced = tmp_path / "spaced"
    spaced.mkdir()
    (spaced / "a b.wav").touch()
    assert "'a b.wav'" in error(run, spaced, tmp_path / "out.ark")


def test_trial_lists_share_no_speaker_and_cross_sessions(tmp_path, capsys):
    for speaker in "abcdef":
        for session in ("s1", "s2"):
            folder = tmp_path / "wav" / speaker / session
            folder.mkdir(parents=True)
            for number in range(3):
                (folder / f"{number}.wav").touch()
    (tmp_path / "wav" / "g").mkdir()
    (tmp_path / "wav" / "g" / "1.wav").touch()
    options = ["--dev=2", "--test=3", "--max_per_person=4"]
    make_trials = load("recipes/voxceleb/make_trials.py").main
    assert make_trials([str(tmp_path), str(tmp_path / "lists"), *options]) == 0
    assert "7 recordings of 2 speakers" in capsys.readouterr().out
    speakers = {}
    for part in ("dev", "test"):
        trials = read_trials(tmp_path / "lists" / f"{part}.txt")
        speakers[part] = set(trials.speaker_names())
        assert len(trials.ids) == 4 * len(speakers[part])
        assert trials.is_target.sum() == 4 * len(speakers[part])  # of 6 pairs, 4 cross sessions
        pairs = zip(trials.enrolment[trials.is_target], trials.test[trials.is_target], strict=True)
        assert all(trials.ids[a].split("/")[1] != trials.ids[b].split("/")[1] for a, b in pairs)
    assert not speakers["dev"] & speakers["test"]
    listed = {
        part: find_recordings(tmp_path / "lists" / f"{part}_recordings.txt").items
        for part in ("trial", "train")
    }
    assert all(path.is_file() for paths in listed.values() for path in paths.values())
    assert {name[0] for name in listed["trial"]} == speakers["dev"] | speakers["test"]
    assert {name[0] for name in listed["train"]} == {*"abcdefg"} - speakers["dev"] - speakers[
        "test"
    ]
    assert make_trials([str(tmp_path), str(tmp_path), "--dev=9"]) == 1
    assert "with two files or more, 6 of 7\n" in capsys.readouterr().err
    assert make_trials([str(tmp_path / "wav"), str(tmp_path)]) == 1
    assert "wav: it must hold wav/<speaker>/<session>/<utterance>" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # an abbreviation of --max_per_person
        make_trials([str(tmp_path), str(tmp_path / "none"), "--max=2"])
    assert "unrecognized arguments: --max=2" in capsys.readouterr().err
    (tmp_path / "wav" / "g" / "1 2.wav").touch()
    spaced = ["--dev=3", "--test=4"]
    assert make_trials([str(tmp_path), str(tmp_path / "spaced"), *spaced]) == 0
    ids = [read_trials(tmp_path / "spaced" / f"{part}.txt").ids for part in ("dev", "test")]
    assert "g/1 2.wav" in ids[0] + ids[1]
    (tmp_path / "wav" / "g" / "3\t4.wav").touch()
    assert make_trials([str(tmp_path), str(tmp_path)]) == 1
    assert "its name has a tab or a line break: rename it" in capsys.readouterr().err


def test_a_run_is_exported_with_its_threshold(tmp_path, capsys):
    run = speech_run(tmp_path / "run")
    points = operating_points(np.linspace(0, 1, 100), np.arange(100) >= 90)
    point = choose_operating_point("cosine", points, 0.1, kind="cosine")
    point.save(tmp_path / "point.json")
    arguments = [str(run), f"--operating_point={tmp_path / 'point.json'}"]
    assert main(["export", *arguments]) == 0
    said = capsys.readouterr()
    assert f"threshold {point.threshold:.4f}" in said.out
    assert "does not say of which encoder it is" in said.err
    assert f"threshold: {point.threshold!r}" in (run / "inference" / "hyperparams.yaml").read_text()
    (tmp_path / "point.json").write_text("{}")
    assert main(["export", *arguments]) == 1
    assert "not an operating point" in capsys.readouterr().err
