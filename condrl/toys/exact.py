"""Problems solved exactly: 1-D chains and policies audited without sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from condrl.diffusion.policy import Policy
from condrl.errors import UsageError
from condrl.prompts import Row
from condrl.rewards.scoring import Reward, score
from condrl.toys import oracle
from condrl.toys.oracle import Audit, Line


@dataclass(frozen=True)
class Case:
    """A prompt's problem on the line: means are (K, n), masses and values (n,)."""

    base: Tensor
    reward: Tensor
    pretrained: Audit
    optimal: Audit
    target: Tensor  # masses of p* ~ p exp(r / kappa), from the exact distribution of the data


@dataclass(frozen=True)
class Problem:
    """E r - kappa KL of the chain that a 1-D model and a sampler make, for each prompt row, solved on a line."""

    line: Line
    rows: Sequence[Row]
    kappa: float
    std: Tensor  # (K,)
    start: Tensor  # (n,)
    cases: list[Case]

    @property
    def optimum(self) -> float:
        """J*, the mean over prompts."""
        return sum(case.optimal.objective for case in self.cases) / len(self.cases)

    @property
    def pretrained(self) -> float:
        """J of the pretrained model."""
        return sum(case.pretrained.objective for case in self.cases) / len(self.cases)

    def audit(self, policy: Policy) -> list[Audit]:
        """What the policy does for each row."""
        pairs = zip(self.rows, self.cases, strict=True)
        return [self._audit(means_of(policy, self.line, row), case) for row, case in pairs]

    def _audit(self, means: Tensor, case: Case) -> Audit:
        return oracle.audit(self.line, means, case.base, self.std, self.start, case.reward, self.kappa)

    def gap_closed(self, audits: Sequence[Audit]) -> float:
        """(J - J_pretrained) / (J* - J_pretrained)."""
        reached = sum(audit.objective for audit in audits) / len(audits)
        return (reached - self.pretrained) / (self.optimum - self.pretrained)

    def kl_to_optimum(self, audits: Sequence[Audit]) -> float:
        """KL(p_theta || p*) in nats, the mean over prompts."""
        pairs = zip(audits, self.cases, strict=True)
        return sum(oracle.kl_of_masses(audit.masses, case.target) for audit, case in pairs) / len(audits)


@torch.no_grad()
def means_of(policy: Policy, line: Line, row: Row) -> Tensor:
    """The policy's means (K, n) at the cells of the line."""
    x = line.x[:, None].to(policy.model.device, torch.float32)
    condition = policy.model.encode([row.prompt] * line.cells)
    steps = [policy.transition(x, torch.full((line.cells,), k), condition).mean for k in range(policy.steps)]
    return torch.stack(steps)[..., 0].cpu().double()


@torch.no_grad()
def solve(
    policy: Policy, rows: Sequence[Row], rewards: Sequence[Reward], kappa: float, cells: int = 1000, reach: float = 9.0
) -> Problem:
    """The optimum of each row's problem by dynamic programming on [-reach, reach].

    Raises: UsageError unless the model is a 1-D mixture and its sampler has no memory.
    """
    model = policy.model
    if not hasattr(model, "distribution") or model.state_shape != (1,):
        raise UsageError("exact answers need a one-dimensional model=mixture")
    line, prior = Line(-reach, reach, cells), model.schedule.prior_std
    origin, first = torch.zeros(1, 1, device=model.device), torch.zeros(1, dtype=torch.long)
    if not policy.sampler.is_markov:
        raise UsageError("exact answers need a sampler whose steps depend on the state alone")
    std = (
        torch.cat([policy.transition(origin, torch.tensor([k]), first).std.flatten() for k in range(policy.steps)])
        .cpu()
        .double()
    )
    start = line.masses(-line.x.square() / (2 * prior**2))
    cases = [_case(policy, row, rewards, kappa, line, std, start) for row in rows]
    masses = [m for case in cases for m in (case.pretrained.masses, case.optimal.masses, case.target)]
    if max(m[[0, -1]].max().item() for m in masses) > 1e-6:
        raise UsageError(f"exact answers: a distribution reaches beyond [-{reach:g}, {reach:g}]")
    return Problem(line, rows, kappa, std, start, cases)


def _case(
    policy: Policy, row: Row, rewards: Sequence[Reward], kappa: float, line: Line, std: Tensor, start: Tensor
) -> Case:
    model: Any = policy.model  # which knows the distribution of its data
    with model.reference():
        base = means_of(policy, line, row)
    reward = score(rewards, line.x[:, None].float(), [row] * line.cells).total.double()
    program = oracle.dynamic_program(line, base, std, reward, kappa)
    distribution = model.distribution.rows(model.encode([row.prompt] * line.cells))
    target, _ = oracle.tilted_masses(line, distribution.log_prob(line.x[:, None]), reward, kappa)
    audits = [oracle.audit(line, means, base, std, start, reward, kappa) for means in (base, program.means)]
    return Case(base, reward, audits[0], audits[1], target)
