"""The IJB protocol from meta trees in the official format, against naive float64 arithmetic."""

import hashlib
import json
import shutil
import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch

from speechbrain_qmargin.data.align import align_face
from speechbrain_qmargin.data.images import read_pixels
from speechbrain_qmargin.faces.ijb import (
    IJBOptions,
    ImageEmbeddings,
    evaluate_ijb,
    extract_ijb,
    identify_ijb,
    load_image_embeddings,
    pair_cosines,
    read_ijb,
    read_template_pairs,
    save_image_embeddings,
    template_embeddings,
)
from speechbrain_qmargin.faces.ijb import templates as template_module
from speechbrain_qmargin.scoring.metrics import operating_points, tar_at_far
from speechbrain_qmargin.trials import LabelledTrials

OPTIONS = [
    IJBOptions(flip, norm, detector)
    for flip in ("none", "concat", "sum")
    for norm in (False, True)
    for detector in (False, True)
]


def write_ijb(folder, target="IJBC", subjects=12, seed=0):
    """One gallery template a subject, some probes each, in stills and videos; and its embeddings.

    Template and media numbers are neither contiguous nor in order, as in the official files.
    """
    rng = np.random.default_rng(seed)
    meta = folder / "meta"
    meta.mkdir(parents=True)
    faces, gallery, probes, rows = [], {}, {}, []
    numbers = iter(rng.permutation(np.arange(1, 40 * subjects)).tolist())
    for subject in range(subjects):
        person = rng.normal(size=16)
        templates = [next(numbers) for _ in range(3)]
        gallery[subject], probes[subject] = templates[0], templates[1:]
        for template in templates:
            for media in rng.choice(900, size=rng.integers(1, 4), replace=False):
                for _ in range(rng.choice([1, 1, 3])):
                    faces.append((template, 60_000 + media))
                    noise = rng.normal(size=(2, 16)) * [[0.9], [0.5]]
                    image = person + noise[0]
                    rows.append(np.stack([image, image + noise[1]]) * rng.uniform(5, 25))
    order = rng.permutation(len(faces))
    tid_mid, points = [], []
    for number, index in enumerate(order, 1):
        template, media = faces[index]
        tid_mid.append(f"{number}.jpg {template} {media}\n")
        landmarks = " ".join(f"{x:.3f}" for x in rng.uniform(30, 90, size=10))
        points.append(f"{number}.jpg {landmarks} {rng.uniform(0.1, 1):.3f}\n")
    pairs = [
        f"{gallery[one]} {probe} {one == two:d}\n"
        for one in range(subjects)
        for two in range(subjects)
        for probe in probes[two]
    ]
    name = target.lower()
    halves = ("S1", "S2") if target == "IJBB" else ("G1", "G2")
    for half, part in enumerate((*halves, "probe")):
        lists = gallery if half < 2 else probes
        rest = ",img/1.jpg,7,10,20,30,40,,0,1,2\n"
        named = [
            f"{template},{100 + subject}{rest}"
            for subject in lists
            if half == 2 or subject % 2 == half
            for template in (probes[subject] if half == 2 else [gallery[subject]]) * 2
        ]
        of = f"{name}_1N_" + ("probe_mixed" if half == 2 else f"gallery_{part}") + ".csv"
        (meta / of).write_text("TEMPLATE_ID,SUBJECT_ID,FILENAME,SIGHTING_ID\n" + "".join(named))
    (meta / f"{name}_face_tid_mid.txt").write_text("".join(tid_mid))
    (meta / f"{name}_name_5pts_score.txt").write_text("".join(points))
    (meta / f"{name}_template_pair_label.txt").write_text("".join(pairs))
    return np.stack(rows)[order].astype(np.float32)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ijb") / "IJBC"
    return folder, write_ijb(folder)


def naive_templates(folder, embeddings, options):
    """Template embeddings by number, from the files, one loop a level, float64."""
    faces = [x.split() for x in (folder / "meta/ijbc_face_tid_mid.txt").read_text().splitlines()]
    points = (folder / "meta/ijbc_name_5pts_score.txt").read_text().splitlines()
    score = {x.split()[0]: float(x.split()[-1]) for x in points}
    place = {x.split()[0]: i for i, x in enumerate(points)}
    media = {}
    for name, template, medium in faces:
        plain, mirrored = embeddings[place[name]].astype(np.float64)
        vector = {
            "none": plain,
            "sum": plain + mirrored,
            "concat": np.concatenate([plain, mirrored]),
        }[options.flip]
        if not options.use_norm_score:
            vector = vector / np.sqrt((vector**2).sum())
        if options.use_detector_score:
            vector = vector * score[name]
        media.setdefault(template, {}).setdefault(medium, []).append(vector)
    found = {}
    for template, parts in media.items():
        total = sum(sum(frames) / len(frames) for frames in parts.values())
        found[template] = total / np.sqrt((total**2).sum())
    return found


