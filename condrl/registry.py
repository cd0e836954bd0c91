"""Five registries (reward, sampler, algorithm, model, steering) and the places where a plugin's name is looked up.

A name is looked up among the plugins registered already, then as a file of that name in the shipped package,
then among the entry points of group `condrl.plugins`, then as `package.module:object`.
The keyword-only parameters of a plugin are its options in a config; what it is called with comes before them.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

from condrl.errors import UsageError, brief
from condrl.io.plugin_files import import_plugin
from condrl.io.plugin_files import load_file as load_file  # where users know it

T = TypeVar("T", bound=Callable[..., Any])
GROUP = "condrl.plugins"
COMMON = {  # keys of a plugin's section that are not its own: none of its options may have these names
    "reward": ("name", "batch", "weight", "smoothing"),
    "sampler": ("name", "steps", "spacing", "noise_steps"),
    "algorithm": ("name",),
    "model": ("name",),
    "steering": ("name", "rewards"),
}
GIVEN = {  # the arguments that a plugin is called with, beside its options
    "sampler": ("schedule", "times"),
    "algorithm": (),
    "model": ("device",),
    "steering": ("draws",),
}


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
    cached: bool = False  # of a reward: whether a repeated image keeps its score
    per: Literal["image", "group"] = "image"  # of a reward; a group is all images of a prompt row, given together
    differentiates: bool = False  # of a steering: whether it takes the gradient of rewards
    learned: bool = False  # of a steering: whether it draws by what a run learned of the base model, not by rewards

    @property
    def source(self) -> str:
        try:
            file = inspect.getsourcefile(inspect.unwrap(self.target))
        except (OSError, TypeError):  # defined interactively, or built in
            file = None
        return file or str(self.target.__module__)

    @property
    def description(self) -> str:
        return (inspect.getdoc(self.target) or "").split("\n")[0]

    @property
    def options(self) -> dict[str, Option]:
        """The keyword-only parameters, with their types and the comments beside them."""
        try:
            hints = type_hints(self.target)
        except Exception as error:  # an annotation is the user's code
            raise UsageError(
                f"the {self.kind} {self.name!r}: a type of its options cannot be read: {brief(error)}"
            ) from error
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


@functools.cache
def comments(target: Any) -> dict[str, str]:
    """`name: type = default  # comment` lines in the source of a class, its bases, or a function, by name."""
    bases = target.__mro__[1:-1] if inspect.isclass(target) else ()
    inherited = {name: note for base in reversed(bases) for name, note in _own_comments(base).items()}
    return inherited | _own_comments(target)


def _own_comments(target: Any) -> dict[str, str]:
    try:
        source = inspect.getsource(target)
    except (OSError, TypeError):  # defined interactively
        return {}
    found = re.findall(r"^\s*(\w+)\s*:[^#\n]*#[ ]*(.+)$", source, re.MULTILINE)
    return dict(reversed(found))  # the first comment on a name wins


def suggestion(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_plugin(plugin: Plugin) -> None:
    """Raises: UsageError when a plugin cannot be called, or an option of it could not be set."""
    what, target = f"the {plugin.kind} {plugin.name!r}", plugin.target
    if plugin.per not in ("image", "group") or (plugin.per == "group" and plugin.cached):
        raise UsageError(f"{what}: per must be image or group, and the scores of a group cannot be cached")
    if not inspect.isroutine(target) and not inspect.isclass(target):
        raise UsageError(f"{what} is a {type(target).__name__}: it should be a function or a class")
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (ValueError, TypeError) as error:  # of some functions written in C
        raise UsageError(f"{what}: its parameters cannot be inspected") from error
    taken = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}.intersection(COMMON[plugin.kind])
    if taken:
        raise UsageError(
            f"{what} ({plugin.source}) has an option {min(taken)!r}, which means something else for every "
            f"{plugin.kind}: give the option another name"
        )
    given = [name_of(p) for p in parameters if p.kind is not p.KEYWORD_ONLY]
    if plugin.kind != "reward":
        check_given(plugin, what, given)
    elif isinstance(target, type):
        check_options_alone(what, given)
        check_reward_class(what, target)
    else:
        check_signature(what, given, "(samples, prompts[, metadata][, *, option: type = default, ...])")
    if inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(vars(target).get("__call__")):
        raise UsageError(f"{what} is async: write def instead of async def")


def name_of(parameter: inspect.Parameter) -> str:
    """A parameter's name, with its stars."""
    return str(parameter).partition(":")[0].partition("=")[0]


