"""What README and pages say, as far as a machine can check; README's Python is a doctest."""

import ast
import contextlib
import doctest
import importlib
import io
import re
import shlex
from statistics import mean

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from scripts import ROOT

from speechbrain_qmargin import QMarginLoss, __version__
from speechbrain_qmargin.cli import GROUPS, main
from speechbrain_qmargin.training.config import CommandLine, compose, plain_settings, resolved

PAGES = {
    page.name: page.read_text(encoding="utf-8")
    for page in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
every_page = pytest.mark.parametrize("page", PAGES)


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def commands(page):
    """The lines of a page's shell blocks as words."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines()]


@every_page
def test_links_lead_to_files(page):
    folder = ROOT if (ROOT / page).exists() else ROOT / "docs"
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", PAGES[page])
    generated = "api/"  # by Sphinx, which checks these
    assert [x for x in links if not (x.startswith(generated) or (folder / x).exists())] == []


@every_page
def test_scripts_and_settings_that_are_named_exist(page):
    upstream = r"(?!hparams/train_)"  # SpeechBrain's own
    path = r"\b(?:recipes|hparams|benchmarks|tests|speechbrain_qmargin)/[\w/]+\.(?:py|yaml|sh)\b"
    named = set(re.findall(upstream + path, PAGES[page]))
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


@every_page
def test_python_that_is_shown_can_be_imported(page):
    for block in blocks(page, "python"):
        if block.lstrip().startswith(">>>"):
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("speechbrain_qmargin"):
                module = importlib.import_module(node.module)
                assert [n.name for n in node.names if not hasattr(module, n.name)] == []


@pytest.mark.parametrize("page", [name for name in PAGES if ">>>" in PAGES[name]])
def test_examples_give_what_is_shown(page):
    text = "\n".join(one for one in blocks(page, "python") if one.startswith(">>>"))
    example = doctest.DocTestParser().get_doctest(text, {}, page, page, 0)
    assert doctest.DocTestRunner().run(example).failed == 0


@every_page
def test_subcommands_and_their_options_exist(page):
    known = {name for group in GROUPS.values() for name in group}
    for words in commands(page):
        if words[:1] != ["qmargin"] or "|" in words:
            continue
        name = next(word for word in words[1:] if not word.startswith("-"))
        assert name in known, words
        with contextlib.redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit):
            main([name, "--help"])
        options = set(re.findall(r"--\w+", text.getvalue())) | {"--quiet"}
        assert {w.split("=")[0] for w in words if w.startswith("--")} <= options, words


def trainings(page):
    """The arguments of a page's trainings, their variables in place, as (YAML, overrides)."""
    variables = {}
    for words in commands(page):
        if len(words) == 1 and "=" in words[0]:
            name, _, value = words[0].partition("=")
            variables[f"${name}"] = shlex.split(value)
        script = [n for n, word in enumerate(words) if re.fullmatch(r"recipes/\w+/train\.py", word)]
        if script and len(words) > script[0] + 1:
            given = words[script[0] + 1 :]
            given = [one for word in given for one in variables.get(word, [word]) if one != "..."]
            found = CommandLine.of(given)
            yield found.hparams_file, found.overrides


@pytest.mark.parametrize("page", [page for page in PAGES if any(trainings(page))])
def test_trainings_have_their_options_and_come_to_their_margin(page):
    for yaml, overrides in trainings(page):
        overrides.pop("pretrained", None)  # what it names is the reader's
        if yaml == "hparams/qmargin_lm.yaml":  # extends that run
            continue
        settings = plain_settings(resolved(compose(ROOT / yaml, overrides)))
        assert settings["margin_until_epoch"] <= settings["number_of_epochs"], overrides


def flags(name):
    """The values of an option of an upstream recipe in the README, as the shell hands them over."""
    words = [word for line in commands("README.md") for word in line]
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


def test_the_x_vector_flag_is_speechbrains_network_with_a_normalised_embedding():
    (value,) = flags("embedding_model")
    yaml = """
embedding_model: !new:speechbrain.lobes.models.Xvector.Xvector
    in_channels: 24
    activation: !name:torch.nn.LeakyReLU
    tdnn_blocks: 5
    tdnn_channels: [512, 512, 512, 512, 1500]
    tdnn_kernel_sizes: [5, 3, 3, 1, 1]
    tdnn_dilations: [1, 2, 3, 1, 1]
    lin_neurons: 512
"""
    theirs = load_hyperpyyaml(yaml)["embedding_model"]
    ours = load_hyperpyyaml(yaml, f"embedding_model: {value}")["embedding_model"]
    shapes = {name: tuple(one.shape) for name, one in ours.state_dict().items()}
    assert shapes.items() > {n: tuple(one.shape) for n, one in theirs.state_dict().items()}.items()
    embeddings = ours(torch.randn(4, 60, 24)).squeeze(1)
    torch.testing.assert_close(embeddings.mean(0), torch.zeros(512), atol=1e-5, rtol=0)


def of_a_list(rows):
    """A row of docs/intervals.md from those of a list in the benchmark's record."""

    def numbers(column):
        return [float(row[column].strip("*")) for row in rows if row[column]]

    def width(column):
        return f"{min(numbers(column)):.2f} to {max(numbers(column)):.2f}"

    (name, speakers, simulations, *_), covered = rows[0], numbers(8)
    return [
        *(name, speakers, simulations.replace(", ", " / "), str(len(rows))),
        f"{mean(covered):.1f} ({min(covered):g} to {max(covered):g})",
        *(width(9), f"{mean(numbers(11)):.1f}"),
        *(f"{mean(numbers(5)):.1f}", width(6), f"{mean(numbers(7)):.1f}"),
    ]


def test_the_coverage_of_the_intervals_is_that_of_the_record():
    def cells(text):
        lines = [line for line in text.splitlines() if re.match(r"\| (dense|sparse|VoxC)", line)]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    shown, records = cells(PAGES["intervals.md"]), []
    for model in ("usual", "heavy"):
        record = cells((ROOT / f"benchmarks/intervals_{model}.md").read_text(encoding="utf-8"))
        rows = [row for row in record if int(row[4].replace(",", "")) >= 30]
        for name in dict.fromkeys(row[0] for row in rows):
            records.append(of_a_list([row for row in rows if row[0] == name]))
    assert shown == records


def test_readme_is_read_in_minutes():
    words = [word for word in PAGES["README.md"].split() if re.search(r"\w", word)]
    assert len(words) <= 900


def test_one_version():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {__version__}\n" in citation
