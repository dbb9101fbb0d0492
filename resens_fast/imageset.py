"""Sets of labelled images, in memory as bytes or decoded from files as they are read; never shuffled or augmented."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .errors import DataError, first_line

Statistics = tuple[
    tuple[float, ...], tuple[float, ...]
]  # mean and standard deviation of each channel, images in [0, 1]
Shape = tuple[int, int, int]


class ImageData(Dataset[tuple[torch.Tensor, int]]):
    """Images in memory as bytes, read as normalised float32.

    images: uint8 [N, C, H, W]; labels: int64 [N], each an index into `classes`.
    `data[i]` is (float32 [C, H, W], int); `data.tensors()` is everything at once.
    Raises DataError when the statistics are not one value per channel.
    """

    def __init__(
        self, images: torch.Tensor, labels: torch.Tensor, classes: Sequence[str], statistics: Statistics, name: str
    ) -> None:
        _check_statistics(statistics, images.shape[1], name)
        self.images, self.labels, self.classes, self.name = images, labels, tuple(classes), name
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in statistics)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.normalise(self.images[index]), int(self.labels[index])

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Bytes [..., C, H, W] to normalised float32 of the same shape, on the bytes' device."""
        return normalise(images, self.mean, self.std)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole set: (float32 [N, C, H, W], int64 [N])."""
        return self.normalise(self.images), self.labels

    def subset(self, indices: np.ndarray) -> ImageData:
        """The images at `indices` (int [M]), in that order."""
        chosen = torch.from_numpy(np.ascontiguousarray(indices, dtype=np.int64))
        statistics = tuple(self.mean.flatten().tolist()), tuple(self.std.flatten().tolist())
        return ImageData(self.images[chosen], self.labels[chosen], self.classes, statistics, self.name)


class FolderData(Dataset[tuple[torch.Tensor, int]]):
    """Images in files, decoded as they are read.

    An image of `shape` [C, H, W] is taken as it is; a larger one is resized (shorter side to 8/7 of the shape's) and
    centre cropped; a smaller one is a DataError.  `data[i]` is (float32 [C, H, W], int).
    """

    def __init__(
        self,
        files: Sequence[Path],
        labels: Sequence[int],
        classes: Sequence[str],
        shape: Shape,
        statistics: Statistics,
        name: str,
    ) -> None:
        _check_statistics(statistics, shape[0], name)
        self.files, self.labels = tuple(files), torch.tensor(labels, dtype=torch.int64)
        self.classes, self.shape, self.statistics, self.name = tuple(classes), shape, statistics, name
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in statistics)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        pixels = torch.tensor(decode(self.files[index], self.shape))
        return normalise(pixels, self.mean, self.std), int(self.labels[index])

    def in_memory(self) -> ImageData:
        """The same images decoded once, on several threads; a progress bar shows after two seconds."""
        images = torch.empty(len(self), *self.shape, dtype=torch.uint8)
        target = images.numpy()

        def place(index: int) -> None:
            target[index] = decode(self.files[index], self.shape)

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for _ in _progress(pool.map(place, range(len(self))), len(self), f"decoding {self.name}"):
                pass
        return ImageData(images, self.labels, self.classes, self.statistics, self.name)

    def subset(self, indices: np.ndarray) -> FolderData:
        """The images at `indices` (int [M]), in that order."""
        files, labels = [self.files[i] for i in indices], [int(self.labels[i]) for i in indices]
        return FolderData(files, labels, self.classes, self.shape, self.statistics, self.name)


def normalise(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """(images / 255 - mean) / std in float32; images uint8 [..., C, H, W], mean and std [C, 1, 1]."""
    return images.float().div_(255).sub_(mean.to(images.device)).div_(std.to(images.device))


def decode(file: Path, shape: Shape) -> np.ndarray:
    """The pixels of an image file, uint8 [C, H, W]; raises DataError, naming it, if it is damaged or too small."""
    from PIL import Image

    channels, height, width = shape
    try:
        with Image.open(file) as opened:
            image = opened.convert("L" if channels == 1 else "RGB")
    except Exception as reason:  # Pillow raises OSError, SyntaxError, ValueError and struct.error for damaged files
        raise DataError(f"{file} is not a readable image ({first_line(reason)}): replace or remove it") from None
    if image.size != (width, height):
        if image.width < width or image.height < height:
            raise DataError(
                f"{file} has {image.height} x {image.width} pixels, fewer than the {height} x {width} of the network "
                "or of the first image: use images of one size or larger ones, or with module:factory name a smaller "
                "--image-size"
            )
        scale = max(height / image.height, width / image.width) * 8 / 7
        if scale < 1:
            size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
            image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def image_size(file: Path) -> tuple[int, int]:
    """Height and width of an image file; raises DataError, naming it, if it is damaged."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.height, image.width
    except Exception as reason:
        raise DataError(f"{file} is not a readable image ({first_line(reason)}): replace or remove it") from None


def _check_statistics(statistics: Statistics, channels: int, name: str) -> None:
    mean, std = statistics
    if len(mean) != channels or len(std) != channels:
        raise DataError(
            f"{name} has images of {channels} channel{'s' * (channels != 1)}, but the mean has {len(mean)} and the "
            f"standard deviation {len(std)} values: choose another data set or network, or give one value per channel"
        )
    if not all(np.isfinite([*mean, *std])) or min(std) <= 0:
        raise DataError(f"a standard deviation must be positive and all values finite, not mean {mean} and std {std}")


def _progress(steps: Iterable[Any], total: int, title: str) -> Iterable[Any]:
    try:
        from tqdm import tqdm
    except ImportError:
        return steps
    return tqdm(steps, total=total, desc=title, delay=2, leave=False, unit=" images")
