"""What every recipe does around its training: settings, the output folder, results.

A recipe is one YAML and one script. The YAML holds the full-size experiment; a file of the same
folder, ``sizes/<size>.yaml``, overrides scalars for a smaller one, and the command line overrides
both.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import speechbrain as sb
from hyperpyyaml import resolve_references
from ruamel.yaml import YAML
from speechbrain.utils.checkpoints import Checkpoint, Checkpointer
from speechbrain.utils.distributed import ddp_barrier, if_main_process

from speechbrain_qmargin.files import write_text
from speechbrain_qmargin.scoring.metrics import eer, operating_points, tar_at_far
from speechbrain_qmargin.scoring.report import Report, evaluate, plot_det
from speechbrain_qmargin.scoring.trials import (
    cosine_scores,
    read_trials,
    save_embeddings,
    write_scores,
)

__all__ = [
    "AtomicCheckpointer",
    "Experiment",
    "load_experiment",
    "main_process_first",
    "validation",
    "verify",
]

logger = logging.getLogger(__name__)

# Settings that may change between two starts of one run.
MAY_CHANGE = {
    "data_folder",
    "num_workers",
    "out_n_neurons",  # known only after the data are prepared; speaker_encoder compares speakers
    "train_speakers",
    "valid_file",
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
    overrides : dict
        The size's and the command line's overrides, in this order; for ``load_hyperpyyaml``.
    settings : dict
        The plain values (numbers, strings, lists) of the resolved YAML.
    """

    hparams_file: str
    run_opts: Any
    overrides: dict
    settings: dict

    @property
    def output_folder(self) -> Path:
        return Path(self.settings["output_folder"])

    @property
    def results_file(self) -> Path:
        return self.output_folder / "results.json"

    def announce_finished(self) -> bool:
        """Whether a run with these settings has ended here; if so, say so and show its table."""
        if not self.results_file.is_file():
            return False
        self.check_output_folder()
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
        saved = self.output_folder / "hyperparams.yaml"
        if not saved.is_file():
            return
        before = _plain(YAML().load(saved.read_text(encoding="utf-8")))
        differing = {
            key: (before.get(key), value)
            for key, value in self.settings.items()
            if key in before and before[key] != value and key not in MAY_CHANGE
        }
        if differing:
            shown = "; ".join(
                f"{key}: {old} there, {new} now" for key, (old, new) in differing.items()
            )
            raise ValueError(
                f"{self.output_folder} holds a run of another experiment ({shown}). Give a new "
                "--output_folder, delete that one, or repeat its settings to continue it"
            )


def _plain(tree) -> dict:
    """The untagged scalars and lists of a parsed YAML."""
    return {
        key: value
        for key, value in tree.items()
        if value is None or isinstance(value, (bool, int, float, str, list))
    }


def load_experiment(argv: list[str]) -> Experiment:
    """Parse ``hparams.yaml [--key value ...]`` as SpeechBrain does, with sizes.

    The YAML's ``size`` names a file ``sizes/<size>.yaml`` beside it whose values override the
    YAML's own; ``full`` overrides nothing; ``auto`` is ``mini`` without a ``data_folder`` and
    ``full`` with one.

    Raises
    ------
    FileNotFoundError, ValueError, KeyError
        A missing YAML, an unknown size, an override that names no key of the YAML.
    """
    hparams_file, run_opts, overrides_text = sb.parse_arguments(argv)
    path = Path(hparams_file)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such hyperparameter file (in {os.getcwd()})")
    keys = [line.split(":", 1)[0] for line in overrides_text.splitlines()]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"--{twice[0]} is given twice on the command line")
    given = dict(YAML().load(overrides_text) or {})
    base = YAML().load(path.read_text(encoding="utf-8"))
    unknown = sorted(set(given) - set(base))
    if unknown:
        raise ValueError(
            f"--{unknown[0]} is neither a setting of {path} nor an option of SpeechBrain; "
            f"the settings are {', '.join(_plain(base))}"
        )
    size = given.get("size", base.get("size", "full"))
    if size == "auto":
        data_folder = given.get("data_folder", base.get("data_folder"))
        size = "mini" if data_folder is None else "full"
    overrides = {}
    if size != "full":
        size_file = path.parent / "sizes" / f"{size}.yaml"
        if not size_file.is_file():
            known = sorted(file.stem for file in size_file.parent.glob("*.yaml"))
            raise ValueError(f"size: {size!r} is unknown; choose auto, full, {', '.join(known)}")
        overrides.update(YAML().load(size_file.read_text(encoding="utf-8")) or {})
    overrides.update(given)
    if "size" in base:
        overrides["size"] = size
    with path.open(encoding="utf-8") as stream:
        settings = _plain(YAML().load(resolve_references(stream, overrides, True)))
    return Experiment(str(path), run_opts, overrides, settings)


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
    trials_file: str | Path,
    history: list[dict],
    note: str = "",
) -> Report:
    """Score the test trials; write and print the results of a run.

    In the output folder: ``embeddings.npz``, ``scores.tsv`` (unrounded), ``det.png``,
    ``results.txt`` (the printed table) and, last, ``results.json``, which marks the run as done.
    """
    folder, settings = experiment.output_folder, experiment.settings
    save_embeddings(folder / "embeddings.npz", embeddings)
    trials = read_trials(trials_file)
    scores = cosine_scores(embeddings, trials)
    write_scores(folder / "scores.tsv", trials, scores)
    report = evaluate(scores, trials)
    name = settings["loss"]
    plot_det({name: (scores, trials.is_target)}, folder / "det.png", title=note)

    seconds = sum(record["seconds"] for record in history)
    lines = [f"{name}, {settings['model']}, {len(history)} epochs, seed {settings['seed']}"]
    lines += [note] if note else []
    lines += ["", report.table(), f"training took {seconds / 60:.1f} minutes"]
    last = history[-1] if history else {}
    if "support_mean" in last:
        lines.append(
            f"support in the last epoch: {last['support_mean']:.1f} classes a sample on average, "
            f"at most {last['support_max']}; {100 * last['zero_loss']:.0f} % of the samples at "
            "zero loss"
        )
    lines.append(f"files: {folder}/ det.png, scores.tsv, embeddings.npz, history.jsonl")
    text = "\n".join(lines) + "\n"
    write_text(folder / "results.txt", text)
    results = {"settings": settings, "note": note, "seconds": seconds, "last_epoch": last}
    write_text(experiment.results_file, json.dumps(results | report.to_dict(), indent=2) + "\n")
    print("\n" + text)
    return report


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
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            free = shutil.disk_usage(self.checkpoints_dir).free / 2**20
            raise OSError(
                f"{self.checkpoints_dir}: a checkpoint could not be written ({free:.0f} MiB are "
                f"free; {error}). The last whole one is kept: make room and start again to resume"
            ) from error
        ddp_barrier()  # every process has written its share
        if saved is None:
            return None
        final = saved.path.with_name(saved.path.name.removeprefix(self._PARTIAL))
        saved.path.replace(final)
        logger.log(verbosity, f"saved checkpoint {final}")
        files = {key: final / file.name for key, file in saved.paramfiles.items()}
        return Checkpoint(final, saved.meta, files)

    def _new_checkpoint_dirpath(self):
        return self._hidden(super()._new_checkpoint_dirpath())

    def _custom_checkpoint_dirpath(self, name):
        return self._hidden(super()._custom_checkpoint_dirpath(name))

    def _hidden(self, path: Path) -> Path:
        return path.with_name(self._PARTIAL + path.name)
