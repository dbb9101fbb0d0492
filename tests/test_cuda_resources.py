"""What the compiler says about every kernel that ships: no spills, registers and shared memory within a table."""

from __future__ import annotations

import shutil

import pytest

from benchmarks import roofline

from .cuda_compile import cubin, disassembler, instructions, nvcc
from .cuda_host import Host, build

pytestmark = pytest.mark.skipif(nvcc() is None, reason="the resource report needs nvcc")

# (architecture, images per CTA, channels of the first stage): registers seen with nvcc 13.0; eight more pass, for other
# compilers.
REGISTERS = {
    (80, 1, 16): 158,
    (90, 1, 16): 158,
    (90, 2, 16): 226,
    (90, 1, 32): 219,
    (100, 1, 16): 166,
    (100, 2, 16): 228,
    (100, 1, 32): 224,
    (120, 1, 16): 162,
}
SLACK = 8
SHARED = {(1, 16): 100_624, (2, 16): 201_232, (1, 32): 225_808}
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
CASES = [
    pytest.param(a, t, marks=[pytest.mark.slow] if a == 120 else [])
    for a in (80, 90, 100, 120)
    for t in ("bf16", "fp16")
]


def kernel_name(dtype: str, images: int, width: int) -> str:
    return f"tape_kernelINS0_4{'Bf16' if dtype == 'bf16' else 'Fp16'}ELi{images}ELi{width}E"


@pytest.mark.parametrize(("architecture", "dtype"), CASES)
def test_tape_kernels(architecture: int, dtype: str) -> None:
    _, report = cubin(f"tape_{dtype}_launch.cu", architecture)
    assert len(report) == len(SHARED)
    for variant, shared in SHARED.items():
        (found,) = (row for name, row in report.items() if kernel_name(dtype, *variant) in name)
        assert (found["stack"], found["stores"], found["loads"]) == (0, 0, 0)
        expected = REGISTERS.get((architecture, *variant))
        assert (expected is not None) == (shared <= SHARED_LIMIT[architecture])
        if expected is None:  # it does not fit there: no body
            assert found["registers"] < 32
        else:
            assert 32 < found["registers"] <= min(255, expected + SLACK)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the host harness needs g++")
def test_shared_memory_is_what_the_table_says() -> None:
    host = Host(build())
    assert {variant: host.library.rf_shared_bytes(*variant) for variant in SHARED} == SHARED


@pytest.mark.parametrize("architecture", [80, pytest.param(100, marks=pytest.mark.slow)])
def test_stem(architecture: int) -> None:
    _, report = cubin("stem_launch.cu", architecture)
    (found,) = report.values()
    assert (found["stack"], found["stores"], found["loads"]) == (0, 0, 0)
    assert found["registers"] <= 64


@pytest.mark.skipif(disassembler() is None, reason="counting instructions needs nvdisasm (the CUDA toolkit or triton)")
@pytest.mark.parametrize(
    ("architecture", "images", "width"), [(80, 1, 16), (90, 1, 16), (90, 2, 16), (90, 1, 32), (100, 2, 16)]
)
def test_the_compiled_loops_are_those_of_the_counter_model(architecture: int, images: int, width: int) -> None:
    """As many HMMA, LDSM and LDS.128 as the unrolled source has, so the model's counts are the hardware's; nothing in
    local memory.
    """
    path, _ = cubin("tape_bf16_launch.cu", architecture)
    counts = instructions(path, kernel_name("bf16", images, width))
    assert counts["HMMA"] == roofline.static_mma(images, width)
    assert counts["LDSM"] == roofline.static_ldmatrix(images, width)
    # The head reads the pooled features one by one; the compiler makes fours of them, `width` in all.
    assert counts["LDS.128"] - roofline.static_lds128(images, width) in (0, width)
    assert counts.get("LDL", 0) == counts.get("STL", 0) == 0
