"""Embeddings on their way to a file: interruptions, damage, faults."""

import tracemalloc

import numpy as np
import pytest
import torch
from processes import no_more_open_files

from speechbrain_qmargin.embeddings import load_embeddings, save_embeddings
from speechbrain_qmargin.extraction import (
    EmbeddingParts,
    Inputs,
    extract_into,
    extract_items,
    read_ahead,
)
from speechbrain_qmargin.training.extraction import ReadableBatch, extract_dataset

ROWS = {name: np.full(3, n, np.float32) for n, name in enumerate("abcdef", 1)}


def batches(names, size=2):
    for start in range(0, len(names), size):
        chosen = names[start : start + size]
        yield list(chosen), [ROWS[name] for name in chosen]


def extract(folder, names="abcdef"):
    parts = EmbeddingParts(folder, "model")
    extract_into(parts, batches([name for name in names if name not in parts.done]), np.array)
    return parts


def test_an_interruption_keeps_what_was_embedded(tmp_path):
    def dies(rows):
        if rows[0][0] > 4:
            raise KeyboardInterrupt
        return np.array(rows)

    parts = EmbeddingParts(tmp_path, "model")
    with pytest.raises(KeyboardInterrupt):
        extract_into(parts, batches("abcdef"), dies)
    assert EmbeddingParts(tmp_path, "model").done == set("abcd")
    assert list(extract(tmp_path).gathered("fedcba")) == list("fedcba")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_part_is_named_and_embedded_again(tmp_path, damage, caplog):
    for names in ("ab", "cd", "ef"):
        extract(tmp_path, names)
    file = sorted(tmp_path.glob("part_*.npz"))[1]
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 0xFF
    file.write_bytes({"truncated": data[:-40], "flipped": data, "empty": b""}[damage])
    parts = EmbeddingParts(tmp_path, "model")
    assert parts.done == set("abef")
    assert f"{file}: damaged, what it held is embedded again" in caplog.text
    found = extract(tmp_path).gathered("abcdef")
    for name, row in ROWS.items():
        np.testing.assert_array_equal(found[name], row)


def test_a_lack_of_open_files_damages_no_part(tmp_path):
    extract(tmp_path)
    with no_more_open_files(), pytest.raises(OSError, match="Too many open files"):
        EmbeddingParts(tmp_path, "model")
    assert EmbeddingParts(tmp_path, "model").done == set("abcdef")


def test_who_has_the_embeddings_keeps_them_when_others_are_gathered(tmp_path):
    parts = extract(tmp_path)
    found = parts.gathered("abc")
    parts.gathered("def")
    for name in "abc":
        np.testing.assert_array_equal(found[name], ROWS[name])


