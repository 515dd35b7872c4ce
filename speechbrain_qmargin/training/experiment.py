"""What every recipe does around its training: settings, the output folder, results.

A recipe is one YAML and one script. The YAML holds the full-size experiment and names the
files that complete it, a model, a head, a size (:func:`load_experiment`); the command line wins.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml, resolve_references
from hyperpyyaml.core import recursive_update
from ruamel.yaml import YAML
from speechbrain.utils.checkpoints import Checkpoint, Checkpointer
from speechbrain.utils.distributed import ddp_barrier, ddp_init_group, if_main_process

from speechbrain_qmargin.embeddings import cosine_scores, save_embeddings
from speechbrain_qmargin.faces.pair_sets import pair_scores, ten_fold_accuracy, ten_fold_tar
from speechbrain_qmargin.files import write_text
from speechbrain_qmargin.scoring.lists import Cohort, score_lists
from speechbrain_qmargin.scoring.metrics import eer, operating_points, tar_at_far
from speechbrain_qmargin.scoring.plots import plot_det
from speechbrain_qmargin.scoring.report import Report
from speechbrain_qmargin.trials import Trials, read_trials, write_scores

__all__ = [
    "AtomicCheckpointer",
    "Experiment",
    "load_experiment",
    "main_process_first",
    "pair_ids",
    "processes",
    "validation",
    "verify",
]

logger = logging.getLogger(__name__)

# Settings that may change between two starts of one run.
MAY_CHANGE = {
    "batch_size",  # of one process, whose number may change; the learning rate follows
    "ckpt_interval_minutes",
    "logger",
    "noise_folder",
    "num_workers",
    "out_n_neurons",  # known only after the data are prepared; Experiment.load compares it
    "rir_folder",
    "train_speakers",
    "valid_file",
}
# Settings with which a finished run is scored anew. Other classes in another folder are noticed by
# class_encoder and Experiment.load.
SCORING = {
    "allow_missing",
    "cohort_utterances",
    "data_folder",
    "test_sets",
    "top_n",
    "trials_folder",
    "verification_file",
}


@dataclass
class Experiment:
    """A parsed command line.

    Attributes
    ----------
    hparams_file : str
        The YAML.
    run_opts : speechbrain RunOptions
    text : str
        The whole experiment as one HyperPyYAML document: the YAML with what it extends, its
        overlays and the command line.
    settings : dict
        The plain values (numbers, strings, lists) of `text`, resolved.
    """

    hparams_file: str
    run_opts: Any
    text: str
    settings: dict

    @property
    def output_folder(self) -> Path:
        return Path(self.settings["output_folder"])

    @property
    def results_file(self) -> Path:
        return self.output_folder / "results.json"

    def load(self, **known_now: Any) -> dict:
        """The hyperparameters as objects; `known_now` are values that the data decided."""
        tree = _round_trip(self.text)
        before = self._before()
        for key, value in known_now.items():
            if before.get(key, value) != value:
                raise ValueError(
                    f"{self.output_folder} holds a run with {key} = {before[key]}; these data give "
                    f"{value}. Give a new --output_folder"
                )
        tree.update(known_now)
        self.settings.update(known_now)  # the results say them too
        self.text = _dump(tree)
        return load_hyperpyyaml(self.text)

    def begin(self) -> None:
        """On the main process make the output folder, with ``experiment.yaml`` (`text`, for another
        experiment to extend), SpeechBrain's ``hyperparams.yaml`` and its log.

        Results of a scoring before become ``results.previous.json``: until there are new ones the
        run is not done.
        """
        saved = self.output_folder / "experiment.yaml"
        if if_main_process():
            write_text(saved, self.text)
            if self.results_file.is_file():
                self.results_file.replace(self.output_folder / "results.previous.json")
        sb.core.create_experiment_directory(str(self.output_folder), str(saved))

    def announce_finished(self) -> bool:
        """Whether a run with these settings has ended here; if so, say so and show its table."""
        if not self.results_file.is_file():
            return False
        self.check_output_folder()
        before = json.loads(self.results_file.read_text(encoding="utf-8"))["settings"]
        changed = [key for key in sorted(SCORING) if before.get(key) != self.settings.get(key)]
        if changed:
            if if_main_process():
                print(f"Trained already; scored anew, for {', '.join(changed)} changed.")
            return False
        if if_main_process():
            print((self.output_folder / "results.txt").read_text(encoding="utf-8"))
            print(
                f"This run is done: {self.output_folder} holds its results. Delete the folder to "
                "repeat it, or give another --output_folder."
            )
        return True

    def check_output_folder(self) -> None:
        """Refuse to continue another experiment's folder; names what differs.

        Raises
        ------
        ValueError
            The output folder holds a run with other settings.
        """
        before = self._before()
        differing = {
            key: (before.get(key), value)
            for key, value in self.settings.items()
            if key in before and before[key] != value and key not in MAY_CHANGE | SCORING
        }
        if differing:
            shown = "; ".join(
                f"{key}: {old} there, {new} now" for key, (old, new) in differing.items()
            )
            raise ValueError(
                f"{self.output_folder} holds a run of another experiment ({shown}). Give a new "
                "--output_folder, delete that one, or repeat its settings to continue it"
            )

    def _before(self) -> dict:
        """The settings of the run that the output folder holds; empty without one."""
        saved = self.output_folder / "hyperparams.yaml"
        if not saved.is_file():
            return {}
        return _plain(_round_trip(saved.read_text(encoding="utf-8")))


def _round_trip(text: str) -> Any:
    """A YAML text with its tags and comments."""
    return YAML().load(text)


def _dump(tree) -> str:
    stream = StringIO()
    YAML().dump(tree, stream)
    return stream.getvalue()


def _plain(tree) -> dict:
    """The untagged scalars and lists of a parsed YAML."""
    return {
        key: value
        for key, value in tree.items()
        if value is None or isinstance(value, (bool, int, float, str, list))
    }


def load_experiment(argv: list[str]) -> Experiment:
    """Parse ``hparams.yaml [--key value ...]`` as SpeechBrain does, and compose the experiment.

    Two keys of the YAML name other files beside it, with ``<key>`` for a setting's value:
    ``extends`` is the YAML that this one completes or changes; ``overlays`` is a list of YAMLs over
    it, ``models/<model>.yaml`` or ``sizes/<size>.yaml``. The later one wins and whole entries are
    replaced; then comes the command line, which also chooses among the overlays. An overlay's
    plain value for a key that no file but an overlay has is left out where nothing refers to it:
    a size may speak of every model.

    ``size: full`` has no file. ``size: auto`` is ``mini`` without a ``data_folder``, else ``full``.

    Raises
    ------
    FileNotFoundError, ValueError
        A missing YAML, an unknown choice, an override that names no key of the experiment.
    """
    hparams_file, run_opts, overrides_text = sb.parse_arguments(argv)
    path = Path(hparams_file)
    keys = [line.split(":", 1)[0] for line in overrides_text.splitlines()]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"--{twice[0]} is given twice on the command line")
    given = _round_trip(overrides_text) or {}
    tree = _compose(path, given)
    # HyperPyYAML wants a value before what refers to it: scalars first, then objects
    objects = {key: node for key, node in tree.items() if isinstance(node, (dict, list))}
    text = _dump({key: tree[key] for key in tree if key not in objects} | objects)
    settings = _plain(_round_trip(resolve_references(text).read()))
    return Experiment(str(path), run_opts, text, settings)


def _compose(path: Path, given: dict) -> Any:
    """The tree of a YAML, what it extends, its overlays and the command line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such hyperparameter file (in {os.getcwd()})")
    own = _round_trip(path.read_text(encoding="utf-8"))
    overlays = own.pop("overlays", [])
    parent = own.pop("extends", None)
    tree = own
    if parent is not None:
        tree = _compose(_named(parent, path, {**_plain(own), **given}), {})
        tree.update(own)
    if "size" in tree:
        size = given.get("size", tree["size"])
        if size == "auto":
            no_data = given.get("data_folder", tree.get("data_folder")) is None
            size = "mini" if no_data else "full"
        given = {**given, "size": size}
    choices, layers = {**_plain(tree), **given}, []
    for name in reversed(overlays):  # a later one may choose among those before it
        if name.endswith("<size>.yaml") and choices["size"] == "full":
            continue
        layers.insert(0, (name, _compose(_named(name, path, choices), {})))
        choices = {**choices, **layers[0][1], **given}
    for name, layer in layers:
        sized = name.endswith("<size>.yaml")
        tree.update({key: layer[key] for key in layer if not sized or key in tree})
    unknown = sorted(set(given) - set(tree))
    if unknown:
        raise ValueError(
            f"--{unknown[0]} is neither a setting of {path} nor an option of SpeechBrain; "
            f"the settings are {', '.join(_plain(tree))}"
        )
    recursive_update(tree, given)
    return tree


