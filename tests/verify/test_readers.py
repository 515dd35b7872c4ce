"""What is read, in which pieces, and what is refused: nobody speaks, or nothing can be heard."""

import io
import math
from dataclasses import fields
from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from hyperpyyaml import load_hyperpyyaml
from published_layouts import ECAPA_YAML, randomised, save
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN

from speechbrain_qmargin.data.audio import read_audio
from speechbrain_qmargin.export.encoder import SpeakerEncoder
from speechbrain_qmargin.synthetic.faces import draw_face
from speechbrain_qmargin.verify.face_quality import FaceLimits, measure_face
from speechbrain_qmargin.verify.readers import FaceReader, SpeechReader, Unfit
from speechbrain_qmargin.verify.speech_quality import (
    SpeechLimits,
    SpeechQuality,
    measure_speech,
    summarised,
)
from speechbrain_qmargin.verify.verifier import Verifier, load_reader, people_file, place_of

RATE, SAMPLES = 16000, 48000
TIME = np.arange(SAMPLES) / RATE
NOISE = np.random.default_rng(0).standard_normal(SAMPLES)
GATE = np.floor(TIME / 0.25) % 2 == 0
SWELL = (0.5 + 0.5 * np.sin(2 * np.pi * 4 * TIME)) ** 3  # as often as syllables


def coloured(slope):
    spectrum = np.fft.rfft(NOISE)
    bins = np.maximum(np.arange(len(spectrum)), 1)
    noise = np.fft.irfft(spectrum * bins**-slope, SAMPLES)
    return noise / noise.std()


def tone(hertz):
    return np.sin(2 * np.pi * hertz * TIME)


NO_SPEECH = {
    "white": 0.1 * NOISE,
    "pink": 0.1 * coloured(0.5),
    "brown": 0.1 * coloured(1.0),
    "hum": 0.1 * np.sign(tone(50)) + 0.001 * NOISE,
    "tone": 0.3 * tone(440),
    "low tone": 0.3 * tone(150) + 0.003 * NOISE,
    "engaged": 0.3 * tone(425) * GATE + 0.0005 * NOISE,
    "buzzer": 0.3 * np.sign(tone(120)) * GATE + 0.0005 * NOISE,
    "swelling white": 0.1 * NOISE * SWELL + 0.0003 * NOISE,
    "swelling pink": 0.1 * coloured(0.5) * SWELL,
    "swelling brown": 0.1 * coloured(1.0) * SWELL,
    "gated brown": 0.1 * coloured(1.0) * GATE,
    "clicks": np.where(np.arange(SAMPLES) % 4000 == 0, 0.9, 0) + 0.0001 * NOISE,
    "sweep": 0.3 * np.sin(2 * np.pi * np.cumsum(100 + 1000 * TIME) / RATE),
}


@pytest.mark.parametrize("kind", NO_SPEECH)
@pytest.mark.parametrize("level", [1.0, 0.1])
def test_what_is_no_speech_is_refused(kind, level):
    faults = SpeechLimits().faults(measure_speech(level * NO_SPEECH[kind], RATE))
    assert any(fault.startswith(("no speech", "too quiet")) for fault in faults), faults


def test_voices_are_speech(voices):
    limits = SpeechLimits()
    for files in voices.values():
        for file in files:
            signal = read_audio(file, RATE).numpy()
            for change in (1.0, 0.3, -1.0):
                found = measure_speech(change * signal, RATE)
                assert limits.faults(found) == (), (file, found)


