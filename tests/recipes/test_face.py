"""The face recipe from the command line to the results, on faces drawn for the test."""

import io
import json
import pickle
import shutil

import pytest
from scripts import ROOT, load, loaded_by, train

from speechbrain_qmargin.data.recordio import write_records
from speechbrain_qmargin.data.records import FaceRecords
from speechbrain_qmargin.synthetic import faces as mini_faces

TINY = ["--depth=18", "--width=4", "--embedding_dim=16", "--image_size=32", "--batch_size=8"]
TINY += ["--number_of_epochs=2"]


def run(*options, tiny=TINY):
    train("face", "face_qmargin.yaml", *tiny, *options)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return mini_faces.build_mini_faces(
        tmp_path_factory.mktemp("faces"),
        num_train=6,
        num_valid=2,
        num_test=3,
        num_images=4,
        progress=False,
    )


def test_the_main_job_ends_with_its_results_and_says_when_it_is_done(
    corpus, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(mini_faces, "build_mini_faces", lambda: corpus)
    output = tmp_path / "out"
    run(f"--output_folder={output}")
    printed = capsys.readouterr().out
    assert "TAR@FAR=0.01" in printed
    assert "generated faces" in printed
    assert "of 3 identities" in printed
    assert (output / "scores/trials_test/det.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((output / "results.json").read_text())
    assert results["settings"]["size"] == "mini"
    history = (output / "history.jsonl").read_text().splitlines()
    assert "valid_eer" in json.loads(history[-1])
    run(f"--output_folder={output}")
    assert "This run is done" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "option", ["--loss=qmargin_auto", "--head=sparse", "--model=mobilefacenet"]
)
def test_loss_head_and_model_are_one_flag_each(corpus, tmp_path, option):
    output = tmp_path / "out"
    options = [option]
    if "sparse" in option:  # with the number of images of each identity
        options += ["--loss=qmargin_prior", "--loss_options={temperature: 1.0}"]
    tiny = TINY if "model" not in option else TINY[2:]  # depth and width are IResNet's
    given = [f"--data_folder={corpus.folder}", f"--verification_file={corpus.trials_test}"]
    run("--size=small", *given, *options, f"--output_folder={output}", tiny=tiny)
    results = json.loads((output / "results.json").read_text())
    settings = results["settings"]
    assert (
        settings["training_samples"] == settings["number_of_epochs"] * 4 * settings["out_n_neurons"]
    )
    if "sparse" in option:
        assert results["loss"]["temperature"] == 1
    if "auto" in option:
        log = (output / "log.txt").read_text()
        assert results["loss"] == {"alpha": 1.25, "scale": 20, "margin": 0.2}
        assert "alpha 1.25, scale 20, margin 0.2 for 8 classes in 16 dimensions" in log


def test_bad_input_is_named_before_anything_is_trained(corpus, tmp_path):
    output = f"--output_folder={tmp_path / 'out'}"
    pairs = f"--verification_file={corpus.trials_test}"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run("--size=small", "--data_folder=/nowhere", pairs, output)
    with pytest.raises(ValueError, match="verification_file"):
        run("--size=small", f"--data_folder={corpus.folder}", output)
    with pytest.raises(ValueError, match=r"data_folder: .*trials_test\.txt is a file; give the"):
        run("--size=small", f"--data_folder={corpus.trials_test}", pairs, output)
    broken = tmp_path / "pairs.txt"
    broken.write_text("1 train000/00.png ghost/00.png\n")
    with pytest.raises(FileNotFoundError, match="ghost"):
        run(
            "--size=small",
            f"--data_folder={corpus.folder}",
            f"--verification_file={broken}",
            output,
        )


# ---------------------------------------------------------- .rec and .bin, undecodable images


def png(identity, number):
    stream = io.BytesIO()
    mini_faces.draw_face((0, identity), number, 32).save(stream, format="PNG")
    return stream.getvalue()


LABELS = [i // 4 for i in range(24)]
FACES = [[png(identity, number) for number in range(4)] for identity in range(6)]


def write_bin(path, pairs=20, broken=None, same=None):
    same = [True, False] * (pairs // 2) if same is None else same
    images = [x for n in range(pairs) for x in (FACES[0][n % 4], FACES[n % 2][(n + 1) % 4])]
    if broken is not None:
        images[broken] = b"no image"
    path.write_bytes(pickle.dumps((images, same)))
    return path


@pytest.fixture
def records(tmp_path):
    folder = tmp_path / "ms1m"
    folder.mkdir()
    faces = [face for identity in FACES for face in identity]
    write_records(folder / "train.rec", faces, LABELS)
    return folder


def test_records_by_their_folder_and_one_set_without_brackets(records, tmp_path, monkeypatch):
    opened, init = [], FaceRecords.__init__
    monkeypatch.setattr(
        FaceRecords,
        "__init__",
        lambda self, path, **given: opened.append(path) or init(self, path, **given),
    )
    content = (records / "train.rec").read_bytes()
    (records / "train.rec").write_bytes(content.replace(FACES[1][2], b"x" * len(FACES[1][2])))
    output = tmp_path / "out"
    write_bin(records / "lfw.bin")  # as InsightFace publishes it
    run("--size=small", f"--data_folder={records}", "--test_sets=lfw.bin",
        f"--output_folder={output}")  # fmt: skip
    assert opened == [records / "train.rec"]  # once
    assert list(json.loads((output / "results.json").read_text())["pair_sets"]) == ["lfw"]
    listed = (output / "save/skipped_images.txt").read_text()
    assert listed == "train.rec: record 7\tcannot be decoded (of no format that is read)\n"


def test_a_run_goes_on_with_the_images_that_it_began_with_wherever_they_lie(records, tmp_path):
    """As many others, of as many identities, would be other classes to the prototypes."""
    options = (
        f"--test_sets={write_bin(tmp_path / 'lfw.bin')}",
        f"--output_folder={tmp_path / 'out'}",
    )
    run("--size=small", f"--data_folder={records}", *options)
    (tmp_path / "out/results.json").unlink()
    moved = shutil.copytree(records, tmp_path / "moved")
    run("--size=small", f"--data_folder={moved}", *options)
    (tmp_path / "out/results.json").unlink()
    write_records(moved / "train.rec", [face for one in FACES[::-1] for face in one], LABELS)
    given = "training_data = 24 images of 6 identities, sha256:"
    with pytest.raises(ValueError, match=f"{given}.*; these data give .*Give the data that it beg"):
        run("--size=small", f"--data_folder={moved}", *options)


def test_a_folder_of_images_with_sets_alone_and_a_broken_image(tmp_path, capsys):
    images = tmp_path / "images"
    for identity, faces in enumerate(FACES):
        (images / str(identity)).mkdir(parents=True)
        for number, face in enumerate(faces):
            (images / str(identity) / f"{number}.png").write_bytes(face)
    (images / "3/1.png").write_bytes(FACES[3][1][:60])
    output = tmp_path / "out"
    tests = write_bin(tmp_path / "lfw.bin")
    argv = [str(ROOT / "hparams/face_qmargin.yaml"), "--noprogressbar", "--device=cpu", *TINY]
    argv += ["--size=small", f"--data_folder={images}", f"--test_sets=[{tests}]"]
    recipe = load("recipes/face/train.py")
    recipe.main([*argv, f"--output_folder={output}"])
    assert "1 images cannot be used" in capsys.readouterr().out
    assert (output / "save/skipped_images.txt").read_text().startswith("3/1.png\t")
    results = json.loads((output / "results.json").read_text())
    assert results["pair_sets"]["lfw"][0]["pairs"] == 20
    assert results["lists"] == {}


def test_faults_of_test_images_are_found_before_training(corpus, records, tmp_path):
    def fails(error, match, *options):
        with pytest.raises(error, match=match):
            run("--size=small", f"--output_folder={tmp_path / 'out'}", *options)
        assert not list((tmp_path / "out").rglob("CKPT*"))

    data = f"--data_folder={records}"
    broken = write_bin(tmp_path / "lfw.bin", broken=2 * 17 + 1)
    fails(OSError, r"lfw\.bin, pair 17, image 2: cannot be decoded", data, f"--test_sets={broken}")
    few = write_bin(tmp_path / "few.bin", pairs=8)
    fails(ValueError, r"few\.bin: 10 folds of 8 pairs", data, f"--test_sets=[{few}]")
    one = write_bin(tmp_path / "one.bin", same=[True] * 10 + [False] * 10)
    fails(ValueError, r"one\.bin: pairs 0 to 1 are a fold of one kind", data, f"--test_sets={one}")
    good = write_bin(tmp_path / "good.bin")
    fails(
        ValueError,
        "good.bin shares its name with another list",
        data,
        f"--test_sets=[{good}, {good}]",
    )
    pairs = f"--verification_file={corpus.trials_test}"
    fails(ValueError, "verification_file: does not apply", data, f"--test_sets={good}", pairs)
    fails(ValueError, "min_images: 5 does not", data, f"--test_sets={good}", "--min_images=5")
    fails(ValueError, "give --test_sets", data)
    lost = r"test_sets: gone\.bin does not exist, and .*ms1m/gone\.bin neither"
    for where in (data, data + "/train.rec"):
        fails(FileNotFoundError, lost, where, "--test_sets=gone.bin")

    images = tmp_path / "images"
    for identity in range(4):
        (images / str(identity)).mkdir(parents=True)
        for number in range(2):
            (images / str(identity) / f"{number}.png").write_bytes(FACES[identity][number])
    (tmp_path / "pairs.txt").write_text("1 0/0.png 0/1.png\n0 0/0.png 1/0.png\n")
    (images / "1/0.png").write_bytes(b"")
    options = f"--data_folder={images}", f"--verification_file={tmp_path / 'pairs.txt'}"
    fails(OSError, r"1 of 3 images to test on cannot be used.*: 1/0\.png: ", *options)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "method"), [("folder", "spawn"), ("records", "forkserver")])
def test_processes_that_load_data_may_be_started_in_any_way(
    corpus, records, tmp_path, data, method
):
    """That every dataset is the same in any process is in tests/data/test_processes.py."""
    options = {
        "folder": [f"--data_folder={corpus.folder}", f"--verification_file={corpus.trials_test}"],
        "records": [f"--data_folder={records}", f"--test_sets={write_bin(tmp_path / 'lfw.bin')}"],
    }[data]
    losses = []
    for number, more in enumerate(((), loaded_by(method))):
        output = tmp_path / str(number)
        once = ["--size=small", "--number_of_epochs=1", f"--output_folder={output}"]
        run(*options, *once, *more, tiny=TINY[:-1])
        lines = (output / "history.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == losses[1]
