"""A trained speaker encoder for others to use: SpeechBrain's inference folder, ONNX, PyTorch.

A run's ``hyperparams.yaml`` says what its modules are, whatever the model. :func:`load_encoder`
builds them with the weights of a run or of an inference folder; :func:`export_for_inference` writes
the folder that SpeechBrain's ``EncoderClassifier`` and ``SpeakerRecognition`` load by themselves;
:func:`export_onnx` writes the same encoder for runtimes without PyTorch.
"""

from __future__ import annotations

import copy
import hashlib
import io
import logging
import math
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechbrain_qmargin.extras import require
from speechbrain_qmargin.files import replacing, write_text
from speechbrain_qmargin.scoring.decision import OperatingPoint
from speechbrain_qmargin.training.brain import bare, load_average

__all__ = [
    "SpeakerEncoder",
    "export_for_inference",
    "export_onnx",
    "export_run",
    "load_encoder",
    "load_run",
    "set_operating_point",
]

logger = logging.getLogger(__name__)

PARTS = ("compute_features", "mean_var_norm", "embedding_model")
MAX_CLASSES = 100_000
_TOLERANCE = 1e-4  # of an embedding's length; float32 rounding through the networks is near 1e-6


class SpeakerEncoder(nn.Module):
    """Waveforms to embeddings, as a Brain evaluates them: features, normalisation, network.

    Parameters
    ----------
    modules : mapping of str to Module
        ``compute_features``, ``mean_var_norm`` and ``embedding_model``; others are ignored, and
        what wraps a module for several processes is taken off.
    sample_rate : int
        Hz, of the waveforms.

    Examples
    --------
    >>> from speechbrain.lobes.features import Fbank
    >>> from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
    >>> from speechbrain.processing.features import InputNormalization
    >>> encoder = SpeakerEncoder({
    ...     "compute_features": Fbank(n_mels=20),
    ...     "mean_var_norm": InputNormalization(norm_type="sentence", std_norm=False),
    ...     "embedding_model": ECAPA_TDNN(20, channels=[8] * 4 + [24], lin_neurons=16),
    ... })
    >>> encoder(torch.randn(2, 16000)).shape
    torch.Size([2, 16])
    """

    def __init__(self, modules: Mapping[str, nn.Module], sample_rate: int = 16000) -> None:
        super().__init__()
        missing = [name for name in PARTS if name not in modules]
        if missing:
            raise ValueError(f"modules: {', '.join(missing)} wanted for a speaker encoder")
        for name in PARTS:
            self.add_module(name, bare(modules[name]))
        self.sample_rate = sample_rate
        self.eval()

    def forward(self, waveforms: Tensor) -> Tensor:
        """Embeddings [B, D] of waveforms [B, samples] of one length: nothing is padded."""
        return self.embed(self.compute_features(waveforms))

    def embed(self, features: Tensor) -> Tensor:
        """Embeddings [B, D] of features [B, T, n_mels] as ``compute_features`` gives them."""
        return self.embedding_model(self.mean_var_norm(features)).flatten(1)

    @property
    def device(self) -> torch.device:
        return next(self.embedding_model.parameters()).device

    def digest(self) -> str:
        """SHA-256 of weights, statistics and the modules' descriptions."""
        digest = hashlib.sha256(repr(self).encode())
        state = self.state_dict()
        if hasattr(self.mean_var_norm, "glob_mean"):  # InputNormalization keeps no state_dict
            state |= {name: getattr(self.mean_var_norm, name) for name in ("glob_mean", "glob_std")}
        for key, value in sorted(state.items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def load_encoder(folder: str | Path, device: str | torch.device = "cpu") -> SpeakerEncoder:
    """The encoder of a run's output folder, or of an inference folder.

    A run that has no ``inference/`` yet, one that is still training for instance, is read from its
    checkpoints: the average of the last epochs, as at its end.

    The folder's YAML names the classes to build, so load only folders whose origin you trust;
    the weights are tensors alone (``weights_only``).

    Raises
    ------
    FileNotFoundError
        Neither kind of folder; a run without a finished epoch.
    """
    folder = Path(folder)
    if _is_run(folder) and (folder / "inference" / "hyperparams.yaml").is_file():
        folder = folder / "inference"
    if _is_run(folder):
        modules, tree = load_run(folder, PARTS)
        logger.info(f"{folder} has no inference/; the average of its last epochs is taken")
        return SpeakerEncoder(modules, tree["sample_rate"]).to(device)
    tree = _tree(folder / "hyperparams.yaml")
    modules = _build(tree, PARTS)
    if not (folder / "embedding_model.ckpt").is_file():
        raise FileNotFoundError(
            f"{folder}: neither a run (no save/) nor an inference folder (no embedding_model.ckpt)"
        )
    for name in PARTS:
        file = folder / f"{name}.ckpt"
        if file.is_file() and hasattr(modules[name], "_load_statistics_dict"):
            state = torch.load(file, map_location="cpu", weights_only=True)
            modules[name]._load_statistics_dict(state)  # InputNormalization keeps no state_dict
        elif file.is_file():
            modules[name].load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return SpeakerEncoder(modules, tree["sample_rate"]).to(device)


def export_for_inference(
    hyperparams: str | Path,
    modules: Mapping[str, nn.Module],
    folder: str | Path,
    *,
    label_encoder: str | Path | None = None,
    operating_point: OperatingPoint | None = None,
    max_classes: int = MAX_CLASSES,
) -> Path:
    """Write a folder that SpeechBrain's inference classes load offline, unmodified::

        SpeakerRecognition.from_hparams(source=folder, savedir=...).verify_files(a, b)
        EncoderClassifier.from_hparams(source=folder, savedir=...).classify_file(a)

    The folder may be moved; it names no path outside it. It appears whole or not at all, and only
    if its encoder, loaded again, gives the embeddings of `modules`.

    Parameters
    ----------
    hyperparams : path
        The run's ``hyperparams.yaml``, which defines the modules.
    modules : mapping of str to Module
        The trained modules. A cosine classifier with prototypes in its ``weight`` [classes, D],
        dense, sparse or in shards (then every process calls this), becomes SpeechBrain's
        ``Classifier``.
    folder : path
        Replaced if it exists.
    label_encoder : path, optional
        The run's ``label_encoder.txt``. Without it there is no classifier. Where it has fewer
        labels than the classifier has classes, the first classes are the labels; the others,
        copies of speakers at other speeds, are left out.
    operating_point : OperatingPoint, optional
        As by :func:`set_operating_point`.
    max_classes : int
        With more labels the classifier is left out: ``classify_batch`` is then not available.

    Returns
    -------
    Path
        `folder`.

    Raises
    ------
    ValueError
        The YAML does not describe `modules`; labels and classes that do not fit.
    """
    tree, folder, modules = _tree(hyperparams), Path(folder), dict(modules.items())
    labels = _labels(label_encoder)
    prototypes = None
    if labels is not None and labels <= max_classes:
        prototypes = _prototypes(modules.get("classifier"), labels)  # every process takes part
    from speechbrain.utils.distributed import if_main_process

    if not if_main_process():
        return folder

    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        encoder = SpeakerEncoder(modules, tree["sample_rate"])
        saved = {name for name in PARTS if _save(getattr(encoder, name), partial / f"{name}.ckpt")}
        if prototypes is not None:
            torch.save({"weight": prototypes}, partial / "classifier.ckpt")
            shutil.copyfile(label_encoder, partial / "label_encoder.ckpt")
        write_text(partial / "hyperparams.yaml", _inference_yaml(tree, saved, prototypes))
        if operating_point is not None:
            set_operating_point(partial, operating_point)
        _check_same(encoder, load_encoder(partial, encoder.device), hyperparams)
        old = partial.with_suffix(".old")
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def export_run(run_folder: str | Path, **options: Any) -> Path:
    """Write ``inference/`` into a run's output folder, from its checkpoints.

    `options` are those of :func:`export_for_inference`.
    """
    run_folder = Path(run_folder)
    if not _is_run(run_folder):
        raise FileNotFoundError(f"{run_folder}: not a run's output folder (no save/)")
    labels = run_folder / "save" / "label_encoder.txt"
    options = {"label_encoder": labels if labels.is_file() else None, **options}
    count = _labels(options["label_encoder"])
    few = count is not None and count <= options.get("max_classes", MAX_CLASSES)
    modules, _ = load_run(run_folder, (*PARTS, "classifier") if few else PARTS)
    hyperparams, folder = run_folder / "hyperparams.yaml", run_folder / "inference"
    return export_for_inference(hyperparams, modules, folder, **options)


def set_operating_point(folder: str | Path, point: OperatingPoint) -> None:
    """Put a threshold for the cosine of two embeddings into an inference folder.

    It becomes ``operating_point.json``, and ``threshold`` in ``hyperparams.yaml``, hence
    ``verifier.hparams.threshold``. SpeechBrain's ``verify_batch`` takes it as an argument;
    ``verify_files`` always decides at its own 0.25, so compare the score that it returns.
    """
    folder = Path(folder)
    yaml = folder / "hyperparams.yaml"
    lines = yaml.read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if not line.startswith("threshold:")]
    point.save(folder / "operating_point.json")
    write_text(yaml, "\n".join([*lines, f"threshold: {point.threshold!r}"]) + "\n")


