"""log_variance against its definition, and at an optimum that is known."""

import pytest
import torch
from chains import SHAPES, an_epoch, move, step_of, trainer_of
from helpers import ROOT

from condrl import UsageError
from condrl.loading import load_config
from condrl.prompts import load_prompts
from condrl.toys import reference
from condrl.toys.exact import solve
from condrl.training.build import make_trainer
from condrl.training.checks import check_combination
from condrl.training.clock import Clock

G1 = [str(ROOT / "configs" / "toy" / "g1.yaml"), "algorithm.name=log_variance", "algorithm.kappa=0.5"]
LINEAR = ["rewards.quadratic.curvature=[0]", "sampler.steps=12", "model.knots=12"]


def toy(folder, *words):
    config = load_config([*G1, f"run.dir={folder}", *words])
    return make_trainer(config, load_prompts(config.prompts.train, "prompts.train"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("noisy", [None, [0, 2, 3]])
def test_the_loss_is_its_definition(shape, noisy, tmp_path):
    """(r - kappa log P / P_pre - C)^2 / (2 kappa), C the mean of that over the prompt's others when they were drawn."""
    trainer = trainer_of(
        tmp_path, shape, algorithm={"name": "log_variance", "kappa": 0.4}, sampler={"noise_steps": noisy}
    )
    move(trainer)
    experience, examples, batch = an_epoch(trainer)
    model, states, times = trainer.policy.model, experience.rollout.states.double(), trainer.policy.sampler.times

    def kept():
        ratio = torch.zeros(16, dtype=torch.float64)
        for k in range(5) if noisy is None else noisy:
            x = states[k], times[k].expand(16), batch.condition
            with model.reference():
                base = step_of(trainer, k, states[k], model.score(*x)).log_prob(states[k + 1])
            ratio += step_of(trainer, k, states[k], model.score(*x)).log_prob(states[k + 1]) - base
        return experience.scores.total - 0.4 * ratio, ratio

    with torch.no_grad():
        before, ratio = kept()
        rows = [row.index for row in experience.rows]
        others = [before[[j for j, r in enumerate(rows) if r == row and j != i]].mean() for i, row in enumerate(rows)]
        spread = ((before - torch.stack(others)) / 0.4).square().mean().item()
        assert examples.metrics["log_variance"].item() == pytest.approx(spread, rel=1e-3)
        assert examples.metrics["path_kl"].item() == pytest.approx(ratio.mean().item(), abs=1e-4)
        move(trainer, 0.1, seed=1)
        expected = (kept()[0] - torch.stack(others)).square() / 0.8
    loss, _ = trainer.algorithm.loss(trainer.policy, batch)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_that_are_not_trained_count_as_they_were_drawn(shape, tmp_path):
    """The loss before the update is the same, and its gradient is that of the trained steps alone."""
    found = []
    for name, steps in (("all", None), ("some", [1, 3]), ("others", [0, 2, 4])):
        algorithm = {"name": "log_variance", "kappa": 0.4}
        trainer = trainer_of(tmp_path / name, shape, algorithm=algorithm, train={"steps": steps})
        move(trainer)
        _, _, batch = an_epoch(trainer)
        loss = trainer.algorithm.loss(trainer.policy, batch)[0]
        found.append((loss, torch.cat([g.flatten() for g in torch.autograd.grad(loss.sum(), trainer.learner.weights)])))
    (whole, gradient), *parts = found
    for loss, _ in parts:
        torch.testing.assert_close(loss, whole, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(parts[0][1] + parts[1][1], gradient, rtol=1e-2, atol=1e-2)
    assert parts[0][1].norm() > 0.1 * gradient.norm()


def at_the_optimum(trainer, kappa=0.5):
    """Sets the optimal shifts of a Gaussian's chain under r = .9 x (docs/theory.md 17); returns the slope q_0 of V_0."""
    sampler, schedule = trainer.policy.sampler, trainer.policy.model.schedule
    a, _, S = reference.gaussian_chain(sampler, schedule.alpha(sampler.times), schedule.sigma(sampler.times), 1.0, 0.49)
    later = torch.tensor([0.9 * a[k + 1 :].prod() for k in range(len(a))], dtype=torch.float64)
    with torch.no_grad():  # the table runs from the data to the noise, and begins at the final time, which is not used
        table = trainer.learner.weights[0]
        table.zero_()
        table[1, 0, 1:, 0] = (S.square() * later / (kappa * sampler.B)).flip(0)
    return 0.9 * a.prod()


def losses(trainer):
    examples = trainer.examples(trainer.collect(0, Clock()), 0)
    with torch.no_grad():
        return trainer.algorithm.loss(trainer.policy, examples.at(*examples.every_pair().unbind(1)))[0]


def test_it_is_zero_at_the_optimum_and_nowhere_near(tmp_path):
    """For each image by itself, where they start alike."""
    trainer = toy(tmp_path, *LINEAR, "train.same_start=true")
    assert losses(trainer).mean() > 0.1  # of the pretrained model
    at_the_optimum(trainer)
    assert losses(trainer).max() < 1e-6
    table = trainer.learner.weights[0]
    for part in range(2):
        for knot in range(1, 13):
            with torch.no_grad():
                table[part, 0, knot] += 0.1
                assert losses(trainer).mean() > 1e-5, (part, knot)
                table[part, 0, knot] -= 0.1


def test_images_that_start_elsewhere_have_another_constant(tmp_path):
    """V(start) of 6: at the optimum the loss is its variance, (q_0 times the start's std)^2 K / (K - 1) / (2 kappa)."""
    trainer = toy(tmp_path, *LINEAR, "model.schedule_options={end: 1.5, final_time: 0.05}")
    slope, count = at_the_optimum(trainer), 512
    expected = (slope * trainer.policy.model.schedule.prior_std) ** 2 * count / (count - 1)
    assert losses(trainer).mean().item() == pytest.approx(expected.item(), rel=0.2)


@pytest.mark.slow
def test_it_closes_the_gap_to_the_best_objective(tmp_path):
    words = ["train.epochs=100", "train.images_per_prompt=256", "train.rollout_batch=256", "train.lr=3e-2"]
    trainer = toy(tmp_path, *words, "sampler.steps=12", "model.knots=12")
    solved = solve(trainer.policy, trainer.rows, trainer.rewards, 0.5)
    trainer.fit()
    assert 0.99 < solved.gap_closed(solved.audit(trainer.policy)) <= 1 + 1e-4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["algorithm.kappa=0"], "algorithm.kappa: must be positive"),
        (["sampler.eta=0"], "log_variance needs steps with noise"),
        (["sampler.name=dpm_solver_pp", "sampler.eta=1"], "dpm_solver_pp remembers earlier steps"),
        (["train.steps_per_image=1"], "train.steps_per_image: has no effect"),
        (["train.images_per_prompt=1", "train.updates_per_epoch=1"], "compares images of one prompt"),
    ],
)
def test_what_it_cannot_do_is_refused(words, message):
    with pytest.raises(UsageError, match=message):
        check_combination(load_config([*G1, *words]))
