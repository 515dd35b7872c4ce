"""The runs of docs/evidence_plan.md: systems and their settings, lists of people, stages.

A stage is a function of the data, the folder of all runs and the systems; it gives its runs by key,
each the recipe's options and a folder. Settings that a tuning chooses are read from its results, so
a system whose tuning is not finished is left out.

Runs that are known by their figures alone, tunings and the number of classes, are kept in
evidence_record.json beside this file. What stands there is not trained again, on whatever machine.
"""

import itertools
import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from speechbrain_qmargin.files import write_text
from speechbrain_qmargin.loss.functional import margin_for

Run = tuple[list[str], Path]
Runs = dict[tuple, Run]
SEEDS, TUNING_SEED = range(5), 1000
TUNINGS = (
    "tune",
    "second_tune",
    "third_tune",
    "third_others_tune",
    "faces_tune",
    "third_faces_tune",
    "resnet_tune",
)
BY_FIGURES = (*TUNINGS, "classes", "third_classes")  # stages whose tables need no scores
RECORD = Path(__file__).with_name("evidence_record.json")


def grid(**values: Sequence) -> list[dict]:
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def points(*triples: tuple[float, float, float]) -> list[dict]:
    return [dict(zip(("alpha", "scale", "margin"), triple, strict=True)) for triple in triples]


QMARGIN = points(
    (1.1, 32, 0.2),
    (1.25, 10, 0.2),
    (1.25, 20, 0.2),
    (1.25, 32, 0.1),
    (1.5, 10, 0.1),
    (1.5, 10, 0.2),
)
COSINES = grid(scale=[16, 32], margin=[0.1, 0.2, 0.35])
RISING_ALPHA = {"alpha_initial": 1.05, "alpha_until_epoch": 8}
FALLING_ALPHA = {"alpha_initial": 2, "alpha_until_epoch": 8}

# The systems in the order of the plan: the recipe's options and the settings that are tried with
# them; one setting is not tuned.
SYSTEMS: dict[str, tuple[list[str], list[dict]]] = {
    "arcface": (["--loss=arcface"], COSINES),
    "cosface": (["--loss=cosface"], COSINES),
    "qmargin": (["--loss=qmargin"], QMARGIN),
    "published": (["--loss=qmargin"], points((1.5, 10, 0.2))),
    "auto": (["--loss=qmargin"], points((1.25, 10, 0.17))),  # what qmargin_auto said for a while
    "auto_before": (["--loss=qmargin"], points((1.25, 20, 0.2))),  # what it said before and since
    "adaface": (["--loss=adaface"], grid(scale=[16, 32], margin=[0.2, 0.4, 0.6])),
    "subcenter": (["--loss=arcface", "--subcentres=3"], COSINES),
    "qmargin_norm": (["--loss=qmargin_norm"], QMARGIN),
    "qmargin_prior": (["--loss=qmargin_prior"], QMARGIN),
    "entmax": (["--loss=entmax"], grid(alpha=[1.1, 1.25, 1.5], scale=[10, 20])),
    "sparsemax": (["--loss=sparsemax"], grid(scale=[2.5, 5, 10, 15, 20, 32])),
    "a3m": (["--loss=a3m"], QMARGIN),
}
PRIMARY = "qmargin"

# What the second tuning adds for the three systems of the second claim.
WIDER_COSINES = [
    *grid(scale=[8], margin=[0.35]),
    *grid(scale=[12], margin=[0.2, 0.35, 0.5]),
    *grid(scale=[16], margin=[0.5, 0.65]),
    *grid(scale=[24], margin=[0.35, 0.5]),
    *grid(scale=[32], margin=[0.5]),
]
WIDER_QMARGIN = points(
    (1.1, 16, 0.2),
    (1.05, 16, 0.35),
    (1.1, 12, 0.35),
    (1.1, 16, 0.35),
    (1.1, 24, 0.35),
    (1.25, 10, 0.35),
    (1.1, 16, 0.5),
    (1.25, 10, 0.5),
    (1.25, 16, 0.35),
)
WIDER_QMARGIN[-1] |= RISING_ALPHA
SECOND_SETTINGS = {"arcface": WIDER_COSINES, "cosface": WIDER_COSINES, "qmargin": WIDER_QMARGIN}

