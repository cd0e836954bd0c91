"""The one loop: roll out -> score -> credit -> update -> record."""

from __future__ import annotations

import copy
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from condrl.algorithms.base import Algorithm, Examples, Experience, Metrics, RatioExamples, every_pair, recomputed
from condrl.config import Config
from condrl.diffusion.noise import Noise, rng_state, seeded_by, set_rng_state
from condrl.diffusion.path_kl import path_kl
from condrl.diffusion.policy import Policy
from condrl.errors import RunError, Stopped, UsageError, brief, naming, print_main
from condrl.io.records import to_json
from condrl.processes import Processes
from condrl.prompts import Row, epoch_rows
from condrl.rewards.scoring import Reward, Scores, score, weighted
from condrl.training.checkpoint import checkpoint_files, save_checkpoint, unlike
from condrl.training.diagnose import diagnose, spread_metrics
from condrl.training.folder import RunFolder
from condrl.training.pictures import log_picture, save_grid

PICTURES = 8  # images in an epoch's picture
KL_IMAGES = 32  # of an epoch, for train.kl_budget
LONG = 1.0  # seconds: longer epochs are given up when the run is asked to stop, shorter ones are finished
RATIO_TOLERANCE = {"full": 1e-3, "half": 2e-2}  # by the precision of the frozen weights


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
        self.weights = [p for p in policy.model.module.parameters() if p.requires_grad]
        train = config.train
        algorithm.setup(policy)
        own = algorithm.modules()
        self.rates = [train.lr, *(lr for _, lr in own.values())]
        groups = [self.weights, *(list(module.parameters()) for module, _ in own.values())]
        self.parameters = [parameter for group in groups for parameter in group]
        self.processes.check_same(self.parameters)
        self.optimizer = torch.optim.AdamW(
            [{"params": group} for group in groups], train.lr, train.betas, weight_decay=train.weight_decay, fused=True
        )
        self.epoch = self.updates = self.images = 0
        self.folder = RunFolder(config.folder)
        self.metrics_file = config.folder / "metrics.jsonl"  # the same whenever a run is repeated or resumed
        self.bad_updates = self.skipped = 0  # updates without a finite gradient: in a row, in all
        self.first: dict[str, float] = {}  # what the first epoch recorded, with the base model's held-out measures
        self.heldout: Callable[[], dict[str, float]] | None = None  # measures the policy, for `evaluate.every`
        self.budget_exhausted = False  # whether the run is to end because of train.kl_budget
        self.said: set[str] = set()  # the diagnoses that were printed

    # ------------------------------------------------------------------------------------------ phases

    def fit(self) -> None:
        """Run the epochs that are left, with a checkpoint now and then, at the end, and before an early stop.

        Raises: RunError when a ratio is not 1 before the first update or a reward fails; Stopped when asked to stop. If
        the epoch was long, or the processes could agree, there is then a checkpoint from before it.
        """
        self.processes.synchronized(self._fit)

    def _fit(self) -> None:
        epochs, shown = self.config.train.epochs, self.processes.is_main
        todo = range(self.epoch, epochs)
        bar = tqdm(todo, initial=self.epoch, total=epochs, desc="tuning", unit="epoch", disable=not shown)
        saved = ended = time.monotonic()
        long = True
        for epoch in bar:
            if self.budget_exhausted:
                print_main(f"ended after epoch {self.epoch}: train.kl_budget is spent")
                break
            before = copy.deepcopy(self.state_dict()) if long or self.asks_elsewhere else None
            try:
                reward = self.run_epoch(epoch, is_interruptible=before is not None)
            except (Exception, Stopped) as error:
                if before is not None and (self.processes.count == 1 or isinstance(error, Stopped)):
                    self.rescue(before)
                raise
            bar.set_postfix(reward=f"{reward:.3f}")
            now = time.monotonic()
            due, took_long, ended = now - saved >= self.config.run.checkpoint_seconds, now - ended >= LONG, now
            stopping, (due, long) = self.processes.broadcast(due, took_long)
            if stopping or due or self.budget_exhausted or self.epoch == epochs:
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

    def run_epoch(self, epoch: int, is_interruptible: bool = False) -> float:
        """Roll out, score, credit, update, record; returns the mean reward.

        Raises: Stopped, if it `is_interruptible`, when the run is asked to stop before the record.
        """
        with self.processes.interruptible(is_interruptible):
            clock = Clock()
            experience = self.collect(epoch, clock)
            self.picture(experience, epoch)
            clock.lap("picture")
            examples = self.examples(experience, epoch)
            clock.lap("examples")
            if epoch < 2 and self.config.run.check_ratios and isinstance(examples, RatioExamples):
                # every pair before the first update, then some once the LoRA is no longer zero
                self.check_ratios(examples, None if epoch == 0 else self.config.train.loss_batch)
                clock.lap("check")
            budget = self.base_kl(experience)
            metrics = self.update(examples, experience, epoch) | self.keep_to_budget(budget)
            clock.lap("update")
            if self.heldout and (epoch + 1) % (self.config.evaluate.every or epoch + 2) == 0:
                metrics |= self.heldout()
                clock.lap("heldout")
        self.epoch, self.images = epoch + 1, self.images + experience.total
        return self.record(experience, metrics, clock)

    def collect(self, epoch: int, clock: Clock) -> Experience:
        """Roll out this process's share of an epoch's prompts and score the images."""
        train, model = self.config.train, self.policy.model
        drawn = epoch_rows(self.rows, self.config.run.seed, epoch, train.prompts_per_epoch)
        share, group = self.processes.local_indices(len(drawn)), train.images_per_prompt
        rows = [drawn[i] for i in share for _ in range(group)]
        indices = range(share.start * group, share.stop * group)
        condition = model.encode([row.prompt for row in rows])
        noise = self.noise(epoch, "rollout", indices)
        trajectories = self.algorithm.rollout(self.policy, condition, noise, train.rollout_batch)
        clock.lap("rollout")
        with torch.no_grad():
            samples = model.decode(trajectories.samples)
            clock.lap("decode")
            scores = score(self.rewards, samples, rows)
        for reward in self.rewards:
            reward.offload()
        images = len(drawn) * group
        weights = self.weights_of(scores, indices, images)
        scores = replace(scores, total=weighted(scores.each, weights))
        clock.lap("score")

        def total(points: Tensor, of: Tensor) -> Tensor:
            return weighted(score(self.rewards, points, [rows[i] for i in of.tolist()]).each, weights)

        good = self.processes.gather(scores.total.isfinite().float(), indices, images) > 0
        self.check_failures(scores, good)
        shown = samples[::group][:PICTURES].cpu()
        return Experience(trajectories, rows, scores, shown, total, self.processes, indices, images, good)

    def weights_of(self, scores: Scores, indices: range, images: int) -> dict[str, float]:
        """What each reward is multiplied by in an epoch's total."""
        weights = {reward.name: reward.weight for reward in self.rewards}
        if not self.config.train.normalise_rewards:
            return weights
        every = {name: self.processes.gather(scores.each[name], indices, images) for name in weights}
        stds = {name: values[values.isfinite()].std(correction=0).item() for name, values in every.items()}
        return {name: weight / (stds[name] + 1e-6) for name, weight in weights.items()}

    def check_failures(self, scores: Scores, good: Tensor) -> None:
        """Raises: RunError when too many of all processes' images have no score."""
        share = 1 - good.float().mean().item()
        if share > self.config.train.max_failed:
            said = next(text for text in self.processes.gather_objects(scores.failure) if text)
            most = self.config.train.max_failed
            raise RunError(f"{said} ({share:.0%} of the scores failed; at most train.max_failed={most:g} of them may)")

    def examples(self, experience: Experience, epoch: int) -> Examples:
        """What the epoch's updates learn from."""
        train = self.config.train
        noise = self.noise(epoch, "examples", experience.indices)
        examples = self.algorithm.examples(self.policy, experience, train, noise)
        if self.half and isinstance(examples, RatioExamples):
            return recomputed(examples, self.policy, train.loss_batch)
        return examples

    def update(self, examples: Examples, experience: Experience, epoch: int) -> dict[str, float]:
        """The epoch's optimiser steps; returns the means of their metrics."""
        train, totals, norms = self.config.train, defaultdict[str, list[Tensor]](list), []
        generator = seeded_by(self.seed(epoch, "update"))
        for _ in range(train.inner_epochs):
            for part in self.minibatches(generator):
                part = part[experience.scored.cpu()[part]]
                if not len(part):
                    continue
                metrics, norm = self.optimise(examples, experience.indices, part, generator)
                if norm is not None:
                    norms.append(norm)
                    for name, value in metrics.items():
                        totals[name].append(value)
        means = {name: torch.stack(values).sum().item() / len(norms) for name, values in totals.items()}
        found = self.processes.add_up(means)
        own = experience.scored[experience.indices.start : experience.indices.stop]
        measured = {name: value.item() for name, value in examples.metrics.items()}
        found |= self.processes.average(measured, own.sum().item())
        return found | ({"grad_norm": torch.stack(norms).mean().item()} if norms else {})

    def base_kl(self, experience: Experience) -> float | None:
        """The path KL to the base model of the policy that was rolled out, where there is a budget, by a few images."""
        if self.config.train.kl_budget is None:
            return None
        indices, kl = experience.indices, torch.zeros((), dtype=torch.float64)
        own = min(indices.stop, KL_IMAGES) - indices.start
        if own > 0:
            some = path_kl(self.policy, experience.rollout.first(own), self.config.train.rollout_batch)
            kl = some.kl.sum(dtype=torch.float64).cpu()
        return self.processes.sum(kl).item() / min(experience.total, KL_IMAGES)

    def keep_to_budget(self, kl: float | None) -> dict[str, float]:
        """End the run over `train.kl_budget`, or adapt kappa to it; returns what to record."""
        budget = self.config.train.kl_budget
        if kl is None or budget is None:
            return {}
        found = {"base_kl": kl, "kl_budget": budget}
        if self.config.train.over_budget == "stop":
            self.budget_exhausted = kl > budget
            return found
        least, now = self.config.algorithm["kappa"], self.algorithm.kappa
        self.algorithm.kappa = 1.2 * now if kl > budget else max(least, now / 1.2)
        return found | {"kappa": now}

    def minibatches(self, generator: torch.Generator) -> Sequence[Tensor]:
        """The places of the images of each update of a pass: as many of each prompt as can be."""
        train = self.config.train
        turn = torch.rand(train.prompts_per_epoch, train.images_per_prompt, generator=generator).argsort(1).argsort(1)
        order = (turn + torch.rand(turn.shape, generator=generator)).flatten().argsort()
        return order.chunk(train.updates_per_epoch)

    def optimise(
        self, examples: Examples, indices: range, part: Tensor, generator: torch.Generator
    ) -> tuple[Metrics, Tensor | None]:
        """One optimiser step on the mean over the images at `part` of the loss summed over columns.

        Returns this process's part of the metrics' means, and the gradient's norm; None where the step was skipped.
        """
        train, totals = self.config.train, defaultdict[str, list[Tensor]](list)
        columns = self.draw_columns(examples.columns, len(part), generator)
        weight = len(examples.columns) / columns.numel()  # a subset of the columns stands for all of them
        own = (part >= indices.start) & (part < indices.stop)
        pairs = torch.stack([(part - indices.start)[:, None].expand_as(columns), columns], -1)[own].flatten(0, 1)
        self.set_lr()
        for some in pairs.split(train.loss_batch) if len(pairs) else ():
            loss, metrics = self.algorithm.loss(self.policy, examples.minibatch(*some.unbind(1)))
            (loss.sum() * weight).backward()
            metrics["loss"] = loss.detach().mean()
            for name, value in metrics.items():
                totals[name].append(value.detach() * (len(some) / columns.numel()))
        self.processes.sum_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, train.max_grad_norm)
        if finite := self.finite(norm):
            self.optimizer.step()
            self.updates += 1
        self.optimizer.zero_grad()
        return {name: torch.stack(values).sum() for name, values in totals.items()}, norm if finite else None

    def finite(self, norm: Tensor) -> bool:
        """Whether every gradient is finite; if not, the update is to be skipped.

        Raises: RunError when that has happened `train.max_bad_updates` times in a row.
        """
        own = [p.grad for group in self.optimizer.param_groups[1:] for p in group["params"] if p.grad is not None]
        norms = torch.stack([norm, *(gradient.norm() for gradient in own)])
        if norms.isfinite().all():
            self.bad_updates = 0
            return True
        self.bad_updates += 1
        self.skipped += 1
        if self.bad_updates >= self.config.train.max_bad_updates:
            raise RunError(
                f"{self.bad_updates} updates in a row, the last after update {self.updates}, had a gradient that is "
                "not finite, and were not made: lower train.lr, or use model.dtype=bfloat16 or float32 if it is float16"
            )
        return False

    def draw_columns(self, columns: Tensor, images: int, generator: torch.Generator) -> Tensor:
        """The columns trained for each image, (images, n): all, or n drawn without replacement."""
        count = self.config.train.steps_per_image or len(columns)
        if count == len(columns):
            return columns.expand(images, -1)
        return columns[torch.rand(images, len(columns), generator=generator).argsort(1)[:, :count]]

    # ------------------------------------------------------------------------------------------ checkpoints

    def checkpoint(self) -> None:
        """Write what the run needs to go on from here; all processes do this together."""
        self.processes.check_same(self.parameters)
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
        """Everything that the next epoch depends on. Draws are functions of seed and epoch; torch's own state is for
        plugins that use it.
        """
        return {
            "epoch": self.epoch,
            "updates": self.updates,
            "images": self.images,
            "bad_updates": self.bad_updates,
            "skipped": self.skipped,
            "first": self.first,
            "spent": self.budget_exhausted,
            "kappa": getattr(self.algorithm, "kappa", None),
            "evaluations": self.processes.add_up({"calls": self.policy.model.evaluations})["calls"],
            "rewards": self.processes.gather_objects({reward.name: reward.state_dict() for reward in self.rewards}),
            "weights": list(self.weights),
            "modules": {name: module.state_dict() for name, (module, _) in self.algorithm.modules().items()},
            "optimizer": self.optimizer.state_dict(),
            "algorithm": self.algorithm.state_dict(),
            "rng": self.processes.gather_objects(rng_state()),
            "metrics_bytes": self.metrics_file.stat().st_size if self.metrics_file.exists() else 0,
        }

    def check_state(self, state: dict[str, Any], path: Path) -> None:
        """Check that a checkpoint is like one that this run would write; what is tried on the way is undone.

        Raises: UsageError saying what is not.
        """
        why = self.difference(state)
        before = copy.deepcopy(self.state_dict())
        try:
            if not why:
                self.load_memories(state)
        except Exception as error:  # the algorithm, a reward or a generator cannot take what is there
            why = f"its algorithm, rewards or rng: {brief(error)}"
        finally:
            self.load_memories(before)
        if why:
            raise UsageError(f"the checkpoint {path} is not one of this run: {why}")

    def difference(self, state: dict[str, Any]) -> str | None:
        """How a checkpoint differs from those of this run, but for `load_memories`; None when it does not."""
        try:
            known, groups = state["optimizer"]["state"], state["optimizer"]["param_groups"]
            found = {"state": known, "param_groups": [{"lr": group["lr"]} for group in groups]}
            used = [i for i in range(len(self.parameters)) if i in known]
        except (LookupError, TypeError) as error:
            return f"its optimizer lacks a state, or param_groups with an lr ({brief(error)})"
        moments = [{"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p} for p in self.parameters]
        expected = {"state": {i: moments[i] for i in used}, "param_groups": [{"lr": lr} for lr in self.rates]}
        memories = dict.fromkeys(("first", "rewards", "algorithm", "rng"))
        own = {**self.state_dict(), **memories, "optimizer": expected}
        if why := unlike(own, {**state, **{name: None for name in memories if name in state}, "optimizer": found}):
            return why
        if below := [i for i, moment in known.items() if (moment["exp_avg_sq"] < 0).any()]:
            return f"optimizer.state.{below[0]}.exp_avg_sq is below zero"
        train = self.config.train
        if state["updates"] > state["epoch"] * train.inner_epochs * train.updates_per_epoch:
            return f"it has more updates ({state['updates']}) than there are in {state['epoch']} epochs"
        if not isinstance(state["first"], dict) or not all(isinstance(v, int | float) for v in state["first"].values()):
            return "first is not what an epoch recorded"
        return None

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave; lines that were recorded after it are taken back."""
        self.epoch, self.updates, self.images = state["epoch"], state["updates"], state["images"]
        self.bad_updates, self.skipped, self.first = state["bad_updates"], state["skipped"], state["first"]
        self.budget_exhausted = state["spent"]
        if state["kappa"] is not None:
            self.algorithm.kappa = state["kappa"]
        self.policy.model.evaluations = state["evaluations"] if self.processes.is_main else 0
        for weight, value in zip(self.weights, state["weights"], strict=True):
            weight.copy_(value)
        for name, (module, _) in self.algorithm.modules().items():
            module.load_state_dict(state["modules"][name])
        theirs = state["optimizer"]
        groups = self.optimizer.state_dict()["param_groups"]  # all but `lr` is as the config has it
        groups = [{**own, "lr": group["lr"]} for own, group in zip(groups, theirs["param_groups"], strict=True)]
        self.optimizer.load_state_dict({"state": theirs["state"], "param_groups": groups})
        self.load_memories(state)
        recorded = self.metrics_file.stat().st_size if self.metrics_file.exists() else 0
        if self.processes.is_main and recorded > state["metrics_bytes"]:
            os.truncate(self.folder.claim(self.metrics_file.name), state["metrics_bytes"])

    def load_memories(self, state: dict[str, Any]) -> None:
        """Go on with what the algorithm and the rewards remember, and where the generators were."""
        self.algorithm.load_state_dict(state["algorithm"])
        own = state["rewards"][self.processes.rank % len(state["rewards"])]
        for reward in self.rewards:
            reward.load_state_dict(own[reward.name])
        set_rng_state(state["rng"][self.processes.rank % len(state["rng"])])

    # ------------------------------------------------------------------------------------------ checks

    def check_ratios(self, examples: RatioExamples, most: int | None = None) -> None:
        """Compare the update's own log-probabilities, at most so many, with those that it takes for the roll-out's.

        Raises: RunError unless every likelihood ratio is 1.
        """
        pairs = every_pair(examples)
        pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))][:most]
        worst = 0.0
        for part in pairs.split(self.config.train.loss_batch):
            batch = examples.minibatch(*part.unbind(1))
            log_prob = batch.log_prob(self.policy)  # with gradients, as the update does
            worst = max(worst, (log_prob - batch.old_log_prob).exp().sub(1).abs().max().item())
        allowed = RATIO_TOLERANCE["half" if self.half else "full"]
        if not worst <= allowed:
            raise RunError(
                f"before the first update every likelihood ratio should be 1, but one is off by {worst:.2g} "
                f"(allowed: {allowed:g}): the loss does not see the policy that was rolled out. Dropout, or kernels "
                "whose result depends on the batch, can cause this; model.dtype=float32 and "
                "train.loss_batch=train.rollout_batch reduce it, run.check_ratios=false goes on regardless."
            )

    @property
    def asks_elsewhere(self) -> bool:
        """Whether a reward is served elsewhere: then even a quick epoch may become a long one."""
        return any(hasattr(reward.call, "errors") for reward in self.rewards)

    @property
    def half(self) -> bool:
        """Whether the frozen weights have half precision."""
        return any(p.dtype.itemsize == 2 for p in self.policy.model.module.parameters())

    # ------------------------------------------------------------------------------------------ helpers

    def seed(self, epoch: int, phase: str) -> str:
        """What randomness is a function of."""
        return f"{self.config.run.seed} {epoch} {phase}"

    def noise(self, epoch: int, phase: str, indices: range) -> Noise:
        """Randomness of the images at some places of an epoch."""
        return Noise(self.seed(epoch, phase), indices, self.config.train.images_per_prompt)

    def set_lr(self) -> None:
        """The learning rate of the next update: warm-up, then constant or falling."""
        train = self.config.train
        factor = min(1.0, (self.updates + 1) / max(1, train.warmup))
        if train.lr_decay == "linear":
            factor *= 1 - self.updates / (train.epochs * train.inner_epochs * train.updates_per_epoch)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    # ------------------------------------------------------------------------------------------ record

    def record(self, experience: Experience, metrics: dict[str, float], clock: Clock) -> float:
        """Append a line to metrics.jsonl and pass it to the trackers; returns the mean reward."""
        line: dict[str, Any] = {"epoch": self.epoch, "images": self.images, "updates": self.updates}
        for name, own in {"total": experience.scores.total, **experience.scores.each}.items():
            values = experience.gather(own)[experience.scored]
            line[f"reward/{name}"], line[f"reward/{name}_std"] = values.mean().item(), values.std(correction=0).item()
        line["failed_scores"] = experience.total - int(experience.scored.sum())
        line |= {**metrics, "lr": self.optimizer.param_groups[0]["lr"], "skipped_updates": self.skipped}
        line |= self.processes.add_up({"network_calls": self.policy.model.evaluations}) | spread_metrics(experience)
        self.first = {**line, **self.first}  # of the first epoch, and of the base model what was measured of it
        found = diagnose(self.first, line)
        if self.processes.is_main:
            self.write(line, found, clock)
        return float(line["reward/total"])

    def write(self, line: dict[str, Any], found: Mapping[str, str], clock: Clock) -> None:
        """Append to the record what an epoch measured, print the diagnoses that are new."""
        for name in found.keys() - self.said:
            tqdm.write(f"warning, epoch {self.epoch}: {found[name]}", file=sys.stderr)
        self.said |= found.keys()
        timing = {"epoch": self.epoch, **{f"seconds/{name}": round(s, 4) for name, s in clock.seconds.items()}}
        for name, content in (("metrics", line | {"diagnosis": sorted(found)}), ("timings", timing)):
            path = self.folder.file(f"{name}.jsonl")
            with naming(path), path.open("a", encoding="utf-8") as record:
                record.write(to_json(content) + "\n")
        self.processes.accelerator.log(line | timing, step=self.epoch)

    def picture(self, experience: Experience, epoch: int) -> None:
        """Save the first image of the first prompts, with prompts and rewards; images only, not points."""
        if experience.preview.dim() != 4 or not self.processes.is_main:
            return
        every, total = self.config.train.images_per_prompt, experience.scores.total
        chosen = range(0, len(experience.rows), every)[:PICTURES]
        labels = [f"{experience.rows[i].prompt} [{total[i].item():.2f}]" for i in chosen]
        path = self.folder.file(f"images/epoch_{epoch + 1:04d}.png")
        save_grid(path, list(experience.preview), labels)
        log_picture(self.processes.accelerator, "images", path, epoch + 1)


class Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[name], self.last = now - self.last, now
