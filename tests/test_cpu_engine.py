"""The CPU engine from a wrapped model to a tally: coverage, refreshing weights, the drop-in forward, stopping."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch
from torch import nn

import resens_fast as rf
from resens_fast import engines, extension
from resens_fast.engines import cpu
from resens_fast.errors import EngineError

if extension.module() is None:
    pytest.skip(f"no compiled extension: {extension.reason()}", allow_module_level=True)


def small(depth: int = 20, **options: object) -> rf.ResidualNetwork:
    torch.manual_seed(0)
    model = rf.models.resnet(depth, **options)  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    return rf.wrap(model.eval())


@pytest.fixture(scope="module")
def net() -> rf.ResidualNetwork:
    return small()


def images(n: int = 6) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(n))


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth).square().mean().sqrt())


@pytest.mark.parametrize(
    "options",
    [{}, {"preactivation": False}, {"preactivation": False, "option": "pad"}, {"bottleneck": True, "depth": 29}],
)
def test_sweeps_against_float64(options: dict) -> None:  # type: ignore[type-arg]
    net = small(**options)
    sweep = rf.sweeps.delete_random(net, k=[1, 3], samples=4, seed=0) + rf.sweeps.swap_random(
        net, k=[2], samples=3, seed=0
    )
    x = images()
    truth = rf.logits(net, sweep, x, engine="reference")
    eager = rf.logits(net, sweep, x, engine="torch")
    out = rf.logits(net, sweep, x, engine="cpu")
    bound = max(4 * error(eager, truth), 4 * 2.0**-23 * float(truth.square().mean().sqrt()))
    assert error(out, truth) <= bound
    top = truth.topk(2).values
    assert torch.equal(
        out.argmax(2)[(top[..., 0] - top[..., 1]) > 2 * bound * 10],
        truth.argmax(2)[(top[..., 0] - top[..., 1]) > 2 * bound * 10],
    )


def test_auto_takes_it_and_a_tally_agrees_with_torch(net: rf.ResidualNetwork) -> None:
    sweep = rf.sweeps.delete_random(net, k=[1, 2], samples=5, seed=1)
    data = (images(20), torch.arange(20) % 10)
    ours, theirs = (
        rf.evaluate(net, sweep, data, progress=False),
        rf.evaluate(net, sweep, data, engine="torch", progress=False),
    )
    assert ours.manifest["engine"]["name"] == "cpu"
    assert ours.frame["loss"].to_numpy() == pytest.approx(theirs.frame["loss"].to_numpy(), rel=1e-4)
    assert abs(ours.frame["errors"].to_numpy() - theirs.frame["errors"].to_numpy()).max() <= 1


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_memory_format(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESENS_FAST_ISA", isa)
    net = small(8)
    sweep = rf.sweeps.single(net)
    x = images(3)
    alone = rf.logits(net, sweep, x, engine="cpu", dtype=dtype)
    every = torch.zeros(3, 32, 32, 6)[..., ::2].permute(0, 3, 1, 2)
    every.copy_(x)
    wide = torch.zeros(6, 3, 40, 40)[1::2, :, 4:36, 8:]
    wide.copy_(x)
    mirrored = x.flip(3).contiguous()[..., torch.arange(31, -1, -1)].transpose(2, 3).contiguous().transpose(2, 3)
    for form in (x.to(memory_format=torch.channels_last), every, wide, mirrored, x.double().float().requires_grad_()):
        assert torch.equal(rf.logits(net, sweep, form, engine="cpu", dtype=dtype), alone)
    with torch.inference_mode():
        logits = net(x)
        assert torch.equal(net(x.to(memory_format=torch.channels_last)), logits)
        assert torch.equal(net(every), logits)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_few_images_and_many_configurations_use_every_thread(net: rf.ResidualNetwork, batch: int) -> None:
    sweep = rf.sweeps.delete_random(net, k=[1, 3, 5], samples=400, seed=0)
    plan = rf.plan(net, sweep)
    executor = cpu.CpuEngine().prepare(net, plan, torch.device("cpu"), torch.float32)
    assert isinstance(executor, cpu.CpuExecutor)
    x = images(batch)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = executor.logits(x)
        whole = sum(executor.call.schedule(batch, 1)[3])
        for threads in (2, 3, 8):
            _, _, tiles, costs = executor.call.schedule(batch, threads)
            # Every thread takes the next part: all are busy to the end, and prefixes computed again cost little.
            busy = [0.0] * threads
            for cost in costs * tiles:
                busy[busy.index(min(busy))] += cost / tiles
            assert max(busy) <= 1.2 * whole / threads
            torch.set_num_threads(threads)
            assert torch.equal(executor.logits(x), alone)
    finally:
        torch.set_num_threads(before)


def test_the_memory_is_known_beforehand_and_does_not_grow(net: rf.ResidualNetwork) -> None:
    data = (images(40), torch.arange(40) % 10)
    needs = []
    for samples in (100, 1000):
        plan = rf.plan(net, rf.sweeps.delete_random(net, k=[2, 3], samples=samples, seed=0))
        executor = cpu.CpuEngine().prepare(net, plan, torch.device("cpu"), torch.float32)
        assert isinstance(executor, cpu.CpuExecutor)
        assert (
            executor.footprint == executor.call.schedule(executor.batch, 1)[0] == executor.call.schedule(100_000, 1)[0]
        )
        assert executor.call.schedule(100_000, 4)[0] == 4 * executor.footprint
        # Sixteen images at a time, a halo around each, and scratch for the block in progress.
        states = plan.state_bytes(16, torch.float32)
        assert states < executor.footprint < 2 * states + (4 << 20)
        needs.append(executor.footprint)
        assert f"{plan.state_bytes(1, torch.float32) // 1024:,} KiB of states an image" in plan.summary()
    assert needs[1] < 1.7 * needs[0]  # log2 of ten times as many configurations
    sweep = rf.sweeps.single(net)
    study = rf.evaluate(net, sweep, data, engine="cpu", progress=False)
    plan = rf.plan(net, sweep)
    expected = cpu.CpuEngine().prepare(net, plan, torch.device("cpu"), torch.float32).footprint
    assert study.manifest["engine"]["footprint"] == expected


def test_the_summary_says_beforehand_which_engine_auto_takes(net: rf.ResidualNetwork) -> None:
    assert 'engine="auto" takes cpu (float32, cpu)' in net.summary().splitlines()
    odd = rf.wrap(rf.models.highway(8).eval()).summary()
    assert 'engine="auto" takes torch (float32, cpu)' in odd.splitlines()
    assert "  not cpu: block 0 (blocks.0) has no fused form: highway blocks are not covered" in odd.splitlines()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESENS_FAST_ISA", "sse9")
        assert "not cpu: RESENS_FAST_ISA is 'sse9'" in net.summary()


def test_a_block_that_is_not_covered_is_named() -> None:
    net = rf.wrap(rf.models.highway(8).eval())
    sweep = rf.sweeps.intact(net)
    with pytest.raises(EngineError, match="block 0"):
        rf.logits(net, sweep, images(1), engine="cpu")
    engine, passed = engines.choose("auto", net, torch.device("cpu"), torch.float32)
    assert engine.name == "torch"
    assert "block 0" in passed["cpu"]


def test_other_dtypes_and_devices_are_refused(net: rf.ResidualNetwork) -> None:
    engine = cpu.CpuEngine()
    assert "float64" in str(engine.refuses(net, torch.device("cpu"), torch.float64))
    assert "cuda" in str(engine.refuses(net, torch.device("cuda"), torch.float32))


def test_unknown_instruction_set(net: rf.ResidualNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESENS_FAST_ISA", "sse9")
    with pytest.raises(EngineError, match="sse9"):
        rf.logits(net, rf.sweeps.intact(net), images(1), engine="cpu")
    monkeypatch.setenv("RESENS_FAST_ISA", "portable")
    portable = rf.logits(net, rf.sweeps.intact(net), images(1), engine="cpu")
    monkeypatch.delenv("RESENS_FAST_ISA")
    assert portable == pytest.approx(rf.logits(net, rf.sweeps.intact(net), images(1), engine="cpu"), rel=1e-3, abs=1e-4)


def test_weights_are_packed_again_when_something_changes() -> None:
    net = small()
    sweep, x = rf.sweeps.intact(net), images(2)

    def agree() -> None:
        ours, truth = rf.logits(net, sweep, x, engine="cpu"), rf.logits(net, sweep, x, engine="reference")
        assert error(ours, truth) < 1e-4 * float(truth.abs().max())

    agree()
    kept = cpu.packed(net)
    agree()
    assert cpu.packed(net) is kept
    with torch.no_grad():
        next(m for m in net.model.modules() if isinstance(m, nn.BatchNorm2d)).running_var.mul_(3)
    agree()
    other = small().state_dict()
    net.load_state_dict({k: v * 1.1 if v.is_floating_point() else v for k, v in other.items()})
    agree()
    last = [m for m in net.model.modules() if isinstance(m, nn.Linear)][-1]
    last.weight = nn.Parameter(last.weight.detach() * 2)
    agree()


def test_the_drop_in_forward() -> None:
    net = small()
    calls = []
    original = cpu.FastForward.__call__
    x = images(5)
    expected = net.model(x)

    def counted(self: cpu.FastForward, x: torch.Tensor) -> torch.Tensor | None:
        result = original(self, x)
        calls.append(result is not None)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu.FastForward, "__call__", counted)
        with torch.inference_mode():
            fast = net(x)
        assert calls == [True]
        assert not torch.equal(fast, expected)  # another order of operations
        torch.testing.assert_close(fast, expected.detach().clone(), rtol=1e-4, atol=1e-4)
        with torch.inference_mode():
            assert torch.equal(net(x[:2]), fast[:2])  # the same bits in any batch
            net(torch.randn(2, 3, 40, 40))  # another size: the model itself
            net(x.double().float().bfloat16().float())
            handle = net.model.register_forward_hook(lambda *_: calls.append("hook"))  # type: ignore[arg-type]
            net(x)
            handle.remove()
            twin = copy.deepcopy(net)
            assert torch.equal(twin(x), fast)
            with torch.autocast("cpu", torch.bfloat16):
                net(x)
        assert calls == [True, True, False, True, False, "hook", True, False]
        with torch.no_grad():  # what most evaluation loops say
            assert torch.equal(net(x), fast)
            net(x).add_(1)  # an ordinary tensor, not an inference tensor
        assert torch.equal(net(x), expected)  # a gradient could be asked for: the model itself
        net.train()
        with torch.inference_mode():
            net(x)
        assert len(calls) == 10


def test_progress_adds_up_to_one(net: rf.ResidualNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_POLL_SECONDS", 0.002)
    shares: list[float] = []
    plan = rf.plan(net, rf.sweeps.delete_random(net, k=[2], samples=40, seed=0))
    executor = cpu.CpuEngine().prepare(net, plan, torch.device("cpu"), torch.float32)
    executor.tally(images(64), torch.zeros(64, dtype=torch.int64), shares.append)
    assert sum(shares) == pytest.approx(1)
    assert len(shares) > 3
    assert min(shares) >= 0


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_waits_for_the_call_to_end() -> None:
    """A thread that still runs when the process exits would abort it; Python 3.11's Thread.join does not wait then."""
    control, ended = torch.zeros(3, dtype=torch.int64), []

    def call() -> None:
        deadline = time.perf_counter() + 30
        while not int(control[0]) and time.perf_counter() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        ended.append(True)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            cpu.interruptible(call, control, None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended


def test_ctrl_c_stops_within_a_second(net: rf.ResidualNetwork) -> None:
    plan = rf.plan(net, rf.sweeps.delete_random(net, k=[3], samples=3000, seed=0))
    executor = cpu.CpuEngine().prepare(net, plan, torch.device("cpu"), torch.float32)
    asked: list[float] = []

    def stop(share: float) -> None:
        asked.append(time.perf_counter())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        executor.tally(images(512), torch.zeros(512, dtype=torch.int64), stop)
    assert time.perf_counter() - asked[0] < 1
    assert not any(t.name == "resens_fast.eval" for t in threading.enumerate())


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space through Linux's resource limits")
def test_no_memory_is_an_error_and_the_process_lives() -> None:
    code = """
    import resource, torch
    import resens_fast as rf
    from resens_fast.engines import cpu
    net = rf.wrap(rf.models.resnet(20).eval())
    executor = cpu.CpuEngine().prepare(net, rf.plan(net, rf.sweeps.intact(net)), torch.device("cpu"), torch.float32)
    x = torch.zeros(3000, 3, 32, 32)
    rf.logits(net, rf.sweeps.intact(net), x[:2], engine="cpu")
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20),) * 2)
    executor.call.tile = 3000  # a state of 220 MB
    try:
        executor.logits(x)
    except torch.OutOfMemoryError:
        executor.call.tile = 1
        print(executor.logits(x[:3]).shape)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "[1, 3, 10]" in done.stdout


def test_the_fake_function(net: rf.ResidualNetwork) -> None:
    plan = rf.plan(net, rf.sweeps.single(net))
    call = cpu.CpuEngine().prepare(net, plan, torch.device("cpu"), torch.float32).call  # type: ignore[attr-defined]
    x, y = images(2), torch.tensor([0, 1])
    control = torch.zeros(3, dtype=torch.int64)
    program = [call.tape, call.gates]
    arguments = (x, y, call.layout, call.packed, program, plan.words, 10, 1, 0, call.isa, False, control)
    torch.library.opcheck(torch.ops.resens_fast.eval.default, arguments)
    with pytest.raises(NotImplementedError, match="eval has no backward"):
        torch.ops.resens_fast.eval(x.clone().requires_grad_(), *arguments[1:])
