"""Conditions: what each keeps, what each changes, and that tickets never see each other."""

import itertools

import pytest
import torch

from sparse_tickets import conditions
from sparse_tickets.conditions import (
    CONDITIONS,
    Condition,
    draw,
    find_condition,
    register_condition,
)
from sparse_tickets.kernels.arena import Arena
from sparse_tickets.kernels.random import Stream, permutation
from sparse_tickets.prune import erk_counts, random_mask

ARENA = Arena.build((6, 16, 16, 3))
P, N = 5, ARENA.prunable


@pytest.fixture
def inputs(generator):
    """Rewind values, an IMP mask of another density in every ticket, keys and fresh values."""
    mask = torch.rand(P, N, generator=generator) < torch.linspace(0.1, 0.9, P)[:, None]
    mask[:, :2] = torch.tensor([True, False])
    return {
        "rewind_values": torch.randn(P, N, generator=generator),
        "imp_mask": mask,
        "key": torch.randint(-(2**62), 2**62, (P,), generator=generator),
        "fresh": torch.randn(P, N, generator=generator) + 100,
        "arena": ARENA,
    }


def layers(flat, arena=ARENA):
    return [
        flat[:, begin : begin + out * inp].unflatten(1, (out, inp))
        for begin, out, inp in arena.prunable_layers()
    ]


def multiset(row):
    return row.sort().values


@pytest.mark.parametrize("name", CONDITIONS)
class TestEvery:
    def test_zero_off_the_mask_and_exact_count(self, name, inputs):
        before = {key: value.clone() for key, value in inputs.items() if key != "arena"}
        weight, mask = draw(CONDITIONS[name], **inputs)
        assert mask.dtype == torch.bool
        assert weight.dtype == torch.float32
        assert torch.equal(mask.sum(1), inputs["imp_mask"].sum(1))
        assert torch.equal(weight != 0, mask)
        for key, value in before.items():
            assert torch.equal(inputs[key], value), f"{key} was modified"
        mask.fill_(False)
        assert torch.equal(inputs["imp_mask"], before["imp_mask"])

    def test_a_ticket_does_not_see_its_neighbours(self, name, inputs):
        together = draw(CONDITIONS[name], **inputs)
        order = torch.tensor([3, 0, 4])
        some = {k: v[order] if k != "arena" else v for k, v in inputs.items()}
        for one, other in zip(draw(CONDITIONS[name], **some), together, strict=True):
            assert torch.equal(one, other[order])

    def test_full_empty_and_no_tickets(self, name, inputs):
        inputs["imp_mask"] = torch.zeros(P, N, dtype=torch.bool)
        inputs["imp_mask"][1] = True
        weight, mask = draw(CONDITIONS[name], **inputs)
        assert mask.sum(1).tolist() == [0, N, 0, 0, 0]
        assert weight.count_nonzero(1).tolist() == [0, N, 0, 0, 0]
        none = {k: v[:0] if k != "arena" else v for k, v in inputs.items()}
        assert [part.shape for part in draw(CONDITIONS[name], **none)] == [(0, N), (0, N)]

    def test_layer_counts(self, name, inputs):
        _, mask = draw(CONDITIONS[name], **inputs)
        counts = [layer.sum((1, 2)).tolist() for layer in layers(mask)]
        original = [layer.sum((1, 2)).tolist() for layer in layers(inputs["imp_mask"])]
        if CONDITIONS[name].chained:
            assert counts == original
        else:
            assert counts != original

    def test_values_come_from_where_the_condition_says(self, name, inputs):
        weight, mask = draw(CONDITIONS[name], **inputs)
        source = CONDITIONS[name].weights
        if source == "permuted":
            survivors = inputs["imp_mask"]
            pairs = zip(
                layers(weight),
                layers(mask),
                layers(inputs["rewind_values"]),
                layers(survivors),
                strict=True,
            )
            for new, here, old, there in pairs:
                for p in range(P):
                    moved, original = new[p][here[p]], old[p][there[p]]
                    assert torch.equal(multiset(moved), multiset(original))
                    assert len(moved) < 8 or not torch.equal(moved, original)
        else:
            values = inputs["rewind_values" if source == "init" else "fresh"]
            assert torch.equal(weight, torch.where(mask, values, 0.0))

    def test_keys_matter_where_something_is_drawn(self, name, inputs):
        one = draw(CONDITIONS[name], **inputs)
        other = draw(CONDITIONS[name], **{**inputs, "key": inputs["key"] + 1})
        same_mask, same_weight = torch.equal(one[1], other[1]), torch.equal(one[0], other[0])
        assert same_mask == (CONDITIONS[name].mask == "imp")
        drawn = CONDITIONS[name].mask != "imp" or CONDITIONS[name].weights == "permuted"
        assert same_weight == (not drawn)


