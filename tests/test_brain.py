"""The Brain on a handful of utterances: it learns, logs, resumes exactly."""

import contextlib
import copy
from pathlib import Path

import numpy as np
import pytest
import soundfile
import speechbrain as sb
import torch

from speechbrain_qmargin.brain import SpeakerBrain, load_pretrained
from speechbrain_qmargin.data.classes import class_encoder
from speechbrain_qmargin.data.speech import prepare_speech, speech_dataset
from speechbrain_qmargin.experiment import load_experiment

RECIPE = Path(__file__).parent.parent / "hparams" / "qmargin.yaml"
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


class Killed(Exception):
    pass


def make_brain(folder, output, validate=None, brain_class=SpeakerBrain, run_opts=None, **overrides):
    corpus = prepare_speech(
        folder, output / "save", verification_file=folder / "trials.txt", progress=False
    )
    settings = {
        "channels": 8,
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
    options = [f"--{key}={'null' if value is None else value}" for key, value in settings.items()]
    hparams = load_experiment([str(RECIPE), *options]).load(ckpt_interval_minutes=0)
    brain = brain_class(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts={"noprogressbar": True, "device": "cpu", **(run_opts or {})},
        checkpointer=hparams["checkpointer"],
        validate=validate,
    )
    epochs = hparams["epoch_counter"]
    train = speech_dataset(
        corpus.train,
        RATE,
        crop=hparams["sentence_len"],
        label_encoder=class_encoder(corpus.speakers, output / "save" / "label_encoder.txt"),
        seed=hparams["seed"],
        epoch=lambda: epochs.current,
    )
    test = speech_dataset(corpus.test, RATE)

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


@pytest.mark.parametrize("loss", ["arcface", "cosface", "entmax", "sparsemax"])
def test_every_loss_by_one_setting(folder, tmp_path, loss):
    fit, brain, _ = make_brain(folder, tmp_path, loss=loss, **LEARNS)
    fit()
    losses = [record["loss"] for record in brain.history()]
    assert losses[-1] < losses[0]
    assert ("support_mean" in brain.history()[0]) == (loss != "arcface")


class Recorder(SpeakerBrain):
    """Keeps each step's loss; can be killed before a step."""

    kill_at = None

    def fit_batch(self, batch):
        if self.kill_at == (self.hparams.epoch_counter.current, self.step):
            raise Killed
        loss = super().fit_batch(batch)
        self.losses[self.hparams.epoch_counter.current, self.step] = float(loss)
        return loss


@pytest.mark.parametrize("head", ["dense", "sparse"])
@pytest.mark.parametrize("kill_at", [(2, 1), (2, 3), (3, 4)])
def test_a_killed_run_resumes_to_the_same_losses(folder, tmp_path, kill_at, head):
    def run(output, kill_at=None):
        torch.manual_seed(0)
        fit, brain, _ = make_brain(
            folder, output, brain_class=Recorder, run_opts={"ckpt_interval_steps": 2}, head=head
        )
        brain.losses, brain.kill_at = {}, kill_at
        with contextlib.suppress(Killed):
            fit()
        return brain

    whole = run(tmp_path / "whole")
    first = run(tmp_path / "killed", kill_at)
    second = run(tmp_path / "killed")
    assert len(whole.losses) == 12
    assert first.losses | second.losses == whole.losses
    assert len(second.losses) < 12
    for a, b in zip(whole.modules.parameters(), second.modules.parameters(), strict=True):
        assert torch.equal(a, b)


def test_learning_rate_follows_the_schedule_whatever_the_accumulation(folder, tmp_path):
    rates = {}
    for accumulation in (1, 2):
        fit, brain, _ = make_brain(
            folder,
            tmp_path / str(accumulation),
            batch_size=4 // accumulation,
            run_opts={"grad_accumulation_factor": accumulation},
        )
        fit()
        rates[accumulation] = [record["lr"] for record in brain.history()]
    assert rates[1] == pytest.approx(rates[2], rel=1e-6)
    assert rates[1][0] > rates[1][2]


def test_a_batch_larger_than_the_data_is_named(folder, tmp_path):
    fit, _, _ = make_brain(folder, tmp_path, batch_size=64)
    with pytest.raises(ValueError, match="16 training items make no full batch of 64"):
        fit()


def test_stage_without_embed_is_abstract():
    from speechbrain_qmargin.brain import VerificationBrain

    with pytest.raises(NotImplementedError):
        VerificationBrain.embed(None, None, sb.Stage.TRAIN)


def test_the_margin_follows_its_schedule_and_is_logged(folder, tmp_path):
    schedule = {"margin_from_epoch": 1, "margin_until_epoch": 2}
    for loss in ("qmargin", "arcface"):
        fit, brain, _ = make_brain(folder, tmp_path / loss, loss=loss, margin=0.3, **schedule)
        fit()
        # the last of four steps of each epoch
        seen = [record["margin"] for record in brain.history()]
        assert seen == pytest.approx([0, 0.3 * (1 - 1e-3**0.75), 0.3])
    assert brain.hparams.compute_cost.loss_fn.cos_m == pytest.approx(np.cos(0.3))


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
    fit, brain, test = make_brain(folder, first, average_checkpoints=2)
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


def test_pretraining_that_does_not_fit_is_named(folder, tmp_path):
    first = tmp_path / "first"
    make_brain(folder, first, number_of_epochs=1)[0]()
    there = first / "save" / "label_encoder.txt"

    def load(**start):
        _, brain, _ = make_brain(folder, tmp_path / "second", **start)
        load_pretrained(vars(brain.hparams))

    load(pretrained=str(first), pretrained_classes="first")
    with pytest.raises(ValueError, match="'all'; choose keep, first or none"):
        load(pretrained=str(first), pretrained_classes="all")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(pretrained="nowhere", pretrained_classes="none")
    there.write_text(there.read_text().replace("s1", "somebody"))
    with pytest.raises(ValueError, match="trained on other classes"):
        load(pretrained=str(first), pretrained_classes="keep")
    load(pretrained=str(first), pretrained_classes="none")


def test_tensorboard_by_one_setting(folder, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for epochs in (2, 2):  # the second start adds nothing
        fit, _, _ = make_brain(folder, tmp_path, logger="tensorboard", number_of_epochs=epochs)
        fit()
    found = events.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [event.step for event in found.Scalars("loss/train")] == [1, 2]
    assert "support_mean/train" in found.Tags()["scalars"]
