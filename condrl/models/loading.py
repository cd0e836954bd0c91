"""Pipelines of known families from a folder, a hub id or a single file: the good ones, the rest in a line."""

from __future__ import annotations

import importlib
import logging
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from condrl.errors import UsageError, out_of_memory
from condrl.io.files import load_torch, locate, why_unreadable
from condrl.io.hub import offline_if_unreachable, unreachable_reason
from condrl.registry import model as models

PARTS = {  # the library and the classes that are known to work; any other library would be code that is imported
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer*"),
    "scheduler": ("diffusers", "*Scheduler"),
}
COLOURS = 3  # channels of an image
LEAST_TOKENS = 3  # a prompt's beginning, its end, and one between
HUB_ID = re.compile(r"(?!.*\.(safetensors|ckpt|pt|bin)$)(\w[\w.-]*/)?\w[\w.-]*")
UNUSED = {  # options without an effect, by what model.path is
    "folder": ("revision", "single_file_config"),
    "file": ("revision", "variant"),
    "hub id": ("single_file_config",),
}
PLAIN = {  # options of a UNet that make it want an input, or the prompt in a form, that a plain one does not
    "addition_embed_type": None,
    "attention_type": "default",
    "class_embed_type": None,
    "cross_attention_norm": None,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "num_class_embeds": None,
    "time_cond_proj_dim": None,
}
SINGLE = {  # how the keys of a file begin that is something else than a whole checkpoint
    r"lora_|.*\.lora[._]|.*\.lora_[AB]": "is a LoRA: give it as model.lora=, beside the model.path of its base model",
    r"conv_in\.|down_blocks\.|time_embedding\.": "is a UNet alone: model.path needs the folder of the whole pipeline",
    r"(model\.diffusion_model\.)?(joint_blocks|double_blocks|(single_)?transformer_blocks)\.": (
        "is a transformer alone: model.path needs the whole pipeline"
    ),
    r"encoder\.|decoder\.|quant_conv\.": "is a VAE alone: model.path needs the whole pipeline",
    r"conditioner\.embedders\.0\.model\.": "is a Stable Diffusion XL refiner, which redraws images: not tuned here",
}


def hub_id(path: str) -> str | None:
    """A model's name on the Hugging Face hub; None of a file, a folder and what comes with condrl."""
    return path if "/" in path and HUB_ID.fullmatch(path) and not locate(path).exists() else None


def public_name(path: str) -> str:
    """What a model is called where others read it: without the folders of this machine."""
    is_local = Path(path).expanduser().is_absolute() or locate(path).exists()
    return Path(path.removeprefix("asset:")).name if is_local and not hub_id(path) else path


@dataclass(frozen=True, kw_only=True)
class Family:
    """What is known of a family of models: its pipelines, their parts, and what they look like in a single file."""

    title: str
    tag: str  # on the hub
    pipelines: tuple[str, ...]  # classes in diffusers for the same networks; the first one is loaded
    parts: Mapping[str, tuple[str, str]] = field(default_factory=lambda: PARTS)
    without: tuple[str, ...] = ("feature_extractor", "image_encoder")  # parts that are not loaded
    optional: Mapping[str, str] = field(default_factory=dict)  # parts that may be missing, and their keys' beginning
    own_keys: tuple[str, ...]  # how keys begin that, of checkpoints in the original layout, only this family's have
    shared_keys: tuple[str, ...] = ("model.diffusion_model.", "first_stage_model.")  # and that all of its have
    unet: Mapping[str, Any] = field(default_factory=dict)  # options in which its UNets differ from PLAIN ones
    vae_in_float32: bool = False  # where the VAE's config says that half precision is too small for it
    refused: Mapping[str, str] = field(default_factory=dict)  # what an entry of model_index.json that is true says
    misfit: Callable[[Any], str | None] = lambda pipe: None  # what is wrong with a pipeline of known parts

    @property
    def networks(self) -> list[str]:
        """The parts that have weights."""
        return [name for name in self.parts if not name.startswith(("tokenizer", "scheduler"))]

    def less(self, names: Collection[str]) -> Family:
        """The family without some parts."""
        parts = {name: part for name, part in self.parts.items() if name not in names}
        return replace(self, parts=parts, without=(*self.without, *names))

    @property
    def readers(self) -> dict[str, str]:
        """The text encoders by their tokenizers."""
        return {n: n.replace("tokenizer", "text_encoder") for n in self.parts if n.startswith("tokenizer")}

    @property
    def pipeline(self) -> Any:
        """The class in diffusers."""
        return getattr(importlib.import_module("diffusers"), self.pipelines[0])

    @property
    def whole(self) -> tuple[str, ...]:
        """How keys begin that are in every checkpoint in the original layout."""
        return (*self.shared_keys, *self.own_keys)


