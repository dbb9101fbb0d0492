"""One block as differentiable operators: fused forward kernels, and backward kernels for its input and its weights.

`resens_fast::triton_block` and `resens_fast::triton_block_backward` take the folded parameters of a block (batch norms
frozen; the folding is left to autograd, which brings the gradients to the parameters behind it) and states
[images, y, x, channels filled up to a multiple of 16]. They go through the kernels of the studies: conv.py forward,
transpose.py and weights.py backward, one step for each group of images that shares a gate.

Gates have no gradient here; asking for one raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .. import fused
from . import backward, launch, tiles
from .pack import BlockShape, ConvShape, Group, block_shape, check_numbered, conv_weights, vectors, width

KINDS = ("identity", "pad", "projection")
# The parameters of a block as the operators take them: `parameters` makes them, `_block` reads them back.
_PARAMETERS = (
    "Tensor[] weights, Tensor[] biases, Tensor? s_weight, Tensor? s_bias, Tensor? scale, Tensor? shift, "
    "Tensor gates, int[] layout"
)
_GATES = 6


def run(block: fused.FusedBlock, x: Tensor, gates: Tensor) -> Tensor:
    """The block's output for states x [B, H, W, C'] whose branch is scaled by gates float32 [S], of which each serves
    B / S images in a row. Differentiable in x and the block's parameters.
    """
    result: Tensor = torch.ops.resens_fast.triton_block(x.contiguous(), *parameters(block, gates))[0]
    return result


def parameters(block: fused.FusedBlock, gates: Tensor) -> tuple[Any, ...]:
    side = block.shortcut
    head = [block.shape_in[0], int(block.closing_relu), KINDS.index(side.kind), side.stride, side.before, side.after]
    head += [side.pool, int(side.activated), *((side.conv.stride, side.conv.padding) if side.conv else (0, 0))]
    return (
        [conv.weight for conv in block.convs],
        [conv.bias for conv in block.convs],
        side.conv.weight if side.conv else None,
        side.conv.bias if side.conv else None,
        block.scale,
        block.shift,
        gates,
        [*head, *(v for conv in block.convs for v in (conv.stride, conv.padding, int(conv.relu)))],
    )


def _block(x: Tensor, given: tuple[Any, ...]) -> tuple[fused.FusedBlock, BlockShape]:
    """The block that `parameters` were made of, and its shape behind the state x."""
    weights, biases, s_weight, s_bias, scale, shift, _, layout = given
    channels, closing, kind, stride, before, after, pool, activated, s_stride, s_padding, *rest = layout
    side = None if s_weight is None else fused.Conv(s_weight, s_bias, s_stride, s_padding, False)
    shortcut = fused.Shortcut(KINDS[kind], stride, before, after, pool, side, bool(activated))
    each = zip(weights, biases, rest[0::3], rest[1::3], rest[2::3], strict=True)
    convs = tuple(fused.Conv(w, b, s, p, bool(r)) for w, b, s, p, r in each)
    shape_in = (channels, x.shape[1], x.shape[2])
    block = fused.FusedBlock(0, "", scale, shift, convs, shortcut, bool(closing), shape_in, shape_in)
    return block, block_shape(block, shape_in)


def _steps(count: int, device: torch.device) -> Tensor:
    """int32 [count, 3]: step i reads and writes image group i, with the only parameters there are."""
    number = torch.arange(count, device=device, dtype=torch.int32)
    return torch.stack([number, number, torch.zeros_like(number)], dim=1)


@torch.library.custom_op("resens_fast::triton_block", mutates_args=(), schema=f"(Tensor x, {_PARAMETERS}) -> Tensor[]")
def triton_block(x: Tensor, *given: Any) -> list[Tensor]:
    """[output, what each convolution but the last wrote], all [images, y, x, channels]."""
    block, shape = _block(x, given)
    device, dtype = x.device, x.dtype
    group = Group(
        shape, (0,), tuple(conv_weights([conv], device, dtype) for conv in block.convs),
        conv_weights([block.shortcut.conv], device, dtype), vectors([block.scale], device),
        vectors([block.shift], device),
    )  # fmt: skip
    gates = given[_GATES].to(device, torch.float32)
    count = len(gates)
    check_numbered(max(x.numel(), *(len(x) * conv.out_elements for conv in shape.convs)), len(x))
    made = [x.new_empty(len(x), *conv.out, width(conv.n)) for conv in shape.convs]
    table, states = (_steps(count, device), gates), x.view(count, -1)
    source = states
    for index, (conv, weights) in enumerate(zip(shape.convs, group.convs, strict=True)):
        constants = launch.conv_constants(shape, index, conv, dtype)
        tile = tiles.choose(conv, dtype, device, constants["PROLOGUE"], constants["SHORTCUT"])
        target = made[index].view(count, -1)
        launch.launch_conv(
            source, target, states, table, weights, group, constants, tile, 0, count, len(x) // count
        )  # fmt: skip
        source = target
    return [made[-1], *made[:-1]]


@triton_block.register_fake
def _(x: Tensor, *given: Any) -> list[Tensor]:
    _, shape = _block(x, given)
    made = [x.new_empty(x.shape[0], *conv.out, width(conv.n)) for conv in shape.convs]
    return [made[-1], *made[:-1]]


@torch.library.custom_op(
    "resens_fast::triton_block_backward",
    mutates_args=(),
    schema=f"(Tensor g, Tensor[] made, bool for_weights, Tensor x, {_PARAMETERS}) -> Tensor[]",
)
def triton_block_backward(g: Tensor, made: list[Tensor], for_weights: bool, x: Tensor, *given: Any) -> list[Tensor]:
    """The gradient of x and, `for_weights`, those of the weights, the biases and, where there are any, the projection's
    weight and bias, scale and shift; from the gradient g of the output and what the forward made.
    """
    block, shape = _block(x, given)
    gates = given[_GATES].to(x.device, torch.float32)
    y, *inner = made
    if shape.closing:
        g = torch.where(y <= 0, 0, g)
    scale = shift = None
    if block.scale is not None:
        scale, shift = vectors([block.scale], x.device)[0], vectors([block.shift], x.device)[0]
    # Towards the branch: rounded once more where a gate is not 1.
    d = (g.reshape(len(gates), -1) * gates[:, None]).to(x.dtype).view_as(g)
    found: list[Tensor] = []
    biases: list[Tensor] = []
    for index in reversed(range(len(shape.convs))):
        conv, source = shape.convs[index], inner[index - 1] if index else x
        if for_weights:
            behind = (scale, shift) if index == 0 else (None, None)
            found.insert(0, backward.launch_weight_gradient(source, d, conv, *behind, 0))
            biases.insert(0, d.float().sum((0, 1, 2))[: conv.n])
        d = _transposed(d, block.convs[index], shape, index, source)
    found += biases
    beside = g if shape.shortcut.kind == 1 else _shortcut_transposed(g, block, shape, x)
    side, read = block.shortcut.conv, block.shortcut.activated
    if side is not None and for_weights:
        pool = shape.shortcut.pool
        height, columns = (size // max(1, pool) for size in x.shape[1:3])
        conv = ConvShape(shape.shape_in[0], shape.shape_out[0], height, columns, side.weight.shape[-1],
                         side.stride, side.padding, False)  # fmt: skip
        behind = (scale, shift) if read else (None, None)
        found += [backward.launch_weight_gradient(x, g, conv, *behind, pool), g.float().sum((0, 1, 2))[: conv.n]]
    h, rest = d.float(), beside.float()
    if scale is not None and shift is not None:
        h, rest = (h + rest, torch.zeros_like(h)) if read else (h, rest)
        h = torch.where(x.float() * scale + shift <= 0, 0, h)
        if for_weights:
            real = shape.shape_in[0]
            found += [(h * x.float()).sum((0, 1, 2))[:real], h.sum((0, 1, 2))[:real]]
        h = h * scale
    return [(h + rest).to(x.dtype), *found]


@triton_block_backward.register_fake
def _(g: Tensor, made: list[Tensor], for_weights: bool, x: Tensor, *given: Any) -> list[Tensor]:
    weights, biases, *others = given[:_GATES]
    like = [*weights, *biases, *(v for v in others if v is not None)] if for_weights else []
    return [torch.empty_like(x), *(v.new_empty(v.shape, dtype=torch.float32) for v in like)]


def _transposed(d: Tensor, conv: fused.Conv, shape: BlockShape, index: int, source: Tensor) -> Tensor:
    """The gradient of a convolution's input, masked by the ReLU that fed it; a prologue is left to the caller."""
    here, device = shape.convs[index], d.device
    out = torch.empty_like(source)
    relu = index > 0 and backward.feeding_relu(shape, index)
    bits = torch.empty(1, source.numel() // 16 if relu else 1, device=device, dtype=torch.int16)
    if relu:
        backward.launch_signs(source, bits, None, None, here.c)
    one = torch.ones(1, device=device, dtype=torch.float32)
    constants = backward.conv_constants(shape, index, d.dtype) | {"PROLOGUE": False, "RELU": relu, "CLOSED": False}
    backward.launch_conv_transpose(
        d.view(1, -1), out.view(1, -1), (_steps(1, device), one), conv_weights([conv], device, d.dtype).weight, one,
        (bits, bits), constants, tiles.of_device(here.c, d.dtype, device), 0, 1, len(d),
    )  # fmt: skip
    return out


def _shortcut_transposed(g: Tensor, block: fused.FusedBlock, shape: BlockShape, x: Tensor) -> Tensor:
    """The gradient of what the shortcut read: the state, or the prologue's output."""
    states = g.new_empty(2, max(g.numel(), x.numel()))
    states[0, : g.numel()] = g.reshape(-1)
    one = torch.ones(1, device=g.device, dtype=torch.float32)
    bits = torch.empty(1, 1, device=g.device, dtype=torch.int16)
    weight = conv_weights([block.shortcut.conv], g.device, g.dtype).weight
    constants = backward.skip_constants(shape, g.dtype) | {"PROLOGUE": False, "CLOSED": False}
    step = torch.tensor([[0, 1, 0]], device=g.device, dtype=torch.int32)
    backward.launch_shortcut_transpose(states, step, weight, one, (bits, bits), constants, 0, 1, len(g))
    return states[1, : x.numel()].view_as(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, biases, *others, layout = inputs
    ctx.counts, ctx.layout, ctx.given = (len(output), len(weights)), layout, [v is not None for v in others]
    ctx.save_for_backward(*output, x, *weights, *biases, *(v for v in others if v is not None))


def _gradients(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    if ctx.needs_input_grad[1 + _GATES]:
        raise NotImplementedError("the triton engine has no gradient with respect to gates; use the network's modules")
    made, count = ctx.counts
    saved = list(ctx.saved_tensors)
    outputs, (x, *tensors) = saved[:made], saved[made:]
    weights, biases, rest = tensors[:count], tensors[count : 2 * count], iter(tensors[2 * count :])
    others = [next(rest) if there else None for there in ctx.given]
    needed = any(tree_leaves(ctx.needs_input_grad[1:]))
    found = torch.ops.resens_fast.triton_block_backward(
        grads[0].contiguous(), outputs, needed, x, weights, biases, *others, ctx.layout
    )
    dx, *found = found
    if not needed:
        return (dx, [None] * count, [None] * count, *(None for _ in others), None)
    typed = [each.to(like.dtype) for each, like in zip(found, [*weights, *biases, *_real(others)], strict=True)]
    left = iter(typed[2 * count :])
    beside = [None if v is None else next(left) for v in others[:-1]]
    return (dx, typed[:count], typed[count : 2 * count], *beside, None, None)


def _no_second(*_: Any) -> Any:
    raise NotImplementedError("the triton engine has first derivatives only; leave the engine out for second ones")


def _real(others: list[Tensor | None]) -> list[Tensor]:
    """Those that are there, but for the gates, which come last."""
    return [v for v in others[:-1] if v is not None]


triton_block.register_autograd(_gradients, setup_context=_save)
triton_block_backward.register_autograd(_no_second)
