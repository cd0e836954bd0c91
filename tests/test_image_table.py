"""The recipes in configs/shapes, and what the table of images makes of their runs."""

import json
import re
from argparse import Namespace

import pytest
import torch
import yaml
from helpers import ROOT, load_script

from condrl import registry
from condrl.loading import load_config
from condrl.prompts import load_prompts
from condrl.training.build import make_trainer

RECIPES, FLOW_RECIPES = (sorted((ROOT / "configs" / folder).glob("*.yaml")) for folder in ("shapes", "shapes_flow"))
FEW = ["train.prompts_per_epoch=2", "train.images_per_prompt=2", "train.rollout_batch=4", "train.updates_per_epoch=1"]


def test_there_is_a_recipe_for_each_algorithm_of_images():
    found = {yaml.safe_load(file.read_text())["algorithm"]["name"] for file in RECIPES}
    shipped = {plugin.name for plugin in registry.algorithm.all() if "condrl" in plugin.target.__module__}
    without = {"diffusion_dpo", "q_learning"}  # which need pairs of images, and points
    assert found == shipped - without


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_differ_from_the_quickstart_in_how_they_learn_alone(file):
    own, quick = (yaml.safe_load(path.read_text()) for path in (file, ROOT / "configs" / "quickstart.yaml"))
    assert own["model"] == quick["model"]
    assert own["sampler"] == quick["sampler"]
    assert own["evaluate"]["measures"] == {"shapes_exact": {}, "shapes": {}}
    assert own["prompts"] == quick["prompts"] | {"validation": "asset:shapes/validation.txt"}
    assert set(own["rewards"]) in (set(quick["rewards"]), {"clip"})
    assert own["run"]["name"] == f"shapes_{file.stem}"
    load_config([str(file)])


@pytest.mark.parametrize("file", FLOW_RECIPES, ids=lambda file: file.stem)
def test_recipes_of_the_flow_differ_in_how_they_learn_alone(file):
    """All are deployed by the ODE of 10 steps."""
    own, nft = (yaml.safe_load(path.read_text()) for path in (file, file.with_stem("nft")))
    for section in ("model", "prompts"):
        assert own[section] == nft[section]
    assert own["evaluate"]["measures"] == nft["evaluate"]["measures"]
    assert own["evaluate"].get("sampler", own["sampler"]) == nft["sampler"] == {"name": "ddim", "steps": 10, "eta": 0.0}
    assert set(own["rewards"]) in (set(nft["rewards"]), {"clip"})
    assert own["run"]["name"] == f"shapes_flow_{file.stem}"
    load_config([str(file)])


