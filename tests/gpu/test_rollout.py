"""Rollouts on a GPU: against the reference there, bit for bit against themselves, and captured."""

import pytest
import torch

from sparse_tickets.envs.classic import ClassicEnv
from sparse_tickets.kernels import dynamics
from sparse_tickets.kernels.arena import Arena, Parameters
from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.kernels.dynamics import TASKS
from sparse_tickets.kernels.rollout import Rollout, demonstrate, evaluate, plan, rollout

# float32 sums of at most a few hundred terms of size one, and approximate exponentials.
CLOSE = {"rtol": 3e-5, "atol": 3e-5}
HIDDEN = {
    "CartPole-v1": (64, 64),
    "Acrobot-v1": (64, 64, 64),
    "MountainCar-v0": (32,),
    "Pendulum-v1": (128, 128),
}
ALL = pytest.mark.parametrize("name", HIDDEN)


def make_arena(name: str) -> Arena:
    task, hidden = TASKS[name], HIDDEN[name]
    inp = task.observation_dim
    return Arena.build(
        (inp, *hidden, task.action_dim), (inp, *hidden, 1), continuous=not task.discrete
    )


def make_parameters(arena: Arena, tickets: int, scale: float = 0.15) -> Parameters:
    """Ticket p is the same in every population; a third of the weights is pruned."""
    rows = [
        torch.randn(arena.size, generator=torch.Generator().manual_seed(p)) for p in range(tickets)
    ]
    weight = torch.stack(rows).cuda() * scale
    mask = weight[:, : arena.prunable].abs() > 0.15 * scale
    weight[:, : arena.prunable] *= mask
    zeros = torch.zeros_like(weight)
    return Parameters(weight, mask, zeros, zeros, torch.zeros(tickets).long().cuda())


def start(name: str, tickets: int, copies: int):
    env = ClassicEnv(name, tickets, copies, "cuda")
    key = 7 * torch.arange(tickets, device="cuda") + 1
    obs = env.reset(key)
    # Time limits come at different steps, and within the rollout.
    env.elapsed += torch.arange(copies, device="cuda", dtype=torch.int32) + env.task.time_limit - 40
    return env, obs, key


def assert_same(a, b) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


@ALL
def test_physics_equals_the_reference(name, generator):
    task = TASKS[name]
    u = torch.rand(1000, task.state_dim, generator=generator).cuda()
    state = dynamics.initial(task, u)
    assert torch.equal(state, task.initial(u))
    if task.discrete:
        action = torch.randint(task.action_dim, (1000,), generator=generator).cuda()
    else:
        action = torch.randn(1000, task.action_dim, generator=generator).cuda()
    for _ in range(20):
        got, want = dynamics.step(task, state, action), task.step(state, action)
        torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-11)
        torch.testing.assert_close(got[1], want[1], rtol=2**-23, atol=0)
        assert torch.equal(got[2], want[2])
        seen = dynamics.observe(task, state)
        torch.testing.assert_close(seen, task.observe(state), rtol=2**-22, atol=2**-22)
        state = got[0]


@ALL
def test_rollouts_hold_up_to_their_own_observations(name):
    """Teacher forcing: values, log-probabilities and physics of what the kernel did, rederived."""
    arena = make_arena(name)
    parameters = make_parameters(arena, 5)
    env, obs, key = start(name, 5, 6)
    assert plan(arena, env, obs.device).backend == "triton"
    got, last = rollout(parameters, arena, env, obs, key, 64)

    other, seen, _ = start(name, 5, 6)
    following, final = [], []
    for t in range(64):
        assert torch.equal(seen, got.obs[:, t])
        step = other.step(got.action[:, t])
        for field in ("reward", "terminated", "truncated"):
            assert torch.equal(getattr(step, field), getattr(got, field)[:, t])
        seen = step.obs
        following.append(step.obs)
        final.append(step.final_obs)
    assert torch.equal(seen, last)
    assert_same((env.state, env.elapsed), (other.state, other.elapsed))
    assert got.truncated.any()

    weight = parameters.weight.double()

    def network(net, x):
        x = x.double().flatten(1, 2)
        for layer, (matrix, bias) in enumerate(net.layers(weight)):
            x = x @ matrix.mT + bias[:, None]
            x = x.tanh() if layer < net.depth - 1 else x
        return x.unflatten(1, (-1, 6))

    value = network(arena.critic, got.obs)[..., 0]
    torch.testing.assert_close(got.value.double(), value, **CLOSE)
    successor = network(arena.critic, torch.stack(final, 1))[..., 0]
    successor = successor.masked_fill(got.terminated, 0.0)
    torch.testing.assert_close(got.next_value.double(), successor, **CLOSE)
    head = network(arena.actor, got.obs)
    if arena.log_std is None:
        logp = torch.distributions.Categorical(logits=head).log_prob(got.action)
    else:
        std = weight[:, None, None, arena.log_std :].exp()
        logp = torch.distributions.Normal(head, std).log_prob(got.action.double()).sum(-1)
    torch.testing.assert_close(got.logp.double(), logp, **CLOSE)


