"""Generated voices and faces: what the recipes train on where there are no data.

``voices`` builds the corpus of ``speakers`` who say ``sentences``: ``espeak`` makes an utterance,
``processes`` share the work. ``faces`` draws identities.
"""
