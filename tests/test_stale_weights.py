"""Networks changed behind PyTorch's back: the fused engines see it, or decline, but never run old weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import resens_fast as rf
from resens_fast import extension
from resens_fast.engines.packed import Packed, packed
from resens_fast.errors import EngineError
from tests.conftest import randomise

if extension.module() is None:
    pytest.skip(f"no compiled extension: {extension.reason()}", allow_module_level=True)

X = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two pre-activation blocks with modules for everything, so that there is something to change."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(Block(), Block())
        self.fc = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(self.conv(x)).mean((2, 3)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.conv1, self.conv2 = (nn.Conv2d(16, 16, 3, 1, 1, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())


def conv(net: rf.ResidualNetwork) -> nn.Conv2d:
    return net.model.get_submodule("blocks.1.conv1")  # type: ignore[return-value]


def norm(net: rf.ResidualNetwork) -> nn.BatchNorm2d:
    return net.model.get_submodule("blocks.1.bn2")  # type: ignore[return-value]


def replace(net: rf.ResidualNetwork) -> None:
    """Weights that come to lie where others lay: neither addresses nor versions tell."""
    for parameter in net.parameters():
        parameter.data = parameter.data * 1.1
        parameter.data = parameter.data * 1.1


def one_value(net: rf.ResidualNetwork) -> None:
    conv(net).weight.data[3, 2, 1, 1] += 1.0


def through_numpy(net: rf.ResidualNetwork) -> None:
    conv(net).weight.detach().numpy()[...] *= 2.0


def statistics(net: rf.ResidualNetwork) -> None:
    norm(net).running_mean.data.add_(1.0)  # type: ignore[union-attr, operator]


def epsilon(net: rf.ResidualNetwork) -> None:
    norm(net).eps = 0.5


def padding(net: rf.ResidualNetwork) -> None:
    conv(net).padding_mode, conv(net)._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]


def dilation(net: rf.ResidualNetwork) -> None:
    conv(net).dilation, conv(net).padding = (2, 2), (2, 2)


def patched(net: rf.ResidualNetwork) -> None:
    module, original = norm(net), norm(net).forward
    module.forward = lambda x: 2 * original(x)  # type: ignore[method-assign]


def prune(net: rf.ResidualNetwork) -> None:
    torch.nn.utils.prune.l1_unstructured(conv(net), "weight", 0.5)


def hook(net: rf.ResidualNetwork) -> None:
    norm(net).register_forward_hook(lambda module, inputs, output: 2 * output)


CHANGES = [replace, one_value, through_numpy, statistics, epsilon, padding, dilation, patched, prune, hook]


def agree(net: rf.ResidualNetwork) -> bool:
    """Whether all engines that take the network, and its own forward, agree with the model as it is now."""
    with torch.no_grad():
        expected = net.model(X)
        found = [net(X)]
        sweep = rf.sweeps.intact(net)
        for engine in ("auto", "cpu", "torch"):
            try:
                found.append(rf.logits(net, sweep, X, engine=engine)[0])
            except EngineError:
                assert engine == "cpu"  # the others take everything
    scale = float(expected.abs().max())
    return all(float((each - expected).abs().max()) < 1e-4 * scale for each in found)


@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
def test_a_change_is_seen(change: Callable[[rf.ResidualNetwork], None]) -> None:
    net = rf.wrap(randomise(Net()).eval(), X)
    with torch.no_grad():
        before = net(X)
    assert agree(net)
    change(net)
    with torch.no_grad():
        assert float((net.model(X) - before).abs().max()) > 1e-3, "the test changes nothing"
    assert agree(net)


def test_a_network_that_cannot_be_copied_is_refused() -> None:
    net = rf.wrap(randomise(Net()).eval(), X)
    prune(net)
    net.model(X)  # with gradients: the pruned weight has a history now
    with pytest.raises(EngineError, match=r"cannot be copied .*prune.remove"):
        rf.logits(net, rf.sweeps.intact(net), X)
    torch.nn.utils.prune.remove(conv(net), "weight")
    assert agree(net)


def test_nothing_is_packed_twice() -> None:
    net = rf.wrap(randomise(Net()).eval(), X)
    kept = packed(net)
    for _ in range(3):
        with torch.no_grad():
            net(X)
        rf.logits(net, rf.sweeps.single(net), X, engine="cpu")
        net.train()
        net.eval()
        assert packed(net) is kept


def test_a_hook_for_all_modules_is_called() -> None:
    net = rf.wrap(randomise(Net()).eval(), X)
    with torch.no_grad():
        net(X)
        handle = register_module_forward_hook(
            lambda module, inputs, output: 2 * output if isinstance(module, nn.Linear) else None
        )
        try:
            torch.testing.assert_close(net(X), net.model(X))
        finally:
            handle.remove()


def test_a_hook_that_no_variant_would_call_is_refused() -> None:
    """Variants run the operations inside a block: the block's own hook, and the model's, would be passed by."""
    net = rf.wrap(randomise(Net()).eval(), X)
    data = (X, torch.zeros(3, dtype=torch.long))
    for name in ("", "blocks.1"):
        handle = net.model.get_submodule(name).register_forward_hook(lambda module, inputs, output: output + 1)
        for call in (
            lambda: rf.evaluate(net, rf.sweeps.single(net), data, progress=False),
            lambda: rf.path_gradients(net, data, lengths=[1], samples=1, progress=False),
            lambda: net(X, rf.sweeps.single(net)[0]),
            lambda: net(X, mask=[True, False]),
        ):
            with pytest.raises(EngineError, match=rf"'{name or 'model'}' has a forward hook, which no variant"):
                call()
        with torch.no_grad():
            torch.testing.assert_close(net(X), net.model(X))  # the model itself calls it
        handle.remove()
    assert agree(net)


def test_the_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every bit, of shapes and types; the same for any number of threads; refused where there is no memory."""

    def checksum(*tensors: torch.Tensor, threads: int = 1) -> int:
        return torch.ops.resens_fast.cpu_checksum(list(tensors), threads)  # type: ignore[no-any-return]

    big = torch.randn(3_000_001)
    whole = checksum(big)
    assert checksum(big, threads=4) == whole == checksum(big.clone())
    for at in (0, 15, 262_143, 262_144, 3_000_000):
        other = big.clone()
        other.view(torch.int32)[at] ^= 1
        assert checksum(other) != whole, at
    a, b = torch.randn(4, 6), torch.randn(4, 6)
    different = [
        checksum(a, b), checksum(b, a), checksum(a), checksum(a.T), checksum(a.reshape(6, 4)), checksum(a, a[:0]),
        checksum(a.view(torch.int32)), checksum(a[:, ::2]), checksum(a[:, 1::2]), checksum(a[None]), checksum(),
    ]  # fmt: skip
    assert len(set(different)) == len(different)
    for bad in (a.to("meta"), a.to_sparse()):
        with pytest.raises(ValueError, match="strided tensors on the CPU"):
            checksum(bad)
    freed = a.clone()
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="freed"):
        checksum(freed)


