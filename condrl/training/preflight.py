"""What can be known before the first epoch: the arithmetic in a sentence, and what a trial with a few images shows."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from condrl.algorithms.base import Collected, Experience
from condrl.algorithms.examples import Examples, RatioExamples, check_ratios, is_compiled
from condrl.diffusion.noise import rng_state, set_rng_state
from condrl.diffusion.rollout import Place
from condrl.errors import RewardError, RunError, UsageError, blaming, print_main
from condrl.processes import Processes
from condrl.prompts import Row
from condrl.rewards.scoring import Reward, first_failure, usage_errors
from condrl.training.checkpoint import check_saveable
from condrl.training.learner import has_finite_gradients
from condrl.training.memory import Growth, LiveBytes, Needs, PeakClock, memory
from condrl.training.returned import check_each, check_loss, check_metrics, check_own_measures, check_score
from condrl.training.trainer import Trainer

PROMPTS, IMAGES = 2, 4  # of the trial, for each process
BATCHES = 4  # of pairs, that are differentiated at most
MOST_FAILED = 0.5  # of the trial's scores
ROWS = 64  # of a prompt file, that a reward is tried with
EXPENSIVE_ROWS = 2  # likewise, for a reward that caches its scores because they are expensive


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a few images of the base model showed."""

    images: int  # of a prompt
    calls_to_gather: float  # network calls for an image: roll-out and examples
    calls_to_learn: float  # in a pass of updates
    needs: Needs  # of memory
    collected: Collected
    kl_gradient: float | None  # its norm a small step away from the base; None without a KL


def preflight(trainer: Trainer, heldout: Sequence[Row] = (), measures: Sequence[Reward] = ()) -> list[str]:
    """Try the run with a few images, and the rewards and `measures` with many prompt rows; lines to print.

    Raises: UsageError when a reward, the model or the algorithm fails; RunError when a ratio is not 1, or a KL that is
    asked for has no gradient.
    """
    with usage_errors(), untouched([*trainer.rewards, *measures]):
        trial = attempt(trainer)
        image = some_image(trainer, trial.collected)
        group, per_prompt = trainer.config.train.images_per_prompt, trainer.config.evaluate.images_per_prompt
        warnings = try_rows(trainer.rewards, image, trainer.rows, group, trainer.processes)
        warnings += try_rows(measures, image, heldout, per_prompt, trainer.processes)
        try_own_measures(trainer, heldout[:PROMPTS], [measure.name for measure in measures])
    if trial.kl_gradient == 0:
        raise RunError("algorithm.kappa asks for a KL to the base model, but it has no gradient in what is trained")
    seen = reward_lines(trial.collected, trial.images) if isinstance(trial.collected, Experience) else []
    return [arithmetic(trainer, trial), memory(trainer, trial.needs), *seen, *warnings]


def some_image(trainer: Trainer, collected: Collected) -> Tensor:
    """An image (1, ...) of the base model, or what it decodes from zeros where nothing was rolled out."""
    if isinstance(collected, Experience):
        return collected.preview[:1].to(trainer.policy.model.device)
    model = trainer.policy.model
    with torch.no_grad():
        return model.decode(torch.zeros(1, *model.state_shape, device=model.device))


def reward_lines(experience: Experience, images_per_prompt: int) -> list[str]:
    """Lines on the rewards of the images tried."""
    rewards = experience.scores.total
    groups = rewards.view(-1, images_per_prompt)
    spread = (groups - groups.nanmean(1, keepdim=True)).square().nanmean().sqrt().item()
    values = ", ".join(f"{reward:.4g}" for reward in rewards.tolist()[:2])
    lines = [f"reward of two images of the base model: {values}; spread within a prompt: {spread:.3g}"]
    if failed := int((~experience.scored).sum()):
        lines.append(f"warning: {failed} of the images tried have no score: {experience.scores.failure}")
    if spread == 0 and images_per_prompt > 1:
        lines.append(f"warning: the reward is the same for the {images_per_prompt} images tried of each prompt")
    return lines


