"""A vision-language model's verdict on an image, from an OpenAI-compatible server."""

import base64
import json
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

import condrl
from condrl.io.records import from_json
from condrl.rewards.client import Client
from condrl.rewards.wire import number, read_secret, to_png

QUESTIONS = {
    "yes": 'Does this image show "{prompt}"? Answer yes or no.',
    "number": 'How well does this image show "{prompt}"? Answer with one number from {low} to {high} and nothing else.',
}


@condrl.reward(name="vlm_judge", differentiable=False, cached=True)
class VLMJudge:
    """A judge's P(yes) among yes and no, or the number that it answers; an answer with neither is a failed score."""

    def __init__(
        self,
        *,
        url: str,  # of the server's API, such as http://127.0.0.1:8000/v1
        model: str,  # its name on the server
        answer: Literal["yes", "number"] = "yes",  # yes: from the log-probabilities of the first word
        question: str | None = None,  # with {prompt}, {low} and {high}; by default one that fits the answer
        low: float = 0.0,  # least number
        high: float = 10.0,  # greatest number
        key: str | None = None,  # environment variable with the server's key, such as OPENAI_API_KEY
        timeout: float = 60.0,  # seconds for an answer
        retries: int = 3,  # further attempts, after 1, 2, 4, ... times `backoff`
        backoff: float = 1.0,  # seconds
        concurrent: int = 8,  # requests at a time
    ) -> None:
        if not low < high:
            raise condrl.UsageError(f"config rewards.vlm_judge.low: {low:g} is not below high, {high:g}")
        if key is not None and read_secret(key) is None:
            named = f" {key}" if re.fullmatch("[A-Z_][A-Z0-9_]*", key) else ""  # else it may be the key itself
            raise condrl.UsageError(f"config rewards.vlm_judge.key: the environment variable{named} is not set")
        self.model, self.answer, self.low, self.high = model, answer, low, high
        self.question = (question or QUESTIONS[answer]).replace("{low}", f"{low:g}").replace("{high}", f"{high:g}")
        address = url.rstrip("/") + "/chat/completions"
        self.client = Client(address, "rewards.vlm_judge.url", key, timeout, retries, backoff, concurrent)

    @property
    def errors(self) -> Sequence[str]:
        return self.client.errors

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        bodies = [self._request(image, prompt) for image, prompt in zip(samples, prompts, strict=True)]
        found = self.client.ask(bodies, [self._score] * len(bodies))
        return torch.tensor([math.nan if value is None else value for value in found], device=samples.device)

    def _request(self, image: Tensor, prompt: str) -> bytes:
        picture = "data:image/png;base64," + base64.b64encode(to_png(image)).decode()
        content = [
            {"type": "image_url", "image_url": {"url": picture}},
            {"type": "text", "text": self.question.replace("{prompt}", prompt)},
        ]
        request: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": 1 if self.answer == "yes" else 16,
        }
        if self.answer == "yes":
            request |= {"logprobs": True, "top_logprobs": 20}
        return json.dumps(request).encode()

    def _score(self, body: bytes) -> float:
        """Raises: ValueError, TypeError or LookupError when the answer has no score."""
        choice = dict(from_json(body)["choices"][0])
        if self.answer == "number" and choice.get("finish_reason") == "length":
            raise ValueError("the reply is longer than 16 tokens")
        if self.answer == "yes":
            return share_of_yes(choice["logprobs"]["content"][0]["top_logprobs"])
        return number_in(choice["message"]["content"], self.low, self.high)


def share_of_yes(first: Sequence[dict[str, Any]]) -> float:
    """P(yes) / (P(yes) + P(no)), each summed over the ways to write it, among the likeliest first tokens.

    Raises: ValueError when neither is among them.
    """
    chance = {"yes": 0.0, "no": 0.0}
    for token in first:
        word = str(token["token"]).strip(" \"'*.\n").lower()
        if word in chance:
            logprob = number(token["logprob"])
            if logprob > 1e-3:
                raise ValueError(f"the log-probability {logprob:g} is above 0")
            chance[word] += math.exp(logprob)
    if not sum(chance.values()):
        raise ValueError(f"neither yes nor no is among {[token['token'] for token in first[:5]]}")
    return chance["yes"] / sum(chance.values())


def number_in(text: str, low: float, high: float) -> float:
    """The one number in a text, `7`, `Score: 7.5` or `7/10`.

    Raises: ValueError when there is no number, more than one, or one outside [low, high].
    """
    of = rf"\s*(?:/|out of)\s*{re.escape(f'{high:g}')}"
    found = re.fullmatch(rf"[^\d-]*(-?[0-9]+(?:\.[0-9]+)?)(?:{of})?[^\d]*", text)
    if not found or not low <= float(found[1]) <= high:
        raise ValueError(f"no number from {low:g} to {high:g} in {text[:60]!r}")
    return float(found[1])
