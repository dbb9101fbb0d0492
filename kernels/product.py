"""The product inside every convolution: pixels times channels, one shift of the image after the other.

What it computes, for a tile of output pixels (image, y, x) and a tile of output channels n, in fp32:

    sum over taps (i, j) and input channels k of  a[image, y*STRIDE - PADDING + i, x*STRIDE - PADDING + j, k]
                                                  * weight[i, j, k, n]

It is an implicit matrix product of depth KERNEL² * C: each pass multiplies [BLOCK_M pixels, BLOCK_K channels] of one
tap with [BLOCK_K, BLOCK_N] weights on the tensor cores. Pixels outside the image are masked to zero, so there is no
halo to store, and any image size works.

Layout: an image is [y, x, C] with the channels last, so that the channels of a pixel are one contiguous read; weights
are [tap, C, N]. C and N are multiples of 16 (pack.py fills up with zeros), so the reads of a tile are never masked
along the channels and tl.dot always has a depth of at least 16.

Memory traffic: each tap reads the tile of pixels again, but nine shifts of a tile overlap almost wholly, so that eight
of the nine reads can come from L1 (`load`). From L2 come the pixels about once (1.5 times where a tile is
four rows of an image, whose neighbours it reads too) and the weights once per tile.

How work maps to programs, and why in these tiles, say the kernels that call it: conv.py and shortcut.py.

The naive version is torch.nn.functional.conv2d on `relu(scale * a + shift)`, as resens_fast/engines/reference.py calls
it through the model's own blocks.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

# Triton 3.9's interpreter multiplies the bit patterns of bf16 numbers. Widened operands are exact, and the products of
# the compiled kernel are exact in fp32 too, so both sum the same numbers.
WIDEN = tl.constexpr(bool(triton.knobs.runtime.interpret))
# Copies of 16 bytes from global into shared memory pass L1 by unless they are told otherwise, which Triton can do from
# 3.9 on; before, pieces of 8 bytes are what goes through it.
PIECES_OF_8 = tl.constexpr(tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 9))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc [M, N] fp32 plus a [M, K] times b [K, N]; PRECISION is "ieee" or "tf32" and matters for fp32 only."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def load(a_ptr, at, inside, AGAIN: tl.constexpr):
    """The numbers at a_ptr + at [M, K], consecutive along K, of the rows inside [M]; zero elsewhere.

    AGAIN: other taps will read most of them again, so they should stay in L1.
    """
    place = a_ptr + at
    if AGAIN and PIECES_OF_8:
        place = tl.max_contiguous(place, [1, 64 // a_ptr.dtype.element_ty.primitive_bitwidth])
    return tl.load(place, mask=inside[:, None], other=0.0, cache_modifier=".ca" if AGAIN else "")


@triton.jit
def relu(value):
    # A NaN must survive to the head, which counts it.
    return tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def read_pixels(
    a_ptr,  # [images, H, W, C]
    scale_ptr,  # fp32 [C]
    shift_ptr,  # fp32 [C]
    image,  # int32 [M]
    y,  # int32 [M]
    x,  # int32 [M]
    inside,  # bool [M]
    k,  # int32 [K], channels
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    PROLOGUE: tl.constexpr,
    AGAIN: tl.constexpr,
):
    """The channels k of pixels (image, y, x), [M, K] in the type of the state; zero outside the image.

    With PROLOGUE relu(scale * a + shift), which comes before the padding: outside the image it is zero as well.
    """
    inside = inside & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    a = load(a_ptr, (((image * H + y) * W + x) * C)[:, None] + k[None, :], inside, AGAIN)
    if PROLOGUE:
        scale = tl.load(scale_ptr + k)
        shift = tl.load(shift_ptr + k)
        # Outside a is 0 already, so only the shift has to go; masking the 16-bit result takes twice as much.
        h = a.to(tl.float32) * scale[None, :] + tl.where(inside[:, None], shift[None, :], 0.0)
        a = relu(h).to(a_ptr.dtype.element_ty)
    return a


@triton.jit
def read_pooled(
    a_ptr,  # [images, H, W, C]
    scale_ptr,  # fp32 [C]
    shift_ptr,  # fp32 [C]
    image,  # int32 [M]
    y,  # int32 [M], in units of POOL pixels
    x,  # int32 [M]
    inside,  # bool [M]
    k,  # int32 [K]
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    PROLOGUE: tl.constexpr,
    POOL: tl.constexpr,
    AGAIN: tl.constexpr,
):
    """As `read_pixels`, but of the image averaged over POOL x POOL pixels (0 and 1: as it is)."""
    if POOL <= 1:
        a = read_pixels(a_ptr, scale_ptr, shift_ptr, image, y, x, inside, k, C, H, W, PROLOGUE, AGAIN)
    else:
        inside = inside & (y >= 0) & (y < H // POOL) & (x >= 0) & (x < W // POOL)
        total = tl.zeros([image.shape[0], k.shape[0]], tl.float32)
        for i in tl.static_range(POOL * POOL):
            row, column = y * POOL + i // POOL, x * POOL + i % POOL
            part = read_pixels(a_ptr, scale_ptr, shift_ptr, image, row, column, inside, k, C, H, W, PROLOGUE, AGAIN)
            total += part.to(tl.float32)
        a = (total * (1.0 / (POOL * POOL))).to(a_ptr.dtype.element_ty)
    return a


@triton.jit
def product(
    acc,  # fp32 [M, N]
    a_ptr,  # [images, H, W, C]
    weight_ptr,  # [KERNEL * KERNEL, C, N]
    scale_ptr,  # fp32 [C]
    shift_ptr,  # fp32 [C]
    image,  # int32 [M], the output pixels
    y,  # int32 [M]
    x,  # int32 [M]
    inside,  # bool [M]
    n,  # int32 [N], the output channels
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    N: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    PROLOGUE: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc plus the convolution of a, tap by tap and BLOCK_K channels at a time, always in the same order."""
    CHUNKS: tl.constexpr = C // BLOCK_K
    for i in range(KERNEL * KERNEL * CHUNKS):
        tap = i // CHUNKS
        k = (i % CHUNKS) * BLOCK_K + tl.arange(0, BLOCK_K)
        row = y * STRIDE - PADDING + tap // KERNEL
        column = x * STRIDE - PADDING + tap % KERNEL
        a = read_pooled(
            a_ptr, scale_ptr, shift_ptr, image, row, column, inside, k, C, H, W, PROLOGUE, POOL, KERNEL > 1
        )  # fmt: skip
        b = tl.load(weight_ptr + ((tap * C + k) * N)[:, None] + n[None, :], mask=(n < N)[None, :], other=0.0)
        acc = dot(a, b, acc, PRECISION)
    return acc
