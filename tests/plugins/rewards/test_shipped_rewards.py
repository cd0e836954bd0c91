"""Every shipped reward by the kit that users have, and the models at small size in the published files' format."""

import functools
import json
import pickle
import random
import shutil
import urllib.request
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from helpers import DATA, load_script
from PIL import Image
from reward_files import SMALL, image_reward_weights, save_reward_files
from torch import nn

import condrl
from condrl import UsageError, registry
from condrl.io.files import locate
from condrl.prompts import Row
from condrl.rewards.clip import affine, fitted
from condrl.rewards.pixels import from_pil, luma, to_pil
from condrl.rewards.scoring import make_reward
from condrl.rewards.testing import check_reward, smooth_images

MODELS = ("clip", "aesthetic", "hps", "pickscore", "image_reward")
OF_POINTS = ("box", "quadratic")
RANGES = {
    "brightness": (0, 1),
    "sharpness": (0, 2e6),
    "colourfulness": (0, 200),
    "symmetry": (-1, 0),
    "shapes": (0, 1),
    "shapes_exact": (0, 1),
    "clip": (-1, 1),
    "clip_diversity": (0, 2),
    "hps": (-1, 1),
    "similarity": (-1, 0),
    "jpeg_incompressibility": (0, 20),
    "jpeg_compressibility": (-20, 0),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return save_reward_files(tmp_path_factory.mktemp("models"))


SHIPPED = [p.name for p in registry.reward.all() if p.target.__module__.startswith("condrl.plugins")]


@pytest.mark.parametrize("name", [name for name in SHIPPED if name not in (*OF_POINTS, "remote", "vlm_judge")])
def test_every_shipped_reward_keeps_the_rules(name, files):
    check_reward(name, value_range=RANGES.get(name), **files.get(name, {}))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near(name, dtype, files):
    x, rows = smooth_images(4), [Row(i, text) for i, text in enumerate(("a red star", "a cat", "a dog", "two"))]
    whole, half = (make_reward(name, {**files[name], "dtype": d})(x, rows) for d in ("float32", dtype))
    assert whole.dtype == half.dtype == torch.float32
    torch.testing.assert_close(half, whole, rtol=0.05, atol=0.05)
    assert not torch.equal(half, whole)


# ---------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("shape", [(64, 64), (96, 64), (50, 75), (300, 224)])
def test_preprocessing_is_that_of_the_reference_processors(shape):
    from transformers import CLIPImageProcessor

    x = (smooth_images(2, 3, *shape) * 255).round() / 255
    pictures = [to_pil(image) for image in x]
    theirs = CLIPImageProcessor()(pictures, return_tensors="pt")["pixel_values"]
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    ours = fitted(x, 224, mean, std)
    assert (ours - theirs).abs().max() < 2e-2
    reference = open_clip.image_transform(224, is_train=False, mean=mean, std=std, interpolation="bicubic")
    assert (ours - torch.stack([reference(picture) for picture in pictures])).abs().max() < 2e-2


def test_clip_is_open_clips_own_cosine(files):
    model = open_clip.create_model("small", pretrained=files["clip"]["weights"]).eval()
    x, prompts = smooth_images(3), ["a red star", "a cat", "a red star"]
    settings = model.visual.preprocess_cfg
    with torch.no_grad():
        images = model.encode_image(fitted(x, 32, settings["mean"], settings["std"]))
        texts = model.encode_text(open_clip.get_tokenizer("small")(prompts))
    expected = nn.functional.cosine_similarity(images, texts)
    found = make_reward("clip", files["clip"])(x, [Row(i, p) for i, p in enumerate(prompts)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_model_is_loaded_once_and_can_rest(files, monkeypatch):
    loads, create = [], open_clip.create_model
    monkeypatch.setattr(open_clip, "create_model", lambda *a, **k: loads.append(a) or create(*a, **k))
    options = {**files["clip"], "dtype": "float32", "sha256": None}
    rewards = [
        make_reward(name, {**files[name], **extra}) for name, extra in (("clip", {"offload": True}), ("aesthetic", {}))
    ]
    assert rewards[0].call.clip is rewards[1].call.clip
    rewards[0].call.clip.__dict__.pop("model", None)
    assert loads == []  # not before it is used
    rows = [Row(0, "a cat")]
    for reward in rewards * 2:
        reward(smooth_images(1), rows)
        reward.offload()
    assert len(loads) == 1
    assert options["weights"] in str(rewards[0].call.clip.weights)


def test_the_aesthetic_head_is_affine(files):
    layers = torch.load(files["aesthetic"]["head"], weights_only=True)
    stack = nn.Sequential(*(nn.Linear(*reversed(layers[f"layers.{n}.weight"].shape)) for n in (0, 2, 4, 6, 7)))
    stack.load_state_dict(
        {f"{i}.{k}": layers[f"layers.{n}.{k}"] for i, n in enumerate((0, 2, 4, 6, 7)) for k in ("weight", "bias")}
    )
    reward = make_reward("aesthetic", files["aesthetic"])
    x = smooth_images(4)
    expected = stack(reward.call.clip.images(x))[:, 0]
    torch.testing.assert_close(reward(x, [Row(i, "") for i in range(4)]), expected, atol=1e-5, rtol=1e-4)


def test_the_published_head_is_what_its_measured_numbers_say():
    path = DATA / "aesthetic_head.pth"
    if not path.exists():
        pytest.skip("the published head is not on this machine")
    weight, bias = affine(torch.load(path, map_location="cpu", weights_only=True))
    assert weight.shape == (768,)
    assert weight.norm().item() == pytest.approx(17.996, abs=1e-3)
    assert bias.item() == pytest.approx(5.2366, abs=1e-4)


def test_the_embedded_clip_tells_an_image_from_its_altered_copy():
    pretrain, random_state = load_script("pretrain_shapes"), random.Random(7)
    drawn, captions = pretrain.captioned_pairs(128, random_state)
    true = pretrain.true_of(drawn, captions)
    assert true.diagonal().all()
    images = pretrain.draw_batch(drawn) / 2 + 0.5
    reward = make_reward("clip", {"model": "asset:shapes_clip"})
    with torch.no_grad():
        own = reward(images, [Row(i, str(caption)) for i, caption in enumerate(captions)])
        others = reward(images, [Row(i, str(captions[i ^ 1])) for i in range(len(captions))])
    told_apart = torch.tensor([not true[i, i ^ 1] for i in range(len(captions))])
    assert told_apart.sum() > 150
    assert (own > others)[told_apart].float().mean() > 0.93


def test_clip_diversity_is_the_mean_distance_to_a_prompts_other_images():
    """Whatever the order; 0 for equal ones; a single image has no others."""
    options, rows = {"model": "asset:shapes_clip"}, [Row(0, "a red star")] * 3
    reward, images = make_reward("clip_diversity", options), smooth_images(3)
    x = reward.call.clip.images(images)
    cosine = [torch.cosine_similarity(x[i], x[j], dim=0) for i, j in ((0, 1), (0, 2), (1, 2))]
    a, b, c = (1 - value for value in cosine)
    torch.testing.assert_close(reward(images, rows), torch.stack([(a + b) / 2, (a + c) / 2, (b + c) / 2]))
    torch.testing.assert_close(reward(images[:1].expand(3, -1, -1, -1), rows), torch.zeros(3), atol=1e-5, rtol=0)
    with pytest.raises(UsageError, match="evaluate.images_per_prompt to at least 2"):
        reward(images[:1], rows[:1])


def test_a_folder_without_weights_is_refused(tmp_path):
    for file in locate("asset:shapes_clip").glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(
        UsageError, match="config rewards.clip.model: cannot load .*: RuntimeError: .* could not be loaded"
    ):
        make_reward("clip", {"model": str(tmp_path)})(smooth_images(1), [Row(0, "a red star")])


def test_a_whole_model_takes_no_other_weights():
    with pytest.raises(UsageError, match="has weights of its own"):
        make_reward("clip", {"model": "asset:shapes_clip", "weights": "laion2b_s32b_b82k"})


IMAGE_REWARD_PROMPTS = ["a red star", "two cat dog", "a", "red cat " * 20]


def image_reward_scores(options):
    x = (torch.arange(4 * 3 * 48 * 64) * 37 % 101 / 100).view(4, 3, 48, 64)
    x = (x * torch.tensor([1, 0.7, 0.4, 1]).view(4, 1, 1, 1)).requires_grad_()
    scores = make_reward("image_reward", options)(x, [Row(i, p) for i, p in enumerate(IMAGE_REWARD_PROMPTS)])
    return scores.detach(), torch.autograd.grad(scores.sum(), x)[0]


def image_reward_of(state, files, folder):
    """The options of a reward with these weights."""
    torch.save(state, folder / "other.pt")
    return {**files["image_reward"], "weights": str(folder / "other.pt")}


def test_image_reward_scores_as_an_implementation_by_hand_did(files):
    """Recorded with one that was written out in torch, by the published file's names."""
    scores, gradient = image_reward_scores(files["image_reward"])
    torch.testing.assert_close(scores, torch.tensor([0.0031649, 0.1608159, 0.0027485, 0.1336707]), rtol=1e-5, atol=1e-5)
    norms = gradient.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.tensor([4.80872, 0.57088, 0.301903, 8.95766]), rtol=1e-4, atol=0)


def test_image_reward_does_not_read_the_padding(files, tmp_path):
    pad, star = (image_reward_weights() for _ in range(2))
    for state, word in ((pad, 0), (star, 7)):  # as save_reward_files lists the words
        state["blip.text_encoder.embeddings.word_embeddings.weight"][word] *= -1
    scores = image_reward_scores(files["image_reward"])[0]
    torch.testing.assert_close(image_reward_scores(image_reward_of(pad, files, tmp_path))[0], scores)
    (tmp_path / "star").mkdir()
    other = image_reward_scores(image_reward_of(star, files, tmp_path / "star"))[0]
    assert ((other - scores).abs() > 1e-4).tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "blip.text_encoder.encoder.layer.1.crossattention.self.key.weight",
            None,
            "no weights text_encoder.encoder.layer.1.crossattention.self.key.weight",
        ),
        ("blip.visual_encoder.blocks.0.norm1.bias", None, "no weights visual_encoder.blocks.0.norm1.bias"),
        ("blip.visual_encoder.pos_embed", None, "no weights visual_encoder.pos_embed"),
        ("blip.text_encoder.embeddings.position_embeddings.weight", None, "no weights text_encoder.embeddings.pos"),
        ("mlp.layers.4.bias", None, "expected linear layers, each with weight and bias"),
        (
            "blip.visual_encoder.norm.bias",
            torch.zeros(3),
            r"its visual_encoder.norm.bias has shape \(3,\), not \(128,\)",
        ),
        ("blip.visual_encoder.head.bias", torch.zeros(3), "no part of ImageReward is called visual_encoder.head.bias"),
    ],
)
def test_image_reward_names_the_weights_that_do_not_fit(name, value, message, files, tmp_path):
    state = {**image_reward_weights(), name: value}
    options = image_reward_of({k: v for k, v in state.items() if v is not None}, files, tmp_path)
    with pytest.raises(
        UsageError, match=f"^config rewards.image_reward.weights: .* is not an ImageReward file: .*{message}"
    ):
        make_reward("image_reward", options).load()


