"""Every Triton kernel compiles for cards that are not here, uses their matrix units and stays within its resources."""

from __future__ import annotations

import importlib.util

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is missing")

# The matrix instruction of each architecture. TF32 is off, and without it fp32 products have none.
INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
# Bytes of shared memory: what leaves room for two programs on a multiprocessor of sm_80 (164 KB), sm_90 and sm_100 (228
# KB) where a tile is up to 64 channels wide, and for one where it is 128. No kernel may spill.
SHARED = {80: {64: 82_944, 128: 131_072}, 90: {64: 113_664, 128: 196_608}, 100: {64: 113_664, 128: 196_608}}
CHOSEN = {
    80: ("post 16 conv2", "pre bottleneck 512-1024 conv3"),
    90: ("pre 16-32 projection conv2", "post 32-64 pad conv2", "post 32-64 pad shortcut", "pool 64", "classify 10"),
    100: ("pre 64 conv1",),
}


def check(name: str, capability: int, dtype: torch.dtype) -> None:
    from resens_fast.kernels import specialisations as s

    every = (*s.usual(dtype, capability), *s.heads(64, 64, 10, dtype), *s.heads(2048, 49, 1000, dtype))
    (each,) = (one for one in every if one.name == name)
    found = s.compile_for(each, capability)
    assert found.spills == 0
    assert found.registers <= 255
    assert found.shared <= SHARED[capability][128 if each.tile.block_n == 128 else 64]
    multiplies = "conv" in name or "projection shortcut" in name or ("bottleneck" in name and "shortcut" in name)
    if multiplies and dtype != torch.float32:
        assert INSTRUCTION[capability] in found.instructions


@pytest.mark.parametrize(("capability", "name"), [(c, name) for c, names in CHOSEN.items() for name in names])
def test_compiles(capability: int, name: str) -> None:
    check(name, capability, torch.bfloat16)


def test_fp32_compiles_without_tf32() -> None:
    from resens_fast.kernels import specialisations as s

    each = next(one for one in s.usual(torch.float32, 90) if one.name == "post 64 conv2")
    assert s.compile_for(each, 90).instructions == ()


def test_default_tiles_waste_little() -> None:
    from resens_fast.kernels import tiles
    from resens_fast.kernels.pack import width

    for channels in range(1, 2049):
        stored = width(channels)
        for dtype in (torch.float32, torch.bfloat16):
            tile = tiles.default(channels, dtype, 90)
            assert tile.block_n * -(-stored // tile.block_n) <= max(1.34 * stored, stored + 48)
            assert stored % tiles.block_k(channels, dtype) == 0


def every_name() -> list[str]:
    if importlib.util.find_spec("triton") is None:
        return []
    from resens_fast.kernels import specialisations as s

    return [one.name for one in (*s.usual(torch.float16, 90), *s.heads(64, 64, 10, torch.float16))]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("capability", INSTRUCTION)
@pytest.mark.parametrize("name", every_name())
def test_every_specialisation_compiles(name: str, capability: int, dtype: torch.dtype) -> None:
    check(name, capability, dtype)
