"""Inputs that say what is not so: each is named, none takes memory that it only claims."""

import errno
import logging
import os
import pickle
import resource
import struct

import numpy as np
import pytest
import soundfile
import torch
from examples import some
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import no_more_open_files

from speechbrain_qmargin.data import audio
from speechbrain_qmargin.data.audio import (
    decode_stretches,
    inspect_audio,
    read_audio,
    resampled,
    said_seconds,
)
from speechbrain_qmargin.data.convert import convert_to_flac
from speechbrain_qmargin.data.folders import audio_files
from speechbrain_qmargin.data.pickled import read_bin
from speechbrain_qmargin.data.skipped import Skipped
from speechbrain_qmargin.data.speech import prepare_speech
from speechbrain_qmargin.data.speech_dataset import SpeechDataset

RATE = 16000


def voice(seconds=1.0, rate=RATE, seed=0):
    return 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * rate))


def write(path, samples=None, rate=RATE, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, voice() if samples is None else samples, rate, **kwargs)
    return path


# ------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("everywhere", [False, True])
def test_samples_that_are_not_finite_are_refused_with_the_file(tmp_path, value, everywhere):
    samples = voice()
    samples[slice(None) if everywhere else 9000] = value
    path = write(tmp_path / "a.wav", samples, subtype="FLOAT")
    with pytest.raises(OSError, match=r"a\.wav: [\d,]+ of its samples are not finite"):
        read_audio(path, RATE)
    with pytest.raises(OSError, match="not finite"):
        read_audio(path, RATE, 0.5, 0.2)
    if not everywhere:
        assert len(read_audio(path, RATE, 0.0, 0.2)) == 3200


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg", "opus"])
@pytest.mark.parametrize("left", [0.3, 0.9])
def test_truncated_recordings_are_refused_with_the_file(tmp_path, suffix, left):
    form = {"format": "OGG", "subtype": "OPUS"} if suffix == "opus" else {}
    path = write(tmp_path / f"a.{suffix}", voice(3.0), **form)
    assert len(read_audio(path, RATE)) == 3 * RATE
    assert inspect_audio(path) == (pytest.approx(3.0), "")
    content = path.read_bytes()
    path.write_bytes(content[: round(left * len(content))])
    with pytest.raises(OSError, match=rf"a\.{suffix}: "):
        read_audio(path, RATE)
    assert inspect_audio(path)[1]


