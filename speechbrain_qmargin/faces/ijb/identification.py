"""IJB-B and IJB-C, 1:N: a watch list of each gallery, probes of everybody.

Each gallery holds a template a subject; the mixed probes are of the subjects of both, so those of
the other gallery's are nobody in the list: the open set. The figures of both galleries and their
mean are reported, as the protocol asks (Whitelam et al. 2017, Maze et al. 2018). Scripts of the
field also print the rank curve of both galleries as one ("G1+G2"), where every probe is mated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from speechbrain_qmargin.faces.ijb.images import ImageEmbeddings
from speechbrain_qmargin.faces.ijb.protocol import IJB
from speechbrain_qmargin.faces.ijb.templates import IJBOptions, template_embeddings
from speechbrain_qmargin.files import write_text
from speechbrain_qmargin.scoring.identification import Identification, identify

__all__ = ["IJBSearch", "identify_ijb"]

_PROBES = "mixed"


@dataclass(frozen=True)
class IJBSearch:
    """1:N of one set of embeddings.

    Attributes
    ----------
    target : str
    options : IJBOptions
    found : dict from gallery to Identification
        "G1", "G2" and "G1+G2" (IJB-B: "S1", "S2", "S1+S2").

    Examples
    --------
    >>> from speechbrain_qmargin.trials import LabelledTrials
    >>> pairs = LabelledTrials(list("123456"), np.array([0]), np.array([4]), np.array([True]))
    >>> lists = {"G1": {"1": "ann", "2": "bob"}, "G2": {"3": "cyd", "4": "dan"},
    ...          "mixed": {"5": "ann", "6": "dan"}}
    >>> each = np.arange(6)  # every template is of one image
    >>> ijb = IJB("IJBC", pairs.ids, np.zeros((6, 5, 2)), np.ones(6), each, each, each, pairs,
    ...           lists=lists)
    >>> images = ImageEmbeddings(np.eye(4)[[0, 1, 2, 3, 0, 2]])  # the probe 6 looks like cyd
    >>> search = identify_ijb(ijb, images, IJBOptions(flip="none"), ranks=[1], fpirs=[])
    >>> search.means()
    {'rank 1': 0.5}
    """

    target: str
    options: IJBOptions
    found: dict[str, Identification]

    def means(self) -> dict[str, float]:
        """The mean of both galleries' figures, by name."""
        one, two = list(self.found.values())[:2]
        means = {
            f"rank {rank}": (share.value + two.cmc[rank].value) / 2
            for rank, share in one.cmc.items()
            if rank in two.cmc
        }
        for first, second in zip(one.open_set, two.open_set, strict=False):
            if (first.size, second.size) == (one.identities, two.identities):
                tpir = 1 - (first.fnir.value + second.fnir.value) / 2
                means[f"TPIR@FPIR={first.target:g}"] = tpir
        return means

    def table(self) -> str:
        """For people; the options are in it."""
        parts = [f"{self.target} 1:N, {self.options}"]
        parts += [f"gallery {name}: {found.table()}" for name, found in self.found.items()]
        one, two = list(self.found)[:2]
        means = "\n".join(f"{name}: {100 * value:.2f} %" for name, value in self.means().items())
        parts.append(f"mean of {one} and {two} (TPIR is 1 - FNIR)\n{means}")
        return "\n\n".join(parts)

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return {
            "target": self.target,
            "options": asdict(self.options) | {"code": self.options.code},
            "galleries": {name: found.to_dict() for name, found in self.found.items()},
            "means": self.means(),
        }

    def save(self, folder: str | Path) -> None:
        """Write search.txt and search.json."""
        write_text(Path(folder) / "search.txt", self.table() + "\n")
        write_text(Path(folder) / "search.json", json.dumps(self.to_dict(), indent=2) + "\n")


def identify_ijb(
    ijb: IJB,
    images: ImageEmbeddings,
    options: IJBOptions | None = None,
    *,
    ranks: Sequence[int] = (1, 5, 10),
    fpirs: Sequence[float] = (0.1, 0.01),
    sizes: Sequence[int] = (),
    progress: Callable[[int], object] | None = None,
) -> IJBSearch:
    """Search the mixed probes in both galleries.

    Parameters
    ----------
    ijb : IJB
        With its 1:N lists.
    images : ImageEmbeddings
    options : IJBOptions, optional
    ranks, fpirs, sizes, progress
        Of :func:`~speechbrain_qmargin.scoring.identification.identify`.

    Raises
    ------
    ValueError
        A 1:N list that is missing, a listed template without images; named. As
        :func:`~speechbrain_qmargin.faces.ijb.templates.template_embeddings`.

    Examples
    --------
    >>> from speechbrain_qmargin.trials import LabelledTrials
    >>> pairs = LabelledTrials(list("123456"), np.array([0]), np.array([4]), np.array([True]))
    >>> lists = {"G1": {"1": "ann", "2": "bob"}, "G2": {"3": "cyd", "4": "dan"},
    ...          "mixed": {"5": "ann", "6": "dan"}}
    >>> each = np.arange(6)  # every template is of one image
    >>> ijb = IJB("IJBC", pairs.ids, np.zeros((6, 5, 2)), np.ones(6), each, each, each, pairs,
    ...           lists=lists)
    >>> images = ImageEmbeddings(np.eye(4)[[0, 1, 2, 3, 0, 2]])  # the probe 6 looks like cyd
    >>> search = identify_ijb(ijb, images, IJBOptions(flip="none"), ranks=[1], fpirs=[])
    >>> {name: found.cmc[1].value for name, found in search.found.items()}
    {'G1': 1.0, 'G2': 0.0, 'G1+G2': 0.5}
    """
    options = options or IJBOptions()
    galleries = [name for name in ijb.lists if name != _PROBES]
    if len(galleries) < 2 or _PROBES not in ijb.lists:
        raise ValueError(
            f"{ijb.target}: 1:N needs the lists of both galleries and of the mixed probes in "
            f"meta/; there are {', '.join(ijb.lists) or 'none'}"
        )
    unit = template_embeddings(ijb, images, options)
    row = {name: index for index, name in enumerate(ijb.trials.ids)}

    def listed(*names: str) -> tuple[np.ndarray, list[str]]:
        subjects = {t: subject for name in names for t, subject in ijb.lists[name].items()}
        unknown = [template for template in subjects if template not in row]
        if unknown:
            raise ValueError(
                f"{ijb.target}: {len(unknown):,} templates of the 1:N lists have no images, the "
                f"first is {unknown[0]}"
            )
        return unit[[row[template] for template in subjects]], list(subjects.values())

    probes, of_probes = listed(_PROBES)
    found = {}
    for names in ([galleries[0]], [galleries[1]], galleries):
        gallery, subjects = listed(*names)
        found["+".join(names)] = identify(
            gallery,
            subjects,
            probes,
            of_probes,
            ranks=ranks,
            fpirs=fpirs,
            sizes=[size for size in sizes if size <= len(set(subjects))],
            progress=progress,
        )
    return IJBSearch(ijb.target, options, found)
