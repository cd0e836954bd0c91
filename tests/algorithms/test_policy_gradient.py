"""The losses of the policy gradients against torch.distributions, on a line, in the plane and for images."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from chains import SHAPES, an_epoch, at, move, step_of, trainer_of
from torch.distributions import kl_divergence

from condrl.algorithms.examples import recomputed
from condrl.algorithms.policy_gradient import clipped
from condrl.diffusion.path_kl import path_kl
from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import rollout
from condrl.training.build import make
from condrl.training.clock import Clock

NAMES = ["reinforce", "ddpo", "dpok", "grpo"]  # grpo has a scale and a clip of its own
PLAIN = {"kappa": 0.0, "normalise": False, "leave_one_out": False, "advantage_clip": 5.0}
CASES = [
    {},
    {"leave_one_out": True},
    {"normalise": True},
    {"normalise": True, "leave_one_out": True, "advantage_clip": 0.6},
    {"advantage_clip": 0.01},  # not of rewards in their own unit
    {"kappa": 0.7},
    {"kappa": 0.7, "normalise": True, "advantage_clip": 0.8},
    {"kappa": 0.7, "leave_one_out": True},
]


def distributions(trainer, r, k, score=None):
    """Of the states after step k of a roll-out: the policy's and the pretrained model's."""
    x, model = r.states[k], trainer.policy.model
    own = (score or model.score)(x, at(trainer, k, len(x)), r.condition)
    base = model.base(x, at(trainer, k, len(x)), r.condition)
    return step_of(trainer, k, x, own), step_of(trainer, k, x, base)


def spread(rewards, group, options):
    """The standard deviation that an image's objective is divided by: of its prompt, or of the epoch."""
    return rewards.std(correction=0) if options.get("global_std") else rewards[group].std(correction=0)


def credit(rewards, groups, kl, options):
    """Advantages (K, B), one at a time, and what a prompt's objective is multiplied by, (B,)."""
    count, kappa = len(rewards), options["kappa"]
    found, scales = torch.zeros_like(kl), torch.ones(count)
    for i in range(count):
        group = [j for j in range(count) if groups[j] == groups[i]]
        if options["normalise"]:
            scales[i] = 1 / (spread(rewards, group, options) + 1e-4)
        others = [j for j in group if j != i] if options["leave_one_out"] else group
        for k in range(len(kl)):
            later = slice(len(kl), None) if options.get("truncated") else slice(k + 1, None)
            returns = rewards - kappa * kl[later].sum(0)
            found[k, i] = (returns[i] - returns[others].mean()) * scales[i]
    bound = options["advantage_clip"]
    return (found.clamp(-bound, bound) if options["normalise"] else found), scales


def expected_loss(trainer, experience, options, clip_range):
    """Of every step and image, (K, B), by the policy as it is now; clip_range None for no importance weights."""
    r, times = experience.rollout, trainer.policy.sampler.times
    rewards, groups = experience.scores.total, [row.index for row in experience.rows]
    with torch.no_grad():
        kl = torch.stack([kl_divergence(*distributions(trainer, r, k, trainer.rolled_out)) for k in range(5)])
    advantages, scales = credit(rewards, groups, kl, options)
    rows = []
    for k in range(5):
        now, base = distributions(trainer, r, k)
        log_ratio = (now.log_prob(r.states[k + 1]) - r.log_probs[k]).float()
        loss = -advantages[k] * log_ratio
        if clip_range is not None:
            each = base.event_shape.numel() if "global_std" in options else 1  # grpo's ratios are per dimension
            ratio, bound = (log_ratio / each).exp(), clip_range
            if "global_std" not in options:
                bound = clip_range * (50 * (times[k] - times[k + 1]) / times[0]).sqrt().float()
            loss = -each * torch.minimum(ratio * advantages[k], ratio.clamp(1 - bound, 1 + bound) * advantages[k])
        rows.append(loss + options["kappa"] * scales * kl_divergence(now, base))
    return torch.stack(rows), advantages


