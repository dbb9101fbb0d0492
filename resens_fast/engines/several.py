"""Several devices at once: each gets a share of every batch, and what they count adds up to the same integers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch

from ..errors import EngineError
from .base import Executor, Progress, Tally

_POLL_SECONDS = 0.1
R = TypeVar("R")
Devices = torch.device | str | int | Sequence[torch.device | str | int]


def devices(wanted: Devices) -> list[torch.device]:
    """The devices of `wanted`, one, several, or names with commas between them, after a number was put on each;
    a number alone is that GPU, as in PyTorch.

    Raises EngineError for a device that cannot be used, one that is named twice and devices of different kinds.
    """
    if isinstance(wanted, str):
        wanted = wanted.split(",")
    elif isinstance(wanted, (torch.device, int)):
        wanted = [wanted]
    found = [_usable(device) for device in wanted]
    if not found:
        raise EngineError("there is no device in an empty list; leave device out to use the network's own")
    names = [str(device) for device in found]
    if len({device.type for device in found}) > 1:
        raise EngineError(f"several devices must be of one kind, not {', '.join(names)}")
    if len(set(names)) < len(names):
        raise EngineError(f"a device is named twice: {', '.join(names)}; name each one once")
    return found


def _usable(device: torch.device | str | int) -> torch.device:
    try:
        torch.zeros(1, device=device).item()
        found = torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        why = str(error).splitlines()[0]
        raise EngineError(f"the device {str(device)!r} cannot be used: {why}") from None
    if found.type == "cuda" and found.index is None:
        found = torch.device("cuda", torch.cuda.current_device())
    return found


class _Stopped(BaseException):
    """Ends the other devices' work when one has failed or Ctrl-C was pressed."""


class SeveralExecutor(Executor):
    """One executor per device, each run in a thread of its own on a share of the images.

    Progress and Ctrl-C are dealt with in the calling thread; the other devices stop at their next report.
    """

    def __init__(self, executors: Sequence[tuple[torch.device, Executor]]) -> None:
        self.executors = list(executors)
        self.batch = sum(executor.batch for _, executor in self.executors)
        sizes = [executor.footprint for _, executor in self.executors]
        self.footprint = None if None in sizes else sum(size for size in sizes if size is not None)

    def shares(self, images: int) -> list[tuple[int, int]]:
        """Where each device's images begin and end, in proportion to the batches that the executors like."""
        ends, so_far = [], 0
        for _, executor in self.executors:
            so_far += executor.batch
            ends.append(images * so_far // self.batch)
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def _each(self, images: int, call: Callable[[Executor, slice, Progress], R], progress: Progress | None) -> list[R]:
        told: queue.SimpleQueue[float] = queue.SimpleQueue()
        stop = threading.Event()

        def work(device: torch.device, executor: Executor, start: int, end: int) -> R:
            def report(share: float) -> None:
                if stop.is_set():
                    raise _Stopped
                told.put(share * (end - start) / images)

            with _current(device):
                return call(executor, slice(start, end), report)

        def forward() -> None:
            while progress and not told.empty():
                progress(told.get())

        parts = [(*pair, *share) for pair, share in zip(self.executors, self.shares(images), strict=True)]
        with ThreadPoolExecutor(len(parts), "resens_fast.device") as pool:
            futures: list[Future[R]] = [pool.submit(work, *part) for part in parts if part[2] < part[3]]
            pending = set(futures)
            try:
                while pending:
                    done, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
                    for future in done:
                        future.result()
                    forward()
            except BaseException:
                stop.set()
                raise
            return [future.result() for future in futures]

    def tally(self, images: torch.Tensor, labels: torch.Tensor, progress: Progress | None = None) -> Tally:
        if not len(images):
            return self.executors[0][1].tally(images, labels)
        tallies = self._each(len(images), lambda e, part, told: e.tally(images[part], labels[part], told), progress)
        for tally in tallies[1:]:
            tallies[0].add(tally)
        return tallies[0]

    def logits(self, images: torch.Tensor, progress: Progress | None = None) -> torch.Tensor:
        if not len(images):
            return self.executors[0][1].logits(images)
        return torch.cat(self._each(len(images), lambda e, part, told: e.logits(images[part], told), progress), dim=1)


def _current(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
