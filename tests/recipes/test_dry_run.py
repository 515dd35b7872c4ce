"""The full recipe on a tree with VoxCeleb's names, layouts and formats, at 1/1000 of its size.

Full-size models, the published schedules, every list with AS-norm, fine-tuning: nothing of the YAML
that a lab runs for weeks is left out, so that it cannot rot. One epoch, and short recordings.
"""

import json

import pytest
from scripts import train
from voxceleb_tree import build_dry_run_tree


def run(yaml, *options):
    train("voxceleb", yaml, "--num_workers=0", *options, export=True)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    pytest.importorskip("av", reason="m4a files need PyAV: pip install '.[voxceleb]'")
    return build_dry_run_tree(tmp_path_factory.mktemp("tree") / "voxceleb")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["ecapa", "resnet34"])
def test_the_full_recipe_in_small(tree, tmp_path, model, caplog):
    output = tmp_path / "out"
    lists = ", ".join(str(path) for path in tree.lists.values())
    run(
        "qmargin.yaml",
        f"--model={model}",
        f"--data_folder={tree.voxceleb2}",
        f"--trials_folder={tree.voxceleb1}",
        f"--verification_file=[{lists}]",
        f"--noise_folder={tree.musan}",
        f"--rir_folder={tree.rirs}",
        "--num_valid_speakers=2",
        "--batch_size=4",
        "--number_of_epochs=1",
        "--sentence_len=0.8",
        f"--output_folder={output}",
    )
    results = json.loads((output / "results.json").read_text())
    settings = results["settings"]
    assert (settings["size"], settings["speeds"]) == ("full", [1.0, 0.9, 1.1])
    assert set(results["lists"]) == {"veri_test2", "list_test_all2", "list_test_hard2"}
    for systems in results["lists"].values():
        assert set(systems) == {"cosine", "centred", "as-norm"}
    assert "SYNTHETIC" not in caplog.text
    assert (output / "inference" / "hyperparams.yaml").is_file()
    if model == "ecapa":
        longer = ["--number_of_epochs=1", "--batch_size=4", "--sentence_len=1.5"]
        run("qmargin_lm.yaml", f"--pretrained={output}", *longer)
        tuned = json.loads((output / "lm" / "results.json").read_text())
        assert tuned["settings"]["margin"] == "large"
        assert set(tuned["lists"]) == set(results["lists"])
