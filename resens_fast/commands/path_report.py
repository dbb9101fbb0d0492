"""What `resens gradients` and `resens paths` print and draw."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .. import paths
from ..errors import StudyError, SweepError
from .tables import SHOWN, print_table

if TYPE_CHECKING:
    from ..gradient_study import GradientStudy


def finish_gradients(study: GradientStudy, name: str, data: str, everything: bool) -> list[Path]:
    """Print the lengths, the slope and the effective range of a study, and draw its figures into its folder."""
    from ..figures import describe, save
    from ..path_figures import draw_gradients

    assert study.path is not None
    engine, table, n = study.manifest["engine"], study.by_length, paths.choosable(study)
    print(
        f"\n{name} on {data}: {study.images:,} images, {len(study.sweep):,} paths, norm at {study.at}, engine "
        f"{engine['name']}, {engine['dtype']}, {study.manifest['seconds']:.1f} s"
    )
    if (wrong := int(study.frame["nonfinite"].sum())) > 0:
        print(f"{wrong:,} norms were not finite and are left out; the column nonfinite says where")
    step = 1 if everything else max(1, -(-len(table) // SHOWN))
    cells = []
    for row in cast(Any, table.iloc[::step]).itertuples():
        spread = f"{row.low:.3g} to {row.high:.3g}"
        cells.append([str(row.length), str(row.paths), f"{row.mean:.3g}", spread, f"{100 * row.influence:.3g}"])
    note = "" if step == 1 else f"one in {step} of {len(table)} lengths (resens show --all)"
    columns = ["length", "paths", "mean norm", "10th to 90th percentile", "share of the gradient, %"]
    print_table("Gradient norm by path length", columns, cells, note)
    positive = table[table["mean"] > 0]
    if len(positive) > 2:
        line = paths.slope(positive["length"], positive["mean"])
        print(f"log norm falls by {-line.slope:.3f} per block entered (r² {line.r2:.3f})")
    if len(positive):
        found = paths.effective_range(table["length"], table["mean"], n)
        of, low, high = "the gradient", table["length"].min(), table["length"].max()
        if len(table) < n + 1:
            of += f" along paths of {low} to {high} blocks"
        if len(table) < high - low + 1:
            of += f" ({len(table)} lengths measured, interpolated between them)"
        print(
            f"{100 * found.carried:.1f} % of {of} comes from paths of {found.low} to {found.high} of {n} "
            f"blocks, {100 * found.paths:.3g} % of all paths"
        )
    drawn = draw_gradients(study, name, describe(study))
    return [path for stem, figure in drawn.items() for path in save(figure, study.path, stem)]


def report_paths(model: str, out: Path, deleted: list[int] | None, image_size: tuple[int, int] | None) -> None:
    """Print how long the paths of a network are and which survive deletions, and draw both."""
    from ..figures import save
    from ..path_figures import path_lengths, surviving_paths

    if out.exists() and not out.is_dir():
        raise StudyError(f"{out} is a file; give --out a folder for the figures")
    n = int(model) if model.isdecimal() else _choosable(model, image_size)
    if not 1 <= n <= 10_000:
        raise SweepError(f"cannot draw the paths of a network with {n:,} blocks with shortcuts; give 1 to 10,000")
    if deleted is None:
        deleted = [count for count in (1, 5, 10, 20) if count <= n]
    if len(deleted) > 5 or max(deleted) > n:
        raise SweepError(f"--deleted takes at most five numbers up to {n}, not {','.join(map(str, deleted))}")
    share = paths.distribution(n)
    print(f"{model}: 2^{n} paths through {n} blocks, {n / 2:g} blocks long on average")
    marks = sorted({round(n * tenth / 10) for tenth in range(11)})
    left = [paths.surviving(n, count) for count in deleted]
    cells = [[str(x), f"{100 * share[x]:.3g}", *(f"{100 * row[x]:.3g}" for row in left)] for x in marks]
    columns = ["length", "paths, %", *(f"left after {count}, %" for count in deleted)]
    print_table("Paths by length", columns, cells)
    out.mkdir(parents=True, exist_ok=True)
    made = {"path-lengths": path_lengths(n), "surviving-paths": surviving_paths(n, deleted)}
    print()
    for stem, figure in made.items():
        for path in save(figure, out, stem):
            print(f"wrote {path}")


def _choosable(model: str, image_size: tuple[int, int] | None) -> int:
    """The blocks of a network that a path may enter or leave out; its weights do not matter."""
    import torch

    from .. import models
    from ..wrap import wrap
    from . import architecture
    from .loading import from_factory, read_card

    if architecture.is_trained(model):
        card = read_card(Path(model))
        network = architecture.build(card)
    elif ":" in model:
        card, network = {}, from_factory(model)
    else:
        card, network = dict(models.card(model)), models.load(model)
    shape = card.get("input_shape") or (image_size and (3, *image_size))
    return sum(wrap(network.eval(), torch.zeros(1, *shape) if shape else None).structure.choosable)
