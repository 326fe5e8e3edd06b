"""One level of iterative magnitude pruning: what each condition starts from, and what it keeps."""

import pytest
import torch

from sparse_tickets.conditions import CONDITIONS, Condition, draw
from sparse_tickets.imp import Trained, dense_population, next_population
from sparse_tickets.kernels import use_backend
from sparse_tickets.kernels.arena import Arena, Parameters
from sparse_tickets.kernels.dispatch import has_triton, interpreting
from sparse_tickets.kernels.prune import prune
from sparse_tickets.kernels.random import derive_key
from sparse_tickets.population import initialise
from sparse_tickets.prune import CRITERIA
from sparse_tickets.structure import NOfM, Structure

pytestmark = pytest.mark.usefixtures("plain_torch")

BUILT_IN = tuple(CONDITIONS)


ARENA = Arena.build((6, 16, 12, 3), (6, 16, 12, 1), continuous=True)
BOTH = Arena.build((6, 16, 12, 3), (6, 16, 12, 1), continuous=True, prune_critic=True)
ACTOR = Arena.build((6, 16, 12, 3))
# Every criterion has a mask here, groups of four inputs included.
EVEN = Arena.build((8, 16, 12, 3), (8, 16, 12, 1), continuous=True)
EVEN_BOTH = Arena.build((8, 16, 12, 3), (8, 16, 12, 1), continuous=True, prune_critic=True)


def keys(*parts, count):
    return torch.tensor([derive_key(*parts, index) for index in range(count)])


def rewound(arena, count, generator, *, trained=False):
    """A dense rewind point: at initialisation, or after some training."""
    weight = initialise(arena, keys("init", count=count), log_std=-0.5)
    zeros = torch.zeros_like(weight)
    step = torch.zeros(count, dtype=torch.int64)
    mask = torch.ones(count, arena.prunable, dtype=torch.bool)
    if not trained:
        return Parameters(weight, mask, zeros, zeros.clone(), step)
    weight = weight + 0.1 * torch.randn(weight.shape, generator=generator)
    m = torch.randn(weight.shape, generator=generator)
    v = torch.rand(weight.shape, generator=generator)
    return Parameters(weight, mask, m, v, step + 48)


def trained_under(mask, generator):
    return Trained(torch.randn(mask.shape, generator=generator) * mask, mask)


def level(arena, conditions, point, generator, *, mask=None, kept=90, number=1, **settings):
    if mask is None:
        mask = torch.ones(len(conditions), arena.prunable, dtype=torch.bool)
    trained = trained_under(mask, generator)
    key = torch.tensor([derive_key(name, i, number) for i, name in enumerate(conditions)])
    population = next_population(
        arena, conditions, trained, point, key, kept=kept, density=0.4, **settings
    )
    return population.parameters, trained


def by_the_rule(arena, name, trained, point, key, kept, criterion):
    """A ticket's start as the protocol says it, in plain torch; every argument has one row."""
    chosen, condition = CRITERIA[criterion], CONDITIONS[name]
    values = point.weight[:, : arena.prunable]
    if isinstance(chosen, Structure):
        scores = chosen.scores(trained.weight, trained.mask, arena)
    else:
        scores = chosen(trained.weight, values, arena)
    scores = scores.masked_fill(~trained.mask, -torch.inf)
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :kept]
    mask = torch.zeros_like(trained.mask).scatter(1, best, True) & trained.mask

    actor = Arena.build(arena.actor.sizes)
    policy = slice(0, actor.prunable)
    fresh = initialise(arena, key)[:, policy]
    weight, m, v = point.weight.clone(), point.m.clone(), point.v.clone()
    weight[:, policy], mask[:, policy] = draw(
        condition, values[:, policy], mask[:, policy], key, fresh, actor
    )
    if condition.weights != "init":
        m[:, policy] = v[:, policy] = 0
    for row in (weight, m, v):
        row[:, : arena.prunable][~mask] = 0
    return Parameters(weight, mask, m, v, point.step)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("late", [False, True], ids=["initial", "late"])
