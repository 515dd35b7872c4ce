"""Published models with random weights: the true files, folders and names of parameters."""

import torch
import yaml

ECAPA_YAML = """
# Feature parameters
n_mels: 20

# Pretrain folder (HuggingFace)
pretrained_path: speechbrain/spkrec-ecapa-voxceleb

# Output parameters
out_n_neurons: 7205

# Model params
compute_features: !new:speechbrain.lobes.features.Fbank
    n_mels: !ref <n_mels>

mean_var_norm: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
    std_norm: False

embedding_model: !new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN
    input_size: !ref <n_mels>
    channels: [8, 8, 8, 8, 24]
    kernel_sizes: [5, 3, 3, 3, 1]
    dilations: [1, 2, 3, 4, 1]
    attention_channels: 4
    lin_neurons: 12

classifier: !new:speechbrain.lobes.models.ECAPA_TDNN.Classifier
    input_size: 12
    out_neurons: !ref <out_n_neurons>

mean_var_norm_emb: !new:speechbrain.processing.features.InputNormalization
    norm_type: global
    std_norm: False

modules:
    compute_features: !ref <compute_features>
    mean_var_norm: !ref <mean_var_norm>
    embedding_model: !ref <embedding_model>
    mean_var_norm_emb: !ref <mean_var_norm_emb>
    classifier: !ref <classifier>

label_encoder: !new:speechbrain.dataio.encoder.CategoricalEncoder

pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        embedding_model: !ref <embedding_model>
        mean_var_norm_emb: !ref <mean_var_norm_emb>
        classifier: !ref <classifier>
        label_encoder: !ref <label_encoder>
    paths:
        embedding_model: !ref <pretrained_path>/embedding_model.ckpt
        mean_var_norm_emb: !ref <pretrained_path>/mean_var_norm_emb.ckpt
        classifier: !ref <pretrained_path>/classifier.ckpt
        label_encoder: !ref <pretrained_path>/label_encoder.txt
"""


def randomised(model):
    """A network whose statistics and scales are none that a fresh one has; in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    for key, value in model.state_dict().items():
        if key.endswith("running_var"):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        elif value.is_floating_point() and value.ndim == 1 and key != "features.weight":
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model.eval()


def save(state, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


def wespeaker(folder, name, model, dim, bands=80, head=True, **model_args):
    """An experiment's folder as it is published: config.yaml and avg_model.pt."""
    state = dict(model.state_dict())
    if head:
        state["projection.weight"] = torch.zeros(17982, dim)
    save(state, folder / "avg_model.pt")
    config = {
        "model": name,
        "model_args": {"feat_dim": bands, "embed_dim": dim, "pooling_func": "TSTP", **model_args},
        "dataset_args": {
            "resample_rate": 16000,
            "speed_perturb": True,
            "fbank_args": {
                "num_mel_bins": bands,
                "frame_shift": 10,
                "frame_length": 25,
                "dither": 1.0,
            },
        },
        "projection_args": {"project_type": "arc_margin", "scale": 32.0},
        "num_avg": 10,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def huggingface(cache, name, files):
    """The cache's layout: blobs, and links to them in a snapshot that refs/main names."""
    root, commit = (
        cache / f"models--{name.replace('/', '--')}",
        "0f99f2d0ebe89ac095bcc5903c4dd8f72b367286",
    )
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs/main").write_text(commit)
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for number, file in enumerate(files):
        blob = root / "blobs" / f"{number:040x}"
        file.rename(blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    return root


__all__ = ["ECAPA_YAML", "huggingface", "randomised", "save", "wespeaker"]