def test_the_protocols_conditions():
    assert {c.name: (c.mask, c.weights, c.chained) for c in CONDITIONS.values()} == {
        "mask/weights": ("imp", "init", True),
        "mask/permuted": ("imp", "permuted", True),
        "permuted/permuted": ("permuted", "permuted", True),
        "random/re-init": ("random", "fresh", False),
        "mask/re-init": ("imp", "fresh", True),
        "permuted/re-init": ("permuted", "fresh", True),
        "erk-random/re-init": ("erk-random", "fresh", False),
    }


def test_mask_shuffles_change_rows_and_columns(inputs):
    """A shuffle of rows alone keeps every column's count, that is every dead input."""
    _, mask = draw(CONDITIONS["permuted/re-init"], **inputs)
    for new, old in zip(layers(mask), layers(inputs["imp_mask"]), strict=True):
        assert not torch.equal(new.sum(1), old.sum(1))
        assert not torch.equal(new.sum(2), old.sum(2))
        assert not torch.equal(new.sum(1).sort().values, old.sum(1).sort().values)
        assert not torch.equal(new.sum(2).sort().values, old.sum(2).sort().values)


def test_shuffles_are_uniform_over_the_layer():
    """A lone weight of a 2 x 6 layer, 6000 keys: each share's standard error is 0.0036."""
    arena = Arena.build((6, 2))
    tickets = 6000
    mask = torch.zeros(tickets, 12, dtype=torch.bool)
    mask[:, 4] = True
    values, key = torch.ones(tickets, 12), torch.arange(tickets)
    _, drawn = draw(CONDITIONS["permuted/re-init"], values, mask, key, values, arena)
    assert (drawn.double().mean(0) - 1 / 12).abs().max() < 5 * 0.0036


def test_values_are_uniform_over_the_survivors():
    """All six orders of three survivors, 6000 keys: each share's standard error is 0.0048."""
    arena = Arena.build((3, 2))
    tickets = 6000
    mask = torch.tensor([True, False, True, False, False, True]).expand(tickets, -1)
    values = torch.arange(6.0).expand(tickets, -1)
    weight, _ = draw(
        CONDITIONS["mask/permuted"], values + 1, mask, torch.arange(tickets), values, arena
    )
    orders = [tuple(row) for row in weight[mask].reshape(tickets, 3).tolist()]
    for order in itertools.permutations([1.0, 3.0, 6.0]):
        assert abs(orders.count(order) / tickets - 1 / 6) < 5 * 0.0048


def test_layers_of_one_shape_are_shuffled_apart(generator):
    arena = Arena.build((16, 16, 16))
    half = torch.rand(P, 256, generator=generator) < 0.5
    values = torch.randn(P, 256, generator=generator)
    weight, mask = draw(
        CONDITIONS["permuted/permuted"],
        torch.cat([values, values], 1),
        torch.cat([half, half], 1),
        torch.arange(P),
        torch.zeros(P, 512),
        arena,
    )
    for flat in (weight, mask):
        assert not torch.equal(flat[:, :256], flat[:, 256:])


