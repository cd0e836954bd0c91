"""Value: the pretrained model's chain, controlled by the value network that a run of feynman_kac learned."""

from dataclasses import replace

from torch import Tensor

import condrl
from condrl.algorithms.values import StepValue, load_step_value
from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import sample
from condrl.diffusion.steering import Draws
from condrl.diffusion.transition import Transition


@condrl.steering(learned=True)
def value(
    draws: Draws,
    *,
    run: str,  # the folder of the run that learned it, with whose sampler it has to draw
    strength: float = 1.0,  # multiplies the control; at 1 the target is p exp(r / kappa), p the pretrained distribution
) -> Tensor:
    """Moves the mean of each step by S^2 grad log E_pre[exp(r / kappa) | step] (docs/theory.md 22).

    A step is one call of the model, without its gradient; no reward is asked.
    """
    policy = Controlled(draws.policy, load_step_value(draws.policy, run), strength)
    return sample(policy, draws.condition, draws.generators, len(draws.condition))


class Controlled(Policy):
    """A policy whose steps a value moves."""

    def __init__(self, policy: Policy, value: StepValue, strength: float = 1.0) -> None:
        super().__init__(policy.model, policy.sampler)
        self.value, self.strength = value, strength

    def step(
        self, x: Tensor, k: Tensor, condition: Tensor, solver_state: Tensor | None
    ) -> tuple[Transition, Tensor | None]:
        base, solver_state = super().step(x, k, condition, solver_state)
        control = self.value.control(base.mean, k, self.model.features(condition))
        return replace(base, mean=base.mean + self.strength * base.std.square() * control), solver_state
