"""What the loop does with `train`'s options, against a hand-written AdamW loop and plain counting."""

import json
import math

import pytest
import torch
from chains import SHAPES, SIDES, Recorded, Shaped, an_epoch, at, move, pulled, step_of, trainer_of
from torch.distributions import kl_divergence

import condrl
from condrl import RunError
from condrl.diffusion.schedule import OU
from condrl.prompts import Row
from condrl.training.clock import Clock


def by_hand(trainer, before, rates, epochs, clip, betas, decay, factor, extra=0, own=()):
    """The weights after AdamW steps on the recorded minibatches; `factor` is of the learning rate of update n.

    A network of the algorithm's has `own` settings, and takes `extra` steps after each.
    """
    algorithm, calls, update = trainer.algorithm, iter(trainer.algorithm.calls), 0
    groups = [[torch.nn.Parameter(p.clone()) for p in group] for group in before]
    optimizer = torch.optim.AdamW(
        [{"params": group, "lr": rate} for group, rate in zip(groups, rates, strict=True)],
        betas=betas,
        weight_decay=decay,
    )
    optimizer.param_groups[-1].update(own)
    train = trainer.config.train
    for epoch in range(epochs):
        table = torch.randn(algorithm.count, 16, generator=torch.Generator().manual_seed(epoch + 1))
        for _ in range(train.inner_epochs * train.updates_per_epoch):
            images, steps = map(torch.tensor, next(calls))
            drawn = len(steps) / len(images.unique())  # steps of an image
            weight = algorithm.count / drawn / len(images.unique())

            def pull(*parts, target=table[steps, images]):
                return sum((p.square().sum() / 2 - target * p.sum()).sum() for part in parts for p in part)

            optimizer.zero_grad()
            (pull(*groups) * weight).backward()
            torch.nn.utils.clip_grad_norm_(groups[0], clip)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor(update)
            optimizer.step()
            for _ in range(extra):
                optimizer.zero_grad()
                (pull(groups[1]) * weight).backward()
                optimizer.step()
            update += 1
    return groups


