"""A training on a GPU: it learns, resumes to the same bits, and embeds as a CPU does.

    pytest -n 0 tests/training/test_cuda.py

On a CPU the same code runs where that is quick, and as slow tests.
"""

import math
import os
import random
import shutil
from contextlib import contextmanager

import pytest
import torch
from random_runs import face_run, speech_run
from scripts import ROOT, load

from speechbrain_qmargin.export.face_encoder import FaceEncoder
from speechbrain_qmargin.export.loading import load_any_encoder
from speechbrain_qmargin.export.probe import TOLERANCE, difference, probe, probe_images
from speechbrain_qmargin.export.recordings import extract_recordings
from speechbrain_qmargin.export.toolkits import export_arcface_torch
from speechbrain_qmargin.extraction import Inputs
from speechbrain_qmargin.head import fused
from speechbrain_qmargin.models.iresnet import IResNet
from speechbrain_qmargin.training.brain import FaceBrain
from speechbrain_qmargin.training.config import load_experiment
from speechbrain_qmargin.training.processes import deterministic_algorithms
from speechbrain_qmargin.training.run import train_verifier
from speechbrain_qmargin.training.run_folder import RunFolder

brains = load("tests/training/test_brain.py")
folder = brains.folder

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
CUDA = pytest.param("cuda", marks=GPU)
SLOW_CPU = pytest.param("cpu", marks=pytest.mark.slow)
# Of WeSpeaker's network, whose padding is zeros: that of SpeechBrain's, by reflection, has no
# deterministic gradient on a GPU
NETWORK = {"model": "wespeaker_ecapa", "channels": 16, "pooled_channels": 24, "embedding_dim": 32}
MANY = 40_000  # classes: the kernels' passes over the head are of many parts
RUNS = {
    "dense": {"features": "kaldi"},  # whose dither is drawn on the device
    "sparse": {"head": "sparse", "out_n_neurons": MANY},
    "partial": {"head": "partial", "out_n_neurons": MANY},
    "bf16": {"head": "sparse", "out_n_neurons": MANY, "run_opts": {"precision": "bf16"}},
    "fp16": {"run_opts": {"precision": "fp16"}},
    "fp16, sparse": {"head": "sparse", "out_n_neurons": MANY, "run_opts": {"precision": "fp16"}},
    "adaface": {"loss": "adaface"},
    "elasticface": {"loss": "elasticface", "loss_options": "{sigma: 0.2}"},
}


@pytest.fixture
def deterministic(monkeypatch):
    """As --deterministic True. In a process of its own the variable is set in time for cuBLAS."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic_algorithms(True):
        yield


@contextmanager
def true_float32():
    """SpeechBrain lets a GPU multiply in TF32, of 10 bits."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    try:
        yield
    finally:
        for switch, allowed in zip(switches, before, strict=True):
            switch.allow_tf32 = allowed


@pytest.mark.parametrize("where", [SLOW_CPU, CUDA])
@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_resumes_to_the_same_bits(
    folder, tmp_path, where, name, deterministic, monkeypatch
):
    settings = {**NETWORK, "number_of_epochs": 2, **RUNS[name]}
    options = {"device": where, **settings.pop("run_opts", {})}
    if where == "cpu" and "fp16" in name:
        pytest.skip("SpeechBrain has fp16 on a GPU alone")
    steps, evaluate = [], fused.evaluate
    monkeypatch.setattr(
        fused, "evaluate", lambda *given: steps.append(evaluate(*given)) or steps[-1]
    )

    def run(output, kill_at=None):
        random.seed(0)
        return brains.record(folder, tmp_path / output, kill_at, run_opts=options, **settings)

    whole = run("whole")
    assert len(whole.losses) == 8
    assert all(math.isfinite(loss) for loss in whole.losses.values())
    assert {p.device.type for p in whole.modules.parameters()} == {where}
    assert whole.scaler.is_enabled() == ("fp16" in name)
    if where == "cuda" and settings.get("head") == "sparse":
        assert sum(step is not None for step in steps) > 4  # of Triton's kernels
    first, second = run("killed", (2, 3)), run("killed")
    brains.assert_same(whole, first, second)
    assert whole.scaler.state_dict() == second.scaler.state_dict()


@pytest.mark.parametrize("where", [SLOW_CPU, CUDA])
def test_the_recipe_learns_and_embeds_as_on_a_cpu(folder, tmp_path, where, capsys):
    """With SpeechBrain's network and augmentation."""

    def made(device):
        learns = {key: value for key, value in brains.LEARNS.items() if key != "wav_augment"}
        return brains.make_brain(folder, tmp_path, run_opts={"device": device}, **learns)

    fit, brain, test = made(where)
    fit()
    losses = [record["loss"] for record in brain.history()]
    assert losses[-1] < losses[0]

    def extracted(device):
        shutil.rmtree(tmp_path / "save" / "embeddings", ignore_errors=True)  # nothing is kept
        found = made(device)[1].extract(test, batch_size=1)
        return torch.stack([torch.from_numpy(found[name]) for name in sorted(found)])

    on_cpu = extracted("cpu")
    with true_float32():
        exact = difference(on_cpu, extracted(where))
    tf32 = difference(on_cpu, extracted(where))
    with capsys.disabled():
        print(f"\nembeddings on {where} from a CPU's: {exact:.1e} of their length, TF32 {tf32:.1e}")
    assert exact < TOLERANCE
    assert tf32 < 0.05


