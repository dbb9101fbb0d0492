"""Random lowered networks; `fused.FusedNetwork.forward` on float64 is the truth beside the kernels."""

from __future__ import annotations

import torch

from resens_fast.fused import Conv, FusedBlock, FusedNetwork, Head, Shortcut, Stem


def conv(
    g: torch.Generator,
    i: int,
    o: int,
    k: int = 3,
    stride: int = 1,
    padding: int | None = None,
    relu: bool = False,
    gain: float = 1.0,
) -> Conv:
    weight = torch.randn(o, i, k, k, generator=g) * gain * (2.0 / (i * k * k)) ** 0.5
    return Conv(weight, torch.randn(o, generator=g) * 0.1, stride, k // 2 if padding is None else padding, relu)


def size(n: int, c: Conv) -> int:
    return (n + 2 * c.padding - c.weight.shape[2]) // c.stride + 1


def block(
    g: torch.Generator,
    index: int,
    shape: tuple[int, int, int],
    out: int,
    stride: int = 1,
    kind: str = "basic",
    pre: bool = False,
    shortcut: str | None = None,
) -> FusedBlock:
    """A block of random weights; shortcut: identity, projection, pad (behind), pad2 (both sides), pool (and pad)."""
    c, h, w = shape
    if kind == "basic":
        convs = (conv(g, c, out, stride=stride, relu=True), conv(g, out, out, gain=0.4))
    else:
        mid = max(1, out // 4)
        convs = (
            conv(g, c, mid, 1, relu=True),
            conv(g, mid, mid, stride=stride, relu=True),
            conv(g, mid, out, 1, gain=0.4),
        )
    if shortcut is None:
        shortcut = "identity" if stride == 1 and out == c else "projection"
    shape_out = (out, (h - 1) // stride + 1, (w - 1) // stride + 1)
    extra = out - c
    s = {
        "identity": Shortcut("identity", 1, 0, 0, 0, None, False),
        "projection": Shortcut("projection", stride, 0, 0, 0, conv(g, c, out, 1, stride), pre),
        "pad": Shortcut("pad", stride, 0, extra, 0, None, False),
        "pad2": Shortcut("pad", stride, extra // 2, extra - extra // 2, 0, None, False),
        "pool": Shortcut("pad", 1, 0, extra, stride, None, False),
    }[shortcut]
    scale = torch.rand(c, generator=g) + 0.5 if pre else None
    shift = torch.randn(c, generator=g) * 0.3 if pre else None
    return FusedBlock(index, f"block{index}", scale, shift, convs, s, not pre, shape, shape_out)


def network(
    seed: int,
    widths: tuple[int, ...] = (16, 32, 64),
    depth: int = 2,
    image: tuple[int, int, int] = (3, 32, 32),
    classes: int = 10,
    kind: str = "basic",
    pre: bool = False,
    shortcut: str = "projection",
    imagenet: bool = False,
) -> FusedNetwork:
    g = torch.Generator().manual_seed(seed)
    c, h, w = image
    if imagenet:
        first = conv(g, c, widths[0], 7, 2, relu=True)
        h, w = ((size(n, first) + 2 - 3) // 2 + 1 for n in (h, w))
    else:
        first = conv(g, c, widths[0], relu=not pre)
    stem = Stem((first,), (3, 2, 1) if imagenet else None)
    blocks: list[FusedBlock] = []
    shape = (widths[0], h, w)
    for s, width in enumerate(widths):
        for d in range(depth):
            change = s > 0 and d == 0
            blocks.append(
                block(g, len(blocks), shape, width, 2 if change else 1, kind, pre, shortcut if change else None)
            )
            shape = blocks[-1].shape_out
    scale = torch.rand(shape[0], generator=g) + 0.5 if pre else None
    shift = torch.randn(shape[0], generator=g) * 0.3 if pre else None
    weight = torch.randn(classes, shape[0], generator=g) * shape[0] ** -0.5
    head = Head(scale, shift, pre, weight, torch.randn(classes, generator=g) * 0.1)
    return FusedNetwork(stem, tuple(blocks), head, image, classes)
