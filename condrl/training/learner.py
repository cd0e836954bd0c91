"""The optimiser steps of an epoch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from condrl.algorithms.base import Algorithm, Examples, Experience, Metrics
from condrl.config import Config
from condrl.diffusion.noise import seeded_by
from condrl.diffusion.policy import Policy
from condrl.errors import RunError
from condrl.processes import Processes


class Learner:
    """Updates what is trained of a policy, and the algorithm's own networks, by AdamW."""

    def __init__(self, config: Config, policy: Policy, algorithm: Algorithm, processes: Processes) -> None:
        self.config, self.policy, self.algorithm, self.processes = config, policy, algorithm, processes
        self.weights = [p for p in policy.model.module.parameters() if p.requires_grad]
        train, own = config.train, algorithm.modules()
        self.rates = [train.lr, *(lr for _, lr in own.values())]
        groups = [self.weights, *(list(module.parameters()) for module, _ in own.values())]
        self.parameters = [parameter for group in groups for parameter in group]
        self.optimizer = torch.optim.AdamW(
            [{"params": group} for group in groups], train.lr, train.betas, weight_decay=train.weight_decay, fused=True
        )
        self.updates = 0
        self.bad_updates = self.skipped = 0  # updates without a finite gradient: in a row, in all

    def update(self, examples: Examples, experience: Experience, epoch: int) -> dict[str, float]:
        """The epoch's optimiser steps; returns the means of their metrics."""
        train, totals, norms = self.config.train, defaultdict[str, list[Tensor]](list), []
        generator = seeded_by(f"{self.config.run.seed} {epoch} update")
        for _ in range(train.inner_epochs):
            for part in self.minibatches(generator):
                part = part[experience.scored.cpu()[part]]
                if not len(part):
                    continue
                metrics, norm = self.step(examples, experience.indices, part, generator)
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

    def minibatches(self, generator: torch.Generator) -> Sequence[Tensor]:
        """The places of the images of each update of a pass: as many of each prompt as can be."""
        train = self.config.train
        turn = torch.rand(train.prompts_per_epoch, train.images_per_prompt, generator=generator).argsort(1).argsort(1)
        order = (turn + torch.rand(turn.shape, generator=generator)).flatten().argsort()
        return order.chunk(train.updates_per_epoch)

    def step(
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

    def set_lr(self) -> None:
        """The learning rate of the next update: warm-up, then constant or falling."""
        train = self.config.train
        factor = min(1.0, (self.updates + 1) / max(1, train.warmup))
        if train.lr_decay == "linear":
            factor *= 1 - self.updates / (train.epochs * train.inner_epochs * train.updates_per_epoch)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
