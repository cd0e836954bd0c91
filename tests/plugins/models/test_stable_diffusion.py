import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from drawing import CPU, DDIM, PROMPTS, SEEDS, diffusers_pictures, perturb, pictures
from helpers import ROOT
from safetensors.torch import load_file, save_file
from torch.distributions import Normal, kl_divergence

from condrl import UsageError
from condrl.algorithms.examples import check_ratios
from condrl.diffusion.noise import seeded
from condrl.diffusion.path_kl import path_kl
from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import rollout, sample
from condrl.io.files import ASSETS
from condrl.loading import load_config
from condrl.models.embeddings import Embeddings
from condrl.models.loading import load_pipeline
from condrl.plugins.models.stable_diffusion import StableDiffusion
from condrl.prompts import Row
from condrl.rewards.pixels import to_pil
from condrl.training.build import make_sampler, make_trainer
from condrl.training.clock import Clock


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
            synchronized = model.score(x, t, condition)
            assert any(not torch.equal(p, weights[name]) for name, p in model.module.named_parameters())
        assert torch.equal(model.score(x, t, condition), apart)
    torch.testing.assert_close(synchronized, apart, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(p, weights[name]) for name, p in model.module.named_parameters())


def score_inputs(model, prompts=("a red star", "a blue circle")):
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 8, 8, generator=g), torch.tensor([0.3, 0.9]), model.encode(list(prompts))


def test_network_features_are_the_middle_blocks(model, pipeline):
    """Its mean over places, of the prompt's own branch; one evaluation an image, whatever the guidance."""
    perturb(model)
    seen, inputs = [], score_inputs(model)
    with model.module.mid_block.register_forward_hook(lambda *given: seen.append(given[-1])):
        found = model.network_features(*inputs)
    assert model.evaluations == 2
    assert found.shape == (2, 16)
    assert not found.requires_grad
    torch.testing.assert_close(found, seen[0].flatten(2).mean(2))
    assert torch.equal(model.network_features(*inputs), found)  # nothing is left behind
    assert not torch.allclose(model.network_features(*inputs[:2], inputs[2].flip(0)), found, atol=1e-3)
    with model.reference():
        base = model.network_features(*inputs)
    plain = StableDiffusion(CPU, path=str(pipeline))
    torch.testing.assert_close(base, plain.network_features(*score_inputs(plain)))
    assert not torch.allclose(base, found, atol=1e-3)


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


