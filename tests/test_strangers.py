"""Folders that strangers made: data never runs, nothing is written elsewhere, and what cannot be is one line."""

import hashlib
import json
import pickle
import re
import shutil
import sys
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from helpers import ROOT, toy_words
from reward_files import save_reward_files
from safetensors.torch import save_file
from single_file import write_single_file
from transformers import BertTokenizer, CLIPImageProcessor, CLIPModel, CLIPTokenizer

import condrl.io.hub
from condrl import UsageError
from condrl.commands import finetune, sample
from condrl.commands.arguments import in_run
from condrl.commands.console import exit_code
from condrl.io.files import locate
from condrl.loading import load_config
from condrl.models.loading import load_pipeline
from condrl.models.lora import LORA_FILE, diffusers_names, lora_layers, lora_state, rank_of
from condrl.models.points import MODULE_FILE
from condrl.plugins.models.stable_diffusion import StableDiffusion
from condrl.prompts import load_prompts
from condrl.rewards.scoring import make_reward
from condrl.training.checkpoint import (
    MANIFEST,
    PLAIN,
    TENSORS,
    checkpoints,
    drop_later,
    read_checkpoint,
    save_checkpoint,
)

pytestmark = pytest.mark.slow

# ---------------------------------------------------------------------------------------------- checkpoints

