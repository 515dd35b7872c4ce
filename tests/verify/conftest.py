"""Synthetic voices, once for all of these tests."""

import pytest

from speechbrain_qmargin.synthetic.voices import build_mini_corpus


@pytest.fixture(scope="session")
def voices(tmp_path_factory):
    """Person to files, two sessions of two."""
    pytest.importorskip("espeakng_loader", reason="needs the extra 'demo'")
    sizes = {"num_train_speakers": 2, "num_valid_speakers": 2, "num_test_speakers": 4}
    corpus = build_mini_corpus(
        tmp_path_factory.mktemp("voices") / "mini",
        seed=5,
        num_sessions=2,
        num_utterances=2,
        progress=False,
        **sizes,
    )
    found = {}
    for file in sorted(corpus.wav.rglob("*.flac")):
        found.setdefault(file.relative_to(corpus.wav).parts[0], []).append(file)
    return found
