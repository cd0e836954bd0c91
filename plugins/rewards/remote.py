"""A reward that is served elsewhere, by `condrl serve`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import condrl
from condrl.prompts import Row
from condrl.rewards.client import Client
from condrl.rewards.wire import MOST_PIXELS, TOKEN, answer_of, pack


@condrl.reward(differentiable=False)
class Remote:
    """The scores of a reward server (`condrl serve`); one that fails is missing, never made up."""

    def __init__(
        self,
        *,
        url: str,  # where the server listens, such as http://127.0.0.1:8200
        timeout: float = 60.0,  # seconds for an answer
        retries: int = 3,  # further attempts, after 1, 2, 4, ... times `backoff`
        backoff: float = 1.0,  # seconds
        per_request: int = 16,  # samples in a request, at most
        concurrent: int = 4,  # requests at a time
    ) -> None:
        if per_request < 1:
            raise condrl.UsageError(f"config rewards.remote.per_request: must be at least 1, got {per_request}")
        self.per_request = per_request
        self.client = Client(url, "rewards.remote.url", TOKEN, timeout, retries, backoff, concurrent)

    @property
    def errors(self) -> Sequence[str]:
        return self.client.errors

    def __call__(self, samples: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        rows = [Row(i, prompt, extra) for i, (prompt, extra) in enumerate(zip(prompts, metadata, strict=True))]
        fitting = MOST_PIXELS // samples[0, 0].numel() if samples.dim() == 4 else len(rows)
        batch = max(1, min(self.per_request, fitting))
        parts = [slice(start, start + batch) for start in range(0, len(rows), batch)]
        counts = [len(rows[part]) for part in parts]
        bodies = [pack(samples[part], rows[part]) for part in parts]
        found = self.client.ask(bodies, [partial(answer_of, count=count) for count in counts])
        missing = [torch.full((count,), torch.nan) for count in counts]
        return torch.cat([m if f is None else f for f, m in zip(found, missing, strict=True)]).to(samples.device)
