"""The Brain on a handful of utterances: it learns, logs, resumes exactly."""

import contextlib
import copy
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import speechbrain as sb
import torch
from launches import Counted
from speechbrain.dataio.sampler import ReproducibleRandomSampler

from speechbrain_qmargin.data.classes import class_encoder
from speechbrain_qmargin.data.epochs import CurrentEpoch
from speechbrain_qmargin.data.sampling import SharedOrder
from speechbrain_qmargin.data.speech import prepare_speech
from speechbrain_qmargin.data.speech_dataset import SpeechDataset
from speechbrain_qmargin.head import QMarginHead
from speechbrain_qmargin.training import history
from speechbrain_qmargin.training.brain import SpeakerBrain, VerificationBrain
from speechbrain_qmargin.training.config import load_experiment
from speechbrain_qmargin.training.pretrained import load_pretrained
from speechbrain_qmargin.training.run_folder import RunFolder

RECIPE = Path(__file__).parents[2] / "hparams" / "qmargin.yaml"
RATE = 16000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six speakers, four utterances of half a second each: a pitch with noise."""
    root = tmp_path_factory.mktemp("voices")
    rng = np.random.default_rng(0)
    time = np.arange(RATE // 2) / RATE
    for speaker in range(6):
        (root / "wav" / f"s{speaker}" / "0").mkdir(parents=True)
        for utterance in range(4):
            pitch = 120 + 40 * speaker + rng.normal(0, 3)
            wave = sum(np.sin(2 * np.pi * pitch * k * time) / k for k in range(1, 12))
            wave = 0.1 * wave + 0.02 * rng.standard_normal(len(time))
            soundfile.write(root / "wav" / f"s{speaker}" / "0" / f"{utterance}.wav", wave, RATE)
    (root / "trials.txt").write_text("1 s4/0/0.wav s4/0/1.wav\n0 s4/0/0.wav s5/0/0.wav\n")
    return root


# Long and clean enough that any seed learns the six voices (20 tried: 2.5 times less loss at least)
LEARNS = {"batch_size": 8, "number_of_epochs": 12, "final_lr": 0.05, "wav_augment": None}


# One block of ECAPA-TDNN's three, at two scales of its eight: what is tested is the Brain
NETWORK = (
    "{{channels: [{0}, {0}, 24], kernel_sizes: [5, 3, 1], dilations: [1, 2, 1], groups: [1, 1, 1], "
    "res2net_scale: 2}}"
)


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A Brain after an epoch, and the recordings to test on."""
    fit, brain, test = make_brain(folder, tmp_path_factory.mktemp("trained"), number_of_epochs=1)
    fit()
    return brain, test


@pytest.fixture
def extracting(trained):
    """The same, for a test that looks at extractions alone: nothing is embedded yet."""
    brain, _ = trained
    kind = type(brain)
    shutil.rmtree(Path(brain.checkpointer.checkpoints_dir) / "embeddings", ignore_errors=True)
    yield trained
    brain.__class__ = kind


@pytest.fixture
def copied(folder, tmp_path):
    """The voices and the recordings to test on, which a test may change."""
    voices = shutil.copytree(folder, tmp_path / "voices")
    corpus = prepare_speech(
        voices, tmp_path / "save", verification_file=voices / "trials.txt", progress=False
    )
    return voices, SpeechDataset(corpus.test, RATE)


def make_brain(folder, output, validate=None, brain_class=SpeakerBrain, run_opts=None, **overrides):
    corpus = prepare_speech(
        folder, output / "save", verification_file=folder / "trials.txt", progress=False
    )
    settings = {
        "embedding_model": NETWORK.format(8),
        "attention_channels": 8,
        "embedding_dim": 16,
        "out_n_neurons": len(corpus.speakers),
        "output_folder": str(output),
        "number_of_epochs": 3,
        "batch_size": 4,
        "sentence_len": 0.3,
        "num_workers": 0,
        "lr_reference_batch": 4,
        "final_lr": 0.01,
        "warmup_epochs": 1,
        **overrides,
    }
    if "channels" in overrides:  # the recipe's own network
        del settings["embedding_model"]
    if "model" in overrides:
        del settings["attention_channels"]
    options = [f"--{key}={'null' if value is None else value}" for key, value in settings.items()]
    experiment = load_experiment([str(RECIPE), *options])
    hparams = experiment.load(ckpt_interval_minutes=0)
    RunFolder(experiment).begin()
    brain = brain_class(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts={"noprogressbar": True, "device": "cpu", **(run_opts or {})},
        checkpointer=hparams["checkpointer"],
        validate=validate,
    )
    epochs = hparams["epoch_counter"]
    train = SpeechDataset(
        corpus.train,
        RATE,
        crop=hparams["sentence_len"],
        labels=class_encoder(corpus.speakers, output / "save" / "label_encoder.txt").lab2ind,
        seed=hparams["seed"],
        epoch=CurrentEpoch(epochs),
    )
    test = SpeechDataset(corpus.test, RATE)

    def fit():
        loaders = {
            "train_loader_kwargs": copy.copy(hparams["train_dataloader"]),
            "valid_loader_kwargs": copy.copy(hparams["test_dataloader"]),
        }
        brain.fit(epochs, train, test if validate else None, **loaders)
        return brain

    return fit, brain, test


