"""Subcommands that decide: threshold, enrol, verify, identify, people, serve."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
from collections.abc import Collection, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from speechbrain_qmargin.cli import GOES_ON
from speechbrain_qmargin.cli.inputs import add_encoder, add_overwrite, find_inputs, share
from speechbrain_qmargin.scoring.normalisation import PER_RECORDING

__all__ = ["configure"]

THRESHOLD = """
    qmargin threshold encoder people --far 0.01 --enrol_with 3

ENCODER is a run's output folder, an inference folder or a published model. SOURCE is a folder of
<person>/<file> or <person>/<session>/<file>, directly or below its wav/ or images/; a list of
`person/... path` lines; for faces also a .rec file or a folder of shards; or a file that --save
wrote. The threshold is chosen on half of the people and its error rates are measured on the other
half, so nobody may appear under two names. With --cohort, a folder of other people or their
embeddings (`qmargin extract`), scores are normalised (AS-norm).

The threshold is written beside the encoder, with its error rates and their intervals, the
calibration, the cohort and the score histogram, all bound to this encoder. People whom the encoder
was trained on (by the names of its classes) are left out.
"""
ENROL = """
    qmargin enrol encoder "Ann Example" ann_1.wav ann_2.wav ann_3.wav

Several recordings make a better template than one. If one of them is too short, too quiet, clipped
or no speech (images: too small, blurred, badly exposed, no photograph), all are refused. Only an
embedding of each is stored: no recording and no file name.
"""
VERIFY = """
    qmargin verify encoder "Ann Example" claim.wav

Run `qmargin threshold` for this encoder first. The exit status is 0 if every file is accepted, 3 if
one is rejected, and 1 if one cannot be decided on.
"""
IDENTIFY = """
    qmargin identify encoder somebody.wav

The more people are enrolled, the likelier a stranger matches one of them: an upper bound of that
probability is printed. The exit status is 0 if somebody is found and 3 if nobody is.
"""
PEOPLE = """
    qmargin people list encoder
    qmargin people delete encoder "Ann Example"

WHAT is a file of enrolments, or the encoder that it belongs to. delete leaves nothing of the person
in the file; its copies and backups are yours to erase.
"""
SERVE = """
    qmargin serve encoder