def naive_tar(scores, same, far):
    """Every threshold there is: the most genuine pairs accepted at no more than `far`."""
    best = 0.0
    for threshold in [*np.unique(scores), np.inf]:
        accepted = scores >= threshold
        if accepted[~same].mean() <= far:
            best = max(best, accepted[same].mean())
    return best


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options.code)
def test_templates_scores_and_tar_are_those_of_naive_arithmetic(tree, options):
    folder, embeddings = tree
    protocol = read_ijb(folder, "IJBC")
    images = ImageEmbeddings(embeddings[:, 0], embeddings[:, 1])
    wanted = naive_templates(folder, embeddings, options)
    found = template_embeddings(protocol, images, options)
    assert sorted(wanted, key=int) == protocol.trials.ids
    np.testing.assert_allclose(found, [wanted[x] for x in protocol.trials.ids], atol=2e-7)

    result = evaluate_ijb(protocol, images, options, fars=(0.1, 0.02))
    lines = (folder / "meta/ijbc_template_pair_label.txt").read_text().split()
    left, right, same = lines[0::3], lines[1::3], np.asarray(lines[2::3]) == "1"
    cosine = np.array([wanted[a] @ wanted[b] for a, b in zip(left, right, strict=True)])
    np.testing.assert_allclose(result.scores, cosine, atol=1e-6)
    assert result.scores.dtype == np.float32
    for far in (0.1, 0.02):
        figure = result.report["tar_at_far", far]
        assert figure.value == pytest.approx(naive_tar(cosine, same, far))
        assert figure.low <= figure.value <= figure.high
    assert options.code in result.table()


def test_options_move_the_result(tree):
    folder, embeddings = tree
    protocol = read_ijb(folder)
    images = ImageEmbeddings(embeddings[:, 0], embeddings[:, 1])
    scores = [evaluate_ijb(protocol, images, x).scores for x in OPTIONS]
    for i, one in enumerate(scores):
        for other in scores[:i]:
            assert np.abs(one - other).max() > 1e-4


def test_blocks_of_images_change_nothing(tree, monkeypatch):
    folder, embeddings = tree
    protocol = read_ijb(folder)
    images = ImageEmbeddings(embeddings[:, 0], embeddings[:, 1])
    whole = template_embeddings(protocol, images)
    monkeypatch.setattr(template_module, "_IMAGES", 7)
    np.testing.assert_allclose(template_embeddings(protocol, images), whole, atol=1e-7)


@pytest.mark.parametrize("swap", [False, True])
def test_pairs_in_blocks_as_one_by_one(tree, monkeypatch, swap):
    protocol = read_ijb(tree[0])
    trials, rng = protocol.trials, np.random.default_rng(0)
    order = rng.permutation(len(trials))
    sides = [side[order] for side in (trials.enrolment, trials.test)][:: -1 if swap else 1]
    protocol = replace(protocol, trials=LabelledTrials(trials.ids, *sides, trials.is_target[order]))
    unit = rng.normal(size=(protocol.num_templates, 16)).astype(np.float32)
    wanted = [unit[a].astype(float) @ unit[b] for a, b in zip(*sides, strict=True)]
    for name, value in (("_GALLERY", 256), ("_GALLERY", 5), ("_SPARSE", 0)):
        monkeypatch.setattr(template_module, name, value)
        found = pair_cosines(protocol, unit)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_images_without_a_template_and_images_in_two(tmp_path):
    """Faces are joined by name: order does not matter, nor does an image that no template has."""
    embeddings = write_ijb(tmp_path)
    path = tmp_path / "meta/ijbc_face_tid_mid.txt"
    lines = path.read_text().splitlines(keepends=True)
    moved = lines[5:] + lines[1:5] + [f"2.jpg {lines[7].split()[1]} 61234\n"]
    path.write_text("".join(moved))
    options = IJBOptions()
    wanted = naive_templates(tmp_path, embeddings, options)
    protocol = read_ijb(tmp_path)
    images = ImageEmbeddings(embeddings[:, 0], embeddings[:, 1])
    found = template_embeddings(protocol, images, options)
    np.testing.assert_allclose(found, [wanted[x] for x in protocol.trials.ids], atol=2e-7)


