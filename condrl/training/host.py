"""The machine that a run is on: devices, memory, processes, versions."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import condrl
from condrl.config import Config
from condrl.errors import UsageError
from condrl.processes import asks_for_shards
from condrl.registry import algorithm

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "open_clip_torch", "numpy")
UNSUPPORTED = ("DEEPSPEED", "MEGATRON_LM")  # of accelerate's distributed types


def find_device(name: str | None) -> torch.device:
    """The device of that name, by default a GPU where there is one.

    Raises: UsageError when there is no such device here, or it cannot compute.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # no such name, none here, one without numbers
        raise UsageError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return torch.device(name)


def set_threads_and_seed(config: Config) -> None:
    """Have torch use the CPU threads of `run.threads`, and begin its draws at `run.seed`."""
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    torch.manual_seed(config.run.seed)


def check_equal_calls(config: Config, processes: int) -> None:
    """Check that all processes will call a sharded network the same number of times.

    Raises: UsageError naming the setting that prevents it.
    """
    train = config.train
    for wrong, key, text in (
        (train.prompts_per_epoch % processes, "prompts_per_epoch", f"be a multiple of the {processes} processes"),
        (train.images_per_prompt % train.updates_per_epoch, "images_per_prompt", "be a multiple of updates_per_epoch"),
        (train.max_failed, "max_failed", "be 0"),
        (train.kl_budget is not None, "kl_budget", "be left out"),
    ):
        if wrong:
            raise UsageError(f"config train.{key}: must {text} with FSDP, where all processes compute in lockstep")
    name = config.algorithm["name"]
    if not getattr(algorithm.find(name).target, "calls_evenly", True):
        raise UsageError(
            f"the algorithm {name} draws how many steps an image takes, and with FSDP all processes compute in "
            "lockstep: use another, such as draft"
        )


def check_launcher() -> None:
    """Raises: UsageError on an option of `accelerate launch` that would have no effect."""
    for variable, without, option, instead in (
        ("ACCELERATE_MIXED_PRECISION", "no", "--mixed_precision", "use --mixed_precision no, and model.dtype=bfloat16"),
        ("ACCELERATE_DYNAMO_BACKEND", "no", "--dynamo_backend", "use --dynamo_backend no"),
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            "1",
            "--gradient_accumulation_steps",
            "gradients are summed over train.loss_batch pairs at a time: use --gradient_accumulation_steps 1",
        ),
    ):
        given = os.environ.get(variable, without)
        if given.lower() != without:
            raise UsageError(f"accelerate launch {option} {given.lower()} has no effect here: {instead}")


def make_accelerator(config: Config) -> Any:
    """An Accelerator that leaves precision to `model.dtype`; its trackers are started once the run's folder is ready.

    Raises: UsageError when accelerate's way to distribute a model is not supported.
    """
    from accelerate import Accelerator

    if sys.platform == "linux":
        keep_freed_memory()
    accelerator = Accelerator(
        mixed_precision="no", log_with=config.run.trackers or None, project_dir=str(config.folder)
    )
    if str(accelerator.distributed_type).split(".")[-1] in UNSUPPORTED:
        raise UsageError(f"{accelerator.distributed_type} is not supported: use one of configs/accelerate")
    if config.train.prompts_per_epoch < accelerator.num_processes:
        raise UsageError(
            f"config train.prompts_per_epoch: {config.train.prompts_per_epoch} prompts cannot be distributed over "
            f"{accelerator.num_processes} processes: raise it, or start fewer"
        )
    if asks_for_shards(accelerator):
        check_equal_calls(config, accelerator.num_processes)
    return accelerator


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free for the next ones; asking for fresh pages costs 5 to 30 % of an epoch on a CPU.

    The peak stays the same (measured on the quickstart and on configs/paper).
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option:
        for option, size in ((-3, 1 << 25), (-1, 1 << 30)):  # M_MMAP_THRESHOLD, at its most, and M_TRIM_THRESHOLD
            set_option(option, size)


def device_name(device: torch.device) -> str:
    """What a device is called; a CPU with how many threads are used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} of {os.cpu_count()} CPU threads"


def cpu_name() -> str:
    """The processor as its maker calls it, where the system tells, else its architecture."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", info.read_text("utf-8"), re.MULTILINE) if info.is_file() else None
    return named[1] if named else platform.processor() or platform.machine()


def provenance() -> dict[str, Any]:
    """Versions, git revision and command of this process."""
    return {
        "versions": {"condrl": condrl.__version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "revision": git_revision(Path(__file__).resolve().parents[2]),
        "command": sys.argv,
    }


def git_revision(checkout: Path) -> str | None:
    """The commit of condrl's own checkout; None when it is installed from a wheel or git is missing."""
    if not (checkout / ".git").exists() or not shutil.which("git"):
        return None
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=checkout)
    return git.stdout.strip() or None


def peak_memory_gb(device: torch.device) -> float:
    """Highest memory so far in GB (1e9 bytes): allocated on a GPU, resident in a CPU process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        import psutil  # which accelerate needs

        return psutil.Process().memory_info().peak_wset / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
