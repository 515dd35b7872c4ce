"""A trained run for others: SpeechBrain's inference folder, ONNX; as ``qmargin export``.

python recipes/voxceleb/export.py ENCODER [--operating_point FILE] [--onnx FILE]
"""

import sys

from speechbrain_qmargin.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
