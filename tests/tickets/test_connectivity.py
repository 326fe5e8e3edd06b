"""Connectivity against a search path by path, and against the numbers the protocol states."""

import pytest
import torch

from sparse_tickets.connectivity import connectivity
from sparse_tickets.kernels.arena import Arena


def search(mask, arena):
    """Connectivity of one ticket by depth-first search over (layer, unit) nodes."""
    net = arena.actor
    edges = [net.weight(mask[None], layer)[0].tolist() for layer in range(net.depth)]

    def visit(node, neighbours, seen):
        if node not in seen:
            seen.add(node)
            for following in neighbours(node):
                visit(following, neighbours, seen)

    def forwards(node):
        layer, unit = node
        if layer < net.depth:
            yield from ((layer + 1, o) for o, row in enumerate(edges[layer]) if row[unit])
        # Around a block of a residual network.
        yield from ((n + 1, unit) for n in range(net.depth) if net.adds(n) == layer - 1)

    def backwards(node):
        layer, unit = node
        if layer > 0:
            yield from ((layer - 1, i) for i, kept in enumerate(edges[layer - 1][unit]) if kept)
            if net.adds(layer - 1) is not None:
                yield net.adds(layer - 1) + 1, unit

    reached, useful = set(), set()
    for unit in range(net.sizes[0]):
        visit((0, unit), forwards, reached)
    for unit in range(net.sizes[-1]):
        visit((net.depth, unit), backwards, useful)
    alive = reached & useful
    on_path = sum(
        kept and (layer, i) in alive and (layer + 1, o) in alive
        for layer, matrix in enumerate(edges)
        for o, row in enumerate(matrix)
        for i, kept in enumerate(row)
    )
    total = sum(len(matrix) * len(matrix[0]) for matrix in edges)
    hidden = [(n, u) for n in range(1, net.depth) for u in range(net.sizes[n])]
    actions = sum((net.depth, unit) in alive for unit in range(net.sizes[-1]))
    return (
        on_path / total,
        actions > 0,
        sum((0, unit) not in alive for unit in range(net.sizes[0])),
        sum(node not in alive for node in hidden),
        actions,
    )


@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [
        ("mlp", (3, 2)),
        ("mlp", (1, 1, 1)),
        ("mlp", (4, 5, 3, 2)),
        ("mlp", (2, 7, 1, 6, 3)),
        ("residual", (4, 5, 2)),
        ("residual", (4, 5, 9, 5, 3, 5, 2)),
    ],
)
@pytest.mark.parametrize("density", [0.0, 0.15, 0.4, 1.0])
def test_agrees_with_a_search(architecture, sizes, density, generator):
    arena = Arena.build(sizes, architecture=architecture)
    mask = torch.rand(12, arena.prunable, generator=generator) < density
    expected = [search(row, arena) for row in mask]
    result = connectivity(mask, arena)
    got = zip(*(values.tolist() for values in result), strict=True)
    for ticket, wanted in zip(got, expected, strict=True):
        assert ticket == pytest.approx(wanted)


def test_dense_and_empty_masks():
    arena = Arena.build((4, 64, 64, 2))
    mask = torch.ones(2, arena.prunable, dtype=torch.bool)
    mask[1] = False
    result = connectivity(mask, arena)
    assert result.effective_density.tolist() == [1.0, 0.0]
    assert result.has_path.tolist() == [True, False]
    assert result.dead_inputs.tolist() == [0, 4]
    assert result.dead_units.tolist() == [0, 128]
    assert result.reachable_actions.tolist() == [2, 0]


def test_paths_lead_around_a_block_without_weights():
    arena = Arena.build((2, 3, 4, 3, 2), architecture="residual")
    mask = torch.ones(1, arena.prunable, dtype=torch.bool)
    arena.actor.weight(mask, 1)[:] = arena.actor.weight(mask, 2)[:] = False
    result = connectivity(mask, arena)
    assert result.has_path.all()
    assert (result.dead_inputs.item(), result.dead_units.item()) == (0, 4)
    assert result.effective_density.item() == (2 * 3 + 3 * 2) / (2 * 3 + 2 * 3 * 4 + 3 * 2)


def test_a_critic_under_the_mask_does_not_count(generator):
    with_critic = Arena.build((3, 5, 2), (3, 5, 1), prune_critic=True)
    actor_only = Arena.build((3, 5, 2))
    mask = torch.rand(6, with_critic.prunable, generator=generator) < 0.5
    for one, other in zip(
        connectivity(mask, with_critic),
        connectivity(mask[:, : actor_only.prunable].contiguous(), actor_only),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_empty_population():
    arena = Arena.build((3, 5, 2))
    result = connectivity(torch.empty(0, arena.prunable, dtype=torch.bool), arena)
    assert all(values.shape == (0,) for values in result)


@pytest.mark.parametrize(
    ("density", "on_path", "without_path"),
    [(0.33, 0.48, 0.0), (0.107, 0.14, None), (0.044, None, 0.13), (0.028, None, 0.54)],
)
def test_uniform_masks_disconnect_as_the_protocol_says(density, on_path, without_path, generator):
    """1000 masks: one standard error is at most 0.016 of a fraction and below 0.003 of a mean."""
    arena = Arena.build((4, 64, 64, 2))
    count = round(density * arena.prunable)
    order = torch.rand(1000, arena.prunable, generator=generator).argsort(dim=1)
    mask = torch.zeros(1000, arena.prunable, dtype=torch.bool)
    mask.scatter_(1, order[:, :count], True)
    result = connectivity(mask, arena)
    if on_path is not None:
        share = result.effective_density.mean().item() * arena.prunable / count
        assert share == pytest.approx(on_path, abs=0.02)
    if without_path is not None:
        lost = 1 - result.has_path.double().mean().item()
        assert lost == pytest.approx(without_path, abs=0.05)


def test_arguments_are_checked():
    arena = Arena.build((3, 5, 2))
    with pytest.raises(ValueError, match="mask must have shape"):
        connectivity(torch.ones(2, 7, dtype=torch.bool), arena)
    with pytest.raises(TypeError, match="mask must be bool"):
        connectivity(torch.ones(2, arena.prunable), arena)