def test_pickscore_is_transformers_own_logit(files):
    from transformers import CLIPModel, CLIPProcessor

    path = files["pickscore"]["path"]
    model, processor = CLIPModel.from_pretrained(path), CLIPProcessor.from_pretrained(path)
    x, prompts = (smooth_images(2) * 255).round() / 255, ["abc", "hello world"]
    given = processor(text=prompts, images=[to_pil(one) for one in x], return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = model(**given).logits_per_image.diag()
    found = make_reward("pickscore", files["pickscore"])(x, [Row(i, p) for i, p in enumerate(prompts)])
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("clip", {"model": "ViT-L-41"}, r"no model 'ViT-L-41', and there is no such folder. Did you mean 'ViT-L-1"),
        ("clip", {"weights": "nothing"}, "no weights 'nothing' for ViT-L-14-quickgelu"),
        ("clip", {"weights": "nowhere.pt"}, "there is no file nowhere.pt"),
        ("clip", {"config": "nowhere.json"}, "there is no file nowhere.json"),
        ("hps", {"version": "v3"}, "'v3' is not one of v2, v2.1"),
        ("similarity", {"images": "nowhere"}, "no image"),
    ],
)
def test_what_cannot_be_is_one_line(name, options, message):
    with pytest.raises(UsageError, match=message):
        make_reward(name, options)


