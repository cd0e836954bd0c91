"""The loop and DDPO on a Gaussian chain whose gradients are known, and on a tiny Stable Diffusion pipeline."""

import contextlib
import dataclasses
import functools
import gc
import importlib
import json
import re
import types

import pytest
import torch
from accelerate import Accelerator
from helpers import toy_words
from torch.distributions import Independent, Normal
from tqdm import tqdm

import condrl
from condrl import RunError
from condrl.algorithms.credit import group_advantages
from condrl.algorithms.examples import check_ratios
from condrl.commands import finetune
from condrl.config import build_config
from condrl.diffusion.noise import seeded
from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import sample
from condrl.diffusion.schedulers import schedule_from_diffusers
from condrl.diffusion.transition import Gaussian
from condrl.loading import load_config
from condrl.models.lora import lora_layers
from condrl.plugins.models.stable_diffusion import StableDiffusion
from condrl.processes import Processes
from condrl.prompts import Row
from condrl.rewards.scoring import make_reward
from condrl.training.build import make, make_policy, make_sampler
from condrl.training.trainer import Trainer, progress

SCHEDULE = schedule_from_diffusers(
    {"num_train_timesteps": 100, "beta_start": 0.001, "beta_end": 0.2, "set_alpha_to_one": False, "steps_offset": 1}
)


SIDES = (Row(0, "0"), Row(1, "1"))


class Line(torch.nn.Module):
    """Score of a Gaussian whose mean is learned, one number per prompt."""

    def __init__(self, prompts):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.zeros(prompts, 2))

    def forward(self, x, t, condition):
        alpha, variance = (c.to(x)[:, None] for c in (SCHEDULE.alpha(t), torch.ones_like(t)))
        return (alpha * self.mean[condition] - x) / variance


class LineModel:
    """Points in the plane; p(x | c) = N(mean_c, I), so the score is (alpha mean - x) / 1."""

    schedule, device, state_shape, evaluations = SCHEDULE, torch.device("cpu"), (2,), 0

    def __init__(self, prompts=2):
        self.module = Line(prompts)

    def encode(self, prompts):
        return torch.tensor([int(p) for p in prompts])

    def score(self, x, t, condition, module=None):
        return (module or self.module)(x, t, condition)

    def decode(self, x):
        return x

    def merged(self):
        return contextlib.nullcontext()


@condrl.reward
def rightwards(samples, prompts):
    """x for prompt 0, -x for prompt 1."""
    sign = torch.tensor([1.0 if p == "0" else -1.0 for p in prompts]).to(samples)
    return sign * samples[:, 0]