def test_single_file_checkpoint(pipeline, tmp_path):
    """An original-layout .safetensors file, written by diffusers' own key map backwards, loads to the same UNet."""
    from single_file import write_single_file

    file = write_single_file(pipeline, tmp_path / "model.safetensors")
    ours = pictures(StableDiffusion(CPU, path=str(file), single_file_config=str(pipeline)), PROMPTS, SEEDS)
    theirs = pictures(StableDiffusion(CPU, path=str(pipeline)), PROMPTS, SEEDS)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_bad_paths_and_options_are_one_line(pipeline, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for match, options in {
        r"model\.path.*nobody/nothing.*(no such file or folder|not on this machine)": {"path": "nobody/nothing"},
        r"model\.path: there is no file or folder models/my/sd15": {"path": "models/my/sd15"},
        r"model\.path: there is no file or folder sd15\.safetensors": {"path": "sd15.safetensors"},
        r"model\.path: there is no file or folder \./sd15": {"path": "./sd15"},
        r"model\.path: there is no file or folder asset:circles": {"path": "asset:circles"},
        "to_qq": {"lora_targets": ("to_qq",)},
        r"model\.lora_targets: it is empty": {"lora_targets": ()},
        r"model\.lora_targets: 'norm1' is .*norm1, a \w+Norm, which gets no LoRA": {"lora_targets": ("norm1",)},
        r"model\.lora_targets: 'attn1' is .*attn1, a Attention, which gets no": {"lora_targets": ("attn1",)},
        r"model\.lora_targets: '' is the network": {"lora_targets": ("",)},
        r"model\.revision: has no effect on a folder": {"revision": "main"},
        r"model\.single_file_config: has no effect on a folder": {"single_file_config": "nowhere"},
        r"model\.single_file_config: has no effect on a hub id": {"path": "a/b", "single_file_config": "nowhere"},
        r"model\.variant: has no effect on a file": {"path": __file__, "variant": "fp16"},
        r"model\.guidance.*at least 1.*got -3": {"guidance": -3.0},
        r"model\.guidance.*got 0\.5": {"guidance": 0.5},
        r"model\.guidance.*got nan": {"guidance": float("nan")},
        r"model\.negative_prompt: 'blurry' has no effect": {"guidance": 1.0, "negative_prompt": "blurry"},
        r"model\.lora_rank: must be at least 1": {"lora_rank": 0},
    }.items():
        with pytest.raises(UsageError, match=match) as found:
            StableDiffusion(CPU, **{"path": str(pipeline), **options})
        assert "\n" not in str(found.value)


def test_negative_prompt_is_the_unconditional_branch(pipeline):
    plain, negative = (StableDiffusion(CPU, path=str(pipeline), **o) for o in ({}, {"negative_prompt": "a blue star"}))
    pipe = StableDiffusionPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    theirs = diffusers_pictures(pipe, PROMPTS, SEEDS, negative_prompt="a blue star")
    assert (pictures(negative, PROMPTS, SEEDS) - theirs).abs().max() < 1 / 255
    assert (pictures(plain, PROMPTS, SEEDS) - theirs).abs().max() > 2 / 255


def test_written_png_is_the_image(model, tmp_path):
    image = pictures(model, PROMPTS[:1], [0])[0]
    to_pil(image).save(tmp_path / "x.png")
    import numpy as np
    from PIL import Image

    back = torch.from_numpy(np.asarray(Image.open(tmp_path / "x.png")).copy()).permute(2, 0, 1) / 255
    assert (back - image).abs().max() <= 0.5 / 255 + 1e-6


# ---------------------------------------------------------------------------------------------- zero terminal SNR


@pytest.fixture(scope="session")
def zero_snr(v_pipeline, tmp_path_factory):
    """A pipeline as its authors publish it after Lin et al. 2023: v-prediction, trailing, no signal at the start."""
    folder = shutil.copytree(v_pipeline, tmp_path_factory.mktemp("zero") / "model")
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    scheduler = DDIMScheduler.from_config(DDIMScheduler.load_config(v_pipeline, subfolder="scheduler"), **options)
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "DDIMScheduler"]}))
    return folder


def zero_policy(folder, eta, steps=5):
    model = StableDiffusion(CPU, path=str(folder), lora_rank=2)
    section = {"name": "ddim", "steps": steps, "spacing": None, "eta": eta}
    return Policy(model, make_sampler(section, model.schedule))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_rollout_from_pure_noise_is_diffusers(eta, zero_snr):
    policy = zero_policy(zero_snr, eta)
    assert policy.model.schedule.alpha(policy.sampler.times[0]) == 0
    ours = sample(policy, policy.model.encode(PROMPTS), seeded(SEEDS), 8)
    pipe = StableDiffusionPipeline.from_pretrained(zero_snr)
    pipe.set_progress_bar_config(disable=True)
    assert (pictures(policy.model, PROMPTS, SEEDS, {**DDIM, "eta": eta}) - policy.model.decode(ours)).abs().max() < 1e-6
    table = policy.model.schedule.alpha_bar  # in float32 diffusers' first step is off by the root of a rounding error
    torch.testing.assert_close(pipe.scheduler.alphas_cumprod.double(), table, atol=2e-6, rtol=0)
    pipe.scheduler.alphas_cumprod, pipe.scheduler.final_alpha_cumprod = table, table[0]
    theirs = [
        pipe(prompt, generator=g, num_inference_steps=5, eta=eta, guidance_scale=5.0, output_type="latent").images[0]
        for prompt, g in zip(PROMPTS, seeded(SEEDS), strict=True)
    ]
    torch.testing.assert_close(ours, torch.stack(theirs), atol=1e-5, rtol=1e-4)


