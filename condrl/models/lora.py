"""LoRA in and out, in every format: diffusers', kohya's (ComfyUI, A1111) and peft's.

Out, the scale alpha / rank is multiplied into `up`, so that readers that know alpha, assume alpha = rank or ignore it
agree. In, it is read wherever the file has it: keys ending in .alpha, diffusers' metadata, peft's adapter_config.json.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from condrl.errors import UsageError, print_main
from condrl.io.files import load_metadata, load_tensors, save_tensors
from condrl.io.records import from_json
from condrl.models.quantised import shape_of

LORA_FILE = "pytorch_lora_weights.safetensors"  # as diffusers names it
KOHYA_FILE = "comfyui_lora.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
XL = "sdxl_base_v1-0"  # as kohya's trainer calls Stable Diffusion XL, also models that were made from it
PICKLES = (".bin", ".ckpt", ".pt", ".pth")

DOWN = re.compile(r"(.+?)(?:\.lora_down|[._]lora\.down|\.lora_A(?:\.\w+)?)\.weight")
UP = re.compile(r"(.+?)(?:\.lora_up|[._]lora\.up|\.lora_B(?:\.\w+)?)\.weight")
ALPHA = re.compile(r"(.+)\.alpha")
OTHERS = {  # what a key says of a file that is no plain LoRA of one network
    r"(base_model\.model\.)?text_encoder|lora_te\d?_|text_model": "has a text-encoder part, which is not tuned here",
    r".*(dora_scale|lora_magnitude_vector)": "is a DoRA, which is not read here",
    r".*(hada_w|lokr_w|lora_mid|glora|oft_|\.diff(_b)?$|\.[ab][12]\.weight)": "is a LyCORIS file, not a plain LoRA",
}
FOREIGN = {  # and of one that this network's LoRA cannot be
    "unet": {
        r"(base_model\.model\.)?transformer\.|lora_transformer_|diffusion_model\.": "is of a transformer, not of a UNet"
    },
    "transformer": {
        r"(base_model\.model\.)?unet\.|lora_unet_(down|mid|up)_": "is of a UNet, not of a transformer",
        r"lora_unet_|diffusion_model\.": "has the modules of the original layout, which are not read here",
    },
}
CARD = """---
base_model: {base}
library_name: diffusers
tags: [lora, text-to-image, {family}, condrl]
---

# LoRA tuned with condrl

Base model: {name}. The two files hold the same LoRA, under the names that different programs read:

- diffusers: `{lora}`, by `pipe.load_lora_weights(<this folder>, weight_name="{lora}")`
- {others}

Rank {rank}. The scale is multiplied into the weights: alpha = rank, strength 1 is what was tuned.{rewards}
Settings and measurements: `config.yaml` and `result.json` of the run.
"""
READERS = {  # of the second file
    "unet": "ComfyUI and A1111: `{kohya}`, copied to their folder of LoRAs (kohya's names, which diffusers reads too)",
    "transformer": "ComfyUI: `{kohya}`, copied to its folder of LoRAs (OneTrainer's names; it reads the other too)",
}


@dataclass(frozen=True)
class Factors:
    """A module's change of weights, up @ down, both flattened to matrices in float32."""

    down: Tensor  # (rank, inputs)
    up: Tensor  # (outputs, rank)


def lora_layers(network: nn.Module) -> dict[str, Any]:
    """The peft LoRA layers of a network by module name."""
    return {name: module for name, module in network.named_modules() if hasattr(module, "lora_A") and module.lora_A}


@torch.no_grad()
def scale_lora(network: nn.Module, strength: float) -> None:
    """Multiply a network's LoRA, at 1 what was tuned, by `strength`.

    Raises: UsageError when that is too large for its weights.
    """
    for layer in lora_layers(network).values():
        (adapter,) = layer.lora_B
        layer.lora_B[adapter].weight.mul_(strength)
        if not layer.get_delta_weight(adapter).isfinite().all():
            raise UsageError(f"the LoRA's change of weights at strength {strength:g} is too large for float32")


# ---------------------------------------------------------------------------------------------- out


def lora_state(network: nn.Module) -> dict[str, Tensor]:
    """`<module>.{down,up}.weight` in float32, the scale alpha / rank multiplied into `up`."""
    state = {}
    for name, layer in lora_layers(network).items():
        (adapter,) = layer.lora_A
        state[f"{name}.down.weight"] = layer.lora_A[adapter].weight.detach().cpu().contiguous()
        up = layer.lora_B[adapter].weight.detach() * layer.scaling[adapter]
        state[f"{name}.up.weight"] = up.cpu().contiguous()
    return state


