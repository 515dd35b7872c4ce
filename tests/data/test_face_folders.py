"""Folders of face images: layout, what cannot be decoded, what is tested on."""

import errno
import io
import logging
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from speechbrain.dataio.encoder import CategoricalEncoder

from speechbrain_qmargin.data.classes import class_encoder
from speechbrain_qmargin.data.face_dataset import FaceDataset, ImageDataset
from speechbrain_qmargin.data.faces import prepare_faces
from speechbrain_qmargin.data.images import check_images, read_image, read_pixels
from speechbrain_qmargin.data.manifest import Manifest
from speechbrain_qmargin.data.skipped import Skipped
from speechbrain_qmargin.export.face_encoder import FaceEncoder
from speechbrain_qmargin.export.images import extract_images, find_images
from speechbrain_qmargin.extraction import Inputs


def write(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (16, 16), (value, value, value))
    image.putpixel((0, 0), (255, 255, 255))  # an image of one colour is refused
    image.save(path)


@pytest.fixture
def folder(tmp_path):
    for identity in range(3):
        for image in range(3):
            write(tmp_path / f"faces/id{identity}/{image}.png", 50 * identity + 10 * image)
    return tmp_path / "faces"


def test_a_folder_without_pairs_is_all_for_training(folder, tmp_path):
    (folder / "read.me").write_text("no image")
    write(folder / ".thumbnails/a/b/0.png")
    write(folder / "id0/.0.png")
    corpus = prepare_faces(folder, tmp_path / "save")
    assert list(corpus.train.ids) == [f"id{i}/{j}.png" for i in range(3) for j in range(3)]
    assert (len(corpus.test), corpus.test_trials, corpus.valid_trials) == (0, {}, None)


def test_pairs_hold_their_identities_out(folder, tmp_path):
    pairs = tmp_path / "pairs.txt"
    write(folder / "id3/0.png")
    write(folder / "id3/1.png")
    pairs.write_text("1 id1/0.png id1/1.png\n0 id1/0.png id3/1.png\n")
    corpus = prepare_faces(folder, tmp_path / "save", verification_file=pairs)
    assert corpus.identities == ["id0", "id2"]
    assert list(corpus.test.ids) == ["id1/0.png", "id1/1.png", "id3/1.png"]
    pairs.write_text("1 id1/0.png id1/1.png\n")
    with pytest.raises(ValueError, match=r"pairs\.txt: it has no target or no impostor"):
        prepare_faces(folder, tmp_path / "save", verification_file=pairs)


def test_a_list_of_identities_has_one_a_line_whatever_is_in_its_name(folder, tmp_path):
    for name in ("Zo\u00eb Example", "Ann"):
        write(folder / name / "IMG 1.png")
        write(folder / name / "IMG 2.png", 1)
    listed = tmp_path / "train_people.txt"
    listed.write_text("\ufeffid0\r\nZoe\u0308 Example \r\n\r\n", encoding="utf-8")
    corpus = prepare_faces(folder, tmp_path / "save", train_identities=listed)
    assert corpus.identities == ["Zo\u00eb Example", "id0"]
    listed.write_text("id0 id1\n")
    with pytest.raises(ValueError, match=r"train_people\.txt: no usable images of id0 id1"):
        prepare_faces(folder, tmp_path / "save", train_identities=listed)
    listed.write_bytes("Zo\u00eb".encode("latin-1"))
    with pytest.raises(ValueError, match=r"train_people\.txt: not a UTF-8 text file"):
        prepare_faces(folder, tmp_path / "save", train_identities=listed)


def test_labels_are_numbered_without_a_search_for_each(tmp_path, monkeypatch):
    """SpeechBrain's, from 0 to the next free index, takes minutes for MS1MV3's identities."""
    monkeypatch.delattr(CategoricalEncoder, "_next_index")
    names = [f"id{number:04d}" for number in range(2000)]
    first = class_encoder(reversed(names), tmp_path / "labels.txt")
    for encoder in (first, CategoricalEncoder.from_saved(tmp_path / "labels.txt")):
        assert list(encoder.lab2ind) == names
        assert encoder.encode_sequence(names[-2:]) == [1998, 1999]
        assert encoder.decode_ndim([0, 1999]) == [names[0], names[-1]]
    assert class_encoder(names, tmp_path / "labels.txt").lab2ind == first.lab2ind


def test_images_deeper_than_their_identity_are_refused(folder, tmp_path):
    write(folder / "0/0_0_0000000/a.jpg")
    with pytest.raises(ValueError, match=r"0/0_0_0000000/a\.jpg is deeper .* such as .*faces/0;"):
        prepare_faces(folder, tmp_path / "save")


def test_images_are_found_in_the_order_of_their_ids(tmp_path, caplog, monkeypatch):
    """So that of millions none is held but in the manifest's columns, which need no sorting."""
    root, names = tmp_path / "faces", ["a", "a-b", "a b", "a.b", "ab", "\u00e4"]
    for name in names:
        for image in ("10.png", "2.png", "2-1.png"):
            write(root / name / image)
    write(root / "ab/bad\tname.png")
    write(root / "bad\nname/1.png")
    (root / "ab/lost.png").symlink_to(tmp_path / "nowhere.png")
    found, of = [], Manifest.of

    def noted(items, faults):
        return of((found.append(item.id) or item for item in items), faults)

    monkeypatch.setattr(Manifest, "of", noted)
    corpus = prepare_faces(root, tmp_path / "save")
    assert found == sorted(f"{a}/{b}" for a in names for b in ("10.png", "2.png", "2-1.png"))
    assert list(corpus.train.ids) == found
    assert r"3 images are left out, the first is ab/bad\tname.png: its name has" in caplog.text


