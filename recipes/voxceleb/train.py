"""Train and evaluate a speaker verifier.

    python recipes/voxceleb/train.py hparams/qmargin.yaml [--key value ...]

Without a ``--data_folder`` it builds the synthetic mini corpus and ends in minutes on a CPU.
Started again with the same settings, it resumes, or says that it is done.
"""

import sys

from speechbrain_qmargin.data.classes import class_encoder
from speechbrain_qmargin.data.sampling import BalancedSampler
from speechbrain_qmargin.data.speech import prepare_speech, speech_dataset
from speechbrain_qmargin.training.brain import SpeakerBrain
from speechbrain_qmargin.training.run import Datasets, Task, train_verifier

SYNTHETIC = "synthetic voices: this shows that the machinery works, not how accurate it is"


def prepare(settings):
    """The corpus that the settings name; the synthetic mini corpus where they name none."""
    folder, test, valid = (
        settings[key] for key in ("data_folder", "verification_file", "valid_file")
    )
    if folder is None:
        from speechbrain_qmargin.synthetic.voices import build_mini_corpus

        mini = build_mini_corpus()
        folder, test, valid = mini.folder, mini.trials_test, mini.trials_valid
    elif test is None:
        raise ValueError("verification_file: give the trials to test on, or leave out data_folder")
    corpus = prepare_speech(
        folder,
        settings["save_folder"],
        trials_folder=settings["trials_folder"],
        verification_file=test,
        valid_file=valid,
        num_valid_speakers=settings["num_valid_speakers"],
        train_speakers=settings["train_speakers"],
        min_utterances=settings["min_utterances"],
        allow_missing=settings["allow_missing"],
    )
    return Task(
        num_classes=len(settings["speeds"]) * len(corpus.speakers),
        datasets=lambda hparams: datasets(corpus, hparams),
        test_trials=corpus.test_lists,
        valid_trials=corpus.valid_trials,
        note=SYNTHETIC if settings["data_folder"] is None else "",
    )


def datasets(corpus, hparams):
    """Random crops to train on, whole utterances for the rest."""
    rate, epochs = hparams["sample_rate"], hparams["epoch_counter"]
    encoder = class_encoder(corpus.speakers, f"{hparams['save_folder']}/label_encoder.txt")
    cohort = per_speaker(corpus.train, hparams["cohort_utterances"])
    augment, sampler = hparams["crop_augment"], None
    if hparams["sampler"] == "balanced":
        speakers = [item["spk_id"] for item in corpus.train.values()]
        sampler = BalancedSampler(speakers, seed=hparams["seed"], epoch=lambda: epochs.current)
    elif hparams["sampler"] != "plain":
        raise ValueError(f"sampler: {hparams['sampler']!r}; choose plain or balanced")
    return Datasets(
        train=speech_dataset(
            corpus.train,
            rate,
            crop=hparams["sentence_len"],
            label_encoder=encoder,
            seed=hparams["seed"],
            epoch=lambda: epochs.current,
            speeds=hparams["speeds"] if hparams["perturb_speed"] else hparams["speeds"][:1],
            augment=augment and augment(speech=corpus.train),
        ),
        sampler=sampler,
        test=speech_dataset(corpus.test, rate),
        valid=speech_dataset(corpus.valid, rate) if corpus.valid else None,
        cohort=speech_dataset(cohort, rate) if cohort else None,
        cohort_classes={name: item["spk_id"] for name, item in cohort.items()},
    )


def per_speaker(manifest, count):
    """At most `count` utterances of each speaker, evenly spread; all where it is None."""
    by_speaker = {}
    for name, item in manifest.items():
        by_speaker.setdefault(item["spk_id"], []).append(name)
    chosen = {}
    for names in by_speaker.values():
        wanted = len(names) if count is None else min(count, len(names))
        for i in range(wanted):
            name = names[i * len(names) // wanted]
            chosen[name] = manifest[name]
    return chosen


if __name__ == "__main__":
    train_verifier(sys.argv[1:], SpeakerBrain, prepare, export=True)