FEW = ["train.lr_decay=none", "evaluate.images_per_prompt=20", "run.checkpoint_seconds=0"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of runs with a checkpoint after their second epoch, by algorithm."""
    made = {}
    for name in ("ctrl", "ddpo"):
        made[name] = tmp_path_factory.mktemp(name)
        words = [*toy_words(name, made[name]), *FEW, "train.epochs=2"]
        assert finetune.main(words) == 0
    return made


def at(state, *keys):
    for key in keys:
        state = state[key]
    return state


def put(*keys, value):
    return lambda state: at(state, *keys[:-1]).__setitem__(
        keys[-1], value(at(state, *keys)) if callable(value) else value
    )


def drop(*keys):
    return lambda state: at(state, *keys[:-1]).pop(keys[-1])


def nan(tensor):
    return torch.full_like(tensor, torch.nan)


def broadcast(tensor):
    return tensor[:1].clone()


FIRST = ("optimizer", "state", 0)
WRONG = {
    "weights are missing": ("ddpo", drop("weights"), "such as weights"),
    "a shape that broadcasts": ("ddpo", put("weights", 0, value=broadcast), r"weights\.0 "),
    "weights that are NaN": ("ddpo", put("weights", 1, value=nan), r"weights\.1 .*not finite"),
    "a text for weights": ("ddpo", put("weights", 0, value="x"), r"weights\.0 "),
    "weights of another precision": ("ddpo", put("weights", 0, value=torch.Tensor.half), r"weights\.0 "),
    "fewer weights": ("ddpo", lambda s: s["weights"].pop(), "weights "),
    "a dict for weights": ("ddpo", put("weights", value={}), "weights "),
    "moments of another shape": ("ddpo", put(*FIRST, "exp_avg", value=broadcast), "exp_avg"),
    "moments that are NaN": ("ddpo", put(*FIRST, "exp_avg_sq", value=nan), "exp_avg_sq"),
    "moments below zero": ("ddpo", put(*FIRST, "exp_avg_sq", value=lambda v: -v - 1), "exp_avg_sq"),
    "a moment is missing": ("ddpo", drop(*FIRST, "exp_avg"), "exp_avg"),
    "moments of no weights": ("ddpo", put("optimizer", "state", value=lambda s: {**s, 99: s[0]}), "optimizer.*99"),
    "groups of none": ("ddpo", put("optimizer", "param_groups", value=[]), "param_groups"),
    "a learning rate that is text": ("ddpo", put("optimizer", "param_groups", 0, "lr", value="fast"), "lr"),
    "an epoch below zero": ("ddpo", put("epoch", value=-1), "epoch"),
    "an epoch that is text": ("ddpo", put("epoch", value="2"), "epoch"),
    "an epoch that is missing": ("ddpo", drop("epoch"), "epoch"),
    "a huge epoch": ("ddpo", put("epoch", value=10**30), "epoch"),
    "updates that were never made": ("ddpo", put("updates", value=10**6), "updates"),
    "images that are none": ("ddpo", put("images", value=None), "images"),
    "calls that are not finite": ("ddpo", put("evaluations", value=float("inf")), "evaluations"),
    "a length below zero": ("ddpo", put("metrics_bytes", value=-5), "metrics_bytes"),
    "a first epoch that is a list": ("ddpo", put("first", value=[1]), "first"),
    "a first epoch with text": ("ddpo", put("first", value={"reward/total": "x"}), "first"),
    "a history of text": ("ddpo", put("algorithm", value={"0": ["x"] * 40}), "algorithm"),
    "a history that is NaN": ("ddpo", put("algorithm", value={"0": [float("nan")] * 40}), "algorithm"),
    "a history of no row": ("ddpo", put("algorithm", value={"x": [1.0]}), "algorithm"),
    "a history that is a list": ("ddpo", put("algorithm", value=[1]), "algorithm"),
    "no rewards": ("ddpo", put("rewards", value=[]), "rewards"),
    "rewards of another run": ("ddpo", put("rewards", value=[{"other": {}}]), "rewards"),
    "generators of none": ("ddpo", put("rng", value=[]), "rng"),
    "a generator's state that is cut": ("ddpo", put("rng", 0, "torch", value=broadcast), "rng"),
    "a generator's state that is text": ("ddpo", put("rng", 0, "python", value="x"), "rng"),
    "another generator": ("ddpo", put("rng", 0, "numpy", value={"bit_generator": "os.system"}), "rng"),
    "networks are missing": ("ctrl", put("modules", value={}), "modules"),
    "a network that broadcasts": ("ctrl", lambda s: put("modules", *value_of(s), value=broadcast)(s), "modules"),
    "a network that is NaN": ("ctrl", lambda s: put("modules", *value_of(s), value=nan)(s), "modules.*not finite"),
    "a network without a weight": ("ctrl", lambda s: drop("modules", *value_of(s))(s), "modules"),
}


def value_of(state):
    """The keys of a weight matrix of a value network."""
    name = next(iter(state["modules"]))
    return name, next(key for key, value in state["modules"][name].items() if value.dim() == 2 and len(value) > 1)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock"
    }


def copied(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder)
    text = (folder / "config.yaml").read_text().replace(str(run), str(folder))
    (folder / "config.yaml").write_text(text)
    return folder


def resumed(name, folder, capsys, *words) -> tuple[int, str]:
    """The exit code and last words of the run that goes on in the folder, with an epoch more."""
    capsys.readouterr()
    code = finetune.main([*toy_words(name, folder), *FEW, "train.epochs=3", "run.resume=auto", *words])
    return code, capsys.readouterr().err


def rewritten(folder, change):
    (path,) = checkpoints(folder / "checkpoints")[-1:]
    state = read_checkpoint(path)
    change(state)
    save_checkpoint(path.parent, path.name, state, keep=9)
    return path


@pytest.mark.parametrize("what", WRONG)
def test_a_crafted_checkpoint_is_one_line_and_nothing_is_touched(what, runs, tmp_path, capsys):
    name, change, message = WRONG[what]
    folder = copied(runs[name], tmp_path / "run")
    rewritten(folder, change)
    before = files_of(folder)
    code, said = resumed(name, folder, capsys)
    last = said.strip().splitlines()[-1]
    assert (code, last.startswith("error: ")) == (2, True), said
    assert re.search(message, last), last
    assert files_of(folder) == before


# ---------------------------------------------------------------------------------------------- a run's folder


def resealed(path: Path, file: str, content: bytes) -> None:
    """Put the content into a checkpoint's file, with the sha256 that belongs to it."""
    (path / file).write_bytes(content)
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**manifest, file: hashlib.sha256(content).hexdigest()}))


