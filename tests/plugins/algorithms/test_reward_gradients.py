"""What differentiates rewards, against autograd through the whole chain, on a line, in the plane and for images."""

import pytest
import torch
from chains import SCHEDULE, SHAPES, an_epoch, at, bowl, move, step_of, trainer_of
from helpers import toy_trainer
from torch.distributions import kl_divergence

from condrl.diffusion.schedule import RectifiedFlow
from condrl.diffusion.transition import euler_maruyama
from condrl.loading import load_config
from condrl.plugins.algorithms.flowbp import remaining_gain
from condrl.prompts import load_prompts
from condrl.training.build import make_trainer


def continued(trainer, r, first, x, score):
    """The sample from x before step `first` on, with the noise of the roll-out held, and the KL of the steps to it."""
    kl, base = torch.zeros(len(x)), trainer.policy.model.base
    for k in range(first, 5):
        before, t = r.states[k], at(trainer, k, len(x))
        with torch.no_grad():
            noise = r.states[k + 1] - mean_of(trainer, k, before, score(before, t, r.condition))
        scores = score(x, t, r.condition), base(x, t, r.condition)
        if trainer.policy.sampler.stochastic[k]:
            kl = kl + kl_divergence(*(step_of(trainer, k, x, each) for each in scores))
        x = mean_of(trainer, k, x, scores[0]) + noise
    return x, kl


def mean_of(trainer, k, x, score):
    """The mean of the state after step k, which may have no noise."""
    sampler = trainer.policy.sampler
    return sampler.A[k].to(x) * x + sampler.B[k].to(x) * score


def reward_of(trainer, experience, x):
    return bowl(trainer.policy.model.decode(x), [row.prompt for row in experience.rows])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kappa", [0.5, 2.0])
@pytest.mark.parametrize("chosen", [None, ("train", "steps"), ("sampler", "noise_steps")], ids=str)
@pytest.mark.parametrize("adjoint", ["lean", "continuous"])
def test_adjoint_matching_regresses_on_its_adjoint(adjoint, kappa, chosen, shape, tmp_path):
    """|mean - (base mean - S^2 a)|^2 / 2 S^2, a the gradient of -r / kappa + KL at the next state (docs/theory.md 15).

    Through the pretrained chain, whose KL is 0, or through the policy's. A step without noise counts in both.
    """
    options = {"name": "adjoint_matching", "kappa": kappa, "adjoint": adjoint}
    section, option = chosen or ("train", "steps")
    steps = [1, 4] if chosen else None
    trainer = trainer_of(tmp_path, shape, algorithm=options, **{section: {option: steps}})
    move(trainer)
    experience, examples, batch = an_epoch(trainer)
    assert examples.k.tolist() == (steps or list(range(5)))
    loss, _ = trainer.algorithm.loss(trainer.policy, batch)
    r, model, sampler, rows = experience.rollout, trainer.policy.model, trainer.policy.sampler, []
    for k in steps or range(5):
        x, t = r.states[k], at(trainer, k, 16)
        ahead = r.states[k + 1].clone().requires_grad_()
        sample, kl = continued(trainer, r, k + 1, ahead, {"lean": model.base, "continuous": model.score}[adjoint])
        cost = kl - reward_of(trainer, experience, sample) / kappa
        (gradient,) = torch.autograd.grad(cost.sum(), ahead)
        S = sampler.S[k].float()
        target = step_of(trainer, k, x, model.base(x, t, r.condition)).mean - S**2 * gradient
        mean = step_of(trainer, k, x, model.score(x, t, r.condition)).mean
        rows.append(((mean - target) ** 2 / (2 * S**2)).flatten(1).sum(1))
    torch.testing.assert_close(loss.view(-1, 16), torch.stack(rows), rtol=1e-3, atol=1e-4)


