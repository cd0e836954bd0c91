"""Says in plain language what is going wrong in a run, with what to try; silent while all is well."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from condrl.algorithms.base import Experience

Line = Mapping[str, float]  # what an epoch recorded


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


def collapse(first: Line, line: Line) -> str | None:
    if line.get("diversity", 1.0) >= 0.1 * first.get("diversity", 0.0):
        return None
    return (
        f"the images of a prompt differ {line['diversity'] / first['diversity']:.0%} as much as at the start: the "
        "policy has collapsed; try algorithm.kappa (a KL to the pretrained model) or a lower train.lr"
    )


def value_network(first: Line, line: Line) -> str | None:
    if line.get("value_explains", 1.0) >= 0.02 or line["updates"] < 50:
        return None
    return (
        f"the value network explains {max(0.0, line['value_explains']):.0%} of how returns differ, at the step where "
        "it explains most: it does not help; try another algorithm.value_lr, algorithm.value_hint=true, or grpo"
    )


def kl_budget(first: Line, line: Line) -> str | None:
    if line.get("base_kl", 0.0) <= line.get("kl_budget", float("inf")):
        return None
    return (
        f"the path KL to the base model, {line['base_kl']:.3g} nats, is over train.kl_budget={line['kl_budget']:g}: "
        "try a larger algorithm.kappa, a lower train.lr or fewer epochs"
    )


def reward_hacking(first: Line, line: Line) -> str | None:
    names = [n for n in line if n.startswith("heldout/") and f"{n}_ci95" in first and f"{n}_ci95" in line]
    if not names or "reward/total" not in line:
        return None
    gained = line["reward/total"] - first["reward/total"]
    if gained < 4 * first["reward/total_std"] / first["images"] ** 0.5:
        return None
    fallen = [n for n in names if line[n] + line[f"{n}_ci95"] < first[n] - first[f"{n}_ci95"]]
    if not fallen:
        return None
    drops = ", ".join(f"{n.removeprefix('heldout/')} from {first[n]:.3g} to {line[n]:.3g}" for n in fallen)
    return (
        f"the reward rose by {gained:.3g} while held-out measures fell ({drops}): the policy exploits the reward; try "
        "a larger algorithm.kappa, train.kl_budget, fewer epochs, or these measures as further rewards"
    )


CHECKS: tuple[Callable[[Line, Line], str | None], ...] = (
    flat_groups,
    clipping,
    ratios,
    no_gradient,
    collapse,
    value_network,
    kl_budget,
    reward_hacking,
)


def diagnose(first: Line, line: Line) -> dict[str, str]:
    """What is wrong with an epoch, by the name of the check; `first` is what the run's first epoch recorded."""
    found = {check.__name__: check(first, line) for check in CHECKS}
    return {name: text for name, text in found.items() if text}
