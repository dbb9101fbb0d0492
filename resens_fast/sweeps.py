"""Sweeps: many configurations of one network, with the columns that describe them.

Random draws come from numpy's legacy ``RandomState``, whose stream of doubles is frozen: the same seed gives the same
draws on every version and machine. Every ``k`` has a stream of its own, so adding further values of ``k`` or more
samples does not change the draws already made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import SweepError
from .structure import Structure
from .sweep import Sweep

if TYPE_CHECKING:
    from .network import ResidualNetwork

    Network: TypeAlias = ResidualNetwork | Structure

_DELETE_STREAM, _SWAP_STREAM, _PATH_STREAM = 0, 1, 2


def _structure(net: Network) -> Structure:
    if isinstance(net, Structure):
        return net
    structure = getattr(net, "structure", None)
    if not isinstance(structure, Structure):
        raise SweepError(
            f"a sweep needs a wrapped network, not {type(net).__name__}; call resens_fast.wrap(model) first"
        )
    return structure


def _name(structure: Structure, block: int) -> str:
    return f"{block} ({structure.names[block]})"


def _build(structure: Structure, orders: Any, gates: Any, kind: str, k: Any) -> Sweep:
    """Check and normalise: every constructor ends here."""
    n = len(structure)
    orders = np.ascontiguousarray(orders, dtype=np.int16).reshape(-1, n)
    gates = np.ascontiguousarray(gates, dtype=np.float32).reshape(-1, n) + np.float32(0)  # -0.0 becomes 0.0
    for c, block in np.argwhere((gates == 0) & ~np.asarray(structure.deletable, dtype=bool)):
        raise SweepError(
            f"configuration {c} deletes block {_name(structure, block)}, which cannot be deleted: it has no "
            "shortcut and turns "
            f"{structure.shapes_in[block]} into {structure.shapes_out[block]}"
        )
    odd = (gates != 0) & (gates != 1) & ~np.asarray(structure.gateable, dtype=bool)
    for c, block in np.argwhere(odd):
        raise SweepError(
            f"configuration {c} gives block {_name(structure, block)} the gate {gates[c, block]:g}, but a plain "
            "block has no shortcut: use 0 or 1"
        )
    count = np.broadcast_to(np.asarray(k, dtype=np.int64), (len(orders),)).copy()
    return Sweep(structure, orders, gates, (kind,) * len(orders), count)


def _identity(structure: Structure, configurations: int) -> NDArray[np.int16]:
    return np.tile(np.arange(len(structure), dtype=np.int16), (configurations, 1))


def _delete(structure: Structure, subsets: Sequence[Sequence[int]], k: Any) -> Sweep:
    gates = np.ones((len(subsets), len(structure)), dtype=np.float32)
    for row, subset in zip(gates, subsets, strict=True):
        row[list(subset)] = 0
    return _build(structure, _identity(structure, len(subsets)), gates, "delete", k)


def intact(net: Network) -> Sweep:
    """The network as it is: one configuration."""
    structure = _structure(net)
    return _build(structure, _identity(structure, 1), np.ones((1, len(structure))), "intact", 0)


def single(net: Network) -> Sweep:
    """Delete each block on its own: one configuration per deletable block (Veit et al. 2016, figure 3)."""
    structure = _structure(net)
    return _delete(structure, [(i,) for i in _candidates(structure, True)], 1)


def pairs(net: Network) -> Sweep:
    """Delete every pair of blocks: m (m - 1) / 2 configurations for m deletable blocks."""
    structure = _structure(net)
    subsets = list(combinations(_candidates(structure, True), 2))
    if not subsets:
        raise SweepError(
            f"pairs needs at least two blocks that can be deleted; this network has {sum(structure.deletable)}"
        )
    return _delete(structure, subsets, 2)


def delete_random(
    net: Network, k: int | Iterable[int], samples: int = 50, seed: int = 0, transitions: bool = True
) -> Sweep:
    """Delete ``k`` blocks drawn uniformly without replacement, ``samples`` times for each k (Veit et al. 2016, figure
    5a).

    transitions: whether transition blocks may be drawn (as in the paper). The draws for one k do not depend on the
    other ks. Raises SweepError when k exceeds the number of blocks that can be deleted.
    """
    structure = _structure(net)
    candidates = np.asarray(_candidates(structure, transitions), dtype=np.int64)
    ks = _counts(k, "k")
    for count in ks:
        if count > len(candidates):
            which = "deletable blocks" if transitions else "deletable blocks outside transitions"
            raise SweepError(f"cannot delete k = {count} blocks: the network has {len(candidates)} {which}; lower k")
    samples, seed = _positive(samples, "samples"), _seed(seed)
    subsets: list[list[int]] = []
    for count in ks:
        draws = np.random.RandomState([seed, _DELETE_STREAM, count]).random_sample((samples, len(candidates)))
        subsets += np.sort(candidates[draws.argsort(axis=1, kind="stable")[:, :count]], axis=1).tolist()
    return _delete(structure, subsets, np.repeat(ks, samples))


def swap_random(net: Network, k: int | Iterable[int], samples: int = 50, seed: int = 0) -> Sweep:
    """Swap ``k`` pairs: k successive transpositions of positions of equal shape, drawn uniformly, ``samples`` times
    for each k (figure 5b).

    Transition blocks stay where they are. Raises SweepError when no two blocks have the same shape.
    """
    structure = _structure(net)
    choices = np.asarray(
        [pair for pair in combinations(range(len(structure)), 2) if structure.exchangeable(*pair)], dtype=np.int64
    )
    ks = _counts(k, "k")
    if len(choices) == 0:
        raise SweepError("no two blocks of this network have the same shape, so none can be swapped")
    samples, seed = _positive(samples, "samples"), _seed(seed)
    orders = _identity(structure, len(ks) * samples)
    rows = iter(orders)
    for count in ks:
        draws = np.random.RandomState([seed, _SWAP_STREAM, count]).random_sample((samples, count))
        for picks in (draws * len(choices)).astype(np.int64):
            order = next(rows)
            for p, q in choices[picks]:
                order[p], order[q] = order[q], order[p]
    return _build(structure, orders, np.ones(orders.shape), "swap", np.repeat(ks, samples))


def paths(net: Network, lengths: int | Iterable[int] | None = None, samples: int = 100, seed: int = 0) -> Sweep:
    """Paths that enter ``k`` blocks drawn uniformly, ``samples`` times for each length k (figure 6b); k counts entered
    blocks, whose gate is 1.

    A length that has no more than ``samples`` paths takes every one of them once, so that its mean is exact. lengths:
    all of them, 0 included, when None; one that is named twice is drawn once. Blocks without a shortcut belong to
    every path and do not count. Raises SweepError for a length that the network does not have.
    """
    structure = _structure(net)
    candidates = np.flatnonzero(structure.choosable)
    n = len(candidates)
    if n == 0:
        raise SweepError("no block of this network has a shortcut, so only one path leads through it")
    ks = list(dict.fromkeys(_counts(range(n + 1) if lengths is None else lengths, "lengths")))
    samples, seed = _positive(samples, "samples"), _seed(seed)
    rows: list[NDArray[np.int64]] = []
    for count in ks:
        if count > n:
            raise SweepError(f"there is no path of length {count}: {n} blocks can be entered; give 0 to {n}")
        if comb(n, count) <= samples:
            chosen = np.array(list(combinations(range(n), count)), dtype=np.int64)
        else:
            draws = np.random.RandomState([seed, _PATH_STREAM, count]).random_sample((samples, n))
            chosen = draws.argsort(axis=1, kind="stable")[:, :count]
        rows.append(chosen.reshape(len(chosen), count))
    gates = np.ones((sum(map(len, rows)), len(structure)), dtype=np.float32)
    gates[:, candidates] = 0
    begin = 0
    for chosen in rows:
        gates[np.arange(begin, begin + len(chosen))[:, None], candidates[chosen]] = 1
        begin += len(chosen)
    return _build(structure, _identity(structure, begin), gates, "path", np.repeat(ks, [len(c) for c in rows]))


def from_masks(net: Network, masks: ArrayLike) -> Sweep:
    """One configuration per row of ``masks``: bool [C, n], True keeps the block."""
    structure = _structure(net)
    array = _rows(structure, masks, "masks")
    if array.dtype != np.bool_ and not np.isin(array, (0, 1)).all():
        bad = array[~np.isin(array, (0, 1))].flat[0]
        raise SweepError(
            f"masks hold the value {bad}; a mask is True (keep) or False (delete); for other values use from_gates"
        )
    array = array.astype(bool)
    return _build(structure, _identity(structure, len(array)), array, "mask", (~array).sum(axis=1))


def from_orders(net: Network, orders: ArrayLike) -> Sweep:
    """One configuration per row of ``orders``: int [C, n], the block that runs at each position; blocks move among
    equal shapes only.
    """
    structure = _structure(net)
    array = _orders(structure, orders)
    return _build(structure, array, np.ones(array.shape), "order", 0)


def from_gates(net: Network, gates: ArrayLike) -> Sweep:
    """One configuration per row of ``gates``: float [C, n], column j scales the branch of block j; 0 deletes it."""
    structure = _structure(net)
    array = _gates(structure, gates)
    return _build(structure, _identity(structure, len(array)), array, "gate", (array == 0).sum(axis=1))


def from_words(net: Network, orders: ArrayLike, gates: ArrayLike) -> Sweep:
    """Masked, scaled and permuted at once: int [C, n] orders with float [C, n] gates, column j of which belongs to
    block j wherever it stands.
    """
    structure = _structure(net)
    order_rows, gate_rows = _orders(structure, orders), _gates(structure, gates)
    if len(order_rows) != len(gate_rows):
        raise SweepError(f"orders has {len(order_rows)} rows and gates has {len(gate_rows)}; they must be equal")
    return _build(structure, order_rows, gate_rows, "word", (gate_rows == 0).sum(axis=1))


def _candidates(structure: Structure, transitions: bool) -> list[int]:
    found = [
        i for i in range(len(structure)) if structure.deletable[i] and (transitions or not structure.transitions[i])
    ]
    if not found:
        raise SweepError("no block of this network can be deleted: none has a shortcut or keeps its input's shape")
    return found


def _counts(k: int | Iterable[int], name: str) -> list[int]:
    k = k.tolist() if hasattr(k, "tolist") else k  # an array or a tensor
    values = list(k) if isinstance(k, Iterable) else [k]
    if not values:
        raise SweepError(f"{name} is empty; give a number or several")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
            raise SweepError(f"{name} must be whole numbers of at least 0, not {value!r}")
    return [int(v) for v in values]


def _positive(value: int, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise SweepError(f"{name} must be a whole number of at least 1, not {value!r}")
    return int(value)


def _seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
        raise SweepError(f"seed must be a whole number from 0 to 2**32 - 1, not {seed!r}")
    return int(seed)


def _rows(structure: Structure, values: ArrayLike, name: str) -> NDArray[Any]:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise SweepError(f"{name} must be a rectangular array [configurations, {len(structure)}]: {error}") from None
    if array.ndim == 1 and array.size:
        array = array[None]
    if array.ndim != 2 or array.shape[1] != len(structure):
        raise SweepError(
            f"{name} must have the shape [configurations, {len(structure)}] (one column per block), not "
            f"{list(array.shape)}"
        )
    if array.dtype == object or array.dtype.kind not in "biuf":
        raise SweepError(f"{name} must hold numbers, not {array.dtype}")
    return array


def _orders(structure: Structure, orders: ArrayLike) -> NDArray[np.int64]:
    array = _rows(structure, orders, "orders")
    n = len(structure)
    if array.dtype.kind not in "iu":
        raise SweepError(f"orders must hold whole numbers, not {array.dtype}")
    array = array.astype(np.int64)
    for c in np.flatnonzero((np.sort(array, axis=1) != np.arange(n)).any(axis=1))[:1]:
        row = array[c].tolist()
        wrong = next((v for i, v in enumerate(row) if not 0 <= v < n or v in row[:i]), row)
        raise SweepError(f"order {c} must name each block 0 to {n - 1} once; {wrong} is repeated or out of range")
    for c, p in np.argwhere(array != np.arange(n)):
        block = int(array[c, p])
        if not structure.exchangeable(int(p), block):
            raise SweepError(
                f"order {c} puts block {_name(structure, block)} at position {p}, but blocks move only among "
                "equal shapes and transitions "
                f"stay: it turns {structure.shapes_in[block]} into {structure.shapes_out[block]}, position {p} "
                f"turns {structure.shapes_in[p]} into {structure.shapes_out[p]}"
            )
    return array


def _gates(structure: Structure, gates: ArrayLike) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        array = _rows(structure, gates, "gates").astype(np.float32)
    for c, block in np.argwhere(~np.isfinite(array)):
        raise SweepError(
            f"configuration {c} gives block {_name(structure, block)} the gate {array[c, block]}; gates must be "
            "finite in float32"
        )
    return array
