"""Counts, criteria and random masks: exact, per ticket, and distributed as they say."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_tickets.imp import Trained, dense_population, next_population
from sparse_tickets.kernels.arena import Arena
from sparse_tickets.kernels.linear import block_pattern
from sparse_tickets.prune import (
    CRITERIA,
    erk_counts,
    kept,
    prune_masks,
    random_layer_mask,
    random_mask,
    register_criterion,
)
from sparse_tickets.structure import Blocks, NOfM, block_mask, fan_in_mask, n_m_mask
from sparse_tickets.sweep.spec import Sweep

ARENA = Arena.build((4, 16, 8, 2))
POLICY = Arena.build((4, 64, 64, 2), (4, 64, 64, 1))
LAYERS = POLICY.prunable_layers()
# Every layer of whole blocks and groups.
EVEN = Arena.build((32, 64, 32))
ANY_COUNT = sorted(name for name in CRITERIA if not isinstance(CRITERIA[name], NOfM))


def layer_counts(mask, arena):
    return torch.stack(
        [mask[:, begin : begin + out * inp].sum(1) for begin, out, inp in arena.prunable_layers()],
        dim=1,
    )


class TestKept:
    def test_the_protocols_counts(self):
        assert [kept(4480, level) for level in (0, 1, 2, 3, 24)] == [4480, 3584, 2867, 2294, 21]

    @given(st.integers(0, 10**7), st.integers(0, 60), st.sampled_from([0, 0.1, 0.2, 0.5, 1.0]))
    @settings(deadline=None, derandomize=True, max_examples=100)
    def test_rounds_the_exact_value(self, n, level, rate):
        exact = n * (1 - Fraction(str(rate))) ** level
        assert abs(kept(n, level, rate) - exact) <= Fraction(1, 2)

    def test_halves_round_up_and_binary_fractions_do_not_matter(self):
        assert kept(1, 1, 0.5) == 1
        assert kept(5, 1, 0.3) == 4
        assert kept(5, 1, 0.1) == 5

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [((-1, 0), "prunable"), ((4, -1), "level"), ((4, 1, 1.2), r"rate must be in \[0, 1\]")],
    )
    def test_arguments_are_checked(self, arguments, match):
        with pytest.raises(ValueError, match=match):
            kept(*arguments)


class TestCriteria:
    def prune(self, name, weight, initial, k, mask=None):
        mask = torch.ones(weight.shape, dtype=torch.bool) if mask is None else mask
        return prune_masks(name, weight, initial, mask, k, ARENA)

    @pytest.fixture
    def weight(self, generator):
        return torch.randn(5, ARENA.prunable, generator=generator)

    @pytest.fixture
    def initial(self, generator):
        return torch.randn(5, ARENA.prunable, generator=generator)

    @pytest.mark.parametrize(
        ("name", "score"),
        [
            ("magnitude", lambda w, w0: w.abs()),
            ("movement", lambda w, w0: (w - w0).abs()),
            ("magnitude-increase", lambda w, w0: w.abs() - w0.abs()),
        ],
    )
    def test_global_criteria_keep_the_largest_scores(self, name, score, weight, initial):
        mask = self.prune(name, weight, initial, 50)
        scores = score(weight, initial)
        assert mask.sum(1).tolist() == [50] * 5
        for row, chosen in zip(scores, mask, strict=True):
            assert row[chosen].min() >= row[~chosen].max()

    def test_layerwise_magnitude_keeps_the_same_share_of_every_layer(self, weight, initial):
        weight = weight * torch.linspace(0.01, 100, ARENA.prunable)
        mask = torch.ones(weight.shape, dtype=torch.bool)
        sizes = torch.tensor([out * inp for _, out, inp in ARENA.prunable_layers()])
        for level in range(8):
            k = kept(ARENA.prunable, level)
            smaller = self.prune("layerwise-magnitude", weight * mask, initial, k, mask)
            assert not (smaller & ~mask).any()
            assert smaller.sum(1).tolist() == [k] * 5
            ideal = sizes * k / ARENA.prunable
            assert (layer_counts(smaller, ARENA) - ideal).abs().max() <= 1
            mask = smaller
        for begin, out, inp in ARENA.prunable_layers():
            layer = slice(begin, begin + out * inp)
            for row, chosen in zip(weight[:, layer].abs(), mask[:, layer], strict=True):
                assert row[chosen].min() > row[~chosen].max()

    @pytest.mark.parametrize("name", ANY_COUNT)
    def test_a_ticket_does_not_see_its_neighbours(self, name, weight, initial):
        k = torch.tensor([0, 10, 50, ARENA.prunable, 7])
        together = self.prune(name, weight, initial, k)
        assert together.sum(1).tolist() == k.tolist()
        for p in range(5):
            alone = self.prune(name, weight[p : p + 1], initial[p : p + 1], k[p : p + 1])
            assert torch.equal(alone[0], together[p])

    @pytest.mark.parametrize("name", ANY_COUNT)
    def test_ties_keep_the_count(self, name):
        ones = torch.ones(2, ARENA.prunable)
        assert self.prune(name, ones, ones, 33).sum(1).tolist() == [33, 33]

    def test_names(self, weight, initial):
        with pytest.raises(ValueError, match="criterion must be one of 1:4, 2:4, block-16"):
            self.prune("size", weight, initial, 3)
        with pytest.raises(ValueError, match="name must be new, got 'magnitude'"):
            register_criterion("magnitude")(CRITERIA["movement"])

    def test_a_criterion_of_ones_own(self, weight, initial, monkeypatch):
        monkeypatch.setattr("sparse_tickets.prune.CRITERIA", dict(CRITERIA))

        @register_criterion("smallest")
        def smallest(weight, initial, arena):
            return -weight.abs()

        mask = self.prune("smallest", weight, initial, 20)
        assert weight.abs()[mask].max() < weight.abs().quantile(0.5)

        @register_criterion("short")
        def short(weight, initial, arena):
            return weight[:, :-1]

        with pytest.raises(ValueError, match="scores of criterion 'short' must have shape"):
            self.prune("short", weight, initial, 20)

    def test_arguments_are_checked(self, weight, initial):
        with pytest.raises(ValueError, match="initial must have shape"):
            self.prune("magnitude", weight, initial[:, 1:], 3)
        with pytest.raises(TypeError, match="mask must be bool"):
            self.prune("magnitude", weight, initial, 3, torch.ones(weight.shape))
        with pytest.raises(ValueError, match="k must be in"):
            self.prune("magnitude", weight, initial, ARENA.prunable + 1)
        weight[1, 2] = float("nan")
        with pytest.raises(ValueError, match="NaN"):
            self.prune("magnitude", weight, initial, 3)


def draw(arena, seed=0, tickets=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tickets, arena.prunable, generator=generator)


def everything(weight):
    return torch.ones(weight.shape, dtype=torch.bool)


class TestMatrixMasks:
    def test_two_of_four(self):
        scores = torch.tensor([[1.0, 4, 3, 2, 0, 0, 0, 0]])
        assert n_m_mask(scores, 2, 4).int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0]]

    @given(st.integers(1, 8), st.data())
    @settings(deadline=None, derandomize=True, max_examples=30)
    def test_n_of_m_keeps_the_largest_of_each_group(self, m, data):
        n = data.draw(st.integers(0, m))
        scores = torch.randn(3, 5, 4 * m, generator=torch.Generator().manual_seed(m))
        groups = n_m_mask(scores, n, m).unflatten(-1, (-1, m))
        assert (groups.sum(-1) == n).all()
        largest = scores.unflatten(-1, (-1, m)).sort(-1, descending=True).values
        if 0 < n < m:
            kept = scores.unflatten(-1, (-1, m)).masked_fill(~groups, float("inf")).amin(-1)
            assert torch.equal(kept, largest[..., n - 1])

    def test_fan_in(self):
        scores = torch.randn(2, 7, 9, generator=torch.Generator().manual_seed(0))
        mask = fan_in_mask(scores, 4)
        assert (mask.sum(-1) == 4).all()
        assert torch.equal(mask, scores >= scores.sort(-1).values[..., -4, None])
        assert not fan_in_mask(scores, 0).any()
        assert fan_in_mask(scores, 9).all()

    def test_blocks(self):
        scores = torch.ones(32, 48)
        scores[16:, 32:] = 3.0
        scores[:16, 16:32] = 2.0
        mask = block_mask(scores, 16, 2)
        assert torch.equal(mask, scores > 1)
        assert block_pattern(mask, 16).table[0, :2, 0].tolist() == [1, 1]
        # Ties keep the earlier block.
        assert torch.equal(block_mask(torch.ones(4, 4), 2, 1).nonzero().amax(0), torch.ones(2))

    @pytest.mark.parametrize(
        ("call", "match"),
        [
            (lambda: n_m_mask(torch.ones(2, 8), 5, 4), r"n must be in \[0, 4\], got 5"),
            (lambda: n_m_mask(torch.ones(2, 8), 0, 0), "m must be at least 1, got 0"),
            (lambda: n_m_mask(torch.ones(2, 6), 2, 4), "multiple of m=4 wide, got 6"),
            (lambda: n_m_mask(torch.full((2, 4), float("nan")), 2, 4), "must not be NaN"),
            (lambda: fan_in_mask(torch.ones(2, 6), 7), r"fan_in must be in \[0, 6\], got 7"),
            (lambda: fan_in_mask(torch.ones(6), 1), "at least 2 axes"),
            (lambda: block_mask(torch.ones(2, 6), 4, 1), "divide the scores' 2 x 6, got 4"),
            (lambda: block_mask(torch.ones(2, 6), 2, 4), r"kept must be in \[0, 3\], got 4"),
            (lambda: NOfM(5, 4), r"n must be in \[0, 4\], got 5"),
            (lambda: NOfM(0, 4), "n must be at least 1"),
            (lambda: Blocks(0), "size must be at least 1"),
        ],
    )
    def test_arguments_are_checked(self, call, match):
        with pytest.raises(ValueError, match=match):
            call()


class TestStructures:
    """What the structured criteria promise; what they share with the others is tested above."""

    @pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (4, 8), (1, 2), (4, 4)])
    def test_n_of_m_is_the_matrix_mask_of_every_layer(self, n, m, monkeypatch):
        monkeypatch.setattr("sparse_tickets.prune.CRITERIA", dict(CRITERIA))
        register_criterion("mine")(NOfM(n, m))
        weight = draw(EVEN)
        mask = prune_masks("mine", weight, weight, everything(weight), EVEN.prunable * n // m, EVEN)
        for begin, out, inp in EVEN.prunable_layers():
            layer = slice(begin, begin + out * inp)
            matrix = weight[:, layer].unflatten(1, (out, inp))
            assert torch.equal(mask[:, layer], n_m_mask(matrix.abs(), n, m).flatten(1))

    def test_one_of_four_within_two_of_four(self):
        weight = draw(EVEN)
        half = prune_masks("2:4", weight, weight, everything(weight), EVEN.prunable // 2, EVEN)
        quarter = prune_masks("1:4", weight * half, weight, half, EVEN.prunable // 4, EVEN)
        assert not (quarter & ~half).any()
        assert (quarter.unflatten(1, (-1, 4)).sum(2) == 1).all()

    def test_n_of_m_has_one_density_only(self):
        weight = draw(EVEN)
        with pytest.raises(ValueError, match=r"k must be 2048 for 2:4, which is 2/4 of 4096 weigh"):
            prune_masks("2:4", weight, weight, everything(weight), kept(EVEN.prunable, 1), EVEN)
        odd = Arena.build((4, 6, 2))
        weight = draw(odd)
        with pytest.raises(ValueError, match="multiples of 4 inputs for 1:4, got 6 in the one at"):
            prune_masks("1:4", weight, weight, everything(weight), 9, odd)
        policy = draw(POLICY)
        # A policy's inputs, units and outputs are multiples of four here.
        half = prune_masks("2:4", policy, policy, everything(policy), POLICY.prunable // 2, POLICY)
        assert (half.unflatten(1, (-1, 4)).sum(2) == 2).all()

    def test_n_of_m_needs_something_left_in_each_group(self):
        weight = draw(EVEN)
        mask = everything(weight)
        mask[1, 4:7] = False
        with pytest.raises(ValueError, match="mask must leave at least 2 of every 4 inputs"):
            prune_masks("2:4", weight, weight, mask, EVEN.prunable // 2, EVEN)

    @given(st.integers(0, POLICY.prunable), st.integers(0, 100))
    @settings(deadline=None, derandomize=True, max_examples=25)
    def test_fan_in_is_equal_within_one(self, k, seed):
        weight = draw(POLICY, seed, tickets=2)
        mask = prune_masks("fan-in", weight, weight, everything(weight), k, POLICY)
        assert mask.sum(1).tolist() == [k, k]
        counts, widths = [], []
        for begin, out, inp in LAYERS:
            counts.append(mask[:, begin : begin + out * inp].unflatten(1, (out, inp)).sum(2))
            widths.append(torch.full((out,), inp))
        count, width = torch.cat(counts, 1), torch.cat(widths)
        for row in count:
            # Whoever keeps fewer than the others is full.
            assert ((row >= row.max() - 1) | (row == width)).all()

    def test_fan_in_keeps_each_units_largest(self):
        weight = draw(EVEN)
        # 96 units, 8 inputs each.
        mask = prune_masks("fan-in", weight, weight, everything(weight), 768, EVEN)
        for begin, out, inp in EVEN.prunable_layers():
            layer = slice(begin, begin + out * inp)
            matrix = weight[:, layer].abs().unflatten(1, (out, inp))
            assert torch.equal(mask[:, layer], fan_in_mask(matrix, 8).flatten(1))

    @pytest.mark.parametrize("size", [16, 32])
    def test_whole_blocks_where_they_fit(self, size):
        weight = draw(EVEN)
        name, total = f"block-{size}", EVEN.prunable // size**2
        for count in (0, 1, total // 2, total):
            mask = prune_masks(name, weight, weight, everything(weight), count * size**2, EVEN)
            sums = []
            for begin, out, inp in EVEN.prunable_layers():
                layer = slice(begin, begin + out * inp)
                block_pattern(mask[:, layer].unflatten(1, (out, inp)), size)
                blocks = weight[0, layer].abs().view(out // size, size, inp // size, size)
                sums.append(blocks.sum((1, 3)).flatten())
            largest = torch.cat(sums).sort(descending=True).values[:count]
            torch.testing.assert_close((weight[0].abs() * mask[0]).sum(), largest.sum())

    def test_at_most_one_block_is_kept_in_part(self):
        """Over the levels of a policy, whose edge blocks are cut: 4 inputs and 2 actions."""
        weight = draw(POLICY)
        mask = everything(weight)
        for level in range(1, 12):
            k = kept(POLICY.prunable, level)
            smaller = prune_masks("block-16", weight * mask, weight, mask, k, POLICY)
            assert not (smaller & ~mask).any()
            assert smaller.sum(1).tolist() == [k] * 3
            mask = smaller
            for ticket in mask:
                mixed = 0
                for begin, out, inp in LAYERS:
                    matrix = ticket[begin : begin + out * inp].view(out, inp)
                    for row in range(0, out, 16):
                        for column in range(0, inp, 16):
                            block = matrix[row : row + 16, column : column + 16]
                            mixed += bool(block.any()) and not bool(block.all())
                assert mixed <= 1

    def test_a_trained_weight_of_zero_still_counts_as_kept(self):
        """Pruned weights are told by the mask: a unit's kept zeros come before them."""
        weight = torch.zeros(1, EVEN.prunable)
        mask = everything(weight)
        mask[:, ::2] = False
        for name in ("fan-in", "2:4", "block-32"):
            smaller = prune_masks(name, weight, weight, mask, EVEN.prunable // 2, EVEN)
            assert torch.equal(smaller, mask)

    @pytest.mark.parametrize("name", ["2:4", "fan-in", "block-16"])
    def test_nan_is_refused(self, name):
        weight = draw(EVEN)
        weight[1, 5] = float("nan")
        with pytest.raises(ValueError, match="NaN"):
            prune_masks(name, weight, weight, everything(weight), EVEN.prunable // 2, EVEN)

    @pytest.mark.parametrize("name", sorted(CRITERIA))
    def test_a_sweep_takes_it_by_name(self, name):
        assert Sweep(criterion=name).criterion == name

    def test_one_level_of_the_algorithm(self):
        """`next_population` prunes, rewinds and permutes under a structure as under any mask."""
        arena = Arena.build((4, 16, 4))
        key = torch.arange(2)
        dense = dense_population(arena, key, "lecun").parameters
        trained = Trained(dense.weight[:, : arena.prunable] * 2, dense.mask)
        for name, count in (("2:4", 64), ("fan-in", 77), ("block-16", 100)):
            population = next_population(
                arena,
                ["mask/weights", "mask/permuted"],
                trained,
                dense,
                key,
                kept=count,
                density=0.5,
                criterion=name,
            )
            assert population.parameters.mask.sum(1).tolist() == [count, count]


class TestRandomMasks:
    key = torch.arange(40, dtype=torch.int64) * 7919 - 3

    @pytest.mark.parametrize("k", [0, 1, 197, ARENA.prunable])
    def test_exact_count(self, k):
        assert random_mask(self.key, k, ARENA).sum(1).tolist() == [k] * 40

    def test_count_per_ticket_and_independence(self):
        k = torch.arange(40)
        together = random_mask(self.key, k, ARENA, step=3)
        assert together.sum(1).tolist() == k.tolist()
        alone = random_mask(self.key[17:18], 17, ARENA, step=3)
        assert torch.equal(alone[0], together[17])

    def test_keys_and_steps_differ(self):
        masks = random_mask(self.key, 50, ARENA)
        assert len({tuple(row) for row in masks.tolist()}) == 40
        assert not torch.equal(masks, random_mask(self.key, 50, ARENA, step=1))

    def test_uniform_over_all_positions(self):
        """4000 draws at density 1/4: each position's share has a standard error of 0.0068."""
        mask = random_mask(torch.arange(4000), ARENA.prunable // 4, ARENA)
        share = mask.double().mean(0)
        assert (share - 0.25).abs().max() < 5 * 0.0068

    def test_layer_counts(self):
        counts = [3, 0, 16]
        mask = random_layer_mask(self.key, counts, ARENA)
        assert layer_counts(mask, ARENA).tolist() == [counts] * 40
        per_ticket = torch.stack([torch.tensor(counts), torch.tensor([64, 128, 0])])
        mask = random_layer_mask(self.key[:2], per_ticket, ARENA)
        assert torch.equal(layer_counts(mask, ARENA), per_ticket)
        alone = random_layer_mask(self.key[1:2], per_ticket[1:], ARENA)
        assert torch.equal(alone[0], mask[1])

    def test_layers_are_drawn_apart(self):
        square = Arena.build((8, 8, 8))
        mask = random_layer_mask(self.key, [20, 20], square)
        following = random_layer_mask(self.key, [20, 20], square, step=1)
        assert not torch.equal(mask[:, :64], mask[:, 64:])
        assert not torch.equal(mask[:, 64:], following[:, :64])

    def test_arguments_are_checked(self):
        with pytest.raises(ValueError, match=r"k must be in \[0, 208\], got 209"):
            random_mask(self.key, 209, ARENA)
        with pytest.raises(ValueError, match="k must have shape"):
            random_mask(self.key, torch.ones(3, dtype=torch.int64), ARENA)
        with pytest.raises(ValueError, match="counts must have shape"):
            random_layer_mask(self.key, [1, 2], ARENA)
        with pytest.raises(ValueError, match=r"counts\[2\] must be in \[0, 16\], got 17"):
            random_layer_mask(self.key, [1, 2, 17], ARENA)


class TestErk:
    @given(
        st.lists(st.integers(1, 40), min_size=2, max_size=6),
        st.fractions(0, 1),
    )
    @settings(deadline=None, derandomize=True, max_examples=100)
    def test_counts_are_exact_and_fit(self, sizes, density):
        layers = Arena.build(tuple(sizes)).prunable_layers()
        total = sum(out * inp for _, out, inp in layers)
        k = int(total * density)
        counts = erk_counts(layers, k)
        assert sum(counts) == k
        assert all(0 <= c <= out * inp for c, (_, out, inp) in zip(counts, layers, strict=True))
        # Below full, counts are proportional to in + out, up to rounding.
        free = [
            Fraction(c, out + inp)
            for c, (_, out, inp) in zip(counts, layers, strict=True)
            if c < out * inp
        ]
        width = min(out + inp for _, out, inp in layers)
        assert not free or max(free) - min(free) <= Fraction(2, width)

    def test_a_policy(self):
        """4-64-64-2 at 10%: 448 weights in 68 + 128 + 66 shares; the head stays below full."""
        assert erk_counts(LAYERS, 448) == [116, 219, 113]

    def test_full_layers_pass_the_rest_on(self):
        """At half density the head (128) and the input layer (256) are full."""
        assert erk_counts(LAYERS, 2240) == [256, 1856, 128]

    def test_out_of_range(self):
        with pytest.raises(ValueError, match=r"k must be in \[0, 4480\], got 4481"):
            erk_counts(LAYERS, 4481)
