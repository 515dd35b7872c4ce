"""ElasticFace (Boutros et al. 2022): the margin of every sample is drawn anew."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from speechbrain_qmargin.loss.arcface import angular_margin
from speechbrain_qmargin.loss.base import Loss
from speechbrain_qmargin.loss.interface import Objective, Scores

__all__ = ["Draws", "ElasticFaceLoss"]


class Draws(torch.nn.Module):
    """Normal numbers for each batch, which repeat when a run is resumed.

    Attributes
    ----------
    count : int
        Batches drawn so far: part of the state, which the recipes save with a checkpoint. It is no
        tensor, for which the host would wait on a GPU.

    Examples
    --------
    >>> draws = Draws(seed=1)
    >>> first = draws.next(3)
    >>> state = draws.state_dict()
    >>> second = draws.next(3)
    >>> resumed = Draws(seed=1)
    >>> _ = resumed.load_state_dict(state)
    >>> torch.equal(resumed.next(3), second)        # not `first` again
    True
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed, self.count = int(seed), 0

    def get_extra_state(self) -> dict[str, int]:
        return {"count": self.count}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.count = int(state["count"])

    def next(self, size: int, device: torch.device | None = None) -> Tensor:
        """[size], float64, others in each process; the same on all devices."""
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        # three numbers in one seed, none of which the others can imitate
        seed = (self.seed % 2**20 << 42) + (rank % 2**12 << 30) + self.count % 2**30
        self.count += 1
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(size, generator=generator, dtype=torch.float64)
        return drawn if device is None else drawn.to(device, non_blocking=True)


class ElasticFaceLoss(Loss):
    r"""ElasticFace (Boutros, Damer, Kirchbuchner and Kuijper, CVPR workshops 2022).

    The margin of each sample is drawn from :math:`N(m, \sigma^2)` in every step.

    Parameters
    ----------
    scale, margin : float
        64 and, in radians, 0.5 as published for "arc"; 0.35 for "cos".
    sigma : float, >= 0
        0.0125 as published; 0.0175 with `plus`.
    kind : "arc" or "cos"
        ArcFace's margin or CosFace's.
    plus : bool
        ElasticFace+: within the batch of a process the samples with the smaller cosines get the
        larger margins.
    seed : int

    Examples
    --------
    >>> ElasticFaceLoss()
    ElasticFaceLoss(scale=64, margin=0.5, sigma=0.0125)
    """

    settings = ("scale", "margin", "sigma")
    scale: float
    margin: float
    sigma: float

    def __init__(
        self,
        scale: float = 64.0,
        margin: float = 0.5,
        sigma: float = 0.0125,
        kind: str = "arc",
        plus: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(scale=scale, margin=margin, sigma=sigma)
        if kind not in ("arc", "cos"):
            raise ValueError(f"kind must be 'arc' or 'cos', got {kind!r}")
        self.kind, self.plus = kind, bool(plus)
        self.draws = Draws(seed)

    def check(self, **values: float) -> None:
        super().check(**values)
        if values["sigma"] < 0:
            raise ValueError(f"sigma must be >= 0, got {values['sigma']}")

    def objective(self, scores: Scores, targets: Tensor) -> Objective:
        drawn = self.margin + self.sigma * self.draws.next(len(targets), targets.device)

        def move(cosines: Tensor) -> Tensor:
            margins = drawn.to(cosines.dtype)
            if self.plus:
                rank = cosines.detach().argsort(descending=True).argsort()
                margins = margins.sort().values[rank]
            return angular_margin(cosines, margins) if self.kind == "arc" else cosines - margins

        return Objective(scale=self.scale, move_target=move)
