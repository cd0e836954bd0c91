"""Folders that strangers made: data never runs, nothing is written elsewhere, and what cannot be is one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import load_script, toy_words

from condrl.checkpoint import PLAIN, TENSORS, checkpoints, read_checkpoint, save_checkpoint
from condrl.config import load_config
from condrl.prompts import load_prompts
from condrl.run import make_trainer

# ---------------------------------------------------------------------------------------------- checkpoints

FEW = ["train.lr_decay=none", "evaluate.images_per_prompt=20", "run.checkpoint_seconds=0"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of runs with a checkpoint after their second epoch, by algorithm."""
    made = {}
    for name in ("ctrl", "ddpo"):
        made[name] = tmp_path_factory.mktemp(name)
        words = [*toy_words(name, made[name]), *FEW, "train.epochs=2"]
        assert load_script("finetune").main(words) == 0
    return made


def at(state, *keys):
    for key in keys:
        state = state[key]
    return state


def put(*keys, value):
    return lambda state: at(state, *keys[:-1]).__setitem__(keys[-1], value(at(state, *keys)) if callable(value) else value)


def drop(*keys):
    return lambda state: at(state, *keys[:-1]).pop(keys[-1])


def nan(tensor):
    return torch.full_like(tensor, torch.nan)


def broadcast(tensor):
    return tensor[:1].clone()


FIRST = ("optimizer", "state", 0)
WRONG = {
    "weights are missing": ("ddpo", drop("weights"), "see weights"),
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
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def resumed(name, folder, capsys, *words) -> tuple[int, str]:
    """The exit code and last words of the run that goes on in the folder, with an epoch more."""
    capsys.readouterr()
    code = load_script("finetune").main([*toy_words(name, folder), *FEW, "train.epochs=3", "run.resume=auto", *words])
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
    folder = tmp_path / "run"
    shutil.copytree(runs[name], folder)
    for older in checkpoints(folder / "checkpoints")[:-1]:
        shutil.rmtree(older)
    rewritten(folder, change)
    text = (folder / "config.yaml").read_text().replace(str(runs[name]), str(folder))
    (folder / "config.yaml").write_text(text)
    before = files_of(folder)
    code, said = resumed(name, folder, capsys)
    last = said.strip().splitlines()[-1]
    assert (code, last.startswith("error: ")) == (2, True), said
    assert __import__("re").search(message, last), last
    assert files_of(folder) == before
