"""Rooms, noise and speeds: the published rules, repeated exactly by a resumed run."""

import logging
import zlib
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from speechbrain.augment import time_domain
from torch.utils.data import DataLoader

from speechbrain_qmargin.data import augment as module
from speechbrain_qmargin.data.audio import read_audio
from speechbrain_qmargin.data.augment import WESPEAKER_SPEEDS, room_and_noise
from speechbrain_qmargin.data.manifest import Item, Manifest
from speechbrain_qmargin.data.speech import prepare_speech
from speechbrain_qmargin.data.speech_dataset import SpeechDataset

RATE = 16000


def write(path, samples, rate=RATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, subtype="FLOAT")
    return path


def generator(*key):
    return np.random.default_rng(key)


@pytest.fixture
def folders(tmp_path):
    """A MUSAN of three constant levels, which tell the kinds apart, and one impulse response."""
    rng = generator(0)
    for kind, source in (("noise", "free-sound"), ("speech", "librivox"), ("music", "fma")):
        write(tmp_path / "musan" / kind / source / "a.wav", 0.1 * rng.standard_normal(3 * RATE))
    write(tmp_path / "RIRS_NOISES/simulated_rirs/smallroom/r/a.wav", np.r_[0, 0.5, 0.25, -0.1])
    write(tmp_path / "RIRS_NOISES/real_rirs_isotropic_noises/b.wav", np.ones((100, 2)))
    return tmp_path


@pytest.fixture
def manifest(tmp_path):
    items = []
    for speaker in "abcd":
        for number in range(3):
            name = f"{speaker}/s/{number}.wav"
            samples = 0.1 * generator(ord(speaker), number).standard_normal(RATE)
            path = write(tmp_path / "speech" / name, samples)
            items.append(Item(name, str(path), speaker, 0.0, 1.0))
    return Manifest.of(items)


LABELS = {"a": 0, "b": 1, "c": 2, "d": 3}


@pytest.mark.parametrize("kind", ["noise", "speech", "music"])
def test_the_ratio_is_in_the_range_of_its_kind(folders, kind):
    paths, kinds = module._labelled(folders / "musan")
    assert sorted(kinds) == ["music", "noise", "speech"]
    path = paths[kinds.index(kind)]
    signal = 0.1 * torch.from_numpy(generator(1).standard_normal(RATE, dtype=np.float32))
    low, high = module.SNR[kind]
    for seed in range(20):
        recording, snr = module._recorded_noise([path], [kind], RATE, generator(seed), RATE, "")
        assert snr == (low, high)
        for wanted in snr:
            added = recording * module._gain(signal, recording, wanted)
            # WeSpeaker's levels, in decibels of the mean square plus 1e-4, the noise's before it
            level = 10 * np.log10(float((signal**2).mean()) + 1e-4)
            before = 10 * np.log10(float((recording**2).mean()) + 1e-4)
            naive = np.sqrt(10 ** ((level - before - wanted) / 10)) * recording
            assert torch.allclose(added, naive.float(), rtol=1e-4)


def test_reverberation_is_the_convolution(folders):
    signal = torch.from_numpy(generator(1).standard_normal(4000, dtype=np.float32))
    rng = generator(2)
    paths = module._impulse_responses(folders / "RIRS_NOISES")
    assert len(paths) == 1  # simulated ones alone
    assert list(module._impulse_responses(folders)) == list(paths)
    recorded = module._recorded_room(paths, RATE, rng)
    for response in (recorded, torch.randn(3000), torch.randn(9000)):  # nothing wraps around
        naive = np.convolve(signal.double(), response.double() / response.double().norm())[:4000]
        found = module._reverberated(signal, response)
        np.testing.assert_allclose(found.numpy(), naive, atol=1e-5)
    assert torch.equal(module._reverberated(signal, torch.zeros(10)), signal)


@given(st.integers(1, 300_000))
def test_fft_sizes_are_large_enough_and_fast(least):
    size = module._fast_size(least)
    assert least <= size < 1.34 * least + 1
    for prime in (2, 3, 5):
        while size % prime == 0:
            size //= prime
    assert size == 1


