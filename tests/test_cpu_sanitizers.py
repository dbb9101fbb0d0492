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
    "-O1",
    "-g",
    "-ffp-contract=off",
    "-w",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    f"-I{ROOT / 'csrc'}",
]
ISAS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "csrc" / "cpu").is_dir() or not CXX, reason="needs the sources and a C++ compiler")
def test_no_sanitizer_complains(tmp_path: Path) -> None:
    cpuinfo = Path("/proc/cpuinfo")
    have = cpuinfo.read_text() if cpuinfo.exists() else ""
    isas = [isa for isa in ISAS if (isa if isa == "avx2" else "avx512vl") in have]
    common = [*FLAGS, *(f"-DRESENS_{isa.upper()}" for isa in isas)]
    cpu = ROOT / "csrc" / "cpu"
    jobs = [
        (cpu / f"{stem}.cpp", [])
        for stem in ("network", "pack", "program", "block", "eval", "dispatch", "conv_portable")
    ]
    jobs += [(cpu / f"conv_{isa}.cpp", ISAS[isa]) for isa in isas] + [
        (ROOT / "csrc" / "testing" / "cpu_driver.cpp", [])
    ]
    objects = []
    for source, more in jobs:
        objects.append(str(tmp_path / f"{source.stem}.o"))
        subprocess.run([CXX, *common, *more, "-c", str(source), "-o", objects[-1]], check=True)
    driver = tmp_path / "driver"
    subprocess.run([CXX, *FLAGS, *objects, "-pthread", "-o", str(driver)], check=True)
    done = subprocess.run([str(driver)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok") == len(isas) + 1
