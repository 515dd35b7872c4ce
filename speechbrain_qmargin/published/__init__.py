"""Published models: anyone's weights as an encoder of this package, with all that belongs to it.

One function, :func:`load_published`, knows the formats; each is a module of
:mod:`speechbrain_qmargin.published.formats` with

``NAME``
    What it is called in messages.
``KEYS``
    Some names of its parameters, by which the nearest format of an unknown file is found.
``recognise(source)``
    Whether a :class:`~speechbrain_qmargin.published.source.Source` is of it.
``load(source)``
    The :class:`Published`.

Any module put there is a format. Nothing in a published file or folder is executed: weights
are read as tensors alone (what else is in a checkpoint is never imported), a YAML as data in which
the names of known networks are looked up.
"""

from __future__ import annotations

import pkgutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from speechbrain_qmargin.published import formats
from speechbrain_qmargin.published.model import (
    FaceInput,
    Published,
    SpeechInput,
    as_option,
    as_options,
)
from speechbrain_qmargin.published.source import Source, first_keys

__all__ = [
    "FaceInput",
    "Format",
    "Published",
    "SpeechInput",
    "as_option",
    "as_options",
    "known_formats",
    "load_published",
    "split_format",
]


class Format(Protocol):
    """A module of :mod:`speechbrain_qmargin.published.formats`.

    Examples
    --------
    >>> one = known_formats()["wespeaker"]
    >>> one.NAME, "seg_1.weight" in one.KEYS
    ('WeSpeaker', True)
    """

    NAME: str
    KEYS: tuple[str, ...]

    def recognise(self, source: Source) -> bool:
        """Whether it is of this format; cheap, and no error."""
        ...

    def load(self, source: Source) -> Published:
        """The model, or a ValueError that names what is wrong with it."""
        ...


def known_formats() -> dict[str, Format]:
    """The formats, by the name that a path may begin with: ``wespeaker:model.pt``.

    Examples
    --------
    >>> sorted(known_formats())
    ['adaface', 'arcface_torch', 'cvlface', 'speechbrain', 'three_d_speaker', 'wespeaker']
    """
    found = pkgutil.iter_modules(formats.__path__)
    modules = {one.name: import_module(f"{formats.__name__}.{one.name}") for one in found}
    return cast(dict[str, Format], modules)


def split_format(path: str | Path) -> tuple[str, Path]:
    """The format that a path begins with, empty for none, and the path itself.

    Examples
    --------
    >>> split_format("wespeaker:model.pt"), split_format("model.pt")
    (('wespeaker', PosixPath('model.pt')), ('', PosixPath('model.pt')))
    """
    chosen, _, rest = str(path).partition(":")
    if rest and chosen in known_formats() and not Path(path).exists():
        return chosen, Path(rest)
    return "", Path(path)


def load_published(path: str | Path) -> Published:
    """An encoder that somebody published, with its features or crop, ready for use.

    Parameters
    ----------
    path : path
        A file of weights or the folder that it was published in; ``FORMAT:path`` where two formats
        have the same weights and other features.

    Returns
    -------
    Published
        Its ``summary()`` says what was found.

    Raises
    ------
    FileNotFoundError
        There is nothing there.
    ValueError
        Of no known format, or of two; not the weights of the network that it says; damaged. The
        message names the file and the first entries that differ.

    Examples
    --------
    >>> import torch
    >>> from speechbrain_qmargin.models.iresnet import IResNet
    >>> path = getfixture("tmp_path") / "backbone.pth"
    >>> torch.save(IResNet(18, embedding_dim=8, channels=4).state_dict(), path)
    >>> published = load_published(path)
    >>> published.format, published.network, published.encoder(torch.zeros(1, 3, 112, 112)).shape
    ('arcface_torch', 'IResNet-18, 4 channels', torch.Size([1, 1, 8]))
    """
    known, (chosen, place) = known_formats(), split_format(path)
    if chosen:
        return _loaded(known[chosen], Source(place))
    source = Source(place)
    found = {name: one for name, one in known.items() if one.recognise(source)}
    if len(found) == 1:
        return _loaded(next(iter(found.values())), source)
    if found:
        raise ValueError(
            f"{source.path}: {' and '.join(one.NAME for one in found.values())} have such weights, "
            f"with other features or channels; say which, {' or '.join(f'{n}:PATH' for n in found)}"
        )
    raise ValueError(f"{source.path}: of no known format. {_nearest(source, known)}")


def _loaded(one: Format, source: Source) -> Published:
    published = one.load(source)
    if not source.left_out:
        return published
    note = f"objects in the file were not made: {first_keys(source.left_out)}"
    return replace(published, notes=(*published.notes, note))


def _nearest(source: Source, known: dict[str, Format]) -> str:
    names = ", ".join(one.NAME for one in known.values())
    if not source.state:
        files = first_keys((one.name for one in sorted(source.path.iterdir())), 5) or "nothing"
        return f"The folder holds {files}; the formats are those of {names}"

    first = {key.partition(".")[0] for key in source.state}
    below = f"{first.pop()}." if len(first) == 1 else ""
    keys = {key.removeprefix(below) for key in source.state}
    near = max(known.values(), key=lambda one: len(keys & {*one.KEYS}) / len(one.KEYS))
    lacking = [key for key in near.KEYS if key not in keys]
    return (
        f"Its entries begin with {first_keys(source.state)}; the nearest of {names} is "
        f"{near.NAME}, of whose names it lacks {first_keys(lacking) or f'none below {below}'}"
    )
