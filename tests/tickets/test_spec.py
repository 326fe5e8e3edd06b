"""The specification of a sweep: hash, JSON, tracks, exact counts, validation, the protocol."""

import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from sparse_tickets.algos.bc import BC
from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.algos.ppo import PPO
from sparse_tickets.conditions import CONDITIONS
from sparse_tickets.envs import env_spec
from sparse_tickets.sweep.progress import total_steps
from sparse_tickets.sweep.protocols import protocol
from sparse_tickets.sweep.spec import Sweep, Track
from sparse_tickets.sweep.store import spec_hash

TICKET = "mask/weights"


def names(spec, level):
    return [(track.condition, track.controls) for track in spec.tracks(level) if track.seed == 0]


def test_hash_is_that_of_the_contents():
    spec = Sweep(seeds=3, hidden=(8, 8))
    assert spec_hash(spec.to_dict()) == spec_hash(Sweep(hidden=(8, 8), seeds=3).to_dict())
    # A change of this number strands every run made so far: it must be meant.
    assert spec_hash({"a": (1, 2.5), "b": None}) == "f66b2c50ccae"
    changes = [
        {"seeds": 4},
        {"rate": 0.25},
        {"env": "Acrobot-v1"},
        {"ppo": PPO(gamma=0.98)},
        {"bc": BC(experts=4)},
        {"evaluation": Evaluation(points=10)},
        {"rewind_step": 512},
        {"prune_by": "best"},
    ]
    hashes = {spec_hash(replace(spec, **change).to_dict()) for change in changes}
    assert len(hashes | {spec_hash(spec.to_dict())}) == len(changes) + 1


def test_json_round_trip_and_the_observation_scale():
    spec = Sweep(
        conditions=tuple(CONDITIONS),
        controls=("own", "ticket"),
        hidden=(16,),
        rewind_step=1024,
        prune_by="best",
        bc=BC(expert_gate=100.0),
    )
    stored = json.loads(json.dumps(spec.to_dict()))
    assert Sweep.from_dict(stored) == spec
    pendulum = Sweep(env="Pendulum-v1").to_dict()["observations"]
    assert pendulum == {"offset": [0.0, 0.0, 0.0], "scale": list(env_spec("Pendulum-v1").scale)}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda stored: stored.pop("rate"), "lacks .*rate"),
        (lambda stored: stored["ppo"].pop("lam"), "PPO lacks .*lam"),
        (lambda stored: stored.update(colour="red"), "unknown .*colour"),
        (lambda stored: stored.pop("bc"), "lacks .*bc"),
        (lambda stored: stored.update(seeds=0), r"seeds must be in \[1, 1,000,000\]"),
    ],
)
def test_foreign_dictionaries_are_refused(damage, message):
    stored = Sweep().to_dict()
    damage(stored)
    with pytest.raises(ValueError, match=message):
        Sweep.from_dict(stored)


def test_level_zero_is_trained_once_per_seed():
    spec = Sweep(seeds=3, controls=("own", "ticket"))
    assert spec.tracks(0) == [Track(seed, "dense", "shared") for seed in range(3)]


def test_seeds_are_counted_from_the_first():
    spec = Sweep(seeds=3, first_seed=5)
    assert [track.seed for track in spec.tracks(0)] == [5, 6, 7]
    assert {track.seed for track in spec.tracks(1)} == {5, 6, 7}
    stored = json.loads(json.dumps(spec.to_dict()))
    assert Sweep.from_dict(stored) == spec
    # The sweep that it was before there was a choice.
    assert "first_seed" not in Sweep(seeds=3).to_dict()


def test_tracks_of_both_kinds_of_controls():
    conditions = (TICKET, "mask/permuted", "random/re-init", "erk-random/re-init")
    own = [(name, "own") for name in conditions]
    assert names(Sweep(conditions=conditions), 1) == own
    # The ticket and conditions without a chain are the same for both kinds: they run once.
    both = Sweep(conditions=conditions, controls=("own", "ticket"))
    assert names(both, 1) == [*own, ("mask/permuted", "ticket")]
    ticket = Sweep(conditions=conditions, controls=("ticket",))
    assert sorted(names(ticket, 5)) == sorted(
        [(TICKET, "own"), *own[2:], ("mask/permuted", "ticket")]
    )


