"""Path gradients on the CPU engine: the intact forward and the tape of all paths in one call of C++ (csrc/cpu).

float32, at the input of the first block, in any order of the blocks. The forward leaves only the signs of its ReLUs
behind; a state is normalised by a power of two per image, so that long paths do not leave float32's range.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .base import GradientExecutor, Progress
from .cpu import chosen_isa, image_seconds, images_per_call, interruptible
from .ops import refuse_backward
from .packed import packed

if TYPE_CHECKING:
    from ..gradient_plan import GradientPlan
    from ..network import ResidualNetwork


@functools.cache
def _register() -> None:
    refuse_backward("path_gradients")

    @torch.library.register_fake("resens_fast::path_gradients")
    def _(
        images: torch.Tensor,
        labels: torch.Tensor,
        layout: torch.Tensor,
        packed: torch.Tensor,
        transposed: torch.Tensor,
        isa: str,
        order: torch.Tensor,
        tape: torch.Tensor,
        gates: torch.Tensor,
        words: int,
        threads: int,
        tile: int,
        shape: Sequence[int],
        control: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        norms = torch.empty(words, images.shape[0], dtype=torch.float64, device="cpu")
        return norms, torch.empty((words, images.shape[0], *shape) if shape else (0,), device="cpu")


class CpuGradients(GradientExecutor):
    """``tile`` images at a time (0: chosen)."""

    def __init__(self, net: ResidualNetwork, plan: GradientPlan) -> None:
        _register()
        weights = packed(net)
        assert weights.fused is not None
        tape = plan.tape()
        self.isa = chosen_isa()
        self.layout, self.packed, self.transposed = (
            weights.layout, weights.weights(self.isa, False), weights.transposed(self.isa),
        )  # fmt: skip
        self.order = torch.tensor(plan.order, dtype=torch.int64, device="cpu")
        self.tape, self.gates = torch.from_numpy(tape.instructions).reshape(-1, 2), torch.from_numpy(tape.gates)
        self.words, self.tile = plan.words, 0
        self.shape = plan.structure.shapes_in[plan.order[0]] if plan.order else ()
        self.batch = images_per_call(image_seconds(weights.fused, tape.instructions))

    def norms(self, images: torch.Tensor, labels: torch.Tensor, progress: Progress | None = None) -> torch.Tensor:
        return self._run(images, labels, (), progress)[0]

    def gradients(self, images: torch.Tensor, labels: torch.Tensor, progress: Progress | None = None) -> torch.Tensor:
        return self._run(images, labels, self.shape, progress)[1]

    def _run(
        self, images: torch.Tensor, labels: torch.Tensor, shape: Sequence[int], progress: Progress | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        control = torch.zeros(3, dtype=torch.int64, device="cpu")
        arguments = self.arguments(images, labels, shape, control)
        return interruptible(  # type: ignore[no-any-return]
            lambda: torch.ops.resens_fast.path_gradients(*arguments), control, progress
        )

    def arguments(
        self, images: torch.Tensor, labels: torch.Tensor, shape: Sequence[int], control: torch.Tensor
    ) -> tuple[object, ...]:
        """Those of resens_fast::path_gradients; `shape`: [C, H, W] when the gradients themselves are wanted."""
        return (
            images.detach().to("cpu", torch.float32).contiguous(), labels.detach().to("cpu", torch.int64).contiguous(),
            self.layout, self.packed, self.transposed, self.isa, self.order, self.tape, self.gates, self.words,
            torch.get_num_threads(), self.tile, list(shape), control,
        )  # fmt: skip
