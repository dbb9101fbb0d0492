"""What only a GPU can tell: values against float64 on the card, graphs against launches, and times.

    python -m resens_fast.kernels.check        prints both as JSON; benchmarks/gpu_check.py calls the functions
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch

# One network for each kind of block.
KINDS: dict[str, dict[str, Any]] = {
    "post-pad": {"depth": 20, "preactivation": False, "option": "pad"},
    "post-projection": {"depth": 20, "preactivation": False},
    "pre-projection": {"depth": 20},
    "pre-bottleneck": {"depth": 29, "bottleneck": True},
    "post-bottleneck": {"depth": 29, "bottleneck": True, "preactivation": False},
}


def network(depth: int, **options: Any) -> Any:
    """A wrapped network with batch norms as after training."""
    import resens_fast as rf

    torch.manual_seed(0)
    model = rf.models.resnet(depth, **options)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.3, 0.7)
    return rf.wrap(model.eval())


def prepared(net: Any, sweep: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """(plan, executor) on the current GPU."""
    import resens_fast as rf
    from resens_fast.engines.triton import TritonEngine

    made = rf.plan(net, sweep)
    device = torch.device("cuda", torch.cuda.current_device())
    return made, TritonEngine().prepare(net, made, device, dtype)


def values(dtype: torch.dtype) -> dict[str, float]:
    """Root-mean-square error of a mixed sweep's logits against float64, in units of the torch engine's own, for each
    kind of block; AssertionError where it is above four, or where replayed graphs, single launches or another batch
    count differently.
    """
    import resens_fast as rf

    found = {}
    for name, options in KINDS.items():
        net = network(**options)
        gates = np.linspace(-1, 1.5, 2 * len(net.blocks)).reshape(2, -1)
        sweep = rf.sweeps.single(net) + rf.sweeps.swap_random(net, k=2, samples=4) + rf.sweeps.from_gates(net, gates)
        made, executor = prepared(net, sweep, dtype)
        images = torch.randn(3 * executor.batch, *net.input_shape)
        some, labels = images[:64], torch.arange(len(images)) % net.structure.classes
        got = executor.logits(some)[torch.from_numpy(made.word_of)].double()
        exact = rf.logits(net, sweep, some, engine="torch", dtype=torch.float64, device="cuda").double()
        eager = rf.logits(net, sweep, some, engine="torch", dtype=dtype, device="cuda").double()
        ours, theirs, size = (float(v.square().mean().sqrt()) for v in (got - exact, eager - exact, exact))
        assert ours <= 4 * theirs + 4 * torch.finfo(dtype).eps * size, f"{name}: {ours:.3g}, eager {theirs:.3g}"
        whole = executor.tally(images, labels)  # the second and third batch replay graphs
        parts = [executor.tally(images[i : i + 100], labels[i : i + 100]) for i in range(0, len(images), 100)]
        for column, pieces in zip(whole, zip(*parts, strict=True), strict=True):
            assert np.array_equal(column, sum(pieces)), f"{name}: the tally depends on the batch"
        found[name] = ours / theirs if theirs else 0.0
    return found


def gradients(dtype: torch.dtype) -> dict[str, float]:
    """The same for gradients along paths, each path's in units of its own size: their root-mean-square error over the
    torch engine's. AssertionError where it is above four, or where replayed graphs or another batch give other norms.
    """
    import resens_fast as rf
    from resens_fast.engines.triton import TritonEngine
    from resens_fast.gradient_plan import gradient_plan

    found = {}
    device = torch.device("cuda", torch.cuda.current_device())
    for name, options in KINDS.items():
        net = network(**options)
        paths = rf.sweeps.paths(net, [0, 1, 4, 9], samples=4, seed=0)
        made = gradient_plan(net, paths)
        executor = TritonEngine().prepare_gradients(net, made, device, dtype, "first_block")
        images = torch.randn(3 * executor.batch, *net.input_shape)
        labels = torch.arange(len(images)) % net.structure.classes
        some = (images[:16], labels[:16])
        got = executor.gradients(*some)[torch.from_numpy(made.word_of)].double()
        exact, eager = (
            rf.input_gradients(net, paths, *some, engine="torch", dtype=each, device="cuda").double()
            for each in (torch.float64, dtype)
        )
        size = exact.square().mean((1, 2, 3, 4), keepdim=True).sqrt()
        ours, theirs = (float(((v - exact) / size).square().mean().sqrt()) for v in (got, eager))
        assert ours <= 4 * theirs + 4 * torch.finfo(dtype).eps, f"{name}: {ours:.3g}, eager {theirs:.3g}"
        whole = executor.norms(images, labels)  # the second and third batch replay graphs
        parts = [executor.norms(images[i : i + 100], labels[i : i + 100]) for i in range(0, len(images), 100)]
        assert torch.equal(whole, torch.cat(parts, dim=1)), f"{name}: the norms depend on the batch"
        found[name] = ours / theirs if theirs else 0.0
    return found


def masked() -> float:
    """The largest relative error of logits and gradients of net(x, mask=..., engine="triton"), float32 against float64,
    of any image or parameter; AssertionError above 1e-3.
    """
    net = network(20, preactivation=False).cuda()
    images = torch.randn(16, *net.input_shape, device="cuda")
    mask = torch.rand(16, len(net.blocks)).round()
    mask[0] = 1  # every parameter has a gradient
    results = []
    for engine, dtype in (("triton", torch.float32), (None, torch.float64)):
        net = net.to(dtype)
        x = images.to(dtype).requires_grad_()
        logits = net(x, mask=mask, engine=engine)
        results.append([logits, *torch.autograd.grad(logits.square().sum(), [x, *net.parameters()])])
    worst = max(float((a - b).norm().detach() / b.norm().detach()) for a, b in zip(*results, strict=True))
    assert worst <= 1e-3, f"a relative error of {worst:.3g}"
    return worst


def path_rate(net: Any, paths: Any, dtype: torch.dtype, most: float = 10.0) -> dict[str, float]:
    """Images times paths per second, for about `most` seconds."""
    from resens_fast.engines.triton import TritonEngine
    from resens_fast.gradient_plan import gradient_plan

    made = gradient_plan(net, paths)
    device = torch.device("cuda", torch.cuda.current_device())
    executor = TritonEngine().prepare_gradients(net, made, device, dtype, "first_block")
    images = torch.randn(executor.batch, *net.input_shape, device="cuda")
    labels = torch.zeros(len(images), dtype=torch.int64, device="cuda")
    for _ in range(2):
        executor.norms(images, labels)  # compiles, then captures
    torch.cuda.synchronize()
    began, done = time.perf_counter(), 0
    while not done or time.perf_counter() - began < most:
        executor.norms(images, labels)
        done += len(images)
    spent = time.perf_counter() - began
    return {"rate": done * len(paths) / spent, "seconds": spent, "runs": made.executed_runs}


def rate(net: Any, sweep: Any, dtype: torch.dtype, count: int, most: float = 10.0) -> dict[str, float]:
    """Images times configurations per second, over up to `count` images or about `most` seconds."""
    made, executor = prepared(net, sweep, dtype)
    images = torch.randn(2 * executor.batch, *net.input_shape, device="cuda")
    labels = torch.zeros(len(images), dtype=torch.int64, device="cuda")
    executor.tally(images, labels)  # compiles and captures
    torch.cuda.synchronize()
    began, done = time.perf_counter(), 0
    while done < count and time.perf_counter() - began < most:
        executor.tally(images, labels)
        done += len(images)
    spent = time.perf_counter() - began
    return {
        "rate": done * len(sweep) / spent, "seconds": spent, "runs": made.executed_runs, "asked": made.requested_runs
    }  # fmt: skip


def main() -> None:
    import resens_fast as rf

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU on this machine")
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        result[f"values {dtype}"] = values(dtype)
    for dtype in (torch.bfloat16, torch.float32):
        result[f"gradients {dtype}"] = gradients(dtype)
    result["masked"] = masked()
    net = network(110)
    for name, sweep in (("intact", rf.sweeps.intact(net)), ("single deletions", rf.sweeps.single(net))):
        result[name] = rate(net, sweep, torch.bfloat16, 10_000)
    result["paths"] = path_rate(net, rf.sweeps.paths(net, range(1, 55), samples=4, seed=0), torch.bfloat16)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
