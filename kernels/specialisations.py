"""Which kernels are compiled for a network, and how to compile them for a card that is not here.

`python -m resens_fast.kernels.specialisations` compiles those of the usual networks for sm_80, sm_90 and sm_100 and
prints registers, spills, shared memory and the matrix instructions they use.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import backward, launch, product, tiles
from .pack import KINDS, BlockShape, ConvShape, ShortcutShape, output

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
ARCHITECTURES = (80, 90, 100)
# The pointers to elements of the network's type, for each kernel; the others are fp32 or as in POINTERS.
TYPED = {
    "conv": ("in_ptr", "out_ptr", "states_ptr", "weight_ptr", "s_weight_ptr"),
    "shortcut": ("states_ptr", "weight_ptr"),
    "pool": ("states_ptr",),
    "signs": ("a_ptr",),
    "conv_transpose": ("in_ptr", "out_ptr", "weight_ptr"),
    "shortcut_transpose": ("states_ptr", "weight_ptr"),
    "loss_gradient": ("state_ptr", "out_ptr"),
    "square_norms": ("states_ptr",),
    "normalise": ("states_ptr",),
    "weight_gradient": ("in_ptr", "g_ptr"),
}
POINTERS = {"steps_ptr": "*i32", "labels_ptr": "*i64", "counts_ptr": "*i64", "norms_ptr": "*fp64"}
POINTERS |= dict.fromkeys(("bits_ptr", "relu_ptr", "closed_ptr"), "*i16")
POINTERS |= dict.fromkeys(("exponents_ptr", "powers_ptr", "marks_ptr"), "*i32")
# What Triton starts from where a launch names no tile.
PLAIN = tiles.Tile(0, 0, 4, 3)


@dataclass(frozen=True)
class Specialisation:
    """A kernel with its constants, as `triton.compile` wants them."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    dtype: torch.dtype
    tile: tiles.Tile

    def source(self) -> Any:
        """The ASTSource, with the argument types and alignments that `launch` passes."""
        from triton.compiler import ASTSource

        types = POINTERS | dict.fromkeys(TYPED.get(self.kernel.__name__, ()), "*" + TYPES[self.dtype])
        signature = {
            name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in self.kernel.arg_names
        }
        signature |= dict.fromkeys(self.constants, "constexpr")
        aligned = [i for i, (n, t) in enumerate(signature.items()) if t[0] == "*" or n.endswith("_size")]
        return ASTSource(self.kernel, signature, self.constants, {(i,): [["tt.divisibility", 16]] for i in aligned})


@dataclass(frozen=True)
class Resources:
    registers: int
    spills: int
    """bytes of local memory for each thread"""
    shared: int
    """bytes of shared memory for each program"""
    single_reads: int
    """how often a 16-bit number is read from global memory alone, and not in one piece with its neighbours"""
    through_l1: bool
    """whether there are reads that L1 keeps, in pieces of 8 or 16 bytes"""
    instructions: tuple[str, ...]
    """mma.sync, wgmma, tcgen05: those that occur"""


