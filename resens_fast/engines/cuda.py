"""The CUDA engine: the tape interpreter of csrc/cuda for CIFAR-sized basic blocks, the level schedule for the rest."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from .. import extension
from ..errors import DataError, EngineError, NotCovered
from .base import Engine, Executor, Progress, Tally
from .cuda_pack import WIDTHS, Packed, pack, refuses
from .levels import LevelsExecutor
from .ops import has_kernel

if TYPE_CHECKING:
    from ..network import ResidualNetwork
    from ..plan import Plan

__all__ = ["ASK", "OLDEST", "WIDTHS", "CudaEngine", "TapeExecutor"]

DTYPES = (torch.bfloat16, torch.float16)
OLDEST = (8, 0)
"""The least compute capability: bf16 products and cp.async."""
LAUNCH_SECONDS = 0.7
"""About how long one launch may take, so that progress, Ctrl-C and display watchdogs work."""
FIRST_GUESS = 12e-6
"""Seconds that a CTA takes for one block of its tile, before any launch has been measured; the first launch is an
eighth as long by this guess, in case the card is slower.
"""
LOGITS_BYTES = 2**28
ASK = "pass dtype=torch.bfloat16 (or torch.float16) for it"


class Variant(NamedTuple):
    """How the kernel runs on a device: images per CTA, CTAs that fill it, bytes of L2."""

    images: int
    ctas: int
    l2: int


class Mark:
    """A point in the device's work: a CUDA event, or the clock where device work is done at once (tests on a CPU)."""

    def __init__(self, device: torch.device) -> None:
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self.time = time.perf_counter()
        if self.event is not None:
            self.event.record()

    def seconds_since(self, begin: Mark) -> float:
        """Waits until this point is reached."""
        if self.event is None or begin.event is None:
            return self.time - begin.time
        self.event.synchronize()
        return begin.event.elapsed_time(self.event) * 1e-3


class Program(NamedTuple):
    """A plan as the kernel reads it: three tensors on the device, slots on the CPU; `cost` of each part in blocks."""

    tape: torch.Tensor
    chunks: torch.Tensor
    parts: torch.Tensor
    slots: torch.Tensor
    cost: list[float]


def launches(cost: list[float], seconds_per_cost: float, limit: float = LAUNCH_SECONDS) -> list[tuple[int, int]]:
    """Ranges of parts, each of about `limit` seconds and at least one part."""
    ranges, start, spent = [], 0, 0.0
    for part, units in enumerate(cost):
        seconds = units * seconds_per_cost
        if part > start and spent + seconds > limit:
            ranges.append((start, part))
            start, spent = part, 0.0
        spent += seconds
    if cost:
        ranges.append((start, len(cost)))
    return ranges


