"""What the studies of rewards make of runs, which are not tuned here."""

import json

import pytest
from helpers import ROOT, load_script

from condrl import UsageError
from condrl.config import to_yaml
from condrl.loading import load_config

MEASURES = ("clip", "shapes_exact", "shapes", "jpeg_compressibility")
RESULT = {"heldout": {name: {"base": {"mean": 0.5}, "tuned": {"mean": 0.6}} for name in MEASURES}}
LINES = [
    {"epoch": 1, "base_kl": 0.0},
    {"epoch": 2, "base_kl": 1.5, "heldout/clip": 0.55, "heldout/shapes": 0.52, "heldout/shapes_exact": 0.51},
    {"epoch": 3, "base_kl": 4.0},
]


@pytest.mark.parametrize("what", ["clip", "trade_off"])
def test_a_study_is_a_table_and_a_plot(what, tmp_path, monkeypatch):
    studies, asked = load_script("reward_studies"), []
    monkeypatch.setattr(studies, "tuned", lambda folder, words: asked.append((folder.name, words)) or (RESULT, LINES))
    file = tmp_path / "rewards.json"
    monkeypatch.setattr("sys.argv", ["", what, "--seeds", "2", "--work", str(tmp_path), "--json", str(file)])
    studies.main()
    rows = json.loads(file.read_text())[what]
    assert len(rows) == len(asked) == {"clip": 2, "trade_off": 6}[what]
    if what == "clip":  # the KL of a line is that before its update
        assert rows[1]["curve"] == [{"epoch": 2, "kl": 4.0, "clip": 0.55, "shapes": 0.52, "shapes_exact": 0.51}]
    assert (tmp_path / {"clip": "clip_alone.png", "trade_off": "trade_off.png"}[what]).stat().st_size > 5000
    for folder, words in asked:  # every run is one that can be tuned, on the rewards that it says
        config = load_config([str(ROOT / "configs" / "quickstart.yaml"), *words])
        weights = {name: options["weight"] for name, options in config.rewards.items() if options["weight"]}
        share = float(folder.split("_")[1]) if what == "trade_off" else 0
        assert weights == {k: v for k, v in {"clip": 1 - share, "jpeg_compressibility": share}.items() if v}


def test_a_run_with_other_settings_is_not_taken_for_this_one(tmp_path):
    studies = load_script("reward_studies")
    quick = str(ROOT / "configs" / "quickstart.yaml")
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    (tmp_path / "metrics.jsonl").write_text(json.dumps(LINES[0]) + "\n")
    (tmp_path / "config.yaml").write_text(to_yaml(load_config([quick, f"run.dir={tmp_path}"])))
    assert studies.tuned(tmp_path, []) == (RESULT, LINES[:1])
    with pytest.raises(UsageError, match=r"that run had train\.lr"):
        studies.tuned(tmp_path, ["train.lr=1"])
