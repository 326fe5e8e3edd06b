"""What a sweep is: a frozen, hashed specification."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from sparse_tickets.algos.algorithm import TrainingBudget
from sparse_tickets.algos.bc import BC
from sparse_tickets.algos.dqn import DQN
from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.algos.ppo import PPO
from sparse_tickets.algos.registry import ALGORITHMS, find_algorithm
from sparse_tickets.algos.sac import SAC
from sparse_tickets.algos.teaching import FIRST_EXPERT_SEED
from sparse_tickets.conditions import find_condition
from sparse_tickets.dynamic import METHODS, Method, Pruning
from sparse_tickets.envs import EnvSpec, env_spec
from sparse_tickets.kernels.activations import ACTIVATIONS
from sparse_tickets.kernels.arena import ARCHITECTURES, Arena
from sparse_tickets.kernels.random import derive_key
from sparse_tickets.linear import count_kept
from sparse_tickets.population import INITIALISATIONS, policy_arena
from sparse_tickets.prune import CRITERIA, kept
from sparse_tickets.settings import at_least, check_fields, inside, within

__all__ = ["CONTROLS", "Sweep", "Track"]

CONTROLS = ("own", "ticket")
PRUNE_BY = ("final", "best")
TICKET = "mask/weights"
# How conditions treat a critic under the mask, hashed where there is one. 1 (not recorded): random
# conditions pruned it in one shot. 2: every condition prunes it iteratively.
_CRITIC_LAYOUT = 2
# Fields that came later, left out of the hash where they ask for nothing.
_LATER: dict[str, Any] = {
    "architecture": "mlp",
    "during": "none",
    "during_critic": None,
    "during_every": None,
    "first_seed": 0,
    "prune_by": "final",
}
# Settings that came later: no part of a sweep that does not train by them, so that what was stored
# before keeps its name.
_OWN_SETTINGS: dict[str, type] = {"dqn": DQN, "sac": SAC}
_EXPERTS_CHOICE = {"expert": "ppo", "temperature": 1.0}
_EXPERTS_STATES = {"states": "expert"}
_DQN_LOSS = {"loss": "huber"}


@dataclass(frozen=True)
class Track:
    """One chain over the levels: a seed under a condition.

    Attributes:
        seed: index of the repetition; fixes the initial weights.
        condition: a name in the conditions registry, or ``dense`` at level 0.
        controls: ``own`` if the track prunes by its own trained network, ``ticket`` if it takes
            masks from the same seed's mask/weights track, ``shared`` at level 0.
    """

    seed: int
    condition: str
    controls: str

    @property
    def source(self) -> Track:
        """The track whose trained network decides this track's next mask."""
        return Track(self.seed, TICKET, "own") if self.controls == "ticket" else self


