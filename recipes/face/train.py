"""Train and evaluate a face verifier.

    python recipes/face/train.py hparams/face_qmargin.yaml [--key value ...]

Without a ``--data_folder`` it generates synthetic faces and ends in minutes on a CPU. Started again
with the same settings, it resumes, or says that it is done. Training images that cannot be decoded
are listed in ``save/skipped_images.txt``.
"""

import logging
import sys
from pathlib import Path

from speechbrain.utils.distributed import if_main_process

from speechbrain_qmargin.data.classes import class_encoder
from speechbrain_qmargin.data.faces import SkippedImages, check_images, face_dataset, prepare_faces
from speechbrain_qmargin.data.records import read_bin, stored_faces
from speechbrain_qmargin.faces.pair_sets import check_folds
from speechbrain_qmargin.training.brain import FaceBrain
from speechbrain_qmargin.training.results import pair_ids
from speechbrain_qmargin.training.run import Datasets, Task, train_verifier

SYNTHETIC = "generated faces: this shows that the machinery works, not how accurate it is"
SKIPPED = "skipped_images.txt"

logger = logging.getLogger(__name__)


def prepare(settings):
    """The images that the settings name; generated faces where they name none."""
    folder, test, valid = (
        settings[key] for key in ("data_folder", "verification_file", "valid_file")
    )
    sets = read_sets(settings["test_sets"], test)
    pair_sets = {name: same for name, (_, same) in sets.items()}
    stored = None if folder is None else stored_faces(folder)
    if stored is not None:
        for key in ("verification_file", "valid_file", "num_valid_identities", "train_identities"):
            if settings[key]:
                raise ValueError(
                    f"{key}: does not apply to {folder}, whose images have no names; leave it out "
                    "and test on --test_sets '[lfw.bin]'"
                )
        if not sets:
            raise ValueError(f"{folder} has no names to test on: give --test_sets '[lfw.bin]'")
        return Task(
            stored.num_classes,
            lambda hparams: stored_datasets(stored, sets, hparams),
            {},
            pair_sets,
        )
    if folder is None:
        from speechbrain_qmargin.synthetic.faces import build_mini_faces

        mini = build_mini_faces()
        folder, test, valid = mini.folder, mini.trials_test, mini.trials_valid
    elif test is None and not sets:
        raise ValueError(
            "verification_file: give the pairs to test on, or test_sets; or leave out data_folder"
        )
    corpus = prepare_faces(
        folder,
        settings["save_folder"],
        verification_file=test,
        valid_file=valid,
        num_valid_identities=settings["num_valid_identities"],
        train_identities=settings["train_identities"],
        min_images=settings["min_images"],
    )
    if if_main_process():
        check_images({name: one["image"] for name, one in (corpus.valid | corpus.test).items()})
    return Task(
        num_classes=len(corpus.identities),
        datasets=lambda hparams: folder_datasets(corpus, sets, hparams),
        test_trials=corpus.test_lists,
        pair_sets=pair_sets,
        valid_trials=corpus.valid_trials,
        note=SYNTHETIC if settings["data_folder"] is None else "",
        units="identities",
    )


def read_sets(paths, pair_list):
    """InsightFace's .bin sets by name; what would fail after training fails here."""
    sets = {}
    for path in map(Path, [paths] if isinstance(paths, str) else paths):
        images, same = read_bin(path)
        try:
            check_folds(same)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if path.stem in sets or path.stem == Path(pair_list or "").stem:
            raise ValueError(f"test_sets: {path} shares its name with another list; rename it")
        if if_main_process():
            check_images(
                {f"{path.name}, pair {n // 2}, image {n % 2 + 1}": x for n, x in enumerate(images)}
            )
        sets[path.stem] = images, same
    return sets


def folder_datasets(corpus, sets, hparams):
    """Half of the training images mirrored; the others as they are."""
    size, epochs = hparams["image_size"], hparams["epoch_counter"]
    encoder = class_encoder(corpus.identities, f"{hparams['save_folder']}/label_encoder.txt")
    train = face_dataset(
        corpus.train,
        size,
        flip=True,
        label_encoder=encoder,
        seed=hparams["seed"],
        epoch=lambda: epochs.current,
        skipped=warned(SkippedImages(Path(hparams["save_folder"]) / SKIPPED)),
    )
    valid = face_dataset(corpus.valid, size) if corpus.valid else None
    return Datasets(train, face_dataset(corpus.test | pair_images(sets), size), valid)


def stored_datasets(stored, sets, hparams):
    """Records or shards to train on, InsightFace's verification sets to test on."""
    stored.image_size, stored.flip, stored.seed = hparams["image_size"], True, hparams["seed"]
    epochs = hparams["epoch_counter"]
    stored.epoch = lambda: epochs.current
    stored.skipped.keep_in(Path(hparams["save_folder"]) / SKIPPED)
    warned(stored.skipped)
    return Datasets(stored, face_dataset(pair_images(sets), hparams["image_size"]))


def pair_images(sets):
    """A manifest of the images of .bin sets."""
    return {
        name: {"image": image, "identity": ""}
        for one, (images, same) in sets.items()
        for name, image in zip(pair_ids(one, len(same)), images, strict=True)
    }


def warned(skipped):
    """The same, after saying what is listed there."""
    if skipped and if_main_process():
        logger.warning(skipped.warning())
    return skipped


def main(argv):
    """A run, and at its end which images were not trained on."""
    settings = train_verifier(argv, FaceBrain, prepare).settings
    warned(SkippedImages(Path(settings["save_folder"]) / SKIPPED))


if __name__ == "__main__":
    main(sys.argv[1:])
