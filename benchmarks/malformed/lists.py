"""Trial lists and files of scores."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from malformed.kinds import Kind, NotRight, content, error, listed, value
from speechbrain_qmargin.files import load_record
from speechbrain_qmargin.scoring.report import evaluate
from speechbrain_qmargin.scoring.score_files import read_score_file
from speechbrain_qmargin.tables import read_models
from speechbrain_qmargin.trials import read_trials

IDS = [f"id1000{s}/v{k}/{n}" for s in range(4) for k in range(2) for n in range(2)]
PAIRS = [(p, q, p[:7] == q[:7]) for row, p in enumerate(IDS) for q in IDS[row + 1 :]]


def rows(form: str, head: str = "", **words: str) -> str:
    yes, no = words.get("yes", "target"), words.get("no", "nontarget")
    return head + "".join(
        form.format(p=p, q=q, n=int(same), w=yes if same else no, m=p.replace("/", "-"),
                    o=q.replace("/", "-"), s=score) + "\n"
        for (p, q, same), score in zip(PAIRS, SCORES, strict=True)
    )  # fmt: skip


SCORES = (np.random.default_rng(1).normal(size=len(PAIRS)) + [2 * y for *_, y in PAIRS]).tolist()


def lists(folder: Path) -> Iterator[Kind]:
    voxceleb = rows("{n} {p} {q}")
    forms = {
        "VoxCeleb": voxceleb,
        "Kaldi": rows("{p} {q} {w}"),
        "CN-Celeb": rows("{p} {q} {n}"),
        "VOiCES": rows("{p} {q} {w}", yes="tgt", no="imp"),
        "SRE": rows("{p}\t{q}\ta\t{w}", "modelid\tsegmentid\tside\ttargettype\n"),
        "CSV": rows("{p},{q},{n}", "enrol,test,label\n"),
        "CSV in another order": rows("{n},{q},{p}", "label,test,enrol\n"),
        "byte order mark": "\ufeff" + voxceleb,
        "UTF-16 with its mark": voxceleb.encode("utf-16"),
        "carriage returns": voxceleb.replace("\n", "\r\n"),
        "blank lines": voxceleb.replace("\n", "\n\n"),
    }

    def read(path: Path) -> list[str]:
        trials = read_trials(path)
        labels = trials.labelled().is_target
        return [f"{trials.pair(n)} {labels[n]:d}" for n in range(len(trials))]

    wanted = [f"{p} {q} {int(same)}" for p, q, same in PAIRS]
    for name, text in forms.items():
        path = content(folder / f"{name}.txt", text)
        yield value(f"list as {name}", lambda path=path: read(path), wanted)
    wrong: dict[str, bytes | str] = {
        "an empty list": "",
        "a header alone": "label enrol test\n",
        "a label of 2": "1 a b\n2 a c\n",
        "a row of two columns": "1 a b\n1 a\n",
        "no labels": "a b\nc d\n",
        "two columns of labels": "0 a 1\n1 b 0\n",
        "an empty id": "1\ta\t\n",
        "bytes that are not UTF-8": b"1 a \xff\n",
        "UTF-16 without its mark": voxceleb.encode("utf-16-le"),
        "four columns, no header": "a b x 1\n",
    }
    for name, data in wrong.items():
        path = content(folder / f"{name}.txt", data)
        yield error(name, lambda path=path: read(path), path.name)

    calls = "m\ts1\ta\ttarget\nm\ts2\tb\tnontarget\nm\ts2\ta\tnontarget\n"
    path = content(folder / "calls.tsv", "modelid\tsegmentid\tside\ttargettype\n" + calls)
    yield error("two sides of a call under one id", lambda p=path: read(p), "calls.tsv:4", "s2")
    path = content(folder / "forms.txt", "1 Jos\u00e9/1 Jose\u0301/2\n0 Jose\u0301/2 ann/1\n")
    yield value(
        "a name in two of Unicode's normal forms",
        lambda p=path: sorted(set(read_trials(p).speaker_names())),
        ["Jos\u00e9", "ann"],
    )

    def told(path: Path):
        found = read_trials(path).distinct.trials
        return [found.pair(n) for n in range(len(found))], found.speakers()

    both = content(folder / "both_orders.txt", rows("{n} {p} {q}\n{n} {q} {p}"))
    pairs = [f"{p} {q}" for p, q, _ in PAIRS]
    yield value("every pair in both orders", lambda: told(both)[0], pairs, says="the same pair as")
    self_ = content(folder / "self.txt", f"1 {IDS[0]} {IDS[0]}\n{voxceleb}")
    yield value("a recording against itself", lambda: told(self_)[0], pairs, says="with itself")
    against = {
        "contradiction, ids with slashes": ("1 a/1 a/2\n1 a/1 b/1\n", "a/1 b/1"),
        "contradiction, ids without": ("a b target\nb c target\nc a nontarget\n", "c a"),
        "one pair with both labels": ("1 a b\n0 b a\n1 c d\n", "b a"),
    }
    for name, (text, pair) in against.items():
        path = content(folder / f"{name}.txt", text)
        yield error(name, lambda path=path: told(path), path.name, pair)
    for name, text in {
        "a line a model": "m a/1 a/2\n",
        "a line a recording": "m a/1\nm a/2\n",
    }.items():
        path = content(folder / f"{name}.models", text)
        yield value(f"models, {name}", lambda path=path: read_models(path)["m"], ["a/1", "a/2"])
    twice = content(folder / "twice.models", "m a/1\nm a/1\n")
    yield error("a recording twice in a model", lambda: read_models(twice), "twice.models:2", "a/1")
    models = content(folder / "strange.txt", "m0 a/3 target\nm9 b/2 nontarget\n")
    unknown = read_trials(models)
    yield error("a model without recordings", lambda: unknown.with_models({"m0": ["a/1"]}), "m9")


def scores(folder: Path) -> Iterator[Kind]:
    listing = read_trials(content(folder / "trials.txt", rows("{n} {p}.wav {q}.wav")))
    head, bare = "enrolment\ttest\tscore\tlabel\n", "enrolment\ttest\tscore\na\tb\t1\n"
    forms = {
        "ours": rows("{p}.wav\t{q}.wav\t{s!r}\t{n}", head),
        "WeSpeaker": rows("{p}.wav {q}.wav {s!r} {w}"),
        "WeSpeaker with AS-norm, 8 columns": rows("{p}.wav {q}.wav {s!r} {w} 1 2 3 4"),
        "3D-Speaker": rows("{p} {q} {s!r}"),
        "SpeechBrain, 4 columns": rows("{p} {q} {n} {s!r}"),
        "label first, 4 columns": rows("{n} {p} {q} {s!r}"),
        "CSV": rows("{q},{p},{s!r}", "test,enrol,score\n"),
        "byte order mark": "\ufeff" + rows("{p} {q} {s!r}"),
    }
    for name, text in forms.items():
        path = content(folder / f"{name}.score", text)
        yield value(
            f"scores of {name}", lambda path=path: read_score_file(path, listing).scores, SCORES
        )
    wrong = {
        "NaN": ("a b 0.5\na c nan\n", ":2"),
        "infinity": ("a b inf\n", ":1"),
        "a word for a score": ("a b 0.5\na c much\n", ":2"),
        "two scores of a trial": ("a b 0.5\na b 0.6\n", ":2"),
        "label or score, 4 columns": ("a b 1 0\nc d 0 0\n", ":1"),
        "three numbers, 5 columns": ("a b 0.1 0.5 0.6\n", ":1"),
        "a list without scores": ("a b target\nc d nontarget\n", ":1"),
        "an empty file": ("", ""),
        "decimal commas": ("a b 0,5\na c 0,25\n", ":1"),
        "decimal commas between commas": ("a,b,0,5\na,c,0,25\n", ":1"),
        "an underscore in a number": ("a b 0.5\na c 1_0\n", ":2"),
        "a cell of 200,000 characters": (f'{{"a":"{"x" * 200_000}",1}}\n', ":1"),
        "a comment of 20,000 brackets": (
            f"# speechbrain_qmargin scores {'[' * 20_000}\n{bare}", ":1"),
        "a broken comment": (f"# speechbrain_qmargin scores {{\n{bare}", ":1"),
        "failures that are none": (
            f'# speechbrain_qmargin scores {{"lost": "7"}}\n{bare}', ":1"),
    }  # fmt: skip
    for name, (text, line) in wrong.items():
        path = content(folder / f"{name}.score", text)
        yield error(
            f"scores with {name}", lambda path=path: read_score_file(path), path.name + line
        )
    thrice = read_trials(content(folder / "thrice.txt", "1 a b\n1 b a\n1 a b\n0 a c\n"))
    yield value(
        "one score of a pair three times, a tie with another pair's",
        lambda: thrice.distinct.scores(np.full(4, 0.1)),
        [0.1, 0.1],
    )
    few = content(folder / "few.score", "x y 0.5\n")
    yield error(
        "no score of the list", lambda: read_score_file(few, listing), "few.score", "no score"
    )
    other = content(folder / "other.score", rows("{p}.wav {q}.wav {s} {w}", yes="imp", no="tgt"))
    yield error(
        "other labels than the list's", lambda: read_score_file(other, listing), "other.score"
    )

    def figures(path: Path) -> str:
        read = read_score_file(path)
        report = evaluate(read.scores, read.trials.labelled(), fars=(0.1,))
        if any(one.mark == "measured" for one in report.figures):
            raise NotRight(f"measured, of {report.num_speakers} speakers")
        return report.table()

    distances = content(
        folder / "distances.tsv", rows("{p}\t{q}\t-{s}\t{n}", head).replace("--", "")
    )
    yield listed("distances", lambda: figures(distances), "the scores seem inverted")
    draw, names = np.random.default_rng(2), [f"s{k}/{n}" for k in range(2) for n in range(30)]
    two = "".join(
        f"{p}\t{q}\t{draw.normal() + 1.4 * (p[:2] == q[:2])}\t{int(p[:2] == q[:2])}\n"
        for row, p in enumerate(names)
        for q in names[row + 1 :]
    )
    path = content(folder / "two_speakers.tsv", head + two)
    yield listed("two speakers: nothing is measured", lambda: figures(path), "unsupported")
    point = content(folder / "point.json", '{"format": "other"}')
    for name, text in {"another": '{"format": "x"}', "cut off": '{"form', "a list": "[]"}.items():
        content(point, text)
        record = error(
            f"threshold file, {name}", lambda: load_record(point, "threshold", dict), "point"
        )
        yield record