def test_the_order_of_the_lines_does_not_matter(tmp_path):
    embeddings = write_ijb(tmp_path)
    before = read_ijb(tmp_path)
    images = ImageEmbeddings(embeddings[:, 0], embeddings[:, 1])
    wanted = evaluate_ijb(before, images).report
    save_image_embeddings(tmp_path / "images.npz", before.names, *embeddings.transpose(1, 0, 2))
    rng = np.random.default_rng(0)
    for path in (tmp_path / "meta").glob("*.txt"):
        path.write_text("".join(rng.permutation(path.read_text().splitlines(keepends=True))))
    after = read_ijb(tmp_path)
    assert after.names != before.names
    images = load_image_embeddings(tmp_path / "images.npz", after)
    found = evaluate_ijb(after, images).report
    for one, other in zip(wanted.figures, found.figures, strict=True):
        assert (one.name, one.misses, one.false_accepts) == (
            other.name, other.misses, other.false_accepts,
        )  # fmt: skip
        assert other.value == pytest.approx(one.value)


# ------------------------------------------------------------------ subjects


def test_the_1_to_n_lists_name_the_subjects(tree):
    protocol = read_ijb(tree[0])
    assert protocol.subjects() == "12 subjects of 36 templates, by the 1:N lists"
    assert sorted(set(protocol.trials.speaker_of)) == [str(100 + i) for i in range(12)]


def test_genuine_pairs_give_the_same_subjects(tree, tmp_path):
    folder, embeddings = tree
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "meta/ijbc_1N_gallery_G2.csv").unlink()
    linked = read_ijb(tmp_path)
    text = linked.subjects()
    assert text.startswith("subjects are not known by name (ijbc_1N_gallery_G2.csv not in meta/)")
    assert "makes 12 of 36 templates (0 templates stay alone)" in text
    assert "apart" not in text
    assert "contradict" not in text
    named = read_ijb(folder).trials.speakers()
    assert len(set(zip(named, linked.trials.speakers(), strict=True))) == 12
    images = ImageEmbeddings(embeddings[:, 0], embeddings[:, 1])
    one, two = (evaluate_ijb(x, images) for x in (linked, read_ijb(folder)))
    assert "not known by name" in one.table()
    assert "not known by name" not in two.table()
    assert one.report["eer"].value == two.report["eer"].value


def test_what_the_labels_leave_open_is_said(tmp_path):
    write_ijb(tmp_path)
    path = tmp_path / "meta/ijbc_template_pair_label.txt"
    lines = path.read_text().splitlines(keepends=True)
    one, two = lines[0].split()[1], lines[1].split()[1]  # both probes of the first subject
    path.write_text("".join([*lines, f"{one} {two} 0\n"]))
    text = read_ijb(tmp_path).subjects()
    last = len(lines) + 1
    assert f"by the 1:N lists 1 labels are wrong, the first in line {last}" in text
    assert "1 impostor pairs are of one subject by the genuine pairs" in text
    assert f"the first is line {last}" in text

    gallery = lines[0].split()[0]
    others = [x for x in lines if not (x.endswith("0\n") and {one, two, gallery} & set(x.split()))]
    path.write_text("".join(others))  # the first subject meets none of the 11 others
    assert "by the 1:N lists" in read_ijb(tmp_path).subjects()
    table = tmp_path / "meta/ijbc_1N_probe_mixed.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-3]))
    text = read_ijb(tmp_path).subjects()
    assert "(the 1:N lists lack 1 templates, as " in text
    assert f"tells {100 * 11 / 66:.1f} % of the pairs" in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("subject,template", "expected 'template,subject,...'"),
        ("{},9999,x.jpg", "is of subject 9999, and of"),
    ],
)
def test_a_bad_1_to_n_list_is_named_with_its_line(tmp_path, line, message):
    write_ijb(tmp_path)
    path = tmp_path / "meta/ijbc_1N_probe_mixed.csv"
    lines = path.read_text().splitlines()
    lines[2] = line.format(lines[1].split(",")[0])
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"ijbc_1N_probe_mixed\.csv:3: .*{message}"):
        read_ijb(tmp_path)


