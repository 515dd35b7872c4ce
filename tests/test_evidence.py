"""The plan's runs and tables, on people and scores that are made up."""

import itertools
import json
from pathlib import Path

import evidence
import evidence_page
import evidence_runs
import numpy as np
import pytest
import recipe_runs
from evidence_runs import SECOND_SETTINGS, STAGES, SYSTEMS, settings_of

from speechbrain_qmargin.embeddings import save_embeddings
from speechbrain_qmargin.scoring.score_files import write_scores
from speechbrain_qmargin.training.config import CommandLine
from speechbrain_qmargin.trials import LabelledTrials

THREE = list(SECOND_SETTINGS)


@pytest.fixture(autouse=True)
def record(tmp_path, monkeypatch) -> Path:
    """An empty record in the project's place."""
    file = tmp_path / "record.json"
    monkeypatch.setattr(evidence_runs, "RECORD", file)
    return file


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> tuple[Path, Path]:
    """Data and a folder of runs, its lists written: 140 speakers of one corpus, 60 of another."""
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("runs")
    counts = {f"cv{n:03}": 4 for n in range(140)} | {f"gs{n:03}": 2 for n in range(60)}
    for speaker, count in counts.items():
        folder = data / "voices/wav" / speaker / "0"
        folder.mkdir(parents=True)
        for number in range(count):
            (folder / f"{number}.flac").touch()
    (data / "speech").mkdir()
    (data / "voices/train_speakers.txt").write_text("\n".join(counts))
    (data / "speech/train_speakers.txt").write_text("actor1\nactor2\n")
    evidence_runs.write_speech_lists(data, out)
    return data, out


def finish(folder: Path, tar: float) -> None:
    figures = {"TAR@FAR=0.01": {"value": tar}, "EER": {"value": 0.1}}
    lists = {name: {"cosine": {"figures": figures}} for name in ("tune_cv", "tune_gsc")}
    folder.mkdir(parents=True)
    last = {"support_mean": 30.0, "zero_loss": 0.25}
    (folder / "results.json").write_text(json.dumps({"lists": lists, "last_epoch": last}))


def finish_tuning(out: Path, stage: str, best: dict[str, int]) -> None:
    for system in THREE:
        for number in range(len(settings_of(stage, system))):
            tar = 0.5 if number == best.get(system) else 0.4 - 0.01 * number
            finish(out / stage / f"{system}_{number}", tar)


def speakers_of(file: Path) -> set[str]:
    return {
        name.split("/")[0] for line in file.read_text().split("\n") for name in line.split()[1:]
    }


def test_the_test_speakers_of_the_further_looks_tuned_nothing(people):
    _, out = people
    lists = out / "lists"
    parts = {
        name: speakers_of(lists / f"{name}_cv.txt") | speakers_of(lists / f"{name}_gsc.txt")
        for name in ("tune", "second", "third")
    }
    assert all(len(part) == 60 for part in parts.values())
    assert len(set().union(*parts.values())) == 180
    for name, held in parts.items():
        trained = set((lists / f"{name}_train.txt").read_text().split())
        assert len(trained) == 142
        assert not trained & held
        assert {"actor1", "actor2"} < trained


def test_identities_whose_images_are_all_in_the_errata_are_not_trained_on(tmp_path):
    data, out = tmp_path / "lfw", tmp_path / "runs"
    train, test = [f"a{n:03}" for n in range(410)], ["b0", "b1"]
    few = {"a000": 1, "a007": 4, "b0": 2, "b1": 2}
    for identity, count in (dict.fromkeys(train, 2) | few).items():
        (data / "images" / identity).mkdir(parents=True)
        for number in range(count):
            (data / "images" / identity / f"{number}.jpg").touch()
    (data / "train_ids.txt").write_text("\n".join(train))
    (data / "test_ids.txt").write_text("\n".join(test))
    (data / "exclude.txt").write_text("a000/0.jpg\na001/1.jpg\n")
    evidence_runs.write_face_lists(tmp_path, out)
    lists = out / "lists"
    assert (lists / "faces_train.txt").read_text().split() == train[1:]
    held = speakers_of(lists / "faces_tune.txt")
    assert len(held) == 400
    assert set((lists / "faces_tune_train.txt").read_text().split()) == set(train[1:]) - held
    assert held.isdisjoint(("a000", "a001"))
    assert len((lists / "faces_test.txt").read_text().splitlines()) == 6
    assert (lists / "third_faces_train.txt").read_text() == "a007\n"
    few = speakers_of(lists / "third_faces_tune.txt")  # two or three images, and in no test
    assert few == set(train) - {"a000", "a001", "a007"}


