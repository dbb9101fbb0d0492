"""Evaluate a sweep into a folder and leave there what a reader wants: tables, figures, results.parquet."""

from __future__ import annotations

import json
import os
import shlex
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StudyError
from . import loading, parse
from .loading import Loaded
from .oneline import State, complain
from .tables import print_study

if TYPE_CHECKING:
    from ..study import Study
    from ..sweep import Sweep

RUN = "run.json"
RESULTS = "results.parquet"
MANIFEST = "manifest.json"  # there from a study's first part on


@dataclass(frozen=True)
class Target:
    """Which network and which images, as the command line names them."""

    model: str
    data: str
    checkpoint: Path | None = None
    mean: str | None = None
    std: str | None = None
    image_size: str | None = None
    limit: int | None = None

    def load(self) -> Loaded:
        """Check the options, then load; raises ModelError, DataError or WrapError."""
        means, stds = parse.statistics(self.mean, "--mean"), parse.statistics(self.std, "--std")
        return loading.load(
            self.model, self.data, self.checkpoint, means, stds, parse.image_size(self.image_size), self.limit
        )


@dataclass(frozen=True)
class How:
    """Engine, dtype, device and threads, as the command line names them."""

    engine: str = "auto"
    dtype: str | None = None
    device: str | None = None
    threads: int | None = None


class Job:
    """A study in the making: the options are checked, the network and the images loaded before the folder is touched.

    Inside `with`, error messages know the folder; a folder that was made for nothing is removed at the end.
    """

    def __init__(self, state: State, out: Path, target: Target, how: How) -> None:
        self.state, self.out, self.how = state, out, how
        self.dtype, self.device = loading.torch_dtype(how.dtype), loading.torch_device(how.device)
        if out.exists() and not out.is_dir():
            raise StudyError(f"{out} is a file; give --out a folder for the study")
        if how.threads is not None:
            import torch

            torch.set_num_threads(how.threads)
        self.loaded = target.load()
        self.net = self.loaded.net if self.device is None else self.loaded.net.to(self.device)
        self._existed = out.exists()

    def __enter__(self) -> Job:
        self.state.out = str(self.out)
        self.state.resume = f"finished parts are kept in {self.out}: run the same command again to go on"
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None and not self.out.is_dir():
            self.state.resume = ""
        if kind is KeyboardInterrupt and not self._existed and (self.out / MANIFEST).is_file():
            with suppress(OSError):
                self.note()  # for `resens show` of what is there
        if kind is None or self._existed or not self.out.is_dir():
            return
        if all(entry.name == ".lock" for entry in self.out.iterdir()):
            with suppress(OSError):
                (self.out / ".lock").unlink(missing_ok=True)
                self.out.rmdir()
            self.state.resume = ""

    def run(self, sweep: Sweep) -> None:
        """Evaluate or go on evaluating, then tables, figures and files."""
        study = self.evaluate(sweep)
        report_files(study, finish(study))

    def evaluate(self, sweep: Sweep) -> Study:
        """Evaluate or go on evaluating; says before what is to be done."""
        from ..evaluate import evaluate
        from ..plan import plan

        planned, loaded = plan(self.net, sweep), self.loaded
        print(
            f"{loaded.name}: {len(self.net.structure)} blocks; {len(sweep):,} configurations on {len(loaded.data):,} "
            f"images of {loaded.data_name}; {planned.executed_runs:,} block runs per image instead of "
            f"{planned.requested_runs:,}",
            flush=True,
        )
        study = evaluate(
            self.net, sweep, loaded.data, engine=self.how.engine, dtype=self.dtype, device=self.how.device, out=self.out
        )
        self.note()
        return study

    def note(self) -> None:
        """Write down in the folder what its study is of."""
        loaded = self.loaded
        about = {"model": loaded.name, "data": loaded.data_name, "command": shlex.join(["resens", *sys.argv[1:]])}
        write_json(self.out / RUN, about)


def finish(study: Study, everything: bool = False) -> list[Path]:
    """Print a study's tables and write its figures and results.parquet into its folder; returns what was written."""
    from .. import figures
    from ..gradient_study import GradientStudy

    assert study.path is not None
    about = read_run(study.path)
    name = about.get("model") or study.manifest["network"]["class"].rpartition(".")[2]
    if isinstance(study, GradientStudy):
        from .path_report import finish_gradients

        return [*finish_gradients(study, name, about.get("data", "its data"), everything), write_results(study)]
    print_study(study, name, about.get("data", "its data"), everything)
    written = figures.write(study.frame, study.structure, study.path, name, figures.describe(study))
    return [*written, write_results(study)]


def report_files(study: Study, written: list[Path]) -> None:
    """Say where everything is."""
    print()
    for path in written:
        print(f"wrote {path}")
    print(f"study {study.path}")


def write_results(study: Study) -> Path:
    """study.frame as one Parquet file in the study's folder, whole or not at all."""
    assert study.path is not None
    target = study.path / RESULTS
    frame = study.frame
    for column in frame.columns.intersection(["deleted", "order"]):  # tuples: Parquet knows lists
        frame[column] = frame[column].map(list)
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        frame.to_parquet(part, index=False)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A small JSON file, whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_run(folder: Path) -> dict[str, Any]:
    """What the command line noted about a study, or nothing for one that a script made or whose note is damaged."""
    try:
        content = json.loads((folder / RUN).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def show(folder: Path, everything: bool = False) -> None:
    """Tables and figures of a study that is already there.  Raises StudyError for a folder without one."""
    from ..study import open_study

    study = open_study(folder)
    if study.images == 0:
        raise StudyError(f"the study in {folder} has no finished part yet: run the command that started it again")
    if not study.complete:
        import warnings

        total = study.manifest["data"]["images"]
        complain(
            f"the study is not finished: {study.images:,} of {total or 'an unknown number of'} images; "
            "run its command again to go on"
        )
        warnings.filterwarnings("ignore", message="this study is incomplete")
    report_files(study, finish(study, everything))
