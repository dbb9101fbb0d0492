"""The peers of path gradients: norms of the gradient at the first block's input, float64 [P, B], for the paths of a sweep.

autograd  the loop a careful researcher writes: one stored forward, cut at the blocks, nothing that needs gradients but
          the states; for every path a vector-Jacobian product of each chosen branch and each shortcut that has one
planned   the torch engine of this package: paths share suffixes, the transposes are torch's
ours      the cpu engine
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import resens_fast as rf
from benchmarks.peers import _twin
from resens_fast.gradient_plan import gradient_plan

Run = Callable[[Tensor, Tensor], Tensor]


class Autograd:
    """The stored forward of one batch; `paths` goes backward along each configuration of a sweep by itself."""

    def __init__(self, net: rf.ResidualNetwork, form: torch.memory_format) -> None:
        self.net = _twin(net, torch.float32).requires_grad_(False)
        self.net.to(memory_format=form)  # type: ignore[call-overload]
        self.form = form

    def forward(self, images: Tensor, labels: Tensor) -> None:
        state = self.net.stem(images.to(memory_format=self.form)).requires_grad_()
        self.blocks: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
        for block in self.net.blocks:
            prologue = block.prologue(state)
            branch, shortcut = block.branch(prologue), block.shortcut(prologue)
            total = (branch.detach() + shortcut.detach()).requires_grad_()
            after = block.closing(total)
            self.blocks.append((state, branch, shortcut, total, after))
            state = after.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(self.net.head(state), labels, reduction="sum")
        (self.start,) = torch.autograd.grad(loss, state)

    def paths(self, sweep: Sequence[rf.Configuration]) -> Tensor:
        rows = []
        for path in sweep:
            g = self.start
            for (state, branch, shortcut, total, after), gate in zip(reversed(self.blocks), path.gates[::-1], strict=True):
                if after is not total:
                    (g,) = torch.autograd.grad(after, total, g, retain_graph=True)
                if gate != 0:
                    (g,) = torch.autograd.grad(branch, state, g, retain_graph=True)
                elif shortcut is not state:
                    (g,) = torch.autograd.grad(shortcut, state, g, retain_graph=True)
            rows.append(g.flatten(1).double().norm(dim=1))
        return torch.stack(rows)


def engine(name: str, net: rf.ResidualNetwork, sweep: rf.Sweep) -> Run:
    """The norms by an engine of this package."""
    plan = gradient_plan(net, sweep)
    executor = rf.engines.get(name).prepare_gradients(net, plan, torch.device("cpu"), torch.float32, "first_block")
    word_of = torch.from_numpy(plan.word_of)
    return lambda x, y: executor.norms(x, y)[word_of]
