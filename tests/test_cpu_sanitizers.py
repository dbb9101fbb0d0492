"""The CPU engine under AddressSanitizer and UBSan: csrc/testing/cpu_driver.cpp, built here and run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CXX = os.environ.get("CXX") or shutil.which("c++") or ""
FLAGS = [
    "-std=c++20",
    "-Og",
    "-g",
    "-ffp-contract=off",
    "-w",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    f"-I{ROOT / 'csrc'}",
]
_AVX512 = ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
ISAS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": _AVX512,
    "avx512bf16": [*_AVX512, "-mavx512bf16"],
}


NAMES = ("network", "pack", "program", "block", "eval", "backward", "gradients", "dispatch")


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


# Checks of every load, which the compiler can leave to AddressSanitizer: half of the time to build the kernels.
LOADS = "-fno-sanitize=null,alignment,object-size"


def _run(folder: Path, isas: list[str], *arguments: str, loads: bool = True) -> str:
    """Build the driver with the portable kernels and those for `isas`; returns what it prints."""
    cpu = ROOT / "csrc" / "cpu"
    common = [*FLAGS, *(f"-DRESENS_{isa.upper()}" for isa in isas)]
    jobs = [(cpu / f"{name}.cpp", []) for name in NAMES]
    jobs += [(cpu / "conv_portable.cpp", [] if loads else [LOADS])]
    jobs += [(cpu / f"conv_{isa}.cpp", ISAS[isa]) for isa in isas]
    jobs += [(ROOT / "csrc" / "testing" / "cpu_driver.cpp", [])]
    objects = [str(folder / f"{source.stem}.o") for source, _ in jobs]
    for (source, more), target in zip(jobs, objects, strict=True):
        subprocess.run([CXX, *common, *more, "-c", str(source), "-o", target], check=True)
    driver = folder / "driver"
    subprocess.run([CXX, *FLAGS, *objects, "-pthread", "-o", str(driver)], check=True)
    done = subprocess.run([str(driver), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


needs_compiler = pytest.mark.skipif(
    not (ROOT / "csrc" / "cpu").is_dir() or not CXX, reason="needs the sources and a C++ compiler"
)


@needs_compiler
def test_the_portable_kernels_under_sanitizers(tmp_path: Path) -> None:
    assert "portable: ok" in _run(tmp_path, [], loads=False)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("isa", ISAS)
def test_vector_kernels_under_sanitizers(isa: str, tmp_path: Path) -> None:
    flag = {"avx512": "avx512vl", "avx512bf16": "avx512_bf16"}.get(isa, isa)
    if flag not in _cpuinfo():
        pytest.skip(f"this processor has no {isa}")
    assert f"{isa}: ok" in _run(tmp_path, [isa], isa)


@pytest.mark.slow
@needs_compiler
def test_the_portable_kernels_on_aarch64(tmp_path: Path) -> None:
    compiler, machine = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static")
    if compiler is None or machine is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64-static")
    sources = [ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in (*NAMES, "conv_portable")]
    sources.append(ROOT / "csrc" / "testing" / "cpu_driver.cpp")
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-w", f"-I{ROOT / 'csrc'}", "-static", "-pthread"]
    driver = tmp_path / "driver"
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(driver)], check=True)
    done = subprocess.run([machine, str(driver)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "portable: ok" in done.stdout
