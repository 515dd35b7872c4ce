"""Losses on cosines, and how they are solved.

A loss is one module: ``qmargin``, ``arcface``, ``adaface`` and so on, each a subclass of ``base``;
``registry`` knows them by name. ``interface`` is what losses and classifiers say to each other:
a classifier shows its scores (``dense``: all cosines of a batch; :mod:`speechbrain_qmargin.head`:
no more than it needs), and a loss answers with an objective, or with one that decides on each class
alone (``binary``).

``functional`` has the operators and the loss as functions of tensors, ``solver`` the normaliser
tau that all of them need, ``kernels`` the same in Triton. ``f_operators``, ``generators`` and
``fdivergence`` are for other divergences. ``parameters`` suggests alpha, scale and margin, and
``diagnosis`` says what training tells about them.
"""
