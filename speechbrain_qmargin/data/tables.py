"""Corpora that are listed in a table: SpeechBrain's CSV, Kaldi's folders."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from speechbrain_qmargin.data.manifest import Item, Manifest
from speechbrain_qmargin.tables import numbered_lines, read_columns, read_map, some

__all__ = ["is_table", "read_csv", "read_kaldi", "read_table"]

logger = logging.getLogger(__name__)

_COLUMNS = ("ID", "duration", "wav", "start", "stop", "spk_id")
_RATES = (8_000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)  # Hz
_ROUNDED = 0.06  # seconds by which a duration may be off
_COUNTED = (
    "start and stop count samples at {rate:,} Hz here, whatever the files' rate is: count them so, "
    "or, where the rows are whole recordings, leave the two columns out"
)


def is_table(source: str | Path) -> bool:
    """Whether a path is a CSV file, a ``wav.scp``, or a folder with one.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> is_table(folder)
    False
    >>> (folder / "wav.scp").touch()
    >>> is_table(folder), is_table(folder / "wav.scp")
    (True, True)
    """
    source = Path(source)
    return source.is_file() or (source / "wav.scp").is_file()


def read_table(source: Path, for_trials: bool = False) -> Manifest:
    """A corpus from its table; the name tells a CSV file from Kaldi's.

    Parameters
    ----------
    source : path
        ``*.csv``, ``wav.scp``, or a folder that holds one.
    for_trials : bool
        Without effect: a table is taken whole.

    Raises
    ------
    ValueError, OSError
        As :func:`read_csv` and :func:`read_kaldi`.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "train.csv").write_text("ID,wav,spk_id\\nann--1,/data/a.wav,ann\\n")
    >>> _ = (folder / "wav.scp").write_text("ann-1 /data/a.wav")
    >>> _ = (folder / "utt2spk").write_text("ann-1 ann")
    >>> read_table(folder / "train.csv")[0].id, read_table(folder)[0].id
    ('ann--1', 'ann-1')
    """
    if source.is_dir() or source.suffix == ".scp":
        return read_kaldi(source)
    return read_csv(source)


def read_csv(path: str | Path, *, sample_rate: int = 16000) -> Manifest:
    """SpeechBrain's manifest: columns ID, wav and spk_id, perhaps duration, start and stop.

    Columns may come in any order, others are passed over. `start` and `stop` count samples, as
    SpeechBrain's recipes write them; a row is that stretch of the file. Without `duration` and
    `stop` the duration is NaN, and :func:`~speechbrain_qmargin.data.speech.prepare_speech` asks the
    file. Relative paths are relative to the CSV's folder.

    Parameters
    ----------
    path : path
    sample_rate : int
        Hz, of the samples that `start` and `stop` count.

    Raises
    ------
    ValueError
        A missing column, a malformed line, an id twice, a placeholder that SpeechBrain would fill
        in: with file and line.

    Examples
    --------
    >>> path = getfixture("tmp_path") / "train.csv"
    >>> _ = path.write_text("ID,duration,wav,start,stop,spk_id\\nann--1,4.0,/a.wav,16000,48000,ann")
    >>> read_csv(path)[0]
    Item(id='ann--1', file='/a.wav', label='ann', start=1.0, duration=2.0, part=True)
    """
    path = Path(path)
    folder = os.path.abspath(path.parent)
    header, rows = read_columns(path)
    if not {"ID", "wav", "spk_id"} <= set(header):
        raise ValueError(
            f"{path}:1: the columns must be {', '.join(_COLUMNS)} (duration, start and stop may be "
            f"left out); they are {', '.join(header)}"
        )
    return Manifest.of(_items(path, header, rows, folder, sample_rate))


def _items(
    path: Path,
    header: list[str],
    rows: Iterator[tuple[int, list[str]]],
    folder: str,
    rate: int,
) -> Iterator[Item]:
    name_at, file_at, speaker_at = (header.index(key) for key in ("ID", "wav", "spk_id"))
    seconds_at, start_at, stop_at = (
        header.index(key) if key in header else None for key in ("duration", "start", "stop")
    )

    def number(row: list[str], at: int | None, default: float) -> float:
        if at is None or not row[at]:
            return default
        value = float(row[at])
        if not 0 <= value < 1e9 * rate:
            raise ValueError(row[at])
        return value

    other_rates = set(_RATES)  # at which every row's stop is the end of its recording
    count = 0
    for line, row in rows:
        try:
            duration = number(row, seconds_at, float("nan"))
            start = number(row, start_at, 0.0)
            stop = number(row, stop_at, float("nan"))
            if stop <= start:
                raise ValueError(f"a stop of {stop:.0f} and a start of {start:.0f}")
        except ValueError as error:
            raise ValueError(
                f"{path}:{line}: seconds and samples that are 0 or more are wanted, got {error} in "
                f"{','.join(row)!r}"
            ) from None
        name, file, speaker = (row[at] for at in (name_at, file_at, speaker_at))
        if "$" in file or "{" in file:
            raise ValueError(f"{path}:{line}: {file} has a placeholder; write the paths out")
        if not (name and file and speaker):
            raise ValueError(f"{path}:{line}: ID, wav and spk_id must not be empty")
        same = abs(stop / rate - duration) < 1 / rate
        whole = start == 0 and (math.isnan(stop) or same)
        length = duration - start / rate if math.isnan(stop) else (stop - start) / rate
        if length > 1.05 * duration + 0.5:
            raise ValueError(
                f"{path}:{line}: {name} is to be {length:.2f} s of {duration:.2f} s. "
                f"{_COUNTED.format(rate=rate)}"
            )
        count += 1
        other_rates = {
            one for one in other_rates if not start and abs(stop / one - duration) < _ROUNDED
        }
        yield Item(
            name,
            os.path.join(folder, file),
            speaker,
            start / rate,
            duration if whole else length,
            not whole,
        )
    if count > 1 and other_rates and rate not in other_rates:
        raise ValueError(
            f"{path}: every stop is the end of its recording at {min(other_rates):,} Hz. "
            f"{_COUNTED.format(rate=rate)}"
        )


def read_kaldi(source: str | Path) -> Manifest:
    """Kaldi's ``wav.scp`` with ``utt2spk``, and ``segments`` and ``utt2dur`` if they are there.

    Relative paths are relative to the folder.

    Parameters
    ----------
    source : path
        The folder or its ``wav.scp``.

    Raises
    ------
    FileNotFoundError
        No ``wav.scp`` or ``utt2spk``.
    ValueError
        A command in the place of a file (``sph2pipe ... |``: nothing is run), a line that is not
        ``id path``, an id twice, a recording without a speaker: with file and line.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "wav.scp").write_text("ann-1 /data/ann/1.wav")
    >>> _ = (folder / "utt2spk").write_text("ann-1 ann")
    >>> read_kaldi(folder)[0]
    Item(id='ann-1', file='/data/ann/1.wav', label='ann', start=0.0, duration=nan, part=False)
    """
    source = Path(source)
    scp = source / "wav.scp" if source.is_dir() else source
    folder = scp.parent
    if not scp.is_file():
        raise FileNotFoundError(f"{scp}: no such file")
    if not (folder / "utt2spk").is_file():
        raise FileNotFoundError(f"{folder / 'utt2spk'}: no such file; it says who speaks in {scp}")
    speakers: dict[str, str] = read_map(folder / "utt2spk")
    files = _read_scp(scp)
    if (folder / "segments").is_file():
        parts = _read_segments(folder / "segments", files)
        _refuse_nobodys(folder / "utt2spk", parts, speakers)
        return Manifest.of(
            Item(name, file, speakers[name], start, duration, True)
            for name, (file, start, duration) in parts.items()
        )
    _refuse_nobodys(folder / "utt2spk", files, speakers)
    durations: dict[str, float] = {}
    if (folder / "utt2dur").is_file():
        durations = read_map(folder / "utt2dur", float)
    return Manifest.of(
        Item(name, file, speakers[name], 0.0, durations.get(name, float("nan")))
        for name, file in files.items()
    )


def _refuse_nobodys(
    utt2spk: Path, recordings: Mapping[str, Any], speakers: Mapping[str, str]
) -> None:
    """Recordings without a speaker; the other way round it is said."""
    nobody = [name for name in recordings if name not in speakers]
    if nobody:
        raise ValueError(
            f"{utt2spk}: {len(nobody)} recordings have no speaker, the first is {nobody[0]}"
        )
    if len(recordings) < len(speakers):
        lost = [name for name in speakers if name not in recordings]
        logger.warning(
            f"{utt2spk}: {len(lost):,} of its {len(speakers):,} recordings are not in wav.scp or "
            f"segments, and are not used: {some(lost)}"
        )


def _read_scp(scp: Path) -> dict[str, str]:
    files: dict[str, str] = {}
    folder = os.path.abspath(scp.parent)
    for number, line in numbered_lines(scp):
        line = line.strip()
        name, _, file = line.partition("\t" if "\t" in line else " ")
        file = file.strip()
        if not file:
            raise ValueError(f"{scp}:{number}: expected 'id path', got {line!r}")
        if file.endswith("|") or file.startswith("|"):
            raise ValueError(
                f"{scp}:{number}: {file!r} is a command, and nothing is run: write what it makes "
                "to files and list them"
            )
        if name in files:
            raise ValueError(f"{scp}:{number}: {name} is listed twice")
        files[name] = os.path.join(folder, file)
    return files


def _read_segments(path: Path, files: dict[str, str]) -> dict[str, tuple[str, float, float]]:
    """File, start and seconds of every segment; NaN seconds where it goes on to the file's end."""
    parts: dict[str, tuple[str, float, float]] = {}
    for number, line in numbered_lines(path):
        try:
            name, recording, start, end = line.split()
            begin, length = float(start), float(end) - float(start)
            if float(end) == -1:  # Kaldi's: to the end
                length = math.nan
            if not begin >= 0 or not (0 < length < 1e9 or math.isnan(length)):
                raise ValueError
            if recording not in files:
                raise ValueError
        except ValueError:
            raise ValueError(
                f"{path}:{number}: expected 'id recording start end' with a recording of wav.scp, "
                f"got {line!r}"
            ) from None
        if name in parts:
            raise ValueError(f"{path}:{number}: {name} is listed twice")
        parts[name] = files[recording], begin, length
    return parts
