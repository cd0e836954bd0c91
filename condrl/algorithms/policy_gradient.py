"""Policy gradients on denoising steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from condrl.algorithms.base import Algorithm, Experience
from condrl.algorithms.credit import group_advantages, group_scale
from condrl.algorithms.examples import Examples, Metrics, RatioExamples, per_image, per_step
from condrl.algorithms.needs import Need, groups, markov_steps, noisy_steps, trained_steps
from condrl.config import TrainConfig
from condrl.diffusion.noise import Noise
from condrl.diffusion.path_kl import PathKL, path_kl
from condrl.diffusion.policy import Policy
from condrl.diffusion.schedule import like
from condrl.diffusion.transition import Gaussian, Transition

MAX_LOG_RATIO = 20.0  # nats: no float32 overflow where the min leaves the ratio unbounded (negative advantages)


@dataclass(frozen=True, kw_only=True)
class Steps(RatioExamples):
    """The denoising steps of an epoch's images."""

    x: Tensor = per_step()  # state before the step
    next_x: Tensor = per_step()  # state after it
    advantage: Tensor = per_step()
    solver_state: Tensor | None = per_step(default=None)
    base_mean: Tensor | None = per_step(default=None)  # of the pretrained model's distribution of `next_x`
    base_std: Tensor | None = per_step(default=None)
    kl_weight: Tensor | None = per_image(default=None)  # of the KL to it

    def transition(self, policy: Policy) -> Transition:
        """The policy's distribution of `next_x`, of pairs."""
        return policy.transition(self.x, self.k, self.condition, self.solver_state)

    def log_prob(self, policy: Policy) -> Tensor:
        return self.transition(policy).log_prob(self.next_x)

    def kl(self, transition: Transition) -> Tensor | None:
        """The weighed KL (B,) of pairs to the pretrained model; None without one."""
        if self.base_mean is None or self.base_std is None or self.kl_weight is None:
            return None
        return self.kl_weight * transition.kl(Gaussian(self.base_mean, like(self.base_std, self.base_mean)))


@dataclass(kw_only=True)
class PolicyGradient(Algorithm):
    """The score-function gradients of E r - kappa KL(chain || pretrained chain) on denoising steps.

    The KL's gradient is exact: grad log p_k meets r - kappa sum_{j > k} KL_j, and KL_k is differentiated itself
    (docs/theory.md 8). With `leave_one_out` returns keep their size beside it, so kappa is exact in small groups too;
    `normalise` divides a prompt's whole objective by a spread that its own images share, which is exact in large ones.
    """

    kappa: float = 0.0  # reward per nat of path KL to the pretrained model
    normalise: bool = True  # divide by the standard deviation of the rewards of a prompt's images
    leave_one_out: bool | None = None  # centre a group's returns on the mean of the others; null: with a kappa
    advantage_clip: float = 5.0  # bound on |advantage| when normalised

    def __post_init__(self) -> None:
        self.require_at_least(0, "kappa")
        self.require_positive("advantage_clip")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (noisy_steps, groups, *((markov_steps,) if self.kappa > 0 else ()))

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """Credit (B,) of rewards (B,) for images of prompt rows `groups` (B,), where there is no KL."""
        return self.bounded(group_advantages(rewards, groups, self.normalise, bool(self.leave_one_out)))

    def scale(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """What the objective (B,) of each image is multiplied by when normalised."""
        return group_scale(rewards, groups)

    def bounded(self, advantages: Tensor) -> Tensor:
        """Normalised advantages within the bound; in the reward's own unit a bound would change the objective."""
        return advantages.clamp(-self.advantage_clip, self.advantage_clip) if self.normalise else advantages

    def examples(self, policy: Policy, experience: Experience, train: TrainConfig, noise: Noise) -> Examples:
        r, rewards = experience.rollout, experience.scores.total
        steps = Steps(
            condition=r.condition,
            k=trained_steps(policy.sampler, train),
            old_log_prob=r.log_probs,
            x=r.states[:-1],
            next_x=r.states[1:],
            advantage=rewards.expand(policy.steps, -1),
            solver_state=r.solver_states,
        )
        if self.kappa == 0:
            return replace(steps, advantage=experience.credit(self.advantages, rewards).expand(policy.steps, -1))
        scale = experience.credit(self.scale, rewards) if self.normalise else torch.ones_like(rewards)
        base = path_kl(policy, r, train.rollout_batch)
        centred = experience.credit(self._centred, rewards - self.kappa * self.kl_to_go(base))
        total = base.kl.sum(0).mean()
        return replace(
            steps,
            advantage=self.bounded(centred * scale),
            base_mean=base.means,
            base_std=base.stds,
            kl_weight=self.kappa * scale,
            metrics={"path_kl": total, "objective": rewards.nanmean() - self.kappa * total},
        )

    def _centred(self, returns: Tensor, groups: Tensor) -> Tensor:
        return group_advantages(returns, groups, False, self.leave_one_out is not False)

    def kl_to_go(self, base: PathKL) -> Tensor:
        """(K, B) what a step's choice will cost later, nats."""
        return base.to_go

    def loss(self, policy: Policy, batch: Steps) -> tuple[Tensor, Metrics]:
        transition = batch.transition(policy)
        loss, metrics = self.surrogate(policy, transition, batch)
        kl = batch.kl(transition)
        return loss if kl is None else loss + kl, metrics

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
        """PPO's loss with a bound that scales with the square root of the step (docs/theory.md 9)."""
        times = policy.sampler.times
        step = (times[batch.k] - times[batch.k + 1]) / times[0]
        bound = self.clip_range * (50 * step).sqrt()
        return clipped(transition.log_prob(batch.next_x) - batch.old_log_prob, batch.advantage, bound)


def clipped(log_ratio: Tensor, advantage: Tensor, bound: Tensor | float) -> tuple[Tensor, Metrics]:
    """PPO's -min(w A, clip(w, 1 - bound, 1 + bound) A) of log w (B,); the min: one-sided (docs/theory.md 8)."""
    log_ratio = log_ratio.float()
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    low, high = torch.as_tensor(1 - bound).to(ratio), torch.as_tensor(1 + bound).to(ratio)
    loss = -torch.min(ratio * advantage, ratio.clamp(low, high) * advantage)
    with torch.no_grad():
        return loss, {
            "approx_kl": (ratio - 1 - log_ratio).mean(),  # nats per step (Schulman 2020, k3)
            "clip_fraction": ((ratio < low) | (ratio > high)).float().mean(),
        }
