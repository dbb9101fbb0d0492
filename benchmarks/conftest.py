"""Options, the table at the end and the JSON file. `pytest benchmarks/ --benchmark-only [--quick] [--threads 2]`."""

from __future__ import annotations

import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from resens_fast.engines import cpu

RESULTS: dict[str, dict[str, Any]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="a few rows without torch.compile's block by block, under two minutes"
    )
    parser.addoption("--threads", type=int, default=torch.get_num_threads(), help="threads of every peer")
    parser.addoption("--peers", default="ours,eager,compile,planned", help="which of ours, eager, compile, planned")
    parser.addoption("--codebase", help="a clone of github.com/akamaster/pytorch_resnet_cifar10, for test_dropin.py")
    parser.addoption("--results", default=".benchmarks/cpu.json", help="where the JSON goes")


@pytest.fixture(scope="session", autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    torch.set_num_threads(request.config.getoption("--threads"))


def peak(threads: int) -> float:
    """Multiply-add peak of this machine in GFLOP/s: the C++ yardstick on that many threads, best of five."""
    from concurrent.futures import ThreadPoolExecutor

    def once(_: int) -> float:
        return float(torch.ops.resens_fast.cpu_multiply_adds(cpu.chosen_isa(), 2_000_000))

    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            work = sum(pool.map(once, range(threads)))
            best = max(best, work / (time.perf_counter() - start) / 1e9)
    return best


def machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next(
            (line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")),
            name,
        )
    return {"cpu": name, "isa": cpu.chosen_isa(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def _cell(ratio: float | None, goal: float) -> str:
    if ratio is None:
        return "-"
    return f"{ratio:.2f}x" + (f" ({goal:g}: {'met' if ratio >= goal else 'missed'})" if goal else "")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not RESULTS:
        return
    top = peak(torch.get_num_threads())
    info = {**machine(), "peak_gflops": top}
    write = terminalreporter.write_line
    write("")
    write(
        f"{info['cpu']}, {info['isa']}, {info['threads']} threads, torch {info['torch']}, multiply-add peak {top:.0f} GFLOP/s"  # noqa: E501
    )
    header = (
        "row",
        "ours, s: median (min to max)",
        "vs eager",
        "vs compile",
        "vs planned",
        "images x configs /s",
        "executed GFLOP/s",
        "naive GFLOP/s",
    )
    lines = [header]
    for name, r in RESULTS.items():
        if "ours" not in r["rounds"]:
            continue
        s = r["seconds"] = {peer: statistics.median(rounds) for peer, rounds in r["rounds"].items()}
        ours = r["rounds"]["ours"]
        ratio = {p: s[p] / s["ours"] if p in s else None for p in ("eager", "compile", "planned")}
        lines.append((
            name, f"{s['ours']:.3f} ({min(ours):.3f} to {max(ours):.3f})", _cell(ratio["eager"], r["goal"][0]), _cell(ratio["compile"], r["goal"][1]), _cell(ratio["planned"], 0),  # noqa: E501
            f"{r['results'] / s['ours']:,.0f}", f"{r['executed'] / s['ours'] / 1e9:.0f}", f"{r['naive'] / s['ours'] / 1e9:.0f}",  # noqa: E501
        ))  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        write("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    path = Path(config.getoption("--results"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": info, "rows": RESULTS}, indent=1) + "\n")
    write(f"written to {path}")
