"""Preparation of a folder in VoxCeleb layout."""

import logging

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_qmargin.data.audio import read_audio
from speechbrain_qmargin.data.classes import class_encoder
from speechbrain_qmargin.data.speech import prepare_speech
from speechbrain_qmargin.data.speech_dataset import SpeechDataset

RATE = 16000


def write(path, seconds=0.5, rate=RATE, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * rate))
    soundfile.write(path, samples, rate)


@pytest.fixture
def corpus(tmp_path):
    """Four speakers a..d with three utterances each, and a trial list over c and d."""
    for index, speaker in enumerate("abcd"):
        for utterance in range(3):
            write(
                tmp_path / "wav" / speaker / "s0" / f"{utterance}.flac",
                0.4 + 0.1 * index,
                seed=index,
            )
    (tmp_path / "trials.txt").write_text("1 c/s0/0.flac c/s0/1.flac\n0 c/s0/0.flac d/s0/0.flac\n")
    return tmp_path


def duration(manifest, name="a/s0/0.flac"):
    return manifest[manifest.row(name)].duration


def prepare(folder, **kwargs):
    kwargs.setdefault("verification_file", folder / "trials.txt")
    return prepare_speech(folder, folder / "save", progress=False, **kwargs)


def test_trial_speakers_are_never_trained_on(corpus):
    found = prepare(corpus)
    assert found.speakers == ["a", "b"]
    assert set(found.test.ids) == {"c/s0/0.flac", "c/s0/1.flac", "d/s0/0.flac"}
    assert duration(found.train) == pytest.approx(0.4)
    assert len(found.valid) == 0
    assert found.valid_trials is None


def test_a_list_written_for_wav_fits_a_folder_of_flac(corpus):
    text = (corpus / "trials.txt").read_text().replace(".flac", ".wav")
    (corpus / "trials.txt").write_text(text)
    found = prepare(corpus)
    assert "c/s0/0.flac" in found.test.ids
    assert not any(name.endswith(".wav") for name in found.test_trials["trials"].ids)


def test_held_out_speakers_make_the_validation_pairs(corpus):
    write(corpus / "wav" / "e" / "s0" / "0.flac")
    write(corpus / "wav" / "e" / "s0" / "1.flac")
    for utterance in "01":
        write(corpus / "wav" / "f" / "s0" / f"{utterance}.flac")
    found = prepare(corpus, num_valid_speakers=2)
    held_out = {"a", "b", "e", "f"} - set(found.speakers)
    assert len(held_out) == 2
    assert {name[0] for name in found.valid.ids} == held_out == set(found.valid.classes)
    trials = found.valid_trials
    count = len(found.valid)
    assert len(trials) == count * (count - 1) // 2
    first = np.array([name[0] for name in trials.ids])
    assert (trials.is_target == (first[trials.enrolment] == first[trials.test])).all()
    with pytest.raises(ValueError, match="1 speaker has no impostor trials"):
        prepare(corpus, num_valid_speakers=1)
    few = r"0 speakers left .* Of 6 the trials hold out 2, validation 4 \(num_valid_speakers\)"
    with pytest.raises(ValueError, match=few):
        prepare(corpus, num_valid_speakers=40)


def test_broken_audio_is_named_and_left_out(corpus, caplog):
    (corpus / "wav/a/s0/empty.wav").touch()
    (corpus / "wav/a/s0/text.flac").write_text("no audio")
    whole = (corpus / "wav/b/s0/0.flac").read_bytes()
    (corpus / "wav/b/s0/cut.flac").write_bytes(whole[: len(whole) // 2])
    soundfile.write(corpus / "wav/b/s0/zero.wav", np.zeros(0), RATE)
    with caplog.at_level(logging.WARNING):
        found = prepare(corpus)
    skipped = (corpus / "save/skipped_audio.txt").read_text()
    for name in ("a/s0/empty.wav", "a/s0/text.flac", "b/s0/cut.flac", "b/s0/zero.wav"):
        assert name in skipped
        assert name not in found.train.ids
    assert "4 audio files are left out" in caplog.text
    table = corpus / "train.csv"  # of files that are elsewhere
    table.write_text("ID,wav,spk_id\nu1,gone/1.wav,a\nu2,gone/2.wav,b\n")
    with pytest.raises(OSError, match=r"train\.csv: none of its 2 recordings .* the first is u1: "):
        prepare_speech(table, corpus / "save", verification_file=corpus / "trials.txt")


def test_speaker_with_one_utterance_is_named_and_left_out(corpus, caplog):
    write(corpus / "wav" / "lonely" / "s0" / "0.wav")
    found = prepare(corpus)
    assert "lonely" not in found.speakers
    assert "lonely" in caplog.text
    assert "lonely" in prepare(corpus, min_utterances=1).speakers


def test_the_scan_follows_the_files_not_their_names(corpus):
    assert duration(prepare(corpus).train) == pytest.approx(0.4)
    write(corpus / "wav/a/s0/0.flac", 0.9)
    assert duration(prepare(corpus).train) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 c/s0/0.flac gone/s0/9.flac\n", r"gone/s0/9\.flac \(line 3\)"),
        ("2 c/s0/0.flac c/s0/1.flac\n", r"trials\.txt:3: .* expected"),
        ("1 c/s0/0.flac\n", r"trials\.txt:3: expected"),
        ("1 c/s0/2.flac d/s0/0.flac\n", r"c/s0/2\.flac d/s0/0\.flac is a target trial of two"),
    ],
)
def test_bad_trials_are_named(corpus, line, message):
    with (corpus / "trials.txt").open("a") as file:
        file.write(line)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(corpus)


