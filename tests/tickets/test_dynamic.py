"""Sparsity during training: exact masks by hand, schedules on paper, methods in a loop."""

import math

import pytest
import torch
from torch import nn

from sparse_tickets import SparseLinear
from sparse_tickets.dynamic import (
    DROP_SCORES,
    GROW_SCORES,
    METHODS,
    SCHEDULES,
    Method,
    Pruner,
    layer_counts,
    update_mask,
)
from sparse_tickets.dynamic.scores import Moment

LAYERS = [(0, 5, 3), (15, 4, 5), (35, 1, 4)]
SIZE = 39
SHARES = (4.0, 1.0, 0.5)


def by_hand(mask, drop, grow, k, replaced):
    """The same for one row of one segment, in plain Python."""
    alive = [i for i, kept in enumerate(mask) if kept]
    alive.sort(key=lambda i: (-drop[i], i))
    if grow is None:
        return set(alive[:k])
    stay = min(k, len(alive))
    stay -= math.floor(stay * replaced + 0.5)
    kept = set(alive[:stay])
    others = sorted((i for i in range(len(mask)) if i not in kept), key=lambda i: (-grow[i], i))
    return kept | set(others[: k - stay])


@pytest.mark.parametrize("growing", [False, True])
@pytest.mark.parametrize("distribution", ["global", "uniform", "erk", "by-layer"])
@pytest.mark.parametrize("seed", range(8))
def test_an_update_is_that_by_hand(seed, distribution, growing):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(4, SIZE, generator=generator) < 0.6
    # Few values, so that many tie.
    drop, grow = torch.randint(0, 5, (2, 4, SIZE), generator=generator).float()
    k = int(torch.randint(0, SIZE + 1, (), generator=generator)) if growing else 11
    counts = layer_counts(distribution, LAYERS, k, shares=SHARES)
    grow = grow if growing else None
    got = update_mask(mask, drop, grow, k, replaced=0.4, layers=LAYERS, counts=counts)
    parts = [(0, SIZE, k)]
    if counts is not None:
        parts = [(at, at + o * i, n) for (at, o, i), n in zip(LAYERS, counts, strict=True)]
    for ticket in range(4):
        want = set()
        for begin, end, count in parts:
            row = slice(begin, end)
            grown = None if grow is None else grow[ticket, row].tolist()
            scores = drop[ticket, row].tolist()
            chosen = by_hand(mask[ticket, row].tolist(), scores, grown, count, 0.4)
            want |= {begin + place for place in chosen}
        assert set(got[ticket].nonzero().flatten().tolist()) == want
    if growing:
        assert (got.sum(1) == k).all()
    alone = [
        update_mask(
            mask[[i]],
            drop[[i]],
            None if grow is None else grow[[i]],
            k,
            replaced=0.4,
            layers=LAYERS,
            counts=counts,
        )
        for i in range(4)
    ]
    assert torch.equal(torch.cat(alone), got)


@pytest.mark.parametrize("distribution", ["uniform", "erk", "by-layer"])
def test_counts_fall_with_k_and_keep_to_what_is_there(distribution):
    left = [out * inp for _, out, inp in LAYERS]
    for k in range(SIZE, -1, -1):
        counts = layer_counts(distribution, LAYERS, k, left, SHARES)
        assert sum(counts) == k
        assert all(count <= most for count, most in zip(counts, left, strict=True))
        left = counts


def test_layers_are_as_dense_beside_each_other_as_asked():
    # Of 15, 20 and 4 weights 60, 20 and 2 parts; the first is full from 21 weights on.
    assert layer_counts("by-layer", LAYERS, 8, shares=SHARES) == [6, 2, 0]
    assert layer_counts("by-layer", LAYERS, 26, shares=SHARES) == [15, 10, 1]
    dense_first = Method("constant", "by-layer", grow="random", start=0.0, shares=(100, 1, 1))
    module = network()
    pruner = Pruner(module, dense_first, 0.4, 100)
    assert [layer.density for layer in module if isinstance(layer, SparseLinear)] == pytest.approx(
        [1.0, 115 / 540, 115 / 540], abs=1e-2
    )
    assert pruner.density == pytest.approx(math.floor(0.4 * WEIGHTS + 0.5) / WEIGHTS)