@pytest.mark.parametrize("arena", [EVEN, EVEN_BOTH], ids=["actor", "critic too"])
def test_a_level_starts_by_the_rule(arena, late, criterion, generator, monkeypatch):
    """Bit for bit: every criterion and condition, and a user's own."""
    monkeypatch.setitem(CONDITIONS, "random/init", Condition("random/init", "random", "init"))

    def mirrored(values, imp_mask, key, fresh, arena):
        mask = imp_mask.flip(1)
        return torch.where(mask, fresh - values, 0), mask

    monkeypatch.setitem(CONDITIONS, "own", Condition("own", "imp", "init", mirrored))
    names = (*CONDITIONS, "mask/weights", "random/re-init")
    point = rewound(arena, len(names), generator, trained=late)
    mask = torch.ones(len(names), arena.prunable, dtype=torch.bool)
    kept, rule = arena.prunable // 3, CRITERIA[criterion]
    if isinstance(rule, NOfM):
        kept = arena.prunable * rule.n // rule.m
    else:
        mask = torch.rand(mask.shape, generator=generator) < 0.8
    trained, key = trained_under(mask, generator), keys("cell", count=len(names))
    got = next_population(
        arena, names, trained, point, key, kept=kept, density=0.4, criterion=criterion
    ).parameters
    for row, name in enumerate(names):
        one = slice(row, row + 1)
        wanted = by_the_rule(
            arena,
            name,
            Trained(*(value[one] for value in trained)),
            Parameters(*(value[one] for value in point)),
            key[one],
            kept,
            criterion,
        )
        for field, ours, theirs in zip(got._fields, got, wanted, strict=True):
            assert torch.equal(ours[one], theirs), f"{name}: {field}"


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_every_backend_starts_alike(backend, generator):
    if backend == "triton" and not (has_triton() and interpreting()):
        pytest.skip("needs Triton's interpreter")
    point = rewound(BOTH, len(BUILT_IN), generator, trained=True)
    mask = torch.rand(len(BUILT_IN), BOTH.prunable, generator=generator) < 0.8
    trained, key = trained_under(mask, generator), keys("cell", count=len(BUILT_IN))
    arguments = BOTH, BUILT_IN, trained, point, key
    wanted = next_population(*arguments, kept=150, density=0.4).parameters
    with use_backend(backend):
        got = next_population(*arguments, kept=150, density=0.4).parameters
    for ours, theirs in ((got.mask, wanted.mask), (got.m, wanted.m), (got.v, wanted.v)):
        assert torch.equal(ours, theirs)
    # Normals may differ by a unit in the last place.
    torch.testing.assert_close(got.weight, wanted.weight, rtol=2e-7, atol=1e-15)


@pytest.mark.parametrize("arena", [ARENA, BOTH], ids=["actor", "critic too"])
def test_every_condition_restores_what_pruning_does_not_touch(arena, generator):
    point = rewound(arena, len(BUILT_IN), generator)
    parameters, _ = level(arena, BUILT_IN, point, generator)
    rest = slice(arena.prunable, arena.size)
    assert torch.equal(parameters.weight[:, rest], point.weight[:, rest])
    critic = slice(ACTOR.prunable, arena.prunable)
    expected = point.weight[:, critic] * parameters.mask[:, critic]
    assert torch.equal(parameters.weight[:, critic], expected)
    assert not parameters.m.any()
    assert not parameters.v.any()
    assert not parameters.step.any()


@pytest.mark.parametrize("kept", [0, 1, 90, ARENA.prunable])
def test_counts_are_exact_and_weights_zero_off_the_mask(kept, generator):
    point = rewound(ARENA, len(BUILT_IN), generator)
    parameters, _ = level(ARENA, BUILT_IN, point, generator, kept=kept)
    assert (parameters.mask.sum(1) == kept).all()
    assert not parameters.weight[:, : ARENA.prunable][~parameters.mask].any()


def test_pruning_the_critic_ranks_both_networks_together(generator):
    point = rewound(BOTH, 2, generator)
    parameters, trained = level(BOTH, ["mask/weights"] * 2, point, generator, kept=200)
    smallest = trained.weight.abs().masked_fill(~parameters.mask, torch.inf).amin(1)
    largest = trained.weight.abs().masked_fill(parameters.mask, -torch.inf).amax(1)
    assert (smallest > largest).all()
    actor = parameters.mask[:, : ACTOR.prunable].sum(1)
    assert ((actor > 0) & (actor < 200)).all()


