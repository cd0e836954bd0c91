"""Steering plugins that fail, or return something else than they should."""

import pytest
import torch
from helpers import ROOT

import condrl
from condrl import RunError, UsageError
from condrl.diffusion.noise import seeded
from condrl.diffusion.rollout import advance, sample, start
from condrl.loading import load_config
from condrl.prompts import Row
from condrl.training.build import make_policy
from condrl.training.steering import read_steer


def drawn(plugin, tmp_path, **flags):
    """What a plugin draws for two prompts of the toy, or why it is refused."""
    condrl.steering(name="tried", **flags)(plugin)
    config = load_config([str(ROOT / "configs" / "toy" / "p1.yaml"), "sampler.steps=3", f"run.dir={tmp_path}"])
    policy = make_policy(config, torch.device("cpu"))
    rows = [Row(0, "left", {"linear": [1.0]}), Row(1, "right", {"linear": [1.0]})]
    return read_steer("tried", config)(policy, policy.model.encode([row.prompt for row in rows]), seeded([0, 1]), rows)


def plain(draws):
    return sample(draws.policy, draws.condition, draws.generators, 2)


def past_the_end(draws):
    place = start(draws.policy, 2, draws.generators)
    while place.k < draws.policy.steps + 1:
        place = advance(draws.policy, place, draws.condition, draws.generators)[1]
    return place.x


def asking(states, images):
    def plugin(draws):
        found = plain(draws)
        draws.score(states(found), images)
        return found

    return plugin


BOTH = torch.arange(2)


@pytest.mark.parametrize(
    ("plugin", "said"),
    [
        (plain, None),
        (asking(lambda x: x, BOTH), None),
        (lambda draws: {}["st"], "^the steering 'tried' failed: KeyError: 'st'$"),
        (past_the_end, "^the steering 'tried' failed: IndexError: "),
        (lambda draws: None, "the steering 'tried' returned type NoneType: it should return the final states"),
        (lambda draws: plain(draws)[:1], r"returned shape \(1, 1\) in float32: .* of shape \(2, 1\) in float32"),
        (lambda draws: plain(draws).int(), r"returned shape \(2, 1\) in int32"),
        (lambda draws: plain(draws).half(), r"returned shape \(2, 1\) in float16"),
        (
            lambda draws: plain(draws) * torch.tensor([[1], [torch.nan]]),
            "returned 2 states, 1 of which are not finite: it went too far; lower its strength",
        ),
        (asking(lambda x: x * torch.inf, BOTH), "asked for the reward of 2 states, 2 of which are not finite"),
        (asking(lambda x: x[:1], BOTH), r"called score\(shape \(1, 1\) in float32, shape \(2,\) in int64\): it takes"),
        (asking(lambda x: x, [0, 1]), r"called score\(shape \(2, 1\) in float32, type list\): it takes"),
        (asking(lambda x: x, BOTH + 1), "called score for images that are not among 0 to 1"),
    ],
)
def test_what_a_plugin_does_wrong_is_one_line(plugin, said, tmp_path):
    if said is None:
        assert drawn(lambda draws: plugin(draws), tmp_path).shape == (2, 1)
        return
    with pytest.raises(UsageError, match=said):
        drawn(lambda draws: plugin(draws), tmp_path)


def test_a_plugin_is_not_blamed_for_a_reward(tmp_path):
    @condrl.reward(name="failing")
    def failing(samples, prompts):
        raise ValueError("r")

    condrl.steering(lambda draws: draws.score(plain(draws), BOTH), name="tried")
    words = ["sampler.steps=3", f"run.dir={tmp_path}", "rewards.quadratic=null", "rewards.failing.weight=1"]
    config = load_config([str(ROOT / "configs" / "toy" / "p1.yaml"), *words])
    policy = make_policy(config, torch.device("cpu"))
    rows = [Row(0, "left"), Row(1, "right")]
    with pytest.raises(RunError, match="^the reward 'failing' failed for the prompt 'left': ValueError: r$"):
        read_steer("tried", config)(policy, policy.model.encode(["left", "right"]), seeded([0, 1]), rows)
