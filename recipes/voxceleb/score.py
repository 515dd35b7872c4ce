"""Score trial lists from one set of embeddings, with intervals over speakers.

    python recipes/voxceleb/score.py hparams/score.yaml --embeddings FILE --trials "[O, E, H]"

Per list: cosine; normalised against a cohort, if there is one; calibrated on a development list, if
there is one. Scores (unrounded), figures and DET plots go to the output folder.
"""

import json
import sys
from pathlib import Path

from tqdm import tqdm

from speechbrain_qmargin.experiment import load_experiment
from speechbrain_qmargin.files import write_text
from speechbrain_qmargin.scoring.calibration import fit_calibration
from speechbrain_qmargin.scoring.normalization import (
    make_cohort,
    normalize,
    refuse_shared_speakers,
)
from speechbrain_qmargin.scoring.plots import plot_det
from speechbrain_qmargin.scoring.report import compare, evaluate
from speechbrain_qmargin.scoring.trials import (
    cosine_scores,
    load_embeddings,
    read_map,
    read_trials,
    speaker_in,
    write_scores,
)


def speaker_map(ids, path):
    """Speaker of every id, from an utt2spk or from the ids."""
    return read_map(path) if path else {name: speaker_in(name) for name in ids}


def read_list(path, settings):
    trials = read_trials(path)
    return trials.with_speakers(read_map(settings["speakers"])) if settings["speakers"] else trials


def main(argv):
    settings = load_experiment(argv).settings
    for key in ("embeddings", "trials"):
        if not settings[key]:
            raise ValueError(f"{key}: give it, as --{key}=... or in {argv[0]}")
    lists = {Path(path).stem: read_list(path, settings) for path in settings["trials"]}
    if len(lists) < len(settings["trials"]):
        raise ValueError("trials: two lists of one name; their results would overwrite each other")
    embeddings = load_embeddings(settings["embeddings"])
    folder = Path(settings["output_folder"])

    cohort = mean = None
    if settings["cohort"]:
        others = load_embeddings(settings["cohort"])
        speaker_of = speaker_map(others.ids, settings["cohort_speakers"])
        for trials in lists.values():
            refuse_shared_speakers(speaker_of.values(), trials.speaker_names())
        mean = others.matrix.mean(axis=0)
        cohort = make_cohort(others, speaker_of, mean=mean)

    def best_scores(vectors, trials):
        """Normalised scores where there is a cohort, cosines where not."""
        if cohort is None:
            return cosine_scores(vectors, trials)
        options = {"method": settings["norm"], "top_n": settings["top_n"], "mean": mean}
        with tqdm(total=len(trials.ids), desc=f"{settings['norm']}-norm", leave=False) as progress:
            return normalize(vectors, trials, cohort, progress=progress.update, **options)

    calibration = None
    if settings["dev_trials"]:
        dev = read_list(settings["dev_trials"], settings)
        for name, trials in lists.items():
            shared = sorted(set(dev.speaker_names()) & set(trials.speaker_names()))
            if shared:
                raise ValueError(
                    f"dev_trials: {len(shared)} of its speakers are in {name} too, the first is "
                    f"{shared[0]}; figures on {name} would be optimistic"
                )
        path = settings["dev_embeddings"]
        dev_scores = best_scores(load_embeddings(path) if path else embeddings, dev)
        calibration = fit_calibration(dev_scores, dev, p_target=min(settings["p_target"]))
        calibration.save(folder / "calibration.json")

    text, results = [], {}
    for name, trials in tqdm(lists.items(), "lists", disable=len(lists) == 1):
        systems = {"cosine": cosine_scores(embeddings, trials)}
        if cohort is not None:
            systems[f"{settings['norm']}-norm"] = best_scores(embeddings, trials)
        if calibration is not None:
            systems["calibrated"] = calibration.apply(list(systems.values())[-1], trials)
        reports = {}
        for system, scores in systems.items():
            write_scores(folder / name / f"{system}.tsv", trials, scores)
            reports[system] = evaluate(
                scores,
                trials,
                fars=settings["fars"],
                p_target=settings["p_target"],
                llr=system == "calibrated",
                replicates=settings["replicates"],
                seed=settings["seed"],
            )
            text += [f"{name}, {system}", "", reports[system].table(), ""]
        results[name] = {system: report.to_dict() for system, report in reports.items()}
        first, *others = reports.values()
        for system, report in zip(list(reports)[1:], others, strict=True):
            text += [f"{name}: {system} minus cosine, paired over speakers"]
            for difference in compare(first, report):
                sure = "" if difference.significant else "  (zero is inside)"
                text.append(
                    f"  {difference.name}: {difference.value:+.4f}, 95 % interval "
                    f"{difference.low:+.4f} to {difference.high:+.4f}{sure}"
                )
            text.append("")
        drawn = {system: (scores, trials) for system, scores in systems.items()}
        drawn.pop("calibrated", None)  # a straight line of the scores before: the same curve
        plot_det(drawn, folder / name / "det.png", title=name)
    write_text(folder / "results.txt", "\n".join(text))
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    print("\n".join(text) + f"files: {folder}/ results.txt, results.json, and a folder per list")


if __name__ == "__main__":
    main(sys.argv[1:])
