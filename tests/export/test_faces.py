"""A run of faces for others: extraction, pair sets, its folder, ONNX."""

import functools
import io
import json
import logging
import pickle
import tarfile

import numpy as np
import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from PIL import Image
from published_layouts import randomised, save, wespeaker
from random_runs import face_run

from speechbrain_qmargin.cli import main
from speechbrain_qmargin.data.images import read_image
from speechbrain_qmargin.data.recordio import write_records
from speechbrain_qmargin.embeddings import cosine_scores, load_embeddings
from speechbrain_qmargin.export.encoder import SpeakerEncoder
from speechbrain_qmargin.export.face_encoder import FaceEncoder, load_face_encoder
from speechbrain_qmargin.export.images import find_images
from speechbrain_qmargin.export.inference import export_faces, export_run
from speechbrain_qmargin.export.loading import load_any_encoder
from speechbrain_qmargin.export.onnx import export_onnx
from speechbrain_qmargin.faces.pair_sets import ten_fold_accuracy
from speechbrain_qmargin.models.iresnet import IResNet
from speechbrain_qmargin.models.mobilefacenet import MobileFaceNet
from speechbrain_qmargin.models.resnet import ResNet
from speechbrain_qmargin.scoring.decision import OperatingPoint, choose_operating_point
from speechbrain_qmargin.scoring.metrics import operating_points
from speechbrain_qmargin.scoring.score_files import read_score_file
from speechbrain_qmargin.trials import read_trials

SIZE = 32


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's output folder as training leaves it, with random weights."""
    return face_run(tmp_path_factory.mktemp("run") / "run")


def picture(number, size=SIZE):
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((size, size))


