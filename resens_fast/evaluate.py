"""network → sweep → plan → engine → study: the one call that evaluates a sweep on images."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import engines
from .engines import Engine, Executor, Tally
from .errors import DataError, EngineError, StudyError, SweepError, WrapError
from .folder import FORMAT, StudyFolder
from .images import ImageHash, ImageReader, check_images, tensor
from .plan import Plan, plan
from .study import Part, Study
from .sweep import Sweep
from .version import __version__

if TYPE_CHECKING:
    from .network import ResidualNetwork

# A part is closed after this many seconds or images: what a killed process loses, against the number of files.
_PART_SECONDS, _PART_IMAGES = 20.0, 1024


def evaluate(
    net: ResidualNetwork,
    sweep: Sweep,
    data: Any,
    engine: str = "auto",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> Study:
    """Error and loss of every configuration of ``sweep`` on ``data``, in eval mode (Veit et al. 2016, section 4).

    data: a DataLoader, a Dataset or ``(images [N, C, H, W] float, labels [N] int)``. engine: ``auto`` (the fastest
    that covers the whole job) or a name. dtype, device: follow the network when None (the reference engine: float64).
    out: a folder; the same call resumes it after Ctrl-C or a kill, without repeating finished parts. progress: a bar
    on standard error when it takes longer than two seconds.

    Raises SweepError for a sweep of another network, DataError for images or labels that do not fit, EngineError when
    a named engine does not cover the job, StudyError when ``out`` holds another study or other images than before.
    Ctrl-C keeps what is finished and raises.
    """
    job = _Job(net, sweep, engine, dtype, device)
    reader = ImageReader(data, net.structure)
    job.choose(reader.peek())
    if out is None:
        return _run(job, reader, None, progress)
    folder = StudyFolder(out)
    with folder.locked():
        return _run(job, reader, folder, progress)


def logits(
    net: ResidualNetwork,
    sweep: Sweep,
    images: torch.Tensor,
    engine: str = "auto",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Logits [C, B, classes] of every configuration on images [B, C, H, W], on the CPU, in the engine's precision.

    Raises what `evaluate` raises. Memory is C × B × classes numbers; for errors and losses alone use `evaluate`.
    """
    job = _Job(net, sweep, engine, dtype, device)
    images = tensor(images, "images")
    check_images(images, net.structure)
    job.choose(images)
    with job.executor(images[:1]) as executor:
        starts = range(0, max(1, len(images)), executor.batch)
        rows = torch.cat([executor.logits(images[start : start + executor.batch]) for start in starts], dim=1)
    return rows[torch.from_numpy(job.plan.word_of)]


class _Job:
    """What is to be computed, checked before any image is read."""

    def __init__(
        self,
        net: ResidualNetwork,
        sweep: Sweep,
        engine: str,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        if not isinstance(sweep, Sweep):
            raise SweepError(f"a sweep is needed, not {type(sweep).__name__}; build one with resens_fast.sweeps")
        if not (hasattr(net, "structure") and hasattr(net, "recipe")):
            raise WrapError(
                f"a wrapped network is needed, not {type(net).__name__}; call resens_fast.wrap(model) first"
            )
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise EngineError(f"dtype must be a torch.dtype such as torch.float32, not {dtype!r}")
        self.net, self.sweep = net, sweep
        self.plan: Plan = plan(net, sweep)
        self.device = _usable(device) if device is not None else net.device
        if dtype is None:
            dtype = torch.float64 if engine == "reference" else net.dtype
        self.dtype = dtype
        self._wanted = engine

    def choose(self, example: torch.Tensor) -> None:
        """Settle on the engine, which depends on the size of the images too."""
        self.engine: Engine
        size = tuple(example.shape[1:]) if len(example) else None
        self.engine, self.passed_over = engines.choose(self._wanted, self.net, self.device, self.dtype, size)

    @contextmanager
    def executor(self, example: torch.Tensor) -> Iterator[Executor]:
        """The engine made ready, with the network in eval mode meanwhile and its training flags restored after."""
        flags = {module: module.training for module in self.net.model.modules()}
        self.net.eval()
        try:
            _check_size(self.net, example)
            with torch.autocast(self.device.type, enabled=False):  # the dtype is what the manifest says
                yield self.engine.prepare(self.net, self.plan, self.device, self.dtype)
        finally:
            for module, flag in flags.items():
                module.training = flag

    def manifest(self, reader: ImageReader) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "resens_fast": __version__,
            "complete": False,
            "network": {
                "class": f"{type(self.net.model).__module__}.{type(self.net.model).__qualname__}",
                "fingerprint": self.net.fingerprint(),
                "structure": self.net.structure.to_dict(),
            },
            "sweep": {"digest": self.sweep.digest, "configurations": len(self.sweep), "words": self.plan.words},
            "plan": {
                "requested_runs": self.plan.requested_runs,
                "executed_runs": self.plan.executed_runs,
                "slots": self.plan.slots,
            },
            "data": {"images": reader.total},
            "engine": {
                "name": self.engine.name,
                "dtype": str(self.dtype).removeprefix("torch."),
                "device": _device_name(self.device),
                "bitwise": self.engine.bitwise,
                "passed_over": self.passed_over,
            },
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seconds": 0.0,
        }