def block(
    shape_in: tuple[int, int, int], inner: int, stride: int, pre: bool, bottleneck: bool, side: str
) -> BlockShape:
    """A usual block; side is "identity", "pad" or "projection"."""
    c, h, w = shape_in
    n = inner * (4 if bottleneck else 1)
    plan = ((inner, 1, 1), (inner, 3, stride), (n, 1, 1)) if bottleneck else ((n, 3, stride), (n, 3, 1))
    convs: list[ConvShape] = []
    for channels, kernel, step in plan:
        convs.append(ConvShape(c, channels, h, w, kernel, step, kernel // 2, len(convs) < len(plan) - 1))
        c, h, w = channels, output(h, kernel, step, kernel // 2), output(w, kernel, step, kernel // 2)
    before = (n - shape_in[0]) // 2 if side == "pad" else 0
    activated = pre and side == "projection"
    shortcut = ShortcutShape(KINDS[side], 1, stride, 0, 0, before, activated)
    return BlockShape(tuple(convs), shortcut, pre, not pre, shape_in, (n, h, w))


def of_block(name: str, shape: BlockShape, dtype: torch.dtype, capability: int) -> Iterator[Specialisation]:
    """The convolutions of a block and, if there is more to its shortcut than the identity, its deletion; then all that
    its backward takes.
    """
    c, h, w = shape.shape_in
    for index, each in enumerate(shape.convs):
        tile = tiles.default(each.n, dtype, capability)
        constants = launch.conv_constants(shape, index, each, dtype)
        sizes = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        yield Specialisation(f"{name} conv{index + 1}", launch.conv, constants | sizes, dtype, tile)
    if shape.shortcut.kind != KINDS["identity"]:
        tile = tiles.default(shape.shape_out[0], dtype, 80)
        sizes = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        yield Specialisation(
            f"{name} shortcut", launch.shortcut, launch.skip_constants(shape, dtype) | sizes, dtype, tile
        )
    for index, each in enumerate(shape.convs):
        tile = tiles.default(each.c, dtype, capability)
        constants = backward.conv_constants(shape, index, dtype)
        sizes = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        yield Specialisation(
            f"{name} conv{index + 1} transpose", backward.conv_transpose, constants | sizes, dtype, tile
        )
        constants = backward.weight_constants(each, index == 0 and shape.prologue, 0, dtype, 128)
        yield Specialisation(f"{name} conv{index + 1} weights", backward.weight_gradient, constants, dtype, PLAIN)
        if backward.feeding_relu(shape, index):
            constants = backward.signs_constants(each.c, index == 0)
            yield Specialisation(f"{name} conv{index + 1} signs", backward.signs, constants, dtype, PLAIN)
    if shape.shortcut.kind != KINDS["identity"] or shape.closing:
        tile = backward.skip_tile(c, dtype)
        constants = backward.skip_constants(shape, dtype) | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        yield Specialisation(f"{name} shortcut transpose", backward.shortcut_transpose, constants, dtype, tile)
    if shape.closing:
        yield Specialisation(f"{name} signs", backward.signs, backward.signs_constants(c, False), dtype, PLAIN)
    yield Specialisation(f"{name} normalise", backward.normalise, backward.walk_constants(c * h * w), dtype, PLAIN)


def of_stem(
    name: str, shape: ConvShape, maxpool: bool, dtype: torch.dtype, capability: int
) -> Iterator[Specialisation]:
    """The stem's convolution, and the norms of the gradients that come back to what it (or its maximum pool) gives."""
    tile = tiles.default(shape.n, dtype, capability)
    constants = launch.conv_constants(None, 0, shape, dtype) | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    yield Specialisation(f"{name} stem", launch.conv, constants, dtype, tile)
    constants = backward.walk_constants(shape.out_elements // (4 if maxpool else 1))
    yield Specialisation(f"{name} square norms", backward.square_norms, constants, dtype, PLAIN)


def of_head(
    name: str, state: tuple[int, int, int], classes: int, pre: bool, dtype: torch.dtype
) -> Iterator[Specialisation]:
    """The head behind the last state, counting or giving logits, and where the backward starts."""
    channels, height, columns = state
    nothing = torch.empty(0)
    head = launch.Head(channels, height * columns, classes, pre, pre, nothing, nothing, nothing, nothing)
    yield Specialisation(f"{name} pool", launch.pool, launch.pool_constants(head), dtype, PLAIN)
    for logits in (False, True):
        constants = launch.classify_constants(head, not logits, logits)
        yield Specialisation(f"{name} {'logits' if logits else 'classify'}", launch.classify, constants, dtype, PLAIN)
    constants = backward.loss_constants(head, not pre)
    yield Specialisation(f"{name} loss gradient", backward.loss_gradient, constants, dtype, PLAIN)


def usual(dtype: torch.dtype, capability: int) -> Iterator[Specialisation]:
    """ResNet-110 in both forms, and the bottlenecks of ResNet-50 and ResNet-200."""
    for pre in (False, True):
        form = "pre" if pre else "post"
        c = 16
        stem = ConvShape(3, c, 32, 32, 3, 1, 1, not pre)
        yield from of_stem(form, stem, False, dtype, capability)
        for n, size in ((16, 32), (32, 16), (64, 8)):
            if n != c:
                for side in ("projection",) if pre else ("projection", "pad"):
                    shape = block((c, 2 * size, 2 * size), n, 2, pre, False, side)
                    yield from of_block(f"{form} {c}-{n} {side}", shape, dtype, capability)
            yield from of_block(f"{form} {n}", block((n, size, size), n, 1, pre, False, "identity"), dtype, capability)
            c = n
        yield from of_head(form, (c, size, size), 10, pre, dtype)
        stem = ConvShape(3, c, 224, 224, 7, 2, 3, True)
        yield from of_stem(f"{form} bottleneck", stem, True, dtype, capability)
        for n, size, stride in ((64, 56, 1), (128, 56, 2), (256, 28, 2), (512, 14, 2)):
            shape = block((c, size, size), n, stride, pre, True, "projection")
            yield from of_block(f"{form} bottleneck {c}-{4 * n}", shape, dtype, capability)
            small = size // stride
            shape = block((4 * n, small, small), n, 1, pre, True, "identity")
            yield from of_block(f"{form} bottleneck {4 * n}", shape, dtype, capability)
            c = 4 * n
        yield from of_head(f"{form} bottleneck", (c, small, small), 1000, pre, dtype)


def shipped(dtype: torch.dtype, capability: int, tf32: bool = False) -> Iterator[Specialisation]:
    """Every specialisation for the usual networks, each once; `tf32` for fp32 products on the tensor cores."""
    seen = set()
    for each in usual(dtype, capability):
        if tf32 and "PRECISION" in each.constants:
            each = replace(each, constants=each.constants | {"PRECISION": "tf32"})
        elif tf32:
            continue
        key = (each.kernel.__name__, tuple(sorted(each.constants.items())), each.tile)
        if key not in seen:
            seen.add(key)
            yield each


def compile_for(each: Specialisation, capability: int) -> Resources:
    """Compile for sm_`capability` without a GPU and read the resources from the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": each.tile.warps, "num_stages": each.tile.stages, **launch.OPTIONS}
    compiled = triton.compile(each.source(), target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = dict(word.split(":") for word in report.split() if word.startswith(("REG:", "STACK:", "LOCAL:")))
    ptx = compiled.asm["ptx"]
    found = tuple(name for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma") if name in ptx)
    spills = int(usage["STACK"]) + int(usage["LOCAL"])
    single = len(re.findall(r"ld\.global\S*\.[bu]16", ptx))
    kept = re.search(r"cp\.async\.ca\.shared\.global [^;]*, 0x(8|10),|ld\.global\.ca\.", ptx) is not None
    return Resources(int(usage["REG"]), spills, compiled.metadata.shared, single, kept, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    known = (80, 86, 89, 90, 100, 103, 120, 121)
    parser.add_argument("--capability", type=int, choices=known, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--dtype", choices=[*TYPES.values(), "tf32"], nargs="+", default=[*TYPES.values(), "tf32"])
    arguments = parser.parse_args()
    if product.WIDEN:
        parser.error("the kernels are interpreted; unset TRITON_INTERPRET to compile them")
    names = {name: dtype for dtype, name in TYPES.items()} | {"tf32": torch.float32}
    for capability in arguments.capability:
        for name in arguments.dtype:
            for each in shipped(names[name], capability, name == "tf32"):
                r = compile_for(each, capability)
                print(
                    f"sm_{capability} {name} {each.name:42} {r.registers:4} registers {r.spills:4} B spilled "
                    f"{r.shared:7} B shared  {' '.join(r.instructions)}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
