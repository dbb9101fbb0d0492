"""Path gradients on the CPU: the kernels against autograd in float64, the engine against the reference, the same bits
however the work is cut.

A ReLU whose input is near 0 may fall on either side in another precision, and then the gradient is another one. So the
images compared are those on which no ReLU of the float64 forward comes nearer than 1e-5 of its root mean square, some
ten times the forward's error.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import resens_fast as rf
from resens_fast import extension
from resens_fast.engines.cpu_layout import describe
from resens_fast.fused import FusedBlock, FusedNetwork, Shortcut
from resens_fast.gradient_plan import gradient_plan
from tests import lowered, lowered_paths

if extension.module() is None:
    pytest.skip(f"no compiled extension: {extension.reason()}", allow_module_level=True)

from resens_fast.engines import cpu
from tests.test_cpu_engine import small
from tests.test_cpu_kernels import networks

OPS = torch.ops.resens_fast
ISAS = tuple(OPS.cpu_isas())
FEW = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
MARGIN = 1e-5
Path = dict[int, float]


class Packed:
    def __init__(self, net: FusedNetwork, isa: str = "") -> None:
        self.net, self.isa = net, isa
        self.layout, raw = describe(net)
        self.packed = OPS.cpu_pack(self.layout, raw, isa, False)
        self.transposed = OPS.cpu_pack_transposed(self.layout, raw, isa)
        self.order = list(range(len(net.blocks)))
        self.truth = lowered_paths.double(net)

    def __call__(
        self, x: Tensor, y: Tensor, paths: Sequence[Path], threads: int = 1, tile: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Norms [P, B] and gradients [P, B, C, H, W]."""
        tape, gates = lowered_paths.tape(self.net, self.order, paths)
        return self.run(x, y, tape, gates, len(paths), threads, tile)

    def run(
        self, x: Tensor, y: Tensor, tape: Tensor, gates: Tensor, words: int, threads: int = 1, tile: int = 0
    ) -> tuple[Tensor, Tensor]:
        shape = list(self.net.stem(x[:1]).shape[1:])
        return OPS.path_gradients(
            x, y, self.layout, self.packed, self.transposed, self.isa, torch.tensor(self.order), tape, gates, words,
            threads, tile, shape, torch.zeros(3, dtype=torch.int64),
        )  # type: ignore[no-any-return]  # fmt: skip

    def safe(self, x: Tensor) -> Tensor:
        """The images on which no mask is in doubt."""
        return x[lowered_paths.margins(self.truth, x.double(), self.order) > MARGIN]


def labels(x: Tensor, classes: int) -> Tensor:
    return torch.arange(len(x)) % classes


