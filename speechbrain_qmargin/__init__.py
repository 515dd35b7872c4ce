"""Q-Margin for SpeechBrain: a sparse alpha-divergence margin loss for biometric verification.

The names below are loaded when they are first used: the losses and the head cost the import of
torch and nothing else, scoring that of numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speechbrain_qmargin.head import QMarginHead as QMarginHead
    from speechbrain_qmargin.head import RowSparseSGD as RowSparseSGD
    from speechbrain_qmargin.loss.a3m import A3MLoss as A3MLoss
    from speechbrain_qmargin.loss.adaface import AdaFaceLoss as AdaFaceLoss
    from speechbrain_qmargin.loss.adaptive import ElasticQMarginLoss as ElasticQMarginLoss
    from speechbrain_qmargin.loss.adaptive import MagnitudeQMarginLoss as MagnitudeQMarginLoss
    from speechbrain_qmargin.loss.adaptive import NormQMarginLoss as NormQMarginLoss
    from speechbrain_qmargin.loss.angular_sparsemax import (
        AngularSparsemaxLoss as AngularSparsemaxLoss,
    )
    from speechbrain_qmargin.loss.arcface import ArcFaceLoss as ArcFaceLoss
    from speechbrain_qmargin.loss.auto import QMarginAutoLoss as QMarginAutoLoss
    from speechbrain_qmargin.loss.base import Loss as Loss
    from speechbrain_qmargin.loss.combined import CombinedMarginLoss as CombinedMarginLoss
    from speechbrain_qmargin.loss.cosface import CosFaceLoss as CosFaceLoss
    from speechbrain_qmargin.loss.curricularface import CurricularFaceLoss as CurricularFaceLoss
    from speechbrain_qmargin.loss.elasticface import ElasticFaceLoss as ElasticFaceLoss
    from speechbrain_qmargin.loss.entmax import EntmaxLoss as EntmaxLoss
    from speechbrain_qmargin.loss.entmax import SparsemaxLoss as SparsemaxLoss
    from speechbrain_qmargin.loss.f_operators import f_softargmax as f_softargmax
    from speechbrain_qmargin.loss.fdivergence import FDivergenceLoss as FDivergenceLoss
    from speechbrain_qmargin.loss.functional import alpha_softargmax as alpha_softargmax
    from speechbrain_qmargin.loss.functional import alpha_softmax_value as alpha_softmax_value
    from speechbrain_qmargin.loss.functional import hard_margin as hard_margin
    from speechbrain_qmargin.loss.functional import margin_for as margin_for
    from speechbrain_qmargin.loss.functional import q_margin_loss as q_margin_loss
    from speechbrain_qmargin.loss.functional import solve_tau as solve_tau
    from speechbrain_qmargin.loss.interface import BinaryObjective as BinaryObjective
    from speechbrain_qmargin.loss.interface import Objective as Objective
    from speechbrain_qmargin.loss.interface import QMarginStats as QMarginStats
    from speechbrain_qmargin.loss.interface import Scores as Scores
    from speechbrain_qmargin.loss.intertopk import InterTopKLoss as InterTopKLoss
    from speechbrain_qmargin.loss.kappaface import KappaFaceLoss as KappaFaceLoss
    from speechbrain_qmargin.loss.magface import MagFaceLoss as MagFaceLoss
    from speechbrain_qmargin.loss.parameters import suggest_parameters as suggest_parameters
    from speechbrain_qmargin.loss.prior import PriorQMarginLoss as PriorQMarginLoss
    from speechbrain_qmargin.loss.qmargin import QMarginFaceLoss as QMarginFaceLoss
    from speechbrain_qmargin.loss.qmargin import QMarginLoss as QMarginLoss
    from speechbrain_qmargin.loss.registry import LOSSES as LOSSES
    from speechbrain_qmargin.loss.registry import make_loss as make_loss
    from speechbrain_qmargin.loss.sphereface2 import SphereFace2Loss as SphereFace2Loss
    from speechbrain_qmargin.loss.uniface import UniFaceLoss as UniFaceLoss

__version__ = "0.1.0"

_NAMES = {
    "head": ("QMarginHead", "RowSparseSGD"),
    "loss.a3m": ("A3MLoss",),
    "loss.adaface": ("AdaFaceLoss",),
    "loss.adaptive": ("ElasticQMarginLoss", "MagnitudeQMarginLoss", "NormQMarginLoss"),
    "loss.angular_sparsemax": ("AngularSparsemaxLoss",),
    "loss.arcface": ("ArcFaceLoss",),
    "loss.auto": ("QMarginAutoLoss",),
    "loss.base": ("Loss",),
    "loss.combined": ("CombinedMarginLoss",),
    "loss.cosface": ("CosFaceLoss",),
    "loss.curricularface": ("CurricularFaceLoss",),
    "loss.elasticface": ("ElasticFaceLoss",),
    "loss.entmax": ("EntmaxLoss", "SparsemaxLoss"),
    "loss.fdivergence": ("FDivergenceLoss",),
    "loss.functional": (
        "alpha_softargmax",
        "alpha_softmax_value",
        "hard_margin",
        "margin_for",
        "q_margin_loss",
        "solve_tau",
    ),
    "loss.f_operators": ("f_softargmax",),
    "loss.intertopk": ("InterTopKLoss",),
    "loss.interface": ("BinaryObjective", "Objective", "QMarginStats", "Scores"),
    "loss.kappaface": ("KappaFaceLoss",),
    "loss.magface": ("MagFaceLoss",),
    "loss.parameters": ("suggest_parameters",),
    "loss.prior": ("PriorQMarginLoss",),
    "loss.qmargin": ("QMarginFaceLoss", "QMarginLoss"),
    "loss.registry": ("LOSSES", "make_loss"),
    "loss.sphereface2": ("SphereFace2Loss",),
    "loss.uniface": ("UniFaceLoss",),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "LOSSES",
    "A3MLoss",
    "AdaFaceLoss",
    "AngularSparsemaxLoss",
    "ArcFaceLoss",
    "BinaryObjective",
    "CombinedMarginLoss",
    "CosFaceLoss",
    "CurricularFaceLoss",
    "ElasticFaceLoss",
    "ElasticQMarginLoss",
    "EntmaxLoss",
    "FDivergenceLoss",
    "InterTopKLoss",
    "KappaFaceLoss",
    "Loss",
    "MagFaceLoss",
    "MagnitudeQMarginLoss",
    "NormQMarginLoss",
    "Objective",
    "PriorQMarginLoss",
    "QMarginAutoLoss",
    "QMarginFaceLoss",
    "QMarginHead",
    "QMarginLoss",
    "QMarginStats",
    "RowSparseSGD",
    "Scores",
    "SparsemaxLoss",
    "SphereFace2Loss",
    "UniFaceLoss",
    "alpha_softargmax",
    "alpha_softmax_value",
    "f_softargmax",
    "hard_margin",
    "make_loss",
    "margin_for",
    "q_margin_loss",
    "solve_tau",
    "suggest_parameters",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
