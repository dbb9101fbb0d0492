"""Norms of 1,000 path gradients of mixed length: ours, an autograd loop (the column "vs eager"), the torch engine.

The autograd loop runs every 50th path; its stored forward is counted once, its paths fifty times. `--quick` leaves out
the torch engine, which takes minutes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

import resens_fast as rf
from benchmarks import rows
from benchmarks.conftest import RESULTS
from benchmarks.gradient_peers import Autograd, engine
from benchmarks.test_cpu import new_result, timed
from resens_fast.gradient_plan import gradient_plan

NETWORKS: dict[str, Callable[[], torch.nn.Module]] = {"110 pre": rows.trained, "110 post": rows.post}
PEERS = ("ours", "eager", "planned")
PATHS, SAMPLE, IMAGES, GOAL, ROUNDS = 1000, 50, 32, 6.0, 3
CHOSEN = range(SAMPLE // 2, PATHS, SAMPLE)  # of paths in order of length: the sample's mean length is theirs


@functools.lru_cache(maxsize=1)
def prepared(name: str) -> tuple[rf.ResidualNetwork, rf.Sweep, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Network, paths of 1 to 54 blocks in order of length, images, labels, and our norms [PATHS, IMAGES]."""
    net = rf.wrap(NETWORKS[name]())
    n, draw = len(net.blocks), np.random.RandomState(0)
    gates = np.zeros((PATHS, n), dtype=np.float32)
    for i in range(PATHS):
        gates[i, draw.permutation(n)[: 1 + i * n // PATHS]] = 1
    sweep = rf.sweeps.from_gates(net, gates)
    x = torch.randn(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    y = torch.arange(IMAGES) % 10
    return net, sweep, x, y, engine("cpu", net, sweep)(x, y)


def assert_equal(found: torch.Tensor, ours: torch.Tensor) -> None:
    """Up to a few ReLUs that fall on the other side of 0; float32 ends where ours goes on."""
    off = ((found - ours).abs() / ours)[ours > 1e-30]
    assert float(off.median()) < 1e-5, "the peer computes something else"
    assert float(off.quantile(0.9)) < 1e-2, "the peer computes something else"


# With denormal numbers the autograd loop takes three times as long on the trained network, whose gradients leave
# float32's range at 40 blocks. Only threads that start afterwards inherit the setting: this one brings its own.
_FLUSHING = ThreadPoolExecutor(1, initializer=lambda: torch.set_flush_denormal(True))


def flushing(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns, from the thread whose denormal numbers are zero."""
    return _FLUSHING.submit(function, *arguments).result()


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_path_gradients(name: str, peer: str, benchmark: Any, request: pytest.FixtureRequest) -> None:
    wanted = request.config.getoption("--peers").split(",")
    if peer not in wanted or (peer == "planned" and request.config.getoption("--quick")):
        pytest.skip("not asked for")
    net, sweep, x, y, ours = prepared(name)
    scale, once = 1.0, 0.0
    if peer == "eager":
        part = [sweep[i] for i in CHOSEN]
        best: tuple[float, Any] | None = None
        for form in (torch.channels_last, torch.contiguous_format):
            loop = Autograd(net, form)
            flushing(loop.forward, x, y)
            assert_equal(flushing(loop.paths, part), ours[CHOSEN])
            seconds = timed(benchmark, functools.partial(flushing, loop.paths, part[::4]))
            if best is None or seconds < best[0]:
                best = (seconds, loop)
        assert best is not None
        loop, scale = best[1], SAMPLE
        once = timed(benchmark, functools.partial(flushing, loop.forward, x, y))
        run = functools.partial(flushing, loop.paths, part)
    else:
        norms = engine("cpu" if peer == "ours" else "torch", net, sweep)
        if peer == "planned":
            assert_equal(norms(x[:1], y[:1]), ours[:, :1])
        run = functools.partial(norms, x, y)
    benchmark.group = f"{name}, path gradients"
    benchmark.pedantic(run, rounds=ROUNDS if peer != "planned" else 1, iterations=1)
    result = RESULTS.setdefault(
        f"{name}, 1000 path gradients", new_result((GOAL, 0.0), net, gradient_plan(net, sweep), IMAGES)
    )
    result["rounds"][peer] = [once + seconds * scale for seconds in benchmark.stats.stats.data]
