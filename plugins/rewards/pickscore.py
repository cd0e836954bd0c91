"""Human preference, by PickScore (Kirstain et al. 2023)."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import condrl
from condrl.io.hub import fetching, folder_or_id
from condrl.models.embeddings import Embeddings, Encoded
from condrl.rewards.clip import NetworkReward, Precision, fitted


@condrl.reward(name="pickscore")
@dataclass(kw_only=True)
class PickScore(NetworkReward):
    """PickScore, about 15 to 25: the scaled cosine of a CLIP-H tuned on choices (Kirstain et al. 2023)."""

    path: str = "yuvalkirstain/PickScore_v1"  # a hub id, or a folder as transformers saves a CLIPModel
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # of the tokenizer and the image settings
    revision: str | None = None  # of the hub id `path`: branch, tag or commit

    def __post_init__(self) -> None:
        super().__post_init__()
        self.path = folder_or_id(self.path, "rewards.pickscore.path")
        self.processor = folder_or_id(self.processor, "rewards.pickscore.processor")
        self._texts = Embeddings(self._encoded)

    @property
    def network(self) -> Any:
        return load(self.path, self.revision, self.dtype)

    @functools.cached_property
    def settings(self) -> tuple[Any, Any]:
        """The tokenizer and the image processor, of which only the numbers are used."""
        from transformers import CLIPImageProcessor, CLIPTokenizer

        with fetching("rewards.pickscore.processor", self.processor):
            tokenizer, images = (
                part.from_pretrained(self.processor, trust_remote_code=False)
                for part in (CLIPTokenizer, CLIPImageProcessor)
            )
        return tokenizer, images

    def load(self) -> None:
        _ = self.network, self.settings

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        model, settings = self.network.to(samples.device), self.settings[1]
        x = fitted(samples, settings.crop_size["height"], settings.image_mean, settings.image_std)
        images = model.get_image_features(pixel_values=x.to(model.dtype)).pooler_output.float()
        cosine = (nn.functional.normalize(images, dim=-1) * self.texts(prompts, samples.device)).sum(1)
        return model.logit_scale.exp().float() * cosine

    def texts(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """Unit embeddings (B, F) of prompts."""
        self.network.to(device)
        return self._texts(prompts)[0].to(device)

    @torch.no_grad()
    def _encoded(self, prompts: Sequence[str]) -> Iterator[Encoded]:
        fill = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        length = self.network.config.text_config.max_position_embeddings
        for prompt in prompts:
            tokens = self.settings[0]([prompt], max_length=length, **fill)
            (embedding,) = self.network.get_text_features(**tokens.to(self.network.device)).pooler_output
            yield (nn.functional.normalize(embedding.float(), dim=-1),)


@functools.cache
def load(path: str, revision: str | None, dtype: Precision) -> Any:
    """A frozen CLIPModel; rewards that ask for the same one share it.

    Raises: UsageError when it cannot be loaded.
    """
    from transformers import CLIPModel

    options = {"revision": revision, "dtype": getattr(torch, dtype), "use_safetensors": True}
    own = {"trust_remote_code": False, "attn_implementation": "sdpa"}  # a config could ask for code from the hub
    with fetching("rewards.pickscore.path", path):
        model: Any
        model, found = CLIPModel.from_pretrained(path, output_loading_info=True, **own, **options)
    if found["missing_keys"]:  # they would be random
        raise condrl.UsageError(f"config rewards.pickscore.path: {path} has no weights {min(found['missing_keys'])}")
    return model.eval().requires_grad_(False)
