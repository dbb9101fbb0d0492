"""Cases of test_triton_values.py for the gradients: what the kernels compute on the way back, against float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from resens_fast import fused
from resens_fast.gradient_plan import GradientPlan, gradient_plan
from resens_fast.plan import plan
from resens_fast.structure import Structure
from resens_fast.sweep import Sweep
from tests import triton_cases as base


def paths_of(structure: Structure, reordered: bool = False) -> Sweep:
    """Every block chosen; none; half of them without a transition; gates small, negative and above one."""
    n = len(structure)
    gates = np.ones((4, n), dtype=np.float32)
    gates[1] = 0
    gates[2, ::2] = 0
    gates[2, [i for i in range(n) if structure.transitions[i]]] = 0
    gates[3] = np.resize([1e-3, 1.7, -0.4, 0.0], n)
    orders = np.tile(np.arange(n, dtype=np.int16), (4, 1))
    if reordered:
        i, j = next((i, j) for i in range(n) for j in range(i) if structure.exchangeable(i, j))
        orders[:, [i, j]] = orders[:, [j, i]]
    return Sweep(structure, orders, gates, ("mask",) * 4, np.zeros(4, dtype=np.int64))


def planned(whole: fused.FusedNetwork, structure: Structure, paths: Sweep) -> GradientPlan:
    """The gradient plan of a network that was never wrapped: all the planner asks is what does nothing."""

    def piece(nothing: bool) -> Any:
        return SimpleNamespace(nodes=() if nothing else (SimpleNamespace(meta={}),))

    blocks = [
        SimpleNamespace(
            recipe=SimpleNamespace(
                gateable=True,
                prologue=piece(not b.shortcut.activated),
                shortcut=piece(b.shortcut.kind == "identity"),
                closing=piece(not b.closing_relu),
            )
        )
        for b in whole.blocks
    ]
    return gradient_plan(SimpleNamespace(structure=structure, blocks=blocks), paths)  # type: ignore[arg-type]


def along(block: fused.FusedBlock, gate: float, x: torch.Tensor) -> torch.Tensor:
    """The intact block, through which the gradient flows by the branch (times the gate) or by the shortcut."""
    h = x if block.scale is None else (fused._channels(block.scale) * x + fused._channels(block.shift)).relu()
    shortcut, branch = block.shortcut(h if block.shortcut.activated else x), h
    for conv in block.convs:
        branch = conv(branch)
    chosen = shortcut if gate == 0 else gate * branch
    y = (shortcut + branch).detach() + (chosen - chosen.detach())
    return y.relu() if block.closing_relu else y


class Relus(TorchFunctionMode):
    """Writes down what every ReLU gives. Given the outputs of another forward's, it lets through what those did."""

    def __init__(self, others: list[torch.Tensor] | None) -> None:
        super().__init__()
        self.others, self.outputs = others, list[torch.Tensor]()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is not torch.Tensor.relu:
            return result
        if self.others is not None:
            result = args[0] * (self.others[len(self.outputs)] > 0)
        self.outputs.append(result.detach().double())
        return result


