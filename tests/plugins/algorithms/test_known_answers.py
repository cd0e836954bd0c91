"""Minimisers and targets of losses against closed forms on M1, by quadrature or from exact trajectories."""

import pytest
import torch
from helpers import ROOT
from torch import nn

from condrl.algorithms.forward import Noised
from condrl.loading import load_config
from condrl.plugins.algorithms.adjoint_matching import lean
from condrl.prompts import load_prompts
from condrl.toys import oracle
from condrl.toys.oracle import GaussianMixture, Quadratic
from condrl.training.build import make_trainer

KAPPA = 0.5
M1 = GaussianMixture.of(
    *(torch.tensor(v, dtype=torch.float64) for v in ([[0.3, 0.7]], [[[-2.0], [1.5]]], [[[[0.4]], [[0.25]]]]))
)
REWARD = Quadratic(*(torch.tensor(v, dtype=torch.float64) for v in ([[0.9]], [[[0.6]]], [0.0])))
CHANCE = Quadratic(
    *(torch.tensor(v, dtype=torch.float64) for v in ([[1.2]], [[[0.8]]], [-1.0]))
)  # log of a reward in (0, 1)


def rows_of(exact, count):
    """A distribution or reward, for `count` points."""
    return exact.rows(torch.zeros(count, dtype=torch.long))


def score_of(distribution, x, alpha, sigma):
    return rows_of(distribution, len(x)).noised(alpha, sigma).score(x)


def rwr_weights(clean):
    """exp(r / kappa) over its mean, less 1, (B,): the advantage that rwr's loss reads."""
    log_z = oracle.tilted(M1, REWARD, KAPPA)[1]
    return (rows_of(REWARD, len(clean))(clean) / KAPPA - log_z).exp() - 1


def rwr_optimum(x, alpha, sigma):
    """The score of the noised p exp(r / kappa) / Z."""
    return score_of(oracle.tilted(M1, REWARD, KAPPA)[0], x, alpha, sigma)


TEMPERATURE = 1.6  # a b of DiffusionNFT's a (2 r - 1) and b = 2


def nft_advantages(clean):
    """a (2 r - 1) of a reward r in (0, 1), (B,)."""
    return 0.8 * (2 * rows_of(CHANCE, len(clean))(clean).exp() - 1)


def nft_optimum(x, alpha, sigma):
    """v_old + (2 / b) rho (v+ - v_old), rho = E[r | x] and v+ the velocity of p r / Z, as scores: both are affine."""
    old, rows = score_of(M1, x, alpha, sigma), len(x)
    share = oracle.tilted(rows_of(M1, rows).posterior(x, alpha, sigma), rows_of(CHANCE, rows), 1.0)[1].exp()
    return old + share[:, None] * (score_of(oracle.tilted(M1, CHANCE, 1.0)[0], x, alpha, sigma) - old)


CASES = {
    "rwr": ({"kappa": KAPPA}, rwr_weights, rwr_optimum),
    "nft": ({"temperature": TEMPERATURE, "adaptive": False, "normalise": False}, nft_advantages, nft_optimum),
}


def trainer_of(name, folder, *more, **options):
    words = [*more, *(f"algorithm.{key}={value}" for key, value in options.items())]
    config = load_config(
        [str(ROOT / "configs" / "toy" / "m1.yaml"), f"algorithm.name={name}", *words, f"run.dir={folder}"]
    )
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    return make_trainer(config, load_prompts(config.prompts.train, "prompts.train"))


def quadrature(x, alpha, sigma, nodes=80):
    """Points (n, m) and log-weights (n, m) by which X_0 given x (n, 1) is integrated, component by component."""
    posterior, (z, w) = rows_of(M1, len(x)).posterior(x, alpha, sigma), oracle.hermite(nodes)
    points = posterior.means + posterior.variances.sqrt() * z  # (n, 2, nodes)
    return points.flatten(1), (posterior.log_weights[..., None] + w.log()).flatten(1)


