"""A model of any shape whose every number a test can compute by hand, and what tunes it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributions import Independent, Normal

import condrl
from condrl.algorithms.base import Algorithm, OwnNetwork
from condrl.algorithms.examples import Examples, per_step
from condrl.config import Config, RunConfig, TrainConfig
from condrl.diffusion.policy import Policy
from condrl.diffusion.schedule import VP
from condrl.processes import Processes
from condrl.prompts import Row
from condrl.rewards.scoring import make_reward
from condrl.training.build import make, make_sampler
from condrl.training.clock import Clock
from condrl.training.trainer import Trainer

SHAPES = [(1,), (2,), (3, 2, 2)]  # on a line, in the plane, an image
SCHEDULE = VP(b0=0.1, b1=3.0, end=2.0, final_time=0.02)  # its time is not 1, and its g^2 is not constant
SIDES = (Row(0, "0"), Row(1, "1"))


class Correction(nn.Module):
    """gain x + offset, of each prompt and coordinate."""

    def __init__(self, prompts: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.gain, self.offset = (nn.Parameter(torch.zeros(prompts, *shape)) for _ in range(2))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.gain[condition] * x + self.offset[condition]


class Shaped:
    """Points (B, d) or latents (B, 3, h, w) with a bent score, and a correction of it that starts at 0."""

    schedule, device, evaluations, pretrained = SCHEDULE, torch.device("cpu"), 0, True

    def __init__(self, shape: tuple[int, ...], prompts: int = 2, data: Tensor | None = None) -> None:
        self.state_shape, self.tuned = shape, True
        self.module: nn.Module = Correction(prompts, shape)
        self.middle = torch.linspace(-0.5, 0.8, self.module.offset.numel()).view_as(self.module.offset)
        if data is not None:
            self.data = data  # (C, n, d)

    def encode(self, prompts: list[str]) -> Tensor:
        return torch.tensor([int(prompt) for prompt in prompts])

    def score(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        before = self.base(x, t, condition)
        return before + self.module(x, condition) if self.tuned else before

    def base(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The pretrained score."""
        t = t.to(x).reshape(-1, *[1] * (x.dim() - 1))
        return self.middle.to(x)[condition] - x + 0.4 * torch.sin(x + t)

    def features(self, condition: Tensor) -> Tensor:
        return nn.functional.one_hot(condition, len(self.middle)).float()

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.state_shape

    def encode_images(self, images: Tensor) -> Tensor:
        return images

    def decode(self, x: Tensor) -> Tensor:
        return x.sigmoid() if x.dim() == 4 else x

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        self.tuned = False
        try:
            yield
        finally:
            self.tuned = True

    def merged(self) -> Any:
        return contextlib.nullcontext()


@condrl.reward
def bowl(samples: Tensor, prompts: list[str]) -> Tensor:
    """Bent, with another slope in every coordinate and prompt."""
    flat = samples.flatten(1)
    slope = torch.linspace(0.4, 1.4, flat.shape[1]).to(flat)
    sign = torch.tensor([1.0 if prompt == "0" else -0.5 for prompt in prompts]).to(flat)
    return sign * (flat @ slope) - 0.3 * flat.square().sum(1)


def trainer_of(
    folder: Path,
    shape: tuple[int, ...] = (2,),
    own: Algorithm | None = None,
    model: Shaped | None = None,
    rows: tuple[Row, ...] = SIDES,
    **sections: dict[str, Any],
) -> Trainer:
    """Two prompts, eight images of each, five uneven steps; `sections` change the config, `own` is its algorithm."""
    few = {"prompts_per_epoch": 2, "images_per_prompt": 8, "rollout_batch": 8, "loss_batch": 1000, "epochs": 1}
    tree: dict[str, Any] = {
        "algorithm": {"name": "ddpo"},
        "sampler": {"steps": 5, "spacing": "log_snr"},
        "rewards": {"bowl": {}},
        "train": {**few, "updates_per_epoch": 1, "max_grad_norm": 1e9},
        "run": {"dir": str(folder)},
    }
    if "name" not in sections.get("sampler", {}):
        tree["sampler"] |= {"name": "exponential", "eta": 0.8}
    for name, values in sections.items():
        tree[name] |= values
    typed = {"train": TrainConfig(**tree["train"]), "run": RunConfig(**tree["run"])}  # ten times as fast as parsing it
    config, model = Config(**{**tree, **typed}), model or Shaped(shape)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.run.seed)
    policy = Policy(model, make_sampler(config.sampler, model.schedule))
    rewards = [make_reward(name, options) for name, options in config.rewards.items() if options.get("weight", 1)]
    found = own or make("algorithm", config.algorithm)
    return Trainer(config, policy, found, rewards, rows, Processes(Accelerator(cpu=True)))


