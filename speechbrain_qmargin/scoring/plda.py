r"""Probabilistic linear discriminant analysis (PLDA) of embeddings: log-likelihood ratios.

An embedding is :math:`m + F h + e`, with a person's :math:`h` standard normal and the noise
:math:`e` of full covariance. Fitted by SpeechBrain's EM (``speechbrain.processing.PLDA_LDA``,
from SIDEKIT) on centred embeddings of unit length (Garcia-Romero and Espy-Wilson 2011). With
``B`` between people and ``W`` within, the ratio of a pair is quadratic in its embeddings, so a
list costs one product of matrices and one inner product a trial.

Encoders trained with a margin loss are made for the cosine, which PLDA seldom beats; it is here
for embeddings that are not, and to compare with systems that use it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from speechbrain_qmargin.embeddings import Embeddings
from speechbrain_qmargin.files import load_arrays, replacing
from speechbrain_qmargin.scoring.separation import name_digest
from speechbrain_qmargin.tables import some
from speechbrain_qmargin.trials import Trials

__all__ = ["PLDA", "fit_plda"]

_BLOCK = 16384


@dataclass(frozen=True, eq=False)
class PLDA:
    """A fitted model of the variation between people and within.

    Attributes
    ----------
    centre : float64 array [D]
        Subtracted before the length is normalised.
    mean : float64 array [D]
        Of the normalised embeddings.
    between, within : float64 arrays [D, D]
        Covariances of people and of their recordings.
    encoder : str
        Digest of the encoder whose embeddings it was fitted on; empty if not known.
    speakers : sequence of str
        Digests of the people it was fitted on.

    Examples
    --------
    >>> plda = PLDA(np.zeros(2), np.zeros(2), between=np.eye(2), within=np.eye(2))
    >>> given = {"x": np.array([1.0, 0]), "y": np.array([2.0, 0]), "z": np.array([0, 1.0])}
    >>> trials = Trials(["x", "y", "z"], np.array([0, 0]), np.array([1, 2]))
    >>> plda.scores(given, trials).round(3)  # log(4/3) - 1/6 + cosine / 3
    array([0.454, 0.121])
    """

    centre: np.ndarray
    mean: np.ndarray
    between: np.ndarray
    within: np.ndarray
    encoder: str = ""
    speakers: Sequence[str] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of all that its scores depend on, their ``backend``."""
        arrays = (self.centre, self.mean, self.between, self.within)
        content = b"".join(np.asarray(array, "<f8").tobytes() for array in arrays)
        return hashlib.sha256(content).hexdigest()

    @cached_property
    def _quadratic(self) -> tuple[np.ndarray, np.ndarray, float]:
        """phi, psi and c of ``llr = (e phi e + t phi t) / 2 + e psi t + c``."""
        total = self.between + self.within
        inverse = np.linalg.inv(total)
        given = np.linalg.inv(total - self.between @ inverse @ self.between)
        phi, psi = inverse - given, inverse @ self.between @ given
        constant = (np.linalg.slogdet(total)[1] + np.linalg.slogdet(given)[1]) / 2
        return (phi + phi.T) / 2, (psi + psi.T) / 2, float(constant)

    def scores(
        self,
        embeddings: Mapping[str, np.ndarray],
        trials: Trials,
        enrolment: str = "embedding",
    ) -> np.ndarray:
        """Natural log-likelihood ratios of trials: float64 [N].

        By the model's own assumptions, which hold only so far: calibrate them all the same.

        Parameters
        ----------
        embeddings : mapping from id to array [D]
        trials : Trials
        enrolment : {"embedding", "score"}
            Of models of several recordings: the ratio of the model's mean embedding
            (:meth:`~speechbrain_qmargin.embeddings.Embeddings.enrolled`), or the mean of the ratios
            of its recordings. By the book the number of recordings would count; here it does not.

        Raises
        ------
        ValueError
            An id without an embedding, embeddings of another encoder or another length; as
            :meth:`~speechbrain_qmargin.embeddings.Embeddings.enrolled`.
        """
        found = Embeddings.of(embeddings)
        found.refuse_other(self, "the PLDA")
        if found.matrix.shape[1] != len(self.centre):
            raise ValueError(
                f"embeddings have {found.matrix.shape[1]} dimensions, the PLDA {len(self.centre)}"
            )
        if trials.models and enrolment == "score":
            return trials.mean_over_recordings(lambda apart: self.scores(found, apart))
        phi, psi, constant = self._quadratic
        rows = found.enrolled(trials, self.centre, enrolment) - self.mean
        own = np.einsum("nd,nd->n", rows @ phi, rows) / 2
        turned = rows @ psi
        left, right = trials.enrolment, trials.test
        scores = np.empty(len(trials))
        for start in range(0, len(trials), _BLOCK):
            part = slice(start, start + _BLOCK)
            scores[part] = np.einsum("nd,nd->n", turned[left[part]], rows[right[part]])
        return scores + own[left] + own[right] + constant

    def save(self, path: str | Path) -> None:
        """Write as npz, whole or not at all."""
        with replacing(path) as partial, partial.open("wb") as stream:
            np.savez(stream, **asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> PLDA:
        """Read a file of :meth:`save`; never executes code.

        Raises
        ------
        ValueError
            Another file, arrays that are missing or of shapes that disagree, values that are not
            finite; with the file.
        """
        names = ("centre", "mean", "between", "within")
        found = load_arrays(path, "a PLDA", (*names, "encoder", "speakers"))
        if not isinstance(found, dict) or not found.keys() >= set(names):
            raise ValueError(f"{path}: not a PLDA (it wants the arrays {', '.join(names)})")
        encoder = str(found.pop("encoder", ""))
        speakers = np.atleast_1d(found.pop("speakers", [])).astype(str).tolist()
        size = len(found["centre"]) if found["centre"].ndim == 1 else -1
        wanted = {"centre": (size,), "mean": (size,), "between": (size, size),
                  "within": (size, size)}  # fmt: skip
        for name, array in found.items():
            if array.shape != wanted[name] or array.dtype != np.float64:
                raise ValueError(f"{path}: not a PLDA ({name} is {array.dtype} {array.shape})")
            if not np.isfinite(array).all():
                raise ValueError(f"{path}: not a PLDA ({name} is not finite)")
        return cls(**found, encoder=encoder, speakers=speakers)


def fit_plda(
    embeddings: Mapping[str, np.ndarray],
    speakers: Mapping[str, str],
    *,
    rank: int | None = None,
    iterations: int = 10,
) -> PLDA:
    """Fit on training embeddings, of other speakers than the trials'.

    Parameters
    ----------
    embeddings : mapping from id to array [D]
    speakers : mapping from id to speaker
    rank : int, optional
        Of F, at most the number of dimensions and of speakers less one, which is the default.
        Memory is 8 bytes times speakers times rank squared: 1.1 GB for 5,994 speakers at 150.
    iterations : int
        Of EM.

    Raises
    ------
    ValueError
        An id without a speaker, one speaker only or no speaker of two recordings, fewer recordings
        than dimensions, a rank out of range.
    ImportError
        No SpeechBrain.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> voices = rng.normal(size=(40, 4)).repeat(6, axis=0)
    >>> rows = voices + 0.5 * rng.normal(size=(240, 4))
    >>> given = {f"{n // 6}/{n}": row for n, row in enumerate(rows)}
    >>> plda = fit_plda(given, {name: name.split("/")[0] for name in given})
    >>> trials = Trials(["0/0", "0/1", "1/6"], np.array([0, 0]), np.array([1, 2]), None)
    >>> same, other = plda.scores(given, trials)
    >>> bool(same > other)
    True
    """
    from speechbrain.processing.PLDA_LDA import PLDA as Factors
    from speechbrain.processing.PLDA_LDA import StatObject_SB

    found = Embeddings.of(embeddings)
    missing = [name for name in found.ids if name not in speakers]
    if missing:
        raise ValueError(f"{len(missing)} embeddings have no speaker: {some(missing)}")
    names, who = np.unique([speakers[name] for name in found.ids], return_inverse=True)
    count, size = found.matrix.shape
    if len(names) < 2 or np.bincount(who).max() < 2:
        raise ValueError(
            f"PLDA needs several speakers and several recordings of some; there are {len(names)} "
            f"speakers of {count:,} recordings"
        )
    if count <= size:
        raise ValueError(
            f"{count:,} recordings cannot tell a covariance of {size} dimensions: more are needed"
        )
    if iterations < 1:
        raise ValueError(f"iterations must be 1 or more, got {iterations}")
    most = min(size, len(names) - 1)
    wanted = most if rank is None else rank
    if not 1 <= wanted <= most:
        raise ValueError(f"the rank of {wanted} must be from 1 to {most}: dimensions, speakers - 1")
    centre = found.mean()
    unit = found.unit(found.ids, centre).astype(np.float64)
    nothing = np.array([None] * count)
    statistics = StatObject_SB(
        modelset=names[who].astype("O"),
        segset=np.array(found.ids, dtype="O"),
        start=nothing,
        stop=nothing,
        stat0=np.ones((count, 1)),
        stat1=unit,
    )
    factors = Factors(rank_f=wanted, nb_iter=iterations)
    factors.plda(statistics)
    loading = np.asarray(factors.F, dtype=np.float64)
    fitted = PLDA(
        centre,
        np.asarray(factors.mean, dtype=np.float64),
        loading @ loading.T,
        np.asarray(factors.Sigma, dtype=np.float64),
        found.encoder,
        sorted(map(name_digest, names.tolist())),
    )
    if not all(np.isfinite(array).all() for array in (fitted.between, fitted.within)):
        raise ValueError(
            "the PLDA did not converge to finite covariances: fewer dimensions (a lower rank) or "
            "more recordings are needed"
        )
    return fitted
