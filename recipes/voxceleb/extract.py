"""Embeddings of any recordings with a trained encoder.

    python recipes/voxceleb/extract.py RUN_FOLDER AUDIO OUT

RUN_FOLDER is a run's output folder or an inference folder. AUDIO is a folder or a text file: a path
a line, or an id and a path. A folder in a layout of VoxCeleb (wav/<speaker>/..., dev/aac/<speaker>/
..., vox1_test_wav/wav/<speaker>/...) names its recordings as trial lists do, from the speaker on;
any other folder by their path below it; which of the two is said. OUT ends in .npz, or in .ark or
.scp for Kaldi's pair.

Every recording is embedded whole and on its own. What cannot be is listed in OUT.skipped.tsv. An
interrupted extraction, started again, goes on where it was.
"""

import argparse
import shutil
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from speechbrain_qmargin.data.audio import AUDIO_SUFFIXES, MIN_SECONDS, read_audio
from speechbrain_qmargin.data.folders import audio_files
from speechbrain_qmargin.data.voxceleb import audio_roots
from speechbrain_qmargin.embeddings import save_embeddings
from speechbrain_qmargin.export.encoder import load_encoder
from speechbrain_qmargin.extras import require
from speechbrain_qmargin.files import replacing, write_text
from speechbrain_qmargin.training.extraction import EmbeddingParts