def test_trains_logs_and_embeds(folder, tmp_path):
    seen = []

    def validate(embeddings):
        seen.append(set(embeddings))
        return {"eer": 0.25}

    fit, brain, test = make_brain(folder, tmp_path, validate, **LEARNS)
    fit()
    history = brain.history()
    assert [record["epoch"] for record in history] == list(range(1, 13))
    assert history[-1]["loss"] < history[0]["loss"]
    assert 1 <= history[0]["support_mean"] <= history[0]["support_max"] <= 4
    assert history[0]["valid_eer"] == 0.25
    assert seen == [{"s4/0/0.wav", "s4/0/1.wav", "s5/0/0.wav"}] * 12
    assert "support_mean" in (tmp_path / "train_log.txt").read_text()

    embeddings = brain.extract(test, batch_size=1)
    assert embeddings["s4/0/0.wav"].shape == (16,)
    assert embeddings["s4/0/0.wav"].dtype == np.float32


@pytest.mark.parametrize(
    "loss",
    [
        "arcface",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("cosface", "entmax", "sparsemax")),
    ],
)
def test_every_loss_by_one_setting(folder, tmp_path, loss):
    fit, brain, _ = make_brain(folder, tmp_path, loss=loss, **(LEARNS | {"number_of_epochs": 6}))
    fit()
    losses = [record["loss"] for record in brain.history()]
    assert losses[-1] < losses[0]
    assert brain.history()[0]["support_mean"] > 0


class Recorder(SpeakerBrain):
    """Keeps each step's loss; can be killed before a step."""

    kill_at = None

    def fit_batch(self, batch):
        if self.kill_at == (self.hparams.epoch_counter.current, self.step):
            raise Killed
        loss = super().fit_batch(batch)
        self.losses[self.hparams.epoch_counter.current, self.step] = float(loss)
        return loss


def record(folder, output, kill_at=None, every=2, validate=None, run_opts=None, **settings):
    """A run that keeps its losses, killed before a step or by `validate`."""
    torch.manual_seed(0)
    options = {"ckpt_interval_steps": every, **(run_opts or {})}
    fit, brain, _ = make_brain(folder, output, validate, Recorder, options, **settings)
    brain.losses, brain.kill_at = {}, kill_at
    with contextlib.suppress(Killed):
        fit()
    return brain


def assert_same(whole, first, second):
    """Losses, weights and what is said of every epoch."""
    assert first.losses | second.losses == whole.losses
    assert len(second.losses) < len(whole.losses)
    for a, b in zip(whole.modules.parameters(), second.modules.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole.history(), second.history(), strict=True):
        assert a.pop("advice", "") == b.pop("advice", "")
        assert a | {"seconds": 0} == pytest.approx(b | {"seconds": 0}, rel=1e-6)


@pytest.fixture(scope="module", params=["dense", pytest.param("sparse", marks=pytest.mark.slow)])
def whole(request, folder, tmp_path_factory):
    """A run of each head that nothing interrupts."""
    brain = record(folder, tmp_path_factory.mktemp("whole"), head=request.param)
    return request.param, brain


