r"""Score normalisation against a cohort: S, Z, T and adaptive (AS) norm.

The scores of a recording x against the cohort give a mean and a population standard deviation;
each recording's are computed once however many trials name it. AS-norm (Matejka et al., "Analysis
of score normalization in multilingual speaker recognition", Interspeech 2017) takes only the
`top_n` nearest cohort entries: ``(s - mean_e) / std_e`` and ``(s - mean_t) / std_t``, averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np

from speechbrain_qmargin.embeddings import ENROLMENT_RULES, Embeddings, pair_products
from speechbrain_qmargin.trials import Trials

__all__ = [
    "METHODS",
    "PER_RECORDING",
    "class_means",
    "cohort_mean_quality",
    "cohort_statistics",
    "kind_of",
    "make_cohort",
    "normalize",
    "over_sides",
    "refuse_shared_speakers",
    "sides_of",
    "top_of",
]

METHODS = ("as", "as-cross", "s", "z", "t")
PER_RECORDING = ("as", "s", "z", "t")  # whose statistics a recording has alone, without the other
_ROWS, _COLUMNS = 128, 8192  # of a block of cohort scores: 4 MiB
_LEAST_STD = 1e-6


def kind_of(method: str) -> str:
    """What the scores that a method gives are called.

    Examples
    --------
    >>> kind_of("as")
    'as-norm'
    """
    return f"{method}-norm"


def top_of(method: str, top_n: int | None) -> int | None:
    """How many of the nearest cohort entries a method takes: `top_n`, or None for all of them.

    Examples
    --------
    >>> top_of("as", 300), top_of("s", 300)
    (300, None)
    """
    return top_n if method in ("as", "as-cross") else None


def sides_of(method: str) -> tuple[str, ...]:
    """The sides of a trial that a method normalises: ``enrolment``, ``test`` or both.

    Examples
    --------
    >>> sides_of("z"), sides_of("s")
    (('enrolment',), ('enrolment', 'test'))
    """
    return {"z": ("enrolment",), "t": ("test",)}.get(method, ("enrolment", "test"))


def over_sides(
    scores: np.ndarray, statistics: Sequence[tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """Scores less a side's mean, over its standard deviation; of several sides the mean.

    Parameters
    ----------
    scores : float array
    statistics : sequence of (mean, std)
        Of each of a method's :func:`sides_of`, by :func:`cohort_statistics`; arrays that fit the
        scores.

    Examples
    --------
    >>> over_sides(np.array([1.0]), [(np.array([0.5]), np.array([0.5])), (np.zeros(1), np.ones(1))])
    array([1.])
    """
    first, *others = ((scores - mean) / std for mean, std in statistics)
    for other in others:
        first += other
    return first / (1 + len(others))


def class_means(matrix: np.ndarray, labels: np.ndarray, count: int | None = None) -> np.ndarray:
    """Mean of the rows of each class (a speaker's recordings, a template's images).

    Parameters
    ----------
    matrix : float array [N, D]
    labels : int array [N]
    count : int, optional
        Number of classes.

    Returns
    -------
    float32 array [count, D]

    Raises
    ------
    ValueError
        A class without rows.

    Examples
    --------
    >>> class_means(np.array([[1.0, 0], [3, 0], [0, 5]]), np.array([0, 0, 1]))
    array([[2., 0.],
           [0., 5.]], dtype=float32)
    """
    from scipy.sparse import csr_array

    count = int(labels.max()) + 1 if count is None else count
    sizes = np.bincount(labels, minlength=count)
    if (sizes == 0).any():
        raise ValueError(f"class {int(np.argmin(sizes))} has no rows")
    order = np.argsort(labels, kind="stable")
    start = np.concatenate(([0], np.cumsum(sizes)))
    share = np.repeat((1 / sizes).astype(np.float32), sizes)
    average = csr_array((share, order, start), shape=(count, len(matrix)))
    return average @ matrix.astype(np.float32, copy=False)


def make_cohort(
    embeddings: Mapping[str, np.ndarray],
    speakers: Mapping[str, str] | None = None,
    *,
    mean: np.ndarray | None = None,
) -> Embeddings:
    """Cohort of unit length: one mean embedding a speaker, or every utterance.

    As in WeSpeaker: a speaker's raw embeddings are averaged, `mean` is subtracted, then the length
    is normalised.

    Parameters
    ----------
    embeddings : mapping from id to array [D]
    speakers : mapping from id to speaker, optional
        Without it every utterance is an entry.
    mean : array [D], optional
        The mean that is subtracted from the trials' embeddings too; usually of these embeddings.

    Returns
    -------
    Embeddings
        float32 [C, D], by speaker (sorted) or by utterance.

    Raises
    ------
    ValueError
        An id without a speaker; as :meth:`~speechbrain_qmargin.embeddings.Embeddings.unit`.

    Examples
    --------
    >>> raw = {"a/1": np.array([2.0, 0]), "a/2": np.array([4.0, 0]), "b/1": np.array([0, 5.0])}
    >>> cohort = make_cohort(raw, {"a/1": "a", "a/2": "a", "b/1": "b"})
    >>> cohort.ids, cohort.matrix.tolist()
    (['a', 'b'], [[1.0, 0.0], [0.0, 1.0]])
    """
    embeddings = Embeddings.of(embeddings)
    if speakers is not None:
        missing = [name for name in embeddings.ids if name not in speakers]
        if missing:
            raise ValueError(f"{len(missing)} cohort ids have no speaker, the first: {missing[0]}")
        names, labels = np.unique([speakers[name] for name in embeddings], return_inverse=True)
        embeddings = Embeddings(names.tolist(), class_means(embeddings.matrix, labels, len(names)))
    return Embeddings(embeddings.ids, embeddings.unit(embeddings.ids, mean))


def refuse_shared_speakers(
    cohort: Iterable[str], trials: Iterable[str], what: str = "speakers"
) -> None:
    """A cohort must be of other speakers than the trials, and hence of other recordings.

    Raises
    ------
    ValueError
        Names in both; some of them.

    Examples
    --------
    >>> refuse_shared_speakers(["anna", "bert"], ["bert", "cleo"])
    Traceback (most recent call last):
    ValueError: 1 speakers are in the cohort and in the trials: bert. ...
    """
    shared = sorted(set(cohort) & set(trials))
    if shared:
        raise ValueError(
            f"{len(shared)} {what} are in the cohort and in the trials: {', '.join(shared[:5])}. "
            "Normalised scores would be optimistic; take them out of the cohort"
        )


def _largest(matrix, cohort, top_n: int, want_index: bool):
    """The `top_n` largest products of every row with the cohort; blocked both ways."""
    import torch

    best = where = None
    for start in range(0, len(cohort), _COLUMNS):
        scores = matrix @ cohort[start : start + _COLUMNS].T
        if not want_index and start == 0 and len(cohort) <= _COLUMNS:
            return _partition(scores, top_n), None
        values, index = scores.topk(min(top_n, scores.shape[1]), sorted=False)
        index += start
        if best is not None and where is not None:
            values, index = torch.cat((best, values), 1), torch.cat((where, index), 1)
            values, kept = values.topk(min(top_n, values.shape[1]), sorted=False)
            index = index.gather(1, kept)
        best, where = values, index
    return best, where


def _partition(scores, top_n: int):
    """As topk without indices; numpy's partial sort of CPU rows is several times faster."""
    import torch

    if scores.device.type != "cpu":
        return scores.topk(top_n, sorted=False).values
    table = scores.numpy()
    table.partition(table.shape[1] - top_n, axis=1)
    return torch.from_numpy(table[:, table.shape[1] - top_n :])


