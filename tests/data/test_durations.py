"""Durations: each recording is opened once for all runs."""

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile

from speechbrain_qmargin.data import durations as module
from speechbrain_qmargin.data.durations import durations, durations_file


@pytest.fixture
def opened(monkeypatch):
    """The paths that are opened."""
    paths, inspect = [], module.inspect_audio
    monkeypatch.setattr(
        module, "inspect_audio", lambda path: paths.append(path.name) or inspect(path)
    )
    return paths


def write(path, seconds):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(round(seconds * 16000)), 16000)


def scan(folder):
    """(seconds, fault) by name."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
    seconds, faults = durations(folder, names, progress=False)
    return {name: (seconds[n], faults.get(n, "")) for n, name in enumerate(names)}


def test_only_what_is_new_or_changed_is_opened(tmp_path, opened):
    corpus = tmp_path / "corpus"
    write(corpus / "a/1.wav", 0.5)
    write(corpus / "a/2.wav", 0.75)
    (corpus / "b.wav").touch()
    first = scan(corpus)
    assert first["a/1.wav"] == (0.5, "")
    assert first["a/2.wav"] == (0.75, "")
    assert "empty file" in first["b.wav"][1]
    assert sorted(opened) == ["1.wav", "2.wav", "b.wav"]
    opened.clear()
    (tmp_path / "link").symlink_to(corpus)
    assert repr(scan(tmp_path / "link")) == repr(first)  # NaN is in it
    assert opened == ["b.wav"]  # perhaps it can be read now
    opened.clear()
    write(corpus / "a/1.wav", 1.5)
    write(corpus / "ü 3.wav", 0.25)
    assert scan(corpus)["a/1.wav"] == (1.5, "")
    assert sorted(opened) == ["1.wav", "b.wav", "ü 3.wav"]
    opened.clear()
    assert scan(corpus)["ü 3.wav"] == (0.25, "")
    assert opened == ["b.wav"]
    assert len(durations(corpus, [], progress=False)[0]) == 0


def test_a_damaged_cache_is_read_again_and_one_that_cannot_be_written_is_said(
    tmp_path, opened, caplog, monkeypatch
):
    write(tmp_path / "corpus/1.wav", 0.5)
    first = scan(tmp_path / "corpus")
    cache = durations_file(tmp_path / "corpus")
    for content in (b"", b"none", cache.read_bytes()[:-30]):
        cache.write_bytes(content)
        caplog.clear()
        assert scan(tmp_path / "corpus") == first
        assert f"{cache} is damaged" in caplog.text
    assert len(opened) == 4
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPEECHBRAIN_QMARGIN_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert scan(tmp_path / "corpus") == first
    assert "cannot be written" in caplog.text
    assert "SPEECHBRAIN_QMARGIN_CACHE" in caplog.text


def test_an_interrupted_scan_goes_on(tmp_path, opened, monkeypatch):
    for number in range(8):
        write(tmp_path / f"corpus/{number}.wav", 0.1)
    monkeypatch.setattr(module, "ThreadPoolExecutor", lambda: ThreadPoolExecutor(1))
    inspect = module.inspect_audio

    def dies(path):
        if path.name == "5.wav":
            raise KeyboardInterrupt
        return inspect(path)

    monkeypatch.setattr(module, "inspect_audio", dies)
    with pytest.raises(KeyboardInterrupt):
        scan(tmp_path / "corpus")
    monkeypatch.setattr(module, "inspect_audio", inspect)
    del opened[:]
    assert len(scan(tmp_path / "corpus")) == 8
    assert "0.wav" not in opened
    assert "5.wav" in opened


def test_what_is_written_on_the_way_grows_with_the_recordings_alone(tmp_path, monkeypatch):
    sizes, keep, read = [], module._write, []

    def written(cache, known):
        sizes.append(len(known.names))
        keep(cache, known)

    monkeypatch.setattr(module, "_WRITE_EVERY", 4)
    monkeypatch.setattr(module, "_AT_ONCE", 2)
    monkeypatch.setattr(module, "_write", written)
    monkeypatch.setattr(module, "inspect_audio", lambda path: read.append(path) or (1.0, ""))
    (tmp_path / "corpus").mkdir()
    for number in range(100):
        (tmp_path / f"corpus/{number:03}.wav").touch()
    assert len(scan(tmp_path / "corpus")) == 100
    assert sizes == [4, 8, 12, 16, 20, 26, 32, 40, 50, 62, 78, 98, 100]
    assert len(scan(tmp_path / "corpus")) == len(read) == 100
    assert len(sizes) == 13


@pytest.mark.slow
def test_many_m4a_files_are_opened_by_processes(tmp_path, monkeypatch):
    pytest.importorskip("av", reason="m4a needs the extra voxceleb (PyAV)")
    from voxceleb_tree import write_m4a

    for name in ("1", "2"):
        (tmp_path / "corpus").mkdir(exist_ok=True)
        write_m4a(tmp_path / f"corpus/{name}.m4a", 0.1 * np.sin(np.arange(16000)))
    (tmp_path / "corpus/3.m4a").write_bytes(b"none")
    expected = scan(tmp_path / "corpus")
    durations_file(tmp_path / "corpus").unlink()
    monkeypatch.setattr(module, "_MANY", 1)
    assert type(module._pool(["1.m4a"])).__name__ == "ProcessPoolExecutor"
    assert repr(scan(tmp_path / "corpus")) == repr(expected)
