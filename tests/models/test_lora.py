"""LoRA files from and for other programs, by the other program's rules: diffusers, peft, ComfyUI's table of names."""

import runpy

import comfyui_names
import pytest
import torch
import yaml
from comfyui_names import missed
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from drawing import CPU, PROMPTS, SEEDS, diffusers_pictures, perturb, pictures
from helpers import DATA, ROOT
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from condrl import UsageError
from condrl.models.adapter import add_lora
from condrl.models.latent import ATTENTION
from condrl.models.lora import KOHYA_FILE, LORA_FILE, Factors, fit, lora_layers, lora_state, save_lora
from condrl.plugins.models.stable_diffusion import StableDiffusion

QUICKSTART = tuple(OmegaConf.load(ROOT / "configs" / "quickstart.yaml").model.lora_targets)
ALL = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "time_emb_proj")


def diffusers_pipe(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


# ---------------------------------------------------------------------------------------------- out


def sd15_unet():
    """The modules of stable-diffusion-v1-5's UNet, narrow."""
    return UNet2DConditionModel(block_out_channels=(8, 8, 16, 16), norm_num_groups=4, cross_attention_dim=8)


@pytest.mark.parametrize("targets", [ATTENTION, QUICKSTART, (*QUICKSTART, "time_emb_proj", "conv_shortcut", "conv")])
def test_comfyui_takes_every_key(targets, tmp_path):
    unet = sd15_unet()
    names = [name for name, module in unet.named_modules() if hasattr(module, "weight")]
    add_lora(unet, 2, 2, targets)
    save_lora(unet, tmp_path, "some/base")
    keys = list(load_file(tmp_path / KOHYA_FILE))
    assert missed(keys, names) == []
    assert len(keys) == 3 * len(lora_layers(unet))
    assert {key.split(".", 1)[1] for key in keys} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert missed(load_file(tmp_path / LORA_FILE), names)  # the table is no rubber stamp: these names it has not


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the outside table of ComfyUI's names")
def test_the_table_of_names_is_the_outside_one():
    """By the modules of SD 1.5 and by keys of every kind, right and wrong."""
    outside = runpy.run_path(str(DATA / "comfyui_unet_names.py"))
    names = [name for name, module in sd15_unet().named_modules() if hasattr(module, "weight")]
    assert comfyui_names.bases(names) == outside["accepted"](names)
    ends = [*outside["SUFFIXES"], ".lora_mid.weight", ".dora_scale", "_alpha"]
    keys = [base + end for base in sorted(outside["accepted"](names[:40]) | set(names[:40])) for end in ends]
    assert comfyui_names.missed(keys, names) == outside["missed"](keys, names)


def test_kohya_scale_is_one_by_comfyui_arithmetic(model, tmp_path):
    """ComfyUI adds alpha / rank * up @ down, with the rank of `down`."""
    wide = StableDiffusion(CPU, path=model.path, lora_rank=2, lora_alpha=7, lora_targets=ALL)
    perturb(wide)
    wide.save_adapter(tmp_path)
    state = load_file(tmp_path / KOHYA_FILE)
    for name, layer in lora_layers(wide.module).items():
        up, down, alpha = (
            state[f"lora_unet_{name.replace('.', '_')}.{part}"]
            for part in ("lora_up.weight", "lora_down.weight", "alpha")
        )
        change = alpha / len(down) * up.flatten(1) @ down.flatten(1)
        torch.testing.assert_close(change.view(layer.get_base_layer().weight.shape), layer.get_delta_weight("default"))


@pytest.mark.slow
@pytest.mark.parametrize("file", [LORA_FILE, KOHYA_FILE, None])
@pytest.mark.parametrize("targets", [ATTENTION, QUICKSTART])
def test_diffusers_draws_the_same_from_either_file(file, targets, pipeline, tmp_path):
    model = StableDiffusion(CPU, path=str(pipeline), lora_rank=4, lora_alpha=10, lora_targets=targets)
    before = pictures(model, PROMPTS, SEEDS)
    perturb(model)
    model.save_adapter(tmp_path)
    ours = pictures(model, PROMPTS, SEEDS)
    pipe = diffusers_pipe(pipeline)
    pipe.load_lora_weights(tmp_path, **({"weight_name": file} if file else {}))
    assert (ours - diffusers_pictures(pipe, PROMPTS, SEEDS)).abs().max() < 1 / 255
    assert (ours - before).abs().max() > 10 / 255


def test_header_and_card_say_what_it_is(model, tmp_path):
    model.path = 'odd: "name" #1'
    model.save_adapter(tmp_path, {"rewards": "shapes: 1.0, aesthetic: 0.1"})
    for file in (LORA_FILE, KOHYA_FILE):
        found = metadata(tmp_path / file)
        assert found["base_model"] == model.path
        assert (found["rank"], found["alpha"]) == ("2", "2")
        assert found["rewards"] == "shapes: 1.0, aesthetic: 0.1"
    assert (
        metadata(tmp_path / KOHYA_FILE)["ss_network_dim"] == metadata(tmp_path / KOHYA_FILE)["ss_network_alpha"] == "2"
    )
    _, front, text = (tmp_path / "README.md").read_text().split("---\n")
    assert yaml.safe_load(front)["base_model"] == model.path
    assert "ss_base_model_version" not in metadata(tmp_path / KOHYA_FILE)  # neither 1.x nor 2.x
    for words in (LORA_FILE, KOHYA_FILE, "ComfyUI and A1111", "diffusers", "shapes: 1.0, aesthetic: 0.1"):
        assert words in text


@pytest.mark.parametrize(("width", "version"), [(768, "sd_v1"), (1024, "sd_v2")])
def test_a1111_is_told_the_version(width, version, tmp_path):
    unet = sd15_unet()
    add_lora(unet, 2, 2, ATTENTION)
    unet.register_to_config(cross_attention_dim=width)
    save_lora(unet, tmp_path, "base")
    found = metadata(tmp_path / KOHYA_FILE)
    assert (found["ss_base_model_version"], found["ss_v2"]) == (version, str(version == "sd_v2"))


# ---------------------------------------------------------------------------------------------- in


def peft_unet(folder, targets=ALL, **config):
    """A UNet with a LoRA that changes the images, as another program makes one."""
    torch.manual_seed(1)
    unet = diffusers_pipe(folder).unet
    unet.add_adapter(LoraConfig(target_modules=list(targets), init_lora_weights="gaussian", **config))
    for layer in lora_layers(unet).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    return unet


def diffusers_file(unet, folder, with_metadata=True, convert=False):
    """Written by diffusers itself; it cannot read what its own converter leaves of modules other than attention."""
    state = get_peft_model_state_dict(unet)
    state = convert_state_dict_to_diffusers(state) if convert else state
    extra = _collate_lora_metadata({"unet": unet}) if with_metadata else {}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state, **extra)
    return folder / LORA_FILE


