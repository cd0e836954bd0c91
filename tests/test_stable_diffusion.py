import pytest
import torch
from diffusers import StableDiffusionPipeline
from drawing import CPU, PROMPTS, SEEDS, diffusers_pictures, perturb, pictures
from helpers import tiny_pipeline
from safetensors.torch import load_file

from condrl import RunError, UsageError
from condrl.models.stable_diffusion import StableDiffusion, load_pipeline
from condrl.report import to_pil


@pytest.mark.parametrize("which", ["pipeline", "v_pipeline"])
def test_samples_are_those_of_a_diffusers_pipeline(which, request):
    folder = request.getfixturevalue(which)
    ours = pictures(StableDiffusion(CPU, path=str(folder)), PROMPTS, SEEDS)
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert (ours - diffusers_pictures(pipe, PROMPTS, SEEDS)).abs().max() < 1 / 255


def test_reference_is_the_base_model(model, pipeline):
    perturb(model)
    tuned = pictures(model, PROMPTS, SEEDS)
    with model.reference():
        base = pictures(model, PROMPTS, SEEDS)
    torch.testing.assert_close(base, pictures(StableDiffusion(CPU, path=str(pipeline)), PROMPTS, SEEDS))
    assert torch.equal(pictures(model, PROMPTS, SEEDS), tuned)
    assert not torch.allclose(base, tuned, atol=0.05)


def test_merged_is_the_same_function_and_leaves_nothing_behind(pipeline):
    model = StableDiffusion(CPU, path=str(pipeline), lora_rank=4, lora_alpha=10)
    perturb(model)
    weights = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    x, t, condition = score_inputs(model)
    with torch.no_grad():
        apart = model.score(x, t, condition)
        with model.merged():
            together = model.score(x, t, condition)
            assert any(not torch.equal(p, weights[name]) for name, p in model.module.named_parameters())
        assert torch.equal(model.score(x, t, condition), apart)
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(p, weights[name]) for name, p in model.module.named_parameters())


def score_inputs(model, prompts=("a red star", "a blue circle")):
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 8, 8, generator=g), torch.tensor([0.3, 0.9]), model.encode(list(prompts))


def test_guidance_in_one_call_is_that_of_two(model):
    x, t, condition = score_inputs(model)
    guided = model.score(x, t, condition)
    model.guidance = 1.0
    conditional, unconditional = model.score(x, t, condition), model.score(x, t, model.encode([""] * 2))
    torch.testing.assert_close(guided, unconditional + 5 * (conditional - unconditional), atol=1e-4, rtol=1e-4)
    assert model.evaluations == 4 + 2 + 2


def test_gradient_through_the_conditional_branch_only(model):
    perturb(model)
    x, t, condition = score_inputs(model)
    weights = [p for p in model.module.parameters() if p.requires_grad]

    def gradient():
        return torch.cat([g.flatten() for g in torch.autograd.grad(model.score(x, t, condition).sum(), weights)])

    both, full = gradient(), model.score(x, t, condition)
    model.guidance_gradient = "conditional"
    conditional_only = gradient()
    assert torch.equal(model.score(x, t, condition), full)
    model.guidance = 1.0
    conditional, unconditional = gradient(), None
    condition = model.encode([""] * 2)
    unconditional = gradient()
    torch.testing.assert_close(conditional_only, 5 * conditional, atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(both, 5 * conditional - 4 * unconditional, atol=1e-2, rtol=1e-3)


def test_only_the_lora_of_the_unet_is_trained_in_float32(pipeline):
    model = StableDiffusion(CPU, path=str(pipeline), dtype="bfloat16", lora_rank=3, lora_targets=("to_q", "ff.net.2"))
    trained = {n: p for n, p in model.module.named_parameters() if p.requires_grad}
    assert trained
    assert all(
        "lora" in n and ("to_q" in n or "ff.net.2" in n) and p.dtype == torch.float32 for n, p in trained.items()
    )
    assert {p.dtype for n, p in model.module.named_parameters() if n not in trained} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.vae.parameters())
    assert pictures(model, PROMPTS, SEEDS).dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_base_draws_nearly_the_same(pipeline, dtype):
    full = pictures(StableDiffusion(CPU, path=str(pipeline), guidance=1.0), PROMPTS, SEEDS)
    half = pictures(StableDiffusion(CPU, path=str(pipeline), guidance=1.0, dtype=dtype), PROMPTS, SEEDS)
    assert (full - half).abs().mean() < 0.02


def test_gradient_checkpointing_changes_no_gradient(pipeline):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = StableDiffusion(CPU, path=str(pipeline), gradient_checkpointing=checkpointing)
        perturb(model)
        x, t, condition = score_inputs(model)
        weights = [p for p in model.module.parameters() if p.requires_grad]
        gradients.append(torch.autograd.grad(model.score(x, t, condition).square().sum(), weights))
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-4, atol=1e-4)


def test_decode_in_slices_is_decode_and_is_differentiable(model):
    x = torch.randn(5, 4, 8, 8, requires_grad=True)
    whole = model.decode(x)
    model.decode_batch = 2
    torch.testing.assert_close(model.decode(x), whole, atol=1e-5, rtol=1e-5)
    assert whole.shape == (5, 3, 16, 16)
    assert whole.min() >= 0
    assert whole.max() <= 1
    (gradient,) = torch.autograd.grad(whole.sum(), x)
    assert gradient.abs().sum() > 0


def test_text_encoder_is_released(model):
    rows = model.encode(["a red star", "a red star", "a blue star"])
    assert rows[0] == rows[1] != rows[2]
    model.finish_encoding()
    assert torch.equal(model.encode(["a blue star"]), rows[2:])
    with pytest.raises(RunError, match="a green star"):
        model.encode(["a green star"])


def test_single_file_checkpoint(pipeline, tmp_path):
    """An original-layout .safetensors file, written by diffusers' own key map backwards, loads to the same UNet."""
    from single_file import write_single_file

    file = write_single_file(pipeline, tmp_path / "model.safetensors")
    ours = pictures(StableDiffusion(CPU, path=str(file), single_file_config=str(pipeline)), PROMPTS, SEEDS)
    theirs = pictures(StableDiffusion(CPU, path=str(pipeline)), PROMPTS, SEEDS)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_bad_paths_and_targets_are_one_line(pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match=r"model.path.*nobody/nothing"):
        StableDiffusion(CPU, path="nobody/nothing")
    with pytest.raises(UsageError, match="to_qq"):
        StableDiffusion(CPU, path=str(pipeline), lora_targets=("to_qq",))


def test_written_png_is_the_image(model, tmp_path):
    image = pictures(model, PROMPTS[:1], [0])[0]
    to_pil(image).save(tmp_path / "x.png")
    import numpy as np
    from PIL import Image

    back = torch.from_numpy(np.asarray(Image.open(tmp_path / "x.png")).copy()).permute(2, 0, 1) / 255
    assert (back - image).abs().max() <= 0.5 / 255 + 1e-6


def test_pickled_weights_are_refused(tmp_path):
    pipe = tiny_pipeline(tmp_path)
    (weights,) = (pipe / "unet").glob("*.safetensors")
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(UsageError, match=r"model\.path: cannot load"):
        load_pipeline(str(pipe), None, None, torch.float32)