def test_faces_with_short_prototypes_are_tuned_and_tested_on_the_same_identities(tmp_path):
    runs = STAGES["third_faces_tune"].runs(tmp_path, tmp_path, list(SYSTEMS))
    assert [name for name, _ in runs] == [system for system in THREE for _ in range(4)]
    assert STAGES["third_faces"].runs(tmp_path, tmp_path, list(SYSTEMS)) == {}
    finish_tuning(tmp_path, "third_faces_tune", dict.fromkeys(THREE, 1))
    tests = STAGES["third_faces"].runs(tmp_path, tmp_path, list(SYSTEMS))
    assert [key[1:] for key in tests] == [(system, seed) for seed in range(5) for system in THREE]
    for options, _ in [*runs.values(), *tests.values()]:
        given = dict(option.lstrip("-").split("=", 1) for option in options)
        assert given["train_identities"].endswith("lists/third_faces_train.txt")
        assert given["prototype_std"] == "0.01"


def test_a_class_prior_meets_the_long_tail_beside_the_runs_of_the_test(tmp_path):
    finish_tuning(tmp_path, "third_faces_tune", dict.fromkeys(THREE, 1))
    tested = STAGES["third_faces"].runs(tmp_path, tmp_path, list(SYSTEMS))
    runs = STAGES["third_faces_tail"].runs(tmp_path, tmp_path, list(SYSTEMS))
    many = {key[1:]: run for key, run in runs.items() if key[0].startswith("iresnet, 4+")}
    assert {key: run for key, run in many.items() if key[0] in THREE} == {
        key[1:]: run for key, run in tested.items() if key[2] < 3
    }
    assert len(runs) == 3 * (4 + 3 + 2 + 3)
    assert len({folder for _, folder in runs.values()}) == len(runs)
    for (part, system, _), (options, _) in runs.items():
        given = dict(option.lstrip("-").split("=", 1) for option in options)
        cut = "4+" in part  # by the list itself; elsewhere by the option
        assert given["train_identities"].endswith("third_faces_train.txt") == cut
        assert given["min_images"] == ("2" if "2+" in part else "1")
        assert (given.get("model") == "mobilefacenet") == part.startswith("mobilefacenet")
        assert given["prototype_std"] == "0.01"
        if system == "qmargin_prior":
            same = [one for one in many["qmargin", 0][0] if one.startswith(("--alpha", "--scale"))]
            assert set(same) < set(options)


