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

espeak-ng is GPL-3: it is only used through the optional package ``espeakng-loader`` of the extra
``demo``, imported when there is something to build.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import io
import itertools
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

__all__ = ["CORPUS_VERSION", "MiniCorpus", "build_mini_corpus", "default_cache_folder"]

CORPUS_VERSION = 2
"""Raised whenever the same seed would give other samples or other lists."""

SAMPLE_RATE = 16_000

# What makes the task hard or easy. Spreads are standard deviations between speakers (VOICE_*) and
# between sessions of one speaker (SESSION_*). As they are, an ECAPA-TDNN of half a million
# parameters ends at a test EER of 7 % (360 steps of 64 crops of 2 s, CosFace), untrained at 25 %.
VOICE_TRACT = 5.0  # per cent, all formants together (vocal tract length)
VOICE_FORMANT = 6.0  # per cent, each formant frequency on its own
VOICE_HEIGHT = 22.0  # per cent, each formant's height and width
VOICE_PITCH = 3.0  # semitones, base pitch within a register
VOICE_RATE = 18.0  # words per minute
SESSION_TRACT = 0.7
SESSION_FORMANT = 0.7
SESSION_HEIGHT = 4.0
SESSION_PITCH = 1.2
SESSION_RATE = 12.0
SNR = (8.0, 24.0)  # dB, uniform over sessions
REVERBERATION = (0.12, 0.5)  # s, RT60
DIRECT_TO_REVERBERANT = (4.0, 14.0)  # dB
LEVEL = (-40.0, -24.0)  # dB full scale, RMS
DURATION = (2.0, 5.0)  # s

BYTES_PER_UTTERANCE = 75_000  # for the estimate of the space needed

