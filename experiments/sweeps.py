"""Sweeps that several experiments draw on: trained once, whichever needs them first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import polars as pl

from experiments.frame import Place
from sparse_tickets import Sweep
from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.analysis.transfer import stored_tickets as tickets
from sparse_tickets.envs import ClassicEnv, env_spec, register_env
from sparse_tickets.envs.maze import MAZE
from sparse_tickets.sweep.protocols import protocol
from sparse_tickets.sweep.store import Store

__all__ = [
    "INPUTS",
    "LEVEL",
    "SCALED",
    "Extended",
    "SharedSweep",
    "acrobot",
    "acrobot_whole",
    "cartpole",
    "cartpole_deep",
    "cartpole_late",
    "dqn",
    "dqn_squared",
    "first_maze",
    "hopper",
    "later_seeds",
    "levels",
    "lunar_lander",
    "maze",
    "maze_extended",
    "mountain_car",
    "mountain_car_extended",
    "mountain_car_ppo",
    "own_controls",
    "pendulum",
    "pendulum_deep",
    "pendulum_extended",
    "pendulum_sac",
    "pendulum_sac_extended",
    "quickly",
    "scaled",
    "taught",
    "tickets",
]

TICKET = "mask/weights"
LEVEL = 0.2
"""Share of the remaining weights that the protocol prunes per level: the unit of levels here."""
SEEDS = 15
"""The protocol's."""
SCALED = "CartPole-v1 scaled"
"""CartPole with observations of unit variance, by the numbers that `pilot.py` prints."""
_RAW = env_spec("CartPole-v1")
register_env(
    SCALED,
    partial(ClassicEnv, "CartPole-v1"),
    replace(_RAW, name=SCALED, scale=(0.57, 0.44, 0.066, 0.58)),
)
INPUTS = dict.fromkeys(
    ("CartPole-v1", SCALED), ("cart position", "cart velocity", "pole angle", "pole velocity")
) | {
    "Acrobot-v1": (
        "cosine 1", "sine 1", "cosine 2", "sine 2", "velocity 1", "velocity 2",
    ),
    "Pendulum-v1": ("cosine", "sine", "velocity"),
    "MountainCar-v0": ("position", "velocity"),
    "LunarLander-v3": (
        "x", "y", "x velocity", "y velocity", "angle", "angular velocity", "left leg", "right leg",
    ),
    "Hopper-v5": (
        "height", "torso angle", "thigh angle", "leg angle", "foot angle", "x velocity",
        "z velocity", "torso velocity", "thigh velocity", "leg velocity", "foot velocity",
    ),
}  # fmt: skip
"""What the numbers of an observation are."""


@dataclass(frozen=True)
class SharedSweep:
    """A sweep by the name of its folder; called, it is trained where it is not yet.

    `cells` trains only what is not stored either: for those who need no weights and no masks.
    """

    name: str
    full: Callable[[], Sweep]

    def spec(self, place: Place) -> Sweep:
        return quickly(self.full()) if place.quick else self.full()

    def __call__(self, place: Place) -> tuple[Sweep, Store]:
        spec = self.spec(place)
        return spec, place.sweep(self.name, spec)

    def cells(self, place: Place) -> pl.DataFrame:
        return place.cells(self.name, self.spec(place))

    def wanted(self, place: Place) -> bool:
        return place.wants(self.name, self.spec(place))


@dataclass(frozen=True)
class Extended:
    """A shared sweep and what was trained for it later: its cells together, no weights.

    What comes later is a sweep of its own, so that cells that are stored stay what they are.
    """

    first: SharedSweep
    later: tuple[SharedSweep, ...]

    def cells(self, place: Place) -> pl.DataFrame:
        found = [self.first.cells(place)]
        for each in () if place.quick else self.later:
            spec = each.spec(place)
            # Other controls of the same seeds train the same dense policies, which are kept once.
            if place.wants(each.name, spec, dense=False):
                found.append(place.cells(each.name, spec, dense=False))
        cell = ("algo", "level", "seed", "condition", "controls")
        return pl.concat(found, how="diagonal").unique(cell, keep="first", maintain_order=True)

    def wanted(self, place: Place) -> bool:
        return self.first.wanted(place)


def own_controls(sweep: SharedSweep) -> SharedSweep:
    """Shuffled policies of a shared sweep that prune by their own training."""

    def full() -> Sweep:
        shuffled = ("mask/permuted", "permuted/permuted")
        return replace(sweep.full(), conditions=shuffled, controls=("own",))

    return SharedSweep(f"{sweep.name}-own", full)


def later_seeds(sweep: SharedSweep) -> SharedSweep:
    """The seeds that a shared sweep lacks to the protocol's."""

    def full() -> Sweep:
        spec = sweep.full()
        return replace(spec, first_seed=spec.seeds, seeds=SEEDS - spec.seeds)

    return SharedSweep(f"{sweep.name}-later", full)


