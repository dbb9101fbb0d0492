"""Finds and opens data sets: digits, CIFAR-10, Fashion-MNIST or a folder of images, normalised as a card says."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import DataError, first_line
from .imageset import FolderData, ImageData, Shape, Statistics, image_size

SPECS = "digits, cifar10, cifar10:PATH, fashion-mnist or folder:PATH"
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp", ".tif", ".tiff")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_FOLDERS = ("cifar10", "cifar10-jpeg", "cifar-10", "CIFAR-10-images")
# Mean and standard deviation of each channel in [0, 1] over the training images; the card of a network overrides them.
CIFAR10: Statistics = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
DIGITS: Statistics = (0.305,), (0.376,)
FASHION: Statistics = (0.286,), (0.353,)
IMAGENET: Statistics = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY: Statistics = (0.449,), (0.226,)
DIGITS_TEST = 500  # of scikit-learn's 1,797 images, which have no split of their own
MEMORY = 2 << 30  # folders with more bytes of pixels than this are decoded as they are read

Card = Mapping[str, Any]


def open(spec: str, train: bool = False, card: Card | None = None, limit: int | None = None) -> ImageData | FolderData:
    """Opens a data set by name: digits, cifar10, cifar10:PATH, fashion-mnist or folder:PATH.

    The test split unless `train`.  digits: 1,297 training and 500 test images, a fixed stratified split of
    scikit-learn's 1,797.  folder:PATH reads PATH/train or PATH/test where they exist, else PATH; a folder per class.
    `card` (as `models.card` gives it) decides mean, std and, for a folder, channels and size.  `limit` keeps that many
    images, always the same ones, drawn over the whole set; smaller limits keep subsets of larger ones.
    cifar10 and fashion-mnist are downloaded when no copy is found.  Raises DataError, naming the file or the value,
    for anything missing, empty, damaged or of another shape than the card's.
    """
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} leaves no images: give at least 1")
    kind, _, path = spec.partition(":")
    data: ImageData | FolderData
    if spec == "digits":
        data = _digits(train, card)
    elif spec == "cifar10" or (kind == "cifar10" and path):
        data = _cifar10(Path(path).expanduser() if path else None, train, card)
    elif spec == "fashion-mnist":
        data = _fashion(train, card)
    elif kind == "folder" and path:
        data = _folder(Path(path).expanduser(), train, card, None, None)
    else:
        raise DataError(f"there is no data set {spec!r}: choose {SPECS}")
    if limit is not None and limit < len(data):
        data = data.subset(np.sort(np.random.RandomState(0).permutation(len(data))[:limit]))
    _check(data, card)
    if isinstance(data, FolderData) and len(data) * int(np.prod(data.shape)) <= MEMORY:
        data = data.in_memory()
    return data


def find_cifar10() -> str | None:
    """The spec of a copy of CIFAR-10 on this machine, or None; downloads nothing.

    Looks in RESENS_FAST_DATA, ~/.cache/resens_fast and ./data for torchvision's cifar-10-batches-py, and there and in
    subfolders such as cifar10 for test and train with a folder of images per class.
    """
    for root in _roots():
        for folder in (root, *(root / name for name in CIFAR10_FOLDERS)):
            if (folder / "cifar-10-batches-py").is_dir() or _has_cifar10_classes(folder / "test"):
                return f"cifar10:{folder}"
    return None


def split(labels: np.ndarray, test: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A fixed stratified split into (train, test) indices, ascending; every class gives its share of the `test` images.

    labels: int [N].  Drawn from numpy's frozen RandomState, so that it is the same on every machine and version.
    """
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * test / len(labels)
    quota = np.floor(exact).astype(int)
    # The images that rounding down left over go to the largest remainders.
    quota[np.argsort(quota - exact, kind="stable")[: test - quota.sum()]] += 1
    random = np.random.RandomState(seed)
    chosen = [random.permutation(np.flatnonzero(labels == c))[:q] for c, q in zip(classes, quota, strict=True)]
    inside = np.zeros(len(labels), dtype=bool)
    inside[np.concatenate(chosen)] = True
    return np.flatnonzero(~inside), np.flatnonzero(inside)


