"""The planner in plain Python: the same plans as csrc/planner.cpp and csrc/levels.cpp, 25 to 100 times slower.

It stands in when the extension is missing, and tests compare the two instruction by instruction. The reasons behind the
schedules are written down in the C++ files; here is only what they do.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

SAVE, RESTORE, RUN, SHORTCUT, HEAD = range(5)
Ints = NDArray[np.int32]
Floats = NDArray[np.float32]


def _check(offsets: NDArray[np.int64], blocks: Ints, gates: Floats, positions: Ints, alphabet: int) -> None:
    if len(offsets) < 2:
        raise ValueError("a plan needs at least one configuration, but the sweep has none")
    if offsets[0] != 0:
        raise ValueError(f"the first word offset is {offsets[0]}, but it must be 0")
    for c in np.flatnonzero(np.diff(offsets) < 0)[:1]:
        raise ValueError(f"word offsets must not fall, but offset {c + 1} is {offsets[c + 1]} after {offsets[c]}")
    if offsets[-1] != len(blocks):
        raise ValueError(f"the last word offset is {offsets[-1]}, but there are {len(blocks)} letters")
    for i in np.flatnonzero((blocks < 0) | (blocks >= alphabet))[:1]:
        raise ValueError(f"letter {i} names block {blocks[i]}, but the network has {alphabet} blocks")
    for i in np.flatnonzero((positions < 0) | (positions >= alphabet))[:1]:
        raise ValueError(f"letter {i} stands at position {positions[i]}, but the network has {alphabet} blocks")
    for i in np.flatnonzero(np.isnan(gates))[:1]:
        raise ValueError(f"letter {i} has a gate that is not a number")


class Trie:
    """The prefix trie of a sweep's words; nodes stand in preorder, see csrc/planner.h.

    offsets int64 [C + 1], blocks int32 [L], gates float32 [L], positions int32 [L]; `alphabet` is the number of blocks.
    Raises ValueError when the arrays contradict each other.
    """

    def __init__(self, offsets: NDArray[np.int64], blocks: Ints, gates: Floats, positions: Ints, alphabet: int) -> None:
        gates = np.where(gates == 0, np.float32(0), gates).astype(np.float32)  # -0 and 0 are the same letter
        _check(offsets, blocks, gates, positions, alphabet)
        bits = gates.view(np.uint32)
        keys = list(zip(blocks.tolist(), bits.tolist(), strict=True))
        bounds = offsets.tolist()
        texts = [keys[begin:end] for begin, end in pairwise(bounds)]
        order = sorted(range(len(texts)), key=texts.__getitem__)  # stable: the first of equal words names them
        self.requested_runs = int(np.count_nonzero(bits))
        self.executed_runs = 0
        self.parent, self.block, self.position, self.word = [-1], [-1], [-1], [-1]
        self.gate: list[float] = [0.0]
        place, value = positions.tolist(), gates.tolist()
        path = [0]
        first_of: list[int] = []
        sorted_word = [0] * len(texts)
        before: list[tuple[int, int]] = []
        for c in order:
            text, begin = texts[c], bounds[c]
            shared = 0
            while shared < min(len(text), len(before)) and before[shared] == text[shared]:
                node = path[shared + 1]
                self.position[node] = min(self.position[node], place[begin + shared])
                shared += 1
            del path[shared + 1 :]
            for i in range(shared, len(text)):
                self.parent.append(path[-1])
                self.block.append(text[i][0])
                self.gate.append(value[begin + i])
                self.position.append(place[begin + i])
                self.word.append(-1)
                path.append(len(self.parent) - 1)
                self.executed_runs += text[i][1] != 0
            if self.word[path[-1]] < 0:
                self.word[path[-1]] = len(first_of)
                first_of.append(c)
            sorted_word[c] = self.word[path[-1]]
            before = text
        self.words = len(first_of)
        rename = {old: new for new, old in enumerate(sorted(range(self.words), key=first_of.__getitem__))}
        self.word_of = np.array([rename[w] for w in sorted_word], dtype=np.int64)
        count = len(self.parent)
        self.size, self.weight = [1] * count, [0] * count
        self.children: list[list[int]] = [[] for _ in range(count)]
        for v in range(1, count):
            self.children[self.parent[v]].append(v)
        for v in range(count - 1, -1, -1):
            if self.word[v] >= 0:
                self.word[v] = rename[self.word[v]]
                self.weight[v] += 1
            if v:
                self.size[self.parent[v]] += self.size[v]
                self.weight[self.parent[v]] += self.weight[v]

    def op(self, node: int) -> int:
        """RUN or SHORTCUT."""
        return SHORTCUT if self.gate[node] == 0 else RUN

    def tape(self) -> tuple[Ints, Floats, int]:
        """Instructions [T, 2], gates [T] and the number of slots."""
        rows: list[tuple[int, int]] = []
        gates: list[float] = []
        slots = 0
        frames: list[list[int]] = []  # the children that are still to come, the next one last

        def emit(op: int, arg: int, gate: float = 0.0) -> None:
            rows.append((op, arg))
            gates.append(gate)

        v = 0
        while True:
            if v:
                emit(self.op(v), self.block[v], self.gate[v])
            if self.word[v] >= 0:
                emit(HEAD, self.word[v])
            below = self.children[v]
            if len(below) == 1:
                v = below[0]
                continue
            if below:
                heavy = max(below, key=lambda c: (self.weight[c], c))
                emit(SAVE, len(frames))
                frames.append([heavy, *(c for c in reversed(below) if c != heavy)])
                slots = max(slots, len(frames))
            elif frames:
                emit(RESTORE, len(frames) - 1)
            else:
                break
            v = frames[-1].pop()
            if not frames[-1]:
                frames.pop()
        return np.array(rows, dtype=np.int32).reshape(-1, 2), np.array(gates, dtype=np.float32), slots

    def least_budget(self) -> int:
        """The smallest budget that `levels` accepts."""
        return _needs(self)[0][0]

    def levels(self, budget: int) -> tuple[Ints, Floats, int, int]:
        """Steps [N, 5], gates [N], the number of buffers and of levels; ValueError when the budget is too small."""
        least = self.least_budget()
        if budget < least:
            raise ValueError(
                f"a budget of {budget} state buffers is too small for this plan; it needs at least {least}"
            )
        return _Scheduler(self, budget).draw()


def _needs(trie: Trie) -> tuple[list[int], list[int]]:
    """For each node the buffers its sub-trie needs at least, and the child that must come last for that (-1: none)."""
    count = len(trie.parent)
    least, heavy, second = [1] * count, [-1] * count, [0] * count
    for v in range(count - 1, -1, -1):
        if heavy[v] >= 0:
            least[v] = max(2, least[heavy[v]], second[v] + 1)
        if v == 0:
            break
        p = trie.parent[v]
        best = heavy[p]
        if best < 0 or (least[v], trie.weight[v]) > (least[best], trie.weight[best]):
            if best >= 0:
                second[p] = max(second[p], least[best])
            heavy[p] = v
        else:
            second[p] = max(second[p], least[v])
    return least, heavy


class _Scheduler:
    """Draws the level schedule; see csrc/levels.cpp, which this follows name by name."""

    def __init__(self, trie: Trie, budget: int) -> None:
        self.trie, self.budget = trie, budget
        self.heavy = _needs(trie)[1]
        count = len(trie.parent)
        self.level, self.pending, self.buffer = [0] * count, [len(c) for c in trie.children], [-1] * count
        for v in range(1, count):
            self.level[v] = max(trie.position[v] + 1, self.level[trie.parent[v]] + 1)
        self.last = [max([self.level[v], *(self.level[c] for c in trie.children[v])]) for v in range(count)]
        self.end = max(self.level)
        self.change = np.zeros(self.end + 2, dtype=np.int64)
        self.group: list[int] = []
        self.free: list[int] = []
        self.fresh = self.now = 0
        self.rows: list[tuple[int, int, int, int, int]] = []
        self.gates: list[float] = []

    def draw(self) -> tuple[Ints, Floats, int, int]:
        self.buffer[0] = self.take()
        if self.trie.word[0] >= 0:
            self.head(0)
            self.now += 1
        self.count(0, len(self.level))
        if self.peak() <= self.budget:
            self.group = list(range(1, len(self.level)))
            self.flush()
        else:
            self.descend(0, self.budget)
        steps = np.array(self.rows, dtype=np.int32).reshape(-1, 5)
        return steps, np.array(self.gates, dtype=np.float32), self.fresh, self.now

    def descend(self, v: int, allowed: int) -> None:
        trie = self.trie
        self.begin(v)
        path = v
        while True:
            busy_until = self.level[path]
            lights = (c for c in trie.children[path] if c != self.heavy[path])
            for c in sorted(lights, key=lambda c: -trie.size[c]):
                end = c + trie.size[c]
                self.count(c, end)
                if self.peak() > allowed and self.group:
                    self.flush()
                    self.begin(path)
                    busy_until = self.level[path]
                    self.count(c, end)
                if self.peak() <= allowed:
                    self.group.extend(range(c, end))
                    busy_until = max(busy_until, self.level[c])
                    continue
                self.group = [c]
                self.flush()
                self.descend(c, allowed - 1)
                self.begin(path)
            following = self.heavy[path]
            if following < 0:
                break
            if not self.step(following, busy_until, allowed):
                self.flush()
                self.begin(path)
                self.step(following, self.level[path], allowed)
            path = following
        self.flush()

    def begin(self, path: int) -> None:
        self.group = []
        self.change[:] = 0
        self.add(self.level[path], self.end, 1)

    def step(self, following: int, busy_until: int, allowed: int) -> bool:
        level = self.level[following]
        released = max(busy_until, level) + 1
        if released <= self.end:
            self.add(released, self.end, -1)
        self.add(level, level if self.heavy[following] < 0 else self.end, 1)
        if self.peak() > allowed:
            return False
        self.group.append(following)
        return True

    def count(self, first: int, end: int) -> None:
        for v in range(first, end):
            self.add(self.level[v], self.last[v], 1)

    def add(self, first: int, last: int, sign: int) -> None:
        self.change[first] += sign
        self.change[last + 1] -= sign

    def peak(self) -> int:
        return int(self.change.cumsum().max())

    def flush(self) -> None:
        trie = self.trie
        self.group.sort(key=lambda v: (self.level[v], trie.op(v), trie.block[v], v))
        for nodes in _runs(self.group, self.level):
            for v in nodes:
                self.buffer[v] = self.take()
                self.rows.append((trie.op(v), trie.block[v], self.buffer[trie.parent[v]], self.buffer[v], self.now))
                self.gates.append(trie.gate[v])
            for v in nodes:
                if trie.word[v] >= 0:
                    self.head(v)
            for v in nodes:
                above = trie.parent[v]
                self.pending[above] -= 1
                if not self.pending[above]:
                    heapq.heappush(self.free, self.buffer[above])
                if not trie.children[v]:
                    heapq.heappush(self.free, self.buffer[v])
            self.now += 1
        self.group = []

    def head(self, v: int) -> None:
        self.rows.append((HEAD, self.trie.word[v], self.buffer[v], -1, self.now))
        self.gates.append(0.0)

    def take(self) -> int:
        if self.free:
            return heapq.heappop(self.free)
        self.fresh += 1
        return self.fresh - 1


def _runs(nodes: list[int], level: list[int]) -> Iterable[list[int]]:
    """Splits a sorted list where the level changes."""
    begin = 0
    for i in range(1, len(nodes) + 1):
        if i == len(nodes) or level[nodes[i]] != level[nodes[begin]]:
            yield nodes[begin:i]
            begin = i
