"""One layer's own way through the CPU kernels: what `linear` yields, without its checks."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sparse_tickets.kernels.linear import layer, prepare, reference
from sparse_tickets.kernels.linear.patterns import build_pattern
from sparse_tickets.kernels.linear.rows import Rows

EPS = torch.finfo(torch.float32).eps
SHAPES = [
    (1, 1, 1),
    (2, 5, 3),
    (16, 17, 16),
    (65, 33, 17),
    (130, 70, 129),
    (700, 64, 65),
    (0, 4, 3),
]


def find_rows(mask: Tensor) -> Rows:
    return Rows(build_pattern(mask[None]))


def multiply_rows(rows: Rows, x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None):
    wanted = any(t is not None and t.requires_grad for t in (x, weight, bias))
    trains = wanted and torch.is_grad_enabled()
    return layer.multiply_rows(rows, x, weight, mask, bias, trains)


def draw(batch: int, inp: int, out: int, density: float) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(batch + inp + out)
    mask = torch.rand(out, inp, generator=generator) < density
    # A unit without inputs and an input without units.
    mask[0], mask[:, -1] = False, False
    x = torch.randn(batch, inp, generator=generator)
    weight = torch.randn(out, inp, generator=generator) * mask
    bias = torch.randn(out, generator=generator)
    return x, weight, mask, bias, torch.randn(batch, out, generator=generator)


def assert_close(actual: Tensor, expected: Tensor, size: Tensor, terms: int) -> None:
    allowed = 2 * EPS * max(terms, 1) ** 0.5 * (1 + size.abs().max() if size.numel() else 1)
    assert actual.shape == expected.shape
    assert bool((actual.double() - expected).abs().le(allowed).all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.6])
def test_equals_the_reference(shape, density) -> None:
    batch, inp, out = shape
    x, weight, mask, bias, dy = draw(*shape, density)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    rows = find_rows(mask)
    y = multiply_rows(rows, leaves[0], leaves[1], mask, leaves[2])
    expected = reference.linear(exact[0][None], exact[1][None], mask[None], exact[2][None])[0]
    sizes = (x.double().abs() @ weight.double().abs().T + bias.abs()).detach()
    assert_close(y.detach(), expected.detach(), sizes, inp + 1)
    with torch.no_grad():
        assert torch.equal(multiply_rows(rows, x, weight, mask, bias), y)
    found = torch.autograd.grad(y, leaves, dy)
    dx, dw, db = torch.autograd.grad(expected, exact, dy.double())
    absolute = dy.double().abs()
    assert_close(found[0], dx, absolute @ weight.double().abs(), out)
    assert_close(found[1], dw * mask, absolute.T @ x.double().abs(), batch)
    assert_close(found[2], db, absolute.sum(0), batch)
    assert found[1][~mask].eq(0).all()


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("has_bias", [False, True])
def test_only_the_gradients_wanted_are_made(wanted, has_bias) -> None:
    x, weight, mask, bias, dy = draw(130, 40, 30, 0.2)
    leaves = [t.clone().requires_grad_(on) for t, on in zip((x, weight, bias), wanted, strict=True)]
    asked = [t for t in (leaves if has_bias else leaves[:2]) if t.requires_grad]
    y = multiply_rows(find_rows(mask), *leaves[:2], mask, leaves[2] if has_bias else None)
    assert y.requires_grad == bool(asked)
    if asked:
        expected = leaves[0] @ leaves[1].T + (leaves[2] if has_bias else 0)
        for actual, dense, leaf in zip(
            torch.autograd.grad(y, asked, dy),
            torch.autograd.grad(expected, asked, dy),
            asked,
            strict=True,
        ):
            dense = dense * mask if leaf is leaves[1] else dense
            torch.testing.assert_close(actual, dense, rtol=1e-4, atol=1e-4)


def test_strided_and_expanded_gradients() -> None:
    x, weight, mask, bias, _ = draw(200, 40, 30, 0.2)
    weight.requires_grad_()
    rows = find_rows(mask)
    expected = torch.autograd.grad((x @ weight.T).sum(), weight)[0] * mask
    y = multiply_rows(rows, x, weight, mask, bias)
    actual = torch.autograd.grad(y.sum(), weight)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)
    y = multiply_rows(rows, x, weight, mask, bias)
    dy = torch.ones(30, 200).T
    torch.testing.assert_close(torch.autograd.grad(y, weight, dy)[0], actual)


def test_double_backward() -> None:
    x, weight, mask, bias, _ = draw(20, 7, 5, 0.4)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    rows = find_rows(mask)

    def penalty(y: Tensor) -> tuple[Tensor, ...]:
        dx, dw = torch.autograd.grad(y.tanh().sum(), leaves[:2], create_graph=True)
        on_mask = dw * mask
        return torch.autograd.grad(dx.square().sum() + on_mask.square().sum(), leaves)

    actual = penalty(multiply_rows(rows, *leaves[:2], mask, leaves[2]))
    expected = penalty(x @ (weight * mask).T + bias)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_what_changes_before_the_backward_pass_raises() -> None:
    for change in (0, 1, 2):
        x, weight, mask, bias, dy = draw(100, 40, 30, 0.2)
        leaf = weight.clone().requires_grad_()
        y = multiply_rows(find_rows(mask), x, leaf, mask, bias)
        with torch.no_grad():
            (x, leaf, mask)[change].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(dy)


def test_memory_of_a_gradient_that_is_kept_is_not_used_again() -> None:
    x, weight, mask, bias, dy = draw(300, 256, 256, 0.05)
    weight.requires_grad_()
    rows = find_rows(mask)
    multiply_rows(rows, x, weight, mask, bias).backward(dy)
    kept, copy = weight.grad, weight.grad.clone()
    for _ in range(3):
        torch.autograd.grad(multiply_rows(rows, 2 * x, weight, mask, bias), weight, dy)
    assert torch.equal(kept, copy)
    multiply_rows(rows, x, weight, mask, bias).backward(dy)
    torch.testing.assert_close(weight.grad, 2 * copy)


def test_blocks_have_a_way_of_their_own(monkeypatch) -> None:
    monkeypatch.setenv("SPARSE_TICKETS_CROSSOVER", "1")
    mask = torch.eye(4, dtype=torch.bool).repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert prepare(mask)._find_way(64, trains=True) == "blocked"
