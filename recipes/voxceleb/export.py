"""A trained run for others: SpeechBrain's inference folder, with a threshold, and ONNX.

    python recipes/voxceleb/export.py RUN_FOLDER [--operating_point FILE] [--onnx OUT.onnx]

Writes RUN_FOLDER/inference/ anew from the run's checkpoints. A FILE of `qmargin report` whose
scores are plain cosines becomes the folder's threshold.
"""

import argparse
import sys

from speechbrain_qmargin.export.encoder import load_encoder
from speechbrain_qmargin.export.inference import export_run
from speechbrain_qmargin.export.onnx import export_onnx
from speechbrain_qmargin.scoring.decision import OperatingPoint


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_folder")
    parser.add_argument("--operating_point", help="operating_point.json, chosen on cosines")
    parser.add_argument("--onnx", help="file to write")
    parser.add_argument(
        "--from_features", action="store_true", help="ONNX that takes features, not waveforms"
    )
    args = parser.parse_args(argv)
    try:
        point = OperatingPoint.load(args.operating_point) if args.operating_point else None
        folder = export_run(args.run_folder, operating_point=point)
        print(f"{folder}: for speechbrain.inference" + (f", threshold {point.threshold:.4f}"
              if point else ""))  # fmt: skip
        if args.onnx:
            encoder = load_encoder(folder)
            differences = export_onnx(encoder, args.onnx, from_waveform=not args.from_features)
            print(
                f"{args.onnx}: at most {max(differences.values()):.1e} of an embedding's length "
                f"from PyTorch, at {', '.join(differences)} (batch x length)"
            )
    except (ValueError, OSError, ImportError) as error:
        print(f"export.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
