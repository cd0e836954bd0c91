"""Steering plugins against exact answers, and what they cost."""

import math

import numpy as np
import pytest
import torch
from helpers import ROOT, run_python

import condrl
from condrl import RunError, UsageError, registry
from condrl.commands import sample as command
from condrl.diffusion.noise import seeded
from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import rollout, sample
from condrl.diffusion.steering import Draws
from condrl.plugins.models.mixture import Mixture
from condrl.plugins.steering.guidance import Guided
from condrl.plugins.steering.smc import POTENTIALS, resampled
from condrl.prompts import Row
from condrl.toys import oracle
from condrl.toys.exact import means_of
from condrl.training.build import make_sampler

M1 = {"m1": {"weights": [0.3, 0.7], "means": [-2.0, 1.5], "variances": [0.4, 0.25]}}
SECTIONS = {
    "ddim": {"name": "ddim", "eta": 1.0},
    "euler_maruyama": {"name": "euler_maruyama", "eta": 1.0},
    "dpm_solver_pp": {"name": "dpm_solver_pp", "eta": 1.0},
}


def draws_of(count, steps=20, sampler="ddim", score=lambda x: 0.9 * x - 0.3 * x.square(), **schedule):
    model = Mixture(
        torch.device("cpu"), distributions=M1, schedule="ou", schedule_options=schedule, correction="affine"
    )
    policy = Policy(model, make_sampler({"steps": steps, "spacing": "uniform", **SECTIONS[sampler]}, model.schedule))
    generators = seeded(list(range(count)))
    return Draws(policy, torch.zeros(count, dtype=torch.long), generators, lambda x, images: score(x[:, 0]))


def final_masses(policy, line):
    """Where the chain on M1 ends, on a line, without sampling."""
    means = means_of(policy, line, Row(0, "m1"))
    start = line.masses(-line.x.square() / (2 * policy.model.schedule.prior_std**2))
    return oracle.audit(line, means, means, policy.sampler.S, start, line.x, 1.0).masses


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


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SECTIONS)
def test_smc_draws_from_the_tilted_distribution(sampler):
    """Of the chain's own final states, weighed by exp(r / kappa): means of x, x^2 and of the left component."""
    kappa, count, plain = 0.5, 1500, draws_of(200_000, sampler=sampler)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("potential", "kappa", "steps", "particles"),
    [("difference", 0.5, 12, 16), ("max", 0.5, 5, 32), ("sum", 1.0, 5, 32)],
)
def test_whatever_weighs_on_the_way_the_tilted_distribution_is_drawn(potential, kappa, steps, particles):
    """Of the chain's own final states, whose distribution is known without sampling."""
    count, draws = 800, draws_of(800, steps)
    found = steer("smc", draws, particles=particles, kappa=kappa, potential=potential)[:, 0].double()
    assert draws.policy.model.evaluations == steps * particles * count
    line = oracle.Line(-8.0, 8.0, 1000)
    masses = final_masses(draws.policy, line)
    tilted = (masses.log() + (0.9 * line.x - 0.3 * line.x.square()) / kappa).softmax(0)
    for f in (lambda x: x, lambda x: x.square(), lambda x: (x < 0).double()):
        exact, error = (tilted * f(line.x)).sum().item(), (f(found).std() / count**0.5).item()
        assert abs(f(found).mean().item() - exact) < 4 * error
    assert abs((tilted - masses) @ line.x) > 20 * found.std() / count**0.5  # the chain's own mean is elsewhere