def export_onnx(
    encoder: SpeakerEncoder, path: str | Path, *, from_waveform: bool = True
) -> dict[str, float]:
    """Write the encoder as one ONNX file, checked against PyTorch in onnxruntime.

    Input ``waveform`` [batch, samples], or ``features`` [batch, frames, n_mels] as
    ``compute_features`` gives them; output ``embedding`` [batch, D]. Batch and length are dynamic;
    the recordings of one batch have one length. The encoder must be on the CPU.

    Returns
    -------
    dict
        ``"batch x length"`` to the largest difference between the two runtimes' embeddings,
        relative to the embedding's length.

    Raises
    ------
    ImportError
        The extra ``onnx`` is not installed.
    ValueError
        Some embedding differs by more than 1e-4 of its length; no file is left.
    """
    require("onnxruntime", "onnxscript", why="ONNX export", extra="onnx")
    import onnxruntime

    rate = encoder.sample_rate
    graph = _Graph(encoder, from_waveform).eval()
    name, axis = ("waveform", "samples") if from_waveform else ("features", "frames")
    with replacing(path) as partial, torch.no_grad():
        dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
        example = (_probe(encoder, from_waveform, 2, rate),)
        graph(*example)  # SpeechBrain wraps some functions when they are first called
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tracing's own
            torch.onnx.export(
                torch.export.export(graph, example, dynamic_shapes=dynamic, strict=True),
                example,
                partial,
                dynamo=True,
                input_names=[name],
                output_names=["embedding"],
                dynamic_shapes=({0: "batch", 1: axis},),
                external_data=False,
                verbose=False,
            )
        session = onnxruntime.InferenceSession(str(partial), providers=["CPUExecutionProvider"])
        differences = {}
        for batch, seconds in ((1, 0.3), (3, 1.37), (2, 5.0), (1, 12.0)):
            probe = _probe(encoder, from_waveform, batch, round(seconds * rate))
            ours = encoder(probe) if from_waveform else encoder.embed(probe)
            theirs = torch.from_numpy(session.run(None, {name: probe.numpy()})[0])
            size = f"{batch} x {probe.shape[1]}"
            differences[size] = _difference(ours, theirs)
            if not differences[size] <= _TOLERANCE:
                raise ValueError(
                    f"{path}: onnxruntime's embeddings differ from PyTorch's by "
                    f"{differences[size]:.1e} of their length at {size} ({name}); not written"
                )
    return differences


