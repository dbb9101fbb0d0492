"""VGG of equal width: the sequential network with exactly one path, the contrast to every residual network.

Simonyan and Zisserman 2014 (arXiv 1409.1556), as Veit, Wilber and Belongie 2016 (arXiv 1605.06431) cut it up: 13
convolutions and 2 linear layers for 32 x 32 images.
"""

from __future__ import annotations

import torch
from torch import nn

from ..errors import ModelError

# Linear layers are always two; what differs is how many 3 x 3 convolutions stand between two poolings.
GROUPS: dict[int, tuple[int, ...]] = {
    9: (1, 1, 1, 2, 2),
    11: (1, 1, 2, 2, 3),
    13: (2, 2, 2, 2, 3),
    15: (2, 2, 3, 3, 3),
}


class VGG(nn.Module):
    """Groups of 3 x 3 convolutions with max-pooling between them, a global maximum, two linear layers.

    Every convolution after the first has `width` channels in and out, so that each of them can be deleted.
    [B, in_channels, H, W] float -> [B, classes] logits; H and W at least 16.
    Source: Simonyan and Zisserman 2014, widths equalised as in Veit et al. 2016.
    """

    def __init__(self, groups: tuple[int, ...], width: int, classes: int, in_channels: int, batch_norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for group, convolutions in enumerate(groups):
            if group:
                layers.append(nn.MaxPool2d(2))
            for _ in range(convolutions):
                layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=not batch_norm))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(width))
                layers.append(nn.ReLU())
                channels = width
        self.features = nn.Sequential(*layers)
        # Global instead of VGG's 7 x 7 grid: any input from 16 x 16 up fits, and the head is as narrow as the body.
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.classifier = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


def vgg(depth: int = 15, batch_norm: bool = True, width: int = 64, classes: int = 10, in_channels: int = 3) -> VGG:
    """A VGG with `depth` weighted layers, the last two of them linear.

    Depth is 9, 11, 13 or 15 (the paper's: convolutions 2-2-3-3-3), with or without batch norm.  Raises ModelError for
    any other depth.
    """
    if depth not in GROUPS:
        raise ModelError(f"vgg has no depth {depth}; choose {', '.join(map(str, GROUPS))}")
    if min(width, classes, in_channels) < 1:
        raise ModelError(
            f"vgg needs width, classes and in_channels of at least 1, not {width}, {classes} and {in_channels}"
        )
    return VGG(GROUPS[depth], width, classes, in_channels, batch_norm)
