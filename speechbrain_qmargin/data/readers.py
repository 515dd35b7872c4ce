"""Readers: from where a corpus lies to its manifest.

A corpus that is published in a layout of its own gets a reader in one file, here or elsewhere::

    from speechbrain_qmargin.data.manifest import Item, Manifest
    from speechbrain_qmargin.data.readers import corpus_reader

    @corpus_reader
    def read_calls(folder, for_trials=False):
        return Manifest.of(
            Item(f"{path.parent.name}/{path.name}", str(path), path.parent.name)
            for path in folder.glob("calls/*/*.wav")
        )

and ``--reader my_corpora.read_calls`` names it, or ``reader: my_corpora.read_calls`` in a YAML.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from speechbrain_qmargin.data.cnceleb import is_cnceleb, read_cnceleb
from speechbrain_qmargin.data.manifest import Manifest
from speechbrain_qmargin.data.tables import is_table, read_table
from speechbrain_qmargin.data.voxceleb import read_voxceleb

__all__ = ["CorpusReader", "Read", "corpus_reader", "read_corpus", "reader_named", "reader_of"]


class Read(Protocol):
    """What a reader does.

    Examples
    --------
    >>> from speechbrain_qmargin.data.manifest import Item
    >>> class OneFile:
    ...     def __call__(self, source, for_trials=False):
    ...         return Manifest.of([Item("ann/1.wav", str(source), "ann")])
    >>> file = getfixture("tmp_path") / "1.wav"
    >>> file.touch()
    >>> read_corpus(file, reader=OneFile())[0].label
    'ann'
    """

    def __call__(self, source: Path, for_trials: bool = False, /) -> Manifest:
        """The corpus at a path.

        Parameters
        ----------
        source : path
            What the user gave, which exists.
        for_trials : bool
            Whether trials are taken from it and nobody in it is trained on: then all of it is
            wanted, otherwise the part that published systems are trained on.

        Returns
        -------
        Manifest
            Ids as trial lists write them, or as the files' paths end; durations may be NaN. What
            is there and cannot be used is in its `faults`.
        """
        ...


@dataclass(frozen=True)
class CorpusReader:
    """A function that was declared to be a reader; no other function is called by name.

    Examples
    --------
    >>> reader = CorpusReader(lambda folder, for_trials=False: Manifest.of([]))
    >>> len(reader(Path("calls")))
    0
    """

    read: Read

    def __call__(self, source: Path, for_trials: bool = False) -> Manifest:
        return self.read(source, for_trials)


def corpus_reader(function: Read) -> CorpusReader:
    """Declare a reader, as a decorator; see :class:`Read` for what it takes and gives.

    Examples
    --------
    >>> from speechbrain_qmargin.data.manifest import Item
    >>> @corpus_reader
    ... def read_calls(folder, for_trials=False):
    ...     files = sorted(folder.glob("*.wav"))
    ...     return Manifest.of(Item(one.name, str(one), one.name.split("_")[0]) for one in files)
    >>> folder = getfixture("tmp_path")
    >>> (folder / "ann_1.wav").touch()
    >>> manifest = read_corpus(folder, reader=read_calls)
    >>> manifest[0].id, manifest[0].label
    ('ann_1.wav', 'ann')
    """
    return CorpusReader(function)


_KNOWN: dict[str, tuple[Callable[[Path], bool], Read]] = {
    "table": (is_table, read_table),
    "cnceleb": (is_cnceleb, read_cnceleb),
    "voxceleb": (Path.exists, read_voxceleb),
}


def reader_named(name: str | None) -> Read | None:
    """The reader of a name; None for ``auto``, which asks each source what it is.

    Raises
    ------
    ValueError
        No such name; or a module that has no reader of this name.

    Examples
    --------
    >>> reader_named("voxceleb").__name__
    'read_voxceleb'
    """
    if name in (None, "auto"):
        return None
    if name in _KNOWN:
        return _KNOWN[name][1]
    module, _, function = str(name).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), function) if module else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reader: {name}: {error}") from error
    if not isinstance(found, CorpusReader):
        raise ValueError(
            f"reader: {name!r}; choose auto, {', '.join(_KNOWN)}, or module.function of a function "
            "with the decorator speechbrain_qmargin.data.readers.corpus_reader"
        )
    return found


def reader_of(source: str | Path) -> Read:
    """The reader that knows what lies there.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> (folder / "wav.scp").touch()
    >>> reader_of(folder).__name__
    'read_table'
    """
    return next(read for knows, read in _KNOWN.values() if knows(Path(source)))


def read_corpus(
    source: str | Path, for_trials: bool = False, reader: Read | None = None
) -> Manifest:
    """The manifest of a corpus; without a `reader` by the one that knows what lies there.

    Parameters
    ----------
    source, for_trials
        See :class:`Read`.
    reader : callable, optional

    Raises
    ------
    FileNotFoundError
        Nothing is there.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> (folder / "wav/ann/0").mkdir(parents=True)
    >>> (folder / "wav/ann/0/1.wav").touch()
    >>> read_corpus(folder)[0].id
    'ann/0/1.wav'
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; data_folder or manifest names it")
    return (reader or reader_of(source))(source, for_trials)
