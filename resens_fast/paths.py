"""The paths of the unraveled view: how many there are of each length, and where along them the gradient is.

A network of n blocks that can be left out has C(n, x) paths that enter x of them (Veit et al. 2016, sections 4.2 and
4.3). Counts are exact whole numbers until the last step, so that nothing overflows or is lost for thousands of blocks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import StudyError, SweepError

if TYPE_CHECKING:
    import pandas as pd

    from .gradient_study import GradientStudy

Floats = NDArray[np.float64]


def distribution(n: int) -> Floats:
    """The fraction C(n, x) / 2^n of all paths that have each length x = 0 ... n: float64 [n + 1], correctly rounded."""
    n, whole = _whole(n, "n"), 1 << n
    return np.array([count / whole for count in _counts(n)])


def log_counts(n: int) -> Floats:
    """The natural logarithm of C(n, x) for x = 0 ... n: float64 [n + 1]."""
    return np.array([math.log(count) for count in _counts(_whole(n, "n"))])


def fraction(n: int, low: int, high: int) -> float:
    """The fraction of all paths whose length lies in low ... high, both included."""
    n, low, high = _whole(n, "n"), _whole(low, "low"), _whole(high, "high")
    if low > high:
        raise SweepError(f"low is {low} and high is {high}: give the shorter length first")
    return sum(_counts(n)[low : high + 1]) / (1 << n)


def surviving(n: int, deleted: int) -> Floats:
    """The fraction C(n - d, x) / C(n, x) of the paths of each length x = 0 ... n that are left after d blocks are
    deleted: float64 [n + 1], correctly rounded.
    """
    n, deleted = _whole(n, "n"), _whole(deleted, "deleted")
    if deleted > n:
        raise SweepError(f"cannot delete {deleted} of {n} blocks; give at most {n}")
    left = [*_counts(n - deleted), *([0] * deleted)]
    return np.array([some / every for some, every in zip(left, _counts(n), strict=True)])


def influence(lengths: ArrayLike, norms: ArrayLike, n: int) -> Floats:
    """The share of each length in the gradient: mean norm × number of paths, scaled to a sum of 1; float64 [L].

    lengths int [L], norms [L] the mean gradient norm of a path of that length. Raises StudyError for lengths that do
    not exist and for norms that are negative, not finite or all 0.
    """
    x, value = _curve(lengths, norms, n)
    with np.errstate(divide="ignore"):
        logs = np.log(value) + log_counts(n)[x]
    if not np.isfinite(logs).any():
        raise StudyError("every mean norm is 0: no gradient arrives, so there is no influence to share out")
    shares = np.exp(logs - logs.max())
    return np.asarray(shares / shares.sum(), dtype=np.float64)


def every_length(lengths: ArrayLike, norms: ArrayLike, n: int) -> tuple[NDArray[np.int64], Floats]:
    """The mean norms in order of length, with the geometric interpolation for lengths between measured ones."""
    x, value = _curve(lengths, norms, n)
    order = np.argsort(x)
    every = np.arange(x.min(), x.max() + 1)
    if len(every) == len(x):
        return every, value[order]
    with np.errstate(divide="ignore", invalid="ignore"):
        return every, np.nan_to_num(np.exp(np.interp(every, x[order], np.log(value[order]))), nan=0.0)


class EffectiveRange(NamedTuple):
    """The lengths low ... high that carry `carried` of the influence, and the fraction `paths` of all paths that are
    as long.
    """

    low: int
    high: int
    carried: float
    paths: float


def effective_range(lengths: ArrayLike, norms: ArrayLike, n: int, share: float = 0.95) -> EffectiveRange:
    """The shortest range of lengths that carries at least `share` of the influence (section 4.3: 5 to 17 of 54).

    Of several that are as short it is the one that carries most. Lengths without a measurement between two measured
    ones take the geometric interpolation of the mean norm; shorter and longer ones count as nothing.
    """
    if not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise StudyError(f"share must lie above 0 and not above 1, not {share!r}")
    every, value = every_length(lengths, norms, n)
    sums = np.concatenate([[0.0], np.cumsum(influence(every, value, n))])
    wanted = min(share, sums[-1])
    for width in range(1, len(every) + 1):
        carried = sums[width:] - sums[:-width]
        best = int(carried.argmax())
        if carried[best] >= wanted:
            break
    low, high = int(every[best]), int(every[best + width - 1])
    return EffectiveRange(low, high, min(1.0, float(carried[best])), fraction(n, low, high))


class Slope(NamedTuple):
    """The line log(norm) = intercept + slope × length, and the share `r2` of the variance that it explains."""

    slope: float
    intercept: float
    r2: float


def slope(lengths: ArrayLike, norms: ArrayLike) -> Slope:
    """Least squares of the natural logarithm of the mean norm on length, every length with the same weight.

    A length whose norm is 0 has no logarithm and is left out. Raises StudyError when fewer than two are left.
    """
    x, value = _curve(lengths, norms, None)
    kept = value > 0
    if len(np.unique(x[kept])) < 2:
        raise StudyError("a slope needs positive norms at two lengths or more; measure more lengths")
    x, y = x[kept].astype(float), np.log(value[kept])
    dx, dy = x - x.mean(), y - y.mean()
    gradient = float(dx @ dy / (dx @ dx))
    total = float(dy @ dy)
    rest = float(((dy - gradient * dx) ** 2).sum())
    return Slope(gradient, float(y.mean() - gradient * x.mean()), 1 - rest / total if total > 0 else 1.0)


def by_length(study: GradientStudy) -> pd.DataFrame:
    """A study of path gradients summarised for each length, shortest first.

    Columns: length, paths (how many were measured), mean, sd, low and high (10th and 90th percentile over paths of the
    norm's mean over images), log_count (of all paths that long) and influence (see there; lengths that were not
    measured have a share too, that of the norms interpolated between their neighbours, but no row). Paths with no
    finite norm are left out.
    """
    import pandas as pd

    mean = by_path(study)["norm"].groupby(level="length")
    n = choosable(study)
    table = pd.DataFrame(
        {
            "paths": mean.size(),
            "mean": mean.mean(),
            "sd": mean.std(),
            "low": mean.quantile(0.1),
            "high": mean.quantile(0.9),
        }
    ).reset_index()
    table["log_count"] = log_counts(n)[table["length"].to_numpy(int)]
    if (table["mean"] > 0).any():
        every, value = every_length(table["length"], table["mean"], n)
        table["influence"] = influence(every, value, n)[table["length"] - every[0]]
    else:
        table["influence"] = np.nan
    return table


def by_path(study: GradientStudy) -> pd.DataFrame:
    """The mean over images of every path's norm: column norm, indexed by length and path. Images without a finite norm
    are left out, and so are paths that have no other. Raises StudyError when no path is left.
    """
    import pandas as pd

    from .gradient_study import GradientStudy

    if not isinstance(study, GradientStudy):
        raise StudyError(f"a study of path gradients is needed, not {study!r}; resens_fast.path_gradients makes one")
    frame = study.frame
    frame = frame[np.isfinite(frame["norm"])]
    if not len(frame):
        raise StudyError("no path has a finite gradient norm; are the images and the network's weights finite?")
    weight = (frame["images"] - frame["nonfinite"]).to_numpy(float)
    sums = pd.DataFrame({"path": frame["path"], "length": frame["length"], "images": weight})
    sums["norm"] = frame["norm"].to_numpy(float) * weight
    paths = sums.groupby(["length", "path"], sort=True)[["norm", "images"]].sum()
    return pd.DataFrame({"norm": paths["norm"] / paths["images"]})


def choosable(study: GradientStudy) -> int:
    """How many blocks a path may enter or leave out: the n of its network."""
    return sum(study.structure.choosable)


def _counts(n: int) -> list[int]:
    """C(n, x) for x = 0 ... n."""
    counts = [1]
    for x in range(n):
        counts.append(counts[-1] * (n - x) // (x + 1))
    return counts


def _whole(value: int, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
        raise SweepError(f"{name} must be a whole number of at least 0, not {value!r}")
    return int(value)


def _curve(lengths: ArrayLike, norms: ArrayLike, n: int | None) -> tuple[NDArray[np.int64], Floats]:
    n = None if n is None else _whole(n, "n")
    x, value = np.asarray(lengths), np.asarray(norms)
    if value.dtype.kind not in "biuf":
        raise StudyError(f"norms must be numbers, not {value.dtype}")
    value = value.astype(np.float64)
    if x.ndim != 1 or x.shape != value.shape or not len(x) or x.dtype.kind not in "iu":
        raise StudyError(
            f"lengths and norms must be two rows of one length, whole numbers and numbers, not {x.dtype} "
            f"{list(x.shape)} and {list(value.shape)}"
        )
    x = x.astype(np.int64)
    wrong = x[(x < 0) | (x > n)] if n is not None else x[x < 0]
    if len(wrong):
        raise StudyError(f"there is no path of length {wrong[0]} through {n} blocks")
    found, times = np.unique(x, return_counts=True)
    if (times > 1).any():
        raise StudyError(f"length {found[times > 1][0]} is given {times[times > 1][0]} times; give its mean norm once")
    if not np.isfinite(value).all() or (value < 0).any():
        bad = value[~np.isfinite(value) | (value < 0)][0]
        raise StudyError(f"a mean norm is {bad}, but norms are finite and at least 0")
    return x, value