def test_trial_of_a_broken_file_is_named(corpus):
    (corpus / "wav/d/s0/0.flac").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"unreadable .*d/s0/0\.flac"):
        prepare(corpus)


def test_missing_folder_and_missing_list(tmp_path, corpus):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        prepare_speech(tmp_path / "nowhere", tmp_path / "save")
    with pytest.raises(FileNotFoundError, match=r"gone\.txt"):
        prepare(corpus, verification_file=corpus / "gone.txt")
    for setting in ("verification_file", "valid_file", "train_speakers", "enrolment_file"):
        lists = {"verification_file": corpus / "gone.txt", setting: tmp_path}
        if setting != "verification_file":
            lists["verification_file"] = None
        with pytest.raises(IsADirectoryError, match=f"^{setting}: .* is a folder; give the file"):
            prepare(corpus, **lists)
    (tmp_path / "bare" / "wav").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no \.wav"):
        prepare_speech(tmp_path / "bare", tmp_path / "save2")


def test_training_list(corpus):
    names = corpus / "train_speakers.txt"
    names.write_text("a\nb\nc\n")
    with pytest.raises(ValueError, match="c also appear in a trial list"):
        prepare(corpus, train_speakers=names)
    names.write_text("a\nnobody\n")
    with pytest.raises(ValueError, match="nobody"):
        prepare(corpus, train_speakers=names)
    names.write_text("a\n")
    with pytest.raises(ValueError, match="1 speakers left"):
        prepare(corpus, train_speakers=names)


def test_crops_depend_on_seed_epoch_and_utterance_only(corpus):
    found = prepare(corpus)
    clock = {"epoch": 1}

    def crops(seed=0):
        data = SpeechDataset(found.train, RATE, crop=0.2, seed=seed, epoch=lambda: clock["epoch"])
        return torch.stack([data[i]["sig"] for i in range(len(data))])

    first = crops()
    assert first.shape == (6, 3200)
    assert torch.equal(first, crops())
    assert not torch.equal(first, crops(seed=1))
    clock["epoch"] = 2
    assert not torch.equal(first, crops())


def test_short_recordings_are_repeated(corpus):
    found = prepare(corpus)
    whole = SpeechDataset(found.train, RATE)[0]["sig"]
    crop = SpeechDataset(found.train, RATE, crop=1.0)[0]["sig"]
    assert crop.shape == (RATE,)
    assert torch.equal(crop, whole.repeat(3)[:RATE])


