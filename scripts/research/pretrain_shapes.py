"""Train the embedded text-to-image pipelines on scenes drawn by rule, on CPU cores.

    python scripts/research/pretrain_shapes.py vae          # image <-> latent
    python scripts/research/pretrain_shapes.py unet         # text encoder and UNet, jointly, at a constant rate
    python scripts/research/pretrain_shapes.py cool         # a copy of them, at a rate that falls to zero
    python scripts/research/pretrain_shapes.py export       # diffusers folder, model card and prompt lists
    python scripts/research/pretrain_shapes.py flow         # a rectified flow of the same latents, at a constant rate
    python scripts/research/pretrain_shapes.py flow_cool    # a copy of it, at a rate that falls to zero
    python scripts/research/pretrain_shapes.py flow_export  # diffusers folder and model card
    python scripts/research/pretrain_shapes.py clip         # a CLIP of the scenes, exported at its end

Each stage writes a checkpoint every minute under --work and resumes from it when started again. With --start, `unet`
and `flow` begin with the weights of an exported pipeline; without it, `flow` takes VAE and text encoder from
condrl/assets/shapes. The stages need only this repository; `export` writes condrl/assets/shapes, `flow_export`
condrl/assets/shapes_flow, and `clip` condrl/assets/shapes_clip.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from condrl.diffusion.schedulers import shifted
from condrl.models.saving import edit_json, save_pipeline
from condrl.shapes import scenes
from condrl.shapes.networks import (
    CLIP_MODEL,
    FLOW_TOKENS,
    PIXELS,
    STREAM,
    TOKENS,
    divide_stream,
    make_clip,
    make_flow_text_encoders,
    make_silent_t5,
    make_text_encoder,
    make_tokenizer,
    make_transformer,
    make_unet,
    make_vae,
)

ASSET = Path(__file__).resolve().parents[2] / "condrl" / "assets" / "shapes"
FLOW_ASSET = ASSET.with_name("shapes_flow")
CLIP_ASSET = ASSET.with_name("shapes_clip")
OBJECTS = (1, 7, 2)  # weights of scenes with one, two and three objects
RELATE = 0.85  # share of the captions of two objects that name their relation
HISTORY = "training.json"  # what an exported pipeline was trained on so far
SCHEDULER: dict[str, Any] = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    prediction_type="v_prediction",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)
FLOW_SCHEDULER: dict[str, Any] = dict(num_train_timesteps=1000, shift=3.0)
IMAGE_TOKENS = (scenes.SIDE // 16) ** 2
DDPM = {f"{steps} steps": [f"sampler.steps={steps}", "sampler.spacing=trailing"] for steps in (10, 50)}
FLOW = {
    f"{steps} steps of {name}": [
        "model.name=sd3",
        "model.t5=false",
        "model.t5_tokens=1",
        f"sampler.steps={steps}",
        *words,
    ]
    for name, words in (("the ODE", ["sampler.eta=0"]), ("flow_sde", ["sampler.name=flow_sde"]))
    for steps in (10, 20)
}
Scene = list[scenes.SceneObject]
T5_ZEROS = (1, 256)  # tokens of which T5 says 0: as few as can be, and diffusers' default


# ---------------------------------------------------------------------------------------------- training loop


class Progress:
    """Step, seconds and the random state of a stage, saved together with what it trains."""

    def __init__(self, path: Path, facts: Mapping[str, int] | None = None, **parts: Any) -> None:
        self.path, self.facts, self.parts = path, dict(facts or {}), parts
        self.step, self.seconds, self.loss = 0, 0.0, 0.0
        if path.exists():
            saved = torch.load(path, weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            torch.set_rng_state(saved["rng"])
            self.step, self.seconds, self.loss = saved["step"], saved["seconds"], saved["loss"]

    def save(self) -> None:
        state: dict[str, Any] = {name: part.state_dict() for name, part in self.parts.items()}
        state |= dict(rng=torch.get_rng_state(), step=self.step, seconds=self.seconds, loss=self.loss, **self.facts)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, self.path.with_suffix(".part"))
        self.path.with_suffix(".part").replace(self.path)

    def loop(self, steps: int, every: float = 60.0) -> Iterator[int]:
        """Yield the steps that are left; save every `every` seconds and at the end."""
        bar = tqdm(range(self.step, steps), initial=self.step, total=steps, desc=self.path.stem)
        saved = begun = time.monotonic()
        for step in bar:
            yield step
            now = time.monotonic()
            self.step, self.seconds, begun = step + 1, self.seconds + now - begun, now
            bar.set_postfix(loss=f"{self.loss:.4f}", refresh=False)
            if now - saved > every:
                self.save()
                saved = now
        self.save()

    def note(self, loss: Tensor) -> None:
        self.loss = loss.item() if self.loss == 0 else 0.99 * self.loss + 0.01 * loss.item()


def trapezoid(step: int, steps: int, warmup: int = 200, decay: float = 0.3) -> float:
    """Learning-rate factor: linear warm-up, constant, linear decay over the last `decay` of the steps."""
    return min((step + 1) / warmup, 1.0, (steps - step) / (decay * steps))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def draw_batch(batch: list[list[scenes.SceneObject]]) -> Tensor:
    """Images (B, 3, 64, 64) in [-1, 1]."""
    pixels = np.stack([scenes.draw(scene) for scene in batch])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    vae: Any = make_vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr or 2e-3, weight_decay=0.0)
    progress = Progress(args.work / "vae.pt", vae=vae, optimizer=optimizer)
    steps = args.steps or 1800
    for step in progress.loop(steps):
        set_lr(optimizer, (args.lr or 2e-3) * trapezoid(step, steps, warmup=50, decay=0.5))
        rng = random.Random(step)
        images = draw_batch([scenes.random_scene(rng, repeat=0.2) for _ in range(args.batch or 24)])
        posterior = vae.encode(images).latent_dist
        error = vae.decode(posterior.sample()).sample - images
        loss = error.abs().mean() + 2 * error.square().mean() + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        progress.note(loss)


@torch.no_grad()
def cached_latents(args: argparse.Namespace, vae: Any) -> tuple[list[list[scenes.SceneObject]], Tensor]:
    """Scenes, and their latents (n, 4, 8, 8) scaled as the pipeline scales them."""
    rng = random.Random(1)
    drawn = [scenes.random_scene(rng, weights=OBJECTS) for _ in range(args.scenes)]
    path = args.work / f"latents_{args.scenes}_{'_'.join(map(str, OBJECTS))}.pt"
    if not path.exists():
        batches = [drawn[i : i + 128] for i in range(0, len(drawn), 128)]
        latents = torch.cat([vae.encode(draw_batch(b)).latent_dist.mean.half() for b in tqdm(batches, desc="latents")])
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(latents, path)
    latents = torch.load(path, weights_only=True).float()
    if not args.start:
        vae.register_to_config(scaling_factor=1 / latents.std().item())
    return drawn, latents * vae.config.scaling_factor


def train_unet(args: argparse.Namespace) -> None:
    """At a constant rate, for as long as one likes."""
    lr = args.lr or 5e-4
    denoise(args, "unet", args.steps or 40_000, lambda step: lr * min(1.0, (step + 1) / 200))


def cool_unet(args: argparse.Namespace) -> None:
    """Continue from a copy of what `unet` has reached, at a rate that falls to zero."""
    cool(args, "unet", "cool", denoise, args.lr or 5e-4)


def cool(args: argparse.Namespace, stage: str, name: str, train: Callable[..., None], lr: float) -> None:
    steps = args.steps or 4000
    if not (args.work / f"{name}.pt").exists():
        state = torch.load(args.work / f"{stage}.pt", weights_only=True)
        torch.save(state | {"begun": state["step"]}, args.work / f"{name}.pt")
    begun = torch.load(args.work / f"{name}.pt", weights_only=True)["begun"]
    train(args, name, begun + steps, lambda step: lr * (1 - (step - begun) / steps), begun=begun)


def denoise(args: argparse.Namespace, name: str, steps: int, rate: Callable[[int], float], **facts: int) -> None:
    """Train text encoder and UNet up to a step.

    Three times out of four are in the noisier half, which decides what goes where: from uniform times, relations
    between objects are hardly learned.
    """
    from diffusers import DDIMScheduler

    torch.manual_seed(0)
    drawn, latents = cached_latents(args, trained_vae(args))
    tokenizer = make_tokenizer(args.work / "tokenizer")
    nets: Any = nn.ModuleDict({"unet": make_unet(), "text_encoder": make_text_encoder(tokenizer)})
    if args.start:
        load_exported(nets, args.start)
    nets["unet"].to(memory_format=torch.channels_last)
    average = running_average(nets)
    optimizer = torch.optim.AdamW(nets.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=0.01)
    progress = Progress(args.work / f"{name}.pt", facts, nets=nets, average=average, optimizer=optimizer)
    scheduler = DDIMScheduler(**SCHEDULER)
    batch = args.batch or 64
    for step in progress.loop(steps):
        set_lr(optimizer, rate(step))
        rows, captions = captioned_rows(drawn, batch, random.Random(step))
        clean = latents[rows]
        noise, time_index = torch.randn_like(clean), torch.randint(0, 1000, (batch,))
        time_index = torch.where(torch.rand(batch) < 0.5, 500 + time_index // 2, time_index)
        noisy = scheduler.add_noise(clean, noise, time_index).contiguous(memory_format=torch.channels_last)
        target = scheduler.get_velocity(clean, noise, time_index)
        tokens = tokenizer(captions, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
        condition = nets["text_encoder"](tokens).last_hidden_state
        loss = (nets["unet"](noisy, time_index, condition).sample - target).square().mean()
        descend(optimizer, loss, nets)
        average.update_parameters(nets)
        progress.note(loss)


def running_average(nets: Any) -> Any:
    return torch.optim.swa_utils.AveragedModel(nets, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))


def captioned_rows(drawn: list[Scene], batch: int, rng: random.Random) -> tuple[list[int], list[str]]:
    """Numbers of scenes, and a caption of each, of which one out of ten is empty."""
    rows = [rng.randrange(len(drawn)) for _ in range(batch)]
    return rows, ["" if rng.random() < 0.1 else str(scenes.describe(drawn[i], rng, relate=RELATE)) for i in rows]


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, nets: Any) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
    optimizer.step()


# ---------------------------------------------------------------------------------------------- flow


def train_flow(args: argparse.Namespace) -> None:
    """At a constant rate, for as long as one likes."""
    lr = args.lr or 1e-3
    flow(args, "flow", args.steps or 100_000, lambda step: lr * min(1.0, (step + 1) / 500))


def cool_flow(args: argparse.Namespace) -> None:
    """Continue from a copy of what `flow` has reached, at a rate that falls to zero."""
    cool(args, "flow", "flow_cool", flow, args.lr or 1e-3)


def flow(args: argparse.Namespace, name: str, steps: int, rate: Callable[[int], float], **facts: int) -> None:
    """Train a transformer and a small text encoder up to a step; the UNet's text encoder stays as it is."""
    torch.manual_seed(0)
    args.start = args.start or ASSET
    drawn, latents = cached_latents(args, trained_vae(args))
    tokenizer = make_tokenizer(args.work / "tokenizer")
    nets, average = make_flow(tokenizer, args.start)
    trained = [weight for weight in nets.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.0, betas=(0.9, 0.98), weight_decay=0.01)
    progress = Progress(args.work / f"{name}.pt", facts, nets=nets, average=average, optimizer=optimizer)
    for step in progress.loop(steps):
        set_lr(optimizer, rate(step))
        rng = random.Random(step)
        rows, captions = captioned_rows(drawn, args.batch or 64, rng)
        zeros = rng.choices(T5_ZEROS, (3, 1))[0]
        tokens = tokenizer(captions, padding="max_length", max_length=FLOW_TOKENS, return_tensors="pt").input_ids
        loss = flow_loss(nets, latents[rows], tokens, zeros)
        descend(optimizer, loss, nets)
        average.update_parameters(nets)
        progress.note(loss)