def test_schedules_on_paper():
    gradual = Method()
    curve = [gradual.density(way, 1.0, 0.1) for way in (0.0, 0.19, 0.2, 0.5, 0.8, 1.0)]
    assert curve == pytest.approx([1, 1, 1, 1 - 0.9 * 0.875, 0.1, 0.1])
    one_shot = METHODS["one-shot"]
    assert [one_shot.density(way, 1.0, 0.1) for way in (0.4, 0.5)] == pytest.approx([1, 0.1])
    static = METHODS["static"]
    assert [static.density(way, 1.0, 0.1) for way in (0.0, 0.9)] == pytest.approx([0.1, 0.1])
    cyclic = Method("cyclic", grow="random", start=0.0, stop=1.0)
    curve = [cyclic.density(way, 1.0, 0.0) for way in (0, 0.125, 0.25, 0.375, 1)]
    assert curve == pytest.approx([1, 0.125, 1, 0.125, 0])
    for name, schedule in SCHEDULES.items():
        assert schedule(1.0) == 1.0, name
    rigl = METHODS["rigl"]
    assert [rigl.replaced(way) for way in (0, 0.4, 0.8, 1)] == pytest.approx([0.3, 0.15, 0, 0])
    assert gradual.replaced(0.3) == 0


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(7, 24), nn.Tanh(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 3)
    )


WEIGHTS = 7 * 24 + 24 * 20 + 20 * 3


def flat(module: nn.Module, name: str) -> torch.Tensor:
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return torch.cat([getattr(layer, name).detach().flatten() for layer in layers])


def train(module, pruner, steps, look=None):
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        x = torch.randn(16, 7, generator=generator)
        optimizer.zero_grad()
        (module(x).sin() - x[:, :3]).square().mean().backward()
        optimizer.step()
        before = flat(module, "mask")
        updated = pruner.step()
        if look is not None:
            look(optimizer, before, updated)


@pytest.mark.parametrize("name", METHODS)
def test_methods_keep_their_count_at_every_moment(name):
    method = METHODS[name]
    method = Method(**{**vars(method), "every": 5})
    module = network()
    pruner = Pruner(module, method, density=0.2, steps=60)
    changes = []

    def look(optimizer, before, updated):
        mask, weight = flat(module, "mask"), flat(module, "weight")
        density = method.density(pruner.count / 60, 1.0, 0.2)
        if updated:
            assert mask.sum() == math.floor(density * WEIGHTS + 0.5)
        changes.append(bool((mask != before).any()))
        assert not changes[-1] or updated
        assert not weight[~mask].any()
        grown = mask & ~before
        assert not weight[grown].any()
        states = [optimizer.state[layer.weight] for layer in module if hasattr(layer, "weight")]
        for moment in ("exp_avg", "exp_avg_sq"):
            row = torch.cat([state[moment].flatten() for state in states])
            assert not row[~mask | grown].any()

    train(module, pruner, 60, look)
    assert pruner.density == pytest.approx(math.floor(0.2 * WEIGHTS + 0.5) / WEIGHTS)
    # Updates at 5, 10, ..., of which the last replaces nothing; gradual pruning's at 12, where its
    # curve begins, 17, ..., 47, and 48, which has nothing left to prune.
    expected = {"gradual": 7, "one-shot": 1, "snip": 1, "static": 0, "static-uniform": 0}
    assert sum(changes) == expected.get(name, sum(changes))
    if name in ("set", "rigl"):
        assert 7 <= sum(changes) <= 9
    assert any(changes[49:]) is False


def test_the_gradient_is_that_of_a_dense_network():
    """RigL's first update, from autograd in float64 on a dense copy."""
    module = network()
    method = Method("constant", grow="gradient", start=0.0, every=1)
    pruner = Pruner(module, method, density=0.3, steps=10)
    mask, weight = flat(module, "mask"), flat(module, "weight")
    dense = network().double()
    for layer, sparse in zip(dense, module, strict=True):
        if isinstance(layer, nn.Linear):
            layer.weight.data = sparse.weight.detach().double()
    x = torch.randn(9, 7)
    module(x[:4]).square().sum().backward()
    module(x[4:]).square().sum().backward()
    dense(x.double()).square().sum().backward()
    gradient = torch.cat(
        [layer.weight.grad.flatten() for layer in dense if hasattr(layer, "weight")]
    )
    places = [(0, 24, 7), (168, 20, 24), (648, 3, 20)]
    k = math.floor(0.3 * WEIGHTS + 0.5)
    want = update_mask(
        mask[None],
        weight.abs()[None],
        gradient.abs().float()[None],
        k,
        replaced=method.replaced(0.1),
        layers=places,
        counts=layer_counts("erk", places, k),
    )
    assert pruner.step()
    assert torch.equal(flat(module, "mask"), want[0])
    assert not torch.equal(want[0], mask)


