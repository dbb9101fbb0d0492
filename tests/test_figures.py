"""Figures: the right ones for a frame, with the numbers of the frame in them, readable, the same bytes each time."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from resens_fast import figures, summary
from resens_fast.structure import Structure
from resens_fast.study import wilson_interval


def structure(per_stage: int = 6, stages: int = 3, plain: bool = False) -> Structure:
    n = per_stage * stages
    stage = [1 + i // per_stage for i in range(n)]
    transition = [i > 0 and i % per_stage == 0 for i in range(n)]
    shapes = [(16 * 2 ** (s - 1), 32 // 2 ** (s - 1), 32 // 2 ** (s - 1)) for s in stage]
    before = [shapes[max(i - 1, 0)] for i in range(n)]
    return Structure(
        names=tuple(f"blocks.{i}" for i in range(n)),
        stages=tuple(stage),
        kinds=("plain" if plain else "basic",) * n,
        transitions=tuple(transition),
        deletable=tuple(not (plain and t) for t in transition),
        drops=tuple(not t for t in transition),
        gateable=(not plain,) * n,
        shapes_in=tuple(before),
        shapes_out=tuple(shapes),
        input_shape=(3, 32, 32),
        classes=10,
    )


Row = tuple[str, int, tuple[int, ...], float, float]  # kind, k, deleted, tau, error


def frame(of: Structure, rows: list[Row], images: int = 1000) -> pd.DataFrame:
    columns = []
    for number, (kind, k, deleted, tau, error) in enumerate(rows):
        errors = round(error * images)
        low, high = wilson_interval(np.array([errors]), images)
        hit = any(of.transitions[d] for d in deleted)
        row = {"configuration": number, "kind": kind, "k": k, "deleted": deleted, "order": tuple(range(len(of)))}
        row |= {"tau": tau, "transition": hit, "images": images, "errors": errors, "error": errors / images}
        columns.append(row | {"error_low": low[0], "error_high": high[0], "loss": 1.0, "nonfinite": 0})
    return pd.DataFrame(columns)


INTACT: Row = ("intact", 0, (), 1.0, 0.12)


def singles(of: Structure, error: float = 0.13, transition: float = 0.88) -> list[Row]:
    found: list[Row] = []
    for i in range(len(of)):
        if of.deletable[i]:
            found.append(("delete", 1, (i,), 1.0, transition if of.transitions[i] else error + 0.002 * (i % 5)))
    return found


def draws(of: Structure, ks: range, samples: int = 8) -> list[Row]:
    random = np.random.RandomState(0)
    found: list[Row] = []
    for k in ks:
        for _ in range(samples):
            deleted = tuple(sorted(random.choice(len(of), k, replace=False).tolist()))
            hit = any(of.transitions[d] for d in deleted)
            found.append(("delete", k, deleted, 1.0, 0.88 if hit else 0.12 + 0.02 * k))
    return found


def reorderings(count: int = 60) -> list[Row]:
    return [("swap", 1 + i // 6, (), 1.0 - 0.004 * i, 0.12 + 0.006 * i) for i in range(count)]


def pairs(of: Structure) -> list[Row]:
    return [("delete", 2, pair, 1.0, 0.15) for pair in combinations(range(len(of)), 2)]


def lines(figure: Figure) -> list[float]:
    """The heights of the reference lines in the first axes: intact, then chance."""
    found = {line.get_label().split()[0]: float(line.get_ydata()[0]) for line in figure.axes[0].lines}
    return [found[name] for name in ("intact", "chance") if name in found]


def check_layout(figure: Figure) -> None:
    """No text leaves the figure, and no two texts of the same axes lie on each other."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    whole = figure.bbox
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts]
    # Ticks beyond the limits of an axis exist as objects but are not drawn.
    drawn = [
        (text, box)
        for text, box in boxes
        if box.x0 > 0 and box.x1 < whole.width and box.y0 > 0 and box.y1 < whole.height
    ]
    words = [(text, box) for text, box in boxes if not text.replace(".", "").replace("\u2212", "").isdigit()]
    assert all(pair in drawn for pair in words), [text for text, box in words if (text, box) not in drawn]
    for (one, a), (two, b) in combinations(words, 2):
        assert not a.shrunk(0.98, 0.9).overlaps(b.shrunk(0.98, 0.9)), f"{one!r} lies on {two!r}"


def test_each_sweep_gets_its_figures() -> None:
    of = structure()
    of_small = structure(3)
    assert list(figures.applicable(frame(of, [INTACT, *singles(of)]), of)) == ["single-deletions"]
    assert list(figures.applicable(frame(of, [INTACT, *draws(of, range(1, 5))]), of)) == ["deletions-against-k"]
    both = frame(of, [INTACT, *singles(of), *draws(of, range(1, 5))])
    assert list(figures.applicable(both, of)) == ["single-deletions", "deletions-against-k"]
    assert list(figures.applicable(frame(of, [INTACT, *reorderings()]), of)) == ["error-against-tau"]
    assert list(figures.applicable(frame(of_small, [INTACT, *pairs(of_small)]), of_small)) == ["pair-deletions"]
    assert figures.applicable(frame(of, [INTACT]), of) == {}


