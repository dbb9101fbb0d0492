"""Figures of a study: error per deleted block, against k, against Kendall's tau, per pair, and networks side by side.

Every figure needs only a study's frame and structure, so that `resens show` can redraw it without the network.
Figures are plain `matplotlib.figure.Figure` objects: no pyplot, no global state, no display needed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import StudyError
from .figure_parts import (
    BLUE,
    INK,
    MANY,
    ORANGE,
    SKY,
    VERMILION,
    block_axis,
    block_dots,
    chance_error,
    full_scale,
    integer_axis,
    levels,
    near_range,
    new_figure,
    off_scale,
    put_legend,
    put_title,
    stages,
    styled,
    undeletable,
)
from .summary import by_k, by_tau, deletions, intact_error, reorderings, single_deletions

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from .structure import Structure
    from .study import Study


def single(frame: pd.DataFrame, structure: Structure, title: str = "", note: str = "") -> Figure:
    """Error after deleting each block alone, with 95 % intervals, stages shaded and transitions marked.

    Where most blocks lie close to the intact network and a few do not, a second panel shows the first group enlarged.
    """
    rows, intact, chance = single_deletions(frame), intact_error(frame), chance_error(structure)
    inner = rows[[not structure.transitions[b] for b in rows["block"]]]
    low, high = near_range(inner, intact)
    enlarge = len(inner) > 3 and high - low < 0.25 * max(chance, float(rows["error"].max()))
    with styled():
        figure = new_figure(7.2, 4.6 if enlarge else 3.3)
        panels = (
            figure.subplots(2, 1, sharex=True, height_ratios=(1.15, 1)) if enlarge else np.asarray([figure.subplots()])
        )
        top = panels[0]
        for axes in panels:
            stages(axes, structure, label=axes is top)
            block_dots(axes, rows, structure)
        undeletable(top, structure)
        levels(top, intact, chance)
        full_scale(top, chance, float(rows["error_high"].max()) if len(rows) else 0.0)
        if enlarge:
            levels(panels[1], intact, None)
            margin = 0.08 * (high - low)
            panels[1].set_ylim(100 * max(0.0, low - margin), 100 * (high + margin))
            panels[1].set_ylabel("Error (%), enlarged")
            off_scale(panels[1], rows, structure, high)
        block_axis(panels[-1], structure)
        put_legend(top)
        put_title(figure, title or "One block deleted", note)
    return figure


def against_k(frame: pd.DataFrame, structure: Structure, title: str = "", note: str = "") -> Figure:
    """Error against the number of deleted blocks: every draw a dot, means as lines, 10th to 90th percentile as a band.

    Draws that delete a transition have their own colour: one transition can cost more than all other blocks together.
    """
    rows, table = deletions(frame), by_k(frame)
    intact, chance = intact_error(frame), chance_error(structure)
    hit = rows["transition"].to_numpy(bool)
    k = rows["k"].to_numpy(int)
    error = 100 * rows["error"].to_numpy(float)
    # The same jitter each time: redrawing a study gives the same picture.
    jitter = np.random.RandomState(0).uniform(-0.26, 0.26, len(rows))
    with styled():
        figure = new_figure(7.2, 4.0)
        axes = figure.subplots()
        solid, both = (~hit).any(), hit.any() and (~hit).any()
        for chosen, colour, text in ((~hit, SKY, "draw"), (hit, ORANGE, "draw that deletes a transition")):
            if chosen.any():
                axes.scatter(
                    k[chosen] + jitter[chosen],
                    error[chosen],
                    s=8,
                    color=colour,
                    alpha=0.55,
                    lw=0,
                    zorder=2,
                    label=text,
                    rasterized=len(rows) > MANY,
                )
        if solid:
            kept = table[table["mean_kept"].notna()]
            x = kept["k"].to_numpy(float)
            axes.fill_between(
                x,
                100 * kept["low_kept"].to_numpy(float),
                100 * kept["high_kept"].to_numpy(float),
                color=BLUE,
                alpha=0.2,
                lw=0,
                zorder=1,
                label="10th to 90th percentile" + (", transitions kept" if both else ""),
            )
            axes.plot(
                x,
                100 * kept["mean_kept"].to_numpy(float),
                "-o",
                ms=3.5,
                color=BLUE,
                zorder=4,
                label="mean" + (", transitions kept" if both else ""),
            )
        if hit.any():
            axes.plot(
                table["k"].to_numpy(float),
                100 * table["mean"].to_numpy(float),
                "--s",
                ms=3.2,
                color=VERMILION,
                zorder=4,
                label="mean, all draws",
            )
        levels(axes, intact, chance)
        full_scale(axes, chance, float(error.max()) / 100 if len(error) else 0.0)
        integer_axis(axes, table["k"].to_numpy(int))
        axes.set_xlabel("Blocks deleted at random, k (dots are spread sideways)")
        put_legend(axes, 3)
        put_title(figure, title or "Blocks deleted at random", note)
    return figure


def against_tau(frame: pd.DataFrame, structure: Structure, title: str = "", note: str = "") -> Figure:
    """Error against Kendall's tau between the reordered and the original order; tau falls from 1 to the right."""
    rows, table = reorderings(frame), by_tau(frame)
    tau, error = rows["tau"].to_numpy(float), 100 * rows["error"].to_numpy(float)
    intact, chance = intact_error(frame), chance_error(structure)
    with styled():
        figure = new_figure(7.2, 4.0)
        axes = figure.subplots()
        axes.scatter(tau, error, s=9, color=SKY, alpha=0.6, lw=0, zorder=2, label="draw", rasterized=len(rows) > MANY)
        x, mean = table["at"].to_numpy(float), 100 * table["mean"].to_numpy(float)
        spread = 100 * table["sd"].fillna(0.0).to_numpy(float)
        axes.errorbar(
            x,
            mean,
            yerr=[np.minimum(spread, mean), np.minimum(spread, 100 - mean)],  # errors stay within 0 and 100 %
            fmt="-o",
            ms=4,
            color=BLUE,
            elinewidth=1.0,
            capsize=2,
            zorder=4,
            label="mean in a bin of tau, ± sd",
        )
        levels(axes, intact, chance)
        full_scale(axes, chance, float(error.max()) / 100 if len(error) else 0.0)
        lowest = min(float(tau.min()), float(x.min())) if len(tau) else 0.0
        edge = 0.03 * (1.0 - lowest) or 0.01
        axes.set_xlim(1.0 + edge, lowest - edge)
        axes.set_xlabel("Kendall's tau with the original order")
        put_legend(axes, 4)
        put_title(figure, title or "Blocks reordered", note)
    return figure


