"""rwr against its definition, and where weights alone must lead."""

import pytest
import torch
from chains import SCHEDULE, SHAPES, an_epoch, move, trainer_of
from helpers import ROOT

from condrl import UsageError
from condrl.algorithms.forward import noised_samples
from condrl.diffusion.noise import Noise
from condrl.diffusion.rollout import Rollout
from condrl.loading import load_config
from condrl.plugins.algorithms.rwr import RWR
from condrl.prompts import load_prompts
from condrl.toys.exact import solve
from condrl.training.build import make_trainer
from condrl.training.checks import check_combination
from condrl.training.clock import Clock


def toy(problem, folder, *words):
    config = load_config([str(ROOT / "configs" / "toy" / f"{problem}.yaml"), f"run.dir={folder}", *words])
    return make_trainer(config, load_prompts(config.prompts.train, "prompts.train"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_loss_is_a_weighted_regression_onto_the_noise(shape, tmp_path):
    """w |eps_theta - eps|^2, less what weights of 1 would teach and what does not depend on theta."""
    trainer = trainer_of(tmp_path, shape, algorithm={"name": "rwr", "kappa": 0.25, "draws": 3})
    _, _, batch = an_epoch(trainer)
    sigma = SCHEDULE.sigma(batch.t).float().reshape(-1, *[1] * len(shape))
    model, weight, found = trainer.policy.model, batch.advantage + 1, []

    def predicted():
        return -sigma * model.score(batch.x, batch.t, batch.condition)

    with torch.no_grad():
        old = predicted()  # the pretrained model's
        for seed in range(3):
            move(trainer, 0.3, seed)
            new = predicted()
            plain = weight * (new - batch.noise).square().flatten(1).mean(1)
            unweighted = -2 * ((batch.noise - old) * (new - old)).flatten(1).mean(1)
            found.append(plain - unweighted - trainer.algorithm.loss(trainer.policy, batch)[0])
    assert weight.min() < 0.5 < 1.5 < weight.max()
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-3, atol=1e-3)


def test_weights_are_exponential_within_a_prompt():
    rewards, groups = torch.tensor([0.0, 9.0, 1.0, 9.0, -1.0]), torch.tensor([4, 7, 4, 7, 4])
    e = torch.tensor([0.0, 1.0, -1.0]).div(0.8).exp()
    first = 3 * e / e.sum()
    found = RWR(kappa=0.2, rounds=4).weights(rewards, groups)  # a part of the tilt in each round
    torch.testing.assert_close(found, torch.stack([first[0], torch.tensor(1.0), first[1], torch.tensor(1.0), first[2]]))
    assert RWR(kappa=0.0).weights(rewards, groups).tolist() == [0, 1, 3, 1, 0]  # equally good ones share


def test_a_round_learns_from_samples_of_the_policy_that_it_began_with(tmp_path):
    trainer = trainer_of(tmp_path, algorithm={"name": "rwr", "rounds": 2}, train={"epochs": 4, "lr": 0.1})
    starts = []
    for epoch in range(4):
        starts.append([p.detach().clone() for p in trainer.learner.weights])
        trainer.run_epoch(epoch)
    assert (starts[2][0] - starts[1][0]).abs().max() > 1e-3
    for kept, begun in zip(trainer.algorithm.old.weights, starts[2], strict=True):
        assert torch.equal(kept, begun)
    again = trainer_of(tmp_path / "again", algorithm={"name": "rwr", "rounds": 2}, train={"epochs": 4})
    again.algorithm.load_state_dict(trainer.algorithm.state_dict())
    with torch.no_grad():
        for weight, begun in zip(again.learner.weights, starts[2], strict=True):
            weight.copy_(begun)  # where the old policy is the policy itself
    again.algorithm.old.epoch = trainer.algorithm.old.epoch = 3  # within the second round
    ours, theirs = (t.examples(t.collect(3, Clock()), 3) for t in (trainer, again))
    torch.testing.assert_close(ours.x, theirs.x)
    with torch.no_grad():
        score = again.policy.model.score(ours.x.flatten(0, 1), ours.t.flatten(), ours.condition.repeat(4))
    torch.testing.assert_close(ours.old_score.flatten(0, 1), score)


@pytest.mark.parametrize(
    ("kappa", "size", "moved", "spread"),
    [(0.0, 4, 1.02938 * 0.7, 0.49172), (0.5, 2000, 0.9 * 0.49 / 0.5, 1.0)],  # order statistics; docs/theory.md 17
)
def test_where_the_loss_is_least(kappa, size, moved, spread, tmp_path):
    """For draws of N(1, .49) and r = .9 x: at the best affine prediction of the noise from tilted draws.

    Of the largest of four, or of those tilted by exp(r / kappa), only mean and variance count for it.
    """
    trainer = toy("g1", tmp_path, "algorithm.name=rwr", f"algorithm.kappa={kappa}", "algorithm.times=[0.2,0.201]")
    schedule, count = trainer.policy.model.schedule, 100_000
    drawn = 1 + 0.7 * torch.randn(count, 1, generator=torch.Generator().manual_seed(0))
    weights = trainer.algorithm.weights(0.9 * drawn[:, 0], torch.arange(count) // size)
    rollout = Rollout(drawn[None], torch.zeros(0, count), torch.zeros(count, dtype=torch.long))
    noise, times = Noise("0", range(count), count), trainer.algorithm.times
    draws = noised_samples(trainer.policy, rollout, weights - 1, 1, times, count, noise)
    batch = draws.at(torch.arange(count), torch.zeros(count, dtype=torch.long))
    alpha, sigma = (c(batch.t).float()[:, None] for c in (schedule.alpha, schedule.sigma))
    best = torch.tensor([1 + moved, 0.49 * spread], requires_grad=True)
    trainer.policy.model.score = lambda x, t, c: -(x - alpha * best[0]) / (alpha**2 * best[1] + sigma**2)
    loss = trainer.algorithm.loss(trainer.policy, batch)[0]
    parts = [torch.autograd.grad(some.mean(), best, retain_graph=True)[0] for some in loss.split(count // 50)]
    gradient, error = torch.stack(parts).mean(0), torch.stack(parts).std(0) / 50**0.5
    assert (gradient.abs() < 4 * error).all()
    assert (gradient.abs() < 0.02).all()


@pytest.mark.slow
def test_the_tilted_distribution_is_where_weights_lead(tmp_path):
    words = ["algorithm.name=rwr", "algorithm.kappa=0.5", "train.epochs=150"]
    trainer = toy("m1", tmp_path, *words)
    solved = solve(trainer.policy, trainer.rows, trainer.rewards, 0.5)
    trainer.fit()
    assert 0.92 < solved.gap_closed(solved.audit(trainer.policy)) <= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["algorithm.kappa=-1"], "algorithm.kappa: must be at least 0"),
        (["algorithm.rounds=0"], "algorithm.rounds: must be at least 1"),
        (["algorithm.times=[0.5,1]"], r"algorithm.times: must rise within \(0, 1\)"),
        (["algorithm.rounds=5", "train.epochs=4"], "algorithm.rounds: 5 of them do not fit into train.epochs"),
        (["train.images_per_prompt=1", "train.updates_per_epoch=1"], "compares images of one prompt"),
        (["train.kl_budget=1"], "does not roll out the policy itself"),
    ],
)
def test_what_it_cannot_do_is_refused(words, message):
    with pytest.raises(UsageError, match=message):
        check_combination(load_config([str(ROOT / "configs" / "toy" / "g1.yaml"), "algorithm.name=rwr", *words]))
