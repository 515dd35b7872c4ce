"""The recipe's script from the command line to the results, on corpora small enough for a test."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from scripts import load, loaded_by, train

from speechbrain_qmargin.embeddings import load_embeddings
from speechbrain_qmargin.scoring.score_files import read_scores
from speechbrain_qmargin.synthetic import voices as mini_voices

TINY = ["--channels=8", "--attention_channels=8", "--embedding_dim=16", "--number_of_epochs=2"]
TINY += ["--batch_size=4", "--sentence_len=0.5"]
ONCE = [one if "epochs" not in one else "--number_of_epochs=1" for one in TINY]


def run(*options, module=None, tiny=TINY):
    train("voxceleb", "qmargin.yaml", *tiny, *options, module=module)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return mini_voices.build_mini_corpus(
        tmp_path_factory.mktemp("corpus") / "mini",
        progress=False,
        num_train_speakers=4,
        num_valid_speakers=2,
        num_test_speakers=2,
        num_sessions=2,
        num_utterances=2,
    )


def on(corpus, output, *options, folder=None, trials=None):
    """Options for the corpus as if it were a user's own folder."""
    return [
        f"--data_folder={folder or corpus.folder}",
        "--size=small",
        f"--verification_file={trials or corpus.trials_test}",
        f"--valid_file={corpus.trials_valid}",
        f"--output_folder={output}",
        *options,
    ]


LOSS = ["--alpha=1.75", "--scale=5"]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "run"
    run(*on(corpus, output, *LOSS))
    return output


@pytest.fixture
def finished(trained, tmp_path):
    """The folder of a finished run, for a test alone."""
    return shutil.copytree(trained, tmp_path / "out")


def test_the_main_job_ends_with_its_results_and_says_when_it_is_done(
    corpus, tmp_path, monkeypatch, capsys
):
    tiny = functools.partial(lambda: corpus)
    monkeypatch.setattr(mini_voices, "build_mini_corpus", tiny)
    output = tmp_path / "out"
    run(f"--output_folder={output}")
    printed = capsys.readouterr().out
    assert "TAR@FAR=0.01" in printed
    assert "95 % interval" in printed
    assert "synthetic" in printed
    assert "support in the last epoch" in printed
    assert (output / "scores/trials_test/det.png").read_bytes().startswith(b"\x89PNG")

    results = json.loads((output / "results.json").read_text())
    assert results["settings"]["size"] == "mini"
    assert set(results["figures"]) >= {"EER", "minDCF(p=0.01)", "TAR@FAR=0.001"}
    trials, scores = read_scores(output / "scores/trials_test/cosine.tsv")
    embeddings = load_embeddings(output / "embeddings.npz")
    a, b = (embeddings[trials.ids[side[0]]] for side in (trials.enrolment, trials.test))
    assert scores[0] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-6)

    before = (output / "results.json").stat().st_mtime_ns
    run(f"--output_folder={output}")
    assert "This run is done" in capsys.readouterr().out
    assert (output / "results.json").stat().st_mtime_ns == before


def test_results_lost_after_training_are_made_again_without_training(corpus, finished):
    history = (finished / "history.jsonl").read_bytes()
    first = json.loads((finished / "results.json").read_text())
    (finished / "results.json").unlink()
    run(*on(corpus, finished, *LOSS))
    second = json.loads((finished / "results.json").read_text())
    assert second["figures"] == first["figures"]
    assert (finished / "history.jsonl").read_bytes() == history


def test_a_finished_run_is_scored_anew_on_another_list(corpus, finished, tmp_path, capsys):
    history = (finished / "history.jsonl").read_bytes()
    shorter = tmp_path / "shorter.txt"
    shorter.write_text("".join(corpus.trials_test.read_text().splitlines(keepends=True)[::2]))
    run(*on(corpus, finished, *LOSS, trials=shorter))
    assert "scored anew, for verification_file changed" in capsys.readouterr().out
    results = json.loads((finished / "results.json").read_text())
    assert set(results["lists"]) == {"shorter"}
    assert (finished / "history.jsonl").read_bytes() == history


def test_another_loss_in_the_same_folder_is_refused_and_touches_nothing(corpus, finished):
    kept = (finished / "results.json").read_bytes()
    with pytest.raises(ValueError, match="loss: qmargin there, arcface now"):
        run(*on(corpus, finished, *LOSS, "--loss=arcface"))
    assert (finished / "results.json").read_bytes() == kept


