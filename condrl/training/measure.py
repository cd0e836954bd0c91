"""What a run measures on prompts that it does not train on: before, while and after it tunes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from condrl.diffusion.policy import acting
from condrl.errors import print_main, stopping_at
from condrl.models.points import save_module
from condrl.prompts import Row
from condrl.training.build import deployed, make_measures, weights_in_words
from condrl.training.evaluate import (
    Evaluation,
    compared,
    compared_diversity,
    estimate,
    evaluate,
    first_seed,
    paired_difference,
    path_kl_to_base,
)
from condrl.training.heldout import save_evaluation, save_film
from condrl.training.trainer import Trainer


class Prompts(NamedTuple):
    """The rows of a run's prompt files."""

    train: Sequence[Row]
    heldout: Sequence[Row]
    validation: Sequence[Row]


NOTHING = Evaluation({}, {}, {}, torch.zeros(0), [], [], 0.0)  # is drawn where the algorithm's own measures suffice


def evaluation(trainer: Trainer, rows: Sequence[Row], name: str, who: str) -> Evaluation | None:
    """Measure the policy on the rows of prompts.<name>; None when there are none, or nothing to measure.

    Raises: UsageError naming a row without what the algorithm's own measures need.
    """
    config, measures = trainer.config, make_measures(trainer.config)
    own = trainer.algorithm.measures(trainer.policy, rows, name, config.train) if rows else {}
    if not rows or not (measures or own):
        return None
    found = NOTHING
    if measures:
        found = evaluate(
            deployed(config, trainer.policy),
            rows,
            measures,
            seed=first_seed(config.run.seed),
            per_prompt=config.evaluate.images_per_prompt,
            batch=config.train.rollout_batch,
            pictures=config.evaluate.pictures,
            processes=trainer.processes,
        )
    estimates = {measure: estimate(values, 1) for measure, values in own.items()}
    found = replace(found, measures=found.measures | estimates, scores=found.scores | own)
    if trainer.processes.is_main:
        means = ", ".join(f"{measure} {e.mean:.3f}" for measure, e in found.measures.items())
        print(f"{who}: {means}", flush=True)
    return found


def flat(found: Evaluation | None, prompts: str) -> dict[str, float]:
    """Each measure's mean on such prompts and the half-width of its interval, as a line of the record has them."""
    line: dict[str, float] = {}
    for name, e in found.measures.items() if found else ():
        if not math.isfinite(e.mean):  # every score failed
            continue
        line |= {f"{prompts}/{name}": e.mean} | ({f"{prompts}/{name}_ci95": e.half_width} if e.ci95 else {})
    return line


def gains(base: Evaluation | None, found: Evaluation | None) -> dict[str, float]:
    """Each measure's paired difference to the base and the half-width of its interval, as a line of the record."""
    line: dict[str, float] = {}
    if not base or not found:
        return line
    for name in found.measures:
        difference = paired_difference(base.scores[name], found.scores[name])
        if difference.ci95 and math.isfinite(difference.mean):
            line |= {f"gain/{name}": difference.mean, f"gain/{name}_ci95": difference.half_width}
    return line


def watch(trainer: Trainer, prompts: Prompts, heldout: Evaluation | None) -> dict[str, float]:
    """Have the policy measured every `evaluate.every` epochs, and the best LoRA kept; returns what the base is.

    On validation prompts, or, where there are none, on the held-out ones, by which nothing is chosen; `heldout` is what
    the base is on those.
    """
    if not trainer.config.evaluate.every:
        return {}
    name, who = ("validation", "validation") if prompts.validation else ("heldout", "held-out")
    rows = prompts.validation or prompts.heldout

    def measure(epoch: int, when: str) -> Evaluation | None:
        with trainer.learner.deploying():
            found = evaluation(trainer, rows, name, f"{who}, {when}")
            if found and found.each and prompts.validation:
                rate(trainer, epoch, found)
        save_measured(trainer, epoch, rows, found)
        return found

    def measure_epoch() -> dict[str, float]:
        epoch = trainer.epoch + 1
        found = measure(epoch, f"after {epoch} epochs")
        return flat(found, name) | gains(base, found)

    trainer.heldout = measure_epoch
    if not prompts.validation:
        base = heldout
        save_measured(trainer, 0, rows, base)
        return {}
    base = measure(0, "base")
    return flat(base, name)


