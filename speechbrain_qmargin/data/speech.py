"""A folder of speech becomes manifests: who is trained on, who is validated and tested on.

The folder has VoxCeleb's layout, ``wav/<speaker>/<session>/<utterance>.{wav,flac}`` (any depth
below the speaker). An utterance's id is its path below ``wav/``, as trial lists write it. Speakers
that a trial list names are never trained on.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from speechbrain_qmargin.files import write_text
from speechbrain_qmargin.scoring.trials import read_trials, speaker_in

__all__ = ["SpeechCorpus", "prepare_speech", "read_audio", "speaker_encoder", "speech_dataset"]

logger = logging.getLogger(__name__)

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")


@dataclass(frozen=True)
class SpeechCorpus:
    """What :func:`prepare_speech` found and wrote.

    Attributes
    ----------
    root : Path
        The folder whose ``wav/`` holds the audio.
    train, valid, test : dict
        Utterance id to ``{"wav": path, "duration": seconds, "spk_id": speaker}``.
    valid_trials, test_trials : Path or None
        Trial lists in VoxCeleb's format, ids as in the manifests.
    """

    root: Path
    train: dict[str, dict]
    valid: dict[str, dict]
    test: dict[str, dict]
    valid_trials: Path | None
    test_trials: Path | None

    @property
    def speakers(self) -> list[str]:
        """Training speakers, sorted."""
        return sorted({item["spk_id"] for item in self.train.values()})


def read_audio(path: str | Path, sample_rate: int, start: float = 0.0, length: float | None = None):
    """Mono float32 samples of a stretch of an audio file, at `sample_rate`.

    Parameters
    ----------
    path : str or Path
        Anything libsndfile reads: wav, flac, ogg, mp3.
    sample_rate : int
        Hz; other rates are resampled.
    start, length : float
        Seconds. `length` None reads to the end.

    Returns
    -------
    Tensor, [time], float32

    Raises
    ------
    OSError
        The file cannot be decoded; the message names it.
    """
    import soundfile

    try:
        with soundfile.SoundFile(str(path)) as file:
            rate = file.samplerate
            file.seek(min(round(start * rate), file.frames))
            frames = -1 if length is None else round(length * rate)
            samples = file.read(frames, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise OSError(f"{path}: cannot be decoded ({error})") from error
    signal = torch.from_numpy(samples.mean(axis=1))
    if rate != sample_rate:
        from torchaudio.functional import resample

        signal = resample(signal, rate, sample_rate)
    return signal


def _inspect(path: Path) -> tuple[float, str]:
    """(seconds, what is wrong): the header, and whether the last samples are really there."""
    import soundfile

    try:
        with soundfile.SoundFile(str(path)) as file:
            frames, rate = file.frames, file.samplerate
            if frames == 0:
                return 0.0, "empty: it has no samples"
            tail = min(frames, rate // 100)
            file.seek(frames - tail)
            if len(file.read(tail)) < tail:
                return 0.0, "truncated: its header promises more samples than it holds"
            return frames / rate, ""
    except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
        reason = "empty file" if path.stat().st_size == 0 else str(error).split(": ", 1)[-1]
        return 0.0, f"empty, truncated or not audio ({reason})"


def _scan(wav_root: Path, cache: Path, progress: bool) -> dict[str, tuple[float, str]]:
    """Duration and fault of every audio file; files unchanged since the last scan are not reopened.

    The cache is keyed by each file's path, size and time of change, so it never goes stale.
    """
    if not wav_root.is_dir():
        raise FileNotFoundError(
            f"data_folder: {wav_root} does not exist. It must hold "
            "wav/<speaker>/<session>/<utterance>.wav or .flac"
        )
    found = {}
    for folder, _, names in os.walk(wav_root, followlinks=True):
        for name in names:
            if name.lower().endswith(AUDIO_SUFFIXES):
                path = Path(folder, name)
                status = path.stat()
                found[path.relative_to(wav_root).as_posix()] = (status.st_size, status.st_mtime_ns)
    if not found:
        raise FileNotFoundError(
            f"data_folder: no {', '.join(AUDIO_SUFFIXES)} file below {wav_root}"
        )
    known = {}
    if cache.is_file():
        try:
            known = json.loads(cache.read_text())
        except ValueError:
            logger.warning(f"{cache} is damaged; reading the corpus again")
    stale = [name for name, key in found.items() if known.get(name, {}).get("key") != list(key)]
    if stale:
        with ThreadPoolExecutor() as pool:
            checked = pool.map(lambda name: _inspect(wav_root / name), stale)
            for name, (seconds, fault) in zip(
                stale,
                tqdm(checked, "reading durations", len(stale), disable=not progress, unit="file"),
                strict=True,
            ):
                known[name] = {"key": found[name], "seconds": seconds, "fault": fault}
        write_text(cache, json.dumps(known))
    return {name: (known[name]["seconds"], known[name]["fault"]) for name in sorted(found)}


def _resolve_trials(list_file: Path, durations: dict, wav_root: Path) -> tuple[str, set[str]]:
    """The trial list with ids as they are on disk, and the ids. Every named file must be usable."""
    if not list_file.is_file():
        raise FileNotFoundError(f"verification_file: {list_file} does not exist")
    trials = read_trials(list_file)
    by_stem = {name.rsplit(".", 1)[0]: name for name in durations}
    ids = [
        name if name in durations else by_stem.get(name.rsplit(".", 1)[0], name)
        for name in trials.ids
    ]
    missing = [name for name in ids if name not in durations]
    broken = [name for name in ids if name in durations and durations[name][1]]
    for fault, what in ((missing, "not found"), (broken, "found but unreadable")):
        if fault:
            raise FileNotFoundError(
                f"{list_file}: {len(fault)} of the utterances it names are {what} below "
                f"{wav_root}: {_with_lines(list_file, fault[:5])}. Complete the data, or use a "
                "list that matches it"
            )
    trials.speakers()  # a label that contradicts its speakers stops the run before it trains
    text = "".join(
        f"{int(target)} {ids[enrolment]} {ids[test]}\n"
        for target, enrolment, test in zip(
            trials.is_target, trials.enrolment, trials.test, strict=True
        )
    )
    return text, set(ids)


def _with_lines(list_file: Path, names: list[str]) -> str:
    """Names of a trial list's recordings, each with the first line that has it, suffixes aside."""
    stems = {name.rsplit(".", 1)[0]: name for name in names}
    found: dict[str, str] = {}
    for number, line in enumerate(list_file.read_text(encoding="utf-8").splitlines(), 1):
        for field in line.split():
            name = stems.get(field.rsplit(".", 1)[0])
            if name is not None:
                found.setdefault(name, f"{name} (line {number})")
    return "; ".join(found.values())


