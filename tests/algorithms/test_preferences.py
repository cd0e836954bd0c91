"""Preferences between images: which are compared, and how much one is preferred."""

import pytest
import torch

from condrl.algorithms.preferences import extremes, odds, preference_loss


def test_the_best_and_the_worst_of_each_set():
    """Sets are images in a row; one without a score is neither."""
    rewards = torch.tensor([1.0, 3.0, 2.0, 0.0, torch.nan, 4.0, 5.0, -torch.inf])
    assert extremes(rewards, 4).tolist() == [[1, 3]] * 4 + [[6, 5]] * 4
    assert extremes(rewards[:4], 2).tolist() == [[1, 0], [1, 0], [2, 3], [2, 3]]
    same = extremes(torch.ones(3), 3)
    assert (same[:, 0] == same[:, 1]).all()  # nothing to compare


def test_odds_are_those_of_the_rewards():
    rewards = torch.tensor([0.2, 1.5, -0.3])
    pairs = torch.tensor([[1, 0], [0, 2], [2, 2]])
    p = odds(rewards, pairs)
    torch.testing.assert_close(p / (1 - p), torch.tensor([1.3, 0.5, 0.0]).exp())


def test_the_loss_is_least_where_the_margin_is_the_log_odds():
    margin = torch.tensor([-2.0, 0.3, 4.0], requires_grad=True)
    loss, metrics = preference_loss(margin, margin.detach().sigmoid())
    (gradient,) = torch.autograd.grad(loss.sum(), margin, retain_graph=True)
    torch.testing.assert_close(gradient, torch.zeros(3), atol=1e-6, rtol=0)
    p = margin.detach().sigmoid()
    torch.testing.assert_close(loss, -(p * p.log() + (1 - p) * (1 - p).log()))  # entropy
    torch.testing.assert_close(preference_loss(margin)[0], -margin.sigmoid().log())
    torch.testing.assert_close(preference_loss(margin, torch.ones(3))[0], preference_loss(margin)[0])
    assert metrics["implicit_accuracy"].item() == pytest.approx(2 / 3)
    assert metrics["implicit_margin"].item() == pytest.approx(2.3 / 3)