SENTENCES = {
    "en-us": (
        "The ferry leaves the harbour at seven.",
        "She painted the kitchen door bright green.",
        "Nobody remembered to water the tomatoes.",
        "Our neighbour plays the cello every evening.",
        "Please put the heavy box under the stairs.",
        "A cold wind came down from the hills.",
        "The baker opens long before sunrise.",
        "They found an old map in the attic.",
        "Tomorrow we will walk along the river.",
        "His bicycle has been stolen twice this year.",
        "The train was late because of the snow.",
        "I would like two cups of tea, please.",
    ),
    "de": (
        "Der Zug nach Norden hat heute Verspätung.",
        "Im Garten blühen schon die ersten Rosen.",
        "Bitte stellen Sie die Kiste neben die Tür.",
        "Meine Schwester lernt seit Mai Geige.",
        "Am Abend kochen wir eine große Suppe.",
        "Der Bäcker öffnet lange vor Sonnenaufgang.",
        "Gestern haben wir am Fluss gezeltet.",
        "Das alte Fahrrad steht noch im Keller.",
        "Niemand wusste, wo der Schlüssel lag.",
        "Sie schreibt jeden Sonntag einen Brief.",
        "Der Wind kam kalt von den Bergen herab.",
        "Ich hätte gern zwei Tassen Tee.",
    ),
    "fr": (
        "Le bateau quitte le port à sept heures.",
        "Ma voisine joue du piano tous les soirs.",
        "Nous avons marché le long de la rivière.",
        "Le boulanger ouvre avant le lever du soleil.",
        "Elle a peint la porte de la cuisine en vert.",
        "Personne n'a retrouvé la clé du grenier.",
        "Il faut poser la caisse sous l'escalier.",
        "Un vent froid descendait des collines.",
        "Demain, nous irons cueillir des pommes.",
        "Son vélo a été volé deux fois cette année.",
        "Je voudrais deux tasses de thé.",
        "La neige a retardé tous les trains.",
    ),
    "es": (
        "El barco sale del puerto a las siete.",
        "Mi vecina toca el piano todas las noches.",
        "Mañana caminaremos junto al río.",
        "El panadero abre antes del amanecer.",
        "Pintó de verde la puerta de la cocina.",
        "Nadie encontró la llave del sótano.",
        "Pon la caja pesada debajo de la escalera.",
        "Un viento frío bajaba de las montañas.",
        "Le robaron la bicicleta dos veces este año.",
        "Quisiera dos tazas de té, por favor.",
        "La nieve retrasó todos los trenes.",
        "En el jardín ya florecen las rosas.",
    ),
    "it": (
        "La nave lascia il porto alle sette.",
        "La mia vicina suona il violino ogni sera.",
        "Domani cammineremo lungo il fiume.",
        "Il fornaio apre prima dell'alba.",
        "Ha dipinto di verde la porta della cucina.",
        "Nessuno ha trovato la chiave della soffitta.",
        "Metti la cassa pesante sotto la scala.",
        "Un vento freddo scendeva dalle colline.",
        "Gli hanno rubato la bicicletta due volte.",
        "Vorrei due tazze di tè, per favore.",
        "La neve ha fermato tutti i treni.",
        "Nel giardino fioriscono già le rose.",
    ),
    "pt-br": (
        "O barco sai do porto às sete horas.",
        "Minha vizinha toca piano todas as noites.",
        "Amanhã vamos caminhar perto do rio.",
        "O padeiro abre antes do nascer do sol.",
        "Ela pintou de verde a porta da cozinha.",
        "Ninguém encontrou a chave do porão.",
        "Coloque a caixa pesada debaixo da escada.",
        "Um vento frio descia das montanhas.",
        "A bicicleta dele foi roubada duas vezes.",
        "Eu queria duas xícaras de chá.",
        "A chuva atrasou todos os trens.",
        "No jardim as rosas já florescem.",
    ),
    "nl": (
        "De boot vertrekt om zeven uur uit de haven.",
        "Mijn buurvrouw speelt elke avond piano.",
        "Morgen wandelen we langs de rivier.",
        "De bakker opent lang voor zonsopgang.",
        "Zij schilderde de keukendeur groen.",
        "Niemand vond de sleutel van de kelder.",
        "Zet de zware kist maar onder de trap.",
        "Een koude wind kwam uit het noorden.",
        "Zijn fiets is dit jaar twee keer gestolen.",
        "Ik wil graag twee koppen thee.",
        "Door de sneeuw reden er geen treinen.",
        "In de tuin bloeien de eerste rozen.",
    ),
    "pl": (
        "Prom odpływa z portu o siódmej.",
        "Moja sąsiadka gra wieczorem na pianinie.",
        "Jutro pójdziemy na spacer nad rzekę.",
        "Piekarz otwiera długo przed świtem.",
        "Pomalowała drzwi kuchni na zielono.",
        "Nikt nie znalazł klucza do piwnicy.",
        "Postaw ciężką skrzynię pod schodami.",
        "Zimny wiatr wiał od strony gór.",
        "W tym roku dwa razy ukradli mu rower.",
        "Poproszę dwie filiżanki herbaty.",
        "Śnieg zatrzymał wszystkie pociągi.",
        "W ogrodzie kwitną już pierwsze róże.",
    ),
}

# Voice groups: (language, register). Test speakers share four groups, so that language and
# register tell few impostors apart.
_SPLITS = {
    "train": [(language, register) for language in SENTENCES for register in ("high", "low")],
    "valid": [("fr", "high"), ("fr", "low"), ("es", "high"), ("es", "low")],
    "test": [("en-us", "high"), ("en-us", "low"), ("de", "high"), ("de", "low")],
}

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


@dataclass(frozen=True)
class _Settings:
    """What determines the samples and lists, besides CORPUS_VERSION."""

    seed: int
    num_train_speakers: int
    num_valid_speakers: int
    num_test_speakers: int
    num_sessions: int
    num_utterances: int

    def __post_init__(self):
        for name, value in asdict(self).items():
            least = {"seed": 0, "num_sessions": 2, "num_utterances": 1}.get(name, 2)
            most = 2**32 - 1 if name == "seed" else 9_999
            if not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"{name} must be an integer from {least} to {most}, not {value!r}")


