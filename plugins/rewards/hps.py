"""Human preference, by HPS v2 and v2.1 (Wu et al. 2023)."""

from dataclasses import dataclass

import condrl
from condrl.io.hub import hub_file
from condrl.rewards.clip import ClipReward

FILES = {"v2": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


@condrl.reward
@dataclass(kw_only=True)
class HPS(ClipReward):
    """HPS v2 or v2.1: the cosine of a CLIP tuned on preferences; the versions do not compare (Wu et al. 2023)."""

    version: str = "v2.1"  # v2 or v2.1
    weights: str = "xswu/HPSv2"  # a hub repository with the published files, or a file
    model: str = "ViT-H-14"  # of open_clip

    def __post_init__(self) -> None:
        if self.version not in FILES:
            raise condrl.UsageError(f"config rewards.hps.version: {self.version!r} is not one of {', '.join(FILES)}")
        self.weights = hub_file(self.weights, FILES[self.version], "rewards.hps.weights")
        super().__post_init__()
