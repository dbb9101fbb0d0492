"""What the Triton kernels compute under Triton's interpreter, against float64; run by test_triton_values.py.

It must be a process of its own, because TRITON_INTERPRET has to be set before triton is imported:

    TRITON_INTERPRET=1 python -m tests.triton_cases NAME...     prints one JSON object {case: result} on the last line

Every case returns {"error": ..., "bound": ...} (a test wants error <= bound) or {"failure": text}.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from resens_fast import fused
from resens_fast.plan import Plan, plan
from resens_fast.structure import Structure
from resens_fast.sweep import Sweep
from resens_fast.sweeps import from_masks

Result = dict[str, Any]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# name: block kind, shortcut of transitions, width of each stage, blocks per stage, image size, classes, stem
NETWORKS: dict[str, tuple[str, str, tuple[int, ...], int, tuple[int, int], int, str]] = {
    "post-projection-16-32-64": ("post", "projection", (16, 32, 64), 2, (8, 8), 10, "plain"),
    "pre-activated-16-32-64": ("pre", "activated", (16, 32, 64), 2, (8, 8), 10, "plain"),
    "post-pad-10-17": ("post", "pad", (10, 17), 3, (7, 9), 10, "plain"),
    "post-pooled-pad-3-10": ("post", "pooled pad", (3, 10), 2, (8, 6), 3, "plain"),
    "pre-projection-17-48": ("pre", "projection", (17, 48), 2, (5, 4), 5, "plain"),
    "bottleneck-post-pooled-8-16": ("bottleneck post", "pooled projection", (8, 16), 3, (16, 16), 70, "imagenet"),
    "bottleneck-pre-activated-10-20": ("bottleneck pre", "activated", (10, 20), 3, (6, 6), 10, "plain"),
}


def conv(g: torch.Generator, n: int, c: int, k: int, stride: int = 1, relu: bool = True) -> fused.Conv:
    weight = torch.randn(n, c, k, k, generator=g) * (1.4 / (c * k * k)) ** 0.5
    return fused.Conv(weight, torch.randn(n, generator=g) * 0.1, stride, k // 2, relu)


def transition(g: torch.Generator, style: str, c: int, n: int) -> fused.Shortcut:
    pool = 2 if "pooled" in style else 0
    if "pad" in style:
        before = (n - c) // 2
        return fused.Shortcut("pad", 1 if pool else 2, before, n - c - before, pool, None, False)
    return fused.Shortcut(
        "projection", 1 if pool else 2, 0, 0, pool, conv(g, n, c, 1, 1 if pool else 2, False), style == "activated"
    )


def network(name: str) -> tuple[fused.FusedNetwork, Structure]:
    """A network with random folded parameters: activations stay of order one, and no two channels look alike."""
    kind, style, widths, depth, size, classes, stem_style = NETWORKS[name]
    g = torch.Generator().manual_seed(7)
    pre, bottleneck = "pre" in kind, "bottleneck" in kind
    if stem_style == "imagenet":
        stem = fused.Stem((conv(g, widths[0], 3, 7, 2),), (3, 2, 1))
    else:
        stem = fused.Stem((conv(g, widths[0], 3, 3, relu=not pre),), None)
    state = stem(torch.zeros(1, 3, *size))
    blocks: list[fused.FusedBlock] = []
    for stage, inner in enumerate(widths):
        n = inner * 4 if bottleneck else inner
        for i in range(depth):
            c = state.shape[1]
            stride = 2 if stage and i == 0 else 1
            if bottleneck:
                convs = (conv(g, inner, c, 1), conv(g, inner, inner, 3, stride), conv(g, n, inner, 1, relu=False))
            else:
                convs = (conv(g, n, c, 3, stride), conv(g, n, n, 3, relu=False))
            shortcut = fused.Shortcut("identity", 1, 0, 0, 0, None, False)
            if stride == 2:
                shortcut = transition(g, style, c, n)
            elif c != n:
                shortcut = fused.Shortcut("projection", 1, 0, 0, 0, conv(g, n, c, 1, relu=False), style == "activated")
            scale = torch.rand(c, generator=g) + 0.5 if pre else None
            shift = torch.randn(c, generator=g) * 0.3 if pre else None
            block = fused.FusedBlock(
                len(blocks), f"{stage}.{i}", scale, shift, convs, shortcut, not pre, tuple(state.shape[1:]), (n, 0, 0)
            )
            state = block(state)
            blocks.append(fused.dataclasses.replace(block, shape_out=tuple(state.shape[1:])))
    c = state.shape[1]
    scale, shift = (torch.rand(c, generator=g) + 0.5, torch.randn(c, generator=g)) if pre else (None, None)
    head = fused.Head(scale, shift, pre, torch.randn(classes, c, generator=g), torch.randn(classes, generator=g))
    whole = fused.FusedNetwork(stem, tuple(blocks), head, (3, *size), classes)
    moves = tuple(b.shortcut.kind != "identity" for b in blocks)
    structure = Structure(
        tuple(b.name for b in blocks), tuple(1 + i // depth for i in range(len(blocks))), ("basic",) * len(blocks),
        moves, (True,) * len(blocks), tuple(not m for m in moves), (True,) * len(blocks),
        tuple(b.shape_in for b in blocks), tuple(b.shape_out for b in blocks), (3, *size), classes,
    )  # fmt: skip
    return whole, structure


def sweep_of(structure: Structure) -> Sweep:
    """Intact, lesions (of a transition too), a reorder, gates small, negative and above one, all deleted."""
    n = len(structure)
    orders, gates = np.tile(np.arange(n, dtype=np.int16), (6, 1)), np.ones((6, n), dtype=np.float32)
    pairs = [(i, j) for i in range(n) for j in range(i) if structure.exchangeable(i, j)]
    gates[1, n - 1] = 0
    gates[2, next((i for i in range(n) if structure.transitions[i]), 0)] = 0
    if pairs:
        i, j = pairs[-1]
        orders[3, [i, j]] = orders[3, [j, i]]
    gates[4, n // 2 :] = np.resize([1e-3, 1.7, -0.4], n - n // 2)
    gates[5] = 0
    return Sweep(structure, orders, gates, ("mask",) * 6, np.zeros(6, dtype=np.int64))


def truth(whole: fused.FusedNetwork, sweep: Sweep, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Logits [C, B, K] of the naive loop in that type, in float64."""
    typed = fused.convert(whole, dtype)
    return torch.stack([typed.forward(images.to(dtype), s.order, s.gates) for s in sweep]).double()