def move(trainer: Trainer, size: float = 0.2, seed: int = 0) -> None:
    """Take the policy away from where it is."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in trainer.learner.weights:
            weight += size * torch.randn(weight.shape, generator=generator)


def an_epoch(trainer: Trainer) -> tuple[Any, Any, Any]:
    """What an epoch rolls out, what is learned from it, and all of that as one batch, (steps * images)."""
    experience = trainer.collect(0, Clock())
    examples = trainer.examples(experience, 0)
    return experience, examples, examples.at(*examples.every_pair().unbind(1))


def transition(mean: Tensor, std: Tensor | float) -> Independent:
    """N(mean, std^2 I) of states (B, ...), std a number or (B,)."""
    std = torch.as_tensor(std).to(mean).reshape(-1, *[1] * (mean.dim() - 1))
    return Independent(Normal(mean, std.expand_as(mean)), mean.dim() - 1)


def step_of(trainer: Trainer, k: int, x: Tensor, score: Tensor) -> Independent:
    """The distribution of the state after step k from x with a score, by the sampler's three numbers."""
    sampler = trainer.policy.sampler
    return transition(sampler.A[k].to(x) * x + sampler.B[k].to(x) * score, sampler.S[k])


def at(trainer: Trainer, k: int, count: int) -> Tensor:
    """The time of step k, (count,)."""
    return trainer.policy.sampler.times[k].expand(count)


# ---------------------------------------------------------------------------------------------- an algorithm


@dataclass(frozen=True, kw_only=True)
class Pulls(Examples):
    """A number for each image and step, towards which the weights are drawn."""

    images: Tensor = per_step()
    target: Tensor = per_step()


class Recorded(Algorithm):
    """The loss of image i and step j is (|w|^2 / 2 - target_ji sum(w)), w all the weights; each call is kept.

    The calls of numbers `bad` are nan; with `own` it has a network that is trained too, at a rate of .07 and with
    `settings` of its own.
    """

    def __init__(self, steps: int = 4, bad: Sequence[int] = (), own: bool = False, **settings: Any) -> None:
        self.settings = settings
        self.count, self.bad, self.calls, self.rolled = steps, set(bad), [], []
        self.own = nn.Linear(3, 1) if own else None

    def networks(self):
        return {"own": OwnNetwork(self.own, 0.07, **self.settings)} if self.own else {}

    def rollout(self, policy, condition, noise, batch):
        self.rolled.append((len(condition), batch))
        return super().rollout(policy, condition, noise, batch)

    def examples(self, policy, experience, train, noise):
        self.table = torch.randn(self.count, 16, generator=torch.Generator().manual_seed(len(self.rolled)))
        images = torch.arange(16).expand(self.count, 16)
        return Pulls(condition=torch.zeros(16), k=torch.arange(self.count), images=images, target=self.table)

    def loss(self, policy, batch):
        target = batch.target
        self.calls.append((batch.images.tolist(), batch.k.tolist()))
        own = self.own_loss("own", policy, batch) if self.own else 0.0
        loss = pulled(policy.model.module, target) + own
        return loss * (torch.nan if len(self.calls) in self.bad else 1), {"seen": target.mean()}

    def own_loss(self, name, policy, batch):
        return pulled(self.own, batch.target)


def pulled(module: nn.Module, target: Tensor) -> Tensor:
    """|w|^2 / 2 - target sum(w), (B,), w all of a module's weights."""
    return sum(p.square().sum() / 2 - target * p.sum() for p in module.parameters())
