"""No option is ignored: each, of every algorithm and of `train`, changes what a short run ends with."""

from dataclasses import fields

import pytest
import torch
from chains import Shaped, trainer_of
from helpers import ALGORITHMS

from condrl import registry
from condrl.algorithms.needs import one_pass
from condrl.config import EvaluateConfig, TrainConfig
from condrl.prompts import Row
from condrl.training.clock import Clock

POLICY_GRADIENT = {
    "kappa": 0.5,
    "normalise": None,
    "leave_one_out": (True, {"advantage_clip": 0.9}),
    "advantage_clip": 0.3,
}  # None: the other one
CLIPPED = {**POLICY_GRADIENT, "clip_range": 0.01}
PROMPT = {"advantage": "prompt", "tracker_least": 1}
SAMPLES = {"score": "samples"}
# each option with another value than its default; or with (that, options without which it has no effect)
OPTIONS = {
    "reinforce": POLICY_GRADIENT,
    "ddpo": {
        **CLIPPED,
        "advantage": "prompt",
        "tracker_length": (10, PROMPT),
        "tracker_least": (2, {"advantage": "prompt"}),
        "balance_steps": True,
    },
    "dpok": {
        **CLIPPED,
        "advantage_clip": (0.3, {"normalise": True}),
        "truncated": (True, {"kappa": 0.5}),
        "leave_one_out": False,
    },
    "grpo": {**CLIPPED, "global_std": False},
    "ctrl": {
        "kappa": 0.5,
        "exploration": 1.0,
        "clip_range": 0.01,
        "memory": 0.3,
        "value_lr": 0.05,
        "value_steps": 3,
        "value_width": 16,
        "value_hint": True,
        "leave_one_out": True,
        "normalise": False,
        "advantage_clip": 0.3,
    },
    "nft": {
        "temperature": 0.8,
        "kappa": 0.5,
        "stages": (3, {"kappa": 0.5}),
        "draws": 2,
        "times": (0.3, 0.6),
        "normalise": False,
        "adaptive": False,
        "old_decay": 0.9,
        "baseline": "value",
        "value_lr": (0.05, {"baseline": "value"}),
        "value_width": (16, {"baseline": "value"}),
    },
    "log_variance": {"kappa": 0.3},
    "feynman_kac": {"kappa": 0.3, "distil": False, "value_lr": 0.05, "value_steps": 3, "value_width": 16},
    "rwr": {"kappa": 0.3, "rounds": 3, "draws": 2, "times": (0.3, 0.6)},
    "diffusion_dpo": {"kappa": 0.3, "draws": 3, "weighting": "epsilon"},
    "online_dpo": {"kappa": 0.3, "draws": 3, "weighting": "epsilon", "contest": 4, "soft": False},
    "d3po": {"kappa": 0.7, "contest": 4, "soft": False, "clip_range": 0.01},
    "draft": {"kappa": 0.5, "last": 2},
    "alignprop": {"kappa": 0.5, "shortest": 3, "longest": 2, "balance_steps": False},
    "draft_lv": {"draws": 3},
    "refl": {"last": 4},
    "flowbp": {"active": 2},
    "adjoint_matching": {"kappa": 0.5, "adjoint": "continuous"},
    "q_learning": {
        "beta": (3.0, SAMPLES),
        "temperature": (1.0, SAMPLES),
        "score": "all",
        "samples": (5, SAMPLES),
        "floor": (0.05, SAMPLES),
        "rule": ("martingale", SAMPLES),
        "value_lr": (0.05, SAMPLES),
        "value_width": (16, SAMPLES),
    },
}
PAIRS = tuple(Row(i, str(i), {"better": [1.0, i], "worse": [-1.0, 0.5]}) for i in range(2))
CASES = [(name, option) for name, options in OPTIONS.items() for option in options]


