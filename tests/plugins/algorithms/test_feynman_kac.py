"""feynman_kac against Feynman-Kac: what its loss is least at, what it learns from, and exact values on the line."""

import pytest
import torch
from chains import SHAPES, an_epoch, at, move, step_of, trainer_of
from helpers import ROOT, toy_words
from torch.distributions import kl_divergence

from condrl import RunError, UsageError
from condrl.loading import load_config
from condrl.plugins.steering.value import Controlled
from condrl.prompts import load_prompts
from condrl.toys import oracle
from condrl.toys.exact import solve
from condrl.training.build import make_trainer
from condrl.training.checks import check_combination
from condrl.training.clock import Clock

OWN = {"name": "feynman_kac", "kappa": 0.4}


def trained(folder, toy, *words):
    """A run on a toy, its exact answers, and the exact log E[exp(r / kappa) | mean] of each row's steps, (K, n)."""
    file = str(ROOT / "configs" / "toy" / f"{toy}.yaml")
    config = load_config([file, "algorithm.name=feynman_kac", "algorithm.kappa=0.5", f"run.dir={folder}", *words])
    config.folder.mkdir(parents=True)
    torch.manual_seed(0)
    trainer = make_trainer(config, load_prompts(config.prompts.train, "prompts.train"))
    solved = solve(trainer.policy, trainer.rows, trainer.rewards, 0.5)
    return trainer, solved, [step_values(solved, case) for case in solved.cases]


def step_values(solved, case):
    """log E[exp(r(x_K) / kappa) | m] for a step's mean m at the centres of the line, by quadrature, (K, n)."""
    line, (z, w), value, found = solved.line, oracle.hermite(60), case.reward / solved.kappa, []
    for base, std in zip(case.base.flip(0), solved.std.flip(0), strict=True):
        ahead = (w.log() + line.interpolate(value, line.x[:, None] + std * z)).logsumexp(1)
        value = line.interpolate(ahead, base)
        found.append(ahead)
    return torch.stack(found[::-1])


class Exact:
    """What a StepValue should be: the exact values of each row."""

    def __init__(self, line, values):
        slopes = [(v[:, 2:] - v[:, :-2]) / (2 * line.width) for v in values]
        self.line, self.slopes = line, [torch.nn.functional.pad(s, (1, 1)) for s in slopes]

    def control(self, mean, k, features):
        slope = self.slopes[features[0].argmax()][k[0]]
        return self.line.interpolate(slope, mean[:, 0].double())[:, None]


# ---------------------------------------------------------------------------------------------- the control


