"""Gradients along paths in Triton: the intact forward once for a batch, then all paths, level by level from the loss.

The forward leaves the sign bits of every ReLU (kernels/signs.py); the levels of the gradient plan then bring the loss's
gradient back to the first block, for every path that is alive in one launch (kernels/transpose.py). Many levels are
many launches: two or three for each level and group of equal blocks, captured in CUDA graphs like the forward's.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from ..errors import EngineError
from ..plan import HEAD, RUN
from .base import GradientExecutor, Progress
from .triton_memory import SEGMENT, Replay, on_device, scaled

if TYPE_CHECKING:
    from ..fused import FusedNetwork
    from ..gradient_plan import GradientPlan
    from ..kernels.schedule import Launch


def refusal(network: FusedNetwork, at: str) -> str | None:
    """Why there are no gradients of this network at that place, or None."""
    if at != "first_block":
        return f"it has gradients at the input of the first block only, not at {at}"
    for block in network.blocks:
        if block.closing_relu != network.blocks[0].closing_relu:
            first = network.blocks[0]
            return (
                f"of blocks {first.index} ({first.name}) and {block.index} ({block.name}) only one closes with a ReLU, "
                "and its backward needs all or none to"
            )
    return None


class _Prepared(Replay):
    """Parameters, memory and launches for images of one size."""

    def __init__(
        self, network: FusedNetwork, plan: GradientPlan, device: torch.device, dtype: torch.dtype, size: tuple[int, int]
    ) -> None:
        from ..kernels import backward, launch

        super().__init__(network, plan, device, dtype, size, backward.bits_per_image)
        self.trail = backward.Trail.allocate(self.packed, plan.order, self.batch, self.schedule.buffers)
        self.schedule, self.marks = backward.marked(self.schedule, dtype)
        needed = backward.with_forward(self.schedule, self.trail)
        self.memory = launch.Memory.allocate(self.packed, needed, self.batch, 0)
        squares = torch.empty(plan.words * self.batch, device=device, dtype=torch.float64)
        self.found = squares, torch.empty_like(squares, dtype=torch.int32)
        first = self.packed.groups[self.packed.slot_of[plan.order[0]][0]].shape
        self.shape = first.shape_in
        self.gradients: torch.Tensor | None = None
        launches = self.schedule.launches
        # The forward runs about as many convolutions as one path.
        share = 1 / (1 + len(launches))
        self.pieces = [(share, self.forward)]
        for i in range(0, len(launches), SEGMENT):
            each = launches[i : i + SEGMENT]
            self.pieces.append((len(each) * share, partial(self.launch, each)))

    def forward(self, images: int) -> None:
        from ..kernels import backward

        backward.forward(self.packed, self.memory, self.trail, images)

    def launch(self, launches: tuple[Launch, ...], images: int) -> None:
        from ..kernels import backward
        from ..kernels.pack import width

        channels, height, columns = self.shape
        stored = width(channels)
        for each in launches:
            if each.op != HEAD:
                function = backward.run if each.op == RUN else backward.skip
                function(self.packed, self.memory, self.schedule, self.trail, each, images)
                backward.scale(self.packed, self.memory, self.schedule, self.trail, self.marks, each, images)
            elif self.gradients is None:
                elements = stored * height * columns
                backward.norms(self.memory, self.schedule, self.trail, self.found, each, images, elements)
            else:
                for source, _, word in self.schedule.steps[each.first : each.first + each.count].tolist():
                    state = self.memory.states[source, : images * stored * height * columns]
                    state = state.view(images, height, columns, stored)[..., :channels]
                    power = torch.exp2(self.trail.exponents[source, :images].double())
                    self.gradients[word] = state.permute(0, 3, 1, 2).double() * power.view(-1, 1, 1, 1)

    def execute(
        self, images: torch.Tensor, labels: torch.Tensor, out: torch.Tensor | None, progress: Progress | None
    ) -> None:
        """Every level for at most `batch` images: norms into `found`, or gradients into out [W, B, C, H, W]."""
        from ..kernels import launch as kernels

        if tuple(images.shape[1:]) != self.packed.input_shape:
            raise EngineError(
                f"these paths were prepared for images {self.packed.input_shape}, not {tuple(images.shape[1:])}; wrap "
                "the network with such an example"
            )
        self.memory.labels[: len(images)] = labels.to(self.memory.labels.device)
        kernels.stem(self.packed, self.memory, images)
        self.gradients = out
        self.issue(len(images), progress, capture=out is None)


class TritonGradientExecutor(GradientExecutor):
    def __init__(self, network: FusedNetwork, plan: GradientPlan, device: torch.device, dtype: torch.dtype) -> None:
        self.plan, self.device = plan, device
        self.prepared = _Prepared(network, plan, device, dtype, network.input_shape[1:])
        self.batch = self.prepared.batch

    @torch.inference_mode()
    def norms(self, images: torch.Tensor, labels: torch.Tensor, progress: Progress | None = None) -> torch.Tensor:
        parts = [torch.empty(self.plan.words, 0, dtype=torch.float64, device="cpu")]
        for start in range(0, len(images), self.batch):
            part = images[start : start + self.batch]
            with on_device(self.device):
                share = scaled(progress, len(part) / len(images))
                self.prepared.execute(part, labels[start : start + self.batch], None, share)
            squares, powers = (
                v[: self.plan.words * len(part)].view(self.plan.words, len(part)) for v in self.prepared.found
            )
            parts.append((squares.sqrt() * torch.exp2(powers.double())).cpu())
        return torch.cat(parts, dim=1)

    @torch.inference_mode()
    def gradients(self, images: torch.Tensor, labels: torch.Tensor, progress: Progress | None = None) -> torch.Tensor:
        """Gradients float32 [W, B, C, H, W] in every type: they are smaller than some can hold."""
        shape = self.prepared.shape
        found = torch.empty(self.plan.words, len(images), *shape, device="cpu", dtype=torch.float32)
        for start in range(0, len(images), self.batch):
            part = images[start : start + self.batch]
            out = torch.empty(self.plan.words, len(part), *shape, device=self.device, dtype=torch.float32)
            with on_device(self.device):
                share = scaled(progress, len(part) / len(images))
                self.prepared.execute(part, labels[start : start + self.batch], out, share)
            found[:, start : start + self.batch] = out.cpu()
        return found
