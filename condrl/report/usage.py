"""How a run's LoRA is loaded elsewhere."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from condrl.config import WITH_LORA
from condrl.models.latent import InDiffusers
from condrl.models.loading import hub_id, public_name
from condrl.models.lora import LORA_FILE
from condrl.registry import model as models
from condrl.report.run import Run


def plugin_of(run: Run) -> Any:
    """The model plugin that a run tuned, of those that are known by name; None where it draws no images by diffusers.

    A config may come from elsewhere: what it names by `module:object` is not imported for its page.
    """
    name = (run.config.get("model") or {}).get("name")
    target = models.find(name).target if name in models.names() else None
    return target if hasattr(target, "in_diffusers") else None


def is_flow(plugin: Any) -> bool:
    """Whether it is drawn by its own scheduler's steps, as transformers are."""
    return getattr(plugin, "prefix", "unet") != "unet"


def readers(run: Run) -> str:
    """The programs that read the second of a LoRA's files."""
    return "ComfyUI" if is_flow(plugin_of(run)) else "ComfyUI and A1111"


def deployed_sampler(run: Run) -> dict[str, Any]:
    """The sampler that held-out prompts were drawn with."""
    evaluate = run.config.get("evaluate") or {}
    return {**(run.config.get("sampler") or {}), **(evaluate.get("sampler") or {})}


def base_model(run: Run) -> str:
    """The model that was tuned, as its config has it."""
    model = run.config.get("model") or {}
    return str(model.get("path") or model.get("name"))


def for_others(model: str) -> str:
    """A model as somebody else's script has it: by its name on the hub, or without the folders of this machine."""
    return hub_id(model) or f"path/to/{public_name(model)}"


def drawing(run: Run, lora: str = "lora") -> str:
    """The command line that draws with a LoRA of a run, as somebody else's machine may have it."""
    folder = f"path/to/{run.folder.resolve().name}{'' if lora == 'lora' else f'/{lora}'}"
    return f'condrl sample {shlex.quote(folder)} --prompt "..."'


def public_base(base: str) -> str:
    """A base's name without the folders of this machine; of a LoRA in a run, the run's name is kept."""
    model, _, lora = base.partition(WITH_LORA)
    model = model if model.startswith("asset:") else public_name(model)
    if not lora:
        return model
    parent = Path(lora).parent.name if not hub_id(lora) and Path(lora).name in ("lora", "lora_best") else ""
    return f"{model}{WITH_LORA}{f'{parent}/' if parent else ''}{Path(lora).name if parent else public_name(lora)}"


def sampler_text(sampler: dict[str, Any]) -> str:
    """The options of a sampler that are set, without its name."""
    return ", ".join(f"{key} {value}" for key, value in sampler.items() if key != "name" and value is not None)


def command(words: list[str]) -> str:
    """A command line, without the folders of this machine."""
    program = "condrl" if Path(words[0]).name in ("__main__.py", "condrl") else Path(words[0]).name
    return shlex.join([program, *map(without_folders, words[1:])])


def without_folders(word: str) -> str:
    """A word of a command line, which may be key=value."""
    name, equals, value = word.rpartition("=")
    return f"{name}{equals}{for_others(value) if Path(value).is_absolute() else value}"


def lora_code(run: Run, place: str) -> str:
    """A script that draws with a LoRA of the run, which is at a place, as somebody else's machine may have it."""
    config = (run.config.get("model") or {}).get("single_file_config")
    return diffusers_code(run, for_others(base_model(run)), place, config and for_others(config))


def diffusers_code(run: Run, path: str, lora: str | None, config: str | None = None, dtype: str = "float32") -> str:
    """A script that draws with the run's own sampler, where diffusers has it, from a model and perhaps a LoRA.

    `config` is where the configs of a model in one file are, `dtype` the precision to draw in.
    """
    options, sampler, plugin = run.config.get("model") or {}, {"eta": 1.0, **deployed_sampler(run)}, plugin_of(run)
    flow, pipeline = is_flow(plugin), plugin.family.pipelines[0] if plugin else "DiffusionPipeline"
    told = plugin.in_diffusers(options) if plugin else InDiffusers({}, {})
    has_it = sampler.get("name") == "ddim" and (not flow or sampler["eta"] == 0)
    spacing = f', timestep_spacing="{sampler["spacing"]}"' if sampler.get("spacing") else ""
    missing = "draws flows without noise" if flow else f"has no {sampler.get('name')}"
    note = "the run's sampler" if has_it else f"diffusers {missing}: pictures differ from condrl's"
    scheduler = f"pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config{spacing})  # {note}"
    call = told.call | ({} if flow else {"eta": sampler["eta"] if has_it else 0.0})
    load = "".join(f", {name}={value!r}" for name, value in told.load.items())
    is_single = Path(path).suffix in (".safetensors", ".ckpt")
    load = (f', config="{config}"' if is_single and config else "") + load
    loader = f"{pipeline}.from_single_file" if is_single else f"{pipeline}.from_pretrained"
    lines = [
        "import torch",
        f"from diffusers import {pipeline if flow else f'DDIMScheduler, {pipeline}'}",
        "",
        f'pipe = {loader}("{path}", torch_dtype=torch.{dtype}{load})',
        *([f'pipe.load_lora_weights("{lora}", weight_name="{LORA_FILE}")'] if lora else []),
        f"# {note}" if flow else scheduler,
        "image = pipe(",
        '    "your prompt",',
        f"    num_inference_steps={sampler.get('steps', 50)},",
        *(f"    {name}={value!r}," for name, value in call.items()),
        "    generator=torch.Generator().manual_seed(0),",
        ").images[0]",
    ]
    return "\n".join(lines)
