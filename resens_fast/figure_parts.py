"""The pieces that all figures share: style, colours, stage shading, reference lines, legends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .structure import Structure


# Okabe and Ito's palette: told apart with every common colour blindness, and in grey by lightness.
BLUE, SKY, VERMILION, GREEN, ORANGE, GREY, INK = (
    "#0072B2",
    "#56B4E9",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#8A8A8A",
    "#222222",
)
SHADES = ("#F3F3F3", "#E6E6E6")  # stages alternate between the two

STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "figure.dpi": 110,
    "savefig.dpi": 200,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "resens_fast",  # the same study gives the same SVG bytes
}
MANY = 4000  # more dots than this become one picture inside the SVG


@contextmanager
def styled() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(cast(Any, STYLE)):
        yield


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as MplFigure

    figure = MplFigure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def chance_error(structure: Structure) -> float:
    return 1.0 - 1.0 / structure.classes


def stages(axes: Axes, structure: Structure, label: bool = True) -> None:
    """Shade the stages behind a plot whose x axis is the block's index, and name them above it."""
    stages = np.asarray(structure.stages)
    runs = [(s, *np.flatnonzero(stages == s)[[0, -1]]) for s in dict.fromkeys(stages.tolist())]
    for number, (stage, first, last) in enumerate(runs):
        axes.axvspan(first - 0.5, last + 0.5, color=SHADES[number % 2], lw=0, zorder=0)
        if label:
            c, h, w = structure.shapes_out[int(last)]
            wide = (last - first + 1) / len(stages) > 0.16
            text = f"stage {stage}\n{c}\u00d7{h}\u00d7{w}" if wide else str(stage)
            axes.annotate(
                text,
                ((first + last) / 2, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=7.5,
                color="#555555",
                linespacing=1.15,
            )
    axes.set_xlim(-0.5, len(stages) - 0.5)


def levels(axes: Axes, intact: float | None, chance: float | None) -> None:
    """The intact network's error as a line and chance level as a dotted line."""
    if intact is not None:
        axes.axhline(100 * intact, color=INK, lw=1.1, zorder=2, label=f"intact ({100 * intact:.2f} %)")
    if chance is not None:
        axes.axhline(100 * chance, color=INK, lw=1.1, ls=(0, (1, 2)), zorder=2, label=f"chance ({100 * chance:.0f} %)")


def full_scale(axes: Axes, chance: float, highest: float) -> None:
    top = 100 * max(chance * 1.07, min(highest, 1.0) * 1.05)
    axes.set_ylim(-0.02 * top, top)  # below 0, so that an error near 0 and its line stay clear of the axis
    axes.set_ylabel("Error (%)")


def put_legend(axes: Axes, columns: int = 5) -> None:
    """The legend below the axes, where it can cover nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure = axes.figure
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(columns, len(labels)),
        handlelength=1.6,
        columnspacing=1.4,
        markerscale=1.3,
    )  # type: ignore[union-attr]


def put_title(figure: Figure, title: str, note: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=10.5, fontweight="bold")
    if note:
        figure.text(0.99, 0.992, note, ha="right", va="top", fontsize=7.5, color="#555555")


def block_dots(axes: Axes, rows: pd.DataFrame, structure: Structure) -> None:
    """One dot with its 95 % interval for each deleted block; transitions in their own colour and shape."""
    block = rows["block"].to_numpy(int)
    hit = np.asarray([bool(structure.transitions[b]) for b in block], bool)
    error, low, high = (100 * rows[c].to_numpy(float) for c in ("error", "error_low", "error_high"))
    for chosen, colour, marker, size, text in (
        (~hit, BLUE, "o", 4, "one block deleted"),
        (hit, VERMILION, "D", 5, "transition deleted"),
    ):
        if chosen.any():
            spread = np.clip([error[chosen] - low[chosen], high[chosen] - error[chosen]], 0, None)
            axes.errorbar(
                block[chosen],
                error[chosen],
                yerr=spread,
                fmt=marker,
                ms=size,
                color=colour,
                mec="white",
                mew=0.4,
                elinewidth=1.0,
                capsize=0,
                zorder=3,
                label=text,
            )


def off_scale(axes: Axes, rows: pd.DataFrame, structure: Structure, high: float) -> None:
    """A small arrowhead at the upper edge for every block that lies above the enlarged panel."""
    for block, error in zip(rows["block"], rows["error"], strict=True):
        if error > high:
            colour = VERMILION if structure.transitions[block] else BLUE
            axes.plot([block], [0.965], "^", color=colour, ms=5, mew=0, transform=axes.get_xaxis_transform(), zorder=3)


def undeletable(axes: Axes, structure: Structure) -> None:
    """Mark the blocks that cannot be removed at the foot of the axes."""
    fixed = [i for i, possible in enumerate(structure.deletable) if not possible]
    if fixed:
        axes.plot(
            fixed,
            [0.025] * len(fixed),
            "x",
            color="#555555",
            ms=5,
            mew=1.2,
            transform=axes.get_xaxis_transform(),
            zorder=3,
            label="cannot be removed",
            clip_on=False,
        )


def block_axis(axes: Axes, structure: Structure) -> None:
    from matplotlib.ticker import MaxNLocator

    if len(structure.names) <= 20:
        axes.set_xticks(range(len(structure.names)))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, steps=[1, 2, 3, 5, 6, 10]))
    axes.set_xlabel("Block (index)")


def near_range(rows: pd.DataFrame, intact: float | None) -> tuple[float, float]:
    """The range of the intervals of all blocks but far outliers, with the intact error inside it."""
    if not len(rows):
        return 0.0, 1.0
    error = rows["error"].to_numpy(float)
    quarter, half, three = np.quantile(error, [0.25, 0.5, 0.75])
    reach = max(6 * (three - quarter), 0.02)
    close = rows[np.abs(error - half) <= reach]
    # A block that the range shows anyway is shown with its whole interval.
    close = rows[(error >= close["error_low"].min()) & (error <= close["error_high"].max())]
    values = [*close["error_low"], *close["error_high"], *([] if intact is None else [intact])]
    return float(min(values)), float(max(values))


def integer_axis(axes: Axes, values: np.ndarray) -> None:
    from matplotlib.ticker import MaxNLocator

    if len(values):
        axes.set_xlim(values.min() - 0.6, values.max() + 0.6)
    if len(values) <= 24:
        axes.set_xticks(sorted(set(values.tolist())))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
