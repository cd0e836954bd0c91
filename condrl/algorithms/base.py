"""What an algorithm is given, and what it provides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from condrl.config import TrainConfig
from condrl.diffusion.noise import Noise
from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import Rollout, rollout
from condrl.diffusion.transition import Sampler
from condrl.errors import RunError, UsageError
from condrl.processes import Processes
from condrl.prompts import Row
from condrl.rewards.scoring import Scores

Metrics = dict[str, Tensor]
RATIO_TOLERANCE = {"full": 1e-3, "half": 2e-2}  # by the precision of the frozen weights
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
    preview: Tensor  # (P, ...) the first sample of the first prompts
    score: Callable[[Tensor, Tensor], Tensor]  # the total reward (b,) of samples (b, ...) for the images (b,)'s rows
    processes: Processes
    indices: range  # of these images among those of all processes
    total: int  # how many those are
    scored: Tensor  # (total,) bool: which of those have a score

    @property
    def groups(self) -> Tensor:
        """(B,) the prompt row of each image."""
        return torch.tensor([row.index for row in self.rows], device=self.scores.total.device)

    def gather(self, x: Tensor) -> Tensor:
        """Values (..., total) of all processes' images from those of these (..., B)."""
        return self.processes.gather(x, self.indices, self.total)

    def credit(self, f: Callable[[Tensor, Tensor], Tensor], values: Tensor) -> Tensor:
        """f(values, groups) of all processes' images that have a score, (..., B) of these; 0 for those that do not."""
        whole, scored = self.gather(values), self.scored
        found = torch.zeros_like(whole)
        found[..., scored] = f(whole[..., scored], self.gather(self.groups)[scored])
        return found[..., self.indices.start : self.indices.stop]


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


def check_ratios(examples: RatioExamples, policy: Policy, batch: int, most: int | None = None) -> None:
    """Compare the update's own log-probabilities, at most so many, with those that it takes for the roll-out's.

    `batch` pairs are taken at a time, as an update does.

    Raises: RunError unless every likelihood ratio is 1.
    """
    pairs = every_pair(examples)
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))][:most]
    worst = 0.0
    for part in pairs.split(batch):
        some = examples.minibatch(*part.unbind(1))
        log_prob = some.log_prob(policy)  # with gradients, as the update does
        worst = max(worst, (log_prob - some.old_log_prob).exp().sub(1).abs().max().item())
    allowed = RATIO_TOLERANCE["half" if has_half_precision(policy) else "full"]
    if not worst <= allowed:
        raise RunError(
            f"before the first update every likelihood ratio should be 1, but one is off by {worst:.2g} "
            f"(allowed: {allowed:g}): the loss does not see the policy that was rolled out. Dropout, or kernels "
            "whose result depends on the batch, can cause this; model.dtype=float32 and "
            "train.loss_batch=train.rollout_batch reduce it, run.check_ratios=false goes on regardless."
        )


def has_half_precision(policy: Policy) -> bool:
    """Whether the frozen weights have half precision."""
    return any(p.dtype.itemsize == 2 for p in policy.model.module.parameters())


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


# ---------------------------------------------------------------------------------------------- policy gradients


# ---------------------------------------------------------------------------------------------- forward process


def trained_steps(sampler: Sampler, train: TrainConfig) -> Tensor:
    """The steps that have a log-probability and that the config trains.

    Raises: UsageError when the config names another step, or wants more per image than there are.
    """
    stochastic = sampler.stochastic.nonzero().flatten().tolist()
    chosen = stochastic if train.steps is None else train.steps
    wrong = sorted(set(chosen) - set(stochastic))
    if wrong or not chosen:
        raise UsageError(f"config train.steps: {wrong or chosen} are not among the steps with noise, {stochastic}")
    if train.steps_per_image is not None and not 1 <= train.steps_per_image <= len(chosen):
        raise UsageError(f"config train.steps_per_image: {train.steps_per_image} of the {len(chosen)} trained steps")
    return torch.tensor(sorted(set(chosen)))
