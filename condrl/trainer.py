"""The one loop: roll out -> score -> credit -> update -> record."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from condrl.config import Config
from condrl.errors import RunError
from condrl.policy import Policy
from condrl.prompts import Row, epoch_rows
from condrl.report import save_grid
from condrl.rewards import Reward, Scores, score
from condrl.rollout import Rollout, rollout
from condrl.transition import trained_steps

Metrics = dict[str, Tensor]
RATIO_TOLERANCE = {"full": 1e-3, "half": 2e-2}  # by the precision of the frozen weights


@dataclass(frozen=True)
class Minibatch:
    """B (image, step) pairs."""

    x: Tensor  # (B, ...) state before the step
    k: Tensor  # (B,) step index
    next_x: Tensor  # (B, ...) state after it
    old_log_prob: Tensor  # (B,) nats, at roll-out
    advantage: Tensor  # (B,)
    condition: Tensor  # (B,)


@dataclass(frozen=True)
class Experience:
    """An epoch's trajectories with what was made of them; B images."""

    rollout: Rollout
    rows: list[Row]
    scores: Scores
    advantages: Tensor  # (B,)

    def pairs(self, images: Tensor, steps: Tensor) -> Minibatch:
        """The pairs (images[i], steps[i])."""
        r, where, k = self.rollout, images.to(self.advantages.device), steps.to(self.advantages.device)
        return Minibatch(
            x=r.states[k, where],
            k=steps,
            next_x=r.states[k + 1, where],
            old_log_prob=r.log_probs[k, where],
            advantage=self.advantages[where],
            condition=r.condition[images],
        )


class Algorithm(Protocol):
    """What an algorithm plugin provides; its dataclass fields are its options."""

    needs: Sequence[str]  # of: stochastic steps

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """Credit (B,) of rewards (B,) for images of prompt rows `groups` (B,)."""
        ...

    def loss(self, policy: Policy, batch: Minibatch) -> tuple[Tensor, Metrics]:
        """The loss of each pair (B,), and means to log."""
        ...


