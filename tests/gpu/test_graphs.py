"""Hot paths of the GPU: captured in a CUDA graph, replayed on new inputs, without waiting."""

import pytest
import torch
from replays import check_actions, check_dqn, check_draws, check_sac

from sparse_tickets.kernels import adam_, gae, uniform, use_backend
from sparse_tickets.kernels.linear import block_pattern, linear, linear_blocked
from sparse_tickets.kernels.prune import prune
from sparse_tickets.kernels.random import Stream

P, B, WIDTH = 5, 48, 96


@pytest.fixture
def layer(device):
    """``(x, weight, mask, bias)``, half of the weights pruned in blocks of 32."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device=device)

    blocks = draw(P, WIDTH // 32, WIDTH // 32) > 0
    mask = blocks.repeat_interleave(32, 1).repeat_interleave(32, 2)
    return draw(P, B, WIDTH), draw(P, WIDTH, WIDTH) * mask, mask, draw(P, WIDTH)


def products(layer, kind):
    """A function from x to everything the layer computes of it."""
    _, weight, mask, bias = layer
    if kind == "blocked":
        pattern = block_pattern(mask, 32)
    weight = weight.clone().requires_grad_()
    bias = bias.clone().requires_grad_()

    def run(x):
        if kind == "blocked":
            y = linear_blocked(x, weight, pattern, bias)
        else:
            y = linear(x, weight, mask, bias)
        return (y, *torch.autograd.grad(y, (x, weight, bias), y.detach()))

    return run


def captured(run):
    """``run`` as a graph, and what its replays write to."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = run()
    return graph, found


@pytest.mark.parametrize("kind", ["masked", "blocked"])
def test_a_layer_is_captured_and_replays_bit_for_bit(layer, kind):
    run, x = products(layer, kind), layer[0].clone().requires_grad_()
    graph, found = captured(lambda: run(x))
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for replayed, direct in zip(found, run(x), strict=True):
        assert torch.equal(replayed, direct)


@pytest.mark.parametrize("check", [check_draws, check_actions, check_dqn, check_sac])
def test_every_replay_draws_fresh_numbers(check):
    check("cuda")


@pytest.mark.parametrize("kind", ["masked", "blocked"])
def test_a_layer_does_not_wait(layer, kind, no_waiting):
    x = layer[0].clone().requires_grad_()
    torch.cuda.set_sync_debug_mode("default")
    run = products(layer, kind)
    run(x)
    torch.cuda.set_sync_debug_mode("error")
    run(x)


@pytest.mark.parametrize("kind", ["masked", "blocked"])
def test_a_ticket_does_not_depend_on_its_neighbours(layer, kind):
    x = layer[0].clone().requires_grad_()
    together = products(layer, kind)(x)
    alone = products(tuple(part[2:3] for part in layer), kind)(x[2:3].detach().requires_grad_())
    for all_of_them, one in zip(together, alone, strict=True):
        assert torch.equal(all_of_them[2:3], one)


def test_updates_draws_advantages_and_masks_do_not_wait(device, no_waiting):
    torch.cuda.set_sync_debug_mode("default")
    weight, grad = torch.randn(2, P, 1000, device=device).unbind()
    m, v = torch.zeros(2, P, 1000, device=device).unbind()
    step = torch.zeros(P, dtype=torch.int64, device=device)
    rate = torch.full((P,), 1e-3, device=device)
    mask = torch.rand(P, 900, device=device) < 0.5
    key = torch.arange(P, device=device)
    ended = torch.zeros(P, 8, 4, dtype=torch.bool, device=device)
    reward = torch.randn(P, 8, 4, device=device)

    def run():
        adam_(weight, grad, m, v, step, rate, mask)
        prune(weight[:, :900].abs(), mask, 100, check=False)
        uniform(key, 100, stream=Stream.ACTION, step=step)
        gae(reward, reward, reward, ended, ended, 0.99, 0.95)

    run()
    torch.cuda.set_sync_debug_mode("error")
    run()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["masked", "blocked"])
def test_half_precision_follows_the_reference(layer, kind, dtype):
    half = tuple(t if t.dtype == torch.bool else t.to(dtype) for t in layer)
    exact = tuple(t if t.dtype == torch.bool else t.double() for t in half)
    found = products(half, kind)(half[0].clone().requires_grad_())
    with use_backend("reference"):
        wanted = products(exact, kind)(exact[0].clone().requires_grad_())
    for got, want in zip(found, wanted, strict=True):
        scale = want.abs().max()
        # y is rounded before it is the gradient that flows back.
        assert (got.double() - want).abs().max() <= 4 * torch.finfo(dtype).eps * scale
