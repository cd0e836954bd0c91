"""Fine-tune a text-to-image diffusion model with rewards.

    accelerate launch scripts/finetune.py                                       configs/quickstart.yaml
    accelerate launch scripts/finetune.py my.yaml train.lr=1e-4                 later words win
    accelerate launch scripts/finetune.py plugins=[my_reward.py] rewards.redness.weight=1

Writes runs/<run.name>/: config.yaml, metrics.jsonl (a line per epoch), images/, lora/, result.json.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

from condrl.config import Config, config_help, load_config, to_yaml
from condrl.errors import RunError, UsageError

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"


def main(words: list[str]) -> int:
    if {"-h", "--help"} & set(words):
        print(__doc__, config_help(), sep="\n")
        return 0
    try:
        finetune(words)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def finetune(words: list[str]) -> None:
    """Check everything that can be checked, then measure, tune, measure again and save."""
    begun = time.monotonic()
    from_file = any("=" not in word for word in words)
    config = load_config(words if from_file else [str(QUICKSTART), *words])

    from condrl.prompts import load_prompts
    from condrl.run import check_combination, make_rewards, prepare_folder

    train = load_prompts(config.prompts.train, "prompts.train")
    heldout = load_prompts(config.prompts.heldout, "prompts.heldout") if config.prompts.heldout else []
    check_combination(config)
    rewards = make_rewards(config)
    folder = prepare_folder(config)
    (folder / "config.yaml").write_text(to_yaml(config))
    run(config, train, heldout[: config.evaluate.prompts], rewards, folder, begun)


def run(config: Config, train: Any, heldout: Any, rewards: Any, folder: Path, begun: float) -> None:
    import torch

    from condrl.report import save_comparison
    from condrl.run import make, make_accelerator, make_measures, make_policy, peak_memory_gb, provenance, write_json
    from condrl.trainer import Trainer

    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    torch.manual_seed(config.run.seed)
    accelerator = make_accelerator(config)
    policy = make_policy(config, accelerator.device)
    policy.model.encode([row.prompt for row in [*train, *heldout]])
    policy.model.finish_encoding()
    trainer = Trainer(config, policy, make("algorithm", config.algorithm), rewards, train, accelerator)
    measures = make_measures(config)
    before = heldout_evaluation(config, policy, heldout, measures, "base")
    try:
        trainer.fit()
    finally:  # also when interrupted
        policy.model.save_adapter(folder / "lora")
        print(f"the LoRA after {trainer.epoch} epochs is in {folder / 'lora'}", flush=True)
    after = heldout_evaluation(config, policy, heldout, measures, "tuned")
    result: dict[str, Any] = {
        "seconds": round(time.monotonic() - begun, 1),
        "peak_memory_gb": round(peak_memory_gb(accelerator.device), 3),
        "images": trainer.images,
        "unet_calls": policy.model.evaluations,
        "seed": config.run.seed,
        **provenance(),
    }
    if before and after:
        result["heldout"] = {
            name: {"base": dataclasses.asdict(before.measures[name]), "tuned": dataclasses.asdict(after.measures[name])}
            for name in before.measures
        }
        save_comparison(folder / "images" / "before_after.png", before.pictures, after.pictures, before.labels)
    write_json(folder / "result.json", result)
    accelerator.end_training()
    print(summary(result, folder))


def heldout_evaluation(config: Config, policy: Any, heldout: Any, measures: Any, who: str) -> Any:
    """Measure the policy on the held-out prompts; None when there are none."""
    from condrl.evaluate import evaluate

    if not heldout:
        return None
    options = config.evaluate
    seed = 1_000_000 + config.run.seed * 100_000  # far from the seeds a user would sample with
    found = evaluate(
        policy, heldout, measures, seed, options.images_per_prompt, config.train.rollout_batch, options.pictures
    )
    print(f"held-out, {who}: " + ", ".join(f"{name} {e.mean:.3f}" for name, e in found.measures.items()), flush=True)
    return found


def summary(result: dict[str, Any], folder: Path) -> str:
    """The result as a table."""
    lines = [f"{'held-out':<24}{'base':>24}{'tuned':>24}"]
    for name, row in result.get("heldout", {}).items():
        cells = [f"{e['mean']:.3f} [{e['ci95'][0]:.3f}, {e['ci95'][1]:.3f}]" for e in (row["base"], row["tuned"])]
        lines.append(f"{name:<24}" + "".join(f"{cell:>24}" for cell in cells))
    lines.append(
        f"{result['seconds']:.0f} s, {result['peak_memory_gb']:.2f} GB, {result['images']} images; see {folder}/"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
