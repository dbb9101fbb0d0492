"""Studies: the results of a sweep, in memory or as a folder that can be stopped, killed and resumed.

A folder holds ``manifest.json`` (network, sweep, engine, data, versions), ``sweep.parquet`` (the configurations) and
``parts/START-STOP.parquet``: the sums over a range of images with the hash of those images. Every file appears whole
or not at all.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .engines.base import LOSS_SCALE, Tally
from .errors import StudyError
from .structure import Structure
from .sweep import Sweep

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from .gradient_study import Norms


class Part(NamedTuple):
    """What was found on the images ``[start, stop)``, one value per configuration, with the hash of those images: sums,
    or in a study of gradients the norms.
    """

    start: int
    stop: int
    hash: str
    tally: Tally | Norms


class Study:
    """Results of evaluating a sweep on images.

    ``frame`` is the table, ``manifest`` what was evaluated and how, ``path`` the folder (None when it was not asked
    for).
    """

    def __init__(self, manifest: dict[str, Any], sweep: Sweep, parts: list[Part], path: Path | None = None) -> None:
        self.manifest, self.sweep, self.parts, self.path = manifest, sweep, parts, path

    @property
    def structure(self) -> Structure:
        """The network's blocks: names, stages, shapes."""
        return self.sweep.structure

    @property
    def images(self) -> int:
        """Number of images evaluated so far."""
        return self.parts[-1].stop if self.parts else 0

    @property
    def complete(self) -> bool:
        """Whether every image of the data was evaluated."""
        return bool(self.manifest["complete"])

    @property
    def frame(self) -> pd.DataFrame:
        """`Sweep.frame` and, per configuration: images, errors, error, error_low, error_high, loss, nonfinite.

        error: errors / images. error_low, error_high: 95 % Wilson score interval of the error over images. loss: mean
        cross-entropy in nats over the images whose logits are finite. nonfinite: images with a non-finite logit; they
        count as errors. Warns when the study is incomplete.
        """
        self._warn_incomplete()
        frame = self.sweep.frame
        total_tally = Tally.zeros(len(self.sweep))
        for part in self.parts:
            assert isinstance(part.tally, Tally)
            total_tally.add(part.tally)
        images = self.images
        finite = images - total_tally.nonfinite
        frame["images"] = images
        frame["errors"] = total_tally.errors
        with np.errstate(invalid="ignore", divide="ignore"):
            frame["error"] = total_tally.errors / images if images else np.nan
            frame["error_low"], frame["error_high"] = wilson_interval(total_tally.errors, images)
            frame["loss"] = total_tally.loss / LOSS_SCALE / finite
        frame["nonfinite"] = total_tally.nonfinite
        return frame

    def _warn_incomplete(self) -> None:
        if not self.complete:
            total = self.manifest["data"]["images"]
            warnings.warn(
                f"this study is incomplete: {self.images} of {total or 'an unknown number of'} images; "
                "evaluate again to finish it",
                stacklevel=3,
            )

    def plot(self, path: str | Path | None = None) -> Figure:
        """The figure that suits the study (gradients: norm against path length), as a matplotlib figure; saved when
        ``path`` is given, whose suffix names the format and whose folder is made if need be.
        """
        figure = self._figure()
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
        return figure

    def _figure(self) -> Figure:
        from .figures import plot_study

        return plot_study(self)

    def __repr__(self) -> str:
        where = f" in {self.path}" if self.path else ""
        state = "" if self.complete else ", incomplete"
        return f"Study({len(self.sweep)} configurations, {self.images} images{state}){where}"


def wilson_interval(errors: Any, images: int, level: float = 0.95) -> tuple[Any, Any]:
    """Wilson's score interval (1927) of a proportion: ``errors`` [C] of ``images``; NaN when there are no images."""
    from scipy.stats import norm

    errors = np.asarray(errors, dtype=float)
    if images == 0:
        nothing = np.full(errors.shape, np.nan)
        return nothing, nothing
    z = norm.ppf(0.5 + level / 2)
    p, n = errors / images, images
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return np.where(errors == 0, 0.0, np.maximum(centre - half, 0)), np.where(
        errors == n, 1.0, np.minimum(centre + half, 1)
    )


def open_study(path: str | Path) -> Study:
    """The study in a folder, complete or not.

    Raises StudyError when there is none, or when a file is damaged or missing.
    """
    from .folder import StudyFolder

    return StudyFolder(path).read()


def check_contiguous(parts: list[Part], where: Path) -> list[Part]:
    """The parts in order; StudyError when they leave a gap or overlap."""
    parts = sorted(parts, key=lambda part: part.start)
    position = 0
    for part in parts:
        if part.start != position or part.stop <= part.start:
            raise StudyError(
                f"{where} holds no part for the images from {position} on, but one for {part.start} to {part.stop}: "
                "a file is missing or was copied in; delete the folder's parts from there on and evaluate again"
            )
        position = part.stop
    return parts
