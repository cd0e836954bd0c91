"""Online Diffusion-DPO: preferences between the policy's own images, by their rewards (Wallace et al. 2024)."""

from dataclasses import dataclass

import condrl
from condrl.algorithms.base import Experience
from condrl.algorithms.needs import Need, affine_steps, groups, noise
from condrl.algorithms.preferences import NoisedPairs, NoisedPreferences, contests, extremes, odds
from condrl.config import TrainConfig
from condrl.diffusion.noise import Noise
from condrl.diffusion.policy import Policy


@condrl.algorithm(name="online_dpo")
@dataclass(kw_only=True)
class OnlineDPO(NoisedPreferences):
    """diffusion_dpo's loss on the best and the worst of a prompt's new images, in place of given pairs.

    With odds exp(r - r') all pairs are preferred as often as they should be at p_pre exp(r / kappa), were the bounds
    exact; what lowers both bounds alike costs nothing, so the path KL grows with gradient noise (docs/theory.md 16).
    Every image of a set brings `draws` of its pair.
    """

    contest: int = 2  # images of a prompt of which the best and the worst are a pair
    soft: bool = True  # a pair is preferred with odds exp(r - r'); false: the better one always, as if r were sure

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(2, "contest")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (groups, contests(self.contest), affine_steps, noise)

    def examples(self, policy: Policy, experience: Experience, train: TrainConfig, noise: Noise) -> NoisedPairs:
        r, rewards = experience.rollout, experience.scores.total
        pairs = extremes(rewards, self.contest)
        preferred = odds(rewards, pairs) if self.soft else None
        return self.draw(policy, r.samples[pairs], r.condition, train.loss_batch, noise, preferred)