def test_how_often_what_happens(folders, monkeypatch):
    happened = Counter()
    monkeypatch.setattr(
        module, "_reverberated", lambda x, r: happened.update(["room"]) or x.clone()
    )
    monkeypatch.setattr(module, "_gain", lambda *a: happened.update(["noise"]) or 0.0)
    augment = room_and_noise(RATE, musan=folders / "musan", rirs=folders / "RIRS_NOISES")
    signal = torch.randn(800)
    unchanged = sum(augment(signal, generator(seed), "a") is signal for seed in range(2000))
    assert unchanged == pytest.approx(800, abs=90)
    assert happened["room"] == pytest.approx(600, abs=90)
    assert happened["noise"] == pytest.approx(600, abs=90)


@pytest.mark.parametrize("recorded", [True, False])
def test_the_peak_is_one_and_nothing_is_lost(folders, manifest, recorded):
    places = {"musan": folders / "musan", "rirs": folders / "RIRS_NOISES"} if recorded else {}
    augment = room_and_noise(RATE, **places, speech=manifest, probability=1.0)
    for signal in (torch.randn(20_000), torch.zeros(20_000), torch.randn(100)):
        for seed in range(12):
            changed = augment(signal, generator(seed), "a")
            assert changed.shape == signal.shape
            assert changed.dtype == torch.float32
            assert torch.isfinite(changed).all()
            assert changed.abs().max() <= 1
            if signal.any():
                assert changed.abs().max() > 0.99


def test_synthetic_stand_ins_are_said_aloud(folders, caplog):
    with caplog.at_level(logging.WARNING):
        room_and_noise(RATE, musan=folders / "musan", rirs=folders / "RIRS_NOISES")
    assert not caplog.text
    room_and_noise(RATE)
    assert caplog.text.count("SYNTHETIC") == 2
    assert "noise_folder" in caplog.text
    assert "rir_folder" in caplog.text


def test_babble_is_of_others(manifest, monkeypatch):
    read = []
    monkeypatch.setattr(
        module, "read_audio", lambda path, *a, **k: read.append(path) or torch.ones(RATE)
    )
    augment = room_and_noise(RATE, speech=manifest, probability=1.0)
    for seed in range(60):
        augment(torch.randn(RATE), generator(seed), "a")
    assert read
    assert not any("/a/s/" in path for path in read)


def test_babble_is_a_third_of_the_noise_and_its_voices_are_equally_loud(monkeypatch):
    """Stretches from anywhere in a recording, and of a part of a file from nowhere beyond it."""
    items = [Item("a", "a.wav", "a", 0.0, 9.0), Item("b", "b.wav", "b", 2.0, 3.0, True),
             Item("c", "c.wav", "c", 4.0, 0.25, True)]  # fmt: skip
    asked = {"b.wav": [], "c.wav": []}

    def read(path, rate, start, wanted):
        asked[path].append((start, wanted))
        return torch.full((round(wanted * rate),), {"b.wav": 0.5, "c.wav": 30.0}[path])

    monkeypatch.setattr(module, "read_audio", read)
    babble = []
    for seed in range(300):
        noise, snr = module._synthetic_noise(Manifest.of(items), RATE, generator(seed), RATE, "a")
        if snr == module.SNR["speech"]:
            babble.append(noise)
    assert len(babble) == pytest.approx(100, abs=30)
    voices = torch.stack(babble) / 0.1  # each of the power 1
    assert torch.allclose(voices, voices.round(), atol=0.01)
    assert set(voices.round().unique().tolist()) <= set(range(1, 8))
    starts = [start for start, _ in asked["b.wav"]]
    assert 2 <= min(starts) < 2.1
    assert 3.9 < max(starts) <= 4
    assert {wanted for _, wanted in asked["b.wav"]} == {1.0}
    assert set(asked["c.wav"]) == {(4.0, 0.25)}


def test_noise_is_taken_from_anywhere_in_a_recording(folders, monkeypatch):
    starts, paths = [], module._labelled(folders / "musan")[0]
    monkeypatch.setattr(
        module, "read_audio", lambda path, rate, start, _: starts.append(start) or torch.ones(rate)
    )
    for seed in range(100):
        module._stretch(paths[0], generator(seed), RATE, RATE)
    assert 0 <= min(starts) < 0.1
    assert 1.9 < max(starts) <= 2  # of three seconds, one