def renamed(unet, folder, rename, extra=None):
    state = {rename(key): value.contiguous() for key, value in get_peft_model_state_dict(unet).items()}
    folder.mkdir(exist_ok=True)
    save_file(state | (extra or {}), folder / LORA_FILE)
    return folder / LORA_FILE


def kohya_file(unet, folder, alpha):
    """kohya's names by diffusers' own converter, with kohya's alpha; None for none."""
    state = convert_state_dict_to_kohya({f"unet.{k}": v for k, v in get_peft_model_state_dict(unet).items()})
    named = {}
    for key, value in state.items():
        if not key.endswith(".alpha"):
            named[key] = value.contiguous()
        elif alpha is not None:
            named[key] = torch.tensor(float(alpha))
    folder.mkdir(exist_ok=True)
    save_file(named, folder / LORA_FILE)
    return folder / LORA_FILE


def old_processor_name(key):
    """As diffusers named attention layers when they had processors."""
    key = "unet." + key.replace(".to_", ".processor.to_").replace("to_out.0", "to_out")
    for new, old in (("lora_A", "down"), ("lora_B", "up")):
        key = key.replace(f".{new}.", f"_lora.{old}." if ".processor." in key else f".lora.{old}.")
    return key


FLAVOURS = {
    "diffusers": lambda pipe, to: diffusers_file(peft_unet(pipe, ATTENTION, r=4, lora_alpha=4), to, False, True),
    "diffusers with alpha": lambda pipe, to: diffusers_file(
        peft_unet(pipe, ATTENTION, r=4, lora_alpha=8), to, convert=True
    ),
    "alpha in metadata": lambda pipe, to: diffusers_file(peft_unet(pipe, r=4, lora_alpha=8), to),
    "rslora": lambda pipe, to: diffusers_file(peft_unet(pipe, r=4, lora_alpha=4, use_rslora=True), to),
    "patterns": lambda pipe, to: diffusers_file(
        peft_unet(pipe, r=4, lora_alpha=2, rank_pattern={"to_q": 2}, alpha_pattern={"to_q": 3, "conv1": 7}), to
    ),
    "kohya": lambda pipe, to: kohya_file(peft_unet(pipe, r=4, lora_alpha=4), to, None),
    "kohya with alpha": lambda pipe, to: kohya_file(peft_unet(pipe, r=4, lora_alpha=4), to, 2),
    "peft": lambda pipe, to: renamed(peft_unet(pipe, r=4, lora_alpha=4), to, lambda key: f"unet.{key}"),
    "old processors": lambda pipe, to: renamed(peft_unet(pipe, r=4, lora_alpha=4), to, old_processor_name),
    "float16": lambda pipe, to: diffusers_file(peft_unet(pipe, r=4, lora_alpha=8).half(), to),
}