def make_trainer(tmp_path, model=None, steps=8, rows=SIDES, **sections):
    tree = {
        "sampler": {"steps": steps},
        "rewards": {"rightwards": {}},
        "train": {"prompts_per_epoch": 2, "images_per_prompt": 16, "rollout_batch": 8, "loss_batch": 50, "epochs": 1},
        "run": {"dir": str(tmp_path)},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    config = build_config(tree)
    model = model or LineModel()
    policy = Policy(model, make_sampler(config.sampler, model.schedule))
    rewards = [make_reward(name, options) for name, options in config.rewards.items() if options["weight"]]
    return Trainer(config, policy, make("algorithm", config.algorithm), rewards, rows, Processes(Accelerator(cpu=True)))


def clock():
    return types.SimpleNamespace(lap=lambda name: None)


def test_stored_log_probs_are_those_of_the_transitions(tmp_path):
    trainer = make_trainer(tmp_path)
    experience = trainer.collect(0, clock())
    r, policy = experience.rollout, trainer.policy
    assert r.states.shape == (9, 32, 2)
    for k in range(8):
        transition = policy.transition(r.states[k], torch.full((32,), k), r.condition)
        torch.testing.assert_close(transition.log_prob(r.states[k + 1]), r.log_probs[k], atol=1e-5, rtol=1e-5)


def test_gradient_at_the_start_is_reinforce(tmp_path):
    """Every ratio is 1, so the gradient is that of -mean_i A_i sum_k log p(x_{k+1} | x_k), docs/theory.md 8."""
    trainer = make_trainer(tmp_path, train={"loss_batch": 7, "max_grad_norm": 1e9})
    experience = trainer.collect(0, clock())
    gradients = []
    trainer.learner.optimizer.step = lambda: gradients.append(trainer.policy.model.module.mean.grad.clone())
    examples = trainer.examples(experience, 0)
    trainer.learner.step(examples, range(32), torch.arange(32), torch.Generator())
    r, total = experience.rollout, torch.zeros(())
    for k in range(8):
        transition = trainer.policy.transition(r.states[k], torch.full((32,), k), r.condition)
        total = total - (examples.advantage[k] * transition.log_prob(r.states[k + 1])).sum() / 32
    (expected,) = torch.autograd.grad(total, trainer.policy.model.module.mean)
    torch.testing.assert_close(gradients[0], expected, atol=1e-5, rtol=1e-4)
    assert expected.abs().max() > 0.01


def test_a_subset_of_steps_has_the_same_gradient_on_average(tmp_path):
    full = make_trainer(tmp_path, train={"max_grad_norm": 1e9})
    experience, found = full.collect(0, clock()), {}
    for name, per_image in (("all", None), ("some", 3)):
        full.config.train.steps_per_image = per_image
        grads = []
        full.learner.optimizer.step = lambda grads=grads: grads.append(full.policy.model.module.mean.grad.clone())
        generator = torch.Generator().manual_seed(0)
        for _ in range(400 if per_image else 1):
            full.learner.step(full.examples(experience, 0), range(32), torch.arange(32), generator)
        found[name] = torch.stack(grads)
    error = found["some"].std(0) / 400**0.5
    assert ((found["some"].mean(0) - found["all"][0]).abs() < 4 * error + 1e-9).all()


def score_function_sizes(policy):
    """|d mean / d output| / S of each step: d log p / d output, per unit of the noise."""
    x, schedule = torch.randn(1, *policy.model.state_shape, dtype=torch.float64), policy.model.schedule
    for k in range(policy.steps):
        output = torch.randn_like(x, requires_grad=True)
        transition, _ = policy.sampler.step(torch.tensor([k]), x, lambda y, t, o=output: schedule.score(o, y, t))
        noise = torch.randn_like(x)
        (gradient,) = torch.autograd.grad(transition.log_prob(transition.sample(noise).detach()).sum(), output)
        yield (gradient / noise).abs().mean().item()


def test_balanced_steps_have_gradients_of_like_noise(model):
    """The score function's size, times the weight, is the same at every step."""
    step_weights = importlib.import_module("condrl.plugins.algorithms.ddpo").step_weights
    policy = Policy(model, make_sampler({"name": "ddim", "steps": 8, "spacing": None, "eta": 1.0}, model.schedule))
    weights = step_weights(policy)
    assert weights.max() == 1
    sizes = [size * weight for size, weight in zip(score_function_sizes(policy), weights.tolist(), strict=True)]
    assert sizes == pytest.approx([sizes[0]] * 8, rel=1e-6)


def test_the_sizes_of_score_functions(tmp_path):
    """Of GRPO's recipe for the embedded pipeline, as docs/measured.md and docs/algorithms.md give them."""
    config = load_config(["shapes/grpo", f"run.dir={tmp_path}"])
    sizes = list(score_function_sizes(make_policy(config, torch.device("cpu"))))
    assert sizes == sorted(sizes)
    assert [round(sizes[k], digits) for k, digits in ((0, 2), (-2, 2), (-1, 1))] == [0.1, 1.16, 11.0]
    assert config.train.steps == list(range(9))
    weighed = load_config(["shapes/ddpo", f"run.dir={tmp_path}"])
    assert weighed.sampler == config.sampler
    assert weighed.algorithm["balance_steps"]
    assert weighed.train.steps is None


def test_learning_rate_warms_up_and_falls_linearly(tmp_path):
    trainer = make_trainer(
        tmp_path, train={"lr": 0.1, "lr_decay": "linear", "warmup": 2, "epochs": 2, "updates_per_epoch": 2}
    )
    rates = []
    for update in range(4):
        trainer.learner.updates = update
        trainer.learner.set_lr()
        rates.append(trainer.learner.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.05, 0.075, 0.05, 0.025])


