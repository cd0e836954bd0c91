"""Write what a run tuned as other programs read it, and push it to the Hugging Face hub.

    condrl export runs/quickstart --to diffusers    the LoRA: runs/quickstart/export/diffusers/
    condrl export runs/quickstart --to kohya        the same for ComfyUI and A1111, in kohya's names
    condrl export runs/quickstart --to merged       the whole pipeline in float32, with the LoRA in its weights
    condrl export runs/quickstart --to merged --dtype bfloat16      half the size; says how much of the LoRA is left
    condrl export runs/quickstart --to diffusers --push OWNER/NAME

Each with its card, README.md, and pictures. The first argument is a run's folder, or a LoRA's folder or file in any
format; `key=value` overrides change the model that it is for, such as model.path=. A LoRA is merged in float32,
whatever the run's model.dtype, and half precision rounds some of it away. --push creates a private repository unless
it exists, and needs `hf auth login` or HF_TOKEN.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from condrl.commands.arguments import HOME, fit_adapter, in_run, parser_of, read_words
from condrl.commands.console import exit_code
from condrl.errors import (
    RunError,
    UsageError,
    blaming,
    brief,
    naming,
    print_main,
    stopping_at,
    visible,
    warn_of_address_limit,
)
from condrl.io.files import check_folder
from condrl.io.overrides import is_setting, setting_keys

MERGED = "merged"
DTYPES = ("float32", "bfloat16", "float16")
REPOSITORY = r"[\w-][\w.-]*/[\w-][\w.-]*"


def parse(words: list[str]) -> argparse.Namespace:
    parser = parser_of("export", __doc__)
    parser.add_argument("words", nargs="+", metavar="RUN key=value", help="a run's folder, or a LoRA")
    parser.add_argument("--to", required=True, choices=FORMATS, help="what to write")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="a new folder; by default export/ of the run")
    parser.add_argument("--strength", type=float, default=1.0, help="of the LoRA in what is written; 1 is as tuned")
    parser.add_argument("--dtype", choices=DTYPES, help="of a merged pipeline's weights, by default float32")
    parser.add_argument("--push", metavar="OWNER/NAME", help="also upload the folder to the hub")
    parser.add_argument("--public", action="store_true", help="create that repository public, not private")
    parser.add_argument("--device", default="cpu", help="where the LoRA is merged, by default the cpu")
    return parser.parse_intermixed_args(words)


def main(words: list[str]) -> int:
    """Exit code: 0, 1 when it cannot be written or pushed, 2 for bad input."""
    return exit_code(lambda: export(parse(words)))


def export(args: argparse.Namespace) -> None:
    """Check everything that can be checked without the model, then write, then push."""
    from condrl.training.host import find_device

    warn_of_address_limit()
    config, lora, home = read_words(args.words)
    if lora is None:
        raise UsageError("nothing to export: name a run's folder, or a LoRA")
    if not math.isfinite(args.strength):
        raise UsageError(f"--strength must be a finite number, got {args.strength}")
    check_dtype(args)
    if (home / "config.yaml").is_file() and not (home / "result.json").is_file():
        print_main(f"warning: the run {home} has not ended: this is its last state, and nothing was measured of it")
    out = args.out or in_run(in_run(home / "export") / args.to)
    check_new(out)
    if args.push:
        check_hub(args.push)
    elif args.public:
        raise UsageError("--public has no effect without --push OWNER/NAME")
    dtype = args.dtype or "float32"
    full = "float32" if args.to == MERGED else None
    model = loaded(config, lora, None if home == HOME else home, args.strength, find_device(args.device), full)
    with naming(out), whole_or_empty(out):
        note = FORMATS[args.to](model, lora, out, name_of(home, lora), dtype)
    describe(home, lora, out, args, dtype, note)
    if note:
        print(note)
    print(visible(f"wrote {out}"))
    if args.push:
        print(visible(f"pushed to {push(out, args.push, args.public)}"))


@contextmanager
def whole_or_empty(folder: Path) -> Iterator[None]:
    """Make a folder, which is empty if it is there; what is half written within is removed again."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def check_new(folder: Path) -> None:
    """Raises: UsageError when there is something else already, or nothing can be written there."""
    check_folder(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty: remove it, or name another folder with --out")


def check_dtype(args: argparse.Namespace) -> None:
    """Raises: UsageError on a precision that would have no effect on what is written."""
    given = [word for word in args.words if is_setting(word) and setting_keys(word) == ["model", "dtype"]]
    if given and args.to == MERGED:
        raise UsageError(f"{given[0]} has no effect, a LoRA is merged in float32: give --dtype for smaller files")
    if args.dtype and args.to != MERGED:
        raise UsageError(f"--dtype has no effect on a LoRA, which is float32: it goes with --to {MERGED}")


# ---------------------------------------------------------------------------------------------- formats


def loaded(config: Any, lora: Path, run: Path | None, strength: float, device: Any, dtype: str | None) -> Any:
    """The model with a LoRA of a run, or of none, at some strength, in its own precision or another one.

    All of its weights are as they are.
    """
    from condrl.models.lora import scale_lora
    from condrl.training.build import make_model

    section = {name: value for name, value in config.model.items() if name not in ("quantize", "offload_vae")}
    section |= {"dtype": dtype} if dtype else {}
    model: Any = make_model(section, device)
    with blaming("model", section["name"]):
        fit_adapter(model, lora, run)
        model.load_adapter(lora)
    scale_lora(model.module, strength)
    return model


def name_of(home: Path, lora: Path) -> str:
    """What a file is called that is copied elsewhere: as the run, or as the LoRA that has none."""
    return home.resolve().name if (home / "config.yaml").is_file() else lora.stem


def to_diffusers(model: Any, lora: Path, out: Path, name: str, dtype: str) -> None:
    from condrl.models.lora import LORA_FILE

    save_one(model, lora, LORA_FILE, out / LORA_FILE)


def to_kohya(model: Any, lora: Path, out: Path, name: str, dtype: str) -> None:
    from condrl.models.lora import KOHYA_FILE

    save_one(model, lora, KOHYA_FILE, out / f"{name}.safetensors")
    if model.prefix == "transformer":
        print_main("note: a transformer's names are OneTrainer's, which ComfyUI reads; kohya's are those of a UNet")


def save_one(model: Any, lora: Path, name: str, path: Path) -> None:
    """One of the files that a LoRA is saved as, with the rewards that the original names."""
    from condrl.io.files import load_metadata

    metadata = {key: text for key, text in load_metadata(lora, "LoRA").items() if key == "rewards"}
    with tempfile.TemporaryDirectory() as scratch:
        with stopping_at("the model could not write its LoRA"):
            model.save_adapter(Path(scratch), metadata)
        path.write_bytes((Path(scratch) / name).read_bytes())


def to_merged(model: Any, lora: Path, out: Path, name: str, dtype: str) -> str | None:
    """Write the whole pipeline; returns what rounding leaves of the LoRA, in words."""
    import torch

    from condrl.models.saving import merge_lora, round_pipeline, save_pipeline

    wanted = getattr(torch, dtype)
    survival = merge_lora(model.module, wanted)
    round_pipeline(model.pipe, model.family, wanted)
    save_pipeline(model.pipe, out)
    return None if wanted == torch.float32 else str(survival)


FORMATS: dict[str, Callable[[Any, Path, Path, str, str], str | None]] = {
    "diffusers": to_diffusers,
    "kohya": to_kohya,
    MERGED: to_merged,
}


def describe(home: Path, lora: Path, out: Path, args: argparse.Namespace, dtype: str, note: str | None) -> None:
    """Write the card of what is there; a LoRA without a run has none."""
    from condrl.report.card import HERE, write_card
    from condrl.report.run import read_run

    if not (home / "config.yaml").is_file():
        return
    run = read_run(home)
    write_card(run, out, *run.measured(lora.parent.name), args.strength, args.push or HERE, dtype=dtype, note=note)


# ---------------------------------------------------------------------------------------------- the hub


def check_hub(repository: str) -> None:
    """Raises: UsageError when the repository's name is none, or nobody is logged in to push to it."""
    from huggingface_hub import HfApi

    if not re.fullmatch(REPOSITORY, repository):
        raise UsageError(f"--push {repository}: give OWNER/NAME")
    try:
        HfApi().whoami()
    except Exception as error:  # whatever the hub's client and what it rests on raise
        raise UsageError(f"--push: log in with `hf auth login`, or set HF_TOKEN ({brief(error)})") from error


def push(folder: Path, repository: str, public: bool) -> str:
    """Upload a folder; returns where it is.

    Raises: RunError when the hub refuses it.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        hub.create_repo(repository, private=not public, exist_ok=True)
        done = hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Tuned with condrl")
    except Exception as error:  # as above
        again = f"hf upload {repository} {folder} .{'' if public else ' --private'}"
        raise RunError(
            f"{folder} is written, but could not be pushed to {repository}: {brief(error)}; try again with `{again}`"
        ) from error
    return str(done.commit_url)
