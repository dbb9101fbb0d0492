"""Networks of every style, blocks written out by hand: what a path's gradient is, without wrap() or a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resens_fast as rf
from tests import styles


class Terms(NamedTuple):
    """y = closing(shortcut + branch), written out for one block and one state."""

    shortcut: Tensor
    branch: Tensor
    closing: Callable[[Tensor], Tensor]


def same(y: Tensor) -> Tensor:
    return y


def post(b: Any, x: Tensor) -> Terms:
    shortcut = b.shortcut(x) if hasattr(b, "shortcut") else x if b.downsample is None else b.downsample(x)
    return Terms(shortcut, b.bn2(b.conv2(F.relu(b.bn1(b.conv1(x))))), F.relu)


def activated(b: Any, x: Tensor) -> Terms:
    a = F.relu(b.bn1(x))
    return Terms(b.shortcut(a) if hasattr(b, "shortcut") else x, b.conv2(F.relu(b.bn2(b.conv1(a)))), same)


def raw(b: Any, x: Tensor) -> Terms:
    branch = b.conv2(F.relu(b.bn2(b.conv1(F.relu(b.bn1(x))))))
    return Terms(x if b.downsample is None else b.downsample(x), branch, same)


def function(b: Any, x: Tensor) -> Terms:
    f = [module if not isinstance(module, nn.ReLU) else F.relu for module in b.residual_function]
    out = x
    for step in f:
        out = step(out)
    return Terms(b.shortcut(x), out, F.relu)


def bottleneck_preact(b: Any, x: Tensor) -> Terms:
    a = F.relu(b.bn1(x))
    branch = b.conv3(F.relu(b.bn3(b.conv2(F.relu(b.bn2(b.conv1(a)))))))
    return Terms(b.shortcut(a) if hasattr(b, "shortcut") else x, branch, same)


def squeeze(b: Any, x: Tensor) -> Terms:
    shortcut, branch, closing = post(b, x)
    return Terms(shortcut, b.excited(branch), closing)


def in_place(b: Any, x: Tensor) -> Terms:
    a = F.relu(x)
    return Terms(b.shortcut(a), b.conv2(F.relu(b.bn1(b.conv1(a)))), same)


def highway(b: Any, x: Tensor) -> Terms:
    f = F.relu(b.bn2(b.conv2(F.relu(b.bn1(b.conv1(x))))))
    t, s = torch.sigmoid(b.gate(x) - 1), b.project(x)
    return Terms(s, (1 - t if b.form == "carry" else t) * (f - s), same)


def shipped_highway(b: Any, x: Tensor) -> Terms:
    f = F.relu(b.bn2(b.conv2(F.relu(b.bn1(b.conv1(x))))))
    s = x if b.shortcut is None else b.shortcut(x)
    return Terms(s, torch.sigmoid(b.gate(x)) * (f - s), same)


def loop(b: Any, x: Tensor) -> Terms:
    return Terms(x, b(x), F.relu)


class PathNet(NamedTuple):
    """A float64 model, its wrapped self, and its stem, blocks and head by hand."""

    model: Any
    net: rf.ResidualNetwork
    stem: Callable[[Tensor], Tensor]
    blocks: Sequence[Any]
    terms: Callable[[Any, Tensor], Terms]
    head: Callable[[Tensor], Tensor]

    def loss(self, state: Tensor, labels: Tensor, order: Sequence[int], gates: Sequence[float]) -> Tensor:
        """The intact network's loss summed over the images, with the gradient of one path."""
        for j in order:
            shortcut, branch, closing = self.terms(self.blocks[j], state)
            way = gates[j] * branch if gates[j] else shortcut
            state = closing((shortcut + branch).detach() + way - way.detach())
        return F.cross_entropy(self.head(state), labels, reduction="sum")

    def gradients(self, images: Tensor, labels: Tensor, sweep: rf.Sweep, at: str = "first_block") -> Tensor:
        """[P, B, C, H, W]."""
        rows = []
        for order, gates in sweep:
            given = images.clone().requires_grad_()
            state = self.stem(given)
            leaf = given if at == "image" else state
            rows.append(torch.autograd.grad(self.loss(state, labels, order, gates), leaf)[0])
        return torch.stack(rows)


def _style(block: Any, terms: Callable[[Any, Tensor], Terms], final: bool = False) -> PathNet:
    torch.manual_seed(0)
    model = styles.randomise(styles.Network(block, depth=2, width=8, final=final)).double()
    blocks = [*model.layer1, *model.layer2, *model.layer3]  # type: ignore[operator]

    def head(x: Tensor) -> Tensor:
        if model.bn is not None:
            x = F.relu(model.bn(x))  # type: ignore[operator]
        return model.linear(x.mean((2, 3)))  # type: ignore[operator]

    net = rf.wrap(model, torch.zeros(1, 3, 16, 16))
    return PathNet(model, net, lambda x: F.relu(model.bn1(model.conv1(x))), blocks, terms, head)  # type: ignore[operator]


def _loop() -> PathNet:
    torch.manual_seed(0)
    model = styles.randomise(styles.LoopNetwork(depth=4)).double()
    net = rf.wrap(model, torch.zeros(1, 3, 16, 16))
    return PathNet(model, net, model.stem, model.branches, loop, lambda x: model.head(x.mean((2, 3))))


def _shipped_highway() -> PathNet:
    torch.manual_seed(0)
    model: Any = styles.randomise(rf.models.highway(14, classes=5, width=8)).double()
    net = rf.wrap(model, torch.zeros(1, 3, 16, 16))
    stem = lambda x: F.relu(model.bn(model.conv(x)))  # noqa: E731
    return PathNet(model, net, stem, model.blocks, shipped_highway, lambda x: model.fc(x.mean((2, 3))))


def _form(form: str) -> Callable[[int, int, int], nn.Module]:
    return lambda i, o, stride: styles.HighwayBlock(i, o, stride, form)


STYLES: dict[str, Callable[[], PathNet]] = {
    "padded": lambda: _style(lambda i, o, s: styles.PaddedBlock(i, o, s), post),
    "padded at the end": lambda: _style(styles.PaddedEndBlock, post),
    "padded and pooled": lambda: _style(styles.PaddedPoolBlock, post),
    "projected": lambda: _style(lambda i, o, s: styles.ProjectedBlock(i, o, s), post),
    "pooled and projected": lambda: _style(styles.PooledProjectionBlock, post),
    "shared prologue": lambda: _style(styles.ActivatedProjectionBlock, activated),
    "shared prologue, final norm": lambda: _style(styles.ActivatedProjectionBlock, activated, final=True),
    "raw projection": lambda: _style(styles.RawProjectionBlock, raw, final=True),
    "function": lambda: _style(styles.FunctionBlock, function),
    "bottleneck": lambda: _style(styles.FunctionBottleneck, function),
    "bottleneck, preact": lambda: _style(styles.PreactBottleneck, bottleneck_preact, final=True),
    "squeeze": lambda: _style(styles.SqueezeBlock, squeeze),
    "in place": lambda: _style(styles.InPlaceBlock, in_place, final=True),
    **{
        f"highway {form}": lambda form=form: _style(_form(form), highway)
        for form in ("sum", "swapped", "carry", "lerp")
    },
    "shipped highway": _shipped_highway,
    "loop": _loop,
}
