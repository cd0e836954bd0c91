"""Two epochs of every algorithm on a toy, started in one process or several; the first saves the gradients.

torchrun --nproc-per-node 2 tests/distributed.py FOLDER
"""

import sys
from pathlib import Path

import torch
from helpers import ALGORITHMS, toy_words
from safetensors.torch import save_file

from condrl.loading import load_config
from condrl.prompts import load_prompts
from condrl.training.build import make_trainer

# six prompt rows of four: two rows come twice, and may be in both processes; batches end within groups
KEPT = ["algorithm.keep_graph=true", "train.updates_per_epoch=1"]  # of reinforce
SPLIT = ["train.prompts_per_epoch=6", "train.images_per_prompt=8", "train.rollout_batch=12", "train.loss_batch=7"]


def gradients(name: str, folder: Path, *more: str) -> dict[str, torch.Tensor]:
    """Those of each update, over policy and value network, and the last line's means."""
    alone = ["train.images_per_prompt=1"] if name == "diffusion_dpo" else []
    config = load_config([*toy_words(name, folder), *SPLIT, *alone, *more])
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.run.seed)
    trainer = make_trainer(config, load_prompts(config.prompts.train, "prompts.train"))
    found, step = {}, trainer.learner.optimizer.step

    def note() -> None:
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainer.learner.parameters]
        found[f"{name} {len(found)} {' '.join(more)}"] = torch.cat([part.flatten() for part in parts])
        step()

    trainer.learner.optimizer.step = note
    for epoch in range(2):
        line = trainer.run_epoch(epoch)
    trainer.processes.check_same(trainer.learner.parameters)
    if name == ALGORITHMS[-1]:
        trainer.processes.end()
    found[f"{name} reward {' '.join(more)}"] = torch.tensor(line.get("reward/total", line["loss"]))
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found = gradients("reinforce", folder / "kept", *KEPT)
    for name in ALGORITHMS:
        found |= gradients(name, folder / name)
    if all((folder / name / "metrics.jsonl").exists() for name in ALGORITHMS):
        save_file(found, folder / "gradients.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
