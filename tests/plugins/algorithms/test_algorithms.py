"""Algorithms on problems whose gradients and optima are known (docs/theory.md 8 and 17)."""

import itertools
from pathlib import Path

import pytest
import torch
from flow_pipelines import sd3_pipeline
from helpers import ALGORITHMS, ROOT, load_script

import condrl
from condrl import UsageError
from condrl.diffusion.path_kl import path_kl
from condrl.diffusion.rollout import Place
from condrl.loading import load_config
from condrl.prompts import Row
from condrl.toys import oracle, reference
from condrl.toys.exact import Problem, solve
from condrl.toys.reference import monte_carlo_value
from condrl.training.build import make_trainer
from condrl.training.checks import check_combination
from condrl.training.clock import Clock
from condrl.training.trainer import Trainer

TOYS = ROOT / "configs" / "toy"
FAMILY = ["reinforce", "ddpo", "dpok", "grpo", "ctrl"]
WITHOUT_KAPPA = ["draft_lv", "refl", "flowbp"]


def trainer_of(problem: str, folder: Path, *words: str, rows: int | None = None) -> Trainer:
    """A toy's trainer; `rows` repeats its first prompt so many times, each a group of its own."""
    from condrl.prompts import load_prompts

    config = load_config([str(TOYS / f"{problem}.yaml"), f"run.dir={folder}", *words])
    prompts = load_prompts(config.prompts.train, "prompts.train")
    if rows:
        prompts = [Row(i, prompts[0].prompt) for i in range(rows)]
    folder.mkdir(exist_ok=True)
    torch.manual_seed(config.run.seed)
    return make_trainer(config, prompts)


def gradients(trainer: Trainer, epochs: int) -> torch.Tensor:
    """The gradient of each epoch's loss in the trained table, (epochs, ...), the weights held still."""
    (table,) = trainer.learner.weights
    found = []
    trainer.learner.optimizer.step = lambda: found.append(table.grad.clone())
    for epoch in range(epochs):
        examples = trainer.examples(trainer.collect(epoch, Clock()), epoch)
        count = examples.count
        trainer.learner.step(examples, range(count), torch.arange(count), torch.Generator())
    return torch.stack(found).double()


