"""The shortcut of a block, added to an accumulator; and the kernel of a deleted block that is more than its input.

What it computes, for a tile of output pixels and channels, in fp32, with v = x or relu(scale * x + shift):

    IDENTITY    v
    PAD         v averaged over POOL x POOL pixels (if POOL), every STRIDE-th pixel, with zero channels in front and
                behind (option A)
    PROJECTION  bias + convolution of v (averaged over POOL x POOL pixels first, if POOL)

The last convolution of a block adds it to its own accumulator before it writes, so a shortcut is never written
anywhere: identity and pad read one tile of the incoming state, and a projection is a second product on top of the
same accumulator. The kernel `shortcut` is for deleted blocks only (SHORTCUT in the plan).

How work maps to programs, and why in these tiles: as in conv.py, of which it is the end. Memory traffic of a deleted
block: the pixels that the shortcut reads (with stride 2 a quarter of the state) once for each tile of channels, and the
new state written once; there is no intermediate image.

The naive version is `Block.skip` in the reference engine.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .product import product, read_pixels, read_pooled, relu

IDENTITY = tl.constexpr(1)
PAD = tl.constexpr(2)
PROJECTION = tl.constexpr(3)


@triton.jit
def add_shortcut(
    acc,  # fp32 [M, N]
    x_ptr,  # [images, X_H, X_W, X_C], the state that came into the block
    weight_ptr,  # [S_KERNEL * S_KERNEL, X_C, N]
    bias_ptr,  # fp32 [N]
    scale_ptr,  # fp32 [X_C]
    shift_ptr,  # fp32 [X_C]
    image,  # int32 [M], the output pixels
    y,
    x,
    inside,
    n,  # int32 [N], the output channels
    N: tl.constexpr,
    X_C: tl.constexpr,
    X_H: tl.constexpr,
    X_W: tl.constexpr,
    SHORTCUT: tl.constexpr,
    S_KERNEL: tl.constexpr,
    S_STRIDE: tl.constexpr,
    S_PADDING: tl.constexpr,
    S_POOL: tl.constexpr,
    S_BEFORE: tl.constexpr,
    S_PROLOGUE: tl.constexpr,
    S_BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if SHORTCUT == PROJECTION:
        acc = product(
            acc, x_ptr, weight_ptr, scale_ptr, shift_ptr, image, y, x, inside, n, X_C, X_H, X_W, N,
            S_KERNEL, S_STRIDE, S_PADDING, S_PROLOGUE, S_POOL, S_BLOCK_K, PRECISION,
        )  # fmt: skip
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :]
    elif SHORTCUT == IDENTITY:
        # Channels beyond N, which are not stored, read others; a mask would break the reads into single numbers.
        v = read_pixels(x_ptr, scale_ptr, shift_ptr, image, y, x, inside, n % N, X_C, X_H, X_W, S_PROLOGUE, False)
        acc += v.to(tl.float32)
    elif SHORTCUT == PAD:
        k = n - S_BEFORE
        here = (k >= 0) & (k < X_C)
        # Channels that have no counterpart read others of their pixel, in one piece with their neighbours, and are
        # masked after. The first term is a multiple of X_C, so that nothing is negative.
        read = ((S_BEFORE + X_C - 1) // X_C * X_C + k) % X_C
        v = read_pooled(
            x_ptr, scale_ptr, shift_ptr, image, y * S_STRIDE, x * S_STRIDE, inside, read,
            X_C, X_H, X_W, S_PROLOGUE, S_POOL, False,
        )  # fmt: skip
        acc += tl.where(here[None, :], v.to(tl.float32), 0.0)
    return acc


@triton.jit
def tile_of_step(images, PIXELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr):
    """Which step of the launch this program serves, and which pixels: (step, index [M], image, y, x, inside)."""
    tiles = tl.cdiv(images * PIXELS, BLOCK_M)
    step = tl.program_id(0) // tiles
    index = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    pixel = index % PIXELS
    return step, index, index // PIXELS, pixel // WIDTH, pixel % WIDTH, index < images * PIXELS


@triton.jit
def write_tile(out_ptr, acc, index, inside, n, N: tl.constexpr, CHANNELS: tl.constexpr):
    """Store acc [M, N] as the channels n of the pixels `index`; those that fill up a multiple of 16 stay zero."""
    if CHANNELS != N:
        # Zero weights do not keep them zero where a state is infinite.
        acc = tl.where((n < CHANNELS)[None, :], acc, 0.0)
    tl.store(
        out_ptr + (index * N)[:, None] + n[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (n < N)[None, :],
    )


@triton.jit(do_not_specialize=["first", "images"])
def shortcut(
    states_ptr,  # [buffers, state_size]
    steps_ptr,  # int32 [steps, 3]: source, destination, slot of the parameters
    weight_ptr,  # [slots, S_KERNEL * S_KERNEL, X_C, N]
    bias_ptr,  # fp32 [slots, N]
    scale_ptr,  # fp32 [slots, X_C]
    shift_ptr,  # fp32 [slots, X_C]
    first,  # the launch's first step
    images,
    state_size,
    N: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CLOSING: tl.constexpr,
    X_C: tl.constexpr,
    X_H: tl.constexpr,
    X_W: tl.constexpr,
    SHORTCUT: tl.constexpr,
    S_KERNEL: tl.constexpr,
    S_STRIDE: tl.constexpr,
    S_PADDING: tl.constexpr,
    S_POOL: tl.constexpr,
    S_BEFORE: tl.constexpr,
    S_PROLOGUE: tl.constexpr,
    S_BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """states[destination] = shortcut(states[source]) for every step of the launch, and a ReLU with CLOSING."""
    step, index, image, y, x, inside = tile_of_step(images, HEIGHT * WIDTH, WIDTH, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    source = tl.load(steps_ptr + (first + step) * 3).to(tl.int64)
    destination = tl.load(steps_ptr + (first + step) * 3 + 1).to(tl.int64)
    slot = tl.load(steps_ptr + (first + step) * 3 + 2).to(tl.int64)
    acc = add_shortcut(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32),
        states_ptr + source * state_size,
        weight_ptr + slot * (S_KERNEL * S_KERNEL * X_C * N), bias_ptr + slot * N,
        scale_ptr + slot * X_C, shift_ptr + slot * X_C,
        image, y, x, inside, n, N, X_C, X_H, X_W,
        SHORTCUT, S_KERNEL, S_STRIDE, S_PADDING, S_POOL, S_BEFORE, S_PROLOGUE, S_BLOCK_K, PRECISION,
    )  # fmt: skip
    if CLOSING:
        acc = relu(acc)
    write_tile(states_ptr + destination * state_size, acc, index, inside, n, N, CHANNELS)
