"""An exact classification head for millions of identities.

``search`` finds the support, ``classifier`` is the module and its gradients.
"""

from speechbrain_qmargin.head.classifier import HeadOutput, QMarginHead

__all__ = ["HeadOutput", "QMarginHead"]