@pytest.mark.slow
def test_the_weighted_mean_of_512_particles_is_that_of_the_tilted_distribution(monkeypatch):
    """E x over p* to .03 on M1 in 120 steps from t = 6 to .002; on the way to .05 alone the mean is 1.457, of data noised so far."""
    draws, weights, last = draws_of(32, 120, end=6.0, final_time=0.002), [], []
    plain, multinomial = draws.score, torch.multinomial
    draws = Draws(draws.policy, draws.condition, draws.generators, lambda x, i: last.append(x) or plain(x, i))
    monkeypatch.setattr(torch, "multinomial", lambda w, *n, **g: weights.append(w) or multinomial(w, *n, **g))
    steer("smc", draws, particles=512, kappa=0.5)
    assert draws.policy.model.evaluations == 120 * 512 * 32
    means = (torch.stack(weights) * last[-1].view(32, 512)).sum(1)
    assert means.std().item() / 32**0.5 < 0.008
    assert means.mean().item() == pytest.approx(1.4934, abs=0.03)


def test_potentials_are_what_they_are_called():
    """Three steps' rewards of a particle and what each step weighs by."""
    rewards = torch.tensor([2.0, -1.0, 3.0])
    for name, expected in (("difference", [2, -3, 4]), ("max", [2, 2, 3]), ("sum", [2, 1, 4])):
        start, weigh = POTENTIALS[name]
        running, gains = torch.tensor(start), []
        for found in rewards:
            running, gain = weigh(running, found)
            gains.append(gain.item())
        assert gains == expected


@pytest.mark.parametrize("potential", POTENTIALS)
def test_copies_keep_what_their_path_was_weighed_by(potential):
    """Redrawn at every step: each image's weights are r(x_K) and no more, so all particles of one reward are alike."""
    draws = draws_of(3, score=lambda x: x * 0 + 2.0)
    found = steer("smc", draws, particles=4, potential=potential, resample_below=1.0, kappa=1e-3)
    with torch.no_grad():
        _, condition, generators = draws_of(3).repeated(4)
        every = sample(draws.policy, condition, generators, 12).view(3, 4)
    assert torch.isclose(every, found).any(1).all()


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


@pytest.mark.parametrize("n", [2, 6])
def test_the_kl_of_best_of_n_is_its_bound(n):
    """log n - (n - 1) / n where no two states have the same reward, and below it where many do.

    The density of the best is n F^(n - 1) p, F being the distribution function of the chain's own final states.
    """
    count, bound, line = 1000, math.log(n) - (n - 1) / n, oracle.Line(-8.0, 8.0, 1000)
    draws = draws_of(count, steps=8, score=lambda x: x)
    found = steer("best_of_n", draws, n=n)[:, 0].double()
    masses = final_masses(draws.policy, line)
    below = line.interpolate(masses.cumsum(0), found - line.width / 2).clamp(1e-9, 1)
    log_ratio = math.log(n) + (n - 1) * below.log()
    assert abs(log_ratio.mean().item() - bound) < 4 * log_ratio.std().item() / count**0.5
    signs = steer("best_of_n", draws_of(count, steps=8, score=lambda x: (x > 0).float()), n=n)[:, 0] > 0
    p, q = masses[line.x > 0].sum().item(), signs.double().mean().item()
    assert abs(q - (1 - (1 - p) ** n)) < 4 * (q * (1 - q) / count) ** 0.5 + 1 / count
    assert q * math.log(q / p) + (1 - q) * math.log(max(1 - q, 1e-9) / (1 - p)) < bound


@pytest.mark.parametrize("name", ["smc", "best_of_n", "guidance"])
def test_an_image_does_not_depend_on_those_beside_it(name):
    together = steer(name, draws_of(4))
    draws = draws_of(4)
    alone = Draws(draws.policy, draws.condition[:1], seeded([2]), draws.score)
    torch.testing.assert_close(steer(name, alone)[0], together[2])


# ---------------------------------------------------------------------------------------------- guidance

COVARIANCE = [[0.6, 0.3], [0.3, 0.5]]
SLOPES = torch.tensor([[1.0, -0.5], [0.2, 2.0], [-1.5, 0.0]])  # of each image's reward


def plane(mean, sampler, schedule="ou", **options):
    """A policy on N(mean, COVARIANCE)."""
    only = {"weights": [1.0], "means": [mean], "variances": [COVARIANCE]}
    model = Mixture(
        torch.device("cpu"), distributions={"p": only}, schedule=schedule, schedule_options=options, correction="affine"
    )
    return Policy(model, make_sampler({"spacing": "uniform", **sampler}, model.schedule))


