"""Feed small malformed inputs to what would meet them, and say what happened.

    python benchmarks/attacks.py OUT

Every input is made here. What is right is one of three: an error (ValueError or OSError) whose
message has the file and the words given, the right value, or a list that names it while the rest
goes on. OUT gets the inputs, and ``attacks.json`` and ``attacks.md`` with a row for each kind.
docs/robustness.md has how many there are.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from malformed.audio import corpora, recordings
from malformed.embeddings import embeddings
from malformed.enrolments import enrolments
from malformed.faces import pickles, stored
from malformed.images import images
from malformed.kinds import Kind, NotRight, heard
from malformed.lists import lists, scores
from malformed.runs import checkpoints, runs

from speechbrain_qmargin.files import write_text

GROUPS: dict[str, Callable[[Path], Iterator[Kind]]] = {
    "recordings": recordings,
    "corpora": corpora,
    "images": images,
    "lists": lists,
    "scores": scores,
    "embeddings": embeddings,
    "enrolments": enrolments,
    "pickled verification sets": pickles,
    "stored faces": stored,
    "runs": runs,
    "checkpoints": checkpoints,
}


def attack(out: Path, groups: list[str]) -> list[dict]:
    """What every kind gave: group, kind, expected, happened, ok."""
    kept = os.environ.get("SPEECHBRAIN_QMARGIN_CACHE")
    os.environ["SPEECHBRAIN_QMARGIN_CACHE"] = str(out / "cache")
    results = []
    try:
        for group in groups:
            folder = out / group.replace(" ", "_")
            folder.mkdir(parents=True, exist_ok=True)
            for kind in GROUPS[group](folder):
                try:
                    with heard():
                        happened, ok = kind.feed(), True
                except NotRight as wrong:
                    happened, ok = str(wrong), False
                except Exception as raised:  # a traceback is what must not be
                    happened, ok = f"{type(raised).__name__}: {raised}", False
                happened = " ".join(
                    happened.replace(f"{folder}/", "").replace(f"{out}/", "").split()
                )
                happened = re.sub(r"CKPT\+\S+?(?=/|:| )", "CKPT", happened)
                results.append({"group": group, "kind": kind.name, "expected": kind.expected,
                                "happened": happened, "ok": ok})  # fmt: skip
    finally:
        if kept is None:
            del os.environ["SPEECHBRAIN_QMARGIN_CACHE"]
        else:
            os.environ["SPEECHBRAIN_QMARGIN_CACHE"] = kept
    return results


def table(results: list[dict]) -> str:
    """Markdown: a row a kind."""

    def cell(text: str) -> str:
        text = "".join(c if c.isprintable() else "?" for c in text)
        text = text.replace("`", "'").replace("|", "\\|")
        return f"`{text if len(text) <= 110 else text[:107] + '...'}`"

    lines = []
    for group in dict.fromkeys(one["group"] for one in results):
        lines += [f"### {group.capitalize()}", "", "| input | right is | what happened | |"]
        lines.append("|---|---|---|---|")
        for one in results:
            if one["group"] == group:
                ok = "ok" if one["ok"] else "**NOT OK**"
                name = one["kind"].replace("|", "\\|")
                happened = one["happened"] if one["happened"] == "right" else cell(one["happened"])
                lines.append(f"| {name} | {one['expected']} | {happened} | {ok} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--group", action="append", choices=GROUPS, help="this alone; repeatable")
    args = parser.parse_args()
    results = attack(args.out.resolve(), args.group or list(GROUPS))
    write_text(args.out / "attacks.json", json.dumps(results, indent=1) + "\n")
    write_text(args.out / "attacks.md", table(results))
    bad = [one for one in results if not one["ok"]]
    for one in bad:
        print(f"NOT OK: {one['group']}: {one['kind']}: {one['happened']}")
    print(f"{len(results)} kinds of input, {len(bad)} NOT OK; {args.out / 'attacks.md'}")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
