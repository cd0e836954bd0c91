"""What theory predicts that some algorithms close of a toy's gap, without sampling and without training.

    python scripts/research/toy_bias.py --problems g1,m1

Policies that are exactly what an algorithm heads for, audited as `benchmark.py exact` audits tuned ones: the score of
the noised p*; rwr's minimiser over the pretrained chain's own samples, for G1 the best affine one; d3po's, whose
log-ratios are [V(x_{k+1}) - V(x_k)] / kappa, V its own expected reward; where nft's stages settle over the samples of
the policy itself; and online_dpo's, to first order in the change of the score (docs/theory.md 13, 16 and 20).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from benchmark import toy_trainer
from torch import Tensor

from condrl.toys import oracle
from condrl.toys.exact import Case, Problem, solve

KAPPA, STEPS, CELLS, FEW = 0.5, 24, 500, 200


class Chain:
    """A toy's exact problem, and the noised data of each of its prompts."""

    def __init__(self, problem: str, *words: str, cells: int = CELLS) -> None:
        self.trainer = toy_trainer(problem, ["algorithm.name=reinforce", f"algorithm.kappa={KAPPA}", *words])
        self.policy: Any = self.trainer.policy
        self.solved: Problem = solve(self.policy, self.trainer.rows, self.trainer.rewards, KAPPA, cells)
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

    def drawn(self, means: Tensor) -> Tensor:
        """The masses (n,) of the samples of a chain with means (K, n)."""
        masses = self.solved.start
        for mean, std in zip(means, self.solved.std.tolist(), strict=True):
            masses = self.solved.line.push(masses, mean, std)
        return masses


def posterior(chain: Chain, log_masses: Tensor, k: int) -> Tensor:
    """log p(x_0) p(x | x_0) of states (rows) and samples (columns) of the line, (n, n)."""
    x, (alpha, sigma) = chain.solved.line.x, chain.at(k)
    return log_masses - (x[:, None] - alpha * x).square() / (2 * sigma**2)


def affine(x: Tensor, density: Tensor, scale: Tensor, slope: Tensor) -> Tensor:
    """The affine f (n,) with E scale f = E slope and E scale f x = E slope x."""
    design = torch.stack([x, torch.ones_like(x)], 1)
    weighted = density[:, None] * design
    return design @ torch.linalg.solve((weighted * scale[:, None]).T @ design, weighted.T @ slope)


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
            density = joint.logsumexp(1).softmax(0)
            change = affine(x, density, scale, (near * (weights - 1) * error).sum(1))
        found.append(chain.means(k, old - change / sigma))
    return torch.stack(found)


def d3po(chain: Chain, case: Case, prompt: str) -> Tensor:
    """Means (K, n) of the policy whose steps move by S^2 / kappa times the mean slope of what follows under itself.

    On P1 some states have several such means. Where they jump from one to another a fine line does not settle.
    """
    line, (z, w), value, found = chain.solved.line, oracle.hermite(40), case.reward, []
    for base, std in zip(case.base.flip(0), chain.solved.std.flip(0), strict=True):
        (slope,), mean = torch.gradient(value, spacing=line.width), base
        for _ in range(200):
            mean = (mean + base + std**2 / KAPPA * (w * line.interpolate(slope, mean[:, None] + std * z)).sum(1)) / 2
        value = (w * line.interpolate(value, mean[:, None] + std * z)).sum(1)
        found.append(mean)
    return torch.stack(found[::-1])


def nft(chain: Chain, case: Case, prompt: str, stages: int, group: bool = False) -> Tensor:
    """Means (K, n) where nft's stages settle with a value as baseline, or with a group's mean (`group`)."""
    scores = torch.stack([chain.score(prompt, k) for k in range(STEPS)])
    for _ in range(stages):
        anchor, masses, change = scores, chain.drawn(all_means(chain, scores)), 1.0
        while change > 1e-5:
            scores = scores.lerp(settled(chain, case, masses, anchor, stages * KAPPA, group), 0.7)
            masses, before = chain.drawn(all_means(chain, scores)), masses
            change = (masses - before).abs().sum().item()
    return all_means(chain, scores)


def all_means(chain: Chain, scores: Tensor) -> Tensor:
    return torch.stack([chain.means(k, score) for k, score in enumerate(scores)])


def settled(chain: Chain, case: Case, masses: Tensor, anchor: Tensor, weight: float, group: bool) -> Tensor:
    """Scores s (K, n) with weight (s - anchor) = E[A (Y - s) | x] over samples of those masses (n,).

    Y = -eps / sigma is what a score regresses on. A value as baseline, A = r - E[r | x], leaves Cov(r, Y | x), whatever
    s. With a group's mean, A = r - E r, there is E[r - E r | x] (E[Y | x] - s) beside it, and s on both sides.
    """
    x, found, masses = chain.solved.line.x, [], masses.clamp(min=1e-300)
    functions = torch.stack([x, case.reward, x * case.reward], 1)
    for k, base in enumerate(anchor):
        alpha, sigma = chain.at(k)
        joint = posterior(chain, masses.log(), k)
        clean, reward, product = (joint.softmax(1) @ functions).T
        slope, scale = alpha / sigma**2 * (product - clean * reward), torch.full_like(x, weight)
        if group:
            lead = reward - masses @ case.reward
            slope, scale = slope + lead * ((alpha * clean - x) / sigma**2 - base), scale + lead
        density = joint.logsumexp(1).softmax(0)
        found.append(base + (affine(x, density, scale, slope) if chain.is_affine else slope / scale))
    return torch.stack(found)


