"""Output folders of runs as training leaves them, with random weights."""

import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.checkpoints import Checkpointer

SPEECH = """
sample_rate: 16000
compute_features: !new:speechbrain.lobes.features.Fbank
    n_mels: 20
mean_var_norm: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
    std_norm: False
embedding_model: !new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN
    input_size: 20
    channels: [8, 8, 8, 8, 24]
    attention_channels: 8
    lin_neurons: 16
modules:
    compute_features: !ref <compute_features>
    mean_var_norm: !ref <mean_var_norm>
    embedding_model: !ref <embedding_model>
"""
FACES = """
image_size: 32
test_flip: True
embedding_model: &id001 !new:speechbrain_qmargin.models.mobilefacenet.MobileFaceNet
    embedding_dim: 8
    image_size: 32
modules:
    embedding_model: *id001
"""


def speech_run(folder, seed=0):
    """A run of ``recipes/voxceleb/train.py``."""
    torch.manual_seed(seed)
    return _saved(folder, SPEECH, load_hyperpyyaml(SPEECH)["embedding_model"])


def face_run(folder):
    """A run of ``recipes/face/train.py``; its normalisations have statistics of some images."""
    torch.manual_seed(0)
    model = load_hyperpyyaml(FACES)["embedding_model"]
    for module in model.modules():
        if hasattr(module, "momentum"):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.rand(16, 3, 32, 32) * 2 - 1)
    return _saved(folder, FACES, model)


def _saved(folder, yaml, model):
    (folder / "save").mkdir(parents=True)
    (folder / "hyperparams.yaml").write_text(yaml)
    checkpointer = Checkpointer(folder / "save", {"embedding_model": model})
    checkpointer.save_checkpoint(end_of_epoch=True)
    return folder
