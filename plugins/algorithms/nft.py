"""NFT: reward-weighted matching of the policy's own noised samples (DiffusionNFT, Zheng et al. 2025)."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

import condrl
from condrl.algorithms.base import Algorithm, Experience, OwnNetwork
from condrl.algorithms.credit import group_advantages, group_scale, leave_one_out
from condrl.algorithms.examples import Metrics
from condrl.algorithms.forward import Noised, noised_samples, scores_at
from condrl.algorithms.needs import Need, epochs_for, groups
from condrl.algorithms.reference import MovingReference, StagedReference
from condrl.algorithms.values import Value, denoised_rewards, explained_variance, make_value
from condrl.config import TrainConfig
from condrl.diffusion.noise import Noise
from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import Rollout
from condrl.diffusion.schedule import like


@condrl.algorithm
@dataclass(kw_only=True)
class NFT(Algorithm):
    """DiffusionNFT: no likelihoods, so any sampler, and far less gradient noise (Zheng et al. 2025).

    With `kappa` it settles at p ~ p_pre exp(r / kappa), to first order in r / kappa; the temperature then sets only
    the speed. `stages` reduce the error of the first order (docs/theory.md 13). With `anchor_guidance` p_pre is the
    guided model's, and the LoRA learns to do without guidance.
    """

    temperature: float = 3.0  # the larger, the smaller an epoch's step, E[A error] / (temperature + kappa)
    kappa: float = 0.0  # weight of the squared distance to the pretrained prediction; reward per nat
    anchor_guidance: float | None = None  # guidance scale of that prediction; null: as in the roll-outs
    stages: int = 1  # equal parts of the run, each anchored at the end of the one before, with stages * kappa
    draws: int = 4  # times at which each image is noised
    times: tuple[float, float] = (0.1, 0.97)  # their range, as a share of the schedule's time
    normalise: bool = True  # divide a group's advantages by its standard deviation
    adaptive: bool = True  # weigh draws by 1 / mean |error|: less noise, and a slightly shifted minimum
    baseline: Literal["group", "value"] = "group"  # a prompt's mean; or a network's at each draw, whose reward is asked
    value_lr: float = 3e-3  # learning rate of that network
    value_width: int = 64  # its hidden units
    old_decay: float = 0.0  # of the running average of weights that rolls out and that steps start from; 0: the newest

    old: MovingReference | None = field(init=False, default=None)
    anchor: StagedReference | None = field(init=False, default=None)
    value: Value | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.require_at_least(0, "temperature", "kappa")
        self.require_at_least(1, "draws", "stages")
        self.require_positive("value_lr", "value_width")
        if self.temperature + self.kappa <= 0:
            raise condrl.UsageError("config algorithm.temperature: 0 needs a kappa, or nothing bounds a step")
        if self.stages > 1 and self.kappa == 0:
            raise condrl.UsageError("config algorithm.stages: has no effect without algorithm.kappa")
        if self.anchor_guidance is not None:
            self.check_anchor_guidance(self.anchor_guidance)
        if not 0 < self.times[0] < self.times[1] < 1:  # at 1 there may be no signal, and no velocity
            raise condrl.UsageError(f"config algorithm.times: must rise within (0, 1), got {list(self.times)}")
        if not 0 <= self.old_decay < 1:
            raise condrl.UsageError(f"config algorithm.old_decay: must be in [0, 1), got {self.old_decay}")
        self.off_policy = self.old_decay > 0
        self.depends_on_epochs = self.stages > 1

    def check_anchor_guidance(self, scale: float) -> None:
        """Raises: UsageError where it would have no effect, or guide each stage anew."""
        if not 1 <= scale < math.inf:
            raise condrl.UsageError(f"config algorithm.anchor_guidance: must be at least 1, got {scale}")
        if self.kappa == 0:
            raise condrl.UsageError("config algorithm.anchor_guidance: has no effect without algorithm.kappa")
        if self.stages > 1:
            raise condrl.UsageError("config algorithm.anchor_guidance: each of several stages would be guided anew")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (groups, epochs_for("stages", self.stages))

    # ------------------------------------------------------------------------------------------ other policies

    def setup(self, policy: Policy) -> None:
        if self.anchor_guidance is not None and not hasattr(policy.model, "guided"):
            raise condrl.UsageError("config algorithm.anchor_guidance: this model has no guidance; leave it out")
        self.old = MovingReference(policy, self.old_decay) if self.old_decay else None
        self.anchor = StagedReference(policy, self.stages) if self.stages > 1 else None
        self.value = make_value(policy, self.value_width) if self.baseline == "value" else None

    def networks(self) -> dict[str, OwnNetwork]:
        return {"value": OwnNetwork(self.value, self.value_lr)} if self.value else {}

    def after_update(self, policy: Policy) -> None:
        if self.old:
            self.old.update(policy)

    def state_dict(self) -> dict[str, Any]:
        old = {"old": self.old.state_dict()} if self.old else {}
        return old | (self.anchor.state_dict() if self.anchor else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.old:
            self.old.load_state_dict(state["old"])
        if self.anchor:
            self.anchor.load_state_dict(state)

    def acting(self, policy: Policy) -> AbstractContextManager[None]:
        """Within it, the policy is the old one."""
        return self.old.active(policy) if self.old else nullcontext()

    @contextmanager
    def anchored(self, policy: Policy) -> Iterator[None]:
        """Within it, the policy is the one that it is kept near."""
        model: Any = policy.model
        weights = self.anchor.active(policy) if self.anchor else model.reference()
        with weights, model.guided(self.anchor_guidance) if self.anchor_guidance else nullcontext():
            yield

    # ------------------------------------------------------------------------------------------ an epoch

    def rollout(self, policy: Policy, condition: Tensor, noise: Noise, batch: int) -> Rollout:
        with self.acting(policy):
            return super().rollout(policy, condition, noise, batch)

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """Advantages (B,) against the images of a prompt."""
        return group_advantages(rewards, groups, self.normalise, leave_one_out=self.kappa > 0)

    def bounded(self, advantages: Tensor) -> Tensor:
        """Bounded by the temperature, if any, so that no density becomes negative."""
        return advantages.clamp(-self.temperature, self.temperature) if self.temperature else advantages

    def examples(self, policy: Policy, experience: Experience, train: TrainConfig, noise: Noise) -> Noised:
        if self.anchor:
            self.anchor.begin_epoch(policy, train.epochs)
        advantages = self.bounded(experience.credit(self.advantages, experience.scores.total))
        with self.acting(policy):
            found = noised_samples(
                policy, experience.rollout, advantages, self.draws, self.times, train.rollout_batch, noise
            )
        if self.value:
            found = self.compared_with_value(policy, experience, found, train.rollout_batch)
        if self.kappa == 0:
            return found
        with self.anchored(policy):
            return replace(found, base_score=scores_at(policy, found, train.rollout_batch))

    @torch.no_grad()
    def compared_with_value(self, policy: Policy, experience: Experience, draws: Noised, batch: int) -> Noised:
        """The draws with advantages against the value at each of them (docs/theory.md 13).

        The value is of rewards less the mean of the prompt's other images.
        """
        rewards, hints = experience.scores.total, None
        centred = experience.credit(leave_one_out, rewards)
        if len(policy.model.state_shape) > 1:
            hints = denoised_rewards(policy, experience, draws.x, draws.old_score, draws.t, batch)
            hints = hints - (rewards - centred)
        draws = replace(draws, reward=centred, hint=hints)
        pairs = draws.every_pair()
        values = [self.predicted(policy, draws.at(*some.unbind(1))) for some in pairs.split(batch)]
        errors = centred - torch.cat(values).view_as(draws.advantage)
        scale = experience.credit(group_scale, rewards) if self.normalise else torch.ones_like(rewards)
        every = (experience.gather(x)[..., experience.scored].flatten() for x in (errors, centred))
        explained = {"value_explains": explained_variance(*every)}
        return replace(draws, advantage=self.bounded(errors * scale), metrics=draws.metrics | explained)

    def predicted(self, policy: Policy, batch: Noised) -> Tensor:
        """The value (B,) of pairs."""
        assert self.value
        found: Tensor = self.value(batch.x, batch.t, policy.model.features(batch.condition), batch.hint)
        return found

    def own_loss(self, name: str, policy: Policy, batch: Noised) -> Tensor:
        """The value's squared error (B,)."""
        assert batch.reward is not None  # compared_with_value
        return (self.predicted(policy, batch) - batch.reward).square()

    def loss(self, policy: Policy, batch: Noised) -> tuple[Tensor, Metrics]:
        """temperature |d|^2 + kappa |b|^2 - 2 A <e, d> of each draw, (B,).

        d is the change of velocity, b its distance to the anchor's, e the old one's error. With r = (1 + A / a) / 2 and
        temperature = a b this is without kappa, but for a constant, a / b times DiffusionNFT's
        r |e - b d|^2 + (1 - r) |e + b d|^2, whose minimum is at d = E[A e | x] / temperature (docs/theory.md 13).
        """
        schedule = policy.model.schedule
        alpha, sigma = (like(c, batch.x) for c in (schedule.alpha(batch.t), schedule.sigma(batch.t)))
        score = policy.model.score(batch.x, batch.t, batch.condition)
        change = (sigma / alpha * (score - batch.old_score)).flatten(1)
        error = (sigma / alpha * (-batch.noise / sigma - batch.old_score)).flatten(1)
        step = change.square().mean(1)
        loss = self.temperature * step - 2 * batch.advantage * (error * change).mean(1)
        metrics = {"velocity_change": step.detach().mean()}
        if batch.base_score is not None:
            distance = (sigma / alpha * (score - batch.base_score)).flatten(1).square().mean(1)
            loss = loss + self.stages * self.kappa * distance
            metrics["base_distance"] = distance.detach().mean()
        if self.adaptive:
            loss = loss / error.abs().mean(1)
        if self.value:
            wrong = self.own_loss("value", policy, batch)
            loss, metrics["value_loss"] = loss + wrong, wrong.detach().mean()
        return loss, metrics
