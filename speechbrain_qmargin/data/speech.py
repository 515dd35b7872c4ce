"""Folders of speech become manifests: who is trained on, who is validated and tested on.

The folders have VoxCeleb's layouts (:func:`~speechbrain_qmargin.data.voxceleb.audio_roots`). An
utterance's id is its path from its speaker on, as trial lists write it. Speakers that a trial list
names are never trained on.
"""

from __future__ import annotations

import logging
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from speechbrain_qmargin.data.audio import AUDIO_SUFFIXES, MIN_SECONDS, read_audio
from speechbrain_qmargin.data.augment import Augment
from speechbrain_qmargin.data.classes import all_pairs, held_out_for_validation, training_classes
from speechbrain_qmargin.data.durations import durations
from speechbrain_qmargin.data.voxceleb import (
    audio_files,
    audio_roots,
    training_roots,
    warn_of_too_many_speakers,
)
from speechbrain_qmargin.files import write_text
from speechbrain_qmargin.trials import Trials, read_trials, speaker_in

__all__ = [
    "AUDIO_SUFFIXES",
    "SpeechCorpus",
    "prepare_speech",
    "read_audio",
    "speech_dataset",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SpeechCorpus:
    """What :func:`prepare_speech` found and wrote.

    Attributes
    ----------
    root : Path
        The first data folder.
    train, valid, test : dict
        Utterance id to ``{"wav": path, "duration": seconds, "spk_id": speaker}``.
    valid_trials : Path or None
        Trial list in VoxCeleb's format, ids as in the manifests.
    test_lists : dict
        Name to such a list.
    """

    root: Path
    train: dict[str, dict]
    valid: dict[str, dict]
    test: dict[str, dict]
    valid_trials: Path | None
    test_lists: dict[str, Path] = field(default_factory=dict)

    @property
    def speakers(self) -> list[str]:
        """Training speakers, sorted."""
        return sorted({item["spk_id"] for item in self.train.values()})


@dataclass(frozen=True)
class _Audio:
    path: str
    seconds: float
    fault: str
    trials_only: bool


def _scan(folders: list[Path], trials_folders: list[Path], progress: bool) -> dict[str, _Audio]:
    """Every audio file by its path from the speaker on; each root is logged with what it holds.

    Of an utterance that is there twice (as m4a and decoded, or in two folders) the first is taken.
    """
    found: dict[str, _Audio] = {}
    by_stem: dict[str, str] = {}  # to its path
    doubles, scanned = [], set()
    for number, folder in enumerate([*folders, *trials_folders]):
        trials_only = number >= len(folders)
        roots = audio_roots(folder) if trials_only else training_roots(folder)
        count = 0
        for root in roots:
            if root in scanned:  # trials of a folder that is trained on
                count += 1
                continue
            scanned.add(root)
            files = {}
            for name, entry in audio_files(root):
                count += 1
                stem = name.rsplit(".", 1)[0]
                if stem in by_stem:
                    doubles.append(f"{entry.path} is {by_stem[stem]} again")
                    continue
                by_stem[stem] = entry.path
                status = entry.stat()
                files[name] = (status.st_size, status.st_mtime_ns)
            for name, (seconds, fault) in durations(root, files, progress=progress).items():
                path = by_stem[name.rsplit(".", 1)[0]]
                if not fault and seconds < MIN_SECONDS:
                    fault = f"shorter than {MIN_SECONDS} s"
                found[name] = _Audio(path, seconds, fault, trials_only)
            logger.info(
                f"{root}: {len(files):,} recordings of {len(set(map(speaker_in, files))):,} "
                f"speakers, {'for trials alone' if trials_only else 'to train on or for trials'}"
            )
        if not count:
            raise FileNotFoundError(
                f"data_folder: no {', '.join(AUDIO_SUFFIXES)} file below "
                f"{', '.join(str(root) for root in roots)}"
            )
    if doubles:
        logger.warning(f"{len(doubles)} recordings are there twice, used once: {doubles[0]}")
    return dict(sorted(found.items()))


def _named_lists(source: str | Path | Sequence | Mapping | None) -> dict[str, Path]:
    """Trial lists by name: given names, or the files' own."""
    if source is None:
        return {}
    if isinstance(source, Mapping):
        lists = {str(name): Path(path) for name, path in source.items()}
    else:
        paths = [source] if isinstance(source, str | Path) else list(source)
        lists = {}
        for path in map(Path, paths):
            if path.stem in lists:
                raise ValueError(
                    f"verification_file: {lists[path.stem]} and {path} have one name, which "
                    "their results would share; rename one of them"
                )
            lists[path.stem] = path
    for name, path in lists.items():
        if not path.is_file():
            raise FileNotFoundError(f"verification_file: {path} does not exist")
        if "/" in name:
            raise ValueError(f"verification_file: a list cannot be called {name!r}")
    return lists


def _on_disk(trials: Trials, by_stem: dict[str, str]) -> Trials:
    """The trials with ids as the files are called: lists write .wav where the folder has .m4a."""
    names = [by_stem.get(name.rsplit(".", 1)[0], name) for name in trials.ids]
    return replace(trials, ids=names)


def _without(trials: Trials, lost: set[str]) -> Trials:
    gone = np.array([name in lost for name in trials.ids])
    kept = ~(gone[trials.enrolment] | gone[trials.test])
    return replace(
        trials,
        enrolment=trials.enrolment[kept],
        test=trials.test[kept],
        is_target=trials.is_target[kept],
    )


def _trials_text(trials: Trials) -> str:
    ids = trials.ids
    return "".join(
        f"{label} {ids[enrolment]} {ids[test]}\n"
        for label, enrolment, test in zip(
            trials.is_target.astype(int).tolist(),
            trials.enrolment.tolist(),
            trials.test.tolist(),
            strict=True,
        )
    )


def _resolve_lists(
    lists: dict[str, Path],
    audio: dict[str, _Audio],
    folders: str,
    save_folder: Path,
    allow_missing: bool,
) -> tuple[dict[str, Trials], set[str]]:
    """The lists with ids as on disk, without what is missing if that is allowed; all speakers."""
    by_stem = {name.rsplit(".", 1)[0]: name for name in audio}
    resolved, report, summaries, speakers = {}, [], [], set()
    for name, path in lists.items():
        trials = _on_disk(read_trials(path), by_stem)
        speakers |= {speaker_in(utterance) for utterance in trials.ids}
        absent = [utterance for utterance in trials.ids if utterance not in audio]
        broken = [utterance for utterance in trials.ids if _fault(audio, utterance)]
        if absent or broken:
            kept = _without(trials, {*absent, *broken})
            lines = _first_lines(path, [*absent, *broken])
            faults = {utterance: "not found" for utterance in absent}
            faults |= {utterance: audio[utterance].fault for utterance in broken}
            report += [
                f"{name}\t{utterance}\tline {lines[utterance]}\t{fault}\n"
                for utterance, fault in faults.items()
            ]
            parts = [
                f"{len(some)} are {what} ("
                + "; ".join(f"{utterance} (line {lines[utterance]})" for utterance in some[:5])
                + ")"
                for some, what in ((absent, "not found"), (broken, "found but unreadable"))
                if some
            ]
            summaries.append(
                f"{path}: of the {len(trials.ids):,} utterances it names, {' and '.join(parts)}; "
                f"{len(kept):,} of its {len(trials):,} trials have both"
            )
            if allow_missing and len(np.unique(kept.is_target)) < 2:
                raise ValueError(
                    f"{path}: without what is missing below {folders} it has no target or no "
                    "impostor trials left"
                )
            trials = kept
        resolved[name] = trials
    missing = save_folder / "missing.txt"
    if report:
        write_text(missing, "".join(report))
        what = "\n".join(summaries)
        if not allow_missing:
            raise FileNotFoundError(
                f"Recordings are missing below {folders}.\n{what}\nAll are listed in {missing}. "
                "Complete the data, use a list that matches it, or set allow_missing to leave "
                "these trials out"
            )
        logger.warning(f"Trials are left out; results are on reduced lists.\n{what}\nSee {missing}")
    else:
        missing.unlink(missing_ok=True)
    for trials in resolved.values():
        trials.speakers()  # a label that contradicts its speakers stops the run before it trains
    return resolved, speakers


def _fault(audio: dict[str, _Audio], name: str) -> str:
    return audio[name].fault if name in audio else ""


def _first_lines(list_file: Path, names: list[str]) -> dict[str, int]:
    """The first line of a trial list that has each of the recordings, suffixes aside."""
    stems = {name.rsplit(".", 1)[0]: name for name in names}
    found: dict[str, int] = {}
    with list_file.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            for word in line.split():
                name = stems.get(word.rsplit(".", 1)[0])
                if name is not None:
                    found.setdefault(name, number)
    return found


def _paths(folder: str | Path | Sequence[str | Path] | None) -> list[Path]:
    if folder is None:
        return []
    return [Path(folder)] if isinstance(folder, str | Path) else [Path(one) for one in folder]


def prepare_speech(
    data_folder: str | Path | Sequence[str | Path],
    save_folder: str | Path,
    *,
    trials_folder: str | Path | Sequence[str | Path] | None = None,
    verification_file: str | Path | Sequence[str | Path] | Mapping[str, str | Path] | None = None,
    valid_file: str | Path | None = None,
    num_valid_speakers: int = 0,
    train_speakers: str | Path | None = None,
    min_utterances: int = 2,
    allow_missing: bool = False,
    progress: bool = True,
) -> SpeechCorpus:
    """Scan folders in VoxCeleb's layouts and divide them into training, validation and test.

    Parameters
    ----------
    data_folder : path or list of paths
        What is trained on, less the speakers of the trials: folders that hold
        ``wav/<speaker>/.../<utterance>.{wav,flac}`` or ``dev/aac/<speaker>/.../<utterance>.m4a``,
        see :func:`~speechbrain_qmargin.data.voxceleb.training_roots`: VoxCeleb2's test part is
        left out.
    save_folder : path
        Where the resolved trial lists, ``missing.txt`` (of the trials) and ``skipped_audio.txt``
        are written. What the scan found is kept for all runs, see
        :func:`~speechbrain_qmargin.data.durations.durations`.
    trials_folder : path or list of paths, optional
        Folders that only trials are taken from: nobody in them is trained on, be they in a list or
        not. For VoxCeleb1 beside training on VoxCeleb2. A folder of `data_folder` again: its parts
        that are not trained on.
    verification_file : path, list of paths, or mapping from name to path, optional
        Test trials, ``label enrolment test`` per line; a list's name is its file's unless given. A
        suffix that differs from the file on disk (``.wav`` in the list, ``.flac`` in the folder)
        is accepted.
    valid_file : path, optional
        Validation trials, likewise.
    num_valid_speakers : int
        Without a `valid_file`: how many training speakers to hold out; all pairs of up to ten of
        their utterances each become the validation trials. 0 is no validation.
    train_speakers : path, optional
        A file of speaker names, one a line, to train on; otherwise all that no trial list names.
    min_utterances : int
        Training speakers with fewer usable utterances are dropped, with a warning that names them.
    allow_missing : bool
        Leave out trials whose recordings are missing or unreadable, and say so, instead of
        stopping.

    Raises
    ------
    FileNotFoundError, ValueError
        A missing folder or list, a trial that names a missing or broken file, a training list
        that shares speakers with the trials or names unknown ones: each is named.
    """
    folders, trials_folders = _paths(data_folder), _paths(trials_folder)
    save_folder = Path(save_folder)
    where = ", ".join(map(str, [*folders, *trials_folders]))
    lists = _named_lists(verification_file)
    valid_list = {} if valid_file is None else {"valid": Path(valid_file)}
    for path in valid_list.values():
        if not path.is_file():
            raise FileNotFoundError(f"valid_file: {path} does not exist")
    if "valid" in lists and valid_list:
        raise ValueError("verification_file: the name 'valid' is that of the validation trials")
    audio = _scan(folders, trials_folders, progress)

    trials, held_out = _resolve_lists(lists | valid_list, audio, where, save_folder, allow_missing)
    resolved = {}
    for name in trials:
        resolved[name] = save_folder / "trials" / f"{name}.txt"
        write_text(resolved[name], _trials_text(trials[name]))
    valid_trials = resolved.pop("valid") if valid_list else None
    members = {
        "test": {one for name in lists for one in _used(trials[name])},
        "valid": _used(trials["valid"]) if valid_list else set(),
    }

    broken = {name: item.fault for name, item in audio.items() if item.fault}
    if broken:
        write_text(
            save_folder / "skipped_audio.txt",
            "".join(f"{name}\t{fault}\n" for name, fault in broken.items()),
        )
        first = "; ".join(f"{audio[name].path}: {broken[name]}" for name in list(broken)[:3])
        logger.warning(
            f"{len(broken)} audio files are left out, all listed in "
            f"{save_folder / 'skipped_audio.txt'}: {first}"
        )

    by_speaker: dict[str, list[str]] = defaultdict(list)
    for name, item in audio.items():
        if item.trials_only:
            held_out.add(speaker_in(name))
        elif not item.fault:
            by_speaker[speaker_in(name)].append(name)
    candidates = training_classes(
        by_speaker, held_out, listed=train_speakers, minimum=min_utterances
    )
    warn_of_too_many_speakers(candidates)
    if valid_file is None and num_valid_speakers > 0:
        candidates, members["valid"] = held_out_for_validation(
            by_speaker, candidates, num_valid_speakers
        )
        valid_trials = save_folder / "trials" / "valid.txt"
        write_text(valid_trials, all_pairs(members["valid"]))
    if len(candidates) < 2:
        raise ValueError(
            f"{where}: {len(candidates)} speakers left to train on, at least 2 are needed "
            f"(the trial lists and validation hold out {len(held_out)})"
        )

    def manifest(names: Iterable[str]) -> dict[str, dict]:
        return {
            name: {
                "wav": audio[name].path,
                "duration": audio[name].seconds,
                "spk_id": speaker_in(name),
            }
            for name in sorted(names)
        }

    return SpeechCorpus(
        root=folders[0],
        train=manifest(name for speaker in candidates for name in by_speaker[speaker]),
        valid=manifest(members["valid"]),
        test=manifest(members["test"]),
        valid_trials=valid_trials,
        test_lists=resolved,
    )


def _used(trials: Trials) -> set[str]:
    """The recordings of the trials; ids of trials that were left out are not among them."""
    return {trials.ids[i] for i in np.unique([trials.enrolment, trials.test]).tolist()}


def speech_dataset(
    manifest: dict[str, dict],
    sample_rate: int,
    *,
    crop: float | None = None,
    label_encoder=None,
    seed: int = 0,
    epoch: Callable[[], int] = lambda: 0,
    speeds: Sequence[float] = (1.0,),
    augment: Augment | None = None,
):
    """A SpeechBrain dynamic dataset over a manifest of :func:`prepare_speech`.

    Everything random about an item is a function of (seed, epoch, utterance) alone, so neither the
    number of workers nor an interruption changes what is trained on. An index ``draw * len(self) +
    item``, as :class:`~speechbrain_qmargin.data.sampling.BalancedSampler` gives, is the item with
    other randomness.

    Parameters
    ----------
    manifest : dict
    sample_rate : int
        Hz.
    crop : float, optional
        Seconds of a random crop, shorter recordings are repeated; None gives whole recordings.
        Instead of a crop that cannot be read one of another utterance of the speaker is taken, the
        same in every run, and a warning names the file; after 20 of them, or all, OSError.
    label_encoder : CategoricalEncoder, optional
        With it, items also carry ``spk_id_encoded``.
    epoch : callable
        Gives the current epoch.
    speeds : sequence of float
        Each item is played at one of them, drawn anew in every epoch. Speaker ``k`` of C at the
        i-th speed is class ``i * C + k``, so there are ``len(speeds) * C`` classes, those of the
        first speed before the others: begin with 1.0.
    augment : callable, optional
        ``augment(signal, rng, speaker)``, e.g. of
        :func:`~speechbrain_qmargin.data.augment.room_and_noise`.

    Returns
    -------
    DynamicItemDataset with keys ``id``, ``sig`` and, with an encoder, ``spk_id_encoded``.
    """
    from speechbrain.dataio.dataset import DynamicItemDataset
    from speechbrain.utils.data_pipeline import provides, takes

    if len(speeds) > 1 and speeds[0] != 1.0:
        raise ValueError(f"speeds: {speeds} must begin with 1.0, whose classes are the speakers")
    draw = 0
    by_speaker: dict[str, list[str]] = defaultdict(list)
    broken: set[str] = set()

    def rng_of(name: str, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([seed, epoch(), zlib.crc32(name.encode()), draw, *purpose])

    def speed_of(name: str) -> int:
        return 0 if len(speeds) == 1 else int(rng_of(name, 1).integers(len(speeds)))

    def cropped(name: str, chosen: str, speed: float) -> torch.Tensor:
        wav, duration = (manifest[chosen][key] for key in ("wav", "duration"))
        start = rng_of(name).uniform(0, max(0.0, duration - crop * speed))
        signal = read_audio(wav, sample_rate, start, crop, speed)
        if signal.numel() == 0:
            raise OSError(
                f"{wav}: no samples at {start:.2f} s, though it once lasted {duration:.2f} s"
            )
        wanted = round(crop * sample_rate)
        return signal.repeat(-(-wanted // signal.numel()))[:wanted]

    def readable_crop(name: str, speaker: str, speed: float) -> torch.Tensor:
        """A crop of the utterance, or of another one of the speaker where it cannot be read."""
        chosen, tried = name, []
        while True:
            try:
                return cropped(name, chosen, speed)
            except OSError as error:
                tried.append(chosen)
                if not by_speaker:
                    for one, item in manifest.items():
                        by_speaker[item["spk_id"]].append(one)
                left = [one for one in by_speaker[speaker] if one not in tried]
                if not left or len(tried) == 20:
                    raise OSError(
                        f"{error}; {len(tried)} utterances of {speaker} were tried"
                    ) from error
                if chosen not in broken:
                    broken.add(chosen)
                    logger.warning(f"{error}; another utterance of {speaker} is taken instead")
                chosen = left[int(rng_of(name, 3, len(tried)).integers(len(left)))]

    @takes("id", "wav", "spk_id")
    @provides("sig")
    def load(name: str, wav: str, speaker: str) -> torch.Tensor:
        speed = speeds[speed_of(name)]
        if crop is None:
            signal = read_audio(wav, sample_rate, speed=speed)
        else:
            signal = readable_crop(name, speaker, speed)
        return signal if augment is None else augment(signal, rng_of(name, 2), speaker)

    @takes("id", "spk_id")
    @provides("spk_id_encoded")
    def encode(name: str, speaker: str) -> torch.Tensor:
        label = label_encoder.encode_sequence_torch([speaker])
        return label + len(label_encoder) * speed_of(name)

    class SpeechDataset(DynamicItemDataset):
        def __getitem__(self, index: int) -> dict:
            nonlocal draw
            draw, item = divmod(index, len(self)) if index >= 0 else (0, index)
            try:
                return super().__getitem__(item)
            finally:
                draw = 0

    items, keys = [load], ["id", "sig"]
    if label_encoder is not None:
        items, keys = [load, encode], [*keys, "spk_id_encoded"]
    return SpeechDataset(manifest, dynamic_items=items, output_keys=keys)
