"""The gradient of a convolution's weights, for training with frozen batch norms.

What it computes, for every tap (i, j), input channel c and output channel n, g the gradient of the output:

    sum over images and output pixels (y, x) of  v[image, y*STRIDE - PADDING + i, x*STRIDE - PADDING + j, c]
                                                 * g[image, y, x, n]
    v = in, or relu(scale * in + shift) with PROLOGUE, averaged over POOL x POOL pixels if POOL

A matrix product whose depth is the pixels of the whole batch and whose result is small (9c² numbers), so the depth is
what there is to share out.

How work maps to programs: axis 0 is (tap, tile of BLOCK_C input channels), axis 1 the tile of BLOCK_N output channels,
axis 2 one of `splits` ranges of CHUNKS * BLOCK_P pixels. Each program walks over its pixels BLOCK_P at a time,
multiplies [BLOCK_C, BLOCK_P] with [BLOCK_P, BLOCK_N] and keeps its sum in registers, fp32. The ranges' sums are stored
side by side and added up by the caller: no atomics, so a batch's gradient is the same every time (of another batch, of
course, it is another sum).

Memory traffic: input and output gradient are read once for each tap and opposite tile, mostly from L2; a tile of all
nine taps would need nine accumulators and spill.

The naive version is autograd's weight gradient of `Conv` in resens_fast/fused.py.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .product import dot, read_pooled


@triton.jit(do_not_specialize=["images"])
def weight_gradient(
    in_ptr,  # [images, H, W, C]
    g_ptr,  # [images, HEIGHT, WIDTH, N]
    out_ptr,  # fp32 [splits, KERNEL * KERNEL, C, N]
    scale_ptr,  # fp32 [C]
    shift_ptr,  # fp32 [C]
    images,
    C: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    HEIGHT: tl.constexpr,  # of the output
    WIDTH: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    POOL: tl.constexpr,
    PROLOGUE: tl.constexpr,
    BLOCK_C: tl.constexpr,  # divides C
    BLOCK_N: tl.constexpr,  # divides N
    BLOCK_P: tl.constexpr,
    CHUNKS: tl.constexpr,  # of BLOCK_P pixels for each split
    PRECISION: tl.constexpr,
):
    tap = tl.program_id(0) // (C // BLOCK_C)
    c = tl.program_id(0) % (C // BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    acc = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    for i in range(CHUNKS):
        index = (split * CHUNKS + i) * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = index < images * (HEIGHT * WIDTH)
        pixel = index % (HEIGHT * WIDTH)
        y = pixel // WIDTH * STRIDE - PADDING + tap // KERNEL
        x = pixel % WIDTH * STRIDE - PADDING + tap % KERNEL
        image = index // (HEIGHT * WIDTH)
        v = read_pooled(in_ptr, scale_ptr, shift_ptr, image, y, x, inside, c, C, H, W, PROLOGUE, POOL, False)
        g = tl.load(g_ptr + (index * N)[:, None] + n[None, :], mask=inside[:, None], other=0.0)
        acc = dot(tl.trans(v), g, acc, PRECISION)
    at = (((split * (KERNEL * KERNEL) + tap) * C + c) * N)[:, None] + n[None, :]
    tl.store(out_ptr + at, acc)
