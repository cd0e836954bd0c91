"""Every option of every shipped reward says something: no other test lets one be ignored, and none is left out here."""

import hashlib
import importlib
import json
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
from helpers import ROOT, answering
from reward_files import save_reward_files
from torch import nn

import condrl.rewards.clip
from condrl import UsageError, registry
from condrl.io.hub import hub_file
from condrl.prompts import Row
from condrl.rewards.clip import fitted
from condrl.rewards.scoring import make_reward
from condrl.rewards.testing import smooth_images

SHIPPED = [p.name for p in registry.reward.all() if p.target.__module__.startswith("condrl.plugins")]
ROWS = [Row(0, "a red star"), Row(1, "a cat"), Row(2, "two dogs")]
POINTS = torch.tensor([[0.5, -0.5], [1.5, 2.0], [-3.0, 0.0]])
PIXELS = (smooth_images(3) * 255).round() / 255


def scores(name, options, x=PIXELS):
    return make_reward(name, options)(x, ROWS)


@pytest.fixture
def nothing_shared():
    """Models that a test loads under published names are forgotten."""
    pickscore = importlib.import_module("condrl.plugins.rewards.pickscore")
    caches = (condrl.rewards.clip.shared_clip, pickscore.load)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return save_reward_files(tmp_path_factory.mktemp("models"))


# ---------------------------------------------------------------------------------------------- what is computed


def values_of_box(low, high):
    return [float(all(lo <= v <= hi for lo, v, hi in zip(low, point, high, strict=True))) for point in POINTS.tolist()]


VALUES = [
    ("box", {"low": [-4.0], "high": [0.6]}, POINTS, values_of_box([-4, -4], [0.6, 0.6])),
    ("box", {"low": [-1.0], "high": [3.0]}, POINTS, values_of_box([-1, -1], [3, 3])),
    ("quadratic", {"linear": [2.0]}, POINTS, [2 * (a + b) for a, b in POINTS.tolist()]),
    (
        "quadratic",
        {"linear": [0.0], "curvature": [1.0, 3.0]},
        POINTS,
        [-(a * a + 3 * b * b) / 2 for a, b in POINTS.tolist()],
    ),
    ("quadratic", {"linear": [0.0], "constant": 7.0}, POINTS, [7.0] * 3),
    ("symmetry", {"mirror": "left_right"}, PIXELS, [-(i - i.flip(2)).abs().mean().item() for i in PIXELS]),
    ("symmetry", {"mirror": "up_down"}, PIXELS, [-(i - i.flip(1)).abs().mean().item() for i in PIXELS]),
]


@pytest.mark.parametrize(("name", "options", "x", "expected"), VALUES)
def test_values(name, options, x, expected):
    assert scores(name, options, x).tolist() == pytest.approx(expected, abs=1e-6)


def test_the_nearest_of_the_images(files, tmp_path):
    from condrl.rewards.pixels import to_pil

    for i, image in enumerate(PIXELS):
        to_pil(image).save(tmp_path / f"{i}.png")
    assert scores("similarity", {"images": str(tmp_path)}).tolist() == [0, 0, 0]
    expected = [-(i - PIXELS[1]).square().mean().sqrt().item() for i in PIXELS]
    assert scores("similarity", {"images": str(tmp_path / "1.png")}).tolist() == pytest.approx(expected, abs=1e-6)


# ---------------------------------------------------------------------------------------------- files of models

WITH_CLIP = ("clip", "aesthetic", "hps")
OPTION_OF_FILE = {"clip": "weights", "aesthetic": "weights", "hps": "weights", "image_reward": "weights"}


def cosine(model, tokenizer, x):
    settings = model.visual.preprocess_cfg
    with torch.no_grad():
        images = model.encode_image(fitted(x, 32, settings["mean"], settings["std"]))
        return nn.functional.cosine_similarity(images, model.encode_text(tokenizer([row.prompt for row in ROWS])))


@pytest.mark.parametrize("name", ["clip", "hps"])
def test_weights_are_those_of_the_file(name, files, tmp_path):
    torch.manual_seed(5)
    model = open_clip.create_model("small").eval()
    torch.save(model.state_dict(), tmp_path / "other.pt")
    found = scores(name, {**files[name], "weights": str(tmp_path / "other.pt")})
    torch.testing.assert_close(found, cosine(model, open_clip.get_tokenizer("small"), PIXELS), atol=1e-5, rtol=1e-5)