@pytest.mark.slow
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("rank", [4, 6])
def test_a_file_draws_as_diffusers_draws_it(flavour, rank, pipeline, tmp_path):
    path = FLAVOURS[flavour](pipeline, tmp_path)
    model = StableDiffusion(CPU, path=str(pipeline), lora_rank=rank, lora_alpha=3, lora_targets=ALL)
    before = pictures(model, PROMPTS, SEEDS)
    model.load_adapter(path)
    pipe = diffusers_pipe(pipeline)
    pipe.load_lora_weights(tmp_path, weight_name=LORA_FILE)
    theirs = diffusers_pictures(pipe, PROMPTS, SEEDS)
    assert (pictures(model, PROMPTS, SEEDS) - theirs).abs().max() < 1 / 255
    assert (before - theirs).abs().max() > 10 / 255
    assert {p.dtype for n, p in model.module.named_parameters() if "lora" in n} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["base_model.model.", "base_model.model.unet."])
def test_a_folder_of_peft_draws_as_peft_draws_it(prefix, pipeline, tmp_path):
    """peft has alpha in adapter_config.json, which diffusers does not read."""
    torch.manual_seed(1)
    pipe = diffusers_pipe(pipeline)
    wrapped = get_peft_model(pipe.unet, LoraConfig(r=4, lora_alpha=12, target_modules=list(ALL)))
    for layer in lora_layers(wrapped).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    wrapped.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k.replace("base_model.model.", prefix): v for k, v in load_file(file).items()}, file)
    ours = pictures(
        StableDiffusion(CPU, path=str(pipeline), lora_rank=4, lora_targets=ALL, lora=str(tmp_path)), PROMPTS, SEEDS
    )
    pipe.unet = wrapped.merge_and_unload()
    assert (ours - diffusers_pictures(pipe, PROMPTS, SEEDS)).abs().max() < 1 / 255
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UsageError, match="settings in .*adapter_config.json cannot be read"):
        StableDiffusion(CPU, path=str(pipeline), lora_targets=ALL, lora=str(tmp_path))


def test_lora_comes_back_as_it_went_out(pipeline, tmp_path):
    first = StableDiffusion(CPU, path=str(pipeline), lora_rank=4, lora_alpha=10)
    perturb(first)
    first.save_adapter(tmp_path)
    for source in (tmp_path, tmp_path / LORA_FILE, tmp_path / KOHYA_FILE):
        again = StableDiffusion(CPU, path=str(pipeline), lora_rank=4, lora_alpha=2, lora=str(source))
        torch.testing.assert_close(
            pictures(again, PROMPTS, SEEDS), pictures(first, PROMPTS, SEEDS), atol=1e-5, rtol=1e-5
        )
        assert list(again.module.peft_config) == ["default"]  # into the adapter that is trained, not beside it


