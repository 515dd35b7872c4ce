"""An exact classification head for millions of identities.

``search`` finds the support, ``dense`` does without, ``step`` is forward and backward, ``binary``
that of losses which decide about each class on its own, ``classifier`` the module, ``partial`` one
that samples classes instead, ``optim`` the update of the rows that have a gradient, ``shards`` a
checkpoint for any number of processes.

On a GPU the step is that of ``fused``, in shards that of ``fused_shards``, and the search that of
``kernel_search``; their kernels are in ``kernels``, ``solve_kernels`` and ``row_kernels``. All look
at classes through ``prototypes``, in pieces of ``sizes`` and with the ``precision`` in force;
``refusals`` says what cannot be done with rows.
"""

from speechbrain_qmargin.head.classifier import HeadOutput, QMarginHead
from speechbrain_qmargin.head.optim import RowSparseAdam, RowSparseSGD
from speechbrain_qmargin.head.partial import PartialHead

__all__ = ["HeadOutput", "PartialHead", "QMarginHead", "RowSparseAdam", "RowSparseSGD"]
