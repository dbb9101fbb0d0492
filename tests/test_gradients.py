"""Path gradients: every block style against gradients written by hand, the unraveled view, plans, and refusals."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import resens_fast as rf
from resens_fast import planner_py, sweeps
from resens_fast.errors import SweepError
from resens_fast.plan import HEAD, RESTORE, RUN, SAVE, SHORTCUT
from tests import styles
from tests.conftest import small_resnet
from tests.path_nets import STYLES, PathNet

ENGINES = ("reference", "torch")


@cache
def path_net(style: str) -> PathNet:
    return STYLES[style]()


def batch(images: int = 3, classes: int = 5, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(images, 3, size, size, generator=generator, dtype=torch.float64)
    return values, torch.randint(0, classes, (images,), generator=generator)


def close(found: Tensor, expected: Tensor) -> None:
    """To 1e-10 of the largest value of each path; a path without a gradient must have none."""
    scale = expected.flatten(1).abs().amax(dim=1)
    worst = (found.double() - expected).flatten(1).abs().amax(dim=1)
    assert bool((worst <= 1e-10 * scale).all()), (worst / scale).max()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("style", STYLES)
def test_every_style_against_gradients_written_by_hand(style: str, engine: str) -> None:
    truth, (images, labels) = path_net(style), batch()
    n = len(truth.net.blocks)
    paths = sweeps.paths(truth.net, samples=3) + sweeps.from_gates(truth.net, [[(-0.5, 0, 2)[j % 3] for j in range(n)]])
    expected = truth.gradients(images, labels, paths)
    assert bool((expected.flatten(1).norm(dim=1) > 0).all())
    close(rf.input_gradients(truth.net, paths, images, labels, engine=engine), expected)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("style", ["padded", "shared prologue", "in place", "shipped highway"])
def test_gradients_at_the_image(style: str, engine: str) -> None:
    truth, (images, labels) = path_net(style), batch()
    paths = sweeps.paths(truth.net, samples=3)
    expected = truth.gradients(images, labels, paths, at="image")
    close(rf.input_gradients(truth.net, paths, images, labels, at="image", engine=engine), expected)


@pytest.mark.parametrize("style", STYLES)
def test_the_sum_over_all_paths_is_the_full_gradient(style: str) -> None:
    """The unraveled view: 2^n paths, with the forward's own ReLU pattern."""
    truth, (images, labels) = path_net(style), batch()
    n = len(truth.net.blocks)
    paths = sweeps.paths(truth.net, samples=100)
    assert len(paths) == len({row.gates for row in paths}) == 2**n
    state = truth.stem(images).detach().requires_grad_()
    out = state
    for block in truth.blocks:
        shortcut, branch, closing = truth.terms(block, out)
        out = closing(shortcut + branch)
    (full,) = torch.autograd.grad(F.cross_entropy(truth.head(out), labels, reduction="sum"), state)
    found = rf.input_gradients(truth.net, paths, images, labels, engine="torch").sum(dim=0)
    torch.testing.assert_close(found, full, rtol=1e-10, atol=1e-10 * float(full.abs().max()))


class Tiny(nn.Module):
    """Two blocks with identity shortcuts and nothing after the addition: small enough for whole Jacobians."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, 1, 1)
        self.one = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3, 1, 1))
        self.two = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3, 1, 1))
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.one(x)
        x = x + self.two(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("engine", ENGINES)
def test_no_block_and_every_block_are_the_closed_forms(engine: str) -> None:
    """k = 0 leaves the head's gradient as it is; k = n multiplies it by every branch's transposed Jacobian."""
    torch.manual_seed(1)
    model: Any = styles.randomise(Tiny()).double()
    net = rf.wrap(model, torch.zeros(1, 1, 4, 4))
    images, labels = torch.randn(1, 1, 4, 4, dtype=torch.float64), torch.tensor([2])
    x0 = model.stem(images).detach()
    x1 = (x0 + model.one(x0)).detach()
    x2 = (x1 + model.two(x1)).detach().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model.head(x2.mean((2, 3))), labels), x2)
    j0, j1 = (torch.autograd.functional.jacobian(f, x).reshape(32, 32) for f, x in ((model.one, x0), (model.two, x1)))
    nothing, everything = rf.input_gradients(net, sweeps.paths(net, [0, 2]), images, labels, engine=engine)
    assert torch.equal(nothing, g)
    torch.testing.assert_close(everything.flatten(), j0.T @ (j1.T @ g.flatten()), rtol=1e-12, atol=1e-14)


def smooth(block: Any) -> bool:
    """Whether the loss has a derivative at a gate of 0: a ReLU after the block or before both of its ways leaves zeros
    on which the next ReLU turns.
    """
    return not block.recipe.closing.nodes and not block.recipe.prologue.nodes


@pytest.mark.parametrize("style", STYLES)
def test_gradcheck_of_every_block(style: str) -> None:
    """A block's output is differentiable in its state and its gate, at a gate of 0 too where nothing closes it."""
    net = path_net(style).net
    generator = torch.Generator().manual_seed(0)
    for block in net.blocks[-4:-2]:  # a transition (where there is one) and the block after it
        channels = block.shape_in[0]
        x = torch.randn(1, channels, 4, 4, generator=generator, dtype=torch.float64).requires_grad_()
        for g in (0.0 if smooth(block) else 0.2, 0.7):
            gate = torch.tensor(g, dtype=torch.float64, requires_grad=True)
            assert torch.autograd.gradcheck(block.run, (x, gate), fast_mode=True)


