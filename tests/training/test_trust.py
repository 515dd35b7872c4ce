"""A run's folder executes nothing: harmless payloads that would leave a file, at every door."""

import shutil
from pathlib import Path

import pytest
import torch
from speechbrain.utils.checkpoints import Checkpointer

from speechbrain_qmargin.cli import main
from speechbrain_qmargin.export.definitions import hyperparams_tree
from speechbrain_qmargin.export.encoder import load_encoder, load_run
from speechbrain_qmargin.export.inference import export_for_inference, export_run
from speechbrain_qmargin.export.loading import load_any_encoder
from speechbrain_qmargin.training.config import compose, load_experiment
from speechbrain_qmargin.training.run_folder import RunFolder
from speechbrain_qmargin.training.trust import load_checked, object_names, refuse_code

ROOT = Path(__file__).parents[2]
HPARAMS = ROOT / "hparams"

# Each would make MARKER, or reaches outside the list, if the document were loaded
PAYLOADS = {
    "apply": "x: !apply:subprocess.getoutput ['touch MARKER']",
    "new": "x: !new:subprocess.Popen [['touch', 'MARKER']]",
    "name": "x: !name:os.system",
    "module": "x: !module:os",
    "nested": "x: {y: [1, {z: !apply:os.system ['touch MARKER']}]}",
    "in a key": "? !apply:os.system ['touch MARKER']\n: 1",
    "python": "x: !!python/object/apply:os.system ['touch MARKER']",
    "python name": "x: !!python/name:os.system ''",
    "verbatim": "x: !<tag:yaml.org,2002:python/object/apply:os.system> ['touch MARKER']",
    "directive": "%TAG !e! tag:yaml.org,2002:python/object/\n---\n"
    "x: !e!apply:os.system ['touch MARKER']",
    "include": "x: !include:other.yaml",
    "applyref": "x: !applyref:os.system ['touch MARKER']",
    "tuple": "x: (!!python/object/apply:os.system ['touch MARKER'])",
    "quoted tuple": "x: '(!!python/object/apply:os.system [\"touch MARKER\"])'",
    "tuple of references": "a: '!!python/object/apply:os.system [touch MARKER]'\nx: !ref (<a>)",
    "attribute": "a: !new:torch.nn.Identity\nx: !ref <a.__init__>",
    "getattr": "a: !new:torch.nn.Identity\nx: !apply:getattr [!ref <a>, __init__]",
    "through a module": "x: !apply:speechbrain_qmargin.files.os.system ['touch MARKER']",
    "through a class": "x: !name:torch.nn.Identity.__init__",
    "through torch": "x: !apply:torch.nn.modules.module.torch.hub.download_url_to_file [a, b]",
    "our own writer": "x: !apply:speechbrain_qmargin.files.write_text [MARKER, '']",
    "our own training": "x: !apply:speechbrain_qmargin.training.run.train_verifier [[a]]",
    "speechbrain's download": "x: !apply:speechbrain.utils.fetching.fetch [a, b]",
    "speechbrain's shell": "x: !apply:speechbrain.utils.superpowers.run_shell ['touch MARKER']",
    "speechbrain's hub": "x: !new:speechbrain.lobes.models.fairseq_wav2vec.FairseqWav2Vec1 [a, b]",
    "reads a pickle": "x: !apply:torch.load [a]",
    "compiles": "x: !apply:torch.nn.modules.module.eval ['1']",
    "sets": "x: !!set {a, b}",
    "a loss of its own": "loss: antigravity.fly",
    "a loss of its module": "x: !apply:speechbrain_qmargin.make_loss {name: 'antigravity:fly'}",
    "a loss by reference": "a: antigravity\nloss: !ref <a>:fly",
    "a reader of its own": "reader: subprocess.getoutput",
}


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS.keys())
def test_a_document_with_code_is_refused_before_it_is_loaded(payload, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("other.yaml").write_text("x: !apply:os.system ['touch MARKER']\n")
    with pytest.raises(ValueError, match=r"run/hyperparams\.yaml: "):
        load_checked(payload, "run/hyperparams.yaml")
    assert not Path("MARKER").exists()


def aliases(kind):
    """Nine levels, each of the one below nine times: 9 ** 10 characters from 500."""
    text = "a: &a [x,x,x,x,x,x,x,x,x]\n"
    for above, below in zip("bcdefghij", "abcdefghi", strict=True):
        text += f"{above}: &{above} [{','.join([kind.format(below)] * 9)}]\n"
    return text


BOMBS = {
    "aliases": (aliases("*{}"), "grow beyond 1,000,000 characters"),
    "references": (aliases("!ref <{}>"), "grow beyond 1,000,000 characters"),
    "copies": (aliases("!copy <{}>"), "grow beyond 1,000,000 characters"),
    "texts": ("a: xxxxxxxxx\n" + "".join(f"{n}: !ref {f'<{m}>' * 9}\n" for m, n in
              zip("abcdefgh", "bcdefghi", strict=True)), "grows beyond 10,000"),
    "squares": ("a: 99\n" + "".join(f"{n}: !ref <{m}>*<{m}>\n" for m, n in
                zip("abcdefghijklmno", "bcdefghijklmnop", strict=True)), "grows beyond 10,000"),
    "a power": ("a: 9\nb: !ref <a>**<a>**<a>**<a>", "a power"),
    "a power in a text": ("a: 9**9**9**9\nb: !ref <a> + 0", "a power"),
    "a text times a number": ("a: ''\nb: !ref <a>'x' * 99999999999", "a text times a number"),
    "division by zero": ("a: 1\nb: !ref <a>/0", "division by zero"),
    "a reference to itself": ("a: !ref <a>", "made of itself"),
    "a reference around": ("a: [!ref <b>]\nb: [!ref <a>]", "made of itself"),
    "a text of itself": ("a: x<b>\nb: !ref y<a>", "made of itself"),
    "a number of 5,000 digits": (f"a: {'9' * 5000}", "4300 digits"),
    "brackets": (f"a: {'[' * 300}", "nested deeper than 100 levels"),
    "closed brackets": (f"a: {'[' * 300}{']' * 300}", "nested deeper than 100 levels"),
    "texts in a circle": ("a: <b>\nb: <a>\nc: !ref x<a>", "leads to itself"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BOMBS.values(), ids=BOMBS.keys())
def test_a_document_that_would_never_end_is_refused_at_once(text, message):
    """Some hundred bytes in a folder took all memory, or computed for ever."""
    with pytest.raises(
        ValueError, match=rf"run/hyperparams\.yaml: not a YAML file \(.*({message})"
    ):
        refuse_code(text, "run/hyperparams.yaml")


def test_sums_and_parts_of_other_settings_pass():
    text = "a: 3\nb: !ref <a> * 2 + 1\nc: !ref <b>/x\nd: {e: !ref <a>}\nf: !ref <d[e]>\n"
    text += "g: &g [1]\nh: *g"
    found = load_checked(text, "run/hyperparams.yaml")
    assert (found["b"], found["c"], found["f"], found["h"]) == (7, "7/x", 3, [1])


def test_what_is_meant_can_be_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "x: !apply:os.getcwd []"
    with pytest.raises(ValueError, match=r"!apply:os.getcwd would run code.* say --trust"):
        load_checked(text, "file")
    assert load_checked(text, "file", trust=True) == {"x": str(tmp_path)}
    assert load_checked(text, "file", trust={"os.getcwd"}) == {"x": str(tmp_path)}
    refuse_code("loss: mine:Loss", "file", trust=object_names("loss: mine:Loss"))
    with pytest.raises(ValueError, match=r"os\.getlogin"):
        refuse_code("x: !name:os.getlogin", "file", trust={"os.getcwd"})


@pytest.mark.parametrize(
    "recipe", [pytest.param("qmargin.yaml", marks=pytest.mark.slow), "face_qmargin.yaml"]
)
def test_every_run_of_the_recipes_passes(recipe, tmp_path):
    kind = "face" if recipe.startswith("face") else "speech"
    options = {
        "models": "model", "sizes": "size", "augments": "augment", "features": "features",
        "heads": "head", "loggers": "logger",
    }  # fmt: skip
    for folder in (HPARAMS, HPARAMS / kind):
        for file in folder.glob("*/*.yaml"):
            if file.parent.name in options:
                given = {options[file.parent.name]: file.stem}
                refuse_code(compose(HPARAMS / recipe, given), "experiment.yaml")


# ---------------------------------------------------------------- the doors

NETWORK = """
sample_rate: 16000
compute_features: !new:speechbrain.lobes.features.Fbank
    n_mels: {bands}
mean_var_norm: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
    std_norm: False
embedding_model: !new:speechbrain.lobes.models.Xvector.Xvector
    in_channels: 20
    tdnn_blocks: 1
    tdnn_channels: [8]
    tdnn_kernel_sizes: [1]
    tdnn_dilations: [1]
    lin_neurons: 4
modules:
    compute_features: !ref <compute_features>
    mean_var_norm: !ref <mean_var_norm>
    embedding_model: !ref <embedding_model>
"""


@pytest.fixture
def run(tmp_path):
    """A run's folder with code in its YAMLs, and the file that it would make."""
    folder, marker = tmp_path / "run", tmp_path / "MARKER"
    model = load_checked(NETWORK.format(bands=20), "ours")["embedding_model"]
    Checkpointer(folder / "save", {"embedding_model": model}).save_checkpoint()
    bands = f"!apply:builtins.eval [\"__import__('pathlib').Path('{marker}').touch() or 20\"]"
    for name in ("hyperparams.yaml", "experiment.yaml"):
        (folder / name).write_text(NETWORK.format(bands=bands) + f"output_folder: {folder}\n")
    return folder, marker


def inference_of(folder):
    export = folder / "inference"
    export.mkdir()
    shutil.copy(folder / "hyperparams.yaml", export)
    shutil.copy(next(folder.glob("save/CKPT*")) / "embedding_model.ckpt", export)
    return export


def extends(folder):
    own = folder.parent / "own.yaml"
    own.write_text("start: !PLACEHOLDER\nextends: <start>/experiment.yaml\n")
    return load_experiment([str(own), f"--start={folder}"]).load()


def through_the_command(*argv):
    if main([str(word) for word in argv]):
        raise ValueError("would run code")


DOORS = {
    "load_encoder": load_encoder,
    "load_run": lambda folder: load_run(folder, ["compute_features"]),
    "export_run": export_run,
    "export_for_inference": lambda folder: export_for_inference(
        folder / "hyperparams.yaml", {}, folder / "out"
    ),
    "inference folder": lambda folder: load_encoder(inference_of(folder)),
    "extract": lambda folder: through_the_command(
        "extract", folder, ROOT / "tests" / "no_audio.txt", folder / "out.npz"
    ),
    "export": lambda folder: through_the_command("export", folder),
    "extends": extends,
    "pretrained": lambda folder: load_experiment(
        [str(HPARAMS / "qmargin_lm.yaml"), f"--pretrained={folder}"]
    ).load(),
    "score anew": lambda folder: RunFolder(
        load_experiment([str(HPARAMS / "qmargin.yaml"), f"--output_folder={folder}"])
    ).check(),
}


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS.keys())
def test_no_door_runs_the_code_of_a_folder(run, door, tmp_path, capsys):
    folder, marker = run
    (tmp_path / "list.txt").write_text("a a.wav\n")
    with pytest.raises((ValueError, OSError)) as error:
        door(folder)
    assert not marker.exists()
    told = str(error.value) + capsys.readouterr().err
    assert "would run code" in told or "another experiment" in told or "no_audio" in told


def test_the_extract_command_refuses_and_says_how_to_mean_it(run, tmp_path, capsys):
    folder, marker = run
    (tmp_path / "list.txt").write_text("a a.wav\n")
    argv = ["extract", str(folder), str(tmp_path / "list.txt"), str(tmp_path / "out.npz")]
    assert main(argv) == 1
    told = capsys.readouterr().err
    assert "hyperparams.yaml: !apply:builtins.eval would run code" in told
    assert "--trust" in told
    assert not marker.exists()
    assert main([*argv, "--trust"]) == 1  # the recording does not exist, but the folder was loaded
    assert marker.exists()


def test_weights_that_are_more_than_tensors_are_refused(run, tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "MARKER",)

    folder, marker = run
    (folder / "hyperparams.yaml").write_text(NETWORK.format(bands=20))
    file = next(folder.glob("save/CKPT*")) / "embedding_model.ckpt"
    torch.save({"weight": Payload()}, file)
    with pytest.raises(OSError, match=r"embedding_model\.ckpt: damaged, or not weights alone"):
        load_encoder(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    "change",
    [
        "save_folder: {place}",
        "train_logger: !new:speechbrain.utils.train_logger.FileTrainLogger [{place}]",
        "train_logger: !new:speechbrain.utils.train_logger.FileTrainLogger {{save_file: {place}}}",
        "checkpointer: !new:speechbrain_qmargin.training.checkpoints.AtomicCheckpointer\n"
        "    checkpoints_dir: !ref <output_folder>/../victim",
    ],
)
def test_a_folder_does_not_choose_where_a_run_writes(tmp_path, change):
    own = {"output_folder": str(tmp_path / "own"), "size": "mini"}
    parent = tmp_path / "run"
    parent.mkdir()
    text = compose(HPARAMS / "qmargin.yaml", own)
    (parent / "experiment.yaml").write_text(text)
    start = HPARAMS / "qmargin_lm.yaml", {"pretrained": str(parent)}
    compose(*start)

    key = change.partition(":")[0]
    kept, skipping = [], False
    for line in text.splitlines():
        skipping = line.startswith(f"{key}:") or (skipping and line.startswith((" ", "\t")))
        kept += [] if skipping else [line]
    changed = "\n".join([*kept, change.format(place=tmp_path / "victim")]) + "\n"
    (parent / "experiment.yaml").write_text(changed)
    with pytest.raises(
        ValueError, match=r"experiment\.yaml: .*victim is outside the output folder"
    ):
        compose(*start)
    assert "victim" in compose(*start, trust=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sample_rate: 16000\nmodules: 3", "its modules are not a mapping"),
        ("sample_rate: 16000\nmodules: [1]", "its modules are not a mapping"),
        ("sample_rate: 1000000000\nmodules: {}", "sample_rate is 1000000000; 1000 to 768000"),
        ("sample_rate: [16000]\nmodules: {}", r"sample_rate is \[16000\]; 1000 to 768000"),
        ("sample_rate: 16000\nimage_size: 99999\nmodules: {}", "image_size is 99999; 8 to 4096"),
    ],
)
def test_what_decides_about_memory_is_a_number_of_its_size(text, message, tmp_path):
    (tmp_path / "hyperparams.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"hyperparams\.yaml: {message}"):
        hyperparams_tree(tmp_path / "hyperparams.yaml")


@pytest.mark.parametrize("size", ["", "image_size: 112\n"])
def test_a_folder_that_defines_no_network_is_named(size, tmp_path):
    (tmp_path / "hyperparams.yaml").write_text(f"sample_rate: 16000\n{size}modules: {{x: 1}}\n")
    (tmp_path / "embedding_model.ckpt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"hyperparams\.yaml: no .*embedding_model in modules"):
        load_any_encoder(tmp_path)
