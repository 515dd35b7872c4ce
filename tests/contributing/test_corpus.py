"""A corpus of one's own: a reader in one file outside the package, and one YAML."""

import json
import sys
from itertools import combinations

import numpy as np
import pytest
import soundfile
from scripts import ROOT, load

from speechbrain_qmargin.data.readers import reader_named

READER = '''
"""Calls as an exchange records them: one folder a day, the caller's number in the name."""

from speechbrain_qmargin.data.manifest import Item, Manifest
from speechbrain_qmargin.data.readers import corpus_reader


@corpus_reader
def read_calls(folder, for_trials=False):
    def items():
        for path in folder.glob("day*/*.wav"):
            caller = path.stem.split("_")[0]
            yield Item(f"{path.parent.name}_{path.stem}", str(path), caller)

    return Manifest.of(items())


def not_a_reader(folder, for_trials=False):
    raise AssertionError("called")
'''

YAML = """
extends: {root}/hparams/qmargin.yaml
reader: my_calls.read_calls
size: small
channels: 8
attention_channels: 8
embedding_dim: 16
number_of_epochs: 1
batch_size: 4
sentence_len: 0.3
num_valid_speakers: 0
cohort_utterances: 0
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for day in range(2):
        (tmp_path / f"calls/day{day}").mkdir(parents=True)
        for caller in range(6):
            path = tmp_path / f"calls/day{day}/+49{caller}_{day}{caller}.wav"
            soundfile.write(path, 0.1 * rng.standard_normal(8000), 16000)
    (tmp_path / "my_calls.py").write_text(READER)
    (tmp_path / "my_calls.yaml").write_text(YAML.format(root=ROOT))
    tested = [f"day{day}_+49{caller}_{day}{caller}" for caller in (2, 3, 4, 5) for day in (0, 1)]
    lines = [
        f"{int(one[5:9] == other[5:9])} {one} {other}" for one, other in combinations(tested, 2)
    ]
    (tmp_path / "trials.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("my_calls", None)


@pytest.mark.slow
def test_a_corpus_outside_the_package_is_trained_on_and_tested(calls, monkeypatch):
    monkeypatch.chdir(calls)
    argv = ["my_calls.yaml", "--data_folder", "calls", "--verification_file", "trials.txt"]
    argv += ["--output_folder", "out", "--device", "cpu", "--noprogressbar"]
    load("recipes/voxceleb/train.py").main(argv)
    results = json.loads((calls / "out/results.json").read_text())
    assert results["lists"]["trials"]["cosine"]
    assert (calls / "out/save/label_encoder.txt").read_text().count("+49") == 2


def test_only_what_was_declared_to_be_a_reader_is_called(calls):
    assert len(reader_named("my_calls.read_calls")(calls / "calls")) == 12
    for name in ("my_calls.not_a_reader", "os.system", "nowhere.read", "my_calls.gone", "plain"):
        with pytest.raises(ValueError, match=f"reader: .*{name.split('.')[-1]}"):
            reader_named(name)
