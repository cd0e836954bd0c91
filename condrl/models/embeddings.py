"""Embeddings of prompts, computed when they are first needed and kept on the host as long as there is room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from condrl.errors import UsageError

MOST_BYTES = 10**9  # on the host: about 4,200 prompts of Stable Diffusion 1.5 in float32
Prompt = str | None  # None: no prompt at all, which is not the empty one for every model
Encoded = tuple[Tensor, ...]  # what a network is given of a prompt
P = TypeVar("P", bound=Prompt)


class Embeddings(Generic[P]):
    """A cache of encoded prompts that drops the least recently used ones beyond `most` bytes.

    `encode` is given the prompts that are not in it, and must encode each alone: then the result depends neither on the
    prompts beside it nor on whether it was dropped in between.
    """

    def __init__(self, encode: Callable[[list[P]], Iterable[Encoded]], most: float = MOST_BYTES) -> None:
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

    def hold(self, prompts: Sequence[P]) -> None:
        """Encode prompts that are asked for later, when nothing can be encoded any more.

        Raises: UsageError where there is no room for all of them.
        """
        for start in tqdm(range(0, len(prompts), 16), "encoding the prompts", leave=False, disable=None, delay=1):
            self(prompts[start : start + 16])
            needed = self.bytes / len(self._cache) * len(prompts)
            if needed > self._most:
                raise UsageError(
                    f"config model.release_encoders: {len(prompts)} encoded prompts take {needed / 1e9:.3g} GB, more "
                    f"than model.embeddings_gb={self._most / 1e9:g}: raise that, leave it out, or take fewer prompts"
                )


def size(encoded: Encoded) -> int:
    """Bytes of it."""
    return sum(x.nbytes for x in encoded)
