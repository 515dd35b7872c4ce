"""What a run starts from: the weights of another run, or those that somebody published."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml.error import YAMLError

from speechbrain_qmargin.published import Published, as_options, load_published
from speechbrain_qmargin.training.checkpoints import AtomicCheckpointer, load_average
from speechbrain_qmargin.training.config import plain_settings, resolved, settings_of
from speechbrain_qmargin.training.internals import has_statistics, load_statistics, statistics
from speechbrain_qmargin.training.layout import SAVE, is_run
from speechbrain_qmargin.training.trust import object_names, refuse_code

__all__ = ["load_pretrained"]

logger = logging.getLogger(__name__)

_SAME = 1e-3  # of the features' norm


def load_pretrained(hparams: dict) -> None:
    """Start from ``pretrained``: a finished run, its epochs averaged, or a published model.

    ``pretrained_classes`` says what becomes of a run's prototypes: ``keep``, for the same classes;
    ``first``, for as many as there are now (the copies of speakers at other speeds come last and
    are dropped); ``none``, a new classifier. A run that has checkpoints of its own ignores this.

    Raises
    ------
    FileNotFoundError, ValueError
        No finished epoch there; another model, other features or other classes there than here.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> theirs, ours = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    >>> run = AtomicCheckpointer(folder / "run" / "save", {"embedding_model": theirs})
    >>> _ = run.save_checkpoint()
    >>> load_pretrained({
    ...     "pretrained": folder / "run",
    ...     "pretrained_classes": "none",
    ...     "embedding_model": ours,
    ...     "checkpointer": AtomicCheckpointer(folder / "mine" / "save"),
    ... })
    >>> torch.equal(ours.weight, theirs.weight)
    True
    """
    source, classes = hparams["pretrained"], hparams["pretrained_classes"]
    if source is None or hparams["checkpointer"].list_checkpoints():
        return
    if classes not in ("keep", "first", "none"):
        raise ValueError(f"pretrained_classes: {classes!r}; choose keep, first or none")
    if is_run(source):
        _load_run(hparams, Path(source), classes)
    elif classes != "none":
        raise ValueError(
            f"pretrained: {source} is no run (no experiment.yaml or save/ in it), and a published "
            "model has no prototypes of these classes; give --pretrained_classes none"
        )
    else:
        _load_published(hparams, load_published(source))


def _load_published(hparams: dict, published: Published) -> None:
    model = hparams["embedding_model"]
    there, here = published.encoder.state_dict(), model.state_dict()
    differing = [key for key in {**here, **there} if _shape(here, key) != _shape(there, key)]
    if differing:
        raise ValueError(
            f"pretrained: {published.path} is {published.format}'s {published.network}, and this "
            f"run's embedding_model is another network: {len(differing)} entries differ, the first "
            f"is {differing[0]}. Leave the network to it, or set {' '.join(published.options)}"
        )
    if published.is_speech:
        _check_features(hparams, published)
        norm = published.speech().mean_var_norm
        if has_statistics(norm):
            load_statistics(hparams["mean_var_norm"], statistics(norm))
    model.load_state_dict(there)
    logger.info(f"starting from {published.summary()}")


def _shape(state: Mapping[str, Any], key: str) -> Any:
    return state[key].shape if key in state else None


def _check_features(hparams: dict, published: Published) -> None:
    """Refuse features that are not those the network was trained on, whatever builds them."""
    features = hparams["compute_features"]
    speech, training = published.speech(), features.training
    rate = speech.sample_rate
    wave = torch.randn(1, rate, generator=torch.Generator().manual_seed(0)).mul_(0.1)
    with torch.no_grad():
        features.eval()
        ours, theirs = features(wave), speech.compute_features(wave)
        features.train(training)
    same = hparams["sample_rate"] == rate and ours.shape == theirs.shape
    if not same or (ours - theirs).norm() > _SAME * theirs.norm():
        raise ValueError(
            f"pretrained: {published.path} takes {speech.summary}; the features of this run are "
            f"others. Leave them to the model, or set {' '.join(published.options)}"
        )


def _other_sizes(saved: Path, hparams: Mapping[str, Any], modules: Sequence[str]) -> str:
    """Which settings of a run's modules have other values here; empty where none is found."""
    try:
        text = saved.read_text(encoding="utf-8")
        refuse_code(text, saved, object_names(text))  # nothing of it is built: that it is small
        settings = plain_settings(resolved(text))
        there = {key: settings[key] for key in ("model", "head") if settings.get(key) is not None}
        there |= settings_of(text, modules)
    except (OSError, ValueError, YAMLError):
        return ""
    differing = {
        key: value for key, value in there.items() if key in hparams and hparams[key] != value
    }
    if "classifier" not in modules:
        differing.pop("head", None)
    if not differing:
        return ""
    each = "; ".join(f"{key}: {old} there, {hparams[key]} now" for key, old in differing.items())
    settable = {key: old for key, old in differing.items() if key != "out_n_neurons"}
    words = " ".join(as_options(settable))
    return f": {each}." + (f" To start from it, say {words}" if words else "")


def _load_run(hparams: dict, source: Path, classes: str) -> None:
    save = source / SAVE
    if not save.is_dir():
        raise FileNotFoundError(f"{save} holds no checkpoint of a finished epoch")
    names = ["embedding_model"] + ["classifier"] * (classes != "none")
    modules = {name: hparams[name] for name in names}
    if classes != "none":
        there, here = (
            Path(folder, "label_encoder.txt") for folder in (save, hparams["save_folder"])
        )
        labels = [path.read_text() if path.is_file() else None for path in (there, here)]
        if labels[0] != labels[1]:
            raise ValueError(
                f"{source} was trained on other classes than these ({there} and {here} differ); "
                "give --pretrained_classes none for a new classifier"
            )
    if not (source / "results.json").is_file():
        logger.warning(f"pretrained: {source} is not finished; its last epochs so far are taken")
    checkpointer = AtomicCheckpointer(save)
    try:
        number = len(checkpointer.list_checkpoints())
        averaged = load_average(modules, checkpointer, number, classes == "first")
    except RuntimeError as error:
        raise ValueError(
            f"pretrained: {source} was trained with another model or other sizes than this run"
            + (_other_sizes(source / "experiment.yaml", hparams, names) or
               f" (--model, --size, --channels, ...); see its experiment.yaml. {str(error)[:300]}")
        ) from error  # fmt: skip
    logger.info(f"starting from {source}: {', '.join(names)}, {len(averaged)} epochs averaged")