@pytest.mark.parametrize(
    ("toy", "least"), [("g1", 0.9999), ("m1", 0.997), pytest.param("p1", 0.999, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("sampler", ["euler_maruyama", "ddim"])
def test_the_exact_value_leads_to_the_optimum(toy, least, sampler, tmp_path):
    """By m + S^2 grad V(m), V of the step's mean; with the value of the state after it, G1 stays at .961."""
    trainer, solved, values = trained(tmp_path / "run", toy, f"sampler.name={sampler}")
    found = solved.gap_closed(solved.audit(Controlled(trainer.policy, Exact(solved.line, values))))
    assert least < found <= 1 + 1e-4
    none = solved.audit(Controlled(trainer.policy, Exact(solved.line, values), strength=0.0))
    assert solved.gap_closed(none) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_control_is_the_gradient_of_the_value(shape, tmp_path):
    """By differences, at every step and for both prompts."""
    value = trainer_of(tmp_path, shape, algorithm=OWN).algorithm.value.double()
    generator = torch.Generator().manual_seed(0)
    mean, along = (torch.randn(10, *shape, generator=generator, dtype=torch.float64) for _ in range(2))
    k, features = torch.arange(5).repeat(2), torch.eye(2, dtype=torch.float64).repeat_interleave(5, 0)
    with torch.no_grad():
        slope = (value(mean + 1e-4 * along, k, features) - value(mean - 1e-4 * along, k, features)) / 2e-4
    control = value.control(mean, k, features)
    torch.testing.assert_close((control * along).flatten(1).sum(1), slope, rtol=1e-5, atol=1e-9)
    assert slope.unique().numel() == 10  # every step and prompt has its own
    assert all(p.grad is None for p in value.parameters())


# ---------------------------------------------------------------------------------------------- the loss


def test_the_value_is_right_where_its_loss_is_least(tmp_path):
    """At log of the mean weight, and nowhere else, for small weights and for large ones."""
    trainer = trainer_of(tmp_path, algorithm=OWN)
    _, _, batch = an_epoch(trainer)
    value = trainer.algorithm.value
    for middle in (-3.0, 0.0, 6.0):
        log_weight = middle + 2 * torch.linspace(-1, 1, batch.count, dtype=torch.float64)
        object.__setattr__(batch, "log_weight", log_weight)
        best = log_weight.exp().mean().log().item()
        slopes = []
        for shift in (-0.05, 0.0, 0.05):
            with torch.no_grad():
                value.last.weight.zero_()
                value.last.bias.fill_(best + shift)
            loss = trainer.algorithm.own_loss("value", trainer.policy, batch).mean()
            slopes.append(torch.autograd.grad(loss, value.last.bias)[0].item())
        below, zero, above = slopes
        assert below < -1e-3
        assert above > 1e-3
        assert abs(zero) < 1e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_learns_from_the_pretrained_model_alone(shape, tmp_path):
    """The states, the means of their steps and rewards against the prompt's others', wherever the policy has gone."""
    found = []
    for name, size in (("base", 0.0), ("moved", 0.3)):
        trainer = trainer_of(tmp_path / name, shape, algorithm=OWN, train={"rollout_batch": 5})
        move(trainer, size)
        experience, examples, _ = an_epoch(trainer)
        found.append(examples)
    base, moved = found
    torch.testing.assert_close(moved.x, base.x, rtol=0, atol=0)
    torch.testing.assert_close(moved.mean, base.mean, rtol=0, atol=0)
    for k in range(5):
        score = trainer.policy.model.base(moved.x[k], at(trainer, k, 16), moved.condition)
        torch.testing.assert_close(moved.mean[k], step_of(trainer, k, moved.x[k], score).mean, rtol=1e-5, atol=1e-6)
    r, rows = experience.scores.total, [row.index for row in experience.rows]
    others = [r[[j for j in range(16) if rows[j] == rows[i] and j != i]].mean() for i in range(16)]
    torch.testing.assert_close(moved.log_weight, (r - torch.stack(others)) / 0.4, rtol=1e-4, atol=1e-5)
    shares = torch.cat([(r[i : i + 8] / 0.4).softmax(0) * 8 for i in (0, 8)])
    assert moved.metrics["effective_share"].item() == pytest.approx(1 / shares.square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_lora_is_taught_the_controlled_step(shape, tmp_path):
    """Its loss beside the value's is KL(policy's step || controlled step), which is 0 once it takes that step."""
    trainer = trainer_of(tmp_path, shape, algorithm=OWN)
    move(trainer)
    _, _, batch = an_epoch(trainer)
    policy, value = trainer.policy, trainer.algorithm.value
    with torch.no_grad():
        value.last.weight.mul_(20)
    extra = trainer.algorithm.loss(policy, batch)[0] - trainer.algorithm.own_loss("value", policy, batch)
    control = value.control(batch.mean, batch.k, policy.model.features(batch.condition))
    for k in range(5):
        rows = batch.k == k
        x, std = batch.x[rows], trainer.policy.sampler.S[k].float()
        own = step_of(trainer, k, x, policy.model.score(x, at(trainer, k, 16), batch.condition[rows]))
        aim = type(own)(type(own.base_dist)(batch.mean[rows] + std**2 * control[rows], std.expand_as(x)), len(shape))
        torch.testing.assert_close(extra[rows], kl_divergence(own, aim), rtol=1e-3, atol=1e-4)
    gradients = torch.autograd.grad(extra.sum(), list(value.parameters()), allow_unused=True)
    assert all(g is None or not g.any() for g in gradients)  # the value is not bent towards the policy


@pytest.mark.parametrize("word", ["train.patience=2", "train.ema=0.5", "prompts.validation=asset:toy/p1.jsonl"])
def test_nothing_is_chosen_among_policies_that_are_the_same(word, tmp_path):
    words = [*toy_words("feynman_kac", tmp_path), "evaluate.every=1", "prompts.validation=asset:toy/p1.jsonl", word]
    words += [] if "validation" in word or "patience" in word else ["prompts.validation=null"]
    with pytest.raises(UsageError, match=f"{word.split('=')[0]}: has no effect.*leaves the policy as it is"):
        check_combination(load_config([*words, "algorithm.distil=false"]))
    check_combination(load_config(words))


def test_without_distillation_the_policy_stays_and_is_not_called(tmp_path):
    trainer = trainer_of(tmp_path, algorithm={**OWN, "distil": False}, train={"epochs": 2})
    calls = []
    score = trainer.policy.model.score
    trainer.policy.model.score = lambda x, t, c: calls.append(len(x)) or score(x, t, c)
    before = torch.cat([p.detach().flatten().clone() for p in trainer.algorithm.value.parameters()])
    line = trainer.run_epoch(0)
    assert sum(calls) == 5 * 16  # the roll-out's
    assert all(not weight.any() for weight in trainer.learner.weights)
    assert "grad_norm" not in line  # nothing that a diagnosis could take for a fault
    after = torch.cat([p.detach().flatten() for p in trainer.algorithm.value.parameters()])
    assert (after - before).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
@pytest.mark.parametrize(("toy", "images", "least"), [("g1", 512, 0.96), ("m1", 512, 0.97), ("p1", 768, 0.95)])
def test_it_closes_the_gap_by_its_value_and_by_its_lora(toy, images, least, tmp_path):
    words = [f"train.images_per_prompt={images}", "train.rollout_batch=4096", "train.updates_per_epoch=16"]
    words += ["train.epochs=40", "algorithm.value_steps=2", "sampler.steps=12", "model.knots=12", "train.lr=1e-2"]
    trainer, solved, values = trained(tmp_path / "run", toy, *words)
    trainer.fit()
    with trainer.policy.model.reference():
        steered = solved.audit(Controlled(trainer.policy, trainer.algorithm.value))
    assert least < solved.gap_closed(steered) <= 1 + 1e-4
    assert least < solved.gap_closed(solved.audit(trainer.policy)) <= 1 + 1e-4
    for number, (case, exact) in enumerate(zip(solved.cases, values, strict=True)):
        errors = value_errors(trainer, solved, case, exact, number)
        assert errors.max() < 0.1, (toy, number, errors)


@torch.no_grad()
def value_errors(trainer, solved, case, exact, number):
    """The share of the variance of the exact value that the learned one leaves, at the last third of the steps, (n,)."""
    line, masses, found = solved.line, solved.start, []
    features = trainer.policy.model.features(torch.full((line.cells,), number))
    for k, (base, std) in enumerate(zip(case.base, solved.std.tolist(), strict=True)):
        own = trainer.algorithm.value(base.float()[:, None], torch.full((line.cells,), k), features).double()
        true = line.interpolate(exact[k], base)
        found.append(variance(masses, own - true) / variance(masses, true))
        masses = line.push(masses, base, std)
    return torch.stack(found[-len(found) // 3 :])


def variance(masses, values):
    return (masses * (values - (masses * values).sum()).square()).sum()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["algorithm.kappa=0"], "algorithm.kappa: must be positive"),
        (["algorithm.value_steps=0"], "algorithm.value_steps: must be at least 1"),
        (["sampler.eta=0"], "feynman_kac needs steps with noise"),
        (["sampler.name=dpm_solver_pp", "sampler.eta=1"], "dpm_solver_pp remembers earlier steps"),
        (["train.steps=[1,2]"], "train.steps: the algorithm feynman_kac learns the value of every step with noise"),
        (["train.window=2"], "train.window: the algorithm feynman_kac learns the value of every step with noise"),
        (["train.images_per_prompt=1", "train.updates_per_epoch=1"], "compares images of one prompt"),
    ],
)
def test_what_it_cannot_do_is_refused(words, message):
    file = str(ROOT / "configs" / "toy" / "g1.yaml")
    with pytest.raises(UsageError, match=message):
        check_combination(load_config([file, "algorithm.name=feynman_kac", "algorithm.kappa=0.5", *words]))


def test_a_kappa_that_leaves_no_number_to_learn_from_is_told(tmp_path):
    trainer = trainer_of(tmp_path, algorithm={**OWN, "kappa": 1e-3})
    with pytest.raises(RunError, match="kappa: 0.001 is too small to learn from"):
        trainer.examples(trainer.collect(0, Clock()), 0)
