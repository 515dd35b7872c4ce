"""Trial lists to scores to tables: every list with every treatment of its scores, side by side.

The command ``qmargin`` and ``recipes/voxceleb/score.py`` both work through this module: how lists,
models, speakers and cohorts are read, scored, normalised and calibrated is decided here once.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from speechbrain_qmargin.embeddings import Embeddings, cosine_scores, load_embeddings
from speechbrain_qmargin.files import refuse_overwriting, write_text
from speechbrain_qmargin.scoring.calibration import Calibration, fit_calibration
from speechbrain_qmargin.scoring.influence import TrialStructure
from speechbrain_qmargin.scoring.normalisation import (
    kind_of,
    make_cohort,
    normalize,
    refuse_shared_speakers,
    top_of,
)
from speechbrain_qmargin.scoring.plots import check_picture, det_figure, save_figure
from speechbrain_qmargin.scoring.report import FARS, Report, compare, evaluate
from speechbrain_qmargin.scoring.score_files import write_scores
from speechbrain_qmargin.scoring.separation import Origin, origin_of, refuse_shared
from speechbrain_qmargin.tables import read_map, read_models
from speechbrain_qmargin.trials import LabelledTrials, Trials, read_trials, speaker_in
from speechbrain_qmargin.trials.pairs import AnyTrials

__all__ = ["Cohort", "score_files", "score_lists", "speakers_in_cohort", "with_tables"]


def with_tables(
    trials: AnyTrials, utt2spk: str | Path | None = None, models: str | Path | None = None
) -> AnyTrials:
    """Trials with the tables that say whose recordings are whose.

    Parameters
    ----------
    trials : Trials
    utt2spk : path, optional
        Kaldi's, of recordings or of models.
    models : path, optional
        The recordings of every enrolment model, see
        :func:`~speechbrain_qmargin.tables.read_models`.

    Raises
    ------
    ValueError, OSError
        As :func:`~speechbrain_qmargin.tables.read_map` and
        :func:`~speechbrain_qmargin.tables.read_models`, and as the trials'
        :meth:`~speechbrain_qmargin.trials.pairs.Trials.with_models` and
        :meth:`~speechbrain_qmargin.trials.pairs.Trials.with_speakers`.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "utt2spk"
    >>> _ = file.write_text("r1 anna\\nr2 anna\\n")
    >>> trials = with_tables(Trials(["r1", "r2"], np.array([0]), np.array([1])), utt2spk=file)
    >>> trials.speaker_names()
    ['anna', 'anna']
    """
    if models:
        trials = trials.with_models(read_models(models))
    return trials.with_speakers(read_map(utt2spk)) if utt2spk else trials


def speakers_in_cohort(ids: Sequence[str], utt2spk: str | Path | None = None) -> dict[str, str]:
    """The speaker of every cohort id: of an utt2spk, else what it names before its first slash.

    An id without a slash is a speaker of its own, as in a file of speakers' means.

    Raises
    ------
    ValueError, OSError
        As :func:`~speechbrain_qmargin.tables.read_map`.

    Examples
    --------
    >>> speakers_in_cohort(["anna/1", "anna/2", "bert"])
    {'anna/1': 'anna', 'anna/2': 'anna', 'bert': 'bert'}
    """
    return read_map(utt2spk) if utt2spk else {name: speaker_in(name) for name in ids}


@dataclass(frozen=True)
class Cohort:
    """What scores are normalised with.

    Attributes
    ----------
    entries : Embeddings
        Unit length, centred: a speaker's mean each, or every utterance.
    mean : float array [D] or None
        Subtracted from every embedding first.
    method : str
        One of :data:`~speechbrain_qmargin.scoring.normalisation.METHODS`.
    top_n : int
    speakers : tuple of str
        Who is in it.
    recordings : tuple of str
        The ids that it was made of.
    source : str
        Its file's name, and the SHA-256 of all that scores depend on: the file, the speakers, the
        mean, `method` and `top_n`. Empty where it is of no file.

    Examples
    --------
    >>> raw = {"a/1": np.array([2.0, 0]), "a/2": np.array([4.0, 0]), "b/1": np.array([0, 5.0])}
    >>> speakers = {"a/1": "a", "a/2": "a", "b/1": "b"}
    >>> cohort = Cohort.of(raw, speakers, "s", centre=False)  # (1, 0) and (0, 1)
    >>> given = {"x": np.array([1.0, 0]), "y": np.array([1.0, 0]), "z": np.array([0, 1.0])}
    >>> trials = Trials(["x", "y", "z"], np.array([0, 0]), np.array([1, 2]))
    >>> cohort.kind, cohort.scores(given, trials)  # cosines 1, 0; every cohort mean and std is 0.5
    ('s-norm', array([ 1., -1.]))
    """

    entries: Embeddings
    mean: np.ndarray | None
    method: str = "as"
    top_n: int = 300
    speakers: tuple[str, ...] = ()
    recordings: tuple[str, ...] = ()
    source: str = ""

    @classmethod
    def of(
        cls,
        embeddings: Mapping[str, np.ndarray],
        speakers: Mapping[str, str],
        method: str = "as",
        top_n: int = 300,
        *,
        centre: bool = True,
        mean: np.ndarray | None = None,
        all_utterances: bool = False,
    ) -> Cohort:
        """The speakers' means of raw embeddings, centred by the mean of all of them.

        Parameters
        ----------
        embeddings : mapping from id to array [D]
        speakers : mapping from id to speaker
        method, top_n
            Of :func:`~speechbrain_qmargin.scoring.normalisation.normalize`.
        centre : bool
            Whether a mean is subtracted.
        mean : array [D], optional
            Another mean than that of these embeddings.
        all_utterances : bool
            Every utterance is an entry.

        Examples
        --------
        >>> raw = {"a1": np.array([1.0, 0.2]), "a2": np.array([1.0, 0]), "b1": np.array([0, 1.0])}
        >>> Cohort.of(raw, {"a1": "a", "a2": "a", "b1": "b"}).entries.ids
        ['a', 'b']
        """
        embeddings = Embeddings.of(embeddings)
        names = sorted({speakers[name] for name in embeddings.ids if name in speakers})
        given = mean
        if centre and mean is None:
            if len(names) == len(embeddings):
                warnings.warn(
                    "the cohort has one embedding a speaker: if these are means of utterances, "
                    "their mean is not that of the utterances; give that (mean_vec.npy)",
                    stacklevel=2,
                )
            mean = embeddings.mean()
        entries = make_cohort(embeddings, None if all_utterances else speakers, mean=mean)
        entries.source, entries.encoder = embeddings.source, embeddings.encoder
        source = ""
        if embeddings.source:
            whose = None if all_utterances else [speakers.get(name) for name in embeddings.ids]
            nearest = top_of(method, top_n)
            settings = [embeddings.source.rpartition("sha256:")[2], whose, centre, method, nearest]
            digest = hashlib.sha256(json.dumps(settings).encode())
            digest.update(b"" if given is None else np.asarray(given, "<f8").tobytes())
            source = f"{embeddings.source.partition(' sha256:')[0]} sha256:{digest.hexdigest()}"
        return cls(entries, mean, method, top_n, tuple(names), tuple(embeddings.ids), source)

    @property
    def kind(self) -> str:
        """What its scores are called."""
        return kind_of(self.method)

    def refuse_speakers_of(self, lists: Iterable[Trials]) -> None:
        """ValueError where a speaker or a recording of the cohort is in a trial."""
        for trials in lists:
            refuse_shared_speakers(self.speakers or self.entries.ids, trials.speaker_names())
            # the two sides' names of speakers may be of different tables
            refuse_shared_speakers(self.recordings, trials.recordings, "recordings")

    def scores(
        self,
        embeddings: Mapping[str, np.ndarray],
        trials: Trials,
        enrolment: str = "embedding",
        quiet: bool = False,
    ) -> np.ndarray:
        """Normalised scores of trials: float64 [N].

        Raises
        ------
        ValueError
            Embeddings of another encoder than the cohort's; as :meth:`refuse_speakers_of` and
            :func:`~speechbrain_qmargin.scoring.normalisation.normalize`.
        """
        self.refuse_speakers_of([trials])
        embeddings = Embeddings.of(embeddings)
        embeddings.refuse_other(self.entries, "the cohort")
        with tqdm(
            total=len(trials.ids), desc=self.kind, leave=False, disable=quiet, unit=" recordings"
        ) as progress:
            return normalize(
                embeddings,
                trials,
                self.entries,
                method=self.method,
                top_n=self.top_n,
                mean=self.mean,
                enrolment=enrolment,
                progress=progress.update,
            )


def score_lists(
    folder: str | Path,
    lists: Mapping[str, LabelledTrials],
    embeddings: Mapping[str, np.ndarray],
    *,
    cohort: Cohort | None = None,
    calibration: Calibration | None = None,
    enrolment: str = "embedding",
    fars: Sequence[float] = FARS,
    p_target: float | Sequence[float] = 0.01,
    c_miss: float = 1.0,
    c_fa: float = 1.0,
    confidence: float = 0.95,
    title: str = "",
    units: str = "speakers",
    quiet: bool = False,
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
    enrolment : str
        How a model's recordings are put together, see
        :meth:`~speechbrain_qmargin.embeddings.Embeddings.enrolled`.
    fars, p_target, c_miss, c_fa, confidence
        Of :func:`~speechbrain_qmargin.scoring.report.evaluate`.
    title : str
        Of the pictures.
    units : str
        What the tables call the speakers.
    quiet : bool
        Whether progress bars are left out.

    Returns
    -------
    dict from list to system to Report, and the tables with the systems' paired differences.

    Raises
    ------
    ValueError
        A speaker of the cohort in a trial; as
        :func:`~speechbrain_qmargin.embeddings.cosine_scores`,
        :func:`~speechbrain_qmargin.scoring.normalisation.normalize`, the calibration's
        :meth:`~speechbrain_qmargin.scoring.calibration.Calibration.apply` and
        :func:`~speechbrain_qmargin.scoring.report.evaluate`.

    See Also
    --------
    Cohort : What the scores are normalised with.
    speechbrain_qmargin.scoring.report.evaluate : The figures of one system.

    Examples
    --------
    >>> left, right = np.triu_indices(8, 1)
    >>> ids = [f"{speaker}/{take}" for speaker in "abcd" for take in "12"]
    >>> trials = LabelledTrials(ids, left, right, left // 2 == right // 2)
    >>> vectors = dict(zip(ids, np.eye(4).repeat(2, axis=0), strict=True))
    >>> folder = getfixture("tmp_path")
    >>> reports, text = score_lists(folder, {"mine": trials}, vectors, fars=[0.1])
    >>> reports["mine"]["cosine"]["eer"].value, (folder / "mine" / "cosine.tsv").is_file()
    (0.0, True)
    """
    folder, text = Path(folder), []
    if cohort is not None:
        cohort.refuse_speakers_of(lists.values())
    source = getattr(embeddings, "source", "")
    about = {"embeddings": source} if source else {}
    reports: dict[str, dict[str, Report]] = {}
    for name, trials in tqdm(lists.items(), "lists", disable=quiet or len(lists) <= 1):
        systems = {"cosine": cosine_scores(embeddings, trials, enrolment=enrolment)}
        origins = {"cosine": _origin("cosine", embeddings, trials, enrolment)}
        if cohort is not None:
            systems["centred"] = cosine_scores(embeddings, trials, cohort.mean, enrolment)
            systems[cohort.kind] = cohort.scores(embeddings, trials, enrolment, quiet)
            origins["centred"] = _origin("centred cosine", embeddings, trials, enrolment)
            origins[cohort.kind] = _origin(cohort.kind, embeddings, trials, enrolment, cohort)
        if calibration is not None:
            last = list(systems)[-1]
            systems["calibrated"] = calibration.apply(systems[last], trials, **origins[last])
            made: Origin = {"kind": "llr", "backend": calibration.digest}
            origins["calibrated"] = {**origins[last], **made}
        reports[name] = {}
        distinct = trials.distinct
        structure = TrialStructure.of(distinct.trials)
        for system, scores in systems.items():
            said = {**about, **origins[system]}
            write_scores(folder / name / f"{system}.tsv", trials, scores, said)
            reports[name][system] = evaluate(
                distinct.scores(scores),
                distinct.trials,
                fars=fars,
                p_target=p_target,
                c_miss=c_miss,
                c_fa=c_fa,
                eers=("rocch", "nist"),
                llr=system == "calibrated",
                structure=structure,
                confidence=confidence,
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
                    f"  {difference.name}: {difference.value:+.4f}, {100 * confidence:g} % "
                    f"interval {difference.low:+.4f} to {difference.high:+.4f}{sure}"
                )
            text.append("")
        curves = {
            system: (report.points, report.spread)
            for system, report in reports[name].items()
            if system != "calibrated"  # a straight line of the scores before: the same curve
        }
        save_figure(det_figure(curves, title or name, confidence), folder / name / "det.png")
    return reports, "\n".join(text)