def online_dpo(chain: Chain, case: Case, prompt: str) -> Tensor:
    """Means (K, n) of online_dpo's minimiser over its own samples, to first order in the change of the score."""
    base, r = torch.stack([chain.score(prompt, k) for k in range(STEPS)]), case.reward
    preferred = (r[:, None] - r).sigmoid() - 0.5
    scores, masses, change = base, case.pretrained.masses, 1.0
    while change > 1e-3:
        pull = preferred @ masses
        best = torch.stack([base[k] + preferred_change(chain, base[k], masses, pull, k) for k in range(STEPS)])
        scores = scores.lerp(best, 0.6)
        masses, before = chain.drawn(all_means(chain, scores)), masses
        change = (masses - before).abs().sum().item()
    return all_means(chain, scores)


def preferred_change(chain: Chain, base: Tensor, masses: Tensor, pull: Tensor, k: int) -> Tensor:
    """The change d (n,) of step k's score that is least in E_eps [c^2 Var(h) / 4 - 2 c E pull h] over samples x_0.

    The margin of a pair is c (h - h') to first order, c = kappa n B^2 / S^2, h = d(x) (-eps / sigma - base(x)) at
    x = alpha x_0 + sigma eps. The cross entropy is margin^2 / 8 - (P - 1/2) margin and a constant, to the same order.
    """
    line, sampler, (alpha, sigma), (z, w) = chain.solved.line, chain.policy.sampler, chain.at(k), oracle.hermite(24)
    basis = torch.stack([line.x, torch.ones_like(line.x)], 1) if chain.is_affine else torch.eye(line.cells).double()
    c = KAPPA * sampler.stochastic.sum() * (sampler.B[k] / sampler.S[k]) ** 2
    bend, slope = torch.zeros(basis.shape[1], basis.shape[1]).double(), torch.zeros(basis.shape[1]).double()
    for eps, weight in zip(z, w, strict=True):
        position = ((alpha * line.x + sigma * eps - line.low) / line.width - 0.5).clamp(0, line.cells - 1)
        left = position.floor().clamp(max=line.cells - 2).long()
        share = (position - left)[:, None]
        at, score = ((1 - share) * f[left] + share * f[left + 1] for f in (basis, base[:, None]))
        h = (-eps / sigma - score) * at
        mean = masses @ h
        bend += weight * ((h * masses[:, None]).T @ h - mean.outer(mean))
        slope += weight * ((masses * pull) @ h)
    bend += 1e-9 * bend.diagonal().max() * torch.eye(len(bend)).double()  # where no sample comes
    found: Tensor = basis @ torch.linalg.solve(bend, 4 * slope / c)
    return found


PROBLEMS = ("g1", "m1", "p1")
WORDS = {"online_dpo": ["sampler.name=exponential"]}  # as ALGORITHMS of benchmark.py has it
Predicted = Callable[[Chain, Case, str], Tensor]
PREDICTED: dict[str, Predicted] = {"the noised p*": noised_optimum, "rwr": rwr, "d3po": d3po}
PREDICTED |= {f"nft {n} value": functools.partial(nft, stages=n) for n in (1, 2, 4)}
PREDICTED |= {f"nft {n} group": functools.partial(nft, stages=n, group=True) for n in (1, 2, 4)}
PREDICTED["online_dpo"] = online_dpo


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=lambda s: s.split(","), default=list(PROBLEMS))
    parser.add_argument("--predictions", type=lambda s: s.split(","), default=list(PREDICTED))
    parser.add_argument("--cells", type=int, help=f"of the line from -9 to 9; by default {CELLS}, of online_dpo {FEW}")
    args = parser.parse_args()
    for given, known in ((args.problems, PROBLEMS), (args.predictions, PREDICTED)):
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    for problem in args.problems:
        for name in args.predictions:
            chain = Chain(problem, *WORDS.get(name, []), cells=args.cells or (FEW if name == "online_dpo" else CELLS))
            if name.endswith("group") and not chain.is_affine:
                print(f"{problem} {name:<14} none: where E[r | x] is stages kappa below the mean nothing settles")
                continue
            predict(f"{problem} {name:<14}", chain, PREDICTED[name])


def predict(label: str, chain: Chain, means: Predicted) -> None:
    """Print what a policy closes of the gap, how far its samples are from p*, and its path KL beside the best one's."""
    solved = chain.solved
    pairs = zip(solved.cases, solved.rows, strict=True)
    audits = [solved._audit(means(chain, case, row.prompt), case) for case, row in pairs]
    kl, best = (sum(kls) / len(audits) for kls in ([a.kl for a in audits], [c.optimal.kl for c in solved.cases]))
    print(
        f"{label} gap closed {solved.gap_closed(audits):.3f}  KL to p* {solved.kl_to_optimum(audits):.3f}  "
        f"path KL {kl:.3f} (best {best:.3f})",
        flush=True,
    )


if __name__ == "__main__":
    main()
