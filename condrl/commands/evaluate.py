"""Evaluate a fine-tuned model beside its base, or a steered one beside itself, on the same prompts and seeds.

    condrl evaluate runs/quickstart                            what the run measured last, image by image
    condrl evaluate runs/quickstart rewards.sharpness.weight=1 evaluate.images_per_prompt=4
    condrl evaluate runs/quickstart --prompts my_prompts.txt --steps 5 10 20 --strength 0.5 1
    condrl evaluate runs/quickstart --samplers ddim ddim,eta=0 dpm_solver_pp
    condrl evaluate runs/quickstart --steer smc,particles=4    base and tuned, drawn as ever beside steered
    condrl evaluate --steer best_of_n,n=4 rewards.shapes.weight=1 evaluate.prompts=64      the base alone

The first argument is a run's folder, or a LoRA's folder or file; one without a run needs --prompts and measures. With
--steer it may be left out: then it is the quickstart's base model, or model.path, that is steered. The rewards steer.
`key=value` overrides change the model, the sampler and how much is measured as they do for condrl finetune; measures
that they name replace the run's. Code and servers that a run's config names are used with --trust only.

Writes RUN/evaluation/: evaluation.jsonl (a line per image, sampler and strength), evaluation.json (the summary) and
pictures/. Several samplers, numbers of steps and strengths are measured one after the other, the base once per sampler.
With --steer each image is drawn plainly and steered, and the summary has the network calls of both.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from condrl.commands.arguments import fit_adapter, one_of_several, parser_of
from condrl.commands.console import exit_code
from condrl.commands.evaluation import Writer, report, started
from condrl.commands.plan import SUMMARY, Plan, measures_of, read_plan
from condrl.config import base_name
from condrl.errors import blaming, visible, warn_of_address_limit

if TYPE_CHECKING:
    from tqdm import tqdm

    from condrl.diffusion.policy import Policy
    from condrl.prompts import Row
    from condrl.training.evaluate import Batch, Draw, Evaluation
    from condrl.training.steering import Steer


def parse(words: list[str]) -> argparse.Namespace:
    parser = parser_of("evaluate", __doc__)
    parser.add_argument("words", nargs="*", metavar="RUN key=value")
    parser.add_argument("--prompts", metavar="FILE", help=".txt or .jsonl; by default the run's held-out prompts")
    parser.add_argument("--samplers", nargs="+", default=[], metavar="NAME[,option=value]", help="one after the other")
    parser.add_argument(
        "--steps", type=one_of_several(int), nargs="+", default=[], help="numbers of steps, each with every sampler"
    )
    parser.add_argument(
        "--strength",
        type=one_of_several(float),
        nargs="+",
        default=[1.0],
        help="of the LoRA; 1 is what was tuned, 0 no LoRA at all",
    )
    parser.add_argument("--steer", metavar="NAME[,option=value]", help="a steering plugin, such as smc,particles=8")
    parser.add_argument("--pictures", type=int, default=8, help="how many images are written, base and tuned")
    parser.add_argument("--out", type=Path, metavar="DIR", help="by default the run's evaluation/")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier evaluation there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the summary there")
    parser.add_argument("--trust", action="store_true", help="the run's config may name plugins and servers")
    parser.add_argument("--batch", type=int, help="images drawn at a time; by default the run's train.rollout_batch")
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    return parser.parse_intermixed_args(words)


def main(words: list[str]) -> int:
    """Exit code: 0, 1 when it had to stop, 2 for bad input, 130 after Ctrl+C."""
    return exit_code(lambda: evaluate(parse(words)))


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Check everything that can be checked without the model, then draw and measure; returns the summary."""
    from condrl.io.records import write_json

    begun = time.monotonic()
    warn_of_address_limit()
    plan = read_plan(args)
    result = compare(plan, begun)
    if args.json:
        write_json(args.json, result)
    lowered = {name for name, options in plan.config.rewards.items() if options["weight"] < 0}
    print(visible("\n".join([*report(result, lowered), f"see {plan.folder.path}/"])))
    return result