@dataclass(frozen=True)
class _Speaker:
    name: str
    split: str
    language: str
    register: str
    # Seeds every draw about this speaker, with session and utterance (from 1) appended. What is
    # about the speaker or the session alone has a zero there.
    key: tuple[int, int, int]

    @property
    def group(self) -> tuple[str, str]:
        return self.language, self.register


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
    from speechbrain_qmargin.files import cache_folder  # not in the workers, which import little

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
    settings = _Settings(
        seed,
        num_train_speakers,
        num_valid_speakers,
        num_test_speakers,
        num_sessions,
        num_utterances,
    )
    folder = Path(default_cache_folder(seed) if folder is None else folder).expanduser().absolute()
    speakers = _speakers(settings)
    paths = [path for speaker in speakers for path in _utterances(speaker, settings)]
    known = _read_manifest(folder, settings)
    missing = [path for path in paths if not _is_intact(folder / "wav" / path, known.get(path))]

    needed = len(missing) * BYTES_PER_UTTERANCE
    changed = 0
    with _naming_folder(folder, needed):
        if missing:
            from speechbrain_qmargin.extras import require  # not in the workers either

            require("espeakng_loader", "soundfile", why="the mini corpus", extra="demo")
            _require_space(folder, needed)
        (folder / "wav").mkdir(parents=True, exist_ok=True)
        manifest = folder / "manifest.jsonl"
        _write_text(manifest, _manifest_text(settings, known))
        for name, text in _texts(settings, speakers).items():
            _write_text(folder / name, text)
        if missing:
            with manifest.open("a", encoding="utf-8") as lines:
                for entry in _synthesise(folder, settings, missing, num_workers, progress):
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


# ------------------------------------------------------------------------- speakers and trials


def _speakers(settings: _Settings) -> list[_Speaker]:
    """All speakers, split by split; groups are dealt in turn, so a smaller corpus is a prefix."""
    speakers = []
    for number, (split, groups) in enumerate(_SPLITS.items()):
        for i in range(getattr(settings, f"num_{split}_speakers")):
            language, register = groups[i % len(groups)]
            name = f"mv{number * 10_000 + i + 1:05d}"
            speakers.append(_Speaker(name, split, language, register, (settings.seed, number, i)))
    return speakers


def _utterances(speaker: _Speaker, settings: _Settings) -> list[str]:
    return [
        f"{speaker.name}/session{session}/{utterance:05d}.flac"
        for session in range(1, settings.num_sessions + 1)
        for utterance in range(1, settings.num_utterances + 1)
    ]


def _texts(settings: _Settings, speakers: list[_Speaker]) -> dict[str, str]:
    """File name -> content of all that is not audio; a pure function of the settings."""
    described = ", ".join(f"{name}={value}" for name, value in asdict(settings).items())
    texts = {
        "README.txt": _README.format(version=CORPUS_VERSION, settings=described),
        "speakers.tsv": "speaker\tsplit\tlanguage\tregister\n"
        + "".join(f"{s.name}\t{s.split}\t{s.language}\t{s.register}\n" for s in speakers),
    }
    for split in _SPLITS:
        members = [speaker for speaker in speakers if speaker.split == split]
        texts[f"{split}_speakers.txt"] = "".join(f"{speaker.name}\n" for speaker in members)
        if split != "train":
            texts[f"trials_{split}.txt"] = "".join(_trials(settings, members))
    return texts


