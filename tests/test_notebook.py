"""docs/quickstart.ipynb: stored as notebooks are, without outputs, and executed from an empty folder."""

import ast
import json
import re

import pytest
from helpers import ROOT, run_python

NOTEBOOK = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text("utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
QUICK = """
epochs = 1
fewer = ["train.prompts_per_epoch=2", "train.images_per_prompt=4", "train.rollout_batch=8", "train.updates_per_epoch=2"]
fewer += ["evaluate.prompts=2", "evaluate.pictures=2", "train.lr=0.02"]
"""
CHECKS = """
import json
import numpy as np

first, again = (np.asarray(picture, float) for picture in (tuned[0], image))
(line,) = [json.loads(line) for line in open("runs/redness/metrics.jsonl")]
print(json.dumps({
    "verdicts": [verdict(found["heldout"]) for found in (result, own)],
    "rewards": [line["reward/total"], line["reward/redness"]],
    "measures": sorted(own["heldout"]),
    "diffusers": np.abs(first - again).max(),
    "tuned": np.abs(first - np.asarray(base[0], float)).max(),
}))
"""


def source_of(cell):
    return "".join(cell["source"])


def assigned(code):
    return {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}


def test_it_is_a_notebook_without_outputs():
    """What the format, version 4.5, asks of cells; nothing that a run of it leaves."""
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert NOTEBOOK.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    identifiers = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len({*identifiers}) == len(identifiers)
    assert all(re.fullmatch(r"[\w-]{1,64}", identifier) for identifier in identifiers)
    for cell in NOTEBOOK["cells"]:
        keys = {"cell_type", "id", "metadata", "source"}
        is_code = cell["cell_type"] == "code"
        assert cell.keys() == (keys | {"execution_count", "outputs"} if is_code else keys)
        assert is_code or cell["cell_type"] == "markdown"
        assert all(line.endswith("\n") for line in cell["source"][:-1])
    assert [(cell["outputs"], cell["execution_count"]) for cell in CODE] == [([], None)] * len(CODE)
    assert NOTEBOOK["metadata"]["kernelspec"]["name"] == "python3"


def test_it_depends_on_no_folder():
    """Paths are below the reader's own runs/, and what comes with condrl is asked of it."""
    source = "\n".join(map(source_of, CODE))
    assert str(ROOT) not in source
    texts = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    paths = [text for text in texts if isinstance(text, str) and "/" in text]
    assert paths
    assert all(path.startswith(("runs/notebook", "runs/redness")) for path in paths)


@pytest.mark.slow
def test_its_cells_run_in_order(tmp_path):
    """With a first cell that asks for less: the own reward is what was learned from, and diffusers draws the same."""
    sources = [source_of(cell) for cell in CODE]
    (parameters,) = [i for i, cell in enumerate(CODE) if "parameters" in cell["metadata"].get("tags", [])]
    sources[parameters] = QUICK
    assert assigned(QUICK) == assigned(source_of(CODE[parameters]))
    done = run_python("-c", "\n\n".join([*sources, CHECKS]), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["diffusers"] <= 1  # of 255
    assert found["tuned"] > 1  # what the LoRA does is not nothing
    assert found["rewards"][0] == found["rewards"][1] != 0
    assert found["measures"] == ["clip", "redness", "shapes", "shapes_exact"]
    assert all(re.match("better|worse|no difference shown", verdict) for verdict in found["verdicts"])
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    assert (tmp_path / "runs" / "notebook" / "report.html").is_file()
