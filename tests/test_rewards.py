import io

import pytest
import torch
from PIL import Image

import condrl
from condrl import RunError, scenes
from condrl.prompts import Row
from condrl.rewards import make_reward, score

ROWS = [Row(0, "a red star", {"k": 1.0}), Row(1, "two small blue circles", {"k": 2.0})]


def images(count=2):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@condrl.reward
def red_mean(samples, prompts, *, gain: float = 1.0):
    return gain * samples[:, 0].mean((1, 2))


@condrl.reward
def from_metadata(samples, prompts, metadata):
    return torch.tensor([row["k"] for row in metadata])


@condrl.reward
class Remembers:
    """A stateful reward."""

    def __init__(self, *, start: int = 0):
        self.calls = start

    def __call__(self, samples, prompts):
        self.calls += 1
        return torch.full((len(samples),), float(self.calls))


def test_weighted_sum_options_metadata_and_state():
    rewards = [
        make_reward("red_mean", {"weight": 2.0, "gain": 3.0}),
        make_reward("from_metadata", {"weight": -1.0}),
        make_reward("remembers", {"weight": 0.5, "start": 10}),
    ]
    x = images()
    scores = score(rewards, x, ROWS)
    assert set(scores.each) == {"red_mean", "from_metadata", "remembers"}
    expected = 2 * 3 * x[:, 0].mean((1, 2)) - torch.tensor([1.0, 2.0]) + 0.5 * 11
    torch.testing.assert_close(scores.total, expected)


def test_chunks_do_not_change_scores():
    rewards = [make_reward("red_mean", {"weight": 1.0})]
    x, rows = images(7), [Row(i, "p") for i in range(7)]
    torch.testing.assert_close(score(rewards, x, rows, batch=3).total, score(rewards, x, rows).total)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.zeros(2, 1), r"'bad' returned shape \(2, 1\) for 2 samples.*'a red star'.*shape \(2,\)"),
        ([1.0, 2.0], r"'bad' returned list for 2 samples"),
    ],
)
def test_bad_returns_name_the_reward_and_the_prompt(returned, message):
    condrl.reward(lambda samples, prompts: returned, name="bad")
    with pytest.raises(RunError, match=message):
        score([make_reward("bad", {"weight": 1.0})], images(), ROWS)


def test_failed_scores_are_missing_numbers_with_a_reason():
    good = make_reward("red_mean", {"weight": 1.0})
    returned = torch.tensor([float("-inf"), 1.0])
    condrl.reward(lambda samples, prompts: returned, name="bad")
    scores = score([good, make_reward("bad", {"weight": 1.0})], images(), ROWS)
    assert scores.total.isnan().tolist() == scores.each["bad"].isnan().tolist() == [True, False]
    assert not scores.each["red_mean"].isnan().any()
    said = "the reward 'bad' failed for the prompt 'a red star': it returned a score that is not finite"
    assert scores.failure == said
    assert score([good], images(), ROWS).failure is None


def test_images_outside_the_unit_range_are_refused():
    with pytest.raises(RunError, match=r"\[0, 1\].*from -1"):
        score([make_reward("red_mean", {"weight": 1.0})], images() * 2 - 1.0001, ROWS)


@pytest.mark.parametrize("quality", [50, 95])
def test_jpeg_rewards_are_file_sizes_in_kilobytes(quality):
    x = images()
    small = make_reward("jpeg_compressibility", {"quality": quality})(x, ROWS)
    large = make_reward("jpeg_incompressibility", {"quality": quality})(x, ROWS)
    assert torch.equal(small, -large)
    for image, size in zip(x, large, strict=True):
        buffer = io.BytesIO()
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
        assert size.item() == pytest.approx(len(buffer.getvalue()) / 1000)
    flat = make_reward("jpeg_incompressibility", {"quality": quality})(torch.full((2, 3, 16, 16), 0.5), ROWS)
    assert (flat < large).all()


def test_shapes_rewards_read_the_image():
    star = scenes.draw([scenes.Thing("star", "red", 30, 30, 24)])
    circle = scenes.draw([scenes.Thing("circle", "blue", 20, 20, 14)])
    x = torch.stack([torch.from_numpy(p.copy()).permute(2, 0, 1) / 255 for p in (star, circle)])
    graded = make_reward("shapes", {})(x, ROWS)
    assert graded.tolist() == pytest.approx([1.0, 0.5])
    assert make_reward("shapes_exact", {})(x, ROWS).tolist() == [1.0, 0.0]
