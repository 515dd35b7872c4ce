"""One module per format; see :mod:`speechbrain_qmargin.published`."""
