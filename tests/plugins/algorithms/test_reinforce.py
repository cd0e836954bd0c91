"""REINFORCE with the roll-out's own graph: the same gradient without a second forward pass."""

import pytest
import torch
from chains import SHAPES, move, trainer_of

import condrl
from condrl.commands import finetune
from condrl.training.clock import Clock

CASES = [
    {},
    {"train": {"steps": [0, 2]}},
    {"train": {"window": 2}},
    {"train": {"same_start": True}},
    {"algorithm": {"normalise": False, "leave_one_out": True}},
    {"rewards": {"bowl": {"weight": 0.0}, "reinforce_sometimes": {}}, "train": {"max_failed": 0.5}},
    {"sampler": {"name": "dpm_solver_pp", "eta": 0.7}},
]


@condrl.reward
def reinforce_sometimes(samples, prompts):
    """No score for two of the images."""
    level = samples.flatten(1).sum(1)
    return level.where(torch.arange(len(level)) > 1, torch.nan)


def made(folder, shape=(2,), keep=True, train=None, algorithm=None, **sections):
    """A trainer whose weights are not 0."""
    algorithm = {"name": "reinforce", "keep_graph": keep, **(algorithm or {})}
    few = {"rollout_batch": 3, "loss_batch": 7, **(train or {})}
    trainer = trainer_of(folder, shape, algorithm=algorithm, train=few, **sections)
    move(trainer)
    return trainer


def gradient(trainer):
    """That of an epoch's update, and the line of the record."""
    found, step = [], trainer.learner.optimizer.step

    def note():
        found.extend(weight.grad.clone() for weight in trainer.learner.weights)
        step()

    trainer.learner.optimizer.step = note
    line = trainer.run_epoch(0)
    return torch.cat([part.flatten() for part in found]), line


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_same_gradient(case, shape, tmp_path):
    (plain, before), (kept, line) = (gradient(made(tmp_path / str(k), shape, k, **case)) for k in (False, True))
    assert plain.abs().max() > 0.01
    torch.testing.assert_close(kept, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())
    assert line["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-4)
    assert line["reward/total"] == before["reward/total"]


def test_the_network_is_not_called_again(tmp_path):
    trainer, calls = made(tmp_path), []
    experience = trainer.collect(0, Clock())
    trainer.policy.model.score = lambda *_: calls.append(1)
    examples = trainer.examples(experience, 0)
    trainer.learner.update(examples, experience, 0)
    assert not calls
    assert trainer.learner.updates == 1
    assert all(weight.grad is None for weight in trainer.learner.weights)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["algorithm.kappa=0.1"], "config algorithm.keep_graph: the KL needs a pass of its own"),
        (["train.updates_per_epoch=2"], "config train.updates_per_epoch: with algorithm.keep_graph it must be 1"),
        (["train.steps_per_image=2"], "config train.steps_per_image: with algorithm.keep_graph it must be null"),
        (["train.rollout_dtype=bfloat16"], "config train.rollout_dtype: with algorithm.keep_graph it must be null"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_one_line(words, said, tmp_path, capsys):
    given = ["shapes/reinforce", "algorithm.keep_graph=true", "train.updates_per_epoch=1", *words]
    assert finetune.main([*given, f"run.dir={tmp_path}/run"]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
