"""The maze: its rules, what the best policy earns, its pictures, and trainers that solve it."""

from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch

from sparse_tickets import load_results, run_sweep
from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.envs import env_spec, make_env
from sparse_tickets.envs.maze import MAZE, Maze
from sparse_tickets.kernels import dynamics
from sparse_tickets.kernels.dynamics import TASKS, maze
from sparse_tickets.sweep.protocols import protocol

TASK = TASKS[MAZE]
STAY, UP, RIGHT, DOWN, LEFT = range(5)


def every_state():
    """``[L * 49 * 6, 4]``, ordered by layout, cell and phase."""
    counts = (len(maze.LAYOUTS), maze.CELLS, maze.PERIOD, 1)
    return torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in counts))


def index(state):
    layout, cell, phase, _ = state.long().unbind(-1)
    return (layout * maze.CELLS + cell) * maze.PERIOD + phase


def values(choose):
    """Returns ``[L, 49, 6]`` of a policy over whole episodes; it chooses of ``q [5, states]``."""
    states = every_state()
    outcomes = [
        dynamics.step(TASK, states, torch.full((len(states),), action)) for action in range(5)
    ]
    follow = torch.stack([index(successor) for successor, _, _ in outcomes])
    reward = torch.stack([reward for _, reward, _ in outcomes]).double()
    ended = torch.stack([ended for _, _, ended in outcomes])
    value = torch.zeros(len(states), dtype=torch.float64)
    for _ in range(maze.TIME_LIMIT):
        value = choose(reward + torch.where(ended, 0.0, value[follow]))
    return value.view(len(maze.LAYOUTS), maze.CELLS, maze.PERIOD)


def mean_over_starts(value):
    """Layouts, then starts and phases, are equally likely."""
    each = [value[i, list(layout.starts)].mean() for i, layout in enumerate(maze.LAYOUTS)]
    return float(torch.stack(each).mean())


def test_the_gate_is_stated_from_the_best_policy_and_the_random_one():
    best = values(lambda q: q.amax(0))
    optimum, spec = mean_over_starts(best), env_spec(MAZE)
    assert optimum == pytest.approx(0.946, abs=5e-4)
    assert optimum - 0.05 < spec.solved < optimum
    assert spec.random_return == pytest.approx(
        mean_over_starts(values(lambda q: q.mean(0))), abs=5e-4
    )
    for i, layout in enumerate(maze.LAYOUTS):
        # From anywhere, within a third of the time.
        assert best[i, list(layout.starts)].min() > 1 - maze.STEP_COST * 50 / 3


def test_layouts_are_as_drawn():
    assert len(set(maze.LAYOUTS)) == 4
    for layout in maze.LAYOUTS:
        parts = [layout.walls, {layout.goal}, set(layout.patrol), set(layout.starts)]
        assert sum(map(len, parts)) == len(frozenset().union(*parts)) == maze.CELLS
        assert len(layout.patrol) == maze.PERIOD
        assert len(set(layout.patrol)) == 4
        steps = np.diff([*layout.patrol, layout.patrol[0]])
        assert set(np.abs(steps)) in ({1}, {maze.SIZE})


def play(layout, agent, phase, *actions):
    """States, rewards and whether the episode ended, action by action."""
    state = torch.tensor([layout, agent, phase, 0], dtype=torch.float64)
    told = []
    for action in actions:
        state, reward, ended = dynamics.step(TASK, state, torch.tensor(action))
        told.append((int(state[1]), round(float(reward), 6), bool(ended)))
    return told


def test_the_rules():
    # .##..#.  The first maze: its enemy goes down and up the left side from (2, 0) to (5, 0).
    # .......
    # e...###
    # e..#...
    # e.....#
    # e......
    # G...#..
    assert maze.LAYOUTS[0].patrol == (14, 21, 28, 35, 28, 21)
    assert play(0, 0, 0, UP) == [(0, -0.01, False)], "the edge"
    assert play(0, 0, 0, RIGHT) == [(0, -0.01, False)], "a wall"
    there_and_back = [(9, -0.01, False), (8, -0.01, False), (8, -0.01, False)]
    assert play(0, 8, 0, RIGHT, LEFT, STAY) == there_and_back
    assert play(0, 43, 0, LEFT) == [(42, 1.0, True)], "the goal"
    assert play(0, 22, 0, LEFT) == [(21, -1.0, True)], "onto where the enemy comes"
    assert play(0, 21, 0, STAY) == [(21, -1.0, True)], "the enemy comes"
    assert play(0, 21, 0, UP) == [(14, -1.0, True)], "past each other"
    assert play(0, 7, 0, DOWN) == [(14, -0.01, False)], "behind its back"
    assert play(0, 15, 5, LEFT) == [(14, -1.0, True)], "it turns round"


