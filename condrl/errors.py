"""The two ways a run stops with a sentence instead of a traceback, and the exit codes of the scripts."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UsageError(ValueError):
    """What the user asked for cannot work; the message is one line that says what to change. Exit code 2."""


class RunError(RuntimeError):
    """A run that had begun cannot go on; the message says what happened and where. Exit code 1."""


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
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
