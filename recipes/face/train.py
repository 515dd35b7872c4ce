"""Train and evaluate a face verifier.

    python recipes/face/train.py hparams/face_qmargin.yaml [--key value ...]

Without a --data_folder it generates synthetic faces and ends in minutes on a CPU. Started again
with the same settings, it resumes, or says that it is done. Training images that cannot be decoded
are listed in save/skipped_images.txt.
"""

import sys

from speechbrain_qmargin.cli.recipe import end_early, run_recipe

if __name__ == "__main__":
    end_early(__doc__, sys.argv[1:])  # before the imports below, which take seconds

import logging
from functools import partial
from pathlib import Path

from speechbrain.utils.distributed import if_main_process

from speechbrain_qmargin.data.classes import class_encoder
from speechbrain_qmargin.data.epochs import CurrentEpoch
from speechbrain_qmargin.data.face_dataset import FaceDataset, ImageDataset, StoredDataset
from speechbrain_qmargin.data.faces import prepare_faces
from speechbrain_qmargin.data.images import check_images
from speechbrain_qmargin.data.pickled import read_bin
from speechbrain_qmargin.data.shards import stored_faces
from speechbrain_qmargin.data.skipped import Skipped
from speechbrain_qmargin.export.inference import export_run
from speechbrain_qmargin.faces.pair_sets import check_folds, pair_ids
from speechbrain_qmargin.files import named_file
from speechbrain_qmargin.training.brain import FaceBrain
from speechbrain_qmargin.training.processes import made_by_main_process
from speechbrain_qmargin.training.run import Datasets, Task, train_verifier

SYNTHETIC = "generated faces: this shows that the machinery works, not how accurate it is"
SKIPPED = "skipped_images.txt"

logger = logging.getLogger(__name__)


def prepare(settings):
    """The images that the settings name; generated faces where they name none."""
    folder, test, valid = (
        settings[key] for key in ("data_folder", "verification_file", "valid_file")
    )
    sets = read_sets(settings["test_sets"], test, folder)
    pair_sets = {name: same for name, (_, same) in sets.items()}
    stored = None if folder is None else stored_faces(folder)
    if stored is not None:
        for key in ("verification_file", "valid_file", "num_valid_identities", "train_identities"):
            if settings[key]:
                raise ValueError(
                    f"{key}: does not apply to {folder}, whose images have no names; leave it out "
                    "and test on --test_sets '[lfw.bin]'"
                )
        if settings["min_images"] > 2:  # its default, which a folder of images has
            raise ValueError(
                f"min_images: {settings['min_images']} does not apply to {folder}, all of whose "
                "identities are trained on; leave it out"
            )
        if not sets:
            raise ValueError(f"{folder} has no names to test on: give --test_sets '[lfw.bin]'")
        return Task(
            stored.num_classes,
            len(stored),
            partial(stored_datasets, stored, sets),
            {},
            pair_sets,
            known={"training_data": made_by_main_process(stored.content)},
        )
    if folder is None:
        from speechbrain_qmargin.synthetic.faces import build_mini_faces

        mini = build_mini_faces()
        folder, test, valid = mini.folder, mini.trials_test, mini.trials_valid
    elif test is None and not sets:
        raise ValueError(
            "verification_file: give the pairs to test on, or test_sets; or leave out data_folder"
        )
    corpus = made_by_main_process(
        lambda: prepare_faces(
            folder,
            settings["save_folder"],
            verification_file=test,
            valid_file=valid,
            num_valid_identities=settings["num_valid_identities"],
            train_identities=settings["train_identities"],
            min_images=settings["min_images"],
        )
    )
    if if_main_process():
        check_images({one.id: one.file for part in (corpus.valid, corpus.test) for one in part})
    return Task(
        num_classes=len(corpus.identities),
        num_items=len(corpus.train),
        datasets=partial(folder_datasets, corpus, sets),
        test_trials=corpus.test_trials,
        pair_sets=pair_sets,
        valid_trials=corpus.valid_trials,
        note=SYNTHETIC if settings["data_folder"] is None else "",
        units="identities",
        known={"training_data": None},
    )


def read_sets(paths, pair_list, data_folder):
    """InsightFace's .bin sets by name; what would fail after training fails here."""
    sets = {}
    for named in [paths] if isinstance(paths, str) else paths:
        path = set_file(named, data_folder)
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


def set_file(named, data_folder):
    """A .bin set where its path says, or beside the records, where InsightFace publishes it."""
    path = Path(named)
    if path.is_file() or data_folder is None:
        return named_file("test_sets", path)
    beside = Path(data_folder) if Path(data_folder).is_dir() else Path(data_folder).parent
    if not (beside / path).is_file():
        raise FileNotFoundError(f"test_sets: {path} does not exist, and {beside / path} neither")
    return beside / path


def folder_datasets(corpus, sets, hparams):
    """A manifest to train on, files and .bin sets to test on."""
    size = hparams["image_size"]
    encoder = class_encoder(corpus.identities, f"{hparams['save_folder']}/label_encoder.txt")
    train = FaceDataset(corpus.train, size, encoder.lab2ind, **training_options(hparams))
    warned(train.skipped)
    valid, test = corpus.valid, corpus.test
    return Datasets(
        train,
        test=images_of(sets, size, test.ids, test.files),
        valid=ImageDataset(valid.ids, valid.files, size) if len(valid) else None,
    )


def stored_datasets(stored, sets, hparams):
    """Records or shards to train on, InsightFace's verification sets to test on."""
    size = hparams["image_size"]
    train = StoredDataset(stored, size, **training_options(hparams))
    warned(train.skipped)
    return Datasets(train, test=images_of(sets, size))


def training_options(hparams):
    """Half of the images are mirrored, and those that cannot be used are listed."""
    return {
        "flip": True,
        "seed": hparams["seed"],
        "epoch": CurrentEpoch(hparams["epoch_counter"]),
        "skipped": Skipped(Path(hparams["save_folder"]) / SKIPPED),
    }


def images_of(sets, size, ids=(), files=()):
    """Files by their ids, then the images of .bin sets."""
    ids, images = [*ids], [*files]
    for name, (contents, same) in sets.items():
        ids += pair_ids(name, len(same))
        images += contents
    return ImageDataset(ids, images, size)


def warned(skipped):
    """The same, after saying what is listed there."""
    if skipped and if_main_process():
        logger.warning(skipped.warning())
    return skipped


def main(argv):
    """A run, and at its end which images were not trained on."""
    settings = train_verifier(argv, FaceBrain, prepare, export_run).settings
    warned(Skipped(Path(settings["save_folder"]) / SKIPPED))


if __name__ == "__main__":
    sys.exit(run_recipe(__doc__, main, sys.argv[1:]))
