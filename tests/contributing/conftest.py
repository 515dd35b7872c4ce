"""A recipe's training of seconds, whose YAML a test extends as somebody outside would."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from scripts import load

ROOT = Path(__file__).parents[2]

SETTINGS = f"""
extends: {ROOT}/hparams/qmargin.yaml
size: small
number_of_epochs: 1
batch_size: 4
sentence_len: 0.3
num_valid_speakers: 0
cohort_utterances: 0
"""


@pytest.fixture
def voices(tmp_path):
    """Four speakers to train on and two to test, three utterances each."""
    rng = np.random.default_rng(0)
    for speaker in range(6):
        folder = tmp_path / "voices" / "wav" / f"s{speaker}" / "0"
        folder.mkdir(parents=True)
        for utterance in range(3):
            soundfile.write(folder / f"{utterance}.wav", 0.1 * rng.standard_normal(8000), 16000)
    (tmp_path / "trials.txt").write_text(
        "1 s4/0/0.wav s4/0/1.wav\n0 s4/0/0.wav s5/0/0.wav\n"
        "1 s5/0/0.wav s5/0/1.wav\n0 s4/0/1.wav s5/0/1.wav\n"
    )
    return tmp_path


@pytest.fixture
def train(voices):
    """A function that trains with a YAML and options, and gives the run's folder."""

    def run(yaml, *options, output="out"):
        (voices / "own.yaml").write_text(SETTINGS + yaml)
        argv = [str(voices / "own.yaml"), "--device=cpu", "--noprogressbar"]
        argv += [f"--data_folder={voices / 'voices'}", f"--output_folder={voices / output}"]
        argv += [f"--verification_file={voices / 'trials.txt'}", *options]
        load("recipes/voxceleb/train.py").main(argv)
        return voices / output

    return run
