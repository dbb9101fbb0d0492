"""Highway networks: residual blocks with a learned gate, the generalisation that the paper's gate statistics are about.

Srivastava, Greff and Schmidhuber 2015 (arXiv 1505.00387), with convolutions.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import ModelError


class HighwayBlock(nn.Module):
    """y = s + t * (f - s) with f = relu(bn2(conv2(relu(bn1(conv1(x)))))) and the transform gate t = sigmoid(gate(x)).

    s = x, or shortcut(x) where the shape changes.  The gate is a 3 x 3 convolution whose bias begins below zero, so
    that an untrained block mostly lets its input through.
    """

    def __init__(self, before: int, width: int, stride: int, bias: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.gate = nn.Conv2d(before, width, 3, stride, 1)
        changes = stride != 1 or before != width
        self.shortcut = nn.Conv2d(before, width, 1, stride, bias=False) if changes else None
        nn.init.constant_(self.gate.bias, bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = x if self.shortcut is None else self.shortcut(x)
        f = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        t = torch.sigmoid(self.gate(x))
        return s + t * (f - s)


class Highway(nn.Module):
    """3 x 3 stem, three stages of n highway blocks, mean over pixels, linear.

    [B, in_channels, H, W] float -> [B, classes] logits.  Source: Srivastava et al. 2015.
    """

    def __init__(self, n: int, classes: int, width: int, in_channels: int, gate_bias: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        blocks: list[nn.Module] = []
        channels = width
        for stage in range(3):
            for position in range(n):
                blocks.append(HighwayBlock(channels, width << stage, 2 if stage and not position else 1, gate_bias))
                channels = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(F.relu(self.bn(self.conv(x)))).mean(dim=(2, 3)))


def highway(depth: int, classes: int = 10, width: int = 16, in_channels: int = 3, gate_bias: float = -2.0) -> Highway:
    """A highway network of three equal stages for small images, of depth 6n+2 (gates are not counted).

    `gate_bias` is where the gates begin: sigmoid(-2) lets 0.12 of the branch through.  Raises ModelError for a depth
    that does not exist.
    """
    if depth <= 2 or (depth - 2) % 6:
        nearest = max(1, round((depth - 2) / 6)) * 6 + 2
        raise ModelError(f"highway has no depth {depth}: it must be 6n+2, for example {nearest}")
    if min(width, classes, in_channels) < 1:
        raise ModelError(
            f"highway needs width, classes and in_channels of at least 1, not {width}, {classes} and {in_channels}"
        )
    return Highway((depth - 2) // 6, classes, width, in_channels, gate_bias)