def test_no_images_at_all(tmp_path):
    (tmp_path / "id0").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no <identity>/<image>"):
        prepare_faces(tmp_path, tmp_path / "save")


def training(folder, tmp_path, skipped):
    corpus = prepare_faces(folder, tmp_path / "save")
    encoder = class_encoder(corpus.identities, tmp_path / "labels.txt")
    return FaceDataset(corpus.train, 16, encoder.lab2ind, skipped=skipped)


def test_an_undecodable_image_is_replaced_by_its_identitys_next(folder, tmp_path, caplog):
    (folder / "id1/1.png").write_bytes(b"no image")
    (folder / "id2/2.png").write_bytes((folder / "id2/2.png").read_bytes()[:40])
    listing = tmp_path / "skipped.txt"
    for _ in range(2):
        data = training(folder, tmp_path, Skipped(listing))
        with caplog.at_level(logging.WARNING):
            loader = torch.utils.data.DataLoader(data, batch_size=1, num_workers=2)
            items = {item["id"][0]: item for item in loader}
        wanted = {"id1/1.png": "id1/2.png", "id2/2.png": "id2/0.png"}
        for name, item in items.items():
            same = read_image(folder / wanted.get(name, name), 16)
            assert torch.equal(item["image"][0], same), name
            assert item["identity_encoded"].item() == int(name[2])
    lines = listing.read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in lines) == ["id1/1.png", "id2/2.png"]


def test_a_lack_of_open_files_is_no_fault_of_an_image(folder, tmp_path, monkeypatch):
    """It passed for one: the image was listed as broken, and another trained on in its place."""
    data = training(folder, tmp_path, Skipped(tmp_path / "skipped.txt"))
    images = Inputs({"a.png": folder / "id0/0.png"})
    encoder = FaceEncoder(torch.nn.Conv2d(3, 4, 16), 16)

    def full(path, **_):
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    monkeypatch.setattr(Image, "open", full)
    uses = (
        lambda: data[4],
        lambda: check_images({"a.png": folder / "id0/0.png"}),
        lambda: extract_images(encoder, images, tmp_path / "parts"),
    )
    for use in uses:
        with pytest.raises(OSError, match=r"Too many open files: .*\.png") as caught:
            use()
        assert caught.value.errno == errno.EMFILE
    assert not (tmp_path / "skipped.txt").exists()


def test_other_training_images_in_a_run_that_goes_on_are_said(folder, tmp_path, caplog):
    for _ in range(2):
        prepare_faces(folder, tmp_path / "save")
    assert "have changed" not in caplog.text
    write(folder / "id0/7.png")
    prepare_faces(folder, tmp_path / "save")
    assert "images or their identities have changed since the last start" in caplog.text
    assert "(9 of 3 identities then, 10 of 3 now)" in caplog.text


def test_images_of_a_format_that_is_not_read_are_said(folder, tmp_path, caplog):
    for name in ("id0/9.HEIC", "id1/9.heic", "id1/8.gif", "id1/notes.txt", "id1/.9.gif"):
        (folder / name).write_bytes(b"")
    assert len(prepare_faces(folder, tmp_path / "save").train) == 9
    assert f"{folder}: files are left out that are not read (1 .gif, 2 .heic): " in caplog.text
    caplog.clear()
    assert len(find_images(folder).items) == 9
    assert "(1 .gif, 2 .heic)" in caplog.text


def test_an_identity_without_a_decodable_image_is_named(folder, tmp_path):
    for image in range(3):
        (folder / f"id1/{image}.png").write_bytes(b"")
    data = training(folder, tmp_path, Skipped())
    with pytest.raises(OSError, match="no image of the identity id1 can be used"):
        data[4]


def test_what_is_tested_on_raises(folder, tmp_path):
    (folder / "id1/1.png").write_bytes(b"no image")
    corpus = prepare_faces(folder, tmp_path / "save")
    with pytest.raises(OSError, match=r"id1/1\.png: cannot be decoded"):
        ImageDataset(corpus.train.ids, corpus.train.files, 16)[4]


def bomb():
    """A JPEG that says it is 60000 x 60000."""
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, format="JPEG")
    content = bytearray(stream.getvalue())
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", 60000, 60000)
    return bytes(content)


@pytest.mark.parametrize("content", [b"", b"x" * 100, bomb()])
def test_every_fault_of_an_image_is_an_oserror(content, tmp_path):
    with pytest.raises(OSError, match=r"^cannot be decoded"):
        read_pixels(content)
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(OSError, match=r"a\.jpg: cannot be decoded"):
        read_pixels(tmp_path / "a.jpg")


def test_checking_names_what_cannot_be_decoded(folder):
    images = {f"lfw.bin, pair {n}": folder / f"id0/{n % 3}.png" for n in range(9)}
    check_images(images)
    images |= {f"lfw.bin, pair {n}": b"none" for n in (3, 5, 7, 8)}
    with pytest.raises(OSError, match=r"4 of 9 images .*pair 3: cannot .*pair 5: .*pair 7: [^;]*$"):
        check_images(images)


def test_pixels_are_rgb_and_resized_on_demand():
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 6), 7, dtype=np.uint8)).save(stream, format="PNG")
    assert (read_pixels(stream.getvalue()) == np.full((8, 6, 3), 7)).all()
    assert read_pixels(stream.getvalue(), 4).shape == (4, 4, 3)
    with pytest.raises(OSError, match="all its pixels are equal"):
        read_image(stream.getvalue(), 4)
