"""The analysis: statistics against closed forms, tables and figures on a synthetic sweep."""

from __future__ import annotations

import itertools

import numpy as np
import polars as pl
import pytest
from frames import FOUR, sweep
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from sparse_tickets.analysis import (
    bootstrap_interval,
    compare,
    contributions,
    degradation,
    degradation_level,
    holm,
    iqm,
    markdown_table,
    normalised_return,
    restricted_mean,
    summary,
    summary_table,
)
from sparse_tickets.analysis.frame import tracks
from sparse_tickets.analysis.statistics import binomial_tail, mean


class TestInterquartileMean:
    def test_equals_the_trimmed_mean_when_four_divides_the_count(self):
        x = np.random.default_rng(0).normal(size=(5, 16))
        expected = np.sort(x, axis=1)[:, 4:12].mean(axis=1)
        np.testing.assert_allclose(iqm(x, 1), expected, rtol=1e-14)

    def test_weighs_three_seeds_by_the_part_inside_the_quartiles(self):
        np.testing.assert_allclose(iqm([30.0, 0.0, 6.0]), 0 / 6 + 6 * 2 / 3 + 30 / 6)

    @pytest.mark.parametrize(("x", "expected"), [([7.0], 7.0), ([1.0, 3.0], 2.0)])
    def test_of_one_or_two_values_is_their_mean(self, x, expected):
        assert iqm(x) == pytest.approx(expected)

    def test_leaves_missing_values_out(self):
        assert iqm([np.nan, 30.0, 0.0, 6.0]) == iqm([30.0, 0.0, 6.0])
        assert np.isnan(iqm([np.nan, np.nan]))
        assert np.isnan(iqm(np.empty((0,))))

    @settings(deadline=None, max_examples=30, derandomize=True)
    @given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9), st.floats(-1e3, 1e3))
    def test_is_ordered_between_extremes_and_moves_with_the_data(self, x, shift):
        middle = float(iqm(x))
        assert min(x) - 1e-6 <= middle <= max(x) + 1e-6
        np.testing.assert_allclose(iqm(np.array(x) + shift), middle + shift, atol=1e-6)
        np.testing.assert_allclose(iqm(x[::-1]), middle, atol=1e-9)

    def test_reduces_any_axis(self):
        x = np.random.default_rng(1).normal(size=(3, 4, 5))
        np.testing.assert_array_equal(iqm(x, 0), iqm(np.moveaxis(x, 0, 2)))


class TestBootstrap:
    values = np.random.default_rng(2).normal(np.array([0.0, 5.0, 10.0]), size=(12, 3))

    def test_is_deterministic_and_brackets_the_statistic(self):
        low, high = bootstrap_interval(self.values)
        again = bootstrap_interval(self.values)
        np.testing.assert_array_equal((low, high), again)
        assert np.all(low < iqm(self.values, 0))
        assert np.all(iqm(self.values, 0) < high)

    def test_resamples_whole_tracks(self):
        """Columns that differ by a constant keep differing by it in every resample."""
        column = self.values[:, :1]
        low, high = bootstrap_interval(np.hstack([column, column + 3.0]), mean)
        np.testing.assert_allclose([low[1] - low[0], high[1] - high[0]], 3.0)

    def test_approaches_the_normal_interval_of_a_mean(self):
        x = np.random.default_rng(3).normal(size=(400, 1))
        low, high = bootstrap_interval(x, mean, resamples=4000)
        half = 1.96 * x.std() / 20
        np.testing.assert_allclose([low[0], high[0]], x.mean() + np.array([-half, half]), atol=0.01)

    def test_has_no_interval_below_two_tracks(self):
        assert np.isnan(bootstrap_interval(self.values[:1])).all()
        assert np.isnan(bootstrap_interval(np.empty((0, 3)))).all()
        holed = self.values.copy()
        holed[1:, 2] = np.nan
        low, _ = bootstrap_interval(holed)
        assert np.isfinite(low[:2]).all()
        assert np.isnan(low[2])

    def test_survives_resamples_without_any_value(self):
        sparse = np.full((6, 1), np.nan)
        sparse[:2] = [[1.0], [2.0]]
        low, high = bootstrap_interval(sparse)
        assert (low, high) == (1.0, 2.0)

    def test_rejects_bad_arguments(self):
        with pytest.raises(ValueError, match=r"\[tracks, levels\], got \(3,\)"):
            bootstrap_interval(np.zeros(3))
        with pytest.raises(ValueError, match="confidence must be in"):
            bootstrap_interval(self.values, confidence=95)
        with pytest.raises(ValueError, match="resamples must be at least 1, got 0"):
            bootstrap_interval(self.values, resamples=0)