def test_a_pruned_critic_chains_every_condition():
    conditions = (TICKET, "random/re-init")
    plain = Sweep(conditions=conditions, controls=("own", "ticket"))
    assert not plain.chained("random/re-init")
    pruned = replace(plain, prune_critic=True)
    assert all(pruned.chained(name) for name in conditions)
    # The critic's mask is the track's own or the ticket's: no longer the same.
    assert names(pruned, 1) == [*names(plain, 1), ("random/re-init", "ticket")]


def test_what_pruned_critics_mean_is_hashed_and_nothing_else_changes():
    stored = Sweep(prune_critic=True).to_dict()
    assert stored.pop("critic_layout") == 2
    assert Sweep.from_dict(stored) == Sweep(prune_critic=True)
    assert spec_hash(stored) != spec_hash(Sweep(prune_critic=True).to_dict())
    assert "critic_layout" not in Sweep().to_dict()
    # The published study: experiments/README.md.
    study = replace(protocol("CartPole-v1"), seeds=15, levels=20)
    assert spec_hash(study.to_dict()) == "cfea99db37a5"


def test_a_ticket_control_is_pruned_by_its_own_seeds_ticket():
    assert Track(3, "permuted/permuted", "ticket").source == Track(3, TICKET, "own")
    own = Track(3, "permuted/permuted", "own")
    assert own.source == own


def test_units_cut_every_level_into_chunks():
    spec = Sweep(seeds=5, levels=3, chunk=8)
    units = list(spec.units("ppo"))
    assert [(level, chunk, len(tracks)) for level, chunk, tracks in units] == [
        (0, 0, 5),
        *[(level, chunk, size) for level in (1, 2) for chunk, size in enumerate((8, 8, 4))],
    ]
    for level in range(3):
        joined = [
            track for unit_level, _, tracks in units if unit_level == level for track in tracks
        ]
        assert joined == spec.tracks(level)


def test_kept_counts_are_exact():
    spec = Sweep(levels=25)
    for level in range(25):
        expected = (4480 * Fraction(4, 5) ** level + Fraction(1, 2)).__floor__()
        assert spec.kept("ppo", level) == spec.kept("bc", level) == expected
    assert [spec.kept("ppo", level) for level in (0, 1, 2, 10)] == [4480, 3584, 2867, 481]
    # Floating point would round 150 * 0.7**2 + 0.5 = 74 down to 73.
    assert Sweep(hidden=(25,), rate=0.3).kept("ppo", 2) == 74
    both = Sweep(prune_critic=True)
    assert both.kept("ppo", 0) == 4480 + 256 + 4096 + 64
    assert both.kept("bc", 0) == 4480


def test_keys_differ_between_cells_but_not_between_algorithms_at_initialisation():
    spec = Sweep(controls=("own", "ticket"), seeds=2)
    keys = [
        spec.key(algo, track, level)
        for algo in ("ppo", "bc")
        for level in range(3)
        for track in spec.tracks(level)
    ]
    assert len(set(keys)) == len(keys)
    assert spec.initial_key(0) != spec.initial_key(1)
    assert spec.initial_key(0) != Sweep(env="Acrobot-v1").initial_key(0)
    # Nothing but what names a cell decides its key: a longer sweep continues a shorter one.
    assert Sweep(seeds=9, levels=2).key("ppo", Track(0, TICKET, "own"), 1) == spec.key(
        "ppo", Track(0, TICKET, "own"), 1
    )


