"""Random networks as lower() gives them, and their evaluation in float64 with the kernel's operand rounding."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from resens_fast.fused import Conv, FusedBlock, FusedNetwork, Head, Shortcut, Stem


def conv(generator, inputs, outputs, size, stride, relu, scale=1.0):
    weight = torch.randn(outputs, inputs, size, size, generator=generator) * scale * (2 / (size * size * inputs)) ** 0.5
    bias = torch.randn(outputs, generator=generator) * 0.1
    return Conv(weight, bias, stride, size // 2, relu)


def block(
    generator,
    index,
    stage,
    changes,
    preactivation,
    shortcut="pad",
    activated=False,
    before=None,
    scale=0.5,
    closing=None,
    width=16,
):
    outputs = width << stage
    inputs = outputs // 2 if changes else outputs
    side = 32 >> stage
    if not changes:
        short = Shortcut("identity", 1, 0, 0, 0, None, False)
    elif shortcut == "pad":
        before = inputs // 2 if before is None else before
        short = Shortcut("pad", 2, before, inputs - before, 0, None, activated)
    else:
        short = Shortcut("projection", 2, 0, 0, 0, conv(generator, inputs, outputs, 1, 2, False), activated)
    return FusedBlock(
        index=index, name=f"layer{stage + 1}.{index}",
        scale=torch.rand(inputs, generator=generator) + 0.5 if preactivation else None,
        shift=torch.randn(inputs, generator=generator) * 0.1 if preactivation else None,
        convs=(
            conv(generator, inputs, outputs, 3, 1 + changes, True),
            conv(generator, outputs, outputs, 3, 1, False, scale),
        ),
        shortcut=short, closing_relu=(not preactivation) if closing is None else closing,
        shape_in=(inputs, side * (1 + changes), side * (1 + changes)), shape_out=(outputs, side, side),
    )  # fmt: skip


def network(
    seed=0,
    blocks_per_stage=2,
    preactivation=False,
    shortcut="pad",
    activated=False,
    before=None,
    classes=10,
    in_channels=3,
    scale=0.5,
    head_scaled=None,
    width=16,
):
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for stage in range(3):
        for i in range(blocks_per_stage):
            changes = int(stage > 0 and i == 0)
            blocks.append(
                block(
                    generator,
                    len(blocks),
                    stage,
                    changes,
                    preactivation,
                    shortcut,
                    activated,
                    before,
                    scale,
                    width=width,
                )
            )
    head_scaled = preactivation if head_scaled is None else head_scaled
    return FusedNetwork(
        stem=Stem((conv(generator, in_channels, width, 3, 1, not preactivation),), None),
        blocks=tuple(blocks),
        head=Head(
            scale=torch.rand(4 * width, generator=generator) + 0.5 if head_scaled else None,
            shift=torch.randn(4 * width, generator=generator) * 0.1 if head_scaled else None,
            relu=head_scaled,
            weight=torch.randn(classes, 4 * width, generator=generator) * 0.3,
            bias=torch.randn(classes, generator=generator) * 0.1,
        ),
        input_shape=(in_channels, 32, 32), classes=classes,
    )  # fmt: skip


def _channels(value):
    return value.double().view(1, -1, 1, 1)


class Reference:
    """float64 arithmetic; operands of tensor-core products rounded to `dtype`, or nothing rounded when it is None."""

    def __init__(self, net, dtype):
        self.net, self.dtype = net, dtype

    def operand(self, x):
        return x.double() if self.dtype is None else x.float().to(self.dtype).double()

    def _conv(self, x, conv, gate=1.0):
        return F.conv2d(
            x, self.operand(conv.weight), gate * conv.bias.double(), stride=conv.stride, padding=conv.padding
        )

    def stem(self, images):
        conv = self.net.stem.convs[0]
        x = F.conv2d(images.double(), conv.weight.double(), conv.bias.double(), padding=1)
        return F.relu(x) if conv.relu else x

    def run(self, block, x, gate=1.0, skip=False):
        x = x.double()
        h = x if block.scale is None else F.relu(x * _channels(block.scale) + _channels(block.shift))
        short = block.shortcut
        if short.kind == "identity":
            y = x
        elif short.kind == "pad":
            y = F.pad((h if short.activated else x)[:, :, ::2, ::2], (0, 0, 0, 0, short.before, short.after))
        else:
            y = self._conv(self.operand(h if short.activated else x), short.conv)
        if not skip:
            inner = gate * F.relu(self._conv(self.operand(h), block.convs[0]))
            y = y + self._conv(self.operand(inner), block.convs[1], gate)
        return F.relu(y) if block.closing_relu else y

    def head(self, x):
        head = self.net.head
        x = x.double()
        if head.scale is not None:
            x = x * _channels(head.scale) + _channels(head.shift)
        if head.relu:
            x = F.relu(x)
        return x.mean((2, 3)) @ head.weight.double().t() + head.bias.double()

    def word(self, x, letters):
        """Logits of a word of (block, gate, skipped) from the stem's output."""
        for index, gate, skipped in letters:
            x = self.run(self.net.blocks[index], x, gate, skipped)
        return self.head(x)
