"""On a GPU, where there is one: what every algorithm, option and command does there, beside a CPU where they must agree."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, run_python
from PIL import Image

from condrl.io.files import load_tensors

HAS_GPU = torch.version.cuda and shutil.which("nvidia-smi")  # torch itself is shown none: see conftest.py
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")]
ALSO = {"rwr": ["algorithm.rounds=1"]}  # what a recipe needs to be as short as the others
RECIPES = sorted(path.stem for path in (ROOT / "configs" / "shapes").glob("*.yaml"))
FEW = ["prompts.heldout=null", "prompts.validation=null", "evaluate.every=null", "train.epochs=1", "run.threads=1"]
FEW += ["train.prompts_per_epoch=2", "train.images_per_prompt=8", "train.updates_per_epoch=2", "train.warmup=0"]
EXACTLY = ["train.rollout_dtype=null"]
FINETUNE = str(ROOT / "scripts" / "finetune.py")


def condrl(*words: str, gpu: bool = True) -> str:
    """What a command prints, run on the GPU, in whole float32, or on the CPU."""
    where = os.environ["GPU_OF_TESTS"] if gpu else ""
    done = run_python(*words, cwd=ROOT, CUDA_VISIBLE_DEVICES=where, NVIDIA_TF32_OVERRIDE="0", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def tune(folder: Path, recipe: str, *more: str, gpu: bool = True) -> list[dict]:
    """The record of a short run."""
    condrl(FINETUNE, recipe, *FEW, f"run.dir={folder}", *more, gpu=gpu)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert json.loads((folder / "result.json").read_text())["hardware"].startswith("NVIDIA") == gpu
    return rows


def lora(folder: Path) -> dict:
    return load_tensors(folder / "lora" / "pytorch_lora_weights.safetensors", "LoRA")


@pytest.mark.parametrize("name", RECIPES)
def test_an_epoch_is_that_of_a_cpu(name, tmp_path):
    """The same images, rewards and gradient, but for the order in which each sums."""
    also = ALSO.get(name, [])
    (there,), (here,) = (tune(tmp_path / str(gpu), f"shapes/{name}", *EXACTLY, *also, gpu=gpu) for gpu in (True, False))
    assert there.keys() == here.keys()
    for key in ("reward/total", "reward/total_std", "loss", "grad_norm", "network_calls", "flat_groups"):
        assert there.get(key) == pytest.approx(here.get(key), rel=1e-2, abs=1e-4), key


@pytest.mark.parametrize(
    ("dtype", "name"), itertools.product(("bfloat16", "float16"), ("ddpo", "grpo", "nft", "draft", "adjoint_matching"))
)
def test_half_precision(dtype, name, tmp_path):
    (row,) = tune(tmp_path / "run", f"shapes/{name}", f"model.dtype={dtype}", "train.rollout_dtype=null")
    assert row["grad_norm"] > 0
    assert not row["skipped_updates"]


OPTIONS = {
    "auto": ["train.rollout_dtype=auto", "model.memory_format=auto"],
    "checkpointing": ["model.gradient_checkpointing=true"],
    "offload": ["model.offload_vae=true", "model.release_encoders=true"],
    "compile": ["model.compile=true"],
    "flash": ["model.attention=_native_flash", "model.dtype=bfloat16", "train.rollout_dtype=null"],
    "cudnn": ["model.attention=_native_cudnn", "model.dtype=bfloat16", "train.rollout_dtype=null"],
    "int8": ["model.quantize=int8", "model.gradient_checkpointing=true", "train.rollout_dtype=null"],
    "nf4": ["model.quantize=nf4", "train.rollout_dtype=null"],
    "adamw8bit": ["train.optimizer=adamw8bit"],
    "guidance": ["model.guidance=3"],
}
PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes", "adamw8bit": "bitsandbytes"}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option(name, tmp_path):
    if name in PACKAGES and not importlib.util.find_spec(PACKAGES[name]):
        pytest.skip(f"needs {PACKAGES[name]}")
    for recipe in ("ddpo", "nft"):
        (row,) = tune(tmp_path / recipe, f"shapes/{recipe}", *OPTIONS[name])
        assert row["grad_norm"] > 0


def test_a_run_resumes(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    long = [*EXACTLY, "train.epochs=2", "train.lr_decay=none"]
    expected = tune(whole, "shapes/ddpo", *long)
    tune(parts, "shapes/ddpo", *long, "train.epochs=1")
    found = tune(parts, "shapes/ddpo", *long, "run.resume=auto")
    assert [row["reward/total"] for row in found] == pytest.approx([row["reward/total"] for row in expected], rel=1e-2)
    for key, weight in lora(whole).items():
        assert (weight - lora(parts)[key]).norm() <= 1e-2 * weight.norm()


def test_one_process_of_fsdp(tmp_path):
    file = str(ROOT / "configs" / "accelerate" / "fsdp.yaml")
    launch = ["-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", "1", FINETUNE]
    few = [
        *FEW,
        "model.dtype=bfloat16",
        "train.rollout_dtype=null",
        "train.max_failed=0",
        f"run.dir={tmp_path / 'run'}",
    ]
    condrl(*launch, "shapes/nft", *few)
    assert all(weight.isfinite().all() for weight in lora(tmp_path / "run").values())


def test_commands_draw_and_measure_as_on_a_cpu(tmp_path):
    run = tmp_path / "run"
    tune(run, "shapes/nft", *EXACTLY, "train.epochs=3", "train.lr=2e-3")
    pictures, measured = [], []
    for gpu in (True, False):
        out = tmp_path / str(gpu)
        drawn = ["--seeds", "3", "4", "--folder", str(out / "images"), "--out", str(out / "page.png")]
        condrl("-m", "condrl", "sample", str(run), "--prompt", "a red star", *drawn, gpu=gpu)
        pictures.append([np.asarray(Image.open(path), int) for path in sorted((out / "images").rglob("*.png"))])
        prompts = ["--prompts", "asset:shapes/validation.txt", "evaluate.prompts=16", "--out", str(out / "evaluation")]
        condrl("-m", "condrl", "evaluate", str(run), *prompts, gpu=gpu)
        lines = (out / "evaluation" / "evaluation.jsonl").read_text().splitlines()
        measured.append([json.loads(line)["tuned"]["shapes"] for line in lines])
    assert len(pictures[0]) == len(pictures[1]) == 2
    assert max(np.abs(a - b).max() for a, b in zip(*pictures, strict=True)) <= 2
    assert measured[0] == pytest.approx(measured[1], abs=0.02)


@pytest.mark.parametrize("steering", ["best_of_n,n=2", "smc,particles=2", "guidance,kappa=0.3"])
def test_steering(steering, tmp_path):
    drawn = ["--prompt", "a red star", "--steer", steering, "--out", str(tmp_path / "page.png")]
    condrl("-m", "condrl", "sample", *drawn, "rewards.clip.weight=1", "rewards.clip.model=asset:shapes_clip")
    assert (tmp_path / "page.png").exists()
