"""A lowered network as the two arrays that the C++ engine reads: an int32 description and all parameters end to end.

csrc/cpu/network.cpp is the other side of this file; both carry the version number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..lower import Conv, FusedNetwork, Shortcut

VERSION = 1

_SHORTCUTS = {"identity": 0, "pad": 1, "projection": 2}


class _Writer:
    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.parameters: list[torch.Tensor] = []
        self.length = 0

    def put(self, *numbers: int) -> None:
        self.numbers += [int(n) for n in numbers]

    def tensor(self, values: torch.Tensor | None) -> None:
        """The place of a tensor among the parameters, as two int32: it may lie past 2**31."""
        low = self.length & 0xFFFFFFFF
        self.put(low - (1 << 32) if low >= 1 << 31 else low, self.length >> 32)
        if values is not None:
            flat = values.detach().to("cpu", torch.float32).reshape(-1)
            self.parameters.append(flat)
            self.length += flat.numel()

    def conv(self, conv: Conv) -> None:
        out_channels, in_channels, kernel, _ = conv.weight.shape
        self.put(in_channels, out_channels, kernel, conv.stride, conv.padding, conv.relu)
        self.tensor(conv.weight)
        self.tensor(conv.bias)

    def shortcut(self, shortcut: Shortcut, closing_relu: bool) -> None:
        self.put(
            _SHORTCUTS[shortcut.kind], shortcut.stride, shortcut.before, shortcut.pool, shortcut.activated, closing_relu
        )
        if shortcut.conv is not None:
            self.conv(shortcut.conv)


def describe(net: FusedNetwork) -> tuple[torch.Tensor, torch.Tensor]:
    """The description (int32 [N]) and the parameters (float32 [P]) of a lowered network."""
    w = _Writer()
    w.put(VERSION, *net.input_shape, net.classes, len(net.stem.convs))
    for conv in net.stem.convs:
        w.conv(conv)
    w.put(*(net.stem.maxpool or (0, 0, 0)), len(net.blocks))
    for block in net.blocks:
        w.put(*block.shape_in, *block.shape_out, block.scale is not None)
        w.tensor(block.scale)
        w.tensor(block.shift)
        w.put(len(block.convs))
        for conv in block.convs:
            w.conv(conv)
        w.shortcut(block.shortcut, block.closing_relu)
    head = net.head
    w.put(head.weight.shape[1], head.scale is not None)
    w.tensor(head.scale)
    w.tensor(head.shift)
    w.put(head.relu)
    w.tensor(head.weight)
    w.tensor(head.bias)
    parameters = torch.cat(w.parameters) if w.parameters else torch.empty(0, device="cpu")
    return torch.tensor(w.numbers, dtype=torch.int32, device="cpu"), parameters.contiguous()
