"""Figures, and tables of unusual frames."""

from __future__ import annotations

import itertools
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import polars as pl
import pytest
from frames import FOUR, sweep
from matplotlib.text import Text

from sparse_tickets.analysis import (
    CONDITIONS,
    compare,
    contributions,
    degradation,
    figures,
    markdown_table,
    summary,
    summary_table,
)

FRAME_FUNCTIONS = (
    summary,
    degradation,
    compare,
    contributions,
    summary_table,
    markdown_table,
    figures.return_figure,
    figures.contribution_figure,
)


@pytest.mark.parametrize("function", FRAME_FUNCTIONS)
def test_bad_frames_raise(function):
    frame = sweep()
    with pytest.raises(ValueError, match="at least one trained cell"):
        function(frame.clear())
    with pytest.raises(ValueError, match="must have the columns density, return_final, got"):
        function(frame.drop("density", "return_final"))
    with pytest.raises(ValueError, match="each cell once"):
        function(pl.concat([frame, frame]))
    with pytest.raises(ValueError, match="metric must be one of"):
        function(frame, metric="reward")


def nothing_finite(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(return_final=pl.lit(float("nan")))


UNUSUAL = {
    "one algorithm": sweep(algos=("bc",)),
    "level 0 only": sweep(conditions=()),
    "one seed": sweep(seeds=1),
    "two conditions": sweep(conditions=("mask/weights", "random/re-init")),
    "all conditions, both kinds": sweep(conditions=CONDITIONS, kinds=("own", "ticket"), levels=3),
    "nothing finite": nothing_finite(sweep()),
    "nothing finite at level 0": nothing_finite(sweep(conditions=())),
    "no dense level": sweep().filter(pl.col("level") > 0),
    "unfinished tracks": sweep().filter(pl.col("level") < 3 + pl.col("seed")),
    "no random return": sweep().with_columns(random_return=pl.lit(None, dtype=pl.Float64)),
}


@pytest.mark.parametrize("frame", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_unusual_frames_give_tables_and_figures(frame):
    for function in FRAME_FUNCTIONS:
        result = function(frame)
        if isinstance(result, figures.Figure):
            result.draw_without_rendering()
    figures.return_figure(frame, "toy budget", effective_density=True).draw_without_rendering()


class TestFigures:
    def test_return_figure_has_a_panel_per_algorithm_dense_at_the_left(self):
        figure = figures.return_figure(sweep())
        left, right = figure.axes
        assert left.get_xscale() == "log"
        assert left.get_xlim()[0] > 1 > left.get_xlim()[1]
        assert left.get_ylim() == right.get_ylim()
        figure.draw_without_rendering()
        for panel in (left, right):
            labels = {text.get_text(): text for text in panel.texts}
            assert set(FOUR) <= labels.keys()
            # Without the arrows, which an annotation counts in.
            boxes = [Text.get_window_extent(labels[name]) for name in FOUR]
            assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
            assert all(box.x0 > panel.bbox.x1 for box in boxes)

    def test_return_figure_has_a_row_for_each_kind_of_controls_and_metric(self):
        frame = sweep(kinds=("own", "ticket"))
        figure = figures.return_figure(frame, metric=("return_final", "return_initial"))
        labels = [panel.get_ylabel().split("\n") for panel in figure.axes[::2]]
        assert labels == [
            [name, f"({kind} controls)"]
            for kind in ("own", "ticket")
            for name in ("final return", "return before training")
        ]
        one = figures.return_figure(frame, controls="ticket")
        assert len(one.axes) == 2
        assert any("ticket controls" in text.get_text() for text in one.texts)

    @pytest.mark.parametrize("draw", [figures.return_figure, figures.contribution_figure])
    def test_says_what_it_is_told_of_the_task_or_its_name(self, draw):
        frame = sweep(levels=3)
        for title, said in (("Half of the steps", "Half of the steps"), (None, frame["env"][0])):
            assert draw(frame, title=title).texts[0].get_text() == said

    @pytest.mark.parametrize("draw", [figures.return_figure, figures.contribution_figure])
    def test_lines_differ_without_colour(self, draw):
        """In dashes and in markers, which are where the others' are not."""
        lines = [
            line for line in draw(sweep(levels=20)).axes[0].lines if line.get_marker() != "None"
        ]
        assert len(lines) in (3, 4)
        for style in (lambda line: line.get_marker(), lambda line: line._unscaled_dash_pattern):
            assert len({str(style(line)) for line in lines}) == len(lines)
        starts = [line.get_markevery()[0] for line in lines]
        assert len(set(starts)) == 3

    def test_a_condition_keeps_its_colour(self):
        def colours(frame):
            legend = figures.return_figure(frame, effective_density=True).axes[-1].get_legend()
            handles = legend.get_lines()
            return {handle.get_label(): handle.get_color() for handle in handles}

        few, many = colours(sweep(conditions=FOUR[1:3], levels=3)), colours(sweep(levels=3))
        assert few.items() <= many.items()
        assert len(set(figures.CONDITION_COLOURS.values())) == len(CONDITIONS)

    def test_stamp_is_written_on_every_figure(self):
        mask = np.ones((3, 2), bool)
        for figure in (
            figures.return_figure(sweep(levels=3), "toy budget"),
            figures.contribution_figure(sweep(levels=3), "toy budget"),
            figures.mask_figure([("a", mask)], stamp="toy budget"),
            figures.ticket_figure([("a", mask, mask)], stamp="toy budget"),
        ):
            assert "toy budget" in [text.get_text() for text in figure.texts]

    def test_several_environments_must_be_filtered_first(self):
        frame = pl.concat([sweep(), sweep(env="Acrobot-v1")])
        for function in (figures.return_figure, figures.contribution_figure):
            with pytest.raises(ValueError, match="one env, filter it first, got Acrobot-v1, Cart"):
                function(frame)
        assert summary(frame)["env"].n_unique() == 2

    def test_unknown_controls_raise(self):
        with pytest.raises(ValueError, match="controls must be one of own, got 'ticket'"):
            figures.return_figure(sweep(), controls="ticket")

    def test_mask_figure_takes_fractions_and_masks(self):
        mask = np.array([[True, False], [True, True], [True, False]])
        figure = figures.mask_figure(
            [("one seed", mask), ("seeds", mask / 2), ("inputs", [0.5, 0.0])], ["x", "angle"]
        )
        figure.draw_without_rendering()
        bars = [panel.patches for panel in figure.axes if panel.patches]
        np.testing.assert_allclose([bar.get_height() for bar in bars[0]], [1, 1 / 3])
        figure = figures.mask_figure([("inputs", [0.5, 0.0])], title="mask/weights, seed 3")
        assert "mask/weights, seed 3" in [text.get_text() for text in figure.texts]

    @pytest.mark.parametrize(
        ("masks", "names", "message"),
        [
            ([], None, "at least one"),
            ([("a", [1.0, 2.0])], None, r"'a' must be in \[0, 1\]"),
            ([("a", [1.0]), ("b", [1.0, 1.0])], None, r"same number of inputs, got \[1, 2\]"),
            ([("a", 1.0)], None, r"\[in\] or \[out, in\], got shape \(\)"),
            ([("a", [1.0])], ["x", "y"], "must name 1 inputs"),
        ],
    )
    def test_mask_figure_rejects(self, masks, names, message):
        with pytest.raises(ValueError, match=message):
            figures.mask_figure(masks, names)

    @pytest.mark.long
    @pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
    def test_ticket_figure_draws_any_density(self, density):
        rng = np.random.default_rng(0)
        shapes = {"input": (64, 4), "hidden": (64, 64), "output": (1, 64)}
        layers = [
            (name, rng.random(shape) < density, rng.normal(size=shape))
            for name, shape in shapes.items()
        ]
        figure = figures.ticket_figure(layers, title="mask/weights, seed 3")
        assert "mask/weights, seed 3" in [text.get_text() for text in figure.texts]
        figure.draw_without_rendering()
        kept = sum(int(mask.sum()) for _, mask, _ in layers)
        assert any(text.get_text().startswith(f"{kept} of 4416") for text in figure.texts)

    def test_ticket_figure_rejects(self):
        with pytest.raises(ValueError, match="at least one"):
            figures.ticket_figure([])
        with pytest.raises(ValueError, match=r"'a' must have .* got \(2, 2\) and \(3, 2\)"):
            figures.ticket_figure([("a", np.ones((2, 2)), np.ones((3, 2)))])

    def test_leaves_global_settings_alone(self):
        import matplotlib

        before = dict(matplotlib.rcParams)
        figures.return_figure(sweep(levels=3))
        assert dict(matplotlib.rcParams) == before

    def test_save_writes_both_formats_reproducibly(self, tmp_path):
        def written(name):
            return figures.save(figures.return_figure(sweep(levels=3)), tmp_path / "new" / name)

        png, svg = written("level.0.8.png")
        assert [path.name for path in (png, svg)] == ["level.0.8.png", "level.0.8.svg"]
        assert png.read_bytes().startswith(b"\x89PNG")
        assert ElementTree.parse(svg).getroot().tag.endswith("svg")
        again = written("again")
        assert again[1].read_bytes() == svg.read_bytes()
        assert sorted(path.name for path in png.parent.iterdir()) == sorted(
            path.name for path in (png, svg, *again)
        )

    def test_save_leaves_the_old_file_when_drawing_fails(self, tmp_path):
        old = tmp_path / "figure.png"
        old.write_bytes(b"old")
        with pytest.raises(ValueError, match=r"nonsense"):
            figures.save(figures.return_figure(sweep(levels=3), r"$\nonsense$"), old)
        assert old.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [old]


def test_importing_the_package_brings_no_plotting_or_data_frames():
    code = "import sys, sparse_tickets; print({'matplotlib', 'polars'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