def _named(name: str, path: Path, choices: dict) -> Path:
    """The file that `name` means beside `path`; an unknown choice is named with the known ones."""
    keys = re.findall(r"<(\w+)>", name)
    if missing := [key for key in keys if choices.get(key) is None]:
        raise ValueError(f"--{missing[0]} must be given: {path} starts from it")
    file = Path(re.sub(r"<(\w+)>", lambda match: str(choices[match[1]]), name))
    if not name.startswith("<"):  # a folder that the user gave is where the user is
        file = path.parent / file
    if not file.is_file():
        if len(keys) == 1 and file.parent.is_dir() and Path(name).stem == f"<{keys[0]}>":
            known = sorted(one.stem for one in file.parent.glob("*.yaml"))
            known = (["auto", "full"] if keys[0] == "size" else []) + known
            raise ValueError(
                f"{keys[0]}: {choices[keys[0]]!r} is unknown; choose {', '.join(known)}"
            )
        raise FileNotFoundError(f"{file}: {path} starts from it, but there is no such file")
    return file


@contextmanager
def processes(run_opts: Any) -> Iterator[None]:
    """The processes that torchrun started, joined for the time of a run."""
    ddp_init_group(run_opts)
    try:
        yield
        ddp_barrier()  # none leaves while another still needs it
    finally:
        if torch.distributed.is_initialized():
            gc.collect()  # what still holds the group would end its threads too late
            torch.distributed.destroy_process_group()