def of_drafts(trainer, draft, images):
    """Cosine and ratio of adjoint matching's gradient to that of DRaFT with the same kappa, over kappa, on one chain.

    The epochs are alike: the same images, from the same noise.
    """
    found = []
    for each in (trainer, draft):
        move(each, 0.05)
        experience, _, batch = an_epoch(each)
        weights = each.learner.weights
        gradients = torch.autograd.grad(each.algorithm.loss(each.policy, batch)[0].sum(), weights)
        found.append((experience.rollout.states, torch.cat([g.flatten() for g in gradients]).double()))
    (states, ours), (others, theirs) = found
    assert torch.equal(states, others)
    assert states.shape[1] == images
    expected = theirs / draft.algorithm.kappa
    return torch.cosine_similarity(ours, expected, 0).item(), (ours.norm() / expected.norm()).item()


@pytest.mark.parametrize("adjoint", ["lean", "continuous"])
def test_the_continuous_adjoint_has_drafts_gradient_on_a_toy(adjoint, tmp_path):
    """On P1, its own network and quadratic rewards, kappa = .5."""
    trainer = toy_trainer("adjoint_matching", tmp_path / "a", f"algorithm.adjoint={adjoint}")
    cosine, ratio = of_drafts(trainer, toy_trainer("draft", tmp_path / "b", "algorithm.kappa=0.5"), 16)
    exact = pytest.approx(1, abs=1e-4)
    assert (cosine == exact and ratio == exact) is (adjoint == "continuous")


@pytest.mark.parametrize("adjoint", ["lean", "continuous"])
def test_the_continuous_adjoint_has_drafts_gradient_on_images(adjoint, pipeline, tmp_path):
    """In a LoRA's weights, of the brightness of what a U-Net denoises with guidance and a VAE decodes."""
    few = [
        "prompts.train=asset:shapes/train.txt",
        "train.prompts_per_epoch=2",
        "train.images_per_prompt=2",
        "train.rollout_batch=4",
        "train.steps=null",
    ]
    words = [f"model.path={pipeline}", "model.lora_rank=2", "model.guidance=2", "sampler.steps=3", *few]
    words += ["rewards.brightness.weight=1", "algorithm.kappa=0.01", "train.updates_per_epoch=1"]

    def made(name, *more):
        config = load_config([*words, f"algorithm.name={name}", f"run.dir={tmp_path}/{name}", *more])
        config.folder.mkdir()
        torch.manual_seed(0)  # of the LoRA
        return make_trainer(config, load_prompts(config.prompts.train, "prompts.train"))

    trainer = made("adjoint_matching", f"algorithm.adjoint={adjoint}")
    cosine, ratio = of_drafts(trainer, made("draft"), 4)
    exact = pytest.approx(1, abs=1e-3)
    assert (cosine == exact and ratio == exact) is (adjoint == "continuous")


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


def trained(trainer, loss):
    """The gradient of each image's loss in the trained weights, (16, weights)."""
    weights = trainer.learner.weights
    every = [torch.autograd.grad(one, weights, retain_graph=True, allow_unused=True) for one in loss]
    filled = [[torch.zeros_like(w) if g is None else g for g, w in zip(found, weights, strict=True)] for found in every]
    return torch.stack([torch.cat([g.flatten() for g in found]) for found in filled])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kappa", [0.0, 0.8])
def test_alignprop_is_draft_through_as_many_steps_as_an_image_has_drawn(kappa, shape, tmp_path):
    """Drawn once for each trajectory: a step that is differentiated is followed by none that is not."""
    options = {"name": "alignprop", "kappa": kappa, "balance_steps": False}
    trainer = trainer_of(tmp_path / "alignprop", shape, algorithm=options)
    move(trainer)
    experience, _, batch = an_epoch(trainer)
    assert set(batch.first.tolist()) == set(range(5))  # all of them, in the same batch
    loss, _ = trainer.algorithm.loss(trainer.policy, batch)
    found = trained(trainer, loss)
    for first in range(5):
        other = trainer_of(tmp_path / str(first), shape, algorithm={"name": "draft", "kappa": kappa, "last": 5 - first})
        move(other)
        _, _, whole = an_epoch(other)
        torch.testing.assert_close(whole.states[-1], experience.rollout.samples)
        losses, _ = other.algorithm.loss(other.policy, whole)
        images = batch.first == first
        torch.testing.assert_close(loss[images], losses[images], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[images], trained(other, losses)[images], rtol=1e-3, atol=1e-4)