def test_only_chosen_steps_are_trained(tmp_path):
    trainer = make_trainer(tmp_path, train={"steps": [2, 5], "steps_per_image": 1})
    columns = trainer.examples(trainer.collect(0, clock()), 0).k
    drawn = trainer.learner.draw_steps(columns, 1000, torch.Generator().manual_seed(0))
    assert drawn.shape == (1000, 1)
    assert set(drawn.flatten().tolist()) == {2, 5}


def test_ddpo_learns_each_prompts_direction(tmp_path):
    trainer = make_trainer(tmp_path, train={"epochs": 30, "lr": 0.05, "updates_per_epoch": 2, "inner_epochs": 2})
    trainer.fit()
    mean = trainer.policy.model.module.mean
    assert mean[0, 0] > 0.5
    assert mean[1, 0] < -0.5
    assert mean[:, 1].abs().max() < 0.5 * mean[:, 0].abs().min()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 31))
    assert lines[-1]["reward/rightwards"] > lines[0]["reward/rightwards"] + 0.5
    assert lines[-1]["updates"] == 120
    assert {"loss", "grad_norm", "approx_kl", "clip_fraction", "lr"} <= set(lines[0])


def test_clipping_is_one_sided(tmp_path):
    """The min stops a ratio that has gone the right way too far, and never one that has gone the wrong way."""
    trainer = make_trainer(tmp_path)
    experience = trainer.collect(0, clock())
    batch = trainer.examples(experience, 0).at(torch.arange(32), torch.full((32,), 4))
    algorithm, module = trainer.algorithm, trainer.policy.model.module
    with torch.no_grad():
        module.mean += 1.5
    ratio = (
        trainer.policy.transition(batch.x, batch.k, batch.condition).log_prob(batch.next_x) - batch.old_log_prob
    ).exp()
    loss, metrics = algorithm.loss(trainer.policy, batch)
    (gradient,) = torch.autograd.grad(loss.sum(), module.mean, retain_graph=True)
    per_image = torch.stack([torch.autograd.grad(x, module.mean, retain_graph=True)[0].abs().sum() for x in loss])
    times = trainer.policy.sampler.times
    bound = algorithm.clip_range * (50 * (times[4] - times[5]) / times[0]).sqrt()
    stopped = ((batch.advantage > 0) & (ratio > 1 + bound)) | ((batch.advantage < 0) & (ratio < 1 - bound))
    assert stopped.any()
    assert (~stopped).any()
    assert torch.equal(per_image == 0, stopped | (batch.advantage == 0))
    assert metrics["clip_fraction"].item() == pytest.approx(((ratio - 1).abs() > bound).float().mean().item())
    assert gradient.abs().sum() > 0


def test_a_changed_policy_is_caught_before_the_first_update(tmp_path):
    trainer = make_trainer(tmp_path)
    examples = trainer.examples(trainer.collect(0, clock()), 0)
    check_ratios(examples, trainer.policy, trainer.config.train.loss_batch)
    with torch.no_grad():
        trainer.policy.model.module.mean += 0.01
    with pytest.raises(RunError, match=r"ratio should be 1, but one is off by .*0\.001"):
        check_ratios(examples, trainer.policy, trainer.config.train.loss_batch)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ratios_are_one_on_stable_diffusion(dtype, pipeline, tmp_path):
    """With a LoRA that matters, mixed steps, gradients on, and roll-out batches unlike the update's."""
    model = StableDiffusion(torch.device("cpu"), path=str(pipeline), dtype=dtype, lora_rank=2)
    for layer in lora_layers(model.module).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    trainer = make_trainer(
        tmp_path,
        model,
        rows=[Row(0, "a red star"), Row(1, "a blue circle")],
        rewards={"jpeg_compressibility": {}, "rightwards": {"weight": 0}},
    )
    examples = trainer.examples(trainer.collect(0, clock()), 0)
    check_ratios(examples, trainer.policy, trainer.config.train.loss_batch)
    if dtype == "float32":
        with torch.no_grad():
            for layer in lora_layers(model.module).values():
                layer.lora_B["default"].weight.mul_(1.2)
        with pytest.raises(RunError, match="ratio should be 1"):
            check_ratios(examples, trainer.policy, trainer.config.train.loss_batch)