def test_measures_naively(voices):
    signal = read_audio(voices["mv20001"][0], RATE).numpy().astype(np.float64)
    found = measure_speech(signal, RATE)
    signal = signal - signal.mean()
    frames = [signal[n : n + 512] for n in range(0, len(signal) - 511, 256)]
    levels = np.array([10 * math.log10(np.mean(frame**2) + 1e-10) for frame in frames])
    low, high = np.percentile(levels, (10, 90))
    assert found.modulation == pytest.approx(high - low, abs=1e-3)
    active = [frame for frame, x in zip(frames, levels, strict=True)
              if x > np.percentile(levels, 95) - 30]  # fmt: skip
    assert found.active_seconds == pytest.approx(len(active) * 0.016)
    assert found.level == pytest.approx(10 * math.log10(np.mean(np.square(active))), abs=1e-3)
    window, voiced = np.hanning(512), 0
    own = [window[: 512 - lag] @ window[lag:] for lag in range(268)]
    sharp = np.append(signal[:1], signal[1:] - 0.97 * signal[:-1])
    for n, level in zip(range(0, len(signal) - 511, 256), levels, strict=True):
        if level <= np.percentile(levels, 95) - 30:
            continue
        shaped = sharp[n : n + 512] * window
        relative = [shaped[: 512 - lag] @ shaped[lag:] / own[lag] * own[0] for lag in range(268)]
        voiced += max(relative[40:268]) > 0.4 * relative[0]
    assert found.voiced == pytest.approx(voiced / len(active), abs=0.02)
    assert found.seconds == len(signal) / RATE


def test_clipping_is_the_share_of_cut_samples(voices):
    signal = read_audio(voices["mv20001"][0], RATE).numpy()
    signal = signal / np.abs(signal).max()
    assert measure_speech(0.5 * signal, RATE).clipped == 0
    cut = np.clip(8 * signal, -1, 1)
    share = measure_speech(0.7 * cut, RATE).clipped
    runs = [len(list(run)) for value, run in groupby(cut.tolist()) if abs(value) == 1]
    assert share == pytest.approx(sum(run for run in runs if run >= 3) / len(cut), rel=0.01)
    (fault,) = SpeechLimits().faults(measure_speech(0.7 * cut, RATE))
    assert fault.startswith("clipped: ")
    assert "lower the microphone" in fault


@pytest.mark.parametrize(
    ("samples", "fault"),
    [
        (NOISE[:80], "too short: 0.005 s, at least 0.5 s"),
        (np.zeros(SAMPLES), "silent: all its samples are equal"),
        (np.full(SAMPLES, 0.5), "silent: all its samples are equal"),
        (1e-4 * NOISE, "too quiet: -80 dB below full scale, at least -60 dB"),
    ],
)
def test_what_cannot_be_heard_is_refused(tmp_path, encoder, samples, fault):
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    with pytest.raises(Unfit, match=rf"a\.wav: {fault}") as raised:
        SpeechReader(encoder).read(tmp_path / "a.wav")
    assert raised.value.faults == raised.value.quality.faults or "short" in fault


# ---------------------------------------------------------------- speech


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    yaml = """
compute_features: !new:speechbrain.lobes.features.Fbank {n_mels: 20}
mean_var_norm: !new:speechbrain.processing.features.InputNormalization {norm_type: sentence}
embedding_model: !new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN
    input_size: 20
    channels: [8, 8, 8, 8, 24]
    attention_channels: 8
    lin_neurons: 16
"""
    return SpeakerEncoder(load_hyperpyyaml(yaml), definition="tiny")


def content_of(samples, kind="FLAC", rate=RATE):
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=kind)
    return stream.getvalue()


def test_two_files_of_white_noise_are_not_accepted(encoder):
    reader = SpeechReader(encoder)
    files = [content_of(0.1 * np.roll(NOISE, shift)) for shift in (0, 777)]
    for file in files:
        with pytest.raises(Unfit, match="the content: no speech: its level is steady"):
            reader.read(file)
    unchecked = SpeechReader(encoder, checked=False)  # what an encoder says of them
    one, two = unchecked.embed([unchecked.read(file) for file in files])
    assert one @ two / np.linalg.norm(one) / np.linalg.norm(two) > 0.99


def test_a_short_recording_is_embedded_as_ever(encoder, voices):
    reader, file = SpeechReader(encoder), voices["mv20001"][0]
    with torch.inference_mode():
        expected = encoder(read_audio(file, RATE)[None])[0].numpy()
    for source in (file, str(file), file.read_bytes()):
        sample = reader.read(source)
        np.testing.assert_array_equal(reader.embed([sample])[0], expected)
    assert sample.quality == measure_speech(read_audio(file, RATE).numpy(), RATE)