# ------------------------------------------------------------------ 1:N


@pytest.mark.parametrize("target", ["IJBB", "IJBC"])
def test_searches_are_those_of_a_loop(tmp_path, target):
    embeddings = write_ijb(tmp_path, target, subjects=30, seed=3)
    protocol = read_ijb(tmp_path, target)
    images = ImageEmbeddings(0.2 * embeddings[:, 0], embeddings[:, 1])
    found = identify_ijb(protocol, images, ranks=(1, 3), fpirs=(0.2,), sizes=(5,))
    unit = dict(zip(protocol.trials.ids, template_embeddings(protocol, images), strict=True))
    one, two = ("S1", "S2") if target == "IJBB" else ("G1", "G2")
    assert list(found.found) == [one, two, f"{one}+{two}"]
    tpirs = []
    for name in (one, two):
        gallery = protocol.lists[name]
        ranks, others = {}, {}
        for probe, subject in protocol.lists["mixed"].items():
            scores = {s: float(unit[probe] @ unit[t]) for t, s in gallery.items()}
            if subject in scores:
                ranks[probe] = sum(x >= scores[subject] for x in scores.values())
            else:
                others[probe] = max(scores.values())
        assert (len(ranks), len(others)) == (30, 30)
        search = found.found[name]
        for rank in (1, 3):
            assert search.cmc[rank].value == np.mean([r <= rank for r in ranks.values()])
        row = search.open_set[-1]
        assert row.size == 15
        assert row.fpir.value == np.mean([x >= row.threshold for x in others.values()]) <= 0.2
        tpirs.append(1 - row.fnir.value)
    assert found.means()["TPIR@FPIR=0.2"] == pytest.approx(np.mean(tpirs))
    assert found.found[f"{one}+{two}"].open_set == []
    found.save(tmp_path / "out")
    assert (
        f"gallery {one}: 15 identities of 15 templates"
        in (tmp_path / "out" / "search.txt").read_text()
    )
    assert json.loads((tmp_path / "out" / "search.json").read_text())["target"] == target


def test_a_search_without_its_lists(tree, tmp_path):
    folder, embeddings = tree
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "meta/ijbc_1N_gallery_G2.csv").unlink()
    images = ImageEmbeddings(embeddings[:, 0], embeddings[:, 1])
    with pytest.raises(ValueError, match=r"1:N needs the lists of both galleries.*are G1, mixed"):
        identify_ijb(read_ijb(tmp_path), images)
    listed = tmp_path / "meta/ijbc_1N_gallery_G2.csv"
    listed.write_text("TEMPLATE_ID,SUBJECT_ID\n999999,5\n")
    with pytest.raises(ValueError, match=r"1 templates of the 1:N lists have no images.* 999999"):
        identify_ijb(read_ijb(tmp_path), images)


# ------------------------------------------------------------------ files


def test_pairs_in_every_style(tmp_path):
    rng = np.random.default_rng(0)
    table = rng.integers(0, 10 ** rng.integers(1, 9, size=(500, 2)))
    labels = rng.integers(0, 2, size=500)
    path = tmp_path / "pairs.txt"
    text = "".join(f"{a} {b} {c}\n" for (a, b), c in zip(table, labels, strict=True))
    for style in (text, text.rstrip("\n"), text.replace("\n", "\r\n"), text.replace(" ", "\t"),
                  text.replace(" ", "  ")):  # fmt: skip
        path.write_bytes(style.encode())
        left, right, same, source = read_template_pairs(path)
        assert (left == table[:, 0]).all()
        assert (right == table[:, 1]).all()
        assert (same == labels).all()
        assert (left.dtype, right.dtype, same.dtype) == (np.int32, np.int32, bool)
        assert source == f"pairs.txt sha256:{hashlib.sha256(style.encode()).hexdigest()}"


