"""Files and folders that take another's place: it is there until they can, and as private."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from processes import no_more_open_files

from speechbrain_qmargin import files
from speechbrain_qmargin.files import (
    load_arrays,
    refuse_overwriting,
    replacing_folder,
    write_text,
    zip_damage,
)


@pytest.mark.parametrize("fails", ["to_disk", "rename"])
def test_a_folder_stays_where_its_successor_cannot_take_its_place(tmp_path, monkeypatch, fails):
    """As on a full disk, which says so as late as when what was written goes to it."""
    folder, rename = tmp_path / "inference", Path.rename
    folder.mkdir()
    (folder / "weights").write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    if fails == "to_disk":
        monkeypatch.setattr(files, "to_disk", full)
    else:
        monkeypatch.setattr(
            Path,
            "rename",
            lambda path, to: (full if path.suffix == ".partial" else rename)(path, to),
        )
    with pytest.raises(OSError, match="No space left"), replacing_folder(folder) as partial:
        (partial / "weights").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["inference"]
    assert (folder / "weights").read_text() == "old"


def test_a_folder_may_have_folders_and_take_the_place_of_a_link(tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "first")
    with replacing_folder(tmp_path / "model") as partial:
        (partial / "within").mkdir()
        (partial / "within" / "weights").write_text("1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "model"]
    assert (tmp_path / "model" / "within" / "weights").read_text() == "1"


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_a_file_is_as_private_as_the_one_in_whose_place_it_comes(tmp_path):
    umask = os.umask(0o022)
    try:
        for before, private, after in (
            (None, False, 0o644),
            (None, True, 0o600),
            (0o600, False, 0o600),
            (0o640, False, 0o640),
            (0o666, False, 0o644),
            (0o644, True, 0o600),
        ):
            file = tmp_path / f"{before}_{private}"
            if before is not None:
                file.touch()
                file.chmod(before)
            write_text(file, "new", private)
            assert (file.read_text(), file.stat().st_mode & 0o777) == ("new", after)
    finally:
        os.umask(umask)


@pytest.mark.parametrize("named", [True, False])
def test_a_full_disk_names_the_file_that_was_asked_for(tmp_path, named):
    file = tmp_path / "scores.tsv"

    def write():
        with files.replacing(file) as partial:
            names = [str(partial)] if named else []
            raise OSError(errno.ENOSPC, "No space left on device", *names)

    with pytest.raises(OSError, match="No space left") as error:
        write()
    assert error.value.filename == str(file)
    with pytest.raises(OSError, match=r"Errno 2.*list\.txt"), files.replacing(file):
        (tmp_path / "list.txt").read_text()


def test_two_outputs_of_one_place_are_refused(tmp_path):
    link = tmp_path / "link.tsv"
    link.symlink_to(tmp_path / "a.tsv")
    for other in (tmp_path / "a.tsv", tmp_path / "b" / ".." / "a.tsv", link):
        with pytest.raises(ValueError, match="two outputs would be written there"):
            refuse_overwriting([tmp_path / "a.tsv", None, other], [], overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_no_file_takes_the_place_of_a_device_or_a_pipe(tmp_path, overwrite):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for output in (pipe, os.devnull):
        with pytest.raises(ValueError, match=f"{output}: a device or a pipe"):
            refuse_overwriting([output], [], overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_no_file_is_written_where_a_folder_is_nor_below_a_file(tmp_path, overwrite):
    (tmp_path / "scores").mkdir()
    with pytest.raises(IsADirectoryError, match="scores is a folder; give the file to write"):
        refuse_overwriting([tmp_path / "scores"], [], overwrite)
    (tmp_path / "list.txt").touch()
    with pytest.raises(NotADirectoryError, match=r"list\.txt is a file; a folder is wanted there"):
        refuse_overwriting([tmp_path / "list.txt" / "new" / "scores.tsv"], [], overwrite)
    refuse_overwriting([tmp_path / "new" / "scores.tsv", "here.tsv"], [], overwrite)


def test_an_input_that_is_a_loop_of_links_is_left_to_who_reads_it(tmp_path):
    loop = tmp_path / "loop.npz"
    loop.symlink_to(loop)
    refuse_overwriting([tmp_path / "a.tsv"], [loop])
    with pytest.raises(OSError, match="links"):
        loop.read_bytes()


@pytest.mark.parametrize("read", [load_arrays, zip_damage])
def test_a_lack_of_open_files_is_no_damage(tmp_path, read):
    """It passed for it: an older checkpoint was taken, a part of an extraction thrown away."""
    np.savez(tmp_path / "x.npz", x=np.ones(3))
    read(tmp_path / "x.npz")
    with no_more_open_files(), pytest.raises(OSError, match="Too many open files") as caught:
        read(tmp_path / "x.npz")
    assert caught.value.errno == errno.EMFILE
