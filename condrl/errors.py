"""The ways a run stops with a sentence instead of a traceback, and the exit codes of the scripts."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable


class UsageError(ValueError):
    """What the user asked for cannot work; the message is one line that says what to change. Exit code 2."""


class RunError(RuntimeError):
    """A run that had begun cannot go on; the message says what happened and where. Exit code 1."""


class Stopped(Exception):
    """A run was asked to stop, and has saved what it needs to go on. Exit code 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def exit_code(work: Callable[[], object]) -> int:
    """Do the work of a script; its errors become one line and an exit code, 130 after Ctrl+C."""
    try:
        work()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except Stopped as stop:
        print(f"stopped by {stop}; the same command with run.resume=auto goes on", file=sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
