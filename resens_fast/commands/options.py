"""Options that several commands take, each said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# What MODEL and --data may be, in one place for the commands that take them.
MODEL_HELP = (
    "A network that ships with the package (resens doctor lists them), a folder that resens train wrote, "
    "or module:factory (also file.py:factory), a function without arguments that returns a torch.nn.Module."
)
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="SPEC",
        help="digits, cifar10, cifar10:PATH, fashion-mnist or folder:PATH (a folder per class).",
        show_default=False,
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        "--out", metavar="DIR", help="Folder for the study and its figures; one study per folder.", show_default=False
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        metavar="FILE",
        help="Weights for module:factory: .safetensors, .pt or .pth with a state_dict.",
        show_default=False,
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(
        "--mean",
        metavar="LIST",
        help="Mean of each channel in [0, 1] the network was trained with, such as 0.49,0.48,0.45.",
        show_default=False,
    ),
]
Std = Annotated[
    str | None,
    typer.Option("--std", metavar="LIST", help="Standard deviation of each channel, likewise.", show_default=False),
]
ImageSize = Annotated[
    str | None,
    typer.Option(
        "--image-size",
        metavar="SIZE",
        help="Height x width for folder:PATH with module:factory, such as 224.",
        show_default=False,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit-images", metavar="N", min=1, help="Use N of the test images, always the same ones.", show_default=False
    ),
]
EngineName = Annotated[
    str,
    typer.Option(
        "--engine", metavar="NAME", help="auto takes the fastest one that covers the network; resens doctor lists them."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="NAME",
        help="float32, float64, bfloat16 or float16; the network's own if not given.",
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="cpu, cuda, cuda:1 or several as cuda:0,cuda:1 (lesion, reorder); the CPU if not given.",
        show_default=False,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", metavar="N", min=1, max=1024, help="CPU threads; all cores if not given.", show_default=False
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the random draws; the same draws on every machine.")]