def others(family: Family, fits: Callable[[Family], bool]) -> Iterator[str]:
    """What to set where a pipeline is of another family that there is a model plugin for."""
    for name in models.names():
        other = getattr(models.find(name).target, "family", None)
        if isinstance(other, Family) and other is not family and fits(other):
            yield f"set model.name={name}"


def load_pipeline(
    family: Family,
    path: str,
    revision: str | None,
    single_file_config: str | None,
    dtype: torch.dtype,
    variant: str | None = None,
) -> Any:
    """A pipeline of a family, its tokenizers cut where the text encoders' positions end.

    Raises: UsageError when the path is neither a file, a folder nor a hub id of a model that is known to work.
    """
    be_quiet()
    source = locate(path)
    if not source.exists() and not HUB_ID.fullmatch(path):
        raise UsageError(f"config model.path: there is no file or folder {path}, and a hub id is OWNER/NAME")
    check_unused(source, revision=revision, single_file_config=single_file_config, variant=variant)
    with offline_if_unreachable(local=source.is_dir() or single_file_config is not None):
        try:
            if source.is_file():
                pipe = from_file(family, source, single_file_config, dtype)
            else:
                where = str(source) if source.is_dir() else path
                options = dict(revision=revision, variant=variant, dtype=dtype, use_safetensors=True)
                pipe = from_folder(family, where, options)
        except UsageError as error:
            raise UsageError(f"config model.path: {error}") from error
        except Exception as error:  # diffusers, transformers and safetensors raise what they like at a bad file
            if out_of_memory(error):
                raise
            why = explained(family, error, source, variant)
            raise UsageError(f"config model.path: cannot load {path!r}: {why}") from error
    family = family.less([name for name in family.parts if getattr(pipe, name) is None])
    for name in family.networks:
        getattr(pipe, name).eval()  # diffusers leaves the dropout of a T5 from a single file on
    limit_tokenizers(family, pipe, path)
    check(family, pipe, path)
    return pipe


def check_unused(source: Path, **options: str | None) -> None:
    """Raises: UsageError on an option that has no effect on what is loaded."""
    kind = "folder" if source.is_dir() else "file" if source.is_file() else "hub id"
    for name in UNUSED[kind]:
        if options[name] is not None:
            raise UsageError(f"config model.{name}: has no effect on a {kind}, which model.path is: leave it out")


def be_quiet() -> None:
    """No progress bars and no logging from the libraries."""
    import diffusers.utils.logging
    import transformers.utils.logging

    warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument")  # which diffusers passes to the hub
    warnings.filterwarnings("ignore", "TorchaoLoraLinear was instantiated")  # a LoRA that cannot be merged, nor is
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao registers what torch 2.14 has already
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on CPUs it looks for kernels that are not used here
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity(logging.CRITICAL)  # what they raise is reported here


def from_folder(family: Family, where: str, options: dict[str, Any]) -> Any:
    """The networks one by one, to hear of weights that the files lack, then the rest of the pipeline.

    Raises: UsageError on parts of another class, and on weights or a vocabulary that are missing.
    """
    index = check_parts(family, where, options["revision"])
    family = family.less([name for name in family.optional if is_left_out(index.get(name))])
    parts = {name: network(family, where, name, options) for name in family.networks}
    without = dict.fromkeys(family.without)
    return family.pipeline.from_pretrained(where, trust_remote_code=False, **without, **parts, **options)