DEEP = b"[" * 200_000
FILES = {
    "deep state": (PLAIN, DEEP),
    "deep enough to be read, not to be joined": (PLAIN, b"[" * 900 + b"]" * 900),
    "deep manifest": (MANIFEST, DEEP),
    "a state that is a list": (PLAIN, b"[]"),
    "a state that is text": (PLAIN, b'"x"'),
    "a tensor that is not there": (PLAIN, b'{"dict": [["epoch", {"tensor": "none"}]]}'),
    "pairs that are none": (PLAIN, b'{"dict": [1]}'),
    "a key that is a list": (PLAIN, b'{"dict": [[[], 1]]}'),
    "a number that is none": (PLAIN, b'{"float": "x"}'),
    "a number of 5000 digits": (PLAIN, b'{"dict": [["epoch", ' + b"9" * 5000 + b"]]}"),
    "a manifest that is a list": (MANIFEST, b"[]"),
    "tensors that are a pickle": (TENSORS, pickle.dumps({"x": 1})),
    "a header that is deep": (TENSORS, (200_005).to_bytes(8, "little") + b'{"a":' + DEEP),
}


@pytest.mark.parametrize("what", FILES)
def test_crafted_files_of_a_checkpoint_are_one_line(what, runs, tmp_path, capsys):
    folder = copied(runs["ddpo"], tmp_path / "run")
    (path,) = checkpoints(folder / "checkpoints")[-1:]
    file, content = FILES[what]
    if file == MANIFEST:
        (path / file).write_bytes(content)
    else:
        resealed(path, file, content)
    before = files_of(folder)
    code, said = resumed("ddpo", folder, capsys, f"run.resume={path}")
    assert code == 2, said
    assert re.fullmatch(rf"error: {path} is not a complete checkpoint \(.*\)\n", said), said
    assert files_of(folder) == before


CONFIGS = {
    "a bomb": "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{n}: &{n} [{','.join(['*' + m] * 9)}]\n" for m, n in zip("abcdefg", "bcdefgh", strict=True)),
    "a tag": "run: !!python/object/apply:os.system ['touch {ran}']\n",
    "a deep one": f"run: {'[' * 150}{']' * 150}\n",
    "a deeper one": f"run: {'[' * 5000}{']' * 5000}\n",
    "a list": "[1, 2]\n",
    "no YAML": "run: [\n",
    "itself": "run: &a {seed: *a}\n",
}  # fmt: skip


@pytest.mark.parametrize("what", CONFIGS)
def test_a_crafted_config_is_one_line_wherever_it_is_read(what, runs, tmp_path, capsys):
    """Named, found beside a LoRA, and as what a run had that goes on."""
    folder, ran = copied(runs["ddpo"], tmp_path / "run"), tmp_path / "ran"
    (folder / "config.yaml").write_text(CONFIGS[what].format(ran=ran) if "{ran}" in CONFIGS[what] else CONFIGS[what])
    before = files_of(folder)
    said = [resumed("ddpo", folder, capsys)]
    said.append((finetune.main([str(folder / "config.yaml")]), capsys.readouterr().err))
    for name in (LORA_FILE, "adapter_config.json"):
        (folder / "lora" / name).touch()
    (folder / "lora" / MODULE_FILE).unlink()
    code = exit_code(lambda: sample.sample(sample.parse([str(folder), "--prompt", "x"])))
    said.append((code, capsys.readouterr().err))
    for code, text in said:
        assert code == 2
        assert re.search(rf"error: (cannot read )?{folder / 'config.yaml'}[^\n]*\n$", text), text
    assert {name: before[name] for name in before} | files_of(folder) == files_of(folder) | before
    assert not ran.exists()


@pytest.mark.parametrize("key", ["train.steps", "model", "rewards", "plugins", "a." * 500 + "b"])
@pytest.mark.parametrize("value", ["[" * 150 + "]" * 150, "{a: " * 100 + "1" + "}" * 100])
def test_a_deep_word_is_one_line(key, value):
    with pytest.raises(UsageError) as found:
        load_config([f"{key}={value}"])
    assert "\n" not in str(found.value)


LINES = {
    "cut": lambda content: content[:-30],
    "emptied": lambda content: b"",
    "with a crafted line": lambda content: content.replace(b'"epoch": 1,', b'"epoch" 1,'),
    "with a deep line": lambda content: (DEEP + b"\n") * 2 + content,
    "with a list for a line": lambda content: b"[1]\n" + content,
    "with something else": lambda content: b"{}\n" + content,
}


