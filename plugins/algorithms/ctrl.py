"""CTRL: score-as-action in continuous time (Zhao et al. 2024, 2025)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

import condrl
from condrl.algorithms.actions import Actions, action_log_prob, action_variance, explore, pretrained_scores
from condrl.algorithms.base import Algorithm, Experience, OwnNetwork
from condrl.algorithms.credit import group_scale, leave_one_out
from condrl.algorithms.examples import Metrics, RatioExamples, per_image, per_step
from condrl.algorithms.needs import Need, affine_steps, groups, noisy_steps, scores, trained_steps
from condrl.algorithms.policy_gradient import clipped
from condrl.algorithms.values import Value, denoised_rewards, explained_variance, make_value, visited_features
from condrl.config import TrainConfig
from condrl.diffusion.noise import Noise
from condrl.diffusion.path_kl import remaining
from condrl.diffusion.policy import Policy


@dataclass(frozen=True, kw_only=True)
class ActionSteps(RatioExamples):
    """The scores that an epoch's images were made with; `old_log_prob` is that of the action."""

    x: Tensor = per_step()
    action: Tensor = per_step()
    variance: Tensor = per_step()  # of the action
    advantage: Tensor = per_step()
    scale: Tensor = per_image()  # what the prompt's objective is multiplied by
    target: Tensor = per_step()  # the return that the value should predict
    base: Tensor | None = per_step(default=None)  # the pretrained score, where the KL to it counts
    hint: Tensor | None = per_step(default=None)  # r(x0hat)
    seen: Tensor | None = per_step(default=None)  # what the pretrained network makes of x, (K, B, F)

    def log_prob(self, policy: Policy) -> Tensor:
        return action_log_prob(policy.action(self.x, self.k, self.condition), self.action, self.variance)


