"""Trials: their objects, their lists in every published form, and the ids in them."""

from speechbrain_qmargin.trials.ids import match_ids, speaker_in
from speechbrain_qmargin.trials.lists import read_trials, read_unlabelled, trials_text, write_trials
from speechbrain_qmargin.trials.pairs import Distinct, LabelledTrials, Lost, Trials, index_pairs

__all__ = [
    "Distinct",
    "LabelledTrials",
    "Lost",
    "Trials",
    "index_pairs",
    "match_ids",
    "read_trials",
    "read_unlabelled",
    "speaker_in",
    "trials_text",
    "write_trials",
]
