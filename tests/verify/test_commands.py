"""The commands from a run to a decision, on synthetic voices and an encoder of random weights."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import soundfile
from PIL import Image
from random_runs import face_run, speech_run

from speechbrain_qmargin.cli import main
from speechbrain_qmargin.embeddings import load_embeddings, save_embeddings
from speechbrain_qmargin.scoring.decision import OperatingPoint
from speechbrain_qmargin.synthetic.faces import draw_face
from speechbrain_qmargin.verify.readers import SpeechReader
from speechbrain_qmargin.verify.verifier import Verifier


@pytest.fixture(scope="module")
def voices_folder(voices):
    return next(iter(voices.values()))[0].parents[3]  # .../wav/<speaker>/<session>/<file>


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, voices_folder):
    """A run with a threshold, measured by the command."""
    run = speech_run(tmp_path_factory.mktemp("encoder") / "run")
    assert main(["--quiet", "export", str(run)]) == 0
    arguments = ["--quiet", "threshold", str(run), str(voices_folder), "--far=0.2"]
    assert main(arguments) == 0
    return run


def called(capsys, *arguments):
    """Status, what was printed, and the error."""
    capsys.readouterr()
    status = main(["--quiet", *map(str, arguments)])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_a_threshold_by_one_command(encoder, capsys, voices_folder, tmp_path):
    point = OperatingPoint.load(encoder / "inference" / "operating_point.json")
    assert point.kind == "cosine"
    assert point.num_targets == 4 * 4
    assert point.far_interval is not None
    text = (encoder / "inference" / "hyperparams.yaml").read_text()
    assert f"threshold: {point.threshold!r}" in text
    assert not list((encoder).glob(".inference*.parts"))
    assert main(["--quiet", "export", str(encoder)]) == 0  # does not take it away
    assert OperatingPoint.load(encoder / "inference" / "operating_point.json") == point
    given = ["threshold", encoder, voices_folder, "--far=0.2", "--json"]
    status, out, _ = called(capsys, *given, f"--save={tmp_path / 'people.npz'}")
    assert (status, json.loads(out)["threshold"]) == (0, point.threshold)
    given[2] = tmp_path / "people.npz"
    status, out, _ = called(capsys, *given)
    assert (status, json.loads(out)["threshold"]) == (0, point.threshold)
    status, _, error = called(capsys, *given, f"--save={tmp_path / 'people.npz'}")
    assert (status, "people.npz" in error) == (1, True)


def test_an_interrupted_threshold_keeps_what_was_embedded_until_other_settings_are_tried(
    capsys, voices_folder, tmp_path, monkeypatch
):
    run, read = speech_run(tmp_path / "run"), SpeechReader.read
    assert main(["--quiet", "export", str(run)]) == 0
    given = ["threshold", run, voices_folder, "--far=0.2"]

    def dies(self, source):
        if len(seen) >= 20:
            raise KeyboardInterrupt
        return seen.append(source) or read(self, source)

    seen: list = []
    monkeypatch.setattr(SpeechReader, "read", dies)
    status, _, error = called(capsys, *given)
    assert (status, "interrupted; the same command goes on" in error) == (130, True)
    assert list(run.glob(".inference.people.parts/*/part_*"))
    monkeypatch.setattr(SpeechReader, "read", read)
    status, out, error = called(capsys, *given, "--unchecked")  # nothing has to be deleted
    assert (status, "threshold" in out, error) == (0, True, "")
    assert not list(run.glob(".inference*.parts"))


def test_whom_the_encoder_was_trained_on_is_left_out(encoder, capsys, voices_folder, tmp_path):
    run = shutil.copytree(encoder, tmp_path / "run")
    labels = run / "save" / "label_encoder.txt"
    everybody = sorted(folder.name for folder in (voices_folder / "wav").iterdir())

    def train_on(names):
        rows = "".join(f"{name!r} => {row}\n" for row, name in enumerate(names))
        labels.write_text(f"{rows}================\n'starting_index' => 0\n")

    people = tmp_path / "people.npz"
    given = ["threshold", run, voices_folder, "--far=0.2", f"--save={people}"]
    train_on([*everybody[:2], "somebody", "7"])
    status, out, _ = called(capsys, *given)
    assert status == 0
    assert (
        f"people: 2 of the {len(everybody)} are left out, on whom the encoder was trained: " in out
    )
    assert {name.split("/")[0] for name in load_embeddings(people).ids} == {*everybody[2:]}
    train_on(everybody[:3])  # embeddings of before
    status, out, _ = called(capsys, "threshold", run, people, "--far=0.2", "--json")
    assert (status, json.loads(out)["people"]) == (0, [len(everybody) - 3] * 2)
    train_on(everybody)
    status, _, error = called(capsys, *given[:-1])
    assert (status, f"trained on all {len(everybody)} people" in error) == (1, True)


def test_enrol_verify_identify_erase(encoder, capsys, voices, tmp_path):
    (ann, bob), people = [voices[one] for one in ("mv20001", "mv20002")], ["--json"]
    for name, files in (("Ann", ann), ("Bob Ray", bob)):
        status, out, _ = called(capsys, "enrol", encoder, name, *files[:2], *people)
        assert (status, json.loads(out)["recordings"]) == (0, 2)
    file = encoder / "inference.people.sqlite"
    assert file.is_file()
    verifier = Verifier.load(encoder)
    status, out, _ = called(capsys, "verify", encoder, "Ann", ann[2], "--json")
    found, expected = json.loads(out)[0], verifier.verify("Ann", ann[2])
    assert (found["score"], found["accept"]) == (expected.score, expected.accept)
    assert status == (0 if expected.accept else 3)
    status, out, _ = called(capsys, "verify", encoder, "Ann", ann[2], bob[2])
    assert out.count("as Ann: cosine") == 2
    assert status == (3 if "reject " in out else 0)
    content = tmp_path / "no.wav"
    content.write_text("no audio")
    status, out, _ = called(capsys, "verify", encoder, "Ann", ann[2], content)
    assert (status, "no decision: " in out) == (1, True)
    assert "the threshold accepts" in out
    status, out, _ = called(capsys, "identify", encoder, bob[3])
    assert "of 2 people" in out
    assert "chance of at most" in out
    assert main(["--quiet", "export", str(encoder)]) == 0  # nor the people
    status, out, _ = called(capsys, "people", "list", encoder)
    assert [line.split("\t")[:2] for line in out.splitlines()] == [["Ann", "2"], ["Bob Ray", "2"]]
    status, out, _ = called(capsys, "people", "export", file, "Ann")
    assert len(json.loads(out)["recordings"]) == 2
    status, _, _ = called(capsys, "people", "export", file, "Ann", "--output", tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == out
    assert (tmp_path / "a.json").stat().st_mode & 0o077 == 0  # as the enrolments themselves
    status, out, _ = called(capsys, "people", "delete", encoder, "Ann")
    assert out.startswith("Ann: 2 recordings erased from")
    assert b"Ann" not in file.read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux alone")
def test_a_file_whose_name_is_no_text_is_named(encoder, capsys, voices, tmp_path):
    """And what else is decided is decided."""
    ann, people = voices["mv20001"], f"--people={tmp_path / 'people.sqlite'}"
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.flac")
    shutil.copy(ann[0], odd)
    status, _, error = called(capsys, "enrol", encoder, "Ann", odd, people)
    assert (status, error.count("\n")) == (1, 1)
    assert r"caf\udce9.flac': its name is not UTF-8: rename it" in error
    assert called(capsys, "enrol", encoder, "Ann", *ann[:2], people)[0] == 0
    status, out, _ = called(capsys, "verify", encoder, "Ann", odd, ann[2], people, "--json")
    found = json.loads(out)
    assert (status, found[0]["file"], found[1]["file"]) == (1, odd, str(ann[2]))
    assert "rename it" in found[0]["error"]
    assert "score" in found[1]


def test_a_cohort_normalises_and_plain_cosines_lose_their_threshold(
    encoder, capsys, voices_folder, tmp_path
):
    encoder = shutil.copytree(encoder, tmp_path / "run")
    rng = np.random.default_rng(0)
    raw = load_embeddings_of(encoder, voices_folder, tmp_path)
    others = {f"other{n}/{t}": raw[n] + 0.1 * rng.normal(size=len(raw[n])).astype("f")
              for n in range(6) for t in range(2)}  # fmt: skip
    save_embeddings(tmp_path / "others.npz", others)
    arguments = ["threshold", encoder, voices_folder, "--far=0.2", "--cohort"]
    status, _, error = called(capsys, *arguments, tmp_path / "others.npz")
    assert (status, "of another encoder, or of one not known" in error) == (1, True)
    digest = load_embeddings(tmp_path / "own.npz").encoder
    save_embeddings(tmp_path / "others.npz", others, digest)
    status, out, _ = called(capsys, *arguments, tmp_path / "others.npz", "--top_n=4")
    assert (status, "for as-norm scores" in out) == (0, True)
    assert "threshold:" not in (encoder / "inference" / "hyperparams.yaml").read_text()
    assert Verifier.load(encoder).system.cohort.top_n == 4


def load_embeddings_of(encoder, folder, tmp_path):
    assert main(["--quiet", "extract", str(encoder), str(folder), str(tmp_path / "own.npz")]) == 0
    return load_embeddings(tmp_path / "own.npz").matrix


def test_faces_by_the_same_commands(tmp_path, capsys):
    """Synthetic faces and a network of random weights, with statistics of some images."""
    face_run(tmp_path / "run")
    for who in range(8):
        for number in range(4):
            file = tmp_path / "faces" / "images" / f"p{who}" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(draw_face((who, 1), number, 64))).save(file)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    faces = tmp_path / "faces" / "images"
    status, out, _ = called(capsys, "threshold", tmp_path / "run", tmp_path / "faces", "--far=0.2")
    assert (status, "for cosine scores" in out) == (0, True)
    status, _, _ = called(capsys, "enrol", tmp_path / "run", "P1", faces / "p1/0.png")
    assert status == 0
    status, out, _ = called(capsys, "verify", tmp_path / "run", "P1", faces / "p1/1.png", "--json")
    (found,) = json.loads(out)
    assert found["quality"]["height"] == 64
    expected = Verifier.load(tmp_path / "run").verify("P1", faces / "p1/1.png")
    assert (found["score"], status) == (expected.score, 0 if expected.accept else 3)
    status, _, error = called(capsys, "enrol", tmp_path / "run", "P2", tmp_path / "noise.png")
    assert (status, "noise.png: no photograph" in error) == (1, True)


def test_errors_are_one_line(encoder, capsys, tmp_path, voices):
    noise = tmp_path / "noise.wav"
    soundfile.write(noise, 0.1 * np.random.default_rng(0).standard_normal(32000), 16000)
    soundfile.write(tmp_path / "short.wav", 0.1 * np.ones(80), 16000)
    good = voices["mv20001"][0]
    fresh = speech_run(tmp_path / "fresh")
    (tmp_path / "empty").mkdir()
    cases = [
        (["enrol", encoder, "Eve", noise], "noise.wav: no speech"),
        (["enrol", encoder, "Eve", tmp_path / "short.wav"], "too short: 0.005 s"),
        (["enrol", encoder, "Eve", tmp_path / "none.wav"], "none.wav: no such file"),
        (["enrol", encoder, " ", good], "a name has 1 to 200 characters"),
        (["verify", encoder, "Nobody", good], "nobody is enrolled as 'Nobody'"),
        (["identify", fresh, good], "nobody is enrolled with this encoder"),
        (["verify", fresh, "Ann", good], "fresh SOURCE"),
        (["people", "list", tmp_path / "empty"], "nobody is enrolled there"),
        (["people", "list", tmp_path / "nowhere"], "no such encoder or file of enrolments"),
        (["export", tmp_path / "empty"], "empty: no run; say what to write of it"),
        (["people", "delete", encoder], "people delete wants the NAME"),
        (["people", "list", encoder, "Ann"], "people list takes no NAME"),
        (["threshold", encoder, tmp_path / "empty"], "no .wav"),
        (["threshold", encoder, tmp_path / "nowhere"], "no such folder or list"),
        (["threshold", tmp_path / "empty", tmp_path], "hyperparams.yaml: no such file"),
        (["serve", encoder, "--token_file", noise], "others may read it"),
        (["threshold", encoder, tmp_path / "gone", "--enrol_with=0"], "--enrol_with is 1 or more"),
        (["threshold", encoder, noise], "a recording; give its folder, or a list of recordings"),
    ]
    for arguments, fault in cases:
        status, _, error = called(capsys, *arguments)
        assert (status, error.count("\n")) == (1, 1), (arguments, error)
        assert error.startswith(f"qmargin {arguments[0]}: ")
        assert fault in error
    called(capsys, "enrol", fresh, "Ann", good)
    status, _, error = called(capsys, "verify", fresh, "Ann", good)
    assert (status, "no threshold in it" in error) == (1, True)
    assert "qmargin threshold" in error
