"""The plugins of docs/extending.md, saved and run as the page says, and checked against what is known."""

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run_python

from condrl import UsageError, registry
from condrl.__main__ import main
from condrl.diffusion.noise import seeded
from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import rollout, sample
from condrl.diffusion.schedule import OU
from condrl.diffusion.steering import Draws
from condrl.loading import load_config
from condrl.plugins.models.mixture import Mixture
from condrl.prompts import Row, load_prompts
from condrl.rewards.pixels import read_image
from condrl.rewards.scoring import make_reward, score
from condrl.rewards.testing import smooth_images
from condrl.toys.exact import solve
from condrl.training.build import make_policy, make_rewards, make_sampler

PAGE = (ROOT / "docs" / "extending.md").read_text("utf-8")
FILES = dict(re.findall(r"^`(\w+\.py)`:\n\n```python\n(.*?)```$", PAGE, re.DOTALL | re.MULTILINE))
SHELL = re.findall(r"^```sh\n(.*?)```$", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = [line for block in SHELL for line in block.replace("\\\n    ", "").splitlines()]
FEW = [  # of a run of the quickstart
    *("train.epochs=1", "train.prompts_per_epoch=2", "train.images_per_prompt=4", "train.rollout_batch=8"),
    *("train.updates_per_epoch=2", "evaluate.prompts=2", "evaluate.pictures=1"),
]
M1 = {"m1": {"weights": [0.3, 0.7], "means": [-2.0, 1.5], "variances": [0.4, 0.25]}}


def save(folder: Path) -> Path:
    for name, code in FILES.items():
        (folder / name).write_text(code, "utf-8")
    return folder


@pytest.fixture
def plugins(tmp_path):
    """The page's plugins, registered; afterwards they are forgotten (conftest)."""
    for name in FILES:
        registry.load_file(str(save(tmp_path) / name))
    return registry


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where a reader has saved the page's files."""
    return save(tmp_path_factory.mktemp("reader"))


@pytest.fixture
def run(folder, monkeypatch, capsys) -> Callable[..., str]:
    """Runs a command of the page in the reader's folder, with further words; returns what it prints."""

    def run(line: str, *more: str) -> str:
        program, *words = [*shlex.split(line), *more]
        monkeypatch.chdir(folder)
        if program == "python":
            done = run_python(*words, cwd=folder)
            assert done.returncode == 0, done.stderr
            return done.stdout
        monkeypatch.setattr(sys, "argv", [program, *words])
        code, said = main(), capsys.readouterr()
        assert code == 0, said.err
        return said.out

    return run


def command(start: str, *parts: str) -> str:
    """The first command of the page that starts so and holds the parts."""
    return next(line for line in COMMANDS if line.startswith(start) and all(part in line for part in parts))


def plugin_of(line: str) -> str:
    return line.partition("[")[2].partition("]")[0]


def toy(sampler: str = "ddim", steps: int = 20, **options) -> Policy:
    model = Mixture(torch.device("cpu"), distributions=M1, schedule="ou")
    section = {"name": sampler, "steps": steps, "spacing": "uniform", **options}
    return Policy(model, make_sampler(section, model.schedule))


# ---------------------------------------------------------------------------------------------- the page


def test_every_block_is_a_file_that_is_run_or_a_command():
    assert sorted(FILES) == ["my_algorithm.py", "my_model.py", "my_rewards.py", "my_sampler.py", "my_steering.py"]
    assert PAGE.count("```") == 2 * (len(FILES) + len(SHELL))
    for name in FILES:
        assert any(f"plugins=[{name}]" in line for line in COMMANDS), name
    assert all(line.startswith(("condrl ", "python ")) for line in COMMANDS)


def test_every_option_has_a_comment(plugins):
    own = [p for r in registry.REGISTRIES.values() for p in r.plugins.values() if Path(p.source).name in FILES]
    assert {p.kind for p in own} == set(registry.REGISTRIES)
    for plugin in own:
        assert plugin.description, plugin.name
        for option in plugin.options.values():
            assert option.comment, f"{plugin.name}: {option.name}"


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("python ")])
def test_a_file_checks_itself(line, run):
    run(line)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("my_rewards.py", "return (distances + ", "return (distances.detach() + "),
        ("my_sampler.py", "sigma_u * kept)", "sigma_u * kept.square())"),
        ("my_model.py", "i1e(pull) / i0e(pull)", "i0e(pull) / i1e(pull)"),
    ],
)
def test_a_file_finds_what_is_wrong_with_itself(file, right, wrong, tmp_path):
    assert right in FILES[file]
    (tmp_path / file).write_text(FILES[file].replace(right, wrong))
    assert run_python(file, cwd=tmp_path).returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", [line for line in COMMANDS if " toy/" not in line and "finetune" in line], ids=plugin_of
)
def test_a_plugin_tunes_the_quickstart(line, run):
    said = run(line, *FEW)
    assert "held-out, tuned" in said


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in COMMANDS if " sample " in line], ids=plugin_of)
def test_a_plugin_draws(line, run, folder):
    (path,) = re.findall("wrote (.*)", run(line))
    assert read_image(folder / path, "the sheet").shape[0] == 3


