"""What every recipe does, in its order: data, model, training, embeddings, trials, results.

A recipe's script says only what its data are: a function from the settings to a :class:`Task`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speechbrain.utils.distributed import if_main_process

from speechbrain_qmargin.data.skipped import write_listing
from speechbrain_qmargin.loss.base import Loss
from speechbrain_qmargin.loss.device import usable_device
from speechbrain_qmargin.scoring.lists import Cohort
from speechbrain_qmargin.scoring.separation import refuse_tested
from speechbrain_qmargin.training.brain import VerificationBrain
from speechbrain_qmargin.training.config import Experiment, load_experiment
from speechbrain_qmargin.training.layout import INFERENCE
from speechbrain_qmargin.training.pretrained import load_pretrained
from speechbrain_qmargin.training.processes import (
    deterministic_algorithms,
    main_process_first,
    processes,
    refuse_one_gpu_for_all,
)
from speechbrain_qmargin.training.results import validation, verify
from speechbrain_qmargin.training.run_folder import RunFolder
from speechbrain_qmargin.trials import LabelledTrials

__all__ = ["Datasets", "Task", "train_verifier"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Datasets:
    """SpeechBrain datasets of a run.

    Attributes
    ----------
    train : dataset with ``id`` and the Brain's ``label_key``; for losses with counts its
        `class_counts` gives the number of items of each class, or None where it is not known
    test, valid, cohort : datasets with `ids` and `describe`, as
        :class:`~speechbrain_qmargin.data.speech_dataset.SpeechDataset`: the recordings
        of the trials, of the validation trials (None: no validation), and those of
        training classes that scores are normalised with (None: they are not).
    cohort_classes : mapping from id to class, of the cohort
    sampler : torch Sampler of the training items; None: shuffled
    """

    train: Any
    test: Any
    valid: Any = None
    cohort: Any = None
    cohort_classes: Mapping[str, str] = field(default_factory=dict)
    sampler: Any = None


@dataclass(frozen=True)
class Task:
    """What a recipe trains and is tested on.

    Attributes
    ----------
    num_classes : int
    num_items : int
        Training items of an epoch.
    datasets : callable
        From the loaded hyperparameters to :class:`Datasets`.
    test_trials : dict from name to Trials
    pair_sets : dict from name to bool array [N]
        Pairs without identities, measured over ten folds: whether pair n is one identity. Its
        images are in the test dataset by :func:`~speechbrain_qmargin.faces.pair_sets.pair_ids`.
    valid_trials : Trials, optional
    note : str
        Printed before training and in the results, where it says that data are synthetic.
    units : str
        What the tables call those who are verified.
    known : mapping
        Further settings that the data decide: a run goes on with the same ones alone.
    """

    num_classes: int
    num_items: int
    datasets: Callable[[dict], Datasets]
    test_trials: Mapping[str, LabelledTrials]
    pair_sets: Mapping[str, np.ndarray] = field(default_factory=dict)
    valid_trials: LabelledTrials | None = None
    note: str = ""
    units: str = "speakers"
    known: Mapping[str, Any] = field(default_factory=dict)


def train_verifier(
    argv: list[str],
    brain_class: type[VerificationBrain],
    prepare: Callable[[dict], Task],
    export: Callable[..., Any] | None = None,
) -> Experiment:
    """Train, embed and verify as the command line says; resume or say that it is done.

    Parameters
    ----------
    argv : list of str
        ``hparams.yaml [--key value ...]``
    brain_class : type
    prepare : callable
        From the experiment's settings to a :class:`Task`; called on the main process first. What
        is made once for all goes by
        :func:`~speechbrain_qmargin.training.processes.made_by_main_process`.
    export : callable, optional
        Once the results are there, writes ``inference/``, the encoder alone:
        ``speechbrain_qmargin.export.inference.export_run``.

    Returns
    -------
    Experiment
        What the command line said.
    """
    experiment = load_experiment(argv)
    _refuse_none_at_all(experiment.settings)
    if experiment.run_opts.device is not None:  # before the data are prepared
        refuse_one_gpu_for_all(experiment.run_opts.device)
        usable_device(experiment.run_opts.device)
    folder = RunFolder(experiment)
    inference = folder.path / INFERENCE
    deterministic = experiment.settings.get("deterministic", False)
    with processes(experiment.run_opts), deterministic_algorithms(deterministic):
        main, trained = if_main_process(), False
        if not folder.announce_finished():
            with folder.locked():
                trained = _train_and_verify(folder, brain_class, prepare)
    # without the others: a classifier in shards is whole in the checkpoints
    if export is not None and main and (trained or not inference.is_dir()):
        export(folder.path, trust=experiment.objects)
    return experiment


def _refuse_none_at_all(settings: Mapping[str, Any]) -> None:
    """Before the data are read: no epoch, no batch and no crop train nothing."""
    for key in ("number_of_epochs", "batch_size"):
        value = settings.get(key, 1)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{key}: {value}; a whole number from 1 on is wanted")
    if not settings.get("sentence_len", 1) > 0:
        raise ValueError(f"sentence_len: {settings['sentence_len']}; seconds above 0 are wanted")


def _refuse_tested(task: Task) -> None:
    """Before anything is trained: validation on the very trials of the test."""
    if task.valid_trials is None:
        return
    for trials in task.test_trials.values():
        if shared := refuse_tested(trials, task.valid_trials):
            logger.warning(shared)


def count_classes(hparams: dict, train: Any) -> None:
    """Tell a loss that needs it, and was given no counts, how many items each class has.

    Raises
    ------
    ValueError
        The labels are in the images, which are not read before training.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> from speechbrain_qmargin import make_loss
    >>> loss = make_loss("qmargin_prior", num_classes=2)
    >>> hparams = {"compute_cost": loss, "loss": "qmargin_prior", "loss_options": {}}
    >>> train = SimpleNamespace(class_counts=lambda: np.array([9, 1]))
    >>> count_classes(hparams | {"embedding_dim": 192}, train)
    >>> q = loss.log_q.exp()
    >>> round(float(q[0] / q[1]), 4)        # (9 / 1) ** 0.5, the temperature
    3.0
    """
    cost = hparams.get("compute_cost")
    if not isinstance(cost, Loss) or not cost.needs_counts or "counts" in hparams["loss_options"]:
        return
    counts = train.class_counts()
    if counts is None:
        raise ValueError(
            f"loss: {hparams['loss']} needs the number of images of each identity, which these "
            "records do not list: give --loss_options='{counts: [...]}'"
        )
    counts = np.where(counts > 0, counts, 1)  # numbers without images
    cost.count_classes(torch.from_numpy(counts), hparams["embedding_dim"])


def _train_and_verify(
    folder: RunFolder, brain_class: type[VerificationBrain], prepare: Callable[[dict], Task]
) -> bool:
    """Whether there was an epoch left to train."""
    experiment = folder.experiment
    folder.refuse_another_machines()
    main_process_first(folder.forget_false_start)
    folder.check()
    # until SpeechBrain sets up its own, in the output folder
    level = logging.INFO if if_main_process() else logging.ERROR
    logging.basicConfig(level=level, format="%(name)s - %(message)s")
    # The classes decide the classifier's size, so the data come before the model
    task = main_process_first(lambda: prepare(experiment.settings))
    if task.note and if_main_process():
        print(f"Training on {task.note}.", flush=True)
    _refuse_tested(task)
    known = {**task.known, "out_n_neurons": task.num_classes}
    folder.check(**known)
    # of the first start, or of the run that this one fine-tunes
    first = folder.saved_setting("training_samples") or experiment.settings.get("training_samples")
    samples = first or task.num_items * experiment.settings["number_of_epochs"]
    hparams = experiment.load(**known, training_samples=samples)
    data = main_process_first(lambda: task.datasets(hparams))
    count_classes(hparams, data.train)
    folder.begin()
    load_pretrained(hparams)

    brain = brain_class(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=experiment.run_opts,
        checkpointer=hparams["checkpointer"],
        validate=validation(task.valid_trials),
    )
    loading, train_loading = hparams["test_dataloader"], hparams["train_dataloader"]
    if data.sampler is not None:
        train_loading = {**train_loading, "sampler": data.sampler, "shuffle": False}
    brain.fit(
        hparams["epoch_counter"],
        data.train,
        data.valid,
        train_loader_kwargs=train_loading,
        valid_loader_kwargs=loading,
    )
    embeddings = brain.extract(data.test, **loading)
    faults: dict[str, str] = {}
    cohort_embeddings = brain.extract(data.cohort, faults, **loading) if data.cohort else {}
    if not if_main_process():
        return brain.epochs_trained > 0
    listing = Path(hparams["save_folder"]) / "skipped_cohort.tsv"
    write_listing(listing, faults)
    if faults:
        logger.warning(
            f"cohort: {len(faults)} of its recordings are left out, listed in {listing}; the "
            f"first is {next(iter(faults))}: {next(iter(faults.values()))}"
        )
    cohort = None
    if cohort_embeddings:
        classes = {name: data.cohort_classes[name] for name in cohort_embeddings}
        top_n = min(hparams["top_n"], len(set(classes.values())))
        cohort = Cohort.of(cohort_embeddings, classes, top_n=top_n)
    verify(
        folder,
        embeddings,
        task.test_trials,
        brain.history(),
        note=task.note,
        cohort=cohort,
        pair_sets=task.pair_sets,
        units=task.units,
        loss=brain.loss_values(),
    )
    return brain.epochs_trained > 0
