"""Studies of path gradients: norms instead of errors, in the same folders, with a row per path and batch of images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import StudyError
from .study import Study

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from matplotlib.figure import Figure


class Norms(NamedTuple):
    """Gradient norms of every path over one batch of images.

    norm, sd float64 [C]: mean and standard deviation over the images whose norm is finite (NaN when there is none);
    nonfinite int64 [C]: how many images have none; blocks float64 [C, n]: the same mean for the parameters of each
    block, [C, 0] unless the gradient is taken there.
    """

    norm: NDArray[np.float64]
    sd: NDArray[np.float64]
    nonfinite: NDArray[np.int64]
    blocks: NDArray[np.float64]

    @classmethod
    def gather(cls, found: torch.Tensor) -> Norms:
        """From the norms of every path and image, float64 [C, B], or [C, B, n] block by block."""
        values = found.double().cpu().numpy()
        each = np.sqrt((values**2).sum(axis=2)) if values.ndim == 3 else values
        finite = np.isfinite(each)
        count = finite.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.where(finite, each, 0).sum(axis=1) / count
            square = (np.where(finite, each - mean[:, None], 0) ** 2).sum(axis=1) / count
            if values.ndim == 3:
                blocks = np.where(finite[:, :, None], values, 0).sum(axis=1) / count[:, None]
            else:
                blocks = np.empty((len(values), 0))
        return cls(mean, np.sqrt(square), (~finite).sum(axis=1), blocks)

    def columns(self) -> dict[str, NDArray[Any]]:
        """For a table with a row per path."""
        return {name: values for name, values in self._asdict().items() if name != "blocks" or values.shape[1]}

    @classmethod
    def from_columns(cls, columns: dict[str, NDArray[Any]]) -> Norms:
        """What `columns` gave, among others; KeyError when one is missing."""
        norm = columns["norm"].astype(np.float64)
        blocks = columns.get("blocks", np.empty((len(norm), 0))).astype(np.float64)
        return cls(norm, columns["sd"].astype(np.float64), columns["nonfinite"].astype(np.int64), blocks)


class GradientStudy(Study):
    """Norms of the gradient along many paths of an intact network; made by ``resens_fast.path_gradients``."""

    @property
    def at(self) -> str:
        """Where the norm was taken: ``first_block``, ``image`` or ``parameters``."""
        return str(self.manifest["gradients"]["norm"])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """How many blocks each path enters through their branch, int64 [C]; blocks without a shortcut do not count."""
        entered = (self.sweep.gates != 0) & np.asarray(self.structure.choosable, dtype=bool)
        return np.asarray(entered.sum(axis=1), dtype=np.int64)

    @property
    def frame(self) -> pd.DataFrame:
        """One row per length, sample and batch of images.

        Columns: path (row of the sweep), length, sample (counts the paths of a length), batch, images, norm (mean of
        the per-image norm over the images of the batch that have a finite one), sd (over those images), nonfinite
        (images that have none), transitions (shape-changing blocks that the path enters). Warns when the study is
        incomplete.
        """
        import pandas as pd

        self._warn_incomplete()
        length = pd.Series(self.lengths)
        sample = length.groupby(length).cumcount().to_numpy()
        entered = (self.sweep.gates != 0) & np.asarray(self.structure.transitions, dtype=bool)
        frames = []
        for batch, part in enumerate(self.parts):
            found = self._norms(part.tally)
            frames.append(
                pd.DataFrame(
                    {
                        "path": np.arange(len(self.sweep)),
                        "length": length.to_numpy(),
                        "sample": sample,
                        "batch": batch,
                        "images": part.stop - part.start,
                        "norm": found.norm,
                        "sd": found.sd,
                        "nonfinite": found.nonfinite,
                        "transitions": entered.sum(axis=1),
                    }
                )
            )
        if not frames:
            raise StudyError("the study has no finished part yet: run the call that began it again")
        return pd.concat(frames, ignore_index=True).sort_values(["path", "batch"], ignore_index=True)

    @property
    def by_length(self) -> pd.DataFrame:
        """Mean, spread and influence of each length: ``resens_fast.paths.by_length``."""
        from .paths import by_length

        return by_length(self)

    @property
    def by_block(self) -> pd.DataFrame:
        """Which blocks receive the gradient: columns length, block, name and norm, the mean over paths and images of
        the norm over the block's own parameters. Raises StudyError unless it was taken there.
        """
        import pandas as pd

        if self.at != "parameters":
            raise StudyError(f'the gradient was taken at {self.at}; use norm="parameters" to have it block by block')
        self._warn_incomplete()
        lengths, every = np.unique(self.lengths, return_inverse=True)
        total, images = np.zeros((len(lengths), len(self.structure))), np.zeros(len(lengths))
        for part in self.parts:
            found = self._norms(part.tally)
            finite = part.stop - part.start - found.nonfinite
            np.add.at(total, every, np.where(finite[:, None] > 0, found.blocks, 0) * finite[:, None])
            np.add.at(images, every, finite)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = total / images[:, None]
        return pd.DataFrame(
            {
                "length": np.repeat(lengths, len(self.structure)),
                "block": np.tile(np.arange(len(self.structure)), len(lengths)),
                "name": list(self.structure.names) * len(lengths),
                "norm": mean.ravel(),
            }
        )

    def _figure(self) -> Figure:
        from .path_figures import plot_gradients

        return plot_gradients(self)

    def __repr__(self) -> str:
        return "Gradient" + super().__repr__().replace(" configurations, ", " paths, ", 1)

    @staticmethod
    def _norms(found: Any) -> Norms:
        assert isinstance(found, Norms)
        return found