@pytest.mark.parametrize("time", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("name", CASES)
def test_the_minimiser_at_a_time_is_the_closed_form(name, time, tmp_path):
    """Of the loss's mean over X_0 given x, in a table of scores at 41 states, to 1e-8: each loss is a parabola there."""
    options, advantages, optimum = CASES[name]
    trainer, states = trainer_of(name, tmp_path, **options), torch.linspace(-4, 4, 41, dtype=torch.float64)[:, None]
    t = torch.tensor(time, dtype=torch.float64)
    alpha, sigma = trainer.policy.model.schedule.alpha(t), trainer.policy.model.schedule.sigma(t)
    clean, log_weights = quadrature(states, alpha, sigma)
    x, nodes = states.repeat_interleave(clean.shape[1], 0), clean.reshape(-1, 1)
    batch = Noised(
        condition=torch.zeros(len(x), dtype=torch.long),
        k=torch.zeros(1, dtype=torch.long),
        x=x,
        t=t.expand(len(x)),
        noise=(x - alpha * nodes) / sigma,
        old_score=score_of(M1, x, alpha, sigma),
        advantage=advantages(nodes),
    )

    def slope(table):
        trainer.policy.model.score = lambda x, t, c: table.repeat_interleave(clean.shape[1], 0)
        loss, _ = trainer.algorithm.loss(trainer.policy, batch)
        return torch.autograd.grad((log_weights.exp().flatten() * loss).sum(), table)[0]

    zero, one = (torch.full_like(states, v).requires_grad_() for v in (0.0, 1.0))
    least = -slope(zero) / (slope(one) - slope(zero))
    expected = optimum(states, alpha, sigma)
    torch.testing.assert_close(least, expected, rtol=1e-8, atol=1e-8)
    assert (expected - score_of(M1, states, alpha, sigma)).abs().max() > 0.05  # the old score is elsewhere


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_network_learns_the_minimiser_at_a_time(name, tmp_path):
    """To 3 %, root mean square over the noised data, of the score's size there."""
    options, advantages, optimum = CASES[name]
    trainer, steps, size, generator = (
        trainer_of(name, tmp_path, **options),
        1200,
        8192,
        torch.Generator().manual_seed(0),
    )
    t = torch.tensor(1.0, dtype=torch.float64)
    alpha, sigma = trainer.policy.model.schedule.alpha(t), trainer.policy.model.schedule.sigma(t)
    network = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)).double()
    trainer.policy.model.score = lambda x, t, c: network(x)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        clean = rows_of(M1, size).sample(generator)
        noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
        x = alpha * clean + sigma * noise
        batch = Noised(
            condition=torch.zeros(size, dtype=torch.long),
            k=torch.zeros(1, dtype=torch.long),
            x=x,
            t=t.expand(size),
            noise=noise,
            old_score=score_of(M1, x, alpha, sigma),
            advantage=advantages(clean),
        )
        optimizer.zero_grad()
        trainer.algorithm.loss(trainer.policy, batch)[0].mean().backward()
        optimizer.step()
        decay.step()
    x = alpha * rows_of(M1, 20_000).sample(generator)
    x = x + sigma * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        error = (network(x) - optimum(x, alpha, sigma)).square().mean().sqrt()
    assert error < 0.03 * optimum(x, alpha, sigma).square().mean().sqrt()


# ---------------------------------------------------------------------------------------------- adjoint matching


class Optimal(nn.Module):
    """What is to be added to the pretrained score of M1 for that of the noised p*."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.target = schedule, oracle.tilted(M1, REWARD, KAPPA)[0]

    def forward(self, x, t, condition):
        at, points = (self.schedule.alpha(t), self.schedule.sigma(t)), x.double()
        return (score_of(self.target, points, *at) - score_of(M1, points, *at)).to(x)


@pytest.mark.slow
def test_the_lean_adjoint_is_the_optimal_control_on_average(tmp_path):
    """E[-S y_{k+1} | x_k] over the optimal process is its control B (s* - s) / S, to 2 %, with y_K = -grad V / kappa.

    Root mean square over p*'s states and all steps; of first order in their length, 7 % with 400 of them. The mean over
    what follows is taken by quadrature: 20,000 trajectories leave an error of 10 %, as the pretrained chain pulls
    neighbours apart between M1's components.
    """
    N, nodes = 2000, 20
    options = [f"sampler.steps={N}", "sampler.spacing=log_snr", "sampler.name=exponential"]
    policy = trainer_of("adjoint_matching", tmp_path, *options, kappa=KAPPA).policy
    sampler, model, line = policy.sampler, policy.model, oracle.Line(-7.0, 7.0, 500)
    model.module, x = Optimal(model.schedule), line.x[:, None].float()
    (z, w), none, last = oracle.hermite(nodes), torch.zeros(len(x), dtype=torch.long), sampler.times[-1]
    promised = line.x[:, None].requires_grad_()
    at = model.schedule.alpha(last), model.schedule.sigma(last)
    value = oracle.value(rows_of(M1, len(x)), rows_of(REWARD, len(x)), KAPPA, promised, *at)
    adjoint = -torch.autograd.grad(value.sum(), promised)[0][:, 0] / KAPPA
    wrong, whole = [], []
    for k in reversed(range(N)):
        points, step, S = x.clone().requires_grad_(), torch.full((len(x),), k), sampler.S[k]
        control = (sampler.B[k] / S * model.module(x, sampler.times[step], none).double())[:, 0]
        with torch.no_grad():
            ahead = policy.transition(x, step, none).mean.double() + S * z
        expected = (w * line.interpolate(adjoint, ahead)).sum(1)
        with model.reference():
            base = policy.transition(points, step, none)
        adjoint = lean(policy, points, step, none, base, expected[:, None].float())[:, 0].double()
        t = sampler.times[k]
        noised = oracle.tilted(M1, REWARD, KAPPA)[0].noised(model.schedule.alpha(t), model.schedule.sigma(t))
        masses = noised.rows(none).log_prob(line.x[:, None]).softmax(0)
        wrong.append(masses @ (-S * expected - control).square())
        whole.append(masses @ control.square())
    assert (sum(wrong) / sum(whole)).sqrt() < 0.02