@pytest.mark.parametrize(
    "sampler",
    [
        {"name": "ddim", "eta": 1.0, "steps": 12},
        {"name": "ddim", "eta": 0.0, "steps": 12},
        {"name": "euler_maruyama", "eta": 0.6, "steps": 12},
        {"name": "heun", "eta": 0.5, "steps": 6},
        {"name": "dpm_solver_pp", "eta": 0.0, "steps": 12},
    ],
    ids=lambda sampler: f"{sampler['name']} {sampler['eta']}",
)
def test_guidance_by_a_linear_reward_is_the_chain_of_the_tilted_gaussian(sampler):
    """p exp(r / kappa) = N(m + C b / kappa, C): state by state what a model of it draws from the same noise."""
    kappa, count, mean = 0.7, len(SLOPES), torch.tensor([0.4, -0.2])
    policy, images = plane(mean.tolist(), sampler), torch.arange(count)
    draws = Draws(policy, images * 0, seeded([0, 1, 2]), lambda x, rows: (SLOPES[rows] * x).sum(1))
    found = steer("guidance", draws, kappa=kappa)
    for i in images.tolist():
        target = plane((mean + torch.tensor(COVARIANCE) @ SLOPES[i] / kappa).tolist(), sampler)
        exact = sample(target, images[:1] * 0, seeded([i]), 1)[0]
        torch.testing.assert_close(found[i], exact, atol=2e-5, rtol=1e-4)
    guided = policy.model.evaluations
    sample(policy, images * 0, seeded([0, 1, 2]), count)
    assert policy.model.evaluations == 2 * guided  # as many network calls as without


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_guidance_moves_the_mean_as_the_closed_form_says(eta):
    """(b / kappa) s0^2 M(1, eta) (1 - rho_T^(1 + eta^2)), M(1, eta) = 1 (docs/theory.md 7), with a start that tells."""
    slope, kappa, variance = 0.9, 0.5, 0.49
    one = {"weights": [1.0], "means": [1.0], "variances": [variance]}
    options = {"end": 1.0, "final_time": 1e-3}
    model = Mixture(torch.device("cpu"), distributions={"g": one}, schedule="ou", schedule_options=options)
    policy = Policy(
        model, make_sampler({"name": "ddim", "eta": eta, "steps": 400, "spacing": "log_snr"}, model.schedule)
    )
    condition = torch.zeros(2, dtype=torch.long)
    draws = Draws(policy, condition, seeded([0, 1]), lambda x, images: slope * x[:, 0])
    moved = steer("guidance", draws, kappa=kappa) - sample(policy, condition, seeded([0, 1]), 2)
    alpha, sigma = (c(torch.tensor(1.0)).item() for c in (model.schedule.alpha, model.schedule.sigma))
    rho = alpha * (variance / (alpha**2 * variance + sigma**2)) ** 0.5
    expected = slope / kappa * variance * (1 - rho ** (1 + eta**2))
    torch.testing.assert_close(moved, torch.full_like(moved, expected), rtol=0.02, atol=0)


def test_guidance_starts_without_signal():
    """Nothing is promised there, whatever the network's slope; later steps make up for it."""
    mean, slope = torch.tensor([0.4, -0.2]), SLOPES[1]
    policy = plane(mean.tolist(), {"name": "ddim", "eta": 1.0, "steps": 100}, "rectified_flow", end=1.0)
    assert policy.model.schedule.alpha(policy.sampler.times[0]) == 0
    condition = torch.zeros(1, dtype=torch.long)
    draws = Draws(policy, condition, seeded([0]), lambda x, images: (slope * x).sum(1))
    moved = steer("guidance", draws, kappa=0.7) - sample(policy, condition, seeded([0]), 1)
    torch.testing.assert_close(moved[0], torch.tensor(COVARIANCE) @ slope / 0.7, rtol=0.05, atol=0.02)
    policy.model.predict = lambda x, t, condition: x.sin()  # as a network, whose output differs from state to state
    x, k = torch.tensor([[0.3, 1.1]]), torch.zeros(1, dtype=torch.long)
    assert torch.equal(Guided(draws, 0.7).transition(x, k, condition).action, x.sin())
    assert not torch.equal(Guided(draws, 0.7).transition(x, k + 1, condition).action, x.sin())


