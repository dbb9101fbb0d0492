"""Compiles the kernels with nvcc for architectures that this machine need not have; results are kept by source hash."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from .cuda_host import CSRC, cache_folder, sources_hash

FLAGS = ("-std=c++20", "-O3", "-Xptxas", "-v", "-cubin")


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    named = str(Path(home) / "bin" / "nvcc") if home else None
    return named if named and Path(named).is_file() else shutil.which("nvcc")


def disassembler() -> str | None:
    """nvdisasm from the toolkit or from triton's wheel."""
    found = shutil.which("nvdisasm")
    if found:
        return found
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return str(path) if path.is_file() else None


def cubin(source: str, architecture: int) -> tuple[Path, dict[str, dict[str, int]]]:
    """The compiled file and, per kernel (its mangled name), registers, bytes of stack, spill stores and loads."""
    compiler = nvcc()
    assert compiler is not None
    key = sources_hash(CSRC, source, str(architecture), *FLAGS, _version(compiler))
    path = cache_folder() / f"{Path(source).stem}-sm{architecture}-{key}.cubin"
    report = path.with_suffix(".json")
    if not report.exists():
        draft = path.with_suffix(f".{os.getpid()}")
        code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        command = [compiler, *FLAGS, code, "-o", str(draft), str(CSRC / "cuda" / source), f"-I{CSRC}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        draft.replace(path)
        note = report.with_suffix(f".{os.getpid()}")
        note.write_text(json.dumps(_resources(done.stdout + done.stderr)))
        note.replace(report)
    return path, json.loads(report.read_text())


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


def _resources(text: str) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for block in re.split(r"Compiling entry function ", text)[1:]:
        name = re.match(r"'(\w+)'", block)
        memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block)
        registers = re.search(r"Used (\d+) registers", block)
        assert name, block
        assert memory, block
        assert registers, block
        stack, stores, loads = map(int, memory.groups())
        found[name[1]] = {"registers": int(registers[1]), "stack": stack, "stores": stores, "loads": loads}
    return found


def instructions(path: Path, kernel: str) -> dict[str, int]:
    """How often each SASS opcode stands in the kernel whose name contains `kernel`: without its suffixes, and LDS also
    with its width.
    """
    tool = disassembler()
    assert tool is not None
    text = subprocess.run([tool, "-c", str(path)], capture_output=True, text=True, check=True).stdout
    counts: dict[str, int] = {}
    for section in re.split(r"\n\s*\.section\s+", text):
        if not section.startswith(".text.") or kernel not in section.split(",")[0]:
            continue
        for opcode, width in re.findall(
            r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9]*)((?:\.[A-Z0-9]+)*)", section
        ):
            counts[opcode] = counts.get(opcode, 0) + 1
            if opcode == "LDS":
                counts[opcode + width] = counts.get(opcode + width, 0) + 1
    return counts
