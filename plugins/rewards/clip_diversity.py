"""How much the images of a prompt differ in what they show."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

import condrl
from condrl.rewards.clip import ClipReward


@condrl.reward(per="group")
@dataclass(kw_only=True)
class ClipDiversity(ClipReward):
    """1 - the mean cosine of an image's CLIP embedding with those of its prompt's others, in [0, 2]; differentiable.

    Raises: UsageError for a single image, which has no others.
    """

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        if len(samples) == 1:
            raise condrl.UsageError(
                "the reward clip_diversity compares the images of a prompt: set train.images_per_prompt and "
                "evaluate.images_per_prompt to at least 2"
            )
        embeddings = self.clip.images(samples)
        return (len(samples) - (embeddings @ embeddings.T).sum(1)) / (len(samples) - 1)