@pytest.mark.parametrize(
    "line",
    ["1 2", "1 2 3", "1 2 0 0", "a 2 0", "1 2 -1", "-1 2 0", "", "1.0 2 0", "99999999999 1 0",
     "# 1 2 0", "٣ 2 1", "\xff 2 1"],
)  # fmt: skip
def test_a_bad_pair_is_named_with_its_line(tmp_path, line):
    path = tmp_path / "pairs.txt"
    good = "10 20 1\n" * 30
    for before, after, number in (("", good, 1), (good, good, 31), (good, "", 31)):
        path.write_bytes(
            (before + line + "\n" + after).encode("latin-1" if "ÿ" in line else "utf-8")
        )
        with pytest.raises(
            ValueError, match=rf"pairs\.txt:{number}: expected 'template template 0"
        ):
            read_template_pairs(path)


def test_an_empty_pair_list(tmp_path):
    (tmp_path / "pairs.txt").write_text("")
    with pytest.raises(ValueError, match=r"pairs\.txt: empty"):
        read_template_pairs(tmp_path / "pairs.txt")


POINTS = "3.jpg 1 2 3 4 5 6 7 8 9 10"


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("name_5pts_score", POINTS, ":3: expected 'name', ten landmark"),
        ("name_5pts_score", f"{POINTS} high", ":3: not a number"),
        ("name_5pts_score", f"{POINTS} nan", ":3: a value is not finite"),
        ("name_5pts_score", f"{POINTS} -0.5", ":3: .* the score is negative"),
        ("name_5pts_score", f"1.jpg{POINTS[5:]} 0.9", ":3: the image 1.jpg of line 1 again"),
        ("face_tid_mid", "3.jpg 5", ":3: expected 'name template media'"),
        ("face_tid_mid", "3.jpg five 7", ":3: template and media must be numbers"),
        ("face_tid_mid", "none.jpg 5 7", ":3: the image none.jpg has no line of landmarks"),
        ("template_pair_label", "1 99999 0", ":3: template 99999 is not in ijbc_face_tid_mid"),
    ],
)
def test_a_bad_meta_file_is_named_with_its_line(tmp_path, name, line, message):
    write_ijb(tmp_path)
    path = tmp_path / f"meta/ijbc_{name}.txt"
    lines = path.read_text().splitlines()
    lines[2] = line
    if name == "template_pair_label":
        lines[2] = f"{lines[1].split()[0]} 99999 0"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=f"ijbc_{name}.txt{message}"):
        read_ijb(tmp_path)


def test_a_missing_meta_file_and_another_target(tmp_path):
    write_ijb(tmp_path / "IJBB", "IJBB")
    assert read_ijb(tmp_path, "IJBB").target == read_ijb(tmp_path / "IJBB", "IJBB").target
    with pytest.raises(FileNotFoundError, match=r"ijbc_name_5pts_score\.txt"):
        read_ijb(tmp_path, "IJBC")
    with pytest.raises(ValueError, match="IJBB or IJBC"):
        read_ijb(tmp_path, "IJBA")


def test_embeddings_from_a_file_in_any_order(tree, tmp_path):
    folder, embeddings = tree
    protocol = read_ijb(folder)
    plain, mirrored = embeddings[:, 0], embeddings[:, 1]
    names = np.asarray(protocol.names)
    order = np.random.default_rng(0).permutation(len(names))
    path = tmp_path / "images.npz"
    save_image_embeddings(path, names, plain, mirrored)
    wanted = template_embeddings(protocol, load_image_embeddings(path, protocol))
    save_image_embeddings(path, names[order], plain[order], mirrored[order])
    found = template_embeddings(protocol, load_image_embeddings(path, protocol))
    np.testing.assert_array_equal(found, wanted)
    arrays = {"ids": names.astype("S"), "embeddings": plain, "mirrored": mirrored}
    np.savez(path, **arrays)  # some toolkits keep ids as bytes
    found = template_embeddings(protocol, load_image_embeddings(path, protocol))
    np.testing.assert_array_equal(found, wanted)

    save_image_embeddings(path, names[5:], plain[5:])
    with pytest.raises(ValueError, match=r"5 of \d+ images have no embedding, the first is 1.jpg"):
        load_image_embeddings(path, protocol)
    save_image_embeddings(path, [*names[:-1], names[0]], plain)
    with pytest.raises(ValueError, match=r"1\.jpg is listed twice"):
        load_image_embeddings(path, protocol)
    save_image_embeddings(path, names, plain)
    with pytest.raises(ValueError, match="mirrored images' embeddings; or flip='none'"):
        template_embeddings(protocol, load_image_embeddings(path, protocol))
    np.savez(path, ids=np.array([object()]), embeddings=plain)
    with pytest.raises(ValueError, match=r"images\.npz: damaged, or not embeddings"):
        load_image_embeddings(path, protocol)
    save_image_embeddings(path, names, plain)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"images\.npz: damaged, or not embeddings"):
        load_image_embeddings(path, protocol)
    np.savez(path, ids=names)
    with pytest.raises(ValueError, match="wanted arrays 'ids' and 'embeddings'"):
        load_image_embeddings(path, protocol)


