"""Stable Diffusion pipelines from a folder, a hub id or a single file: the known good ones, the rest in a line."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

import torch

from condrl.errors import UsageError, out_of_memory
from condrl.io.files import load_torch, locate, why_unreadable
from condrl.io.hub import offline_if_unreachable, unreachable_reason

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")  # of the same networks
PARTS = {  # the library and the classes that are known to work; any other library would be code that is imported
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer*"),
    "scheduler": ("diffusers", "*Scheduler"),
}
WITHOUT = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}  # parts that are not loaded
HUB_ID = re.compile(r"(?!.*\.(safetensors|ckpt|pt|bin)$)(\w[\w.-]*/)?\w[\w.-]*")
UNUSUAL = (  # options of a UNet that make it want an input, or the prompt in a form, that it does not get here
    "addition_embed_type",
    "class_embed_type",
    "cross_attention_norm",
    "dual_cross_attention",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "num_class_embeds",
    "time_cond_proj_dim",
)
SINGLE = {  # how the keys of a file begin that is something else than a whole checkpoint
    r"lora_|.*\.lora[._]|.*\.lora_[AB]": "is a LoRA: give it as model.lora=, beside the model.path of its base model",
    r"conv_in\.|down_blocks\.|time_embedding\.": "is a UNet alone: model.path needs the folder of the whole pipeline",
    r"encoder\.|decoder\.|quant_conv\.": "is a VAE alone: model.path needs the whole pipeline",
    r"conditioner\.": "is a Stable Diffusion XL model; 1.x and 2.x are tuned here",
}
WHOLE = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")  # in every original checkpoint


def load_pipeline(
    path: str, revision: str | None, single_file_config: str | None, dtype: torch.dtype, variant: str | None = None
) -> Any:
    """A StableDiffusionPipeline without its safety checker.

    Raises: UsageError when the path is neither a file, a folder nor a hub id of a model that is known to work.
    """
    be_quiet()
    source = locate(path)
    if not source.exists() and not HUB_ID.fullmatch(path):
        raise UsageError(f"config model.path: there is no file or folder {path}, and a hub id is OWNER/NAME")
    with offline_if_unreachable(local=source.is_dir() or single_file_config is not None):
        try:
            if source.is_file():
                pipe = from_file(source, single_file_config, dtype)
            else:
                where = str(source) if source.is_dir() else path
                pipe = from_folder(where, dict(revision=revision, variant=variant, dtype=dtype, use_safetensors=True))
        except UsageError as error:
            raise UsageError(f"config model.path: {error}") from error
        except Exception as error:  # diffusers, transformers and safetensors raise what they like at a bad file
            if out_of_memory(error):
                raise
            raise UsageError(f"config model.path: cannot load {path!r}: {explained(error, source, variant)}") from error
    check(pipe, path)
    return pipe


def be_quiet() -> None:
    """No progress bars and no logging from the libraries."""
    import diffusers.utils.logging
    import transformers.utils.logging

    warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument")  # which diffusers passes to the hub
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity(logging.CRITICAL)  # what they raise is said here


def from_folder(where: str, options: dict[str, Any]) -> Any:
    """The networks one by one, to hear of weights that the files lack, then the rest of the pipeline.

    Raises: UsageError on parts of another class, and on weights or a vocabulary that are missing.
    """
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    check_parts(where, options["revision"])
    attention = {"attn_implementation": "sdpa"}  # transformers' own; a config could ask for a kernel from the hub
    parts: dict[str, Any] = {}
    for name, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL), ("text_encoder", CLIPTextModel)):
        parts[name], found = kind.from_pretrained(
            where,
            subfolder=name,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **(attention if name == "text_encoder" else {}),
            **options,
        )
        if missing := sorted(found["missing_keys"]):
            raise UsageError(f"the weights of {where}/{name} lack {len(missing)} tensors, such as {missing[0]}")
        if found["mismatched_keys"]:
            key = sorted(map(str, found["mismatched_keys"]))[0]
            raise UsageError(f"the weights of {where}/{name} do not fit its config.json: see {key}")
    return StableDiffusionPipeline.from_pretrained(where, trust_remote_code=False, **WITHOUT, **parts, **options)


def check_parts(where: str, revision: str | None) -> None:
    """Raises: UsageError when the pipeline, or a part of it, is of a class that is not known to work."""
    from diffusers import StableDiffusionPipeline

    if Path(where).is_dir() and not (Path(where) / "model_index.json").is_file():
        raise UsageError(f"{where} {what_folder(Path(where))}")
    index = StableDiffusionPipeline.load_config(where, revision=revision)
    if index.get("_class_name") not in PIPELINES:
        raise UsageError(f"{where} is a {index.get('_class_name')}; known are {', '.join(PIPELINES)}")
    for name, (library, known) in PARTS.items():
        found = index.get(name)
        source, kind = found if isinstance(found, list | tuple) and len(found) == 2 else (None, found)
        if source != library or not fnmatchcase(str(kind), known):
            raise UsageError(f"the {name} of {where} is {kind} of {source}; known is {known} of {library}")
    words = Path(where) / "tokenizer"
    if words.is_dir() and not any((words / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UsageError(f"{words} has no vocabulary: neither tokenizer.json nor vocab.json")


def what_folder(folder: Path) -> str:
    """What a folder without a model_index.json is."""
    names = [file.name for file in folder.glob("*.safetensors")]
    if any("lora" in name or name == "adapter_model.safetensors" for name in names):
        return "holds a LoRA: give it as model.lora=, beside the model.path of its base model"
    if (folder / "config.json").is_file():
        return "is one network of a pipeline: model.path needs the folder above, with model_index.json"
    return "is not a diffusers pipeline: it has no model_index.json"


def from_file(path: Path, config: str | None, dtype: torch.dtype) -> Any:
    """A checkpoint in the original layout.

    Raises: UsageError when it is damaged or something else.
    """
    from diffusers import StableDiffusionPipeline

    keys = keys_of(path)
    missing = [part for part in WHOLE if not any(key.startswith(part) for key in keys)]
    if missing:
        kinds = (what for start, what in SINGLE.items() if any(re.match(start, key) for key in keys))
        other = (
            f"is not a whole Stable Diffusion checkpoint: it has no {missing[0]}*, and {min(keys, default='no keys')}"
        )
        raise UsageError(f"{path} {next(kinds, other)}")
    if config is not None:
        damaged = (f"{file} {why}" for file in jsons_of(Path(config)) if (why := why_unreadable(file)))
        if wrong := next(damaged, None):
            raise UsageError(f"model.single_file_config: {wrong}")
        check_parts(config, None)
    return StableDiffusionPipeline.from_single_file(str(path), config=config, dtype=dtype, **WITHOUT)


def keys_of(path: Path) -> list[str]:
    """The names of the tensors in a checkpoint.

    Raises: UsageError when the file is damaged.
    """
    from safetensors import safe_open

    if why := why_unreadable(path):
        raise UsageError(f"{path} {why}")
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return list(file.keys())
    state = load_torch(path, "checkpoint")
    return list(state.get("state_dict", state))


def explained(error: Exception, source: Path, variant: str | None) -> str:
    """What a library complained about, or better, the file that is damaged or missing."""
    lines = [line.strip().split(". ")[0] for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, NotImplementedError) and "meta tensor" in lines[0]:
        return "it lacks weights that the networks need"
    if source.is_file() and ("outgoing traffic" in lines[0] or "connect" in lines[0]):
        return "the configs for a single file come from the hub: without it, give model.single_file_config=<folder>"
    if not source.is_dir():
        missing = "no file named" in lines[0] and not variant
        hint = "; if it has them in half precision only: model.variant=fp16" if missing else ""
        elsewhere = unreachable_reason() or f"there is no such file or folder, and on the hub: {lines[0]}"
        return (lines[0] if source.exists() else elsewhere) + hint
    damaged = (f"{file} {why}" for file in files_of(source, variant) if (why := why_unreadable(file)))
    return next(damaged, None) or missing_weights(source, variant) or lines[0]


def files_of(folder: Path, variant: str | None) -> Iterator[Path]:
    """The JSON files and weights of a pipeline's parts."""
    yield from jsons_of(folder)
    for name in PARTS:
        yield from (file for file in sorted((folder / name).glob("*.safetensors")) if variant_of(file) == variant)