Needs `pip install -e '.[serve]'`. The service accepts connections from this machine only, unless
--host says otherwise. Whoever has the token can do everything; without --token_file a new token is
made and printed with the page's address.
"""


def _say(args: argparse.Namespace, content: Any, text: str) -> None:
    from speechbrain_qmargin.files import json_values

    if args.json:
        text = json.dumps(json_values(content), ensure_ascii=False, allow_nan=False)
    print(text.encode(errors="backslashreplace").decode())  # a path may be no text


def _verifier(args: argparse.Namespace):
    from speechbrain_qmargin.verify.verifier import Verifier

    return Verifier.load(
        args.encoder,
        args.people,
        device=args.device,
        trust=args.trust,
        checked=not args.unchecked,
    )


# ---------------------------------------------------------------- threshold


def _threshold(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from speechbrain_qmargin.embeddings import Embeddings, load_embeddings, save_embeddings
    from speechbrain_qmargin.export.inference import trained_on
    from speechbrain_qmargin.files import refuse_overwriting
    from speechbrain_qmargin.published import split_format
    from speechbrain_qmargin.verify import threshold as module
    from speechbrain_qmargin.verify.verifier import load_reader, place_of

    if args.enrol_with < 1 or args.max_per_person <= args.enrol_with:  # before anything is embedded
        raise ValueError("--enrol_with is 1 or more, --max_per_person more than that")
    if args.save:
        refuse_overwriting([args.save], [args.source, args.cohort], args.overwrite)
        if Path(args.save).suffix != ".npz":
            raise ValueError(f"--save {args.save}: embeddings are written as .npz")
    place = place_of(args.encoder)
    reader = load_reader(args.encoder, args.device, args.trust, checked=not args.unchecked)
    folders = []
    trained = trained_on(split_format(args.encoder)[1])

    def embedded(source: Path, part: str) -> Embeddings:
        known = trained if part == "people" else frozenset()  # a cohort may be of them
        if source.suffix == ".npz":
            found = load_embeddings(source)
            if found.encoder != reader.digest:
                raise ValueError(f"{source}: embeddings of another encoder, or of one not known")
            kept = _without(found, known, source)
            return Embeddings(kept, found.matrix[found.rows(kept)], found.source, found.encoder)
        inputs = find_inputs(source, speech=reader.modality == "speech", quiet=args.quiet)
        print(f"{source}: files are named {inputs.named}")
        kept = {name: inputs.items[name] for name in _without(inputs.items, known, source)}
        folders.append(place.with_name(f".{place.name}.{part}.parts"))
        with tqdm(total=len(kept), desc=part, unit="file", disable=args.quiet) as bar:
            found, faults = module.embed_files(
                reader, replace(inputs, items=kept), folders[-1], bar.update
            )
        for name, fault in list(faults.items())[:3]:
            print(f"{part}: left out: {fault if name in fault else f'{name}: {fault}'}")
        if len(faults) > 3:
            print(f"{part}: {len(faults)} of {len(found) + len(faults)} files are left out")
        return found

    cohort = None
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        people = embedded(Path(args.source), "people")
        if args.save:
            save_embeddings(args.save, people, reader.digest)
        if args.cohort:
            others = embedded(Path(args.cohort), "cohort")
            cohort = module.cohort_of(others, args.score_norm, args.top_n)
    found = module.measure_threshold(
        people,
        reader.digest,
        args.far,
        cohort=cohort,
        enrol_with=args.enrol_with,
        max_per_person=args.max_per_person,
        source=Path(args.source).name,
    )
    found.system.install(place)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    point = found.system.point
    chosen, measured = found.people
    others = f"chosen on {chosen} people, measured on {measured} others"
    lines = [
        f"threshold {point.threshold:.4f} for {point.kind} scores, EER {100 * found.eer:.2f} %",
        "chosen and measured on the same people" if point.optimistic else others,
        point.promise(),
        *found.notes,
        f"{place}: operating_point.json and what belongs to it",
    ]
    content = asdict(point) | {"eer": found.eer, "people": found.people, "notes": found.notes}
    _say(args, content, "\n".join(lines))


def _without(ids: Iterable[str], trained: Collection[str], source: Path) -> list[str]:
    """The ids but those of people whom the encoder was trained on: its errors on them are fewer."""
    from speechbrain_qmargin.tables import some
    from speechbrain_qmargin.trials import speaker_in

    person = {name: speaker_in(name) for name in ids if "/" in name}
    everybody = set(person.values())
    known = everybody & set(trained)
    if known and len(known) == len(everybody):
        raise ValueError(
            f"{source}: the encoder was trained on all {len(known)} people; a threshold wants "
            "others"
        )
    if known:
        print(
            f"people: {len(known)} of the {len(everybody)} are left out, on whom the encoder was "
            f"trained: {some(sorted(known))}"
        )
    return [name for name in ids if person.get(name) not in known]


# ---------------------------------------------------------------- people


def _enrol(args: argparse.Namespace) -> None:
    verifier = _verifier(args)
    count, added = verifier.enrol(args.name, args.files, replace=args.replace)
    content = {
        "name": args.name,
        "recordings": count,
        "added": [asdict(one) for one in added],
        "file": str(verifier.people.path),
    }
    _say(args, content, f"{args.name}: {count} enrolled, in {verifier.people.path}")


def _word(kind: str, score: float, llr: float | None) -> str:
    ratio = "" if llr is None else f", log-likelihood ratio {llr:+.2f}"
    return f"{kind} {score:.4f}{ratio}"


def _verify(args: argparse.Namespace) -> int:
    verifier = _verifier(args)
    results = verifier.verify_many([(args.name, file) for file in args.files])
    if len(results) == 1 and isinstance(results[0], Exception):
        raise results[0]
    content, lines = [], []
    for file, found in zip(args.files, results, strict=True):
        if isinstance(found, Exception):
            content.append({"file": file, "error": str(found)})
            lines.append(f"no decision: {found}")
            continue
        content.append({"file": file} | asdict(found))
        word = "accept" if found.accept else "reject"
        lines.append(
            f"{word} {file} as {args.name}: {_word(found.kind, found.score, found.llr)}, threshold "
            f"{found.threshold:.4f}"
        )
        lines += [f"  {note}" for note in found.notes]
    _say(args, content, "\n".join([*lines, f"the threshold {verifier.system.point.promise()}"]))
    decided = [one for one in results if not isinstance(one, Exception)]
    return 1 if len(decided) < len(results) else 0 if all(one.accept for one in decided) else 3


def _identify(args: argparse.Namespace) -> int:
    verifier = _verifier(args)
    found = verifier.identify(args.file, args.max_candidates)
    lines = [
        f"{found.name or 'nobody'} of {found.searched} people, threshold {found.threshold:.4f}"
    ]
    lines += [f"  {one.name}: {_word(found.kind, one.score, one.llr)}" for one in found.candidates]
    lines.append(
        f"a stranger finds somebody among {found.searched} with a chance of at most "
        f"{100 * found.false_alarm:.3g} %"
    )
    if found.left_out:
        lines.append(f"{found.left_out} people are enrolled with another encoder: left out")
    _say(args, asdict(found), "\n".join(lines))
    return 0 if found.name else 3


def _people(args: argparse.Namespace) -> None:
    from speechbrain_qmargin.files import refuse_overwriting, write_text
    from speechbrain_qmargin.published import split_format
    from speechbrain_qmargin.verify.people import People, is_enrolments
    from speechbrain_qmargin.verify.verifier import people_file

    if (args.action == "list") != (args.name is None):
        fault = "takes no NAME" if args.name else "wants the NAME of somebody"
        raise ValueError(f"people {args.action} {fault}")
    path = Path(args.place)
    if not is_enrolments(path):
        path = people_file(args.place)
        if not path.is_file() and not split_format(args.place)[1].exists():
            raise FileNotFoundError(f"{args.place}: no such encoder or file of enrolments")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: nobody is enrolled there")
    people = People(path)
    if args.action == "list":
        found = people.list()
        lines = [f"{one.name}\t{one.recordings}\t{one.encoder[:16]}\t{one.added}" for one in found]
        text = "\n".join(lines) or f"{path}: nobody is enrolled"
        _say(args, [asdict(one) for one in found], text)
    elif args.action == "export":
        refuse_overwriting([args.output], [path], args.overwrite)
        text = json.dumps(people.export(args.name), ensure_ascii=False, indent=2)
        if args.output:
            write_text(args.output, text + "\n", private=True)  # it has the templates
        else:
            print(text)
    else:
        count = people.delete(args.name)
        content = {"name": args.name, "recordings": count}
        _say(args, content, f"{args.name}: {count} recordings erased from {path}")


# ---------------------------------------------------------------- service


def _serve(args: argparse.Namespace) -> None:
    from speechbrain_qmargin.extras import require

    require("fastapi", "python_multipart", "uvicorn", why="the service", extra="serve")
    from speechbrain_qmargin.verify.service import serve

    serve(
        _verifier(args),
        host=args.host,
        port=args.port,
        token_file=args.token_file,
        max_bytes=round(args.max_mb * 1e6),
        max_seconds=args.max_seconds,
        at_once=args.at_once,
    )


def configure(add) -> None:
    """The subcommands that decide; see :mod:`speechbrain_qmargin.cli`."""

    def with_encoder(name: str, run, about: str) -> argparse.ArgumentParser:
        sub = add(name, run, about)
        add_encoder(sub)
        sub.add_argument("--device", default="cpu", help="where the encoder runs")
        sub.add_argument(
            "--unchecked", action="store_true", help="take recordings or images of any quality"
        )
        return sub

    def prints(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--json", action="store_true", help="print JSON")

    def enrolled(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--people",
            metavar="FILE",
            help="file of enrolments (default: one beside the encoder)",
        )

    sub = with_encoder("threshold", _threshold, THRESHOLD)
    sub.set_defaults(again=GOES_ON)
    prints(sub)
    sub.add_argument("source", metavar="SOURCE", help="a folder of your people, a list, or .npz")
    sub.add_argument("--save", metavar="FILE", help="keep the embeddings of SOURCE (.npz), to try "
                     "another --far, --enrol_with or --cohort in a second")  # fmt: skip
    add_overwrite(sub)
    sub.add_argument("--far", type=share, default=0.01, help="false-accept rate to aim for")
    sub.add_argument("--cohort", metavar="EMBEDDINGS", help="normalise scores against these, of "
                     "other people; or a folder of their files")  # fmt: skip
    sub.add_argument("--score_norm", default="as", choices=PER_RECORDING, help="kind of "
                     "normalisation, with --cohort")  # fmt: skip
    sub.add_argument("--top_n", type=int, help="nearest people of the cohort (default: a third of "
                     "them, at most 300)")  # fmt: skip
    sub.add_argument("--enrol_with", type=int, default=1, help="recordings in a template")
    sub.add_argument("--max_per_person", type=int, default=10, help="recordings or images taken of "
                     "a person, at most")  # fmt: skip

    sub = with_encoder("enrol", _enrol, ENROL)
    prints(sub)
    enrolled(sub)
    sub.add_argument("name", metavar="NAME", help="of the person")
    sub.add_argument("files", metavar="FILE", nargs="+", help="recordings or aligned images")
    sub.add_argument("--replace", action="store_true", help="replace the person's enrolment "
                     "instead of adding to it")  # fmt: skip

    sub = with_encoder("verify", _verify, VERIFY)
    prints(sub)
    enrolled(sub)
    sub.add_argument("name", metavar="NAME", help="of the enrolled person")
    sub.add_argument("files", metavar="FILE", nargs="+", help="recordings or aligned images")

    sub = with_encoder("identify", _identify, IDENTIFY)
    prints(sub)
    enrolled(sub)
    sub.add_argument("file", metavar="FILE", help="a recording or an aligned image")
    sub.add_argument("--max_candidates", type=int, default=5, help="candidates to print, at most")

    sub = add("people", _people, PEOPLE)
    prints(sub)
    sub.add_argument("action", choices=("list", "export", "delete"), help="what to do")
    sub.add_argument("place", metavar="WHAT", help="file of enrolments, or ENCODER")
    sub.add_argument("name", metavar="NAME", nargs="?", help="whom to export or delete")
    sub.add_argument("--output", help="file to export to (default: standard output)")
    add_overwrite(sub)

    sub = with_encoder("serve", _serve, SERVE)
    enrolled(sub)
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on")
    sub.add_argument("--port", type=int, default=8000, help="port to listen on")
    sub.add_argument("--token_file", metavar="FILE", help="file whose first line is the token")
    sub.add_argument("--max_mb", type=float, default=20.0, help="largest content of a request, MB")
    sub.add_argument("--max_seconds", type=float, default=60.0, help="seconds in which a request "
                     "must arrive")  # fmt: skip
    sub.add_argument("--at_once", type=int, default=8, help="requests with content handled at a "
                     "time; further ones get status 503")  # fmt: skip
