"""Draw images with a fine-tuned LoRA, or with the base model.

    condrl sample runs/quickstart --prompt "a red star left of a blue square" --compare
    condrl sample runs/quickstart/lora --prompt "two small green circles" --seeds 0 1 2 3 --strength 0.5
    condrl sample --prompt "a black square" sampler.steps=30 model.guidance=4
    condrl sample runs/quickstart --prompt "a black square" --steer best_of_n,n=8        by the run's rewards

The first argument is a run's folder, whose model draws with the sampler that it was evaluated with, or a LoRA's folder
or file; without it the quickstart's base model draws. `key=value` overrides change the model and the sampler as they do
for condrl finetune, and rewards that they name steer instead of the run's. Plugins are code: those that a run's config
names are imported only if you name them, plugins=[my.py].
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from condrl.commands.arguments import HOME, fit_adapter, in_run, one_of_several, parser_of, read_words
from condrl.commands.console import exit_code
from condrl.config import Config
from condrl.errors import RunError, UsageError, blaming, drawing, visible, warn_of_address_limit
from condrl.io.files import check_folder

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from condrl.diffusion.policy import Policy
    from condrl.prompts import Row
    from condrl.training.evaluate import Draw


def parse(words: list[str]) -> argparse.Namespace:
    parser = parser_of("sample", __doc__)
    parser.add_argument("words", nargs="*", metavar="FOLDER key=value")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument("--prompts", metavar="FILE", help=".txt or .jsonl, as for condrl finetune")
    parser.add_argument(
        "--seeds", type=one_of_several(int), nargs="+", default=[0], help="an image of each prompt from each seed"
    )
    parser.add_argument(
        "--strength", type=float, default=1.0, help="of the LoRA; 1 is what was tuned, 0 the model without it"
    )
    parser.add_argument(
        "--steer",
        metavar="NAME[,option=value]",
        help="a steering plugin, such as smc,particles=8: it draws towards the run's rewards",
    )
    parser.add_argument("--compare", action="store_true", help="base | tuned, from the same noise")
    parser.add_argument(
        "--out",
        type=Path,
        help="the labelled images, 32 a page (x.png, x_2.png, ...); by default the run's next samples/0000.png, ...",
    )
    parser.add_argument("--folder", type=Path, metavar="DIR", help="also write every image there, at its own size")
    parser.add_argument("--batch", type=int, default=16, help="images drawn at a time; does not change them")
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    return parser.parse_intermixed_args(words)


def main(words: list[str]) -> int:
    """Exit code: 0, 1 when it had to stop, 2 for bad input."""
    return exit_code(lambda: sample(parse(words)))


def sample(args: argparse.Namespace) -> None:
    """Check everything that can be checked without the model, then draw."""
    warn_of_address_limit()
    request = read_request(args)
    args.out = args.out or unused(in_run(request.home / "samples"))
    for path in filter(None, (args.out.parent, args.folder)):
        check_folder(path)
    check_suffix(args.out)
    draw(args, request)


def drawn(
    arguments: Sequence[str],
    prompts: Sequence[str],
    seeds: Sequence[int],
    strength: float,
    steer: str | None,
    batch: int,
    device: str | None,
) -> list[Image]:
    """The images that the command would write with these arguments and options.

    Raises: UsageError as the command does.
    """
    from condrl.rewards.pixels import to_pil

    options = {"prompt": list(prompts), "prompts": None, "seeds": list(seeds), "compare": False, "steer": steer}
    args = argparse.Namespace(words=arguments, strength=strength, batch=batch, device=device, **options)
    return [to_pil(image) for image in images(args, read_request(args))[1]]


class Request(NamedTuple):
    """What to draw and with what, and the folder that it belongs to."""

    config: Config
    lora: Path | None
    home: Path
    pairs: list[tuple[Row, int]]  # what is drawn, numbered, and its seed
    device: torch.device
    draw: Draw  # with rewards, if they steer


def read_request(args: argparse.Namespace) -> Request:
    """Raises: UsageError on what cannot be drawn."""
    from condrl.prompts import Row, load_prompts, usable
    from condrl.training.evaluate import plain
    from condrl.training.host import find_device
    from condrl.training.steering import read_steer, steers_by_rewards

    config, lora, home = read_words(args.words, is_steered=args.steer is not None and steers_by_rewards(args.steer))
    rows = [Row(0, usable(prompt, "--prompt")) for prompt in args.prompt]
    rows += load_prompts(args.prompts, "--prompts") if args.prompts else []
    if not rows:
        raise UsageError('nothing to draw: give --prompt "a red star" or --prompts FILE')
    if lora is None and (args.compare or args.strength != 1):
        raise UsageError("--compare and --strength need a run or LoRA folder beside the base model")
    if not math.isfinite(args.strength):
        raise UsageError(f"--strength must be a finite number, got {args.strength}")
    if args.batch < 1 or not all(0 <= seed < 2**63 for seed in args.seeds):
        raise UsageError("--batch must be at least 1, and --seeds at least 0 and below 2^63")
    pairs = [(row, seed) for row in rows for seed in args.seeds]
    pairs = [(replace(row, index=index), seed) for index, (row, seed) in enumerate(pairs)]
    draw = plain if args.steer is None else read_steer(args.steer, config)
    return Request(config, lora, home, pairs, find_device(args.device), draw)


def check_suffix(path: Path) -> None:
    """Raises: UsageError when the path's ending is not that of an image format that can be written."""
    from PIL import Image

    Image.init()
    try:
        is_folder = path.is_dir()
    except OSError as error:
        raise UsageError(f"--out: {error.strerror}: {path}") from error
    try:
        Image.new("RGB", (1, 1)).save(io.BytesIO(), Image.EXTENSION.get(path.suffix.lower(), "none"))
        writable = not is_folder
    except (KeyError, ValueError, OSError):  # the format is not known, not for writing, or not for colours
        writable = False
    if not writable:
        raise UsageError(f"--out {path}: give the name of an image, such as {path.stem or 'samples'}.png")


