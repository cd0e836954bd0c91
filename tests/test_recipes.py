"""The recipes and protocols in configs/sd15: what their first lines say is what they are, and they run."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, answering, load_script
from reward_files import save_reward_files

from condrl.commands import finetune
from condrl.io.records import from_json
from condrl.loading import load_config
from condrl.prompts import load_prompts
from condrl.training.build import make_trainer
from condrl.training.checks import check_combination
from condrl.training.clock import Clock

FOLDER = ROOT / "configs" / "sd15"
RECIPES = ["aesthetic", "clip", "pickscore", "hps", "image_reward", "compressibility", "vlm_judge"]
RUNS = [*((name,) for name in RECIPES), *((name, "ddpo") for name in RECIPES), ("protocol_drawbench",)]
ANIMALS = ("protocol_animals",)
COUNTED = [("compressibility",), ("vlm_judge",), ("hps", "ddpo"), ("protocol_drawbench",), ANIMALS]  # others are alike
RUN = [*((name,) for name in RECIPES), ("aesthetic", "ddpo"), ("vlm_judge", "ddpo"), ("protocol_drawbench",), ANIMALS]
GIVEN = {  # what a user has to say
    "vlm_judge": ["rewards.vlm_judge.url=http://127.0.0.1:1/v1", "rewards.vlm_judge.model=judge"],
    "protocol_animals": [],
}
PROMPTS = ["prompts.train=train.txt", "prompts.heldout=heldout.txt"]
FEW = ["train.prompts_per_epoch=2", "train.images_per_prompt=2", "train.rollout_batch=4", "train.loss_batch=64"]
PACE = 37_600 * (100 + 3 * 100 + 3) / (47 * 3600)  # calls a second: DDPO's images of 50 guided steps in 47 A100 hours
NETWORKS = {"clip": 1.7, "hps": 3.9, "pickscore": 3.9, "image_reward": 1.8}  # GB in float32; aesthetic's is clip's


def name_of(names):
    return "+".join(names)


def given(names):
    words = GIVEN.get(names[0], [])
    return words if names == ANIMALS else [*words, *PROMPTS]


def load(names, *words):
    return load_config([*(str(FOLDER / f"{name}.yaml") for name in names), *given(names), *words])


def stated(names):
    """The numbers in the first lines of the last file of a run."""
    text = (FOLDER / f"{names[-1]}.yaml").read_text("utf-8").partition("\n\n")[0].replace("\n# ", " ")
    number = r"([\d,.]+)"
    found = re.search(
        rf"An epoch: {number} images, {number} updates, {number} network calls \({number} to roll out, {number} for old .*?, "
        rf"{number} forward and backward\), {number} reward calls",
        text,
    )
    costs = re.search(rf"(?:{number}|the recipe's) GB; {number} epochs take {number} hours .*?, {number} at half", text)
    keys = ("images", "updates", "calls", "roll_out", "old", "learn", "rewards", "gb", "epochs", "hours", "half")
    values = [value and float(value.replace(",", "")) for value in (*found.groups(), *costs.groups())]
    return dict(zip(keys, values, strict=True))


def test_every_file_is_a_recipe_a_protocol_or_what_makes_it_ddpo():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*RECIPES, "ddpo", *ANIMALS, "protocol_drawbench"}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_differ_in_their_reward_alone(name):
    own, other = (yaml.safe_load((FOLDER / f"{stem}.yaml").read_text("utf-8")) for stem in (name, "compressibility"))
    ((reward, options),) = own.pop("rewards").items()
    other.pop("rewards")
    assert options["weight"] == 1
    assert own.pop("run") == {"name": f"sd15_{name}_${{algorithm.name}}"}
    other.pop("run")
    measures = own["evaluate"].pop("measures")
    assert other["evaluate"].pop("measures").keys() - {reward} == measures.keys()  # of what is not tuned on
    if name == "vlm_judge":
        assert own["algorithm"]["baseline"] == "group"
        own["algorithm"]["baseline"] = "value"
    else:
        numbers, others = stated((name,)), stated(("compressibility",))
        assert {**numbers, "gb": others["gb"]} == others
    assert own == other


@pytest.mark.parametrize("names", [*RUNS, ANIMALS], ids=name_of)
def test_they_pass_every_check_that_needs_no_weights(names):
    config = load(names)
    check_combination(config)
    assert config.algorithm["name"] == ("ddpo" if names[-1] in ("ddpo", *ANIMALS) else "nft")
    suffix = f"_{config.algorithm['name']}" if names[0] in RECIPES else ""
    assert config.run.name == f"sd15_{names[0]}{suffix}"
    assert config.model["gradient_checkpointing"]
    assert config.model["dtype"] == "bfloat16"


@pytest.mark.parametrize("names", [("hps",), ("hps", "ddpo")], ids=name_of)
def test_what_both_algorithms_of_a_recipe_have_in_common(names):
    """The model, the groups, the rate, and the sampler and prompts by which they are measured."""
    config, nft = load(names), load(("hps",))
    assert config.model == nft.model
    assert config.rewards == nft.rewards
    assert {**config.sampler, "eta": 0.0} == nft.sampler
    assert (config.evaluate.sampler or config.sampler) == nft.sampler
    changed = dataclasses.replace(nft.train, **{k: getattr(config.train, k) for k in ("same_start", "steps")})
    assert config.train == dataclasses.replace(changed, updates_per_epoch=config.train.updates_per_epoch)
    assert config.train.steps in (None, list(range(config.sampler["steps"] - 1)))


@pytest.mark.parametrize("names", [*RUNS, ANIMALS], ids=name_of)
def test_the_images_and_updates_that_a_recipe_states(names):
    config, said = load(names), stated(names)
    assert config.images_per_epoch == said["images"]
    assert config.train.updates_per_epoch * config.train.inner_epochs == said["updates"]
    assert config.train.epochs == said["epochs"]
    assert said["calls"] == said["roll_out"] + said["old"] + said["learn"]
    of_update = re.search(r"an update has (\d+) images", (FOLDER / f"{names[-1]}.yaml").read_text("utf-8"))
    assert not of_update or int(of_update[1]) == said["images"] / said["updates"]


@pytest.mark.parametrize("names", [*RUNS, ANIMALS], ids=name_of)
def test_the_hours_that_a_recipe_states_follow_from_its_calls(names):
    """A forward pass is 1, one with its backward pass 3, a decoded image 3; an image is decoded for each reward call."""
    said = stated(names)
    work = said["roll_out"] + said["old"] + 3 * said["learn"] + 3 * said["rewards"]
    hours = said["epochs"] * work / PACE / 3600
    assert said["hours"] == pytest.approx(hours, abs=0.06)
    assert said["half"] == 2 * said["hours"]


@pytest.mark.parametrize("names", [(name,) for name in (*RECIPES, *ANIMALS, "protocol_drawbench")], ids=name_of)
def test_the_memory_that_a_recipe_states_is_the_sum_of_its_parts(names):
    """docs/recipes.md says where these numbers come from."""
    config, said = load(names), stated(names)
    every = {**config.evaluate.measures, **config.rewards}
    network = {name: "clip" if name == "aesthetic" else name for name in every}
    kept, all_of_them = (
        sum(NETWORKS.get(n, 0.0) for n in {network[name] for name, options in every.items() if counts(options)})
        for counts in (lambda options: not options.get("offload"), lambda options: True)
    )
    learning = 1.9 + kept + 0.5 + 1.45 * config.train.loss_batch + 1
    measuring = 1.9 + all_of_them + 2.2 + 1
    assert said["gb"] == round(max(learning, measuring)) < 24


def test_the_page_has_the_same_numbers():
    page = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `sd15/([\w/ ]+)` \|.*?\| ([\d,. |]+) \|", page, re.MULTILINE))
    assert set(rows) == {*RECIPES, "aesthetic sd15/ddpo", *ANIMALS, "protocol_drawbench"}
    for words, row in rows.items():
        names = tuple(words.split(" sd15/"))
        said = stated(names)
        gb = said["gb"] or stated(names[:1])["gb"]
        cells = [float(cell.replace(",", "")) for cell in row.split("|")]
        assert cells == [*(said[key] for key in ("images", "calls")), gb, said["hours"], said["half"]], words


def test_the_animals_are_45():
    rows = load_prompts(load(ANIMALS).prompts.train, "prompts.train")
    assert len({row.prompt for row in rows}) == len(rows) == 45
    assert all(re.fullmatch("[a-z]+", row.prompt) for row in rows)


# ---------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prompt files."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "train.txt").write_text("a red star\na cat\ntwo dogs\n")
    (folder / "heldout.txt").write_text("a star\n")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Options that lead rewards to small random weights in the published formats."""
    return save_reward_files(tmp_path_factory.mktemp("rewards"))