@condrl.algorithm
@dataclass(kw_only=True)
class CTRL(Algorithm):
    """Continuous-time PPO on the score as action, for SDE and ODE samplers (Zhao et al. 2025; docs/theory.md 11).

    The policy is N(mu, Sigma), Sigma = exploration / (2 g^2); the advantage rate is the TD error of a value network in
    physical time; the running cost is kappa times the path KL of the mean, exactly. An ODE has no path KL: there the
    cost is (kappa / 2) g^2 |mu - s_pre|^2 by fiat (docs/theory.md 5).
    """

    kappa: float = 0.0  # reward per nat of path KL to the pretrained model
    exploration: float | None = 2.0  # an action's variance is this over 2 g(t)^2; null: it has the sampler's own noise
    clip_range: float = 0.2  # bound on |ratio - 1| of an action's probability
    memory: float = 5.0  # time constant of the advantage estimate, as a share of the schedule's time
    value_lr: float = 3e-3  # learning rate of the value network
    value_steps: int = 1  # its optimiser steps for each update of the policy
    value_width: int = 64  # its hidden units
    value_hint: bool | None = None  # show it the reward of the denoised state; null: for images
    value_features: bool = False  # show it the pretrained network's features of the state, for one more call a step
    leave_one_out: bool = False  # centre each step's advantage on the mean of the prompt's other images
    normalise: bool = True  # divide by the standard deviation of the rewards of a prompt's images
    advantage_clip: float = 5.0  # bound on |advantage| when normalised

    value: Value = field(init=False)

    def __post_init__(self) -> None:
        self.require_positive("clip_range", "memory", "value_lr", "value_width", "advantage_clip")
        if self.exploration is not None:
            self.require_positive("exploration")
        self.require_at_least(1, "value_steps")
        self.require_at_least(0, "kappa")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (affine_steps, noisy_steps if self.exploration is None else scores, groups)

    def setup(self, policy: Policy) -> None:
        self.value = make_value(policy, self.value_width, self.value_features)

    def networks(self) -> dict[str, OwnNetwork]:
        return {"value": OwnNetwork(self.value, self.value_lr, extra_steps=self.value_steps - 1)}

    # ------------------------------------------------------------------------------------------ roll-out

    def costs(self, policy: Policy) -> Tensor:
        """w (K,) with KL_k = w |mu - s_pre|^2: B^2 / 2 S^2, or g^2 D / 2 without noise, where there is a signal."""
        sampler = policy.sampler.affine
        assert sampler is not None  # needs
        schedule, times = policy.model.schedule, sampler.times[:-1]
        fiat = (schedule.g2(times) * -sampler.times.diff() / 2).where(schedule.alpha(times) > 0, 0.0)
        return fiat.where(sampler.S == 0, sampler.B.square() / (2 * sampler.S.square()))

    def noise_levels(self, policy: Policy) -> tuple[Tensor, Tensor]:
        """The variance of each step's action, and the std of what is added to the state beside it, (K,)."""
        sampler = policy.sampler.affine
        assert sampler is not None  # needs
        if self.exploration is None:
            return (sampler.S / sampler.B).square(), torch.zeros_like(sampler.S)
        return action_variance(policy, self.exploration), sampler.S

    def rollout(self, policy: Policy, condition: Tensor, noise: Noise, batch: int) -> Actions:
        return explore(policy, condition, noise, batch, *self.noise_levels(policy))

    # ------------------------------------------------------------------------------------------ credit

    @torch.no_grad()
    def examples(self, policy: Policy, experience: Experience, train: TrainConfig, noise: Noise) -> ActionSteps:
        r, rewards = experience.rollout, experience.scores.total
        assert isinstance(r, Actions)  # from our own rollout
        base = pretrained_scores(policy, r, train.rollout_batch) if self.kappa else None
        kl, metrics = torch.zeros_like(r.log_probs, dtype=r.means.dtype), {}
        if base is not None:
            kl = self.costs(policy).to(base).unsqueeze(1) * (r.means - base).square().flatten(2).sum(2)
            path = kl.sum(0).mean()
            metrics = {"path_kl": path, "objective": rewards.nanmean() - self.kappa * path}
        hints = None
        if self._hinted(policy):
            times = policy.sampler.times[:-1, None].expand(-1, len(rewards))
            hints = denoised_rewards(policy, experience, r.states[:-1], r.means, times, train.rollout_batch)
        seen = visited_features(policy, r, train.rollout_batch) if self.value_features else None
        values = torch.stack([self._value(policy, r, k, hints, seen) for k in range(policy.steps)] + [rewards])
        td = values[1:] - values[:-1] - self.kappa * kl
        scale = experience.credit(group_scale, rewards) if self.normalise else torch.ones_like(rewards)
        targets = rewards - self.kappa * remaining(kl)
        errors, wanted = (experience.gather(x)[:, experience.scored] for x in (targets - values[:-1], targets))
        fit = explained_variance(errors, wanted)
        metrics |= {"value_explains": fit.max(), **{f"value_explains/step_{k}": share for k, share in enumerate(fit)}}
        advantages = self._accumulate(policy, td)
        if self.leave_one_out:
            advantages = experience.credit(leave_one_out, advantages)
        advantages = advantages * scale
        if self.normalise:
            advantages = advantages.clamp(-self.advantage_clip, self.advantage_clip)
        return ActionSteps(
            condition=r.condition,
            k=trained_steps(policy.sampler, train) if self.exploration is None else torch.arange(policy.steps),
            old_log_prob=r.log_probs,
            x=r.states[:-1],
            action=r.actions,
            variance=self.noise_levels(policy)[0][:, None].expand_as(r.log_probs),
            base=base,
            advantage=advantages,
            scale=scale,
            target=targets,
            hint=hints,
            seen=seen,
            metrics=metrics,
        )

    def _accumulate(self, policy: Policy, td: Tensor) -> Tensor:
        """A_k = TD_k + exp(-D_k / l) A_{k+1}: generalised advantages with a time constant l (docs/theory.md 11)."""
        times = policy.sampler.times
        kept = (times.diff() / (self.memory * policy.model.schedule.end)).exp().tolist()
        found = torch.zeros_like(td)
        later = torch.zeros_like(td[0])
        for k in reversed(range(len(td))):
            later = found[k] = td[k] + kept[k] * later
        return found

    def _hinted(self, policy: Policy) -> bool:
        return len(policy.model.state_shape) > 1 if self.value_hint is None else self.value_hint

    def _value(self, policy: Policy, r: Actions, k: int, hints: Tensor | None, seen: Tensor | None) -> Tensor:
        t = policy.sampler.times[k].expand(len(r.condition))
        hint, more = (None if values is None else values[k] for values in (hints, seen))
        return self.value(r.states[k], t, self._features(policy, r.condition, more), hint)

    def _features(self, policy: Policy, condition: Tensor, seen: Tensor | None) -> Tensor:
        found = policy.model.features(condition)
        return found if seen is None else torch.cat([found, seen], 1)

    # ------------------------------------------------------------------------------------------ loss

    def loss(self, policy: Policy, batch: ActionSteps) -> tuple[Tensor, Metrics]:
        """PPO on the action, the running cost of its mean, the value's error times the step (docs/theory.md 11)."""
        mean = policy.action(batch.x, batch.k, batch.condition)
        log_ratio = action_log_prob(mean, batch.action, batch.variance) - batch.old_log_prob
        loss, metrics = clipped(log_ratio, batch.advantage, self.clip_range)
        if batch.base is not None:
            cost = self.costs(policy)[batch.k].to(mean) * (mean - batch.base).square().flatten(1).sum(1)
            loss = loss + self.kappa * batch.scale * cost
        error = self.own_loss("value", policy, batch)
        return loss + error, metrics | {"value_loss": error.mean()}

    def own_loss(self, name: str, policy: Policy, batch: ActionSteps) -> Tensor:
        """The value's squared error, weighed by the step (B,)."""
        times = policy.sampler.times
        features = self._features(policy, batch.condition, batch.seen)
        found = self.value(batch.x, times[batch.k], features, batch.hint)
        share = ((times[batch.k] - times[batch.k + 1]) / times[0]).to(found)
        return share * (found - batch.target).square()