def chain_of(trainer: Trainer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sampler, schedule = trainer.policy.sampler, trainer.policy.model.schedule
    assert sampler.affine is not None
    return reference.gaussian_chain(sampler, schedule.alpha(sampler.times), schedule.sigma(sampler.times), 1.0, 0.49)


def exact_gradient(
    trainer: Trainer, reward: tuple[float, float], kappa: float, exploration: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """Of E r - kappa KL in the table of the affine correction, (2, K), by the moments of the chain.

    `exploration` (K,) is the variance that the noise of the actions adds to each step.
    """
    (a, c, S), sampler, (b, Q) = chain_of(trainer), trainer.policy.sampler, reward
    added = torch.as_tensor(exploration).expand(len(a))
    # the table runs from the data to the noise; its first knot, at the final time, is never used
    table = trainer.learner.weights[0].detach().double()[:, 0, 1:, 0].flip(1).requires_grad_()
    m, v, kl = torch.zeros((), dtype=torch.float64), trainer.policy.model.schedule.prior_std**2, 0.0
    for k in range(len(a)):
        dg, do = sampler.B[k] * table[0, k], sampler.B[k] * table[1, k]
        if S[k] > 0:
            kl = kl + (dg**2 * (v + m**2) + 2 * dg * do * m + do**2) / (2 * S[k] ** 2)
        gain = a[k] + dg
        m, v = gain * m + c[k] + do, gain**2 * v + S[k] ** 2 + added[k]
    objective = b * m - Q * (m**2 + v) / 2 - kappa * kl
    (gradient,) = torch.autograd.grad(objective, table)
    return gradient


def small(steps: int, *words: str) -> list[str]:
    return [f"sampler.steps={steps}", f"model.knots={steps}", *words]


GROUPS = [
    "train.max_grad_norm=1e9",
    "train.prompts_per_epoch=500",
    "train.images_per_prompt=8",
    "train.rollout_batch=4000",
    "train.loss_batch=32000",
]


def z_scores(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Of minus the estimates (epochs, 2, 1, K + 1, 1) against the expected gradient (2, K)."""
    estimates = -found[:, :, 0, 1:, 0].flip(2)
    return (estimates.mean(0) - expected) / (estimates.std(0) / len(estimates) ** 0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "loo", "factor"),
    [("reinforce", False, 7 / 8), ("reinforce", True, 1.0), ("ddpo", True, 1.0), ("grpo", True, 1.0)],
)
def test_gradient_of_the_reward(name, loo, factor, tmp_path):
    """b Pi_k for a shift of step k, shrunk by 1 - 1 / K when an image is in its own baseline."""
    words = [
        "algorithm.kappa=0",
        "algorithm.normalise=false",
        f"algorithm.leave_one_out={loo}",
        "algorithm.advantage_clip=1e9",
    ]
    linear = ["rewards.quadratic.linear=[0.9]", "rewards.quadratic.curvature=[0]"]
    trainer = trainer_of("g1", tmp_path, f"algorithm.name={name}", *small(8, *words, *linear, *GROUPS), rows=500)
    expected = exact_gradient(trainer, (0.9, 0.0), 0.0)
    found = gradients(trainer, 12)
    assert z_scores(found, factor * expected).abs().max() < 5
    a, _, _ = chain_of(trainer)
    shift = torch.stack([0.9 * a[k + 1 :].prod() for k in range(8)])
    torch.testing.assert_close(expected[1], shift * trainer.policy.sampler.B, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reinforce", "ddpo", "dpok", "grpo"])
def test_gradient_with_the_kl(name, tmp_path):
    """Away from the pretrained model the gradient is that of E r - kappa KL; without the KL-to-go it is not."""
    reward = ["rewards.quadratic.linear=[2.0]", "rewards.quadratic.curvature=[2.0]"]
    words = [
        "algorithm.kappa=0.3",
        "algorithm.normalise=false",
        "algorithm.leave_one_out=true",
        "algorithm.advantage_clip=1e9",
    ]
    trainer = trainer_of("g1", tmp_path, f"algorithm.name={name}", *small(6, *words, *reward, *GROUPS), rows=500)
    with torch.no_grad():
        trainer.learner.weights[0].copy_(
            0.6 * torch.randn(trainer.learner.weights[0].shape, generator=torch.Generator().manual_seed(3))
        )
    expected = exact_gradient(trainer, (2.0, 2.0), 0.3)
    assert z_scores(gradients(trainer, 16), expected).abs().max() < 5
    if name == "dpok":
        trainer.algorithm.truncated = True
        assert z_scores(gradients(trainer, 16), expected).abs().max() > 8


@pytest.mark.slow
@pytest.mark.parametrize("memory", [1e9, 0.5])
def test_gradient_of_ctrl(memory, tmp_path):
    """With all of the return kept, the gradient is that of E r - kappa KL whatever the value network says."""
    reward = ["rewards.quadratic.linear=[2.0]", "rewards.quadratic.curvature=[2.0]"]
    words = ["algorithm.kappa=0.3", "algorithm.normalise=false", f"algorithm.memory={memory}"]
    words += ["algorithm.advantage_clip=1e9", "algorithm.exploration=0.5"]
    trainer = trainer_of("g1", tmp_path, "algorithm.name=ctrl", *small(6, *words, *reward, *GROUPS), rows=500)
    with torch.no_grad():
        trainer.learner.weights[0].copy_(
            0.4 * torch.randn(trainer.learner.weights[0].shape, generator=torch.Generator().manual_seed(3))
        )
    added = trainer.policy.sampler.B.square() * 0.5 / 2  # exploration / (2 g^2), with g = 1
    expected = exact_gradient(trainer, (2.0, 2.0), 0.3, added)
    z = z_scores(gradients(trainer, 16), expected).abs().max()
    assert z < 5 if memory == 1e9 else z > 8  # an untrained value network is no baseline to bootstrap from


@pytest.mark.slow
def test_gradient_of_the_log_variance(tmp_path):
    """Over the policy's own trajectories it is that of E r - kappa KL."""
    reward = ["rewards.quadratic.linear=[2.0]", "rewards.quadratic.curvature=[2.0]", "algorithm.kappa=0.3"]
    trainer = trainer_of("g1", tmp_path, "algorithm.name=log_variance", *small(6, *reward, *GROUPS), rows=500)
    with torch.no_grad():
        trainer.learner.weights[0].copy_(
            0.6 * torch.randn(trainer.learner.weights[0].shape, generator=torch.Generator().manual_seed(3))
        )
    expected = exact_gradient(trainer, (2.0, 2.0), 0.3)
    assert z_scores(gradients(trainer, 16), expected).abs().max() < 5


@pytest.mark.slow
def test_d3po_begins_with_the_gradient_of_the_reward(tmp_path):
    """At the pretrained model, for small rewards: (p - 1/2) = (r - r') / 4, so it is kappa / 2 of that of E r."""
    linear = ["rewards.quadratic.linear=[0.2]", "rewards.quadratic.curvature=[0]", "algorithm.kappa=0.7"]
    trainer = trainer_of("g1", tmp_path, "algorithm.name=d3po", *small(8, *linear, *GROUPS), rows=500)
    expected = 0.35 * exact_gradient(trainer, (0.2, 0.0), 0.0)
    found = gradients(trainer, 12)
    assert z_scores(found, expected).abs().max() < 5
    assert z_scores(found, 1.2 * expected).abs().max() > 8


BOWL = ["rewards.quadratic.linear=[2.0]", "rewards.quadratic.curvature=[2.0]", "algorithm.kappa=0.3"]


def displaced(name: str, folder: Path, *words: str) -> Trainer:
    """A trainer of six steps on G1, away from the pretrained model."""
    trainer = trainer_of("g1", folder, f"algorithm.name={name}", *small(6, *words, *GROUPS), rows=500)
    with torch.no_grad():
        trainer.learner.weights[0].copy_(
            0.6 * torch.randn(trainer.learner.weights[0].shape, generator=torch.Generator().manual_seed(3))
        )
    return trainer


@pytest.mark.slow
def test_the_truncated_chain_of_draft_is_biased(tmp_path):
    """Back through all steps the gradient is exact; through the last three it is, for those, and 0 for the others."""
    trainer = displaced("draft", tmp_path, *BOWL)
    expected = exact_gradient(trainer, (2.0, 2.0), 0.3)
    assert z_scores(gradients(trainer, 12), expected).abs().max() < 5
    trainer.algorithm.last = 3
    found = gradients(trainer, 12)
    assert not found[:, :, 0, 4:].any()  # the table runs from the data to the noise
    assert z_scores(found, expected)[:, 3:].abs().max() < 5
    assert expected[:, :3].abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("balanced", [True, False])
def test_alignprop_sees_early_steps_less_often(balanced, tmp_path):
    """Step k of K is differentiated for (k + 1) / K of the images; weighed by as much more, the gradient is exact."""
    trainer = displaced("alignprop", tmp_path, *BOWL, f"algorithm.balance_steps={balanced}")
    share = 1.0 if balanced else torch.arange(1, 7) / 6
    assert z_scores(gradients(trainer, 10), share * exact_gradient(trainer, (2.0, 2.0), 0.3)).abs().max() < 5


def test_what_flowbp_makes_of_the_steps_that_follow(tmp_path):
    """In the exact gradient a shift goes on by the gains A - B / v of later steps; here by A - B / (sigma (alpha + sigma))."""
    linear = ["rewards.quadratic.linear=[0.9]", "rewards.quadratic.curvature=[0]", "algorithm.active=8"]
    trainer = trainer_of("g1", tmp_path, "algorithm.name=flowbp", *small(8, *linear), "train.max_grad_norm=1e9")
    (gain, _, _), sampler, schedule = chain_of(trainer), trainer.policy.sampler, trainer.policy.model.schedule
    alpha, sigma = schedule.alpha(sampler.times[:-1]), schedule.sigma(sampler.times[:-1])
    held = sampler.A - sampler.B / (sigma * (alpha + sigma))
    bias = torch.stack([(held[k + 1 :] / gain[k + 1 :]).prod() for k in range(8)])
    found = -gradients(trainer, 1)[0, 1, 0, 1:, 0].flip(0)
    torch.testing.assert_close(found, bias * exact_gradient(trainer, (0.9, 0.0), 0.0)[1], rtol=1e-4, atol=1e-6)
    assert (bias - 1).abs().max() > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["draft", "adjoint_matching"])
def test_reward_gradients_reach_riccatis_optimum(name, tmp_path):
    """docs/theory.md 14, 15 and 17, in 1500 steps of Adam with 512 images each, at a rate of .02 that falls to 0."""
    words = ["train.epochs=1500", "train.updates_per_epoch=1", "train.lr=2e-2", "algorithm.kappa=0.5"]
    trainer = trainer_of("g1", tmp_path, f"algorithm.name={name}", *small(12, *words))
    solved = solve(trainer.policy, trainer.rows, trainer.rewards, 0.5)
    trainer.fit()
    audits = solved.audit(trainer.policy)
    assert solved.optimum - audits[0].objective < 1e-5
    for found, best in zip(moments(solved, audits[0]), moments(solved, solved.cases[0].optimal), strict=True):
        assert found == pytest.approx(best, abs=0.005)


QUICK = ["train.updates_per_epoch=1", "train.images_per_prompt=256", "train.rollout_batch=256"]


@pytest.mark.slow
@pytest.mark.parametrize("balanced", [True, False])
def test_alignprop_reaches_riccatis_optimum(balanced, tmp_path):
    """Where each step has weights of its own, how often it is differentiated does not change where they settle."""
    words = [*QUICK, "train.epochs=60", "train.lr=1e-1", "algorithm.kappa=0.5"]
    words += [f"algorithm.balance_steps={balanced}"]
    trainer = trainer_of("g1", tmp_path, "algorithm.name=alignprop", *small(12, *words))
    solved = solve(trainer.policy, trainer.rows, trainer.rewards, 0.5)
    trainer.fit()
    assert 0.995 < solved.gap_closed(solved.audit(trainer.policy)) <= 1 + 1e-4


@pytest.mark.slow
def test_what_draft_loses_by_its_last_steps_alone(tmp_path):
    """Riccati's means in the last four steps, the pretrained ones before: that is what can be had without the others."""
    words = [*QUICK, "train.epochs=100", "train.lr=5e-2", "algorithm.kappa=0.5", "algorithm.last=4"]
    trainer = trainer_of("g1", tmp_path, "algorithm.name=draft", *small(12, *words))
    solved = solve(trainer.policy, trainer.rows, trainer.rewards, 0.5)
    chain, start = chain_of(trainer), (0.0, trainer.policy.model.schedule.prior_std**2)
    best = reference.riccati(chain, (0.9, 0.6, 0.0), 0.5, start)
    case, x, line = solved.cases[0], solved.line.x, solved.line
    means = torch.stack([case.base[k] if k < 8 else best.gain[k] * x + best.offset[k] for k in range(12)])
    partly = oracle.audit(line, means, case.base, solved.std, solved.start, case.reward, 0.5).objective
    trainer.fit()
    reached = solved.audit(trainer.policy)[0].objective
    assert reached == pytest.approx(partly, abs=5e-5)
    assert solved.optimum - reached > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["draft_lv", "flowbp"])
def test_without_a_kl_reward_gradients_end_at_the_rewards_peak(name, tmp_path):
    """E r is at most that of means that are all 1.5, where r is highest; what noise the last step adds is lost."""
    words = [*QUICK, "train.epochs=100", "train.lr=1e-1"]
    trainer = trainer_of("g1", tmp_path, f"algorithm.name={name}", *small(12, *words))
    solved = solve(trainer.policy, trainer.rows, trainer.rewards, 0.5)
    trainer.fit()
    highest = 0.675 - 0.3 * trainer.policy.sampler.S[-1].item() ** 2
    assert highest - 5e-3 < solved.audit(trainer.policy)[0].reward < highest + 1e-4
    assert solved.cases[0].pretrained.reward < highest - 0.1


@pytest.mark.slow
def test_refl_denoises_to_the_rewards_peak(tmp_path):
    """Whatever the state, at the steps that it trains: no distribution is left, and the others are as they were."""
    words = [*QUICK, "train.epochs=100", "train.lr=1e-1", "algorithm.last=3"]
    trainer = trainer_of("g1", tmp_path, "algorithm.name=refl", *small(12, *words))
    trainer.fit()
    x, condition = torch.tensor([[-0.5], [0.5], [1.5]]), torch.zeros(3, dtype=torch.long)
    with torch.no_grad():
        for k in range(12):
            denoised = trainer.policy.transition(x, torch.full((3,), k), condition).denoised
            with trainer.policy.model.reference():
                before = trainer.policy.transition(x, torch.full((3,), k), condition).denoised
            if k < 9:
                torch.testing.assert_close(denoised, before)
            else:
                torch.testing.assert_close(denoised, torch.full((3, 1), 1.5), rtol=0, atol=0.02)


def test_the_lean_adjoint_asks_for_the_optimum_of_the_optimal_policy(tmp_path):
    """E[mean_pre - S^2 y_{k+1} | x_k] is Riccati's mean, where the policy is his already (docs/theory.md 15)."""
    words = ["algorithm.kappa=0.5", "train.images_per_prompt=20000", "train.rollout_batch=20000"]
    trainer = trainer_of("g1", tmp_path, "algorithm.name=adjoint_matching", *small(12, *words))
    best = reference.riccati(chain_of(trainer), (0.9, 0.6, 0.0), 0.5, (0.0, 1.0))
    a, c, _ = chain_of(trainer)
    B, (table,) = trainer.policy.sampler.B, trainer.learner.weights
    with torch.no_grad():
        table[0, 0, 1:, 0] = ((best.gain - a) / B).flip(0)
        table[1, 0, 1:, 0] = ((best.offset - c) / B).flip(0)
    examples = trainer.examples(trainer.collect(0, Clock()), 0)
    for k in range(12):
        x, target = examples.x[k].double(), examples.mean[k].double()
        design = torch.cat([x, torch.ones_like(x)], 1)
        fit = torch.linalg.lstsq(design, target).solution[:, 0]
        error = (target - design @ fit[:, None]).std() * torch.linalg.inv(design.T @ design).diagonal().sqrt()
        expected = torch.stack([best.gain[k], best.offset[k]])
        assert ((fit - expected).abs() < 5 * error + 1e-4).all(), (k, fit, expected, error)
        assert ((torch.stack([a[k], c[k]]) - expected).abs() > 5 * error + 1e-4).any(), k


def moments(solved: Problem, audit: oracle.Audit) -> tuple[float, float]:
    """Mean and variance of the samples."""
    masses, x = audit.masses / audit.masses.sum(), solved.line.x
    mean = (masses * x).sum()
    return mean.item(), (masses * (x - mean).square()).sum().item()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reinforce", "ddpo", "grpo"])
def test_without_a_kl_the_reward_and_the_kl_keep_growing(name, tmp_path):
    """docs/theory.md 8: there is no fixed point."""
    words = ["algorithm.kappa=0", "rewards.quadratic.curvature=[0]", "train.epochs=15", "train.lr=2e-2"]
    trainer = trainer_of("g1", tmp_path, f"algorithm.name={name}", *small(12, *words, "train.lr_decay=none"))
    solved = solve(trainer.policy, trainer.rows, trainer.rewards, 0.5, reach=14.0)
    found = [solved.audit(trainer.policy)[0]]
    for stop in (5, 10, 15):
        for epoch in range(stop - 5, stop):
            trainer.run_epoch(epoch)
        found.append(solved.audit(trainer.policy)[0])
    for before, after in itertools.pairwise(found):
        assert after.reward > 1.05 * before.reward
        assert after.kl > 1.5 * before.kl


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY)
def test_every_algorithm_closes_the_gap(name, tmp_path):
    words = ["train.epochs=150", "train.images_per_prompt=256", "train.rollout_batch=256", "train.lr=3e-2"]
    words += ["algorithm.kappa=0.5"]
    words += ["algorithm.clip_range=0.2"] if name == "grpo" else []  # its own is for thousands of dimensions
    trainer = trainer_of("g1", tmp_path, f"algorithm.name={name}", *small(12, *words))
    solved = solve(trainer.policy, trainer.rows, trainer.rewards, 0.5)
    assert solved.gap_closed(solved.audit(trainer.policy)) == pytest.approx(0, abs=1e-6)
    trainer.fit()
    audits = solved.audit(trainer.policy)
    assert solved.gap_closed(audits) > 0.97
    assert solved.gap_closed(audits) <= 1 + 1e-4
    assert audits[0].kl > 0.01