class TestDegradation:
    @pytest.mark.parametrize(
        ("track", "expected"),
        [
            ([1.0, 0.9, 0.9, 1.0], (1, False)),
            ([1.0, 0.9, 1.0, 0.9, 0.8], (3, False)),
            ([1.0, 0.95, 0.95], (2, True)),
            ([1.0, 1.0, 0.2], (2, True)),
            ([0.1, 0.1], (0, False)),
            ([1.0], (0, True)),
            ([1.0, 0.9, np.nan, 0.9], (1, True)),
        ],
    )
    def test_is_the_first_of_two_successive_levels_below(self, track, expected):
        assert degradation_level(track) == expected

    def test_needs_a_dense_level(self):
        with pytest.raises(ValueError, match="level 0"):
            degradation_level([np.nan, 1.0])
        with pytest.raises(ValueError, match=r"\[levels\]"):
            degradation_level([[1.0]])

    def test_normalised_return_spans_random_to_dense(self):
        np.testing.assert_allclose(normalised_return([20, 260, 500], 20, 500), [0, 0.5, 1])
        with pytest.raises(ValueError, match=r"above random, got 20.0 and 20.0"):
            normalised_return(1.0, 20.0, 20.0)


def falls_at(level: int, levels: int = 10) -> np.ndarray:
    return np.where(np.arange(levels) < level, 1.0, 0.0)


class TestRestrictedMean:
    def test_pairs_seeds(self):
        """A constant difference within seeds is certain however much the seeds differ."""
        ppo = np.array([falls_at(level) for level in (1, 3, 5, 7, 2, 4)])
        bc = np.array([falls_at(level + 1) for level in (1, 3, 5, 7, 2, 4)])
        result = restricted_mean(bc, ppo)
        assert (result.difference, result.low, result.high) == (1.0, 1.0, 1.0)
        assert result.p_value == 2 / 2**6  # no less than six pairs allow
        assert (result.pairs, result.horizon, result.censored) == (6, 9, (0, 0))

    def test_restricts_both_groups_to_the_shortest_observation(self):
        bc = np.array([np.ones(10), np.ones(10)])
        ppo = np.array([falls_at(3), [*np.ones(6), *np.full(4, np.nan)]])
        result = restricted_mean(bc, ppo)
        assert (result.horizon, result.first, result.second) == (5, 5.0, 4.0)
        assert result.censored == (2, 1)

    def test_of_equal_groups_finds_nothing(self):
        same = np.array([falls_at(level) for level in (1, 3, 5)])
        result = restricted_mean(same, same)
        assert (result.difference, result.p_value) == (0.0, 1.0)

    def test_of_one_pair_has_no_interval(self):
        result = restricted_mean(falls_at(4)[None], falls_at(3)[None])
        assert result.difference == 1.0
        assert np.isnan([result.low, result.high, result.p_value]).all()

    def test_rejects_unpaired_groups(self):
        with pytest.raises(ValueError, match=r"same number of seeds, got \(2, 3\) and \(3, 3\)"):
            restricted_mean(np.ones((2, 3)), np.ones((3, 3)))
        with pytest.raises(ValueError, match="same number of seeds"):
            restricted_mean(np.ones((0, 3)), np.ones((0, 3)))


class TestHolm:
    def test_steps_down_and_never_decreases(self):
        np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])

    def test_handles_none_one_and_saturation(self):
        assert holm([]).shape == (0,)
        np.testing.assert_array_equal(holm([0.2]), [0.2])
        np.testing.assert_array_equal(holm([0.9, 0.8]), [1.0, 1.0])

    @pytest.mark.parametrize("bad", [[1.2], [-0.1], [float("nan")]])
    def test_rejects_what_is_no_probability(self, bad):
        with pytest.raises(ValueError, match=r"pvalues must be in \[0, 1\]"):
            holm(bad)


