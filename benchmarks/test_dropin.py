"""One line added to somebody else's code: its own evaluation loop on its own network, as it is, compiled, and wrapped.

The codebase is akamaster/pytorch_resnet_cifar10, which is not part of this repository:

    git clone https://github.com/akamaster/pytorch_resnet_cifar10
    pytest benchmarks/test_dropin.py --benchmark-only --codebase pytorch_resnet_cifar10
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import resens_fast as rf
from benchmarks import peers
from benchmarks.conftest import RESULTS
from benchmarks.test_cpu import interleave, new_result, ready, timed

PEERS = ("ours", "eager", "compile")
IMAGES, BATCHES = 1024, (16, 32, 64, 128)  # 128 is what the codebase's own loader has; the best one counts


@pytest.fixture
def codebase(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The codebase's trainer module; without a GPU its `.cuda()` leaves tensors where they are."""
    path = request.config.getoption("--codebase")
    if path is None or not (Path(path) / "trainer.py").is_file():
        pytest.skip("needs --codebase, a clone of github.com/akamaster/pytorch_resnet_cifar10")
    monkeypatch.syspath_prepend(path)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *_, **__: self)
    trainer = importlib.import_module("trainer")
    trainer.args = argparse.Namespace(half=False, print_freq=1 << 30)  # type: ignore[attr-defined]
    return trainer


def network(trainer: Any, arch: str, folder: str) -> nn.Module:
    """The codebase's network with its own trained weights where it ships them."""
    torch.manual_seed(0)
    model: nn.Module = trainer.resnet.__dict__[arch]()
    for file in sorted((Path(folder) / "pretrained_models").glob(f"{arch}-*.th")):
        state = torch.load(file, map_location="cpu", weights_only=False)["state_dict"]
        model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return model.eval()


def candidates(model: nn.Module, peer: str) -> list[nn.Module]:
    """The network as the peer runs it; channels last is tried too, for the codebase's loop takes what it is given."""
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if peer == "ours":
        return [rf.wrap(model)]  # the one line
    return [model, last] if peer == "eager" else [peers.compiled(last)]


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("arch", ["resnet56", "resnet110"])
def test_dropin(arch: str, peer: str, codebase: Any, benchmark: Any, request: pytest.FixtureRequest) -> None:
    wanted = [p for p in PEERS if p in request.config.getoption("--peers").split(",")]
    if request.config.getoption("--quick") or peer not in wanted:
        pytest.skip("not asked for")
    model = network(codebase, arch, request.config.getoption("--codebase"))
    x = torch.randn(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        truth = torch.cat([model(part) for part in x.split(128)])
    labels = truth.argmax(1)
    labels[::3] = 0  # some right and some wrong answers
    expected = 100.0 * float((truth.argmax(1) == labels).float().mean())
    criterion = nn.CrossEntropyLoss()
    best: tuple[float, Any] | None = None
    for way in candidates(model, peer):
        with torch.no_grad():
            assert float((way(x[:128]) - truth[:128]).abs().max()) <= 1e-3 * float(truth.abs().max())
        for size in BATCHES if peer == "eager" else (128,):
            loader = list(zip(x.split(size), labels.split(size), strict=True))
            loop = functools.partial(codebase.validate, loader, way, criterion)
            assert abs(loop() - expected) < 0.2, "another accuracy than the network's own"
            seconds = timed(benchmark, loop)
            if best is None or seconds < best[0]:
                best = (seconds, loop)
    assert best is not None
    benchmark.group = f"drop-in, {arch}"
    benchmark.pedantic(best[1], rounds=1, iterations=1)
    net, name = rf.wrap(model), f"drop-in: akamaster {arch}, its own loop"
    plan = rf.plan(net, rf.sweeps.intact(net))
    rounds = RESULTS.setdefault(name, new_result((3.5, 2.5), net, plan, IMAGES))["rounds"]
    ready(name)[peer] = best[1], 1.0
    rounds[peer] = [benchmark.stats.stats.median]
    if peer == wanted[-1]:
        interleave(benchmark, ready(name), rounds)
