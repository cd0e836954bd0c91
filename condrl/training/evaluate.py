"""Held-out prompts, base beside tuned, from the same noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from condrl.diffusion.noise import seeded
from condrl.diffusion.path_kl import path_kl
from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import rollout, sample
from condrl.errors import drawing
from condrl.processes import Processes
from condrl.prompts import Row
from condrl.registry import sampler as samplers
from condrl.rewards.scoring import Reward, Scores, score

Draw = Callable[[Policy, Tensor, list[torch.Generator], Sequence[Row]], Tensor]  # of images: their final states
Pair = tuple[str, str]  # what is compared with what, by its names in the records
BASE_AND_TUNED: Pair = ("base", "tuned")
KL_IMAGES = 32  # by which the path KL is estimated
RESAMPLES = 4000  # of the prompts, for a bootstrap
STUDENT_T = (  # the 97.5 % quantiles of Student's t, for 1, 2, ... degrees of freedom
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045,
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its 95 % confidence interval, prompts as the unit."""

    mean: float
    ci95: tuple[float, float] | None  # None for a single prompt
    failed: int = 0  # scores that are left out of it

    @property
    def half_width(self) -> float:
        """Of the interval, on its wider side."""
        return max(self.mean - self.ci95[0], self.ci95[1] - self.mean) if self.ci95 else 0.0


@dataclass(frozen=True)
class Evaluation:
    """The measures of a policy on the held-out prompts."""

    measures: dict[str, Estimate]
    each: dict[str, Tensor]  # (P * images_per_prompt,) scores, a prompt's next to each other; nan where one failed
    scores: dict[str, Tensor]  # (P,) means of the prompts, nan where all of a prompt's scores failed
    diversity: Tensor  # (P,) root mean square deviation of a prompt's samples from their mean; nan for a single image
    pictures: list[Tensor]  # the first images (3, H, W) in [0, 1]
    labels: list[str]
    network_calls: float  # of one image


@dataclass(frozen=True)
class Batch:
    """Images drawn together, and their scores."""

    indices: range  # image i is number i % images_per_prompt of row i // images_per_prompt
    images: Tensor  # (B, 3, H, W) in [0, 1], or points (B, d)
    scores: Scores


def first_seed(run_seed: int) -> int:
    """The seed of a run's first held-out image, far from the seeds that a user would sample with."""
    return (1_000_000 + run_seed * 100_000) % 2**62


def prompt_means(scores: Tensor, images_per_prompt: int) -> Tensor:
    """(P,) of scores (P * images_per_prompt,), a prompt's images next to each other; nan are left out."""
    return scores.double().reshape(-1, images_per_prompt).nanmean(1)


def estimate(scores: Tensor, images_per_prompt: int) -> Estimate:
    """Mean and interval of scores (P * images_per_prompt,); nan are left out.

    Shares of yes and no have Wilson's interval, others Student's, within [0, 1] where all means are.
    """
    means = prompt_means(scores, images_per_prompt)
    means, failed = means[means.isfinite()], int(scores.isnan().sum())
    mean, count = means.mean().item(), len(means)
    if count <= 1:
        return Estimate(mean, None, failed)
    if ((means == 0) | (means == 1)).all():
        return Estimate(mean, wilson(mean, count), failed)
    low, high = student(means)
    share = means.min() >= 0 and means.max() <= 1
    return Estimate(mean, (max(0.0, low), min(1.0, high)) if share else (low, high), failed)


