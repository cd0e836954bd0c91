"""Stable Diffusion XL on a tiny pipeline of random weights: the images, files and refusals are those of diffusers."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from comfyui_names import missed
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from drawing import CPU, PROMPTS, SEEDS, perturb, pictures
from helpers import ROOT, run_python
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sdxl_pipeline import UNET, sdxl_pipeline
from single_file import unet_key, vae_key

from condrl import UsageError
from condrl.commands import finetune
from condrl.diffusion.noise import seeded
from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import rollout
from condrl.loading import load_config
from condrl.models.adapter import add_lora
from condrl.models.latent import ATTENTION, LatentModel, unet_layers
from condrl.models.lora import KOHYA_FILE, LORA_FILE, lora_layers, lora_state, save_lora
from condrl.plugins.models.sdxl import SDXL
from condrl.plugins.models.stable_diffusion import StableDiffusion
from condrl.shapes.networks import TOKENS
from condrl.training.build import make_sampler

SIZE = {"height": 24, "width": 16}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return sdxl_pipeline(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture
def model(folder):
    return SDXL(CPU, path=str(folder), lora_rank=2)


def plain(folder, schedule=None):
    """diffusers' own pipeline with its DDIM, whose noise levels have our precision."""
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    if schedule is not None:
        pipe.scheduler.alphas_cumprod = schedule.alpha_bar
    return pipe


def their_pictures(pipe, guidance=5.0, **options):
    options |= {"num_inference_steps": 5, "eta": 1.0, "guidance_scale": guidance, "output_type": "pt"}
    images = [pipe(p, generator=g, **options).images[0] for p, g in zip(PROMPTS, seeded(SEEDS), strict=True)]
    return torch.stack(images)


def changed(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def copied(folder, place):
    return shutil.copytree(folder, place / "model")


def with_unet(folder, place, **config):
    """A copy of the pipeline with another UNet."""
    copy = copied(folder, place)
    torch.manual_seed(1)
    UNet2DConditionModel(**{**UNET, **config}).save_pretrained(copy / "unet")
    return copy


# ---------------------------------------------------------------------------------------------- as diffusers


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"guidance": 1.0}, {"guidance": 1.0}),
        ({}, {}),
        ({"negative_prompt": "a blue star"}, {"negative_prompt": "a blue star"}),
        ({"negative_prompt": ""}, {"negative_prompt": ""}),
        (SIZE, SIZE),
    ],
)
def test_images_are_those_of_a_diffusers_pipeline(options, theirs, folder):
    model = SDXL(CPU, path=str(folder), **options)
    expected = their_pictures(plain(folder, model.schedule), **theirs)
    assert expected.shape[1:] == model.sample_shape
    assert expected.std() > 0.05
    torch.testing.assert_close(pictures(model, PROMPTS, SEEDS), expected, atol=1e-5, rtol=0)


