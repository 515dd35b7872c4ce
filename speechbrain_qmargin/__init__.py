"""Q-Margin for SpeechBrain: a sparse alpha-divergence margin loss for biometric verification.

Importing the package imports torch and nothing else; recipes, data and scoring live in submodules.
"""

from speechbrain_qmargin.loss.functional import (
    QMarginStats,
    alpha_softargmax,
    alpha_softmax_value,
    hard_margin,
    margin_for,
    q_margin_loss,
    solve_tau,
)
from speechbrain_qmargin.loss.registry import (
    LOSSES,
    CosFaceLoss,
    EntmaxLoss,
    QMarginFaceLoss,
    QMarginLoss,
    SparsemaxLoss,
    make_loss,
)

__version__ = "0.1.0"

__all__ = [
    "LOSSES",
    "CosFaceLoss",
    "EntmaxLoss",
    "QMarginFaceLoss",
    "QMarginLoss",
    "QMarginStats",
    "SparsemaxLoss",
    "alpha_softargmax",
    "alpha_softmax_value",
    "hard_margin",
    "make_loss",
    "margin_for",
    "q_margin_loss",
    "solve_tau",
]