def test_the_other_encoder_is_tuned_by_itself_and_alpha_moves_beside_the_third_test(
    people, tmp_path
):
    data, _ = people
    tuned = STAGES["resnet_tune"].runs(data, tmp_path, list(SYSTEMS))
    assert [name for name, _ in tuned] == [one for one in ("arcface", "qmargin") for _ in range(4)]
    assert STAGES["resnet_own"].runs(data, tmp_path, list(SYSTEMS)) == {}
    assert STAGES["third_alpha"].runs(data, tmp_path, list(SYSTEMS)) == {}
    finish_tuning(tmp_path, "resnet_tune", {"arcface": 1, "qmargin": 3})
    finish_tuning(tmp_path, "third_tune", dict.fromkeys(THREE, 3))
    tests = STAGES["resnet_own"].runs(data, tmp_path, list(SYSTEMS))
    assert list(tests) == [(one, seed) for seed in range(3) for one in ("arcface", "qmargin")]
    for options, _ in [*tuned.values(), *tests.values()]:
        assert {"--model=resnet34", "--embedding_norm=True", "--prototype_std=0.01"} < set(options)
    assert "--margin=0.1" in tests["arcface", 0][0]
    assert "--alpha_initial=1.05" in tests["qmargin", 0][0]
    moving = STAGES["third_alpha"].runs(data, tmp_path, list(SYSTEMS))
    third = STAGES["third"].runs(data, tmp_path, ["qmargin"])
    for seed in range(3):
        assert moving["qmargin", seed] == third["qmargin", seed]
        for start in ("1.05", "2"):
            options, folder = moving[f"qmargin, alpha from {start}", seed]
            assert set(options) - set(third["qmargin", seed][0]) == {
                f"--alpha_initial={start}",
                "--alpha_until_epoch=8",
            }
            assert folder.name == f"qmargin_alpha_from_{start}_{seed}"


def test_other_losses_meet_the_third_test_beside_its_own_runs(people, tmp_path):
    data, _ = people
    tuned = STAGES["third_others_tune"].runs(data, tmp_path, list(SYSTEMS))
    assert [name for name, _ in tuned] == [
        system for system in ("adaface", "subcenter", "entmax") for _ in range(6)
    ]
    finish_tuning(tmp_path, "third_tune", dict.fromkeys(THREE, 3))
    for number, (_, folder) in enumerate(tuned.values()):
        finish(folder, 0.5 if number % 6 == 1 else 0.4)
    runs = STAGES["third_others"].runs(data, tmp_path, list(SYSTEMS))
    own = STAGES["third"].runs(data, tmp_path, THREE)
    assert {key: run for key, run in runs.items() if key[0] in THREE} == {
        key: run for key, run in own.items() if key[1] < 3
    }
    assert len(runs) == 3 * 8
    for (system, _), (options, _) in runs.items():
        given = dict(option.lstrip("-").split("=", 1) for option in options)
        assert given["prototype_std"] == "0.01"
        assert given["train_speakers"].endswith("third_train.txt")
        if system in ("qmargin_norm", "a3m"):
            assert (given["alpha"], given["scale"], given["margin"]) == ("1.25", "20", "0.2")
    assert {"--scale=16", "--margin=0.4"} < set(runs["adaface", 2][0])


def test_the_second_tuning_is_as_large_for_each_system():
    for system, settings in SECOND_SETTINGS.items():
        both = [*SYSTEMS[system][1], *settings]
        assert len(settings) == 9
        assert all(one not in both[:number] for number, one in enumerate(both))
    assert settings_of("second_tune", "adaface") == settings_of("tune", "published") == []


def test_old_and_new_settings_compete(people, tmp_path):
    data, _ = people
    finish_tuning(tmp_path, "tune", {"cosface": 4})
    runs = STAGES["second"].runs(data, tmp_path, list(SYSTEMS))
    assert runs == {}  # not before the second tuning is done
    assert len(STAGES["second_tune"].runs(data, tmp_path, list(SYSTEMS))) == 27
    finish_tuning(tmp_path, "second_tune", {"arcface": 3, "qmargin": 8})
    assert evidence_runs.chosen(tmp_path, "second_tune", "arcface") == {"scale": 12, "margin": 0.5}
    assert evidence_runs.chosen(tmp_path, "second_tune", "cosface") == {"scale": 32, "margin": 0.2}
    table = evidence.tuning_table(tmp_path, "second_tune", list(SYSTEMS))
    assert table.count("**50.0**") == 3
    assert len(table.splitlines()) == 2 + 3 * 15
    assert "alpha 1.25, scale 16, margin 0.35, alpha_initial 1.05, alpha_until_epoch 8" in table
    # the first comparison keeps its settings
    assert evidence_runs.chosen(tmp_path, "tune", "arcface") == {"scale": 16, "margin": 0.1}

    runs = STAGES["second"].runs(data, tmp_path, list(SYSTEMS))
    assert [*runs] == [(system, seed) for seed in range(5) for system in THREE]
    given, folder = runs["qmargin", 2]
    assert folder == tmp_path / "second/qmargin_2"
    assert {"--seed=2", "--loss=qmargin", "--scale=16", "--alpha_initial=1.05"} < set(given)
    long = STAGES["second_long"].runs(data, tmp_path, list(SYSTEMS))
    assert [*long] == [(system, seed) for seed in range(3) for system in THREE]
    given = recipe_runs.last_of_each(long["qmargin", 2][0])
    CommandLine.of(["hparams.yaml", *given])  # takes no option twice
    assert {"--number_of_epochs=30", "--alpha_until_epoch=20"} < set(given)