def network(family: Family, where: str, name: str, options: dict[str, Any]) -> Any:
    """A network of a pipeline.

    Raises: UsageError when its weights are not those that its config.json describes.
    """
    library, kind = family.parts[name]
    full = name == "vae" and family.vae_in_float32
    own = {"attn_implementation": "sdpa"} if library == "transformers" else {}  # a config could name one from the hub
    loaded, found = getattr(importlib.import_module(library), kind).from_pretrained(
        where,
        subfolder=name,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **{**options, **own, "dtype": torch.float32 if full else options["dtype"]},
    )
    if missing := sorted(found["missing_keys"]):
        raise UsageError(f"the weights of {where}/{name} lack {len(missing)} tensors, such as {missing[0]}")
    if found["mismatched_keys"]:
        key = sorted(map(str, found["mismatched_keys"]))[0]
        raise UsageError(f"the weights of {where}/{name} do not fit its config.json: see {key}")
    return rounded(loaded, options["dtype"]) if full else loaded


def rounded(vae: Any, dtype: torch.dtype) -> Any:
    """A VAE in a precision, unless its config says that it overflows in half precision."""
    return vae if vae.config.force_upcast else vae.to(dtype)


def check_parts(family: Family, where: str, revision: str | None) -> dict[str, Any]:
    """What model_index.json says of the pipeline and its parts.

    Raises: UsageError when one of them is of a class that is not known to work.
    """
    if Path(where).is_dir() and not (Path(where) / "model_index.json").is_file():
        raise UsageError(f"{where} {what_folder(Path(where))}")
    index: dict[str, Any] = family.pipeline.load_config(where, revision=revision)
    kind = index.get("_class_name")
    if kind not in family.pipelines:
        known = f"known are {', '.join(family.pipelines)}"
        raise UsageError(f"{where} is a {kind}: {next(others(family, lambda f: kind in f.pipelines), known)}")
    for entry, what in family.refused.items():
        if index.get(entry):
            raise UsageError(f"{where} {what}")
    for name, (library, known) in family.parts.items():
        if name not in family.optional or not is_left_out(index.get(name)):
            check_part(where, name, index.get(name), library, known)
    left_out = [name for name in family.parts if name in family.optional and is_left_out(index.get(name))]
    if left_out and (other := next((name for name in family.optional if name not in left_out), None)):
        raise UsageError(
            f"{where} has a {other} and no {left_out[0]}: its model_index.json should have both or neither"
        )
    readers = [name for name in family.readers if name not in left_out]
    for folder in (Path(where) / name for name in readers if Path(where).is_dir()):
        check_vocabulary(folder)
    return index


def check_vocabulary(folder: Path) -> None:
    """Raises: UsageError when a tokenizer has no words of its own, instead of which it would get others."""
    if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        raise UsageError(f"{folder} has no vocabulary: neither tokenizer.json nor vocab.json")


def is_left_out(entry: Any) -> bool:
    """Whether an entry of model_index.json says that the pipeline has no such part."""
    return entry in (None, [None, None])


def check_part(where: str, name: str, found: Any, library: str, known: str) -> None:
    """Raises: UsageError when an entry of model_index.json is not the class that is known to work."""
    source, kind = found if isinstance(found, list | tuple) and len(found) == 2 else (None, found)
    if source != library or not fnmatchcase(str(kind), known):
        raise UsageError(f"the {name} of {where} is {kind} of {source}; known is {known} of {library}")


def what_folder(folder: Path) -> str:
    """What a folder without a model_index.json is."""
    names = [file.name for file in folder.glob("*.safetensors")]
    if any("lora" in name or name == "adapter_model.safetensors" for name in names):
        return "holds a LoRA: give it as model.lora=, beside the model.path of its base model"
    if (folder / "config.json").is_file():
        return "is one network of a pipeline: model.path needs the folder above, with model_index.json"
    return "is not a diffusers pipeline: it has no model_index.json"