@pytest.mark.parametrize(("batch", "updates", "size"), [(256, 1, 256), (200, 1, 128), (50, 2, 43), (1, 2, 1)])
def test_a_network_whose_result_depends_on_its_batch_has_ratios_of_one(batch, updates, size, tmp_path, monkeypatch):
    """As kernels of half precision do on a GPU: what is recomputed, checked and learned from has one size, but for what is left."""
    trainer = make_trainer(tmp_path, train={"loss_batch": batch, "updates_per_epoch": updates})
    monkeypatch.setattr(importlib.import_module("condrl.training.trainer"), "has_half_precision", lambda policy: True)
    model, sizes = trainer.policy.model, []
    score = model.score

    def of_its_batch(x, t, condition):
        sizes.append(len(x))
        return score(x, t, condition) + len(x)

    monkeypatch.setattr(model, "score", of_its_batch)
    collected = trainer.collect(0, clock())
    sizes.clear()
    examples = trainer.examples(collected, 0)
    assert set(sizes) == {size}
    assert trainer.pairs_at_once(examples) == size
    check_ratios(examples, trainer.policy, size)
    assert set(sizes) == {size}
    sizes.clear()
    trainer.learner.update(examples, collected, 0)
    assert sum(sizes) == 256
    assert sizes.count(size) == 256 // updates // size * updates


@pytest.mark.parametrize(
    ("steps", "processes", "drawn", "batch", "size"),
    [(9, 1, None, 128, 96), (9, 1, None, 300, 288), (9, 2, None, 128, 72), (9, 3, None, 64, 50), (9, 1, 2, 64, 64)],
)
def test_an_updates_pairs_are_taken_in_equal_parts(steps, processes, drawn, batch, size):
    """128 images in four updates."""
    train = {"prompts_per_epoch": 16, "images_per_prompt": 8, "updates_per_epoch": 4, "rollout_batch": 128}
    config = build_config({"train": {**train, "loss_batch": batch, "steps_per_image": drawn}})
    assert config.pairs_at_once(steps, processes) == size


def test_sums_over_many_dimensions_keep_their_digits():
    """At Stable Diffusion's 16384 dimensions a rounding error in the mean moves a ratio by far less than 1e-3."""
    g = torch.Generator().manual_seed(0)
    mean, noise = torch.randn(8, 4, 64, 64, generator=g), torch.randn(8, 4, 64, 64, generator=g)
    std = torch.full((8, 1, 1, 1), 0.02)
    transition, x = Gaussian(mean, std), mean + std * noise
    rounded = Gaussian(mean + 1e-8 * torch.randn(mean.shape, generator=g), std)
    assert (transition.log_prob(x) - rounded.log_prob(x)).exp().sub(1).abs().max() < 1e-3
    exact = Independent(Normal(mean.double(), std.double().expand_as(mean)), 3).log_prob(x.double())
    torch.testing.assert_close(transition.log_prob(x), exact, rtol=1e-7, atol=2e-2)


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    trainer = make_trainer(tmp_path, train={"max_bad_updates": 1})
    experience = trainer.collect(0, clock())
    examples = trainer.examples(experience, 0)
    examples = dataclasses.replace(examples, advantage=torch.full_like(examples.advantage, float("nan")))
    before = trainer.policy.model.module.mean.detach().clone()
    with pytest.raises(RunError, match="1 updates in a row, the last after update 0"):
        trainer.learner.update(examples, experience, 0)
    assert torch.equal(trainer.policy.model.module.mean, before)