@pytest.mark.parametrize(
    "kill_at",
    [
        (2, 3),
        pytest.param((2, 1), marks=pytest.mark.slow),
        pytest.param((3, 4), marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumes_to_the_same_losses(folder, tmp_path, whole, kill_at):
    head, whole = whole
    first = record(folder, tmp_path / "killed", kill_at, head=head)
    second = record(folder, tmp_path / "killed", head=head)
    assert len(whole.losses) == 12
    assert_same(whole, first, second)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "head"),
    [
        ("adaface", "dense"),
        ("elasticface", "sparse"),
        ("curricularface", "sparse"),
        ("sphereface2", "dense"),
        ("uniface", "sparse"),
    ],
)
def test_what_a_loss_keeps_is_in_the_checkpoint(folder, tmp_path, loss, head):
    """Running norms, draws, the running mean of the targets' cosines; what is learnt."""
    settings = {"loss": loss, "head": head}
    if loss == "elasticface":
        settings["loss_options"] = "{sigma: 0.2}"
    whole = record(folder, tmp_path / "whole", **settings)
    first = record(folder, tmp_path / "killed", (2, 3), **settings)
    second = record(folder, tmp_path / "killed", **settings)
    assert_same(whole, first, second)
    state = whole.hparams.compute_cost.state_dict()
    assert state
    assert state == second.hparams.compute_cost.state_dict()
    for parameter in whole.hparams.compute_cost.parameters():
        assert parameter.item() not in (0, math.log(10 * 4))  # it has moved
        assert parameter in whole.optimizer.state


LAZY = """
import torch
from speechbrain_qmargin import CosFaceLoss


class LazyLoss(CosFaceLoss):
    def objective(self, scores, targets):
        if not hasattr(self, "seen"):
            self.register_buffer("seen", torch.zeros(()))
        self.seen += len(targets)
        return super().objective(scores, targets)
"""


def test_what_a_loss_makes_with_its_first_batch_is_named(folder, tmp_path, monkeypatch):
    """No checkpoint would have it: a resumed run would count from zero."""
    (tmp_path / "lazy_losses.py").write_text(LAZY)
    monkeypatch.syspath_prepend(tmp_path)
    fit, _, _ = make_brain(folder, tmp_path / "run", loss="lazy_losses:LazyLoss")
    with pytest.raises(ValueError, match=r"LazyLoss has seen since its first batch.*__init__"):
        fit()
    sys.modules.pop("lazy_losses")


LENGTHS = """
from speechbrain_qmargin import Loss, Objective


class LengthLoss(Loss):
    settings = ("scale", "pull")

    def __init__(self, scale=16.0, pull=0.5):
        super().__init__(scale=scale, pull=pull)

    def objective(self, scores, targets):
        return Objective(self.scale, move_target=lambda cosines: (1 + self.pull) * cosines)


def schedules():
    return {"pull": lambda epoch, full: full * epoch / 2}
"""


def test_a_loss_without_a_margin_trains_and_has_schedules_of_its_own(folder, tmp_path, monkeypatch):
    (tmp_path / "length_losses.py").write_text(LENGTHS)
    monkeypatch.syspath_prepend(tmp_path)
    settings = {"loss": "length_losses:LengthLoss", "number_of_epochs": 2}
    with pytest.raises(ValueError, match=r"LengthLoss has no margin .*--margin_until_epoch 0"):
        make_brain(
            folder, tmp_path / "risen", margin_from_epoch=1, margin_until_epoch=2, **settings
        )
    settings["loss_schedule"] = "!apply:length_losses.schedules"
    fit, brain, _ = make_brain(folder, tmp_path / "run", **settings)
    fit()
    steps = len(brain._train_loader)
    reached = [0.25 * (1 - 1 / steps), 0.25 * (2 - 1 / steps)]  # before each epoch's last step
    assert [record["pull"] for record in brain.history()] == pytest.approx(reached)
    sys.modules.pop("length_losses")


@pytest.mark.slow
def test_partial_fc_with_sub_centres_resumes_to_the_same_losses(folder, tmp_path):
    """What is drawn is a function of the seed and the step."""
    settings = {"head": "partial", "class_sample_rate": 0.5, "subcentres": 2, "loss": "arcface"}
    whole = record(folder, tmp_path / "whole", **settings)
    first = record(folder, tmp_path / "killed", (2, 3), **settings)
    second = record(folder, tmp_path / "killed", **settings)
    assert_same(whole, first, second)
    assert len(whole.modules.classifier.weight) == 2 * 4


def test_what_a_loss_learns_is_the_same_in_all_processes(folder, tmp_path, monkeypatch):
    """The gradient of the others', here 3 larger, is averaged in."""
    _, brain, _ = make_brain(folder, tmp_path, loss="sphereface2")
    monkeypatch.setattr(type(brain), "_processes", 2)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda grad: grad.mul_(2).add_(3))
    brain.init_optimizers()
    bias = brain.hparams.compute_cost.bias
    assert any(p is bias for group in brain.optimizer.param_groups for p in group["params"])
    (2 * bias).backward()
    assert bias.grad == 3.5
    bias.grad.fill_(torch.nan)
    brain.check_gradients()
    assert bias.grad is None


@pytest.mark.slow
def test_prototypes_are_set_anew_also_by_a_run_that_was_killed(folder, tmp_path):
    """A margin beyond reach leaves every target outside the support: all classes collapse."""
    settings = {"loss": "a3m", "margin": 1.5, "alpha": 2, "reset_after_epochs": [2]}
    settings |= {"lr": 1e-9, "final_lr": 1e-9}
    whole = record(folder, tmp_path / "whole", **settings)
    first = record(folder, tmp_path / "killed", (2, 3), **settings)
    second = record(folder, tmp_path / "killed", **settings)
    assert_same(whole, first, second)
    assert [one.get("prototypes_reset") for one in whole.history()] == [None, 4, None]
    assert "prototypes set to the mean" in (tmp_path / "whole" / "log.txt").read_text()