def from_file(family: Family, path: Path, config: str | None, dtype: torch.dtype) -> Any:
    """A checkpoint in the original layout.

    Raises: UsageError when it is damaged or something else.
    """
    keys = keys_of(path)
    check_keys(family, path, keys)
    if config is None and "v_pred" in keys:  # a mark that diffusers passes over: it would take the output for noise
        raise UsageError(f"{path} predicts v: give model.single_file_config=<folder> with a scheduler that says so")
    if config is not None:
        damaged = (f"{file} {why}" for file in jsons_of(family, Path(config)) if (why := why_unreadable(file)))
        if wrong := next(damaged, None):
            raise UsageError(f"model.single_file_config: {wrong}")
        check_parts(family, config, None)
    missing = [name for name, start in family.optional.items() if not any(key.startswith(start) for key in keys)]
    parts = dict.fromkeys((*family.without, *missing))
    if family.vae_in_float32:
        vae = importlib.import_module("diffusers").AutoencoderKL
        vae = vae.from_single_file(str(path), config=config, subfolder="vae", dtype=torch.float32)
        parts["vae"] = rounded(vae, dtype)
    return family.pipeline.from_single_file(str(path), config=config, dtype=dtype, **parts)


def check_keys(family: Family, path: Path, keys: list[str]) -> None:
    """Raises: UsageError when a file is not a whole checkpoint of the family."""
    missing = [start for start in family.whole if not any(key.startswith(start) for key in keys)]
    if not missing:
        return
    for advice in others(family, lambda other: any(key.startswith(other.own_keys) for key in keys)):
        raise UsageError(f"{path} is not a {family.title} model: {advice}")
    kinds = (what for start, what in SINGLE.items() if any(re.match(start, key) for key in keys))
    rest = f"it has no {missing[0]}*, and {min(keys, default='no keys')}"
    raise UsageError(f"{path} {next(kinds, f'is not a whole {family.title} checkpoint: {rest}')}")


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


def explained(family: Family, error: Exception, source: Path, variant: str | None) -> str:
    """What a library complained about, or better, the file that is damaged or missing."""
    lines = [line.strip().split(". ")[0] for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, NotImplementedError) and "meta tensor" in lines[0]:
        return "it lacks weights that the networks need"
    if source.is_file() and ("outgoing traffic" in lines[0] or "connect" in lines[0]):
        return "the configs for a single file come from the hub: without it, give model.single_file_config=<folder>"
    if not source.is_dir():
        missing = "no file named" in lines[0] and not variant and not source.exists()
        hint = "; if it has them in half precision only: model.variant=fp16" if missing else ""
        elsewhere = unreachable_reason() or f"there is no such file or folder, and on the hub: {lines[0]}"
        return (lines[0] if source.exists() else elsewhere) + hint
    damaged = (f"{file} {why}" for file in files_of(family, source, variant) if (why := why_unreadable(file)))
    return next(damaged, None) or missing_weights(family, source, variant) or lines[0]


def files_of(family: Family, folder: Path, variant: str | None) -> Iterator[Path]:
    """The JSON files and weights of a pipeline's parts."""
    yield from jsons_of(family, folder)
    for name in family.parts:
        yield from (file for file in sorted((folder / name).glob("*.safetensors")) if variant_of(file) == variant)


def jsons_of(family: Family, folder: Path) -> list[Path]:
    """The JSON files of a pipeline's folder; none of a hub id."""
    of_parts = (file for name in family.parts for file in sorted((folder / name).glob("*.json")))
    return [*folder.glob("model_index.json"), *of_parts]


def variant_of(file: Path) -> str | None:
    """`fp16` of diffusion_pytorch_model.fp16.safetensors, and of its shards, ...fp16-00001-of-00002.safetensors."""
    middle = file.name.split(".")[1:-1]
    return re.sub(r"-\d+-of-\d+$", "", middle[0]) if middle else None


def missing_weights(family: Family, folder: Path, variant: str | None) -> str | None:
    """Says where a part of a pipeline has no weights as asked for, and what it has."""
    expected = [name for name in family.networks if name not in family.optional or (folder / name).is_dir()]
    for part in (folder / name for name in expected):
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


