"""Path gradients on batches: the intact forward once, then the plan's tape over the blocks' own transposes.

The forward keeps of each block the graphs of its four pieces, cut apart: a letter of a path is a vector-Jacobian
product of some of them. Suffixes that paths share run once; any block that torch can differentiate will do.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..plan import HEAD, RESTORE, RUN, SAVE, SHORTCUT
from .base import GradientExecutor, Progress, replica

if TYPE_CHECKING:
    from ..blocks import Block
    from ..gradient_plan import GradientPlan
    from ..network import ResidualNetwork

_BATCH = {"cpu": 32, "cuda": 256}
_KEPT = {"cpu": 2**30, "cuda": 2**33}  # bytes that a batch's kept activations may take, roughly
_MAPS = 8  # activations that autograd keeps per block: a bottleneck's, rounded up


class Transposes:
    """One block's intact forward from the state x, cut into pieces, and what the gradient meets on its way back."""

    def __init__(self, block: Block, x: Tensor, parameters: bool) -> None:
        self.gateable = block.gateable
        self.parameters = block.parameters() if parameters else []
        self.x = _leaf(x)
        self.prologue = block.prologue(self.x)
        self.p = _leaf(self.prologue)
        self.branch = block.branch(self.p)
        self.shortcut = block.shortcut(self.p) if self.gateable else self.branch
        self.sum = _leaf(self.shortcut + self.branch if self.gateable else self.branch)
        self.y = block.closing(self.sum)

    def back(self, gradient: Tensor, gate: float) -> tuple[Tensor, Tensor | None]:
        """The gradient at x of a chosen block (gate not 0) or an unchosen one, and the squared norm of the gradient of
        the block's parameters where they are asked for.
        """
        through = self.branch if gate or not self.gateable else self.shortcut
        found: list[Tensor | None] = [None] * len(self.parameters)
        for out, leaf, scale in ((self.y, self.sum, 1.0), (through, self.p, gate or 1.0), (self.prologue, self.x, 1.0)):
            if scale != 1.0:
                gradient = gradient * scale
            if not out.requires_grad:  # a constant, such as a shortcut of zeros
                gradient = torch.zeros_like(leaf)
                continue
            inputs = (leaf, *self.parameters)
            got, *weights = torch.autograd.grad(out, inputs, gradient, retain_graph=True, allow_unused=True)
            gradient = torch.zeros_like(leaf) if got is None else got
            found = [_sum(a, b) for a, b in zip(found, weights, strict=True)]
        if not self.parameters:
            return gradient, None
        squares = [g.double().square().sum() for g in found if g is not None]
        return gradient, torch.stack(squares).sum() if squares else None


class TorchGradients(GradientExecutor):
    def __init__(
        self, net: ResidualNetwork, plan: GradientPlan, device: torch.device, dtype: torch.dtype, at: str
    ) -> None:
        with torch.inference_mode(False):
            self.net = replica(net, device, dtype, torch.channels_last)
        self.net.requires_grad_(at == "parameters")
        self.order, self.words, self.at = plan.order, plan.words, at
        tape = plan.tape()
        self.tape = list(zip(*tape.instructions.T.tolist(), tape.gates.tolist(), strict=True))
        structure = plan.structure
        image = sum(map(prod, (*structure.shapes_in, *structure.shapes_out))) * _MAPS // 2 * dtype.itemsize
        most, kept = _BATCH.get(device.type, 64), _KEPT.get(device.type, 2**30)
        self.batch = max(1, min(most, kept // max(1, image)))

    @torch.inference_mode(False)
    @torch.enable_grad()
    def norms(self, images: Tensor, labels: Tensor, progress: Progress | None = None) -> Tensor:
        rows: dict[int, Tensor] = {}
        if self.at != "parameters":
            for word, gradient, _ in self._heads(images, labels, progress, 1.0):
                rows[word] = gradient.flatten(1).double().norm(dim=1)
            return torch.stack([rows[word] for word in range(self.words)]).cpu()
        found = torch.empty(self.words, len(images), len(self.order), dtype=torch.float64)
        for i in range(len(images)):  # a parameter's gradient is a sum over the images that went in together
            for word, _, squares in self._heads(images[i : i + 1], labels[i : i + 1], progress, 1 / len(images)):
                found[word, i] = squares.sqrt().cpu()
        return found

    @torch.inference_mode(False)
    @torch.enable_grad()
    def gradients(self, images: Tensor, labels: Tensor, progress: Progress | None = None) -> Tensor:
        rows = {word: gradient for word, gradient, _ in self._heads(images, labels, progress, 1.0)}
        return torch.stack([rows[word] for word in range(self.words)]).cpu().contiguous()

    def _heads(
        self, images: Tensor, labels: Tensor, progress: Progress | None, share: float
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(word, gradient [B, C, H, W], squared norms [blocks] of the parameters' gradients) of every word; `share` of
        the progress is this call's.
        """
        net = self.net
        images = images.detach().to(net.device, net.dtype, memory_format=torch.channels_last, copy=True)
        images.requires_grad_()
        stem = net.stem(images)
        forward, state = {}, stem
        for j in self.order:
            forward[j] = Transposes(net.blocks[j], state, self.at == "parameters")
            state = forward[j].y
        last = _leaf(state)
        logits = net.head(last).double()
        loss = torch.nn.functional.cross_entropy(logits, labels.to(net.device, copy=True), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, last)
        squares = torch.zeros(len(self.order), dtype=torch.float64, device=net.device)
        slots: dict[int, tuple[Tensor, Tensor]] = {}
        unreported = 0
        for op, arg, gate in self.tape:
            if op in (RUN, SHORTCUT):
                gradient, more = forward[arg].back(gradient, gate)
                if more is not None:
                    squares = squares.index_put((torch.tensor(arg, device=net.device),), more)
            elif op == SAVE:
                slots[arg] = gradient, squares
            elif op == RESTORE:
                gradient, squares = slots[arg]
            elif op == HEAD and self.at == "image":
                yield arg, torch.autograd.grad(stem, images, gradient, retain_graph=True)[0], squares
            elif op == HEAD:
                yield arg, gradient, squares
            unreported += 1
            if progress and (op == HEAD or unreported == 64):
                progress(share * unreported / len(self.tape))
                unreported = 0
        if progress and unreported:
            progress(share * unreported / len(self.tape))


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_()


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def shared_parameter(net: ResidualNetwork) -> str | None:
    """Why the gradients of parameters cannot be told block by block: two blocks share one; or None."""
    owner: dict[int, Block] = {}
    for block in net.blocks:
        for parameter in block.parameters():
            other = owner.setdefault(id(parameter), block)
            if other is not block:
                return f"blocks {other.index} and {block.index} share a parameter, so its gradient is neither's alone"
    return None