@pytest.mark.parametrize("style", STYLES)
def test_gradients_of_gates_are_differences_of_the_loss(style: str) -> None:
    """Central differences in float64; at a gate of 0 the branch runs."""
    truth, (images, labels) = path_net(style), batch()
    n = len(truth.net.blocks)
    off = [0.0 if smooth(block) else 0.2 for block in truth.net.blocks]
    gates = [[(1.0, off[j], 0.5)[j % 3] for j in range(n)], [1.0] * n]
    found = rf.gate_gradients(truth.net, sweeps.from_gates(truth.net, gates), (images, labels), progress=False)
    assert found.shape == (2, n)
    step = 2.0**-24  # so small that no ReLU changes sides
    for row, expected in zip(gates, found, strict=True):
        for j in range(n):
            losses = []
            for sign in (1, -1):
                changed = [g + sign * step * (i == j) for i, g in enumerate(row)]
                logits = truth.net(images, rf.Configuration(tuple(range(n)), tuple(changed)))
                losses.append(float(F.cross_entropy(logits, labels).detach()))
            assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float(expected[j]), rel=1e-4, abs=1e-7)


def test_gates_of_two_orders_are_told_apart_where_the_words_are_equal() -> None:
    """With block 0 deleted both orders run the same blocks, but its branch would run at another place."""
    net = path_net("shared prologue").net
    paths = sweeps.from_words(net, [[0, 1, 2, 3, 4, 5], [1, 0, 2, 3, 4, 5]], [[0, 1, 1, 1, 1, 1]] * 2)
    assert rf.plan(net, paths).words == 1
    found = rf.gate_gradients(net, paths, batch(), progress=False)
    assert float((found[0, 0] - found[1, 0]).abs()) > 1e-6
    alone = torch.cat([rf.gate_gradients(net, paths.take(np.array([c])), batch(), progress=False) for c in (0, 1)])
    torch.testing.assert_close(found, alone, rtol=1e-12, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("style", ["padded", "shared prologue", "bottleneck", "shipped highway"])
def test_norms_over_the_parameters_of_each_block(style: str, engine: str) -> None:
    truth, (images, labels) = path_net(style), batch(2)
    paths = sweeps.paths(truth.net, [0, 2, 5], samples=2)
    study = rf.path_gradients(
        truth.net, (images, labels), paths=paths, norm="parameters", engine=engine, progress=False
    )
    expected = np.zeros((len(paths), 2, len(truth.blocks)))
    for c, (order, gates) in enumerate(paths):
        for i in range(2):
            for j, block in enumerate(truth.blocks):
                loss = truth.loss(truth.stem(images[i : i + 1]), labels[i : i + 1], order, gates)
                found = torch.autograd.grad(loss, list(block.parameters()), allow_unused=True)
                expected[c, i, j] = sum(float((g**2).sum()) for g in found if g is not None) ** 0.5
    np.testing.assert_allclose(study.frame["norm"], np.sqrt((expected**2).sum(2)).mean(1), rtol=1e-10)
    for length, rows in study.by_block.groupby("length"):
        chosen = study.lengths == length
        np.testing.assert_allclose(rows["norm"], expected[chosen].mean((0, 1)), rtol=1e-10, atol=1e-14)


NETS = {
    preactivation: rf.wrap(small_resnet(preactivation=preactivation), torch.zeros(1, 3, 16, 16))
    for preactivation in (True, False)
}


@st.composite
def any_paths(draw: st.DrawFn, net: rf.ResidualNetwork) -> rf.Sweep:
    """Paths with any gates through networks in any order, with duplicates."""
    n, orders, gates = len(net.blocks), [], []
    for _ in range(draw(st.integers(1, 5))):
        order = list(range(n))
        for i in range(n):
            j = draw(st.integers(0, n - 1))
            if net.structure.exchangeable(i, j):
                order[i], order[j] = order[j], order[i]
        orders.append(order)
        gates.append(draw(st.lists(st.sampled_from([0.0, 0.0, 1.0, 1.0, -0.5, 3.0]), min_size=n, max_size=n)))
    return sweeps.from_words(net, orders, gates)


@pytest.mark.parametrize("preactivation", NETS)
@settings(max_examples=12, deadline=None)
@given(st.data())
def test_the_torch_engine_agrees_with_the_reference(preactivation: bool, data: st.DataObject) -> None:
    net, (images, labels) = NETS[preactivation], batch(2)
    paths = data.draw(any_paths(net))
    truth = rf.input_gradients(net, paths, images, labels, engine="reference")
    close(rf.input_gradients(net, paths, images, labels, engine="torch", dtype=torch.float64), truth)
    single = rf.input_gradients(net, paths, images.float(), labels, engine="torch")
    assert single.dtype == torch.float32
    assert float((single - truth).norm()) <= 1e-4 * float(truth.norm())


@pytest.mark.parametrize("python", [False, True])
@pytest.mark.parametrize("preactivation", NETS)
def test_words_are_read_from_the_loss_end(preactivation: bool, python: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if python:
        monkeypatch.setattr("resens_fast.extension.module", lambda: None)
    net = NETS[preactivation]
    paths = sweeps.paths(net, samples=20)
    plan = rf.gradient_plan(net, paths)
    assert isinstance(plan._trie, planner_py.Trie) == python
    letters: dict[int, list[tuple[int, float]]] = {}
    state: list[tuple[int, float]] = []
    slots: dict[int, list[tuple[int, float]]] = {}
    for (op, arg), gate in zip(plan.tape().instructions.tolist(), plan.tape().gates.tolist(), strict=True):
        if op == HEAD:
            letters[arg] = list(state)
        elif op == SAVE:
            slots[arg] = list(state)
        elif op == RESTORE:
            state = list(slots[arg])
        else:
            assert (op == RUN) == (gate != 0) and op in (RUN, SHORTCUT)
            state.append((arg, gate))
    through = [preactivation and not t for t in net.structure.transitions]  # an unchosen one hands the gradient on
    for c, path in enumerate(paths):
        expected = [(j, path.gates[j]) for j in reversed(range(6)) if path.gates[j] or not through[j]]
        assert letters[int(plan.word_of[c])] == expected
    assert plan.executed_runs < plan.requested_runs
    assert plan.order == tuple(range(6)) and not plan.reordered
    assert "20 paths" in rf.gradient_plan(net, sweeps.paths(net, 3, samples=20)).summary()


def test_the_forward_runs_once_and_suffixes_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (images, labels) = NETS[True], batch(2)
    plan = rf.gradient_plan(net, sweeps.paths(net, samples=20))
    executor = rf.engines.get("torch").prepare_gradients(net, plan, net.device, torch.float32, "first_block")
    import resens_fast.engines.torch_gradients as room

    backs, forwards = [], []
    back, begin = room.Transposes.back, room.Transposes.__init__
    monkeypatch.setattr(room.Transposes, "back", lambda self, g, gate: (backs.append(gate), back(self, g, gate))[1])
    monkeypatch.setattr(room.Transposes, "__init__", lambda self, *a: (forwards.append(a), begin(self, *a))[1])
    shares: list[float] = []
    executor.norms(images, labels, shares.append)
    assert len(forwards) == 6
    assert sum(gate != 0 for gate in backs) == plan.executed_runs < plan.requested_runs
    assert sum(shares) == pytest.approx(1)


def test_gradients_do_not_depend_on_company() -> None:
    """The loss is each image's own, so neither the batch nor the other paths matter."""
    net, (images, labels) = NETS[False], batch(5)
    paths = sweeps.paths(net, samples=4)
    together = rf.input_gradients(net, paths, images, labels, engine="torch", dtype=torch.float64)
    alone = rf.input_gradients(
        net, paths.take(np.array([3])), images[2:3], labels[2:3], engine="torch", dtype=torch.float64
    )
    torch.testing.assert_close(together[3:4, 2:3], alone, rtol=1e-10, atol=1e-14)


def test_the_users_network_and_modes_are_left_alone() -> None:
    model = small_resnet()
    model.train()
    net = rf.wrap(model, torch.zeros(1, 3, 16, 16))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images, labels = batch()
    images = images.float()
    given, paths = images.clone(), sweeps.paths(net, [1, 5], samples=2)
    expected = rf.input_gradients(net, paths, images, labels, engine="torch")
    with torch.inference_mode():
        inside = rf.input_gradients(net, paths, images.clone(), labels.clone(), engine="torch")
        gates = rf.gate_gradients(net, paths, (images.clone(), labels.clone()), progress=False)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        under = rf.input_gradients(net, paths, images, labels, engine="torch")
        gates_under = rf.gate_gradients(net, paths, (images, labels), progress=False)
    assert torch.equal(inside, expected) and torch.equal(under, expected)
    assert torch.equal(gates, gates_under)
    assert model.training and torch.equal(images, given)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_small_gradients_do_not_underflow(dtype: torch.dtype) -> None:
    """Gates of 1e-20 in six blocks: a gradient of 1e-120 in float32, whose smallest number is 1e-45."""
    net, (images, labels) = NETS[True], batch(2)
    paths = sweeps.from_gates(net, [[1e-20 if dtype == torch.float32 else 1e-3] * 6])
    for norm in ("first_block", "parameters"):
        found, truth = (
            rf.path_gradients(net, data, paths=paths, norm=norm, engine=engine, dtype=kind, progress=False)
            for engine, kind, data in (
                ("torch", dtype, (images.float(), labels)),
                ("reference", None, (images, labels)),
            )
        )
        close_to = 1e-4 if dtype == torch.float32 else 0.05
        np.testing.assert_allclose(found.frame["norm"], truth.frame["norm"], rtol=close_to)
        if norm == "parameters":
            np.testing.assert_allclose(found.by_block["norm"], truth.by_block["norm"], rtol=close_to)


@pytest.mark.parametrize("engine", ["torch", "cpu"])
def test_a_label_that_leads_by_far(engine: str) -> None:
    net = rf.wrap(small_resnet(preactivation=False), torch.zeros(1, 3, 8, 8))
    with torch.no_grad():
        net.model.get_submodule("fc").bias[1] += 150  # type: ignore[operator,union-attr]
    images, labels = torch.randn(2, 3, 8, 8), torch.ones(2, dtype=torch.int64)
    paths = sweeps.intact(net)
    found, right = (
        rf.path_gradients(net, (images, labels), paths=paths, engine=each).frame["norm"].item()
        for each in (engine, "reference")
    )
    assert 0 < right < 1e-60
    assert found == pytest.approx(right, rel=1e-4)


def test_a_broken_image_is_counted() -> None:
    net, (images, labels) = NETS[True], batch(4)
    images[2, 0, 0, 0] = torch.nan
    for engine in ENGINES:
        study = rf.path_gradients(net, (images, labels), [0, 3], samples=2, engine=engine, dtype=torch.float64)
        assert (study.frame["nonfinite"] == 1).all()
        assert np.isfinite(study.frame["norm"]).all()
        whole = rf.path_gradients(net, (images[[0, 1, 3]], labels[[0, 1, 3]]), [0, 3], samples=2, dtype=torch.float64)
        np.testing.assert_allclose(study.frame["norm"], whole.frame["norm"], rtol=1e-10)


def test_other_sizes_and_dtypes() -> None:
    net, (images, labels) = NETS[True], batch(2, size=20)
    paths = sweeps.paths(net, [0, 3], samples=3)
    truth = rf.input_gradients(net, paths, images, labels, engine="reference")
    assert truth.shape == (4, 2, 8, 20, 20)
    found = rf.input_gradients(net, paths, images.float(), labels)
    assert float((found - truth).norm()) <= 1e-4 * float(truth.norm())
    half = rf.input_gradients(net, paths, images.float(), labels, engine="torch", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    # A bfloat16 forward moves ReLUs to the other side: no worse than torch's own full gradient is for that.
    full = [whole_gradient(net, images, labels, dtype) for dtype in (torch.float64, torch.bfloat16)]
    usual = float((full[1] - full[0]).norm() / full[0].norm())
    assert float((half.double() - truth).norm()) <= 4 * usual * float(truth.norm())


def whole_gradient(net: rf.ResidualNetwork, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """The loss's gradient at the first block's input, by autograd in one piece."""
    twin = copy.deepcopy(net).to(dtype)
    state = twin.stem(images.to(dtype)).detach().requires_grad_()
    out = state
    for block in twin.blocks:
        out = block.run(out)
    loss = F.cross_entropy(twin.head(out).double(), labels, reduction="sum")
    return torch.autograd.grad(loss, state)[0].double()


def test_sequential_blocks_belong_to_every_path() -> None:
    vgg = rf.wrap(styles.randomise(styles.sequential_vgg()), torch.zeros(1, 3, 16, 16))
    images, labels = batch()
    with pytest.raises(SweepError, match="no block of this network has a shortcut, so only one path"):
        rf.path_gradients(vgg, (images.float(), labels), progress=False)
    with pytest.raises(SweepError, match="leaves out block 0 .*, but it is sequential"):
        rf.input_gradients(vgg, sweeps.single(vgg), images.float(), labels)
    found = rf.input_gradients(vgg, sweeps.intact(vgg), images, labels, engine="reference")
    torch.testing.assert_close(found[0], whole_gradient(vgg, images, labels, torch.float64))
    close(rf.input_gradients(vgg, sweeps.intact(vgg), images, labels, engine="torch", dtype=torch.float64), found)
    assert bool(rf.gate_gradients(vgg, sweeps.single(vgg), (images.float(), labels), progress=False).isnan().all())
