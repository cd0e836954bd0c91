"""Human preference, by ImageReward (Xu et al. 2023)."""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import condrl
from condrl.io.hub import fetching, folder_or_id, hub_file
from condrl.rewards.clip import NetworkReward, affine, check_same, fitted, read_weights

FILE, OPTION = "ImageReward.pt", "rewards.image_reward.weights"
TOKENS = 35
HEAD = 64  # width of an attention head, of image and text alike
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of the pixels, as CLIP's
SCORE_MEAN, SCORE_STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores, over the authors' data
ENCODERS = ("visual_encoder.", "text_encoder.")
NAMES = {  # parts of transformers' names and what the published file has instead, replaced in this order
    "visual_encoder.embeddings.class_embedding": "visual_encoder.cls_token",
    "visual_encoder.embeddings.position_embedding": "visual_encoder.pos_embed",
    "visual_encoder.embeddings.patch_embedding": "visual_encoder.patch_embed.proj",
    "encoder.layers": "blocks",
    "self_attn.projection": "attn.proj",
    "self_attn": "attn",
    "post_layernorm": "norm",
    "layer_norm": "norm",
}


class Network(nn.Module):
    """A BLIP whose text encoder sees the image (Li et al. 2022), and an affine head on the text's first token.

    Its sizes are those of the weights, which have the names of the published file.

    Raises: ValueError naming the first weights that are missing, unknown or of another shape.
    """

    def __init__(self, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        from transformers import BlipTextModel, BlipVisionModel

        super().__init__()
        vision, text = configs(state)
        with torch.device("meta"):  # the weights are assigned, so that none are drawn or held twice
            self.visual_encoder = BlipVisionModel(vision)
            self.text_encoder = BlipTextModel(text, add_pooling_layer=False)
        self.load_state_dict(renamed(state, self.state_dict(), dtype), assign=True)
        self.text_encoder.embeddings.position_ids = torch.arange(TOKENS)[None]  # no weights, so still on meta
        self.weight, self.bias = affine({name: value for name, value in state.items() if name.startswith("mlp.")})
        self.size = vision.image_size  # of an image's side, in pixels
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Raw scores (B,) float32 of pixels (B, 3, size, size) and tokens (B, T); `mask` (B, T) is 0 for padding."""
        seen = self.visual_encoder(pixels).last_hidden_state
        text = self.text_encoder(input_ids=tokens, attention_mask=mask, encoder_hidden_states=seen)
        first = text.last_hidden_state[:, 0].float()
        return first @ self.weight.to(first) + self.bias.to(first)


def configs(state: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """The BlipVisionConfig and the BlipTextConfig of a file's encoders.

    Raises: ValueError when weights that tell their sizes are missing.
    """
    from transformers import BlipTextConfig, BlipVisionConfig

    width, _, patch, _ = shape(state, "visual_encoder.patch_embed.proj.weight")
    side = patch * math.isqrt(shape(state, "visual_encoder.pos_embed")[1] - 1)
    words, text_width = shape(state, "text_encoder.embeddings.word_embeddings.weight")
    positions = shape(state, "text_encoder.embeddings.position_embeddings.weight")[0]
    vision = layers(state, "visual_encoder.blocks", width)
    text = layers(state, "text_encoder.encoder.layer", text_width)
    return (
        BlipVisionConfig(**vision, image_size=side, patch_size=patch, layer_norm_eps=1e-6),
        BlipTextConfig(**text, encoder_hidden_size=width, vocab_size=words, max_position_embeddings=positions),
    )


def layers(state: Mapping[str, Tensor], stem: str, width: int) -> dict[str, int]:
    """The options of a config that say how many layers `{stem}.N` there are, and their sizes."""
    depth = len({found[1] for name in state if (found := re.match(rf"{re.escape(stem)}\.(\d+)\.", name))})
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // HEAD}
    return {**sizes, "num_hidden_layers": depth}


def shape(state: Mapping[str, Tensor], name: str) -> torch.Size:
    """Raises: ValueError when there are no such weights."""
    if name not in state:
        raise ValueError(f"it has no weights {name}")
    return state[name].shape


def renamed(state: Mapping[str, Tensor], own: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of a published file under the names of a network's `own`, in its dtype.

    Raises: ValueError as `Network` does.
    """
    published = {name: functools.reduce(lambda n, pair: n.replace(*pair), NAMES.items(), name) for name in own}
    for name, theirs in published.items():
        if (found := shape(state, theirs)) != own[name].shape:
            raise ValueError(f"its {theirs} has shape {tuple(found)}, not {tuple(own[name].shape)}")
    encoders = {name for name, value in state.items() if name.startswith(ENCODERS) and value.is_floating_point()}
    if unknown := encoders - set(published.values()):
        raise ValueError(f"no part of ImageReward is called {min(unknown)}")
    return {name: state[theirs].to(dtype) for name, theirs in published.items()}


@condrl.reward
@dataclass(kw_only=True)
class ImageReward(NetworkReward):
    """ImageReward, about -2 to 2: a BLIP tuned on people's rankings of images for a prompt (Xu et al. 2023)."""

    weights: str = "THUDM/ImageReward"  # a hub repository with the published file, or a file
    tokenizer: str = "google-bert/bert-base-uncased"  # a hub id, or a folder
    sha256: str | None = None  # expected of the weights' file

    def __post_init__(self) -> None:
        super().__post_init__()
        self.file = Path(hub_file(self.weights, FILE, OPTION))
        check_same(self.file, self.sha256, OPTION)
        self.tokenizer = folder_or_id(self.tokenizer, "rewards.image_reward.tokenizer")

    @property
    def network(self) -> Network:
        return load(self.file, getattr(torch, self.dtype))

    @functools.cached_property
    def tokenize(self) -> Any:
        from transformers import BertTokenizer

        with fetching("rewards.image_reward.tokenizer", self.tokenizer):
            return BertTokenizer.from_pretrained(self.tokenizer, trust_remote_code=False)

    def load(self) -> None:
        _ = self.network, self.tokenize

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        network = self.network.to(samples.device)
        fill = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
        text = self.tokenize(list(prompts), **fill).to(samples.device)
        pixels = fitted(samples, network.size, MEAN, STD)
        return (network(pixels, text.input_ids, text.attention_mask) - SCORE_MEAN) / SCORE_STD


@functools.cache
def load(file: Path, dtype: torch.dtype) -> Network:
    """The network of a published file; rewards that ask for the same one share it.

    Raises: UsageError when the file cannot be read, or does not have the weights of ImageReward.
    """
    state = {name.removeprefix("blip."): value for name, value in read_weights(file, OPTION).items()}
    try:
        return Network(state, dtype)
    except (RuntimeError, ValueError, IndexError, AttributeError) as error:
        raise condrl.UsageError(f"config {OPTION}: {file} is not an ImageReward file: {error}") from error