def test_sampling_by_seed_does_not_depend_on_the_batch(model):
    policy = Policy(model, make_sampler({"name": "ddim", "steps": 4, "spacing": None, "eta": 1.0}, model.schedule))
    condition = model.encode(["a red star", "a blue circle", "a red star"])
    with torch.no_grad():
        synchronized = sample(policy, condition, seeded([3, 4, 5]), batch=3)
        apart = sample(policy, condition, seeded([3, 4, 5]), batch=1)
    torch.testing.assert_close(synchronized, apart, atol=1e-4, rtol=1e-4)


def test_rng_depends_on_seed_epoch_and_phase(tmp_path):
    trainer = make_trainer(tmp_path)
    draws = {
        tuple(trainer.noise(epoch, phase, range(2)).normal((1,)).flatten().tolist())
        for epoch in (0, 1)
        for phase in ("rollout", "update")
    }
    assert len(draws) == 4
    first, again = trainer.collect(0, clock()), trainer.collect(0, clock())
    assert torch.equal(first.rollout.states, again.rollout.states)


def nft_trainer(tmp_path, **sections):
    algorithm = {"name": "nft", "normalise": False, "adaptive": False, **sections.pop("algorithm", {})}
    return make_trainer(tmp_path, algorithm=algorithm, sampler={"eta": 0.0}, **sections)


