"""An upstream SpeechBrain recipe takes the loss from the command line, unmodified.

The YAML and the Brain below have the structure of SpeechBrain's
recipes/VoxCeleb/SpeakerRec (train_ecapa_tdnn.yaml, train_speaker_embeddings.py), small.
"""

import re

import numpy as np
import pytest
import soundfile
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio import audio_io
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.encoder import CategoricalEncoder

from speechbrain_qmargin import QMarginLoss

YAML = """
seed: 1986
__set_seed: !apply:speechbrain.utils.seed_everything [!ref <seed>]
number_of_epochs: 6
n_mels: 80
out_n_neurons: 3

compute_features: !new:speechbrain.lobes.features.Fbank
    n_mels: !ref <n_mels>
mean_var_norm: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
    std_norm: False
embedding_model: !new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN
    input_size: !ref <n_mels>
    channels: [16, 16, 16, 16, 48]
    kernel_sizes: [5, 3, 3, 3, 1]
    dilations: [1, 2, 3, 4, 1]
    attention_channels: 16
    lin_neurons: 24
classifier: !new:speechbrain.lobes.models.ECAPA_TDNN.Classifier
    input_size: 24
    out_neurons: !ref <out_n_neurons>
epoch_counter: !new:speechbrain.utils.epoch_loop.EpochCounter
    limit: !ref <number_of_epochs>

drop_chunk: !new:speechbrain.augment.time_domain.DropChunk
    drop_length_low: 100
    drop_length_high: 200
wav_augment: !new:speechbrain.augment.augmenter.Augmenter
    parallel_augment: True
    concat_original: True
    augmentations: [!ref <drop_chunk>]

modules:
    compute_features: !ref <compute_features>
    embedding_model: !ref <embedding_model>
    classifier: !ref <classifier>
    mean_var_norm: !ref <mean_var_norm>

compute_cost: !new:speechbrain.nnet.losses.LogSoftmaxWrapper
    loss_fn: !new:speechbrain.nnet.losses.AdditiveAngularMargin
        margin: 0.2
        scale: 30

opt_class: !name:torch.optim.Adam
    lr: 0.003
error_stats: !name:speechbrain.utils.metric_stats.MetricStats
    metric: !name:speechbrain.nnet.losses.classification_error
        reduction: batch
"""


