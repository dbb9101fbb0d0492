"""`resens gradients` and `resens paths`: the gradient along paths of each length, and the paths themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import parse
from .oneline import State
from .options import (
    Checkpoint,
    Data,
    Device,
    Dtype,
    EngineName,
    ImageSize,
    Limit,
    Mean,
    Model,
    Out,
    Seed,
    Std,
    Threads,
)


def gradients(
    ctx: typer.Context,
    model: Model,
    data: Data,
    out: Out,
    lengths: Annotated[
        str | None,
        typer.Option(
            "--lengths",
            metavar="K",
            help="Blocks entered: a number, a range 0:54 (both ends included) or a list; all lengths if not given.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Random paths of each length; all of them where there are no more.")
    ] = 100,
    norm: Annotated[
        str,
        typer.Option("--norm", metavar="WHERE", help="first_block, image or parameters: where the norm is taken."),
    ] = "first_block",
    batch: Annotated[
        int, typer.Option("--batch", min=1, help="Images whose mean norm is one row of the results.")
    ] = 32,
    seed: Seed = 0,
    checkpoint: Checkpoint = None,
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    limit_images: Limit = None,
    engine: EngineName = "auto",
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Measure the gradient along random paths of each length through the intact network.

    \b
    resens gradients resnet110-cifar10 --data cifar10 --limit-images 64 --out runs/gradients
    resens gradients resnet20-digits --data digits --norm parameters --limit-images 50 --out runs/blocks

    The backward pass goes through the branch of the blocks that a path enters and around the others.
    """
    from .. import sweeps
    from ..gradients import path_gradients
    from .run import How, Job, Target, finish, report_files

    ks = None if lengths is None else parse.counts(lengths, "--lengths", least=0)
    target = Target(model, data, checkpoint, mean, std, image_size, limit_images)
    with Job(ctx.ensure_object(State), out, target, How(engine, dtype, device, threads)) as job:
        chosen = sweeps.paths(job.net, ks, samples, seed)
        loaded = job.loaded
        many = f"{len(chosen):,} path{'s' * (len(chosen) != 1)}"
        print(
            f"{loaded.name}: {many} through {len(job.net.structure)} blocks on {len(loaded.data):,} images of "
            f"{loaded.data_name}",
            flush=True,
        )
        study = path_gradients(
            job.net, loaded.data, paths=chosen, norm=norm, batch=batch, engine=engine, dtype=job.dtype, device=device,
            out=out,
        )  # fmt: skip
        job.note()
        report_files(study, finish(study))


def paths(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="As for gradients; or a number of blocks.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the figures.", show_default=False)],
    deleted: Annotated[
        str | None,
        typer.Option(
            "--deleted",
            metavar="D",
            help="Blocks deleted, for the paths that survive; five at most; 1,5,10,20 as far as there are so many.",
            show_default=False,
        ),
    ] = None,
    image_size: ImageSize = None,
) -> None:
    """Count the paths of each length, and those that are left after deletions; needs no images.

    \b
    resens paths resnet110-cifar10 --out runs/paths
    resens paths 1000 --deleted 10,100 --out runs/paths
    """
    from .path_report import report_paths

    chosen = None if deleted is None else parse.counts(deleted, "--deleted")
    report_paths(model, out, chosen, parse.image_size(image_size))