def test_nft_is_diffusionnft(tmp_path):
    """The loss is a / b times r |e - b d|^2 + (1 - r) |e + b d|^2 of Zheng et al. 2025, up to a constant in theta."""
    trainer = nft_trainer(tmp_path, algorithm={"temperature": 1.5, "draws": 2})
    examples = trainer.examples(trainer.collect(0, clock()), 0)
    batch = examples.at(torch.arange(32), torch.arange(32) % 2)
    a, b, mean = 3.0, 0.5, trainer.policy.model.module.mean
    alpha, sigma = SCHEDULE.alpha(batch.t)[:, None].float(), SCHEDULE.sigma(batch.t)[:, None].float()
    clean = (batch.x - sigma * batch.noise) / alpha

    def velocity(score):
        x0 = (batch.x + sigma**2 * score) / alpha
        return -sigma * score * alpha - sigma * x0

    differences = []
    for value in (0.0, 0.3, -0.7):
        with torch.no_grad():
            mean.fill_(value)
        new, old = (
            velocity(s) for s in (trainer.policy.model.score(batch.x, batch.t, batch.condition), batch.old_score)
        )
        target, r = alpha * batch.noise - sigma * clean, (0.5 + batch.advantage / (2 * a))[:, None]
        plus, minus = (1 - b) * old + b * new, (1 + b) * old - b * new
        published = (r * (plus - target) ** 2 + (1 - r) * (minus - target) ** 2).mean(1) * a / b
        differences.append(published - trainer.algorithm.loss(trainer.policy, batch)[0])
    torch.testing.assert_close(differences[1], differences[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(differences[2], differences[0], rtol=1e-4, atol=1e-4)


def test_nft_aims_at_the_tilted_law(tmp_path):
    """p (1 + A / temperature) with A = x has mean Var(x) / temperature; so has the minimum, at every time."""
    for times in ((0.1, 0.2), (0.8, 0.97)):
        trainer = nft_trainer(
            tmp_path,
            algorithm={"temperature": 5.0, "draws": 8, "times": times},
            train={"images_per_prompt": 4000, "rollout_batch": 8000, "max_grad_norm": 1e9},
        )
        experience = trainer.collect(0, clock())
        examples, mean = trainer.examples(experience, 0), trainer.policy.model.module.mean
        optimizer = torch.optim.LBFGS([mean], max_iter=50)

        def closure(trainer=trainer, examples=examples, optimizer=optimizer):
            optimizer.zero_grad()
            images = torch.arange(8000).repeat(8)
            loss, _ = trainer.algorithm.loss(
                trainer.policy, examples.at(images, torch.arange(8).repeat_interleave(8000))
            )
            loss.mean().backward()
            return loss.mean()

        optimizer.step(closure)
        shift = experience.rollout.samples[:, 0].var().item() / 5
        assert 0.1 < shift < 0.3
        torch.testing.assert_close(mean.detach(), torch.tensor([[shift, 0.0], [-shift, 0.0]]), atol=0.02, rtol=0)


def test_nft_learns_each_prompts_direction(tmp_path):
    trainer = nft_trainer(tmp_path, train={"epochs": 30, "lr": 0.05, "updates_per_epoch": 2})
    trainer.fit()
    mean = trainer.policy.model.module.mean
    assert mean[0, 0] > 0.5
    assert mean[1, 0] < -0.5
    assert mean[:, 1].abs().max() < 0.5 * mean[:, 0].abs().min()


# ---------------------------------------------------------------------------------------------- failed scores


@condrl.reward
class Flaky:
    """Fails for a share of the samples that is spread evenly."""

    def __init__(self, *, share: float = 0.05, large: float = 0.0):
        self.share, self.large, self.seen, self.errors = share, large, 0, []

    def __call__(self, samples, prompts):
        scores = samples[:, 0].clone()
        for i in range(len(scores)):
            self.seen += 1
            if int(self.seen * self.share) > int((self.seen - 1) * self.share):
                scores[i] = torch.nan
                self.errors.append("no answer from the judge")
        return scores


FLAKY = {"rightwards": {"weight": 0.0}, "flaky": {"weight": 1.0, "share": 0.05}}


def test_a_few_failed_scores_are_left_out_and_counted(tmp_path):
    trainer = make_trainer(tmp_path, rewards=FLAKY, train={"epochs": 3, "images_per_prompt": 40, "rollout_batch": 80})
    trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["failed_scores"] for line in lines] == [4, 4, 4]
    assert all(line["skipped_updates"] == 0 for line in lines)
    assert all(abs(line["reward/total"]) < 10 for line in lines)


def test_too_many_failed_scores_stop_the_run_with_the_first_reason(tmp_path):
    flaky = {"rightwards": {"weight": 0.0}, "flaky": {"weight": 1.0, "share": 0.6}}
    trainer = make_trainer(tmp_path, rewards=flaky)
    said = r"'flaky' failed for the prompt '.': no answer from the judge \(59% .*train.max_failed=0.1 may\)"
    with pytest.raises(RunError, match=said):
        trainer.fit()


@pytest.mark.parametrize("name", ["ddpo", "nft"])
def test_an_update_is_that_of_the_images_with_a_score(name, tmp_path):
    """What a failed image looks like does not matter, and its group's statistics are the others'."""
    gradients = []
    for change in (0.0, 3.0):
        trainer = make_trainer(tmp_path, algorithm={"name": name}, rewards=FLAKY, train={"updates_per_epoch": 1})
        trainer.learner.optimizer.step = lambda t=trainer: gradients.append(t.learner.weights[0].grad.clone())
        experience = trainer.collect(0, clock())
        failed = ~experience.scored
        assert failed.sum() == 1
        experience.rollout.states[1:, failed] += change
        trainer.learner.update(trainer.examples(experience, 0), experience, 0)
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[0], gradients[1])
    advantages = experience.credit(group_advantages, experience.scores.total)
    assert advantages[failed] == 0
    own = (experience.groups == experience.groups[failed]) & experience.scored
    torch.testing.assert_close(advantages[own], group_advantages(experience.scores.total[own], experience.groups[own]))