# What the third tuning tries, with prototypes that start short.
THIRD_COSINES = grid(scale=[16, 24, 32], margin=[0.2, 0.35])
THIRD_QMARGIN = points(
    (1.1, 32, 0.2),
    (1.25, 10, 0.2),
    (1.25, 10, 0.35),
    (1.25, 20, 0.2),
    (1.25, 32, 0.1),
    (1.5, 10, 0.2),
)
THIRD_SETTINGS = {"arcface": THIRD_COSINES, "cosface": THIRD_COSINES, "qmargin": THIRD_QMARGIN}

FACE_COSINES = [*grid(scale=[10], margin=[0.2]), *grid(scale=[16], margin=[0.1, 0.2, 0.35])]
FACE_QMARGIN = points((1.1, 32, 0.2), (1.25, 10, 0.2), (1.25, 20, 0.2), (1.5, 10, 0.2))

RESNET_COSINES = [*grid(scale=[16], margin=[0.2, 0.1, 0.35]), *grid(scale=[24], margin=[0.2])]
RESNET_QMARGIN = points((1.25, 20, 0.2), (1.1, 32, 0.2), (1.25, 20, 0.1), (1.25, 20, 0.2))
RESNET_QMARGIN[-1] |= RISING_ALPHA
OWN_SETTINGS = {
    "second_tune": SECOND_SETTINGS,
    "third_tune": THIRD_SETTINGS,
    "third_others_tune": {
        "adaface": SYSTEMS["adaface"][1],
        "subcenter": THIRD_COSINES,
        "entmax": SYSTEMS["entmax"][1],
    },
    "third_faces_tune": {
        "arcface": FACE_COSINES,
        "cosface": FACE_COSINES,
        "qmargin": FACE_QMARGIN,
    },
    "resnet_tune": {"arcface": RESNET_COSINES, "qmargin": RESNET_QMARGIN},
}


def options(system: str, setting: dict) -> list[str]:
    return [*SYSTEMS[system][0], *(f"--{key}={value}" for key, value in setting.items())]


def words(file: Path) -> list[str]:
    return file.read_text().split()


# -- results, of a run's folder or of the record -------------------------------


def recorded() -> dict[str, dict]:
    """The runs of the record by ``stage/run``, each with some of what its results.json has."""
    return json.loads(RECORD.read_text()) if RECORD.is_file() else {}


