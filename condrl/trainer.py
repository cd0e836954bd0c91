"""The one loop: roll out -> score -> credit -> update -> record."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from condrl.algorithms import Algorithm, Examples, Experience, Metrics, RatioExamples, every_pair, recomputed
from condrl.checkpoint import save_checkpoint
from condrl.config import Config
from condrl.diagnose import diagnose, spread_metrics
from condrl.errors import RunError, Stopped
from condrl.policy import Policy
from condrl.prompts import Row, epoch_rows
from condrl.report import save_grid
from condrl.rewards import Reward, score

PICTURES = 8  # images in an epoch's picture
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
        accelerator: Any,
    ) -> None:
        self.config, self.policy, self.algorithm = config, policy, algorithm
        self.rewards, self.rows, self.accelerator = rewards, rows, accelerator
        self.weights = [p for p in policy.model.module.parameters() if p.requires_grad]
        train = config.train
        algorithm.setup(policy)
        own = algorithm.modules()
        self.rates = [train.lr, *(lr for _, lr in own.values())]
        groups = [self.weights, *(list(module.parameters()) for module, _ in own.values())]
        optimizer = torch.optim.AdamW(
            [{"params": group} for group in groups], train.lr, train.betas, weight_decay=train.weight_decay, fused=True
        )
        policy.prepared, self.optimizer = accelerator.prepare(policy.model.module, optimizer)
        self.epoch = self.updates = self.images = 0
        self.metrics_file = config.folder / "metrics.jsonl"  # the same whenever a run is repeated or resumed
        self.bad_updates = self.skipped = 0  # updates without a finite gradient: in a row, in all
        self.first: dict[str, float] = {}  # what the first epoch recorded
        self.said: set[str] = set()  # the diagnoses that were printed
        self.stopping = 0  # the number of the signal that asked for it

    # ------------------------------------------------------------------------------------------ phases

    def fit(self) -> None:
        """Run the epochs that are left, with a checkpoint now and then, at the end, and before an early stop.

        Raises: RunError when a ratio is not 1 before the first update or a reward fails; Stopped when asked to stop.
        """
        run, epochs = self.config.run, self.config.train.epochs
        bar = tqdm(range(self.epoch, epochs), initial=self.epoch, total=epochs, desc="tuning", unit="epoch")
        saved = time.monotonic()
        for epoch in bar:
            reward = self.run_epoch(epoch)
            bar.set_postfix(reward=f"{reward:.3f}")
            if self.stopping or self.epoch == epochs or time.monotonic() - saved >= run.checkpoint_seconds:
                self.checkpoint()
                saved = time.monotonic()
            if self.stopping:
                raise Stopped(self.stopping)

    def run_epoch(self, epoch: int) -> float:
        """Roll out, score, credit, update, record; returns the mean reward."""
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
        metrics = self.update(examples, epoch)
        clock.lap("update")
        self.epoch, self.images = epoch + 1, self.images + len(experience.rows)
        self.record(experience, metrics, clock)
        return experience.scores.total.mean().item()

    def collect(self, epoch: int, clock: Clock) -> Experience:
        """Roll out an epoch's prompts and score the images."""
        train, model = self.config.train, self.policy.model
        drawn = epoch_rows(self.rows, self.config.run.seed, epoch, train.prompts_per_epoch)
        rows = [row for row in drawn for _ in range(train.images_per_prompt)]
        generator = self.generator(epoch, "rollout")
        condition = model.encode([row.prompt for row in rows])
        trajectories = self.algorithm.rollout(self.policy, condition, generator, train.rollout_batch)
        clock.lap("rollout")
        with torch.no_grad():
            samples = model.decode(trajectories.samples)
            clock.lap("decode")
            scores = score(self.rewards, samples, rows)
        clock.lap("score")

        def total(points: Tensor, images: Tensor) -> Tensor:
            return score(self.rewards, points, [rows[i] for i in images.tolist()]).total

        return Experience(trajectories, rows, scores, samples[:: train.images_per_prompt][:PICTURES].cpu(), total)

    def examples(self, experience: Experience, epoch: int) -> Examples:
        """What the epoch's updates learn from."""
        train = self.config.train
        examples = self.algorithm.examples(self.policy, experience, train, self.generator(epoch, "examples"))
        if self.half and isinstance(examples, RatioExamples):
            return recomputed(examples, self.policy, train.loss_batch)
        return examples

    def update(self, examples: Examples, epoch: int) -> dict[str, float]:
        """The epoch's optimiser steps; returns the means of their metrics."""
        train, totals = self.config.train, defaultdict[str, list[Tensor]](list)
        generator = self.generator(epoch, "update")
        for _ in range(train.inner_epochs):
            for part in torch.randperm(examples.images, generator=generator).chunk(train.updates_per_epoch):
                for name, value in self.optimise(examples, part, generator).items():
                    totals[name].append(value)
        means = {name: torch.stack(values).mean().item() for name, values in totals.items()}
        return means | {name: value.item() for name, value in examples.metrics.items()}

    def optimise(self, examples: Examples, images: Tensor, generator: torch.Generator) -> Metrics:
        """One optimiser step on the mean over images of the loss summed over columns."""
        train, totals = self.config.train, defaultdict[str, list[Tensor]](list)
        columns = self.draw_columns(examples.columns, len(images), generator)
        weight = len(examples.columns) / columns.numel()  # a subset of the columns stands for all of them
        pairs = torch.stack([images[:, None].expand_as(columns), columns], -1).flatten(0, 1)
        self.set_lr()
        for part in pairs.split(train.loss_batch):
            loss, metrics = self.algorithm.loss(self.policy, examples.minibatch(*part.unbind(1)))
            self.accelerator.backward(loss.sum() * weight)
            metrics["loss"] = loss.detach().mean()
            for name, value in metrics.items():
                totals[name].append(value.detach() * (len(part) / len(pairs)))
        norm = self.accelerator.clip_grad_norm_(self.weights, train.max_grad_norm)
        if not self.finite(norm):
            self.optimizer.zero_grad()
            return {}
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        return {**{name: torch.stack(values).sum() for name, values in totals.items()}, "grad_norm": norm}

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
        """Write what the run needs to go on from here."""
        name = f"epoch_{self.epoch:08d}"
        save_checkpoint(self.config.folder / "checkpoints", name, self.state_dict(), self.config.run.keep_checkpoints)

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
            "evaluations": self.policy.model.evaluations,
            "weights": list(self.weights),
            "modules": {name: module.state_dict() for name, (module, _) in self.algorithm.modules().items()},
            "optimizer": self.optimizer.state_dict(),
            "algorithm": self.algorithm.state_dict(),
            "rng": torch.get_rng_state(),
            "metrics_bytes": self.metrics_file.stat().st_size if self.metrics_file.exists() else 0,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave; lines that were recorded after it are taken back."""
        self.epoch, self.updates, self.images = state["epoch"], state["updates"], state["images"]
        self.bad_updates, self.skipped, self.first = state["bad_updates"], state["skipped"], state["first"]
        self.policy.model.evaluations = state["evaluations"]
        for weight, value in zip(self.weights, state["weights"], strict=True):
            weight.copy_(value)
        for name, (module, _) in self.algorithm.modules().items():
            module.load_state_dict(state["modules"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.algorithm.load_state_dict(state["algorithm"])
        torch.set_rng_state(state["rng"])
        if self.metrics_file.exists() and self.metrics_file.stat().st_size > state["metrics_bytes"]:
            os.truncate(self.metrics_file, state["metrics_bytes"])

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
    def half(self) -> bool:
        """Whether the frozen weights have half precision."""
        return any(p.dtype.itemsize == 2 for p in self.policy.model.module.parameters())

    # ------------------------------------------------------------------------------------------ helpers

    def generator(self, epoch: int, phase: str) -> torch.Generator:
        """Randomness as a function of seed, epoch and phase alone."""
        phases = ("rollout", "examples", "update")
        return torch.Generator().manual_seed(
            (self.config.run.seed * 1_000_003 + epoch) * len(phases) + phases.index(phase)
        )

    def set_lr(self) -> None:
        """The learning rate of the next update: warm-up, then constant or falling."""
        train = self.config.train
        factor = min(1.0, (self.updates + 1) / max(1, train.warmup))
        if train.lr_decay == "linear":
            factor *= 1 - self.updates / (train.epochs * train.inner_epochs * train.updates_per_epoch)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    # ------------------------------------------------------------------------------------------ record

    def record(self, experience: Experience, metrics: dict[str, float], clock: Clock) -> None:
        """Append a line to metrics.jsonl and pass it to the trackers."""
        line: dict[str, Any] = {"epoch": self.epoch, "images": self.images, "updates": self.updates}
        for name, values in {"total": experience.scores.total, **experience.scores.each}.items():
            line[f"reward/{name}"], line[f"reward/{name}_std"] = values.mean().item(), values.std(correction=0).item()
        line |= {**metrics, "lr": self.optimizer.param_groups[0]["lr"], "unet_calls": self.policy.model.evaluations}
        line |= {"skipped_updates": self.skipped, **spread_metrics(experience)}
        self.first = self.first or dict(line)
        found = diagnose(self.first, line)
        for name in found.keys() - self.said:
            tqdm.write(f"warning, epoch {self.epoch}: {found[name]}", file=sys.stderr)
        self.said |= found.keys()
        self.accelerator.log(line, step=self.epoch)
        line["diagnosis"] = sorted(found)
        timing = {"epoch": self.epoch, **{f"seconds/{name}": round(s, 4) for name, s in clock.seconds.items()}}
        for file, content in ((self.metrics_file, line), (self.metrics_file.with_name("timings.jsonl"), timing)):
            with file.open("a") as record:
                record.write(json.dumps(content) + "\n")
        self.accelerator.log(timing, step=self.epoch)

    def picture(self, experience: Experience, epoch: int) -> None:
        """Save the first image of the first prompts, with prompts and rewards; images only, not points."""
        if experience.shown.dim() != 4:
            return
        every, total = self.config.train.images_per_prompt, experience.scores.total
        chosen = range(0, len(experience.rows), every)[:PICTURES]
        labels = [f"{experience.rows[i].prompt} [{total[i].item():.2f}]" for i in chosen]
        save_grid(self.config.folder / "images" / f"epoch_{epoch + 1:04d}.png", list(experience.shown), labels)


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
