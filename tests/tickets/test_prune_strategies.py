"""Counts, criteria and random masks: exact, per ticket, and distributed as they say."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_tickets.kernels.arena import Arena
from sparse_tickets.prune import (
    CRITERIA,
    erk_counts,
    kept,
    prune_masks,
    random_layer_mask,
    random_mask,
    register_criterion,
)

ARENA = Arena.build((4, 16, 8, 2))
POLICY = Arena.build((4, 64, 64, 2), (4, 64, 64, 1))
LAYERS = POLICY.prunable_layers()


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

    @pytest.mark.parametrize("name", sorted(CRITERIA))
    def test_a_ticket_does_not_see_its_neighbours(self, name, weight, initial):
        k = torch.tensor([0, 10, 50, ARENA.prunable, 7])
        together = self.prune(name, weight, initial, k)
        assert together.sum(1).tolist() == k.tolist()
        for p in range(5):
            alone = self.prune(name, weight[p : p + 1], initial[p : p + 1], k[p : p + 1])
            assert torch.equal(alone[0], together[p])

    @pytest.mark.parametrize("name", sorted(CRITERIA))
    def test_ties_keep_the_count(self, name):
        ones = torch.ones(2, ARENA.prunable)
        assert self.prune(name, ones, ones, 33).sum(1).tolist() == [33, 33]

    def test_names(self, weight, initial):
        with pytest.raises(ValueError, match="criterion must be one of layerwise-magnitude, magni"):
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