def truth(
    whole: fused.FusedNetwork, paths: Sweep, images: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype,
    others: list[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Gradients [P, B, C, H, W] at the input of the first block by autograd in that type, path by path, in float64;
    and what the ReLUs behind the stem gave. `others`: as in `Relus`.
    """  # fmt: skip
    typed, rows = fused.convert(whole, dtype), []
    for path in paths:
        start = state = typed.stem(images.to(dtype)).requires_grad_()
        with Relus(others) as relus:
            for j in path.order:
                state = along(typed.blocks[j], path.gates[j], state)
            loss = F.cross_entropy(typed.head(state), labels, reduction="sum")
        rows.append(torch.autograd.grad(loss, start)[0].double())
    return torch.stack(rows), relus.outputs


def relus_of(ready: Any, images: torch.Tensor) -> list[torch.Tensor]:
    """What the ReLUs behind the stem give in the kernels' own forward, or what is as positive, in float64."""
    from resens_fast.kernels import launch
    from resens_fast.kernels.pack import width

    packed, memory, trail = ready.prepared.packed, ready.prepared.memory, ready.prepared.trail

    def view(area: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        channels, height, columns = shape
        used = area[: len(images) * height * columns * width(channels)]
        return used.view(len(images), height, columns, -1)[..., :channels].permute(0, 3, 1, 2).double()

    def activated(state: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        channels = state.shape[1]
        return (fused._channels(scale[:channels]) * state + fused._channels(shift[:channels])).relu()

    launch.stem(packed, memory, images)
    found, launches = [], trail.forward.launches
    for block, each in zip(trail.order, launches, strict=False):
        number, slot = packed.slot_of[block]
        group = packed.groups[number]
        shape = group.shape
        if shape.prologue:
            state = view(memory.states[each.first % 2], shape.shape_in)
            found.append(activated(state, group.scale[slot], group.shift[slot]))
        launch.run(packed, memory, trail.forward, group, each.first, 1, len(images))
        found += [view(memory.scratch[i % 2], (c.n, *c.out)) for i, c in enumerate(shape.convs[:-1])]
        if shape.closing:
            found.append(view(memory.states[(each.first + 1) % 2], shape.shape_out))
    if packed.head.relu:
        last = view(memory.states[len(trail.order) % 2], shape.shape_out)
        found.append(activated(last, packed.head.scale, packed.head.shift))
    return found


def run_paths(name: str, dtype: torch.dtype, reordered: bool = False) -> base.Result:
    """Gradients and norms along paths; the bound is twice what one rounding for each convolution adds up to.

    An input of a ReLU that is all but zero may be rounded to the other side of it, and every gradient through it is
    another one. So what the ReLUs give is compared with float64 first, with four times PyTorch's own error as bound,
    and then the gradients that they lead to.
    """
    from resens_fast.engines.triton_gradients import TritonGradientExecutor

    whole, structure = base.network(name)
    paths = paths_of(structure, reordered)
    made = planned(whole, structure, paths)
    g = torch.Generator().manual_seed(11)
    images = torch.randn(2, *whole.input_shape, generator=g)
    labels = torch.randint(0, whole.classes, (2,), generator=g)
    ready = TritonGradientExecutor(whole, made, torch.device("cpu"), dtype)
    relus = relus_of(ready, images)
    right, eager = (truth(whole, paths[:1], images, labels, each)[1] for each in (torch.float64, dtype))
    for i, (ours, theirs, exact) in enumerate(zip(relus, eager, right, strict=True)):
        if base.rms(ours - exact) > 4 * base.rms(theirs - exact) + 4 * torch.finfo(dtype).eps * base.rms(exact):
            return {"failure": f"ReLU {i} is off by {base.rms(ours - exact)}"}
    exact = truth(whole, paths, images, labels, torch.float64, relus)[0]
    size = exact.square().mean((1, 2, 3, 4), keepdim=True).sqrt()  # paths differ by orders of magnitude
    bound = 2 * torch.finfo(dtype).eps * (1 + sum(len(b.convs) for b in whole.blocks)) ** 0.5
    found = ready.gradients(images, labels)[torch.from_numpy(made.word_of)].double()
    done: list[float] = []
    norms = ready.norms(images, labels, done.append)[torch.from_numpy(made.word_of)]
    off = float((norms / found.flatten(2).norm(dim=2) - 1).abs().max())
    if not off <= 1e-12:
        return {"failure": f"the norms are off by {off}"}
    if abs(sum(done) - 1) > 1e-6:
        return {"failure": f"progress adds up to {sum(done)}"}
    return {"error": base.rms((found - exact) / size), "bound": bound}


def run_paths_alone() -> base.Result:
    """A path alone, in a small budget, and an image alone, give the same bits as in the crowd."""
    from resens_fast.engines.triton_gradients import TritonGradientExecutor

    whole, structure = base.network("post-pooled-pad-3-10")
    paths = paths_of(structure)
    g = torch.Generator().manual_seed(12)
    images = torch.randn(2, *whole.input_shape, generator=g)
    labels = torch.randint(0, whole.classes, (2,), generator=g)
    made = planned(whole, structure, paths)
    cpu = torch.device("cpu")
    crowd = TritonGradientExecutor(whole, made, cpu, torch.bfloat16).norms(images, labels)
    crowd = crowd[torch.from_numpy(made.word_of)]
    for p in (2, 3):
        one = Sweep(structure, paths.orders[p : p + 1], paths.gates[p : p + 1], ("mask",), np.zeros(1, dtype=np.int64))
        alone = TritonGradientExecutor(whole, planned(whole, structure, one), cpu, torch.bfloat16)
        if not torch.equal(alone.norms(images[1:], labels[1:])[0], crowd[p, 1:]):
            return {"failure": f"path {p} alone differs"}
    with base.little_memory(made, 1):
        tight = TritonGradientExecutor(whole, made, cpu, torch.bfloat16)
    if tight.prepared.schedule.buffers != made.least_budget or tight.batch != 1:
        return {"failure": f"{tight.prepared.schedule.buffers} buffers of {tight.batch} images were used"}
    found = tight.norms(images, labels)[torch.from_numpy(made.word_of)]
    return {"error": float((found - crowd).abs().max()), "bound": 0.0}


def run_tiny() -> base.Result:
    """Norms far below what float16 or float32 hold, from gates, small weights and a loss that is all but zero."""
    from resens_fast.engines.triton_gradients import TritonGradientExecutor

    whole, structure = base.network("post-pooled-pad-3-10")
    head = fused.dataclasses.replace(whole.head, bias=whole.head.bias + torch.tensor([20.0, 0, 0]))
    blocks = []
    for block in whole.blocks:  # each branch shrinks a gradient a thousandfold
        last = fused.dataclasses.replace(block.convs[-1], weight=block.convs[-1].weight * 1e-3)
        blocks.append(fused.dataclasses.replace(block, convs=(*block.convs[:-1], last)))
    whole = fused.dataclasses.replace(whole, head=head, blocks=tuple(blocks))
    paths = paths_of(structure)
    paths = Sweep(structure, paths.orders, paths.gates * np.float32(1e-30), paths.kind, paths.k)
    images = torch.randn(1, *whole.input_shape, generator=torch.Generator().manual_seed(14))
    labels = torch.tensor([0])
    made, worst = planned(whole, structure, paths), 0.0
    exact = truth(whole, paths, images, labels, torch.float64)[0].flatten(2).norm(dim=2)
    if not 0 < float(exact.min()) < 1e-100:
        return {"failure": f"the norms are {exact.flatten().tolist()}"}
    for dtype, allowed in ((torch.float32, 1e-4), (torch.float16, 0.1)):
        ready = TritonGradientExecutor(whole, made, torch.device("cpu"), dtype)
        found = ready.norms(images, labels)[torch.from_numpy(made.word_of)]
        worst = max(worst, float((found / exact - 1).abs().max()) / allowed)
    return {"error": worst, "bound": 1.0}


def run_shapes() -> base.Result:
    """Any convolution of any image, brought back with any tile, and its weight gradient agree with autograd's."""
    from hypothesis import example, given, settings
    from hypothesis import strategies as st

    from resens_fast.kernels import backward, pack, tiles

    worst = 0.0

    @settings(max_examples=12, deadline=None, derandomize=True, database=None)
    @given(
        st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 2, 3]),
        st.integers(1, 3), st.integers(0, 2), st.integers(1, 3), st.sampled_from([16, 64, 256]),
    )  # fmt: skip
    @example(3, 4, 12, 12, 3, 1, 1, 3, 64)  # pixels enough for two ranges of weight gradients
    def check(c: int, n: int, h: int, w: int, k: int, stride: int, padding: int, images: int, block_m: int) -> None:
        nonlocal worst
        if min(h, w) + 2 * padding < k:
            return
        g = torch.Generator().manual_seed(c + 41 * n)
        part = fused.Conv(torch.randn(n, c, k, k, generator=g), torch.zeros(n), stride, padding, False)
        exact = fused.convert(part, torch.float64)
        image = torch.randn(images, c, h, w, generator=g)
        x, weight = image.double().requires_grad_(), exact.weight.requires_grad_()
        y = F.conv2d(x, weight, None, stride, padding)
        seed = torch.randn(y.shape, generator=g)
        right = torch.autograd.grad((y * seed).sum(), [x, weight])

        shape = pack.conv_shape(part, h, w)
        side = pack.ShortcutShape(1, 1, 1, 0, 0, 0, False)
        block = pack.BlockShape((shape,), side, False, False, (c, h, w), (n, *shape.out))
        wide_x = F.pad(image.permute(0, 2, 3, 1), (0, pack.width(c) - c)).contiguous()
        wide_g = F.pad(seed.permute(0, 2, 3, 1), (0, pack.width(n) - n)).contiguous()
        out, one = torch.full_like(wide_x, float("nan")), torch.ones(1)
        bits, steps = torch.zeros(1, 1, dtype=torch.int16), torch.zeros(1, 3, dtype=torch.int32)
        constants, tile = backward.conv_constants(block, 0, one.dtype), tiles.Tile(block_m, 16, 4, 2)
        backward.launch_conv_transpose(
            wide_g.view(1, -1), out.view(1, -1), (steps, one), pack.conv_weights([part], one.device, one.dtype).weight,
            one, (bits, bits), constants, tile, 0, 1, images,
        )  # fmt: skip
        assert not out[..., c:].any(), "the channels that fill up are not zero"
        ours = (out[..., :c].permute(0, 3, 1, 2), backward.launch_weight_gradient(wide_x, wide_g, shape, None, None, 0))
        for found, expected in zip(ours, right, strict=True):
            worst = max(worst, float((found - expected).abs().max()) / float(expected.abs().max() + 1))
        assert worst < 1e-5, f"an error of {worst}"

    check()
    return {"error": worst, "bound": 1e-5}


def run_plans() -> base.Result:
    """Any sweep of a small network, forward and along its paths, agrees with the naive loops in float64."""
    from hypothesis import given, settings
    from hypothesis import strategies as st

    from resens_fast.engines.triton_gradients import TritonGradientExecutor

    whole, structure = base.network("post-pooled-pad-3-10")
    n, worst = len(structure), 0.0
    images = torch.randn(2, *whole.input_shape, generator=torch.Generator().manual_seed(13))
    labels = torch.tensor([2, 0])
    gates = st.lists(st.sampled_from([0.0, 1.0, 0.5, -1.0]), min_size=n, max_size=n)
    swap = st.booleans()
    i, j = next((i, j) for i in range(n) for j in range(i) if structure.exchangeable(i, j))

    @settings(max_examples=3, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.tuples(gates, swap), min_size=1, max_size=3))
    def check(drawn: list[tuple[list[float], bool]]) -> None:
        nonlocal worst
        orders = np.tile(np.arange(n, dtype=np.int16), (len(drawn), 1))
        for row, (_, swapped) in zip(orders, drawn, strict=True):
            if swapped:
                row[[i, j]] = row[[j, i]]
        scales = np.array([row for row, _ in drawn], dtype=np.float32)
        extra = (("mask",) * len(drawn), np.zeros(len(drawn), dtype=np.int64))
        sweep = Sweep(structure, orders, scales, *extra)
        made = plan(structure, sweep)
        found = base.executor(whole, made, torch.float32).logits(images)[torch.from_numpy(made.word_of)].double()
        exact = base.truth(whole, sweep, images, torch.float64)
        worst = max(worst, base.rms(found - exact) / base.rms(exact))

        paths = Sweep(structure, np.tile(orders[:1], (len(drawn), 1)), scales, *extra)
        back = planned(whole, structure, paths)
        ready = TritonGradientExecutor(whole, back, torch.device("cpu"), torch.float32)
        gradients = ready.gradients(images, labels)[torch.from_numpy(back.word_of)].double()
        right = truth(whole, paths, images, labels, torch.float64)[0]
        worst = max(worst, base.rms(gradients - right) / base.rms(right))
        assert worst < 1e-5, f"an error of {worst}"

    check()
    return {"error": worst, "bound": 1e-5}


def cases() -> dict[str, Any]:
    # Another order of the forward changes only which bits are whose: one network stands for all.
    table: dict[str, Any] = {
        f"paths-{name}-{dtype}": lambda n=name, d=dtype: run_paths(n, base.DTYPES[d], n == "post-pad-10-17")
        for name in base.NETWORKS
        for dtype in ("float32", "float16")
    }
    return table | {"paths-alone": run_paths_alone, "tiny": run_tiny, "shapes": run_shapes, "plans": run_plans}