@ALL
def test_a_short_rollout_follows_the_reference(name):
    """So short that rounding hardly ever flips an action: none of these seeds' does."""
    arena = make_arena(name)
    parameters = make_parameters(arena, 3)
    results = []
    for backend in ("triton", "reference"):
        env, obs, key = start(name, 3, 4)
        with use_backend(backend):
            outcome, last = rollout(parameters, arena, env, obs, key, 8)
        results.append((*outcome, last))
    for field, x, y in zip((*Rollout._fields, "last"), *results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3, msg=field)


@ALL
def test_bits_depend_neither_on_the_population_nor_on_copies_nor_on_calls(name):
    arena = make_arena(name)

    def act(tickets, copies, cuts):
        env, obs, key = start(name, tickets, copies)
        parameters, parts = make_parameters(arena, tickets), []
        for steps in cuts:
            part, obs = rollout(parameters, arena, env, obs, key, steps)
            parts.append(part)
        return [torch.cat(fields, 1) for fields in zip(*parts, strict=True)]

    want = act(7, 6, (48,))
    assert_same(act(7, 6, (48,)), want)
    assert_same(act(7, 6, (5, 43)), want)
    assert_same(act(2, 6, (48,)), [field[:2] for field in want])
    assert_same(act(2, 3, (48,)), [field[:2, :, :3] for field in want])


@ALL
@pytest.mark.parametrize("greedy", [True, False])
def test_evaluations_follow_the_reference(name, greedy):
    arena = make_arena(name)
    # Steep policies, so that rounding flips no action of a long episode.
    parameters = make_parameters(arena, 3, scale=0.5)
    env, _, key = start(name, 3, 8)
    got = evaluate(parameters, arena, env, key, index=2, greedy=greedy)
    with use_backend("reference"):
        want = evaluate(parameters, arena, env, key, index=2, greedy=greedy)
    close = ((got - want).abs() <= 2e-3 * want.abs()).float().mean()
    assert close >= 0.9, f"{close:.0%} of the episodes agree"


def test_demonstrations_see_what_rollouts_see():
    arena = make_arena("Acrobot-v1")
    parameters = make_parameters(arena, 2)
    env, obs, key = start("Acrobot-v1", 2, 4)
    acted, _ = rollout(parameters, arena, env, obs, key, 30, stream=9)
    env, obs, key = start("Acrobot-v1", 2, 4)
    seen, target, _ = demonstrate(parameters, arena, env, obs, key, 30, stream=9)
    assert torch.equal(seen, acted.obs)
    logp = target.gather(-1, acted.action[..., None])[..., 0]
    torch.testing.assert_close(logp, acted.logp, **CLOSE)


@pytest.mark.parametrize("hidden", [(64, 64), (192,)], ids=["fused", "composed"])
@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_replays_of_a_graph_go_on_where_the_last_ended(name, hidden):
    task = TASKS[name]
    inp = task.observation_dim
    arena = Arena.build(
        (inp, *hidden, task.action_dim), (inp, *hidden, 1), continuous=not task.discrete
    )
    parameters = make_parameters(arena, 2)
    env, obs, key = start(name, 2, 4)
    want, last = rollout(parameters, arena, env, obs, key, 40)

    env, obs, key = start(name, 2, 4)
    env.keep_clock_on_device()
    kept = [tensor.clone() for tensor in (env.state, env.elapsed, env.clock, obs)]

    def advance() -> Rollout:
        outcome, following = rollout(parameters, arena, env, obs, key, 10)
        obs.copy_(following)
        return outcome

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        advance()
    torch.cuda.current_stream().wait_stream(side)
    for tensor, before in zip((env.state, env.elapsed, env.clock, obs), kept, strict=True):
        tensor.copy_(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outcome = advance()
    parts = []
    for _ in range(4):
        graph.replay()
        parts.append([field.clone() for field in outcome])
    got = [torch.cat(fields, 1) for fields in zip(*parts, strict=True)]
    assert int(env.clock) == 40
    if plan(arena, env, obs.device).backend == "triton":
        assert_same((*got, obs), (*want, last))
    else:
        # torch may multiply matrices otherwise within a capture.
        for x, y in zip((*got, obs), (*want, last), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


@pytest.fixture(params=["CartPole-v1", "Pendulum-v1"])
def ready(request):
    """``(parameters, arena, env, obs, key)``, already on the device."""
    arena = make_arena(request.param)
    return make_parameters(arena, 2), arena, *start(request.param, 2, 4)


def test_nothing_waits_for_the_device(ready, no_waiting):
    parameters, arena, env, obs, key = ready
    rollout(parameters, arena, env, obs, key, 4)
    evaluate(parameters, arena, env, key, index=0, greedy=True)
    demonstrate(parameters, arena, env, obs, key, 4)


def test_a_clock_on_the_host_is_refused_in_a_capture():
    arena = make_arena("CartPole-v1")
    parameters = make_parameters(arena, 1)
    env, obs, key = start("CartPole-v1", 1, 2)
    rollout(parameters, arena, env, obs, key, 1)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(ValueError, match="must be a tensor while"), torch.cuda.graph(graph):
        rollout(parameters, arena, env, obs, key, 1)
