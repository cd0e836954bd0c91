"""Fine-tune a text-to-image diffusion model with rewards.

    condrl finetune                                                   the quickstart
    condrl finetune toy/p1                                            a shipped config, by name
    condrl finetune my.yaml train.lr=1e-4                             later ones win
    condrl finetune plugins=[my_reward.py] rewards.redness.weight=1   the quickstart with a reward of your own
    accelerate launch scripts/finetune.py ...                         the same in a checkout, also in several processes

Writes runs/<run.name>/: config.yaml, metrics.jsonl (a line per epoch), images/, lora/, result.json.
--json FILE writes the result there too. --dry-run checks everything, tries a few images, and says what the run would
do; nothing is written.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from condrl.commands.arguments import check_json
from condrl.commands.console import exit_code
from condrl.config import config_help, to_yaml
from condrl.errors import SIGNALS, RunError, Stopped, UsageError, naming, print_main, warn_of_address_limit
from condrl.io.files import CONFIGS
from condrl.loading import load_config

if TYPE_CHECKING:
    from condrl.config import Config
    from condrl.processes import Processes
    from condrl.training.measure import Prompts
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
    from condrl.training.measure import Prompts
    from condrl.training.resume import check_run_folder, find_checkpoint
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
        check_run_folder(config)
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


def run(config: Config, prompts: Prompts, begun: float, dry: bool) -> dict[str, Any]:
    """Tune with all processes; returns the result, empty for a dry run."""
    from condrl.processes import Processes
    from condrl.training.host import make_accelerator, set_threads_and_seed

    set_threads_and_seed(config)
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
    from condrl.training.resume import check_run_folder, check_state, find_checkpoint

    config, processes, folder = trainer.config, trainer.processes, trainer.folder
    origin = provenance()
    with folder.locked() if processes.is_main else nullcontext():
        if processes.is_main:
            check_run_folder(config, is_locked=True)  # again: another process may have tuned in it meanwhile
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
    from condrl.commands.result import save_base, save_result
    from condrl.training.host import device_name, peak_memory_gb
    from condrl.training.measure import best_result, evaluation, flat, measured_result, save_best, watch

    model, processes = trainer.policy.model, trainer.processes
    base = evaluation(trainer, prompts.heldout, "heldout", "held-out, base")
    before = flat(base, "heldout") | watch(trainer, prompts, base)
    trainer.recorder.first = dict(before)
    trainer.recorder.trackers.log(0, before)
    if processes.is_main:
        save_base(trainer, before)
    if checkpoint is not None:
        trainer.load_state_dict(checkpoint[1])
        save_best(trainer)
    with stopping_on_signals(trainer):
        tune(trainer)
    with trainer.learner.deploying():
        tuned = evaluation(trainer, prompts.heldout, "heldout", "held-out, tuned")
        measured = measured_result(trainer, prompts.heldout, base, tuned)
    result = {
        **measured,
        "before": before,
        **best_result(trainer, prompts, base, tuned),
        "seconds": round(time.monotonic() - begun, 1),
        "peak_memory_gb": round(peak_memory_gb(model.device), 3),
        "images": trainer.images,
        **processes.add_up({"network_calls": model.evaluations}),
        "processes": processes.count,
        "seed": trainer.config.run.seed,
        "hardware": device_name(model.device),
        **origin,
    }
    if processes.is_main:
        with trainer.learner.deploying():
            save_result(trainer, prompts.heldout, result, base, tuned)
    return result


def prepare(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Make the run's folder what the run expects, and write its config."""
    from condrl.training.checkpoint import drop_later
    from condrl.training.resume import continues

    text = to_yaml(trainer.config)  # before anything is removed
    if checkpoint is None or not continues(trainer.config, checkpoint[0]):
        trainer.folder.clear()
    else:
        drop_later(checkpoint[0])
        trainer.folder.drop_after(checkpoint[1]["epoch"])
    path = trainer.folder.file("config.yaml")
    with naming(path):
        path.write_text(text, "utf-8")


def tune(trainer: Trainer) -> None:
    """Run the epochs and save what they trained, also when asked to stop."""
    from condrl.training.measure import save_lora, save_networks

    try:
        trainer.fit()
    except Stopped:
        try:
            save_lora(trainer)
            save_networks(trainer)
        except (OSError, RunError) as error:
            print_main(f"warning: the LoRA cannot be written: {error}")
        raise
    save_lora(trainer)
    save_networks(trainer)


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


if __name__ == "__main__":  # accelerate launch -m condrl.commands.finetune
    sys.exit(main(sys.argv[1:]))
