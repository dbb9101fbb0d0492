"""What the CUDA tape kernel reads: coverage, the packed weights and the table of blocks (csrc/cuda/tape.h)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..errors import NotCovered

if TYPE_CHECKING:
    from ..fused import Conv, FusedBlock, FusedNetwork

WIDTHS, SIDES = (16, 32), (32, 16, 8)
MAX_CLASSES = 448
SCALED, CLOSING, PROJECTED, ACTIVATED = 1, 2, 4, 8


@dataclass(frozen=True)
class Packed:
    """A network in the kernel's layout, on one device.

    `weights` uint8 [bytes]; `parameters` float32 [n]; `blocks` int32 [blocks, 6] on the CPU (stage, changes, flags,
    before, offset in parameters, offset in weights); `head` = (offset in parameters, scaled, relu, classes);
    `stem` float32 [(9 * in_channels + 1) * width]; `stem_relu`; `width` 16 or 32, the channels of the first stage.
    """

    weights: torch.Tensor
    parameters: torch.Tensor
    blocks: torch.Tensor
    head: tuple[int, int, int, int]
    stem: torch.Tensor
    stem_relu: bool
    in_channels: int
    width: int
    dtype: torch.dtype

    def operands(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """`layout` int32 [10] on the CPU and `packed` uint8 on the device, as resens_fast::eval takes them."""
        pieces, starts, size = [], [], 0
        for piece in (self.weights, self.parameters, self.stem):
            data = piece.contiguous().view(torch.uint8)
            pieces += [data, data.new_zeros(-len(data) % 16)]  # the kernels read 16 bytes at a time
            starts.append(size)
            size += len(data) + len(pieces[-1])
        fields = [int(self.dtype == torch.float16), self.width, self.in_channels, int(self.stem_relu), *self.head]
        return torch.tensor([*fields, *starts[1:]], dtype=torch.int32, device="cpu"), torch.cat(pieces).to(device)


def _convolution(conv: Conv, size: int, stride: int) -> str | None:
    weight = tuple(conv.weight.shape[2:])
    if weight != (size, size) or conv.stride != stride or conv.padding != size // 2:
        return f"a {weight[0]}x{weight[1]} convolution with stride {conv.stride} and padding {conv.padding}"
    return None


def _shapes(width: int) -> list[tuple[int, ...]]:
    return [(width << stage, side, side) for stage, side in enumerate(SIDES)]


def _refuse_block(block: FusedBlock, shapes: list[tuple[int, ...]]) -> str | None:
    if tuple(block.shape_in) not in shapes or tuple(block.shape_out) not in shapes:
        channels = ", ".join(str(shape[0]) for shape in shapes)
        return f"has shape {tuple(block.shape_in)}; the kernel holds {channels} channels at 32, 16 and 8 pixels"
    if len(block.convs) != 2 or not block.convs[0].relu or block.convs[1].relu:
        return f"is no basic block: {len(block.convs)} convolutions, the kernel has two with a ReLU between"
    before, after = shapes.index(tuple(block.shape_in)), shapes.index(tuple(block.shape_out))
    short, changes = block.shortcut, after - before
    if changes not in (0, 1):
        return f"goes from shape {tuple(block.shape_in)} to {tuple(block.shape_out)}"
    odd = _convolution(block.convs[0], 3, 1 + changes) or _convolution(block.convs[1], 3, 1)
    if odd:
        return f"has {odd}"
    if not changes:
        plain = short.kind == "identity" and not (short.activated and block.scale is not None)
        return None if plain else f"has a {short.kind} shortcut without a change of shape that is not x itself"
    if short.pool:
        return "pools before its shortcut"
    if short.kind == "pad" and short.stride == 2 and short.before + short.after == shapes[before][0]:
        return None
    if short.kind == "projection" and short.conv is not None:
        odd = _convolution(short.conv, 1, 2)
        return f"has a shortcut with {odd}" if odd or short.conv.relu else None
    return f"has a {short.kind} shortcut with stride {short.stride}"


def refuses(net: FusedNetwork) -> str | None:
    """Why the tape kernel does not cover the network, naming the block; None when it does."""
    if tuple(net.input_shape[1:]) != (32, 32):
        return f"images are {net.input_shape[1]}x{net.input_shape[2]}; the kernel takes 32x32"
    if len(net.stem.convs) != 1 or net.stem.maxpool or _convolution(net.stem.convs[0], 3, 1):
        return "the stem is not one 3x3 convolution"
    width = net.stem.convs[0].weight.shape[0]
    if width not in WIDTHS:
        return f"the stem has {width} channels; the kernel takes {' or '.join(map(str, WIDTHS))}"
    shapes = _shapes(width)
    for block in net.blocks:
        reason = _refuse_block(block, shapes)
        if reason:
            return f"block {block.index} ({block.name}) {reason}"
    if not net.blocks or tuple(net.blocks[-1].shape_out) != shapes[-1]:
        return f"the last block does not reach {shapes[-1][0]} channels at 8x8"
    if not 1 <= net.classes <= MAX_CLASSES:
        return f"{net.classes} classes; the kernel counts up to {MAX_CLASSES}"
    return None


_LANE = torch.arange(32, device="cpu").view(32, 1, 1)
_REGISTER = torch.arange(4, device="cpu").view(1, 4, 1)
_PARITY = torch.arange(2, device="cpu").view(1, 1, 2)
_ROW = _LANE % 4 * 2 + _PARITY + 8 * (_REGISTER & 1)  # k of an m16n8k16 B fragment, two of which lie side by side
_FRAGMENT = ((_REGISTER >> 1) * 8 + _LANE // 4) * 16 + _ROW  # [lane, register, 2] into [16 outputs, 16 inputs]


def pack_weight(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """B fragments of a convolution [O, I, k, k], k 3 or 1, as 16-bit integers in one dimension.

    3x3: [dx][input / 16][dy][output / 16][lane][4][2]; 1x1: [input / 16][output / 16][lane][4][2].
    """
    out, inputs, size, _ = weight.shape
    bits = weight.to(dtype).view(torch.int16).view(out // 16, 16, inputs // 16, 16, size, size)
    tiles = bits.permute(5, 2, 4, 0, 1, 3).reshape(size, inputs // 16, size, out // 16, 256)
    return tiles[..., _FRAGMENT].reshape(-1)


class _Floats:
    """Parameters one after another, each at an even offset."""

    def __init__(self) -> None:
        self.pieces: list[torch.Tensor] = []
        self.size = 0

    def add(self, *values: torch.Tensor) -> int:
        start = self.size
        for value in values:
            value = value.detach().reshape(-1).float().cpu()
            if value.numel() % 2:
                value = torch.cat([value, value.new_zeros(1)])
            self.pieces.append(value)
            self.size += value.numel()
        return start


def _floats_of(block: FusedBlock) -> list[torch.Tensor]:
    inputs, outputs = block.shape_in[0], block.shape_out[0]
    scale = block.scale if block.scale is not None else torch.ones(inputs, device="cpu")
    shift = block.shift if block.shift is not None else torch.zeros(inputs, device="cpu")
    projected = block.shortcut.conv
    last = projected.bias if projected is not None else torch.zeros(outputs, device="cpu")
    return [block.convs[0].bias, block.convs[1].bias, scale, shift, last]


def pack(net: FusedNetwork, dtype: torch.dtype) -> Packed:
    """The network in the kernel's layout on the CPU; `dtype` bfloat16 or float16 for weights and operands.

    Raises NotCovered naming the block when the kernel does not cover it or a weight overflows in `dtype`.
    """
    reason = refuses(net)
    if reason:
        raise NotCovered(reason)
    floats, weights, rows, offset = _Floats(), [], [], 0
    shapes = _shapes(net.stem.convs[0].weight.shape[0])
    for block in net.blocks:
        changes = tuple(block.shape_in) != tuple(block.shape_out)
        projected = block.shortcut.kind == "projection"
        # Without a prologue h is x, and the operands of x are in shared memory anyway.
        activated = projected if block.scale is None else changes and block.shortcut.activated
        flags = SCALED * (block.scale is not None) + CLOSING * block.closing_relu
        flags += PROJECTED * projected + ACTIVATED * activated
        before = block.shortcut.before if block.shortcut.kind == "pad" else 0
        start = floats.add(*_floats_of(block))
        rows.append([shapes.index(tuple(block.shape_out)), int(changes), flags, before, start, offset])
        convs = ([block.shortcut.conv] if block.shortcut.conv is not None else []) + list(block.convs)
        for conv in convs:
            weight = conv.weight.detach().float().cpu()
            if not torch.isfinite(weight.to(dtype)).all():
                raise NotCovered(f"block {block.index} ({block.name}) has weights that overflow in {dtype}")
            packed = pack_weight(weight, dtype)
            weights.append(packed)
            offset += packed.numel() * 2
    head = net.head
    classes, channels = head.weight.shape
    scaled = head.scale is not None
    scale = torch.ones(channels, device="cpu") if head.scale is None else head.scale
    shift = torch.zeros(channels, device="cpu") if head.shift is None else head.shift
    at = floats.add(head.weight, head.bias, scale, shift)
    stem = net.stem.convs[0]
    stem_floats = torch.cat(
        [stem.weight.detach().float().cpu().permute(1, 2, 3, 0).reshape(-1), stem.bias.float().cpu()]
    )
    return Packed(
        weights=torch.cat(weights).view(torch.uint8),
        parameters=torch.cat(floats.pieces),
        blocks=torch.tensor(rows, dtype=torch.int32, device="cpu"),
        head=(at, int(scaled), int(head.relu), classes),
        stem=stem_floats.contiguous(),
        stem_relu=stem.relu,
        in_channels=int(stem.weight.shape[1]),
        width=shapes[0][0],
        dtype=dtype,
    )
