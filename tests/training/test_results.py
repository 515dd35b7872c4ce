"""What a run's results say of it."""

from types import SimpleNamespace

import numpy as np
import pytest

from speechbrain_qmargin.faces.pair_sets import pair_ids
from speechbrain_qmargin.training.results import validation, verify
from speechbrain_qmargin.trials import LabelledTrials


def test_advice_is_of_the_loss_whatever_else_was_measured(tmp_path):
    """Of a run with pair sets as well, whose names are others."""
    rng = np.random.default_rng(0)
    same = np.tile([True, False], 20)
    rows = rng.standard_normal((80, 4)).astype(np.float32)
    embeddings = dict(zip(pair_ids("lfw", 40), rows, strict=True))
    settings = {"loss": "qmargin_face", "model": "iresnet50", "seed": 1}
    folder = SimpleNamespace(
        path=tmp_path,
        results_file=tmp_path / "results.json",
        experiment=SimpleNamespace(settings=settings, run_opts=SimpleNamespace()),
    )
    history = [{"epoch": 1, "seconds": 2.0, "advice": "asleep: 95 % of the samples rest"}]
    verify(folder, embeddings, {}, history, pair_sets={"lfw": same})
    text = (tmp_path / "results.txt").read_text()
    assert "qmargin_face is asleep: 95 % of the samples rest\n" in text
    assert "lfw is" not in text


@pytest.mark.filterwarnings("ignore:.*trials:UserWarning")
def test_validation_counts_a_pair_once_and_no_recording_with_itself():
    ids = ["ann/1", "ann/2", "bob/1", "bob/2"]
    vectors = np.array([[1, 0], [0, 1], [1, 0.1], [1, 0.2]])  # ann's two are far apart
    pairs = [(0, 1), (2, 3), (0, 2), (1, 3), (3, 2), (0, 0), (1, 1)]
    left, right = np.transpose(pairs)
    trials = LabelledTrials(ids, left, right, left // 2 == right // 2)
    validate = validation(trials)
    assert validate is not None
    # targets 0 and 0.9952, impostors 0.9950 and 0.196; all seven would give an EER of 1/6
    found = validate(dict(zip(ids, vectors, strict=True)))
    assert found == {"eer": pytest.approx(1 / 3), "tar_at_1e-2": 0.5}
