"""Four registries (reward, sampler, algorithm, model) and the places where a plugin's name is looked up.

A name is looked up among the plugins registered already, then as a file of that name in the shipped package,
then among the entry points of group `condrl.plugins`, then as `package.module:object`.
The keyword-only parameters of a plugin are its options in a config.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, overload

from condrl.errors import UsageError

T = TypeVar("T", bound=Callable[..., Any])
GROUP = "condrl.plugins"


@dataclass(frozen=True)
class Option:
    """A keyword-only parameter of a plugin; `default` is `inspect.Parameter.empty` when it must be given."""

    name: str
    type: Any
    default: Any
    comment: str


@dataclass(frozen=True)
class Plugin:
    """A registered function or class."""

    kind: str
    name: str
    target: Callable[..., Any]
    differentiable: bool = True  # of a reward: whether gradients flow through it
    cached: bool = False  # of a reward: whether an image that comes again keeps its score

    @property
    def source(self) -> str:
        return inspect.getsourcefile(inspect.unwrap(self.target)) or self.target.__module__

    @property
    def description(self) -> str:
        return (inspect.getdoc(self.target) or "").split("\n")[0]

    @property
    def options(self) -> dict[str, Option]:
        """The keyword-only parameters, with their types and the comments beside them."""
        hints = type_hints(self.target)
        notes = comments(self.target)
        return {
            p.name: Option(p.name, hints.get(p.name, Any), p.default, notes.get(p.name, ""))
            for p in inspect.signature(self.target).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        }


def type_hints(target: Any) -> dict[str, Any]:
    """Resolved annotations of a function, or of a class's constructor parameters."""
    if inspect.isclass(target) and not hasattr(target, "__dataclass_fields__"):
        target = target.__init__
    return typing.get_type_hints(target)


def comments(target: Any) -> dict[str, str]:
    """`name: type = default  # comment` lines in the source of a class, its bases, or a function, by name."""
    bases = target.__mro__[1:-1] if inspect.isclass(target) else ()
    inherited = {name: note for base in reversed(bases) for name, note in _own_comments(base).items()}
    return inherited | _own_comments(target)


def _own_comments(target: Any) -> dict[str, str]:
    try:
        source = inspect.getsource(target)
    except OSError:  # typed at a prompt
        return {}
    found = re.findall(r"^\s*(\w+)\s*:[^#\n]*#[ ]*(.+)$", source, re.MULTILINE)
    return dict(reversed(found))  # the first comment on a name wins