def assert_close(packed: Packed, x: Tensor, paths: Sequence[Path]) -> None:
    """DESIGN's promise for the gradient of every path: at most four times torch's own error, with a floor. It is what
    Winograd's convolutions cost, 6 eps each, at random: a chosen branch has no shortcut beside it that would dilute it.

    Measured on 1,920 paths of 0 to 18 convolutions: at most 5.75 eps (64 channels at 8 x 8; 4.5 elsewhere) times the
    square root, flat in their number, and up to 4.6 times torch's error: a bias would grow with the number itself.
    """
    y = labels(x, packed.net.classes)
    norms, found = packed(x, y, paths)
    truth = lowered_paths.gradients(packed.truth, x.double(), y, packed.order, paths)
    torchs = lowered_paths.gradients(packed.net, x, y, packed.order, paths)
    assert found.shape == truth.shape
    for p in range(len(paths)):
        size = truth[p].flatten(1).norm(dim=1)
        off, theirs = ((g[p].double() - truth[p]).flatten(1).norm(dim=1) for g in (found, torchs))
        convs = sum(len(packed.net.blocks[j].convs) for j, gate in paths[p].items() if gate)
        floor = 6 * 2.0**-23 * (1 + convs) ** 0.5 * float(size.square().mean().sqrt())
        bound = max(4 * float(theirs.square().mean().sqrt()), floor)
        assert float(off.square().mean().sqrt()) <= bound
        torch.testing.assert_close(norms[p], found[p].double().flatten(1).norm(dim=1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("isa", ISAS)
@FEW
@given(net=networks(), data=st.data())
def test_any_network_against_float64(isa: str, net: FusedNetwork, data: st.DataObject) -> None:
    packed = Packed(net, isa)
    x = packed.safe(torch.randn(30, *net.input_shape, generator=torch.Generator().manual_seed(0)))
    assume(len(x) >= 10)  # both errors are estimates from these images
    gates = st.sampled_from([1.0, 1.0, 0.0, 0.0, 0.5, -1.25, 1e-6])
    paths = [{}, dict.fromkeys(packed.order, 1.0), {j: data.draw(gates) for j in packed.order}]
    assert_close(packed, x, paths)


def odd_block(g: torch.Generator, kind: str, index: int, pre: bool) -> FusedBlock:
    """Blocks that no CIFAR network has, from 16 x 9 x 12 to 20 channels at half the size."""
    shape, out = (16, 9, 12), (20, 5, 6)
    first, shortcut = lowered.conv(g, 16, 20, 3, 2, relu=True), lowered.conv(g, 16, 20, 1, 2)
    pool = 0
    if kind == "wide kernel":
        first = lowered.conv(g, 16, 20, 5, 2, 2, relu=True)
    elif kind == "strided 1x1":
        first = lowered.conv(g, 16, 20, 1, 2, relu=True)
    elif kind == "3x3 projection":
        shortcut = lowered.conv(g, 16, 20, 3, 2)
    elif kind == "pooled projection":
        first, shortcut, pool, out = (
            lowered.conv(g, 16, 20, 2, 2, 0, relu=True),
            lowered.conv(g, 16, 20, 1),
            2,
            (20, 4, 6),
        )
    elif kind == "wide padding":
        first = lowered.conv(g, 16, 20, 2, 2, 1, relu=True)
        shortcut, out = lowered.conv(g, 16, 20, 2, 2, 1), (20, 5, 7)
    convs = (first, lowered.conv(g, 20, 20))
    s = Shortcut("projection", shortcut.stride, 0, 0, pool, shortcut, pre)
    if kind == "activated padding":
        s = Shortcut("pad", 2, 1, 3, 0, None, pre)
    scale = torch.rand(16, generator=g) + 0.5 if pre else None
    shift = torch.randn(16, generator=g) * 0.3 if pre else None
    return FusedBlock(index, f"block{index}", scale, shift, convs, s, not pre, shape, out)


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize(
    "kind",
    ["plain", "wide kernel", "strided 1x1", "3x3 projection", "pooled projection", "wide padding", "activated padding"],
)
def test_odd_blocks_against_float64(kind: str, pre: bool) -> None:
    g = torch.Generator().manual_seed(1)
    base = lowered.network(1, (16,), 1, (3, 9, 12), pre=pre)
    odd = odd_block(g, kind, 1, pre)
    last = lowered.block(g, 2, odd.shape_out, 20, pre=not pre)  # a closing ReLU before a prologue, or none before one
    weight = torch.randn(10, 20, generator=g) * 0.3
    head = type(base.head)(None, None, pre, weight, torch.zeros(10))
    net = FusedNetwork(base.stem, (*base.blocks, odd, last), head, base.input_shape, 10)
    packed = Packed(net)
    x = packed.safe(torch.randn(32, *net.input_shape, generator=g))
    assert len(x) >= 4
    assert_close(packed, x, [{}, {0: 1.0, 1: 1.0, 2: 1.0}, {1: 0.5}, {0: 1.0, 2: -2.0}, {0: 1.0}])


def test_the_sum_over_all_paths_is_the_gradient() -> None:
    """The unraveled view itself, in one precision and with one forward: 2^n paths add up."""
    packed = Packed(lowered.network(3, (16, 32), 2, (3, 12, 12), pre=True))
    x = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    n = len(packed.order)
    paths: list[Path] = [{j: 1.0 for j in packed.order if word >> j & 1} for word in range(2**n)]
    _, found = packed(x, labels(x, 10), paths)
    state = packed.net.stem(x).detach().requires_grad_()
    y = state
    for block in packed.net.blocks:
        y = block(y)
    loss = torch.nn.functional.cross_entropy(packed.net.head(y), labels(x, 10), reduction="sum")
    (whole,) = torch.autograd.grad(loss, state)
    torch.testing.assert_close(found.sum(0), whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("pre", [False, True])
def test_the_same_bits_however_the_work_is_cut(isa: str, pre: bool) -> None:
    packed = Packed(lowered.network(5, (16, 17, 64), 2, (3, 18, 20), pre=pre, shortcut="pad"), isa)
    x = torch.randn(7, 3, 18, 20, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    paths: list[Path] = [{j: 1.0 for j in packed.order if torch.rand((), generator=g) < 0.5} for _ in range(20)]
    norms, gradients = packed(x, labels(x, 10), paths)
    for threads, tile in ((1, 1), (2, 0), (3, 2), (5, 7)):
        again = packed(x, labels(x, 10), paths, threads, tile)
        assert torch.equal(again[0], norms)
        assert torch.equal(again[1], gradients)
    alone = packed(x[4:5], labels(x, 10)[4:5], paths[3:4])
    assert torch.equal(alone[0], norms[3:4, 4:5])
    assert torch.equal(alone[1], gradients[3:4, 4:5])


def test_long_paths_do_not_underflow() -> None:
    net = lowered.network(0, (16,), 12, (3, 8, 8), pre=True)
    packed = Packed(net)
    x = packed.safe(torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert len(x) >= 2
    path = dict.fromkeys(packed.order, 1e-6)
    norms, _ = packed(x, labels(x, 10), [path])
    truth = lowered_paths.gradients(packed.truth, x.double(), labels(x, 10), packed.order, [path])
    size = truth.flatten(2).norm(dim=2)
    assert float(size.max()) < 1e-60  # float32 ends at 1e-45
    torch.testing.assert_close(norms, size, rtol=1e-5, atol=0)


def test_values_that_are_not_finite_stay_with_their_image() -> None:
    packed = Packed(lowered.network(2, (16, 32), 1, (3, 8, 8), pre=True))
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    paths: list[Path] = [{}, {0: 1.0}, {0: 1.0, 1: 1.0}]
    good, _ = packed(x, labels(x, 10), paths)
    x[1, 0, 3, 3] = torch.nan
    x[2] = torch.inf
    norms, _ = packed(x, labels(x, 10), paths)
    assert not torch.isfinite(norms[:, 1:3]).any()
    assert torch.equal(norms[:, [0, 3]], good[:, [0, 3]])


def test_malformed_calls_raise() -> None:
    packed = Packed(lowered.network(2, (16, 32), 2, (3, 8, 8)))
    x, y = torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])
    tape, gates = lowered_paths.tape(packed.net, packed.order, [{0: 1.0}])
    with pytest.raises(ValueError, match="Label 10"):
        packed.run(x, torch.tensor([0, 10]), tape, gates, 1)
    with pytest.raises(ValueError, match="out of the order"):
        packed.run(x, y, tape[[0, 1, 2, 4, 3, 5]], gates[[0, 1, 2, 4, 3, 5]], 1)
    with pytest.raises(ValueError, match="out of the order"):
        packed.run(x, y, tape[[0, 2, 3, 4, 5]], gates[[0, 2, 3, 4, 5]], 1)  # block 3 left out
    with pytest.raises(ValueError, match="ends before block 0"):
        packed.run(x, y, tape[[0, 1, 2, 3, 5]], gates[[0, 1, 2, 3, 5]], 1)
    with pytest.raises(ValueError, match="word 1 of 1"):
        packed.run(x, y, *lowered_paths.tape(packed.net, packed.order, [{}, {}]), 1)
    packed.order = [0, 0, 1, 2]
    with pytest.raises(ValueError, match="no permutation"):
        packed.run(x, y, tape, gates, 1)
    packed.order = [2, 0, 1, 3]
    with pytest.raises(ValueError, match="another shape"):
        packed.run(x, y, tape, gates, 1)


def test_nothing_to_do() -> None:
    packed = Packed(lowered.network(2, (16,), 1, (3, 8, 8)))
    x, y = torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64)
    norms, gradients = packed.run(x, y, torch.empty(0, 2, dtype=torch.int32), torch.empty(0), 0)
    assert norms.shape == (0, 1)
    assert gradients.shape == (0, 1, 16, 8, 8)
    norms, gradients = packed(x[:0], y[:0], [{}, {0: 1.0}])
    assert norms.shape == (2, 0)
    assert gradients.shape == (2, 0, 16, 8, 8)


# From here on the engine: a wrapped network, a plan, the reference beside it.


def executor(net: rf.ResidualNetwork, sweep: rf.Sweep, engine: str = "cpu") -> rf.engines.GradientExecutor:
    dtype = torch.float64 if engine == "reference" else torch.float32
    plan = gradient_plan(net, sweep)
    return rf.engines.get(engine).prepare_gradients(net, plan, torch.device("cpu"), dtype, "first_block")


@pytest.fixture(scope="module")
def net() -> rf.ResidualNetwork:
    return small()


def images(n: int) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize(
    "options",
    [{}, {"preactivation": False}, {"preactivation": False, "option": "pad"}, {"bottleneck": True, "depth": 29}],
)
def test_the_engine_against_the_reference(options: dict) -> None:  # type: ignore[type-arg]
    """Norms are compared image by image; those on which a mask differs show as 1e-3 and more, and few may."""
    net = small(**options)
    sweep = rf.sweeps.paths(net, lengths=[0, 1, 4, len(net.blocks)], samples=3, seed=0)
    x, y = images(10), torch.arange(10)
    found, truth = executor(net, sweep).norms(x, y), executor(net, sweep, "reference").norms(x, y)
    assert found.shape == truth.shape
    assert found.dtype == torch.float64
    off = (found - truth).abs() / truth
    assert float(off.median()) < 2e-6
    assert float(off.max()) < 0.05
    gradients = executor(net, sweep).gradients(x[:2], y[:2])
    torch.testing.assert_close(gradients.double().flatten(2).norm(dim=2), found[:, :2], rtol=1e-5, atol=0)


def test_a_reordered_forward(net: rf.ResidualNetwork) -> None:
    order = [2, 0, 1, 3, 5, 4, 6, 8, 7]
    words = [(order, [float(j % 2 == w) for j in range(9)]) for w in range(2)]
    sweep = rf.sweeps.from_words(net, [o for o, _ in words], [g for _, g in words])
    x, y = images(4), torch.arange(4)
    found, truth = executor(net, sweep).norms(x, y), executor(net, sweep, "reference").norms(x, y)
    off = (found - truth).abs() / truth
    assert float(off.median()) < 2e-6
    assert float(off.max()) < 0.05


def test_what_the_engine_refuses(net: rf.ResidualNetwork) -> None:
    plan = gradient_plan(net, rf.sweeps.intact(net))
    engine, device = cpu.CpuEngine(), torch.device("cpu")
    assert engine.refuses_gradients(net, plan, device, torch.float32, "first_block") is None
    assert "bfloat16" in str(engine.refuses_gradients(net, plan, device, torch.bfloat16, "first_block"))
    assert "float64" in str(engine.refuses_gradients(net, plan, device, torch.float64, "first_block"))
    assert "at image" in str(engine.refuses_gradients(net, plan, device, torch.float32, "image"))
    assert "at parameters" in str(engine.refuses_gradients(net, plan, device, torch.float32, "parameters"))


def test_weights_are_packed_again_when_something_changes() -> None:
    net = small(8)
    sweep, x, y = rf.sweeps.paths(net, samples=2, seed=0), images(3), torch.arange(3)
    before = executor(net, sweep).norms(x, y)
    assert torch.equal(executor(net, sweep).norms(x, y), before)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.1)
    truth = executor(net, sweep, "reference").norms(x, y)
    assert float(((executor(net, sweep).norms(x, y) - truth).abs() / truth).median()) < 2e-6


def test_the_operator_is_known_to_tracing_and_has_no_backward(net: rf.ResidualNetwork) -> None:
    call = executor(net, rf.sweeps.paths(net, lengths=[2], samples=3, seed=0))
    for shape in ((), (16, 32, 32)):
        arguments = call.arguments(images(2), torch.tensor([0, 1]), shape, torch.zeros(3, dtype=torch.int64))  # type: ignore[attr-defined]
        torch.library.opcheck(OPS.path_gradients.default, arguments)
    given, *others = arguments
    with pytest.raises(NotImplementedError, match="path_gradients has no backward"):
        OPS.path_gradients(given.clone().requires_grad_(), *others)
    with torch.no_grad():
        assert not OPS.path_gradients(given.clone().requires_grad_(), *others)[1].requires_grad


def test_progress_and_ctrl_c(net: rf.ResidualNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_POLL_SECONDS", 0.002)
    shares: list[float] = []
    x, y = images(64), torch.zeros(64, dtype=torch.int64)
    executor(net, rf.sweeps.paths(net, lengths=[4], samples=20, seed=0)).norms(x, y, shares.append)
    assert sum(shares) == pytest.approx(1)
    assert len(shares) > 3
    asked: list[float] = []

    def stop(share: float) -> None:
        asked.append(time.perf_counter())
        raise KeyboardInterrupt

    long = executor(net, rf.sweeps.paths(net, lengths=[3, 4, 5, 6], samples=80, seed=0))
    with pytest.raises(KeyboardInterrupt):
        long.norms(images(512), torch.zeros(512, dtype=torch.int64), stop)
    assert time.perf_counter() - asked[0] < 1


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space through Linux's resource limits")
def test_no_memory_is_an_error_and_the_process_lives() -> None:
    code = """
    import resource, torch
    import resens_fast as rf
    from resens_fast.gradient_plan import gradient_plan
    net = rf.wrap(rf.models.resnet(8).eval())
    plan = gradient_plan(net, rf.sweeps.intact(net))
    e = rf.engines.get("cpu")
    assert e.missing() is None
    executor = e.prepare_gradients(net, plan, torch.device("cpu"), torch.float32, "first_block")
    x, y = torch.zeros(3000, 3, 32, 32), torch.zeros(3000, dtype=torch.int64)
    executor.norms(x[:2], y[:2])
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20),) * 2)
    executor.tile = 3000
    try:
        executor.norms(x, y)
    except torch.OutOfMemoryError:
        executor.tile = 1
        print(executor.norms(x[:3], y[:3]).shape)
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "[1, 3]" in done.stdout