def test_single_deletions_show_every_block_and_the_intact_line() -> None:
    of = structure()
    figure = figures.single(frame(of, [INTACT, *singles(of)]), of)
    shown = {}
    for container in figure.axes[0].containers:
        line = container[0]
        shown |= dict(zip(line.get_xdata().tolist(), line.get_ydata().tolist(), strict=True))
    assert sorted(shown) == list(range(18))
    assert shown[6] == pytest.approx(88)
    assert shown[1] == pytest.approx(13.2)
    assert lines(figure) == pytest.approx([12, 90])
    assert len(figure.axes) == 2, "17 equal blocks and two at chance level need an enlarged panel"
    low, high = figure.axes[1].get_ylim()
    assert low < 12 < 13.8 < high < 40
    assert figure.axes[0].get_ylim()[0] < 0, "an error near 0 would lie on the axis"
    check_layout(figure)


def test_blocks_that_cannot_be_removed_are_marked() -> None:
    of = structure(plain=True)
    figure = figures.single(frame(of, [INTACT, *singles(of, 0.85)]), of)
    marks = [line for line in figure.axes[0].lines if line.get_label() == "cannot be removed"]
    assert [line.get_xdata().tolist() for line in marks] == [[6, 12]]
    check_layout(figure)


def test_the_curve_against_k_keeps_transitions_apart() -> None:
    of = structure()
    table = summary.by_k(frame(of, [INTACT, *draws(of, range(1, 9), 20)]))
    assert table["draws"].tolist() == [20] * 8
    kept = table.loc[table["k"] == 4, "mean_kept"].item()
    assert kept == pytest.approx(0.2)
    assert table.loc[table["k"] == 4, "mean"].item() > kept
    figure = figures.against_k(frame(of, [INTACT, *draws(of, range(1, 9), 20)]), of)
    means = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    assert np.allclose(means["mean, transitions kept"], 12 + 2 * np.arange(1, 1 + len(means["mean, transitions kept"])))
    assert len(means["mean, all draws"]) == 8
    dots = sum(len(c.get_offsets()) for c in figure.axes[0].collections if c.get_label().startswith("draw"))
    assert dots == 160
    assert lines(figure) == pytest.approx([12, 90])
    check_layout(figure)


def test_error_against_tau_runs_from_one_downwards() -> None:
    of = structure()
    figure = figures.against_tau(frame(of, [INTACT, *reorderings()]), of)
    left, right = figure.axes[0].get_xlim()
    assert left > 1 > right
    assert lines(figure) == pytest.approx([12, 90])
    check_layout(figure)


@pytest.mark.parametrize("count", [1, 5, 20, 60])
def test_bins_of_tau_have_round_centres_and_hold_every_draw(count: int) -> None:
    of = structure()
    table = summary.by_tau(frame(of, reorderings(count)))
    assert table["draws"].sum() == count
    assert table["tau"].is_monotonic_decreasing
    for wanted in (0.95, 0.9, 0.8):
        if wanted > 1.0 - 0.004 * (count - 1):
            assert (table["tau"] - wanted).abs().min() < 1e-9


def test_pairs_fill_the_triangle() -> None:
    of = structure(3)
    rows = [INTACT, *pairs(of), *singles(of)]
    figure = figures.pairs(frame(of, rows), of)
    grid = np.asarray(figure.axes[0].images[0].get_array().filled(np.nan))
    assert np.isfinite(grid).sum() == 9 * 10 // 2
    assert grid[4, 2] == pytest.approx(15)
    assert np.isnan(grid[2, 4])
    check_layout(figure)


def test_networks_side_by_side_share_the_scale() -> None:
    one, two = structure(), structure(plain=True)
    sides = [
        ("ours", frame(one, [INTACT, *singles(one)]), one),
        ("plain", frame(two, [INTACT, *singles(two, 0.85)]), two),
    ]
    figure = figures.compare(sides)
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    check_layout(figure)
    with pytest.raises(ValueError, match="one to four networks, not 0"):
        figures.compare([])


def test_a_frame_without_the_intact_network_is_drawn_without_its_line() -> None:
    of = structure()
    for rows in (singles(of), draws(of, range(1, 4)), reorderings(), pairs(of)):
        for figure in figures.draw(frame(of, rows), of).values():
            assert lines(figure) in ([90.0], [])  # the map of pairs has no lines


def test_one_draw_and_one_block_are_enough() -> None:
    of = structure(1, 1)
    assert list(figures.draw(frame(of, [INTACT, ("delete", 1, (0,), 1.0, 0.9)]), of)) == ["single-deletions"]
    assert list(figures.draw(frame(of, [("swap", 1, (), 1.0, 0.9)]), of)) == ["error-against-tau"]


def test_files_are_whole_reproducible_and_leave_no_trace(tmp_path: Path) -> None:
    of = structure()
    table = frame(of, [INTACT, *singles(of)])
    watched = ("font.size", "svg.hashsalt", "axes.spines.top", "figure.constrained_layout.use")
    before = [matplotlib.rcParams[name] for name in watched]
    paths = figures.write(table, of, tmp_path / "new", "net", "1,000 images")
    assert [p.name for p in paths] == ["single-deletions.png", "single-deletions.svg"]
    first = [p.read_bytes() for p in paths]
    assert imread(paths[0]).std() > 0.05, "the picture is blank"
    assert b"</svg>" in first[1]
    assert [p.read_bytes() for p in figures.write(table, of, tmp_path / "new", "net", "1,000 images")] == first
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [p.name for p in paths]
    assert [matplotlib.rcParams[name] for name in watched] == before