def test_ratios_and_kl_of_a_chain_from_pure_noise(zero_snr):
    """Before an update every ratio is 1; after it, the KL of the first step is that of its two normal distributions."""
    policy = zero_policy(zero_snr, 1.0)
    found = rollout(policy, policy.model.encode(PROMPTS), torch.Generator().manual_seed(0), 2)
    for k in range(5):
        distribution = policy.transition(found.states[k], torch.full((3,), k), found.condition)
        torch.testing.assert_close(distribution.log_prob(found.states[k + 1]), found.log_probs[k], atol=2e-3, rtol=0)
    perturb(policy.model, 0.03)
    kl = path_kl(policy, found, 3).kl
    alpha, sigma = (
        c(policy.sampler.times[1]).float() for c in (policy.model.schedule.alpha, policy.model.schedule.sigma)
    )

    def clean():
        """x0 = -v of the guided network, by its own forward pass."""
        unet, x = policy.model.module, found.states[0]
        v = [
            unet(x, torch.tensor(999), policy.model.embeddings(rows)[0]).sample
            for rows in (policy.model.negative.expand(3), found.condition)
        ]
        return -(v[0] + 5 * (v[1] - v[0]))

    with torch.no_grad():
        tuned = Normal(alpha * clean(), sigma)
        with policy.model.reference():
            base = Normal(alpha * clean(), sigma)
    torch.testing.assert_close(kl[0], kl_divergence(tuned, base).flatten(1).sum(1), rtol=1e-3, atol=1e-6)
    assert kl[0].min() > 1e-4
    policy.transition(found.states[0], torch.zeros(3, dtype=torch.long), found.condition).mean.sum().backward()
    assert all(p.grad.isfinite().all() for p in policy.model.module.parameters() if p.requires_grad)


@pytest.mark.parametrize("algorithm", ["ctrl"])
def test_algorithms_that_need_a_score_there_are_refused(algorithm, zero_snr):
    few = [
        "train.prompts_per_epoch=1",
        "train.images_per_prompt=2",
        "train.rollout_batch=2",
        "train.updates_per_epoch=1",
    ]
    words = [str(ROOT / "configs" / "quickstart.yaml"), f"model.path={zero_snr}", f"algorithm.name={algorithm}", *few]
    config = load_config([*words, "sampler.steps=4"])
    with pytest.raises(
        UsageError, match=rf"{algorithm}, as configured, needs the score at every step.*sampler\.spacing=leading"
    ):
        make_trainer(config, [Row(0, "a red star")])
    make_trainer(load_config([*words, "sampler.spacing=leading"]), [Row(0, "a red star")])


# ---------------------------------------------------------------------------------------------- prompts


LONG = "a red star " * 30


@pytest.mark.parametrize("limit", [-1, 0, 2, "x"])
def test_a_tokenizer_that_leaves_nothing_of_a_prompt_is_refused(limit, pipeline, tmp_path):
    folder = copied(pipeline, tmp_path)
    settings = folder / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "model_max_length": limit}))
    with pytest.raises(UsageError, match="config model.path: .*max_length"):
        StableDiffusion(CPU, path=str(folder))


@pytest.mark.parametrize("limit", [True, False])
def test_a_prompt_that_is_cut_is_told_and_cut_as_diffusers_cuts_it(limit, pipeline, tmp_path, capsys):
    """Also for a tokenizer that does not say where to cut."""
    folder = copied(pipeline, tmp_path)
    if not limit:
        settings = folder / "tokenizer" / "tokenizer_config.json"
        settings.write_text(
            json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if k != "model_max_length"})
        )
    model = StableDiffusion(CPU, path=str(folder))
    capsys.readouterr()
    (short,) = model.encode(["a red star"])
    assert capsys.readouterr().err == ""
    (row, _) = model.encode([LONG, LONG])
    model.encode([LONG])
    assert (
        capsys.readouterr().err
        == f"warning: the prompt {LONG[:300]!r} ... has 92 tokens; the model reads the first 24\n"
    )
    pipe = StableDiffusionPipeline.from_pretrained(pipeline)
    theirs = [pipe.encode_prompt(prompt, CPU, 1, False)[0][0] for prompt in (LONG, "a red star")]
    torch.testing.assert_close(model.embeddings(torch.stack([row, short]))[0], torch.stack(theirs))


