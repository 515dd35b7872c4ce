"""Embeddings by id: what is read and refused; cosines; models."""

import re
import zipfile

import kaldiio
import numpy as np
import pytest

from speechbrain_qmargin.embeddings import (
    Embeddings,
    cosine_scores,
    load_embeddings,
    load_mean,
    pair_products,
    save_embeddings,
)
from speechbrain_qmargin.trials import LabelledTrials, Trials


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_embeddings_come_back_and_never_run_code(tmp_path):
    embeddings = {"a": np.float32([1, 2]), "b": np.float32([3, 1 / 3])}
    save_embeddings(tmp_path / "e.npz", embeddings)
    again = load_embeddings(tmp_path / "e.npz")
    assert list(again) == ["a", "b"]
    assert all(np.array_equal(again[key], embeddings[key]) for key in again)
    np.savez(tmp_path / "bad.npz", ids=np.array([{}], dtype=object), embeddings=np.ones((1, 2)))
    with pytest.raises(ValueError, match=r"bad\.npz"):
        load_embeddings(tmp_path / "bad.npz")


def test_cosines_equal_one_pair_at_a_time():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(50, 8))
    ids = [f"u{i}" for i in range(50)]
    enrolment, test = rng.integers(50, size=(2, 70000))
    trials = LabelledTrials(ids, enrolment, test, np.zeros(70000, bool))
    mean = rng.normal(size=8)
    scores = cosine_scores(dict(zip(ids, matrix, strict=True)), trials, mean)
    for i in range(0, 70000, 997):
        a, b = matrix[enrolment[i]] - mean, matrix[test[i]] - mean
        assert scores[i] == pytest.approx(a @ b / np.sqrt(a @ a * (b @ b)), abs=1e-6)


def test_products_of_float64_are_float32_too():
    rows = np.random.default_rng(0).normal(size=(5, 8))
    found = pair_products(rows, np.arange(5), np.arange(5)[::-1])
    assert found.dtype == np.float32
    assert found == pytest.approx((rows * rows[::-1]).sum(axis=1), rel=1e-6)


def test_embeddings_that_cannot_be_scored_are_named():
    trials = LabelledTrials(["a", "b"], np.array([0]), np.array([1]), np.array([True]))
    with pytest.raises(ValueError, match=r"1 of 2 recordings .* no embedding: b"):
        cosine_scores({"a": np.ones(2)}, trials)
    with pytest.raises(ValueError, match=r"embedding of b is \[3\], that of a \[2\]"):
        cosine_scores({"a": np.ones(2), "b": np.ones(3)}, trials)
    with pytest.raises(ValueError, match=r"1 embeddings are zero or not finite: b"):
        cosine_scores({"a": np.ones(2), "b": np.array([np.nan, 1])}, trials)


@pytest.mark.parametrize("name", ["e.npz", "e.npy"])
def test_a_file_without_embeddings_is_named(tmp_path, name):
    nothing = np.zeros((0, 4), np.float32)
    if name == "e.npz":
        np.savez(tmp_path / name, ids=np.array([], "U5"), embeddings=nothing)
    else:
        np.save(tmp_path / name, nothing)
        (tmp_path / "e.txt").write_text("")
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: no embeddings in it"):
        load_embeddings(tmp_path / name)


@pytest.mark.parametrize("length", [1e-30, 1e-22, 1e-12, 1e12, 1e22, 1e30])
def test_cosines_do_not_depend_on_the_lengths(length):
    rows = np.random.default_rng(0).normal(size=(2, 8))
    true = rows[0] @ rows[1] / np.linalg.norm(rows[0]) / np.linalg.norm(rows[1])
    for kind in (np.float32, np.float64):
        unit = Embeddings(["a", "b"], (length * rows).astype(kind)).unit(["a", "b"])
        assert unit.dtype == np.float32
        assert unit[0] @ unit[1] == pytest.approx(true, abs=2e-6)


def test_npy_with_ids(tmp_path):
    np.save(tmp_path / "e.npy", np.float32([[1, 2], [3, 4]]))
    write(tmp_path / "e.txt", "a\nb\n")
    assert load_embeddings(tmp_path / "e.npy")["b"].tolist() == [3, 4]
    ids = write(tmp_path / "other", "a\nb\nc\n")
    with pytest.raises(ValueError, match=r"e\.npy: 3 ids and a matrix \(2, 2\)"):
        load_embeddings(tmp_path / "e.npy", ids)
    with pytest.raises(ValueError, match=r"e\.npy: 1 ids are listed twice: a"):
        load_embeddings(tmp_path / "e.npy", write(ids, "a\na\n"))


