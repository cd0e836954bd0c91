"""Embeddings of prompts, computed when they are first needed and kept on the host as long as there is room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

MOST_BYTES = 2**30  # on the host: about 4,500 prompts of Stable Diffusion 1.5 in float32


class Embeddings:
    """A memory of embeddings by prompt that drops the least recently used ones beyond `most` bytes.

    `encode` is given the prompts that are not in it, and has to encode each alone: then an embedding depends neither on
    the prompts beside it nor on whether it was dropped in between.
    """

    def __init__(self, encode: Callable[[list[str]], Iterable[Tensor]], most: int = MOST_BYTES) -> None:
        self._encode, self._most = encode, most
        self._known: OrderedDict[str, Tensor] = OrderedDict()
        self.bytes = 0

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings (B, ...) of prompts, on the host."""
        distinct = list(dict.fromkeys(prompts))
        if new := [prompt for prompt in distinct if prompt not in self._known]:
            for prompt, embedding in zip(new, self._encode(new), strict=True):
                self._known[prompt] = embedding.cpu()
                self.bytes += self._known[prompt].nbytes
        for prompt in distinct:
            self._known.move_to_end(prompt)
        found = torch.stack([self._known[prompt] for prompt in prompts])
        while self.bytes > self._most:
            self.bytes -= self._known.popitem(last=False)[1].nbytes
        return found