@pytest.mark.parametrize("what", LINES)
def test_a_record_that_no_run_wrote_is_one_line(what, runs, tmp_path, capsys):
    folder = copied(runs["ddpo"], tmp_path / "run")
    record = folder / "metrics.jsonl"
    record.write_bytes(LINES[what](record.read_bytes()))
    before = files_of(folder)
    code, said = resumed("ddpo", folder, capsys)
    assert code == 2, said
    what_is_wrong = r"(, line \d: is not a line that a run records| has [\d,]+ of the [\d,]+ bytes [^\n]*)"
    assert re.search(rf"error: (run.resume: )?{record}{what_is_wrong}\n$", said), said
    assert files_of(folder) == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "condrl_files.txt", "lock", "checkpoints", "lora", "images", "condrl", "result.json", "lora/README.md"])  # fmt: skip
def test_a_run_does_not_go_on_through_links(name, runs, tmp_path, capsys):
    """Not to cut its record, to list its files, to drop later checkpoints or to log."""
    folder, elsewhere = copied(runs["ddpo"], tmp_path / "run"), tmp_path / "elsewhere"
    place = folder / name
    if place.exists():
        place.rename(elsewhere)
    else:
        elsewhere.mkdir()
    if elsewhere.is_file():
        elsewhere.write_bytes(elsewhere.read_bytes() + b"more\n")
    place.symlink_to(elsewhere)
    content = files_of(tmp_path)
    code, said = resumed("ddpo", folder, capsys)
    assert code == 2, said
    assert "is a link" in said or "Too many levels of symbolic links" in said
    assert files_of(tmp_path) == content


def test_a_link_to_a_checkpoint_is_not_dropped(runs, tmp_path):
    (path,) = checkpoints(runs["ddpo"] / "checkpoints")[-1:]
    other = tmp_path / "theirs"
    shutil.copytree(path, other)
    for name in ("epoch_99999999", ".epoch_00000001.part"):
        (tmp_path / "checkpoints" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "checkpoints" / name).symlink_to(other)
    before = files_of(other)
    save_checkpoint(tmp_path / "checkpoints", "epoch_00000002", {"epoch": 2}, keep=1)
    drop_later(tmp_path / "checkpoints" / "epoch_00000002")
    assert files_of(other) == before
    assert [each.name for each in checkpoints(tmp_path / "checkpoints")] == ["epoch_00000002"]


# ---------------------------------------------------------------------------------------------- code in a folder

CODE = "import pathlib\npathlib.Path({ran!r}).touch()\nfrom diffusers import *\nfrom transformers import *\n"


@pytest.fixture
def ran(tmp_path):
    """The file that code in the tests' folders writes when it runs."""
    return tmp_path / "ran"


