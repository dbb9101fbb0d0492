"""What a study's frame says, in numbers: the summaries that both the tables and the figures show."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


def intact_error(frame: pd.DataFrame) -> float | None:
    """Error of the intact network in [0, 1], or None if the frame has no intact row."""
    rows = frame[frame["kind"] == "intact"]
    return float(rows["error"].iloc[0]) if len(rows) else None


def single_deletions(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that delete exactly one block and reorder nothing, one per block and sorted, with a column `block`."""
    rows = deletions(frame)
    rows = rows[rows["k"] == 1]
    rows = rows.assign(block=[int(deleted[0]) for deleted in rows["deleted"]])
    return rows.drop_duplicates("block").sort_values("block")


def deletions(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that only delete blocks (kinds `delete` and `mask`) with at least one block deleted."""
    return frame[frame["kind"].isin(["delete", "mask"]) & (frame["k"] >= 1)]


def reorderings(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that only reorder blocks (kinds `swap` and `order`)."""
    return frame[frame["kind"].isin(["swap", "order"])]


def by_k(frame: pd.DataFrame) -> pd.DataFrame:
    """Deletions summarised for each k: draws, mean, sd, low and high (10th and 90th percentile) of the error.

    `hit` counts the draws that delete a transition; mean_kept and sd_kept are over the others (NaN if none).
    """
    import pandas as pd

    rows = []
    for _, group in deletions(frame).groupby("k"):
        error = group["error"].to_numpy(float)
        kept = group.loc[~group["transition"].astype(bool), "error"].to_numpy(float)
        rows.append(
            {
                "k": int(group["k"].iloc[0]),
                "draws": len(error),
                "mean": error.mean(),
                "sd": _sd(error),
                "low": np.quantile(error, 0.1),
                "high": np.quantile(error, 0.9),
                "hit": len(error) - len(kept),
                "mean_kept": kept.mean() if len(kept) else math.nan,
                "sd_kept": _sd(kept),
                "low_kept": np.quantile(kept, 0.1) if len(kept) else math.nan,
                "high_kept": np.quantile(kept, 0.9) if len(kept) else math.nan,
            }
        )
    names = ["k", "draws", "mean", "sd", "low", "high", "hit", "mean_kept", "sd_kept", "low_kept", "high_kept"]
    return pd.DataFrame(rows, columns=names)


def by_tau(frame: pd.DataFrame, width: float | None = None) -> pd.DataFrame:
    """Reorderings in bins of Kendall's tau: tau (the bin's centre), at (mean tau in it), draws, mean, sd of the error.

    Bins are centred on 1, 1 - width, ..., so that 0.95, 0.9 and 0.8 are centres at every default width; tau falls.
    """
    import pandas as pd

    rows = reorderings(frame)
    tau = rows["tau"].to_numpy(float)
    error = rows["error"].to_numpy(float)
    if len(rows) and width is None:
        spread = 1.0 - tau.min()
        width = next((w for w in (0.01, 0.025, 0.05) if spread <= 16 * w), 0.1)
    number = np.round((1.0 - tau) / (width or 1.0)).astype(int)  # bins counted downwards from 1
    found = []
    for b in np.unique(number):
        inside = error[number == b]
        centre = round(1.0 - b * (width or 1.0), 6)
        found.append(
            {
                "tau": centre,
                "at": tau[number == b].mean(),
                "draws": len(inside),
                "mean": inside.mean(),
                "sd": _sd(inside),
            }
        )
    return pd.DataFrame(found, columns=["tau", "at", "draws", "mean", "sd"])


def _sd(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan
