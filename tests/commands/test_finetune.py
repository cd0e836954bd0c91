"""The scripts as a user runs them, on the embedded pipeline, from outside the repository."""

import json
import textwrap

import numpy as np
import pytest
import torch
from helpers import ROOT, run_python
from PIL import Image
from safetensors.torch import load_file

from condrl.loading import load_config
from condrl.models.lora import LORA_FILE

pytestmark = pytest.mark.slow

FINETUNE = str(ROOT / "scripts" / "finetune.py")
SAMPLE = str(ROOT / "scripts" / "sample.py")
SMALL = [
    "train.epochs=2", "train.prompts_per_epoch=2", "train.images_per_prompt=4", "train.rollout_batch=8",
    "train.updates_per_epoch=2", "train.steps_per_image=2", "sampler.steps=4", "evaluate.prompts=6", "evaluate.pictures=2",
    "train.lr=0.03", "algorithm.name=ddpo",
]  # fmt: skip
REWARD = """
import condrl

@condrl.reward
def redness(samples, prompts, *, channel: int = 0):
    return samples[:, channel].mean((1, 2)) - samples.mean((1, 2, 3))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with the user's own reward of four lines."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "my_reward.py").write_text(REWARD)
    done = run_python(
        FINETUNE, "plugins=[my_reward.py]", "rewards.redness.weight=1", *SMALL, "run.name=mine", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "mine", done


def test_a_run_leaves_everything_behind(run):
    folder, done = run
    result = json.loads((folder / "result.json").read_text())
    assert set(result["heldout"]) == {"shapes_exact", "shapes", "clip", "redness"}
    assert result["heldout"]["redness"]["tuned"]["mean"] != result["heldout"]["redness"]["base"]["mean"]
    for measure in result["heldout"].values():
        for who in ("base", "tuned"):
            low, high = measure[who]["ci95"]
            assert low <= measure[who]["mean"] <= high
    assert result["images"] == 16
    # held-out twice, validation once, the path KL (a roll-out, tuned and base), two roll-outs, whose ratios are
    # recomputed, the ratio check of epochs 1 and 2, two updates
    guided = 2 if load_config([str(folder / "config.yaml")]).model["guidance"] != 1 else 1
    assert result["network_calls"] == guided * (6 * 6 * 4 + 2 * 8 * 4 + 2 * 8 * 4 + 2 * 8 * 4 + 2 * 8 * 2)
    assert result["seed"] == 0
    assert 0 < result["peak_memory_gb"] < 3
    assert 0 < result["seconds"] < 300
    assert {"condrl", "torch", "diffusers", "peft"} <= set(result["versions"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert all(np.isfinite(line["reward/redness"]) and line["grad_norm"] > 0 for line in lines)
    assert (folder / "lora" / LORA_FILE).is_file()
    assert (folder / "config.yaml").is_file()
    for name in ("epoch_0001", "epoch_0002", "before_after"):
        assert Image.open(folder / "images" / f"{name}.png").width > 300
    images = [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]
    assert len(images) == 6
    for name, row in result["heldout"].items():
        for who in ("base", "tuned"):
            assert np.mean([line[who][name] for line in images]) == pytest.approx(row[who]["mean"], abs=1e-5)
    drawn = [line["pictures"] for line in images if line["pictures"]]
    assert drawn
    assert all((folder / file).is_file() for files in drawn for file in files.values())
    assert "mine" in (folder / "report.html").read_text()
    assert "| redness | " in (folder / "lora" / "README.md").read_text()
    assert "shapes_exact" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_run_is_repeated_by_its_seed(run, tmp_path):
    folder, _ = run
    again = run_python(FINETUNE, str(folder / "config.yaml"), f"plugins=[{folder.parents[1] / 'my_reward.py'}]",
                       f"run.dir={tmp_path / 'again'}", cwd=tmp_path)  # fmt: skip
    assert again.returncode == 0, again.stderr
    first, second = (json.loads((f / "result.json").read_text())["heldout"] for f in (folder, tmp_path / "again"))
    assert first == second
    first, second = (load_file(f / "lora" / LORA_FILE) for f in (folder, tmp_path / "again"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_finished_run_is_not_overwritten_unless_asked(run):
    folder, _ = run
    before = (folder / "result.json").read_bytes()
    words = ["plugins=[my_reward.py]", *SMALL, "run.name=mine"]
    refused = run_python(FINETUNE, *words, "run.overwrite=false", cwd=folder.parents[1])
    assert refused.returncode == 2
    assert "run.overwrite=true" in refused.stderr
    assert (folder / "result.json").read_bytes() == before


def test_sample_compares_base_and_tuned(run, tmp_path):
    folder, _ = run
    words = [
        "--prompt",
        "a red star",
        "--prompt",
        "two blue circles",
        "--seeds",
        "0",
        "7",
        "--folder",
        str(tmp_path / "x"),
    ]
    done = run_python(
        SAMPLE, str(folder), *words, "--compare", "--out", str(tmp_path / "out.png"), cwd=folder.parents[1]
    )
    assert done.returncode == 0, done.stderr
    sheet = Image.open(tmp_path / "out.png")
    assert sheet.width > 4 * 192
    assert len(list((tmp_path / "x").iterdir())) == 4
    lora = run_python(SAMPLE, str(folder / "lora"), *words[:-1], str(tmp_path / "y"), cwd=folder.parents[1])
    assert lora.returncode == 0, lora.stderr
    for i in range(4):
        assert (tmp_path / "x" / f"{i:04d}.png").read_bytes() == (tmp_path / "y" / f"{i:04d}.png").read_bytes()


def test_sample_is_the_plain_diffusers_pipeline_with_the_lora(run, tmp_path):
    """No condrl on this side: load_lora_weights, DDIM, the same seed."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    folder, _ = run
    done = run_python(SAMPLE, str(folder), "--prompt", "a red star left of a blue square", "--seeds", "0", "1", "2",
                      "--folder", str(tmp_path), "--out", str(tmp_path / "sheet" / "s.png"), cwd=folder.parents[1])  # fmt: skip
    assert done.returncode == 0, done.stderr
    config = load_config([str(folder / "config.yaml")])
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "condrl/assets/shapes", dtype=torch.float32)
    pipe.load_lora_weights(folder / "lora")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing=config.sampler["spacing"])

    def theirs(seed):
        return pipe("a red star left of a blue square", generator=torch.Generator().manual_seed(seed), eta=1.0,
                    num_inference_steps=4, guidance_scale=config.model["guidance"], output_type="np").images[0]  # fmt: skip

    ours = [np.asarray(Image.open(tmp_path / f"{seed:04d}.png")) / 255 for seed in range(3)]
    for seed in range(3):
        assert np.abs(ours[seed] - theirs(seed)).max() <= 1.5 / 255  # 1/255, and half a level of rounding in the PNG
    pipe.unload_lora_weights()
    assert max(np.abs(ours[seed] - theirs(seed)).max() for seed in range(3)) > 10 / 255  # the LoRA did something


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return samples.mean((1, 2, 3)) * float('nan')", "the reward 'mine' failed for the prompt '"),
        ("return samples.mean((2, 3))", "the reward 'mine' returned shape (8, 3) for 8 samples, the first of prompt '"),
    ],
)
def test_a_bad_reward_stops_with_its_name_and_the_prompt(body, message, tmp_path):
    (tmp_path / "mine.py").write_text(f"import condrl\n@condrl.reward\ndef mine(samples, prompts):\n    {body}\n")
    words = ["plugins=[mine.py]", "rewards.mine.weight=1", *SMALL, "evaluate.prompts=1"]
    done = run_python(FINETUNE, *words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_reward_of_an_installed_package(tmp_path):
    site = tmp_path / "site"
    (site / "bright_pack-1.0.dist-info").mkdir(parents=True)
    (site / "bright_pack.py").write_text(textwrap.dedent(REWARD.replace("redness", "glow")))
    (site / "bright_pack-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: bright-pack\nVersion: 1.0\n"
    )
    (site / "bright_pack-1.0.dist-info" / "entry_points.txt").write_text("[condrl.plugins]\nglow = bright_pack\n")
    words = [
        "rewards.glow.weight=1",
        "rewards.glow.channel=2",
        *SMALL,
        "train.epochs=1",
        "evaluate.prompts=1",
    ]
    words += ["run.trackers=[tensorboard]"]
    done = run_python(FINETUNE, *words, cwd=tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    assert "reward/glow" in (tmp_path / "runs/quickstart/metrics.jsonl").read_text()
    assert list((tmp_path / "runs/quickstart/condrl").glob("events.out.tfevents.*"))


def test_help_lists_the_config():
    done = run_python(FINETUNE, "--help", cwd=ROOT)
    assert done.returncode == 0
    assert "  lr: 0.0003  # AdamW learning rate" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to draw"),
        (["nowhere", "--prompt", "x"], "there is no run or LoRA nowhere"),
        (["--prompt", "x", "model.guidence=3"], "Did you mean 'guidance'"),
    ],
)
def test_sample_mistakes_are_one_line(words, message, tmp_path):
    done = run_python(SAMPLE, *words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