def test_a_smaller_rank_fills_part_of_the_adapter_and_all_of_it_can_learn(pipeline, tmp_path):
    first = StableDiffusion(CPU, path=str(pipeline), lora_rank=2)
    perturb(first)
    first.save_adapter(tmp_path)
    again = StableDiffusion(CPU, path=str(pipeline), lora_rank=5, lora=str(tmp_path))
    torch.testing.assert_close(pictures(again, PROMPTS, SEEDS), pictures(first, PROMPTS, SEEDS), atol=1e-5, rtol=1e-5)
    for layer in lora_layers(again.module).values():
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert down.norm(dim=1).gt(0).all()  # up's zeros learn where down is not zero
        assert up[:, 2:].eq(0).all()


def test_a_larger_rank_is_refitted_where_it_is_exact_and_refused_where_not(pipeline, tmp_path):
    large = StableDiffusion(CPU, path=str(pipeline), lora_rank=6)
    perturb(large)
    large.save_adapter(tmp_path / "full")
    with pytest.raises(UsageError, match=r"has rank 6.*set model\.lora_rank=6"):
        StableDiffusion(CPU, path=str(pipeline), lora_rank=3, lora=str(tmp_path / "full"))
    for layer in lora_layers(large.module).values():  # of rank 6 by its shape and of rank 3 in truth
        layer.lora_B["default"].weight.data[:, 3:] = layer.lora_B["default"].weight.data[:, :3] @ torch.randn(3, 3)
    large.save_adapter(tmp_path / "half")
    again = StableDiffusion(CPU, path=str(pipeline), lora_rank=3, lora=str(tmp_path / "half"))
    torch.testing.assert_close(pictures(again, PROMPTS, SEEDS), pictures(large, PROMPTS, SEEDS), atol=1e-4, rtol=1e-4)


def test_fit_keeps_the_product():
    torch.manual_seed(0)
    down, up = torch.randn(3, 20), torch.randn(10, 3)
    mix = torch.randn(8, 3)
    wide = Factors(mix @ down, up @ torch.linalg.pinv(mix))
    found = fit(wide, 3)
    torch.testing.assert_close(found.up @ found.down, up @ down, atol=1e-5, rtol=1e-5)
    assert found.down.shape == (3, 20)
    assert fit(wide, 2) is None
    assert fit(wide, 8) is wide


