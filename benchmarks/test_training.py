"""A training step with random blocks against one of the full network: forward, backward and SGD on the same images.

`pytest benchmarks/test_training.py --benchmark-only -s [--threads 1] [--quick]`.  The peers take turns in one process;
every step draws its own mask, so that a round sees cheap and dear draws of all stages alike.  Dtype is what training
takes on this machine ("auto").
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import resens_fast as rf
from resens_fast.training import best_dtype, sample_blocks, stochastic_depth

_BATCH, _ROUNDS, _EPOCH = 64, 12, 50_000
ROWS = [(56, True, 12), (110, True, 23), (110, False, 23)]


def step(net: rf.ResidualNetwork, forward: Callable[..., torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, 0.9, weight_decay=5e-4, nesterov=True)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_BATCH, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (_BATCH,), generator=generator)
    dtype = best_dtype(torch.device("cpu"))

    def run() -> None:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(forward(net, images).float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return run


def rows_of(net: rf.ResidualNetwork, share: float) -> Callable[..., torch.Tensor]:
    """Every image draws blocks for itself."""
    return lambda net, x: net(x, mask=torch.rand(len(x), len(net.blocks)) < share)


@pytest.mark.parametrize(("depth", "preactivation", "k"), ROWS)
def test_step(depth: int, preactivation: bool, k: int, benchmark: Any, request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--quick") and depth > 56:
        pytest.skip("not asked for")
    torch.manual_seed(0)
    net = rf.wrap(rf.models.resnet(depth, preactivation=preactivation), torch.zeros(1, 3, 32, 32)).train()
    net.to(memory_format=torch.channels_last)
    n = len(net.blocks)
    peers = {
        "full": step(net, lambda net, x: net(x)),
        f"{k} of {n}": step(net, sample_blocks(k)),
        "stochastic depth 0.5": step(net, stochastic_depth(0.5)),
        f"{k / n:.0%} of the blocks, each image its own": step(net, rows_of(net, k / n)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for run in peers.values():
        run()
    for _ in range(_ROUNDS):
        for name, run in peers.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    benchmark.group = f"resnet{depth}{'' if preactivation else '-post'}"
    benchmark.pedantic(peers[f"{k} of {n}"], rounds=1, iterations=1)
    mean = {name: statistics.mean(times) for name, times in seconds.items()}
    print(f"\n{benchmark.group}, {_BATCH} images a step, {torch.get_num_threads()} threads, {best_dtype(net.device)}")
    for name, value in mean.items():
        spread = statistics.stdev(seconds[name])
        print(
            f"  {name}: {value:.3f} ± {spread:.3f} s a step, {value * _EPOCH / _BATCH / 60:.1f} minutes an epoch, "
            f"{value / mean['full']:.1%} of full"
        )
        benchmark.extra_info[name] = seconds[name]
    benchmark.extra_info["share of full"] = {name: value / mean["full"] for name, value in mean.items()}
