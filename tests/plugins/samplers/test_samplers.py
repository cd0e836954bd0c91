"""Samplers against published formulas and the distributions that they should reproduce (docs/theory.md 3)."""

import dataclasses
import itertools
import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from helpers import ROOT
from torch.distributions import Normal

from condrl import UsageError
from condrl.diffusion.noise import randn
from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import Place, advance, rollout
from condrl.diffusion.schedule import OU, VP, RectifiedFlow, Schedule
from condrl.diffusion.schedulers import FlowSchedule, flow_from_diffusers, schedule_from_diffusers
from condrl.diffusion.transition import Coefficients, Sampler
from condrl.loading import load_config
from condrl.plugins.models.mixture import Mixture
from condrl.prompts import Row
from condrl.rewards.scoring import make_reward, score
from condrl.toys import reference
from condrl.toys.oracle import Line
from condrl.toys.reference import monte_carlo_value
from condrl.training.build import make, make_sampler, with_noise_at
from condrl.training.checks import check_combination

LAWS = {"m1": {"weights": [0.3, 0.7], "means": [-2.0, 1.5], "variances": [0.4, 0.25]}}
SCHEDULES = [VP(), OU(), RectifiedFlow(), schedule_from_diffusers({"num_train_timesteps": 1000, "steps_offset": 1})]
NAMES = ["ddim", "euler_maruyama", "exponential", "heun", "dpm_solver_pp", "flow_sde", "dance_sde", "pcpo"]


def option_of(name, level):
    """The option that gives a sampler a noise level; pcpo's steps have their own, at a weight that all can have."""
    if name == "pcpo":
        return {"weight": 100.0} if level else {"noise_steps": []}
    return {"noise_level" if name.endswith("_sde") else "eta": level}


def sampler(schedule, name, steps=10, spacing="uniform", **options):
    return make_sampler({"name": name, "steps": steps, "spacing": spacing, **options}, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES[:3])
