"""What a finished run leaves: result.json, pictures, the cards of its LoRAs, its page, and a table to print."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from condrl.config import base_name
from condrl.errors import RunError, UsageError, print_main, visible

if TYPE_CHECKING:
    from condrl.prompts import Row
    from condrl.report.run import Run
    from condrl.training.evaluate import Evaluation
    from condrl.training.folder import RunFolder
    from condrl.training.trainer import Trainer


def save_base(trainer: Trainer, measures: dict[str, float]) -> None:
    """Write what the run is compared with, so that its page can say so while it goes."""
    from condrl.io.records import write_json

    write_json(trainer.folder.file("base.json"), {"model": base_name(trainer.config.model), "measures": measures})


def save_result(
    trainer: Trainer, heldout: Sequence[Row], result: dict[str, Any], base: Evaluation | None, tuned: Evaluation | None
) -> None:
    """Write and print the result, with pictures, for the trackers too."""
    from PIL import Image

    from condrl.io.records import write_json

    folder, trackers = trainer.folder, trainer.recorder.trackers
    write_json(folder.file("result.json"), result)
    for picture in save_pictures(trainer, base, tuned):
        with Image.open(picture) as image:
            trackers.show(picture.stem, image.copy())
    save_images(trainer, heldout, base, tuned)
    trackers.log(trainer.epoch, tracked_result(result), "result")
    print(visible(summary(result, folder.path, trainer.recorder.lowered)), flush=True)
    present(folder)


def tracked_result(result: dict[str, Any]) -> dict[str, float]:
    """The held-out means of a result, as trackers take them."""
    whos = ("base", "tuned", "difference")
    return {f"result/{name}/{who}": row[who]["mean"] for name, row in result["heldout"].items() for who in whos}


def save_pictures(trainer: Trainer, base: Evaluation | None, tuned: Evaluation | None) -> list[Path]:
    """Write the pages of before | after, or a toy's plots; returns the former."""
    from condrl.toys.plots import save_plots
    from condrl.training.pictures import pages, save_comparison

    if base and tuned and base.pictures and base.pictures[0].dim() == 3:
        path = trainer.config.folder / "images" / "before_after.png"
        trainer.folder.claim_all(f"images/{page.name}" for page in pages(path, 2 * len(base.pictures)))
        scores = scores_in_words(base, tuned)
        return save_comparison(path, base.pictures, tuned.pictures, base.labels, scores)
    if len(trainer.policy.model.state_shape) == 1:
        try:
            kappa = trainer.algorithm.kappa or 0.0
            pieces = trainer.policy, trainer.rows, trainer.rewards, kappa
            save_plots(*pieces, trainer.recorder.metrics_file, trainer.folder.file)
        except UsageError as error:  # of a policy so far off that exact answers do not reach it
            print_main(f"warning: no pictures: {error}")
    return []


def scores_in_words(base: Evaluation, tuned: Evaluation) -> list[tuple[str, str]]:
    """What the first measure gave each of the pictures, base and tuned."""
    name = next(iter(base.each))
    before, after = (found.each[name][: len(found.pictures)].tolist() for found in (base, tuned))
    return [(f"{name} {b:.3g}", f"{name} {a:.3g}") for b, a in zip(before, after, strict=True)]


def present(folder: RunFolder) -> None:
    """Write the run's page, and its LoRAs' cards with what was measured of them; a run does not fail for these."""
    from condrl.report.page import write_report
    from condrl.report.run import read_run

    try:
        run = read_run(folder.path)
        describe(run, folder)
        write_report([run], folder.file("report.html"))
    except (UsageError, RunError, OSError) as error:
        print_main(f"warning: no report: {error}")


def describe(run: Run, folder: RunFolder) -> None:
    """Write the cards of the LoRAs anew, with what was measured of them."""
    from condrl.report.card import write_card

    def claim(path: Path) -> None:
        folder.claim(path.relative_to(folder.path).as_posix())

    for name in ("lora", "lora_best"):
        heldout, images = run.measured(name)
        if heldout and (folder.path / name / "README.md").is_file():
            write_card(run, folder.path / name, heldout, images, claim=claim)


def save_images(trainer: Trainer, rows: Sequence[Row], base: Evaluation | None, tuned: Evaluation | None) -> None:
    """Write a line for each held-out image, and pictures of those that changed most."""
    from condrl.training.build import deployed
    from condrl.training.evaluate import first_seed
    from condrl.training.heldout import most_changed, redraw, save_heldout

    if not base or not tuned or not base.each:
        return
    config, seed, folder = trainer.config, first_seed(trainer.config.run.seed), trainer.folder
    has_pictures = len(trainer.policy.model.state_shape) > 1 and not trainer.processes.sharded
    drawn = most_changed(base, tuned) if has_pictures else []
    if drawn:
        of = [rows[i // config.evaluate.images_per_prompt].prompt for i in drawn]
        policy, batch = deployed(config, trainer.policy), config.train.rollout_batch
        redraw(folder, policy, of, [seed + i for i in drawn], drawn, batch)
    save_heldout(folder, rows, seed, base, tuned, drawn)


def summary(result: dict[str, Any], folder: Path, lowered: Collection[str] = ()) -> str:
    """The result as a table, with the verdict that its paired differences allow."""
    from condrl.training.evaluate import verdict

    comparison = result["heldout"]
    whos = ("base", "tuned", "difference")
    rows = [("held-out", *whos), *((name, *(interval(row[who]) for who in whos)) for name, row in comparison.items())]
    lines = [*aligned(rows), verdict(comparison, lowered), *best_lines(result.get("best"))]
    if not comparison:
        lines = ["no held-out prompts (prompts.heldout) or measures: nothing says whether the model is better"]
    if result.get("path_kl") is not None:
        lines.append(f"path KL to the base: {result['path_kl']:.3g} nats")
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
