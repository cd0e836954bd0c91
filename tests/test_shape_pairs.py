"""Pairs of scenes drawn by rule, and the recipe that learns from them."""

import json
import random

import numpy as np
import pytest
import yaml
from helpers import ROOT, load_script
from PIL import Image

from condrl.commands import finetune
from condrl.shapes import scenes

PROMPTS = [
    "a red star",
    "two large blue circles and a small green square",
    "a small red star left of a blue square",
    "a yellow circle, a black star and a cyan triangle",
]
RECIPE = ROOT / "configs" / "pairs" / "shapes.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten pairs of each prompt."""
    folder = tmp_path_factory.mktemp("pairs")
    load_script("shape_pairs").write(folder, "train", PROMPTS, 10, 0)
    return folder


def lines(folder):
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def graded(folder, line, side):
    image = np.asarray(Image.open(folder / line[side])).transpose(2, 0, 1) / np.float32(255)
    return scenes.grade(image[None], [line["prompt"]])[0]


def test_one_obeys_and_the_other_does_not(folder):
    found = lines(folder)
    assert {line["version"] for line in found} == {1}
    assert [line["prompt"] for line in found] == [prompt for prompt in PROMPTS for _ in range(10)]
    assert len({path for line in found for path in (line["better"], line["worse"])}) == 80
    for line in found:
        assert graded(folder, line, "better") == 1 > graded(folder, line, "worse")


def test_every_fault_occurs_and_is_what_it_is_called(folder):
    assert {line["fault"] for line in lines(folder)} == set(load_script("shape_pairs").FAULTS)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_fault_is_a_single_one(prompt):
    script, request = load_script("shape_pairs"), scenes.parse(prompt)
    for seed in range(20):
        rng = random.Random(seed)
        better = script.obeying(request, rng)
        worse, fault = script.faulty(better, request, rng)
        if fault == "too few":
            assert len(worse) == len(better) - 1
            assert set(worse) < set(better)
        elif fault == "too many":
            assert worse[:-1] == better
        elif fault == "places":
            kinds = [[(thing.shape, thing.color, thing.size) for thing in scene] for scene in (better, worse)]
            assert kinds[0] == kinds[1]
        else:
            ((before, after),) = [pair for pair in zip(better, worse, strict=True) if pair[0] != pair[1]]
            field = {"colour": "color", "shape": "shape", "size": "diameter"}[fault]
            assert {k for k, v in vars(before).items() if vars(after)[k] != v} == {field}


def test_pairs_are_those_of_their_seed(folder, tmp_path):
    script = load_script("shape_pairs")
    script.write(tmp_path / "again", "train", PROMPTS, 10, 0)
    script.write(tmp_path / "other", "train", PROMPTS[:1], 2, 1)
    assert lines(tmp_path / "again") == lines(folder)
    first = lines(folder)[0]["better"]
    assert (tmp_path / "again" / first).read_bytes() == (folder / first).read_bytes()
    assert (tmp_path / "other" / first).read_bytes() != (folder / first).read_bytes()


def test_pairs_that_are_there_are_not_replaced(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["shape_pairs.py", "--out", str(folder)])
    before = (folder / "train.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        load_script("shape_pairs").main()
    assert f"{folder} exists: remove it, or choose another folder with --out" in capsys.readouterr().err
    assert (folder / "train.jsonl").read_bytes() == before


def test_the_recipe_differs_from_the_quickstart_in_how_it_learns_alone():
    own, quick = (yaml.safe_load(path.read_text()) for path in (RECIPE, ROOT / "configs" / "quickstart.yaml"))
    assert own["model"] == quick["model"]
    assert own["sampler"] == quick["sampler"]
    assert own["evaluate"]["measures"] == {"shapes_exact": {}, "shapes": {}}
    assert own["prompts"]["heldout"] == quick["prompts"]["heldout"]


@pytest.mark.slow
def test_the_recipe_learns_to_tell_the_pairs_apart(folder, tmp_path):
    given = [f"prompts.train={folder}/train.jsonl", f"prompts.validation={folder}/train.jsonl", "evaluate.prompts=8"]
    few = ["train.epochs=4", "train.prompts_per_epoch=40", "train.warmup=0", "train.loss_batch=40", "evaluate.every=4"]
    assert finetune.main([str(RECIPE), *given, *few, f"run.dir={tmp_path}/run"]) == 0
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["validation/implicit_accuracy"] > 0.6