def test_guidance_needs_the_gradient_that_a_reward_declares():
    draws = draws_of(2, score=lambda x: x.detach())
    with pytest.raises(RunError, match=r"the reward has no gradient: say @condrl.reward\(differentiable=False\)"):
        steer("guidance", draws)


@pytest.mark.parametrize("kappa", [0.0, -1.0, math.nan])
def test_guidance_needs_a_positive_kappa(kappa):
    with pytest.raises(UsageError, match="kappa must be above 0"):
        steer("guidance", draws_of(2), kappa=kappa)


# ---------------------------------------------------------------------------------------------- the command


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
        (["--steer", "smc", "model.path=somewhere"], "--steer needs rewards to draw with"),
        (["--steer", "sms", "rewards.shapes.weight=1"], "unknown steering 'sms'. Did you mean 'smc'?"),
        (["--steer", "smc,particle=3", "rewards.shapes.weight=1"], "--steer.particle: there is no such key"),
        (["--steer", "smc,particles=many", "rewards.shapes.weight=1"], "--steer.particles"),
        (["--steer", "smc,8", "rewards.shapes.weight=1"], "--steer smc,8: give NAME or NAME,option=value"),
        (["--steer", "smc,particles=0", "rewards.shapes.weight=1"], "particles must be at least 1"),
        (["--steer", "best_of_n,n=0", "rewards.shapes.weight=1"], "n must be at least 1"),
        (
            ["--steer", "guidance", "rewards.shapes.weight=1"],
            "--steer guidance differentiates the reward, and shapes has",
        ),
        (["--steer", "guidance,kappa=0", "rewards.brightness.weight=1"], "kappa must be above 0"),
        (["--steer", "smc,potential=least", "rewards.shapes.weight=1"], "--steer.potential"),
        (["rewards.shapes.weight=1"], "has no effect on drawing"),
    ],
)
def test_what_cannot_steer_is_one_line(words, said, tmp_path, capsys):
    assert command.main(["--prompt", "a red star", "--out", str(tmp_path / "x.png"), *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) <= 2  # and perhaps a progress bar


def test_a_reward_without_a_gradient_is_refused_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("condrl.training.build.make_policy", lambda *_: pytest.fail("a model is loaded"))
    words = ["rewards.brightness.weight=1", "rewards.jpeg_compressibility.weight=0.1", "--out", str(tmp_path / "x.png")]
    assert command.main(["--prompt", "a red star", "--steer", "guidance", *words]) == 2
    assert "and jpeg_compressibility has no gradient: use smc or best_of_n" in capsys.readouterr().err


def test_steering_from_python(pipeline):
    """Of one image there is none to choose from; of several the brightest is kept; guidance sees through the decoder."""
    drawn = {}
    for name in (None, "best_of_n,n=1", "best_of_n,n=6", "guidance,kappa=0.001"):
        words = [f"model.path={pipeline}", "model.lora_rank=2", "sampler.eta=1", "sampler.steps=3"]
        rewards = ["rewards.brightness.weight=1"] if name else []
        images = condrl.sample(*words, *rewards, prompts=["a red star"], seeds=[0, 1, 2, 3], steer=name)
        drawn[name] = torch.tensor([float(np.asarray(image, float).mean()) for image in images])
    plain, one, six, guided = drawn.values()
    assert torch.equal(plain, one)
    assert six.mean() > plain.mean()
    assert (guided > plain).all()
