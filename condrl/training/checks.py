"""Combinations that cannot work, refused before any work."""

from __future__ import annotations

from collections.abc import Sequence

from condrl.algorithms.base import Algorithm
from condrl.algorithms.needs import Setting, affine_steps, check_needs, noisy_steps
from condrl.config import Config, TrainConfig, base_name
from condrl.diffusion.transition import Sampler
from condrl.errors import UsageError, blaming
from condrl.prompts import Row, duplicate_note
from condrl.training.build import make_algorithm, make_sampler, stand_in, weights_in_words
from condrl.training.optimizer import check_optimizer


def announcement(
    config: Config, train: Sequence[Row], heldout: Sequence[Row], validation: Sequence[Row] = ()
) -> list[str]:
    """Lines to print before a run: its rewards, prompts and measures."""
    lines = [f"rewards: {weights_in_words(config)}", f"prompts: {config.prompts.train} ({len(train)})"]
    for name, rows in (("train", train), ("heldout", heldout), ("validation", validation)):
        if note := duplicate_note(rows):
            lines.append(f"prompts.{name}: {note}")
    for name, rows, others, use in (
        ("held-out", heldout, train, "trained on"),
        ("validation", validation, train, "trained on"),
        ("held-out", heldout, validation, "used for validation"),
    ):
        if both := {row.prompt for row in rows} & {row.prompt for row in others}:
            lines.append(f"warning: {len(both)} of the {name} prompts are {use} too, such as {min(both)!r}")
    if heldout:
        names = ", ".join(dict.fromkeys([*config.evaluate.measures, *config.weighted]))
        what = f"base and tuned: {names}" if names else "by nothing: name measures, as in evaluate.measures.shapes={}"
        lines.append(f"measured on {config.prompts.heldout} ({len(heldout)}), {what}")
        lines += [f"the base is {base_name(config.model)}"] * bool(config.model.get("lora"))
    elif not validation and (config.evaluate.measures or config.evaluate.every or config.evaluate.sampler):
        lines.append("evaluate.* has no effect without prompts.heldout: nothing will be measured")
    if validation:
        by = " + ".join(config.weighted or config.evaluate.measures)
        lines.append(f"the best epoch is chosen on {config.prompts.validation} ({len(validation)}), by {by}")
    return lines


def noise_level(sampler: Sampler) -> float | None:
    """A sampler's eta; None where its steps differ or it does not say."""
    levels = sampler.noise_level
    return levels[0].item() if levels is not None and (levels == levels[0]).all() else None


def transfer(eta: float, deployed: float) -> float:
    """M(eta, eta'): how far a policy tuned at eta moves the mean when sampled at eta', over what kappa asks for.

    Exact for a Gaussian and a linear reward (docs/theory.md 7). 1 for eta = 1.
    """
    return 2 * eta**2 * (1 + deployed**2) / ((1 + eta**2) * (eta**2 + deployed**2))


def transfer_warning(config: Config) -> str | None:
    """A warning for a config that tunes at one noise level and evaluates at another; None when none is needed."""
    algorithm = make_algorithm(config)
    if not config.evaluate.sampler or not {noisy_steps, affine_steps} & set(algorithm.needs):
        return None
    tuned, used = (noise_level(make_sampler(s, stand_in(s))) for s in (config.sampler, config.evaluate.sampler))
    if not tuned or used is None or tuned in (1.0, used):
        return None
    return (
        f"tuned at eta={tuned:.3g}, evaluated at eta={used:.3g}: a Gaussian's mean would move "
        f"{transfer(tuned, used):.2f} times as far as it should; "
        "only what is tuned at eta=1 can be sampled at any eta"
    )


def check_combination(config: Config) -> None:
    """Check what depends on the sampler, on a stand-in schedule: no model is loaded.

    Raises: UsageError when the sampler cannot give the algorithm or the config what it needs, or a package is missing.
    """
    check_optimizer(config.train.optimizer)
    if config.model.get("quantize") and config.train.rollout_dtype not in (None, "auto"):
        raise UsageError(
            "config train.rollout_dtype: layers of model.quantize compute in model.dtype whatever it says: set "
            "train.rollout_dtype=null, and model.dtype=bfloat16"
        )
    sampler = make_sampler(config.sampler, stand_in(config.sampler))
    if config.evaluate.sampler:
        make_sampler(config.evaluate.sampler, stand_in(config.evaluate.sampler))
    algorithm = make_algorithm(config)
    check_rewards(config, algorithm)
    check_policy_is_trained(config, algorithm)
    if config.train.kl_budget is not None:
        check_budget(config, algorithm)
    with blaming("algorithm", config.algorithm["name"]):
        check_needs(algorithm.needs, Setting(config, sampler))


def check_rewards(config: Config, algorithm: Algorithm) -> None:
    """Raises: UsageError when there is no reward to learn from, or when there are some and they would be ignored."""
    if algorithm.uses_rewards and not config.weighted:
        raise UsageError("config rewards: no reward has a weight; add one, as in rewards.shapes.weight=1")
    if not algorithm.uses_rewards:
        check_reward_free(config)


def check_policy_is_trained(config: Config, algorithm: Algorithm) -> None:
    """Raises: UsageError on what chooses among policies or averages them, where the policy stays as it is."""
    train, prompts = config.train, config.prompts
    chosen = {"train.patience": train.patience, "train.ema": train.ema, "prompts.validation": prompts.validation}
    given = [key for key, value in chosen.items() if value]
    if given and not algorithm.trains_policy:
        raise UsageError(
            f"config {given[0]}: has no effect, as configured the algorithm {config.algorithm['name']} leaves the "
            "policy as it is: leave it out"
        )


def check_reward_free(config: Config) -> None:
    """Raises: UsageError on rewards, and on settings of theirs, where an algorithm does not learn from any."""
    for name in ("normalise_rewards", "max_failed"):
        if getattr(config.train, name) != getattr(TrainConfig(), name):
            raise UsageError(f"config train.{name}: has no effect on the algorithm {config.algorithm['name']}")
    if config.rewards:
        without = " ".join(f"rewards.{name}=null" for name in config.rewards)
        raise UsageError(
            f"config rewards: the algorithm {config.algorithm['name']} does not learn from rewards: leave them out "
            f"with {without}; evaluate.measures can have them"
        )


def check_budget(config: Config, algorithm: Algorithm) -> None:
    """Raises: UsageError when `train.kl_budget` cannot be enforced."""
    if algorithm.off_policy or not algorithm.uses_rewards:
        raise UsageError(
            "config train.kl_budget: as configured, the algorithm does not roll out the policy itself: leave it out"
        )
    if config.train.over_budget == "adapt" and not config.algorithm.get("kappa"):
        raise UsageError("config train.over_budget: adapt changes algorithm.kappa, which must be above 0 for that")
