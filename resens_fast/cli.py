"""The command line `resens`: lesion, reorder, gradients, paths, train, gates, show, doctor, demo."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .commands import architecture, parse, path_commands
from .commands.oneline import Group, State
from .commands.options import (
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

app = typer.Typer(
    cls=Group,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help=(
        "Lesion and reordering studies of residual networks.\n\n"
        "Blocks of a trained network are deleted or put into another order at test time, and the error of every "
        "variant is measured on the same images. Results go into a folder (a study), which can be interrupted and "
        "resumed by running the same command again."
    ),
)


def _version(wanted: bool) -> None:
    if wanted:
        from .version import __version__

        print(f"resens_fast {__version__}")
        raise typer.Exit


@app.callback()
def common(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error as well.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Options that stand before the command."""
    ctx.ensure_object(State).debug = debug


@app.command()
def lesion(
    ctx: typer.Context,
    model: Model,
    data: Data,
    out: Out,
    single: Annotated[
        bool, typer.Option("--single", help="Delete every block alone (the default when no other sweep is asked for).")
    ] = False,
    pairs: Annotated[bool, typer.Option("--pairs", help="Delete every pair of blocks.")] = False,
    delete: Annotated[
        str | None,
        typer.Option(
            "--delete",
            metavar="K",
            help="Delete K random blocks: a number, a range 1:20 (both ends included) or a list 1,2,5.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Random draws for each K.")] = 50,
    seed: Seed = 0,
    transitions: Annotated[
        bool,
        typer.Option(
            "--transitions/--no-transitions", help="Whether random deletions may hit blocks that change the shape."
        ),
    ] = True,
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
    """Delete blocks and measure the error: each alone, in pairs, or K at random.

    \b
    resens lesion resnet110-cifar10 --data cifar10 --single --out runs/single
    resens lesion resnet110-cifar10 --data cifar10 --delete 1:20 --samples 50 --limit-images 1000 --out runs/delete
    resens lesion mynets:resnet56 --checkpoint best.pth --data cifar10 --out runs/mine

    The intact network is always evaluated too. Deleting keeps a block's shortcut, projections included.
    """
    from . import sweeps
    from .commands.run import How, Job, Target

    ks = None if delete is None else parse.counts(delete, "--delete")
    target = Target(model, data, checkpoint, mean, std, image_size, limit_images)
    with Job(ctx.ensure_object(State), out, target, How(engine, dtype, device, threads)) as job:
        net = job.net
        sweep = sweeps.intact(net)
        if single or not (pairs or ks):
            sweep = sweep + sweeps.single(net)
        if pairs:
            sweep = sweep + sweeps.pairs(net)
        if ks:
            sweep = sweep + sweeps.delete_random(net, ks, samples=samples, seed=seed, transitions=transitions)
        job.run(sweep)


@app.command()
def reorder(
    ctx: typer.Context,
    model: Model,
    data: Data,
    out: Out,
    swaps: Annotated[
        str,
        typer.Option(
            "--swaps",
            metavar="K",
            help="Swap K random pairs: a number, a range 1:20 (both ends included) or a list 1,2,5.",
        ),
    ] = "1:20",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Random draws for each K.")] = 20,
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
    """Swap blocks of equal shape and measure the error against Kendall's tau of the new order.

    \b
    resens reorder resnet110-cifar10 --data cifar10 --swaps 1:20 --samples 20 --limit-images 1000 --out runs/reorder

    Blocks that change the shape stay where they are. The intact network is always evaluated too.
    """
    from . import sweeps
    from .commands.run import How, Job, Target

    ks = parse.counts(swaps, "--swaps")
    target = Target(model, data, checkpoint, mean, std, image_size, limit_images)
    with Job(ctx.ensure_object(State), out, target, How(engine, dtype, device, threads)) as job:
        net = job.net
        job.run(sweeps.intact(net) + sweeps.swap_random(net, ks, samples=samples, seed=seed))


app.command()(path_commands.gradients)
app.command()(path_commands.paths)


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that holds a study.", show_default=False)],
    everything: Annotated[bool, typer.Option("--all", help="Print all rows of the long tables.")] = False,
) -> None:
    """Print a study's tables, draw its figures again, and say where everything is."""
    from .commands import run

    run.show(folder, everything)


@app.command()
def train(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help=f"What to train: {architecture.NAMES}; or module:factory.", show_default=False
        ),
    ],
    data: Data,
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="DIR", help="Folder for checkpoint, weights, card and metrics.csv.", show_default=False
        ),
    ],
    epochs: Annotated[int, typer.Option("--epochs", metavar="N", min=1, help="Passes over the training images.")] = 20,
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=2, help="Images per step.")] = 128,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", metavar="X", help="Highest rate of the one-cycle schedule.")
    ] = 0.2,
    weight_decay: Annotated[float, typer.Option("--weight-decay", metavar="X", min=0.0)] = 5e-4,
    crop: Annotated[
        int | None,
        typer.Option(
            "--crop",
            metavar="N",
            min=0,
            help="Border for random crops; 4 (digits: 1) if not given.",
            show_default=False,
        ),
    ] = None,
    flip: Annotated[
        bool | None,
        typer.Option(
            "--flip/--no-flip", help="Mirror half of the images; yes (digits: no) if not given.", show_default=False
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="NAME", help="auto, float32 or bfloat16 (autocast).")
    ] = "auto",
    seed: Seed = 0,
    sample_blocks: Annotated[
        int | None,
        typer.Option("--sample-blocks", metavar="K", help="Every batch runs K random blocks.", show_default=False),
    ] = None,
    stochastic_depth: Annotated[
        float | None,
        typer.Option(
            "--stochastic-depth",
            metavar="P",
            help="Blocks run at random, the last one with probability P, those before it linearly more often.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in DIR.")] = False,
    limit_images: Annotated[
        int | None,
        typer.Option("--limit-images", metavar="N", min=2, help="Train on N of the images.", show_default=False),
    ] = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Train a network from scratch: SGD with Nesterov momentum, one-cycle, crops and flips.

    \b
    resens train resnet20 --data digits --epochs 20 --out runs/resnet20
    resens lesion runs/resnet20 --data digits --out runs/resnet20-lesion
    """
    from .commands import train as training

    set_threads(threads)
    options = training.Options(
        epochs, batch, learning_rate, weight_decay, crop, flip, dtype, seed, sample_blocks, stochastic_depth
    )
    training.train(ctx.ensure_object(State), model, data, out, options, resume, device, limit_images)


@app.command()
def gates(
    ctx: typer.Context,
    model: Model,
    data: Data,
    checkpoint: Checkpoint = None,
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    limit_images: Limit = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Print how far the gates of a highway network's blocks are open, on average over images.

    \b
    resens train highway32 --data cifar10 --out runs/highway32
    resens gates runs/highway32 --data cifar10
    """
    from .commands import gates as table
    from .commands.run import Target

    set_threads(threads)
    table.show(Target(model, data, checkpoint, mean, std, image_size, limit_images), device)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON, for a bug report or a script.")] = False,
) -> None:
    """Print versions, engines (with the reason if one is missing), instruction sets, devices, data and networks."""
    from . import doctor as room

    if as_json:
        import json

        print(json.dumps(room.report(), indent=2, default=str))
    else:
        print(room.text())


@app.command()
def demo(
    ctx: typer.Context,
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Folder for the studies; run again to go on or to see them again."),
    ] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer draws and images: about half a minute.")] = False,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="SPEC", help="digits or cifar10[:PATH]; chosen if not given.", show_default=False
        ),
    ] = None,
    threads: Threads = None,
) -> None:
    """Delete and reorder the blocks of a trained network, a few minutes from start to figures.

    Uses ResNet-110 on CIFAR-10 where the images are found or can be downloaded, else ResNet-20 on digits.
    """
    from .demo import run

    set_threads(threads)
    run(ctx.ensure_object(State), out, quick, data)


def set_threads(threads: int | None) -> None:
    """Use so many CPU threads from here on; None leaves PyTorch's choice."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def main() -> None:
    """Entry point of the command `resens`."""
    try:
        app()
    except KeyboardInterrupt:  # before a command began
        sys.exit(130)


if __name__ == "__main__":
    main()