def test_all_prompts_that_are_cut_are_one_warning(pipeline, tmp_path, capsys):
    """Of a run, those that it trains on and the held-out ones, before its first epoch."""
    words = [
        str(ROOT / "configs" / "quickstart.yaml"),
        f"model.path={pipeline}",
        f"run.dir={tmp_path}",
        "model.lora_targets=[to_q]",
    ]
    train = [Row(i, prompt) for i, prompt in enumerate(["a red star", *(f"{LONG}{i}" for i in range(2500))])]
    trainer = make_trainer(load_config(words), train, [Row(0, f"{LONG}{7777}"), Row(1, "a blue star")])
    said = f"warning: the prompt {LONG[:300]!r} ..., the first of 2501 that are too long, has 93 tokens; the model reads the first 24\n"
    assert capsys.readouterr().err == said
    trainer.policy.model.encode([row.prompt for row in train])
    assert capsys.readouterr().err == ""


def counted(model):
    """The calls of the text encoder from now on, each as the number of prompts in it."""
    calls = []
    model.pipe.text_encoder.register_forward_hook(
        lambda module, inputs, output: calls.append(len(output.last_hidden_state))
    )
    return calls


@pytest.mark.slow
def test_prompts_are_encoded_alone_and_when_they_are_needed(model):
    calls = counted(model)
    condition = model.encode([f"a red star {i}" for i in range(1000)])
    assert calls == []
    x, t = torch.randn(3, 4, 8, 8), torch.full((3,), 0.5)
    model.score(x, t, condition[[4, 4, 7]])
    assert calls == [1, 1, 1]  # the negative prompt and two others
    table = model._table
    model.score(x, t, condition[[4, 4, 7]])  # the next step of a roll-out
    model.score(x, t, condition[[7, 4, 7]])  # a minibatch
    assert model._table is table
    model.features(condition[:70])
    assert calls == [1] * 71
    assert torch.equal(model.features(condition[:70]).to(x), model.features(condition[:1000])[:70])


def test_embeddings_beyond_the_bound_are_dropped_and_come_back_to_the_bit(model):
    """Neither the host nor the device holds more for a thousand prompts than for some; company changes no bit."""
    condition = model.encode([f"{colour} star {i}" for i in range(50) for colour in ("a red", "two very large blue")])
    first = torch.cat([model.embeddings(row[None])[0] for row in condition])
    one = first[0].nbytes
    model._host_embeddings = Embeddings(model._encoded, most=20 * one)
    calls = counted(model)
    for part in condition.split(16):
        assert torch.equal(model.embeddings(part)[0], first[part - condition[0]])
        assert model._table[0].nbytes == len(part) * one
        assert model._host_embeddings.bytes <= 20 * one
    assert len(calls) == 100
    assert torch.equal(model.embeddings(condition[-16:])[0], first[-16:])
    assert len(calls) == 100  # the last ones are still there
    assert torch.equal(model.embeddings(condition.flip(0))[0], first.flip(0))  # more at once than there is room for
    assert model._host_embeddings.bytes <= 20 * one


def test_the_text_encoder_is_on_the_device_only_while_it_encodes(model, monkeypatch):
    encoder, places = model.pipe.text_encoder, []
    monkeypatch.setattr(encoder, "to", lambda device: places.append(torch.device(device)))
    encoder.register_forward_hook(lambda *_: places.append("encodes"))
    model.device = torch.device("cpu", 0)
    model.embeddings(model.encode(["a red star", "a blue star"]))
    assert places == [torch.device("cpu", 0), "encodes", "encodes", torch.device("cpu")]


def test_roll_outs_alone_can_be_rounded(pipeline):
    """What is evaluated is not, and no weight changes its precision."""
    model = StableDiffusion(CPU, path=str(pipeline), lora_rank=2)
    perturb(model)
    exact = Policy(model, make_sampler({"name": "ddim", "steps": 4, "spacing": None}, model.schedule))
    rounded = Policy(model, exact.sampler, torch.bfloat16)
    condition = model.encode(PROMPTS)
    one, other = (rollout(p, condition, torch.Generator().manual_seed(0), 8).states for p in (exact, rounded))
    assert torch.equal(one[0], other[0])
    assert 1e-4 < (one[1] - other[1]).abs().max() < 0.2
    assert other.dtype == torch.float32
    pictures = [sample(p, condition, seeded(SEEDS), 8) for p in (exact, rounded)]
    assert torch.equal(*pictures)
    assert all(weight.dtype == torch.float32 for weight in model.module.parameters())


