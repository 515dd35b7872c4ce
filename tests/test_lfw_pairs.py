"""LFW's pairs.txt: read as it is published, wherever pairs of faces are read."""

import numpy as np
import pytest
from PIL import Image

from speechbrain_qmargin.data.faces import prepare_faces
from speechbrain_qmargin.export.images import find_images, select_images
from speechbrain_qmargin.trials import read_trials, read_unlabelled
from speechbrain_qmargin.trials.lfw_pairs import read_lfw_pairs

TWO_FOLDS = """2\t2
Anna_A\t1\t4
Bert_B\t1\t2
Anna_A\t2\tCleo_C\t1
Dora_D\t1\tBert_B\t12
Cleo_C\t1\t2
Cleo_C\t1\t3
Anna_A\t1\tDora_D\t1
Anna_A\t3\tDora_D\t2
"""


def listed(folder, text):
    path = folder / "pairs.txt"
    path.write_text(text)
    return path


@pytest.mark.parametrize("read", [read_trials, read_unlabelled])
def test_folds_keep_their_order(tmp_path, read):
    trials = read(listed(tmp_path, TWO_FOLDS))
    assert trials.is_target.tolist() == [True, True, False, False] * 2
    assert [trials.pair(n) for n in (0, 3, 7)] == [
        "Anna_A/Anna_A_0001.jpg Anna_A/Anna_A_0004.jpg",
        "Dora_D/Dora_D_0001.jpg Bert_B/Bert_B_0012.jpg",
        "Anna_A/Anna_A_0003.jpg Dora_D/Dora_D_0002.jpg",
    ]
    assert trials.source.startswith("pairs.txt sha256:")
    assert len(np.unique(trials.labelled().speakers())) == 4


def test_a_part_without_folds_and_blanks_for_tabs(tmp_path):
    """View 1's pairsDevTest.txt."""
    text = "\ufeff1\r\nAnna_A 1 2\r\n\r\nAnna_A 1 Bert_B 1\r\n"
    assert read_trials(listed(tmp_path, text)).is_target.tolist() == [True, False]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("Dora_D\t2\n", "", "9: expected 'name1 n1 name2 n2', got 'Anna_A\\\\t3\\\\t'"),
        ("Anna_A\t3\tDora_D\t2\n", "", "'2 2', announces 8 pairs, and 7 follow"),
        ("Bert_B\t1\t2", "Bert_B\t1\tAnna_A\t2", "3: expected 'name n1 n2'"),
        ("Cleo_C\t1\t2", "Cleo_C\t0\t2", "6: expected 'name n1 n2'"),
        ("Bert_B\t12", "Bert_B\tx", "5: expected 'name1 n1 name2 n2'"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, old, new, said):
    with pytest.raises(ValueError, match=f"pairs.txt.*{said}"):
        read_trials(listed(tmp_path, TWO_FOLDS.replace(old, new)))


@pytest.mark.parametrize("text", ["1 a b\n0 a c\n", "10 300\n11 301\n", "a 1 2\n", ""])
def test_other_lists_are_not_taken_for_it(tmp_path, text):
    assert read_lfw_pairs(listed(tmp_path, text)) is None


def test_aligned_images_of_another_suffix_are_found(tmp_path, caplog):
    """`qmargin align` writes .png; the set's files are .jpg."""
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    for name in ("Anna_A", "Bert_B", "Cleo_C", "Dora_D", "Eric_E", "Finn_F"):
        for number in (1, 2, 3, 4, 12):
            file = tmp_path / "faces" / name / f"{name}_{number:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
    pairs = listed(tmp_path, TWO_FOLDS)
    trials = read_trials(pairs)
    images = find_images(tmp_path / "faces")
    chosen = select_images(images, trials.ids, pairs)
    assert list(chosen.items) == trials.ids
    assert chosen.items["Anna_A/Anna_A_0004.jpg"].name == "Anna_A_0004.png"
    with pytest.raises(FileNotFoundError, match="1 of the images it names are not there"):
        select_images(images, ["Anna_A/Anna_A_0001.jpg", "Anna_B/Anna_B_0001.jpg"], pairs)

    corpus = prepare_faces(tmp_path / "faces", tmp_path / "save", verification_file=pairs)
    assert corpus.identities == ["Eric_E", "Finn_F"]
    assert corpus.test_trials["pairs"].pair(0) == "Anna_A/Anna_A_0001.png Anna_A/Anna_A_0004.png"
    assert len(corpus.test) == 12
    assert "without their suffix" in caplog.text
