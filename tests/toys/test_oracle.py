"""Closed forms against quadrature, autograd and brute force (docs/theory.md 17)."""

import itertools
import math

import pytest
import torch

from condrl.diffusion.schedule import OU, VP
from condrl.toys import oracle, reference
from condrl.toys.oracle import GaussianMixture, Line, Quadratic

KAPPA = 0.5
M1 = GaussianMixture.of(
    torch.tensor([[0.3, 0.7]], dtype=torch.float64),
    torch.tensor([[[-2.0], [1.5]]], dtype=torch.float64),
    torch.tensor([[[[0.4]], [[0.25]]]], dtype=torch.float64),
)
BENT = Quadratic(*(torch.tensor(v, dtype=torch.float64) for v in ([[0.9]], [[[0.6]]], [0.0])))
WIDE = torch.linspace(-12, 12, 24001, dtype=torch.float64)
D2 = GaussianMixture.of(
    torch.tensor([[0.4, 0.6]], dtype=torch.float64),
    torch.tensor([[[1.0, -0.5], [-1.0, 0.3]]], dtype=torch.float64),
    torch.tensor([[[[0.5, 0.2], [0.2, 0.4]], [[0.3, -0.1], [-0.1, 0.6]]]], dtype=torch.float64),
)
BENT2 = Quadratic(*(torch.tensor(v, dtype=torch.float64) for v in ([[0.5, -0.4]], [[[0.6, 0.1], [0.1, 0.3]]], [0.2])))


def integral(values):
    return torch.trapezoid(values, WIDE)


def everywhere(distribution, x):
    return distribution.rows(torch.zeros(len(x), dtype=torch.long))


def test_density_and_score_of_a_noised_mixture():
    t = torch.tensor(0.4, dtype=torch.float64)
    a, s = VP().alpha(t), VP().sigma(t)
    x = WIDE[:, None].clone().requires_grad_()
    noised = everywhere(M1.noised(a, s), x)
    density = noised.log_prob(x).exp()
    assert integral(density.detach()) == pytest.approx(1, abs=1e-10)
    (gradient,) = torch.autograd.grad(noised.log_prob(x).sum(), x)
    torch.testing.assert_close(noised.score(x.detach()), gradient, atol=1e-10, rtol=1e-10)
    direct = 0.0
    for w, m, v in ((0.3, -2.0, 0.4), (0.7, 1.5, 0.25)):
        distribution = torch.distributions.Normal(a * m, (a**2 * v + s**2).sqrt())
        direct = direct + w * distribution.log_prob(WIDE).exp()
    torch.testing.assert_close(density.detach(), direct, atol=1e-12, rtol=1e-10)


def test_tilted_law_and_normaliser_by_quadrature():
    star, log_z = oracle.tilted(M1, BENT, KAPPA)
    joint = everywhere(M1, WIDE).log_prob(WIDE[:, None]) + everywhere(BENT, WIDE)(WIDE[:, None]) / KAPPA
    assert log_z.item() == pytest.approx(integral(joint.exp()).log().item(), abs=1e-9)
    density = everywhere(star, WIDE).log_prob(WIDE[:, None])
    torch.testing.assert_close(density.exp(), (joint - log_z).exp(), atol=1e-10, rtol=1e-8)
    mean = integral(density.exp() * WIDE)
    kl = integral(density.exp() * (density - everywhere(M1, WIDE).log_prob(WIDE[:, None])))
    assert mean.item() == pytest.approx(1.4934, abs=1e-4)  # docs/theory.md 17
    assert kl.item() == pytest.approx(0.3602, abs=1e-4)
    reward = integral(density.exp() * everywhere(BENT, WIDE)(WIDE[:, None]))
    assert (reward - KAPPA * kl).item() == pytest.approx(KAPPA * log_z.item(), abs=1e-9)  # docs/theory.md 6


@pytest.mark.slow
def test_tilted_law_in_the_plane():
    star, log_z = oracle.tilted(D2, BENT2, KAPPA)
    g = torch.linspace(-7, 7, 1401, dtype=torch.float64)
    points = torch.cartesian_prod(g, g)
    joint = everywhere(D2, points).log_prob(points) + everywhere(BENT2, points)(points) / KAPPA
    cell = (g[1] - g[0]) ** 2
    assert log_z.item() == pytest.approx((joint.exp().sum() * cell).log().item(), abs=1e-8)
    torch.testing.assert_close(
        everywhere(star, points).log_prob(points).exp(), (joint - log_z).exp(), atol=1e-9, rtol=1e-8
    )


