"""Does loading starve the model? Utterances per second of every stage against the model's need.

    python benchmarks/data_throughput.py [--seconds 4] [--shards] [--profile]

Crops of 2 s from utterances of 8 s (VoxCeleb2's mean length) of synthetic voices in the formats of
the corpora. The files are in the page cache: this is the processor's work; --shards also reads them
cold, file by file and from one tar file. Stages run in one process with one thread each.
"""

import argparse
import cProfile
import itertools
import os
import pstats
import random
import sys
import tarfile
import tempfile
import time
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import soundfile
import torch
from speechbrain.lobes.features import Fbank
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
from speechbrain.processing.features import InputNormalization
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from speechbrain_qmargin.data.augment import WESPEAKER_SPEEDS, room_and_noise
from speechbrain_qmargin.data.speech import speech_dataset
from speechbrain_qmargin.features import KaldiFbank
from speechbrain_qmargin.models.resnet import ResNet34

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from voxceleb_tree import write_m4a

RATE, CROP, LENGTH = 16000, 2.0, 8.0
GPU_FLOPS = 40e12  # assumption: what a data-centre GPU sustains in training with TF32 or bf16


def build(folder: Path, count: int) -> dict[str, dict[str, dict]]:
    """`count` utterances in three formats, MUSAN and rooms; manifests by format."""
    rng = np.random.default_rng(0)
    manifests: dict[str, dict[str, dict]] = {"wav": {}, "flac": {}, "m4a": {}}
    for index in range(count):
        time_axis = np.arange(int(LENGTH * RATE)) / RATE
        signal = 0.05 * rng.standard_normal(len(time_axis))
        for harmonic in range(1, 12):
            signal += 0.03 * np.sin(2 * np.pi * rng.uniform(100, 200) * harmonic * time_axis)
        for suffix, entries in manifests.items():
            path = folder / suffix / f"id{index % 20:05d}" / "video" / f"{index:05d}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if suffix == "m4a":
                write_m4a(path, signal)
            else:
                soundfile.write(path, signal, RATE, subtype="PCM_16")
            entries[f"id{index % 20:05d}/video/{index:05d}"] = {
                "wav": str(path),
                "duration": LENGTH,
                "spk_id": f"id{index % 20:05d}",
            }
    for kind, number in itertools.product(("noise", "speech", "music"), range(8)):
        path = folder / "musan" / kind / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.1 * rng.standard_normal(60 * RATE), RATE, subtype="PCM_16")
    for number in range(100):
        path = folder / "rirs" / f"{number}.wav"
        path.parent.mkdir(exist_ok=True)
        decay = np.exp(-np.arange(RATE) / (0.1 * RATE)) * rng.standard_normal(RATE)
        soundfile.write(path, decay / np.abs(decay).max(), RATE, subtype="PCM_16")
    return manifests


class Encoder(dict):
    def encode_sequence_torch(self, names):
        return torch.tensor([self[name] for name in names])


def dataset(manifest, **kwargs):
    speakers = sorted({item["spk_id"] for item in manifest.values()})
    encoder = Encoder({name: index for index, name in enumerate(speakers)})
    return speech_dataset(manifest, RATE, label_encoder=encoder, **kwargs)


def rate_of(action, items: int, seconds: float) -> float:
    """Items per second of an action that handles `items` of them."""
    action()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        action()
        count += items
    return count / (time.perf_counter() - start)


def loading(data, seconds: float) -> float:
    order = itertools.cycle(random.Random(0).sample(range(len(data)), len(data)))
    return rate_of(lambda: data[next(order)], 1, seconds)


def with_workers(data, workers: int, batch: int, features, seconds: float) -> float:
    """A DataLoader's rate, features of each batch in the main process included."""
    loader = DataLoader(
        data,
        batch_size=batch,
        sampler=itertools.cycle(range(len(data))),
        num_workers=workers,
        collate_fn=lambda items: torch.stack([item["sig"] for item in items]),
    )
    batches = iter(loader)
    return rate_of(lambda: features(next(batches)), batch, seconds)


def print_row(name: str, rate: float) -> None:
    print(f"{name:58s} {rate:9.0f} utterances/s {1000 / rate:8.2f} ms", flush=True)


