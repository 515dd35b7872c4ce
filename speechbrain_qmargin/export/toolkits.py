"""A trained encoder in the files of other toolkits: WeSpeaker's and arcface_torch's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.nn.utils.fusion import fuse_linear_bn_eval

from speechbrain_qmargin.export.encoder import SpeakerEncoder
from speechbrain_qmargin.export.face_encoder import FaceEncoder
from speechbrain_qmargin.export.probe import TOLERANCE, difference, on_cpu, probe, probe_images
from speechbrain_qmargin.features import KaldiFbank
from speechbrain_qmargin.files import replacing, replacing_folder, write_text
from speechbrain_qmargin.models.campplus import CAMPPlus
from speechbrain_qmargin.models.ecapa import WeSpeakerEcapa
from speechbrain_qmargin.models.eres2net import ERes2Net
from speechbrain_qmargin.models.iresnet import IResNet
from speechbrain_qmargin.models.mbf import MBF
from speechbrain_qmargin.models.resnet import ResNet
from speechbrain_qmargin.published import load_published

__all__ = ["export_arcface_torch", "export_wespeaker"]


def export_wespeaker(encoder: SpeakerEncoder | FaceEncoder, folder: str | Path) -> str:
    """Write ``avg_model.pt`` and ``config.yaml``, as WeSpeaker's ``load_model`` takes them.

    Returns
    -------
    str
        What WeSpeaker calls the network; that its own functions do not build this size, if so.

    Raises
    ------
    FileExistsError, ValueError
        The folder is there already; a network or features that WeSpeaker does not have; what was
        written gives other embeddings when it is loaded again. Nothing is left then.

    Examples
    --------
    >>> from speechbrain.processing.features import InputNormalization
    >>> small = {
    ...     "compute_features": KaldiFbank(n_mels=16),
    ...     "mean_var_norm": InputNormalization(norm_type="sentence", std_norm=False),
    ...     "embedding_model": ResNet(input_size=16, channels=4, lin_neurons=8),
    ... }
    >>> export_wespeaker(SpeakerEncoder(small), getfixture("tmp_path") / "model")
    "ResNet34 of a size that WeSpeaker's own functions do not build"
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; give another folder")
    if not isinstance(encoder, SpeakerEncoder):
        raise ValueError("WeSpeaker's files are of speech; this is an encoder of faces")
    name, arguments, usual = _wespeaker_network(encoder.embedding_model)
    fbank, norm = encoder.compute_features, encoder.mean_var_norm
    settings = {"num_mel_bins": 80, "frame_length": 25, "frame_shift": 10, "dither": 1.0}
    known = isinstance(fbank, KaldiFbank) and fbank.window_name == "hamming"
    if not known or fbank.full_scale != 2.0**15 or norm.norm_type != "sentence" or norm.std_norm:
        raise ValueError(
            "WeSpeaker takes Kaldi's filterbanks (--features kaldi: Hamming window, 16-bit "
            f"samples) without the recording's mean; this encoder has {fbank}"
        )
    rate, bands = encoder.sample_rate, fbank.banks.shape[1]
    if (fbank.length, fbank.shift) != (int(0.025 * rate), int(0.01 * rate)):
        raise ValueError("WeSpeaker's frames are 25 ms every 10 ms; this encoder has others")
    config: dict[str, Any] = {
        "model": name,
        "model_args": {"feat_dim": bands, **arguments},
        "dataset_args": {
            "resample_rate": rate,
            "fbank_args": settings | {"num_mel_bins": bands, "dither": float(fbank.dither)},
        },
    }
    with replacing_folder(folder) as partial, torch.no_grad():
        torch.save(_weights(encoder.embedding_model), partial / "avg_model.pt")
        write_text(partial / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        again = SpeakerEncoder.of(load_published(partial))
        noise = probe(encoder, True, 2, rate)
        _check(difference(on_cpu(encoder)(noise), again(noise)), folder)
    return name + ("" if usual else " of a size that WeSpeaker's own functions do not build")


def _wespeaker_network(network: nn.Module) -> tuple[str, dict[str, Any], bool]:
    """WeSpeaker's function, its arguments, and whether it builds this size."""
    model: Any = network  # whose parts are found by name
    two = {"pooling_func": "TSTP", "two_emb_layer": False}
    if isinstance(network, ResNet):
        usual = len(model.conv1.weight) == 32
        return f"ResNet{model.depth}", {"embed_dim": len(model.seg_1.weight), **two}, usual
    if isinstance(network, CAMPPlus) and model.least_variance == 1e-7:
        dim = len(model.xvector.dense.linear.weight)
        usual = sum(p.numel() for p in model.parameters()) == sum(
            p.numel() for p in CAMPPlus(model.input_size, dim).parameters()
        )
        return "CAMPPlus", {"embed_dim": dim, "pooling_func": "TSTP"}, usual
    if isinstance(network, WeSpeakerEcapa):
        channels = len(model.layer1.conv.weight)
        name = f"ECAPA_TDNN{'_GLOB' * model.pool.context}_c{channels}"
        usual = channels in (512, 1024) and len(model.conv.weight) == 1536
        arguments = {"embed_dim": len(model.linear.weight), "pooling_func": "ASTP"}
        return name, arguments, usual
    if isinstance(network, ERes2Net):
        sizes = (len(model.conv1.weight), model.layer1[0].width, len(model.layer1[0].convs))
        names = {(32, 16, 2): "ERes2Net34_Base", (64, 32, 2): "ERes2Net34_Large",
                 (64, 24, 3): "ERes2Net34_aug"}  # fmt: skip
        arguments = {"embed_dim": len(model.seg_1.weight), **two}
        return names.get(sizes, "ERes2Net34_Base"), arguments, sizes in names
    raise ValueError(
        f"WeSpeaker has no {type(model).__name__}; of the recipe's models it has resnet34 to "
        "resnet293, campplus, wespeaker_ecapa and eres2net"
    )


def export_arcface_torch(encoder: SpeakerEncoder | FaceEncoder, file: str | Path) -> str:
    """Write a backbone's weights as arcface_torch does (``backbone.pth``, ``model.pt``).

    Returns
    -------
    str
        What the network is; that ``get_model`` does not build this size, if so.

    Raises
    ------
    ValueError
        A network that arcface_torch does not have; what was written gives other embeddings when it
        is loaded again. Nothing is left then, or what was there before.

    Examples
    --------
    >>> encoder = FaceEncoder(IResNet(18, embedding_dim=8, channels=4, image_size=32), 32)
    >>> export_arcface_torch(encoder, getfixture("tmp_path") / "backbone.pth")
    'IResNet at 32 x 32, a size that get_model does not build'
    """
    file = Path(file)
    if not isinstance(encoder, FaceEncoder):
        raise ValueError("arcface_torch's files are of faces; this is an encoder of speech")
    model, size = encoder.embedding_model, encoder.image_size
    if isinstance(model, IResNet) and not model.plain_shortcuts:
        usual = len(model.conv1.weight) == 64
    elif isinstance(model, MBF):
        usual = True
    else:
        raise ValueError(
            f"arcface_torch has no such {type(model).__name__}; of the recipe's models it has "
            "iresnet (without plain_shortcuts) and mbf"
        )
    if size % 16:
        raise ValueError(
            f"image_size {size}: the size is read off the weights in steps of 16; a multiple of it "
            "is wanted"
        )
    with replacing(file) as partial:
        torch.save(_weights(model), partial)
        again = FaceEncoder.of(load_published(f"arcface_torch:{partial}"), "none")
        noise = probe_images(2, size)
        with torch.no_grad():
            _check(difference(on_cpu(encoder).embed(noise), again(noise)), file)
    usual = usual and size == 112
    name = type(model).__name__
    return name + ("" if usual else f" at {size} x {size}, a size that get_model does not build")


def _weights(model: Any) -> dict[str, torch.Tensor]:
    """Its state; a batch normalisation of the embedding becomes part of the layer before it."""
    state = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
    norm = getattr(model, "seg_bn_1", None)
    if isinstance(norm, nn.BatchNorm1d):
        state = {key: value for key, value in state.items() if not key.startswith("seg_bn_1.")}
        folded = fuse_linear_bn_eval(copy.deepcopy(model.seg_1).cpu(), copy.deepcopy(norm).cpu())
        state |= {"seg_1.weight": folded.weight.detach(), "seg_1.bias": folded.bias.detach()}
    return state


def _check(found: float, path: Path) -> None:
    if not found <= TOLERANCE:
        raise ValueError(
            f"{path}: loaded again it gives embeddings that differ by {found:.1e} of their length; "
            "nothing was kept"
        )
