"""What reading long recordings in windows costs and saves.

    python benchmarks/windows.py memory [--seconds 300] [--channels 1024]
    python benchmarks/windows.py embeddings ENCODER RECORDINGS [--seconds 60]

`memory`: the peak of a process that embeds one recording by an ECAPA-TDNN of random weights, whole
and in windows of 20 s. `embeddings`: the cosine of a long recording's two embeddings, whole and in
windows, where a person's recordings are joined; beside it that of two halves of the same recording.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import soundfile


def embed(file: str, window: float, channels: int, queue) -> None:
    import time

    from speechbrain.lobes.features import Fbank
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
    from speechbrain.processing.features import InputNormalization

    from speechbrain_qmargin.export.encoder import SpeakerEncoder
    from speechbrain_qmargin.verify.readers import SpeechReader

    modules = {
        "compute_features": Fbank(n_mels=80),
        "mean_var_norm": InputNormalization(norm_type="sentence", std_norm=False),
        "embedding_model": ECAPA_TDNN(80, channels=[channels] * 4 + [3 * channels]),
    }
    reader = SpeechReader(SpeakerEncoder(modules), window=window, checked=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    reader.embed([reader.read(file)])
    took = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    queue.put((after / 2**20, (after - before) / 2**20, took))


def memory(args) -> None:
    rng, context = np.random.default_rng(0), multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/long.wav"
        soundfile.write(file, 0.1 * rng.standard_normal(args.seconds * 16000), 16000)
        for name, window in (("windows of 20 s", 20.0), ("whole", args.seconds + 1.0)):
            queue = context.Queue()
            process = context.Process(target=embed, args=(file, window, args.channels, queue))
            process.start()
            process.join()
            if process.exitcode:
                print(f"{name}: ended with {process.exitcode}")
                continue
            peak, more, took = queue.get()
            print(f"{args.seconds} s, {name}: peak {peak:.2f} GiB, {more:.2f} GiB of it for the "
                  f"recording, {took:.1f} s")  # fmt: skip


def embeddings(args) -> None:
    from speechbrain_qmargin.data.audio import read_audio
    from speechbrain_qmargin.export.recordings import find_recordings
    from speechbrain_qmargin.trials import speaker_in
    from speechbrain_qmargin.verify.verifier import load_reader

    files = defaultdict(list)
    for name, path in find_recordings(args.recordings).items.items():
        files[speaker_in(name)].append(path)
    windows, halves = [], []
    with tempfile.TemporaryDirectory() as folder:
        readers = [load_reader(args.encoder, window=w, checked=False) for w in (20.0, 1e4)]

        def cosine(a, b) -> float:
            return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

        for paths in files.values():
            joined = np.concatenate([read_audio(path, 16000).numpy() for path in paths])
            joined = joined[: args.seconds * 16000]
            if len(joined) < args.seconds * 16000:
                continue
            found = []
            for reader in readers:
                soundfile.write(f"{folder}/a.wav", joined, 16000)
                found.append(reader.embed([reader.read(f"{folder}/a.wav")])[0])
            windows.append(cosine(*found))
            sides = []
            for half in np.array_split(joined, 2):
                soundfile.write(f"{folder}/a.wav", half, 16000)
                sides.append(readers[1].embed([readers[1].read(f"{folder}/a.wav")])[0])
            halves.append(cosine(*sides))
    for name, found in (("whole and in windows", windows), ("first and second half", halves)):
        low, middle = np.percentile(found, (0, 50))
        print(f"{name}: {len(found)} people, {args.seconds} s: cosine {middle:.4f} in the middle, "
              f"{low:.4f} at least")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    sub = commands.add_parser("memory")
    sub.add_argument("--seconds", type=int, default=300)
    sub.add_argument("--channels", type=int, default=1024)
    sub.set_defaults(run=memory)
    sub = commands.add_parser("embeddings")
    sub.add_argument("encoder", type=Path)
    sub.add_argument("recordings", type=Path)
    sub.add_argument("--seconds", type=int, default=60)
    sub.set_defaults(run=embeddings)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
