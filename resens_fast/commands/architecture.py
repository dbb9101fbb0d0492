"""Untrained networks by name, for `resens train` and for the folders it writes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError

if TYPE_CHECKING:
    from torch import nn

NAMES = "resnetN, resnetN-post (N = 6n+2), resnetN-bottleneck (N = 9n+2), vgg15, vgg15-plain (no batch norm), highwayN"


def describe(name: str, classes: int, channels: int) -> dict[str, Any]:
    """The factory and its arguments, as a card keeps them.  Raises ModelError for a name that is no architecture."""
    if ":" in name:
        return {"factory": name, "arguments": {}}
    found = re.fullmatch(r"(resnet|vgg|highway)(\d+)(-post|-bottleneck|-plain)?", name)
    family, depth, variant = (found[1], int(found[2]), found[3] or "") if found else ("", 0, "")
    allowed: dict[tuple[str, str], dict[str, Any]] = {
        ("resnet", ""): {"bottleneck": False},
        ("resnet", "-post"): {"bottleneck": False, "preactivation": False},
        ("resnet", "-bottleneck"): {"bottleneck": True},
        ("vgg", ""): {},
        ("vgg", "-plain"): {"batch_norm": False},
        ("highway", ""): {},
    }
    if (family, variant) not in allowed:
        raise ModelError(f"there is no architecture {name!r}: choose {NAMES}, or module:factory")
    arguments = {"depth": depth, **allowed[family, variant], "classes": classes, "in_channels": channels}
    return {"factory": family, "arguments": arguments}


def build(card: dict[str, Any]) -> nn.Module:
    """The untrained network that a card describes.  Raises ModelError, naming what the card lacks or gets wrong."""
    if ":" in str(card.get("factory", "")):
        from .loading import from_factory

        return from_factory(card["factory"])
    from ..models.zoo import build as from_card

    try:
        return from_card(card)
    except (KeyError, TypeError) as error:
        raise ModelError(
            f"the card describes no network ({error}): factory or arguments are missing or wrong"
        ) from None


def is_trained(model: str) -> bool:
    """Whether MODEL is a folder that `resens train` finished."""
    return (Path(model) / "weights.safetensors").is_file() and (Path(model) / "card.json").is_file()
