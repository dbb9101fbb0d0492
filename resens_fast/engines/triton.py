"""The plan's levels in Triton: one launch advances every configuration that is alive, for all images.

It serves where the compiled CUDA engine is not: in an installation without nvcc, and on other cards. The kernels and
their launches are in `resens_fast.kernels`; here are the memory and the order.

Memory: half of what the card has free, most of it for state buffers. A buffer is the state of one configuration for one
batch of images. The more buffers, the more configurations a level holds and the fewer launches a sweep takes; the plan
says how many it needs at least.

Under Triton's interpreter (TRITON_INTERPRET=1 before triton is imported) the same kernels run on the CPU, thousands of
times slower: that is how they are tested on a machine without a GPU.
"""

from __future__ import annotations

from contextlib import nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import EngineError, NotCovered
from ..plan import HEAD, RUN
from .base import Engine, Executor, Progress, Tally

if TYPE_CHECKING:
    from ..fused import FusedNetwork
    from ..kernels.schedule import Launch
    from ..network import ResidualNetwork
    from ..plan import Plan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# A batch fills about this much of a buffer: enough pixels that one step occupies the card at the last stage too.
_BUFFER_BYTES = 2**23
_BATCH = (16, 256)
# The intermediate images of a launch: small enough to stay in the L2 cache of an H100, unless the levels are so wide
# that the launches would be too many.
_SCRATCH_BYTES, _WIDE_SCRATCH_BYTES, _MANY_LAUNCHES = 2**24, 2**28, 4000
_BUFFERS = 4096
# Launches between two progress reports, which is also what a CUDA graph holds: well below a second.
_SEGMENT = 256
_INTERPRETER_BYTES = 2**28


def interpreting() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