@partial(SharedSweep, "cartpole")
def cartpole() -> Sweep:
    """CartPole with both kinds of controls, down to where tickets themselves degrade.

    Two of the protocol's levels at a time (0.64 is 0.8 squared), at two fifths of its budget.
    """
    spec = protocol("CartPole-v1")
    return replace(
        spec,
        controls=("own", "ticket"),
        seeds=6,
        levels=11,
        rate=0.36,
        ppo=replace(spec.ppo, steps=204_800),
        evaluation=Evaluation(points=10, episodes=16, final_episodes=50),
    )


@partial(SharedSweep, "acrobot")
def acrobot() -> Sweep:
    """Acrobot by the protocol's seeds, with controls of one kind.

    Dense PPO is there after a seventh of the protocol's steps; a quarter is trained here.
    """
    spec = protocol("Acrobot-v1")
    return replace(
        spec,
        controls=("ticket",),
        levels=7,
        rate=0.488,
        ppo=replace(spec.ppo, steps=122_880),
        evaluation=Evaluation(points=10, episodes=8, final_episodes=32),
    )


@partial(SharedSweep, "acrobot-whole")
def acrobot_whole() -> Sweep:
    """`acrobot` by the protocol's whole budget: a quarter is too little by the protocol's check."""
    return replace(acrobot.full(), ppo=protocol("Acrobot-v1").ppo)


@partial(SharedSweep, "pendulum")
def pendulum() -> Sweep:
    """Pendulum by PPO and cloning, at few levels; experts by the protocol's whole budget."""
    spec = protocol("Pendulum-v1")
    spec = _few_levels(replace(spec, bc=replace(spec.bc, expert_steps=spec.ppo.steps)), "ppo")
    return replace(spec, ppo=replace(spec.ppo, steps=204_800))


@partial(SharedSweep, "pendulum-deep")
def pendulum_deep() -> Sweep:
    """`pendulum`'s tickets alone, of all seeds and to fewer weights: there none had degraded."""
    spec = pendulum.full()
    return replace(spec, conditions=(TICKET,), controls=("own",), seeds=SEEDS, levels=8)


@partial(SharedSweep, "pendulum-sac")
def pendulum_sac() -> Sweep:
    """Pendulum by SAC and by cloning what SAC's whole budget gives, at `pendulum`'s levels.

    Dense SAC is there after a fifth of the protocol's steps; three fifths are trained here.
    """
    spec = protocol("Pendulum-v1")
    bc = replace(spec.bc, expert="sac", expert_steps=spec.sac.steps)
    spec = _few_levels(replace(spec, bc=bc), "sac", seeds=8)
    ppo, sac = replace(spec.ppo, steps=204_800), replace(spec.sac, steps=12_000)
    return replace(spec, ppo=ppo, sac=sac)


@partial(SharedSweep, "maze-tracks")
def maze() -> Sweep:
    """The maze by PPO's whole budget and by cloning, at few levels."""
    return _few_levels(first_maze(), "ppo", seeds=10)


def first_maze() -> Sweep:
    """The maze's protocol when its sweeps were trained: tanh, and less exploration."""
    spec = protocol(MAZE)
    return replace(spec, activation="tanh", ppo=replace(spec.ppo, entropy_coef=0.02))


@partial(SharedSweep, "mountaincar")
def mountain_car() -> Sweep:
    """MountainCar by DQN's whole budget and by cloning, at few levels; experts by PPO's."""
    spec = protocol("MountainCar-v0")
    bc = replace(spec.bc, expert_steps=spec.ppo.steps)
    spec = _few_levels(replace(spec, bc=bc), "dqn", seeds=10)
    return replace(spec, ppo=replace(spec.ppo, steps=204_800))


@partial(SharedSweep, "mountaincar-ppo")
def mountain_car_ppo() -> Sweep:
    """MountainCar by PPO and by cloning, at `mountain_car`'s levels.

    Dense PPO is there after a seventh of the protocol's steps; half are trained here.
    """
    spec = protocol("MountainCar-v0")
    bc = replace(spec.bc, expert_steps=spec.ppo.steps)
    spec = _few_levels(replace(spec, bc=bc), "ppo", seeds=SEEDS)
    return replace(spec, ppo=replace(spec.ppo, steps=499_712))


def _few_levels(spec: Sweep, algo: str, seeds: int = 6) -> Sweep:
    """Four of the protocol's levels at a time: an algorithm and cloning."""
    return replace(
        spec,
        algos=(algo, "bc"),
        conditions=(TICKET, "mask/permuted", "permuted/permuted"),
        controls=("ticket",),
        seeds=seeds,
        levels=5,
        rate=1 - (1 - LEVEL) ** 4,
        chunk=9,
        evaluation=Evaluation(points=10, episodes=8, final_episodes=32),
    )


