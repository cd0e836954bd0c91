"""Pictures of a run."""

from __future__ import annotations

import functools
import importlib.util
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from condrl.errors import naming
from condrl.rewards.pixels import to_pil

COLUMNS, TILES = 4, 32  # of a page
LABEL_HEIGHT = 52
MIN_SIDE = 192  # pixels: smaller images are enlarged so that their labels can be read


def labelled(image: Any, label: str) -> Any:
    """A PIL image, enlarged by a whole factor if small, above its label, which is cut to fit."""
    from PIL import Image, ImageDraw

    factor = max(1, -(-MIN_SIDE // image.width))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    framed = Image.new("RGB", (image.width, image.height + LABEL_HEIGHT), "white")
    framed.paste(image)
    font, label = label_font(), " ".join(label.split())
    wide = max(6.0, font.getlength(label) / max(1, len(label)))  # of a character, in pixels
    lines = textwrap.wrap(label, int(image.width // wide), max_lines=4, placeholder=" ...")
    ImageDraw.Draw(framed).text((4, image.height + 2), "\n".join(lines), "black", font, spacing=1)
    return framed


@functools.cache
def label_font() -> Any:
    """matplotlib's DejaVu Sans, which has the letters of most alphabets; Pillow's own where it is missing."""
    from PIL import ImageFont

    found = importlib.util.find_spec("matplotlib")
    for folder in (found.submodule_search_locations or []) if found else []:
        file = Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if file.is_file():
            return ImageFont.truetype(str(file), 10)
    return ImageFont.load_default(11)


def grid(images: Sequence[Any], columns: int, margin: int = 6) -> Any:
    """PIL images, row by row, in cells of the largest one's size."""
    from PIL import Image

    width, height = (max(getattr(image, side) for image in images) + margin for side in ("width", "height"))
    sheet = Image.new("RGB", (columns * width + margin, -(-len(images) // columns) * height + margin), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (margin + i % columns * width, margin + i // columns * height))
    return sheet


def pages(path: Path, images: int) -> list[Path]:
    """The files for `images` images: x.png, x_2.png, x_3.png, ..."""
    others = range(2, -(-images // TILES) + 1)
    return [path, *(path.with_stem(f"{path.stem}_{number}") for number in others)] if images else []


def save_grid(path: Path, images: Sequence[Tensor], labels: Sequence[str]) -> list[Path]:
    """Write labelled images (3, H, W) in [0, 1], four a row, to one page or several; returns the pages."""
    written = pages(path, len(images))
    for start, page in zip(range(0, len(images), TILES), written, strict=True):
        part = slice(start, start + TILES)
        tiles = [labelled(to_pil(i), label) for i, label in zip(images[part], labels[part], strict=True)]
        save_image(grid(tiles, COLUMNS), page)
    return written


def save_comparison(
    path: Path,
    base: Sequence[Tensor],
    tuned: Sequence[Tensor],
    labels: Sequence[str],
    scores: Sequence[tuple[str, str]] | None = None,
) -> list[Path]:
    """Write `base | tuned` pairs drawn from the same noise, two pairs a row, to one page or several; returns them.

    Scores (base's, tuned's) are written before the labels.
    """
    images = [image for pair in zip(base, tuned, strict=True) for image in pair]
    whos = [("base", "tuned")] * len(labels)
    if scores:
        whos = [(f"base, {before}", f"tuned, {after}") for before, after in scores]
    return save_grid(path, images, [f"{w}: {label}" for who, label in zip(whos, labels, strict=True) for w in who])


def save_image(image: Any, path: Path) -> None:
    """Write a PIL image in the format of the path's ending; the folder is created if needed."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()  # Pillow does not say why a file cannot be written
    image.save(content, Image.registered_extensions()[path.suffix.lower()])
    with naming(path):
        path.write_bytes(content.getvalue())
