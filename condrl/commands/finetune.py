"""Fine-tune a text-to-image diffusion model with rewards.

    accelerate launch scripts/finetune.py                                       configs/quickstart.yaml
    accelerate launch scripts/finetune.py my.yaml train.lr=1e-4                 later ones win
    accelerate launch scripts/finetune.py plugins=[my_reward.py] rewards.redness.weight=1
    condrl finetune toy/p1                                                      a shipped config, by name

Writes runs/<run.name>/: config.yaml, metrics.jsonl (a line per epoch), images/, lora/, result.json.
--json FILE writes the result there too. --dry-run checks everything, tries a few images, and says what the run would
do; nothing is written.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from condrl.commands.console import exit_code
from condrl.config import config_help, load_config, to_yaml
from condrl.errors import SIGNALS, RunError, Stopped, UsageError, naming, print_main, visible, warn_of_address_limit
from condrl.io.files import CONFIGS

if TYPE_CHECKING:
    from condrl.config import Config
    from condrl.processes import Processes
    from condrl.prompts import Row
    from condrl.training.evaluate import Evaluation
    from condrl.training.folder import RunFolder
    from condrl.training.trainer import Trainer

    Checkpoint = tuple[Path, dict[str, Any]] | None


def main(words: list[str]) -> int:
    """Exit code: 0, 1 for a run that had to stop, 2 for bad input, 130 or 143 when asked to stop."""
    end_with_launcher()
    if {"-h", "--help"} & set(words):
        return exit_code(lambda: print(__doc__, config_help(), sep="\n"))
    return exit_code(lambda: finetune(words))


def finetune(arguments: list[str]) -> dict[str, Any]:
    """Check everything that can be checked without the model, then tune; returns the result, empty for a dry run."""
    begun = time.monotonic()
    warn_of_address_limit()
    arguments, copy = split_json(arguments)
    dry = "--dry-run" in arguments
    arguments = [argument for argument in arguments if argument != "--dry-run"]
    config = load_config(arguments, default=CONFIGS / "quickstart.yaml")

    from condrl.io.records import write_json
    from condrl.prompts import load_prompts
    from condrl.training.build import make_measures, make_rewards
    from condrl.training.checks import check_combination, transfer_warning
    from condrl.training.host import check_launcher
    from condrl.training.resume import check_folder, find_checkpoint
    from condrl.training.trackers import check_trackers

    check_launcher()
    check_trackers(config)

    train = load_prompts(config.prompts.train, "prompts.train")
    heldout, validation = (
        load_prompts(path, f"prompts.{name}")[: config.evaluate.prompts] if path else []
        for name, path in (("heldout", config.prompts.heldout), ("validation", config.prompts.validation))
    )
    check_combination(config)
    if not dry:
        check_folder(config)
        find_checkpoint(config)  # for its errors, before the model is loaded
    for reward in [*make_rewards(config), *make_measures(config)]:
        reward.load()
    if warning := transfer_warning(config):
        print_main(f"warning: {warning}")
    result = run(config, Prompts(train, heldout, validation), begun, dry)
    if copy and result and os.environ.get("RANK", "0") == "0":
        write_json(copy, result)
    return result


def end_with_launcher() -> None:
    """Be asked to stop when `accelerate launch` ends: it starts one process without passing signals on to it."""
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        set_option = getattr(ctypes.CDLL(None), "prctl", None)
        if set_option:
            set_option(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def split_json(arguments: list[str]) -> tuple[list[str], Path | None]:
    """The arguments without `--json FILE`, and the file.

    Raises: UsageError when no file follows.
    """
    if "--json" not in arguments:
        return arguments, None
    position = arguments.index("--json")
    if position + 1 == len(arguments):
        raise UsageError("--json needs a file: --json result.json")
    path = Path(arguments[position + 1])
    check_json(path)
    return arguments[:position] + arguments[position + 2 :], path


def check_json(path: Path) -> None:
    """Raises: UsageError when no result can be written there."""
    try:
        usable = not path.is_dir() and (path.parent.is_dir() or not path.parent.exists())
    except OSError:  # a name that is too long
        usable = False
    if not usable:
        raise UsageError(f"--json {path}: is not a file that can be written")


class Prompts(NamedTuple):
    """The rows of a run's prompt files."""

    train: Sequence[Row]
    heldout: Sequence[Row]
    validation: Sequence[Row]


