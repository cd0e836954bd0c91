"""nft against DiffusionNFT's own loss (Zheng et al. 2025), with every option, in several shapes."""

import dataclasses

import pytest
import torch
from chains import SCHEDULE, SHAPES, an_epoch, bowl, move, trainer_of
from helpers import ROOT, toy_words

from condrl import UsageError
from condrl.commands import finetune
from condrl.diffusion.schedule import OU
from condrl.loading import load_config
from condrl.plugins.models.stable_diffusion import StableDiffusion
from condrl.prompts import load_prompts
from condrl.rewards.scoring import score
from condrl.toys.exact import solve
from condrl.training.build import make_trainer
from condrl.training.checks import check_combination
from condrl.training.clock import Clock
from condrl.training.resume import find_checkpoint

PLAIN = {"temperature": 3.0, "draws": 3, "times": (0.1, 0.97), "normalise": False, "adaptive": False}
CASES = [
    {},
    {"temperature": 1.5},
    {"temperature": 0.4},  # advantages reach beyond it
    {"temperature": 0.4, "normalise": True},
    {"draws": 5},
    {"times": (0.3, 0.5)},
    {"normalise": True},
    {"adaptive": True},
]


def velocity(score, x, t):
    """diffusers' v = alpha eps - sigma x_0 (docs/theory.md 2)."""
    alpha, sigma = ((c(t).float()).reshape(-1, *[1] * (x.dim() - 1)) for c in (SCHEDULE.alpha, SCHEDULE.sigma))
    return alpha * -sigma * score - sigma * (x + sigma**2 * score) / alpha


def advantages_by_hand(experience, options):
    rewards, found = experience.scores.total, torch.zeros(16)
    for i, row in enumerate(experience.rows):
        group = torch.stack([r for r, other in zip(rewards, experience.rows, strict=True) if other.index == row.index])
        found[i] = rewards[i] - group.mean()
        if options["normalise"]:
            found[i] /= group.std(correction=0) + 1e-4
    return found.clamp(-options["temperature"], options["temperature"])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_loss_is_diffusionnfts(case, shape, tmp_path):
    """a / b (r |v+ - v|^2 + (1 - r) |v- - v|^2), the mean over dimensions, but for what does not depend on theta."""
    options = {**PLAIN, **case}
    trainer = trainer_of(tmp_path, shape, algorithm={"name": "nft", **options})
    move(trainer)
    experience, _, batch = an_epoch(trainer)
    advantages = advantages_by_hand(experience, options).repeat(options["draws"])
    torch.testing.assert_close(batch.advantage, advantages, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        old = velocity(trainer.policy.model.score(batch.x, batch.t, batch.condition), batch.x, batch.t)
    target = velocity(-batch.noise / SCHEDULE.sigma(batch.t).float().reshape(-1, *[1] * len(shape)), batch.x, batch.t)
    r = (0.5 + advantages / (2 * options["temperature"])).reshape(-1, *[1] * len(shape))
    weights = 1 / (target - old).abs().flatten(1).mean(1) if options["adaptive"] else torch.ones(len(r))
    differences = []
    for seed in range(3):
        move(trainer, 0.3, seed)
        new = velocity(trainer.policy.model.score(batch.x, batch.t, batch.condition), batch.x, batch.t)
        published = r * (new - target) ** 2 + (1 - r) * (2 * old - new - target) ** 2  # a = temperature, b = 1
        published = options["temperature"] * weights * published.flatten(1).mean(1)
        loss, _ = trainer.algorithm.loss(trainer.policy, batch)
        differences.append((published - loss, loss))
    scale = max(loss.abs().max().item() for _, loss in differences)
    for other, _ in differences[1:]:
        torch.testing.assert_close(other, differences[0][0], rtol=1e-3, atol=1e-3 * scale)
    assert (differences[1][1] - differences[0][1]).abs().max() > 0.05
    clamped = advantages.abs() >= options["temperature"]
    assert clamped.any() or options["temperature"] > 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("draws", "times"), [(1, (0.1, 0.97)), (4, (0.1, 0.97)), (3, (0.4, 0.6))])