@pytest.mark.parametrize("name", ["ddpo", "ctrl"])
def test_ratios_of_rounded_roll_outs_are_recomputed(name, pipeline, tmp_path):
    """By the update's own arithmetic: each is 1, which roll-outs in half precision are far from."""
    words = [f"model.path={pipeline}", f"algorithm.name={name}", "train.rollout_dtype=bfloat16", "sampler.steps=4"]
    few = ["train.prompts_per_epoch=2", "train.images_per_prompt=2", "train.rollout_batch=4", "rewards.shapes.weight=0"]
    few += ["rewards.shapes_exact.weight=0", "rewards.brightness.weight=1", f"run.dir={tmp_path / 'run'}"]
    config = load_config([str(ROOT / "configs" / "quickstart.yaml"), *words, *few, "train.updates_per_epoch=1"])
    trainer = make_trainer(config, [Row(0, PROMPTS[0]), Row(1, PROMPTS[1])])
    perturb(trainer.policy.model)
    examples = trainer.examples(trainer.collect(0, Clock()), 0)
    check_ratios(examples, trainer.policy, 64)
    trainer.policy.rollout_dtype = None
    plain = trainer.examples(trainer.collect(0, Clock()), 0)
    check_ratios(plain, trainer.policy, 64)
    assert not torch.equal(plain.x, examples.x)


def test_merging_may_be_nested_and_fail(pipeline):
    """The inner one leaves the outer's weights alone; a LoRA that cannot be merged leaves the network as it was."""
    model = StableDiffusion(CPU, path=str(pipeline), lora_rank=2)
    trained = [p for p in model.module.parameters() if p.requires_grad]
    with torch.no_grad():
        for weight in trained:
            weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    before = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    place = torch.randn(2, 4, 8, 8), torch.full((2,), 0.5), model.encode(["a red star", "a blue star"])
    with torch.no_grad(), model.merged():
        outer = model.score(*place)
        with model.merged():
            assert torch.equal(model.score(*place), outer)
        assert torch.equal(model.score(*place), outer)
    assert all(torch.equal(p, before[name]) for name, p in model.module.named_parameters())
    with torch.no_grad():
        trained[-1].fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"), model.merged():
        pass
    for name, p in model.module.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p, before[name]), name


def test_the_reference_of_a_run_that_starts_from_a_lora_is_that_lora(pipeline, tmp_path):
    """So that its KL is to what is measured as the base."""
    first = StableDiffusion(CPU, path=str(pipeline), lora_rank=2)
    with torch.no_grad():
        for weight in (p for p in first.module.parameters() if p.requires_grad):
            weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    first.save_adapter(tmp_path / "lora")
    model = StableDiffusion(CPU, path=str(pipeline), lora_rank=2, lora=str(tmp_path / "lora"))
    place = torch.randn(2, 4, 8, 8), torch.full((2,), 0.5), model.encode(["a red star", "a blue star"])
    with torch.no_grad():
        start = model.score(*place)
        for weight in (p for p in model.module.parameters() if p.requires_grad):
            weight += 0.1
        moved = model.score(*place)
        with model.reference():
            torch.testing.assert_close(model.score(*place), start)
            with model.merged():
                torch.testing.assert_close(model.score(*place), start, rtol=1e-4, atol=1e-4)
        assert torch.equal(model.score(*place), moved)
        with first.reference():
            plain = first.score(*place[:2], first.encode(["a red star", "a blue star"]))
    assert (start - plain).abs().max() > 1e-3
    assert (start - moved).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------- files


def copied(pipeline, folder):
    return shutil.copytree(pipeline, folder / "model")


def weights(folder, part):
    (file,) = (folder / part).glob("*.safetensors")
    return file


def load(folder, variant=None):
    return load_pipeline(StableDiffusion.family, str(folder), None, None, torch.float32, variant)


