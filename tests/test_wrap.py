"""wrap(): what it refuses, what it leaves alone, and that the wrapper behaves like the model it wraps."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resens_fast as rf
from resens_fast.errors import DataError, SweepError, WrapError
from tests import styles

EXAMPLE = torch.zeros(1, 3, 16, 16)


class Variant(NamedTuple):
    order: tuple[int, ...]
    gates: tuple[float, ...]


ONES = (1.0,) * 6
STRAIGHT = tuple(range(6))


def make(block: type[nn.Module] = styles.ProjectedBlock) -> nn.Module:
    torch.manual_seed(0)
    return styles.randomise(styles.Network(block))


def images(batch: int = 2, size: int = 16) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


class Branching(styles.ProjectedBlock):
    """Decides on a value while it runs, which no trace can follow."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() < 1e9 else x


class Noisy(styles.ProjectedBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.01 * torch.rand_like(x)


class Remembering(styles.Network):
    """Its forward keeps an alias across an in-place sum, which a functional graph cannot show."""

    def __init__(self) -> None:
        super().__init__(styles.ProjectedBlock)
        self.linear = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.conv1(x))
        kept = out
        out += self.layer1(out)
        return self.linear((out + kept).mean((2, 3)))


class Lambda(nn.Module):
    def __init__(self, result: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.result = result

    def forward(self, x: Tensor) -> object:
        return self.result(self.conv(x))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("resnet18", "needs a torch.nn.Module, got str"),
        (nn.Linear(4, 2), "cannot be guessed without a Conv2d"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), "nothing residual was found"),
        (Lambda(lambda y: (y, y)), "returns tuple"),
        (Lambda(lambda y: y), r"wrap\(\) needs logits \[B, classes\]"),
        (Lambda(lambda y: y.mean((2, 3)) * float("nan")), "not finite"),
        (Lambda(lambda y: y.reshape(1, 2, 3)), "accepts no 3-channel image"),
    ],
)
def test_refused_in_a_sentence(model: nn.Module, reason: str) -> None:
    with pytest.raises(WrapError, match=reason) as caught:
        rf.wrap(model)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_refused_where_tracing_or_the_probe_fails() -> None:
    with pytest.raises(WrapError, match=r"module layer1\.0 stayed whole because"):
        rf.wrap(styles.Network(Branching, depth=1), EXAMPLE)
    with pytest.raises(WrapError, match="different logits for the same images"):
        rf.wrap(nn.Sequential(styles.conv3(3, 3), Noisy(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), EXAMPLE)
    with pytest.raises(WrapError, match=r"fails on images of shape \(2, 5, 16, 16\)"):
        rf.wrap(make(), torch.zeros(1, 5, 16, 16))
    with pytest.raises(WrapError, match=r"example must be a batch of images .* got \(3, 16, 16\)"):
        rf.wrap(make(), torch.zeros(3, 16, 16))
    with pytest.raises(WrapError, match="TorchScript"):
        rf.wrap(torch.jit.trace(nn.Conv2d(3, 4, 3), EXAMPLE))


def test_refused_where_the_pieces_differ() -> None:
    with pytest.raises(WrapError, match=r"differ from the model by \d"):
        rf.wrap(styles.randomise(Remembering()), EXAMPLE)


def test_refused_with_the_way_out() -> None:
    with torch.device("meta"):
        empty = styles.Network(styles.ProjectedBlock)
    with pytest.raises(WrapError, match="on the meta device"):
        rf.wrap(empty)
    with pytest.raises(WrapError, match=r"pass model\.module$"):
        rf.wrap(nn.DataParallel(make()), EXAMPLE)
    with pytest.raises(WrapError, match=r"pass model\._orig_mod$"):
        rf.wrap(torch.compile(make()), EXAMPLE)
    model = make()
    model.bn1 = nn.BatchNorm2d(8, track_running_stats=False).eval()  # normalises with the batch in eval mode too
    with pytest.raises(WrapError, match="other images of the batch"):
        rf.wrap(model, EXAMPLE)


class Optional(styles.Network):
    """Takes more than the image where it is given, and writes into the images."""

    def forward(self, x: Tensor, targets: Tensor | None = None, features: bool = False) -> object:
        x *= 0.5
        logits = super().forward(x)
        if features:
            return logits, x
        return logits if targets is None else F.cross_entropy(logits, targets)


def test_optional_arguments_keep_their_defaults_and_images_stay_as_they_are() -> None:
    torch.manual_seed(0)
    model = styles.randomise(Optional(styles.ProjectedBlock))
    net = rf.wrap(model, EXAMPLE)
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(net(x, Variant(STRAIGHT, ONES)), model(x.clone()))
    assert torch.equal(x, images())


class ThreeWay(nn.Module):
    """x + f(x) + g(x) in one of its spellings (RepVGG); at a transition a third convolution takes the place of x."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.f, self.g = styles.conv3(i, o, stride), nn.Sequential(styles.conv3(i, o, stride), styles.conv3(o, o))
        self.shortcut = nn.Identity() if stride == 1 and i == o else nn.Conv2d(i, o, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.sum(self.shortcut(x), self.f(x), self.g(x))

    sum: Callable[[Tensor, Tensor, Tensor], Tensor] = staticmethod(lambda s, f, g: s + f + g)


class MiddleIn(ThreeWay):
    sum = staticmethod(lambda s, f, g: f + s + g)


class LastIn(ThreeWay):
    sum = staticmethod(lambda s, f, g: (f + g).add_(s))


@pytest.mark.parametrize("block", [ThreeWay, MiddleIn, LastIn])
def test_the_shortcut_of_a_sum_of_three(block: type[ThreeWay]) -> None:
    model = make(block)
    net = rf.wrap(model, EXAMPLE)
    modules = [m for m in model.modules() if isinstance(m, block)]
    assert len(net.blocks) == len(modules)
    with torch.no_grad():
        x = net.stem(images())
        for found, module in zip(net.blocks, modules, strict=True):
            torch.testing.assert_close(found.shortcut(found.prologue(x)), module.shortcut(x))
            torch.testing.assert_close(found.branch(found.prologue(x)), module.f(x) + module.g(x))
            x = found.run(x)


def draw(*_: object) -> None:
    torch.rand(1)  # from the global generator


def test_probing_leaves_no_trace_in_the_model() -> None:
    model = styles.Network(styles.ProjectedBlock).train()
    model.layer1.eval()
    model.conv1.weight.grad = torch.ones_like(model.conv1.weight)
    model.register_forward_pre_hook(draw)
    flags = {name: m.training for name, m in model.named_modules()}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    net = rf.wrap(model, EXAMPLE)
    assert torch.equal(torch.get_rng_state(), random)
    assert {name: m.training for name, m in model.named_modules()} == flags
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model.conv1.weight.grad, torch.ones_like(model.conv1.weight))
    assert all(p.requires_grad for p in net.parameters())
    assert next(net.parameters()) is next(model.parameters())
    assert rf.wrap(net).model is model


def test_guessed_image_sizes() -> None:
    assert rf.wrap(make()).input_shape == (3, 32, 32)
    assert rf.wrap(styles.ImageNetStyle()).input_shape == (1, 224, 224)


def test_stages_and_transitions() -> None:
    net = rf.wrap(make(), EXAMPLE)
    s = net.structure
    assert s.stages == (1, 1, 2, 2, 3, 3)
    assert s.transitions == (False, False, True, False, True, False)
    assert s.shapes_out == ((8, 16, 16),) * 2 + ((16, 8, 8),) * 2 + ((32, 4, 4),) * 2
    assert [b.stage for b in net.blocks] == list(s.stages)
    assert s.exchangeable(0, 1)
    assert not s.exchangeable(2, 3)
    assert not s.exchangeable(1, 3)
    assert s.digest == rf.wrap(make(), EXAMPLE).structure.digest
    assert s.digest != rf.wrap(make(), images(1, 32)).structure.digest
    table = net.summary()
    lines = [line for line in table.splitlines() if not line.startswith("  not ")]
    assert len(lines) == 2 + 6 + 1
    assert lines[-1].startswith('engine="auto" takes ')
    assert "layer2.0" in table
    assert "8x16x16 -> 16x8x8" in table
    assert f"{sum(p.numel() for p in net.model.layer1[0].parameters()):,}" in table.splitlines()[2]


def test_wrong_images_and_configurations() -> None:
    net = rf.wrap(make(), EXAMPLE)
    with pytest.raises(DataError, match=r"expected images \[B, 3, 16, 16\], got a tensor of shape \(2, 1, 16, 16\)"):
        net(torch.zeros(2, 1, 16, 16))
    with pytest.raises(DataError, match=r"got a tensor of shape \(3, 16, 16\)"):
        net(torch.zeros(3, 16, 16))
    with pytest.raises(DataError, match=r"in floating point, got torch\.uint8"):
        net(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(DataError, match="got list"):
        net([1, 2])
    rigid = nn.Sequential(*list(styles.sequential_vgg())[:-3], nn.Flatten(), nn.Linear(16 * 16, 10))
    with pytest.raises(DataError, match=r"\(3, 32, 32\) do not pass through the network, .* \(3, 16, 16\)"):
        rf.wrap(rigid, EXAMPLE)(images(2, 32))
    with pytest.raises(SweepError, match=r"such as sweep\[0\], not list"):
        net(images(), [1, 1, 1, 1, 1, 1])
    with pytest.raises(SweepError, match="2 positions and 2 gates, the network has 6 blocks"):
        net(images(), Variant((0, 1), (1.0, 1.0)))
    with pytest.raises(SweepError, match=r"block 3 expects a state of shape \(16, 8, 8\) but would get \(8, 16, 16\)"):
        net(images(), Variant((0, 3, 2, 1, 4, 5), ONES))
    assert net(images(2, 32)).shape == (2, 10)  # another size that the network itself accepts


def test_state_dict_and_copies() -> None:
    net = rf.wrap(make(), EXAMPLE)
    x = images()
    before = net(x, Variant(STRAIGHT, (1.0, 0.0, *ONES[2:])))
    fingerprint = net.fingerprint()
    twin, thawed = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    other = styles.randomise(make(), seed=5)
    assert not [*net.load_state_dict(other.state_dict()).missing_keys]
    torch.testing.assert_close(net(x), other(x))
    after = net(x, Variant(STRAIGHT, (1.0, 0.0, *ONES[2:])))
    assert not torch.allclose(after, before)
    assert net.fingerprint() != fingerprint
    for clone in (twin, thawed, loaded):
        assert clone.fingerprint() == fingerprint
        torch.testing.assert_close(clone(x, Variant(STRAIGHT, (1.0, 0.0, *ONES[2:]))), before)


def test_the_wrapper_is_the_model() -> None:
    model = make()
    net = rf.wrap(model, EXAMPLE)
    assert net.train() is net
    assert model.training
    assert model.layer1[0].bn1.training
    net.eval()
    assert not model.training
    assert not net.training
    assert net.linear is model.linear
    net.linear = nn.Linear(32, 4)
    assert model.linear is net.linear
    assert net(images()).shape == (2, 4)
    net.half()
    assert model.conv1.weight.dtype == net.dtype == torch.float16
    net.to(torch.float64)
    assert model.conv1.weight.dtype == torch.float64
    assert net.device == torch.device("cpu")
    assert [n for n, _ in net.named_modules()] == [n for n, _ in model.named_modules()]
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("model"))
    net(images().double())
    assert calls == ["model"]
    outer = nn.Sequential(net)
    assert list(outer.state_dict()) == [f"0.{k}" for k in model.state_dict()]
    outer.load_state_dict(outer.state_dict())


class Named(nn.Module):
    """Members that are called like the wrapper's own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = styles.conv3(3, 8)
        self.blocks = nn.Sequential(styles.ProjectedBlock(8, 8, 1), styles.ProjectedBlock(8, 8, 1))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def test_members_named_like_our_own() -> None:
    model = styles.randomise(Named())
    net = copy.deepcopy(rf.wrap(model, EXAMPLE))
    assert net.structure.names == ("blocks.0", "blocks.1")
    assert list(net.state_dict()) == list(model.state_dict())
    assert net.get_submodule("blocks.1") is net.model.blocks[1]
    torch.testing.assert_close(net(images(), Variant((0, 1), (1.0, 1.0))), model(images()))


def test_gradients_and_batch_statistics() -> None:
    model = make()
    net = rf.wrap(model, EXAMPLE)
    x = images(4)
    parameters = list(model.parameters())
    intact = torch.autograd.grad(model(x).square().sum(), parameters)
    ours = torch.autograd.grad(net(x, Variant(STRAIGHT, ONES)).square().sum(), parameters)
    torch.testing.assert_close(ours, intact)
    net.train()
    model.bn1.momentum = model.layer2[1].bn1.momentum = 1.0
    net(x, Variant(STRAIGHT, (1.0, 1.0, 1.0, 0.0, 1.0, 1.0)))
    torch.testing.assert_close(model.bn1.running_mean, model.conv1(x).mean((0, 2, 3)))
    assert model.layer2[0].bn1.num_batches_tracked == 1
    assert model.layer2[1].bn1.num_batches_tracked == 0  # the deleted branch did not run


def test_a_gate_can_be_learned() -> None:
    net = rf.wrap(make(), EXAMPLE)
    gate = torch.tensor(0.3, requires_grad=True)
    state = net.stem(images())
    net.blocks[0].run(state, gate).sum().backward()
    assert gate.grad is not None
    assert float(gate.grad) != 0


def test_works_under_inference_mode_and_in_half() -> None:
    model = make()
    with torch.inference_mode():
        net = rf.wrap(model, EXAMPLE)
        torch.testing.assert_close(net(images()), model(images()))  # a fused engine may run: other roundings
    assert model(images()).requires_grad
    half = rf.wrap(make().bfloat16(), EXAMPLE)
    assert half(images().bfloat16(), Variant(STRAIGHT, (0.5, *ONES[1:]))).dtype == torch.bfloat16


def test_fast_forward_only_in_eval_without_gradients() -> None:
    net = rf.wrap(make(), EXAMPLE)
    net.fast_forward = lambda x: torch.zeros(x.shape[0], 10)
    assert net(images()).abs().sum() > 0
    with torch.no_grad():
        assert net(images()).abs().sum() == 0
    with torch.inference_mode():
        assert net(images()).abs().sum() == 0
        assert net(images(), Variant(STRAIGHT, ONES)).abs().sum() > 0
        net.train()
        assert net(images()).abs().sum() > 0