@pytest.mark.parametrize("rate", [16000, 48000])
def test_a_stretch_of_opus_is_that_of_the_whole(tmp_path, rate):
    path = write(tmp_path / "a.opus", voice(3.0, rate), rate, format="OGG", subtype="OPUS")
    whole = read_audio(path, rate)
    for start in (1 / 160, 1.0, 2.37):
        first = round(start * rate)
        assert torch.equal(read_audio(path, rate, start, 0.5), whole[first : first + rate // 2])


def test_a_lack_of_open_files_is_no_fault_of_a_recording(tmp_path):
    """It passed for one: the recording was left out, or another one trained on in its place."""
    corpus(tmp_path)
    skipped = Skipped(tmp_path / "skipped.txt")
    data = SpeechDataset(prepare(tmp_path).train, RATE, crop=0.3, skipped=skipped)
    path = tmp_path / "wav/a/s/0.wav"
    uses = (
        lambda: read_audio(path, RATE),
        lambda: inspect_audio(path),
        lambda: decode_stretches(path),
        lambda: said_seconds(path),
        lambda: data[0],
    )
    for use in uses:
        use()
    with no_more_open_files():
        for use in uses:
            with pytest.raises(OSError, match="Too many open files") as caught:
                use()
            assert caught.value.errno == errno.EMFILE
    assert not (tmp_path / "skipped.txt").exists()


def test_a_stream_of_unknown_length_is_not_truncated(tmp_path):
    path = write(tmp_path / "a.wav")
    content = bytearray(path.read_bytes())
    for size in (0xFFFFFFFF, 0x7FFFFFFF):
        content[40:44] = struct.pack("<I", size)
        path.write_bytes(content)
        assert len(read_audio(path, RATE)) == RATE


def test_empty_recordings_are_refused(tmp_path):
    path = write(tmp_path / "a.wav", np.zeros(0))
    with pytest.raises(OSError, match=r"a\.wav: no samples, it is empty"):
        read_audio(path, RATE)
    path.write_bytes(b"")
    with pytest.raises(OSError, match=r"a\.wav: cannot be decoded \(an empty file\)"):
        read_audio(path, RATE)
    with pytest.raises(OSError, match=r"b\.wav: cannot be decoded \(No such file"):
        read_audio(tmp_path / "b.wav", RATE)


def test_loud_floats_are_scaled_and_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(audio, "_scaled", set())
    quiet = voice()
    path = write(tmp_path / "wav/ann/1/a.wav", 1000 * quiet, subtype="FLOAT")
    found = read_audio(path, RATE)
    np.testing.assert_allclose(found, quiet / np.abs(quiet).max(), atol=1e-6)
    assert f"{path}: samples up to" in caplog.text
    assert caplog.text.count("scaled to 1") == 1
    assert convert_to_flac(tmp_path, tmp_path / "out", jobs=1, progress=False)["converted"] == 1
    converted = read_audio(tmp_path / "out/wav/ann/1/a.flac", RATE)
    np.testing.assert_allclose(converted, found, atol=2**-14)


def test_conversion_does_not_clip_what_resampling_overshoots(tmp_path):
    square = np.sign(np.sin(np.arange(8000) * 0.7)) * 0.999
    write(tmp_path / "wav/ann/1/a.wav", square, 8000)
    whole = read_audio(tmp_path / "wav/ann/1/a.wav", RATE)
    assert whole.abs().max() > 1.05
    convert_to_flac(tmp_path, tmp_path / "out", jobs=1, progress=False)
    converted = read_audio(tmp_path / "out/wav/ann/1/a.flac", RATE)
    np.testing.assert_allclose(converted, whole / whole.abs().max(), atol=2**-14)


def test_conversion_overwrites_no_recording(tmp_path):
    folder = tmp_path / "wav" / "ann" / "s"
    folder.mkdir(parents=True)
    for name in ("1.wav", "1.mp3"):
        (folder / name).touch()
    with pytest.raises(
        ValueError, match=r"1\.flac would be of both ann/s/1\.\w+ and ann/s/1\.\w+$"
    ):
        convert_to_flac(tmp_path, tmp_path / "flac", jobs=1, progress=False)
    with pytest.raises(ValueError, match="would lie among the recordings"):
        convert_to_flac(tmp_path, tmp_path / "wav" / "..", jobs=1, progress=False)
    assert sorted(file.name for file in folder.iterdir()) == ["1.mp3", "1.wav"]


def test_conversion_lists_what_it_cannot_convert(tmp_path):
    source = tmp_path / "source"
    write(source / "wav/ann/1/a.wav", np.full(100, np.nan), subtype="FLOAT")
    (source / "wav/ann/1/gone.wav").symlink_to("nowhere.wav")
    write(source / "wav/ann/1/good.wav")
    counts = convert_to_flac(source, tmp_path / "out", jobs=1, progress=False)
    assert counts == {"converted": 1, "kept": 0, "failed": 2}
    listed = (tmp_path / "out/not_converted.txt").read_text()
    assert "a.wav: 100 of its samples are not finite" in listed
    assert "gone.wav" in listed
    write(source / "wav/ann/1/a.wav")  # mended
    (source / "wav/ann/1/gone.wav").unlink()
    counts = convert_to_flac(source, tmp_path / "out", jobs=1, progress=False)
    assert counts == {"converted": 1, "kept": 1, "failed": 0}
    assert not (tmp_path / "out/not_converted.txt").exists()


# ------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("rate", [15999, 44099, 11025, 47999])
def test_odd_rates_are_resampled_in_bounded_memory(tmp_path, rate):
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate)
    path = write(tmp_path / "a.wav", tone, rate)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = read_audio(path, RATE, speed=0.9 if rate == 11025 else 1.0)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 600_000  # KiB; it was 8.8 GB
    if rate != 11025:
        wanted = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(found)) / RATE)
        inner = slice(100, -100)
        np.testing.assert_allclose(found[inner], wanted[inner], atol=2e-3)


@pytest.mark.parametrize(("rate", "wanted"), [(441, 320), (1, 2), (9, 10), (10, 9), (3, 1)])
def test_the_filter_computed_directly_is_torchaudios(rate, wanted):
    signal = torch.from_numpy(voice().astype(np.float32))
    table = resampled(signal, rate, wanted)
    direct = audio._resampled_directly(signal, rate, wanted)
    assert table.shape == direct.shape
    np.testing.assert_allclose(table, direct, atol=1e-5)


@pytest.mark.parametrize("rate", [1, 999, 4_000_000])
def test_rates_that_no_recording_has_are_refused(tmp_path, rate):
    path = write(tmp_path / "a.wav", voice(0.1), rate)
    with pytest.raises(OSError, match=rf"a\.wav: its header says {rate} samples a second"):
        read_audio(path, RATE)


def test_hours_are_not_read_in_one_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "MAX_SECONDS", 2.0)
    path = write(tmp_path / "a.flac", voice(3.0))
    with pytest.raises(OSError, match=r"a\.flac: lasts .* too much to be taken in one piece"):
        read_audio(path, RATE)
    assert len(read_audio(path, RATE, 1.0, 1.0)) == RATE  # a crop of it is


