"""Parameters as the kernels read them: channels in multiples of 16, blocks of equal shape stacked in one array.

Blocks that differ in nothing but their numbers form a `Group`: one compiled kernel serves all of them, and each step of
a launch names its block's slot in the group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import EngineError
from ..fused import Conv, FusedBlock, FusedNetwork

# The kernels number the elements of a batch with int32.
NUMBERED = 2**31
KINDS = {None: 0, "identity": 1, "pad": 2, "projection": 3}


def width(channels: int) -> int:
    """The channels that are stored for so many: the next multiple of 16, which tl.dot needs."""
    return -(-channels // 16) * 16


def output(size: int, kernel: int, stride: int, padding: int) -> int:
    """The height or width behind a convolution or pooling."""
    return (size + 2 * padding - kernel) // stride + 1


@dataclass(frozen=True)
class ConvShape:
    """A convolution without its numbers: c channels of height x width in, n channels out."""

    c: int
    n: int
    height: int
    width: int
    kernel: int
    stride: int
    padding: int
    relu: bool

    @property
    def out(self) -> tuple[int, int]:
        sizes = (output(size, self.kernel, self.stride, self.padding) for size in (self.height, self.width))
        return tuple(sizes)  # type: ignore[return-value]

    @property
    def out_elements(self) -> int:
        """Of one image, as it is stored."""
        return width(self.n) * self.out[0] * self.out[1]


@dataclass(frozen=True)
class ShortcutShape:
    """A shortcut without its numbers; see `add_shortcut` in shortcut.py."""

    kind: int
    kernel: int
    stride: int
    padding: int
    pool: int
    before: int
    prologue: bool


@dataclass(frozen=True)
class BlockShape:
    """All that two blocks must share to run in one launch."""

    convs: tuple[ConvShape, ...]
    shortcut: ShortcutShape
    prologue: bool
    closing: bool
    shape_in: tuple[int, int, int]
    shape_out: tuple[int, int, int]


@dataclass(frozen=True)
class ConvWeights:
    """The numbers of one convolution of every block of a group."""

    weight: Tensor
    """[slots, kernel * kernel, C, N] in the type of the network"""
    bias: Tensor
    """float32 [slots, N]"""


@dataclass(frozen=True)
class Group:
    shape: BlockShape
    blocks: tuple[int, ...]
    """The block of each slot."""
    convs: tuple[ConvWeights, ...]
    projection: ConvWeights
    """Of one element where the shortcut is none: a pointer that is never read."""
    scale: Tensor
    """float32 [slots, C]; of one element where there is no prologue"""
    shift: Tensor


@dataclass(frozen=True)
class Stem:
    convs: tuple[tuple[ConvShape, ConvWeights], ...]
    maxpool: tuple[int, int, int] | None


@dataclass(frozen=True)
class Head:
    channels: int
    pixels: int
    classes: int
    prologue: bool
    relu: bool
    scale: Tensor
    shift: Tensor
    weight: Tensor
    """float32 [C, classes]"""
    bias: Tensor


@dataclass(frozen=True)
class Packed:
    """A lowered network on one device in one type."""

    stem: Stem
    groups: tuple[Group, ...]
    slot_of: dict[int, tuple[int, int]]
    """block -> (group, slot)"""
    head: Head
    state_elements: int
    """The largest state of one image, as it is stored."""
    image_elements: int
    """The largest of all that an image becomes on its way, the stem and the insides of blocks included."""
    input_shape: tuple[int, int, int]
    device: torch.device
    dtype: torch.dtype


def check_numbered(elements: int, images: int) -> None:
    """EngineError unless the kernels can number so many elements, those of so many images."""
    if elements > NUMBERED:
        raise EngineError(
            f"{images} image(s) take {elements:,} elements in one place, and the triton engine's kernels number "
            f"{NUMBERED:,} at most; use {'smaller batches' if images > 1 else 'smaller images or the torch engine'}"
        )


def conv_shape(conv: Conv, height: int, width: int) -> ConvShape:
    n, c, kernel, _ = conv.weight.shape
    return ConvShape(c, n, height, width, kernel, conv.stride, conv.padding, conv.relu)


def block_shape(block: FusedBlock, shape_in: tuple[int, int, int]) -> BlockShape:
    """What a block is behind a state of that shape; EngineError if branch and shortcut disagree about the result."""
    _, height, columns = shape_in
    convs = []
    for conv in block.convs:
        convs.append(conv_shape(conv, height, columns))
        height, columns = convs[-1].out
    side = block.shortcut
    kernel, stride, padding = 1, side.stride, 0
    if side.conv is not None:
        kernel, stride, padding = side.conv.weight.shape[-1], side.conv.stride, side.conv.padding
    shape = ShortcutShape(
        KINDS[side.kind], kernel, stride, padding, side.pool, side.before, side.activated and block.scale is not None
    )
    shape_out = (convs[-1].n, height, columns)
    sizes = tuple(output(size // max(1, side.pool), kernel, stride, padding) for size in shape_in[1:])
    if sizes != shape_out[1:]:
        raise EngineError(
            f"the branch of block {block.index} ({block.name}) gives {height} x {columns} pixels, its shortcut "
            f"{sizes[0]} x {sizes[1]}; use images of another size or the torch engine"
        )
    return BlockShape(tuple(convs), shape, block.scale is not None, block.closing_relu, shape_in, shape_out)


def vectors(rows: list[Tensor | None], device: torch.device) -> Tensor:
    """float32 [slots, width]; one zero where there are none."""
    if rows[0] is None:
        return torch.zeros(1, device=device, dtype=torch.float32)
    stacked = torch.stack([row.float() for row in rows if row is not None])
    return pad(stacked, (0, width(stacked.shape[1]) - stacked.shape[1])).to(device).contiguous()


def conv_weights(convs: list[Conv | None], device: torch.device, dtype: torch.dtype) -> ConvWeights:
    """The same convolution of several blocks, stacked."""
    real = [conv for conv in convs if conv is not None]
    if not real:
        return ConvWeights(torch.zeros(1, device=device, dtype=dtype), vectors([None], device))
    weight = torch.stack([conv.weight.float() for conv in real])  # [slots, N, C, kernel, kernel]
    n, c = weight.shape[1:3]
    weight = pad(weight.flatten(3).permute(0, 3, 2, 1), (0, width(n) - n, 0, width(c) - c))
    return ConvWeights(weight.to(device, dtype).contiguous(), vectors([conv.bias for conv in real], device))


def pack(
    network: FusedNetwork, device: torch.device, dtype: torch.dtype, size: tuple[int, int] | None = None
) -> Packed:
    """Group, stack and fill up a lowered network for images of `size` (height, width), by default its own.

    Raises EngineError when a block's branch and shortcut disagree at that size, or one image is too large to number.
    """
    height, columns = size or network.input_shape[1:]
    stem = []
    for conv in network.stem.convs:
        stem.append((conv_shape(conv, height, columns), conv_weights([conv], device, dtype)))
        height, columns = stem[-1][0].out
    if network.stem.maxpool is not None:
        height, columns = (output(n, *network.stem.maxpool) for n in (height, columns))
    members: dict[BlockShape, list[FusedBlock]] = {}
    state = (stem[-1][0].n, height, columns)
    largest = width(state[0]) * height * columns
    for block in network.blocks:
        shape = block_shape(block, state)
        members.setdefault(shape, []).append(block)
        state = shape.shape_out
        largest = max(largest, width(state[0]) * state[1] * state[2])
    groups: list[Group] = []
    slot_of: dict[int, tuple[int, int]] = {}
    for shape, blocks in members.items():
        for slot, block in enumerate(blocks):
            slot_of[block.index] = (len(groups), slot)
        groups.append(
            Group(
                shape,
                tuple(block.index for block in blocks),
                tuple(conv_weights([b.convs[i] for b in blocks], device, dtype) for i in range(len(shape.convs))),
                conv_weights([b.shortcut.conv for b in blocks], device, dtype),
                vectors([b.scale for b in blocks], device),
                vectors([b.shift for b in blocks], device),
            )
        )
    inside = [conv.out_elements for shape in members for conv in shape.convs]
    inside += [max(s.out_elements, width(s.c) * s.height * s.width) for s, _ in stem]
    check_numbered(max(largest, *inside), 1)
    head = network.head
    weight = pad(head.weight.float().T, (0, 0, 0, width(state[0]) - state[0])).to(device).contiguous()
    return Packed(
        Stem(tuple(stem), network.stem.maxpool),
        tuple(groups),
        slot_of,
        Head(
            channels=state[0],
            pixels=state[1] * state[2],
            classes=len(head.weight),
            prologue=head.scale is not None,
            relu=head.relu,
            scale=vectors([head.scale], device),
            shift=vectors([head.shift], device),
            weight=weight,
            bias=head.bias.float().to(device),
        ),
        largest,
        max(largest, *inside),
        (network.input_shape[0], *(size or network.input_shape[1:])),
        device,
        dtype,
    )
