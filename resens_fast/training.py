"""Training: SGD with one-cycle, crops and flips; a checkpoint after every epoch, from which a stopped run goes on.

Nesterov momentum and the one-cycle learning rate (Smith and Topin 2017, arXiv 1708.07120).  Everything random in an
epoch comes from the seed and the epoch's number, so that a resumed run ends with the network of an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .checkpoint import Checkpoint, finish
from .errors import DataError, ModelError
from .imageset import FolderData, ImageData
from .random_depth import RandomDepth, sample_blocks, stochastic_depth

__all__ = [
    "Accuracy",
    "Recipe",
    "Trained",
    "augment",
    "best_dtype",
    "measure",
    "sample_blocks",
    "stochastic_depth",
    "train",
]

Forward = Callable[[nn.Module, torch.Tensor], torch.Tensor]
Callback = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults suit residual networks on CIFAR-10.

    `warmup` is the share of the run in which the learning rate rises, `crop` the black border in pixels from which
    images are cropped, `dtype` "auto", "float32" or "bfloat16" (autocast).  Raises ModelError for impossible values.
    """

    epochs: int = 20
    batch: int = 128
    learning_rate: float = 0.2
    warmup: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    crop: int = 4
    flip: bool = True
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 2:
            raise ModelError(
                f"training needs 1 epoch and 2 images per batch or more, not {self.epochs} and {self.batch}"
            )
        if not 0 < self.learning_rate < math.inf:
            raise ModelError(f"the learning rate must be a positive number, not {self.learning_rate}")
        if not 0 < self.warmup < 1:
            raise ModelError(f"the warm-up is a share of the run between 0 and 1, not {self.warmup}")
        if not 0 <= self.momentum < 1 or not 0 <= self.weight_decay < math.inf:
            raise ModelError(f"momentum {self.momentum} or weight decay {self.weight_decay} is out of range")
        if self.crop < 0:
            raise ModelError(f"the border for crops must be 0 or more pixels, not {self.crop}")
        if self.seed < 0:
            raise ModelError(f"the seed must be 0 or more, not {self.seed}")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ModelError(f"the dtype must be auto, float32 or bfloat16, not {self.dtype!r}")


@dataclass(frozen=True)
class Accuracy:
    """What `measure` counts: wrong answers, images, and the mean cross-entropy."""

    errors: int
    images: int
    loss: float

    @property
    def error(self) -> float:
        """The share of wrong answers, 0 to 1."""
        return self.errors / self.images


@dataclass
class Trained:
    """A finished run: its folder, a row per epoch (the columns of metrics.csv), and what was left at the end."""

    out: Path
    history: list[dict[str, float]] = field(default_factory=list)
    final: Accuracy | None = None
    """Of the weights in the folder in float32, as the card has it and a lesion finds it; epochs are measured in the
    dtype of the training.
    """

    @property
    def error(self) -> float:
        """The share of wrong answers on the test set at the end, 0 to 1."""
        return self.history[-1]["test_error"] if self.final is None else self.final.error


def augment(images: torch.Tensor, crop: int, flip: bool, generator: torch.Generator) -> torch.Tensor:
    """Shifts every image by up to `crop` pixels each way over a black border and, with `flip`, mirrors half of them.

    images: uint8 [B, C, H, W], left as they are; the result has their shape and order.  The generator is a CPU one,
    so that every device sees the same crops.
    """
    if not crop and not flip:
        return images
    count, channels, height, width = images.shape
    device = images.device
    rows, columns = torch.arange(height).expand(count, -1), torch.arange(width).expand(count, -1)
    if crop:
        images = F.pad(images, (crop, crop, crop, crop))
        offsets = torch.randint(2 * crop + 1, (2, count, 1), generator=generator)
        rows, columns = rows + offsets[0], columns + offsets[1]
    if flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    image = torch.arange(count, device=device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=device).view(1, -1, 1, 1)
    return images[image, channel, rows.to(device)[:, None, :, None], columns.to(device)[:, None, None, :]]


