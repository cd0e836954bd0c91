"""RWR: reward-weighted regression onto noised samples (Peters and Schaal 2007), without likelihoods."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import condrl
from condrl.algorithms.base import Algorithm, Collected, Context, Experience
from condrl.algorithms.examples import Metrics
from condrl.algorithms.forward import Noised, noised_samples
from condrl.algorithms.needs import Need, epochs_for, groups
from condrl.algorithms.reference import StagedReference
from condrl.config import TrainConfig
from condrl.diffusion.noise import Noise
from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import Rollout
from condrl.diffusion.schedule import like
from condrl.prompts import Row


@condrl.algorithm(name="rwr")
@dataclass(kw_only=True)
class RWR(Algorithm):
    """Fits the score of p_old exp(r / kappa) to samples of p_old, which a round holds still (docs/theory.md 20).

    In the first round p_old is the pretrained model, later it is the policy that the last one ended with; n rounds have
    n kappa each, so that all of them together make p_pre exp(r / kappa). Weights are normalised within a prompt's
    images: a small group can tilt no further than its best image.
    """

    kappa: float = 1.0  # reward per nat of KL to the pretrained model; 0: only the best image of a group counts
    rounds: int = 1  # equal parts of the run, each with samples of the policy that it began with, and rounds * kappa
    draws: int = 4  # times at which each image is noised
    times: tuple[float, float] = (0.01, 0.99)  # their range, as a share of the schedule's time

    old: StagedReference = field(init=False)

    off_policy = True

    def __post_init__(self) -> None:
        self.require_at_least(0, "kappa")
        self.require_at_least(1, "rounds", "draws")
        if not 0 < self.times[0] < self.times[1] < 1:  # at 1 there may be no signal, and no score
            raise condrl.UsageError(f"config algorithm.times: must rise within (0, 1), got {list(self.times)}")
        self.depends_on_epochs = self.rounds > 1

    @property
    def needs(self) -> tuple[Need, ...]:
        return (groups, epochs_for("rounds", self.rounds))

    # ------------------------------------------------------------------------------------------ rounds

    def setup(self, policy: Policy) -> None:
        self.old = StagedReference(policy, self.rounds)

    def state_dict(self) -> dict[str, Any]:
        return self.old.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.old.load_state_dict(state)

    def collect(self, context: Context, rows: list[Row]) -> Collected:
        self.old.begin_epoch(context.policy, context.train.epochs)
        return super().collect(context, rows)

    def rollout(self, policy: Policy, condition: Tensor, noise: Noise, batch: int) -> Rollout:
        with self.old.active(policy):
            return super().rollout(policy, condition, noise, batch)

    # ------------------------------------------------------------------------------------------ an epoch

    def weights(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """exp(r / (rounds kappa)) over its mean in the group, (B,)."""
        _, index = groups.unique(return_inverse=True)
        zeros = torch.zeros_like(rewards)
        best = zeros.scatter_reduce(0, index, rewards, "amax", include_self=False)[index]
        tilted = ((rewards - best) / (self.rounds * self.kappa)).exp() if self.kappa else (rewards == best).to(rewards)
        return tilted / zeros.scatter_reduce(0, index, tilted, "mean", include_self=False)[index]

    def examples(self, policy: Policy, experience: Experience, train: TrainConfig, noise: Noise) -> Noised:
        weights = experience.credit(self.weights, experience.scores.total)
        with self.old.active(policy):
            found = noised_samples(
                policy, experience.rollout, weights - 1, self.draws, self.times, train.rollout_batch, noise
            )
        every = experience.gather(weights)[experience.scored]
        return replace(found, metrics={"effective_share": 1 / every.square().mean()})

    def loss(self, policy: Policy, batch: Noised) -> tuple[Tensor, Metrics]:
        """w |d|^2 - 2 (w - 1) <e, d> of each draw, (B,), d the change of the noise predicted, e the old one's error.

        It is w |d - e|^2 without -2 <e, d>, whose mean over p_old is 0 where the old score is exact: what all weights
        being 1 would teach is noise (docs/theory.md 20).
        """
        sigma = like(policy.model.schedule.sigma(batch.t), batch.x)
        score = policy.model.score(batch.x, batch.t, batch.condition)
        change = (sigma * (batch.old_score - score)).flatten(1)
        error = (batch.noise + sigma * batch.old_score).flatten(1)
        step = change.square().mean(1)
        loss = (batch.advantage + 1) * step - 2 * batch.advantage * (error * change).mean(1)
        return loss, {"noise_change": step.detach().mean()}