def test_a_long_one_is_read_in_windows_of_one_length(encoder, voices, tmp_path):
    signals = [read_audio(file, RATE).numpy() for file in voices["mv20001"] + voices["mv20002"]]
    whole = np.concatenate(signals)
    soundfile.write(tmp_path / "long.flac", whole, RATE)
    reader = SpeechReader(encoder, window=6.0)
    sample = reader.read(tmp_path / "long.flac")
    count = math.ceil(len(whole) / RATE / 6)
    assert len(sample.inputs) == count > 2
    assert sum(map(len, sample.inputs)) == pytest.approx(len(whole), abs=count)
    assert max(map(len, sample.inputs)) <= 6 * RATE
    assert len({len(one) for one in sample.inputs}) <= 2  # rounding
    with torch.inference_mode():
        each = [encoder(one[None])[0].numpy() for one in sample.inputs]
    np.testing.assert_allclose(reader.embed([sample])[0], np.mean(each, axis=0), rtol=1e-6)
    assert sample.quality.seconds == len(whole) / RATE


def test_windows_without_speech_are_left_out(encoder, voices, tmp_path):
    voice = np.concatenate([read_audio(file, RATE).numpy() for file in voices["mv20001"]])[:96000]
    noise = 0.02 * np.random.default_rng(1).standard_normal(96000)
    soundfile.write(tmp_path / "mixed.wav", np.concatenate([noise, voice, noise]), RATE)
    reader = SpeechReader(encoder, window=6.0)
    sample = reader.read(tmp_path / "mixed.wav")
    assert len(sample.inputs) == 1
    np.testing.assert_allclose(sample.inputs[0], voice, atol=1e-4)
    soundfile.write(tmp_path / "noise.wav", np.concatenate([noise] * 3), RATE)
    with pytest.raises(Unfit, match=r"noise\.wav: no speech"):
        reader.read(tmp_path / "noise.wav")


def test_the_longest_is_refused_before_it_is_read(encoder, tmp_path):
    soundfile.write(tmp_path / "a.wav", NOISE, RATE)
    with pytest.raises(Unfit, match="too long: 3 s, at most 2 s"):
        SpeechReader(encoder, SpeechLimits(max_seconds=2)).read(tmp_path / "a.wav")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "the content is empty"),
        (b"MZ no audio", "the content is not wav, flac, ogg, opus, mp3 or m4a"),
        (b"RIFF....WAVEfmt ", "the content: empty, truncated or not audio"),
        (content_of(NOISE)[:-900], "truncated"),
        (content_of(NOISE, "WAV")[:-900], "the content: truncated"),
    ],
)
def test_what_cannot_be_decoded_is_an_os_error_without_a_path(encoder, content, fault):
    with pytest.raises(OSError, match=fault) as raised:
        SpeechReader(encoder).read(content)
    assert "qmargin-" not in str(raised.value)


def test_a_file_that_is_not_there(encoder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nobody\.wav: no such file"):
        SpeechReader(encoder).read(tmp_path / "nobody.wav")


def test_stretches_are_summed_up_by_what_is_active():
    one = SpeechQuality(2.0, 1.0, -20.0, 0.0, 10.0, 0.5, 6.0)
    two = SpeechQuality(4.0, 3.0, -math.inf, 0.1, 20.0, 0.9, 8.0)
    found = summarised([one, two])
    assert (found.seconds, found.active_seconds) == (6.0, 4.0)
    assert found.voiced == pytest.approx(0.8)
    assert found.level == pytest.approx(-20 + 10 * math.log10(0.25))
    silent = SpeechQuality(1.0, 0.0, -math.inf, 0.0, 0.0, 0.0, 0.0)
    assert summarised([silent]) == silent
    names = {field.name for field in fields(SpeechQuality)} - {"faults"}
    assert names <= {field.name for field in fields(SpeechLimits)}


# ---------------------------------------------------------------- faces


class Mean(torch.nn.Module):
    """Enough of a face encoder."""

    image_size, device = 32, torch.device("cpu")

    def digest(self):
        return "m" * 64

    def forward(self, images):
        return images.flatten(1)[:, ::64]


def png(pixels):
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


FACE = np.asarray(draw_face((0, 1), 0, 112))
DRAWS = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("pixels", "fault"),
    [
        (DRAWS.integers(0, 256, (112, 112, 3), dtype=np.uint8), "no photograph: neighbouring"),
        (np.full((112, 112, 3), 90, np.uint8), "shows nothing: all its pixels are equal"),
        (FACE[::4, ::4].copy(), "too small: 28 x 28 pixels, at least 48"),
        ((FACE * 0.08).astype(np.uint8), "too dark: brightness"),
        ((250 + FACE * 0.02).astype(np.uint8), "too bright: brightness"),
        ((120 + FACE * 0.03).astype(np.uint8), "no contrast"),
        (np.where(FACE > 120, 255, 0).astype(np.uint8), "badly exposed: 58 % of its pixels"),
    ],
)
def test_an_image_that_cannot_show_a_face_is_refused(pixels, fault):
    with pytest.raises(Unfit, match=fault):
        FaceReader(Mean()).read(png(pixels))


