"""A corpus of synthetic voices, built on the spot: proves the machinery, not accuracy.

:func:`build_mini_corpus` writes about a hundred voices of the espeak-ng synthesiser in VoxCeleb
layout, with speaker lists and trial lists beside them::

    README.txt              what this is, and what it is not
    speakers.tsv            speaker, split, language, register
    train_speakers.txt      one speaker a line; the three lists are disjoint
    valid_speakers.txt
    test_speakers.txt
    trials_valid.txt        "label enrolment test", paths below wav/, label 1 for the same speaker
    trials_test.txt
    manifest.jsonl          settings, then size and SHA-256 of every file
    wav/<speaker>/<session>/<utterance>.flac

How an utterance comes about, from the outside in:

1. a *speaker* is a draw from a distribution over espeak's voice description (height, frequency
   and width of eight formants, base pitch and its range, flutter, roughness, breath) and a
   speaking rate, in one language. Voices are drawn, not taken from espeak's own list of variants,
   so there can be as many as wanted and none of them recurs under another name;
2. a *session* moves that voice a little (another day, another mood), and has its own room, its
   own background noise at its own level, its own microphone;
3. an *utterance* reads own-written sentences and numbers in the speaker's language.

Every draw is seeded by (seed, split, speaker, session, utterance) alone, and the synthesiser is
loaded afresh for each utterance because it carries oscillator and noise state from one to the
next. The samples therefore depend neither on the order nor on the number of processes, and a
single damaged file can be rebuilt bit for bit.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from speechbrain_qmargin.extras import require
from speechbrain_qmargin.files import CACHE_VARIABLE, cache_folder
from speechbrain_qmargin.synthetic.processes import checksum, synthesise, write_bytes
from speechbrain_qmargin.synthetic.speakers import (
    SPLITS,
    Settings,
    Speaker,
    all_speakers,
    trials_of,
    utterances_of,
)

__all__ = ["CORPUS_VERSION", "MiniCorpus", "build_mini_corpus", "default_cache_folder"]

CORPUS_VERSION = 2
"""Raised whenever the same seed would give other samples or other lists."""

BYTES_PER_UTTERANCE = 75_000  # for the estimate of the space needed

_README = """\
Synthetic voices, not people: a corpus that proves machinery, not accuracy.

Every file below wav/ was made by the espeak-ng speech synthesiser and then given an artificial
room, background noise, microphone and level. It exists so that a training and evaluation recipe
can be run from end to end in minutes, without a download. An error rate measured on it says that
the recipe works; it says nothing about how well a verifier recognises people.

Layout: wav/<speaker>/<session>/<utterance>.flac, 16 kHz mono.
Trials ("label enrolment test", paths below wav/; label 1 = same speaker): targets always come
from two different sessions. Two thirds of the impostor trials are within one group, that is the
same language and the same register (high or low voice); the rest share the register only.

