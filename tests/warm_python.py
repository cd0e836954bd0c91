"""Python with the libraries that condrl uses already imported, from which each command is forked: seconds less for each.

Reads requests as JSON lines: {"words", "cwd", "env", "out", "err"}; answers each with the command's exit code.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import sys
import traceback
import types
from pathlib import Path


def serve() -> None:
    import accelerate  # noqa: F401
    import diffusers  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            command(**request)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def command(words: list[str], cwd: str, env: dict[str, str], out: str, err: str) -> None:
    """Be that command, to its end."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY), (2, err, os.O_WRONLY)):
        os.dup2(os.open(path, flags), number)
    signal.alarm(300)  # as long as a command may take
    code = 0
    try:
        run(words)
    except SystemExit as error:
        code = exit_code(error.code)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(words: list[str]) -> None:
    sys.modules["__main__"] = types.ModuleType("__main__")
    if words[0] == "-m":
        sys.path[0] = str(Path.cwd())
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(words[0]).resolve().parent)
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def exit_code(code: object) -> int:
    if code is None or isinstance(code, int):
        return code or 0
    print(code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    serve()