def student(values: Tensor) -> tuple[float, float]:
    """The 95 % interval of the mean of values (n,), n > 1, by Student's t (a normal one beyond 30)."""
    t = STUDENT_T[len(values) - 2] if len(values) - 2 < len(STUDENT_T) else 1.96
    mean, half = values.mean().item(), t * values.std().item() / len(values) ** 0.5
    return mean - half, mean + half


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share of `count`, within [0, 1] (Wilson 1927)."""
    centre = share + z**2 / (2 * count)
    half = z * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    scale = 1 + z**2 / count
    return min(share, (centre - half) / scale), max(share, (centre + half) / scale)


def paired_difference(base: Tensor, tuned: Tensor) -> Estimate:
    """The mean of tuned - base (P,) over prompts that have both, with a percentile bootstrap over prompts.

    Of few prompts a bootstrap's intervals are too narrow: then it is Student's.
    """
    differences = (tuned - base).double()
    differences = differences[differences.isfinite()]
    if len(differences) <= 1:
        return Estimate(differences.mean().item(), None)
    if len(differences) <= len(STUDENT_T):
        return Estimate(differences.mean().item(), student(differences))
    generator = torch.Generator().manual_seed(0)
    means = torch.stack(
        [
            differences[torch.randint(len(differences), differences.shape, generator=generator)].mean()
            for _ in range(RESAMPLES)
        ]
    )
    low, high = means.quantile(means.new_tensor([0.025, 0.975])).tolist()
    return Estimate(differences.mean().item(), (low, high))


def compared(base: Evaluation, tuned: Evaluation, names: Pair = BASE_AND_TUNED) -> dict[str, dict[str, Any]]:
    """By measure: its estimates under these names, and what `paired` finds for the prompts' means."""
    return {
        name: named((base.measures[name], tuned.measures[name]), names) | paired(base.scores[name], tuned.scores[name])
        for name in base.measures
    }


def compared_diversity(base: Evaluation, tuned: Evaluation, names: Pair = BASE_AND_TUNED) -> dict[str, Any]:
    """A row as those of `compared`, of the diversity within prompts."""
    estimates = (estimate(base.diversity, 1), estimate(tuned.diversity, 1))
    return named(estimates, names) | paired(base.diversity, tuned.diversity)


def named(estimates: tuple[Estimate, Estimate], names: Pair) -> dict[str, Any]:
    """Two estimates as records hold them."""
    return {name: dataclasses.asdict(found) for name, found in zip(names, estimates, strict=True)}


def paired(base: Tensor, tuned: Tensor) -> dict[str, Any]:
    """The paired difference of prompts (P,), the shares that are better and worse, and the win rate, ties half."""
    both = base.isfinite() & tuned.isfinite()
    better, worse = ((wins[both]).double().mean().item() for wins in (tuned > base, tuned < base))
    return {
        "difference": dataclasses.asdict(paired_difference(base, tuned)),
        "better": better,
        "worse": worse,
        "win_rate": 0.5 + (better - worse) / 2,
    }


def verdict(comparison: Mapping[str, Mapping[str, Any]], lowered: Collection[str] = ()) -> str:
    """A sentence on each measure: better or worse where the paired interval leaves out 0, or else no difference.

    Those that are `lowered`, as rewards with a negative weight are, are better lower.
    """
    verdicts: dict[str, list[str]] = {"better": [], "worse": [], "no difference shown": []}
    for name, row in comparison.items():
        low, high = row["difference"]["ci95"] or (0, 0)  # none where there is a single prompt
        if name in lowered:
            low, high = -high, -low
        verdicts["better" if low > 0 else "worse" if high < 0 else "no difference shown"].append(name)
    return "; ".join(f"{which}: {', '.join(names)}" for which, names in verdicts.items() if names)


class Diversity:
    """Takes samples, prompt after prompt; `found` has a value for each prompt that is complete.

    It is the root mean square deviation of a prompt's samples from their mean, nan for a single one.
    """

    def __init__(self, images_per_prompt: int) -> None:
        self.images_per_prompt = images_per_prompt
        self.found: list[float] = []
        self._taken, self._sum, self._squares = 0, torch.zeros(0), 0.0  # of the prompt that is not complete

    def take(self, samples: Tensor) -> None:
        """Samples (B, ...) that follow those before."""
        if self.images_per_prompt == 1:
            self.found += [float("nan")] * len(samples)
            return
        samples = samples.flatten(1).cpu()  # not every device has float64
        while len(samples):
            part, samples = samples.tensor_split([self.images_per_prompt - self._taken])
            part = part.double()
            self._sum = self._sum + part.sum(0) if self._taken else part.sum(0)
            self._squares += part.square().sum().item()
            self._taken += len(part)
            if self._taken == self.images_per_prompt:
                self._complete()

    def _complete(self) -> None:
        """E (x - m)^2 = E x^2 - m^2."""
        mean = self._sum / self._taken
        variance = self._squares / (self._taken * mean.numel()) - mean.square().mean().item()
        self.found.append(max(0.0, variance) ** 0.5)
        self._taken, self._squares = 0, 0.0


