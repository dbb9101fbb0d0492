"""Several devices share a batch: the sums are those of one, progress adds up, and one that stops stops all.

Devices are CPUs here, with the executors of real engines: nothing in the sharing knows what a device is.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

import resens_fast as rf
from resens_fast import engines
from resens_fast.engines import several
from resens_fast.engines.base import Executor, Tally
from resens_fast.engines.several import SeveralExecutor, devices
from resens_fast.errors import EngineError

CPU = torch.device("cpu")


def test_the_study_is_the_same_as_on_one_device(
    net: rf.ResidualNetwork, images: torch.Tensor, labels: torch.Tensor
) -> None:
    two_cpus = [torch.device("cpu", 0), torch.device("cpu", 1)]  # torch takes the second for the first
    sweep = rf.sweeps.single(net)
    alone = rf.evaluate(net, sweep, (images, labels), engine="reference", device="cpu")
    for named in (two_cpus, "cpu:0,cpu:1", ["cpu:0", torch.device("cpu", 1)]):
        together = rf.evaluate(net, sweep, (images, labels), engine="reference", device=named)  # type: ignore[arg-type]
        for part, whole in zip(alone.parts[0].tally, together.parts[0].tally, strict=True):
            assert np.array_equal(part, whole)
        assert together.manifest["engine"]["device"] == ", ".join([alone.manifest["engine"]["device"]] * 2)
        assert together.manifest["data"]["hash"] == alone.manifest["data"]["hash"]
    rows = [rf.logits(net, sweep, images[:7], engine="torch", device=d) for d in ("cpu", "cpu:0,cpu:1")]
    assert torch.allclose(*rows, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (["cpu", "cpu"], "a device is named twice: cpu, cpu; name each one once"),
        (["cpu", "meta"], "the device 'meta' cannot be used"),
        ("cpu,warp", "the device 'warp' cannot be used"),
        ([], "no device in an empty list"),
        ([3.5], "the device '3.5' cannot be used"),
    ],
)
def test_devices_that_cannot_be(named: Any, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        devices(named)


def test_devices_of_two_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(several, "_usable", torch.device)
    with pytest.raises(EngineError, match="must be of one kind, not cpu, cuda:1"):
        devices(["cpu", "cuda:1"])


class Fake(Executor):
    """Counts images; reports in steps, and does what it is told at the second one."""

    def __init__(self, batch: int, at_second: Any = lambda: None) -> None:
        self.batch, self.at_second, self.saw, self.finished = batch, at_second, 0, False

    def tally(self, images: torch.Tensor, labels: torch.Tensor, progress: Any = None) -> Tally:
        assert len(images) == len(labels) > 0
        self.saw = len(images)
        for step in range(4):
            if step == 1:
                self.at_second()
            if progress:
                progress(0.25)
        self.finished = True
        one = np.array([len(images)])
        return Tally(one, one.copy(), one.copy())

    def logits(self, images: torch.Tensor, progress: Any = None) -> torch.Tensor:
        return images[None, :, :1]


def together(*executors: Fake) -> SeveralExecutor:
    return SeveralExecutor([(CPU, executor) for executor in executors])


def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(float(n))[:, None], torch.zeros(n, dtype=torch.int64)


@pytest.mark.parametrize(("count", "shares"), [(40, [10, 30]), (3, [0, 3]), (1, [0, 1])])
def test_images_go_by_the_batches_that_devices_like(count: int, shares: list[int]) -> None:
    small, large = Fake(10), Fake(30)
    run = together(small, large)
    told: list[float] = []
    assert run.batch == 40
    assert run.tally(*batch(count), told.append).errors.tolist() == [count]
    assert [small.saw, large.saw] == shares
    assert abs(sum(told) - 1) < 1e-9
    assert run.logits(batch(count)[0])[0, :, 0].tolist() == list(range(count)), "in the order of the images"
    assert run.tally(*batch(40)).errors.tolist() == [40], "without progress"


def test_an_error_on_one_device_stops_the_others() -> None:
    failed = threading.Event()

    def fail() -> None:
        failed.set()
        raise ZeroDivisionError("planted")

    def wait() -> None:
        failed.wait(10)
        threading.Event().wait(0.3)  # until the calling thread has seen the error

    other = Fake(1, wait)
    with pytest.raises(ZeroDivisionError, match="planted"):
        together(Fake(1, fail), other).tally(*batch(8))
    assert not other.finished
    assert not [t for t in threading.enumerate() if t.name.startswith("resens_fast.device")]


def test_ctrl_c_in_a_report_stops_every_device() -> None:
    released = threading.Event()

    def interrupt(_: float) -> None:
        released.set()
        raise KeyboardInterrupt

    def wait() -> None:
        released.wait(10)
        threading.Event().wait(0.3)

    both = Fake(1, wait), Fake(1, wait)
    with pytest.raises(KeyboardInterrupt):
        together(*both).tally(*batch(8), interrupt)
    assert not both[0].finished
    assert not both[1].finished


def test_every_device_must_be_covered(
    net: rf.ResidualNetwork, images: torch.Tensor, labels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        type(engines.get("torch")), "refuses", lambda self, net, device, dtype: "too old" if device.index == 1 else None
    )
    with pytest.raises(EngineError, match="the torch engine cannot run this: too old"):
        rf.evaluate(net, rf.sweeps.intact(net), (images, labels), engine="torch", device="cpu:0,cpu:1")