class _Graph(nn.Module):
    """What is written: a copy of the encoder with its Fourier transform as a convolution."""

    def __init__(self, encoder: SpeakerEncoder, from_waveform: bool) -> None:
        super().__init__()
        self.encoder, self.from_waveform = copy.deepcopy(encoder), from_waveform
        stft = getattr(encoder.compute_features, "compute_STFT", None)
        if stft is not None:
            self.encoder.compute_features.compute_STFT = _ConvolvedSTFT(stft)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.encoder(inputs) if self.from_waveform else self.encoder.embed(inputs)


class _ConvolvedSTFT(nn.Module):
    """SpeechBrain's STFT for the runtimes that have none.

    onnxruntime has one, but not an exact one where n_fft is no power of two, as 400 is not.
    """

    def __init__(self, stft: nn.Module) -> None:
        super().__init__()
        n, bins = stft.n_fft, stft.n_fft // 2 + 1
        window = torch.zeros(n, dtype=torch.float64)
        start = (n - stft.win_length) // 2
        window[start : start + stft.win_length] = stft.window
        turns = torch.outer(torch.arange(bins), torch.arange(n)) % n
        angles = turns.double() * (2 * math.pi / n)
        basis = torch.cat([angles.cos(), -angles.sin()]) * window
        if stft.normalized_stft:
            basis /= math.sqrt(n)
        self.register_buffer("basis", basis[:, None].float())
        self.hop, self.padding = stft.hop_length, n // 2 if stft.center else 0
        self.mode = stft.pad_mode

    def forward(self, waveforms: Tensor) -> Tensor:
        """[B, samples] to [B, frames, bins, 2]."""
        padded = F.pad(waveforms[:, None], (self.padding, self.padding), mode=self.mode)
        parts = F.conv1d(padded, self.basis, stride=self.hop)
        return torch.stack(parts.chunk(2, dim=1), dim=-1).transpose(1, 2)


