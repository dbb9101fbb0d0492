"""Small residual networks written in the styles of well-known codebases, each with its own trap for wrap()."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights and norm statistics away from their defaults, so that no two operations look alike; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                n = module.num_features
                module.running_mean.copy_(torch.randn(n, generator=generator) * 0.2)
                module.running_var.copy_(torch.rand(n, generator=generator) + 0.5)
                module.weight.copy_(torch.rand(n, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(n, generator=generator) * 0.2)
    return model.eval()


def conv3(i: int, o: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(i, o, 3, stride, 1, bias=False)


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class PaddedBlock(nn.Module):
    """Option A: the shortcut takes every other pixel and pads channels with zeros, on both sides or at the end."""

    def __init__(self, i: int, o: int, stride: int, style: str = "both") -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(i, o, stride), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = conv3(o, o), nn.BatchNorm2d(o)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or i != o:
            d = o - i
            self.shortcut = {
                "both": Lambda(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, d // 2, d - d // 2))),
                "end": Lambda(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, d))),
                "pool": Lambda(lambda x: torch.cat([F.avg_pool2d(x, 2), torch.zeros_like(x[:, :d, ::2, ::2])], 1)),
            }[style]

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class ProjectedBlock(nn.Module):
    """Post-activation with a shared in-place ReLU; the projection is an average pool and a convolution if asked."""

    def __init__(self, i: int, o: int, stride: int, pool: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(i, o, stride), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = conv3(o, o), nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or i != o:
            first = [nn.AvgPool2d(stride, stride)] if pool else []
            conv = nn.Conv2d(i, o, 1, 1 if pool else stride, bias=False)
            self.downsample = nn.Sequential(*first, conv, nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        return self.relu(out)


class PooledProjectionBlock(ProjectedBlock):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__(i, o, stride, pool=True)


class PaddedEndBlock(PaddedBlock):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__(i, o, stride, "end")


class PaddedPoolBlock(PaddedBlock):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__(i, o, stride, "pool")


class ActivatedProjectionBlock(nn.Module):
    """Pre-activation; the projection reads relu(bn1(x)) and identity blocks have no shortcut attribute at all."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(i), conv3(i, o, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(o), conv3(o, o)
        if stride != 1 or i != o:
            self.shortcut = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


class RawProjectionBlock(nn.Module):
    """Pre-activation; the projection reads x itself. Same members as a post-activation block, in another order."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(i), conv3(i, o, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(o), conv3(o, o)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(i, o, 1, stride)) if stride != 1 or i != o else None

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.conv1(self.relu(self.bn1(x)))
        out = self.conv2(self.relu(self.bn2(out)))
        if self.downsample is not None:
            residual = self.downsample(x)
        return torch.add(residual, out)


class FunctionBlock(nn.Module):
    """The branch is one Sequential, and the closing ReLU is a module built inside forward."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.residual_function = nn.Sequential(
            conv3(i, o, stride), nn.BatchNorm2d(o), nn.ReLU(inplace=True), conv3(o, o), nn.BatchNorm2d(o)
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or i != o:
            self.shortcut = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        return nn.ReLU(inplace=True)(self.residual_function(x) + self.shortcut(x))


class FunctionBottleneck(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        m = o // 4
        self.residual_function = nn.Sequential(
            nn.Conv2d(i, m, 1, bias=False), nn.BatchNorm2d(m), nn.ReLU(inplace=True),
            nn.Conv2d(m, m, 3, stride, 1, bias=False), nn.BatchNorm2d(m), nn.ReLU(inplace=True),
            nn.Conv2d(m, o, 1, bias=False), nn.BatchNorm2d(o),
        )  # fmt: skip
        self.shortcut = nn.Sequential()
        if stride != 1 or i != o:
            self.shortcut = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        return nn.ReLU(inplace=True)(self.residual_function(x) + self.shortcut(x))


class PreactBottleneck(nn.Module):
    """Pre-activation bottleneck; the projection reads relu(bn1(x))."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        m = max(4, o // 4)  # of one or two channels a ReLU may pass nothing at all
        self.bn1, self.conv1 = nn.BatchNorm2d(i), nn.Conv2d(i, m, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(m), conv3(m, m, stride)
        self.bn3, self.conv3 = nn.BatchNorm2d(m), nn.Conv2d(m, o, 1, bias=False)
        if stride != 1 or i != o:
            self.shortcut = nn.Conv2d(i, o, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.bn1(x))
        s = self.shortcut(a) if hasattr(self, "shortcut") else x
        return s + self.conv3(F.relu(self.bn3(self.conv2(F.relu(self.bn2(self.conv1(a)))))))


class SqueezeBlock(ProjectedBlock):
    """A basic block whose branch is scaled channel by channel: squeeze and excitation, recognised as `generic`."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__(i, o, stride)
        self.fc1, self.fc2 = nn.Conv2d(o, 4, 1), nn.Conv2d(4, o, 1)

    def excited(self, f: Tensor) -> Tensor:
        return f * torch.sigmoid(self.fc2(F.relu(self.fc1(f.mean((2, 3), keepdim=True)))))

    def forward(self, x: Tensor) -> Tensor:
        f = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.excited(f) + (x if self.downsample is None else self.downsample(x)))


