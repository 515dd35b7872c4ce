"""Score trial lists from one set of embeddings, with intervals over speakers.

    python recipes/voxceleb/score.py hparams/score.yaml --embeddings FILE --trials "[O, E, H]"

Per list: cosine; normalised against a cohort, if there is one; calibrated on a development list, if
there is one. Scores (unrounded), figures and DET plots go to the output folder.
"""

import json
import sys
from pathlib import Path

from speechbrain_qmargin.embeddings import cosine_scores, load_embeddings
from speechbrain_qmargin.files import write_text
from speechbrain_qmargin.scoring.calibration import fit_calibration
from speechbrain_qmargin.scoring.lists import Cohort, score_lists
from speechbrain_qmargin.training.config import load_experiment
from speechbrain_qmargin.trials import read_map, read_trials, speaker_in


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

    cohort = None
    if settings["cohort"]:
        others = load_embeddings(settings["cohort"])
        speakers = speaker_map(others.ids, settings["cohort_speakers"])
        cohort = Cohort.of(others, speakers, settings["norm"], settings["top_n"])
        cohort.refuse_speakers_of(lists.values())

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
        dev_embeddings = load_embeddings(path) if path else embeddings
        scores = (cohort.scores if cohort else cosine_scores)(dev_embeddings, dev)
        calibration = fit_calibration(scores, dev, p_target=min(settings["p_target"]))
        calibration.save(folder / "calibration.json")

    options = {key: settings[key] for key in ("fars", "p_target")}
    reports, text = score_lists(
        folder, lists, embeddings, cohort=cohort, calibration=calibration, **options
    )
    results = {
        name: {system: report.to_dict() for system, report in systems.items()}
        for name, systems in reports.items()
    }
    write_text(folder / "results.txt", text)
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    print(f"{text}\nfiles: {folder}/ results.txt, results.json, and a folder per list")


if __name__ == "__main__":
    main(sys.argv[1:])