def test_the_aesthetic_head_and_the_weights_are_those_of_the_files(files, tmp_path):
    torch.manual_seed(5)
    model = open_clip.create_model("small").eval()
    torch.save(model.state_dict(), tmp_path / "other.pt")
    layer = nn.Linear(24, 1)
    head = {"layers.0.weight": layer.weight.data, "layers.0.bias": layer.bias.data}
    torch.save(head, tmp_path / "head.pth")
    settings = model.visual.preprocess_cfg
    with torch.no_grad():
        embedded = nn.functional.normalize(model.encode_image(fitted(PIXELS, 32, settings["mean"], settings["std"])))
        expected = layer(embedded)[:, 0]
    options = {**files["aesthetic"], "weights": str(tmp_path / "other.pt"), "head": str(tmp_path / "head.pth")}
    torch.testing.assert_close(scores("aesthetic", options), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", WITH_CLIP)
def test_the_architecture_is_the_configs_or_the_models(name, files, nothing_shared, monkeypatch):
    asked = []
    create = open_clip.create_model

    def small(model, **options):
        asked.append((model, options["pretrained"]))
        return create("small", **options)

    monkeypatch.setattr(open_clip, "create_model", small)
    weights = files[name]["weights"]
    without = {key: value for key, value in files[name].items() if key != "config"}
    for options in (files[name], {**without, "model": "ViT-B-32"}):
        _ = make_reward(name, options).call.clip.model
    assert asked == [("small", weights), ("ViT-B-32", weights)]


@pytest.mark.parametrize("name", WITH_CLIP)
def test_a_tag_of_open_clip(name, files, nothing_shared, monkeypatch):
    """The published file for clip and aesthetic; hps has its own, by version."""
    asked = []
    create = open_clip.create_model

    def small(model, **options):
        asked.append((model, options["pretrained"]))
        return create("small", **{**options, "pretrained": files["clip"]["weights"]})

    monkeypatch.setattr(open_clip, "create_model", small)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: files["hps"]["weights"])
    monkeypatch.setattr("condrl.io.hub.reachable", lambda endpoint: True)
    head = {"head": files["aesthetic"]["head"]} if name == "aesthetic" else {}
    _ = make_reward(name, head).call.clip.model
    expected = ("ViT-H-14", files["hps"]["weights"]) if name == "hps" else ("ViT-L-14-quickgelu", "openai")
    assert asked == [expected]


@pytest.mark.parametrize(
    ("version", "file"),
    [("v2", "HPS_v2_compressed.pt"), ("v2.1", "HPS_v2.1_compressed.pt"), (None, "HPS_v2.1_compressed.pt")],
)
def test_each_version_of_hps_has_its_own_file(version, file, files, nothing_shared, monkeypatch):
    asked = []

    def download(repository, name, revision=None):
        asked.append((repository, name, revision))
        return files["hps"]["weights"]

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("condrl.io.hub.reachable", lambda endpoint: True)
    options = {"config": files["hps"]["config"]} | ({"version": version} if version else {})
    scores("hps", options)
    make_reward("hps", {**options, "weights": "me/mine@abc"})
    assert asked == [("xswu/HPSv2", file, None), ("me/mine", file, "abc")]
    assert hub_file(files["hps"]["weights"], "x", "y") == files["hps"]["weights"]


def test_published_files_are_asked_for_by_name(files, nothing_shared, monkeypatch):
    asked = []

    def download(repository, name, revision=None):
        asked.append((repository, name))
        return files["aesthetic"]["head"] if "aesthetic" in name else files["image_reward"]["weights"]

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("condrl.io.hub.reachable", lambda endpoint: True)
    scores("aesthetic", {**files["clip"]})
    scores("image_reward", {"tokenizer": files["image_reward"]["tokenizer"]})
    assert asked == [
        ("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"),
        ("THUDM/ImageReward", "ImageReward.pt"),
    ]


@pytest.mark.parametrize(
    ("name", "option", "of"),
    [
        ("clip", "sha256", "weights"),
        ("hps", "sha256", "weights"),
        ("aesthetic", "sha256", "weights"),
        ("aesthetic", "head_sha256", "head"),
        ("image_reward", "sha256", "weights"),
    ],
)
def test_a_digest_is_that_of_the_file(name, option, of, files):
    right = hashlib.sha256(Path(files[name][of]).read_bytes()).hexdigest()
    make_reward(name, {**files[name], option: right.upper()}).load()
    with pytest.raises(UsageError, match=rf"config rewards\.{name}\.{of}: .* has sha256 {right}, not {right[1:]}0"):
        make_reward(name, {**files[name], option: right[1:] + "0"})


