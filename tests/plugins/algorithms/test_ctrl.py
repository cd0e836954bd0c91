"""CTRL against its formulas, from torch.distributions and plain loops (docs/theory.md 11), in several shapes."""

import math

import pytest
import torch
from chains import SCHEDULE, SHAPES, Shaped, an_epoch, at, bowl, move, step_of, trainer_of, transition
from drawing import perturb
from helpers import ROOT, toy_trainer
from torch.distributions import kl_divergence
from torch.nn.functional import layer_norm

import condrl
from condrl import UsageError
from condrl.algorithms.values import Value
from condrl.commands import finetune
from condrl.diffusion.schedule import OU, VP, RectifiedFlow
from condrl.loading import load_config
from condrl.prompts import Row
from condrl.training.build import make_trainer
from condrl.training.clock import Clock

PLAIN = {
    "kappa": 0.6,
    "exploration": 1.3,
    "clip_range": 0.2,
    "memory": 0.4,
    "value_hint": None,
    "value_features": False,
    "leave_one_out": False,
    "normalise": False,
    "advantage_clip": 5.0,
}
CASES = [
    {},
    {"kappa": 0.0},
    {"exploration": 0.5},
    {"exploration": None},
    {"exploration": None, "kappa": 0.0, "value_hint": True},
    {"clip_range": 0.05},
    {"memory": 1e9},
    {"memory": 0.05},
    {"value_hint": True},
    {"value_hint": False},
    {"value_features": True},
    {"value_features": True, "value_hint": True, "kappa": 0.0},
    {"normalise": True},
    {"normalise": True, "advantage_clip": 0.7},
    {"leave_one_out": True},
    {"leave_one_out": True, "normalise": True, "kappa": 0.0},
    {"advantage_clip": 0.01},  # not of rewards in their own unit
]


def waves(x, t, condition):
    """Features (B, 3) of states, times and prompts."""
    flat = x.flatten(1)
    return torch.stack([torch.sin(8 * flat.sum(1)), torch.cos(8 * flat.sum(1)), t.to(x) + condition], 1)


class Deep(Shaped):
    """With a network whose features are waves before it is tuned, and others after."""

    def network_features(self, x, t, condition):
        self.evaluations += len(x)
        return waves(x + self.tuned, t, condition)


class Formulas:
    """What an epoch of a trainer should teach, from its roll-out and its options alone."""

    def __init__(self, trainer, experience, options):
        self.trainer, self.options, self.r = trainer, options, experience.rollout
        self.model, self.times = trainer.policy.model, trainer.policy.sampler.times
        self.rewards = experience.scores.total
        self.prompts = [row.prompt for row in experience.rows]
        shown = options["value_hint"]
        self.hinted = len(self.model.state_shape) > 1 if shown is None else shown

    def base(self, k):
        x = self.r.states[k]
        return self.model.base(x, at(self.trainer, k, len(x)), self.r.condition)

    def kl(self, k, score):
        """Of the states after step k, of a policy that acts with its mean; by fiat where the step has no noise."""
        x, base = self.r.states[k], self.base(k)
        if self.trainer.policy.sampler.S[k] > 0:
            return kl_divergence(step_of(self.trainer, k, x, score), step_of(self.trainer, k, x, base))
        cost = SCHEDULE.g2(self.times[k]) / 2 * (self.times[k] - self.times[k + 1])
        return cost.float() * (score - base).square().flatten(1).sum(1)

    def hint(self, k):
        """The reward of E[x_0 | x] under the policy that rolled out, by Tweedie's formula."""
        if not self.hinted:
            return None
        alpha, sigma = (c(self.times[k]).float() for c in (SCHEDULE.alpha, SCHEDULE.sigma))
        clean = (self.r.states[k] + sigma**2 * self.r.means[k]) / alpha
        return bowl(self.model.decode(clean), self.prompts)

    def value(self, k):
        t, x, features = at(self.trainer, k, len(self.rewards)), self.r.states[k], self.model.features(self.r.condition)
        if self.options["value_features"]:
            features = torch.cat([features, layer_norm(waves(x, t, self.r.condition), (3,))], 1)
        return self.trainer.algorithm.value(x, t, features, self.hint(k))

    def credit(self):
        """Advantages (K, B), returns (K, B), KL (K, B), and what a prompt's objective is multiplied by, (B,)."""
        options, span = self.options, self.options["memory"] * SCHEDULE.end
        kl = torch.stack([self.kl(k, self.r.means[k]) for k in range(5)])
        values = [*(self.value(k) for k in range(5)), self.rewards]
        td = [values[k + 1] - values[k] - options["kappa"] * kl[k] for k in range(5)]
        scale, sides = torch.ones(len(self.rewards)), torch.tensor([int(prompt) for prompt in self.prompts])
        for side in (0, 1) if options["normalise"] else ():
            scale[sides == side] = 1 / (self.rewards[sides == side].std(correction=0) + 1e-4)
        found = torch.zeros_like(kl)
        for k in range(5):
            for j in range(k, 5):
                found[k] += math.exp(-(self.times[k] - self.times[j]).item() / span) * td[j]
        if options["leave_one_out"]:
            groups = [[j for j in range(len(sides)) if sides[j] == side] for side in sides]
            others = [[j for j in group if j != i] for i, group in enumerate(groups)]
            found = torch.stack([found[:, i] - found[:, rest].mean(1) for i, rest in enumerate(others)], 1)
        found, bound = found * scale, options["advantage_clip"]
        returns = torch.stack([self.rewards - options["kappa"] * kl[k:].sum(0) for k in range(5)])
        return found.clamp(-bound, bound) if options["normalise"] else found, returns, kl, scale

    def std(self, k):
        """Of an action: that of the exploration, or the sampler's own noise as the action's, S / B."""
        sampler = self.trainer.policy.sampler
        if self.options["exploration"] is None:
            return (sampler.S[k] / sampler.B[k]).item()
        return (self.options["exploration"] / (2 * SCHEDULE.g2(self.times[k]))).sqrt().item()

    def steps(self):
        """Those that are trained: those with a probability."""
        return [k for k in range(5) if self.std(k) > 0]

    def loss(self, credit):
        """Of every trained step and image, (K, B), by the policy as it is now."""
        (advantages, returns, _, scale), clip, rows = credit, self.options["clip_range"], []
        for k in self.steps():
            now = self.model.score(self.r.states[k], at(self.trainer, k, len(scale)), self.r.condition)
            std = self.std(k)
            then, action = transition(self.r.means[k], std), self.r.actions[k]
            ratio = (transition(now, std).log_prob(action) - then.log_prob(action)).exp()
            policy = -torch.minimum(ratio * advantages[k], ratio.clamp(1 - clip, 1 + clip) * advantages[k])
            share = ((self.times[k] - self.times[k + 1]) / self.times[0]).float()
            error = share * (self.value(k) - returns[k]).square()
            rows.append(policy + self.options["kappa"] * scale * self.kl(k, now) + error)
        return torch.stack(rows)


