"""condrl: fine-tune text-conditioned diffusion models with rewards; the score is the action."""

from condrl.errors import RunError, UsageError
from condrl.registry import algorithm, model, reward, sampler

__version__ = "0.1.0"
__all__ = ["RunError", "UsageError", "algorithm", "model", "reward", "sampler"]