@pytest.mark.slow
def test_settings_out_of_reach_are_named_once(folder, tmp_path):
    fit, brain, _ = make_brain(folder, tmp_path, margin=1, number_of_epochs=2, training_samples=32)
    fit()
    first, second = brain.history()
    assert first["advice"].startswith("out of reach: no sample can be at zero loss")
    assert "--alpha 1.25 --scale 20 --margin 0.2" in first["advice"]
    assert "advice" not in second
    assert (tmp_path / "log.txt").read_text().count("qmargin is out of reach") == 1


def test_a_recipe_with_other_names_gets_no_advice():
    brain = VerificationBrain.__new__(VerificationBrain)
    brain.hparams = SimpleNamespace(compute_cost=None, out_n_neurons=5, lin_neurons=192)
    assert brain._advise(0.0) is None


def test_a_reset_that_cannot_be_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="one prototype per class"):
        make_brain(folder, tmp_path, loss="a3m", reset_after_epochs=[1], subcentres=2)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["dense", "sparse"])
def test_autocast_learns_and_resumes(folder, tmp_path, head):
    settings = {"head": head, "run_opts": {"precision": "bf16"}, "every": 1}
    settings |= LEARNS | {"number_of_epochs": 6}
    whole = record(folder, tmp_path / "whole", **settings)
    assert whole.history()[-1]["loss"] < whole.history()[0]["loss"]
    assert all(p.dtype == torch.float32 for p in whole.modules.parameters())
    first = record(folder, tmp_path / "killed", (4, 2), **settings)
    assert_same(whole, first, record(folder, tmp_path / "killed", **settings))


@pytest.mark.slow
def test_a_run_killed_between_its_last_step_and_its_epochs_checkpoint_resumes(folder, tmp_path):
    def killed(_):
        raise Killed

    def measured(_):
        return {"eer": 0.5}

    whole = record(folder, tmp_path / "whole", every=4, validate=measured)
    first = record(folder, tmp_path / "killed", every=4, validate=killed)
    assert set(first.losses) == {(1, step) for step in (1, 2, 3, 4)}
    assert_same(whole, first, record(folder, tmp_path / "killed", every=4, validate=measured))


@pytest.mark.slow
def test_a_run_that_accumulates_gradients_resumes_between_two_steps(folder, tmp_path):
    settings = {"batch_size": 2, "every": 3, "loss": "cosface"}
    settings |= {"run_opts": {"grad_accumulation_factor": 2}}
    settings |= {"margin_from_epoch": 3, "margin_until_epoch": 4}
    margins = []

    class Watched(SpeakerBrain):
        def compute_objectives(self, *args):
            margins.append(self.hparams.compute_cost.margin)
            return super().compute_objectives(*args)

    whole = record(folder, tmp_path / "whole", **settings)
    first = record(folder, tmp_path / "killed", (2, 6), **settings)
    assert_same(whole, first, record(folder, tmp_path / "killed", **settings))
    fit, _, _ = make_brain(
        folder,
        tmp_path / "margins",
        brain_class=Watched,
        run_opts={"grad_accumulation_factor": 2},
        batch_size=2,
        margin_from_epoch=3,
        margin_until_epoch=4,
    )
    fit()
    assert margins[:16] == [0] * 16  # the first batches of a start too
    assert margins[18] == margins[19] > margins[17] == margins[16] == 0


@pytest.mark.slow
def test_time_goes_on_when_a_run_goes_on_with_other_batches(folder, tmp_path):
    settings = {"number_of_epochs": 4, "lr": 0.1, "margin_from_epoch": 1, "margin_until_epoch": 4}
    whole = record(folder, tmp_path / "whole", batch_size=2, **settings)
    record(folder, tmp_path / "moved", kill_at=(2, 3), batch_size=4, **settings)
    moved = record(folder, tmp_path / "moved", batch_size=2, **settings)
    # two of the four batches of 4 were done: four of the eight of 2 are left
    assert min(moved.losses) == (2, 5)
    assert len(moved.losses) == 4 + 2 * 8
    for name in ("margin", "lr"):
        there, here = ([entry[name] for entry in run.history()] for run in (whole, moved))
        assert here[1:] == pytest.approx(there[1:])