@pytest.mark.slow
@pytest.mark.parametrize("names", COUNTED, ids=name_of)
def test_the_calls_that_a_recipe_states_are_what_an_epoch_takes(names, pipeline, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    (reward,) = load(names).rewards
    other = [f"rewards.{reward}=null", "rewards.brightness.weight=1", f"model.path={pipeline}", f"run.dir={tmp_path}"]
    config, said = load(names, *other, *FEW), stated(names)
    trainer = make_trainer(config, load_prompts(config.prompts.train, "prompts.train"))
    work, scored = load_script("image_table").Work(trainer), []
    (brightness,) = trainer.rewards

    def counted(samples, prompts):
        scored.extend(prompts)
        return brightness.call(samples, prompts)

    trainer.rewards = [dataclasses.replace(brightness, call=counted)]
    share = config.images_per_epoch / said["images"]
    experience = trainer.collect(0, Clock())
    assert work.calls == share * said["roll_out"]
    examples = trainer.examples(experience, 0)
    assert work.calls == work.units == share * (said["roll_out"] + said["old"])
    trainer.learner.update(examples, experience, 0)
    assert work.calls == share * said["calls"]
    assert work.units - work.calls == 2 * share * said["learn"]
    assert len(scored) == share * said["rewards"]


def tiny(options, where):
    """Words that lead a reward or measure to small weights."""
    return [f"{where}.{name}={value}" for name, value in options.items()]


def judged(body: bytes) -> bytes:
    """A judge's first word: yes by a probability that depends on the picture."""
    chance = 0.2 + 0.6 * (sum(body) % 97) / 97
    tokens = [{"token": "Yes", "logprob": 0.0}, {"token": "No", "logprob": -4 * chance}]
    return json.dumps({"choices": [{"logprobs": {"content": [{"top_logprobs": tokens}]}}]}).encode()


@pytest.mark.slow
@pytest.mark.parametrize("names", RUN, ids=name_of)
def test_an_epoch_of_each_on_a_small_pipeline(names, pipeline, folder, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    config = load(names)
    words = [f"model.path={pipeline}", f"run.dir={tmp_path / 'run'}", "train.epochs=1", "sampler.steps=3", *FEW]
    words += [word for name in config.rewards for word in tiny(files.get(name, {}), f"rewards.{name}")]
    words += [word for name in config.evaluate.measures for word in tiny(files[name], f"evaluate.measures.{name}")]
    if config.train.steps:
        words += ["train.steps=[0,1]"]
    if config.evaluate.sampler.get("steps") == 50:
        words += ["evaluate.sampler.steps=5"]
    with answering(judged) as (url, requests):
        judge = [f"rewards.vlm_judge.url={url}/v1"] if "vlm_judge" in config.rewards else []
        shipped = [f"sd15/{name}" for name in names]
        assert finetune.main([*shipped, *given(names), *words, *judge]) == 0, capsys.readouterr().err
    (line,) = [from_json(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    (reward,) = config.rewards
    assert line["images"] == 4
    assert line["updates"] == config.train.updates_per_epoch
    assert line[f"reward/{reward}_std"] > 0
    assert line["grad_norm"] > 0
    assert line["failed_scores"] == 0
    assert bool(requests) == ("vlm_judge" in config.rewards)
    result = from_json((tmp_path / "run" / "result.json").read_text("utf-8"))
    measured = {*config.rewards, *config.evaluate.measures} if config.prompts.heldout else set()
    assert set(result["heldout"]) == measured
    assert Path(tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").is_file()
