"""The base class of the losses.

A loss of one's own is one class in one file::

    class MyLoss(Loss):
        settings = ("scale", "margin")

        def __init__(self, scale: float = 32.0, margin: float = 0.2) -> None:
            super().__init__(scale=scale, margin=margin)

        def objective(self, scores, targets):
            return Objective(scale=self.scale, move_target=lambda cosine: cosine - self.margin)

It trains with ``--loss my_module:MyLoss`` in the recipes, as ``!new:my_module.MyLoss`` in any YAML,
on the dense and on the sparse head. A cross-entropy says how cosines move; a Fenchel-Young loss
gives alpha and log q; one that decides about each class on its own gives a ``BinaryObjective``;
what is none of these overrides :meth:`Loss.rows` and asks for all cosines.

What a loss learns is an ``nn.Parameter`` of it, what it keeps a buffer, both made in ``__init__``.
The recipes train the first with the encoder, the same in all processes, and save both with a
checkpoint; ``.half()`` and ``.bfloat16()`` leave buffers as they are. A buffer that follows the
batches is of one process's samples, unless the loss gathers those of all
(:class:`~speechbrain_qmargin.communicator.Communicator`). In a recipe of SpeechBrain's, list such
a loss in ``modules`` and in the checkpointer's ``recoverables``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from speechbrain_qmargin.loss.dense import scores_of
from speechbrain_qmargin.loss.interface import (
    BinaryObjective,
    Objective,
    QMarginStats,
    Rows,
    Scores,
    check_found,
    flat,
)

__all__ = ["Loss", "value_of"]


class Loss(nn.Module):
    """Base class of the losses, called as SpeechBrain calls ``compute_cost``.

    A subclass names its numbers in `settings`, passes them to ``super().__init__`` by name, and
    defines :meth:`objective`. The settings are attributes; :meth:`set` changes them between steps.

    Attributes
    ----------
    settings : tuple of str
        Names of the numbers that a user may give and a schedule may change. Alpha, scale and margin
        must be called just that.
    options : tuple of str
        Further constructor arguments that change the loss; its text shows those that are not at
        their defaults.
    fixed : dict
        Settings whose value makes it the loss of its name, such as alpha = 1 for CosFace.
    needs_embeddings : bool
        Whether it looks at embeddings, which the dense classifier of an unmodified SpeechBrain
        recipe does not pass on.
    needs_counts : bool
        Whether :meth:`count_classes` must be called before training, as the recipes do. A loss that
        is given the counts sets it to False: they are its user's, and stay.
    sized_by_task : bool
        Whether its constructor takes `num_classes`, `embedding_dim` and `samples` (training samples
        over all epochs, or None), which the recipes know and
        :func:`~speechbrain_qmargin.make_loss` passes on.

    Raises
    ------
    TypeError
        Values given to ``super().__init__`` that are not those of `settings`.
    ValueError
        A value outside its range.

    Examples
    --------
    >>> import torch
    >>> class Shifted(Loss):
    ...     def __init__(self, scale=10.0, margin=0.2):
    ...         super().__init__(scale=scale, margin=margin)
    ...
    ...     def objective(self, scores, targets):
    ...         return Objective(scale=self.scale, move_target=lambda cosine: cosine - self.margin)
    >>> loss = Shifted(scale=1.0, margin=0.5)
    >>> loss(torch.tensor([[1.0, 0.5]]), torch.tensor([0]))     # two equal logits: log 2
    tensor(0.6931)
    >>> loss.set(margin=0.0)
    >>> loss
    Shifted(scale=1, margin=0)
    """

    settings: ClassVar[tuple[str, ...]] = ("scale", "margin")
    options: ClassVar[tuple[str, ...]] = ()
    fixed: ClassVar[Mapping[str, float]] = {}
    needs_embeddings: ClassVar[bool] = False
    needs_counts: bool = False
    sized_by_task: ClassVar[bool] = False
    alpha: float  # where they are among the settings
    scale: float
    margin: float

    def __init__(self, **values: float) -> None:
        super().__init__()
        missing = set(self.settings) ^ set(values)
        if missing:
            raise TypeError(
                f"{type(self).__name__}: settings and the values given to Loss.__init__ differ by "
                f"{', '.join(sorted(missing))}"
            )
        self.set(**values)

    def check(self, **values: float) -> None:
        """Refuse finite values outside the family; called with all settings by name."""
        if "scale" in values and not values["scale"] > 0:
            raise ValueError(f"scale must be a finite number > 0, got {values['scale']}")
        if "margin" in values and not values["margin"] >= 0:
            raise ValueError(f"margin must be a finite number >= 0, got {values['margin']}")

    def set(self, **values: float) -> None:
        """Change settings, all or none of them.

        Raises
        ------
        ValueError
            A name the loss does not have, a value that is no number or outside its range, or one
            that would make it another loss than its name says.
        TypeError
            A tensor that requires a gradient: it would not be learnt.
        """
        name, numbers = type(self).__name__, {}
        for key, value in values.items():
            if isinstance(value, Tensor) and value.requires_grad:
                raise TypeError(f"{name}: {key} is a number; as a tensor it would not be learnt")
            if key not in self.settings:
                self.value(key)
            try:
                numbers[key] = number = float(value)
            except (TypeError, ValueError, RuntimeError):
                raise ValueError(f"{name}: {key} must be a number, got {value!r}") from None
            if not math.isfinite(number):
                raise ValueError(f"{name}: {key} must be a finite number, got {number}")
            if self.fixed.get(key, number) != number:
                raise ValueError(
                    f"{name} is {key} = {self.fixed[key]:g}, got {number:g}; use qmargin for others"
                )
        others = {key: getattr(self, key) for key in self.settings if key not in numbers}
        self.check(**others, **numbers)
        for key, number in numbers.items():
            setattr(self, key, number)

    def large_margin(self) -> float:
        """The margin of large-margin fine-tuning at the other settings: 0.5, as WeSpeaker."""
        return self.fixed.get("margin", 0.5)

    def warning(self) -> str | None:
        """What a user should know of these settings before training; None: nothing."""
        return None

    def count_classes(self, counts: Sequence[float] | Tensor, embedding_dim: int) -> None:
        """Hear, before training, how many items each class has, and the embeddings' size."""

    def resting_lead(self) -> float | None:
        """The lead in cosine at which a sample is at zero loss; None where there is none."""
        return None

    def describe(self) -> str:
        """What a log says of it before training."""
        return repr(self)

    def value(self, name: str) -> float:
        """A setting by name.

        Raises
        ------
        ValueError
            One that the loss does not have.
        """
        if name not in self.settings:
            raise ValueError(
                f"{type(self).__name__} has no {name}; it has {', '.join(self.settings)}"
            )
        return getattr(self, name)

    def values(self) -> dict[str, float]:
        """All settings by name."""
        return {name: getattr(self, name) for name in self.settings}

    def objective(self, scores: Scores, targets: Tensor) -> Objective | BinaryObjective:
        """What is to be evaluated for targets [B]."""
        raise NotImplementedError(f"{type(self).__name__} defines neither objective nor rows")

    def rows(self, scores: Scores, targets: Tensor, *, statistics: bool = False) -> Rows:
        """Losses of a batch; targets [B]."""
        return scores.evaluate(targets, self.objective(scores, targets), statistics=statistics)

    def checked_rows(self, scores: Scores, targets: Tensor, *, statistics: bool = False) -> Rows:
        """:meth:`rows`, whatever overrides it, for targets [B] or [B, 1].

        Raises
        ------
        TypeError, ValueError
            Labels that are none; what :meth:`rows` gave is no :class:`Rows` of these samples.
        """
        targets = flat(targets)
        rows = self.rows(scores, targets, statistics=statistics)
        return check_found(type(self).__name__, rows, targets)

    def forward(
        self, outputs: Tensor | Scores, targets: Tensor, length: Tensor | None = None
    ) -> Tensor:
        """Mean loss of a batch.

        Parameters
        ----------
        outputs : Tensor, [B, C] or [B, 1, C], or Scores
            Cosines, or the training output of a sparse head, which is evaluated without logits.
        targets : Tensor, [B] or [B, 1], integer
            Labels in [0, C).
        length : ignored
            SpeechBrain passes relative lengths to every loss; one embedding has none.

        Returns
        -------
        Tensor
            Scalar, float32 (float64 for float64 input).
        """
        return self.checked_rows(scores_of(outputs), targets).loss.mean()

    def with_stats(self, outputs: Tensor | Scores, targets: Tensor) -> tuple[Tensor, QMarginStats]:
        """:meth:`forward` and the batch's :class:`QMarginStats`."""
        rows = self.checked_rows(scores_of(outputs), targets, statistics=True)
        return rows.loss.mean(), self.statistics(rows)

    def statistics(self, rows: Rows) -> QMarginStats:
        """Of :meth:`rows` that were asked for their support."""
        return QMarginStats.of(rows, getattr(self, "alpha", 1.0))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Loss:
        """Buffers move with the module and keep their precision: in half a mean would not move."""
        buffers = {id(buffer) for buffer in self.buffers()}

        def apply(values: Tensor) -> Tensor:
            moved = fn(values)
            if id(values) in buffers and moved.dtype != values.dtype:
                return values.to(moved.device)
            return moved

        return super()._apply(apply, recurse)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        parts = [f"{name}={getattr(self, name):.4g}" for name in self.settings]
        defaults = inspect.signature(type(self)).parameters
        for name in self.options:
            value = getattr(self, name)
            if name not in defaults or value != defaults[name].default:
                parts.append(f"{name}={value}")
        return ", ".join(parts)


def value_of(loss: object, name: str) -> float:
    """A setting of a loss that a schedule is to change.

    Raises
    ------
    ValueError
        A setting that the loss does not have, or a loss that has none.

    Examples
    --------
    >>> from speechbrain_qmargin import QMarginLoss
    >>> value_of(QMarginLoss(margin=0.3), "margin")
    0.3
    >>> value_of(nn.CrossEntropyLoss(), "margin")
    Traceback (most recent call last):
    ValueError: loss_schedule: CrossEntropyLoss is not a speechbrain_qmargin.Loss, so its margin ...
    """
    kind = type(loss).__name__
    if isinstance(loss, Loss) and name in loss.settings:
        return loss.value(name)
    why = f"is not a speechbrain_qmargin.Loss, so its {name} cannot be changed in training"
    if isinstance(loss, Loss):
        why = f"has no {name} to change in training; it has {', '.join(loss.settings)}"
    remedy = {
        "margin": "--margin_from_epoch 0 --margin_until_epoch 0",
        "alpha": "--alpha_initial null",
        "scale": "--scale_initial null",
    }.get(name, f"a loss_schedule without {name}")
    raise ValueError(f"loss_schedule: {kind} {why}; give {remedy}")