def test_samples_are_noised_at_stratified_times(draws, times, shape, tmp_path):
    """Draw j of an image at a time uniform on the j-th of equal parts of the range; x = alpha x_N + sigma eps."""
    options = {"name": "nft", "draws": draws, "times": times}
    trainer = trainer_of(tmp_path, shape, algorithm=options, train={"images_per_prompt": 500, "rollout_batch": 1000})
    move(trainer)
    experience, _, batch = an_epoch(trainer)
    shares = (batch.t / SCHEDULE.end).view(draws, 1000)
    width = (times[1] - times[0]) / draws
    for j in range(draws):
        within = (shares[j] - times[0]) / width - j
        assert 0 <= within.min() < 0.02
        assert 0.98 < within.max() <= 1
        assert within.mean().item() == pytest.approx(0.5, abs=0.05)
        assert within.std().item() == pytest.approx(12**-0.5, abs=0.03)
    alpha, sigma = (c(batch.t).float().reshape(-1, *[1] * len(shape)) for c in (SCHEDULE.alpha, SCHEDULE.sigma))
    clean = experience.rollout.samples.repeat(draws, *[1] * len(shape))
    torch.testing.assert_close(batch.x, alpha * clean + sigma * batch.noise)
    assert batch.noise.std().item() == pytest.approx(1, abs=0.05)
    with torch.no_grad():
        torch.testing.assert_close(batch.old_score, trainer.policy.model.score(batch.x, batch.t, batch.condition))


