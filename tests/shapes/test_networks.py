"""The flow-matching networks: what trains them is what diffusers' pipeline makes of their folder, and it resumes."""

import argparse
import json
import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from drawing import CPU, SEEDS, pictures
from helpers import load_script
from safetensors.torch import load_file
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from condrl.diffusion.noise import seeded
from condrl.io.files import locate
from condrl.plugins.models.sd3 import SD3
from condrl.prompts import load_prompts
from condrl.shapes.networks import FLOW_TOKENS, make_tokenizer, make_transformer

SHAPES = locate("asset:shapes")
PROMPTS = ["a red star", "two small blue circles", "a cyan square left of a large black star"]
ODE = {"name": "ddim", "steps": 4, "spacing": None, "eta": 0.0}


@pytest.fixture(scope="module")
def pretrain():
    return load_script("pretrain_shapes")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def arguments(work, **options):
    plain = dict(work=work, start=None, out=work / "out", steps=None, batch=16, lr=None, scenes=64)
    return argparse.Namespace(**{**plain, **options})


def tokens_of(tokenizer, prompts):
    return tokenizer(prompts, padding="max_length", max_length=FLOW_TOKENS, return_tensors="pt").input_ids


def perturbed(network, scale=0.1):
    """With weights for which every part matters."""
    torch.manual_seed(0)
    for weight in network.parameters():
        weight.data += scale * torch.randn_like(weight)
    return network


@pytest.fixture
def nets(pretrain, tokenizer):
    found, _ = pretrain.make_flow(tokenizer, SHAPES)
    for name in ("transformer", "text_encoder_2"):
        perturbed(found[name])
    perturbed(found["text_encoder"].text_projection)
    return found


def trained(pretrain, work, steps, rate=2e-3, begin="flow"):
    pretrain.flow(arguments(work), begin, steps, lambda step: rate)
    return torch.load(work / f"{begin}.pt", weights_only=True)


