"""The output folder: whose run it holds, wherever it lies, and who is at work in it."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
from hyperpyyaml import load_hyperpyyaml

from speechbrain_qmargin.training import run_folder
from speechbrain_qmargin.training.config import load_experiment
from speechbrain_qmargin.training.run_folder import RunFolder

HPARAMS = Path(__file__).parents[2] / "hparams"
SPEECH = [str(HPARAMS / "qmargin.yaml"), "--size=small", "--data_folder=voices"]


def begun(folder, *options):
    """A run that has begun in a folder, with 12 classes."""
    experiment = load_experiment([*SPEECH, f"--output_folder={folder}", *options])
    experiment.text = experiment.text.replace("out_n_neurons: 0", "out_n_neurons: 12")
    RunFolder(experiment).begin()


def check(folder, *options, **known_now):
    RunFolder(load_experiment([*SPEECH, f"--output_folder={folder}", *options])).check(**known_now)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run that has begun with no options; for tests that only look at it."""
    folder = tmp_path_factory.mktemp("plain")
    begun(folder)
    return folder


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--opt_class=!name:torch.optim.Adam", "opt_class: !name:torch.optim.SGD there, !name:"),
        ("--opt_class={momentum: 0.5}", r"opt_class.momentum: 0.9 there, 0.5 now"),
        ("--compute_cost=!new:speechbrain_qmargin.CosFaceLoss", "compute_cost: !apply:"),
        ("--lr_schedule=!name:torch.optim.SGD", "lr_schedule: !name:speechbrain_qmargin"),
        ("--wav_augment=null", "wav_augment: !new:speechbrain.*there, None now"),
        ("--loss=arcface", "loss: qmargin there, arcface now"),
        ("--head=sparse", "head: dense there, sparse now"),
        ("--speeds=[1.0, 0.9]", r"speeds: \[1.0\] there, \[1.0, 0.9\] now"),
        ("--modules={other: 3}", "modules.other: nothing there, 3 now"),
        ("--precision=bf16", "--precision: fp32 there, bf16 now"),
        ("--eval_precision=fp16", "--eval_precision: fp32 there, fp16 now"),
        ("--max_grad_norm=1", r"--max_grad_norm: 5.0 there, 1.0 now"),
    ],
)
def test_everything_that_was_resolved_is_compared(plain, option, named):
    with pytest.raises(ValueError, match=f"another experiment .*{named}"):
        check(plain, option)


def test_what_may_change_may_change_in_objects_too(plain):
    check(plain)
    check(plain, "--batch_size=8", "--num_workers=2", "--logger=tensorboard", out_n_neurons=12)
    check(plain, "--precision=fp32", "--max_grad_norm=5", "--device=cuda:0", "--noprogressbar")
    check(plain, "--verification_file=[a.txt, b.txt]", "--trials_folder=there", "--top_n=3")
    with pytest.raises(ValueError, match="out_n_neurons = 12; these data give 13"):
        check(plain, out_n_neurons=13)


def test_what_a_folder_holds_when_a_run_begins(tmp_path):
    begun(tmp_path)
    files = {"experiment.yaml", "run_options.json", "hyperparams.yaml", "log.txt", "env.log"}
    assert {file.name for file in tmp_path.iterdir()} == files
    logging.getLogger("speechbrain_qmargin.cli").debug("where an error came from")
    logging.getLogger("PIL.PngImagePlugin").debug("two lines an image")  # gigabytes an epoch
    said = (tmp_path / "log.txt").read_text()
    assert "where an error came from" in said
    assert "two lines" not in said
    plain = load_hyperpyyaml((tmp_path / "hyperparams.yaml").read_text())
    assert plain["out_n_neurons"] == 12
    (tmp_path / "run_options.json").write_text('{"precision": "bf16"}')
    with pytest.raises(ValueError, match=r"run_options\.json: damaged"):
        check(tmp_path)


def test_a_machine_that_does_not_see_the_folder_is_named(tmp_path, monkeypatch):
    """It would write its shards where the others never look, and nobody would know until then."""
    monkeypatch.setattr(run_folder, "if_main_process", lambda: False)
    with pytest.raises(OSError, match=r"does not see .* file system that all of them share"):
        RunFolder(
            load_experiment([str(HPARAMS / "qmargin.yaml"), f"--output_folder={tmp_path}"])
        ).refuse_another_machines()