class _Prepared:
    """Parameters, memory and launches for images of one size."""

    def __init__(
        self, network: FusedNetwork, plan: Plan, device: torch.device, dtype: torch.dtype, size: tuple[int, int]
    ) -> None:
        from ..kernels import launch
        from ..kernels.pack import pack
        from ..kernels.schedule import schedule

        try:
            self.packed = packed = pack(network, device, dtype, size)
        except ValueError as error:
            raise EngineError(str(error)) from None
        budget = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else _INTERPRETER_BYTES
        image = packed.state_elements * dtype.itemsize
        least, most = _BATCH
        self.batch = min(most, max(least, 1 << (_BUFFER_BYTES // image).bit_length() >> 1))
        while self.batch > 1 and plan.least_budget * self.batch * image > budget:
            self.batch //= 2
        if plan.least_budget * self.batch * image > budget:
            raise EngineError(
                f"the triton engine needs {plan.least_budget} states of {image:,} bytes for one image of this sweep, "
                f"but only {budget:,} bytes are free; use the torch engine or split the sweep"
            )
        levels = plan.levels(min(_BUFFERS, budget // (self.batch * image)))
        self.schedule = schedule(packed, levels, self.batch, _SCRATCH_BYTES)
        if len(self.schedule.launches) > _MANY_LAUNCHES:
            self.schedule = schedule(packed, levels, self.batch, _WIDE_SCRATCH_BYTES)
        self.memory = launch.Memory.allocate(packed, self.schedule, self.batch, plan.words)
        launches = self.schedule.launches
        self.segments = [launches[i : i + _SEGMENT] for i in range(0, len(launches), _SEGMENT)]
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.captures = device.type == "cuda" and not interpreting() and len(launches) <= _MANY_LAUNCHES

    def launch(self, launches: tuple[Launch, ...], images: int, logits: torch.Tensor | None) -> None:
        from ..kernels import launch as kernels

        packed, memory, schedule = self.packed, self.memory, self.schedule
        for each in launches:
            if each.op == HEAD:
                kernels.heads(packed, memory, schedule, each.first, each.count, images, logits)
            else:
                function = kernels.run if each.op == RUN else kernels.skip
                function(packed, memory, schedule, packed.groups[each.group], each.first, each.count, images)

    def execute(self, images: torch.Tensor, logits: torch.Tensor | None, progress: Progress | None) -> None:
        """Every level for at most `batch` images; full batches that are counted replay graphs from the second one on,
        when every kernel has run and nothing is compiled in between.
        """
        from ..kernels import launch as kernels

        kernels.stem(self.packed, self.memory, images)
        full = logits is None and len(images) == self.batch
        for index, segment in enumerate(self.segments):
            if full and self.graphs:
                self.graphs[index].replay()
            else:
                self.launch(segment, len(images), logits)
            if progress:
                if self.packed.device.type == "cuda":
                    torch.cuda.synchronize(self.packed.device)
                progress(len(segment) / len(self.schedule.launches))
        if full and self.captures and not self.graphs:
            torch.cuda.synchronize(self.packed.device)
            self.graphs = [self._capture(segment) for segment in self.segments]

    def _capture(self, segment: tuple[Launch, ...]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.launch(segment, self.batch, None)
        return graph


class TritonExecutor(Executor):
    def __init__(self, network: FusedNetwork, plan: Plan, device: torch.device, dtype: torch.dtype) -> None:
        self.network, self.plan, self.device, self.dtype = network, plan, device, dtype
        self.size = network.input_shape[1:]
        self.prepared = _Prepared(network, plan, device, dtype, self.size)
        self.batch = self.prepared.batch

    def _for(self, images: torch.Tensor) -> _Prepared:
        """What is prepared for images of this size, which may change from call to call."""
        size = (images.shape[2], images.shape[3])
        if size != self.size:
            del self.prepared  # its memory first
            self.prepared, self.size = _Prepared(self.network, self.plan, self.device, self.dtype, size), size
        return self.prepared

    def _on_device(self) -> Any:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    @torch.inference_mode()
    def tally(self, images: torch.Tensor, labels: torch.Tensor, progress: Progress | None = None) -> Tally:
        prepared = self._for(images)
        memory, total = prepared.memory, Tally.zeros(self.plan.words)
        for start in range(0, len(images), prepared.batch):
            part = images[start : start + prepared.batch]
            memory.counts.zero_()
            memory.labels[: len(part)] = labels[start : start + prepared.batch].to(self.device)
            with self._on_device():
                prepared.execute(part, None, _scaled(progress, len(part) / len(images)))
            counts = memory.counts.cpu().numpy()
            total.add(Tally(*(np.ascontiguousarray(column) for column in counts.T)))
        return total

    @torch.inference_mode()
    def logits(self, images: torch.Tensor, progress: Progress | None = None) -> torch.Tensor:
        """Logits float32 [W, B, K] in every type: the head computes in float32."""
        prepared = self._for(images)
        parts = [torch.empty(self.plan.words, 0, self.network.classes)]
        for start in range(0, len(images), prepared.batch):
            part = images[start : start + prepared.batch]
            out = torch.empty(self.plan.words, len(part), self.network.classes, device=self.device)
            with self._on_device():
                prepared.execute(part, out, _scaled(progress, len(part) / len(images)))
            parts.append(out.cpu())
        return torch.cat(parts, dim=1)


def _scaled(progress: Progress | None, share: float) -> Progress | None:
    return None if progress is None else lambda done: progress(done * share)


class TritonEngine(Engine):
    name = "triton"
    unproven = "it has not run on a GPU yet, only on models of one; name it to use it"
    bitwise = True

    def missing(self) -> str | None:
        if find_spec("triton") is None:
            return "the package triton is not installed (pip install triton)"
        if not interpreting() and not torch.cuda.is_available():
            return "there is no GPU on this machine"
        return None

    def refuses(self, net: ResidualNetwork, device: torch.device, dtype: torch.dtype) -> str | None:
        if dtype not in DTYPES:
            return f"it computes in float32, bfloat16 and float16, not {dtype}"
        if device.type != "cuda" and not interpreting():
            return f"it runs on a GPU, and the device is {device}"
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            return f"it needs compute capability 8.0, and {torch.cuda.get_device_name(device)} has less"
        from ..lower import lower

        try:
            lower(net)
        except NotCovered as error:
            return str(error)
        return None

    def prepare(self, net: ResidualNetwork, plan: Plan, device: torch.device, dtype: torch.dtype) -> Executor:
        from ..lower import lower

        return TritonExecutor(lower(net), plan, device, dtype)