def rate(trainer: Trainer, epoch: int, found: Evaluation) -> None:
    """Keep what is deployed, if nothing was rated higher on validation prompts."""
    weights = {reward.name: reward.weight for reward in trainer.rewards} or dict.fromkeys(found.each, 1.0)
    total = sum(weight * found.measures[name].mean for name, weight in weights.items())
    if math.isnan(total):
        print_main(f"warning: epoch {epoch} is not compared with others: a reward failed on all validation prompts")
    if trainer.best.take(epoch, total) and epoch:
        trainer.best.weights = [weight.detach().clone() for weight in trainer.learner.weights]
        save_best(trainer)


def save_measured(trainer: Trainer, epoch: int, rows: Sequence[Row], found: Evaluation | None) -> None:
    """Write what an evaluation measured of each image, and the first images; prompts and seeds are always the same."""
    if found and found.each and trainer.processes.is_main:
        save_evaluation(trainer.folder, epoch, rows, first_seed(trainer.config.run.seed), found)
        for number, frame in enumerate(save_film(trainer.folder, epoch, found)):
            trainer.recorder.trackers.show(f"film/{number}", *frame)


def measured_result(
    trainer: Trainer, rows: Sequence[Row], base: Evaluation | None, tuned: Evaluation | None
) -> dict[str, Any]:
    """What base and tuned are on held-out prompts, and how far apart, for result.json."""
    if not base or not tuned:
        return {"heldout": {}}
    config, found = trainer.config, {"heldout": compared(base, tuned)}
    if not base.each:  # no image was drawn
        return found
    seed, batch = first_seed(config.run.seed), config.train.rollout_batch
    kl = path_kl_to_base(deployed(config, trainer.policy), rows, seed, batch)
    diversity = {"diversity": compared_diversity(base, tuned)} if config.evaluate.images_per_prompt > 1 else {}
    return found | {"path_kl": kl} | diversity


def best_result(
    trainer: Trainer, prompts: Prompts, base: Evaluation | None, tuned: Evaluation | None
) -> dict[str, Any]:
    """The epoch that validation prompts chose, and what its LoRA is on held-out ones, for result.json.

    `tuned` is what the last epoch's is.
    """
    best = trainer.best
    if best.value is None or not best.epoch:
        return {"best": {"epoch": 0}} if best.value is not None else {}
    found = tuned
    if best.epoch != trainer.epoch:
        with acting(trainer.learner.weights, best.weights):
            found = evaluation(trainer, prompts.heldout, "heldout", f"held-out, best (epoch {best.epoch})")
    return {"best": {"epoch": best.epoch, "heldout": compared(base, found) if base and found else {}}}


def save_lora(trainer: Trainer) -> None:
    with trainer.learner.deploying():
        write_lora(trainer, "lora")


def save_best(trainer: Trainer) -> None:
    """Make lora_best/ the best epoch's, also in a run that resumes from a checkpoint."""
    if trainer.best.weights:
        with acting(trainer.learner.weights, trainer.best.weights):
            write_lora(trainer, "lora_best")
    elif trainer.processes.is_main:
        trainer.folder.remove("lora_best")


@stopping_at("the model could not write its LoRA")
def write_lora(trainer: Trainer, name: str) -> None:
    if trainer.processes.is_main:
        with trainer.folder.replacing(name) as folder:
            trainer.policy.model.save_adapter(folder, {"rewards": weights_in_words(trainer.config)})


def save_networks(trainer: Trainer) -> None:
    """Write the algorithm's networks that drawing needs, each into the folder of its name."""
    kept = {name: own.module for name, own in trainer.learner.networks.items() if own.is_kept}
    for name, module in kept.items() if trainer.processes.is_main else ():
        with trainer.folder.replacing(name) as folder:
            save_module(module, folder, {"rewards": weights_in_words(trainer.config)})
