"""A gradient plan: the paths of a sweep compiled for the backward pass.

The forward is intact: every block runs with gate 1. A path is a configuration: blocks whose gate is not 0 are chosen
and send the gradient through their branch (times the gate), the others through their shortcut (Veit et al. 2016,
section 5). Words are read from the loss end, so that paths share suffixes of the network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import extension, planner_py
from .errors import PlanError, SweepError
from .plan import Plan, _Trie, check_sweep

if TYPE_CHECKING:
    from .network import ResidualNetwork
    from .piece import Piece
    from .sweep import Sweep


class GradientPlan(Plan):
    """Paths compiled for execution; make one with ``gradient_plan(net, sweep)``.

    The state at the start is dLoss/d(output of the last block): the head's backward, before any closing ReLU's mask.
    ``RUN block`` applies the closing's mask of the intact forward, then the branch's transpose times the gate, then the
    transpose of the prologue that branch and shortcut share; ``SHORTCUT block`` the same with the shortcut's transpose;
    ``HEAD word`` reads the state, that path's gradient at the input of the first block. An unchosen block whose
    transpose is the identity has no letter.

    Attributes: those of a Plan, and ``order``, the one order in which the forward runs the blocks for all paths.
    """

    def __init__(self, sweep: Sweep, trie: _Trie, order: tuple[int, ...]) -> None:
        super().__init__(sweep, trie)
        self.order = order

    @property
    def reordered(self) -> bool:
        """Whether the forward runs the blocks in another order than the network's own."""
        return self.order != tuple(range(len(self.order)))

    def summary(self) -> str:
        return super().summary().replace(" configurations of ", " paths through ", 1)


def gradient_plan(net: ResidualNetwork, sweep: Sweep) -> GradientPlan:
    """Compile the paths of a sweep of this network: build the trie of their words, read from the loss end.

    Raises SweepError when the sweep belongs to another network, has more than one order, or leaves out a block that
    every path goes through (a sequential block, which has no shortcut).
    """
    structure = net.structure
    check_sweep(structure, sweep)
    order = sweep.orders[0].astype(np.int64)
    for c in np.flatnonzero((sweep.orders != order).any(axis=1))[:1]:
        raise SweepError(f"path {c} runs the blocks in another order than path 0; plan the paths of each order apart")
    for c, block in np.argwhere((sweep.gates == 0) & ~np.asarray(structure.gateable, dtype=bool))[:1]:
        raise SweepError(
            f"path {c} leaves out block {block} ({structure.names[block]}), but it is sequential: without a shortcut "
            "every path goes through it"
        )
    through = np.asarray([passes_unchanged(net, block) for block in range(len(structure))], dtype=bool)
    backwards = order[::-1]
    gates = sweep.gates[:, backwards]
    letters = ~((gates == 0) & through[backwards])
    offsets = np.zeros(len(sweep) + 1, dtype=np.int64)
    np.cumsum(letters.sum(axis=1), out=offsets[1:])
    blocks = np.broadcast_to(backwards.astype(np.int32), gates.shape)[letters]
    positions = np.broadcast_to(np.arange(len(order), dtype=np.int32), gates.shape)[letters]
    native = extension.module()
    make = native.Trie if native is not None else planner_py.Trie
    try:
        trie = make(offsets, blocks, gates[letters], positions, len(structure))
    except ValueError as error:
        raise PlanError(str(error)) from None
    return GradientPlan(sweep, trie, tuple(order.tolist()))


def passes_unchanged(net: ResidualNetwork, block: int) -> bool:
    """Whether an unchosen block hands the gradient on as it is: identity shortcut, no closing ReLU, no shared
    prologue.
    """
    recipe = net.blocks[block].recipe
    return recipe.gateable and all(_nothing(piece) for piece in (recipe.prologue, recipe.shortcut, recipe.closing))


def _nothing(piece: Piece) -> bool:
    return all(node.meta.get("nothing") for node in piece.nodes)
