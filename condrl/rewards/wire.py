"""How images, points and prompts travel to a reward served elsewhere: as JSON, with images as lossless PNG."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from condrl.errors import UsageError
from condrl.io.records import from_json
from condrl.prompts import Row
from condrl.rewards.pixels import encoded, from_pil

MOST_BYTES = 64 * 2**20  # of a request or an answer
MOST_PIXELS = 2**24  # of all the images of a request: 16 of 1024 x 1024
TOKEN = "CONDRL_REWARD_TOKEN"  # the environment variable with the token of a reward server


def read_secret(variable: str) -> str | None:
    """The key or token in an environment variable; None when the variable is not set.

    Raises: UsageError, which never quotes the value, when it cannot be sent in a header, or when `variable` is not a
    name, and so perhaps the key itself.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*", variable, re.ASCII):
        raise UsageError("a key is given by the name of an environment variable that holds it, such as OPENAI_API_KEY")
    value = os.environ.get(variable)
    if value is None:
        return None
    secret = value.strip()
    if not secret or not secret.isascii() or not secret.isprintable() or " " in secret:
        what = "has characters that a key cannot have" if secret else "is empty"
        raise UsageError(f"the environment variable {variable} {what}: set it again, or unset it")
    return secret


def pack(samples: Tensor, rows: Sequence[Row]) -> bytes:
    """A request to score samples (B, ...): images (B, 3, H, W) in [0, 1] as 8-bit PNG, points (B, d) as numbers."""
    if samples.dim() == 4:
        kind, items = "png", [base64.b64encode(to_png(image)).decode() for image in samples]
    else:
        kind, items = "points", samples.double().tolist()
    given = [{"prompt": row.prompt, "metadata": row.metadata} for row in rows]
    return json.dumps({"kind": kind, "samples": items, "rows": given}).encode()


def unpack(body: bytes) -> tuple[Tensor, list[Row]]:
    """The samples and rows of a request.

    Raises: ValueError saying what is wrong with it.
    """
    message = from_json(body)
    if not isinstance(message, dict) or not {"kind", "samples", "rows"} <= message.keys():
        raise ValueError("expected an object with kind, samples and rows")
    if not isinstance(message["rows"], list) or not isinstance(message["samples"], list):
        raise ValueError("rows and samples should be lists")
    rows = [read_row(i, row) for i, row in enumerate(message["rows"])]
    if len(rows) != len(message["samples"]) or not rows:
        raise ValueError("expected as many rows as samples, and at least one")
    if message["kind"] == "png":
        files = [base64.b64decode(item, validate=True) for item in message["samples"]]
        check_pixels(files)
        return torch.stack([from_png(file) for file in files]), rows
    if message["kind"] != "points":
        raise ValueError("kind is neither png nor points")
    points = torch.tensor([[number(value) for value in point] for point in message["samples"]], dtype=torch.float32)
    if not points.isfinite().all():
        raise ValueError("a number is too large for float32")
    return points, rows


def read_row(index: int, row: Any) -> Row:
    """Raises: ValueError when it is not an object with a text as prompt and an object as metadata."""
    prompt, metadata = (row.get("prompt"), row.get("metadata", {})) if isinstance(row, dict) else (None, None)
    if not isinstance(prompt, str) or not isinstance(metadata, dict):
        raise ValueError('a row should be an object with a text as "prompt" and an object as "metadata"')
    return Row(index, prompt, metadata)


def to_png(image: Tensor) -> bytes:
    """An image (3, H, W) in [0, 1] as a PNG file."""
    return encoded(image, "PNG")


def check_pixels(files: Sequence[bytes]) -> None:
    """Raises: ValueError when a file is not a PNG, or when all of them have more than `MOST_PIXELS` together."""
    pixels = 0
    for number, content in enumerate(files):
        try:
            with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
                pixels += image.width * image.height
        except UnidentifiedImageError as error:
            raise ValueError(f"sample {number} is not a PNG file") from error
    if pixels > MOST_PIXELS:
        raise ValueError(f"{pixels} pixels are too many for one request: at most {MOST_PIXELS}")


def from_png(content: bytes) -> Tensor:
    """A PNG file as (3, H, W) float32 in [0, 1]."""
    with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        return from_pil(image)


def answer_of(body: bytes, count: int) -> Tensor:
    """Scores (count,) float32 of an answer; nan where one is null.

    Raises: ValueError when it is not such an answer.
    """
    message = from_json(body)
    scores = message.get("scores") if isinstance(message, dict) else None
    if not isinstance(scores, list) or len(scores) != count:
        raise ValueError(f"expected an object with {count} scores")
    return torch.tensor([math.nan if score is None else number(score) for score in scores])


def number(value: Any) -> float:
    """A number of a JSON text.

    Raises: ValueError on anything else, such as "0.7" and true; OverflowError on an integer beyond floats.
    """
    if type(value) not in (int, float):
        raise ValueError(f"{str(value)[:60]!r} is not a number")
    return float(value)
