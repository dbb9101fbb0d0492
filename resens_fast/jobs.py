"""What every job does that turns a sweep and images into a study: checks, manifest, parts, resuming, a progress bar."""

from __future__ import annotations

import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import engines
from .engines import Engine
from .engines.several import Devices, devices
from .errors import DataError, EngineError, StudyError, SweepError, WrapError
from .folder import FORMAT, StudyFolder
from .images import ImageHash, ImageReader
from .plan import Plan
from .study import Part, Study
from .sweep import Sweep
from .version import __version__

if TYPE_CHECKING:
    from .network import ResidualNetwork


class Job(ABC):
    """What is to be computed, checked before any image is read.

    A kind of job chooses its engine, makes it ready, and turns images into parts of its kind of study.
    """

    plans: Sequence[Plan]
    engine: Engine
    passed_over: dict[str, str]
    settings: Mapping[str, Any] = MappingProxyType({})
    """Entries of the manifest that say what this kind of job computes; a study goes on only with the same ones."""

    def __init__(
        self,
        net: ResidualNetwork,
        sweep: Sweep,
        engine: str,
        dtype: torch.dtype | None,
        device: Devices | None,
    ) -> None:
        check_network(net)
        if not isinstance(sweep, Sweep):
            raise SweepError(f"a sweep is needed, not {type(sweep).__name__}; build one with resens_fast.sweeps")
        self.net, self.sweep = net, sweep
        self.devices = devices(device) if device is not None else [net.device]
        self.device = self.devices[0]
        if dtype is None:
            dtype = torch.float64 if engine == "reference" else net.dtype
        self.dtype = check_dtype(dtype)
        self.wanted = engine

    @abstractmethod
    def choose(self, example: torch.Tensor) -> None:
        """Settle on the engine, which depends on the size of the images too."""

    @abstractmethod
    def prepare(self) -> Any:
        """The chosen engine's executor, with the network in eval mode."""

    @abstractmethod
    def parts(self, executor: Any, reader: ImageReader, bar: Bar, finish: Callable[[Part], None]) -> None:
        """Compute what is left in the reader and finish it part by part; Ctrl-C loses no finished part."""

    @abstractmethod
    def study(self, manifest: dict[str, Any], parts: list[Part], path: Path | None) -> Study:
        """The results so far."""

    def way(self) -> dict[str, Any]:
        """What the engine promises and which way it took; some engines know only once they are ready."""
        return {"bitwise": self.engine.bitwise, "path": self.engine.path}

    def describe(self) -> str:
        """What the progress bar is called."""
        return f"{len(self.sweep)} configurations, {self.engine.name}"

    @contextmanager
    def executor(self, example: torch.Tensor) -> Iterator[Any]:
        """The engine made ready, with the network in eval mode meanwhile and its training flags restored after."""
        flags = {module: module.training for module in self.net.model.modules()}
        self.net.eval()
        try:
            check_size(self.net, example)
            with torch.autocast(self.device.type, enabled=False):  # the dtype is what the manifest says
                yield self.prepare()
        finally:
            for module, flag in flags.items():
                module.training = flag

    def manifest(self, reader: ImageReader) -> dict[str, Any]:
        return {
            "format": FORMAT,
            **self.settings,
            "resens_fast": __version__,
            "complete": False,
            "network": {
                "class": f"{type(self.net.model).__module__}.{type(self.net.model).__qualname__}",
                "fingerprint": self.net.fingerprint(),
                "structure": self.net.structure.to_dict(),
            },
            "sweep": {
                "digest": self.sweep.digest,
                "configurations": len(self.sweep),
                "words": sum(p.words for p in self.plans),
            },
            "plan": {
                "requested_runs": sum(plan.requested_runs for plan in self.plans),
                "executed_runs": sum(plan.executed_runs for plan in self.plans),
                "slots": max(plan.slots for plan in self.plans),
            },
            "data": {"images": reader.total},
            "engine": {
                "name": self.engine.name,
                "dtype": str(self.dtype).removeprefix("torch."),
                "device": ", ".join(map(device_name, self.devices)),
                "bitwise": self.engine.bitwise,
                "passed_over": self.passed_over,
            },
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seconds": 0.0,
        }


