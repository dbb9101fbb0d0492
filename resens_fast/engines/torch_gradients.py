"""Path gradients on batches: the intact forward once, then the plan's tape over the blocks' own transposes.

The forward keeps of each block the graphs of its four pieces, cut apart: a letter of a path is a vector-Jacobian
product of some of them. Suffixes that paths share run once; any block that torch can differentiate will do.

A path through many branches shrinks the gradient below what float32 can hold (1e-47 in a ResNet-110), so each image's
state is kept near 1 and its power of two apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..plan import HEAD, RESTORE, RUN, SAVE, SHORTCUT
from .base import GradientExecutor, Progress, cross_entropy, replica

if TYPE_CHECKING:
    from ..blocks import Block
    from ..gradient_plan import GradientPlan
    from ..network import ResidualNetwork

_BATCH = {"cpu": 32, "cuda": 256}
_KEPT = {"cpu": 2**30, "cuda": 2**33}  # bytes that a batch's kept activations may take, roughly
_MAPS = 8  # activations that autograd keeps per block: a bottleneck's, rounded up


class State(NamedTuple):
    """The gradient [B, C, H, W] of each image as mantissa × 2^exponent (int64 [B]), and the squared norm of what the
    parameters of each block have received, float64 [n].
    """

    mantissa: Tensor
    exponent: Tensor
    squares: Tensor

    def normalised(self) -> State:
        """The same with a largest mantissa in [0.5, 1); images whose gradient is 0 or not finite stay as they are."""
        largest = self.mantissa.flatten(1).abs().amax(dim=1).double()
        shift = torch.frexp(torch.where(largest.isfinite(), largest, 0)).exponent.long()
        return State(_scaled(self.mantissa, -shift), self.exponent + shift, self.squares)

    def norms(self) -> Tensor:
        """float64 [B]."""
        return _scaled(self.mantissa.flatten(1).double().norm(dim=1), self.exponent)


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
            for word, state in self._heads(images, labels, progress, 1.0):
                rows[word] = state.norms()
            return torch.stack([rows[word] for word in range(self.words)]).cpu()
        found = torch.empty(self.words, len(images), len(self.order), dtype=torch.float64, device="cpu")
        for i in range(len(images)):  # a parameter's gradient is a sum over the images that went in together
            for word, state in self._heads(images[i : i + 1], labels[i : i + 1], progress, 1 / len(images)):
                found[word, i] = state.squares.sqrt().cpu()
        return found

    @torch.inference_mode(False)
    @torch.enable_grad()
    def gradients(self, images: Tensor, labels: Tensor, progress: Progress | None = None) -> Tensor:
        heads = self._heads(images, labels, progress, 1.0)
        rows = {word: _scaled(state.mantissa, state.exponent) for word, state in heads}
        return torch.stack([rows[word] for word in range(self.words)]).cpu().contiguous()

    def _heads(
        self, images: Tensor, labels: Tensor, progress: Progress | None, share: float
    ) -> Iterator[tuple[int, State]]:
        """The state of every word at the end of its path; `share` of the progress is this call's."""
        net = self.net
        images = images.detach().to(net.device, net.dtype, memory_format=torch.channels_last, copy=True)
        images.requires_grad_()
        stem = net.stem(images)
        forward, out = {}, stem
        for j in self.order:
            forward[j] = Transposes(net.blocks[j], out, self.at == "parameters")
            out = forward[j].y
        state = self._start(out, labels.to(net.device, copy=True))
        slots: dict[int, State] = {}
        unreported = 0
        for op, arg, gate in self.tape:
            if op in (RUN, SHORTCUT):
                mantissa, square = forward[arg].back(state.mantissa, gate)
                squares = state.squares
                if square is not None:  # of the one image
                    squares = squares.clone()
                    squares[arg] = _scaled(square[None], 2 * state.exponent)[0]
                state = State(mantissa, state.exponent, squares).normalised()
            elif op == SAVE:
                slots[arg] = state
            elif op == RESTORE:
                state = slots[arg]
            elif op == HEAD and self.at == "image":
                (mantissa,) = torch.autograd.grad(stem, images, state.mantissa, retain_graph=True)
                yield arg, State(mantissa, state.exponent, state.squares)
            elif op == HEAD:
                yield arg, state
            unreported += 1
            if progress and (op == HEAD or unreported == 64):
                progress(share * unreported / len(self.tape))
                unreported = 0
        if progress and unreported:
            progress(share * unreported / len(self.tape))

    def _start(self, out: Tensor, labels: Tensor) -> State:
        """The loss's gradient at the output of the last block; at the logits it is computed in float64."""
        last = _leaf(out)
        logits = self.net.head(last)
        leaf = _leaf(logits.double())
        (given,) = torch.autograd.grad(cross_entropy(leaf, labels).sum(), leaf)
        exponent = torch.zeros(len(labels), dtype=torch.int64, device=labels.device)
        squares = torch.zeros(len(self.order), dtype=torch.float64, device=labels.device)
        start = State(given, exponent, squares).normalised()
        (mantissa,) = torch.autograd.grad(logits, last, start.mantissa.to(logits.dtype))
        return State(mantissa, start.exponent, squares).normalised()


def _scaled(values: Tensor, exponent: Tensor) -> Tensor:
    """values [B, ...] × 2^exponent (int [B]), without leaving the range on the way; exact but below the smallest
    number.
    """
    shape = (-1, *[1] * (values.ndim - 1))
    for part in (exponent // 2, exponent - exponent // 2):
        # From its bits: torch.ldexp goes through a float32 power, which ends at 2^-149.
        factor = ((part.clamp(-1022, 1023) + 1023) << 52).view(torch.float64)
        values = values * factor.to(values.dtype).view(shape)
    return values


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
