"""What a run tuned, as other programs read it, and pushed to a hub that stands in for the real one."""

import base64
import errno
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline
from drawing import perturb
from helpers import ROOT, run_python
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from condrl.__main__ import COMMANDS
from condrl.commands import export as command
from condrl.commands.console import exit_code
from condrl.config import to_yaml
from condrl.loading import load_config
from condrl.models.lora import KOHYA_FILE, LORA_FILE
from condrl.plugins.models.sd3 import SD3
from condrl.plugins.models.stable_diffusion import StableDiffusion
from condrl.training.folder import RunFolder

WEIGHTS = "diffusion_pytorch_model.safetensors"
ROW = {
    "base": {"mean": 0.5, "ci95": [0.4, 0.6]},
    "tuned": {"mean": 0.7, "ci95": [0.6, 0.8]},
    "difference": {"mean": 0.2, "ci95": [0.1, 0.3]},
}


@pytest.fixture
def run(pipeline, tmp_path):
    """A finished run with a random LoRA, and two held-out images."""
    folder = tmp_path / "my_run"
    model = StableDiffusion(torch.device("cpu"), path=str(pipeline), lora_rank=2)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for weight in (p for p in model.module.parameters() if p.requires_grad):
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    for name in ("lora", "lora_best"):
        model.save_adapter(folder / name, {"rewards": "brightness (weight 1)"})
    words = [str(ROOT / "configs" / "quickstart.yaml"), f"model.path={pipeline}", "model.lora_rank=2"]
    words += ["model.lora_targets=[to_q,to_k,to_v,to_out.0]", "sampler.steps=3"]
    (folder / "config.yaml").write_text(to_yaml(load_config(words)))
    best = {**ROW, "tuned": {"mean": 0.9, "ci95": None}}
    result = {"heldout": {"brightness": ROW}, "best": {"epoch": 2, "heldout": {"brightness": best}}}
    (folder / "result.json").write_text(json.dumps(result))
    lines = []
    (folder / "heldout").mkdir()
    for i in range(2):
        pictures = {who: f"heldout/{i:05d}_{who}.png" for who in ("base", "tuned")}
        for who, path in pictures.items():
            Image.new("RGB", (8, 8), (i, 100 * (who == "tuned"), 0)).save(folder / path)
        scores = {"base": {"brightness": 0.1}, "tuned": {"brightness": 0.2}}
        lines.append({"prompt": f"star: {i}", "row": i, "seed": i, "pictures": pictures, **scores})
    (folder / "heldout.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    RunFolder(folder).adopt({"config.yaml"})
    return folder


def export(*words) -> int:
    return exit_code(lambda: command.export(command.parse([str(word) for word in words])))


def drawn(pipe) -> np.ndarray:
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    found = pipe("a red star", num_inference_steps=3, guidance_scale=1.0, eta=1.0, generator=noise)
    return np.asarray(found.images[0], float)


def with_lora(pipeline, folder, name, scale=1.0):
    pipe = StableDiffusionPipeline.from_pretrained(pipeline)
    pipe.load_lora_weights(folder, weight_name=name)
    pipe.fuse_lora(lora_scale=scale)
    return drawn(pipe)


@pytest.mark.slow
@pytest.mark.parametrize("strength", [1, 0.5])
def test_every_format_draws_the_same_images_in_diffusers(run, pipeline, strength):
    expected = with_lora(pipeline, run / "lora", LORA_FILE, strength)
    assert np.abs(expected - drawn(StableDiffusionPipeline.from_pretrained(pipeline))).max() > 20
    for to in command.FORMATS:
        assert export(run, "--to", to, "--strength", strength) == 0
    out = run / "export"
    assert sorted(p.name for p in (out / "kohya").glob("*.safetensors")) == ["my_run.safetensors"]
    assert np.abs(with_lora(pipeline, out / "diffusers", LORA_FILE) - expected).max() <= 1
    assert np.abs(with_lora(pipeline, out / "kohya", "my_run.safetensors") - expected).max() <= 1
    merged = StableDiffusionPipeline.from_pretrained(out / "merged", local_files_only=True)
    assert np.abs(drawn(merged) - expected).max() <= 1
    assert not any("lora" in key for key in merged.unet.state_dict())


def test_whose_names_a_transformers_file_has_is_told(run, tmp_path, capsys):
    SD3(torch.device("cpu"), path="asset:shapes_flow", lora_rank=2).save_adapter(tmp_path / "lora")
    words = [tmp_path / "lora", "model.name=sd3", "model.path=asset:shapes_flow", "--to", "kohya"]
    assert export(*words, "--out", tmp_path / "flow") == 0
    assert export(run, "--to", "kohya", "--out", tmp_path / "unet") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert said == ["note: a transformer's names are OneTrainer's, which ComfyUI reads; kohya's are those of a UNet"]


def test_a_model_that_cannot_write_its_lora_is_one_line(run, tmp_path, capsys, monkeypatch):
    def save_adapter(model, folder, metadata=None):
        raise KeyError("late")

    monkeypatch.setattr(StableDiffusion, "save_adapter", save_adapter)
    assert export(run, "--to", "diffusers", "--out", tmp_path / "out") == 1
    assert "stopped: the model could not write its LoRA: KeyError: 'late'" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_a_kohya_file_has_kohyas_names_and_a_run_keeps_its_rewards(run, tmp_path):
    from safetensors import safe_open

    assert export(run, "--to", "kohya", "--out", tmp_path / "out") == 0
    with safe_open(tmp_path / "out" / "my_run.safetensors", "pt") as file:
        assert all(key.startswith("lora_unet_") for key in file.keys())  # noqa: SIM118
        assert file.metadata()["rewards"] == "brightness (weight 1)"
        assert file.metadata()["base_model"] == "pipe"  # not where it lies on this machine


def test_a_merged_pipeline_has_the_names_of_every_release(run):
    """Readers before transformers 5 need the prefix, a slow tokenizer its two files."""
    assert export(run, "--to", "merged") == 0
    out = run / "export" / "merged"
    assert all(key.startswith("text_model.") for key in load_file(out / "text_encoder" / "model.safetensors"))
    words = json.loads((out / "tokenizer" / "tokenizer.json").read_text())["model"]
    assert json.loads((out / "tokenizer" / "vocab.json").read_text()) == words["vocab"]
    lines = (out / "tokenizer" / "merges.txt").read_text().splitlines()
    assert lines[0].startswith("#version")
    assert lines[1:] == [" ".join(merge) for merge in words["merges"]]


def weights_of(lora):
    """What a LoRA adds to each weight of the UNet."""
    file, (up, down) = load_file(lora / LORA_FILE), (".lora.up.weight", ".lora.down.weight")
    names = [key.removesuffix(up) for key in file if key.endswith(up)]
    assert names
    return {f"{name.removeprefix('unet.')}.weight": file[name + up] @ file[name + down] for name in names}


@pytest.fixture
def half_run(run):
    """The run, tuned in bfloat16 with a small LoRA, as such runs have it."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"] |= {"dtype": "bfloat16", "offload_vae": True, "memory_format": "channels_last"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    lora = load_file(run / "lora" / LORA_FILE)
    save_file({key: value / 10 for key, value in lora.items()}, run / "lora" / LORA_FILE, {"format": "pt"})
    return run


def test_a_run_in_half_precision_is_merged_without_rounding(half_run, pipeline, capsys):
    assert export(half_run, "--to", "merged") == 0
    assert "survives" not in capsys.readouterr().out
    out, base = half_run / "export" / "merged", load_file(pipeline / "unet" / WEIGHTS)
    merged = load_file(out / "unet" / WEIGHTS)
    for name, change in weights_of(half_run / "lora").items():
        torch.testing.assert_close(merged[name], base[name] + change)
    expected = with_lora(pipeline, half_run / "lora", LORA_FILE)
    assert np.abs(drawn(StableDiffusionPipeline.from_pretrained(out)) - expected).max() <= 1
    card = (out / "README.md").read_text()
    assert "torch_dtype=torch.float32" in card
    assert "The weights are float32." in card


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_rounding_leaves_of_a_lora_is_told(dtype, half_run, pipeline, capsys):
    """Beside the base model, rounded likewise."""
    assert export(half_run, "--to", "merged", "--dtype", dtype) == 0
    out, base = half_run / "export" / "merged", load_file(pipeline / "unet" / WEIGHTS)
    merged, half = load_file(out / "unet" / WEIGHTS), getattr(torch, dtype)
    assert {weight.dtype for weight in merged.values()} == {half}
    changes = weights_of(half_run / "lora")
    wanted = torch.cat([change.flatten() for change in changes.values()]).double()
    left = torch.cat([(merged[name].float() - base[name].to(half).float()).flatten() for name in changes]).double()
    share, stay = 1 - (left - wanted).norm() / wanted.norm(), (left == 0).double().mean()
    assert 0.3 < share < 0.999
    line = f"{share:.0%} of the LoRA's change survives rounding to {dtype}; {stay:.0%} of the weights that it changes "
    assert line + "stay as they were\n" in capsys.readouterr().out
    card = (out / "README.md").read_text()
    assert f"The weights are {dtype}: {line}stay as they were." in card
    assert f"torch_dtype=torch.{dtype}" in card


def test_half_precision_loads_without_a_dtype(run, tmp_path):
    assert export(run, "--to", "merged", "--out", tmp_path / "half", "--dtype", "float16") == 0
    assert load_file(tmp_path / "half" / "unet" / WEIGHTS)["conv_in.weight"].dtype == torch.float16
    assert drawn(StableDiffusionPipeline.from_pretrained(tmp_path / "half")).std() > 0  # all parts of one type


def test_the_card_is_what_the_hub_reads(run):
    for to in command.FORMATS:
        assert export(run, "--to", to) == 0
        card = ModelCard.load(run / "export" / to / "README.md")
        assert card.data.pipeline_tag == "text-to-image"
        assert card.data.base_model is None  # a folder of this machine
        assert str(run.parent) not in card.content
        assert card.data.to_dict()["instance_prompt"] == "star: 0"
        for i, widget in enumerate(card.data.widget):
            assert widget["text"] == f"star: {i}"
            with Image.open(run / "export" / to / widget["output"]["url"]) as picture:
                assert picture.getpixel((0, 0)) == (i, 100, 0)
        assert "| brightness | 0.500 to 0.700, +0.200 [+0.100, +0.300] |" in card.text
        assert ("my_run.safetensors" in card.text) == (to == "kohya")
        assert ("load_lora_weights" in card.text) == (to == "diffusers")
        assert ("lora" in card.data.tags) == (to != "merged")


def test_what_has_not_ended_says_so(run, capsys):
    (run / "result.json").unlink()
    (run / "metrics.jsonl").write_text('{"epoch": 1, "diagnosis": []}\n')
    assert export(run, "--to", "kohya") == 0
    assert "has not ended: this is its last state, and nothing was measured of it" in capsys.readouterr().err
    text = (run / "export" / "kohya" / "README.md").read_text()
    assert "The run has not ended: 1 epoch is recorded, and nothing is measured." in text


def test_a_base_model_on_the_hub_is_linked(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    from condrl.report.card import front_matter
    from condrl.report.run import read_run

    config["model"]["path"] = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    front = yaml.safe_load(front_matter(read_run(run), [], is_whole=False).strip("-\n"))
    assert front["base_model"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert front["base_model_relation"] == "adapter"


def test_the_best_lora_has_its_own_numbers(run, tmp_path):
    assert export(run / "lora_best", "--to", "diffusers", "--out", tmp_path / "best") == 0
    text = (tmp_path / "best" / "README.md").read_text()
    assert "0.500 to 0.900" in text
    assert not (tmp_path / "best" / "images").exists()


def test_a_file_of_another_program_is_converted(run, pipeline, tmp_path):
    shutil.copy(run / "lora" / KOHYA_FILE, tmp_path / "theirs.safetensors")
    words = (tmp_path / "theirs.safetensors", f"model.path={pipeline}", "--to", "diffusers", "--out", tmp_path / "out")
    assert export(*words) == 0
    mine, theirs = load_file(tmp_path / "out" / LORA_FILE), load_file(run / "lora" / LORA_FILE)
    assert mine.keys() == theirs.keys()
    assert all(torch.allclose(mine[key], theirs[key]) for key in mine)
    assert not (tmp_path / "out" / "README.md").exists()


@pytest.mark.parametrize("targets", [("conv1", "ff.net.2"), ("to_q",)])
def test_a_file_is_converted_whatever_modules_it_has(targets, pipeline, tmp_path, capsys):
    model = StableDiffusion(torch.device("cpu"), path=str(pipeline), lora_rank=2, lora_targets=targets)
    perturb(model)
    model.save_adapter(tmp_path / "lora")
    words = (tmp_path / "lora", f"model.path={pipeline}", "--to", "diffusers", "--out", tmp_path / "out")
    assert export(*words) == 0, capsys.readouterr().err
    mine, theirs = load_file(tmp_path / "out" / LORA_FILE), load_file(tmp_path / "lora" / LORA_FILE)
    assert mine.keys() == theirs.keys()
    assert all(torch.allclose(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "merged", "--strength", "nan"], "--strength must be a finite number"),
        (["--to", "merged", "--push", "no name"], "--push no name: give OWNER/NAME"),
        (["--to", "merged", "--public"], "--public has no effect without --push"),
        (["--to", "kohya", "--out", "full"], "full is not empty: remove it, or name another folder with --out"),
        (["--to", "kohya", "--out", "full/file"], "full/file is a file"),
        (["train.lr=1", "--to", "kohya"], "train.lr=1 has no effect"),
        (["model.dtype=float16", "--to", "merged"], "model.dtype=float16 has no effect, a LoRA is merged in float32: "),
        (["--dtype", "float16", "--to", "kohya"], "--dtype has no effect on a LoRA, which is float32"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(words, message, run, tmp_path, capsys, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    monkeypatch.chdir(tmp_path)
    assert export(run, *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (run / "export").exists()


@pytest.mark.parametrize("there", [True, False])
def test_an_export_that_fails_leaves_nothing_half_written(there, run, tmp_path, capsys, monkeypatch):
    """So the same command can be given again."""
    out = tmp_path / "out"
    if there:
        out.mkdir()

    def write(model, lora, folder, *more):
        (folder / "unet").mkdir()
        (folder / "unet" / "weights").write_text("half")
        (folder / "model_index.json").write_text("{}")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setitem(command.FORMATS, "kohya", write)
        assert export(run, "--to", "kohya", "--out", out) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert list(out.iterdir()) == []
    assert export(run, "--to", "kohya", "--out", out) == 0


def test_nothing_to_export(capsys):
    assert export("model.guidance=1", "--to", "kohya") == 2
    assert "name a run's folder, or a LoRA" in capsys.readouterr().err
    assert "export" in COMMANDS


# ---------------------------------------------------------------------------------------------- the hub


class Hub(BaseHTTPRequestHandler):
    """Answers what the hub's client asks when a folder is pushed, and keeps what it is sent."""

    created, files, refuses = {}, {}, False

    def do_GET(self):
        self.answer({"name": "me", "type": "user", "orgs": []} if "whoami" in self.path else {})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path.startswith("/api/repos/create"):
            Hub.created = json.loads(body)
            self.answer({"url": "http://127.0.0.1/me/mine"}, 403 if Hub.refuses else 200)
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            known = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            self.answer({"files": known})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    Hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": "http://127.0.0.1/me/mine/commit/0"})
        else:
            self.answer({})

    def answer(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    Hub.created, Hub.files, Hub.refuses = {}, {}, False
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0"}
    server.shutdown()
    server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize("public", [True, False])
def test_a_folder_is_pushed_whole(public, run, hub, tmp_path):
    words = [str(run), "--to", "diffusers", "--push", "me/mine", *(["--public"] if public else [])]
    done = run_python("-m", "condrl", "export", *words, cwd=tmp_path, **hub)
    assert done.returncode == 0, done.stderr
    assert "pushed to " in done.stdout
    assert (Hub.created["name"], Hub.created["organization"]) == ("mine", "me")
    assert Hub.created.get("visibility", "private" if Hub.created.get("private") else "public") == (
        "public" if public else "private"  # `private` in requests of earlier clients
    )
    out = run / "export" / "diffusers"
    assert Hub.files == {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert b'load_lora_weights("me/mine"' in Hub.files["README.md"]
    assert "hf_secret" not in done.stdout + done.stderr


@pytest.mark.slow
def test_what_cannot_be_pushed_is_said_in_a_line(run, hub, tmp_path):
    words = [str(run), "--to", "diffusers", "--push", "me/mine"]
    nobody = run_python(
        "-m", "condrl", "export", *words, cwd=tmp_path, **{**hub, "HF_TOKEN": ""}, HF_HOME=str(tmp_path)
    )
    assert nobody.returncode == 2
    assert "error: --push: log in with `hf auth login`" in nobody.stderr
    assert not (run / "export").exists()  # before any work
    Hub.refuses = True
    refused = run_python("-m", "condrl", "export", *words, cwd=tmp_path, **hub)
    assert refused.returncode == 1
    assert "diffusers is written, but could not be pushed to me/mine" in refused.stderr
    assert f"try again with `hf upload me/mine {run}/export/diffusers . --private`" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert (run / "export" / "diffusers" / "README.md").is_file()
