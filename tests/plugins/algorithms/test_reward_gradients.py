"""draft and adjoint_matching against autograd through the whole chain, on a line, in the plane and for images."""

import pytest
import torch
from chains import SHAPES, an_epoch, at, bowl, move, step_of, trainer_of
from torch.distributions import kl_divergence


def continued(trainer, r, first, x, score):
    """The sample from x before step `first` on, with the noise of the roll-out held."""
    for k in range(first, 5):
        before = r.states[k]
        with torch.no_grad():
            noise = (
                r.states[k + 1] - step_of(trainer, k, before, score(before, at(trainer, k, len(x)), r.condition)).mean
            )
        x = step_of(trainer, k, x, score(x, at(trainer, k, len(x)), r.condition)).mean + noise
    return x


def reward_of(trainer, experience, x):
    return bowl(trainer.policy.model.decode(x), [row.prompt for row in experience.rows])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kappa", [0.5, 2.0])
@pytest.mark.parametrize("steps", [None, [1, 4]])
def test_adjoint_matching_regresses_on_the_lean_adjoint(kappa, steps, shape, tmp_path):
    """|mean - (base mean - S^2 a)|^2 / 2 S^2, a the gradient of -r / kappa through the pretrained chain (docs/theory.md 15)."""
    options = {"name": "adjoint_matching", "kappa": kappa}
    trainer = trainer_of(tmp_path, shape, algorithm=options, train={"steps": steps})
    move(trainer)
    experience, examples, batch = an_epoch(trainer)
    assert examples.k.tolist() == (steps or list(range(5)))
    loss, _ = trainer.algorithm.loss(trainer.policy, batch)
    r, model, sampler, rows = experience.rollout, trainer.policy.model, trainer.policy.sampler, []
    for k in steps or range(5):
        x, t = r.states[k], at(trainer, k, 16)
        ahead = r.states[k + 1].clone().requires_grad_()
        cost = -reward_of(trainer, experience, continued(trainer, r, k + 1, ahead, model.base)) / kappa
        (adjoint,) = torch.autograd.grad(cost.sum(), ahead)
        S = sampler.S[k].float()
        target = step_of(trainer, k, x, model.base(x, t, r.condition)).mean - S**2 * adjoint
        mean = step_of(trainer, k, x, model.score(x, t, r.condition)).mean
        rows.append(((mean - target) ** 2 / (2 * S**2)).flatten(1).sum(1))
    torch.testing.assert_close(loss.view(-1, 16), torch.stack(rows), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("last", [None, 1, 3, 9])
@pytest.mark.parametrize("kappa", [0.0, 0.8])
def test_draft_differentiates_the_chain(kappa, last, shape, tmp_path):
    """The loss and its gradient are those of -r + kappa KL of the last steps, with the noise held (docs/theory.md 14)."""
    trainer = trainer_of(tmp_path, shape, algorithm={"name": "draft", "kappa": kappa, "last": last})
    move(trainer)
    experience, _, batch = an_epoch(trainer)
    loss, _ = trainer.algorithm.loss(trainer.policy, batch)
    r, model = experience.rollout, trainer.policy.model
    first = max(0, 5 - (last or 5))
    x, kl = r.states[first], torch.zeros(16)
    for k in range(first, 5):
        t = at(trainer, k, 16)
        distributions = [step_of(trainer, k, x, score(x, t, r.condition)) for score in (model.score, model.base)]
        kl = kl + kl_divergence(*distributions)
        with torch.no_grad():
            noise = r.states[k + 1] - step_of(trainer, k, r.states[k], model.score(r.states[k], t, r.condition)).mean
        x = distributions[0].mean + noise
    expected = kappa * kl - reward_of(trainer, experience, x)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    found, wanted = (torch.autograd.grad(value.sum(), trainer.learner.weights) for value in (loss, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def test_a_step_without_noise_has_no_kl_in_draft(tmp_path):
    noisy = {"noise_steps": [1, 2]}
    trainer = trainer_of(tmp_path, algorithm={"name": "draft", "kappa": 1.0}, sampler=noisy)
    move(trainer)
    experience, _, batch = an_epoch(trainer)
    _, metrics = trainer.algorithm.loss(trainer.policy, batch)
    r, model = experience.rollout, trainer.policy.model
    expected = torch.zeros(16)
    for k in (1, 2):
        x, t = r.states[k], at(trainer, k, 16)
        scores = [score(x, t, r.condition) for score in (model.score, model.base)]
        expected = expected + kl_divergence(*(step_of(trainer, k, x, score) for score in scores))
    torch.testing.assert_close(metrics["path_kl"], expected.mean(), rtol=1e-4, atol=1e-5)
