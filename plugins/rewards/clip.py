"""How well an image fits its prompt, by CLIP (Radford et al. 2021)."""

from collections.abc import Sequence

from torch import Tensor

import condrl
from condrl.clip import Precision, shared_clip


@condrl.reward(name="clip")
class CLIPScore:
    """Cosine of the CLIP embeddings of image and prompt, in [-1, 1]; differentiable (Radford et al. 2021)."""

    def __init__(
        self,
        *,
        model: str = "ViT-L-14-quickgelu",  # of open_clip, or hf-hub:OWNER/NAME
        weights: str = "openai",  # a tag of open_clip, or a file
        config: str | None = None,  # a JSON file with another architecture, instead of `model`
        sha256: str | None = None,  # that a file has to have
        dtype: Precision = "float32",  # of its weights
        offload: bool = False,  # keep the model off the device between roll-outs
    ) -> None:
        self.clip, self.offload = shared_clip(model, weights, config, sha256, dtype), offload

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        return (self.clip.images(samples) * self.clip.texts(prompts, samples.device)).sum(1)

    def rest(self) -> None:
        if self.offload:
            self.clip.rest()
