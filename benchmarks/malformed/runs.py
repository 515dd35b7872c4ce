"""Folders of runs and their checkpoints."""

import contextlib
import io
import shutil
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from malformed.audio import sound
from malformed.kinds import Kind, NotRight, Touch, content, cut, error, flip, heard, listed
from speechbrain_qmargin.files import write_text

NETWORK = """
sample_rate: 16000
compute_features: !new:speechbrain.lobes.features.Fbank
    n_mels: {bands}
mean_var_norm: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
embedding_model: !new:torch.nn.Linear [20, 4]
modules: {{compute_features: !ref <compute_features>, mean_var_norm: !ref <mean_var_norm>,
    embedding_model: !ref <embedding_model>}}
output_folder: {folder}
"""


def runs(folder: Path) -> Iterator[Kind]:
    from speechbrain_qmargin.cli import main
    from speechbrain_qmargin.export.encoder import load_encoder, load_run
    from speechbrain_qmargin.export.inference import export_run
    from speechbrain_qmargin.published import load_published
    from speechbrain_qmargin.training.checkpoints import AtomicCheckpointer
    from speechbrain_qmargin.training.config import load_experiment
    from speechbrain_qmargin.training.run_folder import RunFolder
    from speechbrain_qmargin.training.trust import load_checked

    marker = folder / "MARKER"
    shell = f"['touch {marker}']"
    documents = {
        "!apply": f"x: !apply:subprocess.getoutput {shell}",
        "!new": f"x: !new:subprocess.Popen [['touch', '{marker}']]",
        "!name": "x: !name:os.system",
        "!module": "x: !module:os",
        "!include": "x: !include:other.yaml",
        "!applyref": f"x: !applyref:os.system {shell}",
        "a tag within": f"x: {{y: [1, {{z: !apply:os.system {shell}}}]}}",
        "a tag in a key": f"? !apply:os.system {shell}\n: 1",
        "Python's tag": f"x: !!python/object/apply:os.system {shell}",
        "Python's tag in full": f"x: !<tag:yaml.org,2002:python/object/apply:os.system> {shell}",
        "a directive": "%TAG !e! tag:yaml.org,2002:python/object/\n---\nx: !e!apply:os.system "
        + shell,
        "a tuple": f"x: (!!python/object/apply:os.system {shell})",
        "a tuple in quotes": f"x: '(!!python/object/apply:os.system [\"touch {marker}\"])'",
        "a tuple by reference": (
            f"a: '!!python/object/apply:os.system [touch {marker}]'\nx: !ref (<a>)"
        ),
        "an attribute": "a: !new:torch.nn.Identity\nx: !ref <a.__init__>",
        "getattr": "a: !new:torch.nn.Identity\nx: !apply:getattr [!ref <a>, __init__]",
        "os through a module of ours": f"x: !apply:speechbrain_qmargin.files.os.system {shell}",
        "our writer of files": f"x: !apply:speechbrain_qmargin.files.write_text ['{marker}', '']",
        "torch's download": "x: !apply:torch.hub.download_url_to_file [a, b]",
        "SpeechBrain's download": "x: !apply:speechbrain.utils.fetching.fetch [a, b]",
        "SpeechBrain's shell": f"x: !apply:speechbrain.utils.superpowers.run_shell {shell}",
        "a pickle": "x: !apply:torch.load [a]",
        "a loss of its own": "loss: antigravity.fly",
        "a reader of its own": "reader: subprocess.getoutput",
        "no YAML": "x: [1",
    }
    for name, text in documents.items():
        call = lambda text=text: load_checked(text, "run/hyperparams.yaml")  # noqa: E731
        yield error(f"hyperparams.yaml with {name}", call, "run/hyperparams.yaml", unless=marker)

    levels = list(zip("bcdefghij", "abcdefghi", strict=True))
    lists = {
        kind: "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{n}: &{n} [{', '.join([form.format(m)] * 9)}]\n" for n, m in levels)
        for kind, form in (("aliases", "*{}"), ("references", "!ref <{}>"))
    }
    bombs = {
        "aliases of aliases": lists["aliases"],
        "references to references": lists["references"],
        "texts of texts": "a: xxxxxxxxx\n"
        + "".join(f"{n}: !ref {f'<{m}>' * 9}\n" for n, m in levels),
        "a power of powers": "a: 9\nx: !ref <a>**<a>**<a>**<a>",
        "a reference to itself": "x: !ref <x>",
        "300 brackets": f"x: {'[' * 300}{']' * 300}",
    }
    for name, text in bombs.items():
        call = lambda text=text: load_checked(text, "run/hyperparams.yaml")  # noqa: E731
        yield error(f"hyperparams.yaml with {name}", call, "run/hyperparams.yaml", "not a YAML")
    for name, text in {"aliases of aliases": f"{lists['aliases']}model: *j\n",
                       "300 brackets": bombs["300 brackets"]}.items():  # fmt: skip
        exp = content(folder / f"exp_{len(text)}" / "config.yaml", text).parent
        torch.save({"x": torch.zeros(1)}, exp / "avg_model.pt")
        call = lambda exp=exp: load_published(f"wespeaker:{exp}")  # noqa: E731
        yield error(f"a published config.yaml with {name}", call, "config.yaml")

    model = torch.nn.Linear(20, 4)
    run = folder / "run"
    AtomicCheckpointer(run / "save", {"embedding_model": model}).save_checkpoint()
    bands = f"!apply:builtins.eval [\"__import__('pathlib').Path('{marker}').touch() or 20\"]"
    for name in ("hyperparams.yaml", "experiment.yaml"):
        write_text(run / name, NETWORK.format(bands=bands, folder=run))
    inference = folder / "inference"
    inference.mkdir(exist_ok=True)
    shutil.copy(run / "hyperparams.yaml", inference)
    torch.save(model.state_dict(), inference / "embedding_model.ckpt")
    own = folder / "own.yaml"
    write_text(own, "start: !PLACEHOLDER\nextends: <start>/experiment.yaml\n")
    sounds = folder / "list.txt"
    write_text(sounds, f"a {sound(folder / 'a.wav')}\n")
    hparams = Path(__file__).resolve().parents[2] / "hparams"

    def command(*words: object) -> None:
        with contextlib.redirect_stderr(io.StringIO()) as told, heard() as lines:
            code = main([str(word) for word in words])
        if code:
            raise ValueError(told.getvalue() + " ".join(lines))

    whole = folder / "whole"
    content(whole / "hyperparams.yaml", NETWORK.format(bands=20, folder=whole))
    weights = whole / "embedding_model.ckpt"
    torch.save(model.state_dict(), weights)
    data = weights.read_bytes()
    content(weights, data.replace(bits := model.weight.detach().numpy().tobytes(),
                                  bytes([bits[0] ^ 1]) + bits[1:]))  # fmt: skip
    yield error("weights with a flipped bit", lambda: load_encoder(whole), weights.name, "damaged")

    doors = {
        "load_encoder": lambda: load_encoder(run),
        "load_encoder, inference folder": lambda: load_encoder(inference),
        "load_run": lambda: load_run(run, ["compute_features"]),
        "export_run": lambda: export_run(run),
        "qmargin export": lambda: command("export", run),
        "qmargin extract": lambda: command("extract", run, sounds, folder / "out.npz"),
        "extends": lambda: load_experiment([str(own), f"--start={run}"]).load(),
        "--pretrained": lambda: load_experiment(
            [str(hparams / "qmargin_lm.yaml"), f"--pretrained={run}"]
        ).load(),
    }
    for name, door in doors.items():
        yield error(f"a run with code, by {name}", door, "would run code", unless=marker)

    def finished():
        experiment = load_experiment([str(hparams / "qmargin.yaml"), f"--output_folder={done}"])
        return RunFolder(experiment).announce_finished()

    done = folder / "done"
    for name, text in {"cut off": '{"settings', "a list": "[]", "empty": ""}.items():
        content(done / "results.json", text)
        experiment = load_experiment([str(hparams / "qmargin.yaml"), f"--output_folder={done}"])
        content(done / "experiment.yaml", experiment.text)
        write_text(done / "results.json", text)
        yield error(f"results.json, {name}", finished, "results.json")
    content(done / "results.json", "{}")
    content(done / "experiment.yaml", "x: [1")
    yield error("experiment.yaml, cut off", finished, "experiment.yaml")


