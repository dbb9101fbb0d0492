"""The head of the network for every word that ends in a level: pool, classify, count.

What it computes, for each (word, image), in two launches:

    pool      mean over the pixels of v, fp32 [C]        v = state, scale * state + shift with PROLOGUE, then relu
                                                         with RELU
    classify  logits = mean · weight + bias, fp32 [K]; then, into one cell per word and with integers only,
              errors     += the lowest index of the largest logit is not the label, or a logit is not finite
              loss       += round(2^24 * min(cross entropy, 2^16)), for images whose logits are all finite
              nonfinite  += a logit is not finite

How work maps to programs: `pool` has one program per (step, image) and BLOCK_C channels, and walks over the pixels in
one fixed order, 64 at a time: enough reads under way, 64 elements a thread at most. `classify` has one program per
step and 16 images, since 16 is the least tl.dot takes, and walks over the classes BLOCK_K at a time, keeping the
running maximum and sum of exponentials, so that any number of classes fits.

Memory traffic: the state is read once; the means are 4C bytes a word and image, and the logits stay in registers
unless asked for. The sums are integers, so the order in which the programs add them does not matter: a word's counts
are the same alone or in any sweep. Weights are fp32 here in every type of the network: the head is a thousandth of
the work, and ties between rounded logits would be ties in the prediction.

The naive version is `count` in resens_fast/engines/base.py on the logits of the reference engine.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .product import relu

LOSS_SCALE = tl.constexpr(2.0**24)
LOSS_LIMIT = tl.constexpr(2.0**16)
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit(do_not_specialize=["first", "images"])
def pool(
    states_ptr,  # [buffers, state_size]
    means_ptr,  # fp32 [steps of the launch, images, C]
    steps_ptr,  # int32 [steps, 3]: source, -1, word
    scale_ptr,  # fp32 [C]
    shift_ptr,  # fp32 [C]
    first,  # the launch's first step
    images,
    state_size,
    C: tl.constexpr,
    PIXELS: tl.constexpr,
    PROLOGUE: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # (step, image)
    step, image = row // images, row % images
    source = tl.load(steps_ptr + (first + step) * 3).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = c < C
    total = tl.zeros([BLOCK_C], tl.float32)
    if PROLOGUE:
        scale = tl.load(scale_ptr + c, mask=here, other=0.0)
        shift = tl.load(shift_ptr + c, mask=here, other=0.0)
    for start in range(0, PIXELS, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (p < PIXELS)[:, None] & here[None, :]
        offset = (image * PIXELS + p)[:, None] * C + c[None, :]
        v = tl.load(states_ptr + source * state_size + offset, mask=inside, other=0.0).to(tl.float32)
        if PROLOGUE:
            v = tl.where(inside, v * scale[None, :] + shift[None, :], 0.0)
        if RELU:
            v = relu(v)
        total += tl.sum(v, axis=0)
    tl.store(means_ptr + row * C + c, total * (1.0 / PIXELS), mask=here)


@triton.jit(do_not_specialize=["first", "images"])
def classify(
    means_ptr,  # fp32 [steps of the launch, images, C]
    steps_ptr,  # int32 [steps, 3]: source, -1, word
    weight_ptr,  # fp32 [C, K]
    bias_ptr,  # fp32 [K]
    labels_ptr,  # int64 [images], for COUNT
    counts_ptr,  # int64 [words, 3]: errors, loss, nonfinite; for COUNT
    logits_ptr,  # fp32 [words, images, K], for LOGITS
    first,  # the launch's first step
    images,
    C: tl.constexpr,
    K: tl.constexpr,
    COUNT: tl.constexpr,
    LOGITS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles = tl.cdiv(images, BLOCK_I)
    step = tl.program_id(0) // tiles
    image = (tl.program_id(0) % tiles) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = image < images
    word = tl.load(steps_ptr + (first + step) * 3 + 2).to(tl.int64)
    row = step.to(tl.int64) * images + image
    if COUNT:
        label = tl.load(labels_ptr + image, mask=inside, other=0)
    best = tl.full([BLOCK_I], -float("inf"), tl.float32)
    winner = tl.zeros([BLOCK_I], tl.int32)
    exponentials = tl.zeros([BLOCK_I], tl.float32)  # their sum, relative to exp(best)
    of_label = tl.zeros([BLOCK_I], tl.float32)
    wrong = tl.zeros([BLOCK_I], tl.int32)  # logits that are not finite
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        known = k < K
        acc = tl.zeros([BLOCK_I, BLOCK_K], tl.float32)
        for begin in range(0, C, BLOCK_C):
            c = begin + tl.arange(0, BLOCK_C)
            mean = tl.load(
                means_ptr + row[:, None] * C + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0
            )
            weight = tl.load(
                weight_ptr + c[:, None] * K + k[None, :], mask=(c < C)[:, None] & known[None, :], other=0.0
            )
            acc = tl.dot(mean, weight, acc, input_precision="ieee")
        logits = acc + tl.load(bias_ptr + k, mask=known, other=0.0)[None, :]
        if LOGITS:
            tl.store(
                logits_ptr + (word * images + image)[:, None] * K + k[None, :],
                logits,
                mask=inside[:, None] & known[None, :],
            )
        if COUNT:
            # The comparison is false for a NaN as well.
            finite = tl.abs(logits) <= LARGEST
            wrong += tl.sum(tl.where(finite | ~known[None, :], 0, 1), axis=1)
            logits = tl.where(known[None, :] & finite, logits, -float("inf"))
            top = tl.max(logits, axis=1)
            index = tl.min(tl.where(logits == top[:, None], k[None, :], K), axis=1)
            winner = tl.where(top > best, index, winner)
            largest = tl.maximum(tl.maximum(best, top), -LARGEST)
            exponentials = exponentials * tl.exp(best - largest)
            exponentials += tl.sum(tl.exp(logits - largest[:, None]), axis=1)
            of_label += tl.sum(tl.where(k[None, :] == label[:, None], logits, 0.0), axis=1)
            best = largest
    if COUNT:
        finite = wrong == 0
        loss = tl.where(finite, best - of_label + tl.log(exponentials), 0.0)
        loss = tl.minimum(tl.maximum(loss, 0.0), LOSS_LIMIT)
        fixed = tl.floor(loss.to(tl.float64) * LOSS_SCALE + 0.5).to(tl.int64)
        error = (winner != label) | ~finite
        cell = counts_ptr + word * 3
        tl.atomic_add(cell, tl.sum((error & inside).to(tl.int64), axis=0))
        tl.atomic_add(cell + 1, tl.sum(tl.where(inside, fixed, 0), axis=0))
        tl.atomic_add(cell + 2, tl.sum((~finite & inside).to(tl.int64), axis=0))
