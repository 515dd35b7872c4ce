"""InsightFace's formats, written here byte by byte."""

import io
import logging
import pickle
import struct
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from speechbrain_qmargin.data.face_formats import (
    ARCFACE_TEMPLATE,
    FaceRecords,
    FaceShards,
    align_face,
    read_bin,
    read_record,
    write_records,
)

MAGIC = struct.pack("<I", 0xCED7230A)


def encoded(value, size=16):
    stream = io.BytesIO()
    Image.new("RGB", (size, size), (value, value // 2, 255 - value)).save(stream, format="PNG")
    return stream.getvalue()


def plain(content, label=3.0):
    """One record as MXNet writes it."""
    body = struct.pack("<IfQQ", 0, label, 7, 0) + content
    return MAGIC + struct.pack("<I", len(body)) + body + b"\0" * (-len(body) % 4)


def test_a_record_of_one_part():
    record = read_record(io.BytesIO(plain(b"abcde")))
    assert record.content == b"abcde"
    assert record.labels.tolist() == [3.0]


def test_a_record_with_the_magic_number_inside_is_put_together():
    body = (
        struct.pack("<IfQQ", 2, 0.0, 7, 0) + struct.pack("<2f", 5, 9) + b"left" + MAGIC + b"right"
    )
    left, right = body.split(MAGIC)
    parts = MAGIC + struct.pack("<I", 1 << 29 | len(left)) + left + b"\0" * (-len(left) % 4)
    parts += MAGIC + struct.pack("<I", 3 << 29 | len(right)) + right
    record = read_record(io.BytesIO(parts))
    assert record.content == b"left" + MAGIC + b"right"
    assert record.labels.tolist() == [5, 9]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\1" * 40, "no record begins here"),
        (plain(b"abcdefgh")[:-4], "cut off"),
        (b"", "cut off"),
        (MAGIC + struct.pack("<I", 3 << 29 | 4) + b"abcd", "out of order"),
        (MAGIC + struct.pack("<I", 4) + b"abcd", "shorter than its header"),
    ],
)
def test_broken_records_are_refused(content, message):
    with pytest.raises(ValueError, match=message):
        read_record(io.BytesIO(content))


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "train.rec"
    write_records(path, [encoded(10 * i) for i in range(6)], [0, 0, 1, 1, 2, 2])
    return path


def test_training_records(records):
    data = FaceRecords(records, image_size=16)
    assert (len(data), data.num_classes) == (6, 3)
    for i, item in enumerate(data[row] for row in range(6)):
        wanted = (np.array([10 * i, 5 * i, 255 - 10 * i]) - 127.5) / 127.5
        np.testing.assert_allclose(item["image"][:, 3, 5], wanted, atol=1e-6)
        assert item["identity_encoded"].tolist() == [i // 2]


def test_records_are_read_by_workers(records):
    loader = torch.utils.data.DataLoader(FaceRecords(records, 16), batch_size=2, num_workers=2)
    labels = torch.cat([batch["identity_encoded"] for batch in loader])
    assert labels.flatten().tolist() == [0, 0, 1, 1, 2, 2]


def test_mirroring_is_a_function_of_seed_epoch_and_record(records):
    def mirrored(seed, epoch):
        wide = [Image.new("RGB", (16, 16)) for _ in range(6)]
        for image in wide:
            image.paste((255, 255, 255), (0, 0, 8, 16))
        contents = []
        for image in wide:
            stream = io.BytesIO()
            image.save(stream, format="PNG")
            contents.append(stream.getvalue())
        path = records.parent / "wide.rec"
        write_records(path, contents, [0, 0, 1, 1, 2, 2])
        data = FaceRecords(path, 16, flip=True, seed=seed, epoch=lambda: epoch)
        return [float(data[i]["image"][0, 0, 0]) < 0 for i in range(6)]

    first = mirrored(0, 1)
    assert first == mirrored(0, 1)
    assert any(first) or any(mirrored(0, 2))
    assert len({tuple(mirrored(0, epoch)) for epoch in range(6)}) > 1


def test_a_corrupt_record_is_named_and_the_next_takes_its_place(records, caplog):
    offsets = [int(line.split("\t")[1]) for line in records.with_suffix(".idx").open()]
    content = bytearray(records.read_bytes())
    content[offsets[2] + 40 : offsets[2] + 60] = b"\0" * 20
    records.write_bytes(content)
    data = FaceRecords(records, 16)
    with caplog.at_level(logging.WARNING):
        item = data[1]
    assert item["id"] == "train.rec: record 3"
    assert data.skipped == {"train.rec: record 2"}
    assert "record 2 is skipped" in caplog.text


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.rec"):
        FaceRecords(tmp_path / "none.rec")
    (tmp_path / "a.rec").write_bytes(b"x" * 64)
    (tmp_path / "a.idx").write_text("zero\tnought\n")
    with pytest.raises(ValueError, match=r"a\.idx: must have a key and an offset"):
        FaceRecords(tmp_path / "a.rec")


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("as_arrays", [False, True])
def test_verification_sets(tmp_path, protocol, as_arrays):
    images = [encoded(20 * i) for i in range(6)]
    same = [True, False, True]
    content = [np.frombuffer(one, dtype=np.uint8) for one in images] if as_arrays else images
    flags = [np.bool_(flag) for flag in same] if as_arrays else same
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps((content, flags), protocol=protocol))
    found, labels = read_bin(tmp_path / "lfw.bin")
    assert found == images
    assert labels.tolist() == same