def test_alpha_and_scale_change_by_schedule(folder, tmp_path):
    settings = {"alpha_initial": 1.0, "alpha_until_epoch": 3, "scale_initial": 20.0}
    fit, brain, _ = make_brain(folder, tmp_path, scale_until_epoch=2, **settings)
    fit()
    history = brain.history()  # at the last of four steps
    assert [entry["alpha"] for entry in history] == pytest.approx([1.1875, 1.4375, 1.5])
    assert [entry["scale"] for entry in history] == pytest.approx([12.5, 10, 10])


@pytest.mark.parametrize(
    ("settings", "run_opts", "alone"),
    [
        ({}, {}, False),
        ({}, {"remove_vector_weight_decay": True}, False),  # of which SpeechBrain clips a part
        ({"head": "sparse"}, {}, False),
        ({"encoder_lr": 0.5}, {}, True),
    ],
)
def test_one_norm_is_clipped_whatever_the_groups(folder, tmp_path, settings, run_opts, alone):
    most, norms = 0.01, []

    class Watched(SpeakerBrain):
        def freeze_optimizers(self, optimizers):
            self.before = gradients_of(self)
            return super().freeze_optimizers(optimizers)

        def _clip_gradients(self):
            super()._clip_gradients()
            after = gradients_of(self)
            clipped = [name for name in after if not alone or name.startswith("embedding_model")]
            norm = torch.cat([self.before[name].flatten() for name in clipped]).norm()
            for name, before in self.before.items():
                share = min(1, most / norm) if name in clipped else 1
                torch.testing.assert_close(after[name], before * share)
            norms.append(norm)

    options = run_opts | {"max_grad_norm": most}
    fit, _, _ = make_brain(folder, tmp_path, None, Watched, options, number_of_epochs=1, **settings)
    fit()
    assert len(norms) == 4
    assert min(norms) > most


def gradients_of(brain):
    named = brain.modules.named_parameters()
    return {name: p.grad.clone().to_dense() for name, p in named if p.grad is not None}


def test_an_interrupted_extraction_goes_on(extracting):
    brain, test = extracting
    whole = brain.extract(test, batch_size=1)
    shutil.rmtree(Path(brain.checkpointer.checkpoints_dir) / "embeddings")
    names = []

    class Interrupted(type(brain)):
        def embed(self, batch, stage):
            names.extend(batch.id)
            if len(names) == 3:
                raise Killed
            return super().embed(batch, stage)

    brain.__class__ = Interrupted
    with pytest.raises(Killed):
        brain.extract(test, batch_size=1)
    again = brain.extract(test, batch_size=1)
    assert names[2:] == [names[2], *names[3:]]
    assert len(names) == len(whole) + 1
    for name, row in whole.items():
        np.testing.assert_array_equal(again[name], row)


def test_other_audio_under_an_id_is_embedded_anew(extracting, copied):
    (brain, _), (voices, test) = extracting, copied
    before = brain.extract(test, batch_size=1)
    file = voices / "wav/s4/0/0.wav"
    signal, _ = soundfile.read(file)
    soundfile.write(file, signal[::-1], RATE)
    after = brain.extract(test, batch_size=1)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"s4/0/0.wav"}


def test_unreadable_test_items_are_named_once_the_others_are_kept(extracting, copied, folder):
    (brain, _), (voices, test) = extracting, copied
    (voices / "wav/s4/0/1.wav").write_bytes(b"no audio")
    with pytest.raises(OSError, match=r"1 of 3 test items have no embedding, .*s4/0/1\.wav"):
        brain.extract(test, batch_size=1)
    faults = {}
    found = brain.extract(test, faults, batch_size=2)
    assert set(found) == {"s4/0/0.wav", "s5/0/0.wav"}
    assert set(faults) == {"s4/0/1.wav"}
    shutil.copy(folder / "wav/s4/0/1.wav", voices / "wav/s4/0/1.wav")
    assert len(brain.extract(test, batch_size=1)) == 3


def test_an_embedding_that_is_not_finite_is_named_before_scoring(extracting):
    brain, test = extracting

    class Odd(type(brain)):
        def embed(self, batch, stage):
            factor = torch.where(torch.tensor([one[0] == "s5/0/0.wav" for one in [batch.id]]),
                                 torch.nan, 1.0)  # fmt: skip
            return super().embed(batch, stage) * factor[:, None, None]

    brain.__class__ = Odd
    with pytest.raises(OSError, match=r"first is s5/0/0\.wav: its embedding is not finite"):
        brain.extract(test, batch_size=1)


