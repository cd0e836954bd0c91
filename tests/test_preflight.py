"""What is said before the first epoch, and what it refuses."""

import dataclasses

import pytest
import torch
from helpers import ALGORITHMS, ROOT, run_python, toy_words

import condrl.preflight as module
from condrl import RunError
from condrl.config import load_config
from condrl.preflight import attempt, preflight
from condrl.prompts import load_prompts
from condrl.run import make_trainer
from condrl.trainer import Trainer

FINETUNE = str(ROOT / "scripts" / "finetune.py")


def make(*words: str) -> Trainer:
    config = load_config(list(words))
    torch.manual_seed(0)
    return make_trainer(config, load_prompts(config.prompts.train, "prompts.train"))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_trial_leaves_no_trace_and_counts_what_an_epoch_calls(name, tmp_path):
    words = [*toy_words(name, tmp_path / "run"), "train.epochs=2"]
    (tmp_path / "run").mkdir()
    trainer, other = make(*words), make(*words)
    trial = attempt(trainer)
    assert trainer.policy.model.evaluations == 0
    trainer.config.run.check_ratios = other.config.run.check_ratios = False
    trainer.run_epoch(0)
    other.run_epoch(0)
    for mine, theirs in zip(trainer.parameters, other.parameters, strict=True):
        assert torch.equal(mine, theirs)
    images = trainer.config.images_per_epoch
    assert images * (trial.calls_to_gather + trial.calls_to_learn) == trainer.policy.model.evaluations
    assert trial.saved_gb > 0


def test_calls_with_some_steps_of_each_image(tmp_path):
    words = [
        *toy_words("ddpo", tmp_path),
        "algorithm.advantage=group",
        "train.steps_per_image=2",
        "run.check_ratios=false",
    ]
    trainer = make(*words)
    trial = attempt(trainer)
    trainer.run_epoch(0)
    images = trainer.config.images_per_epoch
    assert images * (trial.calls_to_gather + trial.calls_to_learn) == trainer.policy.model.evaluations == images * 7


def test_what_a_pair_holds_has_no_share_of_the_weights(tmp_path, monkeypatch):
    trainer = make(*toy_words("nft", tmp_path))
    found = []
    for images in (2, 4):
        monkeypatch.setattr(module, "IMAGES", images)
        found.append(attempt(trainer).saved_gb)
    assert found[0] == pytest.approx(found[1], rel=0.05)


def test_the_sentences(tmp_path, monkeypatch):
    trainer = make(str(ROOT / "configs" / "toy" / "g1.yaml"), f"run.dir={tmp_path}", "algorithm.kappa=0.5")
    lines = preflight(trainer)
    assert lines[0] == (
        "an epoch: 1 prompts x 512 images = 512 images, 24 steps each; 2 updates of 256 images; about 49,152 network "
        "calls. 300 epochs: 153,600 images, 600 updates"
    )
    assert "GB are free" in lines[1]
    assert "warning" not in " ".join(lines)
    monkeypatch.setattr(module, "free_gb", lambda device: 1e-6)
    assert "may not be enough: lower train.loss_batch" in preflight(trainer)[1]


def test_a_kl_without_a_gradient_is_refused(tmp_path, monkeypatch):
    trainer = make(str(ROOT / "configs" / "toy" / "g1.yaml"), f"run.dir={tmp_path}", "algorithm.kappa=0.5")
    whole = trainer.policy.transition

    def cut(x, k, condition, memory=None):
        law = whole(x, k, condition, memory)
        return dataclasses.replace(law, mean=law.mean.detach() + 0 * trainer.weights[0].sum())

    assert attempt(trainer).kl_gradient > 0
    monkeypatch.setattr(trainer.policy, "transition", cut)
    with pytest.raises(RunError, match="it has no gradient"):
        preflight(trainer)


def test_a_flat_reward_is_pointed_out(tmp_path):
    flat = ["rewards.quadratic.linear=[0]", "rewards.quadratic.curvature=[0]"]
    trainer = make(str(ROOT / "configs" / "toy" / "g1.yaml"), f"run.dir={tmp_path}", *flat)
    assert "warning: the reward is the same for the 4 images tried of each prompt" in preflight(trainer)


def test_a_dry_run_writes_nothing(tmp_path):
    done = run_python(FINETUNE, *toy_words("nft", tmp_path / "run"), "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 prompts x 8 images = 16 images" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_reward_that_fails_is_found_before_anything_is_written(tmp_path):
    (tmp_path / "nan.py").write_text(
        "import condrl\n\n\n@condrl.reward\ndef broken(samples, prompts):\n    return samples[:, 0] * float('nan')\n"
    )
    more = [f"plugins=[{tmp_path / 'nan.py'}]", "rewards.quadratic.weight=0", "rewards.broken.weight=1"]
    done = run_python(FINETUNE, *toy_words("nft", tmp_path / "run"), *more, cwd=tmp_path)
    assert done.returncode == 2
    assert "error: the reward 'broken' failed for the prompt" in done.stderr
    assert "(8 of the 8 images tried have no score)" in done.stderr
    assert not (tmp_path / "run").exists()