@GPU
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("head", ["dense", "sparse"])
def test_a_batch_that_is_not_finite_leaves_no_trace(folder, tmp_path, head, precision):
    options = {"device": "cuda", "precision": precision}
    settings = {"number_of_epochs": 1, "batch_size": 2, "head": head, **NETWORK}
    fit, brain, _ = brains.make_brain(folder, tmp_path, None, brains.Spoilt, options, **settings)
    brain.losses, brain.changed, brain.spoilt_at = {}, [], (3,)
    fit()
    assert [step for step, loss in brain.losses.items() if math.isnan(loss)] == [(1, 3)]
    assert not brain.changed[3 - 1]
    assert precision == "fp16" or all(brain.changed[:2] + brain.changed[3:])  # its scale adapts


def test_deterministic_is_a_setting(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # the user's own stays
    seen = []

    def prepare(settings):
        seen.append((torch.are_deterministic_algorithms_enabled(), settings["deterministic"]))
        raise FileNotFoundError("no data")

    argv = [str(ROOT / "hparams" / "qmargin.yaml"), "--device=cpu", f"--output_folder={tmp_path}"]
    for more in ([], ["--deterministic=True"]):
        with pytest.raises(FileNotFoundError):
            train_verifier([*argv, *more], brains.SpeakerBrain, prepare)
    assert seen == [(False, False), (True, True)]
    assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


class Faces(torch.utils.data.Dataset):
    """Random images, four of each identity."""

    def __len__(self):
        return 16

    def __getitem__(self, row):
        image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(row // 4)) * 2 - 1
        return {"id": str(row), "image": image, "identity_encoded": torch.tensor([row // 4])}


@pytest.mark.parametrize(
    ("where", "options"),
    [
        pytest.param("cpu", {"precision": "bf16"}, marks=pytest.mark.slow),
        pytest.param("cuda", {"precision": "fp16"}, marks=GPU),
        pytest.param("cuda", {"precision": "bf16"}, marks=GPU),
    ],
)
def test_faces_learn(tmp_path, where, options):
    settings = {"depth": 18, "width": 4, "embedding_dim": 16, "image_size": 32, "batch_size": 8}
    settings |= {"output_folder": tmp_path, "num_workers": 0, "out_n_neurons": 4, "lr": 1.0}
    recipe = ROOT / "hparams" / "face_qmargin.yaml"
    words = [f"--{key}={value}" for key, value in settings.items()]
    experiment = load_experiment([str(recipe), *words, "--number_of_epochs=8"])
    hparams = experiment.load()
    RunFolder(experiment).begin()
    brain = FaceBrain(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts={"noprogressbar": True, "device": where, **options},
        checkpointer=hparams["checkpointer"],
    )
    loading = {**hparams["train_dataloader"], "batch_size": 8}
    brain.fit(hparams["epoch_counter"], Faces(), train_loader_kwargs=loading)
    losses = [record["loss"] for record in brain.history()]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("where", ["cpu", CUDA])
@pytest.mark.parametrize("make", [speech_run, face_run])
def test_an_encoder_embeds_as_on_a_cpu(tmp_path, where, make):
    run = make(tmp_path / "run")
    there, here = load_any_encoder(run, where), load_any_encoder(run)
    assert there.device.type == where
    assert there.digest() == here.digest()
    speech = make is speech_run
    inputs = probe(here, True, 2, 16000) if speech else probe_images(2, 32)
    with true_float32(), torch.no_grad():
        assert difference(here(inputs), there(inputs.to(where)).cpu()) < TOLERANCE


def test_recordings_are_extracted_on_a_gpu(folder, tmp_path):
    where = "cuda" if torch.cuda.is_available() else "cpu"
    run = speech_run(tmp_path / "run")
    files = {path.name: path for path in sorted((folder / "wav" / "s0" / "0").iterdir())}
    inputs, rows = Inputs(files), []
    with true_float32():
        for device in ("cpu", where):
            found, faults = extract_recordings(
                load_any_encoder(run, device), inputs, tmp_path / f"parts {len(rows)}"
            )
            assert not faults
            rows.append(torch.stack([torch.from_numpy(found[name].copy()) for name in files]))
    assert difference(*rows) < TOLERANCE


@pytest.mark.parametrize("where", ["cpu", CUDA])
def test_what_is_exported_is_compared_on_a_cpu(tmp_path, where):
    encoder = FaceEncoder(IResNet(18, embedding_dim=8, channels=4, image_size=32), 32).to(where)
    export_arcface_torch(encoder, tmp_path / "backbone.pth")
    assert encoder.device.type == where
