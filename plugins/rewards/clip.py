"""How well an image fits its prompt, by CLIP (Radford et al. 2021)."""

import condrl
from condrl.rewards.clip import ClipReward


@condrl.reward(name="clip")
class CLIPScore(ClipReward):
    """Cosine of the CLIP embeddings of image and prompt, in [-1, 1]; differentiable (Radford et al. 2021)."""