def pairs(frame: pd.DataFrame, structure: Structure, title: str = "", note: str = "") -> Figure:
    """Error after deleting each pair of blocks as a heat map; single deletions on the diagonal where there are any."""
    rows, intact = deletions(frame), intact_error(frame)
    n = len(structure.names)
    grid = np.full((n, n), np.nan)
    for deleted, error in zip(rows["deleted"], 100 * rows["error"].to_numpy(float), strict=True):
        if len(deleted) in (1, 2):
            i, j = int(min(deleted)), int(max(deleted))
            grid[j, i] = error
    free = np.asarray([not t for t in structure.transitions])
    inner, everything = grid[np.ix_(free, free)], grid[np.isfinite(grid)]
    top = float(everything.max()) if len(everything) else 100.0
    if np.isfinite(inner).any() and top > 2 * np.nanmax(inner):
        top = float(
            np.nanmax(inner)
        )  # transitions would leave no colours for the rest: they go over the top of the scale
    bottom = min([*everything.tolist(), *([] if intact is None else [100 * intact]), top])
    top = max(top, bottom + 1.0)  # where all errors are one
    with styled():
        import matplotlib

        figure = new_figure(6.0, 5.2)
        axes = figure.subplots()
        over = len(everything) and everything.max() > top
        colours = matplotlib.colormaps["viridis"].with_extremes(over="#D9B7C9" if over else None, bad="white")
        image = axes.imshow(grid, cmap=colours, vmin=bottom, vmax=top, origin="lower", interpolation="nearest")
        stages = np.asarray(structure.stages)
        for edge in np.flatnonzero(np.diff(stages)) + 0.5:
            axes.plot([edge, edge], [edge, n - 0.5], color="white", lw=1.0)
            axes.plot([-0.5, edge], [edge, edge], color="white", lw=1.0)
        marks = [i for i in range(n) if structure.transitions[i]]
        axes.plot(marks, marks, "D", ms=4, color=VERMILION, mec="white", mew=0.5, ls="", label="transition")
        bar = figure.colorbar(image, ax=axes, extend="max" if over else "neither", shrink=0.85, pad=0.02)
        bar.set_label("Error (%)" if intact is None else f"Error (%), line: intact ({100 * intact:.2f})")
        if intact is not None:
            bar.ax.axhline(100 * intact, color=VERMILION, lw=1.6)
        bar.outline.set_visible(False)  # type: ignore[operator]
        block_axis(axes, structure)
        axes.set_xlabel("First deleted block (index)")
        axes.set_ylabel("Second deleted block (index)")
        if marks:
            axes.legend(loc="lower right")
        if over:
            axes.text(
                0.98,
                0.10,
                f"pale: above {top:.0f} %",
                transform=axes.transAxes,
                ha="right",
                fontsize=8,
                color="#555555",
            )
        put_title(figure, title or "Two blocks deleted", note)
    return figure