def arithmetic(trainer: Trainer, trial: Trial) -> str:
    """What an epoch consists of, and the run."""
    train, images, count = trainer.config.train, trainer.config.images_per_epoch, trainer.processes.count
    updates = train.inner_epochs * train.updates_per_epoch
    shared = f" ({count} processes)" if count > 1 else ""
    calls = images * (trial.calls_to_gather + trial.calls_to_learn * train.inner_epochs)
    return (
        f"an epoch: {train.prompts_per_epoch} prompts x {train.images_per_prompt} images = {images} images{shared}, "
        f"{trainer.policy.steps} steps each; {updates} updates of {images // train.updates_per_epoch} images; about "
        f"{calls:,.0f} network calls. {train.epochs} epochs: {images * train.epochs:,} images, "
        f"{updates * train.epochs:,} updates"
    )


def attempt(trainer: Trainer) -> Trial:
    """Roll out, score and differentiate a few images, without compiling; the trainer is left as it was.

    Raises: UsageError naming the model or the algorithm, whichever fails.
    """
    with torch.compiler.set_stance("force_eager") if is_compiled(trainer.policy) else nullcontext():
        try_model(trainer)
        with blaming("algorithm", trainer.config.algorithm["name"]):
            return attempt_eagerly(trainer)


def try_model(trainer: Trainer) -> None:
    """Ask the model for a score and an image, apart from the algorithm, which is then not blamed for its failures.

    Raises: UsageError naming the model.
    """
    model, name = trainer.policy.model, trainer.config.model["name"]
    before, count = model.evaluations, min(2, trainer.config.train.rollout_batch)
    with blaming("model", name):
        check_score(trainer.policy, model.encode([trainer.rows[0].prompt] * count), name)
    model.evaluations = before


def attempt_eagerly(trainer: Trainer) -> Trial:
    """As `attempt`, whether the network is compiled or not."""
    twin, model = smaller(trainer), trainer.policy.model
    few = twin.config.images_per_epoch
    print_main(f"trying a roll-out, its rewards and an update: {few} images of {trainer.policy.steps} steps ...")
    before = model.evaluations
    drawn = rng_state()  # a reward may draw
    with LiveBytes() as live:
        collected = twin.collect(0, clock := PeakClock(live))
    if isinstance(collected, Experience):
        check_scores(trainer, collected)
    images = len(collected.rows)
    with LiveBytes() as live:
        examples = twin.examples(collected, 0)
    prepare = Growth.through({min(images, trainer.config.train.loss_batch): live.peak})
    gathered = model.evaluations - before
    if isinstance(examples, RatioExamples) and trainer.config.run.check_ratios:
        check_ratios(examples, twin.policy, twin.pairs_at_once(examples))
    check_metrics(examples.metrics, images)
    scored = collected.scored[collected.indices.start : collected.indices.stop].cpu()
    learn, learned = differentiate(twin, examples, scored)
    try_own_losses(twin, examples)
    twin.algorithm.after_update(twin.policy)
    try_saving(twin)
    steps = trainer.config.train.steps_per_image or len(examples.k)
    trial = Trial(
        images=twin.config.train.images_per_prompt,
        calls_to_gather=gathered / images,
        calls_to_learn=steps / len(examples.k) * learned / images,
        needs=Needs(rollout_growth(twin, collected, clock), *of_images(clock, images, trainer), prepare, learn, steps),
        collected=collected,
        kl_gradient=kl_gradient(twin, collected.rollout.place(0, torch.arange(images)), collected.rollout.condition)
        if isinstance(collected, Experience) and twin.algorithm.kappa
        else None,
    )
    model.evaluations = before
    set_rng_state(drawn)
    return trial


def try_saving(twin: Trainer) -> None:
    """Ask the algorithm and the rewards for what a checkpoint has of them, and have the algorithm load its part.

    Raises: UsageError when it cannot be saved.
    """
    check_saveable(state := twin.algorithm.state_dict(), "the algorithm")
    twin.algorithm.load_state_dict(copy.deepcopy(state))
    for reward in twin.rewards:
        check_saveable(reward.state_dict(), f"the reward {reward.name!r}")


def of_images(clock: PeakClock, images: int, trainer: Trainer) -> tuple[Growth, Growth]:
    """What decoding and scoring held, which work on some images at a time."""
    at_once = min(images, getattr(trainer.policy.model, "decode_batch", images))
    sizes = {"decode": at_once, "score": images}
    decode, score = (Growth.through({size: clock.peaks.get(phase, 0)}) for phase, size in sizes.items())
    return decode, score


