"""The least that an optimiser of rows wants of a head."""


class Rows:
    """What an optimiser of rows asks of a head, around a parameter."""

    def __init__(self, weight):
        self.weight, self.optimizer = weight, None
        self.shard = 0, len(weight), len(weight)

    def bind(self, optimizer):
        self.optimizer = optimizer

    def is_bound_to(self, optimizer):
        return self.optimizer is optimizer

    def in_order(self, rows):
        return False

    def rows_changed(self, rows, before):
        pass
