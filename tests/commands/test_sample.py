"""Drawing with a run's LoRA: what the run deployed, without anything that only tuning needs."""

import json

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline
from helpers import ROOT
from PIL import Image

import condrl
from condrl import UsageError
from condrl.commands import evaluate, export
from condrl.commands import sample as command
from condrl.commands.console import exit_code
from condrl.config import to_yaml
from condrl.loading import load_config
from condrl.models.lora import KOHYA_FILE, LORA_FILE, lora_layers
from condrl.models.points import MODULE_FILE
from condrl.plugins.models.stable_diffusion import StableDiffusion
from condrl.training.folder import RunFolder

PROMPT = "a red star"
REWARD = """
import condrl, pathlib
pathlib.Path(__file__).with_name("ran").touch()

@condrl.reward
def {name}(samples, prompts):
    return samples.mean((1, 2, 3))
"""
METADATA_REWARD = """
import condrl, torch

@condrl.reward
def of_a_row(samples, prompts, metadata):
    return torch.tensor([row["sign"] for row in metadata]) * samples.mean((1, 2, 3))
"""


@pytest.fixture
def run(pipeline, tmp_path, request):
    """A finished run that was tuned with 10 steps of eta = 1, from another LoRA, and deployed with 3 of eta = 0."""
    mine, folder = tmp_path / "mine.py", tmp_path / "run"
    name = f"mine_{abs(hash(str(tmp_path)))}"
    mine.write_text(REWARD.format(name=name))
    model = StableDiffusion(torch.device("cpu"), path=str(pipeline), lora_rank=2)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for weight in (p for p in model.module.parameters() if p.requires_grad):
            weight.copy_(torch.randn(weight.shape, generator=generator))
    for place in (folder / "lora", tmp_path / "before"):
        model.save_adapter(place)
    words = [str(ROOT / "configs" / "quickstart.yaml"), f"model.path={pipeline}", "model.lora_rank=2"]
    words += ["model.lora_targets=[to_q,to_k,to_v,to_out.0]", f"model.lora={tmp_path / 'before'}", f"plugins=[{mine}]"]
    words += [f"rewards.{name}.weight=1", "evaluate.sampler={steps: 3, eta: 0, spacing: leading}"]
    (folder / "config.yaml").write_text(to_yaml(load_config(words)))
    (tmp_path / "ran").unlink()
    RunFolder(folder).adopt({"config.yaml"})
    return folder


def sample(*words: str) -> int:
    return exit_code(lambda: command.sample(command.parse([*words, "--prompt", PROMPT])))


def drawn(folder) -> np.ndarray:
    return np.asarray(Image.open(folder / "0000.png"), float)


def theirs(pipeline, lora, scale: float = 1.0) -> np.ndarray:
    """What diffusers draws with 3 steps of DDIM, eta = 0."""
    pipe = StableDiffusionPipeline.from_pretrained(pipeline, torch_dtype=torch.float32, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.load_lora_weights(lora, weight_name=LORA_FILE)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(PROMPT, num_inference_steps=3, guidance_scale=1.0, eta=0.0, output_type="pil",
                 generator=torch.Generator().manual_seed(0), cross_attention_kwargs={"scale": scale}).images[0]  # fmt: skip
    return np.asarray(image, float)


@pytest.mark.slow
@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0])
def test_what_is_drawn_is_what_was_deployed(strength, run, pipeline, tmp_path):
    """Not with the sampler that tuned; and at any strength of the LoRA."""
    out = tmp_path / "drawn"
    assert sample(str(run), "--folder", str(out), "--out", str(out / "sheet.png"), "--strength", str(strength)) == 0
    assert np.abs(drawn(out) - theirs(pipeline, run / "lora", strength)).max() <= 1
    if strength < 1:
        assert np.abs(drawn(out) - theirs(pipeline, run / "lora")).max() > 3


@pytest.mark.parametrize(("strength", "said"), [("1e30", "an image is not finite"), ("1e39", "too large for float32")])
def test_a_strength_that_is_too_large_is_one_line(strength, said, run, tmp_path, capsys):
    assert sample(str(run), "--strength", strength, "--out", str(tmp_path / "x.png")) in (1, 2)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_drawing_needs_neither_the_rewards_nor_the_lora_before(run, tmp_path):
    (tmp_path / "mine.py").unlink()
    for path in (tmp_path / "before").iterdir():
        path.unlink()
    assert sample(str(run), "--out", str(tmp_path / "x.png")) == 0


@pytest.mark.parametrize("what", ["run", "lora", "file"])
def test_what_a_found_config_names_does_not_run(what, run, tmp_path):
    place = {"run": run, "lora": run / "lora", "file": run / "lora" / LORA_FILE}[what]
    assert sample(str(place), "--out", str(tmp_path / "x.png")) == 0
    assert not (tmp_path / "ran").exists()


