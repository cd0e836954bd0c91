"""How beautiful people would find an image, by LAION's predictor on CLIP."""

import pickle
from collections.abc import Sequence

import torch
from torch import Tensor

import condrl
from condrl.clip import ClipReward, Precision, affine, check_file, shared_clip
from condrl.config import locate
from condrl.hub import hub_file

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
        file = locate(hub_file(head, HEAD, "rewards.aesthetic.head"))
        check_file(file, head_sha256, "rewards.aesthetic.head")
        try:
            self.weight, self.bias = affine(torch.load(file, map_location="cpu", weights_only=True))
        except (OSError, RuntimeError, ValueError, AttributeError, pickle.UnpicklingError) as error:
            raise condrl.UsageError(f"config rewards.aesthetic.head: {file} is no aesthetic head") from error
        self.clip, self.offload = shared_clip(model, weights, config, sha256, dtype), offload

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        found = self.clip.images(samples)
        return found @ self.weight.to(found) + self.bias.to(found)
