"""The one loop: roll out -> score -> credit -> update -> record."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from condrl.algorithms.base import Algorithm, Collected, Context, Experience
from condrl.algorithms.examples import (
    Examples,
    RatioExamples,
    check_ratios,
    has_half_precision,
    is_compiled,
    recomputed,
)
from condrl.config import Config
from condrl.diffusion.noise import Noise, rng_state, set_rng_state
from condrl.diffusion.path_kl import PathKL, path_kl
from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import Rollout, rollout
from condrl.diffusion.transition import windowed
from condrl.errors import RunError, Stopped, print_main, stopping_at
from condrl.processes import Processes
from condrl.prompts import Row, epoch_rows
from condrl.rewards.scoring import Reward, Scores, first_failure, score, weighted
from condrl.training.best import Best
from condrl.training.checkpoint import checkpoint_files, save_checkpoint
from condrl.training.clock import Clock
from condrl.training.evaluate import KL_IMAGES, with_path_kl
from condrl.training.folder import RunFolder
from condrl.training.learner import Learner
from condrl.training.recorder import PICTURES, Recorder
from condrl.training.returned import check_collected, check_examples, check_rollout

LONG = 1.0  # seconds: an epoch that follows a longer one is abandoned when the run is asked to stop, others complete


class Trainer:
    """Tunes `policy.model.module` in place; writes metrics.jsonl, timings.jsonl, images/, checkpoints/ as it goes."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        algorithm: Algorithm,
        rewards: Sequence[Reward],
        rows: Sequence[Row],
        processes: Processes,
    ) -> None:
        self.config, self.policy, self.algorithm = config, policy, algorithm
        self.rewards, self.rows, self.processes = rewards, rows, processes
        self.sampler = policy.sampler  # with all of its noise
        algorithm.setup(policy)
        algorithm.check_rows(policy, rows)
        self.learner = Learner(config, policy, algorithm, processes)
        self.processes.check_same(self.learner.parameters)
        self.folder = RunFolder(config.folder)
        self.recorder = Recorder(self.folder, processes, {r.name for r in rewards if r.weight < 0})
        self.epoch = self.images = 0
        self.heldout: Callable[[], dict[str, float]] | None = None  # measures the policy, for `evaluate.every`
        self.best = Best()  # by validation prompts
        self.budget_exhausted = False  # whether the run is to end because of train.kl_budget

    # ------------------------------------------------------------------------------------------ phases

    def fit(self) -> None:
        """Run the epochs that are left, with a checkpoint now and then, at the end, and before an early stop.

        Raises: RunError when a ratio is not 1 before the first update or a plugin fails; Stopped when asked to stop. If
        the epoch was long, or the processes could synchronize, there is then a checkpoint from before it.
        """
        self.processes.synchronized(self._fit)

    def _fit(self) -> None:
        epochs, is_main = self.config.train.epochs, self.processes.is_main
        todo = range(self.epoch, epochs)
        bar = tqdm(todo, initial=self.epoch, total=epochs, desc="tuning", unit="epoch", disable=not is_main)
        saved = ended = time.monotonic()
        long = True
        for epoch in bar:
            if self.budget_exhausted:
                print_main(f"ended after epoch {self.epoch}: train.kl_budget is spent")
                break
            if self.is_out_of_patience:
                print_main(
                    f"ended after epoch {self.epoch}: on validation prompts epoch {self.best.epoch} was the best"
                )
                break
            before = copy.deepcopy(self.state_dict()) if long or self.asks_elsewhere else None
            try:
                self.run_epoch(epoch, is_interruptible=before is not None)
            except (Exception, Stopped) as error:
                if before is not None and (self.processes.count == 1 or isinstance(error, Stopped)):
                    self.rescue(before)
                raise
            now = time.monotonic()
            latest = self.recorder.lines[-(self.config.evaluate.every or 1) :]
            bar.set_postfix(progress(latest, self.config.images_per_epoch / (now - ended)))
            due, took_long, ended = now - saved >= self.config.run.checkpoint_seconds, now - ended >= LONG, now
            stopping, (due, long) = self.processes.broadcast(due, took_long)
            if stopping or due or self.budget_exhausted or self.is_out_of_patience or self.epoch == epochs:
                self.checkpoint()
                saved = now
            if stopping:
                raise Stopped(stopping)

    def rescue(self, before: dict[str, Any]) -> None:
        """Save the state before an epoch that could not be finished; where it cannot be saved, say so."""
        self.load_state_dict(before)
        try:
            self.checkpoint()
        except RunError as error:
            print_main(f"warning: {error}")

    def run_epoch(self, epoch: int, is_interruptible: bool = False) -> dict[str, Any]:
        """Roll out, score, credit, update, record; returns the line of the record.

        Raises: Stopped, if it `is_interruptible`, when the run is asked to stop before the record; RunError when the
        algorithm or the model fails.
        """
        plugins = f"the algorithm or the model failed in epoch {epoch + 1}"
        with self.processes.interruptible(is_interruptible):
            clock = Clock()
            with stopping_at(plugins):
                experience = self.collect(epoch, clock)
            if isinstance(experience, Experience):
                self.recorder.picture(experience, epoch, self.config.train.images_per_prompt)
                clock.lap("picture")
            with stopping_at(plugins):
                examples = self.examples(experience, epoch)
                clock.lap("examples")
                if epoch < 2 and self.config.run.check_ratios and isinstance(examples, RatioExamples):
                    # every pair before the first update, then some once the LoRA is no longer zero
                    most = None if epoch == 0 else self.config.train.loss_batch
                    check_ratios(examples, self.policy, self.pairs_at_once(examples), most)
                    clock.lap("check")
                is_measured = bool(self.heldout) and (epoch + 1) % (self.config.evaluate.every or epoch + 2) == 0
                has_budget = self.config.train.kl_budget is not None
                kl = self.base_kl(experience) if has_budget or is_measured else None
                metrics = self.learner.update(examples, experience, epoch) | self.keep_to_budget(kl)
            clock.lap("update")
            if self.heldout and is_measured:
                metrics |= self.heldout()
                clock.lap("heldout")
        self.epoch, self.images = epoch + 1, self.images + experience.total
        counts = {"epoch": self.epoch, "images": self.images, "updates": self.learner.updates}
        metrics |= {"lr": self.learner.optimizer.param_groups[0]["lr"], "skipped_updates": self.learner.skipped}
        metrics |= self.processes.add_up({"network_calls": self.policy.model.evaluations})
        if self.config.train.window is not None:
            metrics["window"] = int(self.policy.sampler.stochastic.nonzero()[0])
        return self.recorder.record(counts, experience, metrics, clock.seconds)

    def collect(self, epoch: int, clock: Clock) -> Collected:
        """What the algorithm learns from in an epoch, for this process's share of the prompt rows."""
        train = self.config.train
        if train.window is not None:
            self.policy.sampler = windowed(self.sampler, train.window, epoch)
        drawn = epoch_rows(self.rows, self.config.run.seed, epoch, train.prompts_per_epoch)
        share, group = self.processes.local_indices(len(drawn)), train.images_per_prompt
        rows = [drawn[i] for i in share for _ in range(group)]
        indices, images = range(share.start * group, share.stop * group), len(drawn) * group
        noise = self.noise(epoch, "rollout", indices, train.same_start)

        def scored(trajectories: Rollout, rows: list[Row]) -> Experience:
            clock.lap("rollout")
            return self.scored(trajectories, rows, indices, images, clock)

        context = Context(self.policy, train, noise, self.processes, indices, images, scored)
        collected = self.algorithm.collect(context, rows)
        check_collected(collected)
        clock.lap("collect")
        return collected

    def scored(self, trajectories: Rollout, rows: list[Row], indices: range, images: int, clock: Clock) -> Experience:
        """Trajectories for rows, which are `indices` of all processes' images, with the scores of their samples."""
        check_rollout(trajectories, len(indices))
        group = self.config.train.images_per_prompt
        with torch.no_grad():
            samples = self.policy.model.decode(trajectories.samples)
            clock.lap("decode")
            scores = score(self.rewards, samples, rows)
        for reward in self.rewards:
            reward.offload()
        weights = self.weights_of(scores, indices, images)
        scores = replace(scores, total=weighted(scores.each, weights))
        clock.lap("score")

        def total(points: Tensor, of: Tensor) -> Tensor:
            return weighted(score(self.rewards, points, [rows[i] for i in of.tolist()]).each, weights)

        has_score = self.processes.gather(scores.total.isfinite().float(), indices, images) > 0
        self.check_failures(scores, has_score)
        return Experience(
            rows=rows,
            processes=self.processes,
            indices=indices,
            total=images,
            scored=has_score,
            rollout=trajectories,
            scores=scores,
            preview=samples[::group][:PICTURES].cpu(),
            score=total,
        )

    def weights_of(self, scores: Scores, indices: range, images: int) -> dict[str, float]:
        """What each reward is multiplied by in an epoch's total."""
        weights = {reward.name: reward.weight for reward in self.rewards}
        if not self.config.train.normalise_rewards:
            return weights
        every = {name: self.processes.gather(scores.each[name], indices, images) for name in weights}
        return {name: weight * inverse_spread(every[name]) for name, weight in weights.items()}

    def check_failures(self, scores: Scores, has_score: Tensor) -> None:
        """Raises: RunError when too many of all processes' images have no score."""
        share = 1 - has_score.float().mean().item()
        if share > self.config.train.max_failed:
            message = first_failure(self.processes.gather_objects(scores.failure))
            most = self.config.train.max_failed
            raise RunError(f"{message} ({share:.0%} of the scores failed; at most train.max_failed={most:g} may)")

    def examples(self, experience: Collected, epoch: int) -> Examples:
        """What the epoch's updates learn from."""
        train = self.config.train
        noise = self.noise(epoch, "examples", experience.indices)
        examples = self.algorithm.examples(self.policy, experience, train, noise)
        check_examples(examples, len(experience.rows))
        is_rounded = self.policy.rollout_dtype is not None or has_half_precision(self.policy)
        if (is_rounded or is_compiled(self.policy)) and isinstance(examples, RatioExamples):
            return recomputed(examples, self.policy, self.pairs_at_once(examples))
        return examples

    def pairs_at_once(self, examples: Examples) -> int:
        """How many pairs of them are learned from in one forward and backward."""
        return self.config.pairs_at_once(len(examples.k), self.processes.count)

    def base_kl(self, experience: Collected) -> float:
        """The path KL of the policy to the base model, over a few images."""
        indices, kl, most = experience.indices, torch.zeros((), dtype=torch.float64), min(experience.total, KL_IMAGES)
        own = min(indices.stop, most) - indices.start
        if self.processes.sharded:  # all of them call the network alike
            own = min(len(indices), -(-KL_IMAGES // self.processes.count))
            most = own * self.processes.count
        if own > 0:
            kl = self.path_kl(experience, own).kl.sum(dtype=torch.float64).cpu()
        return self.processes.sum(kl).item() / most

    def path_kl(self, experience: Collected, own: int) -> PathKL:
        """Of an epoch's first images, or of others where those are not the policy's, or had noise left out."""
        batch, whole = self.config.train.rollout_batch, with_path_kl(Policy(self.policy.model, self.sampler))
        is_whole = self.config.train.window is None and whole.sampler is self.sampler
        if is_whole and not self.algorithm.off_policy and isinstance(experience, Experience):
            return path_kl(self.policy, experience.rollout.first(own), batch)
        condition = whole.model.encode([row.prompt for row in experience.rows[:own]])
        noise = self.noise(self.epoch, "path KL", experience.indices[:own])
        return path_kl(whole, rollout(whole, condition, noise, batch), batch)

    def keep_to_budget(self, kl: float | None) -> dict[str, float]:
        """End a run that exceeds `train.kl_budget`, or adapt kappa; returns what to record."""
        budget = self.config.train.kl_budget
        if kl is None or budget is None:
            return {} if kl is None else {"base_kl": kl}
        found = {"base_kl": kl, "kl_budget": budget}
        if self.config.train.over_budget == "stop":
            self.budget_exhausted = kl > budget
            return found
        least, now = self.config.algorithm["kappa"], self.algorithm.kappa
        assert now is not None  # check_budget
        self.algorithm.kappa = 1.2 * now if kl > budget else max(least, now / 1.2)
        return found | {"kappa": now}

    # ------------------------------------------------------------------------------------------ checkpoints

    def checkpoint(self) -> None:
        """Write what the run needs to resume from here; all processes do this together."""
        self.processes.check_same(self.learner.parameters)
        name, state = f"epoch_{self.epoch:08d}", self.state_dict()
        failure = None
        try:
            if self.processes.is_main:
                self.folder.claim_all(f"checkpoints/{file}" for file in checkpoint_files(name))
                save_checkpoint(self.folder.path / "checkpoints", name, state, self.config.run.keep_checkpoints)
        except (RunError, OSError) as error:
            failure = str(error)
        failures = self.processes.gather_objects(failure)  # so that all of them raise, or none
        if failures[0]:
            raise RunError(failures[0])

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next epoch depends on.

        Draws are functions of seed and epoch; torch's own state is for plugins that use it.
        """
        return {
            "epoch": self.epoch,
            "updates": self.learner.updates,
            "images": self.images,
            "bad_updates": self.learner.bad_updates,
            "skipped": self.learner.skipped,
            "first": self.recorder.first,
            "spent": self.budget_exhausted,
            "best": dataclasses.asdict(self.best),
            "kappa": self.algorithm.kappa,
            "evaluations": self.processes.add_up({"calls": self.policy.model.evaluations})["calls"],
            "rewards": self.processes.gather_objects({reward.name: reward.state_dict() for reward in self.rewards}),
            "weights": list(self.learner.weights),
            "average": self.learner.average.state_dict() if self.learner.average else {},
            "modules": {name: own.module.state_dict() for name, own in self.learner.networks.items()},
            "optimizer": self.learner.optimizer.state_dict(),
            "algorithm": self.algorithm.state_dict(),
            "rng": self.processes.gather_objects(rng_state()),
            "metrics_bytes": self.recorder.size,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from what `state_dict` returned; lines that were recorded after it are removed."""
        learner, self.recorder.first = self.learner, state["first"]
        self.epoch, self.images = state["epoch"], state["images"]
        learner.updates, learner.bad_updates, learner.skipped = state["updates"], state["bad_updates"], state["skipped"]
        self.budget_exhausted, self.best = state["spent"], Best(**state["best"])
        self.best.weights = [value.to(learner.weights[0].device) for value in self.best.weights]
        if state["kappa"] is not None:
            self.algorithm.kappa = state["kappa"]
        self.policy.model.evaluations = state["evaluations"] if self.processes.is_main else 0
        for weight, value in zip(learner.weights, state["weights"], strict=True):
            weight.copy_(value)
        if learner.average:
            learner.average.load_state_dict(state["average"])
        for name, own in self.learner.networks.items():
            own.module.load_state_dict(state["modules"][name])
        theirs = state["optimizer"]
        groups = learner.optimizer.state_dict()["param_groups"]  # everything but `lr` comes from the config
        groups = [{**own, "lr": group["lr"]} for own, group in zip(groups, theirs["param_groups"], strict=True)]
        learner.optimizer.load_state_dict({"state": theirs["state"], "param_groups": groups})
        self.load_memories(state)
        self.recorder.take_back(state["metrics_bytes"])

    def load_memories(self, state: dict[str, Any]) -> None:
        """Restore what the algorithm and the rewards remember, and the states of the generators."""
        self.algorithm.load_state_dict(state["algorithm"])
        own = state["rewards"][self.processes.rank % len(state["rewards"])]
        for reward in self.rewards:
            reward.load_state_dict(own[reward.name])
        set_rng_state(state["rng"][self.processes.rank % len(state["rng"])])

    # ------------------------------------------------------------------------------------------ helpers

    @property
    def is_out_of_patience(self) -> bool:
        """Whether `train.patience` evaluations have found nothing better."""
        patience = self.config.train.patience
        return patience is not None and self.best.waited >= patience

    @property
    def asks_elsewhere(self) -> bool:
        """Whether a reward is served elsewhere: then even a quick epoch may become a long one."""
        return any(hasattr(reward.call, "errors") for reward in self.rewards)

    def noise(self, epoch: int, phase: str, indices: range, same_start: bool = False) -> Noise:
        """Randomness of the images at some indices, a function of the run's seed, the epoch and the phase."""
        seed = f"{self.config.run.seed} {epoch} {phase}"
        return Noise(seed, indices, self.config.train.images_per_prompt, same_start)


def inverse_spread(values: Tensor) -> float:
    """1 / the standard deviation of the finite values (B,); 0 where they differ by no more than by rounding."""
    found = values[values.isfinite()]
    if not len(found):
        return 0.0
    std = found.std(correction=0).item()
    return 0.0 if std <= 1e-6 * found.abs().max().item() else 1 / std


def progress(lines: Sequence[dict[str, Any]], images_per_second: float) -> dict[str, str]:
    """What the progress bar shows of some epochs: the last reward or loss, held-out measure and KL; and the speed."""
    found: dict[str, float] = {}
    for line in lines:
        name = "reward/total" if "reward/total" in line else "loss"
        found[name.partition("/")[0]] = line.get(name, math.nan)
        measured = [n for n in line if n.startswith(("heldout/", "validation/")) and not n.endswith("_ci95")]
        found |= {n: line[n] for n in measured[:1]}
        if (kl := line.get("base_kl", line.get("path_kl"))) is not None:
            found["KL"] = kl
    return {name: f"{value:.3g}" for name, value in found.items()} | {"images/s": f"{images_per_second:.1f}"}
