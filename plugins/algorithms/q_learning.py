"""Reward-directed q-learning: a diffusion policy from data, or from a pretrained score (Gao, Zha and Zhou 2024)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

import condrl
from condrl.algorithms.actions import Actions, Pairs, action_variance, explore, noised_pairs, pretrained_scores
from condrl.algorithms.base import Algorithm, Experience, OwnNetwork
from condrl.algorithms.examples import Examples, Metrics, per_chain, per_image
from condrl.algorithms.needs import Need, affine_steps, no_rollouts, scores
from condrl.algorithms.values import tanh_relu
from condrl.config import TrainConfig
from condrl.diffusion.noise import Noise
from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import Rollout
from condrl.toys.datasets import ratio_score


@dataclass(frozen=True, kw_only=True)
class Episodes(Examples):
    """An epoch's whole trajectories, or the same number of steps at each time: one step of learning."""

    states: Tensor = per_chain()
    nexts: Tensor = per_chain()
    actions: Tensor = per_chain()
    running: Tensor = per_chain()  # reward per unit of time, -g^2 |s - a|^2 (for paired scores in the mean)
    reward: Tensor = per_image()  # beta r of the samples


class TimeValue(nn.Module):
    """J(t, x, c), the network of Gao et al. 2024 (Table 1)."""

    def __init__(self, dimensions: int, features: int, width: int) -> None:
        super().__init__()
        self.layers = tanh_relu(1 + dimensions + features, width, 1)

    def forward(self, x: Tensor, t: Tensor, features: Tensor) -> Tensor:
        """(B,) at x (B, d), times t (B,) and prompt features (B, F)."""
        found: Tensor = self.layers(torch.cat([t.to(x)[:, None], x, features.to(x)], 1))[:, 0]
        return found


