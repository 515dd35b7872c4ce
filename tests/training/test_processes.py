"""The processes of a run: how they part, and what one of them keeps of all."""

import os
import pickle

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from processes import free_port, start
from ranks import on_ranks
from scripts import ROOT, load

from speechbrain_qmargin.files import replacing
from speechbrain_qmargin.head import QMarginHead
from speechbrain_qmargin.training import internals
from speechbrain_qmargin.training import processes as module
from speechbrain_qmargin.training.brain import VerificationBrain
from speechbrain_qmargin.training.config import load_experiment
from speechbrain_qmargin.training.run import train_verifier


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_after_an_error_nobody_waits_for_the_others(monkeypatch, backend):
    """They wait for this process, in a collective: NCCL's end would be a wait for them."""
    ended = []
    monkeypatch.setattr(module, "ddp_init_group", lambda _: None)
    monkeypatch.setattr(module, "ddp_barrier", lambda: None)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: ended.append(backend))
    with pytest.raises(OSError, match="an image"), module.processes({}):
        raise OSError("an image")
    assert ended == ([] if backend == "nccl" else ["gloo"])
    with module.processes({}):
        pass
    assert ended[-1] == backend  # at the end of a run


def goes_wrong_in_a_loss(rank, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def work():
        options = {"distributed_launch": True, "distributed_backend": "gloo", "device": "cpu"}
        with module.processes(options):
            head = QMarginHead(4, 20)
            for step in range(3):
                head(torch.randn(2, 4), torch.arange(2)).backward()
                if rank and step:
                    raise ZeroDivisionError

    if rank:
        with pytest.raises(ZeroDivisionError):
            work()
    else:
        with pytest.raises(RuntimeError, match="Connection closed by peer"):
            work()


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_others_in_their_collective():
    """Not at the end of the time-out, which is half an hour."""
    start(goes_wrong_in_a_loss, free_port(), number=2)


def test_processes_of_several_machines_may_have_the_same_number(tmp_path):
    """In containers they do, and all of them write what a run prepares."""
    with replacing(tmp_path / "missing.txt") as one, replacing(tmp_path / "missing.txt") as other:
        one.write_text("one")
        other.write_text("other")
    assert [file.name for file in tmp_path.iterdir()] == ["missing.txt"]
    assert (tmp_path / "missing.txt").read_text() == "one"  # the last that was done


@pytest.fixture
def as_other(monkeypatch):
    """What the main process sends is kept; calling it makes this the other process."""
    sent = []
    monkeypatch.setattr(module, "ddp_broadcast", lambda made: sent.append(pickle.dumps(made)))

    def become_other():
        monkeypatch.setattr(module, "if_main_process", lambda: False)
        monkeypatch.setattr(module, "ddp_broadcast", lambda _: pickle.loads(sent.pop()))

    return become_other


def test_what_the_main_process_makes_is_made_once(as_other):
    made = []

    def prepare():
        found = [module.made_by_main_process(lambda: made.append(0) or len(made)) for _ in "ab"]
        return found, module.made_by_main_process(lambda: {"ann": 1})

    first = module.main_process_first(prepare)
    as_other()
    assert module.main_process_first(prepare) == first == ([1, 2], {"ann": 1})
    assert len(made) == 2
    assert module.made_by_main_process(lambda: made.append(0) or len(made)) == 3  # elsewhere


def test_where_the_main_process_fails_the_others_meet_its_error(as_other):
    def prepare():
        number = module.made_by_main_process(lambda: 1)
        return module.made_by_main_process(lambda: 1 // (number - 1))

    with pytest.raises(ZeroDivisionError):
        module.main_process_first(prepare)
    as_other()
    with pytest.raises(ZeroDivisionError):
        module.main_process_first(prepare)


@pytest.mark.parametrize(
    ("recipe", "yaml", "scan"),
    [
        ("voxceleb", "qmargin.yaml", "prepare_speech"),
        ("face", "face_qmargin.yaml", "prepare_faces"),
    ],
)
def test_a_corpus_is_scanned_by_one_process(tmp_path, monkeypatch, as_other, recipe, yaml, scan):
    for name in ("ann", "bob", "cyd", "dan"):
        (tmp_path / "wav" / name).mkdir(parents=True)
        for number in (1, 2):
            soundfile.write(tmp_path / "wav" / name / f"{number}.wav", np.zeros(8000), 16000)
            (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / name / f"{number}.png")
    end = "wav" if recipe == "voxceleb" else "png"
    trials = tmp_path / "trials.txt"
    trials.write_text(f"1 ann/1.{end} ann/2.{end}\n0 ann/1.{end} bob/1.{end}\n")
    options = [f"--data_folder={tmp_path}", f"--verification_file={trials}"]
    options += [f"--output_folder={tmp_path / 'run'}", f"--valid_file={trials}", "--size=small"]
    script = load(f"recipes/{recipe}/train.py")
    monkeypatch.setattr(script, "check_images", lambda _: None, raising=False)
    settings = load_experiment([str(ROOT / "hparams" / yaml), *options]).settings
    mine = module.main_process_first(lambda: script.prepare(settings))
    as_other()
    monkeypatch.setattr(script, scan, lambda *_, **__: pytest.fail("it is scanned again"))
    other = module.main_process_first(lambda: script.prepare(settings))
    assert other.num_classes == mine.num_classes >= 2
    for part in ("train", "test"):
        one, same = (getattr(task.datasets.args[0], part) for task in (mine, other))
        assert list(one.files) == list(same.files)
        assert one.path == same.path  # mapped from one file
    (name,) = mine.test_trials
    assert list(mine.test_trials[name].ids) == list(other.test_trials[name].ids)


class Rank(VerificationBrain):
    """What a process keeps of an epoch, without a model."""

    _processes = property(lambda self: 2)
    _items_at_once = property(lambda self: 16)
    optimizer_step = 0

    def __init__(self, comm):
        self.comm, self.step, self.avg_train_loss = comm, 0, 0.0
        self._stats, self._earlier, self._started = [], {"stats": [0.0] * 5, "seconds": 0.0}, 0.0

    def _over_processes(self, rows):
        return torch.cat(self.comm.gather_rows(rows))

    def see(self, steps):
        for self.step in steps:
            rng = np.random.default_rng([self.comm.rank, self.step])
            self._stats.append(torch.from_numpy(rng.uniform(0, 9, 4)))
            loss = torch.tensor(rng.uniform(0, 9))
            self.avg_train_loss = self.update_average(loss, self.avg_train_loss)

    def record(self):
        mean = torch.tensor([self._mean_loss(self.avg_train_loss)], dtype=torch.float64)
        return torch.cat((mean, self._totals_of_all()))


def test_an_epoch_that_goes_on_has_the_losses_of_all_processes(tmp_path):
    """What the main process saw alone would stand for the others' before the interruption."""

    def run(comm):
        brain = Rank(comm)
        brain.see(range(1, 4))
        brain._save(tmp_path / f"{comm.rank}")
        comm.barrier()
        brain.see(range(4, 6))
        other = Rank(comm)
        other._recover(tmp_path / "0", False)
        other.see(range(4, 6))
        return brain.record(), other.record()

    for whole, resumed in on_ranks(2, run):
        assert whole[1] == 10  # batches
        assert resumed.tolist() == pytest.approx(whole.tolist(), rel=1e-12)


def test_a_run_on_cpus_may_have_unused_parameters_too(monkeypatch):
    asked = []
    monkeypatch.setattr(
        internals, "DistributedDataParallel", lambda one, **options: asked.append(options) or one
    )
    brain = internals.OpenBrain.__new__(internals.OpenBrain)
    brain.distributed_launch, brain.distributed_backend = True, "gloo"
    brain.find_unused_parameters = True
    brain.modules = torch.nn.ModuleDict({"embedding_model": torch.nn.Linear(2, 2)})
    brain._wrap_distributed()
    assert asked == [{"find_unused_parameters": True}]


def test_one_gpu_for_all_processes_is_refused_before_the_data_are_prepared(monkeypatch, tmp_path):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    yaml = str(ROOT / "hparams" / "qmargin.yaml")
    options = ["--device=cuda", f"--output_folder={tmp_path / 'run'}"]
    with pytest.raises(ValueError, match="--device cuda: 8 processes would share one GPU"):
        train_verifier([yaml, *options], Rank, lambda _: pytest.fail("they are prepared"))
    module.refuse_one_gpu_for_all("cpu")
