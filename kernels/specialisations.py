"""Which kernels are compiled for a network, and how to compile them for a card that is not here.

`python -m resens_fast.kernels.specialisations` compiles those of the usual networks for sm_80, sm_90 and sm_100 and
prints registers, spills, shared memory and the matrix instructions they use.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import launch, tiles
from .pack import KINDS, BlockShape, ConvShape, ShortcutShape, output

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
ARCHITECTURES = (80, 90, 100)


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

        typed = {"in_ptr", "out_ptr", "states_ptr", "weight_ptr", "s_weight_ptr"}
        types = {"steps_ptr": "*i32", "labels_ptr": "*i64", "counts_ptr": "*i64"}
        types |= dict.fromkeys(typed, "*" + TYPES[self.dtype])
        if "means_ptr" in self.kernel.arg_names:
            types["weight_ptr"] = "*fp32"
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
    """The convolutions of a block and, if there is more to its shortcut than the identity, its deletion."""
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


def usual(dtype: torch.dtype, capability: int) -> Iterator[Specialisation]:
    """ResNet-110 in both forms, and the bottlenecks of ResNet-50 and ResNet-200."""
    for pre in (False, True):
        form = "pre" if pre else "post"
        c = 16
        for n, size in ((16, 32), (32, 16), (64, 8)):
            if n != c:
                for side in ("projection",) if pre else ("projection", "pad"):
                    shape = block((c, 2 * size, 2 * size), n, 2, pre, False, side)
                    yield from of_block(f"{form} {c}-{n} {side}", shape, dtype, capability)
            yield from of_block(f"{form} {n}", block((n, size, size), n, 1, pre, False, "identity"), dtype, capability)
            c = n
        c = 64
        for n, size, stride in ((64, 56, 1), (128, 56, 2), (256, 28, 2), (512, 14, 2)):
            shape = block((c, size, size), n, stride, pre, True, "projection")
            yield from of_block(f"{form} bottleneck {c}-{4 * n}", shape, dtype, capability)
            small = size // stride
            shape = block((4 * n, small, small), n, 1, pre, True, "identity")
            yield from of_block(f"{form} bottleneck {4 * n}", shape, dtype, capability)
            c = 4 * n


def heads(channels: int, pixels: int, classes: int, dtype: torch.dtype) -> Iterator[Specialisation]:
    """The head of a network, which is compiled with the options Triton starts from."""
    nothing = torch.empty(0)
    head = launch.Head(channels, pixels, classes, True, True, nothing, nothing, nothing, nothing)
    tile = tiles.Tile(0, 0, 4, 3)
    yield Specialisation(f"pool {channels}", launch.pool, launch.pool_constants(head), dtype, tile)
    constants = launch.classify_constants(head, True, False)
    yield Specialisation(f"classify {classes}", launch.classify, constants, dtype, tile)


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
    found = tuple(name for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma") if name in compiled.asm["ptx"])
    return Resources(int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"]), compiled.metadata.shared, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, nargs="*", default=list(ARCHITECTURES))
    parser.add_argument("--dtype", choices=sorted(TYPES.values()), nargs="*", default=sorted(TYPES.values()))
    arguments = parser.parse_args()
    for capability in arguments.capability:
        for dtype in (dtype for dtype, name in TYPES.items() if name in arguments.dtype):
            for each in (*usual(dtype, capability), *heads(64, 64, 10, dtype), *heads(2048, 49, 1000, dtype)):
                r = compile_for(each, capability)
                print(
                    f"sm_{capability} {TYPES[dtype]} {each.name:32} {r.registers:4} registers {r.spills:4} B spilled "
                    f"{r.shared:7} B shared  {' '.join(r.instructions)}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