def models(seconds: float, batch: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    features = torch.randn(batch, 201, 80)
    for name, model in (
        ("ECAPA-TDNN 1024", ECAPA_TDNN(80, channels=[1024] * 4 + [3072], lin_neurons=192)),
        ("ResNet34", ResNet34(80)),
    ):

        def step(model=model):
            model.zero_grad()
            model(features).sum().backward()

        counter = FlopCounterMode(display=False)
        with counter:
            step()
        operations = counter.get_total_flops() / batch
        print_row(
            f"{name}, forward and backward, {os.cpu_count()} threads", rate_of(step, batch, seconds)
        )
        print_row(
            f"  {operations / 1e9:.1f} GFLOP each; at {GPU_FLOPS / 1e12:.0f} TFLOP/s (assumed GPU)",
            GPU_FLOPS / operations,
        )
    torch.set_num_threads(threads)


def cold(paths: list[Path]) -> None:
    os.sync()
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def shards(manifest: dict[str, dict], folder: Path) -> None:
    """The same FLAC crops file by file (a seek) and from a tar file in its order (whole files)."""
    paths = [Path(item["wav"]) for item in manifest.values()]
    shard = folder / "shard.tar"
    with tarfile.open(shard, "w") as tar:
        for path in paths:
            tar.add(path, path.name)
    shuffled = random.Random(0).sample(paths, len(paths))

    def from_files():
        for path in shuffled:
            with soundfile.SoundFile(str(path)) as file:
                file.seek(random.randrange(file.frames - int(CROP * RATE)))
                file.read(int(CROP * RATE), dtype="float32")

    def from_shard():
        with tarfile.open(shard, "r|") as tar:
            for member in tar:
                with soundfile.SoundFile(BytesIO(tar.extractfile(member).read())) as file:
                    file.seek(random.randrange(file.frames - int(CROP * RATE)))
                    file.read(int(CROP * RATE), dtype="float32")

    for name, action, files in (
        ("files", from_files, paths),
        ("one tar file, in sequence", from_shard, [shard]),
    ):
        for state in ("cold", "cached"):
            if state == "cold":
                cold(files)
            start = time.perf_counter()
            action()
            print_row(
                f"FLAC crops from {name}, {state}", len(paths) / (time.perf_counter() - start)
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="per measurement")
    parser.add_argument("--count", type=int, default=400, help="utterances")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--shards", action="store_true")
    parser.add_argument("--no_models", action="store_true", help="skip the models' need")
    parser.add_argument("--profile", action="store_true", help="where the time of a crop goes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder, seconds = Path(name), arguments.seconds
        manifests = build(folder, arguments.count)
        full = {
            "speeds": WESPEAKER_SPEEDS,
            "augment": room_and_noise(RATE, musan=folder / "musan", rirs=folder / "rirs"),
        }
        for suffix, manifest in manifests.items():
            print_row(f"{suffix}: crops of 2 s", loading(dataset(manifest, crop=CROP), seconds))
        m4a = manifests["m4a"]
        print_row("m4a: whole utterances of 8 s", loading(dataset(m4a), seconds))
        for suffix, manifest in manifests.items():
            if suffix == "flac":
                data = dataset(manifest, crop=CROP, speeds=WESPEAKER_SPEEDS)
                print_row("flac: crops, speeds", loading(data, seconds))
            data = dataset(manifest, crop=CROP, **full)
            print_row(f"{suffix}: crops, speeds, rooms and noise", loading(data, seconds))
        data = dataset(manifests["flac"], crop=CROP, **full)
        if arguments.profile:
            with cProfile.Profile() as profile:
                loading(data, seconds)
            pstats.Stats(profile).sort_stats("tottime").print_stats(18)

        normalise = InputNormalization("sentence", std_norm=False)

        def features(signals, fbank):
            return normalise(fbank(signals), torch.ones(len(signals)))

        signals = torch.randn(arguments.batch, int(CROP * RATE))
        for name, fbank in (
            ("Kaldi's, training", KaldiFbank()),
            ("Kaldi's, evaluation", KaldiFbank().eval()),
            ("SpeechBrain's", Fbank(sample_rate=RATE, n_mels=80)),
        ):
            rate = rate_of(partial(features, signals, fbank), len(signals), seconds)
            print_row(f"features of a batch, {name}", rate)
        of_training = partial(features, fbank=KaldiFbank())
        for workers in (0, 1, 2):
            rate = with_workers(data, workers, arguments.batch, of_training, seconds)
            print_row(f"flac: all of it and features, {workers} workers", rate)
        if arguments.shards:
            shards(manifests["flac"], folder)
    if not arguments.no_models:
        models(seconds, arguments.batch)


if __name__ == "__main__":
    main()