def test_a_step_is_that_of_diffusers(folder):
    """The network's call written out: features of both encoders, the second one's of the prompt, and the size."""
    model = SDXL(CPU, path=str(folder), **SIZE)
    pipe = plain(folder, model.schedule)
    policy = Policy(model, make_sampler({"name": "ddim", "steps": 5, "spacing": None, "eta": 0.0}, model.schedule))
    x = torch.randn(3, *model.state_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = policy.transition(x, torch.full((3,), 2), model.encode(PROMPTS)).mean
        features, zeros, pooled, pooled_zeros = pipe.encode_prompt(PROMPTS, device=CPU)
        added = {
            "text_embeds": torch.cat([pooled_zeros, pooled]),
            "time_ids": torch.tensor([24.0, 16.0, 0.0, 0.0, 24.0, 16.0]).repeat(6, 1),
        }
        pipe.scheduler.set_timesteps(5)
        t = pipe.scheduler.timesteps[2]
        both = pipe.unet(torch.cat([x, x]), t, torch.cat([zeros, features]), added_cond_kwargs=added).sample.chunk(2)
        theirs = pipe.scheduler.step(both[0] + 5 * (both[1] - both[0]), t, x, eta=0.0).prev_sample
    assert (ours - x).abs().mean() > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_network_that_says_v_draws_as_in_diffusers(folder, tmp_path):
    """The scheduler's prediction_type alone tells it from one that says epsilon."""
    copy = copied(folder, tmp_path)
    changed(copy / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    model = SDXL(CPU, path=str(copy))
    drawn, expected = pictures(model, PROMPTS, SEEDS), their_pictures(plain(copy, model.schedule))
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=0)
    assert (drawn - their_pictures(plain(folder, model.schedule))).abs().max() > 0.05


def test_gradient_checkpointing_changes_no_gradient(folder):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = SDXL(CPU, path=str(folder), lora_rank=2, gradient_checkpointing=checkpointing)
        assert model.module.is_gradient_checkpointing == checkpointing
        perturb(model)
        x = torch.randn(2, *model.state_shape, generator=torch.Generator().manual_seed(1))
        score = model.score(x, torch.tensor([0.3, 0.9], dtype=torch.float64), model.encode(PROMPTS[:2]))
        weights = [p for p in model.module.parameters() if p.requires_grad]
        gradients.append(torch.autograd.grad(score.square().sum(), weights))
    assert gradients[0][0].abs().max() > 0
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", ["ddim", "euler_maruyama", "dpm_solver_pp", "pcpo"])
def test_ratios_are_one_before_an_update(sampler, model):
    """With guidance, in batches of another size than the roll-out's."""
    perturb(model)
    options = {"weight": 100.0} if sampler == "pcpo" else {"eta": 0.7}
    policy = Policy(model, make_sampler({"name": sampler, "steps": 4, "spacing": None, **options}, model.schedule))
    found = rollout(policy, model.encode(PROMPTS), torch.Generator().manual_seed(0), 2)
    noisy = policy.sampler.stochastic.nonzero().flatten().tolist()
    assert len(noisy) >= 3
    for k in noisy:
        state = None if found.solver_states is None else found.solver_states[k]
        with torch.no_grad():
            transition = policy.transition(found.states[k], torch.full((3,), k), found.condition, state)
        torch.testing.assert_close(transition.log_prob(found.states[k + 1]), found.log_probs[k], atol=2e-3, rtol=1e-5)


def test_what_the_unconditional_branch_is_given(folder, tmp_path):
    """Zeros by default where the pipeline says so, which the empty prompt is not."""
    copy = copied(folder, tmp_path)
    changed(copy / "model_index.json", force_zeros_for_empty_prompt=False)
    zeros, empty, given = (
        SDXL(CPU, path=str(path), negative_prompt=prompt)
        for path, prompt in ((folder, None), (copy, None), (folder, ""))
    )
    nothing, features = zeros.embeddings(zeros.negative), zeros.embeddings(zeros.encode([""]))
    assert not any(part.any() for part in nothing)
    assert all(part.any() for part in features)
    for model in (empty, given):
        assert all(map(torch.equal, model.embeddings(model.negative), features))


def test_the_vae_is_in_float32_where_half_precision_is_too_small(folder, tmp_path):
    copy = copied(folder, tmp_path)
    changed(copy / "vae" / "config.json", force_upcast=False)
    kept, rounded = (SDXL(CPU, path=str(path), dtype="bfloat16", guidance=1.0) for path in (folder, copy))
    saved = AutoencoderKL.from_pretrained(folder / "vae").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in kept.vae.state_dict().items())
    assert {value.dtype for value in rounded.vae.state_dict().values()} == {torch.bfloat16}
    for model in (kept, rounded):
        assert {part.dtype for part in model.embeddings(model.encode(PROMPTS))} == {torch.bfloat16}
        assert model.module.conv_in.weight.dtype == torch.bfloat16
    full = pictures(SDXL(CPU, path=str(folder), guidance=1.0), PROMPTS, SEEDS)
    assert (pictures(kept, PROMPTS, SEEDS) - full).abs().mean() < 0.02