def changed(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def set_in(path: Path, **values) -> None:
    changed(path, lambda content: content.update(values))


def with_code(folder: Path, ran: Path, name: str = "stranger.py") -> None:
    (folder / name).write_text(CODE.format(ran=str(ran)))


@pytest.fixture
def clip(tmp_path, ran):
    """The embedded CLIP with a Python file that its tokenizer's config names."""
    folder = tmp_path / "clip"
    shutil.copytree(locate("asset:shapes_clip"), folder)
    with_code(folder, ran)
    named = {"AutoTokenizer": ["stranger.C", "stranger.C"]}
    set_in(folder / "tokenizer_config.json", auto_map=named, tokenizer_class="C")
    set_in(folder / "tokenizer_config.json", trust_remote_code=True)
    return folder


def text_of(**values):
    return lambda content: content["model_cfg"]["text_cfg"].update(values)


def vision_of(**values):
    return lambda content: content["model_cfg"]["vision_cfg"].update(values)


TRUST = {"trust_remote_code": True}
CLIPS = {
    "trust": (text_of(tokenizer_kwargs=TRUST), r"sets text_cfg\.tokenizer_kwargs\.trust_remote_code"),
    "a file elsewhere": (
        text_of(tokenizer_kwargs={"bpe_path": "/etc/passwd"}),
        r"text_cfg\.tokenizer_kwargs\.bpe_path",
    ),
    "options that are none": (text_of(tokenizer_kwargs=[1]), r"text_cfg\.tokenizer_kwargs\.1"),
    "code without trust": (lambda _: None, "contains custom code"),
    "a text tower with code": (text_of(hf_model_name="{folder}"), r"text_cfg\.hf_model_name=.*names code \(auto_map\)"),
    "timm from a folder": (vision_of(timm_model_name="local-dir:{folder}"), r"vision_cfg\.timm_model_name="),
    "timm from the hub": (vision_of(timm_model_name="hf-hub:nobody/model"), r"vision_cfg\.timm_model_name="),
    "no text": (lambda content: content["model_cfg"].update(text_cfg=3), "no sections text_cfg and vision_cfg"),
}


def filled(value, folder):
    """The texts of a tree with the folder's path in them."""
    return json.loads(json.dumps(value).replace("{folder}", str(folder)))


@pytest.mark.parametrize("source", ["folder", "hub", "config"])
@pytest.mark.parametrize("what", CLIPS)
def test_a_clip_runs_no_code(what, source, clip, ran, tmp_path, monkeypatch, capfd):
    change, message = CLIPS[what]
    changed(clip / "open_clip_config.json", change)
    content = filled(json.loads((clip / "open_clip_config.json").read_text()), clip)
    (clip / "open_clip_config.json").write_text(json.dumps(content))
    (clip / "config.json").write_text(json.dumps({"model_type": "strange", "auto_map": {"AutoConfig": "stranger.C"}}))
    options = {"model": str(clip)}
    if source == "hub":
        options, asked = {"model": "hf-hub:nobody/clip"}, []

        def fetched(model_id, filename="open_clip_model.safetensors", **_):
            asked.append(filename)
            return str(clip / filename)

        monkeypatch.setattr(open_clip.factory, "download_pretrained_from_hf", fetched)
        monkeypatch.setattr(condrl.io.hub, "reachable", lambda _: True)
        tokens = content["model_cfg"]["text_cfg"]
        if isinstance(tokens, dict):
            tokens["hf_tokenizer_name"] = str(clip)
            (clip / "open_clip_config.json").write_text(json.dumps(content))
    if source == "config":
        config = tmp_path / f"architecture_{abs(hash(what))}.json"
        if isinstance(content["model_cfg"]["text_cfg"], dict):
            content["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = str(clip)
        config.write_text(json.dumps(content["model_cfg"]))
        options = {"config": str(config), "weights": str(clip / "open_clip_model.safetensors")}
    with pytest.raises(UsageError, match=rf"^config rewards\..*{message}") as found:
        make_reward("clip", options).load()
    assert not ran.exists()
    assert "\n" not in str(found.value)
    assert "[y/N]" not in capfd.readouterr().out  # nor is anybody asked
    assert source != "hub" or asked


def test_a_pickled_clip_is_not_run(clip, ran):
    class Code:
        def __reduce__(self):
            return (Path.touch, (ran,))

    (clip / "open_clip_model.safetensors").unlink()
    for write in (pickle.dump, torch.save):
        with (clip / "open_clip_pytorch_model.bin").open("wb") as file:
            write({"logit_scale": Code()}, file)
        with pytest.raises(UsageError, match="config rewards.clip.model: cannot load") as found:
            make_reward("clip", {"model": str(clip)}).load()
        assert "\n" not in str(found.value)
        assert not ran.exists()


def component(name, kind, module="stranger"):
    def change(folder, ran):
        (folder / name).mkdir(exist_ok=True)
        with_code(folder / name, ran)
        set_in(folder / "model_index.json", **{name: [module, kind]})

    return change


def class_in(folder, ran):
    with_code(folder, ran)
    set_in(folder / "model_index.json", _class_name=["stranger", "StableDiffusionPipeline"])


def custom_pipeline(folder, ran):
    with_code(folder, ran, "pipeline.py")
    set_in(folder / "model_index.json", custom_pipeline="pipeline")


def auto_maps(folder, ran):
    for part, file in (("tokenizer", "tokenizer_config"), ("text_encoder", "config"), ("unet", "config")):
        with_code(folder / part, ran)
        names = {"AutoConfig": "stranger.C", "AutoModel": "stranger.C", "AutoTokenizer": ["stranger.C", "stranger.C"]}
        set_in(folder / part / f"{file}.json", auto_map=names, **TRUST)


PIPES = {  # what there is, and what is said of it; None where it is passed over
    "a scheduler": (component("scheduler", "PNDMScheduler"), "the scheduler of .* is PNDMScheduler of stranger"),
    "a tokenizer": (component("tokenizer", "CLIPTokenizer"), "the tokenizer of .* is CLIPTokenizer of stranger"),
    "a UNet": (component("unet", "UNet2DConditionModel"), "the unet of .* is UNet2DConditionModel of stranger"),
    "a VAE": (component("vae", "AutoencoderKL"), "the vae of .* is AutoencoderKL of stranger"),
    "a text encoder": (component("text_encoder", "CLIPTextModel"), "the text_encoder of .* of stranger"),
    "an installed module": (component("scheduler", "PNDMScheduler", "importable"), "PNDMScheduler of importable"),
    "a function": (component("scheduler", "system", "os"), "the scheduler of .* is system of os"),
    "a pipeline in a pipeline": (component("scheduler", "StableDiffusionPipeline", "diffusers"), "the scheduler of .* is StableDiffusionPipeline of diffusers"),
    "an entry that is text": (lambda folder, _: set_in(folder / "model_index.json", unet="x"), "the unet of .* is x"),
    "a class": (class_in, r"is a \['stranger', 'StableDiffusionPipeline'\]"),
    "a custom pipeline": (custom_pipeline, None),
    "an image encoder": (component("image_encoder", "CLIPVisionModelWithProjection", "importable"), None),
    "a safety checker": (component("safety_checker", "StableDiffusionSafetyChecker", "importable"), None),
    "a feature extractor": (component("feature_extractor", "CLIPImageProcessor", "importable"), None),
    "another part": (component("extra", "X", "importable"), None),
    "auto_map": (auto_maps, None),
    "a deep index": (lambda folder, _: (folder / "model_index.json").write_bytes(b'{"a":' + DEEP), "nested too deeply"),
    "a deep tokenizer": (lambda folder, _: (folder / "tokenizer/tokenizer.json").write_bytes(b'{"a":' + DEEP), "nested too deeply"),
    "a deep config": (lambda folder, _: (folder / "unet/config.json").write_bytes(b'{"a":' + DEEP), "nested too deeply"),
}  # fmt: skip


@pytest.fixture(scope="module")
def single_file(pipeline, tmp_path_factory):
    return write_single_file(pipeline, tmp_path_factory.mktemp("single") / "model.safetensors")


@pytest.mark.parametrize("of", ["path", "single_file_config"])
@pytest.mark.parametrize("what", PIPES)
def test_a_pipeline_runs_no_code(what, of, pipeline, single_file, ran, tmp_path, monkeypatch):
    change, message = PIPES[what]
    folder = tmp_path / "pipe"
    shutil.copytree(pipeline, folder)
    (tmp_path / "beside").mkdir()
    with_code(tmp_path / "beside", ran, "importable.py")
    monkeypatch.syspath_prepend(tmp_path / "beside")
    change(folder, ran)
    path, config = (str(folder), None) if of == "path" else (str(single_file), str(folder))
    if message is None:
        load_pipeline(StableDiffusion.family, path, None, config, torch.float32)
    else:
        with pytest.raises(UsageError, match=rf"^config model\.path: .*{message}") as found:
            load_pipeline(StableDiffusion.family, path, None, config, torch.float32)
        assert "\n" not in str(found.value)
    assert not ran.exists()
    assert "importable" not in sys.modules


def test_attention_is_transformers_own(pipeline, tmp_path):
    """A config could ask for a kernel from the hub, which is code."""
    folder = tmp_path / "pipe"
    shutil.copytree(pipeline, folder)
    set_in(folder / "text_encoder" / "config.json", _attn_implementation="kernels-community/flash-attn3")
    pipe = load_pipeline(StableDiffusion.family, str(folder), None, None, torch.float32)
    assert pipe.text_encoder.config._attn_implementation == "sdpa"


LOADED = (  # every place that loads a tokenizer, processor, model or pipeline with a class of transformers or diffusers
    "condrl/models/loading.py",
    "plugins/rewards/image_reward.py",
    "plugins/rewards/pickscore.py",
)


def test_no_remote_code_is_trusted_anywhere(monkeypatch, tmp_path, pipeline):
    """Each call of from_pretrained that takes trust_remote_code is told False."""
    files = save_reward_files(tmp_path)
    calls = []
    for kind in (CLIPTokenizer, CLIPImageProcessor, CLIPModel, BertTokenizer, StableDiffusionPipeline):
        real = kind.from_pretrained.__func__

        def spied(cls, *words, _real=real, **options):
            calls.append((cls.__name__, options.get("trust_remote_code")))
            return _real(cls, *words, **options)

        monkeypatch.setattr(kind, "from_pretrained", classmethod(spied))
    for name in ("pickscore", "image_reward"):
        make_reward(name, files[name]).load()
    load_pipeline(StableDiffusion.family, str(pipeline), None, None, torch.float32)
    found = {name for name, trusted in calls if trusted is False}
    assert found >= {"CLIPTokenizer", "CLIPImageProcessor", "CLIPModel", "BertTokenizer", "StableDiffusionPipeline"}
    sources = [
        path for top in ("condrl", "plugins") for path in (ROOT / top).glob("*/*.py") if "/plugins/" not in str(path)
    ]
    places = {
        str(p.relative_to(ROOT)) for p in sources if re.search(r"\.from_(pretrained|single_file)\(", p.read_text())
    }
    shown = {"condrl/report/usage.py"}  # writes such a call into a page, for its reader
    assert places - shown <= set(LOADED)  # a new place belongs above, and into this test


# ---------------------------------------------------------------------------------------------- a found config

FOUND = {
    "plugins": "plugins: [{file}]",
    "a reward": "rewards: {{'stranger_beside:f': {{}}}}",
    "a model": "model: {{name: 'stranger_beside:f'}}",
    "a model in a word": "model: 'stranger_beside:f'",
    "a model by reference": "model: {{name: '${{model.path}}', path: 'stranger_beside:f'}}",
    "a sampler": "sampler: {{name: 'stranger_beside:f'}}",
    "the deployed sampler": "evaluate: {{sampler: {{name: 'stranger_beside:f'}}}}",
    "a measure": "evaluate: {{measures: {{'stranger_beside:f': {{}}}}}}",
    "an algorithm": "algorithm: 'stranger_beside:f'",
}


@pytest.mark.parametrize("what", FOUND)
def test_a_found_config_imports_nothing(what, ran, tmp_path, monkeypatch, capsys):
    """Even with an empty LoRA file beside it; the same in a named config is the user's word."""
    beside = tmp_path / "stranger_beside.py"
    beside.write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\ndef f(a, b, c): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "stranger_beside", raising=False)
    run = tmp_path / "run"
    (run / "lora").mkdir(parents=True)
    (run / "config.yaml").write_text(FOUND[what].format(file=beside))
    (run / "condrl_files.txt").write_text("config.yaml\n")
    (run / "lora" / LORA_FILE).touch()
    for place in (run, run / "lora"):
        assert exit_code(lambda place=place: sample.sample(sample.parse([str(place), "--prompt", "x"]))) == 2
        assert not ran.exists()
    said = capsys.readouterr().err
    assert said.count("\n") == 2
    kind = {"model": "model", "sampler": "sampler"}.get(what.split()[-1], "model" if "model" in what else None)
    if kind:
        assert f"{run / 'config.yaml'} names the {kind} 'stranger_beside:f', which is code" in said
        word = f"{kind}.name=stranger_beside:f"
        assert exit_code(lambda: sample.sample(sample.parse([str(run), "--prompt", "x", word]))) == 2  # it is no model
        assert ran.exists()  # named by the user


def test_pictures_are_not_drawn_through_links(ran, tmp_path, monkeypatch):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "0000.png").symlink_to(ran)  # leads nowhere yet
    assert sample.unused(tmp_path / "samples").name == "0001.png"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").symlink_to(tmp_path / "samples")
    with pytest.raises(UsageError, match=r"run/samples is a link.*give --out"):
        in_run(tmp_path / "run" / "samples")