def test_another_default_device() -> None:
    """What the engines make for themselves lies on the CPU, wherever the caller wants new tensors."""
    net = rf.wrap(randomise(Net()).eval(), X)
    sweep, y = rf.sweeps.single(net), torch.zeros(3, dtype=torch.long)
    with torch.no_grad():
        expected = net(X), rf.logits(net, sweep, X, engine="cpu"), rf.input_gradients(net, sweep, X, y, engine="cpu")
        del net.__dict__["_packed"]
        with torch.device("meta"):
            found = net(X), rf.logits(net, sweep, X, engine="cpu"), rf.input_gradients(net, sweep, X, y, engine="cpu")
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("name", ["labels", "layout", "packed", "tape", "control"])
def test_the_operator_refuses_meta_tensors_among_real_ones(name: str) -> None:
    net = rf.wrap(randomise(Net()).eval(), X)
    state: Packed = packed(net)
    given: dict[str, Any] = {
        "labels": torch.zeros(3, dtype=torch.long),
        "layout": state.layout,
        "packed": state.weights("", False),
        "tape": torch.tensor([[2, 0], [2, 1], [4, 0]], dtype=torch.int32),
        "control": torch.zeros(3, dtype=torch.long),
    }
    given[name] = given[name].to("meta")
    labels, layout, weights, tape, control = given.values()
    with pytest.raises(ValueError, match="meta device"):
        torch.ops.resens_fast.eval(X, labels, layout, weights, [tape, torch.ones(3)], 1, 0, 1, 0, "", False, control)