@pytest.mark.parametrize("text", [False, True])
def test_kaldi_archives(tmp_path, text):
    rows = {"a": np.float32([1, 2]), "b": np.float32([3, 4.5])}
    ark, scp = tmp_path / "e.ark", tmp_path / "e.scp"
    kaldiio.save_ark(str(ark), rows, scp=str(scp), text=text)
    for path in (ark, scp):
        again = load_embeddings(path)
        assert list(again) == ["a", "b"]
        assert all(np.array_equal(again[key], rows[key]) for key in rows)
    if not text:
        kaldiio.save_ark(str(ark), {"c": np.ones(2)}, append=True)
        assert load_embeddings(ark)["c"].tolist() == [1, 1]
        kaldiio.save_ark(str(ark), {"d": np.ones(3)}, append=True)
        with pytest.raises(ValueError, match="d has 3 values, those before 2"):
            load_embeddings(ark)


def test_kaldi_archives_never_run_code(tmp_path):
    ark = tmp_path / "e.ark"
    kaldiio.save_ark(str(ark), {"a": np.float32([1])}, write_function="pickle")
    with pytest.raises(ValueError, match=r"e\.ark: a is neither"):
        load_embeddings(ark)
    kaldiio.save_ark(str(ark), {"a": np.ones((2, 2), np.float32)})
    with pytest.raises(ValueError, match="a is a matrix of 2 rows"):
        load_embeddings(ark)
    pipe = write(tmp_path / "pipe.scp", f"a touch {tmp_path / 'ran'} |\n")
    with pytest.raises(ValueError, match=r"pipe\.scp:1: expected 'id file\.ark:offset'"):
        load_embeddings(pipe)
    kaldiio.save_ark(str(ark), {"a": np.float32([1, 2, 3])})
    ark.write_bytes(ark.read_bytes()[:-4])
    with pytest.raises(ValueError, match="ends after 8 of 12 bytes"):
        load_embeddings(ark)


def test_what_an_archive_claims_is_not_asked_for(tmp_path):
    ark = tmp_path / "e.ark"
    ark.write_bytes(b"a \0BDV \x04\xff\xff\xff\xff1234")
    with pytest.raises(ValueError, match=r"a ends after 4 of 34359738360 bytes"):
        load_embeddings(ark)
    ark.write_bytes(b"x" * 100_000)  # was read to its end, byte by byte, and printed
    with pytest.raises(ValueError, match=r"e\.ark: not a Kaldi ark: an id of more than 4096"):
        load_embeddings(ark)
    ark.write_bytes(b"a \0BFV \x04\x02\0\0\0" + np.float32([1, 2]).tobytes())
    scp = write(tmp_path / "e.scp", f"a\t{ark}:2\n")  # Kaldi parts at any blank
    assert load_embeddings(scp)["a"].tolist() == [1, 2]
    write(scp, f"a {ark}:{'9' * 30}\n")
    with pytest.raises(ValueError, match=r"e\.scp:1: expected 'id file\.ark:offset'"):
        load_embeddings(scp)


def enrolments():
    trials = LabelledTrials(
        ["m0", "m1", "a3", "b2"],
        np.array([0, 0, 1]),
        np.array([2, 3, 3]),
        np.array([True, False, True]),
    ).with_models({"m0": ["a1", "a2"], "m1": ["b1"]})
    rng = np.random.default_rng(0)
    vectors = {name: rng.normal(size=6) * rng.uniform(1, 9) for name in trials.recordings}
    return trials, vectors