def test_starts_are_equally_likely():
    u = torch.rand(40_000, 4, generator=torch.Generator().manual_seed(0))
    layout, cell, phase, rest = dynamics.initial(TASK, u).long().unbind(1)
    assert not rest.any()
    for i, each in enumerate(maze.LAYOUTS):
        drawn = cell[layout == i]
        assert abs(len(drawn) - 10_000) < 400
        found, count = drawn.unique(return_counts=True)
        assert tuple(found.tolist()) == each.starts
        assert (count - 10_000 / len(each.starts)).abs().max() < 100
    assert (phase.bincount(minlength=6) - 40_000 / 6).abs().max() < 400
    edge = torch.tensor([[0.0] * 4, [1 - 2**-24] * 4])
    assert dynamics.initial(TASK, edge)[:, [0, 2]].tolist() == [[0, 0], [3, 5]]


def test_the_observation_shows_four_channels():
    state = torch.tensor([2, 9, 4, 0], dtype=torch.float64)
    walls, agent, goal, enemy = dynamics.observe(TASK, state).view(4, maze.CELLS)
    layout = maze.LAYOUTS[2]
    assert set(walls.nonzero().flatten().tolist()) == layout.walls
    assert agent.nonzero().tolist() == [[9]]
    assert goal.nonzero().tolist() == [[layout.goal]]
    assert enemy.nonzero().tolist() == [[layout.patrol[4]]]


def test_gymnasium_makes_it_with_its_limit_and_its_pictures():
    env = gymnasium.make(MAZE, render_mode="rgb_array")
    assert (env.spec.max_episode_steps, env.spec.reward_threshold) == (50, env_spec(MAZE).solved)
    observation, _ = env.reset(seed=1)
    assert observation in env.observation_space
    again, _ = env.reset(seed=1)
    assert np.array_equal(observation, again)
    assert len({env.reset()[0].tobytes() for _ in range(30)}) > 20
    env.unwrapped.state = np.array([0.0, 8, 2, 0])
    picture = env.render()
    assert picture.shape == (112, 112, 3)
    assert picture.dtype == np.uint8
    colours = {
        place: tuple(picture[16 * row + 5, 16 * column + 5].tolist())
        for place, (row, column) in {
            "agent": (1, 1), "goal": (6, 0), "enemy": (4, 0), "wall": (0, 1), "free": (0, 0),
        }.items()
    }  # fmt: skip
    assert len(set(colours.values())) == 5
    assert colours["free"] == (255, 255, 255)
    ends = [env.step(STAY)[3] for _ in range(50)]
    assert ends == [False] * 49 + [True]
    assert gymnasium.make(MAZE).unwrapped.render() is None
    with pytest.raises(ValueError, match="render_mode must be rgb_array or None, got 'human'"):
        Maze(render_mode="human")


def test_the_name_is_the_fast_one_everywhere():
    env = make_env(MAZE, 2, 3)
    assert env.task == TASK
    obs = env.reset(torch.arange(2))
    assert obs.shape == (2, 3, 196)
    assert set(obs.unique().tolist()) == {0.0, 1.0}
    assert replace(env.spec, name="x").time_limit == maze.TIME_LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["ppo", "dqn", "bc"])
def test_the_protocol_solves_it(algo, tmp_path):
    spec = protocol(MAZE)
    spec = replace(
        spec,
        algos=(algo,),
        seeds=2,
        levels=1,
        bc=replace(spec.bc, experts=1),
        evaluation=Evaluation(points=4, episodes=32, final_episodes=200),
    )
    run_sweep(spec, tmp_path)
    assert (load_results(tmp_path)["return_final"] >= spec.env_spec.solved).all()