# ------------------------------------------------------------------------------- folders


def test_links_that_lead_back_are_not_followed(tmp_path):
    for name in ("ann/1/a.wav", "bob/1/b.wav"):
        write(tmp_path / "wav" / name)
    (tmp_path / "wav/ann/1/loop").symlink_to(tmp_path / "wav")
    (tmp_path / "wav/bob/self").symlink_to(".")
    (tmp_path / "wav/eve").symlink_to("bob")  # no loop: another name of bob
    found = sorted(file.name for file in audio_files(tmp_path / "wav"))
    assert found == ["ann/1/a.wav", "bob/1/b.wav", "eve/1/b.wav"]


def corpus(folder):
    for speaker in "abcd":
        for number in range(3):
            write(folder / f"wav/{speaker}/s/{number}.wav", voice(seed=ord(speaker) + number))
    (folder / "trials.txt").write_text("1 c/s/0.wav c/s/1.wav\n0 c/s/0.wav d/s/0.wav\n")
    return folder


def prepare(folder, **kwargs):
    kwargs.setdefault("verification_file", folder / "trials.txt")
    return prepare_speech(folder, folder / "save", progress=False, **kwargs)


def test_recordings_of_a_format_that_is_not_read_are_said(tmp_path, caplog):
    corpus(tmp_path)
    for name in ("a/s/8.sph", "a/s/9.SPH", "b/s/9.au", "b/s/9.txt"):
        (tmp_path / "wav" / name).write_bytes(b"")
    assert len(prepare(tmp_path).train) == 6
    said = f"{tmp_path / 'wav'}: files are left out that are not read (1 .au, 2 .sph): convert them"
    assert said in caplog.text


def test_names_and_links_that_cannot_be_used_are_listed(tmp_path, caplog):
    corpus(tmp_path)
    (tmp_path / "wav/a/s/dangling.wav").symlink_to("nowhere.wav")
    odd = os.fsencode(tmp_path / "wav/a/s") + b"/caf\xe9.wav"
    with open(odd, "wb") as stream:
        stream.write((tmp_path / "wav/a/s/0.wav").read_bytes())
    write(tmp_path / "wav/a/s/tab\there.wav")
    found = prepare(tmp_path)
    assert list(found.train.ids) == [f"{who}/s/{n}.wav" for who in "ab" for n in range(3)]
    listed = dict(line.split("\t") for line in (tmp_path / "save/skipped_audio.txt").open())
    assert listed == {
        "a/s/dangling.wav": "a link to nothing\n",
        "a/s/caf\\xe9.wav": "its name is not UTF-8: rename it\n",
        "a/s/tab\\there.wav": "its name has a tab or a line break: rename it\n",
    }
    assert "3 audio files are left out" in caplog.text


def test_names_with_spaces_work_from_the_folder_to_the_trials(tmp_path):
    for speaker in ("speaker 01", "speaker 02", "speaker 03", "speaker 04"):
        for number in range(3):
            write(tmp_path / f"wav/{speaker}/s 1/utt {number}.wav", voice(seed=number))
    lines = [
        "1\tspeaker 03/s 1/utt 0.wav\tspeaker 03/s 1/utt 1.wav\n",
        "0\tspeaker 03/s 1/utt 0.wav\tspeaker 04/s 1/utt 1.wav\n",
    ]
    (tmp_path / "trials.txt").write_text("".join(lines))
    found = prepare(tmp_path)
    assert found.speakers == ["speaker 01", "speaker 02"]
    assert found.test.ids[0] == "speaker 03/s 1/utt 0.wav"
    again = prepare(tmp_path, verification_file=None, num_valid_speakers=2)
    assert "\tspeaker 0" in (tmp_path / "save/trials/valid.txt").read_text()
    assert len(again.valid_trials) == 15


# ------------------------------------------------------------------------------- what is lost


def test_test_recordings_are_decoded_before_training(tmp_path):
    corpus(tmp_path)
    samples = voice()
    samples[8000] = np.nan  # neither the header nor the end shows it
    write(tmp_path / "wav/d/s/0.wav", samples, subtype="FLOAT")
    with pytest.raises(OSError, match=r"1 of 3 recordings to test on cannot be used.*d/s/0\.wav"):
        prepare(tmp_path)
    write(tmp_path / "wav/d/s/0.wav")
    prepare(tmp_path)


def test_a_list_of_one_kind_is_refused_before_training(tmp_path):
    corpus(tmp_path)
    for line in ("1 c/s/0.wav c/s/1.wav\n", "0 c/s/0.wav d/s/0.wav\n"):
        (tmp_path / "trials.txt").write_text(line)
        with pytest.raises(ValueError, match=r"trials\.txt: it has no target or no impostor"):
            prepare(tmp_path)