def rewrite(file, change):
    state = load_file(file)
    change(state)
    save_file(state, file)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n"
DAMAGE = {
    "is a Git LFS pointer.*git lfs pull": lambda file: file.write_bytes(POINTER),
    "is empty": lambda file: file.write_bytes(b""),
    "is truncated": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "has no weights": lambda file: file.unlink(),
    "has pickled weights only": lambda file: (torch.save(load_file(file), file.with_suffix(".bin")), file.unlink()),
    "has no weights of model.variant=null: set model.variant=fp16": lambda file: file.rename(
        file.with_suffix(".fp16.safetensors")
    ),
    "lack 1 tensors, such as": lambda file: rewrite(file, lambda state: state.pop(min(state))),
    "do not fit its config.json": lambda file: rewrite(
        file, lambda state: state.update({min(state): torch.zeros(1, 1)})
    ),
    "not finite, in": lambda file: rewrite(file, lambda state: state[min(state)].fill_(torch.nan)),
}


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("why", DAMAGE)
def test_damaged_weights_are_named(why, part, pipeline, tmp_path):
    folder = copied(pipeline, tmp_path)
    DAMAGE[why](weights(folder, part))
    with pytest.raises(
        UsageError, match=rf"^config model\.path: .*{part}.*{why}" if "finite" not in why else f"{why} {part}"
    ) as found:
        load(folder)
    assert "\n" not in str(found.value)


FILES = [
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer.json",
]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    ("text", "why"),
    [(b'{"a": ', "not valid JSON"), (POINTER, "Git LFS pointer"), (b"", "is empty"), (b"[]", "not a JSON object")],
)
def test_damaged_configs_are_named(file, text, why, pipeline, tmp_path):
    folder = copied(pipeline, tmp_path)
    (folder / file).write_bytes(text)
    with pytest.raises(
        UsageError, match=f"^config model.path: .*{file} (is|is a|is not a) ?{why}|{file} {why}"
    ) as found:
        load(folder)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("is_single", [False, True])
def test_no_vocabulary_is_invented(is_single, pipeline, tmp_path):
    from single_file import write_single_file

    folder = copied(pipeline, tmp_path)
    shutil.rmtree(folder / "tokenizer")
    path = write_single_file(pipeline, tmp_path / "model.safetensors") if is_single else folder
    with pytest.raises(UsageError, match=rf"^config model\.path: {folder}/tokenizer has no vocabulary"):
        load_pipeline(StableDiffusion.family, str(path), None, str(folder) if is_single else None, torch.float32)


def test_a_variant_is_loaded(pipeline, tmp_path):
    folder = copied(pipeline, tmp_path)
    for part in ("unet", "vae", "text_encoder"):
        weights(folder, part).rename(weights(folder, part).with_suffix(".fp16.safetensors"))
    ours = pictures(StableDiffusion(CPU, path=str(folder), variant="fp16"), PROMPTS, SEEDS)
    assert torch.equal(ours, pictures(StableDiffusion(CPU, path=str(pipeline)), PROMPTS, SEEDS))
    with pytest.raises(UsageError, match="has no weights of model.variant=fp32: set model.variant=fp16"):
        load(folder, "fp32")


def test_weights_under_their_published_names_are_whole(pipeline, tmp_path):
    """stable-diffusion-v1-5's text encoder and VAE have the names of their time."""
    folder = copied(pipeline, tmp_path)
    state = {f"text_model.{key}": value for key, value in load_file(weights(folder, "text_encoder")).items()}
    save_file(state | {"text_model.embeddings.position_ids": torch.arange(24)[None]}, weights(folder, "text_encoder"))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(weights(folder, "vae"))
    for new, name in old.items():
        state = {key.replace(f"attentions.0.{new}", f"attentions.0.{name}"): value for key, value in state.items()}
    save_file(state, weights(folder, "vae"))
    ours = pictures(StableDiffusion(CPU, path=str(folder)), PROMPTS, SEEDS)
    assert torch.equal(ours, pictures(StableDiffusion(CPU, path=str(pipeline)), PROMPTS, SEEDS))


