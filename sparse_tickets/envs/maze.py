"""The maze as a gymnasium environment, with pictures; the built-in task of its name is fast."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete

from sparse_tickets.kernels.dynamics import maze

__all__ = ["MAZE", "Maze"]

MAZE = "sparse_tickets/Maze-v0"
_PIXELS = 16
_FREE, _WALL, _GOAL, _ENEMY, _AGENT = (
    (255, 255, 255), (60, 60, 60), (0, 158, 115), (213, 94, 0), (0, 114, 178),
)  # fmt: skip


class Maze(gymnasium.Env):
    """Reach the goal of a maze past an enemy on patrol; `kernels.dynamics.maze` has the rules.

    Observations are four channels of 49 cells, flattened, float32: walls, agent, goal, enemy.
    Actions: stay, up, right, down, left. Episodes have no end of their own but goal and enemy:
    ``gymnasium.make("sparse_tickets/Maze-v0")`` limits them to 50 steps.

    Args:
        render_mode: ``rgb_array`` or None.

    Attributes:
        state: layout, agent's cell, enemy's phase, 0: float64, as the built-in task keeps it.

    Raises:
        ValueError: another mode.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 4}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode must be rgb_array or None, got {render_mode!r}")
        self.render_mode = render_mode
        size = maze.CHANNELS * maze.CELLS
        self.observation_space = Box(0.0, 1.0, (size,), np.float32)
        self.action_space = Discrete(len(maze.ACTIONS))
        self.state = np.zeros(4)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """A layout, a start and a phase of the enemy, all equally likely."""
        super().reset(seed=seed)
        layout = int(self.np_random.integers(len(maze.LAYOUTS)))
        start = int(self.np_random.choice(maze.LAYOUTS[layout].starts))
        self.state = np.array([layout, start, int(self.np_random.integers(maze.PERIOD)), 0.0])
        return self._observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """The agent moves, then the enemy."""
        number, agent, phase = (int(value) for value in self.state[:3])
        layout, following = maze.LAYOUTS[number], (phase + 1) % maze.PERIOD
        down, right = maze.ACTIONS[int(action)]
        row, column = agent // maze.SIZE + down, agent % maze.SIZE + right
        there = row * maze.SIZE + column
        inside = 0 <= row < maze.SIZE and 0 <= column < maze.SIZE
        if not inside or there in layout.walls:
            there = agent
        enemy, comes = layout.patrol[phase], layout.patrol[following]
        self.state = np.array([number, there, following, 0.0])
        if there == layout.goal:
            reward, ended = 1.0, True
        elif there == comes or (there, agent) == (enemy, comes):
            reward, ended = -1.0, True
        else:
            reward, ended = -maze.STEP_COST, False
        return self._observe(), reward, ended, False, {}

    def render(self) -> np.ndarray | None:
        """The maze as ``[112, 112, 3]`` uint8: grey walls, a green goal, red enemy, blue agent."""
        if self.render_mode is None:
            return None
        walls, agent, goal, enemy = self._observe().reshape(maze.CHANNELS, maze.SIZE, maze.SIZE) > 0
        picture = np.full((maze.SIZE, maze.SIZE, 3), _FREE, dtype=np.uint8)
        for cells, colour in ((walls, _WALL), (goal, _GOAL), (enemy, _ENEMY), (agent, _AGENT)):
            picture[cells] = colour
        return picture.repeat(_PIXELS, 0).repeat(_PIXELS, 1)

    def _observe(self) -> np.ndarray:
        number, agent, phase = (int(value) for value in self.state[:3])
        layout = maze.LAYOUTS[number]
        channels = np.zeros((maze.CHANNELS, maze.CELLS), dtype=np.float32)
        channels[0, list(layout.walls)] = 1.0
        channels[1, agent] = channels[2, layout.goal] = channels[3, layout.patrol[phase]] = 1.0
        return channels.ravel()


gymnasium.register(
    MAZE,
    entry_point=f"{__name__}:Maze",
    max_episode_steps=maze.TIME_LIMIT,
    reward_threshold=0.9,
)
