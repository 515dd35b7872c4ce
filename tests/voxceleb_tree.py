"""VoxCeleb at a thousandth of its size: its names, layout, formats and list files, not its voices.

The voices are harmonic tones with formants of their own, enough to go through every stage of the
real recipe; accuracy on them says nothing.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np

from speechbrain_qmargin.extras import require
from speechbrain_qmargin.files import replacing, write_text

__all__ = ["DryRunTree", "build_dry_run_tree", "write_m4a"]

RATE = 16000


class DryRunTree:
    """Where things are in a tree of :func:`build_dry_run_tree`.

    Attributes
    ----------
    voxceleb1, voxceleb2, musan, rirs : Path
        Folders.
    lists : dict
        ``O``, ``E``, ``H`` (cleaned) to their files.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.voxceleb1 = self.folder / "voxceleb1"
        self.voxceleb2 = self.folder / "voxceleb2"
        self.musan = self.folder / "musan"
        self.rirs = self.folder / "RIRS_NOISES"
        names = {"O": "veri_test2", "E": "list_test_all2", "H": "list_test_hard2"}
        self.lists = {key: self.folder / "lists" / f"{name}.txt" for key, name in names.items()}


def build_dry_run_tree(
    folder: str | Path, *, train_speakers: int = 6, test_speakers: int = 6, seed: int = 0
) -> DryRunTree:
    """Write a tiny VoxCeleb2, VoxCeleb1, MUSAN and RIRS_NOISES with their real names and formats.

    ::

        voxceleb2/dev/aac/id00012/<video>/00001.m4a        two videos of two utterances each
        voxceleb1/vox1_dev_wav/wav/id1XXXX/<video>/00001.wav
        voxceleb1/vox1_test_wav/wav/id10270/<video>/00001.wav
        lists/veri_test2.txt  list_test_all2.txt  list_test_hard2.txt
        musan/{noise/free-sound,speech/librivox,music/fma}/*.wav
        RIRS_NOISES/simulated_rirs/{small,medium,large}room/Room001/Room001-00001.wav

    A tree that is complete is left alone.

    Parameters
    ----------
    folder : path
    train_speakers, test_speakers : int
        Of VoxCeleb2 and VoxCeleb1; a third of the latter, at least two, is the test part.
    seed : int

    Raises
    ------
    ImportError
        PyAV, which writes the m4a files, is missing: extra ``voxceleb``.

    Examples
    --------
    >>> tree = build_dry_run_tree(getfixture("tmp_path"), train_speakers=2, test_speakers=4)
    >>> len(list(tree.voxceleb2.glob("dev/aac/id*/*/*.m4a")))
    8
    >>> sorted(path.name for path in (tree.folder / "lists").iterdir())
    ['list_test_all2.txt', 'list_test_hard2.txt', 'veri_test2.txt']
    """
    import soundfile

    tree = DryRunTree(folder)
    settings = f"{train_speakers} {test_speakers} {seed}\n"
    done = tree.folder / ".complete"
    if done.is_file() and done.read_text() == settings:
        return tree

    def write_wav(path: Path, samples: np.ndarray) -> None:
        with replacing(path) as partial:
            soundfile.write(str(partial), samples, RATE, subtype="PCM_16")

    rng = np.random.default_rng(seed)
    for speaker in range(train_speakers):
        voice = _voice(rng)
        for _ in range(2):
            name = f"id{12 + 3 * speaker:05d}/{_video(rng)}"
            for utterance in range(2):
                path = tree.voxceleb2 / "dev" / "aac" / name / f"{utterance + 1:05d}.m4a"
                write_m4a(path, _utterance(voice, rng))

    dev = max(0, test_speakers - max(2, test_speakers // 3))
    parts: dict[str, list[str]] = {"vox1_dev_wav": [], "vox1_test_wav": []}
    for speaker in range(test_speakers):
        voice = _voice(rng)
        part = "vox1_dev_wav" if speaker < dev else "vox1_test_wav"
        number = 10001 + speaker if speaker < dev else 10270 + speaker - dev
        for _ in range(2):
            video = _video(rng)
            for utterance in range(2):
                name = f"id{number}/{video}/{utterance + 1:05d}.wav"
                write_wav(tree.voxceleb1 / part / "wav" / name, _utterance(voice, rng))
                parts[part].append(name)
    test = parts["vox1_test_wav"]
    everybody = parts["vox1_dev_wav"] + test
    write_text(tree.lists["O"], _trials(test))
    write_text(tree.lists["E"], _trials(everybody))
    write_text(tree.lists["H"], _trials(everybody, step=2))

    for kind, source in (("noise", "free-sound"), ("speech", "librivox"), ("music", "fma")):
        for number in range(2):
            name = f"{kind}-{source}-{number:04d}.wav"
            samples = 0.1 * rng.standard_normal(5 * RATE)
            write_wav(tree.musan / kind / source / name, samples)
    for room in ("smallroom", "mediumroom", "largeroom"):
        decay = np.exp(-np.arange(RATE // 2) / (0.05 * RATE)) * rng.standard_normal(RATE // 2)
        name = f"simulated_rirs/{room}/Room001/Room001-00001.wav"
        write_wav(tree.rirs / name, decay / np.abs(decay).max())
    write_text(done, settings)
    return tree


def write_m4a(path: str | Path, samples: np.ndarray, rate: int = RATE) -> None:
    """Mono samples [time] as AAC in an m4a file.

    Raises
    ------
    ImportError
        PyAV is missing: extra ``voxceleb``.
    """
    require("av", why="m4a files are written by PyAV", extra="voxceleb")
    import av

    with replacing(path) as partial, av.open(str(partial), "w", format="ipod") as container:
        stream = container.add_stream("aac", rate=rate, layout="mono")
        stream.bit_rate = 64_000
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(samples[None], np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate, frame.pts = rate, 0
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


def _video(rng: np.random.Generator) -> str:
    letters = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"))
    return "".join(rng.choice(letters, 11))


def _voice(rng: np.random.Generator) -> tuple[float, np.ndarray]:
    """Pitch in Hz, and amplitudes of forty harmonics below an envelope of three formants."""
    pitch = rng.uniform(90, 240)
    formants = rng.uniform([300, 900, 2200], [800, 2000, 3200])
    frequencies = pitch * np.arange(1, 41)
    envelope = np.exp(-(((frequencies[:, None] - formants) / 250) ** 2)).sum(1) + 0.02
    return pitch, envelope * (frequencies < RATE / 2 - 500)


def _utterance(voice: tuple[float, np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """1.2 to 2 s of a wandering pitch, syllables and a little noise, [time] in [-0.5, 0.5]."""
    pitch, harmonics = voice
    time = np.arange(int(rng.uniform(1.2, 2.0) * RATE)) / RATE
    wander = np.interp(time, np.arange(0, 6, 0.2), rng.normal(1, 0.05, 30))
    phase = 2 * np.pi * np.cumsum(pitch * wander) / RATE
    signal = sum(a * np.sin(k * phase) for k, a in enumerate(harmonics, 1) if a > 0)
    syllables = 0.2 + np.sin(np.pi * rng.uniform(3, 5) * time) ** 2
    signal = signal * syllables + 0.02 * rng.standard_normal(len(time))
    return 0.5 * signal / np.abs(signal).max()


def _trials(names: list[str], step: int = 1) -> str:
    """All target pairs, every `step`-th impostor pair."""
    pairs = [(a[:7] == b[:7], a, b) for a, b in combinations(sorted(names), 2)]
    targets = [pair for pair in pairs if pair[0]]
    impostors = [pair for pair in pairs if not pair[0]][::step]
    return "".join(f"{int(same)} {a} {b}\n" for same, a, b in targets + impostors)
