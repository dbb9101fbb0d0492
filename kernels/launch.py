"""The kernels called from Python: which arguments, which grid, which tile.

Everything here is allocated before the first launch, so that a sequence of launches can be captured in a CUDA graph: a
plan has a launch for each level, group and convolution, hundreds for a sweep, and from Python each costs tens of
microseconds, as much as a small one takes to run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import tiles
from .conv import conv
from .head import classify, pool
from .pack import BlockShape, ConvShape, ConvWeights, Group, Head, Packed, ShortcutShape, width
from .schedule import Schedule
from .shortcut import shortcut

NO_SHORTCUT = ShortcutShape(0, 1, 1, 0, 0, 0, False)

# Triton 3.9 warns where this is left open, and 3.10 changes the default.
OPTIONS = {"enable_fp_fusion": True}


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def precision(dtype: torch.dtype) -> str:
    """TF32 only where torch has been told to multiply matrices so, by whichever of its settings.

    `torch.get_float32_matmul_precision` raises once `torch.backends` has been used to set it.
    """
    told = torch.backends.cuda.matmul.fp32_precision
    return "tf32" if dtype == torch.float32 and told == "tf32" else "ieee"


def shortcut_constants(block: BlockShape | None, shape: ShortcutShape, dtype: torch.dtype) -> dict[str, Any]:
    channels, height, columns = block.shape_in if block else (16, 1, 1)
    return {
        "X_C": width(channels),
        "X_H": height,
        "X_W": columns,
        "SHORTCUT": shape.kind,
        "S_KERNEL": shape.kernel,
        "S_STRIDE": shape.stride,
        "S_PADDING": shape.padding,
        "S_POOL": shape.pool,
        "S_BEFORE": shape.before,
        "S_PROLOGUE": shape.prologue,
        "S_BLOCK_K": tiles.block_k(channels, dtype),
    }


def geometry(shape: ConvShape) -> dict[str, Any]:
    """The sizes of a convolution, which are the same on the way back."""
    return {
        "C": width(shape.c),
        "N": width(shape.n),
        "H": shape.height,
        "W": shape.width,
        "HEIGHT": shape.out[0],
        "WIDTH": shape.out[1],
        "KERNEL": shape.kernel,
        "STRIDE": shape.stride,
        "PADDING": shape.padding,
    }


def conv_constants(block: BlockShape | None, index: int, shape: ConvShape, dtype: torch.dtype) -> dict[str, Any]:
    """The constants of `conv` but for the tile; `block` None is a convolution of the stem."""
    last = block is not None and index == len(block.convs) - 1
    side = block.shortcut if block is not None and last else NO_SHORTCUT
    return {
        **geometry(shape),
        "CHANNELS": shape.n,
        "PROLOGUE": block is not None and index == 0 and block.prologue,
        "RELU": shape.relu,
        "FROM_STATE": block is not None and index == 0,
        "LAST": last,
        "CLOSING": block is not None and last and block.closing,
        "BLOCK_K": tiles.block_k(shape.c, dtype),
        "PRECISION": precision(dtype),
        **shortcut_constants(block, side, dtype),
    }


def skip_constants(block: BlockShape, dtype: torch.dtype) -> dict[str, Any]:
    """The constants of `shortcut` but for the tile."""
    channels, height, columns = block.shape_out
    return {
        "N": width(channels),
        "CHANNELS": channels,
        "HEIGHT": height,
        "WIDTH": columns,
        "CLOSING": block.closing,
        "PRECISION": precision(dtype),
        **shortcut_constants(block, block.shortcut, dtype),
    }


def pool_constants(head: Head) -> dict[str, Any]:
    stored = width(head.channels)
    return {
        "C": stored,
        "PIXELS": head.pixels,
        "PROLOGUE": head.prologue,
        "RELU": head.relu,
        "BLOCK_P": min(64, power_of_two(head.pixels)),
        "BLOCK_C": min(128, power_of_two(stored)),
    }


def classify_constants(head: Head, count: bool, logits: bool) -> dict[str, Any]:
    return {
        "C": width(head.channels),
        "K": head.classes,
        "COUNT": count,
        "LOGITS": logits,
        "BLOCK_I": 16,
        "BLOCK_C": 32,
        "BLOCK_K": min(32, max(16, power_of_two(head.classes))),
    }


@dataclass
class Memory:
    """What the launches read and write; sized for one schedule and at most `batch` images."""

    states: Tensor
    """[buffers, batch * state_elements]"""
    scratch: tuple[Tensor, Tensor]
    means: Tensor
    labels: Tensor
    """int64 [batch]"""
    counts: Tensor
    """int64 [words, 3]"""

    @classmethod
    def allocate(cls, packed: Packed, schedule: Schedule, batch: int, words: int) -> Memory:
        device, dtype = packed.device, packed.dtype
        return cls(
            torch.empty(schedule.buffers, batch * packed.state_elements, device=device, dtype=dtype),
            tuple(torch.empty(max(1, size), device=device, dtype=dtype) for size in schedule.scratch),  # type: ignore[arg-type]
            torch.empty(max(1, schedule.means), device=device, dtype=torch.float32),
            torch.zeros(batch, device=device, dtype=torch.int64),
            torch.zeros(words, 3, device=device, dtype=torch.int64),
        )


def launch_conv(
    source: Tensor,
    target: Tensor,
    states: Tensor,
    table: tuple[Tensor, Tensor],
    weights: ConvWeights,
    group: Group | None,
    constants: dict[str, Any],
    tile: tiles.Tile,
    first: int,
    count: int,
    images: int,
) -> None:
    """One convolution for `count` steps; `source` and `target` are [steps or buffers, elements], states likewise."""
    grid = (
        count * cdiv(images * constants["HEIGHT"] * constants["WIDTH"], tile.block_m),
        cdiv(constants["N"], tile.block_n),
    )
    side = group.projection if group else weights
    scale, shift = (group.scale, group.shift) if group else (weights.bias, weights.bias)
    conv[grid](
        source, target, states, *table, weights.weight, weights.bias, side.weight, side.bias, scale, shift,
        first, images, source.stride(0), target.stride(0), states.stride(0), **constants,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
    )  # fmt: skip


def run(packed: Packed, memory: Memory, schedule: Schedule, group: Group, first: int, count: int, images: int) -> None:
    """RUN: the convolutions of `count` steps of one group, one launch each."""
    shape, states = group.shape, memory.states
    source = states
    for index, (each, weights) in enumerate(zip(shape.convs, group.convs, strict=True)):
        last = index == len(shape.convs) - 1
        area = memory.scratch[index % 2]
        size = images * each.out_elements
        target = states if last else area[: count * size].view(count, size)
        constants = conv_constants(shape, index, each, packed.dtype)
        tile = tiles.choose(each, packed.dtype, packed.device, constants["PROLOGUE"], constants["SHORTCUT"])
        launch_conv(
            source, target, states, (schedule.steps, schedule.gates), weights, group, constants, tile,
            first, count, images,
        )  # fmt: skip
        source = target


def skip(packed: Packed, memory: Memory, schedule: Schedule, group: Group, first: int, count: int, images: int) -> None:
    """SHORTCUT: `count` deleted blocks of one group."""
    constants = skip_constants(group.shape, packed.dtype)
    tile = tiles.default(constants["CHANNELS"], packed.dtype, 80)  # no card needs a fourth stage for one read
    grid = (
        count * cdiv(images * constants["HEIGHT"] * constants["WIDTH"], tile.block_m),
        cdiv(constants["N"], tile.block_n),
    )
    shortcut[grid](
        memory.states, schedule.steps, group.projection.weight, group.projection.bias, group.scale, group.shift,
        first, images, memory.states.stride(0), **constants,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
    )  # fmt: skip


def heads(
    packed: Packed, memory: Memory, schedule: Schedule, first: int, count: int, images: int, logits: Tensor | None
) -> None:
    """HEAD: tally `count` words into memory.counts, or write their logits float32 [words, images, classes]."""
    head = packed.head
    constants = pool_constants(head)
    pool[(count * images, cdiv(constants["C"], constants["BLOCK_C"]))](
        memory.states, memory.means, schedule.steps, head.scale, head.shift,
        first, images, memory.states.stride(0), **constants, **OPTIONS,
    )  # fmt: skip
    constants = classify_constants(head, logits is None, logits is not None)
    classify[(count * cdiv(images, constants["BLOCK_I"]),)](
        memory.means, schedule.steps, head.weight, head.bias, memory.labels, memory.counts,
        memory.means if logits is None else logits, first, images, **constants, **OPTIONS,
    )  # fmt: skip


def stem(packed: Packed, memory: Memory, images: Tensor) -> None:
    """The stem on images [B, C, H, W], into buffer 0.

    Its convolutions run through `conv` too, once per batch: cuDNN may pick another algorithm for another batch, and
    then a result would depend on its neighbours. The maximum pool is torch's; a maximum does not round.
    """
    batch, channels, height, columns = images.shape
    device, dtype = packed.device, packed.dtype
    source = torch.zeros(batch, height, columns, width(channels), device=device, dtype=dtype)
    source[..., :channels] = images.to(device, dtype).permute(0, 2, 3, 1)
    table = (torch.zeros(1, 3, device=device, dtype=torch.int32), torch.ones(1, device=device, dtype=torch.float32))
    for index, (shape, weights) in enumerate(packed.stem.convs):
        direct = index == len(packed.stem.convs) - 1 and packed.stem.maxpool is None
        area = memory.states if direct else torch.empty(1, batch * shape.out_elements, device=device, dtype=dtype)
        constants = conv_constants(None, 0, shape, dtype)
        tile = tiles.choose(shape, dtype, device, False, 0)
        launch_conv(source.view(1, -1), area, area, table, weights, None, constants, tile, 0, 1, batch)
        source = area[0, : batch * shape.out_elements].view(batch, *shape.out, width(shape.n))
    if packed.stem.maxpool is not None:
        kernel, stride, padding = packed.stem.maxpool
        pooled = torch.nn.functional.max_pool2d(source.permute(0, 3, 1, 2), kernel, stride, padding).permute(0, 2, 3, 1)
        memory.states[0, : pooled.numel()] = pooled.reshape(-1)