def test_prompts_that_either_encoder_cuts_are_told_once(model, capsys):
    long = "one two three four five small large"  # 9 tokens for one tokenizer, 31 for the other
    model.encode([*PROMPTS, long, long])
    said = f"warning: the prompt {long!r} has 31 tokens; the model reads the first {TOKENS}\n"
    assert capsys.readouterr().err == said
    model.encode([long])
    assert capsys.readouterr().err == ""


def test_embeddings_are_on_the_host_and_encoders_on_the_device_only_while_they_encode(model, monkeypatch):
    places = {"text_encoder": [], "text_encoder_2": []}
    for name, calls in places.items():
        encoder = getattr(model.pipe, name)
        monkeypatch.setattr(encoder, "to", lambda device, calls=calls: calls.append(torch.device(device)))
        encoder.register_forward_hook(lambda *_, calls=calls: calls.append("encodes"))
    model.device = torch.device("cpu", 0)
    model.embeddings(model.encode(["a red star", "a blue star"]))
    for calls in places.values():
        assert calls == [torch.device("cpu", 0), "encodes", "encodes", torch.device("cpu")]
    assert all(part.device == CPU for part in model._host_embeddings(["a red star"]))


def test_the_plugin_holds_only_what_is_its_own():
    """Of what LatentModel has, only what it leaves to a family, and the default of `path`."""
    own = {name for name in vars(SDXL) if not name.startswith("__") and not name.startswith("_abc")}
    shared = own & (set(dir(LatentModel)) | LatentModel.__dataclass_fields__.keys())
    assert shared == LatentModel.__abstractmethods__ | {"family", "path"}
    (tree,) = [
        node
        for node in ast.parse((ROOT / "plugins" / "models" / "sdxl.py").read_text()).body
        if isinstance(node, ast.ClassDef)
    ]
    assert {n.name for n in tree.body if isinstance(n, ast.FunctionDef)} - shared == {"_encode_prompt"}


# ---------------------------------------------------------------------------------------------- LoRA files


@pytest.mark.slow
def test_diffusers_draws_the_same_from_either_file_and_so_do_we(folder, tmp_path):
    model = SDXL(CPU, path=str(folder), lora_rank=2, lora_alpha=5)
    before = pictures(model, PROMPTS, SEEDS)
    perturb(model)
    ours = pictures(model, PROMPTS, SEEDS)
    assert (ours - before).abs().max() > 10 / 255
    model.save_adapter(tmp_path)
    for file in (LORA_FILE, KOHYA_FILE):
        pipe = plain(folder)
        pipe.load_lora_weights(tmp_path, weight_name=file)
        assert (ours - their_pictures(pipe)).abs().max() < 1 / 255
        again = SDXL(CPU, path=str(folder), lora_rank=2, lora=str(tmp_path / file))
        torch.testing.assert_close(pictures(again, PROMPTS, SEEDS), ours, atol=1e-4, rtol=0)


def test_kohyas_files_draw_as_diffusers_draws_them(folder, tmp_path):
    """Its trainer has the modules of Stable Diffusion XL in the original layout, without resnets."""
    model = SDXL(CPU, path=str(folder), lora_rank=2, lora_targets=(*ATTENTION, "ff.net.2", "proj_in"))
    before = pictures(model, PROMPTS, SEEDS)
    perturb(model)
    state = lora_state(model.module)
    modules = {key.rsplit(".", 2)[0] for key in state}
    names = dict(zip(modules, original_unet_names(model.pipe.unet.config, modules), strict=True))
    file = {}
    for module, name in names.items():
        base = "lora_unet_" + name.replace(".", "_")
        for part in ("down", "up"):
            file[f"{base}.lora_{part}.weight"] = state[f"{module}.{part}.weight"]
        file[f"{base}.alpha"] = torch.tensor(3.0)
    save_file(file, tmp_path / LORA_FILE)
    model.load_adapter(tmp_path)
    pipe = plain(folder)
    pipe.load_lora_weights(tmp_path)
    theirs = their_pictures(pipe)
    assert (theirs - before).abs().max() > 10 / 255
    assert (pictures(model, PROMPTS, SEEDS) - theirs).abs().max() < 1 / 255