@condrl.algorithm(name="q_learning")
@dataclass(kw_only=True)
class QLearning(Algorithm):
    """Maximises beta E r - E int g^2 |s - a|^2 dt by temporal differences (Gao et al. 2024; docs/theory.md 12).

    s is the score of the data, known by samples or as a pretrained score, a the policy's; at eta = 1 that is beta r
    minus twice the path KL, so kappa = 2 / beta. The value J and the policy's mean learn from one error,
    G = J(next) - J + (running reward - q) D with q = -g^2 |a - mu|^2. The paper's q has a normaliser as well, which
    adds a function of time alone to J, and a large one; without it, a J that is still to be learned does not lead a
    pretrained policy away.
    With `samples`, s is estimated from some points of the data at each state of a roll-out, with `all` from every one.
    `paired` rolls nothing out: it learns from single steps that start at noised points, off-policy, each with the score
    given its own point; rewards in the record are then those at the data's states, and `denoising` is
    E sum_k g^2 |s_0 - mu|^2 dt.
    """

    beta: float = 1.0  # weight of the reward; kappa is 2 / beta, and 0 learns the distribution of the data alone
    temperature: float = 5.0  # of exploration: the variance of an action is this over 2 g^2
    score: Literal["samples", "all", "paired", "pretrained"] = "samples"  # of the data, by points: see above; or given
    samples: int = 300  # points drawn for each step and batch of the roll-out
    floor: float = 1e-12  # density below which points count as too far away, in the ratio estimator
    rule: Literal["loss", "martingale"] = "loss"  # Adam on eq. (31); or updates (29)-(30), the policy's without D
    value_lr: float = 1e-3  # learning rate of the value network
    value_width: int = 64  # its hidden units

    value: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.off_policy = self.score == "paired"
        self.require_positive("temperature", "samples", "floor", "value_lr", "value_width")
        self.require_at_least(0, "beta")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (affine_steps, scores, *((no_rollouts,) if self.off_policy else ()))

    def setup(self, policy: Policy) -> None:
        if self.score != "pretrained" and not hasattr(policy.model, "data"):
            raise condrl.UsageError(
                "config algorithm.score: this model has no data; use model.name=empirical, or "
                "algorithm.score=pretrained"
            )
        shape, features = policy.model.state_shape, policy.model.features(torch.zeros(1, dtype=torch.long))
        if len(shape) != 1:
            raise condrl.UsageError("the algorithm q_learning has value networks for points only: use ctrl for images")
        if self.off_policy and self.beta and not getattr(policy.model, "pretrained", False):
            raise condrl.UsageError(
                "config algorithm.score: paired with beta above 0 starts from a model of the data: give model.weights, "
                "a network learned with beta=0"
            )
        self.value = TimeValue(shape[0], features.shape[1], self.value_width).to(policy.model.device)

    def networks(self) -> dict[str, OwnNetwork]:
        return {"value": OwnNetwork(self.value, self.value_lr)}

    # ------------------------------------------------------------------------------------------ roll-out

    def rollout(self, policy: Policy, condition: Tensor, noise: Noise, batch: int) -> Actions:
        if self.off_policy:
            model: Any = policy.model  # with data (C, n, d)
            return noised_pairs(policy, model.data, condition, noise, action_variance(policy, self.temperature))
        return explore(policy, condition, noise, batch, action_variance(policy, self.temperature))

    @torch.no_grad()
    def examples(self, policy: Policy, experience: Experience, train: TrainConfig, noise: Noise) -> Episodes:
        r, schedule = experience.rollout, policy.model.schedule
        assert isinstance(r, Actions)  # from our own rollout
        g2 = schedule.g2(policy.sampler.times[:-1]).to(r.states)[:, None]
        excess = torch.zeros(())
        if self.score == "pretrained":
            scores = pretrained_scores(policy, r, train.rollout_batch)
        elif isinstance(r, Pairs):
            scores, excess = r.scores, self._excess(policy, r, train)
        else:
            parts = torch.arange(len(r.condition)).split(train.rollout_batch)
            scores = torch.cat([self._data_scores(policy, r, images, noise) for images in parts], 1)
        running = -g2 * ((scores - r.actions).square().sum(2) - excess)
        duration = -policy.sampler.times.diff().to(scores)[:, None]
        cost = (g2 * (scores - r.means).square().sum(2) * duration).sum(0).mean()
        rewards = self.beta * experience.scores.total
        metrics = {"denoising": cost} if self.off_policy else {"cost": cost, "objective": rewards.nanmean() - cost}
        return Episodes(
            condition=r.condition,
            k=torch.zeros(1, dtype=torch.long),
            states=r.states[:-1],
            nexts=r.nexts if isinstance(r, Pairs) else r.states[1:],
            actions=r.actions,
            running=running,
            reward=rewards,
            metrics=metrics,
        )

    def _excess(self, policy: Policy, r: Pairs, train: TrainConfig) -> Tensor:
        """|s_0 - mu|^2 - |s - mu|^2, (K, B), of the score s_0 given the point and the pretrained score s.

        Its mean is Var(s_0 | x) if s is the data's score, and no action changes it. Left in, it would reward states
        whose point is certain, and add its noise. With beta = 0 mu learns the score, and stands for s.
        """
        excess = (r.scores - r.means).square().sum(2)
        if self.beta:
            excess -= (pretrained_scores(policy, r, train.rollout_batch) - r.means).square().sum(2)
        return excess

    def _data_scores(self, policy: Policy, r: Rollout, images: Tensor, noise: Noise) -> Tensor:
        """The score of the data at the states of some trajectories, (K, b, d)."""
        model: Any = policy.model  # with data (C, n, d)
        times, condition = policy.sampler.times[:-1], r.condition[images]
        alpha, sigma = model.schedule.alpha(times), model.schedule.sigma(times)
        found = torch.empty_like(r.states[:-1, images])
        for c in condition.unique().tolist():
            rows = (condition == c).nonzero()[:, 0]
            points = model.data[c].expand(policy.steps, -1, -1)
            if self.score == "samples":
                size = policy.steps, self.samples
                chosen = torch.randint(points.shape[1], size, generator=noise.shared(f"points {c}"))
                points = model.data[c][chosen.to(model.data.device)]
            found[:, rows] = ratio_score(r.states[:-1, images[rows]], points, alpha, sigma, self.floor)
        return found

    # ------------------------------------------------------------------------------------------ loss

    def loss(self, policy: Policy, batch: Episodes) -> tuple[Tensor, Metrics]:
        """A loss (B,) whose gradient is -sum_k G_k (dJ + dq D), or -sum_k G_k (dJ + dq): eq. (31), or (29) and (30)."""
        duration = -policy.sampler.times.diff().to(batch.states)[:, None]
        k = torch.arange(policy.steps).repeat_interleave(len(batch.condition))
        condition, x = batch.condition.repeat(policy.steps), batch.states.flatten(0, 1)
        features = policy.model.features(condition)
        values = self.value(x, policy.sampler.times[k], features).view_as(batch.running)
        q = self.q(policy, x, k, batch.actions.flatten(0, 1), condition).view_as(batch.running)
        later = values[1:]
        if self.off_policy:  # steps that do not follow on each other
            rows = slice(len(batch.condition), None)
            with torch.no_grad():
                later = self.value(batch.nexts[:-1].flatten(0, 1), policy.sampler.times[k[rows]], features[rows])
            later = later.view_as(values[1:])
        ahead = torch.cat([later, batch.reward[None]])
        error = (ahead - values + (batch.running - q) * duration).detach()
        loss = -error * (values + q * (duration if self.rule == "loss" else 1))
        return loss.sum(0), {"td_error": error.square().mean()}

    def q(self, policy: Policy, x: Tensor, k: Tensor, action: Tensor, condition: Tensor) -> Tensor:
        """q = -g^2 |a - mu|^2, (B,) per unit of time: eq. (28) without its normaliser, which no state changes."""
        g2 = policy.model.schedule.g2(policy.sampler.times[k]).to(x)
        return -g2 * (action - policy.action(x, k, condition)).square().sum(1)
