"""InsightFace's verification sets (``.bin``): pickles, read without trusting them.

Such a file is a pickle of (encoded images, is-same flags), often of numpy arrays and numpy bools.
Unpickling builds whatever a file asks for; numpy's own types can be asked for memory that is not
theirs. So nothing of numpy is built: every name that such files need stands for a plain class or
function here that takes bytes, numbers and strings, and every other name is refused. The pickle's
instructions are read once before, so that no instruction may ask for more memory than the file has.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["read_bin"]

# Enough for lists, tuples, bytes, strings, numbers and the names below, in protocols 0 to 5
_NAMES = (
    "APPEND APPENDS BINBYTES BINBYTES8 BINFLOAT BINGET BININT BININT1 BININT2 BINPUT BINSTRING "
    "BINUNICODE BINUNICODE8 BUILD BYTEARRAY8 DUP EMPTY_LIST EMPTY_TUPLE FRAME GET GLOBAL INT LIST "
    "LONG LONG1 LONG_BINGET LONG_BINPUT MARK MEMOIZE NEWFALSE NEWTRUE NONE POP POP_MARK PROTO PUT "
    "REDUCE SHORT_BINBYTES SHORT_BINSTRING SHORT_BINUNICODE STACK_GLOBAL STOP STRING TUPLE TUPLE1 "
    "TUPLE2 TUPLE3 UNICODE"
)
_INSTRUCTIONS = frozenset(_NAMES.split())
_PUTS = ("BINPUT", "LONG_BINPUT", "PUT")


class _Type:
    """numpy.dtype: of bytes or of bools, whatever else a file says of it."""

    def __init__(self, name: object, *_: object) -> None:
        text = name.decode("latin-1") if isinstance(name, bytes) else name
        if text not in ("u1", "|u1", "uint8", "b1", "|b1", "bool", "?", "B"):
            raise pickle.UnpicklingError(f"it holds arrays of {text!r:.40}, not of bytes or bools")

    def __setstate__(self, state: object) -> None:
        """Byte order and the like, which a single byte does not have."""


class _Array:
    """numpy.ndarray: only its bytes."""

    content: bytes | None = None

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("it holds an array in another form than numpy's")
        self.content = _bytes(state[4])


def _bytes(content: object) -> bytes:
    if isinstance(content, str):  # Python 2's strings
        return content.encode("latin-1")
    if not isinstance(content, bytes | bytearray):
        raise pickle.UnpicklingError("it holds an array of objects")
    return bytes(content)


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _scalar(kind: object, content: object = b"") -> bool:
    value = _bytes(content)
    if not isinstance(kind, _Type) or len(value) != 1:
        raise pickle.UnpicklingError("it holds a number of more than a byte")
    return value != b"\0"


def _frombuffer(content: object, kind: object, *_: object) -> bytes:
    if not isinstance(kind, _Type):
        raise pickle.UnpicklingError("it holds an array without a type")
    return _bytes(content)


def _encode(text: object, codec: object = "latin1") -> bytes:
    """How protocols 0 to 2 write bytes: as characters."""
    if not isinstance(text, str) or codec not in ("latin1", "latin-1", b"latin1", b"latin-1"):
        raise pickle.UnpicklingError(f"it holds bytes in the code {codec!r:.40}")
    return text.encode("latin-1")


_STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _frombuffer),
        )
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it refers to {module}.{name}, which no such set needs"
            ) from None


def _check_instructions(path: Path) -> None:
    """Refuse instructions that no such set needs, and memo places beyond their number."""
    count = 0
    with path.open("rb") as stream:
        for count, (instruction, argument, _) in enumerate(pickletools.genops(stream), 1):
            if instruction.name not in _INSTRUCTIONS:
                raise ValueError(f"it has the instruction {instruction.name}, which none needs")
            if instruction.name in _PUTS and not 0 <= int(argument or 0) <= count:
                raise ValueError(f"it keeps something in place {argument} after {count} steps")


def read_bin(path: str | Path) -> tuple[list[bytes], np.ndarray]:
    """InsightFace's verification set (LFW, CFP-FP, AgeDB-30, ...), without executing the pickle.

    Parameters
    ----------
    path : path
        A pickle of (encoded images, is-same flags), two images a pair.

    Returns
    -------
    list of bytes [2 N], bool array [N]
        Image 2 n and 2 n + 1 are pair n.

    Raises
    ------
    ValueError
        Something else: the file and what is wrong with it are named. A pickle that would call
        anything is refused before it does.

    Examples
    --------
    >>> path = getfixture("tmp_path") / "lfw.bin"
    >>> _ = path.write_bytes(pickle.dumps(([b"one", b"two"], [True])))
    >>> read_bin(path)
    ([b'one', b'two'], array([ True]))
    """
    path = Path(path)
    try:
        _check_instructions(path)
        with path.open("rb") as stream:
            content = _Unpickler(stream, encoding="bytes").load()
        if not isinstance(content, tuple | list) or len(content) != 2:
            raise ValueError("no pair of images and flags")
        images, same = (list(_items(one)) for one in content)
        images = [_image(one) for one in images]
        flags = np.array([_flag(one) for one in same], dtype=bool)
    except OSError:
        raise
    except Exception as error:  # unpickling raises anything
        fault = str(error) or type(error).__name__  # a MemoryError says nothing
        raise ValueError(f"{path}: not a verification set ({fault})") from None
    if len(images) != 2 * len(flags) or not len(flags):
        raise ValueError(f"{path}: {len(images)} images for {len(flags)} pairs")
    return images, flags


def _items(content: object) -> list | tuple | bytes:
    """A list, or the bytes of an array of bools."""
    if isinstance(content, _Array) and content.content is not None:
        return content.content
    if isinstance(content, list | tuple | bytes):
        return content
    raise ValueError(f"a {type(content).__name__} in the place of a list")


def _image(content: object) -> bytes:
    if isinstance(content, _Array) and content.content is not None:
        return content.content
    if isinstance(content, bytes | bytearray):
        return bytes(content)
    raise ValueError("an image that is not bytes")


def _flag(content: object) -> bool:
    if isinstance(content, bool | int) and content in (0, 1):
        return bool(content)
    raise ValueError(f"a flag that is neither true nor false: {content!r:.40}")
