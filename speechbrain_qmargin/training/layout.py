"""What lies where in a run's folder."""

from __future__ import annotations

from pathlib import Path

__all__ = ["INFERENCE", "SAVE", "encoder_folder", "is_run"]

SAVE = "save"
"""Checkpoints, and the label encoder."""
INFERENCE = "inference"
"""The encoder for use, which SpeechBrain loads by itself."""


def is_run(folder: str | Path) -> bool:
    """Whether a folder is a run's, finished or not.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> is_run(folder)
    False
    >>> (folder / SAVE).mkdir()
    >>> is_run(folder)
    True
    """
    return (Path(folder) / SAVE).is_dir() or (Path(folder) / "experiment.yaml").is_file()


def encoder_folder(folder: str | Path) -> Path:
    """Where the encoder of a folder is: in a run's ``inference``, or else in the folder itself.

    Examples
    --------
    >>> run = getfixture("tmp_path")
    >>> for place in (SAVE, INFERENCE):
    ...     (run / place).mkdir()
    >>> encoder_folder(run) == run                      # not exported yet
    True
    >>> (run / INFERENCE / "hyperparams.yaml").touch()
    >>> encoder_folder(run).name, encoder_folder(run / INFERENCE).name
    ('inference', 'inference')
    """
    exported = Path(folder) / INFERENCE
    return (
        exported if is_run(folder) and (exported / "hyperparams.yaml").is_file() else Path(folder)
    )