def make_flow(tokenizer: Any, start: Path) -> tuple[Any, Any]:
    """The networks, one of them frozen but for its projection, and their running average."""
    nets: Any = nn.ModuleDict({"transformer": make_transformer(), **make_flow_text_encoders(tokenizer)})
    load_flow(nets, start)
    nets["text_encoder"].text_model.requires_grad_(False)
    nets["transformer"].set_attn_processor(JointAttention())
    return nets, running_average(nets)


def flow_loss(nets: Any, clean: Tensor, tokens: Tensor, zeros: int) -> Tensor:
    """Mean squared error of the velocity, at times spread as the scheduler's are, most of them in the noisier half.

    T5's zeros stay equal to each other in all blocks, as text has no positions there: one stands for all of them, and
    gets their number's logarithm before the softmax.
    """
    noise, t = torch.randn_like(clean), shifted(torch.rand(len(clean)), FLOW_SCHEDULER["shift"])
    noisy = torch.lerp(clean, noise, t[:, None, None, None])
    features, pooled = text_features([nets["text_encoder"], nets["text_encoder_2"]], tokens)
    mask = clean.new_zeros(1, IMAGE_TOKENS + features.shape[1])
    mask[0, -1] = math.log(zeros)
    velocity = nets["transformer"](noisy, features, pooled, 1000 * t, joint_attention_kwargs={"attention_mask": mask})
    return (velocity.sample - (noise - clean)).square().mean()