@pytest.mark.slow
def test_riccati_is_where_they_go(tmp_path):
    words = ["train.epochs=300", "train.lr=3e-2", "algorithm.name=dpok"]
    trainer = trainer_of("g1", tmp_path, *small(12, *words))
    trainer.fit()
    found = reference.riccati(
        chain_of(trainer), (0.9, 0.6, 0.0), 0.5, (0.0, trainer.policy.model.schedule.prior_std**2)
    )
    x = torch.tensor([[-0.5], [0.5], [1.5]])
    with torch.no_grad():
        for k in range(12):
            means = trainer.policy.transition(x, torch.full((3,), k), torch.zeros(3, dtype=torch.long)).mean
            torch.testing.assert_close(means.double(), found.gain[k] * x.double() + found.offset[k], atol=0.06, rtol=0)


@pytest.mark.slow
def test_ctrl_on_an_ode_finds_the_deterministic_optimum(tmp_path):
    """With eta = 0 the action's noise is the only randomness; the best mean is Riccati's with S^2 = B^2 / (g^2 D)."""
    words = ["algorithm.name=ctrl", "algorithm.kappa=0.5", "sampler.eta=0", "train.epochs=300", "train.lr=3e-2"]
    trainer = trainer_of("g1", tmp_path, *small(12, *words))
    trainer.fit()
    a, c, _ = chain_of(trainer)
    sampler, g2 = trainer.policy.sampler, trainer.policy.model.schedule.g2(trainer.policy.sampler.times[:-1])
    stand_in = sampler.B / (g2 * -sampler.times.diff()).sqrt()
    found = reference.riccati((a, c, stand_in), (0.9, 0.6, 0.0), 0.5, (0.0, 1.0))
    gaps = []
    x = torch.tensor([[0.2], [1.2]])
    with torch.no_grad():
        for k in range(12):
            place = x, torch.full((2,), k), torch.zeros(2, dtype=torch.long)
            means = trainer.policy.transition(*place).mean.double()
            best = found.gain[k] * x.double() + found.offset[k]
            base = a[k] * x.double() + c[k]
            gaps.append(((means - best).square().sum().item(), (base - best).square().sum().item()))
    ours, idle = map(sum, zip(*gaps, strict=True))
    assert ours < 0.1 * idle


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["algorithm.kappa=-1"], "kappa: must be at least 0"),
        (["algorithm.name=ctrl", "sampler.name=heun"], "ctrl needs a sampler whose steps are affine in the score"),
        (["algorithm.name=reinforce", "train.inner_epochs=2"], "reinforce has no importance weights"),
        (["sampler.name=dpm_solver_pp", "sampler.eta=1"], "dpm_solver_pp remembers earlier steps"),
        (["algorithm.clip_range=-1"], "clip_range: must be positive"),
        (["algorithm.advantage_clip=0"], "advantage_clip: must be positive"),
        (["evaluate.sampler.steps=0"], "must be between 1 and 1000|at least 1"),
        (["algorithm.name=ctrl", "algorithm.exploration=0"], "exploration: must be positive"),
        (["algorithm.name=reinforce", "sampler.eta=0"], "reinforce needs steps with noise"),
        (["algorithm.name=ddpo", "algorithm.kappa=1", "algorithm.advantage=prompt"], "kappa needs advantage=group"),
        (["algorithm.name=draft", "algorithm.last=0"], "last: must be at least 1"),
        (["algorithm.name=draft", "algorithm.kappa=1", "sampler.eta=0"], "draft needs steps with noise"),
        (["algorithm.name=draft", "sampler.name=dpm_solver_pp"], "dpm_solver_pp remembers earlier steps"),
        (["algorithm.name=alignprop", "algorithm.shortest=0"], "shortest: must be at least 1"),
        (
            ["algorithm.name=alignprop", "algorithm.shortest=3", "algorithm.longest=2"],
            "longest: must be at least 3, got 2",
        ),
        (["algorithm.name=alignprop", "algorithm.kappa=1", "sampler.eta=0"], "alignprop needs steps with noise"),
        (["algorithm.name=alignprop", "train.inner_epochs=2"], "alignprop has no importance weights"),
        (["algorithm.name=draft_lv", "algorithm.draws=0"], "draws: must be positive"),
        (["algorithm.name=refl", "algorithm.last=0"], "last: must be at least 1"),
        (["algorithm.name=refl", "algorithm.kappa=0.1"], "kappa: there is no such key"),
        (["algorithm.name=flowbp", "algorithm.active=0"], "active: must be positive"),
        (["algorithm.name=flowbp", "sampler.name=heun"], "flowbp needs a sampler whose steps are affine in the score"),
        (["algorithm.name=adjoint_matching", "algorithm.kappa=0"], "algorithm.kappa: must be positive, got 0"),
        (
            ["algorithm.name=draft", "rewards.jpeg_compressibility.weight=1"],
            "draft differentiates the reward, and jpeg_compressibility has no gradient",
        ),
    ],
)
def test_combinations_that_cannot_work(words, message):
    with pytest.raises(UsageError, match=message):
        check_combination(load_config([str(TOYS / "g1.yaml"), *words]))


