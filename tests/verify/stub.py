"""A reader without a network: what a source says is who speaks, and how clearly."""

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from speechbrain_qmargin.verify.readers import Sample, Unfit

DIGEST = "ab" * 32


@dataclass(frozen=True)
class Heard:
    seconds: float
    faults: tuple[str, ...] = ()


class Stub:
    """``b"ann 3"`` is the third recording of ann; ``b"noise"`` is refused."""

    modality, digest, rules = "speech", DIGEST, "checked"

    def __init__(self, size=32, spread=0.8, digest=DIGEST):
        self.size, self.spread, self.digest = size, spread, digest

    def read(self, source):
        text = source.decode() if isinstance(source, bytes) else Path(source).read_text()
        if text == "broken":
            raise OSError("the content cannot be decoded")
        if text.startswith("noise"):
            raise Unfit(source, ["no speech"], Heard(1.0, ("no speech",)))
        return Sample([torch.from_numpy(self.vector(text))], Heard(2.0))

    def embed(self, samples):
        return np.stack([sample.inputs[0].numpy() for sample in samples])

    def vector(self, text):
        """A person's direction, and what a recording adds."""
        person = text.split()[0]
        draws = [np.random.default_rng(zlib.crc32(one.encode())) for one in (person, text)]
        one, two = (rng.normal(size=self.size) for rng in draws)
        return (3 * (one + self.spread * two)).astype(np.float32)

    def embeddings(self, people, takes):
        """Ids and rows of a corpus."""
        ids = [f"{person}/{session}/{take}" for person in people
               for session in range(2) for take in range(takes)]  # fmt: skip
        return ids, np.stack([self.vector(name.replace("/", " ")) for name in ids])
