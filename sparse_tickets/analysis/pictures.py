"""Pictures of masks: what the input layer keeps, and one ticket layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from .style import DPI, GREY, INK, PALE, head, note, put_stamp, styled

__all__ = ["mask_figure", "ticket_figure"]

_KEPT = LinearSegmentedColormap.from_list("kept", ["#F7F7F5", "#8DBBDC", "#0072B2", "#00497A"])
_SIGNED = LinearSegmentedColormap.from_list("signed", ["#C04A00", "#F2C6A4", "#A9CFE8", "#00619A"])

Array = NDArray[np.float64]


@styled
def mask_figure(
    masks: Sequence[tuple[str, ArrayLike]],
    observation_names: Sequence[str] | None = None,
    stamp: str | None = None,
    *,
    title: str = "",
) -> Figure:
    """Input-layer masks: units by inputs as a picture, and what is kept of each input.

    Args:
        masks: ``(label, mask)`` per column of the figure. A mask is ``[out, in]``, boolean or the
            fraction of seeds that keep the weight, or ``[in]``, the fraction kept of each input,
            which has bars only.
        observation_names: Name of each input dimension; numbers if left out.
        stamp: A short warning printed on the figure, such as "toy budget".
        title: Whose masks they are: environment, condition, seeds.

    Raises:
        ValueError: There are no masks, they disagree about the inputs or the names do, or a value
            is outside [0, 1].
    """
    arrays = [(label, np.asarray(mask, dtype=np.float64)) for label, mask in masks]
    inputs = _check_masks(arrays)
    names = [str(i) for i in range(inputs)] if observation_names is None else observation_names
    if len(names) != inputs:
        raise ValueError(f"observation_names must name {inputs} inputs, got {list(names)}")
    pictures = any(mask.ndim == 2 for _, mask in arrays)
    longest = max(len(label) for label, _ in arrays)
    width = max(1.25, min(0.28 * inputs, 4.0), 0.065 * longest)  # inches
    fits = max(map(len, names)) * 0.06 < width / inputs
    figure = Figure(
        figsize=(1.1 + (width + 0.3) * len(arrays), 3.9 if pictures else 1.9),
        dpi=DPI,
        layout="constrained",
    )
    grid = figure.subplots(
        1 + pictures,
        len(arrays),
        sharex=True,
        sharey="row",
        squeeze=False,
        height_ratios=[3, 1.3] if pictures else [1],
    )
    image = None
    for column, (label, mask) in enumerate(arrays):
        bars = grid[-1, column]
        kept = mask.mean(axis=0) if mask.ndim == 2 else mask
        bars.bar(np.arange(inputs), kept, width=0.72, color="#0072B2")
        for position, value in enumerate(kept):
            if inputs <= 12:
                bars.annotate(
                    f"{value:.0%}",
                    (position, value),
                    (0, 1.5),
                    textcoords="offset points",
                    ha="center",
                    fontsize=5.5,
                    color=GREY,
                )
        bars.set_ylim(0, 1.12)
        bars.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
        bars.set_xticks(range(inputs), names, rotation=0 if fits else 90)
        bars.tick_params(axis="x", length=0)
        grid[0, column].set_title(label, loc="center")
        if mask.ndim == 2:
            picture = grid[0, column]
            image = picture.imshow(
                mask, cmap=_KEPT, vmin=0, vmax=1, aspect="auto", interpolation="nearest"
            )
            picture.tick_params(axis="x", length=0, labelbottom=False)
            picture.spines[:].set_visible(False)
            picture.set_xticks(np.arange(inputs + 1) - 0.5, minor=True)
            picture.grid(which="minor", axis="x", color="white", linewidth=1.5)
            picture.tick_params(which="minor", length=0)
        elif pictures:
            grid[0, column].spines[:].set_visible(False)
            note(grid[0, column], "per input only")
    grid[-1, 0].set_ylabel("kept weights")
    if image is not None:
        grid[0, 0].set_ylabel("unit")
        bar = figure.colorbar(
            image, ax=grid[0].tolist(), fraction=0.04, pad=0.02, ticks=[0, 0.5, 1]
        )
        bar.ax.set_yticklabels(["pruned", "half", "kept"])
        bar.outline.set_visible(False)
    head(figure, "Input layer", title, stamp)
    return figure


@styled
def ticket_figure(
    layers: Sequence[tuple[str, ArrayLike, ArrayLike]],
    stamp: str | None = None,
    *,
    title: str = "",
) -> Figure:
    """One ticket, layer by layer: its kept weights in place, and counts per row and column.

    Kept weights are blue where positive and orange where negative, on a scale of each layer's own;
    pruned ones are white. The margins count what is kept of each input and of each unit.

    Args:
        layers: ``(name, mask[out, in], weight[out, in])`` per layer, from input to output.
        stamp: A short warning printed on the figure, such as "toy budget".
        title: Whose ticket it is: environment, algorithm, condition, seed, level.

    Raises:
        ValueError: There are no layers, or a mask or weight is no matrix of its layer's shape.
    """
    checked = _check_layers(layers)
    largest = max(max(mask.shape) for _, mask, _ in checked)

    def side(size: int) -> float:
        # Gentler than proportional, so that two outputs are seen beside 256 units.
        return max(0.5, 2.6 * float(np.sqrt(size / largest)) ** 1.3)

    margin, gap, left, top, bottom = 0.34, 0.6, 0.4, 1.0, 0.5  # inches
    widths = [side(mask.shape[1]) for _, mask, _ in checked]
    heights = [side(mask.shape[0]) for _, mask, _ in checked]
    total_width = left + sum(widths) + len(checked) * (margin + gap) - 0.3
    total_height = top + margin + max(heights) + bottom
    figure = Figure(figsize=(total_width, total_height), dpi=DPI)

    def axes(x: float, y: float, width: float, height: float) -> Axes:
        return figure.add_axes(
            (
                x / total_width,
                1 - (y + height) / total_height,
                width / total_width,
                height / total_height,
            )
        )

    x = left
    for (name, mask, weight), width, height in zip(checked, widths, heights, strict=True):
        picture = axes(x, top + margin, width, height)
        limit = _draw_layer(picture, mask, weight)
        above = axes(x, top + 0.04, width, margin - 0.08)
        right = axes(x + width + 0.04, top + margin, margin - 0.08, height)
        columns, rows = mask.sum(axis=0), mask.sum(axis=1)
        above.bar(np.arange(mask.shape[1]), columns, width=0.9, color=GREY)
        right.barh(np.arange(mask.shape[0]), rows, height=0.9, color=GREY)
        above.set_xlim(picture.get_xlim())
        right.set_ylim(picture.get_ylim())
        for margins, count, value in ((above, columns, "y"), (right, rows, "x")):
            margins.set_axis_off()
            margins.set(**{f"{value}lim": (0, max(1, int(count.max(initial=0))))})
        kept, size = int(mask.sum()), mask.size
        share = f"{kept / size:.1%}" if size else "empty"
        for text, height_above, size_of_text, colour in (
            (name, 0.22, 8.5, INK),
            (f"{kept} of {size}, {share}", 0.06, 6.5, GREY),
        ):
            figure.text(
                x / total_width,
                1 - (top - height_above) / total_height,
                text,
                fontsize=size_of_text,
                color=colour,
            )
        picture.set_xlabel(f"{mask.shape[1]} inputs\ncolour ±{limit:.2g}", fontsize=6.5)
        picture.set_ylabel(f"{mask.shape[0]} units", fontsize=6.5)
        x += width + margin + gap
    kept = sum(int(mask.sum()) for _, mask, _ in checked)
    size = sum(mask.size for _, mask, _ in checked)
    figure.text(
        left / total_width,
        1 - 0.15 / total_height,
        f"{kept} of {size} weights kept" + (f", {kept / size:.1%}" if size else ""),
        va="top",
        fontsize=9,
        weight="bold",
    )
    figure.text(
        left / total_width, 1 - 0.34 / total_height, title, va="top", fontsize=7, color=GREY
    )
    put_stamp(figure, stamp)
    return figure


def _draw_layer(picture: Axes, mask: NDArray[np.bool_], weight: Array) -> float:
    """Kept weights in colour; returns the weight at which colours saturate."""
    kept = np.abs(weight[mask])
    limit = float(np.quantile(kept, 0.98)) if kept.size else 0.0
    if mask.size:
        picture.imshow(
            np.ma.array(weight, mask=~mask),
            cmap=_SIGNED,
            vmin=-max(limit, 1e-12),
            vmax=max(limit, 1e-12),
            aspect="auto",
            interpolation="nearest",
        )
    picture.set(xticks=[], yticks=[], facecolor="white")
    picture.spines[:].set_visible(True)
    picture.spines[:].set_color(PALE)
    return limit


def _check_masks(masks: list[tuple[str, Array]]) -> int:
    if not masks:
        raise ValueError("masks must hold at least one (label, mask), got none")
    for label, mask in masks:
        if mask.ndim not in (1, 2) or mask.size == 0:
            raise ValueError(f"mask {label!r} must be [in] or [out, in], got shape {mask.shape}")
        if not np.all((mask >= 0) & (mask <= 1)):
            raise ValueError(f"mask {label!r} must be in [0, 1]")
    inputs = {mask.shape[-1] for _, mask in masks}
    if len(inputs) > 1:
        raise ValueError(f"masks must have the same number of inputs, got {sorted(inputs)}")
    return inputs.pop()


def _check_layers(
    layers: Sequence[tuple[str, ArrayLike, ArrayLike]],
) -> list[tuple[str, NDArray[np.bool_], Array]]:
    if not layers:
        raise ValueError("layers must hold at least one (name, mask, weight), got none")
    checked = []
    for name, mask, weight in layers:
        mask, weight = np.asarray(mask, dtype=bool), np.asarray(weight, dtype=np.float64)
        if mask.ndim != 2 or mask.shape != weight.shape:
            raise ValueError(
                f"layer {name!r} must have mask and weight of one shape [out, in], "
                f"got {mask.shape} and {weight.shape}"
            )
        checked.append((name, mask, weight))
    return checked
