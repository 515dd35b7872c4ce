"""What schedulers send before they take a machine: obeyed after a checkpoint, exactly resumed."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from scripts import load

from speechbrain_qmargin.training import internals, preemption
from speechbrain_qmargin.training.preemption import Preempted, noted_signals

brains = load("tests/training/test_brain.py")
folder = brains.folder


class Told(brains.Recorder):
    """Is sent a signal in a step."""

    told_at, told = None, signal.SIGTERM

    def fit_batch(self, batch):
        if self.told_at == (self.hparams.epoch_counter.current, self.step):
            os.kill(os.getpid(), self.told)
        return super().fit_batch(batch)


def run(folder, output, told_at=None, told=signal.SIGTERM, validate=None, factor=1):
    """A run without checkpoints within an epoch, and what ended it."""
    torch.manual_seed(0)
    options = {"grad_accumulation_factor": factor}
    settings = {"number_of_epochs": 2, "batch_size": 4 // factor}
    fit, brain, _ = brains.make_brain(folder, output, validate, Told, options, **settings)
    brain.losses, brain.told_at, brain.told = {}, told_at, told
    try:
        fit()
    except Preempted as end:
        return brain, end.code
    return brain, 0


@pytest.mark.parametrize(
    ("told_at", "factor", "last"),
    [
        ((2, 2), 1, (2, 2)),
        ((1, 4), 1, (1, 4)),  # an epoch's last step
        ((2, 3), 2, (2, 4)),  # between the steps there are gradients
    ],
)
def test_a_run_told_to_end_saves_and_resumes_where_it_was(folder, tmp_path, told_at, factor, last):
    whole, _ = run(folder, tmp_path / "whole", factor=factor)
    first, status = run(folder, tmp_path / "told", told_at, factor=factor)
    assert status == 143
    assert max(first.losses) == last
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    log = (tmp_path / "told" / "log.txt").read_text()
    assert f"SIGTERM: the run ends at epoch {last[0]}, step {last[1]}; a checkpoint is" in log
    second, status = run(folder, tmp_path / "told", factor=factor)
    assert status == 0
    assert not first.losses.keys() & second.losses.keys()  # nothing is trained twice
    brains.assert_same(whole, first, second)


def test_a_signal_during_validation_ends_the_run_after_its_epoch(folder, tmp_path):
    def validate(_):
        os.kill(os.getpid(), signal.SIGUSR1)
        return {"eer": 0.5}

    brain, status = run(folder, tmp_path, validate=validate)
    assert status == 128 + signal.SIGUSR1
    assert [record["epoch"] for record in brain.history()] == [1]
    assert max(brain.losses) == (1, 4)
    second, _ = run(folder, tmp_path, validate=lambda _: {"eer": 0.5})
    assert min(second.losses) == (2, 1)


def test_workers_obey_their_main_process_alone(folder, tmp_path):
    """Not what is sent to every process; but at its end the main process waits for them."""
    _, brain, test = brains.make_brain(folder, tmp_path)
    options = {"num_workers": 2, "worker_init_fn": lambda worker: (tmp_path / f"{worker}").touch()}
    batches = iter(brain.make_dataloader(test, brains.sb.Stage.VALID, **options))
    next(batches)
    first, second = batches._workers
    assert (tmp_path / "0").is_file()  # of ones own
    for name in ("TERM", "USR1", "TERM"):
        subprocess.run(["kill", f"-{name}", str(first.pid), str(second.pid)], check=True)
    assert len(list(batches)) == 2
    batches = iter(brain.make_dataloader(test, brains.sb.Stage.VALID, num_workers=1))
    next(batches)
    (worker,) = batches._workers
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0


def test_workers_are_born_deaf_to_them(folder, tmp_path, monkeypatch):
    """A signal between a worker's birth and its first function would end it."""

    def look(*_):
        held = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        (tmp_path / "held").write_text(str(held >= {signal.SIGTERM, signal.SIGUSR1}))

    monkeypatch.setattr(internals, "left_to_the_main_process", look)
    _, brain, test = brains.make_brain(folder, tmp_path)
    loader = brain.make_dataloader(test, brains.sb.Stage.VALID, num_workers=1)
    assert len(list(loader)) == 3
    assert (tmp_path / "held").read_text() == "True"
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_handler_of_ones_own_stays(monkeypatch):
    mine = []
    monkeypatch.setattr(preemption, "_SIGNALS", [signal.SIGUSR1])
    before = signal.signal(signal.SIGUSR1, lambda number, _: mine.append(number))
    try:
        with noted_signals() as came:
            signal.raise_signal(signal.SIGUSR1)
            assert came() == 0
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert mine == [signal.SIGUSR1]


def test_outside_the_main_thread_nothing_is_set():
    found = []

    def look():
        with noted_signals() as came:
            found.append((signal.getsignal(signal.SIGTERM), came()))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [(signal.SIG_DFL, 0)]


def test_a_signal_that_nobody_obeyed_ends_the_process():
    code = (
        "import os, signal\n"
        "from speechbrain_qmargin.training.preemption import noted_signals\n"
        "with noted_signals():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('done', flush=True)\n"
        "print('not here')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "done\n")
