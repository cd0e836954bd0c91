"""d3po and online_dpo, which compare the policy's own images, against their definitions."""

import pytest
import torch
from chains import SHAPES, an_epoch, move, step_of, trainer_of
from helpers import ROOT

from condrl import UsageError
from condrl.algorithms.preferences import preference_loss
from condrl.loading import load_config
from condrl.prompts import load_prompts
from condrl.toys.exact import solve
from condrl.training.build import make_trainer
from condrl.training.checks import check_combination


def pairs_by_hand(rewards, size):
    """The indices of the best and the worst of each image's set."""
    values, found = rewards.tolist(), []
    for i in range(len(values)):
        members = range(i // size * size, i // size * size + size)
        found.append((max(members, key=values.__getitem__), min(members, key=values.__getitem__)))
    return torch.tensor(found).unbind(1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", [{}, {"contest": 4}, {"soft": False}, {"clip_range": 0.1}], ids=str)
def test_the_loss_of_d3po_is_its_definition(case, shape, tmp_path):
    """-log sigmoid(kappa (log rho_k of the better - of the worse)), rho_k = p_theta / p_pre of step k."""
    trainer = trainer_of(tmp_path, shape, algorithm={"name": "d3po", "kappa": 0.7, **case})
    move(trainer)
    experience, _, batch = an_epoch(trainer)
    move(trainer, 0.1, seed=1)
    model, states, times = trainer.policy.model, experience.rollout.states, trainer.policy.sampler.times
    rewards, ratios = experience.scores.total, torch.zeros(5, 16)
    with torch.no_grad():
        for k in range(5):
            x = states[k], times[k].expand(16), experience.rollout.condition
            with model.reference():
                base = step_of(trainer, k, states[k], model.score(*x)).log_prob(states[k + 1])
            ratios[k] = step_of(trainer, k, states[k], model.score(*x)).log_prob(states[k + 1]) - base
    assert ratios.abs().min() < 0.1 < ratios.abs().max()
    if limit := case.get("clip_range"):
        ratios = ratios.clamp(-limit, limit)
    better, worse = pairs_by_hand(rewards, case.get("contest", 2))
    margin = 0.7 * (ratios[:, better] - ratios[:, worse])
    p = torch.sigmoid(rewards[better] - rewards[worse]) if case.get("soft", True) else torch.ones(16)
    expected = -(p * margin.sigmoid().log() + (1 - p) * (-margin).sigmoid().log())
    loss, metrics = trainer.algorithm.loss(trainer.policy, batch)
    torch.testing.assert_close(loss.view(5, 16), expected, rtol=2e-3, atol=2e-3)
    assert metrics["implicit_margin"].item() == pytest.approx(margin.mean().item(), abs=2e-3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", [{}, {"contest": 8}, {"soft": False}], ids=str)
def test_online_dpo_is_diffusion_dpo_with_new_images_as_pairs(case, shape, tmp_path):
    """The loss itself is tested with diffusion_dpo; every image of a set has other noise for the pair."""
    trainer = trainer_of(tmp_path, shape, algorithm={"name": "online_dpo", "draws": 2, **case})
    move(trainer)
    experience, examples, batch = an_epoch(trainer)
    rewards, samples = experience.scores.total, experience.rollout.samples
    better, worse = pairs_by_hand(rewards, case.get("contest", 2))
    assert torch.equal(examples.states, torch.stack([samples[better], samples[worse]], 1))
    assert (examples.noise[:, 1:] != examples.noise[:, :-1]).all()
    margin = trainer.algorithm.margin(trainer.policy, batch)
    preferred = torch.sigmoid(rewards[better] - rewards[worse]).repeat(2) if case.get("soft", True) else None
    assert margin.abs().max() > 0.1
    loss, _ = trainer.algorithm.loss(trainer.policy, batch)
    torch.testing.assert_close(loss, preference_loss(margin, preferred)[0])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "words", "low"), [("d3po", ["train.steps_per_image=6"], 0.9)])
def test_the_gap_that_it_closes(name, words, low, tmp_path):
    """d3po is exact to first order in r / kappa."""
    short = ["train.epochs=150", "train.images_per_prompt=256", "train.rollout_batch=256", "sampler.steps=12"]
    file = str(ROOT / "configs" / "toy" / "g1.yaml")
    own = [f"algorithm.name={name}", "algorithm.kappa=0.5", "model.knots=12", f"run.dir={tmp_path}"]
    config = load_config([file, *own, *short, *words])
    trainer = make_trainer(config, load_prompts(config.prompts.train, "prompts.train"))
    solved = solve(trainer.policy, trainer.rows, trainer.rewards, 0.5)
    trainer.fit()
    assert low < solved.gap_closed(solved.audit(trainer.policy)) <= 1 + 1e-4


@pytest.mark.parametrize("name", ["d3po", "online_dpo"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["algorithm.kappa=0"], "algorithm.kappa: must be positive"),
        (["algorithm.contest=1"], "algorithm.contest: must be at least 2"),
        (["algorithm.contest=3"], r"contest: 3 does not divide train\.images_per_prompt=512"),
        (["sampler.eta=0"], "needs steps with noise"),
        (["train.images_per_prompt=1", "train.updates_per_epoch=1"], "compares images of one prompt"),
    ],
)
def test_what_they_cannot_do_is_refused(name, words, message):
    with pytest.raises(UsageError, match=message):
        check_combination(load_config([str(ROOT / "configs" / "toy" / "g1.yaml"), f"algorithm.name={name}", *words]))
