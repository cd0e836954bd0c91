"""Embeddings of prompts, computed when they are first needed and kept on the host as long as there is room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

MOST_BYTES = 10**9  # on the host: about 4,200 prompts of Stable Diffusion 1.5 in float32
Prompt = str | None  # None: no prompt at all, which is not the empty one for every model
Encoded = tuple[Tensor, ...]  # what a network is given of a prompt
P = TypeVar("P", bound=Prompt)


class Embeddings(Generic[P]):
    """A cache of encoded prompts that drops the least recently used ones beyond `most` bytes.

    `encode` is given the prompts that are not in it, and must encode each alone: then the result depends neither on the
    prompts beside it nor on whether it was dropped in between.
    """

    def __init__(self, encode: Callable[[list[P]], Iterable[Encoded]], most: int = MOST_BYTES) -> None:
        self._encode, self._most = encode, most
        self._cache: OrderedDict[P, Encoded] = OrderedDict()
        self.bytes = 0

    def __call__(self, prompts: Sequence[P]) -> Encoded:
        """Each of its tensors for prompts (B, ...), on the host."""
        distinct = list(dict.fromkeys(prompts))
        if new := [prompt for prompt in distinct if prompt not in self._cache]:
            for prompt, encoded in zip(new, self._encode(new), strict=True):
                self._cache[prompt] = tuple(x.cpu() for x in encoded)
                self.bytes += size(self._cache[prompt])
        for prompt in distinct:
            self._cache.move_to_end(prompt)
        found = tuple(map(torch.stack, zip(*(self._cache[prompt] for prompt in prompts), strict=True)))
        while self.bytes > self._most:
            self.bytes -= size(self._cache.popitem(last=False)[1])
        return found


def size(encoded: Encoded) -> int:
    """Bytes of it."""
    return sum(x.nbytes for x in encoded)
