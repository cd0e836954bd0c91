"""How a run's LoRA is loaded elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from condrl.report.run import Run

PIPELINES = {"stable_diffusion": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
FLOWS = {"sd3": "StableDiffusion3Pipeline", "flux": "FluxPipeline"}  # which have their own scheduler's steps


def readers(run: Run) -> str:
    """The programs that read the second of a LoRA's files."""
    return "ComfyUI" if (run.config.get("model") or {}).get("name") in FLOWS else "ComfyUI and A1111"


def deployed_sampler(run: Run) -> dict[str, Any]:
    """The sampler that held-out prompts were drawn with."""
    evaluate = run.config.get("evaluate") or {}
    return {**(run.config.get("sampler") or {}), **(evaluate.get("sampler") or {})}


def base_model(run: Run) -> str:
    """The model that was tuned, as its config has it."""
    model = run.config.get("model") or {}
    return str(model.get("path") or model.get("name"))


def diffusers_code(run: Run, path: str, lora: str | None) -> str:
    """A script that draws with the run's own sampler, where diffusers has it, from a model and perhaps a LoRA."""
    model, sampler = run.config.get("model") or {}, {"eta": 1.0, **deployed_sampler(run)}
    is_flow = model.get("name") in FLOWS
    pipeline = (PIPELINES | FLOWS).get(model.get("name", ""), "DiffusionPipeline")
    has_it = sampler.get("name") == "ddim" and (not is_flow or sampler["eta"] == 0)
    spacing = f', timestep_spacing="{sampler["spacing"]}"' if sampler.get("spacing") else ""
    missing = "draws flows without noise" if is_flow else f"has no {sampler.get('name')}"
    note = "the run's sampler" if has_it else f"diffusers {missing}: pictures differ from condrl's"
    scheduler = f"pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config{spacing})  # {note}"
    options = flow_options(model) if is_flow else unet_options(model, sampler["eta"] if has_it else 0.0)
    lines = [
        "import torch",
        f"from diffusers import {pipeline if is_flow else f'DDIMScheduler, {pipeline}'}",
        "",
        f'pipe = {pipeline}.from_pretrained("{path}", torch_dtype=torch.float32)',
        *([f'pipe.load_lora_weights("{lora}", weight_name="pytorch_lora_weights.safetensors")'] if lora else []),
        f"# {note}" if is_flow else scheduler,
        "image = pipe(",
        '    "your prompt",',
        f"    num_inference_steps={sampler.get('steps', 50)},",
        *(f"    {name}={value!r}," for name, value in options.items()),
        "    generator=torch.Generator().manual_seed(0),",
        ").images[0]",
    ]
    return "\n".join(lines)


def unet_options(model: Mapping[str, Any], eta: float) -> dict[str, Any]:
    """What a U-Net's pipeline in diffusers is called with to draw as the run's model does."""
    return {"guidance_scale": model.get("guidance", 5.0), "eta": eta}


def flow_options(model: Mapping[str, Any]) -> dict[str, Any]:
    """What a flow's pipeline in diffusers is called with to draw as the run's model does."""
    guidance = {"guidance_scale": model.get("guidance", 5.0)}
    if model["name"] == "flux":
        told = model.get("told_guidance")
        guidance = {"guidance_scale": 3.5 if told is None else told, "true_cfg_scale": model.get("guidance", 1.0)}
        guidance |= {"negative_prompt": model.get("negative_prompt") or ""}
    sizes = {name: model[name] for name in ("height", "width") if model.get(name)}
    return guidance | {"max_sequence_length": model.get("t5_tokens", 256)} | sizes
