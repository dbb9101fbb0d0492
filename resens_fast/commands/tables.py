"""A study as tables on the terminal: the intact error first, transitions apart, percent everywhere."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from .. import summary

if TYPE_CHECKING:
    import pandas as pd

    from ..structure import Structure
    from ..study import Study

SHOWN = 15  # rows of a long table unless all are asked for


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> None:
    """A table: ruled on a terminal, plain text with two spaces between columns elsewhere."""
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            caption=note or None,
            caption_justify="left",
        )
        for name in columns:
            table.add_column(name, justify="left" if name in ("name", "blocks") else "right", no_wrap=name != "name")
        for row in rows:
            table.add_row(*row)
        Console(highlight=False).print(table)
        return
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]
    print(f"\n{title}")
    for row in (columns, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    if note:
        print(note)


def percent(value: float, digits: int = 2) -> str:
    """An error in [0, 1] as a number of percent; a dash when there is none."""
    return "-" if math.isnan(value) else f"{100 * value:.{digits}f}"


def plus_minus(mean: float, sd: float) -> str:
    """Mean ± sd in percent; the mean alone when one draw has no spread."""
    return percent(mean) if math.isnan(sd) else f"{percent(mean)} ± {percent(sd)}"


def print_study(study: Study, name: str, data: str, everything: bool = False) -> None:
    """Everything a study found, as tables; `everything` prints all rows of the long ones."""
    frame, structure = study.frame, study.structure
    engine = study.manifest["engine"]
    memory = f" in {engine['footprint'] / 2**20:,.0f} MiB" if engine.get("footprint") else ""
    print(
        f"\n{name} on {data}: {study.images:,} images, engine {engine['name']}, {engine['dtype']}{memory}, "
        f"{study.manifest['seconds']:.1f} s"
    )
    if engine.get("path"):
        print(f"the {engine['name']} engine took the {engine['path']}")
    intact = frame[frame["kind"] == "intact"]
    if len(intact):
        row = intact.iloc[0]
        interval = f"{percent(row['error_low'])} to {percent(row['error_high'])}"
        print(f"intact error {percent(row['error'])} %  (95 % interval {interval})")
    if (wrong := int(frame["nonfinite"].sum())) > 0:
        print(f"{wrong:,} answers were not finite and count as errors; the column nonfinite says where")
    base = summary.intact_error(frame)
    _singles(summary.single_deletions(frame), structure, base, everything)
    _pairs(frame, structure, everything)
    _by_k(frame)
    _by_tau(frame)


def _left_out(rest: pd.DataFrame) -> str:
    """The note below a table that was cut short; empty where nothing is missing."""
    if not len(rest):
        return ""
    low, high = percent(rest["error"].min()), percent(rest["error"].max())
    return f"{len(rest)} more, from {low} to {high} % (resens show --all)"


def _singles(rows: pd.DataFrame, structure: Structure, base: float | None, everything: bool) -> None:
    if not len(rows):
        return
    rows = rows.sort_values("error", ascending=False, kind="stable")
    apart = [structure.transitions[block] for block in rows["block"]]
    inside = rows[[not one for one in apart]]
    for title, group in (("One block deleted, transitions", rows[apart]), ("One block deleted", inside)):
        if not len(group):
            continue
        shown = group if everything else group.head(SHOWN)
        cells = [
            [
                str(row.block),
                structure.names[row.block],
                str(structure.stages[row.block]),
                percent(row.error),
                "-" if base is None else f"{100 * (row.error - base):+.2f}",
                f"{percent(row.error_low)} to {percent(row.error_high)}",
            ]
            for row in cast(Any, shown).itertuples()
        ]
        rest = group.iloc[len(shown) :]
        note = _left_out(rest)
        print_table(title, ["block", "name", "stage", "error %", "change", "95 % interval"], cells, note)
    if fixed := [str(i) for i, possible in enumerate(structure.deletable) if not possible]:
        print(f"cannot be deleted (no shortcut, and the shape changes): {', '.join(fixed)}")


def _pairs(frame: pd.DataFrame, structure: Structure, everything: bool) -> None:
    """The pairs that cost most, when the frame has all of them; a few random pairs belong to the table by k."""
    rows = summary.deletions(frame)
    rows = rows[(rows["k"] == 2) & ~rows["transition"].astype(bool)].assign(
        pair=lambda r: [tuple(d) for d in r["deleted"]]
    )
    rows = rows.drop_duplicates("pair").sort_values("error", ascending=False, kind="stable")
    free = sum(
        possible and not transition
        for possible, transition in zip(structure.deletable, structure.transitions, strict=True)
    )
    if not len(rows) or len(rows) < math.comb(free, 2):
        return
    shown = rows if everything else rows.head(SHOWN)
    cells = [[f"{i} and {j}", percent(error)] for (i, j), error in zip(shown["pair"], shown["error"], strict=True)]
    rest = rows.iloc[len(shown) :]
    note = _left_out(rest)
    print_table("Two blocks deleted, transitions kept", ["blocks", "error %"], cells, note)


def _by_k(frame: pd.DataFrame) -> None:
    table = summary.by_k(frame)
    if not len(table) or list(table["k"]) == [1]:
        return
    hits = bool(table["hit"].sum())
    columns = ["k", "draws", "error %, mean ± sd"] + (["with a transition", "transitions kept"] if hits else [])
    cells = []
    for row in cast(Any, table).itertuples():
        cells.append([str(row.k), str(row.draws), plus_minus(row.mean, row.sd)])
        if hits:
            cells[-1] += [str(row.hit), plus_minus(row.mean_kept, row.sd_kept)]
    print_table("k blocks deleted", columns, cells)


def _by_tau(frame: pd.DataFrame) -> None:
    table = summary.by_tau(frame)
    if len(table):
        cells = [
            [f"{row.tau:.3f}", str(row.draws), plus_minus(row.mean, row.sd)] for row in cast(Any, table).itertuples()
        ]
        print_table(
            "Blocks reordered, by Kendall's tau",
            ["tau", "draws", "error %, mean ± sd"],
            cells,
            "tau is the middle of a bin",
        )
