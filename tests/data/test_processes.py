"""What loads data is sent to a process, however that is started; the items are the same."""

import io
import pickle

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from speechbrain.utils.epoch_loop import EpochCounter
from torch.utils.data import ConcatDataset, DataLoader

from speechbrain_qmargin.data.augment import WESPEAKER_SPEEDS, room_and_noise
from speechbrain_qmargin.data.epochs import CurrentEpoch
from speechbrain_qmargin.data.face_dataset import FaceDataset, ImageDataset, StoredDataset
from speechbrain_qmargin.data.manifest import Item, Manifest
from speechbrain_qmargin.data.recordio import write_records
from speechbrain_qmargin.data.records import FaceRecords
from speechbrain_qmargin.data.skipped import Skipped
from speechbrain_qmargin.data.speech_dataset import SpeechDataset

RATE = 16000


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech")
    items = []
    for speaker in "abc":
        for number in range(2):
            samples = 0.1 * np.random.default_rng([ord(speaker), number]).standard_normal(RATE)
            path = folder / f"{speaker}{number}.wav"
            soundfile.write(path, samples, RATE)
            items.append(Item(f"{speaker}/{number}", str(path), speaker, 0.0, 1.0))
    (folder / "b1.wav").write_bytes(b"")
    return Manifest.of(items).kept_in(folder / "train.manifest")


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    images = []
    for number in range(6):
        stream = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(stream, format="PNG")
        images.append(stream.getvalue())
        (folder / f"{number}.png").write_bytes(images[-1])
    write_records(folder / "train.rec", images, [n // 2 for n in range(6)])
    items = [Item(f"{n // 2}/{n}", str(folder / f"{n}.png"), str(n // 2)) for n in range(6)]
    return folder, Manifest.of(items)


def datasets(speech, faces, save):
    """Every kind, in its second epoch."""
    counter = EpochCounter(limit=3)
    next(counter), next(counter)
    epoch = CurrentEpoch(counter)
    folder, images = faces
    labels = {"a": 0, "b": 1, "c": 2}
    yield SpeechDataset(
        speech, RATE, crop=0.4, labels=labels, seed=3, epoch=epoch, speeds=WESPEAKER_SPEEDS,
        augment=room_and_noise(RATE, speech=speech), skipped=Skipped(save / "speech.txt"),
    )  # fmt: skip
    yield SpeechDataset(speech.take(np.arange(3)), RATE)
    classes = {"0": 0, "1": 1, "2": 2}
    yield FaceDataset(images, 16, classes, flip=True, epoch=epoch, skipped=Skipped(save / "f.txt"))
    yield ImageDataset(images.ids, images.files, 16)
    yield StoredDataset(
        FaceRecords(folder / "train.rec", progress=False), 16, flip=True, epoch=epoch
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_process_gives_the_same_items_however_it_is_started(speech, faces, tmp_path, method):
    everything = ConcatDataset(list(datasets(speech, faces, tmp_path)))
    loader = DataLoader(everything, batch_size=None, num_workers=1, multiprocessing_context=method)
    count = 0
    for here, there in zip(everything, loader, strict=True):
        assert here.keys() == there.keys()
        for key, value in here.items():
            same = torch.equal(value, there[key]) if torch.is_tensor(value) else value == there[key]
            assert same, (here["id"], key)
        count += 1
    assert count == 6 + 3 + 6 + 6 + 6


def test_what_is_sent_does_not_grow_with_the_corpus(speech, faces, tmp_path):
    for data in datasets(speech, faces, tmp_path):
        content = pickle.dumps(data)
        again = pickle.loads(content)
        assert len(again) == len(data)
        if isinstance(data, SpeechDataset) and data.crop:
            assert len(content) < 2000
