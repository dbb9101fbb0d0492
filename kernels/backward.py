"""The backward pass called from Python: the intact forward that leaves sign bits behind, then a plan's levels of paths.

Everything is allocated before the first launch, as in launch.py, so that both can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..plan import HEAD, RUN, Levels
from . import launch, tiles
from .loss import loss_gradient, square_norms
from .normalise import normalise
from .pack import BlockShape, ConvShape, Group, Head, Packed, width
from .schedule import Launch, Schedule, schedule
from .signs import signs
from .transpose import conv_transpose, shortcut_transpose
from .weights import weight_gradient

BLOCK = 256
"""Words of 16 elements that a program of `signs` takes; of 4 elements for `square_norms`."""
EVERY = 8
"""Blocks between two normalisations of a path: each shrinks the gradient by a power of ten or so."""
CHUNKS, PROGRAMS = (8, 256), 512
"""How many chunks of pixels a program of `weight_gradient` adds up: so few that there are so many programs."""


@dataclass(frozen=True)
class Trail:
    """What the intact forward of at most `batch` images leaves for the backward."""

    order: tuple[int, ...]
    forward: Schedule
    """One step for each block, between the buffers 0 and 1, and the head."""
    relus: tuple[tuple[Tensor, ...], ...]
    """For each group and convolution: int16 [slots, words], the ReLU that feeds it, beginning with the prologue."""
    closed: tuple[Tensor, ...]
    """For each group: int16 [slots, words], the ReLU that closed the block before; all ones at the first block."""
    logits: Tensor
    """float32 [batch * classes]"""
    exponents: Tensor
    """int32 [buffers, batch], of the gradients in the state buffers"""

    @classmethod
    def allocate(cls, packed: Packed, order: tuple[int, ...], batch: int, buffers: int) -> Trail:
        rows = [[RUN, block, i % 2, (i + 1) % 2, i] for i, block in enumerate(order)]
        rows.append([HEAD, 0, len(order) % 2, -1, len(order)])
        table = np.array(rows, dtype=np.int32)
        forward = schedule(packed, Levels(table, np.ones(len(rows), dtype=np.float32), 2, len(rows)), batch, 1)

        def bits(group: Group, index: int, wanted: bool) -> Tensor:
            conv = group.shape.convs[index]
            words = batch * width(conv.c) * conv.height * conv.width // 16 if wanted else 1
            return torch.full((len(group.blocks), words), -1, device=packed.device, dtype=torch.int16)

        return cls(
            order,
            forward,
            tuple(
                tuple(bits(group, i, feeding_relu(group.shape, i)) for i in range(len(group.shape.convs)))
                for group in packed.groups
            ),
            tuple(bits(group, 0, group.shape.closing) for group in packed.groups),
            torch.empty(batch * packed.head.classes, device=packed.device, dtype=torch.float32),
            torch.zeros(buffers, batch, device=packed.device, dtype=torch.int32),
        )


def feeding_relu(block: BlockShape, index: int) -> bool:
    """Whether convolution `index` of a block reads what a ReLU of this block wrote."""
    return block.convs[index - 1].relu if index else block.prologue


def bits_per_image(packed: Packed) -> int:
    """Bytes of sign bits that an image takes."""
    total = 0
    for group in packed.groups:
        for index, conv in enumerate(group.shape.convs):
            relus = feeding_relu(group.shape, index) + (index == 0 and group.shape.closing)
            total += len(group.blocks) * relus * width(conv.c) * conv.height * conv.width // 8
    return total


def marked(steps: Schedule, dtype: torch.dtype) -> tuple[Schedule, Tensor]:
    """The schedule with gates between 0.5 and 1, and what `normalise` needs to know: int32 [steps, 2]."""
    every = 1 if dtype == torch.float16 else EVERY
    mantissas, shifts = np.frexp(steps.gates.cpu().numpy())
    marks, made = np.stack([np.zeros_like(shifts), shifts], axis=1), [0] * steps.buffers
    rows = steps.steps.tolist()
    for each in steps.launches:
        for i in range(each.first, each.first + each.count):
            source, destination, _ = rows[i]
            if each.op != HEAD:
                made[destination] = made[source] + 1
                marks[i, 0] = made[destination] % every == 0
    device = steps.gates.device
    gates = torch.from_numpy(mantissas.astype(np.float32)).to(device)
    return replace(steps, gates=gates), torch.from_numpy(marks.astype(np.int32)).to(device)


def with_forward(backward: Schedule, trail: Trail) -> Schedule:
    """The backward's schedule with memory for the forward as well."""
    scratch = [max(sizes) for sizes in zip(backward.scratch, trail.forward.scratch, strict=True)]
    return replace(
        backward, buffers=max(2, backward.buffers), scratch=(scratch[0], scratch[1]), means=trail.forward.means
    )