class Trainer:
    """Tunes `policy.model.module` in place and writes metrics.jsonl and images/ as it goes."""

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
        optimizer = torch.optim.AdamW(self.weights, train.lr, train.betas, weight_decay=train.weight_decay)
        policy.prepared, self.optimizer = accelerator.prepare(policy.model.module, optimizer)
        self.steps = trained_steps(policy.sampler, config.train)
        self.epoch = self.updates = self.images = 0

    # ------------------------------------------------------------------------------------------ phases

    def fit(self) -> None:
        """Run the epochs that are left.

        Raises: RunError when a ratio is not 1 before the first update or a reward fails.
        """
        bar = tqdm(range(self.epoch, self.config.train.epochs), desc="tuning", unit="epoch")
        for epoch in bar:
            clock = Clock()
            experience = self.collect(epoch, clock)
            if epoch == 0 and self.config.run.check_ratios:
                self.check_ratios(experience)
            metrics = self.update(experience, epoch)
            clock.lap("update")
            self.epoch, self.images = epoch + 1, self.images + len(experience.rows)
            self.record(experience, metrics, clock)
            bar.set_postfix(reward=f"{experience.scores.total.mean().item():.3f}")

    def collect(self, epoch: int, clock: Clock) -> Experience:
        """Roll out an epoch's prompts, score the images and give them credit."""
        train, model = self.config.train, self.policy.model
        drawn = epoch_rows(self.rows, self.config.run.seed, epoch, train.prompts_per_epoch)
        rows = [row for row in drawn for _ in range(train.images_per_prompt)]
        generator = self.generator(epoch, "rollout")
        trajectories = rollout(self.policy, model.encode([r.prompt for r in rows]), generator, train.rollout_batch)
        clock.lap("rollout")
        samples = self.decode(trajectories.samples)
        clock.lap("decode")
        scores = score(self.rewards, samples, rows)
        groups = torch.tensor([row.index for row in rows], device=scores.total.device)
        advantages = self.algorithm.advantages(scores.total, groups)
        clock.lap("score")
        self.picture(samples, rows, scores, epoch)
        return Experience(trajectories, rows, scores, advantages)

    @torch.no_grad()
    def decode(self, states: Tensor) -> Tensor:
        return self.policy.model.decode(states)

    def update(self, experience: Experience, epoch: int) -> dict[str, float]:
        """The epoch's optimiser steps; returns the means of their metrics."""
        train, totals = self.config.train, defaultdict[str, list[Tensor]](list)
        generator = self.generator(epoch, "update")
        for _ in range(train.inner_epochs):
            order = torch.randperm(len(experience.rows), generator=generator)
            for images in order.chunk(train.updates_per_epoch):
                for name, value in self.optimise(experience, images, generator).items():
                    totals[name].append(value)
        return {name: torch.stack(values).mean().item() for name, values in totals.items()}

    def optimise(self, experience: Experience, images: Tensor, generator: torch.Generator) -> Metrics:
        """One optimiser step on the mean over images of the loss summed over steps."""
        train, totals = self.config.train, defaultdict[str, list[Tensor]](list)
        steps = self.draw_steps(len(images), generator)
        weight = len(self.steps) / steps.numel()  # a subset of the steps stands for all of them
        pairs = torch.stack([images[:, None].expand_as(steps), steps], -1).flatten(0, 1)
        self.set_lr()
        for part in pairs.split(train.loss_batch):
            loss, metrics = self.algorithm.loss(self.policy, experience.pairs(*part.unbind(1)))
            self.accelerator.backward(loss.sum() * weight)
            metrics["loss"] = loss.detach().mean()
            for name, value in metrics.items():
                totals[name].append(value * (len(part) / len(pairs)))
        norm = self.accelerator.clip_grad_norm_(self.weights, train.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        return {**{name: torch.stack(values).sum() for name, values in totals.items()}, "grad_norm": norm}

    def draw_steps(self, images: int, generator: torch.Generator) -> Tensor:
        """The steps trained for each image, (images, n): all, or n drawn without replacement."""
        count = self.config.train.steps_per_image or len(self.steps)
        if count == len(self.steps):
            return self.steps.expand(images, -1)
        return self.steps[torch.rand(images, len(self.steps), generator=generator).argsort(1)[:, :count]]

    # ------------------------------------------------------------------------------------------ checks

    @torch.no_grad()
    def check_ratios(self, experience: Experience) -> None:
        """Raises: RunError unless the loss's policy gives every stored step the probability the roll-out gave it."""
        worst = 0.0
        for part in self.every_pair(len(experience.rows)).split(self.config.train.loss_batch):
            batch = experience.pairs(*part.unbind(1))
            law = self.policy.transition(batch.x, batch.k, batch.condition)
            worst = max(worst, (law.log_prob(batch.next_x) - batch.old_log_prob).exp().sub(1).abs().max().item())
        half = any(p.dtype.itemsize == 2 for p in self.policy.model.module.parameters())
        allowed = RATIO_TOLERANCE["half" if half else "full"]
        if not worst <= allowed:
            raise RunError(
                f"before the first update every likelihood ratio should be 1, but one is off by {worst:.2g} "
                f"(allowed: {allowed:g}): the loss does not see the policy that was rolled out. "
                "Dropout or half precision can cause this; model.dtype=float32 rules out the latter."
            )

    def every_pair(self, images: int) -> Tensor:
        """All (image, trained step) pairs, (images * steps, 2), ordered by step as the roll-out was."""
        return torch.cartesian_prod(self.steps, torch.arange(images)).flip(1)

    # ------------------------------------------------------------------------------------------ helpers

    def generator(self, epoch: int, phase: str) -> torch.Generator:
        """Randomness as a function of seed, epoch and phase alone."""
        phases = ("rollout", "update")
        return torch.Generator().manual_seed(
            (self.config.run.seed * 1_000_003 + epoch) * len(phases) + phases.index(phase)
        )

    def set_lr(self) -> None:
        warmup = min(1.0, (self.updates + 1) / max(1, self.config.train.warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.train.lr * warmup

    # ------------------------------------------------------------------------------------------ record

    def record(self, experience: Experience, metrics: dict[str, float], clock: Clock) -> None:
        """Append a line to metrics.jsonl and pass it to the trackers."""
        line: dict[str, Any] = {"epoch": self.epoch, "images": self.images, "updates": self.updates}
        for name, values in {"total": experience.scores.total, **experience.scores.each}.items():
            line[f"reward/{name}"], line[f"reward/{name}_std"] = values.mean().item(), values.std(correction=0).item()
        line |= {**metrics, "lr": self.optimizer.param_groups[0]["lr"], "unet_calls": self.policy.model.evaluations}
        line |= {f"seconds/{name}": round(seconds, 4) for name, seconds in clock.seconds.items()}
        with (self.config.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.accelerator.log(line, step=self.epoch)

    def picture(self, samples: Tensor, rows: Sequence[Row], scores: Scores, epoch: int) -> None:
        """Save an epoch's first group of each prompt, with prompts and rewards."""
        every = max(1, self.config.train.images_per_prompt)
        chosen = range(0, len(rows), every)[:8]
        labels = [f"{rows[i].prompt} [{scores.total[i].item():.2f}]" for i in chosen]
        save_grid(self.config.folder / "images" / f"epoch_{epoch + 1:04d}.png", [samples[i] for i in chosen], labels)


class Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self.last = now - self.last, now