def test_the_ticket_keeps_the_largest_trained_weights_at_their_initial_values(generator):
    point = rewound(ARENA, 1, generator)
    parameters, trained = level(ARENA, ["mask/weights"], point, generator)
    top = trained.weight.abs().topk(90).indices
    assert parameters.mask.gather(1, top).all()
    initial = point.weight[:, : ARENA.prunable]
    assert torch.equal(parameters.weight[:, : ARENA.prunable], initial * parameters.mask)


def test_masks_are_nested_over_levels(generator):
    point = rewound(ARENA, 2, generator)
    mask = None
    for number, kept in enumerate((160, 100, 40, 7, 0), start=1):
        parameters, _ = level(
            ARENA, ["mask/weights", "mask/re-init"], point, generator, mask=mask, kept=kept,
            number=number,
        )  # fmt: skip
        if mask is not None:
            assert not (parameters.mask & ~mask).any()
        mask = parameters.mask


def layer_counts(mask):
    return [mask[:, begin : begin + o * i].sum(1) for begin, o, i in ARENA.prunable_layers()]


def test_permuted_masks_keep_layer_counts_and_change_row_and_column_counts(generator):
    conditions = ["mask/weights", "permuted/permuted", "permuted/re-init"]
    point = rewound(ARENA, 3, generator)
    mask = torch.ones(3, ARENA.prunable, dtype=torch.bool)
    trained = Trained(torch.randn(1, ARENA.prunable, generator=generator).expand(3, -1), mask)
    parameters = next_population(
        ARENA, conditions, trained, point, keys("cell", count=3), kept=90, density=0.4
    ).parameters
    for counts in layer_counts(parameters.mask):
        assert (counts == counts[0]).all()
    for layer in range(3):
        masks = ARENA.actor.weight(parameters.mask, layer)
        for axis in (1, 2):
            counts = masks.sum(axis)
            assert not torch.equal(counts[0], counts[1]), f"layer {layer} axis {axis}"
            assert not torch.equal(counts[0], counts[2]), f"layer {layer} axis {axis}"


def test_permuted_weights_are_the_surviving_initial_values(generator):
    conditions = ["mask/permuted", "permuted/permuted"]
    point = rewound(ARENA, 2, generator)
    parameters, trained = level(ARENA, conditions, point, generator)
    for row in range(2):
        survivors = trained.weight[row].abs() >= trained.weight[row].abs().topk(90).values[-1]
        for begin, out, inp in ARENA.prunable_layers():
            layer = slice(begin, begin + out * inp)
            values = point.weight[row, layer][survivors[layer]]
            got = parameters.weight[row, layer][parameters.mask[row, layer]]
            assert torch.equal(got.sort().values, values.sort().values)
            assert not torch.equal(got, values)


def test_permutations_are_drawn_afresh_at_every_level(generator):
    point = rewound(ARENA, 1, generator)
    one, _ = level(ARENA, ["permuted/permuted"], point, torch.Generator().manual_seed(3), number=1)
    two, _ = level(ARENA, ["permuted/permuted"], point, torch.Generator().manual_seed(3), number=2)
    assert not torch.equal(one.mask, two.mask)
    for first, second in zip(layer_counts(one.mask), layer_counts(two.mask), strict=True):
        assert torch.equal(first, second)


def test_reinitialised_weights_are_fresh_draws_of_the_same_scheme(generator):
    conditions = ["mask/re-init", "random/re-init", "erk-random/re-init"]
    point = rewound(ARENA, 3, generator)
    parameters, _ = level(ARENA, conditions, point, generator, kept=ARENA.prunable)
    got = parameters.weight[:, : ARENA.prunable]
    assert not (got == point.weight[:, : ARENA.prunable]).any()
    for layer in range(3):
        weight = ARENA.actor.weight(parameters.weight, layer)
        assert weight.var() * weight.shape[2] == pytest.approx(1, rel=0.4)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_later_rewind_point_is_restored_with_its_moments(name, generator):
    point = rewound(ARENA, 2, generator, trained=True)
    parameters, _ = level(ARENA, [name] * 2, point, generator)
    rest = slice(ARENA.prunable, ARENA.size)
    assert (parameters.step == 48).all()
    for got, stored in zip(
        (parameters.weight, parameters.m, parameters.v),
        (point.weight, point.m, point.v),
        strict=True,
    ):
        assert torch.equal(got[:, rest], stored[:, rest])
    prunable = slice(0, ARENA.prunable)
    keeps = 1.0 if name == "mask/weights" else 0.0
    for got, stored in ((parameters.m, point.m), (parameters.v, point.v)):
        assert torch.equal(got[:, prunable], keeps * stored[:, prunable] * parameters.mask)
    if name == "mask/weights":
        expected = point.weight[:, prunable] * parameters.mask
        assert torch.equal(parameters.weight[:, prunable], expected)