class Malicious:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("content", [Malicious(), ([b"a", b"b"], [Malicious()])])
def test_a_pickle_that_would_call_something_is_refused(tmp_path, capsys, content):
    (tmp_path / "evil.bin").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"evil\.bin: not a verification set .*print"):
        read_bin(tmp_path / "evil.bin")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps(([b"a"], [True]))])
def test_other_files_are_no_verification_sets(tmp_path, content):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.bin"):
        read_bin(tmp_path / "x.bin")


def test_alignment_undoes_a_similarity():
    y, x = np.mgrid[0:112, 0:112]
    face = np.stack((2 * x, 2 * y, 127 + 0 * x), 2).clip(0, 255).astype(np.uint8)
    turn, scale, shift = 0.3, 0.8, np.array([20.0, 12.0])
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    # the picture of the same plane, turned, smaller and shifted, drawn point by point
    grid = np.stack((x, y), 2).reshape(-1, 2) - shift
    back = grid @ rotation / scale
    seen = np.concatenate((2 * back, 127 + 0 * back[:, :1]), 1).reshape(112, 112, 3)
    picture = seen.clip(0, 255).astype(np.uint8)
    landmarks = scale * ARCFACE_TEMPLATE @ rotation.T + shift
    aligned = align_face(picture, landmarks)
    inner = slice(30, 80)
    difference = np.abs(aligned.astype(int) - face)[inner, inner]
    assert difference.max() <= 4


def test_bad_landmarks_are_refused():
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="in one point"):
        align_face(image, np.ones((5, 2)))
    with pytest.raises(ValueError, match="must be"):
        align_face(image, np.ones((4, 2)))


def write_shard(path, images, labels):
    with tarfile.open(path, "w") as tar:
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            for suffix, content in (("png", image), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def test_shards_are_read_at_random_and_their_index_is_kept(tmp_path, caplog):
    write_shard(tmp_path / "0.tar", [encoded(10), encoded(20)], [0, 1])
    write_shard(tmp_path / "1.tar", [encoded(30), b"no image"], [1, 2])
    index = tmp_path / "index.npz"
    for _ in range(2):  # the second time from the index
        data = FaceShards(tmp_path, 16, index=index, progress=False)
        assert (len(data), data.num_classes) == (4, 3)
        assert [data[i]["identity_encoded"].item() for i in (2, 0, 1)] == [1, 0, 1]
    assert data[3]["identity_encoded"].item() == 0  # the next, from the beginning
    assert "1.tar: the image at byte" in caplog.text
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=2)
    assert len(torch.cat([batch["identity_encoded"] for batch in loader])) == 4
    write_shard(tmp_path / "1.tar", [encoded(30)], [4])
    assert FaceShards(tmp_path, 16, index=index, progress=False).num_classes == 5


def test_shards_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \.tar shards"):
        FaceShards(tmp_path)
    (tmp_path / "0.tar").write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match=r"0\.tar: not a plain tar"):
        FaceShards(tmp_path, progress=False)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(ValueError, match=r"1 images have no \.cls, the first is a"):
        FaceShards(tmp_path, progress=False)
