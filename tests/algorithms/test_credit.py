import torch

from condrl.algorithms.credit import PromptTracker, group_advantages


def test_group_advantages_by_hand():
    rewards, groups = torch.tensor([1.0, 3.0, 10.0, 10.0]), torch.tensor([7, 7, 3, 3])
    torch.testing.assert_close(group_advantages(rewards, groups, normalise=False), torch.tensor([-1.0, 1.0, 0.0, 0.0]))
    torch.testing.assert_close(
        group_advantages(rewards, groups), torch.tensor([-1.0, 1.0, 0.0, 0.0]), atol=2e-4, rtol=0
    )


def test_leave_one_out_is_the_mean_of_the_others():
    rewards, groups = torch.randn(12), torch.arange(3).repeat(4)
    ours = group_advantages(rewards, groups, normalise=False, leave_one_out=True)
    for i in range(12):
        others = [rewards[j] for j in range(12) if groups[j] == groups[i] and j != i]
        torch.testing.assert_close(ours[i], rewards[i] - torch.stack(others).mean())


def test_group_order_does_not_matter():
    rewards, groups, order = torch.randn(20), torch.randint(0, 4, (20,)), torch.randperm(20)
    torch.testing.assert_close(
        group_advantages(rewards, groups)[order], group_advantages(rewards[order], groups[order])
    )


def test_tracker_uses_the_batch_until_it_knows_a_prompt():
    tracker = PromptTracker(length=4, least=3)
    first = tracker.advantages(torch.tensor([0.0, 2.0]), [0, 1])
    torch.testing.assert_close(first, torch.tensor([-1.0, 1.0]), atol=1e-5, rtol=0)
    tracker.advantages(torch.tensor([1.0, 2.0]), [0, 0])
    known = tracker.advantages(torch.tensor([5.0, 100.0]), [0, 1])  # prompt 0 now has 0, 1, 2, 5
    past = torch.tensor([0.0, 1.0, 2.0, 5.0])
    torch.testing.assert_close(known[0], (5 - past.mean()) / past.std(correction=0), atol=1e-4, rtol=0)
    assert list(tracker.history[0]) == [0, 1, 2, 5]
    tracker.advantages(torch.tensor([9.0]), [0])
    assert list(tracker.history[0]) == [1, 2, 5, 9]


def test_tracker_goes_out_and_comes_back():
    tracker, other = PromptTracker(length=4, least=2), PromptTracker(length=4, least=2)
    tracker.advantages(torch.randn(6), [0, 1, 0, 1, 0, 1])
    other.load_state_dict(tracker.state_dict())
    rewards = torch.randn(2)
    assert torch.equal(tracker.advantages(rewards, [0, 1]), other.advantages(rewards, [0, 1]))
