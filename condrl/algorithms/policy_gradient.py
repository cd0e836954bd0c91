"""Policy gradients on denoising steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from condrl.algorithms.base import Algorithm, Experience, Metrics, Need, trained_steps
from condrl.algorithms.credit import group_advantages, group_scale
from condrl.config import TrainConfig
from condrl.diffusion.noise import Noise
from condrl.diffusion.path_kl import PathKL, path_kl
from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import Rollout
from condrl.diffusion.transition import Gaussian, Transition

MAX_LOG_RATIO = 20.0  # nats: no float32 overflow where the min leaves the ratio unbounded (negative advantages)


@dataclass(frozen=True)
class Steps:
    """B (image, step) pairs."""

    x: Tensor  # (B, ...) state before the step
    k: Tensor  # (B,) step index
    next_x: Tensor  # (B, ...) state after it
    old_log_prob: Tensor  # (B,) nats, at roll-out
    advantage: Tensor  # (B,)
    condition: Tensor  # (B,)
    solver_state: Tensor | None = None  # (B, ...) of a multi-step sampler
    base: Gaussian | None = None  # the pretrained model's distribution of `next_x`
    kl_weight: Tensor | None = None  # (B,) of the KL to it

    def transition(self, policy: Policy) -> Transition:
        """The policy's distribution of `next_x`."""
        return policy.transition(self.x, self.k, self.condition, self.solver_state)

    def log_prob(self, policy: Policy) -> Tensor:
        """What `old_log_prob` is under this policy."""
        return self.transition(policy).log_prob(self.next_x)


@dataclass(frozen=True)
class Transitions:
    """The denoising steps of an epoch's images; a column is a step."""

    rollout: Rollout
    advantages: Tensor  # (B,), or (K, B) where they differ from step to step
    columns: Tensor  # (n,)
    base: PathKL | None = None
    kl_weights: Tensor | None = None  # (B,)
    metrics: Metrics = field(default_factory=dict)

    @property
    def images(self) -> int:
        return self.advantages.shape[-1]

    def minibatch(self, images: Tensor, columns: Tensor) -> Steps:
        r, where, k = self.rollout, images.to(self.advantages.device), columns.to(self.advantages.device)
        return Steps(
            x=r.states[k, where],
            k=columns,
            next_x=r.states[k + 1, where],
            old_log_prob=r.log_probs[k, where],
            advantage=self.advantages[where] if self.advantages.dim() == 1 else self.advantages[k, where],
            condition=r.condition[images],
            solver_state=None if r.solver_states is None else r.solver_states[k, where],
            base=None if self.base is None else self.base.transition(k, where),
            kl_weight=None if self.kl_weights is None else self.kl_weights[where],
        )

    def with_log_probs(self, log_probs: Tensor) -> Transitions:
        return replace(self, rollout=replace(self.rollout, log_probs=log_probs))


