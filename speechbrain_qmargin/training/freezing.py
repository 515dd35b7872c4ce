"""Layers of an encoder that do not learn, for some epochs or throughout."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["Freezing", "layers_until"]

ALL = "all"


def layers_until(encoder: nn.Module, layer: str) -> list[nn.Module]:
    """The modules of an encoder up to a layer and with it, in the order of their definition.

    Parameters
    ----------
    encoder : Module
        Its parts are defined in the order in which they are called.
    layer : str
        A name, dotted if it lies deeper, such as ``layer3`` or ``blocks.2``; ``all``.

    Raises
    ------
    ValueError
        No such layer; the names that there are.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    >>> layers_until(net, "1")
    [Linear(...), Linear(...)]
    >>> layers_until(net, "conv")
    Traceback (most recent call last):
    ValueError: freeze: the encoder has no layer conv; it has 0, 1, 2, or all
    """
    names = [name for name, _ in encoder.named_modules()]
    modules = [module for _, module in encoder.named_modules()]
    inside = [n for n, name in enumerate(names) if name == layer or name.startswith(f"{layer}.")]
    if layer == ALL:
        inside = [len(names) - 1]
    if not inside:
        children = ", ".join(name for name, _ in encoder.named_children())
        raise ValueError(f"freeze: the encoder has no layer {layer}; it has {children}, or {ALL}")
    kept = modules[: inside[-1] + 1]
    # what lies around other modules is not before the layer, but for its own parameters with `all`
    return [one for one in kept if layer == ALL or not any(True for _ in one.children())]


class Freezing:
    """What of an encoder is frozen: its parameters get no gradient, its statistics stay.

    Parameters
    ----------
    encoder : Module
    layer : str or None
        As in :func:`layers_until`; None freezes nothing, or everything where `epochs` is given.
    epochs : int or None
        How many of the first epochs; None: throughout.

    Raises
    ------
    ValueError
        No such layer; `epochs` below 1 or not whole.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> freezing = Freezing(net, "0", epochs=1)
    >>> print(freezing)
    6 parameters of the encoder are frozen for 1 epoch
    >>> freezing.begin(1)
    >>> net[0].weight.requires_grad, net[1].weight.requires_grad
    (False, True)
    >>> freezing.begin(2)
    >>> net[0].weight.requires_grad
    True
    """

    def __init__(self, encoder: nn.Module, layer: str | None, epochs: int | None) -> None:
        if epochs is not None and (not isinstance(epochs, int) or epochs < 1):
            raise ValueError(f"freeze_epochs: {epochs}; 1 or more, or null for all of them")
        if layer is None and epochs is not None:
            layer = ALL
        self.layer, self.epochs = layer, epochs
        self.modules = [] if layer is None else layers_until(encoder, layer)
        # some never learn, whoever is frozen: the weight of IResNet's last normalisation
        self.parameters = [
            parameter
            for module in self.modules
            for parameter in module.parameters(recurse=False)
            if parameter.requires_grad
        ]
        self.now, self.by_gradient = False, False

    @classmethod
    def of(cls, encoder: nn.Module, hparams: Any) -> Freezing:
        """As the settings ``freeze`` and ``freeze_epochs`` say."""
        layer, epochs = (getattr(hparams, key, None) for key in ("freeze", "freeze_epochs"))
        return cls(encoder, layer, epochs)

    def begin(self, epoch: int, processes: int = 1) -> None:
        """Freeze or thaw for an epoch, counted from 1.

        Over several processes what will learn later has gradients from the start, which are
        dropped: DistributedDataParallel asks only once which there are.
        """
        self.now = bool(self.modules) and (self.epochs is None or epoch <= self.epochs)
        self.by_gradient = processes > 1 and self.epochs is not None
        for parameter in self.parameters:
            parameter.requires_grad_(self.by_gradient or not self.now)

    def follow(self, encoder: nn.Module) -> None:
        """Take the modules of a copy with the same parameters: what wraps them may replace some."""
        if self.modules:
            self.modules = layers_until(encoder, self.layer or ALL)

    def hold(self) -> None:
        """Keep frozen modules in evaluation mode: their statistics do not follow the batches."""
        if self.now:
            for module in self.modules:
                module.training = False

    def drop_gradients(self) -> None:
        """Let no optimiser see a gradient of what is frozen."""
        if self.now and self.by_gradient:
            for parameter in self.parameters:
                parameter.grad = None

    def __str__(self) -> str:
        """For the log; empty where nothing is frozen."""
        if not self.modules:
            return ""
        count = sum(parameter.numel() for parameter in self.parameters)
        until = {None: "throughout", 1: "for 1 epoch"}.get(self.epochs, f"for {self.epochs} epochs")
        return f"{count:,} parameters of the encoder are frozen {until}"