def test_modules_that_the_file_leaves_out_start_at_zero_and_that_is_said(pipeline, tmp_path, capsys):
    few = StableDiffusion(CPU, path=str(pipeline), lora_rank=2, lora_targets=("to_q",))
    perturb(few)
    few.save_adapter(tmp_path)
    capsys.readouterr()
    more = StableDiffusion(CPU, path=str(pipeline), lora_rank=2, lora_targets=("to_q", "to_k"))
    perturb(more)
    more.load_adapter(tmp_path)
    assert "nothing for 8 of 16 modules" in capsys.readouterr().err
    torch.testing.assert_close(pictures(more, PROMPTS, SEEDS), pictures(few, PROMPTS, SEEDS), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- refused


def changed(state, **changes):
    return {**state, **changes}


def some_state(model):
    perturb(model)
    return {
        f"unet.{k}".replace(".down.", ".lora.down.").replace(".up.", ".lora.up."): v
        for k, v in lora_state(model.module).items()
    }


BASE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
VALUE, OTHER = torch.zeros(2, 2), torch.ones(2, 2)
WRONG = {
    "text-encoder part.*text_encoder.x": {"text_encoder.x.lora_A.weight": VALUE},
    "text-encoder part": {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": VALUE},
    "text-encoder part.*lora_te1": {"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0)},
    "is a DoRA": {f"unet.{BASE}.lora_magnitude_vector": torch.zeros(2)},
    "is a DoRA.*dora_scale": {"lora_unet_x.dora_scale": torch.zeros(2)},
    "is a LyCORIS file.*hada_w1_a": {"lora_unet_x.hada_w1_a": VALUE},
    "is a LyCORIS file.*lokr_w1": {"lora_unet_x.lokr_w1": VALUE},
    "is a LyCORIS file.*lora_mid": {"lora_unet_x.lora_mid.weight": VALUE},
    "is a LyCORIS file.*diff": {"lora_unet_x.diff": VALUE},
    "is of a transformer": {"transformer.x.lora_A.weight": VALUE},
    "is not a LoRA.*conv_in.weight": {"conv_in.weight": VALUE},
    "another model.*no module unet.nowhere": {
        "unet.nowhere.lora.down.weight": VALUE,
        "unet.nowhere.lora.up.weight": OTHER,
    },
    "another model.*lora_unet_input_blocks_9": {"lora_unet_input_blocks_9_1_proj_in.lora_down.weight": VALUE},
    "is not whole.*ff.net.2": {"unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2.lora.down.weight": VALUE},
    "conv_in.*model.lora_targets leaves out": {
        "unet.conv_in.lora.down.weight": torch.zeros(2, 4, 3, 3),
        "unet.conv_in.lora.up.weight": torch.zeros(8, 2, 1, 1),
    },
    "is not whole: .*to_q": {f"unet.{BASE}.lora.up.weight": torch.zeros(8)},
    "is not whole: see .*to_q": {f"unet.{BASE}.alpha": torch.zeros(2)},
    "same weights under two names": {"lora_unet_" + BASE.replace(".", "_") + ".lora_up.weight": VALUE},
    "not finite.*to_q": {f"unet.{BASE}.lora.up.weight": torch.full((8, 2), torch.nan)},
    "another model: .*to_q maps 5 to 8 features there, 8 to 8 here": {
        f"unet.{BASE}.lora.down.weight": torch.zeros(2, 5)
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_read_is_refused_in_truth(message, model, tmp_path):
    before = [p.clone() for p in model.module.parameters()]
    save_file(changed(some_state(model), **WRONG[message]), tmp_path / LORA_FILE)
    for p, value in zip(model.module.parameters(), before, strict=True):
        p.data = value
    with pytest.raises(UsageError, match=message) as found:
        model.load_adapter(tmp_path)
    assert "\n" not in str(found.value)
    assert str(tmp_path / LORA_FILE) in str(found.value)
    for p, value in zip(model.module.parameters(), before, strict=True):  # refused before anything is written
        assert torch.equal(p, value)


def test_places_without_a_lora_are_one_line(model, pipeline, tmp_path):
    with pytest.raises(UsageError, match="no LoRA at .*nowhere"):
        model.load_adapter(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no LoRA at .*expected a folder"):
        model.load_adapter(tmp_path)
    with pytest.raises(UsageError, match="is not a LoRA: its keys are like"):
        model.load_adapter(pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    model.save_adapter(tmp_path / "lora")
    with pytest.raises(UsageError, match="one in its folder lora/"):
        model.load_adapter(tmp_path)
    whole = (tmp_path / "lora" / LORA_FILE).read_bytes()
    (tmp_path / "lora" / LORA_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=f"{LORA_FILE} is truncated"):
        model.load_adapter(tmp_path / "lora")


@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "adapter_model.bin", "my.ckpt", "my.pt"])
def test_pickled_loras_are_refused(name, model, tmp_path):
    torch.save(some_state(model), tmp_path / name)
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(UsageError, match=f"{name} is a pickle"):
            model.load_adapter(source)


@pytest.mark.parametrize("text", ["{", "[]", '{"unet.lora_alpha": "much"}', '{"unet.alpha_pattern": 3}'])
def test_damaged_metadata_is_one_line(text, model, tmp_path):
    save_file(some_state(model), tmp_path / LORA_FILE, metadata={"lora_adapter_metadata": text})
    with pytest.raises(UsageError, match=f"settings in .*{LORA_FILE} cannot be read"):
        model.load_adapter(tmp_path)


def test_toys_take_texts_for_their_header(tmp_path):
    from condrl.models.points import MODULE_FILE, load_module, save_module

    module = torch.nn.Linear(2, 3)
    save_module(module, tmp_path, {"rewards": "quadratic: 1.0"})
    assert metadata(tmp_path / MODULE_FILE)["rewards"] == "quadratic: 1.0"
    other = torch.nn.Linear(2, 3)
    load_module(other, tmp_path)
    assert torch.equal(other.weight, module.weight)
    with pytest.raises(UsageError, match="another network"):
        load_module(torch.nn.Linear(3, 3), tmp_path)
    torch.nn.init.constant_(module.bias, torch.inf)
    save_module(module, tmp_path)
    with pytest.raises(UsageError, match="not finite, in bias"):
        load_module(other, tmp_path)
    (tmp_path / MODULE_FILE).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UsageError, match="Git LFS pointer"):
        load_module(other, tmp_path)
