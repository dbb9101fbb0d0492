"""Any block on any device: the plan's tape, executed on batches with the blocks' own sub-graphs.

A deleted block costs nothing, a shared prefix is computed once, and memory is the batch's state times the plan's
slots, however many configurations there are. SAVE and RESTORE copy nothing: no block ever writes into the state it is
given, so a slot is a reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ..plan import HEAD, RESTORE, RUN, SAVE, SHORTCUT
from .base import Engine, Executor, GradientExecutor, Progress, Tally, count, replica
from .torch_gradients import TorchGradients, shared_parameter

if TYPE_CHECKING:
    from ..gradient_plan import GradientPlan
    from ..network import ResidualNetwork
    from ..plan import Plan

# Chosen, not tuned: larger batches leave the caches of a CPU, smaller ones do not fill a GPU.
_BATCH = {"cpu": 64, "cuda": 512}
# A part of a study is at least one batch: long sweeps take smaller ones, so that a stop loses minutes and not hours.
_LONG, _SHORT_BATCH = 500, 16


class TorchExecutor(Executor):
    def __init__(self, net: ResidualNetwork, plan: Plan, device: torch.device, dtype: torch.dtype) -> None:
        self.net = replica(net, device, dtype, torch.channels_last)
        self.words = plan.words
        tape = plan.tape()
        self.tape = list(zip(*tape.instructions.T.tolist(), tape.gates.tolist(), strict=True))
        work = plan.executed_runs / max(1, len(net.blocks))
        self.batch = _BATCH.get(device.type, 256) if device.type != "cpu" or work <= _LONG else _SHORT_BATCH

    def _heads(self, images: torch.Tensor, progress: Progress | None) -> Iterator[tuple[int, torch.Tensor]]:
        images = images.to(self.net.device, self.net.dtype, memory_format=torch.channels_last)
        blocks, slots = self.net.blocks, {}
        state, unreported = self.net.stem(images), 0
        for op, arg, gate in self.tape:
            if op == RUN:
                state = blocks[arg].run(state, gate)
            elif op == SHORTCUT:
                state = blocks[arg].skip(state)
            elif op == SAVE:
                slots[arg] = state
            elif op == RESTORE:
                state = slots[arg]
            elif op == HEAD:
                yield arg, self.net.head(state)
            unreported += 1
            if progress and (op == HEAD or unreported == 64):
                progress(unreported / len(self.tape))
                unreported = 0
        if progress and unreported:
            progress(unreported / len(self.tape))

    @torch.inference_mode()
    def tally(self, images: torch.Tensor, labels: torch.Tensor, progress: Progress | None = None) -> Tally:
        labels = labels.to(self.net.device)
        return Tally.gather(self.words, {word: count(logits, labels) for word, logits in self._heads(images, progress)})

    @torch.inference_mode()
    def logits(self, images: torch.Tensor, progress: Progress | None = None) -> torch.Tensor:
        rows = dict(self._heads(images, progress))
        return torch.stack([rows[word] for word in range(self.words)]).cpu()


class TorchEngine(Engine):
    name = "torch"
    bitwise = False
    fused = False

    def refuses(self, net: ResidualNetwork, device: torch.device, dtype: torch.dtype) -> str | None:
        usable = dtype.is_floating_point and dtype.itemsize > 1  # convolutions have no eight-bit floats
        return None if usable else f"the dtype must be a floating-point one of 16 bits or more, not {dtype}"

    def prepare(self, net: ResidualNetwork, plan: Plan, device: torch.device, dtype: torch.dtype) -> Executor:
        return TorchExecutor(net, plan, device, dtype)

    def refuses_gradients(
        self, net: ResidualNetwork, plan: GradientPlan, device: torch.device, dtype: torch.dtype, at: str
    ) -> str | None:
        return self.refuses(net, device, dtype) or (shared_parameter(net) if at == "parameters" else None)

    def prepare_gradients(
        self, net: ResidualNetwork, plan: GradientPlan, device: torch.device, dtype: torch.dtype, at: str
    ) -> GradientExecutor:
        return TorchGradients(net, plan, device, dtype, at)
