"""A figure of one's own: one file outside the package, no other change."""

import json

import numpy as np

from speechbrain_qmargin.cli import main
from speechbrain_qmargin.scoring import figures
from speechbrain_qmargin.scoring.score_files import write_scores
from speechbrain_qmargin.trials import LabelledTrials

FILE = '''
"""The false accept rate at which a share of the targets is accepted."""

from dataclasses import dataclass

import numpy as np

from speechbrain_qmargin.scoring.figures import Found, register
from speechbrain_qmargin.scoring.uncertainty import rate_interval


@dataclass(frozen=True)
class FarAtTar:
    tar: float

    kind = "far_at_tar"
    unit = "rate"
    higher_is_better = False

    @property
    def parameter(self):
        return self.tar

    @property
    def name(self):
        return f"FAR@TAR={self.tar:g}"

    def find(self, points):
        at = np.flatnonzero(points.misses <= (1 - self.tar) * points.num_targets + 1e-9)[-1]
        misses, accepts = int(points.misses[at]), int(points.false_accepts[at])
        threshold = float(points.thresholds[at])
        return Found(float(points.far[at]), threshold, min(misses, accepts), misses, accepts)

    def influence(self, spread):
        found, points = self.find(spread.points), spread.points
        near = np.quantile(points.targets, [0.5 - self.tar / 2, 1.5 - 1.5 * self.tar])
        (less, more), (most, fewest) = zip(*map(points.errors_at, near))
        slope = (fewest - most) / points.num_impostors / ((more - less) / points.num_targets)
        moved = spread.far(found.threshold) - slope * spread.frr(found.threshold)
        return moved.on("logit")

    def few_errors(self, found, points, confidence=0.95):
        return rate_interval(found.false_accepts, points.num_impostors, confidence)


register(FarAtTar(0.9))
'''


def test_a_figure_is_one_file(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    left, right = np.triu_indices(80, 1)
    same = left // 4 == right // 4
    trials = LabelledTrials([f"s{i // 4}/u{i % 4}" for i in range(80)], left, right, same)
    scores = rng.normal(size=len(left)) + 3 * same
    write_scores(tmp_path / "a.tsv", trials, scores)
    write_scores(tmp_path / "b.tsv", trials, scores + 0.5 * rng.normal(size=len(left)))
    (tmp_path / "mine.py").write_text(FILE, encoding="utf-8")
    monkeypatch.setattr(figures, "_registered", {})  # of this test alone
    monkeypatch.chdir(tmp_path)
    arguments = ["--quiet", "report", "a.tsv", "b.tsv", "--output=out"]
    assert main([*arguments, "--figures_from=mine.py"]) == 0
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    targets, impostors = np.sort(scores[same]), scores[~same]
    threshold = targets[int(0.1 * len(targets) + 1e-9)]
    figure = content["systems"]["a"]["figures"]["FAR@TAR=0.9"]
    assert (figure["kind"], figure["parameter"]) == ("far_at_tar", 0.9)
    assert figure["value"] == (impostors >= threshold).mean()
    assert figure["low"] < figure["value"] < figure["high"]
    assert figure["mark"] in ("indicative", "measured")
    assert "far_at_tar" in {d["kind"] for d in content["differences"][0]["figures"]}
    assert "FAR@TAR=0.9" in capsys.readouterr().out
    assert "FAR@TAR=0.9" in (tmp_path / "out" / "report.html").read_text()
