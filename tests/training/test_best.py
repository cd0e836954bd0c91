"""The best epoch by validation prompts, which are neither trained on nor reported."""

import json

import pytest
import torch
from helpers import ROOT, toy_words
from safetensors.torch import load_file

from condrl import UsageError
from condrl.commands import finetune
from condrl.loading import load_config
from condrl.training.best import Best
from condrl.training.folder import RunFolder

P1 = ROOT / "condrl" / "assets" / "toy" / "p1.jsonl"
WATCHED = ["evaluate.every=2", "evaluate.images_per_prompt=200", f"prompts.validation={P1}"]


def test_a_tie_is_not_better_and_the_base_counts():
    best = Best()
    assert [best.take(epoch, value) for epoch, value in ((0, 1.0), (2, 0.9), (4, 1.0), (6, 1.2), (8, 1.1))] == [
        True, False, False, True, False,
    ]  # fmt: skip
    assert (best.epoch, best.value, best.waited) == (6, 1.2, 1)
    assert not best.take(10, float("nan"))
    assert best.waited == 1


def test_a_rating_that_failed_is_not_compared():
    best = Best()
    assert [best.take(epoch, value) for epoch, value in ((0, float("nan")), (2, 0.3), (4, float("nan")), (6, 0.4))] == [
        False, True, False, True,
    ]  # fmt: skip
    assert (best.epoch, best.waited) == (6, 0)


def run(folder, *more):
    """A run that gains at first and is then ruined by its rate, watched every other epoch."""
    others = folder.parent / "validation.jsonl"  # in another order, so from other noise than the held-out ones
    others.write_text("\n".join(P1.read_text().splitlines()[::-1]))
    words = [
        *toy_words("reinforce", folder),
        *WATCHED,
        f"prompts.validation={others}",
        "algorithm.normalise=false",
        *more,
    ]
    assert finetune.main(words) == 0
    file = folder / "metrics.jsonl"  # there is none where nothing was left to do
    record = [json.loads(line) for line in (file.read_text() if file.exists() else "").splitlines()]
    return record, json.loads((folder / "result.json").read_text())


def test_a_best_epoch_that_is_the_last_is_not_measured_twice(tmp_path, capsys):
    _, result = run(tmp_path / "run", "train.lr=0.01", "train.epochs=2")
    assert result["best"] == {"epoch": 2, "heldout": result["heldout"]}
    assert "held-out, best" not in capsys.readouterr().err


@pytest.mark.slow
def test_the_best_lora_is_kept_and_both_are_reported(tmp_path, capsys):
    record, result = run(tmp_path / "run", "train.lr=0.3", "train.epochs=12", "train.images_per_prompt=64",
                         "train.rollout_batch=128")  # fmt: skip
    values = {line["epoch"]: line["validation/quadratic"] for line in record if "validation/quadratic" in line}
    assert list(values) == [2, 4, 6, 8, 10, 12]
    assert not any(key.startswith("heldout/") for line in record for key in line)
    assert [line["epoch"] for line in record if "base_kl" in line] == list(values)
    assert record[-1]["base_kl"] > 0
    chosen = max(values, key=values.get)
    assert result["best"]["epoch"] == chosen
    assert values[12] != result["heldout"]["quadratic"]["tuned"]["mean"]
    assert chosen < 12  # else nothing is shown
    out = capsys.readouterr()
    assert f"best on validation prompts: epoch {chosen}, kept in lora_best/" in out.out
    assert "the best epoch is chosen on" in out.err + out.out
    tuned, best = (load_file(tmp_path / "run" / name / "network.safetensors") for name in ("lora", "lora_best"))
    assert any(not torch.equal(tuned[key], best[key]) for key in tuned)
    same = result["best"]["heldout"]["quadratic"]["base"]
    assert same == result["heldout"]["quadratic"]["base"]
    assert result["best"]["heldout"]["quadratic"]["tuned"]["mean"] > result["heldout"]["quadratic"]["tuned"]["mean"]


@pytest.mark.slow
def test_patience_ends_the_run_also_when_it_is_resumed(tmp_path, capsys):
    words = ["train.lr=0.1", "train.epochs=40", "train.patience=2", "run.checkpoint_seconds=0", "train.lr_decay=none"]
    record, result = run(tmp_path / "run", *words)
    last = record[-1]["epoch"]
    assert last < 40
    assert last == result["best"]["epoch"] + 4  # two evaluations without a better one
    assert f"ended after epoch {last}: on validation prompts epoch" in capsys.readouterr().err
    again, _ = run(tmp_path / "run", *words, "run.resume=auto")
    assert again == record


def weights_of(folder, name):
    return load_file(folder / name / "network.safetensors")


@pytest.mark.slow
def test_a_run_that_goes_on_elsewhere_or_from_earlier_has_the_best_lora_of_its_own_past(tmp_path):
    words = ["train.lr=0.1", "train.lr_decay=none", "run.checkpoint_seconds=0", "run.keep_checkpoints=99"]
    first, second = tmp_path / "first", tmp_path / "second"
    record, whole = run(first, *words, "train.epochs=10")
    values = {line["epoch"]: line["validation/quadratic"] for line in record if "validation/quadratic" in line}
    assert whole["best"]["epoch"] == max(values, key=values.get) < 10
    _, again = run(second, *words, "train.epochs=10", f"run.resume={first}/checkpoints/epoch_00000010")
    assert again["best"] == whole["best"]
    best = weights_of(first, "lora_best")
    for name in ("film/epoch_00004_0.png", "film/epoch_00002_0.png", "images/epoch_0010_2.png"):
        RunFolder(first).file(name).touch()  # as images would have them
    assert all(torch.equal(value, best[key]) for key, value in weights_of(second, "lora_best").items())
    _, back = run(first, *words, "train.epochs=2", f"run.resume={first}/checkpoints/epoch_00000002")
    assert [path.name for path in (first / "film").iterdir()] == ["epoch_00002_0.png"]
    assert [path.name for path in sorted((first / "evaluations").iterdir())][-1] == "epoch_00002.jsonl"
    assert not (first / "images" / "epoch_0010_2.png").exists()
    assert back["best"]["epoch"] == 2
    assert back["best"]["heldout"] == back["heldout"]
    last = weights_of(first, "lora")
    assert all(torch.equal(value, last[key]) for key, value in weights_of(first, "lora_best").items())
    assert any(not torch.equal(value, last[key]) for key, value in best.items())
    _, start = run(first, *words, "train.epochs=1", f"run.resume={first}/checkpoints/epoch_00000001")
    assert start["best"] == {"epoch": 0}
    assert not (first / "lora_best").exists()


@pytest.mark.slow
def test_where_nothing_beats_the_base_there_is_no_best_lora(tmp_path, capsys):
    _, result = run(tmp_path / "run", "rewards.quadratic.curvature=[20]", "train.lr=1", "train.epochs=2")
    assert result["best"] == {"epoch": 0}
    assert not (tmp_path / "run" / "lora_best").exists()
    assert "best on validation prompts: the base model" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.patience=3"], "train.patience: has no effect without prompts.validation and evaluate.every"),
        (["prompts.validation=asset:toy/p1.jsonl"], "prompts.validation: has no effect without evaluate.every"),
        (["train.patience=0", *WATCHED], "train.patience: must be at least 1"),
    ],
)
def test_settings_without_an_effect_are_refused(words, said, tmp_path):
    with pytest.raises(UsageError, match=said.replace(".", r"\.")):
        load_config([*toy_words("ddpo", tmp_path), *words])