def test_pictures_go_to_the_runs_samples_and_replace_none(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert sample(str(run)) == 0
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["0000.png", "0001.png"]
    assert not (tmp_path / "samples.png").exists()


def test_a_model_that_fails_while_it_draws_is_one_line(run, tmp_path, capsys, monkeypatch):
    def decode(model, x):
        raise KeyError("late")

    monkeypatch.setattr(StableDiffusion, "decode", decode)
    assert sample(str(run), "--out", str(tmp_path / "x.png")) == 1
    assert "stopped: the model failed while images were drawn: KeyError: 'late'" in capsys.readouterr().err


def test_a_model_that_cannot_load_its_lora_is_one_line(run, tmp_path, capsys, monkeypatch):
    """In each command that loads one."""

    def load_adapter(model, folder):
        raise KeyError("late")

    monkeypatch.setattr(StableDiffusion, "load_adapter", load_adapter)
    assert sample(str(run), "--out", str(tmp_path / "x.png")) == 2
    words = [f"plugins=[{tmp_path}/mine.py]", "model.lora=null", "--out", str(tmp_path / "measured")]
    assert evaluate.main([str(run), *words]) == 2
    assert export.main([str(run), "--to", "diffusers"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "late" in line]
    assert said == ["error: the model 'stable_diffusion' failed: KeyError: 'late'"] * 3


def test_python_takes_paths_numpy_seeds_and_a_single_prompt(run):
    few = condrl.sample(run, "sampler.steps=2", prompts=PROMPT, seeds=np.arange(2))
    same = condrl.sample(str(run), "sampler.steps=2", prompts=[PROMPT], seeds=[0, 1])
    assert [image.tobytes() for image in few] == [image.tobytes() for image in same]
    with pytest.raises(UsageError, match=r"seeds: .*'float'.*got \[0.5\]"):
        condrl.sample(run, prompts=PROMPT, seeds=[0.5])
    with pytest.raises(UsageError, match=r"expected text or paths, such as 'train.lr=1e-4', got \{'lr': 1\}"):
        condrl.finetune("toy/p1", {"lr": 1})


def test_images_of_a_folder_are_not_replaced(run, tmp_path, capsys):
    """Not even by those of a sheet that lies in it."""
    for out in ("a.png", "pictures/0002.png"):
        assert (
            sample(str(run), "--seeds", "0", "1", "--folder", str(tmp_path / "pictures"), "--out", str(tmp_path / out))
            == 0
        )
    assert "wrote 2 images to" in (said := capsys.readouterr().out)
    assert "from 0003.png on" in said
    pictures = {path.name: np.asarray(Image.open(path), float) for path in (tmp_path / "pictures").iterdir()}
    assert sorted(pictures) == ["0000.png", "0001.png", "0002.png", "0003.png", "0004.png"]
    assert pictures["0002.png"].shape != pictures["0000.png"].shape  # the sheet
    assert (pictures["0000.png"] == pictures["0003.png"]).all()
    assert (pictures["0001.png"] == pictures["0004.png"]).all()


def test_rewards_that_steer_are_given_a_rows_metadata(run, tmp_path):
    """The darkest or the brightest of four, as the rows say."""
    judge, rows = tmp_path / "judge.py", tmp_path / "rows.jsonl"
    judge.write_text(METADATA_REWARD)
    rows.write_text("".join(json.dumps({"prompt": PROMPT, "sign": sign}) + "\n" for sign in (1, -1, 1)))
    words = [str(run), f"plugins=[{judge}]", "rewards.of_a_row.weight=1", "--steer", "best_of_n,n=4", "sampler.eta=1"]
    words += [
        "--prompts",
        str(rows),
        "--folder",
        str(tmp_path / "out"),
        "--out",
        str(tmp_path / "x.png"),
        "--batch",
        "2",
    ]
    assert exit_code(lambda: command.sample(command.parse(words))) == 0
    bright, dark, same = (np.asarray(Image.open(tmp_path / "out" / f"000{i}.png"), float) for i in range(3))
    assert bright.mean() > dark.mean()
    assert (bright == same).all()


def test_a_lora_without_a_run_gets_its_own_rank(run, pipeline, tmp_path):
    lora = tmp_path / "elsewhere" / "there" / "it" / "is"
    lora.parent.mkdir(parents=True)
    (run / "lora").rename(lora)
    few = ["model.guidance=1", "sampler.steps=3", "sampler.eta=0"]
    assert (
        sample(str(lora), f"model.path={pipeline}", *few, "--folder", str(lora), "--out", str(tmp_path / "x.png")) == 0
    )
    assert np.abs(drawn(lora) - theirs(pipeline, lora)).max() <= 1


@pytest.mark.parametrize("name", [LORA_FILE, KOHYA_FILE])
def test_a_lora_without_a_run_has_the_modules_of_its_file(name, pipeline, tmp_path):
    """Also those that lora_targets leaves out by default."""
    targets = ("to_q", "proj_in", "conv1")
    model = StableDiffusion(torch.device("cpu"), path=str(pipeline), lora_rank=2, lora_targets=targets)
    with torch.no_grad():
        for layer in lora_layers(model.module).values():
            layer.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(0))
    model.save_adapter(tmp_path / "lora")
    file, out = tmp_path / "lora" / name, tmp_path / "drawn"
    few = ["model.guidance=1", "sampler.steps=3", "sampler.eta=0"]
    words = [str(file), f"model.path={pipeline}", *few, "--folder", str(out), "--out", str(tmp_path / "x.png")]
    assert sample(*words) == 0
    assert np.abs(drawn(out) - theirs(pipeline, tmp_path / "lora")).max() <= 1
    assert np.abs(drawn(out) - theirs(pipeline, tmp_path / "lora", 0.0)).max() > 3


@pytest.mark.parametrize(
    ("main", "option", "words"),
    [
        (command.main, "--seeds", ["--prompt", "a", "--seeds", "0", "1"]),
        (evaluate.main, "--steps", ["RUN", "--steps", "5"]),
    ],
)
def test_a_setting_after_several_values_is_told_where_to_go(main, option, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*words, "model.guidance=3"])
    assert ended.value.code == 2
    expected = f"argument {option}: model.guidance=3 is a setting: write settings before this option"
    assert expected in capsys.readouterr().err