UPDATES = [
    {},
    {"betas": (0.5, 0.7)},
    {"betas": (0.0, 0.99)},
    {"weight_decay": 0.0},
    {"weight_decay": 0.5},
    {"max_grad_norm": 0.3},
    {"max_grad_norm": 40.0},
    {"lr": 0.3},
    {"warmup": 3},
    {"warmup": 5, "lr_decay": "linear"},
    {"lr_decay": "linear"},
    {"inner_epochs": 2},
    {"updates_per_epoch": 4},
    {"updates_per_epoch": 2, "inner_epochs": 3, "lr_decay": "linear"},
    {"steps_per_image": 2},
    {"steps_per_image": 1, "updates_per_epoch": 2},
    {"epochs": 1},
]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("options", UPDATES, ids=str)
def test_updates_are_those_of_a_loop_by_hand(options, own, tmp_path):
    """Clipping is of the policy's gradient alone; the decay and the moments are of every network."""
    train = {"lr": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.999), "max_grad_norm": 1e9, "epochs": 2, **options}
    trainer = trainer_of(tmp_path, own=Recorded(own=own), train=train)
    move(trainer, 0.5)
    groups = [trainer.learner.weights, *([list(trainer.algorithm.own.parameters())] if own else [])]
    before = [[p.detach().clone() for p in group] for group in groups]
    trainer.fit()
    total = len(trainer.algorithm.calls)
    assert total == train["epochs"] * train.get("inner_epochs", 1) * train.get("updates_per_epoch", 1)

    def factor(update):
        falling = 1 - update / total if train.get("lr_decay") == "linear" else 1.0
        return min(1.0, (update + 1) / max(1, train.get("warmup", 0))) * falling

    rates = [train["lr"], 0.07][: len(groups)]
    expected = by_hand(
        trainer, before, rates, train["epochs"], train["max_grad_norm"], train["betas"], train["weight_decay"], factor
    )
    for group, wanted in zip(groups, expected, strict=True):
        for p, q in zip(group, wanted, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_an_own_network_has_its_own_settings_and_extra_steps(tmp_path):
    """It takes them after each update of the policy, which they do not move."""
    own = {"betas": (0.3, 0.4), "weight_decay": 0.9}
    train = {"lr": 0.1, "weight_decay": 0.1, "epochs": 2, "updates_per_epoch": 2, "rollout_batch": 4}
    trainer = trainer_of(tmp_path, own=Recorded(own=True, extra_steps=3, **own), train=train)
    move(trainer, 0.5)
    groups = [trainer.learner.weights, list(trainer.algorithm.own.parameters())]
    before = [[p.detach().clone() for p in group] for group in groups]
    trainer.fit()
    train = trainer.config.train
    expected = by_hand(
        trainer, before, [0.1, 0.07], 2, train.max_grad_norm, train.betas, 0.1, lambda update: 1.0, 3, own
    )
    for group, wanted in zip(groups, expected, strict=True):
        for p, q in zip(group, wanted, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_an_extra_step_without_a_finite_gradient_is_left_out_alone(tmp_path):
    """It is neither made nor counted as an update of the policy's that was skipped."""
    trainer = trainer_of(tmp_path, own=Recorded(own=True, extra_steps=2), train={"epochs": 2, "max_bad_updates": 1})
    trainer.algorithm.own_loss = lambda name, policy, batch: sum(
        (p * float("nan")).sum() + 0 * batch.target for p in trainer.algorithm.own.parameters()
    )
    trainer.algorithm.loss = lambda policy, batch: (pulled(policy.model.module, batch.target), {})
    before = [p.detach().clone() for p in trainer.algorithm.own.parameters()]
    trainer.fit()
    assert trainer.learner.skipped == 0
    assert trainer.learner.updates == 2
    for p, q in zip(trainer.algorithm.own.parameters(), before, strict=True):
        assert torch.equal(p, q)


def test_the_gradients_norm_is_recorded_before_it_is_clipped(tmp_path):
    norms = []
    for most in (1e9, 0.01):
        trainer = trainer_of(tmp_path / str(most), own=Recorded(), train={"max_grad_norm": most})
        move(trainer, 0.5)
        before = [p.detach().clone() for p in trainer.learner.weights]
        trainer.fit()
        norms.append(json.loads((tmp_path / str(most) / "metrics.jsonl").read_text())["grad_norm"])
    pull = 4 * trainer.algorithm.table.mean()
    expected = torch.cat([(4 * p - pull).flatten() for p in before]).norm().item()
    assert norms == pytest.approx([expected, expected], rel=1e-4)


@pytest.mark.parametrize("updates", [1, 2, 4, 8])
def test_minibatches_have_as_many_images_of_each_prompt(updates, tmp_path):
    trainer = trainer_of(tmp_path, own=Recorded(), train={"updates_per_epoch": updates, "inner_epochs": 3, "epochs": 2})
    trainer.fit()
    calls = trainer.algorithm.calls
    assert len(calls) == 6 * updates
    for images, steps in calls:
        assert sum(i < 8 for i in images) == sum(i >= 8 for i in images) == 4 * 8 / updates
        assert sorted(zip(images, steps, strict=True)) == sorted({(i, j) for i in images for j in range(4)})
    passes = [calls[start : start + updates] for start in range(0, len(calls), updates)]
    for one in passes:
        assert sorted({i for images, _ in one for i in images}) == list(range(16))
    if updates > 1:  # drawn anew in each pass and in each epoch
        assert len({str([sorted(set(images)) for images, _ in one]) for one in passes}) == len(passes)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_steps_are_drawn_anew_for_each_image_and_pass(count, tmp_path):
    trainer = trainer_of(tmp_path, own=Recorded(), train={"steps_per_image": count, "inner_epochs": 30})
    trainer.fit()
    seen = torch.zeros(16, 4)
    for images, steps in trainer.algorithm.calls:
        pairs = set(zip(images, steps, strict=True))
        assert len(pairs) == len(images) == 16 * count  # without replacement
        assert all(images.count(i) == count for i in range(16))
        seen[images, steps] += 1
    assert (seen > 0).all()
    assert (seen.sum(0) / seen.sum() - 0.25).abs().max() < 0.06


GRADIENTS = ("draft", "alignprop", "draft_lv", "refl", "flowbp")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*("ddpo", "dpok", "ctrl", "nft", "adjoint_matching", "q_learning"), *GRADIENTS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batches_of_memory_do_not_change_the_run(name, shape, tmp_path):
    """Neither train.loss_batch nor train.rollout_batch, in weights and records."""
    if name == "q_learning" and len(shape) > 1:
        pytest.skip("it is of points")
    options = {"name": name, **({"score": "pretrained"} if name == "q_learning" else {})}
    found = []
    for batches in ({}, {"loss_batch": 7}, {"loss_batch": 16, "rollout_batch": 2}):
        train = {"epochs": 2, "updates_per_epoch": 2, "lr": 0.05, **batches}
        trainer = trainer_of(tmp_path / str(len(found)), shape, algorithm=options, train=train)
        trainer.fit()
        lines = (tmp_path / str(len(found)) / "metrics.jsonl").read_text().splitlines()
        found.append(([p.detach() for p in trainer.learner.weights], json.loads(lines[-1])))
    for weights, line in found[1:]:
        for a, b in zip(weights, found[0][0], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)
        for key in ("reward/total", "loss", "grad_norm"):
            assert line[key] == pytest.approx(found[0][1][key], rel=5e-3, abs=1e-3), key


def test_the_batches_are_as_large_as_they_are_set(tmp_path):
    trainer = trainer_of(tmp_path, own=Recorded(), train={"loss_batch": 10, "rollout_batch": 4})
    trainer.fit()
    assert [len(images) for images, _ in trainer.algorithm.calls] == [10, 10, 10, 10, 10, 10, 4]
    assert trainer.algorithm.rolled == [(16, 4)]


@pytest.mark.parametrize(("prompts", "images"), [(2, 8), (1, 16), (4, 4)])
def test_an_epoch_has_so_many_images_of_so_many_prompts(prompts, images, tmp_path):
    rows = tuple(Row(i, str(i % 2)) for i in range(5))
    sizes = {"prompts_per_epoch": prompts, "images_per_prompt": images}
    trainer = trainer_of(tmp_path, rows=rows, algorithm={"name": "ddpo"}, train=sizes)
    groups = trainer.collect(0, Clock()).groups.tolist()
    assert len(groups) == 16
    assert [groups.count(row) for row in dict.fromkeys(groups)] == [images] * prompts
    every = [row for epoch in range(5) for row in trainer.collect(epoch, Clock()).groups.tolist()]
    assert {every.count(row) for row in range(5)} == {16}  # each as often, lap by lap


# ---------------------------------------------------------------------------------------------- what stops a run


@pytest.mark.parametrize(
    ("bad", "most", "stops"), [((2, 3), 3, False), ((2, 3, 4), 3, True), ((1, 2, 4, 5), 3, False), ((3,), 1, True)]
)
def test_a_run_stops_after_so_many_bad_updates_in_a_row(bad, most, stops, tmp_path):
    train = {"max_bad_updates": most, "epochs": 7, "lr": 0.1}
    trainer = trainer_of(tmp_path, own=Recorded(bad=bad), train=train)
    if stops:
        with pytest.raises(RunError):
            trainer.fit()
        assert len(trainer.algorithm.calls) == max(bad)
    else:
        trainer.fit()
        line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
        assert (line["skipped_updates"], line["updates"]) == (len(bad), 7 - len(bad))
    assert all(p.isfinite().all() for p in trainer.learner.weights)


@condrl.reward(name="some_fail")
class SomeFail:
    """nan for the first so many samples of each call."""

    def __init__(self, *, count: int = 0):
        self.count, self.errors = count, []

    def __call__(self, samples, prompts):
        scores = samples.flatten(1).sum(1)
        scores[: self.count] = torch.nan
        return scores


@pytest.mark.parametrize(
    ("count", "most", "stops"), [(4, 0.25, False), (5, 0.25, True), (1, 0.0, True), (0, 0.0, False)]
)
def test_a_run_stops_when_more_than_that_share_of_scores_failed(count, most, stops, tmp_path):
    rewards = {"bowl": {"weight": 0.0}, "some_fail": {"count": count}}
    trainer = trainer_of(tmp_path, algorithm={"name": "nft"}, rewards=rewards, train={"max_failed": most})
    if stops:
        with pytest.raises(RunError):
            trainer.fit()
        return
    trainer.fit()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["failed_scores"] == count


FAILING = [
    {"name": "ddpo"},
    {"name": "dpok", "kappa": 0.5, "normalise": True},
    {"name": "ctrl", "kappa": 0.5},
    {"name": "nft"},
    {"name": "draft", "kappa": 0.5},
    {"name": "alignprop", "kappa": 0.5},
    {"name": "draft_lv"},
    {"name": "refl"},
    {"name": "flowbp"},
    {"name": "adjoint_matching"},
    {"name": "q_learning", "score": "pretrained"},
]


@pytest.mark.parametrize("algorithm", FAILING, ids=lambda options: options["name"])
def test_images_without_a_score_teach_nothing(algorithm, tmp_path):
    """Neither what they look like nor what they are called counts; the mean is over the others."""
    rewards, gradients = {"bowl": {"weight": 0.0}, "some_fail": {"count": 2}}, []
    for change in (0.0, 0.7):
        trainer = trainer_of(tmp_path, algorithm=algorithm, rewards=rewards, train={"max_failed": 0.2})
        move(trainer)
        trainer.learner.optimizer.step = lambda t=trainer: gradients.append(
            [p.grad.clone() for p in t.learner.parameters]
        )
        experience = trainer.collect(0, Clock())
        assert (~experience.scored).nonzero().flatten().tolist() == [0, 1]
        experience.rollout.states[1:, :2] += change
        examples = trainer.examples(experience, 0)
        trainer.learner.update(examples, experience, 0)
    for a, b in zip(*gradients, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert max(g.abs().max() for g in gradients[0]) > 1e-3


def kl_by_hand(trainer, r):
    """E sum_k KL of the first images of a roll-out, of the policy as it is."""
    total = torch.zeros(r.states.shape[1])
    for k in range(5):
        x, model = r.states[k], trainer.policy.model
        scores = [score(x, at(trainer, k, len(x)), r.condition) for score in (model.score, model.base)]
        total = total + kl_divergence(*(step_of(trainer, k, x, score) for score in scores))
    return total.mean().item()


def test_a_budget_ends_a_run_that_rolls_out_without_noise(tmp_path):
    """Its path KL is that of the reverse SDE."""
    train = {"epochs": 12, "lr": 0.01, "kl_budget": 0.02}
    trainer_of(tmp_path, algorithm={"name": "nft"}, sampler={"eta": 0.0}, train=train).fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["base_kl"] > 0.02 >= max(line["base_kl"] for line in lines[:-1])
    assert 1 < len(lines) < 12


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_budget_is_of_the_path_kl(shape, tmp_path):
    """The run ends with the first epoch that was rolled out above it; the KL is measured before its updates."""
    train = {"epochs": 12, "lr": 0.01, "kl_budget": 0.15}
    trainer = trainer_of(tmp_path, shape, algorithm={"name": "reinforce"}, train=train)
    budget_exhausted, collect = [], trainer.collect

    def collected(epoch, clock):
        experience = collect(epoch, clock)
        with torch.no_grad():
            budget_exhausted.append(kl_by_hand(trainer, experience.rollout))
        return experience

    trainer.collect = collected
    trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["base_kl"] for line in lines] == pytest.approx(budget_exhausted, rel=1e-3, abs=1e-5)
    assert budget_exhausted[-1] > 0.15 >= max(budget_exhausted[:-1])
    assert 2 < len(lines) < 12


def test_kappa_rises_over_the_budget_and_falls_back_under_it(tmp_path):
    """By 1.2 in each epoch, not below what the config says; `kappa` in the record is that of the epoch."""
    train = {"epochs": 14, "lr": 0.02, "kl_budget": 2.0, "over_budget": "adapt"}
    rewards = {"bowl": {"weight": 0.01}}  # what moves the policy is the KL, back to where it is under the budget
    trainer = trainer_of(tmp_path, algorithm={"name": "dpok", "kappa": 0.3}, train=train, rewards=rewards)
    move(trainer, 0.15)
    trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    kappa, expected = 0.3, []
    for line in lines:
        expected.append(kappa)
        kappa = 1.2 * kappa if line["base_kl"] > 2.0 else max(0.3, kappa / 1.2)
    assert [line["kappa"] for line in lines] == pytest.approx(expected)
    assert trainer.algorithm.kappa == pytest.approx(kappa)
    assert expected[1] > expected[0] == 0.3
    assert expected[-1] == pytest.approx(0.3)  # it has fallen back, and no further
    assert lines[-2]["base_kl"] < 2.0


# ---------------------------------------------------------------------------------------------- rewards


def test_the_total_is_the_weighted_sum(tmp_path):
    condrl.reward(lambda samples, prompts: samples.flatten(1)[:, 0] * 3 + 1, name="first_times_three")
    rewards = {"bowl": {"weight": 0.4}, "first_times_three": {"weight": -2.0}}
    experience, _, _ = an_epoch(trainer_of(tmp_path, algorithm={"name": "ddpo"}, rewards=rewards))
    each = experience.scores.each
    torch.testing.assert_close(experience.scores.total, 0.4 * each["bowl"] - 2 * each["first_times_three"])


def test_seeds_and_epochs_draw_other_noise(tmp_path):
    def drawn(seed, epoch):
        """(K + 1, B, 2): where a roll-out starts, and the noise of each step."""
        trainer = trainer_of(tmp_path, run={"seed": seed})
        r, S = trainer.collect(epoch, Clock()).rollout, trainer.policy.sampler.S
        noise = [r.states[0]]
        for k in range(5):
            mean = trainer.policy.transition(r.states[k], torch.full((16,), k), r.condition).mean.detach()
            noise.append((r.states[k + 1] - mean) / S[k])
        return torch.stack(noise)

    found = [drawn(0, 0), drawn(1, 0), drawn(0, 1)]
    assert torch.equal(found[0], drawn(0, 0))
    for other in found[1:]:
        assert (found[0] - other).abs().min() > 1e-5
    assert len(set(found[0].flatten().tolist())) == 6 * 16 * 2  # neither two images nor two steps alike
    assert found[0].std().item() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("name", ["ddpo", "ctrl"])
def test_a_roll_out_begins_as_wide_as_its_schedule(name, tmp_path):
    model = Shaped((2,))
    model.schedule = OU(noise=3.0)
    many = {"images_per_prompt": 2000, "rollout_batch": 4000}
    trainer = trainer_of(tmp_path, model=model, algorithm={"name": name}, train=many)
    start = trainer.collect(0, Clock()).rollout.states[0]
    assert start.std().item() == pytest.approx(3 * (1 - math.exp(-6)) ** 0.5, rel=0.03)


def test_rows_are_what_the_rewards_are_asked_about(tmp_path):
    asked = []

    @condrl.reward(name="asks_for_metadata")
    def asks(samples, prompts, metadata):
        asked.append((list(prompts), [row["n"] for row in metadata]))
        return samples.flatten(1).sum(1)

    rows = (Row(0, "0", {"n": 5}), Row(1, "1", {"n": 7}))
    rewards = {"bowl": {"weight": 0.0}, "asks_for_metadata": {}}
    experience = trainer_of(tmp_path, rows=rows, algorithm={"name": "ddpo"}, rewards=rewards).collect(0, Clock())
    prompts, numbers = asked[0]
    assert prompts == [row.prompt for row in experience.rows]
    assert numbers == [{"0": 5, "1": 7}[prompt] for prompt in prompts]
    condition = experience.rollout.condition.tolist()
    assert condition == [int(prompt) for prompt in prompts]
    assert SIDES[0].metadata == {}