def run(config: Config, prompts: Prompts, begun: float, dry: bool) -> dict[str, Any]:
    """Tune with all processes; returns the result, empty for a dry run."""
    import torch

    from condrl.processes import Processes
    from condrl.training.host import make_accelerator

    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    torch.manual_seed(config.run.seed)
    processes = Processes(make_accelerator(config))
    try:
        return processes.synchronized(lambda: tried_and_tuned(config, prompts, begun, dry, processes))
    finally:
        processes.end()


def tried_and_tuned(config: Config, prompts: Prompts, begun: float, dry: bool, processes: Processes) -> dict[str, Any]:
    """Load the model and try it; unless the run is dry, tune it."""
    from condrl.training.build import make_measures, make_trainer
    from condrl.training.checks import announcement
    from condrl.training.preflight import preflight

    later = [*prompts.heldout, *prompts.validation]
    print_main(f"loading the model {config.model.get('path', config.model['name'])} ...")
    trainer = make_trainer(config, prompts.train, later, processes)
    for line in [*preflight(trainer, later, make_measures(config)), *announcement(config, *prompts)]:
        print_main(line)
    return {} if dry else measure_and_tune(trainer, prompts, begun)


def measure_and_tune(trainer: Trainer, prompts: Prompts, begun: float) -> dict[str, Any]:
    """In the run's folder, which no other process may use meanwhile, begin or resume, and end with the result."""
    from condrl.training.host import provenance
    from condrl.training.resume import check_folder, check_state, find_checkpoint

    config, processes, folder = trainer.config, trainer.processes, trainer.folder
    origin = provenance()
    with folder.locked() if processes.is_main else nullcontext():
        if processes.is_main:
            check_folder(config, is_locked=True)  # again: another process may have tuned in it meanwhile
        processes.barrier()
        checkpoint = find_checkpoint(config)
        if checkpoint is not None:
            check_state(trainer, checkpoint[1], checkpoint[0])
            print_main(f"resuming from {checkpoint[0]}")
        processes.barrier()  # all have read what is now replaced
        if processes.is_main:
            prepare(trainer, checkpoint)
        processes.barrier()
        with trainer.recorder.trackers.running(config):
            return tuned_result(trainer, prompts, checkpoint, begun, origin)


def tuned_result(
    trainer: Trainer, prompts: Prompts, checkpoint: Checkpoint, begun: float, origin: dict[str, Any]
) -> dict[str, Any]:
    """Measure, tune, save, measure again; the first process writes and prints."""
    from condrl.training.evaluate import compared
    from condrl.training.host import peak_memory_gb

    model, processes = trainer.policy.model, trainer.processes
    base = evaluation(trainer, prompts.heldout, "held-out, base")
    before = flat(base, "heldout") | watch(trainer, prompts, base)
    trainer.recorder.first = dict(before)
    trainer.recorder.trackers.log(0, before)
    if checkpoint is not None:
        trainer.load_state_dict(checkpoint[1])
    with stopping_on_signals(trainer):
        tune(trainer)
    tuned = evaluation(trainer, prompts.heldout, "held-out, tuned")
    result = {
        "heldout": compared(base, tuned) if base and tuned else {},
        "before": before,
        **best_result(trainer, prompts, base),
        "seconds": round(time.monotonic() - begun, 1),
        "peak_memory_gb": round(peak_memory_gb(model.device), 3),
        "images": trainer.images,
        **processes.add_up({"network_calls": model.evaluations}),
        "processes": processes.count,
        "seed": trainer.config.run.seed,
        **origin,
    }
    if processes.is_main:
        save_result(trainer, prompts, result, base, tuned)
    return result