def test_another_file_than_the_one_meant_is_refused(files):
    with pytest.raises(UsageError, match=r"has sha256 [0-9a-f]{64}, not 00"):
        make_reward("clip", {**files["clip"], "sha256": "00"})
    with pytest.raises(UsageError, match="is not a file of torch.save"):
        make_reward("aesthetic", {**files["aesthetic"], "head": files["clip"]["config"]})


# ---------------------------------------------------------------------------------------------- damaged files

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1710671599\n"
DAMAGE = {
    "pointer": lambda content: POINTER,
    "empty": lambda content: b"",
    "text": lambda content: b"Repository not found",
    "cut": lambda content: content[: len(content) // 2],
    "pickle": lambda content: pickle.dumps({"weights": [1.0, 2.0]}, 4),
}
ALWAYS_SAID = {"pointer": "is a Git LFS pointer, not the file: run git lfs pull", "empty": "is empty"}
FILES = [  # of which reward, of which option, of which of its folder's files
    ("clip", "weights", None),
    ("clip", "config", None),
    ("clip", "model", "open_clip_config.json"),
    ("clip", "model", "tokenizer.json"),
    ("clip", "model", "open_clip_model.safetensors"),
    ("aesthetic", "head", None),
    ("aesthetic", "weights", None),
    ("hps", "weights", None),
    ("image_reward", "weights", None),
    ("image_reward", "tokenizer", "tokenizer.json"),
    ("image_reward", "tokenizer", "tokenizer_config.json"),
    ("pickscore", "path", "config.json"),
    ("pickscore", "path", "model.safetensors"),
    ("pickscore", "processor", "tokenizer.json"),
    ("pickscore", "processor", "preprocessor_config.json"),
    ("similarity", "images", None),
]


def with_copy(files, name, option, inner, folder):
    """A reward's options with a copy of what one option names, and the copy's path."""
    options = {} if option == "model" else dict(files[name])
    original = locate("asset:shapes_clip") if option == "model" else Path(options[option])
    copy = folder / original.name
    if inner is None:
        shutil.copyfile(original, copy)
    else:
        shutil.copytree(original, copy, copy_function=shutil.copyfile)
    return {**options, option: str(copy)}, copy / inner if inner else copy


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(("name", "option", "inner"), FILES)
def test_a_damaged_file_is_one_line_that_names_it(name, option, inner, damage, files, tmp_path):
    options, file = with_copy(files, name, option, inner, tmp_path)
    make_reward(name, options).load()
    content = file.read_bytes()
    (tmp_path / "again").mkdir()  # models are shared by the path they were loaded from
    options, file = with_copy(files, name, option, inner, tmp_path / "again")
    file.write_bytes(DAMAGE[damage](content))
    with pytest.raises(UsageError) as error:
        make_reward(name, options).load()
    said = str(error.value)
    assert said.startswith(f"config rewards.{name}.{option}: ")
    assert str(file) in said or str(file.parent) in said
    assert ALWAYS_SAID.get(damage, "") in said
    assert "\n" not in said
    assert len(said) < 600


def test_a_tokenizer_whose_list_of_words_is_a_pointer_is_refused(tmp_path):
    """A BERT tokenizer would take its three lines for three words, and every prompt for unknown ones."""
    (tmp_path / "vocab.txt").write_bytes(POINTER)
    with pytest.raises(UsageError, match=r"config rewards\.image_reward\.tokenizer: .*vocab\.txt is a Git LFS pointer"):
        make_reward("image_reward", {"weights": str(tmp_path), "tokenizer": str(tmp_path)} | {"weights": __file__})


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("name", "option"), [("clip", "weights"), ("aesthetic", "head"), ("hps", "weights"), ("image_reward", "weights")]
)
def test_no_code_in_a_file_of_weights_is_run(name, option, legacy, files, tmp_path):
    state = torch.load(files[name][option], weights_only=True)
    options, file = with_copy(files, name, option, None, tmp_path)
    torch.save({**state, "payload": Payload(tmp_path / "it_ran")}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UsageError, match=f"config rewards.{name}.{option}: .* holds more than weights"):
        make_reward(name, options).load()
    assert not (tmp_path / "it_ran").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "it_ran").exists()  # as it would have


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """A hub that refuses connections, and an empty cache; how often it was asked for."""
    from huggingface_hub import constants

    import condrl.io.hub

    condrl.io.hub.reachable.cache_clear()
    asked = []
    connect = urllib.request.urlopen
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: asked.append(a) or connect(*a, **k))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(open_clip.pretrained, "hf_hub_download", functools.partial(_from_an_empty_cache, tmp_path))
    yield asked
    condrl.io.hub.reachable.cache_clear()