def test_the_old_policy_may_be_a_running_average(tmp_path):
    """It rolls out and is what steps are taken from, while the newest one learns; at resuming it is still there."""
    trainer = trainer_of(tmp_path, algorithm={**PLAIN, "name": "nft", "old_decay": 0.8}, train={"epochs": 3, "lr": 0.1})
    averages = [p.detach().clone() for p in trainer.learner.weights]
    for epoch in range(3):
        trainer.run_epoch(epoch)
        for average, weight in zip(averages, trainer.learner.weights, strict=True):
            average += 0.2 * (weight.detach() - average)
    newest = [p.detach().clone() for p in trainer.learner.weights]
    experience = trainer.collect(3, Clock())
    examples = trainer.examples(experience, 3)
    for weight, new in zip(trainer.learner.weights, newest, strict=True):
        assert torch.equal(weight, new)
    state = trainer.algorithm.state_dict()
    with torch.no_grad():
        for weight, average in zip(trainer.learner.weights, averages, strict=True):
            assert (weight - average).abs().max() > 1e-3
            weight.copy_(average)
    plain = trainer_of(tmp_path / "plain", algorithm={**PLAIN, "name": "nft"})
    with torch.no_grad():
        for mine, theirs in zip(plain.learner.weights, averages, strict=True):
            mine.copy_(theirs)
    same = plain.collect(3, Clock())
    torch.testing.assert_close(experience.rollout.states, same.rollout.states, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(examples.old_score, plain.examples(same, 3).old_score, rtol=1e-4, atol=1e-4)
    again = trainer_of(tmp_path / "again", algorithm={**PLAIN, "name": "nft", "old_decay": 0.8})
    again.algorithm.load_state_dict(state)
    for average, kept in zip(averages, again.algorithm.old.average, strict=True):
        torch.testing.assert_close(average, kept)
    with pytest.raises(ValueError, match="these are other weights"):
        again.algorithm.load_state_dict({"old": {"average": [w[:1] for w in state["old"]["average"]]}})


# ---------------------------------------------------------------------------------------------- kappa


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", [{}, {"temperature": 0.0}, {"adaptive": True}], ids=str)
def test_kappa_adds_the_squared_distance_to_the_pretrained_velocity(case, shape, tmp_path):
    options = {**PLAIN, "kappa": 0.7, **case}
    trainer = trainer_of(tmp_path, shape, algorithm={"name": "nft", **options})
    move(trainer)
    experience, _, batch = an_epoch(trainer)
    move(trainer, 0.1, seed=1)
    loss, metrics = trainer.algorithm.loss(trainer.policy, batch)
    model, place = trainer.policy.model, (batch.x, batch.t, batch.condition)
    with torch.no_grad(), model.reference():
        base = velocity(model.score(*place), batch.x, batch.t)
    new, old = velocity(model.score(*place), batch.x, batch.t), velocity(batch.old_score, batch.x, batch.t)
    alpha = SCHEDULE.alpha(batch.t).float().reshape(-1, *[1] * (batch.x.dim() - 1))
    sigma = SCHEDULE.sigma(batch.t).float().reshape(-1, *[1] * (batch.x.dim() - 1))
    target = alpha * batch.noise - sigma * (batch.x - sigma * batch.noise) / alpha
    rewards, rows = experience.scores.total, [row.index for row in experience.rows]
    means = [rewards[[j for j, r in enumerate(rows) if r == row and j != i]].mean() for i, row in enumerate(rows)]
    centred = rewards - torch.stack(means)  # on the others' mean
    if options["temperature"]:
        centred = centred.clamp(-options["temperature"], options["temperature"])
    step, distance, error = (x.flatten(1) for x in (new - old, new - base, target - old))
    expected = options["temperature"] * step.square().mean(1) + 0.7 * distance.square().mean(1)
    expected = expected - 2 * centred.repeat(3) * (error * step).mean(1)
    if options["adaptive"]:
        expected = expected / error.abs().mean(1)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
    assert metrics["base_distance"].item() == pytest.approx(distance.square().mean().item(), rel=1e-3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", [{}, {"normalise": True}, {"temperature": 0.2}], ids=str)
def test_the_baseline_can_be_a_value_at_each_draw(case, shape, tmp_path):
    """r - m - V(x, t, c), m the mean of the prompt's others; V is shown what images are denoised to, and learns r - m."""
    options = {**PLAIN, "kappa": 0.7, **case}
    trainer = trainer_of(tmp_path, shape, algorithm={"name": "nft", "baseline": "value", **options})
    move(trainer)
    experience, examples, batch = an_epoch(trainer)
    rewards, rows = experience.scores.total, [row.index for row in experience.rows]
    others = [rewards[[j for j, r in enumerate(rows) if r == row and j != i]].mean() for i, row in enumerate(rows)]
    means, hint = torch.stack(others).repeat(3), None
    if len(shape) > 1:
        alpha, sigma = (c(batch.t).float().reshape(-1, 1, 1, 1) for c in (SCHEDULE.alpha, SCHEDULE.sigma))
        clean = (batch.x + sigma**2 * batch.old_score) / alpha
        hint = bowl(trainer.policy.model.decode(clean), [row.prompt for row in experience.rows] * 3) - means
        torch.testing.assert_close(batch.hint, hint, rtol=1e-3, atol=1e-3)
    target = rewards.repeat(3) - means
    torch.testing.assert_close(batch.reward, target, rtol=1e-4, atol=1e-5)

    def value():
        return trainer.algorithm.value(batch.x, batch.t, trainer.policy.model.features(batch.condition), hint)

    with torch.no_grad():
        wrong = target - value()
    expected = wrong.clone()
    for row in (0, 1) if options["normalise"] else ():
        own = torch.tensor([r == row for r in rows])
        expected[own.repeat(3)] /= rewards[own].std(correction=0) + 1e-4
    expected = expected.clamp(-options["temperature"], options["temperature"])
    torch.testing.assert_close(batch.advantage, expected, rtol=1e-3, atol=1e-3)
    explained = 1 - wrong.var(correction=0) / target.var(correction=0)
    assert examples.metrics["value_explains"].item() == pytest.approx(explained.item(), abs=1e-3)
    loss, metrics = trainer.algorithm.loss(trainer.policy, batch)
    plain = trainer_of(tmp_path / "plain", shape, algorithm={"name": "nft", **options})
    move(plain)
    without, _ = plain.algorithm.loss(plain.policy, batch)
    torch.testing.assert_close(loss - without, (value() - target).square(), rtol=1e-3, atol=1e-3)
    assert metrics["value_loss"].item() == pytest.approx(wrong.square().mean().item(), rel=1e-3)


def test_the_value_learns_what_a_noised_state_promises(tmp_path):
    train = {"epochs": 150, "images_per_prompt": 64, "rollout_batch": 128, "loss_batch": 512, "lr": 1e-6}
    options = {**PLAIN, "kappa": 0.5, "baseline": "value", "value_lr": 1e-2}
    trainer = trainer_of(tmp_path, algorithm={"name": "nft", **options}, train=train)
    explained = [trainer.run_epoch(epoch)["value_explains"] for epoch in range(150)]
    assert [group["lr"] for group in trainer.learner.optimizer.param_groups] == [1e-6, 1e-2]
    assert sum(explained[-20:]) / 20 > sum(explained[:5]) / 5 + 0.1
    assert explained[-1] < 1


def test_stages_are_anchored_where_the_one_before_ended(tmp_path):
    """The distance is to the policy of that epoch's beginning, times the stages; a checkpoint keeps it."""
    options = {**PLAIN, "kappa": 0.5, "stages": 3, "temperature": 0.0}
    trainer = trainer_of(tmp_path, algorithm={"name": "nft", **options}, train={"epochs": 6, "lr": 0.05})
    starts = []
    for epoch in range(6):
        starts.append([p.detach().clone() for p in trainer.learner.weights])
        trainer.run_epoch(epoch)
        for anchor, start in zip(trainer.algorithm.anchor.weights, starts[epoch // 2 * 2], strict=True):
            assert torch.equal(anchor, start)
    again = trainer_of(tmp_path / "again", algorithm={"name": "nft", **options}, train={"epochs": 6})
    again.algorithm.load_state_dict(trainer.algorithm.state_dict())
    assert again.algorithm.anchor.epoch == 6
    assert torch.equal(again.algorithm.anchor.weights[0], trainer.algorithm.anchor.weights[0])


def test_the_anchor_may_be_guided(tmp_path):
    """It is s_u + w (s_c - s_u) of the pretrained network, and nothing else is guided."""
    model = StableDiffusion(torch.device("cpu"), guidance=1.0)
    options = {**PLAIN, "name": "nft", "kappa": 0.5, "anchor_guidance": 2.5}
    trainer = trainer_of(tmp_path, model=model, algorithm=options, sampler={"name": "ddim", "spacing": "trailing"})
    move(trainer, 0.02)
    _, _, batch = an_epoch(trainer)
    with torch.no_grad():
        old = model.score(batch.x, batch.t, batch.condition)
        with model.reference():
            conditional = model.score(batch.x, batch.t, batch.condition)
            unconditional = model.score(batch.x, batch.t, model.negative.expand(len(batch.x)))
    torch.testing.assert_close(batch.base_score, unconditional + 2.5 * (conditional - unconditional), rtol=0, atol=1e-3)
    torch.testing.assert_close(batch.old_score, old, rtol=0, atol=1e-3)
    assert (conditional - old).abs().max() > 0.01
    assert (conditional - unconditional).abs().max() > 0.01


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"kappa": 0.5, "anchor_guidance": 0.5}, "must be at least 1, got 0.5"),
        ({"anchor_guidance": 2.0}, "has no effect without algorithm.kappa"),
        ({"kappa": 0.5, "stages": 2, "anchor_guidance": 2.0}, "each of several stages would be guided anew"),
        ({"kappa": 0.5, "anchor_guidance": 2.0}, "this model has no guidance"),
    ],
)
def test_a_guided_anchor_that_means_nothing_is_refused(options, problem, tmp_path):
    with pytest.raises(UsageError, match=f"algorithm.anchor_guidance: {problem}"):
        trainer_of(tmp_path, algorithm={"name": "nft", **options}, train={"epochs": 2})


