"""Images of a prompt and a seed, by us and by diffusers."""

import torch
from diffusers import DDIMScheduler

from condrl.diffusion.noise import seeded
from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import sample
from condrl.models.lora import lora_layers
from condrl.training.build import make_sampler

CPU = torch.device("cpu")
DDIM = {"name": "ddim", "steps": 5, "spacing": None, "eta": 1.0}


def perturb(model, scale=0.3):
    """Give the LoRA weights that matter, the same whatever was drawn before."""
    g = torch.Generator().manual_seed(0)
    for layer in lora_layers(model.module).values():
        down = layer.lora_A["default"].weight
        down.data = (2 * torch.rand(down.shape, generator=g) - 1) / down[0].numel() ** 0.5  # as peft begins
        layer.lora_B["default"].weight.data = scale * torch.randn(layer.lora_B["default"].weight.shape, generator=g)


def pictures(model, prompts, seeds, sampler=DDIM):
    policy = Policy(model, make_sampler(sampler, model.schedule))
    return model.decode(sample(policy, model.encode(prompts), seeded(seeds), 8))


def diffusers_pictures(pipe, prompts, seeds, guidance=5.0, **sampler):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    images = [
        pipe(
            prompt,
            generator=torch.Generator().manual_seed(s),
            num_inference_steps=5,
            eta=1.0,
            guidance_scale=guidance,
            output_type="pt",
            **sampler,
        ).images[0]
        for prompt, s in zip(prompts, seeds, strict=True)
    ]
    return torch.stack(images)


PROMPTS, SEEDS = ["a red star", "two small blue circles", "anything at all"], [0, 1, 2]
