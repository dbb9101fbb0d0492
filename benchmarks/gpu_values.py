"""What gpu_check.py checks beside the clock: values against float64, sameness, graphs, operators, sanitizers.

Each check can run in a process of its own (`python benchmarks/gpu_check.py --only NAME`): a kernel that hangs or
destroys the CUDA context then costs one section and not the rest.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Missing(Exception):
    """A section cannot run here; the message says why."""


def need_gpu() -> None:
    if not torch.cuda.is_available():
        raise Missing("torch sees no CUDA device")


def engine() -> Any:
    from resens_fast.engines.cuda import CudaEngine

    need_gpu()
    found = CudaEngine()
    why = found.missing()
    if why:
        raise Missing(why)
    return found


def network(depth: int = 110, **options: Any) -> Any:
    """A wrapped network with batch norms as after training; speed does not depend on the weights."""
    import resens_fast as rf

    torch.manual_seed(0)
    model = rf.models.resnet(depth, **options)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.3, 0.7)
    return rf.wrap(model.eval())


def load_data(path: str | None, count: int = 10_000) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Images float32 [N, 3, 32, 32] on the GPU and labels; --data, the digits, or noise, repeated to `count`."""
    need_gpu()
    if path:
        file = np.load(path)
        images, labels, name = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]).long(), path
        if images.dtype == torch.uint8:
            images = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    else:
        try:
            from sklearn.datasets import load_digits

            bunch = load_digits()
            small = torch.from_numpy(bunch.images).float()[:, None] / 8 - 1
            images = torch.nn.functional.interpolate(small, size=32, mode="bilinear").expand(-1, 3, -1, -1)
            labels, name = torch.from_numpy(bunch.target).long(), "digits"
        except ImportError:
            images, labels, name = (
                torch.randn(1000, 3, 32, 32),
                torch.randint(0, 10, (1000,)),
                "noise (no scikit-learn)",
            )
    pick = torch.arange(count) % len(images)
    return images[pick].contiguous().cuda(), labels[pick].cuda(), name


def executor_for(net: Any, plan: Any, dtype: torch.dtype, images: int | None = None) -> Any:
    """The engine's executor; `images` forces a variant."""
    from resens_fast.engines.cuda import TapeExecutor

    e = engine()
    device = torch.device("cuda", 0)
    packed = e.packed(net, dtype)
    if isinstance(packed, str):
        raise Missing(packed)
    variant = e.variant(device, packed)
    if not variant.images:
        raise Missing(f"no variant for {packed.width} channels fits this device")
    if images is not None:
        if images > variant.images:
            raise Missing(f"{images} images per CTA do not fit this device")
        variant = variant._replace(images=images)
    return TapeExecutor(packed, plan, device, variant)


def check_values(images: int, width: int, dtype: torch.dtype) -> dict[str, float]:
    """Every word of a mixed sweep against float64 on this GPU, and bitwise sameness."""
    import resens_fast as rf

    need_gpu()
    x, labels, _ = load_data(None, 64)
    worst: dict[str, float] = {}
    for name, options in {
        "post-pad": {"preactivation": False, "option": "pad"},
        "post-projection": {"preactivation": False},
        "pre-projection": {},
        "pre-pad": {"option": "pad"},
    }.items():
        net = network(20, width=width, **options)
        sweep = (
            rf.sweeps.single(net)
            + rf.sweeps.delete_random(net, k=[3], samples=8)
            + rf.sweeps.swap_random(net, k=2, samples=8)
        )
        gates = np.linspace(-1, 1.5, 3 * len(net.blocks)).reshape(3, -1)
        sweep = sweep + rf.sweeps.from_gates(net, gates)
        plan = rf.plan(net, sweep)
        got = executor_for(net, plan, dtype, images).logits(x)
        first = np.unique(plan.word_of, return_index=True)[1]
        exact = rf.logits(net, sweep, x, engine="torch", dtype=torch.float64, device="cuda")[first]
        eager = rf.logits(net, sweep, x, engine="torch", dtype=dtype, device="cuda")[first]
        ours = float((got - exact).square().mean().sqrt())
        theirs = float((eager - exact).square().mean().sqrt())
        size = float(exact.square().mean().sqrt())
        if not ours <= 4 * theirs + 4 * torch.finfo(dtype).eps * size:
            raise AssertionError(f"{name}: rms error {ours:.3g}, eager {theirs:.3g}, logits {size:.3g}")
        tally = executor_for(net, plan, dtype, images).tally(x, labels)
        again = executor_for(net, plan, dtype, images).tally(x[:33], labels[:33])
        again.add(executor_for(net, plan, dtype, images).tally(x[33:], labels[33:]))
        if not all(np.array_equal(a, b) for a, b in zip(tally, again, strict=True)):
            raise AssertionError(f"{name}: the tally depends on the batch")
        worst[name] = ours / theirs if theirs else 0.0
    return worst


