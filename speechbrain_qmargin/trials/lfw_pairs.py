"""``pairs.txt`` as Labeled Faces in the Wild publishes it: people and the numbers of their images.

The first line counts: ``10 300`` is ten folds, each of 300 pairs of one person and then 300 of two
(View 2); ``1100`` is one such part (``pairsDevTrain.txt`` of View 1). A pair of one person is
``name n1 n2``, one of two ``name1 n1 name2 n2``. Source: Huang et al. 2007 and the set's README.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from speechbrain_qmargin.tables import read_lines

__all__ = ["LfwPairs", "read_lfw_pairs"]


class LfwPairs(NamedTuple):
    """The pairs of a list.

    Attributes
    ----------
    first, second : list of str
        The images of every pair, as the set names its files: ``<name>/<name>_0001.jpg``.
    same : bool array [N]
    source : str
        The file's name and SHA-256.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "pairs.txt"
    >>> _ = file.write_text("1\\t1\\nAnna_A\\t1\\t4\\nAnna_A\\t2\\tBert_B\\t1\\n")
    >>> pairs = read_lfw_pairs(file)
    >>> pairs.first[1], pairs.second[1], pairs.same.tolist()
    ('Anna_A/Anna_A_0002.jpg', 'Bert_B/Bert_B_0001.jpg', [True, False])
    """

    first: list[str]
    second: list[str]
    same: np.ndarray
    source: str


def read_lfw_pairs(path: str | Path) -> LfwPairs | None:
    """Read a list of this form; None for a file of any other.

    Raises
    ------
    ValueError
        A line that does not fit, or not as many pairs as the first line counts; with the file and
        the line.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "pairs.txt"
    >>> _ = file.write_text("1\\t1\\nAnna_A\\t1\\t4\\nAnna_A\\t2\\tBert_B\\t1\\n")
    >>> read_lfw_pairs(file)[:3]
    (['Anna_A/Anna_A_0001.jpg', 'Anna_A/Anna_A_0002.jpg'], \
['Anna_A/Anna_A_0004.jpg', 'Bert_B/Bert_B_0001.jpg'], array([ True, False]))
    """
    with Path(path).open("rb") as stream:
        begin = stream.readline(100)
    counts = begin.removeprefix(b"\xef\xbb\xbf").split()
    if len(counts) not in (1, 2) or not all(map(bytes.isdigit, counts)):
        return None
    lines, source = read_lines(path)
    rows = [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip()]
    if len(counts) == 2 and (len(rows) < 2 or len(rows[1][1]) == 2):
        return None  # two columns of numbers: ids
    folds, each = map(int, counts) if len(counts) == 2 else (1, int(counts[0]))
    if len(rows) - 1 != 2 * folds * each:
        raise ValueError(
            f"{path}: its first line, {' '.join(rows[0][1])!r}, announces {2 * folds * each:,} "
            f"pairs, and {len(rows) - 1:,} follow"
        )
    first, second, same = [], [], []
    for place, (number, fields) in enumerate(rows[1:]):
        one_person = place % (2 * each) < each
        names, numbers = (
            ((fields[0], fields[0]), fields[1:])
            if len(fields) == 3
            else (fields[::2], fields[1::2])
        )
        if len(fields) != (3 if one_person else 4) or not all(map(_is_number, numbers)):
            wanted = "'name n1 n2'" if one_person else "'name1 n1 name2 n2'"
            raise ValueError(f"{path}:{number}: expected {wanted}, got {lines[number - 1]!r}")
        for side, name, image in zip((first, second), names, numbers, strict=True):
            side.append(f"{name}/{name}_{int(image):04d}.jpg")
        same.append(one_person)
    return LfwPairs(first, second, np.array(same, dtype=bool), source)


def _is_number(field: str) -> bool:
    return field.isascii() and field.isdigit() and int(field) > 0
