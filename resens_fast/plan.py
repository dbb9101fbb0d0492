"""A plan: a sweep compiled for execution, as the prefix trie of its words and the two schedules drawn from it.

The planner is csrc/planner.cpp; planner_py.py draws the same plans when the extension is missing.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from . import extension, planner_py
from .errors import PlanError, SweepError
from .planner_py import HEAD, RESTORE, RUN, SAVE, SHORTCUT
from .structure import Structure

if TYPE_CHECKING:
    from .network import ResidualNetwork
    from .sweep import Sweep

__all__ = ["HEAD", "RESTORE", "RUN", "SAVE", "SHORTCUT", "Levels", "Plan", "Tape", "plan"]

_NAMES = {SAVE: "SAVE", RESTORE: "RESTORE", RUN: "RUN", SHORTCUT: "SHORTCUT", HEAD: "HEAD"}


class Tape(NamedTuple):
    """The depth-first schedule. instructions: int32 [T, 2] (op, argument); gates: float32 [T], 0 where nothing runs.

    The state is the stem's output at first. ``SAVE slot`` copies the state, ``RESTORE slot`` brings it back,
    ``RUN block`` and ``SHORTCUT block`` advance it, ``HEAD word`` reads it. Slots are numbered from 0 to slots - 1.
    """

    instructions: NDArray[np.int32]
    gates: NDArray[np.float32]
    slots: int


class Levels(NamedTuple):
    """The breadth-first schedule. steps: int32 [N, 5] (op, block or word, source, destination, level); gates: float32
    [N].

    Buffer 0 holds the stem's output at first. In a level the steps stand grouped by (op, block), HEADs last; no RUN or
    SHORTCUT reads a buffer that its level writes, HEADs read what their level has written. Buffers are numbered from 0
    to buffers - 1, levels from 0 to levels - 1.
    """

    steps: NDArray[np.int32]
    gates: NDArray[np.float32]
    buffers: int
    levels: int


class _Trie(Protocol):
    """What ``resens_fast._C.Trie`` and ``planner_py.Trie`` have in common."""

    @property
    def requested_runs(self) -> int: ...
    @property
    def executed_runs(self) -> int: ...
    @property
    def words(self) -> int: ...
    @property
    def word_of(self) -> NDArray[np.int64]: ...
    def tape(self) -> tuple[NDArray[np.int32], NDArray[np.float32], int]: ...
    def levels(self, budget: int) -> tuple[NDArray[np.int32], NDArray[np.float32], int, int]: ...
    def least_budget(self) -> int: ...


class Plan:
    """A sweep compiled for execution; make one with ``resens_fast.plan(net, sweep)``.

    Configurations with equal letters are one word: it is computed once and reported for each of them.

    Attributes: ``sweep``; ``structure``; ``words``, the number of unique words; ``word_of``, int64 [C], the word of
    each configuration (words are numbered in order of first appearance); ``requested_runs``, the block runs that the
    configurations ask for one by one; ``executed_runs``, those left when common prefixes run once.
    """

    def __init__(self, sweep: Sweep, trie: _Trie) -> None:
        self.sweep = sweep
        self.structure: Structure = sweep.structure
        self.words = trie.words
        self.word_of = trie.word_of
        self.requested_runs = trie.requested_runs
        self.executed_runs = trie.executed_runs
        self._trie = trie
        self._tape: Tape | None = None

    def tape(self) -> Tape:
        """The depth-first schedule: one state and at most log2(words) slots. Drawn once; treat it as read-only."""
        if self._tape is None:
            self._tape = Tape(*self._trie.tape())
        return self._tape

    @property
    def slots(self) -> int:
        """How many states the tape keeps at a time, besides the one in progress."""
        return self.tape().slots

    def levels(self, budget: int) -> Levels:
        """The breadth-first schedule with at most ``budget`` state buffers, the one in progress included.

        Sub-tries that fit run breadth-first, so that all their states that need the same block form one batch; around
        them the schedule is depth-first. Raises PlanError when the budget is below ``least_budget``.
        """
        try:
            return Levels(*self._trie.levels(int(budget)))
        except ValueError as error:
            raise PlanError(str(error)) from None

    @property
    def least_budget(self) -> int:
        """The smallest budget that ``levels`` accepts."""
        return self._trie.least_budget()

    def state_bytes(self, batch: int, dtype: torch.dtype) -> int:
        """Bytes that the tape's slots and the state in progress take for ``batch`` images at the largest shape."""
        shapes = (*self.structure.shapes_in, *self.structure.shapes_out)
        return (self.slots + 1) * batch * max((prod(shape) for shape in shapes), default=0) * dtype.itemsize

    def summary(self) -> str:
        """One line: what was asked for, what is left to do, and the float32 states an image needs at a time."""
        runs = f"{self.requested_runs:,} block runs asked for, {self.executed_runs:,} executed"
        if self.executed_runs:
            runs += f" ({self.requested_runs / self.executed_runs:.2f}x shared)"
        what = f"{len(self.word_of):,} configurations of {len(self.structure)} blocks, {self.words:,} unique"
        slots = f"{self.slots} {'slot' if self.slots == 1 else 'slots'}"
        return f"{what}: {runs}, {slots}, {self.state_bytes(1, torch.float32) / 2**10:,.0f} KiB of states an image"

    def __repr__(self) -> str:
        return f"Plan({self.summary()})"

    def __str__(self) -> str:
        return self.listing()

    def listing(self, most: int = 60) -> str:
        """The summary and the tape, one instruction a line, indented by the slots in use; all but ``most`` left out."""
        tape = self.tape()
        length = len(tape.instructions)
        head = length if length <= most else max(1, most * 2 // 3)
        tail = 0 if length <= most else most - head
        lines = [self.summary()]
        lines += self._lines(tape, 0, head)
        if head + tail < length:
            lines.append(f"{'...':>8}  {length - head - tail:,} more instructions")
        return "\n".join(lines + self._lines(tape, length - tail, length))

    def _lines(self, tape: Tape, first: int, end: int) -> list[str]:
        lines = []
        depth = 0
        rows = tape.instructions[first:end].tolist()
        if first:  # the depth here is one more than the next slot that is read, unless that slot is written before
            depth = next((arg + (op == RESTORE) for op, arg in rows if op in (SAVE, RESTORE)), 0)
        for index, (op, arg) in enumerate(rows, first):
            if op == RESTORE:
                depth = arg + 1
            text = f"{'  ' * depth}{_NAMES[op]} {arg}"
            if op in (RUN, SHORTCUT):
                text += f" {self.structure.names[arg]}"
                if op == RUN and tape.gates[index] != 1:
                    text += f" x {tape.gates[index]:g}"
            lines.append(f"{index:>8}  {text}")
            if op == SAVE:
                depth = arg + 1
        return lines


def plan(net: ResidualNetwork | Structure, sweep: Sweep) -> Plan:
    """Compile a sweep of this network: build the prefix trie of its words.

    Raises SweepError when the sweep belongs to another network. Uses the compiled planner where there is one
    (``resens_fast.extension.reason()`` says why not) and plain Python with the same results elsewhere.
    """
    structure = net if isinstance(net, Structure) else net.structure
    check_sweep(structure, sweep)
    native = extension.module()
    make = native.Trie if native is not None else planner_py.Trie
    try:
        return Plan(sweep, make(*sweep.words(), len(structure)))
    except ValueError as error:
        raise PlanError(str(error)) from None


def check_sweep(structure: Structure, sweep: Sweep) -> None:
    """SweepError unless it is a sweep of the network with this structure."""
    if not hasattr(sweep, "structure"):
        raise SweepError(f"a sweep is needed, not {type(sweep).__name__}; build one with resens_fast.sweeps")
    if sweep.structure != structure:
        raise SweepError(
            f"this sweep is of a network with {len(sweep.structure)} blocks and digest {sweep.structure.digest[:8]}, "
            f"but the network has {len(structure)} blocks and digest {structure.digest[:8]}; build the sweep from it"
        )
