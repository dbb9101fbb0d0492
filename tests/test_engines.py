"""The engines that run everywhere: the torch engine against the float64 reference, and what HEAD counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

import resens_fast as rf
from resens_fast import sweeps
from resens_fast.engines.base import LOSS_LIMIT, LOSS_SCALE, Tally, count, cross_entropy
from resens_fast.errors import DataError, EngineError, SweepError, WrapError
from resens_fast.images import ImageReader
from tests.conftest import small_resnet

NETS = {
    preactivation: rf.wrap(small_resnet(preactivation=preactivation), torch.zeros(1, 3, 16, 16))
    for preactivation in (True, False)
}


@st.composite
def any_sweep(draw: st.DrawFn, net: rf.ResidualNetwork) -> rf.Sweep:
    """Masked, permuted and scaled configurations, with duplicates."""
    n = len(net.blocks)
    rows = draw(st.integers(1, 6))
    orders, gates = [], []
    for _ in range(rows):
        order = list(range(n))
        for i in range(n):
            j = draw(st.integers(0, n - 1))
            if net.structure.exchangeable(i, j):
                order[i], order[j] = order[j], order[i]
        orders.append(order)
        gates.append(draw(st.lists(st.sampled_from([0.0, 1.0, 1.0, -0.5, 1e-6, 2.0]), min_size=n, max_size=n)))
    sweep = sweeps.from_words(net, orders, gates)
    return sweep + sweep if draw(st.booleans()) else sweep


@pytest.mark.parametrize("preactivation", [True, False])
@given(data=st.data(), batch=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_torch_engine_is_the_reference(preactivation: bool, data: st.DataObject, batch: int) -> None:
    net = NETS[preactivation]
    sweep = data.draw(any_sweep(net))
    images = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))
    truth = rf.logits(net, sweep, images, engine="reference")
    assert truth.dtype == torch.float64
    assert truth.shape == (len(sweep), batch, 5)
    torch.testing.assert_close(
        rf.logits(net, sweep, images, engine="torch", dtype=torch.float64), truth, rtol=1e-10, atol=1e-10
    )
    single = rf.logits(net, sweep, images, engine="torch")
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), truth, rtol=1e-4, atol=1e-4 * float(truth.abs().max()))


def test_configurations_by_hand(net: rf.ResidualNetwork, images: torch.Tensor) -> None:
    """The reference itself, against surgery on the model: a deleted block's last weights are zero, a swap exchanges
    modules.
    """
    import copy

    images = images[:3].double()
    rows = rf.logits(
        net, sweeps.single(net) + sweeps.from_orders(net, [[1, 0, 2, 3, 4, 5]]), images, engine="reference"
    )
    for i in range(6):
        model = copy.deepcopy(net.model).double()
        block = model.blocks[i]  # type: ignore[union-attr, index]
        last = block.conv2 if net.blocks[0].kind == "basic_preact" else block.bn2  # type: ignore[union-attr]
        for parameter in last.parameters():  # type: ignore[union-attr]
            torch.nn.init.zeros_(parameter)  # type: ignore[arg-type]
        torch.testing.assert_close(rows[i], model(images), rtol=1e-10, atol=1e-10)
    model = copy.deepcopy(net.model).double()
    a, b = model.blocks[0], model.blocks[1]  # type: ignore[union-attr, index]
    model.blocks[0], model.blocks[1] = b, a  # type: ignore[operator, index]
    torch.testing.assert_close(rows[6], model(images), rtol=1e-10, atol=1e-10)


def test_work_and_memory_are_the_plans(
    net: rf.ResidualNetwork, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = sweeps.pairs(net) + sweeps.intact(net) + sweeps.pairs(net)
    plan = rf.plan(net, sweep)
    executor = rf.engines.get("torch").prepare(net, plan, net.device, net.dtype)
    runs = []
    kind = type(executor.net.blocks[0])  # type: ignore[attr-defined]
    original = kind.run
    monkeypatch.setattr(kind, "run", lambda self, *a, **k: (runs.append(self.index), original(self, *a, **k))[1])
    shares: list[float] = []
    executor.tally(images[:2], torch.zeros(2, dtype=torch.long), shares.append)
    assert len(runs) == plan.executed_runs < plan.requested_runs
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("engine", ["torch", "reference"])
def test_tally_counts_what_the_logits_say(
    engine: str, net: rf.ResidualNetwork, images: torch.Tensor, labels: torch.Tensor
) -> None:
    sweep = sweeps.intact(net) + sweeps.delete_random(net, k=[1, 3], samples=4)
    frame = rf.evaluate(net, sweep, (images, labels), engine=engine, progress=False).frame
    rows = rf.logits(net, sweep, images, engine=engine).double()
    errors = (rows.argmax(-1) != labels).sum(-1).numpy()
    loss = torch.stack([torch.nn.functional.cross_entropy(row, labels) for row in rows]).numpy()
    np.testing.assert_array_equal(frame["errors"], errors)
    np.testing.assert_allclose(frame["loss"], loss, rtol=0, atol=1e-5)
    assert (frame["images"] == 40).all()
    assert (frame["nonfinite"] == 0).all()
    assert ((frame["error_low"] <= frame["error"]) & (frame["error"] <= frame["error_high"])).all()


@pytest.mark.parametrize("engine", ["reference", "torch", "cpu"])
def test_logits_tell_their_progress(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from resens_fast import jobs

    if engine == "cpu" and rf.extension.reason():
        pytest.skip("the extension is missing")
    shares: list[float] = []
    monkeypatch.setattr(jobs.Bar, "advance", lambda self, count: lambda share: shares.append(share * count))
    net = rf.wrap(small_resnet().eval(), torch.zeros(1, 3, 8, 8))
    rf.logits(net, sweeps.single(net), torch.randn(5, 3, 8, 8), engine=engine)
    assert sum(shares) == pytest.approx(5)


def test_the_gradient_of_the_loss_keeps_its_digits() -> None:
    """The label's own is minus the sum of the others', however small these are; else it is torch's."""
    inf, nan = float("inf"), float("nan")
    rows = [[1.0, 2, 3], [-5, 0, 9], [200, 0, 1], [inf, 0, 1], [0, inf, 1], [nan, 0, 1], [-inf, 0, 1], [0, -inf, 1]]
    z = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    labels = torch.zeros(len(rows), dtype=torch.int64)
    ours, torchs = cross_entropy(z, labels), torch.nn.functional.cross_entropy(z, labels, reduction="none")
    torch.testing.assert_close(ours, torchs, equal_nan=True)
    found, right = (torch.autograd.grad(loss.sum(), z)[0] for loss in (ours, torchs))
    assert right[2, 0] == 0
    right[2, 0] = -(right[2, 1] + right[2, 2])
    torch.testing.assert_close(found, right, rtol=200 * 2**-52, atol=0, equal_nan=True)  # of a difference of 200