def test_what_is_no_pipeline_is_told_where_it_belongs(model, pipeline, tmp_path):
    model.save_adapter(tmp_path / "lora")
    for path, message in {
        tmp_path / "lora": "holds a LoRA: give it as model.lora=",
        tmp_path / "lora" / "pytorch_lora_weights.safetensors": "is a LoRA: give it as model.lora=",
        tmp_path / "lora" / "comfyui_lora.safetensors": "is a LoRA: give it as model.lora=",
        pipeline / "unet": "is one network of a pipeline",
        weights(pipeline, "unet"): "is a UNet alone",
        weights(pipeline, "vae"): "is a VAE alone",
        tmp_path: "is not a diffusers pipeline",
    }.items():
        with pytest.raises(UsageError, match=rf"^config model\.path: {path} {message}"):
            load(path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda file: file.write_bytes(POINTER), "Git LFS pointer"),
        (lambda file: file.write_bytes(b""), "is empty"),
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), "is truncated"),
        (lambda file: file.write_bytes(bytes(range(256))), "is not a safetensors file"),
        (lambda file: rewrite(file, lambda s: [s.pop(k) for k in list(s) if k.startswith("first_stage")]), "no first_stage"),
        (lambda file: rewrite(file, lambda s: s.pop("cond_stage_model.transformer.text_model.final_layer_norm.bias")), "lacks weights, such as text_encoder.final_layer_norm.bias"),
        (lambda file: rewrite(file, lambda s: s.pop("model.diffusion_model.out.2.bias")), "lacks weights that the networks need"),
        (lambda file: rewrite(file, lambda s: s.update({"conditioner.embedders.1.model.x": torch.zeros(1)}) or [s.pop(k) for k in list(s) if k.startswith("cond_stage")]), "is not a Stable Diffusion 1.x and 2.x model: set model.name=sdxl"),
    ],
)  # fmt: skip
def test_damaged_single_files_are_named(change, why, pipeline, tmp_path):
    from single_file import write_single_file

    file = write_single_file(pipeline, tmp_path / "model.safetensors")
    change(file)
    with pytest.raises(UsageError, match=rf"^config model\.path: .*model.safetensors.*{why}") as found:
        load_pipeline(StableDiffusion.family, str(file), None, str(pipeline), torch.float32)
    assert "\n" not in str(found.value)


def test_a_pickled_checkpoint_is_read_as_weights_alone(pipeline, tmp_path):
    from single_file import write_single_file

    state = load_file(write_single_file(pipeline, tmp_path / "model.safetensors"))
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": state}, file)
    ours = pictures(StableDiffusion(CPU, path=str(file), single_file_config=str(pipeline)), PROMPTS, SEEDS)
    torch.testing.assert_close(
        ours, pictures(StableDiffusion(CPU, path=str(pipeline)), PROMPTS, SEEDS), atol=1e-4, rtol=1e-4
    )
    torch.save({"state_dict": state, "more": Path("anything")}, file)
    with pytest.raises(UsageError, match="model.ckpt is damaged, or holds more than weights"):
        load(file)
    file.write_bytes(POINTER)
    with pytest.raises(UsageError, match="model.ckpt is a Git LFS pointer"):
        load(file)


# ---------------------------------------------------------------------------------------------- known good


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"time_cond_proj_dim": 8}, "time_cond_proj_dim=8"),
        ({"num_class_embeds": 4}, "num_class_embeds=4"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ({"addition_embed_type": "text"}, "addition_embed_type='text'"),
        ({"encoder_hid_dim": 8, "encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim=8"),
        ({"in_channels": 9}, "in_channels=9"),
        ({"out_channels": 8}, "out_channels=8"),
        ({"cross_attention_dim": 64}, "prompts of 64 features.* of 96"),
    ],
)
def test_unets_that_want_something_else_are_refused(config, match, pipeline, tmp_path):
    folder = copied(pipeline, tmp_path)
    before = UNet2DConditionModel.load_config(folder, subfolder="unet")
    UNet2DConditionModel.from_config({**before, **config}).save_pretrained(folder / "unet")
    with pytest.raises(UsageError, match=rf"^config model\.path: .*{match}"):
        load(folder)


