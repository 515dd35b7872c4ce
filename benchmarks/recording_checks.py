"""How often the checks before a decision refuse good files, and what is no speech and no face.

    python benchmarks/recording_checks.py FOLDER [FOLDER ...] [--faces]

Each folder's files are read and measured as `qmargin verify` does. Its files are taken to be good:
what is refused is refused falsely. Noises, hums and tones are made and taken to be bad.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np

from speechbrain_qmargin.data.audio import AUDIO_SUFFIXES, read_audio
from speechbrain_qmargin.data.images import IMAGE_SUFFIXES, read_pixels
from speechbrain_qmargin.scoring.uncertainty import rate_interval
from speechbrain_qmargin.verify.face_quality import FaceLimits, measure_face
from speechbrain_qmargin.verify.speech_quality import SpeechLimits, measure_speech

RATE = 16000


def noises(count: int) -> dict[str, list[np.ndarray]]:
    """What an encoder would give an embedding for all the same, 3 s each at several levels."""
    time, made = np.arange(3 * RATE) / RATE, {}

    def coloured(rng, slope):
        spectrum = np.fft.rfft(rng.standard_normal(len(time)))
        noise = np.fft.irfft(spectrum * np.maximum(np.arange(len(spectrum)), 1.0) ** -slope)
        return noise / noise.std()

    def gate(rng):
        return np.floor(time / rng.uniform(0.1, 0.6) + rng.uniform()) % 2 == 0

    def swell(rng):
        turns = rng.uniform(2, 8) * time + rng.uniform()
        return (0.5 + 0.5 * np.sin(2 * np.pi * turns)) ** 3

    def tone(rng):
        return np.sin(2 * np.pi * rng.uniform(60, 2000) * time)

    kinds = {
        "white noise": lambda rng: coloured(rng, 0.0),
        "pink noise": lambda rng: coloured(rng, 0.5),
        "brown noise": lambda rng: coloured(rng, 1.0),
        "noise that swells": lambda rng: coloured(rng, rng.uniform(0, 1)) * swell(rng),
        "noise on and off": lambda rng: coloured(rng, rng.uniform(0, 1)) * gate(rng),
        "tone": tone,
        "tone on and off": lambda rng: tone(rng) * gate(rng),
        "buzz on and off": lambda rng: np.sign(tone(rng)) * gate(rng),
    }
    for kind, make in kinds.items():
        made[kind] = []
        for number in range(count):
            rng = np.random.default_rng(number)
            floor = 10 ** rng.uniform(-4, -2.5) * rng.standard_normal(len(time))
            made[kind].append(10 ** rng.uniform(-1.7, -0.7) * make(rng) + floor)
    return made


def said(name: str, refused: Counter, total: int) -> None:
    count = sum(refused.values())
    low, high = (100 * x for x in rate_interval(count, total))
    why = ", ".join(f"{number} {word}" for word, number in refused.most_common())
    print(
        f"{name}: {count} of {total:,} refused, {100 * count / total:.2f} % "
        f"(95 % interval {low:.2f} to {high:.2f} %){': ' if why else ''}{why}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--faces", action="store_true")
    args = parser.parse_args()
    suffixes = IMAGE_SUFFIXES if args.faces else AUDIO_SUFFIXES
    for folder in args.folders:
        files = [one for one in sorted(folder.rglob("*")) if one.suffix.lower() in suffixes]
        if not files:
            raise SystemExit(f"{folder}: no {', '.join(suffixes)} file in it")
        refused: Counter = Counter()
        for file in files:
            if args.faces:
                faults = FaceLimits().faults(measure_face(read_pixels(file)))
            else:
                samples = read_audio(file, RATE).numpy()
                faults = SpeechLimits().faults(measure_speech(samples, RATE))
            refused.update(fault.partition(":")[0] for fault in faults[:1])
        said(str(folder), refused, len(files))
    if args.faces:
        rng = np.random.default_rng(0)
        made = {"noise": [rng.integers(0, 256, (112, 112, 3), dtype=np.uint8) for _ in range(100)]}
        found = {k: [FaceLimits().faults(measure_face(x)) for x in v] for k, v in made.items()}
    else:
        found = {
            kind: [SpeechLimits().faults(measure_speech(x, RATE)) for x in signals]
            for kind, signals in noises(100).items()
        }
    for kind, faults in found.items():
        said(kind, Counter(one[0].partition(":")[0] for one in faults if one), len(faults))


if __name__ == "__main__":
    main()
