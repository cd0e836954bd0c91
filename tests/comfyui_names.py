"""The names under which ComfyUI looks for the LoRA of a Stable Diffusion 1.5 or XL UNet (comfy/lora.py).

A name is a module's, by diffusers' names such as down_blocks.0.attentions.0.proj_in, in one of two spellings, and one of
the endings that tell apart what a layer has. Any other key of a file is left out with a warning.
"""

import re
from collections.abc import Iterable

KOHYA = "lora_unet_{}"  # with _ for every dot: lora_unet_down_blocks_0_attentions_0_proj_in
PROCESSORS = (
    "{}",
    "unet.{}",
)  # diffusers' attention processors of 2023: ...attn1.processor.to_q, to_out without its .0
ENDINGS = (
    ("lora_up.weight", "lora_down.weight", "alpha"),  # kohya
    ("lora_B.weight", "lora_A.weight"),  # peft
    ("lora.up.weight", "lora.down.weight"),  # diffusers, before peft
)
JOINED = ("_lora.up.weight", "_lora.down.weight")  # of processors: to_q_lora.up.weight


def bases(modules: Iterable[str]) -> set[str]:
    """What a key may begin with, of the modules of a UNet."""
    found = set()
    for module in modules:
        found.add(KOHYA.format(module.replace(".", "_")))
        processor = re.sub(r"\.to_out\.0$", ".to_out", module).replace(".to_", ".processor.to_")
        found |= {spelling.format(processor) for spelling in PROCESSORS}
    return found


def missed(keys: Iterable[str], modules: Iterable[str]) -> list[str]:
    """The keys of a LoRA's file that are left out."""
    known = bases(modules)
    endings = [*(f".{ending}" for kind in ENDINGS for ending in kind), *JOINED]
    return [key for key in keys if not any(key.endswith(e) and key.removesuffix(e) in known for e in endings)]
