"""Advantages and returns: against sums written out from the definition, on every backend."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.kernels.returns import gae

BACKENDS = ["reference", "cpu", "triton"]
SHAPES = [(3, 11, 5), (1, 1, 1), (2, 7, 130), (0, 4, 2), (2, 0, 3), (2, 4, 0)]


@pytest.fixture
def poisoned():
    """What is allocated and not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def rollout(shape, dtype=torch.float32, seed=0, rate=0.2):
    """A random rollout whose next_value is NaN wherever it must not be used."""
    generator = torch.Generator().manual_seed(seed)
    reward, value, next_value = (
        torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3)
    )
    terminated = torch.rand(shape, generator=generator) < rate
    truncated = torch.rand(shape, generator=generator) < rate
    next_value[terminated] = math.nan
    return reward, value, next_value, terminated, truncated


def on(backend, op, *arguments):
    """Run an op on a backend: Triton on the GPU if there is one, else in the interpreter."""
    if backend == "triton" and torch.cuda.is_available():
        arguments = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
    with use_backend(backend):
        result = op(*arguments)
    return result.cpu() if isinstance(result, torch.Tensor) else tuple(r.cpu() for r in result)


def by_definition(reward, value, next_value, terminated, truncated, gamma, lam):
    """Equation 16 of Schulman et al.: the sum of discounted residuals up to the episode's end."""
    advantage = torch.zeros_like(reward)
    tickets, steps, envs = reward.shape
    for p in range(tickets):
        for e in range(envs):
            for t in range(steps):
                total = 0.0
                for j in range(t, steps):
                    future = 0.0 if terminated[p, j, e] else gamma * next_value[p, j, e].item()
                    delta = reward[p, j, e].item() + future - value[p, j, e].item()
                    total += (gamma * lam) ** (j - t) * delta
                    if terminated[p, j, e] or truncated[p, j, e]:
                        break
                advantage[p, t, e] = total
    return advantage


def close(actual, expected, steps):
    tolerance = 8 * max(steps, 1) * torch.finfo(actual.dtype).eps
    torch.testing.assert_close(
        actual, expected.to(actual.dtype), rtol=tolerance, atol=tolerance, equal_nan=False
    )


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gae_is_the_sum_of_residuals(backend, lam):
    dtype = torch.float32 if backend == "triton" else torch.float64
    batch = rollout((2, 9, 3), dtype)
    advantage, target = on(backend, gae, *batch, 0.9, lam)
    expected = by_definition(*batch, 0.9, lam)
    close(advantage, expected, 9)
    close(target, expected + batch[1], 9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_gae_agrees_with_reference_in_float64(backend, shape, poisoned):
    batch = rollout(shape)
    exact = [t.double() if t.is_floating_point() else t for t in batch]
    actual = on(backend, gae, *batch, 0.99, 0.95)
    expected = on("reference", gae, *exact, 0.99, 0.95)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.float32
        assert one.shape == shape
        close(one, other, shape[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_truncation_bootstraps_and_termination_does_not(backend):
    reward = torch.ones(1, 2, 3)
    value = torch.zeros(1, 2, 3)
    next_value = torch.full((1, 2, 3), 10.0)
    terminated = torch.tensor([[[True, False, False], [False] * 3]])
    truncated = torch.tensor([[[False, True, False], [False] * 3]])
    batch = (reward, value, next_value, terminated, truncated)
    advantage, target = on(backend, gae, *batch, 0.5, 1.0)
    assert advantage[0].tolist() == [[1.0, 6.0, 9.0], [6.0, 6.0, 6.0]]
    assert torch.equal(advantage, target)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_in_its_episode(backend):
    reward, value, next_value, terminated, truncated = rollout((1, 4, 1), rate=0.0)
    truncated[0, 1] = True
    reward[0, 2] = math.nan
    batch = (reward, value, next_value, terminated, truncated)
    advantage, _ = on(backend, gae, *batch, 0.9, 0.9)
    assert advantage.isnan().flatten().tolist() == [False, False, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_ticket_does_not_depend_on_its_company(backend):
    batch = rollout((5, 16, 33))
    together = on(backend, gae, *batch, 0.99, 0.95)
    alone = on(backend, gae, *(t[2:3] for t in batch), 0.99, 0.95)
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one[2:3], other)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 6), st.integers(0, 3)),
    rate=st.sampled_from([0.0, 0.3, 1.0]),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
)
def test_gae_on_any_rollout(shape, rate, gamma, lam):
    batch = rollout(shape, torch.float64, rate=rate)
    advantage, target = gae(*batch, gamma, lam)
    expected = by_definition(*batch, gamma, lam)
    close(advantage, expected, 6)
    close(target, expected + batch[1], 6)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 2), st.integers(0, 13), st.integers(0, 3)),
    rate=st.sampled_from([0.0, 0.3, 1.0]),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
)
def test_triton_scans_several_tiles(shape, rate, gamma, lam):
    gpu = pytest.importorskip("sparse_tickets.kernels.returns.gpu")
    batch = rollout(shape, rate=rate)
    with mock.patch.multiple(gpu, STEPS=4, LANES=2):
        actual = on("triton", gae, *batch, gamma, lam)
    exact = [t.double() if t.is_floating_point() else t for t in batch]
    for one, other in zip(actual, on("reference", gae, *exact, gamma, lam), strict=True):
        close(one, other, shape[1])