class TapeExecutor(Executor):
    """One plan on one device.

    Image tiles times sub-tapes are the work items of a launch, so that even eight images fill the device; launches are
    bounded in time.
    """

    def __init__(self, packed: Packed, plan: Plan, device: torch.device, variant: Variant) -> None:
        self.packed = packed
        self.layout, self.weights = packed.operands(device)
        self.device, self.variant, self.words = device, variant, plan.words
        tape = plan.tape()
        self._tape = torch.from_numpy(np.ascontiguousarray(tape.instructions, dtype=np.int32)).reshape(-1, 2)
        self._gates = torch.from_numpy(np.ascontiguousarray(tape.gates, dtype=np.float32))
        self._cost = float(plan.executed_runs) + 0.1 * plan.words
        self._programs: dict[int, Program] = {}
        self._rate: float | None = None  # seconds for a block of a tile, once a launch was timed
        # Sixteen waves: the last, partly filled one costs little, and the stem's output takes 64 or 128 KB per image.
        self.batch = variant.images * variant.ctas * 16

    def program(self, images: int) -> Program:
        """The plan cut into as many parts as fill the device and keep launches short, for that many images."""
        tiles = max(1, math.ceil(images / self.variant.images))
        fill = 4 * self.variant.ctas / tiles
        short = self._cost * max(1.0, tiles / self.variant.ctas) * FIRST_GUESS / (LAUNCH_SECONDS / 4)
        wanted = min(self.words, 2 ** math.ceil(math.log2(max(fill, short, 1.0))))
        if wanted not in self._programs:
            tape, chunks, parts, cost, slots = torch.ops.resens_fast.cuda_program(
                self._tape, self._gates, self.packed.blocks, self.variant.images, self.packed.width, wanted
            )
            device = self.device
            self._programs[wanted] = Program(tape.to(device), chunks.to(device), parts.to(device), slots, cost.tolist())
        return self._programs[wanted]

    def launch(
        self, program: Program, first: int, last: int, images: torch.Tensor, labels: torch.Tensor, logits: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts int64 [3, W] and logits [W, B, K] of parts first to last - 1, zero for other words; nothing waits."""
        counts, values = torch.ops.resens_fast.eval(
            images, labels, self.layout, self.weights,
            [program.tape, program.chunks, program.parts[first:last], program.slots],
            self.words, self.packed.head[3] if logits else 0, self.variant.ctas, self.variant.images,
        )  # fmt: skip
        return counts, values

    def enqueue(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Counts int64 [3, W] of images float32 [B, C, 32, 32] and labels int64 [B], all on the executor's device.

        One launch on the current stream, however long it takes; nothing is read back or waited for, so it can be
        captured with `torch.cuda.graph`, after a call outside the capture that puts the program onto the device.
        Labels are not checked.
        """
        with self._on_device():
            program = self.program(len(images))
            return self.launch(program, 0, len(program.cost), images, labels, False)[0]

    def _on_device(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _run(
        self, images: torch.Tensor, labels: torch.Tensor, logits: bool, progress: Progress | None, share: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        with self._on_device():
            x = images.to(self.device, torch.float32).contiguous()
            y = labels.to(self.device, torch.int64).contiguous()
            program = self.program(len(x))
            cost = program.cost
            waves = max(1.0, len(x) / self.variant.images / self.variant.ctas)
            tally = torch.zeros(3, self.words, dtype=torch.int64, device=self.device)
            out: torch.Tensor | None = None
            queued: list[tuple[Mark, Mark, float]] = []
            part = 0
            while part < len(cost) or queued:
                if part < len(cost):
                    rate, limit = (
                        (FIRST_GUESS, LAUNCH_SECONDS / 8) if self._rate is None else (self._rate, LAUNCH_SECONDS)
                    )
                    last = launches(cost[part:], waves * rate, limit)[0][1] + part
                    begin = Mark(self.device)
                    counts, values = self.launch(program, part, last, x, y, logits)
                    tally += counts
                    if logits:
                        out = values if out is None else out.add_(values)
                    queued.append((begin, Mark(self.device), sum(cost[part:last])))
                    part = last
                # One launch runs while the next is prepared, except while nothing is known about their length.
                if len(queued) > 1 or part == len(cost) or self._rate is None:
                    begin, end, spent = queued.pop(0)
                    self._rate = max(1e-9, end.seconds_since(begin) / (spent * waves))
                    if progress:
                        progress(share * spent / sum(cost))
            return tally, out

    def _halving(
        self, images: torch.Tensor, labels: torch.Tensor, logits: bool, progress: Progress | None, share: float
    ) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Runs the images, in halves while the device has no memory for them."""
        try:
            return [self._run(images, labels, logits, progress, share)]
        except torch.OutOfMemoryError as error:
            if len(images) <= self.variant.images:
                raise EngineError(
                    f"{self.device} has no memory for one tile of {self.variant.images} images and the plan's slots; "
                    "free some of it or use engine='torch'"
                ) from error
        torch.cuda.empty_cache()
        half = len(images) // 2
        pairs = ((images[:half], labels[:half]), (images[half:], labels[half:]))
        return [r for x, y in pairs for r in self._halving(x, y, logits, progress, share * len(x) / len(images))]

    @torch.inference_mode()
    def tally(self, images: torch.Tensor, labels: torch.Tensor, progress: Progress | None = None) -> Tally:
        total = Tally.zeros(self.words)
        if not len(images):
            return total
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.packed.head[3]:
            raise DataError(f"labels run from {low} to {high}, but the network has {self.packed.head[3]} classes")
        for counts, _ in self._halving(images, labels, False, progress, 1.0):
            total.add(Tally(*counts.cpu().numpy()))
        return total

    @torch.inference_mode()
    def logits(self, images: torch.Tensor, progress: Progress | None = None) -> torch.Tensor:
        step = max(self.variant.images, LOGITS_BYTES // (4 * max(1, self.words) * self.packed.head[3]))
        pieces = [torch.zeros(self.words, 0, self.packed.head[3], device="cpu")]
        for x in images.split(step) if len(images) else ():
            for _, out in self._halving(x, torch.zeros(len(x), device="cpu"), True, progress, len(x) / len(images)):
                assert out is not None
                pieces.append(out.cpu())
        return torch.cat(pieces, dim=1)


class CudaEngine(Engine):
    """The tape kernel where it fits, bitwise the same for every batch and sweep; else levels through cuDNN."""

    name = "cuda"
    unproven = "it has not run on a GPU yet, only on models of one; name it to use it"
    bitwise = True
    path = ""
    """What prepare() chose: the tape kernel's variant, or levels and why."""

    def __init__(self) -> None:
        self._packed: tuple[ResidualNetwork, torch.dtype, Packed | str] | None = None

    def missing(self) -> str | None:
        why = extension.reason()
        if why:
            return why
        if not has_kernel("cuda"):
            why = extension.info().get("cuda_reason") or "no reason recorded"
            return f"resens_fast._C was built without CUDA: {why}"
        return None if torch.cuda.is_available() else "torch sees no CUDA device"

    def refuses(self, net: ResidualNetwork, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda":
            return f"it runs on CUDA devices, not on {device}"
        if not dtype.is_floating_point:
            return f"the dtype must be a floating-point one, not {dtype}"
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST:
            has = ".".join(map(str, capability))
            return f"{torch.cuda.get_device_name(device)} has compute capability {has}; it needs 8.0 or newer"
        packed = self.packed(net, dtype)
        self.bitwise = not isinstance(packed, str) and self.variant(device, packed).images > 0
        return None

    def packed(self, net: ResidualNetwork, dtype: torch.dtype) -> Packed | str:
        """The network for the tape kernel, or why it does not run there (the level schedule then does)."""
        if self._packed is None or self._packed[0] is not net or self._packed[1] != dtype:
            from ..lower import lower

            found: Packed | str
            try:
                fused = lower(net)
                if dtype in DTYPES:
                    found = pack(fused, dtype)
                else:
                    found = refuses(fused) or f"the tape kernel would take this network, but not in {dtype}: {ASK}"
            except NotCovered as reason:
                found = str(reason)
            self._packed = net, dtype, found
        return self._packed[2]

    @staticmethod
    def variant(device: torch.device, packed: Packed) -> Variant:
        """How the kernel runs there; images 0 where no variant fits."""
        index = device.index if device.index is not None else torch.cuda.current_device()
        return Variant(*torch.ops.resens_fast.cuda_variant(index, packed.dtype == torch.float16, packed.width))

    def prepare(self, net: ResidualNetwork, plan: Plan, device: torch.device, dtype: torch.dtype) -> Executor:
        index = device.index if device.index is not None else torch.cuda.current_device()
        device = torch.device("cuda", index)
        self._packed = None  # parameters may have changed since the question was asked
        packed = self.packed(net, dtype)
        if not isinstance(packed, str):
            variant = self.variant(device, packed)
            if variant.images:
                self.path = f"tape kernel for {packed.width} channels, {variant.images} image(s) per CTA"
                return TapeExecutor(packed, plan, device, variant)
            name = torch.cuda.get_device_name(device)
            packed = f"resens_fast._C has no tape kernel of {packed.width} channels that fits {name}"
        self.bitwise, self.path = False, f"levels: {packed}"
        return LevelsExecutor(net, plan, device, dtype)
