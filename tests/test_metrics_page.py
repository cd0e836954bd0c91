"""docs/metrics.md against what runs write: no key is left out, and none is made up."""

import json
import re

import pytest
import yaml
from helpers import ALGORITHMS, ROOT, toy_words

from condrl.commands import evaluate, finetune
from condrl.io.files import locate

PAGE = (ROOT / "docs" / "metrics.md").read_text("utf-8")
FILES = ("base.json", "metrics.jsonl", "timings.jsonl", "heldout.jsonl", "result.json")
WATCHED = "evaluations/epoch_<k>.jsonl"
EVALUATION = ("evaluation/evaluation.jsonl", "evaluation/evaluation.json")
PAIRED = ["configs/paper/swiss_roll_paired.yaml", "train.epochs=1", "evaluate.images_per_prompt=2"]
MORE = {  # options that leave little out
    "dpok": ["train.kl_budget=100", "train.over_budget=adapt"],
    "draft": ["algorithm.kappa=0.1"],
    "grpo": ["algorithm.kappa=0.1", "train.window=2"],
    "nft": ["algorithm.kappa=0.5", "algorithm.baseline=value"],
}


def documented(name):
    """The keys of a file's table, as patterns."""
    section = PAGE.split(f"\n## {name}\n")[1].split("\n## ")[0]
    keys = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert len(keys) == len(set(keys))
    return {key: re.compile(re.sub(r"<\w+>", r"\\w+?", re.escape(key))) for key in keys}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """By file, the keys that runs of all algorithms write."""
    folder, found = tmp_path_factory.mktemp("runs"), {name: set() for name in (*FILES, WATCHED, *EVALUATION)}
    runs = {name: [*toy_words(name, folder / name), "train.epochs=2", *MORE.get(name, [])] for name in ALGORITHMS}
    others = folder / "validation.jsonl"  # the same file is refused
    others.write_text("\n".join(locate("asset:toy/p1.jsonl").read_text().splitlines()[::-1]))
    runs["nft"].append(f"prompts.validation={others}")
    runs["paired"] = [str(ROOT / PAIRED[0]), *PAIRED[1:], f"run.dir={folder / 'paired'}"]
    for name, words in runs.items():
        assert finetune.main([*words, "evaluate.every=1", "evaluate.images_per_prompt=2"]) == 0
        keep_keys(folder / name, FILES, found)
        for file in (folder / name).glob("evaluations/*"):
            found[WATCHED] |= set(json.loads(file.read_text().splitlines()[0]))
    for steer in ([], ["--steer", "smc"]):
        assert evaluate.main([str(folder / "dpok"), *steer, "--overwrite"]) == 0
        keep_keys(folder / "dpok", EVALUATION, found)
    return found


def keep_keys(folder, files, found):
    for file in files:
        text = (folder / file).read_text() if (folder / file).exists() else ""
        for part in [text] if file.endswith(".json") and text else text.splitlines():
            found[file] |= set(json.loads(part))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FILES, WATCHED, *EVALUATION])
def test_every_key_that_a_run_writes_is_on_the_page_and_no_other(name, written):
    known = documented(name)
    strange = {key for key in written[name] if not any(pattern.fullmatch(key) for pattern in known.values())}
    assert strange == set()
    never = {key for key, pattern in known.items() if not any(pattern.fullmatch(k) for k in written[name])}
    assert never == set()


def test_pitfalls_name_every_diagnosis_and_keys_that_there_are():
    from condrl.training.diagnose import CHECKS, TRENDS

    page = (ROOT / "docs" / "pitfalls.md").read_text("utf-8")
    assert set(re.findall(r"\[`(\w+)`\]", page)) == {check.__name__ for check in (*CHECKS, *TRENDS)}
    known = documented("metrics.jsonl")
    named = [
        cell
        for row in page.splitlines()
        if row.startswith("| ")
        for cell in re.findall(r"`([\w/<>]+)`", row.split(" | ")[-1])
    ]
    keys = {key for key in named if not key.endswith("/") and "." not in key}
    assert len(keys) > 10
    assert keys <= set(known)


def test_the_settings_that_migration_names_exist():
    """Ours are in the second column, or are options of ddpo, the samplers and models."""
    from condrl.config import GridConfig, config_help
    from condrl.registry import REGISTRIES, type_hints

    page = (ROOT / "docs" / "migration.md").read_text("utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][2:]
    named = {key.partition("=")[0] for row in rows for key in re.findall(r"`([a-z_]+\.[\w]+)", row[1])}
    assert len(named) > 25
    tree, of = yaml.safe_load(config_help()), {"algorithm": "ddpo", "sampler": "ddim", "model": "stable_diffusion"}
    for key in named:
        kind, _, option = key.partition(".")
        if kind == "rewards":
            assert REGISTRIES["reward"].find(option)
            continue
        common = type_hints(GridConfig) if kind == "sampler" else {}
        options = {**REGISTRIES[kind].find(of[kind]).options, **common} if kind in of else tree[kind]
        assert option in options, key