def main_process_first(function: Callable[[], Any]) -> Any:
    """Call a function on the main process, then on the others, which find its files in place."""
    if not if_main_process():
        ddp_barrier()
    try:
        return function()
    finally:
        if if_main_process():
            ddp_barrier()


def validation(
    trials_file: str | Path | None,
) -> Callable[[Mapping[str, np.ndarray]], dict] | None:
    """What a Brain measures on validation embeddings: EER, TAR at FAR 1e-2. None without trials."""
    if trials_file is None:
        return None
    trials = read_trials(trials_file)

    def validate(embeddings: Mapping[str, np.ndarray]) -> dict[str, float]:
        points = operating_points(cosine_scores(embeddings, trials), trials.is_target)
        return {"eer": eer(points), "tar_at_1e-2": tar_at_far(points, 1e-2)[0]}

    return validate


def verify(
    experiment: Experiment,
    embeddings: Mapping[str, np.ndarray],
    lists: Mapping[str, Trials],
    history: list[dict],
    note: str = "",
    cohort: Cohort | None = None,
    pair_sets: Mapping[str, np.ndarray] | None = None,
    units: str = "speakers",
) -> dict[str, dict[str, Report]]:
    """Score the test lists; write and print the results of a run.

    In the output folder: ``embeddings.npz``, ``scores/<list>/`` with every system's unrounded
    scores and ``det.png``, ``results.txt`` (the printed tables) and, last, ``results.json``, which
    marks the run as done. Its ``figures`` are the first list's, by cosine. `pair_sets` are
    measured over ten folds, as faces are; their scores and DET stand beside the lists'.
    """
    folder, settings = experiment.output_folder, experiment.settings
    save_embeddings(folder / "embeddings.npz", embeddings)
    reports, tables = score_lists(
        folder / "scores", lists, embeddings, cohort=cohort, title=note, units=units
    )

    seconds = sum(record["seconds"] for record in history)
    name = settings["loss"]
    lines = [f"{name}, {settings['model']}, {len(history)} epochs, seed {settings['seed']}"]
    lines += [note] if note else []
    folds = {
        name: _pair_set(folder / "scores" / name, name, embeddings, same, note)
        for name, same in (pair_sets or {}).items()
    }
    lines += ["", *(f"{name}: {one}" for name, figures in folds.items() for one in figures)]
    lines += [tables.rstrip(), f"training took {seconds / 60:.1f} minutes"]
    last = history[-1] if history else {}
    if "support_mean" in last:
        lines.append(
            f"support in the last epoch: {last['support_mean']:.1f} classes a sample on average, "
            f"at most {last['support_max']}; {100 * last['zero_loss']:.0f} % of the samples at "
            "zero loss"
        )
    pictures = [f"scores/{name}/det.png" for name in [*lists, *folds]]
    files = ", ".join([*pictures, "scores", "embeddings.npz", "history.jsonl"])
    lines.append(f"files: {folder}/ {files}")
    table = "\n".join(lines) + "\n"
    write_text(folder / "results.txt", table)
    used = {key: getattr(experiment.run_opts, key, None) for key in ("precision", "device")}
    results = {
        "settings": settings,
        "run_opts": used,
        "note": note,
        "seconds": seconds,
        "last_epoch": last,
        **(next(iter(reports.values()))["cosine"].to_dict() if reports else {}),
        "pair_sets": {name: [asdict(one) for one in figures] for name, figures in folds.items()},
        "lists": {
            name: {system: report.to_dict() for system, report in systems.items()}
            for name, systems in reports.items()
        },
    }
    text = json.dumps(results, indent=2, default=np.ndarray.tolist)
    write_text(experiment.results_file, text + "\n")
    print("\n" + table)
    return reports


