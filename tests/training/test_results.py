"""What a run's results say of it."""

from types import SimpleNamespace

import numpy as np

from speechbrain_qmargin.faces.pair_sets import pair_ids
from speechbrain_qmargin.training.results import verify


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