def _trials(settings: _Settings, speakers: list[_Speaker]) -> list[str]:
    """All cross-session targets; impostors within the group, and half as many across languages."""
    lines, within, across, others = [], [], [], []
    for speaker in speakers:
        for one, two in itertools.combinations(_utterances(speaker, settings), 2):
            if Path(one).parent != Path(two).parent:
                lines.append(f"1 {one} {two}\n")
    for a, b in itertools.combinations(speakers, 2):
        kind = within if a.group == b.group else across if a.register == b.register else others
        pairs = itertools.product(_utterances(a, settings), _utterances(b, settings))
        kind += [f"0 {one} {two}\n" for one, two in pairs]
    rng = np.random.default_rng((settings.seed, 99))
    if within:
        across = [across[i] for i in sorted(rng.permutation(len(across))[: len(within) // 2])]
    lines += within + across or others  # only a tiny corpus has no two voices of one register
    return [lines[i] for i in rng.permutation(len(lines))]


# ------------------------------------------------------------------------------------- on disk


def _read_manifest(folder: Path, settings: _Settings) -> dict[str, dict]:
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


def _manifest_text(settings: _Settings, entries: dict[str, dict]) -> str:
    header = {"mini_voices": CORPUS_VERSION, **asdict(settings)}
    return "".join(json.dumps(line) + "\n" for line in (header, *entries.values()))


def _is_intact(path: Path, entry: dict | None) -> bool:
    if entry is None:
        return False
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return len(content) == entry["bytes"] and _checksum(content) == entry["sha256"]


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write_bytes(path: Path, content: bytes) -> None:
    """Write so that `path` holds either the whole of `content` or what it held before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _write_text(path: Path, text: str) -> None:
    content = text.encode()
    if not path.is_file() or path.read_bytes() != content:
        _write_bytes(path, content)


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
        from speechbrain_qmargin.files import CACHE_VARIABLE

        at = f" at {error.filename}" if error.filename else ""
        raise OSError(
            error.errno,
            f"{error.strerror}{at}: cannot write the mini corpus, which needs about "
            f"{max(1, round(needed / 1e6))} MB more; what is built is kept. Make room, or choose "
            f"another folder (an argument, or the environment variable {CACHE_VARIABLE})",
            str(folder),
        ) from error


# ----------------------------------------------------------------------------------- processes

# A fresh interpreter runs this very file by its path: with the parent's import path, but without
# the parent's script (as multiprocessing's spawn would) and without this package's torch.
_WORKER = (
    "import sys, json, runpy\n"
    "sys.path[:] = json.loads(sys.argv[2])\n"
    "runpy.run_path(sys.argv[1], run_name='__mini_voices_worker__')\n"
)


def _synthesise(
    folder: Path,
    settings: _Settings,
    paths: list[str],
    num_workers: int | None,
    progress: bool,
) -> Iterator[dict]:
    """Write `paths` below wav/ with several processes; yields a manifest entry for each."""
    from tqdm import tqdm

    if num_workers is None:
        affinity = getattr(os, "sched_getaffinity", None)
        num_workers = len(affinity(0)) if affinity else os.cpu_count() or 1
    num_workers = max(1, min(num_workers, len(paths) // 8))
    results: queue.Queue = queue.Queue()
    workers = []
    try:
        for i in range(num_workers):
            worker = subprocess.Popen(
                [sys.executable, "-c", _WORKER, __file__, json.dumps([str(p) for p in sys.path])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
            )
            workers.append(worker)
            job = {
                "folder": str(folder),
                "settings": asdict(settings),
                "paths": paths[i::num_workers],
            }
            assert worker.stdin is not None  # a pipe
            with contextlib.suppress(BrokenPipeError), worker.stdin:
                json.dump(job, worker.stdin)
            threading.Thread(target=_forward, args=(worker, results), daemon=True).start()
        with tqdm(
            total=len(paths), desc="synthetic voices", unit="utt", disable=not progress
        ) as bar:
            running = num_workers
            while running:
                message = results.get()
                if message is None:
                    running -= 1
                elif "errno" in message:
                    raise OSError(message["errno"], message["strerror"], message["filename"])
                elif "error" in message:
                    raise RuntimeError(f"{folder}: {message['error']}")
                else:
                    bar.update()
                    yield message
    finally:
        for worker in workers:
            worker.terminate()
            worker.wait()


def _forward(worker: subprocess.Popen, results: queue.Queue) -> None:
    """One worker's answers into the queue, then None; runs in a thread of the parent."""
    assert worker.stdout is not None  # a pipe
    # a line that was cut short by the end of the worker is no answer
    with worker.stdout, contextlib.suppress(ValueError):
        for line in worker.stdout:
            results.put(json.loads(line))
    if worker.wait() != 0:
        results.put(
            {"error": f"a process of the mini corpus build ended with code {worker.returncode}"}
        )
    results.put(None)


def _work() -> None:
    """A worker: a job as JSON on stdin, a manifest entry per file as JSON lines on stdout."""
    job = json.load(sys.stdin)
    # whatever a C library prints must not come between the answers
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    # the parent ends us between two files, so that nothing temporary stays behind
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def answer(**message):
        print(json.dumps(message), file=answers, flush=True)

    settings = _Settings(**job["settings"])
    wav = Path(job["folder"]) / "wav"
    speakers = {speaker.name: speaker for speaker in _speakers(settings)}
    path = None
    try:
        with _Synthesiser() as synthesiser:
            babble = _babble_voices(synthesiser, settings.seed)
            for path in job["paths"]:
                if stopped:
                    break
                name, session, utterance = Path(path).parts
                numbers = int(session.removeprefix("session")), int(Path(utterance).stem)
                samples = _utterance(synthesiser, speakers[name], *numbers, babble)
                content = _flac(samples)
                (wav / path).parent.mkdir(parents=True, exist_ok=True)
                _write_bytes(wav / path, content)
                answer(path=path, bytes=len(content), sha256=_checksum(content))
    except BrokenPipeError:
        pass  # the parent is gone
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            answer(errno=error.errno, strerror=error.strerror, filename=error.filename)
        else:
            answer(error=f"{path or 'background noise'}: {type(error).__name__}: {error}")


def _flac(samples: np.ndarray) -> bytes:
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


# ----------------------------------------------------------------------------------- synthesis


class _Synthesiser:
    """espeak-ng through ctypes, with voice descriptions of our own.

    espeak looks variants up in its data folder, so a temporary folder mirrors that by links. Its
    state (oscillator phase, flutter, noise) outlives even espeak_Terminate; a copy of the library
    loaded under another name starts from the beginning, which takes about a millisecond.
    """

    _RATE, _PITCH, _RANGE = 1, 3, 4  # espeak_PARAMETER
    _SYNCHRONOUS, _DONT_EXIT, _UTF8 = 2, 0x8000, 1
    _CALLBACK = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
    )

    def __enter__(self) -> _Synthesiser:
        import espeakng_loader

        self._library = Path(espeakng_loader.get_library_path())
        source = Path(espeakng_loader.get_data_path())
        self._temporary = tempfile.TemporaryDirectory(prefix="espeak", ignore_cleanup_errors=True)
        self._home = Path(self._temporary.name)
        for item in source.iterdir():
            if item.name == "voices":
                continue
            try:
                (self._home / item.name).symlink_to(item, target_is_directory=item.is_dir())
            except OSError:  # no right to make links
                copy = shutil.copytree if item.is_dir() else shutil.copyfile
                copy(item, self._home / item.name)
        self._variant = self._home / "voices" / "!v" / "speaker"
        self._variant.parent.mkdir(parents=True)
        self._count = 0
        return self

    def __exit__(self, *_) -> None:
        self._temporary.cleanup()

    def __call__(
        self, text: str, voice: _Voice, language: str, seed: int
    ) -> tuple[np.ndarray, int]:
        """Samples (int16) and their rate."""
        self._variant.write_text(voice.description, encoding="ascii")
        with self._fresh_library() as (library, rate):
            library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
            chunks = []

            def receive(samples, count, _events):
                if samples and count:
                    chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
                return 0

            callback = self._CALLBACK(receive)  # kept alive until espeak is done
            library.espeak_SetSynthCallback(callback)
            if library.espeak_SetVoiceByName(f"{language}+speaker".encode()) != 0:
                raise RuntimeError(f"espeak-ng has no voice for the language {language!r}")
            for parameter, value in (
                (self._RATE, voice.rate),
                (self._PITCH, voice.pitch),
                (self._RANGE, 50),
            ):
                library.espeak_SetParameter(parameter, value, 0)
            content = text.encode() + b"\0"
            library.espeak_Synth(
                content, ctypes.c_size_t(len(content)), 0, 0, 0, self._UTF8, None, None
            )
            library.espeak_Synchronize()
        if not chunks:
            raise RuntimeError(f"espeak-ng gave no samples for {text!r} ({language})")
        return np.concatenate(chunks), rate

    @contextlib.contextmanager
    def _fresh_library(self) -> Iterator[tuple[ctypes.CDLL, int]]:
        """The library in its initial state, and the sample rate of its output."""
        self._count += 1
        copy = self._home / f"{self._count}-{self._library.name}"
        shutil.copyfile(self._library, copy)
        library = ctypes.CDLL(str(copy))
        try:
            rate = library.espeak_Initialize(
                self._SYNCHRONOUS, 0, str(self._home).encode(), self._DONT_EXIT
            )
            if rate <= 0:
                raise RuntimeError(f"espeak-ng cannot read its data below {self._home}")
            yield library, rate
        finally:
            import _ctypes

            library.espeak_Terminate()
            unload = "dlclose" if hasattr(_ctypes, "dlclose") else "FreeLibrary"  # of Windows
            getattr(_ctypes, unload)(library._handle)
            copy.unlink()


@dataclass(frozen=True)
class _Voice:
    description: str  # espeak's voice variant file
    pitch: int  # espeak's pitch parameter, 0 to 99
    rate: int  # words per minute


def _voice(speaker: _Speaker, session: int, rng: np.random.Generator) -> _Voice:
    """The speaker's voice in this session; `rng` moves pitch and rate of the utterance."""
    own = np.random.default_rng((*speaker.key, 0))
    now = np.random.default_rng((*speaker.key, session, 0))
    high = speaker.register == "high"

    tract = own.normal(112 if high else 98, VOICE_TRACT) + now.normal(0, SESSION_TRACT)
    frequency = tract + own.normal(0, VOICE_FORMANT, 9) + now.normal(0, SESSION_FORMANT, 9)
    shape = own.normal(100, VOICE_HEIGHT, (2, 9)) + now.normal(0, SESSION_HEIGHT, (2, 9))
    shape = np.clip(shape, 50, 160)
    semitones = own.normal(0, VOICE_PITCH) + now.normal(0, SESSION_PITCH)
    base = (180 if high else 100) * 2 ** (semitones / 12)
    top = base * own.uniform(1.25, 1.6)
    words = own.normal(165, VOICE_RATE) + now.normal(0, SESSION_RATE)
    lines = [
        "language variant",
        "name speaker",
        f"gender {'female' if high else 'male'}",
        f"pitch {base:.0f} {top:.0f}",
        f"flutter {own.integers(0, 12)}",
        f"roughness {own.integers(0, 5)}",
        f"voicing {own.integers(75, 121)}",
        "breath 0 " + " ".join(str(own.integers(0, 8)) for _ in range(7)),
        *(f"formant {i} {frequency[i]:.0f} {shape[0, i]:.0f} {shape[1, i]:.0f}" for i in range(9)),
    ]
    return _Voice(
        "\n".join(lines) + "\n",
        pitch=int(np.clip(rng.normal(50, 4), 30, 70)),
        rate=int(np.clip(words + rng.normal(0, 5), 110, 240)),
    )


def _text(language: str, rng: np.random.Generator, parts: int) -> str:
    """`parts` different sentences, then a number or four digits."""
    sentences = [SENTENCES[language][i] for i in rng.permutation(len(SENTENCES[language]))[:parts]]
    if rng.random() < 0.5:
        sentences.append(f"{rng.integers(20, 10_000)}.")
    else:
        sentences.append(" ".join(str(d) for d in rng.integers(0, 10, 4)) + ".")
    return " ".join(sentences)


def _utterance(
    synthesiser: _Synthesiser,
    speaker: _Speaker,
    session: int,
    utterance: int,
    babble: np.ndarray,
) -> np.ndarray:
    """Samples (float64, below 1) of one utterance as the microphone has it."""
    rng = np.random.default_rng((*speaker.key, session, utterance))
    voice = _voice(speaker, session, rng)
    text_seed = int(rng.integers(2**31))
    shortest, longest = (int(seconds * SAMPLE_RATE) for seconds in DURATION)
    for parts in range(1, 8):
        text = _text(speaker.language, np.random.default_rng(text_seed), parts)
        raw, rate = synthesiser(text, voice, speaker.language, text_seed)
        if len(raw) * SAMPLE_RATE >= shortest * rate:
            break
    speech = _resample(np.divide(raw, 32768), rate)[: int(rng.uniform(0.5, 1) * longest)]
    if len(speech) < shortest:
        raise RuntimeError(f"espeak-ng spoke for less than {DURATION[0]} s: {text!r}")
    speech[-160:] *= np.linspace(1, 0, 160)

    place = np.random.default_rng((*speaker.key, session, 0, 1))
    speech = _convolve(speech, _room(place))
    kind = place.choice(["white", "pink", "babble"])
    snr = place.uniform(*SNR) + rng.normal(0, 1)
    noise = _noise(kind, len(speech), babble, rng)
    mixed = speech + noise * _rms(speech) / _rms(noise) * 10 ** (-snr / 20)
    mixed = _microphone(mixed, place)
    level = place.uniform(*LEVEL) + rng.normal(0, 1)
    mixed *= 10 ** (level / 20) / _rms(mixed)
    return mixed * min(1, 0.99 / np.abs(mixed).max())


def _babble_voices(synthesiser: _Synthesiser, seed: int) -> np.ndarray:
    """Bystanders [8, samples], speakers of no split, one per language; background chatter."""
    tracks = []
    for i, language in enumerate(SENTENCES):
        bystander = _Speaker("", "", language, ("high", "low")[i % 2], (seed, 98, i))
        rng = np.random.default_rng(bystander.key)
        text = _text(language, rng, 6)
        samples, rate = synthesiser(text, _voice(bystander, 1, rng), language, seed)
        track = _resample(samples / 32768, rate)
        tracks.append(np.resize(track / _rms(track), 10 * SAMPLE_RATE))
    return np.stack(tracks)


def _noise(kind: str, length: int, babble: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if kind == "babble":
        chosen = rng.permutation(len(babble))[:5]
        shifts = rng.integers(0, babble.shape[1], len(chosen))
        talk = np.zeros(length)
        for i, shift in zip(chosen, shifts, strict=True):
            talk += np.roll(babble[i], shift)[:length]
        return talk
    white = rng.standard_normal(length)
    if kind == "white":
        return white
    spectrum = np.fft.rfft(white)
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    spectrum[0] = 0
    return np.fft.irfft(spectrum, length)


def _room(rng: np.random.Generator) -> np.ndarray:
    """Impulse response: the direct path, then noise that decays by 60 dB in the room's RT60."""
    rt60 = rng.uniform(*REVERBERATION)
    ratio = rng.uniform(*DIRECT_TO_REVERBERANT)
    time = np.arange(int(rt60 * SAMPLE_RATE)) / SAMPLE_RATE
    tail = rng.standard_normal(len(time)) * 10 ** (-3 * time / rt60)
    gap = int(rng.uniform(0.001, 0.01) * SAMPLE_RATE)  # to the first reflection
    tail[:gap] = 0
    tail *= 10 ** (-ratio / 20) / np.sqrt(np.sum(tail**2))
    tail[0] = 1
    return tail


def _microphone(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A mild channel: spectral tilt, one broad resonance, and soft band edges."""
    frequency = np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE)
    octaves = np.log2(np.maximum(frequency, 20) / 1000)
    gain = rng.normal(0, 1.0) * octaves  # dB
    gain = gain + rng.normal(0, 3) * np.exp(-(((octaves - rng.uniform(-2, 2)) / 0.7) ** 2))
    low, high = rng.uniform(50, 250), rng.uniform(3800, 7800)
    response = 10 ** (gain / 20)
    response /= np.sqrt(1 + (low / np.maximum(frequency, 1)) ** 4)
    response /= np.sqrt(1 + (frequency / high) ** 8)
    return np.fft.irfft(np.fft.rfft(samples) * response, len(samples))


def _convolve(samples: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Convolution cut to the length of `samples`."""
    length = _even_length(len(samples) + len(response), 1024)
    product = np.fft.rfft(samples, length) * np.fft.rfft(response, length)
    return np.fft.irfft(product, length)[: len(samples)]


def _resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """To SAMPLE_RATE by cutting the spectrum; the end is padded, so that nothing wraps around."""
    common = np.gcd(rate, SAMPLE_RATE)
    up, down = SAMPLE_RATE // common, rate // common
    before = _even_length(len(samples) + rate // 10, 2 * down)
    after = before // down * up
    spectrum = np.fft.rfft(samples, before)
    bins = after // 2 + 1
    spectrum = np.pad(spectrum[:bins], (0, max(0, bins - len(spectrum))))
    return np.fft.irfft(spectrum, after)[: len(samples) * up // down] * (after / before)


def _even_length(least: int, multiple: int) -> int:
    return -(-least // multiple) * multiple


def _rms(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(samples**2))) or 1.0


if __name__ == "__mini_voices_worker__":
    _work()
