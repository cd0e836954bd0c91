"""Steering plugins against exact answers, and what they cost."""

import pytest
import torch
from helpers import ROOT, run_python

from condrl import UsageError, registry
from condrl.commands import sample as command
from condrl.diffusion.noise import seeded
from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import rollout, sample
from condrl.diffusion.steering import Draws
from condrl.plugins.models.mixture import Mixture
from condrl.plugins.steering.smc import resampled
from condrl.training.build import make_sampler

M1 = {"m1": {"weights": [0.3, 0.7], "means": [-2.0, 1.5], "variances": [0.4, 0.25]}}
SECTIONS = {
    "ddim": {"name": "ddim", "eta": 1.0},
    "euler_maruyama": {"name": "euler_maruyama", "eta": 1.0},
    "dpm_solver_pp": {"name": "dpm_solver_pp", "eta": 1.0},
}


def draws_of(count, steps=20, sampler="ddim", score=lambda x: 0.9 * x - 0.3 * x.square()):
    model = Mixture(torch.device("cpu"), distributions=M1, schedule="ou", correction="affine")
    policy = Policy(model, make_sampler({"steps": steps, "spacing": "uniform", **SECTIONS[sampler]}, model.schedule))
    generators = seeded(list(range(count)))
    return Draws(policy, torch.zeros(count, dtype=torch.long), generators, lambda x, images: score(x[:, 0]))


def steer(name, draws, **options):
    with torch.no_grad():
        return registry.steering.find(name).target(draws, **options)


@pytest.mark.parametrize("sampler", SECTIONS)
@pytest.mark.parametrize("steps", [20, 7])
def test_smc_takes_a_network_call_for_each_step_and_particle(sampler, steps):
    draws = draws_of(3, steps, sampler)
    states = steer("smc", draws, particles=8)
    assert draws.policy.model.evaluations == steps * 8 * 3
    assert states.shape == (3, 1)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("sampler", "count"), [("ddim", 700), *(pytest.param(name, 4000, marks=SLOW) for name in SECTIONS)]
)
def test_smc_draws_from_the_tilted_distribution(sampler, count):
    """Of the chain's own final states, weighed by exp(r / kappa): means of x, x^2 and of the left component."""
    kappa, plain = 0.5, draws_of(200_000, sampler=sampler)
    with torch.no_grad():
        noise = torch.Generator().manual_seed(9)
        final = rollout(plain.policy, plain.condition, noise, 200_000).samples[:, 0].double()
    weights = ((0.9 * final - 0.3 * final.square()) / kappa).softmax(0)
    found = steer("smc", draws_of(count, sampler=sampler), particles=32, kappa=kappa)[:, 0].double()
    for f in (lambda x: x, lambda x: x.square(), lambda x: (x < 0).double()):
        exact, mean = (weights * f(final)).sum().item(), f(found).mean().item()
        error = (f(found).std() / count**0.5).item()
        assert abs(mean - exact) < 4 * error + 0.01, (mean, exact, error)
        assert abs(f(final).mean().item() - exact) > 4 * error  # the chain's own are elsewhere


def test_the_final_states_decide():
    """With hardly any kappa the particle with the highest reward is chosen, whatever was promised on the way."""
    draws = draws_of(4, score=lambda x: torch.sin(40 * x))
    found = steer("smc", draws, particles=6, kappa=1e-6, resample_below=0.0)
    _, condition, generators = draws_of(4).repeated(6)
    with torch.no_grad():
        every = sample(draws.policy, condition, generators, 24).view(4, 6)
    assert torch.equal(found, every.gather(1, torch.sin(40 * every).argmax(1, keepdim=True)))


def test_smc_with_one_particle_is_the_chain():
    draws = draws_of(5)
    with torch.no_grad():
        plain = sample(draws.policy, draws.condition, seeded(list(range(5))), 5)
    assert torch.equal(steer("smc", draws, particles=1), plain)


def test_particles_of_a_deterministic_sampler_are_refused():
    draws = draws_of(2)
    quiet = Policy(
        draws.policy.model,
        make_sampler({"name": "ddim", "eta": 0.0, "steps": 5, "spacing": "uniform"}, draws.policy.model.schedule),
    )
    with pytest.raises(UsageError, match="the sampler has no noise, so copies would stay alike"):
        steer("smc", Draws(quiet, draws.condition, draws.generators, draws.score))