def test_each_of_several_stages_has_as_many_times_kappa(tmp_path):
    """At the start of one the anchor is the old policy, so the loss is (temperature + stages kappa) |d|^2 - 2 A <e, d>."""
    losses = []
    for stages, temperature in ((3, 0.0), (1, 1.5)):
        options = {**PLAIN, "kappa": 0.5 if stages > 1 else 0.0, "stages": stages, "temperature": temperature}
        trainer = trainer_of(tmp_path, algorithm={"name": "nft", **options}, train={"epochs": 6})
        move(trainer)
        _, _, batch = an_epoch(trainer)
        batch = dataclasses.replace(batch, advantage=torch.linspace(-1, 1, len(batch.advantage)))
        move(trainer, 0.1, seed=1)
        losses.append(trainer.algorithm.loss(trainer.policy, batch)[0])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_stages_are_planned_for_the_runs_epochs(tmp_path):
    """More of them than epochs are refused, and so is a run in stages that is made longer."""
    words = [*toy_words("nft", tmp_path), "algorithm.kappa=0.5", "algorithm.stages=3", "train.lr_decay=none"]
    with pytest.raises(UsageError, match="algorithm.stages: 3 of them do not fit into train.epochs"):
        check_combination(load_config([*words, "train.epochs=2"]))
    assert finetune.main(words) == 0
    with pytest.raises(UsageError, match=r"that run was planned for 6 epochs .* in stages"):
        find_checkpoint(load_config([*words, "train.epochs=9", "run.resume=auto"]))