@pytest.mark.parametrize("eta", [0.8, 0.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_credit_and_loss_are_the_formulas(case, shape, eta, tmp_path):
    options = {**PLAIN, **case}
    if options["exploration"] is None and eta == 0:
        pytest.skip("an ODE has no noise of its own")
    model = Deep(shape) if options["value_features"] else Shaped(shape)
    trainer = trainer_of(tmp_path, shape, model=model, algorithm={"name": "ctrl", **options}, sampler={"eta": eta})
    move(trainer)
    experience, examples, batch = an_epoch(trainer)
    formulas = Formulas(trainer, experience, options)
    with torch.no_grad():
        credit = advantages, returns, kl, scale = formulas.credit()
    torch.testing.assert_close(examples.advantage, advantages, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(examples.target, returns, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(examples.scale, scale)
    assert examples.k.tolist() == formulas.steps()
    if options["kappa"]:
        torch.testing.assert_close(examples.metrics["path_kl"], kl.sum(0).mean(), rtol=1e-4, atol=1e-5)
        objective = experience.scores.total.mean() - options["kappa"] * kl.sum(0).mean()
        torch.testing.assert_close(examples.metrics["objective"], objective, rtol=1e-4, atol=1e-5)
    else:
        assert "path_kl" not in examples.metrics
    move(trainer, 0.05, seed=1)
    loss, _ = trainer.algorithm.loss(trainer.policy, batch)
    expected = formulas.loss(credit)
    torch.testing.assert_close(loss.view(-1, 16), expected, rtol=1e-3, atol=1e-3)
    weights = [*trainer.learner.weights, *trainer.algorithm.value.parameters()]
    found, wanted = (torch.autograd.grad(x.sum(), weights) for x in (loss, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3 * b.abs().max().item())
    assert kl.sum(0).mean() > 0.01
    if options["normalise"] and options["advantage_clip"] < 1:
        assert 0.02 < (advantages.abs() >= options["advantage_clip"]).float().mean() < 1


@pytest.mark.parametrize("eta", [0.8, 0.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_actions_are_drawn_from_their_law_and_used(shape, eta, tmp_path):
    """a ~ N(mu, exploration / 2 g^2), and x' = A x + B a + S z with a z of its own."""
    many = {"images_per_prompt": 4000, "rollout_batch": 4000}
    trainer = trainer_of(
        tmp_path, shape, algorithm={"name": "ctrl", "exploration": 0.7}, sampler={"eta": eta}, train=many
    )
    r, sampler = trainer.collect(0, Clock()).rollout, trainer.policy.sampler
    for k in range(5):
        std = (0.7 / (2 * SCHEDULE.g2(sampler.times[k]))).sqrt().item()
        z = (r.actions[k] - r.means[k]) / std
        left = r.states[k + 1] - sampler.A[k].float() * r.states[k] - sampler.B[k].float() * r.actions[k]
        assert z.mean().abs() < 5 / z.numel() ** 0.5
        assert z.std().item() == pytest.approx(1, abs=4 / z.numel() ** 0.5)
        assert left.std().item() == pytest.approx(sampler.S[k].item(), rel=4 / z.numel() ** 0.5, abs=1e-6)
        assert (left * z).mean().abs() < 5 * left.std() / z.numel() ** 0.5 + 1e-6
        own = transition(r.means[k], std).log_prob(r.actions[k])
        torch.testing.assert_close(r.log_probs[k].diff().float(), own.diff(), rtol=1e-3, atol=1e-3)


def test_the_samplers_own_noise_can_be_the_actions(tmp_path):
    """Then the chain is that of the sampler, an ODE's excluded, and nothing is added beside."""
    many = {"images_per_prompt": 4000, "rollout_batch": 4000}
    trainer = trainer_of(tmp_path, algorithm={"name": "ctrl", "exploration": None}, sampler={"eta": 0.8}, train=many)
    r, sampler = trainer.collect(0, Clock()).rollout, trainer.policy.sampler
    for k in range(5):
        mean = sampler.A[k].float() * r.states[k] + sampler.B[k].float() * r.means[k]
        noise = r.states[k + 1] - mean
        assert noise.std().item() == pytest.approx(sampler.S[k].item(), rel=0.03, abs=1e-6)
        used = sampler.A[k].float() * r.states[k] + sampler.B[k].float() * r.actions[k]
        torch.testing.assert_close(r.states[k + 1], used, rtol=1e-5, atol=1e-5)


def test_steps_without_noise_of_their_own_are_not_trained(tmp_path):
    trainer = trainer_of(
        tmp_path, algorithm={"name": "ctrl", "exploration": None}, sampler={"eta": 0.8, "noise_steps": [1, 3]}
    )
    _, examples, batch = an_epoch(trainer)
    assert examples.k.tolist() == [1, 3]
    loss, _ = trainer.algorithm.loss(trainer.policy, batch)
    assert loss.shape == (32,)
    assert loss.isfinite().all()


def test_how_much_of_the_returns_the_value_explains(tmp_path):
    """The R^2 of each step, and the best of them: 1 where the network knows the returns."""
    trainer = trainer_of(tmp_path, algorithm={"name": "ctrl", **PLAIN})
    experience, examples, _ = an_epoch(trainer)
    formulas = Formulas(trainer, experience, PLAIN)
    with torch.no_grad():
        values = torch.stack([formulas.value(k) for k in range(5)])
    unexplained = [
        ((e := t - v) - e.mean()).square().mean() / (t - t.mean()).square().mean()
        for t, v in zip(examples.target, values, strict=True)
    ]
    assert examples.metrics["value_explains"].item() == pytest.approx(1 - min(unexplained).item(), abs=1e-4)
    for k, share in enumerate(unexplained):
        assert examples.metrics[f"value_explains/step_{k}"].item() == pytest.approx(1 - share.item(), abs=1e-4)


@condrl.reward
def ripple(samples, prompts):
    """What a small network learns slowly from a point, and at once from waves."""
    return torch.sin(8 * samples.sum(1))


def test_features_that_the_reward_is_made_of_explain_it(tmp_path):
    """At the last step of an ODE, which hardly moves the point."""
    explained = []
    for seen in (False, True):
        trainer = trainer_of(
            tmp_path / str(seen),
            model=Deep((2,)),
            algorithm={"name": "ctrl", "value_features": seen, "exploration": 1e-4, "value_lr": 1e-2},
            sampler={"eta": 0.0},
            train={"epochs": 60, "lr": 1e-9, "images_per_prompt": 64, "rollout_batch": 128, "updates_per_epoch": 4},
            rewards={"bowl": {"weight": 0.0}, "ripple": {}},
        )
        shares = [trainer.run_epoch(epoch)["value_explains/step_4"] for epoch in range(60)]
        explained.append(sum(shares[-20:]) / 20)
    assert explained[0] < 0.2
    assert explained[1] > 0.35


IMAGES = [
    str(ROOT / "configs" / "quickstart.yaml"),
    *("algorithm.name=ctrl", "algorithm.value_features=true", "sampler.steps=3", "sampler.spacing=leading"),
    *("train.prompts_per_epoch=2", "train.images_per_prompt=2", "train.rollout_batch=2", "train.updates_per_epoch=1"),
    *("rewards.shapes.weight=0", "rewards.shapes_exact.weight=0", "rewards.brightness.weight=1"),
    *(
        "prompts.heldout=null",
        "prompts.validation=null",
        "evaluate.every=null",
        "train.rollout_dtype=null",
        "train.lr_decay=none",
    ),
]


def test_features_are_of_the_pretrained_network_at_one_call_a_step(pipeline, tmp_path):
    """They stay what they are when the policy is tuned, and have no gradient; the first, for their number, is free."""
    config = load_config([*IMAGES, f"model.path={pipeline}", f"run.dir={tmp_path}"])
    trainer = make_trainer(config, [Row(0, "a red star"), Row(1, "a blue circle")])
    policy = trainer.policy
    assert policy.model.evaluations == 0
    perturb(policy.model)
    experience = trainer.collect(0, Clock())
    before = policy.model.evaluations
    examples = trainer.algorithm.examples(policy, experience, config.train, None)
    assert policy.model.evaluations == before + 3 * 4
    assert examples.seen.shape == (3, 4, 16)
    assert not examples.seen.requires_grad
    r, found = experience.rollout, []
    for tuned in (False, True):
        perturb(policy.model, 0.3 * tuned)
        found.append(policy.model.network_features(r.states[1], policy.sampler.times[1].expand(4), r.condition))
    torch.testing.assert_close(examples.seen[1], layer_norm(found[0], (16,)), rtol=1e-3, atol=1e-3)
    assert (found[1] - found[0]).abs().max() > 0.01
    value = trainer.algorithm.own_loss("value", policy, examples.at(torch.arange(4), torch.ones(4, dtype=torch.long)))
    value.sum().backward()
    assert all(p.grad is None for p in policy.model.module.parameters())
    assert trainer.algorithm.value.head[0].weight.grad[:, -16:].abs().max() > 0


@pytest.mark.slow
def test_a_run_with_features_resumes_to_the_bit(pipeline, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red star\na blue circle\n")
    for place, epochs in (("whole", 2), ("parts", 1), ("parts", 2)):
        more = [f"prompts.train={tmp_path}/prompts.txt", f"run.dir={tmp_path / place}", f"train.epochs={epochs}"]
        assert finetune.main([*IMAGES, f"model.path={pipeline}", *more, "run.resume=auto"]) == 0
    for file in ("metrics.jsonl", "lora/pytorch_lora_weights.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()


def test_points_have_no_network_to_show(tmp_path):
    with pytest.raises(
        UsageError, match=r"^config algorithm\.value_features: this model has no network .*leave it out$"
    ):
        toy_trainer("ctrl", tmp_path, "algorithm.value_features=true")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("schedule", [VP(), OU(), RectifiedFlow()], ids=lambda s: type(s).__name__)
def test_the_value_is_the_hint_near_the_data(schedule, shape):
    """c_skip = alpha^2 / (alpha^2 + sigma^2), c_out = sigma / sqrt(alpha^2 + sigma^2) (docs/theory.md 11)."""
    value = Value(schedule, shape, features=2, width=16)
    t = torch.linspace(schedule.final_time, schedule.end, 7, dtype=torch.float64)
    x, features, hint = torch.randn(7, *shape), torch.randn(7, 2), torch.randn(7)
    alpha, sigma = (c(t).float() for c in (schedule.alpha, schedule.sigma))
    whole = alpha**2 + sigma**2
    with torch.no_grad():
        alone, corrected = value(x, t, features), value(x, t, features, hint)
    torch.testing.assert_close(corrected, alpha**2 / whole * hint + sigma / whole.sqrt() * alone)


def test_the_value_network_has_its_own_rate_and_width(tmp_path):
    trainer = trainer_of(
        tmp_path, algorithm={"name": "ctrl", "value_lr": 0.02, "value_width": 24}, train={"lr": 0.1, "warmup": 4}
    )
    assert trainer.algorithm.value.head[0].out_features == 24
    trainer.run_epoch(0)
    assert [group["lr"] for group in trainer.learner.optimizer.param_groups] == pytest.approx([0.025, 0.005])


@pytest.mark.parametrize("steps", [1, 4])
def test_the_value_network_takes_its_steps(steps, tmp_path):
    """One with the policy, and the rest alone, on the same error."""
    trainer = trainer_of(tmp_path, algorithm={"name": "ctrl", "value_steps": steps})
    made, step = [], trainer.learner.optimizer.step
    trainer.learner.optimizer.step = lambda: (
        made.append([p.grad is not None for p in (trainer.learner.weights[0], *trainer.algorithm.value.parameters())]),
        step(),
    )
    trainer.run_epoch(0)
    assert len(made) == steps
    assert all(made[0])
    assert all(not own[0] and all(own[1:]) for own in made[1:])
