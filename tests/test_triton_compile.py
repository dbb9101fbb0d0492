"""Every Triton kernel compiles for cards that are not here, uses their matrix units and stays within its resources."""

from __future__ import annotations

import importlib.util

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is missing")

# The matrix instruction of each architecture. Small tiles of sm_90 (fewer than 64 rows) take that of sm_80. fp32 has
# none unless TF32 is asked for.
INSTRUCTION = {80: "mma.sync", 86: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
# Bytes of shared memory: what leaves room for two programs on a multiprocessor of sm_80 (164 KB), sm_90 and sm_100 (228
# KB) where a tile is up to 64 channels wide, and for one where it is 128; all that sm_86 and sm_120 give a program.
SHARED = {
    80: {64: 82_944, 128: 131_072},
    86: {64: 101_376, 128: 101_376},
    90: {64: 113_664, 128: 196_608},
    100: {64: 113_664, 128: 196_608},
    120: {64: 101_376, 128: 101_376},
}
# Bytes of spills. ptxas keeps a value or four in memory where that lets one more program onto a multiprocessor: given
# 128 registers a thread, the same kernels spill nothing. Where it takes more than that itself, nothing may spill.
TRADED, ENOUGH = 32, 128
# name: (type, whether fp32 products may be TF32)
TYPES = {
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
}
CHOSEN = (
    (80, "bfloat16", "post 16 conv2"),
    (80, "bfloat16", "pre bottleneck 512-1024 conv3"),
    (80, "bfloat16", "post 16-32 projection conv1 transpose"),
    (80, "float16", "post 32-64 projection conv2 weights"),
    (86, "bfloat16", "pre bottleneck 256-512 conv3"),
    (90, "bfloat16", "pre 16-32 projection conv2"),
    (90, "bfloat16", "post 32-64 pad conv2"),
    (90, "bfloat16", "post 32-64 pad shortcut"),
    (90, "bfloat16", "pre 16-32 projection shortcut transpose"),
    (90, "bfloat16", "post 32-64 pad shortcut transpose"),
    (90, "bfloat16", "post 32-64 projection conv2 transpose"),
    (90, "bfloat16", "post bottleneck stem"),
    (90, "bfloat16", "pre pool"),
    (90, "bfloat16", "post classify"),
    (90, "bfloat16", "pre loss gradient"),
    (90, "bfloat16", "pre 64 conv1 signs"),
    (90, "bfloat16", "post square norms"),
    (90, "float16", "post 64 normalise"),
    (90, "float32", "post 64 conv2"),
    (90, "tf32", "post 64 conv2"),
    (100, "bfloat16", "pre 64 conv1"),
    (100, "bfloat16", "post 32-64 projection shortcut transpose"),
    (100, "float16", "pre 64 conv1 transpose"),
    (120, "bfloat16", "pre bottleneck 256-512 conv3"),
)


def check(name: str, capability: int, kind: str) -> None:
    from resens_fast.kernels import specialisations as s

    dtype, tf32 = TYPES[kind]
    (each,) = (one for one in s.shipped(dtype, capability, tf32) if one.name == name)
    found = s.compile_for(each, capability)
    assert found.spills <= (TRADED if found.registers <= ENOUGH else 0)
    assert found.registers <= 255
    assert found.shared <= SHARED[capability][128 if each.tile.block_n == 128 else 64]
    # The words of sign bits are all that is read one by one.
    assert found.single_reads == 0 or "transpose" in name
    # Nine taps read the same pixels: eight times out of nine from L1.
    assert found.through_l1 or each.constants.get("KERNEL", 1) == 1 or "weights" in name
    if "PRECISION" not in each.constants or (each.constants.get("SHORTCUT") in (1, 2) and "conv" not in name):
        return  # nothing is multiplied
    if kind == "float32":
        assert found.instructions == ()
    else:
        small = "BLOCK_C" in each.constants and each.constants["BLOCK_C"] < 64
        assert (INSTRUCTION[80] if small else INSTRUCTION[capability]) in found.instructions


@pytest.mark.parametrize(("capability", "kind", "name"), CHOSEN)
def test_compiles(capability: int, kind: str, name: str) -> None:
    check(name, capability, kind)


def test_default_tiles_waste_little() -> None:
    from resens_fast.kernels import tiles
    from resens_fast.kernels.pack import width

    for channels in range(1, 2049):
        stored = width(channels)
        for dtype in (torch.float32, torch.bfloat16):
            tile = tiles.default(channels, dtype, 90)
            assert tile.block_n * -(-stored // tile.block_n) <= max(1.34 * stored, stored + 48)
            assert stored % tiles.block_k(channels, dtype) == 0


def every() -> list[tuple[int, str, str]]:
    if importlib.util.find_spec("triton") is None:
        return []
    from resens_fast.kernels import specialisations as s

    return [
        (capability, kind, one.name)
        for capability in s.ARCHITECTURES
        for kind, (dtype, tf32) in TYPES.items()
        for one in s.shipped(dtype, capability, tf32)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "kind", "name"), every())
def test_every_specialisation_compiles(capability: int, kind: str, name: str) -> None:
    check(name, capability, kind)
