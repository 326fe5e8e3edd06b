"""What the physics of classic control must compute and move, per call on ``copies`` copies.

Operations are float64 sums, products, quotients, remainders and trigonometric functions;
comparisons, choices, signs and roundings to whole numbers are free.
"""

from __future__ import annotations

from ..cost import Cost
from .reference import ACROBOT, CARTPOLE, MOUNTAIN_CAR, PENDULUM, Task

__all__ = ["initial", "observe", "step"]

_STEP = {CARTPOLE.name: 28, ACROBOT.name: 224, MOUNTAIN_CAR.name: 8, PENDULUM.name: 18}
_OBSERVE = {CARTPOLE.name: 0, ACROBOT.name: 4, MOUNTAIN_CAR.name: 0, PENDULUM.name: 2}


def initial(task: Task, copies: int) -> Cost:
    """Initial states: float32 uniforms in, float64 states out."""
    return Cost(2 * task.state_dim * copies, (4 + 8) * task.state_dim * copies)


def step(task: Task, copies: int) -> Cost:
    """One step: states and actions in; states, rewards and terminations out."""
    action = 8 if task.discrete else 4 * task.action_dim
    return Cost(_STEP[task.name] * copies, (16 * task.state_dim + action + 5) * copies)


def observe(task: Task, copies: int) -> Cost:
    """Observations: float64 states in, float32 features out."""
    moved = 8 * task.state_dim + 4 * task.observation_dim
    return Cost(_OBSERVE[task.name] * copies, moved * copies)
