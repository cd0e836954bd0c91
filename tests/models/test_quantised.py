"""`model.quantize`: the networks that diffusers rounds, whose LoRA is tuned and saved as if they were not rounded."""

import functools
import importlib.util
import re

import pytest
import torch
from diffusers import (
    BitsAndBytesConfig,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    TorchAoConfig,
)
from drawing import CPU, PROMPTS, SEEDS, perturb, pictures
from flow_pipelines import flux_pipeline, sd3_pipeline
from helpers import ROOT, tiny_pipeline
from safetensors.torch import load_file
from single_file import write_single_file
from torch import nn

import condrl.models.latent
import condrl.models.quantised as quantised
import condrl.training.memory as memory_module
from condrl import UsageError
from condrl.commands import benchmark, export, finetune
from condrl.diffusion.noise import seeded
from condrl.loading import load_config
from condrl.models.lora import LORA_FILE, lora_layers
from condrl.models.quantised import PACKAGES, check_quantize, held_bytes, planned_bytes, quantize_linears, shape_of
from condrl.plugins.models.flux import Flux
from condrl.plugins.models.sd3 import SD3
from condrl.plugins.models.stable_diffusion import StableDiffusion
from condrl.prompts import Row
from condrl.training.build import make_trainer
from condrl.training.checks import check_combination
from condrl.training.memory import Growth, LiveBytes, Needs, memory
from condrl.training.published import published, weights_gb

ODE = {"name": "ddim", "steps": 5, "spacing": None, "eta": 0.0}
FLOW = {"height": 24, "width": 16, "t5_tokens": 12}
FAMILIES = {
    "sd": (StableDiffusion, tiny_pipeline, {}, StableDiffusionPipeline),
    "sd3": (SD3, sd3_pipeline, FLOW, StableDiffusion3Pipeline),
    "flux": (Flux, flux_pipeline, FLOW, FluxPipeline),
}
FEW = ["rewards.brightness.weight=1", "model.lora_rank=2"]
NEEDED = ["prompts.train=prompts.txt"]
FURTHEST = {"int8": 0.01, "nf4": 0.1}  # that a pixel of [0, 1] may move; a few thousand weights have most of the noise
LIKENESS = {"int8": 0.999, "nf4": 0.95}  # of the LoRA's gradient, as a cosine


def rounded_by_itself(kind):
    """What the package alone makes of a matrix of ones."""
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        layer = nn.Linear(64, 64)
        quantize_(layer, Int8WeightOnlyConfig())
        return layer.weight
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(torch.ones(64, 64), quant_type="nf4")


def need(kind):
    """Skip a test where the package is not here, or does not work on a CPU."""
    package, extra = PACKAGES[kind]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs condrl[{extra}]")
    try:
        rounded_by_itself(kind)
    except Exception as error:
        pytest.skip(f"{package} does not work here: {error}")


@pytest.fixture(params=PACKAGES)
def kind(request):
    need(request.param)
    return request.param


@torch.no_grad()
def in_quarters(layer, device):
    layer.weight.copy_((4 * layer.weight).round() / 4)
    return layer


@pytest.fixture(params=[*PACKAGES, "stand-in"])
def any_kind(request, monkeypatch):
    """A precision, or without its package one that rounds to quarters: for what does not depend on how it rounds."""
    if request.param != "stand-in":
        need(request.param)
        return request.param
    monkeypatch.setitem(quantised.ROUNDED, "int8", in_quarters)
    monkeypatch.setattr(condrl.models.latent, "check_quantize", lambda *options: None)
    return "int8"


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return {name: make(tmp_path_factory.mktemp(name)) for name, (_, make, _, _) in FAMILIES.items()}


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def folder(name, folders):
    return folders[name]


def model_of(name, folder, **options):
    plugin, _, sizes, _ = FAMILIES[name]
    torch.manual_seed(0)
    return plugin(CPU, path=str(folder), **{"lora_rank": 2, "guidance": 1.0, **sizes, **options})


def drawn(model):
    return pictures(model, PROMPTS, SEEDS, ODE)


def trained(model):
    return [p for p in model.module.parameters() if p.requires_grad]