@pytest.mark.parametrize("name", ["image_reward", "pickscore"])
def test_the_tokenizer_is_the_folders(name, files, tmp_path):
    """Another list of words gives other tokens, so other scores."""
    option = {"image_reward": "tokenizer", "pickscore": "processor"}[name]
    shutil.copytree(files[name][option], tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    content = json.loads(file.read_text())
    words = list(content["model"]["vocab"])
    kept = 5 if name == "image_reward" else 2  # the special ones
    turned = words[:kept] + words[kept:][::-1]
    content["model"]["vocab"] = {word: i for i, word in enumerate(turned)}
    file.write_text(json.dumps(content))
    same, other = (
        scores(name, {**files[name], option: str(folder)}) for folder in (files[name][option], tmp_path / "other")
    )
    assert torch.equal(same, scores(name, files[name]))
    assert not torch.allclose(same, other, atol=1e-6)


def test_pickscore_settings_and_revision(files, nothing_shared, tmp_path, monkeypatch):
    import transformers

    asked = []
    load = transformers.CLIPModel.from_pretrained

    def from_pretrained(path, revision, **options):
        asked.append((path, revision))
        return load(files["pickscore"]["path"], **options)

    monkeypatch.setattr(transformers.CLIPModel, "from_pretrained", from_pretrained)
    monkeypatch.setattr("condrl.io.hub.reachable", lambda endpoint: True)
    processor = {"processor": files["pickscore"]["processor"]}
    a = scores("pickscore", processor)
    scores("pickscore", {**processor, "path": "me/mine", "revision": "abc"})
    assert asked == [("yuvalkirstain/PickScore_v1", None), ("me/mine", "abc")]
    shutil.copytree(files["pickscore"]["processor"], tmp_path / "other")
    settings = tmp_path / "other" / "preprocessor_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "image_mean": [0.0, 0.0, 0.0]}))
    b = scores("pickscore", {**files["pickscore"], "processor": str(tmp_path / "other")})
    assert not torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("name", [*WITH_CLIP, "pickscore", "image_reward"])
def test_a_model_leaves_the_device_where_that_is_asked_for(name, files, monkeypatch):
    moves = []
    for offload in (False, True):
        reward = make_reward(name, {**files[name], "offload": offload})
        reward(PIXELS, ROWS)
        model = reward.call.network
        moves.append([])
        monkeypatch.setattr(type(model), "to", lambda self, device, found=moves[-1]: found.append(str(device)) or self)
        reward.offload()
        monkeypatch.undo()
    assert moves == [[], ["cpu"]]


# ---------------------------------------------------------------------------------------------- servers

ANSWERS = {
    "remote": lambda body: json.dumps({"scores": [1.0] * len(json.loads(body)["rows"])}).encode(),
    "vlm_judge": lambda body: b'{"choices": [{"message": {"content": "7"}}]}',
}
MORE = {"remote": {}, "vlm_judge": {"model": "m", "answer": "number"}}


@pytest.mark.parametrize("name", ANSWERS)
def test_retries_and_backoff(name, monkeypatch):
    slept = []

    class Impatient(threading.Event):
        def wait(self, timeout=None):
            slept.append(timeout)
            return False

    monkeypatch.setattr("condrl.rewards.client.threading", SimpleNamespace(Event=Impatient, Timer=threading.Timer))
    with answering(b"busy", 503) as (url, asked):
        options = {"url": url, "concurrent": 1, "retries": 3, "backoff": 0.25, **MORE[name]}
        assert make_reward(name, options)(PIXELS[:1], ROWS[:1]).isnan().all()
    assert len(asked) == 4
    assert slept == [0.0, 0.25, 0.5, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("most", [1, 3])
def test_the_number_of_requests_at_a_time(name, most):
    """`most` of them wait for each other; one more would go in at once, and is seen."""
    barrier, lock, now, seen = threading.Barrier(most), threading.Lock(), [0], []

    def answer(body):
        with lock:
            now[0] += 1
            seen.append(now[0])
        barrier.wait(20)
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        return ANSWERS[name](body)

    x, rows = PIXELS[:1].expand(6, -1, -1, -1), [Row(i, f"prompt {i}") for i in range(6)]
    with answering(answer) as (url, asked):
        options = {"url": url, "concurrent": most, **({"per_request": 1} if name == "remote" else {}), **MORE[name]}
        assert make_reward(name, options)(x, rows).isfinite().all()
    assert len(asked) == 6
    assert max(seen) == most


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_waited_for(name):
    """For `timeout` seconds and no longer."""
    given = threading.Event()

    def answer(body):
        given.wait(20)
        return ANSWERS[name](body)

    with answering(answer) as (url, _):
        options = {"url": url, "retries": 0, **MORE[name]}
        assert make_reward(name, {**options, "timeout": 0.2})(PIXELS[:1], ROWS[:1]).isnan().all()
        threading.Timer(0.3, given.set).start()
        assert make_reward(name, {**options, "timeout": 20.0})(PIXELS[:1], ROWS[:1]).isfinite().all()


def test_samples_in_a_request():
    with answering(ANSWERS["remote"]) as (url, asked):
        make_reward("remote", {"url": url, "per_request": 2})(PIXELS, ROWS)
    assert sorted(len(json.loads(request.body)["rows"]) for request in asked) == [1, 2]


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("retries", -1),
        ("backoff", -0.5),
        ("concurrent", 0),
        ("timeout", 0.0),
        ("timeout", float("nan")),
        ("per_request", 0),
    ],
)
def test_numbers_that_cannot_be(name, option, value):
    if option not in registry.reward.find(name).options:
        return
    with pytest.raises(UsageError, match=rf"config rewards\.{name}\.{option}: must be (at least|above) .*got {value}"):
        make_reward(name, {"url": "http://127.0.0.1:9", **MORE[name], option: value})


