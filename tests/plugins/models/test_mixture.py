"""The toy model and its plots."""

import json

import pytest
import torch
from helpers import ROOT

from condrl import UsageError
from condrl.commands import finetune
from condrl.diffusion.schedule import OU
from condrl.plugins.models.mixture import Mixture
from condrl.toys.oracle import kl_of_masses
from condrl.training.build import make_sampler
from condrl.training.checks import noise_level, transfer, transfer_warning

LAWS = {
    "left": {"weights": [0.3, 0.7], "means": [-2.0, 1.5], "variances": [0.4, 0.25]},
    "right": {"weights": [0.6, 0.4], "means": [-1.0, 2.0], "variances": [0.3, 0.5]},
}


def model(**options):
    return Mixture(torch.device("cpu"), distributions=LAWS, **options)


@pytest.mark.parametrize("correction", ["mlp", "affine"])
def test_the_correction_starts_at_zero_and_leaves_with_reference(correction, tmp_path):
    m = model(correction=correction)
    x, t = torch.randn(6, 1), torch.linspace(0.01, 1, 6, dtype=torch.float64)
    condition = m.encode(["left", "right"] * 3)
    exact = m.distribution.rows(condition).noised(m.schedule.alpha(t), m.schedule.sigma(t)).score(x.double())
    torch.testing.assert_close(m.score(x, t, condition).double(), exact, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for p in m.module.parameters():
            p.add_(0.1)
    assert (m.score(x, t, condition) - exact).abs().max() > 0.01
    with m.reference():
        torch.testing.assert_close(m.score(x, t, condition).double(), exact, atol=1e-4, rtol=1e-4)
    m.save_adapter(tmp_path / "out")
    other = model(correction=correction)
    other.load_adapter(tmp_path / "out")
    torch.testing.assert_close(other.score(x, t, condition), m.score(x, t, condition))


def test_an_affine_correction_is_its_table_at_the_knots():
    m = model(correction="affine", knots=4)
    with torch.no_grad():
        m.module.table.normal_()
    times = m.schedule.grid(4)
    x = torch.tensor([[0.7]]).expand(5, 1)
    found = m.module(x, times, torch.ones(5, dtype=torch.long))
    gain, offset = m.module.table[:, 1].flip(1)
    torch.testing.assert_close(found, gain * x + offset)
    half = m.module(x[:1], (times[:1] + times[1:2]) / 2, torch.ones(1, dtype=torch.long))
    torch.testing.assert_close(half, (found[:1] + found[1:2]) / 2, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_network_learns_the_score():
    m = model(pretrained="network", pretrain_steps=3000, schedule="ou")
    x = torch.linspace(-2.5, 2.5, 50)[:, None]
    for time in (0.3, 1.0, 3.0):
        t = torch.full((50,), time, dtype=torch.float64)
        condition = torch.zeros(50, dtype=torch.long)
        distribution = m.distribution.rows(condition).noised(m.schedule.alpha(t), m.schedule.sigma(t))
        weights = distribution.log_prob(x.double()).softmax(0)
        error = (m.score(x, t, condition).double() - distribution.score(x.double())).square()[:, 0]
        assert (weights * error).sum() < 0.15 * (weights * distribution.score(x.double()).square()[:, 0]).sum()


@pytest.mark.parametrize(
    ("distributions", "message"),
    [
        ({}, "no prompt has a distribution"),
        ({"a": {"weights": [1.0]}}, "distributions.a: expected weights, means and variances"),
        ({"a": {"weights": [1.0], "means": [1.0, 2.0], "variances": [1.0]}}, "distributions.a"),
        ({"a": {"weights": [1.0], "means": [1.0], "variances": [-1.0]}}, "distributions.a: n positive weights"),
        ({"a": LAWS["left"], "b": {"weights": [1.0], "means": [1.0], "variances": [1.0]}}, "as many components"),
    ],
)
def test_bad_laws_are_one_line(distributions, message):
    with pytest.raises(UsageError, match=message):
        Mixture(torch.device("cpu"), distributions=distributions)


def test_unknown_prompts_and_schedule_options():
    with pytest.raises(UsageError, match=r"there is no distribution for 'lefft'. Did you mean 'left'"):
        model().encode(["lefft"])
    with pytest.raises(UsageError, match="schedule_options: vp got an unexpected keyword argument 'rate'"):
        model(schedule_options={"rate": 1.0})


LEVELS = [
    ("flow_sde", {"noise_level": 2**0.5}),
    ("ddim", {"eta": 0.3}),
    ("heun", {"eta": 0.5}),
    ("exponential", {"eta": 1.0, "noise_steps": [1, 2]}),
]


def test_transfer_factor():
    """docs/theory.md 7."""
    assert transfer(0.5, 0.0) == pytest.approx(1.6)
    assert transfer(0.5, 1.0) == pytest.approx(0.64)
    assert transfer(1.4, 0.0) == pytest.approx(0.676, abs=1e-3)
    assert [transfer(1.0, eta) for eta in (0.0, 0.5, 2.0)] == pytest.approx([1, 1, 1])
    found = [make_sampler({"name": name, "steps": 5, "spacing": None, **options}, OU()) for name, options in LEVELS]
    assert [noise_level(sampler) for sampler in found] == [pytest.approx(1), 0.3, 0.5, None]


def test_tuning_at_one_noise_level_and_evaluating_at_another_warns():
    from condrl.loading import load_config

    toy = str(ROOT / "configs/toy/g1.yaml")
    assert transfer_warning(load_config([toy])) is None
    assert transfer_warning(load_config([toy, "evaluate.sampler.eta=0"])) is None  # tuned at eta=1
    warning = transfer_warning(load_config([toy, "sampler.eta=0.5", "evaluate.sampler.eta=0"]))
    assert "tuned at eta=0.5, evaluated at eta=0" in warning
    assert "1.60 times" in warning
    config = load_config([toy, "evaluate.sampler.name=heun", "evaluate.sampler.steps=50"])
    assert config.evaluate.sampler == {"name": "heun", "steps": 50, "spacing": None, "noise_steps": None, "eta": 0.0}
    with pytest.raises(UsageError, match=r"evaluate.sampler.etta"):
        load_config([toy, "evaluate.sampler.etta=0"])


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["g1", "m1", "p1", "plane"])
def test_toy_runs_write_their_plots(problem, tmp_path, capsys):
    words = [str(ROOT / f"configs/toy/{problem}.yaml"), f"run.dir={tmp_path / 'run'}", "train.epochs=2"]
    words += ["evaluate.images_per_prompt=20", "--json", str(tmp_path / "copy.json")]
    assert finetune.main(words) == 0
    assert "quadratic" in capsys.readouterr().out
    pictures = {file.name for file in (tmp_path / "run/images").iterdir()}
    assert pictures == {"objective.png", "plane.png" if problem == "plane" else "density.png"}
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert set(result["heldout"]) == {"quadratic"}
    assert json.loads((tmp_path / "copy.json").read_text()) == result
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert {"path_kl", "objective"} <= set(json.loads(lines[0]))


def test_kl_of_a_law_with_itself_is_zero():
    p = torch.tensor([0.0, 0.3, 0.7], dtype=torch.float64)
    assert kl_of_masses(p, p) == 0


def test_gradients_in_x_flow_through_a_learned_score():
    """What `draft` and `adjoint_matching` differentiate."""
    m = model(pretrained="network", pretrain_steps=5)
    x, t = torch.tensor([[0.3], [1.2]]), torch.full((2,), 0.5, dtype=torch.float64)
    condition = torch.zeros(2, dtype=torch.long)
    with m.reference():
        slope = torch.func.jvp(lambda y: m.score(y, t, condition), (x,), (torch.ones_like(x),))[1]
        with torch.no_grad():
            change = (m.score(x + 1e-2, t, condition) - m.score(x - 1e-2, t, condition)) / 2e-2
    torch.testing.assert_close(slope, change, atol=1e-2, rtol=1e-2)
    assert slope.abs().min() > 0.01
