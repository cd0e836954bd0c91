"""Small models with random weights, in the formats that users have."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from condrl import registry
from condrl.loading import load_config
from condrl.prompts import load_prompts
from condrl.shapes.networks import make_text_encoder, make_tokenizer
from condrl.training.build import make_trainer
from condrl.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
RESEARCH = ROOT / "scripts" / "research"
DATA = ROOT.parent / "shared" / "data"  # test data that is not ours to give


def load_script(name: str) -> Any:
    """A file of scripts/research as a module; it may import the others there."""
    spec = importlib.util.spec_from_file_location(name, RESEARCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with mock.patch.object(sys, "path", [str(RESEARCH), *sys.path]):
        spec.loader.exec_module(module)
    return module


ORDINARY = {"ACCELERATE_USE_CPU", "OMP_NUM_THREADS"}  # what no library reads while it is imported, or has read alike


def run_python(*words: str, cwd: Path, fresh: bool = False, **env: str) -> subprocess.CompletedProcess:
    """A script, `-m module` or `-c code` in a process of its own.

    Scripts and condrl's own commands are forked from one that has imported the libraries, unless `fresh`.
    """
    whole, is_ours = {**os.environ, **env}, words[0].endswith(".py") or words[:2] == ("-m", "condrl")
    if is_ours and not fresh and env.keys() <= ORDINARY and hasattr(os, "fork"):
        return warm_python()(words, cwd, whole)
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=whole, timeout=300)


class WarmPython:
    """tests/warm_python.py, and the commands that are forked from it."""

    def __init__(self) -> None:
        here, pipe = Path(__file__).with_name("warm_python.py"), subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, str(here)], stdin=pipe, stdout=pipe, text=True)
        atexit.register(self.process.kill)

    def __call__(self, words: Sequence[str], cwd: Path, env: Mapping[str, str]) -> subprocess.CompletedProcess:
        with tempfile.TemporaryDirectory() as folder:
            paths = {name: Path(folder) / name for name in ("out", "err")}
            for path in paths.values():
                path.touch()
            names = {name: str(path) for name, path in paths.items()}
            request = {"words": words, "cwd": str(cwd), "env": dict(env), **names}
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            code = int(self.process.stdout.readline())
            return subprocess.CompletedProcess(words, code, *(path.read_text() for path in paths.values()))


@functools.cache
def warm_python() -> WarmPython:
    return WarmPython()


def tiny_pipeline(folder: Path, prediction: str = "epsilon", seed: int = 0) -> Path:
    """A Stable Diffusion pipeline of a few thousand random weights, saved as diffusers saves SD 1.5."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(seed)
    tokenizer = make_tokenizer(folder / "words")
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=96,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
        prediction_type=prediction,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder / "pipe")
    return folder / "pipe"


ALGORITHMS = [plugin.name for plugin in registry.algorithm.all() if "condrl" in plugin.target.__module__]
PAIRS = ["train.prompts_per_epoch=16", "train.images_per_prompt=1", "algorithm.draws=2"]
OPTIONS = {
    "adjoint_matching": ["algorithm.kappa=0.5"],
    "ctrl": ["algorithm.kappa=0.5"],
    "ddpo": ["algorithm.advantage=prompt", "algorithm.tracker_least=2"],
    "diffusion_dpo": [f"prompts.train={ROOT}/tests/p1_pairs.jsonl", "rewards.quadratic=null", *PAIRS],
    "q_learning": ["algorithm.score=pretrained"],
}


def toy_words(name: str, folder: Path) -> list[str]:
    """A short run of an algorithm on the toy with four prompts, with options that leave little of it out."""
    file = str(ROOT / "configs" / "toy" / "p1.yaml")
    few = ["train.epochs=6", "train.images_per_prompt=8", "train.rollout_batch=16", "train.prompts_per_epoch=2"]
    few += ["evaluate.images_per_prompt=8"]
    return [file, f"algorithm.name={name}", f"run.dir={folder}", *few, "sampler.steps=5", *OPTIONS.get(name, [])]


def toy_trainer(name: str, folder: Path, *more: str) -> Trainer:
    """What tunes by those words, and more, in its folder."""
    config = load_config([*toy_words(name, folder), *more])
    folder.mkdir(exist_ok=True)
    torch.manual_seed(config.run.seed)
    return make_trainer(config, load_prompts(config.prompts.train, "prompts.train"))


@dataclass(frozen=True)
class Request:
    """What a server was asked."""

    path: str
    headers: Mapping[str, str]
    body: bytes


@contextmanager
def answering(answer: bytes | Callable[[bytes], bytes], status: int = 200) -> Iterator[tuple[str, list[Request]]]:
    """A server on this machine that answers what is posted; yields its address and the requests that it had."""
    requests: list[Request] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            requests.append(Request(self.path, self.headers, body))
            content = answer(body) if callable(answer) else answer
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
