"""The CUDA engine's host side without a GPU: coverage, programs, launches, and evaluations on the host harness."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch

import resens_fast as rf
from resens_fast.engines.cuda import CudaEngine, Program, TapeExecutor, Variant, launches
from resens_fast.engines.cuda_pack import pack, refuses
from resens_fast.engines.levels import LevelsExecutor
from resens_fast.engines.ops import has_kernel
from resens_fast.errors import DataError, EngineError, NotCovered
from resens_fast.lower import lower

from .cuda_host import Host, build

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the host harness needs g++")


def trained_like(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Batch norms as after training: the fold must use them."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features, generator=generator) * 0.1
            module.running_var = torch.rand(module.num_features, generator=generator) + 0.5
            module.weight.data = torch.rand(module.num_features, generator=generator) * 0.5 + 0.5
            module.bias.data = torch.randn(module.num_features, generator=generator) * 0.1
    return model.eval()


def wrapped(**options) -> rf.ResidualNetwork:
    torch.manual_seed(0)
    return rf.wrap(trained_like(rf.models.resnet(20, **options)))


class OnHarness(TapeExecutor):
    """The executor with its operator replaced by the host harness."""

    memory = 1 << 30  # images at a time before it claims to be out of memory

    def __init__(self, net: rf.ResidualNetwork, plan: rf.Plan, variant: Variant, host: Host) -> None:
        self.host, self.launched = host, 0
        super().__init__(pack(lower(net), torch.bfloat16), plan, torch.device("cpu"), variant)

    def program(self, images: int) -> Program:
        fill = max(1, 4 * self.variant.ctas * self.variant.images // images)
        p = self.host.program(self.packed, self._tape, self._gates, self.variant.images, min(self.words, fill))
        self.on_host = p
        tensors = (torch.from_numpy(a) for a in (p.tape, p.chunks, p.parts))
        return Program(*tensors, torch.tensor([p.slots]), p.cost.tolist())

    def launch(self, program, first, last, images, labels, logits):
        if len(images) > self.memory:
            raise torch.OutOfMemoryError("planted")
        states, failures = self.host.stem(self.packed, images, self.variant.images)
        assert not any(failures.values())
        self.launched += 1
        part = dataclasses.replace(self.on_host, parts=np.ascontiguousarray(self.on_host.parts[first:last]))
        result = self.host.run(
            self.packed, part, states, labels.numpy(), self.words, self.variant.images, 2, count=len(labels)
        )
        assert not any(result.failures.values())
        return torch.from_numpy(result.tally.T.copy()), torch.from_numpy(np.nan_to_num(result.logits.copy()))


@pytest.fixture(scope="module")
def host() -> Host:
    return Host(build())


@needs_compiler
@pytest.mark.parametrize("preactivation", [False, True], ids=["post", "pre"])
def test_a_wrapped_network_on_the_harness(host: Host, preactivation: bool) -> None:
    """wrap, lower, plan, pack, cut and run: the same answers as the float64 reference engine, within bf16."""
    net = wrapped(preactivation=preactivation, option="pad")
    sweep = rf.sweeps.single(net)
    plan = rf.plan(net, sweep)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    executor = OnHarness(net, plan, Variant(2, 4, 0), host)
    shares: list[float] = []
    got = executor.logits(images, shares.append)
    assert abs(sum(shares) - 1) < 1e-6
    exact = rf.logits(net, sweep, images, engine="reference")
    want = torch.empty_like(got, dtype=torch.float64)
    want[torch.from_numpy(plan.word_of)] = exact.double()
    ours = (got - want).square().mean().sqrt()
    eager = rf.logits(net, sweep, images, engine="torch", dtype=torch.bfloat16)[
        np.unique(plan.word_of, return_index=True)[1]
    ]
    theirs = (eager.double() - want).square().mean().sqrt()
    assert ours < 4 * theirs + 1e-3 * want.square().mean().sqrt()
    labels = got[0].argmax(1)
    tally = executor.tally(images, labels)
    assert np.array_equal(tally.errors, (got.argmax(2) != labels).sum(1).numpy())
    assert not tally.nonfinite.any()
    executor.memory = 2  # halves until a tile is left
    again = executor.tally(images, labels)
    assert all(np.array_equal(a, b) for a, b in zip(tally, again, strict=True))


@needs_compiler
def test_out_of_memory_at_one_tile_is_an_error(host: Host) -> None:
    net = wrapped()
    executor = OnHarness(net, rf.plan(net, rf.sweeps.intact(net)), Variant(2, 4, 0), host)
    executor.memory = 0
    with pytest.raises(EngineError, match="no memory for one tile of 2 images"):
        executor.tally(torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(DataError, match="labels run from 0 to 10"):
        executor.tally(torch.zeros(2, 3, 32, 32), torch.tensor([0, 10]))


@pytest.mark.parametrize("option", ["pad", "projection"])
@pytest.mark.parametrize("preactivation", [False, True])
def test_cifar_networks_are_covered(preactivation: bool, option: str) -> None:
    net = lower(wrapped(preactivation=preactivation, option=option))
    assert refuses(net) is None
    packed = pack(net, torch.bfloat16)
    assert packed.weights.numel() == 2 * sum(c.weight.numel() for b in net.blocks for c in convolutions(b))


def convolutions(block):
    return [*block.convs, *([block.shortcut.conv] if block.shortcut.conv is not None else [])]


def test_refusals_name_the_block_and_the_reason() -> None:
    wide = lower(wrapped(width=48))
    assert "stem has 48 channels" in (refuses(wide) or "")
    net = lower(wrapped())
    assert "images are 28x28" in (refuses(dataclasses.replace(net, input_shape=(3, 28, 28))) or "")
    second = dataclasses.replace(net.blocks[1], convs=net.blocks[1].convs[:1] * 3)
    reason = refuses(dataclasses.replace(net, blocks=(net.blocks[0], second, *net.blocks[2:]))) or ""
    assert net.blocks[1].name in reason
    assert "3 convolutions" in reason
    assert "classes" in (refuses(dataclasses.replace(net, classes=1000)) or "")


def test_weights_that_overflow_are_refused() -> None:
    net = lower(wrapped())
    net.blocks[2].convs[0].weight[0, 0, 0, 0] = 1e6
    with pytest.raises(NotCovered, match=f"{net.blocks[2].name}.*overflow in torch.float16"):
        pack(net, torch.float16)
    assert pack(net, torch.bfloat16).dtype == torch.bfloat16


def test_launches_are_bounded_and_complete() -> None:
    cost = [3.0, 1.0, 1.0, 5.0, 0.5, 0.5]
    ranges = launches(cost, 0.1, 0.35)
    assert ranges == [(0, 1), (1, 3), (3, 4), (4, 6)]
    assert launches([], 1.0) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_the_engine_says_why_it_is_missing() -> None:
    reason = CudaEngine().missing()
    assert reason
    assert "CUDA" in reason or "resens_fast._C" in reason
    with pytest.raises(EngineError, match="cuda"):
        rf.logits(wrapped(), rf.sweeps.intact(wrapped()), torch.zeros(1, 3, 32, 32), engine="cuda")


needs_ops = pytest.mark.skipif(not has_kernel("cuda"), reason="resens_fast._C was built without CUDA")


@needs_ops
@needs_compiler
def test_the_operator_cuts_as_the_harness_does(host: Host) -> None:
    net = wrapped()
    plan = rf.plan(net, rf.sweeps.delete_random(net, k=[2], samples=9, seed=0))
    tape = plan.tape()
    packed = pack(lower(net), torch.bfloat16)
    instructions, gates = torch.from_numpy(tape.instructions), torch.from_numpy(tape.gates)
    mine = host.program(packed, tape.instructions, tape.gates, 2, 4)
    theirs = torch.ops.resens_fast.cuda_program(instructions, gates, packed.blocks, 2, 16, 4)
    for a, b in zip((mine.tape, mine.chunks, mine.parts, mine.cost), theirs[:4], strict=True):
        assert np.array_equal(a, b.numpy())
    assert mine.slots == int(theirs[4])
    with pytest.raises(ValueError, match="tape instruction 0 names block 99"):
        torch.ops.resens_fast.cuda_program(
            torch.tensor([[2, 99]], dtype=torch.int32), torch.ones(1), packed.blocks, 2, 16, 1
        )


@pytest.mark.parametrize("budget", [1, 6, 1000])
def test_levels_give_the_reference_answers(budget: int) -> None:
    net = wrapped()
    sweep = rf.sweeps.delete_random(net, k=[1, 3], samples=4, seed=1) + rf.sweeps.swap_random(
        net, k=[2], samples=3, seed=2
    )
    plan = rf.plan(net, sweep)
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(5)
    executor = LevelsExecutor(net, plan, torch.device("cpu"), torch.float32, batch=2)
    executor.memory = 2 * budget * executor.bytes_per_image
    shares: list[float] = []
    got = executor.logits(images, shares.append)
    assert abs(sum(shares) - 1) < 1e-6
    want = rf.logits(net, sweep, images, engine="reference")
    assert torch.allclose(
        got[torch.from_numpy(plan.word_of)].double(), want, rtol=1e-4, atol=1e-4 * float(want.abs().max())
    )
    tally = executor.tally(images, labels)
    assert np.array_equal(tally.errors, (got.argmax(2) != labels).sum(1).numpy())


def test_levels_join_different_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    net = wrapped(preactivation=True)
    plan = rf.plan(net, rf.sweeps.intact(net))
    executor = LevelsExecutor(net, plan, torch.device("cpu"), torch.float64)
    block = executor.net.blocks[1]
    x = [torch.randn(2, *block.shape_in, dtype=torch.float64) for _ in range(2)]
    together = executor._joined(block, [(2, 1, 0, 1, 0, 0.5), (2, 1, 2, 3, 0, -1.0)], x)
    for state, gate, got in zip(x, (0.5, -1.0), together, strict=True):
        assert torch.allclose(got, block.run(state, gate))


def test_levels_halve_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    net = wrapped()
    plan = rf.plan(net, rf.sweeps.intact(net))
    images = torch.randn(5, 3, 32, 32)
    executor = LevelsExecutor(net, plan, torch.device("cpu"), torch.float32, batch=4)
    want = executor.logits(images)
    honest, limit = executor._heads, 1

    def limited(piece, progress, share):
        if len(piece) > limit:
            raise torch.OutOfMemoryError("planted")
        return honest(piece, progress, share)

    monkeypatch.setattr(executor, "_heads", limited)
    assert torch.allclose(executor.logits(images), want, atol=1e-5)
    limit = 0
    with pytest.raises(EngineError, match="no memory for one image"):
        executor.logits(images)


@needs_compiler
def test_shipped_networks_on_the_harness(host: Host) -> None:
    """Every shipped CIFAR-sized residual network runs on the tape kernel and agrees with float64 within bf16."""
    covered = 0
    for name in rf.models.names():
        try:
            net = rf.wrap(rf.models.load(name))
            fused = lower(net)
        except (rf.errors.WrapError, NotCovered):
            continue
        if refuses(fused) is not None:
            continue
        covered += 1
        images = torch.randn(2, *net.input_shape, generator=torch.Generator().manual_seed(1))
        got = OnHarness(net, rf.plan(net, rf.sweeps.intact(net)), Variant(2, 1, 0), host).logits(images)[0].double()
        exact = rf.logits(net, rf.sweeps.intact(net), images, engine="reference")[0]
        eager = rf.logits(net, rf.sweeps.intact(net), images, engine="torch", dtype=torch.bfloat16)[0].double()
        size = exact.square().mean().sqrt()
        assert (got - exact).square().mean().sqrt() < 4 * (eager - exact).square().mean().sqrt() + 0.02 * size, name
    assert covered >= 1
