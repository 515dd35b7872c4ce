"""A trained encoder as a folder; of speech, as SpeechBrain's inference classes load it."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from speechbrain.dataio.encoder import CategoricalEncoder
from speechbrain.utils.distributed import if_main_process
from torch import Tensor, nn

from speechbrain_qmargin.export.definitions import canonical, definitions, hyperparams_tree
from speechbrain_qmargin.export.encoder import PARTS, SpeakerEncoder, load_encoder, load_run
from speechbrain_qmargin.export.face_encoder import FaceEncoder, has_faces, load_face_encoder
from speechbrain_qmargin.export.probe import TOLERANCE, difference, probe, probe_images
from speechbrain_qmargin.files import replacing_folder, write_text
from speechbrain_qmargin.head.shards import ShardedClassifier, whole_weight
from speechbrain_qmargin.models.classifier import prototypes_per_class
from speechbrain_qmargin.scoring.decision import OperatingPoint
from speechbrain_qmargin.tables import composed_name
from speechbrain_qmargin.training.checkpoints import bare
from speechbrain_qmargin.training.internals import has_statistics, statistics
from speechbrain_qmargin.training.layout import INFERENCE, SAVE, is_run

__all__ = [
    "DECISION_FILES",
    "export_faces",
    "export_for_inference",
    "export_run",
    "set_plain_threshold",
    "trained_on",
]

MAX_CLASSES = 100_000
POINT = "operating_point.json"
DECISION_FILES = (POINT, "calibration.json", "cohort.npz", "score_histogram.json")
"""What says how a folder's encoder decides. An export leaves them: they were measured."""


def export_for_inference(
    hyperparams: str | Path,
    modules: Mapping[str, nn.Module],
    folder: str | Path,
    *,
    label_encoder: str | Path | None = None,
    operating_point: OperatingPoint | None = None,
    max_classes: int = MAX_CLASSES,
    trust: bool | Collection[str] = False,
) -> Path:
    """Write a folder that SpeechBrain's inference classes load offline, unmodified::

        SpeakerRecognition.from_hparams(source=folder, savedir=...).verify_files(a, b)
        EncoderClassifier.from_hparams(source=folder, savedir=...).classify_file(a)

    The folder may be moved; it names no path outside it. It appears whole or not at all, and only
    if its encoder, loaded again, gives the embeddings of `modules`. The :data:`DECISION_FILES` of a
    folder that was there stay, unless there is a new `operating_point`; a warning says if they are
    of another encoder.

    Parameters
    ----------
    hyperparams : path
        The run's ``hyperparams.yaml``, which defines the modules.
    modules : mapping of str to Module
        The trained modules. A cosine classifier with prototypes in its ``weight`` [classes, D],
        dense, sparse or in shards (then every process calls this), becomes SpeechBrain's
        ``Classifier``; one with sub-centres is left out.
    folder : path
        Replaced if it exists, but for its :data:`DECISION_FILES`.
    label_encoder : path, optional
        The run's ``label_encoder.txt``. Without it there is no classifier. Where it has fewer
        labels than the classifier has classes, the first classes are the labels; the others,
        copies of speakers at other speeds, are left out.
    operating_point : OperatingPoint, optional
        A threshold for the cosine of two embeddings. It becomes ``operating_point.json``, and
        ``threshold`` in ``hyperparams.yaml``, hence ``verifier.hparams.threshold``. SpeechBrain's
        ``verify_batch`` takes it as an argument; ``verify_files`` always decides at its own 0.25,
        so compare the score that it returns. One whose encoder is not known is warned of.
    max_classes : int
        With more labels the classifier is left out: ``classify_batch`` is then not available.
    trust : bool or collection of str
        As in :func:`~speechbrain_qmargin.export.encoder.load_encoder`.

    Returns
    -------
    Path
        `folder`.

    Raises
    ------
    ValueError
        The YAML does not describe `modules`; labels and classes that do not fit; an operating point
        of other scores than this encoder's cosines.

    Examples
    --------
    One layer for a network, of one second at 8 kHz.

    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "hyperparams.yaml").write_text(
    ...     "{sample_rate: 8000, modules: {compute_features: !new:torch.nn.Identity {}, "
    ...     "mean_var_norm: !new:torch.nn.Identity {}, "
    ...     "embedding_model: !new:torch.nn.Linear {in_features: 8000, out_features: 4}}}"
    ... )
    >>> modules = dict.fromkeys(PARTS, nn.Identity()) | {"embedding_model": nn.Linear(8000, 4)}
    >>> written = export_for_inference(folder / "hyperparams.yaml", modules, folder / "inference")
    >>> sorted(file.name for file in written.iterdir())
    ['embedding_model.ckpt', 'hyperparams.yaml']
    """
    tree = hyperparams_tree(hyperparams, trust=trust)
    folder, modules = Path(folder), dict(modules.items())
    labels = _labels(label_encoder)
    prototypes = None
    if labels is not None and labels <= max_classes:
        prototypes = _prototypes(modules.get("classifier"), labels)  # every process takes part
    if not if_main_process():
        return folder

    with replacing_folder(folder) as partial:
        encoder = SpeakerEncoder(modules, tree["sample_rate"], canonical(tree, PARTS))
        saved = {name for name in PARTS if _save(getattr(encoder, name), partial / f"{name}.ckpt")}
        if prototypes is not None:
            torch.save({"weight": prototypes}, partial / "classifier.ckpt")
            assert label_encoder is not None  # hence the labels
            shutil.copyfile(label_encoder, partial / "label_encoder.ckpt")
        write_text(partial / "hyperparams.yaml", _inference_yaml(tree, saved, prototypes))
        if operating_point is not None:
            _set_threshold(partial, operating_point, encoder.digest())
        else:
            _keep_decision(folder, partial, encoder.digest())
        loaded = load_encoder(partial, encoder.device, trust)
        noise = probe(encoder, True, 2, encoder.sample_rate).to(encoder.device)
        _refuse_another(encoder, loaded, noise, hyperparams)
    return folder


