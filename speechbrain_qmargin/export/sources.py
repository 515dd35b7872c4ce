"""What an extraction reads and writes, of speech and of faces: lists in, embeddings out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from speechbrain_qmargin.embeddings import save_embeddings
from speechbrain_qmargin.extras import require
from speechbrain_qmargin.files import replacing
from speechbrain_qmargin.tables import read_lines

__all__ = ["check_output", "output_files", "read_list", "write_embeddings"]


def read_list(path: str | Path, what: str) -> dict[str, Path]:
    """Id to file, of a text file: a path a line, or an id and a path.

    Raises
    ------
    FileNotFoundError, ValueError
        A line that is a command, an id twice, an empty list: with file and line. A list none of
        whose files is there.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> (folder / "a.wav").touch()
    >>> _ = (folder / "list.txt").write_text(f"ann/1 {folder / 'a.wav'}")
    >>> list(read_list(folder / "list.txt", "recordings"))
    ['ann/1']
    >>> _ = (folder / "wav.scp").write_text("ann/1 sox a.mp3 -t wav - |")
    >>> read_list(folder / "wav.scp", "recordings")
    Traceback (most recent call last):
    ValueError: ...wav.scp:1: 'ann/1 sox a.mp3 -t wav - |' is a command; only files are read
    """
    found: dict[str, Path] = {}
    for number, line in enumerate(read_lines(path)[0], 1):
        if not line.strip():
            continue
        if line.rstrip().endswith("|"):
            raise ValueError(f"{path}:{number}: {line!r} is a command; only files are read")
        name, _, file = line.strip().partition("\t" if "\t" in line else " ")
        if not file or Path(line.strip()).is_file():  # a path alone, perhaps with spaces in it
            name = file = line.strip()
        if name in found:
            raise ValueError(
                f"{path}:{number}: {name} is there twice; a line is a path, or an id and a path"
            )
        found[name] = Path(file.strip())
    if not found:
        raise ValueError(f"{path}: no {what} in it")
    if not any(file.is_file() for file in found.values()):
        raise FileNotFoundError(
            f"{path}: none of its {len(found):,} {what} is there, from {Path.cwd()}; the first is "
            f"{next(iter(found.values()))}"
        )
    return found


def write_embeddings(out: Path, embeddings: Mapping[str, np.ndarray], encoder: str = "") -> None:
    """Write ``.npz``, with the encoder's digest, or Kaldi's pair of ``.ark`` and ``.scp``.

    Examples
    --------
    >>> from speechbrain_qmargin.embeddings import load_embeddings
    >>> file = getfixture("tmp_path") / "voices.npz"
    >>> write_embeddings(file, {"ann/1": np.array([1.0, 2.0])}, encoder="its digest")
    >>> load_embeddings(file)["ann/1"]
    array([1., 2.], dtype=float32)
    """
    if out.suffix == ".npz":
        save_embeddings(out, embeddings, encoder)
        return
    import kaldiio

    ark, scp = output_files(out)
    with replacing(ark) as partial, replacing(scp) as index:
        kaldiio.save_ark(str(partial), embeddings, scp=str(index))
        text = index.read_text(encoding="utf-8")
        index.write_text(text.replace(str(partial), str(ark.resolve())), encoding="utf-8")


def output_files(out: Path) -> list[Path]:
    """The files that :func:`write_embeddings` writes.

    Examples
    --------
    >>> [file.name for file in output_files(Path("a.scp"))]
    ['a.ark', 'a.scp']
    """
    if out.suffix in (".ark", ".scp"):
        return [out.with_suffix(".ark"), out.with_suffix(".scp")]
    return [out]


def check_output(out: Path, items: Iterable[str]) -> None:
    """Refuse, before anything is computed, a file that could not be written.

    Parameters
    ----------
    out : Path
    items : iterable of str
        The ids that are to be written.

    Raises
    ------
    ValueError
        Another suffix than .npz, .ark and .scp; for Kaldi's, an id with a space in it.
    ImportError
        The extra ``kaldi`` is not installed, for Kaldi's.

    Examples
    --------
    >>> check_output(getfixture("tmp_path") / "voices.npz", ["ann/1"])
    >>> check_output(Path("voices.csv"), ["ann/1"])
    Traceback (most recent call last):
    ValueError: voices.csv: embeddings are written as .npz, .ark or .scp
    """
    if out.suffix not in (".npz", ".ark", ".scp"):
        raise ValueError(f"{out}: embeddings are written as .npz, .ark or .scp")
    if out.suffix != ".npz":
        require("kaldiio", why=f"{out}: Kaldi's files", extra="kaldi")
        spaced = [name for name in items if len(name.split()) != 1]
        if spaced:
            raise ValueError(f"{out}: Kaldi's ids have no spaces, as {spaced[0]!r} has; use .npz")