def test_count_on_ties_and_non_finite_logits() -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor(
        [[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [nan, 5.0, 0.0], [inf, 0.0, 0.0], [-inf, 0.0, 0.0], [0.0, 1e9, 0.0]]
    )
    labels = torch.tensor([0, 2, 1, 0, 1, 0])
    errors, loss, nonfinite = count(logits, labels).tolist()
    assert errors == 5  # the tie goes to the lowest index; a non-finite image is an error whatever its label
    assert nonfinite == 3
    expected = np.log(2 + np.exp(-1.0)) + np.log(2 + np.exp(-1.0)) + LOSS_LIMIT
    assert loss == pytest.approx(expected * LOSS_SCALE, abs=2)
    total = Tally.gather(2, {1: count(logits, labels), 0: count(logits[:1], labels[:1])})
    assert total.errors.tolist() == [0, 5]
    assert total.errors.dtype == np.int64


def test_nan_images_are_reported(net: rf.ResidualNetwork, images: torch.Tensor, labels: torch.Tensor) -> None:
    broken = images.clone()
    broken[3, 0, 0, 0] = float("nan")
    row = rf.evaluate(net, sweeps.intact(net), (broken, labels), progress=False).frame.iloc[0]
    assert row["nonfinite"] == 1
    assert np.isfinite(row["loss"])


def test_engine_errors(net: rf.ResidualNetwork, images: torch.Tensor) -> None:
    with pytest.raises(EngineError, match="unknown engine 'fast'; choose auto"):
        rf.logits(net, sweeps.intact(net), images, engine="fast")
    with pytest.raises(EngineError, match="reference engine cannot run this: it computes in float64 only"):
        rf.logits(net, sweeps.intact(net), images, engine="reference", dtype=torch.float32)
    with pytest.raises(EngineError, match="torch.int32"):
        rf.logits(net, sweeps.intact(net), images, engine="torch", dtype=torch.int32)
    with pytest.raises(SweepError, match="of a network with 9 blocks"):
        other = rf.wrap(small_resnet(depth=20), torch.zeros(1, 3, 16, 16))
        rf.logits(net, sweeps.intact(other), images)
    with pytest.raises(SweepError, match="not list"):
        rf.logits(net, [1], images)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"\[40, 16, 16\]"):
        rf.logits(net, sweeps.intact(net), images[:, 0])


