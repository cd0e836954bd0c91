"""The two ways a run stops with a sentence instead of a traceback."""


class UsageError(ValueError):
    """What the user asked for cannot work; the message is one line that says what to change. Exit code 2."""


class RunError(RuntimeError):
    """A run that had begun cannot go on; the message says what happened and where. Exit code 1."""
