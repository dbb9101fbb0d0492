"""The fused CPU engine: a whole plan on all images in one call of C++ (csrc/cpu), for x86-64 and any other processor.

RESENS_FAST_ISA chooses the instruction set (avx512bf16, avx512, avx2, portable); unset, the best this machine has.
bfloat16 means bf16 products with fp32 accumulation and fp32 activations. Threads: torch.get_num_threads().
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import extension
from ..plan import HEAD, RUN
from .base import Engine, Executor, GradientExecutor, Progress, Tally
from .ops import has_kernel
from .packed import Packed, packed

if TYPE_CHECKING:
    from ..fused import FusedNetwork
    from ..gradient_plan import GradientPlan
    from ..network import ResidualNetwork
    from ..plan import Plan

_DTYPES = (torch.float32, torch.bfloat16)
_POLL_SECONDS = 0.1
# A call is one part of a study: about this long, and no more images than this.
_CALL_SECONDS, _MOST_IMAGES, _TILE = 10.0, 512, 16
# Multiply-adds a second and thread, roughly: only the length of a call depends on it.
_RATE = 1.5e11


@functools.cache
def isas() -> tuple[str, ...]:
    """The instruction sets the engine has on this machine, best first; empty without the extension."""
    if extension.module() is None or not hasattr(torch.ops.resens_fast, "cpu_isas"):
        return ()
    return tuple(torch.ops.resens_fast.cpu_isas())


def chosen_isa() -> str:
    """RESENS_FAST_ISA, or the best instruction set of this machine."""
    return os.environ.get("RESENS_FAST_ISA") or next(iter(isas()), "")


def image_seconds(fused: FusedNetwork, tape: np.ndarray) -> float:
    """Roughly, what the RUN instructions of a tape take for one image on one thread."""
    costs = [sum(c.weight.numel() / c.stride**2 for c in b.convs) * b.shape_in[1] * b.shape_in[2] for b in fused.blocks]
    tape = tape.reshape(-1, 2)
    return float(np.asarray([*costs, 0.0])[tape[tape[:, 0] == RUN, 1]].sum()) / _RATE


def images_per_call(seconds: float) -> int:
    """How many images make a call of the length that suits a study, when one takes so long on one thread."""
    threads = torch.get_num_threads()
    images = int(_CALL_SECONDS * threads / max(seconds, 1e-9)) // (_TILE * threads) * _TILE * threads
    return min(max(images, _TILE), _MOST_IMAGES)


class Call:
    """One network's weights and one tape, ready for the op; `tile` images at a time (0: chosen)."""

    def __init__(
        self, weights: Packed, isa: str, rounded: bool, tape: np.ndarray, gates: np.ndarray, words: int
    ) -> None:
        assert weights.fused is not None
        self.layout, self.packed = weights.layout, weights.weights(isa, rounded)
        self.isa, self.rounded, self.words, self.classes = isa, rounded, words, weights.fused.classes
        self.tape = torch.from_numpy(np.ascontiguousarray(tape, dtype=np.int32).reshape(-1, 2))
        self.gates = torch.from_numpy(np.ascontiguousarray(gates, dtype=np.float32))
        self.tile = 0
        self.seconds = image_seconds(weights.fused, tape)

    def schedule(self, images: int, threads: int) -> tuple[int, int, int, list[float]]:
        """How so many images are cut: bytes of all threads together, images in a tile, tiles, and the multiply-adds
        per image of each part of the tape (every tile runs every part).
        """
        return torch.ops.resens_fast.cpu_schedule(  # type: ignore[no-any-return]
            self.layout, self.isa, self.rounded, self.tape, self.gates, self.words, images, threads, self.tile
        )

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor | None, control: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts int64 [3, W], and logits float32 [W, B, K] when there are no labels; the GIL is free meanwhile."""
        none = torch.empty(0, dtype=torch.int64, device="cpu")
        counts, logits = torch.ops.resens_fast.eval(
            images, none if labels is None else labels, self.layout, self.packed, [self.tape, self.gates], self.words,
            self.classes if labels is None else 0, torch.get_num_threads(), self.tile, self.isa, self.rounded, control,
        )  # fmt: skip
        return counts, logits


def interruptible(call: Callable[[], Any], control: torch.Tensor, progress: Progress | None) -> Any:
    """The result of `call`, made in a thread of its own, so that Ctrl-C and progress reach Python meanwhile."""
    result: list[Any] = []
    error: list[BaseException] = []
    # Not Thread.join: when Ctrl-C interrupts it, Python 3.11 takes the thread for ended while it still runs, and a
    # process that exits then aborts.
    done = threading.Event()

    def work() -> None:
        try:
            result.append(call())
        except BaseException as caught:
            error.append(caught)
        finally:
            done.set()

    thread = threading.Thread(target=work, name="resens_fast.eval")
    told = 0.0
    try:
        thread.start()
    except BaseException:
        control[0] = 1  # it may have started; nobody waits for what it has not begun
        raise
    try:
        while not done.wait(_POLL_SECONDS):
            if progress:
                share = int(control[1]) / max(1, int(control[2]))
                progress(share - told)
                told = share
    except BaseException:
        control[0] = 1
        done.wait()
        thread.join()
        raise
    if error:
        raise error[0]
    if progress:
        progress(1.0 - told)
    return result[0]


class CpuExecutor(Executor):
    def __init__(self, net: ResidualNetwork, plan: Plan, dtype: torch.dtype) -> None:
        tape = plan.tape()
        self.call = Call(packed(net), chosen_isa(), dtype == torch.bfloat16, tape.instructions, tape.gates, plan.words)
        self.batch = images_per_call(self.call.seconds)
        self.footprint = self.call.schedule(self.batch, torch.get_num_threads())[0]

    def _run(
        self, images: torch.Tensor, labels: torch.Tensor | None, progress: Progress | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        control = torch.zeros(3, dtype=torch.int64, device="cpu")
        images = images.detach().to("cpu", torch.float32).contiguous()
        if labels is not None:
            labels = labels.detach().to("cpu", torch.int64).contiguous()
        return interruptible(lambda: self.call(images, labels, control), control, progress)  # type: ignore[no-any-return]

    def tally(self, images: torch.Tensor, labels: torch.Tensor, progress: Progress | None = None) -> Tally:
        if len(images) == 0:
            return Tally.zeros(self.call.words)
        return Tally(*(np.array(row) for row in self._run(images, labels, progress)[0].numpy()))

    def logits(self, images: torch.Tensor, progress: Progress | None = None) -> torch.Tensor:
        return self._run(images, None, progress)[1]


class CpuEngine(Engine):
    name = "cpu"
    bitwise = True

    def missing(self) -> str | None:
        if extension.module() is None:
            return extension.reason()
        if not isas():
            return "resens_fast._C was built without csrc/cpu"
        if chosen_isa() not in isas():
            return f"RESENS_FAST_ISA is {chosen_isa()!r}, but this machine has {', '.join(isas())}"
        return None if has_kernel("cpu") else "resens_fast._C was built without csrc/cpu"

    def refuses(self, net: ResidualNetwork, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device}"
        if dtype not in _DTYPES:
            return f"it computes in float32 or bfloat16, not in {dtype}"
        return packed(net).reason

    def prepare(self, net: ResidualNetwork, plan: Plan, device: torch.device, dtype: torch.dtype) -> Executor:
        return CpuExecutor(net, plan, dtype)

    def refuses_gradients(
        self, net: ResidualNetwork, plan: GradientPlan, device: torch.device, dtype: torch.dtype, at: str
    ) -> str | None:
        if dtype == torch.bfloat16:
            return "its gradients are in float32 only, not in torch.bfloat16"
        if at != "first_block":
            return f"its gradients are those at first_block, not at {at}"
        return self.refuses(net, device, dtype)

    def prepare_gradients(
        self, net: ResidualNetwork, plan: GradientPlan, device: torch.device, dtype: torch.dtype, at: str
    ) -> GradientExecutor:
        from .cpu_gradients import CpuGradients

        return CpuGradients(net, plan)


class FastForward:
    """Runs intact forwards of a wrapped network on this engine; installed as `net.fast_forward`.

    Declines (None) for anything but a float32 batch of the wrapped size on the CPU, under autocast, with hooks on a
    module (they would not be called), and for networks that are not covered: then the model itself runs.
    """

    def __init__(self, net: ResidualNetwork) -> None:
        self.net = net
        self.state: Packed | None = None
        self.call: Call | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"net": self.net, "state": None, "call": None}  # a copy of the network packs its own weights

    def __call__(self, x: torch.Tensor) -> torch.Tensor | None:
        net = self.net
        if (
            x.device.type != "cpu"
            or x.dtype != torch.float32
            or tuple(x.shape[1:]) != tuple(net.input_shape)
            or len(x) == 0
        ):
            return None
        if (
            torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or type(x) not in (torch.Tensor, torch.nn.Parameter)
        ):
            return None
        if net.dtype != torch.float32 or net.device.type != "cpu" or CpuEngine().missing() is not None:
            return None
        state = packed(net)
        if state.reason is not None or not state.watch.plain():
            return None
        if state is not self.state:
            n = len(net.blocks)
            tape = np.array([*((RUN, i) for i in range(n)), (HEAD, 0)], dtype=np.int32)
            self.call = Call(state, chosen_isa(), False, tape, np.array([1.0] * n + [0.0], dtype=np.float32), 1)
            self.state = state
        assert self.call is not None
        call, control, images = self.call, torch.zeros(3, dtype=torch.int64, device="cpu"), x.contiguous()
        if self.call.seconds * len(x) < 0.5:  # too short to be worth interrupting
            return call(images, None, control)[1][0]
        return interruptible(lambda: call(images, None, control)[1], control, None)[0]  # type: ignore[no-any-return]