def conv_constants(block: BlockShape, index: int, dtype: torch.dtype) -> dict[str, Any]:
    """The constants of `conv_transpose` but for the tile."""
    conv = block.convs[index]
    first = index == 0
    return {
        **launch.geometry(conv),
        "CHANNELS": conv.c,
        "FROM_STATE": index == len(block.convs) - 1,
        "LAST": first,
        "RELU": feeding_relu(block, index),
        "PROLOGUE": first and block.prologue,
        "CLOSED": first and block.closing,
        "BLOCK_K": tiles.block_k(conv.n, dtype),
        "PRECISION": launch.precision(dtype),
    }


def skip_constants(block: BlockShape, dtype: torch.dtype) -> dict[str, Any]:
    """The constants of `shortcut_transpose` but for the tile."""
    channels, height, columns = block.shape_in
    side = block.shortcut
    return {
        "C": width(channels),
        "N": width(block.shape_out[0]),
        "CHANNELS": channels,
        "H": height,
        "W": columns,
        "HEIGHT": block.shape_out[1],
        "WIDTH": block.shape_out[2],
        "SHORTCUT": side.kind,
        "KERNEL": side.kernel,
        "STRIDE": side.stride,
        "PADDING": side.padding,
        "POOL": side.pool,
        "BEFORE": side.before,
        "PROLOGUE": side.prologue,
        "CLOSED": block.closing,
        "BLOCK_K": tiles.block_k(block.shape_out[0], dtype),
        "PRECISION": launch.precision(dtype),
    }


def skip_tile(channels: int, dtype: torch.dtype) -> tiles.Tile:
    """Of `shortcut_transpose`: half as many pixels as a convolution's, with which it spilled on sm_100."""
    return replace(tiles.default(channels, dtype, 80), block_m=64, warps=4)


def loss_constants(head: Head, closed: bool) -> dict[str, Any]:
    return {
        "C": width(head.channels),
        "K": head.classes,
        "PIXELS": head.pixels,
        "PROLOGUE": head.prologue,
        "RELU": head.relu,
        "CLOSED": closed,
        "BLOCK_I": 16,
        "BLOCK_C": 32,
        "BLOCK_K": 32,
    }


def signs_constants(channels: int, prologue: bool) -> dict[str, Any]:
    return {"C": width(channels), "PROLOGUE": prologue, "BLOCK": BLOCK}


def walk_constants(elements: int) -> dict[str, Any]:
    """The constants of `normalise` and `square_norms`, which walk over images of so many stored elements."""
    return {"ELEMENTS": elements, "BLOCK": 4 * BLOCK}


def launch_signs(a: Tensor, bits: Tensor, scale: Tensor | None, shift: Tensor | None, channels: int) -> None:
    """The sign bits int16 [words] of a, whose first 16 * words elements count; behind scale and shift, if given."""
    words = bits.numel()
    signs[(launch.cdiv(words, BLOCK),)](
        a, bits, a if scale is None else scale, a if shift is None else shift, words,
        **signs_constants(channels, scale is not None), **launch.OPTIONS,
    )  # fmt: skip