class InPlaceBlock(nn.Module):
    """Pre-activation by `relu_` on the block's own input: the identity shortcut then reads the activated tensor."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2 = conv3(i, o, stride), nn.BatchNorm2d(o), conv3(o, o)
        self.shortcut = nn.Conv2d(i, o, 1, stride) if stride != 1 or i != o else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        torch.relu_(x)
        return self.shortcut(x).add_(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))


class HighwayBlock(nn.Module):
    """A basic branch with a learned transform gate, in one of several algebraic forms."""

    def __init__(self, i: int, o: int, stride: int, form: str = "sum") -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(i, o, stride), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = conv3(o, o), nn.BatchNorm2d(o)
        self.gate = conv3(i, o, stride)
        self.project = nn.Conv2d(i, o, 1, stride) if stride != 1 or i != o else nn.Identity()
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        f = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        t = torch.sigmoid(self.gate(x) - 1)
        s = self.project(x)
        if self.form == "sum":
            return f * t + s * (1 - t)
        if self.form == "swapped":
            return torch.rsub(t, 1).mul(s) + t * f
        if self.form == "carry":
            return t * s + (1.0 - t) * f
        if self.form == "lerp":
            return torch.lerp(s, f, t)
        return s + t * (f - s)


class Network(nn.Module):
    """Stem, three stages and a head around a block class; `final` adds the norm and ReLU that pre-activation needs."""

    def __init__(
        self, block: Callable[[int, int, int], nn.Module], depth: int = 2, width: int = 8, final: bool = False
    ):
        super().__init__()
        self.conv1, self.bn1 = conv3(3, width), nn.BatchNorm2d(width)
        stages, i = [], width
        for stage in range(3):
            blocks = []
            for k in range(depth):
                o = width * 2**stage
                blocks.append(block(i, o, 2 if stage and not k else 1))
                i = o
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.bn = nn.BatchNorm2d(i) if final else None
        self.linear = nn.Linear(i, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        if self.bn is not None:
            out = F.relu(self.bn(out))
        out = F.avg_pool2d(out, out.size()[3])
        return self.linear(out.view(out.size(0), -1))


class ImageNetStyle(nn.Module):
    """An ImageNet stem: stride-2 convolution and max pool, in front of bottlenecks; biases everywhere."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, 8, 7, 2, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        self.blocks = nn.Sequential(FunctionBottleneck(8, 16, 1), FunctionBottleneck(16, 16, 1))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 5, 1), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


class LoopNetwork(nn.Module):
    """No block modules at all: branches in a list, additions in the network's own forward."""

    def __init__(self, depth: int = 3, width: int = 8) -> None:
        super().__init__()
        self.stem = conv3(3, width)
        self.branches = nn.ModuleList(
            nn.Sequential(conv3(width, width), nn.BatchNorm2d(width), nn.ReLU(), conv3(width, width))
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        x = self.stem(x)
        for branch in self.branches:
            x = F.relu(x + branch(x))
        return self.head(x.mean((2, 3)).reshape(n, -1))


def sequential_vgg(batch_norm: bool = True) -> nn.Sequential:
    """A VGG as one Sequential: widths 8, 8, 16, 16, pooling after the second and the fourth convolution."""
    layers: list[nn.Module] = []
    i = 3
    for o, pool in ((8, False), (8, True), (16, False), (16, True), (16, False)):
        layers += [nn.Conv2d(i, o, 3, 1, 1), *([nn.BatchNorm2d(o)] if batch_norm else []), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2)] if pool else []
        i = o
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(i, 10))