def gradient(model):
    """The LoRA's, of a fixed linear function of the score."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, *model.state_shape, generator=g)
    score = model.score(x, torch.full((3,), 0.5), model.encode([PROMPTS[0]] * 3))
    return torch.autograd.grad((score * torch.randn(score.shape, generator=g)).sum(), trained(model))


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


# ---------------------------------------------------------------------------------------------- the network


def test_it_is_the_network_that_diffusers_quantises(kind, folders, monkeypatch):
    """Whose own loader refuses nf4 without a GPU, although bitsandbytes works."""
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        options = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    else:
        from diffusers.quantizers.bitsandbytes import bnb_quantizer

        monkeypatch.setattr(bnb_quantizer.BnB4BitDiffusersQuantizer, "validate_environment", lambda *a, **k: None)
        settings = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        options = {"quantization_config": BitsAndBytesConfig(**settings), "device_map": {"": "cpu"}}
    options |= {"subfolder": "transformer", "dtype": torch.float32}
    theirs = FluxTransformer2DModel.from_pretrained(folders["flux"], **options).train()
    pipe = FluxPipeline.from_pretrained(folders["flux"], transformer=theirs)
    pipe.set_progress_bar_config(disable=True)
    settings = dict(height=24, width=16, max_sequence_length=12, num_inference_steps=5, output_type="pt")
    images = [pipe(p, generator=g, **settings).images[0] for p, g in zip(PROMPTS, seeded(SEEDS), strict=True)]
    ours = drawn(model_of("flux", folders["flux"], quantize=kind))
    torch.testing.assert_close(ours, torch.stack(images), atol=1e-5, rtol=0)
    assert not torch.allclose(ours, drawn(model_of("flux", folders["flux"])), atol=1e-4)


def test_linear_layers_are_rounded_and_nothing_else(name, folder, monkeypatch):
    """Wherever in the network they are."""
    monkeypatch.setitem(quantised.ROUNDED, "int8", in_quarters)
    monkeypatch.setattr(condrl.models.latent, "check_quantize", lambda *options: None)
    whole, rounded = (model_of(name, folder, quantize=q).module for q in (None, "int8"))
    linears = {n for n, m in whole.named_modules() if isinstance(m, nn.Linear) and "lora" not in n}
    assert linears
    for key, weight in rounded.named_parameters():
        module, _, end = key.rpartition(".")
        own = whole.get_parameter(key)
        expected = (4 * own).round() / 4 if module in linears and end == "weight" else own
        assert torch.equal(weight, expected), key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_images_and_gradients_are_near_those_of_the_whole_network(dtype, kind, name, folder):
    models = [model_of(name, folder, dtype=dtype, quantize=q) for q in (None, kind)]
    for a, b in zip(*map(trained, models), strict=True):
        assert torch.equal(a, b)  # no random numbers are drawn for it
        assert b.dtype == torch.float32
    for model in models:
        perturb(model)
    whole, rounded = map(drawn, models)
    assert 0 < (rounded - whole).abs().max() < FURTHEST[kind]
    gradients = [flat(gradient(model)) for model in models]
    assert gradients[1].isfinite().all()
    assert torch.cosine_similarity(*gradients, dim=0) > LIKENESS[kind]
    torch.testing.assert_close(gradients[1].norm(), gradients[0].norm(), atol=0, rtol=0.1)


def test_every_layer_of_a_lora_gets_a_gradient_after_drawing(kind, folders):
    """bitsandbytes has another layout for drawing on some CPUs, from which there is no way back."""
    model = model_of("flux", folders["flux"], quantize=kind)
    perturb(model)
    before = gradient(model)
    drawn(model)
    after = gradient(model)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)
        assert b.abs().max() > 0


def test_gradients_are_the_same_with_checkpointing(kind, folders):
    found = []
    for checkpointing in (False, True):
        model = model_of("flux", folders["flux"], quantize=kind, gradient_checkpointing=checkpointing)
        perturb(model)
        found.append(gradient(model))
    torch.testing.assert_close(*found)


@pytest.mark.slow
def test_nf4_is_compiled_with_its_backward_pass(folders, monkeypatch):
    need("nf4")
    compiled = functools.partialmethod(nn.Module.compile, backend="aot_eager")  # inductor is slow, and the same to us
    monkeypatch.setattr(nn.Module, "compile", compiled)
    found = []
    for option in (False, True):
        model = model_of("flux", folders["flux"], quantize="nf4", compile=option)
        perturb(model)
        found.append(gradient(model))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def test_a_single_file_is_rounded_as_its_folder(kind, folders, tmp_path):
    file = write_single_file(folders["sd"], tmp_path / "model.safetensors")
    of_file = model_of("sd", file, single_file_config=str(folders["sd"]), quantize=kind)
    torch.testing.assert_close(drawn(of_file), drawn(model_of("sd", folders["sd"], quantize=kind)), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------- the LoRA


def test_roll_outs_do_not_merge_it(any_kind, folders):
    """Into rounded weights: then roll-outs and updates would differ by more than rounding in float32."""
    model = model_of("sd", folders["sd"], quantize=any_kind)
    perturb(model, 1e-4)  # less than a step of the rounding
    x, t, condition = torch.randn(2, *model.state_shape), torch.full((2,), 0.5), model.encode(PROMPTS[:2])
    with torch.no_grad():
        apart = model.score(x, t, condition)
        with model.merged():
            assert torch.equal(model.score(x, t, condition), apart)
        with model.reference():
            assert not torch.equal(model.score(x, t, condition), apart)


def test_it_is_saved_and_loaded_as_without(any_kind, name, folder, tmp_path):
    """The file is that of a whole network, and is refused where that network refuses it."""
    models = {place: model_of(name, folder, quantize=q) for place, q in {"whole": None, "rounded": any_kind}.items()}
    for place, model in models.items():
        perturb(model)
        model.save_adapter(tmp_path / place)
    one, other = (load_file(tmp_path / place / LORA_FILE) for place in models)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    again = model_of(name, folder, quantize=any_kind, lora=str(tmp_path / "whole"))
    torch.testing.assert_close(drawn(again), drawn(models["rounded"]), atol=1e-6, rtol=0)
    pipe = FAMILIES[name][3].from_pretrained(folder)
    pipe.load_lora_weights(tmp_path / "rounded", weight_name=LORA_FILE)
    theirs = getattr(pipe, models["whole"].prefix)
    names = lora_layers(theirs)
    assert names.keys() == lora_layers(models["whole"].module).keys()
    for n, layer in lora_layers(models["whole"].module).items():
        delta, expected = names[n].get_delta_weight("default_0"), layer.get_delta_weight("default")
        torch.testing.assert_close(delta, expected, atol=1e-6, rtol=0)


def test_one_of_another_width_is_refused(kind, folders, tmp_path):
    model_of("flux", folders["flux"]).save_adapter(tmp_path)
    other = flux_pipeline(tmp_path / "other", {"num_attention_heads": 4})
    with pytest.raises(UsageError, match=r"was made for another model: .* maps 16 to 16 features there, 32 to 32 here"):
        model_of("flux", other, quantize=kind, lora=str(tmp_path))


# ---------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_counts_what_is_held(dtype, kind, name, folder):
    """As planned from the shapes alone; of a whole network, what its weights are."""
    network = getattr(FAMILIES[name][0](CPU, path=str(folder), dtype=dtype, **FAMILIES[name][2]).load(), prefix(name))
    assert planned_bytes(network, None) == sum(p.numel() for p in network.parameters()) * getattr(torch, dtype).itemsize
    planned, shapes = planned_bytes(network, kind), [p.shape for p in network.parameters()]
    quantize_linears(network, kind, CPU)
    assert sum(held_bytes(p) for p in network.parameters()) == planned
    assert [shape_of(p) for p in network.parameters()] == shapes


def prefix(name):
    return FAMILIES[name][0].prefix


def test_a_run_says_what_its_network_holds(folders, tmp_path, monkeypatch):
    trainer = make_trainer(load_config([*FEW, f"model.path={folders['sd']}", f"run.dir={tmp_path}"]), [Row(0, "a cat")])
    monkeypatch.setattr(memory_module, "held_bytes", lambda weight: 2e9 if weight.requires_grad else 1e7)
    every = [p.requires_grad for p in trainer.policy.model.module.parameters()]
    expected = 2 * sum(every) + 0.01 * (len(every) - sum(every))
    none = Growth(0, 0)
    assert f"(the network's weights {expected:.2f}, the VAE's and text encoders' 0.0" in memory(
        trainer, Needs(none, none, none, none, none, 1)
    )


def test_the_bits_of_a_weight(kind):
    """A scale in float32 for 64 weights is half a bit of each of them; one with a zero point for 256 a sixth."""
    layer = nn.Sequential(nn.Linear(256, 128, bias=False)).requires_grad_(False)
    quantize_linears(layer, kind, CPU)
    bits = 8 * held_bytes(layer[0].weight) / (256 * 128)
    assert bits == {"int8": 8 + 40 / 256, "nf4": 4 + 32 / 64}[kind]


def test_what_the_backward_pass_keeps(kind):
    """nf4 unpacks a weight again for it; int8 keeps it in the network's precision, as docs/running.md says."""
    layer = nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 512, bias=False)).requires_grad_(False)
    quantize_linears(layer, kind, CPU)
    x = torch.ones(1, 512, requires_grad=True)
    with LiveBytes() as live:
        y = layer(x)
        held = live.now
    assert y.requires_grad
    weights = 2 * 4 * 512**2
    assert held > weights if kind == "int8" else held < weights / 50


