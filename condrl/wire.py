"""How images, points and prompts travel to a reward served elsewhere: JSON, images in it as lossless PNG."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from condrl.pixels import from_pil
from condrl.prompts import Row
from condrl.record import from_json
from condrl.report import to_pil

MOST_BYTES = 64 * 2**20  # of a request or an answer
MOST_PIXELS = 2**26  # of all the images of a request


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
    rows = [Row(i, str(row["prompt"]), dict(row.get("metadata") or {})) for i, row in enumerate(message["rows"])]
    if len(rows) != len(message["samples"]) or not rows:
        raise ValueError("expected as many rows as samples, and at least one")
    if message["kind"] == "png":
        files = [base64.b64decode(item, validate=True) for item in message["samples"]]
        check_pixels(files)
        return torch.stack([from_png(file) for file in files]), rows
    return torch.tensor(message["samples"], dtype=torch.float32), rows


def to_png(image: Tensor) -> bytes:
    """An image (3, H, W) in [0, 1]."""
    file = io.BytesIO()
    to_pil(image).save(file, "PNG")
    return file.getvalue()


def check_pixels(files: Sequence[bytes]) -> None:
    """Raises: ValueError when a file is no PNG, or when all of them are too large together."""
    pixels = 0
    for content in files:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            pixels += image.width * image.height
    if pixels > MOST_PIXELS:
        raise ValueError(f"{pixels} pixels are too many for one request: at most {MOST_PIXELS}")


def from_png(content: bytes) -> Tensor:
    """(3, H, W) float32 in [0, 1]."""
    with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        return from_pil(image)


def answer_of(body: bytes, count: int) -> Tensor:
    """Scores (count,) float32 of an answer; nan where one is null.

    Raises: ValueError when it is not such an answer.
    """
    message: Any = from_json(body)
    scores = message.get("scores") if isinstance(message, dict) else None
    if not isinstance(scores, list) or len(scores) != count:
        raise ValueError(f"expected an object with {count} scores")
    return torch.tensor([float("nan") if score is None else float(score) for score in scores])