def test_a_score_that_fails_stops_the_drawing_in_a_line(tmp_path, capsys):
    plugin = tmp_path / "fails.py"
    plugin.write_text(
        "import condrl\n@condrl.reward\ndef fails(samples, prompts):\n"
        "    return samples.mean((1, 2, 3)).where(samples.mean((1, 2, 3)) < 0, float('nan'))\n"
    )
    for name in ("smc,particles=2", "best_of_n,n=2"):
        words = ["--prompt", "a red star", "--steer", name, f"plugins=[{plugin}]", "rewards.fails.weight=1"]
        assert command.main([*words, "sampler.steps=2", "--out", str(tmp_path / "x.png")]) == 1
        assert "without every score nothing can be steered" in capsys.readouterr().err


def test_particles_are_redrawn_in_proportion_to_their_weights():
    weights = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]])
    counts = torch.zeros(4)
    for seed in range(2000):
        chosen, log_weights = resampled(weights.log() + 3.0, 0.9, seeded([seed, seed]))
        counts += torch.bincount(chosen[0], minlength=4)
        assert chosen[1].tolist() == [0, 1, 2, 3]  # all of them count: left alone, with their weights
        torch.testing.assert_close(log_weights[1], weights[1].log() + 3.0)
        torch.testing.assert_close(log_weights[0].exp(), torch.full((4,), torch.tensor(3.0).exp() / 4))  # same sum
    torch.testing.assert_close(counts / counts.sum(), weights[0], atol=0.01, rtol=0)


def test_best_of_n_keeps_the_best_of_its_own_draws():
    draws = draws_of(6, score=lambda x: -((x - 1.2) ** 2))
    found = steer("best_of_n", draws, n=5)
    with torch.no_grad():
        images, condition, generators = draws_of(6).repeated(5)
        every = sample(draws.policy, condition, generators, 30).view(6, 5)
    expected = every.gather(1, (every - 1.2).abs().argmin(1, keepdim=True))
    assert torch.equal(found, expected)
    assert images.tolist() == sorted(images.tolist())
    assert draws.policy.model.evaluations == 2 * 20 * 30


@pytest.mark.parametrize("name", ["smc", "best_of_n"])
def test_an_image_does_not_depend_on_those_beside_it(name):
    together = steer(name, draws_of(4))
    draws = draws_of(4)
    alone = Draws(draws.policy, draws.condition[:1], seeded([2]), draws.score)
    torch.testing.assert_close(steer(name, alone)[0], together[2])


@pytest.mark.slow
def test_steered_pictures_obey_better(tmp_path):
    """By the command: the checker's grade as the reward, the base model, the same seeds."""
    words = ["--prompt", "a red star left of a blue square", "--seeds", *map(str, range(8)), "--folder"]
    for folder, more in (("plain", []), ("steered", ["--steer", "best_of_n,n=8", "rewards.shapes.weight=1"])):
        command = [ROOT / "scripts" / "sample.py", *words, tmp_path / folder, "--out", tmp_path / "x.png", *more]
        assert run_python(*map(str, command), cwd=tmp_path).returncode == 0
    from condrl.prompts import Row
    from condrl.rewards.pixels import read_image
    from condrl.rewards.scoring import make_reward

    reward, row = make_reward("shapes", {}), Row(0, "a red star left of a blue square")
    plain, steered = (
        torch.stack([read_image(file, "x") for file in sorted((tmp_path / folder).iterdir())])
        for folder in ("plain", "steered")
    )
    assert reward(steered, [row] * 8).mean() > reward(plain, [row] * 8).mean() + 0.05


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steer", "smc"], "--steer needs rewards to draw with"),
        (["--steer", "sms", "rewards.shapes.weight=1"], "unknown steering 'sms'. Did you mean 'smc'?"),
        (["--steer", "smc,particle=3", "rewards.shapes.weight=1"], "--steer.particle: there is no such key"),
        (["--steer", "smc,particles=many", "rewards.shapes.weight=1"], "--steer.particles"),
        (["--steer", "smc,8", "rewards.shapes.weight=1"], "--steer smc,8: give NAME or NAME,option=value"),
        (["--steer", "smc,particles=0", "rewards.shapes.weight=1"], "particles must be at least 1"),
        (["--steer", "best_of_n,n=0", "rewards.shapes.weight=1"], "n must be at least 1"),
        (["rewards.shapes.weight=1"], "has no effect on drawing"),
    ],
)
def test_what_cannot_steer_is_one_line(words, said, tmp_path, capsys):
    assert command.main(["--prompt", "a red star", "--out", str(tmp_path / "x.png"), *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) <= 2  # and perhaps a progress bar
