"""The corpus of synthetic voices, written by several processes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from speechbrain_qmargin.synthetic.espeak import (
    SAMPLE_RATE,
    Synthesiser,
    babble_voices,
    utterance_samples,
)
from speechbrain_qmargin.synthetic.speakers import Settings, all_speakers

__all__ = ["checksum", "synthesise", "work", "write_bytes"]

# A fresh interpreter: with the parent's import path, but without the parent's script (as
# multiprocessing's spawn would) and without torch.
_WORKER = (
    "import sys, json\n"
    "sys.path[:] = json.loads(sys.argv[1])\n"
    "from speechbrain_qmargin.synthetic.processes import work\n"
    "work()\n"
)


def synthesise(
    folder: Path,
    settings: Settings,
    paths: list[str],
    num_workers: int | None,
    progress: bool,
) -> Iterator[dict]:
    """Write `paths` below wav/ with several processes; yields a manifest entry for each.

    Raises
    ------
    OSError
        A file that cannot be written; named.
    RuntimeError
        A process that failed or was ended, with what it said; the folder is named.
    """
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
                [sys.executable, "-c", _WORKER, json.dumps([str(p) for p in sys.path])],
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


def work() -> None:
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

    settings = Settings(**job["settings"])
    wav = Path(job["folder"]) / "wav"
    speakers = {speaker.name: speaker for speaker in all_speakers(settings)}
    path = None
    try:
        with Synthesiser() as synthesiser:
            babble = babble_voices(synthesiser, settings.seed)
            for path in job["paths"]:
                if stopped:
                    break
                name, session, utterance = Path(path).parts
                numbers = int(session.removeprefix("session")), int(Path(utterance).stem)
                samples = utterance_samples(synthesiser, speakers[name], *numbers, babble)
                content = _flac(samples)
                (wav / path).parent.mkdir(parents=True, exist_ok=True)
                write_bytes(wav / path, content)
                answer(path=path, bytes=len(content), sha256=checksum(content))
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


def checksum(content: bytes) -> str:
    """SHA-256 in hexadecimal digits, as the corpus's manifest has it.

    Examples
    --------
    >>> checksum(b"hello")[:16]
    '2cf24dba5fb0a30e'
    """
    return hashlib.sha256(content).hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Write so that `path` holds either the whole of `content` or what it held before.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "00001.flac"
    >>> write_bytes(file, b"samples")
    >>> [path.name for path in file.parent.iterdir()]
    ['00001.flac']
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
