"""Where a latent model's parts are, and what is kept of its prompts."""

import contextlib
import gc
import weakref

import pytest
import torch
from drawing import CPU, PROMPTS, SEEDS, pictures

from condrl import UsageError
from condrl.models.latent import kept_on_host
from condrl.plugins.models.stable_diffusion import StableDiffusion

META = torch.device("meta")  # stands in for a GPU: weights there are not on the host


def places(network):
    return {p.device.type for p in network.parameters()}


def images_and_gradient(model):
    """Drawn, encoded again, and the gradient of their squares by the latents."""
    drawn = pictures(model, PROMPTS, SEEDS)
    x = model.encode_images(drawn).requires_grad_()
    (gradient,) = torch.autograd.grad(model.decode(x).square().sum(), x)
    return drawn, x.detach(), gradient


def test_a_vae_off_the_device_draws_the_same(pipeline):
    """It is whole on no device, before and after, also where its gradient is taken later."""
    found = []
    for offload in (False, True):
        torch.manual_seed(0)
        model = StableDiffusion(CPU, path=str(pipeline), offload_vae=offload, decode_batch=2)
        with torch.no_grad():
            before = places(model.vae)
        found.append(images_and_gradient(model))
        assert before == places(model.vae) == {"meta" if offload else "cpu"}
    for plain, offloaded in zip(*found, strict=True):
        assert torch.equal(plain, offloaded)


def test_a_vae_is_kept_on_the_host(pipeline):
    """Its weights are not lost in between; what it decodes is on the device."""
    model = StableDiffusion(META, path=str(pipeline), offload_vae=True)
    layer = model.vae.decoder.conv_in
    host = layer._hf_hook.weights_map["weight"]
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(layer.weight.device.type))
    assert model.decode(torch.zeros(1, *model.state_shape, device=META)).device == META
    assert seen == ["meta"]
    assert host.device == CPU
    assert torch.equal(host, StableDiffusion(CPU, path=str(pipeline)).vae.decoder.conv_in.weight)


def test_a_network_that_will_be_sharded_stays_on_the_host(pipeline):
    """With its LoRA; the VAE does not, and the next network does not."""
    with kept_on_host():
        model = StableDiffusion(META, path=str(pipeline))
    assert places(model.module) == {"cpu"}
    assert places(model.vae) == {"meta"}
    for left in (contextlib.nullcontext(), kept_on_host(False)):
        with left:
            assert places(StableDiffusion(META, path=str(pipeline)).module) == {"meta"}


def test_a_layout_is_refused_where_weights_are_spread(pipeline):
    with pytest.raises(UsageError, match=r"model\.memory_format: does not work with FSDP: leave it out"):
        StableDiffusion(CPU, path=str(pipeline), memory_format="channels_last").shard()


def test_the_host_keeps_as_many_prompts_as_it_is_told_to(pipeline):
    """The others are encoded again, alike."""
    found, counts = [], []
    for gb in (1.0, 0.0):
        model = StableDiffusion(CPU, path=str(pipeline), embeddings_gb=gb)
        model.encode_prompts, calls = counting(model.encode_prompts)
        for prompt in (*PROMPTS, *PROMPTS):
            found.append(model.embeddings(model.encode([prompt]))[0])
        counts.append(calls)
    assert counts == [[1] * 3, [1] * 6]
    assert all(torch.equal(x, y) for x, y in zip(found[:6], found[6:], strict=True))
    assert len(StableDiffusion(CPU, path=str(pipeline), embeddings_gb=1e300).encode(["a red star"])) == 1
    with pytest.raises(UsageError, match=r"model\.embeddings_gb: must be at least 0, got -1"):
        StableDiffusion(CPU, path="nowhere", embeddings_gb=-1.0)


def test_text_encoders_are_let_go_when_every_prompt_is_read(pipeline):
    """The host has their memory back, images are the same, and a prompt that comes later is refused."""
    model = StableDiffusion(CPU, path=str(pipeline))
    before = pictures(model, PROMPTS, SEEDS)
    encoder = weakref.ref(model.pipe.text_encoder)
    model.drop_encoders()
    gc.collect()
    assert encoder() is None
    assert torch.equal(pictures(model, PROMPTS, SEEDS), before)
    with pytest.raises(
        UsageError, match="release_encoders: the prompt 'a later one' came when the text encoders had been"
    ):
        model.embeddings(model.encode(["a later one"]))


def test_text_encoders_are_kept_where_there_is_no_room_for_what_they_encode(pipeline):
    model = StableDiffusion(CPU, path=str(pipeline), embeddings_gb=1e-5)
    model.encode(PROMPTS)
    with pytest.raises(
        UsageError, match=r"release_encoders: 4 encoded prompts take \S+ GB, more than .*embeddings_gb=1e-05"
    ):
        model.drop_encoders()
    assert model.pipe.text_encoder is not None


def counting(encode):
    calls = []
    return lambda prompts: calls.append(len(prompts)) or encode(prompts), calls