def narrow_unet():
    """The modules of stable-diffusion-xl-base-1.0's UNet, narrow."""
    shape = dict(block_out_channels=(8, 16, 16), attention_head_dim=(2, 4, 4), layers_per_block=2)
    shape |= dict(transformer_layers_per_block=(1, 2, 10))
    shape |= dict(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"))
    shape |= dict(up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))
    return UNet2DConditionModel(**{**UNET, **shape})


def test_comfyui_takes_every_key(tmp_path):
    """It lists lora_unet_<module> for the modules that it finds in a checkpoint; diffusers' converter has them as well."""
    unet = narrow_unet()
    original = {f"model.diffusion_model.{key}": value for key, value in original_unet(unet).items()}
    found = {key.removesuffix(".weight") for key in convert_ldm_unet_checkpoint(original, dict(unet.config))}
    add_lora(unet, 2, 2, (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "linear_1"))
    save_lora(unet, tmp_path, "some/base")
    keys = list(load_file(tmp_path / KOHYA_FILE))
    bases = {key.partition(".")[0] for key in keys}
    assert bases <= {"lora_unet_" + name.replace(".", "_") for name in found}
    assert len(bases) == len(lora_layers(unet)) == len(keys) / 3
    assert "lora_unet_add_embedding_linear_1" in bases
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_9_attn2_to_out_0" in bases
    assert missed(keys, found) == []


