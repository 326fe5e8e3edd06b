"""The squashed Gaussian in one call: equal to plain torch in float64, forward and gradients."""

import pytest
import torch

from sparse_tickets.kernels.policy import can_squash, squash
from sparse_tickets.kernels.policy.squashed import reference

EPSILON = 1e-6
INF = float("inf")


def draw(batch, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean, noise = (torch.randn(batch, size, generator=generator) for _ in range(2))
    # 1 - action^2, by which the log-probability's gradient divides, stays above 0.04.
    mean, noise = mean.clamp(-1, 1), noise.clamp(-2, 2)
    log_std = torch.rand(batch, size, generator=generator) * 2.5 - 3
    return mean.requires_grad_(), log_std.requires_grad_(), noise


def assert_near(found, truth, scale):
    torch.testing.assert_close(found.double(), truth, atol=2e-6 * scale, rtol=2e-5)


@pytest.mark.parametrize("batch", [0, 1, 3, 17, 256])
@pytest.mark.parametrize("size", [1, 2, 6, 17])
@pytest.mark.parametrize("asked", [(0,), (1,), (0, 1)])
def test_forward_and_gradients_equal_float64(batch, size, asked):
    mean, log_std, noise = draw(batch, size)
    outputs = squash(mean, log_std, noise, EPSILON)
    exact = [t.detach().double().requires_grad_() for t in (mean, log_std)]
    truth = reference(*exact, noise.double(), EPSILON)
    for found, expected in zip(outputs, truth, strict=True):
        assert found.shape == expected.shape
        assert_near(found, expected, 5 * size)
    given = [torch.randn_like(y) for y in outputs]
    found = torch.autograd.grad(
        [outputs[i] for i in asked], (mean, log_std), [given[i] for i in asked]
    )
    expected = torch.autograd.grad(
        [truth[i] for i in asked], exact, [given[i].double() for i in asked]
    )
    for one, other in zip(found, expected, strict=True):
        assert one.shape == (batch, size)
        assert_near(one, other, 25)


def test_saturated_and_broken_actions_are_what_torch_makes_of_them():
    mean = torch.tensor([[40.0], [-40.0], [float("nan")], [0.5]])
    log_std = torch.tensor([[-20.0], [2.0], [0.0], [float("nan")]])
    noise = torch.ones(4, 1)
    action, log_prob = squash(mean, log_std, noise, EPSILON)
    expected = reference(mean, log_std, noise, EPSILON)
    torch.testing.assert_close(action, expected[0], equal_nan=True)
    torch.testing.assert_close(log_prob, expected[1], equal_nan=True, rtol=1e-5, atol=1e-4)
    assert log_prob.isnan().tolist() == [False, False, True, True]


def test_a_gradient_of_a_gradient():
    mean, log_std, noise = (t.detach() for t in draw(5, 3))

    def both(mean, log_std):
        return squash(mean, log_std, noise, EPSILON)

    def plain(mean, log_std):
        return reference(mean, log_std, noise, EPSILON)

    def second(function):
        leaves = [mean.clone().requires_grad_(), log_std.clone().requires_grad_()]
        action, log_prob = function(*leaves)
        first = torch.autograd.grad(
            action.sum() + log_prob.square().sum(), leaves, create_graph=True
        )
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for one, other in zip(second(both), second(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_layouts_and_what_is_not_taken():
    mean, log_std, noise = (t.detach() for t in draw(6, 4))
    turned = squash(mean.t().contiguous().t(), log_std.t().contiguous().t(), noise, EPSILON)
    for one, other in zip(turned, squash(mean, log_std, noise, EPSILON), strict=True):
        assert torch.equal(one, other)
    assert can_squash(mean, log_std)
    assert not can_squash(mean.double(), log_std.double())
    assert not can_squash(mean, log_std[:1])
    assert not can_squash(torch.nn.Parameter(mean), log_std)
    assert not can_squash(mean.to("meta"), log_std)
