"""The plan's levels in Triton: a launch advances the configurations of a level that wait for equal blocks, for all
images.

It serves where the compiled CUDA engine is not: in an installation without nvcc, and on other cards. The kernels and
their launches are in `resens_fast.kernels`, the memory in triton_memory.py, the way back in triton_gradients.py.

Under Triton's interpreter (TRITON_INTERPRET=1 before triton is imported) the same kernels run on the CPU, thousands of
times slower: that is how they are tested on a machine without a GPU.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import NotCovered
from ..plan import HEAD, RUN
from .base import Engine, Executor, GradientExecutor, Progress, Tally
from .triton_memory import SEGMENT, Replay, interpreting, on_device, scaled, unusable

if TYPE_CHECKING:
    from ..fused import FusedNetwork
    from ..gradient_plan import GradientPlan
    from ..kernels.schedule import Launch
    from ..network import ResidualNetwork
    from ..plan import Plan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Prepared(Replay):
    """Parameters, memory and launches for images of one size."""

    def __init__(
        self, network: FusedNetwork, plan: Plan, device: torch.device, dtype: torch.dtype, size: tuple[int, int]
    ) -> None:
        from ..kernels import launch

        super().__init__(network, plan, device, dtype, size)
        self.memory = launch.Memory.allocate(self.packed, self.schedule, self.batch, plan.words)
        self.logits: torch.Tensor | None = None
        launches = self.schedule.launches
        segments = [launches[i : i + SEGMENT] for i in range(0, len(launches), SEGMENT)]
        self.pieces = [(len(each) / len(launches), partial(self.launch, each)) for each in segments]

    def launch(self, launches: tuple[Launch, ...], images: int) -> None:
        from ..kernels import launch as kernels

        packed, memory, schedule = self.packed, self.memory, self.schedule
        for each in launches:
            if each.op == HEAD:
                kernels.heads(packed, memory, schedule, each.first, each.count, images, self.logits)
            else:
                function = kernels.run if each.op == RUN else kernels.skip
                function(packed, memory, schedule, packed.groups[each.group], each.first, each.count, images)

    def execute(self, images: torch.Tensor, logits: torch.Tensor | None, progress: Progress | None) -> None:
        """Every level for at most `batch` images, counted, or into logits float32 [W, B, K]."""
        from ..kernels import launch as kernels

        kernels.stem(self.packed, self.memory, images)
        self.logits = logits
        self.issue(len(images), progress, capture=logits is None)


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

    @torch.inference_mode()
    def tally(self, images: torch.Tensor, labels: torch.Tensor, progress: Progress | None = None) -> Tally:
        prepared = self._for(images)
        memory, total = prepared.memory, Tally.zeros(self.plan.words)
        for start in range(0, len(images), prepared.batch):
            part = images[start : start + prepared.batch]
            memory.counts.zero_()
            memory.labels[: len(part)] = labels[start : start + prepared.batch].to(self.device)
            with on_device(self.device):
                prepared.execute(part, None, scaled(progress, len(part) / len(images)))
            counts = memory.counts.cpu().numpy()
            total.add(Tally(*(np.ascontiguousarray(column) for column in counts.T)))
        return total

    @torch.inference_mode()
    def logits(self, images: torch.Tensor, progress: Progress | None = None) -> torch.Tensor:
        """Logits float32 [W, B, K] in every type: the head computes in float32."""
        prepared = self._for(images)
        parts = [torch.empty(self.plan.words, 0, self.network.classes, device="cpu", dtype=torch.float32)]
        for start in range(0, len(images), prepared.batch):
            part = images[start : start + prepared.batch]
            shape = self.plan.words, len(part), self.network.classes
            out = torch.empty(shape, device=self.device, dtype=torch.float32)
            with on_device(self.device):
                prepared.execute(part, out, scaled(progress, len(part) / len(images)))
            parts.append(out.cpu())
        return torch.cat(parts, dim=1)


class TritonEngine(Engine):
    name = "triton"
    unproven = "it has not run on a GPU yet, only on models of one; name it to use it"
    bitwise = True

    def missing(self) -> str | None:
        if reason := unusable():
            return reason
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

    def refuses_gradients(
        self, net: ResidualNetwork, plan: GradientPlan, device: torch.device, dtype: torch.dtype, at: str
    ) -> str | None:
        from ..lower import lower
        from .triton_gradients import refusal

        return self.refuses(net, device, dtype) or refusal(lower(net), at)

    def prepare_gradients(
        self, net: ResidualNetwork, plan: GradientPlan, device: torch.device, dtype: torch.dtype, at: str
    ) -> GradientExecutor:
        from ..lower import lower
        from .triton_gradients import TritonGradientExecutor

        return TritonGradientExecutor(lower(net), plan, device, dtype)
