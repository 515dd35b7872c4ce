"""A trained run for others: SpeechBrain's inference folder, ONNX; as ``qmargin export``.

python recipes/voxceleb/export.py RUN [--operating_point FILE] [--onnx OUT.onnx]
"""

import sys

from speechbrain_qmargin.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
