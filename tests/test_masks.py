"""net(x, mask=...): the same as configurations in eval, per image too; what runs, what batch norm sees, gradients."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import resens_fast as rf
from resens_fast.errors import SweepError
from tests import styles


class Variant(NamedTuple):
    order: tuple[int, ...]
    gates: tuple[float, ...]


BLOCKS = {
    "option-a": styles.PaddedBlock,
    "projection": styles.ProjectedBlock,
    "preact": styles.ActivatedProjectionBlock,
    "preact-raw": styles.RawProjectionBlock,
    "function": styles.FunctionBlock,
    "bottleneck": styles.FunctionBottleneck,
    "bottleneck-preact": styles.PreactBottleneck,
    "squeeze": styles.SqueezeBlock,
    "in-place": styles.InPlaceBlock,
    **{f"highway-{f}": partial(styles.HighwayBlock, form=f) for f in ("sum", "swapped", "carry", "lerp", "delta")},
}
N, B = 6, 7


def make(kind: str = "projection", width: int = 8, size: int = 16, **kwargs: object) -> rf.ResidualNetwork:
    torch.manual_seed(0)
    model = styles.randomise(styles.Network(BLOCKS[kind], width=width, **kwargs)).double()
    return rf.wrap(model, torch.zeros(1, 3, size, size))


def images(batch: int = B, size: int = 16) -> Tensor:
    return torch.randn(batch, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def row_masks(gated: bool = False, batch: int = B) -> Tensor:
    """Per image; block 2 runs for one image, block 3 for none, block 4 for all; with `gated` some gates are real."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(batch, N, generator=generator) < 0.5
    mask[:, 2], mask[:, 3], mask[:, 4] = False, False, True
    mask[batch // 2, 2] = True
    return mask * (0.25 + torch.rand(batch, N, generator=generator)) if gated else mask


def by_hand(net: rf.ResidualNetwork, x: Tensor, gates: Tensor) -> Tensor:
    return net(x, Variant(tuple(range(len(net.blocks))), tuple(gates.double().tolist())))


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", BLOCKS)
@torch.no_grad()
def test_masks_are_configurations_in_eval(kind: str) -> None:
    net, x = make(kind), images()
    for gated in (False, True):
        rows = row_masks(gated)
        assert torch.equal(net(x, mask=rows[0]), by_hand(net, x, rows[0]))
        out = net(x, mask=rows)
        for b in range(B):
            same(out[b : b + 1], by_hand(net, x[b : b + 1], rows[b]))
        assert not torch.allclose(out, net(x))
    assert torch.equal(x, images())
    same(net(x, mask=torch.ones(B, N, dtype=torch.bool)), net(x))
    same(net(x, mask=[True] * N), net(x))
    same(net(x, mask=torch.zeros(N)), by_hand(net, x, torch.zeros(N)))


@pytest.mark.parametrize("kind", BLOCKS)
def test_gradients_of_images_parameters_and_gates(kind: str) -> None:
    net = make(kind, width=4, size=8, depth=1)
    n = len(net.blocks)
    x = images(3, 8).requires_grad_()
    mask = torch.tensor([[True, False, True], [False, False, True], [True, True, True]])
    weight = net.get_submodule(net.blocks[1].name).conv2.weight if kind not in ("function", "bottleneck") else None
    # Channels that a shortcut pads with zeros stand on the kink of the closing ReLU when the gate is 0.
    small = 0.2 if kind == "option-a" else 0.0
    gates = torch.tensor([0.3, small, 0.7], dtype=torch.float64, requires_grad=True)
    assert n == 3
    for training in (False, True):
        net.train(training)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0  # a repeated forward must give the same
        check = partial(torch.autograd.gradcheck, fast_mode=True, atol=1e-6)
        assert check(lambda x: net(x, mask=mask), (x,))
        assert check(lambda x: net(x, mask=mask[0]), (x,))
        assert check(lambda x, g: net(x, mask=g), (x, gates))
        rows = gates.detach().repeat(3, 1).requires_grad_()
        assert check(lambda x, g: net(x, mask=g), (x, rows))
        if weight is not None:  # gradcheck writes into its inputs: the network's own weight is perturbed
            assert check(lambda _: net(x.detach(), mask=mask), (weight,))
    net.eval()
    net.zero_grad()
    net(x, mask=gates).square().sum().backward()
    assert gates.grad is not None
    assert bool((gates.grad != 0).all())  # at 0 too


@pytest.mark.parametrize("kind", ["projection", "preact", "in-place", "highway-delta"])
def test_gradients_are_those_of_every_image_alone(kind: str) -> None:
    net, x, rows = make(kind), images(), row_masks(True)
    parameters = list(net.parameters())
    ours = torch.autograd.grad(net(x, mask=rows).square().sum(), parameters, materialize_grads=True)
    alone = [torch.zeros_like(p) for p in parameters]
    for b in range(B):
        out = by_hand(net, x[b : b + 1], rows[b])
        own = torch.autograd.grad(out.square().sum(), parameters, materialize_grads=True)
        for total, g in zip(alone, own, strict=True):
            total += g
    for a, b in zip(ours, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def calls_of(net: rf.ResidualNetwork) -> dict[int, list[int]]:
    """How many images the second convolution of every block got, call by call; filled by forwards."""
    seen: dict[int, list[int]] = {b.index: [] for b in net.blocks}
    for block in net.blocks:
        conv = net.get_submodule(block.name).conv2
        conv.register_forward_hook(lambda _m, args, _o, i=block.index: seen[i].append(len(args[0])))
    return seen


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["option-a", "projection", "preact", "highway-sum"])
def test_a_deleted_branch_is_not_called(kind: str, training: bool) -> None:
    net = make(kind).train(training)
    seen, rows = calls_of(net), row_masks()
    net(images(), mask=rows)
    counts = rows.sum(0).tolist()
    assert seen == {j: [count] if count else [] for j, count in enumerate(counts)}
    assert counts[2:5] == [1, 0, B]
    for calls in seen.values():
        calls.clear()
    net(images(), mask=torch.tensor([1.0, 0, 0.5, 0, 0, 1]))
    assert seen == {0: [B], 1: [], 2: [B], 3: [], 4: [], 5: [B]}


@pytest.mark.parametrize("kind", ["projection", "preact"])
def test_batch_norm_sees_the_images_that_ran_the_block(kind: str) -> None:
    net, x, rows = make(kind).train(), images(), row_masks()
    rows[:, 0] = True
    before = {name: value.clone() for name, value in net.named_buffers()}
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    inputs: dict[int, Tensor] = {}
    for block in net.blocks:
        module = net.get_submodule(block.name)
        module.conv1.register_forward_hook(lambda _m, _a, out, i=block.index: inputs.__setitem__(i, out.detach()))
    net(x, mask=rows)
    for block in net.blocks:
        path = block.name
        norm = net.get_submodule(path).get_submodule("bn1" if kind == "projection" else "bn2")
        count = int(rows[:, block.index].sum())
        if count:
            assert len(inputs[block.index]) == count
            same(norm.running_mean, inputs[block.index].mean((0, 2, 3)))
            same(norm.running_var, inputs[block.index].transpose(0, 1).flatten(1).var(1))
        else:
            name = f"{path}.{'bn1' if kind == 'projection' else 'bn2'}"
            assert torch.equal(norm.running_mean, before[f"{name}.running_mean"])
            assert norm.num_batches_tracked == 0


def test_a_single_value_per_channel_takes_the_running_statistics() -> None:
    net, x = make("projection", size=4), images(5, 4)
    assert net.structure.shapes_out[-1][1:] == (1, 1)
    rows = torch.ones(5, N, dtype=torch.bool)
    rows[1:, 5] = False
    net.train()
    norm = net.get_submodule(net.blocks[5].name).bn1
    before = norm.running_mean.clone()
    net(x, mask=rows).sum().backward()
    assert torch.equal(norm.running_mean, before)
    assert norm.training
    rows[1, 5] = True
    net(x, mask=rows)
    assert not torch.equal(norm.running_mean, before)


def test_autocast_and_half() -> None:
    for kind in ("projection", "preact"):
        net, x = make(kind).float().train(), images().float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            net(x, mask=row_masks(True)).float().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
        half = make(kind).bfloat16()
        assert half(x.bfloat16(), mask=row_masks(True)).dtype == torch.bfloat16


def test_sequential_blocks_are_kept_or_deleted() -> None:
    torch.manual_seed(0)
    net = rf.wrap(styles.randomise(styles.sequential_vgg()).double(), torch.zeros(1, 3, 16, 16))
    n, x = len(net.blocks), images(3)
    free = [j for j in range(n) if net.structure.deletable[j]]
    fixed = next(j for j in range(n) if not net.structure.deletable[j])
    rows = torch.ones(3, n, dtype=torch.bool)
    rows[0, free[0]] = False
    out = net(x, mask=rows)
    for b in range(3):
        same(out[b : b + 1], by_hand(net, x[b : b + 1], rows[b]))
    with pytest.raises(SweepError, match=f"deletes block {fixed} .*without a shortcut"):
        net(x, mask=[j != fixed for j in range(n)])
    with pytest.raises(SweepError, match=f"block {free[0]} .* is sequential"):
        net(x, mask=[0.5 if j == free[0] else 1.0 for j in range(n)])
    with pytest.raises(SweepError, match="is sequential"):
        net(x, mask=torch.ones(n, requires_grad=True))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(5), r"the shape \[6\] for the whole batch or \[7, 6\] with a row per image, not \[5\]"),
        (torch.ones(6, 7), r"not \[6, 7\]"),
        (torch.ones(1, 6), r"not \[1, 6\]"),
        (torch.tensor(1.0), r"not \[\]"),
        (torch.ones(7, 6, 1), r"not \[7, 6, 1\]"),
        (torch.tensor([1, 1, float("nan"), 1, 1, 1]), r"gate for block 2 \(layer2\.0\) is nan"),
        ([1, 1, 1, 1, 1, float("-inf")], r"gate for block 5 .* is -inf"),
        (torch.ones(6, dtype=torch.complex64), "not torch.complex64"),
        (["yes"] * 6, "a mask is a tensor of booleans or gates, not list"),
        ("all", "not str"),
        ([[1, 2], [3]], "not list"),
    ],
)
def test_hostile_masks_are_one_sentence(mask: object, message: str) -> None:
    with pytest.raises(SweepError, match=message) as raised:
        make()(images(), mask=mask)
    assert "\n" not in str(raised.value)


def test_a_mask_and_a_configuration_exclude_each_other() -> None:
    with pytest.raises(SweepError, match="not both"):
        make()(images(), Variant(tuple(range(N)), (1.0,) * N), mask=torch.ones(N))