def name_in_record(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"


def results_of(folder: Path) -> dict | None:
    """What a run's results.json says, or else the record; None of a run that is not finished."""
    file = folder / "results.json"
    if file.is_file():
        return json.loads(file.read_text())
    return recorded().get(name_in_record(folder))


def value(results: dict, trials: str, figure: str) -> float:
    """A figure with cosine scores."""
    return results["lists"][trials]["cosine"]["figures"][figure]["value"]


def record(folders: Iterable[Path]) -> None:
    """Add the figures of finished runs, to the fourth digit."""
    kept = recorded()
    for folder in folders:
        results = results_of(folder)
        if results is None:
            continue
        lists = {
            trials: {
                "cosine": {
                    "figures": {
                        figure: {"value": round(value(results, trials, figure), 4)}
                        for figure in ("EER", "TAR@FAR=0.01")
                    }
                }
            }
            for trials in results["lists"]
        }
        last = results["last_epoch"]
        last = {key: round(last[key], 4) for key in ("support_mean", "zero_loss") if key in last}
        kept[name_in_record(folder)] = {"lists": lists, "last_epoch": last}
    lines = (f"{json.dumps(name)}: {json.dumps(kept[name])}" for name in sorted(kept))
    write_text(RECORD, "{\n" + ",\n".join(lines) + "\n}\n")


# -- tuning, of speech and of faces alike --------------------------------------


def settings_of(stage: str, system: str) -> list[dict]:
    """What a tuning stage trains of a system; nothing where there is no choice."""
    if stage in OWN_SETTINGS:
        return OWN_SETTINGS[stage].get(system, [])
    settings = SYSTEMS[system][1]
    return settings if len(settings) > 1 else []


def trained_by(out: Path, stage: str, system: str) -> list[tuple[dict, Path]]:
    """The settings of a tuning stage, each with the folder of its run."""
    return [
        (setting, out / stage / f"{system}_{number}")
        for number, setting in enumerate(settings_of(stage, system))
    ]


def candidates(out: Path, stage: str, system: str) -> list[tuple[dict, Path]]:
    """What a tuning chooses from; the second one has the first one's as well."""
    earlier = trained_by(out, "tune", system) if stage == "second_tune" else []
    return earlier + trained_by(out, stage, system)


def tuning(out: Path, stage: str, base: list[str], systems: Iterable[str]) -> Runs:
    """Each setting of each system once, with a seed of its own."""
    return {
        (system, number): (
            [*base, f"--seed={TUNING_SEED}", *options(system, setting)],
            folder,
        )
        for system in systems
        for number, (setting, folder) in enumerate(trained_by(out, stage, system))
    }


def criterion(results: dict) -> float:
    """The mean TAR@1e-2 of a tuning run's lists, cosine."""
    return float(np.mean([value(results, trials, "TAR@FAR=0.01") for trials in results["lists"]]))


def chosen(out: Path, stage: str, system: str) -> dict | None:
    """The best of a system's settings; None while one of them is not finished."""
    tried = candidates(out, stage, system)
    if not tried:
        return SYSTEMS[system][1][0]
    found = [results for _, folder in tried if (results := results_of(folder)) is not None]
    if len(found) < len(tried):
        return None
    return tried[int(np.argmax([criterion(results) for results in found]))][0]


def tuned(out: Path, stage: str, systems: Iterable[str]) -> dict[str, list[str]]:
    """The options of the systems whose setting is known."""
    found = {system: chosen(out, stage, system) for system in systems}
    for system in (system for system, setting in found.items() if setting is None):
        print(f"{system}: its {stage} is not finished, so it is left out")
    return {
        system: options(system, setting) for system, setting in found.items() if setting is not None
    }


def winners(out: Path, stage: str, systems: Iterable[str]) -> dict[str, list[str]]:
    """The same of those systems that a stage with settings of its own tunes."""
    return tuned(out, stage, [one for one in systems if one in OWN_SETTINGS[stage]])


def over_seeds(
    folder: Path, base: list[str], systems: dict[str, list[str]], seeds: Iterable[int] = SEEDS
) -> Runs:
    """Each system with each seed; the seeds are the outer loop."""
    runs = {}
    for seed, (system, given) in itertools.product(seeds, systems.items()):
        name = system.replace(", ", "_").replace(" ", "_")
        runs[system, seed] = ([*base, f"--seed={seed}", *given], folder / f"{name}_{seed}")
    return runs


# -- speech -------------------------------------------------------------------

SMALL = ["--n_mels=40", "--embedding_dim=128", "--sentence_len=1.5", "--number_of_epochs=12"]
LONG = ["--prototype_std=null"]  # SpeechBrain's, length 0.65 here
SHORT = ["--prototype_std=0.01"]  # length 0.11
SMALL += ["--num_valid_speakers=0", *LONG]
ECAPA = ["--channels=64", "--attention_channels=32"]
RESNET = ["--model=resnet34", "--width=8"]
PLAIN, NORMALISED = ["--embedding_norm=False"], ["--embedding_norm=True"]
RISING = "margin from 0"  # over the first epochs

# Numbers of classes, steps, and the (alpha, r) with r = (alpha - 1) scale; at alpha 1 CosFace
COUNTS, STEPS, PAPERS_RATE = (30, 100, 300, 438), 800, 5
CLASS_POINTS = [(alpha, PAPERS_RATE) for alpha in (1, 1.25, 1.5, 1.75, 2)]
THIRD_CLASS_POINTS = [(1, 5), (1.25, 2.5), (1.25, 5), (1.5, 5), (2, 5)]


def utterances(data: Path, speaker: str) -> list[str]:
    folder = data / "voices" / "wav"
    return sorted(str(file.relative_to(folder)) for file in (folder / speaker).rglob("*.flac"))


def held_out(data: Path, seed: int, without: Iterable[str] = ()) -> dict[str, list[str]]:
    """60 of the training speakers, 43 of Common Voice with four utterances or more, 17 of gsc."""
    rng, barred = random.Random(seed), set(without)
    found = {}
    for corpus, prefix, count in (("cv", "cv", 43), ("gsc", "gs", 17)):
        able = [
            speaker
            for speaker in words(data / "voices" / "train_speakers.txt")
            if speaker.startswith(prefix)
            and speaker not in barred
            and len(utterances(data, speaker)) >= (4 if corpus == "cv" else 2)
        ]
        found[corpus] = sorted(rng.sample(able, count))
    return found


def all_pairs(names: Iterable[str]) -> str:
    """Every pair of recordings or images as lines ``label enrol test``."""
    pairs = itertools.combinations(names, 2)
    return "".join(f"{int(a.split('/')[0] == b.split('/')[0])} {a} {b}\n" for a, b in pairs)


def write_speech_lists(data: Path, out: Path) -> None:
    """Of the tuning, of the further looks, and nested subsets; the same at every start."""
    everyone = words(data / "voices/train_speakers.txt")
    both = everyone + words(data / "speech/train_speakers.txt")
    first = held_out(data, seed=0)
    aside = {speaker for speakers in first.values() for speaker in speakers}
    second = held_out(data, seed=1, without=aside)
    aside |= {speaker for speakers in second.values() for speaker in speakers}
    third = held_out(data, seed=2, without=aside)
    write_text(out / "lists/train.txt", "\n".join(both) + "\n")
    for name, parts in (("tune", first), ("second", second), ("third", third)):
        away = {speaker for speakers in parts.values() for speaker in speakers}
        rest = "\n".join(speaker for speaker in both if speaker not in away)
        write_text(out / f"lists/{name}_train.txt", rest + "\n")
        for corpus, speakers in parts.items():
            names = (name for speaker in speakers for name in utterances(data, speaker))
            write_text(out / f"lists/{name}_{corpus}.txt", all_pairs(names))
    shuffled = random.Random(0).sample(everyone, len(everyone))
    for count in COUNTS:
        write_text(out / f"lists/train_{count}.txt", "\n".join(shuffled[:count]) + "\n")


def speech_options(
    data: Path, train: Path, *trials: Path, model: Sequence[str] = ECAPA
) -> list[str]:
    folders = f"--data_folder=[{data / 'voices'}, {data / 'speech'}]"
    files = ", ".join(map(str, trials))
    return [*model, *SMALL, folders, f"--verification_file=[{files}]", f"--train_speakers={train}"]


def test_lists(data: Path) -> list[Path]:
    return [data / "voices/trials_cv.txt", data / "voices/trials_gsc.txt"]


def three_lists(data: Path, out: Path, model: Sequence[str] = ECAPA) -> list[str]:
    lists = [*test_lists(data), data / "speech/trials_test.txt"]
    return speech_options(data, out / "lists/train.txt", *lists, model=model)


def people_held_out(data: Path, out: Path, name: str, model: Sequence[str] = ECAPA) -> list[str]:
    """Trained without 60 of the training speakers and tested on all pairs of them, cosine alone."""
    lists = out / "lists"
    train, *trials = (lists / f"{name}_{part}.txt" for part in ("train", "cv", "gsc"))
    return [*speech_options(data, train, *trials, model=model), "--cohort_utterances=0"]


def tune(data: Path, out: Path, systems: list[str]) -> Runs:
    return tuning(out, "tune", people_held_out(data, out, "tune"), systems)


def second_tune(data: Path, out: Path, systems: list[str]) -> Runs:
    return tuning(out, "second_tune", people_held_out(data, out, "tune"), systems)


def speech(data: Path, out: Path, systems: list[str]) -> Runs:
    return over_seeds(out / "speech", three_lists(data, out), tuned(out, "tune", systems))


def others(data: Path, out: Path, systems: list[str]) -> Runs:
    """All losses side by side, three seeds; with those of `speech`, for pairs of one machine."""
    found = tuned(out, "tune", systems)
    return over_seeds(out / "others", three_lists(data, out), found, range(3))


def resnet(data: Path, out: Path, systems: list[str]) -> Runs:
    """Another encoder with the settings that the first one's third tuning chose."""
    found = winners(out, "third_tune", systems)
    return over_seeds(out / "resnet", [*three_lists(data, out, RESNET), *SHORT, *PLAIN], found)


def resnet_norm(data: Path, out: Path, systems: list[str]) -> Runs:
    """The same with a batch normalisation of the embedding, on the speakers of the third test."""
    base = normalised_resnet(data, out, "third")
    return over_seeds(out / "resnet_norm", base, winners(out, "third_tune", systems))


def normalised_resnet(data: Path, out: Path, name: str) -> list[str]:
    return [*people_held_out(data, out, name, RESNET), *SHORT, *NORMALISED]


def resnet_tune(data: Path, out: Path, systems: list[str]) -> Runs:
    """The settings of that encoder's own."""
    return tuning(out, "resnet_tune", normalised_resnet(data, out, "tune"), systems)


def resnet_own(data: Path, out: Path, systems: list[str]) -> Runs:
    base, found = normalised_resnet(data, out, "third"), winners(out, "resnet_tune", systems)
    return over_seeds(out / "resnet_own", base, found, range(3))


def class_point(alpha: float, rate: float) -> str:
    return f"{alpha:g}" if rate == PAPERS_RATE else f"{alpha:g}, r {rate:g}"


def by_classes(data: Path, out: Path, base: list[str], points: Sequence, seeds: int) -> Runs:
    """The same number of steps for each number of speakers, into the folder `out`."""
    runs = {}
    for seed, count, (alpha, rate) in itertools.product(range(seeds), COUNTS, points):
        train = out.parent / f"lists/train_{count}.txt"
        size = sum(len(utterances(data, speaker)) for speaker in words(train))
        epochs = round(STEPS / max(size // 64, 1))
        setting = {"scale": 20 if alpha == 1 else rate / (alpha - 1), "margin": 0.2}
        loss = ["--loss=cosface"] if alpha == 1 else ["--loss=qmargin", f"--alpha={alpha}"]
        loss += [f"--{key}={value:.4g}" for key, value in setting.items()]
        given = [*speech_options(data, train, *test_lists(data)), f"--number_of_epochs={epochs}"]
        given += [f"--warmup_epochs={max(round(0.15 * epochs), 1)}", "--cohort_utterances=0"]
        point = class_point(alpha, rate)
        folder = out / f"{count}_{point.replace(', r ', '_r')}_{seed}"
        runs[count, point, seed] = ([*given, *base, f"--seed={seed}", *loss], folder)
    return runs


def classes(data: Path, out: Path, _: list[str]) -> Runs:
    return by_classes(data, out / "classes", [], CLASS_POINTS, seeds=2)


def third_classes(data: Path, out: Path, _: list[str]) -> Runs:
    return by_classes(data, out / "third_classes", SHORT, THIRD_CLASS_POINTS, seeds=1)


def finetune(data: Path, out: Path, _: list[str]) -> Runs:
    """Five epochs more of one loss from the other's encoder, and from its own."""
    found = tuned(out, "tune", ["arcface", PRIMARY])
    base = [*three_lists(data, out), "--number_of_epochs=5", "--warmup_epochs=1", "--lr=0.01"]
    runs = {}
    for seed, first, then in itertools.product(range(3), found, found):
        start = out / f"speech/{first}_{seed}"
        if not (start / "results.json").is_file():
            continue
        given = [f"--pretrained={start}", "--pretrained_classes=keep", f"--seed={seed}"]
        folder = out / f"finetune/{first}_{then}_{seed}"
        runs[f"{first}, then {then}", seed] = ([*base, *given, *found[then]], folder)
    return runs


def schedules(data: Path, out: Path, _: list[str]) -> Runs:
    """What moves during training: a rising margin, alpha from above or below; and a wide margin.

    The rising margin also with the baselines, which may gain from it as well.
    """
    found = tuned(out, "tune", ["arcface", "cosface", PRIMARY])
    setting = chosen(out, "tune", PRIMARY)
    if setting is None:
        return {}
    alpha = setting["alpha"]
    below = round(1 + (alpha - 1) / 2, 4)
    wide = margin_for(alpha, setting["scale"], 0.9)
    rising = ["--margin_from_epoch=1", "--margin_until_epoch=8"]
    wider = options(PRIMARY, setting | {"margin": round(wide, 4)})
    ways = {name: [*given, *rising] for name, given in found.items()}
    ways = {f"{name}, {RISING}": given for name, given in ways.items()}
    ways |= {
        "qmargin, alpha from 2": options(PRIMARY, setting | FALLING_ALPHA),
        "qmargin, hard margin 0.9": wider,
        f"qmargin, alpha from {below:g}": options(
            PRIMARY, setting | RISING_ALPHA | {"alpha_initial": below}
        ),
    }
    return over_seeds(out / "schedules", three_lists(data, out), ways, range(3))


def second(data: Path, out: Path, systems: list[str]) -> Runs:
    """The same comparison on speakers who have tuned nothing and were in no test list."""
    base = people_held_out(data, out, "second")
    return over_seeds(out / "second", base, winners(out, "second_tune", systems))


def second_long(data: Path, out: Path, systems: list[str]) -> Runs:
    """30 epochs instead of 12; an alpha that changes is its own after 20 instead of 8."""
    longer = ["--number_of_epochs=30", "--alpha_until_epoch=20"]
    found = winners(out, "second_tune", systems)
    found = {name: [*given, *longer] for name, given in found.items()}
    base = people_held_out(data, out, "second")
    return over_seeds(out / "second_long", base, found, range(3))


def third_tune(data: Path, out: Path, systems: list[str]) -> Runs:
    return tuning(out, "third_tune", [*people_held_out(data, out, "tune"), *SHORT], systems)


def third(data: Path, out: Path, systems: list[str]) -> Runs:
    """The same comparison with prototypes that start short, on speakers who were in no list yet."""
    tested = [*THIRD_SETTINGS, "auto", "published"]
    found = tuned(out, "third_tune", [one for one in systems if one in tested])
    base = [*people_held_out(data, out, "third"), *SHORT]
    return over_seeds(out / "third", base, found)


def third_others_tune(data: Path, out: Path, systems: list[str]) -> Runs:
    base = [*people_held_out(data, out, "tune"), *SHORT]
    return tuning(out, "third_others_tune", base, systems)


def third_others(data: Path, out: Path, systems: list[str]) -> Runs:
    """Other losses beside the runs of the third test; Q-Margin's kin at its setting."""
    found = {}
    for stage in ("third_tune", "third_others_tune"):
        found |= winners(out, stage, systems)
    if (setting := chosen(out, "third_tune", PRIMARY)) is not None:
        kin = [one for one in systems if one in ("qmargin_norm", "a3m")]
        found |= {system: options(system, setting) for system in kin}
    base = [*people_held_out(data, out, "third"), *SHORT]
    return over_seeds(out / "third", base, found, range(3))


def third_alpha(data: Path, out: Path, systems: list[str]) -> Runs:
    """An alpha that moves over the first epochs, beside the runs of the third test."""
    setting = chosen(out, "third_tune", PRIMARY)
    if setting is None or PRIMARY not in systems:
        return {}
    ways = {
        PRIMARY: setting,
        f"{PRIMARY}, alpha from 1.05": setting | RISING_ALPHA,
        f"{PRIMARY}, alpha from 2": setting | FALLING_ALPHA,
    }
    found = {name: options(PRIMARY, way) for name, way in ways.items()}
    base = [*people_held_out(data, out, "third"), *SHORT]
    return over_seeds(out / "third", base, found, range(3))


# -- faces --------------------------------------------------------------------

FACES = ["--number_of_epochs=15", "--batch_size=64", "--lr_reference_batch=64"]
FACES += ["--image_size=64", "--warmup_epochs=2"]
FACE_MODELS = {"iresnet": ["--depth=18", "--width=16"], "mobilefacenet": ["--model=mobilefacenet"]}
FACE_SYSTEMS = ("arcface", "cosface", PRIMARY, "qmargin_prior", "adaface")
TAILS, MOST_IMAGES = (1, 2, 4), 20
TAILED = {  # networks, least numbers of images, and who is compared
    ("iresnet", 4): ("arcface", "cosface", PRIMARY, "qmargin_prior"),
    ("iresnet", 1): ("arcface", PRIMARY, "qmargin_prior"),
    ("iresnet", 2): ("arcface", PRIMARY),
    ("mobilefacenet", 4): ("arcface", "cosface", PRIMARY),
}


def images(out: Path, identity: str) -> list[str]:
    found = sorted((out / "lists/images" / identity).glob("*.jpg"))
    return [f"{identity}/{one.name}" for one in found]


def link_images(data: Path, out: Path) -> None:
    """LFW without what its errata call wrong or doubled."""
    wrong = set(words(data / "lfw/exclude.txt"))
    for image in (data / "lfw/images").glob("*/*.jpg"):
        link = out / "lists/images" / image.parent.name / image.name
        if f"{image.parent.name}/{image.name}" not in wrong and not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(image)


def write_face_lists(data: Path, out: Path) -> None:
    """All pairs of fold 8, and of 400 training identities that the tuning holds out."""
    link_images(data, out)
    # who is in the errata with every image is nobody to train on, which the recipe would refuse
    train = [one for one in words(data / "lfw/train_ids.txt") if images(out, one)]
    able = [one for one in train if len(images(out, one)) >= 2]
    aside = set(random.Random(0).sample(able, 400))
    parts = {"faces_test": words(data / "lfw/test_ids.txt"), "faces_tune": sorted(aside)}
    for name, identities in parts.items():
        names = (one for who in identities for one in images(out, who)[:MOST_IMAGES])
        write_text(out / f"lists/{name}.txt", all_pairs(names))
    write_text(out / "lists/faces_train.txt", "\n".join(train) + "\n")
    many = [one for one in able if len(images(out, one)) >= TAILS[-1]]
    write_text(out / "lists/third_faces_train.txt", "\n".join(many) + "\n")
    names = (one for who in sorted({*able} - {*many}) for one in images(out, who))
    write_text(out / "lists/third_faces_tune.txt", all_pairs(names))
    rest = "\n".join(one for one in train if one not in aside)
    write_text(out / "lists/faces_tune_train.txt", rest + "\n")


def face_options(out: Path, part: str, trials: str) -> list[str]:
    lists = out / "lists"
    people = [f"--data_folder={lists / 'images'}", f"--train_identities={lists / part}.txt"]
    return [*FACES, *people, f"--verification_file={lists / trials}.txt"]


def faces_tune(data: Path, out: Path, systems: list[str]) -> Runs:
    base = [*face_options(out, "faces_tune_train", "faces_tune"), *LONG]
    base += [*FACE_MODELS["iresnet"], "--min_images=1"]
    return tuning(out, "faces_tune", base, [one for one in systems if one in FACE_SYSTEMS])


def faces(data: Path, out: Path, systems: list[str]) -> Runs:
    base = [*face_options(out, "faces_train", "faces_test"), *LONG]
    found = tuned(out, "faces_tune", [one for one in systems if one in FACE_SYSTEMS])
    runs = {}
    for seed, tail, (model, own) in itertools.product(range(3), TAILS, FACE_MODELS.items()):
        for system, given in found.items():
            folder = out / f"faces/{model}_{tail}_{system}_{seed}"
            loss = [*given, f"--min_images={tail}", f"--seed={seed}"]
            runs[f"{model}, {tail}+ images", system, seed] = ([*base, *own, *loss], folder)
    return runs


def third_face_options(
    out: Path,
    trials: str,
    part: str = "third_faces_train",
    min_images: int = 1,
    model: str = "iresnet",
) -> list[str]:
    base = face_options(out, part, trials)
    return [*base, *FACE_MODELS[model], f"--min_images={min_images}", *SHORT]


def third_faces_tune(data: Path, out: Path, systems: list[str]) -> Runs:
    """With prototypes that start short; of the identities with many images nobody is held out."""
    return tuning(out, "third_faces_tune", third_face_options(out, "third_faces_tune"), systems)


def third_faces(data: Path, out: Path, systems: list[str]) -> Runs:
    found = winners(out, "third_faces_tune", systems)
    runs = over_seeds(out / "third_faces", third_face_options(out, "faces_test"), found)
    return {("iresnet, 4+ images, short", *key): run for key, run in runs.items()}


def third_faces_tail(data: Path, out: Path, systems: list[str]) -> Runs:
    """A class prior with and without the long tail, and another network; runs of the test serve.

    All at the settings of the test; the prior at Q-Margin's.
    """
    stage, runs = "third_faces_tune", {}
    found = winners(out, stage, systems)
    if "qmargin_prior" in systems and (setting := chosen(out, stage, PRIMARY)) is not None:
        found["qmargin_prior"] = options("qmargin_prior", setting)
    for (model, tail), names in TAILED.items():
        part = ("third_faces_train", 1) if tail == TAILS[-1] else ("faces_train", tail)
        base = third_face_options(out, "faces_test", *part, model)
        for system in (one for one in names if one in found):
            tested = (model, tail) == ("iresnet", 4) and system in OWN_SETTINGS[stage]
            name = "third_faces" if tested else f"third_faces_tail/{model}_{tail}"
            some = over_seeds(out / name, base, {system: found[system]}, range(3))
            runs |= {(f"{model}, {tail}+ images, tail", *key): run for key, run in some.items()}
    return runs


class Stage(NamedTuple):
    """Some runs of one recipe."""

    recipe: str
    runs: Callable[[Path, Path, list[str]], Runs]


STAGES = {
    "tune": Stage("speech", tune),
    "speech": Stage("speech", speech),
    "others": Stage("speech", others),
    "classes": Stage("speech", classes),
    "resnet": Stage("speech", resnet),
    "resnet_norm": Stage("speech", resnet_norm),
    "resnet_tune": Stage("speech", resnet_tune),
    "resnet_own": Stage("speech", resnet_own),
    "finetune": Stage("speech", finetune),
    "schedules": Stage("speech", schedules),
    "second_tune": Stage("speech", second_tune),
    "second": Stage("speech", second),
    "second_long": Stage("speech", second_long),
    "third_tune": Stage("speech", third_tune),
    "third": Stage("speech", third),
    "third_classes": Stage("speech", third_classes),
    "third_others_tune": Stage("speech", third_others_tune),
    "third_others": Stage("speech", third_others),
    "third_alpha": Stage("speech", third_alpha),
    "faces_tune": Stage("face", faces_tune),
    "faces": Stage("face", faces),
    "third_faces_tune": Stage("face", third_faces_tune),
    "third_faces": Stage("face", third_faces),
    "third_faces_tail": Stage("face", third_faces_tail),
}


def finished(runs: Runs) -> dict[tuple, Path]:
    return {key: folder for key, (_, folder) in runs.items() if (folder / "results.json").is_file()}