def test_a_damaged_line_of_the_history_is_named_and_left_out(tmp_path, monkeypatch):
    brain, said = VerificationBrain.__new__(VerificationBrain), []
    brain.hparams = SimpleNamespace(output_folder=tmp_path)
    for epoch in (1, 2, 3):
        history.write_history(tmp_path / "history.jsonl", {"epoch": epoch, "seconds": 1.0})
    monkeypatch.setattr(history.logger, "warning", said.append)
    file = tmp_path / "history.jsonl"
    lines = file.read_text().splitlines()
    for damaged in ("", lines[1][:20], "[]", "{}", "7"):
        file.write_text("\n".join([lines[0], damaged, lines[2]]) + "\n")
        assert [record["epoch"] for record in brain.history()] == [1, 3]
        assert f"{file}:2: damaged" in said.pop()


def test_learning_rate_follows_the_schedule_whatever_the_accumulation(folder, tmp_path):
    rates = {}
    for accumulation in (1, 2):
        fit, brain, _ = make_brain(
            folder,
            tmp_path / str(accumulation),
            batch_size=4 // accumulation,
            number_of_epochs=2,
            run_opts={"grad_accumulation_factor": accumulation},
        )
        fit()
        rates[accumulation] = [record["lr"] for record in brain.history()]
    assert rates[1] == pytest.approx(rates[2], rel=1e-6)
    assert rates[1][0] > rates[1][1]


def test_a_batch_larger_than_the_data_is_named(folder, tmp_path):
    fit, _, _ = make_brain(folder, tmp_path, batch_size=64)
    with pytest.raises(ValueError, match="16 training items make no full batch of 64"):
        fit()


def test_stage_without_embed_is_abstract():
    from speechbrain_qmargin.training.brain import VerificationBrain

    with pytest.raises(NotImplementedError):
        VerificationBrain.embed(None, None, sb.Stage.TRAIN)


def test_the_margin_follows_its_schedule_and_is_logged(folder, tmp_path):
    schedule = {"margin_from_epoch": 2, "margin_until_epoch": 3}
    for loss in ("qmargin", "arcface"):
        fit, brain, _ = make_brain(folder, tmp_path / loss, loss=loss, margin=0.3, **schedule)
        fit()
        # the last of four steps of each epoch
        seen = [record["margin"] for record in brain.history()]
        assert seen == pytest.approx([0, 0.3 * (1 - 1e-3**0.75), 0.3])
    assert brain.hparams.compute_cost.margin == pytest.approx(0.3)


def test_results_name_the_margin_that_was_reached_whichever_process_trained(folder, tmp_path):
    """A schedule may end after the training, and results be written by a later start."""
    schedule = {"margin_from_epoch": 1, "margin_until_epoch": 9, "number_of_epochs": 2}
    fit, brain, _ = make_brain(folder, tmp_path, margin=0.3, **schedule)
    fit()
    reached = 0.3 * (1 - 1e-3 ** (1.75 / 8))  # before the last of four steps of the second epoch
    fit, resumed, _ = make_brain(folder, tmp_path, margin=0.3, **schedule)
    fit()
    assert resumed.epochs_trained == 0
    for each in (brain, resumed):
        found = each.loss_values()
        assert found == pytest.approx({"alpha": 1.5, "scale": 10.0, "margin": reached})
    said = "2 epochs end with margin 0.247, on the way to 0.3"  # 0.3 (1 - e^(-ln(1000) / 4))
    assert said in (tmp_path / "log.txt").read_text()


def test_the_last_epochs_are_averaged(folder, tmp_path):
    fit, brain, test = make_brain(folder, tmp_path, average_checkpoints=2, lr=0.05)
    fit()
    found = sorted((tmp_path / "save").glob("CKPT+*"))
    assert len(found) == 2
    states = [torch.load(one / "embedding_model.ckpt", weights_only=True) for one in found]
    brain.extract(test, batch_size=1)
    for key, value in brain.hparams.embedding_model.state_dict().items():
        first, last = (state[key] for state in states)
        wanted = (first.double() + last.double()) / 2 if value.is_floating_point() else last
        torch.testing.assert_close(value, wanted.to(value.dtype), msg=key)


def test_fine_tuning_starts_from_the_runs_average(folder, tmp_path):
    first = tmp_path / "first"
    fit, brain, test = make_brain(folder, first, average_checkpoints=2, number_of_epochs=2)
    fit()
    before = brain.extract(test, batch_size=1)
    start = {"pretrained": str(first), "pretrained_classes": "keep"}
    _, tuned, test = make_brain(folder, tmp_path / "second", **start)
    load_pretrained(vars(tuned.hparams))
    tuned.checkpointer = None
    tuned.modules.eval()
    with torch.no_grad():
        batch = sb.dataio.batch.PaddedBatch([test[0]])
        now = tuned.compute_forward(batch, sb.Stage.TEST).flatten().numpy()
    np.testing.assert_allclose(now, before[test[0]["id"]], rtol=1e-4, atol=1e-5)


