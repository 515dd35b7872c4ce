"""An exact classification head for millions of identities.

``search`` finds the support, ``dense`` does without, ``step`` is forward and backward,
``classifier`` the module, ``optim`` the update of the rows that have a gradient, ``shards`` a
checkpoint for any number of processes.
"""

from speechbrain_qmargin.head.classifier import HeadOutput, QMarginHead
from speechbrain_qmargin.head.optim import RowSparseAdam, RowSparseSGD

__all__ = ["HeadOutput", "QMarginHead", "RowSparseAdam", "RowSparseSGD"]
