"""The running reward, the error and the loss of q-learning against plain formulas (docs/theory.md 12), in one and two dimensions."""

import math

import pytest
import torch
from chains import SCHEDULE, Shaped, an_epoch, at, move, trainer_of, transition

from condrl.training.clock import Clock

POINTS = [(1,), (2,)]
PLAIN = {"name": "q_learning", "score": "pretrained", "beta": 1.5, "temperature": 0.7, "rule": "loss"}


def g2(trainer):
    return SCHEDULE.g2(trainer.policy.sampler.times[:-1]).float()


def cloud(dimensions, count=30):
    """Points (2, n, d), other ones for each prompt."""
    return torch.randn(2, count, dimensions, generator=torch.Generator().manual_seed(5)) + torch.tensor(
        [[[-1.0]], [[1]]]
    )


@pytest.mark.parametrize("shape", POINTS, ids=str)
@pytest.mark.parametrize(
    "case", [{}, {"rule": "martingale"}, {"beta": 0.0}, {"beta": 4.0}, {"temperature": 3.0}], ids=str
)
def test_the_gradient_is_the_papers(case, shape, tmp_path):
    """-sum_k G_k (dJ + dq D), or (dJ + dq), with G = J' - J + (R - q) D and q = -g^2 |a - mu|^2 (eqs. 29 to 31)."""
    options = {**PLAIN, **case}
    trainer = trainer_of(tmp_path, shape, algorithm=options)
    move(trainer)
    experience, examples, batch = an_epoch(trainer)
    move(trainer, 0.1, seed=1)
    loss, metrics = trainer.algorithm.loss(trainer.policy, batch)
    r, model, times = experience.rollout, trainer.policy.model, trainer.policy.sampler.times
    step = -times.diff().float()
    values = [trainer.algorithm.value(r.states[k], at(trainer, k, 16), model.features(r.condition)) for k in range(5)]
    values.append(options["beta"] * experience.scores.total)
    expected, errors, cost = 0.0, [], 0.0
    for k in range(5):
        x, g = r.states[k], g2(trainer)[k]
        base = model.base(x, at(trainer, k, 16), r.condition)
        running = -g * (base - r.actions[k]).square().sum(1)
        torch.testing.assert_close(examples.running[k], running, rtol=1e-4, atol=1e-4)
        q = -g * (r.actions[k] - model.score(x, at(trainer, k, 16), r.condition)).square().sum(1)
        error = (values[k + 1] - values[k] + (running - q) * step[k]).detach()
        expected = expected - error * (values[k] + q * (step[k] if options["rule"] == "loss" else 1))
        errors.append(error)
        cost = cost + g * (base - r.means[k]).square().sum(1).mean() * step[k]
    weights = [*trainer.learner.weights, *trainer.algorithm.value.parameters()]
    found, wanted = (torch.autograd.grad(value.sum(), weights) for value in (loss, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())
    torch.testing.assert_close(metrics["td_error"], torch.stack(errors).square().mean(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(examples.metrics["cost"], cost, rtol=1e-4, atol=1e-4)
    objective = options["beta"] * experience.scores.total.mean() - cost
    torch.testing.assert_close(examples.metrics["objective"], objective, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", POINTS, ids=str)
@pytest.mark.parametrize("temperature", [0.3, 5.0])
def test_the_temperature_is_that_of_the_actions(temperature, shape, tmp_path):
    many = {"images_per_prompt": 4000, "rollout_batch": 4000}
    trainer = trainer_of(tmp_path, shape, algorithm={**PLAIN, "temperature": temperature}, train=many)
    r = trainer.collect(0, Clock()).rollout
    for k in range(5):
        z = (r.actions[k] - r.means[k]) * (2 * g2(trainer)[k] / temperature).sqrt()
        assert z.std().item() == pytest.approx(1, abs=4 / z.numel() ** 0.5)


def densities(trainer, k, x, points):
    """Of x (B, d) given each point (m, d), (B, m), with their normalisers, float64."""
    alpha, sigma = (c(trainer.policy.sampler.times[k]) for c in (SCHEDULE.alpha, SCHEDULE.sigma))
    distance = (x.double()[:, None] - alpha * points.double()).square().sum(2)
    return (-distance / (2 * sigma**2)).exp() / (2 * math.pi * sigma**2) ** (x.shape[1] / 2), alpha, sigma


@pytest.mark.parametrize("shape", POINTS, ids=str)
@pytest.mark.parametrize("floor", [1e-12, 0.03, 0.1])
def test_the_score_of_all_points_is_eq_18(floor, shape, tmp_path):
    """(-x + alpha sum p_i x_i / max(sum p_i, m floor)) / sigma^2, each prompt with its own points."""
    data = cloud(shape[0])
    trainer = trainer_of(tmp_path, model=Shaped(shape, data=data), algorithm={**PLAIN, "score": "all", "floor": floor})
    experience, examples, _ = an_epoch(trainer)
    r, low = experience.rollout, []
    for k in range(5):
        for side in (0, 1):
            rows = r.condition == side
            x = r.states[k, rows]
            p, alpha, sigma = densities(trainer, k, x, data[side])
            least = p.sum(1).clamp(min=30 * floor)
            low.append((p.sum(1) < 30 * floor).float().mean().item())
            score = (alpha * (p @ data[side].double()) / least[:, None] - x) / sigma**2
            running = -g2(trainer)[k] * (score - r.actions[k, rows]).square().sum(1)
            torch.testing.assert_close(examples.running[k, rows], running.float(), rtol=2e-3, atol=2e-3)
    assert 0.1 < sum(low) / 10 < 0.9 or floor < 0.01


def test_the_score_is_estimated_from_so_many_points_of_each_step(tmp_path):
    """Of two points, drawn with replacement: with n draws their shares are multiples of 1 / n."""
    data = torch.tensor([[[-1.0], [1.0]], [[-1.0], [1.0]]])
    seen = {}
    for count in (1, 4, 7):
        options = {**PLAIN, "score": "samples", "samples": count, "temperature": 1e-8}
        trainer = trainer_of(tmp_path, model=Shaped((1,), data=data), algorithm=options)
        experience, examples, _ = an_epoch(trainer)
        r, found = experience.rollout, set()
        for k in range(5):
            for side in (0, 1):
                rows = r.condition == side
                x, means = r.states[k, rows], r.means[k, rows].double()
                p, alpha, sigma = densities(trainer, k, x, data[side])
                away = (-examples.running[k, rows].double() / g2(trainer)[k]).sqrt()[:, None]
                fits = []
                for drawn in range(count + 1):
                    share = torch.tensor([count - drawn, drawn]).double()
                    least = (p @ share).clamp(min=count * 1e-12)[:, None]  # of the estimator's floor
                    score = (alpha * ((p * share) @ data[side].double()) / least - x) / sigma**2
                    fits.append((((score - means).abs() - away) / (1 + away)).abs().max().item())
                assert min(fits) < 5e-3
                found.add((k, fits.index(min(fits))))
        seen[count] = {drawn for _, drawn in found}
    assert seen[1] == {0, 1}
    assert len(seen[7]) > 3


@pytest.mark.parametrize("shape", POINTS, ids=str)
def test_paired_steps_start_at_noised_points(shape, tmp_path):
    """x = alpha x_0 + sigma eps with x_0 of the prompt's own points, the score given x_0, and the action's own distribution."""
    data = cloud(shape[0])
    options = {**PLAIN, "score": "paired", "beta": 0.0}
    trainer = trainer_of(tmp_path, model=Shaped(shape, data=data), algorithm=options)
    r, times = trainer.collect(0, Clock()).rollout, trainer.policy.sampler.times
    for k in range(5):
        alpha, sigma = (c(times[k]).float() for c in (SCHEDULE.alpha, SCHEDULE.sigma))
        clean = (r.states[k] + sigma**2 * r.scores[k]) / alpha
        nearest = (clean[:, None] - data[r.condition]).norm(dim=2).min(1).values
        assert nearest.max() < 1e-3 / alpha
        std = (options["temperature"] / (2 * g2(trainer)[k])).sqrt()
        own = transition(r.means[k], std).log_prob(r.actions[k])
        torch.testing.assert_close(r.log_probs[k].diff().float(), own.diff(), rtol=1e-3, atol=1e-3)


def test_the_value_network_has_its_own_rate_and_width(tmp_path):
    options = {**PLAIN, "value_lr": 0.02, "value_width": 24}
    trainer = trainer_of(tmp_path, algorithm=options, train={"lr": 0.1})
    assert trainer.algorithm.value.layers[0].out_features == 24
    trainer.run_epoch(0)
    assert [group["lr"] for group in trainer.learner.optimizer.param_groups] == pytest.approx([0.1, 0.02])
