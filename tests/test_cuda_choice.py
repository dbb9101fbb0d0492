"""What a GPU user gets: which cards and networks the CUDA engine takes, by which path, and what it tells the others.

The device's own answers (its capability, the variant that fits) are planted: everything from there on is the engine's.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import resens_fast as rf
from resens_fast import doctor, engines, extension
from resens_fast.commands.tables import print_study
from resens_fast.engines import cuda
from resens_fast.engines.cuda import CudaEngine, Variant
from resens_fast.engines.ops import has_kernel
from resens_fast.errors import EngineError

GPU = torch.device("cuda", 0)
needs_cuda = pytest.mark.skipif(not has_kernel("cuda"), reason="resens_fast._C was built without CUDA")


class Card:
    """A planted GPU: name, compute capability and images per CTA for each width."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], fits: dict[int, int]):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(CudaEngine, "variant", staticmethod(lambda d, packed: Variant(fits[packed.width], 108, 0)))
        made = lambda kind: lambda *rest: SimpleNamespace(kind=kind, arguments=rest)  # noqa: E731
        monkeypatch.setattr(cuda, "TapeExecutor", made("tape"))
        monkeypatch.setattr(cuda, "LevelsExecutor", made("levels"))


def a100(monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(monkeypatch, "A100", (8, 0), {16: 1, 32: 0})


def h100(monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(monkeypatch, "H100", (9, 0), {16: 2, 32: 1})


def network(width: int = 16, **options: Any) -> rf.ResidualNetwork:
    return rf.wrap(rf.models.resnet(8, width=width, **options).eval())


def prepared(net: rf.ResidualNetwork, dtype: torch.dtype) -> tuple[CudaEngine, Any]:
    engine = CudaEngine()
    assert engine.refuses(net, GPU, dtype) is None
    promised = engine.bitwise
    executor: Any = engine.prepare(net, rf.plan(net, rf.sweeps.intact(net)), torch.device("cuda"), dtype)
    assert engine.bitwise == promised == (executor.kind == "tape")
    return engine, executor


@needs_cuda
def test_a_card_that_is_too_old_goes_to_torch_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    Card(monkeypatch, "Tesla V100", (7, 0), {})
    net = network()
    engine, passed = engines.choose("auto", net, GPU, torch.bfloat16)
    assert engine.name == "torch"
    assert passed["cuda"] == "Tesla V100 has compute capability 7.0; it needs 8.0 or newer"
    with pytest.raises(EngineError, match="the cuda engine cannot run this: Tesla V100 has compute capability 7.0"):
        engines.choose("cuda", net, GPU, torch.bfloat16)


@needs_cuda
def test_auto_waits_for_a_run_on_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    h100(monkeypatch)
    _, passed = engines.choose("auto", network(), GPU, torch.bfloat16)
    assert "has not run on a GPU yet" in passed["cuda"]
    assert engines.choose("cuda", network(), GPU, torch.bfloat16)[0].name == "cuda"


@pytest.mark.parametrize(("width", "images"), [(16, 2), (32, 1)])
def test_the_tape_takes_both_widths_where_they_fit(monkeypatch: pytest.MonkeyPatch, width: int, images: int) -> None:
    h100(monkeypatch)
    engine, executor = prepared(network(width), torch.float16)
    assert executor.kind == "tape"
    assert engine.path == f"tape kernel for {width} channels, {images} image(s) per CTA"


@pytest.mark.parametrize(
    ("width", "dtype", "why"),
    [
        (32, torch.bfloat16, "resens_fast._C has no tape kernel of 32 channels that fits A100"),
        (48, torch.bfloat16, "the stem has 48 channels; the kernel takes 16 or 32"),
        (16, torch.float32, "not in torch.float32: pass dtype=torch.bfloat16 (or torch.float16) for it"),
        (48, torch.float32, "the stem has 48 channels; the kernel takes 16 or 32"),
    ],
)
def test_levels_take_the_rest_and_say_why(
    monkeypatch: pytest.MonkeyPatch, width: int, dtype: torch.dtype, why: str
) -> None:
    """A wide network on a card of 163 KB, another width, and a float32 network, whose user learns how to go faster."""
    a100(monkeypatch)
    engine, executor = prepared(network(width), dtype)
    assert executor.kind == "levels"
    assert engine.path.startswith("levels: ")
    assert engine.path.endswith(why)


def test_the_study_says_which_way(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The path of a float32 network stands in its manifest and above its tables, so nobody wonders why it was slow."""
    net = network()
    engine = engines.get("torch")
    monkeypatch.setattr(type(engine), "path", "levels: of course")
    data = torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64)
    study = rf.evaluate(net, rf.sweeps.intact(net), data, engine="torch", progress=False)
    assert study.manifest["engine"]["path"] == "levels: of course"
    print_study(study, "net", "noise")
    assert "the torch engine took the levels: of course" in capsys.readouterr().out


@needs_cuda
def test_the_doctor_tells_a_gpu_user(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [("V100", (7, 0)), ("A100", (8, 0)), ("H100", (9, 0)), ("broken", (9, 0))]
    rows = [
        {"name": n, "capability": c, "multiprocessors": 108, "shared_bytes_per_block": 2**17, "l2_bytes": 2**25}
        for n, c in cards
    ]

    def variant(index: int, fp16: bool, width: int) -> list[int]:
        if index == 3:
            raise RuntimeError("no kernel image")
        return [{16: (1, 2), 32: (0, 1)}[width][index - 1], 108, 2**25]

    module = SimpleNamespace(cuda_devices=lambda: (rows, ""))
    monkeypatch.setattr(extension, "module", lambda: module)
    monkeypatch.setattr(torch.ops.resens_fast, "cuda_variant", variant)
    facts = doctor._cuda()
    assert facts["device 1"].startswith("A100, sm_80")
    assert facts["cuda engine on 0"] == "none: it needs compute capability 8.0; the torch engine runs there"
    assert "16, 32 and 64 channels (1 per CTA) in bfloat16 or float16" in facts["cuda engine on 1"]
    assert "(2 per CTA) or 32, 64 and 128 channels (1 per CTA)" in facts["cuda engine on 2"]
    assert "for a float32 network pass dtype=torch.bfloat16" in facts["cuda engine on 2"]
    assert facts["cuda engine on 3"] == "broken: RuntimeError: no kernel image"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(extension, "reason", lambda: None)
    assert doctor._engines()["cuda"].startswith("ready, but auto passes over it: it has not run on a GPU yet")


def test_launches_are_short_on_a_card_of_any_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is planted: what a launch took decides how many parts the next one gets, and the first is a trial."""
    net = network()
    plan = rf.plan(net, rf.sweeps.single(net))

    def run(seconds_per_cost: float) -> list[float]:
        executor = object.__new__(cuda.TapeExecutor)
        executor.device, executor.words, executor.variant = torch.device("cpu"), plan.words, Variant(2, 1, 0)
        executor._rate, clock, done, took = None, [0.0], [0], []
        cost = [1000.0] * 64
        executor.program = lambda images: SimpleNamespace(cost=cost)  # type: ignore[method-assign, assignment]

        def launch(program: Any, first: int, last: int, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
            assert first == done[0] < last
            done[0] = last
            took.append(sum(cost[first:last]) * seconds_per_cost)
            clock[0] += took[-1]
            return torch.ones(3, plan.words, dtype=torch.int64), torch.empty(0)

        executor.launch = launch  # type: ignore[method-assign]
        monkeypatch.setattr(cuda.time, "perf_counter", lambda: clock[0])
        shares: list[float] = []
        executor._run(torch.zeros(2, 3, 32, 32), torch.zeros(2), False, shares.append, 1.0)
        assert abs(sum(shares) - 1) < 1e-9
        assert done[0] == len(cost)
        return took

    fast, guessed, slow = run(1e-6), run(cuda.FIRST_GUESS), run(10 * cuda.FIRST_GUESS)
    assert len(fast) <= 2
    assert max(guessed) < 1
    assert len(guessed) <= 4
    assert max(slow) < 1
    assert all(seconds == 1000 * 5e-3 for seconds in run(5e-3)[1:]), "a part is the least a launch can do"
