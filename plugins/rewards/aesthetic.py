"""How beautiful people would find an image, by LAION's predictor on CLIP."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import condrl
from condrl.io.hub import hub_file
from condrl.rewards.clip import ClipReward, affine, check_same, read_weights

HEAD = "aesthetic-model.pth"


@condrl.reward
@dataclass(kw_only=True)
class Aesthetic(ClipReward):
    """LAION's aesthetic score of the image alone, about 1 to 10, differentiable (Schuhmann et al. 2022).

    Its head has no activations (dropout aside), so it is one affine function of the CLIP ViT-L/14 embedding.
    """

    head: str = "trl-lib/ddpo-aesthetic-predictor"  # a hub repository with the head, or its file
    head_sha256: str | None = None  # expected of the head's file

    def __post_init__(self) -> None:
        super().__post_init__()
        option = "rewards.aesthetic.head"
        file = Path(hub_file(self.head, HEAD, option))
        check_same(file, self.head_sha256, option)
        layers = read_weights(file, option)
        try:
            self.weight, self.bias = affine(layers)
        except (RuntimeError, ValueError, AttributeError) as error:
            raise condrl.UsageError(f"config {option}: {file} is not an aesthetic head: {error}") from error

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        found = self.clip.images(samples)
        return found @ self.weight.to(found) + self.bias.to(found)

    def load(self) -> None:
        _ = self.network  # it reads no prompt
