"""Trained networks: those that ship with the package, and those that a training run left in a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from .highway import highway
from .resnet import resnet
from .vgg import vgg

WEIGHTS = Path(__file__).parent / "weights"  # NAME.safetensors and NAME.json for each shipped network
FACTORIES: dict[str, Callable[..., nn.Module]] = {"resnet": resnet, "vgg": vgg, "highway": highway}


def names() -> list[str]:
    """The names of the shipped networks, in alphabetical order."""
    return sorted(path.stem for path in WEIGHTS.glob("*.json"))


def card(name: str) -> dict[str, Any]:
    """What is known about a network: data, mean, std, classes, input_shape, recipe, error of the weights, licence.

    `name` is a shipped one or a folder that training left.  Raises ModelError for an unknown name or a damaged card.
    """
    path, _ = _files(name)
    try:
        known = json.loads(path.read_text())
        if not {"factory", "arguments", "sha256"} <= known.keys():
            raise ValueError("factory, arguments or sha256 is missing")
    except (OSError, ValueError, AttributeError) as reason:
        raise ModelError(f"the card {path} is damaged ({reason}): {_remedy(name)}") from None
    return known


def load(name: str) -> nn.Module:
    """A trained network, shipped or from the folder of a training run; in eval mode, float32, on the CPU.

    Raises ModelError for an unknown name or for weights that are missing, truncated or not the ones on the card.
    """
    known = card(name)
    _, path = _files(name)
    try:
        content = path.read_bytes()
    except OSError as reason:
        raise ModelError(f"the weights {path} cannot be read ({reason.strerror}): {_remedy(name)}") from None
    if hashlib.sha256(content).hexdigest() != known["sha256"]:
        raise ModelError(
            f"the weights {path} ({len(content)} bytes) are damaged or not those on the card of {name}: {_remedy(name)}"
        )
    from safetensors.torch import load as read

    model = build(known)
    model.load_state_dict(unpack(read(content)))
    model.input_shape = tuple(known["input_shape"])  # type: ignore[assignment]  # wrap() need not guess it
    return model.eval()


def build(known: Mapping[str, Any]) -> nn.Module:
    """The untrained network that a card describes by `factory` and `arguments`; raises ModelError for others."""
    factory = FACTORIES.get(known["factory"])
    if factory is None:
        raise ModelError(
            f"the factory {known['factory']!r} is not one of {', '.join(sorted(FACTORIES))}: "
            "name the network as module:factory and give its weights as a checkpoint"
        )
    return factory(**known["arguments"])


def pack(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict for shipping: convolutions and linear layers in float16, everything else as it is.

    Batch norm keeps float32: it is a hundredth of the bytes, and a running variance can leave the range of float16.
    """
    return {
        key: (value.half() if value.is_floating_point() and value.ndim > 1 else value).detach().cpu().contiguous()
        for key, value in state.items()
    }


def unpack(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The float32 state dict of a packed one."""
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def _files(name: str) -> tuple[Path, Path]:
    """Card and weights."""
    if name in names():
        return WEIGHTS / f"{name}.json", WEIGHTS / f"{name}.safetensors"
    folder = Path(name).expanduser()
    if (folder / "card.json").is_file():
        return folder / "card.json", folder / "weights.safetensors"
    if (folder / "checkpoint.pt").is_file():
        raise ModelError(f"the training in {name} has not ended: resume it first")
    raise ModelError(f"there is no network {name!r}: choose {', '.join(names())} or a folder that training left")


def _remedy(name: str) -> str:
    return "install the package again" if name in names() else "train again or restore the file"