@pytest.mark.parametrize("to_none", [True, False])
def test_a_gradient_that_zero_grad_drops_is_dropped(to_none):
    """The actor's loss passes through the critic between the critic's update and its next."""
    torch.manual_seed(0)
    actor, masks = nn.Linear(7, 7), []
    x = torch.randn(8, 7)
    for passes in (False, True):
        critic = network()
        method = Method("constant", grow="gradient", start=0.0, every=1)
        pruner = Pruner(critic, method, density=0.3, steps=10)
        optimizer = torch.optim.SGD(critic.parameters(), 0.1)
        if passes:
            critic(actor(x)).mean().neg().backward()
        optimizer.zero_grad(to_none)
        for part in x.split(4):  # accumulated
            critic(part).square().mean().backward()
        assert pruner.step()
        masks.append(flat(critic, "mask"))
    assert torch.equal(*masks)


def test_an_input_without_a_batch_has_a_gradient():
    module = network()
    method = Method("constant", grow="gradient", start=0.0, every=1)
    pruner = Pruner(module, method, density=0.3, steps=10)
    module(torch.randn(7)).sum().backward()
    assert pruner.step()


def test_snip_ranks_by_the_initial_weight_times_its_gradient():
    module, dense = network(), network()
    pruner = Pruner(module, "snip", density=0.1, steps=50)
    x = torch.randn(32, 7)
    for net in (module, dense):
        net(x).square().mean().backward()
    score = torch.cat([(p * p.grad).abs().flatten() for p in dense.parameters() if p.dim() == 2])
    torch.optim.SGD(module.parameters(), 1.0).step()
    assert pruner.step()
    kept = math.floor(0.1 * WEIGHTS + 0.5)
    want = torch.zeros(WEIGHTS, dtype=torch.bool)
    want[score.argsort(descending=True)[:kept]] = True
    assert (flat(module, "mask") != want).sum() <= 2  # neighbours that rounding may swap


def test_hooks_are_there_for_the_passes_before_an_update_alone():
    module = network()
    method = Method("constant", grow="gradient", start=0.0, every=4)
    pruner = Pruner(module, method, density=0.5, steps=100)
    hooks = []

    def look(optimizer, before, updated):
        hooks.append(sum(len(layer._forward_hooks) for layer in module))

    train(module, pruner, 9, look)
    assert hooks == [0, 0, 3, 0, 0, 0, 3, 0, 0]


def test_a_checkpoint_goes_on_bit_for_bit():
    method = Method(grow="random", drop="signed", start=0.0, every=3)
    whole, half, rest = network(), network(), network()
    train(whole, Pruner(whole, method, 0.2, 40), 20)
    pruner = Pruner(half, method, 0.2, 40)
    states = {}

    def look(optimizer, before, updated):
        if pruner.count == 10:
            states["pruner"] = {
                key: value.clone() if isinstance(value, torch.Tensor) else value
                for key, value in pruner.state_dict().items()
            }
            states["module"] = {key: value.clone() for key, value in half.state_dict().items()}

    train(half, pruner, 20, look)
    assert torch.equal(flat(half, "mask"), flat(whole, "mask"))
    resumed = Pruner(rest, method, 0.2, 40)
    rest.load_state_dict(states["module"])
    resumed.load_state_dict(states["pruner"])
    assert resumed.count == 10
    assert torch.equal(flat(rest, "mask"), states_mask(states["module"]))
    # The same weights and masks make the same next update.
    half.load_state_dict(states["module"])
    pruner.load_state_dict(states["pruner"])
    for _ in range(6):
        pruner.step()
        resumed.step()
    assert torch.equal(flat(half, "mask"), flat(rest, "mask"))


def states_mask(state):
    return torch.cat([value.flatten() for name, value in state.items() if name.endswith("mask")])


def test_an_actor_and_a_critic_take_a_pruner_each():
    actor, critic = network(), network()
    pair = nn.ModuleDict({"actor": actor, "critic": critic})
    static = Pruner(pair["actor"], "static", 0.1, 100)
    growing = Pruner(pair["critic"], "set", 0.5, 100)
    assert static.density == pytest.approx(0.1, abs=1e-2)
    assert growing.density == pytest.approx(0.5, abs=1e-2)
    assert isinstance(actor[0], SparseLinear)


