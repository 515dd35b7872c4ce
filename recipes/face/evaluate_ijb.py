"""Score IJB-B or IJB-C 1:1 from the embeddings of its images, with intervals over subjects.

    python recipes/face/evaluate_ijb.py --ijb FOLDER --target IJBC --encoder results/face/full/...
    python recipes/face/evaluate_ijb.py --ijb FOLDER --target IJBC --encoder backbone.pth
    python recipes/face/evaluate_ijb.py --ijb FOLDER --target IJBC --embeddings images.npz

The embeddings are those of a run of recipes/face/train.py, of a model that arcface_torch, AdaFace
or CVLface published, or an npz of `ids`, `embeddings` and `mirrored` (or the cache folder of an
extraction). FOLDER holds meta/ and loose_crop/ as the official release does. The table, its figures
as JSON, the unrounded scores and the ROC and DET plots go to the output folder: <run>/<target>, or
beside the checkpoint or embeddings <name>_<target>. docs/face_evaluation.md has the protocol.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from speechbrain_qmargin.cli import GOES_ON, HelpFormatter, status_of
from speechbrain_qmargin.export.face_encoder import FaceEncoder
from speechbrain_qmargin.export.loading import load_any_encoder
from speechbrain_qmargin.faces.ijb import (
    IJBOptions,
    evaluate_ijb,
    extract_ijb,
    identify_ijb,
    load_image_embeddings,
    read_ijb,
    sweep_table,
)
from speechbrain_qmargin.faces.pair_sets import FLIPS
from speechbrain_qmargin.files import write_text
from speechbrain_qmargin.loss.device import usable_device
from speechbrain_qmargin.training.layout import is_run

SWITCH = argparse.BooleanOptionalAction


def embed(ijb, args, cache):
    """The images of FOLDER/loose_crop by the model; interrupted, it goes on."""
    device = usable_device(args.device)
    encoder = load_any_encoder(args.encoder, device, args.trust, "none", print)  # mirrored below
    if not isinstance(encoder, FaceEncoder):
        raise ValueError(f"{args.encoder}: an encoder of speech")

    @torch.inference_mode()
    def forward(images):
        return encoder.embed(images.to(device)).float().cpu()

    places = Path(args.ijb) / "loose_crop", Path(args.ijb) / args.target / "loose_crop"
    return extract_ijb(
        forward,
        next((place for place in places if place.is_dir()), places[0]),
        ijb,
        cache,
        args.batch_size,
        model=encoder.digest(),
        image_size=encoder.image_size,
    )


def default_folder(args):
    """One for each model, so that none is overwritten by another's results."""
    source = Path(args.embeddings or args.encoder)
    if is_run(source):
        return source / args.target
    return source.with_name(f"{source.stem if source.is_file() else source.name}_{args.target}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--ijb", required=True, help="folder with meta/ and loose_crop/")
    parser.add_argument("--target", default="IJBC", choices=("IJBB", "IJBC"), help="which protocol")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--embeddings", help="npz of the images, or the cache of an extraction")
    source.add_argument("--encoder", help="embed the images with this run, inference folder or "
                        "published model")  # fmt: skip
    parser.add_argument("--trust", action="store_true", help="let the encoder's YAML run any code")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="where the model runs")
    parser.add_argument("--batch_size", default=128, type=int, help="images in a batch")
    parser.add_argument("--flip", default="sum", choices=FLIPS, help="how the embeddings of the "
                        "image and of its mirror image are combined")  # fmt: skip
    parser.add_argument("--use_norm_score", default=True, action=SWITCH, help="weight an image by "
                        "the length of its embedding")  # fmt: skip
    parser.add_argument("--use_detector_score", default=True, action=SWITCH, help="weight an image "
                        "by the detector's score")  # fmt: skip
    parser.add_argument("--search", action="store_true", help="run the 1:N protocol too, by its "
                        "lists in meta/")  # fmt: skip
    parser.add_argument("--all_options", action="store_true", help="also print a table of every "
                        "combination of the three options")  # fmt: skip
    parser.add_argument("--output", help="folder to write (default: <run>/<target>, or "
                        "<name>_<target> beside the model or the embeddings)")  # fmt: skip
    args = parser.parse_args(argv)

    folder = Path(args.output or default_folder(args))
    ijb = read_ijb(args.ijb, args.target)
    if args.embeddings is None:
        images = embed(ijb, args, folder / "cache")
    else:
        images = load_image_embeddings(args.embeddings, ijb)
    options = IJBOptions(args.flip, args.use_norm_score, args.use_detector_score)
    result = evaluate_ijb(ijb, images, options)
    result.save(folder)
    print(result.table())
    if args.search:
        with tqdm(desc="searches", unit=" probes", leave=False) as progress:
            search = identify_ijb(ijb, images, options, progress=progress.update)
        search.save(folder)
        print(f"\n{search.table()}")
    if args.all_options:
        flips = FLIPS if images.mirrored is not None else ("none",)
        every = [
            IJBOptions(*each) for each in itertools.product(flips, (False, True), (False, True))
        ]
        table = sweep_table(ijb, images, tqdm(every, "options", leave=False))
        write_text(folder / "options.txt", table + "\n")
        print(f"\n{table}")
    print(f"\nfiles: {folder}/")


if __name__ == "__main__":
    sys.exit(status_of("evaluate_ijb.py", main, GOES_ON))