@dataclass(kw_only=True)
class PolicyGradient(Algorithm):
    """The score-function gradients of E r - kappa KL(chain || pretrained chain) on denoising steps.

    The KL's gradient is exact: grad log p_k meets r - kappa sum_{j > k} KL_j, and KL_k is differentiated itself
    (THEORY 4.4). `normalise` divides a prompt's whole objective, so kappa keeps its meaning and p* its place.
    """

    kappa: float = 0.0  # reward per nat of path KL to the pretrained model
    normalise: bool = True  # divide by the standard deviation of the rewards of a prompt's images
    leave_one_out: bool = False  # centre a group's returns on the mean of the others
    advantage_clip: float = 5.0  # bound on |advantage| when normalised

    def __post_init__(self) -> None:
        self.require_at_least(0, "kappa")
        self.require_positive("advantage_clip")

    @property
    def needs(self) -> Sequence[Need]:
        return ("stochastic steps", "groups", *(("Markov steps",) if self.kappa > 0 else ()))

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """Credit (B,) of rewards (B,) for images of prompt rows `groups` (B,), where there is no KL."""
        return self.bounded(group_advantages(rewards, groups, self.normalise, self.leave_one_out))

    def scale(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """What the objective (B,) of each image is multiplied by when normalised."""
        return group_scale(rewards, groups)

    def bounded(self, advantages: Tensor) -> Tensor:
        """Normalised advantages within the bound; in the reward's own unit a bound would change the objective."""
        return advantages.clamp(-self.advantage_clip, self.advantage_clip) if self.normalise else advantages

    def examples(self, policy: Policy, experience: Experience, train: TrainConfig, noise: Noise) -> Transitions:
        columns, rollout = trained_steps(policy.sampler, train), experience.rollout
        rewards = experience.scores.total
        if self.kappa == 0:
            return Transitions(rollout, experience.credit(self.advantages, rewards), columns)
        scale = experience.credit(self.scale, rewards) if self.normalise else torch.ones_like(rewards)
        base = path_kl(policy, rollout, train.rollout_batch)
        returns = rewards - self.kappa * self.kl_to_go(base)
        centred = experience.credit(self._centred, returns)
        total = base.kl.sum(0).mean()
        metrics = {"path_kl": total, "objective": rewards.nanmean() - self.kappa * total}
        return Transitions(rollout, self.bounded(centred * scale), columns, base, self.kappa * scale, metrics)

    def _centred(self, returns: Tensor, groups: Tensor) -> Tensor:
        return torch.stack([group_advantages(g, groups, False, self.leave_one_out) for g in returns])

    def kl_to_go(self, base: PathKL) -> Tensor:
        """(K, B) what a step's choice will cost later, nats."""
        return base.to_go

    def loss(self, policy: Policy, batch: Steps) -> tuple[Tensor, Metrics]:
        transition = batch.transition(policy)
        loss, metrics = self.surrogate(policy, transition, batch)
        if batch.base is not None and batch.kl_weight is not None:
            loss = loss + batch.kl_weight * transition.kl(batch.base)
        return loss, metrics

    def surrogate(self, policy: Policy, transition: Transition, batch: Steps) -> tuple[Tensor, Metrics]:
        """A loss (B,) whose gradient at the roll-out's policy is -A grad log p, and means to log."""
        raise NotImplementedError


@dataclass(kw_only=True)
class ClippedPolicyGradient(PolicyGradient):
    """PPO's clipped importance weights, for several updates on an epoch's images (Schulman et al. 2017)."""

    clip_range: float = 0.2  # bound on |ratio - 1| for a step of 1/50 of the time; others scale with sqrt(step)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("clip_range")

    def surrogate(self, policy: Policy, transition: Transition, batch: Steps) -> tuple[Tensor, Metrics]:
        """PPO's loss with a bound that scales with the square root of the step (THEORY 9.2)."""
        times = policy.sampler.times
        step = (times[batch.k] - times[batch.k + 1]) / times[0]
        bound = self.clip_range * (50 * step).sqrt()
        return clipped(transition.log_prob(batch.next_x) - batch.old_log_prob, batch.advantage, bound)


def clipped(log_ratio: Tensor, advantage: Tensor, bound: Tensor | float) -> tuple[Tensor, Metrics]:
    """PPO's -min(w A, clip(w, 1 - bound, 1 + bound) A) of log w (B,): the min keeps clipping one-sided (THEORY 4.2)."""
    log_ratio = log_ratio.float()
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    low, high = torch.as_tensor(1 - bound).to(ratio), torch.as_tensor(1 + bound).to(ratio)
    loss = -torch.min(ratio * advantage, ratio.clamp(low, high) * advantage)
    with torch.no_grad():
        return loss, {
            "approx_kl": (ratio - 1 - log_ratio).mean(),  # nats per step (Schulman 2020, k3)
            "clip_fraction": ((ratio < low) | (ratio > high)).float().mean(),
        }