def test_excluded_layers_stay_and_shared_weights_count_once():
    module = network()
    pruner = Pruner(module, "static", 0.1, 100, exclude=["4"])
    assert type(module[4]) is nn.Linear
    assert pruner.density == pytest.approx(math.floor(0.1 * 648 + 0.5) / 648)
    tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    tied[1].weight = tied[0].weight
    Pruner(tied, "static", 0.5, 100)
    assert tied[0].mask.sum() == tied[1].mask.sum() == 18


def test_scores_know_each_ticket_alone():
    generator = torch.Generator().manual_seed(0)
    weight, initial, gradient = torch.randn(3, 5, SIZE, generator=generator)
    key = torch.arange(5) + 9
    together = Moment(weight, initial, gradient, key, 7)
    for name, score in (DROP_SCORES | GROW_SCORES).items():
        if score is None:
            continue
        alone = [
            score(Moment(weight[[i]], initial[[i]], gradient[[i]], key[[i]], 7)) for i in range(5)
        ]
        assert torch.equal(torch.cat(alone), score(together)), name


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Pruner(network(), "rigel", 0.1, 10), "method must be one of gradual"),
        (lambda: Pruner(network(), "set", 1.1, 10), r"density must be in \[0, 1\], got 1.1"),
        (lambda: Pruner(network(), "set", 0.1, 0), "steps must be at least 1, got 0"),
        (lambda: Pruner(network(), "set", 0.1, 9, exclude=["9"]), "exclude must name"),
        (lambda: Method(schedule="linear"), "schedule must be one of constant"),
        (lambda: Method(start=0.9), "stop must be at least start = 0.9"),
        (lambda: Method("cyclic"), "grow must be random or gradient"),
        (lambda: Method(every=0), "every must be at least 1"),
        (lambda: Method(distribution="by-layer"), "shares must be given where the distribution"),
        (lambda: Method(shares=(1, 2)), "shares must be given where the distribution is by-layer"),
        (lambda: Method(shares=(1, 0)), "each of shares must be above 0"),
        (
            lambda: layer_counts("by-layer", LAYERS, 3, shares=(1.0,)),
            "shares must be a number for each of 3 layers, got 1",
        ),
        (lambda: Method(fraction=1.5), "fraction must be in"),
        (lambda: layer_counts("er", LAYERS, 3), "distribution must be one of global"),
        (lambda: layer_counts("erk", LAYERS, 40), r"k must be in \[0, 39\], got 40"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_layer_without_a_part_in_the_loss_is_named():
    module = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
    pruner = Pruner(module, Method("constant", grow="gradient", start=0.0, every=1), 0.5, 10)
    module["used"](torch.randn(2, 4)).sum().backward()
    with pytest.raises(RuntimeError, match=r"none through 'idle' before step 1"):
        pruner.step()


def test_compiled_hooks_are_missed_in_words():
    module = network()
    pruner = Pruner(module, Method("constant", grow="gradient", start=0.0, every=2), 0.5, 10)
    compiled = torch.compile(module, backend="eager")
    compiled(torch.randn(2, 7)).sum().backward()
    pruner.step()
    compiled(torch.randn(2, 7)).sum().backward()
    with pytest.raises(RuntimeError, match=r"torch\.compile would leave out its hooks"):
        pruner.step()


def test_steps_are_a_number():
    with pytest.raises(ValueError, match="steps must be at least 1, got nan"):
        Pruner(network(), "set", 0.1, float("nan"))


def test_an_update_waits_for_a_gradient_that_is_finite():
    module = network()
    pruner = Pruner(module, Method("constant", grow="gradient", start=0.0, every=4), 0.5, 100)
    x = torch.randn(3, 7)
    for scale, updated in (
        (1.0, False),
        (1.0, False),
        (1.0, False),
        (math.inf, False),
        (1.0, True),
    ):
        module.zero_grad()
        (module(x).sum() * scale).backward()
        before = flat(module, "mask")
        assert pruner.step() is updated
        assert torch.equal(before, flat(module, "mask")) is not updated


def test_weights_of_float64_are_compared_as_such():
    layer = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    layer.weight.data[:] = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    pruner = Pruner(layer, Method("one-shot", "global", start=0.0, stop=0.0), 0.5, 10)
    assert pruner.step()
    assert layer.mask.tolist() == [[False, True]]


def test_a_name_is_excluded_whole_and_a_foreign_state_refused():
    module = nn.ModuleDict({"actor": network(), "critic": network()})
    pruner = Pruner(module, "static", 0.1, 10, exclude="actor")
    assert type(module["actor"][0]) is nn.Linear
    with pytest.raises(ValueError, match="state must be a pruner's, got one without count, init"):
        pruner.load_state_dict({})