def test_synthetic_noise_is_white_to_brown():
    slopes = []
    for seed in range(60):
        noise, snr = module._synthetic_noise(None, RATE, generator(seed), 2 * RATE, "")
        assert snr == module.SNR["noise"]
        assert float(noise.square().mean()) == pytest.approx(0.01, rel=1e-4)
        bins = np.arange(10, RATE)
        power = np.abs(np.fft.rfft(noise.numpy()))[bins] ** 2
        slopes.append(-np.polyfit(np.log(bins), np.log(power), 1)[0])
    assert -0.1 < min(slopes) < 0.3
    assert 1.7 < max(slopes) < 2.1
    assert np.mean(slopes) == pytest.approx(1, abs=0.25)


def test_synthetic_rooms_decay_by_60_db_behind_the_direct_sound():
    for seed in range(30):
        room = module._synthetic_room(RATE, generator(seed)).double().numpy()
        assert 0.1 * RATE - 1 <= len(room) <= 0.8 * RATE
        assert room[0] == 1
        assert not room[1:32].any()  # two milliseconds
        assert -0.01 <= -10 * np.log10(np.square(room[1:]).sum()) <= 15.01
        level = 10 * np.log10(np.square(room[32:]) + 1e-30)
        decay = np.polyfit(np.arange(32, len(room)) / len(room), level, 1)[0]
        assert decay == pytest.approx(-60, abs=4)


def test_folders_that_are_not_there_and_files_that_are_broken(folders, tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match=r"noise_folder: .*gone"):
        room_and_noise(RATE, musan=tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="rir_folder: no audio"):
        room_and_noise(RATE, rirs=tmp_path / "empty")
    with pytest.raises(ValueError, match="probability"):
        room_and_noise(RATE, probability=2)
    (folders / "musan/noise/free-sound/broken.wav").write_bytes(b"none")
    augment = room_and_noise(RATE, musan=folders / "musan", probability=1.0)
    for seed in range(20):
        augment(torch.randn(RATE), generator(seed), "a")
    assert "broken.wav" in caplog.text


def test_a_file_that_cannot_be_read_is_said_once_and_a_folder_of_them_ends_the_run(
    folders, tmp_path, caplog
):
    broken = folders / "musan/noise/free-sound/said_once.wav"
    broken.write_bytes(b"none")
    augment = room_and_noise(RATE, musan=folders / "musan", probability=1.0)
    for seed in range(60):
        augment(torch.randn(RATE), generator(seed), "a")
    assert caplog.text.count("said_once.wav") == 1
    (tmp_path / "none").mkdir()
    (tmp_path / "none/a.wav").write_bytes(b"none")
    augment = room_and_noise(RATE, musan=tmp_path / "none", rirs=tmp_path / "none", probability=1.0)
    with pytest.raises(OSError, match=r"none/a\.wav: .* look at noise_folder and rir_folder"):
        augment(torch.randn(RATE), generator(0), "a")


def test_noise_in_m4a_is_used_as_any_other(tmp_path, caplog):
    pytest.importorskip("av", reason="m4a needs the extra voxceleb (PyAV)")
    from voxceleb_tree import write_m4a

    (tmp_path / "noise").mkdir()
    write_m4a(tmp_path / "noise/hum.m4a", 0.3 * np.sin(0.1 * np.arange(3 * RATE)))
    room, noise = tmp_path / "rooms", tmp_path / "noise"
    write(room / "a.wav", np.r_[1.0, 0.0])
    augment = room_and_noise(RATE, musan=noise, rirs=room, probability=1.0)
    silence = torch.zeros(RATE)
    found = [augment(silence, generator(seed), "a") for seed in range(8)]
    assert any(signal.abs().max() > 0 for signal in found)
    assert "cannot be decoded" not in caplog.text


def test_recordings_at_another_rate(folders):
    write(folders / "slow/a.wav", np.ones(4000), 8000)
    augment = room_and_noise(RATE, musan=folders / "slow", rirs=folders / "slow", probability=1.0)
    for seed in range(6):
        assert augment(torch.randn(RATE), generator(seed), "a").shape == (RATE,)


def test_speed_changes_pitch_and_keeps_the_length(tmp_path):
    time = np.arange(4 * RATE) / RATE
    path = write(tmp_path / "tone.wav", 0.5 * np.sin(2 * np.pi * 1000 * time))
    for speed in WESPEAKER_SPEEDS:
        crop = read_audio(path, RATE, 0.5, 2.0, speed)
        assert crop.shape == (2 * RATE,)
        peak = torch.fft.rfft(crop * torch.hann_window(2 * RATE)).abs().argmax() / 2
        assert float(peak) == pytest.approx(1000 * speed, abs=0.6)
        assert len(read_audio(path, RATE, speed=speed)) == pytest.approx(4 * RATE / speed, abs=1)