# ---------------------------------------------------------------------------------------------- LoRA files and texts

SETTINGS = {
    '{"unet.lora_alpha": NaN}': "NaN is not a JSON number",
    '{"unet.lora_alpha": 1e999}': "1e999 is too large for a number",
    '{"unet.lora_alpha": 1' + "0" * 400 + "}": "too large",
    '{"unet.lora_alpha": 1e300}': "has a scale of",
    '{"unet.alpha_pattern": {"to_q": -Infinity}}': "-Infinity is not a JSON number",
    '{"unet.alpha_pattern": {"(": 1}}': "in alpha_pattern is not the name of a module",
    '{"unet.alpha_pattern": {"(([a-z0-9_.])*)*!": 1}}': "is not the name of a module",  # matching it takes for ever
    "[" * 200_000: "nested too deeply",
}


@pytest.mark.parametrize("text", SETTINGS, ids=[text[:40] for text in SETTINGS])
def test_crafted_settings_of_a_lora_are_one_line(text, model, tmp_path):
    before = [p.clone() for p in model.module.parameters()]
    for layer in lora_layers(model.module).values():
        torch.nn.init.ones_(layer.lora_B["default"].weight)
    save_file(diffusers_names(lora_state(model.module)), tmp_path / LORA_FILE, {"lora_adapter_metadata": text})
    for p, value in zip(model.module.parameters(), before, strict=True):
        p.data = value
    with pytest.raises(UsageError, match=SETTINGS[text]) as found:
        model.load_adapter(tmp_path)
    assert "\n" not in str(found.value)
    assert all(torch.equal(p, value) for p, value in zip(model.module.parameters(), before, strict=True))