def test_a_run_with_other_options_is_not_taken_for_the_one_asked_for(tmp_path, monkeypatch):
    """It would be in the table as if it had been trained so."""
    monkeypatch.setattr(recipe_runs.subprocess, "run", pytest.fail)  # nothing is trained
    done = {"settings": {"lr": 0.1, "number_of_epochs": 12, "margin": None, "loss": "arcface"}}
    (tmp_path / "results.json").write_text(json.dumps(done))
    same = ["--loss=arcface", "--lr", "0.10", "--margin=null", "--device=cpu"]
    assert recipe_runs.train("speech", same, tmp_path) == done
    with pytest.raises(ValueError, match=r"otherwise: --number_of_epochs=30 \(12 there\)"):
        recipe_runs.train("speech", [*same, "--number_of_epochs=30"], tmp_path)


def test_prototypes_start_short_in_the_third_look_alone(people, tmp_path):
    data, _ = people
    finish_tuning(tmp_path, "tune", {})
    finish_tuning(tmp_path, "third_tune", {"qmargin": 2})
    first, third = (STAGES[name].runs(data, tmp_path, THREE) for name in ("speech", "third"))
    for runs, std in ((first, "null"), (third, "0.01")):
        for given, _ in runs.values():
            given = recipe_runs.last_of_each(given)
            CommandLine.of(["hparams.yaml", *given])
            assert f"--prototype_std={std}" in given
    assert [*third] == [(system, seed) for seed in range(5) for system in THREE]
    assert {"--alpha=1.25", "--scale=10", "--margin=0.35"} < set(third["qmargin", 4][0])
    assert evidence.tuning_table(tmp_path, "third_tune", list(SYSTEMS)).count("**50.0**") == 1


def test_a_recorded_tuning_is_known_without_its_folders(people, tmp_path, record, monkeypatch):
    data, _ = people
    first, elsewhere = tmp_path / "first", tmp_path / "elsewhere"
    finish_tuning(first, "tune", {"cosface": 4})
    tables = evidence.tuning_table(first, "tune", THREE)
    evidence_runs.record(
        folder for system in THREE for _, folder in evidence_runs.trained_by(first, "tune", system)
    )
    assert evidence_runs.chosen(elsewhere, "tune", "cosface") == {"scale": 32, "margin": 0.2}
    assert evidence.tuning_table(elsewhere, "tune", THREE) == tables
    # what is recorded is not trained again, what is not is added
    trained: list = []
    monkeypatch.setattr(evidence, "train_all", lambda _, runs, *__: trained.extend(runs))
    command = ["evidence.py", str(data), str(elsewhere), "--stage", "tune", "--record", "--systems"]
    monkeypatch.setattr("sys.argv", [*command, "qmargin", "sparsemax"])
    finish(elsewhere / "tune/sparsemax_2", 0.3)
    evidence.main()
    assert trained == [("sparsemax", number) for number in range(6)]
    kept = json.loads(record.read_text())
    assert len(kept) == 19
    assert evidence_runs.value(kept["tune/sparsemax_2"], "tune_cv", "TAR@FAR=0.01") == 0.3
    assert evidence_runs.chosen(elsewhere, "tune", "sparsemax") is None  # five are missing


