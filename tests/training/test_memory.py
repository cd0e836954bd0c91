"""The memory that a run is said to need, against tensors whose sizes are known and runs that were measured."""

import json
import re

import pytest
import torch
from helpers import ROOT, run_python, toy_words

from condrl.algorithms.examples import check_ratios
from condrl.loading import load_config
from condrl.models.lora import lora_layers
from condrl.prompts import load_prompts
from condrl.training.build import make_trainer
from condrl.training.clock import Clock
from condrl.training.memory import Growth, LiveBytes, Needs, PeakClock, in_parts, largest
from condrl.training.preflight import attempt

MB = 2**20
KEPT = "shapes/reinforce algorithm.keep_graph=true train.updates_per_epoch=1"


def ones(mb):
    return torch.ones(mb, MB // 4)


def test_only_what_is_alive_counts():
    with LiveBytes() as live:
        a = ones(3)
        b = a[1:]  # the same storage
        del a
        assert live.now == 3 * MB
        del b
        assert live.now == 0
        c = ones(2)
        c += 1
        c.exp()
    assert live.now == 2 * MB
    assert live.peak == 4 * MB  # c and its exponential


def test_what_was_there_before_does_not_count():
    """Nor a view of it, nor that it goes."""
    before = ones(4)
    with LiveBytes() as live:
        view = before.detach()[1:]
        assert live.peak == 0
        del before, view
        assert live.now == 0
        ones(1)
    assert live.peak == MB


def test_a_merged_lora_counts_once_and_goes(model):
    model.module.to(torch.float32)
    targets = sum(layer.get_base_layer().weight.nbytes for layer in lora_layers(model.module).values())
    with torch.no_grad(), LiveBytes() as live:
        with model.merged():
            assert live.now == targets
        assert live.now == 0


def test_a_backward_pass_counts_with_its_gradients():
    weight = ones(1).requires_grad_()
    with LiveBytes() as live:
        y = weight.exp().exp().exp()  # three are kept
        y.sum().backward()  # with the gradient of one and of the one before it on top
    assert live.peak == pytest.approx(5 * MB, abs=1e3)
    del y
    assert live.now == pytest.approx(MB, abs=1e3)  # the weight's gradient


def test_a_clock_has_the_peak_of_each_phase():
    with LiveBytes() as live:
        clock = PeakClock(live)
        kept = ones(1)
        ones(4)
        clock.lap("first")
        ones(2)
        clock.lap("second")
    assert len(kept) == 1
    assert clock.peaks == {"first": 5 * MB, "second": 3 * MB}
    assert clock.seconds.keys() == clock.peaks.keys()


def test_growth_is_the_line_through_what_was_measured():
    assert Growth.through({1: 7, 4: 13}) == Growth(5, 2)
    assert Growth.through({4: 12}) == Growth(0, 3)
    assert Growth(5e9, 2e9).gb(3) == 11


def test_the_largest_phase_is_of_the_batches_that_there_are(tmp_path):
    """No more than there are images of an update, whatever train.loss_batch allows."""
    trainer = make(*toy_words("nft", tmp_path))
    train = trainer.config.train
    images = train.prompts_per_epoch * train.images_per_prompt
    none = Growth(0, 0)
    train.loss_batch, train.updates_per_epoch = 10**6, 4
    needs = Needs(none, none, none, none, Growth(0, 1e9), 3)
    assert largest(trainer, needs) == (f"backward pass of {3 * images // 4} pairs", 3 * images / 4)
    train.rollout_batch = 5
    assert largest(trainer, Needs(Growth(0, 1e9), none, none, none, none, 3)) == ("roll-out of 5 images", 5)


def make(*words):
    config = load_config(list(words))
    torch.manual_seed(0)
    return make_trainer(config, load_prompts(config.prompts.train, "prompts.train"))


def test_what_is_taken_is_told_by_its_parts(tmp_path):
    model = make(str(ROOT / "configs" / "shapes" / "ddpo.yaml"), f"run.dir={tmp_path}").policy.model
    beside = sum(p.nbytes for part in (model.vae, model.pipe.text_encoder) for p in part.parameters()) / 1e9
    assert beside > 0.005
    rest = f"Python, its libraries and the rewards {1.7 - beside:.2f}"
    assert in_parts(model, 0.3, 2.0) == f"the network's weights 0.30, the VAE's and text encoders' {beside:.2f}, {rest}"


def test_a_backward_pass_of_more_pairs_is_foreseen(pipeline, tmp_path):
    """The line through one pair and a few meets what many hold."""
    words = [str(ROOT / "configs" / "shapes" / "ddpo.yaml"), f"run.dir={tmp_path}", f"model.path={pipeline}"]
    words += ["model.lora_rank=2", "model.lora_targets=[to_q,to_k,to_v]", "sampler.steps=4", "train.steps=[0,1,2]"]
    trainer = make(*words, "train.loss_batch=96", "rewards={shapes: null, shapes_exact: null, brightness: {weight: 1}}")
    needs = attempt(trainer).needs
    experience = trainer.collect(0, Clock())
    examples = trainer.examples(experience, 0)
    pairs = examples.every_pair()[:96]
    with LiveBytes() as live:
        trainer.algorithm.loss(trainer.policy, examples.at(*pairs.unbind(1)))[0].sum().backward()
    assert needs.learn.gb(96) == pytest.approx(live.peak / 1e9, rel=0.1)
    with LiveBytes() as live:
        check_ratios(examples, trainer.policy, 48)
    assert live.peak / 1e9 < needs.learn.gb(48) * 1.2  # one graph at a time


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["quickstart", "shapes/ddpo", "shapes/draft", "shapes/adjoint_matching", KEPT])
def test_the_peak_of_a_run_is_foreseen(recipe, tmp_path):
    """Within 15 %, of a process that does nothing else."""
    few = [
        "train.epochs=1",
        "train.prompts_per_epoch=8",
        "evaluate.prompts=8",
        "evaluate.every=null",
        "prompts.validation=null",
    ]
    words = [*recipe.split(), *few, "train.patience=null", f"run.dir={tmp_path / 'run'}", "run.threads=1"]
    done = run_python("-m", "condrl", "finetune", *words, cwd=tmp_path, fresh=True)
    assert done.returncode == 0, done.stderr
    said = float(re.search(r"memory: about ([\d.]+) GB", done.stderr)[1])
    assert said == pytest.approx(json.loads((tmp_path / "run" / "result.json").read_text())["peak_memory_gb"], rel=0.15)