def _roots() -> list[Path]:
    named = os.environ.get("RESENS_FAST_DATA")
    cache = Path(os.path.expanduser("~/.cache/resens_fast"))
    return ([Path(named).expanduser()] if named else []) + [cache, Path("data")]


def _has_cifar10_classes(folder: Path) -> bool:
    return all((folder / name).is_dir() for name in CIFAR10_CLASSES)


def _statistics(card: Card | None, default: Statistics) -> Statistics:
    if card is None or card.get("mean") is None or card.get("std") is None:
        return default
    return tuple(map(float, card["mean"])), tuple(map(float, card["std"]))


def _check(data: ImageData | FolderData, card: Card | None) -> None:
    """What the card says about images and classes against what was found."""
    shape = tuple(data.images.shape[1:]) if isinstance(data, ImageData) else data.shape
    network = (card or {}).get("name", "the network")
    if card and card.get("input_shape") and tuple(card["input_shape"]) != shape:
        raise DataError(
            f"{data.name} has images of {_size(shape)}, but {network} takes {_size(card['input_shape'])}: "
            "choose another data set or network"
        )
    if card and card.get("classes") and len(card["classes"]) != len(data.classes):
        raise DataError(
            f"{data.name} has {len(data.classes)} classes, but {network} knows {len(card['classes'])}: "
            "choose another data set or network"
        )
    if card and card.get("classes") and _mean_others(card["classes"], data.classes):
        raise DataError(
            f"{data.name} has the classes {_few(data.classes)}, but {network} was trained on {_few(card['classes'])}: "
            "its answers would not mean the same; choose the data that it was trained on"
        )


def _mean_others(known: Sequence[str], found: Sequence[str]) -> bool:
    """Whether the labels of one list cannot be those of the other: no name in common, or the same in another order."""
    a, b = [str(name).lower() for name in known], [str(name).lower() for name in found]
    return not set(a) & set(b) or (a != b and sorted(a) == sorted(b))


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:3])) + ("" if len(names) <= 3 else ", ...")


def _size(shape: Iterable[int]) -> str:
    return " x ".join(str(size) for size in shape)


def _split_name(name: str, train: bool) -> str:
    return f"{name} ({'train' if train else 'test'})"


def _digits(train: bool, card: Card | None) -> ImageData:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("the digits come with scikit-learn, which is not installed: pip install scikit-learn") from None
    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    chosen = split(labels, DIGITS_TEST)[0 if train else 1]
    classes = [str(digit) for digit in range(10)]
    name = _split_name("digits", train)
    return ImageData(
        torch.from_numpy(images[chosen]), torch.from_numpy(labels[chosen]), classes, _statistics(card, DIGITS), name
    )


def _cifar10(path: Path | None, train: bool, card: Card | None) -> ImageData | FolderData:
    if path is None:
        found = find_cifar10()
        path = Path(found.partition(":")[2]) if found else Path.home() / ".cache" / "resens_fast"
        if found is None:
            _download("CIFAR10", "CIFAR-10", path)
    if path.name == "cifar-10-batches-py":
        path = path.parent
    if (path / "cifar-10-batches-py").is_dir():
        archive = _archive("CIFAR10", path, train, path / "cifar-10-batches-py")
        images = torch.from_numpy(archive.data).permute(0, 3, 1, 2).contiguous()
        labels = torch.tensor(archive.targets, dtype=torch.int64, device="cpu")
        return ImageData(images, labels, CIFAR10_CLASSES, _statistics(card, CIFAR10), _split_name("cifar10", train))
    data = _folder(path, train, card, CIFAR10, (3, 32, 32))
    if data.classes != CIFAR10_CLASSES:
        raise DataError(
            f"{path} has {len(data.classes)} classes ({data.classes[0]}, ...), which are not CIFAR-10's ten: "
            f"use folder:{path} for other images"
        )
    jpeg = data.files[0].suffix.lower() in (".jpg", ".jpeg")
    data.name = _split_name("cifar10-jpeg" if jpeg else "cifar10", train)
    return data


