"""Every command and every snippet of README and docs, run as a reader would."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import ROOT, load_script, run_python
from PIL import Image

import condrl
from condrl.commands import benchmark, export, finetune
from condrl.io.overrides import is_setting
from condrl.loading import load_config
from condrl.training.published import published

pytestmark = pytest.mark.slow

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = r"(?:accelerate launch|python|scripts/|condrl \w+ )"
DOORS = {"serve": "reward_server"}  # the script of a command of condrl, where it has another name
SHORT = [
    "train.epochs=1", "train.prompts_per_epoch=2", "train.images_per_prompt=4", "train.rollout_batch=8",
    "train.updates_per_epoch=2", "evaluate.prompts=2", "evaluate.pictures=1",
]  # fmt: skip
FAR = (
    "sd15",
    "flux",
    "remote",
    "vlm_judge",
    "multi_gpu",
    "many.txt",
    "pairs/",
)  # they need more than a test has: checked only


def documented() -> list[list[str]]:
    """The indented commands of all pages, as words, without their comments."""
    found = []
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL).replace("\\\n", " ")
        lines = re.findall(rf"^ {{4,}}({COMMAND}.*)$", text, re.MULTILINE)
        lines += re.findall(rf"`({COMMAND}[^`]*)`", text)
        found += [through_script(shlex.split(line, comments=True)) for line in lines]
    return found


def through_script(words: list[str]) -> list[str]:
    """A command of condrl as the one that runs its script: they are doors to the same code."""
    if words[0] != "condrl":
        return words
    return ["python", f"scripts/{DOORS.get(words[1], words[1])}.py", *words[2:]]


def snippets() -> list[str]:
    return [code for page in PAGES for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]


def of_script(name: str) -> list[list[str]]:
    """The words that follow a script's name in the commands that run it."""
    found = [words[words.index(name) + 1 :] for words in documented() if name in words]
    return [words for i, words in enumerate(found) if words not in found[:i]]


def reward_snippet() -> str:
    return next(code for code in snippets() if "def redness" in code)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder in which a reader stands: the repository's, a reward of the README, prompts, a short run of the quickstart."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("condrl", "configs", "scripts", "docs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "my_reward.py").write_text(reward_snippet())
    for name in ("my_prompts.txt", "my_other_prompts.txt"):
        (folder / name).write_text("a red star\n")
    (folder / "my.yaml").write_text("rewards: {shapes: {}}\nprompts: {train: my_prompts.txt}\n")
    done = run_python("scripts/finetune.py", "train.lr=0.01", *SHORT, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("words", of_script("scripts/finetune.py"), ids=" ".join)
def test_a_finetune_command_is_a_run(words, checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    words = [word for word in words if word not in ("run.resume=auto", "...")]
    if "--help" in words or any(far in word for word in words for far in FAR):
        load_config([word for word in words if not word.startswith("--")], default=Path("configs/quickstart.yaml"))
        return
    few = SHORT if all(map(is_setting, words)) or "my.yaml" in words else []
    code = finetune.main([*words, *few, "--dry-run"])
    assert code == 0, capsys.readouterr().err


@pytest.mark.parametrize("words", of_script("scripts/sample.py"), ids=" ".join)
def test_a_sample_command_draws(words, checkout):
    done = run_python("scripts/sample.py", *words, cwd=checkout)
    assert done.returncode == 0, done.stderr
    (path,) = re.findall(r"wrote (.*)", done.stdout)
    assert Image.open(checkout / path).width > 190


@pytest.mark.parametrize("words", of_script("scripts/export.py"), ids=" ".join)
def test_an_export_command_writes(words, checkout, monkeypatch):
    """But for what it pushes, which tests/commands/test_export.py does."""
    monkeypatch.chdir(checkout)
    args = export.parse(words)
    args.push = None
    export.export(args)
    shutil.rmtree(checkout / "runs" / "quickstart" / "export" / args.to)


def test_commands_name_scripts_and_files_that_exist(checkout):
    for words in documented():
        for word in words:
            if re.fullmatch(r"(scripts|configs|docs|tests)/[\w./-]+", word):
                assert (ROOT / word).exists(), words


@pytest.mark.parametrize(
    "script",
    sorted(path.name for path in (ROOT / "scripts").glob("*.py") if "__main__" in path.read_text()),
)
def test_every_script_has_help(script, tmp_path):
    done = run_python(str(ROOT / "scripts" / script), "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    name = Path(script).stem
    command = next((command for command, door in DOORS.items() if door == name), name)
    assert re.search(rf"^    condrl {command}\b", done.stdout, re.MULTILINE)  # what it is a door to, with an example


def test_benchmark_commands_are_accepted():
    """Their words are parsed by the script's own parser; what they measure takes too long here."""
    for words in of_script("scripts/research/benchmark.py"):
        load_script("benchmark").parse(words)
    for words in of_script("scripts/benchmark.py"):
        assert benchmark.parse(words).words[0] in (benchmark.SHAPES, *published())


def test_the_plugins_command_lists_the_readers_own(checkout):
    done = run_python("scripts/plugins.py", "my_reward.py", "redness", cwd=checkout)
    assert done.returncode == 0, done.stderr
    assert "reward redness" in done.stdout


def test_the_diffusers_snippet_draws_what_sample_draws(checkout):
    """With nothing of condrl's, from the snippet exactly as the README has it."""
    code = next(code for code in snippets() if "load_lora_weights" in code)
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = next(words for words in of_script("scripts/sample.py") if "a red star left of a blue square" in words)
    words = [word for word in words if word != "--compare"]
    drawn = run_python("scripts/sample.py", *words, "--folder", "drawn", "--out", "drawn/sheet.png", cwd=checkout)
    assert drawn.returncode == 0, drawn.stderr
    theirs, ours = (np.asarray(Image.open(checkout / name), float) for name in ("star.png", "drawn/0000.png"))
    assert np.abs(theirs - ours).max() <= 1


@pytest.mark.parametrize("code", [c for c in snippets() if "load_lora_weights" not in c], ids=lambda code: code[:40])
def test_every_other_snippet_runs(code, checkout, tmp_path):
    (tmp_path / "snippet.py").write_text(code)
    shutil.copy(checkout / "my_reward.py", tmp_path)
    done = run_python("snippet.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_every_test_that_the_pages_name_exists():
    code = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    for page in PAGES:
        for name in re.findall(r"`(test_\w+)`", page.read_text()):
            assert f"def {name}(" in code, f"{page.name}: {name}"
        for name in re.findall(r"`(tests/[\w/]+\.py)`", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_the_pages_link_to_what_is_there():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (cited["cff-version"], cited["version"]) == ("1.2.0", condrl.__version__)
    assert {"message", "title", "authors"} <= cited.keys()
    assert f'license = "{cited["license"]}"' in (ROOT / "pyproject.toml").read_text()


def test_the_pages_have_snippets_and_commands():
    assert len(snippets()) >= 2
    assert len(of_script("scripts/finetune.py")) >= 8
    assert len(of_script("scripts/sample.py")) >= 2
