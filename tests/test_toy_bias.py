"""What scripts/research/toy_bias.py predicts, where the answer is known in closed form."""

import pytest
import torch
from helpers import load_script


@pytest.fixture
def bias():
    return load_script("toy_bias")


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("is_affine", [False, True])
def test_nft_settles_at_the_optimum_of_a_linear_reward(group, is_affine, bias):
    """Over samples of p*, a Gaussian, the score that its equation asks for is that of the noised p*."""
    chain = bias.Chain("g1", "rewards.quadratic.curvature=[0]")
    chain.is_affine = is_affine
    (case,), (row,) = chain.solved.cases, chain.solved.rows
    anchor = torch.stack([chain.score(row.prompt, k) for k in range(bias.STEPS)])
    found = bias.all_means(chain, bias.settled(chain, case, case.target, anchor, bias.KAPPA, group))
    expected = bias.noised_optimum(chain, case, row.prompt)
    seen = chain.drawn(expected) > 1e-9  # elsewhere the group's equation may have no stable solution
    assert (found - expected)[:, seen].abs().max() < 1e-5
    assert (found - bias.all_means(chain, anchor))[:, seen].abs().max() > 0.1


def test_nft_is_off_where_the_reward_is_curved(bias):
    chain = bias.Chain("g1")
    (case,), (row,) = chain.solved.cases, chain.solved.rows
    anchor = torch.stack([chain.score(row.prompt, k) for k in range(bias.STEPS)])
    found = bias.all_means(chain, bias.settled(chain, case, case.target, anchor, bias.KAPPA, False))
    seen = case.target > 1e-9
    assert (found - bias.noised_optimum(chain, case, row.prompt))[:, seen].abs().max() > 0.01
