"""Human preference, by HPS v2 and v2.1 (Wu et al. 2023)."""

import condrl
from condrl.io.hub import hub_file
from condrl.rewards.clip import ClipReward, Precision, shared_clip

FILES = {"v2": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


@condrl.reward
class HPS(ClipReward):
    """HPS v2 or v2.1: the cosine of a CLIP tuned on preferences; the versions do not compare (Wu et al. 2023)."""

    def __init__(
        self,
        *,
        version: str = "v2.1",  # v2 or v2.1
        weights: str = "xswu/HPSv2",  # a hub repository with the published files, or a file
        model: str = "ViT-H-14",  # of open_clip
        config: str | None = None,  # a JSON file with another architecture, instead of `model`
        sha256: str | None = None,  # that the file has to have
        dtype: Precision = "float32",  # of its weights
        offload: bool = False,  # keep the model off the device between roll-outs
    ) -> None:
        if version not in FILES:
            raise condrl.UsageError(f"config rewards.hps.version: {version!r} is not one of {', '.join(FILES)}")
        file = hub_file(weights, FILES[version], "rewards.hps.weights")
        self.clip, self.offloads = shared_clip(model, file, config, sha256, dtype), offload