def forward(packed: Packed, memory: launch.Memory, trail: Trail, images: int) -> None:
    """The intact forward of the images whose stem is in buffer 0; leaves bits, logits and, in buffer 0, the gradient
    of the loss at the last block's output, masked by that block's closing ReLU.
    """
    before = None
    for block, each in zip(trail.order, trail.forward.launches, strict=False):
        number, slot = packed.slot_of[block]
        group = packed.groups[number]
        shape, state = group.shape, memory.states[each.first % 2]
        words = images * width(shape.shape_in[0]) * shape.shape_in[1] * shape.shape_in[2] // 16
        if shape.prologue:
            scale, shift = group.scale[slot], group.shift[slot]
            launch_signs(state, trail.relus[number][0][slot, :words], scale, shift, shape.shape_in[0])
        if before is not None and shape.closing:
            launch_signs(state, trail.closed[number][slot, :words], None, None, shape.shape_in[0])
        launch.run(packed, memory, trail.forward, group, each.first, 1, images)
        for index, conv in enumerate(shape.convs[:-1]):
            words = images * conv.out_elements // 16
            launch_signs(memory.scratch[index % 2], trail.relus[number][index + 1][slot, :words], None, None, conv.n)
        before = block
    (head,) = trail.forward.launches[len(trail.order) :]
    launch.heads(packed, memory, trail.forward, head.first, 1, images, trail.logits)
    last = memory.states[len(trail.order) % 2]
    closed = before is not None and packed.groups[packed.slot_of[before][0]].shape.closing
    constants = loss_constants(packed.head, closed)
    grid = (launch.cdiv(images, constants["BLOCK_I"]), launch.cdiv(constants["C"], constants["BLOCK_C"]))
    loss_gradient[grid](
        trail.logits, memory.labels, packed.head.weight, packed.head.scale, packed.head.shift, last, memory.states[0],
        trail.exponents, images, **constants, **launch.OPTIONS,
    )  # fmt: skip


def launch_conv_transpose(
    source: Tensor,
    target: Tensor,
    table: tuple[Tensor, Tensor],
    weight: Tensor,
    scale: Tensor,
    bits: tuple[Tensor, Tensor],
    constants: dict[str, Any],
    tile: tiles.Tile,
    first: int,
    count: int,
    images: int,
) -> None:
    """One transposed convolution for `count` steps; `source` and `target` are [steps or buffers, elements]."""
    grid = (count * launch.cdiv(images * constants["H"] * constants["W"], tile.block_m),
            launch.cdiv(constants["C"], tile.block_n))  # fmt: skip
    conv_transpose[grid](
        source, target, *table, weight, scale, *bits, first, images,
        source.stride(0), target.stride(0), *(each.stride(0) for each in bits), **constants,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.warps, num_stages=tile.stages, **launch.OPTIONS,
    )  # fmt: skip


def run(packed: Packed, memory: launch.Memory, steps: Schedule, trail: Trail, each: Launch, images: int) -> None:
    """RUN: the transposes of the branches of one launch's chosen blocks, last convolution first."""
    group, states = packed.groups[each.group], memory.states
    source = states
    for index in reversed(range(len(group.shape.convs))):
        conv = group.shape.convs[index]
        target = states
        if index:
            size = images * group.shape.convs[index - 1].out_elements
            target = memory.scratch[(index - 1) % 2][: each.count * size].view(each.count, size)
        bits = (trail.relus[each.group][index], trail.closed[each.group])
        tile = tiles.of_device(conv.c, packed.dtype, packed.device)
        launch_conv_transpose(
            source, target, (steps.steps, steps.gates), group.convs[index].weight, group.scale, bits,
            conv_constants(group.shape, index, packed.dtype), tile, each.first, each.count, images,
        )  # fmt: skip
        source = target


def launch_shortcut_transpose(
    states: Tensor,
    steps: Tensor,
    weight: Tensor,
    scale: Tensor,
    bits: tuple[Tensor, Tensor],
    constants: dict[str, Any],
    first: int,
    count: int,
    images: int,
) -> None:
    """The transposed shortcuts of `count` steps between the rows of states [buffers, elements]."""
    tile = skip_tile(constants["CHANNELS"], states.dtype)
    grid = (count * launch.cdiv(images * constants["H"] * constants["W"], tile.block_m),
            launch.cdiv(constants["C"], tile.block_n))  # fmt: skip
    shortcut_transpose[grid](
        states, steps, weight, scale, *bits, first, images, states.stride(0),
        *(each.stride(0) for each in bits), **constants,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.warps, num_stages=tile.stages, **launch.OPTIONS,
    )  # fmt: skip