@pytest.mark.slow
def test_monte_carlo_value_is_the_dynamic_programs(tmp_path):
    """Of the unrestricted optimum: kappa log E exp(r / kappa), by quadrature through the base chain."""
    trainer = trainer_of("m1", tmp_path, "sampler.steps=16")
    policy, generator = trainer.policy, torch.Generator().manual_seed(0)
    line = oracle.Line(-9, 9, 1500)
    solved = solve(policy, trainer.rows, trainer.rewards, 0.5, cells=1500)
    values = solved.cases[0].reward / 0.5
    z, w = oracle.hermite(40)
    for k in reversed(range(6, 16)):
        points = solved.cases[0].base[k][:, None] + solved.std[k] * z
        values = (line.interpolate(values, points) + w.log()).logsumexp(1)
    for x in (-1.0, 0.3, 1.2):
        found = monte_carlo_value(
            policy, Place(torch.tensor([[x]]), 6, None), trainer.rows[0], trainer.rewards, 0.5, 20_000, generator
        )
        exact = 0.5 * line.interpolate(values, torch.tensor([x], dtype=torch.float64)).item()
        assert abs(found.value - exact) < 4 * found.error + 1e-3
        assert found.error < 0.05


def test_path_kl_is_the_exact_one_on_average(tmp_path):
    trainer = trainer_of("g1", tmp_path, "train.images_per_prompt=8000", "train.rollout_batch=8000", *small(10))
    with torch.no_grad():
        trainer.learner.weights[0].normal_(0, 0.4, generator=torch.Generator().manual_seed(1))
    solved = solve(trainer.policy, trainer.rows, trainer.rewards, 0.5)
    base = path_kl(trainer.policy, trainer.collect(0, Clock()).rollout, 8000)
    kl = base.kl.sum(0)
    exact = solved.audit(trainer.policy)[0].kl
    assert abs(kl.mean().item() - exact) < 4 * kl.std().item() / 8000**0.5 + 1e-4
    assert exact > 0.1
    torch.testing.assert_close(base.to_go[0] + base.kl[0], kl)