@pytest.fixture(scope="module")
def work(pretrain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    trained(pretrain, folder, 12)
    return folder


@pytest.fixture(scope="module")
def exported(pretrain, work):
    """With a scale at which weights of a few steps make images that differ."""
    state = torch.load(work / "flow.pt", weights_only=True)
    torch.manual_seed(0)
    for key, value in state["average"].items():
        if key.startswith("module.transformer") and value.dim():
            value += 0.1 * torch.randn_like(value)
    torch.save(state, work / "flow.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "FLOW", {})  # which would draw 512 images for each of its runs
        pretrain.export_flow(arguments(work))
    return work / "out"


# ---------------------------------------------------------------------------------------------- training


def test_no_prompt_is_cut(tokenizer):
    for name in ("train", "heldout", "validation"):
        prompts = [row.prompt for row in load_prompts(str(SHAPES / f"{name}.txt"), "prompts")]
        whole = tokenizer(prompts).input_ids
        assert tokenizer(prompts, max_length=FLOW_TOKENS, truncation=True).input_ids == whole
        assert max(map(len, whole)) == FLOW_TOKENS


def test_it_says_nothing_before_it_is_trained():
    x = torch.randn(2, 4, 8, 8)
    assert not make_transformer()(x, torch.randn(2, 5, 128), torch.randn(2, 64), torch.rand(2)).sample.any()


@pytest.mark.parametrize("count", [1, 3, 256])
def test_one_zero_with_a_mask_stands_for_many(count, pretrain, nets, tokenizer):
    features, pooled = pretrain.text_features(
        [nets["text_encoder"], nets["text_encoder_2"]], tokens_of(tokenizer, PROMPTS)
    )
    x, t, network = torch.randn(3, 4, 8, 8), torch.tensor([30.0, 500.0, 999.0]), nets["transformer"]
    mask = torch.zeros(1, pretrain.IMAGE_TOKENS + features.shape[1])
    mask[0, -1] = math.log(count)
    one = network(x, features, pooled, t, joint_attention_kwargs={"attention_mask": mask}).sample
    network.set_attn_processor(JointAttnProcessor2_0())
    many = network(x, functional.pad(features, (0, 0, 0, count - 1)), pooled, t).sample
    torch.testing.assert_close(one, many, atol=2e-5, rtol=0)
    if count > 1:
        assert (network(x, features, pooled, t).sample - many).abs().max() > 1e-2


@pytest.mark.parametrize("zeros", [1, 256])
def test_the_loss_is_of_the_velocity_at_the_scheduler_s_times(zeros, pretrain, nets, tokenizer):
    """A network that knows the clean latents says (x - clean) / t, and is never wrong."""
    clean, seen = torch.randn(4096, 4, 1, 1), []

    def knowing(x, features, pooled, time, joint_attention_kwargs):
        seen.append((time, joint_attention_kwargs["attention_mask"]))
        return SimpleNamespace(sample=(x - clean) / (time / 1000)[:, None, None, None])

    tokens = tokens_of(tokenizer, [""]).expand(4096, -1)[:, :2]
    found = pretrain.flow_loss({**nets, "transformer": knowing}, clean, tokens, zeros)
    assert found.item() == pytest.approx(0, abs=1e-6)
    ((time, mask),) = seen
    assert mask[0, -1] == pytest.approx(math.log(zeros))
    assert not mask[0, :-1].any()
    assert time.mean() / 1000 == pytest.approx(1.5 - 0.75 * math.log(3), abs=0.015)  # of 3 u / (1 + 2 u), u uniform


@pytest.mark.slow
def test_training_lowers_the_loss_and_leaves_the_text_encoder(pretrain, tokenizer, work, tmp_path):
    steps = 30
    (tmp_path / "latents_64_1_7_2.pt").write_bytes((work / "latents_64_1_7_2.pt").read_bytes())
    state = trained(pretrain, tmp_path, steps)
    nets, average = pretrain.make_flow(tokenizer, SHAPES)
    before = {key: value.clone() for key, value in nets.state_dict().items()}
    clean = torch.load(tmp_path / "latents_64_1_7_2.pt", weights_only=True).float() * 0.5449006021468749
    tokens = tokens_of(tokenizer, [""]).expand(64, -1)
    losses = []
    for weights in (None, state["nets"]):
        if weights:
            nets.load_state_dict(weights)
        torch.manual_seed(1)
        losses.append(pretrain.flow_loss(nets, clean, tokens, 1).item())
    assert losses[0] == pytest.approx(1 + clean.square().mean().item(), abs=0.06)  # it says 0
    assert losses[1] < 0.9 * losses[0]
    average.load_state_dict(state["average"])
    assert average.n_averaged == steps
    for key, value in nets.state_dict().items():
        same = key.startswith("text_encoder.text_model") or key.endswith("pos_embed.pos_embed")
        if value.is_floating_point() and not key.endswith("k_proj.bias"):  # which cancels in the softmax
            assert torch.equal(value, before[key]) == same, key


@pytest.mark.slow
def test_it_goes_on_as_if_it_had_not_stopped(pretrain, work, tmp_path):
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "latents_64_1_7_2.pt").write_bytes((work / "latents_64_1_7_2.pt").read_bytes())
    whole = trained(pretrain, tmp_path / "one", 6)
    trained(pretrain, tmp_path / "two", 3)
    parts = trained(pretrain, tmp_path / "two", 6)
    assert parts["step"] == whole["step"] == 6
    for name in ("nets", "average"):
        assert all(torch.equal(value, whole[name][key]) for key, value in parts[name].items())


@pytest.mark.slow
def test_cooling_begins_with_a_copy_and_ends_without_a_rate(pretrain, work, tmp_path, monkeypatch):
    (tmp_path / "latents_64_1_7_2.pt").write_bytes((work / "latents_64_1_7_2.pt").read_bytes())
    begun = trained(pretrain, tmp_path, 3)
    rates, set_lr = [], pretrain.set_lr
    monkeypatch.setattr(pretrain, "set_lr", lambda optimizer, lr: (rates.append(lr), set_lr(optimizer, lr)))
    pretrain.cool_flow(arguments(tmp_path, steps=4, lr=8e-4))
    assert rates == pytest.approx([8e-4, 6e-4, 4e-4, 2e-4])
    cooled = torch.load(tmp_path / "flow_cool.pt", weights_only=True)
    assert (cooled["begun"], cooled["step"]) == (3, 7)
    again = torch.load(tmp_path / "flow.pt", weights_only=True)
    assert all(torch.equal(value, again["nets"][key]) for key, value in begun["nets"].items())


# ---------------------------------------------------------------------------------------------- export


def plain(folder, **parts):
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_what_is_read_of_a_prompt_is_what_diffusers_reads(pretrain, exported, tokenizer):
    pipe = plain(exported)
    features, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, None, 1, False, max_sequence_length=1)
    ours = pretrain.text_features([pipe.text_encoder, pipe.text_encoder_2], tokens_of(tokenizer, PROMPTS))
    torch.testing.assert_close(ours, (features, pooled), atol=0, rtol=0)
    assert features.shape[1] == FLOW_TOKENS + 1


