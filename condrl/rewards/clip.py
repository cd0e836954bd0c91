"""What rewards with a network share; CLIP: images to embeddings with gradients, prompts to cached embeddings."""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from condrl.errors import UsageError
from condrl.io.files import load_tensors, load_torch, locate, sha256_of
from condrl.io.hub import WEIGHTS, check_file, fetching, folder_or_id
from condrl.io.records import from_json
from condrl.models.embeddings import Embeddings, Encoded
from condrl.registry import suggestion

Precision = Literal["float32", "bfloat16", "float16"]
OPENAI = "openai"
HUB = "hf-hub:"
TOKENIZER_OPTIONS = ("clean", "strip_sep_token", "language", "additional_special_tokens", "reduction_mask")


def fitted(samples: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] as a CLIP expects them, (B, 3, size, size); differentiable.

    The shorter side is resized, with bicubic antialiasing, and the middle is cut out, as the reference processors do.
    """
    height, width = samples.shape[2:]
    scale = size / min(height, width)
    shape = [max(size, round(side * scale)) for side in (height, width)]
    x = nn.functional.interpolate(samples.float(), shape, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = ((side - size) // 2 for side in shape)
    x = x[:, :, top : top + size, left : left + size]
    centre, spread = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in (mean, std))
    return (x - centre) / spread


def check_same(path: Path, sha256: str | None, option: str) -> None:
    """Raises: UsageError naming the option when there is no such file, or when its sha256 differs."""
    check_file(path, option)
    if sha256:
        found = sha256_of(path)
        if found != sha256.lower():
            raise UsageError(f"config {option}: {path} has sha256 {found}, not {sha256}")


class Clip:
    """An open_clip model that is loaded when it is first used, on the device of what it is given."""

    def __init__(self, model: str, weights: str, config: str | None, sha256: str | None, dtype: Precision) -> None:
        import open_clip

        self.dtype = dtype
        self._texts = Embeddings(self._encoded)
        self.name, self.weights, self.config = model, None, config  # weights: None when `name` brings them
        if whole_model(model):
            if (weights, config, sha256) != (OPENAI, None, None):
                raise UsageError(
                    f"config rewards.*.model: {model} has weights of its own: give neither weights nor a config"
                )
            self.name = model if model.startswith(HUB) else f"local-dir:{folder_or_id(model, 'rewards.*.model')}"
            return
        if config:
            self.name = add_architecture(locate(config))
        elif model not in open_clip.list_models():
            near = suggestion(model, open_clip.list_models())
            raise UsageError(
                f"config rewards.*.model: open_clip has no model {model!r}, and there is no such folder.{near}"
            )
        if weights.endswith(WEIGHTS) or weights.startswith("asset:") or locate(weights).is_file():
            self.weights = str(locate(weights))
            check_same(Path(self.weights), sha256, "rewards.*.weights")
        elif weights not in (tags := open_clip.list_pretrained_tags_by_model(self.name)):
            raise UsageError(
                f"config rewards.*.weights: open_clip has no weights {weights!r} for {model}: give a file, or one of "
                f"{tags}"
            )
        else:
            self.weights = weights

    @functools.cached_property
    def model(self) -> Any:
        """The frozen model.

        Raises: UsageError when its weights cannot be loaded.
        """
        import open_clip

        precision = {"float32": "fp32", "bfloat16": "pure_bf16", "float16": "pure_fp16"}[self.dtype]
        with self.loading():
            model = open_clip.create_model(
                self.name,
                pretrained=self.weights,
                precision=precision,
                weights_only=True,
                require_pretrained=True,  # else weights that cannot be found are random
            )
        return model.eval().requires_grad_(False)

    @functools.cached_property
    def tokenizer(self) -> Any:
        import open_clip

        with self.loading():
            text: dict[str, Any] = open_clip.get_model_config(self.name)["text_cfg"]
            own = {"trust_remote_code": False} if text.get("hf_tokenizer_name") else {}
            return open_clip.get_tokenizer(self.name, **own)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Within it, open_clip knows the architecture and logs nothing, and its errors become one line.

        Raises: UsageError.
        """
        import open_clip

        if self.config:
            add_architecture(locate(self.config))  # again: another file of that name may have replaced it
        own = self.weights is not None and Path(self.weights).is_file()
        local = own and "hf_" not in json.dumps(open_clip.get_model_config(self.name))  # names of parts from the hub
        before, logging.root.manager.disable = logging.root.manager.disable, logging.CRITICAL
        try:
            with fetching(f"rewards.*.{'weights' if self.weights else 'model'}", self.source, local):
                check_architecture(open_clip.get_model_config(self.name), self.origin)
                yield
        except UsageError:
            if own:
                read_weights(Path(self.source), "rewards.*.weights")  # says more than open_clip does
            raise
        finally:
            logging.root.manager.disable = before

    @property
    def source(self) -> str:
        """Where the weights come from."""
        if self.weights is None:
            return self.name.removeprefix("local-dir:")
        return self.weights if Path(self.weights).is_file() else f"the weights {self.weights!r} of {self.name}"

    @property
    def origin(self) -> str:
        """Where the architecture comes from."""
        return self.config or (f"{self.source}/open_clip_config.json" if self.weights is None else self.name)

    def load(self) -> None:
        """Load the model and the tokenizer now.

        Raises: UsageError when they cannot be loaded.
        """
        _ = self.model, self.tokenizer

    def images(self, samples: Tensor) -> Tensor:
        """Unit embeddings (B, F) float32 of images (B, 3, H, W) in [0, 1]; differentiable."""
        model = self.model.to(samples.device)
        settings = model.visual.preprocess_cfg
        size = settings["size"] if isinstance(settings["size"], int) else settings["size"][0]
        x = fitted(samples, size, settings["mean"], settings["std"])
        return nn.functional.normalize(model.encode_image(x.to(getattr(torch, self.dtype))).float(), dim=-1)

    def texts(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """Unit embeddings (B, F) float32 of prompts."""
        self.model.to(device)
        return self._texts(prompts)[0].to(device)

    @torch.no_grad()
    def _encoded(self, prompts: Sequence[str]) -> Iterator[Encoded]:
        device = next(self.model.parameters()).device
        for prompt in prompts:
            (embedding,) = self.model.encode_text(self.tokenizer([prompt]).to(device))
            yield (nn.functional.normalize(embedding.float(), dim=-1),)

    def cosine(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        """Of the embeddings of images (B, 3, H, W) and their prompts, (B,); differentiable."""
        return (self.images(samples) * self.texts(prompts, samples.device)).sum(1)


@dataclass(kw_only=True)
class NetworkReward:
    """The options of rewards with a network, which may leave the device between roll-outs."""

    dtype: Precision = "float32"  # of its weights
    offload: bool = False  # keep the model off the device between roll-outs

    def __post_init__(self) -> None:
        vars(self)["offload"] = self.leave_device if self.offload else lambda: None  # it is called by that name

    @property
    def network(self) -> Any:
        """The frozen network, loaded when it is first used."""
        raise NotImplementedError

    def leave_device(self) -> None:
        self.network.to("cpu")


@dataclass(kw_only=True)
class ClipReward(NetworkReward):
    """The options of rewards with a Clip, and the cosine of image and prompt as the score."""

    model: str = "ViT-L-14-quickgelu"  # of open_clip, hf-hub:OWNER/NAME, a folder, or asset:shapes_clip
    weights: str = OPENAI  # a tag of open_clip, or a file
    config: str | None = None  # a JSON file with another architecture, instead of `model`
    sha256: str | None = None  # expected of the weights' file

    def __post_init__(self) -> None:
        super().__post_init__()
        self.clip = shared_clip(self.model, self.weights, self.config, self.sha256, self.dtype)

    @property
    def network(self) -> Any:
        return self.clip.model

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.clip.cosine(samples, prompts)

    def load(self) -> None:
        self.clip.load()


def read_weights(path: Path, option: str) -> dict[str, Any]:
    """The named weights in a file, of safetensors by its ending or of torch.save.

    Raises: UsageError naming the option when it holds none.
    """
    return (load_tensors if path.suffix == ".safetensors" else load_torch)(path, f"config {option}")


def affine(layers: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Weights (F,) and bias () of linear layers without activations, by names `...layers.N.weight` and `.bias`.

    Raises: ValueError when there are no such layers, or when other weights are among them.
    """
    steps: dict[int, dict[str, Tensor]] = {}
    for name, value in layers.items():
        found = re.fullmatch(r"(?:.*\.)?layers\.(\d+)\.(weight|bias)", name)
        if not found:
            raise ValueError(f"{name} does not belong to a linear layer")
        steps.setdefault(int(found[1]), {})[found[2]] = value.double()
    if any(len(step) < 2 for step in steps.values()) or not steps:
        raise ValueError("expected linear layers, each with weight and bias")
    first, *rest = (steps[number] for number in sorted(steps))
    weight, bias = first["weight"], first["bias"]
    for step in rest:
        weight, bias = step["weight"] @ weight, step["weight"] @ bias + step["bias"]
    return weight[0].float(), bias[0].float()


@functools.cache
def shared_clip(
    model: str, weights: str, config: str | None = None, sha256: str | None = None, dtype: Precision = "float32"
) -> Clip:
    """A Clip; rewards that ask for the same one share it.

    Raises: UsageError when open_clip does not know the model or the weights, or when a file is missing or has another
    sha256.
    """
    return Clip(model, weights, config, sha256, dtype)


def whole_model(model: str) -> bool:
    """Whether a name stands for architecture and weights: a hub repository, or a folder as open_clip saves one."""
    return model.startswith(HUB) or (locate(model) / "open_clip_config.json").is_file()


def add_architecture(path: Path) -> str:
    """Register an architecture with open_clip, from a JSON file in its format; returns its name.

    Raises: UsageError when the file is missing or describes no architecture.
    """
    import open_clip

    check_file(path, "rewards.*.config")
    content = from_json(path.read_text("utf-8")) if path.suffix == ".json" else None
    if not isinstance(content, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= content.keys():
        raise UsageError(
            f"config rewards.*.config: {path} is not an architecture of open_clip: embed_dim, vision_cfg, text_cfg"
        )
    open_clip.add_model_config(path)
    return path.stem


def check_architecture(config: Any, origin: str) -> None:
    """Check an architecture of open_clip for settings by which it would run or fetch code.

    Raises: UsageError naming the file and the setting.
    """
    text, vision = (config.get(part) if isinstance(config, dict) else None for part in ("text_cfg", "vision_cfg"))
    if not isinstance(text, dict) or not isinstance(vision, dict):
        raise UsageError(f"config rewards.*.model: {origin} has no sections text_cfg and vision_cfg")

    def refuse(setting: str, why: str) -> NoReturn:
        raise UsageError(f"config rewards.*.model: {origin} sets {setting}, {why}: use another model")

    unknown = [name for name in text.get("tokenizer_kwargs") or () if name not in TOKENIZER_OPTIONS]
    if unknown:
        refuse(f"text_cfg.tokenizer_kwargs.{unknown[0]}", f"and only {', '.join(TOKENIZER_OPTIONS)} cannot run code")
    if not re.fullmatch(r"[\w.-]*", str(vision.get("timm_model_name") or "")):
        refuse(f"vision_cfg.timm_model_name={vision['timm_model_name']!r}", "which is not one of timm's own models")
    if tower := text.get("hf_model_name"):
        from transformers import PretrainedConfig

        if "auto_map" in PretrainedConfig.get_config_dict(tower)[0]:
            refuse(f"text_cfg.hf_model_name={tower!r}", "whose config.json names code (auto_map)")