def diffusers_names(state: Mapping[str, Tensor], prefix: str = "unet") -> dict[str, Tensor]:
    """`unet.<module>.lora.{down,up}.weight`, and of any other network `<prefix>.<module>.lora_{A,B}.weight`."""
    parts = {"down": "lora.down", "up": "lora.up"} if prefix == "unet" else {"down": "lora_A", "up": "lora_B"}
    named = {}
    for key, value in state.items():
        name, part, _ = key.rsplit(".", 2)
        named[f"{prefix}.{name}.{parts[part]}.weight"] = value
    return named


def kohya_names(state: Mapping[str, Tensor], prefix: str = "unet") -> dict[str, Tensor]:
    """`lora_<prefix>_<module, dots to underscores>.{lora_down.weight, lora_up.weight, alpha}`, alpha = rank."""
    named = {}
    for key, value in state.items():
        name, part, _ = key.rsplit(".", 2)
        base = kohya_base(name, prefix)
        named[f"{base}.lora_{part}.weight"] = value
        if part == "down":
            named[f"{base}.alpha"] = torch.tensor(float(len(value)))
    return named


def save_lora(
    network: nn.Module,
    folder: Path,
    base: str,
    metadata: Mapping[str, str] | None = None,
    prefix: str = "unet",
    tag: str = "stable-diffusion",
) -> None:
    """Write the LoRA of a network for diffusers and for ComfyUI and A1111, and a model card, to `folder`.

    Both files say the base model, rank and alpha, and what `metadata` adds, such as the rewards; `tag` is what the hub
    calls the family of the base model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state, common = lora_state(network), dict(metadata or {})
    rank = str(max((len(value) for key, value in state.items() if key.endswith("down.weight")), default=0))
    common |= {"format": "pt", "base_model": base, "rank": rank, "alpha": rank}
    save_tensors(diffusers_names(state, prefix), folder / LORA_FILE, common)
    save_tensors(kohya_names(state, prefix), folder / KOHYA_FILE, common | kohya_metadata(network, base, rank))
    rewards = f" Rewards: {common['rewards']}." if "rewards" in common else ""
    names = dict(lora=LORA_FILE, others=READERS[prefix].format(kohya=KOHYA_FILE), family=tag)
    card = dict(base=json.dumps(base), name=code_span(base), rank=rank, rewards=rewards, **names)
    (folder / "README.md").write_text(CARD.format(**card), "utf-8")  # a JSON string is a YAML string whatever is in it


def code_span(text: str) -> str:
    """Text in Markdown as it is, whatever is in it: in more backticks than follow each other in it."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " * ("`" in text)
    return f"{fence}{space}{' '.join(text.split())}{space}{fence}"


def kohya_metadata(network: Any, base: str, rank: str) -> dict[str, str]:
    """The entries by which A1111 shows a LoRA and tells which models it is for, as kohya's trainer writes them."""
    form = {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}
    version = version_of(network)
    known = {"ss_base_model_version": version, "ss_v2": str(version == "sd_v2")} if version else {}
    return {**form, "ss_sd_model_name": base, **known}


def version_of(unet: Any) -> str | None:
    """What kohya's trainer calls the models that a UNet is of, by the form and width of its prompts; None of others."""
    if unet.config.get("addition_embed_type") == "text_time":
        return XL
    versions = {768: "sd_v1", 1024: "sd_v2"}
    return versions.get(unet.config.get("cross_attention_dim"))


# ---------------------------------------------------------------------------------------------- in


@torch.no_grad()
def load_lora(network: nn.Module, source: Path, prefix: str = "unet") -> None:
    """Read a LoRA, a file or its folder, into a network's existing adapter: the same change of weights to rounding.

    A smaller rank is filled up with directions that start at zero; a larger one is refitted where it fits exactly.

    Raises: UsageError when there is none, when it is damaged, has more parts than the adapter, or needs a larger rank.
    """
    path = find_lora(source)
    found, layers = read_lora(network, path, prefix), lora_layers(network)
    extra = sorted(set(found) - set(layers))
    if extra:
        _refuse(path, f"has weights for {extra[0]}, which model.lora_targets leaves out: add its name there")
    untouched = [name for name in layers if name not in found]
    if untouched:
        print_main(
            f"the LoRA {path} has nothing for {len(untouched)} of {len(layers)} modules: {untouched[0]} ... start at 0"
        )
    fitted = {name: fit(factors, _rank(layers[name])) for name, factors in found.items()}
    if any(factors is None for factors in fitted.values()):
        needed = max(len(factors.down) for factors in found.values())
        _refuse(path, f"has rank {needed}, and model.lora_rank is less: set model.lora_rank={needed}")
    for name, layer in layers.items():
        _fill(layer, fitted.get(name))


