"""Human preference, by ImageReward (Xu et al. 2023)."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import condrl
from condrl.io.files import load_torch
from condrl.io.hub import fetching, folder_or_id, hub_file
from condrl.rewards.clip import Precision, affine, check_same, fitted

FILE = "ImageReward.pt"
TOKENS = 35
HEAD = 64  # width of an attention head, of image and text alike
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of the pixels, as CLIP's
SCORE_MEAN, SCORE_STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores, over the authors' data


class Blip:
    """A BLIP that reads an image and a text into one vector (Li et al. 2022), with the published names of its weights.

    Its sizes are those of the weights. Raises: ValueError naming the first weights that are missing.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = dict(weights)
        self.depth, self.layers = (
            next(n for n in range(1000) if f"{stem}.{n}.{end}" not in weights)
            for stem, end in (
                ("visual_encoder.blocks", "norm1.weight"),
                ("text_encoder.encoder.layer", "output.dense.weight"),
            )
        )
        with torch.no_grad():
            blank = torch.zeros(1, 3, self.size, self.size, dtype=self.weight("visual_encoder.cls_token").dtype)
            self.features(blank, torch.zeros(1, 1, dtype=torch.long))

    @property
    def size(self) -> int:
        """Pixels of an image's side."""
        patches = self.weight("visual_encoder.pos_embed").shape[1] - 1
        return round(patches**0.5) * self.weight("visual_encoder.patch_embed.proj.weight").shape[-1]

    def to(self, device: torch.device | str) -> None:
        self.weights = {name: value.to(device) for name, value in self.weights.items()}

    def weight(self, name: str) -> Tensor:
        if name not in self.weights:
            raise ValueError(f"it has no weights {name}")
        return self.weights[name]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return nn.functional.linear(x, self.weight(f"{name}.weight"), self.weight(f"{name}.bias"))

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        weight, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return nn.functional.layer_norm(x, weight.shape, weight, bias, eps)

    def images(self, x: Tensor) -> Tensor:
        """Of pixels (B, 3, size, size), one vector per patch and one for all, (B, 1 + patches, F)."""
        stem = "visual_encoder"
        kernel, bias = (self.weight(f"{stem}.patch_embed.proj.{part}") for part in ("weight", "bias"))
        x = nn.functional.conv2d(x, kernel, bias, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
        x = torch.cat([self.weight(f"{stem}.cls_token").expand(len(x), -1, -1), x], 1)
        x = x + self.weight(f"{stem}.pos_embed")
        for block in (f"{stem}.blocks.{n}" for n in range(self.depth)):
            q, k, v = self.linear(self.norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, -1)
            x = x + self.linear(attention(q, k, v), f"{block}.attn.proj")
            inner = nn.functional.gelu(self.linear(self.norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1"))
            x = x + self.linear(inner, f"{block}.mlp.fc2")
        return self.norm(x, f"{stem}.norm", 1e-6)

    def features(self, pixels: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """The vectors (B, F) of a text's first token, that has seen the image.

        `pixels` (B, 3, size, size), `tokens` (B, T); `mask` (B, T) is 1 for what is not padding.
        """
        seen, stem = self.images(pixels), "text_encoder.embeddings"
        x = nn.functional.embedding(tokens, self.weight(f"{stem}.word_embeddings.weight"))
        x = self.norm(
            x + self.weight(f"{stem}.position_embeddings.weight")[: tokens.shape[1]], f"{stem}.LayerNorm", 1e-12
        )
        kept = None if mask is None else mask.bool()[:, None, None]
        for layer in (f"text_encoder.encoder.layer.{n}" for n in range(self.layers)):
            for part, other, allowed in (("attention", None, kept), ("crossattention", seen, None)):
                source = x if other is None else other
                q = self.linear(x, f"{layer}.{part}.self.query")
                k, v = (self.linear(source, f"{layer}.{part}.self.{name}") for name in ("key", "value"))
                new = self.linear(attention(q, k, v, allowed), f"{layer}.{part}.output.dense")
                x = self.norm(x + new, f"{layer}.{part}.output.LayerNorm", 1e-12)
            inner = nn.functional.gelu(self.linear(x, f"{layer}.intermediate.dense"))
            x = self.norm(x + self.linear(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm", 1e-12)
        return x[:, 0]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Of queries (B, T, F) to keys and values (B, S, F), by heads; `mask` broadcasts over (B, heads, T, S)."""
    q, k, v = (part.unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


@condrl.reward
class ImageReward:
    """ImageReward, about -2 to 2: a BLIP tuned on people's rankings of images for a prompt (Xu et al. 2023)."""

    def __init__(
        self,
        *,
        weights: str = "THUDM/ImageReward",  # a hub repository with the published file, or a file
        tokenizer: str = "google-bert/bert-base-uncased",  # a hub id, or a folder
        sha256: str | None = None,  # that the weights' file has to have
        dtype: Precision = "float32",  # of its weights
        offload: bool = False,  # keep the model off the device between roll-outs
    ) -> None:
        self.file = Path(hub_file(weights, FILE, "rewards.image_reward.weights"))
        check_same(self.file, sha256, "rewards.image_reward.weights")
        self.source = folder_or_id(tokenizer, "rewards.image_reward.tokenizer")
        self.dtype, self.offloads = getattr(torch, dtype), offload

    @functools.cached_property
    def tokenizer(self) -> Any:
        from transformers import BertTokenizer

        with fetching("rewards.image_reward.tokenizer", self.source):
            return BertTokenizer.from_pretrained(self.source, trust_remote_code=False)

    @property
    def model(self) -> tuple[Blip, Tensor, Tensor]:
        """The frozen model and its affine head, loaded when they are first used."""
        return load(self.file, self.dtype)

    def load(self) -> None:
        _ = self.model, self.tokenizer

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        blip, weight, bias = self.model
        blip.to(samples.device)
        fill = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
        text = self.tokenizer(list(prompts), **fill).to(samples.device)
        pixels = fitted(samples, blip.size, MEAN, STD).to(self.dtype)
        found = blip.features(pixels, text.input_ids, text.attention_mask).float()
        return (found @ weight.to(found) + bias.to(found) - SCORE_MEAN) / SCORE_STD

    def offload(self) -> None:
        if self.offloads:
            self.model[0].to("cpu")


@functools.cache
def load(file: Path, dtype: torch.dtype) -> tuple[Blip, Tensor, Tensor]:
    """A published file's BLIP, and its head as one affine function; rewards that ask for the same one share it.

    Raises: UsageError when the file is none, or lacks weights.
    """
    what = "config rewards.image_reward.weights"
    state = load_torch(file, what)
    blip = {
        name[5:]: value.to(dtype)
        for name, value in state.items()
        if name.startswith("blip.") and value.is_floating_point()
    }
    try:
        head = affine({name: value for name, value in state.items() if name.startswith("mlp.")})
        return Blip(blip), *head
    except (RuntimeError, ValueError, IndexError) as error:
        raise condrl.UsageError(f"{what}: {file} is not an ImageReward file: {error}") from error
