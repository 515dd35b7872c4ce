"""What the statistics of training say against a loss's settings, and which would be better."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from speechbrain_qmargin.loss.base import Loss
from speechbrain_qmargin.loss.functional import margin_for
from speechbrain_qmargin.loss.parameters import ClassStatistics, suggest_parameters

__all__ = ["ASLEEP", "EARLY", "LATE", "Progress", "advice"]

ASLEEP, EARLY = 0.9, 0.5  # that share of the samples at zero loss, within that part of training
LATE = 1 / 3  # by when a loss is below that of an encoder that tells nobody apart
_AWAKE = 0.9  # the hard margin of large-margin fine-tuning


@dataclass(frozen=True)
class Progress:
    """An epoch of a training.

    Attributes
    ----------
    zero_loss : float
        Mean share of samples at zero loss, of :class:`~speechbrain_qmargin.QMarginStats`.
    done : float
        Epochs trained over all epochs, in (0, 1].
    num_classes, embedding_dim : int
    samples : int or None
        Training samples over all epochs.
    mean_loss : float or None
        Of the epoch.

    Examples
    --------
    >>> from speechbrain_qmargin import QMarginLoss
    >>> halfway = Progress(zero_loss=0.3, done=0.5, num_classes=5994, embedding_dim=192)
    >>> advice(QMarginLoss(), halfway) is None      # three in ten rest: nothing is wrong
    True
    """

    zero_loss: float
    done: float
    num_classes: int
    embedding_dim: int
    samples: int | None = None
    mean_loss: float | None = None


def advice(loss: Loss, epoch: Progress) -> str | None:
    """One sentence on settings that are asleep, out of reach or lost, and what to change; or None.

    Asleep: nine samples in ten rest before the training is half over, and what follows is learnt
    from the tenth. Out of reach: no sample rested, and the hard margin with the largest wrong
    cosine of evenly spread classes asks for more than a target's cosine of 1. Lost: a third of the
    training has not brought a sparse loss below what it is where all cosines are equal.

    Parameters
    ----------
    loss : Loss
        At its full settings: an epoch on the way to them says nothing.
    epoch : Progress

    Examples
    --------
    >>> from speechbrain_qmargin import QMarginLoss
    >>> print(advice(QMarginLoss(2.0, 5.0, 0.0), Progress(0.95, 0.2, 30, 192)))
    asleep: 95 % of the samples are at zero loss with 20 % of the training done, and only the \
others train. The hard margin is 0.2 in cosine; try --loss qmargin --alpha 1.5 --scale 10 \
--margin 0.2 (0.54)
    """
    lead = loss.resting_lead()
    size = {"embedding_dim": epoch.embedding_dim, "samples": epoch.samples or None}
    if epoch.zero_loss >= ASLEEP and epoch.done <= EARLY:
        text = (
            f"asleep: {100 * epoch.zero_loss:.0f} % of the samples are at zero loss with "
            f"{100 * epoch.done:.0f} % of the training done, and only the others train. "
        )
        if lead is None:
            return text + "Try a larger margin, or a cross-entropy: --loss arcface"
        text += f"The hard margin is {lead:.2g} in cosine; try "
        found = suggest_parameters(epoch.num_classes, **size)
        if lead < 0.95 * found.hard_margin:
            return text + _flags(found.alpha, found.scale, found.margin, found.hard_margin)
        if "alpha" in loss.settings and lead < 0.95 * _AWAKE:
            alpha, scale = loss.value("alpha"), loss.value("scale")
            margin = margin_for(alpha, scale, _AWAKE)
            return text + _flags(alpha, scale, margin, _AWAKE) + ", or --loss arcface"
        return text + "fewer epochs, or --loss arcface"
    if lead is not None and epoch.zero_loss == 0:
        nearest = ClassStatistics.trained(epoch.num_classes, epoch.embedding_dim, 1.0)
        largest = nearest.largest(epoch.num_classes)
        if lead + largest > 1:
            found = suggest_parameters(epoch.num_classes, **size)
            text = (
                f"out of reach: no sample can be at zero loss, for the hard margin of {lead:.3g} "
                f"in cosine and wrong cosines of {largest:.2f} ask for a target's cosine of "
                f"{lead + largest:.3g}; "
            )
            if found.resting_cosine > 1:
                return text + (
                    f"no margin is within reach with {epoch.num_classes} classes in "
                    f"{epoch.embedding_dim} dimensions at --alpha {found.alpha:g} --scale "
                    f"{found.scale:g}: {found.remedy}"
                )
            return text + "try " + _flags(found.alpha, found.scale, found.margin, found.hard_margin)
    level = _level(loss, epoch.num_classes)
    if level and epoch.mean_loss is not None and epoch.mean_loss > level and epoch.done >= LATE:
        return (
            f"lost: its mean, {epoch.mean_loss:.3g}, is above the {level:.3g} of an encoder that "
            f"tells nobody apart, with {100 * epoch.done:.0f} % of the training done. Where all "
            "embeddings point one way a sparse posterior may move that way about; try "
            "--embedding_norm True (resnet, eres2net, xvector), or --loss arcface"
        )
    return None


def _level(loss: Loss, num_classes: int) -> float | None:
    """The loss at equal cosines, where the posterior is sparse and cosines alone tell."""
    needs_more = loss.needs_embeddings or type(loss).needs_counts
    if "alpha" not in loss.settings or loss.value("alpha") <= 1 or needs_more:
        return None
    cosines = torch.zeros(1, num_classes, dtype=torch.float64)
    try:  # of a copy: nothing is drawn from it, and no state of it moves
        return float(copy.deepcopy(loss).cpu().eval()(cosines, torch.tensor([0])))
    except (TypeError, ValueError, RuntimeError):  # of one's own, which looks at something else
        return None


def _flags(alpha: float, scale: float, margin: float, lead: float) -> str:
    return f"--loss qmargin --alpha {alpha:g} --scale {scale:g} --margin {margin:.3g} ({lead:.2g})"
