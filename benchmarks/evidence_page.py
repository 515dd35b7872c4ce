"""Put the evidence's tables into pages of docs/.

    python benchmarks/evidence_page.py OUT docs/comparison.md ... [--stage tune others ...]

OUT is where evidence.py wrote its tables. In a page, what stands between ``<!-- second -->`` and
``<!-- end -->`` becomes OUT/second.md up to its first heading, and between
``<!-- second: cv, cosine -->`` and ``<!-- end -->`` what is below that heading. With ``--stage``
the blocks of other stages stay as they are. A table that OUT does not have is an error, and no page
is written.
"""

import argparse
import re
from collections.abc import Collection
from pathlib import Path

from speechbrain_qmargin.files import write_text

_BLOCK = re.compile(r"<!-- (?P<stage>\w+)(?:: (?P<heading>[^>]+))? -->\n.*?<!-- end -->", re.DOTALL)


def section(text: str, heading: str | None) -> str | None:
    """What is below a heading of a stage's tables; with None what is above the first one.

    >>> section("a\\n\\n### cv, cosine\\n\\nb\\n\\n### gsc\\n\\nc\\n", "cv, cosine")
    'b'
    """
    first, *others = re.split(r"^### ", text, flags=re.MULTILINE)
    if heading is None:
        return first.strip()
    found = dict(part.split("\n", 1) for part in others)
    return found[heading].strip() if heading in found else None


def filled(page: str, out: Path, stages: Collection[str] | None = None) -> str:
    """A page with the tables of OUT in the blocks of some stages; None: of all."""

    def block(match: re.Match) -> str:
        stage, heading = match["stage"], match["heading"]
        if stages is not None and stage not in stages:
            return match[0]
        file = out / f"{stage}.md"
        table = section(file.read_text(encoding="utf-8"), heading) if file.is_file() else None
        if not table:
            raise ValueError(f"{file}: no table {heading or 'before its first heading'}")
        opening = match[0].partition("\n")[0]
        return f"{opening}\n\n{table}\n\n<!-- end -->"

    return _BLOCK.sub(block, page)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("pages", type=Path, nargs="+")
    parser.add_argument("--stage", nargs="+", help="only blocks of these")
    args = parser.parse_args()
    made = {
        page: filled(page.read_text(encoding="utf-8"), args.out, args.stage) for page in args.pages
    }
    for page, text in made.items():
        write_text(page, text)


if __name__ == "__main__":
    main()