def _probe(encoder: SpeakerEncoder, from_waveform: bool, batch: int, samples: int) -> Tensor:
    """Noise whose level changes, so that neither end nor channel is like another."""
    generator = torch.Generator().manual_seed(samples)
    noise = torch.randn(batch, samples, generator=generator).cumsum(1).mul(0.01).sin()
    noise = noise * torch.linspace(0.02, 0.5, samples)
    return noise if from_waveform else encoder.compute_features(noise)


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest |a - b| of the rows, relative to the rows' length."""
    if a.shape != b.shape:
        return float("inf")
    return float(((a - b).norm(dim=1) / a.norm(dim=1)).max())


def _check_same(encoder: SpeakerEncoder, loaded: SpeakerEncoder, hyperparams) -> None:
    probe = _probe(encoder, True, 2, encoder.sample_rate).to(encoder.device)
    with torch.no_grad():
        difference = _difference(encoder(probe), loaded(probe))
    if not difference <= _TOLERANCE:
        raise ValueError(
            f"{hyperparams}: the modules it describes, with these weights, give other embeddings "
            f"(by {difference:.1e} of their length) than the modules to export"
        )


# ---------------------------------------------------------------- the run's YAML


def _is_run(folder: Path) -> bool:
    return (folder / "save").is_dir()


def _tree(path: str | Path, wanted: tuple[str, ...] = ("modules", "sample_rate")) -> Any:
    """A ``hyperparams.yaml`` with its tags, references resolved."""
    from hyperpyyaml import resolve_references
    from ruamel.yaml import YAML

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a run's output folder holds one")
    tree = YAML().load(resolve_references(path.read_text(encoding="utf-8")).read())
    missing = [key for key in wanted if key not in (tree or {})]
    if missing:
        raise ValueError(f"{path}: no {' and no '.join(missing)} in it")
    return tree