def test_schedules_agree_with_their_definitions(schedule):
    """f = d log(alpha) / dt and g^2 = d(sigma^2) / dt - 2 f sigma^2 (docs/theory.md 2)."""
    t = torch.linspace(0.05, 0.9, 30, dtype=torch.float64, requires_grad=True)
    (f,) = torch.autograd.grad(schedule.alpha(t).log().sum(), t)
    (growth,) = torch.autograd.grad(schedule.sigma(t).square().sum(), t)
    torch.testing.assert_close(schedule.f(t), f, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(schedule.g2(t), growth - 2 * f * schedule.sigma(t) ** 2, atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(schedule.time_of(schedule.log_snr(t.detach())), t.detach(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("spacing", ["uniform", "log_snr"])
def test_grids_fall_from_noise_to_data(schedule, spacing):
    times = schedule.grid(16, spacing)
    assert times.shape == (17,)
    assert (times.diff() < 0).all()
    assert (times[0].item(), times[-1].item()) == (schedule.end, schedule.final_time)
    gaps = times.diff() if spacing == "uniform" else schedule.log_snr(times).diff()
    gaps = gaps[gaps.isfinite()][: -1 if schedule.final_time == 0 else None]
    torch.testing.assert_close(gaps, gaps[:1].expand_as(gaps), rtol=1e-5, atol=1e-9)
    if not hasattr(schedule, "alpha_bar"):
        with pytest.raises(UsageError, match="trailing needs a diffusers scheduler"):
            schedule.grid(16, "trailing")


def test_exponential_is_ddim_and_ddpm():
    for schedule in SCHEDULES:
        for eta in (0.0, 1.0):
            ours, theirs = (sampler(schedule, name, eta=eta) for name in ("exponential", "ddim"))
            for a, b in zip((ours.A, ours.B, ours.S), (theirs.A, theirs.B, theirs.S), strict=True):
                torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_flow_sde_is_flow_grpo():
    """Liu et al. 2025: x (1 + s^2 / 2t dt) + v (1 + s^2 (1 - t) / 2t) dt, s = a sqrt(t / (1 - t)), dt < 0."""
    schedule, a = RectifiedFlow(), 0.7
    ours = sampler(schedule, "flow_sde", noise_level=a)
    t, dt = ours.times[:-1], ours.times.diff()
    level = a * (t / (1 - torch.cat([t[1:2], t[1:]]))).sqrt()  # their code takes 1 - t of the second time at first
    x, score = torch.randn(2, 10, dtype=torch.float64)
    v = -x / (1 - t) - t / (1 - t) * score
    mean = x * (1 + level**2 / (2 * t) * dt) + v * (1 + level**2 * (1 - t) / (2 * t)) * dt
    torch.testing.assert_close(ours.A * x + ours.B * score, mean, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(ours.S, level * (-dt).sqrt(), atol=1e-10, rtol=1e-10)


def test_dance_sde_has_a_constant_rate_of_noise():
    """Xue et al. 2025: x - D v + e^2 s D / 2, standard deviation e sqrt(D)."""
    schedule, e = RectifiedFlow(), 0.3
    ours = sampler(schedule, "dance_sde", noise_level=e)
    t, step = ours.times[:-1], -ours.times.diff()
    x, score = torch.randn(2, 10, dtype=torch.float64)
    v = -x / (1 - t) - t / (1 - t) * score
    torch.testing.assert_close(ours.S, e * step.sqrt(), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(
        ours.A * x + ours.B * score, x - step * v + e**2 * score * step / 2, atol=1e-9, rtol=1e-9
    )


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_overshooting_with_ddim_is_the_exponential_sampler(eta):
    """docs/theory.md 3, S4."""
    from condrl.diffusion.transition import Overshoot

    schedule = VP()
    exact = sampler(schedule, "exponential", eta=eta)

    def ddim(x, action, t, w, model):
        a_t, a_w, s_t, s_w = (
            c(v)[:, None]
            for c, v in ((schedule.alpha, t), (schedule.alpha, w), (schedule.sigma, t), (schedule.sigma, w))
        )
        noise = -s_t * action
        return a_w * (x - s_t * noise) / a_t + s_w * noise

    ours = Overshoot(schedule, exact.times, torch.full((10,), eta, dtype=torch.float64), ddim)
    k = torch.arange(10)
    x = torch.randn(10, 3, dtype=torch.float64)
    act = lambda y, t: torch.sin(y) * t[:, None]  # noqa: E731
    (a, _), (b, _) = ours.step(k, x, act), exact.step(k, x, act)
    torch.testing.assert_close(a.mean, b.mean, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(a.std, b.std, atol=1e-9, rtol=1e-9)


def on_a_line(line, schedule, name, steps, spacing, **options):
    """Final masses of the mixture's own sampler, started exactly, and the exact distribution at the final time."""
    model = Mixture(torch.device("cpu"), distributions=LAWS)
    chain = sampler(schedule, name, steps, spacing, **options)
    transition = model.distribution.rows(torch.zeros(line.cells, dtype=torch.long))
    x = line.x[:, None]

    def at(t):
        t = torch.full((line.cells,), t, dtype=torch.float64)
        return transition.noised(schedule.alpha(t), schedule.sigma(t))

    masses = line.masses(at(schedule.end).log_prob(x))
    for k in range(steps):
        step, _ = chain.step(
            torch.full((line.cells,), k),
            x,
            lambda y, t: transition.noised(schedule.alpha(t), schedule.sigma(t)).score(y),
        )
        masses = line.push(masses, step.mean[:, 0], step.std.flatten()[0].item())
    return masses, line.masses(at(schedule.final_time).log_prob(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("euler_maruyama", {"eta": 1.0}),
        ("euler_maruyama", {"eta": 0.0}),
        ("exponential", {"eta": 0.7}),
        ("ddim", {"eta": 1.0}),
        ("ddim", {"eta": 0.0}),
        ("flow_sde", {"noise_level": 0.7}),
    ],
)
def test_first_order_convergence(name, options):
    """The mean of x^2 on M1 from the exact start, steps doubled twice (docs/theory.md 3)."""
    line, schedule = Line(-6, 6, 1000), OU(end=3.0)
    errors = []
    for steps in (16, 32, 64):
        masses, exact = on_a_line(line, schedule, name, steps, "uniform", **options)
        errors.append(abs(((masses - exact) * line.x**2).sum().item()))
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert slopes[-1] == pytest.approx(1, abs=0.2), (errors, slopes)


@pytest.mark.parametrize("eta", [0.5, 1.0, 1.4])
def test_every_noise_level_keeps_the_marginals(eta):
    line = Line(-9, 9, 600)
    masses, exact = on_a_line(line, OU(end=3.0), "exponential", 64, "log_snr", eta=eta)
    assert (masses - exact).abs().sum().item() / 2 < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpm_solver_pp", "heun"])
def test_second_order_convergence(name):
    """The probability-flow map of a few points, steps doubled."""
    model = Mixture(torch.device("cpu"), distributions=LAWS, schedule="ou", schedule_options={"end": 3.0})
    transition = model.distribution.rows(torch.zeros(5, dtype=torch.long))
    schedule, start = model.schedule, torch.linspace(-1.5, 1.5, 5, dtype=torch.float64)[:, None]

    def final(name, steps):
        chain, x = sampler(schedule, name, steps, "log_snr", eta=0.0), start
        solver_state = chain.init(x)
        for k in range(steps):
            step, solver_state = chain.step(
                torch.full((5,), k),
                x,
                lambda y, t: transition.noised(schedule.alpha(t), schedule.sigma(t)).score(y),
                solver_state,
            )
            x = step.mean
        return x

    truth = final("heun", 2000)
    errors = [(final(name, steps) - truth).abs().max().item() for steps in (40, 80, 160)]
    assert math.log2(errors[1] / errors[2]) == pytest.approx(2, abs=0.4), errors


def dpm_formula(schedule, times, k, eta, x, clean, earlier):
    """Lu et al. 2022 with noise, docs/theory.md 3: D = x0 + (x0 - x0_before) / (2 rho), rho = h_before / h."""
    h = schedule.log_snr(times).diff()
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    target = clean if earlier is None else clean + (clean - earlier) * h[k] / (2 * h[k - 1])
    mean = sigma[k + 1] / sigma[k] * math.exp(-(eta**2) * h[k]) * x
    mean = mean + alpha[k + 1] * (1 - math.exp(-(1 + eta**2) * h[k])) * target
    return mean, sigma[k + 1] * math.sqrt(1 - math.exp(-2 * eta**2 * h[k]))


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0, 1.3])
@pytest.mark.parametrize("spacing", ["uniform", "log_snr"])
def test_dpm_solver_pp_is_its_formula_with_unequal_steps(eta, spacing):
    schedule = OU()
    ours = sampler(schedule, "dpm_solver_pp", 6, spacing, eta=eta)
    h = schedule.log_snr(ours.times).diff()
    assert (h.max() / h.min() > 1.5) == (spacing == "uniform")
    x, clean, earlier = torch.randn(3, 1, 4, dtype=torch.float64)
    for k in (0, 2, 5):
        alpha, sigma = schedule.alpha(ours.times[k]), schedule.sigma(ours.times[k])
        act = lambda y, t, a=alpha, s=sigma: (a * clean - y) / s**2  # noqa: E731
        transition, state = ours.step(torch.tensor([k]), x, act, earlier if k else ours.init(x))
        mean, std = dpm_formula(schedule, ours.times, k, eta, x, clean, earlier if k else None)
        torch.testing.assert_close(transition.mean, mean, atol=1e-9, rtol=1e-9)
        assert transition.std.item() == pytest.approx(std.item(), abs=1e-9)
        torch.testing.assert_close(state, clean, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("eta", "kind"), [(0.0, "dpmsolver++"), (1.0, "sde-dpmsolver++")])
def test_dpm_solver_pp_is_diffusers(eta, kind):
    """At diffusers' own times, whose steps are unequal."""
    config = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    theirs = DPMSolverMultistepScheduler(**config, algorithm_type=kind, timestep_spacing="trailing")
    theirs.set_timesteps(7)
    schedule = schedule_from_diffusers({**config, "timestep_spacing": "trailing"})
    ours = sampler(schedule, "dpm_solver_pp", 7, "trailing", eta=eta)
    assert torch.equal(schedule.network_time(ours.times[:-1]).long(), theirs.timesteps)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, generator=g)
    solver_state = ours.init(x)
    for k, timestep in enumerate(theirs.timesteps):
        predicted, noise = torch.randn(2, 2, 4, generator=g)
        act = lambda y, t, p=predicted: schedule.score(p, y, t)  # noqa: E731
        transition, solver_state = ours.step(torch.full((2,), k), x, act, solver_state)
        x = theirs.step(predicted, timestep, x, variance_noise=noise).prev_sample
        torch.testing.assert_close(transition.sample(noise), x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("first", [1, 5])
def test_a_chain_entered_on_its_way_is_the_whole_chain(name, first):
    """With what a multi-step solver remembers; without it that is refused, not silently another chain."""
    model = Mixture(torch.device("cpu"), distributions=LAWS)
    policy = Policy(model, sampler(model.schedule, name, 8, **option_of(name, 0.0)))
    whole = rollout(policy, torch.zeros(3, dtype=torch.long), torch.Generator().manual_seed(0), 3)
    noise, place, entered = torch.Generator().manual_seed(1), whole.place(first, torch.arange(3)), []
    while place.k < policy.steps:
        _, place = advance(policy, place, whole.condition, noise)
        entered.append(place.x)
    assert torch.equal(torch.stack(entered), whole.states[first + 1 :])
    if name == "dpm_solver_pp":
        with pytest.raises(UsageError, match="cannot be entered at a step without the solver state"):
            advance(policy, Place(whole.states[first], first, None), whole.condition, noise)
    row, rewards = Row(0, "m1", {}), [make_reward("quadratic", {"weight": 1.0})]
    value = monte_carlo_value(policy, whole.place(first, torch.arange(1)), row, rewards, 0.5, 4, noise)
    expected = score(rewards, whole.samples[:1], [row]).total
    assert value.value == pytest.approx(expected.item(), abs=1e-5)


# ---------------------------------------------------------------------------------------------- flows of diffusers


FLOW = FlowSchedule(shift=3.0, least=0.003)  # as Stable Diffusion 3's


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("heun", "dpm_solver_pp")])
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_without_noise_a_flows_step_is_eulers_as_diffusers_has_it(name, steps):
    """From the velocity at every state of a chain, in float32, from pure noise to the data."""
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(steps)
    schedule = flow_from_diffusers(theirs.config, 256)
    ours = sampler(schedule, name, steps, None, **option_of(name, 0.0))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, generator=g)
    for k, timestep in enumerate(theirs.timesteps):
        v = torch.randn(2, 4, generator=g)
        transition, _ = ours.step(torch.full((2,), k), x, lambda y, t, v=v: schedule.score(v, y, t))
        assert transition.std.max() == 0
        x = theirs.step(v, timestep, x).prev_sample
        torch.testing.assert_close(transition.mean, x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["flow_sde", "dance_sde"])
@pytest.mark.parametrize("steps", [1, 6])
def test_sdes_of_flows_are_their_papers_from_pure_noise_to_the_data(name, steps):
    """Liu et al. 2025, with 1 - t of the second time at t = 1; Xue et al. 2025: x + v dt - e^2 s dt / 2."""
    ours = sampler(FLOW, name, steps, None, noise_level=0.7)
    t, dt = ours.times[:-1], ours.times.diff()
    x, v = torch.randn(2, steps, 1, dtype=torch.float64)
    transition, _ = ours.step(torch.arange(steps), x, lambda y, t: FLOW.score(v, y, t))
    left = 1 - torch.cat([ours.times[1:2], t[1:]])
    level = 0.7 * (t / left).sqrt() if name == "flow_sde" else torch.full_like(t, 0.7)
    mean = x[:, 0] * (1 + level**2 / (2 * t) * dt) + v[:, 0] * (1 + level**2 * (1 - t) / (2 * t)) * dt
    torch.testing.assert_close(transition.mean[:, 0], mean, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(transition.std.flatten(), level * (-dt).sqrt(), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("level", [0.0, 0.5])
def test_every_sampler_draws_what_a_flow_has_learned(name, level):
    """A Gaussian, whose velocity is linear: its mean and deviation, from pure noise; or a refusal in a sentence."""
    if (name, level) == ("heun", 0.5):
        with pytest.raises(UsageError, match=r"sampler\.eta: heun would overshoot"):
            sampler(FLOW, name, 100, None, eta=level)
        return
    chain, mean, std = sampler(FLOW, name, 100, None, **option_of(name, level)), 1.5, 0.4

    def act(y, t):
        alpha, sigma = (c(t)[:, None] for c in (FLOW.alpha, FLOW.sigma))
        away = (y - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        return FLOW.score(sigma * away - (mean + alpha * std**2 * away), y, t)  # E[eps - x0 | y]

    g = torch.Generator().manual_seed(0)
    x = torch.randn(20000, 1, dtype=torch.float64, generator=g)
    state = chain.init(x)
    for k in range(100):
        step, state = chain.step(torch.full((len(x),), k), x, act, state)
        x = step.sample(torch.randn(x.shape, dtype=torch.float64, generator=g))
    assert x.mean().item() == pytest.approx(mean, abs=0.02)
    assert x.std().item() == pytest.approx(std, rel=0.05)


# ---------------------------------------------------------------------------------------------- from pure noise


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("level", [0.0, 0.7])
def test_a_flow_that_starts_at_pure_noise_rolls_out(name, level):
    """From t = 1, where the network says the denoised prediction; the first step is the limit of steps from below."""
    options, model = (
        option_of(name, level),
        Mixture(torch.device("cpu"), distributions=LAWS, schedule="rectified_flow", schedule_options={"end": 1.0}),
    )
    if (name, level) == ("heun", 0.7):
        with pytest.raises(UsageError, match=r"sampler\.eta: heun would overshoot"):
            sampler(model.schedule, name, 6, eta=level)
        return
    policy = Policy(model, sampler(model.schedule, name, 6, **options))
    assert not model.schedule.alpha(policy.sampler.times[0])
    found = rollout(policy, torch.zeros(64, dtype=torch.long), torch.Generator().manual_seed(0), 64)
    assert found.states.isfinite().all()
    assert torch.equal(found.log_probs.isfinite().all(1), policy.sampler.stochastic)
    transition, _ = advance(policy, found.place(0, torch.arange(64)), found.condition, torch.Generator())
    torch.testing.assert_close(transition.denoised, model.distribution.mean().float().expand(64, 1))

    if name == "pcpo" and level:  # it weighs by the network's output, which is another one where there is no signal
        return
    x, clean = torch.randn(2, 1, 4, dtype=torch.float64)

    def first(end):
        schedule = RectifiedFlow(end=end)
        ours = sampler(schedule, name, 6, **options)

        def model(y, t):
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            return ((alpha * clean - y) / sigma**2).where(alpha > 0, clean)

        return ours.step(torch.zeros(1, dtype=torch.long), x, model, ours.init(x))[0]

    exact, limit = first(1.0), first(1 - 1e-10)
    torch.testing.assert_close(exact.mean, limit.mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(exact.std, limit.std, atol=1e-4, rtol=1e-4)


def test_flow_sde_starts_as_flow_grpo_does():
    """At t = 1, Liu et al. 2025: x (1 + s^2 / 2 dt) + v dt, s = a sqrt(1 / (1 - t_1)), v = x - x0."""
    schedule, a = RectifiedFlow(end=1.0), 0.7
    ours = sampler(schedule, "flow_sde", noise_level=a)
    x, clean = torch.randn(2, 1, 4, dtype=torch.float64)
    transition, _ = ours.step(torch.zeros(1, dtype=torch.long), x, lambda y, t: clean)
    dt = ours.times.diff()[0]
    level = a * (1 / (1 - ours.times[1])).sqrt()
    torch.testing.assert_close(transition.mean, x * (1 + level**2 / 2 * dt) + (x - clean) * dt)
    assert transition.std.item() == pytest.approx((level * (-dt).sqrt()).item())


@pytest.mark.parametrize("name", NAMES)
def test_a_transition_says_what_the_network_said(name):
    """The action, and the denoised prediction by Tweedie's formula, without a second call."""
    schedule, calls = OU(), []
    ours = sampler(schedule, name)
    x = torch.randn(10, 3, dtype=torch.float64)

    def model(y, t):
        calls.append(len(y))
        return torch.sin(y) - y * t[:, None]

    transition, _ = ours.step(torch.arange(10), x, model, ours.init(x))
    alpha, sigma = (c(ours.times[:-1])[:, None] for c in (schedule.alpha, schedule.sigma))
    assert calls == [10] * (2 if name == "heun" else 1)
    torch.testing.assert_close(transition.action, torch.sin(x) - x * ours.times[:-1, None])
    torch.testing.assert_close(transition.denoised, (x + sigma**2 * transition.action) / alpha)


# ---------------------------------------------------------------------------------------------- noise_steps


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noise_at_chosen_steps_alone(name, schedule):
    """A chosen step is the noisy sampler's and another the deterministic one's, in mean and in spread."""
    k = torch.arange(6)
    mixed, noisy, quiet = (
        sampler(schedule, name, 6, **{**chosen, **option_of(name, level)})
        for level, chosen in ((0.8, {"noise_steps": [1, 4]}), (0.8, {}), (0.0, {}))
    )
    x, act = torch.randn(6, 3, dtype=torch.float64), lambda y, t: torch.sin(y) - y * t[:, None]
    solver_state = torch.randn(6, 3, dtype=torch.float64) if name == "dpm_solver_pp" else None
    found, high, low = (s.step(k, x, act, solver_state)[0] for s in (mixed, noisy, quiet))
    chosen = torch.tensor([False, True, False, False, True, False])[:, None]
    torch.testing.assert_close(found.mean, high.mean.where(chosen, low.mean))
    torch.testing.assert_close(found.std, high.std.where(chosen, torch.zeros(())))
    assert mixed.stochastic.tolist() == chosen.flatten().tolist()
    assert (high.mean - low.mean).abs()[chosen.flatten()].amax(1).min() > 1e-8  # or equality would say nothing


@dataclasses.dataclass(frozen=True)
class Wobbly(Sampler):
    """A user's sampler with an option of another name."""

    schedule: Schedule
    times: torch.Tensor
    spread: torch.Tensor

    @property
    def stochastic(self):
        return self.spread > 0

    def step(self, k, x, model, state=None):
        action = model(x, self.times[k])
        return self.transition(k, x, action, x + action, self.spread[k, None]), None


@dataclasses.dataclass(frozen=True)
class Quietable(Wobbly):
    def with_noise(self, mask):
        return dataclasses.replace(self, spread=self.spread.where(mask, 0.0))


def test_noise_steps_of_a_users_sampler():
    """By `with_noise`, whatever its options are called; one line where it has none."""
    times, every = VP().grid(4), torch.ones(4, dtype=torch.float64)
    quiet = with_noise_at(Quietable(VP(), times, every), [0, 2])
    assert quiet.stochastic.tolist() == [True, False, True, False]
    with pytest.raises(UsageError, match=r"config sampler\.noise_steps: this sampler has no with_noise"):
        with_noise_at(Wobbly(VP(), times, every), [0])
    with pytest.raises(UsageError, match=r"config sampler\.noise_steps: .*Coefficients\.at"):
        with_noise_at(Coefficients(VP(), times, every, every, every), [0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sampler.steps=2000"], r"sampler\.steps: must be between 1 and 1000, the training steps .* got 2000"),
        (["sampler.steps=2000", "sampler.spacing=leading"], r"sampler\.steps: .* got 2000"),
        (["sampler.steps=0"], r"sampler\.steps: must be between 1 .* got 0"),
        (
            ["sampler.steps=1", "sampler.spacing=leading", "algorithm.name=ddpo"],
            r"goes to the data.*raise sampler\.steps",
        ),
        (["sampler.eta=0", "algorithm.name=ddpo"], r"set sampler\.eta=1"),
    ],
)
def test_steps_that_cannot_be_are_told_before_a_model_is_loaded(words, message):
    config = load_config([str(ROOT / "configs" / "quickstart.yaml"), *words])
    with pytest.raises(UsageError, match=message):
        check_combination(config)


@pytest.mark.parametrize("name", NAMES)
def test_logged_probabilities_are_the_gaussians(name):
    """Whatever the sampler: x' has the distribution that its log-probability and its KL say, also with a window of noise."""
    model = Mixture(torch.device("cpu"), distributions=LAWS)
    policy = Policy(model, sampler(model.schedule, name, 8, noise_steps=[1, 2, 5], **option_of(name, 0.8)))
    found = rollout(policy, torch.zeros(64, dtype=torch.long), torch.Generator().manual_seed(0), 32)
    assert policy.sampler.stochastic.nonzero().flatten().tolist() == [1, 2, 5]
    for k in range(8):
        solver_state = None if found.solver_states is None else found.solver_states[k]
        transition = policy.transition(found.states[k], torch.full((64,), k), found.condition, solver_state)
        if k in (1, 2, 5):
            expected = (
                Normal(transition.mean, transition.std.expand_as(transition.mean)).log_prob(found.states[k + 1]).sum(1)
            )
            torch.testing.assert_close(found.log_probs[k].float(), expected, atol=1e-4, rtol=1e-4)
            z = (found.states[k + 1] - transition.mean) / transition.std
            assert 0.7 < z.std().item() < 1.3
        else:
            assert found.log_probs[k].isnan().all()
            torch.testing.assert_close(found.states[k + 1], transition.mean, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", ["ou", "rectified_flow"])
def test_every_sampler_draws_the_pretrained_mixture(name, schedule):
    """A few thousand points have the right mean and spread."""
    model = Mixture(torch.device("cpu"), distributions=LAWS, schedule=schedule)
    policy = Policy(model, sampler(model.schedule, name, 60, **option_of(name, 0.55)))
    x = rollout(policy, torch.zeros(4000, dtype=torch.long), torch.Generator().manual_seed(1), 4000).samples
    assert x.mean().item() == pytest.approx(0.45, abs=0.12)
    assert x.std().item() == pytest.approx(1.69, abs=0.1)
    assert (x < -0.5).float().mean().item() == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize("name", NAMES)
def test_samplers_drive_stable_diffusion(name, model):
    policy = Policy(model, sampler(model.schedule, name, 4, "log_snr", **option_of(name, 0.8)))
    found = rollout(policy, model.encode(["a red star", "a blue circle"]), torch.Generator().manual_seed(0), 2)
    assert found.samples.isfinite().all()
    assert found.log_probs[policy.sampler.stochastic].isfinite().all()
    assert policy.sampler.stochastic[:3].all()


@pytest.mark.parametrize("name", NAMES)
def test_bad_noise_is_one_line(name):
    (option,) = option_of(name, 0.5)
    with pytest.raises(UsageError, match=rf"config sampler\.{option}: .* (got|as little as) -1"):
        sampler(VP(), name, **{option: -1.0})
    with pytest.raises(UsageError, match=r"noise_steps: \[10\] are not all among the 10 steps"):
        sampler(VP(), name, noise_steps=[10], **option_of(name, 0.5))


def test_transfer_between_noise_levels():
    """docs/theory.md 7: tilted at eta, sampled at eta', the mean moves by M(eta, eta') of what it should."""
    b, kappa, s0 = 0.9, 0.5, 0.7
    schedule = OU(end=6.0, final_time=1e-3)
    times = schedule.grid(1000, "log_snr")
    alpha, sigma = schedule.alpha(times[:-1]), schedule.sigma(times[:-1])
    variance = alpha**2 * s0**2 + sigma**2
    rho = alpha * s0 / variance.sqrt()
    for eta, deployed in ((0.5, 0.0), (0.5, 1.0), (1.0, 0.0), (1.4, 0.0)):
        extra = 2 * eta**2 / (1 + eta**2) * (b / kappa) * s0 * rho ** (eta**2) / variance.sqrt()
        chain = make("sampler", {"name": "exponential", "eta": deployed}, schedule, times)
        gain, _, _ = reference.gaussian_chain(chain, schedule.alpha(times), schedule.sigma(times), 0.0, s0**2)
        shift = 0.0
        for k in range(1000):
            shift = gain[k] * shift + chain.B[k] * extra[k]
        M = 2 * eta**2 * (1 + deployed**2) / ((1 + eta**2) * (eta**2 + deployed**2))
        expected = b / kappa * s0**2 * M * (1 - rho[0] ** (eta**2 + deployed**2))
        assert shift.item() == pytest.approx(expected.item(), rel=0.02)


def test_randn_is_that_of_its_generators():
    a = randn((2, 3), [torch.Generator().manual_seed(i) for i in (4, 5)], torch.device("cpu"))
    b = randn((1, 3), [torch.Generator().manual_seed(5)], torch.device("cpu"))
    assert torch.equal(a[1:], b)


# ---------------------------------------------------------------------------------------------- pcpo

V_PREDICTION = {"num_train_timesteps": 1000, "prediction_type": "v_prediction"}
ZERO_SNR = {**V_PREDICTION, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "set_alpha_to_one": False}
OUTPUTS = [*SCHEDULES, *map(schedule_from_diffusers, (V_PREDICTION, ZERO_SNR))]


def weights_of(chain, schedule):
    """|d mean / d output| / std of each step with noise, by a difference of the network's output."""
    k, x = chain.stochastic.nonzero().flatten(), torch.randn(10, 1, dtype=torch.float64)
    x = x[: len(k)]
    low, high = (chain.step(k, x, lambda y, t, v=v: schedule.score(0 * y + v, y, t))[0] for v in (0.3, 0.7))
    return ((high.mean - low.mean).abs() / (0.4 * high.std)).flatten()


@pytest.mark.parametrize("schedule", OUTPUTS)
@pytest.mark.parametrize("above", [None, 1.0001, 1.3, 100.0])
def test_every_step_of_pcpo_has_the_same_weight(schedule, above):
    """Whatever the network predicts; at a weight that all steps can have, all have noise but one to the data."""
    spacing = "trailing" if schedule is OUTPUTS[-1] else "uniform"
    options = {"spacing": spacing}
    if above is not None:
        ancestral = sampler(schedule, "ddim", eta=1.0, **options)
        options["weight"] = above * weights_of(ancestral, schedule).max().item()
    chain = sampler(schedule, "pcpo", **options)
    found = weights_of(chain, schedule)
    torch.testing.assert_close(found, found[:1].expand_as(found), rtol=1e-6, atol=0)
    if above is not None:
        assert found[0].item() == pytest.approx(options["weight"], rel=1e-6)
        assert torch.equal(chain.stochastic, ancestral.stochastic)
    assert (chain.noise_level <= 1).all()


def test_pcpo_takes_the_weight_with_the_most_noise():
    schedule = SCHEDULES[-1]
    chain = sampler(schedule, "pcpo")
    noise, weight = chain.noise_level.square().sum(), weights_of(chain, schedule)[0].item()
    assert chain.noise_level.max() == pytest.approx(1)
    for factor in torch.linspace(0.3, 3, 400).tolist():
        try:
            other = sampler(schedule, "pcpo", weight=factor * weight)
        except UsageError as error:
            assert "sampler.weight: no step can have as little as" in str(error)  # noqa: PT017
            continue
        assert other.noise_level.square().sum() <= noise + 1e-9


@pytest.mark.parametrize("weight", [None, 3.0])
def test_pcpo_keeps_the_marginals(weight):
    """As DDIM at each step's level: alpha_u x0 and noise of variance sigma_u^2, from alpha_t x0 and sigma_t eps."""
    line, schedule = Line(-9, 9, 600), OU(end=3.0)
    chain = sampler(schedule, "pcpo", 64, "log_snr", weight=weight)
    alpha, sigma = schedule.alpha(chain.times), schedule.sigma(chain.times)
    x0, eps = chain.A * alpha[:-1], chain.A * sigma[:-1] - chain.B / sigma[:-1]  # with the score -eps / sigma
    torch.testing.assert_close(x0, alpha[1:])
    torch.testing.assert_close(eps.square() + chain.S.square(), sigma[1:].square())
    assert chain.stochastic.sum() > 30
    masses, exact = on_a_line(line, schedule, "pcpo", 64, "log_snr", weight=weight)
    assert (masses - exact).abs().sum().item() / 2 < 0.03


def test_pcpo_can_be_made_quiet_at_other_steps():
    whole, some = (sampler(VP(), "pcpo", weight=9.0, noise_steps=chosen) for chosen in (None, [2, 5]))
    assert some.stochastic.nonzero().flatten().tolist() == [2, 5]
    assert torch.equal(some.S[[2, 5]], whole.S[[2, 5]])