def find_lora(source: Path) -> Path:
    """The file that holds a LoRA: `source` itself, or one in that folder.

    Raises: UsageError when there is none, or a pickle.
    """
    names = (LORA_FILE, PEFT_FILE, KOHYA_FILE)
    path = next((source / name for name in names if (source / name).is_file()), source)
    inside = sorted(path.glob("*")) if path.is_dir() else [path]
    candidates = [file for file in inside if path.is_file() or file.suffix == ".safetensors"]
    pickles = [file for file in inside if file.suffix in PICKLES and file.is_file()]
    if pickles and candidates in ([], pickles):
        raise UsageError(f"the LoRA {pickles[0]} is a pickle, which could run anything: only .safetensors are read")
    if len(candidates) != 1:
        below = "; there is one in its folder lora/" if (path / "lora" / LORA_FILE).is_file() else ""
        raise UsageError(f"there is no LoRA at {source}: expected a folder with {LORA_FILE}, or a file{below}")
    return candidates[0]


def read_lora(network: nn.Module, path: Path, prefix: str = "unet") -> dict[str, Factors]:
    """The changes of weights in a file by the network's module names, whatever names the file uses.

    Raises: UsageError when the file is damaged, is not a plain LoRA, or was made for another network.
    """
    scales, factors = Scales.read(path, prefix), {}
    for name, (down, up, alpha) in _by_module(network, path, load_tensors(path, "LoRA"), prefix).items():
        if down is None or up is None or not _fits(down, up) or (alpha is not None and alpha.numel() != 1):
            _refuse(path, f"is not whole: see {name}")
        scale = scales.of(name, len(down)) if alpha is None else alpha.item() / len(down)
        factors[name] = Factors(down.float().flatten(1), up.float().flatten(1) * scale)
        if not factors[name].up.isfinite().all():
            _refuse(path, f"has a scale of {scale:g}, too large for its weights: see {name}")
        _check_shape(path, name, network.get_submodule(name), factors[name])
    return factors


def _by_module(
    network: nn.Module, path: Path, state: Mapping[str, Tensor], prefix: str
) -> dict[str, list[Tensor | None]]:
    """Each module's down, up and alpha as the file has them."""
    _check_kind(path, state)
    _check_network(path, state, prefix)
    modules = spellings(network, prefix)
    found: dict[str, list[Tensor | None]] = {}
    for key, value in state.items():
        match, part = next((m, i) for i, p in enumerate((DOWN, UP, ALPHA)) if (m := p.fullmatch(key)))
        parts = found.setdefault(_module(match[1], modules, path, prefix), [None, None, None])
        if parts[part] is not None:
            _refuse(path, f"has the same weights under two names: see {key}")
        if not value.is_floating_point() or not value.float().isfinite().all():
            _refuse(path, f"holds values that are not finite numbers of floating point, in {key}")
        parts[part] = value
    return found


@dataclass(frozen=True)
class Scales:
    """The scale of each module, as peft's config has it; 1 where there is none (alpha = rank)."""

    alpha: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)  # by modules' names, or ends of them
    rslora: bool = False  # alpha / sqrt(rank) instead of alpha / rank

    @classmethod
    def read(cls, path: Path, prefix: str) -> Scales:
        """From diffusers' metadata in the file, or from peft's config beside it."""
        text, beside = load_metadata(path, "LoRA").get("lora_adapter_metadata"), path.parent / PEFT_CONFIG
        if text is None and path.name == PEFT_FILE and beside.is_file():
            path, text = beside, beside.read_text("utf-8", errors="replace")
        try:
            return cls.of_config(from_json(text), prefix) if text is not None else cls()
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise UsageError(f"the LoRA's settings in {path} cannot be read: {error}") from error

    @classmethod
    def of_config(cls, config: Mapping[str, Any], prefix: str) -> Scales:
        own = {key.removeprefix(f"{prefix}."): value for key, value in config.items()}
        patterns = {name: _finite(alpha) for name, alpha in (own.get("alpha_pattern") or {}).items()}
        if odd := [name for name in patterns if not re.fullmatch(r"\^?(\w|\\?\.)+", name)]:
            raise ValueError(f"{odd[0]!r} in alpha_pattern is not the name of a module")  # others can take for ever
        return cls(_finite(own["lora_alpha"]) if "lora_alpha" in own else None, patterns, bool(own.get("use_rslora")))

    def of(self, name: str, rank: int) -> float:
        from peft.utils.other import get_pattern_key

        alpha = self.patterns.get(get_pattern_key(self.patterns, name), self.alpha)
        return 1.0 if alpha is None else alpha / (rank**0.5 if self.rslora else rank)


def _finite(alpha: Any) -> float:
    """Raises: ValueError when an alpha is not a finite number."""
    value = float(alpha)
    if not math.isfinite(value):
        raise ValueError(f"an alpha is {value}")
    return value


