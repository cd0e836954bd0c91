import pytest
import torch

import condrl
from condrl.evaluate import estimate, evaluate, paired_difference, verdict
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
    scores = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0])  # five prompts, two images each
    found = estimate(scores, 2)
    means = torch.tensor([0.5, 1.0, 0.0, 0.5, 0.5]).double()
    half = 1.96 * means.std().item() / 5**0.5
    assert found.mean == 0.5
    assert found.ci95 == pytest.approx((0.5 - half, 0.5 + half))


@pytest.mark.parametrize(("yes", "count"), [(20, 20), (0, 3), (20, 40), (49, 50)])
def test_the_interval_of_a_share_is_wilsons_within_0_and_1(yes, count):
    """Its ends are the shares p from which what was seen is 1.96 standard deviations of p away."""
    scores = torch.zeros(count)
    scores[:yes] = 1
    low, high = estimate(scores, 1).ci95
    assert 0 <= low <= yes / count <= high <= 1
    for p in (low, high):
        if 1e-9 < p < 1 - 1e-9:
            assert abs(yes / count - p) == pytest.approx(1.96 * (p * (1 - p) / count) ** 0.5)
    assert high - low > 0.01  # not even where all agree


def test_the_paired_interval_is_that_of_the_differences():
    generator = torch.Generator().manual_seed(0)
    base = 5 * torch.randn(400, generator=generator).double()  # prompts differ much more than the tuning changes them
    change = 0.2 + 0.5 * torch.randn(400, generator=generator).double()
    found = paired_difference(base, base + change)
    half = 1.96 * change.std().item() / 20
    assert found.mean == pytest.approx(change.mean().item())
    assert found.ci95 == pytest.approx((found.mean - half, found.mean + half), abs=0.01)
    nan = torch.full((3,), torch.nan)
    with_gaps = paired_difference(torch.cat([base, nan]), torch.cat([base + change, torch.ones(3)]))
    assert with_gaps.mean == pytest.approx(found.mean)  # a prompt without one of the two is left out


def test_a_verdict_rests_on_the_paired_interval():
    def row(low, high):
        return {"difference": {"mean": (low + high) / 2, "ci95": (low, high)}}

    rows = {
        "a": row(0.01, 0.2),
        "b": row(-0.1, 0.1),
        "c": row(-0.3, -0.1),
        "d": {"difference": {"mean": 1, "ci95": None}},
    }
    assert verdict(rows) == "better: a; worse: c; not shown: b, d"


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