@torch.no_grad()
def rollout_growth(twin: Trainer, collected: Collected, clock: PeakClock) -> Growth:
    """What a step of a roll-out holds, of one image and of several; or what all steps held, where graphs are kept."""
    if not isinstance(collected, Experience):
        return Growth(0, 0)
    if twin.algorithm.keep_graph:
        return Growth.through({len(collected.rows): clock.peaks["rollout"]})
    policy, some = twin.policy, collected.rollout
    peaks = {}
    for count in {1, min(len(some.condition), twin.config.train.rollout_batch)}:
        place = some.place(0, torch.arange(count))
        with LiveBytes() as live, policy.rolling_out():
            policy.step(place.x, torch.zeros(count, dtype=torch.long), some.condition[:count], place.solver_state)
        peaks[count] = live.peak
    return Growth.through(peaks)


@contextmanager
def untouched(rewards: Sequence[Reward]) -> Iterator[None]:
    """Load the rewards; on leaving it, their states and torch's are restored."""
    for reward in rewards:
        reward.load()
    states, drawn = [copy.deepcopy(reward.state_dict()) for reward in rewards], rng_state()
    yield
    for reward, state in zip(rewards, states, strict=True):
        reward.load_state_dict(state)
    set_rng_state(drawn)


def check_scores(trainer: Trainer, experience: Experience) -> None:
    """Raises: RewardError when most of the images have no score; a few images say little about a small share."""
    failed = int((~experience.scored).sum())
    if failed > MOST_FAILED * experience.total:
        message = first_failure(trainer.processes.gather_objects(experience.scores.failure))
        raise RewardError(f"{message} ({failed} of the {experience.total} images tried have no score)")


def try_rows(
    rewards: Sequence[Reward],
    image: Tensor,
    rows: Sequence[Row],
    group: int,
    processes: Processes | None = None,
    most_failed: float = MOST_FAILED,
) -> list[str]:
    """Score one image (1, ...) as if it had been made for each of many rows, each process its share of them.

    Returns a warning of each reward that cannot score some of them.

    A reward that compares images is given a `group` of it for each row.

    Raises: RewardError when a reward cannot score most of them, UsageError when it raises that for a prompt.
    """
    warnings = []
    for reward in rewards:
        some = typical(rows, ROWS if reward.cache is None else EXPENSIVE_ROWS)
        own = [some[i] for i in processes.local_indices(len(some))] if processes else some
        own = [row for row in own for _ in range(group if reward.per_group else 1)]
        with torch.no_grad():
            parts = [own[part] for part in reward.parts(own)] if own else []
            found = [reward(image.expand(len(part), *image.shape[1:]), part) for part in parts]
            scores = torch.cat(found) if found else image.new_zeros(0)
        reward.offload()
        tried = torch.stack([scores.isnan().sum().float(), torch.tensor(float(len(own))).to(scores.device)])
        failed, count = map(int, (processes.sum(tried) if processes else tried).tolist())
        if failed:
            failures = [reward.failure(scores, own)]
            message = next(text for text in (processes.gather_objects(failures[0]) if processes else failures) if text)
            told = f"{message} ({failed} of the {count} rows tried have no score)"
            if failed > most_failed * count:
                raise RewardError(told)
            warnings.append(f"warning: {told}")
    return warnings


def typical(rows: Sequence[Row], most: int) -> list[Row]:
    """At most `most` rows, in their order, among them one with each set of metadata keys."""
    kinds = {frozenset(row.metadata): row for row in reversed(rows)}  # the first of each
    chosen = [*kinds.values(), *(row for row in rows if kinds[frozenset(row.metadata)] is not row)][:most]
    return sorted(chosen, key=lambda row: row.index)


def smaller(trainer: Trainer) -> Trainer:
    """A trainer of the same policy with a copy of the algorithm, for epochs of a few images."""
    twin, train = copy.copy(trainer), trainer.config.train
    few = dataclasses.replace(
        train,
        max_failed=1.0,  # see check_scores
        prompts_per_epoch=min(train.prompts_per_epoch, PROMPTS * trainer.processes.count),
        images_per_prompt=min(train.images_per_prompt, IMAGES),
        updates_per_epoch=1,
    )
    twin.config = dataclasses.replace(trainer.config, train=few)
    twin.algorithm = copy.deepcopy(trainer.algorithm)
    return twin


