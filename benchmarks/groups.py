"""Whether the intervals of rates by group hold, for few speakers and many.

    python benchmarks/groups.py

Gaussian scores with known truth: all pairs of four recordings per speaker, an effect of the speaker
on both sides, one threshold; 200 lists per row.
"""

import numpy as np
from scipy.stats import norm

from speechbrain_qmargin.scoring.breakdown import breakdown
from speechbrain_qmargin.trials import LabelledTrials

THRESHOLD, DISTANCE, LISTS = 1.0, 2.0, 200


def scored(seed: int, speakers: int, effect: float) -> tuple[np.ndarray, LabelledTrials]:
    rng = np.random.default_rng(seed)
    of = np.repeat(np.arange(speakers), 4)
    left, right = np.triu_indices(len(of), 1)
    same = of[left] == of[right]
    person = effect * rng.normal(size=speakers)
    scores = person[of[left]] + person[of[right]] + rng.normal(size=len(left)) + DISTANCE * same
    ids = [f"s{speaker}/{take}" for take, speaker in enumerate(of)]
    return scores, LabelledTrials(ids, left, right, same)


def main() -> None:
    print("| speakers | effect | FMR covered | FNMR covered |\n|---|---|---|---|")
    for speakers in (4, 8, 16, 40):
        for effect in (0.0, 0.3, 0.6):
            truth = {
                "fmr": norm.sf(THRESHOLD, scale=np.sqrt(1 + 2 * effect**2)),
                "fnmr": norm.cdf(THRESHOLD - DISTANCE, scale=np.sqrt(1 + 4 * effect**2)),
            }
            held = dict.fromkeys(truth, 0)
            for seed in range(LISTS):
                scores, trials = scored(seed, speakers, effect)
                found = breakdown(scores, trials, THRESHOLD, dict.fromkeys(trials.ids, "all"))
                for name, true in truth.items():
                    share = getattr(found.groups[0], name)
                    held[name] += share.low <= true <= share.high
            cells = " | ".join(f"{100 * count / LISTS:.1f} %" for count in held.values())
            print(f"| {speakers} | {effect} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