def suggestion(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


class Registry:
    """The plugins of one kind; calling it registers one.

        @condrl.reward
        def redness(samples, prompts, *, channel: int = 0): ...

        @condrl.reward(differentiable=False)
        def file_size(samples, prompts): ...

    Raises: UsageError on a name that is taken by another file.
    """

    def __init__(self, kind: str, home: str) -> None:
        self.kind, self.home = kind, home
        self.plugins: dict[str, Plugin] = {}

    @overload
    def __call__(self, target: T, *, name: str | None = None) -> T: ...

    @overload
    def __call__(
        self, target: None = None, *, name: str | None = None, differentiable: bool = True, cached: bool = False
    ) -> Callable[[T], T]: ...

    def __call__(self, target: T | None = None, *, name: str | None = None, **flags: bool) -> Any:
        if target is None:
            return lambda t: self(t, name=name, **flags)
        plugin = Plugin(self.kind, name or snake_case(target.__name__), target, **flags)
        known = self.plugins.get(plugin.name)
        taken = known.source if known else self._shipped().get(plugin.name, plugin.source)
        if Path(taken).resolve() != Path(plugin.source).resolve():
            raise UsageError(f"two files define the {self.kind} {plugin.name!r}: {taken} and {plugin.source}")
        self.plugins[plugin.name] = plugin
        return target

    def find(self, name: str) -> Plugin:
        """The plugin of that name.

        Raises: UsageError with the list of names when there is none, or saying why it cannot be imported.
        """
        for load in (self._load, lambda _: self._load_entry_points()):
            if name not in self.plugins:
                load(name)
        if name not in self.plugins:
            known = self.names()
            raise UsageError(f"unknown {self.kind} {name!r}.{suggestion(name, known)} There are: {', '.join(known)}")
        return self.plugins[name]

    def names(self) -> list[str]:
        """Registered and shipped plugins."""
        return sorted({*self.plugins, *self._shipped()})

    def all(self) -> list[Plugin]:
        """Every registered and shipped plugin and every entry point of this kind, imported."""
        self._load_entry_points()
        return [self.find(name) for name in self.names()]

    def _load_entry_points(self) -> None:
        for point in importlib.metadata.entry_points(group=GROUP):
            import_plugin(f"entry point {point.name!r}", point.load)

    def _shipped(self) -> dict[str, str]:
        """The shipped plugin files by name."""
        folders = [Path(folder) for folder in importlib.import_module(self.home).__path__]
        files = [file for folder in folders for file in folder.glob("*.py") if not file.stem.startswith("_")]
        return {file.stem: str(file) for file in files}

    def _load(self, name: str) -> None:
        if name in self._shipped():
            import_plugin(f"{self.kind} {name!r}", lambda: importlib.import_module(f"{self.home}.{name}"))
            return
        points = importlib.metadata.entry_points(group=GROUP, name=name)
        if len(points) > 1:
            raise UsageError(f"two packages define the plugin {name!r}: {' and '.join(p.value for p in points)}")
        for point in points:
            self._adopt(name, import_plugin(f"entry point {name!r}", point.load))
        if re.fullmatch(r"[\w.]+:\w+", name):
            module, _, attribute = name.partition(":")
            loaded = import_plugin(name, lambda: importlib.import_module(module))
            if not hasattr(loaded, attribute):
                raise UsageError(f"the module {module} has no {attribute!r}.{suggestion(attribute, vars(loaded))}")
            self._adopt(name, getattr(loaded, attribute))

    def _adopt(self, name: str, target: Any) -> None:
        """Register what an entry point or a dotted path names, unless importing it has done so."""
        if name not in self.plugins and callable(target) and not self._belongs_elsewhere(target):
            self.plugins[name] = Plugin(self.kind, name, target)

    def _belongs_elsewhere(self, target: Any) -> bool:
        others = (registry for registry in REGISTRIES.values() if registry is not self)
        return any(plugin.target is target for registry in others for plugin in registry.plugins.values())


def snake_case(name: str) -> str:
    """`StableDiffusion` -> `stable_diffusion`, `DDPO` -> `ddpo`."""
    return re.sub(r"(?<!^)(?<!_)(?=[A-Z][a-z])", "_", name).lower()


def import_plugin(what: str, load: Callable[[], Any]) -> Any:
    """Run an import; its failures become one line.

    Raises: UsageError naming the line of a syntax error, the missing package, or the exception.
    """
    try:
        return load()
    except UsageError:
        raise
    except SyntaxError as error:
        raise UsageError(f"{what}: {error.filename}, line {error.lineno}: {error.msg}") from error
    except ModuleNotFoundError as error:
        raise UsageError(f"{what} needs the package {error.name!r}, which is not installed: pip install it") from error
    except Exception as error:  # user code: anything may go wrong in it
        raise UsageError(f"{what} failed while it was imported: {type(error).__name__}: {error}") from error


def load_file(path: str) -> ModuleType:
    """Import a user's plugin file, once; what it registers is then found by name.

    Raises: UsageError when the file is missing or cannot be imported.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise UsageError(f"plugins: there is no file {path}")
    name = f"condrl_user_{re.sub(r'[^0-9a-zA-Z]', '_', str(file))}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UsageError(f"plugins: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    loader = spec.loader
    try:
        import_plugin(f"plugins: {path}", lambda: loader.exec_module(module))
    except UsageError:
        del sys.modules[name]
        raise
    return module


reward = Registry("reward", "condrl.plugins.rewards")
sampler = Registry("sampler", "condrl.plugins.samplers")
algorithm = Registry("algorithm", "condrl.plugins.algorithms")
model = Registry("model", "condrl.models")
REGISTRIES = {registry.kind: registry for registry in (reward, sampler, algorithm, model)}
