"""The toys' table of docs/measured.md: which algorithms it has, and how it grows."""

from helpers import ROOT

from condrl import registry
from condrl.io.records import from_json

RECORD = ROOT / "docs" / "results" / "exact.json"
FOUND = {"gap_closed": 0.98765, "kl_to_optimum": 0.0312, "reward_queries": 7, "seconds": 1.0}


def test_every_algorithm_with_a_kappa_is_asked(research):
    """That learns from rewards: pairs are others' answers."""
    plugins = [plugin for plugin in registry.algorithm.all() if "condrl" in plugin.target.__module__]
    kappas = {plugin.name for plugin in plugins if "kappa" in plugin.options and plugin.target.uses_rewards}
    assert set(research.ALGORITHMS) == kappas


def test_rows_in_the_file_are_neither_run_again_nor_lost(research, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(research, "gap", lambda problem, words: asked.append((problem, *words)) or FOUND)

    def run(*words):
        asked.clear()
        args = research.parse(["exact", "--json", str(tmp_path / "t.json"), "--algorithms", "grpo", *words])
        return research.exact(None, args)

    clip, kappa = "algorithm.clip_range=0.2", "algorithm.kappa=0.5"
    first = run("--problems", "g1,m1", "--seeds", "1")
    assert asked == [(p, "algorithm.name=grpo", kappa, "run.seed=0", clip) for p in ("g1", "m1")]
    whole = run("--problems", "m1,p1", "--seeds", "2")
    assert [(words[0], words[3]) for words in asked] == [
        ("m1", "run.seed=1"),
        ("p1", "run.seed=0"),
        ("p1", "run.seed=1"),
    ]
    assert whole[:2] == first
    assert from_json((tmp_path / "t.json").read_text()) == whole
    other = run("--problems", "g1", "--seeds", "1", "train.lr=0.1")
    assert asked == [("g1", "algorithm.name=grpo", kappa, "run.seed=0", clip, "train.lr=0.1")]
    assert other[:-1] == whole
    assert "| `grpo` | 2 | .988 | .031 | .988 | .031 | .988 | .031 |" in capsys.readouterr().out


def test_a_cell_is_the_range_over_seeds(research):
    rows = [{"gap_closed": g, "kl_to_optimum": k} for g, k in ((0.9821, 0.2), (0.9996, 0.3), (0.99, 0.1))]
    assert research.cells_of(rows) == (".982 to 1.000", ".200")
    assert research.cells_of([]) == ("-", "-")


def test_the_table_of_the_documentation_is_what_was_measured(research):
    """By every algorithm, on all three toys, each by as many seeds."""
    rows = from_json(RECORD.read_text("utf-8"))
    assert {row["algorithm"] for row in rows} == set(research.ALGORITHMS)
    assert research.markdown(rows) in (ROOT / "docs" / "measured.md").read_text("utf-8")
    for algorithm in research.ALGORITHMS:
        seeds = [row["seed"] for row in rows if row["algorithm"] == algorithm]
        assert sorted(seeds) == sorted([0, 1, 2] * 3)
