"""How beautiful people would find an image, by LAION's predictor on CLIP."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

import condrl
from condrl.io.files import load_tensors, load_torch
from condrl.io.hub import hub_file
from condrl.rewards.clip import ClipReward, Precision, affine, check_same, shared_clip

HEAD = "aesthetic-model.pth"


@condrl.reward
class Aesthetic(ClipReward):
    """LAION's aesthetic score of the image alone, about 1 to 10, differentiable (Schuhmann et al. 2022).

    Its head has no activations (dropout aside), so it is one affine function of the CLIP ViT-L/14 embedding.
    """

    def __init__(
        self,
        *,
        head: str = "trl-lib/ddpo-aesthetic-predictor",  # a hub repository with the head, or its file
        head_sha256: str | None = None,  # that the head's file has to have
        model: str = "ViT-L-14-quickgelu",  # of open_clip
        weights: str = "openai",  # a tag of open_clip, or a file
        config: str | None = None,  # a JSON file with another architecture, instead of `model`
        sha256: str | None = None,  # that the weights' file has to have
        dtype: Precision = "float32",  # of its weights
        offload: bool = False,  # keep the model off the device between roll-outs
    ) -> None:
        option = "rewards.aesthetic.head"
        file = Path(hub_file(head, HEAD, option))
        check_same(file, head_sha256, option)
        layers = (load_tensors if file.suffix == ".safetensors" else load_torch)(file, f"config {option}")
        try:
            self.weight, self.bias = affine(layers)
        except (RuntimeError, ValueError, AttributeError) as error:
            raise condrl.UsageError(f"config {option}: {file} is not an aesthetic head: {error}") from error
        self.clip, self.offloads = shared_clip(model, weights, config, sha256, dtype), offload

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        found = self.clip.images(samples)
        return found @ self.weight.to(found) + self.bias.to(found)

    def load(self) -> None:
        _ = self.clip.model  # it reads no prompt
