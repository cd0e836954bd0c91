import pytest
import torch

import condrl
from condrl.evaluate import estimate, evaluate
from condrl.policy import Policy
from condrl.prompts import Row
from condrl.report import grid, labelled, save_comparison, to_pil
from condrl.rewards import make_reward
from condrl.run import make_sampler

ROWS = [Row(0, "a red star"), Row(1, "a blue circle"), Row(2, "a red star")]


@condrl.reward
def mean_level(samples, prompts):
    return samples.mean((1, 2, 3))


def test_estimate_takes_prompts_as_the_unit():
    scores = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 0.0])  # three prompts, two images each
    found = estimate(scores, 2)
    means = torch.tensor([0.5, 1.0, 0.0]).double()
    half = 1.96 * means.std().item() / 3**0.5
    assert found.mean == 0.5
    assert found.ci95 == pytest.approx((0.5 - half, 0.5 + half))


def test_intervals_cover_the_truth_95_percent_of_the_time():
    g = torch.Generator().manual_seed(0)
    draws = [estimate((torch.rand(200, generator=g) < 0.4).float(), 1).ci95 for _ in range(1000)]
    covered = sum(low <= 0.4 <= high for low, high in draws) / 1000
    assert 0.93 < covered < 0.97


def test_evaluation_does_not_depend_on_the_batch_and_pairs_the_noise(model):
    policy = Policy(model, make_sampler({"name": "ddim", "steps": 3, "spacing": None, "eta": 1.0}, model.schedule))
    measures = [make_reward("mean_level", {})]
    together = evaluate(policy, ROWS, measures, seed=5, per_prompt=2, batch=6, pictures=3)
    apart = evaluate(policy, ROWS, measures, seed=5, per_prompt=2, batch=1, pictures=3)
    assert together.measures["mean_level"].mean == pytest.approx(apart.measures["mean_level"].mean, abs=1e-5)
    assert together.labels == ["a red star", "a red star", "a blue circle"]
    for one, other in zip(together.pictures, apart.pictures, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=0)
    assert not torch.equal(together.pictures[0], together.pictures[1])  # the same prompt, another seed
    with model.reference():
        base = evaluate(policy, ROWS, measures, seed=5, per_prompt=2, batch=6, pictures=3)
    assert torch.equal(torch.stack(base.pictures), torch.stack(together.pictures))  # a LoRA that is still zero


def test_pictures_hold_the_images(tmp_path):
    images = [torch.full((3, 8, 8), level) for level in (0.0, 1.0, 0.5, 0.25)]
    sheet = grid([labelled(to_pil(image), "x") for image in images], columns=2)
    assert sheet.getpixel((10, 10)) == (0, 0, 0)
    assert sheet.getpixel((6 + 192 + 6 + 10, 10)) == (255, 255, 255)
    assert sheet.getpixel((10, 6 + 192 + 40 + 6 + 10)) == (128, 128, 128)
    save_comparison(tmp_path / "x" / "c.png", images[:2], images[2:], ["a", "b"])
    assert (tmp_path / "x" / "c.png").stat().st_size > 100


def test_failed_scores_are_left_out_of_an_estimate():
    nan = float("nan")
    found = estimate(torch.tensor([1.0, nan, 3.0, 3.0, nan, nan]), 2)
    assert found.mean == 2.0  # of the first two prompts; the third has no score
    assert found.failed == 3
    assert estimate(torch.tensor([1.0, 3.0]), 1).failed == 0
