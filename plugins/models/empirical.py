"""Points known by samples alone: a small network that says their score, trained from nothing or from a file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import condrl
from condrl.algorithms.values import tanh_relu
from condrl.diffusion.schedule import Schedule, like, make_schedule
from condrl.errors import UsageError
from condrl.models.points import Points, check_signal
from condrl.toys.datasets import make_dataset


@condrl.model
class Empirical(Points):
    """Points (B, d) with a data set for each prompt, and the network of Gao et al. 2024 (Table 1) as their score."""

    distributions_option = "data"

    def __init__(
        self,
        device: torch.device,
        *,
        data: dict[str, Any],  # prompt -> name (swiss_roll, mixture) and its options
        points: int = 20_000,  # of each prompt's data set
        schedule: Literal["vp", "ou", "rectified_flow"] = "ou",  # the forward process
        schedule_options: dict[str, float] | None = None,  # its parameters: b0, b1, rate, noise, end, final_time
        width: int = 64,  # units in the hidden layers
        preconditioned: bool = False,  # the network adds to the score of a centred Gaussian as wide as the data
        weights: str | None = None,  # folder of a saved network to start from; null: from nothing
        seed: int = 0,  # of the first weights and of the data
    ) -> None:
        self.device, self.prompts = device, list(data)
        self.schedule = make_schedule(schedule, schedule_options or {})
        check_signal(self.schedule)
        generator = torch.Generator().manual_seed(seed)
        sets = [make_dataset(prompt, options, points, generator) for prompt, options in data.items()]
        if len({one.shape[1] for one in sets}) > 1:
            raise UsageError("config model.data: the data sets of all prompts need as many dimensions")
        self.data = torch.stack(sets).to(device)  # (C, n, d)
        self.state_shape = (self.data.shape[2],)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = ScoreNetwork(len(data), self.data.shape[2], width)
        spread = (self.data - self.data.mean((0, 1))).square().mean().sqrt()
        self.module: nn.Module = Preconditioned(network, self.schedule, spread) if preconditioned else network
        self.module.to(device)
        self.pretrained = weights is not None
        if weights:
            self.load_adapter(Path(weights))
        self._pretrained = copy.deepcopy(self.module).requires_grad_(False)

    def predict(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        network = self.module if self.tuned else self._pretrained
        score: Tensor = network(x, t, condition)
        return score


class ScoreNetwork(nn.Module):
    """The score from (t, x), and from the prompt where there are several (Gao et al. 2024, Table 1)."""

    def __init__(self, prompts: int, dimensions: int, width: int) -> None:
        super().__init__()
        self.prompts = prompts if prompts > 1 else 0
        self.layers = tanh_relu(1 + dimensions + self.prompts, width, dimensions)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        told = [t.to(x)[:, None], x]
        if self.prompts:
            told.append(nn.functional.one_hot(condition, self.prompts).to(x))
        score: Tensor = self.layers(torch.cat(told, 1))
        return score


class Preconditioned(nn.Module):
    """The score of N(0, v I) with the data's variance v, and a network F for the rest (after Karras et al. 2022).

    s = -x / u^2 + alpha sqrt(v) / (sigma u) F(2 x / u, lambda(t), c), with u^2 = sigma^2 + alpha^2 v. The 2 brings
    the inputs to where tanh bends: without it, learning takes longer.
    """

    spread: Tensor  # sqrt(v)

    def __init__(self, network: ScoreNetwork, schedule: Schedule, spread: Tensor) -> None:
        super().__init__()
        self.network, self.schedule = network, schedule
        self.register_buffer("spread", spread)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        alpha, sigma = (like(c(t), x) for c in (self.schedule.alpha, self.schedule.sigma))
        wide = (sigma.square() + (alpha * self.spread).square()).sqrt()
        rest = self.network(2 * x / wide, self.schedule.log_snr(t).to(x), condition)
        return alpha * self.spread / (sigma * wide) * rest - x / wide.square()
