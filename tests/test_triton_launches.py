"""What the Triton engine launches, with kernels that only write down how they were called: no GPU, no interpreter."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import resens_fast as rf
from resens_fast.errors import EngineError
from tests import triton_cases

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is missing")
CPU = torch.device("cpu")


def key(name: str, constants: dict[str, Any], warps: int, stages: int) -> tuple[Any, ...]:
    return name, tuple(sorted(constants.items())), warps, stages


class Recorder:
    """Stands where a kernel stands."""

    def __init__(self, kernel: Any, seen: set[tuple[Any, ...]]) -> None:
        self.kernel, self.seen, self.__name__ = kernel, seen, kernel.__name__

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(0 < size < limit for size, limit in zip(grid, (2**31, 2**16, 2**16), strict=False)), grid
        return self.call

    def call(self, *arguments: Any, **options: Any) -> None:
        tile = options.pop("num_warps", 4), options.pop("num_stages", 3)
        assert options.pop("enable_fp_fusion") is True
        assert self.kernel.arg_names[len(arguments) :] == [n for n in self.kernel.arg_names if n in options]
        self.seen.add(key(self.__name__, options, *tile))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[tuple[Any, ...]]:
    from triton.runtime import JITFunction

    from resens_fast.kernels import backward, launch

    seen: set[tuple[Any, ...]] = set()
    for module in (launch, backward):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                monkeypatch.setattr(module, name, Recorder(value, seen))
    return seen


def resnet20(preactivation: bool, option: str) -> rf.ResidualNetwork:
    return rf.wrap(rf.models.resnet(20, preactivation=preactivation, option=option).eval())


def resnet50() -> rf.ResidualNetwork:
    torchvision = pytest.importorskip("torchvision")
    return rf.wrap(torchvision.models.resnet50(weights=None).eval(), torch.zeros(1, 3, 224, 224))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: resnet20(True, "projection"), id="pre"),
        pytest.param(lambda: resnet20(False, "projection"), id="post"),
        pytest.param(lambda: resnet20(False, "pad"), id="post-pad"),
        pytest.param(resnet50, id="resnet50", marks=pytest.mark.slow),
    ],
)
def test_every_launch_is_shipped(
    launched: set[tuple[Any, ...]], make: Callable[[], rf.ResidualNetwork], dtype: torch.dtype
) -> None:
    """What is compiled for cards that are not here is what the usual networks will ask for on them."""
    from resens_fast.engines.triton import TritonEngine
    from resens_fast.gradient_plan import gradient_plan
    from resens_fast.kernels import specialisations

    net, engine = make(), TritonEngine()
    images, labels = torch.zeros(2, *net.input_shape), torch.zeros(2, dtype=torch.int64)
    executor = engine.prepare(net, rf.plan(net, rf.sweeps.intact(net) + rf.sweeps.single(net)), CPU, dtype)
    executor.tally(images, labels)
    executor.logits(images)
    paths = gradient_plan(net, rf.sweeps.paths(net, [0, 2, len(net.blocks)], samples=2))
    engine.prepare_gradients(net, paths, CPU, dtype, "first_block").norms(images, labels)
    shipped = {
        key(each.kernel.__name__, each.constants, each.tile.warps, each.tile.stages)
        for each in specialisations.shipped(dtype, 90)
    }
    assert {name for name, *_ in launched} >= {
        "conv", "shortcut", "pool", "classify", "signs", "loss_gradient", "conv_transpose", "shortcut_transpose",
        "normalise", "square_norms",
    }  # fmt: skip
    assert not launched - shipped


@pytest.fixture
def restored() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    matmul.fp32_precision = before


def test_tf32_only_where_torch_is_told_to(restored: None) -> None:
    from resens_fast.kernels.launch import precision

    assert precision(torch.float32) == "ieee"
    torch.set_float32_matmul_precision("high")
    assert precision(torch.float32) == "tf32"
    assert precision(torch.bfloat16) == "ieee"
    torch.backends.cuda.matmul.allow_tf32 = False  # after which torch.get_float32_matmul_precision() raises
    assert precision(torch.float32) == "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert precision(torch.float32) == "tf32"


def executor(name: str = "post-pad-10-17") -> Any:
    whole, structure = triton_cases.network(name)
    sweep = triton_cases.sweep_of(structure)
    return triton_cases.executor(whole, rf.plan(structure, sweep), torch.float32)


def test_no_batch_has_more_elements_than_the_kernels_number(monkeypatch: pytest.MonkeyPatch) -> None:
    from resens_fast.kernels import pack

    ready = executor("bottleneck-post-pooled-8-16")
    assert ready.batch == 256
    image = ready.prepared.packed.image_elements
    assert image == 16 * 16 * 16, "the image itself: behind the stem's convolution there are 8 x 8 pixels"
    monkeypatch.setattr(pack, "NUMBERED", 5 * image + 1)
    assert executor("bottleneck-post-pooled-8-16").batch == 5
    monkeypatch.setattr(pack, "NUMBERED", image - 1)
    with pytest.raises(EngineError, match=r"1 image\(s\) take 4,096 elements .* use smaller images"):
        executor("bottleneck-post-pooled-8-16")


@pytest.mark.parametrize("budget", [2**17, 2**20])
def test_states_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    """Buffers times batch, however little there is; scratch areas and pooled states do not grow with the budget."""
    from resens_fast.engines import triton_memory

    monkeypatch.setattr(triton_memory, "INTERPRETER_BYTES", budget)
    prepared = executor().prepared
    memory = prepared.memory
    assert memory.states.nbytes <= budget
    assert len(memory.states) >= 2
    assert sum(area.nbytes for area in memory.scratch) <= triton_memory.SCRATCH_BYTES
    assert memory.means.nbytes <= triton_memory.SCRATCH_BYTES
    monkeypatch.setattr(triton_memory, "INTERPRETER_BYTES", 2**10)
    with pytest.raises(EngineError, match="only 1,024 bytes are free"):
        executor()


def test_a_batch_too_large_to_number_is_refused_by_the_block(
    launched: set[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from resens_fast.kernels import block, pack

    whole, _ = triton_cases.network("post-pad-10-17")
    x = torch.zeros(3, 7, 9, 16)
    block.run(whole.blocks[0], x, torch.ones(1))
    monkeypatch.setattr(pack, "NUMBERED", x.numel() - 1)
    with pytest.raises(EngineError, match=r"3 image\(s\) take 3,024 elements .* use smaller batches"):
        block.run(whole.blocks[0], x, torch.ones(1))


def test_full_batches_replay_what_was_captured(launched: set[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every piece once and in order for each batch: launched the first time, replayed after; never a part of a batch,
    nor logits, which go elsewhere each time.
    """
    monkeypatch.setattr("resens_fast.engines.triton.SEGMENT", 2)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    ready = executor()
    prepared, done = ready.prepared, []
    assert not prepared.captures, "there are no graphs on a CPU"
    prepared.captures = True

    def piece(index: int) -> Callable[[int], None]:
        return lambda images: done.append(("launch", index, images))

    class Graph:
        def __init__(self, index: int) -> None:
            self.index = index

        def replay(self) -> None:
            done.append(("replay", self.index, ready.batch))

    def capture(captured: Callable[[int], None]) -> Graph:
        return Graph([each for _, each in prepared.pieces].index(captured))

    count = len(prepared.pieces)
    assert count > 2
    assert sum(share for share, _ in prepared.pieces) == pytest.approx(1)
    prepared.pieces = [(share, piece(i)) for i, (share, _) in enumerate(prepared.pieces)]
    monkeypatch.setattr(prepared, "_capture", capture)
    images, labels = torch.zeros(2 * ready.batch + 3, 3, 7, 9), torch.zeros(2 * ready.batch + 3, dtype=torch.int64)
    ready.tally(images, labels)
    ready.logits(images[: ready.batch])
    runs = [("launch", ready.batch), ("replay", ready.batch), ("launch", 3), ("launch", ready.batch)]
    assert done == [(how, i, size) for how, size in runs for i in range(count)]
