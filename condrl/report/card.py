"""The card of what a run tuned: README.md beside the weights, as the Hugging Face hub reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from condrl.errors import naming
from condrl.models.loading import hub_id
from condrl.models.lora import LORA_FILE, code_span
from condrl.report.charts import number
from condrl.report.run import DIVERSITY, Line, Run, change, recorded
from condrl.report.usage import (
    base_model,
    deployed_sampler,
    diffusers_code,
    lora_code,
    plugin_of,
    public_base,
    readers,
    sampler_text,
)

PICTURES = 4  # of the first held-out prompts, not of the best ones
HERE = "path/to/this/folder"


def write_card(
    run: Run,
    folder: Path,
    heldout: Mapping[str, Any],
    images: Sequence[Line] = (),
    strength: float = 1.0,
    place: str = HERE,
    claim: Callable[[Path], object] = lambda path: None,
    dtype: str = "float32",
    note: str | None = None,
) -> None:
    """Write README.md into a folder with what a run tuned, a LoRA or a pipeline, and the pictures that it shows.

    `heldout` is what was measured of it, `images` the lines of heldout.jsonl that are of it, `place` where it will be;
    `claim` is told each file before it is written. `dtype` is the precision of a pipeline's weights, `note` a remark on
    it.

    Raises: RunError when a file cannot be written.
    """
    drawn = (line for line in images if line.get("pictures"))
    shown = [line for line in drawn if (run.folder / line["pictures"]["tuned"]).is_file()][:PICTURES]
    for i, line in enumerate(shown):
        claim(picture := folder / "images" / f"{i}.png")
        with naming(picture):
            picture.parent.mkdir(exist_ok=True)
            picture.write_bytes((run.folder / line["pictures"]["tuned"]).read_bytes())
    parts = [
        summary(run),
        use(run, folder, strength, place, dtype, note),
        measured(run, heldout),
        limits(heldout, shown),
    ]
    text = front_matter(run, shown, (folder / "model_index.json").is_file()) + "\n".join(filter(None, parts))
    claim(path := folder / "README.md")
    with naming(path):
        path.write_text(text, "utf-8")


def front_matter(run: Run, shown: Sequence[Line], is_whole: bool) -> str:
    """What the hub reads: the base model, and prompts with pictures."""
    from huggingface_hub import ModelCardData

    base, plugin = hub_id(base_model(run)), plugin_of(run)
    widgets = [{"text": line["prompt"], "output": {"url": f"images/{i}.png"}} for i, line in enumerate(shown)]
    facts: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": [*([] if is_whole else ["lora"]), "text-to-image", *([plugin.family.tag] if plugin else []), "condrl"],
        "base_model": base,
        "base_model_relation": ("merge" if is_whole else "adapter") if base else None,
        "instance_prompt": shown[0]["prompt"] if shown else None,
        "widget": widgets or None,
    }
    data = ModelCardData(**facts)  # which leaves out what is None
    return f"---\n{data.to_yaml()}\n---\n\n"


def summary(run: Run) -> str:
    algorithm = (run.config.get("algorithm") or {}).get("name")
    rewards = run.rewards_in_words or "none"
    base = code_span(public_base(run.base))
    ended = "" if run.result else f"\nThe run has not ended: {recorded(run)}, and nothing is measured.\n"
    return f"# {run.name}\n\n{base}, tuned with condrl by {algorithm}. Rewards: {rewards}.\n{ended}"


def use(run: Run, folder: Path, strength: float, place: str, dtype: str, note: str | None) -> str:
    """How what is in the folder is loaded."""
    if (folder / "model_index.json").is_file():
        held = f"The weights are {dtype}" + (f": {note}." if note else ".")
        return f"## Use it\n\n```python\n{diffusers_code(run, place, None, dtype=dtype)}\n```\n\n{held}\n"
    parts = []
    if (folder / LORA_FILE).is_file():
        parts.append(f"With diffusers:\n\n```python\n{lora_code(run, place)}\n```\n")
    for file in sorted(folder.glob("*.safetensors")):
        if file.name != LORA_FILE:
            parts.append(f"With {readers(run)}: copy {code_span(file.name)} to their folder of LoRAs.\n")
    scaled = "" if strength == 1 else f" These weights have {strength:g} times what was tuned."
    parts.append(f"Strength 1 is what the files hold: alpha = rank.{scaled}\n")
    return "## Use it\n\n" + "\n".join(parts)


def measured(run: Run, heldout: Mapping[str, Any]) -> str:
    """A table of base, tuned and their paired difference; empty where nothing was measured."""
    if not heldout:
        return ""
    sampler, base = deployed_sampler(run), code_span(public_base(run.base))
    is_last = heldout == run.measured("lora")[0]  # of which alone the result has more
    measures = {**heldout, DIVERSITY: run.diversity} if is_last and run.diversity else heldout
    rows = "".join(f"| {name} | {change(dict(row))} |\n" for name, row in measures.items())
    prompts = len({line["row"] for line in run.images}) or "the run's"
    spent = f"\nThe path KL to the base is {number(run.path_kl)} nats.\n" if is_last and run.path_kl is not None else ""
    return f"""## Measured

On {prompts} held-out prompts, against {base}, both drawn from the same noise at strength 1 by
`{sampler.get("name")}` ({sampler_text(sampler)}). In brackets, the 95 % interval of the paired difference over prompts.

| measure | base to tuned, difference |
| --- | --- |
{rows}{spent}"""


def limits(heldout: Mapping[str, Any], shown: Sequence[Line]) -> str:
    """What nobody may conclude from the card."""
    unmeasured = "" if heldout else "Nothing was measured of it: whether it is better than its base is not known.\n"
    pictures = "The pictures are of the first held-out prompts, not the best ones.\n" if shown else ""
    return f"""## Limits

{unmeasured}{pictures}It was tuned on its rewards alone: what they do not measure may have become worse, and so may
prompts of other kinds than those that it was tuned on.
"""