def test_a_lora_of_a_huge_rank_without_weights_is_refused(tmp_path):
    """A few bytes could ask for an adapter that fills the memory."""
    size, name = {"dtype": "F32", "shape": [10**9, 0], "data_offsets": [0, 0]}, "unet.x.lora.down.weight"
    header = json.dumps({name: size}).encode()
    (tmp_path / LORA_FILE).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UsageError, match="has no down weights"):
        rank_of(tmp_path / LORA_FILE)


@pytest.mark.parametrize("depth", [30, 500, 950, 200_000])
def test_deep_metadata_of_a_prompt_is_one_line(depth, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "x", "m": ' + "[" * depth + "]" * depth + "}\n")
    with pytest.raises(UsageError, match="line 1: .*deep|line 1: .*recursion"):
        load_prompts(str(tmp_path / "p.jsonl"), "prompts.train")


@pytest.mark.parametrize("name", ["../config.py", "/etc/passwd", "shapes/../../config.py", "shapes/../../../README.md"])
def test_an_asset_is_in_the_package(name):
    with pytest.raises(UsageError, match="is not in the package's assets"):
        load_prompts(f"asset:{name}", "prompts.train")
    with pytest.raises(UsageError, match="is not in the package's assets"):
        load_pipeline(StableDiffusion.family, f"asset:{name}", None, None, torch.float32)


@pytest.mark.parametrize(
    "name", ["x`](javascript:alert(1))", "<script>alert(1)</script>", "``` `x", "a\n\n# heading", "---"]
)
def test_a_model_card_shows_a_name_as_it_is(name, model, tmp_path):
    model.path = name
    model.save_adapter(tmp_path, {"rewards": "shapes: 1.0"})
    _, front, text = re.split("^---\n", (tmp_path / "README.md").read_text(), maxsplit=2, flags=re.MULTILINE)
    assert yaml.safe_load(front)["base_model"] == name
    (line,) = [line for line in text.splitlines() if line.startswith("Base model: ")]
    fence = re.match("Base model: (`+)", line)[1]
    shown, closing, rest = line.removeprefix(f"Base model: {fence}").partition(fence)
    assert (shown.strip(), closing) == (" ".join(name.split()), fence)  # nothing in it ends the code
    assert rest.startswith(". The two files")


def test_a_line_does_not_command_the_terminal(capsys):
    def work():
        raise UsageError("the file \x1b]0;title\x07\x1b[2Jx\r is none, \x9b31m")

    assert exit_code(work) == 2
    assert capsys.readouterr().err == "error: the file \\x1b]0;title\\x07\\x1b[2Jx  is none, \\x9b31m\n"