@condrl.reward
def brightness_of_test(samples, prompts):
    return samples.mean((1, 2, 3))


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    return sd3_pipeline(tmp_path_factory.mktemp("sd3"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in ALGORITHMS if n not in ("diffusion_dpo", "q_learning")])
@pytest.mark.parametrize("family", ["stable_diffusion", "sd3"])
def test_every_algorithm_tunes_images(family, name, pipeline, flow, tmp_path):
    """Of a U-Net and of a rectified flow, which starts where there is no signal."""
    (tmp_path / "prompts.txt").write_text("a red star\na blue circle\n")
    words = [f"model.name={family}", f"model.path={pipeline if family == 'stable_diffusion' else flow}"]
    words += ["model.lora_rank=2", "model.guidance=1", f"prompts.train={tmp_path}/prompts.txt"]
    words += ["rewards.brightness_of_test.weight=1", f"algorithm.name={name}", f"run.dir={tmp_path}"]
    words += ["train.prompts_per_epoch=2", "train.images_per_prompt=4", "train.rollout_batch=8", "train.epochs=2"]
    if name not in ("nft", *WITHOUT_KAPPA):
        words += ["algorithm.kappa=0.01"]
    if family == "sd3":
        words += ["sampler.eta=1", "model.height=24", "model.width=16"]
        words += ["algorithm.exploration=null"] if name == "ctrl" else []
    config = load_config([*words, "sampler.steps=3", "train.loss_batch=8", "train.lr=1e-2"])
    trainer = make_trainer(config, [Row(0, "a red star"), Row(1, "a blue circle")])
    before = [p.detach().clone() for p in trainer.learner.weights]
    trainer.fit()
    moved = [
        p for p, q in zip(trainer.learner.weights, before, strict=True) if not q.any() and p.any()
    ]  # lora_B starts at 0
    assert moved
    assert all(p.isfinite().all() for p in trainer.learner.weights)


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.6, 1.0])
def test_the_path_kl_bounds_the_terminal_one(eta, tmp_path):
    """docs/theory.md 5; for the best policy of a memoryless chain the two are equal."""
    trainer = trainer_of("m1", tmp_path, f"sampler.steps={300 if eta == 1 else 60}", f"sampler.eta={eta}")
    solved = solve(trainer.policy, trainer.rows, trainer.rewards, 0.5)
    (case,) = solved.cases
    terminal = oracle.kl_of_masses(case.optimal.masses, case.pretrained.masses)
    assert terminal <= case.optimal.kl + 1e-6
    assert terminal > 0.1
    if eta == 1:
        assert case.optimal.kl == pytest.approx(terminal, rel=0.025)
        assert solved.optimum == pytest.approx(
            0.5
            * oracle.tilted_masses(solved.line, case.pretrained.masses.clamp(min=1e-300).log(), case.reward, 0.5)[1],
            abs=0.02,
        )
    for module in trainer.policy.model.module.parameters():
        with torch.no_grad():
            module.add_(0.05 * torch.randn(module.shape, generator=torch.Generator().manual_seed(0)))
    (audit,) = solved.audit(trainer.policy)
    assert 0.001 < oracle.kl_of_masses(audit.masses, case.pretrained.masses) <= audit.kl


