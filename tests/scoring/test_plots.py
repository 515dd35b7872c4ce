"""Pictures: names are text, whatever is in them."""

import numpy as np
import pytest
from scipy.stats import norm

from speechbrain_qmargin.scoring.metrics import eer, operating_points, tar_at_far
from speechbrain_qmargin.scoring.plots import (
    bayes_error_figure,
    calibration_figure,
    det_figure,
    histogram_figure,
    plain,
    pooled_det_figure,
    save_figure,
)
from speechbrain_qmargin.scoring.uncertainty import Spread
from speechbrain_qmargin.trials import LabelledTrials

NAMES = [r"$\frac$", "$a", r"\$b\$", "_hidden", "a$b$c"]


def points(seed=0):
    rng = np.random.default_rng(seed)
    same = np.arange(2000) < 200
    return operating_points(rng.normal(np.where(same, 3.0, -3.0), 3), same)


def test_names_are_drawn_as_text(tmp_path):
    systems = {name: points(seed) for seed, name in enumerate(NAMES)}
    title = NAMES[-1]
    figures = [
        det_figure({n: (p, None) for n, p in systems.items()}, title),
        histogram_figure(title, points(), dict.fromkeys(NAMES, 0.0)),
        calibration_figure(systems, True),
        bayes_error_figure(systems),
    ]
    for figure in figures:
        save_figure(figure, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 1000
        legend = figure.axes[0].get_legend()
        if figure is not figures[1]:
            shown = [text.get_text() for text in legend.get_texts()]
            assert all(any(plain(name) in text for text in shown) for name in NAMES)


def test_seeds_are_pooled(tmp_path):
    of = np.repeat(np.arange(20), 4)
    left, right = np.triu_indices(80, 1)
    same = of[left] == of[right]
    trials = LabelledTrials([f"s{i}/{j}" for j, i in enumerate(of)], left, right, same)
    rng = np.random.default_rng(0)

    def seeds(distance):
        for _ in range(3):
            scores = rng.normal(size=len(same)) + distance * same
            points = operating_points(scores, same)
            yield points, Spread(scores, trials, points)

    systems = {"a_b": list(seeds(2.0)), "$c$": list(seeds(2.5))}
    figure = pooled_det_figure(systems, "$pooled$")
    save_figure(figure, tmp_path / "pooled.png")
    assert (tmp_path / "pooled.png").stat().st_size > 1000
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    mean = np.mean([eer(points) for points, _ in systems["a_b"]])
    assert labels[0] == f"a_b (EER {100 * mean:.2f} %, 3 seeds)"
    thick = figure.axes[0].get_lines()[0].get_xydata()
    at = int(np.argmin(np.abs(norm.cdf(thick[:, 0]) - 0.1)))
    far = norm.cdf(thick[at, 0])
    wanted = np.mean([1 - tar_at_far(points, far + 1e-12).tar for points, _ in systems["a_b"]])
    assert norm.cdf(thick[at, 1]) == pytest.approx(wanted)
    with pytest.raises(ValueError, match="no seeds to pool"):
        pooled_det_figure({"none": []})
