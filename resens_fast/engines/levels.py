"""The plan's level schedule through ATen: all states that need the same block run as one batch.

For networks that do not fit on chip (bottlenecks, ImageNet sizes). Convolutions are cuDNN's, in channels_last. Works on
any device, so that it is tested on a CPU.
"""

from __future__ import annotations

from itertools import groupby
from math import prod
from typing import TYPE_CHECKING

import torch

from ..errors import EngineError, PlanError
from ..plan import HEAD, SHORTCUT
from .base import Executor, Progress, Tally, count, replica

if TYPE_CHECKING:
    from ..network import ResidualNetwork
    from ..plan import Levels, Plan

Step = tuple[int, int, int, int, int, float]


class LevelsExecutor(Executor):
    """`batch` images at a time; states of one block are joined to at most twice as many per convolution.

    By default a batch's largest state takes 64 MB. `memory` bytes may hold states. When the device runs out of memory
    after all, the images are taken in halves, down to one; then EngineError says what one image needs.
    """

    def __init__(
        self,
        net: ResidualNetwork,
        plan: Plan,
        device: torch.device,
        dtype: torch.dtype,
        batch: int | None = None,
        memory: int | None = None,
    ) -> None:
        self.net = replica(net, device, dtype, torch.channels_last)
        self.plan, self.device = plan, device
        structure = plan.structure
        largest = max(prod(shape) for shape in (*structure.shapes_in, *structure.shapes_out))
        self.bytes_per_image = largest * dtype.itemsize
        self.batch = min(1024, max(1, 2**26 // self.bytes_per_image)) if batch is None else batch
        self.joined = 2 * self.batch
        if memory is None:
            # A quarter: a batch's outputs are views of one storage, which lives as long as the last of them.
            memory = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 2**30
        self.memory = memory
        self._schedules: dict[int, Levels] = {}

    def _steps(self, images: int) -> list[Step]:
        """The schedule for that many images: as many buffers as memory holds, but never fewer than the plan needs."""
        budget = max(self.plan.least_budget, self.memory // max(1, images * self.bytes_per_image))
        budget = min(budget, 2 * self.plan.words + 2)  # more would never be used
        while True:
            try:
                if budget not in self._schedules:
                    self._schedules = {budget: self.plan.levels(budget)}
                levels = self._schedules[budget]
                return list(zip(*levels.steps.T.tolist(), levels.gates.tolist(), strict=True))
            except PlanError:
                if budget >= 2 * self.plan.words + 64:
                    raise
                budget = max(budget + 1, self.plan.least_budget)

    def _heads(self, images: torch.Tensor, progress: Progress | None, share: float) -> dict[int, torch.Tensor]:
        """Logits of every word for these images."""
        steps = self._steps(len(images))
        buffers: dict[int, torch.Tensor] = {0: self.net.stem(images)}
        heads: dict[int, torch.Tensor] = {}
        for (_, op, arg), grouped in groupby(steps, key=lambda step: (step[4], step[0], step[1])):
            group = list(grouped)
            if op == HEAD:
                for step in group:
                    heads[arg] = self.net.head(buffers[step[2]])
            else:
                self._run(op, arg, group, buffers)
            if progress:
                progress(share * len(group) / len(steps))
        return heads

    def _run(self, op: int, arg: int, group: list[Step], buffers: dict[int, torch.Tensor]) -> None:
        block = self.net.blocks[arg]
        if op == SHORTCUT:
            results = [block.skip(buffers[step[2]]) for step in group]
        else:
            results = []
            most = max(1, self.joined // len(buffers[group[0][2]]))
            for start in range(0, len(group), most):
                part = group[start : start + most]
                results += self._joined(block, part, [buffers[step[2]] for step in part])
        for step, result in zip(group, results, strict=True):
            buffers[step[3]] = result

    def _joined(self, block: object, part: list[Step], states: list[torch.Tensor]) -> list[torch.Tensor]:
        gates = [step[5] for step in part]
        run = block.run  # type: ignore[attr-defined]
        if len(part) == 1:
            return [run(states[0], gates[0])]
        rows = len(states[0])
        gate: float | torch.Tensor = gates[0]
        if any(g != gate for g in gates):
            gate = torch.tensor(gates, dtype=torch.float32, device=self.device).repeat_interleave(rows)[
                :, None, None, None
            ]
        return list(run(torch.cat(states), gate).split(rows))

    def _all(self, images: torch.Tensor, progress: Progress | None) -> list[tuple[int, dict[int, torch.Tensor]]]:
        """(number of images, logits per word) piece by piece; halves the pieces while memory runs out."""
        images = images.to(self.device, self.net.dtype, memory_format=torch.channels_last)
        pieces, start, size = [], 0, min(self.batch, max(1, len(images)))
        while start < len(images):
            piece = images[start : start + size]
            try:
                pieces.append((len(piece), self._heads(piece, progress, len(piece) / len(images))))
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise EngineError(
                        f"{self.device} has no memory for one image: {self.plan.least_budget} states of "
                        f"{self.bytes_per_image:,} bytes beside the network; use a smaller device dtype or the CPU"
                    ) from error
                size = max(1, size // 2)
                torch.cuda.empty_cache()
                continue
            start += len(piece)
        return pieces

    @torch.inference_mode()
    def tally(self, images: torch.Tensor, labels: torch.Tensor, progress: Progress | None = None) -> Tally:
        labels = labels.to(self.device)
        total, start = Tally.zeros(self.plan.words), 0
        for rows, heads in self._all(images, progress):
            here = labels[start : start + rows]
            total.add(Tally.gather(self.plan.words, {word: count(logits, here) for word, logits in heads.items()}))
            start += rows
        return total

    @torch.inference_mode()
    def logits(self, images: torch.Tensor, progress: Progress | None = None) -> torch.Tensor:
        pieces = [torch.stack([heads[w] for w in range(self.plan.words)]) for _, heads in self._all(images, progress)]
        return torch.cat(pieces, dim=1).cpu()
