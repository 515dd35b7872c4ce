"""Train and evaluate a face verifier.

    python recipes/face/train.py hparams/face_qmargin.yaml [--key value ...]

Without a ``--data_folder`` it generates synthetic faces and ends in minutes on a CPU. Started again
with the same settings, it resumes, or says that it is done.
"""

import sys
from functools import partial
from pathlib import Path

from speechbrain_qmargin.brain import FaceBrain
from speechbrain_qmargin.data.classes import class_encoder
from speechbrain_qmargin.data.face_formats import FaceRecords, FaceShards, read_bin
from speechbrain_qmargin.data.faces import face_dataset, prepare_faces
from speechbrain_qmargin.experiment import pair_ids
from speechbrain_qmargin.recipe import Datasets, Task, train_verifier

SYNTHETIC = "generated faces: this shows that the machinery works, not how accurate it is"


def prepare(settings):
    """The images that the settings name; generated faces where they name none."""
    folder, test, valid = (
        settings[key] for key in ("data_folder", "verification_file", "valid_file")
    )
    sets = {Path(path).stem: read_bin(path) for path in settings["test_sets"]}
    pair_sets = {name: same for name, (_, same) in sets.items()}
    if folder is not None and (stored := stored_faces(folder, settings["save_folder"])):
        if not sets or test is not None:
            raise ValueError(f"{folder} has no names to test on: give --test_sets '[lfw.bin]'")
        classes = stored().num_classes
        return Task(classes, lambda hparams: stored_datasets(stored, sets, hparams), {}, pair_sets)
    if folder is None:
        from speechbrain_qmargin.data.mini_faces import build_mini_faces

        mini = build_mini_faces()
        folder, test, valid = mini.folder, mini.trials_test, mini.trials_valid
    elif test is None:
        raise ValueError("verification_file: give the pairs to test on, or leave out data_folder")
    corpus = prepare_faces(
        folder,
        settings["save_folder"],
        verification_file=test,
        valid_file=valid,
        num_valid_identities=settings["num_valid_identities"],
        train_identities=settings["train_identities"],
        min_images=settings["min_images"],
    )
    return Task(
        num_classes=len(corpus.identities),
        datasets=lambda hparams: folder_datasets(corpus, sets, hparams),
        test_trials=corpus.test_lists,
        pair_sets=pair_sets,
        valid_trials=corpus.valid_trials,
        note=SYNTHETIC if settings["data_folder"] is None else "",
        units="identities",
    )


def folder_datasets(corpus, sets, hparams):
    """Half of the training images mirrored; the others as they are."""
    size, epochs = hparams["image_size"], hparams["epoch_counter"]
    train = face_dataset(
        corpus.train,
        size,
        flip=True,
        label_encoder=class_encoder(
            corpus.identities, f"{hparams['save_folder']}/label_encoder.txt"
        ),
        seed=hparams["seed"],
        epoch=lambda: epochs.current,
    )
    valid = face_dataset(corpus.valid, size) if corpus.valid else None
    return Datasets(train, face_dataset(corpus.test | pair_images(sets), size), valid)


def stored_faces(folder, save_folder):
    """What opens a .rec or a folder of .tar shards; None for a folder of images."""
    if str(folder).endswith(".rec"):
        return partial(FaceRecords, folder)
    if any(Path(folder).glob("*.tar")):
        return partial(FaceShards, folder, index=Path(save_folder) / "shards.npz")
    return None


def stored_datasets(stored, sets, hparams):
    """Records or shards to train on, InsightFace's verification sets to test on."""
    size, epochs = hparams["image_size"], hparams["epoch_counter"]
    train = stored(image_size=size, flip=True, seed=hparams["seed"], epoch=lambda: epochs.current)
    return Datasets(train, face_dataset(pair_images(sets), size))


def pair_images(sets):
    """A manifest of the images of .bin sets."""
    return {
        name: {"image": image, "identity": ""}
        for one, (images, same) in sets.items()
        for name, image in zip(pair_ids(one, len(same)), images, strict=True)
    }


if __name__ == "__main__":
    train_verifier(sys.argv[1:], FaceBrain, prepare)
