"""Stable Diffusion 3 and FLUX on tiny pipelines of random weights: images, files and refusals are those of diffusers."""

import json
import re
import shutil
from dataclasses import dataclass

import pytest
import torch
import yaml
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from diffusers.loaders import single_file_utils
from drawing import CPU, PROMPTS, SEEDS, perturb, pictures
from flow_pipelines import flux_pipeline, original_name, original_weights, sd3_pipeline, whole_checkpoint
from helpers import ROOT, run_python
from safetensors.torch import load_file, save_file

from condrl import UsageError
from condrl.commands import finetune
from condrl.diffusion.noise import seeded
from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import rollout
from condrl.loading import load_config
from condrl.models.adapter import add_lora
from condrl.models.flow import JOINT_ATTENTION
from condrl.models.latent import LatentModel
from condrl.models.lora import KOHYA_FILE, LORA_FILE, lora_layers, save_lora
from condrl.plugins.models.flux import Flux
from condrl.plugins.models.sd3 import SD3
from condrl.prompts import Row
from condrl.report.run import read_run
from condrl.report.usage import diffusers_code
from condrl.rewards.pixels import from_pil
from condrl.training.build import make_sampler, make_trainer
from condrl.training.clock import Clock

SIZE = {"height": 24, "width": 16}
ODE = {"name": "ddim", "steps": 5, "spacing": None, "eta": 0.0}
TOKENS = 12  # of T5, which reads letters here


@dataclass(frozen=True)
class Family:
    """A model of ours and what diffusers has for it."""

    model: type
    pipeline: type
    make: object  # writes a folder
    guidance: str  # what diffusers calls classifier-free guidance


FAMILIES = {
    "sd3": Family(SD3, StableDiffusion3Pipeline, sd3_pipeline, "guidance_scale"),
    "flux": Family(Flux, FluxPipeline, flux_pipeline, "true_cfg_scale"),
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return {name: family.make(tmp_path_factory.mktemp(name)) for name, family in FAMILIES.items()}


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def folder(name, folders):
    return folders[name]


def model_of(name, folder, **options):
    return FAMILIES[name].model(CPU, path=str(folder), **{"lora_rank": 2, "t5_tokens": TOKENS, **SIZE, **options})


def plain(name, folder):
    pipe = FAMILIES[name].pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def their_pictures(name, pipe, guidance=1.0, **options):
    """diffusers' own pipeline with its own scheduler; it guides FLUX only beside a negative prompt."""
    options = {**SIZE, FAMILIES[name].guidance: guidance, "max_sequence_length": TOKENS, **options}
    options |= {"num_inference_steps": 5, "output_type": "pt"}
    images = [pipe(p, generator=g, **options).images[0] for p, g in zip(PROMPTS, seeded(SEEDS), strict=True)]
    return torch.stack(images)


def ours(model):
    return pictures(model, PROMPTS, SEEDS, ODE)


def copied(folder, place):
    return shutil.copytree(folder, place / "model")


def changed(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# ---------------------------------------------------------------------------------------------- as diffusers


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"guidance": 1.0}, {}),
        ({"guidance": 4.0}, {"guidance": 4.0, "negative_prompt": ""}),
        ({"guidance": 4.0, "negative_prompt": "a blue star"}, {"guidance": 4.0, "negative_prompt": "a blue star"}),
        ({"guidance": 1.0, "height": 16, "width": 32}, {"height": 16, "width": 32}),
    ],
)
def test_images_are_those_of_a_diffusers_pipeline(options, theirs, name, folder):
    model = model_of(name, folder, **options)
    expected = their_pictures(name, plain(name, folder), **theirs)
    assert expected.shape[1:] == model.sample_shape
    assert (expected[0] - expected[1]).abs().max() > 0.1
    torch.testing.assert_close(ours(model), expected, atol=1e-5, rtol=0)


def test_network_features_are_the_last_blocks(name, folder):
    """Of the image's tokens alone, their mean; one evaluation an image, whatever the guidance."""
    model, seen = model_of(name, folder, guidance=4.0), []
    perturb(model)
    x, t = torch.randn(2, *model.state_shape, generator=torch.Generator().manual_seed(0)), torch.full((2,), 0.5)
    condition = model.encode(PROMPTS[:2])
    with model.blocks()[-1].register_forward_hook(lambda *given: seen.append(given[-1])):
        found = model.network_features(x, t, condition)
    tokens = seen[0][1]  # beside the prompt's
    torch.testing.assert_close(found, tokens.mean(1))
    assert model.evaluations == 2
    assert not found.requires_grad
    assert not torch.allclose(model.network_features(x, t, condition.flip(0)), found, atol=1e-3)


