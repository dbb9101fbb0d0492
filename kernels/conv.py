"""One convolution of a block, for every step of a level at once.

What it computes, for each step of the launch (source, destination and slot in a table, its gate in another):

    t = bias[slot] + conv(v, weight[slot])       v = in, or relu(scale[slot] * in + shift[slot]) with PROLOGUE
    t = relu(t)                                  with RELU
    t = gate * t + shortcut(states[source])      with LAST, the block's last convolution
    t = relu(t)                                  with CLOSING
    out = t, rounded once to the type of the state

The first convolution of a block reads states[source], the last one writes states[destination]; between them the
intermediate image of the step's number within the launch stays in a scratch area. The accumulator is fp32 from the
first product to the shortcut. The gate scales the branch there, in fp32 and never the stream, so small gates lose
nothing.

How work maps to programs: axis 0 is (step, tile of BLOCK_M output pixels), axis 1 the tile of BLOCK_N output channels.
The pixels of all images stand in one row, so small images share a tile and a batch need not fill one. Steps of one
launch share the shapes, not the block: each program reads its row of the table, and with it which state and whose
weights. Neighbouring steps use the same block, so its weights come from memory once for all of them.

Why two (or three) launches per block and not one: a fused block must exchange the intermediate image between programs
or keep a whole image in one program, and Triton has no way to read a shifted tile out of registers; it would go
through global memory all the same. Here the intermediate of a launch is small enough to stay in L2 (schedule.py cuts
launches to that end, unless the levels are so wide that they would be thousands), so fusing would save only L2
traffic, 64 bytes a pixel at 16 channels against 4,608 multiply-adds.

Memory traffic, per pixel and step of a basic block with c channels of b bytes: the state is read twice and written
once, the intermediate written and read once: 5cb bytes, most of it from L2 (up to 6cb with the rows that neighbouring
tiles share), for 18c² multiply-adds; and 9c²b bytes of weights for each convolution and tile. At 16 channels in bf16
that is some 25 multiply-adds a byte, so the first stage is bound by L2 and by the instructions around the products, the
last by the products. benchmarks/TRITON_NOTES.md has the sums.

Why this tiling: 128 pixels (fp32: 64) by as many channels as fit (tiles.py), because every tile of channels reads its
pixels nine times anew, while the weights are shared by all pixels of a tile. A tile's sums then take at most 64
registers a thread, which leaves enough for the operands of the next pass; a pass is at most 128 bytes of a pixel's
channels, one cache line.

The result of a pixel does not depend on which pixels share its tile: the order of the products depends on the shapes
and BLOCK_K alone. So a configuration's states are bitwise the same in any batch and any sweep.

The naive version is `Block.run` in the reference engine.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .product import product, relu
from .shortcut import add_shortcut, tile_of_step, write_tile


@triton.jit(do_not_specialize=["first", "images"])
def conv(
    in_ptr,  # FROM_STATE: the states; else the scratch [steps of the launch, in_size]
    out_ptr,  # LAST: the states; else the scratch [steps of the launch, out_size]
    states_ptr,  # [buffers, state_size]
    steps_ptr,  # int32 [steps, 3]: source, destination, slot of the parameters
    gates_ptr,  # fp32 [steps]
    weight_ptr,  # [slots, KERNEL * KERNEL, C, N]
    bias_ptr,  # fp32 [slots, N]
    s_weight_ptr,  # [slots, S_KERNEL * S_KERNEL, X_C, N], the projection
    s_bias_ptr,  # fp32 [slots, N]
    scale_ptr,  # fp32 [slots, X_C], the prologue of the block
    shift_ptr,  # fp32 [slots, X_C]
    first,  # the launch's first step
    images,
    in_size,  # elements from one image batch to the next
    out_size,
    state_size,
    C: tl.constexpr,  # channels in, as they are stored
    N: tl.constexpr,  # channels out
    CHANNELS: tl.constexpr,  # those of the N that are real
    H: tl.constexpr,
    W: tl.constexpr,
    HEIGHT: tl.constexpr,  # of the output
    WIDTH: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    PROLOGUE: tl.constexpr,
    RELU: tl.constexpr,
    FROM_STATE: tl.constexpr,
    LAST: tl.constexpr,
    CLOSING: tl.constexpr,
    X_C: tl.constexpr,  # the state that came into the block
    X_H: tl.constexpr,
    X_W: tl.constexpr,
    SHORTCUT: tl.constexpr,  # and what its shortcut is; 0 but for LAST
    S_KERNEL: tl.constexpr,
    S_STRIDE: tl.constexpr,
    S_PADDING: tl.constexpr,
    S_POOL: tl.constexpr,
    S_BEFORE: tl.constexpr,
    S_PROLOGUE: tl.constexpr,
    S_BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    step, index, image, y, x, inside = tile_of_step(images, HEIGHT * WIDTH, WIDTH, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    source = tl.load(steps_ptr + (first + step) * 3).to(tl.int64)
    destination = tl.load(steps_ptr + (first + step) * 3 + 1).to(tl.int64)
    slot = tl.load(steps_ptr + (first + step) * 3 + 2).to(tl.int64)

    came_from = source if FROM_STATE else step.to(tl.int64)
    acc = product(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32),
        in_ptr + came_from * in_size, weight_ptr + slot * (KERNEL * KERNEL * C * N),
        scale_ptr + slot * X_C, shift_ptr + slot * X_C,
        image, y, x, inside, n, C, H, W, N, KERNEL, STRIDE, PADDING, PROLOGUE, 0, BLOCK_K, PRECISION,
    )  # fmt: skip
    acc += tl.load(bias_ptr + slot * N + n, mask=n < N, other=0.0)[None, :]
    if RELU:
        acc = relu(acc)
    if LAST:
        acc = add_shortcut(
            acc * tl.load(gates_ptr + first + step),
            states_ptr + source * state_size,
            s_weight_ptr + slot * (S_KERNEL * S_KERNEL * X_C * N), s_bias_ptr + slot * N,
            scale_ptr + slot * X_C, shift_ptr + slot * X_C,
            image, y, x, inside, n, N, X_C, X_H, X_W,
            SHORTCUT, S_KERNEL, S_STRIDE, S_PADDING, S_POOL, S_BEFORE, S_PROLOGUE, S_BLOCK_K, PRECISION,
        )  # fmt: skip
    if CLOSING:
        acc = relu(acc)
    goes_to = destination if LAST else step.to(tl.int64)
    write_tile(out_ptr + goes_to * out_size, acc, index, inside, n, N, CHANNELS)