def find_recordings(audio: Path) -> dict[str, Path]:
    """Id to file, of a folder or of a list."""
    if audio.is_dir():
        return recordings_in(audio)
    found = {}
    for number, line in enumerate(audio.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        if line.rstrip().endswith("|"):
            raise ValueError(f"{audio}:{number}: {line!r} is a command; only files are read")
        name, _, path = line.strip().partition("\t" if "\t" in line else " ")
        if not path or Path(line.strip()).is_file():  # a path alone, perhaps with spaces in it
            name = path = line.strip()
        if name in found:
            raise ValueError(f"{audio}:{number}: {name} is there twice")
        found[name] = Path(path.strip())
    if not found:
        raise ValueError(f"{audio}: no recordings in it")
    return found


def recordings_in(folder: Path) -> dict[str, Path]:
    """Id to file: from the speaker on in a layout of VoxCeleb, else the path below the folder."""
    found = list(audio_files(folder))
    for one in found:
        if one.fault:
            print(f"{folder}: {one.name} is left out: {one.fault}")
    files = {one.name: Path(one.path) for one in found if not one.fault}
    if not files:
        raise FileNotFoundError(f"{folder}: no {', '.join(AUDIO_SUFFIXES)} file in it")
    try:
        roots = [root.relative_to(folder).as_posix() + "/" for root in audio_roots(folder)]
    except FileNotFoundError:
        roots = []
    ids = {}
    for name in files:
        root = next((root for root in roots if name.startswith(root)), None)
        if root is not None:
            ids[name] = name.removeprefix(root)
    if ids and len(set(ids.values())) == len(ids) and all("/" in one for one in ids.values()):
        print(f"{folder}: recordings are named from their speaker on, below {', '.join(roots)}")
        if len(ids) < len(files):
            print(f"{folder}: {len(files) - len(ids):,} recordings elsewhere are not embedded")
    else:
        ids = {name: name for name in files}
        print(f"{folder}: recordings are named by their path below it")
    return {ids[name]: files[name] for name in sorted(ids, key=ids.get)}


def decoded(recordings: dict[str, Path], sample_rate: int, workers: int):
    """(id, samples or None, what is wrong) of every recording in order, read ahead by threads."""

    def read(path):
        try:
            signal = read_audio(path, sample_rate)
        except OSError as error:
            return None, str(error)
        if len(signal) < MIN_SECONDS * sample_rate:
            return None, f"{path}: shorter than {MIN_SECONDS} s"
        if signal.min() == signal.max():
            return None, f"{path}: silent, all samples are equal"
        return signal, ""

    with ThreadPoolExecutor(workers) as pool:
        items = iter(recordings.items())
        ahead = deque((name, pool.submit(read, path)) for name, path in islice(items, 2 * workers))
        while ahead:
            name, future = ahead.popleft()
            for next_name, path in islice(items, 1):
                ahead.append((next_name, pool.submit(read, path)))
            yield name, *future.result()


def write_embeddings(out: Path, embeddings: dict[str, np.ndarray]) -> None:
    if out.suffix == ".npz":
        save_embeddings(out, embeddings)
        return
    import kaldiio

    ark, scp = out.with_suffix(".ark"), out.with_suffix(".scp")
    with replacing(ark) as partial, replacing(scp) as index:
        kaldiio.save_ark(str(partial), embeddings, scp=str(index))
        text = index.read_text(encoding="utf-8")
        index.write_text(text.replace(str(partial), str(ark.resolve())), encoding="utf-8")


def check_output(out: Path, recordings: dict[str, Path]) -> None:
    if out.suffix not in (".npz", ".ark", ".scp"):
        raise ValueError(f"{out}: embeddings are written as .npz, .ark or .scp")
    if out.exists():
        raise FileExistsError(f"{out} is there already; delete it, or give another OUT")
    if out.suffix != ".npz":
        require("kaldiio", why=f"{out}: Kaldi's files", extra="kaldi")
        spaced = [name for name in recordings if len(name.split()) != 1]
        if spaced:
            raise ValueError(f"{out}: Kaldi's ids have no spaces, as {spaced[0]!r} has; use .npz")


def extract(run_folder, audio, out, device: str = "cpu", workers: int = 4) -> None:
    """The whole job; see the top of this file."""
    audio, out = Path(audio), Path(out)
    recordings = find_recordings(audio)
    check_output(out, recordings)
    encoder = load_encoder(run_folder, device)
    parts = EmbeddingParts(
        out.with_name(out.name + ".parts"), f"{encoder.digest()} on {audio.resolve()}"
    )
    todo = {name: path for name, path in recordings.items() if name not in parts.done}
    if len(todo) < len(recordings):
        print(f"{len(recordings) - len(todo):,} recordings were embedded before", flush=True)

    skipped = {}
    try:
        with tqdm(total=len(todo), desc="embeddings", unit=" recordings") as bar:
            for name, signal, fault in decoded(todo, encoder.sample_rate, workers):
                if not fault:
                    with torch.inference_mode():
                        embedding = encoder(signal[None].to(device))[0].float().cpu().numpy()
                    if np.isfinite(embedding).all():
                        parts.add(name, embedding)
                    else:
                        fault = f"{recordings[name]}: its embedding is not finite"
                if fault:
                    skipped[name] = fault
                bar.update()
    finally:
        parts.flush()
    embeddings = parts.merged(recordings)
    if not embeddings:
        raise OSError(f"{audio}: no recording could be embedded: {next(iter(skipped.values()))}")
    if skipped:
        listing = out.with_name(out.name + ".skipped.tsv")
        write_text(listing, "".join(f"{name}\t{fault}\n" for name, fault in skipped.items()))
        print(f"{len(skipped):,} recordings skipped, listed in {listing}; the first: "
              f"{next(iter(skipped.values()))}")  # fmt: skip
    write_embeddings(out, embeddings)
    shutil.rmtree(parts.folder)
    dim = len(next(iter(embeddings.values())))
    print(f"{out}: {len(embeddings):,} embeddings of {dim} values")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_folder")
    parser.add_argument("audio", help="a folder or a list")
    parser.add_argument("out", help=".npz, .ark or .scp")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num_workers", type=int, default=4, help="threads that read audio")
    args = parser.parse_args(argv)
    try:
        extract(args.run_folder, args.audio, args.out, args.device, args.num_workers)
    except (ValueError, OSError, ImportError) as error:
        print(f"extract.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
