"""The truth: every configuration on its own, block after block, in float64, nothing shared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from .base import Engine, Executor, Progress, Tally, count, replica

if TYPE_CHECKING:
    from ..network import ResidualNetwork
    from ..plan import Plan


class ReferenceExecutor(Executor):
    batch = 64

    def __init__(self, net: ResidualNetwork, plan: Plan, device: torch.device) -> None:
        self.net = replica(net, device, torch.float64, torch.contiguous_format)
        first = np.unique(plan.word_of, return_index=True)[1]
        self.configurations = [plan.sweep[int(c)] for c in first]

    @torch.no_grad()
    def tally(self, images: torch.Tensor, labels: torch.Tensor, progress: Progress | None = None) -> Tally:
        logits = self.logits(images, progress)
        return Tally.gather(len(logits), {word: count(row, labels.cpu()) for word, row in enumerate(logits)})

    @torch.no_grad()
    def logits(self, images: torch.Tensor, progress: Progress | None = None) -> torch.Tensor:
        images = images.to(self.net.device, torch.float64)
        rows = []
        for configuration in self.configurations:
            rows.append(self.net(images, configuration).cpu())
            if progress:
                progress(1 / len(self.configurations))
        return torch.stack(rows)


class ReferenceEngine(Engine):
    name = "reference"
    bitwise = False
    fused = False

    def refuses(self, net: ResidualNetwork, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if dtype == torch.float64 else f"it computes in float64 only, not {dtype}; leave dtype out"

    def prepare(self, net: ResidualNetwork, plan: Plan, device: torch.device, dtype: torch.dtype) -> Executor:
        return ReferenceExecutor(net, plan, device)
