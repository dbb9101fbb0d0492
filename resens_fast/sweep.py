"""A sweep: many configurations of one network, with the columns that describe them; `sweeps` builds them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from .errors import SweepError
from .structure import Structure

if TYPE_CHECKING:
    import pandas as pd


class Configuration(NamedTuple):
    """One variant of a network: ``order[p]`` is the block that runs at position p, ``gates[j]`` the gate of block j
    (0 deletes it).
    """

    order: tuple[int, ...]
    gates: tuple[float, ...]


class Words(NamedTuple):
    """The letters of every configuration, one after another; configuration c owns ``[offsets[c], offsets[c + 1])``.

    offsets int64 [C + 1]; blocks int32 [L]; gates float32 [L] (0 means only the shortcut runs); positions int32 [L]
    (place in the network).
    """

    offsets: NDArray[np.int64]
    blocks: NDArray[np.int32]
    gates: NDArray[np.float32]
    positions: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Sweep:
    """Configurations of one network, in the order in which they are reported.

    orders: int16 [C, n], row c is the block at each position. gates: float32 [C, n], column j is the gate of block j
    wherever it stands. kind, k: how each configuration came about, and how many blocks it deletes or pairs it swaps.
    """

    structure: Structure
    orders: NDArray[np.int16]
    gates: NDArray[np.float32]
    kind: tuple[str, ...]
    k: NDArray[np.int64]

    def __post_init__(self) -> None:
        if len(self.orders) == 0:
            raise SweepError("the sweep has no configurations; give at least one")

    def __len__(self) -> int:
        return len(self.orders)

    @overload
    def __getitem__(self, index: int) -> Configuration: ...
    @overload
    def __getitem__(self, index: slice) -> Sweep: ...

    def __getitem__(self, index: int | slice) -> Configuration | Sweep:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"configuration {index} of a sweep of {len(self)}")
        return Configuration(tuple(self.orders[index].tolist()), tuple(self.gates[index].tolist()))

    def __iter__(self) -> Iterator[Configuration]:
        return (self[i] for i in range(len(self)))

    def take(self, rows: NDArray[np.int64]) -> Sweep:
        """The configurations at ``rows``, int [M], in that order."""
        kind = tuple(self.kind[row] for row in rows)
        return Sweep(self.structure, self.orders[rows], self.gates[rows], kind, self.k[rows])

    def __add__(self, other: Sweep) -> Sweep:
        if not isinstance(other, Sweep):
            return NotImplemented
        if other.structure != self.structure:
            raise SweepError(
                f"cannot add a sweep of another network ({_describe(other.structure)}) to one of "
                f"{_describe(self.structure)}"
            )
        return Sweep(
            self.structure,
            np.concatenate([self.orders, other.orders]),
            np.concatenate([self.gates, other.gates]),
            self.kind + other.kind,
            np.concatenate([self.k, other.k]),
        )

    def __repr__(self) -> str:
        kinds = ", ".join(f"{self.kind.count(kind)} {kind}" for kind in dict.fromkeys(self.kind))
        return f"Sweep({len(self)} configurations of {len(self.structure)} blocks: {kinds})"

    @property
    def digest(self) -> str:
        """SHA-256 over the structure and every configuration; equal sweeps have equal digests."""
        h = hashlib.sha256(self.structure.digest.encode())
        for part in (self.orders.astype("<i2"), self.gates.astype("<f4"), self.k.astype("<i8")):
            h.update(part.tobytes())
        h.update("\0".join(self.kind).encode())
        return h.hexdigest()

    def words(self) -> Words:
        """The sweep as the planner sees it; a deleted block that leaves the state as it is has no letter."""
        orders = self.orders.astype(np.int64)
        gates = np.take_along_axis(self.gates, orders, axis=1)
        runs = ~((gates == 0) & np.asarray(self.structure.drops, dtype=bool)[orders])
        offsets = np.zeros(len(self) + 1, dtype=np.int64)
        np.cumsum(runs.sum(axis=1), out=offsets[1:])
        positions = np.broadcast_to(np.arange(orders.shape[1], dtype=np.int32), orders.shape)
        return Words(offsets, orders[runs].astype(np.int32), gates[runs], positions[runs])

    @property
    def tau(self) -> NDArray[np.float64]:
        """Kendall's tau between each configuration's order and the network's own, as ``scipy.stats.kendalltau`` gives
        it; float64 [C].
        """
        n = self.orders.shape[1]
        if n < 2:
            return np.full(len(self), np.nan)
        tau = np.ones(len(self))
        moved = np.flatnonzero((self.orders != np.arange(n)).any(axis=1))
        upper = np.triu(np.ones((n, n), dtype=bool), 1)
        chunk = max(1, 2**25 // (n * n))
        for start in range(0, len(moved), chunk):
            rows = moved[start : start + chunk]
            orders = self.orders[rows]
            inversions = ((orders[:, :, None] > orders[:, None, :]) & upper).sum(axis=(1, 2))
            tau[rows] = 1 - 4 * inversions / (n * (n - 1))
        return tau

    @property
    def frame(self) -> pd.DataFrame:
        """One row per configuration: configuration, kind, k, deleted, order, tau, transition (a transition block is
        deleted).

        Sweeps with gates other than 0 and 1 also have a column ``gates``.
        """
        import pandas as pd

        deleted = [tuple(np.flatnonzero(row).tolist()) for row in self.gates == 0]
        columns: dict[str, Any] = {
            "configuration": np.arange(len(self)),
            "kind": list(self.kind),
            "k": self.k,
            "deleted": pd.Series(deleted, dtype=object),
            "order": pd.Series([tuple(row) for row in self.orders.tolist()], dtype=object),
            "tau": self.tau,
            "transition": ((self.gates == 0) & np.asarray(self.structure.transitions, dtype=bool)).any(axis=1),
        }
        if ((self.gates != 0) & (self.gates != 1)).any():
            columns["gates"] = pd.Series([tuple(row) for row in self.gates.tolist()], dtype=object)
        return pd.DataFrame(columns)


def _describe(structure: Structure) -> str:
    return f"{len(structure)} blocks, {structure.digest[:8]}"
