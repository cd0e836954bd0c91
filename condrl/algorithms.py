"""What an algorithm is given, and what it provides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from condrl.config import TrainConfig
from condrl.credit import group_advantages, group_scale
from condrl.errors import UsageError
from condrl.noise import Noise
from condrl.policy import Policy
from condrl.processes import Processes
from condrl.prompts import Row
from condrl.rewards import Scores
from condrl.rollout import Rollout, rollout
from condrl.schedule import like
from condrl.transition import Transition, trained_steps

MAX_LOG_RATIO = 20.0  # nats: no float32 overflow where the min leaves the ratio unbounded (negative advantages)

Metrics = dict[str, Tensor]
# noise: some steps have it; stochastic steps: and `train.steps` chooses among them; affine steps: a sampler that is
# three numbers per step; Markov steps: none depends on earlier ones; groups: several images of a prompt in an epoch;
# one pass: one update on each image
Need = Literal["noise", "stochastic steps", "affine steps", "Markov steps", "groups", "one pass", "reward gradients"]


@dataclass(frozen=True)
class Experience:
    """An epoch's trajectories with what was made of them; B images, this process's share of all."""

    rollout: Rollout
    rows: list[Row]
    scores: Scores
    shown: Tensor  # (P, ...) the first sample of the first prompts
    score: Callable[[Tensor, Tensor], Tensor]  # the total reward (b,) of samples (b, ...) for the images (b,)'s rows
    processes: Processes
    places: range  # of these images among those of all processes
    total: int  # how many those are
    good: Tensor  # (total,) bool: which of those have a score

    @property
    def groups(self) -> Tensor:
        """(B,) the prompt row of each image."""
        return torch.tensor([row.index for row in self.rows], device=self.scores.total.device)

    def everyone(self, x: Tensor) -> Tensor:
        """Values (..., total) of all processes' images from those of these (..., B)."""
        return self.processes.gather(x, self.places, self.total)

    def credit(self, f: Callable[[Tensor, Tensor], Tensor], values: Tensor) -> Tensor:
        """f(values, groups) of all processes' images that have a score, (..., B) of these; 0 for those that do not."""
        everyone, good = self.everyone(values), self.good
        found = torch.zeros_like(everyone)
        found[..., good] = f(everyone[..., good], self.everyone(self.groups)[good])
        return found[..., self.places.start : self.places.stop]


class Examples(Protocol):
    """What a loss is averaged over: so many columns for each of B images."""

    @property
    def images(self) -> int:
        """B."""
        ...

    @property
    def metrics(self) -> Metrics:
        """Means to log."""
        ...

    @property
    def columns(self) -> Tensor:
        """(n,) the columns that are trained."""
        ...

    def minibatch(self, images: Tensor, columns: Tensor) -> Any:
        """The entries (images[i], columns[i])."""
        ...


@runtime_checkable
class RatioExamples(Examples, Protocol):
    """Examples whose minibatches have `old_log_prob` and `log_prob(policy)`."""

    def with_log_probs(self, log_probs: Tensor) -> RatioExamples:
        """These with other old log-probabilities (K, B)."""
        ...


def every_pair(examples: Examples) -> Tensor:
    """All (image, column) pairs, (B * n, 2), ordered by column as a roll-out is."""
    return torch.cartesian_prod(examples.columns, torch.arange(examples.images)).flip(1)


@torch.no_grad()
def recomputed(examples: RatioExamples, policy: Policy, batch: int) -> RatioExamples:
    """The examples with their log-probabilities recomputed, `batch` pairs at a time as an update does.

    In half precision the result of a network depends on its batch by far more than a ratio may be off.
    """
    log_probs = torch.full((policy.steps, examples.images), torch.nan, dtype=torch.float64, device=policy.model.device)
    for part in every_pair(examples).split(batch):
        images, k = part.to(log_probs.device).unbind(1)
        log_probs[k, images] = examples.minibatch(*part.unbind(1)).log_prob(policy)
    return examples.with_log_probs(log_probs)