def test_sizes_change_the_times_of_flux_alone(folders):
    """Its shift depends on them, Stable Diffusion 3's does not."""
    large = {"height": 32, "width": 32}
    for name, differ in (("sd3", False), ("flux", True)):
        one, other = (model_of(name, folders[name], **size).schedule.grid(5) for size in (SIZE, large))
        assert torch.equal(one, other) != differ


def test_without_t5_it_is_diffusers_without_t5(folders, tmp_path):
    """By the option, or because the pipeline has none."""
    bare = copied(folders["sd3"], tmp_path)
    changed(bare / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(bare / part)
    pipe = StableDiffusion3Pipeline.from_pretrained(folders["sd3"], text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    expected = their_pictures("sd3", pipe)
    for path, options in ((bare, {}), (folders["sd3"], {"t5": False})):
        model = model_of("sd3", path, guidance=1.0, **options)
        assert (model.pipe.text_encoder_3, model.pipe.tokenizer_3) == (None, None)
        torch.testing.assert_close(ours(model), expected, atol=1e-5, rtol=0)
    assert (expected - ours(model_of("sd3", folders["sd3"], guidance=1.0))).abs().max() > 0.01


def test_the_network_of_flux_is_told_a_guidance_scale(folders, tmp_path):
    default, told = (model_of("flux", folders["flux"], **options) for options in ({}, {"told_guidance": 1.5}))
    pipe = plain("flux", folders["flux"])
    for model, scale in ((default, 3.5), (told, 1.5)):
        torch.testing.assert_close(ours(model), their_pictures("flux", pipe, guidance_scale=scale), atol=1e-5, rtol=0)
    assert (ours(default) - ours(told)).abs().max() > 1e-3
    schnell = flux_pipeline(tmp_path, {"guidance_embeds": False}, shift=1.0)  # FLUX.1-schnell is told none
    expected = their_pictures("flux", plain("flux", schnell))
    torch.testing.assert_close(ours(model_of("flux", schnell)), expected, atol=1e-5, rtol=0)
    with pytest.raises(UsageError, match=r"model\.told_guidance: this network is told no guidance"):
        model_of("flux", schnell, told_guidance=3.5)
    with pytest.raises(UsageError, match=r"config model\.told_guidance: must be at least 0, got -3"):
        model_of("flux", folders["flux"], told_guidance=-3.0)


def test_a_step_is_that_of_diffusers(name, folder):
    """The network's call by its pipeline's own functions, and its scheduler's step."""
    model, pipe = model_of(name, folder, guidance=1.0), plain(name, folder)
    policy = Policy(model, make_sampler(ODE, model.schedule))
    x = torch.randn(1, *model.state_shape, generator=torch.Generator().manual_seed(0))
    seen = []

    def look(pipe, k, t, tensors):
        seen.append(tensors["latents"])
        return tensors

    start = pipe._pack_latents(x, 1, *model.state_shape) if name == "flux" else x
    options = {**SIZE, "max_sequence_length": TOKENS, "num_inference_steps": 5, "callback_on_step_end": look}
    pipe(PROMPTS[0], latents=start, output_type="latent", **{FAMILIES[name].guidance: 1.0}, **options)
    assert len(seen) == 5
    for k, theirs in enumerate(seen):
        theirs = pipe._unpack_latents(theirs, 24, 16, 2) if name == "flux" else theirs
        mean = policy.transition(x, torch.tensor([k]), model.encode(PROMPTS[:1])).mean.detach()
        torch.testing.assert_close(mean, theirs, atol=1e-5, rtol=0)
        assert (mean - x).abs().max() > 0.01
        x = theirs


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_draws_nearly_the_same_and_leaves_the_lora_alone(dtype, name, folder):
    half = model_of(name, folder, guidance=1.0, dtype=dtype)
    assert (ours(half) - ours(model_of(name, folder, guidance=1.0))).abs().mean() < 0.01
    weights = {n: p.dtype for n, p in half.module.named_parameters()}
    assert {kind for n, kind in weights.items() if "lora" in n} == {torch.float32}
    assert {kind for n, kind in weights.items() if "lora" not in n} == {getattr(torch, dtype)}


def test_gradient_checkpointing_changes_no_gradient(name, folder):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = model_of(name, folder, gradient_checkpointing=checkpointing)
        perturb(model)
        x = torch.randn(2, *model.state_shape, generator=torch.Generator().manual_seed(1))
        score = model.score(x, torch.tensor([0.3, 1.0], dtype=torch.float64), model.encode(PROMPTS[:2]))
        weights = [p for p in model.module.parameters() if p.requires_grad]
        gradients.append(torch.autograd.grad(score.square().sum(), weights))
    assert gradients[0][0].abs().max() > 0
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_images_go_to_latents_and_back_by_the_vaes_shift(name, folder):
    model = model_of(name, folder)
    vae, images = model.vae, torch.rand(2, 3, 24, 16)
    with torch.no_grad():
        means = vae.encode(2 * images - 1).latent_dist.mean
        latents = model.encode_images(images)
        torch.testing.assert_close(latents, (means - 0.12) * 0.36)
        decoded = (vae.decode(means).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(model.decode(latents), decoded, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- prompts and sizes


def test_prompts_that_t5_cuts_are_told_as_it_cuts_them(name, folder, capsys):
    """CLIP reads less of them, which is no loss where T5 reads the rest."""
    model = model_of(name, folder, t5_tokens=40)
    model.encode(["a" * 30])  # more tokens than CLIP's 24
    assert capsys.readouterr().err == ""
    model.encode(["a" * 50])
    assert f"{'a' * 50!r} has 52 tokens; the model reads the first 40\n" in capsys.readouterr().err
    if name == "sd3":
        bare = model_of(name, folder, t5=False)
        bare.encode(["a" * 30])
        assert "tokens; the model reads the first 24\n" in capsys.readouterr().err


def test_embeddings_are_on_the_host_and_encoders_on_the_device_only_while_they_encode(name, folder, monkeypatch):
    model = model_of(name, folder)
    places = {reader: [] for reader in model.family.readers.values()}
    for reader, calls in places.items():
        encoder = getattr(model.pipe, reader)
        monkeypatch.setattr(encoder, "to", lambda device, calls=calls: calls.append(torch.device(device)))
        encoder.register_forward_hook(lambda *_, calls=calls: calls.append("encodes"))
    model.device = torch.device("cpu", 0)
    model.embeddings(model.encode(["a red star", "a blue star"]))
    model.embeddings(model.encode(["a red star", "a blue star"]))
    assert len(places) == (3 if name == "sd3" else 2)
    for calls in places.values():
        assert calls == [torch.device("cpu", 0), "encodes", "encodes", torch.device("cpu")]
    assert all(part.device == CPU for part in model._host_embeddings(["a red star"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 22}, r"config model\.height: must be a multiple of 4 pixels, got 22"),
        ({"width": 15}, r"config model\.width: must be a multiple of 4 pixels, got 15"),
        ({"t5_tokens": 0}, r"config model\.t5_tokens: must be from 1 to 512, got 0"),
        ({"t5_tokens": 513}, r"config model\.t5_tokens: must be from 1 to 512, got 513"),
        ({"lora_targets": ("to_qq",)}, r"config model\.lora_targets: no module of the network is called 'to_qq'"),
    ],
)
def test_options_that_cannot_be_are_one_line(options, message, name, folder):
    with pytest.raises(UsageError, match=message) as found:
        model_of(name, folder, **options)
    assert "\n" not in str(found.value)


def test_sd3_has_positions_for_so_many_pixels(folders):
    with pytest.raises(UsageError, match=r"config model\.width: must be at most 48 pixels, got 52"):
        model_of("sd3", folders["sd3"], width=52)
    assert model_of("sd3", folders["sd3"], height=None, width=48).sample_shape == (3, 16, 48)


def few_words(name, folder, *more):
    words = [f"model.name={name}", f"model.path={folder}", "sampler.steps=4", "sampler.eta=1", *more]
    words += ["model.height=24", "model.width=16", "model.t5_tokens=12", "model.lora_targets=[attn.to_q]"]
    words += ["train.prompts_per_epoch=1", "train.images_per_prompt=4", "train.rollout_batch=4"]
    return [*words, "rewards.brightness.weight=1", "train.updates_per_epoch=1"]


def test_algorithms_that_need_a_score_from_pure_noise_are_refused(name, folder):
    config = load_config(few_words(name, folder, "algorithm.name=ctrl"))
    with pytest.raises(UsageError, match=r"ctrl, as configured, needs the score at every step.*use nft, grpo or ddpo"):
        make_trainer(config, [Row(0, "a red star")])


def test_ctrl_explores_by_the_samplers_noise_from_the_first_step(name, folder, tmp_path):
    """What it weighs are the likelihoods of the steps; the cost of each is its KL to the pretrained model's."""
    options = ["algorithm.name=ctrl", "algorithm.exploration=null", "algorithm.kappa=0.1"]
    words = few_words(name, folder, *options, f"run.dir={tmp_path}")
    trainer = make_trainer(load_config(words), [Row(0, "a red star")])
    policy, sampler = trainer.policy, trainer.policy.sampler
    perturb(policy.model)
    examples = trainer.examples(trainer.collect(0, Clock()), 0)
    states = trainer.collect(0, Clock()).rollout.states
    noisy = sampler.stochastic.nonzero().flatten()
    assert noisy.tolist() == examples.k.tolist() == [0, 1, 2]
    for k in noisy:
        with torch.no_grad():
            ours = policy.transition(states[k], k.expand(4), examples.condition)
            with policy.model.reference():
                base = policy.transition(states[k], k.expand(4), examples.condition)
        error = (states[k + 1] - ours.mean).flatten(1).square().sum(1)
        torch.testing.assert_close(
            examples.old_log_prob[k].float(), -error / (2 * ours.std.flatten(1)[:, 0] ** 2), rtol=1e-3, atol=1e-3
        )
        batch = examples.at(torch.arange(4), k.expand(4))
        with torch.no_grad():
            mean = policy.action(batch.x, batch.k, batch.condition)
        cost = trainer.algorithm.costs(policy)[k].item() * (mean - batch.base).square().flatten(1).sum(1)
        torch.testing.assert_close(cost, ours.kl(base).float(), rtol=1e-3, atol=1e-5)
        assert cost.min() > 1e-6
    trainer.run_epoch(0)


@pytest.mark.parametrize("weighting", ["path", "epsilon"])
def test_pairs_are_learned_from_at_pure_noise_too(weighting, name, folder, tmp_path):
    """A pair's error at a step is the KL of the true step, which knows where it ends, to the policy's."""
    options = [
        "algorithm.name=online_dpo",
        "algorithm.contest=2",
        f"algorithm.weighting={weighting}",
        "algorithm.draws=8",
    ]
    trainer = make_trainer(
        load_config(few_words(name, folder, *options, f"run.dir={tmp_path}")), [Row(0, "a red star")]
    )
    policy, sampler = trainer.policy, trainer.policy.sampler.affine
    perturb(policy.model)
    examples = trainer.examples(trainer.collect(0, Clock()), 0)
    batch = examples.at(*examples.every_pair().unbind(1))
    assert batch.step.unique().tolist() == [0, 1, 2]
    found = trainer.algorithm.errors(policy, batch).detach()
    alpha, sigma = (
        c(sampler.times[batch.step]).float().view(-1, 1, 1, 1) for c in (sampler.schedule.alpha, sampler.schedule.sigma)
    )
    for side in (0, 1):
        clean, first = batch.states[:, side], batch.step == 0
        x = alpha * clean + sigma * batch.noise
        true = (-batch.noise / sigma).where(~first.view(-1, 1, 1, 1), clean)
        A, B, S = (c[batch.step].float().view(-1, 1, 1, 1) for c in (sampler.A, sampler.B, sampler.S))
        with torch.no_grad():
            ours = policy.transition(x, batch.step, batch.condition)
        nats = ((A * x + B * true - ours.mean) / S).flatten(1).square().sum(1) / 2
        if weighting == "epsilon":
            path = (sampler.B**2 / (2 * sampler.S**2) / sampler.schedule.sigma(sampler.times[:-1]) ** 2).float()
            nats = nats * (path[1:3].mean() / path[batch.step]).where(~first, 0.0)
        torch.testing.assert_close(found[:, side], nats, rtol=1e-3, atol=1e-3)
        assert nats[~first].min() > 0.1
    trainer.run_epoch(0)


# ---------------------------------------------------------------------------------------------- the plugins


def test_plugins_hold_only_what_is_their_own(name):
    """Of what LatentModel has, what it leaves to a family, and a few defaults; none of them is long."""
    kind = FAMILIES[name].model
    own = {n for n in vars(kind) if not n.startswith(("__", "_abc"))}
    shared = own & (set(dir(LatentModel)) | LatentModel.__dataclass_fields__.keys())
    more = {"sd3": {"wanted", "check_size"}, "flux": {"guidance", "check_size"}}[name]
    assert shared == {"family", "path", "encode_prompts", "predict", "in_diffusers", *more}
    assert len((ROOT / "plugins" / "models" / f"{name}.py").read_text().splitlines()) <= 120


def test_every_block_is_gathered_once(name, folder):
    """What is sharded is all of the weights in blocks, each in one."""
    model = model_of(name, folder)
    blocks = model.blocks()
    inside = [id(p) for block in blocks for p in block.parameters()]
    assert len(inside) == len(set(inside))
    rest = [n for n, p in model.module.named_parameters() if id(p) not in set(inside)]
    assert not [n for n in rest if "transformer_blocks" in n]


# ---------------------------------------------------------------------------------------------- LoRA files


def test_diffusers_draws_the_same_from_the_lora_and_so_do_we(name, folder, tmp_path):
    """In diffusers' own format, and for FLUX from the other file as well."""
    model = model_of(name, folder, guidance=1.0, lora_alpha=5)
    before = ours(model)
    perturb(model, 1.0)
    tuned = ours(model)
    assert (tuned - before).abs().max() > 10 / 255
    model.save_adapter(tmp_path)
    for file in (LORA_FILE, KOHYA_FILE):
        again = model_of(name, folder, guidance=1.0, lora=str(tmp_path / file))
        torch.testing.assert_close(ours(again), tuned, atol=1e-4, rtol=0)
        if (name, file) != ("sd3", KOHYA_FILE):  # whose names diffusers does not read for it
            pipe = plain(name, folder)
            pipe.load_lora_weights(tmp_path, weight_name=file)
            assert (tuned - their_pictures(name, pipe)).abs().max() < 1 / 255


def test_a_lora_that_diffusers_saved_draws_here_as_there(name, folder, tmp_path):
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = plain(name, folder)
    targets = [*JOINT_ATTENTION, "norm1.linear", "ff.net.2"]
    pipe.transformer.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=targets))
    for layer in lora_layers(pipe.transformer).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.5)
    type(pipe).save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        **_collate_lora_metadata({"transformer": pipe.transformer}),
    )
    model = model_of(name, folder, guidance=1.0, lora=str(tmp_path), lora_rank=3, lora_targets=tuple(targets))
    expected = their_pictures(name, pipe)
    assert (ours(model) - expected).abs().max() < 1 / 255
    with model.reference():
        pass
    assert (expected - ours(model_of(name, folder, guidance=1.0))).abs().max() > 5 / 255


