"""IJB-B and IJB-C: from the official meta files and image embeddings to figures, 1:1 and 1:N.

The protocol (Whitelam et al. 2017, Maze et al. 2018) compares templates, which are sets of images
and video frames of one person. As the field evaluates it: an embedding an image, of the image and
its mirror image; the mean over each media of a template (a video's frames are one media); the sum
over its media; the cosine of two templates. What moves the result is an option
(:class:`IJBOptions`), and every report prints it.
"""

from speechbrain_qmargin.faces.ijb.identification import IJBSearch, identify_ijb
from speechbrain_qmargin.faces.ijb.images import (
    ImageEmbeddings,
    extract_ijb,
    load_image_embeddings,
    save_image_embeddings,
)
from speechbrain_qmargin.faces.ijb.protocol import IJB, read_ijb, read_template_pairs
from speechbrain_qmargin.faces.ijb.templates import IJBOptions, pair_cosines, template_embeddings
from speechbrain_qmargin.faces.ijb.verification import (
    IJB_FARS,
    IJBResult,
    evaluate_ijb,
    sweep_table,
)

__all__ = [
    "IJB",
    "IJB_FARS",
    "IJBOptions",
    "IJBResult",
    "IJBSearch",
    "ImageEmbeddings",
    "evaluate_ijb",
    "extract_ijb",
    "identify_ijb",
    "load_image_embeddings",
    "pair_cosines",
    "read_ijb",
    "read_template_pairs",
    "save_image_embeddings",
    "sweep_table",
    "template_embeddings",
]
