"""The README's statements that a machine can check; its Python is run as a doctest."""

import re
import shlex

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from scripts import ROOT

from speechbrain_qmargin import QMarginLoss

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    generated = "api/"  # by Sphinx, which checks these
    missing = [x for x in links if not x.startswith(generated) and not (page.parent / x).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_and_settings_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    upstream = r"(?!hparams/train_)"  # SpeechBrain's own
    named = set(
        re.findall(upstream + r"\b(?:recipes|hparams|benchmarks|tests)/[\w/]+\.(?:py|yaml)", text)
    )
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def flags(name):
    """The values of an option of an upstream recipe, as the shell hands them over."""
    words = [word for line in COMMANDS for word in shlex.split(line, comments=True)]
    return [word.split("=", 1)[1] for word in words if word.startswith(f"--{name}=")]


@pytest.mark.parametrize("value", flags("compute_cost"))
def test_every_loss_flag_is_a_loss(value):
    yaml = "compute_cost: !new:torch.nn.Identity"
    loss = load_hyperpyyaml(yaml, f"compute_cost: {value}")["compute_cost"]
    cosines = torch.tensor([[[0.2, 0.1, 0.3]]], requires_grad=True)
    loss(cosines, torch.tensor([[1]]), torch.ones(1)).backward()
    assert isinstance(loss, QMarginLoss)
    assert cosines.grad is not None
    assert cosines.grad[0, 0, 1] < 0


def test_the_classifier_flag_makes_x_vectors_outputs_cosines():
    (value,) = flags("classifier")
    yaml = """
classifier: !new:speechbrain.lobes.models.Xvector.Classifier
    input_shape: [null, null, 512]
    out_neurons: 7205
"""
    classifier = load_hyperpyyaml(yaml, f"classifier: {value}")["classifier"]
    embeddings = torch.randn(2, 1, 512)
    outputs = classifier(embeddings)
    assert outputs.shape == (2, 1, 7205)
    expected = torch.cosine_similarity(embeddings, classifier.weight, dim=-1)
    torch.testing.assert_close(outputs[:, 0], expected)


def test_it_is_read_in_minutes():
    assert len([word for word in README.split() if re.search(r"\w", word)]) <= 900