def check_given(plugin: Plugin, what: str, given: list[str]) -> None:
    """Raises: UsageError when a plugin does not take what all of its kind are given, or is an unfinished dataclass."""
    expected = GIVEN[plugin.kind]
    more = given[len(expected) :]
    if more and "__dataclass_fields__" in vars(plugin.target):
        raise UsageError(f"{what}: write @dataclass(kw_only=True), so that a config can set {more[0]}")
    check_options_alone(what, more)
    if len(given) < len(expected):
        raise UsageError(
            f"{what} takes ({', '.join(given)}) where a {plugin.kind} takes ({', '.join(expected)}[, *, option: type = "
            "default, ...])"
        )
    annotated = inspect.isclass(plugin.target) and vars(plugin.target).get("__annotations__")
    if plugin.kind == "algorithm" and annotated and "__dataclass_fields__" not in vars(plugin.target):
        raise UsageError(
            f"{what} has fields and is not a dataclass: write @dataclass(kw_only=True) between @condrl.algorithm and "
            "the class"
        )


def check_options_alone(what: str, given: list[str]) -> None:
    """Raises: UsageError when a plugin has parameters that are neither passed to every plugin nor options."""
    if given:
        raise UsageError(f"{what}: write a * before {given[0]}, so that it is an option that a config can set")


def check_reward_class(what: str, target: type) -> None:
    """Raises: UsageError when the objects of a reward's class cannot be called as rewards are."""
    call = next((vars(base)["__call__"] for base in target.__mro__ if "__call__" in vars(base)), None)
    if call is None:
        raise UsageError(f"{what} is a class without a method __call__(self, samples, prompts)")
    given = [name_of(p) for p in inspect.signature(call).parameters.values()]
    check_signature(f"{what}: __call__", given[1:], "(self, samples, prompts[, metadata])")


def check_signature(what: str, given: list[str], shape: str) -> None:
    """Raises: UsageError when the parameters that are not options are not those of a reward."""
    if given not in (["samples", "prompts"], ["samples", "prompts", "metadata"]):
        raise UsageError(f"{what} takes ({', '.join(given)}) where a reward takes {shape}")


def check_name(plugin: Plugin) -> None:
    """Raises: UsageError on a name that a config or the record of a run cannot hold."""
    if not re.fullmatch(r"[A-Za-z_][\w-]*", plugin.name):
        raise UsageError(
            f"{plugin.name!r} ({plugin.source}) cannot name a {plugin.kind} in a config: use letters, digits and _, "
            f'as in @condrl.{plugin.kind}(name="my_{plugin.kind}")'
        )
    if plugin.kind == "reward" and (plugin.name == "total" or plugin.name.endswith(("_std", "_ci95"))):
        raise UsageError(
            f"a reward cannot be called {plugin.name!r} ({plugin.source}): a run records total, ..._std and ..._ci95 "
            "itself"
        )