def evaluated(arguments: Sequence[str], **options: Any) -> dict[str, Any]:
    """The summary that the command would write with these arguments and options.

    Raises: UsageError as the command does.
    """
    out = options.pop("out")
    return evaluate(argparse.Namespace(words=arguments, json=None, out=Path(out) if out else None, **options))


# ---------------------------------------------------------------------------------------------- measuring


def compare(plan: Plan, begun: float) -> dict[str, Any]:
    """Draw and measure all, write every image's line and the summary, which it returns."""
    from tqdm import tqdm

    from condrl.io.records import write_json
    from condrl.training.host import provenance

    policies = make_policies(plan)
    try_lora(plan, policies[0])
    try_measures(plan, policies[0])
    if plan.steer:
        try_steering(plan.steer, policies, plan.rows)
    images = len(plan.rows) * plan.per_prompt * len(policies) * (1 + len(plan.strengths)) * (2 if plan.steer else 1)
    with started(plan.folder) as record, tqdm(total=images, unit="image", disable=None) as bar:
        writer, steer = Writer(plan, record), plan.steer
        evaluations = list(
            steered_beside_plain(plan, steer, policies, bar, writer)
            if steer
            else compared_with_base(plan, policies, bar, writer)
        )
        result = {
            "run": str(plan.source) if plan.source else None,
            "lora": str(plan.tuned) if plan.tuned else None,
            "base": base_name(plan.config.model),
            "steer": plan.steer.section if plan.steer else None,
            "prompts": len(plan.rows),
            "images_per_prompt": plan.per_prompt,
            "seed": plan.config.run.seed,
            "evaluations": evaluations,
            "seconds": round(time.monotonic() - begun, 1),
            **provenance(),
        }
        write_json(plan.folder.file(SUMMARY), result)
    return result


def make_policies(plan: Plan) -> list[Policy]:
    """The base with each sampler, on a model that has encoded the prompts."""
    from condrl.training.build import deployed, make_policy
    from condrl.training.host import set_threads_and_seed

    set_threads_and_seed(plan.config)
    policy = make_policy(plan.config, plan.device)
    with blaming("model", plan.config.model["name"]):
        policy.model.encode([row.prompt for row in plan.rows])
    return [deployed(config, policy) for config in plan.configs]


def try_lora(plan: Plan, policy: Policy) -> None:
    """Load the LoRA and put the base back, before an earlier evaluation is replaced.

    Raises: UsageError when the model cannot take it.
    """
    from condrl.diffusion.policy import acting, trained_weights

    if plan.tuned is None:
        return
    with blaming("model", plan.config.model["name"]):
        fit_adapter(policy.model, plan.tuned, plan.source)
        weights = trained_weights(policy.model.module)
        with acting(weights, [weight.detach().clone() for weight in weights]):
            policy.model.load_adapter(plan.tuned)


def try_measures(plan: Plan, policy: Policy) -> None:
    """Score one image as if it had been made for each of many prompts, before an earlier evaluation is replaced.

    Raises: UsageError when the model or a measure cannot.
    """
    import torch

    from condrl.diffusion.noise import seeded
    from condrl.diffusion.rollout import sample
    from condrl.rewards.scoring import usage_errors
    from condrl.training.preflight import try_rows

    condition = policy.model.encode([plan.rows[0].prompt])
    with usage_errors(), torch.no_grad():
        with blaming("model", plan.config.model["name"]):
            image = policy.model.decode(sample(policy, condition, seeded([0]), 1))
        try_rows(
            measures_of(plan.config), image, plan.rows, plan.config.evaluate.images_per_prompt, most_failed=1.0
        )  # scores that fail are left out and counted


