"""docs/theory.md: the names in it are the code's, the sections that are cited exist, and what it says of kappa holds."""

import pkgutil
import re

import pytest
import torch
from helpers import ROOT

from condrl.algorithms.credit import group_advantages, group_scale
from condrl.registry import REGISTRIES

PAGE = (ROOT / "docs" / "theory.md").read_text("utf-8")
PROSE = "\n".join(line for line in PAGE.splitlines() if not line.startswith("    "))
SECTIONS = [int(number) for number in re.findall(r"^## (\d+)\. ", PAGE, re.MULTILINE)]
NAMES = sorted(set(re.findall(r"`((?:condrl|plugins)(?:\.\w+)+)`", PAGE)))
NUMBERS = r"(\d+(?:(?:, | and )\d+)*)"


def found(name):
    """The object of a dotted name; plugins.<kind>s.<name> is a plugin, and what follows is beside it in its file."""
    room, kind, *rest = name.split(".")
    if room == "condrl":
        return pkgutil.resolve_name(name)
    plugin = REGISTRIES[kind.removesuffix("s")].find(rest[0]).target
    return pkgutil.resolve_name(".".join([plugin.__module__, *rest[1:]])) if rest[1:] else plugin


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_the_codes(name):
    assert found(name) is not None


@pytest.mark.parametrize(("kind", "room"), [("sampler", "samplers"), ("algorithm", "algorithms"), ("steering",) * 2])
def test_every_shipped_plugin_has_its_formulas(kind, room):
    assert {f"plugins.{room}.{name}" for name in REGISTRIES[kind]._shipped()} <= set(NAMES)


def test_sections_are_numbered_in_order():
    assert list(range(1, len(SECTIONS) + 1)) == SECTIONS


def test_sections_that_the_page_refers_to_exist():
    cited = re.findall(rf"section {NUMBERS}", PROSE) + re.findall(rf"(?<![\w)])\({NUMBERS}\)", PROSE)
    assert len(cited) > 5
    assert {int(n) for numbers in cited for n in re.findall(r"\d+", numbers)} <= set(SECTIONS)


def test_sections_that_the_code_cites_exist():
    files = [file for room in ("condrl", "plugins", "scripts", "tests") for file in (ROOT / room).rglob("*.py")]
    assert len(files) > 100
    for file in files:
        for numbers in re.findall(rf"docs/theory\.md {NUMBERS}", file.read_text("utf-8")):
            assert {int(n) for n in re.findall(r"\d+", numbers)} <= set(SECTIONS), file


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize(
    ("normalise", "leave_one_out", "share"),
    [
        (False, False, lambda size: 1 - 1 / size),
        (False, True, lambda size: 1.0),
        (True, False, lambda size: 1 - 2 / size),
    ],
)
def test_what_small_groups_do_to_kappa(size, normalise, leave_one_out, share):
    """E[c A z] / E[c], c the scale of an image's objective, over its value 1 for r = z ~ N(0, 1) (section 8)."""
    groups = torch.arange(100_000).repeat_interleave(size)
    z = torch.randn(len(groups), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = group_scale(z, groups) if normalise else torch.ones_like(z)
    pulls = (group_advantages(z, groups, False, leave_one_out) * scale * z).mean() / scale.mean()
    assert pulls.item() == pytest.approx(share(size), abs=0.01)