class Algorithm:
    """The base of algorithm plugins, which are dataclasses: a field is an option. What they do not say is as here."""

    kappa: float  # reward per nat of path KL to the pretrained model, where an algorithm has one
    off_policy = False  # whether what it rolls out is not the policy's own

    def require_positive(self, *options: str) -> None:
        """Raises: UsageError on an option that is 0 or less."""
        for name in options:
            if getattr(self, name) <= 0:
                raise UsageError(f"config algorithm.{name}: must be positive, got {getattr(self, name)}")

    def require_at_least(self, least: int, *options: str) -> None:
        """Raises: UsageError on an option that is less."""
        for name in options:
            if getattr(self, name) < least:
                raise UsageError(f"config algorithm.{name}: must be at least {least}, got {getattr(self, name)}")

    @property
    def needs(self) -> Sequence[Need]:
        """What it cannot do without."""
        return ()

    def setup(self, policy: Policy) -> None:
        """Make what depends on the policy."""

    def modules(self) -> dict[str, tuple[nn.Module, float]]:
        """Networks of its own that are trained with the policy, by name, with their learning rates."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What else it remembers from epoch to epoch: dicts and lists of tensors and JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""

    def rollout(self, policy: Policy, condition: Tensor, noise: Noise, batch: int) -> Rollout:
        """Trajectories for conditions (B,), `batch` at a time."""
        return rollout(policy, condition, noise, batch)

    def examples(self, policy: Policy, experience: Experience, train: TrainConfig, noise: Noise) -> Examples:
        """What `loss` is given, in parts, with the credit of each image or step."""
        raise NotImplementedError

    def loss(self, policy: Policy, batch: Any) -> tuple[Tensor, Metrics]:
        """The loss of each entry (B,), and means to log."""
        raise NotImplementedError


@dataclass(frozen=True)
class Steps:
    """B (image, step) pairs."""

    x: Tensor  # (B, ...) state before the step
    k: Tensor  # (B,) step index
    next_x: Tensor  # (B, ...) state after it
    old_log_prob: Tensor  # (B,) nats, at roll-out
    advantage: Tensor  # (B,)
    condition: Tensor  # (B,)
    memory: Tensor | None = None  # (B, ...) of a multi-step sampler
    base: Transition | None = None  # the pretrained model's law of `next_x`
    kl_weight: Tensor | None = None  # (B,) of the KL to it

    def law(self, policy: Policy) -> Transition:
        """The policy's law of `next_x`."""
        return policy.transition(self.x, self.k, self.condition, self.memory)

    def log_prob(self, policy: Policy) -> Tensor:
        """What `old_log_prob` is under this policy."""
        return self.law(policy).log_prob(self.next_x)


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
            memory=None if r.memories is None else r.memories[k, where],
            base=None if self.base is None else self.base.law(k, where),
            kl_weight=None if self.kl_weights is None else self.kl_weights[where],
        )

    def with_log_probs(self, log_probs: Tensor) -> Transitions:
        return replace(self, rollout=replace(self.rollout, log_probs=log_probs))


# ---------------------------------------------------------------------------------------------- policy gradients


@dataclass(frozen=True)
class PathKL:
    """The pretrained model's laws along trajectories, and the KL of each of their steps."""

    means: Tensor  # (K, B, ...)
    stds: Tensor  # (K, B)
    kl: Tensor  # (K, B) nats, 0 where a step is deterministic

    def law(self, k: Tensor, images: Tensor) -> Transition:
        means = self.means[k, images]
        return Transition(means, like(self.stds[k, images], means))

    @property
    def to_go(self) -> Tensor:
        """(K, B) the sum over the steps after k."""
        return self.kl.flip(0).cumsum(0).flip(0) - self.kl


