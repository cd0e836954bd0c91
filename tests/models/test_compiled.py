"""model.compile: the same numbers, whatever the LoRA is used for, by code that is made once for each use."""

import functools
import shutil

import pytest
import torch
from drawing import CPU, PROMPTS, perturb
from flow_pipelines import flux_pipeline, sd3_pipeline
from helpers import ROOT, tiny_pipeline
from sdxl_pipeline import sdxl_pipeline

import condrl.models.latent
from condrl import UsageError
from condrl.algorithms.examples import check_ratios
from condrl.diffusion.policy import Policy, acting
from condrl.loading import load_config, load_for_drawing
from condrl.models.compiled import check_compiler
from condrl.plugins.models.flux import Flux
from condrl.plugins.models.sd3 import SD3
from condrl.plugins.models.sdxl import SDXL
from condrl.plugins.models.stable_diffusion import StableDiffusion
from condrl.prompts import Row
from condrl.training.build import make_sampler, make_trainer
from condrl.training.clock import Clock
from condrl.training.preflight import attempt

FAMILIES = {
    "unet": (StableDiffusion, tiny_pipeline),
    "sdxl": (SDXL, sdxl_pipeline),
    "sd3": (SD3, sd3_pipeline),
    "flux": (Flux, functools.partial(flux_pipeline, shift=3.0)),  # not by the size of its images, which is FLUX.1's
}


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that torch.compile makes, which are run operation by operation: no compiler is needed."""
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = functools.partialmethod(torch.nn.Module.compile, backend=backend)
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    monkeypatch.setattr(condrl.models.latent, "check_compiler", lambda device: None)
    yield made
    torch._dynamo.reset()


@pytest.fixture(
    scope="module",
    params=["unet", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "unet")],
)
def family(request, tmp_path_factory):
    plugin, save = FAMILIES[request.param]
    return plugin, save(tmp_path_factory.mktemp(request.param))


def pair(family, **options):
    """The same model twice, not compiled and compiled, with a LoRA that does something."""
    plugin, path = family
    models = []
    for compiled in (False, True):
        torch.manual_seed(0)
        models.append(plugin(CPU, path=str(path), lora_rank=2, compile=compiled, **options))
        perturb(models[-1])
    return models


def place(model, count=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, *model.state_shape, generator=generator)
    return x, torch.full((count,), 0.5), model.encode([PROMPTS[0]] * count)


def trained(model):
    return [p for p in model.module.parameters() if p.requires_grad]


@pytest.mark.slow
def test_scores_and_gradients_are_the_same(family, graphs):
    """With and without gradients, the LoRA merged and left out, in half precision, and after it has changed."""
    plain, compiled = pair(family, guidance=3.0)

    def both(within=lambda model: torch.no_grad()):
        found = []
        for model in (plain, compiled):
            with torch.no_grad(), within(model):
                found.append(model.score(*place(model)))
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
        return found[0]

    usual = both()
    made = len(graphs)
    assert made > 0
    both()
    assert len(graphs) == made  # nothing is made twice
    torch.testing.assert_close(both(lambda model: model.merged()), usual, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(both(lambda model: model.reference()), usual, atol=1e-2)
    assert torch.equal(both(), usual)
    others = [torch.zeros_like(p) for p in trained(plain)]
    assert not torch.allclose(both(lambda model: acting(trained(model), others)), usual, atol=1e-2)

    def half(model):
        return torch.autocast("cpu", torch.bfloat16)

    assert not torch.equal(both(half), usual)
    for model in (plain, compiled):
        model.score(*place(model)).square().sum().backward()
    gradients = [[p.grad for p in trained(model)] for model in (plain, compiled)]
    assert any(g.abs().max() > 0.01 for g in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)
    for model in (plain, compiled):
        with torch.no_grad():
            for p in trained(model):
                p.add_(p.grad, alpha=-1e-3)
    assert not torch.allclose(both(), usual, atol=1e-3)


@pytest.mark.slow
def test_a_lora_in_half_precision_breaks_no_graph(family, graphs):
    made = []
    for dtype in ("float32", "bfloat16"):
        torch._dynamo.reset()
        plain, compiled = pair(family, guidance=1.0, dtype=dtype)
        for model in (plain, compiled):
            model.score(*place(model)).square().sum().backward()
        gradients = [torch.cat([p.grad.flatten() for p in trained(model)]) for model in (plain, compiled)]
        assert (gradients[1] - gradients[0]).norm() < 0.01 * gradients[0].norm()
        made.append(len(graphs))
        graphs.clear()
    assert made[0] == made[1] > 0


@pytest.mark.slow
def test_features_are_the_same(family, graphs):
    """Also when they are asked for after the blocks were compiled."""
    plain, compiled = pair(family, guidance=1.0)
    with torch.no_grad():
        compiled.score(*place(compiled))
    assert graphs
    found = [model.network_features(*place(model)) for model in (plain, compiled)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_it_goes_with_gradient_checkpointing(family, graphs):
    plain, compiled = pair(family, gradient_checkpointing=True)
    for model in (plain, compiled):
        model.score(*place(model)).square().sum().backward()
    for p, q in zip(trained(plain), trained(compiled), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-4)
    assert graphs


def a_trainer(pipeline, folder, *words):
    few = ["train.prompts_per_epoch=2", "train.images_per_prompt=2", "train.rollout_batch=4", "rewards.shapes.weight=0"]
    few += ["rewards.shapes_exact.weight=0", "rewards.brightness.weight=1", f"run.dir={folder}", "sampler.steps=3"]
    few += ["train.updates_per_epoch=1", "train.loss_batch=4", "train.rollout_dtype=null", "algorithm.name=ddpo"]
    config = load_config([str(ROOT / "configs" / "quickstart.yaml"), f"model.path={pipeline}", *few, *words])
    folder.mkdir()
    torch.manual_seed(0)
    return make_trainer(config, [Row(0, PROMPTS[0]), Row(1, PROMPTS[1])])


@pytest.mark.slow
def test_a_run_learns_the_same(pipeline, graphs, tmp_path):
    """Its ratios are 1 in both epochs, and its weights end where they do without; the trial compiles nothing."""
    ends = []
    for compiled in ("false", "true"):
        trainer = a_trainer(pipeline, tmp_path / compiled, f"model.compile={compiled}")
        attempt(trainer)
        assert graphs == []
        for epoch in range(2):
            trainer.run_epoch(epoch)
        ends.append([p.detach().clone() for p in trainer.learner.weights])
    assert graphs
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-2, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["model.dtype=bfloat16"], ["train.rollout_dtype=bfloat16"]], ids=str)
def test_ratios_are_one(words, pipeline, graphs, tmp_path):
    """By the arithmetic of updates, with gradients: in half precision they would not be otherwise."""
    trainer = a_trainer(pipeline, tmp_path / "run", "model.compile=true", *words)
    perturb(trainer.policy.model)
    asked, score = [], trainer.policy.model.score
    trainer.policy.model.score = lambda *place: asked.append(torch.is_grad_enabled()) or score(*place)
    collected = trainer.collect(0, Clock())
    asked.clear()
    examples = trainer.examples(collected, 0)
    assert asked
    assert all(asked)
    assert not examples.old_log_prob.requires_grad
    check_ratios(examples, trainer.policy, 4)


def test_without_a_compiler_it_is_one_line(monkeypatch, pipeline):
    """Before anything is loaded."""

    def fails(*arguments, **options):
        raise RuntimeError("InvalidCxxCompiler: none of g++, clang\nmore of it")

    monkeypatch.setattr(torch, "compile", fails)
    monkeypatch.setattr(StableDiffusion, "load", lambda self: pytest.fail("loaded"))
    with pytest.raises(UsageError, match=r"torch.compile does not work on cpu here, it needs a C\+\+ .*none of g") as e:
        StableDiffusion(CPU, path=str(pipeline), compile=True)
    assert "\n" not in str(e.value)


def test_it_is_refused_where_weights_are_spread(pipeline, graphs):
    model = StableDiffusion(CPU, path=str(pipeline), compile=True)
    with pytest.raises(UsageError, match=r"model\.compile: does not work with FSDP"):
        model.shard()


def test_drawing_does_not_wait_for_it(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("model: {name: stable_diffusion, compile: true, lora_rank: 3}\n", "utf-8")
    config = load_for_drawing(file, [])
    assert (config.model["compile"], config.model["lora_rank"]) == (False, 3)
    with pytest.raises(UsageError, match="images are drawn sooner than a network is compiled"):
        load_for_drawing(file, ["model.compile=true"])


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="needs a C++ compiler")
def test_what_is_really_compiled_is_the_same(tmp_path):
    """By torch's own compiler, a roll-out's step and a gradient."""
    torch._dynamo.reset()
    check_compiler(CPU)
    path = tiny_pipeline(tmp_path)
    plain, compiled = pair((StableDiffusion, path))
    found = []
    for model in (plain, compiled):
        sampler = make_sampler({"name": "ddim", "steps": 2, "spacing": "trailing", "eta": 1.0}, model.schedule)
        x, _, condition = place(model, 2)
        mean = Policy(model, sampler).transition(x, torch.zeros(2, dtype=torch.long), condition).mean
        mean.square().sum().backward()
        found.append([mean.detach(), *(p.grad for p in trained(model))])
    for theirs, ours in zip(*found, strict=True):  # by norm: sums in another order round single elements differently
        assert (ours - theirs).norm() < 1e-3 * theirs.norm()
