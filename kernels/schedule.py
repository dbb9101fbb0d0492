"""From the plan's levels to launches: which rows of the table each kernel call serves.

A level is cut by what its steps are compiled to (RUN, SHORTCUT or HEAD, and the group of the block) and then into
pieces whose intermediate images fit the scratch area. Pieces of one level do not depend on one another, except that
HEADs come last; the launches of a stream run in order anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..plan import HEAD, RUN, SHORTCUT
from .pack import Packed, width

if TYPE_CHECKING:
    from ..plan import Levels


@dataclass(frozen=True)
class Launch:
    """`count` steps from row `first` on, all of one operation and, but for heads, one group of blocks."""

    op: int
    group: int
    first: int
    count: int


@dataclass(frozen=True)
class Schedule:
    launches: tuple[Launch, ...]
    steps: torch.Tensor
    """int32 [steps, 3]: source, destination, slot (of a HEAD: source, -1, word)"""
    gates: torch.Tensor
    """float32 [steps]"""
    buffers: int
    scratch: tuple[int, int]
    """Elements of the two scratch areas, for so many images as the schedule was made for."""
    means: int
    """float32 elements of the pooled states, likewise"""


def step_elements(packed: Packed, op: int, group: int) -> tuple[int, int]:
    """What one step writes for each image into the two scratch areas, which the convolutions of a block alternate
    between.
    """
    if op != RUN:
        return 0, 0
    inner = [shape.out_elements for shape in packed.groups[group].shape.convs[:-1]]
    return max(inner[0::2], default=0), max(inner[1::2], default=0)


def schedule(packed: Packed, levels: Levels, batch: int, scratch_bytes: int) -> Schedule:
    """Launches for batches of up to `batch` images; a piece has at least one step, whatever the scratch area."""
    steps = levels.steps.astype(np.int64)
    heads = steps[:, 0] == HEAD
    table = np.array([packed.slot_of[block] for block in range(len(packed.slot_of))], dtype=np.int64)
    place = np.zeros((len(steps), 2), dtype=np.int64)
    place[~heads] = table[steps[~heads, 1]]
    place[heads, 1] = steps[heads, 1]
    order = np.lexsort((place[:, 1], place[:, 0], steps[:, 0], steps[:, 4]))
    steps, place = steps[order], place[order]
    change = np.flatnonzero((np.diff(steps[:, [4, 0]], axis=0) != 0).any(axis=1) | (np.diff(place[:, 0]) != 0)) + 1
    bounds = [0, *change.tolist(), len(steps)]
    launches, scratch, means = [], [0, 0], 0
    for begin, end in pairwise(bounds):
        op, group = int(steps[begin, 0]), int(place[begin, 0])
        each = step_elements(packed, op, group)
        size = batch * sum(each) * packed.dtype.itemsize if op == RUN else batch * width(packed.head.channels) * 4
        most = max(1, scratch_bytes // max(1, size)) if op != SHORTCUT else end - begin
        for first in range(begin, end, most):
            count = min(most, end - first)
            launches.append(Launch(op, group, first, count))
            scratch = [max(old, count * batch * new) for old, new in zip(scratch, each, strict=True)]
            if op == HEAD:
                means = max(means, count * batch * width(packed.head.channels))
    rows = np.stack([steps[:, 2], steps[:, 3], place[:, 1]], axis=1).astype(np.int32)
    return Schedule(
        tuple(launches),
        torch.from_numpy(rows).to(packed.device),
        torch.from_numpy(levels.gates[order].astype(np.float32)).to(packed.device),
        levels.buffers,
        (scratch[0], scratch[1]),
        means,
    )