@torch.inference_mode()
def measure(
    model: nn.Module,
    data: ImageData,
    batch: int = 250,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> Accuracy:
    """Error and mean cross-entropy of `model` in eval mode over all of `data`; its own mode is restored.

    dtype is that of autocast, torch.float32 for none.  A non-finite logit counts as an error.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    errors, loss = 0, 0.0
    try:
        with _bar(len(data), "test", progress) as advance:
            for begin in range(0, len(data), batch):
                images = data.normalise(data.images[begin : begin + batch].to(device))
                labels = data.labels[begin : begin + batch].to(device)
                with _autocast(device, dtype):
                    logits = model(images.contiguous(memory_format=torch.channels_last)).float()
                right = (logits.argmax(1) == labels) & logits.isfinite().all(1)
                errors += len(labels) - int(right.sum())
                loss += float(F.cross_entropy(logits, labels, reduction="sum"))
                advance(len(labels))
    finally:
        model.train(was_training)
    return Accuracy(errors, len(data), loss / len(data))


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    supports = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return torch.bfloat16 if device.type == "cpu" and supports is not None and supports() else torch.float32


def train(
    model: nn.Module,
    train_set: ImageData | FolderData,
    test_set: ImageData | FolderData,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    resume: bool = False,
    device: str | torch.device | None = None,
    forward: Forward | None = None,
    callback: Callback | None = None,
    card: dict[str, Any] | None = None,
    progress: bool = True,
) -> Trained:
    """Trains `model` in place and leaves checkpoint.pt, weights.safetensors, card.json and metrics.csv in `out`.

    `forward(model, images)` is how a batch goes through the network; with `sample_blocks(k)` or `stochastic_depth(p)`,
    which need a wrapped model, the plain network is what is measured after every epoch and what is left at the end.
    `callback(epoch, step, loss)` runs after every step, `card` is what the card shall say beside data, recipe and
    error; with `factory` and `arguments` in it, `models.load(out)` brings the network back.  The checkpoint is replaced
    atomically after every epoch, so that Ctrl-C or a kill costs at most one; `resume` goes on from it.  Raises
    ModelError if `out` holds a run and `resume` is not given, if the checkpoint is damaged or belongs to another recipe
    or network, or when the loss is no longer finite; DataError for sets that do not fit each other or the memory.
    """
    recipe = recipe or Recipe()
    depth = forward if isinstance(forward, RandomDepth) else None
    about = {**asdict(recipe), **(depth.about if depth else {})}
    learn, test = _check_sets(train_set, test_set)
    where = torch.device(device) if device is not None else next(model.parameters()).device
    dtype = best_dtype(where) if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    model.to(device=where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        model.parameters(),
        recipe.learning_rate,
        recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.momentum > 0,
    )
    steps = max(1, len(learn) // recipe.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        recipe.learning_rate,
        total_steps=steps * recipe.epochs,
        pct_start=recipe.warmup,
        cycle_momentum=False,
    )

    def plain() -> nn.Module:
        """What there is at test time."""
        return model if depth is None else depth.plain(model).model

    plain()  # a network that has none is refused before anything is written
    checkpoint = Checkpoint(Path(out), {**about, "images": len(learn)}, model, optimizer, schedule)
    result = Trained(Path(out), checkpoint.begin(resume))
    for epoch in range(len(result.history), recipe.epochs):
        began = time.perf_counter()
        rate = float(optimizer.param_groups[0]["lr"])
        loss, error = _epoch(model, learn, recipe, epoch, optimizer, schedule, dtype, forward, callback, progress)
        seconds = time.perf_counter() - began
        tested = measure(plain(), test, dtype=dtype, progress=progress)
        row: dict[str, float] = {
            "epoch": epoch + 1,
            "learning_rate": rate,
            "train_loss": loss,
            "train_error": error,
            "test_loss": tested.loss,
            "test_error": tested.error,
            "seconds": seconds,
            "images_per_second": steps * min(recipe.batch, len(learn)) / seconds,
        }
        result.history.append(row)
        checkpoint.save(result.history)
        if progress:
            print(
                f"epoch {epoch + 1}/{recipe.epochs}: training loss {loss:.4f}, test error {100 * tested.error:.2f} % "
                f"({seconds:.0f} s, {row['images_per_second']:.0f} images/s)",
                flush=True,
            )
    if depth is not None:
        model.load_state_dict(plain().state_dict())
        model = model.model  # type: ignore[assignment]  # a wrapped network: eager, as those who load it measure
    final = result.final = measure(model, test, progress=progress)
    known = {
        "train_images": len(learn),
        "test_images": final.images,
        "errors": final.errors,
        "error": final.error,
        "loss": final.loss,
        "recipe": {**about, "dtype": str(dtype).removeprefix("torch.")},
        "minutes": round(sum(row["seconds"] for row in result.history) / 60, 2),
    }
    finish(result.out, model, {**(card or {}), **_images_card(learn), **known})
    return result


def _epoch(
    model: nn.Module,
    data: ImageData,
    recipe: Recipe,
    epoch: int,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    dtype: torch.dtype,
    forward: Forward | None,
    callback: Callback | None,
    progress: bool,
) -> tuple[float, float]:
    """One pass over `data` in a fresh order; mean loss and share of errors on the augmented images."""
    device = next(model.parameters()).device
    # One stream per epoch: resuming needs no memory of what was drawn before. The global one is for dropout and masks.
    seed = recipe.seed * 1_000_003 + epoch
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model.train()
    total, wrong, seen = 0.0, torch.zeros((), device=device), 0
    for step, (images, labels) in enumerate(_batches(data, recipe, epoch, generator, device, progress)):
        with _autocast(device, dtype):
            logits = model(images) if forward is None else forward(model, images)
            loss = F.cross_entropy(logits.float(), labels)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ModelError(
                f"the training loss is {value} in epoch {epoch + 1}, step {step + 1}: start again with a learning rate "
                f"below {recipe.learning_rate}"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        total += value * len(labels)
        wrong += (logits.detach().argmax(1) != labels).sum()
        seen += len(labels)
        if callback is not None:
            callback(epoch, step, value)
    return total / seen, float(wrong) / seen


def _batches(
    data: ImageData, recipe: Recipe, epoch: int, generator: torch.Generator, device: torch.device, progress: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Full batches in random order; the few images left over have their turn in another epoch."""
    order = torch.randperm(len(data), generator=generator)
    batch = min(recipe.batch, len(data))
    with _bar(len(data) // batch * batch, f"epoch {epoch + 1}/{recipe.epochs}", progress) as advance:
        for begin in range(0, len(data) - batch + 1, batch):
            chosen = order[begin : begin + batch]
            images = augment(data.images[chosen].to(device), recipe.crop, recipe.flip, generator)
            yield data.normalise(images).contiguous(memory_format=torch.channels_last), data.labels[chosen].to(device)
            advance(batch)


@contextlib.contextmanager
def _bar(total: int, title: str, shown: bool) -> Iterator[Callable[[int], Any]]:
    """A progress bar with speed and time left; yields the function that advances it."""
    if not shown:
        yield lambda _: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=title, unit=" images", leave=False, mininterval=0.5) as bar:
        yield bar.update


def _autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def _check_sets(learn: ImageData | FolderData, test: ImageData | FolderData) -> tuple[ImageData, ImageData]:
    for data in (learn, test):
        if not isinstance(data, ImageData):
            raise DataError(f"{data.name} is too large to be trained on from memory: train on fewer images")
        if not len(data):
            raise DataError(f"{data.name} has no images")
    assert isinstance(learn, ImageData)
    assert isinstance(test, ImageData)
    if len(learn) < 2:
        raise DataError(f"{learn.name} has a single image: batch norm needs at least 2")
    if learn.classes != test.classes:
        raise DataError(f"{learn.name} and {test.name} have different classes: {learn.classes} and {test.classes}")
    if learn.images.shape[1:] != test.images.shape[1:]:
        sizes = [" x ".join(map(str, data.images.shape[1:])) for data in (learn, test)]
        raise DataError(f"{learn.name} and {test.name} have images of different size: {sizes[0]} and {sizes[1]}")
    return learn, test


def _images_card(data: ImageData) -> dict[str, Any]:
    return {
        "data": data.name.removesuffix(" (train)"),
        "classes": list(data.classes),
        "input_shape": list(data.images.shape[1:]),
        "mean": [round(value, 6) for value in data.mean.flatten().tolist()],
        "std": [round(value, 6) for value in data.std.flatten().tolist()],
    }