def limit_tokenizers(family: Family, pipe: Any, path: str) -> None:
    """Let tokenizers cut prompts where the text encoders' positions end; one without a limit of its own says 1e30.

    Raises: UsageError on one that would leave nothing of a prompt.
    """
    for name, encoder in family.readers.items():
        tokenizer, text = getattr(pipe, name), getattr(pipe, encoder).config
        own = tokenizer.model_max_length
        if not is_number(own) or own < LEAST_TOKENS:
            raise UsageError(f"config model.path: {path!r} has a {name} with model_max_length={own!r}")
        tokenizer.model_max_length = min(getattr(text, "max_position_embeddings", own), own)  # T5's are not limited


def check(family: Family, pipe: Any, path: str) -> None:
    """Raises: UsageError when the networks want something else than they get here, or weights are not numbers."""
    found = next(misfits(family, pipe), None) or family.misfit(pipe)
    if found is not None:
        raise UsageError(f"config model.path: {path!r} {found}: {family.title} for texts are tuned here")
    check_weights(family, pipe, path)


def misfits(family: Family, pipe: Any) -> Iterator[str]:
    """What the networks have that they do not get here, or of which another one has something else."""
    if "unet" in family.parts:
        yield from unet_misfits(family, pipe)
    yield from vae_misfits(pipe.vae.config)
    for name, encoder in family.readers.items():
        if getattr(pipe, name).pad_token is None:
            yield f"has a {name} without a pad_token"
        words, known = len(getattr(pipe, name)), getattr(pipe, encoder).config.vocab_size
        if words > known:
            yield f"has a {name} of {words} words, and a text encoder of {known}"


def vae_misfits(vae: Any) -> Iterator[str]:
    """What of a VAE's config is not used here, or could not be."""
    if vae.get("latents_mean") or vae.get("latents_std"):
        yield "has a VAE with a mean or a deviation of its latents of each channel"
    for name in ("in_channels", "out_channels"):
        if vae[name] != COLOURS:
            yield f"has a VAE with {name}={vae[name]} where images have {COLOURS}"
    scale, shift = vae.scaling_factor, vae.get("shift_factor") or 0
    if not (is_number(scale) and scale > 0 and is_number(shift)):
        yield f"has a VAE with scaling_factor={scale!r} and shift_factor={shift!r}"


def is_number(value: Any) -> bool:
    """Whether a config's value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def unet_misfits(family: Family, pipe: Any) -> Iterator[str]:
    """What does not fit of a UNet."""
    unet, vae = pipe.unet.config, pipe.vae.config
    for name, plain in PLAIN.items():
        if (unet.get(name) or plain) != family.unet.get(name, plain):
            yield f"has a UNet with {name}={unet.get(name)!r}"
    for name in ("in_channels", "out_channels"):
        if unet[name] != vae.latent_channels:
            yield f"has a UNet with {name}={unet[name]}, and a VAE with latent_channels={vae.latent_channels}"
    width = sum(getattr(pipe, encoder).config.hidden_size for encoder in family.readers.values())
    if unet.cross_attention_dim != width:
        yield f"has a UNet for prompts of {unet.cross_attention_dim} features, and text encoders of {width}"
    if not is_size(unet.sample_size):
        yield f"has a UNet with sample_size={unet.sample_size!r}"


def is_size(value: Any) -> bool:
    """Whether a config's value is the side of a square in pixels, or a height and a width."""
    sides = [value, value] if isinstance(value, int) else value
    return isinstance(sides, list | tuple) and len(sides) == 2 and all(isinstance(n, int) and n > 0 for n in sides)


def check_weights(family: Family, pipe: Any, path: str) -> None:
    """Raises: UsageError when weights are missing or not finite."""
    for name in family.networks:
        for key, weight in getattr(pipe, name).named_parameters():
            if weight.is_meta:
                raise UsageError(f"config model.path: {path!r} lacks weights, such as {name}.{key}")
            if not weight.sum(dtype=torch.float32).isfinite():
                raise UsageError(f"config model.path: {path!r} has values that are not finite, in {name}.{key}")
