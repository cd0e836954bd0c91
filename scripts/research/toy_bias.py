"""What theory predicts that some algorithms close of a toy's gap, without sampling and without training.

    python scripts/research/toy_bias.py --problems g1,m1

Policies that are exactly what an algorithm heads for, audited as `benchmark.py exact` audits tuned ones: the score of
the noised p*; rwr's minimiser over the pretrained chain's own samples, for G1 the best affine one; and d3po's, whose
log-ratios are [V(x_{k+1}) - V(x_k)] / kappa, V its own expected reward (docs/theory.md 16 and 20).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from benchmark import toy_trainer
from torch import Tensor

from condrl.toys import oracle
from condrl.toys.exact import Case, Problem, solve

KAPPA, STEPS = 0.5, 24


class Chain:
    """A toy's exact problem, and the noised data of each of its prompts."""

    def __init__(self, problem: str) -> None:
        self.trainer = toy_trainer(problem, ["algorithm.name=reinforce", f"algorithm.kappa={KAPPA}"])
        self.policy: Any = self.trainer.policy
        self.solved: Problem = solve(self.policy, self.trainer.rows, self.trainer.rewards, KAPPA)
        self.is_affine = problem == "g1"

    def at(self, k: int) -> tuple[Tensor, Tensor]:
        """alpha and sigma of a step's start."""
        t, schedule = self.policy.sampler.times[k], self.policy.model.schedule
        return schedule.alpha(t), schedule.sigma(t)

    def score(self, prompt: str, k: int) -> Tensor:
        """Of the noised data on the line, (n,)."""
        x, model = self.solved.line.x[:, None], self.policy.model
        return model.distribution.rows(model.encode([prompt] * len(x))).noised(*self.at(k)).score(x)[:, 0]

    def means(self, k: int, score: Tensor) -> Tensor:
        """Of step k with that score, (n,)."""
        sampler = self.policy.sampler
        found: Tensor = sampler.A[k] * self.solved.line.x + sampler.B[k] * score
        return found


def posterior(chain: Chain, log_masses: Tensor, k: int) -> Tensor:
    """log p(x_0) p(x | x_0) of states (rows) and samples (columns) of the line, (n, n)."""
    x, (alpha, sigma) = chain.solved.line.x, chain.at(k)
    return log_masses - (x[:, None] - alpha * x).square() / (2 * sigma**2)


def noised_optimum(chain: Chain, case: Case, prompt: str) -> Tensor:
    """Means (K, n) by the score of the noised p*, as the mean of X_0 says it."""
    x, found = chain.solved.line.x, []
    for k in range(STEPS):
        alpha, sigma = chain.at(k)
        clean = posterior(chain, case.target.clamp(min=1e-300).log(), k).softmax(1) @ x
        found.append(chain.means(k, (alpha * clean - x) / sigma**2))
    return torch.stack(found)


def rwr(chain: Chain, case: Case, prompt: str) -> Tensor:
    """Means (K, n) at the minimum of rwr's regression over samples of the pretrained chain."""
    x, masses, found = chain.solved.line.x, case.pretrained.masses.clamp(min=1e-300), []
    weights = (case.reward / KAPPA).exp()
    weights = weights / (masses @ weights)
    for k in range(STEPS):
        (alpha, sigma), old = chain.at(k), chain.score(prompt, k)
        joint = posterior(chain, masses.log(), k)
        error = (x[:, None] - alpha * x) / sigma + sigma * old[:, None]
        near = joint.softmax(1)
        scale = near @ weights
        change = (near * weights * error).sum(1) / scale
        if chain.is_affine:
            design = torch.stack([x, torch.ones_like(x)], 1)
            density = joint.logsumexp(1).softmax(0)[:, None]
            slope = (density * design * (near * (weights - 1) * error).sum(1)[:, None]).sum(0)
            change = design @ torch.linalg.solve((design * density * scale[:, None]).T @ design, slope)
        found.append(chain.means(k, old - change / sigma))
    return torch.stack(found)


def d3po(chain: Chain, case: Case, prompt: str) -> Tensor:
    """Means (K, n) of the policy whose steps move by S^2 / kappa times the mean slope of what follows under itself."""
    line, (z, w), value, found = chain.solved.line, oracle.hermite(40), case.reward, []
    for base, std in zip(case.base.flip(0), chain.solved.std.flip(0), strict=True):
        (slope,), mean = torch.gradient(value, spacing=line.width), base
        for _ in range(200):
            mean = (mean + base + std**2 / KAPPA * (w * line.interpolate(slope, mean[:, None] + std * z)).sum(1)) / 2
        value = (w * line.interpolate(value, mean[:, None] + std * z)).sum(1)
        found.append(mean)
    return torch.stack(found[::-1])


PREDICTED: dict[str, Callable[[Chain, Case, str], Tensor]] = {"the noised p*": noised_optimum, "rwr": rwr, "d3po": d3po}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=lambda s: s.split(","), default=["g1", "m1", "p1"])
    for problem in parser.parse_args().problems:
        chain = Chain(problem)
        solved = chain.solved
        for name, means in PREDICTED.items():
            pairs = zip(solved.cases, solved.rows, strict=True)
            audits = [solved._audit(means(chain, case, row.prompt), case) for case, row in pairs]
            closed, kl = solved.gap_closed(audits), solved.kl_to_optimum(audits)
            print(f"{problem} {name:<14} gap closed {closed:.3f}  KL to p* {kl:.3f}", flush=True)


if __name__ == "__main__":
    main()