def executor(whole: fused.FusedNetwork, made: Plan, dtype: torch.dtype) -> Any:
    from resens_fast.engines.triton import TritonExecutor

    return TritonExecutor(whole, made, torch.device("cpu"), dtype)


def rms(value: torch.Tensor) -> float:
    return float(value.square().mean().sqrt())


def run_network(name: str, dtype: torch.dtype) -> Result:
    """Logits and tallies of a sweep; the bound is four times what the naive loop loses in the same type."""
    whole, structure = network(name)
    sweep = sweep_of(structure)
    made = plan(structure, sweep)
    images = torch.randn(3, *whole.input_shape, generator=torch.Generator().manual_seed(1))
    exact = truth(whole, sweep, images, torch.float64)
    bound = 4 * rms(truth(whole, sweep, images, dtype) - exact) + 4 * torch.finfo(dtype).eps * rms(exact)
    ready = executor(whole, made, dtype)
    found = ready.logits(images)[torch.from_numpy(made.word_of)]
    error = rms(found.double() - exact)

    labels = exact[0].argmax(1)
    labels[1] = (labels[1] + 1) % whole.classes
    done: list[float] = []
    tally = ready.tally(images, labels, done.append)
    wrong = (found.argmax(2) != labels).sum(1).numpy()
    loss = torch.stack([F.cross_entropy(row.double(), labels, reduction="sum") for row in found]).numpy()
    if (tally.errors[made.word_of] != wrong).any() or tally.nonfinite.any():
        return {"failure": f"errors {tally.errors[made.word_of]} instead of {wrong}, nonfinite {tally.nonfinite}"}
    off = np.abs(tally.loss[made.word_of] / 2**24 - loss).max()
    if not off <= 1e-5 * (1 + loss.max()):
        return {"failure": f"the losses are off by {off}"}
    if abs(sum(done) - 1) > 1e-6:
        return {"failure": f"progress adds up to {sum(done)}"}
    return {"error": error, "bound": bound, "runs": made.executed_runs}


@contextlib.contextmanager
def little_memory(made: Plan, batch: int) -> Iterator[None]:
    """As few buffers as the plan needs, a step at a time, so many images a batch."""
    from resens_fast.engines import triton_memory as memory

    before = memory.BUFFERS, memory.SCRATCH_BYTES, memory.BATCH
    memory.BUFFERS, memory.SCRATCH_BYTES, memory.BATCH = made.least_budget, 1, (batch, batch)
    try:
        yield
    finally:
        memory.BUFFERS, memory.SCRATCH_BYTES, memory.BATCH = before