def test_a_nan_is_substituted_in_training_and_named_where_all_is_wanted(tmp_path, caplog):
    found = prepare(corpus(tmp_path))
    samples = voice()
    samples[::100] = np.nan
    write(tmp_path / "wav/a/s/1.wav", samples, subtype="FLOAT")
    skipped = Skipped(tmp_path / "skipped.txt", what="recordings")
    train = SpeechDataset(found.train, RATE, crop=0.5, skipped=skipped)
    with caplog.at_level(logging.WARNING):
        assert torch.isfinite(torch.stack([train[n]["sig"] for n in range(6)])).all()
    assert caplog.text.count("not finite") == 1
    (line,) = (tmp_path / "skipped.txt").read_text().splitlines()
    assert line.startswith("a/s/1.wav\t")
    with pytest.raises(OSError, match=r"a/s/1\.wav: .* not finite"):
        SpeechDataset(found.train, RATE)[1]


# ------------------------------------------------------------------------------- pickles


def test_numpys_own_constructors_are_never_reached(tmp_path, monkeypatch):
    images = [np.frombuffer(b"abc", np.uint8)] * 4
    content = pickle.dumps((images, [np.bool_(True), np.False_]), protocol=2)
    (tmp_path / "a.bin").write_bytes(content)
    found, same = read_bin(tmp_path / "a.bin")
    assert found == [b"abc"] * 4
    assert same.tolist() == [True, False]
    # an array whose memory nobody has written: ndarray((4096,), "u1")
    build = b"\x80\x02(]cnumpy\nndarray\n(K\x10\x85X\x02\0\0\0u1tRae]\x88a\x86."
    (tmp_path / "a.bin").write_bytes(b"\x80\x02" + build[2:])
    with pytest.raises(ValueError, match=r"a\.bin: not a verification set"):
        read_bin(tmp_path / "a.bin")


@pytest.mark.parametrize("kind", ["O", "O8", "f8", "M8[s]", "(4096,)u1", "V8"])
def test_types_other_than_bytes_and_bools_are_refused(tmp_path, kind):
    name = kind.encode()
    dtype = b"cnumpy\ndtype\n(X" + struct.pack("<I", len(name)) + name + b"\x89\x88tR"
    scalar = b"cnumpy.core.multiarray\nscalar\n(" + dtype + b"U\x08" + b"A" * 8 + b"tR"
    (tmp_path / "a.bin").write_bytes(b"\x80\x02](C\x01aC\x01be](" + scalar + b"e\x86.")
    with pytest.raises(ValueError, match=r"a\.bin: not a verification set \(it holds arrays of"):
        read_bin(tmp_path / "a.bin")


def test_bytes_of_gigabytes_are_refused_with_a_reason(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"]\x86.")
    with pytest.raises(ValueError, match=r"a\.bin: not a verification set \(.+\)"):
        read_bin(tmp_path / "a.bin")


def test_a_memo_of_gigabytes_is_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\x80\x02]r\xff\xff\xff\x7f]\x86.")
    with pytest.raises(ValueError, match="place 2147483647 after 3 steps"):
        read_bin(tmp_path / "a.bin")


WHOLE = [
    pickle.dumps(([bytes([n]) * 9 for n in range(6)], flags), protocol=protocol)
    for protocol in range(6)
    for flags in ([True, False, True], [np.bool_(True)] * 3, np.array([True, False, True]))
]
PIECES = [
    *(b"cnumpy\ndtype\n", b"cnumpy\nndarray\n", b"cos\nsystem\n", b"X\x02\0\0\0u1", b"C\x02ab"),
    *(b"cnumpy.core.multiarray\nscalar\n", b"cnumpy.core.multiarray\n_reconstruct\n", b"K\x01"),
    *(b"R", b"b", b"\x85", b"(", b"t", b"\x88", b"]", b"a", b"e", b"q\x00", b"h\x00", b"\x81"),
]


@given(
    st.sampled_from(WHOLE),
    st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=3) | st.sampled_from(PIECES))),
)
@settings(max_examples=some(400), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_and_crafted_pickles_end_with_an_error_or_bytes_and_bools(tmp_path, whole, edits):
    content = bytearray(whole)
    for at, piece in edits:
        content[at : at + len(piece)] = piece
    (tmp_path / "a.bin").write_bytes(content)
    try:
        images, same = read_bin(tmp_path / "a.bin")
    except ValueError as error:
        assert "a.bin" in str(error)  # noqa: PT017
    else:
        assert {type(image) for image in images} == {bytes}
        assert same.dtype == bool