def spellings(network: Any, prefix: str = "unet") -> dict[str, str]:
    """A network's modules by each of the names that LoRA files have for them."""
    own = re.compile(r"\.(base_layer|lora_\w+)(\.|$)")  # of peft's layers
    names = [n for n, m in network.named_modules() if getattr(m, "weight", None) is not None and not own.search(n)]
    table = {name: name for name in names} | {kohya_base(name, prefix): name for name in names}
    if isinstance(layers := network.config.get("layers_per_block"), int):
        table |= {kohya_base(original_name(name, layers), prefix): name for name in names}
    return table | {name.removesuffix(".0"): name for name in names if name.endswith(".to_out.0")}


def kohya_base(name: str, prefix: str) -> str:
    """How kohya's trainer begins the keys of a module."""
    return f"lora_{prefix}_{name.replace('.', '_')}"


def original_name(name: str, layers: int) -> str:
    """What an attention block's module is called in the original layout, as in kohya's files for Stable Diffusion XL.

    Any other module's name is as in diffusers: those files have none of them.
    """
    match = re.fullmatch(r"(down|mid|up)_block(?:s\.(\d+))?\.attentions\.(\d+)\.(.+)", name)
    if not match:
        return name
    side, block, layer, rest = match.groups()
    if side == "mid":
        return f"middle_block.1.{rest}"
    place = int(block) * (layers + 1) + int(layer)
    return f"input_blocks.{place + 1}.1.{rest}" if side == "down" else f"output_blocks.{place}.1.{rest}"


def _module(base: str, modules: Mapping[str, str], path: Path, prefix: str) -> str:
    plain = base.removeprefix("base_model.model.").removeprefix(f"{prefix}.").replace(".processor.", ".")
    if plain not in modules:
        _refuse(path, f"was made for another model: this network has no module {base}")
    return modules[plain]


def _check_kind(path: Path, keys: Iterable[str]) -> None:
    """Raises: UsageError when there is a key that no plain LoRA has."""
    for pattern, what in OTHERS.items():
        if one := next((key for key in keys if re.match(pattern, key)), None):
            _refuse(path, f"{what}: see {one}")
    unknown = [key for key in keys if not any(p.fullmatch(key) for p in (DOWN, UP, ALPHA))]
    if unknown or not keys:
        _refuse(path, f"is not a LoRA: its keys are like {min(unknown, default='nothing')}")


def _check_network(path: Path, keys: Iterable[str], prefix: str) -> None:
    """Raises: UsageError when there is a key of another kind of network."""
    for pattern, what in FOREIGN[prefix].items():
        if one := next((key for key in keys if re.match(pattern, key)), None):
            _refuse(path, f"{what}: see {one}")


def _fits(down: Tensor, up: Tensor) -> bool:
    return down.dim() >= 2 and up.dim() >= 2 and 0 < len(down) == up.flatten(1).shape[1] and down.numel() > 0


def _check_shape(path: Path, name: str, module: Any, factors: Factors) -> None:
    outputs, *rest = shape_of(module.weight)
    inputs = math.prod(rest)
    made = factors.down.shape[1], len(factors.up)
    if made != (inputs, outputs):
        there, here = (f"{one} to {other}" for one, other in (made, (inputs, outputs)))
        _refuse(path, f"was made for another model: {name} maps {there} features there, {here} here")


def fit(factors: Factors, rank: int) -> Factors | None:
    """The same product in factors of at most `rank`, by SVD where there are more; None when it has a higher rank."""
    if len(factors.down) <= rank:
        return factors
    left, upper = torch.linalg.qr(factors.up.double())
    right, lower = torch.linalg.qr(factors.down.double().T)
    u, s, v = torch.linalg.svd(upper @ lower.T)
    if s[rank:].norm() > 1e-6 * s.norm():
        return None
    root = s[:rank].sqrt()
    return Factors((root[:, None] * v[:rank] @ right.T).float(), (left @ u[:, :rank] * root).float())


def rank_of(path: Path) -> int:
    """The largest rank of a module in a LoRA file."""
    state = load_tensors(path, "LoRA")
    _check_kind(path, state)
    ranks = [len(value) for key, value in state.items() if DOWN.fullmatch(key) and value.dim() >= 2 and value.numel()]
    return max(ranks) if ranks else _refuse(path, "is not whole: it has no down weights")


def _rank(layer: Any) -> int:
    (adapter,) = layer.lora_A
    return layer.r[adapter]


def _fill(layer: Any, factors: Factors | None) -> None:
    """Put the factors into a layer; what they leave of its rank has `up` 0, and keeps `down` so that it can learn."""
    (adapter,) = layer.lora_A
    down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    up.zero_()
    if factors is None:
        return
    rank = len(factors.down)
    down[:rank] = factors.down.to(down).view(rank, *down.shape[1:])
    up[:, :rank] = (factors.up / layer.scaling[adapter]).to(up).view(len(up), rank, *up.shape[2:])


def _refuse(path: Path, what: str) -> NoReturn:
    raise UsageError(f"the LoRA {path} {what}")
