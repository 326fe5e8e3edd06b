"""A maze with an enemy on patrol, fully seen: layouts, and one step of it in batched torch.

A 7 x 7 grid of free cells and walls; beyond its edges is wall too. An episode takes one of four
layouts, all equally likely, each with its goal, which can be reached from anywhere. The agent
starts on any other free cell off the enemy's way and stays or moves to a neighbour, unless that is
wall; then the enemy goes one cell on, forth and back along four cells in line. Reaching the goal
pays 1, being caught -1 (the enemy moves onto the agent, the agent onto the enemy, or they change
places), both end the episode; any other step costs 0.01, and the 50th is the last.

The state is (layout, agent's cell, enemy's phase, 0), cells counted row by row. The observation has
four channels of 49 cells, one after the other: walls, agent, goal, enemy.

A grid world reads tables, so unlike the `equations` of the other tasks this is written three times:
in torch here, in `cpu` and in `gpu`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

SIZE = 7
CELLS = SIZE * SIZE
CHANNELS = 4
TIME_LIMIT = 50
STEP_COST = 0.01
# Rows and columns that stay, up, right, down and left lead to.
ACTIONS = ((0, 0), (-1, 0), (0, 1), (1, 0), (0, -1))
_PATROL = 4
PERIOD = 2 * (_PATROL - 1)
# Walls, the goal, and the enemy's way; side by side.
_PICTURES = """
.##..#.  .eeee##  #..G#.#  .G.###.
.......  ..#....  #.e#...  ..##e..
e...###  ......#  ..e##..  ....e..
e..#...  #....#.  #.e...#  ...#e.#
e.....#  ....#..  ##e#...  ....e..
e......  ..#..#.  ....##.  #.#....
G...#..  ..G....  .#..#..  ...#.##
"""


class MazeLayout(NamedTuple):
    """One maze.

    Attributes:
        walls: cells that are wall.
        goal: the goal's cell.
        patrol: the enemy's cell in each of its `PERIOD` phases.
        starts: cells the agent may start on, in order.
    """

    walls: frozenset[int]
    goal: int
    patrol: tuple[int, ...]
    starts: tuple[int, ...]


def _read(pictures: str) -> Iterator[MazeLayout]:
    for rows in zip(*(line.split() for line in pictures.split("\n")[1:-1]), strict=True):
        cells = "".join(rows)
        line = [cell for cell, kind in enumerate(cells) if kind == "e"]
        yield MazeLayout(
            walls=frozenset(cell for cell, kind in enumerate(cells) if kind == "#"),
            goal=cells.index("G"),
            patrol=(*line, *line[-2:0:-1]),
            starts=tuple(cell for cell, kind in enumerate(cells) if kind == "."),
        )


LAYOUTS = tuple(_read(_PICTURES))


class Tables(NamedTuple):
    """The layouts, L of them, as tensors: int64, the walls bool.

    Attributes:
        wall: ``[L, 49]``.
        goal: ``[L]``.
        patrol: ``[L, 6]``.
        starts: ``[L, most starts]``, filled up with zeros.
        start_count: ``[L]``.
        moves: ``[5, 2]``, rows and columns that an action leads to.
    """

    wall: Tensor
    goal: Tensor
    patrol: Tensor
    starts: Tensor
    start_count: Tensor
    moves: Tensor


@cache
def tables(device: torch.device) -> Tables:
    """The layouts on a device."""

    def table(values: list, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    longest = max(len(layout.starts) for layout in LAYOUTS)
    return Tables(
        wall=table([[c in each.walls for c in range(CELLS)] for each in LAYOUTS], torch.bool),
        goal=table([each.goal for each in LAYOUTS]),
        patrol=table([each.patrol for each in LAYOUTS]),
        starts=table([[*each.starts, *[0] * (longest - len(each.starts))] for each in LAYOUTS]),
        start_count=table([len(each.starts) for each in LAYOUTS]),
        moves=table([list(move) for move in ACTIONS]),
    )


def initial(u: Tensor) -> Tensor:
    """Layout, start and phase of uniforms ``u [..., 4]``, of which the last is not used."""
    table, u = tables(u.device), u.double()
    layout = (u[..., 0] * len(LAYOUTS)).long()
    index = (u[..., 1] * table.start_count[layout]).long()
    phase = (u[..., 2] * PERIOD).long()
    return torch.stack([layout, table.starts[layout, index], phase, phase * 0], -1).double()


def _known(*numbers: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Which of these layouts, cells and phases there are; as int64, with the others at zero."""
    bounds = zip(numbers, (len(LAYOUTS), CELLS, PERIOD), strict=True)
    known = torch.stack([(number >= 0) & (number < bound) for number, bound in bounds]).all(0)
    return known, [torch.where(known, number, 0.0).long() for number in numbers]


def step(
    layout: Tensor, agent: Tensor, phase: Tensor, unused: Tensor, action: Tensor
) -> tuple[Tensor, ...]:
    """The agent moves, then the enemy; see `Task.advance`. No state of the maze leads to NaN."""
    table = tables(layout.device)
    known, (layout, agent, phase) = _known(layout, agent, phase)
    down, right = table.moves[action.long()].unbind(-1)
    row, column = agent // SIZE + down, agent % SIZE + right
    inside = (row >= 0) & (row < SIZE) & (column >= 0) & (column < SIZE)
    there = torch.where(inside, row * SIZE + column, agent)
    there = torch.where(table.wall[layout, there], agent, there)
    following = (phase + 1) % PERIOD
    enemy, comes = table.patrol[layout, phase], table.patrol[layout, following]
    reached = there == table.goal[layout]
    caught = (there == comes) | ((there == enemy) & (agent == comes))
    reward = torch.where(reached, 1.0, torch.where(caught, -1.0, -STEP_COST))
    numbers = (layout, there, following, following * 0, reward)
    ended = (reached | caught) & known
    return *(torch.where(known, number.double(), math.nan) for number in numbers), ended


def features(layout: Tensor, agent: Tensor, phase: Tensor, unused: Tensor) -> tuple[Tensor, ...]:
    """Four channels, flattened: 196 numbers; see `Task.features`."""
    table = tables(layout.device)
    known, (layout, agent, phase) = _known(layout, agent, phase)
    cells = torch.arange(CELLS, device=layout.device)
    shown = (agent, table.goal[layout], table.patrol[layout, phase])
    channels = [table.wall[layout], *(cells == place[..., None] for place in shown)]
    return torch.where(known[..., None], torch.cat(channels, -1).float(), math.nan).unbind(-1)
