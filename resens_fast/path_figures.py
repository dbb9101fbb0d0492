"""Figures of the unraveled view: how long paths are, which survive, and where along them the gradient is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from . import paths
from .figure_parts import (
    BLUE,
    GREEN,
    GREY,
    INK,
    MANY,
    ORANGE,
    SKY,
    VERMILION,
    block_axis,
    integer_axis,
    new_figure,
    put_legend,
    put_title,
    styled,
)
from .figures import describe

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .gradient_study import GradientStudy


def path_lengths(n: int, title: str = "", note: str = "") -> Figure:
    """The share of all 2^n paths that enter each number of blocks, with the middle 95 % of them shaded."""
    share = paths.distribution(n)
    low, high = _middle(share)
    many = n > 200  # bars a pixel wide, which take a second for every thousand
    with styled():
        figure = new_figure(7.2, 3.3)
        axes = figure.subplots()
        x = np.arange(n + 1)
        inside = (x >= low) & (x <= high)
        told = f"{100 * share[inside].sum():.1f} % of the paths: {low} to {high} blocks"
        if many:
            axes.fill_between(x, 100 * share, step="mid", color=SKY, lw=0, label="the others")
            axes.fill_between(x, 100 * share, where=inside, step="mid", color=BLUE, lw=0, label=told)
            axes.set_ylim(bottom=0)
        else:
            axes.bar(x[inside], 100 * share[inside], width=0.8, color=BLUE, label=told)
            axes.bar(x[~inside], 100 * share[~inside], width=0.8, color=SKY, label="the others")
        axes.set_ylabel("Paths (%)")
        _length_axis(axes, x)
        put_legend(axes)
        put_title(figure, title or f"Lengths of the paths through {n} blocks", note)
    return figure


def surviving_paths(n: int, deleted: Sequence[int], title: str = "", note: str = "") -> Figure:
    """The share of the paths of each length that is left after so many blocks are deleted, one line for each."""
    with styled():
        figure = new_figure(7.2, 3.3)
        axes = figure.subplots()
        for count, colour in zip(deleted, (BLUE, GREEN, ORANGE, VERMILION, GREY), strict=False):
            axes.plot(100 * paths.surviving(n, count), color=colour, label=f"{count} deleted")
        axes.set_ylim(-2, 102)
        axes.set_ylabel("Paths left (%)")
        _length_axis(axes, np.arange(n + 1))
        put_legend(axes)
        put_title(figure, title or f"Paths through {n} blocks that survive deletions", note)
    return figure


def norms(study: GradientStudy, title: str = "", note: str = "") -> Figure:
    """Gradient norm against path length on a log axis: every path a dot, their mean, 10th to 90th percentile, slope."""
    table = study.by_length
    each = paths.by_path(study)["norm"]
    value, length = each.to_numpy(float), each.index.get_level_values("length").to_numpy(int)
    jitter = np.random.RandomState(0).uniform(-0.26, 0.26, len(each))
    shown = value > 0
    with styled():
        figure = new_figure(7.2, 4.0)
        axes = figure.subplots()
        axes.scatter(
            (length + jitter)[shown],
            value[shown],
            s=6,
            color=SKY,
            alpha=0.5,
            lw=0,
            label="path",
            rasterized=len(each) > MANY,
        )
        table = table[table["mean"] > 0]
        x = table["length"].to_numpy(int)
        low = np.maximum(table["low"].to_numpy(float), value[shown].min() if shown.any() else 1e-300)
        axes.fill_between(x, low, table["high"], color=BLUE, alpha=0.2, lw=0, label="10th to 90th percentile")
        axes.plot(x, table["mean"], "-o", ms=3, color=BLUE, label="mean")
        if len(x) > 2:
            line = paths.slope(x, table["mean"])
            told = f"exp({line.slope:.3f} × length), r² {line.r2:.3f}"
            axes.plot(x, np.exp(line.intercept + line.slope * x), "--", color=INK, lw=1.1, label=told)
        axes.set_yscale("log")
        axes.set_ylabel(f"Gradient norm {_AT[study.at]}")
        _length_axis(axes, x)
        put_legend(axes)
        put_title(figure, title or "Gradient against path length", note)
    return figure


def influence(study: GradientStudy, title: str = "", note: str = "", share: float = 0.95) -> Figure:
    """The share of each length in the whole gradient (mean norm × number of paths), with the range that carries
    `share` of it shaded; the share of the paths themselves beside it.
    """
    table = study.by_length
    n = paths.choosable(study)
    found = paths.effective_range(table["length"], table["mean"], n, share)
    with styled():
        figure = new_figure(7.2, 3.6)
        axes = figure.subplots()
        reach = f"{found.low} to {found.high} blocks: {100 * found.carried:.1f} % of the gradient"
        axes.axvspan(found.low - 0.5, found.high + 0.5, color=ORANGE, alpha=0.18, lw=0, label=reach)
        every, value = paths.every_length(table["length"], table["mean"], n)
        measured = (every[:, None] == table["length"].to_numpy(int)).any(axis=1)
        axes.plot(
            every, 100 * paths.influence(every, value, n), "-o", ms=3, color=BLUE, markevery=measured,
            label="gradient" + ("" if measured.all() else " (dots: measured)"),
        )  # fmt: skip
        reach = f"paths ({100 * found.paths:.2g} % of them in that range)"
        axes.plot(100 * paths.distribution(n), "--", color=GREY, label=reach)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("Share of each length (%)")
        _length_axis(axes, np.arange(n + 1))
        put_legend(axes)
        put_title(figure, title or "Where the gradient is", note)
    return figure


def by_block(study: GradientStudy, title: str = "", note: str = "") -> Figure:
    """Mean gradient norm over each block's own parameters, for every path length, on a logarithmic scale of colours."""
    import matplotlib
    from matplotlib.colors import LogNorm

    rows = study.by_block
    grid = rows.pivot(index="length", columns="block", values="norm")
    values = grid.to_numpy(float)
    positive = values[values > 0]
    with styled():
        figure = new_figure(7.2, 4.4)
        axes = figure.subplots()
        scale = LogNorm(positive.min(), positive.max()) if len(positive) and positive.min() < positive.max() else None
        colours = matplotlib.colormaps["viridis"].with_extremes(bad="white")
        shown = np.where(values > 0, values, np.nan)
        # A row for each length that was measured: a length between two of them must not look as if it had been.
        edges = [np.arange(size + 1) - 0.5 for size in (grid.shape[1], grid.shape[0])]
        mesh = axes.pcolormesh(edges[0], edges[1], shown, norm=scale, cmap=colours, rasterized=True)
        ticks = np.arange(0, len(grid), -(-len(grid) // 12))
        axes.set_yticks(ticks, [str(grid.index[tick]) for tick in ticks])
        bar = figure.colorbar(mesh, ax=axes, pad=0.02)
        bar.set_label("Gradient norm over the block's parameters" + (" (white: none)" if (values == 0).any() else ""))
        bar.outline.set_visible(False)  # type: ignore[operator]
        block_axis(axes, study.structure)
        axes.set_ylabel("Path length (blocks)")
        put_title(figure, title or "Blocks that receive the gradient", note)
    return figure


_AT = {
    "first_block": "at the first block's input",
    "image": "at the image",
    "parameters": "over the blocks' parameters",
}


def draw_gradients(study: GradientStudy, title: str = "", note: str = "") -> dict[str, Figure]:
    """Every figure of a study of gradients: file stem -> figure. `title` names the network, `note` what was run."""
    head = f"{title}: " if title else ""
    n = paths.choosable(study)
    made = {"path-lengths": path_lengths(n, f"{head}lengths of the paths through {n} blocks")}
    made["gradient-norms"] = norms(study, f"{head}gradient against path length", note)
    if len(study.by_length) > 1 and (study.by_length["mean"] > 0).any():
        made["gradient-influence"] = influence(study, f"{head}where the gradient is", note)
    if study.at == "parameters":
        made["gradient-by-block"] = by_block(study, f"{head}blocks that receive the gradient", note)
    return made


def plot_gradients(study: GradientStudy) -> Figure:
    """Gradient norm against path length."""
    return norms(study, note=describe(study))


def _middle(share: np.ndarray) -> tuple[int, int]:
    """The lengths between which the middle 95 % of the paths lie."""
    sums = np.cumsum(share)
    return int(np.searchsorted(sums, 0.025)), int(np.searchsorted(sums, 0.975))


def _length_axis(axes: Axes, lengths: np.ndarray | pd.Series) -> None:
    integer_axis(axes, np.asarray(lengths))
    axes.set_xlabel("Path length (blocks entered)")