@pytest.mark.slow
@pytest.mark.parametrize(("zeros", "t5"), [(1, False), (256, True)])
def test_its_images_are_those_of_diffusers_with_its_t5_and_without(zeros, t5, exported):
    model = SD3(CPU, path=str(exported), t5=t5, t5_tokens=zeros, guidance=1.0, lora_rank=2)
    pipes = [plain(exported), plain(exported, text_encoder_3=None, tokenizer_3=None)]
    for pipe in pipes:
        options = dict(guidance_scale=1.0, max_sequence_length=zeros, num_inference_steps=4, output_type="pt")
        expected = [pipe(p, generator=g, **options).images[0] for p, g in zip(PROMPTS, seeded(SEEDS), strict=True)]
        assert (expected[0] - expected[1]).abs().max() > 0.1
        torch.testing.assert_close(pictures(model, PROMPTS, SEEDS, ODE), torch.stack(expected), atol=2e-5, rtol=0)


def test_what_is_exported(pretrain, exported, work, tokenizer):
    """The running average, with VAE and text encoder as they were, in a folder of less than 8 MB."""
    average = torch.load(work / "flow.pt", weights_only=True)["average"]
    network = load_file(exported / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, average[f"module.transformer.{key}"].half()) for key, value in network.items())
    vae = "vae/diffusion_pytorch_model.safetensors"
    before, after = load_file(SHAPES / vae), load_file(exported / vae)
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert sum(file.stat().st_size for file in exported.rglob("*") if file.is_file()) < 8e6
    history = json.loads((exported / "training.json").read_text("utf-8"))
    assert history["flow"]["samples"] == 12 * 16
    assert history["unet"] == json.loads((SHAPES / "training.json").read_text("utf-8"))["unet"]


def test_its_first_text_encoder_says_what_the_unet_s_does(exported, tokenizer):
    """In another scale before the last norm, of which features have size 1."""
    theirs = CLIPTextModel.from_pretrained(SHAPES / "text_encoder")
    ours = CLIPTextModelWithProjection.from_pretrained(exported / "text_encoder")
    tokens = tokens_of(tokenizer, PROMPTS)
    expected, found = (encoder(tokens, output_hidden_states=True) for encoder in (theirs, ours))
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, atol=2e-3, rtol=2e-3)
    features = found.hidden_states[-2]
    torch.testing.assert_close(32 * features, expected.hidden_states[-2], atol=0.05, rtol=2e-3)
    assert 0.5 < features.std() < 2


def test_training_can_begin_with_an_exported_flow(pretrain, exported, work, tokenizer):
    nets, _ = pretrain.make_flow(tokenizer, exported)
    average = torch.load(work / "flow.pt", weights_only=True)["average"]
    for key, value in nets.state_dict().items():
        assert torch.equal(value, average[f"module.{key}"].half().float().to(value.dtype)), key
