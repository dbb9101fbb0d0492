"""`resens train`: an architecture or module:factory, trained into a folder that lesion and reorder take as MODEL."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from . import architecture
from .loading import check_channels, one_device
from .oneline import State

if TYPE_CHECKING:
    from ..random_depth import RandomDepth


@dataclass(frozen=True)
class Options:
    """What the command line gave; None stands for a default that depends on the data set."""

    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float
    crop: int | None
    flip: bool | None
    dtype: str
    seed: int
    sample_blocks: int | None = None
    stochastic_depth: float | None = None


def train(
    state: State,
    model: str,
    data: str,
    out: Path,
    options: Options,
    resume: bool,
    device: str | None,
    limit: int | None,
) -> None:
    """Train and say where the weights are.  Raises ModelError and DataError with the sentence to print."""
    import torch

    from .. import data as datasets
    from .. import training
    from ..wrap import wrap

    depth = _random_depth(options)
    where = one_device(device)
    # A digit is no longer the same digit when it is mirrored, and 8 x 8 pixels leave little to crop.
    digits = data == "digits"
    recipe = training.Recipe(
        epochs=options.epochs,
        batch=options.batch,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        crop=options.crop if options.crop is not None else (1 if digits else 4),
        flip=options.flip if options.flip is not None else not digits,
        dtype=options.dtype,
        seed=options.seed,
    )
    images: Any = datasets.open(data, train=True, limit=limit)
    if data.startswith("folder:") and not (Path(data.removeprefix("folder:")).expanduser() / "test").is_dir():
        print(f"{data} has no folders train and test: the test error will be that of the training images", flush=True)
    card = architecture.describe(model, len(images.classes), images[0][0].shape[0])
    torch.manual_seed(options.seed)
    network = architecture.build(card)
    check_channels(network, images, model)
    if depth is not None:
        network = wrap(network, images[0][0][None])
    # After the network: thousands of images are decoded only for a network that there is.
    test: Any = datasets.open(data, train=False, card={"mean": images.mean.flatten(), "std": images.std.flatten()})
    state.out = str(out)
    if resume and not (out / "checkpoint.pt").exists():
        print(f"nothing to resume in {out}: the run begins", flush=True)
    parameters = sum(p.numel() for p in network.parameters())
    print(
        f"{model}: {parameters:,} parameters, {len(images):,} training and {len(test):,} test images of {data}",
        flush=True,
    )
    try:
        trained = training.train(
            network, images, test, out, recipe, resume=resume, device=where, forward=depth, card={"name": model, **card}
        )
    except KeyboardInterrupt:
        if (out / "checkpoint.pt").exists():
            state.resume = f"finished epochs are kept in {out}: run the same command with --resume to go on"
        raise
    print(f"test error {100 * trained.error:.2f} % after {recipe.epochs} epoch{'s' * (recipe.epochs != 1)}")
    print(f"wrote {out / 'weights.safetensors'} and {out / 'card.json'}")
    print(f"next: resens lesion {out} --data {data} --out {out}-lesion")


def _random_depth(options: Options) -> RandomDepth | None:
    """The forward that draws blocks, if one was asked for."""
    from ..training import sample_blocks, stochastic_depth

    if options.sample_blocks is not None and options.stochastic_depth is not None:
        raise ModelError("--sample-blocks and --stochastic-depth both draw the blocks of a batch: give one of them")
    if options.sample_blocks is not None:
        return sample_blocks(options.sample_blocks)
    return None if options.stochastic_depth is None else stochastic_depth(options.stochastic_depth)
