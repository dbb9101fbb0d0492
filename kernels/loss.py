"""Both ends of the backward pass: the gradient of the loss at the last block's output, and norms at the first's input.

What `loss_gradient` computes, for each image, from its logits z, its label l and the last state a [PIXELS, C]:

    d = softmax(z) - one(l)                           the image's own cross entropy, not the batch's mean
    d = d / 2^e, exponents[0] = e                     e such that the largest other class has about 1 (normalise.py)
    m = d · weight^T / PIXELS, fp32 [C]
    g = scale * m where the head's ReLU is open       scale and shift with PROLOGUE, the ReLU with RELU
    g = g where the last block's closing ReLU is open with CLOSED (transpose.py says why that is done here)
    out[pixel] = g

1 - softmax(z)[l] is summed up from the other classes: where the network is sure the difference would be all rounding.
Their exponentials are taken relative to the largest of them, since a label that leads by a hundred makes all of them
less than fp32 holds. All paths start there, so it runs once for a batch. Each program takes BLOCK_I images (16, the
least tl.dot takes) and BLOCK_C channels; it walks over the classes twice, first for the maximum and the sum of
exponentials, then for the product, so that any number of classes fits, and then over the pixels. It reads and writes
the last state in place if the caller likes: an element is read and written by the same program.

Memory traffic: the last state is read and written once for a batch, against a state for each path and level after it.

What `square_norms` computes: for each path and image the sum of the squares of the gradient at the first block's input,
in fp64, and its exponent. One program for each, in one fixed order; a state is read once.

The naive version is autograd of `_loss`, and `norms`, in the reference engine.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .head import LARGEST

LOG2E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(-1e9)


@triton.jit(do_not_specialize=["images"])
def loss_gradient(
    logits_ptr,  # fp32 [images, K]
    labels_ptr,  # int64 [images]
    weight_ptr,  # fp32 [C, K]
    scale_ptr,  # fp32 [C]
    shift_ptr,  # fp32 [C]
    state_ptr,  # [images, PIXELS, C], the last state
    out_ptr,  # [images, PIXELS, C]
    exponents_ptr,  # int32 [images]
    images,
    C: tl.constexpr,
    K: tl.constexpr,
    PIXELS: tl.constexpr,
    PROLOGUE: tl.constexpr,
    RELU: tl.constexpr,
    CLOSED: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    image = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside, here = image < images, c < C
    label = tl.load(labels_ptr + image, mask=inside, other=0)
    largest = tl.full([BLOCK_I], -LARGEST, tl.float32)  # of all classes but the label
    others = tl.zeros([BLOCK_I], tl.float32)  # the sum of their exponentials, relative to exp(largest)
    of_label = tl.zeros([BLOCK_I], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        known = inside[:, None] & (k < K)[None, :]
        z = tl.load(logits_ptr + image[:, None] * K + k[None, :], mask=known, other=-float("inf"))
        chosen = k[None, :] == label[:, None]
        of_label += tl.sum(tl.where(chosen & known, z, 0.0), axis=1)
        z = tl.where(chosen, -float("inf"), z)
        top = tl.maximum(largest, tl.max(z, axis=1))
        others = others * tl.exp(largest - top) + tl.sum(tl.exp(z - top[:, None]), axis=1)
        largest = top
    # softmax(z)[k] = exp(z[k] - largest) * share
    lead = of_label - largest
    share = tl.where(lead > 0.0, 1.0 / (others * tl.exp(-lead) + 1.0), 1.0 / (others + tl.exp(lead)))
    # Times exp(-lead) = 2^power where the label leads. Beyond FAR it is zero; with an infinite logit it is NaN.
    power = tl.where(lead > 0.0, lead, 0.0).to(tl.float64) * -LOG2E
    e = tl.floor(tl.maximum(power, FAR)).to(tl.int32)
    share *= tl.where(power < FAR, lead - lead, tl.exp2((power - e).to(tl.float32)))
    tl.store(exponents_ptr + image, e, mask=inside)  # by the programs of all channels alike
    m = tl.zeros([BLOCK_I, BLOCK_C], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        known = inside[:, None] & (k < K)[None, :]
        z = tl.load(logits_ptr + image[:, None] * K + k[None, :], mask=known, other=0.0)
        d = tl.where(k[None, :] == label[:, None], -others[:, None], tl.exp(z - largest[:, None])) * share[:, None]
        weight = tl.load(weight_ptr + c[None, :] * K + k[:, None], mask=here[None, :] & (k < K)[:, None], other=0.0)
        m = tl.dot(tl.where(known, d, 0.0), weight, m, input_precision="ieee")
    m *= 1.0 / PIXELS
    if PROLOGUE:
        scale = tl.load(scale_ptr + c, mask=here, other=0.0)
        shift = tl.load(shift_ptr + c, mask=here, other=0.0)
        m *= scale[None, :]
    for pixel in range(PIXELS):
        at = ((image.to(tl.int64) * PIXELS + pixel) * C)[:, None] + c[None, :]
        both = inside[:, None] & here[None, :]
        g = m
        if RELU or CLOSED:
            a = tl.load(state_ptr + at, mask=both, other=0.0).to(tl.float32)
            if RELU:
                v = a
                if PROLOGUE:
                    v = a * scale[None, :] + shift[None, :]
                g = tl.where(v <= 0.0, 0.0, g)
            if CLOSED:
                g = tl.where(a <= 0.0, 0.0, g)
        tl.store(out_ptr + at, g.to(out_ptr.dtype.element_ty), mask=both)


@triton.jit(do_not_specialize=["first", "images", "batch"])
def square_norms(
    states_ptr,  # [buffers, state_size]
    exponents_ptr,  # int32 [buffers, batch]
    norms_ptr,  # fp64 [words, images]
    powers_ptr,  # int32 [words, images]
    steps_ptr,  # int32 [steps, 3]: source, -1, word
    first,  # the launch's first step
    images,
    batch,
    state_size,
    ELEMENTS: tl.constexpr,  # of one image
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # (step, image)
    step, image = row // images, row % images
    source = tl.load(steps_ptr + (first + step) * 3).to(tl.int64)
    word = tl.load(steps_ptr + (first + step) * 3 + 2).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, ELEMENTS, BLOCK):
        i = start + tl.arange(0, BLOCK)
        at = source * state_size + image * ELEMENTS + i
        g = tl.load(states_ptr + at, mask=i < ELEMENTS, other=0.0).to(tl.float64)
        total += g * g
    tl.store(norms_ptr + word * images + image, tl.sum(total, axis=0))
    tl.store(powers_ptr + word * images + image, tl.load(exponents_ptr + source * batch + image))