def run_alone() -> Result:
    """A configuration alone, in a small budget, and an image alone, give the same bits as in the crowd."""
    whole, structure = network("bottleneck-pre-activated-10-20")
    sweep = sweep_of(structure)
    images = torch.randn(3, *whole.input_shape, generator=torch.Generator().manual_seed(2))
    made = plan(structure, sweep)
    crowd = executor(whole, made, torch.float16).logits(images)[torch.from_numpy(made.word_of)]
    for c in (1, 4):
        one = Sweep(structure, sweep.orders[c : c + 1], sweep.gates[c : c + 1], ("mask",), np.zeros(1, dtype=np.int64))
        alone = executor(whole, plan(structure, one), torch.float16).logits(images[2:])
        if not torch.equal(alone[0], crowd[c, 2:]):
            return {"failure": f"configuration {c} alone differs by {(alone[0] - crowd[c, 2:]).abs().max()}"}
    with little_memory(made, 2):
        tight = executor(whole, made, torch.float16)
    if tight.prepared.schedule.buffers != made.least_budget or tight.batch != 2:
        return {"failure": f"{tight.prepared.schedule.buffers} buffers of {tight.batch} images were used"}
    found = tight.logits(images)[torch.from_numpy(made.word_of)]
    return {"error": float((found - crowd).abs().max()), "bound": 0.0}


def run_sizes() -> Result:
    """An executor takes images of another size than the network was wrapped with."""
    whole, structure = network("post-pad-10-17")
    sweep = sweep_of(structure)
    made = plan(structure, sweep)
    ready = executor(whole, made, torch.float32)
    images = torch.randn(1, 3, 5, 4, generator=torch.Generator().manual_seed(3))
    found = ready.logits(images)[torch.from_numpy(made.word_of)]
    exact = truth(whole, sweep, images, torch.float64)
    return {"error": rms(found.double() - exact), "bound": 1e-5 * rms(exact)}


def run_head() -> Result:
    """Ties, infinities, NaN and enormous losses, in more classes than a tile, through a network of one empty block."""
    from resens_fast.engines.base import count

    classes, c = 70, 20
    state = torch.randn(18, c, 2, 2, generator=torch.Generator().manual_seed(4)).abs()
    weight = torch.randn(classes, c, generator=torch.Generator().manual_seed(5))
    bias = torch.zeros(classes)
    weight[66], bias[66] = weight[3], 0.0  # equal logits in two tiles
    state[1], state[2, 0, 0, 0], state[3] = 0.0, float("inf"), float("nan")
    state[4] *= 1e8  # losses above 2**16
    weight[69, 1] = -1e30  # an image that overflows in one class only
    state[5, 1] = 1e30
    state[6] = 0
    bias[[3, 66]] = 5.0
    weight[3] = weight[66] = weight[3].abs()
    one = fused.Conv(torch.eye(c)[:, :, None, None], torch.zeros(c), 1, 0, False)
    inner = fused.Conv(torch.zeros(c, c, 1, 1), torch.zeros(c), 1, 0, True)
    block = fused.FusedBlock(
        0, "b", None, None, (inner, fused.dataclasses.replace(inner, relu=False)),
        fused.Shortcut("identity", 1, 0, 0, 0, None, False), False, (c, 2, 2), (c, 2, 2),
    )  # fmt: skip
    whole = fused.FusedNetwork(
        fused.Stem((one,), None), (block,), fused.Head(None, None, True, weight, bias), (c, 2, 2), classes
    )
    structure = Structure(
        ("b",), (1,), ("basic",), (False,), (True,), (True,), (True,), ((c, 2, 2),), ((c, 2, 2),), (c, 2, 2), classes
    )
    labels = torch.arange(18) % classes
    labels[[1, 6]] = 3  # the lower of two equal logits
    sweep = from_masks(structure, [[0]])
    ready = executor(whole, plan(structure, sweep), torch.float32)
    logits, tally = ready.logits(state), ready.tally(state, labels)
    # The identity product turns infinity times zero into NaN: the logits themselves are the truth here.
    expected = count(logits[0], labels).tolist()
    if torch.isfinite(logits[0]).all(1).logical_not().sum() != 3:
        return {"failure": "the case is not what it should be"}
    found = [int(column[0]) for column in tally]
    if found[0] != expected[0] or found[2] != expected[2]:
        return {"failure": f"errors and nonfinite {found[::2]} instead of {expected[::2]}"}
    exact = F.linear(state.double().mean((2, 3)), weight.double(), bias.double())[7:]
    if rms(logits[0, 7:].double() - exact) > 1e-6 * rms(exact):
        return {"failure": "the logits are wrong"}
    return {"error": abs(found[1] - expected[1]) / 2**24, "bound": 1e-6 * expected[1] / 2**24}


