"""The output folder of a run: whose it is, who is at work in it, whether it is done."""

from __future__ import annotations

import functools
import json
import logging
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout
from hyperpyyaml import resolve_references
from ruamel.yaml.error import YAMLError
from speechbrain.core import DEFAULT_LOG_CONFIG
from speechbrain.utils.distributed import ddp_barrier, ddp_broadcast, if_main_process
from speechbrain.utils.logger import get_environment_description, setup_logging
from speechbrain.utils.quirks import log_applied_quirks

from speechbrain_qmargin.files import make_folder, tag_of, write_text
from speechbrain_qmargin.training.config import (
    Experiment,
    plain_settings,
    resolved,
    with_values,
)
from speechbrain_qmargin.training.layout import INFERENCE, SAVE

__all__ = ["RunFolder"]

logger = logging.getLogger(__name__)

# Settings that may change between two starts of one run.
MAY_CHANGE = {
    "batch_size",  # of one process, whose number may change; the learning rate follows
    "ckpt_interval_minutes",
    "deterministic",  # the order of sums on a GPU
    "logger",
    "train_logger",  # which that chooses
    "noise_folder",
    "num_workers",
    "out_n_neurons",  # known only after the data are prepared; check() compares it
    "rir_folder",
    "train_speakers",
    "training_data",  # as out_n_neurons
    "training_samples",  # those of the first start
    "valid_file",
}
# Settings with which a finished run is scored anew. Other classes in another folder are noticed by
# class_encoder and by check().
SCORING = {
    "allow_missing",
    "cohort_utterances",
    "data_folder",
    "enrolment_file",
    "manifest",
    "reader",
    "test_sets",
    "top_n",
    "trials_folder",
    "verification_file",
}
# Where the run is: it may be moved, and be named by another path
LOCATION = {"output_folder", "save_folder"}
# SpeechBrain's options that change what is trained, or what the embeddings are
OPTIONS = (
    "precision",
    "eval_precision",
    "auto_mix_prec",
    "bfloat16_mix_prec",
    "max_grad_norm",
    "skip_nonfinite_grads",
    "remove_vector_weight_decay",
)
# What is there once something was trained, beside the checkpoints
TRAINED = ("history.jsonl", "results.json", "results.previous.json", "embeddings.npz", INFERENCE)
# Libraries that say something of every image or font where they are let; SpeechBrain's log lets all
TALKATIVE = ("PIL", "matplotlib")
SAVED, SAVED_OPTIONS, LOCK = "experiment.yaml", "run_options.json", ".lock"