def plain(policy: Policy, condition: Tensor, generators: list[torch.Generator], rows: Sequence[Row]) -> Tensor:
    """The policy's own final states (B, ...)."""
    return sample(policy, condition, generators, len(condition))


@torch.no_grad()
def scored_batches(
    policy: Policy, rows: Sequence[Row], measures: Sequence[Reward], seeds: Sequence[int], batch: int, draw: Draw
) -> Iterator[tuple[Tensor, Scores]]:
    """Draw an image of each row from the seed beside it, `batch` at a time, and score it."""
    condition = policy.model.encode([row.prompt for row in rows])
    for start in range(0, len(rows), batch):
        part = slice(start, start + batch)
        images = policy.model.decode(draw(policy, condition[part], seeded(list(seeds[part])), rows[part]))
        yield images, score(measures, images, rows[part])
    for measure in measures:
        measure.offload()


@drawing()
def evaluate(
    policy: Policy,
    rows: Sequence[Row],
    measures: Sequence[Reward],
    seed: int,
    per_prompt: int,
    batch: int,
    pictures: int,
    processes: Processes | None = None,
    visit: Callable[[Batch], None] = lambda batch: None,
    draw: Draw = plain,
) -> Evaluation:
    """Sample `per_prompt` images of each row, image i from seed + i, and score them, each process its share.

    Two policies evaluated with the same arguments start from the same noise. The first process has the pictures.
    `draw` makes the images, by default as the policy does alone.
    `visit` sees every batch of this process as soon as it is scored.
    """
    if any(measure.per_group for measure in measures):
        batch = max(1, batch // per_prompt) * per_prompt  # a prompt's images are scored together
    prompts = len(rows)
    share = processes.local_indices(prompts) if processes else range(prompts)
    indices = range(share.start * per_prompt, share.stop * per_prompt)
    more = [rows[0]] * processes.padding(prompts) if processes else []  # sampled, and left out of what is measured
    rows = [row for row in [*(rows[i] for i in share), *more] for _ in range(per_prompt)]
    seeds = range(seed + indices.start, seed + indices.start + len(rows))
    scores: dict[str, list[Tensor]] = {measure.name: [] for measure in measures}
    preview: list[Tensor] = []
    diversity, drawn, before = Diversity(per_prompt), 0, policy.model.evaluations
    for images, found in scored_batches(policy, rows, measures, seeds, batch, draw):
        for name, values in found.each.items():
            scores[name].append(values.cpu())
        own = indices[drawn : drawn + len(images)]
        preview.extend(images[: max(0, min(pictures, len(indices)) - len(preview))].cpu())
        diversity.take(images[: len(own)])
        visit(Batch(own, images, found))
        drawn += len(images)
    each = {name: torch.cat([*values, torch.zeros(0)])[: len(indices)] for name, values in scores.items()}
    spread = torch.tensor(diversity.found, dtype=torch.float64)
    if processes:
        each = {name: processes.gather(v, indices, prompts * per_prompt) for name, v in each.items()}
        spread = processes.gather(spread, share, prompts)
    measured = {name: estimate(values, per_prompt) for name, values in each.items()}
    means = {name: prompt_means(values, per_prompt) for name, values in each.items()}
    labels, calls = [row.prompt for row in rows[: len(preview)]], policy.model.evaluations - before
    return Evaluation(measured, each, means, spread, preview, labels, calls / len(rows))


def with_path_kl(policy: Policy) -> Policy:
    """The policy, or where its steps have no density (an ODE, a solver with memory) its scores' reverse SDE, by DDPM.

    Both have the same times.
    """
    sampler = policy.sampler
    if sampler.is_markov and sampler.stochastic.any():
        return policy
    return Policy(policy.model, samplers.find("ddim").target(policy.model.schedule, sampler.times, eta=1.0))


@drawing()
@torch.no_grad()
def path_kl_to_base(policy: Policy, rows: Sequence[Row], seed: int, batch: int) -> float:
    """The path KL to the base model, nats, of an image of each of the first rows."""
    policy = with_path_kl(policy)
    condition = policy.model.encode([row.prompt for row in rows[:KL_IMAGES]])
    drawn = rollout(policy, condition, torch.Generator().manual_seed(seed), batch)
    return path_kl(policy, drawn, batch).kl.sum(0, dtype=torch.float64).mean().item()
