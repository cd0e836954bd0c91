"""DDPO from scratch: a reward tunes a text-to-image model in one file, with torch, diffusers and peft alone.

    python scripts/examples/ddpo_from_scratch.py

Drawing an image is a walk from noise to data in which every step is Gaussian, so the likelihood of what a model did is
known exactly, and what led to good images can be made more likely (Black et al. 2024). The rest of the repository is
this with other models, samplers and algorithms, and with the checks that long runs need. The model is the embedded
pipeline, coloured shapes in 64 x 64 pixels; the reward is how red an image is, and the prompts leave the colour open.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from torch import Tensor

PIPELINE = Path(__file__).resolve().parents[2] / "condrl" / "assets" / "shapes"
PROMPTS = ("a square", "two circles", "three triangles", "a square left of a circle")
GROUP = 16  # images of each prompt in an epoch
STEPS = 10  # of denoising
EPOCHS, UPDATES = 12, 2  # roll-outs, and optimiser steps on the images of each
LR, MAX_GRAD_NORM, ADVANTAGE_CLIP = 2e-3, 1.0, 5.0
CLIP = 0.2 * math.sqrt(50 / STEPS)  # bound on |ratio - 1|: log-ratios grow with the square root of a step's length
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"]


# 1. The chain. Noising takes data x0 to x_t = alpha_t x0 + sigma_t eps, alpha_t^2 + sigma_t^2 = 1. A sampler goes back
# from t to an earlier u. Each of its steps is a Gaussian whose mean is affine in the score a(x_t, t, prompt):
#
#     x_u ~ N(A x_t + B a, S^2 I)
#
# The score is what the model decides: its *action*. A sampler is the three numbers A, B and S of every step.
# Likelihoods follow from them, and nothing after this section knows which sampler it is.


@dataclass(frozen=True)
class Chain:
    """A sampler with K steps; every field is (K,)."""

    t: Tensor  # the network's timestep
    alpha: Tensor  # at t
    sigma: Tensor
    A: Tensor
    B: Tensor
    S: Tensor


def ddim(betas: Tensor, steps: int, eta: float = 1.0) -> Chain:
    """DDIM (Song et al. 2021, eq. 12 and 16). With eta = 1 it is DDPM; with 0 no step would have a likelihood.

    Its mean is alpha_u x0 + sqrt(sigma_u^2 - S^2) eps, where the score stands for eps = -sigma_t a and
    x0 = (x_t + sigma_t^2 a) / alpha_t. A and B collect what multiplies x_t and a.
    """
    alpha_bar = (1 - betas.double()).cumprod(0)  # alpha^2
    t = torch.arange(len(betas), 0, -len(betas) / steps).round().long() - 1
    u = torch.cat([t[1:], torch.zeros(1, dtype=torch.long)])
    alpha, sigma, sigma_u = alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt(), (1 - alpha_bar[u]).sqrt()
    S = eta * sigma_u / sigma * (1 - alpha_bar[t] / alpha_bar[u]).sqrt()
    A = alpha_bar[u].sqrt() / alpha
    B = sigma * (A * sigma - (sigma_u**2 - S**2).sqrt())
    return Chain(t, alpha, sigma, A, B, S)


def mean(unet: Any, chain: Chain, k: int, x: Tensor, prompt: Tensor) -> Tensor:
    """A x + B a: the mean of step k from latents x (B, C, H, W), for prompt embeddings (B, L, F).

    The network predicts v = alpha eps - sigma x0 (Salimans and Ho 2022), so eps = sigma x + alpha v, a = -eps / sigma.
    """
    alpha, sigma, A, B = (c[k].item() for c in (chain.alpha, chain.sigma, chain.A, chain.B))
    v = unet(x, chain.t[k], prompt).sample
    score = -(sigma * x + alpha * v) / sigma
    return A * x + B * score


def log_prob(x: Tensor, mean: Tensor, S: float) -> Tensor:
    """log N(x; mean, S^2 I) in nats, (B,), summed in float64: thousands of nats, of which a ratio needs the digits."""
    z = (x - mean) / S
    return -(0.5 * z**2 + math.log(S) + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1, dtype=torch.float64)


# 2. Roll-out. Draw images, and keep what learning needs: every state, and how likely the model made each step.


@torch.no_grad()
def roll_out(unet: Any, chain: Chain, prompt: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """States (K + 1, B, C, H, W) and log-probabilities (K, B), from standard normal noise (K + 1, B, C, H, W)."""
    states, log_probs = [noise[0]], []
    for k, S in enumerate(chain.S.tolist()):
        center = mean(unet, chain, k, states[-1], prompt)
        states.append(center + S * noise[k + 1])
        log_probs.append(log_prob(states[-1], center, S))
    return torch.stack(states), torch.stack(log_probs)


# 3. Reward and credit. A reward sees finished images only, and need not be differentiable. What counts is how much
# better an image is than the others of its prompt: that a prompt is easy is nothing to learn from.


@torch.no_grad()
def decode(vae: Any, x: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] of latents (B, C, H, W)."""
    return (vae.decode(x / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


def redness(images: Tensor) -> Tensor:
    """By how much red exceeds the mean of all channels, (B,); 0 for grey images."""
    return images[:, 0].mean((1, 2)) - images.mean((1, 2, 3))


def group_advantages(rewards: Tensor, group: int) -> Tensor:
    """(r - mean) / standard deviation of rewards (B,), `group` in a row being those of a prompt (Shao et al. 2024)."""
    r = rewards.view(-1, group)
    advantages = (r - r.mean(1, keepdim=True)) / (r.std(1, correction=0, keepdim=True) + 1e-4)
    return advantages.flatten().clamp(-ADVANTAGE_CLIP, ADVANTAGE_CLIP)


# 4. Update. The gradient of the expected reward is E[advantage x sum over steps of grad log p(x_u | x_t)]. After the
# first update the images are those of an older policy, so a step counts with its weight w = p / p_old, which begins as
# 1. Clipping removes the gradient of steps that have already moved far enough (Schulman et al. 2017).


def clipped_loss(log_w: Tensor, advantage: Tensor) -> Tensor:
    """-min(w A, clip(w, 1 - CLIP, 1 + CLIP) A), (B,) (Black et al. 2024, eq. 5)."""
    w = log_w.float().exp()
    return -torch.min(w * advantage, w.clamp(1 - CLIP, 1 + CLIP) * advantage)


def backward(unet: Any, chain: Chain, states: Tensor, old: Tensor, prompt: Tensor, advantages: Tensor) -> Tensor:
    """Add the gradient of the mean loss of B images, with log-probabilities `old` (K, B), to the LoRA's; the loss.

    A step's likelihood needs only its two ends, so each step is differentiated alone, whatever their number.
    """
    total = torch.zeros(())
    for k, S in enumerate(chain.S.tolist()):
        new = log_prob(states[k + 1], mean(unet, chain, k, states[k], prompt), S)
        loss = clipped_loss(new - old[k], advantages).mean()
        loss.backward()
        total += loss.detach()
    return total


# 5. The loop: roll out -> score -> credit -> update.


def load() -> Any:
    """The pipeline, with all its weights frozen and a LoRA on its UNet that changes nothing yet."""
    pipe = StableDiffusionPipeline.from_pretrained(PIPELINE, dtype=torch.float32)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    pipe.unet.add_adapter(LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian", target_modules=TARGETS))
    return pipe


def main() -> None:
    torch.manual_seed(0)
    pipe = load()
    chain = ddim(pipe.scheduler.betas, STEPS)
    prompt = pipe.encode_prompt([text for text in PROMPTS for _ in range(GROUP)], "cpu", 1, False)[0]
    weights = [p for p in pipe.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, LR)
    for epoch in range(EPOCHS):
        noise = torch.randn(STEPS + 1, len(prompt), 4, 8, 8)
        states, log_probs = roll_out(pipe.unet, chain, prompt, noise)
        rewards = redness(decode(pipe.vae, states[-1]))
        advantages = group_advantages(rewards, GROUP)
        for i in torch.randperm(len(prompt)).chunk(UPDATES):
            backward(pipe.unet, chain, states[:, i], log_probs[:, i], prompt[i], advantages[i])
            torch.nn.utils.clip_grad_norm_(weights, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
        error = rewards.std() / len(rewards) ** 0.5
        print(f"epoch {epoch + 1:2}: reward {rewards.mean():+.4f} +- {error:.4f}", flush=True)


if __name__ == "__main__":
    main()