def test_the_number_of_classes_is_the_mean_of_recorded_and_new_runs(people, tmp_path):
    data, out = people
    first = tmp_path / "first/classes/30_1.25_0"
    finish(first, 0.4)
    results = json.loads((first / "results.json").read_text())
    results["lists"] = {name: results["lists"]["tune_cv"] for name in ("trials_cv", "trials_gsc")}
    (first / "results.json").write_text(json.dumps(results))
    evidence_runs.record([first])
    second = tmp_path / "second/classes/30_1.25_1"
    finish(second, 0.5)
    table = evidence.classes_table({(30, "1.25", 0): first, (30, "1.25", 1): second})
    assert "| cv | TAR@1e-2, % | 30 | 45.00 ± 7.07 |" in table
    assert evidence.tables("classes", data, out).count("40.00") == 2


def scores(folder: Path, trials: str, lead: float, seed: int) -> None:
    """Of 30 speakers with 3 recordings: normal, those of targets larger by `lead`."""
    names = [f"p{speaker:02}/0/{number}" for speaker in range(30) for number in range(3)]
    pairs = np.array(list(itertools.combinations(range(len(names)), 2)))
    is_target = pairs[:, 0] // 3 == pairs[:, 1] // 3
    listed = LabelledTrials(names, pairs[:, 0], pairs[:, 1], is_target)
    values = np.random.default_rng(seed).normal(size=len(pairs)) + lead * is_target
    file = evidence.score_file(folder, trials, "cosine")
    file.parent.mkdir(parents=True)
    write_scores(file, listed, values, {"kind": "cosine"})


def test_the_second_decision_reads_the_second_lists(tmp_path):
    leads = {"arcface": 2.0, "cosface": 3.0, "qmargin": 3.0}
    folders = {
        (system, seed): tmp_path / f"{system}_{seed}"
        for system, seed in itertools.product(leads, range(2))
    }
    lists = list(evidence.SECOND_LISTS)
    for number, ((system, _), folder) in enumerate(folders.items()):
        for trials in lists:
            scores(folder, trials, leads[system], number)
    assert evidence.decision_table(folders, list(evidence.FIRST_LISTS)[:2]) == ""
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in evidence.decision_table(folders, lists).splitlines()[2:]
    ]
    assert {(row[0], row[1]) for row in rows} == set(
        itertools.product(("second cv", "second gsc"), ("arcface", "cosface"))
    )
    assert [row[1] for row in rows[:2]] == ["arcface"] * 2  # the surest first
    corrected = [float(row[6]) for row in rows]
    assert corrected == sorted(corrected)
    assert corrected[1] < 0.01
    assert corrected[2] > 0.05
    found = evidence.measured(folders, lists[0], "cosine")
    tar = {key: values[1] for key, (values, _) in found.items()}
    for _, system, seeds, points, *_ in (row for row in rows if row[0] == "second cv"):
        lead = np.mean([tar["qmargin", seed] - tar[system, seed] for seed in range(2)])
        assert seeds == "2"
        assert float(points) == pytest.approx(100 * lead, abs=0.006)
    # two rates on one list: again four comparisons
    rates = ["TAR@1e-2", "TAR@1e-3"]
    rows = evidence.decision_table(folders, lists[:1], rates).splitlines()[2:]
    names = {tuple(cell.strip() for cell in line.split("|")[1:3]) for line in rows}
    named = [f"second cv, {rate}" for rate in rates]
    assert names == set(itertools.product(named, ("arcface", "cosface")))


def test_fine_tuning_has_tables_of_its_own(people):
    assert evidence.tables("finetune", *people) == ""  # nothing is finished: no tuning's table


