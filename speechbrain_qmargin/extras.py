"""Packages that only some commands want: setup.cfg's extras, and how they are had."""

from __future__ import annotations

import importlib

__all__ = ["require"]


def require(*modules: str, why: str, extra: str) -> None:
    """Raise unless all modules can be imported; called before work that would be lost without them.

    Parameters
    ----------
    *modules : str
        Names as in ``import``.
    why : str
        What wants them; the message begins with it.
    extra : str
        The extra of setup.cfg that installs them.

    Raises
    ------
    ImportError
        With the reason and the command that installs the extra. The package is on no index, so the
        command is for a clone.

    Examples
    --------
    >>> require("numpy", why="figures", extra="report")
    >>> require("numpy", "no_such_module", why="figures", extra="report")
    Traceback (most recent call last):
    ImportError: figures: No module named 'no_such_module'; in a clone of this project: pip install
    -e '.[report]'
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError(
                f"{why}: {error}; in a clone of this project: pip install -e '.[{extra}]'",
                name=error.name,
            ) from error
