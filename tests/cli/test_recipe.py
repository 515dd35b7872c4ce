"""The front door of the recipes: help, the plain experiment, one line for an error."""

from pathlib import Path

import pytest
from hyperpyyaml import load_hyperpyyaml

from speechbrain_qmargin.cli.recipe import run_recipe

RECIPE = str(Path(__file__).parents[2] / "hparams" / "qmargin.yaml")


def refuse(argv):
    raise AssertionError("the recipe ran")


def test_help_prints_the_settings_with_their_comments(capsys):
    assert run_recipe("About.", refuse, [RECIPE, "--help"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("About.")
    assert "\nnumber_of_epochs: 20\n" in told
    assert "# held out without a valid_file" in told
    assert "!new:" not in told
    assert "--print_config" in told
    assert "\nloss_options: {}\n" in told
    assert run_recipe("About.", refuse, []) == 0
    assert "Name the YAML" in capsys.readouterr().out


def test_help_shows_the_settings_that_the_options_choose(tmp_path, capsys):
    options = ["--model=campplus", "--size", "small", "--precision=fp16"]
    assert run_recipe("", refuse, [RECIPE, *options, "--help"]) == 0
    told = capsys.readouterr().out
    assert "\ngrowth: 32" in told  # of CAM++
    assert "\nchannels:" not in told  # of ECAPA-TDNN
    assert "\nnumber_of_epochs: 30\n" in told
    run = tmp_path / "run"
    run.mkdir()
    (run / "experiment.yaml").write_text("output_folder: there\nsubcentres: 7\n")
    lm = [RECIPE.replace("qmargin.yaml", "qmargin_lm.yaml"), f"--pretrained={run}"]
    assert run_recipe("", refuse, ["-h", *lm]) == 0
    assert "\nsubcentres: 7\n" in capsys.readouterr().out
    assert run_recipe("", refuse, [lm[0], "--help"]) == 1
    assert "--pretrained must be given" in capsys.readouterr().err
    assert run_recipe("", refuse, ["--trust", "--help"]) == 1
    assert "YAML first" in capsys.readouterr().err


def test_help_names_options_of_trainings_for_trainings_only(capsys):
    assert run_recipe("", refuse, [RECIPE, "--help"]) == 0
    assert "--trust" in capsys.readouterr().out
    assert run_recipe("", refuse, [RECIPE.replace("qmargin.yaml", "score.yaml"), "--help"]) == 0
    told = capsys.readouterr().out
    assert "--print_config" in told
    assert "--trust" not in told
    assert "--device" not in told


def test_the_plain_experiment_is_loaded_as_it_is(tmp_path, capsys):
    options = [f"--output_folder={tmp_path}", "--size=small", "--data_folder", "voices"]
    assert run_recipe("", refuse, [RECIPE, "--print_config", "--seed=3", *options]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# Speaker verification with Q-Margin")
    hparams = load_hyperpyyaml(text)
    assert (hparams["seed"], hparams["size"], hparams["data_folder"]) == (3, "small", "voices")
    assert hparams["modules"]["embedding_model"] is hparams["embedding_model"]
    # it is a recipe's YAML as well, and says the same again
    (tmp_path / "plain.yaml").write_text(text)
    assert run_recipe("", refuse, [str(tmp_path / "plain.yaml"), "--print_config"]) == 0
    assert capsys.readouterr().out == text


def test_an_interruption_is_a_line_that_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    assert run_recipe("", interrupted, ["that"]) == 130
    told = capsys.readouterr().err
    assert told.endswith(": interrupted; the same command goes on where it was\n")
    assert told.strip().count("\n") == 0
    monkeypatch.setenv("QMARGIN_TRACEBACK", "1")
    with pytest.raises(KeyboardInterrupt):
        run_recipe("", interrupted, ["that"])


def test_an_error_of_the_input_is_one_line(monkeypatch, capsys):
    def fails(argv):
        raise ValueError(f"no such thing as {argv[0]}")

    def in_a_worker(argv):
        raise OSError(
            "Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
            'last):\n  File "x.py", line 1, in f\nOSError: a.wav: cannot be decoded\n'
        )

    assert run_recipe("", fails, ["that"]) == 1
    told = capsys.readouterr().err
    assert told.endswith(": no such thing as that\n")
    assert told.count("\n") == 1
    assert run_recipe("", in_a_worker, ["that"]) == 1
    assert capsys.readouterr().err.endswith(": OSError: a.wav: cannot be decoded\n")
    assert run_recipe("", refuse, [RECIPE, "--optimizer", "adam", "--print_config"]) == 1
    assert "--optimizer is not an option" in capsys.readouterr().err
    monkeypatch.setenv("QMARGIN_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no such thing"):
        run_recipe("", fails, ["that"])
