"""Distances between distributions that are known by samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def knn_kl(x: Tensor, y: Tensor, k: int = 1) -> float:
    """KL(P || Q) in nats from x (n, d) of P and y (m, d) of Q, by k-th nearest neighbours (Wang et al. 2009).

    Points of x that coincide with their neighbour, in either set, are left out.
    """
    n, m = len(x), len(y)
    own = torch.cdist(x.double(), x.double()).fill_diagonal_(math.inf).kthvalue(k, dim=1).values
    other = torch.cdist(x.double(), y.double()).kthvalue(k, dim=1).values
    apart = (own > 0) & (other > 0)
    return (x.shape[1] * (other / own)[apart].log().mean()).item() + math.log(m / (n - 1))