@pytest.mark.slow
def test_clipping_without_the_min_misses_the_optimum(tmp_path, monkeypatch):
    """docs/theory.md 8: without the min a ratio that has gone the wrong way loses its gradient too."""
    import condrl.algorithms.policy_gradient as module

    words = ["algorithm.kappa=0.5", "algorithm.clip_range=0.02", "train.epochs=40", "train.inner_epochs=8"]
    words += [
        "train.updates_per_epoch=4",
        "train.lr=1e-1",
        "train.lr_decay=none",
        "train.images_per_prompt=256",
        "train.rollout_batch=256",
    ]

    def wrong(log_ratio, advantage, bound):
        ratio = log_ratio.float().exp()
        return -ratio.clamp(1 - bound, 1 + bound) * advantage, {}

    gaps = []
    for name, clip in (("right", module.clipped), ("wrong", wrong)):
        monkeypatch.setattr(module, "clipped", clip)
        trainer = trainer_of("g1", tmp_path / name, *small(12, *words))
        solved = solve(trainer.policy, trainer.rows, trainer.rewards, 0.5)
        trainer.fit()
        gaps.append(solved.gap_closed(solved.audit(trainer.policy)))
    assert gaps[0] > 0.9, gaps
    assert gaps[1] < gaps[0] - 0.1, gaps


