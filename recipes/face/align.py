"""Align photographs of faces by five landmarks, as the networks are trained; ``qmargin align``.

python recipes/face/align.py IMAGES LANDMARKS OUTPUT [--image_size 112]
"""

import sys

from speechbrain_qmargin.cli import main

if __name__ == "__main__":
    sys.exit(main(["align", *sys.argv[1:]]))