def check_graph() -> str:
    """A plan captured into a CUDA graph gives the same counts when replayed, also on other images."""
    import resens_fast as rf

    need_gpu()
    net = network(20)
    run = executor_for(net, rf.plan(net, rf.sweeps.single(net)), torch.bfloat16)
    x, labels, _ = load_data(None, 128)
    wants = [run.enqueue(x[i : i + 64].contiguous(), labels[i : i + 64]).clone() for i in (0, 64)]
    images, targets = x[:64].clone(), labels[:64].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run.enqueue(images, targets)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run.enqueue(images, targets)
    for i, want in enumerate(wants):
        images.copy_(x[64 * i : 64 * i + 64])
        targets.copy_(labels[64 * i : 64 * i + 64])
        graph.replay()
        torch.cuda.synchronize()
        if not torch.equal(want, got):
            raise AssertionError(f"replay {i} gives other counts")
    return "captured, replayed on two batches"


def check_operators() -> str:
    import resens_fast as rf

    need_gpu()
    net = network(20)
    run = executor_for(net, rf.plan(net, rf.sweeps.intact(net)), torch.bfloat16)
    x, labels, _ = load_data(None, 8)
    program = run.program(8)
    for classes in (0, run.packed.head[3]):
        arguments = (
            x, labels, run.layout, run.weights, [program.tape, program.chunks, program.parts, program.slots],
            run.words, classes, run.variant.ctas, run.variant.images,
        )  # fmt: skip
        torch.library.opcheck(torch.ops.resens_fast.eval.default, arguments)
    return "opcheck is clean"


def sanitizer(tool: str) -> str:
    need_gpu()
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).is_file():
        raise Missing("compute-sanitizer is not installed")
    return alone("tiny", 120, program, "--tool", tool, "--error-exitcode", "9")


def alone(name: str, seconds: float, *wrapper: str) -> str:
    """Runs a check in a process of its own, or TimeoutExpired; what it prints last is the answer."""
    command = [*wrapper, sys.executable, str(Path(__file__).with_name("gpu_check.py")), "--only", name]
    with tempfile.TemporaryFile("w+") as output:  # a pipe would be waited for as long as a grandchild holds it
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            raise
        output.seek(0)
        lines = output.read().splitlines()
    for line in reversed(lines):
        if code == 0 and line.startswith(LACKS):
            raise Missing(line.removeprefix(LACKS))
        if code == 0 and line.startswith(ANSWER):
            return line.removeprefix(ANSWER)
    raise AssertionError(f"exit code {code}: " + "\n".join(lines)[-3000:])


ANSWER, LACKS = "answer: ", "missing: "


def tiny() -> str:
    """What compute-sanitizer watches: a few words on one tile."""
    import resens_fast as rf

    net = network(20)
    run = executor_for(net, rf.plan(net, rf.sweeps.single(net)), torch.bfloat16)
    run.tally(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64))
    return "no error"


def triton_values(dtype: torch.dtype) -> dict[str, float]:
    need_gpu()
    from resens_fast.kernels import check as kernels

    found: dict[str, float] = kernels.values(dtype)
    return found


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
def triton_gradients(dtype: torch.dtype) -> dict[str, float]:
    need_gpu()
    from resens_fast.kernels import check as kernels

    found: dict[str, float] = kernels.gradients(dtype)
    return found


def triton_masked() -> float:
    need_gpu()
    from resens_fast.kernels import check as kernels

    found: float = kernels.masked()
    return found


ALONE: dict[str, Callable[[], Any]] = {
    **{
        f"values, {images} image(s) of {width} channels per CTA, {name}": partial(check_values, images, width, dtype)
        for images, width in ((2, 16), (1, 16), (1, 32))
        for name, dtype in DTYPES.items()
    },
    "CUDA graph": check_graph,
    "operators": check_operators,
    **{
        f"triton values, {name}": partial(triton_values, dtype)
        for name, dtype in {**DTYPES, "fp32": torch.float32}.items()
    },
    **{
        f"triton path gradients, {name}": partial(triton_gradients, dtype)
        for name, dtype in {"bf16": torch.bfloat16, "fp32": torch.float32}.items()
    },
    "triton masked gradients": triton_masked,
    "tiny": tiny,
}


def answer(name: str) -> None:
    """What a process with `--only name` does."""
    try:
        print(ANSWER + str(ALONE[name]()), flush=True)
    except Missing as reason:
        print(LACKS + str(reason), flush=True)
