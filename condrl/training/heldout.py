"""What a run keeps of its held-out images: a line for each, and pictures of those that changed most."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from condrl.diffusion.noise import seeded
from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import sample
from condrl.errors import drawing
from condrl.io.records import write_lines
from condrl.prompts import Row
from condrl.rewards.pixels import to_pil
from condrl.training.evaluate import Evaluation
from condrl.training.folder import RunFolder
from condrl.training.pictures import save_image

PICTURES = 8  # of the most gained, of the most lost, and of the first
FILMED = 4  # prompts, drawn again at each evaluation


def save_heldout(
    folder: RunFolder, rows: Sequence[Row], seed: int, base: Evaluation, tuned: Evaluation, drawn: Collection[int] = ()
) -> None:
    """Write heldout.jsonl; image i is of row i // images_per_prompt, from seed + i, with a picture if it is `drawn`."""
    lines = [
        {
            "prompt": row.prompt,
            "row": row.index,
            "metadata": row.metadata,
            "seed": seed + i,
            "base": measures_of(base, i),
            "tuned": measures_of(tuned, i),
            "pictures": {who: picture(i, who) for who in ("base", "tuned")} if i in drawn else None,
        }
        for i, row in enumerate(row_of_each(rows, base))
    ]
    write_lines(folder.file("heldout.jsonl"), lines)


def save_evaluation(folder: RunFolder, epoch: int, rows: Sequence[Row], seed: int, found: Evaluation) -> None:
    """Write what was measured of each image after an epoch; image i is of row i // images_per_prompt, from seed + i."""
    lines = [
        {"prompt": row.prompt, "row": row.index, "seed": seed + i, "measures": measures_of(found, i)}
        for i, row in enumerate(row_of_each(rows, found))
    ]
    write_lines(folder.file(f"evaluations/epoch_{epoch:05d}.jsonl"), lines)


def row_of_each(rows: Sequence[Row], found: Evaluation) -> list[Row]:
    """The row that each evaluated image was drawn for."""
    count = len(next(iter(found.each.values())))
    return [rows[i * len(rows) // count] for i in range(count)]


def measures_of(found: Evaluation, image: int) -> dict[str, float]:
    """What was measured of an image, by name."""
    return {name: values[image].item() for name, values in found.each.items()}


def most_changed(base: Evaluation, tuned: Evaluation) -> list[int]:
    """The images that gained most and lost most in all measures, in units of the base's spread, and the first ones."""
    gains = torch.stack([(tuned.each[name] - each) / spread(each) for name, each in base.each.items()]).sum(0)
    order = gains.nan_to_num().argsort(stable=True).tolist()
    first = range(min(PICTURES, len(order)))
    return sorted({*order[:PICTURES], *order[::-1][:PICTURES], *first})


def spread(each: Tensor) -> Tensor:
    """The standard deviation of scores that did not fail."""
    return each[each.isfinite()].std(correction=0).clamp(min=1e-6)


@drawing()
@torch.no_grad()
def redraw(
    folder: RunFolder, policy: Policy, prompts: Sequence[str], seeds: Sequence[int], numbers: Sequence[int], batch: int
) -> None:
    """Draw images with the base and the tuned model again, `batch` at a time, and write them under their numbers."""
    condition, model = policy.model.encode(prompts), policy.model
    with model.reference():
        base = model.decode(sample(policy, condition, seeded(list(seeds)), batch))
    tuned = model.decode(sample(policy, condition, seeded(list(seeds)), batch))
    for who, images in (("base", base), ("tuned", tuned)):
        for number, image in zip(numbers, images, strict=True):
            save_image(to_pil(image.cpu()), folder.file(picture(number, who)))


def picture(number: int, who: str) -> str:
    return f"heldout/{number:05d}_{who}.png"


def save_film(folder: RunFolder, epoch: int, found: Evaluation) -> list[tuple[Any, str]]:
    """Write the first images of an evaluation, whose prompts and seeds are the same each time; returns the frames."""
    shown = frames(found)
    for number, (image, _) in enumerate(shown):
        save_image(image, folder.file(f"film/epoch_{epoch:05d}_{number}.png"))
    return shown


def frames(found: Evaluation) -> list[tuple[Any, str]]:
    """The first images as PIL's, each with its prompt and scores as a caption; none of points."""
    return [
        (to_pil(image), f"{found.labels[i]} [{', '.join(f'{name} {found.each[name][i]:.2f}' for name in found.each)}]")
        for i, image in enumerate(found.pictures[:FILMED])
        if image.dim() == 3
    ]
