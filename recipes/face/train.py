"""Train and evaluate a face verifier.

    python recipes/face/train.py hparams/face_qmargin.yaml [--key value ...]

Without a ``--data_folder`` it generates synthetic faces and ends in minutes on a CPU. Started again
with the same settings, it resumes, or says that it is done.
"""

import sys

from speechbrain_qmargin.brain import FaceBrain
from speechbrain_qmargin.data.faces import face_dataset, prepare_faces
from speechbrain_qmargin.data.labels import class_encoder
from speechbrain_qmargin.recipe import Datasets, Task, train_verifier

SYNTHETIC = "generated faces: this shows that the machinery works, not how accurate it is"


def prepare(settings):
    """The images that the settings name; generated faces where they name none."""
    folder, test, valid = (
        settings[key] for key in ("data_folder", "verification_file", "valid_file")
    )
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
        datasets=lambda hparams: datasets(corpus, hparams),
        test_trials=corpus.test_lists,
        valid_trials=corpus.valid_trials,
        note=SYNTHETIC if settings["data_folder"] is None else "",
        units="identities",
    )


def datasets(corpus, hparams):
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
    return Datasets(train, face_dataset(corpus.test, size), valid)


if __name__ == "__main__":
    train_verifier(sys.argv[1:], FaceBrain, prepare)
