"""``history.jsonl`` of a run: one record per epoch."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from speechbrain_qmargin.files import write_text

__all__ = ["read_history", "write_history"]

logger = logging.getLogger(__name__)


def read_history(file: str | Path) -> list[dict]:
    """The records of a run's epochs; a damaged line is named in the log and left out.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "history.jsonl"
    >>> write_history(file, {"epoch": 1, "seconds": 2.5})
    >>> write_history(file, {"epoch": 2, "seconds": 2.0})
    >>> [record["seconds"] for record in read_history(file)]
    [2.5, 2.0]
    """
    file = Path(file)
    if not file.is_file():
        return []
    records = []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not {"epoch", "seconds"} <= set(record):
                raise ValueError("no epoch or no seconds in it")
            records.append(record)
        except (ValueError, TypeError, KeyError, RecursionError):
            logger.warning(f"{file}:{number}: damaged, left out of the history")
    return records


def write_history(file: str | Path, record: dict) -> None:
    """Put an epoch's record in the place of its own and of those after it.

    Parameters
    ----------
    file : path
    record : dict
        With ``epoch`` and ``seconds``, for JSON.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "history.jsonl"
    >>> for epoch in (1, 2, 3):
    ...     write_history(file, {"epoch": epoch, "seconds": 9.0})
    >>> write_history(file, {"epoch": 2, "seconds": 8.0})      # resumed after the first epoch
    >>> [(record["epoch"], record["seconds"]) for record in read_history(file)]
    [(1, 9.0), (2, 8.0)]
    """
    history = [old for old in read_history(file) if old["epoch"] < record["epoch"]]
    write_text(file, "".join(json.dumps(entry) + "\n" for entry in [*history, record]))