def pair_ids(name: str, count: int) -> list[str]:
    """The ids of a pair set's images, two a pair.

    Examples
    --------
    >>> pair_ids("lfw", 1)
    ['lfw/000000', 'lfw/000001']
    """
    return [f"{name}/{number:06d}" for number in range(2 * count)]


def _pair_set(
    folder: Path, name: str, embeddings: Mapping[str, np.ndarray], same: np.ndarray, title: str
) -> tuple:
    """The figures over ten folds; the scores and the DET go into the folder."""
    ids = pair_ids(name, len(same))
    rows = np.stack([embeddings[one] for one in ids])
    scores = pair_scores(rows, flip="none")  # the Brain has added the mirror images already
    trials = Trials(ids, np.arange(0, len(ids), 2), np.arange(1, len(ids), 2), same)
    write_scores(folder / "cosine.tsv", trials, scores)
    plot_det({"cosine": (scores, same)}, folder / "det.png", f"{name}. {title}" if title else name)
    return ten_fold_accuracy(scores, same), ten_fold_tar(scores, same)


# torch reports a file that cannot be written as RuntimeError
_FULL_DISK = re.compile("PytorchStreamWriter|inline_container|unexpected pos|iostream", re.I)


class AtomicCheckpointer(Checkpointer):
    """SpeechBrain's Checkpointer, whose checkpoints appear whole or not at all.

    The original writes into the folder that a resuming run would read; killed half-way, it leaves
    a checkpoint that cannot be loaded. This one writes beside it and renames at the end.
    """

    _PARTIAL = "partial_"

    def save_checkpoint(self, *args, verbosity=logging.INFO, **kwargs):
        """As SpeechBrain's; the folder takes its final name once everything is in it."""
        if if_main_process():
            for leftover in self.checkpoints_dir.glob(self._PARTIAL + "*"):
                shutil.rmtree(leftover, ignore_errors=True)
        try:
            saved = super().save_checkpoint(*args, verbosity=logging.DEBUG, **kwargs)
        except (OSError, RuntimeError) as error:
            if not isinstance(error, OSError) and not _FULL_DISK.search(str(error)):
                raise
            free = shutil.disk_usage(self.checkpoints_dir).free / 2**20
            raise OSError(
                f"{self.checkpoints_dir}: a checkpoint could not be written ({free:.0f} MiB are "
                f"free; {error}). The last whole one is kept: make room and start again to resume"
            ) from error
        ddp_barrier()  # every process has written its share
        if saved is not None:
            final = saved.path.with_name(saved.path.name.removeprefix(self._PARTIAL))
            saved.path.replace(final)
            logger.log(verbosity, f"saved checkpoint {final}")
            files = {key: final / file.name for key, file in saved.paramfiles.items()}
            saved = Checkpoint(final, saved.meta, files)
        ddp_barrier()  # all see the same checkpoints when they choose which to delete
        return saved

    def _new_checkpoint_dirpath(self):
        return self._hidden(super()._new_checkpoint_dirpath())

    def _custom_checkpoint_dirpath(self, name):
        return self._hidden(super()._custom_checkpoint_dirpath(name))

    def _hidden(self, path: Path) -> Path:
        return path.with_name(self._PARTIAL + path.name)