def save_result(
    trainer: Trainer, prompts: Prompts, result: dict[str, Any], base: Evaluation | None, tuned: Evaluation | None
) -> None:
    """Write and print the result, with pictures, for the trackers too."""
    from PIL import Image

    from condrl.io.records import write_json

    folder, trackers = trainer.folder, trainer.recorder.trackers
    write_json(folder.file("result.json"), result)
    for picture in save_pictures(trainer, base, tuned):
        with Image.open(picture) as image:
            trackers.show(picture.stem, image.copy())
    save_images(trainer, prompts.heldout, base, tuned)
    trackers.log(trainer.epoch, tracked_result(result), "result")
    describe(folder)
    save_report(folder)
    print(visible(summary(result, folder.path)))


def prepare(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Make the run's folder what the run expects, and write its config."""
    from condrl.training.checkpoint import drop_later
    from condrl.training.resume import continues

    text = to_yaml(trainer.config)  # before anything is removed
    if checkpoint is None or not continues(trainer.config, checkpoint[0]):
        trainer.folder.clear()
    else:
        drop_later(checkpoint[0])
    path = trainer.folder.file("config.yaml")
    with naming(path):
        path.write_text(text, "utf-8")


def tracked_result(result: dict[str, Any]) -> dict[str, float]:
    """The held-out means of a result, as trackers take them."""
    whos = ("base", "tuned", "difference")
    return {f"result/{name}/{who}": row[who]["mean"] for name, row in result["heldout"].items() for who in whos}


def tune(trainer: Trainer) -> None:
    """Run the epochs and save the LoRA, also when asked to stop."""
    try:
        trainer.fit()
    except Stopped:
        try:
            save_lora(trainer)
        except (OSError, RunError) as error:
            print_main(f"warning: the LoRA cannot be written: {error}")
        raise
    save_lora(trainer)


def watch(trainer: Trainer, prompts: Prompts, base: Evaluation | None) -> dict[str, float]:
    """Have the policy measured every `evaluate.every` epochs, and the best LoRA kept; returns what the base is.

    On validation prompts, or, where there are none, on the held-out ones, by which nothing is chosen.
    """
    if not trainer.config.evaluate.every:
        return {}

    def look_at_heldout() -> dict[str, float]:
        epoch = trainer.epoch + 1
        found = evaluation(trainer, prompts.heldout, f"held-out, after {epoch} epochs")
        save_frames(trainer, epoch, found)
        return flat(found, "heldout") | own_measures(trainer, prompts.heldout, "heldout")

    def look(epoch: int, who: str) -> dict[str, float]:
        found = evaluation(trainer, prompts.validation, f"validation, {who}")
        save_frames(trainer, epoch, found)
        own = own_measures(trainer, prompts.validation, "validation")
        if found is None:
            return own
        weights = {reward.name: reward.weight for reward in trainer.rewards} or dict.fromkeys(found.measures, 1.0)
        total = sum(weight * found.measures[name].mean for name, weight in weights.items())
        if trainer.best.take(epoch, total) and epoch:
            save_lora(trainer, "lora_best")
        return flat(found, "validation") | own

    if not prompts.validation:
        save_frames(trainer, 0, base)
        trainer.heldout = look_at_heldout
        return own_measures(trainer, prompts.heldout, "heldout")
    trainer.heldout = lambda: look(trainer.epoch + 1, f"after {trainer.epoch + 1} epochs")
    return look(0, "base")


def own_measures(trainer: Trainer, rows: Sequence[Row], name: str) -> dict[str, float]:
    """What the algorithm itself measures of the rows of prompts.<name>, as a line of the record has it."""
    found = trainer.algorithm.measures(trainer.policy, rows, name, trainer.config.train)
    if found:
        print_main(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()))
    return {f"{name}/{key}": value for key, value in found.items()}


