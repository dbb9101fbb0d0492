"""The truth: every configuration and every path on its own, block after block, in float64, nothing shared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from .base import Engine, Executor, GradientExecutor, Progress, Tally, count, cross_entropy, replica

if TYPE_CHECKING:
    from ..blocks import Block
    from ..gradient_plan import GradientPlan
    from ..network import ResidualNetwork
    from ..plan import Plan
    from ..sweep import Configuration


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


class ReferenceGradients(GradientExecutor):
    batch = 64

    def __init__(self, net: ResidualNetwork, plan: GradientPlan, device: torch.device, at: str) -> None:
        self.net, self.at = replica(net, device, torch.float64, torch.contiguous_format), at
        first = np.unique(plan.word_of, return_index=True)[1]
        self.paths = [plan.sweep[int(c)] for c in first]

    def norms(self, images: torch.Tensor, labels: torch.Tensor, progress: Progress | None = None) -> torch.Tensor:
        if self.at == "parameters":
            return self._parameter_norms(images, labels, progress)
        return self.gradients(images, labels, progress).flatten(2).norm(dim=2)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def gradients(self, images: torch.Tensor, labels: torch.Tensor, progress: Progress | None = None) -> torch.Tensor:
        images, labels = images.detach().to(self.net.device, torch.float64).clone(), labels.to(self.net.device).clone()
        rows = []
        for path in self.paths:
            images.requires_grad_()
            start = self.net.stem(images)
            if self.at == "first_block":
                start = start.detach().requires_grad_()
            loss = self._loss(start, labels, path)
            rows.append(torch.autograd.grad(loss, images if self.at == "image" else start)[0].cpu())
            if progress:
                progress(1 / len(self.paths))
        return torch.stack(rows)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _parameter_norms(self, images: torch.Tensor, labels: torch.Tensor, progress: Progress | None) -> torch.Tensor:
        self.net.requires_grad_(True)
        images, labels = images.detach().to(self.net.device, torch.float64).clone(), labels.to(self.net.device).clone()
        norms = torch.zeros(len(self.paths), len(images), len(self.net.blocks), dtype=torch.float64, device="cpu")
        for word, path in enumerate(self.paths):
            for i in range(len(images)):
                loss = self._loss(self.net.stem(images[i : i + 1]), labels[i : i + 1], path)
                for j, block in enumerate(self.net.blocks):
                    parameters = block.parameters()
                    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
                    norms[word, i, j] = sum(float((g * g).sum()) for g in found if g is not None) ** 0.5
            if progress:
                progress(1 / len(self.paths))
        return norms

    def _loss(self, state: torch.Tensor, labels: torch.Tensor, path: Configuration) -> torch.Tensor:
        """The intact network's loss, summed over the images, whose gradient flows along one path only."""
        for j in path.order:
            state = _along(self.net.blocks[j], path.gates[j], state)
        return cross_entropy(self.net.head(state), labels).sum()


def _along(block: Block, gate: float, x: torch.Tensor) -> torch.Tensor:
    """The intact block's output, through which the gradient flows by the branch (times the gate) or the shortcut."""
    p = block.prologue(x)
    branch = block.branch(p)
    if not block.gateable:
        return block.closing(branch)
    shortcut = block.shortcut(p)
    chosen = shortcut if gate == 0 else gate * branch
    return block.closing((shortcut + branch).detach() + (chosen - chosen.detach()))


class ReferenceEngine(Engine):
    name = "reference"
    bitwise = False
    fused = False

    def refuses(self, net: ResidualNetwork, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if dtype == torch.float64 else f"it computes in float64 only, not {dtype}; leave dtype out"

    def prepare(self, net: ResidualNetwork, plan: Plan, device: torch.device, dtype: torch.dtype) -> Executor:
        return ReferenceExecutor(net, plan, device)

    def refuses_gradients(
        self, net: ResidualNetwork, plan: GradientPlan, device: torch.device, dtype: torch.dtype, at: str
    ) -> str | None:
        return self.refuses(net, device, dtype)

    def prepare_gradients(
        self, net: ResidualNetwork, plan: GradientPlan, device: torch.device, dtype: torch.dtype, at: str
    ) -> GradientExecutor:
        return ReferenceGradients(net, plan, device, at)
