"""--precision fp16 with the prototypes in shards: one scale and one decision for all ranks."""

import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
from processes import start
from speechbrain.utils.checkpoints import (
    DEFAULT_LOAD_HOOKS,
    DEFAULT_SAVE_HOOKS,
    Checkpointer,
    get_default_hook,
)
from torch.nn.parallel import DistributedDataParallel

from speechbrain_qmargin import QMarginLoss
from speechbrain_qmargin.communicator import Communicator
from speechbrain_qmargin.head import QMarginHead, RowSparseSGD
from speechbrain_qmargin.training.brain import VerificationBrain
from speechbrain_qmargin.training.processes import scaler_of_shards

CLASSES, DIM, WORLD = 21, 8, 2


def make_brain(folder, enabled=True):
    """SpeechBrain has fp16 on a GPU alone; its scaler works on a CPU too."""
    torch.manual_seed(0)
    head = QMarginHead(DIM, CLASSES, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "GradScaler", lambda device, **_: torch.amp.GradScaler(
            device, init_scale=2.0**10, enabled=enabled
        ))  # fmt: skip
        brain = VerificationBrain(
            modules={"embedding_model": torch.nn.Linear(DIM, DIM), "classifier": head},
            opt_class=partial(torch.optim.SGD, lr=0.1),
            hparams={
                "compute_cost": QMarginLoss(1.5, 10.0, 0.2),
                "head_opt_class": partial(RowSparseSGD, lr=0.1, momentum=0.9, head=head),
            },
            run_opts={"device": "cpu", "noprogressbar": True},
            checkpointer=Checkpointer(folder),
        )
    brain.modules["embedding_model"] = DistributedDataParallel(brain.modules["embedding_model"])
    brain.init_optimizers()
    return brain


def step(brain, seed, overflows):
    """A step on which the gradient of this rank's shard is infinite, or not."""
    rank, modules = dist.get_rank(), brain.modules
    generator = torch.Generator().manual_seed(10 * seed + rank)
    labels = torch.randint(CLASSES, (4,), generator=generator)
    outputs = modules["classifier"](
        modules["embedding_model"](torch.randn(4, DIM, generator=generator))
    )
    brain.scaler.scale(brain.hparams.compute_cost(outputs, labels, None)).backward()
    if overflows:
        modules["classifier"].weight.grad._values()[0, 0] = torch.inf
    brain.optimizers_step()


def same_everywhere(*values):
    mine = torch.cat([torch.as_tensor(value).detach().flatten().float() for value in values])
    first, *others = Communicator().gather_rows(mine)
    return all(torch.equal(first, other) for other in others)


def job(rank, folder):
    torch.set_num_threads(1)
    method = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=WORLD)

    brain = make_brain(f"{folder}/{rank}")
    head, encoder = brain.modules["classifier"], brain.modules["embedding_model"].module
    step(brain, 0, overflows=False)
    prototypes = head.weight.detach().clone()
    assert brain.scaler.get_scale() == 2.0**10
    step(brain, 1, overflows=rank == 1)
    assert torch.equal(head.weight, prototypes)  # the step was left out on both
    assert brain.scaler.get_scale() == 2.0**9
    step(brain, 2, overflows=False)
    assert not torch.equal(head.weight, prototypes)
    assert same_everywhere(brain.scaler.get_scale(), *encoder.parameters())
    state = {"scale": 2.0**9, "_growth_tracker": 1}
    assert brain.scaler.state_dict().items() >= state.items()
    # the checkpointer saves the one in use, by SpeechBrain's hook for torch's own
    assert brain.checkpointer.recoverables["scaler"] is brain.scaler
    for hooks in (DEFAULT_SAVE_HOOKS, DEFAULT_LOAD_HOOKS):
        assert get_default_hook(brain.scaler, hooks) is hooks[torch.amp.GradScaler]
    other = torch.amp.GradScaler("cpu")
    other.load_state_dict(brain.scaler.state_dict())
    assert other.get_scale() == 2.0**9

    # a loss that is not finite on one rank is left out on both, each of which keeps its own
    brain.distributed_launch = True
    brain._signal = lambda: 15 * rank  # which came to one rank alone
    for mine in (torch.nan, 1.0):
        value, spoilt, signal = brain._facts(torch.tensor(mine if rank == 1 else 2.0))()
        assert (bool(spoilt), int(signal)) == (math.isnan(mine), 15)
        torch.testing.assert_close(value, torch.tensor(mine if rank == 1 else 2.0), equal_nan=True)

    # without a scaler: SpeechBrain's skip_nonfinite_grads
    brain = make_brain(f"{folder}/plain{rank}", enabled=False)
    brain.skip_nonfinite_grads = True
    prototypes = brain.modules["classifier"].weight.detach().clone()
    step(brain, 0, overflows=rank == 1)
    assert torch.equal(brain.modules["classifier"].weight, prototypes)

    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_what_overflows_in_one_shard_is_left_out_by_all_ranks(tmp_path):
    start(job, str(tmp_path), number=WORLD)


def test_one_process_keeps_its_scaler():
    scaler = torch.amp.GradScaler("cpu")
    assert scaler_of_shards(scaler, "cpu", Communicator.alone()) is scaler
