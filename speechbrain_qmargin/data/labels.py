"""Classes to labels: one order, kept with the run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

__all__ = ["class_encoder"]


def class_encoder(classes: Iterable[str], file: str | Path):
    """SpeechBrain's CategoricalEncoder over the training classes in sorted order, kept in `file`.

    Raises
    ------
    ValueError
        `file` is of a run on other classes, whose classifier would not fit.
    """
    from speechbrain.dataio.encoder import CategoricalEncoder

    classes, file = sorted(classes), Path(file)
    encoder = CategoricalEncoder()
    encoder.update_from_iterable(classes)
    encoder.expect_len(len(classes))
    if file.is_file():
        before = set(CategoricalEncoder.from_saved(file).lab2ind)
        changed = sorted(before ^ set(classes))
        if changed:
            raise ValueError(
                f"{file}: the training classes have changed since this run began "
                f"({len(before)} then, {len(classes)} now; {', '.join(changed[:5])}). "
                "Give a new --output_folder"
            )
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        encoder.save(file)
    return encoder
