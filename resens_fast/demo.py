"""The demo: what deleting and reordering blocks does to a trained network, in minutes and with nothing to set up."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .commands.loading import load
from .commands.oneline import State
from .commands.run import How, Job, Target, finish, write_json
from .errors import DataError, ModelError, StudyError

if TYPE_CHECKING:
    from .network import ResidualNetwork
    from .study import Study
    from .sweep import Sweep

CHOICE = "demo.json"
SECONDS, QUICK_SECONDS = 150.0, 20.0  # of evaluation, at the speed that is measured first


@dataclass(frozen=True)
class Choice:
    """What the demo runs on; kept in the folder so that the next call continues it instead of choosing again."""

    data: str
    model: str
    contrast: str | None
    images: int
    quick: bool


def run(state: State, out: Path, quick: bool = False, data: str | None = None) -> None:
    """Run, resume or show the demo in the folder `out`; prints tables and where the figures are.

    Raises StudyError when `out` holds something else or a demo with other options, DataError when `data` cannot be had.
    """
    began = time.monotonic()
    state.out, state.resume = str(out), f"finished parts are kept in {out}: run the same command again to go on"
    choice = _read(out, quick, data) or _choose(out, quick, data)
    studies: list[tuple[str, Study]] = []
    written: list[Path] = []
    parts = [("lesion", choice.model, _lesions), ("reorder", choice.model, _reorderings)]
    if choice.contrast:
        parts.append(("contrast", choice.contrast, _singles))
    for part, model, sweep in parts:
        with Job(state, out / part, Target(model, choice.data, limit=choice.images), How()) as job:
            print(f"\n{part}: ", end="")
            study = job.evaluate(sweep(job.net, choice.quick))
        studies.append((model, study))
        written += finish(study)
    if choice.contrast:
        written += _contrast(studies, out, choice)
    print(f"\nEverything is in {out} ({time.monotonic() - began:.0f} s):")
    for path in written:
        print(f"  {path}")
    print("Studies to open with resens_fast.open_study: " + ", ".join(str(study.path) for _, study in studies))


def _lesions(net: ResidualNetwork, quick: bool) -> Sweep:
    from . import sweeps

    most = min(20, sum(net.structure.deletable))
    draws = sweeps.delete_random(net, range(1, most + 1), samples=4 if quick else 10, seed=0)
    return sweeps.intact(net) + sweeps.single(net) + draws


def _reorderings(net: ResidualNetwork, quick: bool) -> Sweep:
    from . import sweeps

    return sweeps.intact(net) + sweeps.swap_random(net, range(1, 21), samples=2 if quick else 5, seed=0)


def _singles(net: ResidualNetwork, quick: bool) -> Sweep:
    from . import sweeps

    return sweeps.intact(net) + sweeps.single(net)


def _contrast(studies: list[tuple[str, Study]], out: Path, choice: Choice) -> list[Path]:
    """ResNet beside VGG in one figure."""
    from . import figures

    sides = [(model, study.frame, study.structure) for model, study in (studies[0], studies[-1])]
    figure = figures.compare(sides, "One block deleted", f"{choice.images:,} images")
    return figures.save(figure, out, "contrast")


def _read(out: Path, quick: bool, data: str | None) -> Choice | None:
    """The choice an earlier call made in this folder, or None for a folder that is new or empty."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not out.is_dir():
        raise StudyError(f"{out} is a file; give --out a folder for the demo")
    try:
        choice = Choice(**json.loads((out / CHOICE).read_text()))
    except FileNotFoundError:
        raise StudyError(f"{out} holds other files and no demo; choose an empty or a new folder") from None
    except (ValueError, TypeError):
        raise StudyError(f"{out / CHOICE} is damaged; delete {out} and run the demo again") from None
    if choice.quick != quick or data not in (None, choice.data):
        made = f"resens demo{' --quick' if choice.quick else ''} --data {choice.data}"
        raise StudyError(f"{out} holds a demo with other options ({made}); use the same ones, or another --out")
    print(f"Going on with the demo in {out}: {choice.model} on {choice.data}, {choice.images:,} images.")
    return choice


def _choose(out: Path, quick: bool, data: str | None) -> Choice:
    """Which images and network, and how many images a few minutes allow on this machine; says which and why."""
    from . import data as datasets
    from . import models

    names = models.names()
    found = data or datasets.find_cifar10() or "cifar10"
    reason = "as asked"
    if found.startswith("cifar10"):
        try:
            if "resnet110-cifar10" not in names:
                raise ModelError("resnet110-cifar10 does not ship with this installation")
            datasets.open(found, limit=1)
            reason = "found on this machine" if found != "cifar10" else "downloaded"
        except (DataError, ModelError) as error:
            if data is not None:
                raise
            found, reason = "digits", str(error)
    cifar = found.startswith("cifar10")
    if cifar:
        print(f"The demo runs ResNet-110 on CIFAR-10 ({found}: {reason}).")
    elif found == "digits":
        print(f"The demo runs ResNet-20 on scikit-learn's digits ({reason}).")
    else:
        raise DataError(f"the demo runs on digits or cifar10, not {found!r}: use resens lesion for other data")
    model = "resnet110-cifar10" if cifar else "resnet20-digits"
    contrast = "vgg15-cifar10" if cifar and "vgg15-cifar10" in names else None
    images = _affordable(model, found, quick)
    choice = Choice(found, model, contrast, images, quick)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(f"cannot make the folder {out}: {error.strerror}") from None
    write_json(out / CHOICE, vars(choice))
    return choice


def _affordable(model: str, data: str, quick: bool) -> int:
    """How many images fit into the time, from a short run of the engine that will do the work."""
    from . import sweeps
    from .evaluate import evaluate
    from .plan import plan

    # The probe decodes a few images only; a set may hold fewer than its usual number, which open() takes as all.
    total = 500 if data == "digits" else 10_000
    loaded = load(model, data, limit=32)
    probe: Any = [loaded.data[i] for i in range(len(loaded.data))]
    sweep = sweeps.intact(loaded.net) + sweeps.single(loaded.net)
    seconds = float("inf")
    for _ in range(2):  # the first run also warms caches and thread pools
        began = time.perf_counter()
        evaluate(loaded.net, sweep, probe, progress=False)
        seconds = min(seconds, time.perf_counter() - began)
    per_run = seconds / len(probe) / plan(loaded.net, sweep).executed_runs
    runs = sum(plan(loaded.net, part(loaded.net, quick)).executed_runs for part in (_lesions, _reorderings))
    affordable = int((QUICK_SECONDS if quick else SECONDS) / (per_run * runs))
    images = min(total, max(100, affordable // 100 * 100))
    print(
        f"Using {images:,} test images: about {images * runs * per_run / 60:.1f} minutes of "
        f"evaluation at {1 / per_run:,.0f} block runs per second."
    )
    return images
