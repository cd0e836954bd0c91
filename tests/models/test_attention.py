"""model.attention: the same images and gradients by another back-end, and one line for what cannot be had."""

import functools

import pytest
import torch
from drawing import CPU, PROMPTS, perturb
from flow_pipelines import flux_pipeline, sd3_pipeline
from helpers import ROOT, tiny_pipeline
from torch.utils._python_dispatch import TorchDispatchMode

from condrl import UsageError
from condrl.algorithms.examples import check_ratios
from condrl.commands import benchmark
from condrl.loading import load_config, load_for_drawing, load_for_evaluation
from condrl.models.attention import KERNELS, TORCHS
from condrl.plugins.models.flux import Flux
from condrl.plugins.models.sd3 import SD3
from condrl.plugins.models.stable_diffusion import StableDiffusion
from condrl.prompts import Row
from condrl.training.build import make_trainer
from condrl.training.clock import Clock

FAMILIES = {
    "unet": (StableDiffusion, tiny_pipeline),
    "sd3": (SD3, sd3_pipeline),
    "flux": (Flux, functools.partial(flux_pipeline, shift=3.0)),  # not by the size of its images, which is FLUX.1's
}
FUSED = "_scaled_dot_product_flash_attention_for_cpu"


class Called(TorchDispatchMode):
    """The names of the operations of torch within it, also in backward passes."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        self.names.add(call._schema.name.removeprefix("aten::"))
        return call(*args, **(kwargs or {}))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    plugin, save = FAMILIES[request.param]
    return plugin, save(tmp_path_factory.mktemp(request.param))


def found_by(family, **options):
    """The operations of a score and its gradient, and both."""
    plugin, path = family
    torch.manual_seed(0)
    model = plugin(CPU, path=str(path), lora_rank=2, guidance=1.0, **options)
    perturb(model)
    x = torch.randn(2, *model.state_shape, generator=torch.Generator().manual_seed(0))
    condition = model.encode(PROMPTS[:2])
    model.embeddings(condition)  # by the text encoders' own attention
    with Called() as called:
        score = model.score(x, torch.full((2,), 0.5), condition)
        score.square().sum().backward()
    gradients = [p.grad.flatten() for p in model.module.parameters() if p.requires_grad]
    return called.names, score.detach(), torch.cat(gradients)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_back_end_is_what_computes(checkpointing, family):
    """By torch's own choice, by no fused kernel, and by that alone: the same numbers, and the next model's own choice."""
    options = {"gradient_checkpointing": checkpointing}
    plain = found_by(family, **options)
    for name, fused in (("native", True), ("_native_math", False), ("_native_flash", True)):
        names, score, gradient = found_by(family, attention=name, **options)
        assert (FUSED in names) == (f"{FUSED}_backward" in names) == fused, name
        torch.testing.assert_close(score, plain[1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gradient, plain[2], rtol=1e-3, atol=1e-3)
    assert FUSED in found_by(family, **options)[0]


def test_what_does_not_work_here_is_refused_before_loading():
    """With what does; not one is fetched from the hub."""
    for name, why in (
        ("_native_cudnn", "RuntimeError: No viable backend"),
        ("flahs", "there is none of that name"),
        ("flash_hub", "there is none of that name"),
    ):
        with pytest.raises(UsageError) as error:
            StableDiffusion(CPU, path="nowhere", attention=name)
        line = str(error.value)
        assert line.startswith(f"config model.attention: {name} does not work in float32 on cpu here ({why}")
        assert line.endswith("leave it out, or use one of native, _native_flash, _native_math")


def test_what_a_network_cannot_take_is_refused(pipeline, monkeypatch):
    monkeypatch.setattr("condrl.models.latent.check_attention", lambda *_: None)
    with pytest.raises(UsageError, match="xformers is not for a UNet2DConditionModel: use one of native, _native_cu"):
        StableDiffusion(CPU, path=str(pipeline), attention="xformers")
    assert TORCHS[1:] == tuple(KERNELS)


@pytest.mark.slow
def test_ratios_are_one(pipeline, tmp_path):
    words = ["train.prompts_per_epoch=2", "train.images_per_prompt=2", "rewards.shapes=null", "sampler.steps=3"]
    words += ["rewards.shapes_exact=null", "rewards.brightness.weight=1", f"run.dir={tmp_path}", "algorithm.name=ddpo"]
    words += ["train.rollout_dtype=null", f"model.path={pipeline}", "model.attention=_native_math"]
    trainer = make_trainer(
        load_config([str(ROOT / "configs" / "quickstart.yaml"), *words]), [Row(0, p) for p in PROMPTS]
    )
    perturb(trainer.policy.model)
    examples = trainer.examples(trainer.collect(0, Clock()), 0)
    check_ratios(examples, trainer.policy, 4)


@pytest.mark.slow
def test_a_compiled_network_has_it(tmp_path):
    """Traced with the kernel that it asks for."""
    torch._dynamo.reset()
    path = tiny_pipeline(tmp_path)
    model = StableDiffusion(CPU, path=str(path), attention="_native_math", guidance=1.0)
    place = torch.ones(1, *model.state_shape), torch.full((1,), 0.5), model.encode(PROMPTS[:1])
    model.embeddings(place[2])  # by the text encoder's own attention
    with torch.no_grad(), Called() as called:
        plain = model.score(*place)
        for block in model.blocks():
            block.compile(backend="eager")
        assert torch.allclose(model.score(*place), plain, atol=1e-5)
    assert FUSED not in called.names


def test_drawing_leaves_it_out_and_an_evaluation_keeps_it(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("model: {name: stable_diffusion, attention: xformers}\n", "utf-8")
    assert load_for_drawing(file, []).model["attention"] is None
    assert load_for_drawing(file, ["model.attention=native"]).model["attention"] == "native"
    assert load_for_evaluation(file, [], is_trusted=True).model["attention"] == "xformers"


@pytest.mark.slow
def test_a_benchmark_takes_it():
    words = ["shapes", "--batch", "2", "--steps", "1", "--repeats", "0", "model.attention=_native_math"]
    assert benchmark.benchmark(benchmark.parse(words))["rollout"]["of_peak"] > 0
