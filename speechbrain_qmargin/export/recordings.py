"""Embeddings of any recordings with a trained encoder: a folder or a list in, one file out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speechbrain_qmargin.data.audio import AUDIO_SUFFIXES, MIN_SECONDS, read_audio
from speechbrain_qmargin.data.folders import audio_files
from speechbrain_qmargin.data.voxceleb import audio_roots
from speechbrain_qmargin.embeddings import save_embeddings
from speechbrain_qmargin.export.encoder import SpeakerEncoder
from speechbrain_qmargin.extraction import EmbeddingParts, extract_into
from speechbrain_qmargin.extras import require
from speechbrain_qmargin.files import replacing

__all__ = ["check_output", "extract_recordings", "find_recordings", "write_embeddings"]


def find_recordings(audio: Path) -> dict[str, Path]:
    """Id to file, of a folder or of a list."""
    if audio.is_dir():
        return _recordings_in(audio)
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


def _recordings_in(folder: Path) -> dict[str, Path]:
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
    return {ids[name]: files[name] for name in sorted(ids, key=lambda name: ids[name])}


def extract_recordings(
    encoder: SpeakerEncoder,
    recordings: Mapping[str, Path],
    folder: str | Path,
    about: str = "",
    workers: int = 4,
    progress: Callable[[int], Any] | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Embed recordings whole and one by one; interrupted, it goes on.

    Parameters
    ----------
    encoder : SpeakerEncoder
    recordings : mapping from id to path
    folder : path
        Where embeddings are kept on their way.
    about : str
        What tells the recordings from others of the same ids.
    workers : int
        Threads that read audio.
    progress : callable, optional
        Called with how many recordings were done since the last call.

    Returns
    -------
    embeddings : dict from id to float32 [D]
        In the order of the recordings.
    faults : dict from id to str
        What could not be embedded, and why.
    """
    parts = EmbeddingParts(folder, f"{encoder.digest()} on {about}")
    todo = {name: path for name, path in recordings.items() if name not in parts.done}
    progress = progress or (lambda count: None)
    progress(len(recordings) - len(todo))
    faults: dict[str, str] = {}

    def batches() -> Iterator[tuple[list[str], Tensor]]:
        for name, signal, fault in _decoded(todo, encoder.sample_rate, workers):
            if fault:
                faults[name] = fault
            else:
                yield [name], signal
            progress(1)

    def embed(signal: Tensor) -> Tensor:
        return encoder(signal[None].to(encoder.device))

    with torch.inference_mode():
        extract_into(parts, batches(), embed, faults)
    return parts.merged(recordings), faults


def _decoded(
    recordings: Mapping[str, Path], sample_rate: int, workers: int
) -> Iterator[tuple[str, Any, str]]:
    """(id, samples, what is wrong) of every recording in order, read ahead by threads."""

    def read(path: Path) -> tuple[Any, str]:
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


def write_embeddings(out: Path, embeddings: Mapping[str, np.ndarray], encoder: str = "") -> None:
    """Write ``.npz``, with the encoder's digest, or Kaldi's pair of ``.ark`` and ``.scp``."""
    if out.suffix == ".npz":
        save_embeddings(out, embeddings, encoder)
        return
    import kaldiio

    ark, scp = out.with_suffix(".ark"), out.with_suffix(".scp")
    with replacing(ark) as partial, replacing(scp) as index:
        kaldiio.save_ark(str(partial), embeddings, scp=str(index))
        text = index.read_text(encoding="utf-8")
        index.write_text(text.replace(str(partial), str(ark.resolve())), encoding="utf-8")


def check_output(out: Path, recordings: Mapping[str, Path]) -> None:
    """Refuse, before anything is computed, a file that could not be written, or is there."""
    if out.suffix not in (".npz", ".ark", ".scp"):
        raise ValueError(f"{out}: embeddings are written as .npz, .ark or .scp")
    if out.exists():
        raise FileExistsError(f"{out} is there already; delete it, or give another OUT")
    if out.suffix != ".npz":
        require("kaldiio", why=f"{out}: Kaldi's files", extra="kaldi")
        spaced = [name for name in recordings if len(name.split()) != 1]
        if spaced:
            raise ValueError(f"{out}: Kaldi's ids have no spaces, as {spaced[0]!r} has; use .npz")
