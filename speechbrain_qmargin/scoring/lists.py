"""Trial lists to scores to tables: every list with every treatment of its scores, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from speechbrain_qmargin.embeddings import Embeddings, cosine_scores
from speechbrain_qmargin.scoring.calibration import Calibration
from speechbrain_qmargin.scoring.normalisation import make_cohort, normalize, refuse_shared_speakers
from speechbrain_qmargin.scoring.plots import plot_det
from speechbrain_qmargin.scoring.report import FARS, Report, compare, evaluate
from speechbrain_qmargin.scoring.score_files import write_scores
from speechbrain_qmargin.scoring.uncertainty import TrialStructure
from speechbrain_qmargin.trials import LabelledTrials, Trials

__all__ = ["Cohort", "score_lists"]


@dataclass(frozen=True)
class Cohort:
    """What scores are normalised with.

    Attributes
    ----------
    entries : Embeddings
        Unit length, centred: a speaker's mean each.
    mean : float array [D]
        Subtracted from every embedding first.
    method : str
        One of ``normalization.METHODS``.
    top_n : int
    """

    entries: Embeddings
    mean: np.ndarray
    method: str = "as"
    top_n: int = 300

    @classmethod
    def of(
        cls,
        embeddings: Mapping[str, np.ndarray],
        speakers: Mapping[str, str],
        method: str = "as",
        top_n: int = 300,
    ) -> Cohort:
        """The speakers' means of raw embeddings, centred by the mean of all of them.

        Examples
        --------
        >>> raw = {"a1": np.array([1.0, 0.2]), "a2": np.array([1.0, 0]), "b1": np.array([0, 1.0])}
        >>> Cohort.of(raw, {"a1": "a", "a2": "a", "b1": "b"}).entries.ids
        ['a', 'b']
        """
        embeddings = Embeddings.of(embeddings)
        mean = embeddings.matrix.mean(axis=0)
        return cls(make_cohort(embeddings, speakers, mean=mean), mean, method, top_n)

    def refuse_speakers_of(self, lists: Iterable[Trials]) -> None:
        """ValueError where a cohort's speaker is in a trial."""
        for trials in lists:
            refuse_shared_speakers(self.entries.ids, trials.speaker_names())

    def scores(self, embeddings: Mapping[str, np.ndarray], trials: Trials) -> np.ndarray:
        """Normalised scores [N] of trials."""
        self.refuse_speakers_of([trials])
        with tqdm(total=len(trials.ids), desc=f"{self.method}-norm", leave=False) as progress:
            return normalize(
                embeddings,
                trials,
                self.entries,
                method=self.method,
                top_n=self.top_n,
                mean=self.mean,
                progress=progress.update,
            )


def score_lists(
    folder: str | Path,
    lists: Mapping[str, LabelledTrials],
    embeddings: Mapping[str, np.ndarray],
    *,
    cohort: Cohort | None = None,
    calibration: Calibration | None = None,
    fars: Sequence[float] = FARS,
    p_target: float | Sequence[float] = 0.01,
    title: str = "",
    units: str = "speakers",
) -> tuple[dict[str, dict[str, Report]], str]:
    """Score every list: cosine, centred cosine and normalised with a cohort, calibrated.

    Parameters
    ----------
    folder : path
        For each list, ``<list>/<system>.tsv`` (unrounded scores) and ``<list>/det.png``.
    lists : mapping from name to LabelledTrials
    embeddings : mapping from id to array [D]
    cohort : Cohort, optional
        Adds ``centred``, the cosine after the cohort's mean is subtracted, and ``<method>-norm``.
    calibration : Calibration, optional
        Adds ``calibrated``: log-likelihood ratios of the last system's scores.
    fars, p_target
        Of :func:`~speechbrain_qmargin.scoring.report.evaluate`.
    title : str
        Of the pictures.
    units : str
        What the tables call the speakers.

    Returns
    -------
    dict from list to system to Report, and the tables with the systems' paired differences.
    """
    folder, text = Path(folder), []
    if cohort is not None:
        cohort.refuse_speakers_of(lists.values())
    reports: dict[str, dict[str, Report]] = {}
    for name, trials in tqdm(lists.items(), "lists", disable=len(lists) <= 1):
        systems = {"cosine": cosine_scores(embeddings, trials)}
        if cohort is not None:
            systems["centred"] = cosine_scores(embeddings, trials, cohort.mean)
            systems[f"{cohort.method}-norm"] = cohort.scores(embeddings, trials)
        if calibration is not None:
            systems["calibrated"] = calibration.apply(list(systems.values())[-1], trials)
        reports[name] = {}
        structure = TrialStructure.of(trials)
        for system, scores in systems.items():
            write_scores(folder / name / f"{system}.tsv", trials, scores)
            reports[name][system] = evaluate(
                scores,
                trials,
                fars=fars,
                p_target=p_target,
                llr=system == "calibrated",
                structure=structure,
                units=units,
            )
            if len(lists) > 1 or len(systems) > 1:
                text += [f"{name}, {system}", ""]
            text += [reports[name][system].table(), ""]
        for system in list(systems)[1:]:
            text += [f"{name}: {system} minus cosine, paired over {units}"]
            for difference in compare(reports[name]["cosine"], reports[name][system]):
                sure = "" if difference.significant else "  (zero is inside)"
                text.append(
                    f"  {difference.name}: {difference.value:+.4f}, 95 % interval "
                    f"{difference.low:+.4f} to {difference.high:+.4f}{sure}"
                )
            text.append("")
        drawn = {system: (scores, trials) for system, scores in systems.items()}
        drawn.pop("calibrated", None)  # a straight line of the scores before: the same curve
        plot_det(drawn, folder / name / "det.png", title=title or name)
    return reports, "\n".join(text)