def export_faces(
    hyperparams: str | Path,
    embedding_model: nn.Module,
    folder: str | Path,
    *,
    operating_point: OperatingPoint | None = None,
    trust: bool | Collection[str] = False,
) -> Path:
    """Write a folder that :func:`~speechbrain_qmargin.export.face_encoder.load_face_encoder` loads.

    It may be moved, appears whole or not at all, and keeps the :data:`DECISION_FILES`, as that of
    :func:`export_for_inference`. Its YAML holds the network, `image_size` and `test_flip`.

    Raises
    ------
    ValueError
        The YAML does not describe `embedding_model`, or is of no encoder of faces; an operating
        point of other scores than this encoder's cosines.

    Examples
    --------
    A convolution as large as the image is the smallest network there is.

    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "hyperparams.yaml").write_text(
    ...     "{image_size: 32, modules: {embedding_model: "
    ...     "!new:torch.nn.Conv2d {in_channels: 3, out_channels: 8, kernel_size: 32}}}"
    ... )
    >>> network = nn.Conv2d(3, 8, kernel_size=32)
    >>> written = export_faces(folder / "hyperparams.yaml", network, folder / "inference")
    >>> image = torch.ones(1, 3, 32, 32)
    >>> torch.equal(load_face_encoder(written)(image), network(image).flatten(1))
    True
    """
    tree = hyperparams_tree(hyperparams, ("modules", "image_size"), trust)
    folder = Path(folder)
    if not if_main_process():
        return folder
    flip = bool(tree.get("test_flip", False))
    with replacing_folder(folder) as partial:
        encoder = FaceEncoder(
            embedding_model,
            tree["image_size"],
            "sum" if flip else "none",
            canonical(tree, ["embedding_model"]),
        )
        _save(encoder.embedding_model, partial / "embedding_model.ckpt")
        text = [
            "# A face encoder: aligned RGB images in [-1, 1], image_size pixels high and wide.",
            "# load_face_encoder of speechbrain_qmargin.export.face_encoder reads this folder.",
            f"image_size: {tree['image_size']}",
            f"test_flip: {flip}  # an embedding is the image's plus its mirror image's",
            definitions(tree, ["embedding_model"]).strip(),
            "modules:",
            "  embedding_model: !ref <embedding_model>",
        ]
        write_text(partial / "hyperparams.yaml", "\n".join(text) + "\n")
        if operating_point is not None:
            _set_threshold(partial, operating_point, encoder.digest())
        else:
            _keep_decision(folder, partial, encoder.digest())
        loaded = load_face_encoder(partial, encoder.device, trust)
        noise = probe_images(2, encoder.image_size).to(encoder.device)
        _refuse_another(encoder, loaded, noise, hyperparams)
    return folder


