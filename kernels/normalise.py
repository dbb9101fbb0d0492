"""Powers of two kept apart from the states of a backward pass, for each path and image.

A path through many branches shrinks the gradient by orders of magnitude for every block: to 1e-47 in a trained
ResNet-110, which no fp32 number holds, let alone an fp16. So a state is a mantissa, which the other kernels see, and an
exponent for each image, which only this one does.

What it computes for each step (source, destination) of a launch and each image, after the step's own kernels:

    e = exponent of the image's largest element of states[destination], or 0          with mark 1; else 0
    states[destination] /= 2^e
    exponents[destination] = exponents[source] + e + shift

`shift` is the exponent of the step's gate, which the transposed convolution is given without it: a gate of 1e-20 is no
danger either. A step is marked by how many steps its path has made before, every 8th (in fp16 each one), so a path is
scaled the same alone or in company, and by powers of two nothing is rounded.

How work maps to programs: one for each step and image, which walks over it BLOCK elements at a time. Where nothing is
marked it reads and writes one exponent; else it reads the image twice and writes it once: an eighth of the steps, at
less than a quarter of their traffic each.

The naive version is `State.normalised` of the torch engine.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def exponent_of(value):
    """That of fp32 numbers, between -126 and 126; 0 for zero and what is not finite."""
    e = ((value.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    e = tl.minimum(tl.maximum(e, -126), 126)
    return tl.where((value > 0.0) & (value <= 3.4028234663852886e38), e, 0)


@triton.jit
def power_of_two(e):
    """2^e as fp32, for e between -126 and 126."""
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["first", "images", "batch"])
def normalise(
    states_ptr,  # [buffers, state_size]
    exponents_ptr,  # int32 [buffers, batch]
    steps_ptr,  # int32 [steps, 3]: source, destination, slot
    marks_ptr,  # int32 [steps, 2]: mark, shift
    first,  # the launch's first step
    images,
    batch,
    state_size,
    ELEMENTS: tl.constexpr,  # of one image
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # (step, image)
    step, image = first + row // images, row % images
    source = tl.load(steps_ptr + step * 3).to(tl.int64)
    destination = tl.load(steps_ptr + step * 3 + 1).to(tl.int64)
    elements = tl.load(marks_ptr + step * 2) * ELEMENTS  # none without a mark
    state = states_ptr + destination * state_size + image * ELEMENTS
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, ELEMENTS, BLOCK):
        i = start + tl.arange(0, BLOCK)
        g = tl.load(state + i, mask=i < elements, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(g))
    e = exponent_of(tl.max(largest, axis=0))
    factor = power_of_two(-e)
    for start in range(0, ELEMENTS, BLOCK):
        i = start + tl.arange(0, BLOCK)
        g = tl.load(state + i, mask=i < elements, other=0.0).to(tl.float32) * factor
        tl.store(state + i, g.to(states_ptr.dtype.element_ty), mask=i < elements)
    before = tl.load(exponents_ptr + source * batch + image)
    tl.store(exponents_ptr + destination * batch + image, before + e + tl.load(marks_ptr + step * 2 + 1))