def test_without_a_folder_the_quickstarts_base_model_draws(tmp_path):
    config, lora, _ = command.read_words(["model.guidance=2"])
    quickstart = load_config([str(ROOT / "configs" / "quickstart.yaml")])
    assert config.sampler == quickstart.sampler
    assert config.model == {**quickstart.model, "guidance": 2.0}
    assert lora is None


def test_a_run_of_points_is_told_from_a_folder_that_is_none(tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / MODULE_FILE).touch()
    (tmp_path / "config.yaml").write_text((ROOT / "configs" / "toy" / "g1.yaml").read_text())
    with pytest.raises(UsageError, match="is a run on points, not images"):
        command.read_words([str(tmp_path)])
    (tmp_path / "lora" / MODULE_FILE).unlink()
    (tmp_path / "lora").rmdir()
    with pytest.raises(UsageError, match="is not finished: it has no lora/ yet"):
        command.read_words([str(tmp_path)])


def test_a_prompt_that_is_cut_is_told_once(run, tmp_path, capsys):
    long = f"{PROMPT} " * 30
    assert sample(str(run), "--out", str(tmp_path / "x.png"), "--compare", "--prompt", long) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert said == [f"warning: the prompt {long[:300]!r} ... has 92 tokens; the model reads the first 24"]


def test_many_images_are_several_pages(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("condrl.training.pictures.TILES", 4)
    assert sample(str(run), "--out", str(tmp_path / "x.png"), "--seeds", *map(str, range(9))) == 0
    assert [path.name for path in sorted(tmp_path.glob("x*.png"))] == ["x.png", "x_2.png", "x_3.png"]
    assert capsys.readouterr().out == f"wrote {tmp_path / 'x.png'} and more pages, to {tmp_path / 'x_3.png'}\n"


# ---------------------------------------------------------------------------------------------- steering


def rewarded_by(run, rewards):
    """The run, as if it had been tuned on these."""
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"rewards": rewards}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return str(run)


def test_a_run_is_steered_by_its_own_rewards_or_by_those_that_are_named(run, tmp_path):
    """The brightest of four, or the darkest of the same."""
    folder, means = rewarded_by(run, {"brightness": {"weight": 1.0}}), []
    for words in ([], ["rewards.brightness.weight=-1"]):
        out = tmp_path / str(len(means))
        words = ["--steer", "best_of_n,n=4", *words, "sampler.eta=1", "--folder", str(out)]
        assert sample(folder, *words, "--out", str(tmp_path / "x.png")) == 0
        means.append(drawn(out).mean())
    brightest, darkest = means
    assert brightest > darkest


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ({"remote": {"weight": 1.0, "url": "http://127.0.0.1:9"}}, "uses 'remote', which asks a server"),
        (
            {"of_a_file_elsewhere": {"weight": 1.0}},
            "not named: load it with plugins=[FILE] if you trust it, or name the",
        ),
    ],
)
def test_what_a_run_names_neither_runs_nor_is_asked_to_steer(rewards, said, run, tmp_path, capsys):
    assert sample(rewarded_by(run, rewards), "--steer", "smc", "--out", str(tmp_path / "x.png")) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "name the rewards to steer by, as in rewards.brightness.weight=1" in error
    assert not (tmp_path / "ran").exists()