def _from_an_empty_cache(folder, *args, **options):
    from huggingface_hub import constants, hf_hub_download

    assert constants.HF_HUB_OFFLINE  # else it would try again and again
    return hf_hub_download(*args, **{**options, "cache_dir": folder / "cache"})


@pytest.mark.parametrize(
    ("name", "options", "option"),
    [
        ("clip", {}, "weights"),
        ("clip", {"model": "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K"}, "model"),
        ("clip", {"model": "ViT-B-16-SigLIP", "weights": "webli"}, "weights"),
        ("aesthetic", {}, "head"),
        ("hps", {}, "weights"),
        ("image_reward", {}, "weights"),
        ("pickscore", {}, "path"),
    ],
)
def test_without_a_network_one_line_names_the_option_at_once(name, options, option, no_network):
    from huggingface_hub import constants

    for _ in range(2):
        with pytest.raises(UsageError) as error:
            make_reward(name, options).load()
        said = str(error.value)
        assert said.startswith(f"config rewards.{name}.{option}: cannot load ")
        assert said.endswith(
            "it is not on this machine, and http://127.0.0.1:9 cannot be reached: give a file or folder"
        )
        assert "\n" not in said
    assert len(no_network) == 1  # the hub was asked for once
    assert not constants.HF_HUB_OFFLINE  # and others may ask again


