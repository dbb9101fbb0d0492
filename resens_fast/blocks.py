"""One residual block as sub-graphs of the network: y = closing(shortcut(p) + gate * branch(p)), p = prologue(x)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resens_fast.piece import Piece, attribute
from resens_fast.structure import Shape

Gate = float | Tensor


@dataclasses.dataclass(frozen=True)
class BlockRecipe:
    """Everything about a block but the model whose parameters it uses."""

    index: int
    name: str
    stage: int
    kind: str
    prologue: Piece
    branch: Piece
    shortcut: Piece
    closing: Piece
    transform: Piece | None
    gateable: bool
    deletable: bool
    drops: bool
    shape_in: Shape
    shape_out: Shape


class Block:
    """A block of a wrapped network, bound to the live model: what it computes follows the model's parameters."""

    def __init__(self, recipe: BlockRecipe, model: nn.Module) -> None:
        self.recipe = recipe
        self.model = model
        self.index = recipe.index
        self.name = recipe.name
        self.stage = recipe.stage
        self.kind = recipe.kind
        self.gateable = recipe.gateable
        self.deletable = recipe.deletable
        self.drops = recipe.drops
        self.shape_in = recipe.shape_in
        self.shape_out = recipe.shape_out
        self.is_transition = recipe.shape_in != recipe.shape_out

    def __repr__(self) -> str:
        return f"Block({self.index}, {self.name!r}, kind={self.kind!r}, {self.shape_in} -> {self.shape_out})"

    def prologue(self, x: Tensor) -> Tensor:
        """p [B, C, H, W]: what branch and shortcut both read."""
        return self.recipe.prologue(self.model, x)

    def branch(self, p: Tensor) -> Tensor:
        """f(p), before any gate; for a highway block t * (f - shortcut)."""
        return self.recipe.branch(self.model, p)

    def shortcut(self, p: Tensor) -> Tensor:
        """The model's own shortcut: p itself or its projection."""
        return self.recipe.shortcut(self.model, p)

    def closing(self, y: Tensor, own: bool = False) -> Tensor:
        """What follows the sum, usually a ReLU or nothing; `own` allows it to work in place on y."""
        return self.recipe.closing(self.model, y, own=own)

    def transform(self, p: Tensor) -> Tensor | None:
        """A highway block's transform gate t(p), None for every other kind."""
        return None if self.recipe.transform is None else self.recipe.transform(self.model, p)

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the block's own operations use, each once."""
        pieces = (self.recipe.prologue, self.recipe.branch, self.recipe.shortcut, self.recipe.closing)
        names = sorted(frozenset().union(*(piece.model_parameters for piece in pieces)))
        found = [attribute(self.model, name) for name in names]
        return list({id(parameter): parameter for parameter in found}.values())

    def run(self, x: Tensor, gate: Gate = 1.0) -> Tensor:
        """The block's output for a state x [B, C, H, W], its branch scaled by `gate`; x is left as it was.

        `gate` is a number or a tensor that broadcasts to [B, C, H, W]; the number 0 skips the branch.
        Raises ValueError for a real gate on a sequential block, which only runs (1) or does not (0).
        """
        if not isinstance(gate, Tensor) and gate == 0.0:
            return self.skip(x)
        p = self.prologue(x)
        if not self.gateable:
            if isinstance(gate, Tensor) or gate != 1.0:
                raise ValueError(
                    f"block {self.index} ({self.name}) is sequential, so its gate must be 0 or 1, got {gate}"
                )
            return self.closing(self.branch(p))
        shortcut, branch = self.shortcut(p), self.branch(p)
        if isinstance(gate, Tensor):
            y = shortcut + gate.to(branch.dtype) * branch
        else:
            y = shortcut + branch if gate == 1.0 else torch.add(shortcut, branch, alpha=gate)
        return self.closing(y, own=True)

    def run_rows(self, x: Tensor, rows: Tensor, gates: Tensor | None = None) -> Tensor:
        """As `run`, where only the images `rows` (int64 [K], K > 0) of the batch have the branch; the others skip it.

        gates: [K], or None for 1 everywhere.  Batch norm in the branch sees these images alone.
        """
        p = self.prologue(x)
        shortcut = self.shortcut(p)
        lone = len(rows) == 1 and shortcut[0, 0].numel() == 1
        with self._running_statistics() if lone else contextlib.nullcontext():
            branch = self.branch(p[rows])
        y = shortcut.to(torch.promote_types(shortcut.dtype, branch.dtype), copy=True)
        if not self.gateable:
            y.index_copy_(0, rows, branch)
        else:
            scaled = branch if gates is None else gates.to(branch.dtype).view(-1, 1, 1, 1) * branch
            y.index_add_(0, rows, scaled.to(y.dtype))
        return self.closing(y, own=True)

    @contextlib.contextmanager
    def _running_statistics(self) -> Iterator[None]:
        """The branch's batch norms as in eval mode: one value per channel has no variance, and PyTorch would raise."""
        names = {str(node.target) for node in self.recipe.branch.nodes if node.op == "call_module"}
        norms = [m for m in map(self.model.get_submodule, names) if isinstance(m, _BatchNorm) and m.training]
        try:
            for norm in norms:
                norm.eval()
            yield
        finally:
            for norm in norms:
                norm.train()

    def skip(self, x: Tensor) -> Tensor:
        """The deleted block's output closing(shortcut(prologue(x))); x is left as it was, or is itself the result."""
        if not self.deletable:
            raise ValueError(
                f"block {self.index} ({self.name}) turns {self.shape_in} into {self.shape_out} without a shortcut, "
                "so it cannot be deleted"
            )
        return self.closing(self.shortcut(self.prologue(x)))


def kind_of(prologue: Piece, branch: Piece, closing: Piece, gated: bool, kernels: list[int]) -> str:
    """The kind that the order of convolutions, norms and activations spells; `kernels` are the convolutions' widths."""
    if gated:
        return "highway"
    chains = [piece.chain() for piece in (prologue, branch, closing)]
    before, inner, after = chains
    if before is None or inner is None or after is None:
        return "generic"
    steps = [{"relu": "act"}.get(s, s) for s in (*before, *inner) if s != "drop"]
    ends = [{"relu": "act"}.get(s, s) for s in after if s != "drop"]
    if any(s not in ("conv", "norm", "act") for s in (*steps, *ends)) or "conv" in before:
        return "generic"
    order = "".join(s[0] for s in steps)  # c, n, a
    # A norm belongs before the activation that follows it (or after the last convolution): anything else is unknown.
    bare = order.replace("n", "")
    count = bare.count("c")
    name = {2: "basic", 3: "bottleneck"}.get(count)
    if name is None or "nn" in order or (count == 3 and (kernels[0] != 1 or kernels[-1] != 1)):
        return "generic"
    if bare == "ca" * (count - 1) + "c" and ends == ["act"] and not before and not order.startswith("n"):
        return name if "an" not in order else "generic"
    if bare == "ac" * count and not ends and "an" not in order:
        return f"{name}_preact" if not order.endswith("n") else "generic"
    return "generic"
