"""What a run writes down."""

import json
import math

import pytest
import torch
from helpers import ROOT, toy_words

from condrl.commands import finetune
from condrl.commands.result import summary
from condrl.io.records import to_json, write_json


def test_json_has_null_for_what_is_not_a_finite_number(tmp_path):
    content = {"a": math.nan, "b": [math.inf, 1.5, (-math.inf, None)], "c": {"d": 2, "e": "NaN"}}
    expected = {"a": None, "b": [None, 1.5, [None, None]], "c": {"d": 2, "e": "NaN"}}
    assert json.loads(to_json(content), parse_constant=pytest.fail) == expected
    write_json(tmp_path / "deep" / "x.json", content)
    assert json.loads((tmp_path / "deep" / "x.json").read_text()) == expected


def test_the_result_is_the_paired_difference(tmp_path):
    words = [*toy_words("dpok", tmp_path / "run"), "train.epochs=2", "evaluate.images_per_prompt=50"]
    assert finetune.main(words) == 0
    row = json.loads((tmp_path / "run" / "result.json").read_text())["heldout"]["quadratic"]
    assert row["difference"]["mean"] == pytest.approx(row["tuned"]["mean"] - row["base"]["mean"], abs=1e-6)
    low, high = row["difference"]["ci95"]
    assert low <= row["difference"]["mean"] <= high
    assert row["better"] + row["worse"] == 1
    wide = row["base"]["ci95"][1] - row["base"]["ci95"][0]
    assert high - low < wide / 2  # pairing takes away what differs from prompt to prompt


@pytest.mark.slow
def test_large_seeds_and_no_heldout_prompts(tmp_path, capsys):
    words = [*toy_words("dpok", tmp_path / "run"), "train.epochs=1", f"run.seed={2**64 - 1}"]
    assert finetune.main([*words, "evaluate.images_per_prompt=3"]) == 0
    capsys.readouterr()
    words = [*toy_words("dpok", tmp_path / "bare"), "train.epochs=1", "prompts.heldout=null"]
    assert finetune.main(words) == 0
    out = capsys.readouterr().out
    assert "no held-out prompts" in out
    assert "base" not in out


@pytest.mark.slow
def test_the_start_says_what_counts(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("a red star\na red star\na blue circle\n")
    words = ["rewards.sharpness.weight=2", "rewards.shapes.weight=-1", f"prompts.train={tmp_path / 'mine.txt'}"]
    few = [
        "train.prompts_per_epoch=2",
        "train.images_per_prompt=2",
        "train.rollout_batch=4",
        "train.updates_per_epoch=1",
    ]
    assert finetune.main([*words, *few, "sampler.steps=2", f"run.dir={tmp_path / 'run'}", "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "rewards: sharpness (weight 2), shapes (weight -1)" in said
    assert f"prompts: {tmp_path / 'mine.txt'} (3)" in said
    assert "prompts.train: 1 row repeats an earlier one" in said
    assert "measured on asset:shapes/heldout.txt (512), base and tuned: shapes_exact, shapes, clip, sharpness" in said
    assert not (tmp_path / "run").exists()


def test_held_out_prompts_that_are_trained_on_are_told(tmp_path, capsys):
    words = [*toy_words("dpok", tmp_path / "run"), "--dry-run"]  # whose toy has one list for both
    assert finetune.main(words) == 0
    assert "warning: 4 of the held-out prompts are trained on too" in capsys.readouterr().err


def test_long_names_do_not_run_into_the_numbers():
    name = "a_reward_with_a_name_of_fifty_letters_and_then_some"
    estimate = {"mean": 0.5, "ci95": (0.25, 0.75)}
    row = {"base": estimate, "tuned": estimate, "difference": estimate, "better": 0.5, "worse": 0.5}
    result = {"heldout": {name: row}, "seconds": 1.0, "peak_memory_gb": 1.0, "images": 8}
    head, line, said, _ = summary(result, ROOT).splitlines()
    assert line.split() == [name, *["0.500", "[0.250,", "0.750]"] * 3]
    assert head.index("base") == line.index("0.500")  # below each other
    assert said == f"better: {name}"


def test_adjoint_matching_takes_no_more_images_at_a_time_than_loss_batch(tmp_path, monkeypatch):
    from condrl.loading import load_config
    from condrl.prompts import load_prompts
    from condrl.training.build import make_trainer

    words = [
        str(ROOT / "configs/toy/p1.yaml"),
        "algorithm.name=adjoint_matching",
        f"run.dir={tmp_path}",
        "sampler.steps=3",
    ]
    words += ["train.prompts_per_epoch=2", "train.images_per_prompt=8", "train.rollout_batch=16", "train.loss_batch=3"]
    trainer = make_trainer(config := load_config(words), load_prompts(config.prompts.train, "prompts.train"))
    sizes = []
    score = trainer.policy.model.score

    def counted(x, *rest):
        if torch.is_grad_enabled() and x.requires_grad:
            sizes.append(len(x))
        return score(x, *rest)

    monkeypatch.setattr(trainer.policy.model, "score", counted)
    trainer.run_epoch(0)
    assert max(sizes) == 3