def test_bad_embeddings_are_named(tree):
    folder, embeddings = tree
    protocol = read_ijb(folder)
    broken = embeddings[:, 0].copy()
    broken[3, 2] = np.nan
    with pytest.raises(ValueError, match=r"image 4\.jpg has the norm nan"):
        template_embeddings(protocol, ImageEmbeddings(broken), IJBOptions("none"))
    broken[3] = 0
    template_embeddings(protocol, ImageEmbeddings(broken), IJBOptions("none"))
    with pytest.raises(ValueError, match=r"image 4\.jpg has the norm 0"):
        template_embeddings(protocol, ImageEmbeddings(broken), IJBOptions("none", False))
    with pytest.raises(ValueError, match=r"template \d+ has an embedding of zero"):
        template_embeddings(protocol, ImageEmbeddings(0 * broken), IJBOptions("none"))
    with pytest.raises(ValueError, match="none, concat, sum"):
        IJBOptions("F2")


def test_results_on_disk(tree, tmp_path):
    folder, embeddings = tree
    images = ImageEmbeddings(embeddings[:, 0], embeddings[:, 1])
    result = evaluate_ijb(read_ijb(folder), images)
    result.save(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "det.png", "report.json", "report.txt", "roc.png", "scores.npy",
    ]  # fmt: skip
    np.testing.assert_array_equal(np.load(tmp_path / "out/scores.npy"), result.scores)
    stored = json.loads((tmp_path / "out/report.json").read_text())
    assert stored["options"] == {
        "flip": "sum", "use_norm_score": True, "use_detector_score": True, "code": "N1 D1 F2",
    }  # fmt: skip
    assert stored["figures"]["TAR@FAR=0.01"]["value"] == result.report["tar_at_far", 0.01].value
    text = (tmp_path / "out/report.txt").read_text()
    assert text.startswith("IJBC 1:1, N1 D1 F2: embeddings keep their norm, weighted by")
    assert "12 subjects of 36 templates, by the 1:N lists" in text
    assert "(unsupported)" in text  # 1e-6 of 264 impostor pairs


# ------------------------------------------------------------------ extraction


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A tree with images; alignment crops, so that it does not matter here."""
    from PIL import Image

    write_ijb(tmp_path, subjects=3)
    folder = tmp_path / "loose_crop"
    folder.mkdir()
    protocol = read_ijb(tmp_path)
    rng = np.random.default_rng(0)
    for name in protocol.names:
        pixels = rng.integers(0, 256, size=(120, 130, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name, quality=95)
    formats = ModuleType("speechbrain_qmargin.data.records")
    formats.align_face = lambda image, landmarks, size: image[:size, :size]
    monkeypatch.setitem(sys.modules, formats.__name__, formats)
    return protocol, folder


def test_alignment_is_that_of_the_training_data(tmp_path):
    """Landmarks already at ArcFace's template: the image comes back, RGB."""
    from PIL import Image

    template = [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366],
                [41.5493, 92.3655], [70.7299, 92.2041]]  # fmt: skip
    x, y = np.meshgrid(np.arange(112), np.arange(112))
    pixels = np.stack([x, 2 * y, 255 - x - y], axis=2).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "1.png")
    image = read_pixels(tmp_path / "1.png")
    found = align_face(image, np.asarray(template, dtype=np.float32), 112)
    assert (found.shape, found.dtype) == ((112, 112, 3), np.uint8)
    inner = slice(2, -2)
    assert np.abs(found.astype(int) - pixels)[inner, inner].max() <= 2


class Embed:
    """The mean of each quarter of an image, and how often it was asked."""

    def __init__(self, stop_after=None):
        self.images, self.stop_after = 0, stop_after

    def __call__(self, batch):
        if self.stop_after is not None and self.images >= self.stop_after:
            raise KeyboardInterrupt
        assert batch.shape[1:] == (3, 112, 112)
        assert batch.dtype == torch.float32
        assert -1 <= batch.min() < -0.9
        assert 0.9 < batch.max() <= 1
        self.images += len(batch) // 2
        return torch.nn.functional.avg_pool2d(batch, 56).flatten(1)