@pytest.mark.parametrize(("quantize", "gb"), [(None, 23.803), ("int8", 11.920), ("nf4", 6.699)])
def test_the_published_flux(quantize, gb):
    assert weights_gb(published()["flux"], torch.bfloat16, quantize) == pytest.approx(gb, abs=5e-4)


def header(file):
    return re.match(r"(#.*\n)+", (ROOT / "configs" / "flux" / file).read_text("utf-8"))[0].replace("\n# ", " ")


def test_the_recipe_for_24_gb_states_the_sums_of_the_recipe_for_48():
    """Weights, VAE, LoRA with what learns it, and encoders or activations; int8 keeps a block's weights in bfloat16."""
    large, small = header("compressibility.yaml"), header("24gb.yaml")
    number = r"([\d.]+\d)"
    kept = rf"VAE has {number} GB, T5 {number} GB, CLIP {number} GB, .* {number} GB with gradients"
    vae, t5, clip, lora = map(float, re.search(kept, large).groups())
    image, block = map(float, re.search(rf"{number} GB are kept .* at most {number} GB while", large).groups())
    config = load_config([str(ROOT / "configs" / "flux" / f) for f in ("compressibility.yaml", "24gb.yaml")] + NEEDED)
    assert config.model["quantize"] == "nf4"
    found = {}
    for kind, extra in ((None, 0.0), ("nf4", 0.11), ("int8", 0.45)):
        weights = weights_gb(published()["flux"], torch.bfloat16, kind)
        common = weights + vae + lora
        found[kind] = common + t5 + clip, common + config.train.loss_batch * (image + block) + extra
        assert f"{weights:.1f} GB" in small or f"instead of {weights:.1f}" in small
    stated = [re.search(rf"{number} GB at most, .* and {number} GB with", text).groups() for text in (large, small)]
    stated.append(re.search(rf"int8 .*: 11.9 GB, and {number} and {number}\.", small).groups())
    for kind, numbers in zip((None, "nf4", "int8"), stated, strict=True):
        assert [round(gb) for gb in found[kind]] == [float(gb) for gb in numbers]
    host = weights_gb(published()["flux"], torch.bfloat16) + vae + t5 + clip
    assert f"The host needs {host:.0f} GB" in small


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("missing", PACKAGES)
def test_without_the_package_it_is_one_line_before_anything_is_loaded(missing, monkeypatch):
    package, extra = PACKAGES[missing]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = f"config model.quantize: {missing} needs {package}: pip install 'condrl[{extra}]'"
    with pytest.raises(UsageError) as error:
        StableDiffusion(CPU, path="nowhere.safetensors", quantize=missing)
    assert str(error.value) == line


