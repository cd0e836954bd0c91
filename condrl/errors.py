"""The ways a run stops with a sentence instead of a traceback."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

NO_MEMORY = (  # in the messages of torch, CUDA, the system, C++, the dynamic loader and Python
    *("can't allocate memory", "out of memory", "Cannot allocate memory", "bad_alloc", "failed to map segment"),
    "can't start new thread",
)
LESS = "lower train.loss_batch, train.rollout_batch or model.decode_batch, or --batch of condrl sample"
OTHER_KERNELS = (
    "CUDA_LAUNCH_BLOCKING=1 in the environment shows which operation did, with CONDRL_DEBUG=1 where; model.attention="
    "_native_flash or _native_efficient computes attention by other kernels"
)
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)  # full, read-only or broken
LENGTH = 300  # characters quoted from the error of another program or of a plugin
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # that ask a run to stop


class UsageError(ValueError):
    """What the user asked for cannot work; the message is one line that says what to change. Exit code 2."""


class RunError(RuntimeError):
    """A run that had begun cannot continue; the message says what happened and where. Exit code 1."""


class RewardError(RunError):
    """A reward failed, which is a UsageError if the run has not begun."""


class Stopped(BaseException):  # like KeyboardInterrupt, so that no plugin's `except Exception` keeps it
    """A run was asked to stop, and has saved what it needs to resume. Exit code 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def print_main(text: str) -> None:
    """Print a line to stderr, once per machine, with control characters shown as escapes."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(visible(text), file=sys.stderr, flush=True)


def visible(text: str) -> str:
    """Text for a terminal, with control characters written as escapes."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)


def quoted(text: str) -> str:
    """A text in quotes, cut to its first `LENGTH` characters."""
    return repr(text) if len(text) <= LENGTH else f"{text[:LENGTH]!r} ..."


def brief(error: BaseException) -> str:
    """An exception's type and message in one line, `TypeError: message`, of at most `LENGTH` characters."""
    text = " ".join(str(error).split())
    text = text if len(text) <= LENGTH else f"{text[:LENGTH]} ..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, on the host or on a GPU."""
    kinds = (RuntimeError, OSError, ImportError)
    return isinstance(error, MemoryError) or (isinstance(error, kinds) and any(t in str(error) for t in NO_MEMORY))


def gpu_failed(error: BaseException) -> bool:
    """Whether an error says that a GPU, its driver or one of its kernels failed."""
    return isinstance(error, RuntimeError) and "CUDA error" in str(error) and not out_of_memory(error)


def is_of_the_machine(error: BaseException) -> bool:
    """Whether an error says that memory is short, a GPU failed, or a disk is full, read-only or broken."""
    return out_of_memory(error) or gpu_failed(error) or (isinstance(error, OSError) and error.errno in DISK)


@contextmanager
def stopping_at(what: str, has_begun: bool = True) -> Iterator[None]:
    """Within it, whatever a plugin raises stops the run in one line, and what it is refused for if the run `has_begun`.

    `what` says where. Raises: RunError.
    """
    try:
        yield
    except RunError:
        raise
    except UsageError as error:
        if not has_begun:
            raise
        raise RunError(str(error)) from error
    except (Exception, SystemExit) as error:  # a plugin is the user's code
        if is_of_the_machine(error):
            raise
        raise RunError(f"{what}: {brief(error)}; with CONDRL_DEBUG=1 in the environment, where") from error


drawing = partial(stopping_at, "the model failed while images were drawn", has_begun=False)


@contextmanager
def blaming(kind: str, name: str, when: str = "") -> Iterator[None]:
    """Within it, whatever a plugin raises becomes one line that names it; what it is not to blame for passes through.

    Raises: UsageError.
    """
    try:
        yield
    except (UsageError, RunError):
        raise
    except (Exception, SystemExit) as error:  # a plugin is the user's code
        if is_of_the_machine(error):
            raise
        raise UsageError(f"the {kind} {name!r} failed{when}: {brief(error)}") from error


def warn_of_address_limit() -> None:
    """Warn of a limit (ulimit -v): a library that hits it may abort the process before we can report anything."""
    if sys.platform == "win32":
        return
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        print_main(
            f"warning: ulimit -v limits this process to {limit / 1e9:.1f} GB of address space: if it aborts, raise "
            "that limit"
        )


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within it, an OSError that does not say which file it is about names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