def test_a_long_extraction_is_put_together_a_part_at_a_time(tmp_path):
    """In the order that is asked for; memory holds a part, and not all of them."""
    rng, size, dim = np.random.default_rng(0), 250, 1024
    rows = rng.normal(size=(16 * size, dim)).astype(np.float32)
    names = [f"id{n:05d}" for n in rng.permutation(len(rows))]
    parts = EmbeddingParts(tmp_path / "parts", "model")
    for start in range(0, len(rows), size):
        for name, row in zip(names[start : start + size], rows[start : start + size], strict=True):
            parts.add(name, row)
        parts.flush()
    order = sorted(names)
    tracemalloc.start()
    found = parts.gathered([*order, "never embedded"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    save_embeddings(tmp_path / "all.npz", found, "encoder")  # 16 MB at a time, by numpy
    assert peak < rows.nbytes / 2  # a part and what reading one takes
    written = load_embeddings(tmp_path / "all.npz")
    assert written.ids == order
    np.testing.assert_array_equal(written.matrix, rows[np.argsort(names)])
    assert EmbeddingParts(tmp_path / "none", "model").gathered(order) == {}


def test_another_model_and_a_damaged_record_are_named(tmp_path):
    extract(tmp_path)
    with pytest.raises(ValueError, match="another model or of other data"):
        EmbeddingParts(tmp_path, "another")
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(ValueError, match=r"model\.json: damaged .* delete"):
        EmbeddingParts(tmp_path, "model")


def test_a_folder_without_embeddings_is_any_models(tmp_path):
    """As after files of which none could be used: the remedy is another setting, not to delete."""
    nothing = Inputs({"a": "x"}, str)
    for model in ("one", "another"):
        found, faults = extract_items(tmp_path, model, nothing, int, np.array)
        assert (dict(found), list(faults)) == ({}, ["a"])
    extract_items(tmp_path, "another", Inputs({"a": "1"}, str), int, lambda rows: [[1.0]])
    with pytest.raises(ValueError, match="another model"):
        EmbeddingParts(tmp_path, "one")


def test_faults_of_every_writer_are_kept_until_the_next_start(tmp_path):
    EmbeddingParts(tmp_path, "model")
    for writer in (0, 1):
        parts = EmbeddingParts(tmp_path, "model", writer)
        extract_into(parts, [([f"x{writer}"], [[np.nan]])], np.array, {f"y{writer}": "gone"})
    assert parts.faults() == {
        "y0": "gone", "x0": "its embedding is not finite",
        "y1": "gone", "x1": "its embedding is not finite",
    }  # fmt: skip
    assert EmbeddingParts(tmp_path, "model").faults() == {}


def embed_texts(folder, files):
    """The number in each file as its embedding, and which files were read for it."""
    read = []

    def number(file):
        read.append(file.name)
        return float(file.read_text())

    found, faults = extract_items(
        folder / "parts", "model", Inputs(files), number, lambda batch: [batch]
    )
    return {name: row.tolist() for name, row in found.items()}, faults, sorted(read)


def test_what_changed_since_an_interruption_is_embedded_again(tmp_path):
    """A file with another content, and an id that is of another file by now."""
    files = {name: tmp_path / f"{name}.txt" for name in "abcd"}
    for value, file in enumerate(files.values()):
        file.write_text(str(value))
    files["d"].write_text("no number")
    found, faults, _ = embed_texts(tmp_path, files)
    assert (found, list(faults)) == ({"a": [0.0], "b": [1.0], "c": [2.0]}, ["d"])
    files["b"].write_text("11")
    files["d"].write_text("3")
    other = tmp_path / "other" / "c.txt"
    other.parent.mkdir()
    other.write_text("12")
    found, faults, read = embed_texts(tmp_path, files | {"c": other})
    assert found == {"a": [0.0], "b": [11.0], "c": [12.0], "d": [3.0]}
    assert (faults, read) == ({}, ["b.txt", "c.txt", "d.txt"])


def test_embeddings_that_are_lost_meanwhile_are_no_short_result(tmp_path, monkeypatch):
    """As where a second process writes its parts into the folder in the place of these."""
    monkeypatch.setattr("speechbrain_qmargin.extraction.PART_SIZE", 3)
    folder, inputs = tmp_path / "parts", Inputs({str(n): n for n in range(6)}, int)

    def embed(batch):
        if batch == [3]:
            (folder / "part_0_000000.npz").write_bytes(b"damaged")
        return [batch]

    with pytest.raises(
        OSError, match=r"parts: 3 of 6 embeddings .*, the first is 0; .*start again"
    ):
        extract_items(folder, "model", inputs, int, embed)
    read = []
    found, _ = extract_items(
        folder, "model", inputs, lambda n: read.append(n) or n, lambda batch: [batch]
    )
    assert {name: row.tolist() for name, row in found.items()} == {str(n): [n] for n in range(6)}
    assert sorted(read) == [0, 1, 2]


def test_a_dataset_whose_embeddings_are_lost_meanwhile_is_no_shorter_one(tmp_path):
    """A cohort was smaller for it, and nobody said so."""

    class Numbers:
        ids = ("a/0", "a/1", "a/2")

        def describe(self, row):
            return {"row": row}

        def __getitem__(self, row):
            return {"id": self.ids[row], "x": torch.tensor([float(row)])}

    def load(items):
        for part in tmp_path.glob("*/part_0_000000.npz"):
            part.write_bytes(b"damaged")
        return [ReadableBatch()([items[row] for row in range(len(items))])]

    def extract():
        return extract_dataset(Numbers(), tmp_path, "model", load, lambda batch: batch.x.data, {})

    assert list(extract()) == ["a/0", "a/1", "a/2"]
    Numbers.ids = (*Numbers.ids, "a/3")
    with pytest.raises(OSError, match=r"3 of 4 embeddings are not there .*, the first is a/0"):
        extract()
    assert [row.item() for row in extract().values()] == [0, 1, 2, 3]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_no_worker_is_one(workers):
    found = read_ahead([("a", 1), ("b", 2), ("c", 3)], str, workers)
    assert [(key, future.result()) for key, future in found] == [("a", "1"), ("b", "2"), ("c", "3")]
