"""The subcommands of a trained encoder: extract, export, pairs."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from speechbrain_qmargin.cli import GOES_ON
from speechbrain_qmargin.cli.inputs import add_encoder, add_overwrite, find_inputs

__all__ = ["configure"]

EXTRACT = """
    qmargin extract results/voxceleb/full/resnet34_qmargin/0 recordings embeddings.npz

ENCODER is a run's output folder, an inference folder or a published model (a file of weights or its
folder). OUTPUT ends in .npz, or in .ark or .scp for Kaldi's pair of files.

Speech: SOURCE is a folder, or a text file with a path, or an id and a path, on each line. In a
folder with a layout of VoxCeleb (wav/<speaker>/..., dev/aac/<speaker>/...,
vox1_test_wav/wav/<speaker>/...) recordings are named as in trial lists, from the speaker on; in any
other folder by their path below it. The command says which. Every recording is embedded whole and
on its own.

Faces: SOURCE is a folder of aligned images (named by their path below it, or below its images/), a
text file as above, a .rec file or a folder of .tar shards (named <identity>/<key>), or a .bin set.

Files that cannot be embedded are listed in OUTPUT.skipped.tsv. An interrupted extraction resumes
when the same command is started again.
"""
EXPORT = """
    qmargin export encoder --operating_point report/operating_point.json --onnx encoder.onnx

Of a run ENCODER/inference/ is rebuilt from its checkpoints. With --operating_point the threshold
that `qmargin report` chose on plain cosines is stored in that folder. Of an inference folder or a
published model only the files that the options name are written.
"""
PAIRS = """
    qmargin pairs backbone.pth lfw.bin cfp_fp.bin agedb_30.bin

