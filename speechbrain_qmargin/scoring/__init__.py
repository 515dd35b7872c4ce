"""Trials to scores to report.

Scores: ``lists`` takes embeddings and trial lists to scores of every treatment (``normalisation``,
``plda``) and writes them (``score_files``); ``pairing`` makes the pairs where there is no list.
``calibration`` and ``fusion`` are fitted on development trials, which ``separation`` keeps apart
from the test.

Figures: ``metrics`` has the error rates, ``figures`` those of a report, ``uncertainty`` their
intervals over speakers (by ``influence``; ``shares`` for groups and probes). ``decision`` chooses a
threshold, ``bayes`` asks what decisions cost over all priors, ``breakdown`` gives rates by groups,
``identification`` ranks and watch lists, ``worst`` the trials that go wrong most.

Report: ``report`` is the table of a system and the difference of two, ``html`` the page (its text
from ``page``), ``plots`` the pictures.
"""
