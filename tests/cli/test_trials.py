"""Trial lists of one's own people: a folder or a table, every pair or a list."""

import numpy as np
import pytest

from speechbrain_qmargin.cli import main
from speechbrain_qmargin.data.people import read_people
from speechbrain_qmargin.export.sources import read_list
from speechbrain_qmargin.trials import read_trials


def trials(*arguments):
    return main(["--quiet", "trials", *map(str, arguments)])


@pytest.fixture
def photographs(tmp_path):
    """Five people with one to five images each."""
    for number, person in enumerate(("ann", "bob", "cyd", "dan", "eve")):
        for image in range(number + 1):
            file = tmp_path / "photographs" / "images" / person / f"{image}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    return tmp_path / "photographs"


def test_a_folder_is_divided_into_people_that_share_nobody(photographs, tmp_path, capsys):
    out = tmp_path / "lists"
    assert trials(photographs, out, "--dev=2", "--test=2", "--max_per_person=3") == 0
    lists = {part: read_trials(out / f"{part}.txt") for part in ("dev", "test")}
    people = {part: set(one.speaker_names()) for part, one in lists.items()}
    assert people["dev"] | people["test"] == {"bob", "cyd", "dan", "eve"}
    assert not people["dev"] & people["test"]
    for one in lists.values():
        sizes = {who: min(3, "abcde".index(who[0]) + 1) for who in set(one.speaker_names())}
        pairs = sum(size * (size - 1) // 2 for size in sizes.values())
        assert one.is_target.sum() == pairs
        assert len(one) == sum(sizes.values()) * (sum(sizes.values()) - 1) // 2
    assert (out / "train_people.txt").read_text() == "ann\n"
    listed = read_list(out / "trial_files.txt", "images")
    assert sorted(listed) == sorted(lists["dev"].ids + lists["test"].ids)
    assert all(path.is_file() for path in listed.values())
    assert "train_files.txt: 1 files of 1 people" in capsys.readouterr().out
    assert trials(photographs, out, "--dev=4", "--test=4") == 1
    said = "4 for dev and 4 for test: give at least 2 people to each, and together no more than"
    assert f"{said} there are with two files or more, 4 of 5\n" in capsys.readouterr().err
    for everybody in ([], ["--all"]):
        assert (
            trials(photographs, tmp_path / "none", "--dev=2", "--max_per_person=1", *everybody) == 1
        )
        assert "1 files of a person: with fewer than 2" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_lists_that_are_there_are_not_lost(photographs, tmp_path, capsys):
    """Another draw would put people of one list into the other; a list may be made by hand."""
    out = tmp_path / "lists"
    options = ["--dev=2", "--test=2"]
    assert trials(photographs, out, *options) == 0
    before = {file.name: (file.read_text(), file.stat().st_mtime_ns) for file in out.iterdir()}
    assert trials(photographs, out, *options) == 0  # the same lists stay as they are
    (out / "test.txt").write_text("1 mine mine\n")
    assert trials(photographs, out, *options) == 1
    said = "lists/test.txt is there already, with another content; give another folder, or say --ov"
    assert said in capsys.readouterr().err
    assert (out / "test.txt").read_text() == "1 mine mine\n"
    mine = {file.name: (file.read_text(), file.stat().st_mtime_ns) for file in out.iterdir()}
    del mine["test.txt"]
    assert mine.items() < before.items()
    assert trials(photographs, out, *options, "--overwrite") == 0
    assert {file.name: file.read_text() for file in out.iterdir()} == {
        name: text for name, (text, _) in before.items()
    }
    (out / "trials.txt").write_text("1 mine mine\n")
    pairs = tmp_path / "pairs.txt"
    pairs.write_text("eve/0.jpg dan/1.jpg\n")
    for given in (["--all"], [f"--pairs={pairs}"]):
        assert trials(photographs, out, *given) == 1
        assert "trials.txt is there already" in capsys.readouterr().err
    assert (out / "trials.txt").read_text() == "1 mine mine\n"
    assert trials(photographs, tmp_path, f"--pairs={tmp_path / 'trials.txt'}") == 1
    assert "the output is an input too" in capsys.readouterr().err


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_everybody_and_sessions(tmp_path, separator):
    rows = [("x/1.jpg", "ann", "mon"), ("x/2.jpg", "ann", "mon"), ("3.jpg", "ann", "tue")]
    rows += [("bob/s/4.jpg", "bob", "")]
    table = tmp_path / "people.csv"
    lines = [("image", "identity", "session"), *rows]
    table.write_text("".join(f"{separator.join(row)}\n" for row in lines))
    found = read_people(table)
    assert found.ids["ann"] == ["ann/mon/1.jpg", "ann/mon/2.jpg", "ann/tue/3.jpg"]
    assert found.ids["bob"] == ["bob/s/4.jpg"]
    assert found.files["ann/mon/1.jpg"] == tmp_path / "x/1.jpg"
    assert trials(table, tmp_path / "lists", "--all") == 0
    made = read_trials(tmp_path / "lists/trials.txt")
    pairs = [sorted(made.pair(n).split()) for n in np.flatnonzero(made.is_target).tolist()]
    assert sorted(pairs) == [[f"ann/mon/{n}.jpg", "ann/tue/3.jpg"] for n in (1, 2)]
    assert len(made) == 5


def test_a_list_of_pairs_gets_its_labels(photographs, tmp_path, capsys):
    image = photographs / "images/eve/4.jpg"
    pairs = tmp_path / "pairs.txt"
    pairs.write_text(f"eve/0.jpg {image}\neve/0.jpg dan/1.jpg\n")
    assert trials(photographs, tmp_path / "o", f"--pairs={pairs}") == 0
    made = read_trials(tmp_path / "o/trials.txt")
    assert made.is_target.tolist() == [True, False]
    assert made.pair(0) == "eve/0.jpg eve/4.jpg"
    assert sorted(read_list(tmp_path / "o/trial_files.txt", "")) == sorted(made.ids)
    (tmp_path / "elsewhere.txt").write_text("a\twav/a.flac\nb\twav/b.flac\n")
    with pytest.raises(FileNotFoundError, match=r"none of its 2 files is there, from /.*wav/a\.fl"):
        read_list(tmp_path / "elsewhere.txt", "files")
    for text, message in (
        ("eve/0.jpg eve/9.jpg\n", r"1 of the names are of no file: eve/9.jpg (there is ann/0.jpg)"),
        (f"eve/4.jpg {image}\n", "it names a file in two ways"),
        ("1 eve/0.jpg dan/0.jpg\n", "the label of eve/0.jpg dan/0.jpg is not what the people say"),
    ):
        pairs.write_text(text)
        assert trials(photographs, tmp_path / "o", f"--pairs={pairs}") == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,who\na,b\n", "p.csv:1: 0 columns are called person"),
        ("image,file,person\na,b,c\n", "p.csv:1: 2 columns are called file"),
        ("image,person\na.jpg\n", "p.csv:2: 1 cells, the header has 2"),
        ("image,person\na.jpg,a/b\n", "p.csv:2: a file and a person without a slash"),
        ("image,person\na.jpg,ann\nann/a.jpg,ann\n", "p.csv:3: ann/a.jpg is there twice"),
        ("image,person\n", "p.csv: nobody in it"),
        ("image,person\n" + 140_000 * "a" + ",ann\n", "p.csv:2: not a table (field larger"),
    ],
)
def test_tables_that_do_not_fit_are_named(tmp_path, capsys, text, message):
    (tmp_path / "p.csv").write_text(text)
    assert trials(tmp_path / "p.csv", tmp_path / "o", "--all") == 1
    assert message in capsys.readouterr().err
    assert trials(tmp_path / "gone", tmp_path / "o") == 1
    assert "no such folder or table" in capsys.readouterr().err


def test_a_file_in_the_place_of_a_folder_is_named(photographs, tmp_path, capsys):
    (tmp_path / "dev.txt").touch()
    assert trials(photographs, tmp_path / "dev.txt", "--dev=2", "--test=2") == 1
    assert "dev.txt is a file; a folder is wanted there" in capsys.readouterr().err
    assert trials(photographs, tmp_path / "o", f"--pairs={tmp_path / 'gone.txt'}") == 1
    said = capsys.readouterr().err
    assert said == f"qmargin trials: {tmp_path / 'gone.txt'}: No such file or directory\n"
