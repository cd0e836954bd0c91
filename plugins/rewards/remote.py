"""A reward that is served elsewhere, by scripts/reward_server.py."""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

import condrl
from condrl.prompts import Row
from condrl.wire import MOST_BYTES, answer_of, pack


class Stay(urllib.request.HTTPRedirectHandler):
    """Follows nobody: the token and the images are for the address that was given."""

    def redirect_request(self, *_: Any) -> None:
        return None


DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}), Stay)  # and asks no proxy
PASSING = (429, 500, 502, 503, 504)  # statuses that may be over when one tries again


@condrl.reward(differentiable=False)
class Remote:
    """The scores of a reward server; one that cannot be had is missing, never a number (scripts/reward_server.py)."""

    def __init__(
        self,
        *,
        url: str,  # where the server listens, as http://127.0.0.1:8200
        timeout: float = 60.0,  # seconds for an answer
        retries: int = 3,  # further attempts, after 1, 2, 4, ... times `backoff`
        backoff: float = 1.0,  # seconds
        batch: int = 16,  # samples in a request
        concurrent: int = 4,  # requests at a time
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise condrl.UsageError(f"config rewards.remote.url: {url!r} is no address like http://127.0.0.1:8200")
        self.url, self.timeout, self.retries, self.backoff = url, timeout, retries, backoff
        self.batch, self.concurrent, self.errors = batch, concurrent, deque[str](maxlen=100)

    def __call__(self, samples: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        rows = [Row(i, prompt, extra) for i, (prompt, extra) in enumerate(zip(prompts, metadata, strict=True))]
        parts = [slice(start, start + self.batch) for start in range(0, len(rows), self.batch)]
        self.errors.clear()
        bodies = [pack(samples[part], rows[part]) for part in parts]
        with ThreadPoolExecutor(self.concurrent) as pool:
            found = list(pool.map(self._scores, bodies, [len(rows[part]) for part in parts]))
        return torch.cat(found).to(samples.device)

    def _scores(self, body: bytes, count: int) -> Tensor:
        """Of a request's samples, (count,); nan when it failed in the end."""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.backoff * 2 ** (attempt - 1))
            try:
                return answer_of(self._ask(body), count)
            except urllib.error.HTTPError as error:
                reason = f"{self.url} answered {error.code}: {said_in(error)}"
                if error.code not in PASSING:
                    break
            except (OSError, http.client.HTTPException) as error:
                reason = f"{self.url} did not answer: {getattr(error, 'reason', error)}"
            except (ValueError, TypeError) as error:
                reason = f"{self.url} gave an answer that is none: {error}"
        self.errors.append(reason)
        return torch.full((count,), torch.nan)

    def _ask(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if token := os.environ.get("CONDRL_REWARD_TOKEN"):
            headers["Authorization"] = f"Bearer {token}"
        request = urllib.request.Request(self.url, body, headers)
        with DIRECT.open(request, timeout=self.timeout) as answer:
            content: bytes = answer.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"it is longer than {MOST_BYTES} bytes")
        return content


def said_in(error: urllib.error.HTTPError) -> str:
    """The reason that a server gave."""
    try:
        return str(json.loads(error.read(10_000))["error"])
    except (ValueError, KeyError, TypeError, OSError):
        return error.reason
