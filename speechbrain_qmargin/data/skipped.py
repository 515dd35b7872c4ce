"""What of a corpus cannot be used, each item listed once, whichever process meets it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from speechbrain_qmargin.files import write_text

__all__ = ["Skipped", "write_listing"]


def write_listing(file: str | Path, faults: Mapping[str, object]) -> None:
    """List what cannot be used, in lines of ``name<TAB>reason``; there is no file of nothing.

    Parameters
    ----------
    file : path
        What it listed before is forgotten.
    faults : mapping from name to reason

    Examples
    --------
    >>> file = getfixture("tmp_path") / "skipped.txt"
    >>> write_listing(file, {"lfw/7.jpg": "cut\\noff"})
    >>> file.read_text()
    'lfw/7.jpg\\tcut off\\n'
    >>> write_listing(file, {})
    >>> file.exists()
    False
    """
    if faults:
        write_text(file, "".join(_line(*one) for one in faults.items()))
    else:
        Path(file).unlink(missing_ok=True)


def _line(name: str, reason: object) -> str:
    return f"{name}\t{' '.join(str(reason).split())}\n"


class Skipped:
    """The recordings or images that cannot be used, each once.

    They stand in a file that workers, ranks and runs share.

    Its lines are those of :func:`write_listing`, each appended by one write.

    Attributes
    ----------
    file : Path or None
        None: they are known to this object alone; see :meth:`keep_in`.
    what : str
        What they are called in messages.

    Examples
    --------
    >>> skipped = Skipped(getfixture("tmp_path") / "skipped.txt")
    >>> skipped.add("lfw/7.jpg", "cut off"), skipped.add("lfw/7.jpg", "cut off")
    (True, False)
    >>> skipped.file.read_text()
    'lfw/7.jpg\\tcut off\\n'
    """

    def __init__(self, file: str | Path | None = None, what: str = "images") -> None:
        self.what = what
        self.file: Path | None = None
        self._reasons: dict[str, str] = {}
        self._read = 0  # bytes of the file
        if file is not None:
            self.keep_in(file)

    def __len__(self) -> int:
        return len(self._reasons)

    def __contains__(self, name: str) -> bool:
        return name in self._reasons

    def add(self, name: str, reason: object) -> bool:
        """List one; False if it is listed already, by whomever."""
        return self.update({name: reason}) == 1

    def update(self, faults: Mapping[str, object]) -> int:
        """List several at once; how many were not listed yet, by whomever."""
        if not faults.keys() <= self._reasons.keys():
            self._catch_up()
        new = [name for name in faults if name not in self._reasons]
        self._reasons |= {name: " ".join(str(faults[name]).split()) for name in new}
        self._append(new)
        return len(new)

    def keep_in(self, file: str | Path) -> None:
        """Go on in a file: what it lists is known from now on, what was known so far is added."""
        own, self.file = list(self._reasons), Path(file)
        self._read = 0
        listed = self._catch_up()
        self._append([name for name in own if name not in listed])

    def warning(self) -> str:
        """What to say of them; empty if there are none."""
        if not self._reasons:
            return ""
        name, reason = next(iter(self._reasons.items()))
        where = f"all listed in {self.file}" if self.file else "the first"
        return (
            f"{len(self):,} {self.what} cannot be used and others take their places, {where}: "
            f"{name}: {reason}"
        )

    def _catch_up(self) -> set[str]:
        """Take over what the file has gained; the names in that."""
        if self.file is None or not self.file.is_file():
            return set()
        with self.file.open("rb") as stream:
            stream.seek(self._read)
            gained = stream.read()
        gained = gained[: gained.rfind(b"\n") + 1]
        self._read += len(gained)
        lines = gained.decode("utf-8", errors="replace").splitlines()
        pairs = [line.partition("\t")[::2] for line in lines]
        self._reasons |= dict(pairs)
        return {name for name, _ in pairs}

    def _append(self, names: list[str]) -> None:
        if self.file is None or not names:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        place = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            for name in names:
                os.write(place, _line(name, self._reasons[name]).encode())
        finally:
            os.close(place)