def test_a_speaker_at_another_speed_is_another_speaker(manifest):
    clock = {"epoch": 0}
    data = SpeechDataset(
        manifest,
        RATE,
        crop=0.4,
        labels=LABELS,
        speeds=WESPEAKER_SPEEDS,
        epoch=lambda: clock["epoch"],
    )
    seen = Counter()
    for clock["epoch"] in range(100):
        for index, item in enumerate(manifest):
            label = data.label(index)
            assert label % 4 == LABELS[item.label], item.id
            seen[label // 4] += 1
    assert set(seen) == {0, 1, 2}
    assert min(seen.values()) > 330

    # the label's speed is that of the samples
    clock["epoch"] = 0
    for index, item in enumerate(manifest):
        found = data[index]
        speed = WESPEAKER_SPEEDS[int(found["spk_id_encoded"]) // 4]
        rng = np.random.default_rng([0, 0, zlib.crc32(found["id"].encode()), 0])
        start = rng.uniform(0, 1.0 - 0.4 * speed)
        assert torch.equal(found["sig"], read_audio(item.file, RATE, start, 0.4, speed))
    with pytest.raises(ValueError, match=r"must begin with 1\.0"):
        SpeechDataset(manifest, RATE, speeds=(0.9, 1.0))


def test_items_do_not_depend_on_workers_order_or_what_came_before(manifest, folders):
    def loaded(order, workers, epoch=3, seed=5):
        data = SpeechDataset(
            manifest,
            RATE,
            crop=0.3,
            labels=LABELS,
            seed=seed,
            epoch=lambda: epoch,
            speeds=WESPEAKER_SPEEDS,
            augment=room_and_noise(RATE, musan=folders / "musan", speech=manifest),
        )
        loader = DataLoader(data, sampler=order, batch_size=None, num_workers=workers)
        return {item["id"]: (item["sig"], int(item["spk_id_encoded"])) for item in loader}

    def same(one, other):
        return [torch.equal(one[k][0], other[k][0]) and one[k][1] == other[k][1] for k in one]

    order = list(range(12))
    first = loaded(order, 0)
    assert all(same(loaded(order[::-1], 2), first))
    assert all(same(loaded(order[7:], 1), first))
    assert sum(same(loaded(order, 0, epoch=4), first)) < 3
    assert sum(same(loaded(order, 0, seed=6), first)) < 3


def test_short_recordings_are_repeated_at_any_speed(manifest):
    data = SpeechDataset(manifest, RATE, crop=2.5, speeds=WESPEAKER_SPEEDS)
    assert all(data[index]["sig"].shape == (2.5 * RATE,) for index in range(len(data)))


def test_prepared_corpus_through_it_all(tmp_path, manifest):
    (tmp_path / "speech").rename(tmp_path / "wav")
    found = prepare_speech(tmp_path, tmp_path / "save", progress=False)
    data = SpeechDataset(
        found.train, RATE, crop=0.5, augment=room_and_noise(RATE, speech=found.train)
    )
    assert torch.stack([data[i]["sig"] for i in range(12)]).shape == (12, RATE // 2)


@pytest.mark.parametrize(
    "options",
    [
        {"drop_length_high": 2000},
        {"drop_count_low": 0, "drop_count_high": 9, "drop_start": 100, "drop_end": 1800},
        {"drop_length_high": 300, "drop_start": -900, "drop_end": -100},
    ],
)
@pytest.mark.parametrize("shape", [(5, 2400), (3, 2000, 2)])
def test_chunks_are_dropped_where_speechbrain_drops_them(options, shape):
    lengths = torch.tensor([1.0, 0.9, 1.0, 0.5, 1.0])[: shape[0]]
    signal = torch.randn(shape)
    found = []
    for made in (module.DropChunk, time_domain.DropChunk):
        torch.manual_seed(3)
        found.append((made(**options)(signal, lengths), torch.rand(3)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])  # as many numbers were drawn
    assert not torch.equal(found[0][0], signal)