def test_local_files_ask_nobody(files, no_network):
    for name in MODELS:
        make_reward(name, files[name]).load()
    assert no_network == []


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hps", {"weights": "models/nowhere.pt"}, "there is no file models/nowhere.pt"),
        ("aesthetic", {"head": "/no/where"}, "there is no file /no/where"),
        ("pickscore", {"path": "./no/where"}, "there is no folder no/where"),
        ("image_reward", {"weights": "./x.pt"}, "there is no file x.pt"),
        ("clip", {"weights": "."}, "open_clip has no weights '.'"),
    ],
)
def test_a_path_that_leads_nowhere_is_not_looked_for_in_the_hub(name, options, message, no_network):
    with pytest.raises(UsageError, match=rf"config rewards\.{name}\.\w+: {message}"):
        make_reward(name, options).load()
    assert no_network == []


def test_pickscore_without_some_weights_is_not_random(files, tmp_path):
    from safetensors.torch import load_file, save_file

    options, file = with_copy(files, "pickscore", "path", "model.safetensors", tmp_path)
    state = load_file(file)
    del state["visual_projection.weight"]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(
        UsageError, match=r"config rewards\.pickscore\.path: .* has no weights visual_projection\.weight"
    ):
        make_reward("pickscore", options).load()


def test_architectures_of_one_name_are_two(files, tmp_path):
    """open_clip knows them by the file's name alone."""
    wider = {**SMALL, "embed_dim": 40}
    (tmp_path / "small.json").write_text(json.dumps(wider))
    first = make_reward("clip", {**files["clip"], "dtype": "bfloat16"})
    (tmp_path / "x").mkdir()
    open_clip.add_model_config(tmp_path / "small.json")
    torch.save(open_clip.create_model("small").state_dict(), tmp_path / "w.pt")
    second = make_reward("clip", {"config": str(tmp_path / "small.json"), "weights": str(tmp_path / "w.pt")})
    first.call.clip.__dict__.pop("model", None)
    assert first.call.clip.images(smooth_images(1)).shape == (1, 24)
    assert second.call.clip.images(smooth_images(1)).shape == (1, 40)