def text_features(encoders: list[Any], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """As in StableDiffusion3Pipeline: features (B, L + 1, F) that end with one of T5's zeros, and (B, F')."""
    read = [encoder(tokens, output_hidden_states=True) for encoder in encoders]
    features = torch.cat([text.hidden_states[-2] for text in read], -1)
    return nn.functional.pad(features, (0, 0, 0, 1)), torch.cat([text.text_embeds for text in read], -1)


class JointAttention:
    """That of Stable Diffusion 3, with a mask (1, L), which is added to the weights' logarithms; diffusers has none."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (split_heads(of(hidden_states), attn.heads) for of in (attn.to_q, attn.to_k, attn.to_v))
        projections = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
        q2, k2, v2 = (split_heads(of(encoder_hidden_states), attn.heads) for of in projections)
        q = torch.cat([attn.norm_q(q), attn.norm_added_q(q2)], 2)
        k = torch.cat([attn.norm_k(k), attn.norm_added_k(k2)], 2)
        mixed = nn.functional.scaled_dot_product_attention(q, k, torch.cat([v, v2], 2), attention_mask)
        image, text = mixed.transpose(1, 2).flatten(2).tensor_split([hidden_states.shape[1]], 1)
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


# ---------------------------------------------------------------------------------------------- CLIP


def altered(scene: Scene, rng: random.Random) -> Scene:
    """The scene with one object recoloured, reshaped, resized, removed, repeated or moved."""
    while True:
        at = rng.randrange(len(scene))
        others, thing = scene[:at] + scene[at + 1 :], scene[at]
        new: scenes.SceneObject | None = thing
        match rng.choice(("color", "shape", "size", "fewer", "more", "place")):
            case "color":
                new = replace(thing, color=rng.choice([c for c in scenes.COLORS if c != thing.color]))
            case "shape":
                new = replace(thing, shape=rng.choice([s for s in scenes.SHAPES if s != thing.shape]))
            case "size":
                size = next(size for size in scenes.DIAMETERS if size != thing.size)
                new = scenes.place(others, thing.shape, thing.color, size, rng)
            case "fewer" if others:
                return others
            case "more" if len(scene) < scenes.MAX_OBJECTS:
                others, new = scene, scenes.place(scene, thing.shape, thing.color, thing.size, rng)
            case "place" if len(scene) > 1:
                new = scenes.place(others, thing.shape, thing.color, thing.size, rng)
            case _:
                continue
        if new and new != thing:
            return [*others[:at], new, *others[at:]]


def captioned_pairs(count: int, rng: random.Random) -> tuple[list[Scene], list[scenes.Request]]:
    """`count` scenes, each followed by an altered copy, with captions in nearly the same words."""
    drawn, captions = [], []
    for _ in range(count):
        first = scenes.random_scene(rng)
        seed = rng.random()
        for scene in (first, altered(first, rng)):
            drawn.append(scene)
            captions.append(scenes.describe(scene, random.Random(seed)))
    return drawn, captions


def true_of(drawn: list[Scene], captions: list[scenes.Request]) -> Tensor:
    """(B, B) booleans: whether caption j is true of scene i."""
    asked = [Counter((phrase.shape, phrase.color) for phrase in caption.objects) for caption in captions]
    there = [Counter((thing.shape, thing.color) for thing in scene) for scene in drawn]
    rows = [
        [a == b and scenes.grade_scene(scene, caption) == 1 for a, caption in zip(asked, captions, strict=True)]
        for b, scene in zip(there, drawn, strict=True)
    ]
    return torch.tensor(rows)


def train_clip(args: argparse.Namespace) -> None:
    """Contrast scenes with captions (Radford et al. 2021); a caption that is true of an image by chance is left out.

    A quarter of the images comes through the pipeline's VAE and all have a little noise, as generated ones have.
    """
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    tokenizer = make_tokenizer(args.work / "tokenizer")
    vae: Any = AutoencoderKL.from_pretrained(ASSET / "vae", torch_dtype=torch.float32)
    clip = make_clip(tokenizer).train()
    lr = args.lr or 2e-3
    optimizer = torch.optim.AdamW(clip.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    progress = Progress(args.work / "clip.pt", clip=clip, optimizer=optimizer)
    steps, batch = args.steps or 3000, args.batch or 128
    own = torch.eye(batch, dtype=torch.bool)
    for step in progress.loop(steps):
        set_lr(optimizer, lr * trapezoid(step, steps, decay=0.5))
        drawn, captions = captioned_pairs(batch // 2, random.Random(step))
        images = draw_batch(drawn)
        with torch.no_grad():
            images[: batch // 4] = vae(images[: batch // 4]).sample
        images += 0.1 * torch.rand(batch, 1, 1, 1) * torch.randn_like(images)
        logits = clip_logits(clip, tokenizer, images, list(map(str, captions)))
        logits = logits.masked_fill(true_of(drawn, captions) & ~own, -torch.inf)
        target = torch.arange(batch)
        loss = (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        clip.logit_scale.data.clamp_(max=math.log(100))
        progress.note(loss)
    export_clip(args, clip.eval(), progress)


def clip_logits(clip: Any, tokenizer: Any, images: Tensor, captions: list[str]) -> Tensor:
    """Scaled cosines (images, captions)."""
    tokens = tokenizer(captions, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    a, b = clip.encode_image(images, normalize=True), clip.encode_text(tokens, normalize=True)
    return clip.logit_scale.exp() * a @ b.T


def export_clip(args: argparse.Namespace, clip: Any, progress: Progress) -> None:
    """Write a folder that open_clip loads as local-dir:, in half precision, and a model card with what it can do."""
    from safetensors.torch import save_file

    folder = CLIP_ASSET if args.out == ASSET else args.out
    tokenizer = make_tokenizer(folder)
    tokenizer.save_pretrained(folder)
    state = {name: value.half() if value.is_floating_point() else value for name, value in clip.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    model = {**CLIP_MODEL, "text_cfg": {**CLIP_MODEL["text_cfg"], "vocab_size": len(tokenizer)}}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model, "preprocess_cfg": {"size": scenes.SIDE, "mode": "RGB", **PIXELS}}, indent=2),
        "utf-8",
    )
    measures = clip_measures(clip, tokenizer) | clip_agreement(folder)
    (folder / "README.md").write_text(clip_card(clip, measures, progress), "utf-8")


@torch.no_grad()
def clip_measures(clip: Any, tokenizer: Any, count: int = 1024) -> dict[str, float]:
    """Shares of scenes never trained on whose own caption wins: among 128, and against the altered scene's."""
    right: dict[str, list[float]] = {"of 128": [], "of the pair": []}
    rng = random.Random("held out")
    for _ in range(count // 128):
        drawn, captions = captioned_pairs(128, rng)
        logits, true = (
            clip_logits(clip, tokenizer, draw_batch(drawn), list(map(str, captions))),
            true_of(drawn, captions),
        )
        best = logits[::2, ::2].argmax(1)
        right["of 128"] += true[::2, ::2].gather(1, best[:, None])[:, 0].float().tolist()
        for i in range(0, 256, 2):
            if not true[i, i + 1]:
                right["of the pair"].append(float(logits[i, i] > logits[i, i + 1]))
    return {name: sum(values) / len(values) for name, values in right.items()}


@torch.no_grad()
def clip_agreement(folder: Path, prompts: int = 64, images: int = 8) -> dict[str, float]:
    """Rank correlation with the exact checker for images of the pipeline: over all of them, and within a prompt's."""
    from scipy.stats import spearmanr

    from condrl.diffusion.rollout import rollout
    from condrl.loading import load_config
    from condrl.prompts import load_prompts
    from condrl.rewards.scoring import make_reward
    from condrl.training.build import make_policy

    config = load_config([str(ASSET.parents[2] / "configs" / "quickstart.yaml")])
    policy = make_policy(config, torch.device("cpu"))
    rows = [row for row in load_prompts(str(ASSET / "heldout.txt"), "prompts")[:prompts] for _ in range(images)]
    condition = policy.model.encode([row.prompt for row in rows])
    samples = policy.model.decode(rollout(policy, condition, torch.Generator().manual_seed(0), 64).samples)
    ours, checker = make_reward("clip", {"model": str(folder)})(samples, rows), make_reward("shapes", {})(samples, rows)
    pairs = zip(ours.view(-1, images), checker.view(-1, images), strict=True)
    within = [spearmanr(a, b).statistic for a, b in pairs if b.std() > 0]
    return {"rank": spearmanr(ours, checker).statistic, "rank within": sum(within) / len(within)}


# ---------------------------------------------------------------------------------------------- export


def trained_vae(args: argparse.Namespace) -> Any:
    from diffusers import AutoencoderKL

    if args.start:
        return AutoencoderKL.from_pretrained(args.start / "vae", torch_dtype=torch.float32)
    vae = make_vae()
    Progress(args.work / "vae.pt", vae=vae)
    return vae


@torch.no_grad()
def load_exported(nets: Any, folder: Path) -> None:
    """Take the weights of an exported pipeline; further layers of the text encoder start as the identity."""
    from safetensors.torch import load_file

    nets["unet"].load_state_dict(load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"))
    saved = load_file(folder / "text_encoder" / "model.safetensors")
    encoder = nets["text_encoder"]
    encoder.load_state_dict({k.removeprefix("text_model."): v for k, v in saved.items()}, strict=False)
    for number, layer in enumerate(encoder.encoder.layers):
        if f"text_model.encoder.layers.{number}.mlp.fc2.weight" not in saved:
            for linear in (layer.self_attn.out_proj, layer.mlp.fc2):
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)


@torch.no_grad()
def load_flow(nets: Any, folder: Path) -> None:
    """Take the weights of an exported flow; of another pipeline only those of its text encoder, for fewer tokens."""
    from safetensors.torch import load_file

    is_flow = (folder / "transformer").is_dir()
    for name in nets if is_flow else ("text_encoder",):
        (file,) = (folder / name).glob("*.safetensors")
        saved = load_file(file)
        positions = "text_model.embeddings.position_embedding.weight"
        if positions in saved:
            saved[positions] = saved[positions][:FLOW_TOKENS]
        found = nets[name].load_state_dict(saved, strict=False)
        assert set(found.missing_keys) <= {"text_projection.weight"}
    if not is_flow:
        divide_stream(nets["text_encoder"], STREAM)


def export(args: argparse.Namespace) -> None:
    """Write the averaged weights as a diffusers StableDiffusionPipeline in half precision, and the prompt lists."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    vae = trained_vae(args)
    cached_latents(args, vae)
    tokenizer = make_tokenizer(args.work / "tokenizer")
    nets = nn.ModuleDict({"unet": make_unet(), "text_encoder": make_text_encoder(tokenizer)})
    average: Any = torch.optim.swa_utils.AveragedModel(nets)
    name = "cool" if (args.work / "cool.pt").exists() else "unet"
    progress = Progress(args.work / f"{name}.pt", average=average)
    pipe = StableDiffusionPipeline(
        vae=vae,
        unet=average.module["unet"],
        text_encoder=average.module["text_encoder"],
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    history = json.loads((args.start / HISTORY).read_text("utf-8")) if args.start else vae_history(args)
    before = history.get("unet", {"samples": 0, "hours": 0.0})
    samples, hours = progress.step * (args.batch or 64), progress.seconds / 3600
    history["unet"] = {
        "samples": before["samples"] + samples,
        "hours": round(before["hours"] + hours, 2),
        "loss": round(progress.loss, 4),
    }
    save_pipeline(pipe.to(torch.float16), args.out)
    make_tokenizer(args.out / "tokenizer")  # vocab.json and merges.txt, for readers that do not know tokenizer.json
    edit_json(args.out / "vae" / "config.json", _name_or_path=None)  # where it was loaded from
    write_prompts(args.out)
    (args.out / HISTORY).write_text(json.dumps(history, indent=2) + "\n", "utf-8")
    weights = {
        name: sum(p.numel() for p in getattr(pipe, name).parameters()) for name in ("vae", "unet", "text_encoder")
    }
    measures = pipeline_measures(args.out, args.out / "validation.txt", DDPM)
    (args.out / "README.md").write_text(model_card(args, weights, history, measures), "utf-8")


def export_flow(args: argparse.Namespace) -> None:
    """Write the averaged weights as a diffusers StableDiffusion3Pipeline in half precision."""
    args.start, folder = args.start or ASSET, FLOW_ASSET if args.out == ASSET else args.out
    tokenizer = make_tokenizer(args.work / "tokenizer")
    _, average = make_flow(tokenizer, args.start)
    name = "flow_cool" if (args.work / "flow_cool.pt").exists() else "flow"
    progress = Progress(args.work / f"{name}.pt", average=average)
    pipe = flow_pipeline(trained_vae(args), average.module, tokenizer)
    history = json.loads((args.start / HISTORY).read_text("utf-8"))
    before = history.get("flow", {"samples": 0, "hours": 0.0})
    history["flow"] = {
        "samples": before["samples"] + progress.step * (args.batch or 64),
        "hours": round(before["hours"] + progress.seconds / 3600, 2),
        "loss": round(progress.loss, 4),
    }
    save_pipeline(pipe.to(torch.float16), folder)
    edit_json(folder / "vae" / "config.json", _name_or_path=None)
    edit_json(folder / "model_index.json", tokenizer_3=["transformers", "T5TokenizerFast"])  # before transformers 5
    (folder / HISTORY).write_text(json.dumps(history, indent=2) + "\n", "utf-8")
    weights = {
        name: sum(p.numel() for p in getattr(pipe, name).parameters())
        for name in ("vae", "transformer", "text_encoder", "text_encoder_2")
    }
    measures = pipeline_measures(folder, ASSET / "validation.txt", FLOW)
    (folder / "README.md").write_text(flow_card(args, weights, history, measures), "utf-8")


def flow_pipeline(vae: Any, nets: Any, tokenizer: Any) -> Any:
    """Both CLIP text encoders have the same tokenizer, which cuts prompts where their positions end."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    tokenizer.model_max_length = FLOW_TOKENS
    vae.register_to_config(shift_factor=0.0)  # which this pipeline adds, and cannot do without
    t5, letters = make_silent_t5()
    return StableDiffusion3Pipeline(
        vae=vae,
        **nets,
        scheduler=FlowMatchEulerDiscreteScheduler(**FLOW_SCHEDULER),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=letters,
    )


def vae_history(args: argparse.Namespace) -> dict[str, Any]:
    vae = Progress(args.work / "vae.pt", vae=make_vae())
    return {"vae": {"samples": 24 * vae.step, "hours": round(vae.seconds / 3600, 2), "loss": round(vae.loss, 4)}}


@torch.no_grad()
def pipeline_measures(folder: Path, prompts: Path, runs: Mapping[str, list[str]]) -> dict[str, float]:
    """Shares of prompts that are obeyed exactly, by kind of prompt, in runs that differ by words of the config.

    "relation, given both" is the share of relations that hold among the images that have both objects.
    """
    from condrl.diffusion.noise import seeded
    from condrl.diffusion.rollout import sample
    from condrl.loading import load_config
    from condrl.prompts import load_prompts
    from condrl.training.build import make_policy

    found: dict[str, float] = {}
    rows = load_prompts(str(prompts), "prompts")
    requests = [scenes.parse(row.prompt) for row in rows]
    for run, words in runs.items():
        policy = make_policy(load_config([f"model.path={folder}", "model.guidance=1", *words]), torch.device("cpu"))
        condition = policy.model.encode([row.prompt for row in rows])
        images = policy.model.decode(sample(policy, condition, seeded(list(range(len(rows)))), 64)).numpy()
        things = [scenes.read(image) for image in images]
        kinds: dict[str, list[float]] = {}
        for seen, request in zip(things, requests, strict=True):
            exact = float(scenes.grade_scene(seen, request) == 1)
            count = len(request.objects)
            kind = "relation" if request.relation else f"{count} object{'s' * (count > 1)}"
            for name in (kind, "all"):
                kinds.setdefault(name, []).append(exact)
            if request.relation and scenes.grade_scene(seen, scenes.Request(request.phrases)) == 1:
                kinds.setdefault("relation, given both", []).append(exact)
        found |= {f"{name}, {run}": sum(values) / len(values) for name, values in sorted(kinds.items())}
    return found


def write_prompts(folder: Path, each: int = 512) -> None:
    """Three lists of prompts, all of distinct meaning."""
    rng, prompts = random.Random(2), dict[tuple[str, ...], str]()
    while len(prompts) < 2 * each:
        request = scenes.describe(scenes.random_scene(rng), rng)
        prompts.setdefault(scenes.meaning(request), str(request))
    lines = list(prompts.values())
    rng.shuffle(lines)
    rng = random.Random(3)
    while len(prompts) < 3 * each:
        request = scenes.describe(scenes.random_scene(rng), rng)
        prompts.setdefault(scenes.meaning(request), str(request))
    lists = {"heldout": lines[:each], "train": lines[each:], "validation": list(prompts.values())[2 * each :]}
    for name, some in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(some) + "\n", "utf-8")


def model_card(
    args: argparse.Namespace, weights: dict[str, int], history: dict[str, Any], measures: dict[str, float]
) -> str:
    rows = "".join(f"| {name} | {count / 1e6:.2f} M |\n" for name, count in weights.items())
    obeyed = "".join(f"| {name} | {share:.2f} |\n" for name, share in measures.items())
    vae, unet = history["vae"], history["unet"]
    return f"""# shapes: a small text-to-image pipeline

Draws one to three coloured shapes as a prompt says, 64 x 64 pixels, in diffusers' StableDiffusionPipeline format, half
precision. Trained by `scripts/research/pretrain_shapes.py` on scenes drawn by rule; no other data, no human images.

- Vocabulary: {", ".join(scenes.COLORS)}; {", ".join(scenes.SHAPES)}; small, large; a, two, three;
  {", ".join(scenes.RELATIONS)}; "and" and commas.
- VAE: {vae["samples"]:,} scenes, {vae["hours"]} hours, loss {vae["loss"]}.
- UNet and text encoder: {unet["samples"]:,} samples, lately of {args.scenes:,} scenes, captions redrawn each
  time, 10 % empty, v-prediction; {unet["hours"]} hours on one or two shared CPU cores; loss {unet["loss"]} (three times
  out of four in the noisier half); weights are the running average.
- `train.txt`, `heldout.txt` and `validation.txt`: prompts for fine-tuning, for measuring it, and for choosing settings,
  with none in common. The pipeline itself was trained on captions drawn at random from the same grammar, so a held-out
  prompt is new to the tuning, not to it.

| part | weights |
| --- | --- |
{rows}
Share of the 512 validation prompts that are obeyed exactly, one image each, without guidance, `ddim` with eta = 1
(`python scripts/research/pretrain_shapes.py export` measures it):

| prompts | obeyed exactly |
| --- | --- |
{obeyed}
Licence: Apache-2.0, as the rest of condrl.
"""


def flow_card(
    args: argparse.Namespace, weights: dict[str, int], history: dict[str, Any], measures: dict[str, float]
) -> str:
    rows = "".join(f"| {name} | {count / 1e6:.2f} M |\n" for name, count in weights.items())
    obeyed = "".join(f"| {name} | {share:.2f} |\n" for name, share in measures.items())
    flow = history["flow"]
    return f"""# shapes_flow: a small rectified flow

Draws one to three coloured shapes as a prompt says, 64 x 64 pixels, in diffusers' StableDiffusion3Pipeline format, half
precision. Trained by `scripts/research/pretrain_shapes.py flow` on the scenes of `shapes`, whose VAE and whose text
encoder, but for its scale and its projection, it has unchanged; no other data, no human images.

    model:
      name: sd3
      path: asset:shapes_flow
      t5: false
      t5_tokens: 1

- Vocabulary, grammar and lists of prompts: those of `shapes`. A prompt is cut after {FLOW_TOKENS} tokens; no prompt of
  the grammar has more.
- Transformer, second text encoder and projection: {flow["samples"]:,} samples, lately of {args.scenes:,} scenes,
  captions redrawn each time, 10 % empty; {flow["hours"]} hours on one shared CPU core; loss {flow["loss"]}. Times are
  uniform, and shifted by {FLOW_SCHEDULER["shift"]:g} as the scheduler's are; weights are the running average.
- Its T5 is a stand-in, which says 0 of every token, as diffusers does where there is none: the format asks for it. The
  transformer was trained with {T5_ZEROS[0]} and with {T5_ZEROS[1]} of these tokens, of which diffusers has
  {T5_ZEROS[1]} unless told otherwise. One makes less work: `model.t5_tokens=1` here, in diffusers
  `max_sequence_length=1`.

| part | weights |
| --- | --- |
{rows}
Share of the 512 validation prompts of `shapes` that are obeyed exactly, one image each, without guidance, with one zero
(`python scripts/research/pretrain_shapes.py flow_export` measures it):

| prompts | obeyed exactly |
| --- | --- |
{obeyed}
Licence: Apache-2.0, as the rest of condrl.
"""


def clip_card(clip: Any, measures: dict[str, float], progress: Progress) -> str:
    parts = {"image": clip.visual.parameters(), "text": clip.transformer.parameters()}
    weights = ", ".join(f"{name} {sum(p.numel() for p in of) / 1e6:.2f} M" for name, of in parts.items())
    return f"""# shapes_clip: a small CLIP of the scenes

Tells how well a 64 x 64 image of coloured shapes fits its prompt. A folder of open_clip's (`local-dir:`), half
precision; as a reward: `rewards.clip.model=asset:shapes_clip`. Weights: {weights}. Trained from scratch by
`scripts/research/pretrain_shapes.py clip` on scenes drawn by rule, each beside a copy with one thing altered:
{progress.step} steps of 128, {progress.seconds:.0f} s on a shared CPU core, loss {progress.loss:.4f}.

On 1,024 scenes never trained on, its own caption wins
- among 128 captions of other scenes: {measures["of 128"]:.1%} (a caption that happens to be true counts as right)
- against that of the altered copy, where it is not true: {measures["of the pair"]:.1%} (chance 50 %)

On 512 images that the pipeline made for 64 held-out prompts, the rank correlation with the exact checker `shapes` is
{measures["rank"]:.2f}, and {measures["rank within"]:.2f} among a prompt's eight images.

Licence: Apache-2.0, as the rest of condrl.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = {"vae": train_vae, "unet": train_unet, "cool": cool_unet, "export": export, "clip": train_clip}
    stages |= {"flow": train_flow, "flow_cool": cool_flow, "flow_export": export_flow}
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain_shapes"), help="checkpoints, latents")
    parser.add_argument("--start", type=Path, help="an exported pipeline whose weights to begin with")
    parser.add_argument("--out", type=Path, default=ASSET, help="where export writes the pipeline")
    parser.add_argument("--steps", type=int, help="optimiser steps of the stage in all")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--scenes", type=int, default=200_000, help="scenes whose latents are cached")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    stages[args.stage](args)


if __name__ == "__main__":
    main()