class TestBinomialTail:
    def test_is_the_sum_of_the_chances(self):
        assert binomial_tail(0, 5, 0.3) == pytest.approx(1.0)
        assert binomial_tail(5, 5, 0.3) == pytest.approx(0.3**5)
        assert binomial_tail(2, 3, 0.5) == pytest.approx(0.5)

    @pytest.mark.parametrize("arguments", [(4, 3, 0.5), (-1, 3, 0.5), (1, 3, 1.5)])
    def test_rejects_what_is_no_count_or_probability(self, arguments):
        with pytest.raises(ValueError, match="must be in"):
            binomial_tail(*arguments)


class TestTracks:
    def test_begin_with_the_shared_dense_level(self):
        frame = sweep(seeds=3)
        track = tracks(frame, "CartPole-v1", "ppo", "mask/weights")
        assert track.values.shape == (3, 8)
        dense = frame.filter((pl.col("level") == 0) & (pl.col("algo") == "ppo")).sort("seed")
        np.testing.assert_array_equal(track.values[:, 0], dense["return_final"])
        np.testing.assert_allclose(track.density, 0.8 ** np.arange(8))

    def test_do_not_depend_on_the_order_of_rows(self):
        frame = sweep()
        shuffled = frame.sample(fraction=1.0, shuffle=True, seed=1)
        assert summary(frame).equals(summary(shuffled))

    def test_mark_missing_and_infinite_cells(self):
        frame = sweep(seeds=2).with_columns(
            pl.when((pl.col("level") == 2) & (pl.col("seed") == 1))
            .then(float("inf"))
            .otherwise("return_final")
            .alias("return_final")
        )
        frame = frame.filter(~((pl.col("level") == 5) & (pl.col("seed") == 0)))
        values = tracks(frame, "CartPole-v1", "bc", "mask/permuted").values
        np.testing.assert_array_equal(np.argwhere(np.isnan(values)), [[0, 5], [1, 2]])

    def test_serve_both_kinds_of_controls_where_the_cells_are_the_same(self):
        own = sweep(conditions=("mask/weights", "random/re-init"))
        controls = sweep(conditions=("mask/permuted", "permuted/permuted"), kinds=("ticket",))
        frame = pl.concat([own, controls.filter(pl.col("level") > 0)])
        assert set(summary(frame)["controls"]) == {"shared", "ticket"}
        assert contributions(frame)["contribution"].n_unique() == 3
        assert compare(frame).height == 4