@pytest.mark.parametrize(("distribution", "reward"), [(M1, BENT), (D2, BENT2)])
def test_value_gradient_is_the_optimal_control(distribution, reward):
    """kappa grad log phi = kappa (s* - s), docs/theory.md 17."""
    schedule, g = VP(), torch.Generator().manual_seed(0)
    x = torch.randn(50, distribution.means.shape[-1], generator=g, dtype=torch.float64).requires_grad_()
    t = torch.full((50,), 0.3, dtype=torch.float64)
    a, s = schedule.alpha(t), schedule.sigma(t)
    distributions, rewards = everywhere(distribution, x), everywhere(reward, x)
    (slope,) = torch.autograd.grad(oracle.value(distributions, rewards, KAPPA, x, a, s).sum(), x)
    control = reference.optimal_score(distributions, rewards, KAPPA, x, a, s) - distributions.noised(a, s).score(x)
    torch.testing.assert_close(slope / KAPPA, control.detach(), atol=1e-9, rtol=1e-8)


def test_value_solves_the_hjb_equation():
    """d_tau V - f x V' + g^2 s V' + g^2 V'' / 2 + g^2 V'^2 / (2 kappa) = 0 (docs/theory.md 6, eta = 1, V = -v)."""
    schedule = VP()
    x = torch.linspace(-2, 2, 21, dtype=torch.float64)[:, None].requires_grad_()
    t = torch.full((21,), 0.35, dtype=torch.float64, requires_grad=True)
    distributions, rewards = everywhere(M1, x), everywhere(BENT, x)
    v = oracle.value(distributions, rewards, KAPPA, x, schedule.alpha(t), schedule.sigma(t))
    dt, dx = torch.autograd.grad(v.sum(), (t, x), create_graph=True)
    (dxx,) = torch.autograd.grad(dx.sum(), x)
    f, g2 = schedule.f(t), schedule.g2(t)
    score = distributions.noised(schedule.alpha(t), schedule.sigma(t)).score(x)[:, 0]
    dx, dxx = dx[:, 0], dxx[:, 0]
    residual = -dt + (-f * x[:, 0] + g2 * score) * dx + g2 * dxx / 2 + g2 * dx**2 / (2 * KAPPA)
    assert residual.abs().max() < 1e-8


def gaussian(steps, eta=1.0, schedule=None, name="exponential"):
    """The base chain of N(1, .49), and the sampler."""
    from condrl.training.build import make

    schedule = schedule or OU()
    times = schedule.grid(steps)
    sampler = make("sampler", {"name": name, "eta": eta}, schedule, times)
    return reference.gaussian_chain(sampler, schedule.alpha(times), schedule.sigma(times), 1.0, 0.49), schedule


def objective_of(chain, gain, offset, reward, kappa, start):
    """E r - kappa KL of an affine policy, by moments."""
    (a, c, S), (b, Q, c0), (m, v) = chain, reward, start
    kl = 0.0
    for k in range(len(a)):
        dg, do = gain[k] - a[k], offset[k] - c[k]
        kl = kl + (dg**2 * (v + m**2) + 2 * dg * do * m + do**2) / (2 * S[k] ** 2)
        m, v = gain[k] * m + offset[k], gain[k] ** 2 * v + S[k] ** 2
    return b * m - Q * (m**2 + v) / 2 + c0 - kappa * kl


@pytest.mark.parametrize("eta", [0.5, 1.0, 1.4])
def test_riccati_is_the_best_affine_policy(eta):
    chain, schedule = gaussian(12, eta)
    reward, start = (0.9, 0.6, 0.1), (0.0, schedule.prior_std**2)
    found = reference.riccati(chain, reward, KAPPA, start)
    gain, offset = found.gain.clone().requires_grad_(), found.offset.clone().requires_grad_()
    value = objective_of(chain, gain, offset, reward, KAPPA, start)
    assert value.item() == pytest.approx(found.objective.item(), abs=1e-9)
    for gradient in torch.autograd.grad(value, (gain, offset)):
        assert gradient.abs().max() < 1e-8