def test_a_group_without_spread_weighs_nothing():
    from condrl.algorithms.credit import group_scale

    rewards, groups = torch.tensor([1.0, 1.0, 1.0, 0.0, 2.0]), torch.tensor([0, 0, 0, 1, 1])
    torch.testing.assert_close(group_scale(rewards, groups), torch.tensor([0, 0, 0, 1 / 1.0001, 1 / 1.0001]))


def test_nft_noises_over_the_whole_of_the_schedules_time(tmp_path):
    trainer = trainer_of("m1", tmp_path, "algorithm.name=nft", "algorithm.draws=4")
    draws = trainer.examples(trainer.collect(0, Clock()), 0)
    assert draws.t.max() > 0.9 * 6
    assert draws.t.min() < 0.2 * 6
    first = draws.t[0]  # the first of four strata of [.1, .97]
    assert 0.1 * 6 <= first.min() <= first.max() <= (0.1 + 0.87 / 4) * 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "words", "keys"),
    [
        (
            "exact",
            ["--problems", "g1", "--algorithms", "ctrl"],
            {"algorithm", "problem", "seed", "gap_closed", "kl_to_optimum", "reward_queries", "seconds"},
        ),
        ("steps", ["--algorithms", "ddpo"], {"algorithm", "steps", "deployed_steps", "gap_closed"}),
    ],
)
def test_toy_benchmarks_write_rows(what, words, keys, tmp_path, monkeypatch, capsys):
    import json
    import sys

    small = ["train.epochs=1", "train.images_per_prompt=64", "train.rollout_batch=64"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", what, *words, "--json", str(tmp_path / "rows.json"), *small])
    load_script("benchmark").main()
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows
    assert all(keys <= set(row) for row in rows)
    printed = capsys.readouterr().out.splitlines()
    assert len([line for line in printed if "gap closed" in line and not line.startswith("|")]) == len(rows)
