"""The output folder of a run: whose it is, and whether it is done."""

from __future__ import annotations

import json
from typing import Any

import speechbrain as sb
from ruamel.yaml import YAML
from speechbrain.utils.distributed import if_main_process

from speechbrain_qmargin.files import write_text
from speechbrain_qmargin.training.config import Experiment, plain_settings

__all__ = ["RunFolder"]

# Settings that may change between two starts of one run.
MAY_CHANGE = {
    "batch_size",  # of one process, whose number may change; the learning rate follows
    "ckpt_interval_minutes",
    "logger",
    "noise_folder",
    "num_workers",
    "out_n_neurons",  # known only after the data are prepared; check() compares it
    "rir_folder",
    "train_speakers",
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


class RunFolder:
    """The output folder of an experiment.

    It holds ``experiment.yaml`` (the experiment as one document, for another to extend),
    SpeechBrain's ``hyperparams.yaml`` and log, and, once the run is done, ``results.json``.

    Parameters
    ----------
    experiment : Experiment

    Attributes
    ----------
    path, results_file : Path
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.path = experiment.output_folder
        self.results_file = self.path / "results.json"

    def begin(self) -> None:
        """Make the folder, on the main process.

        Results of a scoring before become ``results.previous.json``: until there are new ones the
        run is not done.
        """
        saved = self.path / "experiment.yaml"
        if if_main_process():
            write_text(saved, self.experiment.text)
            if self.results_file.is_file():
                self.results_file.replace(self.path / "results.previous.json")
        sb.core.create_experiment_directory(str(self.path), str(saved))

    def announce_finished(self) -> bool:
        """Whether a run with these settings has ended here; if so, say so and show its table."""
        if not self.results_file.is_file():
            return False
        self.check()
        before = json.loads(self.results_file.read_text(encoding="utf-8"))["settings"]
        now = self.experiment.settings
        changed = [key for key in sorted(SCORING) if before.get(key) != now.get(key)]
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

    def check(self, **known_now: Any) -> None:
        """Refuse to continue another experiment's folder; names what differs.

        `known_now` are values that the data decided.

        Raises
        ------
        ValueError
            The output folder holds a run with other settings, or of other data.
        """
        before = self._before()
        for key, value in known_now.items():
            if before.get(key, value) != value:
                raise ValueError(
                    f"{self.path} holds a run with {key} = {before[key]}; these data give "
                    f"{value}. Give a new --output_folder"
                )
        differing = {
            key: (before.get(key), value)
            for key, value in self.experiment.settings.items()
            if key in before and before[key] != value and key not in MAY_CHANGE | SCORING
        }
        if differing:
            shown = "; ".join(
                f"{key}: {old} there, {new} now" for key, (old, new) in differing.items()
            )
            raise ValueError(
                f"{self.path} holds a run of another experiment ({shown}). Give a new "
                "--output_folder, delete that one, or repeat its settings to continue it"
            )

    def _before(self) -> dict:
        """The settings of the run that the folder holds; empty without one."""
        saved = self.path / "hyperparams.yaml"
        if not saved.is_file():
            return {}
        return plain_settings(YAML().load(saved.read_text(encoding="utf-8")))
