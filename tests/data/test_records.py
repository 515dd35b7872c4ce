"""InsightFace's formats, written here byte by byte."""

import errno
import io
import logging
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from speechbrain_qmargin.data import records as module
from speechbrain_qmargin.data import shards as shards_module
from speechbrain_qmargin.data import stored as stored_module
from speechbrain_qmargin.data.align import ARCFACE_TEMPLATE, align_face
from speechbrain_qmargin.data.face_dataset import StoredDataset
from speechbrain_qmargin.data.pickled import read_bin
from speechbrain_qmargin.data.recordio import read_record, write_records
from speechbrain_qmargin.data.records import FaceRecords
from speechbrain_qmargin.data.shards import FaceShards, stored_faces
from speechbrain_qmargin.data.skipped import Skipped

MAGIC = struct.pack("<I", 0xCED7230A)


def encoded(value, size=16):
    stream = io.BytesIO()
    image = Image.new("RGB", (size, size), (value, value // 2, 255 - value))
    image.putpixel((0, 0), (0, 1, 2))  # an image of one colour is refused
    image.save(stream, format="PNG")
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
    data = StoredDataset(FaceRecords(records), 16)
    assert (len(data), data.stored.num_classes) == (6, 3)
    for i, item in enumerate(data[row] for row in range(6)):
        wanted = (np.array([10 * i, 5 * i, 255 - 10 * i]) - 127.5) / 127.5
        np.testing.assert_allclose(item["image"][:, 3, 5], wanted, atol=1e-6)
        assert item["identity_encoded"].tolist() == [i // 2]


def test_records_are_read_by_workers(records):
    loader = torch.utils.data.DataLoader(
        StoredDataset(FaceRecords(records), 16), batch_size=2, num_workers=2
    )
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
        data = StoredDataset(FaceRecords(path), 16, flip=True, seed=seed, epoch=lambda: epoch)
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
    data = StoredDataset(FaceRecords(records), 16)
    with caplog.at_level(logging.WARNING):
        item = data[1]
    assert item["id"] == "train.rec: record 3"
    assert "train.rec: record 2" in data.skipped
    assert "record 2 is skipped" in caplog.text


def test_a_file_of_broken_images_alone_ends_with_an_error(records):
    content = records.read_bytes()
    records.write_bytes(content.replace(b"\x89PNG", b"\0PNG"))
    with pytest.raises(OSError, match=r"6 images in a row cannot be read, the last is .*record 6"):
        StoredDataset(FaceRecords(records), 16)[0]


# ------------------------------------------------------------- as im2rec writes: no header record


def write_im2rec(path, contents, labels, keys=None):
    """A .rec and .idx byte by byte: a record an image, in the order of a shuffled list."""
    keys = range(len(contents)) if keys is None else keys
    position = 0
    with path.open("wb") as rec, path.with_suffix(".idx").open("w") as idx:
        for key, content, label in zip(keys, contents, labels, strict=True):
            body = struct.pack("<IfQQ", 0, label, key, 0) + content
            record = MAGIC + struct.pack("<I", len(body)) + body + b"\0" * (-len(body) % 4)
            idx.write(f"{key}\t{position}\n")
            position += rec.write(record)


def labels_of(data):
    return [data[row]["identity_encoded"].item() for row in range(len(data))]


@pytest.fixture
def im2rec(tmp_path):
    path = tmp_path / "train.rec"
    write_im2rec(path, [encoded(10 * i) for i in range(6)], [2, 0, 1, 0, 2, 3], [4, 0, 2, 1, 5, 3])
    return path


def test_records_without_a_header(im2rec):
    data = StoredDataset(FaceRecords(im2rec, progress=False), 16)
    assert (len(data), data.stored.num_classes) == (6, 4)
    assert labels_of(data) == [2, 0, 1, 0, 2, 3]
    assert [data[row]["id"][-1] for row in range(6)] == list("402153")
    with np.load(f"{im2rec}.index.npz", allow_pickle=False) as saved:
        types = {key: saved[key].dtype for key in ("key", "offset", "label")}
    assert types == {"key": np.int32, "offset": np.int64, "label": np.int32}


def test_only_the_headers_of_the_records_are_read(im2rec, monkeypatch):
    monkeypatch.setattr(module, "read_record", lambda stream: pytest.fail("a whole record"))
    monkeypatch.setattr(module, "_header_of_records", lambda path, offset: None)
    assert FaceRecords(im2rec, progress=False).num_classes == 4


def test_the_labels_are_read_once_for_all_runs(im2rec, monkeypatch):
    FaceRecords(im2rec, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_index_of_records", lambda *_: pytest.fail("read again"))
        assert labels_of(StoredDataset(FaceRecords(im2rec), 16)) == [2, 0, 1, 0, 2, 3]
    write_im2rec(im2rec, [encoded(1)] * 3, [0, 1, 1])
    assert FaceRecords(im2rec, progress=False).num_classes == 2  # the file has changed
    Path(f"{im2rec}.index.npz").write_bytes(b"PK no more")
    assert FaceRecords(im2rec, progress=False).num_classes == 2


def test_where_the_data_cannot_be_written_the_labels_go_to_the_cache_folder(
    im2rec, tmp_path, monkeypatch
):
    monkeypatch.setenv("SPEECHBRAIN_QMARGIN_CACHE", str(tmp_path / "cache"))
    replacing = stored_module.replacing

    def read_only(path):
        if Path(path).parent == im2rec.parent:
            raise PermissionError(f"{path}: read-only")
        return replacing(path)

    monkeypatch.setattr(stored_module, "replacing", read_only)
    FaceRecords(im2rec, progress=False)
    assert not Path(f"{im2rec}.index.npz").exists()
    assert len(list((tmp_path / "cache/face_indexes").iterdir())) == 1
    monkeypatch.setattr(module, "_index_of_records", lambda *_: pytest.fail("read again"))
    assert FaceRecords(im2rec).num_classes == 4


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda rec, at: rec.__setitem__(slice(at, at + 4), b"none"), "no record begins here"),
        (lambda rec, at: rec.__setitem__(slice(at + 12, at + 16), struct.pack("<f", np.inf)),
         "label inf"),
        (lambda rec, at: rec.__setitem__(slice(at + 12, at + 16), struct.pack("<f", np.nan)),
         "label nan"),
        (lambda rec, at: rec.__setitem__(slice(at + 12, at + 16), struct.pack("<f", 1.5)),
         "label 1.5"),
        (lambda rec, at: rec.__setitem__(slice(at + 8, at + 12), struct.pack("<I", 2**31)),
         "shorter than its labels"),
    ],
)  # fmt: skip
def test_a_broken_record_without_a_header_is_named_and_left_out(im2rec, fault, reason):
    offsets = [int(line.split("\t")[1]) for line in im2rec.with_suffix(".idx").open()]
    content = bytearray(im2rec.read_bytes())
    fault(content, offsets[1])
    im2rec.write_bytes(content)
    for _ in range(2):  # the second time from the index
        data = StoredDataset(FaceRecords(im2rec, progress=False), 16)
        assert labels_of(data) == [2, 1, 0, 2, 3]
        assert "train.rec: record 0" in data.skipped
        assert reason in data.stored.broken["train.rec: record 0"]


def test_the_last_record_cut_off(im2rec):
    im2rec.write_bytes(im2rec.read_bytes()[:-20])
    data = StoredDataset(FaceRecords(im2rec, progress=False), 16)
    assert (labels_of(data), len(data.skipped)) == ([2, 0, 1, 0, 2], 1)


def test_an_index_of_another_file_is_refused(im2rec):
    im2rec.with_suffix(".idx").write_text("".join(f"{i}\t{40 * i + 4}\n" for i in range(5)))
    with pytest.raises(ValueError, match=r"train\.rec: no images begin at 5 of the 5 offsets"):
        FaceRecords(im2rec, progress=False)


def test_a_record_in_parts_keeps_its_label(tmp_path):
    whole = struct.pack("<IfQQ", 0, 1.0, 1, 0) + encoded(9)[:30] + MAGIC + b"rest"
    left, right = whole.split(MAGIC)
    parts = MAGIC + struct.pack("<I", 1 << 29 | len(left)) + left + b"\0" * (-len(left) % 4)
    parts += MAGIC + struct.pack("<I", 3 << 29 | len(right)) + right + b"\0" * (-len(right) % 4)
    first = plain(encoded(3), 0.0)
    (tmp_path / "a.rec").write_bytes(first + parts)
    (tmp_path / "a.idx").write_text(f"0\t0\n1\t{len(first)}\n")
    data = StoredDataset(FaceRecords(tmp_path / "a.rec", progress=False), 16)
    assert (data.stored.num_classes, data.skipped._reasons) == (2, {})


def test_labels_come_from_the_list_where_it_fits(im2rec, caplog, monkeypatch):
    keyed = dict(zip([4, 0, 2, 1, 5, 3], [2, 0, 1, 0, 2, 3], strict=True))
    lines = [f"{key}\t{label:.6f}\tid #{label}/{key}.jpg\n" for key, label in keyed.items()]
    listing = im2rec.with_suffix(".lst")
    listing.write_text("".join(lines) + "9\t7.000000\tan image that im2rec left out.jpg\n")
    with monkeypatch.context() as patch:
        read = module._read_labels
        patch.setattr(module, "_read_labels", lambda path, offsets, progress: (
            pytest.fail("all records are read") if progress else read(path, offsets, progress)
        ))  # fmt: skip
        data = StoredDataset(FaceRecords(im2rec), 16)
    assert (labels_of(data), data.stored.num_classes) == ([2, 0, 1, 0, 2, 3], 4)
    for wrong in ("".join(lines[1:]), "".join(lines).replace("3.0", "1.0"), "words\n", ""):
        listing.write_text(wrong)
        assert labels_of(StoredDataset(FaceRecords(im2rec, progress=False), 16)) == [
            2,
            0,
            1,
            0,
            2,
            3,
        ]
        assert "train.lst does not fit train.rec" in caplog.text
        caplog.clear()


def test_a_header_above_two_to_the_24_is_not_trusted(records):
    # WebFace42M's 42,474,557 images and 2,059,906 identities, as float32 keeps them
    rounded = np.array([42_474_558, 42_474_558 + 2_059_906]).astype("<f4")
    assert int(rounded[0]) != 42_474_558
    content = records.read_bytes()
    header = struct.pack("<2f", 7, 10)
    assert content.count(header) == 1
    records.write_bytes(content.replace(header, rounded.tobytes()))
    data = StoredDataset(FaceRecords(records, progress=False), 16)
    assert (len(data), data.stored.num_classes) == (6, 3)  # the records of identities are no images
    assert labels_of(data) == [0, 0, 1, 1, 2, 2]
    assert not data.skipped


def test_records_whose_header_would_be_rounded_are_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"a\.rec: 16,777,218 records"):
        write_records(tmp_path / "a.rec", range(2**24), np.zeros(2**24, dtype=np.int8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("labels", [[0, 2, 2], [1, 1, 2], [-1, 0, 0]])
def test_labels_that_record_0_would_count_wrongly_are_not_written(tmp_path, labels):
    message = r"a\.rec: labels from .* of 2 identities; number them from 0, without gaps"
    with pytest.raises(ValueError, match=message):
        write_records(tmp_path / "a.rec", [encoded(n) for n in range(3)], labels)
    assert not list(tmp_path.iterdir())


def test_an_index_that_is_cut_off_is_named(records, caplog):
    index = records.with_suffix(".idx")
    index.write_text("".join(index.read_text().splitlines(keepends=True)[:4]))
    assert len(FaceRecords(records)) == 3
    assert "train.idx has 3 of the 6 images" in caplog.text


def test_a_key_that_two_records_have_is_named(records):
    index = records.with_suffix(".idx")
    lines = index.read_text().splitlines(keepends=True)
    index.write_text("".join([*lines, lines[3], lines[2]]))
    with pytest.raises(ValueError, match=r"train\.idx: 2 keys are there again, the first is 2; "):
        FaceRecords(records, progress=False)


def test_one_corrupted_label_does_not_pass_for_two_million_identities(tmp_path, caplog):
    write_im2rec(tmp_path / "a.rec", [encoded(1)] * 3, [0, 2**21, 1])
    with pytest.raises(ValueError, match=r"a\.rec: labels up to 2,097,152 for 3 images"):
        FaceRecords(tmp_path / "a.rec", progress=False)
    assert "is the label 2097152 of record 1 broken?" in caplog.text


def jpeg(height=16):
    stream = io.BytesIO()
    Image.linear_gradient("L").resize((16, 16)).save(stream, format="JPEG")
    content = bytearray(stream.getvalue())
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", height, height)
    return bytes(content)


def test_a_flipped_size_and_a_label_of_infinity_are_skipped(tmp_path, caplog):
    path = tmp_path / "train.rec"
    write_records(path, [jpeg(), jpeg(60000), jpeg(), jpeg()], [0, 1, 2, 3])
    offsets = [int(line.split("\t")[1]) for line in path.with_suffix(".idx").open()]
    content = bytearray(path.read_bytes())
    content[offsets[3] + 12 : offsets[3] + 16] = struct.pack("<f", np.inf)
    path.write_bytes(content)
    data = StoredDataset(FaceRecords(path), 16)
    assert labels_of(data) == [0, 3, 3, 3]
    assert "record 2 is skipped, the next takes its place (cannot be decoded (Decompression" in (
        caplog.text
    )
    assert "record 3 is skipped, the next takes its place (its label inf" in caplog.text


def test_workers_list_what_they_skip_once(records, tmp_path, caplog):
    listing = tmp_path / "save" / "skipped.txt"
    content = records.read_bytes()
    for value in (10, 40):
        content = content.replace(encoded(value), b"x" * len(encoded(value)))
    records.write_bytes(content)
    for _ in range(2):
        data = StoredDataset(FaceRecords(records), 16)
        data.skipped.keep_in(listing)
        for _ in range(2):
            loader = torch.utils.data.DataLoader(data, batch_size=1, num_workers=2)
            labels = [batch["identity_encoded"].item() for batch in loader]
            assert labels == [0, 1, 1, 1, 2, 2]
    lines = [line.split("\t") for line in listing.read_text().splitlines()]
    assert sorted(name for name, _ in lines) == ["train.rec: record 2", "train.rec: record 5"]
    assert {reason for _, reason in lines} == {"cannot be decoded (of no format that is read)"}
    found = Skipped(listing)
    assert "2 images cannot be used" in found.warning()
    assert str(listing) in found.warning()


def test_what_was_skipped_before_the_file_was_given_is_listed_in_it(tmp_path):
    first, second = Skipped(), Skipped()
    first.add("a", "one\nreason")
    second.add("a", "another")
    second.add("b", "two")
    for each in (first, second):
        each.keep_in(tmp_path / "list.txt")
    assert (tmp_path / "list.txt").read_text() == "a\tone reason\nb\ttwo\n"
    assert not first.add("b", "of the other process")
    assert len(first) == 2


def test_the_content_of_records_and_shards_is_theirs_in_any_folder(tmp_path):
    """Another image, label or order is another; another time or folder is not."""

    def of_records(images, labels):
        write_records(tmp_path / "a.rec", images, labels)
        return FaceRecords(tmp_path / "a.rec").content()

    def of_shards(images, labels):
        folder = tmp_path / f"shards{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        write_shard(folder / "0.tar", images, labels)
        return FaceShards(folder).content()

    images, labels = [encoded(10 * i) for i in range(6)], [0, 0, 1, 1, 2, 2]
    for content in (of_records, of_shards):
        first = content(images, labels)
        assert first.startswith("6 images of 3 identities, sha256:")
        assert content(images, labels) == first
        others = [
            content(images[::-1], labels),
            content(images, [0, 1, 1, 1, 2, 2]),
            content([*images[:5], b"none"], labels),
        ]
        assert len({first, *others}) == 4


def test_what_stores_faces_at_a_path(records, tmp_path):
    assert isinstance(stored_faces(records), FaceRecords)
    assert len(stored_faces(tmp_path)) == 6  # the folder, as arcface_torch takes it
    for name in ("a", "b"):
        write_records(tmp_path / f"{name}.rec", [encoded(1)] * 2, [0, 1])
    assert len(stored_faces(tmp_path)) == 6  # train.rec
    records.unlink()
    with pytest.raises(ValueError, match=r"several \.rec files"):
        stored_faces(tmp_path)
    other = tmp_path / "images"
    other.mkdir()
    assert stored_faces(other) is None
    assert stored_faces(tmp_path / "nowhere") is None
    write_shard(other / "0.tar", [encoded(10)], [0])
    assert isinstance(stored_faces(str(other)), FaceShards)


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.rec"):
        FaceRecords(tmp_path / "none.rec")
    (tmp_path / "a.rec").write_bytes(b"x" * 64)
    (tmp_path / "a.idx").write_text("zero\tnought\n")
    with pytest.raises(ValueError, match=r"a\.idx: must have a key and an offset"):
        FaceRecords(tmp_path / "a.rec")


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
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


@pytest.mark.parametrize("core", ["core", "_core"])
def test_a_set_that_another_numpy_wrote(tmp_path, core):
    # protocol 2's global, as pickletools shows it, in a tuple with protocol 5's bytearray
    build = f"cnumpy.{core}.numeric\n_frombuffer\n".encode()
    dtype = b"cnumpy\ndtype\nX\x02\0\0\0u1\x85R"
    array = build + b"(\x96" + struct.pack("<Q", 3) + b"abc" + dtype + b"K\x03\x85X\1\0\0\0CtR"
    (tmp_path / "lfw.bin").write_bytes(b"\x80\x05](" + array + array + b"e]\x88a\x86.")
    images, same = read_bin(tmp_path / "lfw.bin")
    assert (images, same.tolist()) == ([b"abc", b"abc"], [True])


@pytest.mark.parametrize(
    "content",
    [b"", b"no pickle", pickle.dumps(([b"a"], [True])), pickle.dumps(([9, 9], [True]))],
)
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


def test_shards_are_read_at_random_and_their_index_is_kept(tmp_path, caplog, monkeypatch):
    write_shard(tmp_path / "0.tar", [encoded(10), encoded(20)], [0, 1])
    write_shard(tmp_path / "1.tar", [encoded(30), b"no image"], [1, 2])
    for _ in range(2):  # the second time from the index
        data = StoredDataset(FaceShards(tmp_path, progress=False), 16)
        assert (len(data), data.stored.num_classes) == (4, 3)
        assert [data[i]["identity_encoded"].item() for i in (2, 0, 1)] == [1, 0, 1]
        monkeypatch.setattr(shards_module, "_members", lambda shard: pytest.fail("read again"))
    monkeypatch.undo()
    assert data[3]["identity_encoded"].item() == 0  # the next, from the beginning
    assert "1.tar: the image at byte" in caplog.text
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=2)
    assert len(torch.cat([batch["identity_encoded"] for batch in loader])) == 4
    write_shard(tmp_path / "1.tar", [encoded(30)], [4])
    assert FaceShards(tmp_path, progress=False).num_classes == 5
    (tmp_path / "1.tar").rename(tmp_path / "2.tar")
    data = StoredDataset(FaceShards(tmp_path, progress=False), 16)
    assert data[2]["id"].startswith("2.tar")


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    """They would pass for broken, and the images of the first ones be trained on alone."""
    for number in range(9):
        write_shard(tmp_path / f"{number}.tar", [encoded(number)], [number])
    data = StoredDataset(FaceShards(tmp_path, progress=False), 16)
    monkeypatch.setattr(stored_module, "_most_open", lambda: 3)
    assert labels_of(data) == list(range(9))
    assert [path.name for path in data.stored._streams] == ["6.tar", "7.tar", "8.tar"]
    assert data[6]["identity_encoded"].item() == 6
    names = [path.name for path in data.stored._streams]
    assert names == ["7.tar", "8.tar", "6.tar"]  # the last last

    def full(path):
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    monkeypatch.setattr(data.stored, "stream", full)
    with pytest.raises(OSError, match="Too many open files"):
        data[0]
    assert not data.skipped


def test_an_index_of_shards_is_20_bytes_an_image(tmp_path):
    write_shard(tmp_path / "0.tar", [encoded(10), encoded(20)], [0, 1])
    index = FaceShards(tmp_path, progress=False)._index
    assert sum(column.itemsize for column in index.values()) == 20
    assert {key: column.dtype for key, column in index.items()} == {
        "shard": np.int32, "offset": np.int64, "size": np.int32, "label": np.int32
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.slow
def test_many_shards_are_read_by_several_processes(tmp_path, monkeypatch):
    for number in range(64):
        write_shard(tmp_path / f"{number:02d}.tar", [encoded(number)], [number])
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    data = StoredDataset(FaceShards(tmp_path, progress=False), 16)
    assert labels_of(data) == list(range(64))
    assert data[9]["image"][0, 1, 1].item() == pytest.approx((9 - 127.5) / 127.5)


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
    with tarfile.open(tmp_path / "0.tar", "w"):
        pass
    with pytest.raises(ValueError, match="hold no images"):
        FaceShards(tmp_path, progress=False)
    write_shard(tmp_path / "0.tar", [encoded(1)], [2**40])
    with pytest.raises(ValueError, match=r"0\.tar: not a plain tar"):
        FaceShards(tmp_path, progress=False)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a.png", "a.cls", "a.png", "a.cls"), "a.png: there is another image of this key"),
        (("a.png", "a.cls", "a.JPG"), "a.JPG: there is another image of this key"),
        (("a.png", "a.cls", "b.png", "a.cls"), "a.cls: there is another .cls of this key"),
    ],
)
def test_two_images_of_one_key_are_refused(tmp_path, names, message):
    """As of shards that were joined: the last would be trained on alone."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number, name in enumerate(names):
            content = b"%d" % number if name.endswith("cls") else encoded(number)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with pytest.raises(ValueError, match=rf"0\.tar: .*{message}"):
        FaceShards(tmp_path, progress=False)


def test_members_that_are_links_or_folders_are_listed(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(3):
            for suffix, content in (("png", encoded(10 * number)), ("cls", b"%d" % number)):
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        folder, link = tarfile.DIRTYPE, tarfile.SYMTYPE
        others = {"7.png": link, "8.cls": folder, "9.jpg": tarfile.LNKTYPE, "folder.png": folder}
        for name, kind in others.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "000000.png"
            tar.addfile(member)
    for _ in range(2):  # the second time from the index
        data = StoredDataset(FaceShards(tmp_path, progress=False), 16)
        assert labels_of(data) == [0, 1, 2]
        assert len(data.skipped) == 4
        assert "0.tar: 7.png" in data.skipped
    assert "a link or a folder, not a file" in data.skipped.warning()


@pytest.mark.parametrize("label", [2_000_000_000, 5000])
def test_labels_beyond_what_the_data_can_hold_are_refused(tmp_path, label):
    write_shard(tmp_path / "0.tar", [encoded(10), encoded(20)], [0, label])
    with pytest.raises(ValueError, match=rf"labels up to {label:,} for 2 images"):
        FaceShards(tmp_path, progress=False)


@pytest.mark.parametrize("label", [-1, "1" * 4000])
def test_labels_that_are_none_are_refused(tmp_path, label):
    write_shard(tmp_path / "0.tar", [encoded(10), encoded(20)], [0, label])
    with pytest.raises(ValueError, match=r"0\.tar: not a plain tar"):
        FaceShards(tmp_path, progress=False)


def test_a_header_that_counts_more_identities_than_images_is_refused(records):
    content = records.read_bytes()
    header = struct.pack("<2f", 7, 10)
    records.write_bytes(content.replace(header, struct.pack("<2f", 7, 2**23)))
    with pytest.raises(ValueError, match=r"train\.rec: labels up to 8,388,600 for 6 images"):
        FaceRecords(records, progress=False)
