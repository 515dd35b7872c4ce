"""Embeddings of any recordings with a trained encoder; as ``qmargin extract``.

python recipes/voxceleb/extract.py ENCODER SOURCE OUTPUT
"""

import sys

from speechbrain_qmargin.cli import main

if __name__ == "__main__":
    sys.exit(main(["extract", *sys.argv[1:]]))