class Registry:
    """The plugins of one kind; calling it registers one.

        @condrl.reward
        def redness(samples, prompts, *, channel: int = 0): ...

        @condrl.reward(differentiable=False)
        def file_size(samples, prompts): ...

        @condrl.reward(per="group")
        def unlike_the_others(samples, prompts): ...

    Raises: UsageError on a name that another file has, that its own file has given already or that cannot be used, and
    on a target that no config can call.
    """

    def __init__(self, kind: str, home: str) -> None:
        self.kind, self.home = kind, home
        self.plugins: dict[str, Plugin] = {}
        self.imports: dict[str, Any] = {}  # by name, the import of the module in which it was defined

    @overload
    def __call__(self, target: T, *, name: str | None = None) -> T: ...

    @overload
    def __call__(
        self,
        target: None = None,
        *,
        name: str | None = None,
        differentiable: bool = True,
        cached: bool = False,
        per: Literal["image", "group"] = "image",
        differentiates: bool = False,
        learned: bool = False,
    ) -> Callable[[T], T]: ...

    def __call__(self, target: T | None = None, *, name: str | None = None, **flags: Any) -> Any:
        if target is None:
            return lambda t: self(t, name=name, **flags)
        plugin = Plugin(self.kind, name or snake_case(getattr(target, "__name__", "")), target, **flags)
        check_plugin(plugin)
        check_name(plugin)
        existing = self.plugins.get(plugin.name)
        taken = existing.source if existing else self._shipped().get(plugin.name, plugin.source)
        is_run_again = existing is not None and existing.target.__module__ == target.__module__ == "__main__"  # a cell
        if not is_run_again and Path(taken).resolve() != Path(plugin.source).resolve():
            raise UsageError(f"two files define the {self.kind} {plugin.name!r}: {taken} and {plugin.source}")
        now = importing(target)
        if existing and existing.target is not target and now is not None and self.imports.get(plugin.name) is now:
            raise UsageError(f"{plugin.source} defines the {self.kind} {plugin.name!r} twice: give one another name")
        self.plugins[plugin.name], self.imports[plugin.name] = plugin, now
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
            own = f"one of yours needs its file, as in plugins=[my_{self.kind}.py], and @condrl.{self.kind} in it"
            raise UsageError(
                f"unknown {self.kind} {name!r}.{suggestion(name, known)} Available: {', '.join(known)}; {own}"
            )
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
        """The shipped plugin files by name; other modules may lie beside them."""
        folders = [Path(folder) for folder in importlib.import_module(self.home).__path__]
        files = [file for folder in folders for file in folder.glob("*.py") if not file.stem.startswith("_")]
        return {file.stem: str(file) for file in files if f"\n@condrl.{self.kind}" in file.read_text("utf-8")}

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
        """Register what an entry point or a dotted path names, unless importing it has done so under this name."""
        if name in self.plugins or not callable(target) or self._belongs_elsewhere(target):
            return
        existing = next((plugin for plugin in self.plugins.values() if plugin.target is target), None)
        plugin = dataclasses.replace(existing or Plugin(self.kind, name, target), name=name)  # with its flags
        check_plugin(plugin)
        self.plugins[name] = plugin

    def _belongs_elsewhere(self, target: Any) -> bool:
        others = (registry for registry in REGISTRIES.values() if registry is not self)
        return any(plugin.target is target for registry in others for plugin in registry.plugins.values())


def importing(target: Any) -> Any:
    """What is another object each time that the module of a plugin is imported or reloaded.

    None where a name may be defined again: in a notebook's cells, and within a function that is called again.
    """
    if target.__module__ == "__main__" or "<locals>" in getattr(target, "__qualname__", ""):
        return None
    return getattr(sys.modules.get(target.__module__), "__spec__", None)


def snake_case(name: str) -> str:
    """`StableDiffusion` -> `stable_diffusion`, `DDPO` -> `ddpo`."""
    return re.sub(r"(?<!^)(?<!_)(?=[A-Z][a-z])", "_", name).lower()


reward = Registry("reward", "condrl.plugins.rewards")
sampler = Registry("sampler", "condrl.plugins.samplers")
algorithm = Registry("algorithm", "condrl.plugins.algorithms")
model = Registry("model", "condrl.plugins.models")
steering = Registry("steering", "condrl.plugins.steering")
REGISTRIES = {registry.kind: registry for registry in (reward, sampler, algorithm, model, steering)}