def run(job: Job, data: Any, out: str | Path | None, progress: bool) -> Study:
    """The job's study of the data, finished; with `out` in that folder, going on with what is there."""
    reader = ImageReader(data, job.net.structure)
    job.choose(reader.peek())
    if out is None:
        return _run(job, reader, None, progress)
    if reader.shuffles:
        raise StudyError(
            f"a study in a folder ({out}) could not be resumed from a loader that shuffles; use DataLoader(..., "
            "shuffle=False)"
        )
    folder = StudyFolder(out)
    with folder.locked():
        return _run(job, reader, folder, progress)


def _run(job: Job, reader: ImageReader, folder: StudyFolder | None, progress: bool) -> Study:
    manifest = job.manifest(reader)
    parts: list[Part] = []
    if folder and folder.exists():
        manifest, parts = _resume(folder, manifest, reader)
    study = job.study(manifest, parts, folder.path if folder else None)
    if study.complete:
        return study
    with (
        job.executor(reader.peek()) as executor,
        Bar(job.describe(), len(job.sweep), reader.total, study.images, progress) as bar,
    ):
        manifest["engine"].update(job.way(), footprint=executor.footprint)
        began, before = time.monotonic(), manifest["seconds"]

        def finish(part: Part) -> None:
            if folder and not parts:  # only now: data that turn out to be bad at once leave no folder behind
                folder.create(manifest, job.sweep)
            parts.append(part)
            manifest["seconds"] = round(before + time.monotonic() - began, 3)
            if folder:
                folder.write_part(part)
                folder.write_manifest(manifest)

        job.parts(executor, reader, bar, finish)
    if study.images == 0:
        raise DataError("the data set is empty: it has no images")
    manifest["data"].update(images=study.images, hash=reader.digest.hexdigest())
    manifest["complete"] = True
    if folder:
        folder.write_manifest(manifest)
    return study


def _resume(folder: StudyFolder, now: dict[str, Any], reader: ImageReader) -> tuple[dict[str, Any], list[Part]]:
    """The study in the folder, after checking that this call continues it: same network, sweep, engine and images."""
    study = folder.read()
    then = study.manifest
    if then.get("gradients") != now.get("gradients"):
        raise StudyError(
            f"{folder.path} holds a study of {_kind(then)}, this is one of {_kind(now)}; choose another folder or "
            "delete it"
        )
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
    for part in study.parts:
        images, labels = reader.take(part.stop - part.start)
        digest = ImageHash()
        digest.update(images, labels)
        if digest.hexdigest() != part.hash:
            raise StudyError(
                f"images {part.start} to {part.stop - 1} are not those that {folder.path} was computed on: another "
                "data set, or a loader that shuffles or augments; use the same data without augmentation, "
                "or another folder"
            )
    return then, study.parts


def _kind(manifest: dict[str, Any]) -> str:
    gradients = manifest.get("gradients")
    if gradients is None:
        return "errors"
    return f"gradients at {gradients.get('norm')} in batches of {gradients.get('batch')} images"


class Bar:
    """Progress in configurations × images, shown when the work takes longer than two seconds.

    images: how many there are, None where that is not known; done: how many are done already.
    """

    def __init__(self, name: str, configurations: int, images: int | None, done: int, show: bool) -> None:
        self.configurations = configurations
        self.bar: Any = None
        if show:
            from tqdm import tqdm

            scale = self.configurations
            self.bar = tqdm(
                total=None if images is None else images * scale,
                initial=done * scale,
                unit="cfg·img" if configurations > 1 else "img",
                unit_scale=True,
                delay=2,
                mininterval=0.5,
                desc=name,
                bar_format=None
                if images is None
                else "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]",
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

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


def check_network(net: object) -> None:
    """WrapError unless it is a wrapped network."""
    if not (hasattr(net, "structure") and hasattr(net, "recipe")):
        raise WrapError(f"a wrapped network is needed, not {type(net).__name__}; call resens_fast.wrap(model) first")


def check_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype; EngineError when it is something else."""
    if not isinstance(dtype, torch.dtype):
        raise EngineError(f"dtype must be a torch.dtype such as torch.float32, not {dtype!r}")
    return dtype


def check_size(net: ResidualNetwork, images: torch.Tensor) -> None:
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


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type
