"""What this machine has and what it lacks: versions, the extension, engines, instruction sets, devices, data.

Every part is looked at on its own, and what goes wrong while looking is part of the answer: a doctor never fails.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from . import extension
from .version import __version__

_PACKAGES = (
    "torch", "torchvision", "triton", "numpy", "scipy", "pandas", "pyarrow", "matplotlib", "scikit-learn",
    "safetensors", "typer", "rich", "tqdm",
)  # fmt: skip
# In the order of /proc/cpuinfo's flags; these decide which kernels the cpu engine can take.
_ISAS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512_bf16",
    "amx_bf16",
    "asimd",
    "sve",
    "bf16",
)


def report() -> dict[str, Any]:
    """Everything `text` prints, as plain dicts, lists, strings and numbers; a part that failed is {"error": why}."""
    parts: dict[str, Callable[[], Any]] = {
        "versions": _versions,
        "extension": _extension,
        "engines": _engines,
        "cpu": _cpu,
        "cuda": _cuda,
        "data": _data,
        "networks": _networks,
    }
    return {name: _try(part) for name, part in parts.items()}


def text() -> str:
    """The report for people: one heading a part, one line a fact."""
    lines: list[str] = []
    for heading, facts in report().items():
        lines.append(heading)
        width = max((len(str(name)) for name in facts), default=0)
        lines += [f"  {name!s:<{width}}  {_show(value)}" for name, value in facts.items()]
    return "\n".join(lines)


def _show(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _try(part: Callable[[], Any]) -> Any:
    try:
        return part()
    except Exception as error:  # whatever it is, it is an answer
        return {"error": f"{type(error).__name__}: {error}"}


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "resens_fast": __version__,
        "python": f"{platform.python_version()} {sys.executable}",
    }
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _extension() -> dict[str, Any]:
    why = extension.reason()
    info = extension.info()
    if why is not None:
        return {"compiled": f"no: {why}", "planner": "pure Python (same plans, slower)"}
    cuda = (
        f"{info['cuda']} ({', '.join(info['architectures'])})" if info.get("cuda") else f"no: {info.get('cuda_reason')}"
    )
    facts = {
        "compiled": f"yes, for torch {info['torch']}, by {info['compiler']}",
        "ISAs": ["portable", *info["isas"]],
        "CUDA": cuda,
    }
    if extension.stale():
        facts["note"] = "csrc has changed since this build: run `make build`"
    return facts


def _engines() -> dict[str, str]:
    from . import engines

    def state(name: str) -> str:
        engine = engines.get(name)
        missing = engine.missing()
        if missing is not None:
            return f"missing: {missing}"
        return "ready" if engine.unproven is None else f"ready, but auto passes over it: {engine.unproven}"

    found = {}
    for name in engines.names():
        answer = _try(partial(state, name))
        found[name] = answer if isinstance(answer, str) else f"broken: {answer['error']}"
    return found


def _cpu() -> dict[str, Any]:
    import torch

    return {
        "name": _cpu_name(),
        "ISA": cpu_isas(),
        "cores": f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} usable",
        "torch threads": torch.get_num_threads(),
        "torch kernels": torch.backends.cpu.get_cpu_capability(),
    }


def _cpuinfo(*keys: str) -> str:
    """The first value of one of these keys in /proc/cpuinfo, or nothing."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() in keys:
                    return value.strip()
    except OSError:  # not Linux
        pass
    return ""


def _cpu_name() -> str:
    return _cpuinfo("model name", "Model") or platform.processor() or platform.machine()


def cpu_isas() -> list[str]:
    """The instruction sets of this CPU that kernels are written for, by Linux's names; empty where it does not tell."""
    flags = set(_cpuinfo("flags", "Features").split())
    return [isa for isa in _ISAS if isa in flags]


def _cuda() -> dict[str, Any]:
    import torch

    if torch.version.cuda is None:
        return {"torch": "a build without CUDA"}
    facts: dict[str, Any] = {"torch": f"built for CUDA {torch.version.cuda}"}
    module = extension.module()
    if module is not None and extension.info().get("cuda"):
        devices, why = module.cuda_devices()
        for i, d in enumerate(devices):
            facts[f"device {i}"] = (
                f"{d['name']}, sm_{d['capability'][0]}{d['capability'][1]}, {d['multiprocessors']} SMs, "
                f"{d['shared_bytes_per_block'] // 1024} KB shared memory, {d['l2_bytes'] >> 20} MB L2"
            )
            answer = _try(partial(_cuda_engine, i, d["capability"]))
            facts[f"cuda engine on {i}"] = answer if isinstance(answer, str) else f"broken: {answer['error']}"
        if why:
            facts["devices"] = f"none: {why}"
        return facts
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        facts[f"device {i}"] = f"{p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} SMs"
    if not torch.cuda.device_count():
        facts["devices"] = "none"
    return facts


def _cuda_engine(index: int, capability: tuple[int, int]) -> str:
    """What the cuda engine does for CIFAR-sized networks of basic blocks on a device, and for the others."""
    import torch

    from .engines.cuda import ASK, OLDEST, WIDTHS

    if tuple(capability) < OLDEST:
        return f"none: it needs compute capability {OLDEST[0]}.{OLDEST[1]}; the torch engine runs there"
    found = {width: torch.ops.resens_fast.cuda_variant(index, False, width)[0] for width in WIDTHS}
    tape = [f"{width}, {2 * width} and {4 * width} channels ({n} per CTA)" for width, n in found.items() if n]
    if not tape:
        return "level by level: this build has no tape kernel that fits the device"
    return (
        f"one launch for CIFAR networks of basic blocks of {' or '.join(tape)} in bfloat16 or float16, others and "
        f"float32 level by level; for a float32 network {ASK}"
    )


def _data() -> dict[str, str]:
    """Where data sets are; nothing is opened or downloaded."""
    found: dict[str, str] = {"RESENS_FAST_DATA": os.environ.get("RESENS_FAST_DATA", "not set")}
    found["digits"] = "with scikit-learn" if _installed("scikit-learn") else "missing: needs scikit-learn"
    from . import data

    found["cifar10"] = data.find_cifar10() or "no copy found (RESENS_FAST_DATA, ~/.cache/resens_fast, ./data)"
    return found


def _networks() -> dict[str, str]:
    from . import models

    return dict.fromkeys(models.names(), "ships with the package") or {"none": "ship with this installation"}


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
