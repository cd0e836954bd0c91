"""Says in plain language what is going wrong in a run, with what to try; silent while all is well."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from condrl.algorithms.base import Experience

Line = Mapping[str, float]  # what an epoch recorded
WINDOW = 10  # epochs that are averaged
GROWTH = 5  # of the gradient's norm, that is too much


def spread_metrics(experience: Experience) -> dict[str, float]:
    """How the images of a prompt differ; nothing where a prompt has one image.

    `flat_groups` is the share of prompts with one reward for all their images, `diversity` the root mean square
    deviation of the samples from their prompt's mean.
    """
    whole, indices = experience.gather(experience.groups), experience.indices
    _, index, count = whole.unique(return_inverse=True, return_counts=True)
    several, own = count > 1, index[indices.start : indices.stop]
    if not several.any():
        return {}
    rewards, scored = experience.gather(experience.scores.total)[experience.scored], index[experience.scored]
    nothing = rewards.new_zeros(len(count))
    high, low = (nothing.scatter_reduce(0, scored, rewards, r, include_self=False) for r in ("amax", "amin"))
    samples = experience.rollout.samples.flatten(1)
    sums = samples.new_zeros(len(count), samples.shape[1]).index_add(0, own, samples)
    mean = experience.processes.sum(sums) / count[:, None]
    spread = experience.gather((samples - mean[own]).square().mean(1))[several[index]].mean().sqrt()
    return {"flat_groups": (high == low)[several].float().mean().item(), "diversity": spread.item()}


def flat_groups(first: Line, line: Line) -> str | None:
    if line.get("flat_groups", 0.0) < 0.9:
        return None
    return (
        f"{line['flat_groups']:.0%} of the prompts gave all their images the same reward, which teaches nothing: "
        "try more train.images_per_prompt, prompts neither too easy nor too hard, or a reward with finer grades"
    )


def clipping(first: Line, line: Line) -> str | None:
    if line.get("clip_fraction", 0.0) < 0.5:
        return None
    return (
        f"{line['clip_fraction']:.0%} of the likelihood ratios left the clip range, so most of the update is lost: "
        "try a lower train.lr, fewer train.inner_epochs, or fewer train.updates_per_epoch"
    )


def ratios(first: Line, line: Line) -> str | None:
    if line.get("approx_kl", 0.0) < 1.0:
        return None
    return (
        f"an update moved the policy by {line['approx_kl']:.2g} nats a step, far beyond what its images can vouch for: "
        "try a lower train.lr"
    )


def no_gradient(first: Line, line: Line) -> str | None:
    if line.get("grad_norm", 1.0) > 0:
        return None
    return "the gradient is zero: check that the rewards differ, and train.steps and model.lora_targets"


def value_network(first: Line, line: Line) -> str | None:
    if line.get("value_explains", 1.0) >= 0.02 or line["updates"] < 50:
        return None
    return (
        f"the value network explains {max(0.0, line['value_explains']):.0%} of how returns differ, at the step where "
        "it explains most: it does not help; try another algorithm.value_lr, or compare the images of a prompt alone: "
        "grpo, or nft with algorithm.baseline=group"
    )


def kl_budget(first: Line, line: Line) -> str | None:
    if line.get("base_kl", 0.0) <= line.get("kl_budget", float("inf")):
        return None
    return (
        f"the path KL to the base model, {line['base_kl']:.3g} nats, is over train.kl_budget={line['kl_budget']:g}: "
        "try a larger algorithm.kappa, a lower train.lr or fewer epochs"
    )


def measured(line: Line) -> list[str]:
    """The names of the measures of held-out or validation prompts that have an interval."""
    return [n for n in line if n.startswith(("heldout/", "validation/")) and f"{n}_ci95" in line]


def direction(name: str, lowered: Collection[str]) -> int:
    """1 if a measure such as heldout/clip is better when it is higher, -1 if lower."""
    return -1 if name.partition("/")[2] in lowered else 1


def reward_hacking(first: Line, lines: Sequence[Line], lowered: Collection[str]) -> str | None:
    line = lines[-1]
    names = [n for n in measured(line) if f"{n}_ci95" in first]
    if not names or "reward/total" not in line:
        return None
    gained = line["reward/total"] - first["reward/total"]
    if gained < 4 * first["reward/total_std"] / first["images"] ** 0.5:
        return None
    apart = {n: line[f"{n}_ci95"] + first[f"{n}_ci95"] for n in names}
    worse = [n for n in names if direction(n, lowered) * (first[n] - line[n]) > apart[n]]
    if not worse:
        return None
    changes = ", ".join(f"{n} from {first[n]:.3g} to {line[n]:.3g}" for n in worse)
    return (
        f"the reward rose by {gained:.3g} while held-out measures got worse ({changes}): the policy exploits the "
        "reward; try a larger algorithm.kappa, train.kl_budget, fewer epochs, or these measures as further rewards"
    )


def collapse(first: Line, lines: Sequence[Line], lowered: Collection[str]) -> str | None:
    line = lines[-1]
    then = next(old for old in [first, *lines] if old.get("window") == line.get("window"))  # fewer steps' noise, less
    if line.get("diversity", 1.0) >= 0.1 * then.get("diversity", 0.0):
        return None
    return (
        f"the images of a prompt differ {line['diversity'] / then['diversity']:.0%} as much as at the start: the "
        "policy has collapsed; try algorithm.kappa (a KL to the pretrained model) or a lower train.lr"
    )


def best_line(name: str, lines: Sequence[Line], lowered: Collection[str]) -> Line:
    """That of the epoch in which a measure was best."""
    return max((line for line in lines if name in line), key=lambda line: direction(name, lowered) * line[name])


def rewards_hold(evaluated: Sequence[Line], lowered: Collection[str]) -> bool:
    """Whether what is rewarded is measured on other prompts too, and is within its interval of its best there."""
    now = evaluated[-1] if evaluated else {}
    names = [n for n in measured(now) if f"reward/{n.partition('/')[2]}" in now]
    falls = {n: abs(best_line(n, evaluated, lowered)[n] - now[n]) for n in names}
    return bool(names) and all(falls[n] <= now[f"{n}_ci95"] for n in names)


def reward_fell(first: Line, lines: Sequence[Line], lowered: Collection[str]) -> str | None:
    means = smoothed(lines, "reward/total")
    if len(means) < 2 or rewards_hold([line for line in lines if measured(line)], lowered):
        return None
    best, now = max(means, key=lambda m: m.mean), means[-1]
    if best.mean - now.mean < max(4 * math.hypot(best.error, now.error), 0.1 * best.spread):
        return None
    return (
        f"the training reward has fallen from {best.mean:.3g} around epoch {best.epoch:.0f} to {now.mean:.3g}: the "
        "policy has gone too far; end there, or try a lower train.lr, or a larger algorithm.kappa"
    )


def gradient_growth(first: Line, lines: Sequence[Line], lowered: Collection[str]) -> str | None:
    norms = [line["grad_norm"] for line in lines if "grad_norm" in line]
    if len(norms) < 3 * WINDOW:
        return None
    early, now = (statistics.median(part) for part in (norms[WINDOW : 2 * WINDOW], norms[-WINDOW:]))
    if early == 0 or now < GROWTH * early:  # where it is 0, `no_gradient` says so
        return None
    return (
        f"the gradient's norm has grown {now / early:.0f}-fold since epochs {WINDOW + 1} to {2 * WINDOW}, as before a "
        "collapse: try a lower train.lr, a larger train.images_per_prompt, or algorithm.kappa"
    )


def drift(first: Line, lines: Sequence[Line], lowered: Collection[str]) -> str | None:
    means = smoothed(lines, "reward/total")
    recorded = [(line["epoch"], line.get("base_kl", line.get("path_kl"))) for line in lines]
    kl = [(epoch, value) for epoch, value in recorded if value is not None]
    if not means or not kl:
        return None
    best = max(means, key=lambda m: m.mean)
    reached = next(m for m in means if m.mean >= best.mean - 2 * math.hypot(m.error, best.error))
    then = next((value for epoch, value in kl if epoch >= reached.epoch), math.inf)
    now = min(value for _, value in kl[-2:])  # of a few images, one may be large by chance
    if lines[-1]["epoch"] < reached.epoch + 2 * WINDOW or now < 2 * then:
        return None
    since = [line for line in lines if line["epoch"] >= reached.epoch and measured(line)]
    if since and any(direction(n, lowered) * (since[-1][n] - since[0][n]) > 0 for n in measured(since[0])):
        return None  # slow, but not without reward
    return (
        f"since epoch {reached.epoch:.0f} the path KL to the base model has grown from {then:.3g} to {now:.3g} "
        "nats without more reward: end there, or try a lower train.lr, or a larger algorithm.kappa"
    )


def heldout_fell(first: Line, lines: Sequence[Line], lowered: Collection[str]) -> str | None:
    base = {**first, "epoch": 0}
    for name in measured(lines[-1]):
        best = best_line(name, [base, *lines], lowered)
        change = lines[-1][name] - best[name]
        if abs(change) > lines[-1][f"{name}_ci95"]:
            when = f"after epoch {best['epoch']:.0f}" if best["epoch"] else "before tuning"
            return (
                f"{name} has {'fallen' if change < 0 else 'risen'} from {best[name]:.3g} {when} to "
                f"{lines[-1][name]:.3g}, by more than its interval: end there, or try a lower train.lr, or a larger "
                "algorithm.kappa"
            )
    return None


@dataclass(frozen=True)
class Smoothed:
    """The mean over some epochs, the last of which is `epoch`."""

    epoch: float
    mean: float
    error: float  # standard error of the mean
    spread: float  # standard deviation of single images


def smoothed(lines: Sequence[Line], name: str) -> list[Smoothed]:
    """A measure's means over windows of epochs, counted from the newest back."""
    found = []
    for end in range(len(lines), WINDOW - 1, -WINDOW):
        part = lines[end - WINDOW : end]
        if any(name not in line for line in part):
            break
        values = [line[name] for line in part]
        error = statistics.stdev(values) / WINDOW**0.5
        spread = statistics.mean(line.get(f"{name}_std", 0.0) for line in part)
        found.append(Smoothed(part[-1]["epoch"], statistics.mean(values), error, spread))
    return found[::-1]


CHECKS: tuple[Callable[[Line, Line], str | None], ...] = (  # of an epoch, beside the first
    flat_groups,
    clipping,
    ratios,
    no_gradient,
    value_network,
    kl_budget,
)


TRENDS: tuple[Callable[[Line, Sequence[Line], Collection[str]], str | None], ...] = (
    collapse,
    reward_fell,
    gradient_growth,
    drift,
    reward_hacking,
    heldout_fell,
)


def diagnose(first: Line, lines: Sequence[Line], lowered: Collection[str] = ()) -> dict[str, str]:
    """What is wrong after the last of a run's epochs, by the name of the check.

    `first` is what the first epoch recorded, with the base model's held-out measures; `lowered` are the rewards whose
    weight is negative.
    """
    found = {check.__name__: check(first, lines[-1]) for check in CHECKS}
    found |= {check.__name__: check(first, lines, lowered) for check in TRENDS}
    return {name: text for name, text in found.items() if text}