def _fashion(train: bool, card: Card | None) -> ImageData:
    roots = [root for root in _roots() if (root / "FashionMNIST" / "raw").is_dir()]
    root = roots[0] if roots else Path.home() / ".cache" / "resens_fast"
    if not roots:
        _download("FashionMNIST", "Fashion-MNIST", root)
    archive = _archive("FashionMNIST", root, train, root / "FashionMNIST")
    images, labels = archive.data[:, None].contiguous(), archive.targets.long()
    return ImageData(images, labels, archive.classes, _statistics(card, FASHION), _split_name("fashion-mnist", train))


def _torchvision() -> Any:
    try:
        import torchvision.datasets
    except ImportError:
        raise DataError(
            "this data set is read with torchvision, which is not installed: pip install torchvision"
        ) from None
    return torchvision.datasets


def _archive(kind: str, root: Path, train: bool, folder: Path) -> Any:
    # Opened before the try block: that torchvision is missing is another sentence than that the data are damaged.
    reader: Callable[..., Any] = getattr(_torchvision(), kind)
    try:
        return reader(str(root), train=train)
    except Exception as reason:  # RuntimeError (checksum), OSError, EOFError, ValueError, UnpicklingError
        raise DataError(
            f"{folder} is incomplete or damaged ({first_line(reason)}): delete it and fetch it again"
        ) from None


def _download(kind: str, title: str, root: Path) -> None:
    import socket

    reader: Callable[..., Any] = getattr(_torchvision(), kind)
    before = socket.getdefaulttimeout()
    # Without it a machine behind a silent firewall waits for minutes before it learns that there is no network.
    socket.setdefaulttimeout(20)
    try:
        root.mkdir(parents=True, exist_ok=True)
        print(f"downloading {title} to {root}", flush=True)
        reader(str(root), download=True)
    except (OSError, RuntimeError, EOFError) as reason:
        raise DataError(
            f"{title} is not in {', '.join(map(str, _roots()))} and cannot be downloaded ({first_line(reason)}): "
            "put a copy into one of these folders, name its folder in RESENS_FAST_DATA, or use digits, which needs none"
        ) from None
    finally:
        socket.setdefaulttimeout(before)


def _folder(
    path: Path, train: bool, card: Card | None, statistics: Statistics | None, shape: Shape | None
) -> FolderData:
    if not path.is_dir():
        raise DataError(
            f"there is no folder {path}: give one with a folder of images per class, or with train and test"
        )
    wanted, other = ("train", "test") if train else ("test", "train")
    root = path / wanted
    if not root.is_dir():
        if (path / other).is_dir():
            raise DataError(f"{path} has a folder {other} but no folder {wanted}, which is needed here")
        root = path
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not classes:
        raise DataError(f"{root} has no folders: images are read from one folder per class")
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        inside = sorted(file for file in (root / name).rglob("*") if file.suffix.lower() in SUFFIXES)
        if not inside:
            raise DataError(f"{root / name} has no images ({' '.join(SUFFIXES)}): every class needs at least one")
        files += inside
        labels += [label] * len(inside)
    channels = 3
    if card and card.get("input_shape"):
        channels, height, width = map(int, card["input_shape"])
        shape = channels, height, width
    elif shape is None:
        channels = len(card["mean"]) if card and card.get("mean") is not None else 3
        shape = channels, *image_size(files[0])
    default = statistics or (GREY if channels == 1 else IMAGENET)
    name = path.name or str(path)
    return FolderData(
        files, labels, classes, shape, _statistics(card, default), name if root == path else _split_name(name, train)
    )