def save_frames(trainer: Trainer, epoch: int, found: Evaluation | None) -> None:
    """Write the first images of an evaluation, from the same prompts and seeds each time."""
    from condrl.training.heldout import save_film

    if found and trainer.processes.is_main:
        for number, frame in enumerate(save_film(trainer.folder, epoch, found)):
            trainer.recorder.trackers.show(f"film/{number}", *frame)


def best_result(trainer: Trainer, prompts: Prompts, base: Evaluation | None) -> dict[str, Any]:
    """The epoch that validation prompts chose, and what its LoRA is on held-out ones, for result.json."""
    from condrl.training.evaluate import compared

    best = trainer.best
    if best.value is None or not best.epoch:
        return {"best": {"epoch": 0}} if best.value is not None else {}
    trainer.processes.barrier()  # lora_best/ is there
    weights = [weight.detach().clone() for weight in trainer.learner.weights]
    trainer.policy.model.load_adapter(trainer.config.folder / "lora_best")
    found = evaluation(trainer, prompts.heldout, f"held-out, best (epoch {best.epoch})")
    for weight, value in zip(trainer.learner.weights, weights, strict=True):
        weight.data.copy_(value)
    return {"best": {"epoch": best.epoch, "heldout": compared(base, found) if base and found else {}}}


def save_lora(trainer: Trainer, name: str = "lora") -> None:
    from condrl.training.build import weights_in_words

    if trainer.processes.is_main:
        with trainer.folder.replacing(name) as folder:
            trainer.policy.model.save_adapter(folder, {"rewards": weights_in_words(trainer.config)})


def save_pictures(trainer: Trainer, base: Evaluation | None, tuned: Evaluation | None) -> list[Path]:
    """Write the pages of before | after, or a toy's plots; returns the former."""
    from condrl.toys.plots import save_plots
    from condrl.training.pictures import pages, save_comparison

    if base and tuned and base.pictures and base.pictures[0].dim() == 3:
        path = trainer.config.folder / "images" / "before_after.png"
        trainer.folder.claim_all(f"images/{page.name}" for page in pages(path, 2 * len(base.pictures)))
        return save_comparison(path, base.pictures, tuned.pictures, base.labels)
    if len(trainer.policy.model.state_shape) == 1:
        try:
            kappa = trainer.algorithm.kappa or 0.0
            pieces = trainer.policy, trainer.rows, trainer.rewards, kappa
            save_plots(*pieces, trainer.recorder.metrics_file, trainer.folder.file)
        except UsageError as error:  # of a policy so far off that exact answers do not reach it
            print_main(f"warning: no pictures: {error}")
    return []


def describe(folder: RunFolder) -> None:
    """Write the cards of the LoRAs anew, with what was measured of them."""
    from condrl.report.card import write_card
    from condrl.report.run import read_run

    run = read_run(folder.path)
    result = run.result or {}
    best = result.get("best", {}).get("heldout", {})
    for name, heldout, images in (("lora", result["heldout"], run.images), ("lora_best", best, ())):
        if heldout and (folder.path / name / "README.md").is_file():
            write_card(
                run,
                folder.path / name,
                heldout,
                images,
                claim=lambda path: folder.claim(path.relative_to(folder.path).as_posix()),
            )