def test_triton_stops_a_nan_at_an_episode_s_end_in_any_tile():
    gpu = pytest.importorskip("sparse_tickets.kernels.returns.gpu")
    for end in range(10):
        reward, value, next_value, terminated, truncated = rollout((1, 11, 1), rate=0.0)
        (truncated if end % 2 else terminated)[0, end] = True
        next_value[terminated] = math.nan
        reward[0, end + 1 :] = math.nan
        with mock.patch.multiple(gpu, STEPS=4, LANES=2):
            advantage, _ = on("triton", gae, reward, value, next_value, terminated, truncated, 1, 1)
        expected = [step > end for step in range(11)]
        assert advantage.isnan().flatten().tolist() == expected


def test_results_are_constants_and_inputs_may_be_strided():
    batch = rollout((2, 6, 4))
    expected = gae(*batch, 0.99, 0.95)
    strided = [t.transpose(0, 2).contiguous().transpose(0, 2) for t in batch]
    strided[1].requires_grad_()
    actual = gae(*strided, 0.99, 0.95)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"reward": torch.zeros(2, 3)}, ValueError, r"reward must have shape \(P, T, E\)"),
        ({"value": torch.zeros(2, 3, 5)}, ValueError, r"value must have shape \(2, 3, 4\)"),
        ({"next_value": torch.zeros(2, 3, 4).half()}, TypeError, "next_value must be float32"),
        ({"terminated": torch.zeros(2, 3, 4)}, TypeError, "terminated must be bool"),
        ({"value": torch.zeros(2, 3, 4, device="meta")}, ValueError, "value must be on cpu, got m"),
        ({"reward": torch.zeros(2, 3, 4).half()}, TypeError, "reward must be float32 or float64"),
        ({"truncated": torch.zeros(2, 3, 1).bool()}, ValueError, "truncated must have shape"),
        ({"gamma": math.nan}, ValueError, r"gamma must be in \[0, 1\], got nan"),
        ({"gamma": 1.5}, ValueError, r"gamma must be in \[0, 1\], got 1.5"),
        ({"lam": -0.5}, ValueError, r"lam must be in \[0, 1\], got -0.5"),
    ],
)
def test_gae_refuses(change, error, message):
    names = ("reward", "value", "next_value", "terminated", "truncated")
    arguments = dict(zip(names, rollout((2, 3, 4)), strict=True)) | {"gamma": 0.9, "lam": 0.9}
    with pytest.raises(error, match=message):
        gae(**(arguments | change))