def test_alignprop_draws_uniformly_and_for_each_image(tmp_path):
    trainer = trainer_of(tmp_path, algorithm={"name": "alignprop", "shortest": 2, "longest": 4})
    noise = trainer.noise(0, "examples", range(16000))
    first = trainer.algorithm.first_steps(trainer.policy, 16000, noise)
    shares = [(first == k).float().mean().item() for k in range(5)]
    assert shares == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 0], abs=0.015)
    assert ((first[1:] == first[:-1]).float().mean() - 1 / 3).abs() < 0.02
    weights = trainer.algorithm.step_weights(trainer.policy)
    torch.testing.assert_close(weights[1:], torch.tensor([3.0, 1.5, 1.0, 1.0]))  # 1 / the chance of 4, 3, 2, 1 or more


def test_a_step_that_is_weighed_passes_the_gradient_of_its_state_on(tmp_path):
    """Each step's own part of the gradient is multiplied, whatever the weights of the others."""
    trainer = trainer_of(tmp_path, algorithm={"name": "draft", "kappa": 0.8})
    move(trainer)
    _, _, batch = an_epoch(trainer)
    model, algorithm, parts = trainer.policy.model, trainer.algorithm, []
    score = model.score
    for k in range(5):  # the gradient in the weights of one step alone
        time = at(trainer, k, 16)

        def alone(x, t, condition, time=time):
            return score(x, t, condition) if (t == time).all() else frozen(model, x, t, condition)

        model.score = alone
        parts.append(trained(trainer, algorithm.loss(trainer.policy, batch)[0]))
    model.score = score
    torch.testing.assert_close(sum(parts), trained(trainer, algorithm.loss(trainer.policy, batch)[0]))
    algorithm.step_weights = lambda policy: torch.tensor([4.0, 0.5, 1.0, 3.0, 2.0])
    found = trained(trainer, algorithm.loss(trainer.policy, batch)[0])
    expected = 4 * parts[0] + 0.5 * parts[1] + parts[2] + 3 * parts[3] + 2 * parts[4]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def frozen(model, x, t, condition):
    """The policy's score, with no gradient in its weights."""
    found = model.base(x, t, condition)
    if not model.tuned:
        return found
    weights = model.module.gain.detach()[condition], model.module.offset.detach()[condition]
    return found + weights[0] * x + weights[1]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("last", [None, 1, 4, 9])
