"""How a run's LoRA is loaded elsewhere."""

from __future__ import annotations

from typing import Any

from condrl.report.run import Run

PIPELINES = {"stable_diffusion": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}


def deployed_sampler(run: Run) -> dict[str, Any]:
    """The sampler that held-out prompts were drawn with."""
    evaluate = run.config.get("evaluate") or {}
    return {**(run.config.get("sampler") or {}), **(evaluate.get("sampler") or {})}


def base_model(run: Run) -> str:
    """The model that was tuned, as its config has it."""
    model = run.config.get("model") or {}
    return str(model.get("path") or model.get("name"))


def diffusers_code(run: Run, model: str, lora: str | None) -> str:
    """A script that draws with the run's own sampler, where diffusers has it, from a model and perhaps a LoRA."""
    options, sampler = run.config.get("model") or {}, deployed_sampler(run)
    pipeline = PIPELINES.get(options.get("name", ""), "DiffusionPipeline")
    has_it = sampler.get("name") == "ddim"
    spacing = f', timestep_spacing="{sampler["spacing"]}"' if sampler.get("spacing") else ""
    note = "the run's sampler" if has_it else f"diffusers has no {sampler.get('name')}: pictures differ from condrl's"
    lines = [
        "import torch",
        f"from diffusers import DDIMScheduler, {pipeline}",
        "",
        f'pipe = {pipeline}.from_pretrained("{model}", torch_dtype=torch.float32)',
        *([f'pipe.load_lora_weights("{lora}", weight_name="pytorch_lora_weights.safetensors")'] if lora else []),
        f"pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config{spacing})  # {note}",
        "image = pipe(",
        '    "your prompt",',
        f"    num_inference_steps={sampler.get('steps', 50)},",
        f"    guidance_scale={options.get('guidance', 5.0)},",
        f"    eta={sampler.get('eta', 1.0) if has_it else 0.0},",
        "    generator=torch.Generator().manual_seed(0),",
        ").images[0]",
    ]
    return "\n".join(lines)
