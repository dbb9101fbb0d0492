"""One step of a block's backward pass, for every path of a level at once: the transposes of conv.py and shortcut.py.

What `conv_transpose` computes, for each step (source, destination, slot, gate) of the launch, g the gradient of a
convolution's output:

    t = transposed conv(g, weight[slot])         g = in
    t = gate * t                                 with FROM_STATE, the block's last convolution, which comes first
    t = scale[slot] * t                          with PROLOGUE, the block's first convolution behind a scale and ReLU
    t = t where the ReLU was open                with RELU: the one that fed the convolution, bits in relu[slot]
    t = t where the ReLU was open                with CLOSED: the one that closed the block before, bits in closed[slot]
    out = t, rounded once to the type of the state

A path enters a block through its branch only or through its shortcut only, so nothing is added up: `conv_transpose`
runs for the chosen blocks, `shortcut_transpose` for the others. Both leave a state that the closing ReLU of the block
before has already masked. That block's own letter would do it first thing, chosen or not, so it is the same gradient;
but here each element is masked once, and not once for each of the nine taps that read it. (Where some blocks close
with a ReLU and others do not, a state could be both; the engine refuses such networks.)

How work maps to programs, and why in these tiles: as in conv.py, the pixels and channels of the convolution's *input*
being the tiles. Each program gathers: for a tap (i, j), input pixel y was read by output pixel (y + PADDING - i) /
STRIDE if that is whole. So no two programs write the same element, nothing is added in memory, and sums have one order.
With stride 2 three of four products are by zeros; that is two blocks of ResNet-110's 54, at twice the time of another
block.

The weights are those of the forward, read along the other axis: [tap, C, N] as a product of depth N. No second copy
is kept. Memory traffic per pixel and step of a basic block with c channels of b bytes: the state is read once and
written once, the intermediate written and read once, 4cb bytes and c/4 of bits, for 18c² multiply-adds.

The naive version is autograd through `_along` in the reference engine.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .product import dot, load
from .shortcut import IDENTITY, PAD, PROJECTION, tile_of_step, write_tile
from .signs import open_relu


@triton.jit
def read_output(
    g_ptr,  # [images, HEIGHT, WIDTH, N]
    image,  # int32 [M]
    y,  # int32 [M], STRIDE times the output pixel
    x,  # int32 [M]
    inside,  # bool [M]
    k,  # int32 [K], output channels
    N: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    AGAIN: tl.constexpr,
):
    """The gradient [M, K] of the output pixels (y, x) / STRIDE; zero where that is no pixel."""
    # A negative y fails one of the tests whichever way it is divided.
    inside = inside & (y >= 0) & (x >= 0) & (y % STRIDE == 0) & (x % STRIDE == 0)
    row, column = y // STRIDE, x // STRIDE
    inside = inside & (row < HEIGHT) & (column < WIDTH)
    at = (((image * HEIGHT + row) * WIDTH + column) * N)[:, None] + k[None, :]
    return load(g_ptr, at, inside, AGAIN)


@triton.jit
def product_transposed(
    acc,  # fp32 [M, C]
    g_ptr,  # [images, HEIGHT, WIDTH, N]
    weight_ptr,  # [KERNEL * KERNEL, C, N]
    image,  # int32 [M], the input pixels
    y,  # int32 [M]
    x,  # int32 [M]
    inside,  # bool [M]
    c,  # int32 [C], the input channels
    C: tl.constexpr,
    N: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc plus the gradient that reaches the input, tap by tap and BLOCK_K channels at a time, always in this order."""
    CHUNKS: tl.constexpr = N // BLOCK_K
    for i in range(KERNEL * KERNEL * CHUNKS):
        tap = i // CHUNKS
        k = (i % CHUNKS) * BLOCK_K + tl.arange(0, BLOCK_K)
        row, column = y + PADDING - tap // KERNEL, x + PADDING - tap % KERNEL
        g = read_output(g_ptr, image, row, column, inside, k, N, HEIGHT, WIDTH, STRIDE, KERNEL > 1)
        w = tl.load(weight_ptr + ((tap * C + c) * N)[None, :] + k[:, None], mask=(c < C)[None, :], other=0.0)
        acc = dot(g, w, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["first", "images"])