def test_engine_options_that_cannot_be(net: rf.ResidualNetwork, images: torch.Tensor) -> None:
    sweep = sweeps.intact(net)
    with pytest.raises(EngineError, match="dtype must be a torch.dtype such as torch.float32, not 'float32'"):
        rf.logits(net, sweep, images, dtype="float32")  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="16 bits or more, not torch.float8"):
        rf.logits(net, sweep, images, dtype=torch.float8_e4m3fn)
    for device in ("no-such-device", "meta"):
        with pytest.raises(EngineError, match=f"the device '{device}' cannot be used"):
            rf.logits(net, sweep, images, device=device)
    with pytest.raises(WrapError, match=r"not ResNet; call resens_fast\.wrap"):
        rf.logits(net.model, sweep, images)  # type: ignore[arg-type]


def test_the_dtype_is_the_one_that_was_asked_for_under_autocast(net: rf.ResidualNetwork, images: torch.Tensor) -> None:
    sweep = sweeps.single(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = rf.logits(net, sweep, images)
    torch.testing.assert_close(found, rf.logits(net, sweep, images))


def test_training_flags_and_weights_are_left_alone(images: torch.Tensor, labels: torch.Tensor) -> None:
    model = small_resnet()
    model.train()
    model.blocks[1].bn1.eval()  # type: ignore[union-attr, index]
    flags = [m.training for m in model.modules()]
    net = rf.wrap(model, torch.zeros(1, 3, 16, 16))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    given_images = images.clone()
    rf.evaluate(net, sweeps.single(net), (images, labels), progress=False)
    rf.logits(net, sweeps.single(net), images)
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(images, given_images)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_bfloat16(net: rf.ResidualNetwork, images: torch.Tensor) -> None:
    truth = rf.logits(net, sweeps.single(net), images[:4], engine="reference")
    rows = rf.logits(net, sweeps.single(net), images[:4], engine="torch", dtype=torch.bfloat16)
    assert rows.dtype == torch.bfloat16
    assert float((rows.double() - truth).norm() / truth.norm()) < 0.05


def test_auto_passes_over_fused_engines_that_do_not_fit(net: rf.ResidualNetwork, images: torch.Tensor) -> None:
    """Images of another size, and hooks: the torch engine runs them, a fused one says why it does not."""
    large, sweep = torch.randn(2, 3, 24, 20), sweeps.single(net)
    expected = rf.logits(net, sweep, large, engine="reference")
    torch.testing.assert_close(rf.logits(net, sweep, large).double(), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(EngineError, match=r"images are \(3, 24, 20\) and the network was wrapped for \(3, 16, 16\)"):
        rf.logits(net, sweep, large, engine="cpu")
    inner = net.model.get_submodule("blocks.2.conv1")
    handle = inner.register_forward_hook(lambda module, inputs, output: output + 1)
    try:
        with pytest.raises(EngineError, match=r"'blocks.2.conv1' has a forward hook"):
            rf.logits(net, sweep, images, engine="cpu")
        data = (images[:2], torch.zeros(2, dtype=torch.long))
        study = rf.evaluate(net, sweep, data, progress=False)
        assert "forward hook" in study.manifest["engine"]["passed_over"]["cpu"]
    finally:
        handle.remove()


def test_images_do_not_change_their_size_midway() -> None:
    """Also not between the pieces that an engine takes, of which only the first was shown to the network."""

    class Batches(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self):  # type: ignore[no-untyped-def]
            for size in (16, 16, 20):
                yield torch.randn(2, 3, size, size), torch.zeros(2, dtype=torch.int64)

    net = rf.wrap(small_resnet(), torch.zeros(1, 3, 16, 16))
    reader = ImageReader(DataLoader(Batches(), batch_size=None), net.structure)
    assert len(reader.take(2)[0]) == len(reader.take(2)[0]) == 2
    with pytest.raises(DataError, match=r"different sizes, \[3, 16, 16\] and \[3, 20, 20\]"):
        reader.take(2)