@dataclass(frozen=True)
class Sweep:
    """A lottery-ticket study: every condition, seed and level of one environment."""

    env: str = "CartPole-v1"
    """CartPole-v1, Acrobot-v1, MountainCar-v0, Pendulum-v1, sparse_tickets/Maze-v0, your own,
    any gymnasium id, or envpool: and a task of envpool;
    +noise=16 after all but the last adds 16 inputs of pure noise (+noise=16,seed=1: elsewhere)."""
    algos: tuple[str, ...] = ("ppo", "bc")
    """Training algorithms: ppo, dqn, sac, bc (behavioural cloning of experts), and your own."""
    conditions: tuple[str, ...] = (
        TICKET,
        "mask/permuted",
        "permuted/permuted",
        "random/re-init",
    )
    """Mask and initial weights a track trains with; also mask/re-init, permuted/re-init,
    erk-random/re-init and your own."""
    controls: tuple[str, ...] = ("own",)
    """own: each condition prunes by its own trained network; ticket: by mask/weights'."""
    seeds: int = 15
    """Repetitions, numbered from first_seed."""
    first_seed: int = 0
    """Number of the first repetition. None depends on the others: 5 seeds from 10 on are those that
    a finished sweep of 10 lacks to 15."""
    levels: int = 20
    """Trainings per track, the dense one included."""
    rate: float = 0.2
    """Fraction of the remaining weights pruned per level."""
    criterion: str = "magnitude"
    """Which weights stay: magnitude, layerwise-magnitude, movement, magnitude-increase, yours;
    or a structure's magnitudes: 1:4, 2:4, fan-in, block-16, block-32, block-64."""
    prune_by: str = "final"
    """Whose values rank the weights: final, those that training ends with, or best, those of its
    best evaluation."""
    rewind_step: int = 0
    """Step of dense training to rewind to, a multiple of copies x horizon; 0: initialisation."""
    hidden: tuple[int, ...] = (64, 64)
    """Hidden sizes of actor, critic, Q-network and student; of residual networks the stream's
    width, then each block's inner size, as in 64 256 256."""
    architecture: str = "mlp"
    """mlp, or residual: h + W2 act(W1 LN(h) + b1) + b2, block after block (SimBa)."""
    activation: str = "tanh"
    """Between layers: tanh, relu, elu, silu or gelu; layernorm-relu (or another of them) normalises
    a sample's units first, in plain torch on a GPU."""
    init: str = "lecun"
    """Initialisation: lecun, kaiming, orthogonal or rescaled (every layer prunes alike)."""
    during: str = "none"
    """How networks become sparse: none (pruned after training, level by level), or while they
    train: gradual, one-shot, snip, static, static-uniform, set or rigl. Then every level trains
    each seed from its initial weights to the level's density; conditions do not apply."""
    during_critic: str | None = None
    """With prune_critic: another of these methods for the critics, pruned to the same density apart
    from the actor; default: one method for all networks together."""
    during_every: int | None = None
    """Gradient steps between two updates of the masks; default: the method's."""
    log_std: float = 0.0
    """Initial log standard deviation of continuous actions."""
    prune_critic: bool = False
    """Prune the critic's weights too, jointly with the actor's, alike in every condition."""
    chunk: int = 64
    """Most tracks trained together; results do not depend on it."""
    ppo: PPO = field(default_factory=PPO)
    dqn: DQN = field(default_factory=DQN)
    sac: SAC = field(default_factory=SAC)
    bc: BC = field(default_factory=BC)
    evaluation: Evaluation = field(default_factory=Evaluation)
    settings: dict = field(default_factory=dict, hash=False)
    """Settings of your own algorithms by name; theirs by default."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            # Experts are trained from the seeds beyond.
            {"seeds": within(1, FIRST_EXPERT_SEED), "rate": inside(0, 1)}
            | dict.fromkeys(("levels", "chunk", "hidden", "during_every"), at_least(1)),
        )
        check_fields(self, {"first_seed": within(0, FIRST_EXPERT_SEED - self.seeds)})
        for name, chosen, allowed in (
            ("algos", self.algos, tuple(ALGORITHMS)),
            ("controls", self.controls, CONTROLS),
        ):
            if not chosen or any(value not in allowed for value in chosen):
                raise ValueError(f"{name} must be among {', '.join(allowed)}, got {chosen}")
        for condition in self.conditions:
            find_condition(condition)
        for name in ("algos", "conditions", "controls"):
            chosen = getattr(self, name)
            if not chosen or len(set(chosen)) < len(chosen):
                raise ValueError(f"{name} must be at least one, each once, got {chosen}")
        for name, given, known in (
            ("init", self.init, INITIALISATIONS),
            ("activation", self.activation, ACTIVATIONS),
            ("architecture", self.architecture, ARCHITECTURES),
            ("criterion", self.criterion, CRITERIA),
            ("prune_by", self.prune_by, PRUNE_BY),
            ("during", self.during, ("none", *METHODS)),
            ("during_critic", self.during_critic, (None, *METHODS)),
        ):
            if given not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(str, known))}, got {given!r}"
                )
        if self.during != "none" and self.rewind_step:
            raise ValueError(
                f"rewind_step must be 0 where networks are pruned during training, got "
                f"{self.rewind_step}"
            )
        if self.during_critic is not None and (self.during == "none" or not self.prune_critic):
            raise ValueError(
                "during_critic must be None unless prune_critic is set and during names the "
                f"actor's method, got {self.during_critic!r}"
            )
        if self.prune_critic and not any(find_algorithm(algo).has_critic for algo in self.algos):
            raise ValueError(
                f"prune_critic must be False where no algorithm has a critic, got it for "
                f"{', '.join(self.algos)}"
            )
        if self.during != "none" and self.prune_by != "final":
            raise ValueError(
                "prune_by must be final where networks are pruned during training, by the weights "
                f"of the moment, got {self.prune_by!r}"
            )
        if self.architecture == "residual" and not self.hidden:
            raise ValueError(
                "hidden must name the width of residual networks, and each block's inner size, got "
                f"{self.hidden}"
            )
        if "ticket" in self.controls and TICKET not in self.conditions:
            raise ValueError(f"controls 'ticket' need the condition {TICKET!r} in conditions")
        object.__setattr__(self, "settings", _completed(self.settings))
        for algo in self.algos:
            self._check_rewind(self.budget(algo))

    def _check_rewind(self, budget: TrainingBudget) -> None:
        steps = budget.iterations * budget.batch
        if not 0 <= self.rewind_step < steps:
            raise ValueError(
                f"rewind_step must be in [0, steps trained = {steps}), got {self.rewind_step}"
            )
        if self.rewind_step % budget.batch:
            raise ValueError(
                f"rewind_step must be a multiple of copies * horizon = {budget.batch}, "
                f"got {self.rewind_step}"
            )

    @property
    def env_spec(self) -> EnvSpec:
        """Spaces and observation scale of the environment."""
        return env_spec(self.env)

    def budget(self, algo: str) -> TrainingBudget:
        """How long an algorithm trains: its own settings where they say, else PPO's."""
        own = self.settings_of(algo)
        return own if isinstance(own, TrainingBudget) else self.ppo

    def rewind_iteration(self, algo: str) -> int:
        """The iteration of an algorithm's training that `rewind_step` falls on."""
        return self.rewind_step // self.budget(algo).batch

    def train_steps(self, algo: str, level: int) -> int:
        """Environment steps (or imitated transitions) a ticket is trained for at a level."""
        budget, skipped = self.budget(algo), 0 if level == 0 else self.rewind_iteration(algo)
        return (budget.iterations - skipped) * budget.batch

    def arena(self, algo: str) -> Arena:
        """The parameter layout of an algorithm's tickets; a cloned student has no critic.

        A student is squashed as its experts are.
        """
        return self._layout(algo, prune_critic=self.prune_critic)

    @property
    def expert_arena(self) -> Arena:
        """The experts' layout, never pruned: with critics where PPO or SAC trains them."""
        return self._layout(self.bc.expert, prune_critic=False)

    def _layout(self, algo: str, *, prune_critic: bool) -> Arena:
        algorithm = find_algorithm(algo)
        acts_like = find_algorithm(self.bc.expert) if algorithm.imitates else algorithm
        critic = algorithm.has_critic
        return policy_arena(
            self.env_spec,
            self.hidden,
            activation=self.activation,
            architecture=self.architecture,
            critic=critic,
            prune_critic=prune_critic and critic,
            squashed=getattr(acts_like, "squashed", False),
        )

    @property
    def imitating(self) -> tuple[str, ...]:
        """The algorithms that learn from experts' demonstrations."""
        return tuple(algo for algo in self.algos if find_algorithm(algo).imitates)

    @property
    def expert_budget(self) -> PPO | DQN | SAC:
        """How the experts are trained."""
        budget: PPO | DQN | SAC = getattr(self, self.bc.expert)
        steps = self.bc.expert_steps
        return budget if steps is None else replace(budget, steps=steps)

    def settings_of(self, algo: str) -> Any:
        """An algorithm's own settings."""
        return self.settings[algo] if algo in self.settings else getattr(self, algo)

    def density(self, level: int) -> float:
        """The nominal density of a level, (1 - rate)^level."""
        return (1.0 - self.rate) ** level

    def kept(self, algo: str, level: int) -> int:
        """The exact number of weights a ticket keeps at a level."""
        return kept(self.arena(algo).prunable, level, self.rate)

    def pruning(self, algo: str, level: int) -> Pruning | None:
        """How a level's networks are pruned while they train; None if they are not."""
        if self.during == "none" or level == 0:
            return None
        arena, kept = self.arena(algo), self.kept(algo, level)
        density, critic = kept / arena.prunable, None
        inner = sum(out * inp for _, out, inp in arena.prunable_layers()[: arena.actor.depth])
        if self.during_critic is not None and inner < arena.prunable:
            # Whatever rounding leaves, together they keep what the level does.
            rest = (kept - count_kept(density, inner)) / (arena.prunable - inner)
            critic = Pruning(self._method(self.during_critic), rest)
        return Pruning(self._method(self.during), density, critic)

    def _method(self, name: str) -> Method:
        method, every = METHODS[name], self.during_every
        return method if every is None else replace(method, every=every)

    def chained(self, condition: str) -> bool:
        """Whether a condition's level needs a trained network of the level before.

        A critic under the mask makes a chain of every condition: random masks are the actor's,
        while the critic, in which conditions do not differ, is pruned by its training.
        """
        return self.prune_critic or find_condition(condition).chained

    def tracks(self, level: int) -> list[Track]:
        """All tracks trained at a level, in a fixed order."""
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        if level == 0:
            return [Track(seed, "dense", "shared") for seed in seeds]
        if self.during != "none":
            return [Track(seed, self.during, "own") for seed in seeds]
        tracks = []
        for controls in CONTROLS:
            for name in self.conditions:
                # Without a chain, or being the ticket itself, both kinds of controls coincide.
                single = name == TICKET or not self.chained(name)
                wanted = controls == "own" if single else controls in self.controls
                if wanted:
                    tracks += [Track(seed, name, controls) for seed in seeds]
        return tracks

    @property
    def cells(self) -> tuple[int, int]:
        """How many tracks are trained at level 0, and at each level above."""
        return len(self.tracks(0)), len(self.tracks(1))

    def units(self, algo: str) -> Iterator[tuple[int, int, list[Track]]]:
        """Yield ``(level, chunk index, tracks)`` in the order of training."""
        for level in range(self.levels):
            for chunk in range(-(-len(self._tracks[level > 0]) // self.chunk)):
                yield level, chunk, self.together(level, chunk)

    def together(self, level: int, chunk: int) -> list[Track]:
        """The tracks of one chunk of a level, in order."""
        return self._tracks[level > 0][chunk * self.chunk : (chunk + 1) * self.chunk]

    def place(self, track: Track, level: int) -> tuple[int, int]:
        """The chunk of a level that a track is in, and its index there."""
        return divmod(self._places[level > 0][track], self.chunk)

    # Of level 0 and of every other; asked for cell by cell, where there may be thousands.
    @cached_property
    def _tracks(self) -> tuple[list[Track], list[Track]]:
        return self.tracks(0), self.tracks(1)

    @cached_property
    def _places(self) -> tuple[dict[Track, int], dict[Track, int]]:
        first, later = ({each: at for at, each in enumerate(tracks)} for tracks in self._tracks)
        return first, later

    def key(self, algo: str, track: Track, level: int) -> int:
        """The random key of a cell: everything but the initial weights is drawn from it."""
        return derive_key(
            "cell", self.env, algo, track.seed, track.condition, track.controls, level
        )

    def initial_key(self, seed: int) -> int:
        """The random key of a seed's initial weights, the same for every algorithm."""
        return derive_key("init", self.env, seed)

    def to_dict(self) -> dict:
        """Plain JSON types, observation scale included, as stored and hashed."""
        spec = self.env_spec
        scale = {"offset": list(spec.offset), "scale": list(spec.scale)}
        content = asdict(self) | {"observations": scale}
        # Of the algorithms that are trained: one more in the registry makes no other sweep of this.
        own = content.pop("settings")
        for name in _OWN_SETTINGS.keys() - {*self.algos, self.bc.expert}:
            del content[name]
        if self.bc.expert == _EXPERTS_CHOICE["expert"]:
            for name in _EXPERTS_CHOICE:
                del content["bc"][name]
        if self.bc.states == "expert":
            del content["bc"]["states"]
        if "dqn" in content and self.dqn.loss == _DQN_LOSS["loss"]:
            del content["dqn"]["loss"]
        if trained := {name: own[name] for name in self.algos if name in own}:
            content["settings"] = trained
        # Sweeps of experts are what they were before there was a choice.
        if not self.bc.dataset:
            del content["bc"]["dataset"]
        if self.prune_critic:
            content["critic_layout"] = _CRITIC_LAYOUT
        # What prunes after training is the sweep that it was before there was a choice.
        for name, unset in _LATER.items():
            if content[name] == unset:
                del content[name]
        return json.loads(json.dumps(content))

    @classmethod
    def from_dict(cls, stored: dict) -> Sweep:
        """The sweep a stored dictionary describes.

        Raises:
            TypeError: a value of another type.
            ValueError: a field is missing, unknown or out of range.
        """
        derived = ("observations", "critic_layout")
        given = _LATER | {name: value for name, value in stored.items() if name not in derived}
        parts = {"ppo": PPO, "bc": BC, "evaluation": Evaluation, **_OWN_SETTINGS}
        own = given.pop("settings", {})
        if isinstance(given.get("bc"), dict):
            choice = {} if "expert" in given["bc"] else _EXPERTS_CHOICE
            given["bc"] = {"dataset": ()} | choice | _EXPERTS_STATES | given["bc"]
        if isinstance(given.get("dqn"), dict):
            given["dqn"] = _DQN_LOSS | given["dqn"]
        trained = {*given.get("algos", ()), (given.get("bc") or {}).get("expert")}
        for name in _OWN_SETTINGS.keys() - trained:
            given.setdefault(name, asdict(_OWN_SETTINGS[name]()))
        _require_fields(cls, given | {"settings": own})
        settings: dict[str, Any] = {}
        for name, value in given.items():
            if name in parts:
                _require_fields(parts[name], value)
                settings[name] = parts[name](**value)
            else:
                settings[name] = tuple(value) if isinstance(value, list) else value
        for name, value in own.items():
            _require_fields(find_algorithm(name).settings, value)
        own = {name: find_algorithm(name).settings(**value) for name, value in own.items()}
        return cls(**settings, settings=own)


def _completed(given: dict) -> dict[str, Any]:
    """Settings of all registered algorithms that have no field of their own in a sweep."""
    fixed = {field.name for field in fields(Sweep)}
    own = {name: each.settings for name, each in ALGORITHMS.items() if name not in fixed}
    for name, settings in given.items():
        if name not in own:
            known = ", ".join(own) or "none"
            raise ValueError(f"settings must be of your own algorithms ({known}), got {name!r}")
        if not isinstance(settings, own[name]):
            wanted = own[name].__name__
            raise TypeError(f"settings[{name!r}] must be a {wanted}, got {settings!r}")
    return {name: given.get(name, kind()) for name, kind in own.items()}


def _require_fields(kind: type, given: dict) -> None:
    """Neither fewer fields, which would silently take today's defaults, nor more."""
    expected = {field.name for field in fields(kind)}
    missing, unknown = sorted(expected - set(given)), sorted(set(given) - expected)
    if missing or unknown:
        raise ValueError(
            f"not the specification of a sweep: {kind.__name__} lacks {missing or 'nothing'}, "
            f"has unknown {unknown or 'nothing'}"
        )
