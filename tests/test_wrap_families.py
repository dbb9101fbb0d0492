"""wrap() on real and re-implemented codebases, against surgery done by hand on the original modules, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resens_fast as rf
from tests import styles

timm = pytest.importorskip("timm", reason="timm is not installed")
torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")

Skip = Callable[[Any, Tensor], Tensor]


class Variant(NamedTuple):
    order: tuple[int, ...]
    gates: tuple[float, ...]


class Family(NamedTuple):
    make: Callable[[], nn.Module]
    skip: Skip  # what a deleted block computes, written by hand for each codebase: (block module, x) -> y
    kind: str
    blocks: int
    swap: tuple[int, int]  # two blocks of equal shape
    size: int = 16
    drops: bool = True  # an identity block that is deleted leaves its state as it is


def closing(block: Any, x: Tensor) -> Tensor:
    return F.relu(x if block.downsample is None else block.downsample(x))


def bare(block: Any, x: Tensor) -> Tensor:
    return x if block.downsample is None else block.downsample(x)


def timm_v2(block: Any, x: Tensor) -> Tensor:
    return x if block.downsample is None else block.downsample(block.norm1(x))


def activated(block: Any, x: Tensor) -> Tensor:
    return block.shortcut(F.relu(block.bn1(x))) if hasattr(block, "shortcut") else x


def style(block: Callable[..., nn.Module], **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: styles.Network(block, **kwargs)


RELU_SHORTCUT: Skip = lambda block, x: F.relu(block.shortcut(x))  # noqa: E731
FAMILIES = {
    "torchvision-resnet18": Family(torchvision.models.resnet18, closing, "basic", 8, (0, 1), 64),
    "torchvision-resnet50": Family(torchvision.models.resnet50, closing, "bottleneck", 16, (8, 11), 64),
    "torchvision-wide": Family(torchvision.models.wide_resnet50_2, closing, "bottleneck", 16, (4, 5), 64),
    "torchvision-resnext": Family(torchvision.models.resnext50_32x4d, closing, "bottleneck", 16, (4, 5), 64),
    "timm-resnet18": Family(partial(timm.create_model, "resnet18"), closing, "basic", 8, (0, 1), 64),
    "timm-resnetv2": Family(partial(timm.create_model, "resnetv2_50"), timm_v2, "bottleneck_preact", 16, (9, 12), 64),
    "timm-seresnet50": Family(partial(timm.create_model, "seresnet50"), closing, "generic", 16, (1, 2), 64),
    "option-a": Family(style(styles.PaddedBlock), RELU_SHORTCUT, "basic", 6, (0, 1)),
    "option-a-end": Family(style(styles.PaddedEndBlock), RELU_SHORTCUT, "basic", 6, (0, 1)),
    "option-a-pool": Family(style(styles.PaddedPoolBlock), RELU_SHORTCUT, "basic", 6, (0, 1)),
    "projection": Family(style(styles.ProjectedBlock), closing, "basic", 6, (0, 1)),
    "pool-projection": Family(style(styles.PooledProjectionBlock), closing, "basic", 6, (0, 1)),
    "preact-no-final-norm": Family(style(styles.ActivatedProjectionBlock), activated, "basic_preact", 6, (0, 1)),
    "preact-final-norm": Family(
        style(styles.ActivatedProjectionBlock, final=True), activated, "basic_preact", 6, (0, 1)
    ),
    "preact-raw": Family(style(styles.RawProjectionBlock, final=True), bare, "basic_preact", 6, (0, 1)),
    "residual-function": Family(style(styles.FunctionBlock), RELU_SHORTCUT, "basic", 6, (0, 1)),
    "residual-bottleneck": Family(style(styles.FunctionBottleneck), RELU_SHORTCUT, "bottleneck", 6, (0, 1)),
    "in-place": Family(
        style(styles.InPlaceBlock), lambda b, x: b.shortcut(F.relu(x)), "basic_preact", 6, (0, 1), drops=False
    ),
    **{
        f"highway-{form}": Family(
            style(partial(styles.HighwayBlock, form=form)), lambda b, x: b.project(x), "highway", 6, (0, 1)
        )
        for form in ("sum", "swapped", "carry", "lerp", "delta")
    },
}


class Surgery(nn.Module):
    """Stands in for a deleted block."""

    def __init__(self, block: nn.Module, skip: Skip) -> None:
        super().__init__()
        self.block, self.skip = block, skip

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(self.block, x.clone())


def replaced(model: nn.Module, changes: dict[str, nn.Module]) -> nn.Module:
    """The model with other modules under some names; weights are shared."""
    twin = copy.copy(model)
    memo = {id(p): p for p in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo)
    for name, module in changes.items():
        parent, _, last = name.rpartition(".")
        setattr(twin.get_submodule(parent), last, module)
    return twin


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_family(name: str) -> None:
    family = FAMILIES[name]
    torch.manual_seed(0)
    model = styles.randomise(family.make()).double()
    x = torch.randn(1, 3, family.size, family.size, dtype=torch.float64)
    kept, expected = x.clone(), model(x)
    net = rf.wrap(model, x)
    n = len(net.blocks)
    assert n == family.blocks
    assert set(net.structure.kinds) == {family.kind}
    assert list(net.state_dict()) == list(model.state_dict())
    assert [k for k, _ in net.named_parameters()] == [k for k, _ in model.named_parameters()]
    assert torch.equal(net(x), expected)
    ones, straight = (1.0,) * n, tuple(range(n))
    same(net(x, Variant(straight, ones)), expected)
    differs = 0
    for i, block in enumerate(net.blocks):
        module = model.get_submodule(block.name)
        assert block.drops == (family.drops and not block.is_transition)
        by_hand = replaced(model, {block.name: Surgery(module, family.skip)})(x)
        same(net(x, Variant(straight, tuple(float(j != i) for j in range(n)))), by_hand)
        differs += not torch.allclose(by_hand, expected)
    assert differs == n  # the surgery did something, so the comparison means something
    i, j = family.swap
    assert net.structure.exchangeable(i, j)
    a, b = net.blocks[i].name, net.blocks[j].name
    order = [*straight]
    order[i], order[j] = j, i
    swapped = replaced(model, {a: model.get_submodule(b), b: model.get_submodule(a)})(x)
    same(net(x, Variant(tuple(order), ones)), swapped)
    assert not torch.allclose(swapped, expected)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].blocks < 16])
@torch.no_grad()
def test_states_are_never_modified_and_gates_scale_the_branch(name: str) -> None:
    family = FAMILIES[name]
    model = styles.randomise(family.make()).double()
    net = rf.wrap(model, torch.zeros(1, 3, family.size, family.size))
    state = net.stem(torch.randn(1, 3, family.size, family.size, dtype=torch.float64))
    for block in net.blocks:
        kept = state.clone()
        p = block.prologue(state)
        half = block.closing(block.shortcut(p) + 0.5 * block.branch(p))
        same(block.run(state, 0.5), half)
        same(block.run(state, torch.full((1, 1, 1, 1), 0.5)), half)
        same(block.run(state, 0.0), block.skip(state))
        after = block.run(state)
        assert torch.equal(state, kept)
        if block.drops:
            assert torch.equal(block.skip(state), state)
        state = after
    kept = state.clone()
    net.head(state)
    assert torch.equal(state, kept)


def test_loop_without_block_modules() -> None:
    model = styles.randomise(styles.LoopNetwork()).double()
    net = rf.wrap(model, torch.zeros(1, 3, 8, 8))
    assert net.structure.names == ("branches.0", "branches.1", "branches.2")
    assert net.structure.drops == (False, False, False)  # the stem has no ReLU, so relu(x) is not x
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    s = F.relu(model.stem(x))
    s = F.relu(s + model.branches[2](s))
    s = F.relu(s + model.branches[1](s))
    same(net(x, Variant((0, 2, 1), (0.0, 1.0, 1.0))), model.head(s.mean((2, 3))))


@pytest.mark.parametrize("batch_norm", [True, False])
@torch.no_grad()
def test_sequential(batch_norm: bool) -> None:
    model = styles.randomise(styles.sequential_vgg(batch_norm)).double()
    net = rf.wrap(model, torch.zeros(1, 3, 16, 16))
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    same(net(x, Variant((0, 1, 2, 3), (1.0,) * 4)), model(x))
    assert net.structure.kinds == ("plain",) * 4
    assert net.structure.deletable == (True, False, True, True)
    assert net.structure.drops == (False, False, False, True)
    assert not any(net.structure.gateable)
    unit = 3 if batch_norm else 2
    convs = [i for i, m in enumerate(model) if isinstance(m, nn.Conv2d)][1:]
    for b in (0, 2, 3):
        assert net.blocks[b].name == str(convs[b])
        removed = range(convs[b], convs[b] + unit)
        shorter = nn.Sequential(*(m for i, m in enumerate(model) if i not in removed))
        same(net(x, Variant((0, 1, 2, 3), tuple(float(j != b) for j in range(4)))), shorter(x))
    with pytest.raises(ValueError, match=r"block 1 .* cannot be deleted"):
        net(x, Variant((0, 1, 2, 3), (1.0, 0.0, 1.0, 1.0)))
    with pytest.raises(ValueError, match=r"must be 0 or 1, got 0\.5"):
        net(x, Variant((0, 1, 2, 3), (1.0, 1.0, 1.0, 0.5)))


@torch.no_grad()
def test_torchvision_vgg() -> None:
    model = torchvision.models.vgg11_bn(init_weights=False)
    model.classifier = nn.Linear(512 * 7 * 7, 7)  # the original one has 120 million weights
    model = styles.randomise(model).double()
    net = rf.wrap(model, torch.zeros(1, 3, 32, 32))
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    assert len(net.blocks) == 7
    order = tuple(range(7))
    same(net(x, Variant(order, (1.0,) * 7)), model(x))
    nothing = {f"features.{i}": nn.Identity() for i in (11, 12, 13)}
    assert net.blocks[2].name == "features.11"
    same(net(x, Variant(order, (1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0))), replaced(model, nothing)(x))


@torch.no_grad()
def test_highway_gate_is_reachable() -> None:
    model = styles.randomise(styles.Network(styles.HighwayBlock)).double()
    net = rf.wrap(model, torch.zeros(1, 3, 16, 16))
    x = net.stem(torch.randn(2, 3, 16, 16, dtype=torch.float64))
    block = net.blocks[0]
    t = block.transform(block.prologue(x))
    same(t, torch.sigmoid(model.layer1[0].gate(x) - 1))
    assert rf.wrap(styles.Network(styles.PaddedBlock), torch.zeros(1, 3, 16, 16)).blocks[0].transform(x) is None