def test_an_interrupted_extraction_goes_on(pictures, tmp_path):
    protocol, folder = pictures
    count = len(protocol.names)
    whole = extract_ijb(Embed(), folder, protocol, tmp_path / "whole", batch_size=5)
    assert whole.plain.shape == whole.mirrored.shape == (count, 12)

    first = Embed(stop_after=10)
    with pytest.raises(KeyboardInterrupt):
        extract_ijb(first, folder, protocol, tmp_path / "cache", batch_size=5, model="a")
    assert first.images == 10
    with pytest.raises(ValueError, match=rf"10 of {count} images are extracted"):
        load_image_embeddings(tmp_path / "cache", protocol)
    with pytest.raises(ValueError, match="of the model 'a', not 'b'"):
        extract_ijb(Embed(), folder, protocol, tmp_path / "cache", model="b")
    second = Embed()
    found = extract_ijb(second, folder, protocol, tmp_path / "cache", batch_size=4, model="a")
    assert second.images == count - 10
    np.testing.assert_array_equal(found.plain, whole.plain)
    np.testing.assert_array_equal(found.mirrored, whole.mirrored)
    # left and right quarters change places in the mirror
    quarters = whole.plain.reshape(count, 3, 2, 2)[..., ::-1].reshape(count, 12)
    np.testing.assert_allclose(whole.mirrored, quarters, atol=1e-6)

    array = tmp_path / "cache" / "embeddings.npy"
    whole = array.read_bytes()
    array.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"embeddings\.npy: damaged"):
        load_image_embeddings(tmp_path / "cache", protocol)
    array.write_bytes(whole)
    third = Embed()
    extract_ijb(third, folder, protocol, tmp_path / "cache", model="a")
    assert third.images == 0
    result = evaluate_ijb(protocol, load_image_embeddings(tmp_path / "cache", protocol))
    assert len(result.scores) == len(protocol.trials)


def test_images_that_are_missing_or_damaged(pictures, tmp_path):
    protocol, folder = pictures
    (folder / "6.jpg").write_bytes(b"\xff\xd8 no more")
    with pytest.raises(OSError, match=r"6\.jpg: cannot be decoded"):
        extract_ijb(Embed(), folder, protocol, tmp_path / "cache", batch_size=2)
    assert json.loads((tmp_path / "cache/cache.json").read_text())["done"] == 4
    (folder / "6.jpg").unlink()
    (folder / "9.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 images .* the first is 6\.jpg"):
        extract_ijb(Embed(), folder, protocol, tmp_path / "cache")