def test_a_device_without_kernels_is_one_line(kind, monkeypatch):
    """And what works leaves no trace."""
    state = torch.random.get_rng_state()
    check_quantize(kind, torch.bfloat16, CPU)
    assert torch.equal(torch.random.get_rng_state(), state)

    def broken(layer, device):
        raise RuntimeError("no kernel\nfor this card")

    monkeypatch.setitem(quantised.ROUNDED, kind, broken)
    with pytest.raises(UsageError, match=rf"^config model\.quantize: {kind} does not work on the device cpu here .*no"):
        StableDiffusion(CPU, path="nowhere.safetensors", quantize=kind)


def test_what_it_does_not_go_with(any_kind, folders, tmp_path):
    with pytest.raises(UsageError, match=r"model\.quantize: does not work with FSDP"):
        model_of("flux", folders["flux"], quantize=any_kind).shard()
    words = [f"run.dir={tmp_path}", "model.quantize=nf4", "rewards.brightness.weight=1"]
    for dtype in ("null", "auto"):
        check_combination(load_config([*words, f"train.rollout_dtype={dtype}"]))
    for dtype in ("bfloat16", "float16"):
        with pytest.raises(UsageError, match=r"^config train\.rollout_dtype: layers of model\.quantize compute in"):
            check_combination(load_config([*words, f"train.rollout_dtype={dtype}"]))


