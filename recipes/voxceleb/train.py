"""Train and evaluate a speaker verifier.

    python recipes/voxceleb/train.py hparams/qmargin.yaml [--key value ...]

Without a ``--data_folder`` it builds the synthetic mini corpus and ends in minutes on a CPU.
Started again with the same settings, it resumes, or says that it is done.
"""

import sys

from speechbrain.utils.distributed import if_main_process

from speechbrain_qmargin.brain import SpeakerBrain, load_pretrained
from speechbrain_qmargin.data.speech import prepare_speech, speaker_encoder, speech_dataset
from speechbrain_qmargin.experiment import (
    load_experiment,
    main_process_first,
    processes,
    validation,
    verify,
)

SYNTHETIC = "synthetic voices: this shows that the machinery works, not how accurate it is"


def prepare(settings):
    """The corpus that the settings name; the synthetic mini corpus where they name none."""
    folder, test, valid = (
        settings[key] for key in ("data_folder", "verification_file", "valid_file")
    )
    if folder is None:
        from speechbrain_qmargin.data.mini_voices import build_mini_corpus

        mini = build_mini_corpus()
        folder, test, valid = mini.folder, mini.trials_test, mini.trials_valid
    elif test is None:
        raise ValueError("verification_file: give the trials to test on, or leave out data_folder")
    return prepare_speech(
        folder,
        settings["save_folder"],
        verification_file=test,
        valid_file=valid,
        num_valid_speakers=settings["num_valid_speakers"],
        train_speakers=settings["train_speakers"],
        min_utterances=settings["min_utterances"],
    )


def main(argv):
    experiment = load_experiment(argv)
    with processes(experiment.run_opts):
        run(experiment)


def run(experiment):
    if experiment.announce_finished():
        return
    experiment.check_output_folder()

    note = SYNTHETIC if experiment.settings["data_folder"] is None else ""
    if note and if_main_process():
        print(f"No --data_folder given. Training on {note}.", flush=True)

    # Speakers decide the classifier's size, so the data come before the model
    corpus = main_process_first(lambda: prepare(experiment.settings))
    hparams = experiment.load(out_n_neurons=len(corpus.speakers))

    encoder_file = f"{hparams['save_folder']}/label_encoder.txt"
    encoder = main_process_first(lambda: speaker_encoder(corpus, encoder_file))
    epochs = hparams["epoch_counter"]
    train_data = speech_dataset(
        corpus.train,
        hparams["sample_rate"],
        crop=hparams["sentence_len"],
        label_encoder=encoder,
        seed=hparams["seed"],
        epoch=lambda: epochs.current,
    )
    valid_data = speech_dataset(corpus.valid, hparams["sample_rate"]) if corpus.valid else None
    test_data = speech_dataset(corpus.test, hparams["sample_rate"])

    brain = SpeakerBrain(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=experiment.run_opts,
        checkpointer=hparams["checkpointer"],
        validate=validation(corpus.valid_trials),
    )
    load_pretrained(hparams)
    brain.fit(
        epochs,
        train_data,
        valid_data,
        train_loader_kwargs=hparams["train_dataloader"],
        valid_loader_kwargs=hparams["test_dataloader"],
    )
    embeddings = brain.extract(test_data, **hparams["test_dataloader"])
    if if_main_process():
        verify(experiment, embeddings, corpus.test_trials, brain.history(), note=note)


if __name__ == "__main__":
    main(sys.argv[1:])