def test_a_blurred_image_is_refused():
    from PIL import Image, ImageFilter

    image = Image.fromarray(FACE).filter(ImageFilter.GaussianBlur(14))
    with pytest.raises(Unfit, match="blurred: sharpness"):
        FaceReader(Mean()).read(png(np.asarray(image)))


def test_faces_are_embedded_in_batches(tmp_path):
    reader, contents = FaceReader(Mean(), batch=2), []
    for number in range(5):
        contents.append(png(np.asarray(draw_face((0, number), 0, 112))))
    (tmp_path / "a.png").write_bytes(contents[0])
    samples = [reader.read(content) for content in contents]
    found = reader.embed(samples)
    assert found.shape == (5, 48)
    for row, sample in zip(found, samples, strict=True):
        np.testing.assert_array_equal(row, Mean()(sample.inputs[0][None])[0])
    np.testing.assert_array_equal(reader.embed([reader.read(tmp_path / "a.png")])[0], found[0])
    assert samples[0].quality == measure_face(FACE) or samples[0].quality.height == 112
    assert FaceLimits().faults(samples[1].quality) == ()


def test_the_largest_image_is_refused_by_its_header():
    with pytest.raises(Unfit, match="too large: 112 x 112 pixels, at most 12,000"):
        FaceReader(Mean(), FaceLimits(max_pixels=12_000)).read(png(FACE))


def test_content_that_is_no_image():
    for content in (b"", b"GIF89a no", b"\x89PNG\r\n\x1a\n broken"):
        with pytest.raises(OSError, match="the content: cannot be decoded"):
            FaceReader(Mean()).read(content)


def test_a_published_model_is_a_reader_and_its_threshold_lies_beside_it(tmp_path, voices):
    folder = tmp_path / "spkrec-ecapa-voxceleb"
    model = ECAPA_TDNN(20, channels=[8] * 4 + [24], attention_channels=4, lin_neurons=12)
    save(randomised(model).state_dict(), folder / "embedding_model.ckpt")
    (folder / "hyperparams.yaml").write_text(ECAPA_YAML)
    assert place_of(folder) == tmp_path / "spkrec-ecapa-voxceleb.verifier"
    assert people_file(folder) == tmp_path / "spkrec-ecapa-voxceleb.verifier.people.sqlite"
    reader, file = load_reader(folder), voices["mv20001"][0]
    assert reader.digest == load_reader(folder).digest
    features = load_hyperpyyaml(ECAPA_YAML)
    signal = read_audio(file, RATE)[None]
    with torch.inference_mode():
        expected = model.eval()(features["mean_var_norm"](features["compute_features"](signal),
                                                          torch.ones(1)))  # fmt: skip
    found = reader.embed([reader.read(file)])
    np.testing.assert_allclose(found[0], expected[0, 0], rtol=1e-4, atol=1e-5)
    verifier = Verifier.load(folder)
    assert len(verifier.enrol("Ann", file).added) == 1
    assert [one.name for one in folder.iterdir() if "sqlite" in one.name] == []


def test_rules_are_others_where_something_else_is_fit_or_read():
    def encoder():
        return SimpleNamespace(image_size=112, sample_rate=RATE, digest=lambda: "encoder 1")

    for reader, options in (
        (SpeechReader, {"checked": False, "window": 6.0, "limits": SpeechLimits(max_seconds=2)}),
        (FaceReader, {"checked": False, "limits": FaceLimits(max_pixels=9)}),
    ):
        made = [reader(encoder()), *(reader(encoder(), **{k: v}) for k, v in options.items())]
        assert len({one.rules for one in made}) == len(made)
        assert reader(encoder()).rules == made[0].rules