@pytest.mark.slow
def test_a_steering_is_measured(run):
    (line,) = [line for line in COMMANDS if " evaluate " in line]
    assert "network calls of an image: 10 plain, 38 steered" in run(line)  # 4 steps of 8 chains, 6 of one


@pytest.mark.slow
def test_the_plugins_command_lists_them(run):
    words = re.findall(r"`(condrl plugins [^`]*)`", PAGE)
    assert words
    for line in words:
        assert f"{line.split()[-1]}:" in run(line)


def test_the_files_and_names_that_the_page_mentions_are_there():
    for name in re.findall(r"`(plugins/\w+/\w+\.py)`", PAGE):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(condrl(?:\.\w+)+)`", PAGE):
        module, _, attribute = name.rpartition(".")
        found = __import__(module, fromlist=["x"])
        assert hasattr(found, attribute) or __import__(name, fromlist=["x"]), name


# ---------------------------------------------------------------------------------------------- the plugins


def test_variety_compares_the_images_of_a_prompt_with_each_other(plugins):
    reward = make_reward("variety", {})
    images = torch.zeros(5, 3, 16, 16)
    images[1], images[2], images[4] = 0.25, 1.0, 0.5
    rows = [Row(i, "a red star") for i in (0, 0, 0, 1, 1)]
    found = score([reward], images, rows).total
    torch.testing.assert_close(found, torch.tensor([0.25, 0.25, 0.75, 0.5, 0.5]))
    assert score([reward], images[:1], rows[:1]).total.item() == 1


def test_warmth_is_red_less_blue(plugins):
    images = smooth_images(3)
    means = images.mean((2, 3))
    found = score([make_reward("warmth", {"blue": 0.5})], images, [Row(i, "") for i in range(3)]).total
    torch.testing.assert_close(found, means[:, 0] - 0.5 * means[:, 2])


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0, 2.0])
def test_fading_with_one_noise_level_is_the_exponential_integrator(plugins, eta):
    schedule = OU()
    faded = make_sampler({"name": "fading", "steps": 9, "spacing": None, "first": eta, "last": eta}, schedule)
    constant = make_sampler({"name": "exponential", "steps": 9, "spacing": None, "eta": eta}, schedule)
    for name in ("A", "B", "S"):
        assert torch.equal(getattr(faded, name), getattr(constant, name)), name


def test_fading_goes_from_one_noise_level_to_the_other_and_can_be_made_quiet(plugins):
    section = {"name": "fading", "steps": 5, "spacing": None, "first": 1.0, "last": 0.0}
    chain = make_sampler(section, OU())
    assert chain.noise_level.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert chain.stochastic.tolist() == [True] * 4 + [False]
    quiet = make_sampler({**section, "noise_steps": [1]}, OU())
    assert quiet.stochastic.tolist() == [False, True, False, False, False]
    assert quiet.S[1] == chain.S[1]
    with pytest.raises(UsageError, match=r"sampler.first: must be at least 0"):
        make_sampler({**section, "first": -1.0}, OU())


def test_fading_draws_the_data(plugins):
    """The mixture's mean and variance at the final time, by samples."""
    policy = toy("fading", steps=200)
    x = rollout(policy, torch.zeros(4000, dtype=torch.long), torch.Generator().manual_seed(0), 4000).samples.double()
    alpha, sigma = (c(torch.tensor(0.05)) for c in (policy.model.schedule.alpha, policy.model.schedule.sigma))
    mean = 0.3 * -2.0 + 0.7 * 1.5
    variance = 0.3 * 0.4 + 0.7 * 0.25 + 0.3 * 2.0**2 + 0.7 * 1.5**2 - mean**2
    assert abs(x.mean() - alpha * mean) < 0.12  # 4 standard errors
    assert abs(x.var() - (alpha**2 * variance + sigma**2)) < 0.2


@pytest.mark.slow
def test_reward_weighted_regression_finds_the_optimum(run, folder):
    """By the page's own command: of the exact problem, without sampling."""
    said = run(command("condrl finetune toy/m1"))
    assert "held-out, tuned" in said
    config = load_config([str(folder / "runs" / "weighted" / "config.yaml")])
    policy, rows = make_policy(config, torch.device("cpu")), load_prompts(config.prompts.train, "prompts.train")
    problem = solve(policy, rows, make_rewards(config), config.algorithm["kappa"])
    assert abs(problem.gap_closed(problem.audit(policy))) < 1e-6  # not yet
    policy.model.load_adapter(folder / "runs" / "weighted" / "lora")
    assert problem.gap_closed(problem.audit(policy)) > 0.95
    assert (folder / "runs" / "weighted" / "images" / "density.png").is_file()
    lines = [json.loads(line) for line in (folder / "runs" / "weighted" / "metrics.jsonl").read_text().splitlines()]
    assert abs(lines[-1]["reward/total"] - lines[0]["reward/total"]) < 0.5  # the pretrained model's, to the end


def test_weights_are_of_each_prompt_alone(plugins):
    algorithm = registry.algorithm.find("reward_weighted").target(kappa=0.5)
    rewards, groups = torch.tensor([0.0, 0.5, 7.0, 7.0, 1.0]), torch.tensor([3, 3, 1, 1, 3])
    found = algorithm.weights(rewards, groups)
    torch.testing.assert_close(found[2:4], torch.ones(2))
    expected = (rewards[[0, 1, 4]] / 0.5).exp()
    torch.testing.assert_close(found[[0, 1, 4]], expected / expected.mean())


def test_points_of_a_ring_are_as_far_out_as_their_prompt_says(plugins):
    model = registry.model.find("ring").target(torch.device("cpu"), radii={"small": 1.0, "large": 2.0})
    section = {"name": "ddim", "steps": 100, "spacing": "log_snr", "eta": 1.0}
    policy = Policy(model, make_sampler(section, model.schedule))
    condition = model.encode(["small", "large"]).repeat_interleave(1000)
    x = rollout(policy, condition, torch.Generator().manual_seed(0), 2000).samples
    found = x.norm(dim=1).view(2, 1000).square().mean(1).double()
    alpha, sigma = (c(torch.tensor(0.05)) for c in (model.schedule.alpha, model.schedule.sigma))
    torch.testing.assert_close(found, alpha**2 * found.new_tensor([1.0, 4.0]) + 2 * sigma**2, atol=0, rtol=0.05)
    angles = torch.atan2(x[:, 1], x[:, 0])
    assert abs(angles.cos().mean()) < 0.1  # every direction alike


@pytest.mark.slow
def test_a_ring_is_tuned(run, folder):
    run(command("condrl finetune toy/plane"), "train.epochs=20")
    result = json.loads((folder / "runs" / "ring" / "result.json").read_text())
    assert result["heldout"]["quadratic"]["difference"]["mean"] > 0.5


def draws_of(count: int) -> Draws:
    policy = toy(eta=1.0)
    noise = seeded(list(range(count)))
    return Draws(policy, torch.zeros(count, dtype=torch.long), noise, lambda x, images: -(x[:, 0] - 1.2).square())


@torch.no_grad()
def test_an_early_choice_of_one_is_the_chain(plugins):
    draws, choose = draws_of(6), registry.steering.find("early_choice").target
    plain = sample(draws.policy, draws.condition, seeded(list(range(6))), 6)
    assert torch.equal(choose(draws, n=1, steps=7), plain)
    with pytest.raises(UsageError, match="steps from 1 to 20; got 4 and 0"):
        choose(draws, steps=0)


@torch.no_grad()
def test_an_early_choice_raises_the_reward_for_fewer_calls(plugins):
    choose = registry.steering.find("early_choice").target
    means = []
    for n in (1, 8):
        draws = draws_of(400)
        means.append(draws.score(choose(draws, n=n, steps=15), torch.arange(400)).mean())
        assert draws.policy.model.evaluations == 400 * (15 * n + 5)
    assert means[1] > means[0] + 1


@torch.no_grad()
def test_an_early_choice_does_not_depend_on_the_images_beside_it(plugins):
    choose = registry.steering.find("early_choice").target
    together, draws = choose(draws_of(4)), draws_of(4)
    alone = choose(Draws(draws.policy, draws.condition[:1], seeded([2]), draws.score))
    torch.testing.assert_close(alone[0], together[2])