def remember(trainer):
    """Keep the score of the policy as it is, before it moves."""
    model = trainer.policy.model
    gain, offset = (p.detach().clone() for p in model.module.parameters())
    trainer.rolled_out = lambda x, t, c: model.base(x, t, c) + gain[c] * x + offset[c]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_loss_is_the_formulas(case, name, shape, tmp_path):
    """-min(w A, clip(w) A) + kappa KL with w, KL and its sum over later steps from torch.distributions (docs/theory.md 8)."""
    options = {**PLAIN, **case} | ({"global_std": False} if name == "grpo" else {})
    clip_range = {"reinforce": None, "grpo": 0.03}.get(name, 0.15)
    more = {} if clip_range is None else {"clip_range": clip_range}
    trainer = trainer_of(tmp_path, shape, algorithm={"name": name, **options, **more})
    move(trainer)
    remember(trainer)
    experience, examples, batch = an_epoch(trainer)
    move(trainer, 0.1, seed=1)
    loss, metrics = trainer.algorithm.loss(trainer.policy, batch)
    expected, advantages = expected_loss(trainer, experience, options, clip_range)
    given = examples.advantage.expand_as(advantages)
    torch.testing.assert_close(given, advantages, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(loss.view(5, 16), expected, rtol=1e-3, atol=1e-3)
    found, wanted = (torch.autograd.grad(x.sum(), trainer.learner.weights) for x in (loss, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3 * b.abs().max().item())
    if options["normalise"] and options["advantage_clip"] < 1:
        assert 0.1 < (advantages.abs() >= options["advantage_clip"]).float().mean() < 1
    if clip_range is not None:
        assert 0.05 < metrics["clip_fraction"] < 0.95


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kappa", [0.0, 0.7])
def test_grpo_divides_by_the_spread_of_the_epoch(kappa, shape, tmp_path):
    """Of all prompts' rewards, and the KL with them, so that kappa keeps its meaning."""
    options = {**PLAIN, "kappa": kappa, "normalise": True, "global_std": True, "advantage_clip": 1e9}
    trainer = trainer_of(tmp_path, shape, algorithm={"name": "grpo", **options, "clip_range": 0.03})
    move(trainer)
    remember(trainer)
    experience, examples, batch = an_epoch(trainer)
    move(trainer, 0.1, seed=1)
    expected, advantages = expected_loss(trainer, experience, options, 0.03)
    torch.testing.assert_close(examples.advantage.expand_as(advantages), advantages, rtol=1e-3, atol=1e-3)
    loss, _ = trainer.algorithm.loss(trainer.policy, batch)
    torch.testing.assert_close(loss.view(5, 16), expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("truncated", [False, True])
def test_dpok_may_leave_out_the_kl_of_later_steps(truncated, shape, tmp_path):
    options = {**PLAIN, "kappa": 0.9, "truncated": truncated}
    trainer = trainer_of(tmp_path, shape, algorithm={"name": "dpok", **options})
    move(trainer)
    remember(trainer)
    experience, examples, _ = an_epoch(trainer)
    _, advantages = expected_loss(trainer, experience, options, 0.2)
    torch.testing.assert_close(examples.advantage, advantages, rtol=1e-3, atol=1e-3)
    assert (advantages[0] - advantages[-1]).abs().max() > 0.05 or truncated


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("steps", [None, [1, 3]])
def test_only_the_chosen_steps_are_in_the_loss(steps, shape, tmp_path):
    trainer = trainer_of(tmp_path, shape, algorithm={"name": "ddpo"}, train={"steps": steps})
    experience, examples, batch = an_epoch(trainer)
    chosen = steps or list(range(5))
    assert examples.k.tolist() == chosen
    states = experience.rollout.states
    assert torch.equal(batch.x, states[chosen].flatten(0, 1))
    assert torch.equal(batch.next_x, states[[k + 1 for k in chosen]].flatten(0, 1))


def test_metrics_of_a_clipped_loss(tmp_path):
    """approx_kl is E (w - 1 - log w) and clip_fraction the share beyond the bound, of both signs."""
    trainer = trainer_of(tmp_path, algorithm={"name": "ddpo", "clip_range": 0.1})
    experience, _, batch = an_epoch(trainer)
    move(trainer, 0.3)
    _, metrics = trainer.algorithm.loss(trainer.policy, batch)
    r, times = experience.rollout, trainer.policy.sampler.times
    ratios = torch.stack(
        [(distributions(trainer, r, k)[0].log_prob(r.states[k + 1]) - r.log_probs[k]).exp() for k in range(5)]
    )
    bound = 0.1 * (50 * -times.diff() / times[0]).sqrt()[:, None]
    assert metrics["approx_kl"].item() == pytest.approx((ratios - 1 - ratios.log()).mean().item(), rel=1e-3)
    assert metrics["clip_fraction"].item() == pytest.approx(((ratios - 1).abs() > bound).double().mean().item())


@pytest.mark.parametrize(("advantage", "ratio", "moves"), [(1, 1.09, 1), (1, 1.11, 0), (-1, 0.91, 1), (-1, 0.89, 0),
                                                          (1, 0.5, 1), (-1, 2.0, 1)])  # fmt: skip
def test_the_bound_is_exact_and_one_sided(advantage, ratio, moves):
    log_ratio = torch.tensor([ratio]).log().requires_grad_()
    loss, _ = clipped(log_ratio, torch.tensor([float(advantage)]), 0.1)
    (slope,) = torch.autograd.grad(loss, log_ratio)
    assert slope.item() == pytest.approx(-advantage * ratio * moves)


# ---------------------------------------------------------------------------------------------- ddpo's own


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_balanced_steps_are_weighed(shape, tmp_path):
    """By 1 / (std of d log p / d output), here the slope of the mean in the score over S, by differences."""
    losses = {}
    for balanced in (False, True):
        trainer = trainer_of(tmp_path, shape, algorithm={"name": "ddpo", "balance_steps": balanced})
        _, _, batch = an_epoch(trainer)
        move(trainer, 0.3)
        losses[balanced] = trainer.algorithm.loss(trainer.policy, batch)[0].view(5, 16)
    x, weights = torch.zeros(1, 1, dtype=torch.float64), []
    for k in range(5):
        means = [step_of(trainer, k, x, torch.full_like(x, output)).mean for output in (-0.5, 0.5)]
        weights.append(trainer.policy.sampler.S[k] / (means[1] - means[0]).abs().squeeze())
    expected = torch.stack(weights) / max(weights)
    assert expected.min() < 0.7
    torch.testing.assert_close(losses[True], losses[False] * expected.float()[:, None])


def advantages_of_epochs(folder, epochs=4, **options):
    """The rewards (E, B) of some epochs without learning, and the advantages that ddpo gives them."""
    trainer = trainer_of(folder, algorithm={"name": "ddpo", "advantage": "prompt", **options})
    experiences = [trainer.collect(epoch, Clock()) for epoch in range(epochs)]
    found = [trainer.examples(e, i).advantage[0] for i, e in enumerate(experiences)]
    rewards = [e.scores.total for e in experiences]
    rows = [[row.index for row in e.rows] for e in experiences]
    return torch.stack(rewards), rows, torch.stack(found)


@pytest.mark.parametrize(("length", "least"), [(32, 16), (20, 16), (32, 25), (6, 100), (100, 1)])
def test_advantages_against_a_prompts_last_rewards(length, least, tmp_path):
    rewards, rows, found = advantages_of_epochs(
        tmp_path, tracker_length=length, tracker_least=least, advantage_clip=1e9
    )
    past = {0: [], 1: []}
    for epoch in range(4):
        for row, reward in zip(rows[epoch], rewards[epoch].tolist(), strict=True):
            past[row] = [*past[row], reward][-length:]
        for i, row in enumerate(rows[epoch]):
            known = torch.tensor(past[row]) if len(past[row]) >= least else rewards[epoch]
            expected = (rewards[epoch, i] - known.mean()) / (known.std(correction=0) + 1e-6)
            assert found[epoch, i].item() == pytest.approx(expected.item(), abs=1e-4)


def test_those_advantages_are_bounded_too(tmp_path):
    _, _, free = advantages_of_epochs(tmp_path, advantage_clip=1e9)
    _, _, bounded = advantages_of_epochs(tmp_path, advantage_clip=0.5)
    torch.testing.assert_close(bounded, free.clamp(-0.5, 0.5))
    assert free.abs().max() > 1


# ---------------------------------------------------------------------------------------------- ratios

SAMPLERS = ["ddim", "euler_maruyama", "exponential", "heun", "dpm_solver_pp", "flow_sde", "dance_sde", "pcpo"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_ratio_is_one_at_the_start_with_every_sampler(name, shape, tmp_path):
    """Also where a step depends on what an earlier one remembered, and where only some steps have noise."""
    level = {"noise_level": 0.5} if name.endswith("_sde") else {"weight": 100.0} if name == "pcpo" else {"eta": 0.7}
    for noisy in (None, [1, 3]):
        options = {"name": name, "noise_steps": noisy, **level}
        trainer = trainer_of(tmp_path, shape, algorithm={"name": "ddpo"}, sampler=options)
        move(trainer)
        _, examples, batch = an_epoch(trainer)
        assert examples.k.tolist() == (noisy or list(range(5)))
        with torch.no_grad():
            torch.testing.assert_close(batch.log_prob(trainer.policy), batch.old_log_prob, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["ddpo", "grpo"])
def test_a_window_of_noisy_steps_moves_with_each_epoch(name, tmp_path):
    """Its steps alone have noise and are trained; each epoch is the chain of `sampler.noise_steps` (MixGRPO)."""
    options = {"algorithm": {"name": name}, "sampler": {"eta": 0.7}}
    trainer = trainer_of(tmp_path / "window", **options, train={"window": 2})
    whole = trainer.policy.sampler.S.clone()
    noisy = whole.nonzero()[:, 0].tolist()
    for epoch in range(2 * len(noisy)):
        first = epoch % (len(noisy) - 1)
        wanted = noisy[first : first + 2]
        experience = trainer.collect(epoch, Clock())
        examples = trainer.examples(experience, epoch)
        assert examples.k.tolist() == wanted
        assert torch.equal(trainer.policy.sampler.S > 0, torch.isin(torch.arange(5), torch.tensor(wanted)))
        assert torch.equal(experience.rollout.log_probs.isfinite().all(1), trainer.policy.sampler.S > 0)
        torch.testing.assert_close(trainer.policy.sampler.S[wanted], whole[wanted])
        fixed = trainer_of(tmp_path / f"{epoch}", algorithm={"name": name}, sampler={"eta": 0.7, "noise_steps": wanted})
        assert torch.equal(fixed.collect(epoch, Clock()).rollout.states, experience.rollout.states)
    assert trainer.sampler.S.equal(whole)


def test_with_a_window_the_path_kl_is_of_the_whole_chain(tmp_path):
    """What the deployed chain spends, not the few steps that an epoch has noise at."""
    trainer = trainer_of(tmp_path, algorithm={"name": "ddpo"}, sampler={"eta": 0.7}, train={"window": 1})
    move(trainer)
    experience = trainer.collect(0, Clock())
    found = trainer.base_kl(experience)
    whole = Policy(trainer.policy.model, trainer.sampler)
    many = rollout(whole, experience.rollout.condition.repeat(500), torch.Generator().manual_seed(0), 8000)
    each = path_kl(whole, many, 8000).kl.sum(0)
    assert found == pytest.approx(each.mean().item(), abs=4 * each.std().item() / 16**0.5)
    assert path_kl(trainer.policy, experience.rollout, 16).kl.sum(0).mean() < 0.6 * found


def test_the_path_kl_is_that_of_the_policy_whoever_rolls_out(tmp_path):
    """rwr learns from the pretrained model's images: their states are not those that the policy visits."""
    trainer = trainer_of(tmp_path, algorithm={"name": "rwr"}, sampler={"eta": 0.7})
    move(trainer)
    experience, policy = trainer.collect(0, Clock()), trainer.policy
    condition = experience.rollout.condition[:32]
    drawn = rollout(policy, condition, trainer.noise(0, "path KL", range(len(condition))), 16)
    found = trainer.base_kl(experience)
    assert found == pytest.approx(path_kl(policy, drawn, 16).kl.sum(0).mean().item(), rel=1e-5)
    others = path_kl(policy, experience.rollout.first(len(condition)), 16).kl.sum(0).mean().item()
    assert abs(found - others) > 0.01 * found


@pytest.mark.parametrize("quiet", [{"eta": 0.0}, {"name": "heun"}, {"name": "dpm_solver_pp", "eta": 0.5}], ids=str)
def test_without_noise_of_its_own_the_path_kl_is_that_of_the_reverse_sde(quiet, tmp_path):
    """By DDPM over the same times, whether the roll-out is an ODE's or has a solver with memory."""
    trainer = trainer_of(tmp_path, algorithm={"name": "nft"}, sampler=quiet)
    move(trainer)
    experience, times = trainer.collect(0, Clock()), trainer.sampler.times
    ddpm = Policy(
        trainer.policy.model, make("sampler", {"name": "ddim", "eta": 1.0}, trainer.policy.model.schedule, times)
    )
    condition = experience.rollout.condition[:32]
    drawn = rollout(ddpm, condition, trainer.noise(0, "path KL", range(len(condition))), 16)
    found = trainer.base_kl(experience)
    assert found == pytest.approx(path_kl(ddpm, drawn, 16).kl.sum(0).mean().item(), rel=1e-5)
    assert found > 1e-3


@pytest.mark.parametrize(
    ("sharded", "start", "expected"), [(False, 0, 32), (False, 64, 0), (True, 0, 16), (True, 64, 16)]
)
def test_processes_that_compute_in_step_measure_the_path_kl_of_as_many_images(sharded, start, expected, tmp_path):
    """Those of one alone would leave it waiting in a network whose weights the others have."""
    options = {"prompts_per_epoch": 1, "images_per_prompt": 64, "rollout_batch": 64}
    trainer = trainer_of(tmp_path, algorithm={"name": "ddpo"}, sampler={"eta": 0.7}, train=options)
    experience = replace(trainer.collect(0, Clock()), indices=range(start, start + 64), total=128)
    sizes = []

    def path_kl(experience, own):
        sizes.append(own)
        return SimpleNamespace(kl=torch.full((4, own), 0.5))

    trainer.path_kl = path_kl
    alike = 2 if sharded else 1
    trainer.processes = SimpleNamespace(sharded=sharded, count=2, sum=lambda x: alike * x)
    assert trainer.base_kl(experience) == (2.0 if expected else 0.0)
    assert sizes == ([expected] if expected else [])


def test_images_of_a_prompt_can_start_from_the_same_noise(tmp_path):
    trainer = trainer_of(tmp_path, algorithm={"name": "ddpo"}, train={"same_start": True})
    states = trainer.collect(0, Clock()).rollout.states.view(6, 2, 8, -1)
    assert torch.equal(states[0], states[0, :, :1].expand_as(states[0]))
    assert not torch.equal(states[0, 0], states[0, 1])
    assert len(states[1].flatten().unique()) == states[1].numel()


@pytest.mark.parametrize("name", ["ddpo", "ctrl"])
def test_log_probabilities_can_be_made_anew(name, tmp_path):
    """As is done in half precision: of the policy as it is now, and nothing else changes."""
    trainer = trainer_of(tmp_path, algorithm={"name": name}, sampler={"noise_steps": [1, 3]})
    _, examples, batch = an_epoch(trainer)
    move(trainer)
    again = recomputed(examples, trainer.policy, batch=7)
    pairs = again.every_pair()
    assert torch.equal(pairs, examples.every_pair())
    new = again.at(*pairs.unbind(1))
    with torch.no_grad():
        torch.testing.assert_close(new.old_log_prob, batch.log_prob(trainer.policy), rtol=1e-6, atol=1e-6)
    assert (new.old_log_prob - batch.old_log_prob).abs().max() > 0.1
    assert torch.equal(new.x, batch.x)
    assert torch.equal(new.advantage, batch.advantage)


def test_grpo_gives_an_epoch_without_spread_no_weight():
    """Not the reward's, and not the KL's: dividing by nothing would blow it up."""
    algorithm = make("algorithm", {"name": "grpo", "kappa": 0.5})
    same, groups = torch.full((6,), 0.25), torch.tensor([0, 0, 0, 1, 1, 1])
    assert torch.equal(algorithm.scale(same, groups), torch.zeros(6))
    assert torch.equal(algorithm.advantages(same, groups), torch.zeros(6))
    rewards = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    assert torch.allclose(algorithm.scale(rewards, groups), torch.full((6,), 1 / (0.5 + 1e-4)))
