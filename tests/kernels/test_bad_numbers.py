"""Numbers out of range, NaN, and what autograd and transforms do to each op."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bad_input import (
    CASES,
    POLICY,
    Q_NETWORK,
    Tensors,
    environment,
    flatten,
    make_actors,
    make_clone,
    make_dqn,
    make_optimiser,
    make_policy,
    make_ppo,
    make_returns,
    of_each_op,
    on_device,
    on_each_backend,
    on_host,
    parameters_of,
    run,
    spoiling,
)
from torch import Tensor
from torch.autograd import forward_ad

from sparse_tickets.kernels import random
from sparse_tickets.kernels.arena import Arena, Parameters
from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.kernels.dqn import DQNConfig, dqn_update_
from sparse_tickets.kernels.imitation import CloneConfig, clone_update_
from sparse_tickets.kernels.ppo import Batch, PPOConfig, ppo_update_
from sparse_tickets.kernels.returns import gae
from sparse_tickets.kernels.rollout import evaluate, rollout
from sparse_tickets.kernels.transitions import Transitions
from sparse_tickets.kernels.update import adam_

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@on_each_backend
@pytest.mark.parametrize("k", [-1, 6, torch.tensor([1, -1]), torch.tensor([6, 0])], ids=str)
def test_counts_out_of_range(k: int | Tensor, backend: str) -> None:
    tensors = CASES["prune"].make(2, 3, 0.6) | {"k": k}
    tensors = on_device(backend, {n: torch.as_tensor(t) for n, t in tensors.items()})
    before = {n: tensors[n].clone() for n in CASES["prune"].written}
    count = tensors["k"] if isinstance(k, Tensor) else k
    with (
        use_backend(backend),
        pytest.raises(ValueError, match=r"k must be in \[0, 5\], got (6|-1)"),
    ):
        CASES["prune"].call(**(tensors | {"k": count}))
    assert all(torch.equal(tensor, tensors[n]) for n, tensor in before.items())


@on_each_backend
def test_nan_scores(backend: str) -> None:
    """Refused inside the mask, ignored off it."""
    tensors = on_device(backend, CASES["prune"].make(2, 3, 0.6))
    finite = {n: t.clone() for n, t in tensors.items()}
    tensors["scores"].masked_fill_(~tensors["mask"], torch.nan)
    inside = tensors["scores"].masked_fill(tensors["mask"], torch.nan)
    with use_backend(backend), pytest.raises(ValueError, match="scores must not be NaN inside"):
        CASES["prune"].call(**(tensors | {"scores": inside}))
    for one, other in zip(
        run(CASES["prune"], backend, tensors), run(CASES["prune"], backend, finite), strict=True
    ):
        assert torch.equal(one, other)


def acting(**numbers: Any) -> Any:
    tensors = make_actors(1, 1, 1.0)
    env = environment(1, 1, torch.device("cpu"))
    env.reset(tensors["key"])
    parameters = parameters_of(tensors["weight"], tensors["mask"])
    arguments = (parameters, POLICY, env, tensors["obs"], tensors["key"])
    return rollout(*arguments, **({"steps": 1} | numbers))


def judging(index: Any) -> Tensor:
    tensors = make_policy(1, 1, 1.0)
    parameters = parameters_of(tensors["weight"], tensors["mask"])
    env = environment(1, 1, torch.device("cpu"))
    return evaluate(parameters, POLICY, env, tensors["key"], index=index, greedy=True)


def training(iteration: Any) -> Any:
    tensors = make_ppo(1, 2, 1.0)
    parameters = Parameters(*(tensors.pop(name) for name in Parameters._fields))
    key, lr = tensors.pop("key"), tensors.pop("lr")
    return ppo_update_(parameters, POLICY, Batch(**tensors), key, iteration, lr, PPOConfig(1, 1))


def cloning(first_update: Any) -> Tensor:
    tensors = make_clone(1, 2, 1.0) | {"dataset": torch.tensor([0])}
    parameters = Parameters(*(tensors.pop(name) for name in Parameters._fields))
    config = CloneConfig(updates=1, batch=1)
    return clone_update_(parameters, POLICY, first_update=first_update, config=config, **tensors)


def valuing(**numbers: Any) -> Any:
    tensors = make_dqn(1, 2, 1.0)
    parameters = Parameters(*(tensors.pop(name) for name in Parameters._fields))
    target, key, lr = (tensors.pop(name) for name in ("target", "key", "lr"))
    counts = {"stored": 2, "first_update": 0} | numbers
    replay, config = Transitions(**tensors), DQNConfig(1, 1)
    return dqn_update_(
        parameters, Q_NETWORK, target, replay, key=key, lr=lr, config=config, **counts
    )


def optimising(**numbers: Any) -> Tensor:
    return adam_(**(make_optimiser(1, 1, 1.0) | numbers))


def estimating(**numbers: Any) -> Any:
    return gae(**make_returns(1, 2, 1.0), **({"gamma": 0.9, "lam": 0.9} | numbers))


def drawing(**numbers: Any) -> Tensor:
    return random.integers(
        torch.tensor([1]), **({"n": 2, "high": 3, "stream": 0, "step": 0} | numbers)
    )


NAN = float("nan")


@pytest.mark.parametrize(
    ("call", "name", "values"),
    [
        (acting, "steps", (0, -1, 2**31, 1.5, None)),
        (acting, "stream", (-1, 2**32, 1.5)),
        (acting, "density", (-0.1, 1.1, NAN)),
        (judging, "index", (-1, 2**43, 0.5)),
        (training, "iteration", (-1, 2**48, 0.5)),
        (cloning, "first_update", (-1, 2**62, 0.5)),
        (valuing, "first_update", (-1, 2**62, 0.5)),
        (valuing, "stored", (-1, 0, 3, 2**31 + 1, 1.5)),
        (optimising, "max_norm", (0.0, -1.0, NAN)),
        (optimising, "beta1", (-0.1, 1.0, NAN)),
        (optimising, "beta2", (-0.1, 1.0, NAN)),
        (optimising, "eps", (-1e-9, NAN)),
        (estimating, "gamma", (-0.1, 1.1, NAN)),
        (estimating, "lam", (-0.1, 1.1, NAN)),
        (drawing, "n", (-1, 2**31, 1.5)),
        (drawing, "high", (0, 2**31 + 1, 1.5)),
        (drawing, "step", (-1, 2**63, 1.5)),
        (PPOConfig, "max_norm", (0.0, -1.0, NAN)),
        (PPOConfig, "minibatches", (0,)),
        (PPOConfig, "clip", (0.0, NAN)),
        (lambda **numbers: CloneConfig(1, 1, **numbers), "max_norm", (0.0, -1.0, NAN)),
        (lambda **numbers: CloneConfig(1, 1, **numbers), "eps", (0.0, NAN)),
        (lambda **numbers: DQNConfig(1, 1, **numbers), "eps", (0.0, NAN)),
        (Arena.build, "actor", ((), (3,), (3, 0), (3, -1, 2), (3, 2.5))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_numbers_out_of_range(call: Callable[..., Any], name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises((ValueError, TypeError), match=rf"^{name} must be .*got"):
            call(**{name: value})


def jvp(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
    return lambda x: torch.func.jvp(function, (x,), (torch.ones_like(x),))


@on_each_backend
@of_each_op
def test_forward_mode(name: str, backend: str) -> None:
    """Refused, or right; only what is constant to autograd may lose a tangent."""
    case = CASES[name]
    tensors = on_device(backend, case.make(2, 3, 0.6))
    floats = [n for n, t in tensors.items() if t.is_floating_point()]
    gradients = (
        run(case, "reference", on_host(tensors))[1:]
        if case.differentiable
        else [None] * len(floats)
    )
    for argument, gradient in zip(floats, gradients, strict=True):
        with spoiling(argument), use_backend(backend), forward_ad.dual_level():
            tangent = torch.ones_like(tensors[argument])
            dual = {argument: forward_ad.make_dual(tensors[argument], tangent)}
            try:
                results = flatten(case.call(**(tensors | dual)))
            except NotImplementedError as error:
                assert "no forward-mode derivative" in str(error)  # noqa: PT017
                continue
            assert not case.written
            tangents = [forward_ad.unpack_dual(result).tangent for result in results]
            if gradient is None:
                assert tangents == [None] * len(results)
            else:
                assert backend == "reference"
                torch.testing.assert_close(tangents[0].sum(), gradient.sum())


@on_each_backend
@of_each_op
def test_vmap(name: str, backend: str) -> None:
    """More tickets, or refused."""
    case = CASES[name]
    tensors = on_device(backend, case.make(2, 3, 0.6))
    stacked = {n: torch.stack([t, t.flip(0)]) for n, t in tensors.items()}
    before = {n: t.clone() for n, t in stacked.items()}
    try:
        with use_backend(backend):
            found = torch.func.vmap(lambda batch: tuple(flatten(case.call(**batch))))(stacked)
    except RuntimeError as error:
        assert re.search("vmap|Batching rule not implemented", str(error)), error  # noqa: PT017
        for n, tensor in before.items():
            assert torch.equal(stacked[n], tensor)
        return
    assert not case.written
    for i in range(2):
        with use_backend("reference"):
            expected = flatten(case.call(**on_host({n: t[i] for n, t in before.items()})))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one[i].cpu(), other, rtol=1e-4, atol=1e-4)


@on_each_backend
@pytest.mark.parametrize("transform", [torch.func.grad, jvp], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.written])
def test_nothing_is_written_inside_transforms(
    name: str, transform: Callable[..., Any], backend: str
) -> None:
    case = CASES[name]
    tensors = on_device(backend, case.make(2, 3, 0.6))
    before = {n: t.clone() for n, t in tensors.items()}
    argument = next(n for n, t in tensors.items() if t.is_floating_point())

    def function(x: Tensor) -> Tensor:
        case.call(**(tensors | {argument: x}))
        return x.sum()

    with use_backend(backend), pytest.raises(RuntimeError, match=r"outside of torch\.func"):
        transform(function)(tensors[argument])
    assert all(torch.equal(tensors[n], tensor) for n, tensor in before.items())


@on_each_backend
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.written])
def test_autograd_hears_of_what_is_written(name: str, backend: str) -> None:
    tensors = on_device(backend, CASES[name].make(2, 3, 0.6))
    versions = {n: tensors[n]._version for n in CASES[name].written}
    run(CASES[name], backend, tensors)
    assert all(tensors[n]._version > version for n, version in versions.items())


@on_each_backend
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.differentiable])
def test_second_derivatives(name: str, backend: str) -> None:
    """Those of the reference in float64."""
    case = CASES[name]
    tensors = on_device(backend, case.make(2, 3, 0.6))
    exact = {n: t.double() if t.is_floating_point() else t for n, t in on_host(tensors).items()}

    def differentiate(backend: str, tensors: Tensors) -> list[Tensor]:
        floats = {n: t.clone() for n, t in tensors.items() if t.is_floating_point()}
        leaves = [leaf.requires_grad_() for leaf in floats.values()]
        with use_backend(backend):
            y = case.call(**(tensors | floats))
            first = torch.autograd.grad(y.tanh().sum(), leaves, create_graph=True)
            # Torch must find no way past the gradients: what it cannot reach, it leaves out.
            total = y.sum() + sum((gradient * gradient.detach().sin()).sum() for gradient in first)
            return list(torch.autograd.grad(total, leaves))

    found = differentiate(backend, tensors)
    for one, other in zip(found, differentiate("reference", exact), strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=1e-4, atol=1e-4)
