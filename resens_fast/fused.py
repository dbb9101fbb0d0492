"""A network as fused engines see it: batch norms folded, every block reduced to convolutions and one shortcut.

    h = relu(scale * x + shift), or x itself
    s = shortcut(h if activated else x)
    y = s + gate * conv_n(... relu(conv_1(h)) ...)

followed by a ReLU where the block closes with one. `forward` below is the readable truth of what that means.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from resens_fast.structure import Shape


@dataclasses.dataclass(frozen=True, eq=False)
class Conv:
    """A square convolution with the norm behind it folded in: weight [O, I, k, k], bias [O]; one group, no dilation."""

    weight: Tensor
    bias: Tensor
    stride: int
    padding: int
    relu: bool  # whether a ReLU follows

    def __call__(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        return y.relu() if self.relu else y


@dataclasses.dataclass(frozen=True, eq=False)
class Shortcut:
    """What runs beside the branch: average pool first, then every `stride`-th pixel and zeros, or a convolution."""

    kind: str  # "identity", "pad" or "projection"
    stride: int  # pad: takes x[:, :, ::stride, ::stride]; projection: that of its convolution; 1 otherwise
    before: int  # pad: zero channels in front of the input's ...
    after: int  # ... and behind them
    pool: int  # size and stride of the average pool that comes first, 0 without one
    conv: Conv | None  # projection: its convolution, without ReLU
    activated: bool  # whether it reads the prologue's output h instead of the state x

    def __call__(self, x: Tensor) -> Tensor:
        if self.pool:
            x = F.avg_pool2d(x, self.pool)
        if self.conv is not None:
            return self.conv(x)
        if self.kind == "identity":
            return x
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


@dataclasses.dataclass(frozen=True, eq=False)
class FusedBlock:
    """One residual block: two (basic) or three (bottleneck) convolutions with a ReLU after each but the last."""

    index: int
    name: str
    scale: Tensor | None  # [C], pre-activation only: h = relu(scale * x + shift)
    shift: Tensor | None  # [C]
    convs: tuple[Conv, ...]
    shortcut: Shortcut
    closing_relu: bool
    shape_in: Shape
    shape_out: Shape

    def __call__(self, x: Tensor, gate: float = 1.0) -> Tensor:
        h = x if self.scale is None else (_channels(self.scale) * x + _channels(self.shift)).relu()
        y = self.shortcut(h if self.shortcut.activated else x)
        if gate != 0.0:
            branch = h
            for conv in self.convs:
                branch = conv(branch)
            y = y + gate * branch
        return y.relu() if self.closing_relu else y


@dataclasses.dataclass(frozen=True, eq=False)
class Stem:
    """Images to the first state: convolutions, then a max pool if `maxpool` = (kernel, stride, padding) is given."""

    convs: tuple[Conv, ...]
    maxpool: tuple[int, int, int] | None

    def __call__(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x)
        return x if self.maxpool is None else F.max_pool2d(x, *self.maxpool)


@dataclasses.dataclass(frozen=True, eq=False)
class Head:
    """State to logits: scale * x + shift if given, ReLU if `relu`, mean over pixels, weight [K, C] and bias [K]."""

    scale: Tensor | None
    shift: Tensor | None
    relu: bool
    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        if self.scale is not None:
            x = _channels(self.scale) * x + _channels(self.shift)
        if self.relu:
            x = x.relu()
        return F.linear(x.mean((2, 3)), self.weight, self.bias)


@dataclasses.dataclass(frozen=True, eq=False)
class FusedNetwork:
    """A whole network in folded form, all parameters of one dtype."""

    stem: Stem
    blocks: tuple[FusedBlock, ...]
    head: Head
    input_shape: Shape
    classes: int

    def forward(
        self, images: Tensor, order: Sequence[int] | None = None, gates: Sequence[float] | None = None
    ) -> Tensor:
        """Logits [B, classes] of one configuration for images [B, C, H, W] of the parameters' dtype."""
        x = self.stem(images)
        for j in range(len(self.blocks)) if order is None else order:
            x = self.blocks[j](x, 1.0 if gates is None else gates[j])
        return self.head(x)


T = TypeVar("T")


def convert(part: T, dtype: torch.dtype) -> T:
    """The same network, block or convolution with its parameters rounded to `dtype`, contiguous."""
    if isinstance(part, Tensor):
        return part.to(dtype).contiguous()  # type: ignore[return-value]
    if isinstance(part, tuple):
        return tuple(convert(item, dtype) for item in part)  # type: ignore[return-value]
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        fields: dict[str, Any] = {f.name: convert(getattr(part, f.name), dtype) for f in dataclasses.fields(part)}
        return dataclasses.replace(part, **fields)
    return part


def _channels(value: Tensor | None) -> Tensor:
    assert value is not None
    return value.reshape(1, -1, 1, 1)