def test_normalised_rewards_have_the_spread_of_their_weights(tmp_path):
    rewards = {"rightwards": {"weight": 2.0}, "steep": {"weight": -0.5}}
    condrl.reward(lambda samples, prompts: 1000 * samples[:, 1] + 7, name="steep")
    raw = make_trainer(tmp_path, rewards=rewards).collect(0, clock())
    trainer = make_trainer(tmp_path, rewards=rewards, train={"normalise_rewards": True})
    even = trainer.collect(0, clock())
    right, steep = (raw.scores.each[name] for name in ("rightwards", "steep"))
    torch.testing.assert_close(raw.scores.total, 2 * right - 0.5 * steep)
    expected = 2 * right / right.std(correction=0) - 0.5 * steep / steep.std(correction=0)
    torch.testing.assert_close(even.scores.total, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(even.scores.each["steep"], steep)  # recorded as it is
    again = even.score(even.rollout.samples, torch.arange(len(steep)))
    torch.testing.assert_close(again, even.scores.total, rtol=1e-4, atol=1e-4)


def test_a_reward_that_does_not_vary_adds_nothing_to_normalised_ones(tmp_path):
    rewards = {"rightwards": {"weight": 2.0}, "level": {"weight": 1.0}}
    condrl.reward(lambda samples, prompts: 0.7 + 0 * samples[:, 1], name="level")
    trainer = make_trainer(tmp_path, rewards=rewards, train={"normalise_rewards": True})
    scores = trainer.collect(0, clock()).scores
    right = scores.each["rightwards"]
    torch.testing.assert_close(scores.total, 2 * right / right.std(correction=0), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_memory_is_flat_over_the_epochs(tmp_path):
    """Neither objects nor the bytes of tensors grow with the number of epochs."""
    trainer = make_trainer(tmp_path, steps=3, rows=[Row(i, "01"[i % 2]) for i in range(7)])

    def held(epochs):
        train = dataclasses.replace(trainer.config.train, epochs=epochs)
        trainer.config = dataclasses.replace(trainer.config, train=train)
        trainer.fit()
        gc.collect()
        objects = gc.get_objects()
        return len(objects), sum(x.nbytes for x in objects if isinstance(x, torch.Tensor))

    before, after = held(20), held(100)
    assert trainer.epoch == 100
    assert after[1] == before[1]
    assert after[0] - before[0] < 40  # fewer than one for two epochs


def test_the_progress_bar_shows_the_last_of_each():
    lines = [
        {"reward/total": 1.0, "heldout/a": 0.51234, "heldout/a_ci95": 0.1, "base_kl": 3.0, "path_kl": 9.0},
        {"reward/total": 1.25},
    ]
    assert progress(lines, 12.34) == {"reward": "1.25", "heldout/a": "0.512", "KL": "3", "images/s": "12.3"}
    assert progress([{"loss": 0.5}], 1.0) == {"loss": "0.5", "images/s": "1.0"}
    assert progress([], 1.0) == {"images/s": "1.0"}


def test_the_progress_bar_of_a_run(tmp_path, monkeypatch, capsys):
    """It has what the record has of the epochs that are done, the speed and the time that is left."""
    monkeypatch.setattr("condrl.training.trainer.tqdm", functools.partial(tqdm, mininterval=0))
    words = [*toy_words("dpok", tmp_path / "run"), "train.epochs=3", "evaluate.every=1", "evaluate.images_per_prompt=4"]
    assert finetune.main(words) == 0
    shown = [part for part in re.split("[\r\n]", capsys.readouterr().err) if part.startswith("tuning:")]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for done, line in enumerate(lines, 1):
        reward, heldout, kl = (f"{line[name]:.3g}" for name in ("reward/total", "heldout/quadratic", "base_kl"))
        measured = re.escape(f", reward={reward}, heldout/quadratic={heldout}, KL={kl}, images/s=")
        left = r"00:00" if done == 3 else r"\d\d:\d\d"
        bar = rf" {done}/3 \[\d\d:\d\d<{left}, .*{measured}([\d.]+)\]"
        assert any(float(found[1]) > 0 for part in shown if (found := re.search(bar, part))), (bar, shown)