def test_header_and_card_say_that_it_is_xl(model, tmp_path):
    model.save_adapter(tmp_path)
    with safe_open(tmp_path / KOHYA_FILE, "pt") as file:
        header = file.metadata()
    assert (header["ss_base_model_version"], header["ss_v2"]) == ("sdxl_base_v1-0", "False")
    assert yaml.safe_load((tmp_path / "README.md").read_text().split("---\n")[1])["tags"] == [
        "lora", "text-to-image", "stable-diffusion-xl", "condrl"
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------- runs


RUN = """
model: {name: sdxl, lora_rank: 2, height: 24, width: 16}
algorithm: {name: ddpo}
sampler: {steps: 3}
rewards: {brightness: {}}
train: {prompts_per_epoch: 2, images_per_prompt: 4, rollout_batch: 8, updates_per_epoch: 2, loss_batch: 8, lr: 0.03}
run: {checkpoint_seconds: 0}
"""


@pytest.mark.slow
def test_a_run_tunes_it_and_goes_on_to_the_bit(folder, tmp_path):
    """And what it saves draws in diffusers what it draws here."""
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "prompts.txt").write_text("a red star\na blue circle\n")
    words = [str(tmp_path / "run.yaml"), f"model.path={folder}", f"prompts.train={tmp_path}/prompts.txt"]
    for place, epochs in (("whole", 3), ("parts", 2), ("parts", 3)):
        more = [f"run.dir={tmp_path / place}", f"train.epochs={epochs}", "run.resume=auto"]
        assert finetune.main([*words, *more]) == 0
    for name in ("metrics.jsonl", f"lora/{LORA_FILE}", f"lora/{KOHYA_FILE}"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    lora = tmp_path / "whole" / "lora"
    model = SDXL(CPU, path=str(folder), lora_rank=2, lora=str(lora), **SIZE)
    ours = pictures(model, PROMPTS, SEEDS)
    base = SDXL(CPU, path=str(folder), **SIZE)
    assert (ours - pictures(base, PROMPTS, SEEDS)).abs().max() > 5 / 255
    pipe = plain(folder)
    pipe.load_lora_weights(lora)
    assert (ours - their_pictures(pipe, **SIZE)).abs().max() < 1 / 255


@pytest.mark.slow
def test_two_processes_tune_like_one(folder, tmp_path):
    """By ratios that the minibatches of both make, of images with guidance."""
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "prompts.txt").write_text("a red star\na blue circle\n")
    words = [str(tmp_path / "run.yaml"), f"model.path={folder}", f"prompts.train={tmp_path}/prompts.txt"]
    words += ["train.epochs=2", "train.lr=0.003", "train.max_failed=0"]
    script, cpu = str(ROOT / "scripts" / "finetune.py"), {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    done = run_python(*two, *words, f"run.dir={tmp_path / 'two'}", cwd=tmp_path, **cpu)
    assert done.returncode == 0, done.stderr[-2000:]
    assert finetune.main([*words, f"run.dir={tmp_path / 'one'}"]) == 0
    loras = [load_file(tmp_path / place / "lora" / LORA_FILE) for place in ("one", "two")]
    one, other = (torch.cat([lora[k].flatten() for k in sorted(lora) if ".up." in k]) for lora in loras)
    assert one.norm() > 0
    assert (other - one).norm() < 0.1 * one.norm()  # Adam makes much of gradients near zero


def test_the_recipe_is_a_config_of_this_model():
    config = load_config([str(ROOT / "configs" / "sdxl" / "compressibility.yaml"), "prompts.train=prompts.txt"])
    assert config.model["name"] == "sdxl"


# ---------------------------------------------------------------------------------------------- files


def original_unet_names(config, modules):
    """What modules of attention blocks are called in the original layout."""
    return [unet_key(f"{module}.weight", config.layers_per_block, set()).removesuffix(".weight") for module in modules]


def original_unet(unet):
    """A UNet's weights by their names in the original layout."""
    state = unet.state_dict()
    attended = set(re.findall(r"up_blocks\.(\d+)\.attentions", " ".join(state)))
    sizes = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    named = {}
    for key, value in state.items():
        stem, _, end = key.rpartition(".")
        found = f"{sizes[stem]}.{end}" if stem in sizes else unet_key(key, unet.config.layers_per_block, attended)
        named[found] = value
    return named


OPEN_CLIP = {
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm": "ln_",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_ln_": "ln_final",
}


def open_clip_names(state):
    """A text encoder's weights as open_clip has them: queries, keys and values in one, the projection transposed."""
    named, projection = {}, state["text_projection.weight"]
    for key, value in state.items():
        if key == "text_projection.weight" or ".k_proj." in key or ".v_proj." in key:
            continue
        name = key.removeprefix("text_model.")
        for new, old in OPEN_CLIP.items():
            name = name.replace(new, old)
        if ".q_proj." in key:
            value = torch.cat([state[key.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            name = name.replace(".q_proj.", ".in_proj_")
        named[name] = value
    return named | {"text_projection": projection.T}


def write_single_file(folder, path):
    """A diffusers folder rewritten as one file in Stable Diffusion XL's original layout."""
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    tensors = {f"model.diffusion_model.{key}": value for key, value in original_unet(pipe.unet).items()}
    for key, value in pipe.vae.state_dict().items():
        attention = re.search(r"attentions.*to_\w+.*weight", key)
        value = value[:, :, None, None] if attention else value
        tensors["first_stage_model." + vae_key(key, len(pipe.vae.config.up_block_types))] = value
    for key, value in pipe.text_encoder.state_dict().items():
        tensors["conditioner.embedders.0.transformer.text_model." + key.removeprefix("text_model.")] = value
    for key, value in open_clip_names(pipe.text_encoder_2.state_dict()).items():
        tensors[f"conditioner.embedders.1.model.{key}"] = value
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, path)
    return path


def test_single_file_checkpoint(folder, tmp_path):
    file = write_single_file(folder, tmp_path / "model.safetensors")
    one, other = (
        SDXL(CPU, **options)
        for options in ({"path": str(file), "single_file_config": str(folder)}, {"path": str(folder)})
    )
    torch.testing.assert_close(pictures(one, PROMPTS, SEEDS), pictures(other, PROMPTS, SEEDS), atol=1e-5, rtol=0)
    half = SDXL(CPU, path=str(file), single_file_config=str(folder), dtype="bfloat16")
    assert all(torch.equal(value, other.vae.state_dict()[name]) for name, value in half.vae.state_dict().items())
    state = load_file(file)
    refiner = {key.replace("embedders.1.", "embedders.0."): v for key, v in state.items() if "embedders.0." not in key}
    save_file(refiner, tmp_path / "refiner.safetensors")
    with pytest.raises(UsageError, match=r"refiner.safetensors is a Stable Diffusion XL refiner"):
        SDXL(CPU, path=str(tmp_path / "refiner.safetensors"))
    with pytest.raises(
        UsageError, match=r"model.safetensors is not a Stable Diffusion 1.* model: set model.name=sdxl$"
    ):
        StableDiffusion(CPU, path=str(file))
    save_file({**state, "v_pred": torch.zeros(0)}, tmp_path / "v.safetensors")
    with pytest.raises(UsageError, match=r"v.safetensors predicts v: give model.single_file_config="):
        SDXL(CPU, path=str(tmp_path / "v.safetensors"))
    SDXL(CPU, path=str(tmp_path / "v.safetensors"), single_file_config=str(folder))
    state.pop("conditioner.embedders.1.model.text_projection")
    save_file(state, file)
    with pytest.raises(UsageError, match=r"^config model\.path: .*lacks weights") as found:
        SDXL(CPU, path=str(file), single_file_config=str(folder))
    assert "\n" not in str(found.value)


def test_the_wrong_family_is_told_the_right_name(folder, pipeline, tmp_path):
    from single_file import write_single_file as write_sd15

    with pytest.raises(UsageError, match="is a StableDiffusionXLPipeline: set model.name=sdxl$"):
        StableDiffusion(CPU, path=str(folder))
    with pytest.raises(UsageError, match="is a StableDiffusionPipeline: set model.name=stable_diffusion$"):
        SDXL(CPU, path=str(pipeline))
    file = write_sd15(pipeline, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="is not a Stable Diffusion XL model: set model.name=stable_diffusion$"):
        SDXL(CPU, path=str(file))


def test_an_image_to_image_folder_is_the_same_model(folder, tmp_path):
    copy = copied(folder, tmp_path)
    changed(copy / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline", requires_aesthetics_score=False)
    one, other = (pictures(SDXL(CPU, path=str(path)), PROMPTS, SEEDS) for path in (copy, folder))
    assert torch.equal(one, other)


SMALLER = {
    "uneven depths, a middle without attention": {
        "transformer_layers_per_block": [1, [2]],
        "reverse_transformer_layers_per_block": [[3, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    },
    "no middle": {"mid_block_type": None},
}


@pytest.mark.parametrize("which", SMALLER)
def test_smaller_unets_are_what_they_are_in_diffusers(which, folder, tmp_path):
    """As SSD-1B's and KOALA's, which are Stable Diffusion XL with fewer layers."""
    model = SDXL(CPU, path=str(with_unet(folder, tmp_path, **SMALLER[which])), lora_rank=2)
    expected = their_pictures(plain(tmp_path / "model", model.schedule))
    torch.testing.assert_close(pictures(model, PROMPTS, SEEDS), expected, atol=1e-5, rtol=0)
    assert all(isinstance(layer, torch.nn.Module) for layer in unet_layers(model.module))


def test_a_distilled_model_is_drawn_without_guidance_on_its_own_grid(folder, tmp_path):
    """As SDXL-Turbo's folder has it: another scheduler, and steps from the very end."""
    copy = copied(folder, tmp_path)
    changed(copy / "model_index.json", scheduler=["diffusers", "EulerAncestralDiscreteScheduler"])
    changed(copy / "scheduler" / "scheduler_config.json", timestep_spacing="trailing")
    changed(copy / "scheduler" / "scheduler_config.json", _class_name="EulerAncestralDiscreteScheduler")
    model = SDXL(CPU, path=str(copy), guidance=1.0)
    expected = their_pictures(plain(copy, model.schedule), guidance=0.0)
    torch.testing.assert_close(pictures(model, PROMPTS, SEEDS), expected, atol=1e-5, rtol=0)


def index(**values):
    return lambda copy: changed(copy / "model_index.json", **values)


def part(name, **values):
    return lambda copy: changed(copy / name / "config.json", **values)


REFUSED = {
    r"is a refiner, which redraws a base model's images": index(
        requires_aesthetics_score=True, text_encoder=[None, None], tokenizer=[None, None]
    ),
    r"is a StableDiffusionXLInpaintPipeline: known are StableDiffusionXLPipeline": index(
        _class_name="StableDiffusionXLInpaintPipeline"
    ),
    r"the text_encoder_2 of .* is CLIPTextModel of transformers": index(
        text_encoder_2=["transformers", "CLIPTextModel"]
    ),
    r"the tokenizer_2 of .* is CLIPTokenizer of stranger": index(tokenizer_2=["stranger", "CLIPTokenizer"]),
    r"has a VAE with a mean or a deviation": part("vae", latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
    r"the weights of .*/text_encoder_2 lack": lambda copy: rewrite(copy / "text_encoder_2", "text_projection.weight"),
    r"tokenizer_2 has no vocabulary": lambda copy: (
        shutil.rmtree(copy / "tokenizer_2") or (copy / "tokenizer_2").mkdir()
    ),
    r"has text encoders of 24 and 12 tokens, which cannot be joined": lambda copy: changed(
        copy / "tokenizer_2" / "tokenizer_config.json", model_max_length=12
    ),
    r"scheduler is a EDMEulerScheduler": lambda copy: (
        index(scheduler=["diffusers", "EDMEulerScheduler"])(copy),
        (copy / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "EDMEulerScheduler"}'),
    ),
}


def rewrite(place, key):
    state = load_file(place / "model.safetensors")
    state.pop(key)
    save_file(state, place / "model.safetensors")


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_a_base_model_is_refused_in_a_line(message, folder, tmp_path):
    copy = copied(folder, tmp_path)
    REFUSED[message](copy)
    with pytest.raises(UsageError, match=message) as found:
        SDXL(CPU, path=str(copy))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"in_channels": 9}, "in_channels=9, and a VAE with latent_channels=4"),
        ({"time_cond_proj_dim": 8}, "time_cond_proj_dim=8"),
        ({"addition_embed_type": None}, "addition_embed_type=None"),
        ({"cross_attention_dim": 24}, "prompts of 24 features, and text encoders of 40"),
        ({"projection_class_embeddings_input_dim": 5 * 4 + 20}, "input_dim=40 where a base model's has 44"),
    ],
)
def test_unets_that_want_something_else_are_refused(config, message, folder, tmp_path):
    """An inpainting model's, a guidance-distilled one's, Stable Diffusion's, a refiner's two."""
    with pytest.raises(
        UsageError, match=rf"^config model\.path: .*{message}.*: Stable Diffusion XL for texts"
    ) as found:
        SDXL(CPU, path=str(with_unet(folder, tmp_path, **config)))
    assert "\n" not in str(found.value)


def test_code_in_a_folder_does_not_run(folder, tmp_path, monkeypatch):
    copy, ran = copied(folder, tmp_path), Path(tmp_path / "ran")
    (tmp_path / "importable.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("safety_checker", "image_encoder", "feature_extractor", "extra"):
        (copy / name).mkdir(exist_ok=True)
        changed(copy / "model_index.json", **{name: ["importable", "CLIPVisionModelWithProjection"]})
    changed(copy / "text_encoder_2" / "config.json", _attn_implementation="kernels-community/flash-attn3")
    model = SDXL(CPU, path=str(copy))
    assert model.pipe.text_encoder_2.config._attn_implementation == "sdpa"
    assert not ran.exists()