def ends(folder, algorithm, epochs=3, **train):
    """The weights of all networks after a short run in the plane."""
    made = registry.algorithm.find(algorithm["name"]).target(**_options(algorithm))
    usual = {"epochs": epochs, "lr": 0.02, "updates_per_epoch": 2, "inner_epochs": 1 if one_pass in made.needs else 2}
    data = torch.randn(2, 30, 2, generator=torch.Generator().manual_seed(0))
    model = Shaped((2,), data=data)
    usual |= {} if made.uses_rewards else {"images_per_prompt": 1, "prompts_per_epoch": 4}
    grid = {"spacing": "uniform"} if hasattr(made, "weighting") else {}  # steps of unlike weights
    trainer = trainer_of(folder, model=model, rows=PAIRS, algorithm=algorithm, sampler=grid, train={**usual, **train})
    trainer.fit()
    return torch.cat([p.detach().flatten() for p in trainer.learner.parameters])


def _options(algorithm):
    return {key: value for key, value in algorithm.items() if key != "name"}


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """What a short run ends with, the same for all that ask for the same."""
    known = {}

    def found(algorithm, **train):
        key = repr((algorithm, train))
        if key not in known:
            known[key] = ends(tmp_path_factory.mktemp("usual"), algorithm, **train)
        return known[key]

    return found


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_option_has_a_case(name):
    """Whoever adds an option says here what it changes."""
    elsewhere = {"reinforce": {"keep_graph"}, "nft": {"anchor_guidance"}, "ctrl": {"value_features"}}  # in their tests
    assert set(OPTIONS[name]) == set(registry.algorithm.find(name).options) - elsewhere.get(name, set())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "option"), CASES)
def test_no_option_is_ignored(name, option, usual, tmp_path):
    given = OPTIONS[name][option]
    value, needed = given if isinstance(given, tuple) and isinstance(given[1], dict) else (given, {})
    if value is None:
        value = not registry.algorithm.find(name).options[option].default
    plain, changed = usual({"name": name, **needed}), ends(tmp_path, {"name": name, **needed, option: value})
    assert len(plain) != len(changed) or (plain - changed).abs().max() > 1e-4


TRAIN = {
    "epochs": 2,
    "prompts_per_epoch": 1,
    "images_per_prompt": 4,
    "updates_per_epoch": 4,
    "inner_epochs": 3,
    "normalise_rewards": True,
    "steps": [1, 2],
    "window": 2,
    "same_start": True,
    "steps_per_image": 2,
    "lr": 0.05,
    "warmup": 3,
    "lr_decay": "linear",
    "betas": (0.5, 0.6),
    "weight_decay": 0.5,
    "max_grad_norm": 0.001,
    "kl_budget": 1e-9,
    "over_budget": "adapt",
}
BETTER_TESTED = {  # in test_learner.py: what they change is no result
    "rollout_batch",
    "loss_batch",
    "optimizer",  # in tests/training/test_optimizer.py
    "rollout_dtype",  # in tests/plugins/models/test_stable_diffusion.py
    "max_failed",
    "max_bad_updates",
    "ema",  # in tests/training/test_measure.py
    "patience",  # in tests/training/test_best.py
}


def test_every_key_of_train_has_a_case():
    assert {f.name for f in fields(TrainConfig)} == set(TRAIN) | BETTER_TESTED


@pytest.mark.parametrize("key", TRAIN)
def test_no_key_of_train_is_ignored(key, usual, tmp_path):
    needed = {"kl_budget": 1e-9} if key == "over_budget" else {}
    algorithm = {"name": "ddpo", "kappa": 0.3, "normalise": False}
    plain, changed = usual(algorithm, **needed), ends(tmp_path, algorithm, **{**needed, key: TRAIN[key]})
    assert (plain - changed).abs().max() > 1e-5


def test_every_key_of_evaluate_has_a_test():
    """They are in test_evaluate.py."""
    known = {"measures", "sampler", "prompts", "every", "images_per_prompt", "pictures"}
    assert {f.name for f in fields(EvaluateConfig)} == known


def test_a_seed_is_of_everything_drawn(tmp_path):
    trainers = [trainer_of(tmp_path, algorithm={"name": "nft"}, run={"seed": seed}) for seed in (0, 0, 1)]
    draws = [t.examples(t.collect(0, Clock()), 0) for t in trainers]
    assert torch.equal(draws[0].x, draws[1].x)
    assert not (draws[0].t == draws[2].t).any()
    assert not (draws[0].noise == draws[2].noise).any()
