"""Import a user's plugin file, and again when it has changed; what fails becomes one line.

It may import the files beside it, at its top; an installed module of the same name comes first.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from condrl.errors import Stopped, UsageError, brief, out_of_memory
from condrl.io.files import PACKAGE, expanded

SCRIPTS = (PACKAGE.parent / "scripts").resolve()
SOURCES: dict[str, dict[Path, bytes]] = {}  # what a plugin's module was imported from, files beside it too
NEIGHBOURS: dict[Path, dict[str, ModuleType]] = {}  # modules imported from beside plugin files, by folder and name


def import_plugin(what: str, load: Callable[[], Any]) -> Any:
    """Run an import; its failures become one line.

    Raises: UsageError naming the line of a syntax error, the missing package, or the exception.
    """
    try:
        return load()
    except (UsageError, KeyboardInterrupt, Stopped):
        raise
    except SyntaxError as error:
        raise UsageError(f"{what}: {error.filename}, line {error.lineno}: {error.msg}") from error
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{what} needs the module {error.name!r}, which is neither installed nor beside the file: pip install it"
        ) from error
    except BaseException as error:  # user code: anything may go wrong in it, and it may call sys.exit
        if out_of_memory(error):
            raise
        raise UsageError(f"{what} failed while it was imported: {brief(error)}") from error


def load_file(path: str) -> ModuleType:
    """Import a user's plugin file, once, and again when it or a module beside it has changed.

    What it registers is then found by name.

    Raises: UsageError when the file is missing or cannot be imported.
    """
    file = expanded(path).resolve()
    if not file.is_file() or file.suffix != ".py":
        why = "is a folder: give the .py files in it" if file.is_dir() else "is not a .py file"
        raise UsageError(f"plugins: {path} {why}" if file.exists() else f"plugins: there is no file {path}")
    name = f"condrl_user_{hashlib.sha256(str(file).encode()).hexdigest()[:16]}"
    if name in sys.modules and contents(SOURCES[name]) == SOURCES[name]:
        return sys.modules[name]
    for neighbour in NEIGHBOURS.pop(file.parent, {}) if name in sys.modules else ():
        sys.modules.pop(neighbour, None)
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UsageError(f"plugins: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module

    def run() -> None:  # from the text: bytecode of an edit within the same second would be taken for the newest
        exec(compile(file.read_bytes(), file, "exec", dont_inherit=True), vars(module))

    try:
        with importing_beside(file.parent):
            import_plugin(f"plugins: {path}", run)
    except UsageError:
        del sys.modules[name]
        raise
    origins = (getattr(beside, "__file__", None) for beside in NEIGHBOURS[file.parent].values())
    SOURCES[name] = contents([file, *(Path(origin) for origin in origins if origin)])
    return module


def contents(files: Iterable[Path]) -> dict[Path, bytes]:
    """What files hold that there are."""
    return {file: file.read_bytes() for file in files if file.is_file()}


@contextmanager
def importing_beside(folder: Path) -> Iterator[None]:
    """Within it, modules that lie in a folder can be imported, after all installed ones.

    Those of other plugins' folders are out of sight: the `helper.py` beside each plugin file is its own.
    """
    for name in {name for modules in NEIGHBOURS.values() for name in modules}:
        sys.modules.pop(name, None)
    sys.modules.update(NEIGHBOURS.get(folder, {}))
    before = {name.partition(".")[0] for name in sys.modules} - NEIGHBOURS.get(folder, {}).keys()
    scripts = [entry for entry in sys.path if Path(entry).resolve() == SCRIPTS]  # their sample.py is not the plugin's
    sys.path[:] = [*(entry for entry in sys.path if entry not in scripts), str(folder)]
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.path[:0] = scripts
        new = {name: module for name, module in sys.modules.items() if name.partition(".")[0] not in before}
        NEIGHBOURS[folder] = {name: module for name, module in new.items() if lies_in(folder, name, module)}
        for modules in NEIGHBOURS.values():  # for what imports them later on
            sys.modules.update(modules)


def lies_in(folder: Path, name: str, module: ModuleType) -> bool:
    """Whether a module was imported from a folder by its own name, or belongs to a package that was."""
    top, spec = name.partition(".")[0], getattr(module, "__spec__", None)
    origins = [*(getattr(spec, "submodule_search_locations", None) or ()), getattr(spec, "origin", None) or ""]
    return any(Path(p) == folder / f"{top}.py" or Path(p).is_relative_to(folder / top) for p in origins)
