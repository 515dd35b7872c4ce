"""The columns of a corpus, and the tables that they are read from."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechbrain_qmargin.data.manifest import Item, Manifest, Texts
from speechbrain_qmargin.data.tables import read_csv, read_kaldi, read_table


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=9)), st.data())
def test_packed_strings_are_the_strings(strings, data):
    texts = Texts.of(strings)
    assert list(texts) == strings == [texts[n] for n in range(len(strings))]
    assert texts[-2:] == strings[-2:]
    rows = data.draw(st.lists(st.integers(0, max(0, len(strings) - 1))))
    rows = rows if strings else []
    assert list(texts.take(np.array(rows, np.int64))) == [strings[n] for n in rows]
    assert list(pickle.loads(pickle.dumps(texts))) == strings


ITEMS = [
    Item(f"{who}/{n}.wav", f"/data/{who}-{n}.wav", who, 0.5 * n, 1.0 + n, n > 0)
    for who in ("ann", "Zoë", "bob")
    for n in range(4)
]


def test_rows_are_sorted_by_id_and_found_by_it():
    manifest = Manifest.of(reversed(ITEMS))
    assert list(manifest) == sorted(ITEMS) == [manifest[n] for n in range(12)]
    assert list(manifest.classes) == ["Zoë", "ann", "bob"]
    assert [manifest.row(item.id) for item in manifest] == list(range(12))
    assert dict(manifest.class_of_id) == {item.id: item.label for item in ITEMS}
    for name in ("", "ann/9.wav", "zz"):
        with pytest.raises(KeyError):
            manifest.row(name)
    with pytest.raises(ValueError, match=r"bob/0\.wav: there are two recordings with this id"):
        Manifest.of([*ITEMS, ITEMS[8]])
    rows = manifest.rows_by_class()
    assert {name: rows[name].tolist() for name in rows} == {
        name: [n for n, item in enumerate(sorted(ITEMS)) if item.label == name] for name in rows
    }


def test_a_selection_has_its_own_classes():
    manifest = Manifest.of(ITEMS)
    chosen = manifest.take(np.array([0, 9, 11]))
    assert list(chosen) == [manifest[0], manifest[9], manifest[11]]
    assert list(chosen.classes) == sorted({manifest[0].label, manifest[9].label})
    assert manifest.take(np.ones(12, bool)) is manifest
    assert len(manifest.take(np.zeros(0, np.int64))) == 0
    assert [item.id for item in manifest.evenly(2)] == [
        f"{who}/{n}.wav" for who in ("Zoë", "ann", "bob") for n in (0, 2)
    ]


def test_what_is_kept_in_a_file_is_pickled_as_its_path(tmp_path):
    names = [f"id{n // 100:05d}/{n:06d}.wav" for n in range(20_000)]
    manifest = Manifest.of(Item(name, f"/data/{name}", name[:7], 0.0, 3.25) for name in names)
    kept = manifest.kept_in(tmp_path / "train.manifest")
    assert list(kept) == list(manifest)
    content = pickle.dumps(kept)
    assert len(content) < 1000
    assert list(pickle.loads(content)) == list(manifest)
    assert list(pickle.loads(pickle.dumps(manifest))) == list(manifest)  # without a file, whole
    written = (tmp_path / "train.manifest").stat().st_mtime_ns
    manifest.kept_in(tmp_path / "train.manifest")
    assert (tmp_path / "train.manifest").stat().st_mtime_ns == written
    Manifest.of(ITEMS).kept_in(tmp_path / "train.manifest")
    with pytest.raises(ValueError, match="has changed"):
        pickle.loads(content)
    assert kept[7].id == names[7]  # the old file is mapped still


@pytest.mark.parametrize("size", [0, 10, 300, 5000, -65])
def test_a_file_that_is_no_manifest_or_cut_off_is_named(tmp_path, size):
    file = tmp_path / "a.manifest"
    Manifest.of(Item(f"{n:04d}", "x" * 40, "y") for n in range(500)).kept_in(file)
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"a\.manifest: (not a manifest|cut off)"):
        Manifest.load(file)


# ------------------------------------------------------------------------------- tables

SPEECHBRAIN = """ID,duration,wav,start,stop,spk_id
id1--a--1_0.0_3.0,8.32,/vox/id1/a/1.wav,0,48000,id1
id1--a--1_3.0_6.0,8.32,/vox/id1/a/1.wav,48000,96000,id1
id2--a--1,4.5,b/2.wav,0,72000,id2
"""


def test_speechbrains_csv_is_read_with_its_segments(tmp_path):
    path = tmp_path / "train.csv"
    path.write_bytes(b"\xef\xbb\xbf" + SPEECHBRAIN.encode())
    assert list(read_table(path)) == [
        Item("id1--a--1_0.0_3.0", "/vox/id1/a/1.wav", "id1", 0.0, 3.0, True),
        Item("id1--a--1_3.0_6.0", "/vox/id1/a/1.wav", "id1", 3.0, 3.0, True),
        Item("id2--a--1", str(tmp_path / "b/2.wav"), "id2", 0.0, 4.5, False),
    ]
    path.write_text("ID,wav,start,spk_id\nann 1,/1.wav,16000,ann\n")  # to an end not known
    (item,) = read_csv(path)
    assert (item.start, item.part, np.isnan(item.duration)) == (1.0, True, True)
    path.write_text("spk_id,wav,ID,age\nann,/1.wav,ann 1,30\n")
    (item,) = read_csv(path)
    assert (item.id, item.part, np.isnan(item.duration)) == ("ann 1", False, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"a\.csv:1: the columns must be"),
        ("ID,wav\nx,y\n", r"a\.csv:1: the columns must be .*; they are ID, wav"),
        ("ID,wav,spk_id\nx,y\n", r"a\.csv:2: 2 cells, the header has 3"),
        ("ID,wav,spk_id,wav\nx,y,z,y\n", r"a\.csv:1: the column wav is there twice"),
        (f"ID,wav,spk_id\nx,{140_000 * 'y'},z\n", r"a\.csv:2: not a table \(field larger"),
        ("ID,wav,spk_id,start\nx,y,z,-5\n", r"a\.csv:2: .*-5"),
        ("ID,wav,spk_id,duration\nx,y,z,nan\n", r"a\.csv:2: .*nan"),
        (
            "ID,wav,spk_id\nx,$data_root/y.wav,z\n",
            r"a\.csv:2: \$data_root/y\.wav has a placeholder",
        ),
        ("ID,wav,spk_id\nx,,z\n", r"a\.csv:2: ID, wav and spk_id must not be empty"),
        ("ID,wav,spk_id\nx,1,z\nx,2,z\n", "x: there are two recordings"),
        ("ID,wav,spk_id\n\xff,1,z\n", r"a\.csv: not a UTF-8 text file"),
        (
            "ID,wav,spk_id,start,stop\nx,1,z,32000,16000\n",
            r"a\.csv:2: .* a stop of 16000 and a start of 32000",
        ),
        (  # counted at 48 kHz
            "ID,wav,spk_id,duration,start,stop\nx,1,z,4.0,0,192000\n",
            r"a\.csv:2: x is to be 12\.00 s of 4\.00 s\. start and stop count samples at 16,000 Hz",
        ),
        (  # at 8 kHz: without a word it were the first half of each
            "ID,wav,spk_id,duration,start,stop\nx,1,z,4.0,0,32000\ny,1,z,5.51,0,44056\n",
            r"a\.csv: every stop is the end of its recording at 8,000 Hz",
        ),
    ],
)
def test_what_is_wrong_with_a_csv_is_named(tmp_path, text, message):
    (tmp_path / "a.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        read_csv(tmp_path / "a.csv")


def test_blanks_in_a_csv_belong_to_no_name_and_stretches_are_taken_as_they_are(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"ID , wav,spk_id \r\nx , /1.wav ,ann \r\ny,/2.wav,ann\r\n")
    assert [item[:3] for item in read_csv(path)] == [("x", "/1.wav", "ann"), ("y", "/2.wav", "ann")]
    path.write_text(  # durations rounded; of the stretch; first halves beside another stretch
        "ID,wav,spk_id,duration,start,stop\n1,a,z,4.6,0,72345\n2,b,z,2.0,32000,64000\n"
        "3,c,z,6.0,0,48000\n4,c,z,6.0,48000,96000\n"
    )
    lengths = [(item.start, item.duration) for item in read_csv(path)]
    assert lengths == [(0.0, 72345 / 16000), (2.0, 2.0), (0.0, 3.0), (3.0, 3.0)]


def kaldi(folder, **files):
    for name, text in files.items():
        (folder / name.replace("wav_scp", "wav.scp")).write_text(text)
    return folder


def test_kaldis_files_from_other_editors_and_with_more_than_is_recorded(tmp_path, caplog):
    mark = "\ufeff"
    kaldi(tmp_path, wav_scp=f"{mark}a-1 /1.wav \r\n\r\nb-1 /2.wav\r\n",
          utt2spk=f"{mark}a-1 ann\r\nb-1 bob \r\nc-1 cyd\r\n")  # fmt: skip
    assert [item[:3] for item in read_kaldi(tmp_path)] == [
        ("a-1", "/1.wav", "ann"),
        ("b-1", "/2.wav", "bob"),
    ]
    assert "1 of its 3 recordings are not in wav.scp or segments, and are not used: c-1" in (
        caplog.text
    )
    kaldi(tmp_path, segments=f"{mark}c-1 b-1 0.5 -1\r\n")
    (item,) = read_kaldi(tmp_path)
    assert (item.file, item.start, item.part, np.isnan(item.duration)) == (
        "/2.wav",
        0.5,
        True,
        True,
    )


def test_kaldis_folder_is_read_with_segments_and_durations(tmp_path):
    kaldi(tmp_path, wav_scp="a-1 /a 1.wav\nb-1\tb.flac\n", utt2spk="a-1 ann\nb-1 bob\n",
          utt2dur="a-1 2.5\n")  # fmt: skip
    first, second = read_table(tmp_path)
    assert first == Item("a-1", "/a 1.wav", "ann", 0.0, 2.5, False)
    assert second[:3] == ("b-1", str(tmp_path / "b.flac"), "bob")
    assert np.isnan(second.duration)
    assert list(read_kaldi(tmp_path / "wav.scp").ids) == ["a-1", "b-1"]
    kaldi(tmp_path, segments="a-1-0 a-1 0.5 2.0\n", utt2spk="a-1-0 ann\n")
    assert list(read_kaldi(tmp_path)) == [Item("a-1-0", "/a 1.wav", "ann", 0.5, 1.5, True)]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"wav_scp": "a sph2pipe -f wav a.sph |\n"},
            r"wav\.scp:1: .* is a command, and nothing is",
        ),
        ({"wav_scp": "a | touch x\n"}, r"wav\.scp:1: .* is a command"),
        ({"wav_scp": "a\n"}, r"wav\.scp:1: expected 'id path'"),
        ({"wav_scp": "a 1\na 2\n"}, r"wav\.scp:2: a is listed twice"),
        ({"wav_scp": "a 1\nb 2\n"}, r"utt2spk: 1 recordings have no speaker, the first is b"),
        ({"wav_scp": "a 1\n", "segments": "a x 0 1\n"}, r"segments:1: expected"),
        ({"wav_scp": "a 1\n", "segments": "a a 2 1\n"}, r"segments:1: expected"),
    ],
)
def test_what_is_wrong_with_kaldis_folder_is_named(tmp_path, files, message):
    kaldi(tmp_path, utt2spk="a ann\n", **files)
    with pytest.raises(ValueError, match=message):
        read_kaldi(tmp_path)
    (tmp_path / "utt2spk").unlink()
    with pytest.raises(FileNotFoundError, match="who speaks"):
        read_kaldi(tmp_path)
