"""An exact classification head for millions of identities.

``search`` finds the support, ``classifier`` is the module and its gradients, ``optim`` the update
of the rows that have one.
"""

from speechbrain_qmargin.head.classifier import HeadOutput, QMarginHead
from speechbrain_qmargin.head.optim import RowSparseSGD

__all__ = ["HeadOutput", "QMarginHead", "RowSparseSGD"]
