"""Decode VoxCeleb2's m4a files once, to FLAC; training then starts from the converted folder.

    python recipes/voxceleb/to_flac.py VoxCeleb2 VoxCeleb2_flac [--jobs 16]

Started again, it goes on where it was interrupted.
"""

import argparse
import sys

from speechbrain_qmargin.cli import GOES_ON, status_of
from speechbrain_qmargin.data.convert import convert_to_flac


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="a folder with dev/aac, or any other layout of the recipe"
    )
    parser.add_argument("output", metavar="OUTPUT", help="folder to write the FLAC files to")
    parser.add_argument("--jobs", type=int, help="processes; default: as many as there are CPUs")
    arguments = parser.parse_args(argv)
    counts = convert_to_flac(arguments.source, arguments.output, jobs=arguments.jobs)
    print(", ".join(f"{count} {what}" for what, count in counts.items()))


if __name__ == "__main__":
    sys.exit(status_of("to_flac.py", main, GOES_ON))