def test_an_embedding_that_is_not_finite(pictures, tmp_path):
    protocol, folder = pictures

    def embed(batch):
        found = torch.ones(len(batch), 4)
        found[len(batch) // 2 + 1, 2] = torch.nan  # of a mirror image
        return found

    with pytest.raises(ValueError, match=r"2\.jpg: its embedding is not finite"):
        extract_ijb(embed, folder, protocol, tmp_path / "cache", batch_size=4)


def test_embeddings_of_another_shape(pictures, tmp_path):
    protocol, folder = pictures
    with pytest.raises(ValueError, match=r"embed gave \(3, 2\) where \(6, 2\)"):
        extract_ijb(lambda x: x[:3, 0, 0, :2], folder, protocol, tmp_path / "a", batch_size=3)
    with pytest.raises(KeyboardInterrupt):
        extract_ijb(Embed(stop_after=5), folder, protocol, tmp_path / "a", batch_size=5)
    with pytest.raises(ValueError, match=r"embed gave \(10, 2\) where \(10, 12\)"):
        extract_ijb(lambda x: x[:, 0, 0, :2], folder, protocol, tmp_path / "a", batch_size=5)


def test_a_cache_of_other_images(pictures, tmp_path):
    protocol, folder = pictures
    extract_ijb(Embed(), folder, protocol, tmp_path / "cache")
    write_ijb(tmp_path / "other", subjects=3, seed=1)
    with pytest.raises(ValueError, match="of other images or landmarks"):
        load_image_embeddings(tmp_path / "cache", read_ijb(tmp_path / "other"))
    (tmp_path / "cache/cache.json").write_text("{")
    with pytest.raises(ValueError, match=r"cache\.json: .* delete it to extract anew"):
        load_image_embeddings(tmp_path / "cache", protocol)


def test_a_cache_of_other_images_of_the_same_names(pictures, tmp_path):
    """Other crops under the protocol's names passed for those that were embedded before."""
    from PIL import Image

    protocol, folder = pictures
    cache, other, count = tmp_path / "cache", tmp_path / "blurred", len(protocol.names)
    whole = extract_ijb(Embed(), folder, protocol, tmp_path / "whole").plain
    with pytest.raises(KeyboardInterrupt):
        extract_ijb(Embed(stop_after=5), folder, protocol, cache, batch_size=5)
    other.mkdir()
    for name in protocol.names:
        Image.open(folder / name).resize((65, 60)).resize((130, 120)).save(other / name)
    different = rf"cache: 5 of its 5 images are others than in .*blurred, .* {protocol.names[0]}; "
    with pytest.raises(ValueError, match=different):
        extract_ijb(Embed(), other, protocol, cache)
    for name in protocol.names:  # those that are embedded are gone, another one is exchanged
        target = other / name
        target.unlink()
        if name not in protocol.names[:5]:
            shutil.copyfile(folder / name, target)
    last = protocol.names[-1]
    shutil.copyfile(folder / protocol.names[0], other / last)
    found = extract_ijb(Embed(), other, protocol, cache).plain
    np.testing.assert_array_equal(found[:-1], whole[:-1])
    assert not np.array_equal(found[-1], whole[-1])
    with pytest.raises(ValueError, match=rf"cache: 1 of its {count} images .* is {last}; "):
        extract_ijb(Embed(), folder, protocol, cache)
    shutil.rmtree(other)
    np.testing.assert_array_equal(extract_ijb(Embed(), other, protocol, cache).plain, found)
    (cache / "sizes.npy").unlink()
    with pytest.raises(ValueError, match=r"sizes\.npy: damaged .* delete the cache"):
        extract_ijb(Embed(), folder, protocol, cache)


# ------------------------------------------------------------------ the field's reading


def field_reading(scores, same, far, **options):
    """TAR at the point of scikit-learn's curve nearest to `far`, the larger FAR of two as near."""
    from sklearn.metrics import roc_curve

    fpr, tpr, _ = roc_curve(same, scores, **options)
    fpr, tpr = np.flipud(fpr), np.flipud(tpr)
    at = int(np.argmin(np.abs(fpr - far)))
    return tpr[at], fpr[at]


def test_the_nearest_point_may_exceed_the_far_that_it_is_named_after():
    """The first table of docs/face_evaluation.md."""
    # 1,000 impostors; genuine pairs above them all, below 2 and below 16 of them
    genuine = np.concatenate([np.full(70, 999.5), np.full(20, 997.5), np.full(10, 983.5)])
    scores, same = np.append(np.arange(1000.0), genuine), np.arange(1100) >= 1000
    points = operating_points(scores, same)
    assert [tar_at_far(points, far).tar for far in (0.01, 0.001)] == pytest.approx([0.9, 0.7])
    assert [naive_tar(scores, same, far) for far in (0.01, 0.001)] == [0.9, 0.7]
    assert field_reading(scores, same, 0.01) == (1.0, 0.016)
    assert field_reading(scores, same, 0.001) == (0.9, 0.002)
    # half of it comes from the points that roc_curve drops unless told not to
    assert field_reading(scores, same, 0.01, drop_intermediate=False) == (0.9, 0.01)


def test_both_readings_of_one_list():
    """The second table of docs/face_evaluation.md."""
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(size=155_000), 4 + rng.normal(size=2_000)])
    same = np.arange(len(scores)) >= 155_000
    points = operating_points(scores, same)
    wanted = {
        # FAR: (ours, false accepts), (theirs, false accepts)
        1e-3: ((81.35, 155), (81.35, 154)),
        1e-4: ((55.40, 15), (55.55, 16)),
        1e-5: ((37.50, 1), (42.35, 2)),
    }
    for far, (ours, theirs) in wanted.items():
        found = tar_at_far(points, far)
        assert (round(100 * found.tar, 2), found.false_accepts) == ours
        tar, realised = field_reading(scores, same, far)
        assert (round(100 * tar, 2), round(realised * 155_000)) == theirs
