"""The rooms of the house: which may import which, and that the map of them in docs/house.md is right."""

import ast
import re
from pathlib import Path

import pytest
from helpers import ROOT, run_python

ROOMS = (  # from the ground up: a module imports from its own room and from those before it
    ("errors",),
    ("io", "registry"),
    ("config", "loading", "prompts", "processes"),
    ("diffusion",),
    ("models",),
    ("rewards",),
    ("algorithms",),
    ("toys", "shapes"),
    ("training",),
    ("report",),
    ("commands",),
)
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}


def modules():
    """Each module of condrl/ and plugins/ by its file."""
    files = [*(ROOT / "condrl").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]
    return sorted({file.resolve() for file in files if "assets" not in file.parts})


def imported(file):
    """The names below `condrl.` that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("condrl."):
            yield node.module.removeprefix("condrl.")
        elif isinstance(node, ast.Import):
            yield from (name.name.removeprefix("condrl.") for name in node.names if name.name.startswith("condrl."))


def test_no_import_runs_up():
    for file in modules():
        place = file.relative_to(ROOT)
        if place.parts[0] == "plugins" or place.name in ("__init__.py", "__main__.py"):
            continue
        room = place.with_suffix("").parts[1]
        for name in imported(file):
            other = name.partition(".")[0]
            assert other in FLOOR, f"{place} imports {name}"
            assert FLOOR[other] <= FLOOR[room], f"{place} imports {name}, which is above it"


def test_no_plugin_imports_another_and_none_is_imported_by_name():
    for file in modules():
        assert not [name for name in imported(file) if name.startswith("plugins")], file


def test_modules_do_not_import_each_other_in_circles():
    """At their tops; within functions they may look down their own floor."""
    known = {
        ".".join(file.relative_to(ROOT / "condrl").with_suffix("").parts): file
        for file in modules()
        if ROOT / "condrl" in file.parents
    }
    known = {name.removesuffix(".__init__"): file for name, file in known.items()}
    below = {}
    for name, file in known.items():
        tops = [n for n in ast.parse(file.read_text("utf-8")).body if isinstance(n, ast.ImportFrom) and n.module]
        found = {n.module.removeprefix("condrl.") for n in tops if n.module.startswith("condrl.")}
        found |= {
            f"{n.module.removeprefix('condrl.')}.{a.name}"
            for n in tops
            if n.module.startswith("condrl")
            for a in n.names
        }
        below[name] = found & known.keys() - {name}
    while leaves := {name for name, others in below.items() if not others & below.keys()}:
        for name in leaves:
            del below[name]
    assert not below


def test_the_map_names_every_file_with_its_first_sentence():
    page = (ROOT / "docs" / "house.md").read_text("utf-8")
    listed = dict(re.findall(r"^- `([\w/]+\.py)`: (.+)$", page, re.MULTILINE))
    expected = {}
    for file in modules():
        text = ast.get_docstring(ast.parse(file.read_text("utf-8")))
        if file.name != "__init__.py" and text:
            expected[file.relative_to(ROOT).as_posix()] = text.partition("\n")[0]
    assert listed == expected


@pytest.mark.slow
@pytest.mark.parametrize("code", ["import condrl", "import condrl.config", "import condrl.__main__"])
def test_importing_is_light(code, tmp_path):
    heavy = "[name for name in ('torch', 'diffusers', 'transformers', 'peft', 'open_clip') if name in sys.modules]"
    done = run_python("-c", f"{code}, sys; print({heavy})", cwd=tmp_path)
    assert done.stdout.strip() == "[]", done.stderr


def test_tests_lie_in_the_rooms_of_what_they_test():
    folders = {file.parent.relative_to(ROOT / "tests") for file in (ROOT / "tests").rglob("test_*.py")} - {Path()}
    rooms = {file.parent.relative_to(ROOT) for file in modules()}
    assert len(folders) > 10
    for folder in folders:
        assert (folder if folder.parts[0] == "plugins" else Path("condrl") / folder) in rooms