def test_refl_rewards_the_denoised_prediction_of_one_late_step(last, shape, tmp_path):
    trainer = trainer_of(tmp_path, shape, algorithm={"name": "refl", "last": last})
    move(trainer)
    experience, _, batch = an_epoch(trainer)
    among = {None: {3, 4}, 1: {4}, 4: {1, 2, 3, 4}, 9: {0, 1, 2, 3, 4}}[last]  # a quarter of 5 steps are 2
    assert set(batch.step.tolist()) == among
    loss, _ = trainer.algorithm.loss(trainer.policy, batch)
    r, model, rows = experience.rollout, trainer.policy.model, []
    for i, k in enumerate(batch.step.tolist()):
        t = at(trainer, k, 1)
        alpha, sigma = (c(t).float().reshape(-1, *[1] * len(shape)) for c in (SCHEDULE.alpha, SCHEDULE.sigma))
        x, condition = r.states[k, i : i + 1], r.condition[i : i + 1]
        denoised = (x + sigma**2 * model.score(x, t, condition)) / alpha
        rows.append(-bowl(model.decode(denoised), [experience.rows[i].prompt])[0])
    torch.testing.assert_close(loss, torch.stack(rows), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(trained(trainer, loss), trained(trainer, rows), rtol=1e-3, atol=1e-3)


def test_refl_takes_solvers_of_every_kind(tmp_path):
    """What the network says of a state does not depend on the steps before it."""
    trainer = trainer_of(tmp_path, algorithm={"name": "refl", "last": 5}, sampler={"name": "dpm_solver_pp", "eta": 1.0})
    experience, _, batch = an_epoch(trainer)
    loss, _ = trainer.algorithm.loss(trainer.policy, batch)
    x, t = batch.x, trainer.policy.sampler.times[batch.step]
    alpha, sigma = (c(t).float()[:, None] for c in (SCHEDULE.alpha, SCHEDULE.sigma))
    denoised = (x + sigma**2 * trainer.policy.model.score(x, t, batch.condition)) / alpha
    torch.testing.assert_close(loss, -bowl(denoised, [row.prompt for row in experience.rows]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_draft_lv_noises_its_samples_again(shape, tmp_path):
    """The mean over draws of -r after the last step from alpha x_K + sigma eps, which sees no earlier step."""
    trainer = trainer_of(tmp_path, shape, algorithm={"name": "draft_lv", "draws": 3})
    move(trainer)
    experience, examples, _ = an_epoch(trainer)
    model, clean, t = trainer.policy.model, experience.rollout.samples, at(trainer, 4, 16)
    alpha, sigma = (c(t[0]).float() for c in (SCHEDULE.alpha, SCHEDULE.sigma))
    drawn = (examples.x - alpha * clean) / sigma
    assert drawn.mean().abs() < 5 / drawn.numel() ** 0.5
    assert drawn.std().item() == pytest.approx(1, abs=4 / drawn.numel() ** 0.5)
    assert len({round(value.item(), 4) for value in drawn.flatten()}) > 0.9 * drawn.numel()  # every draw is another
    losses, _ = trainer.algorithm.loss(trainer.policy, examples.at(*examples.every_pair().unbind(1)))
    rewards = []
    for x, noise in zip(examples.x, examples.noise, strict=True):
        last = step_of(trainer, 4, x, model.score(x, t, experience.rollout.condition))
        rewards.append(reward_of(trainer, experience, last.mean + last.base_dist.scale * noise))
    torch.testing.assert_close(losses.view(3, 16).sum(0), -torch.stack(rewards).mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("active", [2, 5, 9])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flowbp_holds_the_velocities_of_later_steps(shape, active, tmp_path):
    """On a chain that acts with the velocities and the noise that it had, the sample's reward has this gradient."""
    trainer = trainer_of(tmp_path, shape, algorithm={"name": "flowbp", "active": active})
    move(trainer)
    experience, examples, batch = an_epoch(trainer)
    r, model, sampler = experience.rollout, trainer.policy.model, trainer.policy.sampler
    count = min(active, 5)
    assert len(examples.k) == count
    assert all(len(set(steps)) == count for steps in examples.step.T.tolist())
    assert {tuple(steps) for steps in examples.step.T.tolist()} != {tuple(examples.step[:, 0].tolist())}
    expected = torch.zeros(16, sum(w.numel() for w in trainer.learner.weights))
    for k in range(5):
        t = at(trainer, k, 16)
        x = step_of(trainer, k, r.states[k], model.score(r.states[k], t, r.condition)).mean
        x = r.states[k + 1] + x - x.detach()
        for later in range(k + 1, 5):
            alpha, sigma = (c(sampler.times[later]).item() for c in (SCHEDULE.alpha, SCHEDULE.sigma))
            visited = r.states[later]
            with torch.no_grad():
                score = model.score(visited, at(trainer, later, 16), r.condition)
                step = step_of(trainer, later, visited, score).mean
                noise, epsilon = r.states[later + 1] - step, -sigma * score
                velocity = epsilon - (visited - sigma * epsilon) / alpha
            denoised = x / (alpha + sigma) - sigma / (alpha + sigma) * velocity
            x = step_of(trainer, later, x, (alpha * denoised - x) / sigma**2).mean + noise
        chosen = (examples.step == k).any(0).float()[:, None]
        expected += chosen * 5 / count * trained(trainer, -reward_of(trainer, experience, x))
    loss, _ = trainer.algorithm.loss(trainer.policy, batch)
    found = trained(trainer, loss.view(count, 16).sum(0))
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())


def test_flowbp_is_exact_where_the_velocity_does_not_depend_on_the_state(tmp_path):
    """On Euler's steps of a straight flow, nothing of a step's effect is lost: the next state moves, and no velocity."""
    t = torch.linspace(1, 0, 6, dtype=torch.float64)[:-1]
    times = torch.cat([t * 0.99, torch.zeros(1, dtype=torch.float64)])
    sampler = euler_maruyama(RectifiedFlow(), times, 0.0)
    torch.testing.assert_close(remaining_gain(sampler), torch.ones(5, dtype=torch.float64))
