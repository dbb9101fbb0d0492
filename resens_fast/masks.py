"""The forward under a mask: which blocks run, for the whole batch or image by image; differentiable, for training too.

A deleted block's branch is not computed.  Where only some images of a batch keep a block, its branch gets these alone,
so that time falls with them and batch norm in it sees no others; prologue, shortcut and closing run for all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .blocks import Block
from .errors import SweepError
from .structure import Structure

if TYPE_CHECKING:
    from .network import ResidualNetwork


def forward(net: ResidualNetwork, x: Tensor, mask: Any, engine: str | None = None) -> Tensor:
    """Logits [B, classes] for images [B, C, H, W] and a mask [n] or [B, n]: True or 1 keeps a block, 0 deletes it.

    Any other number is a gate on the branch.  In a mask that requires a gradient every block runs, also at 0, where
    the gradient with respect to the gate is not 0.  Raises SweepError for a mask that does not fit the network.
    """
    mask = mask if isinstance(mask, Tensor) else _tensor(mask)
    if engine is not None:
        from .engines import triton_autograd

        return triton_autograd.forward(net, x, mask)
    gates = check(net.structure, mask, len(x))
    state = net.stem(x)
    for j, block in enumerate(net.blocks):
        if mask.requires_grad:
            column = mask[..., j].to(x.device)
            state = block.run(state, column.view(-1, 1, 1, 1) if column.ndim else column)
        else:
            state = _run(block, state, gates[..., j], skips=not net.training)
    return net.head(state)


def _run(block: Block, state: Tensor, gates: Tensor, skips: bool) -> Tensor:
    """One block under the gate of the batch [] or of its images [B]; `skips` allows to leave out what does nothing."""
    first = float(gates.flatten()[0]) if gates.numel() else 1.0
    if bool((gates == first).all()):
        return state if first == 0.0 and block.drops and skips else block.run(state, first)
    rows = gates.nonzero().flatten()
    kept = None if bool((gates[rows] == 1.0).all()) else gates[rows].to(state.device)
    return block.run_rows(state, rows.to(state.device), kept)


def check(structure: Structure, mask: Tensor, batch: int) -> Tensor:
    """The mask's values, float64 on the CPU, after every way in which it may not fit the network was looked at."""
    n = len(structure)
    if mask.is_meta:
        raise SweepError("a mask has values, and a meta tensor has none")
    if mask.is_complex():
        raise SweepError(f"a mask holds booleans or real gates, not {mask.dtype}")
    if tuple(mask.shape) not in ((n,), (batch, n)):
        raise SweepError(
            f"a mask has the shape [{n}] for the whole batch or [{batch}, {n}] with a row per image, "
            f"not {list(mask.shape)}"
        )
    values = mask.detach().to("cpu", torch.float64)
    for j, column in enumerate(values.unbind(-1)):
        name = f"block {j} ({structure.names[j]})"
        if not bool(column.isfinite().all()):
            raise SweepError(f"the mask's gate for {name} is {float(column[~column.isfinite()][0])}; it must be finite")
        if not structure.deletable[j] and bool((column == 0).any()):
            raise SweepError(f"the mask deletes {name}, which changes the shape without a shortcut: keep it")
        if not structure.gateable[j] and (mask.requires_grad or bool(((column != 0) & (column != 1)).any())):
            raise SweepError(f"{name} is sequential, so a mask can only keep (1) or delete (0) it")
    return values


def _tensor(mask: Any) -> Tensor:
    try:
        return mask if isinstance(mask, Tensor) else torch.as_tensor(mask, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise SweepError(
            f"a mask is a tensor of booleans or gates, not {type(mask).__name__} ({str(error).splitlines()[0]})"
        ) from None
