"""DDPO in one file (scripts/examples) and the plugin: the same chain, images, credit, losses and gradients."""

import ast
import importlib.util
import re
import sys

import pytest
import torch
from helpers import ROOT

import condrl
from condrl.loading import load_config
from condrl.prompts import Row
from condrl.training.build import make_trainer
from condrl.training.clock import Clock

PROMPTS, GROUP = ("a red star", "two circles"), 4
IMAGES = len(PROMPTS) * GROUP
SETTINGS = [
    "algorithm.name=ddpo",
    "train.rollout_dtype=null",
    "rewards.reddish.weight=1",
    "evaluate.measures=null",
    f"train.prompts_per_epoch={len(PROMPTS)}",
    f"train.images_per_prompt={GROUP}",
    "train.updates_per_epoch=1",
    f"train.loss_batch={IMAGES}",
    "train.max_grad_norm=1e9",
]


def load_example():
    path = ROOT / "scripts" / "examples" / "ddpo_from_scratch.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = load_example()


@condrl.reward
def reddish(samples, prompts):
    return example.redness(samples)


class Both:
    """An epoch's images drawn by the trainer, and by the example from the same weights and the same noise."""

    def __init__(self, folder):
        config = load_config([*SETTINGS, f"run.dir={folder}"], default=ROOT / "configs" / "quickstart.yaml")
        self.trainer = make_trainer(config, [Row(i, prompt) for i, prompt in enumerate(PROMPTS)])
        self.unet = self.trainer.policy.model.module
        torch.manual_seed(0)
        self.pipe = example.load()
        self.unet.load_state_dict(self.pipe.unet.state_dict())
        self.experience = self.trainer.collect(0, Clock())
        self.chain = example.ddim(self.pipe.scheduler.betas, example.STEPS)
        self.prompt = self.pipe.encode_prompt([row.prompt for row in self.experience.rows], "cpu", 1, False)[0]
        noise = self.trainer.noise(0, "rollout", range(IMAGES))
        noise = torch.stack([noise.normal((4, 8, 8)) for _ in range(example.STEPS + 1)])
        self.states, self.log_probs = example.roll_out(self.pipe.unet, self.chain, self.prompt, noise)
        rewards = example.redness(example.decode(self.pipe.vae, self.states[-1]))
        self.advantages = example.group_advantages(rewards, GROUP)

    def by_trainer(self):
        """The plugin's loss, summed over steps, its gradient of the LoRA, and the share of ratios out of bounds."""
        gradients, learner = [], self.trainer.learner
        learner.optimizer.step = lambda: gradients.append(lora_gradient(self.unet))
        examples = self.trainer.examples(self.experience, 0)
        metrics, _, _ = learner.step(examples, range(IMAGES), torch.arange(IMAGES), torch.Generator())
        return metrics["loss"] * example.STEPS, gradients[0], metrics["clip_fraction"]

    def by_example(self):
        """The example's loss on the trajectories that the trainer stored, and its gradient."""
        self.pipe.unet.zero_grad()
        r, advantages = self.experience.rollout, self.trainer.examples(self.experience, 0).advantage[0]
        found = r.states, r.log_probs, self.prompt, advantages
        return example.backward(self.pipe.unet, self.chain, *found), lora_gradient(self.pipe.unet)


def lora_gradient(unet):
    return torch.cat([p.grad.flatten() for p in unet.parameters() if p.requires_grad])


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return Both(tmp_path_factory.mktemp("run"))


def assert_close(found, expected, relative):
    assert expected.norm() > 0
    assert (found - expected).norm() <= relative * expected.norm()


def test_it_needs_nothing_of_condrl():
    code = ast.parse((ROOT / "scripts" / "examples" / "ddpo_from_scratch.py").read_text("utf-8"))
    names = {node.module for node in ast.walk(code) if isinstance(node, ast.ImportFrom)}
    names |= {name.name for node in ast.walk(code) if isinstance(node, ast.Import) for name in node.names}
    assert {"torch", "diffusers", "peft"} <= names
    assert not [name for name in names if name.startswith("condrl")]


def test_its_steps_are_the_samplers(both):
    for name in "ABS":
        torch.testing.assert_close(getattr(both.chain, name), getattr(both.trainer.policy.sampler, name))


def test_it_draws_and_judges_the_same_images(both):
    r, scores = both.experience.rollout, both.experience.scores
    assert_close(both.states, r.states, 1e-5)
    torch.testing.assert_close(both.log_probs, r.log_probs, atol=1e-3, rtol=0)
    theirs = both.trainer.examples(both.experience, 0).advantage[0]
    torch.testing.assert_close(both.advantages, theirs, atol=1e-3, rtol=0)
    assert scores.total.view(-1, GROUP).std(1).min() > 1e-4


@pytest.mark.slow
def test_its_first_update_has_the_plugins_gradient(both):
    loss, gradient, _ = both.by_trainer()
    own_loss, own_gradient = both.by_example()
    torch.testing.assert_close(own_loss, loss, atol=1e-4, rtol=0)  # a sum of ten terms of order 1 that cancel
    assert_close(own_gradient, gradient, 1e-4)  # 2e-5 here: float32, divided by the small S of the last steps


@pytest.mark.slow
def test_a_later_update_is_weighed_and_clipped_alike(both):
    """Both LoRAs are moved by the same step, far enough that some ratios are out of bounds."""
    generator = torch.Generator().manual_seed(0)
    start = {name: value.clone() for name, value in both.unet.state_dict().items()}
    for name, weight in both.pipe.unet.named_parameters():
        if "lora_B" in name:
            weight.data += 3e-3 * torch.randn(weight.shape, generator=generator)
    both.unet.load_state_dict(both.pipe.unet.state_dict())
    loss, gradient, clipped = both.by_trainer()
    own_loss, own_gradient = both.by_example()
    for unet in (both.unet, both.pipe.unet):
        unet.load_state_dict(start)
    assert 0.05 < clipped < 0.95
    torch.testing.assert_close(own_loss, loss, atol=0, rtol=0.01)  # bounds: the last step is 1 % shorter than others
    assert_close(own_gradient, gradient, 1e-3)


@pytest.mark.slow
def test_its_reward_rises(monkeypatch, capsys):
    monkeypatch.setattr(example, "EPOCHS", 6)
    example.main()
    lines = re.findall(r"reward ([+-]\d\.\d+) \+- (\d\.\d+)", capsys.readouterr().out)
    (first, error), *_, (last, last_error) = [tuple(map(float, line)) for line in lines]
    assert last - first > 4 * (error**2 + last_error**2) ** 0.5
