"""The plan's levels in Triton: one launch advances every configuration that is alive, for all images.

It serves where the compiled CUDA engine is not: in an installation without nvcc, and on other cards. The kernels and
their launches are in `resens_fast.kernels`; here are the memory and the order.

Memory: half of what the card has free, most of it for state buffers. A buffer is the state of one configuration for one
batch of images. The more buffers, the more configurations a level holds and the fewer launches a sweep takes; the plan
says how many it needs at least.

Under Triton's interpreter (TRITON_INTERPRET=1 before triton is imported) the same kernels run on the CPU, thousands of times
slower: that is how they are tested on a machine without a GPU.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import EngineError, NotCovered
from .base import Engine, Executor, Progress, Tally

if TYPE_CHECKING:
    from ..kernels.pack import Packed
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


def interpreting() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


class TritonExecutor(Executor):
    def __init__(self, packed: Packed, plan: Plan, budget: int, graphs: bool) -> None:
        """`budget`: bytes for states and intermediate images; `graphs`: replay the launches of full batches."""
        from ..kernels import launch
        from ..kernels.schedule import schedule

        self.packed, self.words = packed, plan.words
        image = packed.state_elements * packed.dtype.itemsize
        least, most = _BATCH
        self.batch = min(most, max(least, 1 << (_BUFFER_BYTES // image).bit_length() >> 1))
        while self.batch > 1 and plan.least_budget * self.batch * image > budget:
            self.batch //= 2
        if plan.least_budget * image > budget:
            raise EngineError(
                f"the triton engine needs {plan.least_budget} states of {image:,} bytes for one image of this sweep, but "
                f"only {budget:,} bytes are free; use the torch engine or split the sweep"
            )
        buffers = min(_BUFFERS, budget // (self.batch * image))
        levels = plan.levels(buffers)
        self.schedule = schedule(packed, levels, self.batch, _SCRATCH_BYTES)
        if len(self.schedule.launches) > _MANY_LAUNCHES:
            self.schedule = schedule(packed, levels, self.batch, _WIDE_SCRATCH_BYTES)
        self.memory = launch.Memory.allocate(packed, self.schedule, self.batch, self.words)
        launches = self.schedule.launches
        self.segments = [launches[i : i + _SEGMENT] for i in range(0, len(launches), _SEGMENT)]
        self.graphs: list[torch.cuda.CUDAGraph] | None = None
        self.capture = graphs and len(self.schedule.launches) <= _MANY_LAUNCHES

    def _launch(self, launches: tuple[Launch, ...], images: int, logits: torch.Tensor | None) -> None:
        from ..kernels import launch as kernels
        from ..plan import HEAD, RUN

        packed, memory, schedule = self.packed, self.memory, self.schedule
        for each in launches:
            if each.op == HEAD:
                kernels.heads(packed, memory, schedule, each.first, each.count, images, logits)
            else:
                function = kernels.run if each.op == RUN else kernels.skip
                function(packed, memory, schedule, packed.groups[each.group], each.first, each.count, images)

    def _capture(self) -> list[torch.cuda.CUDAGraph]:
        """The launches of a full batch as graphs; every kernel has run before, so nothing is compiled in between."""
        graphs = []
        for segment in self.segments:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._launch(segment, self.batch, None)
            graphs.append(graph)
        return graphs

    def _execute(self, images: torch.Tensor, logits: torch.Tensor | None, progress: Progress | None) -> None:
        from ..kernels import launch as kernels

        kernels.stem(self.packed, self.memory, images)
        full = logits is None and len(images) == self.batch
        graphs = self.graphs if full else None
        for index, segment in enumerate(self.segments):
            if graphs is not None:
                graphs[index].replay()
            else:
                self._launch(segment, len(images), logits)
            if progress:
                if self.packed.device.type == "cuda":
                    torch.cuda.synchronize(self.packed.device)
                progress(len(segment) / len(self.schedule.launches))
        if full and self.capture and self.graphs is None:
            torch.cuda.synchronize(self.packed.device)
            self.graphs = self._capture()

    @torch.inference_mode()
    def tally(self, images: torch.Tensor, labels: torch.Tensor, progress: Progress | None = None) -> Tally:
        total = Tally.zeros(self.words)
        for start in range(0, len(images), self.batch):
            part = images[start : start + self.batch]
            share = len(part) / len(images)
            self.memory.counts.zero_()
            self.memory.labels[: len(part)] = labels[start : start + self.batch].to(self.packed.device)
            with torch.cuda.device(self.packed.device if self.packed.device.type == "cuda" else -1):
                self._execute(part, None, (lambda done: progress(done * share)) if progress else None)  # noqa: B023
            counts = self.memory.counts.cpu().numpy()
            total.add(Tally(*(np.ascontiguousarray(column) for column in counts.T)))
        return total

    @torch.inference_mode()
    def logits(self, images: torch.Tensor, progress: Progress | None = None) -> torch.Tensor:
        device, classes = self.packed.device, self.packed.head.classes
        parts = []
        for start in range(0, len(images), self.batch):
            part = images[start : start + self.batch]
            share = len(part) / len(images)
            out = torch.empty(self.words, len(part), classes, device=device)
            with torch.cuda.device(device if device.type == "cuda" else -1):
                self._execute(part, out, (lambda done: progress(done * share)) if progress else None)  # noqa: B023
            parts.append(out.cpu())
        return torch.cat(parts, dim=1)


class TritonEngine(Engine):
    name = "triton"
    bitwise = True

    def missing(self) -> str | None:
        if find_spec("triton") is None:
            return "the package triton is not installed; pip install triton"
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
        from ..kernels.pack import pack
        from ..lower import lower

        packed = pack(lower(net), device, dtype)
        if device.type == "cuda":
            budget = torch.cuda.mem_get_info(device)[0] // 2
        else:
            budget = 2**28
        return TritonExecutor(packed, plan, budget, graphs=device.type == "cuda" and not interpreting())