# ---------------------------------------------------------------------------------------------- pixels


def test_pixel_rewards_in_their_units():
    rows = [Row(0, "")]
    black, white = torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)
    board = (torch.arange(16)[:, None] + torch.arange(16)).remainder(2).float().expand(1, 3, 16, 16)
    half = torch.cat([black[..., :8], white[..., :8]], 3)
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 16, 16)

    def of(name, x, **options):
        return make_reward(name, options)(x, rows).item()

    assert of("brightness", white) == pytest.approx(1)
    assert of("brightness", red) == pytest.approx(0.2126)
    assert of("sharpness", white) == 0
    assert of("sharpness", board) == pytest.approx((4 * 255) ** 2)
    assert of("colourfulness", board) == pytest.approx(0, abs=1e-3)
    assert of("colourfulness", red) == pytest.approx(0.3 * (255**2 + 127.5**2) ** 0.5)
    assert of("symmetry", half) == -1
    assert of("symmetry", half, mirror="up_down") == 0


def test_similarity_is_to_the_nearest_reference(tmp_path):
    for value in (0, 255):
        Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(tmp_path / f"{value}.png")
    x = torch.tensor([0.0, 0.3, 0.9]).view(3, 1, 1, 1).expand(3, 3, 16, 16)
    found = make_reward("similarity", {"images": str(tmp_path)})(x, [Row(i, "") for i in range(3)])
    torch.testing.assert_close(found, torch.tensor([0.0, -0.3, -0.1]), atol=1e-3, rtol=0)
    assert torch.equal(from_pil(Image.open(tmp_path / "255.png")), torch.ones(3, 8, 8))
    assert luma(x)[1, 0, 0] == pytest.approx(0.3)


# ---------------------------------------------------------------------------------------------- the kit


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda samples, prompts: samples.mean((1, 2, 3)) + torch.rand(len(samples)), "a second time"),
        (lambda samples, prompts: samples.mean((1, 2, 3)) - samples.mean(), "one by one"),
        (lambda samples, prompts: samples.mean((1, 2, 3)) + torch.arange(len(samples)), "one by one"),
        (lambda samples, prompts: samples.detach().mean((1, 2, 3)), "has no gradient"),
        (lambda samples, prompts: samples.detach().mean((1, 2, 3)) + 0 * samples.sum((1, 2, 3)), "is wrong"),
        (lambda samples, prompts: samples.mean((1, 2, 3)) * 100, "are not all in"),
        (lambda samples, prompts: samples.mean((1, 2, 3)) * float("nan"), "finite number"),
    ],
)
def test_the_kit_finds_the_fault(fault, message):
    name = f"at_fault_{fault.__code__.co_firstlineno}"
    condrl.reward(fault, name=name)
    with pytest.raises(AssertionError, match=message):
        check_reward(name, value_range=(0, 1))


def test_the_kit_takes_what_is_right():
    condrl.reward(lambda samples, prompts: samples.square().mean((1, 2, 3)), name="all_right")
    check_reward("all_right", value_range=(0, 1))
    check_reward("quadratic", samples=torch.randn(4, 2), linear=[1.0, 2.0])
    check_reward("box", samples=torch.randn(4, 2), low=[-1.0, -1.0], high=[1.0, 1.0], value_range=(0, 1))
