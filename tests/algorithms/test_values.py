"""How well values predict returns."""

import pytest
import torch
from sklearn.metrics import explained_variance_score

from condrl.algorithms.values import explained_variance


def test_explained_variance_is_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    returns, values = torch.randn(3, 50, generator=generator), torch.randn(3, 50, generator=generator)
    for predicted in (values, returns + 0.1 * values, returns + 7):
        found = explained_variance(returns - predicted, returns)
        expected = [explained_variance_score(a, b) for a, b in zip(returns, predicted, strict=True)]
        assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_returns_that_do_not_vary_are_not_explained():
    """However large the errors: a quotient would say -1e9."""
    errors = torch.tensor([[1e3, -1e3, 0.0], [0.0, 0.0, 0.0]])
    assert explained_variance(errors, torch.full((2, 3), 0.7)).tolist() == [0, 0]
