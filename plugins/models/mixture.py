"""Toys in one or two dimensions: a Gaussian mixture per prompt, with its exact score or one learned from its data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

import condrl
from condrl.algorithms.values import mlp
from condrl.diffusion.schedule import Schedule, like, make_schedule
from condrl.errors import UsageError
from condrl.models.points import Points, check_signal
from condrl.toys import oracle


@condrl.model
class Mixture(Points):
    """Points (B, d) whose pretrained score is known exactly or learned, plus a trained correction that starts at 0."""

    distributions_option = "distributions"

    def __init__(
        self,
        device: torch.device,
        *,
        distributions: dict[str, Any],  # prompt -> weights (n), means (n x d) and variances (n, n x d or n x d x d)
        schedule: Literal["vp", "ou", "rectified_flow"] = "vp",  # the forward process
        schedule_options: dict[str, float] | None = None,  # its parameters: b0, b1, rate, noise, end, final_time
        pretrained: Literal["exact", "network"] = "exact",  # the score that tuning starts from
        pretrain_steps: int = 2000,  # Adam steps of denoising score matching for pretrained=network
        correction: Literal["mlp", "affine"] = "mlp",  # what is trained: a network, or gain(t) x + offset(t)
        width: int = 64,  # units in the hidden layers of the networks
        knots: int = 32,  # intervals of time in the tables of correction=affine
        seed: int = 0,  # of the networks' initial weights and of the data
    ) -> None:
        self.device, self.prompts = device, list(distributions)
        self.distribution = read_distributions(distributions)
        self.schedule = make_schedule(schedule, schedule_options or {})
        if pretrained == "network":
            check_signal(self.schedule)
        self._data_means = self.distribution.mean()
        self.state_shape = (self.distribution.means.shape[-1],)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            shape = (len(distributions), *self.state_shape)
            learned = pretrained == "network"
            self._network = (
                pretrain(self.distribution, self.schedule, width, pretrain_steps).to(device) if learned else None
            )
            make, size = (Correction, width) if correction == "mlp" else (Affine, knots)
            self.module: nn.Module = make(self.schedule, *shape, size)
        self.module.to(device)

    def predict(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The pretrained score plus the correction, (B, d) at x (B, d) and times t (B,)."""
        score = self.pretrained_score(x, t, condition)
        return score + self.module(x, t, condition) if self.tuned else score

    def pretrained_score(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The score (B, d) that tuning started from; where there is no signal, the mean of the data."""
        if self._network is not None:
            return self._network(x, t, condition) / like(self.schedule.sigma(t), x)
        alpha = self.schedule.alpha(t)
        score = self.distribution.rows(condition).noised(alpha, self.schedule.sigma(t)).to(x).score(x)
        return score.where(like(alpha, x) > 0, self._data_means[condition].to(x))


# ---------------------------------------------------------------------------------------------- networks


class Correction(nn.Module):
    """An MLP of x, the time and the prompt (one-hot) that starts at zero."""

    def __init__(self, schedule: Schedule, prompts: int, dimensions: int, width: int) -> None:
        super().__init__()
        self.schedule, self.prompts = schedule, prompts
        self.layers = mlp(dimensions + 2 + prompts, width, dimensions)
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        prompt = nn.functional.one_hot(condition, self.prompts).to(x)
        return self.layers(torch.cat([x, self.schedule.clock(t).to(x), prompt], -1))


class Affine(nn.Module):
    """gain(t) x + offset(t) for each prompt, linear in t between the ends of equal intervals; starts at zero."""

    def __init__(self, schedule: Schedule, prompts: int, dimensions: int, knots: int) -> None:
        super().__init__()
        self.start, self.span, self.knots = schedule.final_time, schedule.end - schedule.final_time, knots
        self.table = nn.Parameter(torch.zeros(2, prompts, knots + 1, dimensions))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        position = (t - self.start) / self.span * self.knots
        nearest = position.round()  # a time of the table is not moved off it by rounding
        position = nearest.where((position - nearest).abs() < 1e-6, position).clamp(0, self.knots)
        left = position.floor().clamp(max=self.knots - 1).long()
        share = like(position - left, x)
        gain, offset = (1 - share) * self.table[:, condition, left] + share * self.table[:, condition, left + 1]
        return gain * x + offset


def pretrain(
    distribution: oracle.GaussianMixture, schedule: Schedule, width: int, steps: int, batch: int = 512
) -> nn.Module:
    """A network that says -epsilon, by denoising score matching on fresh data of every prompt."""
    prompts, _, dimensions = distribution.means.shape
    network = Correction(schedule, prompts, dimensions, width)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(torch.initial_seed())
    for _ in range(steps):
        condition = torch.randint(prompts, (batch,), generator=generator)
        clean = distribution.rows(condition).sample(generator).float()
        span = schedule.end - schedule.final_time
        t = schedule.final_time + span * torch.rand(batch, generator=generator, dtype=torch.float64)
        noise = torch.randn(clean.shape, generator=generator)
        x = like(schedule.alpha(t), clean) * clean + like(schedule.sigma(t), clean) * noise
        loss = (network(x, t, condition) + noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return network.requires_grad_(False)


# ---------------------------------------------------------------------------------------------- options


def read_distributions(distributions: Mapping[str, Any]) -> oracle.GaussianMixture:
    """The mixtures of the prompts, one row each.

    Raises: UsageError when a distribution's numbers do not fit together.
    """
    if not distributions:
        raise UsageError("config model.distributions: no prompt has a distribution")
    rows = [_read_distribution(prompt, distribution) for prompt, distribution in distributions.items()]
    shapes = {tuple(means.shape) for _, means, _ in rows}
    if len(shapes) > 1:
        raise UsageError(
            f"config model.distributions: all prompts need as many components and dimensions, got {sorted(shapes)}"
        )
    return oracle.GaussianMixture.of(*(torch.stack(parts) for parts in zip(*rows, strict=True)))


def _read_distribution(prompt: str, distribution: Any) -> tuple[Tensor, Tensor, Tensor]:
    where = f"config model.distributions.{prompt}"
    if not isinstance(distribution, Mapping) or set(distribution) != {"weights", "means", "variances"}:
        raise UsageError(f"{where}: expected weights, means and variances")
    try:
        weights, means, variances = (
            torch.tensor(distribution[key], dtype=torch.float64) for key in ("weights", "means", "variances")
        )
        means = means[:, None] if means.dim() == 1 else means
        if variances.dim() == 1:
            variances = variances[:, None].expand(means.shape)
        covariances = torch.diag_embed(variances) if variances.dim() == 2 else variances
        fits = weights.shape == means.shape[:1] and covariances.shape == (*means.shape, means.shape[1])
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise UsageError(f"{where}: {str(error).splitlines()[0]}") from error
    if not fits or not (weights > 0).all() or not (torch.linalg.eigvalsh(covariances) > 0).all():
        raise UsageError(f"{where}: n positive weights, n means and n positive variances are needed")
    return weights, means, covariances