def stated(file):
    """Units of network work an image, by a recipe's second line."""
    return int(re.search(r"(\d+) units of network work an image", file.read_text())[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "file",
    [file for file in (*RECIPES, *FLOW_RECIPES) if file.stem != "alignprop"],
    ids=lambda file: f"{file.parent.name}-{file.stem}",
)
def test_the_work_that_a_recipe_states_is_what_it_takes(file, tmp_path):
    table = load_script("image_table")
    pairs = ["algorithm.contest=2"] if "contest:" in file.read_text() else []
    config = load_config([str(file), *FEW, *pairs, f"run.dir={tmp_path}"])
    work = table.work_of_an_epoch(config)
    assert work.units == 4 * stated(file)
    assert 4 * 10 < work.calls < work.units


@pytest.mark.slow
def test_alignprop_takes_the_work_that_it_states_on_average(tmp_path):
    """A roll-out of ten steps, and one to three of them with a backward pass, as many as each image has drawn."""
    (file,) = (file for file in RECIPES if file.stem == "alignprop")
    table, config = load_script("image_table"), load_config([str(file), *FEW, f"run.dir={tmp_path}"])
    trainer = make_trainer(config, load_prompts(config.prompts.train, "prompts.train"))
    first = trainer.algorithm.first_steps(trainer.policy, 4, trainer.noise(0, "examples", range(4)))
    assert len(set(first.tolist())) > 1
    assert table.work_of_an_epoch(config).units == (10 + 3 * (10 - first)).sum()
    drawn = trainer.algorithm.first_steps(trainer.policy, 6000, trainer.noise(0, "examples", range(6000)))
    assert (10 + 3 * (10 - drawn).float()).mean().item() == pytest.approx(stated(file), abs=0.1)


def test_a_gradients_signal_to_noise():
    """|mu|^2 / d of mu + a standard normal in d dimensions."""
    table, generator = load_script("image_table"), torch.Generator().manual_seed(0)
    noise = torch.randn(60, 400, generator=generator, dtype=torch.float64)
    for size in (0.0, 0.5):
        ratio, error = table.ratio_of(noise + size)
        assert ratio == pytest.approx(size**2, abs=4 * error)
        assert 0 < error < 0.05


def test_what_a_gain_cost():
    table = load_script("image_table")
    lines = [{"epoch": e, "images": 10 * e, "validation/shapes_exact": 0.5 + 0.03 * e} for e in (2, 4)]
    lines.insert(1, {"epoch": 3, "images": 30})
    curve = table.learning_curve(lines, {"validation/shapes_exact": 0.5}, 7)
    assert curve == [
        {"images": 20, "work": 14, "gain": pytest.approx(0.06)},
        {"images": 40, "work": 28, "gain": pytest.approx(0.12)},
    ]
    assert table.cost(curve, 0.05) == {"images": 20, "work": 14}
    assert table.cost(curve, 0.1) == {"images": 40, "work": 28}
    assert table.cost(curve, 0.2) is None


def test_what_is_obeyed_by_kind_of_prompt(tmp_path):
    """The mean over prompts of their images' means."""
    found = [
        ("a red star", 1, 1),
        ("a red star", 0, 1),
        ("a red star and a blue circle", 0, 1),
        ("a red star and a blue square", 0, 0),
        ("a red star left of a blue square", 1, 0),
    ]
    lines = [
        {"prompt": prompt, "base": {"shapes_exact": base}, "tuned": {"shapes_exact": tuned}}
        for prompt, base, tuned in found
    ]
    (tmp_path / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kinds = load_script("image_table").by_kind(tmp_path / "evaluation.jsonl")
    shares = {kind: (row["prompts"], row["base"], row["tuned"]) for kind, row in kinds.items()}
    assert shares == {"1 object": (1, 0.5, 1.0), "2 objects": (2, 0.0, 0.5), "relation": (1, 1.0, 0.0)}
    assert kinds["2 objects"]["difference"]["mean"] == 0.5


@pytest.mark.slow
def test_the_table_of_a_small_run(tmp_path, capsys, monkeypatch):
    """Runs are kept: started again, the benchmark tunes nothing anew."""
    words = [*FEW, "train.epochs=2", "train.warmup=0", "evaluate.every=1", "evaluate.prompts=3"]
    command = ["", "images", "--recipes", "nft", "--folder", str(tmp_path / "runs"), "--json", str(tmp_path / "t.json")]
    monkeypatch.setattr("sys.argv", [*command, *words])
    benchmark = load_script("benchmark")
    benchmark.main()
    (row,) = json.loads((tmp_path / "t.json").read_text())
    (seed,) = row["seeds"]
    assert row["recipe"] == row["algorithm"] == "nft"
    assert (seed["images"], seed["work"], len(seed["curve"])) == (8, 160, 2)
    assert seed["shapes_exact"]["difference"]["mean"] == pytest.approx(row["gain"])
    assert {"path_kl", "diversity", "seconds", "peak_memory_gb", "kinds", "cost"} < set(seed)
    first = (tmp_path / "runs" / "nft_0" / "result.json").stat().st_mtime_ns
    (tmp_path / "t.json").unlink()
    benchmark.main()
    assert (tmp_path / "runs" / "nft_0" / "result.json").stat().st_mtime_ns == first
    assert json.loads((tmp_path / "t.json").read_text()) == [row]


@pytest.mark.parametrize("configs", ["shapes", "shapes_flow"])
def test_the_tables_of_the_documentation_are_what_was_measured(configs):
    table = load_script("image_table")
    record = {"shapes": "images.json", "shapes_flow": "images_flow.json"}[configs]
    rows = table.read(ROOT / "docs" / "results" / record)
    assert len(rows) > 5
    assert table.markdown(rows) in (ROOT / "docs" / "measured.md").read_text("utf-8")


def test_seeds_in_the_file_are_neither_run_again_nor_lost(tmp_path, monkeypatch):
    table, path = load_script("image_table"), ROOT / "docs" / "results" / "images_flow.json"
    known = {row["recipe"]: row for row in table.read(path)}
    count, asked = len(known["nft"]["seeds"]), []
    monkeypatch.setattr(table, "tune", lambda folder, recipe, seed, words: asked.append((recipe.stem, seed)))
    monkeypatch.setattr(table, "seed_row", lambda run, work: known["nft"]["seeds"][0])
    args = Namespace(
        json=path, configs="shapes_flow", recipes=["nft"], seeds=count + 1, folder=tmp_path, words=FEW, jobs=1
    )
    rows = {row["recipe"]: row for row in table.images(None, args)}
    assert asked == [("nft", count)]
    assert rows.keys() == known.keys()
    assert rows["nft"]["seeds"][:-1] == known["nft"]["seeds"]
    assert all(rows[name] == known[name] for name in known if name != "nft")
