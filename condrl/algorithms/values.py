"""Value networks: what reward a state promises."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from condrl.algorithms.base import Experience
from condrl.algorithms.examples import is_compiled
from condrl.diffusion.model import Featured
from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import Rollout
from condrl.diffusion.schedule import Schedule, like, x0_from_score
from condrl.diffusion.transition import Sampler
from condrl.errors import UsageError
from condrl.io.files import load_tensors, locate
from condrl.models.points import MODULE_FILE, load_module


class Value(nn.Module):
    """V(x, t, c) = c_skip(t) r(x0hat) + c_out(t) F(x, t, c): the reward of the denoised prediction, corrected.

    c_skip = alpha^2 / (alpha^2 + sigma^2) and c_out = sigma / sqrt(alpha^2 + sigma^2), so V is r at t = 0
    (docs/theory.md 11). Without the hint r(x0hat), V = F. Points enter F unchanged, images through three convolutions.
    """

    def __init__(self, schedule: Schedule, state_shape: tuple[int, ...], features: int, width: int = 64) -> None:
        super().__init__()
        self.schedule = schedule
        points = len(state_shape) == 1
        self.body, size = (nn.Identity(), state_shape[0]) if points else convolutions(state_shape[0], width)
        self.head = mlp(size + 2 + features, width, 1)

    def forward(self, x: Tensor, t: Tensor, features: Tensor, hint: Tensor | None = None) -> Tensor:
        """(B,) at x (B, ...), times t (B,), prompt features (B, F) and hints r(x0hat) (B,)."""
        clock, features = self.schedule.clock(t).to(x), features.to(x)
        found: Tensor = self.head(torch.cat([self.body(x), clock, features], -1))[:, 0]
        if hint is None:
            return found
        alpha, sigma = (like(c, found) for c in (self.schedule.alpha(t), self.schedule.sigma(t)))
        total = alpha.square() + sigma.square()
        return alpha.square() / total * hint + sigma / total.sqrt() * found


def make_value(policy: Policy, width: int, has_network_features: bool = False) -> Value:
    """A value network for a policy's states and prompts, and with them for the pretrained network's features.

    Raises: UsageError as `network_features`.
    """
    model, prompt = policy.model, torch.zeros(1, dtype=torch.long)
    features = model.features(prompt).shape[1]
    if has_network_features:
        before, x = model.evaluations, torch.zeros(1, *model.state_shape, device=model.device)
        with torch.compiler.set_stance("force_eager") if is_compiled(policy) else nullcontext():
            features += network_features(policy, x, policy.sampler.times[:1], prompt).shape[1]
        model.evaluations = before
    return Value(model.schedule, model.state_shape, features, width).to(model.device)


def network_features(policy: Policy, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
    """What the pretrained network makes of states x (B, ...) at times t (B,), (B, F), each of mean 0 and variance 1.

    The pretrained one's, at one more call of it, and not those of the policy's own call, which would be free: a value
    is a function of the state, and so are these, in every epoch alike. The policy's change under it with each update.

    Raises: UsageError of a model without a network that has such features.
    """
    model = policy.model
    if not isinstance(model, Featured):
        raise UsageError(
            "config algorithm.value_features: this model has no network with features of its states: leave it out"
        )
    with model.reference(), policy.rolling_out():
        found = model.network_features(x, t, condition)
    return layer_norm(found, found.shape[1:])


@torch.no_grad()
def visited_features(policy: Policy, rollout: Rollout, batch: int) -> Tensor:
    """`network_features` of the states at the beginning of each step, (K, B, F), `batch` images at a time."""
    rows = []
    for k in range(policy.steps):
        for images in torch.arange(len(rollout.condition)).split(batch):
            x, t = rollout.states[k, images.to(rollout.states.device)], policy.sampler.times[k].expand(len(images))
            rows.append(network_features(policy, x, t, rollout.condition[images]))
    return torch.cat(rows).unflatten(0, (policy.steps, -1))


class StepValue(nn.Module):
    """V = log E_pre[exp(r / kappa) | m], up to a number of each prompt, m the mean of a pretrained chain's step.

    What comes after a step depends on m alone, so m + S^2 grad V(m) is the mean of the optimal step, exactly
    (docs/theory.md 22). It is of one chain: of its times and its noise.
    """

    times: Tensor
    stds: Tensor

    def __init__(self, policy: Policy, width: int) -> None:
        super().__init__()
        model, steps = policy.model, policy.steps
        features = model.features(torch.zeros(1, dtype=torch.long)).shape[1]
        self.step = nn.Embedding(steps, width)
        self.prompt = nn.Linear(features, width)
        self.layers = nn.ModuleList(pointwise(model.state_shape, width))
        self.modulation = nn.ModuleList(nn.Linear(width, 2 * width) for _ in self.layers)
        self.last = nn.Linear(width, 1)
        self.register_buffer("times", policy.sampler.times)
        self.register_buffer("stds", step_stds(policy.sampler))
        self.to(model.device)

    def forward(self, mean: Tensor, k: Tensor, features: Tensor) -> Tensor:
        """(B,) nats at the means (B, ...) of steps k (B,), for prompt features (B, F)."""
        h, about = mean, silu(self.step(k.to(mean.device)) + self.prompt(features.to(mean)))
        for layer, modulation in zip(self.layers, self.modulation, strict=True):
            scale, shift = modulation(about).chunk(2, 1)
            y = layer(h)
            shape = (*scale.shape, *[1] * (y.dim() - 2))
            h = silu(y * (1 + scale.view(shape)) + shift.view(shape))
        found: Tensor = self.last(h.flatten(2).mean(2) if h.dim() > 2 else h)
        return found[:, 0]

    def control(self, mean: Tensor, k: Tensor, features: Tensor) -> Tensor:
        """Its gradient (B, ...) in the mean."""
        with torch.enable_grad():
            mean = mean.detach().requires_grad_()
            return torch.autograd.grad(self(mean, k, features).sum(), mean)[0]


def pointwise(state_shape: tuple[int, ...], width: int) -> list[nn.Module]:
    """Layers from states (B, ...) to `width` channels: linear for points, convolutions for latents."""
    if len(state_shape) == 1:
        return [nn.Linear(state_shape[0], width), nn.Linear(width, width)]
    strides = (1, 2, 1, 2)
    sizes = (state_shape[0], *[width] * len(strides))
    return [nn.Conv2d(a, b, 3, s, padding=1) for a, b, s in zip(sizes, sizes[1:], strides, strict=False)]


def step_stds(sampler: Sampler) -> Tensor:
    """The std (K,) of each step of a sampler whose steps depend on the state alone."""
    count = len(sampler.times) - 1
    x = torch.zeros(count, 1, dtype=sampler.times.dtype)
    return sampler.step(torch.arange(count), x, lambda y, t: torch.zeros_like(y))[0].std.flatten()


def load_step_value(policy: Policy, run: str) -> StepValue:
    """The value that a run learned, for the policy that it was learned of.

    Raises: UsageError when there is none in the run's folder, and when it belongs to another chain or model.
    """
    folder = locate(run) / "value"
    if not (folder / MODULE_FILE).is_file():
        raise UsageError(f"--steer value: {run} holds no value/{MODULE_FILE}: name a finished run of feynman_kac")
    saved = load_tensors(folder / MODULE_FILE, "--steer value")
    if not {"times", "stds", "prompt.weight"} <= saved.keys():
        raise UsageError(f"--steer value: {folder / MODULE_FILE} holds another network than feynman_kac's")
    found = StepValue(policy, len(saved["prompt.weight"]))
    for name in ("times", "stds"):
        own, other = found.get_buffer(name).cpu(), saved[name]
        if own.shape != other.shape or not torch.allclose(own, other, rtol=1e-4, atol=1e-6):
            raise UsageError(
                f"--steer value: what {run} learned belongs to the steps of its own sampler: draw with sampler.* as in "
                "its config.yaml"
            )
    load_module(found, folder)
    return found.requires_grad_(False)


def denoised_rewards(policy: Policy, experience: Experience, x: Tensor, score: Tensor, t: Tensor, batch: int) -> Tensor:
    """(n, B) rewards of what states x (n, B, ...) with their scores at times t (n, B) are denoised to.

    Where a score fails, it is the image's own reward.
    """
    schedule, every = policy.model.schedule, torch.arange(x.shape[1])
    rows = []
    for state, action, times in zip(x, score, t, strict=True):
        alpha, sigma = (like(c, state) for c in (schedule.alpha(times), schedule.sigma(times)))
        clean = x0_from_score(action, state, alpha, sigma).split(batch)
        with policy.rolling_out():
            images = torch.cat([policy.model.decode(part).float() for part in clean])
        rows.append(experience.score(images, every))
    found = torch.stack(rows)
    return found.where(found.isfinite(), experience.scores.total)


def mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Two hidden layers with SiLU."""
    return nn.Sequential(
        nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, outputs)
    )