def compare(studies: Sequence[tuple[str, pd.DataFrame, Structure]], title: str = "", note: str = "") -> Figure:
    """Single deletions of several networks side by side on one scale: [(name, frame, structure), ...], at most four."""
    if not 1 <= len(studies) <= 4:
        raise ValueError(f"compare draws one to four networks, not {len(studies)}: leave some out")
    with styled():
        figure = new_figure(7.6, 3.5)
        widths = [max(0.55, math.sqrt(len(s.names))) for _, _, s in studies]
        panels = figure.subplots(1, len(studies), sharey=True, width_ratios=widths, squeeze=False)[0]
        highest = 0.0
        for axes, (name, frame, structure) in zip(panels, studies, strict=True):
            rows, intact = single_deletions(frame), intact_error(frame)
            highest = max(highest, chance_error(structure), float(rows["error_high"].max()) if len(rows) else 0.0)
            stages(axes, structure, label=False)
            block_dots(axes, rows, structure)
            undeletable(axes, structure)
            levels(axes, None, chance_error(structure))
            if intact is not None:
                axes.axhline(100 * intact, color=INK, lw=1.1, zorder=2, label="intact")
            told = name if intact is None else f"{name}\nintact {100 * intact:.2f} %"
            axes.set_title(told, fontsize=8.5, fontweight="normal")
            block_axis(axes, structure)
        full_scale(panels[0], highest, highest)
        found: dict[str, Any] = {}
        for axes in panels:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                found.setdefault(label, handle)
        figure.legend(
            list(found.values()),
            list(found),
            loc="outside lower center",
            ncols=min(5, len(found)),
            handlelength=1.6,
            columnspacing=1.4,
            markerscale=1.3,
        )
        put_title(figure, title or "One block deleted", note)
    return figure


# ---- from a study to files ------------------------------------------------------------------------------------------


_BEST = ("error-against-tau", "deletions-against-k", "pair-deletions", "single-deletions")


def applicable(frame: pd.DataFrame, structure: Structure) -> dict[str, Callable[..., Figure]]:
    """The figures that a frame has rows for: file stem -> function of (frame, structure, title, note)."""
    rows = deletions(frame)
    possible = sum(map(bool, structure.deletable))
    ks = sorted({int(k) for k in rows["k"]})
    distinct = {k: len({tuple(sorted(map(int, d))) for d in rows.loc[rows["k"] == k, "deleted"]}) for k in ks}
    complete = {k for k in ks if k <= 2 and distinct[k] == math.comb(possible, k)}
    found: dict[str, Callable[..., Figure]] = {}
    if 1 in complete or ks == [1]:
        found["single-deletions"] = single
    if [k for k in ks if k not in complete] and ks != [1]:
        found["deletions-against-k"] = against_k
    if 2 in complete:
        found["pair-deletions"] = pairs
    if len(reorderings(frame)):
        found["error-against-tau"] = against_tau
    return found


def draw(frame: pd.DataFrame, structure: Structure, title: str = "", note: str = "") -> dict[str, Figure]:
    """Every figure the frame has rows for: file stem -> figure. `title` names the network, `note` what was run."""
    heads = {
        "single-deletions": "one block deleted",
        "deletions-against-k": "blocks deleted at random",
        "pair-deletions": "two blocks deleted",
        "error-against-tau": "blocks reordered",
    }
    made = {}
    for stem, function in applicable(frame, structure).items():
        head = heads[stem]
        made[stem] = function(frame, structure, f"{title}: {head}" if title else head.capitalize(), note)
    return made


def plot_study(study: Study, title: str = "") -> Figure:
    """The figure that suits a study best: reorderings, else the curve against k, else pairs, else single deletions.

    Raises StudyError when the sweep has no deletions and no reorderings (gates, or the intact network alone).
    """
    frame = study.frame
    found = applicable(frame, study.structure)
    if not found:
        kinds = ", ".join(sorted(set(frame["kind"])))
        raise StudyError(f"there is no figure for a sweep of {kinds} alone; plot the columns of study.frame instead")
    best = next(stem for stem in _BEST if stem in found)
    return draw(frame, study.structure, title, describe(study))[best]


def describe(study: Study) -> str:
    """What was run, for the corner of a figure: images, engine, dtype."""
    engine = study.manifest["engine"]
    return f"{study.images:,} images, {engine['name']} {engine['dtype']}"


def save(figure: Figure, folder: str | os.PathLike[str], stem: str) -> list[Path]:
    """Write `stem`.png and `stem`.svg into a folder, each whole or not at all; returns their paths."""
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    written = []
    with styled():
        for kind in ("png", "svg"):
            target, part = where / f"{stem}.{kind}", where / f".{stem}.{os.getpid()}.{kind}"
            try:
                figure.savefig(part, format=kind, metadata={"Date": None} if kind == "svg" else None)
                os.replace(part, target)
            finally:
                part.unlink(missing_ok=True)
            written.append(target)
    return written


def write(
    frame: pd.DataFrame, structure: Structure, folder: str | os.PathLike[str], title: str = "", note: str = ""
) -> list[Path]:
    """Draw every figure the frame has rows for and write each as PNG and SVG into `folder`; returns the paths."""
    return [path for stem, figure in draw(frame, structure, title, note).items() for path in save(figure, folder, stem)]
