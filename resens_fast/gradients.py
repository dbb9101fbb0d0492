"""Gradients along paths: the forward is intact, the backward takes one way through every block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from . import engines, sweeps
from .engines import AT, GradientExecutor, Progress
from .engines.several import Devices, devices
from .errors import EngineError, SweepError
from .gradient_plan import GradientPlan, gradient_plan
from .gradient_study import GradientStudy, Norms
from .hooks import passed_by
from .images import ImageHash, ImageReader
from .jobs import Bar, Job, check_dtype, check_network, run
from .plan import check_sweep
from .study import Part
from .sweep import Configuration, Sweep

if TYPE_CHECKING:
    from .network import ResidualNetwork

_GATE_BATCH = 64


def path_gradients(
    net: ResidualNetwork,
    data: Any,
    lengths: int | Iterable[int] | None = None,
    samples: int = 100,
    seed: int = 0,
    norm: str = "first_block",
    paths: Sweep | None = None,
    batch: int = 32,
    engine: str = "auto",
    dtype: torch.dtype | None = None,
    device: Devices | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> GradientStudy:
    """The norm of the gradient along random paths of each length (Veit et al. 2016, section 4.3, figure 6).

    lengths, samples, seed: which paths, as in ``sweeps.paths``; or ``paths``, any sweep, whose blocks with a gate other
    than 0 are entered (its order is the forward's). norm: where the gradient of each image's own cross-entropy is
    taken: ``first_block`` (the input of the first block), ``image``, or ``parameters`` (all blocks' own; then
    ``study.by_block`` tells which block received how much). batch: images whose mean norm is one row of
    ``study.frame``. The rest is as in ``evaluate``: a folder ``out`` is resumed, Ctrl-C keeps the finished batches.

    Raises SweepError for lengths or paths that the network does not have, DataError for images or labels that do not
    fit, EngineError when a named engine does not cover the job, StudyError when ``out`` holds another study.
    """
    check_network(net)
    if paths is None:
        paths = sweeps.paths(net, lengths, samples, seed)
    elif lengths is not None:
        raise SweepError("give either lengths or paths: the paths of a sweep have lengths of their own")
    batch = sweeps._positive(batch, "batch")
    study = run(_PathJob(net, paths, engine, dtype, device, norm, batch), data, out, progress)
    assert isinstance(study, GradientStudy)
    return study


def input_gradients(
    net: ResidualNetwork,
    paths: Sweep,
    images: torch.Tensor,
    labels: torch.Tensor,
    at: str = "first_block",
    engine: str = "auto",
    dtype: torch.dtype | None = None,
    device: Devices | None = None,
    progress: bool = True,
) -> torch.Tensor:
    """The gradient along every path of each image's own cross-entropy: [P, B, C, H, W], on the CPU, in the engine's
    precision.

    paths: a sweep; blocks with a gate other than 0 are entered and their branch's gradient is multiplied by the gate.
    images [B, C, H, W], labels int [B]. at: ``first_block`` (its input) or ``image``. Raises what ``path_gradients``
    raises. Memory is P × B states; for norms alone use ``path_gradients``, which also tells those that are too small
    for the precision.
    """
    if at == "parameters":
        raise EngineError("input_gradients are taken at first_block or image; parameters have norms only")
    job = _PathJob(net, paths, engine, dtype, device, at, 1)
    reader = ImageReader((images, labels), net.structure)
    job.choose(reader.peek())
    given, wanted = reader.take(len(images))
    with job.executor(given[:1]) as executor, Bar(job.describe(), len(paths), reader.total, 0, progress) as bar:
        found: torch.Tensor = executor.gradients(given, wanted, bar.advance(len(given)))
    return found


def gate_gradients(
    net: ResidualNetwork,
    sweep: Sweep,
    data: Any,
    dtype: torch.dtype | None = None,
    device: Devices | None = None,
    progress: bool = True,
) -> torch.Tensor:
    """The gradient of every configuration's mean loss with respect to the gates of its blocks: float64 [C, n].

    The forward is the configuration's own, not the intact one; at a gate of 0 the branch runs all the same, since the
    gradient is what adding a little of it would change (a closing ReLU passes nothing where its input is exactly 0,
    which is torch's convention). A block without a gate (a sequential one) has NaN, and so has every block of a
    configuration whose gradient is not finite on one of the images. Runs one configuration after another through
    torch: any block, any device and any floating-point dtype of 16 bits or more.
    """
    check_network(net)
    check_sweep(net.structure, sweep)
    where = _single(devices(device))[0] if device is not None else net.device
    kind = net.dtype if dtype is None else check_dtype(dtype)
    if refusal := passed_by(net, fused=False) or engines.get("torch").refuses(net, where, kind):
        raise EngineError(f"gate gradients cannot be computed: {refusal}")
    configurations = list(dict.fromkeys(sweep))
    row_of = {configuration: row for row, configuration in enumerate(configurations)}
    reader = ImageReader(data, net.structure)
    name = f"gates of {len(sweep)} configurations"
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(where.type, enabled=False):
        twin = engines.base.replica(net, where, kind, torch.channels_last)
        total = torch.zeros(len(configurations), len(net.blocks), dtype=torch.float64, device="cpu")
        with Bar(name, len(configurations), reader.total, 0, progress) as bar:
            while len((taken := reader.take(_GATE_BATCH))[1]):
                images, labels = (values.detach().to(where, copy=True) for values in taken)
                images, advance = images.to(kind), bar.advance(len(labels))
                for row, configuration in zip(total, configurations, strict=True):
                    row += _of_gates(twin, configuration, images, labels).cpu()
                    if advance:
                        advance(1 / len(configurations))
    total /= reader.position
    total[:, [not block.gateable for block in net.blocks]] = torch.nan
    return total[[row_of[configuration] for configuration in sweep]]


def _single(found: list[torch.device]) -> list[torch.device]:
    if len(found) > 1:
        raise EngineError(f"gradients run on one device, not on {', '.join(map(str, found))}: name one of them")
    return found


def _of_gates(
    net: ResidualNetwork, configuration: Configuration, images: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """The gradient of the summed loss of one configuration with respect to its gates, float64 [n]."""
    gates = torch.tensor(configuration.gates, dtype=torch.float64, device=images.device, requires_grad=True)
    state = net.stem(images)
    for j in configuration.order:
        block = net.blocks[j]
        state = block.run(state, gates[j] if block.gateable else configuration.gates[j])
    loss = torch.nn.functional.cross_entropy(net.head(state).double(), labels, reduction="sum")
    if not loss.requires_grad:  # no block has a gate
        return torch.zeros_like(gates)
    return torch.autograd.grad(loss, gates)[0]


class _PathJob(Job):
    """Gradient norms along the paths of a sweep."""

    def __init__(
        self,
        net: ResidualNetwork,
        sweep: Sweep,
        engine: str,
        dtype: torch.dtype | None,
        device: Devices | None,
        at: str,
        batch: int,
    ) -> None:
        super().__init__(net, sweep, engine, dtype, device)
        _single(self.devices)
        if at not in AT:
            raise EngineError(f"gradients are taken at {', '.join(AT)}, not at {at!r}")
        self.at, self.batch = at, batch
        self.settings = {"gradients": {"norm": at, "batch": batch}}
        self.rows = _orders(sweep)
        self.plans: list[GradientPlan] = [gradient_plan(net, sweep.take(rows)) for rows in self.rows]

    def choose(self, example: torch.Tensor) -> None:
        size = tuple(example.shape[1:]) if len(example) else None
        self.engine, self.passed_over = engines.choose_for_gradients(
            self.wanted, self.net, self.plans, self.device, self.dtype, self.at, size
        )

    def prepare(self) -> _Paths:
        made = [self.engine.prepare_gradients(self.net, plan, self.device, self.dtype, self.at) for plan in self.plans]
        return _Paths(made, self.plans, self.rows)

    def study(self, manifest: dict[str, Any], parts: list[Part], path: Path | None) -> GradientStudy:
        return GradientStudy(manifest, self.sweep, parts, path)

    def describe(self) -> str:
        return f"{len(self.sweep)} paths, {self.engine.name}"

    def parts(self, executor: _Paths, reader: ImageReader, bar: Bar, finish: Callable[[Part], None]) -> None:
        while True:
            start = reader.position
            images, labels = reader.take(self.batch)
            if len(labels) == 0:
                return
            digest = ImageHash()
            digest.update(images, labels)
            found = Norms.gather(executor.norms(images, labels, bar.advance(len(labels))))
            finish(Part(start, start + len(labels), digest.hexdigest(), found))


class _Paths:
    """The executors of all orders as one, whose rows are the sweep's."""

    footprint = None

    def __init__(
        self, made: Sequence[GradientExecutor], plans: Sequence[GradientPlan], rows: Sequence[NDArray[np.int64]]
    ) -> None:
        self.made, self.plans = made, plans
        self.place = torch.from_numpy(np.argsort(np.concatenate(rows)))

    def norms(self, images: torch.Tensor, labels: torch.Tensor, progress: Progress | None = None) -> torch.Tensor:
        """float64 [C, B], or [C, B, blocks] at ``parameters``."""
        return self._all("norms", images, labels, progress)

    def gradients(self, images: torch.Tensor, labels: torch.Tensor, progress: Progress | None = None) -> torch.Tensor:
        """[C, B, C, H, W] in the engine's precision."""
        return self._all("gradients", images, labels, progress)

    def _all(self, what: str, images: torch.Tensor, labels: torch.Tensor, progress: Progress | None) -> torch.Tensor:
        found = []
        words = sum(plan.words for plan in self.plans)
        for executor, planned in zip(self.made, self.plans, strict=True):
            pieces = []
            for start in range(0, len(labels), executor.batch):
                here = images[start : start + executor.batch], labels[start : start + executor.batch]
                share = planned.words / words * len(here[1]) / len(labels)
                tell = None if progress is None else _scaled(progress, share)
                pieces.append(getattr(executor, what)(*here, tell))
            found.append(torch.cat(pieces, dim=1)[torch.from_numpy(planned.word_of)])
        return torch.cat(found)[self.place]


def _scaled(progress: Progress, share: float) -> Progress:
    return lambda done: progress(done * share)


def _orders(sweep: Sweep) -> list[NDArray[np.int64]]:
    """The configurations of each order in which the blocks run."""
    _, group = np.unique(sweep.orders, axis=0, return_inverse=True)
    group = group.reshape(-1)  # numpy 2.0 gave it a second axis
    return [np.flatnonzero(group == number) for number in range(group.max() + 1)]