def test_read_audio(tmp_path):
    ramp = np.linspace(-0.5, 0.5, RATE, dtype=np.float32)
    soundfile.write(tmp_path / "mono.wav", ramp, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "stereo.wav", np.stack([ramp, -ramp], 1), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "slow.wav", ramp[::2], RATE // 2, subtype="FLOAT")
    assert torch.equal(read_audio(tmp_path / "mono.wav", RATE), torch.from_numpy(ramp))
    part = read_audio(tmp_path / "mono.wav", RATE, start=0.25, length=0.5)
    assert torch.equal(part, torch.from_numpy(ramp[4000:12000]))
    assert read_audio(tmp_path / "stereo.wav", RATE).abs().max() == 0
    assert read_audio(tmp_path / "slow.wav", RATE).shape == (RATE,)
    (tmp_path / "bad.wav").write_text("nothing")
    with pytest.raises(OSError, match=r"bad\.wav: cannot be decoded"):
        read_audio(tmp_path / "bad.wav", RATE)


def test_an_unreadable_crop_is_another_utterance_of_its_speaker(corpus, caplog):
    paths = [corpus / "wav/b/s0" / f"{n}.flac" for n in range(3)]
    for number, path in enumerate(paths):
        write(path, 0.5, seed=10 + number)
    found = prepare(corpus)
    encoder = class_encoder(found.speakers, corpus / "save/label_encoder.txt")
    clock = {"epoch": 1}

    def data(crop=0.2, speeds=(1.0, 0.9, 1.1)):
        return SpeechDataset(
            found.train,
            RATE,
            crop=crop,
            labels=encoder.lab2ind,
            epoch=lambda: clock["epoch"],
            speeds=speeds,
        )

    whole = data()
    before = [whole[i] for i in range(6)]
    paths[0].write_bytes(b"")
    damaged, again = data(), data()
    for i, old in enumerate(before):
        new = damaged[i]
        assert (new["id"], new["spk_id_encoded"]) == (old["id"], old["spk_id_encoded"])
        assert torch.equal(new["sig"], old["sig"]) == (i != 3)
    others = [read_audio(path, RATE).unfold(0, 3200, 1) for path in paths[1:]]
    chosen, plain = set(), data(speeds=(1.0,))
    for clock["epoch"] in range(1, 9):
        assert torch.equal(damaged[3]["sig"], again[3]["sig"])
        taken = plain[3]["sig"]
        chosen |= {n for n, windows in enumerate(others) if (windows == taken).all(1).any()}
    assert chosen == {0, 1}
    assert caplog.text.count("b/s0/0.flac: cannot be decoded") == 3  # once a dataset
    assert "another utterance of b is taken instead" in caplog.text
    with pytest.raises(OSError, match=r"0\.flac: cannot be decoded"):
        data(crop=None)[3]
    for path in paths[1:]:
        path.write_bytes(b"")
    with pytest.raises(OSError, match=r"\.flac: cannot .* 3 utterances of b were tried"):
        data()[3]


def test_the_encoder_is_kept_and_a_change_of_speakers_is_refused(corpus):
    found = prepare(corpus)
    first = class_encoder(found.speakers, corpus / "save/label_encoder.txt")
    assert first.lab2ind == {"a": 0, "b": 1}
    again = class_encoder(found.speakers, corpus / "save/label_encoder.txt")
    assert again.lab2ind == first.lab2ind
    assert [path.name for path in (corpus / "save").glob("*label*")] == ["label_encoder.txt"]
    for utterance in "01":
        write(corpus / "wav/new/s0" / f"{utterance}.wav")
    with pytest.raises(ValueError, match=r"classes have changed .*new"):
        class_encoder(prepare(corpus).speakers, corpus / "save/label_encoder.txt")


def kaldi(folder, recordings):
    """A folder of Kaldi's: from id to (file, speaker)."""
    folder.mkdir(parents=True)
    (folder / "wav.scp").write_text("".join(f"{k} {file}\n" for k, (file, _) in recordings.items()))
    (folder / "utt2spk").write_text("".join(f"{k} {who}\n" for k, (_, who) in recordings.items()))
    return folder


@pytest.mark.parametrize("other", ["longer.flac of b", "copy.flac of b", "longer.flac of a"])
def test_one_id_for_two_recordings_is_refused_and_a_copy_is_used_once(corpus, caplog, other):
    own, copy = corpus / "wav/a/s0/0.flac", corpus / "copy.flac"
    copy.write_bytes(own.read_bytes())
    write(corpus / "longer.flac", 0.8)
    file, speaker = other.split(" of ")
    first = kaldi(corpus / "1", {"utt1": (own, "a")})
    again = kaldi(corpus / "2", {"utt1": (copy, "a"), "utt2": (copy, "a")})
    wrong = kaldi(corpus / "3", {"utt1": (corpus / file, speaker)})

    def prepared(*sources):
        trials = corpus / "trials.txt"
        return prepare_speech(sources, corpus / "save", verification_file=trials, progress=False)

    found = prepared(corpus, first, again)
    assert list(found.train.ids[-2:]) == ["utt1", "utt2"]
    assert found.train[found.train.row("utt1")].file == str(own)
    assert f"1 recordings are there twice, used once: {copy} is {own} again" in caplog.text
    with pytest.raises(ValueError, match=r"utt1 is the id of two recordings: .*0\.flac, 0\.40 s"):
        prepared(corpus, first, wrong)


def test_a_stretch_of_another_place_in_the_same_file_is_another_recording(corpus):
    for name, start in (("1", 0.0), ("2", 0.2), ("3", 0.0)):
        folder = kaldi(corpus / name, {"utt1": (corpus / "wav/a/s0/0.flac", "a")})
        (folder / "segments").write_text(f"utt1 utt1 {start} {start + 0.1}\n")
    trials = {"verification_file": corpus / "trials.txt", "progress": False}
    found = prepare_speech([corpus, corpus / "1", corpus / "3"], corpus / "save", **trials)
    assert len(found.train) == 7
    (corpus / "2/segments").write_text("utt1 utt1 0.3 0.4\n")
    with pytest.raises(ValueError, match="utt1 is the id of two recordings"):
        prepare_speech([corpus, corpus / "1", corpus / "2"], corpus / "save", **trials)


def test_speakers_of_one_name_in_two_sources_are_said(corpus, caplog):
    more = corpus / "far/away"
    write(more / "wav/a/s1/0.flac")
    write(more / "wav/e/s1/0.flac")
    found = prepare_speech(
        [corpus, more],
        corpus / "save",
        verification_file=corpus / "trials.txt",
        min_utterances=1,
        progress=False,
    )
    assert found.speakers == ["a", "b", "e"]
    assert f"1 speakers of {more} are in another source too, as a in {corpus}" in caplog.text
    caplog.clear()
    prepare(corpus, trials_folder=corpus)
    assert "another source" not in caplog.text


def test_the_time_for_sources_grows_with_their_recordings_alone(corpus, monkeypatch):
    from speechbrain_qmargin.data import speech as module

    asked = []
    stem = module._stem
    monkeypatch.setattr(module, "_stem", lambda name: asked.append(name) or stem(name))
    sources = [
        kaldi(corpus / f"k{n}", {f"{n}-{m}": (corpus / "wav/a/s0/0.flac", f"{n}") for m in (1, 2)})
        for n in range(9)
    ]
    manifest, _ = module._read(sources, [], None, False)
    assert len(manifest) == len(asked) == 18


def test_stretches_of_a_recording_of_hours_are_tested_on(corpus):
    hours = corpus / "hours.wav"
    noise = np.random.default_rng(0).integers(-1000, 1000, 3700 * 1000).astype(np.int16)
    soundfile.write(hours, noise, 1000)
    folder = kaldi(corpus / "kaldi", {"hours": (hours, "c")})
    (folder / "segments").write_text("c-1 hours 3600 3601\nc-2 hours 3690.5 3691\nd-1 hours 5 6\n")
    (folder / "utt2spk").write_text("c-1 c\nc-2 c\nd-1 d\n")
    (corpus / "trials.txt").write_text("1 c-1 c-2\n0 c-1 d-1\n")
    found = prepare(corpus, trials_folder=folder)
    whole = SpeechDataset(found.test, 1000)
    assert torch.equal(whole[0]["sig"], torch.from_numpy(noise[3600_000:3601_000] / 2**15).float())
    (folder / "segments").unlink()
    (folder / "wav.scp").write_text(f"c-1 {hours}\nc-2 {hours}\nd-1 {hours}\n")
    with pytest.raises(OSError, match=r"hours\.wav: lasts 1\.0 h .* too much to be taken in one"):
        prepare(corpus, trials_folder=folder)


def test_a_missing_recording_is_named_with_its_line_whatever_separates_the_columns(corpus):
    for line in ("1 c/s0/0 c/s0/9", "1\tc/s0/0\tc/s0/9", "1,c/s0/0,c/s0/9"):
        (corpus / "trials.txt").write_text(line.replace("9", "1") + f"\n{line}\n")
        with pytest.raises(FileNotFoundError, match=r"1 are not found \(c/s0/9 \(line 2\)\)"):
            prepare(corpus)
    models = corpus / "models.txt"
    models.write_text("m c/s0/0 c/s0/9\n")
    (corpus / "trials.txt").write_text("1 m c/s0/1\n0 m d/s0/1\n")
    with pytest.raises(FileNotFoundError, match=r"not found \(c/s0/9 \(of a model\)\)"):
        prepare(corpus, enrolment_file=models)


def test_a_segment_that_goes_to_the_end_lasts_as_long_as_its_file(corpus):
    folder = kaldi(corpus / "kaldi", {"utt1": (corpus / "wav/b/s0/0.flac", "b")})
    (folder / "segments").write_text("utt1 utt1 0.125 -1\n")
    trials = {"verification_file": corpus / "trials.txt", "progress": False}
    found = prepare_speech([corpus, folder], corpus / "save", **trials).train
    assert found[found.row("utt1")][3:] == (0.125, 0.375, True)


def test_other_training_recordings_in_a_run_that_goes_on_are_said(corpus, caplog):
    prepare(corpus)
    moved = corpus.rename(corpus.with_name("moved"))
    prepare(moved)
    assert "have changed" not in caplog.text
    write(moved / "wav/a/s0/3.flac", 0.4)
    prepare(moved)
    assert (
        "have changed since the last start in this folder (6 of 2 speakers then, 7 of 2 now)"
        in (caplog.text)
    )
    caplog.clear()
    write(moved / "wav/a/s0/3.flac", 0.6)  # the same name, another recording
    prepare(moved)
    assert "(7 of 2 speakers then, 7 of 2 now)" in caplog.text
    caplog.clear()
    prepare(moved)
    assert "have changed" not in caplog.text
