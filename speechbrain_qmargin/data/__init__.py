"""Corpora on disk to items of a training.

The way of the data, a few modules for each step:

1. ``readers`` finds who reads what the user named: ``voxceleb``, ``cnceleb``, ``tables`` (CSV,
   Kaldi), or a reader of the user's own. ``folders`` lists the files below one.
2. What is there is a ``manifest``: id, file, class, start and duration of every item.
3. ``speech`` and ``faces`` divide it into training, validation and test, by the rules of
   ``classes``; ``durations`` knows which recordings can be used.
4. ``speech_dataset`` and ``face_dataset`` read its items with ``audio`` and ``images``, in the
   order of ``sampling``; ``augment`` adds rooms and noise, ``epochs`` says which epoch it is,
   ``skipped`` lists what could not be read.

Faces inside large files need no manifest: ``records`` (InsightFace's ``.rec``, as ``recordio``
has them) and ``shards`` (webdataset's ``.tar``) are datasets themselves, ``stored`` what they
share; ``pickled`` reads verification sets (``.bin``). Beside the way lie ``convert`` (to FLAC),
``align`` (faces by landmarks) and ``people`` (recordings or images of one's own people).
"""