def _moments(values) -> tuple:
    """Mean and population standard deviation of every row, in float64."""
    values = values.double()
    std, mean = _torch().std_mean(values, dim=1, correction=0)
    return mean, std


def _torch():
    import torch

    return torch


def _checked_top(top_n: int | None, cohort_size: int) -> int:
    if cohort_size < 2:
        raise ValueError(f"the cohort has {cohort_size} entries; at least 2 are needed")
    if top_n is None:
        return cohort_size
    if not 2 <= top_n <= cohort_size:
        raise ValueError(f"top_n is {top_n}; it must be from 2 to the cohort's size, {cohort_size}")
    return top_n


def _spread(std: np.ndarray) -> np.ndarray:
    """Standard deviations to divide by; what float32 rounds off is none."""
    if len(std) and std.min() < _LEAST_STD:
        raise ValueError(
            f"the cohort's scores of a recording do not differ (deviation {std.min():.1g}), and "
            "nothing can be normalised by them: does the cohort repeat one embedding? Give a "
            "cohort of different speakers, or a larger top-n"
        )
    return std


def cohort_statistics(
    matrix: np.ndarray,
    cohort: np.ndarray,
    top_n: int | None = None,
    *,
    device: str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population standard deviation of every row's highest cohort scores.

    Blocks of rows against blocks of the cohort with a running top-n: the full table of scores is
    never held.

    Parameters
    ----------
    matrix : float32 array [N, D]
        Unit length.
    cohort : float32 array [C, D]
        Unit length.
    top_n : int, optional
        Of the cohort; all of it by default.
    device : str
        Of torch.
    progress : callable, optional
        Called with the number of rows just done.

    Returns
    -------
    (mean, std) : float64 arrays [N]

    Raises
    ------
    ValueError
        A `top_n` larger than the cohort, or below 2; a row whose cohort scores do not differ.

    Examples
    --------
    >>> mean, std = cohort_statistics(np.eye(2, dtype="f"), np.eye(2, dtype="f"))
    >>> mean.tolist(), std.tolist()
    ([0.5, 0.5], [0.5, 0.5])
    """
    torch = _torch()
    top_n = _checked_top(top_n, len(cohort))
    other = torch.from_numpy(np.ascontiguousarray(cohort, dtype=np.float32)).to(device)
    means, stds = np.empty(len(matrix)), np.empty(len(matrix))

    def block(start: int) -> int:
        rows = np.ascontiguousarray(matrix[start : start + _ROWS], dtype=np.float32)
        rows = torch.from_numpy(rows).to(device)
        if top_n == len(other):
            mean, std = _all_moments(rows, other)
        else:
            mean, std = _moments(_largest(rows, other, top_n, False)[0])
        means[start : start + _ROWS] = mean.cpu()
        stds[start : start + _ROWS] = std.cpu()
        return len(rows)

    for done in _each_block(block, len(matrix), device):
        if progress:
            progress(done)
    return means, _spread(stds)


def _each_block(block: Callable[[int], int], count: int, device: str) -> Iterator[int]:
    """Run `block` for every start; on a CPU one block a thread, which beats threads in a block."""
    torch = _torch()
    starts = range(0, count, _ROWS)
    if torch.device(device).type != "cpu":
        yield from map(block, starts)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(block, starts)
    finally:
        torch.set_num_threads(threads)


def _all_moments(rows, cohort) -> tuple:
    torch = _torch()
    total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    square = torch.zeros_like(total)
    for start in range(0, len(cohort), _COLUMNS):
        scores = (rows @ cohort[start : start + _COLUMNS].T).double()
        total += scores.sum(1)
        square += scores.square().sum(1)
    mean = total / len(cohort)
    return mean, (square / len(cohort) - mean.square()).clamp_min(0).sqrt()


def normalize(
    embeddings: Mapping[str, np.ndarray],
    trials: Trials,
    cohort: Embeddings,
    *,
    method: str = "as",
    top_n: int | None = 300,
    mean: np.ndarray | None = None,
    enrolment: str = "embedding",
    device: str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> np.ndarray:
    """Cosine scores of trials, normalised against a cohort.

    Parameters
    ----------
    embeddings : mapping from id to array [D]
    trials : Trials
    cohort : Embeddings
        Of :func:`make_cohort`.
    method : {"as", "as-cross", "s", "z", "t"}
        ``as``: each side against its own `top_n`. ``as-cross``: each side against the `top_n` of
        the other. ``s``: as, with the whole cohort. ``z``: the enrolment's side of ``s`` only,
        ``t``: the test's.
    top_n : int
        For the adaptive methods.
    mean : array [D], optional
        Subtracted from the embeddings; the cohort's was when it was made.
    enrolment : {"embedding", "score"}
        Of models of several recordings: ``embedding`` normalises the score of the model's mean
        (:meth:`~speechbrain_qmargin.embeddings.Embeddings.enrolled`), ``score`` takes the mean of
        its recordings' normalised scores.
    device : str
        Of torch.
    progress : callable, optional
        Called with the number of recordings just done.

    Returns
    -------
    float64 array [N]

    Raises
    ------
    ValueError
        Another `method` or `enrolment`, a cohort of another number of dimensions; as
        :func:`cohort_statistics` and :meth:`~speechbrain_qmargin.embeddings.Embeddings.enrolled`.

    Examples
    --------
    >>> given = {"x": np.array([1.0, 0]), "y": np.array([0, 1.0]), "z": np.array([0.6, 0.8])}
    >>> trials = Trials(["x", "y", "z"], np.array([0, 0]), np.array([1, 2]))
    >>> cohort = make_cohort({"a": np.array([1.0, 0]), "b": np.array([0, 1.0])})
    >>> normalize(given, trials, cohort, method="z").round(3)  # of x: mean 0.5, std 0.5
    array([-1. ,  0.2])
    >>> normalize(given, trials, cohort, top_n=2).round(3)  # of z: mean 0.7, std 0.1
    array([-1. , -0.4])
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if enrolment not in ENROLMENT_RULES:
        raise ValueError(
            f"enrolment must be one of {', '.join(ENROLMENT_RULES)}, got {enrolment!r}"
        )
    if trials.models and enrolment == "score":
        return trials.mean_over_recordings(
            lambda apart: normalize(embeddings, apart, cohort, method=method, top_n=top_n,
                                    mean=mean, device=device, progress=progress)
        )  # fmt: skip
    unit = Embeddings.of(embeddings).enrolled(trials, mean)
    if unit.shape[1] != cohort.matrix.shape[1]:
        raise ValueError(
            f"embeddings have {unit.shape[1]} dimensions, the cohort {cohort.matrix.shape[1]}"
        )
    scores = pair_products(unit, trials.enrolment, trials.test).astype(np.float64)
    if method == "as-cross":
        return _cross_selected(unit, trials, cohort.matrix, top_n, scores, device, progress)
    sides = [getattr(trials, side) for side in sides_of(method)]
    named, at = np.unique(np.concatenate(sides), return_inverse=True)
    centre, spread = cohort_statistics(
        unit[named], cohort.matrix, top_of(method, top_n), device=device, progress=progress
    )
    return over_sides(scores, [(centre[side], spread[side]) for side in at.reshape(len(sides), -1)])


def _cross_selected(unit, trials, cohort, top_n, scores, device, progress) -> np.ndarray:
    """Each side's statistics over the cohort entries nearest to the other side."""
    torch = _torch()
    top_n = _checked_top(top_n, len(cohort))
    other = torch.from_numpy(np.ascontiguousarray(cohort)).to(device)
    rows = torch.from_numpy(unit)
    nearest = torch.empty(len(unit), top_n, dtype=torch.int32)

    def select(start: int) -> int:
        part = slice(start, start + _ROWS)
        index = _largest(rows[part].to(device), other, top_n, True)[1]
        assert index is not None
        nearest[part] = index.int().cpu()
        return len(rows[part])

    for done in _each_block(select, len(unit), device):
        if progress:
            progress(done)
    result = np.zeros(len(scores))
    height = max(1, min(512, 2**24 // len(cohort)))
    for own, selecting in ((trials.enrolment, trials.test), (trials.test, trials.enrolment)):
        order = np.argsort(own, kind="stable")
        edges = np.searchsorted(own[order], np.arange(0, len(unit) + height, height))
        for block, (first, last) in enumerate(pairwise(edges.tolist())):
            start = block * height
            table = (rows[start : start + height].to(device) @ other.T).cpu()
            for at in range(first, last, 4096):
                trial = order[at : min(at + 4096, last)]
                local = torch.from_numpy(own[trial] - start)[:, None]
                chosen = nearest[torch.from_numpy(selecting[trial])].long()
                mean, std = _moments(table[local, chosen])
                result[trial] += (scores[trial] - mean.numpy()) / _spread(std.numpy()) / 2
    return result


def cohort_mean_quality(
    unit: np.ndarray, cohort: np.ndarray, ids: Sequence[str], top_n: int | None
) -> dict[str, float]:
    """Mean of each recording's highest cohort scores, a quality measure for calibration.

    Parameters
    ----------
    unit : float array [N, D]
        Unit length.
    cohort : float array [C, D]
        Unit length.
    ids : sequence of str [N]
    top_n : int or None
        Of the cohort; all of it for None.

    Raises
    ------
    ValueError
        As :func:`cohort_statistics`.

    Examples
    --------
    >>> cohort_mean_quality(np.array([[0.6, 0.8]]), np.eye(2), ["x"], top_n=None)
    {'x': 0.7...}
    """
    return dict(zip(ids, cohort_statistics(unit, cohort, top_n)[0].tolist(), strict=True))
