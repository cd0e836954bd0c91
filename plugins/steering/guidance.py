"""Guidance: every action is raised by the gradient of the reward that its own prediction of x0 promises."""

import torch
from torch import Tensor

import condrl
from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import advance, start
from condrl.diffusion.schedule import like, x0_from_score
from condrl.diffusion.steering import Draws
from condrl.diffusion.transition import Transition


@condrl.steering(differentiates=True)
def guidance(
    draws: Draws,
    *,
    kappa: float = 1.0,  # the target is p exp(r / kappa), p the pretrained distribution; reached as far as V is right
) -> Tensor:
    """Acts with s + grad V / kappa, where V, the reward to be had, is that of E[x_0 | x] (docs/theory.md 19).

    One network call a step, and its backward pass. With V itself this is the score of the noised target, which is right
    for every sampler at every noise level; r(E[x_0 | x]) has its gradient for Gaussian data and a linear reward.
    """
    if not kappa > 0:
        raise condrl.UsageError(f"steering guidance: kappa must be above 0, got {kappa:g}")
    policy = Guided(draws, kappa)
    place = start(policy, len(draws.condition), draws.generators)
    while place.k < policy.steps:
        _, place = advance(policy, place, draws.condition, draws.generators)
    return place.x


class Guided(Policy):
    """The policy of some draws, whose actions are raised."""

    def __init__(self, draws: Draws, kappa: float) -> None:
        super().__init__(draws.policy.model, draws.policy.sampler)
        self.draws, self.kappa = draws, kappa

    def step(
        self, x: Tensor, k: Tensor, condition: Tensor, solver_state: Tensor | None
    ) -> tuple[Transition, Tensor | None]:
        return self.sampler.step(k, x, lambda y, t: self._raised(y, t, condition), solver_state)

    def _raised(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The action (B, ...) at x (B, ...) and times t (B,); where there is no signal, V is the same for every x."""
        alpha, sigma = like(self.model.schedule.alpha(t), x), like(self.model.schedule.sigma(t), x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            action = self.model.score(x, t, condition)
            promised = self.draws.score(x0_from_score(action, x, alpha, sigma), torch.arange(len(x)))
            if not promised.requires_grad:
                raise condrl.RunError("guidance: the reward has no gradient: say @condrl.reward(differentiable=False)")
            (gradient,) = torch.autograd.grad(promised.sum(), x)
        return action.detach() + (gradient / self.kappa).where(alpha > 0, 0.0)