@partial(SharedSweep, "lunarlander")
def lunar_lander() -> Sweep:
    """LunarLander by PPO and cloning, three of its protocol's levels at a time, in half its steps.

    Three experts have the whole budget, and must solve the task.
    """
    spec = protocol("LunarLander-v3")
    return replace(
        spec,
        controls=("ticket",),
        seeds=6,
        levels=4,
        rate=1 - (1 - spec.rate) ** 3,
        ppo=replace(spec.ppo, steps=491_520),
        bc=replace(spec.bc, experts=3, expert_steps=spec.ppo.steps),
        evaluation=Evaluation(points=10, episodes=4, final_episodes=20),
    )


@partial(SharedSweep, "hopper")
def hopper() -> Sweep:
    """Hopper by PPO, four of its protocol's levels at a time, in a fifth of its steps."""
    spec = protocol("Hopper-v5")
    return replace(
        spec,
        algos=("ppo",),
        controls=("ticket",),
        seeds=3,
        levels=3,
        rate=1 - (1 - spec.rate) ** 4,
        ppo=replace(spec.ppo, steps=200_704),
        evaluation=Evaluation(points=10, episodes=2, final_episodes=10),
    )


@partial(SharedSweep, "cartpole-dqn")
def dqn() -> Sweep:
    """DQN and cloning on CartPole from `cartpole`'s initial networks, at half of its levels.

    DQN has the protocol's whole budget, since half of it leaves dense seeds below the gate. Its
    loss is Huber's, the protocol's when this was trained.
    """
    spec = cartpole.full()
    return replace(
        spec,
        algos=("dqn", "bc"),
        dqn=replace(spec.dqn, loss="huber", epsilon=0.04),
        conditions=(TICKET, "mask/permuted", "permuted/permuted"),
        controls=("ticket",),
        rate=1 - (1 - spec.rate) ** 2,
        levels=6,
        chunk=9,
    )


@partial(SharedSweep, "cartpole-dqn-squared")
def dqn_squared() -> Sweep:
    """`dqn` by the protocol of today, whose loss is the squared error: every dense seed learns."""
    return replace(dqn.full(), dqn=protocol("CartPole-v1").dqn, seeds=SEEDS, levels=5)


def taught(states: str) -> SharedSweep:
    """Cloning on CartPole in other states than a frozen data set's; tickets and random masks."""

    def full() -> Sweep:
        spec = cartpole.full()
        return replace(
            spec,
            algos=("bc",),
            conditions=(TICKET, "random/re-init"),
            controls=("own",),
            bc=replace(spec.bc, states=states),
        )

    return SharedSweep(f"cartpole-{states}", full)


@partial(SharedSweep, "cartpole-scaled")
def scaled() -> Sweep:
    """PPO's tickets of CartPole by scaled observations."""
    return replace(
        cartpole.full(),
        env=SCALED,
        algos=("ppo",),
        conditions=(TICKET,),
        controls=("own",),
    )


@partial(SharedSweep, "cartpole-deep")
def cartpole_deep() -> Sweep:
    """CartPole's tickets alone, by the protocol's budget, to its last level and fewer weights."""
    return replace(
        protocol("CartPole-v1"),
        conditions=(TICKET,),
        levels=16,
        rate=0.36,
        evaluation=Evaluation(points=10, episodes=16, final_episodes=50),
    )


pendulum_extended = Extended(pendulum, (own_controls(pendulum),))
pendulum_sac_extended = Extended(pendulum_sac, (later_seeds(pendulum_sac),))
mountain_car_extended = Extended(mountain_car, (later_seeds(mountain_car),))
maze_extended = Extended(maze, (later_seeds(maze),))


@partial(SharedSweep, "cartpole-late")
def cartpole_late() -> Sweep:
    """PPO of `cartpole_deep` rewound to a tenth of the training, at half of its levels."""
    spec = cartpole_deep.full()
    return replace(
        spec,
        algos=("ppo",),
        seeds=10,
        levels=5,
        rate=1 - (1 - spec.rate) ** 2,
        rewind_step=round(0.1 * spec.ppo.iterations) * spec.ppo.batch,
    )


def quickly(spec: Sweep) -> Sweep:
    """The same sweep, tiny."""
    return replace(
        spec,
        seeds=2,
        levels=3,
        rewind_step=128 if spec.rewind_step else 0,
        ppo=replace(spec.ppo, copies=4, horizon=32, minibatches=2, steps=8 * 128),
        dqn=replace(spec.dqn, steps=1024, warmup=64, updates=4),
        sac=replace(spec.sac, steps=512, warmup=64, updates=2),
        bc=replace(spec.bc, experts=1, expert_gate=-1e9, expert_steps=None),
        evaluation=Evaluation(points=2, episodes=4, final_episodes=4),
    )


def levels(store: Store, algo: str) -> list[int]:
    """The levels an algorithm has finished."""
    return sorted({unit.level for unit in store.units() if unit.algo == algo and store.has(unit)})