def test_bad_input_is_named_before_anything_is_trained(corpus, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(*on(corpus, output, folder="/nowhere"))
    with pytest.raises(ValueError, match="verification_file"):
        run(f"--data_folder={corpus.folder}", f"--output_folder={tmp_path / 'a'}")
    copy = shutil.copy(corpus.trials_valid, tmp_path / "t.txt")  # by its trials, not its name
    with pytest.raises(ValueError, match=r"valid_file: its \d+ trials are those of"):
        run(*on(corpus, output, trials=copy))
    with pytest.raises(ValueError, match="loss: unknown name 'softmax'"):
        run(*on(corpus, output, "--loss=softmax"))
    trials = tmp_path / "trials.txt"
    trials.write_text(corpus.trials_test.read_text() + "1 ghost/1/1.flac ghost/1/2.flac\n")
    with pytest.raises(FileNotFoundError, match="ghost"):
        run(*on(corpus, output, trials=trials))


def broken_after_preparation(corpus, folder, monkeypatch, broken):
    """The script's module, and a copy of the corpus whose training recordings break late."""
    shutil.copytree(corpus.folder, folder)
    module = load("recipes/voxceleb/train.py")
    whole = module.prepare_speech

    def prepare_then_break(*arguments, **settings):
        found = whole(*arguments, **settings)
        for file in list(found.train.files)[broken]:
            Path(file).write_bytes(b"")
        return found

    monkeypatch.setattr(module, "prepare_speech", prepare_then_break)
    return module


def test_audio_broken_after_preparation_is_named(corpus, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    module = broken_after_preparation(corpus, folder, monkeypatch, slice(None))
    with pytest.raises(OSError, match=r"\.flac: cannot be decoded"):
        run(*on(corpus, tmp_path / "out", folder=folder), module=module)


@pytest.mark.slow
def test_one_broken_training_recording_costs_neither_training_nor_results(
    corpus, tmp_path, monkeypatch
):
    folder, output = tmp_path / "copy", tmp_path / "out"
    module = broken_after_preparation(corpus, folder, monkeypatch, slice(1))
    run(*on(corpus, output, folder=folder), module=module)
    results = json.loads((output / "results.json").read_text())
    assert set(results["lists"]["trials_test"]) == {"cosine", "centred", "as-norm"}
    assert (output / "log.txt").read_text().count("is taken instead") == 1
    assert len((output / "save/skipped_audio.txt").read_text().splitlines()) == 1
    (line,) = (output / "save/skipped_cohort.tsv").read_text().splitlines()
    assert "cannot be decoded (an empty file)" in line


@pytest.mark.slow
def test_large_margin_fine_tuning_continues_a_run(finished, capsys):
    output = finished
    options = [f"--pretrained={output}", "--number_of_epochs=1", "--sentence_len=0.7"]
    options += ["--batch_size=4"]
    train("voxceleb", "qmargin_lm.yaml", *options)
    assert "qmargin, ecapa, 1 epochs" in capsys.readouterr().out
    results = json.loads((output / "lm" / "results.json").read_text())
    settings = results["settings"]
    assert (settings["alpha"], settings["margin"], settings["channels"]) == (1.75, "large", 8)
    assert (settings["lr"], settings["sentence_len"]) == (0.0001, 0.7)
    log = (output / "lm" / "log.txt").read_text()
    assert "margin=0.324, hard_margin_cos=0.9" in log
    assert f"starting from {output}" in log


@pytest.mark.slow
def test_processes_that_load_data_may_be_started_in_any_way(corpus, tmp_path):
    """Those that load training and test; each costs the time to import torch."""
    losses = []
    for number, options in enumerate(((), loaded_by("spawn"), loaded_by("forkserver"))):
        output = tmp_path / str(number)
        given = [one for one in on(corpus, output) if not one.startswith("--valid_file")]
        given += ["--num_valid_speakers=0", "--cohort_utterances=0", "--augment=rooms"]
        run(*given, *options, tiny=ONCE)
        lines = (output / "history.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.slow
def test_a_table_is_a_corpus(corpus, tmp_path):
    """SpeechBrain's CSV with ids of its own; the lists name files as VoxCeleb's do."""
    rows = ["ID,duration,wav,start,stop,spk_id\n"]
    for path in sorted(corpus.wav.rglob("*.flac")):
        parts = path.relative_to(corpus.wav).with_suffix("").parts
        seconds = soundfile.info(path).duration
        rows.append(f"{'--'.join(parts)},{seconds},{path},0,{round(16000 * seconds)},{parts[0]}\n")
    (tmp_path / "all.csv").write_text("".join(rows))
    options = [one for one in on(corpus, tmp_path / "out") if "data_folder" not in one]
    run(*options, f"--manifest={tmp_path / 'all.csv'}")
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["note"] == ""
    embeddings = load_embeddings(tmp_path / "out/embeddings.npz")
    assert all(name.count("--") == 2 for name in embeddings.ids)
