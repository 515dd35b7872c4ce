"""The least that an optimiser of rows wants of a head."""

from torch import nn


class Rows:
    """What an optimiser of rows asks of a head, around a parameter."""

    def __init__(self, weight: nn.Parameter):
        self.weight, self.optimizer = weight, None

    def bind(self, optimizer):
        self.optimizer = optimizer

    def is_bound_to(self, optimizer):
        return self.optimizer is optimizer

    def in_order(self, rows):
        return False

    def derived_by_kernel(self, before):
        return None

    def rows_changed(self, rows, before, *, derived=False):
        pass
