"""What a LoRA's card says of its measurements."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from condrl.errors import naming
from condrl.report.run import change

HEADING = "\n## Measured\n"


def add_to_card(card: Path, heldout: Mapping[str, Mapping[str, Any]], sampler: Mapping[str, Any], prompts: int) -> None:
    """Write what was measured on held-out prompts at the end of a LoRA's README.md, in place of what stood there.

    Raises: RunError when the file cannot be written.
    """
    if not heldout or not card.is_file():
        return
    with naming(card):
        text = card.read_text("utf-8").partition(HEADING)[0]
        card.write_text(text + HEADING + measured(heldout, sampler, prompts), "utf-8")


def measured(heldout: Mapping[str, Mapping[str, Any]], sampler: Mapping[str, Any], prompts: int) -> str:
    """A table of base, tuned and their paired difference."""
    options = ", ".join(f"{key} {value}" for key, value in sampler.items() if key != "name" and value is not None)
    rows = "".join(f"| {name} | {change(dict(row))} |\n" for name, row in heldout.items())
    return f"""
On {prompts} held-out prompts, base and tuned drawn from the same noise by `{sampler.get("name")}` ({options}).
In brackets, the 95 % interval of the paired difference over prompts.

| measure | base to tuned, difference |
| --- | --- |
{rows}
It was tuned on its rewards alone: what they do not measure may have become worse. `report.html` of the run shows the
images that lost most.
"""
