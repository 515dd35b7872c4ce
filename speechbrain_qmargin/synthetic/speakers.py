"""Who is in the corpus of synthetic voices, and who is compared with whom, by its settings."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from speechbrain_qmargin.synthetic.sentences import SENTENCES

__all__ = ["SPLITS", "Settings", "Speaker", "all_speakers", "trials_of", "utterances_of"]

# Voice groups: (language, register). Test speakers share four groups, so that language and
# register tell few impostors apart.
SPLITS = {
    "train": [(language, register) for language in SENTENCES for register in ("high", "low")],
    "valid": [("fr", "high"), ("fr", "low"), ("es", "high"), ("es", "low")],
    "test": [("en-us", "high"), ("en-us", "low"), ("de", "high"), ("de", "low")],
}


@dataclass(frozen=True)
class Settings:
    """What determines the samples and lists, besides CORPUS_VERSION.

    Attributes
    ----------
    seed : int
    num_train_speakers, num_valid_speakers, num_test_speakers : int
        At least 2 each.
    num_sessions : int
        Of a speaker; at least 2.
    num_utterances : int
        Of a session; at least 1.

    Raises
    ------
    ValueError
        A number out of range, or none; named.

    Examples
    --------
    >>> Settings(0, 2, 2, 2, num_sessions=1, num_utterances=1)
    Traceback (most recent call last):
    ValueError: num_sessions must be an integer from 2 to 9999, not 1
    """

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
class Speaker:
    """A voice, and the part of the corpus that it is in.

    Attributes
    ----------
    name : str
        "mv" and five digits.
    split : str
        "train", "valid" or "test".
    language : str
        As espeak-ng names it.
    register : str
        "high" or "low".
    key : tuple of int
        Seeds every draw about this speaker, with session and utterance (from 1) appended. What is
        about the speaker or the session alone has a zero there.

    Examples
    --------
    >>> speaker = all_speakers(Settings(0, 2, 2, 2, num_sessions=2, num_utterances=1))[-1]
    >>> speaker.name, speaker.split, speaker.group
    ('mv20002', 'test', ('en-us', 'low'))
    """

    name: str
    split: str
    language: str
    register: str
    key: tuple[int, int, int]

    @property
    def group(self) -> tuple[str, str]:
        """Language and register, which most impostor trials share."""
        return self.language, self.register


def all_speakers(settings: Settings) -> list[Speaker]:
    """All speakers, split by split; groups are dealt in turn, so a smaller corpus is a prefix.

    Examples
    --------
    >>> speakers = all_speakers(Settings(0, 2, 2, 2, num_sessions=2, num_utterances=1))
    >>> [speaker.name for speaker in speakers]
    ['mv00001', 'mv00002', 'mv10001', 'mv10002', 'mv20001', 'mv20002']
    """
    speakers = []
    for number, (split, groups) in enumerate(SPLITS.items()):
        for i in range(getattr(settings, f"num_{split}_speakers")):
            language, register = groups[i % len(groups)]
            name = f"mv{number * 10_000 + i + 1:05d}"
            speakers.append(Speaker(name, split, language, register, (settings.seed, number, i)))
    return speakers


def utterances_of(speaker: Speaker, settings: Settings) -> list[str]:
    """The paths of a speaker's utterances below ``wav/``, session by session.

    Examples
    --------
    >>> settings = Settings(0, 2, 2, 2, num_sessions=2, num_utterances=1)
    >>> utterances_of(all_speakers(settings)[0], settings)
    ['mv00001/session1/00001.flac', 'mv00001/session2/00001.flac']
    """
    return [
        f"{speaker.name}/session{session}/{utterance:05d}.flac"
        for session in range(1, settings.num_sessions + 1)
        for utterance in range(1, settings.num_utterances + 1)
    ]


def trials_of(settings: Settings, speakers: list[Speaker]) -> list[str]:
    """Lines ``label enrolment test``, shuffled by the settings' seed.

    All targets across sessions; impostors within the group, and half as many across languages.
    Where no two speakers are of one group, all impostors across languages, else all there are.

    Examples
    --------
    >>> settings = Settings(0, 2, 2, 2, num_sessions=2, num_utterances=1)
    >>> lines = trials_of(settings, all_speakers(settings)[-2:])
    >>> sorted(line[0] for line in lines)  # a target trial each, every utterance of the other's two
    ['0', '0', '0', '0', '1', '1']
    """
    lines, within, across, others = [], [], [], []
    for speaker in speakers:
        for one, two in itertools.combinations(utterances_of(speaker, settings), 2):
            if Path(one).parent != Path(two).parent:
                lines.append(f"1 {one} {two}\n")
    for a, b in itertools.combinations(speakers, 2):
        kind = within if a.group == b.group else across if a.register == b.register else others
        pairs = itertools.product(utterances_of(a, settings), utterances_of(b, settings))
        kind += [f"0 {one} {two}\n" for one, two in pairs]
    rng = np.random.default_rng((settings.seed, 99))
    if within:
        across = [across[i] for i in sorted(rng.permutation(len(across))[: len(within) // 2])]
    lines += within + across or others  # only a tiny corpus has no two voices of one register
    return [lines[i] for i in rng.permutation(len(lines))]