def _origin(
    kind: str,
    embeddings: Mapping[str, np.ndarray],
    trials: Trials,
    enrolment: str,
    cohort: Cohort | None = None,
) -> Origin:
    """Of a list's scores; `cohort` is what they are normalised with."""
    return origin_of(
        {
            "kind": kind,
            "encoder": getattr(embeddings, "encoder", ""),
            "cohort": cohort.source if cohort is not None else "",
            "enrolment": enrolment if trials.models else "",
        }
    )


def score_files(
    *,
    embeddings: str | Path,
    trials: str | Path | Sequence[str | Path],
    output_folder: str | Path,
    utt2spk: str | Path | None = None,
    models: str | Path | None = None,
    enrolment: str = "embedding",
    cohort: str | Path | None = None,
    cohort_utt2spk: str | Path | None = None,
    score_norm: str = "as",
    top_n: int = 300,
    dev_trials: str | Path | None = None,
    dev_embeddings: str | Path | None = None,
    dev_utt2spk: str | Path | None = None,
    dev_models: str | Path | None = None,
    fars: Sequence[float] = FARS,
    p_target: Sequence[float] = (0.01,),
    c_miss: float = 1.0,
    c_fa: float = 1.0,
    confidence: float = 0.95,
    overwrite: bool = False,
    quiet: bool = False,
    say: Callable[[str], object] = print,
) -> dict[str, dict[str, Report]]:
    """Everything of :func:`score_lists` from files; ``results.txt`` and ``results.json``.

    Parameters
    ----------
    embeddings : path
        Of every recording of the trials.
    trials : path or sequence of paths
        Lists, each with a table of its own.
    output_folder : path
    utt2spk, models : path, optional
        See :func:`with_tables`.
    enrolment : str
        See :func:`score_lists`.
    cohort : path, optional
        Embeddings of other speakers, usually those trained on.
    cohort_utt2spk : path, optional
        Their speakers, see :func:`speakers_in_cohort`.
    score_norm, top_n
        Method of normalisation, and the entries of the adaptive ones.
    dev_trials : path, optional
        A calibration is fitted on this list, of speakers in none of the trials.
    dev_embeddings, dev_utt2spk, dev_models : path, optional
        Of the development list; by default those of the trials.
    fars, p_target, c_miss, c_fa, confidence
        See :func:`score_lists`.
    overwrite : bool
        Whether results that are there may be replaced.
    quiet : bool
        See :func:`score_lists`.
    say : callable
        Gets the tables.

    Raises
    ------
    ValueError, OSError
        Two lists of one name, results that are there, speakers in two parts that must be apart,
        and as everything that reads and scores.

    See Also
    --------
    score_lists : The same of objects.
    with_tables : How `utt2spk` and `models` are read.
    speakers_in_cohort : How `cohort_utt2spk` is read.

    Examples
    --------
    >>> from speechbrain_qmargin.embeddings import save_embeddings
    >>> folder = getfixture("tmp_path")
    >>> ids = [f"{speaker}/{take}" for speaker in "abcd" for take in "12"]
    >>> rows = dict(zip(ids, np.eye(4).repeat(2, axis=0), strict=True))
    >>> save_embeddings(folder / "test.npz", rows)
    >>> lines = [f"{one[0] == two[0]:d} {one} {two}" for one in ids for two in ids if one < two]
    >>> _ = (folder / "list.txt").write_text("\\n".join(lines))
    >>> found = score_files(embeddings=folder / "test.npz", trials=folder / "list.txt",
    ...                     output_folder=folder / "scores", fars=[0.1], say=lambda text: None)
    >>> found["list"]["cosine"].num_targets, (folder / "scores" / "results.json").is_file()
    (4, True)
    """
    paths = [Path(one) for one in ([trials] if isinstance(trials, str | Path) else trials)]
    if not paths:
        raise ValueError("trials: give a list at least")
    folder = Path(output_folder)
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        raise ValueError("trials: two lists of one name; their results would overwrite each other")
    systems = ["cosine", *(["centred", kind_of(score_norm)] if cohort else [])]
    systems += ["calibrated"] if dev_trials else []
    written = [folder / name for name in ("results.txt", "results.json")]
    written += [folder / "calibration.json"] if dev_trials else []
    written += [folder / name / f"{system}.tsv" for name in names for system in systems]
    written += [folder / name / "det.png" for name in names]
    inputs = [*paths, embeddings, utt2spk, models, cohort, cohort_utt2spk]
    inputs += [dev_trials, dev_embeddings, dev_utt2spk, dev_models]
    refuse_overwriting(written, inputs, overwrite)
    check_picture(written[-1])
    lists = {path.stem: with_tables(read_trials(path), utt2spk, models) for path in paths}
    vectors = load_embeddings(embeddings)
    of_dev = load_embeddings(dev_embeddings) if dev_embeddings else vectors
    vectors.refuse_other(of_dev, f"{dev_embeddings}")

    normalised = None
    if cohort:
        others = load_embeddings(cohort)
        vectors.refuse_other(others, f"{cohort}")
        whose = speakers_in_cohort(others.ids, cohort_utt2spk)
        normalised = Cohort.of(others, whose, score_norm, top_n)
        normalised.refuse_speakers_of(lists.values())

    calibration = None
    if dev_trials:
        development = with_tables(
            read_trials(dev_trials), dev_utt2spk or utt2spk, dev_models or models
        )
        for one in lists.values():
            note = refuse_shared(one, development, f"dev_trials ({development.name})")
            if note:
                warnings.warn(note, stacklevel=2)
        if normalised is None:
            scores, kind = cosine_scores(of_dev, development, enrolment=enrolment), "cosine"
        else:
            scores = normalised.scores(of_dev, development, enrolment, quiet)
            kind = normalised.kind
        calibration = fit_calibration(
            scores,
            development,
            p_target=min(p_target),
            **_origin(kind, of_dev, development, enrolment, normalised),
        )
        calibration.save(folder / "calibration.json")

    reports, text = score_lists(
        folder,
        lists,
        vectors,
        cohort=normalised,
        calibration=calibration,
        enrolment=enrolment,
        fars=fars,
        p_target=p_target,
        c_miss=c_miss,
        c_fa=c_fa,
        confidence=confidence,
        quiet=quiet,
    )
    results = {
        name: {system: report.to_dict() for system, report in systems.items()}
        for name, systems in reports.items()
    }
    write_text(folder / "results.txt", text)
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    say(f"{text}\nfiles: {folder}/ results.txt, results.json, and a folder per list")
    return reports
