"""Every row of rows.py on every peer: same process, images and configurations, results compared before timing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import resens_fast as rf
from benchmarks import peers
from benchmarks.conftest import RESULTS
from benchmarks.rows import ROWS, Row
from resens_fast.engines import cpu
from resens_fast.lower import lower
from resens_fast.plan import RUN

PEERS = ("ours", "eager", "compile", "planned")
_BATCHES = (16, 32, 64, 128)
_ROUNDS, _LONG = 7, 6.0  # runs of more than this many seconds have one round


@functools.lru_cache(maxsize=1)
def prepared(index: int) -> tuple[rf.ResidualNetwork, rf.Sweep, torch.Tensor, torch.Tensor]:
    row = ROWS[index]
    net = rf.wrap(row.network(), torch.zeros(1, 3, row.size, row.size))
    x = torch.randn(row.images, 3, row.size, row.size, generator=torch.Generator().manual_seed(0))
    sweep = row.sweep(net)
    return net, sweep, x, peers.ours(net, sweep, torch.float32)(x)


def operations(net: rf.ResidualNetwork, plan: rf.Plan) -> tuple[float, float]:
    """Direct convolution's operations per image: what the plan executes, and what its configurations ask for."""
    fused = lower(net)
    area = {b.index: b.shape_out[1] * b.shape_out[2] for b in fused.blocks}

    def block(i: int) -> float:
        b = fused.blocks[i]
        first = b.shape_in[1] * b.shape_in[2]
        sizes = [first if j == 0 and len(b.convs) == 3 else area[i] for j in range(len(b.convs))]
        return sum(2.0 * c.weight.numel() * n for c, n in zip(b.convs, sizes, strict=True))

    cost = [block(i) for i in range(len(fused.blocks))]
    tape = plan.tape().instructions
    executed = sum(cost[arg] for op, arg in tape.tolist() if op == RUN)
    words = plan.sweep.words()
    naive = sum(cost[j] for j, gate in zip(words.blocks.tolist(), words.gates.tolist(), strict=True) if gate != 0.0)
    return executed, naive


def choices(row: Row, peer: str) -> list[Any]:
    """The ways to run a peer; the best one counts."""
    intact = "intact" in row.name
    if peer in ("ours", "planned"):
        return [getattr(peers, peer)]
    found = [getattr(peers, f"{peer}_intact" if intact else peer)]
    if peer == "eager" and intact and row.dtype == torch.bfloat16:
        found.append(peers.autocast_intact)
    return found


@functools.lru_cache(maxsize=1)
def ready(row: str) -> dict[str, tuple[Any, float]]:
    """For every peer of the row that is prepared and checked: what to time, and by how much its time is scaled up."""
    return {}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("index", range(len(ROWS)), ids=[row.name for row in ROWS])
def test_row(index: int, peer: str, benchmark: Any, request: pytest.FixtureRequest) -> None:
    row = ROWS[index]
    quick = request.config.getoption("--quick")
    wanted = [p for p in PEERS if p in request.config.getoption("--peers").split(",")]
    intact = "intact" in row.name
    if quick and (not intact or "110" in row.name):  # compiling takes longer than the quick mode has
        wanted = [p for p in wanted if p != "compile"]
    if (quick and not row.quick) or peer not in wanted:
        pytest.skip("not asked for")
    net, sweep, x, truth = prepared(index)
    naive_peer = peer in ("eager", "compile")
    chosen = list(range(0, len(sweep), row.sample)) if naive_peer else list(range(len(sweep)))
    part: Any = [sweep[i] for i in chosen] if naive_peer else sweep
    tolerance = 3e-2 if row.dtype == torch.bfloat16 else 1e-3
    best: tuple[float, Any] | None = None
    for make in choices(row, peer):
        run = make(net, part, row.dtype)
        # A whole sweep in eager PyTorch takes minutes: the planned peer is checked on a few images of it.
        some = x[:4] if peer == "planned" else x
        wrong = run(some) - truth[chosen, : len(some)]
        assert float(wrong.abs().max()) <= tolerance * float(truth.abs().max()), "the peer computes something else"
        sizes = sorted({min(b, len(x)) for b in _BATCHES}) if intact and peer == "eager" else [len(x)]
        for size in sizes:
            batched = functools.partial(lambda run, size: [run(c) for c in x.split(size)], run, size)
            seconds = timed(benchmark, batched) if len(sizes) > 1 else 0.0
            if best is None or seconds < best[0]:
                best = (seconds, batched)
    assert best is not None
    benchmark.group = row.name
    benchmark.pedantic(best[1], rounds=1, iterations=1)
    ready(row.name)[peer] = best[1], len(sweep) / len(chosen)
    seconds = RESULTS.setdefault(row.name, new_result(row.goal, net, rf.plan(net, sweep), len(x)))["rounds"]
    seconds[peer] = [benchmark.stats.stats.median * ready(row.name)[peer][1]]
    if peer == wanted[-1]:
        interleave(benchmark, ready(row.name), seconds)


def timed(benchmark: Any, run: Callable[[], Any]) -> float:
    """Seconds by the benchmark's timer: --benchmark-timer=time.process_time suits a busy machine, with one thread."""
    start = benchmark._timer()
    run()
    return float(benchmark._timer() - start)


def interleave(benchmark: Any, peers: dict[str, tuple[Any, float]], seconds: dict[str, list[float]]) -> None:
    """More rounds, peer after peer, so that a slow minute of the machine meets all; long ones keep their one."""
    short = {peer: run for peer, run in peers.items() if seconds[peer][0] / run[1] < _LONG}
    for _ in range(_ROUNDS - 1):
        for peer, (run, scale) in short.items():
            seconds[peer].append(timed(benchmark, run) * scale)


def new_result(goal: tuple[float, float], net: rf.ResidualNetwork, plan: rf.Plan, images: int) -> dict[str, Any]:
    """What conftest.py makes a line of the table from, still without timings."""
    executed, naive = operations(net, plan)
    return {
        "rounds": {},
        "goal": goal,
        "results": len(plan.sweep) * images,
        "executed": executed * images,
        "naive": naive * images,
        "isa": cpu.chosen_isa(),
    }
