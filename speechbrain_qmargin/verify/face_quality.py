"""Whether an image is one to decide on: its size, exposure and sharpness, and whether it is noise.

There is no face detector here: images are aligned crops, as the networks take them. What a crop
shows of a face is not judged, only whether it can show one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["FaceLimits", "FaceQuality", "measure_face"]


@dataclass(frozen=True)
class FaceQuality:
    """What was measured on an image.

    Attributes
    ----------
    height, width : int
        In pixels, before it is resized.
    brightness, contrast : float
        Mean and deviation of the luminance, of 255.
    cut_off : float
        The share of pixels that are black or white.
    likeness : float
        Correlation of neighbouring pixels; of photographs it is near 1, of noise near 0.
    sharpness : float
        Deviation of the Laplacian of the luminance, scaled to 112 pixels, over its contrast.
    faults : tuple of str
        Why it is refused; empty for a good one.

    Examples
    --------
    >>> black = measure_face(np.zeros((112, 112, 3), dtype=np.uint8))
    >>> black.height, black.brightness, black.contrast
    (112, 0.0, 0.0)
    """

    height: int
    width: int
    brightness: float
    contrast: float
    cut_off: float
    likeness: float
    sharpness: float
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class FaceLimits:
    """What an image must have; each of a :class:`FaceQuality`'s measures.

    Attributes
    ----------
    side : int
        The shorter side, at least.
    max_pixels : int
        Of an image; more is refused before it is decoded.
    brightness : (float, float)
    contrast, likeness, sharpness : float
        The least.
    cut_off : float
        The most.

    Examples
    --------
    >>> dark = FaceQuality(112, 112, 8, contrast=30, cut_off=0, likeness=0.9, sharpness=0.2)
    >>> FaceLimits().faults(dark)
    ('too dark: brightness 8 of 255, 20 to 235',)
    >>> FaceLimits(brightness=(5, 235)).faults(dark)
    ()
    """

    side: int = 48
    max_pixels: int = 50_000_000
    brightness: tuple[float, float] = (20.0, 235.0)
    contrast: float = 10.0
    cut_off: float = 0.5
    likeness: float = 0.7
    sharpness: float = 0.05

    def faults(self, found: FaceQuality) -> tuple[str, ...]:
        """What is wrong, in words, each with its figure and what is wanted."""
        if min(found.height, found.width) < self.side:
            return (
                f"too small: {found.width} x {found.height} pixels, at least {self.side} a side",
            )
        if found.contrast == 0:
            return ("shows nothing: all its pixels are equal",)
        faults = []
        low, high = self.brightness
        if not low <= found.brightness <= high:
            word = "dark" if found.brightness < low else "bright"
            faults.append(
                f"too {word}: brightness {found.brightness:.0f} of 255, {low:g} to {high:g}"
            )
        elif found.cut_off > self.cut_off:
            faults.append(
                f"badly exposed: {100 * found.cut_off:.0f} % of its pixels are black or white, at "
                f"most {100 * self.cut_off:g} %"
            )
        if found.contrast < self.contrast:
            faults.append(f"no contrast: {found.contrast:.1f} of 255, at least {self.contrast:g}")
        if found.likeness < self.likeness:
            faults.append(
                f"no photograph: neighbouring pixels are alike to {found.likeness:.2f}, at least "
                f"{self.likeness:g}"
            )
        elif found.sharpness < self.sharpness:
            faults.append(f"blurred: sharpness {found.sharpness:.3f}, at least {self.sharpness:g}")
        return tuple(faults)


def measure_face(pixels: np.ndarray) -> FaceQuality:
    """Measure an image.

    Parameters
    ----------
    pixels : uint8 array [H, W, 3]

    Examples
    --------
    >>> noise = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    >>> FaceLimits().faults(measure_face(noise))
    ('no photograph: neighbouring pixels are alike to -0.02, at least 0.7',)
    """
    height, width = pixels.shape[:2]
    grey = pixels.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    contrast = float(grey.std())
    if contrast < 1e-3 or min(height, width) < 3:
        return FaceQuality(height, width, float(grey.mean()), 0.0, 0.0, 0.0, 0.0)
    centred = (grey - grey.mean()) / contrast
    likeness = min(
        float((centred[:, 1:] * centred[:, :-1]).mean()),
        float((centred[1:] * centred[:-1]).mean()),
    )
    step = max(1, round(min(height, width) / 112))
    small = centred[: height // step * step, : width // step * step]
    small = small.reshape(height // step, step, width // step, step).mean(axis=(1, 3))
    laplacian = (
        small[:-2, 1:-1] + small[2:, 1:-1] + small[1:-1, :-2] + small[1:-1, 2:]
    ) - 4 * small[1:-1, 1:-1]
    return FaceQuality(
        height=height,
        width=width,
        brightness=float(grey.mean()),
        contrast=contrast,
        cut_off=float(np.mean((grey <= 2) | (grey >= 253))),
        likeness=likeness,
        sharpness=float(laplacian.std()),
    )