def checkpoints(folder: Path) -> Iterator[Kind]:
    from speechbrain.utils.epoch_loop import EpochCounter

    from speechbrain_qmargin.training.brain import VerificationBrain
    from speechbrain_qmargin.training.checkpoints import AtomicCheckpointer, load_average

    marker = folder / "MARKER"
    payload = torch.nn.Linear(64, 8), EpochCounter(9)
    harms: dict[str, tuple[str, Callable[[Path], object]]] = {
        "weights cut off": ("layer.ckpt", lambda file: cut(file, 0.8)),
        "weights flipped": ("layer.ckpt", flip),
        "weights empty": ("layer.ckpt", lambda file: content(file, b"")),
        "weights of text": ("layer.ckpt", lambda file: content(file, "weights")),
        "weights that run code": ("layer.ckpt", lambda at: torch.save({"w": Touch(marker)}, at)),
        "no weights": ("layer.ckpt", lambda file: file.unlink()),
        "counter empty": ("counter.ckpt", lambda file: content(file, b"")),
        "counter of bytes": ("counter.ckpt", lambda file: content(file, b"\xff\xfe")),
        "CKPT.yaml empty": ("CKPT.yaml", lambda file: content(file, b"")),
        "CKPT.yaml cut off": ("CKPT.yaml", lambda file: content(file, "epoch: [1\n")),
        "CKPT.yaml of bytes": ("CKPT.yaml", lambda file: content(file, b"\0\xff\0")),
        "CKPT.yaml without its time": ("CKPT.yaml", lambda file: content(file, "epoch: 3\n")),
        "CKPT.yaml that runs code": ("CKPT.yaml", lambda file: content(
            file, f"x: !!python/object/apply:os.system ['touch {marker}']\n")),
        "no CKPT.yaml": ("CKPT.yaml", lambda file: file.unlink()),
    }  # fmt: skip
    for name, (file, harm) in harms.items():

        def recovered(
            file: str = file, harm: Callable = harm, place: Path = folder / "newest"
        ) -> str:
            shutil.rmtree(place, ignore_errors=True)
            layer, counter = payload
            saver = AtomicCheckpointer(place, {"layer": layer, "counter": counter})
            for epoch in (1, 2):
                torch.nn.init.constant_(layer.weight, epoch)
                saver.save_checkpoint(meta={"epoch": epoch, "unixtime": epoch})
            harm(sorted(place.glob("CKPT*"))[-1] / file)
            again = AtomicCheckpointer(place, {"layer": layer, "counter": counter})
            found = again.recover_if_possible()
            if marker.exists():
                raise NotRight("code ran")
            return f"epoch {found.meta['epoch'] if found else None} is taken"

        yield listed(
            f"the newest checkpoint, {name}",
            recovered,
            f"{file}",
            "the checkpoint before it is taken",
            "epoch 1 is taken",
        )

    def all_damaged(call: Callable[[AtomicCheckpointer], object]) -> None:
        shutil.rmtree(folder / "all", ignore_errors=True)
        saver = AtomicCheckpointer(folder / "all", {"layer": payload[0]})
        saver.save_checkpoint(meta={"epoch": 1})
        content(next((folder / "all").glob("CKPT*/layer.ckpt")), b"")
        call(saver)

    said = "no checkpoint is whole"
    resume = lambda: all_damaged(lambda saver: saver.recover_if_possible())  # noqa: E731
    yield error("every checkpoint damaged", resume, said, "layer.ckpt")
    average = lambda: all_damaged(lambda saver: load_average({"layer": layer}, saver, 2))  # noqa: E731
    layer = payload[0]
    yield error("every checkpoint damaged, the average", average, said)

    def another_model() -> None:
        shutil.rmtree(folder / "another", ignore_errors=True)
        AtomicCheckpointer(folder / "another", {"layer": payload[0]}).save_checkpoint()
        small = AtomicCheckpointer(folder / "another", {"layer": torch.nn.Linear(2, 2)})
        small.recover_if_possible()

    yield error("a checkpoint of another model", another_model, "layer.ckpt", "size mismatch")
    brain = VerificationBrain.__new__(VerificationBrain)
    brain.hparams = types.SimpleNamespace(output_folder=folder)
    good = ['{"epoch": 1, "seconds": 1}', '{"epoch": 3, "seconds": 1}']
    for name, line in {"an empty line": "", "half a line": '{"epoch": 2, "sec', "a list": "[]",
                       "nothing in it": "{}", "bytes": "\udcff\udcfe"}.items():  # fmt: skip

        def epochs(line: str = line) -> str:
            text = "\n".join([good[0], line, good[1]]).encode("utf-8", "surrogateescape")
            content(folder / "history.jsonl", text)
            return f"epochs {[record['epoch'] for record in brain.history()]}"

        yield listed(f"history.jsonl, {name}", epochs, "history.jsonl:2", "epochs [1, 3]")
