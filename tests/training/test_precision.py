"""`train.rollout_dtype=auto`: the faster arithmetic by a clock that the tests set, chosen once for a run."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from chains import SHAPES, Shaped, trainer_of
from helpers import toy_words

import condrl.training.precision as precision
from condrl.commands import finetune
from condrl.training.precision import STEPS, measured, set_rollout_dtype


class Timed(Shaped):
    """Its score takes `seconds` of a clock of its own, in each arithmetic; the first call of each is slow."""

    def __init__(self, shape, seconds, overflows=False):
        super().__init__(shape)
        self.costs, self.overflows, self.time, self.asked = seconds, overflows, 0.0, []

    def score(self, x, t, condition):
        rounded = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if rounded else torch.float32
        self.time += self.costs[dtype] + (0 if dtype in self.asked else 100 * (1 if rounded else 0.1))
        self.asked.append(dtype)
        self.evaluations += len(x)
        found = super().score(x, t, condition)
        return found * torch.inf if self.overflows and rounded else found


def costs(full, rounded):
    return {torch.float32: full, torch.bfloat16: rounded}


@pytest.fixture
def of_model(monkeypatch, tmp_path):
    """The trainer of a model by whose clock time is measured."""

    def make(model, **train):
        monkeypatch.setattr(precision, "now", lambda: model.time)
        return trainer_of(tmp_path, model=model, train=train)

    return make


@pytest.mark.parametrize(
    ("full", "rounded", "chosen"),
    [(1.0, 0.5, "bfloat16"), (1.0, 0.94, "bfloat16"), (1.0, 0.96, None), (1.0, 2.0, None)],
)
def test_the_faster_is_chosen_unless_it_hardly_is(full, rounded, chosen, of_model):
    model = Timed((2,), costs(full, rounded))
    found, line = measured(of_model(model).policy, torch.zeros(5, dtype=torch.long))
    assert found == chosen
    assert line == f"a step of 5 images takes 1 s in float32 and {rounded:g} s in bfloat16: {chosen or 'float32'}"
    assert model.asked == (1 + STEPS) * [torch.float32, torch.bfloat16]


def test_what_overflows_is_not_chosen(of_model):
    found, line = measured(of_model(Timed((2,), costs(1.0, 0.1), overflows=True)).policy, torch.zeros(1).long())
    assert found is None
    assert line.endswith("which overflows: float32")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_trial_leaves_nothing_behind(shape, of_model, capsys):
    """But its choice, in the policy and in the config; it has at most as many images as a roll-out at once."""
    model = Timed(shape, costs(1.0, 0.5))
    trainer = of_model(model, rollout_dtype="auto", rollout_batch=3)
    model.evaluations, drawn = 7, torch.random.get_rng_state()
    before = [p.detach().clone() for p in model.module.parameters()]
    set_rollout_dtype(trainer.config, trainer.policy, torch.zeros(9, dtype=torch.long), trainer.processes)
    assert (trainer.config.train.rollout_dtype, trainer.policy.rollout_dtype) == ("bfloat16", torch.bfloat16)
    assert model.evaluations == 7
    assert torch.equal(drawn, torch.random.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(before, model.module.parameters(), strict=True))
    assert capsys.readouterr().err.startswith("train.rollout_dtype=auto: a step of 3 images takes 1 s in float32")


def test_a_network_in_half_precision_is_not_timed(of_model):
    model = Timed((2,), costs(1.0, 0.1))
    trainer = of_model(model)
    model.module.bfloat16()
    assert measured(trainer.policy, torch.zeros(1).long()) == (None, "the network has half precision already")
    assert model.asked == []


def test_a_quantised_network_is_not_timed(of_model):
    model = Timed((2,), costs(1.0, 0.1))
    model.quantize = "nf4"
    found = measured(of_model(model).policy, torch.zeros(1).long())
    assert found == (None, "quantised layers compute in model.dtype")
    assert model.asked == []


@pytest.mark.parametrize("name", [None, "bfloat16", "float16"])
def test_what_is_asked_for_is_not_timed(name, of_model):
    model = Timed((2,), costs(1.0, 0.1))
    trainer = of_model(model, rollout_dtype=name)
    set_rollout_dtype(trainer.config, trainer.policy, torch.zeros(1).long(), trainer.processes)
    assert trainer.policy.rollout_dtype == (name and getattr(torch, name))
    assert model.asked == []


def run(folder: Path, chosen, monkeypatch, *words: str) -> tuple[int, list[dict]]:
    """A run whose trial, if there is one, finds `chosen`; its exit code and record."""
    monkeypatch.setattr(precision, "measured", lambda policy, condition: (chosen, "as a test says"))
    code = finetune.main([*toy_words("ddpo", folder), "train.rollout_dtype=auto", "evaluate.measures=null", *words])
    return code, [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [("bfloat16", None), (None, "bfloat16")])
def test_a_resumed_run_keeps_what_it_chose(first, then, tmp_path, monkeypatch, capsys):
    """Although a trial on the machine that it goes on with would say otherwise; its config says what it has."""
    few = ["train.lr_decay=none", "prompts.heldout=null"]
    whole = run(tmp_path / "whole", first, monkeypatch, *few)
    other = run(tmp_path / "other", then, monkeypatch, *few)
    run(tmp_path / "parts", first, monkeypatch, *few, "train.epochs=3")
    capsys.readouterr()
    parts = run(tmp_path / "parts", then, monkeypatch, *few, "run.resume=auto")
    assert "as a test says" not in capsys.readouterr().err
    assert parts == whole
    assert other[1] != whole[1]  # it makes a difference
    for name in ("whole", "parts"):
        saved = yaml.safe_load((tmp_path / name / "config.yaml").read_text("utf-8"))
        assert saved["train"]["rollout_dtype"] == first
    longer = [f"run.resume={tmp_path}/parts/checkpoints/epoch_00000006", "train.epochs=7"]
    assert run(tmp_path / "elsewhere", then, monkeypatch, *few, *longer)[0] == 0
    saved = yaml.safe_load((tmp_path / "elsewhere" / "config.yaml").read_text("utf-8"))
    assert saved["train"]["rollout_dtype"] == first


@pytest.mark.slow
def test_another_choice_by_hand_is_refused(tmp_path, monkeypatch, capsys):
    run(tmp_path / "run", "bfloat16", monkeypatch, "train.epochs=2", "train.lr_decay=none")
    code, _ = run(
        tmp_path / "run", None, monkeypatch, "run.resume=auto", "train.rollout_dtype=null", "train.lr_decay=none"
    )
    assert code == 2
    assert "that run had train.rollout_dtype=bfloat16, and this config has None" in capsys.readouterr().err