def test_masks_and_values_are_shuffled_apart(inputs):
    """If mask and values moved by one permutation, the condition would be a relabelling."""
    weight, mask = draw(CONDITIONS["permuted/permuted"], **inputs)
    _, same_mask = draw(CONDITIONS["permuted/re-init"], **inputs)
    assert torch.equal(mask, same_mask)
    moved = inputs["rewind_values"].clone()
    for index, (begin, out, inp) in enumerate(ARENA.prunable_layers()):
        layer = slice(begin, begin + out * inp)
        order = permutation(inputs["key"], out * inp, stream=Stream.MASK, step=index)
        moved[:, layer] = moved[:, layer].gather(1, order)
    assert not torch.equal(weight, torch.where(mask, moved, 0.0))


def test_erk_masks_have_erk_counts(inputs):
    _, mask = draw(CONDITIONS["erk-random/re-init"], **inputs)
    counts = torch.stack([layer.sum((1, 2)) for layer in layers(mask)], 1)
    k = inputs["imp_mask"].sum(1).tolist()
    assert counts.tolist() == [erk_counts(ARENA.prunable_layers(), each) for each in k]


class TestUserDefined:
    @pytest.fixture(autouse=True)
    def _own_registry(self, monkeypatch):
        monkeypatch.setattr(conditions, "CONDITIONS", dict(CONDITIONS))

    def test_registered_in_a_few_lines(self, inputs):
        @register_condition("mask/sign", mask="imp", weights="init")
        def keep_signs(rewind_values, imp_mask, key, fresh, arena):
            """The ticket's mask with the signs of its weights and one magnitude."""
            return rewind_values.sign() * 0.1 * imp_mask, imp_mask

        condition = find_condition("mask/sign")
        assert condition.chained
        weight, mask = draw(condition, **inputs)
        assert torch.equal(mask, inputs["imp_mask"])
        assert torch.equal(weight != 0, mask)

    def test_a_random_one_has_no_chain(self, inputs):
        @register_condition("random/init", mask="random", weights="init")
        def random_init(rewind_values, imp_mask, key, fresh, arena):
            mask = random_mask(key, imp_mask.sum(1), arena)
            return rewind_values * mask, mask

        assert not find_condition("random/init").chained
        draw(find_condition("random/init"), **inputs)

    @pytest.mark.parametrize(
        ("function", "error", "match"),
        [
            (lambda w, m, *_: (w, m), ValueError, "'mine': weight must be zero where the mask"),
            (lambda w, m, *_: (w[:, 1:], m), ValueError, "'mine': weight must have shape"),
            (lambda w, m, *_: (w * 0, m.float()), TypeError, "'mine': mask must be bool"),
            (lambda w, m, *_: (w * 0, m & False), ValueError, "'mine': mask must keep"),
        ],
    )
    def test_broken_promises_are_named(self, function, error, match, inputs):
        register_condition("mine")(function)
        with pytest.raises(error, match=match):
            draw(find_condition("mine"), **inputs)

    def test_names_are_taken_once(self):
        with pytest.raises(ValueError, match="name must be new, got 'mask/weights'"):
            register_condition("mask/weights")(lambda *_: None)


def test_unknown_names():
    with pytest.raises(ValueError, match="condition must be one of mask/weights, mask/permuted"):
        find_condition("mask")
    with pytest.raises(ValueError, match="mask must be one of imp, permuted, random, erk-random"):
        Condition("x", "uniform", "init")
    with pytest.raises(ValueError, match="weights must be one of init, permuted, fresh"):
        Condition("x", "imp", "zero")
    with pytest.raises(ValueError, match="needs mask 'imp' or 'permuted'"):
        Condition("random/permuted", "random", "permuted")


def test_arguments_are_checked(inputs):
    ticket = CONDITIONS["mask/weights"]
    with pytest.raises(ValueError, match="fresh must have shape"):
        draw(ticket, **{**inputs, "fresh": torch.ones(P, 3)})
    with pytest.raises(TypeError, match="imp_mask must be bool"):
        draw(ticket, **{**inputs, "imp_mask": torch.ones(P, N)})
    with pytest.raises(TypeError, match="key must be int64"):
        draw(ticket, **{**inputs, "key": torch.ones(P)})