Built by speechbrain_qmargin.synthetic.voices, version {version}, with {settings}.
Damaged or missing files are rebuilt the next time the corpus is asked for.
"""


@dataclass(frozen=True)
class MiniCorpus:
    """Where everything of a built corpus is.

    Attributes
    ----------
    folder : Path
        The corpus; what a recipe takes as its data folder.
    wav : Path
        The audio, ``<speaker>/<session>/<utterance>.flac``.
    train_speakers, valid_speakers, test_speakers : Path
        Disjoint speaker lists, one name a line.
    trials_valid, trials_test : Path
        Verification lists, ``label enrolment test``, paths relative to `wav`.
    manifest : Path
        Settings, then size and SHA-256 of every audio file (JSON lines).
    num_utterances : int
        Audio files in all.
    num_rebuilt : int
        Audio files this call had to write; 0 when the cache was complete.
    """

    folder: Path
    wav: Path
    train_speakers: Path
    valid_speakers: Path
    test_speakers: Path
    trials_valid: Path
    trials_test: Path
    manifest: Path
    num_utterances: int
    num_rebuilt: int


def default_cache_folder(seed: int = 0) -> Path:
    """Folder in which the mini corpus is kept between runs.

    Parameters
    ----------
    seed : int
        Seed of the corpus; each has its own folder.

    Returns
    -------
    Path
        ``mini_voices-<version>-<seed>`` below :func:`~speechbrain_qmargin.files.cache_folder`.

    Examples
    --------
    >>> default_cache_folder(7).name
    'mini_voices-2-7'
    """
    return cache_folder() / f"mini_voices-{CORPUS_VERSION}-{seed}"


def build_mini_corpus(
    folder: str | Path | None = None,
    seed: int = 0,
    *,
    progress: bool = True,
    num_train_speakers: int = 64,
    num_valid_speakers: int = 8,
    num_test_speakers: int = 24,
    num_sessions: int = 5,
    num_utterances: int = 4,
    num_workers: int | None = None,
) -> MiniCorpus:
    """Build the mini corpus, or check the one that is there and repair it.

    A complete corpus is verified (size and SHA-256 of every file) and returned. Files that are
    missing or damaged are synthesised again, they alone; so a build that was interrupted resumes.
    Files are written under a temporary name and renamed, hence never half there.

    Parameters
    ----------
    folder : str or Path, optional
        Where the corpus is or shall be; default `default_cache_folder(seed)`.
    seed : int
        Seed of all draws. The same seed gives bit-identical samples with the same versions of
        espeak-ng and numpy, whatever `num_workers`.
    progress : bool
        Show a progress bar while building.
    num_train_speakers, num_valid_speakers, num_test_speakers : int
        Disjoint sets of speakers, at least 2 each. Fewer speakers are the first of more.
    num_sessions : int
        Sessions per speaker, at least 2, since target trials are cross-session.
    num_utterances : int
        Utterances per session, 2 to 5 s each.
    num_workers : int, optional
        Processes; default one per available core. They are started as fresh interpreters that
        import neither the calling script nor torch, so no ``if __name__ == "__main__"`` is needed.

    Returns
    -------
    MiniCorpus
        The paths of everything.

    Raises
    ------
    ImportError
        There is something to build and the extra ``demo`` is not installed.
    ValueError
        A size is out of range, or `folder` holds something else: other files, or a corpus of
        another version or with other settings.
    OSError
        The folder cannot be written, or the disk is full; names the folder and the space needed.
        What is already built is kept.

    Examples
    --------
    >>> corpus = build_mini_corpus()                                    # doctest: +SKIP
    >>> corpus.trials_test.read_text().splitlines()[0]                  # doctest: +SKIP
    '0 mv20010/session1/00001.flac mv20020/session5/00002.flac'

    >>> build_mini_corpus(num_sessions=1)
    Traceback (most recent call last):
        ...
    ValueError: num_sessions must be an integer from 2 to 9999, not 1
    """
    settings = Settings(
        seed,
        num_train_speakers,
        num_valid_speakers,
        num_test_speakers,
        num_sessions,
        num_utterances,
    )
    folder = Path(default_cache_folder(seed) if folder is None else folder).expanduser().absolute()
    speakers = all_speakers(settings)
    paths = [path for speaker in speakers for path in utterances_of(speaker, settings)]
    known = _read_manifest(folder, settings)
    missing = [path for path in paths if not _is_intact(folder / "wav" / path, known.get(path))]

    needed = len(missing) * BYTES_PER_UTTERANCE
    changed = 0
    with _naming_folder(folder, needed):
        if missing:
            require("espeakng_loader", "soundfile", why="the mini corpus", extra="demo")
            _require_space(folder, needed)
        (folder / "wav").mkdir(parents=True, exist_ok=True)
        manifest = folder / "manifest.jsonl"
        _write_text(manifest, _manifest_text(settings, known))
        for name, text in _texts(settings, speakers).items():
            _write_text(folder / name, text)
        if missing:
            with manifest.open("a", encoding="utf-8") as lines:
                for entry in synthesise(folder, settings, missing, num_workers, progress):
                    before = known.get(entry["path"], entry)
                    changed += before["sha256"] != entry["sha256"]
                    known[entry["path"]] = entry
                    lines.write(json.dumps(entry) + "\n")
                    lines.flush()
            _write_text(manifest, _manifest_text(settings, {path: known[path] for path in paths}))
    if changed:
        warnings.warn(
            f"{folder}: {changed} rebuilt files are not what they were, since espeak-ng, numpy or "
            "the FLAC encoder has another version now; remove the folder to build all of it anew",
            stacklevel=2,
        )

    return MiniCorpus(
        folder=folder,
        wav=folder / "wav",
        train_speakers=folder / "train_speakers.txt",
        valid_speakers=folder / "valid_speakers.txt",
        test_speakers=folder / "test_speakers.txt",
        trials_valid=folder / "trials_valid.txt",
        trials_test=folder / "trials_test.txt",
        manifest=manifest,
        num_utterances=len(paths),
        num_rebuilt=len(missing),
    )


# ------------------------------------------------------------------------------------- on disk


def _texts(settings: Settings, speakers: list[Speaker]) -> dict[str, str]:
    """File name -> content of all that is not audio; a pure function of the settings."""
    described = ", ".join(f"{name}={value}" for name, value in asdict(settings).items())
    texts = {
        "README.txt": _README.format(version=CORPUS_VERSION, settings=described),
        "speakers.tsv": "speaker\tsplit\tlanguage\tregister\n"
        + "".join(f"{s.name}\t{s.split}\t{s.language}\t{s.register}\n" for s in speakers),
    }
    for split in SPLITS:
        members = [speaker for speaker in speakers if speaker.split == split]
        texts[f"{split}_speakers.txt"] = "".join(f"{speaker.name}\n" for speaker in members)
        if split != "train":
            texts[f"trials_{split}.txt"] = "".join(trials_of(settings, members))
    return texts


def _read_manifest(folder: Path, settings: Settings) -> dict[str, dict]:
    """Relative path -> entry of what was built in `folder`; empty if nothing was."""
    manifest = folder / "manifest.jsonl"
    try:
        header, *lines = manifest.read_text(encoding="utf-8").splitlines()
        header = {**json.loads(header)}
    except FileNotFoundError:
        if folder.is_dir() and any(not p.name.startswith(".") for p in folder.iterdir()):
            raise ValueError(
                f"{folder} holds files but no mini corpus (it has no manifest.jsonl): name a "
                "folder that is empty or does not exist"
            ) from None
        return {}
    except NotADirectoryError:
        return {}  # the attempt to write will name it
    except (ValueError, TypeError):
        raise ValueError(f"{manifest}, line 1: not a manifest; remove the folder") from None
    wanted = {"mini_voices": CORPUS_VERSION, **asdict(settings)}
    differing = [name for name, value in wanted.items() if header.get(name) != value]
    if differing:
        there = ", ".join(f"{name}={header.get(name)}" for name in differing)
        here = ", ".join(f"{name}={wanted[name]}" for name in differing)
        raise ValueError(
            f"{folder} holds a mini corpus with {there}, but {here} was asked for: name another "
            "folder, or remove this one"
        )
    entries = {}
    for line in lines:
        # the last line of an interrupted build may be cut short: its file is built again
        with contextlib.suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            entries[entry["path"]] = {name: entry[name] for name in ("path", "bytes", "sha256")}
    return entries


def _manifest_text(settings: Settings, entries: dict[str, dict]) -> str:
    header = {"mini_voices": CORPUS_VERSION, **asdict(settings)}
    return "".join(json.dumps(line) + "\n" for line in (header, *entries.values()))


def _is_intact(path: Path, entry: dict | None) -> bool:
    if entry is None:
        return False
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return len(content) == entry["bytes"] and checksum(content) == entry["sha256"]


def _write_text(path: Path, text: str) -> None:
    content = text.encode()
    if not path.is_file() or path.read_bytes() != content:
        write_bytes(path, content)


def _require_space(folder: Path, needed: int) -> None:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if shutil.disk_usage(existing).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def _naming_folder(folder: Path, needed: int) -> Iterator[None]:
    """Let whatever the operating system refuses say what was being done, and where."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        at = f" at {error.filename}" if error.filename else ""
        raise OSError(
            error.errno,
            f"{error.strerror}{at}: cannot write the mini corpus, which needs about "
            f"{max(1, round(needed / 1e6))} MB more; what is built is kept. Make room, or choose "
            f"another folder (an argument, or the environment variable {CACHE_VARIABLE})",
            str(folder),
        ) from error