class RunFolder:
    """The output folder of an experiment.

    It holds ``experiment.yaml`` (the experiment as one document, for another to extend) and
    ``run_options.json`` (the values of SpeechBrain's options), by which a run is compared,
    SpeechBrain's ``hyperparams.yaml`` and log, and, once the run is done, ``results.json``.

    Parameters
    ----------
    experiment : Experiment

    Attributes
    ----------
    path, results_file : Path

    Examples
    --------
    >>> from speechbrain_qmargin.training.config import load_experiment
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "mine.yaml").write_text(f"output_folder: {folder / 'run'}\\nlr: 0.1\\n")
    >>> run = RunFolder(load_experiment([str(folder / "mine.yaml")]))
    >>> run.path.name, run.announce_finished(), run.saved_setting("lr")
    ('run', False, None)
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.path = experiment.output_folder
        self.results_file = self.path / "results.json"

    def begin(self) -> None:
        """Make the folder, on the main process.

        Earlier results become ``results.previous.json``: until there are new ones the run is not
        done.
        """
        if if_main_process():
            text = self.experiment.text
            write_text(self.path / SAVED, text)
            write_text(self.path / SAVED_OPTIONS, json.dumps(self._options(), indent=2) + "\n")
            if self.results_file.is_file():
                self.results_file.replace(self.path / "results.previous.json")
            # as SpeechBrain's create_experiment_directory, which also copies the file that calls it
            plain = resolve_references(text).read()
            write_text(self.path / "hyperparams.yaml", f"# {SAVED}, resolved\n{plain}")
            log = {
                "handlers": {"file_handler": {"filename": str(self.path / "log.txt")}},
                "loggers": {name: {"level": "INFO"} for name in TALKATIVE},
            }
            setup_logging(DEFAULT_LOG_CONFIG, log)
            sys.excepthook = _log_exception
            log_applied_quirks()
            logger.info(f"Experiment folder: {self.path}")
            write_text(self.path / "env.log", _environment())

    def refuse_another_machines(self) -> None:
        """Each machine would keep its shards, of which none could make the checkpoint whole.

        To be called while the folder is locked, before anything is prepared in it.

        Raises
        ------
        OSError
            This process does not see the folder that the main process made.
        """
        # a name that nobody has looked for: what is missing is remembered by network file systems
        seen = self.path / f".seen-{ddp_broadcast(uuid4().hex)}"
        if if_main_process():
            seen.touch()
        ddp_barrier()
        shared = seen.exists()
        ddp_barrier()
        if if_main_process():
            seen.unlink()
        if not shared:
            raise OSError(
                f"{self.path}: {platform.node()} does not see the folder that the first process "
                "made. With several machines output_folder has to lie in a file system that all of "
                "them share"
            )

    def _options(self) -> dict[str, Any]:
        """What decides: the command line, then the YAML, then SpeechBrain's default."""
        given, settings = self.experiment.run_opts, self.experiment.settings
        return {
            name: settings[name]
            if name in settings and name not in given.overridden_args
            else given[name]
            for name in OPTIONS
        }

    def saved_setting(self, key: str) -> Any:
        """A plain setting as the folder's run began with it; None where there is none."""
        saved = self.path / SAVED
        if not saved.is_file():
            return None
        return plain_settings(resolved(saved.read_text(encoding="utf-8"))).get(key)

    def announce_finished(self) -> bool:
        """Whether a run with these settings has ended here; if so, say so and show its table.

        Raises
        ------
        ValueError
            Its results are damaged; settings of another run, see :meth:`check`.
        """
        if not self.results_file.is_file():
            return False
        self.check()
        now = self.experiment.settings
        try:
            before = json.loads(self.results_file.read_text(encoding="utf-8"))["settings"]
            changed = [key for key in sorted(SCORING) if before.get(key) != now.get(key)]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{self.results_file}: damaged ({error}); delete it, and the run is scored anew"
            ) from None
        if changed:
            if if_main_process():
                print(f"Trained already; scored anew, for {', '.join(changed)} changed.")
            return False
        if if_main_process():
            print((self.path / "results.txt").read_text(encoding="utf-8"))
            print(
                f"This run is done: {self.path} holds its results. Delete the folder to repeat it, "
                "or give another --output_folder."
            )
        return True

    def forget_false_start(self) -> None:
        """Take the folder over from a start that ended before its first checkpoint.

        Nothing was trained there, so there is nothing to continue: a mistake in a setting may be
        mended in the same folder.
        """
        saves = {self.path / SAVE, Path(self.experiment.settings["save_folder"])}
        trained = any(next(save.glob("CKPT*"), None) for save in saves)
        if trained or any((self.path / name).exists() for name in TRAINED):
            return
        if (self.path / SAVED).is_file():
            for name in (SAVED_OPTIONS, "hyperparams.yaml", SAVED):  # the one looked for last
                (self.path / name).unlink(missing_ok=True)
            for save in saves:
                (save / "label_encoder.txt").unlink(missing_ok=True)

    def check(self, **known_now: Any) -> None:
        """Refuse to continue another experiment's folder; names what differs.

        Everything that the settings resolve to is compared, objects too, but for what may change
        between two starts and where the run is. `known_now` are values that the data decide.

        Raises
        ------
        ValueError
            The output folder holds a run with other settings, of other data, or of another recipe.
        """
        saved = self.path / SAVED
        if not saved.is_file():
            if (self.path / "hyperparams.yaml").is_file() or list(self.path.glob("save/CKPT*")):
                raise ValueError(
                    f"{self.path} holds a run of another recipe (it has no {SAVED}). Give a new "
                    "--output_folder"
                )
            return
        free = MAY_CHANGE | SCORING | LOCATION
        text = saved.read_text(encoding="utf-8", errors="replace")
        try:
            before = resolved(text)
            for key, value in known_now.items():
                if before.get(key, value) != value:
                    raise ValueError(
                        f"{self.path} holds a run with {key} = {before[key]}; these data give "
                        f"{value}. Give the data that it began with, or a new --output_folder"
                    )
            now = resolved(self.experiment.text)
            # what may differ is given today's value, so that what refers to it is the same as well
            same = {
                key: value
                for key, value in plain_settings(now).items()
                if key in free and key in before
            }
            then = dict(_leaves(resolved(with_values(text, saved, same))))
        except (YAMLError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{saved}: damaged ({' '.join(str(error).split())[:200]}); give a new "
                "--output_folder, or mend it: it is what --print_config writes"
            ) from None
        today = dict(_leaves(now))
        found = {
            path: (then.get(path, "nothing"), today.get(path, "nothing"))
            for path in {**then, **today}
            if then.get(path) != today.get(path) and path.split(".")[0] not in free
        }
        if (pretrained := found.get("pretrained")) and self._same_place(before, now, *pretrained):
            del found["pretrained"]
        found |= self._other_options()
        if found:
            top = {path: values for path, values in found.items() if "." not in path}
            others = {path: one for path, one in found.items() if one not in top.values()}
            shown = "; ".join(
                f"{path}: {old} there, {new} now"
                for path, (old, new) in list({**top, **others}.items())[:6]
            )
            raise ValueError(
                f"{self.path} holds a run of another experiment ({shown}). Give a new "
                "--output_folder, delete that one, or repeat its settings to continue it"
            )

    def _other_options(self) -> dict[str, tuple[Any, Any]]:
        """SpeechBrain's options that differ, there and now."""
        saved, now = self.path / SAVED_OPTIONS, self._options()
        if not saved.is_file():
            return {}
        try:
            then = json.loads(saved.read_text(encoding="utf-8"))
            return {f"--{n}": (then[n], now[n]) for n in OPTIONS if then[n] != now[n]}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{saved}: damaged ({error!r}); delete it if the run's options were today's"
            ) from None

    @staticmethod
    def _same_place(before: Any, now: Any, then: str, today: str) -> bool:
        """Whether two paths are of one run, moved with this one or named in another way."""
        if not (isinstance(then, str) and isinstance(today, str)):
            return False
        beside = [os.path.relpath(path, tree["output_folder"])
                  for path, tree in ((then, before), (today, now))]  # fmt: skip
        return beside[0] == beside[1] or os.path.realpath(then) == os.path.realpath(today)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against another start, on the main process.

        The lock is the operating system's: a process that was killed leaves none behind.

        Raises
        ------
        OSError
            Another process is at work in the folder.
        """
        if not if_main_process():
            yield
            return
        made = [one for one in (self.path, *self.path.parents) if not one.is_dir()]
        make_folder(self.path)
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise OSError(
                f"{self.path}: another start is at work in this folder; wait for it, or give "
                "another --output_folder"
            ) from None
        try:
            yield
        finally:
            if made and {file.name for file in self.path.iterdir()} == {LOCK}:  # nothing came of it
                (self.path / LOCK).unlink()
                with suppress(OSError):  # up to the first in which something else is
                    for folder in made:
                        folder.rmdir()
            lock.release()


@functools.cache
def _environment() -> str:
    """Once a process: it asks pip, which takes a second."""
    return get_environment_description()


def _log_exception(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    """Into the run's log as well."""
    logger.error("Exception:", exc_info=(kind, error, traceback))


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of every scalar of a resolved tree, and every tag."""
    tag = tag_of(node)
    if isinstance(node, (dict, list)):
        if tag:
            yield path, tag
        parts = node.items() if isinstance(node, dict) else enumerate(node)
        if isinstance(node, list) and not any(isinstance(one, (dict, list)) for one in node):
            yield f"{path}[]" if tag else path, [_scalar(one) for one in node]
            return
        for key, value in parts:
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, _scalar(node)


def _scalar(node: Any) -> Any:
    tag = tag_of(node)
    return f"{tag} {node.value}".strip() if tag else node
