"""How well an image fits its prompt, by CLIP (Radford et al. 2021)."""

import condrl
from condrl.rewards.clip import ClipReward, Precision, shared_clip


@condrl.reward(name="clip")
class CLIPScore(ClipReward):
    """Cosine of the CLIP embeddings of image and prompt, in [-1, 1]; differentiable (Radford et al. 2021)."""

    def __init__(
        self,
        *,
        model: str = "ViT-L-14-quickgelu",  # of open_clip, hf-hub:OWNER/NAME, a folder, or asset:shapes_clip
        weights: str = "openai",  # a tag of open_clip, or a file
        config: str | None = None,  # a JSON file with another architecture, instead of `model`
        sha256: str | None = None,  # that a file has to have
        dtype: Precision = "float32",  # of its weights
        offload: bool = False,  # keep the model off the device between roll-outs
    ) -> None:
        self.clip, self.offloads = shared_clip(model, weights, config, sha256, dtype), offload
