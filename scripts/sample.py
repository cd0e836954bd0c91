"""Draw images with a fine-tuned LoRA, or with the base model.

    python scripts/sample.py runs/quickstart --prompt "a red star left of a blue square" --compare
    python scripts/sample.py runs/quickstart/lora --prompt "two small green circles" --seeds 0 1 2 3
    python scripts/sample.py --prompt "a black square" sampler.steps=30 model.guidance=4

The first word is a run's folder, whose config is used, or a LoRA's folder; without it the base model draws.
`key=value` words change the model and the sampler as they do for finetune.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from condrl.config import Config, is_setting, load_config
from condrl.errors import UsageError, exit_code


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="FOLDER key=value")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument("--prompts", metavar="FILE", help=".txt or .jsonl, as for finetune.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="an image of each prompt from each seed")
    parser.add_argument("--compare", action="store_true", help="base | tuned, from the same noise")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="one labelled PNG")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="also write every image there, at its own size")
    parser.add_argument("--device", default="cuda" if has_cuda() else "cpu")
    return parser.parse_intermixed_args(words)


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def read_words(words: list[str]) -> tuple[Config, Path | None]:
    """The config to sample with, and the LoRA.

    Raises: UsageError when a folder holds neither a run nor a LoRA.
    """
    from condrl.checkpoint import LORA_FILE

    folders = [Path(word) for word in words if not is_setting(word)]
    settings = [word for word in words if is_setting(word)]
    if len(folders) > 1:
        raise UsageError(f"expected one run or LoRA folder, got {' '.join(map(str, folders))}")
    if not folders:
        return load_config(settings), None
    (folder,) = folders
    if (folder / LORA_FILE).is_file() or folder.is_file():
        runs = [parent / "config.yaml" for parent in folder.resolve().parents[:2]]
        return load_config([str(run) for run in runs if run.is_file()][:1] + settings), folder
    if not (folder / "config.yaml").is_file() or not (folder / "lora" / LORA_FILE).is_file():
        raise UsageError(f"{folder} holds neither a finished run (config.yaml and lora/) nor {LORA_FILE}")
    return load_config([str(folder / "config.yaml"), *settings]), folder / "lora"


def draw(args: argparse.Namespace) -> None:
    import torch
    from torch import Tensor

    from condrl.noise import seeded
    from condrl.prompts import load_prompts
    from condrl.report import save_comparison, save_grid, to_pil
    from condrl.rollout import sample
    from condrl.run import make_policy

    config, lora = read_words(args.words)
    prompts = args.prompt + ([row.prompt for row in load_prompts(args.prompts, "--prompts")] if args.prompts else [])
    if not prompts:
        raise UsageError('nothing to draw: give --prompt "a red star" or --prompts FILE')
    if args.compare and lora is None:
        raise UsageError("--compare needs a run or LoRA folder to compare with the base model")
    policy = make_policy(config, torch.device(args.device))
    seeds = [seed for _ in prompts for seed in args.seeds]
    prompts = [prompt for prompt in prompts for _ in args.seeds]
    condition = policy.model.encode(prompts)
    labels = [f"{prompt} (seed {seed})" for prompt, seed in zip(prompts, seeds, strict=True)]

    @torch.no_grad()
    def images() -> list[Tensor]:
        return list(policy.model.decode(sample(policy, condition, seeded(seeds), config.train.rollout_batch)))

    base = images() if args.compare or not lora else []
    if lora:
        policy.model.load_adapter(lora)
    final = images() if lora else base
    if args.compare:
        save_comparison(args.out, base, final, labels)
    else:
        save_grid(args.out, final, labels)
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(final):
            to_pil(image).save(args.folder / f"{i:04d}.png")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    sys.exit(exit_code(lambda: draw(parse(sys.argv[1:]))))
