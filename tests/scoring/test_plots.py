"""Pictures: names are text, whatever is in them."""

import numpy as np
import pytest

from speechbrain_qmargin.scoring.metrics import operating_points
from speechbrain_qmargin.scoring.plots import (
    bayes_error_figure,
    calibration_figure,
    det_figure,
    histogram_figure,
    plain,
    save_figure,
)

NAMES = [r"$\frac$", "$a", r"\$b\$", "_hidden", "a$b$c"]


def points(seed=0):
    rng = np.random.default_rng(seed)
    same = np.arange(2000) < 200
    return operating_points(rng.normal(np.where(same, 3.0, -3.0), 3), same)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_drawn_as_text(tmp_path, name):
    systems = {name: points(), name + "2": points(1)}
    figures = [
        det_figure({n: (p, None) for n, p in systems.items()}, name),
        histogram_figure(name, points(), {name: 0.0}),
        calibration_figure(systems, True),
        bayes_error_figure(systems),
    ]
    for figure in figures:
        save_figure(figure, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 1000
        legend = figure.axes[0].get_legend()
        if figure is not figures[1]:
            shown = [text.get_text() for text in legend.get_texts()]
            assert any(plain(name) in text for text in shown)
