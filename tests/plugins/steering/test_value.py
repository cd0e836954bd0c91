"""`--steer value`: what a run of feynman_kac learned, saved, found again and drawn with."""

import json
import shutil

import pytest
import torch
from helpers import toy_words

import condrl
from condrl import UsageError
from condrl.algorithms.values import StepValue, load_step_value, step_stds
from condrl.commands import evaluate, finetune, sample
from condrl.diffusion.noise import seeded
from condrl.diffusion.rollout import advance, start
from condrl.diffusion.steering import Draws
from condrl.loading import load_config
from condrl.plugins.steering.value import value as steer
from condrl.training.build import make_policy, make_sampler

LEARN = ["train.lr=0.02", "algorithm.value_lr=0.02", "train.epochs=16", "train.prompts_per_epoch=4", "run.seed=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("value") / "run"
    words = [*toy_words("feynman_kac", folder), *LEARN, "train.images_per_prompt=64", "train.updates_per_epoch=8"]
    assert finetune.main([*words, "algorithm.kappa=0.5", "evaluate.images_per_prompt=30"]) == 0
    return folder


def policy_of(run, *words):
    return make_policy(load_config([str(run / "config.yaml"), *words]), torch.device("cpu"))


def evaluated(*words, out):
    code = evaluate.main([*map(str, words), "--out", str(out)])
    lines = [json.loads(line) for line in (out / "evaluation.jsonl").read_text().splitlines()]
    return code, json.loads((out / "evaluation.json").read_text()), lines


def test_a_run_leaves_its_value_and_lists_it(run):
    assert "value/network.safetensors" in (run / "condrl_files.txt").read_text().splitlines()
    found, policy = load_step_value(policy_of(run), str(run)), policy_of(run)
    assert torch.equal(found.times, policy.sampler.times)
    torch.testing.assert_close(found.stds, policy.sampler.S)
    fresh = StepValue(policy, 64)
    assert {name: p.shape for name, p in found.named_parameters()} == {n: p.shape for n, p in fresh.named_parameters()}


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_each_step_is_moved_by_the_variance_times_the_gradient(run, strength):
    """Step by step, from the same noise, by the sampler's three numbers."""
    policy, found = policy_of(run), load_step_value(policy_of(run), str(run))
    condition = policy.model.encode(["far left", "right", "far right"])
    with torch.no_grad():
        drawn = steer(Draws(policy, condition, seeded([3, 4, 5]), None), run=str(run), strength=strength)
        generators = seeded([3, 4, 5])
        place = start(policy, 3, generators)
        for k in range(policy.steps):
            transition, place = advance(policy, place, condition, generators)
            mean = transition.mean.clone().requires_grad_()
            with torch.enable_grad():
                total = found(mean, torch.full((3,), k), policy.model.features(condition)).sum()
            place.x.add_(strength * policy.sampler.S[k].float() ** 2 * torch.autograd.grad(total, mean)[0])
    torch.testing.assert_close(drawn, place.x, rtol=1e-5, atol=1e-5)


def test_it_steers_the_pretrained_model_without_asking_rewards(run, tmp_path, capsys, monkeypatch):
    """Better by each prompt's own reward, by as many calls, and the same whichever LoRA is loaded."""
    monkeypatch.setattr("condrl.training.steering.make_rewards", lambda _: pytest.fail("rewards are asked"))
    code, result, lines = evaluated(run, "--steer", f"value,run={run}", out=tmp_path / "x")
    assert code == 0
    assert f"steered: value, run={run}, strength=1.0\n" in capsys.readouterr().out
    scores = torch.tensor([line["steered"]["quadratic"] for line in lines]).view(2, 4, 30)
    torch.testing.assert_close(scores[1], scores[0])  # of the base, and where the tuned model would be
    plain = torch.tensor([line["plain"]["quadratic"] for line in lines]).view(2, 4, 30)
    for better in (scores[0], plain[1]):  # the LoRA was taught the same
        gain = better.mean(1) - plain[0].mean(1)
        assert gain[[0, 3]].min() > 0.5  # "far left" and "far right", whose rewards are steep
        assert gain.min() > 0
    assert [entry["network_calls"] for entry in result["evaluations"]] == [{"plain": 5.0, "steered": 5.0}] * 2
    assert result["steer"]["rewards"] == {}


@pytest.mark.parametrize(
    ("sampler", "is_same"),
    [
        ({}, True),
        ({"eta": 0.8}, False),
        ({"steps": 6}, False),
        ({"name": "ddim"}, False),
        ({"spacing": "log_snr"}, False),
    ],
)
def test_the_value_belongs_to_its_own_steps(run, sampler, is_same):
    policy = policy_of(run, *(f"sampler.{key}={value}" for key, value in sampler.items()))
    if is_same:
        load_step_value(policy, str(run))
        return
    with pytest.raises(UsageError, match=r"belongs to the steps of its own sampler: draw with sampler\.\* as in"):
        load_step_value(policy, str(run))


def test_what_is_no_value_is_one_line(run, tmp_path):
    policy = policy_of(run)
    with pytest.raises(UsageError, match=r"holds no value/network\.safetensors: name a finished run of feynman_kac"):
        load_step_value(policy, str(tmp_path))
    (tmp_path / "value").mkdir()
    file = tmp_path / "value" / "network.safetensors"
    file.write_bytes((run / "value" / "network.safetensors").read_bytes()[:-50])
    with pytest.raises(UsageError, match="--steer value: .* is truncated"):
        load_step_value(policy, str(tmp_path))
    shutil.copy(run / "lora" / "network.safetensors", file)
    with pytest.raises(UsageError, match="holds another network than feynman_kac's"):
        load_step_value(policy, str(tmp_path))
    other = policy_of(run, "model.distributions={a: {weights: [0.5, 0.5], means: [0, 1], variances: [1, 1]}}")
    with pytest.raises(UsageError, match="belongs to another network"):
        load_step_value(other, str(run))


@pytest.mark.parametrize("name", ["ddim", "euler_maruyama", "exponential", "flow_sde", "dance_sde"])
def test_stds_are_those_of_the_steps(name):
    config = load_config([f"sampler.name={name}", "sampler.steps=6"])
    from condrl.training.build import stand_in

    sampler = make_sampler(config.sampler, stand_in(config.sampler))
    torch.testing.assert_close(step_stds(sampler), sampler.S)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steer", "value"], "config --steer: value needs run"),
        (["--steer", "value,run=nowhere"], "nowhere holds no value/network.safetensors"),
        (
            ["--steer", "value,run=nowhere", "rewards.shapes.weight=1"],
            "rewards.shapes.weight=1 has no effect on drawing",
        ),
    ],
)
def test_what_cannot_steer_is_one_line(words, said, tmp_path, capsys):
    assert sample.main(["--prompt", "a red star", "--out", str(tmp_path / "x.png"), "sampler.steps=2", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_images_are_drawn_with_a_value_of_images(pipeline, tmp_path):
    """From Python: other images than the plain ones, with a LoRA or without; what was learned without one leaves none."""
    (tmp_path / "prompts.txt").write_text("a red star\na blue circle\n")
    words = [f"model.path={pipeline}", "model.lora_rank=2", "model.guidance=1", "sampler.steps=3", "sampler.eta=1"]
    train = ["prompts_per_epoch=2", "images_per_prompt=4", "rollout_batch=8", "epochs=2", "updates_per_epoch=1"]
    settings = [*words, *(f"train.{each}" for each in train), "rewards.brightness.weight=1", "prompts.heldout=null"]
    own = ["algorithm.name=feynman_kac", "algorithm.kappa=0.01", "algorithm.distil=false"]
    base = tmp_path / "base.yaml"
    base.write_text("model: {name: stable_diffusion}\n")
    paths = [f"prompts.train={tmp_path}/prompts.txt", f"run.dir={tmp_path}/run"]
    assert finetune.main([str(base), *settings, *own, *paths]) == 0
    of = f"value,run={tmp_path}/run,strength=300"
    plain, steered = (condrl.sample(*words, prompts=["a red star"], seeds=[0, 1], steer=s) for s in (None, of))
    assert all(a.tobytes() != b.tobytes() for a, b in zip(plain, steered, strict=True))
    again = condrl.sample(f"{tmp_path}/run", prompts=["a red star"], seeds=[0, 1], steer=of)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(again, steered, strict=True))
