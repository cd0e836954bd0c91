"""What a run measures and saves while it tunes, and at its end."""

import json

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
