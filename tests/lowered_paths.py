"""Path gradients of lowered networks by autograd, block by block: the truth beside the kernels, in any dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from resens_fast.fused import FusedBlock, FusedNetwork, convert
from resens_fast.plan import HEAD, RESTORE, RUN, SAVE, SHORTCUT


def activations(block: FusedBlock, x: Tensor) -> list[Tensor]:
    """What the block's ReLUs read: its prologue's, those between its convolutions, its closing one's."""
    found = []
    h = x
    if block.scale is not None and block.shift is not None:
        found.append(block.scale.reshape(-1, 1, 1, 1).transpose(0, 1) * x + block.shift.reshape(1, -1, 1, 1))
        h = found[0].relu()
    y = h
    for conv in block.convs:
        y = F.conv2d(y, conv.weight, conv.bias, conv.stride, conv.padding)
        if conv.relu:
            found.append(y)
            y = y.relu()
    if block.closing_relu:
        found.append(block.shortcut(h if block.shortcut.activated else x) + y)
    return found


def margins(net: FusedNetwork, images: Tensor, order: Sequence[int]) -> Tensor:
    """[B]: how near to 0 the input of any ReLU that a path passes comes, as a share of its root mean square. Exact
    zeros do not count: every precision has them.
    """
    x, found = net.stem(images), []
    for j in order:
        found += activations(net.blocks[j], x)
        x = net.blocks[j](x)
    if net.head.relu:
        scale, shift = net.head.scale, net.head.shift
        found.append(x if scale is None or shift is None else scale.reshape(1, -1, 1, 1) * x + shift.reshape(1, -1, 1, 1))
    nearest = torch.full((len(images),), torch.inf, dtype=images.dtype)
    for a in found:
        size = torch.where(a == 0, torch.inf, a.abs()).flatten(1).amin(1) / a.square().mean().sqrt().clamp(min=1e-30)
        nearest = torch.minimum(nearest, size)
    return nearest


def gradients(
    net: FusedNetwork, images: Tensor, labels: Tensor, order: Sequence[int], paths: Sequence[dict[int, float]]
) -> Tensor:
    """[P, B, C, H, W]: of each image's own cross-entropy at the first block's input; a path maps blocks to gates."""
    with torch.enable_grad():
        x = net.stem(images).detach().requires_grad_()
        first, parts = x, []
        for j in order:
            block = net.blocks[j]
            h = x if block.scale is None else (block.scale.reshape(1, -1, 1, 1) * x + block.shift.reshape(1, -1, 1, 1)).relu()  # type: ignore[union-attr]
            shortcut = block.shortcut(h if block.shortcut.activated else x)
            branch = h
            for conv in block.convs:
                branch = conv(branch)
            y = shortcut + branch
            parts.append((x, shortcut, branch, y.detach() > 0 if block.closing_relu else None))
            x = (y.relu() if block.closing_relu else y).detach().requires_grad_()
        loss = F.cross_entropy(net.head(x), labels, reduction="sum")
        (start,) = torch.autograd.grad(loss, x)
        found = []
        for path in paths:
            g = start
            for j, (x, shortcut, branch, mask) in zip(reversed(order), reversed(parts), strict=True):
                g = g if mask is None else g * mask
                if path.get(j, 0.0) != 0.0:
                    (g,) = torch.autograd.grad(branch, x, g * path[j], retain_graph=True)
                elif shortcut is not x:
                    (g,) = torch.autograd.grad(shortcut, x, g, retain_graph=True)
            found.append(g)
    assert all(g.shape == first.shape for g in found)
    return torch.stack(found)


def tape(net: FusedNetwork, order: Sequence[int], paths: Sequence[dict[int, float]]) -> tuple[Tensor, Tensor]:
    """One path after the other, each from the loss: nothing shared. instructions int32 [T, 2], gates float32 [T]."""
    rows: list[tuple[int, int, float]] = [(SAVE, 0, 0.0)]
    for w, path in enumerate(paths):
        rows += [(RESTORE, 0, 0.0)] if w else []
        for j in reversed(order):
            b = net.blocks[j]
            if path.get(j, 0.0) != 0.0:
                rows.append((RUN, j, path[j]))
            elif b.closing_relu or b.shortcut.activated or b.shortcut.kind != "identity":
                rows.append((SHORTCUT, j, 0.0))
        rows.append((HEAD, w, 0.0))
    return torch.tensor([r[:2] for r in rows], dtype=torch.int32), torch.tensor([r[2] for r in rows])


def double(net: FusedNetwork) -> FusedNetwork:
    return convert(net, torch.float64)
