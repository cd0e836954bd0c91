"""The ways a run stops with a sentence instead of a traceback, and the exit codes of the scripts."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)  # full, read-only or broken
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # that ask a run to stop


class UsageError(ValueError):
    """What the user asked for cannot work; the message is one line that says what to change. Exit code 2."""


class RunError(RuntimeError):
    """A run that had begun cannot go on; the message says what happened and where. Exit code 1."""


class Stopped(BaseException):  # like KeyboardInterrupt, so that no plugin's `except Exception` keeps it
    """A run was asked to stop, and has saved what it needs to go on. Exit code 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def say(text: str) -> None:
    """Print a line to stderr, once for the processes of a machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def exit_code(work: Callable[[], object]) -> int:
    """Do the work of a script; its errors become one line and an exit code, 130 after Ctrl+C."""
    try:
        work()
    except UsageError as error:
        say(f"error: {error}")
        return 2
    except RunError as error:
        say(f"stopped: {error}")
        return 1
    except Stopped as stop:
        say(f"stopped by {stop}; the same command with run.resume=auto goes on")
        return 128 + stop.number
    except OSError as error:
        if error.errno not in DISK:
            raise
        say(f"stopped: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    return 0
