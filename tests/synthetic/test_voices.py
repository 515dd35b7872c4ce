import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from speechbrain_qmargin.files import CACHE_VARIABLE
from speechbrain_qmargin.synthetic import espeak, processes
from speechbrain_qmargin.synthetic import speakers as speakers_module
from speechbrain_qmargin.synthetic import voices as mini_voices
from speechbrain_qmargin.synthetic.voices import build_mini_corpus, default_cache_folder

soundfile = pytest.importorskip("soundfile", reason="needs the extra 'demo'")
pytest.importorskip("espeakng_loader", reason="needs the extra 'demo'")

TINY = {
    "num_train_speakers": 4,
    "num_valid_speakers": 2,
    "num_test_speakers": 5,
    "num_sessions": 2,
    "num_utterances": 2,
    "progress": False,
}
NUM_FILES = 11 * 2 * 2


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_mini_corpus(tmp_path_factory.mktemp("corpus") / "mini", seed=3, **TINY)


@pytest.fixture
def corpus(built, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(built.folder, tmp_path / "mini")
    return build_mini_corpus(tmp_path / "mini", seed=3, **TINY)


def contents(corpus):
    return {str(p.relative_to(corpus.wav)): p.read_bytes() for p in corpus.wav.rglob("*.flac")}


def trials(path):
    for line in path.read_text().splitlines():
        label, enrol, test = line.split(" ")
        yield int(label), enrol, test


def test_layout(built):
    assert built.num_utterances == built.num_rebuilt == NUM_FILES == len(contents(built))
    names = {path.name for path in built.folder.iterdir()}
    assert names == {
        "README.txt",
        "speakers.tsv",
        "train_speakers.txt",
        "valid_speakers.txt",
        "test_speakers.txt",
        "trials_valid.txt",
        "trials_test.txt",
        "manifest.jsonl",
        "wav",
    }
    assert (built.wav / "mv00001" / "session1" / "00001.flac").is_file()
    assert not list(built.folder.rglob("*.tmp"))
    readme = (built.folder / "README.txt").read_text()
    assert "Synthetic voices" in readme
    assert "not accuracy" in readme


def test_audio(built):
    for path in built.wav.rglob("*.flac"):
        info = soundfile.info(path)
        assert (info.format, info.samplerate, info.channels) == ("FLAC", 16_000, 1)
        assert 2 <= info.duration <= 5
        samples, _ = soundfile.read(path)
        assert 1e-3 < np.sqrt(np.mean(samples**2)) < 0.2
        assert np.abs(samples).max() < 0.995
        # speech comes and goes: the loudest tenth of the frames stands out
        energy = (samples[: len(samples) // 400 * 400].reshape(-1, 400) ** 2).mean(1)
        assert np.quantile(energy, 0.9) > 1.5 * np.quantile(energy, 0.1)


def test_speaker_lists_are_disjoint_and_complete(built):
    lists = [
        path.read_text().split()
        for path in (built.train_speakers, built.valid_speakers, built.test_speakers)
    ]
    assert [len(names) for names in lists] == [4, 2, 5]
    together = [name for names in lists for name in names]
    assert len(set(together)) == len(together)
    assert sorted(together) == sorted(path.name for path in built.wav.iterdir())


@pytest.mark.parametrize("split", ["valid", "test"])
def test_trials_agree_with_the_files(built, split):
    speakers = set(getattr(built, f"{split}_speakers").read_text().split())
    files = contents(built)
    seen = Counter()
    for label, enrol, test in trials(getattr(built, f"trials_{split}")):
        assert enrol in files
        assert test in files
        one, two = Path(enrol), Path(test)
        assert {one.parts[0], two.parts[0]} <= speakers
        assert label == (one.parts[0] == two.parts[0])
        if label:
            assert one.parts[1] != two.parts[1], "targets are cross-session"
        seen[frozenset((enrol, test))] += 1
        seen[label] += 1
    assert seen.pop(1) == len(speakers) * 4
    assert seen.pop(0) > 0
    assert set(seen.values()) == {1}, "no pair twice"


def test_default_size_supports_far_of_one_in_a_thousand():
    settings = speakers_module.Settings(0, 64, 8, 24, 5, 4)
    speakers = speakers_module.all_speakers(settings)
    group = {speaker.name: speaker.group for speaker in speakers}
    counts = Counter()
    for line in mini_voices._texts(settings, speakers)["trials_test.txt"].splitlines():
        label, one, two = line.split()
        one, two = group[one.split("/")[0]], group[two.split("/")[0]]
        assert one[1] == two[1], "never a high voice against a low one"
        counts[label, one == two] += 1
    # 24 speakers, 160 cross-session pairs each; 4 groups of 15 speaker pairs, 400 trials a pair
    assert counts == {("1", True): 24 * 160, ("0", True): 24_000, ("0", False): 12_000}


@pytest.mark.slow
def test_samples_depend_on_the_seed_alone(built, tmp_path):
    """Neither on the processes, nor the order, nor how many other speakers there are."""
    fewer = {**TINY, "num_test_speakers": 2, "num_train_speakers": 3}
    alone = build_mini_corpus(tmp_path / "alone", seed=3, num_workers=1, **fewer)
    assert contents(alone).items() < contents(built).items()
    other = build_mini_corpus(tmp_path / "other", seed=4, **fewer)
    assert not set(contents(other).values()) & set(contents(built).values())


def test_sessions_and_utterances_differ(built):
    assert len(set(contents(built).values())) == NUM_FILES


def test_complete_corpus_is_left_alone_and_needs_no_synthesiser(built, monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    before = {path: path.stat().st_mtime_ns for path in built.folder.rglob("*")}
    assert build_mini_corpus(built.folder, seed=3, **TINY).num_rebuilt == 0
    assert {path: path.stat().st_mtime_ns for path in built.folder.rglob("*")} == before


def test_damaged_and_missing_files_alone_are_rebuilt(built, corpus):
    cut, flipped, gone, *_, other = sorted(corpus.wav.rglob("*.flac"))
    cut.write_bytes(cut.read_bytes()[:1000])
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    gone.unlink()
    corpus.trials_test.write_text("1 a b\n")
    before = other.stat().st_mtime_ns

    again = build_mini_corpus(corpus.folder, seed=3, **TINY)
    assert again.num_rebuilt == 3
    assert contents(again) == contents(built)
    assert again.trials_test.read_text() == built.trials_test.read_text()
    assert again.manifest.read_text() == built.manifest.read_text()
    assert other.stat().st_mtime_ns == before


def test_interrupted_build_resumes(built, corpus):
    # the last files were not written, and the line of one was being written
    lines = corpus.manifest.read_text().splitlines(keepends=True)
    corpus.manifest.write_text("".join(lines[:-3]) + lines[-3][:20])
    for line in lines[-2:]:
        (corpus.wav / json.loads(line)["path"]).unlink()
    again = build_mini_corpus(corpus.folder, seed=3, **TINY)
    assert again.num_rebuilt == 3
    assert again.manifest.read_text() == built.manifest.read_text()
    assert contents(again) == contents(built)


def test_rebuilt_file_that_differs_is_announced(corpus):
    header, line, *lines = corpus.manifest.read_text().splitlines()
    entry = {**json.loads(line), "sha256": "as another version of espeak-ng made it"}
    corpus.manifest.write_text("\n".join([header, json.dumps(entry), *lines]) + "\n")
    with pytest.warns(UserWarning, match="1 rebuilt files are not what they were"):
        assert build_mini_corpus(corpus.folder, seed=3, **TINY).num_rebuilt == 1


@pytest.mark.slow
def test_script_without_main_guard(built, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from speechbrain_qmargin.synthetic.voices import build_mini_corpus\n"
        f"print(build_mini_corpus({str(tmp_path / 'mini')!r}, 3, **{TINY!r}).num_rebuilt)\n"
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert (run.stdout, run.returncode) == (f"{NUM_FILES}\n", 0), run.stderr


def test_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[demo\]'"):
        build_mini_corpus(tmp_path / "mini", **TINY)
    assert not (tmp_path / "mini").exists()


def test_full_disk_names_folder_and_space(tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 10_000})()
    monkeypatch.setattr(mini_voices.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"No space left.* about 3 MB .*mini'") as raised:
        build_mini_corpus(tmp_path / "mini", **TINY)
    assert raised.value.errno == mini_voices.errno.ENOSPC
    assert CACHE_VARIABLE in str(raised.value)


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write the mini corpus.* MB.*file/mini'"):
        build_mini_corpus(tmp_path / "file" / "mini", **TINY)


@pytest.mark.slow
def test_failure_in_a_process_keeps_what_is_built(built, corpus):
    path = corpus.wav / "mv20003"
    shutil.rmtree(path)
    path.write_text("in the way")
    with pytest.raises(OSError, match=r"mv20003.*: cannot write the mini corpus") as raised:
        build_mini_corpus(corpus.folder, seed=3, **TINY)
    assert str(corpus.folder) in str(raised.value)
    path.unlink()
    assert build_mini_corpus(corpus.folder, seed=3, **TINY).num_rebuilt == 4
    assert contents(corpus) == contents(built)


def test_crash_of_a_process_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_WORKER", "import os; os._exit(7)")
    with pytest.raises(RuntimeError, match="ended with code 7"):
        build_mini_corpus(tmp_path / "mini", **TINY)


def test_folder_of_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="holds files but no mini corpus"):
        build_mini_corpus(tmp_path, **TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_corpus_with_other_settings(built):
    with pytest.raises(ValueError, match=r"with seed=3, but seed=4 was asked for"):
        build_mini_corpus(built.folder, seed=4, **TINY)


@pytest.mark.parametrize("content", ["", "\n", "{", "[]\n"])
def test_unreadable_manifest(tmp_path, content):
    (tmp_path / "manifest.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"manifest.jsonl, line 1: not a manifest"):
        build_mini_corpus(tmp_path, **TINY)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1),
        ("seed", 0.5),
        ("num_train_speakers", 1),
        ("num_test_speakers", 10_000),
        ("num_sessions", 1),
        ("num_utterances", 0),
    ],
)
def test_sizes_out_of_range(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} must be an integer from"):
        build_mini_corpus(tmp_path / "mini", **{**TINY, name: value})


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert default_cache_folder(5) == tmp_path / f"mini_voices-{mini_voices.CORPUS_VERSION}-5"
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert default_cache_folder().parent == tmp_path / ".cache" / "speechbrain_qmargin"


def test_resampling_keeps_a_tone():
    time = np.arange(22_050) / 22_050
    tone = np.sin(2 * np.pi * 1000 * time) * np.hanning(len(time))
    time = np.arange(16_000) / 16_000
    expected = np.sin(2 * np.pi * 1000 * time) * np.interp(
        time, np.arange(22_050) / 22_050, np.hanning(22_050)
    )
    np.testing.assert_allclose(espeak.resample(tone, 22_050), expected, atol=1e-6)