def test_a_tickets_start_depends_on_nothing_beside_it(generator):
    conditions = list(BUILT_IN)
    point = rewound(ARENA, len(conditions), generator, trained=True)
    mask = torch.rand(len(conditions), ARENA.prunable, generator=generator) < 0.9
    trained = trained_under(mask, generator)
    key = keys("cell", count=len(conditions))
    together = next_population(ARENA, conditions, trained, point, key, kept=90, density=0.4)
    for row, name in enumerate(conditions):
        one = slice(row, row + 1)
        alone = next_population(
            ARENA,
            [name],
            Trained(*(value[one] for value in trained)),
            Parameters(*(value[one] for value in point)),
            key[one],
            kept=90,
            density=0.4,
        )
        for got, expected in zip(alone.parameters, together.parameters, strict=True):
            assert torch.equal(got, expected[one]), name


def test_prunes_by_the_weights_themselves(generator, monkeypatch):
    """Without a pass to compute magnitudes."""
    calls = []

    def spy(scores, *rows, **options):
        calls.append((scores, options["criterion"]))
        return prune(scores, *rows, **options)

    monkeypatch.setattr("sparse_tickets.prune.prune", spy)
    monkeypatch.delattr("sparse_tickets.imp._redraw_policy_")
    point = rewound(BOTH, 3, generator, trained=True)
    _, trained = level(BOTH, ["mask/weights"] * 3, point, generator)
    ((scores, criterion),) = calls
    assert scores is trained.weight
    assert criterion == "magnitude"


def test_inputs_are_left_alone(generator):
    point = rewound(ARENA, len(BUILT_IN), generator, trained=True)
    copies = [value.clone() for value in point]
    level(ARENA, BUILT_IN, point, generator)
    assert all(torch.equal(now, before) for now, before in zip(point, copies, strict=True))


def test_unknown_names_and_a_wrong_number_of_them_are_refused(generator):
    point = rewound(ARENA, 1, generator)
    with pytest.raises(ValueError, match="condition must be one of"):
        level(ARENA, ["mask/nothing"], point, generator)
    with pytest.raises(ValueError, match="criterion must be one of"):
        level(ARENA, ["mask/weights"], point, generator, criterion="size")
    with pytest.raises(ValueError, match="one for each of 1 tickets, got 2"):
        next_population(
            ARENA, ["mask/weights"] * 2, trained_under(point.mask, generator), point,
            keys("cell", count=1), kept=3, density=0.4,
        )  # fmt: skip


def test_dense_populations_start_from_the_seeds_weights():
    key = keys("init", count=3)
    population = dense_population(ARENA, key, "kaiming", -1.0)
    assert population.parameters.mask.all()
    assert torch.equal(population.parameters.weight, initialise(ARENA, key, "kaiming", -1.0))


def test_the_critic_is_pruned_and_rewound_alike_in_every_condition(generator):
    """The same trained network gives every condition the same critic: they differ in the actor."""
    conditions = (*BUILT_IN, "mask/weights")
    count = len(conditions)
    point = rewound(BOTH, 1, generator)
    point = Parameters(*(value.expand(count, *value.shape[1:]) for value in point))
    earlier = torch.rand(1, BOTH.prunable, generator=generator) < 0.6
    weight = torch.randn(1, BOTH.prunable, generator=generator) * earlier
    trained = Trained(weight.expand(count, -1), earlier.expand(count, -1))
    key = keys("cell", count=count)
    settings = {"kept": 150, "density": 0.4}
    got = next_population(BOTH, conditions, trained, point, key, **settings).parameters
    critic = slice(ACTOR.prunable, BOTH.prunable)
    for tensor in (got.mask, got.weight):
        assert torch.equal(tensor[:, critic], tensor[-1:, critic].expand(count, -1))
    actors = {tuple(mask.tolist()) for mask in got.mask[:, : ACTOR.prunable]}
    assert len(actors) == 5  # IMP, two permuted, two random
    assert (got.mask[:, : ACTOR.prunable].sum(1) == got.mask[-1, : ACTOR.prunable].sum()).all()
