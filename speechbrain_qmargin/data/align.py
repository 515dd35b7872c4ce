"""Faces turned, scaled and shifted to where networks expect the eyes."""

from __future__ import annotations

import numpy as np

__all__ = ["ARCFACE_TEMPLATE", "align_face"]

# Eyes, nose, corners of the mouth (x, y) in a 112 x 112 image: InsightFace's arcface_dst
ARCFACE_TEMPLATE = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)


def align_face(image: np.ndarray, landmarks: np.ndarray, size: int = 112) -> np.ndarray:
    """Turn, scale and shift a face so that its landmarks meet ArcFace's template.

    The similarity is Umeyama's (1991) least-squares one; pixels are interpolated bilinearly, what
    lies outside the image is black.

    Parameters
    ----------
    image : uint8 array [H, W, 3]
    landmarks : float array [5, 2]
        x and y of the left and right eye, the nose, the left and right corner of the mouth, as
        seen in the image; the centre of the first pixel is (0, 0).
    size : int
        Height and width of the result; the template is scaled with it.

    Returns
    -------
    uint8 array [size, size, 3]

    Raises
    ------
    ValueError
        Landmarks of another shape, not finite, or all in one point.

    Examples
    --------
    >>> image = np.zeros((112, 112, 3), dtype=np.uint8)
    >>> align_face(image, ARCFACE_TEMPLATE).shape
    (112, 112, 3)
    """
    from PIL import Image

    forward = _similarity(np.asarray(landmarks, dtype=float), ARCFACE_TEMPLATE * (size / 112))
    back = np.linalg.inv(forward)[:2]
    # Pillow's coordinates have pixel centres at one half
    back[:, 2] += 0.5 - 0.5 * (back[:, 0] + back[:, 1])
    aligned = Image.fromarray(image).transform(
        (size, size), Image.Transform.AFFINE, back.reshape(-1).tolist(), Image.Resampling.BILINEAR
    )
    return np.asarray(aligned)


def _similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The 3 x 3 similarity that takes source [N, 2] nearest to target [N, 2]."""
    if source.shape != target.shape or not np.isfinite(source).all():
        raise ValueError(f"landmarks must be {target.shape}, finite; got {source.shape}")
    centre_s, centre_t = source.mean(0), target.mean(0)
    s, t = source - centre_s, target - centre_t
    spread = np.square(s).sum()
    if spread == 0:
        raise ValueError("the landmarks are all in one point")
    u, values, vt = np.linalg.svd(t.T @ s)
    sign = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = (u * sign) @ vt
    scale = (values * sign).sum() / spread
    result = np.eye(3)
    result[:2, :2] = scale * rotation
    result[:2, 2] = centre_t - scale * rotation @ centre_s
    return result
