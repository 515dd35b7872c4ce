"""A report as one HTML page without network, with its pictures as PNG and SVG and its JSON.

:func:`write_report` is the whole of it; :mod:`~speechbrain_qmargin.scoring.page` lays it out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from speechbrain_qmargin import __version__
from speechbrain_qmargin.files import write_text
from speechbrain_qmargin.scoring.breakdown import breakdown
from speechbrain_qmargin.scoring.decision import (
    OperatingPoint,
    choose_operating_point,
    recordings_enrolled,
)
from speechbrain_qmargin.scoring.influence import TrialStructure
from speechbrain_qmargin.scoring.metrics import operating_points
from speechbrain_qmargin.scoring.page import Page, Provenance, render
from speechbrain_qmargin.scoring.plots import (
    bayes_error_figure,
    calibration_figure,
    check_picture,
    det_figure,
    histogram_figure,
    save_figure,
)
from speechbrain_qmargin.scoring.report import Report, compare, evaluate
from speechbrain_qmargin.scoring.separation import origin_of, refuse_shared
from speechbrain_qmargin.scoring.worst import worst_speakers, worst_trials
from speechbrain_qmargin.trials import LabelledTrials, Lost

__all__ = ["FARS", "PRIORS", "report_files", "write_report"]

FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
PRIORS = (0.05, 0.01, 0.001)


def report_files(systems: int) -> list[str]:
    """The files that :func:`write_report` may write for so many systems, by name.

    Examples
    --------
    >>> report_files(2)[-4:]
    ['histogram_1.png', 'histogram_2.png', 'operating_point_1.json', 'operating_point_2.json']
    """
    numbers = range(1, systems + 1)
    points = [f"operating_point_{n}.json" for n in numbers] if systems > 1 else []
    return [
        *("report.html", "report.json", "det.png", "det.svg", "calibration.png", "bayes_error.png"),
        *(f"histogram_{n}.png" for n in numbers),
        *(points or ["operating_point.json"]),
    ]


def write_report(
    folder: str | Path,
    systems: Mapping[str, np.ndarray],
    trials: LabelledTrials,
    *,
    title: str = "Verification report",
    fars: Sequence[float] = FARS,
    p_target: Sequence[float] = PRIORS,
    far: float = 1e-2,
    c_miss: float = 1.0,
    c_fa: float = 1.0,
    confidence: float = 0.95,
    llr: bool = False,
    development: Mapping[str, tuple[np.ndarray, LabelledTrials]] | None = None,
    metadata: Mapping[str, Mapping[str, str]] | None = None,
    provenance: Provenance | None = None,
    lost: Mapping[str, Lost | None] | None = None,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Report]:
    """Evaluate systems on one trial list and write everything there is to see, once it is found.

    In the folder: ``report.html`` (self-contained), ``report.json``, ``det.png`` and ``.svg``,
    ``histogram_<n>.png``, ``calibration.png``, of log-likelihood ratios ``bayes_error.png``, and
    an operating point to load in a service: ``operating_point.json`` for one system,
    ``operating_point_<n>.json`` for several.

    Parameters
    ----------
    folder : path
    systems : mapping from name to scores [N]
    trials : LabelledTrials
    title : str
    fars, p_target : sequence of float
        Of the table.
    far : float
        Of the operating points.
    c_miss, c_fa : float
        Costs of the DCFs.
    confidence : float
        Of the intervals.
    llr : bool
        The scores are log-likelihood ratios.
    development : mapping from name to (scores, LabelledTrials), optional
        Where the thresholds of the operating points are chosen; without it they are marked
        optimistic.
    metadata : mapping from column to mapping from recording or speaker to value, optional
        Rates by group at the operating points; see
        :func:`~speechbrain_qmargin.scoring.breakdown.breakdown`.
    provenance : Provenance, optional
        The command, the score files and what is known of the systems ("kind", "embeddings", to
        which the operating points are bound); date and version are set.
    lost : mapping from system to Lost, optional
        Failures of each; those of the trials by default.
    progress : callable, optional
        Called with 1 for every system just evaluated.

    Returns
    -------
    dict from name to Report

    Raises
    ------
    ValueError
        Development trials that share speakers with the trials, and as
        :func:`~speechbrain_qmargin.scoring.report.evaluate`.

    See Also
    --------
    speechbrain_qmargin.scoring.report.evaluate : The figures of one system.
    speechbrain_qmargin.scoring.plots.det_figure : The picture of several systems.

    Examples
    --------
    >>> left, right = np.triu_indices(16, 1)
    >>> ids = [f"{speaker}/{take}" for speaker in "abcdefgh" for take in "12"]
    >>> trials = LabelledTrials(ids, left, right, left // 2 == right // 2)
    >>> folder = getfixture("tmp_path") / "report"
    >>> reports = write_report(folder, {"mine": trials.is_target.astype(float)}, trials)
    >>> reports["mine"]["eer"].shown
    '0.00 % (unsupported)'
    >>> sorted(file.name for file in folder.glob("*.[hj]*"))
    ['operating_point.json', 'report.html', 'report.json']
    """
    folder = Path(folder)
    check_picture(folder / "det.png")
    distinct = trials.distinct
    systems = {name: distinct.scores(np.asarray(one)) for name, one in systems.items()}
    trials = distinct.trials
    provenance = provenance or Provenance()
    notes = list(provenance.notes)
    apart = {}
    for name, (_, dev_trials) in (development or {}).items():
        note = refuse_shared(trials, dev_trials, f"the development trials of {name}")
        apart[name] = not note
        notes += [note] if note else []
    reports: dict[str, Report] = {}
    decisions: dict[str, OperatingPoint] = {}
    structure = TrialStructure.of(trials.distinct.trials)
    for name, scores in systems.items():
        reports[name] = evaluate(
            scores,
            trials,
            fars=fars,
            p_target=p_target,
            c_miss=c_miss,
            c_fa=c_fa,
            all_eers=True,
            llr=llr,
            structure=structure,
            confidence=confidence,
        )
        if lost is not None:
            reports[name] = replace(reports[name], lost=lost.get(name))
        if progress is not None:
            progress(1)
        held_out, chosen_on = None, ""
        if development and name in development:
            dev_scores, dev_trials = development[name]
            counted = dev_trials.distinct
            held_out = operating_points(
                counted.scores(np.asarray(dev_scores)), counted.trials.is_target
            )
            chosen_on = dev_trials.source
        about = provenance.about.get(name, {})
        decisions[name] = choose_operating_point(
            name,
            reports[name].points,
            far,
            development=held_out,
            measured_on=trials.source,
            chosen_on=chosen_on,
            speakers=structure.contributing,
            embeddings=about.get("embeddings", ""),
            scores=provenance.files.get(name, ""),
            enrolled_from=recordings_enrolled(trials),
            apart=apart.get(name, True),
            spread=reports[name].spread,
            confidence=confidence,
            **origin_of(about),
        )
    names = list(reports)
    differences = {
        (first, second): compare(reports[first], reports[second])
        for index, first in enumerate(names)
        for second in names[index + 1 :]
    }
    worst = {
        name: {
            "trials": worst_trials(scores, trials),
            "speakers": worst_speakers(scores, trials, decisions[name].threshold),
        }
        for name, scores in systems.items()
    }
    groups = {
        name: [
            breakdown(
                scores,
                trials,
                decisions[name].threshold,
                values,
                column=column,
                confidence=confidence,
            )
            for column, values in (metadata or {}).items()
        ]
        for name, scores in systems.items()
        if metadata
    }
    provenance = replace(
        provenance,
        notes=tuple(notes),
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=f"speechbrain_qmargin {__version__}",
    )
    figures = _figures(reports, decisions, title, far, confidence, llr)
    page = Page(
        title,
        reports,
        decisions,
        differences,
        worst,
        folder,
        list(figures),
        llr,
        groups,
        provenance,
    )
    _forget_another(folder)
    save_figure(figures["det"], folder / "det.svg")
    for name, figure in figures.items():
        save_figure(figure, folder / f"{name}.png")
    for number, decision in enumerate(decisions.values(), 1):
        suffix = "" if len(decisions) == 1 else f"_{number}"
        decision.save(folder / f"operating_point{suffix}.json")
    write_text(folder / "report.json", json.dumps(_content(page), indent=2) + "\n")
    write_text(folder / "report.html", render(page))
    return reports


def _figures(
    reports: Mapping[str, Report],
    decisions: Mapping[str, OperatingPoint],
    title: str,
    far: float,
    confidence: float,
    llr: bool,
) -> dict[str, Any]:
    """The pictures by name."""
    points = {name: report.points for name, report in reports.items()}
    curves = {name: (report.points, report.spread) for name, report in reports.items()}
    figures = {"det": det_figure(curves, title, confidence)}
    for number, (name, report) in enumerate(reports.items(), 1):
        lines = {"EER": report["eer"].threshold, f"FAR {far:g}": decisions[name].threshold}
        figures[f"histogram_{number}"] = histogram_figure(name, report.points, lines)
    figures["calibration"] = calibration_figure(points, llr)
    if llr:
        figures["bayes_error"] = bayes_error_figure(points)
    return figures


def _forget_another(folder: Path) -> None:
    """Of another report in the folder, what may not be replaced: its thresholds must not stay."""
    if (folder / "report.json").is_file():
        for pattern in ("operating_point*.json", "histogram_*.png", "bayes_error.png"):
            for old in folder.glob(pattern):
                old.unlink()


def _content(page: Page) -> dict[str, Any]:
    """What ``report.json`` holds."""
    return {
        "title": page.title,
        "made": asdict(page.provenance),
        "systems": {name: report.to_dict() for name, report in page.reports.items()},
        "operating_points": {name: asdict(point) for name, point in page.decisions.items()},
        "differences": [
            {"first": first, "second": second, "figures": [asdict(one) for one in values]}
            for (first, second), values in page.differences.items()
        ],
        "groups": {
            name: [found.to_dict() for found in tables] for name, tables in page.breakdowns.items()
        },
        "worst": page.worst,
    }