def test_a_model_is_the_mean_of_its_recordings():
    trials, vectors = enrolments()
    unit = {name: v / np.linalg.norm(v) for name, v in vectors.items()}
    model = (unit["a1"] + unit["a2"]) / 2
    length = np.linalg.norm(model)
    wanted = [model @ unit["a3"] / length, model @ unit["b2"] / length, unit["b1"] @ unit["b2"]]
    assert cosine_scores(vectors, trials) == pytest.approx(wanted, abs=1e-6)
    by_score = [
        (unit["a1"] @ unit["a3"] + unit["a2"] @ unit["a3"]) / 2,
        (unit["a1"] @ unit["b2"] + unit["a2"] @ unit["b2"]) / 2,
        unit["b1"] @ unit["b2"],
    ]
    scores = cosine_scores(vectors, trials, enrolment="score")
    assert scores == pytest.approx(by_score, abs=1e-6)
    with pytest.raises(ValueError, match="enrolment must be one of embedding, score"):
        cosine_scores(vectors, trials, enrolment="best")
    with pytest.raises(ValueError, match=r"1 models are zero or not finite: m0"):
        cosine_scores(vectors | {"a2": -vectors["a1"]}, trials)
    del vectors["b1"]
    with pytest.raises(ValueError, match=r"have no embedding: b1 \(there is a3\)"):
        cosine_scores(vectors, trials)


def test_ids_that_differ_by_a_suffix_match_with_a_warning():
    trials = Trials(["a.wav", "b.wav"], np.array([0]), np.array([1]))
    vectors = {"b": np.array([1.0, 1]), "a": np.array([1.0, 0])}
    with pytest.warns(UserWarning, match="embeddings are the same without their suffix"):
        assert cosine_scores(vectors, trials) == pytest.approx([0.5**0.5])


@pytest.mark.parametrize("position", [0.2, 0.5, 0.8])
def test_damaged_files_are_one_line(tmp_path, position):
    ids = [f"s{n}" for n in range(50)]
    save_embeddings(tmp_path / "whole.npz", dict(zip(ids, np.ones((50, 16)), strict=True)))
    data = bytearray((tmp_path / "whole.npz").read_bytes())
    at = int(position * len(data))
    (tmp_path / "short.npz").write_bytes(data[:at])
    data[at] ^= 255
    (tmp_path / "flipped.npz").write_bytes(data)
    for name in ("short", "flipped"):
        with pytest.raises(ValueError, match=rf"{name}\.npz: damaged") as error:
            load_embeddings(tmp_path / f"{name}.npz")
        assert "\n" not in str(error.value)


def test_a_few_bytes_that_unpack_to_gigabytes_are_refused(tmp_path):
    path = tmp_path / "bomb.npz"
    rows, ids = np.zeros((1, 2**24), np.float32), np.array(["a"])  # 64 MiB and a header
    np.savez_compressed(path, ids=ids, embeddings=rows)
    with pytest.raises(ValueError, match=r"bomb\.npz: .*embeddings: .* bytes unpack to 67,108,"):
        load_embeddings(path)
    np.savez(path, ids=ids, embeddings=rows)  # as large as it says
    assert load_embeddings(path).matrix.shape == rows.shape


def test_members_that_are_no_arrays_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "e.npz", "w") as archive:
        archive.writestr("ids", b"a")
        archive.writestr("embeddings", b"b")
    with pytest.raises(ValueError, match=r"e\.npz: damaged, or not embeddings \(ids is no array"):
        load_embeddings(tmp_path / "e.npz")


def test_ids_as_bytes_and_half_precision(tmp_path):
    rng = np.random.default_rng(0)
    unit = rng.normal(size=(3, 16))
    unit *= 300 / np.linalg.norm(unit, axis=1, keepdims=True)  # its square is beyond float16
    ids = np.array(["a/é", "b/1", "c/1"])
    np.savez(tmp_path / "e.npz", ids=np.char.encode(ids, "utf-8"), embeddings=unit.astype("f2"))
    read = load_embeddings(tmp_path / "e.npz")
    assert read.ids == ids.tolist()
    trials = Trials(read.ids, np.array([0, 0]), np.array([1, 2]))
    half = unit.astype("f2").astype(float)
    half /= np.linalg.norm(half, axis=1, keepdims=True)
    assert cosine_scores(read, trials) == pytest.approx([half[0] @ half[1], half[0] @ half[2]])
    np.savez(tmp_path / "e.npz", ids=ids, embeddings=unit.astype(str))
    with pytest.raises(ValueError, match=r"e\.npz: the embeddings are of type <U"):
        load_embeddings(tmp_path / "e.npz")


