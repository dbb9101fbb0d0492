"""What the forward and the gradients of the Triton engine share: how much fits on the card, and replayed launches.

Memory: half of what the card has free, most of it for state buffers. A buffer is the state of one configuration (or the
gradient of one path) for one batch of images. The more buffers, the more configurations a level holds and the fewer
launches a sweep takes; the plan says how many it needs at least.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ..errors import EngineError, first_line
from .base import Progress

if TYPE_CHECKING:
    from ..fused import FusedNetwork
    from ..plan import Plan

# A batch fills about this much of a buffer: enough pixels that one step occupies the card at the last stage too.
BUFFER_BYTES = 2**23
BATCH = (16, 256)
# The intermediate images of a launch: small enough to stay in the L2 cache of an H100, unless the levels are so wide
# that the launches would be too many.
SCRATCH_BYTES, WIDE_SCRATCH_BYTES, MANY_LAUNCHES = 2**24, 2**28, 4000
BUFFERS = 4096
# Launches between two progress reports, which is also what a CUDA graph holds: well below a second.
SEGMENT = 256
INTERPRETER_BYTES = 2**28


def unusable() -> str | None:
    """Why Triton cannot be used in this installation, or None."""
    try:
        interpreting()
    except Exception as error:  # whatever a broken package does when it is imported
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            return "the package triton is not installed (pip install triton)"
        return f"the package triton cannot be used ({first_line(error)}); install another version (pip install triton)"
    return None


def interpreting() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def on_device(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def scaled(progress: Progress | None, share: float) -> Progress | None:
    return None if progress is None else lambda done: progress(done * share)


class Replay:
    """A plan's launches for images of one size, in pieces: issued one by one, or replayed as CUDA graphs.

    `extra` says how many bytes an image needs besides its states.
    """

    pieces: list[tuple[float, Callable[[int], None]]]
    """What to launch for so many images, one piece after the other, and which share of the work each one is."""

    def __init__(
        self,
        network: FusedNetwork,
        plan: Plan,
        device: torch.device,
        dtype: torch.dtype,
        size: tuple[int, int],
        extra: Callable[[Any], int] = lambda packed: 0,
    ) -> None:
        from ..kernels.pack import NUMBERED, pack
        from ..kernels.schedule import schedule

        self.packed = packed = pack(network, device, dtype, size)
        budget = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else INTERPRETER_BYTES
        image, beside = packed.state_elements * dtype.itemsize, extra(packed)
        needs = max(2, plan.least_budget) * image + beside
        least, most = BATCH
        wanted = max(least, 1 << (BUFFER_BYTES // image).bit_length() >> 1)
        self.batch = min(most, wanted, NUMBERED // packed.image_elements)
        while self.batch > 1 and self.batch * needs > budget:
            self.batch //= 2
        if self.batch * needs > budget:
            raise EngineError(
                f"the triton engine needs {plan.least_budget} states of {image:,} bytes for one image of this sweep"
                + (f", and {beside:,} bytes of sign bits" if beside else "")
                + f", but only {budget:,} bytes are free; use the torch engine or split the sweep"
            )
        levels = plan.levels(min(BUFFERS, (budget - self.batch * beside) // (self.batch * image)))
        self.schedule = schedule(packed, levels, self.batch, SCRATCH_BYTES)
        if len(self.schedule.launches) > MANY_LAUNCHES:
            self.schedule = schedule(packed, levels, self.batch, WIDE_SCRATCH_BYTES)
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.captures = device.type == "cuda" and not interpreting() and len(self.schedule.launches) <= MANY_LAUNCHES

    def issue(self, images: int, progress: Progress | None, capture: bool) -> None:
        """Every piece for so many images. With `capture` full batches replay graphs from the second one on, when every
        kernel has run and nothing is compiled in between.
        """
        full = capture and images == self.batch
        for index, (share, piece) in enumerate(self.pieces):
            if full and self.graphs:
                self.graphs[index].replay()
            else:
                piece(images)
            if progress:
                if self.packed.device.type == "cuda":
                    torch.cuda.synchronize(self.packed.device)
                progress(share)
        if full and self.captures and not self.graphs:
            torch.cuda.synchronize(self.packed.device)
            self.graphs = [self._capture(piece) for _, piece in self.pieces]

    def _capture(self, piece: Callable[[int], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            piece(self.batch)
        return graph
