"""What a run measures and saves while it tunes, and at its end."""

import json

import pytest
import torch
from helpers import ROOT, toy_trainer, toy_words

from condrl.commands import finetune

P1 = ROOT / "condrl" / "assets" / "toy" / "p1.jsonl"


def test_an_average_of_the_weights_is_what_is_measured_and_saved(tmp_path):
    """Against the average by hand of a run that has none, which is otherwise the same run."""
    newest, history = toy_trainer("nft", tmp_path / "newest"), []
    history.append([w.detach().clone() for w in newest.learner.weights])
    newest.algorithm.after_update = lambda policy: history.append([w.detach().clone() for w in newest.learner.weights])
    newest.fit()
    assert len(history) > 6
    average = history[0]
    for weights in history[1:]:
        average = [0.8 * a + 0.2 * w for a, w in zip(average, weights, strict=True)]

    folder, measured = tmp_path / "averaged", ["evaluate.every=3", "evaluate.images_per_prompt=50"]
    words = [*toy_words("nft", folder), "train.ema=0.8", "run.seed=0", *measured]
    assert finetune.main([*words, f"prompts.validation={P1}"]) == 0
    newest.policy.model.load_adapter(folder / "lora")
    for expected, saved, last in zip(average, newest.learner.weights, history[-1], strict=True):
        torch.testing.assert_close(saved.detach(), expected, rtol=1e-5, atol=1e-7)
        assert not torch.allclose(last, expected, rtol=1e-5, atol=1e-7)

    result = json.loads((folder / "result.json").read_text())
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    tuned = result["heldout"]["quadratic"]["tuned"]["mean"]
    assert last["validation/quadratic"] == tuned  # of the same prompts and seeds
    assert finetune.main([*toy_words("nft", tmp_path / "plain"), "evaluate.images_per_prompt=50", "run.seed=0"]) == 0
    plain = json.loads((tmp_path / "plain" / "result.json").read_text())["heldout"]["quadratic"]
    assert plain["base"]["mean"] == result["heldout"]["quadratic"]["base"]["mean"]
    assert tuned != plain["tuned"]["mean"]


@pytest.mark.parametrize("prompts", ["heldout", "validation"])
def test_each_evaluation_keeps_its_images_and_its_paired_gain(prompts, tmp_path):
    folder = tmp_path / "run"
    words = [*toy_words("nft", folder), "train.epochs=4", "evaluate.every=2", "evaluate.images_per_prompt=5"]
    assert finetune.main([*words, *([f"prompts.validation={P1}"] if prompts == "validation" else [])]) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    before = json.loads((folder / "base.json").read_text())["measures"]

    def scores(epoch):
        path = folder / "evaluations" / f"epoch_{epoch:05d}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len({(row["row"], row["seed"]) for row in rows}) == len(rows) == 4 * 5
        return torch.tensor([row["measures"]["quadratic"] for row in rows])

    assert [line["epoch"] for line in lines if "gain/quadratic" in line] == [2, 4]
    assert scores(0).mean().item() == pytest.approx(before[f"{prompts}/quadratic"], rel=1e-5)
    for line in (lines[1], lines[3]):
        assert scores(line["epoch"]).mean().item() == pytest.approx(line[f"{prompts}/quadratic"], rel=1e-5)
        difference = scores(line["epoch"]) - scores(0)
        assert line["gain/quadratic"] == pytest.approx(difference.mean().item(), abs=1e-5)
        of_prompts = difference.view(4, 5).mean(1)
        assert 0 < line["gain/quadratic_ci95"] <= (of_prompts.max() - of_prompts.min()).item()