def test_optimal_discrete_law_approaches_the_tilted_law():
    errors = []
    for steps in (50, 100, 200):
        chain, schedule = gaussian(steps, schedule=OU(end=12.0, final_time=1e-3), name="euler_maruyama")
        a, s = (c(torch.tensor(12.0)).item() for c in (schedule.alpha, schedule.sigma))
        m, v = a, a**2 * 0.49 + s**2  # the exact distribution at the start
        found = reference.riccati(chain, (0.9, 0.6, 0.0), KAPPA, (m, v))
        for k in range(steps):
            m, v = (found.gain[k] * m + found.offset[k]).item(), (found.gain[k] ** 2 * v + chain[2][k] ** 2).item()
        precision = 1 / 0.49 + 0.6 / KAPPA
        errors.append((abs(m - (1 / 0.49 + 0.9 / KAPPA) / precision), abs(v - 1 / precision)))
    for a, b in itertools.pairwise(errors):
        assert b[0] < 0.55 * a[0]
        assert b[1] < 0.55 * a[1]


def test_dynamic_program_is_riccati_where_that_is_exact():
    chain, schedule = gaussian(12)
    a, c, S = chain
    line = Line(-9, 9, 1800)
    x, reward = line.x, 0.9 * line.x - 0.3 * line.x**2
    base = a[:, None] * x + c[:, None]
    program = oracle.dynamic_program(line, base, S, reward, KAPPA)
    found = reference.riccati(chain, (0.9, 0.6, 0.0), KAPPA, (0.0, schedule.prior_std**2))
    inside = x.abs() < 3
    optimal = found.gain[:, None] * x + found.offset[:, None]
    torch.testing.assert_close(program.means[:, inside], optimal[:, inside], atol=2e-4, rtol=0)
    start = line.masses(-(x**2) / (2 * schedule.prior_std**2))
    assert (start * program.values[0]).sum().item() == pytest.approx(found.objective.item(), abs=1e-4)
    audit = oracle.audit(line, program.means, base, S, start, reward, KAPPA)
    assert audit.objective == pytest.approx(found.objective.item(), abs=1e-4)
    assert audit.masses.sum().item() == pytest.approx(1, abs=1e-9)
    idle = oracle.audit(line, base, base, S, start, reward, KAPPA)
    assert idle.kl == 0
    assert idle.objective < audit.objective - 0.02


def test_push_forward_keeps_mass_and_moments():
    line = Line(-6, 6, 1200)
    start = line.masses(-(line.x**2) / 2)
    for std in (0.5, 0.001, 0.0):
        pushed = line.push(start, 0.5 * line.x + 0.3, std)
        mean = (pushed * line.x).sum()
        assert pushed.sum().item() == pytest.approx(1, abs=1e-9)
        assert mean.item() == pytest.approx(0.3, abs=1e-6)
        assert (pushed * (line.x - mean) ** 2).sum().item() == pytest.approx(0.25 + std**2, abs=2e-4)


def test_distances_of_laws_on_a_line():
    line = Line(-10, 10, 4000)
    p, q = line.masses(-((line.x - 0.5) ** 2) / 2), line.masses(-(line.x**2) / 2)
    assert oracle.kl_of_masses(p, q) == pytest.approx(0.125, abs=1e-6)
    assert reference.wasserstein(line, p, q) == pytest.approx(0.5, abs=1e-4)
    star, log_z = oracle.tilted_masses(line, -(line.x**2) / 2, line.x, 2.0)
    assert (star * line.x).sum().item() == pytest.approx(0.5, abs=1e-6)
    assert log_z == pytest.approx(0.125, abs=1e-6)


def test_feynman_kac_estimate():
    """E exp(x / kappa) of N(0, 1) is exp(1 / (2 kappa^2))."""
    rewards = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    found = reference.feynman_kac(rewards, 2.0)
    assert abs(found.value - 0.25) < 4 * found.error
    assert 0 < found.error < 0.01


def test_hermite_integrates_polynomials():
    z, w = oracle.hermite(20)
    for power in (0, 2, 4, 8):
        assert (w * z**power).sum().item() == pytest.approx(math.prod(range(1, power, 2)), rel=1e-9)