def try_steering(steer: Steer, policies: Sequence[Policy], rows: Sequence[Row]) -> None:
    """Steer one image with each sampler, before an earlier evaluation is replaced.

    Raises: UsageError when that fails.
    """
    from condrl.diffusion.noise import seeded
    from condrl.rewards.scoring import usage_errors

    condition = policies[0].model.encode([rows[0].prompt])
    with usage_errors():
        for policy in policies:
            steer(policy, condition, seeded([0]), rows[:1])


def compared_with_base(
    plan: Plan, policies: Sequence[Policy], bar: tqdm[Any], writer: Writer
) -> Iterator[dict[str, Any]]:
    """Measure the base with each sampler, then the tuned model at each strength."""
    from condrl.training.evaluate import first_seed, path_kl_to_base

    seed = first_seed(plan.config.run.seed)
    bar.set_description("base")
    bases = [measured(plan, policy, bar, writer.first(number, "base")) for number, policy in enumerate(policies)]
    for strength in plan.strengths:
        kinds = "base", set_strength(plan, policies[0], strength)
        bar.set_description(kinds[1])
        for number, (policy, base) in enumerate(zip(policies, bases, strict=True)):
            tuned = measured(plan, policy, bar, writer.second(number, strength, base, kinds))
            kl = path_kl_to_base(policy, plan.rows, seed, plan.batch)
            yield entry(plan, number, strength, base, tuned) | {"path_kl": kl}


def steered_beside_plain(
    plan: Plan, steer: Steer, policies: Sequence[Policy], bar: tqdm[Any], writer: Writer
) -> Iterator[dict[str, Any]]:
    """Measure the base with each sampler, plain and steered, then the tuned model at each strength likewise."""
    for strength in (None, *plan.strengths):
        who = set_strength(plan, policies[0], strength)
        kinds = who, f"{who}_steered"
        bar.set_description(who)
        for number, policy in enumerate(policies):
            plain = measured(plan, policy, bar, writer.first(number, who))
            steered = measured(plan, policy, bar, writer.second(number, strength, plain, kinds), draw=steer)
            calls = {"plain": plain.network_calls, "steered": steered.network_calls}
            yield entry(plan, number, strength, plain, steered) | {"network_calls": calls}


def set_strength(plan: Plan, policy: Policy, strength: float | None) -> str:
    """Load the LoRA at a strength into the model, which all policies have, or leave the base; returns its name."""
    from condrl.models.lora import scale_lora

    if strength is None or plan.tuned is None:
        return "base"
    policy.model.load_adapter(plan.tuned)
    scale_lora(policy.model.module, strength)
    return f"strength_{strength}"


def measured(
    plan: Plan, policy: Policy, bar: tqdm[Any], visit: Callable[[Batch], None], draw: Draw | None = None
) -> Evaluation:
    """The policy on the prompts, as a run measures it at its end."""
    from condrl.training.evaluate import evaluate, first_seed, plain

    warned: list[str] = []

    def see(batch: Batch) -> None:
        visit(batch)
        bar.update(len(batch.indices))
        if batch.scores.failure and not warned:
            warned.append(batch.scores.failure)
            bar.write(visible(f"warning: {batch.scores.failure}"), sys.stderr)

    seed, measures = first_seed(plan.config.run.seed), measures_of(plan.config)
    return evaluate(
        policy, plan.rows, measures, seed, plan.per_prompt, plan.batch, pictures=0, visit=see, draw=draw or plain
    )


def entry(plan: Plan, number: int, strength: float | None, first: Evaluation, second: Evaluation) -> dict[str, Any]:
    """What was found with a sampler at a strength; the diversity where prompts have several images."""
    from condrl.training.evaluate import compared, compared_diversity

    heldout = compared(first, second, plan.names)
    found = {"sampler": plan.samplers[number], "strength": strength, "heldout": heldout}
    return found | ({"diversity": compared_diversity(first, second, plan.names)} if plan.per_prompt > 1 else {})
