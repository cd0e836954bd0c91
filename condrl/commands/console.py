"""How a command ends: in one line and an exit code, even if nobody reads its output any more."""

from __future__ import annotations

import io
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from condrl.errors import (
    DISK,
    LESS,
    OTHER_KERNELS,
    RunError,
    Stopped,
    UsageError,
    brief,
    gpu_failed,
    out_of_memory,
    print_main,
)

HEAD_START = 2.0  # seconds that the process which prints an error gets before the others leave


class Surviving:
    """A text stream to which nothing more is written once writing has failed; the work continues without it.

    Writing fails when the program that reads a pipe has ended, a terminal was closed, or a disk is full.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._discard(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._discard(error)

    def _discard(self, error: OSError) -> None:
        """Discard what is still to come, and what Python has in its buffer."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)
        if self is sys.stdout and not isinstance(error, BrokenPipeError):
            print(f"warning: standard output cannot be written ({error})", file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def surviving_streams() -> Iterator[None]:
    """Within it, printing does not fail; a character that the terminal lacks is printed as an escape."""
    before = sys.stdout, sys.stderr
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        for stream in before:
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        sys.stdout, sys.stderr = (Surviving(stream or nowhere) for stream in before)  # none where the shell closed it
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = before


def exit_code(work: Callable[[], object]) -> int:
    """Do the work of a command; its errors become one line and an exit code, 130 after Ctrl+C.

    With CONDRL_DEBUG=1 in the environment their traceback is shown as well, by each process.
    """
    with surviving_streams():
        try:
            work()
        except (Exception, Stopped, KeyboardInterrupt) as error:
            line, code = last_words(error)
            if os.environ.get("CONDRL_DEBUG", "") not in ("", "0"):
                traceback.print_exc()
            print_main(line)
            if os.environ.get("LOCAL_RANK", "0") != "0":  # the launcher kills the others as soon as one leaves
                time.sleep(HEAD_START)
            return code
        return 0


def last_words(error: BaseException) -> tuple[str, int]:
    """The line and the exit code for an error.

    Raises: the error itself, when a line cannot explain it.
    """
    match error:
        case UsageError():
            return f"error: {' '.join(str(error).splitlines())}", 2
        case RunError():
            return f"stopped: {' '.join(str(error).splitlines())}", 1
        case Stopped():
            return f"stopped by {error}; the same command with run.resume=auto resumes it", 128 + error.number
        case KeyboardInterrupt():
            return "interrupted", 130
        case _ if out_of_memory(error):
            return f"stopped: out of memory: {LESS} ({brief(error)})", 1
        case _ if gpu_failed(error):
            return f"stopped: the GPU failed: {OTHER_KERNELS} ({brief(error)})", 1
        case OSError() if error.errno in DISK:
            return f"stopped: {error}", 1
    raise error
