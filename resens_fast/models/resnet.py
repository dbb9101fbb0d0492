"""Residual networks for small images: pre-activation and post-activation, basic and bottleneck blocks, three stages.

He et al. 2015 (arXiv 1512.03385, section 4.2) and 2016 (arXiv 1603.05027).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import ModelError


class PadShortcut(nn.Module):
    """He's option A: every `stride`-th pixel, the missing channels filled with zeros, half of them on each side.

    [B, before, H, W] -> [B, after, H / stride, W / stride]. No parameters.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.front = (after - before) // 2
        self.back = after - before - self.front

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.front, self.back))


def _shortcut(before: int, after: int, stride: int, option: str, norm: bool) -> nn.Module | None:
    """What stands beside the branch: None is the identity."""
    if before == after and stride == 1:
        return None
    if option == "pad":
        return PadShortcut(before, after, stride)
    convolution = nn.Conv2d(before, after, 1, stride, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after)) if norm else convolution


class PreActBasic(nn.Module):
    """h = relu(bn1(x)); y = s + conv2(relu(bn2(conv1(h)))), s = x, or shortcut(h) where the shape changes."""

    expansion = 1

    def __init__(self, before: int, width: int, stride: int, option: str) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = _shortcut(before, width, stride, option, norm=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.bn1(x))
        s = x if self.shortcut is None else self.shortcut(h)
        return s + self.conv2(F.relu(self.bn2(self.conv1(h))))


class PreActBottleneck(nn.Module):
    """h = relu(bn1(x)); y = s + conv3(relu(bn3(conv2(relu(bn2(conv1(h))))))), s as in the basic block."""

    expansion = 4

    def __init__(self, before: int, width: int, stride: int, option: str) -> None:
        super().__init__()
        after = width * self.expansion
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, after, 1, bias=False)
        self.shortcut = _shortcut(before, after, stride, option, norm=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.bn1(x))
        s = x if self.shortcut is None else self.shortcut(h)
        return s + self.conv3(F.relu(self.bn3(self.conv2(F.relu(self.bn2(self.conv1(h)))))))


class Basic(nn.Module):
    """y = relu(s + bn2(conv2(relu(bn1(conv1(x)))))), s = x, or shortcut(x) where the shape changes."""

    expansion = 1

    def __init__(self, before: int, width: int, stride: int, option: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(before, width, stride, option, norm=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = x if self.shortcut is None else self.shortcut(x)
        return F.relu(s + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Bottleneck(nn.Module):
    """y = relu(s + bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))), s as in the basic block; conv2 has the stride."""

    expansion = 4

    def __init__(self, before: int, width: int, stride: int, option: str) -> None:
        super().__init__()
        after = width * self.expansion
        self.conv1 = nn.Conv2d(before, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, after, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(after)
        self.shortcut = _shortcut(before, after, stride, option, norm=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = x if self.shortcut is None else self.shortcut(x)
        h = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(s + self.bn3(self.conv3(h)))


class ResNet(nn.Module):
    """3 x 3 stem, three stages of n blocks, mean over pixels, linear.

    Stages 2 and 3 begin with stride 2 and twice the width.
    [B, in_channels, H, W] float -> [B, classes] logits.  Pre-activation networks have batch norm and ReLU
    after the last block and none after the stem; post-activation ones the other way round.
    Source: He et al. 2015 (post-activation) and 2016 (pre-activation).
    """

    def __init__(
        self, n: int, preactivation: bool, bottleneck: bool, classes: int, width: int, in_channels: int, option: str
    ) -> None:
        super().__init__()
        block: type[PreActBasic | PreActBottleneck | Basic | Bottleneck]
        if preactivation:
            block = PreActBottleneck if bottleneck else PreActBasic
        else:
            block = Bottleneck if bottleneck else Basic
        self.preactivation = preactivation
        self.conv = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        blocks: list[nn.Module] = []
        channels = width
        for stage in range(3):
            for position in range(n):
                stride = 2 if stage and not position else 1
                blocks.append(block(channels, width << stage, stride, option))
                channels = (width << stage) * block.expansion
        # Post-activation blocks expect an activated input, pre-activation blocks leave a sum that is not yet activated.
        self.bn = nn.BatchNorm2d(channels if preactivation else width)
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        if not self.preactivation:
            x = F.relu(self.bn(x))
        x = self.blocks(x)
        if self.preactivation:
            x = F.relu(self.bn(x))
        return self.fc(x.mean(dim=(2, 3)))


def resnet(
    depth: int,
    preactivation: bool = True,
    classes: int = 10,
    width: int = 16,
    in_channels: int = 3,
    bottleneck: bool | None = None,
    option: str = "projection",
) -> ResNet:
    """A residual network of three equal stages for small images, `depth` weighted layers deep.

    Basic blocks take depth 6n+2 (8, 14, 20, 32, 56, 110, ...), bottlenecks depth 9n+2 (11, 20, 29, 56, 110, 164, ...).
    With bottleneck=None the depth decides, basic where both fit.  `width` is the number of channels in the first stage;
    `option` is the shortcut where the shape changes: "projection" (1 x 1 convolution, with batch norm in
    post-activation networks) or "pad" (He's option A).  Raises ModelError for a depth or option that does not exist.
    """
    if option not in ("projection", "pad"):
        raise ModelError(f"resnet has no shortcut option {option!r}; choose 'projection' or 'pad'")
    if min(width, classes, in_channels) < 1:
        raise ModelError(
            f"resnet needs width, classes and in_channels of at least 1, not {width}, {classes} and {in_channels}"
        )
    basic_fits, bottleneck_fits = depth > 2 and (depth - 2) % 6 == 0, depth > 2 and (depth - 2) % 9 == 0
    if bottleneck is None:
        bottleneck = bottleneck_fits and not basic_fits
    if not (bottleneck_fits if bottleneck else basic_fits):
        per_n = 9 if bottleneck else 6
        nearest = max(1, round((depth - 2) / per_n)) * per_n + 2
        kinds = "9n+2 with bottlenecks" if bottleneck else "6n+2 with basic blocks or 9n+2 with bottlenecks"
        raise ModelError(f"resnet has no depth {depth}: it must be {kinds}, for example {nearest}")
    return ResNet(
        (depth - 2) // (9 if bottleneck else 6), preactivation, bottleneck, classes, width, in_channels, option
    )