def unused(folder: Path) -> Path:
    """The first of folder/0000.png, 0001.png, ... that does not exist, not even as a dangling link."""
    return next(path for i in itertools.count() if not os.path.lexists(path := folder / f"{i:04d}.png"))


def next_number(folder: Path) -> int:
    """One more than that of the last image 0000.png, 0001.png, ... in a folder."""
    return max((int(path.stem) + 1 for path in folder.glob("*.png") if path.stem.isdecimal()), default=0)


def draw(args: argparse.Namespace, request: Request) -> None:
    """Draw each prompt from each seed, and write the images."""
    from condrl.rewards.pixels import to_pil
    from condrl.training.pictures import save_comparison, save_grid, save_image

    base, final = images(args, request)
    labels = [f"{row.prompt} (seed {seed})" for row, seed in request.pairs]
    written = save_comparison(args.out, base, final, labels) if args.compare else save_grid(args.out, final, labels)
    if args.folder:
        first = next_number(args.folder)
        for number, image in enumerate(final, first):
            save_image(to_pil(image), args.folder / f"{number:04d}.png")
        print(visible(f"wrote {len(final)} images to {args.folder}/, from {first:04d}.png on"))
    print(visible(f"wrote {args.out}" + (f" and more pages, to {written[-1]}" if len(written) > 1 else "")))


def images(args: argparse.Namespace, request: Request) -> tuple[list[Tensor], list[Tensor]]:
    """The base model's images (3, H, W) in [0, 1], if they are asked for, and the final ones."""
    from condrl.models.lora import scale_lora
    from condrl.training.build import make_policy

    policy = make_policy(request.config, request.device)
    base = images_of(policy, request, args.batch, "base") if args.compare or not request.lora else []
    if not request.lora:
        return base, base
    with blaming("model", request.config.model["name"]):
        fit_adapter(policy.model, request.lora, None if request.home == HOME else request.home)
        policy.model.load_adapter(request.lora)
    scale_lora(policy.model.module, args.strength)
    return base, images_of(policy, request, args.batch, "tuned")


@drawing()
def images_of(policy: Policy, request: Request, batch: int, who: str) -> list[Tensor]:
    """An image (3, H, W) in [0, 1] for each pair of prompt and seed."""
    import torch
    from tqdm import tqdm

    from condrl.diffusion.noise import seeded

    rows = [row for row, _ in request.pairs]
    found: list[Tensor] = []
    for start in tqdm(range(0, len(rows), batch), desc=who, disable=None):
        part = slice(start, start + batch)
        condition = policy.model.encode([row.prompt for row in rows[part]])
        with torch.no_grad():
            states = request.draw(policy, condition, seeded([seed for _, seed in request.pairs[part]]), rows[part])
            if not states.isfinite().all():
                raise RunError(f"{who}: an image is not finite: the LoRA, its --strength or the sampler is not usable")
            found.extend(policy.model.decode(states).cpu())
    return found