def conv_transpose(
    in_ptr,  # FROM_STATE: the states; else the scratch [steps of the launch, in_size]
    out_ptr,  # LAST: the states; else the scratch [steps of the launch, out_size]
    steps_ptr,  # int32 [steps, 3]: source, destination, slot of the parameters
    gates_ptr,  # fp32 [steps]
    weight_ptr,  # [slots, KERNEL * KERNEL, C, N]
    scale_ptr,  # fp32 [slots, C], for PROLOGUE
    relu_ptr,  # int16 [slots, relu_size], for RELU
    closed_ptr,  # int16 [slots, closed_size], for CLOSED
    first,  # the launch's first step
    images,
    in_size,  # elements from one image batch to the next
    out_size,
    relu_size,
    closed_size,
    C: tl.constexpr,
    N: tl.constexpr,
    CHANNELS: tl.constexpr,  # those of the C that are real
    H: tl.constexpr,
    W: tl.constexpr,
    HEIGHT: tl.constexpr,  # of the convolution's output
    WIDTH: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    FROM_STATE: tl.constexpr,
    LAST: tl.constexpr,
    RELU: tl.constexpr,
    PROLOGUE: tl.constexpr,
    CLOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    step, index, image, y, x, inside = tile_of_step(images, H * W, W, BLOCK_M)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    source = tl.load(steps_ptr + (first + step) * 3).to(tl.int64)
    destination = tl.load(steps_ptr + (first + step) * 3 + 1).to(tl.int64)
    slot = tl.load(steps_ptr + (first + step) * 3 + 2).to(tl.int64)

    came_from = source if FROM_STATE else step.to(tl.int64)
    acc = product_transposed(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32),
        in_ptr + came_from * in_size, weight_ptr + slot * (KERNEL * KERNEL * C * N),
        image, y, x, inside, c, C, N, HEIGHT, WIDTH, KERNEL, STRIDE, PADDING, BLOCK_K, PRECISION,
    )  # fmt: skip
    if FROM_STATE:
        acc *= tl.load(gates_ptr + first + step)
    if PROLOGUE:
        acc *= tl.load(scale_ptr + slot * C + c, mask=c < C, other=0.0)[None, :]
    if RELU:
        acc = open_relu(acc, relu_ptr + slot * relu_size, index, inside, c, C)
    if CLOSED:
        acc = open_relu(acc, closed_ptr + slot * closed_size, index, inside, c, C)
    goes_to = destination if LAST else step.to(tl.int64)
    write_tile(out_ptr + goes_to * out_size, acc, index, inside, c, C, CHANNELS)


@triton.jit(do_not_specialize=["first", "images"])
def shortcut_transpose(
    states_ptr,  # [buffers, state_size]
    steps_ptr,  # int32 [steps, 3]: source, destination, slot of the parameters
    weight_ptr,  # [slots, KERNEL * KERNEL, C, N]
    scale_ptr,  # fp32 [slots, C], for PROLOGUE
    relu_ptr,  # int16 [slots, relu_size], for PROLOGUE
    closed_ptr,  # int16 [slots, closed_size], for CLOSED
    first,  # the launch's first step
    images,
    state_size,
    relu_size,
    closed_size,
    C: tl.constexpr,
    N: tl.constexpr,
    CHANNELS: tl.constexpr,  # those of the C that are real
    H: tl.constexpr,
    W: tl.constexpr,
    HEIGHT: tl.constexpr,  # of the shortcut's output
    WIDTH: tl.constexpr,
    SHORTCUT: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    POOL: tl.constexpr,
    BEFORE: tl.constexpr,
    PROLOGUE: tl.constexpr,
    CLOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """states[destination] = the gradient states[source] of the shortcut's output, brought to its input."""
    step, index, image, y, x, inside = tile_of_step(images, H * W, W, BLOCK_M)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    source = tl.load(steps_ptr + (first + step) * 3).to(tl.int64)
    destination = tl.load(steps_ptr + (first + step) * 3 + 1).to(tl.int64)
    slot = tl.load(steps_ptr + (first + step) * 3 + 2).to(tl.int64)

    g_ptr = states_ptr + source * state_size
    pooled = inside
    if POOL > 1:
        # Pixels that fill no whole pool are dropped by it; the others of a pool share its gradient.
        y, x = y // POOL, x // POOL
        pooled = inside & (y < H // POOL) & (x < W // POOL)
    if SHORTCUT == PROJECTION:
        acc = product_transposed(
            tl.zeros([BLOCK_M, BLOCK_N], tl.float32), g_ptr, weight_ptr + slot * (KERNEL * KERNEL * C * N),
            image, y, x, pooled, c, C, N, HEIGHT, WIDTH, KERNEL, STRIDE, PADDING, BLOCK_K, PRECISION,
        )  # fmt: skip
    elif SHORTCUT == IDENTITY:
        # Here and below channels beyond C, which are not stored, read others; a mask would break the reads into single
        # numbers.
        acc = read_output(g_ptr, image, y, x, pooled, c % C, N, HEIGHT, WIDTH, 1, False).to(tl.float32)
    else:
        tl.static_assert(SHORTCUT == PAD)
        k = (c + BEFORE) % N
        acc = read_output(g_ptr, image, y, x, pooled, k, N, HEIGHT, WIDTH, STRIDE, False).to(tl.float32)
    if POOL > 1:
        acc *= 1.0 / (POOL * POOL)
    if PROLOGUE:
        acc *= tl.load(scale_ptr + slot * C + c, mask=c < C, other=0.0)[None, :]
        acc = open_relu(acc, relu_ptr + slot * relu_size, index, inside, c, C)
    if CLOSED:
        acc = open_relu(acc, closed_ptr + slot * closed_size, index, inside, c, C)
    write_tile(states_ptr + destination * state_size, acc, index, inside, c, C, CHANNELS)