def test_a_classifier_in_shards_is_not_compiled(folder, tmp_path, monkeypatch):
    """Wrapped, its weight has another name than the one that DDP is to leave to each process."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module, **_: compiled.append(module) or module)
    _, brain, _ = make_brain(folder, tmp_path, head="sparse", run_opts={"compile": True})
    brain._compile()
    modules = brain.modules
    others = [modules[name] for name in ("compute_features", "mean_var_norm", "embedding_model")]
    assert {*map(id, compiled)} == {*map(id, others)}


@pytest.mark.slow
def test_pretraining_that_does_not_fit_is_named(folder, tmp_path, trained):
    first = shutil.copytree(trained[0].hparams.output_folder, tmp_path / "first")
    there = first / "save" / "label_encoder.txt"

    def load(**start):
        _, brain, _ = make_brain(folder, tmp_path / "second", **start)
        load_pretrained(vars(brain.hparams))

    load(pretrained=str(first), pretrained_classes="first")
    with pytest.raises(ValueError, match="'all'; choose keep, first or none"):
        load(pretrained=str(first), pretrained_classes="all")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(pretrained="nowhere", pretrained_classes="none")
    other = {"pretrained_classes": "none", "embedding_model": NETWORK.format(16)}
    with pytest.raises(ValueError, match=r"(?s)first was trained with another model.*blocks"):
        load(pretrained=str(first), **other)
    there.write_text(there.read_text().replace("s1", "somebody"))
    with pytest.raises(ValueError, match="trained on other classes"):
        load(pretrained=str(first), pretrained_classes="keep")
    load(pretrained=str(first), pretrained_classes="none")
    record(folder, tmp_path / "begun", kill_at=(1, 3))
    with pytest.raises(FileNotFoundError, match=r"begun.*no checkpoint of a finished epoch"):
        load(pretrained=str(tmp_path / "begun"), pretrained_classes="none")


def test_the_sparse_heads_first_classes_are_kept(folder, tmp_path):
    first = tmp_path / "first"
    fit, brain, _ = make_brain(folder, first, head="sparse", out_n_neurons=12, number_of_epochs=1)
    fit()
    options = {"pretrained": str(first), "pretrained_classes": "first"}
    _, tuned, _ = make_brain(folder, tmp_path / "second", head="sparse", **options)
    load_pretrained(vars(tuned.hparams))
    there, here = (run.modules["classifier"].weight for run in (brain, tuned))
    assert here.shape[0] == 4
    assert torch.equal(here, there[:4])


@pytest.mark.slow
def test_tensorboard_by_one_setting(folder, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for epochs in (2, 2):  # the second start adds nothing
        fit, _, _ = make_brain(folder, tmp_path, logger="tensorboard", number_of_epochs=epochs)
        fit()
    found = events.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [event.step for event in found.Scalars("loss/train")] == [1, 2]
    assert "support_mean/train" in found.Tags()["scalars"]


def test_gradients_that_are_not_finite_are_left_out_row_sparse_ones_too():
    head, encoder = QMarginHead(4, 30, sparse_grad=True), torch.nn.Linear(4, 4)
    modules = torch.nn.ModuleDict({"classifier": head, "encoder": encoder})
    brain = SimpleNamespace(modules=modules, hparams=SimpleNamespace(), _sharded_head=head)
    head(encoder(torch.randn(3, 4)), torch.arange(3)).backward()
    with Counted() as counted:
        VerificationBrain.check_gradients(brain)
    assert counted.waits <= 1  # of the host for a GPU, however many parameters there are
    assert head.weight.grad is not None
    head.weight.grad._values()[0, 0] = float("nan")
    VerificationBrain.check_gradients(brain)
    assert head.weight.grad is None
    assert encoder.weight.grad is not None


def test_losses_that_are_not_finite_end_a_run_whose_patience_is_over(folder, tmp_path):
    settings = {"number_of_epochs": 1, "run_opts": {"nonfinite_patience": 1}}
    fit, brain, _ = make_brain(folder, tmp_path, **settings)
    before = [parameter.clone() for parameter in brain.modules.parameters()]
    brain.compute_objectives = lambda outputs, *_: outputs.cosines().sum() * torch.nan
    with pytest.raises(
        ValueError, match=r"epoch 1, step 2: the loss is not finite, as 2 .*lower --lr"
    ):
        fit()
    log = (tmp_path / "log.txt").read_text()
    assert "epoch 1, step 1: the loss is not finite, and the step is left out (1 of 1 " in log
    assert all(map(torch.equal, before, brain.modules.parameters()))


class Spoilt(Recorder):
    """Meets a NaN in some steps, and keeps what was there before and after each step."""

    spoilt_at = ()

    def state(self):
        state = {**self.modules.state_dict()}
        for number, optimizer in enumerate(self.optimizers_dict.values()):
            for key, slots in enumerate(optimizer.state.values()):
                state |= {(number, key, slot): value for slot, value in slots.items()}
        return {
            key: torch.as_tensor(value).clone()
            for key, value in state.items()
            if not str(key).endswith("num_batches_tracked")
        }

    def fit_batch(self, batch):
        if self.step in self.spoilt_at:
            batch.sig.data[1, 7] = torch.nan
        before = self.state()
        loss = super().fit_batch(batch)
        after = self.state()
        self.changed.append(
            before.keys() != after.keys()
            or not all(torch.equal(before[key], after[key]) for key in before)
        )
        return loss


@pytest.mark.parametrize("head", ["dense", "sparse"])
@pytest.mark.parametrize(("accumulated", "left_out"), [(1, {3}), (2, {3, 4})])
def test_a_batch_that_is_not_finite_leaves_no_trace(folder, tmp_path, head, accumulated, left_out):
    """Nor do those whose gradients are summed with its own."""
    settings = {"number_of_epochs": 1, "batch_size": 2, "head": head, "momentum": 0.9}
    options = {"grad_accumulation_factor": accumulated}
    fit, brain, _ = make_brain(folder, tmp_path, None, Spoilt, options, **settings)
    brain.losses, brain.changed, brain.spoilt_at = {}, [], (3,)
    fit()
    steps = range(1, 9)
    assert [step for step in steps if math.isnan(brain.losses[1, step])] == [3]
    finite = [loss for loss in brain.losses.values() if not math.isnan(loss)]
    if accumulated == 1:
        assert [step for step in steps if not brain.changed[step - 1]] == [3]
    else:  # between the steps the running statistics move
        assert not brain.changed[3 - 1]
        assert brain.optimizer_step == 3
    (record,) = brain.history()
    assert record["support_mean"] >= 1
    assert all(map(math.isfinite, (record["loss"], record["zero_loss"])))
    assert len(finite) == 7
    assert all(value.isfinite().all() for value in brain.modules.state_dict().values())


def test_a_batch_that_its_epoch_drops_spoils_no_step_of_the_next(folder, tmp_path):
    """Of 8 batches, three a step, the last two make none: what is wrong with them is gone, too."""
    settings = {"number_of_epochs": 2, "batch_size": 2}
    options = {"grad_accumulation_factor": 3}
    fit, brain, _ = make_brain(folder, tmp_path, None, Spoilt, options, **settings)
    brain.losses, brain.changed, brain.spoilt_at = {}, [], (8,)
    fit()
    assert brain.optimizer_step == 4


def test_a_scaler_of_gradients_takes_an_encoder_that_is_frozen(folder, tmp_path):
    """--precision fp16 on a GPU: GradScaler refuses an optimiser without any gradient."""
    settings = {"head": "sparse", "freeze": "all", "number_of_epochs": 1, "margin": 0.0}
    fit, brain, _ = make_brain(folder, tmp_path, **settings)
    brain.scaler = torch.amp.GradScaler("cpu")
    brain.checkpointer.add_recoverable("scaler", brain.scaler, optional_load=True)
    before = copy.deepcopy(brain.modules.state_dict())
    fit()
    moved = {
        key for key, value in brain.modules.state_dict().items() if (value != before[key]).any()
    }
    assert moved == {"classifier.weight"}
    assert brain.scaler.get_scale() == 2.0**16


def test_batches_for_a_gpu_are_pinned(folder, tmp_path):
    _, brain, test = make_brain(folder, tmp_path)
    assert not brain.make_dataloader(test, sb.Stage.VALID).pin_memory
    brain.device = "cuda:0"
    assert brain.make_dataloader(test, sb.Stage.VALID).pin_memory
    assert not brain.make_dataloader(test, sb.Stage.VALID, pin_memory=False).pin_memory


def test_the_order_of_an_epoch_is_speechbrains_and_held_in_numpys_numbers(
    folder, tmp_path, monkeypatch
):
    """As Python's numbers that of 20 million items would take most of a gigabyte."""
    _, brain, _ = make_brain(folder, tmp_path)
    monkeypatch.setenv("SB_GLOBAL_SEED", "3")
    loader = brain.make_dataloader([*range(50)], sb.Stage.TRAIN, shuffle=True, batch_size=1)
    theirs = ReproducibleRandomSampler(range(50), seed=3)
    assert isinstance(loader.sampler, SharedOrder)
    assert brain.train_sampler is loader.sampler
    for epoch in (1, 2):
        brain.train_sampler.set_epoch(epoch)
        theirs.set_epoch(epoch)
        assert list(loader.sampler) == list(theirs)