def _definitions(tree: Any, names) -> str:
    """The YAML of some modules and of what they are made of; each a key of its own."""
    from ruamel.yaml import YAML
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    def without_comments(node):
        if isinstance(node, (CommentedMap, CommentedSeq)):
            if hasattr(node, "_yaml_comment"):
                del node._yaml_comment
            for value in node.values() if isinstance(node, CommentedMap) else node:
                without_comments(value)

    chosen = CommentedMap(
        (name, tree["modules"][name]) for name in names if name in tree["modules"]
    )
    without_comments(chosen)
    stream = io.StringIO()
    YAML().dump(chosen, stream)
    return stream.getvalue()


def _build(tree: Any, names) -> dict[str, Any]:
    from hyperpyyaml import load_hyperpyyaml

    return load_hyperpyyaml(_definitions(tree, names))


def load_run(folder: Path, names) -> tuple[dict[str, nn.Module], Mapping[str, Any]]:
    """Modules of a run, by name, with the average of its last epochs; the settings it ran with."""
    from speechbrain.utils.checkpoints import Checkpointer

    tree = _tree(folder / "hyperparams.yaml", ("modules",))
    checkpointer = Checkpointer(folder / "save")
    modules = _build(tree, names)
    load_average(modules, checkpointer, tree.get("average_checkpoints", 1))
    return modules, tree


def _inference_yaml(tree: Any, saved: set[str], prototypes: Tensor | None) -> str:
    loadables, modules = sorted(saved), list(PARTS)
    text = [
        "# A speaker encoder for speechbrain.inference: EncoderClassifier, SpeakerRecognition.",
        "# Written by speechbrain_qmargin.export.encoder; the weights are the files beside it.",
        f"sample_rate: {tree['sample_rate']}",
        _definitions(tree, PARTS).strip(),
        "audio_normalizer: !new:speechbrain.dataio.preprocess.AudioNormalizer",
        f"  sample_rate: {tree['sample_rate']}",
    ]
    if prototypes is not None:
        classes, dim = prototypes.shape
        text += [
            "classifier: !new:speechbrain.lobes.models.ECAPA_TDNN.Classifier",
            f"  input_size: {dim}",
            f"  out_neurons: {classes}",
            "label_encoder: !new:speechbrain.dataio.encoder.CategoricalEncoder",
        ]
        loadables += ["classifier", "label_encoder"]
        modules += ["classifier"]
    text += ["modules:", *(f"  {name}: !ref <{name}>" for name in modules)]
    text += ["pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer", "  loadables:"]
    text += [f"    {name}: !ref <{name}>" for name in loadables]
    return "\n".join(text) + "\n"


# ---------------------------------------------------------------- weights


def _save(module: nn.Module, file: Path) -> bool:
    """Write a module's weights as SpeechBrain loads them; False where it has none."""
    if hasattr(module, "_statistics_dict"):  # InputNormalization
        if module.norm_type != "global":
            return False
        state = module._statistics_dict()
    else:
        state = module.state_dict()
    state = {key: value.cpu() if torch.is_tensor(value) else value for key, value in state.items()}
    if state:
        torch.save(state, file)
    return bool(state)


def _labels(path: str | Path | None) -> int | None:
    if path is None:
        return None
    from speechbrain.dataio.encoder import CategoricalEncoder

    encoder = CategoricalEncoder()
    if not encoder.load_if_possible(path):
        raise FileNotFoundError(f"{path}: no such label encoder")
    return len(encoder)


def _prototypes(classifier: nn.Module | None, labels: int) -> Tensor | None:
    """The classes' vectors [labels, D] of any cosine classifier; None if it is none."""
    state = {} if classifier is None else bare(classifier).state_dict()
    if [key for key, value in state.items() if value.ndim] != ["weight"]:
        return None
    weight, comm = state["weight"].detach(), getattr(bare(classifier), "comm", None)
    if comm is not None and comm.world > 1:
        classes = bare(classifier).num_classes
        bounds = [comm.shard_of(classes, rank) for rank in range(comm.world)]
        weight = comm.gather(weight, [stop - start for start, stop in bounds])
    if labels > len(weight):
        raise ValueError(f"label_encoder: {labels} labels and {len(weight)} classes")
    return weight[:labels].float().cpu().clone()