def jsons_of(folder: Path) -> list[Path]:
    """The JSON files of a pipeline's folder; none of a hub id."""
    of_parts = (file for name in PARTS for file in sorted((folder / name).glob("*.json")))
    return [*folder.glob("model_index.json"), *of_parts]


def variant_of(file: Path) -> str | None:
    """`fp16` of diffusion_pytorch_model.fp16.safetensors, and of its shards, ...fp16-00001-of-00002.safetensors."""
    middle = file.name.split(".")[1:-1]
    return re.sub(r"-\d+-of-\d+$", "", middle[0]) if middle else None


def missing_weights(folder: Path, variant: str | None) -> str | None:
    """Says where a part of a pipeline has no weights as asked for, and what it has."""
    for part in (folder / name for name in ("unet", "vae", "text_encoder")):
        found = {variant_of(file) for file in part.glob("*.safetensors")}
        others = sorted(str(kind or "null") for kind in found - {variant})
        if others and variant not in found:
            return f"{part} has no weights of model.variant={variant or 'null'}: set model.variant={others[0]}"
        if not found and any(part.glob("*.bin")):
            return f"{part} has pickled weights only, which could run anything: only .safetensors are read"
        if not found or not (part / "config.json").is_file():
            return f"{part} has no {'config.json' if found else 'weights'}"
    return None


