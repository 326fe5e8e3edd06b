"""The Triton rollouts against the loop of the reference, on tiny cases in the interpreter."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_tickets.envs.classic import ClassicEnv
from sparse_tickets.envs.gym_adapter import GymEnv
from sparse_tickets.kernels.activations import KNOWN
from sparse_tickets.kernels.arena import Arena, Parameters
from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.kernels.dynamics import TASKS
from sparse_tickets.kernels.random import Stream
from sparse_tickets.kernels.rollout import (
    Rollout,
    demonstrate,
    evaluate,
    plan,
    rollout,
)

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# float32 sums of a few dozen terms of size one.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}
SHAPES = {
    "CartPole-v1": ((12, 9), "tanh"),
    "Acrobot-v1": ((8, 7, 16), "relu"),
    "MountainCar-v0": ((11,), "gelu"),
    "Pendulum-v1": ((16, 10), "silu"),
    "sparse_tickets/Maze-v0": ((8, 5), "relu"),
}
ALL = pytest.mark.parametrize("name", SHAPES)


def make_arena(name: str, critic: bool = True) -> Arena:
    hidden, activation = SHAPES[name]
    task = TASKS[name]
    inp = task.observation_dim
    return Arena.build(
        (inp, *hidden, task.action_dim),
        (inp, 13, 1) if critic else None,
        activation=activation,
        continuous=not task.discrete,
    )


def make_parameters(arena: Arena, tickets: int, scale: float = 0.4) -> Parameters:
    """Ticket p is the same in every population; a third of the weights is pruned."""
    rows = [
        torch.randn(arena.size, generator=torch.Generator().manual_seed(p)) for p in range(tickets)
    ]
    weight = torch.stack(rows) * scale
    mask = weight[:, : arena.prunable].abs() > 0.15 * scale
    weight[:, : arena.prunable] *= mask
    zeros = torch.zeros_like(weight)
    step = torch.zeros(tickets, dtype=torch.int64)
    return Parameters(*(tensor.to(DEVICE) for tensor in (weight, mask, zeros, zeros, step)))


def start(name: str, tickets: int, copies: int, **options):
    """An environment of which every second copy is two steps from its time limit."""
    env = ClassicEnv(name, tickets, copies, DEVICE, **options)
    key = -7 * torch.arange(tickets, device=DEVICE) + 3
    obs = env.reset(key)
    env.elapsed[:, 1::2] = env.task.time_limit - 2
    return env, obs, key


def act(name: str, backend: str, tickets: int, copies: int, steps: int, **options):
    env, obs, key = start(name, tickets, copies, **options)
    arena = make_arena(name)
    with use_backend(backend):
        outcome, last = rollout(make_parameters(arena, tickets), arena, env, obs, key, steps)
    return env, outcome, last


def assert_same(a, b) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


@pytest.fixture
def poison(monkeypatch):
    """Uninitialised memory is NaN, or the most negative integer."""

    def filled(make):
        def build(*args, **kwargs):
            out = make(*args, **kwargs)
            low = math.nan if out.is_floating_point() else torch.iinfo(torch.int8).min
            return out.fill_(True if out.dtype == torch.bool else low)

        return build

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, filled(getattr(torch, name)))


@ALL
def test_follows_the_reference(name, poison):
    env, got, last = act(name, "triton", 2, 2, 4)
    plain, want, last_want = act(name, "reference", 2, 2, 4)
    discrete = env.task.discrete
    for field, x, y in zip(Rollout._fields, got, want, strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        if field in ("terminated", "truncated") or (discrete and field in ("action", "reward")):
            assert torch.equal(x, y), field
        else:
            torch.testing.assert_close(x, y, **CLOSE, msg=field)
    assert got.truncated.any()
    torch.testing.assert_close(last, last_want, **CLOSE)
    torch.testing.assert_close(env.state, plain.state, rtol=0, atol=1e-6)
    assert torch.equal(env.elapsed, plain.elapsed)
    assert env.clock == plain.clock == 4


@pytest.mark.long
@settings(deadline=None, max_examples=6, derandomize=True)
@given(
    name=st.sampled_from(sorted(SHAPES)),
    hidden=st.lists(st.integers(1, 20), min_size=1, max_size=2),
    activation=st.sampled_from(KNOWN),
    tickets=st.integers(1, 2),
    copies=st.integers(1, 3),
)
def test_any_policy(name, hidden, activation, tickets, copies):
    task = TASKS[name]
    sizes = (task.observation_dim, *hidden, task.action_dim)
    arena = Arena.build(
        sizes, (sizes[0], 5, 1), activation=activation, continuous=not task.discrete
    )
    results = []
    for backend in ("triton", "reference"):
        env, obs, key = start(name, tickets, copies)
        with use_backend(backend):
            parameters = make_parameters(arena, tickets)
            outcome, last = rollout(parameters, arena, env, obs, key, 2)
        results.append((*outcome, last))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_terminations_restart():
    results = []
    for backend in ("triton", "reference"):
        env, _, key = start("CartPole-v1", 1, 3)
        env.state[0, :, 0] = torch.tensor([2.39, -2.39, 0.0])
        env.state[0, :, 1] = torch.tensor([1.0, -1.0, 0.0])
        arena = make_arena("CartPole-v1")
        parameters = make_parameters(arena, 1)
        with use_backend(backend):
            outcome, last = rollout(parameters, arena, env, env.observe(env.state), key, 3)
        results.append((*outcome, last, env.state.float(), env.elapsed))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, **CLOSE)
    got = Rollout(*results[0][:8])
    assert got.terminated[0, :, :2].any(0).all()
    assert not got.terminated[0, :, 2].any()
    assert not got.next_value[got.terminated].any()


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_the_environment_steps_on_from_a_rollout_bit_for_bit(name):
    env, got, last = act(name, "triton", 1, 2, 3)
    other, obs, _ = start(name, 1, 2)
    with use_backend("triton"):
        for t in range(3):
            assert torch.equal(obs, got.obs[:, t])
            step = other.step(got.action[:, t])
            assert torch.equal(step.reward, got.reward[:, t])
            assert torch.equal(step.truncated, got.truncated[:, t])
            obs = step.obs
    assert_same((last, env.state, env.elapsed), (obs, other.state, other.elapsed))


@pytest.mark.parametrize("name", ["MountainCar-v0", "Pendulum-v1"])
def test_two_calls_equal_one_with_the_clock_on_either_side(name):
    arena = make_arena(name)
    parameters = make_parameters(arena, 1)
    whole_env, whole, last = act(name, "triton", 1, 2, 4)
    for on_device in (False, True):
        env, obs, key = start(name, 1, 2)
        if on_device:
            env.keep_clock_on_device()
        parts, state, clock = [], env.state, env.clock
        with use_backend("triton"):
            for steps in (1, 3):
                part, obs = rollout(parameters, arena, env, obs, key, steps)
                parts.append(part)
        assert_same((torch.cat(pair, 1) for pair in zip(*parts, strict=True)), whole)
        assert_same((obs, env.state, env.elapsed), (last, whole_env.state, whole_env.elapsed))
        assert int(env.clock) == 4
        # What a captured graph needs: the same memory before and after.
        assert (env.state is state) == on_device
        assert (env.clock is clock) == on_device


def test_the_reference_keeps_a_clock_on_the_device():
    _, want, last = act("Pendulum-v1", "reference", 1, 2, 3)
    arena = make_arena("Pendulum-v1")
    env, obs, key = start("Pendulum-v1", 1, 2)
    env.keep_clock_on_device()
    state, clock = env.state, env.clock
    with use_backend("reference"):
        got, obs = rollout(make_parameters(arena, 1), arena, env, obs, key, 3)
    assert_same((*got, obs), (*want, last))
    assert env.state is state
    assert env.clock is clock
    env.reset(key)
    assert env.clock == 0


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_bits_depend_neither_on_the_population_nor_on_other_copies(name):
    _, everyone, _ = act(name, "triton", 3, 2, 2)
    _, one, _ = act(name, "triton", 1, 2, 2)
    assert_same(one, (field[:1] for field in everyone))
    _, more, _ = act(name, "triton", 1, 3, 2)
    # A longer draw begins like a shorter one.
    assert_same(one, (field[:, :, :2] for field in more))


@ALL
@pytest.mark.parametrize("greedy", [True, False])
def test_evaluate_sums_one_episode(name, greedy):
    env, _, key = start(name, 2, 2)
    task = env.task
    # The interpreter would take minutes for a whole episode.
    short = type(task)(**{**vars(task), "time_limit": 5})
    env.task = short
    # Steep policies, so that rounding flips no action.
    arena = make_arena(name)
    parameters = make_parameters(arena, 2, scale=1.0)
    state, clock = env.state, env.clock
    with use_backend("triton"):
        got = evaluate(parameters, arena, env, key, index=2**41 + 5, greedy=greedy)
    assert env.state is state
    assert env.clock == clock
    assert got.dtype == torch.float32
    with use_backend("reference"):
        want = evaluate(parameters, arena, env, key, index=2**41 + 5, greedy=greedy)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)


def test_an_evaluation_ends_with_its_episode():
    """A pole pushed one way only falls within a dozen steps; the time limit is 500."""
    arena = Arena.build((4, 8, 2))
    parameters = make_parameters(arena, 1)
    parameters.weight.zero_()
    arena.actor.bias(parameters.weight, 1)[:, 1] = 50.0
    env, _, key = start("CartPole-v1", 1, 2)
    results = []
    for backend in ("triton", "reference"):
        with use_backend(backend):
            results.append(evaluate(parameters, arena, env, key, index=0, greedy=False))
    assert torch.equal(*results)
    assert (results[0] >= 8).all()
    assert (results[0] <= 12).all()


def test_greedy_ties_take_the_lowest_index():
    arena = Arena.build((2, 4, 3))
    parameters = make_parameters(arena, 1)
    env, _, key = start("MountainCar-v0", 1, 1)
    env.task = type(env.task)(**{**vars(env.task), "time_limit": 2})
    for biases in ((0.5, 0.5, 0.1), (0.1, 0.5, 0.5), (0.0, 0.0, 0.0)):
        parameters.weight.zero_()
        arena.actor.bias(parameters.weight, 1)[:] = torch.tensor(biases)
        env.reset(key)
        results = []
        for backend in ("triton", "reference"):
            with use_backend(backend):
                results.append(evaluate(parameters, arena, env, key, index=0, greedy=True))
        assert torch.equal(*results)


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_demonstrations_carry_the_expert_distribution(name):
    arena = make_arena(name)
    parameters = make_parameters(arena, 1)
    results = []
    for backend in ("triton", "reference"):
        env, obs, key = start(name, 1, 2, reset_stream=Stream.DATASET_RESET)
        with use_backend(backend):
            results.append(demonstrate(parameters, arena, env, obs, key, 3))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


def test_without_a_critic_values_are_zero():
    arena = make_arena("CartPole-v1", critic=False)
    env, obs, key = start("CartPole-v1", 1, 2)
    with use_backend("triton"):
        got, _ = rollout(make_parameters(arena, 1), arena, env, obs, key, 3)
    assert got.truncated.any()
    assert not got.value.any()
    assert not got.next_value.any()


def test_no_tickets_and_empty_masks():
    arena = make_arena("CartPole-v1")
    parameters = make_parameters(arena, 1)
    env, obs, key = start("CartPole-v1", 1, 2)
    env.state, env.elapsed, env.key = env.state[:0], env.elapsed[:0], env.key[:0]
    nobody = Parameters(*(tensor[:0] for tensor in parameters))
    with use_backend("triton"):
        got, last = rollout(nobody, arena, env, obs[:0], key[:0], 5)
        assert got.reward.shape == (0, 5, 2)
        assert last.shape == (0, 2, 4)
        assert evaluate(nobody, arena, env, key[:0], index=0, greedy=True).shape == (0, 2)
        parameters.weight[:, : arena.prunable] = 0.0
        env, obs, key = start("CartPole-v1", 1, 2)
        got, _ = rollout(parameters, arena, env, obs, key, 3)
    logp = arena.actor.bias(parameters.weight, 2).log_softmax(-1)[0]
    torch.testing.assert_close(got.logp, logp[got.action], **CLOSE)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_diverged_ticket_stays_alone_and_acts_in_range():
    arena = make_arena("CartPole-v1")
    parameters = make_parameters(arena, 2)
    _, want, _ = act("CartPole-v1", "triton", 1, 2, 2)
    parameters.weight[1] = math.nan
    env, obs, key = start("CartPole-v1", 2, 2)
    with use_backend("triton"):
        got, _ = rollout(parameters, arena, env, obs, key, 2)
    assert_same((field[:1] for field in got), want)
    assert not got.action[1].any()
    assert got.logp[1].isnan().all()


def test_plans_say_what_runs_and_why():
    env, _, _ = start("CartPole-v1", 1, 2)
    arena = make_arena("CartPole-v1")
    with use_backend("triton"):
        fused = plan(arena, env, DEVICE)
        assert (fused.backend, fused.format) == ("triton", "dense")
        for sizes, reason in (
            ((4, 2), "needs a hidden layer"),
            ((4, 129, 2), "width 128 fit the registers, not 129"),
            (
                (4, 100, 100, 100, 2),
                "16384 weights between hidden layers fit the registers, not 327",
            ),
        ):
            composed = plan(Arena.build(sizes), env, DEVICE)
            assert composed.backend == "reference"
            assert reason in composed.reason
        assert plan(Arena.build((4, *(64,) * 5, 2)), env, DEVICE).backend == "triton"
        assert plan(Arena.build((4, 8, 2), (4, 256, 1)), env, DEVICE).backend == "reference"
        gym = GymEnv("CartPole-v1", 1, 1)
        assert "CartPole-v1 is not built in" in plan(arena, gym, DEVICE).reason
        gym.close()
    with use_backend("reference"):
        assert plan(arena, env, DEVICE).backend == "reference"
    with use_backend("cpu"):
        host = plan(arena, env, torch.device("cpu"), density=0.5)
        assert (host.backend, host.format) == ("cpu", "dense/dense")
        with pytest.raises(ValueError, match="density must be in"):
            plan(arena, env, torch.device("cpu"), density=2.0)


def test_networks_that_do_not_fit_run_as_the_reference():
    arena = Arena.build((4, 2), (4, 1))
    parameters = make_parameters(arena, 1)
    results = []
    for backend in ("triton", "reference"):
        env, obs, key = start("CartPole-v1", 1, 2)
        with use_backend(backend):
            results.append(rollout(parameters, arena, env, obs, key, 2)[0])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


def test_arguments_are_checked():
    arena = make_arena("CartPole-v1")
    parameters = make_parameters(arena, 1)
    env, obs, key = start("CartPole-v1", 1, 2)
    with use_backend("triton"):
        with pytest.raises(ValueError, match=r"P \* T \* E below 2\*\*31"):
            rollout(parameters, arena, env, obs, key, 2**30)
        env.clock = torch.zeros((), dtype=torch.int32, device=DEVICE)
        with pytest.raises(TypeError, match=r"env\.clock must be int64"):
            rollout(parameters, arena, env, obs, key, 1)
        env.clock = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        with pytest.raises(ValueError, match=r"env\.clock must have shape"):
            rollout(parameters, arena, env, obs, key, 1)
        env.state = env.state[:, :1]
        with pytest.raises(ValueError, match=r"env\.state must have shape"):
            rollout(parameters, arena, env, obs, key, 1)
        with pytest.raises(RuntimeError, match="reset"):
            rollout(parameters, arena, ClassicEnv("CartPole-v1", 1, 2, DEVICE), obs, key, 1)