def save_images(trainer: Trainer, rows: Sequence[Row], base: Evaluation | None, tuned: Evaluation | None) -> None:
    """Write a line for each held-out image, and pictures of those that changed most."""
    from condrl.training.build import deployed
    from condrl.training.evaluate import first_seed
    from condrl.training.heldout import most_changed, redraw, save_heldout

    if not base or not tuned:
        return
    config, seed, folder = trainer.config, first_seed(trainer.config.run.seed), trainer.folder
    has_pictures = len(trainer.policy.model.state_shape) > 1 and not trainer.processes.sharded
    drawn = most_changed(base, tuned) if has_pictures else []
    if drawn:
        of = [rows[i // config.evaluate.images_per_prompt].prompt for i in drawn]
        policy, batch = deployed(config, trainer.policy), config.train.rollout_batch
        redraw(folder, policy, of, [seed + i for i in drawn], drawn, batch)
    save_heldout(folder, rows, seed, base, tuned, drawn)


def save_report(folder: RunFolder) -> None:
    """Write the run's page; a run does not fail for it."""
    from condrl.report.page import write_report
    from condrl.report.run import read_run

    try:
        write_report([read_run(folder.path)], folder.file("report.html"))
    except (UsageError, RunError) as error:
        print_main(f"warning: no report: {error}")


@contextmanager
def stopping_on_signals(trainer: Trainer) -> Iterator[None]:
    """Within it, SIGINT and SIGTERM end the run with a checkpoint; a second one ends the process at once."""

    def stop(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        print_main("\nstopping with a checkpoint; interrupt again to stop at once")
        trainer.processes.stop(number)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def evaluation(trainer: Trainer, rows: Sequence[Row], who: str) -> Evaluation | None:
    """Measure the policy on some prompts; None when there are none, or nothing to measure."""
    from condrl.training.build import deployed, make_measures
    from condrl.training.evaluate import evaluate, first_seed

    config = trainer.config
    measures = make_measures(config)
    if not rows or not measures:
        return None
    found = evaluate(
        deployed(config, trainer.policy),
        rows,
        measures,
        seed=first_seed(config.run.seed),
        per_prompt=config.evaluate.images_per_prompt,
        batch=config.train.rollout_batch,
        pictures=config.evaluate.pictures,
        processes=trainer.processes,
    )
    if trainer.processes.is_main:
        means = ", ".join(f"{name} {e.mean:.3f}" for name, e in found.measures.items())
        print(f"{who}: {means}", flush=True)
    return found


def flat(found: Evaluation | None, prompts: str) -> dict[str, float]:
    """Each measure's mean on such prompts and the half-width of its interval, as a line of the record has them."""
    line: dict[str, float] = {}
    for name, e in found.measures.items() if found else ():
        if not math.isfinite(e.mean):  # every score failed
            continue
        line |= {f"{prompts}/{name}": e.mean} | ({f"{prompts}/{name}_ci95": e.half_width} if e.ci95 else {})
    return line


def summary(result: dict[str, Any], folder: Path) -> str:
    """The result as a table, with the verdict that its paired differences allow."""
    from condrl.training.evaluate import verdict

    comparison = result["heldout"]
    whos = ("base", "tuned", "difference")
    rows = [("held-out", *whos), *((name, *(interval(row[who]) for who in whos)) for name, row in comparison.items())]
    lines = [*aligned(rows), verdict(comparison), *best_lines(result.get("best"))]
    if not comparison:
        lines = ["no held-out prompts (prompts.heldout) or measures: nothing says whether the model is better"]
    took = f"{result['seconds']:.0f} s, {result['peak_memory_gb']:.2f} GB, {result['images']} images; see {folder}/"
    return "\n".join([*lines, took])


def best_lines(best: dict[str, Any] | None) -> list[str]:
    """What to say of the epoch that validation prompts chose, if there are any."""
    if best is None:
        return []
    if not best["epoch"]:
        return ["best on validation prompts: the base model; there is no lora_best/"]
    means = ", ".join(f"{name} {interval(row['tuned'])}" for name, row in best["heldout"].items())
    return [
        f"best on validation prompts: epoch {best['epoch']}, kept in lora_best/; held-out: {means or 'not measured'}"
    ]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table's rows as lines, its columns below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def interval(estimate: dict[str, Any]) -> str:
    limits = estimate["ci95"]  # none where there is a single prompt
    return f"{estimate['mean']:.3f}" + (f" [{limits[0]:.3f}, {limits[1]:.3f}]" if limits else "")


if __name__ == "__main__":  # accelerate launch -m condrl.commands.finetune
    sys.exit(main(sys.argv[1:]))
