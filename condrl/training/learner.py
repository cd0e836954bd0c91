"""The optimiser steps of an epoch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from condrl.algorithms.base import Algorithm, Collected, OwnNetwork
from condrl.algorithms.examples import Examples, Metrics
from condrl.algorithms.reference import MovingReference
from condrl.config import Config
from condrl.diffusion.noise import seeded_by
from condrl.diffusion.policy import Policy, trained_weights
from condrl.errors import RunError
from condrl.processes import Processes
from condrl.training.optimizer import make_optimizer
from condrl.training.returned import check_loss


class Learner:
    """Updates what is trained of a policy, and the algorithm's own networks, by `train.optimizer`."""

    def __init__(self, config: Config, policy: Policy, algorithm: Algorithm, processes: Processes) -> None:
        self.config, self.policy, self.algorithm, self.processes = config, policy, algorithm, processes
        self.weights = trained_weights(policy.model.module)
        train, self.networks = config.train, algorithm.networks()
        self.rates = [train.lr, *(own.lr for own in self.networks.values())]
        groups = [{"params": self.weights}, *(parameter_group(own) for own in self.networks.values())]
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = make_optimizer(train, groups)
        self.average = MovingReference(policy, train.ema) if train.ema else None
        self.updates = 0
        self.bad_updates = self.skipped = 0  # updates without a finite gradient: in a row, in all

    def update(self, examples: Examples, experience: Collected, epoch: int) -> dict[str, float]:
        """The epoch's optimiser steps; returns the means of their metrics."""
        train, totals, norms = self.config.train, defaultdict[str, list[Tensor]](list), []
        pairs: Counter[str] = Counter()
        generator = seeded_by(f"{self.config.run.seed} {epoch} update")
        for _ in range(train.inner_epochs):
            for part in self.minibatches(generator):
                part = part[experience.scored.cpu()[part]]
                if not len(part):
                    continue
                metrics, having, norm = self.step(examples, experience.indices, part, generator)
                if norm is not None:
                    norms.append(norm)
                    pairs += having
                    for name, value in metrics.items():
                        totals[name].append(value)
        means = {name: torch.stack(values).sum().item() / len(norms) for name, values in totals.items()}
        sums, counts = self.processes.add_up(means), self.processes.add_up(pairs)
        found = {name: value * (counts["loss"] / counts[name]) for name, value in sums.items()}  # of pairs that have it
        own = experience.scored[experience.indices.start : experience.indices.stop]
        measured = {name: value.double().mean().item() for name, value in examples.metrics.items()}
        found |= self.processes.average(measured, own.sum().item())
        is_known = norms and self.algorithm.trains_policy
        return found | ({"grad_norm": torch.stack(norms).mean().item()} if is_known else {})

    def minibatches(self, generator: torch.Generator) -> Sequence[Tensor]:
        """The indices of the images of each update in a pass, each prompt's spread evenly over the updates."""
        train = self.config.train
        turn = torch.rand(train.prompts_per_epoch, train.images_per_prompt, generator=generator).argsort(1).argsort(1)
        order = (turn + torch.rand(turn.shape, generator=generator)).flatten().argsort()
        return order.chunk(train.updates_per_epoch)

    def step(
        self, examples: Examples, indices: range, part: Tensor, generator: torch.Generator
    ) -> tuple[Metrics, Counter[str], Tensor | None]:
        """One optimiser step on the mean over the images at `part` of the loss summed over steps, and the extra ones.

        Returns this process's part of the metrics' means, the pairs that have each, and the gradient's norm; None where
        the step was skipped.
        """
        train, totals = self.config.train, defaultdict[str, list[Tensor]](list)
        having: Counter[str] = Counter()
        steps = self.draw_steps(examples.k, len(part), generator)
        weight = len(examples.k) / steps.numel()  # a subset of the steps stands for all of them
        own = (part >= indices.start) & (part < indices.stop)
        pairs = torch.stack([(part - indices.start)[:, None].expand_as(steps), steps], -1)[own].flatten(0, 1)
        at_once = self.config.pairs_at_once(len(examples.k), self.processes.count)
        parts = pairs.split(at_once) if len(pairs) else ()
        self.set_lr()
        for some in parts:
            loss, metrics = check_loss(self.algorithm.loss(self.policy, examples.at(*some.unbind(1))), len(some))
            (loss.sum() * weight).backward()
            for name, value in {**metrics, "loss": loss.detach().mean()}.items():
                totals[name].append((value.detach() * (len(some) / steps.numel())).mean())
                having[name] += len(some)
        self.processes.sum_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, train.max_grad_norm)
        own_networks = [p for group in self.optimizer.param_groups[1:] for p in group["params"]]
        finite = bool(norm.isfinite()) and has_finite_gradients(own_networks)
        self.count_bad(finite)
        if finite:
            self.optimizer.step()
            self.updates += 1
            if self.average:
                self.average.update(self.policy)
        self.optimizer.zero_grad()
        if finite:
            self.extra_steps(examples, parts, weight)
            self.algorithm.after_update(self.policy)
        parts_of_means = {name: torch.stack(values).sum() for name, values in totals.items()}
        return parts_of_means, having, norm if finite else None

    def deploying(self) -> AbstractContextManager[None]:
        """Within it, the policy is what is measured and saved: the average of its weights if there is one."""
        return self.average.active(self.policy) if self.average else nullcontext()

    def count_bad(self, finite: bool) -> None:
        """Count an update that is skipped because its gradient is not finite.

        Raises: RunError when that has happened `train.max_bad_updates` times in a row.
        """
        if finite:
            self.bad_updates = 0
            return
        self.bad_updates += 1
        self.skipped += 1
        if self.bad_updates >= self.config.train.max_bad_updates:
            raise RunError(
                f"{self.bad_updates} updates in a row, the last after update {self.updates}, had a gradient that is "
                "not finite, and were not made: lower train.lr, or use model.dtype=bfloat16 or float32 if it is float16"
            )

    def extra_steps(self, examples: Examples, parts: Sequence[Tensor], weight: float) -> None:
        """The own optimiser steps of the algorithm's networks, on the same pairs."""
        for name, network in self.networks.items():
            own = list(network.module.parameters())
            for _ in range(network.extra_steps):
                for some in parts:
                    loss = self.algorithm.own_loss(name, self.policy, examples.at(*some.unbind(1)))
                    torch.autograd.backward(loss.sum() * weight, inputs=own)
                self.processes.sum_gradients(own)
                if has_finite_gradients(own):
                    self.optimizer.step()  # of what has a gradient: this network alone
                self.optimizer.zero_grad()

    def draw_steps(self, steps: Tensor, images: int, generator: torch.Generator) -> Tensor:
        """The steps trained for each image, (images, n): all, or n drawn without replacement."""
        count = self.config.train.steps_per_image or len(steps)
        if count == len(steps):
            return steps.expand(images, -1)
        return steps[torch.rand(images, len(steps), generator=generator).argsort(1)[:, :count]]

    def set_lr(self) -> None:
        """The learning rate of the next update: warm-up, then constant or falling."""
        train = self.config.train
        factor = min(1.0, (self.updates + 1) / max(1, train.warmup))
        if train.lr_decay == "linear":
            factor *= 1 - self.updates / (train.epochs * train.inner_epochs * train.updates_per_epoch)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor


def has_finite_gradients(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether every gradient that there is is finite."""
    return all(bool(p.grad.norm().isfinite()) for p in parameters if p.grad is not None)


def parameter_group(own: OwnNetwork) -> dict[str, Any]:
    """AdamW's parameters and settings for an algorithm's own network; other settings are the policy's."""
    own_settings = {"betas": own.betas, "weight_decay": own.weight_decay}
    return {"params": list(own.module.parameters())} | {k: v for k, v in own_settings.items() if v is not None}
