"""Built-in tasks for a population, in batched tensors: physics, restarts and time limit."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_tickets.kernels.dynamics import TASKS
from sparse_tickets.kernels.dynamics.copies import Copies
from sparse_tickets.kernels.errors import check_dtype, check_shape
from sparse_tickets.kernels.random import Stream

from .maze import MAZE
from .noise import Noise
from .spec import EnvSpec, Step

__all__ = ["CLASSIC_SPECS", "ClassicEnv"]


def _spec(
    name: str,
    offset: tuple[float, ...],
    scale: tuple[float, ...],
    solved: float,
    random_return: float,
) -> EnvSpec:
    task = TASKS[name]
    return EnvSpec(
        name=name,
        observation_dim=task.observation_dim,
        discrete=task.discrete,
        action_dim=task.action_dim,
        action_low=task.action_low,
        action_high=task.action_high,
        time_limit=task.time_limit,
        offset=offset,
        scale=scale,
        solved=solved,
        random_return=random_return,
    )


# Offsets, scales and random returns are those that experiments/pilot.py prints, but the maze's
# random return is exact. Solved is gymnasium's reward threshold; for Pendulum, which has none, the
# protocol's gate; for the maze a little below the best policy's 0.946, by dynamic programming.
CLASSIC_SPECS = {
    spec.name: spec
    for spec in (
        _spec("CartPole-v1", (0.0,) * 4, (1.0,) * 4, 475.0, 22.2),
        _spec(
            "Acrobot-v1",
            (0.74, 0.0, 0.0, 0.0, 0.0, 0.0),
            (0.4, 0.54, 0.61, 0.64, 1.8, 3.3),
            -100.0,
            -498.3,
        ),
        _spec("MountainCar-v0", (-0.51, 0.0), (0.27, 0.02), -110.0, -200.0),
        _spec("Pendulum-v1", (0.0,) * 3, (0.82, 0.53, 2.8), -250.0, -1216.7),
        _spec(MAZE, (0.0,) * 196, (1.0,) * 196, 0.9, -0.545),
    )
}
"""The built-in environments by name."""


class ClassicEnv(Copies):
    """E copies of a built-in task for each of P tickets.

    Random numbers: `reset` draws ``E * S`` uniforms per ticket with step 0 on `reset_stream`, and
    the restarts after step t (counted from 0) draw as many with step t + 1; copy e takes uniforms
    ``[e * S, (e + 1) * S)``, used or not. The `rollout` op keeps to this where it advances `state`,
    `elapsed` and `clock` itself.

    Args:
        task_name: one of `TASKS`.
        tickets: P.
        copies: E.
        device: where tensors live.
        spec: observation scale, by default the frozen one of the task.
        reset_stream: stream of the initial states; evaluation uses another than training.
        noise: inputs that are noise; drawn as `Copies` says.

    Attributes:
        state: ``[P, E, S]`` float64.
        elapsed: ``[P, E]`` int32, steps since each copy's last restart.
        clock: steps since `reset`: an integer, or a tensor after `keep_clock_on_device`.
        key: ``[P]`` int64, as given to `reset`.
        offset: ``[D]`` float32.
        scale: ``[D]`` float32.

    Raises:
        ValueError: an unknown task, no tickets or no copies, or a spec of another task's shape.
    """

    def __init__(
        self,
        task_name: str,
        tickets: int,
        copies: int,
        device: torch.device | str = "cpu",
        *,
        spec: EnvSpec | None = None,
        reset_stream: Stream = Stream.RESET,
        noise: Noise | None = None,
    ) -> None:
        if task_name not in TASKS:
            raise ValueError(f"task_name must be one of {', '.join(TASKS)}, got {task_name!r}")
        for name, count in (("tickets", tickets), ("copies", copies)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        task = TASKS[task_name]
        expected = CLASSIC_SPECS[task_name]
        if noise is not None:
            expected = noise.spec(expected, task_name)
        self.spec = expected if spec is None else spec
        if self.spec.observation_dim != expected.observation_dim:
            raise ValueError(
                f"spec must have observation_dim {expected.observation_dim} for {task_name}, "
                f"got {self.spec.observation_dim}"
            )
        self.tickets = tickets
        self.device = device = torch.device(device)
        shape = (tickets, copies)
        source = None
        if noise is not None:
            places = noise.source(task.observation_dim)
            source = torch.tensor(places, dtype=torch.int64, device=device)
        super().__init__(
            task,
            copies,
            offset=torch.tensor(self.spec.offset, dtype=torch.float32, device=device),
            scale=torch.tensor(self.spec.scale, dtype=torch.float32, device=device),
            reset_stream=reset_stream,
            key=None,
            state=torch.zeros((*shape, task.state_dim), dtype=torch.float64, device=device),
            elapsed=torch.zeros(shape, dtype=torch.int32, device=device),
            clock=0,
            source=source,
        )

    def reset(self, key: Tensor) -> Tensor:
        """Start every copy afresh; see `Env.reset`."""
        check_dtype("key", key, torch.int64)
        check_shape("key", key, (self.tickets,))
        self.key = key.to(self.device)
        self.clock = 0
        self.state = self.draw_initial(self.key, self.reset_stream, self.clock)
        self.elapsed = torch.zeros_like(self.elapsed)
        return self.observe(self.state)

    def keep_clock_on_device(self) -> None:
        """Turn `clock` into an int64 tensor ``[]`` until the next `reset`.

        A CUDA graph replays integers as they were captured. From here on `clock`, `state` and
        `elapsed` change in place, so that every replay of a captured rollout goes on from the last.
        """
        self.clock = torch.as_tensor(self.clock, dtype=torch.int64, device=self.device)

    def step(self, action: Tensor) -> Step:
        """Act once in every copy; see `Env.step`.

        Raises:
            RuntimeError: `reset` was never called.
            TypeError, ValueError: see `sparse_tickets.kernels.dynamics.step`.
        """
        return Step(*super().step(action))
