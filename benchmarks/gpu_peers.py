"""Peers and clocks for gpu_check.py: eager and compiled torch on a GPU, timed with events; needs torch only."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

PEERS = ("eager", "compile", "graphs")


def seconds(run: Callable[[], Any], at_least: float = 0.3, most: int = 50) -> float:
    """Median seconds of a call on the GPU, after one call to warm up; repeats for `at_least` seconds."""
    run()
    torch.cuda.synchronize()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < at_least and len(times) < most):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return sorted(times)[len(times) // 2]


def dense_peak(dtype: torch.dtype) -> float:
    """FLOP/s of a large dense product: what `% of peak` is taken of."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b, 0.5)


def compiled(model: torch.nn.Module, peer: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The whole model as a peer runs it; an error rather than a silent return to eager."""
    if peer == "eager":
        return model
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if peer == "compile":
        return torch.compile(model, dynamic=False)
    return torch.compile(model, dynamic=False, mode="reduce-overhead")


def peer_rate(
    model: torch.nn.Module,
    shape: tuple[int, int, int],
    peer: str,
    dtype: torch.dtype,
    batches: tuple[int, ...],
    most: float = 60.0,
) -> dict[str, Any]:
    """Images per second of the intact model in channels_last at its best batch size, and seconds spent.

    Another batch size is tried only while the last one's time fits into what is left of `most` seconds.
    """
    began = time.perf_counter()
    model = model.to("cuda", dtype, memory_format=torch.channels_last).eval()
    best: dict[str, Any] = {"images_per_second": 0.0}
    with torch.inference_mode():
        for batch in batches:
            spent, tried = time.perf_counter() - began, batches.index(batch)
            if tried and spent + spent / tried > most:
                break
            x = torch.randn(batch, *shape, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
            torch.compiler.reset()
            run = compiled(model, peer)
            try:
                rate = batch / seconds(lambda run=run, x=x: run(x))  # type: ignore[misc]
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                continue
            if rate > best["images_per_second"]:
                best = {"images_per_second": rate, "batch": batch}
    return {**best, "spent": time.perf_counter() - began}