def test_schedules_are_compared_with_fixed_settings_and_with_the_same_of_the_baselines(
    people, tmp_path
):
    data, _ = people
    finish_tuning(tmp_path, "tune", {"qmargin": 0})
    runs = STAGES["schedules"].runs(data, tmp_path, list(SYSTEMS))
    assert len(runs) == len({folder for _, folder in runs.values()}) == 18
    given, folder = runs["qmargin, alpha from 1.05", 1]  # half as far from 1 as the tuned 1.1
    assert folder.name == "qmargin_alpha_from_1.05_1"
    assert {"--alpha=1.1", "--alpha_initial=1.05", "--seed=1"} < set(given)
    own = STAGES["speech"].runs(data, tmp_path, ["arcface", "cosface", "qmargin"])
    both = {**own, **{key: run for key, run in runs.items() if key[0].endswith("margin from 0")}}
    for number, ((_, seed), (_, folder)) in enumerate(both.items()):
        if seed < 2:
            folder.mkdir(parents=True)
            (folder / "results.json").touch()
            for trials in evidence.FIRST_LISTS:
                scores(folder, trials, lead=2.0, seed=number)
    text = evidence.tables("schedules", data, tmp_path)
    rising = text.split("### cv, margin from 0, cosine")[1].split("###")[0]
    assert "qmargin, margin from 0 minus the system" in rising
    fixed = text.split("### cv, cosine")[1].split("###")[0]
    assert "| qmargin, margin from 0 | 2 |" in fixed.split("qmargin minus the system")[1]
    assert "cosface" not in fixed
    assert "cosface minus the system" in text.split("### gsc, cosface, margin from 0, cosine")[1]


def test_faces_are_compared_on_all_pairs_and_on_the_official_ones(tmp_path):
    people = {
        f"f{n}/{k}.jpg": np.eye(24)[n] + 0.1 * np.eye(24)[int(k)] for n in range(20) for k in "01"
    }
    same = [f"1 f{n}/0.jpg f{n}/1.jpg" for n in range(10)]
    other = [f"0 f{n}/0.jpg f{n + 1}/1.jpg" for n in range(10)]
    (tmp_path / "lfw").mkdir()
    # of which the errata leave out the last
    lines = [*same, *other, "1 f20/0.jpg f20/1.jpg"]
    (tmp_path / "lfw/pairs_fold8.txt").write_text("\n".join(lines) + "\n")
    folders = {}
    for system, lead in (("qmargin", 3.0), ("arcface", 2.0)):
        folder = tmp_path / system
        scores(folder, "faces_test", lead, seed=0)
        save_embeddings(folder / "embeddings.npz", people)
        folders["iresnet, 4+ images", system, 0] = folder
    text = evidence.face_tables(tmp_path, tmp_path, folders)
    all_pairs, official = text.split("### iresnet, 4+ images, official pairs")
    assert "TAR@1e-4, %" in all_pairs
    assert "qmargin minus the system" in all_pairs
    assert "| qmargin | 1 | 20 | 100.00 |" in official
    assert (tmp_path / "det_iresnet_4_images.png").is_file()


def test_a_page_takes_its_tables_from_the_runs(tmp_path):
    (tmp_path / "second.md").write_text("| the test |\n\n### cv, cosine\n\n| cv |\n\n### gsc\n")
    page = "# Page\n\n<!-- second -->\nold\n<!-- end -->\n\nText.\n"
    page += "<!-- second: cv, cosine -->\n<!-- end -->\nEnd.\n"
    once = evidence_page.filled(page, tmp_path)
    assert once == (
        "# Page\n\n<!-- second -->\n\n| the test |\n\n<!-- end -->\n\nText.\n"
        "<!-- second: cv, cosine -->\n\n| cv |\n\n<!-- end -->\nEnd.\n"
    )
    assert evidence_page.filled(once, tmp_path) == once
    elsewhere = page + "<!-- tune -->\nof another machine\n<!-- end -->\n"
    kept = evidence_page.filled(elsewhere, tmp_path, ["second"])
    assert kept == once + "<!-- tune -->\nof another machine\n<!-- end -->\n"
    for block in ("second: gsc", "second: none", "tune"):
        with pytest.raises(ValueError, match="no table"):
            evidence_page.filled(f"<!-- {block} -->\n<!-- end -->", tmp_path)