def run_property() -> Result:
    """Any convolution of any image with any tile agrees with torch."""
    from hypothesis import given, settings
    from hypothesis import strategies as st

    from resens_fast.kernels import launch, pack, tiles

    worst = 0.0

    @settings(max_examples=12, deadline=None, derandomize=True, database=None)
    @given(
        st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 2, 3]),
        st.integers(1, 3), st.integers(0, 2), st.integers(1, 3), st.sampled_from([16, 64, 256]),
    )  # fmt: skip
    def check(c: int, n: int, h: int, w: int, k: int, stride: int, padding: int, images: int, block_m: int) -> None:
        nonlocal worst
        if min(h, w) + 2 * padding < k:
            return
        g = torch.Generator().manual_seed(c + 41 * n)
        part = fused.Conv(torch.randn(n, c, k, k, generator=g), torch.randn(n, generator=g), stride, padding, True)
        x = torch.randn(images, c, h, w, generator=g)
        shape = pack.conv_shape(part, h, w)
        weights = pack.conv_weights([part], torch.device("cpu"), torch.float32)
        source = F.pad(x.permute(0, 2, 3, 1), (0, pack.width(c) - c)).contiguous().view(1, -1)
        out = torch.full((1, images * shape.out_elements), float("nan"))
        table = (torch.zeros(1, 3, dtype=torch.int32), torch.ones(1))
        constants = launch.conv_constants(None, 0, shape, torch.float32)
        tile = tiles.Tile(block_m, 16, 4, 2)
        launch.launch_conv(source, out, out, table, weights, None, constants, tile, 0, 1, images)
        found = out.view(images, *shape.out, -1).permute(0, 3, 1, 2)
        exact = fused.convert(part, torch.float64)(x.double())
        worst = max(worst, float((found[:, :n] - exact).abs().max()) / float(exact.abs().max() + 1))
        assert not found[:, n:].any(), "the channels that fill up are not zero"
        assert worst < 1e-5, f"an error of {worst}"
        source[0, 0] = float("inf")
        launch.launch_conv(source, out, out, table, weights, None, constants, tile, 0, 1, images)
        assert not out.view(-1, pack.width(n))[:, n:].any(), "an infinite state reaches channels that do not exist"

    check()
    return {"error": worst, "bound": 1e-5}


def run_tune() -> Result:
    """Tuning keeps the fastest candidate of every shape under the name that the engine asks for."""
    from resens_fast.kernels import pack, tiles, tune

    packed = pack.pack(network("post-pooled-pad-3-10")[0], torch.device("cpu"), torch.float16)
    timed: list[Any] = []

    def timer(run: Any) -> float:
        run()
        timed.append(run.__defaults__[0])
        return float(timed[-1] != tiles.Tile(64, 16, 4, 2))

    tiles.candidates = lambda n, dtype, capability: [tiles.Tile(128, 16, 4, 3), tiles.Tile(64, 16, 4, 2)]
    best = tune.tune(packed, 90, timer, images=1)
    names = {tiles.key(conv, torch.float16, False, 0) for group in packed.groups for conv in group.shape.convs[:1]}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tiles.json"
        tiles.save(file, best)
        if tiles.measured(file) != best or not names <= set(best) or len(timed) != 2 * len(best):
            return {"failure": f"{best} after {len(timed)} measurements"}
    return {"error": float(set(best.values()) != {tiles.Tile(64, 16, 4, 2)}), "bound": 0.0}


def cases() -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name in NETWORKS:
        for dtype in ("float32", "float16"):
            table[f"{name}-{dtype}"] = lambda n=name, d=dtype: run_network(n, DTYPES[d])
    table["post-pad-10-17-bfloat16"] = lambda: run_network("post-pad-10-17", torch.bfloat16)
    table |= {"alone": run_alone, "sizes": run_sizes, "head": run_head}
    from tests import triton_blocks, triton_gradients

    table |= {"property": run_property, "tune": run_tune}
    return table | triton_gradients.cases() | triton_blocks.cases()


def without_overflow_checks() -> None:
    """The interpreter checks every addition of two integers for overflow, which takes half of its time."""
    import dataclasses

    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    without_overflow_checks()
    results = {}
    for name in names:
        began = time.process_time()
        try:
            results[name] = cases()[name]()
        except Exception:  # the reason belongs to the one case
            results[name] = {"failure": traceback.format_exc()[-1500:]}
        results[name]["seconds"] = round(time.process_time() - began, 1)
        print(name, results[name], file=sys.stderr, flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    from tests import triton_cases  # what the other files import: one module, not two

    triton_cases.main(sys.argv[1:] or list(cases()))
