"""The losses by name."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Mapping
from typing import Any

from speechbrain_qmargin.loss.a3m import A3MLoss
from speechbrain_qmargin.loss.adaface import AdaFaceLoss
from speechbrain_qmargin.loss.adaptive import (
    ElasticQMarginLoss,
    MagnitudeQMarginLoss,
    NormQMarginLoss,
)
from speechbrain_qmargin.loss.angular_sparsemax import AngularSparsemaxLoss
from speechbrain_qmargin.loss.arcface import ArcFaceLoss
from speechbrain_qmargin.loss.auto import QMarginAutoLoss
from speechbrain_qmargin.loss.base import Loss
from speechbrain_qmargin.loss.combined import CombinedMarginLoss
from speechbrain_qmargin.loss.cosface import CosFaceLoss
from speechbrain_qmargin.loss.curricularface import CurricularFaceLoss
from speechbrain_qmargin.loss.elasticface import ElasticFaceLoss
from speechbrain_qmargin.loss.entmax import EntmaxLoss, SparsemaxLoss
from speechbrain_qmargin.loss.fdivergence import FDivergenceLoss
from speechbrain_qmargin.loss.intertopk import InterTopKLoss
from speechbrain_qmargin.loss.kappaface import KappaFaceLoss
from speechbrain_qmargin.loss.magface import MagFaceLoss
from speechbrain_qmargin.loss.prior import PriorQMarginLoss
from speechbrain_qmargin.loss.qmargin import QMarginFaceLoss, QMarginLoss
from speechbrain_qmargin.loss.sphereface2 import SphereFace2Loss
from speechbrain_qmargin.loss.uniface import UniFaceLoss

__all__ = ["LOSSES", "loss_class", "make_loss"]

logger = logging.getLogger(__name__)

#: The losses by the names that ``--loss`` and :func:`make_loss` take.
LOSSES: dict[str, type[Loss]] = {
    "qmargin": QMarginLoss,
    "qmargin_face": QMarginFaceLoss,
    "qmargin_auto": QMarginAutoLoss,
    "cosface": CosFaceLoss,
    "qmargin_f": FDivergenceLoss,
    "a3m": A3MLoss,
    "entmax": EntmaxLoss,
    "sparsemax": SparsemaxLoss,
    "qmargin_norm": NormQMarginLoss,
    "qmargin_magnitude": MagnitudeQMarginLoss,
    "qmargin_elastic": ElasticQMarginLoss,
    "qmargin_prior": PriorQMarginLoss,
    "angular_sparsemax": AngularSparsemaxLoss,
    "arcface": ArcFaceLoss,
    "combined": CombinedMarginLoss,
    "adaface": AdaFaceLoss,
    "magface": MagFaceLoss,
    "elasticface": ElasticFaceLoss,
    "curricularface": CurricularFaceLoss,
    "kappaface": KappaFaceLoss,
    "intertopk": InterTopKLoss,
    "sphereface2": SphereFace2Loss,
    "uniface": UniFaceLoss,
}
# What is known as a loss and is the classifier's part, for any loss
_ELSEWHERE = dict.fromkeys(
    ("subcenter", "subcentre", "subcenter_arcface"),
    "the classifier's: give --subcentres 3 with any loss, as --loss arcface",
) | {"partial_fc": "a head: give --head partial --class_sample_rate 0.1 with any loss"}


def loss_class(name: str) -> type[Loss]:
    """The class of a loss: a key of :data:`LOSSES`, or one's own as ``module:Class``.

    Raises
    ------
    ValueError
        An unknown name, or a module or class that is not there.

    Examples
    --------
    >>> loss_class("speechbrain_qmargin:QMarginLoss") is loss_class("qmargin")
    True
    """
    if not isinstance(name, str):
        raise ValueError(f"loss: {name!r} is no name, such as qmargin or module:Class of your own")
    module, _, attribute = name.rpartition(":" if ":" in name else ".")
    if not module:
        if name in _ELSEWHERE:
            raise ValueError(f"loss: {name!r} is {_ELSEWHERE[name]}")
        if name not in LOSSES:
            known = ", ".join(sorted(LOSSES))
            raise ValueError(
                f"loss: unknown name {name!r}; choose one of {known}, or module:Class of your own"
            )
        return LOSSES[name]
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"loss: {name!r}: {error}. The module must be importable: put its folder on PYTHONPATH"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Loss)):
        raise ValueError(f"loss: {name!r} is not a subclass of speechbrain_qmargin.Loss")
    return found


def make_loss(
    name: str,
    alpha: float | None = None,
    scale: float | None = None,
    margin: float | str | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    num_classes: int | None = None,
    embedding_dim: int | None = None,
    samples: int | None = None,
) -> Loss:
    """A loss by name.

    Parameters
    ----------
    name : str
        A key of :data:`LOSSES`, or a class of your own as ``my_module:MyLoss``.
    alpha, scale, margin : float, optional
        None: the loss's own default. A margin of ``"large"`` is for fine-tuning: 0.5, as in
        WeSpeaker, for ArcFace, CosFace and others; for Q-Margin the one whose hard margin is 0.9 in
        cosine; 0 for ``entmax`` and ``sparsemax``; see each loss's ``large_margin``.
    options : mapping, optional
        Further arguments of the loss.
    num_classes, embedding_dim, samples : int, optional
        The classifier's classes, the embeddings' size, and the training samples over all epochs (0:
        not known), for losses that choose their settings by them, as ``qmargin_auto`` does.

    Raises
    ------
    ValueError
        An unknown name, a value that the loss does not take, or one that would make it another
        loss than its name says.

    Examples
    --------
    >>> make_loss("qmargin", alpha=1.75, scale=5)
    QMarginLoss(alpha=1.75, scale=5.0, margin=0.2, hard_margin_cos=0.565)
    >>> make_loss("qmargin", margin="large")
    QMarginLoss(alpha=1.5, scale=10.0, margin=0.301, hard_margin_cos=0.9)
    """
    cls, options = loss_class(name), options or {}
    given: dict[str, Any] = {"alpha": alpha, "scale": scale, "margin": margin}
    given = {key: value for key, value in given.items() if value is not None}
    for key, value in given.items():
        if key not in cls.settings:
            raise ValueError(f"loss: {name} has no {key}; leave it out, or give --{key} null")
        if key in options and options[key] != value:
            raise ValueError(
                f"{key}: {value} and, in the loss's options, {options[key]}; leave one out"
            )
        if isinstance(value, str) and (key, value) != ("margin", "large"):
            raise ValueError(f"{key}: {value!r}; give a number{' or large' * (key == 'margin')}")
        if not isinstance(value, str) and key in cls.fixed and cls.fixed[key] != value:
            raise ValueError(
                f"loss: {name} is {key} = {cls.fixed[key]:g}, got {value}; use qmargin for others"
            )
    if cls.sized_by_task:
        if not num_classes and "num_classes" not in options:
            raise ValueError(
                f"loss: {name} wants num_classes, which the recipes know once the data are read"
            )
        known = {"num_classes": num_classes, "embedding_dim": embedding_dim, "samples": samples}
        given |= {key: value for key, value in known.items() if value}
    takes = inspect.signature(cls).parameters
    if not any(one.kind is one.VAR_KEYWORD for one in takes.values()):  # of a loss of one's own
        for key in options:
            if key not in takes:
                raise ValueError(f"loss: {name} takes no {key}; it takes {', '.join(takes)}")
    given |= options
    try:
        if given.get("margin") == "large":
            del given["margin"]
            given["margin"] = cls(**given).large_margin()
        loss = cls(**given)
    except TypeError as error:
        raise ValueError(f"loss: {name}: {error}") from error
    warning = loss.warning()
    if warning:
        logger.warning(warning)
    return loss