Ten-fold accuracy and TAR@FAR=1e-3 of a face encoder on each SET: one of InsightFace's .bin files,
or a text list of pairs (`label image image`, or LFW's own pairs.txt) of images below --images.
The output folder gets pairs.json and, for each set, a folder with the unrounded scores and the DET
plot. An interrupted extraction resumes when the same command is started again.
"""
TRUST = """
Loading a run's folder executes no code from it: its YAML may name only networks, features, losses,
optimisers and loggers of this package, torch and SpeechBrain, and weights are loaded as tensors
alone. A run with a network of your own needs --trust; the folder can then run any code.
"""


def _extract(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from speechbrain_qmargin.data.skipped import write_listing
    from speechbrain_qmargin.export.encoder import SpeakerEncoder
    from speechbrain_qmargin.export.loading import load_any_encoder
    from speechbrain_qmargin.export.recordings import extract_recordings
    from speechbrain_qmargin.export.sources import check_output, output_files, write_embeddings
    from speechbrain_qmargin.files import refuse_overwriting

    source, out = Path(args.source), Path(args.output)
    outputs = output_files(out)
    refuse_overwriting(outputs, [source], args.overwrite)
    check_output(out, ())
    encoder = load_any_encoder(args.encoder, args.device or _device(), args.trust, args.flip, print)
    speech = isinstance(encoder, SpeakerEncoder)
    what = "recording" if speech else "image"
    inputs = find_inputs(source, speech=speech, quiet=args.quiet)
    check_output(out, inputs.items)
    flip = "" if speech else f"; flip {encoder.flip}"
    print(f"{source}: {what}s are named {inputs.named}{flip}")
    parts, about = out.with_name(out.name + ".parts"), str(source.resolve())
    with tqdm(total=len(inputs.items), desc="embeddings", disable=args.quiet, unit="") as bar:
        if speech:
            embeddings, faults = extract_recordings(
                encoder, inputs, parts, about, args.num_workers, bar.update
            )
        else:
            embeddings, faults = _embedded(encoder, inputs, parts, about, args, bar)
    if not embeddings:
        raise OSError(f"{source}: no {what} could be embedded: {next(iter(faults.values()))}")
    listing = out.with_name(out.name + ".skipped.tsv")
    write_listing(listing, faults)
    if faults:
        print(
            f"{len(faults):,} {what}s skipped, listed in {listing}; the first: "
            f"{next(iter(faults.values()))}"
        )
    write_embeddings(out, embeddings, encoder.digest())
    dim = len(next(iter(embeddings.values())))
    print(f"{out}: {len(embeddings):,} embeddings of {dim} values")
    del embeddings  # they lie in what goes now
    shutil.rmtree(parts)


def _export(args: argparse.Namespace) -> None:
    from speechbrain_qmargin.export.inference import export_run
    from speechbrain_qmargin.export.loading import load_any_encoder
    from speechbrain_qmargin.export.onnx import export_onnx
    from speechbrain_qmargin.export.toolkits import export_arcface_torch, export_wespeaker
    from speechbrain_qmargin.files import refuse_overwriting
    from speechbrain_qmargin.scoring.decision import OperatingPoint
    from speechbrain_qmargin.training.layout import is_run

    outputs = [one for one in (args.onnx, args.wespeaker, args.arcface_torch) if one]
    if args.wespeaker and Path(args.wespeaker).exists():  # with whatever lies in it
        raise FileExistsError(f"--wespeaker: {args.wespeaker} is there already; give a new folder")
    refuse_overwriting(outputs, [args.operating_point], args.overwrite)
    place = Path(args.encoder)
    if not is_run(place) and not outputs and not args.operating_point and place.exists():
        raise ValueError(f"{place}: no run; say what to write of it: --onnx, --wespeaker or "
                         "--arcface_torch")  # fmt: skip
    if is_run(place) or not outputs or args.operating_point:
        point = OperatingPoint.load(args.operating_point) if args.operating_point else None
        place = export_run(place, operating_point=point, trust=args.trust)
        threshold = f", threshold {point.threshold:.4f}" if point else ""
        print(f"{place}: the encoder alone{threshold}")
    if args.onnx:
        encoder = load_any_encoder(place, trust=args.trust, flip=args.flip, say=print)

        def say(step: str) -> None:
            if not args.quiet:
                print(f"{args.onnx}: {step}", file=sys.stderr, flush=True)

        differences = export_onnx(encoder, args.onnx, from_waveform=not args.from_features, say=say)
        print(
            f"{args.onnx}: at most {max(differences.values()):.1e} of an embedding's length "
            f"from PyTorch, at {', '.join(differences)} (batch x size)"
        )
    toolkits = ((args.wespeaker, export_wespeaker), (args.arcface_torch, export_arcface_torch))
    for output, write in toolkits:
        if output:
            encoder = load_any_encoder(place, trust=args.trust, say=print)
            print(f"{output}: {write(encoder, output)}")


def _pairs(args: argparse.Namespace) -> None:
    import json
    from dataclasses import asdict

    from speechbrain_qmargin.export.face_encoder import FaceEncoder
    from speechbrain_qmargin.export.loading import load_any_encoder
    from speechbrain_qmargin.faces.pair_sets import pair_set_figures
    from speechbrain_qmargin.files import refuse_overwriting, write_text
    from speechbrain_qmargin.scoring.plots import check_picture

    output = Path(args.output)
    sets = {}
    for path in map(Path, args.sets):
        if path.stem in sets:
            raise ValueError(f"two sets are called {path.stem}; their results would be one folder")
        sets[path.stem] = _read_pairs(path, args.images, args.quiet)
    refuse_overwriting([output / "pairs.json"], args.sets, args.overwrite)
    check_picture(output / "det.png")
    encoder = load_any_encoder(args.encoder, args.device or _device(), args.trust, args.flip, print)
    if not isinstance(encoder, FaceEncoder):
        raise ValueError(f"{args.encoder}: an encoder of speech")
    results, lines = {}, []
    for name, (images, pairs, same, about) in sets.items():
        found = _embed_all(encoder, images, output / name / "parts", about, args)
        rows = np.stack([found[image] for image in pairs])
        figures = pair_set_figures(output / name, name, pairs, rows, same)
        lines += [f"{name}: {one}" for one in figures]
        results[name] = [asdict(one) for one in figures]
    written = {"encoder": encoder.digest(), "flip": encoder.flip, "sets": results}
    write_text(
        output / "pairs.json", json.dumps(written, indent=2, default=np.ndarray.tolist) + "\n"
    )
    print("\n".join([f"flip {encoder.flip}", *lines, f"files: {output}/"]))


def _read_pairs(
    path: Path, folder: str | None, quiet: bool
) -> tuple[Any, list[str], np.ndarray, str]:
    """Images, their ids two a pair, which pairs are of one person, what the images are."""
    from speechbrain_qmargin.data.images import check_images
    from speechbrain_qmargin.data.pickled import read_bin
    from speechbrain_qmargin.export.images import find_images, select_images
    from speechbrain_qmargin.faces.pair_sets import check_folds
    from speechbrain_qmargin.tables import file_source
    from speechbrain_qmargin.trials import read_trials

    if path.suffix == ".bin":
        images, same = find_images(path), read_bin(path)[1]
        ids = list(images.items)
    else:
        if folder is None:
            raise ValueError(f"{path}: a list of pairs; say where its images are (--images FOLDER)")
        trials = read_trials(path)
        same = trials.is_target
        sides = np.stack((trials.enrolment, trials.test), axis=1).reshape(-1)
        ids = [trials.ids[row] for row in sides]
        images = select_images(find_images(folder, progress=not quiet), trials.ids, path)
    try:
        check_folds(same)
    except ValueError as error:
        raise ValueError(
            f"{path}: {error}; a list that is not in folds is for `qmargin cosine` and `report`"
        ) from None
    check_images({name: images.content(item) for name, item in images.items.items()})
    return images, ids, same, file_source(path)


def _embed_all(
    encoder, images, parts: Path, about: str, args: argparse.Namespace
) -> Mapping[str, np.ndarray]:
    from tqdm import tqdm

    with tqdm(total=len(images.items), desc=parts.parent.name, disable=args.quiet) as bar:
        embeddings, faults = _embedded(encoder, images, parts, about, args, bar)
    if faults:
        name, fault = next(iter(faults.items()))
        raise OSError(f"{len(faults)} images have no embedding, the first is {name}: {fault}")
    return embeddings


def _embedded(
    encoder, images, parts: Path, about: str, args: argparse.Namespace, bar
) -> tuple[Mapping[str, np.ndarray], dict[str, str]]:
    """Embeddings and faults of images, as the options say, counted on a bar."""
    from speechbrain_qmargin.export.images import extract_images

    return extract_images(
        encoder,
        images,
        parts,
        about,
        batch_size=args.batch_size,
        workers=args.num_workers,
        progress=bar.update,
    )


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def configure(add) -> None:
    """The subcommands that load a run; see :mod:`speechbrain_qmargin.cli`."""

    def loads(name: str, run, about: str) -> argparse.ArgumentParser:
        sub = add(name, run, about + TRUST)
        add_encoder(sub)
        return sub

    def flips(sub: argparse.ArgumentParser) -> None:
        choices = ("none", "sum", "concat")
        sub.add_argument("--flip", choices=choices, help="faces: how the embeddings of the image "
                         "and of its mirror image are combined (default: as the encoder was "
                         "tested)")  # fmt: skip

    def embeds(sub: argparse.ArgumentParser) -> None:
        sub.set_defaults(again=GOES_ON)
        sub.add_argument(
            "--device", help="where the encoder runs (default: cuda if there is a GPU, else cpu)"
        )
        sub.add_argument("--num_workers", type=int, default=4, help="threads that read files")
        sub.add_argument("--batch_size", type=int, default=64, help="images in a batch")
        flips(sub)

    sub = loads("extract", _extract, EXTRACT)
    sub.add_argument("source", metavar="SOURCE", help="a folder, a list, or a file of images")
    sub.add_argument("output", metavar="OUTPUT", help="file to write: .npz, .ark or .scp")
    add_overwrite(sub)
    embeds(sub)

    sub = loads("pairs", _pairs, PAIRS)
    sub.add_argument("sets", metavar="SET", nargs="+", help="a .bin file or a list of pairs")
    sub.add_argument("--images", metavar="FOLDER", help="where the images of text lists lie")
    sub.add_argument("--output", default="pairs", help="folder to write")
    add_overwrite(sub)
    embeds(sub)

    sub = loads("export", _export, EXPORT)
    sub.add_argument(
        "--operating_point", metavar="FILE", help="operating_point.json, chosen on plain cosines"
    )
    sub.add_argument("--onnx", metavar="FILE", help="write an ONNX file")
    add_overwrite(sub)
    sub.add_argument("--wespeaker", metavar="FOLDER", help="write a folder for WeSpeaker, with "
                     "avg_model.pt and config.yaml")  # fmt: skip
    sub.add_argument("--arcface_torch", metavar="FILE", help="write a face backbone's weights for "
                     "arcface_torch")  # fmt: skip
    flips(sub)
    sub.add_argument(
        "--from_features", action="store_true", help="the ONNX file takes features, not waveforms"
    )