def comfyui_bases(kind, modules):
    """What ComfyUI calls the modules that its table for a family has, as diffusers has them: its key map's entries."""
    found = {}
    for module in modules:
        target = original_name(kind, module)
        found[f"transformer.{module}"] = target
        found["lora_transformer_" + module.replace(".", "_")] = target
        found["lycoris_" + module.replace(".", "_")] = target
    return found


COMFYUI_PARTS = (("lora_up", "lora_down"), ("lora_B", "lora_A"), ("lora.up", "lora.down"))


def patched_by_comfyui(network, file):
    """The original layout's weights as it patches them: alpha / rank up @ down on the rows of a part; keys left over."""
    kind, weights, left = type(network).__name__, original_weights(network), load_file(file)
    hidden = network.inner_dim  # its table has depth * 64 for Stable Diffusion 3, which is the published ones' width
    names = [n for n, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    for base, (original, part) in comfyui_bases(kind, names).items():
        for up, down in COMFYUI_PARTS:
            if f"{base}.{up}.weight" in left:
                ups, downs = left.pop(f"{base}.{up}.weight"), left.pop(f"{base}.{down}.weight")
                alpha = left.pop(f"{base}.alpha", torch.tensor(float(len(downs))))
                first = "qkvw".find(part) * hidden if part else 0
                weights[f"{original}.weight"][first : first + len(ups)] += alpha / len(downs) * ups @ downs
    return weights, left


def converted(kind, weights, width):
    """By diffusers' own converter, which for FLUX is written for the published width."""
    if kind == "SD3Transformer2DModel":
        return single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(dict(weights))
    with flux_converter(width) as convert:
        return convert(dict(weights))


@pytest.mark.parametrize("file", [LORA_FILE, KOHYA_FILE])
def test_comfyui_patches_the_weights_that_were_tuned(file, name, folder, tmp_path):
    """Every key by its table, and the network that it then has is ours with the LoRA."""
    model = model_of(name, folder, lora_alpha=5, lora_targets=(*JOINT_ATTENTION, "norm1.linear", "ff.net.0.proj"))
    perturb(model, 1.0)
    model.save_adapter(tmp_path)
    network = plain(name, folder).transformer
    weights, left = patched_by_comfyui(network, tmp_path / file)
    assert not left
    theirs = converted(type(network).__name__, weights, network.inner_dim)
    merged, before = {}, network.state_dict()
    with torch.no_grad(), model.merged():
        for key, value in model.module.state_dict().items():
            if "lora_" not in key:
                merged[key.replace(".base_layer", "")] = value.clone()
    assert merged.keys() == theirs.keys()
    for key, value in merged.items():
        torch.testing.assert_close(theirs[key], value, atol=1e-6, rtol=1e-5)
    assert sum(not torch.equal(before[key], value) for key, value in merged.items()) == len(lora_layers(model.module))


def test_published_sd35_medium_is_tuned_where_every_comfyui_has_names(tmp_path):
    """Older ones lack the second attention of a block, which the default leaves alone."""
    from diffusers import SD3Transformer2DModel

    network = SD3Transformer2DModel(
        num_layers=3, attention_head_dim=4, num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=8,
        pooled_projection_dim=8, dual_attention_layers=(0, 1), qk_norm="rms_norm", sample_size=8, pos_embed_max_size=8,
    )  # fmt: skip
    add_lora(network, 2, 2, JOINT_ATTENTION)
    save_lora(network, tmp_path, "base", prefix="transformer")
    modules = {key.removeprefix("transformer.").partition(".lora_")[0] for key in load_file(tmp_path / LORA_FILE)}
    assert not [module for module in modules if ".attn2." in module]
    assert len(modules) == 3 * 8 - 1  # the last block has no output for the text


def test_header_and_card_name_the_family(name, folder, tmp_path):
    model_of(name, folder).save_adapter(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert yaml.safe_load(text.split("---\n")[1])["tags"] == [
        "lora", "text-to-image", {"sd3": "stable-diffusion-3", "flux": "flux"}[name], "condrl"
    ]  # fmt: skip
    assert "A1111" not in text
    assert "ComfyUI: `comfyui_lora.safetensors`" in text


OTHER_LORAS = {
    "is of a UNet, not of a transformer: see unet": "unet.mid_block.attentions.0.proj_in.lora_A.weight",
    "is of a UNet, not of a transformer: see lora_unet": "lora_unet_down_blocks_0_x.lora_down.weight",
    "has the modules of the original layout.*double": "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
    "has the modules of the original layout.*joint": "diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight",
    "this network has no module transformer.nowhere": "transformer.nowhere.lora_A.weight",
    "has a text-encoder part": "text_encoder.x.lora_A.weight",
}


@pytest.mark.parametrize("message", OTHER_LORAS)
def test_loras_of_other_networks_are_refused_in_truth(message, name, folder, tmp_path):
    save_file({OTHER_LORAS[message]: torch.zeros(2, 2)}, tmp_path / LORA_FILE)
    with pytest.raises(UsageError, match=message) as found:
        model_of(name, folder, lora=str(tmp_path))
    assert "\n" not in str(found.value)


# ---------------------------------------------------------------------------------------------- runs


RUN = """
model: {lora_rank: 2, height: 24, width: 16, t5_tokens: 12, guidance: 1.0}
rewards: {brightness: {}}
train: {prompts_per_epoch: 2, images_per_prompt: 4, rollout_batch: 8, updates_per_epoch: 2, loss_batch: 8, lr: 0.03}
run: {checkpoint_seconds: 0}
"""
LEARNED = {
    "nft": ["algorithm.name=nft", "sampler.name=ddim", "sampler.eta=0", "sampler.steps=3"],
    "grpo": [
        "algorithm.name=grpo",
        "sampler.name=flow_sde",
        "sampler.steps=3",
        "evaluate.sampler={name: ddim, eta: 0}",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", LEARNED)
def test_a_run_tunes_it_and_resumes_to_the_bit(algorithm, name, folder, tmp_path):
    """Without its text encoders too; and what it saves draws in diffusers what it draws here."""
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "prompts.txt").write_text("a red star\na blue circle\n")
    words = [str(tmp_path / "run.yaml"), f"model.name={name}", f"model.path={folder}", *LEARNED[algorithm]]
    for place, epochs, released in (("whole", 2, "false"), ("parts", 1, "false"), ("parts", 2, "true")):
        more = [f"prompts.train={tmp_path}/prompts.txt", f"run.dir={tmp_path / place}", f"train.epochs={epochs}"]
        assert finetune.main([*words, *more, "run.resume=auto", f"model.release_encoders={released}"]) == 0
    for file in ("metrics.jsonl", f"lora/{LORA_FILE}", f"lora/{KOHYA_FILE}"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()
    model = model_of(name, folder, guidance=1.0, lora=str(tmp_path / "whole" / "lora"))
    assert (ours(model) - ours(model_of(name, folder, guidance=1.0))).abs().max() > 1 / 255
    pipe = plain(name, folder)
    pipe.load_lora_weights(tmp_path / "whole" / "lora")
    assert (ours(model) - their_pictures(name, pipe)).abs().max() < 1 / 255
    scope = {}
    run = read_run(tmp_path / "whole")
    path = run.config["model"]["path"]
    exec(diffusers_code(run, path, str(run.folder / "lora")), scope)  # what the run's page tells to do
    three = pictures(model, ["your prompt"], [0], {**ODE, "steps": 3})
    assert (from_pil(scope["image"]) - three[0]).abs().max() < 1 / 255


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_tune_like_one(sharded, folders, tmp_path):
    """Stable Diffusion 3 with whole weights in each of them, FLUX with its blocks spread over both."""
    name = "flux" if sharded else "sd3"
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "prompts.txt").write_text("a red star\na blue circle\n")
    words = [str(tmp_path / "run.yaml"), f"model.name={name}", f"model.path={folders[name]}", *LEARNED["grpo"]]
    words += [f"prompts.train={tmp_path}/prompts.txt", "train.lr=0.003", "train.epochs=2", "train.max_failed=0"]
    script, cpu = str(ROOT / "scripts" / "finetune.py"), {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    cpu |= {"ACCELERATE_USE_FSDP": "true"} if sharded else {}
    done = run_python(*two, *words, f"run.dir={tmp_path / 'two'}", cwd=tmp_path, **cpu)
    assert done.returncode == 0, done.stderr[-2000:]
    assert ("sharded weights" in done.stderr) == sharded
    assert finetune.main([*words, f"run.dir={tmp_path / 'one'}"]) == 0
    loras = [load_file(tmp_path / place / "lora" / LORA_FILE) for place in ("one", "two")]
    one, other = (torch.cat([lora[key].flatten() for key in sorted(loras[0])]) for lora in loras)
    assert (other - one).norm() < 0.02 * one.norm()  # Adam makes much of gradients near zero
    ups = [torch.cat([lora[key].flatten() for key in sorted(lora) if "lora_B" in key]) for lora in loras]
    assert ups[0].norm() > 0
    assert (ups[1] - ups[0]).norm() < 0.1 * ups[0].norm()


@pytest.mark.parametrize("level", [0.0, 0.7])
@pytest.mark.parametrize(
    "sampler", ["flow_sde", "dance_sde", "euler_maruyama", "exponential", "ddim", "dpm_solver_pp", "pcpo"]
)
def test_ratios_are_one_before_an_update(sampler, level, name, folder):
    """With every sampler, from pure noise to the data."""
    options = {"noise_level" if sampler.endswith("_sde") else "eta": level}
    if sampler == "pcpo":
        options = {"weight": 100.0} if level else {"noise_steps": []}
    model = model_of(name, folder, guidance=1.0)
    perturb(model)
    policy = Policy(model, make_sampler({"name": sampler, "steps": 4, "spacing": None, **options}, model.schedule))
    found = rollout(policy, model.encode(PROMPTS), torch.Generator().manual_seed(0), 3)
    assert found.states.isfinite().all()
    assert policy.sampler.stochastic.any() == bool(level)
    for k in policy.sampler.stochastic.nonzero().flatten().tolist():
        state = None if found.solver_states is None else found.solver_states[k]
        transition = policy.transition(found.states[k], torch.full((3,), k), found.condition, state)
        torch.testing.assert_close(transition.log_prob(found.states[k + 1]), found.log_probs[k], atol=2e-3, rtol=0)


# ---------------------------------------------------------------------------------------------- files


class flux_converter:
    """diffusers' converter of FLUX, in which 3072 is the width of the published network."""

    def __init__(self, width):
        self.function, self.width = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers, width
        self.code = self.function.__code__

    def __enter__(self):
        constants = tuple(self.width if constant == 3072 else constant for constant in self.code.co_consts)
        assert constants != self.code.co_consts
        self.function.__code__ = self.code.replace(co_consts=constants)
        return self.function

    def __exit__(self, *_):
        self.function.__code__ = self.code


def single_file(name, folder, path, with_t5=True):
    save_file(whole_checkpoint(plain(name, folder), with_t5), path)
    return path


def test_a_single_file_is_the_folder(name, folder, tmp_path):
    file = single_file(name, folder, tmp_path / "model.safetensors")
    with flux_converter(16):
        one = model_of(name, file, single_file_config=str(folder))
    torch.testing.assert_close(ours(one), ours(model_of(name, folder)), atol=1e-5, rtol=0)


def test_a_single_file_without_t5_is_the_model_without_t5(folders, tmp_path):
    file = single_file("sd3", folders["sd3"], tmp_path / "model.safetensors", with_t5=False)
    one = model_of("sd3", file, single_file_config=str(folders["sd3"]))
    assert one.pipe.text_encoder_3 is None
    torch.testing.assert_close(ours(one), ours(model_of("sd3", folders["sd3"], t5=False)), atol=1e-5, rtol=0)


def test_single_files_that_are_something_else_are_named(name, folder, folders, tmp_path):
    file = single_file(name, folder, tmp_path / "model.safetensors")
    other = "flux" if name == "sd3" else "sd3"
    state = load_file(file)
    with pytest.raises(UsageError, match=rf"model.safetensors is not a .* model: set model.name={name}$"):
        model_of(other, file)
    alone = {key: value for key, value in state.items() if key.startswith("model.diffusion_model.")}
    for prefix in ("model.diffusion_model.", ""):
        save_file({key.replace("model.diffusion_model.", prefix): v for key, v in alone.items()}, file)
        with pytest.raises(UsageError, match=r"model.safetensors is a transformer alone: model.path needs the whole"):
            model_of(name, file)
    with pytest.raises(UsageError, match=r"is a .*Pipeline: set model.name="):
        model_of(other, folder)


def part(name, **values):
    return lambda copy: changed(copy / name / "config.json", **values)


def rewrite(copy, place, key):
    (file,) = (copy / place).glob("*.safetensors")
    state = load_file(file)
    state.pop(key)
    save_file(state, file)


def with_scheduler(copy, kind, **options):
    changed(copy / "model_index.json", scheduler=["diffusers", kind])
    changed(copy / "scheduler" / "scheduler_config.json", **options)


REFUSED = {
    r"the scheduler of .* is DDIMScheduler of diffusers": lambda copy: with_scheduler(copy, "DDIMScheduler"),
    r"use_karras_sigmas=True": lambda copy: with_scheduler(
        copy, "FlowMatchEulerDiscreteScheduler", use_karras_sigmas=True
    ),
    r"has a VAE with a mean or a deviation": part("vae", latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
    r"the text_encoder of .* is CLIPTextModelX": lambda copy: changed(
        copy / "model_index.json", text_encoder=["transformers", "CLIPTextModelX"]
    ),
    r"the weights of .*/transformer lack": lambda copy: rewrite(copy, "transformer", "proj_out.bias"),
    r"tokenizer_2 has no vocabulary": lambda copy: (
        shutil.rmtree(copy / "tokenizer_2") or (copy / "tokenizer_2").mkdir()
    ),
    r"/tokenizer has no vocabulary": lambda copy: shutil.rmtree(copy / "tokenizer"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_a_base_model_is_refused_in_a_line(message, name, folder, tmp_path):
    copy = copied(folder, tmp_path)
    REFUSED[message](copy)
    with pytest.raises(UsageError, match=message) as found:
        model_of(name, copy)
    assert "\n" not in str(found.value)


WANTS = {
    "sd3": [
        ({"in_channels": 8}, "in_channels=8 where its other parts need 4"),
        ({"patch_size": 1}, "patch_size=1 where its other parts need 2"),
        ({"pooled_projection_dim": 40}, "pooled_projection_dim=40 where its other parts need 36"),
        ({"joint_attention_dim": 64}, "joint_attention_dim=64 where its other parts need 48"),
    ],
    "flux": [
        ({"in_channels": 32, "out_channels": 16}, "in_channels=32 where its other parts need 16"),  # FLUX.1-Depth
        ({"out_channels": 32}, "out_channels=32 where its other parts need 16"),
        ({"pooled_projection_dim": 20}, "pooled_projection_dim=20 where its other parts need 16"),
        ({"joint_attention_dim": 64}, "joint_attention_dim=64 where its other parts need 48"),
    ],
}


@pytest.mark.parametrize("which", range(4))
def test_transformers_that_want_something_else_are_refused(which, name, tmp_path):
    config, message = WANTS[name][which]
    folder = FAMILIES[name].make(tmp_path, config)
    with pytest.raises(UsageError, match=rf"^config model\.path: .*has a transformer with {message}: .* for texts"):
        model_of(name, folder)


@pytest.mark.parametrize("part", ["text_encoder", "transformer"])
def test_parts_that_a_family_needs_may_not_be_left_out(part, name, folder, tmp_path):
    copy = copied(folder, tmp_path)
    changed(copy / "model_index.json", **{part: [None, None]})
    with pytest.raises(UsageError, match=f"the {part} of .* is None of None"):
        model_of(name, copy)


@pytest.mark.parametrize(("left", "other"), [("text_encoder_3", "tokenizer_3"), ("tokenizer_3", "text_encoder_3")])
def test_t5_is_left_out_with_its_tokenizer_or_not_at_all(left, other, folders, tmp_path):
    copy = copied(folders["sd3"], tmp_path)
    changed(copy / "model_index.json", **{left: [None, None]})
    with pytest.raises(UsageError, match=f"has a {other} and no {left}: its model_index.json should have both"):
        model_of("sd3", copy)
    assert model_of("sd3", copy, t5=False).pipe.text_encoder_3 is None


def test_code_in_a_folder_does_not_run(name, folder, tmp_path, monkeypatch):
    copy, ran = copied(folder, tmp_path), tmp_path / "ran"
    (tmp_path / "importable.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    for extra in ("image_encoder", "feature_extractor", "extra"):
        (copy / extra).mkdir(exist_ok=True)
        changed(copy / "model_index.json", **{extra: ["importable", "SiglipVisionModel"]})
    t5 = "text_encoder_3" if name == "sd3" else "text_encoder_2"
    changed(copy / t5 / "config.json", _attn_implementation="kernels-community/flash-attn3")
    model = model_of(name, copy)
    assert getattr(model.pipe, t5).config._attn_implementation == "sdpa"
    assert not ran.exists()


def test_the_recipe_is_a_config_of_this_model(name):
    config = load_config([str(ROOT / "configs" / name / "compressibility.yaml"), "prompts.train=prompts.txt"])
    assert config.model["name"] == name
    header = re.match(r"(#.*\n)+", (ROOT / "configs" / name / "compressibility.yaml").read_text())[0]
    assert "Not run" in header