class TestSummary:
    def test_holds_every_level_of_every_condition(self):
        table = summary(sweep(kinds=("own", "ticket")))
        assert table.filter(pl.col("condition") != "dense").height == 2 * 2 * 4 * 8
        row = table.row(
            by_predicate=(pl.col("algo") == "bc")
            & (pl.col("controls") == "own")
            & (pl.col("condition") == "random/re-init")
            & (pl.col("level") == 7),
            named=True,
        )
        assert row["seeds"] == 4
        assert row["low"] <= row["iqm"] <= row["high"]
        assert 0 < row["normalised_iqm"] < 0.5
        assert row["retained"] == 0.0

    def test_the_ticket_degrades_last_and_bc_after_ppo(self):
        table = degradation(sweep(levels=20, seeds=5))
        for algo in ("ppo", "bc"):
            levels = table.filter(pl.col("algo") == algo)["level"].to_list()
            assert levels == sorted(levels, reverse=True)
        claims = compare(sweep(levels=20, seeds=5))
        assert claims["condition"].to_list() == list(FOUR)
        assert (claims["difference"] >= 0).all()
        assert claims["difference"][0] > 0
        assert (claims["p_holm"] >= claims["p_value"]).all()

    def test_counts_tracks_that_never_degrade(self):
        table = degradation(sweep(levels=3, conditions=("mask/weights",), algos=("ppo",)))
        assert table.select("level", "horizon", "censored").row(0) == (2.0, 2, 4)
        assert "≥ 2.0" in markdown_table(sweep(levels=3, conditions=("mask/weights",)))

    def test_what_diverged_counts_as_degraded_and_is_no_return(self):
        frame = sweep(levels=6, conditions=("mask/weights",), algos=("ppo", "bc"))
        lost = (pl.col("seed") == 1) & (pl.col("level") >= 2) & (pl.col("algo") == "ppo")
        frame = frame.with_columns(
            pl.when(lost).then(float("nan")).otherwise("return_final").alias("return_final"),
            diverged=lost,
        )
        row = summary(frame).row(
            by_predicate=(pl.col("algo") == "ppo") & (pl.col("level") == 3), named=True
        )
        assert (row["seeds"], row["diverged"]) == (3, 1)
        assert row["retained"] == 0.75
        assert row["iqm"] > 400
        ppo, bc = (
            degradation(frame).row(by_predicate=pl.col("algo") == algo, named=True)
            for algo in ("ppo", "bc")
        )
        # Three tracks are undegraded at the horizon of 5, the fourth degrades at 2.
        assert (ppo["level"], ppo["censored"], ppo["seeds"]) == ((3 * 5 + 2) / 4, 3, 4)
        assert (bc["level"], bc["censored"]) == (5, 4)
        assert compare(frame)["difference"][0] == 0.75
        assert "4 cells diverged" in markdown_table(frame)
        dense = frame.with_columns(
            diverged=(pl.col("seed") == 1) & (pl.col("algo") == "ppo"),
        )
        assert degradation(dense)["seeds"].to_list() == [4, 4]
        # Results of before divergence was recorded.
        assert degradation(frame.drop("diverged"))["censored"].to_list() == [4, 4]

    def test_the_density_is_that_of_the_runs_own_rate(self):
        frame = sweep(levels=20, algos=("ppo",), conditions=("mask/permuted",))
        halved = frame.with_columns(density=0.5 ** pl.col("level"))
        (level,), (density,) = degradation(halved)["level"], degradation(halved)["density"]
        assert density == pytest.approx(0.5**level)

    def test_untrained_returns_have_no_degradation_level(self):
        assert degradation(sweep(), "return_initial").is_empty()
        assert "degrades" not in markdown_table(sweep(), "return_initial")
        assert contributions(sweep(), "return_initial").height == contributions(sweep()).height

    def test_names_in_brackets_are_no_markup(self):
        frame = sweep(levels=3).with_columns(
            env=pl.lit("[bold]Env"), condition=pl.col("condition").str.replace("mask/w", "[red]w")
        )
        console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(summary_table(frame))
        console.file.close()
        text = console.export_text()
        assert "[bold]Env" in text
        assert "[red]weights" in text

    def test_says_nothing_of_degradation_without_a_scale(self):
        frame = sweep().with_columns(random_return=pl.lit(500.0))
        assert degradation(frame).is_empty()
        assert compare(frame).is_empty()
        assert summary(frame)["normalised_iqm"].is_null().all()

    def test_tables_agree_and_fit_a_terminal(self):
        frame = sweep(levels=20)
        console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(summary_table(frame))
        console.file.close()
        text, markdown = console.export_text(), markdown_table(frame)
        assert "…" not in text
        for word in (*FOUR, "ppo", "bc", "degrades at", "51%", "1.4%"):
            assert word in text
            assert word in markdown
        assert markdown.endswith("|\n")
        assert len({line.count("|") for line in markdown.splitlines()[2:]}) == 1


class TestContributions:
    def test_are_differences_within_seeds(self):
        frame = sweep()
        table = contributions(frame)
        at = (pl.col("algo") == "ppo") & (pl.col("level") == 5)
        values = {
            name: frame.filter(at & (pl.col("condition") == name)).sort("seed")["return_final"]
            for name in FOUR
        }
        expected = [(values[a] - values[b]).mean() for a, b in itertools.pairwise(FOUR)]
        np.testing.assert_allclose(table.filter(at)["mean"], expected)

    def test_vanish_at_level_0(self):
        zero = contributions(sweep()).filter(pl.col("level") == 0)
        assert (zero["mean"] == 0).all()
        assert zero.height == 6

    def test_pair_only_the_seeds_of_both(self):
        frame = sweep().filter(~((pl.col("condition") == "mask/permuted") & (pl.col("seed") > 0)))
        table = contributions(frame)
        assert set(table.filter(pl.col("contribution") == "mask")["seeds"]) == {1}
        assert table.filter(pl.col("contribution") == "mask")["low"].is_null().all()
        assert set(table.filter(pl.col("contribution") == "layerwise ratio")["seeds"]) == {4}

    def test_leave_out_what_was_not_run(self):
        table = contributions(sweep(conditions=FOUR[:2]))
        assert table["contribution"].unique().to_list() == ["initialisation"]
        assert contributions(sweep(conditions=())).is_empty()