def skip(packed: Packed, memory: launch.Memory, steps: Schedule, trail: Trail, each: Launch, images: int) -> None:
    """SHORTCUT: the transposes of the shortcuts of one launch's unchosen blocks."""
    group = packed.groups[each.group]
    launch_shortcut_transpose(
        memory.states, steps.steps, group.projection.weight, group.scale,
        (trail.relus[each.group][0], trail.closed[each.group]),
        skip_constants(group.shape, packed.dtype), each.first, each.count, images,
    )  # fmt: skip


def scale(
    packed: Packed, memory: launch.Memory, steps: Schedule, trail: Trail, marks: Tensor, each: Launch, images: int
) -> None:
    """Behind RUN and SHORTCUT: the exponents of what one launch's steps have written."""
    channels, height, columns = packed.groups[each.group].shape.shape_in
    normalise[(each.count * images,)](
        memory.states, trail.exponents, steps.steps, marks, each.first, images, trail.exponents.shape[1],
        memory.states.stride(0), **walk_constants(width(channels) * height * columns), **launch.OPTIONS,
    )  # fmt: skip


def norms(
    memory: launch.Memory, steps: Schedule, trail: Trail, found: tuple[Tensor, Tensor], each: Launch, images: int,
    elements: int,
) -> None:  # fmt: skip
    """HEAD: of one launch's paths the squares of the norms, float64 [words, images], and the powers of two by which the
    norms are to be multiplied, int32.
    """
    square_norms[(each.count * images,)](
        memory.states, trail.exponents, *found, steps.steps, each.first, images, trail.exponents.shape[1],
        memory.states.stride(0), **walk_constants(elements), **launch.OPTIONS,
    )  # fmt: skip


def weight_constants(conv: ConvShape, prologue: bool, pool: int, dtype: torch.dtype, images: int) -> dict[str, Any]:
    c, n = width(conv.c), width(conv.n)
    widest, block_p = (64, 64) if dtype.itemsize == 2 else (32, 32)  # fp32: 64 channels filled sm_80's registers
    block_c, block_n = min(c & -c, 64), min(n & -n, widest)
    tiles_of_weights = conv.kernel**2 * (c // block_c) * (n // block_n)
    wanted = launch.cdiv(images * conv.out[0] * conv.out[1], block_p) * tiles_of_weights // PROGRAMS
    least, most = CHUNKS
    return {
        "C": c,
        "N": n,
        "H": conv.height * max(1, pool),
        "W": conv.width * max(1, pool),
        "HEIGHT": conv.out[0],
        "WIDTH": conv.out[1],
        "KERNEL": conv.kernel,
        "STRIDE": conv.stride,
        "PADDING": conv.padding,
        "POOL": pool,
        "PROLOGUE": prologue,
        "BLOCK_C": block_c,
        "BLOCK_N": block_n,
        "BLOCK_P": block_p,
        # A power of two, so that few batch sizes are compiled anew.
        "CHUNKS": min(most, max(least, launch.power_of_two(wanted + 1) // 2)),
        "PRECISION": launch.precision(dtype),
    }


def launch_weight_gradient(
    x: Tensor, g: Tensor, conv: ConvShape, scale: Tensor | None, shift: Tensor | None, pool: int
) -> Tensor:
    """float32 [n, c, kernel, kernel] of a convolution that read x [images, H, W, C], behind scale, shift and ReLU if
    they are given and the average of pool x pool pixels if there is one; g [images, y, x, N] is its output's gradient.
    """
    constants = weight_constants(conv, scale is not None, pool, x.dtype, len(x)) | {"H": x.shape[1], "W": x.shape[2]}
    c, n = constants["C"], constants["N"]
    rows, columns = conv.kernel**2 * (c // constants["BLOCK_C"]), n // constants["BLOCK_N"]
    splits = launch.cdiv(len(x) * conv.out[0] * conv.out[1], constants["BLOCK_P"] * constants["CHUNKS"])
    grid = (rows, columns, splits)
    out = torch.empty(splits, conv.kernel**2, c, n, device=x.device, dtype=torch.float32)
    weight_gradient[grid](
        x, g, out, x if scale is None else scale, x if shift is None else shift, len(x),
        **constants, **launch.OPTIONS,
    )  # fmt: skip
    taps = out.sum(0)[:, : conv.c, : conv.n]
    return taps.permute(2, 1, 0).contiguous().view(conv.n, conv.c, conv.kernel, conv.kernel)
