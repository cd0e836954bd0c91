"""REINFORCE on denoising steps, the DDPO-SF of Black et al. 2024."""

from dataclasses import dataclass

from torch import Tensor

import condrl
from condrl.algorithms.examples import Metrics
from condrl.algorithms.needs import Need, one_pass
from condrl.algorithms.policy_gradient import PolicyGradient, Steps
from condrl.diffusion.policy import Policy
from condrl.diffusion.transition import Transition


@condrl.algorithm
@dataclass(kw_only=True)
class REINFORCE(PolicyGradient):
    """DDPO-SF: A grad log p, for one update on each image (Black et al. 2024, eq. 4; docs/theory.md 8)."""

    @property
    def needs(self) -> tuple[Need, ...]:
        return (*super().needs, one_pass)

    def surrogate(self, policy: Policy, transition: Transition, batch: Steps) -> tuple[Tensor, Metrics]:
        return -batch.advantage * (transition.log_prob(batch.next_x) - batch.old_log_prob).float(), {}