@pytest.mark.slow
@pytest.mark.parametrize(("stages", "low", "high"), [(1, 0.8, 0.92), (4, 0.94, 1.0)])
def test_stages_take_the_first_orders_error_back(stages, low, high, tmp_path):
    """On M1 at kappa = .5: the share of the gap to the best objective that is closed."""
    words = [str(ROOT / "configs" / "toy" / "m1.yaml"), "algorithm.name=nft", f"algorithm.stages={stages}"]
    words += ["algorithm.temperature=0", "algorithm.normalise=false", "algorithm.adaptive=false", "algorithm.draws=8"]
    config = load_config([*words, "algorithm.kappa=0.5", "algorithm.times=[0.008,0.99]", f"run.dir={tmp_path}"])
    trainer = make_trainer(config, load_prompts(config.prompts.train, "prompts.train"))
    trainer.fit()
    solved = solve(trainer.policy, trainer.rows, trainer.rewards, 0.5)
    assert low < solved.gap_closed(solved.audit(trainer.policy)) < high


def test_the_loss_is_least_at_the_closed_form(tmp_path):
    """For x_0 ~ N(1, .49) and r = b x_0, at d = E[A e | x] / temperature = b Var(x_0 | x) / (sigma temperature)."""
    words = ["algorithm.name=nft", "algorithm.temperature=4", "algorithm.normalise=false", "algorithm.adaptive=false"]
    words += ["algorithm.draws=1", "algorithm.times=[0.25,0.25001]", "train.images_per_prompt=40000", "sampler.steps=2"]
    words += ["rewards.quadratic.curvature=[0]", "train.rollout_batch=40000", f"run.dir={tmp_path}"]
    config = load_config([str(ROOT / "configs" / "toy" / "g1.yaml"), *words])
    trainer = make_trainer(config, load_prompts(config.prompts.train, "prompts.train"))
    experience = trainer.collect(0, Clock())
    clean = 1 + 0.7 * torch.randn(40_000, 1, generator=torch.Generator().manual_seed(0))
    experience.rollout.states[-1] = clean
    experience = dataclasses.replace(experience, scores=score(trainer.rewards, clean, experience.rows))
    examples = trainer.examples(experience, 0)
    alpha, sigma = (c(torch.tensor(1.5, dtype=torch.float64)).item() for c in (OU().alpha, OU().sigma))
    least = alpha / sigma**2 * 0.9 / (1 / 0.49 + (alpha / sigma) ** 2) / 4  # as a change of the score
    (table,), pairs, found = trainer.learner.weights, examples.every_pair(), {}
    for size in (0.5, 1.0, 1.5):
        with torch.no_grad():
            table[1] = size * least
        losses = (trainer.algorithm.loss(trainer.policy, examples.at(*part.unbind(1)))[0] for part in pairs.split(1000))
        slopes = torch.stack([torch.autograd.grad(loss.mean(), table)[0].sum((1, 2, 3)) for loss in losses])
        found[size] = slopes.mean(0) / (slopes.std(0) / len(slopes) ** 0.5)  # of the gain and of the offset
    assert found[1.0].abs().max() < 4
    assert found[0.5][1] < -5
    assert found[1.5][1] > 5