# ---------------------------------------------------------------------------------------------- none is left out

TESTED = {
    "aesthetic": {
        "head": test_the_aesthetic_head_and_the_weights_are_those_of_the_files,
        "head_sha256": test_a_digest_is_that_of_the_file,
        "weights": test_the_aesthetic_head_and_the_weights_are_those_of_the_files,
    },
    "hps": {"version": test_each_version_of_hps_has_its_own_file},
    "image_reward": {
        "weights": "test_image_reward_scores_as_an_implementation_by_hand_did",
        "tokenizer": test_the_tokenizer_is_the_folders,
    },
    "pickscore": {
        "path": "test_pickscore_is_transformers_own_logit",
        "processor": test_pickscore_settings_and_revision,
        "revision": test_pickscore_settings_and_revision,
    },
    "box": dict.fromkeys(("low", "high"), test_values),
    "quadratic": dict.fromkeys(("linear", "curvature", "constant"), test_values),
    "symmetry": {"mirror": test_values},
    "similarity": {"images": test_the_nearest_of_the_images},
    "jpeg_compressibility": {"quality": "test_jpeg_rewards_are_file_sizes_in_kilobytes"},
    "jpeg_incompressibility": {"quality": "test_jpeg_rewards_are_file_sizes_in_kilobytes"},
    "remote": {"url": "test_scores_are_those_of_the_reward_here", "per_request": test_samples_in_a_request},
    "vlm_judge": {
        "url": "test_yes_is_its_share_of_yes_and_no",
        "model": "test_yes_is_its_share_of_yes_and_no",
        "answer": "test_a_number_is_read_or_the_score_has_failed",
        "question": "test_the_question_is_the_users",
        "low": "test_the_question_is_the_users",
        "high": "test_the_question_is_the_users",
        "key": "test_the_key_is_sent",
    },
}
SHARED = {
    "model": test_the_architecture_is_the_configs_or_the_models,
    "config": test_the_architecture_is_the_configs_or_the_models,
    "weights": test_weights_are_those_of_the_file,
    "sha256": test_a_digest_is_that_of_the_file,
    "dtype": "test_half_precision_is_near",
    "offload": test_a_model_leaves_the_device_where_that_is_asked_for,
    "timeout": test_an_answer_is_waited_for,
    "retries": test_retries_and_backoff,
    "backoff": test_retries_and_backoff,
    "concurrent": test_the_number_of_requests_at_a_time,
}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_option_has_a_test(name):
    sources = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    for option in registry.reward.find(name).options:
        test = TESTED.get(name, {}).get(option) or SHARED[option]
        assert callable(test) or f"def {test}(" in sources, (name, option)
