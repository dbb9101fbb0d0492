"""Every row of rows.py on every peer: same process, images and configurations, results compared before timing."""

from __future__ import annotations

import functools
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


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("index", range(len(ROWS)), ids=[row.name for row in ROWS])
def test_row(index: int, peer: str, benchmark: Any, request: pytest.FixtureRequest) -> None:
    row = ROWS[index]
    quick = request.config.getoption("--quick")
    intact = "intact" in row.name
    if (quick and not row.quick) or peer not in request.config.getoption("--peers").split(","):
        pytest.skip("not asked for")
    if quick and peer == "compile" and (not intact or "110" in row.name):
        pytest.skip("compiling takes longer than the quick mode has")
    net, sweep, x, truth = prepared(index)
    naive_peer = peer in ("eager", "compile")
    chosen = list(range(0, len(sweep), row.sample)) if naive_peer else list(range(len(sweep)))
    part: Any = [sweep[i] for i in chosen] if naive_peer else sweep
    tolerance = 3e-2 if row.dtype == torch.bfloat16 else 1e-3
    best: tuple[float, Any] | None = None
    for make in choices(row, peer):
        run = make(net, part, row.dtype)
        out = run(x)
        assert float((out - truth[chosen]).abs().max()) <= tolerance * float(truth.abs().max()), (
            "the peer computes something else"
        )
        sizes = sorted({min(b, len(x)) for b in _BATCHES}) if naive_peer and intact and peer == "eager" else [len(x)]
        for size in sizes:
            batched = functools.partial(lambda run, size: [run(c) for c in x.split(size)], run, size)
            start = benchmark._timer()  # --benchmark-timer=time.process_time suits a busy machine, with one thread
            batched()
            seconds = benchmark._timer() - start
            if best is None or seconds < best[0]:
                best = (seconds, batched)
    assert best is not None
    rounds = max(1, min(5, int(10 / best[0])))
    benchmark.group = row.name
    benchmark.pedantic(best[1], rounds=rounds, iterations=1)
    scale, spread = len(sweep) / len(chosen), benchmark.stats.stats
    executed, naive = operations(net, rf.plan(net, sweep))
    result = RESULTS.setdefault(
        row.name,
        {
            "seconds": {},
            "spread": {},
            "goal": row.goal,
            "results": len(sweep) * len(x),
            "executed": executed * len(x),
            "naive": naive * len(x),
            "isa": cpu.chosen_isa(),
        },
    )
    result["seconds"][peer] = spread.median * scale
    result["spread"][peer] = [spread.min * scale, spread.max * scale]