# ---------------------------------------------------------------------------------------------- checks


def check(pipe: Any, path: str) -> None:
    """Raises: UsageError when the networks want something else than they get here, or weights are not numbers."""
    unet, vae, text = pipe.unet.config, pipe.vae.config, pipe.text_encoder.config

    def refuse(what: str) -> NoReturn:
        raise UsageError(f"config model.path: {path!r} {what}: Stable Diffusion 1.x and 2.x for texts are tuned here")

    for name in UNUSUAL:
        if unet.get(name):
            refuse(f"has a UNet with {name}={unet[name]!r}")
    if unet.get("attention_type", "default") != "default":
        refuse(f"has a UNet with attention_type={unet.attention_type!r}")
    for name in ("in_channels", "out_channels"):
        if unet[name] != vae.latent_channels:
            refuse(f"has a UNet with {name}={unet[name]}, and a VAE with latent_channels={vae.latent_channels}")
    if unet.cross_attention_dim != text.hidden_size:
        refuse(
            f"has a UNet for prompts of {unet.cross_attention_dim} features, and a text encoder of {text.hidden_size}"
        )
    if not unet.sample_size:
        refuse("has a UNet without a sample_size")
    if len(pipe.tokenizer) > text.vocab_size:
        refuse(f"has a tokenizer of {len(pipe.tokenizer)} words, and a text encoder of {text.vocab_size}")
    check_weights(pipe, path)


def check_weights(pipe: Any, path: str) -> None:
    """Raises: UsageError when weights are missing or not finite."""
    for name in ("unet", "vae", "text_encoder"):
        for key, weight in getattr(pipe, name).named_parameters():
            if weight.is_meta:
                raise UsageError(f"config model.path: {path!r} lacks weights, such as {name}.{key}")
            if not weight.sum(dtype=torch.float32).isfinite():
                raise UsageError(f"config model.path: {path!r} has values that are not finite, in {name}.{key}")