def export_run(run_folder: str | Path, **options: Any) -> Path:
    """Write ``inference/`` into a run's output folder, from its checkpoints.

    `options` are those of :func:`export_for_inference`, or of a run of faces those of
    :func:`export_faces`.

    Returns
    -------
    Path
        ``<run_folder>/inference``.

    Raises
    ------
    FileNotFoundError
        Not a run's output folder; a run without a finished epoch.
    ValueError, OSError
        As those functions and :func:`~speechbrain_qmargin.export.encoder.load_encoder`.

    Examples
    --------
    >>> from speechbrain_qmargin.training.checkpoints import AtomicCheckpointer
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "hyperparams.yaml").write_text(
    ...     "{image_size: 32, modules: {embedding_model: "
    ...     "!new:torch.nn.Conv2d {in_channels: 3, out_channels: 8, kernel_size: 32}}}"
    ... )
    >>> checkpointer = AtomicCheckpointer(folder / "save", {"embedding_model": nn.Conv2d(3, 8, 32)})
    >>> _ = checkpointer.save_checkpoint()      # as training does after each epoch
    >>> load_face_encoder(export_run(folder))(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 8])
    """
    run_folder = Path(run_folder)
    if not is_run(run_folder):
        raise FileNotFoundError(f"{run_folder}: not a run's output folder (no save/)")
    hyperparams, folder = run_folder / "hyperparams.yaml", run_folder / INFERENCE
    trust = options.get("trust", False)
    if has_faces(hyperparams_tree(hyperparams, ("modules",), trust)):
        modules, _ = load_run(run_folder, ["embedding_model"], trust)
        return export_faces(hyperparams, modules["embedding_model"], folder, **options)
    labels = run_folder / SAVE / "label_encoder.txt"
    options = {"label_encoder": labels if labels.is_file() else None, **options}
    count = _labels(options["label_encoder"])
    few = count is not None and count <= options.get("max_classes", MAX_CLASSES)
    names = (*PARTS, "classifier") if few else PARTS
    modules, _ = load_run(run_folder, names, trust)
    return export_for_inference(hyperparams, modules, folder, **options)


def _set_threshold(folder: Path, point: OperatingPoint, encoder: str) -> None:
    if point.kind != "cosine":
        what = f"for {point.kind} scores" if point.kind else "of scores whose kind it does not say"
        raise ValueError(
            f"the threshold of {point.system!r} is {what}; SpeechBrain's classes give cosines. "
            "Choose one on scores of `qmargin cosine`; `qmargin threshold` sets one for AS-norm too"
        )
    point.refuse_other(encoder=encoder)
    if not point.encoder:
        warnings.warn(
            f"the threshold of {point.system!r} does not say of which encoder it is; embeddings of "
            "`qmargin extract` in .npz do",
            stacklevel=3,
        )
    point.save(folder / POINT)
    set_plain_threshold(folder, point.threshold)


def set_plain_threshold(folder: str | Path, threshold: float | None) -> None:
    """``threshold`` of an inference folder's YAML, for SpeechBrain's classes; None takes it out.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "hyperparams.yaml").write_text("sample_rate: 16000")
    >>> set_plain_threshold(folder, 0.25)
    >>> (folder / "hyperparams.yaml").read_text().splitlines()
    ['sample_rate: 16000', 'threshold: 0.25']
    """
    yaml = Path(folder) / "hyperparams.yaml"
    if not yaml.is_file():
        return
    lines = yaml.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.startswith("threshold:")]
    if threshold is not None:
        kept.append(f"threshold: {threshold!r}")
    if kept != lines:
        write_text(yaml, "\n".join(kept) + "\n")


