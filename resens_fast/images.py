"""Images and labels from whatever a PyTorch user has: a DataLoader, a Dataset or two arrays; checked before anything
is computed on them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from .errors import DataError, first_line
from .structure import Structure

_LOADER_BATCH = 256


class ImageReader:
    """Reads the data once, in order, in pieces of any size.

    data: a DataLoader, a map-style Dataset of (image, label), or ``(images [N, C, H, W], labels [N])``.
    ``total`` is the number of images when it can be known beforehand, else None; ``digest`` is of all that were taken.
    """

    def __init__(self, data: Any, structure: Structure) -> None:
        self.structure = structure
        self.position = 0
        self.shuffles = False
        self.digest = ImageHash()
        self._left: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._size: list[int] | None = None
        self.total: int | None
        if isinstance(data, (tuple, list)) and len(data) == 2:
            images, labels = tensor(data[0], "images"), tensor(data[1], "labels")
            self.total = len(images) if images.ndim else 0
            self._source: Iterator[Any] = iter([(images, labels)] if self.total else [])
        elif isinstance(data, torch.utils.data.DataLoader):
            self.shuffles = isinstance(data.sampler, torch.utils.data.RandomSampler)
            self.total = _length(data.dataset) if not data.drop_last else None
            if isinstance(data.sampler, torch.utils.data.Sampler) and self.total is not None:
                self.total = _length(data.sampler)
            self._source = iter(data)
        elif hasattr(data, "__getitem__") and hasattr(data, "__len__"):
            self.total = len(data)
            if self.total == 0:
                raise DataError("the data set is empty: it has no images")
            self._source = iter(torch.utils.data.DataLoader(data, batch_size=_LOADER_BATCH))
        else:
            raise DataError(f"data must be a DataLoader, a Dataset or (images, labels), not {type(data).__name__}")
        if self.total == 0:
            raise DataError("the data set is empty: it has no images")

    def peek(self) -> torch.Tensor:
        """The next image [1, C, H, W] without taking it; none [0, C, H, W] at the end."""
        self._fill(1)
        return self._left[0][0][:1] if self._left else torch.empty(0, *self.structure.input_shape, device="cpu")

    def take(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The next ``count`` images [B, C, H, W] and labels int64 [B]; fewer at the end, none after it."""
        have = self._fill(count)
        if not self._left:
            none = torch.empty(0, dtype=torch.int64, device="cpu")
            return torch.empty(0, *self.structure.input_shape, device="cpu"), none
        images, labels = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*self._left, strict=True))
        self._left = [(images[count:], labels[count:])] if have > count else []
        self.position += min(have, count)
        self.digest.update(images[:count], labels[:count])
        return images[:count], labels[:count]

    def _fill(self, count: int) -> int:
        have = sum(len(labels) for _, labels in self._left)
        while have < count and (batch := self._next()) is not None:
            images, labels = self._check(batch)
            size = list(images.shape[1:])
            if self._size not in (None, size):
                raise _of_two_sizes(f"{self._size} and {size}")
            self._size = size
            self._left.append((images, labels))
            have += len(labels)
        return have

    def _next(self) -> Any:
        try:
            return next(self._source, None)
        except (TypeError, RuntimeError) as error:
            for line in str(error).splitlines():  # of several workers too; all else is the data set's own affair
                if "stack expects each tensor to be equal size" in line:
                    raise _of_two_sizes(line.partition("but got ")[2]) from None
                if "default_collate: batch must contain" in line:
                    found = line.partition("found ")[2]
                    raise DataError(f"the data set yields {found}; give it a transform that makes tensors") from None
            raise

    def _check(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise DataError(f"the data must yield (images, labels), not {type(batch).__name__}")
        images, labels = tensor(batch[0], "images"), tensor(batch[1], "labels")
        check_images(images, self.structure)
        if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.is_complex():
            raise DataError(
                f"labels must be one whole number per image, shape [{len(images)}], not {labels.dtype} "
                f"{list(labels.shape)}"
            )
        labels = labels.long()
        wrong = ((labels < 0) | (labels >= self.structure.classes)).nonzero()
        if len(wrong):
            first = int(wrong[0])
            index = self.position + sum(len(part) for _, part in self._left) + first
            raise DataError(
                f"image {index} has the label {int(labels[first])}, but the network has "
                f"{self.structure.classes} classes "
                f"(0 to {self.structure.classes - 1}); is this the right data set?"
            )
        return images, labels


def _of_two_sizes(sizes: str) -> DataError:
    return DataError(f"the images have different sizes, {sizes}; resize or crop them to one")


def tensor(values: Any, name: str) -> torch.Tensor:
    """A dense tensor with values, from a tensor, an array or nested lists; DataError for anything else."""
    try:
        found = values if isinstance(values, torch.Tensor) else torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{name} must be a tensor or an array of numbers, not {type(values).__name__} ({first_line(error)})"
        ) from None
    if found.is_meta or found.layout != torch.strided:
        raise DataError(f"{name} must be a dense tensor with values, not one of {found.device} in {found.layout}")
    return found


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def check_images(images: torch.Tensor, structure: Structure) -> None:
    """DataError unless images are floating point [B, C, H, W] with the network's channel count."""
    if images.ndim != 4 or images.shape[1] != structure.input_shape[0] or 0 in images.shape[1:]:
        wanted = ", ".join(map(str, structure.input_shape))
        raise DataError(f"images have the shape {list(images.shape)}, but the network takes [B, {wanted}]")
    if not images.is_floating_point():
        raise DataError(
            f"images are {images.dtype}; normalise them to floating point first, the way the network was trained"
        )


class ImageHash:
    """SHA-256 of images (as float32) and labels, in order; how they were divided into batches does not matter."""

    def __init__(self) -> None:
        self._images, self._labels = hashlib.sha256(), hashlib.sha256()

    def update(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self._images.update(np.ascontiguousarray(images.detach().cpu().float().numpy()).data)
        self._labels.update(np.ascontiguousarray(labels.detach().cpu().long().numpy()).data)

    def hexdigest(self) -> str:
        return hashlib.sha256(self._images.digest() + self._labels.digest()).hexdigest()
