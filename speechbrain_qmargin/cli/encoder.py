"""The subcommands of a trained encoder: extract, export."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

__all__ = ["configure"]

EXTRACT = """
RUN is a run's output folder or an inference folder. AUDIO is a folder or a text file: a path a
line, or an id and a path. A folder in a layout of VoxCeleb (wav/<speaker>/..., dev/aac/<speaker>/
..., vox1_test_wav/wav/<speaker>/...) names its recordings as trial lists do, from the speaker on;
any other folder by their path below it; which of the two is said. OUT ends in .npz, or in .ark or
.scp for Kaldi's pair.

Every recording is embedded whole and on its own. What cannot be is listed in OUT.skipped.tsv. An
interrupted extraction, started again, goes on where it was.
"""
EXPORT = """
Writes RUN/inference/ anew from the run's checkpoints. A FILE of `qmargin report` whose scores are
plain cosines becomes the folder's threshold.
"""
TRUST = """
A run's folder executes nothing: its YAML may name networks, features, losses, optimisers and
loggers of this package, torch and SpeechBrain, and its weights are tensors alone. A run with a
network of your own wants --trust; with it the folder can run any code, as a program of its author.
"""


def _extract(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from speechbrain_qmargin.export import recordings as module
    from speechbrain_qmargin.export.encoder import load_encoder
    from speechbrain_qmargin.files import refuse_overwriting, write_text

    audio, out = Path(args.audio), Path(args.out)
    refuse_overwriting([out], [audio])
    recordings = module.find_recordings(audio)
    module.check_output(out, recordings)
    encoder = load_encoder(args.run_folder, args.device or _device(), args.trust)
    parts = out.with_name(out.name + ".parts")
    with tqdm(
        total=len(recordings), desc="embeddings", unit=" recordings", disable=args.quiet
    ) as bar:
        embeddings, faults = module.extract_recordings(
            encoder, recordings, parts, str(audio.resolve()), args.num_workers, bar.update
        )
    if not embeddings:
        raise OSError(f"{audio}: no recording could be embedded: {next(iter(faults.values()))}")
    if faults:
        listing = out.with_name(out.name + ".skipped.tsv")
        write_text(listing, "".join(f"{name}\t{fault}\n" for name, fault in faults.items()))
        print(
            f"{len(faults):,} recordings skipped, listed in {listing}; the first: "
            f"{next(iter(faults.values()))}"
        )
    module.write_embeddings(out, embeddings, encoder.digest())
    shutil.rmtree(parts)
    dim = len(next(iter(embeddings.values())))
    print(f"{out}: {len(embeddings):,} embeddings of {dim} values")


def _export(args: argparse.Namespace) -> None:
    from speechbrain_qmargin.export.encoder import load_encoder
    from speechbrain_qmargin.export.inference import export_run
    from speechbrain_qmargin.export.onnx import export_onnx
    from speechbrain_qmargin.files import refuse_overwriting
    from speechbrain_qmargin.scoring.decision import OperatingPoint

    refuse_overwriting([args.onnx] if args.onnx else [], [args.operating_point])
    point = OperatingPoint.load(args.operating_point) if args.operating_point else None
    folder = export_run(args.run_folder, operating_point=point, trust=args.trust)
    threshold = f", threshold {point.threshold:.4f}" if point else ""
    print(f"{folder}: for speechbrain.inference{threshold}")
    if args.onnx:
        encoder = load_encoder(folder, trust=args.trust)
        differences = export_onnx(encoder, args.onnx, from_waveform=not args.from_features)
        print(
            f"{args.onnx}: at most {max(differences.values()):.1e} of an embedding's length "
            f"from PyTorch, at {', '.join(differences)} (batch x length)"
        )


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def configure(add) -> None:
    """The subcommands that load a run; see :mod:`speechbrain_qmargin.cli`."""

    def loads(name: str, run, about: str) -> argparse.ArgumentParser:
        sub = add(name, run)
        sub.formatter_class = argparse.RawDescriptionHelpFormatter
        sub.description = f"{sub.description}\n{about}{TRUST}"
        sub.add_argument("run_folder", metavar="RUN", help="a run's output folder")
        sub.add_argument("--trust", action="store_true", help="let the folder's YAML run any code")
        return sub

    sub = loads("extract", _extract, EXTRACT)
    sub.add_argument("audio", metavar="AUDIO", help="a folder or a list")
    sub.add_argument("out", metavar="OUT", help=".npz, .ark or .scp")
    sub.add_argument("--device", help="cuda where there is a GPU, else cpu")
    sub.add_argument("--num_workers", type=int, default=4, help="threads that read audio")

    sub = loads("export", _export, EXPORT)
    sub.add_argument(
        "--operating_point", metavar="FILE", help="operating_point.json, chosen on cosines"
    )
    sub.add_argument("--onnx", metavar="OUT", help="file to write")
    sub.add_argument(
        "--from_features", action="store_true", help="ONNX that takes features, not waveforms"
    )