@torch.no_grad()
def path_kl(policy: Policy, rollout: Rollout, batch: int) -> PathKL:
    """KL(current || pretrained) of each step at the visited states, `batch` images at a time (THEORY 2.2)."""
    count = len(rollout.condition)
    means = torch.zeros_like(rollout.states[1:])
    stds, kl = (means.new_zeros(policy.steps, count) for _ in range(2))
    for k in policy.sampler.stochastic.nonzero().flatten().tolist():
        for start in range(0, count, batch):
            rows = slice(start, start + batch)
            x, condition = rollout.states[k, rows], rollout.condition[rows]
            memory = None if rollout.memories is None else rollout.memories[k, rows]
            place = x, torch.full((len(x),), k), condition, memory
            law = policy.transition(*place)
            with policy.model.reference():
                base = policy.transition(*place)
            means[k, rows], stds[k, rows], kl[k, rows] = base.mean, base.std.flatten(), law.kl(base)
    return PathKL(means, stds, kl)


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
        law = batch.law(policy)
        loss, metrics = self.surrogate(policy, law, batch)
        if batch.base is not None and batch.kl_weight is not None:
            loss = loss + batch.kl_weight * law.kl(batch.base)
        return loss, metrics

    def surrogate(self, policy: Policy, law: Transition, batch: Steps) -> tuple[Tensor, Metrics]:
        """A loss (B,) whose gradient at the roll-out's policy is -A grad log p, and means to log."""
        raise NotImplementedError


@dataclass(kw_only=True)
class ClippedPolicyGradient(PolicyGradient):
    """PPO's clipped importance weights, for several updates on an epoch's images (Schulman et al. 2017)."""

    clip_range: float = 0.2  # bound on |ratio - 1| for a step of 1/50 of the time; others scale with sqrt(step)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("clip_range")

    def surrogate(self, policy: Policy, law: Transition, batch: Steps) -> tuple[Tensor, Metrics]:
        """PPO's loss with a bound that scales with the square root of the step (THEORY 9.2)."""
        times = policy.sampler.times
        step = (times[batch.k] - times[batch.k + 1]) / times[0]
        bound = self.clip_range * (50 * step).sqrt()
        return clipped(law.log_prob(batch.next_x) - batch.old_log_prob, batch.advantage, bound)


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


# ---------------------------------------------------------------------------------------------- forward process


@dataclass(frozen=True)
class Noised:
    """B draws of the forward process, x = alpha(t) x_N + sigma(t) noise, from the policy's own samples x_N."""

    x: Tensor  # (B, ...)
    t: Tensor  # (B,) float64
    noise: Tensor  # (B, ...)
    old_score: Tensor  # (B, ...) at (x, t), of the policy that made the samples
    advantage: Tensor  # (B,)
    condition: Tensor  # (B,)


@dataclass(frozen=True)
class NoisedSamples:
    """An epoch's final states, each noised n times; a column is a draw."""

    draws: Noised  # (n * B, ...): every image's first draw, then every image's second, ...
    columns: Tensor  # (n,)
    metrics: Metrics = field(default_factory=dict)

    @property
    def images(self) -> int:
        return len(self.draws.t) // len(self.columns)

    def minibatch(self, images: Tensor, columns: Tensor) -> Noised:
        rows = columns * self.images + images
        values = (getattr(self.draws, f.name) for f in fields(Noised))
        return Noised(*(value[rows.to(value.device)] for value in values))


@torch.no_grad()
def noised_samples(
    policy: Policy,
    rollout: Rollout,
    advantages: Tensor,
    draws: int,
    times: tuple[float, float],
    batch: int,
    noise: Noise,
) -> NoisedSamples:
    """Noise each final state `draws` times, at times stratified over a range of shares of the schedule's time.

    `advantages` (B,) are those of the images.
    """
    clean, condition, schedule = rollout.samples, rollout.condition, policy.model.schedule
    low, high = times
    strata = (torch.arange(draws)[:, None] + noise.uniform((draws,)).T).flatten() / draws
    t = schedule.end * (low + (high - low) * strata).double()
    errors = noise.normal((draws, *clean.shape[1:])).transpose(0, 1).flatten(0, 1).to(clean.device)
    clean, condition, advantage = (torch.cat([v] * draws) for v in (clean, condition, advantages))
    alpha, sigma = (like(c, clean) for c in (schedule.alpha(t), schedule.sigma(t)))
    x = alpha * clean + sigma * errors
    with policy.model.merged():
        parts = [
            policy.model.score(*part)
            for part in zip(x.split(batch), t.split(batch), condition.split(batch), strict=True)
        ]
    return NoisedSamples(Noised(x, t, errors, torch.cat(parts), advantage, condition), torch.arange(draws))