@pytest.mark.parametrize(
    ("file", "change", "match"),
    [
        ("unet/config.json", {"sample_size": -8}, "a UNet with sample_size=-8"),
        ("unet/config.json", {"sample_size": None}, "a UNet with sample_size=None"),
        ("unet/config.json", {"sample_size": [8]}, r"a UNet with sample_size=\[8\]"),
        ("vae/config.json", {"scaling_factor": None}, "a VAE with scaling_factor=None"),
        ("vae/config.json", {"scaling_factor": 0}, "a VAE with scaling_factor=0"),
        ("vae/config.json", {"shift_factor": "x"}, "a VAE with scaling_factor=0.18215 and shift_factor='x'"),
        ("tokenizer/tokenizer_config.json", {"pad_token": None}, "a tokenizer without a pad_token"),
    ],
)
def test_configs_that_could_not_be_used_are_named(file, change, match, pipeline, tmp_path):
    folder = copied(pipeline, tmp_path)
    before = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**before, **change}))
    with pytest.raises(UsageError, match=rf"^config model\.path: .* has {match}"):
        load(folder)


@pytest.mark.parametrize("name", ["in_channels", "out_channels"])
def test_a_vae_of_other_images_is_refused(name, pipeline, tmp_path):
    folder = copied(pipeline, tmp_path)
    before = AutoencoderKL.load_config(folder, subfolder="vae")
    AutoencoderKL.from_config({**before, name: 4}).save_pretrained(folder / "vae")
    with pytest.raises(UsageError, match=f"has a VAE with {name}=4 where images have 3"):
        load(folder)


@pytest.mark.parametrize(
    ("part", "kind", "match"),
    [
        ("_class_name", "StableDiffusionXLPipeline", ".* is a StableDiffusionXLPipeline: set model.name=sdxl"),
        ("unet", ["diffusers", "UNet3DConditionModel"], "the unet of .* is UNet3DConditionModel"),
        ("vae", ["diffusers", "AutoencoderTiny"], "the vae of .* is AutoencoderTiny"),
        ("text_encoder", ["transformers", "T5EncoderModel"], "the text_encoder of .* is T5EncoderModel"),
        ("tokenizer", [None, None], "the tokenizer of .* is None"),
    ],
)
def test_pipelines_of_other_parts_are_refused(part, kind, match, pipeline, tmp_path):
    folder = copied(pipeline, tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, part: kind}))
    with pytest.raises(UsageError, match=rf"^config model\.path: {match}"):
        load(folder)


def test_a_scheduler_of_another_process_is_refused(pipeline, tmp_path):
    folder = copied(pipeline, tmp_path)
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match="FlowMatchEulerDiscreteScheduler"):
        StableDiffusion(CPU, path=str(folder))


@pytest.mark.slow
def test_the_asset_runs_as_it_is_in_diffusers():
    """from_pretrained without a dtype, on a CPU; and it draws what we draw."""
    folder = ASSETS / "shapes"
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert {p.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()} == {torch.float32}
    theirs = diffusers_pictures(pipe, PROMPTS[:2], SEEDS[:2])
    ours = pictures(StableDiffusion(CPU), PROMPTS[:2], SEEDS[:2])
    assert (ours - theirs).abs().max() < 1 / 255
    assert json.loads((folder / "text_encoder" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("words", [{"path": "nobody/nothing"}, {"path": "{single}"}])
def test_without_a_network_the_hub_is_not_asked_again_and_again(words, tmp_path, monkeypatch):
    """Its library tries for 23 seconds a file; a single file needs configs from there."""

    import condrl.io.hub

    def asked(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(condrl.io.hub, "reachable", lambda _: False)
    monkeypatch.setattr(socket, "getaddrinfo", asked)
    single = tmp_path / "single.safetensors"
    save_file({f"{start}x": torch.ones(1) for start in StableDiffusion.family.whole}, single)
    path = words["path"].format(single=single)
    with pytest.raises(UsageError, match="config model.path: .*(not on this machine|single_file_config)") as error:
        StableDiffusion(torch.device("cpu"), path=path)
    assert "\n" not in str(error.value)
