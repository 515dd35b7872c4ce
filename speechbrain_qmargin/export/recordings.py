"""Embeddings of any recordings with a trained encoder: a folder or a list in, one file out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speechbrain_qmargin.data.audio import AUDIO_SUFFIXES, MIN_SECONDS, read_audio
from speechbrain_qmargin.data.folders import audio_files
from speechbrain_qmargin.data.voxceleb import audio_roots
from speechbrain_qmargin.export.encoder import SpeakerEncoder
from speechbrain_qmargin.export.sources import read_list
from speechbrain_qmargin.extraction import Inputs, extract_items

__all__ = ["extract_recordings", "find_recordings"]


def find_recordings(audio: str | Path) -> Inputs:
    """What a folder or a list holds, with ids as trial lists write them.

    Parameters
    ----------
    audio : path
        A folder of recordings, at any depth: an id is the path below it, or in a layout of
        VoxCeleb the path from the speaker on; the result's `named` says which. A text file: a path
        a line, or an id and a path.

    Raises
    ------
    FileNotFoundError, ValueError
        Nothing there, no recording in the folder; a recording in the place of a folder; a list that
        does not fit, see :func:`~speechbrain_qmargin.export.sources.read_list`.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> (folder / "a.wav").touch()
    >>> _ = (folder / "recordings.txt").write_text(f"ann/1 {folder / 'a.wav'}")
    >>> list(find_recordings(folder / "recordings.txt").items), find_recordings(folder).named
    (['ann/1'], 'by their path below it')
    """
    audio = Path(audio)
    if not audio.exists():
        raise FileNotFoundError(f"{audio}: no such folder or list of recordings")
    if audio.is_dir():
        return _recordings_in(audio)
    if audio.suffix.lower() in AUDIO_SUFFIXES:
        raise ValueError(f"{audio}: a recording; give its folder, or a list of recordings")
    return Inputs(read_list(audio, "recordings"), named="as the list names them")


def _recordings_in(folder: Path) -> Inputs:
    """Named from the speaker on in a layout of VoxCeleb, else by the path below the folder."""
    found = list(audio_files(folder))
    faults = {one.name: one.fault for one in found if one.fault}
    files = {one.name: Path(one.path) for one in found if not one.fault}
    if not found:
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
        named = f"from their speaker on, below {', '.join(roots)}"
        if len(ids) < len(files):
            named += f"; {len(files) - len(ids):,} elsewhere are not embedded"
    else:
        ids = {name: name for name in files}
        named = "by their path below it"
    items = {ids[name]: files[name] for name in sorted(ids, key=lambda name: ids[name])}
    return Inputs(items, Path, faults, named)


def extract_recordings(
    encoder: SpeakerEncoder,
    recordings: Inputs,
    folder: str | Path,
    about: str = "",
    workers: int = 4,
    progress: Callable[[int], Any] | None = None,
) -> tuple[Mapping[str, np.ndarray], dict[str, str]]:
    """Embed recordings whole and one by one; interrupted, it goes on.

    Parameters
    ----------
    encoder : SpeakerEncoder
    recordings : Inputs
        Of files.
    folder : path
        Where embeddings are kept on their way, and where those that are returned lie.
    about : str
        What tells the recordings from others of the same ids.
    workers : int
        Threads that read audio.
    progress : callable, optional
        Called with how many recordings were done since the last call.

    Returns
    -------
    embeddings : mapping from id to float32 [D]
        In the order of the recordings.
    faults : dict from id to str
        What could not be embedded, and why.

    Examples
    --------
    >>> import soundfile
    >>> same, network = torch.nn.Identity(), torch.nn.Linear(16000, 4)      # of one second
    >>> parts = {"compute_features": same, "mean_var_norm": same, "embedding_model": network}
    >>> folder = getfixture("tmp_path")
    >>> soundfile.write(folder / "a.wav", np.sin(np.arange(16000)), 16000)
    >>> soundfile.write(folder / "b.wav", np.zeros(16000), 16000)
    >>> recordings = Inputs({"ann/a": folder / "a.wav", "bob/b": folder / "b.wav"})
    >>> found, faults = extract_recordings(SpeakerEncoder(parts), recordings, folder / "parts")
    >>> found["ann/a"].shape, faults
    ((4,), {'bob/b': '...b.wav: silent, all samples are equal'})
    """

    def read(path: Path) -> Tensor:
        signal = read_audio(path, encoder.sample_rate)
        if len(signal) < MIN_SECONDS * encoder.sample_rate:
            raise ValueError(f"{path}: shorter than {MIN_SECONDS} s")
        if signal.min() == signal.max():
            raise ValueError(f"{path}: silent, all samples are equal")
        return signal

    def embed(signals: list[Tensor]) -> Tensor:
        return encoder(signals[0][None].to(encoder.device))

    with torch.inference_mode():
        return extract_items(
            folder,
            f"{encoder.digest()} on {about}",
            recordings,
            read,
            embed,
            workers=workers,
            progress=progress,
        )