def _run(job: _Job, reader: ImageReader, folder: StudyFolder | None, progress: bool) -> Study:
    manifest = job.manifest(reader)
    parts: list[Part] = []
    whole = ImageHash()
    if folder and folder.exists():
        manifest, parts = _resume(folder, manifest, reader, whole)
    study = Study(manifest, job.sweep, parts, folder.path if folder else None)
    if study.complete:
        return study
    with job.executor(reader.peek()) as executor, _Bar(job, reader, study.images, progress) as bar:
        # Some engines know only now which way they take.
        manifest["engine"].update(bitwise=job.engine.bitwise, path=job.engine.path, footprint=executor.footprint)
        began, before = time.monotonic(), manifest["seconds"]

        def finish(part: Part) -> None:
            if folder and not parts:  # only now: data that turn out to be bad at once leave no folder behind
                folder.create(manifest, job.sweep)
            parts.append(part)
            manifest["seconds"] = round(before + time.monotonic() - began, 3)
            if folder:
                folder.write_part(part)
                folder.write_manifest(manifest)

        _parts(job.plan, executor, reader, bar, finish, whole)
    if study.images == 0:
        raise DataError("the data set is empty: it has no images")
    manifest["data"].update(images=study.images, hash=whole.hexdigest())
    manifest["complete"] = True
    if folder:
        folder.write_manifest(manifest)
    return study


def _parts(plan: Plan, executor: Executor, reader: ImageReader, bar: _Bar, finish: Any, whole: ImageHash) -> None:
    """Evaluate what is left in the reader, part by part; Ctrl-C closes the part in work with the batches that are
    done.
    """
    while True:
        start, began = reader.position, time.monotonic()
        stop, tally, digest = start, Tally.zeros(plan.words), ImageHash()
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
                whole.update(images, labels)
                stop += len(labels)
        finally:
            if stop > start:
                finish(Part(start, stop, digest.hexdigest(), Tally(*(column[plan.word_of] for column in tally))))
        if ended:
            return


def _resume(
    folder: StudyFolder, now: dict[str, Any], reader: ImageReader, whole: ImageHash
) -> tuple[dict[str, Any], list[Part]]:
    """The study in the folder, after checking that this call continues it: same network, sweep, engine and images."""
    study = folder.read()
    then = study.manifest
    for what, key in (("network", "fingerprint"), ("sweep", "digest"), ("engine", "name"), ("engine", "dtype")):
        if then[what].get(key) != now[what][key]:
            name = {"fingerprint": "network", "digest": "sweep", "name": "engine", "dtype": "dtype"}[key]
            raise StudyError(
                f"{folder.path} holds a study of another {name} ({str(then[what].get(key))[:12]}, now "
                f"{str(now[what][key])[:12]}); choose another folder or delete it"
            )
    if None not in (reader.total, then["data"]["images"]) and reader.total != then["data"]["images"]:
        raise StudyError(
            f"{folder.path} holds a study of {then['data']['images']} images, these data have {reader.total}; "
            "choose another folder or delete it"
        )
    if reader.shuffles:
        raise StudyError(f"cannot resume {folder.path} from a loader that shuffles; use DataLoader(..., shuffle=False)")
    for part in study.parts:
        images, labels = reader.take(part.stop - part.start)
        digest = ImageHash()
        digest.update(images, labels)
        whole.update(images, labels)
        if digest.hexdigest() != part.hash:
            raise StudyError(
                f"images {part.start} to {part.stop - 1} are not those that {folder.path} was computed on: another "
                "data set, or a loader that shuffles or augments; use the same data without augmentation, "
                "or another folder"
            )
    return then, study.parts


class _Bar:
    """Progress in configurations × images, shown when the work takes longer than two seconds."""

    def __init__(self, job: _Job, reader: ImageReader, done: int, show: bool) -> None:
        self.configurations = len(job.sweep)
        self.bar: Any = None
        if show:
            from tqdm import tqdm

            scale = self.configurations
            self.bar = tqdm(
                total=None if reader.total is None else reader.total * scale,
                initial=done * scale,
                unit="cfg·img",
                unit_scale=True,
                delay=2,
                mininterval=0.5,
                desc=f"{len(job.sweep)} configurations, {job.engine.name}",
                bar_format=None
                if reader.total is None
                else "{l_bar}{bar}| {n:.3g}/{total:.3g} [{elapsed}<{remaining}, {rate_fmt}]",
            )

    def advance(self, images: int) -> engines.Progress | None:
        """The callback for one call of an executor on so many images."""
        if self.bar is None:
            return None
        scale = images * self.configurations

        def update(share: float) -> None:
            room = float("inf") if self.bar.total is None else self.bar.total - self.bar.n
            self.bar.update(min(share * scale, room))  # shares add up to 1 but for rounding

        return update

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


def _check_size(net: ResidualNetwork, images: torch.Tensor) -> None:
    """DataError when images of another size than the one the network was wrapped with do not go through it."""
    size = tuple(images.shape[1:])
    if len(images) == 0 or size == tuple(net.structure.input_shape):
        return
    try:
        with torch.inference_mode():
            net.model(images[:1].to(net.device, net.dtype))
    except RuntimeError as error:
        raise DataError(
            f"the network does not take images of the shape {size} (it was wrapped with "
            f"{net.structure.input_shape}): {str(error).splitlines()[0]}"
        ) from None


def _usable(device: torch.device | str) -> torch.device:
    """The device, after a first number was put there."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise EngineError(f"the device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from None
    return torch.device(device)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type