def _keep_decision(old: Path, new: Path, encoder: str) -> None:
    """Take what was measured for a folder along when it is written anew."""
    for name in DECISION_FILES:
        if (old / name).is_file():
            shutil.copyfile(old / name, new / name)
    if not (new / POINT).is_file():
        return
    try:
        point = OperatingPoint.load(new / POINT)
        point.refuse_other(encoder=encoder)
    except ValueError as error:
        warnings.warn(f"{old / POINT} stays, but it is not for this encoder: {error}", stacklevel=3)
        return
    if point.kind == "cosine":
        _set_threshold(new, point, encoder)


def _refuse_another(encoder: nn.Module, loaded: nn.Module, noise: Tensor, hyperparams) -> None:
    """Refuse a YAML that makes something else of the same weights.

    What a module draws, as SpeechBrain's pooling of statistics does, is the same in both.
    """
    rows, device = [], [noise.device] if noise.is_cuda else []  # not every GPU's generator
    for module in (encoder, loaded):
        with torch.no_grad(), torch.random.fork_rng(device):
            torch.manual_seed(0)
            rows.append(module(noise))
    found = difference(*rows)
    if not found <= TOLERANCE:
        raise ValueError(
            f"{hyperparams}: the modules it describes, with these weights, give other embeddings "
            f"(by {found:.1e} of their length) than the modules to export"
        )


def _inference_yaml(tree: Any, saved: set[str], prototypes: Tensor | None) -> str:
    loadables, modules = sorted(saved), list(PARTS)
    text = [
        "# A speaker encoder for speechbrain.inference: EncoderClassifier, SpeakerRecognition.",
        "# Written by speechbrain_qmargin.export.inference; the weights are the files beside it.",
        f"sample_rate: {tree['sample_rate']}",
        definitions(tree, PARTS).strip(),
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


def _save(module: nn.Module, file: Path) -> bool:
    """Write a module's weights as SpeechBrain loads them; False where it has none."""
    if has_statistics(module):
        if module.norm_type != "global":
            return False
        state = statistics(module)
    else:
        state = module.state_dict()
    state = {key: value.cpu() if torch.is_tensor(value) else value for key, value in state.items()}
    if state:
        torch.save(state, file)
    return bool(state)


def trained_on(folder: str | Path) -> frozenset[str]:
    """The names of the classes that an encoder was trained on; none where its folder tells none.

    Parameters
    ----------
    folder : path
        A run, an inference folder, or a folder that SpeechBrain published. Names that are mere
        numbers, as records have them, are nobody's and left out.

    Examples
    --------
    >>> folder, encoder = getfixture("tmp_path"), CategoricalEncoder()
    >>> encoder.update_from_iterable(["ann", "bob", "17"])
    >>> encoder.save(folder / "label_encoder.txt")
    >>> sorted(trained_on(folder))
    ['ann', 'bob']
    """
    for name in ("save/label_encoder.txt", "label_encoder.ckpt", "label_encoder.txt"):
        encoder = CategoricalEncoder()
        if (Path(folder) / name).is_file() and encoder.load_if_possible(Path(folder) / name):
            labels = (composed_name(str(label)) for label in encoder.lab2ind)
            return frozenset(label for label in labels if not label.isdigit())
    return frozenset()


def _labels(path: str | Path | None) -> int | None:
    if path is None:
        return None
    encoder = CategoricalEncoder()
    if not encoder.load_if_possible(path):
        raise FileNotFoundError(f"{path}: no such label encoder")
    return len(encoder)


def _prototypes(classifier: nn.Module | None, labels: int) -> Tensor | None:
    """The classes' vectors [labels, D] of a cosine classifier; None if it is none, or has several
    for each class."""
    if classifier is None:
        return None
    module: nn.Module = bare(classifier)
    if prototypes_per_class(module) > 1:
        return None
    state = module.state_dict()
    numbers = {key for key, value in state.items() if value.ndim and value.is_floating_point()}
    if numbers != {"weight"}:
        return None
    sharded = isinstance(module, ShardedClassifier)
    weight = whole_weight(module) if sharded else state["weight"].detach()
    if labels > len(weight):
        raise ValueError(f"label_encoder: {labels} labels and {len(weight)} classes")
    return weight[:labels].float().cpu().clone()
