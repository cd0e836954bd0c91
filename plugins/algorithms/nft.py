"""NFT: reward-weighted matching of the policy's own noised samples (DiffusionNFT, Zheng et al. 2025)."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

import condrl
from condrl.algorithms.base import Algorithm, Experience
from condrl.algorithms.credit import group_advantages
from condrl.algorithms.examples import Metrics
from condrl.algorithms.forward import Noised, noised_samples
from condrl.algorithms.needs import Need, groups
from condrl.algorithms.reference import MovingReference
from condrl.config import TrainConfig
from condrl.diffusion.noise import Noise
from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import Rollout
from condrl.diffusion.schedule import like


@condrl.algorithm
@dataclass(kw_only=True)
class NFT(Algorithm):
    """DiffusionNFT: no likelihoods, so any sampler, and far less gradient noise (Zheng et al. 2025)."""

    temperature: float = 3.0  # the larger, the smaller an epoch's step, E[A error] / temperature
    draws: int = 4  # times at which each image is noised
    times: tuple[float, float] = (0.1, 0.97)  # their range, as a share of the schedule's time
    normalise: bool = True  # divide a group's advantages by its standard deviation
    adaptive: bool = True  # weigh draws by 1 / mean |error|: less noise, and a slightly shifted minimum
    old_decay: float = 0.0  # of the running average of weights that rolls out and that steps start from; 0: the newest

    old: MovingReference = field(init=False)

    def __post_init__(self) -> None:
        self.require_positive("temperature")
        self.require_at_least(1, "draws")
        if not 0 < self.times[0] < self.times[1] < 1:  # at 1 there may be no signal, and no velocity
            raise condrl.UsageError(f"config algorithm.times: must rise within (0, 1), got {list(self.times)}")
        if not 0 <= self.old_decay < 1:
            raise condrl.UsageError(f"config algorithm.old_decay: must be in [0, 1), got {self.old_decay}")
        self.off_policy = self.old_decay > 0

    @property
    def needs(self) -> tuple[Need, ...]:
        return (groups,)

    def setup(self, policy: Policy) -> None:
        self.old = MovingReference(policy, self.old_decay)

    def after_update(self, policy: Policy) -> None:
        self.old.update(policy)

    def state_dict(self) -> dict[str, Any]:
        return self.old.state_dict() if self.old_decay else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.old_decay:
            self.old.load_state_dict(state)

    def acting(self, policy: Policy) -> AbstractContextManager[None]:
        """Within it, the policy is the old one."""
        return self.old.active(policy) if self.old_decay else nullcontext()

    def rollout(self, policy: Policy, condition: Tensor, noise: Noise, batch: int) -> Rollout:
        with self.acting(policy):
            return super().rollout(policy, condition, noise, batch)

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """Group advantages (B,), bounded by the temperature so that no density is asked to be negative."""
        return group_advantages(rewards, groups, self.normalise).clamp(-self.temperature, self.temperature)

    def examples(self, policy: Policy, experience: Experience, train: TrainConfig, noise: Noise) -> Noised:
        advantages = experience.credit(self.advantages, experience.scores.total)
        with self.acting(policy):
            return noised_samples(
                policy, experience.rollout, advantages, self.draws, self.times, train.rollout_batch, noise
            )

    def loss(self, policy: Policy, batch: Noised) -> tuple[Tensor, Metrics]:
        """temperature |d|^2 - 2 A <e, d> of each draw, (B,): d is the change of velocity, e the old one's error.

        With r = (1 + A / a) / 2 and temperature = a b this is, but for a constant, a / b times DiffusionNFT's
        r |e - b d|^2 + (1 - r) |e + b d|^2, whose minimum is at d = E[A e | x] / temperature (docs/theory.md 13).
        """
        schedule = policy.model.schedule
        alpha, sigma = (like(c, batch.x) for c in (schedule.alpha(batch.t), schedule.sigma(batch.t)))
        score = policy.model.score(batch.x, batch.t, batch.condition)
        change = (sigma / alpha * (score - batch.old_score)).flatten(1)
        error = (sigma / alpha * (-batch.noise / sigma - batch.old_score)).flatten(1)
        step = change.square().mean(1)
        loss = self.temperature * step - 2 * batch.advantage * (error * change).mean(1)
        if self.adaptive:
            loss = loss / error.abs().mean(1)
        return loss, {"velocity_change": step.detach().mean()}