def test_int8_is_not_compiled():
    with pytest.raises(UsageError, match=r"^config model\.compile: does not work with int8 weights"):
        StableDiffusion(CPU, path="nowhere.safetensors", quantize="int8", compile=True)


# ---------------------------------------------------------------------------------------------- runs


RUN = """
model: {lora_rank: 2, height: 24, width: 16, t5_tokens: 12, guidance: 1.0, name: flux}
algorithm: {name: grpo}
sampler: {name: flow_sde, steps: 3}
rewards: {brightness: {}}
train: {prompts_per_epoch: 2, images_per_prompt: 4, rollout_batch: 8, updates_per_epoch: 2, loss_batch: 8, lr: 0.3}
run: {checkpoint_seconds: 0}
"""


@pytest.mark.slow
def test_a_run_has_ratios_of_one_and_resumes_to_the_bit(any_kind, folders, tmp_path):
    """Ratios are checked by the run; what it exports merged is the whole base with the LoRA in it."""
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "prompts.txt").write_text("a red star\na blue circle\n")
    words = [str(tmp_path / "run.yaml"), f"model.path={folders['flux']}", f"model.quantize={any_kind}"]
    for place, epochs in (("whole", 2), ("parts", 1), ("parts", 2)):
        more = [f"prompts.train={tmp_path}/prompts.txt", f"run.dir={tmp_path / place}", f"train.epochs={epochs}"]
        assert finetune.main([*words, *more, "run.resume=auto"]) == 0
    for file in ("metrics.jsonl", f"lora/{LORA_FILE}"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()
    assert export.main([str(tmp_path / "whole"), "--to", "merged"]) == 0
    merged = FluxTransformer2DModel.from_pretrained(tmp_path / "whole" / "export" / "merged", subfolder="transformer")
    whole = model_of("flux", folders["flux"], lora=str(tmp_path / "whole" / "lora"))
    x, t, condition = torch.randn(2, *whole.state_shape), torch.full((2,), 0.5), whole.encode(PROMPTS[:2])
    with torch.no_grad():
        expected = whole.score(x, t, condition)
        base = model_of("flux", folders["flux"])
        assert not torch.allclose(base.score(x, t, base.encode(PROMPTS[:2])), expected, atol=1e-3)
        whole.module = merged
        torch.testing.assert_close(whole.score(x, t, condition), expected, atol=1e-5, rtol=1e-5)


def test_the_benchmark_counts_its_weights_and_operations(kind, folders, monkeypatch, tmp_path):
    """As of the whole network, where a weight has as many operations however it is packed."""
    monkeypatch.setattr(benchmark, "peak_flops", lambda device, dtype: 1e12)
    found = {}
    for quantize in ("null", kind):
        words = [f"model.path={folders['flux']}", "model.name=flux", "model.height=24", "model.width=16"]
        words += ["model.t5_tokens=12", f"model.quantize={quantize}", f"run.dir={tmp_path}", "model.lora_rank=2"]
        args = benchmark.parse(["shapes", "--batch", "2", "--steps", "1", "--repeats", "0", *words])
        config = load_config([*benchmark.settings(args, None), *words])
        trainer = benchmark.make(config, None)
        found[quantize] = benchmark.flops(trainer)
        frozen = (shape_of(p).numel() for p in trainer.policy.model.module.parameters() if not p.requires_grad)
        found[f"{quantize} weights"] = sum(frozen)
    assert found[kind] == found["null"]
    assert found[f"{kind} weights"] == found["null weights"]