def prepare_speech(
    data_folder: str | Path,
    save_folder: str | Path,
    *,
    verification_file: str | Path | None = None,
    valid_file: str | Path | None = None,
    num_valid_speakers: int = 0,
    train_speakers: str | Path | None = None,
    min_utterances: int = 2,
    progress: bool = True,
) -> SpeechCorpus:
    """Scan a folder in VoxCeleb layout and divide it into training, validation and test.

    Parameters
    ----------
    data_folder : path
        Holds ``wav/<speaker>/.../<utterance>.{wav,flac}``.
    save_folder : path
        Where the scan's cache, the resolved trial lists and ``skipped_audio.txt`` are written.
    verification_file, valid_file : path, optional
        Trial lists, ``label enrolment test`` per line. A suffix that differs from the file on disk
        (``.wav`` in the list, ``.flac`` in the folder) is accepted.
    num_valid_speakers : int
        Without a `valid_file`: how many training speakers to hold out; all pairs of up to ten of
        their utterances each become the validation trials. 0 is no validation.
    train_speakers : path, optional
        A file of speaker names, one a line, to train on; otherwise all that no trial list names.
    min_utterances : int
        Training speakers with fewer usable utterances are dropped, with a warning that names them.

    Raises
    ------
    FileNotFoundError, ValueError
        A missing folder or list, a trial that names a missing or broken file, a training list
        that shares speakers with the trials or names unknown ones: each is named.
    """
    root, save_folder = Path(data_folder), Path(save_folder)
    wav_root = root / "wav"
    durations = _scan(wav_root, save_folder / "durations.json", progress)

    resolved: dict[str, Path | None] = {}
    members: dict[str, set[str]] = {}
    for part, source in (("test", verification_file), ("valid", valid_file)):
        members[part], resolved[part] = set(), None
        if source is not None:
            text, members[part] = _resolve_trials(Path(source), durations, wav_root)
            resolved[part] = save_folder / f"{part}_trials.txt"
            write_text(resolved[part], text)
    held_out = {speaker_in(name) for part in members.values() for name in part}

    broken = {name: fault for name, (_, fault) in durations.items() if fault}
    if broken:
        write_text(
            save_folder / "skipped_audio.txt",
            "".join(f"{name}\t{fault}\n" for name, fault in broken.items()),
        )
        first = "; ".join(f"{wav_root / name}: {fault}" for name, fault in list(broken.items())[:3])
        logger.warning(
            f"{len(broken)} audio files are left out, all listed in "
            f"{save_folder / 'skipped_audio.txt'}: {first}"
        )

    by_speaker: dict[str, list[str]] = defaultdict(list)
    for name in durations:
        if name not in broken:
            by_speaker[speaker_in(name)].append(name)
    if train_speakers is None:
        candidates = sorted(set(by_speaker) - held_out)
    else:
        candidates = sorted(set(Path(train_speakers).read_text(encoding="utf-8").split()))
        unknown = [name for name in candidates if name not in by_speaker]
        shared = sorted(set(candidates) & held_out)
        if unknown:
            raise ValueError(f"{train_speakers}: no usable audio of {', '.join(unknown[:5])}")
        if shared:
            raise ValueError(
                f"{train_speakers}: {', '.join(shared[:5])} also appear in a trial list; training "
                "and trials must not share speakers"
            )
    few = [name for name in candidates if len(by_speaker[name]) < min_utterances]
    if few:
        logger.warning(
            f"{len(few)} speakers with fewer than {min_utterances} usable utterances are not "
            f"trained on: {', '.join(few[:10])}{' ...' if len(few) > 10 else ''}"
        )
        candidates = [name for name in candidates if name not in set(few)]

    if valid_file is None and num_valid_speakers > 0:
        chosen = np.random.default_rng(0).permutation(len(candidates))[:num_valid_speakers]
        chosen = {candidates[i] for i in chosen}
        candidates = [name for name in candidates if name not in chosen]
        resolved["valid"] = save_folder / "valid_trials.txt"
        for speaker in chosen:
            step = max(1, len(by_speaker[speaker]) // 10)
            members["valid"].update(by_speaker[speaker][::step][:10])
        write_text(resolved["valid"], _all_pairs(members["valid"]))
    if len(candidates) < 2:
        raise ValueError(
            f"{wav_root}: {len(candidates)} speakers left to train on, at least 2 are needed "
            f"(the trial lists and validation hold out {len(held_out)})"
        )

    def manifest(names: Iterable[str]) -> dict[str, dict]:
        return {
            name: {
                "wav": str(wav_root / name),
                "duration": durations[name][0],
                "spk_id": speaker_in(name),
            }
            for name in sorted(names)
        }

    return SpeechCorpus(
        root=root,
        train=manifest(name for speaker in candidates for name in by_speaker[speaker]),
        valid=manifest(members["valid"]),
        test=manifest(members["test"]),
        valid_trials=resolved["valid"],
        test_trials=resolved["test"],
    )


def _all_pairs(names: Iterable[str]) -> str:
    return "".join(
        f"{int(speaker_in(a) == speaker_in(b))} {a} {b}\n"
        for a, b in combinations(sorted(names), 2)
    )


def speech_dataset(
    manifest: dict[str, dict],
    sample_rate: int,
    *,
    crop: float | None = None,
    label_encoder=None,
    seed: int = 0,
    epoch: Callable[[], int] = lambda: 0,
):
    """A SpeechBrain dynamic dataset over a manifest of :func:`prepare_speech`.

    Parameters
    ----------
    manifest : dict
    sample_rate : int
        Hz.
    crop : float, optional
        Seconds of a random crop, shorter recordings are repeated; None gives whole recordings.
        The crop is a function of (seed, epoch, utterance) alone, so neither the number of workers
        nor an interruption changes what is trained on.
    label_encoder : CategoricalEncoder, optional
        With it, items also carry ``spk_id_encoded``.
    epoch : callable
        Gives the current epoch.

    Returns
    -------
    DynamicItemDataset with keys ``id``, ``sig`` and, with an encoder, ``spk_id_encoded``.
    """
    from speechbrain.dataio.dataset import DynamicItemDataset
    from speechbrain.utils.data_pipeline import provides, takes

    @takes("id", "wav", "duration")
    @provides("sig")
    def load(name: str, wav: str, duration: float) -> torch.Tensor:
        if crop is None:
            return read_audio(wav, sample_rate)
        rng = np.random.default_rng([seed, epoch(), zlib.crc32(name.encode())])
        start = rng.uniform(0, max(0.0, duration - crop))
        signal = read_audio(wav, sample_rate, start, crop)
        if signal.numel() == 0:
            raise OSError(
                f"{wav}: no samples at {start:.2f} s, though it once lasted {duration:.2f} s"
            )
        wanted = round(crop * sample_rate)
        return signal.repeat(-(-wanted // signal.numel()))[:wanted]

    @takes("spk_id")
    @provides("spk_id_encoded")
    def encode(speaker: str) -> torch.Tensor:
        return label_encoder.encode_sequence_torch([speaker])

    items, keys = [load], ["id", "sig"]
    if label_encoder is not None:
        items, keys = [load, encode], [*keys, "spk_id_encoded"]
    return DynamicItemDataset(manifest, dynamic_items=items, output_keys=keys)


def speaker_encoder(corpus: SpeechCorpus, file: str | Path):
    """SpeechBrain's CategoricalEncoder over the training speakers, kept in `file`.

    Raises
    ------
    ValueError
        `file` is of a run on other speakers, whose classifier would not fit.
    """
    from speechbrain.dataio.encoder import CategoricalEncoder

    encoder = CategoricalEncoder()
    encoder.update_from_iterable(corpus.speakers)
    encoder.expect_len(len(corpus.speakers))
    file = Path(file)
    if file.is_file():
        before = set(CategoricalEncoder.from_saved(file).lab2ind)
        changed = sorted(before ^ set(corpus.speakers))
        if changed:
            raise ValueError(
                f"{file}: the training speakers have changed since this run began "
                f"({len(before)} then, {len(corpus.speakers)} now; {', '.join(changed[:5])}). "
                "Give a new --output_folder"
            )
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        encoder.save(file)
    return encoder
