"""`auto`: the faster arithmetic of roll-outs and memory layout by a clock that the tests set, chosen once for a run."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from chains import SHAPES, Shaped, trainer_of
from helpers import toy_words

import condrl.training.precision as precision
from condrl import UsageError
from condrl.commands import finetune
from condrl.loading import load_for_drawing, load_for_evaluation
from condrl.models.latent import LAYOUTS
from condrl.plugins.models.sd3 import SD3
from condrl.plugins.models.stable_diffusion import StableDiffusion
from condrl.training.precision import STEPS, measured, measured_layout, set_memory_format, set_rollout_dtype


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


# ---------------------------------------------------------------------------------------------- memory layout


class LaidOut(Timed):
    """Its score takes `seconds` by its layout, and as much as `learning` more where it has a gradient."""

    def __init__(self, seconds, learning):
        super().__init__((2,), costs(0.0, 0.0))
        self.memory_format, self.seconds, self.learning, self.rounded = "contiguous", seconds, learning, both(1.0, 1.0)
        self.evaluations = 7

    @property
    def layout(self):
        return LAYOUTS[self.memory_format]

    def lay_out(self, name):
        self.memory_format = name

    def score(self, x, t, condition):
        name, is_rounded = self.memory_format, torch.is_autocast_enabled("cpu")
        factor = self.rounded[name] if is_rounded else 1.0
        self.time += factor * self.seconds[name] + (self.learning[name] if torch.is_grad_enabled() else 0)
        return super().score(x, t, condition)


def both(contiguous, channels_last):
    return {"contiguous": contiguous, "channels_last": channels_last}


@pytest.mark.parametrize(
    ("seconds", "learning", "chosen"),
    [
        (both(1, 1), both(2, 1), "channels_last"),  # slower in nothing
        (both(1, 2), both(5, 2), "channels_last"),  # what updates save is more than what roll-outs lose
        (both(2, 1), both(2, 5), "contiguous"),
        (both(1, 1), both(2, 1.95), "contiguous"),  # hardly faster
    ],
    ids=str,
)
def test_the_faster_layout_of_both_passes_is_chosen(seconds, learning, chosen, of_model):
    model = LaidOut(seconds, learning)
    found, line = measured_layout(of_model(model).policy, torch.zeros(5, dtype=torch.long), [None])
    assert found == chosen
    said = (f"{seconds[n]:.3g} s, and {seconds[n] + learning[n]:.3g} s with its gradient, {n}" for n in LAYOUTS)
    assert line == f"a step of 5 images takes {'; '.join(said)}: {chosen}"


@pytest.mark.parametrize(
    ("name", "chosen"), [(None, "channels_last"), ("auto", "contiguous"), ("bfloat16", "contiguous")]
)
def test_a_layout_is_timed_in_the_arithmetic_that_roll_outs_may_have(name, chosen, of_model, monkeypatch):
    """Rounding halves what contiguous steps take here, and does nothing for the others."""
    model = LaidOut(both(4, 3), both(0, 0))
    monkeypatch.setattr(model, "rounded", both(0.5, 1.0))
    monkeypatch.setattr(precision, "timed_update", lambda policy, condition: 0.0)
    trainer = of_model(model, rollout_dtype=name)
    trainer.config.model = {"memory_format": "auto"}
    set_memory_format(trainer.config, trainer.policy, torch.zeros(3).long(), trainer.processes)
    assert trainer.config.model == {"memory_format": chosen}


def test_the_trial_of_layouts_leaves_its_choice_alone(of_model, capsys):
    """In the model and in the config."""
    model = LaidOut(both(2, 1), both(2, 1))
    trainer = of_model(model, rollout_batch=3)
    trainer.config.model = {"memory_format": "auto"}
    before, drawn = [p.detach().clone() for p in model.module.parameters()], torch.random.get_rng_state()
    set_memory_format(trainer.config, trainer.policy, torch.zeros(9, dtype=torch.long), trainer.processes)
    assert (trainer.config.model["memory_format"], model.memory_format) == ("channels_last", "channels_last")
    assert model.evaluations == 7
    assert torch.equal(drawn, torch.random.get_rng_state())
    assert all(p.grad is None for p in model.module.parameters())
    assert all(torch.equal(p, q) for p, q in zip(before, model.module.parameters(), strict=True))
    assert capsys.readouterr().err.startswith("model.memory_format=auto: a step of 3 images takes 2 s, and 4 s with")
    asked = len(model.asked)
    set_memory_format(trainer.config, trainer.policy, torch.zeros(9, dtype=torch.long), trainer.processes)
    assert len(model.asked) == asked  # what is chosen is not timed again


def test_layouts_compute_the_same(pipeline):
    """And a network has the one that is asked for; its LoRA learns in either."""
    found = []
    for name in (None, "contiguous", "channels_last"):
        torch.manual_seed(0)
        model = StableDiffusion(torch.device("cpu"), path=str(pipeline), lora_rank=2, memory_format=name)
        weight = model.module.conv_in.weight
        assert weight.is_contiguous(memory_format=LAYOUTS[name or "contiguous"])
        x = torch.randn(2, *model.state_shape, generator=torch.Generator().manual_seed(0))
        score = model.score(x, torch.full((2,), 0.5), model.encode(["a red star"] * 2))
        score.square().sum().backward()
        found.append([score.detach(), *(p.grad for p in model.module.parameters() if p.requires_grad)])
    assert not weight.is_contiguous()
    for one, other in zip(found[0], found[2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    model.lay_out("contiguous")
    assert weight.is_contiguous()


def image_run(folder, pipeline, layout, monkeypatch, *words):
    """A run whose trial, if there is one, finds `layout`; its exit code and the layout that its network had."""
    had = []
    monkeypatch.setattr(precision, "measured_layout", lambda *_: (layout, "as a test says"))
    few = ["train.prompts_per_epoch=2", "train.images_per_prompt=2", "rewards.brightness.weight=1", "sampler.steps=2"]
    few += ["train.updates_per_epoch=1", "prompts.heldout=null", "prompts.validation=null", "evaluate.every=null"]
    few += ["evaluate.measures=null", "train.rollout_dtype=null", "train.lr_decay=none", "train.ema=0"]
    score = StableDiffusion.predict

    def noting(self, *place):
        had.append(self.memory_format)
        return score(self, *place)

    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusion, "predict", noting)
        default = [f"model.path={pipeline}", "model.memory_format=auto", f"run.dir={folder}"]
        code = finetune.main([*default, *few, *words])
    return code, set(had)


@pytest.mark.slow
def test_a_resumed_run_keeps_its_layout(tmp_path, pipeline, monkeypatch, capsys):
    assert image_run(tmp_path / "run", pipeline, "channels_last", monkeypatch, "train.epochs=1") == (
        0,
        {"channels_last"},
    )
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text("utf-8"))
    assert saved["model"]["memory_format"] == "channels_last"
    capsys.readouterr()
    longer = ["run.resume=auto", "train.epochs=2"]
    assert image_run(tmp_path / "run", pipeline, "contiguous", monkeypatch, *longer) == (0, {"channels_last"})
    assert "as a test says" not in capsys.readouterr().err
    by_hand = [*longer, "model.memory_format=contiguous"]
    assert image_run(tmp_path / "run", pipeline, "contiguous", monkeypatch, *by_hand)[0] == 2


@pytest.mark.parametrize(
    "load", [load_for_drawing, lambda file, words: load_for_evaluation(file, words, is_trusted=True)]
)
def test_nothing_is_timed_without_a_run(load):
    with pytest.raises(UsageError, match=r"model\.memory_format: auto is timed before a run alone"):
        load(None, ["model.memory_format=auto"])


def test_a_transformer_has_no_layout():
    for name in ("auto", "contiguous", "channels_last"):
        with pytest.raises(UsageError, match=r"model\.memory_format: has no effect on a transformer"):
            SD3(torch.device("cpu"), path="nowhere", memory_format=name)