def encoded(number):
    stream = io.BytesIO()
    picture(number).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve images of four people."""
    folder = tmp_path_factory.mktemp("faces")
    for number in range(12):
        path = folder / "images" / f"person{number // 3}" / f"{number % 3}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    return folder


def qmargin(*arguments):
    return main(["--quiet", *map(str, arguments)])


def extract(*arguments):
    return qmargin("extract", *arguments, "--device=cpu", "--batch_size=5")


@functools.cache
def network(run):
    model = load_hyperpyyaml((run / "hyperparams.yaml").read_text())["modules"]["embedding_model"]
    (weights,) = run.glob("save/CKPT*/embedding_model.ckpt")
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()


def expected(run, content, flip="sum"):
    """The embedding of an image by hand."""
    image = read_image(content, SIZE)[None]
    with torch.no_grad():
        plain, mirrored = (network(run)(one)[0, 0].numpy() for one in (image, image.flip(3)))
    fused = {"none": plain, "sum": plain + mirrored, "concat": np.append(plain, mirrored)}
    return fused[flip]


@pytest.mark.parametrize("flip", [None, "none", "concat"])
def test_a_folder_is_embedded_as_the_run_was_tested(run, folder, tmp_path, capsys, flip):
    assert extract(run, folder, tmp_path / "e.npz", *([f"--flip={flip}"] if flip else [])) == 0
    found = load_embeddings(tmp_path / "e.npz")
    assert found.ids == [f"person{n // 3}/{n % 3}.png" for n in range(12)]
    for name in found.ids[:2]:
        wanted = expected(run, folder / "images" / name, flip or "sum")
        np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=1e-5)
    assert f"flip {flip or 'sum'}" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["e.npz"]


def test_lists_records_and_sets(run, folder, tmp_path, capsys):
    image = folder / "images/person1/0.png"
    (tmp_path / "list.txt").write_text(f"one {image}\n{image}\n")
    assert extract(run, tmp_path / "list.txt", tmp_path / "list.npz") == 0
    wanted = expected(run, image)
    found = load_embeddings(tmp_path / "list.npz")
    assert found.ids == ["one", str(image)]
    np.testing.assert_allclose(found["one"], wanted, rtol=1e-4, atol=1e-5)

    write_records(tmp_path / "train.rec", [encoded(n) for n in range(4)], [0, 0, 1, 1])
    assert extract(run, tmp_path / "train.rec", tmp_path / "rec.npz") == 0
    found = load_embeddings(tmp_path / "rec.npz")
    assert [name.split("/")[0] for name in found.ids] == ["0", "0", "1", "1"]
    np.testing.assert_allclose(found.matrix[3], expected(run, encoded(3)), rtol=1e-4, atol=1e-5)

    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in (("a.png", encoded(3)), ("a.cls", b"1")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        tar.addfile(link)
    (tmp_path / "train.rec").unlink()
    assert extract(run, tmp_path, tmp_path / "tar.npz") == 0
    one = load_embeddings(tmp_path / "tar.npz").matrix
    np.testing.assert_allclose(one, found.matrix[3:], rtol=1e-4, atol=1e-5)
    assert capsys.readouterr().err == ""  # qmargin --quiet
    listed = (tmp_path / "tar.npz.skipped.tsv").read_text()
    assert listed == "0.tar: b.png\ta link or a folder, not a file\n"

    (tmp_path / "lfw.bin").write_bytes(
        pickle.dumps(([encoded(n) for n in range(4)], [True, False]))
    )
    assert extract(run, tmp_path / "lfw.bin", tmp_path / "bin.npz") == 0
    found = load_embeddings(tmp_path / "bin.npz")
    assert found.ids == [f"lfw/00000{n}" for n in range(4)]
    np.testing.assert_allclose(found.matrix[3], expected(run, encoded(3)), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_used_is_listed_and_an_interrupted_extraction_goes_on(
    run, folder, tmp_path, monkeypatch, capsys
):
    from speechbrain_qmargin.export import images as module

    for number in range(9):
        picture(number).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes(b"no image")
    Image.new("RGB", (SIZE, SIZE), "white").save(tmp_path / "4.png")
    out, read = tmp_path.with_suffix(".npz"), []

    def dies(source, size):
        if source.name == "7.png":
            raise KeyboardInterrupt
        read.append(source.name)
        return read_image(source, size)

    monkeypatch.setattr(module, "read_image", dies)
    assert extract(run, tmp_path, out, "--num_workers=1") == 130
    read.clear()
    monkeypatch.setattr(module, "read_image", lambda *one: read.append(one) or read_image(*one))
    assert extract(run, tmp_path, out, "--num_workers=1") == 0
    assert len(read) == 4  # five of nine were done
    assert load_embeddings(out).ids == [f"{n}.png" for n in (0, 1, 2, 5, 6, 7, 8)]
    lines = out.with_name(out.name + ".skipped.tsv").read_text().splitlines()
    assert "3.png: cannot be decoded" in lines[0]
    assert "4.png: shows nothing" in lines[1]
    assert "2 images skipped" in capsys.readouterr().out
    for number in (3, 4):  # repaired
        picture(number).save(tmp_path / f"{number}.png")
    assert extract(run, tmp_path, out, "--overwrite") == 0
    assert len(load_embeddings(out)) == 9
    assert not out.with_name(out.name + ".skipped.tsv").exists()


@pytest.mark.parametrize("kind", ["records", "shards"])
def test_records_that_changed_meanwhile_are_not_mixed(run, tmp_path, monkeypatch, kind):
    """Their ids are the same: the embeddings of the earlier images passed for those of the new."""
    source, out = tmp_path / "train.rec", tmp_path / "out.npz"

    def write(numbers):
        if kind == "records":
            write_records(source, [encoded(n) for n in numbers], [0, 0, 1, 1, 2, 2, 3, 3])
            return source
        with tarfile.open(tmp_path / "0.tar", "w") as tar:
            for row, number in enumerate(numbers):
                for suffix, content in (("png", encoded(number)), ("cls", b"%d" % (row // 2))):
                    member = tarfile.TarInfo(f"{row}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        return tmp_path

    where, network = write(range(8)), FaceEncoder.forward
    monkeypatch.setattr(
        FaceEncoder, "forward", lambda self, x: network(self, x) if len(x) == 5 else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):  # in the second batch
        extract(run, where, out)
    monkeypatch.undo()
    write(range(10, 18))
    assert extract(run, where, out) == 0
    found = load_embeddings(out)
    np.testing.assert_allclose(found.matrix[0], expected(run, encoded(10)), rtol=1e-4, atol=1e-5)


def test_pair_sets_by_any_encoder(run, folder, tmp_path, capsys):
    same = [True, False] * 10
    images = [encoded(n % 7) for n in range(40)]
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps((images, same)))
    own = [f"1 person{n % 4}/0.png person{n % 4}/1.png\n0 person{n % 4}/{n % 3}.png "
           f"person{(n + 1) % 4}/2.png\n" for n in range(10)]  # fmt: skip
    (tmp_path / "own.txt").write_text("".join(own))
    output = tmp_path / "out"
    given = ["pairs", run, tmp_path / "lfw.bin", f"--output={output}", "--device=cpu"]
    assert qmargin(*given) == 0
    assert "lfw: accuracy over 10 folds" in capsys.readouterr().out
    rows = np.stack([expected(run, image) for image in images]).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    scores = np.einsum("nd,nd->n", rows[0::2], rows[1::2])
    written = json.loads((output / "pairs.json").read_text())["sets"]["lfw"]
    assert written[0]["mean"] == ten_fold_accuracy(scores, np.array(same)).mean
    assert np.ptp(scores) > 0.1
    read = read_score_file(output / "lfw/cosine.tsv")
    assert read.kind == "cosine"
    assert read.scores == pytest.approx(scores, abs=1e-5)
    assert (output / "lfw/det.png").is_file()

    assert qmargin("pairs", run, tmp_path / "own.txt", f"--output={output}") == 1
    assert "say where its images are" in capsys.readouterr().err
    given = ["pairs", run, tmp_path / "own.txt", f"--images={folder}", f"--output={output}"]
    assert qmargin(*given, "--device=cpu") == 1
    assert "out/pairs.json is there already; give another name" in capsys.readouterr().err
    assert qmargin(*given, "--device=cpu", "--overwrite") == 0
    assert extract(run, folder, tmp_path / "e.npz") == 0
    trials = read_trials(tmp_path / "own.txt")
    wanted = cosine_scores(load_embeddings(tmp_path / "e.npz"), trials)
    assert read_score_file(output / "own/cosine.tsv").scores == pytest.approx(wanted, abs=1e-5)
    (tmp_path / "own.txt").write_text("".join(sorted("".join(own).splitlines(keepends=True))))
    assert qmargin(*given) == 1
    assert (
        "a fold of one kind only: no rate; a list that is not in folds" in capsys.readouterr().err
    )
    (tmp_path / "own.txt").write_text("".join(own).replace("person3/2.png", "person3/9.png"))
    assert qmargin(*given) == 1
    assert (
        "1 of the images it names are not there, the first: person3/9.png"
        in capsys.readouterr().err
    )


class Moved(MobileFaceNet):
    """Other embeddings from the same weights."""

    def forward(self, x):
        return super().forward(x) + 1


def test_the_folder_of_a_run_and_its_threshold(run, folder, tmp_path, capsys):
    points = operating_points(np.linspace(0, 1, 100), np.arange(100) >= 90)
    encoder = load_any_encoder(run).digest()
    point = choose_operating_point("cosine", points, 0.1, kind="cosine", encoder=encoder)
    point.save(tmp_path / "point.json")
    assert qmargin("export", run, f"--operating_point={tmp_path / 'point.json'}") == 0
    inference = run / "inference"
    assert "threshold" in capsys.readouterr().out
    assert OperatingPoint.load(inference / "operating_point.json") == point
    one, other = load_any_encoder(run), load_any_encoder(inference)
    assert isinstance(other, FaceEncoder)
    assert one.digest() == other.digest()
    image = read_image(folder / "images/person0/1.png", SIZE)[None]
    with torch.no_grad():
        found = other(image)[0]
    wanted = expected(run, folder / "images/person0/1.png")
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert load_face_encoder(run, flip="none").digest() != one.digest()
    other = pytest.warns(UserWarning, match="stays, but it is not for this encoder")
    with other, pytest.raises(ValueError, match=r"yaml: the modules it describes"):
        export_faces(run / "hyperparams.yaml", Moved(8, SIZE), inference)
    assert load_face_encoder(inference).digest() == one.digest()
    export_run(run)


def test_bad_input_is_named(run, folder, tmp_path, capsys):
    def error(*arguments):
        assert extract(*arguments) == 1
        return capsys.readouterr().err

    (tmp_path / "empty").mkdir()
    assert "no .bmp, " in error(run, tmp_path / "empty", tmp_path / "o.npz")
    assert "no such folder or file of images" in error(run, tmp_path / "gone", tmp_path / "o.npz")
    assert "o.csv: embeddings are written as .npz" in error("gone", folder, tmp_path / "o.csv")
    image = folder / "images/person0/0.png"
    assert "give its folder, or a list" in error(run, image, tmp_path / "o.npz")
    (tmp_path / "list.txt").write_text(f"a {image}\na {image}\n")
    assert "list.txt:2: a is there twice" in error(run, tmp_path / "list.txt", tmp_path / "o.npz")
    with pytest.raises(ValueError, match="flip must be one of none, concat, sum"):
        FaceEncoder(MobileFaceNet(8, SIZE), SIZE, "half")
    found = find_images(folder)
    assert len(found.items) == 12
    assert qmargin("pairs", run, *2 * [tmp_path / "a.bin"]) == 1


def test_a_published_network_embeds_and_is_measured(folder, tmp_path, capsys):
    model = randomised(IResNet(18, 8, channels=4))
    weights = save({f"module.{key}": value for key, value in model.state_dict().items()},
                   tmp_path / "backbone.pth")  # fmt: skip
    assert extract(weights, folder, tmp_path / "e.npz") == 0
    assert "arcface_torch" in capsys.readouterr().out
    found = load_embeddings(tmp_path / "e.npz")
    image = read_image(folder / "images/person0/0.png", 112)[None]
    with torch.no_grad():
        wanted = (model(image) + model(image.flip(3)))[0, 0].numpy()
    np.testing.assert_allclose(found["person0/0.png"], wanted, rtol=1e-3, atol=1e-3)
    assert found.encoder == load_any_encoder(weights).digest()
    assert qmargin("export", weights) == 1
    assert "no run; say what to write of it" in capsys.readouterr().err
    speech = wespeaker(tmp_path / "speech", "ResNet34", ResNet(80, 4, 8), 8, m_channels=4)
    assert isinstance(load_any_encoder(speech), SpeakerEncoder)
    with pytest.raises(ValueError, match=r"flip: .* is an encoder of speech"):
        load_any_encoder(speech, flip="sum")
    assert qmargin("pairs", speech, tmp_path / "a.bin") == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx_gives_the_same_embeddings_in_other_batches(tmp_path, caplog):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, 2), torch.nn.PReLU(), torch.nn.Flatten(), torch.nn.Linear(900, 8)
    )
    encoder = FaceEncoder(model, SIZE, "sum")
    told = logging.getLogger("torch.onnx._internal.exporter._registration")
    told.addHandler(caplog.handler)
    steps: list[str] = []
    differences = export_onnx(encoder, tmp_path / "e.onnx", say=steps.append)
    assert [step[:6] for step in steps] == ["1 of 3", "2 of 3", "3 of 3"]
    told.removeHandler(caplog.handler)
    said = [one.getMessage() for one in caplog.records if one.name == told.name]
    assert not [one for one in said if "torchvision" in one]  # not installed, and not needed
    assert list(differences) == ["1 x 32 x 32", "2 x 32 x 32", "5 x 32 x 32"]
    images = torch.rand(7, 3, SIZE, SIZE) * 2 - 1
    session = onnxruntime.InferenceSession(str(tmp_path / "e.onnx"))
    (found,) = session.run(None, {"image": images.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, encoder(images), rtol=1e-4, atol=1e-5)
    about = session.get_modelmeta().custom_metadata_map
    assert about["channels"] == "RGB"
    assert about["normalisation"] == "(value - 127.5) / 127.5, of values 0 to 255"
    assert about["flip"] == "sum"
    assert about["encoder"] == encoder.digest()
