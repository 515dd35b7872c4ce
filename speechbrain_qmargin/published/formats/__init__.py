"""One module a format; see :mod:`speechbrain_qmargin.published`."""
