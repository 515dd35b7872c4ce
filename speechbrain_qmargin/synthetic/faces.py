"""Generated faces: a small corpus of synthetic identities that needs no download.

An identity is a set of proportions and colours; an image adds pose, expression, light, occlusion,
blur and noise. They are drawings, made with numpy and Pillow: a training on them shows that the
machinery works, not how accurate it is on photographs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from tqdm import tqdm

from speechbrain_qmargin.extras import require
from speechbrain_qmargin.files import cache_folder, replacing, write_text

__all__ = ["CORPUS_VERSION", "MiniFaces", "build_mini_faces", "draw_face"]

CORPUS_VERSION = 1
SIZE = 112


@dataclass(frozen=True)
class MiniFaces:
    """Where the corpus is.

    Attributes
    ----------
    folder : Path
        ``<identity>/<image>.png``, 112 x 112.
    trials_test, trials_valid : Path
        Pairs of identities that are in no other part, ``label image image``.

    Examples
    --------
    >>> corpus = build_mini_faces(getfixture("tmp_path"), num_train=1, num_valid=1, num_test=1,
    ...                           num_images=1, progress=False)
    >>> sorted(path.name for path in corpus.folder.iterdir())
    ['test000', 'train000', 'trials_test.txt', 'trials_valid.txt', 'valid000']
    """

    folder: Path
    trials_test: Path
    trials_valid: Path


def build_mini_faces(
    folder: str | Path | None = None,
    *,
    seed: int = 0,
    num_train: int = 80,
    num_valid: int = 10,
    num_test: int = 30,
    num_images: int = 16,
    progress: bool = True,
) -> MiniFaces:
    """Draw the corpus, or what is missing of it.

    Parameters
    ----------
    folder : path, optional
        Default: below :func:`~speechbrain_qmargin.files.cache_folder`.
    seed, num_train, num_valid, num_test, num_images : int
        Each image is a function of the seed, its identity's number and its own.

    Raises
    ------
    ImportError
        Pillow is not installed.

    Examples
    --------
    >>> corpus = build_mini_faces(getfixture("tmp_path"), num_train=0, num_valid=0, num_test=1,
    ...                           num_images=2, progress=False)
    >>> print(corpus.trials_test.read_text().splitlines()[0])
    1 test000/00.png test000/01.png
    """
    if folder is None:
        counts = f"{seed}-{num_train}-{num_valid}-{num_test}-{num_images}"
        folder = cache_folder() / f"mini_faces-{CORPUS_VERSION}-{counts}"
    folder = Path(folder).expanduser().absolute()
    parts = {"train": num_train, "valid": num_valid, "test": num_test}
    identities = [(part, number) for part, count in parts.items() for number in range(count)]
    missing = [
        (position, number, file)
        for position, (part, identity) in enumerate(identities)
        for number in range(num_images)
        if not (file := folder / f"{part}{identity:03d}" / f"{number:02d}.png").is_file()
    ]
    for position, number, file in tqdm(
        missing, "drawing faces", disable=not progress or not missing, unit="face"
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial, partial.open("wb") as stream:
            draw_face((seed, position), number).save(stream, format="PNG")
    trials = {part: folder / f"trials_{part}.txt" for part in ("valid", "test")}
    for part, file in trials.items():
        names = [
            f"{part}{identity:03d}/{number:02d}.png"
            for identity in range(parts[part])
            for number in range(num_images)
        ]
        pairs = (f"{int(a[:-7] == b[:-7])} {a} {b}\n" for a, b in combinations(names, 2))
        write_text(file, "".join(pairs))
    return MiniFaces(folder, trials["test"], trials["valid"])


def draw_face(identity: tuple[int, ...], number: int, size: int = SIZE):
    """One image of an identity.

    Parameters
    ----------
    identity : tuple of int
        Seeds the proportions and colours.
    number : int
        Seeds what differs from image to image.
    size : int
        Pixels.

    Returns
    -------
    PIL.Image.Image, RGB

    Raises
    ------
    ImportError
        Pillow is not installed.

    Examples
    --------
    >>> one, again, other = (draw_face((0, 7), number, size=32) for number in (0, 0, 1))
    >>> one.size, one == again, one == other
    ((32, 32), True, False)
    """
    require("PIL", why="generated faces", extra="face")
    from PIL import Image, ImageFilter

    who = np.random.default_rng((*identity, 1))
    now = np.random.default_rng((*identity, 2, number))
    image = _portrait(who, now, 2 * size)
    image = _posed(image, now)
    if now.random() < 0.3:
        image = _occluded(image, now)
    image = image.resize((size, size), Image.Resampling.LANCZOS)
    if now.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(now.uniform(0.3, 1.1)))
    return Image.fromarray(_lit(np.asarray(image, dtype=np.float32), now))


def _colour(base, spread: float, rng) -> tuple[int, ...]:
    return tuple(int(v) for v in np.clip(np.asarray(base) + rng.normal(0, spread, 3), 0, 255))


def _portrait(who, now, side: int):
    """The drawing, frontal and evenly lit, at twice the size."""
    from PIL import Image, ImageDraw

    def at(x: float, y: float) -> tuple[float, float]:
        return side * (0.5 + x), side * (0.5 + y)

    def ellipse(x, y, rx, ry, fill, outline=None, width=0):
        draw.ellipse((*at(x - rx, y - ry), *at(x + rx, y + ry)), fill, outline, width)

    skins = [(250, 220, 195), (232, 190, 160), (205, 155, 120), (160, 110, 78), (105, 70, 50)]
    hairs = [(30, 24, 20), (70, 45, 28), (130, 90, 50), (200, 165, 100), (150, 150, 150)]
    skin = _colour(skins[who.integers(5)], 9, who)
    hair = _colour(hairs[who.integers(5)], 10, who)
    iris = _colour([(70, 50, 35), (60, 100, 140), (70, 120, 70)][who.integers(3)], 12, who)
    dark = tuple(int(0.8 * v) for v in skin)
    width, height = who.uniform(0.25, 0.33), who.uniform(0.35, 0.43)
    jaw, gap = who.uniform(0.6, 0.95), who.uniform(0.10, 0.15)
    eye_y, eye_r, slant = who.uniform(-0.10, -0.03), who.uniform(0.032, 0.052), who.normal(0, 0.012)
    brow_lift, brow_width = who.uniform(0.05, 0.09), who.uniform(0.010, 0.026)
    nose_l, nose_w = who.uniform(0.10, 0.18), who.uniform(0.025, 0.06)
    mouth_y, mouth_w = who.uniform(0.17, 0.23), who.uniform(0.07, 0.13)
    lip, fringe = who.uniform(0.012, 0.03), who.uniform(0.02, 0.16)
    long, beard, glasses, ears = who.random(), who.random(), who.random(), who.uniform(0.03, 0.06)
    mole = (who.uniform(-0.17, 0.17), who.uniform(-0.02, 0.25))
    lips = _colour((185, 95, 95), 18, who)

    smile, gaze = now.normal(0, 0.02), now.normal(0, 0.008)
    open_eyes = np.clip(now.normal(0.6, 0.1), 0.25, 0.8)
    backdrop = _colour((now.uniform(60, 200),) * 3, 20, now)
    cloth = _colour((now.uniform(40, 220),) * 3, 40, now)

    image = Image.new("RGB", (side, side), backdrop)
    draw = ImageDraw.Draw(image)
    if long > 0.55:  # hair that falls behind the face
        ellipse(0, 0.05, width + 0.09, height + 0.12, hair)
    ellipse(0, 0.62, 0.42, 0.22, cloth)
    draw.rectangle((*at(-0.11, 0.2), *at(0.11, 0.5)), dark)
    for sign in (-1, 1):
        ellipse(sign * width, eye_y + 0.05, ears, 0.07, skin, dark, 2)
    angle = np.linspace(0, 2 * np.pi, 60)
    narrow = np.where(np.sin(angle) > 0, 1 - (1 - jaw) * np.sin(angle) ** 2, 1)
    outline = np.stack((width * narrow * np.cos(angle), height * np.sin(angle)), 1)
    draw.polygon([at(x, y) for x, y in outline], skin)
    if beard < 0.25:
        lower = outline[(outline[:, 1] > 0.12)]
        draw.polygon([at(x, y) for x, y in lower], tuple((np.array(hair) + skin) // 2))
        ellipse(0, mouth_y, mouth_w + 0.03, 0.05, skin)
    top = [(x * 1.06, y * 1.06) for x, y in outline if y < -height * 0.35]
    side_line = -height * 0.35 * 1.06
    middle = [(width * 0.7, side_line - fringe * 0.3), (0, side_line - 0.1 + fringe)]
    draw.polygon([at(x, y) for x, y in [*top, *middle, (-width * 0.7, side_line)]], hair)

    for sign in (-1, 1):
        x, y = sign * gap, eye_y + sign * slant
        ellipse(x, y, eye_r * 1.25, eye_r * open_eyes, (245, 245, 240), dark, 2)
        ellipse(x + gaze, y, eye_r * 0.55, eye_r * min(0.55, open_eyes), iris)
        ellipse(x + gaze, y, eye_r * 0.25, eye_r * 0.25, (15, 15, 15))
        ends = [at(x - 0.06, y - brow_lift + 0.01 * sign), at(x + 0.06, y - brow_lift)]
        draw.line(ends, tuple(int(0.7 * v) for v in hair), int(brow_width * side))
        if glasses > 0.75:
            rim = (*at(x - 0.08, y - 0.06), *at(x + 0.08, y + 0.06))
            draw.rounded_rectangle(rim, 12, None, (25, 25, 30), 4)
    if glasses > 0.75:
        draw.line([at(-gap + 0.08, eye_y), at(gap - 0.08, eye_y)], (25, 25, 30), 4)
    tip = eye_y + nose_l
    nose = [at(-0.012, eye_y + 0.03), at(-nose_w, tip), at(0, tip + 0.018), at(nose_w, tip)]
    draw.line(nose, dark, 5, joint="curve")
    grid = np.linspace(-1, 1, 15)
    upper = [(mouth_w * t, mouth_y - smile * 2 * t * t - lip * (1 - t * t)) for t in grid]
    under = [(mouth_w * t, mouth_y - smile * 2 * t * t + lip * (1 - t * t)) for t in grid[::-1]]
    draw.polygon([at(x, y) for x, y in upper + under], lips)
    draw.line([at(mouth_w * t, mouth_y - smile * 2 * t * t) for t in grid], (90, 40, 40), 3)
    if who.random() < 0.35:
        ellipse(*mole, 0.011, 0.011, (70, 45, 35))
    return image


def _posed(image, now):
    """Turned, tilted, shifted and scaled a little: a perspective of the drawing."""
    from PIL import Image

    side = image.width
    corners = np.array([(0, 0), (side, 0), (side, side), (0, side)], dtype=float)
    turn = np.deg2rad(now.normal(0, 5))
    rotation = np.array([(np.cos(turn), -np.sin(turn)), (np.sin(turn), np.cos(turn))])
    centred = (corners - side / 2) @ rotation.T * now.uniform(0.92, 1.08)
    yaw, pitch = now.normal(0, 0.09, 2)
    depth = 1 + (centred[:, 0] * yaw + centred[:, 1] * pitch) / (side / 2)
    seen = centred / depth[:, None] + side / 2 + now.normal(0, 0.018 * side, 2)
    rows = []
    for (x, y), (u, v) in zip(seen, corners, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
    coefficients = np.linalg.solve(np.array(rows), corners.reshape(-1))
    return image.transform(
        (side, side), Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR
    )


def _occluded(image, now):
    """A hand, a scarf, a bar: something before the face."""
    from PIL import ImageDraw

    side, draw = image.width, ImageDraw.Draw(image)
    width, height = side * now.uniform(0.12, 0.35, 2)
    x, y = side * now.uniform(0.0, 0.85), side * now.uniform(0.1, 0.85)
    fill = _colour((now.uniform(30, 220),) * 3, 30, now)
    draw.rounded_rectangle((x, y, x + width, y + height), 20, fill)
    return image


def _lit(pixels: np.ndarray, now) -> np.ndarray:
    """Light from a side, exposure, colour temperature and sensor noise."""
    height, width, _ = pixels.shape
    direction = now.uniform(0, 2 * np.pi)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    shade = 1 + now.uniform(0, 0.35) * (np.cos(direction) * x + np.sin(direction) * y)
    gain = now.uniform(0.7, 1.2) * (1 + now.normal(0, 0.04, 3))
    pixels = pixels * shade[..., None] * gain + now.normal(0, now.uniform(1, 9), pixels.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8)
