"""Train and evaluate a speaker verifier.

    python recipes/voxceleb/train.py hparams/qmargin.yaml [--key value ...]

Without a --data_folder or --manifest it builds the synthetic mini corpus and ends in minutes on a
CPU. Started again with the same settings, it resumes, or says that it is done.
"""

import sys

from speechbrain_qmargin.cli.recipe import end_early, run_recipe

if __name__ == "__main__":
    end_early(__doc__, sys.argv[1:])  # before the imports below, which take seconds

import logging
from functools import partial

from speechbrain.utils.distributed import if_main_process

from speechbrain_qmargin.data.classes import class_encoder
from speechbrain_qmargin.data.epochs import CurrentEpoch
from speechbrain_qmargin.data.readers import reader_named
from speechbrain_qmargin.data.sampling import BalancedSampler
from speechbrain_qmargin.data.skipped import Skipped
from speechbrain_qmargin.data.speech import SKIPPED, prepare_speech
from speechbrain_qmargin.data.speech_dataset import SpeechDataset
from speechbrain_qmargin.export.inference import export_run
from speechbrain_qmargin.training.brain import SpeakerBrain
from speechbrain_qmargin.training.processes import made_by_main_process
from speechbrain_qmargin.training.run import Datasets, Task, train_verifier

SYNTHETIC = "synthetic voices: this shows that the machinery works, not how accurate it is"


logger = logging.getLogger(__name__)


def prepare(settings):
    """The corpus that the settings name; the synthetic mini corpus where they name none."""
    sources = [one for key in ("data_folder", "manifest") for one in several(settings[key])]
    test, valid = (settings[key] for key in ("verification_file", "valid_file"))
    if not sources:
        from speechbrain_qmargin.synthetic.voices import build_mini_corpus

        mini = build_mini_corpus()
        sources, test, valid = [mini.folder], mini.trials_test, mini.trials_valid
    elif test is None:
        raise ValueError(
            "verification_file: give the trials to test on (make_trials.py makes lists of a "
            "folder), or leave out data_folder and manifest"
        )
    corpus = made_by_main_process(
        lambda: prepare_speech(
            sources,
            settings["save_folder"],
            trials_folder=settings["trials_folder"],
            verification_file=test,
            enrolment_file=settings["enrolment_file"],
            valid_file=valid,
            num_valid_speakers=settings["num_valid_speakers"],
            train_speakers=settings["train_speakers"],
            min_utterances=settings["min_utterances"],
            allow_missing=settings["allow_missing"],
            reader=reader_named(settings["reader"]),
        )
    )
    return Task(
        num_classes=len(settings["speeds"]) * len(corpus.speakers),
        num_items=len(corpus.train),
        datasets=partial(datasets, corpus),
        test_trials=corpus.test_trials,
        valid_trials=corpus.valid_trials,
        note="" if settings["data_folder"] or settings["manifest"] else SYNTHETIC,
    )


def several(setting):
    """A setting that is one of something or a list of it, as a list."""
    if setting is None:
        return []
    return setting if isinstance(setting, list) else [setting]


def datasets(corpus, hparams):
    """Random crops to train on, whole utterances for the rest."""
    rate, epoch = hparams["sample_rate"], CurrentEpoch(hparams["epoch_counter"])
    encoder = class_encoder(corpus.speakers, f"{hparams['save_folder']}/label_encoder.txt")
    skipped = Skipped(corpus.skipped, what="recordings")
    cohort = corpus.train.evenly(hparams["cohort_utterances"])
    if cohort is not corpus.train:
        cohort = cohort.kept_in(f"{hparams['save_folder']}/manifests/cohort.manifest")
    augment, sampler = hparams["crop_augment"], None
    if hparams["sampler"] == "balanced":
        sampler = BalancedSampler(corpus.train.labels, seed=hparams["seed"], epoch=epoch)
    elif hparams["sampler"] != "plain":
        raise ValueError(f"sampler: {hparams['sampler']!r}; choose plain or balanced")
    return Datasets(
        train=SpeechDataset(
            corpus.train,
            rate,
            crop=hparams["sentence_len"],
            labels=encoder.lab2ind,
            seed=hparams["seed"],
            epoch=epoch,
            speeds=hparams["speeds"] if hparams["perturb_speed"] else hparams["speeds"][:1],
            augment=augment and augment(speech=corpus.train),
            skipped=skipped,
        ),
        sampler=sampler,
        test=SpeechDataset(corpus.test, rate),
        valid=SpeechDataset(corpus.valid, rate) if len(corpus.valid) else None,
        cohort=SpeechDataset(cohort, rate) if len(cohort) else None,
        cohort_classes=cohort.class_of_id,
    )


def main(argv):
    """A run, and at its end which recordings could not be used."""
    settings = train_verifier(argv, SpeakerBrain, prepare, export_run).settings
    skipped = Skipped(f"{settings['save_folder']}/{SKIPPED}", what="recordings")
    if skipped and if_main_process():
        logger.warning(skipped.warning())


if __name__ == "__main__":
    sys.exit(run_recipe(__doc__, main, sys.argv[1:]))
