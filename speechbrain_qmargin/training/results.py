"""What a run is measured by: validation after each epoch, the tables and figures at its end."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict

import numpy as np

from speechbrain_qmargin.embeddings import cosine_scores, save_embeddings
from speechbrain_qmargin.faces.pair_sets import pair_ids, pair_set_figures
from speechbrain_qmargin.files import write_text
from speechbrain_qmargin.scoring.lists import Cohort, score_lists
from speechbrain_qmargin.scoring.metrics import eer, operating_points, tar_at_far
from speechbrain_qmargin.scoring.report import Report
from speechbrain_qmargin.training.run_folder import RunFolder
from speechbrain_qmargin.trials import LabelledTrials

__all__ = ["validation", "verify"]


def validation(
    trials: LabelledTrials | None,
) -> Callable[[Mapping[str, np.ndarray]], dict] | None:
    """What a Brain measures on validation embeddings: EER, TAR at FAR 1e-2. None without trials.

    Distinct pairs count, as in figures.

    Examples
    --------
    >>> ids = ["ann/1", "ann/2", "bob/1"]
    >>> pairs = np.array([0, 0]), np.array([1, 2]), np.array([True, False])
    >>> validate = validation(LabelledTrials(ids, *pairs))
    >>> validate(dict(zip(ids, np.array([[1, 0], [1, 0.1], [0, 1]]), strict=True)))
    {'eer': 0.0, 'tar_at_1e-2': 1.0}
    """
    if trials is None:
        return None
    counted = trials.distinct.trials

    def validate(embeddings: Mapping[str, np.ndarray]) -> dict[str, float]:
        points = operating_points(cosine_scores(embeddings, counted), counted.is_target)
        return {"eer": eer(points), "tar_at_1e-2": tar_at_far(points, 1e-2)[0]}

    return validate


def verify(
    run_folder: RunFolder,
    embeddings: Mapping[str, np.ndarray],
    lists: Mapping[str, LabelledTrials],
    history: list[dict],
    note: str = "",
    cohort: Cohort | None = None,
    pair_sets: Mapping[str, np.ndarray] | None = None,
    units: str = "speakers",
    loss: Mapping[str, float] | None = None,
) -> dict[str, dict[str, Report]]:
    """Score the test lists; write and print the results of a run.

    In the output folder: ``embeddings.npz``, ``scores/<list>/`` with every system's unrounded
    scores and ``det.png``, ``results.txt`` (the printed tables) and, last, ``results.json``, which
    marks the run as done. Its ``figures`` are the first list's, by cosine. `pair_sets` are
    measured over ten folds, as faces are; their scores and DET stand beside the lists'. `loss` are
    the numbers that the loss had, those that it chose itself included.
    """
    experiment = run_folder.experiment
    folder, settings = run_folder.path, experiment.settings
    save_embeddings(folder / "embeddings.npz", embeddings)
    reports, tables = score_lists(
        folder / "scores", lists, embeddings, cohort=cohort, title=note, units=units
    )

    seconds = sum(record["seconds"] for record in history)
    called = settings["loss"]
    lines = [f"{called}, {settings['model']}, {len(history)} epochs, seed {settings['seed']}"]
    lines += [note] if note else []
    folds = {}
    for name, same in (pair_sets or {}).items():
        ids = pair_ids(name, len(same))
        rows = np.stack([embeddings[one] for one in ids])  # the Brain has added mirror images
        folds[name] = pair_set_figures(folder / "scores" / name, name, ids, rows, same, note)
    lines += ["", *(f"{name}: {one}" for name, figures in folds.items() for one in figures)]
    lines += [tables.rstrip(), f"training took {seconds / 60:.1f} minutes"]
    last = history[-1] if history else {}
    if "support_mean" in last:
        lines.append(
            f"support in the last epoch: {last['support_mean']:.1f} classes a sample on average, "
            f"at most {last['support_max']}; {100 * last['zero_loss']:.0f} % of the samples at "
            "zero loss"
        )
    lines += [f"{called} is {one['advice']}" for one in history if "advice" in one]
    pictures = [f"scores/{name}/det.png" for name in [*lists, *folds]]
    files = ", ".join([*pictures, "scores", "embeddings.npz", "history.jsonl"])
    lines.append(f"files: {folder}/ {files}")
    table = "\n".join(lines) + "\n"
    write_text(folder / "results.txt", table)
    used = {key: getattr(experiment.run_opts, key, None) for key in ("precision", "device")}
    results = {
        "settings": settings,
        "loss": dict(loss or {}),
        "run_opts": used,
        "note": note,
        "seconds": seconds,
        "last_epoch": last,
        "advice": [one["advice"] for one in history if "advice" in one],
        **(next(iter(reports.values()))["cosine"].to_dict() if reports else {}),
        "pair_sets": {name: [asdict(one) for one in figures] for name, figures in folds.items()},
        "lists": {
            name: {system: report.to_dict() for system, report in systems.items()}
            for name, systems in reports.items()
        },
    }
    text = json.dumps(results, indent=2, default=np.ndarray.tolist)
    write_text(run_folder.results_file, text + "\n")
    print("\n" + table)
    return reports
