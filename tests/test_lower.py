"""lower(): the folded network computes what the wrapped one does, in every configuration, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import resens_fast as rf
from resens_fast.errors import NotCovered
from resens_fast.fused import convert
from resens_fast.lower import lower
from tests import styles


class Variant(NamedTuple):
    order: tuple[int, ...]
    gates: tuple[float, ...]


def network(block: Callable[..., nn.Module], **kwargs: Any) -> nn.Module:
    return styles.randomise(styles.Network(block, **kwargs))


COVERED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "option-a": (partial(network, styles.PaddedBlock), "pad"),
    "option-a-end": (partial(network, styles.PaddedEndBlock), "pad"),
    "option-a-pool": (partial(network, styles.PaddedPoolBlock), "pad"),
    "projection": (partial(network, styles.ProjectedBlock), "projection"),
    "pool-projection": (partial(network, styles.PooledProjectionBlock), "projection"),
    "preact": (partial(network, styles.ActivatedProjectionBlock), "projection"),
    "preact-final-norm": (partial(network, styles.ActivatedProjectionBlock, final=True), "projection"),
    "preact-raw": (partial(network, styles.RawProjectionBlock, final=True), "projection"),
    "residual-function": (partial(network, styles.FunctionBlock), "projection"),
    "bottleneck": (partial(network, styles.FunctionBottleneck), "projection"),
    "loop": (lambda: styles.randomise(styles.LoopNetwork()), "identity"),
    "imagenet-stem": (lambda: styles.randomise(styles.ImageNetStyle()), "projection"),
}


def example(model: nn.Module) -> Tensor:
    conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    return torch.randn(2, conv.in_channels, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", COVERED)
@torch.no_grad()
def test_folded_network_equals_the_wrapped_one(name: str) -> None:
    torch.manual_seed(0)
    make, kind = COVERED[name]
    model = make()
    x = example(model)
    net = rf.wrap(model, x.float())
    fused = lower(net)
    n = len(net.blocks)
    assert len(fused.blocks) == n
    assert (fused.input_shape, fused.classes) == (net.input_shape, net.structure.classes)
    assert kind in {b.shortcut.kind for b in fused.blocks}
    assert {b.shortcut.kind for b in fused.blocks} <= {kind, "identity"}
    for conv in (*fused.stem.convs, *(c for b in fused.blocks for c in b.convs)):
        assert conv.weight.dtype == conv.bias.dtype == torch.float32
        assert conv.weight.is_contiguous()
    wide = convert(fused, torch.float64)  # one rounding of each parameter is all that separates them
    net = net.double()
    order = tuple(range(n))
    scale = float(net(x).abs().max())
    for gates in ((1.0,) * n, (0.5,) * n, (0.0,) * n, *(tuple(float(i != j) for i in order) for j in order)):
        difference = (wide.forward(x, order, gates) - net(x, Variant(order, gates))).abs().max()
        assert float(difference) < 1e-5 * scale
    if n > 1 and net.structure.exchangeable(0, 1):
        order = (1, 0, *order[2:])
        difference = (wide.forward(x, order) - net(x, Variant(order, (1.0,) * n))).abs().max()
        assert float(difference) < 1e-5 * scale


def test_forms() -> None:
    fused = lower(rf.wrap(network(styles.PaddedBlock), torch.zeros(1, 3, 16, 16)))
    first, second = fused.blocks[0], fused.blocks[2]
    assert (first.scale, first.closing_relu, first.shortcut.kind) == (None, True, "identity")
    s = second.shortcut
    assert (s.kind, s.stride, s.before, s.after, s.pool, s.activated) == ("pad", 2, 4, 4, 0, False)
    assert second.convs[0].stride == 2
    assert [c.relu for c in second.convs] == [True, False]
    s = lower(rf.wrap(network(styles.PaddedPoolBlock), torch.zeros(1, 3, 16, 16))).blocks[2].shortcut
    assert (s.kind, s.stride, s.before, s.after, s.pool) == ("pad", 1, 0, 8, 2)
    s = lower(rf.wrap(network(styles.PooledProjectionBlock), torch.zeros(1, 3, 16, 16))).blocks[2].shortcut
    assert (s.kind, s.stride, s.pool, s.conv is not None and s.conv.relu) == ("projection", 1, 2, False)
    preact = lower(rf.wrap(network(styles.ActivatedProjectionBlock, final=True), torch.zeros(1, 3, 16, 16)))
    assert [b.shortcut.activated for b in preact.blocks] == [False, False, True, False, True, False]
    assert all(b.scale is not None and not b.closing_relu for b in preact.blocks)
    assert preact.head.scale is not None
    assert preact.head.relu
    raw = lower(rf.wrap(network(styles.RawProjectionBlock), torch.zeros(1, 3, 16, 16)))
    assert not any(b.shortcut.activated for b in raw.blocks)
    assert raw.head.scale is None
    assert not raw.head.relu
    deep = lower(rf.wrap(styles.randomise(styles.ImageNetStyle()), torch.zeros(1, 1, 32, 32)))
    assert deep.stem.maxpool == (3, 2, 1)
    assert [len(b.convs) for b in deep.blocks] == [3, 3]


class Grouped(styles.FunctionBlock):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__(i, o, stride)
        self.residual_function[3] = nn.Conv2d(o, o, 3, 1, 1, groups=2)


class Smooth(styles.FunctionBlock):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__(i, o, stride)
        self.residual_function[2] = nn.SiLU()


class Squeezed(styles.FunctionBlock):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__(i, o, stride)
        self.squeeze = nn.Conv2d(o, o, 1)

    def forward(self, x: Tensor) -> Tensor:
        f = self.residual_function(x)
        return torch.relu(f * torch.sigmoid(self.squeeze(f.mean((2, 3), keepdim=True))) + self.shortcut(x))


def test_a_shortcut_that_is_spread_by_broadcasting_is_not_covered() -> None:
    """On 3 columns the branch keeps 2 and the pooled shortcut 1, which the addition then spreads over both."""
    net = rf.wrap(network(styles.PooledProjectionBlock), torch.zeros(1, 3, 4, 3))
    with pytest.raises(NotCovered, match=r"goes around its branch has another shape"):
        lower(net)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (partial(network, styles.HighwayBlock), r"block 0 \(layer1\.0\) .*highway"),
        (partial(network, styles.InPlaceBlock), r"block 0 \(layer1\.0\) .*identity shortcut reads the activated state"),
        (partial(network, Grouped), r"block 0 \(layer1\.0\) .*2 groups"),
        (partial(network, Smooth), r"block 0 \(layer1\.0\) .*act"),
        (partial(network, Squeezed), r"block 0 \(layer1\.0\) .*squeeze"),
        (lambda: styles.randomise(styles.sequential_vgg()), r"block 0 \(3\) .*plain"),
    ],
)
def test_not_covered_names_block_and_reason(make: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(NotCovered, match=reason):
        lower(rf.wrap(make(), torch.zeros(1, 3, 16, 16)))


def test_lowering_leaves_the_network_alone_and_follows_it() -> None:
    model = network(styles.ProjectedBlock).half().train()
    net = rf.wrap(model, torch.zeros(1, 3, 16, 16))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = lower(net)
    assert model.training
    assert net.dtype == torch.float16
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        model.layer1[0].bn2.weight.mul_(2)
    second = lower(net)
    torch.testing.assert_close(second.blocks[0].convs[1].weight, 2 * first.blocks[0].convs[1].weight)


def test_broken_weights_are_called_that() -> None:
    net = rf.wrap(network(styles.ProjectedBlock), torch.zeros(1, 3, 16, 16))
    with torch.no_grad():
        next(iter(net.blocks[1].parameters()))[0] = float("nan")
    with pytest.raises(NotCovered, match=r"block 1 \(.*\) gives numbers that are not finite .* weights broken\?"):
        lower(net)