def tanh_relu(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Two hidden layers, with Tanh and with ReLU (Gao et al. 2024, Table 1)."""
    return nn.Sequential(
        NarrowLinear(inputs, width), Tanh(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
    )


class NarrowLinear(nn.Linear):
    """nn.Linear for few inputs, of rows (B, inputs): the gradient of its weight is several times as fast on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight.mT.contiguous())


class Tanh(nn.Module):
    """tanh, within 2e-7; through the sigmoid, which takes a third of the time of torch's tanh on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Tanh.apply(x)
        return y


class _Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.sigmoid(2 * x).mul_(2).sub_(1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        back: Tensor = torch.ops.aten.tanh_backward(gradient, *ctx.saved_tensors)
        return back


def convolutions(channels: int, width: int) -> tuple[nn.Module, int]:
    """Latents (B, C, h, w) -> (B, width), and width."""
    return (
        nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, 2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, 2, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ),
        width,
    )


def explained_variance(errors: Tensor, returns: Tensor) -> Tensor:
    """The share of the variance of returns (..., n) that a prediction with these errors (..., m) explains, (...).

    It is 0 where returns do not vary, and below 0 where a constant would predict them better.
    """
    spread = returns.var(-1, correction=0)
    return (1 - errors.var(-1, correction=0) / spread).where(spread > 1e-12, 0.0)
