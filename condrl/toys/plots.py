"""Plots of toy runs: densities before, after and at the optimum, the learned control, the objective as it rose."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from condrl.diffusion.policy import Policy
from condrl.diffusion.rollout import rollout
from condrl.errors import naming
from condrl.prompts import Row
from condrl.rewards.scoring import Reward
from condrl.toys.exact import Problem, solve


def save_plots(
    policy: Policy,
    rows: Sequence[Row],
    rewards: Sequence[Reward],
    kappa: float,
    record: Path,
    file: Callable[[str], Path],
) -> None:
    """Write density.png (1-D) or plane.png (2-D), and objective.png, to the paths that `file` gives for images/NAME."""
    if not hasattr(policy.model, "distribution"):
        return
    problem = None
    if policy.model.state_shape == (1,) and policy.sampler.is_markov and kappa > 0 and rewards:
        problem = solve(policy, rows, rewards, kappa)
        plot_densities(problem, policy, file("images/density.png"))
    if policy.model.state_shape == (2,):
        plot_plane(policy, rows, file("images/plane.png"))
    if record.exists():  # not where a finished run was resumed in another folder
        plot_objective(record, problem, file("images/objective.png"))


def axes_of(rows: int, columns: int, size: float = 3.2) -> tuple[Any, Any]:
    """A figure that needs no display, and its axes (rows, columns)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size * 1.3 * columns, size * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure: Any, path: Path) -> None:
    with naming(path):
        figure.savefig(path, dpi=110)


def plot_densities(problem: Problem, policy: Policy, path: Path) -> None:
    """Each prompt's exact density before and after tuning, and p*."""
    figure, axes = axes_of(1, len(problem.rows))
    line = problem.line
    for axis, row, case, audit in zip(axes[0], problem.rows, problem.cases, problem.audit(policy), strict=True):
        curves = {"pretrained": case.pretrained.masses, "tuned": audit.masses, "best possible": case.optimal.masses}
        for (name, masses), style in zip(curves.items(), ("--", "-", ":"), strict=True):
            axis.plot(line.x, masses / line.width, style, label=name)
        axis.fill_between(line.x, case.target / line.width, color="0.88", label="p*")
        axis.set(title=row.prompt, xlabel="x", xlim=(-5, 5))
    axes[0][0].set_ylabel("density")
    axes[0][0].legend()
    save(figure, path)


@torch.no_grad()
def plot_plane(policy: Policy, rows: Sequence[Row], path: Path, points: int = 600) -> None:
    """Samples before and after, and the learned change of the score half-way through."""
    model = policy.model
    figure, axes = axes_of(len(rows), 2, 3.6)
    middle = policy.sampler.times[policy.steps // 2]
    side = torch.linspace(-3, 3, 15, device=model.device)
    lattice = torch.cartesian_prod(side, side)
    for row, (left, right) in zip(rows, axes, strict=True):
        condition = model.encode([row.prompt] * points)
        tuned = rollout(policy, condition, torch.Generator().manual_seed(1), points).samples
        with model.reference():
            before = rollout(policy, condition, torch.Generator().manual_seed(1), points).samples
        for samples, name in ((before, "pretrained"), (tuned, "tuned")):
            left.scatter(*samples.cpu().T, s=5, alpha=0.5, label=name)
        left.set(title=row.prompt, xlim=(-4, 4), ylim=(-4, 4), aspect="equal")
        left.legend(loc="lower left")
        grid = lattice, middle.expand(len(lattice)), model.encode([row.prompt] * len(lattice))
        change = model.score(*grid)
        with model.reference():
            change = change - model.score(*grid)
        right.quiver(*lattice.cpu().T, *change.cpu().T, angles="xy")
        right.set(title=f"change of the score at t = {middle:.2f}", aspect="equal")
    save(figure, path)


def plot_objective(metrics: Path, problem: Problem | None, path: Path) -> None:
    """Objective (or reward, where there is no KL) against reward queries, with the optimum as a line."""
    lines = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    name = next((n for n in ("objective", "reward/total") if lines and n in lines[0]), "loss")
    figure, axes = axes_of(1, 1)
    axis = axes[0][0]
    axis.plot([line["images"] for line in lines], [line.get(name) for line in lines], label="each epoch's samples")
    if problem is not None:
        axis.axhline(problem.optimum, color="black", linestyle=":", label=f"best possible, {problem.optimum:.4f}")
        axis.axhline(problem.pretrained, color="grey", linestyle="--", label=f"pretrained, {problem.pretrained:.4f}")
    axis.set(xlabel="images", ylabel={"objective": "E r - kappa KL", "reward/total": "reward"}.get(name, name))
    axis.legend()
    save(figure, path)