def differentiate(twin: Trainer, examples: Examples, scored: Tensor) -> tuple[Growth, float]:
    """Do the backward passes of some pairs, of early and late steps; returns what they hold, and the calls of all.

    `scored` (B,) says which images can be learned from.
    """
    model, pairs = twin.policy.model, examples.every_pair()
    size = min(twin.config.train.loss_batch, examples.count + 1)  # across steps, and not as many as there are images
    before = model.evaluations
    peaks = {1: backward(twin, examples, pairs[:1], scored)}
    model.evaluations = before  # of one pair more
    parts = pairs.split(size)
    tried = parts[:: -(-len(parts) // BATCHES)]
    for some in tried:
        peaks[len(some)] = max(peaks.get(len(some), 0), backward(twin, examples, some, scored))
    return Growth.through(peaks), (model.evaluations - before) * len(pairs) / sum(map(len, tried))


def backward(twin: Trainer, examples: Examples, pairs: Tensor, scored: Tensor) -> int:
    """The bytes that a loss of some pairs and its backward pass hold at most.

    Raises: UsageError when the loss of pairs with a score, or its gradient, is not finite.
    """
    with LiveBytes() as live:
        loss, _ = check_loss(twin.algorithm.loss(twin.policy, examples.at(*pairs.unbind(1))), len(pairs))
        loss.sum().backward()
    counts = scored[pairs[:, 0]]  # others may be without a value
    finite = loss.detach().isfinite().cpu()[counts]
    if not finite.all():
        raise UsageError(
            f"the algorithm's loss is not finite at the base model, before any update: of {len(finite)} pairs tried, "
            f"{int((~finite).sum())}"
        )
    if counts.all() and not has_finite_gradients(twin.learner.parameters):
        raise UsageError("the algorithm's loss has a gradient that is not finite at the base model, before any update")
    for parameter in twin.learner.parameters:
        parameter.grad = None
    return live.peak


def try_own_losses(twin: Trainer, examples: Examples) -> None:
    """Ask for the losses by which the algorithm's networks take steps of their own, for two pairs."""
    pairs = examples.every_pair()[:2]
    for name, network in twin.algorithm.networks().items():
        if network.extra_steps:
            loss = twin.algorithm.own_loss(name, twin.policy, examples.at(*pairs.unbind(1)))
            check_each(loss, len(pairs), f"own_loss({name!r})")


def try_own_measures(trainer: Trainer, rows: Sequence[Row], others: Collection[str]) -> None:
    """Ask the algorithm what it measures itself of a few held-out rows, beside other measures.

    Raises: UsageError naming the algorithm.
    """
    model, algorithm = trainer.policy.model, trainer.algorithm
    before, prompts = model.evaluations, "heldout" if trainer.config.prompts.heldout else "validation"
    with blaming("algorithm", trainer.config.algorithm["name"]):
        found = algorithm.measures(trainer.policy, rows, prompts, trainer.config.train) if rows else {}
        check_own_measures(found, len(rows), others)
    model.evaluations = before


def kl_gradient(twin: Trainer, start: Place, condition: Tensor) -> float | None:
    """The norm of the gradient of a step's KL to the base model, a small step away from it; None without noise."""
    policy, steps = twin.policy, twin.policy.sampler.stochastic.nonzero().flatten()
    if not len(steps):
        return None
    few = torch.arange(min(len(condition), twin.config.train.loss_batch))
    place, condition = start[few], condition[few]
    weights = [w.detach().clone() for w in twin.learner.weights]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in twin.learner.weights:
            weight.add_(1e-2 * torch.randn(weight.shape, generator=generator).to(weight))
    step = place.x, steps[:1].expand(len(few)), condition, place.solver_state
    with policy.model.reference(), torch.no_grad():
        base = policy.transition(*step)
    policy.transition(*step).kl(base).sum().backward()
    norm = torch.stack([w.grad.norm() for w in twin.learner.weights if w.grad is not None] or [torch.zeros(())]).norm()
    with torch.no_grad():
        for weight, value in zip(twin.learner.weights, weights, strict=True):
            weight.copy_(value)
            weight.grad = None
    return norm.item()
