"""ElasticFace (Boutros et al. 2022): the margin of every sample is drawn anew."""

from __future__ import annotations

import torch
from torch import Tensor

from speechbrain_qmargin.communicator import Communicator
from speechbrain_qmargin.loss.arcface import angular_margin
from speechbrain_qmargin.loss.base import Loss
from speechbrain_qmargin.loss.interface import Objective, Scores

__all__ = ["Draws", "ElasticFaceLoss"]

_MARGINS = {"arc": 0.5, "cos": 0.35}
_SIGMAS = {"arc": 0.0125, "cos": 0.0125}
_SIGMAS_PLUS = {"arc": 0.0175, "cos": 0.02}


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
        rank = Communicator().rank
        # three numbers in one seed, none of which the others can imitate
        seed = (self.seed % 2**20 << 42) + (rank % 2**12 << 30) + self.count % 2**30
        self.count += 1
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
        return drawn if device is None else drawn.to(device, non_blocking=True)

    def margins(self, mean: float, sigma: float, targets: Tensor) -> Tensor:
        """Of targets [B], float64: drawn from N(mean, sigma^2) in training, else `mean`."""
        if not self.training:
            return torch.full(targets.shape, mean, dtype=torch.float64, device=targets.device)
        return mean + sigma * self.next(len(targets), targets.device)


class ElasticFaceLoss(Loss):
    r"""ElasticFace (Boutros, Damer, Kirchbuchner and Kuijper, CVPR workshops 2022).

    The margin of each sample is drawn from :math:`N(m, \sigma^2)` in every step of training; in
    evaluation it is m, and nothing is drawn.

    Parameters
    ----------
    scale : float
        64 as published.
    margin : float, optional
        None: 0.5 radians for "arc" and 0.35 for "cos", as published.
    sigma : float, >= 0, optional
        None: 0.0125, the default of the authors' code; with `plus` 0.0175 for "arc" and 0.02 for
        "cos", as in their settings.
    kind : "arc" or "cos"
        ArcFace's margin or CosFace's.
    plus : bool
        ElasticFace+: within the batch of a process the samples with the smaller cosines get the
        larger margins.
    seed : int

    Raises
    ------
    ValueError
        A setting outside its range.

    Examples
    --------
    >>> ElasticFaceLoss()
    ElasticFaceLoss(scale=64, margin=0.5, sigma=0.0125)
    >>> loss = ElasticFaceLoss(scale=1.0, margin=0.4, sigma=0.0, kind="cos")
    >>> loss(torch.tensor([[1.0, 0.6]]), torch.tensor([0]))     # a tie: log 2
    tensor(0.6931)
    """

    settings = ("scale", "margin", "sigma")
    options = ("kind", "plus")
    sigma: float

    def __init__(
        self,
        scale: float = 64.0,
        margin: float | None = None,
        sigma: float | None = None,
        kind: str = "arc",
        plus: bool = False,
        seed: int = 0,
    ) -> None:
        if kind not in _MARGINS:
            raise ValueError(f"kind must be 'arc' or 'cos', got {kind!r}")
        sigmas = _SIGMAS_PLUS if plus else _SIGMAS
        super().__init__(
            scale=scale,
            margin=_MARGINS[kind] if margin is None else margin,
            sigma=sigmas[kind] if sigma is None else sigma,
        )
        self.kind, self.plus = kind, bool(plus)
        self.draws = Draws(seed)

    def check(self, **values: float) -> None:
        super().check(**values)
        if values["sigma"] < 0:
            raise ValueError(f"sigma must be >= 0, got {values['sigma']}")

    def objective(self, scores: Scores, targets: Tensor) -> Objective:
        drawn = self.draws.margins(self.margin, self.sigma, targets)

        def move(cosines: Tensor) -> Tensor:
            margins = drawn.to(cosines.dtype)
            if self.plus:
                rank = cosines.argsort(descending=True).argsort()
                margins = margins.sort().values[rank]
            return angular_margin(cosines, margins) if self.kind == "arc" else cosines - margins

        return Objective(scale=self.scale, move_target=move)
