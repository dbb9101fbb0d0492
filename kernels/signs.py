"""The sign bits of every ReLU of the intact forward, which is all that a backward pass needs of the activations.

What `signs` computes, for every element of an image batch [pixels, C]:

    bit = relu lets it through: not v <= 0        v = a, or scale * a + shift with PROLOGUE

and packs 16 channels of a pixel into one int16, the lowest channel in the lowest bit. A NaN passes, as in torch, so
that it reaches the norm. Channels that fill up a multiple of 16 are zero, and so are their bits.

`open_relu` is the transpose of a ReLU: it keeps the elements of a tile whose bit is set. It runs where a gradient is
written, not where it is read: a shifted product reads every element nine times, and each time the bits would have to
be unpacked again.

How work maps to programs: each takes BLOCK words of 16 elements, 32 a thread: enough reads under way, few enough to
stay in registers. Memory traffic: an activation is read once, and a sixteenth of it (fp32: a thirty-second) written;
one pass over the activations of a single forward, against a backward pass for every path. ResNet-110 keeps 129 KB an
image this way, where the activations are 2 MB. It is a kernel of its own, so that the forward of the gradients is the
forward of every study, bit by bit.

The naive version is what autograd saves for each ReLU in `_along` of the reference engine.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["words"])
def signs(
    a_ptr,  # [words, 16]
    bits_ptr,  # int16 [words]
    scale_ptr,  # fp32 [C]
    shift_ptr,  # fp32 [C]
    words,
    C: tl.constexpr,
    PROLOGUE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, 16)
    inside = word < words
    v = tl.load(a_ptr + (word * 16)[:, None] + lane[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    if PROLOGUE:
        c = (word % (C // 16) * 16)[:, None] + lane[None, :]
        v = v * tl.load(scale_ptr + c) + tl.load(shift_ptr + c)
    bits = tl.sum(tl.where(v <= 0.0, 0, 1) << lane[None, :], axis=1)
    tl.store(bits_ptr + word, bits.to(tl.int16), mask=inside)


@triton.jit
def open_relu(
    acc,  # fp32 [M, N]
    bits_ptr,  # int16 [pixels, N / 16]
    index,  # int32 [M], pixels
    inside,  # bool [M]
    n,  # int32 [N], channels
    N: tl.constexpr,
):
    """acc where the ReLU let the value through, zero elsewhere."""
    place = (index * (N // 16))[:, None] + (n // 16)[None, :]
    bits = tl.load(bits_ptr + place, mask=inside[:, None] & (n < N)[None, :], other=0).to(tl.int32)
    return tl.where(((bits >> (n % 16)[None, :]) & 1) != 0, acc, 0.0)