def test_a_run_that_was_moved_or_is_named_otherwise_is_the_same(tmp_path, monkeypatch):
    begun(tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    check("first")
    shutil.move("first", "second")
    check("second")
    check(tmp_path / "x" / ".." / "second")
    with pytest.raises(ValueError, match="seed: 0 there, 1 now"):
        check("second", "--seed=1")


def test_a_fine_tuned_run_is_the_same_where_both_were_moved(tmp_path):
    def tuned(start, *options):
        argv = [str(HPARAMS / "qmargin_lm.yaml"), f"--pretrained={start}", *options]
        return RunFolder(load_experiment(argv))

    begun(tmp_path / "first")
    tuned(tmp_path / "first").begin()
    shutil.move(tmp_path / "first", tmp_path / "second")
    tuned(tmp_path / "second").check()
    begun(tmp_path / "other")
    with pytest.raises(ValueError, match="pretrained: "):
        tuned(tmp_path / "other", f"--output_folder={tmp_path / 'second' / 'lm'}").check()


def test_another_recipes_folder_and_a_damaged_record_are_named(tmp_path):
    (tmp_path / "hyperparams.yaml").write_text("seed: 0\n")
    with pytest.raises(ValueError, match=r"another recipe \(it has no experiment.yaml\)"):
        check(tmp_path)
    for damaged in ("seed: [1\n", "\0\0\0", ""):
        (tmp_path / "experiment.yaml").write_text(damaged)
        with pytest.raises(ValueError, match=r"experiment\.yaml: damaged"):
            check(tmp_path)


def test_a_start_before_the_first_checkpoint_binds_nobody(tmp_path, plain):
    def start(folder):
        RunFolder(
            load_experiment([*SPEECH, f"--output_folder={folder}", "--lr=0.01"])
        ).forget_false_start()

    shutil.copytree(plain, tmp_path / "false")
    labels = tmp_path / "false" / "save" / "label_encoder.txt"
    labels.parent.mkdir()
    labels.write_text("of other speakers")
    start(tmp_path / "false")
    check(tmp_path / "false", "--lr=0.01", out_n_neurons=40)
    assert not labels.exists()

    for made in ("save/CKPT+2026/model.ckpt", "history.jsonl", "results.json", "inference/w"):
        folder = tmp_path / made.replace("/", "_")
        shutil.copytree(plain, folder)
        (folder / made).parent.mkdir(parents=True, exist_ok=True)
        (folder / made).write_text("")
        start(folder)
        with pytest.raises(ValueError, match=r"another experiment \(lr: 0.1 there, 0.01 now"):
            check(folder, "--lr=0.01")


def test_a_finished_run_is_announced_only_for_its_own_settings(tmp_path, capsys):
    begun(tmp_path)
    settings = load_experiment([*SPEECH, f"--output_folder={tmp_path}"]).settings
    (tmp_path / "results.json").write_text(json.dumps({"settings": settings}))
    (tmp_path / "results.txt").write_text("the table")
    run = RunFolder(load_experiment([*SPEECH, f"--output_folder={tmp_path}"]))
    assert run.announce_finished()
    assert "the table" in capsys.readouterr().out
    with pytest.raises(ValueError, match="another experiment"):
        RunFolder(
            load_experiment([*SPEECH, f"--output_folder={tmp_path}", "--wav_augment=null"])
        ).announce_finished()


def hold(folder, ready):
    with RunFolder(load_experiment([*SPEECH, f"--output_folder={folder}"])).locked():
        ready.set()
        signal.pause()


def test_a_second_start_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    other = context.Process(target=hold, args=(tmp_path / "run", ready))
    other.start()
    assert ready.wait(60)
    mine = RunFolder(load_experiment([*SPEECH, f"--output_folder={tmp_path / 'run'}"]))
    with pytest.raises(OSError, match="another start is at work in this folder"), mine.locked():
        pass
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    with mine.locked():
        pass


def test_a_start_that_comes_to_nothing_leaves_no_folder(tmp_path):
    (tmp_path / "mine").mkdir()
    folder = tmp_path / "mine" / "results" / "run"
    run = RunFolder(load_experiment([*SPEECH, f"--output_folder={folder}"]))
    with pytest.raises(ZeroDivisionError), run.locked():
        raise ZeroDivisionError
    assert list((tmp_path / "mine").iterdir()) == []
