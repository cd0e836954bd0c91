"""Each diagnosis is provoked by a run that goes wrong that way; a healthy run provokes none."""

import json
from pathlib import Path

import pytest
import torch
from chains import SHAPES, trainer_of
from helpers import ROOT

import condrl
from condrl import RunError, UsageError
from condrl.loading import load_config
from condrl.prompts import load_prompts
from condrl.training.build import make_trainer
from condrl.training.checks import check_combination
from condrl.training.clock import Clock
from condrl.training.diagnose import diagnose, spread_metrics
from condrl.training.evaluate import Estimate, Evaluation
from condrl.training.measure import flat
from condrl.training.trainer import Trainer

SMALL = ["train.images_per_prompt=64", "train.rollout_batch=64", "sampler.steps=8", "model.knots=8"]


def g1(folder: Path, *words: str) -> Trainer:
    config = load_config([str(ROOT / "configs" / "toy" / "g1.yaml"), f"run.dir={folder}", *SMALL, *words])
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    return make_trainer(config, load_prompts(config.prompts.train, "prompts.train"))


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


PROVOKED = {
    "flat_groups": ["rewards.quadratic.linear=[0]", "rewards.quadratic.curvature=[0]", "train.epochs=1"],
    "no_gradient": [
        "rewards.quadratic.linear=[0]",
        "rewards.quadratic.curvature=[0]",
        "train.epochs=1",
        "algorithm.name=ddpo",
    ],
    "clipping": ["train.epochs=2", "train.inner_epochs=8", "train.lr=0.1", "algorithm.clip_range=1e-3"],
    "ratios": ["train.epochs=2", "train.inner_epochs=8", "train.lr=3", "algorithm.kappa=0.01"],
    "collapse": [
        "algorithm.name=draft",
        "sampler.eta=0",
        "rewards.quadratic.curvature=[100]",
        "train.epochs=120",
        "train.lr=0.1",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROVOKED)
def test_what_goes_wrong_is_said_with_what_to_try(name, tmp_path, capsys):
    g1(tmp_path, *PROVOKED[name]).fit()
    found = [line["diagnosis"] for line in lines(tmp_path)]
    assert name in found[-1], lines(tmp_path)[-1]
    said = capsys.readouterr().err
    assert said.count("try" if name != "no_gradient" else "the gradient is zero") >= 1
    assert said.count("warning, epoch") == len({name for names in found for name in names})  # each is said once


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpok", "ctrl", "nft", "draft", "adjoint_matching"])
def test_a_healthy_run_is_left_in_peace(name, tmp_path, capsys):
    words = ["train.epochs=30", f"algorithm.name={name}"] + (["algorithm.kappa=0.5"] if name != "nft" else [])
    if name == "ctrl":  # in 8 steps most of the reward comes from the last noise, which no value network foresees
        words += ["sampler.steps=24", "model.knots=24"]
    g1(tmp_path, *words, "train.images_per_prompt=256", "train.rollout_batch=256").fit()
    assert all(line["diagnosis"] == [] for line in lines(tmp_path))
    assert "warning" not in capsys.readouterr().err
    assert lines(tmp_path)[0]["diversity"] == pytest.approx(1.05, abs=0.3)
    assert lines(tmp_path)[0]["flat_groups"] == 0


@condrl.reward
def sometimes_steep(samples, prompts, *, every: int = 3):
    """Finite, but each `every`-th call has a gradient that is not."""
    sometimes_steep.calls = getattr(sometimes_steep, "calls", 0) + 1
    zero = samples[:, 0] * 0
    return samples[:, 0] + (zero.abs().sqrt() if sometimes_steep.calls % every == 0 else 0)


def test_an_update_without_a_finite_gradient_is_skipped(tmp_path):
    words = ["algorithm.name=draft", "rewards.quadratic.weight=0", "rewards.sometimes_steep.weight=1"]
    trainer = g1(tmp_path, *words, "train.epochs=6", "train.updates_per_epoch=1", "train.loss_batch=64")
    trainer.fit()
    last = lines(tmp_path)[-1]
    assert 0 < last["skipped_updates"] < 6
    assert last["updates"] == 6 - last["skipped_updates"]
    assert all(p.isfinite().all() for p in trainer.learner.weights)


def test_many_of_them_stop_the_run(tmp_path):
    words = ["algorithm.name=draft", "rewards.quadratic.weight=0", "rewards.sometimes_steep.weight=1"]
    trainer = g1(tmp_path, *words, "rewards.sometimes_steep.every=1", "train.max_bad_updates=2")
    with pytest.raises(RunError, match="2 updates in a row, the last after update 0"):
        trainer.fit()
    assert not any(p.any() for p in trainer.learner.weights)  # it starts at zero


@pytest.mark.slow
def test_a_value_network_that_explains_nothing(tmp_path):
    words = ["algorithm.name=ctrl", "algorithm.kappa=0.5", "train.epochs=30", "train.images_per_prompt=256"]
    words += ["sampler.steps=24", "model.knots=24"]
    for rate, expected in ((1e-9, True), (3e-3, False)):
        g1(tmp_path / str(rate), *words, f"algorithm.value_lr={rate}").fit()
        assert ("value_network" in lines(tmp_path / str(rate))[-1]["diagnosis"]) == expected


BUDGET = ["algorithm.name=reinforce", "algorithm.kappa=0", "train.lr=2e-2", "train.epochs=60", "train.kl_budget=0.3"]


def test_a_run_ends_when_its_kl_budget_is_spent(tmp_path):
    trainer = g1(tmp_path, *BUDGET)
    trainer.fit()
    record = lines(tmp_path)
    assert 3 < len(record) < 60
    assert record[-1]["base_kl"] > 0.3 >= max(line["base_kl"] for line in record[:-1])
    assert record[-1]["diagnosis"] == ["kl_budget"]
    again = g1(tmp_path, *BUDGET)
    again.load_state_dict(trainer.state_dict())
    again.fit()
    assert lines(tmp_path) == record  # nothing is added to a run that has ended


@pytest.mark.slow
def test_kappa_adapts_to_the_budget(tmp_path):
    words = ["algorithm.name=reinforce", "algorithm.kappa=0.05", "train.lr=2e-2", "train.epochs=80"]
    g1(tmp_path / "free", *words, "train.kl_budget=100").fit()
    g1(tmp_path / "kept", *words, "train.kl_budget=0.1", "train.over_budget=adapt").fit()
    free, kept = lines(tmp_path / "free"), lines(tmp_path / "kept")
    late = [sum(line["base_kl"] for line in record[40:]) / 40 for record in (free, kept)]
    assert late[0] > 0.2
    assert late[1] < 0.13
    assert min(line["kappa"] for line in kept) == 0.05 < max(line["kappa"] for line in kept)


def test_a_budget_that_adapts_needs_a_kappa():
    words = ["train.kl_budget=1", "train.over_budget=adapt", "algorithm.kappa=0"]
    config = load_config([str(ROOT / "configs" / "toy" / "g1.yaml"), *words])
    with pytest.raises(UsageError, match=r"adapt changes algorithm\.kappa"):
        check_combination(config)


@pytest.mark.parametrize("measured", ["heldout", "validation"])
def test_a_reward_that_is_exploited(measured, tmp_path, capsys):
    steep = ["rewards.quadratic.linear=[3]", "rewards.quadratic.curvature=[0]"]
    trainer = g1(tmp_path, "train.epochs=30", "algorithm.kappa=0.01", "train.lr=5e-2", "evaluate.every=10", *steep)
    trainer.recorder.first = {
        f"{measured}/other": 1.0,
        f"{measured}/other_ci95": 0.1,
        f"{measured}/same": 1.0,
        f"{measured}/same_ci95": 0.1,
    }
    values = iter((0.95, 0.8, 0.5))
    trainer.heldout = lambda: {
        f"{measured}/other": next(values),
        f"{measured}/other_ci95": 0.05,
        f"{measured}/same": 0.9,
        f"{measured}/same_ci95": 0.1,
    }
    trainer.fit()
    hacked = [line["epoch"] for line in lines(tmp_path) if "reward_hacking" in line["diagnosis"]]
    assert hacked == [20, 30]
    assert f"({measured}/other from 1 to 0.8)" in capsys.readouterr().err


@condrl.reward(name="flat_for_one_prompt")
def flat_for_one_prompt(samples, prompts):
    return samples.flatten(1).sum(1) * torch.tensor([float(prompt == "0") for prompt in prompts])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_how_the_images_of_a_prompt_differ(shape, tmp_path):
    """The root mean square deviation from the prompt's mean image, and the share of prompts with one reward."""
    rewards = {"bowl": {"weight": 0.0}, "flat_for_one_prompt": {}}
    trainer = trainer_of(tmp_path, shape, rewards=rewards)
    experience = trainer.collect(0, Clock())
    squares = []
    for row in (0, 1):
        own = experience.rollout.samples[experience.groups == row]
        squares += [(x - own.mean(0)).square().mean().item() for x in own]
    found = spread_metrics(experience)
    assert found["diversity"] == pytest.approx((sum(squares) / len(squares)) ** 0.5, rel=1e-4)
    assert found["flat_groups"] == 0.5


FINE = {"epoch": 25, "updates": 100, "reward/total": 1.0, "reward/total_std": 1.0, "images": 100, "diversity": 1.0}
BOUNDS = [  # what is said at the second value and not at the first
    ("flat_groups", "flat_groups", 0.89, 0.9),
    ("clipping", "clip_fraction", 0.49, 0.5),
    ("ratios", "approx_kl", 0.99, 1.0),
    ("no_gradient", "grad_norm", 1e-9, 0.0),
    ("collapse", "diversity", 0.11, 0.09),
    ("value_network", "value_explains", 0.021, 0.019),
    ("kl_budget", "base_kl", 1.0, 1.01),
]


@pytest.mark.parametrize(("name", "key", "fine", "bad"), BOUNDS)
def test_what_is_said_and_what_is_not(name, key, fine, bad):
    line = {**FINE, "kl_budget": 1.0}
    assert diagnose(FINE, [{**line, key: fine}]) == {}
    assert list(diagnose(FINE, [{**line, key: bad}])) == [name]
    if name == "value_network":
        assert diagnose(FINE, [{**line, key: bad, "updates": 49}]) == {}


# ---------------------------------------------------------------------------------------------- trends


def course(length, **shapes):
    """Lines of a run whose measures are functions of the epoch, with a little noise."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for epoch in range(1, length + 1):
        noise = 0.02 * torch.randn((), generator=generator).item()
        line = {"epoch": epoch, "updates": 4 * epoch, "images": 100 * epoch, "reward/total_std": 0.4, "grad_norm": 0.3}
        line |= {name.replace("__", "/"): shape(epoch) for name, shape in shapes.items()}
        line["reward/total"] = line.get("reward/total", 1.0) + noise
        found.append(line)
    return found


def rises_and_falls(epoch):
    return 1.0 + min(epoch, 40) * 0.01 - max(0, epoch - 60) * 0.005


TRENDS = {
    "reward_fell": course(120, reward__total=rises_and_falls),
    "gradient_growth": course(60, grad_norm=lambda epoch: 0.3 * 1.06**epoch),
    "drift": course(90, reward__total=lambda e: 1.0 + min(e, 30) * 0.01, path_kl=lambda e: 0.1 * e),
    "heldout_fell": course(60, heldout__x=lambda e: 0.5 - 0.001 * abs(e - 20), heldout__x_ci95=lambda e: 0.03),
}
HEALTHY = {
    "level": course(120),
    "rising": course(120, reward__total=lambda e: 1.0 + 0.4 * (1 - 0.97**e), path_kl=lambda e: 0.1 * e),
    "levelling off, held": course(150, reward__total=lambda e: 1.0 + 0.4 * (1 - 0.9**e), path_kl=lambda e: min(e, 40)),
    "a dip": course(120, reward__total=lambda e: 1.2 - (0.05 if 40 < e < 44 else 0)),
    "a falling gradient": course(100, grad_norm=lambda e: 3.0 * 0.98**e),
    "slow, as other prompts show": course(
        80,
        path_kl=lambda e: 0.1 * e,
        validation__x=lambda e: 0.5 + 0.0002 * e,
        validation__x_ci95=lambda e: 0.04,
    ),
    "a path KL that is large by chance": course(60, path_kl=lambda e: 9.0 if e % 10 == 0 else 1.0),
    "prompts by chance, as others show": course(
        120,
        reward__total=rises_and_falls,
        reward__x=rises_and_falls,
        heldout__x=lambda e: 0.5,
        heldout__x_ci95=lambda e: 0.04,
    ),
    "a window that moves": course(40, window=lambda e: e % 8, diversity=lambda e: 0.7 * 0.6 ** (e % 8)),
    "held-out within its interval": course(60, heldout__x=lambda e: 0.5 - 0.0004 * e, heldout__x_ci95=lambda e: 0.03),
}


@pytest.mark.parametrize("name", TRENDS)
def test_a_trend_is_named(name):
    assert list(diagnose(TRENDS[name][0], TRENDS[name])) == [name]
    assert diagnose(TRENDS[name][0], TRENDS[name][:25]) == {}


def test_a_collapse_is_seen_through_a_moving_window():
    """At the first epoch whose window an earlier one had."""
    fallen = course(9, window=lambda e: e % 8, diversity=lambda e: (0.7 if e < 9 else 0.06) * 0.7 ** (e % 8))
    assert diagnose(fallen[0], fallen[:8]) == {}
    assert "differ 9% as much as at the start" in diagnose(fallen[0], fallen)["collapse"]


@pytest.mark.parametrize("fallen", ["reward__total", "heldout__x"])
def test_a_reward_that_falls_on_other_prompts_too_is_named(fallen):
    """Those on which it is measured vouch for it only while it is at its best there; other measures never do."""
    held = {"reward__total": rises_and_falls, "reward__x": rises_and_falls, "heldout__x_ci95": lambda e: 0.04}
    lines = course(120, **held, heldout__x=lambda e: 0.5 - (0.05 if e > 100 and fallen == "heldout__x" else 0))
    del held["reward__x"]
    others = course(120, **held, heldout__x=lambda e: 0.5)
    assert ("reward_fell" in diagnose(lines[0], lines)) == (fallen == "heldout__x")
    assert "reward_fell" in diagnose(others[0], others)


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_courses_have_no_trend(name):
    for end in range(1, len(HEALTHY[name]) + 1):
        assert diagnose(HEALTHY[name][0], HEALTHY[name][:end]) == {}


def test_a_measure_that_is_to_be_lowered_goes_wrong_upwards():
    """As that of a reward with a negative weight: what rises is then what falls otherwise, and the other way round."""
    fallen = TRENDS["heldout_fell"]
    risen = [{**line, "heldout/x": -line["heldout/x"]} for line in fallen]
    assert list(diagnose(risen[0], risen, {"x"})) == ["heldout_fell"]
    assert "heldout/x has risen from -0.5 after epoch 20 to -0.46" in diagnose({}, risen, {"x"})["heldout_fell"]
    assert diagnose(fallen[0], fallen, {"x"}) == diagnose(risen[0], risen, {"y"}) == {}

    first = {"images": 100, "reward/total": 0.0, "reward/total_std": 0.1, "heldout/x": 0.5, "heldout/x_ci95": 0.05}
    for value, wrong in ((0.3, "fell"), (0.7, "rose")):
        line = {**first, "epoch": 9, "reward/total": 1.0, "heldout/x": value}
        assert ("reward_hacking" in diagnose(first, [line])) == (wrong == "fell")
        assert ("reward_hacking" in diagnose(first, [line], {"x"})) == (wrong == "rose")


def test_a_gradient_that_is_zero_throughout_is_named_as_that():
    flat = course(120, grad_norm=lambda epoch: 0.0)
    assert list(diagnose(flat[0], flat)) == ["no_gradient"]


def test_trends_name_the_epoch_from_which_it_went_wrong():
    assert "around epoch 60 to" in diagnose(TRENDS["reward_fell"][0], TRENDS["reward_fell"])["reward_fell"]
    assert "from 0.5 after epoch 20 to 0.46" in diagnose({}, TRENDS["heldout_fell"])["heldout_fell"]
    base = {"heldout/x": 0.52, "heldout/x_ci95": 0.03}
    fallen = TRENDS["heldout_fell"]
    assert "from 0.52 before tuning to 0.46" in diagnose(fallen[0] | base, fallen)["heldout_fell"]
    assert "since epoch" in diagnose({}, TRENDS["drift"])["drift"]


def test_a_resumed_run_knows_its_course(tmp_path):
    trainer = g1(tmp_path, "train.epochs=3", "algorithm.kappa=0.5")
    trainer.fit()
    again = g1(tmp_path, "train.epochs=3", "algorithm.kappa=0.5")
    again.load_state_dict(trainer.state_dict())
    assert (
        again.recorder.lines
        == trainer.recorder.lines
        == [{key: value for key, value in line.items() if key != "diagnosis"} for line in lines(tmp_path)]
    )


def test_a_measure_of_which_every_score_failed_is_not_recorded(tmp_path):
    """It is no number, which a record cannot hold, and which a resumed run could not compare."""
    measures = {"none": Estimate(float("nan"), None, failed=4), "some": Estimate(0.5, (0.4, 0.6))}
    found = flat(Evaluation(measures, {}, {}, torch.zeros(0), [], [], 0.0), "heldout")
    assert found == {"heldout/some": 0.5, "heldout/some_ci95": pytest.approx(0.1)}