def test_steps_shrink_by_the_rewind_step():
    spec = Sweep(ppo=PPO(steps=5000), rewind_step=1024)
    assert spec.rewind_iteration("ppo") == 2
    assert spec.train_steps("ppo", 0) == 9 * 512
    assert spec.train_steps("ppo", 1) == 7 * 512
    small = Sweep(algos=("ppo", "bc"), seeds=1, levels=2, ppo=PPO(steps=512), bc=BC(experts=2))
    assert total_steps(small) == 512 * (2 * (1 + 4) + 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algos": ("td3",)}, "algos must be among ppo, dqn, sac, bc, got"),
        ({"algos": ()}, "algos must be among"),
        ({"algos": ("ppo", "ppo")}, "algos must be at least one, each once"),
        ({"controls": ("both",)}, "controls must be among own, ticket"),
        ({"conditions": ("mask/wieghts",)}, "condition must be one of mask/weights, "),
        ({"conditions": ()}, "conditions must be at least one"),
        ({"conditions": (TICKET, TICKET)}, "conditions must be at least one, each once"),
        ({"conditions": ("mask/permuted",), "controls": ("ticket",)}, "need the condition"),
        ({"criterion": "size"}, "criterion must be one of .*magnitude"),
        ({"init": "xavier"}, "init must be one of lecun"),
        ({"activation": "mish"}, "activation must be one of tanh"),
        ({"hidden": (64, 0)}, "each of hidden must be at least 1"),
        ({"log_std": float("nan")}, "log_std must be finite"),
        ({"rate": 0.0}, r"rate must be in \(0, 1\)"),
        ({"rate": 1.0}, r"rate must be in \(0, 1\)"),
        ({"seeds": 0}, r"seeds must be in \[1, 1,000,000\]"),
        ({"first_seed": -1, "seeds": 5}, r"first_seed must be in \[0, 999,995\], got -1"),
        ({"first_seed": 999_996, "seeds": 5}, r"first_seed must be in \[0, 999,995\]"),
        ({"levels": 0}, "levels must be at least 1"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"prune_by": "worst"}, "prune_by must be one of final, best, got 'worst'"),
        ({"prune_by": "best", "during": "set"}, "prune_by must be final where"),
        ({"rewind_step": -512}, "rewind_step must be in"),
        ({"rewind_step": 1000}, "rewind_step must be a multiple of copies"),
        # 1000 steps are one iteration of 512: nothing would be left to train.
        ({"rewind_step": 512, "ppo": PPO(steps=1000)}, "rewind_step must be in"),
    ],
)
def test_invalid_sweeps_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sweep(**settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PPO(copies=0), "copies must be at least 1"),
        (lambda: PPO(steps=100), "steps must be at least copies"),
        (lambda: PPO(minibatches=7), "minibatches must divide"),
        (lambda: BC(experts=0), "experts must be at least 1"),
        (lambda: BC(expert_tries=0), "expert_tries must be at least 1"),
        (lambda: Evaluation(points=0), r"evaluation.points must be in \[1, 100,000\]"),
    ],
)
def test_invalid_parts_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Sweep(seeds=2.5), TypeError, "^seeds must be an integer, got 2.5"),
        (lambda: Sweep(seeds=True), TypeError, "^seeds must be an integer, got True"),
        (lambda: Sweep(seeds=None), TypeError, "^seeds must be an integer, got None"),
        (lambda: Sweep(seeds="3"), TypeError, "^seeds must be an integer, got '3'"),
        (lambda: Sweep(env=None), TypeError, "^env must be a string, got None"),
        (lambda: Sweep(rate=NAN), ValueError, "^rate must be finite, got nan"),
        (lambda: Sweep(log_std=-INF), ValueError, "^log_std must be finite, got -inf"),
        (lambda: Sweep(hidden=64), TypeError, "^hidden must be a tuple of integers, got 64"),
        (lambda: Sweep(hidden=(64, 2.0)), TypeError, r"^hidden must be .*, got \(64, 2.0\)"),
        (lambda: Sweep(conditions=TICKET), TypeError, "^conditions must be a tuple of strings"),
        (lambda: Sweep(prune_critic=1), TypeError, "^prune_critic must be True or False, got 1"),
        (lambda: Sweep(ppo={}), TypeError, "^ppo must be a PPO, got {}"),
        (lambda: PPO(learning_rate=NAN), ValueError, "^ppo.learning_rate must be finite, got nan"),
        (lambda: PPO(learning_rate=-1.0), ValueError, "^ppo.learning_rate must be at least 0"),
        (lambda: PPO(clip=True), TypeError, "^ppo.clip must be a number, got True"),
        (lambda: PPO(max_norm=INF), ValueError, "^ppo.max_norm must be finite, got inf"),
        (lambda: PPO(gamma=1.01), ValueError, r"^ppo.gamma must be in \[0, 1\], got 1.01"),
        (lambda: PPO(copies=1e3), TypeError, "^ppo.copies must be an integer, got 1000.0"),
        (lambda: BC(expert_gate=NAN), ValueError, "^bc.expert_gate must be finite, got nan"),
        (lambda: BC(expert_gate="x"), TypeError, "^bc.expert_gate must be a number or None"),
        (lambda: BC(expert_steps=0), ValueError, "^bc.expert_steps must be at least 1, got 0"),
        (lambda: Evaluation(points=100_001), ValueError, r"in \[1, 100,000\], got 100001"),
        (lambda: Evaluation(episodes=None), TypeError, "^evaluation.episodes must be an integer"),
    ],
)
def test_every_field_is_held_to_its_type_and_range(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_equal_settings_are_stored_alike():
    given = Sweep(seeds=np.int64(15), hidden=[64, 64], ppo=PPO(value_coef=np.float32(0.5), gamma=1))
    plain = Sweep(ppo=PPO(gamma=1.0))
    assert given == plain
    assert spec_hash(given.to_dict()) == spec_hash(plain.to_dict())


def test_unknown_environments_list_the_known_ones():
    with pytest.raises(ValueError, match=r"Acrobot-v1, CartPole-v1, .*MountainCar-v0, Pendulum-v1"):
        Sweep(env="CartPool-v1").to_dict()


def test_learning_rate_falls_linearly_to_zero():
    ppo = PPO(steps=10 * 512, learning_rate=1.0)
    rates = [ppo.learning_rate_at(iteration) for iteration in range(10)]
    assert rates == pytest.approx([1 - i / 10 for i in range(10)])


# steps, copies, horizon, epochs, minibatch size, learning rate, gamma, lambda, entropy, clip
TABLE = {
    "CartPole-v1": (500_000, 4, 128, 4, 128, 2.5e-4, 0.99, 0.95, 0.01, 0.2),
    "Acrobot-v1": (500_000, 16, 256, 4, 64, 3e-4, 0.99, 0.94, 0.0, 0.2),
    "Pendulum-v1": (400_000, 4, 1024, 10, 64, 1e-3, 0.9, 0.95, 0.0, 0.2),
    "MountainCar-v0": (1_000_000, 16, 16, 4, 64, 3e-4, 0.99, 0.98, 0.0, 0.2),
    "LunarLander-v3": (1_000_000, 16, 1024, 4, 64, 3e-4, 0.999, 0.98, 0.01, 0.2),
    "HalfCheetah-v5": (1_000_000, 1, 512, 20, 64, 2.06e-5, 0.98, 0.92, 0.000401762, 0.1),
    "Hopper-v5": (1_000_000, 1, 512, 5, 32, 9.80828e-5, 0.999, 0.99, 0.00229519, 0.2),
}


@pytest.mark.parametrize("env", TABLE)
def test_protocol_gives_the_tuned_budget(env):
    spec = protocol(env)
    ppo = spec.ppo
    assert spec.env == env
    assert TABLE[env] == (
        ppo.steps,
        ppo.copies,
        ppo.horizon,
        ppo.epochs,
        ppo.batch // ppo.minibatches,
        ppo.learning_rate,
        ppo.gamma,
        ppo.lam,
        ppo.entropy_coef,
        ppo.clip,
    )
    # SB3's value loss is the square itself, CleanRL's half of it, clipped.
    assert ppo.clip_value == (env == "CartPole-v1")
    weights = {"CartPole-v1": 0.5, "HalfCheetah-v5": 1.16192, "Hopper-v5": 1.671342}
    assert ppo.value_coef == weights.get(env, 1.0)
    assert spec.init == "lecun"
    assert spec.criterion == "magnitude"
    assert spec.rewind_step == 0
    assert not spec.prune_critic
    assert spec.bc.experts == 5
    assert spec.evaluation == Evaluation(points=20, episodes=32, final_episodes=100)


def test_protocol_of_cheap_and_of_slow_environments():
    cheap = protocol("CartPole-v1")
    assert (cheap.seeds, cheap.levels, cheap.rate, cheap.hidden) == (15, 25, 0.2, (64, 64))
    assert len(cheap.conditions) == 4
    for env in ("LunarLander-v3", "HalfCheetah-v5", "Hopper-v5"):
        slow = protocol(env)
        assert (slow.seeds, slow.levels, slow.rate, len(slow.conditions)) == (5, 10, 0.33, 3)
    cheetah = protocol("HalfCheetah-v5")
    assert (cheetah.hidden, cheetah.activation, cheetah.log_std) == ((256, 256), "relu", -2.0)
    assert protocol("Swimmer-v5").ppo == PPO()
