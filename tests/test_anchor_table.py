"""The anchors' table of docs/measured.md: what is run for it, and how it grows."""

import pytest
from helpers import ROOT

from condrl.io.records import from_json

RECORD = ROOT / "docs" / "results" / "anchors.json"
FOUND = {"gap_closed": 0.98765, "kl_to_optimum": 0.0312, "reward_queries": 7, "seconds": 1.0}


@pytest.fixture
def run(research, tmp_path, monkeypatch):
    """What runs `anchors` with words, and returns its rows and the overrides of what it tuned."""
    asked = []
    monkeypatch.setattr(research, "gap", lambda problem, words: asked.append((problem, *words)) or FOUND)

    def run(*words):
        asked.clear()
        rows = research.anchors(None, research.parse(["anchors", "--json", str(tmp_path / "t.json"), *words]))
        assert from_json((tmp_path / "t.json").read_text()) == rows
        return rows, list(asked)

    return run


@pytest.mark.slow
def test_rows_in_the_file_are_neither_run_again_nor_lost(research, run, capsys):
    first, asked = run("--problems", "g1")
    assert len(first) == len(asked) == len(research.ANCHORS)
    assert all("run.seed=0" in words for words in asked)
    both, asked = run("--problems", "g1", "--seeds", "2")
    assert both[: len(first)] == first
    assert all("run.seed=1" in words for words in asked)
    assert run("--problems", "g1", "--seeds", "2") == (both, [])
    assert "| 1 | 4 | group | in all | .988 | - | - |" in capsys.readouterr().out
    other, asked = run("--problems", "g1", "train.lr=0.1")
    assert other[: len(both)] == both
    assert len(asked) == len(research.ANCHORS)


@pytest.mark.slow
def test_lengthened_stages_have_as_many_epochs_as_a_run_of_one(run):
    """300 of G1's, 400 of M1's, or as many as are asked for."""
    for problem, words, epochs in (("g1", [], 300), ("m1", [], 400), ("m1", ["train.epochs=7"], 7)):
        rows, asked = run("--problems", problem, *words)
        for own, row in zip(asked, rows[-len(asked) :], strict=True):
            assert f"algorithm.stages={row['stages']}" in own
            given = [f"train.epochs={epochs * row['stages']}"] if row["lengthened"] else []
            assert [word for word in own if word.startswith("train.epochs=")] == words + given


def test_the_table_of_the_documentation_is_what_was_measured(research):
    """With every anchor on all three toys, and the seed 0."""
    rows = from_json(RECORD.read_text("utf-8"))
    assert research.anchors_markdown(rows) in (ROOT / "docs" / "measured.md").read_text("utf-8")
    assert len({research.anchor_of(row) for row in rows}) == len(rows)
