"""How a LoRA is computed on a network in half precision."""

import pytest
import torch
from drawing import CPU, perturb

from condrl.models.adapter import in_precision_of_input
from condrl.models.lora import lora_layers
from condrl.plugins.models.stable_diffusion import StableDiffusion

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "conv2", "time_emb_proj")
HALF = ("bfloat16", "float16")


def model_of(pipeline, dtype):
    model = StableDiffusion(CPU, path=str(pipeline), lora_rank=2, lora_alpha=3, lora_targets=TARGETS, dtype=dtype)
    perturb(model)
    return model


def as_in_peft(model):
    """With peft's own layers, which compute in the precision of the LoRA's weights, float32."""
    for layer in lora_layers(model.module).values():
        layer.__class__ = layer.__class__.__mro__[2]
    return model


def output_and_gradients(model):
    """Also the bytes of float32 numbers that the backward pass keeps for itself."""
    kept: dict[int, int] = {}
    own = {weight.data_ptr() for weight in model.module.parameters()}

    def keep(x):
        if x.dtype == torch.float32 and x.data_ptr() not in own:
            kept[x.data_ptr()] = x.nbytes
        return x

    g = torch.Generator().manual_seed(1)
    x, t = torch.randn(4, 4, 8, 8, generator=g), torch.full((4,), 0.5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        output = model.predict(x, t, model.encode(["a red star"] * 4))
    output.square().sum().backward()
    gradients = [weight.grad for weight in model.module.parameters() if weight.requires_grad]
    return output.detach(), torch.cat([gradient.flatten() for gradient in gradients]), sum(kept.values())


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("dtype", HALF)
def test_it_is_as_far_from_float32_as_in_peft(dtype, pipeline):
    exact, exact_gradient, _ = output_and_gradients(model_of(pipeline, "float32"))
    output, gradient, kept = output_and_gradients(model_of(pipeline, dtype))
    other, other_gradient, kept_by_peft = output_and_gradients(as_in_peft(model_of(pipeline, dtype)))
    assert apart(output, exact) < 1.1 * apart(other, exact) + 1e-4
    assert apart(gradient, exact_gradient) < 1.2 * apart(other_gradient, exact_gradient) + 1e-4
    assert apart(output, other) > 0
    assert kept < 0.5 * kept_by_peft


@pytest.mark.parametrize("dtype", HALF)
def test_each_layer_is_computed_once_rounded(dtype, pipeline):
    """What a layer adds to its network's own is B A x, scaled, to the rounding of the sum."""
    model, seen = model_of(pipeline, dtype), []
    hooks = [
        layer.register_forward_hook(lambda own, args, found: seen.append((own, args[0], found)))
        for layer in lora_layers(model.module).values()
    ]
    with torch.no_grad():
        model.predict(torch.randn(2, 4, 8, 8), torch.full((2,), 0.5), model.encode(["a red star"] * 2))
        for hook in hooks:
            hook.remove()
        assert len(seen) == len(hooks)
        assert {type(layer.get_base_layer()).__name__ for layer, *_ in seen} == {"Linear", "Conv2d"}
        for layer, x, found in seen:
            exact = type(layer).__mro__[2].forward(layer.float(), x.float())
            assert found.dtype == model.torch_dtype
            step = torch.finfo(found.dtype).eps
            assert apart(found.float(), exact) < step


def test_without_its_lora_a_network_is_what_it_was(pipeline):
    model = model_of(pipeline, "bfloat16")
    x, t = torch.randn(2, 4, 8, 8), torch.full((2,), 0.5)
    condition = model.encode(["a red star"] * 2)
    with torch.no_grad():
        tuned = model.predict(x, t, condition)
        with model.reference():
            base = model.predict(x, t, condition)
        model.module.delete_adapters("default")
        assert torch.equal(model.predict(x, t, condition), base)
    assert not torch.equal(tuned, base)


def test_float32_is_as_in_peft_to_the_bit(pipeline):
    for found, expected in zip(
        output_and_gradients(model_of(pipeline, "float32")),
        output_and_gradients(as_in_peft(model_of(pipeline, "float32"))),
        strict=True,
    ):
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))


def test_a_lora_takes_the_place_of_another(pipeline, tmp_path):
    """Of other modules: those that had one before are as without it."""
    other = StableDiffusion(CPU, path=str(pipeline), lora_rank=2, lora_targets=("to_q", "conv1"), dtype="bfloat16")
    perturb(other)
    other.save_adapter(tmp_path)
    model = model_of(pipeline, "bfloat16")
    model.fit_adapter(tmp_path)
    model.load_adapter(tmp_path)
    x, t = torch.randn(2, 4, 8, 8), torch.full((2,), 0.5)
    with torch.no_grad():
        expected = other.predict(x, t, other.encode(["a red star"] * 2))
        assert torch.equal(model.predict(x, t, model.encode(["a red star"] * 2)), expected)


def test_a_kind_of_layer_is_made_once():
    from peft.tuners.lora import Linear

    made = in_precision_of_input(Linear)
    assert issubclass(made, Linear)
    assert in_precision_of_input(Linear) is in_precision_of_input(made) is made