class SpeakerBrain(sb.core.Brain):
    """As the upstream recipe calls its loss."""

    def compute_forward(self, batch, stage):
        batch = batch.to(self.device)
        wavs, lens = batch.sig
        if stage == sb.Stage.TRAIN:
            wavs, lens = self.hparams.wav_augment(wavs, lens)
        feats = self.modules.compute_features(wavs)
        feats = self.modules.mean_var_norm(feats, lens)
        embeddings = self.modules.embedding_model(feats)
        return self.modules.classifier(embeddings), lens

    def compute_objectives(self, predictions, batch, stage):
        predictions, lens = predictions
        spkid, _ = batch.spk_id_encoded
        if stage == sb.Stage.TRAIN:
            spkid = self.hparams.wav_augment.replicate_labels(spkid)
        self.dtypes.add(predictions.dtype)
        loss = self.hparams.compute_cost(predictions, spkid, lens)
        if stage != sb.Stage.TRAIN:
            self.error_metrics.append(batch.id, predictions, spkid, lens)
        return loss

    def on_stage_start(self, stage, epoch=None):
        self.error_metrics = self.hparams.error_stats()

    def on_stage_end(self, stage, stage_loss, epoch=None):
        if stage == sb.Stage.TRAIN:
            self.losses.append(stage_loss)
        else:
            self.errors.append(self.error_metrics.summarize("average"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wav")
    rng = np.random.default_rng(0)
    time = np.arange(8000) / 16000
    items = {}
    for speaker in range(3):
        for utterance in range(4):
            tone = np.sin(2 * np.pi * (150 + 200 * speaker) * (1 + 0.01 * utterance) * time)
            path = folder / f"{speaker}_{utterance}.wav"
            soundfile.write(path, 0.1 * tone + 0.01 * rng.standard_normal(len(time)), 16000)
            items[path.stem] = {"wav": str(path), "spk_id": f"id{speaker}"}

    @sb.utils.data_pipeline.takes("wav")
    @sb.utils.data_pipeline.provides("sig")
    def audio(wav):
        return audio_io.load(wav)[0].squeeze(0)

    encoder = CategoricalEncoder()

    @sb.utils.data_pipeline.takes("spk_id")
    @sb.utils.data_pipeline.provides("spk_id", "spk_id_encoded")
    def label(spk_id):
        yield spk_id
        yield encoder.encode_sequence_torch([spk_id])

    data = DynamicItemDataset(items, [audio, label])
    encoder.load_or_create(folder / "encoder.txt", from_didatasets=[data], output_key="spk_id")
    encoder.expect_len(3)
    data.set_output_keys(["id", "sig", "spk_id_encoded"])
    return data


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_one_flag_swaps_the_loss_of_an_upstream_recipe(dataset, tmp_path, precision):
    recipe = tmp_path / "train_ecapa_tdnn.yaml"
    recipe.write_text(YAML)
    flag = "--compute_cost=!new:speechbrain_qmargin.QMarginLoss"
    options = [str(recipe), flag, "--device=cpu", f"--precision={precision}", "--noprogressbar"]
    hparams_file, run_opts, overrides = sb.parse_arguments(options)
    with open(hparams_file) as file:
        hparams = load_hyperpyyaml(file, overrides)
    assert type(hparams["compute_cost"]) is QMarginLoss

    brain = SpeakerBrain(hparams["modules"], hparams["opt_class"], hparams, run_opts)
    brain.losses, brain.errors, brain.dtypes = [], [], set()
    before = brain.modules.classifier.weight.detach().clone()
    loader = {"batch_size": 6}
    brain.fit(
        hparams["epoch_counter"],
        dataset,
        dataset,
        train_loader_kwargs=dict(loader),
        valid_loader_kwargs=dict(loader),
    )
    assert np.isfinite(brain.losses).all()
    assert brain.losses[-1] < 0.5 * brain.losses[0]
    assert brain.errors[-1] <= brain.errors[0]
    assert not torch.equal(brain.modules.classifier.weight, before)
    assert (torch.bfloat16 in brain.dtypes) == (precision == "bf16")


@pytest.mark.parametrize(
    ("flag", "parameters"),
    [
        ("!new:speechbrain_qmargin.QMarginLoss", (1.5, 10, 0.2)),
        ("!new:speechbrain_qmargin.QMarginLoss [1.75, 5, 0.2]", (1.75, 5, 0.2)),
        ("!new:speechbrain_qmargin.ArcFaceLoss [30, 0.3]", (30, 0.3)),
    ],
)
def test_the_command_line_passes_arguments(tmp_path, flag, parameters):
    recipe = tmp_path / "train_ecapa_tdnn.yaml"
    recipe.write_text(YAML)
    _, _, overrides = sb.parse_arguments([str(recipe), f"--compute_cost={flag}", "--device=cpu"])
    loss = load_hyperpyyaml(YAML, overrides)["compute_cost"]
    assert tuple(getattr(loss, name) for name in loss.settings) == parameters


def test_train_x_vectors_outputs_become_cosines_by_the_flag_that_the_message_gives(tmp_path):
    """Its own classifier ends in log-probabilities."""
    text = (
        YAML
        + """
classifier: !new:speechbrain.lobes.models.Xvector.Classifier
    input_shape: [null, null, 512]
    out_neurons: !ref <out_n_neurons>
"""
    )
    text = text.replace(YAML[YAML.index("classifier: ") : YAML.index("epoch_counter: ")], "", 1)
    embeddings, labels = torch.randn(4, 1, 512), torch.tensor([[0], [2], [1], [1]])
    outputs = load_hyperpyyaml(text)["classifier"](embeddings)
    with pytest.raises(ValueError, match="not logits") as caught:
        QMarginLoss()(outputs, labels)
    flag = re.search(r"--classifier='(.*?)'", str(caught.value)).group(1)
    assert flag == "!new:speechbrain.lobes.models.ECAPA_TDNN.Classifier [512, cpu, 0, 192, 3]"
    recipe = tmp_path / "train_x_vectors.yaml"
    recipe.write_text(text)
    overrides = sb.parse_arguments([str(recipe), f"--classifier={flag}", "--device=cpu"])[2]
    outputs = load_hyperpyyaml(text, overrides)["classifier"](embeddings)
    assert outputs.shape == (4, 1, 3)
    assert QMarginLoss()(outputs, labels) > 0


def test_the_classifier_of_float32_comes_by_a_flag(tmp_path):
    recipe = tmp_path / "train_ecapa_tdnn.yaml"
    recipe.write_text(YAML)
    flag = "--classifier=!new:speechbrain_qmargin.models.classifier.CosineClassifier [24, 3]"
    overrides = sb.parse_arguments([str(recipe), flag, "--device=cpu"])[2]
    classifier = load_hyperpyyaml(YAML, overrides)["modules"]["classifier"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert classifier(torch.randn(2, 1, 24)).dtype == torch.float32


def test_in_the_place_of_loss_fn_alone_it_says_where_it_belongs():
    """The wrapper would take a log-softmax of the loss."""
    text = YAML.replace(
        YAML[YAML.index("    loss_fn:") : YAML.index("opt_class:")],
        "    loss_fn: !new:speechbrain_qmargin.QMarginLoss\n\n",
    )
    wrapped = load_hyperpyyaml(text)["compute_cost"]
    with pytest.raises(ValueError, match=r"LogSoftmaxWrapper.*takes its place, compute_cost: !new"):
        wrapped(torch.rand(4, 1, 3), torch.tensor([[0], [2], [1], [1]]), torch.ones(4))


def test_the_yaml_form_takes_arguments():
    text = "cost: !new:speechbrain_qmargin.QMarginLoss\n    alpha: 1.75\n    scale: 5\n"
    assert load_hyperpyyaml(text)["cost"].alpha == 1.75


def test_a_classifier_of_the_wrong_size_is_named():
    """SpeechBrain stays silent when out_n_neurons and the label set disagree."""
    outputs = torch.rand(4, 1, 3)
    labels = torch.tensor([[0], [2], [3], [1]])
    with pytest.raises(ValueError, match=r"label 3 is outside \[0, 3\).*out_n_neurons"):
        QMarginLoss()(outputs, labels, torch.ones(4))
