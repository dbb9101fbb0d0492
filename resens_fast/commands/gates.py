"""`resens gates`: the transform gates of a highway network as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from .loading import one_device
from .tables import print_table

if TYPE_CHECKING:
    from .run import Target


def show(target: Target, device: str | None) -> None:
    """Mean and spread of every block's gate over the test images.  Raises what loading and `highway.gates` raise."""
    from .. import highway

    where, loaded = one_device(device), target.load()
    frame = highway.gates(loaded.net if where is None else loaded.net.to(where), loaded.data)
    cells = [
        [
            str(row.block),
            row.name,
            str(row.stage),
            *(f"{value:.3f}" for value in (row.mean, row.sd, row.low, row.high)),
            f"{row.sd_images:.4f}",
        ]
        for row in cast(Any, frame).itertuples()
    ]
    print_table(
        f"Transform gates of {loaded.name} on {len(loaded.data):,} images of {loaded.data_name}: 0 skips, 1 transforms",
        ["block", "name", "stage", "mean", "sd", "lowest", "highest", "sd between images"],
        cells,
        f"mean over all blocks {frame['mean'].mean():.3f}; sd over images, channels and pixels",
    )
