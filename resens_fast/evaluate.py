"""network → sweep → plan → engine → study: the one call that evaluates a sweep on images."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import engines
from .engines import Engine, Executor, Tally
from .engines.several import Devices, SeveralExecutor
from .images import ImageHash, ImageReader, check_images, tensor
from .jobs import Bar, Job, device_name, run
from .plan import Plan, plan
from .study import Part, Study

if TYPE_CHECKING:
    from .network import ResidualNetwork
    from .sweep import Sweep

# A part is closed after this many seconds or images: what a killed process loses, against the number of files.
_PART_SECONDS, _PART_IMAGES = 20.0, 1024


def evaluate(
    net: ResidualNetwork,
    sweep: Sweep,
    data: Any,
    engine: str = "auto",
    dtype: torch.dtype | None = None,
    device: Devices | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> Study:
    """Error and loss of every configuration of ``sweep`` on ``data``, in eval mode (Veit et al. 2016, section 4).

    data: a DataLoader, a Dataset or ``(images [N, C, H, W] float, labels [N] int)``. engine: ``auto`` (the fastest
    that covers the whole job) or a name. dtype, device: follow the network when None (the reference engine: float64);
    several devices, ``["cuda:0", "cuda:1"]`` or ``"cuda:0,cuda:1"``, share the images of every batch.
    out: a folder; the same call resumes it after Ctrl-C or a kill, without repeating finished parts. progress: a bar
    on standard error when it takes longer than two seconds.

    Raises SweepError for a sweep of another network, DataError for images or labels that do not fit, EngineError when
    a named engine does not cover the job, StudyError when ``out`` holds another study or other images than before.
    Ctrl-C keeps what is finished and raises.
    """
    return run(_Evaluation(net, sweep, engine, dtype, device), data, out, progress)


def logits(
    net: ResidualNetwork,
    sweep: Sweep,
    images: torch.Tensor,
    engine: str = "auto",
    dtype: torch.dtype | None = None,
    device: Devices | None = None,
    progress: bool = True,
) -> torch.Tensor:
    """Logits [C, B, classes] of every configuration on images [B, C, H, W], on the CPU, in the engine's precision.

    They carry no gradient; `net(images, configuration)` and `net(images, mask=...)` do. Memory is C × B × classes
    numbers; for errors and losses alone use `evaluate`, whose errors this raises too.
    """
    job = _Evaluation(net, sweep, engine, dtype, device)
    images = tensor(images, "images")
    check_images(images, net.structure)
    job.choose(images)
    with (
        job.executor(images[:1]) as executor,
        Bar(job.describe(), len(sweep), len(images), 0, progress) as bar,
    ):
        starts = range(0, max(1, len(images)), executor.batch)
        parts = [images[start : start + executor.batch] for start in starts]
        rows = torch.cat([executor.logits(part, bar.advance(len(part))) for part in parts], dim=1)
    return rows[torch.from_numpy(job.plan.word_of)]


class _Evaluation(Job):
    """Errors and losses of a sweep's configurations."""

    def __init__(
        self,
        net: ResidualNetwork,
        sweep: Sweep,
        engine: str,
        dtype: torch.dtype | None,
        device: Devices | None,
    ) -> None:
        super().__init__(net, sweep, engine, dtype, device)
        self.plan: Plan = plan(net, sweep)
        self.plans = (self.plan,)

    def choose(self, example: torch.Tensor) -> None:
        size = tuple(example.shape[1:]) if len(example) else None
        self.engine, self.passed_over = engines.choose(self.wanted, self.net, self.device, self.dtype, size)
        others = (engines.choose(self.engine.name, self.net, d, self.dtype, size)[0] for d in self.devices[1:])
        self.used: list[Engine] = [self.engine, *others]

    def prepare(self) -> Executor:
        made = [
            (device, engine.prepare(self.net, self.plan, device, self.dtype))
            for device, engine in zip(self.devices, self.used, strict=True)
        ]
        return made[0][1] if len(made) == 1 else SeveralExecutor(made)

    def way(self) -> dict[str, Any]:
        alike = len({device_name(device) for device in self.devices}) == 1  # two cards may round differently
        ways = dict.fromkeys(engine.path for engine in self.used)
        return {"bitwise": alike and all(engine.bitwise for engine in self.used), "path": "; ".join(ways)}

    def study(self, manifest: dict[str, Any], parts: list[Part], path: Path | None) -> Study:
        return Study(manifest, self.sweep, parts, path)

    def parts(self, executor: Executor, reader: ImageReader, bar: Bar, finish: Callable[[Part], None]) -> None:
        # Ctrl-C closes the part in work with the batches that are done.
        while True:
            start, began = reader.position, time.monotonic()
            stop, tally, digest = start, Tally.zeros(self.plan.words), ImageHash()
            ended = False
            try:
                while stop - start < _PART_IMAGES and time.monotonic() - began < _PART_SECONDS:
                    images, labels = reader.take(executor.batch)
                    if len(labels) == 0:
                        ended = True
                        break
                    done = executor.tally(images, labels, bar.advance(len(labels)))
                    tally.add(done)
                    digest.update(images, labels)
                    stop += len(labels)
            finally:
                if stop > start:
                    tally = Tally(*(column[self.plan.word_of] for column in tally))
                    finish(Part(start, stop, digest.hexdigest(), tally))
            if ended:
                return