def test_the_mean_of_many_embeddings_loses_no_digits():
    matrix = np.full((100_000, 2), 0.05, np.float32)
    assert np.abs(matrix.mean(axis=0) - 0.05).max() > 1e-6  # a sum in single precision
    assert Embeddings(map(str, range(len(matrix))), matrix).mean() == pytest.approx(0.05, rel=1e-7)


def test_means_of_files(tmp_path):
    np.save(tmp_path / "mean_vec.npy", np.float64([1, 2, 3]))
    assert load_mean(tmp_path / "mean_vec.npy").tolist() == [1, 2, 3]
    save_embeddings(tmp_path / "e.npz", {"a": np.ones(2), "b": np.array([3.0, 5])})
    with pytest.warns(UserWarning, match=r"such as a, are perhaps speakers; .* \(mean_vec\.npy\)"):
        assert load_mean(tmp_path / "e.npz").tolist() == [2, 3]
    save_embeddings(tmp_path / "u.npz", {"a/1": np.ones(2), "a/2": np.array([3.0, 5])})
    assert load_mean(tmp_path / "u.npz").tolist() == [2, 3]
    np.save(tmp_path / "mean_vec.npy", np.float64([1, np.nan]))
    with pytest.raises(ValueError, match=r"mean_vec\.npy: the mean is not finite"):
        load_mean(tmp_path / "mean_vec.npy")


def test_a_mean_of_another_encoder_or_length_is_refused(tmp_path):
    own = Embeddings(["b/1"], np.ones((1, 2)), encoder="5e11")
    for digest in ("5e11", ""):
        save_embeddings(tmp_path / "u.npz", {"a/1": np.ones(2)}, encoder=digest)
        assert load_mean(tmp_path / "u.npz", own).tolist() == [1, 1]
    save_embeddings(tmp_path / "u.npz", {"a/1": np.ones(2)}, encoder="ac1d")
    with pytest.raises(ValueError, match=r"u\.npz is of the encoder ac1d, .* of 5e11"):
        load_mean(tmp_path / "u.npz", own)
    np.save(tmp_path / "mean_vec.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"mean_vec\.npy: a mean of 3 dimensions, for .* of 2"):
        load_mean(tmp_path / "mean_vec.npy", own)


def test_matrices_of_one_row_over_several_arks(tmp_path):
    lines = []
    for number in range(2):
        ark, scp = (str(tmp_path / f"x.{number}.{kind}") for kind in ("ark", "scp"))
        kaldiio.save_ark(ark, {f"u{number}": np.full((1, 3), number + 1.0, np.float32)}, scp=scp)
        lines.append((tmp_path / f"x.{number}.scp").read_text())
    scp = write(tmp_path / "x.scp", "".join(lines))
    read = load_embeddings(scp)
    assert [read["u0"].tolist(), read["u1"].tolist()] == [[1, 1, 1], [2, 2, 2]]
    kaldiio.save_ark(str(tmp_path / "two.ark"), {"a": np.ones((2, 3), np.float32)})
    with pytest.raises(ValueError, match="a is a matrix of 2 rows; an embedding has one"):
        load_embeddings(tmp_path / "two.ark")


def test_flipped_bits_of_stored_embeddings_are_noticed(tmp_path):
    """Each array has its CRC-32 in the zip; the directory, which has none, names each twice."""
    rng = np.random.default_rng(0)
    file = tmp_path / "e.npz"
    rows = rng.normal(size=(3, 5)).astype(np.float32)
    save_embeddings(file, dict(zip(("a/1", "a/2", "b/1"), rows, strict=True)), "a digest")
    whole, said = file.read_bytes(), []
    with zipfile.ZipFile(file) as archive:
        places = [whole.index(member.filename.encode()) for member in archive.infolist()]
        places += [whole.rindex(member.filename.encode()) for member in archive.infolist()]
    places += range(0, whole.index(b"PK\x01\x02"), 5)
    places += [whole.index(b"PK\x01\x02") + 8]  # the flag of an encrypted member
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1
        file.write_bytes(flipped)
        try:
            found = load_embeddings(file)
        except ValueError as error:
            said.append(str(error))
        else:  # of the time, or of padding
            assert found.ids == ["a/1", "a/2", "b/1"]
            assert found.encoder == "a digest"
            np.testing.assert_array_equal(found.matrix, rows)
    assert len(said) > 0.8 * len(places)
    assert all("e.npz: damaged" in one for one in said)
